"""The official files of NUS-WIDE (Chua et al., CIVR 2009): finding, checking and filtering them.

Row *n* of the tag file and of every label file belongs to line *n* of `Imagelist.txt`.
"""

import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from parquet_dataset import InputError, Item

CONCEPTS = tuple(
    "airport animal beach bear birds boats book bridge buildings cars castle cat cityscape clouds "
    "computer coral cow dancing dog earthquake elk fire fish flags flowers food fox frost garden "
    "glacier grass harbor horses house lake leaf map military moon mountain nighttime ocean person "
    "plane plants police protest railroad rainbow reflection road rocks running sand sign sky snow "
    "soccer sports statue street sun sunset surf swimmers tattoo temple tiger tower town toy train "
    "tree valley vehicle water waterfall wedding whales window zebra".split()
)

HOMEPAGE = "https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html"

# File in lower case -> (how to write it, the download that holds it).
PARTS = {
    name.rpartition("/")[2].lower(): (name, download)
    for name, download in [
        ("ConceptsList/Concepts81.txt", "ConceptsList.zip"),
        ("ImageList/Imagelist.txt", "ImageList.zip"),
        ("ImageList/TrainImagelist.txt", "ImageList.zip"),
        ("ImageList/TestImagelist.txt", "ImageList.zip"),
        ("NUS_WID_Tags/AllTags81.txt", "NUS_WID_Tags.zip"),
        *((f"Groundtruth/AllLabels/Labels_{name}.txt", "Groundtruth.zip") for name in CONCEPTS),
    ]
}

LISTED_PATH = re.compile(r"(.*/)?(\d+_)?\d+\.jpg")
PHOTOGRAPH_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class TextFile:
    """One text file of the download, unpacked or inside of a zip file.

    Attributes:
        name: how messages call it, relative to the download's folder.
        path: the file itself, or the zip file.
        member: its name inside of the zip file; None for an unpacked file.
    """

    name: str
    path: Path
    member: str | None = None

    def read(self) -> bytes:
        """Reads the whole file.

        Raises:
            InputError: the file or its zip file is damaged.
        """
        try:
            if self.member is None:
                return self.path.read_bytes()
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(self.member)
        except MemoryError:
            raise
        except Exception as error:  # zipfile raises a dozen kinds for damaged files
            raise InputError(f"{self.name}: cannot be read ({error}); download it again") from error

    def lines(self) -> list[str]:
        """The lines without white space around them; blank lines at the end do not count.

        Raises:
            InputError: not plain text, or a blank line among others.
        """
        data = self.read().removeprefix(b"\xef\xbb\xbf").rstrip()
        self.check_plain_text(data)
        lines = [line.strip() for line in data.decode("ascii").split("\n")] if data else []
        if "" in lines:
            raise InputError(f"{self.name}, line {lines.index('') + 1}: blank, expected a name")
        return lines

    def check_plain_text(self, data: bytes) -> None:
        """Refuses bytes that no official file holds: UTF-16, Latin-1, an image.

        Raises:
            InputError: with the line of the first such byte.
        """
        found = re.search(rb"[^\t\r\n\x20-\x7e]", data)
        if found:
            line = data.count(b"\n", 0, found.start()) + 1
            raise InputError(f"{self.name}, line {line}: byte 0x{found[0].hex()}, expected plain ASCII text")

    def flags(
        self, columns: tuple[str, ...], rows: int, like: str, correction: tuple[bytes, bytes] = ()
    ) -> np.ndarray:
        """Reads a table of 0 and 1 separated by blanks.

        Args:
            columns: their names, for messages.
            rows: how many lines there must be.
            like: the list that has so many lines, for messages.
            correction: (what to replace, with what) before reading.

        Returns:
            bool array (rows, columns).

        Raises:
            InputError: names the line, and what it holds.
        """
        data = self.read().rstrip() + b"\n"
        if correction:
            data = data.replace(*correction)
        # A regular file is a fixed number of lone digits and a line feed, line after line.
        text = np.frombuffer(data, np.uint8)
        digits = (text == ord("0")) | (text == ord("1"))
        lone = not (digits[1:] & digits[:-1]).any()
        symbols = text[(text != ord(" ")) & (text != ord("\r")) & (text != ord("\t"))]
        if not lone or symbols.size % (len(columns) + 1):
            raise self._irregular(data, columns)
        table = symbols.reshape(-1, len(columns) + 1)
        values, ends = table[:, :-1], table[:, -1]
        ones = values == ord("1")
        if not (ones | (values == ord("0"))).all() or not (ends == ord("\n")).all():
            raise self._irregular(data, columns)
        if len(ones) != rows:
            raise InputError(f"{self.name}: {len(ones):,} lines, expected {rows:,} as in {like}")
        return ones

    def _irregular(self, data: bytes, columns: tuple[str, ...]) -> InputError:
        """Finds the first line that is not as it should be."""
        self.check_plain_text(data)
        for number, line in enumerate(data.decode("ascii").removesuffix("\n").split("\n"), 1):
            values = line.split()
            for column, value in zip(columns, values, strict=False):
                if value not in ("0", "1"):
                    return InputError(f"{self.name}, line {number}, {column}: found {value[:40]!r}, expected 0 or 1")
            if len(values) != len(columns):
                return InputError(f"{self.name}, line {number}: {len(values)} values, expected {len(columns)}")
        raise AssertionError(f"{self.name} is regular")


class NusWideFolder:
    """Finds the parts of NUS-WIDE anywhere below a folder, unpacked or zipped.

    Args:
        root: the folder.

    Attributes:
        photographs: photo id -> path relative to `root`.

    Raises:
        InputError: `root` is no folder.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            raise InputError(f"{root}: no such folder, expected the NUS-WIDE downloads")
        self.root = root
        self.photographs: dict[str, str] = {}
        self._unpacked: dict[str, list[TextFile]] = {}
        self._zipped: dict[str, list[TextFile]] = {}
        self._damaged_zips: list[str] = []
        seen = set()
        for folder, subfolders, names in os.walk(root, followlinks=True):
            # A link that leads back up would be walked for ever.
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders.sort()
            relative = os.path.relpath(folder, root)
            for name in sorted(names):
                self._add(os.path.normpath(os.path.join(relative, name)))

    def _add(self, name: str) -> None:
        stem, suffix = os.path.splitext(os.path.basename(name).lower())
        if suffix in PHOTOGRAPH_SUFFIXES and photo_id(stem).isdigit():
            self.photographs.setdefault(photo_id(stem), name)
        elif suffix == ".txt":
            self._unpacked.setdefault(stem + suffix, []).append(TextFile(name, self.root / name))
        elif suffix == ".zip":
            try:
                with zipfile.ZipFile(self.root / name) as archive:
                    members = archive.namelist()
            except MemoryError:
                raise
            except Exception:  # as in `TextFile.read`
                self._damaged_zips.append(name)
                return
            for member in members:
                key = PurePosixPath(member.replace("\\", "/")).name.lower()
                if key.endswith(".txt"):
                    file = TextFile(f"{name}/{member}", self.root / name, member)
                    self._zipped.setdefault(key, []).append(file)

    def check_complete(self) -> None:
        """Looks for all parts at once, so that a user downloads once.

        Raises:
            InputError: names what is missing and where it is usually found.
        """
        missing = {}
        for key, (name, download) in PARTS.items():
            if key not in self:
                missing.setdefault(download, []).append(name)
        if missing:
            parts = ", ".join(
                f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} (usually from {download})"
                for download, names in missing.items()
            )
            damaged = f"; damaged: {', '.join(self._damaged_zips)}" if self._damaged_zips else ""
            raise InputError(f"{self.root}: missing {parts}{damaged}; they are at {HOMEPAGE}")

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._unpacked or name.lower() in self._zipped

    def file(self, name: str) -> TextFile:
        """Finds a part by its file name; an unpacked one comes before a zipped one.

        Raises:
            InputError: two files of this name differ.
        """
        found = self._unpacked.get(name.lower()) or self._zipped[name.lower()]
        for other in found[1:]:
            if other.read() != found[0].read():
                raise InputError(f"{found[0].name} and {other.name} differ, expected one {name}")
        return found[0]


@dataclass(frozen=True)
class NusWide:
    """The official files, checked. n rows in the order of `Imagelist.txt`, 81 concepts.

    Attributes:
        photo_ids: n photo ids; a few occur twice.
        tags: bool (n, 81), the photographer's tags.
        ground_truth: bool (n, 81), the annotated concepts.
        train_list: the rows of the official train list, int (n_train,).
        test_list: the rows of the official test list, int (n_test,).
        notes: known faults of the official files that were met.
    """

    photo_ids: list[str]
    tags: np.ndarray
    ground_truth: np.ndarray
    train_list: np.ndarray
    test_list: np.ndarray
    notes: list[str]


def read_nus_wide(folder: NusWideFolder) -> NusWide:
    """Reads the official files and checks that they agree.

    Raises:
        InputError: a part is missing, damaged, or disagrees with another; names file and line.
    """
    folder.check_complete()
    _check_concepts(folder.file("Concepts81.txt"))
    image_list = folder.file("Imagelist.txt")
    images = _read_image_list(image_list)
    rows_of: dict[str, list[int]] = {}
    for row, path in enumerate(images):
        rows_of.setdefault(path, []).append(row)
    lists = {split: _find_listed(folder.file(f"{split}Imagelist.txt"), rows_of) for split in ("Train", "Test")}
    listed = {images[row] for rows in lists.values() for row in rows}
    for row, path in enumerate(images):
        if path not in listed:
            raise InputError(
                f"{image_list.name}, line {row + 1}: {path} is neither in TrainImagelist.txt nor in TestImagelist.txt"
            )

    tags = folder.file("AllTags81.txt").flags(CONCEPTS, len(images), "Imagelist.txt")
    ground_truth = np.empty_like(tags)
    notes = []
    for column, concept in enumerate(CONCEPTS):
        file = folder.file(f"Labels_{concept}.txt")
        truth = file.flags((concept,), len(images), "Imagelist.txt")[:, 0]
        ground_truth[:, column] = truth
        for split, rows in lists.items():
            name = f"Labels_{concept}_{split}.txt"
            if name in folder:
                notes += _compare(folder.file(name), concept, truth[rows], f"{split}Imagelist.txt")
    photo_ids = [photo_id(path) for path in images]
    return NusWide(photo_ids, tags, ground_truth, lists["Train"], lists["Test"], notes)


# One line of the official Labels_lake_Train.txt. Nothing is lost: AllLabels has the right value.
KNOWN_FAULT = b"-1130179"


def _compare(file: TextFile, concept: str, truth: np.ndarray, like: str) -> list[str]:
    """Compares a file of TrainTestLabels with the same labels in AllLabels; returns notes.

    TrainTestLabels is not needed for anything else. It shows whether the rows of AllLabels still
    belong to the images that the lists say.
    """
    notes, unknown = [], None
    position = file.read().find(KNOWN_FAULT)
    if position >= 0 and concept == "lake":
        unknown = file.read().count(b"\n", 0, position)
        notes.append(
            f"{file.name}, line {unknown + 1}: {KNOWN_FAULT.decode()} is a known fault of the "
            f"official file; used instead: {int(truth[unknown])} from AllLabels/Labels_lake.txt"
        )
    values = file.flags((concept,), len(truth), like, (KNOWN_FAULT, b"0") if notes else ())[:, 0]
    for line in np.flatnonzero(values != truth):
        if line != unknown:
            raise InputError(
                f"{file.name}, line {line + 1}: {int(values[line])}, "
                f"but AllLabels/Labels_{concept}.txt has {int(truth[line])} for this image"
            )
    return notes


def photo_id(path: str) -> str:
    """`actor/0001_2124494179.jpg` and `2124494179.jpg` are photograph 2124494179."""
    return path.rpartition("/")[2].partition(".")[0].rpartition("_")[2]


def _check_concepts(file: TextFile) -> None:
    lines = file.lines()
    for number, (found, expected) in enumerate(zip(lines, CONCEPTS, strict=False), 1):
        if found != expected:
            raise InputError(f"{file.name}, line {number}: found {found!r}, expected {expected!r}")
    if len(lines) != len(CONCEPTS):
        raise InputError(f"{file.name}: {len(lines)} lines, expected {len(CONCEPTS)} concepts")


def _read_image_list(file: TextFile) -> list[str]:
    paths = [line.replace("\\", "/") for line in file.lines()]
    for number, path in enumerate(paths, 1):
        if not LISTED_PATH.fullmatch(path):
            raise InputError(
                f"{file.name}, line {number}: found {path[:80]!r}, "
                r"expected a path such as actor\0001_2124494179.jpg"
            )
    return paths


def _find_listed(file: TextFile, rows_of: dict[str, list[int]]) -> np.ndarray:
    """The rows of Imagelist.txt that TrainImagelist.txt or TestImagelist.txt names, int (lines,).

    Args:
        file: the list.
        rows_of: path -> its rows in Imagelist.txt; usually one.
    """
    rows = []
    previous = -1
    for number, path in enumerate(_read_image_list(file), 1):
        candidates = rows_of.get(path)
        if candidates is None:
            raise InputError(f"{file.name}, line {number}: {path} is not in Imagelist.txt")
        row = next((row for row in candidates if row > previous), candidates[0])
        # Tags and labels belong to images by their line alone. Were the lists of different order,
        # then one of them has been sorted or shuffled, and nobody knows which.
        if row <= previous and len(candidates) == 1:
            raise InputError(
                f"{file.name}, line {number}: {path} does not come later in Imagelist.txt than the line "
                "before it; expected both lists in the same order, and each image once"
            )
        rows.append(row)
        previous = max(previous, row)
    return np.array(rows, int)


@dataclass(frozen=True)
class Selection:
    """The outcome of the paper's filter: rows of each split, and what was counted on the way."""

    rows: dict[str, np.ndarray]
    counts: dict


def select(data: NusWide) -> Selection:
    """Applies the paper's filter (section 4.1) and makes the splits.

    An image is kept if it has a tag and a ground truth, both among the 81 concepts, and its tags
    cover its ground truth. The official test list is `test`; of the official train list a tenth,
    chosen by a fixed seed, is `validation`. Images of the train list that have a tag but are not
    kept are `unlabeled`. A photo id that stands in both lists counts as one of test.
    """
    with_tags = data.tags.any(axis=1)
    with_truth = with_tags & data.ground_truth.any(axis=1)
    covered = with_truth & ~(data.ground_truth & ~data.tags).any(axis=1)

    ids = data.photo_ids
    train_ids = {ids[row] for row in data.train_list}
    test_ids = {ids[row] for row in data.test_list}
    kept: dict[str, int] = {}
    for row in np.flatnonzero(covered):
        kept.setdefault(ids[row], row)
    unlabeled: dict[str, int] = {}
    for row in data.train_list[(with_tags & ~covered)[data.train_list]]:
        if ids[row] not in test_ids and ids[row] not in kept:
            unlabeled.setdefault(ids[row], row)

    train = np.array([row for photo, row in kept.items() if photo not in test_ids], int)
    test = np.array([row for photo, row in kept.items() if photo in test_ids], int)
    in_validation = np.zeros(len(train), bool)
    num_validation = max(round(len(train) / 10), min(1, len(train) // 2))
    chosen = np.random.default_rng(0).permutation(len(train))[:num_validation]
    in_validation[chosen] = True
    rows = {
        "train": train[~in_validation],
        "validation": train[in_validation],
        "test": test,
        "unlabeled": np.array(list(unlabeled.values()), int),
    }

    kept_rows = np.array(list(kept.values()), int)
    num_tags = data.tags[kept_rows].sum(axis=1)
    ratio = data.ground_truth[kept_rows].sum(axis=1) / num_tags
    counts = {
        "rows": len(ids),
        "with_tags": int(with_tags.sum()),
        "with_tags_and_ground_truth": int(with_truth.sum()),
        "covered": int(covered.sum()),
        "kept": len(kept),
        "kept_in_train_list": int(covered[data.train_list].sum()),
        "kept_in_test_list": int(covered[data.test_list].sum()),
        "kept_with_two_or_more_tags": int((num_tags >= 2).sum()),
        "mean_important_ratio": round(float(ratio.mean()), 6) if len(ratio) else 0.0,
        "photo_ids_listed_twice": len(ids) - len(set(ids)),
        "photo_ids_in_both_lists": len(train_ids & test_ids),
        "notes": [
            "A photo id that is listed twice is kept once; one that is in both official lists is kept in test alone.",
            *data.notes,
        ],
    }
    return Selection(rows, counts)


def selected_items(data: NusWide, selection: Selection, photographs: dict[str, str]) -> Iterator[Item]:
    """The selected rows with their tags by name, split after split.

    Args:
        data: the official files.
        selection: rows of each split.
        photographs: photo id -> path.
    """
    for split, rows in selection.rows.items():
        for row in rows:
            photo = data.photo_ids[row]
            important = data.ground_truth[row] & (split != "unlabeled")
            yield Item(
                split,
                item_id=photo,
                photograph=photographs.get(photo),
                tags=[CONCEPTS[column] for column in data.tags[row].nonzero()[0]],
                important_tags=[CONCEPTS[column] for column in important.nonzero()[0]],
            )
