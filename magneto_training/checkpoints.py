"""Checkpoints: from which one an interrupted run goes on, and from which it must not."""

import dataclasses
import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, SAFE_WEIGHTS_NAME

from modeling_magneto import MagnetoConfig, MagnetoPreTrainedModel, MagnetoProcessor

from .arguments import MagnetoTrainingArguments, UserError

# A run goes on with these as it began: the optimizer's and the schedule's state fit no other, and what is best so far
# was found by one metric.
LASTING_ARGUMENTS = ("optim", "lr_scheduler_type", "metric_for_best_model", "greater_is_better")
MODEL_FILES = (CONFIG_NAME, PROCESSOR_NAME, "tokenizer.json")  # beside the weights
STATE_NAME = "EpochCallback"  # trainer.py's, under whose name a checkpoint keeps them


def lasting_arguments(args: MagnetoTrainingArguments) -> dict[str, str | bool | None]:
    """What checkpoints keep, for `find_checkpoint`, of how the run began."""
    lasting = {name: getattr(value := getattr(args, name), "value", value) for name in LASTING_ARGUMENTS}
    lasting["optim"] = lasting["optim"].removesuffix("_fused")  # the same, in another way
    if lasting["metric_for_best_model"] is not None:
        lasting["metric_for_best_model"] = lasting["metric_for_best_model"].removeprefix("eval_")
    return lasting


def find_checkpoint(args: MagnetoTrainingArguments) -> str | None:
    """The checkpoint to go on from: a named one, or with `true` the last one in `output_dir` that is not damaged.

    Raises:
        UserError: The named checkpoint is not there or damaged, or all are; a run could not go on from the one found
            as it began; or `output_dir` holds another run's checkpoints.
    """
    # Trainer writes its state last: a checkpoint without it was cut short.
    states = Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    numbered = [path.parent for path in states if path.parent.name.rpartition("-")[2].isdigit()]
    complete = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        if complete:
            raise UserError(
                f"output_dir {args.output_dir!r} holds {complete[-1].name} of another run: give "
                "--resume_from_checkpoint true to go on with it, or another --output_dir"
            )
        return None
    is_named = str(wanted).lower() != "true"
    if is_named and not (Path(wanted) / TRAINER_STATE_NAME).is_file():
        raise UserError(f"resume_from_checkpoint is {wanted!r}, expected a complete checkpoint folder")
    for checkpoint in [Path(wanted)] if is_named else reversed(complete):
        damaged = _find_damaged(checkpoint)
        if damaged is None:
            _check_goes_on(checkpoint, args)
            return str(checkpoint)
        if is_named:
            raise UserError(f"{damaged}, expected another checkpoint to go on from")
        if args.process_index == 0:
            print(f"{damaged}: {checkpoint.name} is passed over", flush=True)
    if complete:
        raise UserError(f"output_dir {args.output_dir!r} holds no whole checkpoint, expected one to go on from")
    return None


def check_checkpoint(checkpoint: str, model: MagnetoPreTrainedModel, processor: MagnetoProcessor) -> None:
    """Raise `UserError` where a checkpoint belongs to another model than this run's, or to other tags."""
    config = model.config
    saved, saved_processor = MagnetoConfig.from_pretrained(checkpoint), MagnetoProcessor.from_pretrained(checkpoint)
    own = {item.name for item in dataclasses.fields(MagnetoConfig)} - {
        item.name for item in dataclasses.fields(PreTrainedConfig)
    }
    pairs = {"architectures": (saved.architectures, [type(model).__name__])}  # of train.py or of pretrain.py
    pairs |= {name: (getattr(saved, name), getattr(config, name)) for name in sorted(own)}
    for name in ("image_mean", "image_std"):
        pairs[name] = tuple(list(getattr(which.image_processor, name)) for which in (saved_processor, processor))
    # The embeddings are told apart by their places alone. How many they are, vocab_size has said before.
    vocabularies = zip(saved_processor.vocabulary, processor.vocabulary, strict=False)
    pairs |= {f"tag {index} of the vocabulary": tags for index, tags in enumerate(vocabularies)}
    for name, (found, expected) in pairs.items():
        if found != expected:
            raise UserError(f"the checkpoint {checkpoint} has {name} {found!r}, expected {expected!r} as in this run")


def _find_damaged(checkpoint: Path) -> str | None:
    """What is wrong with a file that is not there, or not to its end: after a crash, or on a full disk."""
    files = sorted(checkpoint.iterdir())
    missing = [name for name in MODEL_FILES if checkpoint / name not in files]
    if not any(file.suffix == ".safetensors" or file.is_dir() for file in files):  # a folder, of shares of the weights
        missing.append(SAFE_WEIGHTS_NAME)
    if missing:
        return f"{checkpoint / missing[0]} is missing"
    for file in files:
        try:
            if file.suffix == ".json":
                content = json.loads(file.read_text(encoding="utf-8"))
                is_whole = isinstance(content, dict)
            elif file.suffix == ".safetensors":
                safe_open(file, "pt")  # reads where the tensors lie, and how long the file is to be
                is_whole = True
            elif file.suffix in (".pt", ".pth"):
                is_whole = zipfile.is_zipfile(file)  # which has its index at the end
            else:
                is_whole = True
        except (ValueError, SafetensorError):
            is_whole = False
        if not is_whole:
            return f"{file} is damaged"
    return None


def _check_best(checkpoint: Path, state: dict, args: MagnetoTrainingArguments) -> None:
    """Raise `UserError` where the best model so far, which the run is to end with, is not there any more.

    Trainer would forget it without a word, and end with the best of what is still to come.
    """
    best = state.get("best_model_checkpoint")
    if best is None or not args.load_best_model_at_end:
        return
    # Trainer finds it where it was, or where `output_dir` is now, by its step.
    moved = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.get('best_global_step')}"
    found = next((folder for folder in (Path(best), moved) if folder.is_dir()), None)
    problem = f"{best} is missing" if found is None else _find_damaged(found)
    if problem is not None:
        raise UserError(
            f"{problem}, and was the best until {checkpoint.name}; expected it whole, a checkpoint from before it, or "
            "--load_best_model_at_end false"
        )


def _check_goes_on(checkpoint: Path, args: MagnetoTrainingArguments) -> None:
    """Raise `UserError` where Trainer would go on without a word, and otherwise than the run has begun."""
    for name in ("optimizer", "scheduler"):  # the former is a folder where several GPUs share a model
        if not any(checkpoint.glob(f"{name}*")):
            raise UserError(f"{checkpoint} has no {name}, expected a checkpoint saved without --save_only_model")
    expected = ["rng_state.pth"]
    if args.world_size > 1:
        expected = [f"rng_state_{index}.pth" for index in range(args.world_size)]
    found = {file.name for file in checkpoint.glob("rng_state*.pth")}
    # Another machine may keep its own.
    if not {expected[args.process_index]} <= found <= set(expected):
        raise UserError(
            f"{checkpoint} has {', '.join(sorted(found)) or 'no rng_state.pth'}, expected {', '.join(expected)}: "
            "a run goes on with as many processes as before"
        )
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    _check_best(checkpoint, state, args)
    saved = state["stateful_callbacks"].get(STATE_NAME, {}).get("attributes", {})
    for name, value in lasting_arguments(args).items():
        if value is not None and saved.get(name, value) != value:  # an older checkpoint does not say
            raise UserError(f"{checkpoint} is of a run with {name} {saved[name]!r}, and this one has {value!r}")
    size = state["train_batch_size"]
    if size != args.train_batch_size and not args.auto_find_batch_size:
        raise UserError(
            f"{checkpoint} is of {size} images a step in each process, and this run has {args.train_batch_size}; "
            "expected as many as before"
        )
