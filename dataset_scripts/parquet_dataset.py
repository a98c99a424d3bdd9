"""Rows of tags, and their photographs, to a folder of Parquet files that `load_dataset` reads.

Both prepare scripts end here. A dataset is written in two passes. The first collects the checked
rows of every split on disk: the plan. The second walks the plan, encodes the photographs in
parallel and writes shards. All of it happens in `OUT.partial`, which takes the name OUT when
everything is there; an interrupted run finds its finished shards and encoded photographs there
and goes on.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import sqlite3
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import datasets
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import ExifTags, Image
from tqdm import tqdm

# Where the shards of each split lie. `unlabeled` is a configuration of its own, with one split.
SHARD_STEMS = {
    "train": "data/train",
    "validation": "data/validation",
    "test": "data/test",
    "unlabeled": "unlabeled/train",
}

SHARD_BYTES = 200_000_000
# A row group of photographs is about 1 MB: what a stream or the Hub's viewer fetches at least.
ROWS_PER_GROUP_WITH_IMAGES = 100
ROWS_PER_GROUP_WITHOUT = 2_000
JPEG_QUALITY = 90
MAX_JPEG_SIDE = 65_500  # libjpeg writes no longer ones
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # 179 million; Pillow refuses more, which would be a decompression bomb
MAX_ASPECT_RATIO = 50  # as in training, which refuses longer ones
# How a photograph is turned upright, by the orientation in its EXIF data.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What the system says of a photograph that is not there, or that is damaged and sends its reader to where no file may
# reach. Anything else, as of a network share that is lost, may pass.
ERRORS_OF_A_PHOTOGRAPH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
COMMIT_EVERY = 200  # photographs; what a killed run can lose

PLAN_SCHEMA = pa.schema(
    {
        "item_id": pa.string(),
        "photograph": pa.string(),
        "tags": pa.list_(pa.string()),
        "important_tags": pa.list_(pa.string()),
    }
)


class InputError(Exception):
    """What the user gave cannot be used; the message is one line that says what and why."""


def features(with_images: bool) -> datasets.Features:
    """The columns of a prepared dataset."""
    columns = {
        "item_id": datasets.Value("string"),
        "image": datasets.Image(),
        "tags": datasets.List(datasets.Value("string")),
        "important_tags": datasets.List(datasets.Value("string")),
    }
    if not with_images:
        del columns["image"]
    return datasets.Features(columns)


def shards(folder: Path, split: str) -> list[Path]:
    """The Parquet files of a split, in order."""
    stem = folder / SHARD_STEMS[split]
    return sorted(stem.parent.glob(stem.name + "-*.parquet"))


class Item(NamedTuple):
    """One row of a dataset before its photograph is read.

    Attributes:
        split: a key of `SHARD_STEMS`.
        item_id: unique in the dataset.
        photograph: path relative to the root of photographs; None where there is none.
        tags: candidate tags.
        important_tags: the important ones among them; empty in `unlabeled`.
    """

    split: str
    item_id: str
    photograph: str | None
    tags: list[str]
    important_tags: list[str]


class DatasetWriter:
    """Writes one dataset: `add` every row, then `write_shards`, then `publish`.

    A context manager: inside, no other run can write the same dataset.

    Args:
        out: the folder to make; an older dataset there is replaced at the very end.
        photograph_root: the folder that paths of photographs start from; None for tags alone.
        short_side: photographs are shrunk to this many pixels on their short side, never enlarged.

    Attributes:
        folder: where the dataset lies until it is published.

    Raises:
        InputError: OUT holds files of another program, or another run is writing it.
    """

    def __init__(self, out: Path, photograph_root: Path | None, short_side: int):
        if out.exists() and not (out / "counts.json").exists():
            if not out.is_dir() or any(out.iterdir()):
                raise InputError(f"{out}: holds other files, expected a new folder or a dataset")
        self.out = out = out.absolute()
        self.folder = out.with_name(out.name + ".partial")
        self._root = photograph_root
        self._short_side = short_side
        # Pillow warns from half of `MAX_PIXELS` on, which photographs of good cameras have.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)

    def __enter__(self) -> "DatasetWriter":
        try:
            for stem in SHARD_STEMS.values():
                (self.folder / stem).parent.mkdir(parents=True, exist_ok=True)
            self._progress = Progress(self.folder / "progress.sqlite")
            self._plan = Plan(self.folder / "plan")
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error})") from error
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        self._plan.close()
        self._progress.close()
        # Nothing to go on from, so nothing to leave behind: most likely the input is wrong.
        if error_type is not None and self._progress.is_empty:
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, item: Item) -> None:
        """Adds one row."""
        self._plan.add(item)

    def write_shards(self) -> dict:
        """Reads the photographs and writes the shards and `missing_images.txt`.

        Returns:
            Counts: `missing_images`, `unreadable_images`, and the rows of every split.

        Raises:
            InputError: no row is left, or none for the train split of a dataset with ground truth.
            OSError: the disk or the network is at fault; the same run can go on later.
        """
        self._plan.close()
        planned = {split: pq.read_metadata(self._plan.path(split)).num_rows for split in SHARD_STEMS}
        # Without any ground truth, a dataset is its unlabeled rows.
        needed = "train" if any(planned[split] for split in SHARD_STEMS if split != "unlabeled") else "unlabeled"
        nothing_left = "no row is left for the train split" if needed == "train" else "no row is left"
        if planned[needed] == 0:  # known before hours of encoding
            raise InputError(f"{nothing_left}: the filter kept none")
        self._progress.begin(self._fingerprint(), self.folder)
        with tqdm(total=sum(planned.values()), desc="writing", unit="row") as bar:
            for split in SHARD_STEMS:
                self._write_split(split, bar)

        faults = self._progress.faults()
        (self.folder / "missing_images.txt").write_text(
            "".join("\t".join(fault) + "\n" for fault in faults), encoding="utf-8"
        )
        kinds = Counter(reason.partition(":")[0] for *_, reason in faults)
        rows = {
            split: sum(pq.read_metadata(shard).num_rows for shard in shards(self.folder, split))
            for split in SHARD_STEMS
        }
        for split, count in rows.items():
            if count == 0:  # `load_dataset` stumbles over files without rows
                for shard in shards(self.folder, split):
                    shard.unlink()
        for parent in {(self.folder / stem).parent for stem in SHARD_STEMS.values()}:
            if not any(parent.iterdir()):
                parent.rmdir()
        if rows[needed] == 0:
            _, item_id, path, fault = faults[0]
            raise InputError(
                f"{nothing_left}: {len(faults):,} photographs are unusable, first {item_id} {path}: {fault}"
            )
        return {
            "missing_images": kinds["missing"],
            "unreadable_images": kinds["unreadable"],
            "splits": rows,
        }

    def publish(self, counts: dict) -> None:
        """Writes `counts.json` and gives the finished folder its final name."""
        (self.folder / "counts.json").write_text(json.dumps(counts, indent=2) + "\n")
        self._progress.close()
        (self.folder / "progress.sqlite").unlink()
        shutil.rmtree(self.folder / "plan")
        older = self.out.with_name(self.out.name + ".older")
        shutil.rmtree(older, ignore_errors=True)
        if self.out.exists():
            self.out.rename(older)
        self.folder.rename(self.out)
        shutil.rmtree(older, ignore_errors=True)

    def _fingerprint(self) -> str:
        """A digest of all that decides the bytes of the dataset."""
        digest = hashlib.sha256(repr((pa.__version__, PIL.__version__, self._short_side, self._root)).encode())
        for split in SHARD_STEMS:
            with self._plan.path(split).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            if self._root is not None:
                for row in self._plan.rows(split, columns=["photograph"]):
                    digest.update(self._state(row["photograph"]))
        return digest.hexdigest()

    def _state(self, photograph: str | None) -> bytes:
        """Changes when a photograph does: one that was broken or missing may be there by now."""
        try:
            status = (self._root / photograph).stat()
        except (TypeError, ValueError):  # no path, or one with a null byte
            return b"missing"
        except OSError as error:
            if error.errno not in ERRORS_OF_A_PHOTOGRAPH:  # what is finished must not be forgotten for a lost share
                raise
            return b"missing"
        return f"{status.st_size} {status.st_mtime_ns}".encode()

    def _write_split(self, split: str, bar: tqdm) -> None:
        """Writes the shards of one split that are not there yet."""
        schema = features(with_images=self._root is not None).arrow_schema
        rows_per_group = ROWS_PER_GROUP_WITHOUT if self._root is None else ROWS_PER_GROUP_WITH_IMAGES
        number, position = self._progress.finished_shards(split)
        bar.update(position)

        rows = islice(self._plan.rows(split), position, None)
        if self._root is not None:
            rows = self._with_photographs(rows, split, position)
        groups = iter(lambda: list(islice(rows, rows_per_group)), [])
        group = next(groups, [])
        while group:
            final = self.folder / f"{SHARD_STEMS[split]}-{number:05d}.parquet"
            unfinished = final.with_suffix(".unfinished")
            with pq.ParquetWriter(unfinished, schema, write_page_index=True) as writer:
                while group and unfinished.stat().st_size < SHARD_BYTES:
                    usable = [row for row in group if self._root is None or row["image"]]
                    writer.write_table(pa.Table.from_pylist(usable, schema))
                    position += len(group)
                    bar.update(len(group))
                    group = next(groups, [])
            unfinished.rename(final)
            self._progress.finish_shard(split, number, position)
            number += 1

    def _with_photographs(self, rows: Iterator[dict], split: str, position: int) -> Iterator[dict]:
        """Adds `image` to the rows of a split, from `position` on; None where it is unusable.

        Photographs that an interrupted run has encoded are taken from its progress file. The
        others are encoded by threads (Pillow works outside of Python's lock), a few of them ahead
        at a time, so that memory does not grow with the number of rows.
        """
        for jpeg, row in zip(self._progress.photographs(split, position), rows, strict=False):
            yield row | {"image": _image_cell(row, jpeg)}
            position += 1

        workers = os.cpu_count() or 1
        ahead: deque[tuple[dict, Future]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            while True:
                for row in islice(rows, 16 * workers - len(ahead)):
                    job = pool.submit(encode_photograph, self._root, row["photograph"], self._short_side)
                    ahead.append((row, job))
                if not ahead:
                    return
                row, job = ahead.popleft()
                try:
                    jpeg = job.result()
                except UnusablePhotograph as error:
                    jpeg = b""
                    path = row["photograph"] or ""
                    self._progress.add_fault(split, row["item_id"], path, str(error))
                self._progress.add_photograph(split, position, jpeg)
                yield row | {"image": _image_cell(row, jpeg)}
                position += 1


def _image_cell(row: dict, jpeg: bytes) -> dict | None:
    return {"bytes": jpeg, "path": f"{row['item_id']}.jpg"} if jpeg else None


# --------------------------------------------------------------------------------------- plan


class Plan:
    """The rows of every split on disk, before their photographs are read.

    Args:
        folder: made anew; holds one Parquet file for each split.
    """

    def __init__(self, folder: Path):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._folder = folder
        self._rows: dict[str, list[dict]] = {split: [] for split in SHARD_STEMS}
        self._writers = {split: pq.ParquetWriter(self.path(split), PLAN_SCHEMA) for split in SHARD_STEMS}

    def path(self, split: str) -> Path:
        """The file that holds the rows of a split."""
        return self._folder / f"{split}.parquet"

    def add(self, item: Item) -> None:
        """Adds one row to its split."""
        rows = self._rows[item.split]
        rows.append(item._asdict())
        if len(rows) >= 5_000:
            self._flush(item.split)

    def _flush(self, split: str) -> None:
        self._writers[split].write_table(pa.Table.from_pylist(self._rows[split], PLAN_SCHEMA))
        self._rows[split].clear()

    def close(self) -> None:
        """Writes what is left; the plan is complete, and can be read."""
        for split, writer in self._writers.items():
            self._flush(split)
            writer.close()
        self._writers = {}

    def rows(self, split: str, columns: list[str] | None = None) -> Iterator[dict]:
        """The rows of a split in the order of their adding, a few in memory at a time."""
        with pq.ParquetFile(self.path(split)) as file:
            for batch in file.iter_batches(batch_size=1_000, columns=columns):
                yield from batch.to_pylist()


# -------------------------------------------------------------------------------- photographs


class UnusablePhotograph(Exception):
    """A photograph is "missing" or "unreadable: why"."""


def encode_photograph(root: Path, path: str | None, short_side: int) -> bytes:
    """Reads a photograph and encodes it as an upright RGB JPEG of modest size.

    Args:
        root: the folder that `path` starts from.
        path: the file; None where the dataset has none for this row.
        short_side: upper limit of the short side in pixels; smaller photographs keep their size.

    Raises:
        UnusablePhotograph: missing, not an image, broken off, too large to be true, too long for
            its width or for a JPEG.
        OSError, MemoryError: it is not the photograph that is at fault, but the machine or the
            network.
    """
    if path is None:
        raise UnusablePhotograph("missing")
    try:
        with Image.open(root / path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                raise ValueError(
                    f"{image.width} x {image.height} pixels, expected sides of at most 1 : {MAX_ASPECT_RATIO}"
                )
            size = image.size
            scale = short_side / min(size)
            if scale < 1:
                size = tuple(max(1, round(length * scale)) for length in size)
                # A JPEG decoder can leave out the detail that the smaller size would lose anyway.
                image.draft("RGB", size)
            image.load()  # before its EXIF data, which may stand behind the pixels
            turn = _turn(image)
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
                # 16-bit grey, which `convert("RGB")` would cut off at 255.
                image = image.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
            image = image.convert("RGB")
            if scale < 1:
                image = image.resize(size, Image.Resampling.BICUBIC)
            if turn is not None:
                image = image.transpose(turn)
        if max(image.size) > MAX_JPEG_SIDE:
            raise ValueError(f"{image.width} x {image.height} pixels are too long for a JPEG")
        file = io.BytesIO()
        # Pillow takes over no EXIF data, but would take over the comment: notes of the camera or of the owner.
        image.save(file, "JPEG", quality=JPEG_QUALITY, comment=b"")
    except FileNotFoundError:
        raise UnusablePhotograph("missing") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for files that are no photographs
        # Of what is in a file, Pillow raises an OSError without a number.
        if isinstance(error, OSError) and error.errno not in (None, *ERRORS_OF_A_PHOTOGRAPH):
            raise
        why = " ".join(str(error).split()).replace(f"{root}{os.sep}", "")
        raise UnusablePhotograph(f"unreadable: {why}") from error
    return file.getvalue()


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns a photograph as its camera was held; None where it is upright, or does not say."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # broken EXIF data, whose errors are of many kinds, are no fault of the pixels
        return None


# ----------------------------------------------------------------------------------- progress


class Progress:
    """What an interrupted run has finished, in one SQLite file that only one run can hold.

    Args:
        path: the file.

    Attributes:
        is_empty: there is nothing to go on from.

    Raises:
        InputError: another run holds the file.
    """

    def __init__(self, path: Path):
        self.is_empty = True
        self._uncommitted = 0
        try:
            self._database = sqlite3.connect(path, timeout=1)
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("BEGIN EXCLUSIVE")
            for table in (
                "input (fingerprint TEXT)",
                "shards (split TEXT, number INTEGER, position INTEGER)",
                "photographs (split TEXT, position INTEGER, jpeg BLOB, PRIMARY KEY (split, position))",
                "faults (split TEXT, item_id TEXT, path TEXT, why TEXT)",
            ):
                self._database.execute(f"CREATE TABLE IF NOT EXISTS {table}")
            self._database.commit()
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{path}: {error}; if no other run is writing this dataset, delete {path.parent}"
            ) from error
        self.is_empty = not self._count("shards") and not self._count("photographs")

    def _count(self, table: str) -> int:
        return self._database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]

    def begin(self, fingerprint: str, folder: Path) -> None:
        """Keeps the progress if it belongs to the same input, and otherwise forgets it.

        Args:
            fingerprint: identifies the input and the options.
            folder: holds the shards, which are removed if they are of other input.
        """
        known = self._database.execute("SELECT fingerprint FROM input").fetchone()
        if known == (fingerprint,):
            return
        for stem in SHARD_STEMS.values():
            for shard in (folder / stem).parent.iterdir():  # finished or not
                shard.unlink()
        for table in ("input", "shards", "photographs", "faults"):
            self._database.execute(f"DELETE FROM {table}")
        self._database.execute("INSERT INTO input VALUES (?)", (fingerprint,))
        self._database.commit()
        self.is_empty = True

    def finished_shards(self, split: str) -> tuple[int, int]:
        """How many shards of a split are finished, and how many rows of the plan they cover."""
        return self._database.execute(
            "SELECT count(*), ifnull(max(position), 0) FROM shards WHERE split = ?", (split,)
        ).fetchone()

    def finish_shard(self, split: str, number: int, position: int) -> None:
        """Records that a shard is finished, and that it ends before row `position` of the plan."""
        self._database.execute("INSERT INTO shards VALUES (?, ?, ?)", (split, number, position))
        self._database.execute("DELETE FROM photographs WHERE split = ? AND position < ?", (split, position))
        self._commit()

    def photographs(self, split: str, position: int) -> Iterator[bytes]:
        """The encoded photographs of a split from `position` on; empty ones are unusable."""
        for (jpeg,) in self._database.execute(
            "SELECT jpeg FROM photographs WHERE split = ? AND position >= ? ORDER BY position",
            (split, position),
        ):
            yield jpeg

    def add_photograph(self, split: str, position: int, jpeg: bytes) -> None:
        """Records an encoded photograph, empty if it is unusable."""
        self._database.execute("INSERT INTO photographs VALUES (?, ?, ?)", (split, position, jpeg))
        self._uncommitted += 1
        if self._uncommitted >= COMMIT_EVERY:
            self._commit()

    def add_fault(self, split: str, item_id: str, path: str, why: str) -> None:
        """Records why a photograph is unusable; committed together with the photograph."""
        fault = (split, item_id, path, why)
        self._database.execute("INSERT INTO faults VALUES (?, ?, ?, ?)", fault)

    def faults(self) -> list[tuple[str, str, str, str]]:
        """(split, item id, path, reason) of every unusable photograph, in order."""
        return self._database.execute("SELECT * FROM faults ORDER BY rowid").fetchall()

    def _commit(self) -> None:
        self._database.commit()
        self._uncommitted = 0
        self.is_empty = False

    def close(self) -> None:
        """Releases the file."""
        if self._uncommitted:
            self._commit()
        self._database.close()
