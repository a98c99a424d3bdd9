"""Calibration: scores that mean what they say, fitted on the validation split after training.

Platt scaling (Guo et al., 2017: "On calibration of modern neural networks") of each output: a temperature and a bias,
and, where it helps, a bias for each frequent tag. What is said of its quality is cross-fitted: measured on images that
the numbers were not fitted to.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from transformers import EvalPrediction

from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization
from modeling_magneto.loss_magneto import IGNORED_LABEL
from modeling_magneto.modeling_magneto import MagnetoCalibration

from .evaluation import (
    NUM_BINS,
    calibration_errors,
    expected_calibration_error,
    output_names,
    reliability,
    token_ids,
)
from .figures import save_figure

NUM_FOLDS = 5
# More labels than these, of images that are drawn, would take minutes and change little.
MAX_LABELS = 100_000
# Tags with fewer labels than these have no bias of their own.
MIN_LABELS = 20
# Of the square of a tag's own bias; the first, which allows no such bias, is the choice where nothing helps.
PENALTIES = (math.inf, 100.0, 10.0, 1.0)


@dataclass
class CrossFit:
    """The final output before and after calibration by numbers that were fitted on other images.

    Args:
        labels: (images, L) of 1, 0, -100.
        before, after: Logits (images, L).
    """

    labels: np.ndarray
    before: np.ndarray
    after: np.ndarray

    def errors(self, config: MagnetoConfig) -> dict[str, float]:
        """`calibration_errors` of a model's final output."""
        return calibration_errors(self.before, self.after, self.labels, config)


def calibrate(model: MagnetoForTagSummarization, prediction: EvalPrediction, seed: int) -> CrossFit:
    """Fit temperatures and biases to a split, and set them in the model. The same in every process.

    Args:
        model: Uncalibrated; changed in place.
        prediction: The arrays of `output_names(config)`, labels, and as inputs the indices of the tags: each
            (images, L), padded with -100. Of the whole split.
        seed: Of the folds, and of the images, where there are more labels than `MAX_LABELS`.

    Returns:
        The final output of the images that were used, cross-fitted.
    """
    order = np.random.default_rng((seed, 1)).permutation(len(prediction.label_ids))
    num_labels = (prediction.label_ids[order] != IGNORED_LABEL).sum(-1).cumsum()
    used = np.sort(order[: max(1, np.searchsorted(num_labels, MAX_LABELS, side="right"))])
    arrays = dict(zip(output_names(model.config), prediction.predictions, strict=True))
    arrays = {name: array[used] for name, array in arrays.items()}
    labels = torch.from_numpy(prediction.label_ids[used])
    tags = torch.from_numpy(token_ids(prediction, model.config)[used])
    fit = functools.partial(fit_output, vocab_size=model.config.vocab_size, seed=seed)
    calibration = {
        name: fit(torch.from_numpy(logits), tags, labels) for name, logits in arrays.items() if name != "gate"
    }
    logits = torch.from_numpy(arrays["logits"])
    after = _cross_fit(fit, logits, tags, labels, model.config.vocab_size, seed)
    model.set_calibration(calibration)
    return CrossFit(labels.numpy(), arrays["logits"], after.numpy())


def fit_output(
    logits: torch.Tensor, tags: torch.Tensor, labels: torch.Tensor, vocab_size: int, seed: int
) -> dict[str, Any]:
    """The calibration of one output; how far tags may have biases of their own is chosen by cross-fitted log loss.

    Args:
        logits: (images, L).
        tags: (images, L), indices of the tags.
        labels: (images, L) of 1, 0, -100.
        vocab_size: Number of tag embeddings.
        seed: Of the folds.

    Returns:
        An entry of `MagnetoConfig.calibration`.
    """
    losses = {}
    for penalty in PENALTIES:
        fit = functools.partial(_fit, vocab_size=vocab_size, penalty=penalty)
        losses[penalty] = _log_loss(_cross_fit(fit, logits, tags, labels, vocab_size, seed), labels)
    return _fit(logits, tags, labels, vocab_size, penalty=min(losses, key=losses.get))  # of equal ones the first


def _fit(
    logits: torch.Tensor, tags: torch.Tensor, labels: torch.Tensor, vocab_size: int, penalty: float
) -> dict[str, Any]:
    """Minimise the sum of log losses, of half the squares of log-temperature and bias, and of half `penalty` times the
    squares of the tags' biases. The squares keep all finite where scores tell labels apart, or where none is known.
    """
    real = labels != IGNORED_LABEL
    logits, tags, targets = logits[real].double(), tags[real], labels[real].double()
    frequent = torch.bincount(tags, minlength=vocab_size) >= MIN_LABELS  # (vocab_size,)
    shared = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # log-temperature, bias
    own = torch.zeros(vocab_size, dtype=torch.float64, requires_grad=True)
    with_own = math.isfinite(penalty) and bool(frequent.any())
    optimizer = torch.optim.LBFGS(
        [shared, own] if with_own else [shared], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        calibrated = logits * torch.exp(-shared[0]) + shared[1]
        loss = shared.square().sum() / 2
        if with_own:
            calibrated = calibrated + (own * frequent)[tags]
            loss = loss + penalty * own.square().sum() / 2
        loss = loss + F.binary_cross_entropy_with_logits(calibrated, targets, reduction="sum")
        loss = loss / max(len(targets), 1)
        loss.backward()
        return loss

    optimizer.step(closure)
    log_temperature, bias = shared.tolist()
    fields = {"temperature": round(math.exp(log_temperature), 6), "bias": round(bias, 6)}
    if with_own:
        fields["tag_biases"] = {str(tag): round(own[tag].item(), 6) for tag in frequent.nonzero().flatten().tolist()}
    return fields


def _cross_fit(
    fit: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, Any]],
    logits: torch.Tensor,
    tags: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    seed: int,
) -> torch.Tensor:
    """Logits (images, L), those of each fold calibrated by what was fitted on the others."""
    folds = torch.from_numpy(np.random.default_rng(seed).permutation(len(logits)) % NUM_FOLDS)
    after = torch.empty_like(logits, dtype=torch.float32)
    for fold in range(NUM_FOLDS):
        inside = folds != fold
        scaling = MagnetoCalibration(vocab_size, **fit(logits[inside], tags[inside], labels[inside]))
        after[~inside] = scaling(logits[~inside], tags[~inside])
    return after


def _log_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    real = labels != IGNORED_LABEL
    return F.binary_cross_entropy_with_logits(logits[real].double(), labels[real].double()).item()


def write_reliability_diagram(cross_fit: CrossFit, file: Path) -> None:
    """Write a PNG: the share of important tags over the score, before and after, and how often the scores occur.

    Args:
        cross_fit: What `calibrate` returned.
        file: The picture to write.
    """
    figure = Figure(figsize=(5.2, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color="0.35", linestyle="--", label="perfect")
    edges = np.linspace(0, 1, NUM_BINS + 1)
    for name, logits, style in (
        ("before", cross_fit.before, {"color": "C1"}),
        ("after", cross_fit.after, {"color": "C0"}),
    ):
        counts, scores, important = reliability(logits, cross_fit.labels)
        error = expected_calibration_error(logits, cross_fit.labels)
        found = counts > 0
        above.plot(scores[found], important[found], marker=".", label=f"{name}: error {error:.1f} %", **style)
        below.stairs(counts / counts.sum(), edges, label=name, **style)
    above.set(title="Calibration, validation, cross-fitted", ylabel="share of important tags", ylim=(0, 1))
    below.set(xlabel="score", ylabel="share of tags", xlim=(0, 1))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    above.legend()
    save_figure(figure, file)
