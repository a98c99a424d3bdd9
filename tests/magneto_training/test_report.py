import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from PIL import Image

from magneto_training.arguments import PredictArguments
from magneto_training.prediction_parts import SCHEMA
from magneto_training.report import evenly_spread, write_report
from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization, MagnetoProcessor

NASTY = "</script><script>alert('x')</script>"
METRICS = {
    "num_images": 3,
    **dict.fromkeys(("precision", "recall", "f1", "reducible_f1"), 71.5),
    **dict.fromkeys(("keep_all_precision", "keep_all_recall", "keep_all_f1", "keep_all_reducible_f1"), 64.25),
}
PREDICTIONS = [
    {"item_id": "right", "tags": ["blue", "green"], "scores": [0.25, 0.75], "selected_tags": ["green"]},
    {"item_id": "mistaken", "tags": ["red", "yellow"], "scores": [0.9, 0.4], "selected_tags": ["red"]},
    {"item_id": NASTY, "tags": [NASTY], "scores": [0.5], "selected_tags": [NASTY]},
]
TRUTH = [["Green"], ["yellow"], [NASTY]]


class Page(HTMLParser):
    """A report: its elements, and of each card the attributes, the caption, and its tags by name."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.elements, self.cards, self.place, self.in_cards = text, [], [], None, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        classes = attributes.get("class", "").split()
        self.elements.append((tag, attributes))
        self.in_cards = tag == "main" or self.in_cards and tag != "script"
        if tag == "figure" and self.in_cards:
            self.cards.append({"id": "", "attributes": attributes, "photograph": None, "tags": []})
        elif tag == "img":
            self.cards[-1]["photograph"] = attributes["src"]
        elif tag == "li" and self.in_cards:
            self.cards[-1]["tags"].append({"classes": set(classes), "name": "", "score": "", "truth": ""})
        elif self.in_cards and self.cards and self.cards[-1]["tags"]:
            self.cards[-1]["tags"][-1].update({key: value for key, value in attributes.items() if key[:5] == "data-"})
            if "gate" in classes:
                self.cards[-1]["tags"][-1]["gate"] = attributes["aria-label"]
        self.place = classes[0] if classes else None

    def handle_data(self, data):
        if self.in_cards and self.cards:
            if self.place == "id":
                self.cards[-1]["id"] += data
            elif self.place in ("name", "score", "truth"):
                self.cards[-1]["tags"][-1][self.place] += data

    def handle_endtag(self, tag):
        self.place = None

    @property
    def words(self) -> str:
        return " ".join(re.sub(r"<[^>]*>", " ", self.text).split())


def decode_heat(heat: str) -> list[int]:
    return list(base64.b64decode(heat))


@pytest.fixture
def make_report(tmp_path, tiny_config):
    """Writes the page of given predictions; the model's own scores do not matter, gate and attention do."""

    def make(
        predictions=PREDICTIONS,
        truth=TRUTH,
        metrics=METRICS,
        image=True,
        image_size=64,
        streams="both",
        loaded_split=None,
        **args,
    ) -> Page:
        torch.manual_seed(1)
        config = MagnetoConfig(**{**tiny_config.to_dict(), "streams": streams, "image_size": image_size})
        make.model = MagnetoForTagSummarization(config).eval()
        make.processor = MagnetoProcessor.from_vocabulary(
            ["blue", "green", "red", "yellow"], image_size, use_images=streams != "tag"
        )
        pq.write_table(pa.Table.from_pylist(predictions, schema=SCHEMA), tmp_path / "out.parquet")
        rows = [{"item_id": row["item_id"], "tags": row["tags"]} for row in predictions]
        if "inject_outliers" in args:
            rows = [{**row, "tags": row["tags"][:2]} for row in rows]
        if image:
            photograph = Image.radial_gradient("L").resize((200, 100)).convert("RGB") if image is True else image
            rows = [{**row, "image": photograph} for row in rows]
        if truth is not None:
            rows = [{**row, "important_tags": important} for row, important in zip(rows, truth, strict=True)]
        make.dataset = Dataset.from_list(rows, split=loaded_split)
        names = {"model_name_or_path": "model", "dataset_name": "dataset"}
        args = PredictArguments(output_file=str(tmp_path / "out.parquet"), **{**names, **args})
        report_file = write_report(make.model, make.processor, make.dataset, args, metrics)
        assert report_file == tmp_path / "report.html"
        return Page(report_file.read_text(encoding="utf-8"))

    return make


def test_every_image_is_shown_with_the_predictions_scores_best_first(make_report):
    cards = make_report().cards

    assert [card["id"] for card in cards] == ["right", "mistaken", NASTY]
    assert [[(tag["name"], tag["score"]) for tag in card["tags"]] for card in cards] == [
        [("green", "0.75"), ("blue", "0.25")],
        [("red", "0.90"), ("yellow", "0.40")],
        [(NASTY, "0.50")],
    ]


def test_selected_and_important_tags_and_mistakes_are_marked(make_report):
    right, mistaken, nasty = make_report().cards

    assert [(tag["classes"], tag["truth"]) for tag in right["tags"]] == [({"selected"}, "★"), (set(), "")]
    assert [(tag["classes"], tag["truth"]) for tag in mistaken["tags"]] == [
        ({"selected", "mistake"}, ""),
        ({"mistake"}, "★"),
    ]
    assert [card["attributes"]["data-mistakes"] for card in (right, mistaken, nasty)] == ["", "wrong lost", ""]
    assert [card["attributes"]["data-f1"] for card in (right, mistaken, nasty)] == ["1.0000", "0.0000", "1.0000"]


def test_text_from_the_data_is_escaped(make_report):
    page = make_report()

    assert [tag for tag, _ in page.elements].count("script") == 1
    assert page.text.count("</script>") == 1 and "<script>alert" not in page.text


def test_the_page_loads_nothing_from_elsewhere(make_report):
    page = make_report()

    assert not re.search(r"https?:|href=|@import|url\((?!#plot\))", page.text)
    assert not [tag for tag, _ in page.elements if tag in ("link", "iframe", "object", "embed", "base")]
    sources = [attributes["src"] for _, attributes in page.elements if "src" in attributes]
    assert len(sources) == 3 and all(source.startswith("data:image/jpeg;base64,") for source in sources)


def test_the_totals_and_figures_stand_beside_keep_all(make_report):
    page = make_report()

    assert "71.50" in page.text and "keep all" in page.text and "64.25" in page.text
    assert "images 3 with a mistake 1 33 % tags kept 3 of 5, 60 %" in page.words


@pytest.mark.parametrize(
    "loaded_split, args, expected",
    [
        (None, {}, "model model , dataset dataset images"),
        ("train", {}, "model model , dataset dataset images"),  # so any table's split is called
        ("test", {}, "model model , dataset dataset , split test"),
        ("train", {"split": "held_out"}, "dataset dataset , split held_out"),
        ("train", {"dataset_config_name": "small", "split": "train"}, ", configuration small , split train"),
    ],
)
def test_the_model_and_the_dataset_are_named(make_report, loaded_split, args, expected):
    page = make_report(loaded_split=loaded_split, **args)

    assert expected in page.words


def test_the_names_of_model_and_dataset_are_escaped(make_report):
    page = make_report(model_name_or_path=f"a{NASTY}", dataset_name=f"b{NASTY}", split=f"c{NASTY}")

    escaped = "&lt;/script&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;"
    assert all(f"<b>{letter}{escaped}</b>" in page.text for letter in "abc")
    assert page.text.count("</script>") == 1


def test_what_is_undefined_is_a_dash(make_report):
    undefined = dict.fromkeys(("precision", "reducible_f1", "keep_all_reducible_f1"), math.nan)
    predictions = [{**row, "selected_tags": []} for row in PREDICTIONS]

    page = make_report(predictions, metrics={**METRICS, **undefined})

    assert "out 3 – 71.50 71.50 – keep all 64.25 64.25 64.25 –" in page.words
    assert not re.search(r"\bnan\b", page.words)


def test_a_single_image_is_called_one(make_report):
    assert "1 of 1 image " in make_report(PREDICTIONS[:1], TRUTH[:1]).words
    page = make_report(report_images=1)
    assert "images 3 of which 1 is shown" in page.words and "1 of 1 image " in page.words


def contrast(*colors: str) -> float:
    """Of WCAG 2, between two colours of three or six hexadecimal digits."""
    luminances = []
    for color in colors:
        digits = color if len(color) == 6 else "".join(2 * digit for digit in color)
        shares = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        luminances.append(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


def test_all_text_stands_out_in_both_themes(make_report):
    assert contrast("fff", "000") == pytest.approx(21)

    found = re.findall(r"--(\w+): light-dark\(#(\w+), #(\w+)\)", make_report().text)

    for theme in (1, 2):
        colors = {row[0]: row[theme] for row in found}
        for text in ("ink", "faint", "kept", "right", "wrong"):
            for ground in ("bar", "card", "page"):
                assert contrast(colors[text], colors[ground]) >= 4.5, (theme, text, ground)


def test_a_mistake_is_shown_in_its_colour_and_not_named_by_it(make_report):
    page = make_report()

    assert "in this colour a mistake: kept, but not important" in page.words
    legend = page.text[page.text.index('<ul class="legend">') : page.text.index("<form")]
    assert not re.search(r"\b(red|orange)\b", legend)


def test_the_curve_is_over_all_tags_and_marks_what_was_selected_and_keep_all(make_report):
    page = make_report()

    # By falling score: red (wrong), green (right), NASTY (right), yellow (right), blue (wrong).
    (polyline,) = [attributes["points"] for tag, attributes in page.elements if tag == "polyline"]
    points = [tuple(map(float, point.split(","))) for point in polyline.split()]
    curve = [((x - 44) / 3, 100 - (y - 14) / 180 * 50) for x, y in points]  # the vertical axis begins at 50
    expected = [(100, 60), (100, 75), (200 / 3, 200 / 3), (100 / 3, 50), (0, 0)]
    assert np.allclose(curve, expected, atol=0.1)
    assert "selected: 66.7" in page.words and "keep all: 60.0" in page.words


def test_images_without_ground_truth_are_not_judged(make_report):
    page = make_report(truth=[[], ["yellow"], None])

    assert [card["attributes"]["data-mistakes"] for card in page.cards] == ["", "wrong lost", ""]
    assert "with a mistake 1 100 % of 1 with ground truth" in page.words


@pytest.mark.parametrize("truth", [None, [[], [], []]])
def test_without_ground_truth_nothing_is_called_a_mistake(make_report, truth):
    page = make_report(truth=truth, metrics={})

    assert len(page.cards) == 3
    assert not any(card["attributes"]["data-mistakes"] for card in page.cards)
    assert not any("mistake" in tag["classes"] or tag["truth"] for card in page.cards for tag in card["tags"])
    assert "keep all" not in page.words and "<svg" not in page.text and 'name="mistake"' not in page.text


def test_heat_maps_and_gates_are_what_the_model_says_of_the_row(make_report):
    page = make_report()

    row = make_report.dataset[1]
    with torch.inference_mode():
        outputs = make_report.model(**make_report.processor(row["image"], row["tags"]), output_attentions=True)
    attention = outputs.attentions[0].mean(0)  # (L, R)
    assert attention.shape == (2, 4)
    tags = {tag["name"]: tag for tag in page.cards[1]["tags"]}
    for index, name in enumerate(row["tags"]):
        heat = decode_heat(tags[name]["data-heat"])
        assert max(heat) == 255
        assert np.allclose(np.array(heat) / 255, attention[index] / attention[index].max(), atol=0.01)
        share = outputs.gate[0, index].item()
        assert tags[name]["gate"] == f"picture {100 * share:.0f} %, tags {100 * (1 - share):.0f} %"
        assert tags[name]["data-note"] == f"{tags[name]['gate']}; peak {100 * attention[index].max():.0f} %"


def test_the_photograph_is_the_square_that_the_model_saw(make_report):
    photograph = Image.new("RGB", (300, 100), "red")
    photograph.paste("green", (100, 0, 200, 100))

    card = make_report(image=photograph).cards[0]

    data = base64.b64decode(card["photograph"].partition("base64,")[2])
    shown = Image.open(io.BytesIO(data)).convert("RGB")
    assert shown.size == (100, 100)
    assert np.abs(np.asarray(shown, dtype=int) - (0, 128, 0)).max() < 8


def test_the_cameras_notes_are_not_in_the_page(make_report):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x010F] = "a secret place"
    Image.new("RGB", (300, 100), "red").save(file, "JPEG", exif=exif, comment=b"a secret place")
    assert file.getvalue().count(b"secret") == 2

    card = make_report(image=Image.open(file)).cards[0]

    data = base64.b64decode(card["photograph"].partition("base64,")[2])
    assert data.startswith(b"\xff\xd8") and b"secret" not in data


def test_a_single_region_is_no_heat_map(make_report):
    page = make_report(image_size=32)

    assert not any("data-heat" in tag for card in page.cards for tag in card["tags"])
    assert all("gate" in tag for card in page.cards for tag in card["tags"])
    assert "no telling where a tag looked" in page.words


@pytest.mark.parametrize("streams, has_heat", [("image", True), ("tag", False)])
def test_a_single_stream_has_no_gate(make_report, streams, has_heat):
    page = make_report(streams=streams)

    tags = [tag for card in page.cards for tag in card["tags"]]
    assert not any("gate" in tag for tag in tags) and "what decided" not in page.words
    assert all(("data-heat" in tag) == has_heat for tag in tags)
    assert all(card["photograph"] for card in page.cards)


def test_without_photographs_the_tags_are_shown(make_report):
    page = make_report(streams="tag", image=False)

    assert [card["photograph"] for card in page.cards] == [None] * 3
    assert [len(card["tags"]) for card in page.cards] == [2, 2, 1]


def test_injected_tags_are_marked_and_kept_ones_are_mistakes(make_report):
    # The row's own tags are blue and green: an outlier for each of them leaves only red and yellow to draw.
    prediction = {
        "item_id": "a",
        "tags": ["blue", "green", "red", "yellow"],
        "scores": [0.9, 0.8, 0.7, 0.1],
        "selected_tags": ["blue", "green", "red"],
    }
    metrics = {"outlier_percent": 100.0}

    page = make_report([prediction], truth=None, metrics=metrics, inject_outliers=1.0)

    (card,) = page.cards
    assert {tag["name"]: tag["classes"] for tag in card["tags"]} == {
        "blue": {"selected"},
        "green": {"selected"},
        "red": {"selected", "mistake", "strange"},
        "yellow": {"strange"},
    }
    assert card["attributes"]["data-mistakes"] == "strange"
    assert "100.00 % of the images keep a strange tag" in page.words


@pytest.mark.parametrize(
    "total, count, expected",
    [(10, 3, [0, 3, 6]), (3, 10, [0, 1, 2]), (4, 4, [0, 1, 2, 3]), (787, 1, [0]), (0, 5, [])],
)
def test_a_sample_is_evenly_spread(total, count, expected):
    assert evenly_spread(total, count) == expected


def test_no_more_images_are_shown_than_asked_for_and_the_figures_are_of_all(make_report):
    predictions = [{**PREDICTIONS[index % 2], "item_id": f"im{index}"} for index in range(6)]
    page = make_report(predictions, truth=[TRUTH[index % 2] for index in range(6)], report_images=2)

    assert [card["id"] for card in page.cards] == ["im0", "im3"]
    assert "images 6 of which 2, evenly spread, are shown" in page.words
    assert "with a mistake 3 50 %" in page.words


def test_a_later_prediction_into_the_same_folder_has_its_report_in_the_place_of_the_earlier(make_report, tmp_path):
    Path(tmp_path / "report.html").write_text("the one before")

    page = make_report()

    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page.text and "out.parquet" in page.words


def test_a_report_that_fails_leaves_the_old_page_and_nothing_else(make_report, tmp_path):
    Path(tmp_path / "report.html").write_text("the one before")

    with pytest.raises(ValueError):
        make_report(truth=[[""], ["yellow"], [NASTY]])  # no tag can be empty

    assert (tmp_path / "report.html").read_text() == "the one before"
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "out.parquet"}


def test_a_local_folder_is_named_without_its_path(make_report, tmp_path):
    page = make_report(dataset_name=str(tmp_path))

    assert f"<b>{tmp_path.name}</b>" in page.text and str(tmp_path) not in page.text
