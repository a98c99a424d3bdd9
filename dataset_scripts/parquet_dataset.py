"""Rows of tags, and their photographs, to a folder of Parquet files that `load_dataset` reads.

Both prepare scripts end here. A dataset is written in two passes. The first collects the checked
rows of every split on disk: the plan. The second walks the plan, encodes the photographs in
parallel and writes shards. All of it happens in `OUT.partial`, which takes the name OUT when
everything is there; an interrupted run finds its finished shards there and goes on behind them.
"""

import errno
import hashlib
import io
import json
import os
import shutil
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
from filelock import FileLock, Timeout
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
            self._lock = FileLock(self.folder / "lock", timeout=0)
            self._lock.acquire()
            self._progress = Progress(self.folder / "progress.json")
            self._plan = Plan(self.folder / "plan")
        except Timeout:
            raise InputError(f"{self.folder}: another run is writing this dataset") from None
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error})") from error
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        self._plan.close()
        # Nothing to go on from, so nothing to leave behind: most likely the input is wrong.
        if error_type is not None and self._progress.is_empty:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

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

        faults = self._progress.faults
        (self.folder / "missing_images.txt").write_text(
            "".join("\t".join(fault[:-1]) + "\n" for fault in faults), encoding="utf-8"
        )
        kinds = Counter(fault.why.partition(":")[0] for fault in faults)
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
            raise InputError(
                f"{nothing_left}: {len(faults):,} photographs are unusable, "
                f"first {faults[0].item_id} {faults[0].path}: {faults[0].why}"
            )
        return {
            "missing_images": kinds["missing"],
            "unreadable_images": kinds["unreadable"],
            "splits": rows,
        }

    def publish(self, counts: dict) -> None:
        """Writes `counts.json` and gives the finished folder its final name."""
        (self.folder / "counts.json").write_text(json.dumps(counts, indent=2) + "\n")
        shutil.rmtree(self.folder / "plan")
        (self.folder / "progress.json").unlink()
        (self.folder / "lock").unlink()
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
        ends = self._progress.shard_ends[split]
        number, position = len(ends), ends[-1] if ends else 0
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
            self._progress.finish_shard(split, position)
            number += 1

    def _with_photographs(self, rows: Iterator[dict], split: str, position: int) -> Iterator[dict]:
        """Adds `image` to the rows of a split, from `position` on; None where it is unusable.

        Threads encode them (Pillow works outside of Python's lock), a few of them ahead at a time,
        so that memory does not grow with the number of rows.
        """
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
                    image = {"bytes": job.result(), "path": f"{row['item_id']}.jpg"}
                except UnusablePhotograph as error:
                    image = None
                    fault = Fault(split, row["item_id"], row["photograph"] or "", str(error), position)
                    self._progress.faults.append(fault)
                yield row | {"image": image}
                position += 1


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


class Fault(NamedTuple):
    """Why the photograph of one row cannot be used; `position` is that of the row in the plan."""

    split: str
    item_id: str
    path: str
    why: str
    position: int


class Progress:
    """What an interrupted run has finished, in a JSON file that is always whole.

    Args:
        path: the file.

    Attributes:
        shard_ends: of each split, for every finished shard the row of the plan before which it ends.
        faults: of every unusable photograph so far, in the order of the rows.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # a machine that went down can leave an empty file
            known = {"fingerprint": None, "shard_ends": {split: [] for split in SHARD_STEMS}, "faults": []}
        self._fingerprint: str | None = known["fingerprint"]
        self.shard_ends: dict[str, list[int]] = known["shard_ends"]
        self.faults = [Fault(*fault) for fault in known["faults"]]

    @property
    def is_empty(self) -> bool:
        """There is nothing to go on from."""
        return not any(self.shard_ends.values())

    def begin(self, fingerprint: str, folder: Path) -> None:
        """Keeps the progress if it belongs to the same input, and otherwise forgets it.

        Args:
            fingerprint: identifies the input and the options.
            folder: holds the shards, which are removed if they are of other input.
        """
        if fingerprint == self._fingerprint:
            return
        self._path.unlink(missing_ok=True)  # first: without its shards, it must not be believed
        for stem in SHARD_STEMS.values():
            for shard in (folder / stem).parent.iterdir():  # finished or not
                shard.unlink()
        self._fingerprint, self.shard_ends, self.faults = fingerprint, {split: [] for split in SHARD_STEMS}, []

    def finish_shard(self, split: str, position: int) -> None:
        """Records that the next shard of a split is finished, and that it ends before row `position` of the plan."""
        self.shard_ends[split].append(position)
        # Photographs are read ahead. Those of later shards will be read again.
        faults = [fault for fault in self.faults if fault.split != split or fault.position < position]
        known = {"fingerprint": self._fingerprint, "shard_ends": self.shard_ends, "faults": faults}
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(known), encoding="utf-8")
        unfinished.replace(self._path)
