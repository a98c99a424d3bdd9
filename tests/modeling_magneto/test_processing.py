import base64
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization, MagnetoProcessor
from modeling_magneto.modeling_magneto import MagnetoOutput
from modeling_magneto.processing_magneto import normalize_tag, normalize_tags, upright_rgb


def photograph(width: int = 64, height: int = 48) -> Image.Image:
    """Smooth, so that how pixels are weighed in resizing shows in no more than rounding."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def test_one_tag_is_one_token_whatever_is_added_to_the_vocabulary(processor):
    processor.tokenizer.add_tokens(["cat"])
    processor.tokenizer.padding_side = "left"
    added = processor.tokenizer.convert_tokens_to_ids("cat")
    unknown, blue = processor.tokenizer.unk_token_id, processor.tokenizer.convert_tokens_to_ids("blue")

    inputs = processor([photograph()] * 2, [["category", "blue", "bobcat"], ["cat"]])

    assert inputs["input_ids"].tolist() == [[unknown, blue, unknown], [added, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


# ------------------------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize(
    "tag, expected",
    [
        ("Sky", "sky"),
        ("  blue \t\n sky ", "blue sky"),
        ("ﬁre", "fire"),  # ligature
        ("ＳＫＹ", "sky"),  # full width
        ("cafe\u0301", "caf\u00e9"),  # combining accent
        ("Straße", "strasse"),
        ("a\u00a0b\u3000c", "a b c"),  # white space of other kinds
    ],
)
def test_a_tag_has_one_spelling(tag, expected):
    assert normalize_tag(tag) == expected


@settings(max_examples=500)
@given(st.text(min_size=1))
def test_normalising_twice_is_normalising_once(text):
    try:
        once = normalize_tag(text)
    except ValueError:
        assert not unicodedata.normalize("NFKC", text).strip()
        return
    assert normalize_tag(once) == once
    assert once == " ".join(once.split())


def test_normalising_settles_every_character():
    unsettled = []
    for code in range(0x110000):
        if 0xD800 <= code < 0xE000 or not (character := chr(code)).strip():
            continue
        once = normalize_tag(f"a{character}")
        if once != f"a{character}" and normalize_tag(once) != once:
            unsettled.append(hex(code))
    assert unsettled == []


def test_duplicates_are_dropped_and_the_first_is_kept():
    assert normalize_tags(["Sea", "boat", "SEA ", "sun", "Boat"]) == ["sea", "boat", "sun"]


# -------------------------------------------------------------------------------------------------------------- tokens


def test_one_tag_is_one_token():
    processor = MagnetoProcessor.from_vocabulary(["new york", "york", "new", "c++", "[weird] tag"], use_images=False)

    inputs = processor(tags=[["New  York", "c++"], ["york", "new", "[Weird] tag"]])

    assert inputs["input_ids"].tolist() == [[2, 5, 0], [3, 4, 6]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert inputs["input_ids"].dtype == torch.int64


def test_the_vocabulary_keeps_its_order_and_its_size():
    processor = MagnetoProcessor.from_vocabulary(["Zebra", "apple", "zebra", "mango"])

    assert processor.vocabulary == ["zebra", "apple", "mango"]
    assert len(processor.tokenizer) == 3 + 2


@pytest.mark.parametrize("tag", ["unheard of", "[PAD]", "[UNK]", "[pad]", "☃"])
def test_an_unknown_tag_is_unk_and_still_scored(processor, tiny_model, tag):
    inputs = processor(photograph(), ["red", tag])

    assert inputs["input_ids"].tolist() == [[4, 1]]
    assert inputs["attention_mask"].tolist() == [[1, 1]]
    with torch.no_grad():
        (result,) = processor.post_process(tiny_model(**inputs), ["red", tag])
    assert [name for name, _ in result["tags"]] == ["red", normalize_tag(tag)]


def test_truncation_only_when_asked(tiny_model):
    names = [f"tag {index}" for index in range(20)]
    processor = MagnetoProcessor.from_vocabulary(names, image_size=32, max_tags=16)

    assert processor(photograph(), names)["input_ids"].tolist() == [list(range(2, 22))]
    cut = processor(photograph(), names, names[10:], truncation=True)
    assert cut["input_ids"].tolist() == [list(range(2, 18))]
    assert cut["labels"].tolist() == [[0] * 10 + [1] * 6]


def test_prediction_scores_every_tag_however_many_there_are():
    names = [f"tag {index}" for index in range(100)]
    processor = MagnetoProcessor.from_vocabulary(names, max_tags=16, use_images=False)
    config = MagnetoConfig(vocab_size=102, hidden_size=16, num_attention_heads=2, streams="tag", max_tags=16)
    model = MagnetoForTagSummarization(config).eval()

    with torch.no_grad():
        (result,) = processor.post_process(model(**processor(tags=names)), names, threshold=0.0)

    assert result["selected_tags"] == names


# -------------------------------------------------------------------------------------------------------------- labels


def test_labels_are_1_0_and_ignored_for_padding(processor):
    inputs = processor(
        [photograph()] * 2, [["Red", "blue", "green"], ["yellow", "yellow "]], [["RED", "green "], ["Yellow"]]
    )

    assert inputs["labels"].tolist() == [[1, 0, 1], [1, -100, -100]]
    assert inputs["labels"].dtype == torch.int64


def test_a_single_example_is_a_batch_of_one(processor):
    single = processor(photograph(), ["red", "blue"], ["blue"])
    batch = processor([photograph()], [["red", "blue"]], [["blue"]])

    assert single.keys() == batch.keys() == {"input_ids", "attention_mask", "pixel_values", "labels"}
    assert all(torch.equal(single[name], batch[name]) for name in batch)


def test_a_batch_is_its_examples_padded(processor):
    examples = [(photograph(64, 48), ["red"]), (photograph(40, 90), ["blue", "green", "red"])]

    batch = processor(*map(list, zip(*examples, strict=True)))

    for index, (image, tags) in enumerate(examples):
        single = processor(image, tags)
        assert torch.equal(batch["pixel_values"][index], single["pixel_values"][0])
        assert torch.equal(batch["input_ids"][index, : len(tags)], single["input_ids"][0])
        assert batch["attention_mask"][index].sum() == len(tags)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"images": None, "tags": ["red"]}, "images is missing"),
        ({"images": [photograph(), None], "tags": [["red"], ["blue"]]}, "images is missing"),
        ({"tags": None}, "tags is None"),
        ({"tags": []}, r"tags is \[\]"),
        ({"tags": "red"}, "found the text 'r'|tags is 'red'|found the text 'red'"),
        ({"tags": [[]]}, r"tags\[0\]: found an empty list"),
        ({"tags": [["red"], []], "images": [photograph()] * 2}, r"tags\[1\]: found an empty list"),
        ({"tags": ["red", ""]}, r"tags\[0\]: found an empty tag"),
        ({"tags": ["red", " \t"]}, r"tags\[0\]: found an empty tag"),
        ({"tags": [["red", None]]}, r"tags\[0\]: found the tag None of type NoneType"),
        ({"tags": [["red", 3]]}, r"tags\[0\]: found the tag 3 of type int"),
        ({"tags": [["red"], "blue"], "images": [photograph()] * 2}, r"tags\[1\]: found the text 'blue'"),
        ({"tags": [["red"], ["blue"]]}, "found 1 photographs for 2 lists of tags"),
        ({"tags": [["red"]], "images": [photograph()] * 2}, "found 2 photographs for 1 lists of tags"),
        ({"tags": ["red"], "important_tags": ["blue"]}, r"important_tags\[0\]: \['blue'\] are not among the tags"),
        ({"tags": [["red"]], "important_tags": [["red"], ["red"]]}, "found 2 lists of important tags for 1 lists"),
        ({"tags": ["red"], "important_tags": [""]}, "empty tag"),
        ({"tags": ["red"], "images": "missing.jpg"}, r"photograph 'missing.jpg' cannot be read \(FileNotFoundError\)"),
        ({"tags": ["red", "blue"], "important_tags": "blue"}, r"important_tags\[0\]: found the text 'blue'"),
    ],
)
@pytest.mark.parametrize("truncation", [False, True])
def test_a_wrong_input_is_a_clear_error(processor, arguments, message, truncation):
    with pytest.raises(ValueError, match=message):
        processor(**{"images": photograph(), **arguments}, truncation=truncation)


def test_tags_may_be_arrays(processor):
    tags = [np.array(["red", "blue"], dtype=object), np.array(["green"])]
    important_tags = [np.array(["blue"]), np.array([], dtype=str)]

    batch = processor([photograph()] * 2, tags, important_tags)
    single = processor(photograph(), tags[0], important_tags[0])

    assert batch["labels"].tolist() == [[0, 1], [-100, -100]]
    assert torch.equal(single["input_ids"][0], batch["input_ids"][0]) and single["labels"].tolist() == [[0, 1]]


# -------------------------------------------------------------------------------------------------------------- images


# Of an odd number of superfluous pixels, the two take the odd one from different sides; here the number is even.
@pytest.mark.parametrize("size", [(64, 48), (48, 64), (32, 32), (91, 33), (20, 25)])
def test_photographs_are_resized_cropped_and_normalised_as_torchvision_does(size):
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    processor = MagnetoProcessor.from_vocabulary(["red"], image_size=32, image_mean=mean, image_std=std)
    reference = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(32, interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
            v2.CenterCrop(32),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )

    found = processor(photograph(*size), ["red"])["pixel_values"]

    assert found.shape == (1, 3, 32, 32) and found.dtype == torch.float32
    torch.testing.assert_close(found[0], reference(photograph(*size)), atol=1.5 / 255 / 0.4, rtol=0)


def test_the_default_normalisation_is_imagenets():
    pixels = MagnetoProcessor.from_vocabulary(["red"], image_size=8)(Image.new("RGB", (9, 9), (255, 0, 51)), ["red"])

    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(pixels["pixel_values"][0, :, 4, 4], torch.tensor(expected))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_photographs_of_other_colour_modes_become_rgb(processor, mode):
    red = Image.new("RGB", (40, 40), (200, 40, 40))
    converted = red.convert(mode)

    found = processor([converted, red], [["red"], ["red"]])["pixel_values"]

    assert found.shape == (2, 3, 32, 32)
    expected = processor(converted.convert("RGB"), ["red"])["pixel_values"][0]
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["text of a path", "path", "bytes", "base64"])
def test_16_bit_grey_keeps_its_range_whatever_way_it_comes(processor, tmp_path, kind):
    grey, file = photograph().convert("L"), tmp_path / "deep.png"
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(file)
    content = file.read_bytes()
    image = {
        "text of a path": str(file),
        "path": file,
        "bytes": content,
        "base64": base64.b64encode(content).decode(),
    }[kind]
    expected = processor(grey, ["red"])["pixel_values"]

    assert torch.equal(processor(image, ["red"])["pixel_values"], expected)
    several = processor([image, grey], [["red"], ["blue"]])["pixel_values"]
    assert torch.equal(several, torch.cat([expected, expected]))


def test_photographs_may_come_as_arrays_and_tensors(processor):
    pixels = np.array(photograph())
    expected = processor(photograph(), ["red"])["pixel_values"]

    for image in (pixels, torch.tensor(pixels).permute(2, 0, 1)):
        torch.testing.assert_close(processor(image, ["red"])["pixel_values"], expected)
        assert processor([image, photograph()], [["red"]] * 2)["pixel_values"].shape[0] == 2


def test_a_tag_only_processor_takes_no_photograph():
    processor = MagnetoProcessor.from_vocabulary(["red"], use_images=False)

    assert set(processor(tags=["red"])) == set(processor(photograph(), ["red"])) == {"input_ids", "attention_mask"}
    assert processor.model_input_names == ["input_ids", "attention_mask"]


# ----------------------------------------------------------------------------------------------------------- selection


def outputs_of(scores: list[list[float]]) -> MagnetoOutput:
    return MagnetoOutput(logits=torch.logit(torch.tensor(scores)))


TAGS = [["Red", "blue", "green"], ["yellow", "Yellow ", "blue"]]
SCORES = [[0.9, 0.5, 0.1], [0.4, 0.6, 0.99]]  # the last one is at a padded slot


@pytest.mark.parametrize(
    "options, selected",
    [
        ({}, [["red", "blue"], ["blue"]]),
        ({"threshold": 0.3}, [["red", "blue"], ["yellow", "blue"]]),
        ({"threshold": 0.0}, [["red", "blue", "green"], ["yellow", "blue"]]),
        ({"threshold": 0.95}, [[], []]),
        ({"top_k": 1}, [["red"], ["blue"]]),
        ({"top_k": 5}, [["red", "blue", "green"], ["yellow", "blue"]]),
        ({"selection": "threshold"}, [["red", "blue"], ["blue"]]),
        ({"selection": "threshold", "threshold": 0.3}, [["red", "blue"], ["yellow", "blue"]]),
        ({"selection": "top_k", "top_k": 1}, [["red"], ["blue"]]),
        ({"selection": "expected_f1"}, [["red", "blue"], ["yellow", "blue"]]),
    ],
)
def test_post_process_selects_by_the_rule_it_is_given(processor, options, selected):
    results = processor.post_process(outputs_of(SCORES), TAGS, **options)

    assert [result["selected_tags"] for result in results] == selected


@pytest.mark.parametrize(
    "stored, selected",
    [
        ({"rule": "expected_f1"}, [["red", "blue"], ["yellow", "blue"]]),
        ({"rule": "expected_f1", "max_tags": 1}, [["red"], ["blue"]]),
        ({"rule": "top_k", "top_k": 1}, [["red"], ["blue"]]),
        ({"threshold": 0.95, "min_tags": 1}, [["red"], ["blue"]]),
        ({"threshold": 0.95, "tag_thresholds": {"Blue ": 0.5, "yellow": 0.1}}, [["blue"], ["yellow", "blue"]]),
    ],
)
def test_the_stored_rule_is_in_force_until_another_is_named(processor, stored, selected):
    processor.selection = stored

    def selected_tags(**options):
        return [result["selected_tags"] for result in processor.post_process(outputs_of(SCORES), TAGS, **options)]

    assert selected_tags() == selected
    # Another rule replaces the stored one as a whole.
    assert selected_tags(threshold=0.5) == selected_tags(selection="threshold") == [["red", "blue"], ["blue"]]
    assert selected_tags(top_k=2) == [["red", "blue"], ["yellow", "blue"]]
    assert processor.selection == stored


@pytest.mark.parametrize(
    "options, message",
    [
        ({"selection": "best"}, "rule is 'best', expected one of threshold, top_k, expected_f1"),
        ({"selection": "expected_f1", "threshold": 0.3}, "threshold is 0.3, but the rule is 'expected_f1'"),
        ({"selection": "threshold", "top_k": 3}, "top_k is 3, but the rule is 'threshold'"),
        ({"selection": "top_k"}, "top_k is None, but the rule is 'top_k'"),
        ({"selection": "top_k", "top_k": 2, "threshold": 0.95}, "threshold is 0.95, but the rule is 'top_k'"),
        ({"top_k": 2, "threshold": 0.95}, "threshold is 0.95 and top_k is 2, expected only one of them"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"top_k": 0}, "top_k is 0"),
    ],
)
def test_a_wrong_rule_is_an_error_that_names_it(processor, options, message):
    with pytest.raises(ValueError, match=message):
        processor.post_process(outputs_of(SCORES), TAGS, **options)


def test_a_wrong_stored_rule_is_an_error_before_it_is_used(processor):
    with pytest.raises(ValueError, match="selection has the unknown field 'treshold'"):
        MagnetoProcessor(processor.image_processor, processor.tokenizer, selection={"treshold": 0.3})


def test_a_wrong_stored_rule_is_not_saved_over_a_good_one(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    processor.selection = {"rule": "top_k"}

    with pytest.raises(ValueError, match="selection: top_k is None, but the rule is 'top_k'"):
        processor.save_pretrained(tmp_path)

    assert MagnetoProcessor.from_pretrained(tmp_path).selection["rule"] == "threshold"


def test_a_processor_cuts_to_one_tag_at_least(processor):
    with pytest.raises(ValueError, match="max_tags is 0, expected at least 1"):
        MagnetoProcessor(processor.image_processor, processor.tokenizer, max_tags=0)


def test_the_default_rule_is_the_papers(processor):
    assert processor.selection == {"rule": "threshold", "threshold": 0.5}


def test_post_process_gives_each_tag_its_score(processor):
    results = processor.post_process(outputs_of(SCORES), TAGS)

    assert [[name for name, _ in result["tags"]] for result in results] == [
        ["red", "blue", "green"],
        ["yellow", "blue"],
    ]
    for result, scores in zip(results, SCORES, strict=True):
        expected = scores[: len(result["tags"])]
        assert [score for _, score in result["tags"]] == pytest.approx(expected, abs=1e-6)
        assert all(isinstance(score, float) for _, score in result["tags"])


def test_post_process_takes_a_single_list_of_tags(processor):
    (result,) = processor.post_process(outputs_of([[0.9, 0.1]]), ["red", "blue"])

    assert result["selected_tags"] == ["red"]


def test_post_process_refuses_tags_of_another_batch(processor):
    with pytest.raises(ValueError, match="found 1 lists of tags for the scores of 2 images"):
        processor.post_process(outputs_of(SCORES), ["red", "blue"])
    with pytest.raises(ValueError, match=r"tags\[0\] has 3 tags, but there are scores of 2"):
        processor.post_process(outputs_of([[0.9, 0.1]]), [["red", "blue", "green"]])
    with pytest.raises(ValueError, match="found 0 lists of tags for the scores of 2 images"):
        processor.post_process(outputs_of(SCORES), [])


def test_only_pytorch_tensors_are_made(processor):
    image = Image.new("RGB", (40, 40))
    assert processor(image, ["red"], return_tensors="pt")["input_ids"].shape == (1, 1)
    with pytest.raises(ValueError, match="return_tensors is 'np', expected 'pt'"):
        processor(image, ["red"], return_tensors="np")


def test_unknown_ground_truth_is_ignored(processor):
    images = [Image.new("RGB", (40, 40))] * 2
    labels = processor(images, [["red", "blue"], ["red"]], [[], ["red"]])["labels"]
    assert labels.tolist() == [[-100, -100], [1, -100]]


def test_a_line_of_pixels_is_refused(processor):
    with pytest.raises(ValueError, match="a photograph has 1 x 60 pixels, expected sides of at most 1 : 50"):
        processor(Image.new("RGB", (1, 60)), ["blue"])


def test_photographs_are_turned_upright(processor):
    upright = photograph()
    turned = upright.rotate(90, expand=True)
    turned.getexif()[0x0112] = 6  # the camera says: turn it clockwise
    expected = processor(upright, ["blue"])["pixel_values"]
    assert torch.equal(processor(turned, ["blue"])["pixel_values"], expected)
    assert turned.size == (48, 64), "the caller's photograph stays as it is"
    again = upright_rgb(upright_rgb(turned))
    assert again.tobytes() == upright.tobytes()
