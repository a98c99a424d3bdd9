"""Choosing the tags of a whole dataset: rows in, a Parquet file of scores and selected tags out."""

import functools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from modeling_magneto import MagnetoForTagSummarization, MagnetoProcessor
from modeling_magneto.loss_magneto import IGNORED_LABEL
from modeling_magneto.modeling_magneto import MagnetoOutput

from .arguments import PredictArguments, UserError
from .collation import OutlierDataset, TagCollator, without_images
from .evaluation import evaluate_selection, output_names, write_metrics
from .initialization import load_source
from .tag_data import DataError, checked_split, load_tag_dataset

SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("selected_tags", pa.list_(pa.string())),
    ]
)


def load_model(model_name_or_path: str) -> tuple[MagnetoForTagSummarization, MagnetoProcessor]:
    """A trained model in eval mode and its processor, from a folder or the Hub.

    Raises:
        UserError: There is no such model, or it is no MAGNeto for tags summarization.
    """
    model, processor = load_source(model_name_or_path)
    if not isinstance(model, MagnetoForTagSummarization):
        raise UserError(
            f"{model_name_or_path!r} holds a {type(model).__name__}, expected a MagnetoForTagSummarization"
        )
    return model.eval(), processor


def check_output_file(args: PredictArguments) -> None:
    """Raise `UserError` before the work where the result could not be written after it."""
    output_file = Path(args.output_file)
    if output_file.is_dir():
        raise UserError(f"output_file {args.output_file!r} is a folder, expected the name of a file")
    try:
        output_file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_file {args.output_file!r} cannot be written: {error.strerror}") from None


def load_prediction_split(args: PredictArguments, use_images: bool) -> Dataset:
    """The checked rows to predict; ground truth is checked where it is there.

    Raises:
        DataError: The split is missing or ambiguous, a column is missing, or a row is bad.
    """
    splits = load_tag_dataset(args.dataset_name, args.dataset_config_name)
    split = _choose_split(splits, args)
    dataset = splits[split]
    use_labels = has_ground_truth(dataset)
    dataset = checked_split(
        dataset,
        f"{args.dataset_name}, {split}",
        use_images,
        use_labels,
        args.skip_bad_rows,
        allow_unlabeled=True,
    )
    # A tag-only model's report shows the photographs all the same.
    columns = ["item_id", "tags", "image", *(["important_tags"] if use_labels else [])]
    return dataset.select_columns([name for name in columns if name in dataset.column_names])


def rows_for_model(dataset: Dataset, processor: MagnetoProcessor, args: PredictArguments) -> Dataset | OutlierDataset:
    """The rows as the model reads them: without photographs where it needs none, and with `inject_outliers` with
    strange tags, which a row then names in `outliers`."""
    rows = dataset if processor.use_images else without_images(dataset)
    if args.inject_outliers is not None:
        rows = OutlierDataset(rows, args.seed, processor.vocabulary, args.inject_outliers)
    return rows


def has_ground_truth(dataset: Dataset) -> bool:
    """Whether any row has an important tag; a column of empty lists says that nothing is known."""
    if "important_tags" not in dataset.column_names:
        return False
    columns = dataset.select_columns("important_tags").with_format("arrow").iter(batch_size=10_000)
    return any(pc.any(pc.greater(pc.list_value_length(rows["important_tags"]), 0)).as_py() for rows in columns)


def _choose_split(splits: DatasetDict, args: PredictArguments) -> str:
    if args.split is not None:
        if args.split not in splits:
            raise DataError(f"{args.dataset_name}: split {args.split!r} is missing, found {', '.join(splits)}")
        return args.split
    if "test" in splits:
        return "test"
    if len(splits) > 1:
        raise DataError(f"{args.dataset_name} has the splits {', '.join(splits)}: choose one with --split")
    return next(iter(splits))


@dataclass
class PredictedBatch:
    """One batch of rows with what the model says of them.

    Args:
        rows: The rows as they came, photographs included.
        results: What `MagnetoProcessor.post_process` returns.
        outputs: The model's outputs, on its device.
        labels: (B, L) where the rows have ground truth.
    """

    rows: list[dict]
    results: list[dict]
    outputs: MagnetoOutput
    labels: torch.Tensor | None


def predict_batches(
    model: MagnetoForTagSummarization,
    processor: MagnetoProcessor,
    dataset: Dataset,
    batch_size: int = 64,
    num_workers: int = 0,
    selection: str | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    output_attentions: bool = False,
) -> Iterator[PredictedBatch]:
    """Score the rows in their order, batch by batch; nothing is kept.

    Args:
        model: In eval mode, on the device to use.
        processor: The model's processor.
        dataset: Checked rows.
        batch_size: Images a step.
        num_workers: Processes that read and decode photographs.
        selection, threshold, top_k: As in `MagnetoProcessor.post_process`.
        output_attentions: Whether the outputs tell what each tag looked at.
    """
    collate = functools.partial(_rows_and_batch, TagCollator(processor))
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate)
    for rows, batch in loader:
        with torch.inference_mode():
            outputs = model(
                **{name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"},
                output_attentions=output_attentions,
            )
        results = processor.post_process(outputs, [row["tags"] for row in rows], selection, threshold, top_k)
        yield PredictedBatch(rows, results, outputs, batch.get("labels"))


def _rows_and_batch(collate: TagCollator, rows: list[dict]) -> tuple[list[dict], dict[str, torch.Tensor]]:
    return rows, collate(rows)


def predict_dataset(
    accelerator: Accelerator,
    model: MagnetoForTagSummarization,
    processor: MagnetoProcessor,
    dataset: Dataset,
    args: PredictArguments,
) -> dict[str, float]:
    """Write `args.output_file`, and beside it the metrics where there is ground truth.

    Each process takes its own run of rows and writes a part; the parts are put together in order, so every row is
    there once, and `output_file` appears when it is complete.

    Returns:
        On the main process the metrics, where there is ground truth, and with `inject_outliers` the percentage of
        images of which a strange tag was selected, `outlier_percent`; elsewhere nothing.
    """
    output_file = Path(args.output_file)
    parts = output_file.with_name(output_file.name + ".parts")
    if accelerator.is_main_process:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
    accelerator.wait_for_everyone()

    rows = rows_for_model(dataset, processor, args)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    share = Subset(rows, range(len(rows) * rank // num_ranks, len(rows) * (rank + 1) // num_ranks))
    model.to(accelerator.device)
    fooled: list[bool] = []  # of each image, whether a strange tag was selected
    known_labels: list[np.ndarray] = []
    selected: dict[str, list[np.ndarray]] = {
        name: [] for name in output_names(model.config) if name.endswith("logits")
    }
    progress = tqdm(total=len(share), unit="image", desc="Predicting", disable=not accelerator.is_local_main_process)
    with progress, pq.ParquetWriter(parts / f"{accelerator.process_index:05d}.parquet", SCHEMA) as writer:
        for batch in predict_batches(
            model,
            processor,
            share,
            args.batch_size,
            args.num_workers,
            args.selection,
            args.threshold,
            args.top_k,
        ):
            writer.write_table(_to_table(batch))
            if batch.labels is not None:
                _collect(batch, processor, known_labels, selected, args)
            if args.inject_outliers is not None:
                fooled += [
                    not set(row["outliers"]).isdisjoint(result["selected_tags"])
                    for row, result in zip(batch.rows, batch.results, strict=True)
                ]
            progress.update(len(batch.rows))

    known_labels, fooled = gather_object(known_labels), gather_object(fooled)
    selected = {name: gather_object(lists) for name, lists in selected.items()}
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return {}
    _join_parts(parts, output_file)
    metrics = evaluate_selection(selected, known_labels) if known_labels else {}
    if fooled:
        metrics["outlier_percent"] = 100 * sum(fooled) / len(fooled)
    if metrics:
        write_metrics(metrics_file(output_file), metrics)
    return metrics


def metrics_file(output_file: Path) -> Path:
    """`OUT.metrics.json` for `OUT.parquet`."""
    return output_file.with_suffix(".metrics.json")


def _to_table(batch: PredictedBatch) -> pa.Table:
    return pa.table(
        {
            "item_id": [row["item_id"] for row in batch.rows],
            "tags": [[tag for tag, _ in result["tags"]] for result in batch.results],
            "scores": [[score for _, score in result["tags"]] for result in batch.results],
            "selected_tags": [result["selected_tags"] for result in batch.results],
        },
        schema=SCHEMA,
    )


def _collect(
    batch: PredictedBatch,
    processor: MagnetoProcessor,
    known_labels: list[np.ndarray],
    selected: dict[str, list[np.ndarray]],
    args: PredictArguments,
) -> None:
    """Keep what the metrics need of images with ground truth: labels, and what each output selects."""
    real = batch.labels != IGNORED_LABEL  # (B, L)
    labelled = real.any(-1).nonzero().flatten().tolist()
    known_labels += [batch.labels[index, real[index]].numpy().astype(np.int8) for index in labelled]
    tags = [[tag for tag, _ in result["tags"]] for result in batch.results]
    for name, rows in selected.items():
        kept = processor.select(batch.outputs[name], tags, args.selection, args.threshold, args.top_k)  # (B, L)
        rows += [kept[index, real[index]].numpy().astype(np.int8) for index in labelled]


def _join_parts(parts: Path, output_file: Path) -> None:
    partial = parts / "joined"
    with pq.ParquetWriter(partial, SCHEMA) as writer:
        for part in sorted(parts.glob("*.parquet")):
            for rows in pq.ParquetFile(part).iter_batches():
                writer.write_batch(rows)
    partial.replace(output_file)
    shutil.rmtree(parts)
