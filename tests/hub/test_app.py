"""The demo page, in parts and in a browser; the latter is skipped where there is no Chromium."""

import contextlib
import importlib.util
import io
import re
import sys
from pathlib import Path

import gradio
import httpx
import numpy as np
import pytest
from huggingface_hub import SpaceCard
from PIL import Image, ImageOps
from playwright.sync_api import Browser, Page, expect
from small_endpoint import as_bytes, bomb, photograph, save_model
from transformers import pipeline

HUB = Path(__file__).parents[2] / "hub"
NASTY = '<img src=x onerror="alert(1)"> {{value}} ${alert(1)}'
TAGS = f"red, Blue\ngreen; {NASTY}"
NAMES = ["red", "blue", "green", NASTY]
UNREADABLE = "The photograph cannot be read. Try a JPEG or PNG."


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("app", HUB / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def summarizers(tmp_path_factory):
    """A pipeline for each kind of model."""
    folder = tmp_path_factory.mktemp("models")
    folders = {streams: str(save_model(folder / streams, streams)) for streams in ("both", "tag")}
    return {
        streams: pipeline("tag-summarization", model=path, trust_remote_code=True, device="cpu")
        for streams, path in folders.items()
    }


@pytest.fixture(scope="module")
def component(app, summarizers):
    """Where the page takes its photograph."""
    page = app.build(summarizers["both"], "tiny")
    (component,) = [block for block in page.blocks.values() if block.elem_id == "photograph"]
    return component


def as_sent(file: Path) -> dict:
    """An uploaded file, as the page sends it."""
    return {"path": str(file), "orig_name": file.name, "meta": {"_type": "gradio.FileData"}}


def test_the_page_ranks_as_the_pipeline_does(app, summarizers):
    expected = summarizers["both"](photograph(), candidate_labels=NAMES, return_attention=True, threshold=0.4)

    ranked = app.rank(summarizers["both"], photograph(), TAGS, False, 0.4)

    assert [{**item, "known": item["label"] in ("red", "blue", "green")} for item in expected] == ranked["result"]
    assert ranked["square"].size == app.SHOWN_SIZE


@pytest.mark.parametrize("text", ["", " ,\n;", None])
def test_without_tags_the_visitor_is_asked_for_some(app, summarizers, text):
    with pytest.raises(gradio.Error, match="Type some tags first"):
        app.rank(summarizers["both"], photograph(), text, True, 0.5)


def test_without_a_photograph_the_visitor_is_asked_for_one(app, summarizers):
    with pytest.raises(gradio.Error, match="Drop a photograph first"):
        app.rank(summarizers["both"], None, "red", True, 0.5)


def test_too_many_tags_are_refused(app, summarizers):
    with pytest.raises(gradio.Error, match="301 tags, at most 300"):
        app.rank(summarizers["both"], photograph(), ",".join(map(str, range(301))), True, 0.5)


def test_the_heat_map_is_hot_where_the_model_looked(app):
    square = Image.new("RGB", (60, 60), "white")

    pixels = np.asarray(app.heat_map(square, [[0.0, 0.1, 0.0], [0.0, 0.8, 0.0], [0.1, 0.0, 0.0]]), dtype=int)

    assert pixels.shape == (60, 60, 3)
    assert pixels.sum(-1).argmax() // 60 in range(20, 40)
    assert pixels[30, 30].sum() > pixels[10, 30].sum() > pixels[10, 10].sum()


@pytest.mark.parametrize("mode", ["I;16", "P"])
def test_photographs_of_other_modes_are_ranked_and_shown_as_they_look(app, summarizers, component, tmp_path, mode):
    if mode == "P":
        dropped = photograph().convert("P", palette=Image.Palette.ADAPTIVE)
        looks = dropped.convert("RGB")
    else:
        looks = photograph().convert("L")
        dropped = Image.fromarray(np.asarray(looks).astype(np.uint16) * 257)
    dropped.save(tmp_path / "photo.png")

    arrived = app.open_photograph(component, as_sent(tmp_path / "photo.png"))
    ranked = app.rank(summarizers["both"], arrived, TAGS, True, 0.5)

    assert arrived.mode == mode
    expected = app.rank(summarizers["both"], looks, TAGS, True, 0.5)
    assert ranked["result"] == expected["result"]
    assert ranked["square"].tobytes() == expected["square"].tobytes()
    attention = ranked["result"][0]["attention"]
    assert np.asarray(app.heat_map(ranked["square"], attention)).std() > 10, "the photograph shows through"


def test_a_photograph_is_turned_as_its_camera_was_held(app, summarizers, component, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation: a quarter turn
    photograph().save(tmp_path / "photo.png", exif=exif)

    ranked = app.rank(
        summarizers["both"], app.open_photograph(component, as_sent(tmp_path / "photo.png")), TAGS, True, 0.5
    )

    upright = photograph().transpose(Image.Transpose.ROTATE_270)
    assert ranked["result"] == app.rank(summarizers["both"], upright, TAGS, True, 0.5)["result"]
    assert ranked["square"].tobytes() == ImageOps.fit(upright, app.SHOWN_SIZE).tobytes()


UNREADABLE_FILES = {
    "photo.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "document.jpg": b"%PDF-1.4",
    "short.jpg": as_bytes(photograph(), "JPEG")[:2000],
    "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
    "address.jpg": b"https://127.0.0.1:1/photo.jpg",
    "empty.jpg": b"",
    "bomb.png": bomb(),
}


@pytest.mark.parametrize("name", UNREADABLE_FILES)
def test_an_unreadable_photograph_is_refused_in_words(app, component, tmp_path, monkeypatch, name):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    (tmp_path / name).write_bytes(UNREADABLE_FILES[name])

    with pytest.raises(gradio.Error) as raised:
        app.open_photograph(component, as_sent(tmp_path / name))

    assert raised.value.message == UNREADABLE
    assert not raised.value.print_exception


def test_a_missing_photograph_is_none(app, component):
    assert app.open_photograph(component, None) is None


@pytest.mark.parametrize(
    "selection, expected",
    [
        ({"rule": "expected_f1"}, "the set of tags that should fit best"),
        ({"rule": "threshold", "threshold": 0.3}, "a score of at least 0.30"),
        ({"rule": "top_k", "top_k": 3}, "the 3 best"),
    ],
)
def test_the_models_rule_is_put_in_words(app, selection, expected):
    assert app.describe_rule(selection) == expected


def test_the_gate_is_put_in_words(app):
    described = [app.describe({"gate": gate, "known": known}) for gate, known in ((0.83, True), (0.2, True), (0.6, 0))]

    assert described == [
        "picture decided, 83%",
        "other tags decided, 80%",
        "picture decided, 60% · not in the model's vocabulary",
    ]
    assert app.describe({"gate": None, "known": True}) == ""


def test_the_examples_suit_the_sample_and_are_small():
    sys.path.insert(0, str(HUB.parent / "dataset_scripts"))
    try:
        from drawn_scenes import DRAWN_CONCEPTS
    finally:
        sys.path.pop(0)
    pictures = sorted((HUB / "examples").glob("*.jpg"))

    assert len(pictures) == 3
    for picture in pictures:
        assert picture.stat().st_size < 20_000
        tags = picture.with_suffix(".txt").read_text().strip().split(", ")
        assert len(tags) > 4 and set(tags) <= set(DRAWN_CONCEPTS)


def test_the_folder_is_a_space():
    card = SpaceCard.load(HUB / "README.md")

    assert card.data.python_version == "3.11", "an older one has older libraries"
    assert card.data.sdk == "gradio" and (HUB / card.data.app_file).is_file()
    assert len(card.data.short_description) <= 60
    code = (HUB / "app.py").read_text()
    assert not re.search(r"^(from|import) (modeling_magneto|magneto_training)", code, re.MULTILINE)


@pytest.mark.parametrize(
    "environment, expected", [({}, "MODEL_ID is not set"), ({"MODEL_ID": "missing"}, "'missing' cannot be loaded")]
)
def test_without_a_model_the_page_does_not_start(app, tmp_path, monkeypatch, environment, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODEL_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(SystemExit, match=f"^app: error: .*{expected}[^\n]*$"):
        app.main()


# ---------------------------------------------------------------------------------------------------- in the browser


@pytest.fixture(scope="module")
def addresses(app, summarizers):
    """Where the page of each kind of model is served."""
    pages = {streams: app.build(summarizer, "tiny") for streams, summarizer in summarizers.items()}
    yield {
        streams: app.launch(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        for streams, page in pages.items()
    }
    for page in pages.values():
        with contextlib.redirect_stdout(io.StringIO()):
            page.close()


@pytest.fixture
def visit(browser: Browser, addresses):
    """Opens a page; nothing may go wrong on it, and nothing may be asked of any other machine."""
    problems, contexts = [], []

    def open_page(streams: str = "both", width: int = 1180) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        own = (addresses[streams], "data:", "blob:")
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: None if request.url.startswith(own) else problems.append(request.url))
        page.goto(addresses[streams])
        page.get_by_role("button", name="Rank the tags").wait_for()
        return page

    expect.set_options(timeout=60_000)
    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def upload(page: Page, folder: Path) -> None:
    photograph().save(folder / "photo.png")
    page.locator("#photograph input[type=file]").set_input_files(folder / "photo.png")
    page.locator("#photograph img").wait_for()


def rank(page: Page) -> None:
    page.get_by_label("Tags").fill(TAGS)
    page.get_by_role("button", name="Rank the tags").click()
    page.locator("#ranking li").nth(len(NAMES) - 1).wait_for()


def shown(page: Page) -> list[tuple[str, str, bool]]:
    """Label, score and mark of each tag on the page."""
    items = page.locator("#ranking li button").all()
    texts = [[item.locator(part).inner_text() for part in (".label", ".score", ".mark")] for item in items]
    return [(label, score, bool(mark)) for label, score, mark in texts]


def expected_of(summarizer, image, **rule) -> list[tuple[str, str, bool]]:
    result = summarizer(image, candidate_labels=NAMES, **rule)
    return [(item["label"], f"{item['score']:.2f}", item["selected"]) for item in result]


@pytest.mark.parametrize("width", [1180, 390])
def test_a_photograph_is_dropped_tags_are_typed_and_a_tag_shows_where_the_model_looked(
    visit, summarizers, tmp_path, width
):
    page = visit(width=width)
    upload(page, tmp_path)
    rank(page)

    assert shown(page) == expected_of(summarizers["both"], photograph())
    pressed, heat_map = page.locator("#ranking button[aria-pressed=true] .label"), page.locator("#heat-map img")
    best, second = (label for label, *_ in shown(page)[:2])
    expect(pressed).to_have_text(best)
    expect(page.locator("#heat-map")).to_contain_text(f"Where the model looked for: {best}")
    before = heat_map.get_attribute("src")

    page.locator("#ranking button").nth(1).click()

    expect(pressed).to_have_text(second)
    expect(page.locator("#heat-map")).to_contain_text(f"Where the model looked for: {second}")
    expect(heat_map).not_to_have_attribute("src", before)
    assert heat_map.evaluate("image => image.naturalWidth") == 480
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out


def test_the_threshold_takes_the_place_of_the_models_rule(visit, summarizers, tmp_path):
    page = visit()
    upload(page, tmp_path)
    rank(page)
    own_rule = page.get_by_label("Choose by the model's own rule")
    chosen = page.locator("#ranking p")
    expect(own_rule).to_be_checked()

    page.locator("#ranking button").nth(2).click()
    expect(page.locator("#ranking button[aria-pressed=true] .label")).to_have_text(shown(page)[2][0])

    slider = page.get_by_role("slider")
    slider.focus()
    slider.press("Home")  # 0: every tag

    expect(chosen).to_have_text("4 of 4 tags chosen")
    slider.press("End")  # 1: none
    expect(chosen).to_have_text("0 of 4 tags chosen")
    expect(own_rule).not_to_be_checked()
    expect(page.locator("#ranking button[aria-pressed=true] .label")).to_have_text(shown(page)[2][0])
    own_rule.check()
    by_rule = expected_of(summarizers["both"], photograph())
    expect(chosen).to_have_text(f"{sum(kept for *_, kept in by_rule)} of 4 tags chosen")
    assert shown(page) == by_rule


def test_an_example_is_ranked_at_a_click(visit, summarizers):
    page = visit()

    page.get_by_text("sky, mountain, plane, sun, horses, house").click()

    page.locator("#ranking li").nth(5).wait_for()
    tags = ["sky", "mountain", "plane", "sun", "horses", "house"]
    result = summarizers["both"](str(HUB / "examples/house.jpg"), candidate_labels=tags)
    assert [label for label, *_ in shown(page)] == [item["label"] for item in result]


def test_missing_input_gives_a_friendly_message_and_the_page_goes_on(visit, summarizers, tmp_path):
    page = visit()
    page.get_by_role("button", name="Rank the tags").click()
    page.get_by_text("Type some tags first").wait_for()
    page.get_by_label("Tags").fill("red")
    page.get_by_role("button", name="Rank the tags").click()
    page.get_by_text("Drop a photograph first").wait_for()

    upload(page, tmp_path)
    rank(page)

    assert shown(page) == expected_of(summarizers["both"], photograph())


@pytest.mark.parametrize("name", ["document.jpg", "short.jpg", "drawing.svg"])
def test_an_unreadable_photograph_gives_a_reason_and_the_page_goes_on(visit, summarizers, tmp_path, capsys, name):
    (tmp_path / name).write_bytes(UNREADABLE_FILES[name])
    page = visit()
    page.locator("#photograph input[type=file]").set_input_files(tmp_path / name)
    page.locator("#photograph img").wait_for(state="attached")
    page.get_by_label("Tags").fill(TAGS)

    page.get_by_role("button", name="Rank the tags").click()

    page.get_by_text(UNREADABLE).wait_for()
    assert capsys.readouterr() == ("", "")
    page.get_by_label("Clear").click()
    upload(page, tmp_path)
    rank(page)
    assert shown(page) == expected_of(summarizers["both"], photograph())


def test_no_visitor_names_a_file_of_the_server_or_sends_odd_values(addresses, tmp_path):
    address, own = f"{addresses['both'].rstrip('/')}/gradio_api", tmp_path / "private.png"
    Image.new("RGB", (40, 40), "red").save(own)

    def answer_to(path: str, text="red, blue", threshold=0.5) -> str:
        photograph = {"path": path, "meta": {"_type": "gradio.FileData"}}
        asked = httpx.post(f"{address}/call/submit", json={"data": [photograph, text, False, threshold]})
        return httpx.get(f"{address}/call/submit/{asked.json()['event_id']}").text

    (uploaded,) = httpx.post(f"{address}/upload", files={"files": own.open("rb")}).json()
    assert "event: complete" in answer_to(uploaded)
    for wrong in ({"text": 5}, {"text": ["red"]}, {"threshold": None}):
        assert "The tags are a text, and the threshold is a number." in answer_to(uploaded, **wrong)
    assert "event: error" in answer_to(str(own)) and "event: complete" not in answer_to(str(own))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_button_can_be_read(visit, theme):
    page = visit()
    page.goto(f"{page.url}?__theme={theme}")
    button = page.get_by_role("button", name="Rank the tags")
    button.wait_for()

    colours = []
    for pointed_at in (False, True):
        if pointed_at:
            at_rest = button.evaluate("b => getComputedStyle(b).backgroundColor")
            button.hover()
            expect(button).not_to_have_css("background-color", at_rest)
        style = button.evaluate("b => [getComputedStyle(b).color, getComputedStyle(b).backgroundColor]")
        colours.append([tuple(map(int, re.findall(r"\d+", colour)[:3])) for colour in style])

    assert colours[0] != colours[1]
    assert all(contrast(*pair) >= 4.5 for pair in colours)


def contrast(*colours: tuple[int, int, int]) -> float:
    """Of two colours, as the Web Content Accessibility Guidelines define it: 1 to 21."""
    luminances = []
    for colour in colours:
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (c / 255 for c in colour)]
        luminances.append(float(np.dot(linear, [0.2126, 0.7152, 0.0722])))
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


def test_a_tag_only_model_needs_no_photograph(visit, summarizers):
    page = visit("tag")
    assert page.locator("input[type=file]").count() == 0

    rank(page)

    assert shown(page) == expected_of(summarizers["tag"], None)
    assert page.locator("#heat-map img").count() == 0
    page.locator("#ranking button").nth(1).click()
    assert page.locator("#ranking button[aria-pressed=true]").count() == 0


def test_the_examples_of_a_tag_only_model_are_tags(visit, summarizers):
    page = visit("tag")
    example = page.get_by_text("sky, mountain, plane, sun, horses, house")
    example.wait_for()
    assert page.get_by_text("Photograph", exact=True).count() == 0

    example.click()

    page.locator("#ranking li").nth(5).wait_for()
    tags = ["sky", "mountain", "plane", "sun", "horses", "house"]
    result = summarizers["tag"](None, candidate_labels=tags)
    assert [label for label, *_ in shown(page)] == [item["label"] for item in result]
