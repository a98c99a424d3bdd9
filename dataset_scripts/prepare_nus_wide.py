"""Turns the official NUS-WIDE downloads into a Parquet dataset for extractive tags summarization.

python dataset_scripts/prepare_nus_wide.py NUS_WIDE_DIR OUT [--no_images]
"""

import argparse
import sys
from pathlib import Path

from nus_wide import CONCEPTS, HOMEPAGE, NusWide, NusWideFolder, Selection, read_nus_wide, select
from parquet_dataset import InputError, Plan, PlanWriter, partial_folder, write_dataset


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nus_wide_dir", metavar="NUS_WIDE_DIR", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument("--no_images", action="store_true", help="tags only, without photographs")
    parser.add_argument(
        "--short_side", type=int, default=144, help="photographs are shrunk to this many pixels"
    )
    args = parser.parse_args()
    if args.short_side < 1:
        parser.error(f"--short_side is {args.short_side}, expected at least 1")
    try:
        prepare(args.nus_wide_dir, args.out, not args.no_images, args.short_side)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def prepare(nus_wide_dir: Path, out: Path, with_images: bool, short_side: int) -> None:
    """Reads, filters, plans and writes, in this order."""
    partial = partial_folder(out)
    folder = NusWideFolder(nus_wide_dir)
    data = read_nus_wide(folder)
    selection = select(data)
    for name, count in selection.counts.items():
        print(f"{name:>28}: {count:,}")
    if with_images and not folder.photographs:
        raise InputError(
            f"{nus_wide_dir}: no photographs, expected Flickr/<folder>/<nnnn>_<id>.jpg or <id>.jpg "
            f"(on request at {HOMEPAGE}); --no_images makes a dataset without them"
        )
    plan = Plan(partial / "plan", nus_wide_dir if with_images else None, selection.counts)
    write_plan(plan, data, selection, folder.photographs)
    counts = write_dataset(plan, out, short_side)
    for name, count in counts["splits"].items():
        print(f"{name:>28}: {count:,} rows")
    print(f"{out} is ready: load_dataset({str(out)!r})")


def write_plan(
    plan: Plan, data: NusWide, selection: Selection, photographs: dict[str, str]
) -> None:
    """Writes the rows of every split, with the tags by name."""
    writer = PlanWriter(plan.folder)
    for split, rows in selection.rows.items():
        for row in rows:
            photo = data.photo_ids[row]
            tags = [CONCEPTS[column] for column in data.tags[row].nonzero()[0]]
            important = [CONCEPTS[column] for column in data.ground_truth[row].nonzero()[0]]
            writer.add(
                split,
                photo,
                photographs.get(photo),
                tags,
                [] if split == "unlabeled" else important,
            )
    writer.close()


if __name__ == "__main__":
    sys.exit(main())
