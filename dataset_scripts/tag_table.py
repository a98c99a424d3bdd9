"""Anyone's table of photographs and tags: reading, checking, filtering, splitting.

Rows are streamed: of a table only its item ids are held in memory.
"""

import ast
import csv
import json
import os
import random
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from parquet_dataset import InputError, Item

SPLITS = ("train", "validation", "test")
PHOTOGRAPH_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_CELL_CHARACTERS = 10_000_000  # a longer CSV cell is an unclosed quotation mark
FLAGS = {"0": False, "1": True, "false": False, "true": True}
IMPORTANT_TAGS_COLUMN = "important_tags"
ADJACENT_STRINGS = re.compile(r"""['"]\s+['"]""")


@dataclass(frozen=True)
class TableFormat:
    """Where a table keeps what.

    Attributes:
        id_column: unique item ids.
        tags_column: a list, or a string: either a list in the spelling of JSON or Python, or tags
            with `tag_separator` between them. A table in the wide layout has no such column, but
            one column of 0 and 1, or of booleans, for each tag instead, called
            `<tags_column>_<tag>`.
        important_tags_column: the same for the important tags; empty or null where unknown. None
            for `important_tags`, in a table that may lack it: the ground truth of all rows is
            unknown then.
        image_column: paths relative to the folder of photographs. Without this column the
            photograph of item `x` is `x.jpg` (or .jpeg, .png, .webp).
        split_column: `train`, `validation` or `test`; None to split at random.
        tag_separator: between the tags of a string.
        column_separator: between the columns of a CSV file.
    """

    id_column: str = "item_id"
    tags_column: str = "tags"
    important_tags_column: str | None = None
    image_column: str = "image"
    split_column: str | None = None
    tag_separator: str = ","
    column_separator: str = ","


class TagTable:
    """A table of photographs and tags.

    Args:
        path: a .csv, .tsv, .jsonl, .ndjson or .parquet file.
        image_dir: the folder of photographs; None for tags alone.
        layout: where the table keeps what.

    Attributes:
        counts: what the filter counted; complete when `items` is exhausted. If the table has no
            ground truth, `notes` among them says so.

    Raises:
        InputError: no such file or folder, another kind of file, a column is missing.
    """

    def __init__(self, path: Path, image_dir: Path | None, layout: TableFormat):
        if not path.is_file():
            raise InputError(f"{path}: no such file, expected a CSV, JSON Lines or Parquet table")
        if image_dir is not None and not image_dir.is_dir():
            raise InputError(f"{image_dir}: no such folder, expected the photographs")
        if len(layout.column_separator) != 1:
            found = layout.column_separator
            raise InputError(f"--column_separator is {found!r}, expected one character")
        if not layout.tag_separator:
            raise InputError("--tag_separator is empty, expected what stands between tags")
        readers = {
            ".csv": self._read_csv,
            ".tsv": self._read_csv,
            ".jsonl": self._read_json_lines,
            ".ndjson": self._read_json_lines,
            ".parquet": self._read_parquet,
        }
        if path.suffix.lower() not in readers:
            raise InputError(f"{path}: expected a table that ends in {', '.join(readers)}")
        self._read = readers[path.suffix.lower()]
        self._path = path
        self._layout = layout
        self._important_column = IMPORTANT_TAGS_COLUMN
        if layout.important_tags_column is not None:
            self._important_column = layout.important_tags_column
        self._has_ground_truth = True  # until the first row is read
        self._image_dir = image_dir
        self._real_image_dir = None if image_dir is None else image_dir.resolve()
        self.counts = dict.fromkeys(
            (
                "rows",
                "repeated_ids",
                "with_tags",
                "with_tags_and_important_tags",
                "not_covered",
                "covered",
                "kept",
            ),
            0,
        )

    def items(self) -> Iterator[Item]:
        """The rows of all splits, filtered as NUS-WIDE is (section 4.1).

        A row is kept if it has tags, has important tags, and the important ones are among its
        tags: compared as `train.py` compares them, and given in the spelling of the tags. One that
        has tags but is not kept is `unlabeled`, unless the table itself says that it is of
        validation or test; in a table without a column of important tags, that is every row with
        tags. Without a split column, of every ten kept rows one (at a seeded random place) is in
        test and one in validation; with one, the validation rows are taken from train in this way
        if the table has none.

        Raises:
            InputError: names the row and what is wrong with it; or there are important tags, but
                no row is kept.
        """
        places = self._places()
        seen: set[str] = set()
        for name, row in self._rows():
            self.counts["rows"] += 1
            item_id = self._item_id(name, row)
            if item_id in seen:
                self.counts["repeated_ids"] += 1
                continue
            seen.add(item_id)
            tags = self._tags(name, row, self._layout.tags_column)
            important = self._important_tags(name, row)
            split = self._split(name, row)
            photograph = self._photograph(name, row, item_id)
            if not tags:
                continue
            self.counts["with_tags"] += 1
            self.counts["with_tags_and_important_tags"] += bool(important)
            covered = important.keys() <= tags.keys()
            self.counts["not_covered"] += not covered
            if not important or not covered:
                if split in (None, "train"):
                    yield Item("unlabeled", item_id, photograph, list(tags.values()), [])
                continue
            self.counts["covered"] += 1
            self.counts["kept"] += 1
            if split in (None, "train"):
                split = next(places)
            yield Item(split, item_id, photograph, list(tags.values()), [tags[tag] for tag in important])
        # Not a table without ground truth, but a mistake: of the separator, say.
        if self.counts["with_tags_and_important_tags"] and not self.counts["kept"]:
            raise InputError(
                f"{self._path.name}: of {self.counts['with_tags_and_important_tags']:,} rows with tags and important "
                "tags, none has all the important ones among its tags"
            )

    def _places(self) -> Iterator[str]:
        """The splits of successive kept rows that the table does not place by itself."""
        if self._layout.split_column is None:
            block = ["train", "validation", "test", *["train"] * 7]
        elif any(self._split(name, row) == "validation" for name, row in self._rows()):
            block = ["train"]
        else:
            block = ["train", "validation", *["train"] * 8]
        yield from block  # in this order, so that a table of three rows has three splits
        chance = random.Random(0)
        while True:
            yield from chance.sample(block, len(block))

    # ------------------------------------------------------------------------------- one row

    def _item_id(self, name: str, row: dict) -> str:
        value = row.get(self._layout.id_column)
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            raise InputError(f"{name}, {self._layout.id_column}: found {value!r}, expected an id")
        return str(value).strip()

    def _tags(self, name: str, row: dict, column: str) -> dict[str, str]:
        """The tags of a row, in its order, each once: normal form -> the row's first spelling."""
        value = row[column] if column in row else self._wide_tags(name, row, column)
        if value is None:
            return {}
        if isinstance(value, str):
            cell = value.strip()
            if cell.startswith("[") and cell.endswith("]"):
                value = _written_list(cell)
                if value is None:
                    raise InputError(
                        f"{name}, {column}: found {_short(cell)}, expected a list of text in the brackets"
                    )
            else:
                value = value.split(self._layout.tag_separator)
        if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
            raise InputError(f"{name}, {column}: found {_short(value)}, expected a list of tags or a string")
        tags: dict[str, str] = {}
        for tag in map(str.strip, value):
            if tag:
                tags.setdefault(_normal_form(tag), tag)
        return tags

    def _important_tags(self, name: str, row: dict) -> dict[str, str]:
        column = self._important_column
        if self._has_ground_truth:
            return self._tags(name, row, column)
        if self._has_column(row, column):  # JSON Lines
            raise InputError(f"{name}: found a column {column!r} that row 1 lacks, expected it in all rows or none")
        return {}

    def _has_column(self, row: dict, column: str) -> bool:
        """Whether a row has a column of tags, or the columns of the wide layout for it."""
        return column in row or any(field.startswith(f"{column}_") for field in row)

    def _wide_tags(self, name: str, row: dict, column: str) -> list[str]:
        prefix = f"{column}_"
        flags = {field: value for field, value in row.items() if field.startswith(prefix)}
        if not flags:
            raise self._missing_column(name, column, row)
        tags = []
        for field, value in flags.items():
            flag = FLAGS.get(str(value).strip().lower())
            if flag is None:
                raise InputError(f"{name}, {field}: found {_short(value)}, expected 0 or 1")
            if flag:
                tags.append(field.removeprefix(prefix))
        return tags

    def _split(self, name: str, row: dict) -> str | None:
        column = self._layout.split_column
        if column is None:
            return None
        if row.get(column) not in SPLITS:
            raise InputError(f"{name}, {column}: found {_short(row.get(column))}, expected one of {', '.join(SPLITS)}")
        return row[column]

    def _photograph(self, name: str, row: dict, item_id: str) -> str | None:
        """The path of a row's photograph, relative to the folder of photographs."""
        if self._image_dir is None:
            return None
        column = self._layout.image_column
        if column not in row:
            candidates = [item_id + suffix for suffix in PHOTOGRAPH_SUFFIXES]
            column = self._layout.id_column
        elif isinstance(row[column], str) and row[column]:
            candidates = [row[column]]
        elif row[column] in (None, ""):
            return None
        else:
            raise InputError(f"{name}, {column}: found {_short(row[column])}, expected a path")
        # A table may come from a stranger, and what it names ends up in a published dataset.
        path = candidates[0]
        leaves = bool(re.match(r"[\\/]|[A-Za-z]:", path)) or ".." in re.split(r"[\\/]", path)
        if not leaves:
            there = (c for c in candidates if "\0" not in c and os.path.exists(self._image_dir / c))
            path = next(there, None)
            if path is None:
                return candidates[0]
            real = Path(os.path.realpath(self._image_dir / path))  # where symbolic links lead
            leaves = not real.is_relative_to(self._real_image_dir)
        if leaves:
            raise InputError(f"{name}, {column}: found {_short(path)}, expected a path inside {self._image_dir}")
        return path

    # ---------------------------------------------------------------------------------- files

    def _rows(self) -> Iterator[tuple[str, dict]]:
        """(how messages call it, the row) of every row."""
        number = 0
        try:
            for number, row in self._read():
                name = f"{self._path.name}, row {number:,}"
                if number == 1:
                    self._check_columns(name, row)
                yield name, row
        except UnicodeDecodeError as error:
            raise InputError(f"{self._path.name}, after row {number:,}: {error}; expected UTF-8 text") from error
        except (csv.Error, pa.ArrowException, OSError) as error:
            message = " ".join(str(error).split())
            raise InputError(f"{self._path.name}, after row {number:,}: {message}") from error
        if number == 0:
            raise InputError(f"{self._path.name}: no rows")

    def _check_columns(self, name: str, row: dict) -> None:
        for column in (self._layout.id_column, self._layout.split_column):
            if column is not None and column not in row:
                raise self._missing_column(name, column, row)
        column = self._important_column
        # A column that the user named must be there: a slip must not make a dataset without ground truth.
        if self._layout.important_tags_column is None and not self._has_column(row, column):
            self._has_ground_truth = False
            self.counts["notes"] = [
                f"{self._path.name} has no column {column!r}: the ground truth is unknown, all rows are unlabeled "
                "(--important_tags_column names another column)"
            ]

    def _missing_column(self, name: str, column: str, row: dict) -> InputError:
        return InputError(f"{name}: no column {column!r}, found {_short(', '.join(row))}")

    def _read_csv(self) -> Iterator[tuple[int, dict]]:
        separator = self._layout.column_separator
        if self._path.suffix.lower() == ".tsv" and separator == ",":
            separator = "\t"
        csv.field_size_limit(MAX_CELL_CHARACTERS)
        with self._path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=separator, strict=True)
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise InputError(f"{self._path.name}: a column name occurs twice")
            number = 0
            for cells in reader:
                if not cells:  # a blank line
                    continue
                number += 1
                if len(cells) != len(header):
                    raise InputError(
                        f"{self._path.name}, line {reader.line_num:,}: "
                        f"{len(cells):,} cells, expected {len(header):,} as in the first line"
                    )
                yield number, dict(zip(header, cells, strict=True))

    def _read_json_lines(self) -> Iterator[tuple[int, dict]]:
        with self._path.open(encoding="utf-8-sig") as file:
            number = 0
            for line_number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                number += 1
                try:
                    row = json.loads(line)
                    # Half of a surrogate pair is JSON, but no text that could be written again.
                    if "\\u" in line:
                        json.dumps(row, ensure_ascii=False).encode()
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{self._path.name}, line {line_number:,}: not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise InputError(
                        f"{self._path.name}, line {line_number:,}: found {_short(row)}, expected an object"
                    )
                yield number, row

    def _read_parquet(self) -> Iterator[tuple[int, dict]]:
        with pq.ParquetFile(self._path) as file:
            layout = self._layout
            prefixes = (f"{layout.tags_column}_", f"{self._important_column}_")
            named = {
                layout.id_column,
                layout.tags_column,
                self._important_column,
                layout.image_column,
                layout.split_column,
            }
            columns = [name for name in file.schema_arrow.names if name in named or name.startswith(prefixes)]
            number = 0
            for batch in file.iter_batches(batch_size=1_000, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row


def _written_list(cell: str) -> list[str] | None:
    """The list that a cell spells as JSON or as Python does; None if that is no list of text."""
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        if ADJACENT_STRINGS.search(cell):  # numpy's ['a' 'b'], which Python reads as the one text 'ab'
            return None
        try:
            value = ast.literal_eval(cell)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        return None
    try:
        "".join(value).encode()  # half of a surrogate pair could not be written again
    except UnicodeEncodeError:
        return None
    return value


@lru_cache(maxsize=100_000)
def _normal_form(tag: str) -> str:
    """What makes two tags the same tag: as in `train.py`, which this folder may not import."""
    # Folding can undo the normal form, and the normal form can undo folding: two rounds settle every character.
    for _ in range(2):
        tag = unicodedata.normalize("NFKC", tag).casefold()
    return " ".join(unicodedata.normalize("NFKC", tag).split())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
