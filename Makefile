PYTHON ?= python3
VENV := .venv
RUN := HF_HUB_OFFLINE=1 $(VENV)/bin
# All that accelerate would otherwise say that it has chosen itself.
LAUNCH := $(RUN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

# What the demo draws and how long it trains; `make demo DEMO_IMAGES=800 DEMO_EPOCHS=3` is a quick look.
DEMO_IMAGES ?= 4000
DEMO_EPOCHS ?= 12

# The model of `make app`: a trained folder or a Hub id.
MODEL ?= demo/model

.PHONY: demo app test lint format

# One folder of packages for everything; installed again when pyproject.toml changes.
$(VENV)/demo: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(VENV)/dev: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/demo

$(VENV)/app: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable ".[app]"
	touch $@

demo: $(VENV)/demo
	rm -rf demo
	$(RUN)/python dataset_scripts/make_sample.py demo/nus_wide --num_images $(DEMO_IMAGES)
	$(RUN)/python dataset_scripts/prepare_nus_wide.py demo/nus_wide demo/dataset
	$(LAUNCH) train.py configs/sample.yaml --num_train_epochs $(DEMO_EPOCHS)
	$(LAUNCH) train.py configs/sample.yaml --num_train_epochs $(DEMO_EPOCHS) \
		--streams tag --output_dir demo/tag_only_model
	$(LAUNCH) predict.py --model_name_or_path demo/tag_only_model \
		--dataset_name demo/dataset --split test --output_file demo/tag_only.parquet --report_images 0
	$(LAUNCH) predict.py --model_name_or_path demo/model \
		--dataset_name demo/dataset --split test --output_file demo/magneto.parquet
	@echo; echo "The drawn sample's test split, in percent:"; echo
	@$(RUN)/python -m magneto_training.evaluation demo/tag_only.metrics.json demo/magneto.metrics.json
	@echo; echo demo/report.html

app: $(VENV)/app
	MODEL_ID=$(MODEL) $(VENV)/bin/python hub/app.py

test: $(VENV)/dev lint
	$(RUN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
