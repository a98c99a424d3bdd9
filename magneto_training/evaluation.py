"""The one way from logits and labels to figures: training and prediction both report these."""

import json
import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from torchmetrics.functional.classification import binary_average_precision, binary_f1_score
from transformers import EvalPrediction

from modeling_magneto import MagnetoConfig
from modeling_magneto.loss_magneto import IGNORED_LABEL, OBJECTIVES
from modeling_magneto.modeling_magneto import MagnetoCalibration
from modeling_magneto.selection_magneto import PAPER_RULE, SelectionRule, select

from .arguments import CommandParser, UserError, user_errors_in_one_line
from .whole_file import whole_file

NUM_BINS = 15  # of the calibration error
OF_THE_RULE = ("precision", "recall", "f1", "reducible_f1", "tag_f1", "image_f1")  # and not of the losses, or keep-all


@cache
def load_metric() -> evaluate.Metric:
    """The project's metric, from its folder and without a network."""
    return evaluate.load(str(Path(__file__).parent / "metrics"), keep_in_memory=True)


def output_names(config: MagnetoConfig) -> list[str]:
    """The fields of `MagnetoOutput`, in their order, that a model returns for every tag."""
    by_streams = {
        "both": ["logits", "tag_logits", "image_logits", "gate"],
        "image": ["logits", "image_logits"],
        "tag": ["logits", "tag_logits"],
    }
    return by_streams[config.streams]


def evaluate_selection(selected: dict[str, Sequence[np.ndarray]], labels: Sequence[np.ndarray]) -> dict[str, float]:
    """Metrics of the final output, and the F1 of each stream.

    Args:
        selected: For `logits`, and for `tag_logits` and `image_logits` where the model has them, what is selected in
            each image: one 0/1 array for each image.
        labels: One array of 1, 0, -100 for each image.

    Returns:
        The metric's results in percent, and `tag_f1` and `image_f1` of the streams.
    """
    metric = load_metric()
    results = metric.compute(predictions=selected["logits"], references=labels)
    for stream in ("tag", "image"):
        if f"{stream}_logits" in selected:
            stream_results = metric.compute(predictions=selected[f"{stream}_logits"], references=labels)
            results[f"{stream}_f1"] = stream_results["f1"]
    return results


def combine_metrics(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """The metrics of all images from those of parts of them, read one after the other.

    Args:
        parts: What `evaluate_selection` returned for each part.

    Returns:
        The same figures: counts are added up, and of every mean the mean is taken, with the images that it was over as
        weights; nan where there were none. Empty without parts.
    """
    counts: dict[str, int] = {}
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            if name.startswith("num_"):
                counts[name] = counts.get(name, 0) + value
            else:
                num_images = part[_images_of(name)]
                sums[name] = sums.get(name, 0.0) + (num_images * value if num_images else 0.0)
    means = {
        name: total / counts[_images_of(name)] if counts[_images_of(name)] else math.nan
        for name, total in sums.items()
    }
    return {**means, **counts}


def _images_of(name: str) -> str:
    """The figure that says over how many images another one is the mean."""
    if name == "precision":
        return "num_selected_images"
    return "num_reducible_images" if name.endswith("reducible_f1") else "num_images"


def compute_metrics(prediction: EvalPrediction, config: MagnetoConfig) -> dict[str, float]:
    """What `Trainer` reports for a split: the metrics at threshold 0.5, the separate losses, and the mean gate.

    Args:
        prediction: The arrays of `output_names(config)`, each (images, L), and labels (images, L), padded with -100.
        config: The model's.

    Raises:
        UserError: The training has diverged: an output is not finite.
    """
    arrays = dict(zip(output_names(config), prediction.predictions, strict=True))
    labels = prediction.label_ids
    for name, values in arrays.items():
        _check_finite(name, values[labels != IGNORED_LABEL])
    results = _evaluate_rule(arrays, labels, PAPER_RULE)
    if config.streams == "both":
        objective = OBJECTIVES[config.objective]
        with torch.no_grad():  # of the whole split, in each process: nothing to share
            for loss, name in (("final_loss", "logits"), ("tag_loss", "tag_logits"), ("image_loss", "image_logits")):
                results[loss] = objective(torch.from_numpy(arrays[name]), torch.from_numpy(labels)).item()
        results["mean_gate"] = float(arrays["gate"][labels != IGNORED_LABEL].mean())
    return results


def add_stored_rule(
    metrics: dict[str, float],
    prediction: EvalPrediction,
    config: MagnetoConfig,
    selection: dict[str, Any],
    fitted: dict[str, dict[str, Any]],
) -> dict[str, float]:
    """The metrics of the rule that is stored with a model, beside those of the paper's rule.

    Args:
        metrics: What `compute_metrics` made of the split.
        prediction: The same arrays: raw logits, and as inputs the indices of the tags (images, L), padded with -100.
        config: The model's; without a calibration, its scores are raw.
        selection: The fields of the stored rule, without thresholds of single tags.
        fitted: The calibration of each output, as in `MagnetoConfig.calibration`, whether the model has it or not.

    Returns:
        `metrics`, in which everything that depends on the rule is the stored rule's on the model's scores. The paper's
        rule on raw scores is kept under the same names with `_at_half`. Besides, `calibration_errors`.
    """
    raw = dict(zip(output_names(config), prediction.predictions, strict=True))
    labels, tags = prediction.label_ids, torch.from_numpy(token_ids(prediction, config))
    calibrated = dict(raw)
    for name, fields in fitted.items():
        scaling = MagnetoCalibration(config.vocab_size, **fields)
        calibrated[name] = scaling(torch.from_numpy(raw[name]), tags).numpy()
    stored = raw if config.calibration is None else calibrated
    return {
        **metrics,
        **_evaluate_rule(stored, labels, SelectionRule.from_dict(selection)),
        **{f"{name}_at_half": metrics[name] for name in OF_THE_RULE if name in metrics},
        **calibration_errors(raw["logits"], calibrated["logits"], labels, config),
    }


def token_ids(prediction: EvalPrediction, config: MagnetoConfig) -> np.ndarray:
    """The indices of the tags (images, L), with `[PAD]` where labels are padded."""
    return np.where(prediction.label_ids == IGNORED_LABEL, config.pad_token_id, prediction.inputs)


def reliability(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How scores and truth go together, in `NUM_BINS` bins of equal width over [0, 1].

    Args:
        logits: (images, L).
        labels: (images, L) of 1, 0, -100.

    Returns:
        For each bin the number of tags, their mean score, and the share of important ones; nan where there is no tag.
    """
    real = labels != IGNORED_LABEL
    scores, important = _sigmoid(logits[real]).astype(np.float64), labels[real] == 1
    bins = np.minimum((scores * NUM_BINS).astype(int), NUM_BINS - 1)
    counts, sums, hits = (np.bincount(bins, weights, NUM_BINS) for weights in (np.ones(len(bins)), scores, important))
    with np.errstate(invalid="ignore"):
        return counts, sums / counts, hits / counts


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean distance of score and truth over the bins of `reliability`, weighted by their tags, in percent."""
    counts, scores, important = reliability(logits, labels)
    return 100 * float(np.nansum(counts * np.abs(scores - important)) / counts.sum())


def calibration_errors(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, config: MagnetoConfig
) -> dict[str, float]:
    """The expected calibration error in percent, under the names that it has in `metrics.json`.

    Args:
        before, after: Logits (images, L), raw and calibrated.
        labels: (images, L) of 1, 0, -100.
        config: The model's, which says which of the two its scores are.
    """
    error_before, error_after = (expected_calibration_error(logits, labels) for logits in (before, after))
    return {
        "expected_calibration_error": error_before if config.calibration is None else error_after,
        "expected_calibration_error_before": error_before,
        "expected_calibration_error_after": error_after,
    }


def compute_detection_metrics(prediction: EvalPrediction, config: MagnetoConfig) -> dict[str, float]:
    """What `Trainer` reports of outlier detection (section 5.2), in percent, over all tags of the split.

    Args:
        prediction: The logits of the streams there are, each (images, L), and labels (images, L): 1 for an image's own
            tag, 0 for an outlier, -100 for padding.
        config: The model's.

    Returns:
        For each stream the F1 of the detected outliers (a score below 0.5) and the average precision of their ranking;
        `average_precision`, the mean of the streams'; and `flag_all_f1`, the F1 of calling every tag an outlier.
    """
    names = [name for name in output_names(config) if name in ("tag_logits", "image_logits")]
    arrays = prediction.predictions if isinstance(prediction.predictions, tuple) else (prediction.predictions,)
    real = prediction.label_ids != IGNORED_LABEL
    outlier = torch.from_numpy(prediction.label_ids[real] == 0).int()
    flag_all_f1 = binary_f1_score(torch.ones_like(outlier), outlier)
    results = {"flag_all_f1": 100 * flag_all_f1.item(), "num_images": len(real)}
    for name, logits in zip(names, arrays, strict=True):
        _check_finite(name, logits[real])
        stream, suspicion = name.removesuffix("_logits"), 1 - torch.from_numpy(_sigmoid(logits[real]))
        f1 = binary_f1_score(suspicion, outlier)  # of those above 0.5
        results[f"{stream}_f1"] = 100 * f1.item()
        results[f"{stream}_average_precision"] = 100 * binary_average_precision(suspicion, outlier).item()
    ranked = [value for name, value in results.items() if name.endswith("average_precision")]
    return {**results, "average_precision": sum(ranked) / len(ranked)}


def format_metrics(metrics: dict[str, dict[str, float]]) -> str:
    """Metrics of several splits or models as a table for people; the keep-all row stands beside every F1."""
    rows = [("", "images", "precision", "recall", "F1", "F1, reducible images")]
    keep_all = None
    for name, figures in metrics.items():
        if keep_all not in (None, _percentages(figures, "keep_all_")):  # another split
            rows.append(("  keep all", "", *keep_all))
        keep_all = _percentages(figures, "keep_all_")
        rows.append((name, f"{figures['num_images']}", *_percentages(figures, "")))
        if "f1_at_half" in figures:
            at_half = [format_percent(figures[f"{figure}_at_half"]) for figure in ("precision", "recall", "f1")]
            if at_half != _percentages(figures, "")[:3]:  # another rule is in force
                rows.append(("  raw scores at 0.5", "", *at_half, ""))
        if "tag_f1" in figures and "image_f1" in figures:
            rows += [
                (f"  {stream} stream", "", "", "", format_percent(figures[f"{stream}_f1"]), "")
                for stream in ("tag", "image")
            ]
    rows.append(("  keep all", "", *keep_all))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def format_detection_metrics(figures: dict[str, float]) -> str:
    """Metrics of outlier detection for people."""
    lines = []
    for stream in ("tag", "image"):
        if f"{stream}_f1" in figures:
            f1, average_precision = figures[f"{stream}_f1"], figures[f"{stream}_average_precision"]
            lines.append(f"{stream} stream: F1 {f1:.2f}, average precision {average_precision:.2f}")
    return "\n".join([*lines, f"calling every tag an outlier: F1 {figures['flag_all_f1']:.2f}"])


def _percentages(figures: dict[str, float], prefix: str) -> list[str]:
    return [format_percent(figures[prefix + name]) for name in ("precision", "recall", "f1", "reducible_f1")]


def format_percent(value: float, digits: int = 2) -> str:
    """A figure for people; a dash for one that is undefined (nan)."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def write_metrics(path: Path, metrics: dict) -> None:
    """Write metrics as a JSON file that is there whole or not at all; what is undefined (nan) becomes null."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(_without_nan(metrics), indent=2) + "\n", encoding="utf-8")


def _read_metrics(path: Path) -> dict[str, float]:
    """The metrics of one split, as `predict.py` writes them; null is nan again."""
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the metrics file {path} cannot be read: {error}") from None
    if not isinstance(figures, dict) or not {"f1", "keep_all_f1"} <= figures.keys():
        raise UserError(f"{path} does not hold the metrics of one split, expected a file that predict.py has written")
    return {name: math.nan if value is None else value for name, value in figures.items()}


def _without_nan(value):
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _check_finite(name: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise UserError(f"the training has diverged: {name} are not finite; expected a smaller learning_rate")


def _evaluate_rule(outputs: dict[str, np.ndarray], labels: np.ndarray, rule: SelectionRule) -> dict[str, float]:
    """`evaluate_selection` of what a rule selects by each of the logits (images, L)."""
    mask = torch.from_numpy(labels != IGNORED_LABEL)
    selected = {
        name: list(select(torch.from_numpy(_sigmoid(logits)), mask, rule).numpy().astype(np.int8))
        for name, logits in outputs.items()
        if name.endswith("logits")
    }
    return evaluate_selection(selected, list(labels.astype(np.int8)))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return torch.sigmoid(torch.from_numpy(logits).float()).numpy()


def main() -> None:
    parser = CommandParser(
        "python -m magneto_training.evaluation", description="The metrics files of several models as one table"
    )
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path, help="the metrics that predict.py has written")
    with user_errors_in_one_line("evaluation"):
        files = parser.parse_args().files
        names = [path.name for path in files]
        metrics = {
            # Two models' test.metrics.json are told apart by their folders.
            str(path) if names.count(path.name) > 1 else path.name.removesuffix(".metrics.json"): _read_metrics(path)
            for path in files
        }
        print(format_metrics(metrics))


if __name__ == "__main__":
    main()
