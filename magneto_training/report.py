"""report.html: what a model chose, for people who would rather look than read. One file, opens from disk."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import datasets
import jinja2
import pyarrow.parquet as pq
from datasets import Dataset
from PIL import Image, ImageOps

from modeling_magneto.processing_magneto import normalize_tag

from .evaluation import format_metrics

TEMPLATE = Path(__file__).parent / "report.html.jinja"
THUMBNAIL_SIZE = 240


def write_report(
    report_file: Path, prediction_file: Path, dataset: Dataset, metrics: dict[str, float], num_images: int
) -> None:
    """Write a page with the first images of a prediction.

    Args:
        report_file: The page to write.
        prediction_file: The Parquet file that `predict_dataset` wrote.
        dataset: The rows that were predicted, in the same order.
        metrics: What `predict_dataset` returned.
        num_images: How many images to show.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        title=prediction_file.name,
        num_images=len(dataset),
        metrics_table=format_metrics({prediction_file.stem: metrics}) if "f1" in metrics else None,
        outlier_percent=metrics.get("outlier_percent"),
        items=list(_read_items(prediction_file, dataset, min(num_images, len(dataset)))),
    )
    partial = report_file.with_name(report_file.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(report_file)


def _read_items(prediction_file: Path, dataset: Dataset, num_images: int) -> Iterator[dict]:
    predictions = pq.ParquetFile(prediction_file)
    shown = next(predictions.iter_batches(batch_size=max(num_images, 1))).to_pylist() if num_images else []
    if "image" in dataset.column_names:
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
    for prediction, row in zip(shown, dataset.select(range(num_images)), strict=True):
        selected = set(prediction["selected_tags"])
        important = {normalize_tag(tag) for tag in row.get("important_tags") or ()}
        tags = [
            {
                "name": tag,
                "score": score,
                "selected": tag in selected,
                "important": tag in important,
                "wrong": bool(important) and (tag in selected) != (tag in important),
            }
            for tag, score in zip(prediction["tags"], prediction["scores"], strict=True)
        ]
        yield {
            "item_id": prediction["item_id"],
            "image": _thumbnail(row.get("image")),
            "tags": sorted(tags, key=lambda tag: -tag["score"]),
            "wrong": any(tag["wrong"] for tag in tags),
        }


def _thumbnail(image: dict | None) -> str | None:
    """A small JPEG as a data address; none for a photograph that a tag-only model needed not read."""
    try:
        with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]) as opened:
            opened.draft("RGB", (THUMBNAIL_SIZE, THUMBNAIL_SIZE))
            thumbnail = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, TypeError):
        return None
    thumbnail.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    thumbnail.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
