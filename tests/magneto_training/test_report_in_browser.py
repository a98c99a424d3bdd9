"""The report as people meet it: in a browser, from disk. Skipped where there is no Chromium."""

import functools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import COLORS, TINY_BACKBONE
from datasets import Dataset
from PIL import Image
from playwright.sync_api import Browser, Page

from magneto_training.arguments import PredictArguments
from magneto_training.prediction_parts import SCHEMA
from magneto_training.report import write_report
from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization, MagnetoProcessor

NASTY = "</script><img src=x onerror=alert(1)>"
# Item, tags with scores, selected, important.
ITEMS = [
    ("right", {"blue": 0.9, "green": 0.2}, ["blue"], ["blue"]),
    ("kept-wrong", {"blue": 0.9, "red": 0.8}, ["blue", "red"], ["blue"]),
    ("lost", {"red": 0.7, "yellow": 0.3, "green": 0.1}, ["red"], ["red", "yellow", "green"]),
    ("both", {"green": 0.6, "yellow": 0.4}, ["green"], ["yellow"]),
    (NASTY, {NASTY: 0.5}, [NASTY], [NASTY]),
]
METRICS = {
    "num_images": len(ITEMS),
    **dict.fromkeys(("precision", "recall", "f1", "reducible_f1"), 71.5),
    **dict.fromkeys(("keep_all_precision", "keep_all_recall", "keep_all_f1", "keep_all_reducible_f1"), 64.25),
}


@pytest.fixture(scope="module")
def report_file(tmp_path_factory):
    """The page of ITEMS, written once for each kind of model and of ground truth."""

    @functools.cache
    def make(streams: str, truth: bool) -> Path:
        return write_page(tmp_path_factory.mktemp("report"), ITEMS, streams, truth)

    return make


def write_page(folder: Path, items: list[tuple], streams: str = "both", truth: bool = True) -> Path:
    sizes = {"vocab_size": 6, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = MagnetoConfig(**sizes, backbone=TINY_BACKBONE, image_size=64, streams=streams)
    processor = MagnetoProcessor.from_vocabulary(sorted(COLORS), 64, use_images=streams != "tag")
    predictions = [
        {"item_id": item, "tags": list(scores), "scores": list(scores.values()), "selected_tags": selected}
        for item, scores, selected, _ in items
    ]
    pq.write_table(pa.Table.from_pylist(predictions, schema=SCHEMA), folder / "out.parquet")
    image = Image.radial_gradient("L").convert("RGB")
    rows = [
        {"item_id": item, "image": image, "tags": list(scores)} | ({"important_tags": important} if truth else {})
        for item, scores, _, important in items
    ]
    args = PredictArguments("model", "dataset", str(folder / "out.parquet"))
    model = MagnetoForTagSummarization(config).eval()
    return write_report(model, processor, Dataset.from_list(rows), args, METRICS if truth else {})


@pytest.fixture
def open_report(browser: Browser, report_file):
    """Opens the page of ITEMS; nothing may go wrong on it, and nothing may be loaded but the page itself."""
    problems, contexts = [], []

    def open_page(width: int = 1180, streams: str = "both", truth: bool = True) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if "://" in request.url[:8] else None)
        page.goto(report_file(streams, truth).as_uri())
        problems.remove(page.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def shown(page: Page) -> list[str]:
    return page.locator(".card:visible .id").all_text_contents()


def painted(page: Page, item: int) -> str:
    """The heat map of a card, as a data address."""
    return page.locator(".card").nth(item).locator("canvas").evaluate("canvas => canvas.toDataURL()")


def test_the_page_renders_cards_photographs_and_the_curve(open_report):
    page = open_report()

    assert shown(page) == [item for item, *_ in ITEMS]
    widths = page.locator(".card img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert widths == [256] * len(ITEMS)
    assert page.locator("svg polyline").bounding_box()["width"] > 100
    assert page.locator("output").text_content() == "5 of 5 images"


def test_cards_are_moved_only_where_their_order_changes(open_report):
    # To move thousands of them takes seconds.
    page = open_report()
    search, order = page.get_by_label("tag or item id"), page.get_by_label("order")
    page.evaluate("""() => {
        window.moved = 0;
        new MutationObserver(records => { for (const record of records) moved += record.addedNodes.length; })
            .observe(document.querySelector("main"), {childList: true});
    }""")

    def moved() -> int:
        return page.evaluate("moved")

    search.fill("blue")
    assert shown(page) == ["right", "kept-wrong"] and moved() == 0

    order.select_option("worst F1 first")
    assert shown(page) == ["kept-wrong", "right"] and moved() == 5
    search.fill("yellow")
    assert shown(page) == ["both", "lost"] and moved() == 5

    order.select_option("as in the dataset")
    assert shown(page) == ["lost", "both"] and moved() == 10


@pytest.mark.parametrize(
    "selected, important, expected",
    [
        ([], ["blue"], ["keep all: 25.0"]),
        (["red"], ["blue"], ["selected: 0.0", "keep all: 25.0"]),  # recall 0
        (["blue"], ["blue", "green", "red", "yellow"], ["keep all: 100.0", "selected: 100.0"]),  # recall 25
        (["blue", "red"], ["blue", "green"], ["keep all: 50.0", "selected: 50.0"]),  # recall 50
        (["blue"], ["blue"], ["keep all: 25.0", "selected: 100.0"]),  # recall 100
        (["blue", "green", "red", "yellow"], ["blue"], ["keep all: 25.0", "selected: 25.0"]),  # one point for both
        (
            ["blue", "green", "red", "yellow"],
            ["blue", "green", "red", "yellow"],
            ["keep all: 100.0", "selected: 100.0"],
        ),
    ],
)
def test_the_labels_of_the_curve_are_whole_and_apart(browser, tmp_path, selected, important, expected):
    scores = {"blue": 0.9, "green": 0.7, "red": 0.5, "yellow": 0.3}
    page = browser.new_page()
    page.goto(write_page(tmp_path, [("a", scores, selected, important)], "tag").as_uri())

    texts = page.locator("svg text").evaluate_all(
        "texts => texts.map(text => [text.textContent, text.classList.contains('label'), text.getBBox()])"
        ".map(([words, label, {x, y, width, height}]) => [words, label, x, y, x + width, y + height])"
    )
    page.close()

    assert sorted(words for words, label, *_ in texts if label) == sorted(expected)
    for index, (_, label, left, top, right, bottom) in enumerate(texts):
        if label:
            assert left >= 0 and top >= 0 and right <= 370 and bottom <= 232
            for _, _, *other in texts[:index]:
                apart = right < other[0] or other[2] < left or bottom - 2 < other[1] or other[3] - 2 < top
                assert apart, texts


def test_cards_out_of_sight_are_not_laid_out(open_report):
    cards = open_report().locator(".card")

    styles = cards.evaluate_all("cards => cards.map(card => getComputedStyle(card).contentVisibility)")
    assert styles == ["auto"] * len(ITEMS)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("any mistake", ["kept-wrong", "lost", "both"]),
        ("wrong tag kept", ["kept-wrong", "both"]),
        ("important tag lost", ["lost", "both"]),
    ],
)
def test_a_kind_of_mistake_filters(open_report, kind, expected):
    page = open_report()

    page.get_by_text(kind, exact=True).click()
    assert shown(page) == expected
    assert page.locator("output").text_content() == f"{len(expected)} of 5 images"

    page.get_by_text("all", exact=True).click()
    assert len(shown(page)) == 5


@pytest.mark.parametrize(
    "text, expected",
    [("YELL", ["lost", "both"]), ("kept-w", ["kept-wrong"]), ("purple", []), ("onerror", [NASTY])],
)
def test_the_search_finds_tags_and_item_ids(open_report, text, expected):
    page = open_report()

    page.get_by_label("tag or item id").fill(text)
    assert shown(page) == expected

    page.keyboard.press("Enter")  # does not leave the page
    assert shown(page) == expected


def test_search_and_mistakes_filter_together_and_the_worst_comes_first(open_report):
    page = open_report()

    page.get_by_label("order").select_option("worst F1 first")
    assert shown(page) == ["both", "lost", "kept-wrong", "right", NASTY]
    page.get_by_text("any mistake", exact=True).click()
    page.get_by_label("tag or item id").fill("blue")
    assert shown(page) == ["kept-wrong"]


def test_a_click_on_a_tag_keeps_its_heat_map_and_another_one_removes_it(open_report):
    page = open_report()
    card = page.locator(".card").nth(2)
    canvas, note = card.locator("canvas"), card.locator(".note")
    assert not canvas.is_visible()

    card.get_by_role("button", name="yellow").click()
    page.mouse.move(0, 0)
    assert canvas.is_visible()
    assert "peak" in note.text_content() and "picture" in note.text_content()
    assert canvas.bounding_box() == card.locator("img").bounding_box()
    assert page.locator("canvas:visible").count() == 1

    card.get_by_role("button", name="yellow").click()
    page.mouse.move(0, 0)
    assert not canvas.is_visible() and note.text_content() == ""


def test_pointing_at_a_tag_shows_its_heat_map_for_a_while(open_report):
    page = open_report()
    card = page.locator(".card").first
    card.get_by_role("button", name="blue").click()
    page.mouse.move(0, 0)
    kept = painted(page, 0)

    card.get_by_role("button", name="green").hover()
    assert painted(page, 0) != kept

    page.mouse.move(0, 0)
    assert painted(page, 0) == kept


def test_the_heat_maps_are_reached_by_the_keyboard(open_report):
    page = open_report()
    card = page.locator(".card").first
    page.get_by_label("order").focus()

    page.keyboard.press("Tab")
    assert card.get_by_role("button", name="blue").evaluate("button => button === document.activeElement")
    assert card.locator("canvas").is_visible()

    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")  # to the next card
    assert card.locator("canvas").is_visible()
    assert card.get_by_role("button", name="blue").get_attribute("aria-pressed") == "true"


def test_a_phone_needs_no_sideways_scrolling(open_report):
    page = open_report(width=390)

    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator(".card").first.bounding_box()["width"] > 300


def test_a_tag_only_page_without_ground_truth_filters_by_text_alone(open_report):
    page = open_report(streams="tag", truth=False)

    assert page.get_by_role("radio").count() == page.locator("canvas").count() == page.locator("svg").count() == 0
    page.locator(".card li").first.click()
    page.get_by_label("tag or item id").fill("yellow")
    assert shown(page) == ["lost", "both"]
