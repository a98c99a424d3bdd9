"""The paper's experiments: which runs its tables and figures need, making the missing ones, and what comes of them.

OUT/runs/<run>-<seed>.yaml      settings of one run; train.py takes the file too
OUT/runs/<run>-<seed>/          what it trained
OUT/runs/<run>-<seed>.log       what its processes print; while one of them lives, no other run begins there
OUT/outliers/<run>-<seed>.*     the outlier test of one run
OUT/results.json, results.md, figure_3.png, figure_4.png, figure_8.png
"""

import dataclasses
import fcntl
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import yaml
from huggingface_hub import DatasetCard
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from .arguments import (
    DataArguments,
    MagnetoTrainingArguments,
    ModelArguments,
    PretrainingArguments,
    PretrainingDataArguments,
    ReproductionArguments,
    UsageError,
    UserError,
)
from .evaluation import format_percent, write_metrics
from .figures import plot_curves, save_figure
from .tag_data import DataError, find_split, load_tag_dataset, load_training_splits
from .trainer import check_training_options
from .whole_file import whole_file

ROOT = Path(__file__).parent.parent
# Settings that are another one's for each run, or nobody's business in a file of results.
OF_ONE_RUN = {
    *("output_dir", "seed", "run_name", "init_from", "resume_from_checkpoint"),
    *("push_to_hub", "hub_model_id", "hub_token"),
}
# What would have no effect, or make an experiment one of something else, and what is expected instead.
EXPECTED_INSTEAD = {
    "seed": "--seeds: every experiment is run with each of these",
    "init_from": "none: pre-training is one of the experiments",
    "objective": "the default: figure 3 compares it with bce",
    "tag_encoder": "the default: table 2 compares it with feed_forward",
    "resume_from_checkpoint": "none: the same command goes on by itself with what is missing",
}
METRICS = ("precision", "recall", "f1", "reducible_f1")
# Seconds in which the processes of a run that was ended just now may still be ending.
ENDING_TIME = 10.0

# Table 2: architecture -> what differs from the settings given.
ARCHITECTURES = {
    "FF": {"streams": "tag", "tag_encoder": "feed_forward"},
    "TF-t": {"streams": "tag", "tag_encoder": "transformer"},
    "TF-it": {"streams": "image"},
    "MAGNeto": {"streams": "both", "auxiliary_loss_weight": 0.0},
    "MAGNeto_aux": {"streams": "both", "auxiliary_loss_weight": 1.0},
}
TAG_ONLY_ARCHITECTURES = ("FF", "TF-t")
MAIN = "MAGNeto_aux"

# What the paper reports of NUS-WIDE: precision, recall and F1 of table 2; outlier percentage and F1 of table 3.
PAPER_TABLE_2 = {
    "FF": (90.5, 97.1, 90.8),
    "TF-t": (93.4, 98.1, 93.2),
    "TF-it": (94.4, 100.0, 93.8),
    "MAGNeto": (93.9, 97.6, 93.9),
    "MAGNeto_aux": (94.5, 96.7, 94.1),
}
PAPER_TABLE_3 = {
    (False, False): (39.34, 93.24),
    (True, False): (28.60, 93.25),
    (False, True): (24.98, 94.27),
    (True, True): (20.53, 94.30),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Args:
        name: What it is called in files.
        seed: Its seed.
        script: The command that makes it, `train.py` or `pretrain.py`.
        settings: All that differs from the command's defaults, but for `output_dir`.
        folder: `OUT/runs`.
    """

    name: str
    seed: int
    script: str
    settings: dict[str, Any] = dataclasses.field(hash=False)
    folder: Path

    @property
    def label(self) -> str:
        return f"{self.name}-{self.seed}"

    @property
    def output_dir(self) -> Path:
        return self.folder / self.label

    @property
    def settings_file(self) -> Path:
        return self.folder / f"{self.label}.yaml"

    @property
    def log_file(self) -> Path:
        return self.folder / f"{self.label}.log"

    @property
    def all_settings(self) -> dict[str, Any]:
        return {**self.settings, "output_dir": str(self.output_dir)}

    @property
    def metrics_file(self) -> Path:
        """What a run writes when it is complete."""
        return self.output_dir / "metrics.json"

    def metrics(self) -> dict[str, float]:
        """Of the test split, or of the validation split where there is no other."""
        splits = json.loads(self.metrics_file.read_text(encoding="utf-8"))
        figures = splits.get("test", splits["validation"])
        return {name: math.nan if value is None else value for name, value in figures.items()}

    def history(self) -> list[dict[str, float]]:
        return json.loads((self.output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


class Reproduction:
    """Tables 2 and 3 and figures 3, 4 and 8 of the paper, on one dataset.

    Args:
        args: Seeds, the strength of TAD, what to pre-train on.
        model_args, data_args, training_args: The setting of all runs; each experiment changes what it is about.

    Raises:
        UsageError: `data_args` asks for a stream, a setting is one that each run has for itself, or one of the runs
            would be refused for its settings.
        DataError: The dataset, or what to pre-train on, cannot be loaded, or lacks the training split.
    """

    def __init__(
        self,
        args: ReproductionArguments,
        model_args: ModelArguments,
        data_args: DataArguments,
        training_args: MagnetoTrainingArguments,
    ):
        if data_args.streaming:
            raise UsageError("streaming is true, expected false: pre-training and the outlier test read no stream")
        for name, expected in EXPECTED_INSTEAD.items():
            value = getattr(model_args if hasattr(model_args, name) else training_args, name)
            if value != _default(name):
                raise UsageError(f"{name} is {value!r}, expected {expected}")
        self.args = args
        self.data_args = data_args
        self.output_dir = Path(training_args.output_dir)
        self.base = _settings(model_args, data_args, training_args)
        # The tables are about the paper's rule.
        self.base |= {"selection": "threshold", "save_total_limit": 1}
        splits = load_tag_dataset(data_args.dataset_name, data_args.dataset_config_name)
        self.split = data_args.test_split if data_args.test_split in splits else data_args.validation_split
        self.has_images = "image" in find_split(splits, data_args.train_split, data_args).column_names
        self.is_nus_wide = _is_nus_wide(data_args.dataset_name)
        if self.has_images and data_args.skip_bad_rows:
            _check_photographs(data_args)
        if self.has_images and args.pretraining_config_name is not None:
            unlabeled = load_tag_dataset(data_args.dataset_name, args.pretraining_config_name, use_labels=False)
            find_split(unlabeled, data_args.train_split, data_args)
        for run in {run.name: run for run in itertools.chain(*self._stages())}.values():
            _check_options(run)

    # ------------------------------------------------------------------------------------------------------------ runs

    def architecture_runs(self, architecture: str) -> list[Run]:
        """Table 2."""
        return [self._run(architecture, seed, ARCHITECTURES[architecture]) for seed in self.args.seeds]

    def table_3_runs(self, with_tad: bool, pretrained: bool) -> list[Run]:
        """Table 3; the row that equals a run of table 2 is that run."""
        ratio = self.args.tad_ratio if with_tad else 0.0
        changes = {**ARCHITECTURES[MAIN], "tag_add_ratio": ratio, "tag_drop_ratio": ratio}
        if not pretrained and all(self.base.get(name, _default(name)) == value for name, value in changes.items()):
            return self.architecture_runs(MAIN)
        name = "_".join([MAIN, "tad" if with_tad else "no_tad", *(["pretrained"] if pretrained else [])])
        if not pretrained:
            return [self._run(name, seed, changes) for seed in self.args.seeds]
        return [
            self._run(name, run.seed, {**changes, "init_from": str(run.output_dir)}) for run in self.pretraining_runs()
        ]

    def cross_entropy_runs(self) -> list[Run]:
        """Figure 3: without the Dice loss."""
        return [
            self._run(f"{MAIN}_bce", seed, {**ARCHITECTURES[MAIN], "objective": "bce"}) for seed in self.args.seeds
        ]

    def pretraining_runs(self) -> list[Run]:
        """Section 5.2."""
        known = {
            field.name
            for argument_class in (ModelArguments, PretrainingDataArguments, PretrainingArguments)
            for field in dataclasses.fields(argument_class)
        }
        own = {
            "dataset_config_name": self.args.pretraining_config_name,
            "num_train_epochs": self.args.pretraining_epochs,
            "outlier_ratio": self.args.pretraining_outlier_ratio,
        }
        own = {name: value for name, value in own.items() if value is not None}
        settings = {**self.base, **ARCHITECTURES[MAIN], **own}
        settings = {name: value for name, value in settings.items() if name in known}
        for name in ("metric_for_best_model", "greater_is_better"):  # of another task
            settings.pop(name, None)
        return [self._with_seed("pretraining", seed, "pretrain.py", settings) for seed in self.args.seeds]

    def _run(self, name: str, seed: int, changes: dict[str, Any]) -> Run:
        return self._with_seed(name, seed, "train.py", {**self.base, **changes})

    def _with_seed(self, name: str, seed: int, script: str, settings: dict[str, Any]) -> Run:
        return Run(name, seed, script, {**settings, "seed": seed}, self.output_dir / "runs")

    def _table_3(self) -> dict[tuple[bool, bool], list[Run]]:
        """TAD, pre-trained -> runs, in the order of the paper."""
        return {key: self.table_3_runs(*key) for key in PAPER_TABLE_3}

    # --------------------------------------------------------------------------------------------------------- making

    def make_runs(self) -> None:
        """Make the runs and the outlier tests that are missing; what was interrupted goes on where it was.

        Raises:
            UserError: A run failed, one that is there was made with other settings, or processes that an earlier
                reproduce.py has left behind are at work on one.
        """
        stages = self._stages()
        for run in itertools.chain(*stages):
            for log_file in (run.log_file, self._outlier_file(run).with_suffix(".log")):
                if log_file.exists():
                    _hold(log_file, ENDING_TIME).close()
        if not self.has_images:
            print(f"{self.data_args.dataset_name} has no photographs: the tag-only models alone", flush=True)
        self._in_stages(_train, stages, "runs")
        if self.has_images:
            tested = self._all_runs(self._table_3().values())
            self._in_stages(self._test_outliers, [tested], "outlier tests")

    def _stages(self) -> list[list[Run]]:
        """All runs; those of a stage need some of the stages before."""
        if not self.has_images:
            return [self._all_runs([self.architecture_runs(name) for name in TAG_ONLY_ARCHITECTURES])]
        table_2 = [self.architecture_runs(name) for name in ARCHITECTURES]
        fine_tuned = [runs for (_, pretrained), runs in self._table_3().items() if pretrained]
        others = [runs for (_, pretrained), runs in self._table_3().items() if not pretrained]
        first = self._all_runs([*table_2, *others, self.cross_entropy_runs(), self.pretraining_runs()])
        return [first, self._all_runs(fine_tuned)]

    @staticmethod
    def _all_runs(groups: Iterable[list[Run]]) -> list[Run]:
        return list({run.label: run for runs in groups for run in runs}.values())

    def _in_stages(self, make: Callable[[Run], Run], stages: list[list[Run]], what: str) -> None:
        for run in itertools.chain(*stages):
            _check_settings(run)
        _interrupted.clear()
        failed = threading.Event()

        def make_unless_failed(run: Run) -> str | None:
            if failed.is_set():  # those under way are finished, no other is begun
                return None
            try:
                return make(run).label
            except Exception:
                failed.set()
                raise

        with tqdm(total=sum(map(len, stages)), desc=what) as progress:
            for stage in stages:
                with ThreadPoolExecutor(self.args.num_parallel_runs) as pool:
                    try:
                        made = [pool.submit(make_unless_failed, run) for run in stage]
                        pending = set(made)
                        while pending:
                            # Not for ever: a signal that another thread received would not wake this one.
                            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                            for future in done:
                                if not future.exception() and future.result():
                                    progress.set_postfix_str(future.result())
                                    progress.update()
                    except BaseException:  # a signal: those under way are ended
                        _interrupted.set()
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise
                for future in made:
                    future.result()  # raises the first error

    def _outlier_file(self, run: Run) -> Path:
        return self.output_dir / "outliers" / f"{run.label}.parquet"

    def _test_outliers(self, run: Run) -> Run:
        """Section 5.1: strange tags are put among the images' own, the same ones for every model."""
        output_file = self._outlier_file(run)
        metrics_file, settings_file = output_file.with_suffix(".metrics.json"), output_file.with_suffix(".yaml")
        options = {
            "model_name_or_path": str(run.output_dir),
            "dataset_name": self.data_args.dataset_name,
            "dataset_config_name": self.data_args.dataset_config_name,
            "split": self.split,
            "output_file": str(output_file),
            "inject_outliers": self.args.outlier_ratio,
            "report_images": 0,
            "skip_bad_rows": self.data_args.skip_bad_rows,
        }
        # Another ratio, or another training of the model, makes it another test.
        is_current = metrics_file.is_file() and metrics_file.stat().st_mtime >= run.metrics_file.stat().st_mtime
        if not (is_current and settings_file.is_file() and _read_settings(settings_file) == options):
            output_file.parent.mkdir(parents=True, exist_ok=True)
            settings_file.unlink(missing_ok=True)  # until the test is complete, the metrics beside it are of another
            arguments = [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
            _launch("predict.py", arguments, output_file.with_suffix(".log"))
            _write_settings(settings_file, options)
        return run

    # -------------------------------------------------------------------------------------------------------- results

    def write_results(self) -> dict:
        """Write results.json, results.md and the figures from the runs that are there.

        Returns:
            What results.json holds.

        Raises:
            UserError: The runs were not evaluated on the same images.
        """
        architectures = ARCHITECTURES if self.has_images else TAG_ONLY_ARCHITECTURES
        table_3 = self._table_3().values() if self.has_images else ()
        _check_same_images(self._all_runs([*map(self.architecture_runs, architectures), *table_3]))
        any_run = self.architecture_runs("FF")[0].metrics()
        results = {
            "dataset": Path(self.data_args.dataset_name).name,
            "split": self.split,
            "num_images": any_run["num_images"],
            "seeds": self.args.seeds,
            "commit": _commit(),
            "versions": {name: version(name) for name in ("torch", "transformers", "timm")},
            "arguments": dataclasses.asdict(self.args),
            "settings": {
                name: value for name, value in self.base.items() if name not in ("dataset_name", "init_from")
            },
            "keep_all": {name: any_run[f"keep_all_{name}"] for name in METRICS},
            "table_2": {
                name: _summary([run.metrics() for run in self.architecture_runs(name)], METRICS)
                for name in architectures
            },
        }
        if self.has_images:
            results["outlier_ratio"] = self.args.outlier_ratio
            # The strange tags are the same for every model, and so is the result of removing nothing.
            any_run = self.table_3_runs(with_tad=False, pretrained=False)[0]
            results["keep_all"]["outlier_f1"] = self._outlier_metrics(any_run)["keep_all_f1"]
            results["table_3"] = [
                {
                    "tag_add_ratio": self.args.tad_ratio if with_tad else 0.0,
                    "tag_drop_ratio": self.args.tad_ratio if with_tad else 0.0,
                    "pretrained": pretrained,
                    **_summary([self._table_3_figures(run) for run in runs], ("outlier_percent", "f1", "outlier_f1")),
                }
                for (with_tad, pretrained), runs in self._table_3().items()
            ]
            self._write_figures()
        if self.is_nus_wide:
            results["paper"] = {
                "table_2": {
                    name: dict(zip(METRICS[:3], figures, strict=True)) for name, figures in PAPER_TABLE_2.items()
                },
                "table_3": [{"outlier_percent": percent, "f1": f1} for percent, f1 in PAPER_TABLE_3.values()],
            }
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_metrics(self.output_dir / "results.json", results)
        with whole_file(self.output_dir / "results.md") as partial:
            partial.write_text(format_results(results), encoding="utf-8")
        return results

    def _outlier_metrics(self, run: Run) -> dict[str, float]:
        return json.loads(self._outlier_file(run).with_suffix(".metrics.json").read_text(encoding="utf-8"))

    def _table_3_figures(self, run: Run) -> dict[str, float]:
        tested = self._outlier_metrics(run)
        return {
            "outlier_percent": tested["outlier_percent"],
            "f1": run.metrics()["f1"],
            "outlier_f1": tested["f1"],
        }

    def _write_figures(self) -> None:
        histories = {
            "aux": [run.history() for run in self.architecture_runs(MAIN)],
            "no_aux": [run.history() for run in self.architecture_runs("MAGNeto")],
            "bce": [run.history() for run in self.cross_entropy_runs()],
        }
        for with_tad, pretrained in PAPER_TABLE_3:
            key = (with_tad, pretrained)
            histories[key] = [run.history() for run in self.table_3_runs(*key)]

        figure = Figure(figsize=(5.5, 4), layout="constrained")
        axes = figure.subplots()
        for key, label in (("aux", "BCE-Dice"), ("bce", "BCE")):
            plot_curves(axes, histories[key], "eval_f1", label)
        self._label_axes(axes, histories["aux"], "Validation F1 by objective (figure 3)")
        save_figure(figure, self.output_dir / "figure_3.png")

        figure = Figure(figsize=(10.5, 7.5), layout="constrained")
        for column, (key, title) in zip(
            figure.subplots(2, 2, sharey="row").T,
            (("no_aux", "without auxiliary losses"), ("aux", "with auxiliary losses")),
            strict=True,
        ):
            for name, label in (
                ("eval_f1", "final"),
                ("eval_tag_f1", "tag stream"),
                ("eval_image_f1", "image stream"),
            ):
                plot_curves(column[0], histories[key], name, label)
            self._label_axes(column[0], histories[key], f"Validation F1, {title} (figure 4)")
            plot_curves(column[1], histories[key], "eval_mean_gate", "mean gate")
            column[1].set(title="Weight of the image stream", ylim=(0, 1))
            column[1].grid(alpha=0.3)
        save_figure(figure, self.output_dir / "figure_4.png")

        figure = Figure(figsize=(10.5, 4), layout="constrained")
        for axes, with_tad in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
            for pretrained, label in ((False, "from scratch"), (True, "pre-trained")):
                plot_curves(axes, histories[with_tad, pretrained], "eval_f1", label)
            self._label_axes(
                axes, histories["aux"], f"Validation F1, {'with' if with_tad else 'without'} TAD (figure 8)"
            )
        save_figure(figure, self.output_dir / "figure_8.png")

    @staticmethod
    def _label_axes(axes, histories: list[list[dict[str, float]]], title: str) -> None:
        plot_curves(axes, histories[:1], "eval_keep_all_f1", "keep all", color="0.35", linestyle="--", marker="")
        axes.set(title=title, ylabel="percent")
        axes.grid(alpha=0.3)
        axes.legend()


def _train(run: Run) -> Run:
    if not run.settings_file.exists():
        _write_settings(run.settings_file, run.all_settings)
    if not run.metrics_file.is_file():
        _launch(run.script, [run.settings_file, "--resume_from_checkpoint", "true"], run.log_file)
    for checkpoint in run.output_dir.glob("checkpoint-*"):  # of use for an unfinished run only
        shutil.rmtree(checkpoint)
    return run


_interrupted = threading.Event()  # set when this process is to end: what it has launched must not outlive it


def _launch(script: str, arguments: Sequence[Any], log_file: Path) -> None:
    # Port 0: on several GPUs, launches at the same time each take a free one.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--main_process_port", "0"]
    command = [*launcher, str(ROOT / script), *map(str, arguments)]
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with _hold(log_file) as log:
        log.truncate(0)
        process = subprocess.Popen(command, stdout=log, start_new_session=True, **streams)
    with process:
        try:
            while process.poll() is None:
                if _interrupted.wait(0.2):
                    raise UserError(f"{script} was interrupted")
        except BaseException:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGTERM)  # accelerate's launcher does not hand a signal on
            raise
    if process.returncode:
        lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "")
        raise UserError(f"{script} failed (see {log_file}): {reason[-300:]}")


def _hold(log_file: Path, patience: float = 0.0) -> TextIO:
    """Open a log to write to and lock it; every process that inherits it as its output holds the lock while it lives.

    Raises:
        UserError: After `patience` seconds, another process still holds it.
    """
    log, end = log_file.open("a", encoding="utf-8"), time.monotonic() + patience
    while True:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return log
        except BlockingIOError:
            if time.monotonic() >= end:
                log.close()
                raise UserError(
                    f"processes of an earlier reproduce.py are at work on {log_file.with_suffix('')}, expected none: "
                    f"wait until they have ended, or end them (fuser {log_file} lists them)"
                ) from None
        except OSError:  # a file system without locks
            return log
        time.sleep(0.1)


def _check_options(run: Run) -> None:
    """Raise `UserError` where train.py or pretrain.py would refuse what a run is set to, which may be hours away."""
    training_class = PretrainingArguments if run.script == "pretrain.py" else MagnetoTrainingArguments
    model_args, training_args = (
        cls(**{field.name: settings[field.name] for field in dataclasses.fields(cls) if field.name in settings})
        for cls, settings in ((ModelArguments, run.settings), (training_class, run.all_settings))
    )
    try:
        check_training_options(model_args, training_args)
    except UserError as error:
        raise type(error)(f"{run.name}: {error}") from None


def _check_photographs(data_args: DataArguments) -> None:
    """Raise `DataError` where tag-only runs would keep rows that the others leave out.

    What is checked here, the runs need not check again.
    """
    sizes = [
        {name: len(rows) for name, rows in load_training_splits(data_args, use_images).items()}
        for use_images in (True, False)
    ]
    for (role, count), with_unreadable in zip(sizes[0].items(), sizes[1].values(), strict=True):
        if count < with_unreadable:
            raise DataError(
                f"{data_args.dataset_name}, {role}: found {with_unreadable - count} unreadable photographs, expected "
                "none: models that read the tags alone would be compared on these rows, and the others without them"
            )


def _check_same_images(runs: Sequence[Run]) -> None:
    """Figures of different images are not to be compared: tag-only runs keep rows whose photograph is unreadable."""
    names = ("num_images", *(f"keep_all_{name}" for name in METRICS))
    found = {run: [run.metrics()[name] for name in names] for run in runs}
    *_, expected = found.values()  # of a run that reads photographs, where there are any
    others = [run for run in runs if not np.allclose(found[run], expected, rtol=0, atol=1e-3, equal_nan=True)]
    if others:
        index = names.index("keep_all_f1")
        here, there = (f"{row[0]} images, keep-all F1 {row[index]:.2f}" for row in (found[others[0]], expected))
        raise UserError(
            f"{', '.join(run.label for run in others)} found {here}, expected {there}, as {runs[-1].label}: "
            "remove the rows with unreadable photographs from the dataset first, and give another --output_dir"
        )


def _check_settings(run: Run) -> None:
    """A folder of results never mixes runs of different settings."""
    if not run.settings_file.exists():
        return
    found, expected = _read_settings(run.settings_file), run.all_settings
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{run.settings_file} was made with {name} {found.get(name)!r}, expected {expected.get(name)!r}; "
                "give another --output_dir, or the same settings"
            )


def _read_settings(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _write_settings(file: Path, settings: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as partial:
        partial.write_text(yaml.safe_dump(settings), encoding="utf-8")


def _settings(*instances) -> dict[str, Any]:
    """The fields of argument dataclasses that differ from their defaults, as a YAML file holds them."""
    settings = {}
    for instance in instances:
        required = {"dataset_name": "none"} if isinstance(instance, DataArguments) else {}
        defaults = type(instance)(**required)
        for field in dataclasses.fields(instance):
            value = getattr(instance, field.name)
            if field.init and value != getattr(defaults, field.name):
                settings[field.name] = value.value if isinstance(value, Enum) else value
    return {name: value for name, value in settings.items() if name not in OF_ONE_RUN}


def _default(name: str) -> Any:
    fields = (
        field for cls in (ModelArguments, DataArguments, MagnetoTrainingArguments) for field in dataclasses.fields(cls)
    )
    return next(field.default for field in fields if field.name == name)


def _commit() -> str | None:
    """The git commit of this code, with "-dirty" where a file of it was changed; None without git or a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _is_nus_wide(dataset_name: str) -> bool:
    card = Path(dataset_name) / "README.md" if Path(dataset_name).is_dir() else dataset_name
    try:
        return "extended|nus-wide" in (DatasetCard.load(card).data.get("source_datasets") or ())
    except (OSError, ValueError):  # no card, or none that can be read
        return False


def _summary(figures: list[dict[str, float]], names: Sequence[str]) -> dict[str, dict]:
    """For each metric its value in every run, the mean, and the standard deviation (of a sample; nan for one run)."""
    summary = {}
    for name in names:
        values = [math.nan if run[name] is None else run[name] for run in figures]
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        summary[name] = {"mean": float(np.mean(values)), "std": deviation, "runs": values}
    return summary


def format_results(results: dict) -> str:
    """results.json as Markdown."""
    paper, seeds = results.get("paper"), ", ".join(map(str, results["seeds"]))
    of_seeds = f"mean and standard deviation of the seeds {seeds}" if len(results["seeds"]) > 1 else f"seed {seeds}"
    lines = [
        f"# {results['dataset']}, {results['split']} split, {results['num_images']} images",
        "",
        f"Percent, {of_seeds}; a tag is selected when its score reaches 0.5. *Keep all* is the result of removing "
        "nothing; *reducible* images have a tag to remove.",
        "",
        _settings_in_words(results),
        "",
        "## Table 2: architectures",
        "",
        "| | precision | recall | F1 | F1, reducible images |" + (" paper: P / R / F1 |" if paper else ""),
        "|---|---|---|---|---|" + ("---|" if paper else ""),
    ]
    keep_all = " | ".join(format_percent(results["keep_all"][name], 1) for name in METRICS)
    lines.append(f"| keep all | {keep_all} |" + (" |" if paper else ""))
    for name, summary in results["table_2"].items():
        row = f"| {name} | {' | '.join(_mean_and_deviation(summary[metric]) for metric in METRICS)} |"
        lines.append(row + (" " + " / ".join(map(str, paper["table_2"][name].values())) + " |" if paper else ""))
    if "table_3" in results:
        lines += [
            "",
            "## Table 3: strange tags among the selected ones",
            "",
            f"Strange tags, {results['outlier_ratio']} for each own tag, are put into every image; the outlier "
            "percentage is that of the images of which at least one strange tag is selected.",
            "",
            "| beta | beta-hat | pre-trained | outlier % | F1 | F1 with the strange tags |"
            + (" paper: outlier %, F1 |" if paper else ""),
            "|---|---|---|---|---|---|" + ("---|" if paper else ""),
        ]
        keep_all = results["keep_all"]
        keep_all = f"{keep_all['f1']:.2f} | {keep_all['outlier_f1']:.2f}"
        lines.append(f"| keep all | | | 100.00 | {keep_all} |" + (" |" if paper else ""))
        for index, row in enumerate(results["table_3"]):
            cells = [
                row["tag_add_ratio"],
                row["tag_drop_ratio"],
                "yes" if row["pretrained"] else "no",
                *(_mean_and_deviation(row[name], 2) for name in ("outlier_percent", "f1", "outlier_f1")),
            ]
            if paper:
                cells.append(", ".join(f"{value:.2f}" for value in paper["table_3"][index].values()))
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines += ["", *(f"![figure {number}](figure_{number}.png)" for number in (3, 4, 8))]
    return "\n".join(lines) + "\n"


def _settings_in_words(results: dict) -> str:
    """What tells one experiment from another; all the rest is in results.json."""
    arguments, own = results["arguments"], results["settings"]
    settings = {name: own.get(name, _default(name)) for name in ("backbone", "num_train_epochs", "cached_views")}
    words = [f"{settings['num_train_epochs']:g} epochs"]
    if "table_3" in results:
        name = arguments["pretraining_config_name"] or own.get("dataset_config_name") or "default"
        epochs = arguments["pretraining_epochs"] or settings["num_train_epochs"]
        words = [f"backbone {settings['backbone']}", *words, f"{settings['cached_views']} cached views"]
        words.append(f"pre-training on the configuration {name} for {epochs:g} epochs")
    return f"Settings: {', '.join(words)}; commit {results['commit'] or 'unknown'}."


def _mean_and_deviation(summary: dict, digits: int = 1) -> str:
    deviation = "" if math.isnan(summary["std"]) else f" ± {summary['std']:.{digits}f}"
    return f"{format_percent(summary['mean'], digits)}{deviation}"
