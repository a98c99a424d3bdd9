"""reproduce.py: which runs the paper's tables need, going on with the missing ones, and what is written of them."""

import fcntl
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import yaml
from conftest import make_rows

from magneto_training import reproduction
from magneto_training.arguments import (
    DataArguments,
    MagnetoTrainingArguments,
    ModelArguments,
    ReproductionArguments,
    UsageError,
    UserError,
)
from magneto_training.reproduction import Reproduction, format_results


class FakeCommands:
    """Stands in for train.py, pretrain.py and predict.py: writes what they would, at once."""

    def __init__(self):
        self.calls = []
        self.fail_at = None
        self.options = {}  # of the last outlier test

    def __call__(self, script: str, arguments: list, log_file: Path) -> None:
        if len(self.calls) == self.fail_at:
            raise UserError(f"{script} failed")
        self.calls.append((script, log_file.stem))
        f1 = 80.0 + len(self.calls)
        if script == "predict.py":
            self.options = options = dict(zip(arguments[::2], arguments[1::2], strict=True))
            metrics = {"f1": f1, "outlier_percent": 10.0, "keep_all_f1": 60.0, "num_images": 5}
            Path(options["--output_file"]).with_suffix(".metrics.json").write_text(json.dumps(metrics))
            return
        settings = yaml.safe_load(Path(arguments[0]).read_text())
        output_dir = Path(settings["output_dir"])
        output_dir.mkdir(parents=True)
        figures = {"precision": f1, "recall": f1, "f1": f1, "reducible_f1": None, "num_images": 5}
        figures |= {f"keep_all_{name}": 70.0 for name in reproduction.METRICS}
        metrics = {"validation": figures | {"f1": 99.0}, "test": figures}
        (output_dir / "metrics.json").write_text(json.dumps(metrics))
        history = [{"epoch": epoch, "eval_f1": f1, "eval_mean_gate": 0.5} for epoch in (1.0, 2.0)]
        (output_dir / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        (output_dir / "checkpoint-1").mkdir()


@pytest.fixture
def commands(monkeypatch) -> FakeCommands:
    fake = FakeCommands()
    monkeypatch.setattr(reproduction, "_launch", fake)
    return fake


@pytest.fixture
def prepare(tmp_path, dataset_dir):
    def _prepare(dataset=dataset_dir, seeds=(0, 1), **settings) -> Reproduction:
        names = ("tag_add_ratio", "tag_drop_ratio", "streaming", "skip_bad_rows")
        data = {name: settings.pop(name) for name in names if name in settings}
        model = {"init_from": settings.pop("init_from", None)}
        return Reproduction(
            ReproductionArguments(seeds=list(seeds), pretraining_epochs=3),
            ModelArguments(backbone_weights="none", **model),
            DataArguments(dataset_name=str(dataset), **data),
            MagnetoTrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, **settings),
        )

    return _prepare


def settings_of(label: str, tmp_path: Path) -> dict:
    return yaml.safe_load((tmp_path / "out/runs" / f"{label}.yaml").read_text())


def test_every_experiment_is_run_once_with_every_seed(commands, prepare, tmp_path):
    prepare().make_runs()
    trained = [label for script, label in commands.calls if script == "train.py"]
    assert sorted(trained) == sorted(
        f"{name}-{seed}"
        for seed in (0, 1)
        for name in (
            *("FF", "TF-t", "TF-it", "MAGNeto", "MAGNeto_aux", "MAGNeto_aux_bce"),
            *("MAGNeto_aux_no_tad", "MAGNeto_aux_no_tad_pretrained", "MAGNeto_aux_tad_pretrained"),
        )
    )  # the row with TAD and without pre-training is MAGNeto_aux itself: TAD is in the defaults
    assert sum(script == "pretrain.py" for script, _ in commands.calls) == 2
    assert sum(script == "predict.py" for script, _ in commands.calls) == 8
    assert not list((tmp_path / "out").rglob("checkpoint-*"))


def test_the_row_without_tad_is_the_main_model_where_its_setting_has_none(commands, prepare):
    runs = prepare(tag_add_ratio=0.0, tag_drop_ratio=0.0)
    assert runs.table_3_runs(with_tad=False, pretrained=False) == runs.architecture_runs("MAGNeto_aux")
    assert {run.name for run in runs.table_3_runs(with_tad=True, pretrained=False)} == {"MAGNeto_aux_tad"}


def test_each_run_changes_only_what_its_experiment_is_about(commands, prepare, tmp_path):
    prepare(learning_rate=0.5, num_train_epochs=7).make_runs()
    main = settings_of("MAGNeto_aux-1", tmp_path)
    assert (main["learning_rate"], main["num_train_epochs"], main["seed"]) == (0.5, 7, 1)
    bce = settings_of("MAGNeto_aux_bce-1", tmp_path)
    assert {name for name in bce if bce[name] != main.get(name)} == {"objective", "output_dir"}
    feed_forward = settings_of("FF-0", tmp_path)
    assert (feed_forward["streams"], feed_forward["tag_encoder"]) == ("tag", "feed_forward")
    pretraining = settings_of("pretraining-1", tmp_path)
    assert pretraining["num_train_epochs"] == 3 and "tag_add_ratio" not in pretraining
    fine_tuned = settings_of("MAGNeto_aux_tad_pretrained-1", tmp_path)
    assert fine_tuned["init_from"] == pretraining["output_dir"]


def test_interrupted_it_goes_on_with_the_missing_runs(commands, prepare):
    commands.fail_at = 5
    with pytest.raises(UserError):
        prepare().make_runs()
    first = set(commands.calls)
    commands.fail_at = None
    prepare().make_runs()
    assert len(commands.calls) == len(set(commands.calls)) == 2 * 9 + 2 + 8
    assert first < set(commands.calls)
    prepare().make_runs()
    assert len(commands.calls) == 28, "what is complete is not made again"


def test_runs_of_other_settings_are_never_mixed(commands, prepare):
    prepare().make_runs()
    with pytest.raises(UserError, match=r"yaml was made with learning_rate None, expected 0\.5"):
        prepare(learning_rate=0.5).make_runs()


def test_another_ratio_or_another_training_makes_another_outlier_test(commands, prepare, tmp_path):
    runs = prepare(seeds=[0])
    runs.make_runs()
    done = len(commands.calls)
    runs.args.outlier_ratio = 1.0
    runs.make_runs()
    assert [script for script, _ in commands.calls[done:]] == ["predict.py"] * 4
    shutil.rmtree(tmp_path / "out/runs/MAGNeto_aux_tad_pretrained-0")
    done = len(commands.calls)
    runs.make_runs()
    assert commands.calls[done:] == [
        ("train.py", "MAGNeto_aux_tad_pretrained-0"),
        ("predict.py", "MAGNeto_aux_tad_pretrained-0"),
    ]


def test_an_outlier_test_that_failed_is_made_again(commands, prepare):
    runs = prepare(seeds=[0])
    runs.make_runs()
    runs.args.outlier_ratio, done = 1.0, len(commands.calls)
    commands.fail_at = done + 1
    with pytest.raises(UserError):
        runs.make_runs()
    commands.fail_at = None
    runs.make_runs()
    assert len(commands.calls[done:]) == len(set(commands.calls[done:])) == 4
    runs.args.outlier_ratio, commands.fail_at = 2.0, done + 4  # which may have written its metrics
    with pytest.raises(UserError):
        runs.make_runs()
    runs.args.outlier_ratio, commands.fail_at = 1.0, None
    runs.make_runs()
    assert len(commands.calls[done:]) == 5, "only the one that failed"


def test_the_outlier_test_leaves_bad_rows_out_where_the_training_does(commands, prepare):
    prepare(seeds=[0]).make_runs()
    assert commands.options["--skip_bad_rows"] is False
    done = len(commands.calls)
    runs = prepare(seeds=[0], skip_bad_rows=True)
    runs._test_outliers(runs.architecture_runs("MAGNeto_aux")[0])
    assert commands.options["--skip_bad_rows"] is True and len(commands.calls) == done + 1


def test_what_belongs_to_one_run_or_to_nobody_else_is_not_handed_on(commands, prepare, tmp_path):
    runs = prepare(seeds=[0], hub_token="secret", metric_for_best_model="loss")
    runs.make_runs()
    written = "".join(path.read_text() for path in (tmp_path / "out").rglob("*.yaml"))
    assert "secret" not in written and "metric_for_best_model: loss" in written
    assert not {"metric_for_best_model", "greater_is_better"} & settings_of("pretraining-0", tmp_path).keys()
    assert settings_of("pretraining-0", tmp_path)["streams"] == "both"


def test_results_hold_the_figures_of_the_runs_with_mean_and_deviation(commands, prepare, tmp_path):
    runs = prepare()
    runs.make_runs()
    results = runs.write_results()
    for name, summary in results["table_2"].items():
        values = [run.metrics()["f1"] for run in runs.architecture_runs(name)]
        assert summary["f1"]["runs"] == values
        assert summary["f1"]["mean"] == sum(values) / 2
        assert summary["f1"]["std"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
        assert math.isnan(summary["reducible_f1"]["mean"])
    assert [(row["tag_add_ratio"], row["pretrained"]) for row in results["table_3"]] == [
        (0.0, False),
        (0.5, False),
        (0.0, True),
        (0.5, True),
    ]
    assert results["keep_all"]["f1"] == 70.0 and "paper" not in results
    assert results["split"] == "test", "the epoch is chosen on validation, so the figures are not of that"
    for number in (3, 4, 8):
        assert (tmp_path / f"out/figure_{number}.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out/results.md").read_text()
    assert "| keep all | 70.0 | 70.0 | 70.0 | 70.0 |" in text
    assert "| keep all | | | 100.0 | 70.0 | 60.0 |" in text
    assert f"{results['table_2']['FF']['f1']['mean']:.1f} ± " in text


def test_without_photographs_only_the_tag_models_are_trained(commands, prepare, tmp_path):
    folder = tmp_path / "tags"
    folder.mkdir()
    for split in ("train", "validation"):
        rows = datasets.Dataset.from_list(make_rows(6)).remove_columns("image")
        rows.to_parquet(folder / f"{split}.parquet")
    runs = prepare(folder, seeds=[3])
    runs.make_runs()
    assert sorted(commands.calls) == [("train.py", "FF-3"), ("train.py", "TF-t-3")]
    results = runs.write_results()
    assert list(results["table_2"]) == ["FF", "TF-t"] and "table_3" not in results
    assert "±" not in format_results(results), "one seed has no deviation"


def test_the_papers_figures_stand_beside_ours_on_nus_wide(commands, prepare, tmp_path, dataset_dir):
    folder = tmp_path / "nus_wide"
    shutil.copytree(dataset_dir, folder)
    (folder / "README.md").write_text("---\nsource_datasets:\n- extended|nus-wide\n---\n")
    runs = prepare(folder)
    runs.make_runs()
    text = format_results(runs.write_results())
    assert "94.5 / 96.7 / 94.1 |" in text and "20.53, 94.30 |" in text


def test_a_stream_is_refused(prepare):
    with pytest.raises(UsageError, match="streaming is true, expected false"):
        prepare(streaming=True)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("seed", 7, "--seeds"),
        ("init_from", "pretrained", "pre-training is one of the experiments"),
        ("resume_from_checkpoint", "true", "goes on by itself"),
    ],
)
def test_what_would_have_no_effect_is_refused(prepare, field, value, expected):
    with pytest.raises(UsageError, match=f"^{field} is {value!r}, expected .*{expected}"):
        prepare(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("seeds", [0, 0]), ("seeds", []), ("outlier_ratio", 0), ("num_parallel_runs", 0)]
)
def test_wrong_arguments_are_named(field, value):
    with pytest.raises(UsageError, match=field):
        ReproductionArguments(**{field: value})


def test_a_run_that_fails_is_reported_with_its_reason(tmp_path):
    with pytest.raises(UserError, match=r"train\.py failed \(see .*run\.log\): .*no\.yaml cannot be read"):
        reproduction._launch("train.py", ["no.yaml"], tmp_path / "run.log")


def test_launches_at_the_same_time_on_several_gpus_have_ports_of_their_own(tmp_path, monkeypatch):
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": False}
    config |= {"num_machines": 1, "num_processes": 2}
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/default_config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(reproduction, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text(
        "import os, sys\nif os.environ['RANK'] == '0': open(sys.argv[1], 'w').write(os.environ['MASTER_PORT'])"
    )
    ports = set()
    for index in range(2):
        reproduction._launch("train.py", [tmp_path / str(index)], tmp_path / "log")
        ports.add((tmp_path / str(index)).read_text())
    assert len(ports) == 2


LONG_RUN = """
import fcntl, sys, time
from pathlib import Path

file = Path(sys.argv[1])
with file.with_suffix(".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    file.with_suffix(".begun").touch()
    time.sleep(60)
    file.with_suffix(".ended").touch()
"""


def test_killed_it_leaves_no_training_behind(tmp_path, dataset_dir):
    for script in ("train.py", "pretrain.py"):
        (tmp_path / script).write_text(LONG_RUN)
    code = "import pathlib, reproduce; from magneto_training import reproduction as r; r.ROOT = pathlib.Path({!r}); {}"
    options = ["--dataset_name", dataset_dir, "--output_dir", tmp_path / "out", "--backbone_weights", "none"]
    command = [sys.executable, "-c", code.format(str(tmp_path), "reproduce.main()"), *map(str, options)]
    process = subprocess.Popen([*command, "--num_parallel_runs", "2"], cwd=Path(reproduction.__file__).parent.parent)
    runs = tmp_path / "out/runs"
    try:
        while len(list(runs.glob("*.begun"))) < 2:
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.terminate()
        process.send_signal(signal.SIGINT)  # twice is as good as once
    assert process.wait(50) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    for file in runs.glob("*.lock"):  # each process has its own until it ends
        with file.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
    assert len(list(runs.glob("*.begun"))) == 2 and not list(runs.glob("*.ended"))
