"""Datasets of photographs and tags: loading, checking, vocabulary.

Rows are `{item_id, image, tags, important_tags}`. Whatever `load_dataset` takes becomes such rows here, and every row
is checked once.
"""

import ast
import csv
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)
from huggingface_hub import metadata_load

from modeling_magneto.processing_magneto import normalize_tag

from .arguments import DataArguments, PredictArguments, PretrainingDataArguments, RowArguments, UserError
from .photographs import find_photograph_problem, undecoded

TABLE_BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
COLUMNS = {
    "item_id": datasets.Value("string"),
    "tags": datasets.List(datasets.Value("string")),
    "important_tags": datasets.List(datasets.Value("string")),
    "image": datasets.Image(),
}
# `datasets` knows our functions by their names and would go on with what it has kept of other code: a change of how
# cells are parsed or rows are checked, be it in photographs.py or in normalize_tag, makes it 2.
FORMAT = 2
PREDICTION_COLUMNS = ["item_id", "tags", "scores", "selected_tags"]  # of what predict.py writes
ADJACENT_TEXTS = re.compile(r"""['"]\s+['"]""")  # numpy's ['sky' 'sea'], to Python the one text "skysea"
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which JSON can spell and nothing can write again
MAX_REPORTED_ITEMS = 5
ROWS_PER_CHECKING_PROCESS = 50_000
Rows = TypeVar("Rows")


class DataError(UserError):
    """A dataset that cannot be used; the message names what is wrong in one line."""


# ------------------------------------------------------------------------------------------------------------- loading


def load_tag_dataset(
    dataset_name: str,
    dataset_config_name: str | None = None,
    streaming: bool = False,
    columns: Sequence[str] | None = None,
    use_labels: bool = True,
) -> DatasetDict | IterableDatasetDict:
    """Load a dataset and bring its columns into the project's form.

    Args:
        dataset_name: A Hub id, or a folder of Parquet, CSV or JSON files. In a table, `image` may be a path relative
            to the table, and `tags` a list or a text with commas.
        dataset_config_name: A configuration of the dataset, such as `unlabeled`.
        streaming: Read rows from the files, or from the Hub, each time that they are needed, in place of a copy on the
            disk; for Parquet files.
        columns: Read these alone from Parquet files; the rest of the files is not touched.
        use_labels: Whether `important_tags` is wanted; otherwise it is left out, whatever it holds.

    Returns:
        All splits, with `item_id` as text, `tags` and `important_tags` as lists of text, and `image` as photographs;
        nothing is decoded yet.

    Raises:
        DataError: The dataset cannot be found or read, or a column has an unexpected type.
    """
    folder = Path(dataset_name)
    state_of = functools.cache(_state_of_files)  # one look at a folder, for all of its tables

    def standard(part: Dataset | IterableDataset, split: str, parent: Path | None) -> Dataset | IterableDataset:
        return _with_standard_columns(part, f"{dataset_name}, {split}", parent, use_labels, state_of)

    try:
        is_folder, has_configs = folder.is_dir(), _has_configs(folder / "README.md")
        if dataset_config_name == "default":  # the name that `datasets` gives to the only one
            dataset_config_name = None
        if is_folder and not has_configs and dataset_config_name is not None:
            found = f"the configuration is {dataset_config_name!r}"
            raise DataError(f"{dataset_name}: {found}, expected none where no README.md lists `configs`")
        # In its one spelling: `datasets` knows what it has read by its path.
        path = str(folder.resolve()) if is_folder else dataset_name
        tables = {}
        if is_folder:
            tables = _named_tables(path, dataset_config_name) if has_configs else _find_tables(folder)
        if not tables:
            options = {} if columns is None else {"columns": list(columns)}
            splits = load_dataset(path, dataset_config_name, streaming=streaming, **options)
            parent = Path(path) if is_folder else None
            return type(splits)({name: standard(split, name, parent) for name, split in splits.items()})
        parts: dict[str, list[Dataset | IterableDataset]] = {}
        for (split, parent), files in tables.items():  # an image path is relative to its own table
            if has_configs:
                part = load_dataset(path, dataset_config_name, data_files=files, split="train", streaming=streaming)
            else:
                part = _load_tables(files, streaming, columns)
            parts.setdefault(split, []).append(standard(part, split, parent.resolve()))
        joined = {split: concatenate_datasets(found) for split, found in parts.items()}
        return IterableDatasetDict(joined) if streaming else DatasetDict(joined)
    except DataError:
        raise
    except Exception as error:  # datasets raises errors of many libraries; the user wants to know which dataset
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from error
        raise DataError(f"the dataset {dataset_name!r} cannot be loaded: {describe_cause(error)}") from error


def describe_cause(error: Exception) -> str:
    """An error of `datasets` in one line: "An error occurred" says nothing, what it came from does."""
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        return f"found other text than UTF-8 in a table ({cause})"
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def read_stream(rows: Iterable[Rows], name: str) -> Iterator[Rows]:
    """What a stream yields, rows or tables.

    Args:
        rows: The stream; its photographs undecoded.
        name: The dataset, for messages.

    Raises:
        DataError: It cannot be read: a file is damaged or gone, or the network is.
    """
    try:
        yield from rows
    except UserError:
        raise
    except Exception as error:  # of many libraries, as in `load_tag_dataset`, and none knows the dataset
        raise DataError(f"{name}: the rows cannot be read: {describe_cause(error)}") from error


def _load_tables(paths: list[Path], streaming: bool, columns: Sequence[str] | None) -> Dataset | IterableDataset:
    builder, options = TABLE_BUILDERS[paths[0].suffix.lower()], {}
    if columns is not None:
        options["columns"] = list(columns)
    if builder == "csv":
        # Every cell as it is written: an id keeps its zeros, and a tag may be called "null".
        header = _read_header(paths)
        options = {
            "features": datasets.Features({name: datasets.Value("string") for name in header}),
            "keep_default_na": False,
        }
    if builder == "parquet":
        paths = _without_empty_files(paths)
    files = [str(path.parent.resolve() / path.name) for path in paths]  # in one spelling, as the folder
    return load_dataset(builder, data_files=files, split="train", streaming=streaming, **options)


def _without_empty_files(paths: list[Path]) -> list[Path]:
    """The Parquet files that have rows. `datasets` stumbles at others: its batches are as large as the first group."""
    full, num_groups = [], 0
    for path in paths:
        try:
            found = pq.read_metadata(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} cannot be read: {describe_cause(error)}") from None
        num_groups += found.num_row_groups
        if found.num_rows:
            full.append(path)
    if num_groups and not full:
        raise DataError(f"{paths[0]}: found no rows, expected at least one")
    return full or paths


def _read_header(paths: list[Path]) -> list[str]:
    """The column names of the first CSV file.

    In all of them the first row is looked at: pandas takes surplus cells, as of tags without quotation marks, for an
    index, and moves the others to wrong columns. In later rows it calls them an error.
    """
    headers, num_rows = [], 0
    for path in paths:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            headers.append(next(rows, []))
            if len(headers[-1]) == 1 and ";" in headers[-1][0]:
                raise DataError(f"{path}: found the columns {headers[-1][0]!r}, expected commas between them")
            row = next(filter(None, rows), [])
            num_rows += bool(row)
            if len(row) > len(headers[-1]):
                raise DataError(
                    f"{path}, line {rows.line_num}: found {len(row)} cells, expected {len(headers[-1])}; "
                    "a list of tags needs quotation marks"
                )
    if not num_rows:  # of which `datasets` says that an instruction corresponds to no data
        raise DataError(f"{paths[0]}: found no rows, expected at least one")
    return headers[0]


def _named_tables(folder: str, config_name: str | None) -> dict[tuple[str, Path], list[str]]:
    """The CSV or JSON tables that a README's `configs` name, by split and parent folder; none where they name others.

    A file is given as `datasets` does: as a text, which may be an address.
    """
    builder = load_dataset_builder(folder, config_name)
    tables: dict[tuple[str, Path], list[str]] = {}
    if builder.name in ("csv", "json"):
        for split, files in builder.config.data_files.items():
            for file in files:
                tables.setdefault((str(split), Path(file).parent), []).append(file)
    return tables


def _find_tables(folder: Path) -> dict[tuple[str, Path], list[Path]]:
    """The tables below a folder by split and parent folder; none where `load_dataset` knows what the dataset is.

    It knows from the `metadata` tables of its image folders; but any folder with more photographs than tables it would
    take for an image folder.
    """
    tables = sorted(path for path in map(Path, _files_below(folder)) if path.suffix.lower() in TABLE_BUILDERS)
    tables = [path for path in tables if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    tables = [path for path in tables if not _is_prediction(path)]
    if any(map(_describes_image_folder, tables)):
        return {}
    kinds = sorted({TABLE_BUILDERS[path.suffix.lower()] for path in tables})
    if len(kinds) > 1:
        raise DataError(f"{folder} holds tables of several kinds ({', '.join(kinds)}), expected one kind")
    splits = {path: _split_of(path, folder) for path in tables}
    unnamed = [path for path, split in splits.items() if split is None]
    if unnamed and len(unnamed) < len(tables):
        expected = f"one of {', '.join(SPLIT_WORDS)}, as in the other tables' names"
        raise DataError(f"{unnamed[0]}: found no split in the table's name, expected {expected}")
    found: dict[tuple[str, Path], list[Path]] = {}
    for split in dict.fromkeys(SPLIT_WORDS.values()):
        for path in tables:
            if (splits[path] or "train") == split:
                found.setdefault((split, path.parent), []).append(path)
    return found


def _is_prediction(path: Path) -> bool:
    """Whether predict.py has written it, which may lie beside the rows."""
    if path.name.endswith((".metrics.json", ".skipped.csv")) or path.parent.suffix == ".parts":
        return True
    try:
        return path.suffix.lower() == ".parquet" and pq.read_schema(path).names == PREDICTION_COLUMNS
    except (pa.ArrowInvalid, OSError):  # damaged; whoever loads it will say so
        return False


def _files_below(folder: str | os.PathLike) -> Iterator[os.DirEntry]:
    """Every file below a folder, one at a time: there may be millions of photographs."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files_below(entry)
            elif entry.is_file():
                yield entry


def _split_of(path: Path, folder: Path) -> str | None:
    """What a table's name, or else a folder's, says: `data/test-00001.csv` is of the split test; none if nothing."""
    words = re.split(r"[^a-z]+", path.relative_to(folder).with_suffix("").as_posix().lower())
    return next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), None)


def _has_configs(card: Path) -> bool:
    return card.is_file() and "configs" in (metadata_load(card) or {})


def _describes_image_folder(path: Path) -> bool:
    if path.stem != "metadata":
        return False
    with path.open("rb") as file:
        return b"file_name" in file.readline()


def _with_standard_columns(
    dataset: Dataset | IterableDataset,
    where: str,
    folder: Path | None,
    use_labels: bool,
    state_of: Callable[[Path], str],
) -> Dataset | IterableDataset:
    if not use_labels and "important_tags" in (dataset.column_names or []):
        dataset = dataset.remove_columns("important_tags")
    features = dict(dataset.features or {})
    for name in (name for name in COLUMNS if name in features):
        # What `datasets` makes of a JSON column of several types: a cast would write texts as JSON spells them.
        if isinstance(getattr(features[name], "feature", features[name]), datasets.Json):
            expected = {"item_id": "text alone", "image": "photographs"}.get(name, "lists of text")
            raise DataError(f"{where}: column {name!r} holds {_first_odd_value(dataset, name)}, expected {expected}")
    changed = [name for name in COLUMNS if name in features and features[name] != COLUMNS[name]]
    # "sky, water" instead of a list, a path instead of a photograph
    texts = [name for name in changed if name != "item_id" and _is_text(features[name])]
    if folder is None and "image" in texts:
        texts.remove("image")
    # Paths that are parsed are checked then, and an image folder names the files that it holds.
    from_stranger = dataset.info.builder_name in TABLE_BUILDERS.values() and "image" in features.keys() - texts
    if isinstance(dataset, IterableDataset):
        if texts or not features:
            raise DataError(f"{where}: streaming needs lists of tags and photographs as Parquet files hold them")
        for name in changed:
            dataset = dataset.cast_column(name, COLUMNS[name])
        if from_stranger:
            check = functools.partial(_with_own_photographs, where=where, folder=folder)
            dataset = dataset.with_format("arrow").map(check, batched=True, batch_size=100, features=dataset.features)
        return dataset.with_format(None)
    if changed and len(dataset):  # `map` does nothing to no rows
        # Each column by itself: `map` and `cast_column` copy all that they are given, photographs too.
        columns = {name: dataset.select_columns(name) for name in dataset.column_names}
        for name in changed:
            if name in texts:
                columns[name] = _parse_column(columns[name], name, where, folder, state_of)
                continue
            try:
                columns[name] = columns[name].cast_column(name, COLUMNS[name])
            except Exception as error:
                found = f"column {name!r} is {features[name]}"
                raise DataError(f"{where}: {found}, expected {COLUMNS[name]}") from error
        dataset = concatenate_datasets(list(columns.values()), axis=1)
    if from_stranger:
        for rows in undecoded(dataset.select_columns("image")).with_format("arrow").iter(batch_size=10_000):
            _with_own_photographs(rows, where, folder)
    return dataset


def _first_odd_value(dataset: Dataset | IterableDataset, name: str) -> str:
    for index, row in enumerate(dataset.select_columns(name)):
        value = row[name]
        if name in ("item_id", "image"):
            is_good = isinstance(value, (str, dict))
        else:
            is_good = isinstance(value, list) and all(isinstance(tag, str) for tag in value)
        if value is not None and not is_good:
            return f"{repr(value)[:80]} in row {index}"
    return "values of several types"


def _parse_column(
    column: Dataset, name: str, where: str, folder: Path | None, state_of: Callable[[Path], str]
) -> Dataset:
    """A column of texts alone, of which a dataset holds a list of tags or a photograph."""
    if name == "image":
        parse, options = _resolve_images, {"folder": str(folder), "state": state_of(folder)}
    else:
        parse, options = _parse_tags, {"column": name}
    return column.map(
        parse,
        batched=True,
        fn_kwargs={**options, "version": FORMAT},
        features=datasets.Features({name: COLUMNS[name]}),
        desc=f"Reading {where}",
    )


def _with_own_photographs(rows: pa.Table, where: str, folder: Path | None) -> pa.Table:
    """The same rows; raises `DataError` where one has a path that leaves its folder in place of a photograph.

    A dataset may come from a stranger, and what it names may end up in a report.
    """
    content, paths = (pc.struct_field(rows["image"], name) for name in ("bytes", "path"))
    for path in paths.filter(pc.and_(pc.is_null(content), pc.is_valid(paths))).to_pylist():
        if folder is None and path.startswith(("http://", "https://")):
            continue
        resolved = Path(os.path.realpath(path.replace("\0", "")))
        if folder is None or not resolved.is_relative_to(os.path.realpath(folder)):
            expected = "its bytes" if folder is None else f"its bytes, or a path inside {folder}"
            raise DataError(f"{where}: a photograph is given as {path!r}, expected {expected}")
    return rows


def _is_text(feature) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _state_of_files(folder: Path) -> str:
    """A digest that changes with any file below the folder."""
    total = 0  # a sum, which is the same in whatever order the files come
    for file in _files_below(folder):
        status = file.stat()
        state = os.fsencode(file.path) + f" {status.st_size} {status.st_mtime_ns}".encode()
        total += int.from_bytes(hashlib.sha256(state).digest())
    return f"{total:x}"


def _parse_tags(rows: dict, column: str, version: int) -> dict:
    """`version` is for `datasets` alone, as in `_resolve_images`."""
    return {column: [_split_tags(text, column) for text in rows[column]]}


def _resolve_images(rows: dict, folder: str, state: str, version: int) -> dict:
    """`state` is for `datasets` alone: what it has cached of photographs, their check too, ends when they change."""
    return {"image": [_resolve_image(path, folder) for path in rows["image"]]}


def _split_tags(text: str | None, column: str) -> list[str]:
    """`sky, sea`, `["sky", "sea"]` or `['sky', 'sea']`."""
    text = (text or "").strip()
    # A list may be cut short. "[sic] sign, red" is none: its bracket is closed within a tag.
    if not text.startswith("[") or ("]" in text.partition(",")[0] and not text.endswith("]")):
        return [tag.strip() for tag in text.split(",")] if text else []
    tags = _written_list(text)
    if not isinstance(tags, list) or not all(isinstance(tag, str) and not SURROGATE.search(tag) for tag in tags):
        raise DataError(f"{column} holds {text[:80]!r}, expected a list of texts, or tags separated by commas")
    return tags


def _written_list(text: str) -> Any:
    """What a cell spells as JSON does, or else as Python does; none where it is neither."""
    try:
        return json.loads(text)
    except ValueError:
        if ADJACENT_TEXTS.search(text):
            return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


def _resolve_image(path: str | None, folder: str) -> str | None:
    """A photograph's path, relative to the table that names it and inside its folder."""
    try:
        resolved = os.path.realpath(os.path.join(folder, path or ""))
    except ValueError:  # a null byte
        return None
    if not Path(resolved).is_relative_to(os.path.realpath(folder)):
        raise DataError(f"image path {path!r} leaves {folder}, expected a path inside it")
    return resolved if os.path.isfile(resolved) else None  # none is reported with its item id by `check_rows`


# ------------------------------------------------------------------------------------------------------------ checking


@dataclass
class RowReport:
    """What `check_rows` found: for each problem the ids of the bad rows, and which rows are good.

    Args:
        name: The dataset and split, for messages.
        num_rows: Rows checked.
        problems: Problem -> item ids, in the order of the rows.
        bad_rows: Indices of the rows with a problem.
    """

    name: str
    num_rows: int
    problems: dict[str, list[str]] = field(default_factory=dict)
    bad_rows: list[int] = field(default_factory=list)

    def add(self, first: int, checked: pa.Table) -> None:
        """Take in what `find_problems` says of the rows from index `first` on."""
        bad = np.flatnonzero(pc.is_valid(checked["problem"]).to_numpy())
        for row in checked.take(bad).to_pylist():
            self.problems.setdefault(row["problem"], []).append(str(row["item_id"]))
        self.bad_rows += (first + bad).tolist()

    @property
    def good_rows(self) -> np.ndarray:
        """Indices of the rows without a problem."""
        return np.delete(np.arange(self.num_rows), self.bad_rows)

    def __str__(self) -> str:
        parts = []
        for problem, items in self.problems.items():
            shown = ", ".join(items[:MAX_REPORTED_ITEMS]) + (", ..." if len(items) > MAX_REPORTED_ITEMS else "")
            parts.append(f"{len(items)} with {problem} (item_id {shown})")
        return f"{self.name}: {len(self.bad_rows)} of {self.num_rows} rows are bad: {'; '.join(parts)}"


def check_columns(dataset: Dataset | IterableDataset, name: str, columns: Sequence[str]) -> None:
    """Raise `DataError` for the first of `columns` that the dataset lacks."""
    for column in columns:
        if column not in dataset.column_names:
            raise DataError(f"{name}: column {column!r} is missing, found {', '.join(dataset.column_names)}")


def check_rows(
    dataset: Dataset, name: str, use_images: bool, use_labels: bool, allow_unlabeled: bool = False
) -> RowReport:
    """Check every row once; `datasets` keeps the result, so a second run over the same data does not check again.

    Args:
        dataset: Rows as of `load_tag_dataset`.
        name: Dataset and split, for messages.
        use_images: Decode every photograph.
        use_labels: Check that `important_tags` is a non-empty subset of `tags`.
        allow_unlabeled: It may be empty, where the ground truth is unknown.

    Raises:
        DataError: A column is missing.
    """
    columns = ["item_id", "tags", *(["important_tags"] if use_labels else []), *(["image"] if use_images else [])]
    check_columns(dataset, name, columns)
    checked = undecoded(dataset.select_columns(columns))
    large = len(dataset) > ROWS_PER_CHECKING_PROCESS  # less is checked before another process has started
    checked = checked.with_format("arrow").map(
        find_problems,
        batched=True,
        fn_kwargs={"allow_unlabeled": allow_unlabeled, "version": f"{FORMAT}, Pillow {PIL.__version__}"},
        remove_columns=columns,
        features=datasets.Features({"problem": datasets.Value("string"), "item_id": datasets.Value("string")}),
        num_proc=min(os.cpu_count() or 1, 1 + len(dataset) // ROWS_PER_CHECKING_PROCESS) if large else None,
        desc=f"Checking {name}",
    )
    report, start = RowReport(name, len(dataset)), 0
    for rows in checked.with_format("arrow").iter(batch_size=10_000):
        report.add(start, rows)
        start += len(rows)
    return report


def find_problems(rows: pa.Table, allow_unlabeled: bool, version: str | None = None) -> pa.Table:
    """Check some rows. Works on Arrow columns: 30 million tags take seconds.

    Args:
        rows: `item_id` and `tags`; `important_tags` and undecoded photographs, `image`, where they are to be checked.
        allow_unlabeled: `important_tags` may be empty.
        version: Of the check; for `datasets` alone, which keeps its result.

    Returns:
        For each row its first `problem`, or null, and its `item_id`.
    """
    problems = np.full(len(rows), None, dtype=object)

    def report(bad: np.ndarray, problem: str) -> None:
        problems[bad & (problems == None)] = problem  # noqa: E711 (elementwise)

    if "image" in rows.column_names:
        found = np.array([find_photograph_problem(image.as_py()) for image in rows["image"]], dtype=object)
        for problem in sorted(set(found) - {None}):
            report(found == problem, problem)
    tag_rows, tag_codes, names, num_tags = _encode(rows["tags"], {})
    report(num_tags == 0, "no tags")
    report(np.isin(np.arange(len(rows)), tag_rows[tag_codes == -1]), "an empty tag")
    if "important_tags" in rows.column_names:
        important_rows, important_codes, names, num_important = _encode(rows["important_tags"], names)
        if not allow_unlabeled:
            report(num_important == 0, "no important_tags")
        base = len(names) + 1  # one more, so that the -1 of an empty tag is not the last code of the row before
        owned = np.isin(important_rows * base + important_codes, tag_rows * base + tag_codes)
        report(np.isin(np.arange(len(rows)), important_rows[~owned]), "important_tags that are not among tags")
    report(pc.equal(pc.fill_null(rows["item_id"], ""), "").to_numpy(), "no item_id")
    return pa.table({"problem": pa.array(problems, pa.string()), "item_id": rows["item_id"]})


def _encode(
    column: pa.ChunkedArray, names: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, dict[str, int], np.ndarray]:
    """Tags of a list column as (row of each tag, code of its normalised form or -1 if empty, codes, tags per row)."""
    lists = column.combine_chunks()
    encoded = pc.list_flatten(lists).dictionary_encode()
    codes = np.full(len(encoded.dictionary) + 1, -1)  # the last one stands for null
    for index, tag in enumerate(encoded.dictionary.to_pylist()):
        try:
            codes[index] = names.setdefault(normalize_tag(tag), len(names))
        except ValueError:
            pass
    indices = pc.fill_null(encoded.indices, len(encoded.dictionary)).to_numpy()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    return pc.list_parent_indices(lists).to_numpy(), codes[indices], names, lengths


def checked_split(
    dataset: Dataset,
    name: str,
    use_images: bool,
    use_labels: bool,
    skip_bad_rows: bool,
    allow_unlabeled: bool = False,
) -> Dataset:
    """The split when all its rows are good; otherwise an error, or the good rows with `skip_bad_rows`.

    Raises:
        DataError: A row is bad (the message counts the problems and names item ids), or no good row is left.
    """
    report = check_rows(dataset, name, use_images, use_labels, allow_unlabeled)
    judge_rows(report, skip_bad_rows)
    return dataset.select(report.good_rows) if report.bad_rows else dataset


def judge_rows(report: RowReport, skip_bad_rows: bool) -> None:
    """Print what is bad and left out; raise `DataError` where it may not be, or where nothing would be left."""
    if not report.problems:
        return
    if not skip_bad_rows:
        raise DataError(f"{report}; --skip_bad_rows true leaves them out")
    if len(report.bad_rows) == report.num_rows:
        raise DataError(f"{report}; none is left")
    print(f"{report}; left out", flush=True)


def load_training_splits(data_args: DataArguments, use_images: bool) -> dict[str, Dataset]:
    """The checked rows of `train`, `validation` and, where the dataset has it, `test`, with just the columns needed.

    Raises:
        DataError: A split or column is missing, or a row is bad.
    """
    splits = load_tag_dataset(data_args.dataset_name, data_args.dataset_config_name)
    wanted = {"train": data_args.train_split, "validation": data_args.validation_split, "test": data_args.test_split}
    if data_args.test_split not in splits:
        del wanted["test"]
    return {role: load_split(splits, split, data_args, use_images, use_labels=True) for role, split in wanted.items()}


def load_pretraining_splits(data_args: PretrainingDataArguments, use_images: bool) -> dict[str, Dataset]:
    """The checked rows of `train` and `validation`, without ground truth even where the dataset has it.

    A dataset without the validation split, such as `unlabeled`, gives up a seeded share of its training split.

    Raises:
        DataError: A split or column is missing, or a row is bad.
    """
    splits = load_tag_dataset(data_args.dataset_name, data_args.dataset_config_name, use_labels=False)
    train = load_split(splits, data_args.train_split, data_args, use_images, use_labels=False)
    if data_args.validation_split in splits:
        validation = load_split(splits, data_args.validation_split, data_args, use_images, use_labels=False)
        return {"train": train, "validation": validation}
    if len(train) < 2:
        raise DataError(f"{data_args.dataset_name} has {len(train)} row, expected 2 at least: one for validation")
    size = max(1, int(data_args.validation_share * len(train)))
    shares = train.train_test_split(test_size=size, seed=0)
    return {"train": shares["train"], "validation": shares["test"]}


def load_split(
    splits: Mapping[str, Dataset], split: str, data_args: RowArguments, use_images: bool, use_labels: bool
) -> Dataset:
    """The checked rows of one split, with just the columns needed; raises `DataError` as `load_training_splits`."""
    dataset = find_split(splits, split, data_args)
    name = f"{data_args.dataset_name}, {split}"
    rows = checked_split(dataset, name, use_images, use_labels, data_args.skip_bad_rows)
    columns = ["item_id", "tags", *(["important_tags"] if use_labels else []), *(["image"] if use_images else [])]
    return rows.select_columns(columns)


def find_split(
    splits: Mapping[str, Dataset | IterableDataset], split: str, data_args: RowArguments | PredictArguments
) -> Dataset | IterableDataset:
    """One of the splits; raises `DataError` where it is missing."""
    if split not in splits:
        raise DataError(f"{data_args.dataset_name}: split {split!r} is missing, found {', '.join(splits)}")
    return splits[split]


# ---------------------------------------------------------------------------------------------------------- vocabulary


def build_vocabulary(dataset: Dataset) -> list[str]:
    """All tags of a split, normalised, without duplicates, in alphabetical order."""
    return collect_tags(dataset.select_columns("tags").with_format("arrow").iter(batch_size=10_000))


def collect_tags(tables: Iterable[pa.Table]) -> list[str]:
    """As `build_vocabulary`, of rows that come a table at a time."""
    seen: set[str] = set()
    for rows in tables:
        seen.update(pc.list_flatten(rows["tags"]).unique().to_pylist())
    return sorted({normalize_tag(tag) for tag in seen})
