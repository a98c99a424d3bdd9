"""reproduce.py: which runs the paper's tables need, going on with the missing ones, and what is written of them."""

import fcntl
import json
import math
import os
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
    def _prepare(dataset=dataset_dir, seeds=(0, 1), arguments=None, **settings) -> Reproduction:
        data_names = ("tag_add_ratio", "tag_drop_ratio", "streaming", "skip_bad_rows")
        model_names = ("init_from", "objective", "tag_encoder", "num_trainable_backbone_stages")
        data, model = (
            {name: settings.pop(name) for name in names if name in settings} for names in (data_names, model_names)
        )
        return Reproduction(
            ReproductionArguments(seeds=list(seeds), **(arguments or {"pretraining_epochs": 3})),
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
    assert "| keep all | | | 100.00 | 70.00 | 60.00 |" in text
    assert f"{results['table_2']['FF']['f1']['mean']:.1f} ± " in text
    assert "| 10.00 ± 0.00 |" in text, "as many decimals as the paper's table 3 has"
    assert "mean and standard deviation of the seeds 0, 1;" in text


def test_results_say_of_which_experiment_they_are(commands, prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduction, "_commit", lambda: "8684871-dirty")
    runs = prepare(seeds=[0], num_train_epochs=7)
    runs.make_runs()
    runs.write_results()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["arguments"]["pretraining_epochs"] == 3 and results["arguments"]["tad_ratio"] == 0.5
    assert results["commit"] == "8684871-dirty"
    assert set(results["versions"]) == {"torch", "transformers", "timm"} and all(results["versions"].values())
    text = (tmp_path / "out/results.md").read_text()
    assert "Settings: backbone resnet18, 7 epochs, 0 cached views, pre-training on the configuration default " in text
    assert "default for 3 epochs; commit 8684871-dirty.\n" in text


def test_the_commit_is_marked_where_files_were_changed_and_unknown_without_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduction, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert reproduction._commit() is None
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    (tmp_path / "train.py").touch()
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = reproduction._commit()
    assert len(commit) == 40
    (tmp_path / "train.py").write_text("changed")
    assert reproduction._commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert reproduction._commit() is None


def change_metrics(run: reproduction.Run, **figures) -> None:
    splits = json.loads(run.metrics_file.read_text())
    run.metrics_file.write_text(json.dumps(splits | {"test": splits["test"] | figures}))


def test_results_of_different_images_are_not_compared(commands, prepare, tmp_path):
    runs = prepare()
    runs.make_runs()
    for run in runs.architecture_runs("FF"):  # as with --skip_bad_rows: it notices no unreadable photograph
        change_metrics(run, num_images=7, keep_all_f1=71.0)
    message = "^FF-0, FF-1 found 7 images, keep-all F1 71.00, expected 5 images, keep-all F1 70.00, as .*_pretrained-1"
    with pytest.raises(UserError, match=message + ": remove the rows with unreadable photographs"):
        runs.write_results()
    assert not (tmp_path / "out/results.md").exists()
    change_metrics(runs.architecture_runs("FF")[0], num_images=5, keep_all_f1=70.0)
    change_metrics(runs.architecture_runs("FF")[1], num_images=5, keep_all_f1=70.0, keep_all_precision=70.2)
    with pytest.raises(UserError, match=r"^FF-1 found"):  # as many images, but others
        runs.write_results()


def test_rows_that_tag_only_models_alone_would_keep_are_refused_at_the_start(prepare, dataset_dir, tmp_path):
    broken = shutil.copytree(dataset_dir, tmp_path / "broken")
    prepare(broken, skip_bad_rows=True)
    rows = [*make_rows(12), {**make_rows(13)[12], "image": {"bytes": b"no photograph", "path": None}}]
    features = datasets.Features({**datasets.Dataset.from_list(rows[:1]).features, "image": datasets.Image()})
    datasets.Dataset.from_list(rows, features=features).to_parquet(broken / "test.parquet")

    with pytest.raises(UserError, match="broken, test: found 1 unreadable photographs, expected none: models that"):
        prepare(broken, skip_bad_rows=True)


def test_what_is_undefined_for_keep_all_is_no_difference(commands, prepare):
    runs = prepare(seeds=[0])
    runs.make_runs()
    for run in runs._all_runs(runs._stages()):
        change_metrics(run, keep_all_reducible_f1=None)  # no image has a tag to remove
    assert "| keep all | 70.0 | 70.0 | 70.0 | – |" in format_results(runs.write_results())


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
    text = format_results(results)
    assert "±" not in text and "deviation" not in text, "one seed has none"
    assert "Percent, seed 3; " in text and "Settings: 500 epochs; commit " in text


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
        ("objective", "bce", "the default: figure 3"),
        ("tag_encoder", "feed_forward", "the default: table 2"),
    ],
)
def test_what_would_have_no_effect_is_refused(prepare, field, value, expected):
    with pytest.raises(UsageError, match=f"^{field} is {value!r}, expected .*{expected}"):
        prepare(**{field: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric_for_best_model": "image_f1"}, "^FF: metric_for_best_model is 'image_f1', expected one of "),
        ({"cached_views": 1, "num_trainable_backbone_stages": -1}, "^TF-it: cached_views is 1 and num_trainable"),
        ({"backbone_learning_rate": 0.1}, "^TF-it: backbone_learning_rate is 0.1, but no stage"),
    ],
)
def test_what_one_of_the_runs_would_refuse_is_refused_at_the_start(prepare, settings, message):
    with pytest.raises(UsageError, match=message):
        prepare(**settings)


def test_what_to_pre_train_on_is_looked_for_at_the_start(prepare, tmp_path, dataset_dir):
    with pytest.raises(UserError, match="the configuration is 'unlabeled', expected none"):
        prepare(arguments={"pretraining_config_name": "unlabeled"})
    folder = tmp_path / "configured"
    shutil.copytree(dataset_dir, folder)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: train.parquet}\n"
        "  - {split: validation, path: validation.parquet}\n"
        "- config_name: unlabeled\n  data_files:\n  - {split: train, path: test.parquet}\n---\n"
    )
    prepare(folder, arguments={"pretraining_config_name": "unlabeled"})
    with pytest.raises(UserError, match="cannot be loaded: .*unlabelled"):
        prepare(folder, arguments={"pretraining_config_name": "unlabelled"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("seeds", value) for value in ([0, 0], [])),
        *(("tad_ratio", value) for value in (0, 2, math.nan, math.inf)),
        *(("outlier_ratio", value) for value in (0, math.nan, math.inf)),
        *(("pretraining_outlier_ratio", value) for value in (-1, math.nan, math.inf)),
        *(("pretraining_epochs", value) for value in (-3, 0, math.nan, math.inf)),
        ("num_parallel_runs", 0),
    ],
)
def test_wrong_arguments_are_named(field, value):
    with pytest.raises(UsageError, match=f"^{field} is "):
        ReproductionArguments(**{field: value})


def test_pre_training_takes_as_long_as_training_where_nothing_is_said(prepare):
    (run,) = prepare(seeds=[0], arguments={"tad_ratio": 1}, num_train_epochs=7).pretraining_runs()
    assert run.settings["num_train_epochs"] == 7


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
import fcntl, os, sys, time
from pathlib import Path

file = Path(sys.argv[1])
with file.with_suffix(".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    file.with_suffix(".begun").write_text(str(os.getpid()))
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


def test_nothing_begins_beside_what_a_killed_one_has_left_behind(commands, prepare, tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(LONG_RUN)
    runs = prepare(seeds=[0])
    run = runs.architecture_runs("TF-it")[0]
    run.folder.mkdir(parents=True)
    code = (
        "import sys; from pathlib import Path; from magneto_training import reproduction as r\n"
        "r.ROOT = Path(sys.argv[1]); r._launch('train.py', sys.argv[2:3], Path(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, tmp_path, run.settings_file, run.log_file]
    process = subprocess.Popen(list(map(str, command)), cwd=Path(reproduction.__file__).parent.parent)
    begun = run.settings_file.with_suffix(".begun")
    try:
        while not (begun.exists() and begun.read_text()):
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    try:
        with monkeypatch.context() as patch, pytest.raises(UserError, match=f"at work on {run.output_dir}, expected"):
            patch.setattr(reproduction, "ENDING_TIME", 0.5)
            runs.make_runs()
        assert not commands.calls
    finally:
        os.kill(int(begun.read_text()), signal.SIGKILL)
    runs.make_runs()  # at once
    assert ("train.py", run.label) in commands.calls
