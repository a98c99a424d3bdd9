"""The commands as a user calls them: train, kill, resume, several processes, predict, bad input."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, TrainingArguments

from magneto_training import quantized_backbone, streaming, trainer
from magneto_training.arguments import UserError
from modeling_magneto import MagnetoForOutlierDetection, MagnetoForTagSummarization

ROOT = Path(__file__).parent.parent
ONE_PROCESS = [sys.executable]
# On CPUs `accelerate launch` starts one process, whatever number it is given; this is torchrun.
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, dataset_dir) -> Path:
    settings = {
        "dataset_name": str(dataset_dir),
        "backbone": "test_resnet.r160_in1k",
        "backbone_weights": "none",
        "num_trainable_backbone_stages": -1,
        "image_size": 32,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def run(launcher: list[str], script: str, *arguments, **kwargs) -> subprocess.CompletedProcess:
    command = [*launcher, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def run_well(launcher: list[str], script: str, *arguments) -> str:
    done = run(launcher, script, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained_dir(config_file, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("trained") / "model"
    run_well(ONE_PROCESS, "train.py", config_file, "--output_dir", output_dir)
    return output_dir


def test_training_leaves_a_complete_folder(trained_dir):
    names = {path.name for path in trained_dir.iterdir()}
    assert {"model.safetensors", "config.json", "processor_config.json", "tokenizer.json", "README.md"} <= names
    assert {"modeling_magneto.py", "processing_magneto.py", "metrics.json", "trainer_state.json"} <= names
    assert {"pipeline_magneto.py", "handler.py", "requirements.txt"} <= names
    for picture in ("training_curves.png", "calibration.png"):
        assert picture in names and f"({picture})" in (trained_dir / "README.md").read_text()
    assert list(trained_dir.glob("runs/*/events*")), "no TensorBoard log"
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert isinstance(AutoModel.from_pretrained(trained_dir), MagnetoForTagSummarization)
    assert AutoProcessor.from_pretrained(trained_dir).vocabulary == ["blue", "green", "red", "yellow"]


def test_metrics_file_holds_the_contract_keys_for_each_split(trained_dir):
    metrics = json.loads((trained_dir / "metrics.json").read_text())
    assert {name: figures["num_images"] for name, figures in metrics.items()} == {"validation": 16, "test": 13}
    for figures in metrics.values():
        assert {
            *("precision", "recall", "f1", "tag_f1", "image_f1", "reducible_f1", "keep_all_reducible_f1"),
            *("keep_all_precision", "keep_all_recall", "keep_all_f1"),
        } <= set(figures)
        assert figures["keep_all_recall"] == 100
        # The scores are raw, and so the paper's rule is the one in force.
        for name in ("precision", "recall", "f1", "tag_f1", "image_f1", "reducible_f1"):
            assert figures[f"{name}_at_half"] == figures[name], name
        assert figures["expected_calibration_error_before"] == figures["expected_calibration_error"]
        assert figures["expected_calibration_error_after"] != figures["expected_calibration_error"]
    assert json.loads((trained_dir / "config.json").read_text())["calibration"] is None
    assert AutoProcessor.from_pretrained(trained_dir).selection["rule"] == "threshold"


def test_each_epoch_logs_losses_of_all_outputs_and_the_gate(trained_dir):
    history = json.loads((trained_dir / "trainer_state.json").read_text())["log_history"]
    training = [entry for entry in history if "loss" in entry]
    evaluation = [entry for entry in history if "eval_f1" in entry]
    assert len(training) == len(evaluation) == 2
    for entry in training:
        parts = [entry[name] for name in ("final_loss", "tag_loss", "image_loss")]
        assert sum(parts) == pytest.approx(entry["loss"], rel=1e-4)
        assert 0 < entry["mean_gate"] < 1
    for entry in evaluation:
        assert {"eval_tag_f1", "eval_image_f1", "eval_tag_loss", "eval_mean_gate"} <= set(entry)


def test_calibrated_scores_and_the_rule_travel_with_the_model(config_file, dataset_dir, tmp_path):
    folders = {"one": tmp_path / "one", "two": tmp_path / "two"}
    arguments = [config_file, "--selection", "expected_f1", "--num_train_epochs", 1]
    printed = run_well(ONE_PROCESS, "train.py", *arguments, "--output_dir", folders["one"])
    run_well(TWO_PROCESSES, "train.py", *arguments, "--output_dir", folders["two"])

    assert "(calibration.png)" in (folders["one"] / "README.md").read_text()
    for folder in folders.values():
        metrics = json.loads((folder / "metrics.json").read_text())
        for figures in metrics.values():
            assert {"f1_at_half", "precision_at_half", "recall_at_half"} <= set(figures)
            assert figures["expected_calibration_error"] == figures["expected_calibration_error_after"]
            assert "expected_calibration_error_before" in figures
        assert (folder / "calibration.png").stat().st_size > 1000
        config = json.loads((folder / "config.json").read_text())
        assert set(config["calibration"]) == {"logits", "tag_logits", "image_logits"}
        assert AutoProcessor.from_pretrained(folder).selection == {"rule": "expected_f1"}
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        (at_half,) = [entry["eval_f1"] for entry in history if "eval_f1" in entry]
        assert metrics["validation"]["f1_at_half"] == pytest.approx(at_half)

    output_file = tmp_path / "out.parquet"
    arguments = ["--model_name_or_path", folders["one"], "--dataset_name", dataset_dir, "--output_file", output_file]
    run_well(ONE_PROCESS, "predict.py", *arguments, "--report_images", 0)
    metrics = json.loads((folders["one"] / "metrics.json").read_text())["test"]
    predicted = json.loads(output_file.with_suffix(".metrics.json").read_text())
    for name in ("precision", "recall", "f1", "tag_f1", "image_f1", "reducible_f1"):
        assert predicted[name] == pytest.approx(metrics[name]), name
    assert all(row["selected_tags"] for row in pq.read_table(output_file).to_pylist())
    assert f"{metrics['f1']:.2f}" in printed


def test_a_killed_run_resumes_in_the_middle_of_an_epoch_to_the_same_metrics(config_file, tmp_path):
    # 6 steps an epoch: the checkpoint after step 8 lies inside the second.
    arguments = [config_file, "--save_strategy", "steps", "--save_steps", 4, "--eval_strategy", "steps"]
    arguments += ["--eval_steps", 4, "--dataloader_num_workers", 1, "--num_train_epochs", 4]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_well(ONE_PROCESS, "train.py", *arguments, "--output_dir", whole)

    command = [*ONE_PROCESS, str(ROOT / "train.py"), *map(str, arguments), "--output_dir", str(killed)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.time() + 120
        while not (killed / "checkpoint-8" / "trainer_state.json").exists():
            assert process.poll() is None and time.time() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (killed / "metrics.json").exists()

    run_well(ONE_PROCESS, "train.py", *arguments, "--output_dir", killed, "--resume_from_checkpoint", "true")
    assert json.loads((killed / "metrics.json").read_text()) == json.loads((whole / "metrics.json").read_text())
    for name, weights in AutoModel.from_pretrained(whole).state_dict().items():
        assert torch.equal(weights, AutoModel.from_pretrained(killed).state_dict()[name]), name


def test_two_processes_take_the_steps_of_one_from_a_stream(config_file, tmp_path):
    # Without dropout, one process with a batch of 8 takes the steps of two with 4.
    arguments = [config_file, "--streaming", "true", "--dropout", 0, "--save_strategy", "steps"]
    arguments += ["--num_trainable_backbone_stages", 0]
    arguments += ["--save_steps", 4, "--eval_strategy", "steps", "--eval_steps", 4, "--shuffle_buffer_size", 20]
    arguments += ["--save_total_limit", 9]
    one, two = tmp_path / "one", tmp_path / "two"
    run_well(ONE_PROCESS, "train.py", *arguments, "--output_dir", one)
    run_well(TWO_PROCESSES, "train.py", *arguments, "--per_device_train_batch_size", 4, "--output_dir", two)
    assert json.loads((one / "metrics.json").read_text())["test"]["num_images"] == 13
    weights, same = (load_file(folder / "checkpoint-12" / "model.safetensors") for folder in (one, two))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, same[name], atol=1e-6, rtol=0, msg=name)


def test_a_streaming_run_in_8_bits_resumes_in_the_middle_of_an_epoch_to_the_same_weights(config_file, tmp_path):
    arguments = [config_file, "--streaming", "true", "--save_strategy", "steps", "--save_steps", 4]
    arguments += ["--save_total_limit", 9, "--int8", "true", "--num_trainable_backbone_stages", 0]
    arguments += ["--eval_strategy", "steps", "--eval_steps", 4, "--dataloader_num_workers", 1]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_well(ONE_PROCESS, "train.py", *arguments, "--output_dir", whole)
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")  # as if killed in the first of two epochs

    run_well(ONE_PROCESS, "train.py", *arguments, "--resume_from_checkpoint", "true", "--output_dir", resumed)

    weights, same = (load_file(folder / "checkpoint-12" / "model.safetensors") for folder in (whole, resumed))
    assert weights.keys() == same.keys() and all(torch.equal(weights[name], same[name]) for name in weights)


def test_two_processes_train(config_file, tmp_path):
    run_well(TWO_PROCESSES, "train.py", config_file, "--output_dir", tmp_path / "model", "--num_train_epochs", 1)
    metrics = json.loads((tmp_path / "model" / "metrics.json").read_text())
    assert metrics["validation"]["num_images"] == 16


@pytest.mark.parametrize("streams", ["tag", "both"])
def test_two_processes_take_the_same_steps_as_one(config_file, tmp_path, streams):
    # With both streams, the backbone is trained too, and its batch norms look at the photographs of both processes.
    arguments = [config_file, "--streams", streams, "--dropout", 0, "--num_train_epochs", 1]
    one, two = tmp_path / "one", tmp_path / "two"
    run_well(ONE_PROCESS, "train.py", *arguments, "--output_dir", one, "--per_device_train_batch_size", 8)
    run_well(TWO_PROCESSES, "train.py", *arguments, "--output_dir", two, "--per_device_train_batch_size", 4)

    weights, same = (load_file(folder / "model.safetensors") for folder in (one, two))
    for name, tensor in weights.items():
        bound = 2e-5 if "running" in name else 1e-6  # statistics add up the rounding of all layers below
        torch.testing.assert_close(tensor, same[name], atol=bound, rtol=0, msg=name)
    log, same_log = (json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (one, two))
    assert log[0]["step"] == same_log[0]["step"] == 6
    assert log[0]["final_loss"] == pytest.approx(same_log[0]["final_loss"], abs=1e-5)


def test_two_processes_share_the_making_of_a_feature_cache_and_take_the_same_steps_as_one(config_file, tmp_path):
    backbone = tmp_path / "backbone.safetensors"
    save_file(timm.create_model("test_resnet.r160_in1k").state_dict(), backbone)
    arguments = [config_file, "--cached_views", 2, "--backbone_weights", backbone, "--disable_tqdm", "false"]
    arguments += ["--num_trainable_backbone_stages", 0, "--dropout", 0, "--num_train_epochs", 2]

    def train(launcher, name, batch_size, cache, seed=0):
        own = ["--output_dir", tmp_path / name, "--feature_cache_dir", cache, "--seed", seed]
        done = run(launcher, "train.py", *arguments, *own, "--per_device_train_batch_size", batch_size)
        assert done.returncode == 0, done.stderr[-3000:]
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert {split: figures["num_images"] for split, figures in metrics.items()} == {"validation": 16, "test": 13}
        return done

    def stored(cache):
        return {path.relative_to(cache): path for path in cache.rglob("view-*") if path.suffix != ".lock"}

    def share_of_the_first(done):
        return re.search(r"Caching features: 100%.* (\d+)/", done.stderr)[1]

    cache, other_cache = tmp_path / "cache", tmp_path / "other_cache"
    assert share_of_the_first(train(ONE_PROCESS, "one", 8, cache)) == "96"  # two views of 48 photographs
    assert share_of_the_first(train(TWO_PROCESSES, "two", 4, other_cache)) == "48"
    files, same = stored(cache), stored(other_cache)
    assert files.keys() == same.keys() and len(files) == 2 + 1 + 1  # train, validation, test
    assert all(file.read_bytes() == same[name].read_bytes() for name, file in files.items())
    weights, same = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, same[name], atol=1e-6, rtol=0, msg=name)

    times = {name: file.stat().st_mtime_ns for name, file in files.items()}
    assert "of which 0 are to be computed" in train(TWO_PROCESSES, "another_seed", 4, cache, seed=1).stdout
    assert {name: file.stat().st_mtime_ns for name, file in stored(cache).items()} == times


def test_predictions_of_two_processes_equal_those_of_one(trained_dir, dataset_dir, tmp_path):
    def predict(launcher, name):
        file = tmp_path / name / "out.parquet"
        arguments = ["--model_name_or_path", trained_dir, "--dataset_name", dataset_dir, "--output_file", file]
        arguments += ["--split", "test", "--batch_size", 4, "--rows_per_part", 5]  # both processes have parts
        printed = run_well(launcher, "predict.py", *arguments)
        assert "keep all" in printed and str(file.with_name("report.html")) in printed
        assert {path.name for path in file.parent.iterdir()} == {"out.parquet", "out.metrics.json", "report.html"}
        return pq.read_table(file).to_pylist(), json.loads(file.with_name("out.metrics.json").read_text())

    one, metrics = predict(ONE_PROCESS, "one")
    two, same_metrics = predict(TWO_PROCESSES, "two")
    rows = datasets.Dataset.from_parquet(str(dataset_dir / "test.parquet"))
    assert [row["item_id"] for row in one] == [row["item_id"] for row in two] == rows["item_id"][:]
    for single, double, row in zip(one, two, rows, strict=True):
        assert single["tags"] == double["tags"] == row["tags"]
        assert single["scores"] == pytest.approx(double["scores"], abs=1e-5)
        assert single["selected_tags"] == [
            tag for tag, score in zip(single["tags"], single["scores"], strict=True) if score >= 0.5
        ]
    assert same_metrics == metrics
    trained = json.loads((trained_dir / "metrics.json").read_text())["test"]
    for name in ("precision", "recall", "f1", "tag_f1", "image_f1", "keep_all_f1", "reducible_f1"):
        assert metrics[name] == pytest.approx(trained[name]), name


def test_a_model_is_pushed_and_loaded_by_its_id(config_file, tmp_path):
    output_dir = tmp_path / "model"
    with HubServer() as hub:
        environment = os.environ | hub.environment(tmp_path / "home")
        arguments = ["--num_train_epochs", 1, "--push_to_hub", "true", "--hub_model_id", "user/tiny"]
        arguments += ["--hub_private_repo", "true", "--widget_images", 2]
        done = run(ONE_PROCESS, "train.py", config_file, *arguments, "--output_dir", output_dir, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        published = hub.files("user/tiny", "model")
        assert hub.commits("user/tiny") == 1 and hub.is_private("user/tiny")

        code = "import sys; from transformers import AutoModel, AutoProcessor\n"
        code += "model = AutoModel.from_pretrained('user/tiny', trust_remote_code=True)\n"
        code += "AutoProcessor.from_pretrained('user/tiny', trust_remote_code=True).save_pretrained('loaded')\n"
        code += "model.save_pretrained('loaded')"
        loaded = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert loaded.returncode == 0, loaded.stderr[-3000:]

    for name in ("model.safetensors", "metrics.json", "modeling_magneto.py", "processor_config.json", "handler.py"):
        assert published[name] == (output_dir / name).read_bytes(), name
    card = published["README.md"].decode()
    assert 'from_pretrained("user/tiny"' in card and "src: widget/example_2.jpg" in card
    assert [name for name in published if "/" in name] == ["widget/example_1.jpg", "widget/example_2.jpg"]
    assert "trainer_state.json" not in published
    weights, same = (load_file(folder / "model.safetensors") for folder in (output_dir, tmp_path / "loaded"))
    assert weights.keys() == same.keys() and all(torch.equal(weights[name], same[name]) for name in weights)


def test_pretraining_reads_no_labels_and_training_goes_on_from_it(config_file, dataset_dir, tmp_path):
    unlabeled, pretrained = tmp_path / "unlabeled", tmp_path / "pretrained"
    unlabeled.mkdir()
    rows = datasets.Dataset.from_parquet(str(dataset_dir / "train.parquet")).remove_columns("important_tags")
    rows.to_parquet(unlabeled / "train.parquet")
    arguments = [config_file, "--num_train_epochs", 1]

    run_well(ONE_PROCESS, "pretrain.py", *arguments, "--dataset_name", unlabeled, "--output_dir", pretrained)

    metrics = json.loads((pretrained / "metrics.json").read_text())["validation"]
    assert {"tag_f1", "image_f1", "tag_average_precision", "image_average_precision", "flag_all_f1"} <= set(metrics)
    assert metrics["num_images"] == 4
    assert isinstance(AutoModel.from_pretrained(pretrained), MagnetoForOutlierDetection)
    assert "--init_from pretrained" in (pretrained / "README.md").read_text()
    assert (pretrained / "training_curves.png").exists()

    printed = run_well(
        ONE_PROCESS, "train.py", *arguments, "--init_from", pretrained, "--output_dir", tmp_path / "model"
    )
    assert "the embeddings of 4 of 4 tags; started afresh: classifiers, gate" in printed


def test_the_outlier_test_counts_images_that_keep_a_strange_tag(trained_dir, dataset_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model_name_or_path", str(trained_dir), "--dataset_name", str(dataset_dir), "--split", "train"]
    arguments += ["--inject_outliers", "0.5", "--threshold", "0.4"]
    for name in ("first", "again"):
        argv = ["predict.py", *arguments, "--output_file", f"{name}.parquet"]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(ROOT / "predict.py"), run_name="__main__")

    predictions = pq.read_table("first.parquet").to_pylist()
    assert predictions == pq.read_table("again.parquet").to_pylist()
    rows = datasets.Dataset.from_parquet(str(dataset_dir / "train.parquet")).remove_columns("image")
    fooled = 0
    for predicted, row in zip(predictions, rows, strict=True):
        strange = set(predicted["tags"]) - set(row["tags"])
        assert predicted["tags"][: len(row["tags"])] == row["tags"]
        assert bool(strange) == (len(row["tags"]) < 4)  # the vocabulary has four tags
        fooled += not strange.isdisjoint(predicted["selected_tags"])
    metrics = json.loads(Path("first.metrics.json").read_text())
    assert metrics["outlier_percent"] == pytest.approx(100 * fooled / len(predictions)) and fooled > 0
    assert metrics["keep_all_precision"] < 100 and metrics["num_images"] == 48


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--learning_rat", "1"], 2, "did you mean 'learning_rate'?"),
        (["--dropout", "-1"], 2, "dropout"),
        (["--hidden_size", "15"], 2, "hidden_size"),
        (["--backbone", "resnet81"], 2, "resnet81"),
        (["--backbone_weights", "pretrained"], 1, "--backbone_weights none"),
        (["--dataset_name", "missing_folder"], 1, "missing_folder"),
        (["--train_split", "training"], 1, "'training'"),
        (["--widget_images", "-1"], 2, "widget_images"),
        (["--streaming", "true", "--cached_views", "2"], 2, "cached_views is 2, expected 0 with --streaming true"),
        # Before the rows are looked for.
        (["--int8", "true", "--dataset_name", "missing_folder"], 2, "int8 is for a frozen backbone"),
        (["--metric_for_best_model", "f1_score", "--dataset_name", "missing_folder"], 2, "'f1_score', expected"),
        (["--output_dir", __file__, "--dataset_name", "missing_folder"], 1, "expected a folder to write to"),
        (["--push_to_hub", "true"], 1, "offline mode is enabled"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else None,
)
def test_bad_arguments_end_training_with_one_line(
    config_file, tmp_path, arguments, status, expected, monkeypatch, capsys
):
    monkeypatch.setattr(
        sys, "argv", ["train.py", str(config_file), "--output_dir", str(tmp_path / "model"), *arguments]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert ended.value.code == status
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error:")]
    assert len(errors) == 1 and expected in errors[0]
    assert not (tmp_path / "model" / "model.safetensors").exists()


def run_here(monkeypatch, capsys, script: str, *arguments) -> str:
    """Run a command that ends with an error in this process, and return its message."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return capsys.readouterr().err.rpartition(f"{script}: error: ")[2]


def test_pretraining_refuses_before_it_reads_what_it_cannot_do(config_file, tmp_path, monkeypatch, capsys):
    arguments = [config_file, "--dataset_name", "missing_folder", "--output_dir", tmp_path / "model"]

    for wish, message in {
        ("--cached_views", 2): "cached_views is 2 and num_trainable_backbone_stages -1, expected 0",
        ("--metric_for_best_model", "f1"): "metric_for_best_model is 'f1', expected one of average_precision, ",
        ("--output_dir", __file__): f"output_dir is '{__file__}', expected a folder to write to: File exists",
    }.items():
        assert run_here(monkeypatch, capsys, "pretrain.py", *arguments, *wish).startswith(message)


def test_pretraining_takes_a_file_whose_best_epoch_is_that_of_training(config_file, tmp_path, monkeypatch, capsys):
    file = tmp_path / "train.yaml"
    file.write_text(f"{config_file.read_text()}metric_for_best_model: f1\n")
    arguments = [file, "--output_dir", tmp_path / "model", "--dataset_name", "missing_folder"]

    assert "missing_folder" in run_here(monkeypatch, capsys, "pretrain.py", *arguments)


def test_nobody_waits_for_another_process_to_read_a_stream(config_file, tmp_path, monkeypatch, capsys):
    def read(*_):
        raise UserError("the stream was read")

    monkeypatch.setattr(streaming, "load_streamed_splits", read)
    monkeypatch.setattr(TrainingArguments, "main_process_first", lambda *_, **__: pytest.fail("it waits"))
    arguments = [config_file, "--streaming", "true", "--output_dir", tmp_path / "model"]

    assert run_here(monkeypatch, capsys, "train.py", *arguments) == "the stream was read\n"


class StoppedTrainer:
    """Stands in for `MagnetoTrainer`, and ends a command with the backbones of training, evaluation and results."""

    def __init__(self, *_, train_collator, eval_collator, **__):
        self.train_collator, self.eval_collator = train_collator, eval_collator
        self.found = []

    def train(self, **_):
        self.found = [self._backbone(self.train_collator), self._backbone(self.eval_collator)]

    def predict_split(self, *_):
        raise UserError(", ".join([*self.found, self._backbone(self.eval_collator)]))

    @staticmethod
    def _backbone(collator) -> str:
        return type(getattr(collator, "collate", collator).backbone).__name__


@pytest.mark.parametrize(
    ("script", "arguments", "backbones"),
    [
        ("train.py", [], "FrozenBackbone, FrozenBackbone, FrozenBackbone"),
        # The saved model computes in float32, so its figures and its calibration are those of float32.
        ("train.py", ["--int8", "true"], "QuantizedBackbone, QuantizedBackbone, FrozenBackbone"),
        ("train.py", ["--cached_views", "1"], "NoneType, NoneType, NoneType"),
        ("pretrain.py", ["--cached_views", "1"], "NoneType, NoneType, NoneType"),
    ],
)
def test_which_backbone_computes_what(config_file, tmp_path, monkeypatch, capsys, script, arguments, backbones):
    monkeypatch.setattr(trainer, "MagnetoTrainer", StoppedTrainer)
    monkeypatch.setattr(quantized_backbone, "_quantize", lambda *_: b"")
    arguments = [config_file, "--num_trainable_backbone_stages", 0, *arguments]
    folders = ["--output_dir", tmp_path / "model", "--feature_cache_dir", tmp_path / "cache"]

    assert run_here(monkeypatch, capsys, script, *arguments, *folders) == f"{backbones}\n"


def test_bad_rows_stop_training_with_their_ids_or_are_left_out(config_file, dataset_dir, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for split in ("train", "validation"):
        table = pq.read_table(dataset_dir / f"{split}.parquet")
        rows = datasets.Dataset.from_parquet(str(dataset_dir / f"{split}.parquet"))
        rows = rows.cast_column("image", datasets.Image(decode=False)).to_list()
        if split == "train":
            rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:90]
            rows[7]["important_tags"] = ["purple"]
        dataset = datasets.Dataset.from_list(rows, features=datasets.Features.from_arrow_schema(table.schema))
        dataset.to_parquet(bad / f"{split}.parquet")
    arguments = [config_file, "--dataset_name", bad, "--output_dir", tmp_path / "model", "--num_train_epochs", 1]

    done = run(ONE_PROCESS, "train.py", *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert "2 of 48 rows" in message and "item_id im3" in message and "item_id im7" in message

    assert "2 of 48 rows" in run_well(ONE_PROCESS, "train.py", *arguments, "--skip_bad_rows", "true")
