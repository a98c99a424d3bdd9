import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerState

from magneto_training.arguments import MagnetoTrainingArguments, UserError
from magneto_training.checkpoints import check_checkpoint, find_checkpoint, lasting_arguments
from modeling_magneto import (
    MagnetoConfig,
    MagnetoForOutlierDetection,
    MagnetoForTagSummarization,
    MagnetoProcessor,
)


def make_checkpoints(folder: Path, complete=(), partial=()) -> None:
    for step in (*complete, *partial):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        save_file({"weights": torch.zeros(9)}, checkpoint / "model.safetensors")
        for name in ("config.json", "processor_config.json", "tokenizer.json"):
            (checkpoint / name).write_text("{}")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"state": torch.zeros(9)}, checkpoint / name)
    for step in complete:
        TrainerState(train_batch_size=32).save_to_json(folder / f"checkpoint-{step}" / "trainer_state.json")


def training_args(folder, resume=None, **changes) -> MagnetoTrainingArguments:
    return MagnetoTrainingArguments(str(folder), resume_from_checkpoint=resume, use_cpu=True, **changes)


@pytest.mark.parametrize("resume", [None, "false", "False", "true"])
def test_a_new_run_starts_without_a_checkpoint(tmp_path, resume):
    assert find_checkpoint(training_args(tmp_path / "new", resume)) is None


@pytest.mark.parametrize("resume", ["true", "True"])
def test_resuming_takes_the_last_complete_checkpoint(tmp_path, resume):
    make_checkpoints(tmp_path, complete=[9, 80, 100], partial=[110])

    assert find_checkpoint(training_args(tmp_path, resume)) == str(tmp_path / "checkpoint-100")


def test_a_checkpoint_that_was_cut_short_does_not_count(tmp_path):
    make_checkpoints(tmp_path, partial=[9])

    assert find_checkpoint(training_args(tmp_path, "true")) is None
    assert find_checkpoint(training_args(tmp_path)) is None


@pytest.mark.parametrize("resume", [None, "false"])
def test_another_runs_checkpoints_are_not_overwritten(tmp_path, resume):
    make_checkpoints(tmp_path, complete=[9])

    with pytest.raises(UserError, match="holds checkpoint-9 of another run"):
        find_checkpoint(training_args(tmp_path, resume))


def test_a_named_checkpoint_is_taken(tmp_path):
    make_checkpoints(tmp_path, complete=[9, 10])
    wanted = str(tmp_path / "checkpoint-9")

    assert find_checkpoint(training_args(tmp_path, wanted)) == wanted


def test_a_named_checkpoint_that_is_not_there_is_an_error(tmp_path):
    make_checkpoints(tmp_path, complete=[9], partial=[10])

    with pytest.raises(UserError, match="checkpoint-10.*expected a complete checkpoint folder"):
        find_checkpoint(training_args(tmp_path, str(tmp_path / "checkpoint-10")))


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json", "model.safetensors"])
def test_a_checkpoint_that_lacks_a_file_is_passed_over_and_named(tmp_path, capsys, name):
    make_checkpoints(tmp_path, complete=[9, 10])
    file = tmp_path / "checkpoint-10" / name
    file.unlink()

    assert find_checkpoint(training_args(tmp_path, "true")) == str(tmp_path / "checkpoint-9")
    assert capsys.readouterr().out == f"{file} is missing: checkpoint-10 is passed over\n"
    with pytest.raises(UserError, match=f"{file} is missing, expected another checkpoint"):
        find_checkpoint(training_args(tmp_path, str(tmp_path / "checkpoint-10")))


def test_a_checkpoint_with_another_kind_of_state_is_damaged(tmp_path, capsys):
    make_checkpoints(tmp_path, complete=[9, 10])
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("[]")

    assert find_checkpoint(training_args(tmp_path, "true")) == str(tmp_path / "checkpoint-9")
    assert "trainer_state.json is damaged: checkpoint-10 is passed over" in capsys.readouterr().out


def test_a_run_does_not_go_on_without_its_best_model(tmp_path):
    folder, moved = tmp_path / "run", tmp_path / "moved"
    make_checkpoints(folder, complete=[5, 10])
    best = folder / "checkpoint-5"
    state = TrainerState(train_batch_size=32, best_global_step=5, best_model_checkpoint=str(best))
    state.save_to_json(folder / "checkpoint-10" / "trainer_state.json")
    assert find_checkpoint(training_args(folder, "true")) == str(folder / "checkpoint-10")

    folder.rename(moved)  # Trainer finds it there
    assert find_checkpoint(training_args(moved, "true")) == str(moved / "checkpoint-10")

    weights = moved / "checkpoint-5" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:50])
    with pytest.raises(UserError, match=f"^{weights} is damaged, and was the best until checkpoint-10; expected it"):
        find_checkpoint(training_args(moved, "true"))

    shutil.rmtree(moved / "checkpoint-5")
    with pytest.raises(UserError, match=f"^{best} is missing, and was the best until checkpoint-10; expected it"):
        find_checkpoint(training_args(moved, "true"))
    assert find_checkpoint(training_args(moved, "true", load_best_model_at_end=False))


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "rng_state.pth", "model.safetensors"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, capsys, name, share):
    make_checkpoints(tmp_path, complete=[9, 10])
    file = tmp_path / "checkpoint-10" / name
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])

    assert find_checkpoint(training_args(tmp_path, "true")) == str(tmp_path / "checkpoint-9")
    assert capsys.readouterr().out == f"{file} is damaged: checkpoint-10 is passed over\n"
    with pytest.raises(UserError, match=f"{file} is damaged, expected another checkpoint"):
        find_checkpoint(training_args(tmp_path, str(tmp_path / "checkpoint-10")))
    with pytest.raises(UserError, match="holds checkpoint-10 of another run"):
        find_checkpoint(training_args(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rng_state.pth": ["rng_state_0.pth", "rng_state_1.pth"]}, "rng_state_0.pth, rng_state_1.pth, expected rng_"),
        (
            {"rng_state.pth": ["rng_state_0.pth"]},
            "rng_state_0.pth, expected rng_state.pth: a run goes on with as many",
        ),
        ({"optimizer.pt": []}, "no optimizer, expected a checkpoint saved without --save_only_model"),
        ({"scheduler.pt": []}, "no scheduler, expected"),
    ],
)
def test_a_run_does_not_go_on_otherwise_than_it_began(tmp_path, changes, message):
    make_checkpoints(tmp_path, complete=[9])
    checkpoint = tmp_path / "checkpoint-9"
    for name, others in changes.items():
        for other in others:
            shutil.copy(checkpoint / name, checkpoint / other)
        (checkpoint / name).unlink()

    for resume in ("true", str(checkpoint)):
        with pytest.raises(UserError, match=f"checkpoint-9 has {message}"):
            find_checkpoint(training_args(tmp_path, resume))


def test_several_processes_go_on_with_as_many_random_states(tmp_path, monkeypatch):
    make_checkpoints(tmp_path, complete=[9])
    checkpoint = tmp_path / "checkpoint-9"
    monkeypatch.setattr(MagnetoTrainingArguments, "world_size", 2)
    with pytest.raises(UserError, match="has rng_state.pth, expected rng_state_0.pth, rng_state_1.pth: a run goes on"):
        find_checkpoint(training_args(tmp_path, "true"))

    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    assert find_checkpoint(training_args(tmp_path, "true")) == str(checkpoint)

    (checkpoint / "rng_state_1.pth").unlink()  # it is on the other process's machine
    assert find_checkpoint(training_args(tmp_path, "true")) == str(checkpoint)


def test_where_all_checkpoints_are_damaged_no_run_starts_afresh(tmp_path):
    make_checkpoints(tmp_path, complete=[9])
    (tmp_path / "checkpoint-9" / "optimizer.pt").write_bytes(b"")

    with pytest.raises(UserError, match="holds no whole checkpoint"):
        find_checkpoint(training_args(tmp_path, "true"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adamw_torch"}, "of a run with optim 'sgd', and this one has 'adamw_torch'"),
        ({"lr_scheduler_type": "cosine"}, "of a run with lr_scheduler_type 'constant', and this one has 'cosine'"),
        ({"metric_for_best_model": "precision"}, "with metric_for_best_model 'f1', and this one has 'precision'"),
    ],
)
def test_a_run_goes_on_with_its_optimizer_its_schedule_and_its_metric(tmp_path, changes, message):
    make_checkpoints(tmp_path, complete=[9])
    kept = {"args": {}, "attributes": lasting_arguments(training_args(tmp_path))}
    state = TrainerState(train_batch_size=32, stateful_callbacks={"EpochCallback": kept})
    state.save_to_json(tmp_path / "checkpoint-9" / "trainer_state.json")

    for same in ({}, {"metric_for_best_model": "eval_f1"}):
        assert find_checkpoint(training_args(tmp_path, "true", **same)) == str(tmp_path / "checkpoint-9")
    with pytest.raises(UserError, match=message):
        find_checkpoint(training_args(tmp_path, "true", **changes))


def test_a_run_goes_on_with_as_many_images_a_step(tmp_path):
    make_checkpoints(tmp_path, complete=[9])
    # As many steps an epoch, with half the images in each of twice as many parts.
    changes = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
    with pytest.raises(
        UserError, match="checkpoint-9 is of 32 images a step .*, and this run has 16; expected as many"
    ):
        find_checkpoint(training_args(tmp_path, "true", **changes))
    # A batch size that was found by itself is found again.
    assert find_checkpoint(training_args(tmp_path, "true", auto_find_batch_size=True, **changes))


def test_other_folders_beside_checkpoints_do_no_harm(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / "trainer_state.json").touch()
    assert find_checkpoint(MagnetoTrainingArguments(output_dir=str(tmp_path))) is None


def test_a_checkpoint_of_another_model_is_refused_by_field(tiny_model, processor, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    check_checkpoint(str(tmp_path), tiny_model, processor)
    wider = MagnetoForTagSummarization(MagnetoConfig(**{**tiny_model.config.to_dict(), "hidden_size": 32}))
    with pytest.raises(UserError, match="has hidden_size 16, expected 32 as in this run"):
        check_checkpoint(str(tmp_path), wider, processor)
    found = "has architectures .'MagnetoForTagSummarization'., expected .'MagnetoForOutlierDetection'. as in this run"
    with pytest.raises(UserError, match=found):
        check_checkpoint(str(tmp_path), MagnetoForOutlierDetection(tiny_model.config), processor)


def test_a_checkpoint_of_other_tags_or_colours_is_refused(tiny_model, processor, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    tags = processor.vocabulary  # as many in each run, so that the configurations are the same
    for changes, message in (
        ({"tags": ["blue", "green", "pink", "red"]}, "has tag 2 of the vocabulary 'red', expected 'pink' as in this"),
        ({"tags": tags[::-1]}, "has tag 0 of the vocabulary 'blue', expected 'yellow' as in this run"),
        ({"image_mean": [0.5, 0.5, 0.25]}, r"has image_mean \[0.485, .*\], expected \[0.5, 0.5, 0.25\] as in this"),
        ({"image_std": [0.5, 0.5, 0.25]}, r"has image_std \[0.229, .*\], expected \[0.5, 0.5, 0.25\] as in this run"),
    ):
        other = MagnetoProcessor.from_vocabulary(**{"tags": tags, "image_size": 32, **changes})
        with pytest.raises(UserError, match=message):
            check_checkpoint(str(tmp_path), tiny_model, other)
