"""Turns the official NUS-WIDE downloads into a Parquet dataset for extractive tags summarization.

python dataset_scripts/prepare_nus_wide.py NUS_WIDE_DIR OUT [--no_images]
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from dataset_card import CardText
from drawn_scenes import SAMPLE_MARKER
from nus_wide import HOMEPAGE, NusWideFolder, read_nus_wide, select, selected_items
from parquet_dataset import InputError
from prepare_command import ArgumentParser, add_output_arguments, run, write

CARD_TEXT = CardText(
    name="NUS-WIDE for extractive tags summarization",
    metadata={
        "language": ["en"],
        "license": "other",
        "license_name": "nus-wide",
        "license_link": HOMEPAGE,
        "annotations_creators": ["expert-generated"],
        "source_datasets": ["extended|nus-wide"],
    },
    introduction=f"""Flickr photographs with the tags of their photographers (`tags`) and the ones
that annotators confirmed (`important_tags`), both out of 81 concepts. Made from the files of
[NUS-WIDE]({HOMEPAGE}) by `prepare_nus_wide.py`, with the filter of section 4.1 of
[MAGNeto](https://arxiv.org/abs/2011.04349): kept are the images whose tags cover their ground
truth. The complete NUS-WIDE has 269,648 rows, of which 26,559 images are kept.

`test` is the official test list. `validation` is a tenth of the official train list, chosen by a
fixed seed. `unlabeled` holds the images of the official train list that have a tag but are not
kept; none of them is in `validation` or `test`. A photo id that is listed twice is kept once, and
one that stands in both official lists is kept in `test` alone.""",
    steps=[
        ("rows", "rows of the official list"),
        ("with_tags", "with at least one of the 81 tags"),
        ("with_tags_and_ground_truth", "and with at least one of the 81 concepts as ground truth"),
        ("covered", "whose tags cover the ground truth"),
        ("kept", "different photo ids among them: kept"),
        ("kept_in_train_list", "of these in the official train list"),
        ("kept_in_test_list", "of these in the official test list"),
        ("kept_with_two_or_more_tags", "kept with two or more tags"),
        ("mean_important_ratio", "mean share of important tags over kept images"),
    ],
    ending="""## Licence

NUS-WIDE is for research use. Each photograph belongs to its photographer, under the licence chosen
on Flickr; publish photographs only if you may.

## Citation

```bibtex
@inproceedings{chua2009nuswide,
  title = {{NUS-WIDE}: A Real-World Web Image Database from National University of Singapore},
  author = {Chua, Tat-Seng and Tang, Jinhui and Hong, Richang and Li, Haojie and Luo, Zhiping
            and Zheng, Yan-Tao},
  booktitle = {Proc. of ACM Conf. on Image and Video Retrieval (CIVR)},
  year = {2009}
}

@article{phung2020magneto,
  title = {{MAGNeto}: An Efficient Deep Learning Method for the Extractive Tags Summarization
           Problem},
  author = {Phung, Hieu Trong and Vu, Anh Tuan and Nguyen, Tung Dinh and Do, Lam Thanh
            and Ngo, Giang Nam and Tran, Trung Thanh and L\\^e, Ngoc C.},
  year = {2020}
}
```""",
)

SAMPLE_CARD_TEXT = replace(
    CARD_TEXT,
    name="Drawn sample for extractive tags summarization",
    metadata={"license": "apache-2.0", "annotations_creators": ["machine-generated"]},
    introduction="""Pictures drawn by `make_sample.py`, with 27 of the 81 concepts of NUS-WIDE as
tags. A tag is important if its thing is a main subject of the picture, and not if it is tiny, cut
off by the edge, or not in the picture at all; the tags alone do not tell. Prepared by
`prepare_nus_wide.py` like the real NUS-WIDE, for demonstrations and tests.""",
    ending="",
)


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nus_wide_dir", metavar="NUS_WIDE_DIR", type=Path, help="the downloads, unpacked or zipped")
    add_output_arguments(parser)
    return run(prepare, parser.parse_args())


def prepare(args: argparse.Namespace) -> None:
    folder = NusWideFolder(args.nus_wide_dir)
    data = read_nus_wide(folder)
    if not args.no_images and not folder.photographs:
        raise InputError(
            f"{args.nus_wide_dir}: no photographs, expected Flickr/<folder>/<nnnn>_<id>.jpg or "
            f"<id>.jpg (on request at {HOMEPAGE}); --no_images makes a dataset without them"
        )
    selection = select(data)
    if not selection.counts["kept"]:
        raise InputError(f"{args.nus_wide_dir}: the tags of no image cover its ground truth, so that none is kept")
    items = selected_items(data, selection, folder.photographs)
    drawn = (args.nus_wide_dir / SAMPLE_MARKER).exists()
    text = SAMPLE_CARD_TEXT if drawn else CARD_TEXT
    write(args, items, args.nus_wide_dir, selection.counts, text)


if __name__ == "__main__":
    sys.exit(main())
