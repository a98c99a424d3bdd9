"""Writes small files in the official layout of NUS-WIDE."""

from pathlib import Path
from typing import NamedTuple

from nus_wide import CONCEPTS


class Row(NamedTuple):
    """One image: its path, tags, ground truth, and the official lists that name it."""

    path: str
    tags: str
    truth: str
    lists: str = "Train"


def write_official_files(folder: Path, rows: list[Row]) -> Path:
    """Writes image lists, tags and ground truth, with the quirks of the official files."""
    for part in ("ConceptsList", "ImageList", "NUS_WID_Tags", "Groundtruth/AllLabels"):
        (folder / part).mkdir(parents=True)
    (folder / "ConceptsList/Concepts81.txt").write_text("\n".join(CONCEPTS) + "\n")
    for name, list_name in (("", ""), ("TrainI", "Train"), ("TestI", "Test")):
        lines = [row.path.replace("/", "\\") + "\r\n" for row in rows if list_name in row.lists]
        path = folder / f"ImageList/{name or 'I'}magelist.txt"
        path.write_text("".join(lines), newline="")
    table = [[str(int(concept in row.tags.split())) for concept in CONCEPTS] for row in rows]
    (folder / "NUS_WID_Tags/AllTags81.txt").write_text("".join(" ".join(values) + " \n" for values in table))
    for concept in CONCEPTS:
        (folder / f"Groundtruth/AllLabels/Labels_{concept}.txt").write_text(
            "".join(f"{int(concept in row.truth.split())}\n" for row in rows)
        )
    return folder
