import re
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from PIL import Image

from magneto_training.prediction import SCHEMA
from magneto_training.report import write_report

NASTY = "<script>alert('x')</script>"
METRICS = {
    "num_images": 3,
    **dict.fromkeys(("precision", "recall", "f1", "reducible_f1"), 71.5),
    **dict.fromkeys(("keep_all_precision", "keep_all_recall", "keep_all_f1", "keep_all_reducible_f1"), 64.25),
}
PREDICTIONS = [
    {"item_id": "right", "tags": ["sea", "boat"], "scores": [0.25, 0.75], "selected_tags": ["boat"]},
    {"item_id": "mistaken", "tags": ["sun", "tree"], "scores": [0.9, 0.4], "selected_tags": ["sun"]},
    {"item_id": NASTY, "tags": [NASTY.lower()], "scores": [0.5], "selected_tags": [NASTY.lower()]},
]
TRUTH = [["Boat"], ["tree"], [NASTY]]


class Items(HTMLParser):
    """The figures of a page: the classes of each, its caption, and (classes, name, score, truth) of each tag."""

    def __init__(self):
        super().__init__()
        self.elements, self.items, self.place = [], [], None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        classes = set(attributes.get("class", "").split())
        if tag == "figure":
            self.items.append({"classes": classes, "caption": "", "tags": []})
        elif tag == "li":
            self.items[-1]["tags"].append({"classes": classes, "name": "", "score": "", "truth": ""})
        self.place = "caption" if tag == "figcaption" else next(iter(classes)) if tag == "span" else None

    def handle_data(self, data):
        if self.place == "caption":
            self.items[-1]["caption"] += data
        elif self.place in ("name", "score", "truth"):
            self.items[-1]["tags"][-1][self.place] += data

    def handle_endtag(self, tag):
        self.place = None


def make_report(tmp_path, truth=TRUTH, metrics=METRICS, num_images=10) -> str:
    pq.write_table(pa.Table.from_pylist(PREDICTIONS, schema=SCHEMA), tmp_path / "out.parquet")
    rows = [{"item_id": row["item_id"], "image": Image.new("RGBA", (400, 200), "red")} for row in PREDICTIONS]
    if truth is not None:
        rows = [{**row, "important_tags": important} for row, important in zip(rows, truth, strict=True)]
    write_report(tmp_path / "report.html", tmp_path / "out.parquet", Dataset.from_list(rows), metrics, num_images)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def parse(page: str) -> Items:
    items = Items()
    items.feed(page)
    return items


def test_every_image_is_shown_with_its_tags_best_first(tmp_path):
    items = parse(make_report(tmp_path)).items

    assert [item["caption"] for item in items] == ["right", "mistaken", NASTY]
    assert [[(tag["name"], tag["score"]) for tag in item["tags"]] for item in items] == [
        [("boat", "0.75"), ("sea", "0.25")],
        [("sun", "0.90"), ("tree", "0.40")],
        [(NASTY.lower(), "0.50")],
    ]


def test_selected_and_important_tags_and_mistakes_are_marked(tmp_path):
    right, mistaken, nasty = parse(make_report(tmp_path)).items

    assert [(tag["classes"], tag["truth"]) for tag in right["tags"]] == [({"selected"}, "★"), (set(), "")]
    assert [(tag["classes"], tag["truth"]) for tag in mistaken["tags"]] == [
        ({"selected", "mistake"}, ""),
        ({"mistake"}, "★"),
    ]
    assert ["wrong" in item["classes"] for item in (right, mistaken, nasty)] == [False, True, False]


def test_text_from_the_data_is_escaped(tmp_path):
    page = make_report(tmp_path)

    assert "<script" not in page.lower()
    assert not [tag for tag, _ in parse(page).elements if tag == "script"]
    assert "&lt;script&gt;" in page


def test_the_page_loads_nothing_from_elsewhere(tmp_path):
    page = make_report(tmp_path)
    elements = parse(page).elements

    assert not re.search(r"(https?:)?//[a-z]|url\(|@import", page)
    assert not [tag for tag, _ in elements if tag in ("link", "iframe", "object", "embed", "base")]
    sources = [attributes["src"] for _, attributes in elements if "src" in attributes]
    assert len(sources) == 3 and all(source.startswith("data:image/jpeg;base64,") for source in sources)


def test_the_figures_stand_beside_keep_all(tmp_path):
    page = make_report(tmp_path)

    assert "71.50" in page and "keep all" in page and "64.25" in page


def test_without_ground_truth_nothing_is_called_a_mistake(tmp_path):
    page = make_report(tmp_path, truth=None, metrics={})
    items = parse(page).items

    assert len(items) == 3
    assert not any("wrong" in item["classes"] for item in items)
    assert not any("mistake" in tag["classes"] or tag["truth"] for item in items for tag in item["tags"])
    assert "keep all" not in page


@pytest.mark.parametrize("num_images", [1, 2])
def test_no_more_images_are_shown_than_asked_for(tmp_path, num_images):
    page = make_report(tmp_path, num_images=num_images)

    assert len(parse(page).items) == num_images
    assert f"of which the first {num_images} are shown" in " ".join(page.split())


def test_a_report_that_fails_leaves_the_old_page_and_nothing_else(tmp_path):
    (tmp_path / "report.html").write_text("the one before")
    pq.write_table(pa.Table.from_pylist(PREDICTIONS, schema=SCHEMA), tmp_path / "out.parquet")
    bad_rows = Dataset.from_list([{"item_id": "right", "important_tags": [""]}])  # no tag can be empty

    with pytest.raises(ValueError):
        write_report(tmp_path / "report.html", tmp_path / "out.parquet", bad_rows, METRICS, 5)

    assert (tmp_path / "report.html").read_text() == "the one before"
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "out.parquet"}
