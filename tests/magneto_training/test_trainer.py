import copy
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, RepoUrl, constants
from transformers import TrainerState

from magneto_training.arguments import (
    DataArguments,
    MagnetoTrainingArguments,
    ModelArguments,
    PretrainingArguments,
    UsageError,
    UserError,
)
from magneto_training.augmentation import TagAugmentation
from magneto_training.checkpoints import find_checkpoint
from magneto_training.collation import AugmentedDataset, TagCollator
from magneto_training.evaluation import compute_metrics
from magneto_training.photographs import undecoded
from magneto_training.tag_data import load_training_splits
from magneto_training.trainer import (
    MagnetoTrainer,
    PatientStoppingCallback,
    check_output_dir,
    check_training_options,
)
from modeling_magneto import (
    MagnetoConfig,
    MagnetoForOutlierDetection,
    MagnetoForTagSummarization,
)


@pytest.fixture
def data_args(dataset_dir) -> DataArguments:
    return DataArguments(dataset_name=str(dataset_dir))


@pytest.fixture
def make_trainer(tiny_config, processor, data_args, tmp_path):
    def make(config_changes: dict | None = None, **changes) -> MagnetoTrainer:
        args = MagnetoTrainingArguments(
            output_dir=str(tmp_path / "run"), report_to="none", disable_tqdm=True, use_cpu=True, **changes
        )
        config = MagnetoConfig(**{**tiny_config.to_dict(), **(config_changes or {})})
        splits = load_training_splits(data_args, use_images=True)
        model = MagnetoForTagSummarization(config)
        return MagnetoTrainer(
            model,
            args,
            processor,
            train_dataset=AugmentedDataset(splits["train"], args.seed),
            eval_dataset=undecoded(splits["validation"]),
            train_collator=TagCollator.for_training(
                processor, data_args, TagAugmentation(processor.vocabulary, 0.5, 0.5)
            ),
            eval_collator=TagCollator(processor),
            compute_metrics=compute_metrics,
        )

    return make


def test_training_batches_are_augmented_anew_in_every_epoch_and_evaluation_batches_are_not(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=48)
    loader = trainer.get_train_dataloader()
    train = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        (batch,) = loader
        order = sorted(range(48), key=lambda index: batch["pixel_values"][index].sum().item())
        train.append(batch["pixel_values"][order])
    evaluation = [torch.cat([batch["pixel_values"] for batch in trainer.get_eval_dataloader()]) for _ in range(2)]

    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "labels"}
    assert not torch.equal(train[0], train[1])
    assert torch.equal(train[0], train[2])  # a resumed run sees the same
    assert torch.equal(*evaluation)


def test_evaluating_between_two_epochs_does_not_change_training_batches(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=8)
    train_loader = trainer.get_train_dataloader()
    trainer.get_eval_dataloader()
    train_loader.set_epoch(0)

    batch = next(iter(train_loader))

    assert trainer.train_collator in (train_loader.collate_fn, train_loader.base_dataloader.collate_fn)
    assert batch["pixel_values"].shape == (8, 3, 32, 32)


def test_the_log_holds_the_means_of_the_losses_and_of_the_gate(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=16)
    trainer.model.train()
    losses = {name: [] for name in ("final_loss", "tag_loss", "image_loss", "mean_gate")}
    for batch in trainer.get_train_dataloader():
        torch.manual_seed(0)
        trainer.compute_loss(trainer.model, batch)
        torch.manual_seed(0)
        with torch.no_grad():
            outputs = trainer.model(**batch)
        for name in ("final_loss", "tag_loss", "image_loss"):
            losses[name].append(outputs[name].item())
        losses["mean_gate"].append(outputs.gate[batch["attention_mask"].bool()].mean().item())

    trainer.log(logs := {"loss": 1.0})
    trainer.log(again := {"loss": 1.0})

    assert len(losses["tag_loss"]) == 3
    for name, values in losses.items():
        # Batch norm's statistics moved between the two calls, but in training they do not matter.
        assert logs[name] == pytest.approx(np.mean(values), rel=1e-5), name
    assert not set(again) & set(losses)  # a new period starts from nothing


class OnTwoGpus(torch.nn.Module):
    """What `nn.DataParallel` makes of a model's outputs: one loss of each GPU."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        outputs = self.model(**batch)
        for name in ("loss", "final_loss", "tag_loss", "image_loss"):
            outputs[name] = torch.stack([outputs[name], outputs[name] + 1])
        return outputs


def test_the_losses_of_several_gpus_in_one_process_are_logged_as_their_mean(make_trainer):
    trainer = make_trainer({"dropout": 0.0})
    batch = next(iter(trainer.get_train_dataloader()))
    model = OnTwoGpus(trainer.model).train()
    expected = trainer.model(**batch)

    loss = trainer.compute_loss(model, batch)
    trainer.log(logs := {"loss": 1.0})

    assert loss.shape == (2,)  # Trainer itself takes the mean of this one
    for name in ("final_loss", "tag_loss", "image_loss"):
        assert logs[name] == pytest.approx(expected[name].item() + 0.5, abs=1e-5), name


def test_evaluation_does_not_count_among_the_training_losses(make_trainer):
    trainer = make_trainer()
    trainer.evaluate()

    trainer.log(logs := {"loss": 1.0})

    assert "final_loss" not in logs


def test_the_loss_is_the_models_own(make_trainer):
    trainer = make_trainer()
    trainer.model.eval()
    batch = next(iter(trainer.get_eval_dataloader()))

    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1000))

    assert loss == trainer.model(**batch).loss  # not divided by a number of items


def test_a_short_training_improves_logs_and_saves_the_best_epoch(make_trainer):
    trainer = make_trainer(
        {"num_trainable_backbone_stages": -1, "dropout": 0.0},
        num_train_epochs=5,
        per_device_train_batch_size=16,
        optim="adamw_torch",
        optim_args=None,
        learning_rate=1e-2,
    )
    before = copy.deepcopy(trainer.model.state_dict())

    trainer.train()

    history = trainer.state.log_history
    training = [entry for entry in history if "loss" in entry]
    evaluations = [entry for entry in history if "eval_f1" in entry]
    assert len(training) == len(evaluations) == 5
    assert {"final_loss", "tag_loss", "image_loss", "mean_gate", "grad_norm"} <= set(training[0])
    parts = training[0]["final_loss"] + training[0]["tag_loss"] + training[0]["image_loss"]
    assert training[0]["loss"] == pytest.approx(parts, abs=2e-3)
    assert training[-1]["loss"] < training[0]["loss"]
    assert {"eval_tag_f1", "eval_image_f1", "eval_mean_gate", "eval_keep_all_f1"} <= set(evaluations[0])

    best = max(entry["eval_f1"] for entry in evaluations)
    split, _ = trainer.predict_split("test", trainer.eval_dataset)
    assert split["f1"] == pytest.approx(best)
    assert not [name for name in split if "runtime" in name or "per_second" in name or name.startswith("test_")]
    assert any(not torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())

    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    assert not list(folder.glob("*.bin"))
    assert (folder / "model.safetensors").is_file() and (folder / "processor_config.json").is_file()


def test_a_splits_predictions_come_with_the_tags_in_the_order_of_the_rows(make_trainer):
    trainer = make_trainer(per_device_eval_batch_size=5)

    metrics, prediction = trainer.predict_split("validation", trainer.eval_dataset)

    evaluated = trainer.evaluate()
    assert {name: evaluated[f"eval_{name}"] for name in metrics} == metrics
    batch = TagCollator(trainer.processing_class)([trainer.eval_dataset[index] for index in range(16)])
    real = prediction.label_ids != -100
    assert np.array_equal(prediction.label_ids, batch["labels"].numpy())
    assert np.array_equal(prediction.inputs[real], batch["input_ids"].numpy()[real])
    trainer.model.eval()
    with torch.no_grad():
        outputs = trainer.model(**batch)
    assert np.allclose(prediction.predictions[0][real], outputs.logits.numpy()[real], atol=1e-4)


def test_workers_that_outlive_an_evaluation_do_not_read_another_split(make_trainer):
    trainer = make_trainer(dataloader_num_workers=1, dataloader_persistent_workers=True)
    trainer.evaluate()

    metrics, prediction = trainer.predict_split("test", trainer.eval_dataset.select(range(5)))

    assert metrics["num_images"] == len(prediction.label_ids) == 5


@pytest.mark.parametrize("model_class", [MagnetoForTagSummarization, MagnetoForOutlierDetection])
def test_a_saved_model_brings_its_endpoint_and_a_pretrained_one_has_none(make_trainer, tiny_config, model_class):
    trainer = make_trainer()
    trainer.model = model_class(tiny_config)

    trainer.save_model()

    names = {path.name for path in Path(trainer.args.output_dir).iterdir()}
    expected = model_class is MagnetoForTagSummarization
    assert [name in names for name in ("handler.py", "requirements.txt")] == [expected] * 2


def test_the_norm_of_the_gradients_is_logged_and_they_are_clipped_on_request_alone(make_trainer):
    steps = {"max_steps": 1, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    options = {"config_changes": {"dropout": 0.0}, "load_best_model_at_end": False, "learning_rate": 1.0, **steps}
    moved, logged = {}, {}
    for max_norm in (0.0, 0.05):
        torch.manual_seed(0)
        trainer = make_trainer(max_grad_norm=max_norm, **options)
        before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
        trainer.train()
        after = trainer.model.named_parameters()
        moved[max_norm] = sum((tensor - before[name]).square().sum() for name, tensor in after).sqrt().item()
        logged[max_norm] = trainer.state.log_history[0]["grad_norm"]

    assert logged[0.0] == pytest.approx(logged[0.05]) == pytest.approx(moved[0.0], rel=1e-4)
    assert moved[0.05] == pytest.approx(0.05, rel=1e-3) and logged[0.05] > 0.05


@pytest.mark.parametrize(
    ("logging", "expected"),
    [
        ({"logging_strategy": "epoch"}, [True, True]),
        ({"logging_strategy": "epoch", "max_steps": 3}, [True]),
        ({"logging_strategy": "steps", "logging_steps": 3, "logging_first_step": True}, [True] * 5),
    ],
)
def test_whatever_is_logged_has_the_norm_of_its_last_gradients(make_trainer, logging, expected):
    trainer = make_trainer({"streams": "tag"}, num_train_epochs=2, per_device_train_batch_size=8, **logging)

    trainer.train()

    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["grad_norm" in line for line in lines] == expected


def test_early_stopping(make_trainer):
    trainer = make_trainer({"streams": "tag"}, num_train_epochs=20, early_stopping_patience=1, learning_rate=0.0)

    trainer.train()

    assert trainer.state.epoch == 2  # the second evaluation was no better than the first


def test_nothing_is_pushed_during_training(make_trainer, monkeypatch):
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: RepoUrl(f"{constants.ENDPOINT}/user/tiny"))
    for upload in ("upload_folder", "upload_file", "create_commit"):
        monkeypatch.setattr(HfApi, upload, lambda *_, **__: pytest.fail("something was pushed"))
    trainer = make_trainer({"streams": "tag"}, num_train_epochs=2, push_to_hub=True)

    trainer.train()
    trainer.save_model()

    assert trainer.hub_model_id == "user/tiny"
    assert list(Path(trainer.args.output_dir).glob("checkpoint-*"))


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "sometimes"])
def test_trainers_own_pushing_is_refused(make_trainer, strategy):
    with pytest.raises(UsageError, match=f"hub_strategy is '{strategy}', expected 'end'"):
        make_trainer(push_to_hub=True, hub_strategy=strategy)


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", ["file", "file/model", "/proc"])
def test_a_folder_that_cannot_be_written_to_shows_before_rows_are_read(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"output_dir is '.*{name}', expected a folder to write to: "):
        check_output_dir(str(tmp_path / name))


def test_a_folder_that_can_be_written_to_is_made(tmp_path):
    for _ in range(2):
        check_output_dir(str(tmp_path / "runs" / "first"))
    assert list((tmp_path / "runs").iterdir()) == [tmp_path / "runs" / "first"]
    assert not list((tmp_path / "runs" / "first").iterdir())


@pytest.mark.parametrize(
    ("args_class", "streams", "wanted"),
    [
        (MagnetoTrainingArguments, "both", "f1_score"),
        (MagnetoTrainingArguments, "both", "average_precision"),
        (MagnetoTrainingArguments, "both", "keep_all_f1"),
        (MagnetoTrainingArguments, "image", "tag_f1"),
        (MagnetoTrainingArguments, "tag", "eval_mean_gate"),
        (PretrainingArguments, "both", "f1"),
        (PretrainingArguments, "tag", "image_average_precision"),
    ],
)
def test_a_best_epoch_in_what_is_not_reported_shows_before_rows_are_read(tmp_path, args_class, streams, wanted):
    args = args_class(str(tmp_path), metric_for_best_model=wanted)
    with pytest.raises(UsageError, match=f"^metric_for_best_model is '{wanted}', expected one of .*loss"):
        check_training_options(ModelArguments(streams=streams), args)


@pytest.mark.parametrize(
    ("args_class", "streams", "wanted"),
    [
        (MagnetoTrainingArguments, "both", "f1 eval_f1 precision recall reducible_f1 tag_f1 image_f1 loss final_loss"),
        (MagnetoTrainingArguments, "both", "tag_loss image_loss mean_gate"),
        (MagnetoTrainingArguments, "image", "f1 image_f1 loss eval_loss"),
        (PretrainingArguments, "both", "average_precision tag_average_precision image_average_precision tag_f1 loss"),
        (PretrainingArguments, "image", "average_precision image_average_precision image_f1 loss"),
    ],
)
def test_the_best_epoch_can_be_that_of_any_figure_that_is_reported(tmp_path, args_class, streams, wanted):
    for name in wanted.split():
        args = args_class(str(tmp_path), metric_for_best_model=name)
        check_training_options(ModelArguments(streams=streams), args)
    check_training_options(ModelArguments(), args_class(str(tmp_path)))
    nothing = args_class(str(tmp_path), metric_for_best_model=None, load_best_model_at_end=False)
    check_training_options(ModelArguments(), nothing)


@pytest.mark.parametrize(
    ("stages", "training", "message"),
    [
        (1, {"int8": True}, "int8 is for a frozen backbone on a CPU, found a backbone that is trained"),
        (-1, {"cached_views": 2}, "cached_views is 2 and num_trainable_backbone_stages -1, expected 0"),
        (0, {"backbone_learning_rate": 0.25}, "backbone_learning_rate is 0.25, but no stage of a backbone is trained"),
    ],
)
def test_what_a_backbone_cannot_do_is_refused_where_there_is_one(tmp_path, stages, training, message):
    args = MagnetoTrainingArguments(str(tmp_path), use_cpu=True, **training)
    with pytest.raises(UsageError, match=message):
        check_training_options(ModelArguments(num_trainable_backbone_stages=stages), args)
    check_training_options(ModelArguments(num_trainable_backbone_stages=0 if stages else 1), args)
    check_training_options(ModelArguments(num_trainable_backbone_stages=stages, streams="tag"), args)


def test_the_backbone_can_have_a_learning_rate_of_its_own(make_trainer):
    changes = {"num_trainable_backbone_stages": 2}
    trainer = make_trainer(changes, learning_rate=0.5, backbone_learning_rate=0.25, weight_decay=0.1)
    rates = {
        id(parameter): group["lr"]
        for group in trainer.create_optimizer().param_groups
        for parameter in group["params"]
    }
    trained = {name: rates[id(value)] for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert len(trained) == len(rates)
    assert {rate for name, rate in trained.items() if ".backbone." in name} == {0.25}
    assert {rate for name, rate in trained.items() if ".backbone." not in name} == {0.5}
    make_trainer({"streams": "tag"}, backbone_learning_rate=0.25).create_optimizer()  # one setting for all of table 2
    with pytest.raises(UsageError, match="backbone_learning_rate is -1"):
        make_trainer(backbone_learning_rate=-1)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"optim_args": "momentum=-1"}, "'sgd', which refuses its arguments: Invalid momentum"),
        ({"optim_args": "nesterov=true"}, "'sgd', which refuses its arguments: Nesterov momentum requires a momentum"),
        ({"optim": "adamw_torch", "adam_beta1": 1.5}, "'adamw_torch', which refuses its arguments: Invalid beta"),
    ],
    ids=str,
)
def test_values_that_an_optimizer_refuses_show_before_rows_are_read(tmp_path, options, found):
    args = MagnetoTrainingArguments(output_dir=str(tmp_path), **options)
    with pytest.raises(UsageError, match=f"^optim is {found}"):
        check_training_options(ModelArguments(), args)


@pytest.mark.parametrize("schedule, options", [("cosine", {"min_rate": 0.1}), ("cosine_with_min_lr", None)])
def test_values_that_a_schedule_refuses_show_before_rows_are_read(tmp_path, schedule, options):
    args = MagnetoTrainingArguments(output_dir=str(tmp_path), lr_scheduler_type=schedule, lr_scheduler_kwargs=options)
    with pytest.raises(UsageError, match=f"^lr_scheduler_type is '{schedule}', which refuses lr_scheduler_kwargs"):
        check_training_options(ModelArguments(), args)


def test_a_run_with_other_steps_an_epoch_does_not_go_on_with_a_checkpoint(make_trainer):
    options = {"per_device_train_batch_size": 8, "save_steps": 3, "save_strategy": "steps", "eval_strategy": "no"}
    options |= {"load_best_model_at_end": False, "save_total_limit": None}
    first = make_trainer(num_train_epochs=1, **options)
    first.train()
    half, whole = (f"{first.args.output_dir}/checkpoint-{steps}" for steps in (3, 6))

    resumed = make_trainer(num_train_epochs=2, **options)
    resumed.args.resume_from_checkpoint = half
    assert find_checkpoint(resumed.args) == half
    resumed.train(resume_from_checkpoint=half)
    assert resumed.state.global_step == 12

    options["per_device_train_batch_size"] = 16  # as if there were another process
    with pytest.raises(UserError, match="a run with 6 steps an epoch, and this one has 3; expected as many rows"):
        make_trainer(num_train_epochs=3, **options).train(resume_from_checkpoint=whole)


def test_a_run_with_another_row_does_not_go_on_with_a_checkpoint(make_trainer):
    options = {"per_device_train_batch_size": 10, "save_strategy": "epoch", "eval_strategy": "no"}
    options |= {"load_best_model_at_end": False, "num_train_epochs": 1}
    first = make_trainer(**options)
    first.train()  # 48 rows, 5 steps an epoch

    longer = make_trainer(**options)
    rows = longer.train_dataset.dataset
    longer.train_dataset.dataset = datasets.concatenate_datasets([rows, rows.select([0])])

    with pytest.raises(UserError, match="a run with 48 rows an epoch, and this one has 49; expected as many rows"):
        longer.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-5")


def test_a_run_with_another_schedule_does_not_go_on_with_a_checkpoint(make_trainer):
    trainer = make_trainer(save_strategy="epoch", num_train_epochs=1)
    trainer.train()

    def resumed(**changes) -> MagnetoTrainingArguments:
        return MagnetoTrainingArguments(
            trainer.args.output_dir, resume_from_checkpoint="true", use_cpu=True, optim=trainer.args.optim, **changes
        )

    assert find_checkpoint(resumed()) is not None
    with pytest.raises(UserError, match="is of a run with lr_scheduler_type 'constant', and this one has 'cosine'"):
        find_checkpoint(resumed(lr_scheduler_type="cosine"))


def test_a_resumed_run_may_begin_to_stop_early(make_trainer):
    options = {"save_strategy": "epoch", "num_train_epochs": 1, "save_total_limit": None}
    first = make_trainer(**options)
    first.train()
    (checkpoint,) = Path(first.args.output_dir).glob("checkpoint-*")

    options["num_train_epochs"] = 2
    resumed = make_trainer(early_stopping_patience=5, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))

    last = Path(first.args.output_dir) / f"checkpoint-{resumed.state.global_step}" / "trainer_state.json"
    assert "PatientStoppingCallback" in json.loads(last.read_text())["stateful_callbacks"]


def test_an_unknown_tracker_shows_before_rows_are_read(tmp_path):
    args = MagnetoTrainingArguments(str(tmp_path), report_to=["wandbb"], use_cpu=True)

    with pytest.raises(UsageError, match="report_to: wandbb is not supported"):
        check_training_options(ModelArguments(), args)


def test_a_resumed_run_has_the_patience_that_was_left(make_trainer):
    trainer = make_trainer(early_stopping_patience=5)
    (callback,) = (item for item in trainer.callback_handler.callbacks if isinstance(item, PatientStoppingCallback))
    callback.early_stopping_patience_counter = 3
    saved = TrainerState(stateful_callbacks=[callback])

    for state, expected in ((saved, 3), (TrainerState(), 0)):
        callback.early_stopping_patience_counter = 1
        callback.on_train_begin(trainer.args, state, trainer.control)
        assert (callback.early_stopping_patience, callback.early_stopping_patience_counter) == (5, expected)


def test_saving_takes_away_what_was_made_of_other_weights(make_trainer, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("model.onnx", "model.onnx.data", "calibration.png", "training_curves.png"):
        (folder / name).write_text("old")
    make_trainer().save_model()
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "training_curves.png"} <= names
    assert names.isdisjoint({"model.onnx", "model.onnx.data", "calibration.png"})
