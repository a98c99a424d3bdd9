import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import EvalPrediction

from magneto_training import calibration
from magneto_training.calibration import NUM_FOLDS, CrossFit, calibrate, fit_output, write_reliability_diagram
from magneto_training.evaluation import (
    add_stored_rule,
    compute_metrics,
    expected_calibration_error,
    output_names,
)
from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization

VOCAB_SIZE = 12


def draw_split(
    num_images: int = 400, temperature: float = 2.0, bias: float = 0.0, tag_bias: float = 0.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, tags and labels (images, 6): true is `logit / temperature + bias`, +- `tag_bias` by the tag's parity.

    The tags 10 and 11 are rare; an image has 3 to 6 tags.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(1, 3, (num_images, 6))
    tags = np.where(rng.random((num_images, 6)) < 0.995, rng.integers(2, 10, (num_images, 6)), 10)
    true = logits / temperature + bias + np.where(tags % 2, tag_bias, -tag_bias)
    labels = (rng.random((num_images, 6)) < 1 / (1 + np.exp(-true))).astype(int)
    labels[~labels[:, :3].any(1), 0] = 1  # an image has an important tag
    padded = np.arange(6) >= rng.integers(3, 7, (num_images, 1))
    logits[padded], labels[padded], tags[padded] = -100, -100, 0
    return torch.from_numpy(logits).float(), torch.from_numpy(tags), torch.from_numpy(labels)


def predict(*splits: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> EvalPrediction:
    """What the trainer collects of a model with both streams, whose outputs are the splits'."""
    logits, tags, labels = zip(*splits, strict=True)
    arrays = [array.numpy() for array in logits]
    inputs = np.where(labels[0] == -100, -100, tags[0])  # gathered over batches, indices are padded so, too
    return EvalPrediction((*arrays, np.full_like(arrays[0], 0.5)), labels[0].numpy(), inputs)


@pytest.fixture
def model(tiny_config) -> MagnetoForTagSummarization:
    return MagnetoForTagSummarization(MagnetoConfig(**{**tiny_config.to_dict(), "vocab_size": VOCAB_SIZE})).eval()


@pytest.fixture
def prediction() -> EvalPrediction:
    logits, tags, labels = draw_split()
    return predict((logits, tags, labels), (logits * 2, tags, labels), (logits / 2, tags, labels))


def test_of_many_labels_some_images_tell_as_much(model, monkeypatch):
    split = draw_split(2000)
    whole = calibrate(model, predict(split, split, split), seed=0)
    expected = model.config.calibration["logits"]
    model.set_calibration(None)
    monkeypatch.setattr(calibration, "MAX_LABELS", 4000)

    part = calibrate(model, predict(split, split, split), seed=0)

    assert 3990 < (part.labels != -100).sum() <= 4000 < (whole.labels != -100).sum()
    assert len(part.labels) == len(part.before) == len(part.after)
    assert model.config.calibration["logits"]["temperature"] == pytest.approx(expected["temperature"], rel=0.15)


def test_temperature_and_bias_are_found_again():
    logits, tags, labels = draw_split(4000, temperature=2.0, bias=0.75)

    fields = fit_output(logits, tags, labels, VOCAB_SIZE, seed=0)

    assert fields["temperature"] == pytest.approx(2.0, rel=0.1)
    assert fields["bias"] == pytest.approx(0.75, abs=0.1)
    assert all(abs(bias) < 0.1 for bias in fields.get("tag_biases", {}).values())


def test_frequent_tags_have_biases_of_their_own_where_these_help():
    logits, tags, labels = draw_split(temperature=1.0, tag_bias=1.0)

    fields = fit_output(logits, tags, labels, VOCAB_SIZE, seed=0)

    assert set(fields["tag_biases"]) == {str(tag) for tag in range(2, 10)}  # not the rare one, and no padding
    for tag, bias in fields["tag_biases"].items():
        assert 0.4 < (bias if int(tag) % 2 else -bias) < 1.6


def test_without_a_difference_between_tags_there_is_next_to_no_bias():
    fields = fit_output(*draw_split(seed=1), VOCAB_SIZE, seed=0)

    assert all(abs(bias) < 0.2 for bias in fields.get("tag_biases", {}).values())


@pytest.mark.parametrize("all_important", [False, True])
def test_extreme_labels_leave_every_number_finite(all_important):
    logits, tags, labels = draw_split(40)
    real = labels != -100
    labels[real] = 1 if all_important else (logits[real] > 0).long()  # or told apart by a threshold

    fields = fit_output(logits, tags, labels, VOCAB_SIZE, seed=0)

    MagnetoConfig(vocab_size=VOCAB_SIZE, calibration={"logits": fields})  # which checks the numbers
    assert 0.05 < fields["temperature"] < 20 and abs(fields["bias"]) < 10


@pytest.mark.parametrize("num_images", [1, 2, NUM_FOLDS - 1])
def test_a_handful_of_images_is_enough_to_go_on(model, num_images):
    split = draw_split(num_images)

    cross_fit = calibrate(model, predict(split, split, split), seed=0)

    assert np.isfinite(cross_fit.after).all() and all(map(math.isfinite, cross_fit.errors(model.config).values()))


def test_calibration_reaches_a_small_error_on_other_images(model, prediction):
    cross_fit = calibrate(model, prediction, seed=0)

    errors = cross_fit.errors(model.config)
    assert errors["expected_calibration_error_after"] < 3 < 5 < errors["expected_calibration_error_before"]
    other = predict(*[draw_split(seed=5)] * 3)
    config = model.config
    metrics = add_stored_rule(
        compute_metrics(other, config), other, config, {"rule": "expected_f1"}, config.calibration
    )
    assert metrics["expected_calibration_error_after"] < 4 < metrics["expected_calibration_error_before"]
    for figures in (errors, metrics):
        assert figures["expected_calibration_error"] == figures["expected_calibration_error_after"]


def test_calibration_is_the_same_in_every_process(model, prediction):
    first = calibrate(model, prediction, seed=0)
    calibration = model.config.calibration
    model.set_calibration(None)
    again = calibrate(model, prediction, seed=0)

    assert model.config.calibration == calibration
    assert np.array_equal(first.after, again.after)


def test_the_cross_fitted_scores_of_an_image_do_not_depend_on_its_own_labels(model, prediction):
    first = calibrate(model, prediction, seed=0)
    labels = prediction.label_ids.copy()
    folds = np.random.default_rng(0).permutation(len(labels)) % NUM_FOLDS
    changed = (folds == 2)[:, None] & (labels != -100)
    labels[changed] = 1 - labels[changed]
    model.set_calibration(None)

    again = calibrate(model, EvalPrediction(prediction.predictions, labels, prediction.inputs), seed=0)

    assert np.array_equal(first.after[folds == 2], again.after[folds == 2])
    assert not np.array_equal(first.after[folds == 1], again.after[folds == 1])


def test_every_output_is_calibrated_by_itself(model, prediction):
    calibrate(model, prediction, seed=0)

    calibration = model.config.calibration
    assert set(calibration) == {"logits", "tag_logits", "image_logits"}
    temperatures = [calibration[name]["temperature"] for name in ("image_logits", "logits", "tag_logits")]
    assert temperatures == sorted(temperatures) and temperatures[2] > 2 * temperatures[0]
    assert set(model.calibration) == set(calibration)


def test_the_metrics_of_the_stored_rule_are_those_of_the_calibrated_model(model):
    rng = torch.Generator().manual_seed(1)
    inputs = {
        "input_ids": torch.randint(2, VOCAB_SIZE, (40, 5), generator=rng),
        "pixel_values": torch.randn(40, 3, 32, 32, generator=rng),
    }
    labels = torch.randint(0, 2, (40, 5), generator=rng)
    labels[:, 0] = 1

    def outputs() -> EvalPrediction:
        with torch.no_grad():
            found = model(**inputs)
        arrays = tuple(found[name].numpy() for name in output_names(model.config))
        return EvalPrediction(arrays, labels.numpy(), inputs["input_ids"].numpy())

    for head in (model.classifiers.tag, model.classifiers.image):
        head.weight.data *= 30  # scores of every kind
    raw = outputs()
    paper = compute_metrics(raw, model.config)
    calibrate(model, raw, seed=0)
    rule = {"rule": "threshold", "threshold": 0.5}
    metrics = add_stored_rule(paper, raw, model.config, rule, model.config.calibration)

    expected = compute_metrics(outputs(), model.config)  # at 0.5, of outputs that are calibrated now
    for name in ("precision", "recall", "f1", "tag_f1", "image_f1", "reducible_f1"):
        assert metrics[name] == expected[name], name
        assert metrics[f"{name}_at_half"] == paper[name]
    for name in ("final_loss", "tag_loss", "image_loss"):
        assert metrics[name] == paper[name] != expected[name]


def test_the_papers_rule_leaves_its_own_figures_and_says_what_calibration_would_do(model, prediction):
    paper = compute_metrics(prediction, model.config)
    cross_fit = calibrate(model, prediction, seed=0)
    fitted = model.config.calibration
    model.set_calibration(None)

    metrics = add_stored_rule(paper, prediction, model.config, {"rule": "threshold", "threshold": 0.5}, fitted)

    of_the_rule = ("precision", "recall", "f1", "reducible_f1", "tag_f1", "image_f1")
    assert paper.items() <= metrics.items()
    assert {name: metrics[f"{name}_at_half"] for name in of_the_rule}.items() <= paper.items()
    errors = {f"expected_calibration_error{suffix}" for suffix in ("", "_before", "_after")}
    assert set(metrics) - set(paper) == {*(f"{name}_at_half" for name in of_the_rule), *errors}
    for figures in (metrics, cross_fit.errors(model.config)):
        assert figures["expected_calibration_error"] == figures["expected_calibration_error_before"]
        assert figures["expected_calibration_error_after"] < 3 < 5 < figures["expected_calibration_error"]


def test_a_single_stream_has_no_figures_of_the_other(model):
    logits, _, labels = (array.numpy() for array in draw_split(20))
    config = MagnetoConfig(streams="tag", vocab_size=VOCAB_SIZE)
    prediction = EvalPrediction((logits, logits), labels, labels.clip(0))

    metrics = add_stored_rule(compute_metrics(prediction, config), prediction, config, {"rule": "threshold"}, {})

    assert metrics["tag_f1_at_half"] == metrics["f1_at_half"] and "image_f1_at_half" not in metrics


def test_the_calibration_error_equals_a_plain_loop():
    logits, _, labels = draw_split(100)
    scores, important = torch.sigmoid(logits[labels != -100]).tolist(), labels[labels != -100].tolist()

    total = 0.0
    for index in range(15):
        inside = [
            (score, label)
            for score, label in zip(scores, important, strict=True)
            if index / 15 <= score < (index + 1) / 15 or (index == 14 and score == 1)
        ]
        if inside:
            gap = sum(score for score, _ in inside) / len(inside) - sum(label for _, label in inside) / len(inside)
            total += 100 * len(inside) / len(scores) * abs(gap)

    assert expected_calibration_error(logits.numpy(), labels.numpy()) == pytest.approx(total)


def test_perfect_and_opposite_scores_have_no_error_and_every_error():
    labels = np.array([[1, 0, -100], [0, 1, 1]])
    certain = np.where(labels == 1, 1000.0, -1000.0).astype(np.float32)

    assert expected_calibration_error(certain, labels) == 0
    assert expected_calibration_error(-certain, labels) == 100


def test_the_reliability_diagram_is_a_picture_that_is_there_whole(tmp_path):
    logits, _, labels = draw_split(50)
    file = tmp_path / "calibration.png"

    write_reliability_diagram(CrossFit(labels.numpy(), logits.numpy(), logits.numpy() / 2), file)

    assert list(tmp_path.iterdir()) == [file]
    with Image.open(file) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
