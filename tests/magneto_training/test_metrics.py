import json
import math
import sys

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import EvalPrediction

from magneto_training import evaluation
from magneto_training.evaluation import (
    combine_metrics,
    compute_metrics,
    evaluate_selection,
    format_metrics,
    load_metric,
    output_names,
    write_metrics,
)
from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization
from modeling_magneto.loss_magneto import bce_dice_loss
from modeling_magneto.modeling_magneto import MagnetoOutput

# An image is a list of (selected, label); at least one label is 1.
images = st.lists(
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0, 1, -100])), min_size=1, max_size=6).filter(
        lambda tags: any(label == 1 for _, label in tags)
    ),
    min_size=1,
    max_size=5,
)


def plain_loop(batch) -> dict[str, float]:
    """The metric as facts.md words it, image by image and tag by tag."""

    def figures(batch):
        precisions, recalls, f1s = [], [], []
        for tags in batch:
            hits = sum(selected and label == 1 for selected, label in tags)
            selected, important = sum(selected for selected, _ in tags), sum(label == 1 for _, label in tags)
            if selected:
                precisions.append(hits / selected)
            recalls.append(hits / important)
            precision = hits / selected if selected else 0
            f1s.append(2 * precision * recalls[-1] / (precision + recalls[-1]) if hits else 0)
        return [100 * sum(values) / len(values) if values else math.nan for values in (precisions, recalls, f1s)]

    batch = [[(selected, label) for selected, label in tags if label != -100] for tags in batch]
    keep_all = [[(1, label) for _, label in tags] for tags in batch]
    reducible = [index for index, tags in enumerate(batch) if any(label == 0 for _, label in tags)]
    return {
        **dict(zip(("precision", "recall", "f1"), figures(batch), strict=True)),
        **dict(zip(("keep_all_precision", "keep_all_recall", "keep_all_f1"), figures(keep_all), strict=True)),
        "reducible_f1": figures([batch[index] for index in reducible])[2],
        "keep_all_reducible_f1": figures([keep_all[index] for index in reducible])[2],
        "num_images": len(batch),
        "num_selected_images": sum(any(selected for selected, _ in tags) for tags in batch),
        "num_reducible_images": len(reducible),
    }


def compute(batch) -> dict[str, float]:
    predictions, references = [[[tag[part] for tag in tags] for tags in batch] for part in (0, 1)]
    return load_metric().compute(predictions=predictions, references=references)


@settings(deadline=None, max_examples=60)
@given(images)
def test_the_metric_equals_a_plain_loop(batch):
    assert compute(batch) == pytest.approx(plain_loop(batch), nan_ok=True)


def test_the_precision_of_an_image_with_nothing_selected_is_left_out_and_its_f1_is_0():
    results = compute([[(0, 1), (0, 0)], [(1, 1), (0, 0)]])

    assert (results["precision"], results["recall"], results["f1"]) == (100, 50, 50)
    assert math.isnan(compute([[(0, 1)]])["precision"]) and compute([[(0, 1)]])["f1"] == 0


def test_keeping_everything_is_reported_beside():
    results = compute([[(1, 1), (0, 0), (0, 0), (0, 0)], [(1, 1)]])

    assert (results["precision"], results["recall"], results["f1"]) == (100, 100, 100)
    assert (results["keep_all_precision"], results["keep_all_recall"]) == (62.5, 100)
    assert results["keep_all_f1"] == pytest.approx((40 + 100) / 2)
    assert (results["reducible_f1"], results["keep_all_reducible_f1"]) == (100, pytest.approx(40))


def test_without_a_reducible_image_its_figures_are_undefined():
    results = compute([[(1, 1)], [(1, 1), (0, -100)]])

    assert math.isnan(results["reducible_f1"]) and math.isnan(results["keep_all_reducible_f1"])


def test_ignored_slots_do_not_count_selected_or_not():
    assert compute([[(1, 1), (0, 0), (1, -100), (0, -100)]]) == compute([[(1, 1), (0, 0)]])


def test_an_image_without_an_important_tag_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"references\[1\] has no important tag"):
        compute([[(1, 1)], [(1, 0), (1, -100)]])


def test_lists_of_different_lengths_are_an_error_that_names_the_image():
    with pytest.raises(ValueError, match=r"predictions\[1\] has 1 tags, references\[1\] has 2"):
        load_metric().compute(predictions=[[1], [1]], references=[[1], [1, 0]])


def test_the_metric_is_an_evaluate_module_in_its_folder():
    metric = evaluate.load("magneto_training/metrics")

    assert isinstance(metric, evaluate.Metric)
    results = metric.compute(predictions=[[1, 0, 0], [1]], references=[[1, 1, 0], [1]])  # its documented example
    assert (round(results["f1"], 2), round(results["keep_all_f1"], 2)) == (83.33, 90.0)
    assert "(83.33, 90.0)" in metric.inputs_description


# ---------------------------------------------------------------------------------------------- from logits to figures


def test_the_streams_get_their_own_f1():
    labels = [np.array([1, 0]), np.array([1, 0])]
    selected = {
        "logits": [np.array([1, 0]), np.array([1, 0])],
        "tag_logits": [np.array([0, 1]), np.array([1, 0])],
        "image_logits": [np.array([0, 0]), np.array([0, 0])],
    }

    results = evaluate_selection(selected, labels)

    assert (results["f1"], results["tag_f1"], results["image_f1"]) == (100, 50, 0)


@settings(deadline=None, max_examples=30)
@given(images, st.data())
def test_the_metrics_of_parts_are_combined_to_those_of_the_whole(batch, data):
    def evaluate_part(part):
        selected, labels = [[np.array([tag[kind] for tag in tags]) for tags in part] for kind in (0, 1)]
        return evaluate_selection({"logits": selected, "tag_logits": selected}, labels)

    cut = data.draw(st.integers(0, len(batch)))

    combined = combine_metrics(evaluate_part(part) for part in (batch[:cut], batch[cut:]) if part)

    assert combined == pytest.approx(evaluate_part(batch), nan_ok=True)


@pytest.mark.parametrize("streams", ["both", "image", "tag"])
def test_output_names_are_what_the_model_returns_for_every_tag(tiny_config, streams):
    config = MagnetoConfig(**{**tiny_config.to_dict(), "streams": streams})
    outputs = MagnetoForTagSummarization(config).eval()(
        torch.tensor([[2, 3]]), pixel_values=torch.randn(1, 3, 32, 32), labels=torch.tensor([[1, 0]])
    )

    collected = [name for name in outputs if name not in ("loss", *config.keys_to_ignore_at_inference)]

    assert output_names(config) == collected
    assert set(MagnetoOutput.__dataclass_fields__) >= set(collected)


def test_trainer_reports_metrics_losses_and_the_mean_gate(tiny_config):
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(3, 4)).astype(np.float32) for name in ("logits", "tag_logits", "image_logits")}
    arrays["logits"][0] = [0, -1e-3, 3, 0]  # 0 is a score of exactly 0.5, which is selected
    gate = rng.random((3, 4)).astype(np.float32)
    labels = np.array([[1, 0, 1, -100], [1, 0, 0, 0], [0, 1, -100, -100]])
    # Trainer pads gathered arrays with -100, logits too.
    padded = {name: np.where(labels == -100, -100.0, array).astype(np.float32) for name, array in arrays.items()}

    results = compute_metrics(EvalPrediction((*padded.values(), gate), labels), tiny_config)

    for name, f1, loss in (("logits", "f1", "final_loss"), ("tag_logits", "tag_f1", "tag_loss")):
        batch = [
            [(int(score >= 0), int(label)) for score, label in zip(row, truth, strict=True)]
            for row, truth in zip(arrays[name], labels, strict=True)
        ]
        assert results[f1] == pytest.approx(plain_loop(batch)["f1"])
        expected = bce_dice_loss(torch.from_numpy(arrays[name]), torch.from_numpy(labels)).item()
        assert results[loss] == pytest.approx(expected)
    assert results["mean_gate"] == pytest.approx(gate[labels != -100].mean())
    assert results["num_images"] == 3


FIGURES = {
    "num_images": 7,
    **{name: value for name, value in zip(("precision", "recall", "f1"), (81.1, 82.2, 83.3), strict=True)},
    **{"keep_all_precision": 61.1, "keep_all_recall": 100.0, "keep_all_f1": 63.3},
    **{"reducible_f1": 73.3, "keep_all_reducible_f1": 53.3},
}


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_the_table_shows_keep_all_beside_every_f1():
    other_split = {**FIGURES, "keep_all_f1": 64.4, "f1": 84.4}

    rows = table_rows(format_metrics({"validation": {**FIGURES, "tag_f1": 1.0, "image_f1": 2.0}, "test": other_split}))

    assert rows == [
        ["images", "precision", "recall", "F1", "F1, reducible images"],
        ["validation", "7", "81.10", "82.20", "83.30", "73.30"],
        ["tag stream", "1.00"],
        ["image stream", "2.00"],
        ["keep all", "61.10", "100.00", "63.30", "53.30"],
        ["test", "7", "81.10", "82.20", "84.40", "73.30"],
        ["keep all", "61.10", "100.00", "64.40", "53.30"],
    ]


def test_the_table_has_a_dash_for_what_is_undefined():
    undefined = dict.fromkeys(("precision", "precision_at_half", "reducible_f1", "keep_all_reducible_f1"), math.nan)

    rows = table_rows(
        format_metrics({"test": {**FIGURES, **AT_HALF, **undefined, "tag_f1": math.nan, "image_f1": 2.0}})
    )

    assert rows[1:] == [
        ["test", "7", "–", "82.20", "83.30", "–"],
        ["raw scores at 0.5", "–", "72.20", "80.00"],
        ["tag stream", "–"],
        ["image stream", "2.00"],
        ["keep all", "61.10", "100.00", "63.30", "–"],
    ]


AT_HALF = {"precision_at_half": 91.1, "recall_at_half": 72.2, "f1_at_half": 80.0}


def test_the_table_shows_the_papers_rule_where_another_is_in_force():
    rows = table_rows(format_metrics({"validation": {**FIGURES, **AT_HALF}}))

    assert rows[1:3] == [
        ["validation", "7", "81.10", "82.20", "83.30", "73.30"],
        ["raw scores at 0.5", "91.10", "72.20", "80.00"],
    ]


def test_the_table_shows_the_papers_rule_once_where_it_is_in_force():
    same = {f"{name}_at_half": FIGURES[name] for name in ("precision", "recall", "f1")}

    assert [row[0] for row in table_rows(format_metrics({"test": {**FIGURES, **same}}))[1:]] == ["test", "keep all"]


def test_models_on_the_same_split_share_one_keep_all_row():
    rows = table_rows(format_metrics({"one": FIGURES, "two": {**FIGURES, "f1": 90.0}}))

    assert [row[0] for row in rows[1:]] == ["one", "two", "keep all"]


def test_metrics_files_are_strict_json_and_whole(tmp_path):
    path = tmp_path / "metrics.json"

    write_metrics(path, {"test": {**FIGURES, "precision": math.nan}})

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(path.read_text(), parse_constant=refuse) == {"test": {**FIGURES, "precision": None}}
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_that_cannot_be_written_leave_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    write_metrics(path, FIGURES)

    with pytest.raises(TypeError):
        write_metrics(path, {"f1": object()})

    assert json.loads(path.read_text()) == FIGURES
    assert list(tmp_path.iterdir()) == [path]


def test_the_table_of_metrics_files(tmp_path, monkeypatch, capsys):
    write_metrics(tmp_path / "one.metrics.json", FIGURES)
    write_metrics(tmp_path / "two.metrics.json", {**FIGURES, "precision": math.nan, "f1": 0.0})
    monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, sorted(tmp_path.iterdir()))])

    evaluation.main()

    rows = table_rows(capsys.readouterr().out)
    assert [row[0] for row in rows[1:]] == ["one", "two", "keep all"]
    assert rows[2] == ["two", "7", "–", "82.20", "0.00", "73.30"]


def test_metrics_files_of_the_same_name_are_told_apart_by_their_paths(tmp_path, monkeypatch, capsys):
    files = [tmp_path / name for name in ("a/test.metrics.json", "b/test.metrics.json", "b/other.metrics.json")]
    for file, f1 in zip(files, (80.0, 81.0, 82.0), strict=True):
        file.parent.mkdir(exist_ok=True)
        write_metrics(file, {**FIGURES, "f1": f1})
    monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, files)])

    evaluation.main()

    rows = table_rows(capsys.readouterr().out)[1:-1]
    assert [(row[0], row[4]) for row in rows] == [
        (str(files[0]), "80.00"),
        (str(files[1]), "81.00"),
        ("other", "82.00"),
    ]


@pytest.mark.parametrize("text", [None, "{", "[1]", '{"test": {"f1": 1}}'])
def test_a_file_that_holds_no_metrics_is_an_error_in_one_line(tmp_path, monkeypatch, capsys, text):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["evaluation", str(path)])

    with pytest.raises(SystemExit) as caught:
        evaluation.main()

    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bad.json" in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], "FILE"), (["--nothing"], "FILE"), (["one.metrics.json", "--nothing"], "--nothing")],
)
def test_wrong_arguments_end_the_table_of_metrics_files_with_one_line(monkeypatch, capsys, arguments, expected):
    monkeypatch.setattr(sys, "argv", ["evaluation", *arguments])

    with pytest.raises(SystemExit) as caught:
        evaluation.main()

    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evaluation: error: ") and expected in line


def test_the_table_of_metrics_files_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluation", "--help"])

    with pytest.raises(SystemExit) as caught:
        evaluation.main()

    printed = capsys.readouterr()
    assert caught.value.code == 0 and printed.err == ""
    assert "python -m magneto_training.evaluation" in printed.out and "FILE" in printed.out
