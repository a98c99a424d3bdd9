"""What the commands share: their parser, the options of the prepare commands, and the way from items to a dataset."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from dataset_card import CardText, write_card
from hub_upload import check_upload, upload_dataset
from parquet_dataset import DatasetWriter, InputError, Item


class ArgumentParser(argparse.ArgumentParser):
    """Says what is wrong in one line on standard error, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds OUT and the options that every prepare command has."""
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument("--no_images", action="store_true", help="tags only, without photographs")
    parser.add_argument(
        "--short_side",
        type=int,
        default=144,
        help="photographs are shrunk to this many pixels on the short side (default 144); training at 224 px "
        "needs 473",
    )
    parser.add_argument("--push_to_hub", metavar="ID", help="publish the result as user/name")


def run(prepare: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Runs a command; bad input becomes one line on standard error.

    Returns:
        The exit status: 0, 1 for bad input, 130 after control-C.
    """
    try:
        if args.short_side < 1:
            raise InputError(f"--short_side is {args.short_side}, expected at least 1")
        if args.push_to_hub:
            check_upload(args.push_to_hub)
        prepare(args)
    # Not only bad input: a full disk, a folder without permission, a network share that is lost.
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except MemoryError:
        print("error: out of memory", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on behind the last finished shard", file=sys.stderr)
        return 130
    return 0


def write(
    args: argparse.Namespace,
    items: Iterator[Item],
    photograph_root: Path,
    counts: dict,
    text: CardText,
) -> None:
    """Writes the dataset, its card and counts, prints the counts, and publishes on request.

    Args:
        args: has what `add_output_arguments` adds.
        items: the rows.
        photograph_root: the folder that paths of photographs start from.
        counts: of the filter; complete when the items are exhausted.
        text: for the card.
    """
    root = None if args.no_images else photograph_root
    with DatasetWriter(args.out, root, args.short_side) as writer:
        for item in items:
            writer.add(item)
        counts = counts | writer.write_shards()
        write_card(writer.folder, text, counts, None if args.no_images else args.short_side)
        writer.publish(counts)

    flat = {key: value for key, value in counts.items() if key not in ("splits", "notes")}
    for name, value in (flat | counts["splits"]).items():
        print(f"{name:>28}  {value:,}")
    for note in counts.get("notes", []):
        print(note)
    if not args.no_images and counts["missing_images"] + counts["unreadable_images"]:
        print(f"photographs that cannot be used are listed in {args.out / 'missing_images.txt'}")
    labelled = any(rows for split, rows in counts["splits"].items() if split != "unlabeled")
    arguments = [str(args.out)] if labelled else [str(args.out), "unlabeled"]
    print(f"done: load_dataset({', '.join(map(repr, arguments))})")
    if args.push_to_hub:
        print(f"published: {upload_dataset(args.out, args.push_to_hub)}")
