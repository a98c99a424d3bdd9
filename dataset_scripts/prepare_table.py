"""Turns a table of your own photographs and tags into a Parquet dataset.

python dataset_scripts/prepare_table.py TABLE IMAGE_DIR OUT [--no_images]

The table is CSV, TSV, JSON Lines or Parquet, with a row for each photograph: item id, tags,
important tags (empty where unknown), and if you like the photograph's path below IMAGE_DIR. Without
important tags, all rows are unlabeled: for pretrain.py and predict.py.
"""

import argparse
import sys
from pathlib import Path

from dataset_card import CardText
from prepare_command import ArgumentParser, add_output_arguments, run, write
from tag_table import TableFormat, TagTable

STEPS = [
    ("rows", "rows of the table"),
    ("repeated_ids", "left out: the item id of an earlier row"),
    ("with_tags", "with at least one tag"),
    ("with_tags_and_important_tags", "and with at least one important tag"),
    ("not_covered", "left out, or in `unlabeled`: an important tag is not among the tags"),
    ("covered", "whose tags contain the important ones: kept"),
]


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", metavar="TABLE", type=Path, help=".csv, .tsv, .jsonl or .parquet")
    parser.add_argument("image_dir", metavar="IMAGE_DIR", type=Path, help="photographs; none may lie outside")
    add_output_arguments(parser)
    default = TableFormat()
    for field, meaning in {
        "id_column": "column of the item ids",
        "tags_column": "column of the tags; in the wide layout, what 0/1 columns begin with",
        "important_tags_column": "the same for the important tags; without it important_tags, and if the table "
        "has no such column either, all rows are unlabeled: their ground truth is unknown",
        "image_column": "column of the paths; without it, the photographs are called by item id",
        "split_column": "column that says train, validation or test; without it, a random tenth "
        "of the kept rows is test and another one validation",
        "tag_separator": "between tags in one cell",
        "column_separator": "between the columns of a CSV file",
    }.items():
        value = getattr(default, field)
        shown = "" if value is None else f" (default: {value})"
        parser.add_argument(f"--{field}", default=value, help=meaning + shown)
    return run(prepare, parser.parse_args())


def prepare(args: argparse.Namespace) -> None:
    layout = TableFormat(**{name: getattr(args, name) for name in TableFormat.__annotations__})
    table = TagTable(args.table, None if args.no_images else args.image_dir, layout)
    text = CardText(
        name=args.table.stem,
        metadata={},
        introduction="""Photographs with candidate tags (`tags`) and, where they are known, the
important ones among them (`important_tags`), prepared by `prepare_table.py` for
[MAGNeto](https://arxiv.org/abs/2011.04349), extractive tags summarization.""",
        steps=STEPS,
        ending="",
    )
    write(args, table.items(), args.image_dir, table.counts, text)


if __name__ == "__main__":
    sys.exit(main())
