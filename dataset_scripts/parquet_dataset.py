"""Rows of tags, and their photographs, to a folder of Parquet files that `load_dataset` reads.

Both prepare scripts end here. A dataset is written in two steps. First a `Plan`: the checked rows
of every split, without photographs, on disk. Then `write_dataset` walks the plan, encodes the
photographs in parallel and writes shards, a dataset card and counts. All of it happens in
`OUT.partial`, which takes the name OUT when everything is there; an interrupted run finds its
finished shards and encoded photographs there and goes on.
"""

import hashlib
import io
import json
import os
import shutil
import sqlite3
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import datasets
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from tqdm import tqdm

# Where the shards of each split lie. `unlabeled` is a configuration of its own, with one split.
SHARD_STEMS = {
    "train": "data/train",
    "validation": "data/validation",
    "test": "data/test",
    "unlabeled": "unlabeled/train",
}

SHARD_BYTES = 200_000_000
ROWS_PER_GROUP = {True: 100, False: 2_000}  # with and without photographs: about 1 MB either way
JPEG_QUALITY = 90
MAX_PIXELS = 89_000_000  # a larger photograph is a mistake or a decompression bomb
COMMIT_EVERY = 200  # photographs; what an interruption can lose

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


@dataclass
class Plan:
    """The rows of a dataset before its photographs are read.

    Attributes:
        folder: holds one Parquet file of rows for each split, `PLAN_SCHEMA`.
        photograph_root: the folder that `photograph` paths start from; None for a tag-only dataset.
        counts: what the filter counted, for `counts.json`.
    """

    folder: Path
    photograph_root: Path | None
    counts: dict = field(default_factory=dict)

    def path(self, split: str) -> Path:
        """The file that holds the rows of a split."""
        return self.folder / f"{split}.parquet"

    def fingerprint(self, short_side: int) -> str:
        """A digest of all that decides the bytes of the dataset."""
        digest = hashlib.sha256(
            repr((pa.__version__, PIL.__version__, short_side, self.photograph_root)).encode()
        )
        for split in SHARD_STEMS:
            with self.path(split).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            if self.photograph_root:
                for row in plan_rows(self.path(split), columns=["photograph"]):
                    digest.update(self._state(row["photograph"]))
        return digest.hexdigest()

    def _state(self, photograph: str | None) -> bytes:
        """Changes when a photograph does: one that was broken or missing may be there by now."""
        if photograph is None:
            return b"missing"
        try:
            state = (self.photograph_root / photograph).stat()
        except OSError:
            return b"missing"
        return f"{state.st_size} {state.st_mtime_ns}".encode()


class PlanWriter:
    """Collects checked rows by split and writes them to disk in batches.

    Args:
        folder: becomes `Plan.folder`; made anew.
    """

    def __init__(self, folder: Path):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._rows: dict[str, list[dict]] = {split: [] for split in SHARD_STEMS}
        self._writers = {
            split: pq.ParquetWriter(folder / f"{split}.parquet", PLAN_SCHEMA)
            for split in SHARD_STEMS
        }

    def add(
        self,
        split: str,
        item_id: str,
        photograph: str | None,
        tags: list[str],
        important_tags: list[str],
    ) -> None:
        """Adds one row to a split; `photograph` is None where there is none."""
        rows = self._rows[split]
        rows.append(
            {
                "item_id": item_id,
                "photograph": photograph,
                "tags": tags,
                "important_tags": important_tags,
            }
        )
        if len(rows) >= 10_000:
            self._flush(split)

    def _flush(self, split: str) -> None:
        self._writers[split].write_table(pa.Table.from_pylist(self._rows[split], PLAN_SCHEMA))
        self._rows[split].clear()

    def close(self) -> None:
        """Writes what is left; the plan is complete afterwards."""
        for split, writer in self._writers.items():
            self._flush(split)
            writer.close()


def plan_rows(path: Path, columns: list[str] | None = None) -> Iterator[dict]:
    """The rows of one split of a plan, a few in memory at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1_000, columns=columns):
            yield from batch.to_pylist()


def partial_folder(out: Path) -> Path:
    """The folder in which OUT is made. Refuses an OUT that another program has filled.

    Raises:
        InputError: OUT exists and is not a dataset written here.
    """
    if out.exists() and not (out / "counts.json").exists():
        if not out.is_dir() or any(out.iterdir()):
            raise InputError(
                f"{out}: holds other files, expected a new folder or a dataset of ours"
            )
    return out.with_name(out.name + ".partial")


def write_dataset(plan: Plan, out: Path, short_side: int) -> dict:
    """Reads the photographs of a plan and writes the dataset.

    Args:
        plan: the rows; its folder lies in `partial_folder(out)`.
        out: the folder to make; an older dataset there is replaced at the very end.
        short_side: photographs are shrunk to this many pixels on their short side, never enlarged.

    Returns:
        The counts as written to `counts.json`.

    Raises:
        InputError: no row of the train split is left.
    """
    # A photograph of suspicious size is refused rather than announced.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    partial = partial_folder(out)
    progress = Progress(partial / "progress.sqlite", plan.fingerprint(short_side))
    for stem in SHARD_STEMS.values():
        (partial / stem).parent.mkdir(parents=True, exist_ok=True)

    total = sum(pq.read_metadata(plan.path(split)).num_rows for split in SHARD_STEMS)
    with tqdm(total=total, desc="writing", unit="row") as bar:
        for split in SHARD_STEMS:
            _write_split(plan, split, partial, short_side, progress, bar)
    faults = progress.faults()
    progress.close()

    splits = {
        split: sum(pq.read_metadata(shard).num_rows for shard in shards(partial, split))
        for split in SHARD_STEMS
    }
    if splits["train"] == 0:
        raise InputError(f"no row is left for the train split: {_why_empty(faults)}")
    counts = plan.counts | {"unusable_images": len(faults), "splits": splits}
    (partial / "missing_images.txt").write_text(
        "".join(f"{split}\t{item_id}\t{path}\t{why}\n" for split, item_id, path, why in faults)
    )
    (partial / "counts.json").write_text(json.dumps(counts, indent=2) + "\n")
    (partial / "README.md").write_text(_card())
    _publish(partial, out, plan.folder)
    return counts


def _why_empty(faults: list[tuple]) -> str:
    if not faults:
        return "the filter kept none"
    _, item_id, _, why = faults[0]
    return f"{len(faults)} photographs cannot be used, the first is that of {item_id} ({why})"


def _card() -> str:
    lines = ["---", "configs:"]
    for config, splits in {
        "default": {name: name for name in ("train", "validation", "test")},
        "unlabeled": {"train": "unlabeled"},
    }.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for name, split in splits.items():
            lines += [f"  - split: {name}", f"    path: {SHARD_STEMS[split]}-*.parquet"]
    return "\n".join([*lines, "---", ""])


def _publish(partial: Path, out: Path, *scaffolding: Path) -> None:
    """Gives the finished folder its final name."""
    for path in scaffolding:
        shutil.rmtree(path)
    (partial / "progress.sqlite").unlink()
    older = out.with_name(out.name + ".older")
    shutil.rmtree(older, ignore_errors=True)
    if out.exists():
        out.rename(older)
    partial.rename(out)
    shutil.rmtree(older, ignore_errors=True)


def shards(folder: Path, split: str) -> list[Path]:
    """The Parquet files of a split, in order."""
    stem = folder / SHARD_STEMS[split]
    return sorted(stem.parent.glob(stem.name + "-*.parquet"))


# ------------------------------------------------------------------------------------- shards


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


def _write_split(
    plan: Plan, split: str, partial: Path, short_side: int, progress: "Progress", bar: tqdm
) -> None:
    """Writes the shards of one split that are not there yet."""
    root = plan.photograph_root
    schema = features(with_images=root is not None).arrow_schema
    rows_per_group = ROWS_PER_GROUP[root is not None]
    number, position = progress.finished_shards(split)
    bar.update(position)

    rows = islice(plan_rows(plan.path(split)), position, None)
    if root is not None:
        rows = _with_photographs(rows, root, short_side, progress, split, position)
    groups = iter(lambda: list(islice(rows, rows_per_group)), [])
    group = next(groups, [])
    while group or number == 0:  # a split without rows is one shard without rows
        final = partial / f"{SHARD_STEMS[split]}-{number:05d}.parquet"
        unfinished = final.with_suffix(".unfinished")
        shard_bytes = 0
        with pq.ParquetWriter(unfinished, schema, write_page_index=True) as writer:
            while group and shard_bytes < SHARD_BYTES:
                usable = [row for row in group if root is None or row["image"]]
                table = pa.Table.from_pylist(usable, schema)
                writer.write_table(table)
                shard_bytes += table.nbytes
                position += len(group)
                bar.update(len(group))
                group = next(groups, [])
        unfinished.rename(final)
        number += 1
        progress.finish_shard(split, number, position)


def _with_photographs(
    rows: Iterator[dict],
    root: Path,
    short_side: int,
    progress: "Progress",
    split: str,
    position: int,
) -> Iterator[dict]:
    """Adds `image` to the rows of a split, from `position` on; None where it cannot be used.

    Photographs that an interrupted run has encoded are taken from its progress file. The others
    are encoded by threads (Pillow works outside of Python's lock), a few of them ahead at a time,
    so that memory does not grow with the number of rows.
    """
    stored = progress.photographs(split, position)
    for jpeg, row in zip(stored, rows, strict=False):
        yield row | {"image": _image_cell(row, jpeg)}
        position += 1

    workers = os.cpu_count() or 1
    ahead: deque[tuple[dict, Future]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            for row in islice(rows, 16 * workers - len(ahead)):
                job = pool.submit(encode_photograph, root, row["photograph"], short_side)
                ahead.append((row, job))
            if not ahead:
                return
            row, job = ahead.popleft()
            try:
                jpeg = job.result()
            except UnusablePhotograph as error:
                jpeg = b""
                progress.add_fault(split, row["item_id"], row["photograph"] or "", str(error))
            progress.add_photograph(split, position, jpeg)
            yield row | {"image": _image_cell(row, jpeg)}
            position += 1


def _image_cell(row: dict, jpeg: bytes) -> dict | None:
    return {"bytes": jpeg, "path": f"{row['item_id']}.jpg"} if jpeg else None


# -------------------------------------------------------------------------------- photographs


class UnusablePhotograph(Exception):
    """A photograph is missing or cannot be read; the message says which of the two, and why."""


def encode_photograph(root: Path, path: str | None, short_side: int) -> bytes:
    """Reads a photograph and encodes it as an upright RGB JPEG of modest size.

    Args:
        root: the folder that `path` starts from.
        path: the file; None where the dataset has none for this row.
        short_side: upper limit of the short side in pixels; smaller photographs keep their size.

    Raises:
        UnusablePhotograph: missing, not an image, broken off, or too large to be true.
    """
    if path is None:
        raise UnusablePhotograph("missing")
    try:
        with Image.open(root / path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnusablePhotograph(f"{image.width} x {image.height} pixels are too many")
            shrink = short_side / min(image.size)
            if shrink < 1:
                size = tuple(max(1, round(length * shrink)) for length in image.size)
                # A JPEG decoder can skip detail that the smaller size would lose anyway.
                image.draft("RGB", size)
                image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise UnusablePhotograph("missing") from None
    except UnusablePhotograph:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for files that are no photographs
        raise UnusablePhotograph(f"unreadable: {' '.join(str(error).split())}") from error
    file = io.BytesIO()
    upright.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


# ----------------------------------------------------------------------------------- progress


class Progress:
    """What an interrupted run has finished, in one SQLite file.

    Args:
        path: the file. One that belongs to other input is thrown away.
        fingerprint: identifies the input and the options.

    Raises:
        InputError: another run is writing this dataset now.
    """

    def __init__(self, path: Path, fingerprint: str):
        self._uncommitted = 0
        try:
            self._open(path)
            known = self._database.execute("SELECT fingerprint FROM input").fetchone()
            if known != (fingerprint,):
                self._database.close()
                path.unlink()
                self._open(path)
                self._database.execute("INSERT INTO input VALUES (?)", (fingerprint,))
                self._database.commit()
        except sqlite3.OperationalError as error:
            raise InputError(f"{path}: {error}; is another run writing this dataset?") from None

    def _open(self, path: Path) -> None:
        self._database = sqlite3.connect(path, timeout=1)
        self._database.executescript(
            """
            PRAGMA locking_mode = EXCLUSIVE;
            CREATE TABLE IF NOT EXISTS input (fingerprint TEXT);
            CREATE TABLE IF NOT EXISTS shards (split TEXT, number INTEGER, position INTEGER);
            CREATE TABLE IF NOT EXISTS photographs (
                split TEXT, position INTEGER, jpeg BLOB, PRIMARY KEY (split, position)
            );
            CREATE TABLE IF NOT EXISTS faults (split TEXT, item_id TEXT, path TEXT, why TEXT);
            """
        )

    def finished_shards(self, split: str) -> tuple[int, int]:
        """How many shards of a split are finished, and how many rows of the plan they cover."""
        return self._database.execute(
            "SELECT count(*), ifnull(max(position), 0) FROM shards WHERE split = ?", (split,)
        ).fetchone()

    def finish_shard(self, split: str, number: int, position: int) -> None:
        """Records that the first `number` shards cover the rows before `position`."""
        self._database.execute("INSERT INTO shards VALUES (?, ?, ?)", (split, number, position))
        self._database.execute(
            "DELETE FROM photographs WHERE split = ? AND position < ?", (split, position)
        )
        self._database.commit()

    def photographs(self, split: str, position: int) -> Iterator[bytes]:
        """The encoded photographs of a split from `position` on; empty ones cannot be used."""
        for (jpeg,) in self._database.execute(
            "SELECT jpeg FROM photographs WHERE split = ? AND position >= ? ORDER BY position",
            (split, position),
        ):
            yield jpeg

    def add_photograph(self, split: str, position: int, jpeg: bytes) -> None:
        """Records an encoded photograph, empty if it cannot be used."""
        self._database.execute("INSERT INTO photographs VALUES (?, ?, ?)", (split, position, jpeg))
        self._uncommitted += 1
        if self._uncommitted >= COMMIT_EVERY:
            self._database.commit()
            self._uncommitted = 0

    def add_fault(self, split: str, item_id: str, path: str, why: str) -> None:
        """Records why a photograph cannot be used; committed together with the photograph."""
        self._database.execute(
            "INSERT INTO faults VALUES (?, ?, ?, ?)", (split, item_id, path, why)
        )

    def faults(self) -> list[tuple[str, str, str, str]]:
        """(split, item id, path, reason) of every photograph that cannot be used, in order."""
        return self._database.execute("SELECT * FROM faults ORDER BY rowid").fetchall()

    def close(self) -> None:
        """Releases the file."""
        self._database.commit()
        self._database.close()
