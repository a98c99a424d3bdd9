"""Command-line arguments: dataclasses with help, read from a YAML file and overridden on the command line."""

import argparse
import contextlib
import dataclasses
import difflib
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import timm
import torch
import yaml
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from timm.models import get_pretrained_cfg
from transformers import HfArgumentParser, TrainingArguments

from modeling_magneto import MagnetoConfig
from modeling_magneto.selection_magneto import find_rule


class UserError(ValueError):
    """Something the user can put right; commands print its message in one line and end with status 1."""


class UsageError(UserError):
    """Wrong arguments; commands end with status 2."""


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


def _check_at_least(arguments: Any, **lowest: float) -> None:
    """Raise `UsageError` where a field is below its lowest value, or not finite; None is no value."""
    for name, least in lowest.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value < float("inf"):
            raise UsageError(f"{name} is {value}, expected at least {least}")


def _check_backbone(name: str) -> None:
    """Raise `UsageError` where timm knows no such model, or no such weights of it (what follows a dot)."""
    architecture = name.split(".")[0]
    if timm.is_model(architecture):
        try:
            get_pretrained_cfg(name, allow_unregistered=True)
            return
        except RuntimeError:
            known = timm.list_models(f"{architecture}.*", include_tags=True)
    else:
        known = timm.list_models()
    nearest = difflib.get_close_matches(name, known, n=1)
    suggestion = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise UsageError(f"backbone is {name!r}, which timm does not know{suggestion}")


INT8_HELP = (
    "Without a GPU, run the frozen backbone in 8-bit integers: three to four times as fast on processors with VNNI, "
    "twice on most others. Scores differ by 0.01 in the mean, single ones by more. Needs the extra export."
)


@dataclass
class ModelArguments:
    """The model; the fields that `MagnetoConfig` has too mean the same there."""

    streams: Literal["both", "image", "tag"] = _option("both", "both: MAGNeto, image: TF-it, tag: TF-t and FF.")
    tag_encoder: Literal["transformer", "feed_forward"] = _option("transformer", "feed_forward is the FF baseline.")
    hidden_size: int = _option(128, "d_model, width of the hidden states.")
    num_attention_heads: int = _option(4, "Heads of every attention.")
    intermediate_size: int = _option(512, "d_ff, inner width of feed-forward layers and gate.")
    num_tag_layers: int = _option(2, "M, encoder layers of the tag stream.")
    num_image_layers: int = _option(1, "N, encoder layers of the image stream.")
    dropout: float = _option(0.3, "Dropout of the whole architecture, in [0, 1).")
    max_tags: int = _option(16, "l, training examples are cut to this many tags.")
    objective: Literal["bce_dice", "bce"] = _option("bce_dice", "The loss of each output.")
    auxiliary_loss_weight: float = _option(1.0, "Weight of the two streams' own losses.")
    backbone: str = _option("resnet18", "A timm model with a feature map.")
    backbone_kwargs: dict | str | None = _option(None, "Further arguments of timm.create_model, as JSON.")
    backbone_weights: str = _option(
        "pretrained",
        "Where a new run's backbone starts: 'pretrained' (timm's weights, downloaded), a .safetensors file, or 'none' "
        "for random weights.",
    )
    init_from: str | None = _option(None, "A pre-trained MAGNeto: all but heads and gate starts from it.")
    tag_vectors: str | None = _option(None, "Word vectors (word2vec or GloVe text, also .gz) to start the tags from.")
    num_trainable_backbone_stages: int = _option(0, "Stages trained, from the top; 0 freezes all, -1 trains all.")
    freeze_backbone_norm: bool = _option(False, "Batch norm of trained stages keeps its statistics, too.")
    image_size: int = _option(112, "Height and width of the photographs for the model, in pixels.")
    image_mean: list[float] | None = _option(None, "Mean of each colour channel; by default what timm names.")
    image_std: list[float] | None = _option(None, "Deviation of each colour channel; by default what timm names.")

    def __post_init__(self):
        if isinstance(self.backbone_kwargs, str):
            try:
                self.backbone_kwargs = json.loads(self.backbone_kwargs)
            except json.JSONDecodeError as error:
                raise UsageError(f"backbone_kwargs is {self.backbone_kwargs!r}, expected JSON: {error}") from None
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if value is not None and len(value) != 3:
                raise UsageError(f"{name} has {len(value)} numbers, expected 3, one for each colour channel")
        if self.image_std is not None and not all(value > 0 for value in self.image_std):  # pixels are divided by it
            raise UsageError(f"image_std is {self.image_std}, expected numbers above 0")
        _check_backbone(self.backbone)
        self.to_config(vocab_size=3)  # what is out of range shows before rows are read

    def to_config(self, vocab_size: int) -> MagnetoConfig:
        """The configuration of a new model.

        Raises:
            UsageError: A value is out of range; the message names the field.
        """
        own, shared = ({item.name for item in dataclasses.fields(cls)} for cls in (ModelArguments, MagnetoConfig))
        try:
            return MagnetoConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in own & shared})
        except StrictDataclassError as error:
            raise UsageError(str(error.__cause__ or error)) from None


@dataclass
class RowArguments:
    """Where the rows come from, and how training photographs are changed."""

    dataset_name: str = _option("", "Required: a Hub id, or a folder of Parquet, CSV or JSON files.")
    dataset_config_name: str | None = _option(None, "A configuration of the dataset.")
    train_split: str = _option("train", "The split to train on; its tags are the vocabulary.")
    validation_split: str = _option("validation", "The split that chooses the best epoch.")
    skip_bad_rows: bool = _option(False, "Leave bad rows out, and say how many, instead of stopping.")
    min_crop_scale: float = _option(0.3, "A random crop covers at least this share of the photograph.")
    auto_augment: bool = _option(True, "Apply AutoAugment's ImageNet policy to training photographs.")

    def __post_init__(self):
        if not self.dataset_name:
            raise UsageError("dataset_name is missing, expected a Hub id or a folder")
        if not 0 < self.min_crop_scale <= 1:
            raise UsageError(f"min_crop_scale is {self.min_crop_scale}, expected a share in (0, 1]")


@dataclass
class DataArguments(RowArguments):
    """The rows of supervised training."""

    test_split: str = _option("test", "Evaluated once at the end, where the dataset has it.")
    tag_add_ratio: float = _option(0.5, "beta: at most this ratio of the unimportant tags is added at random.")
    tag_drop_ratio: float = _option(0.5, "beta-hat: at most this ratio of the unimportant tags is dropped.")

    selection: Literal["threshold", "expected_f1"] = _option(
        "threshold",
        "How the trained model chooses tags. threshold: the paper's rule, a raw score of at least 0.5. expected_f1: "
        "after training, scores are calibrated on the validation split, and the tags with the highest expected F1 are "
        "chosen. The best epoch is that of the highest F1 at 0.5 in either case.",
    )
    streaming: bool = _option(
        False,
        "Read the training rows from Parquet files, also on the Hub, in every epoch anew, in place of a copy on the "
        "disk. The splits that are evaluated are kept in memory, as they lie in the files.",
    )
    shuffle_buffer_size: int = _option(
        1000, "With --streaming, the order is drawn among the files, and among this many rows kept in memory."
    )
    widget_images: int = _option(
        0, "With --push_to_hub, publish this many photographs of the validation split as examples."
    )

    def __post_init__(self):
        super().__post_init__()
        _check_at_least(self, tag_add_ratio=0, widget_images=0, shuffle_buffer_size=1)
        if not 0 <= self.tag_drop_ratio <= 1:
            raise UsageError(f"tag_drop_ratio is {self.tag_drop_ratio}, expected a ratio in [0, 1]")


@dataclass
class PretrainingDataArguments(RowArguments):
    """The rows of pre-training; ground truth is never read."""

    outlier_ratio: float = _option(1.0, "Strange tags for each own tag of an image.")
    validation_share: float = _option(0.1, "Share of the training split held out where there is no validation split.")

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.outlier_ratio < float("inf"):
            raise UsageError(f"outlier_ratio is {self.outlier_ratio}, expected a ratio above 0")
        if not 0 < self.validation_share < 1:
            raise UsageError(f"validation_share is {self.validation_share}, expected a share in (0, 1)")


# What Trainer would do and MAGNeto cannot have: each option's possible values, and why there are no others.
POSSIBLE_VALUES = {
    "dataloader_drop_last": ((False,), "Trainer would leave images out of evaluation, too"),
    "label_smoothing_factor": ((0.0,), "the model computes its losses itself, from the labels as they are"),
    "activation_checkpointing": ((False,), "the model does not support it"),
    "gradient_checkpointing": ((False,), "the model does not support it"),  # the older name of the same
    "train_sampling_strategy": (("random", "sequential"), "how long a row is shows only when it is in a batch"),
    "hub_strategy": (("end",), "Trainer would upload whatever lies in output_dir, pickles too"),
    "remove_unused_columns": ((False,), "the collator needs all columns"),
    "include_for_metrics": ((["inputs"],), "calibration needs to know the tags, and nothing else"),
    "batch_eval_metrics": ((False,), "metrics are those of a whole split"),
    "eval_do_concat_batches": ((True,), "metrics are those of a whole split"),
    "prediction_loss_only": ((False,), "metrics need the scores"),
    "neftune_noise_alpha": ((None,), "the tags of a batch are embedded without their images"),
    "restore_callback_states_from_checkpoint": ((False,), "the callbacks here do that themselves"),
    "bf16_full_eval": ((False,), "Trainer would leave the model in half precision, and save it so"),
    "fp16_full_eval": ((False,), "Trainer would leave the model in half precision, and save it so"),
}


# What transformers reads of optim_args, for the optimizers that come with PyTorch or with itself: all else it passes
# over without a word. weight_decay it reads in vain: that of the option is in force.
OPTIM_FLAGS = ("nesterov", "centered")
OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    "adagrad": ("lr_decay", "eps"),
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
}


def _check_optim_args(optim: str, optim_args: str) -> None:
    """Raise `UsageError` where a name or a value would have no effect."""
    names = OPTIM_ARGS[optim]
    for part in optim_args.replace(" ", "").split(","):
        name, _, value = part.partition("=")
        if name not in names:
            expected = f"some of {', '.join(names)}" if names else "none"
            hint = f"; --{name} is an option" if name in MagnetoTrainingArguments.__dataclass_fields__ else ""
            raise UsageError(f"optim_args has {name!r} for {optim}, expected {expected}{hint}")
        if name in OPTIM_FLAGS:
            if value.lower() not in ("true", "1", "yes", "false", "0", "no"):
                raise UsageError(f"{name} is {value!r} in optim_args, expected true or false")
            continue
        try:
            is_number = math.isfinite(float(value))
        except ValueError:
            is_number = False
        if not is_number:
            raise UsageError(f"{name} is {value!r} in optim_args, expected a number")


@dataclass
class MagnetoTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the paper's optimiser (A.4) and the best epoch by validation F1."""

    optim: str = _option("sgd", "The optimizer; the paper's is SGD with momentum.")
    optim_args: str | None = _option("momentum=0.9", "Further arguments of the optimizer.")
    learning_rate: float = _option(1e-2, "Learning rate at the start.")
    lr_scheduler_type: str = _option("constant", "The learning-rate schedule.")
    max_grad_norm: float = _option(0.0, "Gradients are clipped to this norm; 0 does not clip.")
    num_train_epochs: float = _option(500.0, "Passes over the training split.")
    per_device_train_batch_size: int = _option(32, "Images a step on each device.")
    per_device_eval_batch_size: int = _option(64, "Images a step in evaluation.")
    eval_strategy: str = _option("epoch", "When to evaluate.")
    save_strategy: str = _option("epoch", "When to save a checkpoint.")
    logging_strategy: str = _option("epoch", "When to log.")
    save_total_limit: int | None = _option(1, "Checkpoints kept beside the best one.")
    load_best_model_at_end: bool = _option(True, "Save the best epoch, not the last one.")
    metric_for_best_model: str | None = _option("f1", "What the best epoch is best in, on validation.")
    hub_strategy: str = _option("end", "With --push_to_hub, a model is pushed once: at the end, when it is complete.")
    include_for_metrics: list[str] = field(
        default_factory=lambda: ["inputs"], metadata={"help": "Calibration needs to know the tags."}
    )
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"], metadata={"help": "Where the training curves go; none: nowhere."}
    )
    remove_unused_columns: bool = _option(False, "Our collator needs all columns.")
    ddp_find_unused_parameters: bool | None = _option(False, "Every trainable parameter is used in every step.")
    ddp_timeout: int = _option(
        24 * 60 * 60,
        "Seconds that processes wait for each other. A day: one checks all photographs, or makes the last features, "
        "while the others wait.",
    )
    resume_from_checkpoint: str | None = _option(
        None, "true: go on from the newest checkpoint in output_dir. Or the folder of a checkpoint."
    )
    backbone_learning_rate: float | None = _option(None, "That of the backbone's trained stages, where it differs.")
    early_stopping_patience: int | None = _option(None, "Stop after this many evaluations without a better figure.")
    int8: bool = _option(False, INT8_HELP)
    cached_views: int = _option(
        0, "Run a frozen backbone once over this many augmented views of each photograph, and train from its features."
    )
    feature_cache_dir: str | None = _option(None, "Where they are kept; by default magneto_features in HF_HOME.")

    def __post_init__(self):
        _check_at_least(self, learning_rate=0, backbone_learning_rate=0, num_train_epochs=0, seed=0, cached_views=0)
        _check_at_least(self, per_device_train_batch_size=1, per_device_eval_batch_size=1, early_stopping_patience=1)
        _check_at_least(self, gradient_accumulation_steps=1, dataloader_num_workers=0)
        if self.seed >= 2**32:
            raise UsageError(f"seed is {self.seed}, expected less than 2^32, as NumPy has it")
        if self.int8 and self.cached_views:
            raise UsageError("int8 is for the live backbone: what cached_views keeps is computed once anyway")
        for name, (possible, reason) in POSSIBLE_VALUES.items():
            value = getattr(self, name, None)  # not every version of transformers has all of them
            if value is not None and value not in possible:
                raise UsageError(f"{name} is {value!r}, expected {' or '.join(map(repr, possible))}: {reason}")
        if self.optim_args and not all("=" in part for part in self.optim_args.split(",")):
            raise UsageError(f"optim_args is {self.optim_args!r}, expected name=value, separated by commas")
        if not torch.accelerator.is_available():  # otherwise several processes would not know of each other
            self.use_cpu = True
        if self.use_cpu:  # TrainingArguments would do the same without a timeout, which it hands on for GPUs alone
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        super().__post_init__()
        # The default is SGD's; who asks for another optimizer has not asked for it.
        if self.optim.value in OPTIM_ARGS and self.optim_args and self.optim_args != type(self).optim_args:
            _check_optim_args(self.optim.value, self.optim_args)
        if self.early_stopping_patience is not None:  # Trainer would find out when all is ready
            for name, none in {"eval_strategy": "no", "metric_for_best_model": None}.items():
                if getattr(self, name) == none:
                    raise UsageError(f"{name} is {none!r}, expected another with early_stopping_patience")
        if not torch.accelerator.is_available():  # nothing to pin memory for, and PyTorch would warn
            self.dataloader_pin_memory = False


# What an epoch can be the best in with train.py alone: pre-training has no such figures.
TRAINING_METRICS = {
    *("f1", "precision", "recall", "reducible_f1"),
    *("final_loss", "tag_loss", "image_loss", "mean_gate"),
}


@dataclass
class PretrainingArguments(MagnetoTrainingArguments):
    """`MagnetoTrainingArguments` for outlier detection."""

    metric_for_best_model: str | None = _option("average_precision", "What the best epoch is best in, on validation.")


@dataclass
class PredictArguments:
    """Choosing the tags of a dataset."""

    model_name_or_path: str = _option("", "Required: a trained folder or a Hub id.")
    dataset_name: str = _option("", "Required: a Hub id, or a folder of Parquet, CSV or JSON files.")
    output_file: str = _option(
        "",
        "Required: the Parquet file to write. Beside it come its metrics, and report.html, "
        "which replaces that of an earlier prediction into the same folder.",
    )
    dataset_config_name: str | None = _option(None, "A configuration of the dataset.")
    split: str | None = _option(None, "The split; by default test, or the only one there is.")
    selection: Literal["threshold", "top_k", "expected_f1"] | None = _option(
        None, "How tags are chosen; by default as the model's own rule says."
    )
    threshold: float | None = _option(
        None, "A tag is selected when its score reaches it; in place of the model's rule."
    )
    top_k: int | None = _option(None, "Select this many tags; in place of the model's rule.")
    inject_outliers: float | None = _option(
        None, "The outlier test: add this many strange tags for each own tag, and count the images that keep one."
    )
    seed: int = _option(0, "Decides which tags are injected.")
    batch_size: int = _option(64, "Images a step on each device.")
    num_workers: int | None = _option(
        None, "Processes that read photographs, and without a GPU run the backbone; by default one for each core."
    )
    bf16: bool = _option(
        False, "Compute in bfloat16 where that is safe; for processors quick at it. Scores differ by 0.01."
    )
    int8: bool = _option(False, INT8_HELP)
    rows_per_part: int = _option(
        1024, "Rows that are written at a time. A killed prediction goes on at the first part that is not there."
    )
    engine: Literal["accelerate", "ray"] = _option(
        "accelerate", "accelerate: the processes of accelerate launch. ray: Ray Data, on all of a cluster."
    )
    streaming: bool = _option(
        False,
        "Read Parquet files, also on the Hub, while predicting, in place of a copy on the disk; without report.html.",
    )
    skip_bad_rows: bool = _option(
        False, "Leave bad rows and unreadable photographs out, and list them in a file, instead of stopping."
    )
    report_images: int = _option(200, "Images shown in report.html; 0 writes no report.")

    def __post_init__(self):
        for name in ("model_name_or_path", "dataset_name", "output_file"):
            if not getattr(self, name):
                raise UsageError(f"--{name} is missing")
        if not self.output_file.endswith(".parquet"):
            raise UsageError(f"output_file is {self.output_file!r}, expected a name that ends in .parquet")
        _check_at_least(self, batch_size=1, num_workers=0, rows_per_part=1, report_images=0, seed=0)
        if self.streaming and self.engine == "ray":
            raise UsageError("streaming is for --engine accelerate: with ray, each worker reads rows of its own")
        if self.inject_outliers is not None and not 0 < self.inject_outliers < float("inf"):
            raise UsageError(f"inject_outliers is {self.inject_outliers}, expected a ratio above 0")
        find_rule({}, self.selection, self.threshold, self.top_k)  # what is wrong, it says


@dataclass
class ReproductionArguments:
    """The paper's experiments, beside the arguments of train.py, which are the setting that they start from."""

    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Every experiment is run with each."}
    )
    tad_ratio: float = _option(0.5, "beta and beta-hat of the rows of table 3 that have TAD.")
    outlier_ratio: float = _option(0.5, "Strange tags for each own tag in the outlier test of table 3.")
    pretraining_config_name: str | None = _option(
        None, "The configuration of the dataset to pre-train on, such as unlabeled; by default that of the training."
    )
    pretraining_epochs: float | None = _option(None, "Epochs of pre-training; by default as many as of training.")
    pretraining_outlier_ratio: float = _option(1.0, "Strange tags for each own tag in pre-training.")
    num_parallel_runs: int = _option(1, "Runs at a time; on CPUs each takes one thread.")

    def __post_init__(self):
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"seeds is {self.seeds}, expected different numbers of at least 0")
        if not 0 < self.tad_ratio <= 1:  # beta-hat is a share of the tags that there are
            raise UsageError(f"tad_ratio is {self.tad_ratio}, expected a ratio in (0, 1]")
        for name in ("outlier_ratio", "pretraining_outlier_ratio", "pretraining_epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value}, expected a number above 0")
        _check_at_least(self, num_parallel_runs=1)


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are `UsageError`s."""

    def error(self, message: str):
        raise UsageError(message)


class _Parser(CommandParser, HfArgumentParser):
    """Of dataclasses."""


def parse_arguments(
    argument_classes: Sequence[type], argv: Sequence[str] | None = None, passed_over: Sequence[type] = ()
) -> tuple:
    """Read `[CONFIG.yaml] [--field value ...]` into one instance of each dataclass.

    A value on the command line wins over the file's. The file's values go through the same parser, so both mean the
    same and are checked in the same way.

    Args:
        argument_classes: Dataclasses whose fields the command knows.
        argv: The command line; by default the process's.
        passed_over: Dataclasses of another command, whose fields the file may hold too: one file for both.

    Raises:
        UsageError: An argument is unknown (the message suggests the nearest name) or has a wrong value, or the file
            asks for a stream of a command that has none.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(argument_classes, allow_abbrev=False, usage="%(prog)s [CONFIG.yaml] [--field value ...]")
    fields, others = (
        {item.name for argument_class in classes for item in dataclasses.fields(argument_class)}
        for classes in (argument_classes, passed_over)
    )
    options = {"help", *fields, *(f"no_{name}" for name in fields)}
    from_file = []
    if argv and not argv[0].startswith("-"):
        path = Path(argv.pop(0))
        settings = _read_yaml(path, fields | others)
        if settings.get("streaming") and "streaming" not in fields:  # passed over, it would mean a copy on the disk
            raise UsageError(f"streaming is true in {path}, expected false: this command reads no stream")
        best, ours = settings.get("metric_for_best_model"), fields
        if passed_over and str(best).removeprefix("eval_") in TRAINING_METRICS:  # of the other command's task
            ours = fields - {"metric_for_best_model", "greater_is_better"}
        settings = {name: value for name, value in settings.items() if name in ours}
        parser.set_defaults(**_read_unsayable(settings, argument_classes))
        from_file = [part for name, value in settings.items() for part in _to_arguments(name, value)]
    for argument in argv:
        if argument.startswith("--"):
            _check_known(argument.split("=")[0].removeprefix("--").replace("-", "_"), options, "the command line")
    try:
        *instances, rest = parser.parse_args_into_dataclasses([*from_file, *argv], return_remaining_strings=True)
    except UsageError:
        raise
    except (ValueError, ImportError) as error:  # from the dataclasses' own checks
        raise UsageError(" ".join(str(error).split())) from None
    if rest:
        raise UsageError(f"found {rest[0]!r} on the command line, expected --field value")
    return tuple(instances)


def _read_yaml(path: Path, options: set[str]) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the configuration {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise UsageError(f"{path} holds a {type(settings).__name__}, expected a mapping of fields to values")
    for name in settings:
        _check_known(str(name), options, str(path))
    return settings


def _read_unsayable(settings: dict[str, Any], argument_classes: Sequence[type]) -> dict[str, None | list]:
    """The fields that are null or an empty list in the file, all of which may be."""
    types = {
        name: kind for argument_class in argument_classes for name, kind in get_type_hints(argument_class).items()
    }
    unsayable = {name: value for name, value in settings.items() if value is None or value == []}
    for name, value in unsayable.items():
        if type(value) not in [get_origin(kind) or kind for kind in (types[name], *get_args(types[name]))]:
            raise UsageError(f"{name} is {'null' if value is None else 'empty'}, expected a value")
    return unsayable


def _to_arguments(name: str, value: Any) -> list[str]:
    """A setting of the file as it would stand on the command line, where null and an empty list cannot be said."""
    if value is None or value == []:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def _check_known(name: str, options: set[str], where: str) -> None:
    if name in options:
        return
    # Names that hold the word come first: no spelling leads from epochs to num_train_epochs.
    fields = [option for option in sorted(options) if not option.startswith("no_")]  # which is an option's negation
    holding = [option for option in fields if f"_{name}_" in f"_{option}_"]
    nearest = holding or difflib.get_close_matches(name, fields, n=1)
    suggestion = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    raise UsageError(f"unknown field {name!r} in {where}{suggestion}")


@contextlib.contextmanager
def user_errors_in_one_line(command: str):
    """Ends the process with one line on standard error where the user can put things right."""
    try:
        yield
    except (UserError, OSError, SafetensorError, RuntimeError) as error:  # also a folder that cannot be written
        # torch.save has no other word for a full disk.
        unwritten = "enforce fail at inline_container.cc" in str(error)
        if isinstance(error, RuntimeError) and not (unwritten or isinstance(error, torch.OutOfMemoryError)):
            raise
        reason = str(error) or type(error).__name__
        if "Traceback (most recent call last)" in reason:  # of a data loader's worker; what we have to say is the end
            reason = re.split(rf"(?m)^(?:[\w.]+\.)?{type(error).__name__}: ", reason)[-1]
        if unwritten:
            reason = f"a file cannot be written, the disk may be full: {reason}"
        print(f"{command}: error: {' '.join(reason.split())}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)  # as shells have it of SIGINT
