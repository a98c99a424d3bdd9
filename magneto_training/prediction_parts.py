"""Choosing the tags of a whole dataset: rows in, a Parquet file of scores and selected tags out.

A dataset is cut into runs of `rows_per_part` rows. Each run becomes one file, a part, that holds beside the results
what the metrics need of it:

    OUT.parquet.parts/settings.json                        what the parts depend on; others must not be mixed with them
    OUT.parquet.parts/rows-000000000-000001024.parquet     there whole or not at all

Whoever makes the parts, this process, one of several, or a worker of Ray, calls `predict_parts`. A prediction that was
killed goes on with the parts that are missing. When all are there they are put together, in order, as OUT.parquet.
"""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from modeling_magneto import MagnetoForTagSummarization, MagnetoProcessor
from modeling_magneto.loss_magneto import IGNORED_LABEL

from .arguments import PredictArguments, UserError
from .collation import SeededDataset, without_images
from .evaluation import combine_metrics, evaluate_selection, output_names, write_metrics
from .frozen_backbone import FrozenBackbone
from .photographs import UNREADABLE, undecoded
from .prediction import PredictedBatch, predict_batches, rows_for_model
from .quantized_backbone import QuantizedBackbone, backbone_for_workers
from .tag_data import DataError, describe_cause, find_problems, read_stream
from .whole_file import whole_file

SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("selected_tags", pa.list_(pa.string())),
    ]
)
# In a part's own metadata: a digest of its rows, what they add to the metrics, and which of them were skipped.
FIGURES = b"magneto"
PARTS_PER_ROW_GROUP = 16
ROWS_PER_WORKER = 64  # at least: starting one takes time
MAX_WORKERS = 16  # that feed a GPU
MAX_TAGS_PER_IMAGE = 64  # with padding, in the mean of a batch: a few endless lists must not make all others wait


class StreamedRows(torch.utils.data.Dataset):
    """Rows of a stream for `predict_parts`, read a part at a time.

    The data loader's workers cannot look them up: they are handed the rows, undecoded, in place of indices.

    Args:
        stream: Rows as of `load_prediction_split`.
        processor, args: As of `rows_for_model`.
    """

    def __init__(self, stream: IterableDataset, processor: MagnetoProcessor, args: PredictArguments):
        self.stream = stream
        self.processor = processor
        self.args = args
        self.num_rows = 0  # that have been read

    def __getitems__(self, rows: list[dict]) -> list[dict]:
        return rows

    def parts(self) -> Iterator[tuple[range, SeededDataset]]:
        """Read part after part; yields the indices of its rows in the whole stream, and the rows.

        Raises:
            DataError: As `read_stream`.
        """
        rows = undecoded(self.stream)
        info = datasets.DatasetInfo(features=rows.features)
        tables = read_stream(rows.with_format("arrow").iter(self.args.rows_per_part), self.args.dataset_name)
        with ThreadPoolExecutor(1) as reading:  # the next part, while this one is predicted
            coming = reading.submit(next, tables, None)
            while (table := coming.result()) is not None:
                coming = reading.submit(next, tables, None)
                start, self.num_rows = self.num_rows, self.num_rows + len(table)
                part = Dataset(table, info=info, fingerprint=str(start))  # otherwise all photographs are hashed
                yield range(start, self.num_rows), rows_for_model(part, self.processor, self.args, start)


def check_output_file(args: PredictArguments) -> None:
    """Raise `UserError` before the work where the result could not be written after it."""
    output_file = Path(args.output_file)
    if output_file.is_dir():
        raise UserError(f"output_file {args.output_file!r} is a folder, expected the name of a file")
    try:
        output_file.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=output_file.parent).close()
    except OSError as error:
        raise UserError(f"output_file {args.output_file!r} cannot be written: {error.strerror}") from None


def new_accelerator() -> Accelerator:
    """What this process knows of the others, which may be done long before it, or long after.

    Without an accelerator it has to be told so: otherwise several processes would not know of each other.
    """
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    return Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patience])


def load_backbone(
    accelerator: Accelerator,
    model: MagnetoForTagSummarization,
    processor: MagnetoProcessor,
    dataset: Dataset | IterableDataset,
    args: PredictArguments,
) -> FrozenBackbone | QuantizedBackbone | None:
    """The backbone as this process's workers run it; none where the model itself does, or where Ray's workers do.

    Raises:
        UserError: As `backbone_for_workers`.
    """
    if args.engine == "ray":
        return None
    return backbone_for_workers(model, processor, dataset, accelerator.device, args.bf16, args.int8)


def predict_dataset(
    accelerator: Accelerator,
    model: MagnetoForTagSummarization,
    processor: MagnetoProcessor,
    dataset: Dataset | IterableDataset,
    args: PredictArguments,
    backbone: FrozenBackbone | QuantizedBackbone | None = None,
) -> dict[str, float]:
    """Write `args.output_file`, and beside it the metrics where there is ground truth, and the list of skipped rows.

    `output_file` appears when it is complete. The parts of a prediction that was killed are used, if it had the same
    settings, whatever number of processes had made them.

    Args:
        accelerator: As of `new_accelerator`.
        model: In eval mode.
        processor: The model's processor.
        dataset: Rows as of `load_prediction_split`.
        args: The arguments of the prediction.
        backbone: As of `load_backbone`.

    Returns:
        On the main process the metrics, where there is ground truth, and with `inject_outliers` the percentage of
        images of which a strange tag was selected, `outlier_percent`; elsewhere nothing.

    Raises:
        UserError: There are parts that were made with other settings, or of other rows.
        DataError: A row is bad, or its photograph cannot be read, and bad rows are not to be skipped; or all are bad;
            or a stream's files cannot be read.
    """
    folder = parts_folder(args.output_file)
    if accelerator.is_main_process:
        _open_folder(folder, _settings(model, processor, dataset, args))
    accelerator.wait_for_everyone()
    if args.engine == "ray":
        num_rows = len(dataset)
        if accelerator.is_main_process:
            _predict_with_ray(dataset, args)
    else:
        num_rows = _predict_share(accelerator, model, processor, dataset, args, backbone)
    accelerator.wait_for_everyone()
    return _finish(folder, num_rows, args) if accelerator.is_main_process else {}


def _predict_share(
    accelerator: Accelerator,
    model: MagnetoForTagSummarization,
    processor: MagnetoProcessor,
    dataset: Dataset | IterableDataset,
    args: PredictArguments,
    backbone: FrozenBackbone | QuantizedBackbone | None,
) -> int:
    """Make this process's share of the missing parts; returns the number of rows of the dataset."""
    model.to(accelerator.device)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    if args.streaming:
        rows, total = StreamedRows(dataset, processor, args), None
        parts = rows.parts()
    else:
        rows = rows_for_model(dataset, processor, args)
        parts = [(part, rows) for part in part_ranges(0, len(dataset), args.rows_per_part)]
        total = sum(len(part) for part, _ in parts[rank::num_ranks])
    hidden = not accelerator.is_local_main_process
    with tqdm(total=total, unit="image", desc="Predicting", disable=hidden) as progress:

        def is_missing(numbered: tuple[range, SeededDataset]) -> bool:
            part, part_rows = numbered
            if missing_parts([part], args):
                return True
            if args.streaming:  # otherwise the settings have told
                _check_rows_of_part(part, part_rows, args)
            progress.update(len(part))
            return False

        missing = filter(is_missing, islice(parts, rank, None, num_ranks))
        for count in predict_parts(model, processor, rows, missing, args, backbone):
            progress.update(count)
    return rows.num_rows if args.streaming else len(rows)


def _predict_with_ray(dataset: Dataset, args: PredictArguments) -> None:
    try:
        from .ray_prediction import predict_parts_with_ray
    except ImportError as error:
        raise UserError(f'--engine ray needs the extra "ray": pip install -e ".[ray]" ({error})') from None
    predict_parts_with_ray(dataset, args)


def parts_folder(output_file: str) -> Path:
    """`OUT.parquet.parts` for `OUT.parquet`."""
    return Path(output_file + ".parts")


def part_ranges(start: int, stop: int, rows_per_part: int) -> list[range]:
    """The rows of each part, as indices in the whole dataset."""
    return [range(first, min(first + rows_per_part, stop)) for first in range(start, stop, rows_per_part)]


def missing_parts(parts: Iterable[range], args: PredictArguments) -> list[range]:
    """Those of the parts that have not been made. A damaged one, which is said, is to be made again."""
    folder = parts_folder(args.output_file)
    return [part for part in parts if not _is_whole(_part_file(folder, part))]


def _is_whole(file: Path) -> bool:
    try:
        return FIGURES in (pq.read_schema(file).metadata or {})
    except FileNotFoundError:
        return False
    except (pa.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk or the network, not the file
            raise
        # Its index is at the end: after a crash of the machine it may be cut short.
        print(f"{file} is damaged, and is made again", flush=True)
        file.unlink(missing_ok=True)
        return False


def _part_file(folder: Path, part: range) -> Path:
    return folder / f"rows-{part.start:09d}-{part.stop:09d}.parquet"


def _check_rows_of_part(part: range, rows: SeededDataset, args: PredictArguments) -> None:
    """Raise `UserError` where a part that is there was made of other rows; arguments as of `_Part`."""
    file = _part_file(parts_folder(args.output_file), part)
    (figures,) = _read_figures([file])
    if figures["rows"] != _digest_rows([_without_photographs(rows, part)]):
        raise UserError(
            f"{file} was made of other rows than rows {part.start} to {part.stop - 1} of {args.dataset_name} are now; "
            f"give the dataset back its rows, or remove the folder {file.parent} to start afresh"
        )


def _without_photographs(rows: SeededDataset, part: range) -> pa.Table:
    first = rows.first_index
    return without_images(rows.dataset).with_format("arrow")[part.start - first : part.stop - first]


def _digest_rows(tables: Iterable[pa.Table]) -> str:
    digest = hashlib.sha256()
    for table in tables:
        # A copy, whose bytes tell of these rows alone: not of their neighbours, nor of how they lay in the files.
        for batch in table.take(np.arange(len(table))).to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def predict_parts(
    model: MagnetoForTagSummarization,
    processor: MagnetoProcessor,
    rows: SeededDataset | StreamedRows,
    parts: Iterable[tuple[range, SeededDataset]],
    args: PredictArguments,
    backbone: FrozenBackbone | QuantizedBackbone | None = None,
) -> Iterator[int]:
    """Make some parts, one after the other. Batches are of rows of one part with about as many tags.

    Args:
        model: In eval mode, on the device to use.
        processor: The model's processor.
        rows: As of `rows_for_model`, of the whole dataset, or a stream.
        parts: Of each part the indices of its rows in the whole dataset, and what they are found in: `rows`, or what
            `StreamedRows.parts` yields.
        args: The arguments of the prediction.
        backbone: As in `predict_batches`.

    Yields:
        After each batch how many rows more are done; a generator, so nothing happens unless it is read.

    Raises:
        DataError: A row is bad, or its photograph cannot be read, and bad rows are not to be skipped.
    """
    folder = parts_folder(args.output_file)
    streamed, num_rows = isinstance(rows, StreamedRows), None
    if not streamed:  # a stream has its parts one by one, and no length
        parts = list(parts)
        num_rows = sum(len(part) for part, _ in parts)
    outputs = [name for name in output_names(model.config) if name.endswith("logits")]
    begun: deque[_Part] = deque()  # the data loader asks for batches before it returns the ones before

    def plan_batches() -> Iterator[Sequence[int] | list[dict]]:
        for part, part_rows in parts:
            begun.append(_Part(part_rows, part, args))
            yield from map(part_rows.__getitems__, begun[-1].batches) if streamed else begun[-1].batches

    def write_complete_parts() -> int:
        """Returns how many of their rows came in no batch."""
        num_bad = 0
        while begun and not begun[0].num_open:
            part = begun.popleft()
            part.write(folder)
            num_bad += part.num_bad
        return num_bad

    predicted = predict_batches(
        model,
        processor,
        rows,
        args.batch_size,
        _count_workers(num_rows, model.device) if args.num_workers is None else args.num_workers,
        args.selection,
        args.threshold,
        args.top_k,
        bf16=args.bf16,
        batches=plan_batches(),
        backbone=backbone,
    )
    for batch in predicted:
        num_bad = write_complete_parts()  # without a good row there was no batch
        begun[0].add(batch, None if batch.labels is None else _select_by_each(batch, processor, outputs, args))
        num_bad += write_complete_parts()
        yield len(batch.rows) + len(batch.unreadable) + num_bad
    if num_bad := write_complete_parts():
        yield num_bad


def _count_workers(num_rows: int | None, device: torch.device) -> int:
    """This process's share of the cores, unless there is little to do, which is not known of a stream."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type != "cpu":
        share = min(share, MAX_WORKERS)
    num_workers = share if num_rows is None else min(share, num_rows // ROWS_PER_WORKER)
    return num_workers if num_workers > 1 else 0


def _select_by_each(
    batch: PredictedBatch, processor: MagnetoProcessor, outputs: Sequence[str], args: PredictArguments
) -> dict[str, torch.Tensor]:
    """What each of the outputs selects, (B, L)."""
    tags = [[tag for tag, _ in result["tags"]] for result in batch.results]
    return {
        name: processor.select(batch.outputs[name], tags, args.selection, args.threshold, args.top_k)
        for name in outputs
    }


class _Part:
    """A run of rows with its results.

    Args:
        rows: What the part is a run of.
        part: The indices of its rows in the whole dataset.
        args: The arguments of the prediction.
    """

    def __init__(self, rows: SeededDataset, part: range, args: PredictArguments):
        self.part = part
        self.args = args
        self.results: dict[int, dict] = {}  # by the index of the row, as it comes
        self.judged: dict[int, dict[str, np.ndarray]] = {}  # labels and choices of images with ground truth
        self.num_fooled = 0  # images of which a strange tag was selected
        self.skipped: list[tuple[int, str, str]] = []  # index, item_id and reason

        table = _without_photographs(rows, part)
        self.digest = _digest_rows([table])
        problems = find_problems(table, allow_unlabeled=True)["problem"].to_pylist()
        for index, problem, item_id in zip(part, problems, table["item_id"].to_pylist(), strict=True):
            if problem is not None:
                self._skip(index, item_id, problem)
        self.num_bad = len(self.skipped)
        num_tags = pc.list_value_length(table["tags"]).to_pylist()
        good = [index for index, problem in zip(part, problems, strict=True) if problem is None]
        good.sort(key=lambda index: num_tags[index - part.start])
        self.num_open = len(good)
        places = [index - rows.first_index for index in good]
        self.batches: list[list[int]] = []
        for place, index in zip(places, good, strict=True):  # the longest list of a batch comes last
            full = not self.batches or len(self.batches[-1]) == args.batch_size
            slots = 0 if full else (len(self.batches[-1]) + 1) * num_tags[index - part.start]
            if full or slots > MAX_TAGS_PER_IMAGE * args.batch_size:
                self.batches.append([])
            self.batches[-1].append(place)

    def add(self, batch: PredictedBatch, selected: dict[str, torch.Tensor] | None) -> None:
        """Keep the results of a batch, and what the metrics need of it, until the part is complete."""
        self.num_open -= len(batch.rows) + len(batch.unreadable)
        for row in batch.unreadable:
            self._skip(row["index"], row["item_id"], UNREADABLE)
        for row, result in zip(batch.rows, batch.results, strict=True):
            self.results[row["index"]] = {
                "item_id": row["item_id"],
                "tags": [tag for tag, _ in result["tags"]],
                "scores": [score for _, score in result["tags"]],
                "selected_tags": result["selected_tags"],
            }
            self.num_fooled += not set(row.get("outliers", ())).isdisjoint(result["selected_tags"])
        if selected is not None:
            real = batch.labels != IGNORED_LABEL  # (B, L), no tag of an image without ground truth
            for place in real.any(-1).nonzero().flatten().tolist():
                self.judged[batch.rows[place]["index"]] = {
                    name: tensor[place, real[place]].numpy().astype(np.int8)
                    for name, tensor in ({"labels": batch.labels} | selected).items()
                }

    def _skip(self, index: int, item_id: str | None, reason: str) -> None:
        if not self.args.skip_bad_rows:
            raise _bad_row(self.args, index, item_id, reason)
        self.skipped.append((index, item_id, reason))

    def write(self, folder: Path) -> None:
        """Write the complete part, under its name when it is whole."""
        judged = [self.judged[index] for index in sorted(self.judged)]
        metrics = None
        if judged:
            columns = {name: [image[name] for image in judged] for name in judged[0]}
            metrics = evaluate_selection(columns, columns.pop("labels"))
        figures = {
            "rows": self.digest,
            "num_fooled": self.num_fooled,
            "skipped": sorted(self.skipped),
            "metrics": metrics,
        }
        schema = SCHEMA.with_metadata({FIGURES: json.dumps(figures)})
        path = _part_file(folder, self.part)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        table = pa.Table.from_pylist([self.results[index] for index in sorted(self.results)], schema)
        with _naming(path):
            pq.write_table(table, partial)
            partial.replace(path)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """pyarrow does not say which file it was writing to when the disk was full."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from None


# --------------------------------------------------------------------------------------------------- parts to one file


def metrics_file(output_file: Path) -> Path:
    """`OUT.metrics.json` for `OUT.parquet`."""
    return output_file.with_suffix(".metrics.json")


def skipped_file(output_file: Path) -> Path:
    """`OUT.skipped.csv` for `OUT.parquet`: the index, item_id and reason of each row that was left out."""
    return output_file.with_suffix(".skipped.csv")


def read_skipped(output_file: Path) -> set[int]:
    """The indices of the rows that were left out of a prediction."""
    if not skipped_file(output_file).exists():
        return set()
    with skipped_file(output_file).open(encoding="utf-8", newline="") as file:
        return {int(row["index"]) for row in csv.DictReader(file)}


def describe_files(args: PredictArguments, processor: MagnetoProcessor) -> str:
    """What `predict_dataset` has written, for people."""
    output_file = Path(args.output_file)
    described = f"{pq.read_metadata(output_file).num_rows} images: {output_file}"
    vocabulary, num_tags, num_unknown = pa.array(processor.vocabulary), 0, 0
    with pq.ParquetFile(output_file) as file:
        for batch in file.iter_batches(columns=["tags"]):
            tags = batch["tags"].flatten()
            num_tags += len(tags)
            num_unknown += len(tags.filter(pc.invert(pc.is_in(tags, value_set=vocabulary))))
    if num_unknown:
        described += f"\n{num_unknown} of {num_tags} tags are unknown to the model, and were scored as [UNK]"
    if num_skipped := len(read_skipped(output_file)):
        described += f"\n{num_skipped} rows were left out: {skipped_file(output_file)}"
    return described


def _settings(
    model: MagnetoForTagSummarization,
    processor: MagnetoProcessor,
    dataset: Dataset | IterableDataset,
    args: PredictArguments,
) -> dict:
    """All that the parts depend on; of the rows everything but the photographs.

    Of a stream, which has not been read, nothing: each of its parts knows its own rows.
    """
    model_digest = hashlib.sha256(model.config.to_json_string().encode())
    model_digest.update(json.dumps([processor.to_json_string(), processor.vocabulary]).encode())
    for name, tensor in model.state_dict().items():
        model_digest.update(name.encode())
        model_digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    tables = []
    if isinstance(dataset, Dataset):
        tables = without_images(dataset).with_format("arrow").iter(batch_size=10_000)
    names = ("dataset_name", "dataset_config_name", "split", "selection", "threshold", "top_k", "inject_outliers")
    return {
        "model": model_digest.hexdigest(),
        "rows": _digest_rows(tables),
        **{name: getattr(args, name) for name in (*names, "seed", "bf16", "int8", "rows_per_part")},
    }


def _open_folder(folder: Path, settings: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if any(folder.glob("*.parquet")):
        found = _read_settings(file)
        if different := [name for name, value in settings.items() if found.get(name) != value]:
            raise UserError(
                f"{folder} holds parts of a prediction that was not finished, with another {', '.join(different)}; "
                "finish that one with its settings, or remove the folder to start afresh"
            )
    with whole_file(file) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _read_settings(file: Path) -> dict:
    """None where there are none, or no whole ones."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _finish(folder: Path, num_rows: int, args: PredictArguments) -> dict[str, float]:
    """Put the parts together, and their figures; one part after the other, so that little memory is needed."""
    output_file = Path(args.output_file)
    parts = part_ranges(0, num_rows, args.rows_per_part)
    if missing := missing_parts(parts, args):
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(parts)} parts, such as {_part_file(folder, missing[0]).name}; "
            f"expected a folder that all processes share, and no other prediction that writes {output_file}"
        )
    files = [_part_file(folder, part) for part in parts]
    num_skipped = _write_skipped(folder / "skipped.csv", files, args)
    if 0 < num_rows == num_skipped:
        shutil.rmtree(folder)
        raise DataError(f"{args.dataset_name}: all {num_rows} rows are bad")
    with _naming(output_file), pq.ParquetWriter(folder / "joined", SCHEMA) as writer:
        for start in range(0, len(files), PARTS_PER_ROW_GROUP):
            tables = [_read_part(file) for file in files[start : start + PARTS_PER_ROW_GROUP]]
            writer.write_table(pa.concat_tables(tables))
    metrics = combine_metrics(figures["metrics"] for figures in _read_figures(files) if figures["metrics"])
    if args.inject_outliers is not None and num_rows:
        num_fooled = sum(figures["num_fooled"] for figures in _read_figures(files))
        metrics["outlier_percent"] = 100 * num_fooled / (num_rows - num_skipped)

    # What is left of an earlier prediction goes.
    if num_skipped:
        (folder / "skipped.csv").replace(skipped_file(output_file))
    else:
        skipped_file(output_file).unlink(missing_ok=True)
    if metrics:
        write_metrics(metrics_file(output_file), metrics)
    else:
        metrics_file(output_file).unlink(missing_ok=True)
    (folder / "joined").replace(output_file)
    # Before the settings, without which nobody would know what they are. Among them may be a last part, not in the
    # output, of a stream that has grown or shrunk since.
    for file in folder.glob("*.parquet"):
        file.unlink()
    shutil.rmtree(folder)
    return metrics


def _read_part(file: Path) -> pa.Table:
    try:
        return pq.ParquetFile(file).read()
    except (pa.ArrowInvalid, OSError) as error:  # its index is whole, or it would have been made again
        reason = describe_cause(error)
        raise UserError(f"{file} cannot be read: {reason}; the same command makes it again if it is removed") from None


def _write_skipped(path: Path, files: Sequence[Path], args: PredictArguments) -> int:
    """List the rows that were left out; returns how many they are."""
    num_skipped = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "item_id", "reason"])
        for figures in _read_figures(files):
            for row in figures["skipped"]:
                if not args.skip_bad_rows:  # an earlier start of the same prediction did
                    raise _bad_row(args, *row)
                writer.writerow(row)
                num_skipped += 1
    return num_skipped


def _read_figures(files: Iterable[Path]) -> Iterator[dict]:
    for file in files:
        yield json.loads(pq.read_schema(file).metadata[FIGURES])


def _bad_row(args: PredictArguments, index: int, item_id: str | None, reason: str) -> DataError:
    return DataError(
        f"{args.dataset_name}: row {index} (item_id {item_id}) has {reason}; --skip_bad_rows true leaves such rows out"
    )
