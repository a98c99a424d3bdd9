import base64
import functools
import http.server
import io
import json
import socket
import struct
import threading

import datasets
import numpy as np
import pytest
import torch
from conftest import make_rows, run_alone
from PIL import Image
from transformers import pipeline

from modeling_magneto import (
    MagnetoConfig,
    MagnetoForOutlierDetection,
    MagnetoForTagSummarization,
    MagnetoProcessor,
    TagSummarizationPipeline,
)

TAGS = ["red", "Blue ", "blue", "unheard of"]


@pytest.fixture
def summarizer(tiny_model, processor) -> TagSummarizationPipeline:
    return pipeline("tag-summarization", model=tiny_model, processor=processor, device="cpu")


@pytest.fixture
def tag_only(tiny_config) -> TagSummarizationPipeline:
    config = MagnetoConfig(**{**tiny_config.to_dict(), "streams": "tag"})
    processor = MagnetoProcessor.from_vocabulary(["blue", "green", "red", "yellow"], use_images=False)
    model = MagnetoForTagSummarization(config).eval()
    return pipeline("tag-summarization", model=model, processor=processor, device="cpu")


def photograph(seed: int = 0, size: tuple[int, int] = (60, 40)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def deep_photograph() -> Image.Image:
    """In 16-bit grey."""
    return Image.fromarray(np.asarray(photograph().convert("L")).astype(np.uint16) * 257)


def as_bytes(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def assert_same(found: list[dict], expected: list[dict], atol: float = 0.0):
    assert [item["label"] for item in found] == [item["label"] for item in expected]
    assert [item["score"] for item in found] == pytest.approx([item["score"] for item in expected], abs=atol, rel=0)
    assert [item["selected"] for item in found] == [item["selected"] for item in expected]


# ------------------------------------------------------------------------------------------------------------- results


def test_tags_come_normalised_best_first_with_the_scores_of_model_and_processor(summarizer, tiny_model, processor):
    result = summarizer(photograph(), candidate_labels=TAGS)

    with torch.no_grad():
        outputs = tiny_model(**processor(photograph(), TAGS))
    (expected,) = processor.post_process(outputs, TAGS)
    assert {item["label"]: item["score"] for item in result} == dict(expected["tags"])
    assert {item["label"] for item in result if item["selected"]} == set(expected["selected_tags"])
    assert [item["label"] for item in result] == sorted(
        ["red", "blue", "unheard of"], key=lambda tag: -dict(expected["tags"])[tag]
    )
    assert json.loads(json.dumps(result)) == result


def test_batches_with_padding_score_like_single_photographs(summarizer):
    photographs = [photograph(seed, size=(40 + 7 * seed, 50)) for seed in range(7)]
    tags = [["red", "blue", "green", "yellow", "sea", "sky"][: 1 + seed % 6] for seed in range(7)]
    expected = [
        summarizer(image, candidate_labels=labels, return_attention=True)
        for image, labels in zip(photographs, tags, strict=True)
    ]

    for batch_size in (1, 3, 7):
        found = summarizer(photographs, candidate_labels=tags, batch_size=batch_size, return_attention=True)

        assert len(found) == 7
        for result, single in zip(found, expected, strict=True):
            assert_same(result, single, atol=1e-5)
            for item, single_item in zip(result, single, strict=True):
                np.testing.assert_allclose(item["attention"], single_item["attention"], atol=1e-5)


def test_the_rule_is_the_processors_unless_the_call_says_otherwise(summarizer, tiny_model, processor):
    scores = sorted((item["score"] for item in summarizer(photograph(), candidate_labels=TAGS)), reverse=True)

    best = summarizer(photograph(), candidate_labels=TAGS, top_k=1)
    two = summarizer(photograph(), candidate_labels=TAGS, threshold=scores[1])
    all_photographs = summarizer([photograph()] * 3, candidate_labels=TAGS, top_k=2, batch_size=2)
    always_one = pipeline("tag-summarization", model=tiny_model, processor=processor, device="cpu", top_k=1)

    assert [item["selected"] for item in best] == [True, False, False]
    assert [item["selected"] for item in two] == [True, True, False]
    assert [[item["selected"] for item in result] for result in all_photographs] == [[True, True, False]] * 3
    assert_same(always_one(photograph(), candidate_labels=TAGS), best)
    # A call's rule replaces the pipeline's as a whole: they are not mixed.
    assert_same(always_one(photograph(), candidate_labels=TAGS, threshold=scores[1]), two)
    assert_same(always_one(photograph(), candidate_labels=TAGS), best)


def test_the_expected_f1_rule_is_a_call_away(summarizer, tiny_model, processor):
    result = summarizer(photograph(), candidate_labels=TAGS, selection="expected_f1")

    with torch.no_grad():
        outputs = tiny_model(**processor(photograph(), TAGS))
    (expected,) = processor.post_process(outputs, TAGS, selection="expected_f1")
    assert {item["label"] for item in result if item["selected"]} == set(expected["selected_tags"])


def test_attention_is_a_heat_map_for_each_tag(tiny_config):
    config = MagnetoConfig(**{**tiny_config.to_dict(), "image_size": 96})
    model, processor = MagnetoForTagSummarization(config).eval(), MagnetoProcessor.from_vocabulary(["red"], 96)
    summarizer = pipeline("tag-summarization", model=model, processor=processor, device="cpu")

    result = summarizer(photograph(), candidate_labels=["red", "blue"], return_attention=True)

    with torch.no_grad():
        outputs = model(**processor(photograph(), ["red", "blue"]), output_attentions=True)
    expected = dict(zip(["red", "blue"], outputs.attentions[0].mean(0).reshape(2, 3, 3), strict=True))
    gates = dict(zip(["red", "blue"], outputs.gate[0].tolist(), strict=True))
    for item in result:
        assert sum(map(sum, item["attention"])) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(item["attention"], expected[item["label"]], atol=1e-7)
        assert item["gate"] == pytest.approx(gates[item["label"]], abs=1e-6)
    assert "attention" not in summarizer(photograph(), candidate_labels=["red"])[0]


def test_a_tag_only_model_needs_no_photograph(tag_only):
    single = tag_only(candidate_labels=["red", "blue"], return_attention=True)
    several = tag_only(candidate_labels=[["red", "blue"], ["green"], ["blue", "red", "sea"]], batch_size=2)

    assert {item["label"] for item in single} == {"red", "blue"}
    assert [(item["attention"], item["gate"]) for item in single] == [(None, None)] * 2
    assert [len(result) for result in several] == [2, 1, 3]
    assert_same(several[0], single, atol=1e-5)
    assert_same(tag_only(photograph(), candidate_labels=["red", "blue"]), single)
    assert_same(tag_only({"candidate_labels": ["red", "blue"]}), single)


# -------------------------------------------------------------------------------------------------------------- inputs


@pytest.fixture(scope="module")
def photograph_url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "moved").mkdir()  # without a slash at the end, the server sends those who ask for it to `moved/`
    photograph().save(folder / "photo.png")
    photograph().save(folder / "moved" / "index.html", "PNG")
    deep_photograph().save(folder / "deep.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/photo.png"
        server.shutdown()


@pytest.mark.parametrize("kind", ["path", "text of a path", "bytes", "base64", "data URL", "URL", "RGBA", "mapping"])
def test_a_photograph_may_come_in_any_form(summarizer, tmp_path, photograph_url, monkeypatch, kind):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    photograph().save(tmp_path / "photo.png")
    encoded = base64.b64encode(as_bytes(photograph())).decode()
    image = {
        "path": tmp_path / "photo.png",
        "text of a path": str(tmp_path / "photo.png"),
        "bytes": as_bytes(photograph()),
        "base64": encoded,
        "data URL": f"data:image/png;base64,{encoded}",
        "URL": photograph_url,
        "RGBA": photograph().convert("RGBA"),
        "mapping": {"image": photograph()},
    }[kind]

    assert_same(summarizer(image, candidate_labels=TAGS), summarizer(photograph(), candidate_labels=TAGS))


def test_an_address_is_followed_and_what_a_server_refuses_is_told(summarizer, photograph_url, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    expected = summarizer(photograph(), candidate_labels=TAGS)

    assert_same(summarizer(photograph_url.replace("photo.png", "moved"), candidate_labels=TAGS), expected)
    with pytest.raises(ValueError, match=r"cannot be read \(HTTPStatusError\): expected a path, a URL"):
        summarizer(photograph_url.replace("photo", "missing"), candidate_labels=TAGS)


def test_tags_may_come_as_arrays(summarizer):
    expected = summarizer([photograph()] * 2, candidate_labels=[TAGS, TAGS[:1]])

    assert summarizer([photograph()] * 2, candidate_labels=[np.array(TAGS), np.array(TAGS[:1])]) == expected
    assert summarizer(photograph(), candidate_labels=np.array(TAGS)) == expected[0]


def test_base64_may_be_broken_into_lines_but_holds_nothing_else(summarizer):
    lines = base64.encodebytes(as_bytes(photograph())).decode()
    assert lines.count("\n") > 10

    for text in (lines, f"data:image/png;base64,{lines}"):
        assert_same(summarizer(text, candidate_labels=TAGS), summarizer(photograph(), candidate_labels=TAGS))
        problem = "ValueError" if text.startswith("data:") else "FileNotFoundError"
        with pytest.raises(ValueError, match=rf"cannot be read \({problem}\)"):
            summarizer(text + "?", candidate_labels=TAGS)


def test_a_server_that_sends_nothing_is_not_waited_for_beyond_the_timeout(summarizer, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/photo.png"

        with pytest.raises(ValueError, match=r"photo.png' cannot be read \(ReadTimeout\)"):
            summarizer(address, candidate_labels=["red"], timeout=0.1)


def test_a_photograph_is_turned_upright(summarizer):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    lying = as_bytes(photograph().transpose(Image.Transpose.ROTATE_90), exif=exif)

    assert_same(summarizer(lying, candidate_labels=TAGS), summarizer(photograph(), candidate_labels=TAGS))
    opened = Image.open(io.BytesIO(lying))
    assert_same(summarizer(opened, candidate_labels=TAGS), summarizer(photograph(), candidate_labels=TAGS))


def test_16_bit_grey_keeps_its_range_whatever_way_it_comes(summarizer, tmp_path, photograph_url, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    deep, file = deep_photograph(), tmp_path / "deep.png"
    deep.save(file)
    encoded = base64.b64encode(file.read_bytes()).decode()
    address = photograph_url.replace("photo", "deep")
    expected = summarizer(photograph().convert("L"), candidate_labels=TAGS)

    for image in (deep, file, str(file), file.read_bytes(), address, encoded, f"data:image/png;base64,{encoded}"):
        assert_same(summarizer(image, candidate_labels=TAGS), expected)


def test_odd_exif_data_are_no_fault_of_a_photograph_whatever_way_it_comes(summarizer):
    # Lies on its side, and has a resolution that is text, which Pillow cannot write again.
    entries = [struct.pack("<HHII", 0x0112, 3, 1, 6), struct.pack("<HHI4s", 0x011A, 2, 4, b"odd")]
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    file = as_bytes(photograph().transpose(Image.Transpose.ROTATE_90), exif=exif)
    expected = summarizer(photograph(), candidate_labels=TAGS)

    for image in (file, base64.b64encode(file).decode()):
        assert_same(summarizer(image, candidate_labels=TAGS), expected)


def test_lists_share_one_list_of_tags_or_bring_their_own(summarizer):
    photographs = [photograph(seed) for seed in range(3)]
    expected = [summarizer(image, candidate_labels=["red", "blue"]) for image in photographs]

    shared = summarizer(photographs, candidate_labels=["red", "blue"])
    own = summarizer(photographs, candidate_labels=[["red", "blue"], ["green"], ["blue", "red"]])
    rows = summarizer(
        [{"image": photographs[0], "candidate_labels": ["red", "blue"]}, {"image": photographs[1]}],
        candidate_labels=["blue"],
    )

    for found, single in zip(shared, expected, strict=True):
        assert_same(found, single)
    assert_same(own[0], expected[0])
    assert [[item["label"] for item in result] for result in own[1:2]] == [["green"]]
    assert_same(rows[0], expected[0])
    assert [item["label"] for item in rows[1]] == ["blue"]
    assert summarizer([], candidate_labels=["red"]) == []


def test_a_generator_is_read_as_results_are_taken(summarizer):
    taken = []

    def rows():
        for row in make_rows(50):
            taken.append(row["item_id"])
            yield {"image": row["image"], "candidate_labels": row["tags"]}

    results = summarizer(rows(), batch_size=4)
    first = next(iter(results))

    assert len(taken) < 15
    row = make_rows(1)[0]
    assert_same(first, summarizer(row["image"], candidate_labels=row["tags"]), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", ["datasets", "iterable datasets", "torch", "generator of photographs"])
def test_datasets_are_streamed(summarizer, kind, batch_size):
    rows = [{"image": row["image"], "candidate_labels": ["red", "blue"]} for row in make_rows(9)]
    expected = [summarizer(row) for row in rows]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index]

    inputs, labels = {
        "datasets": (dataset, None),
        "iterable datasets": (dataset.to_iterable_dataset(), None),
        "torch": (Rows(), None),
        "generator of photographs": ((row["image"] for row in rows), ["red", "blue"]),
    }[kind]

    found = list(summarizer(inputs, candidate_labels=labels, batch_size=batch_size))

    assert len(found) == 9
    for result, single in zip(found, expected, strict=True):
        assert_same(result, single, atol=1e-5)


@pytest.mark.parametrize(
    "image, labels, options, message",
    [
        (photograph(), None, {}, "candidate_labels is missing"),
        (photograph(), [], {}, "candidate_labels: found an empty list"),
        (photograph(), ["red", " "], {}, "candidate_labels: found an empty tag"),
        (photograph(), "red, blue", {}, "candidate_labels: found the text"),
        (photograph(), ["red", 3], {}, "candidate_labels: found the tag 3 of type int"),
        (photograph(), 3, {}, "candidate_labels: "),
        (None, ["red"], {}, "images is missing"),
        ([photograph()] * 3, [["red"], ["blue"]], {}, "found 3 photographs for 2 lists of tags, expected as many"),
        ([photograph()], [["red"], ["blue"]], {}, "found 1 photographs for 2 lists of tags"),
        (
            photograph(),
            [["red"], ["blue"]],
            {},
            "an image of type Image for several lists of tags, expected a list of",
        ),
        ("photo.jpg", [["red"], ["blue"]], {}, "an image of type str for several lists of tags, expected a list of"),
        (
            iter([photograph()]),
            [["red"], ["blue"]],
            {},
            "type list_iterator for several lists of tags, expected a list",
        ),
        ("no_such_photo.jpg", ["red"], {}, "the photograph 'no_such_photo.jpg' cannot be read"),
        ("A" * 100_000, ["red"], {}, "the photograph 'AAAA"),
        (b"no photograph", ["red"], {}, "the photograph b'no photograph' cannot be read"),
        (as_bytes(photograph())[:200], ["red"], {}, "cannot be read"),
        (np.zeros((4, 4, 3), np.uint8), ["red"], {}, "the photograph of type ndarray cannot be read"),
        (photograph(), ["red"], {"threshold": 2}, "threshold is 2"),
        (photograph(), ["red"], {"top_k": 0}, "top_k is 0"),
        (photograph(), ["red"], {"threshold": 0.5, "top_k": 1}, "threshold is 0.5 and top_k is 1, expected only one"),
        (photograph(), ["red"], {"selection": "best"}, "'best'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(summarizer, image, labels, options, message):
    with pytest.raises(ValueError) as raised:
        summarizer(image, candidate_labels=labels, **options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_an_unknown_argument_is_refused(summarizer):
    with pytest.raises(TypeError, match="treshold"):
        summarizer(photograph(), candidate_labels=["red"], treshold=0.3)


# -------------------------------------------------------------------------------------------------------------- saving

SCRIPT = """
import json, sys
from transformers import pipeline
summarizer = pipeline("tag-summarization", model="model", trust_remote_code=True)
print(json.dumps(summarizer("photo.png", candidate_labels=["red", "Blue ", "blue", "unheard of"], top_k=1)))
assert "modeling_magneto" not in sys.modules and type(summarizer).__name__ == "TagSummarizationPipeline"
summarizer.save_pretrained("again")
"""


def test_a_saved_folder_brings_its_pipeline_into_a_new_process(summarizer, tmp_path):
    summarizer.model.save_pretrained(tmp_path / "model")
    summarizer.processor.save_pretrained(tmp_path / "model")
    photograph().save(tmp_path / "photo.png")

    printed = run_alone(SCRIPT, tmp_path)

    expected = summarizer(photograph(), candidate_labels=TAGS, top_k=1)
    assert_same(json.loads(printed), expected, atol=1e-6)
    # What was loaded from a folder's own code is saved with it again.
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir() if path.name != "__pycache__"} == names
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "model" / "config.json").read_text()


def test_beside_this_package_a_saved_folder_is_loaded_as_well(summarizer, tmp_path):
    summarizer.save_pretrained(tmp_path / "model")

    loaded = pipeline("tag-summarization", model=str(tmp_path / "model"), trust_remote_code=True, device="cpu")
    own = pipeline(
        "tag-summarization", model=str(tmp_path / "model"), pipeline_class=TagSummarizationPipeline, device="cpu"
    )

    assert type(own) is type(summarizer) is TagSummarizationPipeline
    expected = summarizer(photograph(), candidate_labels=TAGS)
    for found in (loaded, own):
        assert_same(found(photograph(), candidate_labels=TAGS), expected, atol=1e-6)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["custom_pipelines"]


def test_the_code_that_the_hub_shows_beside_a_model_works(summarizer, tmp_path):
    summarizer.save_pretrained(tmp_path)

    shown = pipeline("zero-shot-image-classification", model=str(tmp_path), trust_remote_code=True, device="cpu")

    assert_same(shown(photograph(), candidate_labels=TAGS), summarizer(photograph(), candidate_labels=TAGS), atol=1e-6)


@pytest.mark.parametrize("form", [io.BytesIO, bytearray])
def test_an_open_file_is_a_photograph_and_no_generator(summarizer, form):
    found = summarizer(form(as_bytes(photograph())), candidate_labels=TAGS)

    assert_same(found, summarizer(photograph(), candidate_labels=TAGS))


def test_a_model_for_outlier_detection_offers_no_pipeline(tiny_config, tmp_path):
    MagnetoForOutlierDetection(tiny_config).save_pretrained(tmp_path)

    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
