"""Choosing the tags of rows: a trained model, the rows of a split, and what it says of them, batch by batch."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from modeling_magneto import MagnetoForTagSummarization, MagnetoProcessor
from modeling_magneto.modeling_magneto import MagnetoOutput

from .arguments import PredictArguments, UserError
from .collation import OutlierDataset, SeededDataset, TagCollator, without_images
from .frozen_backbone import FrozenBackbone
from .initialization import load_source
from .quantized_backbone import QuantizedBackbone
from .tag_data import DataError, check_columns, checked_split, find_split, load_tag_dataset


def load_model(model_name_or_path: str) -> tuple[MagnetoForTagSummarization, MagnetoProcessor]:
    """A trained model for inference and its processor, from a folder or the Hub.

    Raises:
        UserError: There is no such model, or it is no MAGNeto for tags summarization.
    """
    model, processor = load_source(model_name_or_path)
    if not isinstance(model, MagnetoForTagSummarization):
        raise UserError(
            f"{model_name_or_path!r} holds a {type(model).__name__}, expected a MagnetoForTagSummarization"
        )
    return model.eval().requires_grad_(False), processor


def load_prediction_split(args: PredictArguments, use_images: bool) -> Dataset | IterableDataset:
    """The rows to predict. Bad rows stop here, unless they are to be skipped when it is their turn.

    Photographs are not decoded: which of them are unreadable shows when they are read. The rows of a stream are not
    read at all.

    Raises:
        DataError: The split is missing or ambiguous, a column is missing, or a row is bad.
    """
    splits = load_tag_dataset(args.dataset_name, args.dataset_config_name, args.streaming)
    split = _choose_split(splits, args)
    dataset, name = find_split(splits, split, args), f"{args.dataset_name}, {split}"
    use_labels = has_ground_truth(dataset)
    check_columns(dataset, name, ["item_id", "tags", *(["image"] if use_images else [])])
    if not (args.streaming or args.skip_bad_rows):
        checked_split(dataset, name, False, use_labels, skip_bad_rows=False, allow_unlabeled=True)
    # A tag-only model's report shows the photographs all the same.
    columns = ["item_id", "tags", "image", *(["important_tags"] if use_labels else [])]
    return dataset.select_columns([column for column in columns if column in dataset.column_names])


def has_ground_truth(dataset: Dataset | IterableDataset) -> bool:
    """Whether any row has an important tag; a column of empty lists says that nothing is known.

    A stream has ground truth where it has the column.
    """
    if "important_tags" not in dataset.column_names or isinstance(dataset, IterableDataset):
        return "important_tags" in dataset.column_names
    columns = dataset.select_columns("important_tags").with_format("arrow").iter(batch_size=10_000)
    return any(pc.any(pc.greater(pc.list_value_length(rows["important_tags"]), 0)).as_py() for rows in columns)


def _choose_split(splits: DatasetDict, args: PredictArguments) -> str:
    if args.split is not None:
        return args.split
    if "test" in splits:
        return "test"
    if len(splits) > 1:
        raise DataError(f"{args.dataset_name} has the splits {', '.join(splits)}: choose one with --split")
    return next(iter(splits))


def rows_for_model(
    dataset: Dataset, processor: MagnetoProcessor, args: PredictArguments, first_index: int = 0
) -> SeededDataset:
    """The rows as `predict_batches` reads them: with undecoded photographs, or without where the model needs none, and
    with `inject_outliers` with strange tags, which a row then names in `outliers`.

    Args:
        dataset: Rows as of `load_prediction_split`.
        processor: The model's processor.
        args: The arguments of the prediction.
        first_index: The index of the first row in the whole dataset, where this is a part of one.
    """
    if not processor.use_images:
        dataset = without_images(dataset)
    if args.inject_outliers is not None:
        return OutlierDataset(dataset, args.seed, processor.vocabulary, args.inject_outliers, first_index)
    return SeededDataset(dataset, args.seed, first_index=first_index)


@dataclass
class PredictedBatch:
    """One batch of rows with what the model says of them.

    Args:
        rows: The rows as they came, without photographs, and without those that could not be read.
        results: What `MagnetoProcessor.post_process` returns of them.
        outputs: The model's outputs, on its device; none where no row could be read.
        labels: (B, L) where the rows have ground truth.
        unreadable: The rows whose photograph could not be read.
    """

    rows: list[dict]
    results: list[dict]
    outputs: MagnetoOutput | None
    labels: torch.Tensor | None
    unreadable: list[dict]


def predict_batches(
    model: MagnetoForTagSummarization,
    processor: MagnetoProcessor,
    dataset: torch.utils.data.Dataset,
    batch_size: int = 64,
    num_workers: int = 0,
    selection: str | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    output_attentions: bool = False,
    bf16: bool = False,
    batches: Iterable[Sequence] | None = None,
    backbone: FrozenBackbone | QuantizedBackbone | None = None,
) -> Iterator[PredictedBatch]:
    """Score the rows batch by batch; nothing is kept.

    Args:
        model: In eval mode, on the device to use.
        processor: The model's processor.
        dataset: Rows as of `rows_for_model`, with undecoded photographs.
        batch_size: Images a step.
        num_workers: Processes that read photographs and, on a CPU, run the backbone.
        selection, threshold, top_k: As in `MagnetoProcessor.post_process`.
        output_attentions: Whether the outputs tell what each tag looked at.
        bf16: Whether the model computes in bfloat16 what autocast does.
        batches: The indices of the rows of each batch, or of `StreamedRows` the rows; by default all rows in their
            order, `batch_size` at a time.
        backbone: Runs where photographs are read, in place of the model's.
    """
    if batches is None:
        batches = BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=functools.partial(_read_batch, TagCollator(processor, backbone=backbone)),
        pin_memory=model.device.type == "cuda",  # copied to a GPU while it computes
    )
    for rows, batch, unreadable in loader:
        if not rows:
            yield PredictedBatch([], [], None, None, unreadable)
            continue
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            outputs = model(
                **{
                    name: tensor.to(model.device, non_blocking=True)
                    for name, tensor in batch.items()
                    if name != "labels"
                },
                output_attentions=output_attentions,
            )
        results = processor.post_process(outputs, [row["tags"] for row in rows], selection, threshold, top_k)
        yield PredictedBatch(rows, results, outputs, batch.get("labels"), unreadable)


def _read_batch(collate: TagCollator, rows: list[dict]) -> tuple[list[dict], dict[str, torch.Tensor], list[dict]]:
    """The rows whose photograph can be read, their tensors, and the other rows."""
    readable, unreadable = collate.read(rows)
    batch = collate(readable) if readable else {}
    return [{name: row[name] for name in row if name != "pixel_values"} for row in readable], batch, unreadable
