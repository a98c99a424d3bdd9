"""Rows from a stream, for training: read anew in every epoch, from Parquet files here or on the Hub, without a copy.

A stream has no index, so the data loader hands its workers rows in place of indices: each process reads the files and
shuffles in one place, undecoded, and its workers decode and augment. The order, and with it every batch, is then the
same for any number of workers and processes, and no row is lost or doubled on the way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset

from modeling_magneto.loss_magneto import IGNORED_LABEL

from .arguments import DataArguments, MagnetoTrainingArguments, UsageError
from .augmentation import example_seed
from .collation import TagCollator
from .photographs import UNREADABLE, undecoded
from .tag_data import (
    DataError,
    RowReport,
    check_columns,
    collect_tags,
    find_problems,
    find_split,
    judge_rows,
    load_split,
    load_tag_dataset,
    read_stream,
)

LABEL_COLUMNS = ["item_id", "tags", "important_tags"]


def check_streaming(data_args: DataArguments, training_args: MagnetoTrainingArguments) -> None:
    """Raise `UsageError` where a run is to stream rows and to do what needs to look them up."""
    if data_args.streaming and training_args.cached_views:
        raise UsageError(
            f"cached_views is {training_args.cached_views}, expected 0 with --streaming true: cached features are "
            "looked up by row, and a stream has no rows to look up"
        )


@dataclass
class StreamedSplit:
    """A training split that stays in its files.

    Args:
        name: The dataset and split, for messages.
        rows: The good rows, with undecoded photographs where the model looks at them.
        num_rows: How many they are.
        vocabulary: All their tags, as of `build_vocabulary`.
        skip_bad_rows: Whether an unreadable photograph, which shows only when it is read, may be left out.
    """

    name: str
    rows: IterableDataset
    num_rows: int
    vocabulary: list[str]
    skip_bad_rows: bool


def load_streamed_splits(data_args: DataArguments, use_images: bool) -> tuple[StreamedSplit, dict[str, Dataset]]:
    """The training split as a stream, and in memory the checked rows of `validation` and, where there is one, `test`.

    The tags of the training split are read and checked once, here; its photographs are not.

    Raises:
        DataError: A split or column is missing, a row is bad, or the dataset does not consist of Parquet files, or
            they cannot be read.
    """

    def load(columns: list[str] | None = None) -> dict[str, IterableDataset]:
        return load_tag_dataset(data_args.dataset_name, data_args.dataset_config_name, streaming=True, columns=columns)

    columns = [*LABEL_COLUMNS, *(["image"] if use_images else [])]
    name = f"{data_args.dataset_name}, {data_args.train_split}"
    check_columns(find_split(load(), data_args.train_split, data_args), name, columns)

    report = RowReport(name, 0)
    vocabulary = collect_tags(_checked_tables(load(LABEL_COLUMNS)[data_args.train_split], report))
    judge_rows(report, data_args.skip_bad_rows)
    streams = {split: undecoded(rows) for split, rows in load(columns).items()}
    rows = streams[data_args.train_split]
    if report.bad_rows:
        rows = rows.with_format("arrow").filter(_are_good, batched=True, batch_size=100).with_format(None)
    num_rows = report.num_rows - len(report.bad_rows)
    train = StreamedSplit(name, rows, num_rows, vocabulary, data_args.skip_bad_rows)

    wanted = {"validation": data_args.validation_split, "test": data_args.test_split}
    if data_args.test_split not in streams:
        del wanted["test"]
    evaluated = {}
    for role, split in wanted.items():
        kept = {split: _in_memory(find_split(streams, split, data_args), f"{data_args.dataset_name}, {split}")}
        evaluated[role] = load_split(kept, split, data_args, use_images, use_labels=True)
    return train, evaluated


def _checked_tables(rows: IterableDataset, report: RowReport) -> Iterator[pa.Table]:
    """The good rows, a table at a time; the report grows with them."""
    for table in read_stream(rows.with_format("arrow").iter(batch_size=10_000), report.name):
        checked = find_problems(table, allow_unlabeled=False)
        report.add(report.num_rows, checked)
        report.num_rows += len(table)
        yield table.filter(pc.is_null(checked["problem"]))


def _are_good(rows: pa.Table) -> pa.ChunkedArray:
    return pc.is_null(find_problems(rows.select(LABEL_COLUMNS), allow_unlabeled=False)["problem"])


def _in_memory(rows: IterableDataset, name: str) -> Dataset:
    """All rows, their photographs as they lie in the files; decoded when they are looked at."""
    tables = list(read_stream(rows.with_format("arrow").iter(batch_size=1000), name))
    info = datasets.DatasetInfo(features=rows.features)
    kept = Dataset(pa.concat_tables(tables), info=info) if tables else Dataset.from_dict({}, rows.features)
    return kept.cast_column("image", datasets.Image()) if "image" in kept.features else kept


class StreamedDataset(torch.utils.data.Dataset):
    """Training rows for a data loader whose batches come from `StreamedBatches`: what it asks for are the rows.

    Args:
        split: Of `load_streamed_splits`.
        seed: The run's seed; decides the order and, with the place in it, each row's random changes.
        buffer_size: Rows among which the order is drawn, besides the order of the files.
    """

    def __init__(self, split: StreamedSplit, seed: int, buffer_size: int):
        self.split = split
        self.seed = seed
        self.epoch = 0
        self._rows = split.rows.shuffle(seed, buffer_size=buffer_size)
        self._left_out: set[str] = set()

    def __len__(self) -> int:
        return self.split.num_rows

    def __getitems__(self, rows: list[dict]) -> list[dict]:
        return rows

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        """The rows in the order of this epoch, each with its `index` in it and its `seed`.

        Raises:
            DataError: As `read_stream`.
        """
        for index, row in enumerate(read_stream(self._rows, self.split.name)):
            yield {**row, "index": index, "seed": example_seed(self.seed, self.epoch, index)}

    def leave_out(self, item_ids: list[str]) -> None:
        """Say, once for each, that photographs cannot be read; raises `DataError` where they may not be left out."""
        for item_id in item_ids:
            message = f"{self.split.name}: item_id {item_id} has {UNREADABLE}"
            if not self.split.skip_bad_rows:
                raise DataError(f"{message}; --skip_bad_rows true leaves such rows out")
            if item_id not in self._left_out:
                self._left_out.add(item_id)
                print(f"{message}; left out ({len(self._left_out)} so far)", flush=True)


class StreamedBatches:
    """Batches of rows: every row once an epoch in one of the processes, and equally many batches in each.

    All processes read the whole stream, in the same order, and keep what is theirs. Together they take the steps that
    one process would take with a batch as large as all of theirs.

    Args:
        dataset: The rows.
        batch_size: Rows a step in each process.
        num_processes, process_index: Which share of the rows is wanted.

    Raises:
        DataError: There are fewer rows than processes, or, in an epoch, not as many as when they were checked.
    """

    def __init__(self, dataset: StreamedDataset, batch_size: int, num_processes: int = 1, process_index: int = 0):
        if len(dataset) < num_processes:
            raise DataError(
                f"{dataset.split.name} has {len(dataset)} rows, expected one for each of {num_processes} processes"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.process_index = process_index

    def _sizes(self) -> list[int]:
        """Rows of all processes in each step."""
        steps, rest = divmod(len(self.dataset), self.batch_size * self.num_processes)
        sizes = [self.batch_size * self.num_processes] * steps
        if rest >= self.num_processes or not sizes:
            sizes.append(rest)
        else:  # too few for a step of their own, in which every process needs a row
            sizes[-1] += rest
        return sizes

    def __len__(self) -> int:
        return len(self._sizes())

    def __iter__(self) -> Iterator[list[dict]]:
        rows, num_read = iter(self.dataset), 0
        for size in self._sizes():
            batch = list(islice(rows, size))
            num_read += len(batch)
            if len(batch) < size:
                raise self._files_have_changed(str(num_read))
            yield batch[self.process_index :: self.num_processes]
        if next(rows, None) is not None:
            raise self._files_have_changed(f"more than {num_read}")

    def _files_have_changed(self, found: str) -> DataError:
        name, expected = self.dataset.split.name, len(self.dataset)
        return DataError(f"{name} has {found} good rows, expected {expected} as at the start: its files have changed")


class StreamedCollator:
    """Undecoded rows to a batch of tensors, in the worker. Rows whose photograph cannot be read are not in it.

    Their ids are under `unreadable`, for `StreamedDataset.leave_out`. Where all are unreadable, the batch is one plain
    picture without a label that counts: the step is taken, since other processes wait for it, with a gradient of zero.

    Args:
        collate: Undecoded rows to tensors, augmented.
    """

    def __init__(self, collate: TagCollator):
        self.collate = collate

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor | list[str]]:
        if not self.collate.processor.use_images:
            return self.collate(rows)
        readable, unreadable = self.collate.read(rows)
        if not readable:
            size = self.collate.processor.image_processor.crop_size["height"]
            readable = [{**rows[0], "pixel_values": torch.zeros(3, size, size)}]
        batch = self.collate(readable)
        if len(unreadable) == len(rows):
            batch["labels"].fill_(IGNORED_LABEL)
        return {**batch, "unreadable": [row["item_id"] for row in unreadable]} if unreadable else batch
