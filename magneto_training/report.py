"""report.html: what a model chose and why, for people who would rather look than read. One file, opens from disk."""

import base64
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset
from PIL import ImageOps
from torch.utils.data import Subset

from modeling_magneto import MagnetoForTagSummarization, MagnetoProcessor
from modeling_magneto.processing_magneto import normalize_tag

from .arguments import PredictArguments
from .evaluation import format_metrics
from .photographs import read_photograph, undecoded
from .prediction import predict_batches, rows_for_model
from .prediction_parts import read_skipped
from .whole_file import whole_file

TEMPLATE = Path(__file__).parent / "report.html.jinja"
PHOTOGRAPH_SIZE = 256
CURVE_POINTS = 300
NUM_SCORES = 10_001  # scores are rounded to as many values for the curve


def write_report(
    model: MagnetoForTagSummarization,
    processor: MagnetoProcessor,
    dataset: Dataset,
    args: PredictArguments,
    metrics: dict[str, float],
) -> Path:
    """Write report.html beside a prediction: figures of all images, and a card for each of a sample.

    Scores and selected tags are those of the prediction file. The gate, and what each tag looked at, are computed
    again for the sample.

    Args:
        model: The model that predicted, in eval mode, on the device to use.
        processor: The model's processor.
        dataset: The rows of the prediction, in the same order, the skipped ones among them.
        args: The arguments of the prediction; `report_images` is the size of the sample.
        metrics: What `predict_dataset` returned.

    Returns:
        The page.
    """
    prediction_file = Path(args.output_file)
    in_sample = set(evenly_spread(pq.read_metadata(prediction_file).num_rows, args.report_images))
    totals, items, shown = _Totals(), [], []
    for place, (index, *item) in enumerate(_read_predictions(prediction_file, dataset)):
        totals.add(*item)
        if place in in_sample:
            items.append(item)
            shown.append(index)
    insights = _look_inside(model, processor, dataset, shown, args)
    photographs = _read_photographs(dataset, shown)
    cards = [
        _make_card(prediction, important, insight, photograph)
        for (prediction, important), insight, photograph in zip(items, insights, photographs, strict=True)
    ]

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        title=prediction_file.name,
        model_name=_name(args.model_name_or_path),
        dataset_name=_name(args.dataset_name),
        config_name=args.dataset_config_name,
        # Of a table, `datasets` says "train" whatever its split is called.
        split=args.split or ("test" if dataset.split == "test" else None),
        totals=totals,
        metrics_table=format_metrics({prediction_file.stem: metrics}) if "f1" in metrics else None,
        curve=totals.precision_recall() if totals.num_known else None,
        outlier_percent=metrics.get("outlier_percent"),
        cards=cards,
        map_side=next((card["map_side"] for card in cards), None),
        has_gate=model.config.streams == "both",
    )
    report_file = prediction_file.with_name("report.html")
    with whole_file(report_file) as partial:
        partial.write_text(page, encoding="utf-8")
    return report_file


def evenly_spread(total: int, count: int) -> list[int]:
    """At most `count` of the indices 0..total-1, the first among them, as far apart as they can be."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


@dataclass
class _Totals:
    """What is counted over all images."""

    num_images: int = 0
    num_tags: int = 0
    num_selected: int = 0
    num_known: int = 0  # images with ground truth, and of these
    num_mistaken: int = 0
    # Of the tags of those images, of which there may be many millions: how many there are of each score, and of
    # [not important, important] ones how many are selected.
    scores: tuple[list[int], list[int]] = field(default_factory=lambda: ([0] * NUM_SCORES, [0] * NUM_SCORES))
    selected: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, prediction: dict, important: set[str]) -> None:
        kept = set(prediction["selected_tags"])
        self.num_images += 1
        self.num_tags += len(prediction["tags"])
        self.num_selected += len(kept)
        if important:
            self.num_known += 1
            self.num_mistaken += kept != important
            for tag, score in zip(prediction["tags"], prediction["scores"], strict=True):
                self.scores[tag in important][round(score * (NUM_SCORES - 1))] += 1
                self.selected[tag in important] += tag in kept

    def precision_recall(self) -> dict:
        """Precision over recall in percent, over the tags of all images: the curve, and two points beside it."""
        counts = np.array(self.scores)  # (2, scores)
        reached = counts.any(axis=0)  # a threshold between two scores adds no point
        kept = counts[:, reached][:, ::-1].cumsum(axis=1)[:, ::-1]  # (2, points), from the lowest threshold up
        recall, precision = kept[1] / kept[1, 0], kept[1] / kept.sum(axis=0)
        points = 100 * np.stack([recall, precision], axis=1)  # (points, 2)
        points = points[evenly_spread(len(points), CURVE_POINTS)]
        num_important, right = counts[1].sum(), self.selected[1]
        chosen = None  # with nothing selected there is no precision
        if any(self.selected):
            chosen = (100 * right / num_important, 100 * right / sum(self.selected))
        keep_all = (100.0, 100 * num_important / counts.sum())
        # The first few tags swing wildly between right and wrong: they do not decide where the axis begins.
        lowest = min([*points[points[:, 0] >= 5, 1], keep_all[1], *([chosen[1]] if chosen else [])])
        return {
            "points": points.tolist(),
            "selected": chosen,
            "keep_all": keep_all,
            "floor": max(floor for floor in (0, 50, 75, 90) if floor <= lowest),
        }


def _read_predictions(prediction_file: Path, dataset: Dataset) -> Iterator[tuple[int, dict, set[str]]]:
    """Each image's index in the dataset, its prediction, and its important tags; none where they are unknown."""
    predictions = (row for rows in pq.ParquetFile(prediction_file).iter_batches(1000) for row in rows.to_pylist())
    if "important_tags" in dataset.column_names:
        batches = dataset.select_columns("important_tags").iter(batch_size=1000)
        truth = (tags for batch in batches for tags in batch["important_tags"])
    else:
        truth = (None for _ in range(len(dataset)))
    skipped = read_skipped(prediction_file)
    predicted = ((index, tags) for index, tags in enumerate(truth) if index not in skipped)
    for prediction, (index, important_tags) in zip(predictions, predicted, strict=True):
        yield index, prediction, {normalize_tag(tag) for tag in important_tags or ()}


@dataclass
class _Insight:
    """What the model tells of one image beside the scores.

    Args:
        gate: For each tag the weight of the image stream, in [0, 1]; with both streams only.
        attention: (tags, R), what share of its attention each tag gave to each region; with an image stream only.
        outliers: The strange tags that were injected.
    """

    gate: list[float] | None
    attention: np.ndarray | None
    outliers: set[str]


def _look_inside(
    model: MagnetoForTagSummarization,
    processor: MagnetoProcessor,
    dataset: Dataset,
    shown: list[int],
    args: PredictArguments,
) -> Iterator[_Insight]:
    rows = Subset(rows_for_model(dataset, processor, args), shown)
    for batch in predict_batches(model, processor, rows, args.batch_size, output_attentions=True):
        gate, attentions = batch.outputs.gate, batch.outputs.attentions
        if attentions is not None:
            attentions = attentions.float().mean(1).cpu().numpy()  # (B, L, R), over the heads
        for index, (row, result) in enumerate(zip(batch.rows, batch.results, strict=True)):
            num_tags = len(result["tags"])
            yield _Insight(
                None if gate is None else gate[index, :num_tags].tolist(),
                None if attentions is None else attentions[index, :num_tags],
                set(row.get("outliers", ())),
            )


def _make_card(prediction: dict, important: set[str], insight: _Insight, photograph: str | None) -> dict:
    kept = set(prediction["selected_tags"])
    mistakes = {
        "wrong": kept - important if important else set(),
        "lost": important - kept,
        "strange": kept & insight.outliers,
    }
    attention = insight.attention
    map_side = None if attention is None else math.isqrt(attention.shape[-1])  # of a square photograph
    tags = [
        {
            "name": name,
            "score": score,
            "selected": name in kept,
            "important": name in important,
            "strange": name in insight.outliers,
            "mistake": any(name in names for names in mistakes.values()),
            "gate": None if insight.gate is None else insight.gate[index],
            # One region alone always has all of the attention.
            "heat": _encode_heat(attention[index]) if map_side and map_side > 1 else None,
            "peak": None if attention is None else float(attention[index].max()),
        }
        for index, (name, score) in enumerate(zip(prediction["tags"], prediction["scores"], strict=True))
    ]
    return {
        "item_id": prediction["item_id"],
        "photograph": photograph,
        "map_side": map_side,
        "tags": sorted(tags, key=lambda tag: -tag["score"]),
        "mistakes": [kind for kind, names in mistakes.items() if names],
        "f1": 2 * len(kept & important) / (len(kept) + len(important)) if important else None,
    }


def _encode_heat(attention: np.ndarray) -> str:
    """A byte for each region (R,), row by row, 255 for the one that was looked at most; the page paints them."""
    return base64.b64encode(np.round(255 * attention / attention.max()).astype(np.uint8).tobytes()).decode()


def _name(name_or_path: str) -> str:
    """A Hub id, or a folder's name without its path: whoever is given a report need not know where it was made."""
    return Path(name_or_path).resolve().name if Path(name_or_path).exists() else name_or_path


def _read_photographs(dataset: Dataset, shown: list[int]) -> Iterator[str | None]:
    rows = dataset.select(shown)
    if "image" not in rows.column_names:
        yield from [None] * len(rows)
        return
    for row in undecoded(rows.select_columns("image")):
        yield _square(row["image"])


def _square(image: dict | None) -> str | None:
    """The centre square, which is what the model sees, as a data address of a small JPEG.

    None for a photograph that cannot be read, as a tag-only model need not.
    """
    photograph = read_photograph(image, PHOTOGRAPH_SIZE)
    if photograph is None:
        return None
    size = min(PHOTOGRAPH_SIZE, *photograph.size)
    buffer = io.BytesIO()
    square = ImageOps.fit(photograph, (size, size))
    square.info = {}  # the camera's notes, of which Pillow would write some into the new file
    square.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
