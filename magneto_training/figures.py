"""Curves over epochs, from the log history of one run or of several."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .whole_file import whole_file

FINAL, TAG, IMAGE = {"color": "C0"}, {"color": "C1"}, {"color": "C2"}
OTHER, REFERENCE = {"color": "0.35"}, {"color": "0.35", "linestyle": "--", "marker": ""}
# Title, label of the vertical axis, and the curves: a key of the log history, what to call it, its style.
PANELS = (
    (
        "Training loss",
        "loss",
        (
            ("loss", "sum", OTHER),
            ("final_loss", "final output", FINAL),
            ("tag_loss", "tag stream", TAG),
            ("image_loss", "image stream", IMAGE),
        ),
    ),
    (
        "Validation F1",
        "percent",
        (
            ("eval_f1", "final output", FINAL),
            ("eval_tag_f1", "tag stream", TAG),
            ("eval_image_f1", "image stream", IMAGE),
            ("eval_keep_all_f1", "keep all", REFERENCE),
        ),
    ),
    (
        "Detection of strange tags, validation",
        "average precision, percent",
        (
            ("eval_tag_average_precision", "tag stream", TAG),
            ("eval_image_average_precision", "image stream", IMAGE),
        ),
    ),
    (
        "Mean gate (1: the picture decides)",
        "weight of the image stream",
        (("mean_gate", "training", OTHER), ("eval_mean_gate", "validation", FINAL)),
    ),
    ("Learning rate", "learning rate", (("learning_rate", "learning rate", OTHER),)),
)


def write_training_curves(history: list[dict[str, float]], file: Path) -> None:
    """Write the curves of one run as a PNG; nothing where the history holds none.

    Args:
        history: `Trainer.state.log_history`, as in `trainer_state.json`.
        file: The picture to write.
    """
    figure = draw_training_curves(history)
    if figure is not None:
        save_figure(figure, file)


def draw_training_curves(history: list[dict[str, float]]) -> Figure | None:
    """The panels for which a history has figures, or nothing where it has none."""
    logged = set().union(*history) if history else set()
    panels = [panel for panel in PANELS if any(key in logged for key, _, _ in panel[2])]
    if not panels:
        return None
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, label, curves) in zip(grid, panels, strict=False):
        for key, name, style in curves:
            plot_curves(axes, [history], key, name, **style)
        axes.set(title=title, ylabel=label)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            # Below the axes, where it covers no curve.
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    for axes in grid[len(panels) :]:
        axes.remove()
    return figure


def plot_curves(axes: Axes, histories: Sequence[list[dict[str, float]]], key: str, label: str, **style: Any) -> None:
    """Plot one figure over epochs: its mean over the runs, in a band of one standard deviation to either side.

    The curve ends where the shortest run does; a single run has no band. Runs without the figure do not count, and
    where no run has it, nothing is plotted.

    Args:
        axes: Where to plot.
        histories: For each run its `Trainer.state.log_history`.
        key: A key of the history's entries, such as `eval_f1`.
        label: The curve's name in the legend.
        style: Arguments of `Axes.plot`.
    """
    runs = [{entry["epoch"]: entry[key] for entry in history if key in entry} for history in histories]
    runs = [run for run in runs if run]
    if not runs:
        return
    epochs = sorted(set(runs[0]).intersection(*runs[1:]))
    values = np.array([[run[epoch] for epoch in epochs] for run in runs], dtype=float)  # (runs, epochs)
    mean = values.mean(0)
    (line,) = axes.plot(epochs, mean, **{"label": label, "marker": ".", **style})
    if len(runs) > 1:
        deviation = values.std(0, ddof=1)
        axes.fill_between(epochs, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure as a PNG that is there whole or not at all."""
    with whole_file(file) as partial:
        figure.savefig(partial, format="png", dpi=120)
