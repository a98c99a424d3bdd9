import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from magneto_training.figures import draw_training_curves, plot_curves, save_figure, write_training_curves

TRAINING = [
    {"epoch": 1.0, "loss": 3.0, "final_loss": 1.0, "tag_loss": 1.2, "image_loss": 0.8, "mean_gate": 0.4, "step": 9},
    {"epoch": 1.0, "eval_f1": 60.0, "eval_tag_f1": 50.0, "eval_keep_all_f1": 55.0, "eval_mean_gate": 0.3, "step": 9},
    {"epoch": 2.0, "loss": 2.0, "final_loss": 0.7, "tag_loss": 0.8, "image_loss": 0.5, "mean_gate": 0.5, "step": 18},
    {"epoch": 2.0, "eval_f1": 70.0, "eval_tag_f1": 52.0, "eval_keep_all_f1": 55.0, "eval_mean_gate": 0.6, "step": 18},
    {"epoch": 2.0, "train_runtime": 1.0, "step": 18},
    {"epoch": 2.0, "validation_f1": 70.0, "step": 18},
]
PRETRAINING = [
    {"epoch": 1.0, "loss": 2.0, "tag_loss": 1.0, "image_loss": 1.0, "learning_rate": 0.1},
    {"epoch": 1.0, "eval_tag_average_precision": 40.0, "eval_image_average_precision": 60.0},
]


def curves(figure: Figure) -> dict[str, dict[str, list[float]]]:
    """The values of each curve, by the panel's title and the curve's label."""
    return {
        axes.get_title(): {line.get_label(): line.get_ydata().tolist() for line in axes.lines} for axes in figure.axes
    }


def plotted(histories, key="f1"):
    axes = Figure().subplots()
    plot_curves(axes, histories, key, "curve")
    return axes


def run(*values: float) -> list[dict]:
    return [{"epoch": epoch, "f1": value} for epoch, value in enumerate(values, start=1)]


def test_a_training_run_shows_losses_f1_beside_keep_all_and_the_gate():
    assert curves(draw_training_curves(TRAINING)) == {
        "Training loss": {
            "sum": [3.0, 2.0],
            "final output": [1.0, 0.7],
            "tag stream": [1.2, 0.8],
            "image stream": [0.8, 0.5],
        },
        "Validation F1": {"final output": [60.0, 70.0], "tag stream": [50.0, 52.0], "keep all": [55.0, 55.0]},
        "Mean gate (1: the picture decides)": {"training": [0.4, 0.5], "validation": [0.3, 0.6]},
    }


def test_a_pretraining_run_shows_the_average_precision_of_both_streams():
    figure = draw_training_curves(PRETRAINING)

    assert curves(figure)["Detection of strange tags, validation"] == {"tag stream": [40.0], "image stream": [60.0]}
    assert {axes.get_title() for axes in figure.axes} == {
        *("Training loss", "Detection of strange tags, validation", "Learning rate"),
    }


def test_the_curves_are_written_as_a_picture_and_nothing_else(tmp_path):
    history = json.loads(json.dumps(TRAINING))  # as trainer_state.json holds it

    write_training_curves(history, tmp_path / "training_curves.png")

    assert [path.name for path in tmp_path.iterdir()] == ["training_curves.png"]
    with Image.open(tmp_path / "training_curves.png") as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) > 400


def test_the_legends_cover_neither_curves_nor_labels():
    figure = draw_training_curves(TRAINING + PRETRAINING)
    figure.draw_without_rendering()

    boxes = {axes.get_title(): axes.get_window_extent() for axes in figure.axes}
    legends = [(axes, axes.get_legend().get_window_extent()) for axes in figure.axes if axes.get_legend()]
    assert len(boxes) == 5 and len(legends) == 4
    for axes, legend in legends:
        assert not any(legend.overlaps(box) for box in boxes.values())
        assert not any(
            legend.overlaps(other.get_tightbbox(for_layout_only=True)) for other in figure.axes if other is not axes
        )
        assert not legend.overlaps(axes.xaxis.label.get_window_extent())
        assert figure.bbox.containsx(legend.x0) and figure.bbox.containsx(legend.x1) and legend.y0 >= 0


@pytest.mark.parametrize("history", [[], [{"epoch": 0, "train_runtime": 1.0, "step": 0}]])
def test_a_run_without_figures_leaves_no_picture(tmp_path, history):
    write_training_curves(history, tmp_path / "training_curves.png")

    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(tmp_path):
    file = tmp_path / "curves.png"
    file.write_bytes(b"the one before")
    figure = Figure()
    figure.subplots().set_title("$\\nonsense{$")

    with pytest.raises(ValueError):
        save_figure(figure, file)

    assert file.read_bytes() == b"the one before"


def test_several_runs_are_a_mean_in_a_band_of_the_sample_deviation():
    axes = plotted([run(1.0, 4.0), run(3.0, 4.0), run(5.0, 7.0)])

    (line,) = axes.lines
    assert line.get_xdata().tolist() == [1, 2] and line.get_ydata().tolist() == [3.0, 5.0]
    (band,) = axes.collections
    edges = band.get_paths()[0].vertices
    assert edges[edges[:, 0] == 1, 1].min() == pytest.approx(3 - 2)
    assert edges[edges[:, 0] == 1, 1].max() == pytest.approx(3 + 2)
    assert edges[edges[:, 0] == 2, 1].max() == pytest.approx(5 + np.std([4, 4, 7], ddof=1))


def test_a_single_run_has_no_band():
    axes = plotted([run(1.0, 2.0)])

    assert len(axes.lines) == 1 and not axes.collections


def test_a_mean_ends_with_the_shortest_run_and_leaves_out_runs_without_the_figure():
    axes = plotted([run(1.0, 2.0, 9.0), run(3.0, 4.0), [{"epoch": 1, "loss": 1.0}]])

    assert axes.lines[0].get_ydata().tolist() == [2.0, 3.0]


def test_what_no_run_has_is_not_plotted():
    assert not plotted([run(1.0)], key="image_f1").lines
