"""What an image costs in training, against the number of rows, of tags in the vocabulary, and of tags of an image.

python -m benchmarks.scale

Features are cached, so that nothing hides behind the backbone; live, the backbone is a tiny one for the same reason.
All settings of a table are run in turn in one process. Status 1 where a ratio is missed.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
from safetensors.torch import save_file

from magneto_training.feature_cache import ROWS_PER_FILE, FeatureCache

from .training import VOCABULARY, OurRecipe, draw_rows

SIZES = (1_000, 10_000, 100_000)
NUM_DIFFERENT = 1_000  # photographs; larger datasets repeat them
VOCABULARY_SIZES = (81, 24_056)
TAG_COUNTS = (16, 64)
MAX_RATIO_ROWS, MAX_RATIO_VOCABULARY = 1.2, 1.3
STEPS = 100
TINY = {"backbone": "test_resnet.r160_in1k", "image_size": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    options = {"bf16": False, "dataloader_num_workers": 0, "use_cpu": args.device == "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        few = draw_rows(NUM_DIFFERENT)
        sizes = {num_rows: repeat(few, num_rows, Path(folder)) for num_rows in SIZES}
        with_worker = {**options, "dataloader_num_workers": 1}
        live = {f"{size:,} rows, live": OurRecipe(rows, folder, with_worker, **TINY) for size, rows in sizes.items()}
        cached = {
            f"{size:,} rows, cached": OurRecipe(rows, folder, options, features=some_features(size, Path(folder)))
            for size, rows in sizes.items()
        }
        features = some_features(NUM_DIFFERENT, Path(folder))
        vocabularies = {
            f"{size:,} tags in the vocabulary": OurRecipe(
                few, folder, options, features=features, vocabulary=[*VOCABULARY, *more_tags(size - len(VOCABULARY))]
            )
            for size in VOCABULARY_SIZES
        }
        counts = {
            f"{count} tags an image": OurRecipe(
                with_tags(few, count), folder, options, features=features, max_tags=max(TAG_COUNTS)
            )
            for count in TAG_COUNTS
        }
        print("| training | microseconds an image, median | ratio to the first, median of the rounds | expected |")
        print("|---|---|---|---|")
        missed = [
            compare(live, args.rounds, MAX_RATIO_ROWS),
            compare(cached, args.rounds, MAX_RATIO_ROWS),
            compare(vocabularies, args.rounds, MAX_RATIO_VOCABULARY),
            compare(counts, args.rounds, None),
        ]
    sys.exit(any(missed))


def compare(recipes: dict[str, OurRecipe], rounds: int, max_ratio: float | None) -> bool:
    """Print a row for each recipe; returns whether a ratio is beyond the limit. A first round warms up."""
    seconds = {name: [] for name in recipes}
    for _ in range(1 + rounds):
        for name, recipe in recipes.items():
            seconds[name].append(1 / recipe.images_per_second(STEPS))
    first, missed = next(iter(seconds.values()))[1:], False
    for name, values in seconds.items():
        ratio = statistics.median(value / base for value, base in zip(values[1:], first, strict=True))
        missed |= max_ratio is not None and ratio > max_ratio
        expected = "" if max_ratio is None else f"at most {max_ratio}"
        print(f"| {name} | {1e6 * statistics.median(values[1:]):.0f} | {ratio:.2f} | {expected} |", flush=True)
    return missed


def repeat(rows: datasets.Dataset, num_rows: int, folder: Path) -> datasets.Dataset:
    """The same rows over and over, in files, as `load_dataset` has them."""
    indices = np.resize(np.arange(len(rows)), num_rows)
    path = folder / f"{num_rows}"
    rows.cast_column("image", datasets.Image(decode=False)).select(indices).flatten_indices().save_to_disk(path)
    return datasets.load_from_disk(path).cast_column("image", datasets.Image())


def some_features(num_rows: int, folder: Path) -> FeatureCache:
    """A cache of one view whose feature maps are noise; its files are there once for each number of rows."""
    noise = torch.randn(ROWS_PER_FILE, 4, 4, 512).relu().half()
    files = []
    for start in range(0, num_rows, ROWS_PER_FILE):
        files.append(folder / f"noise-{num_rows}-{start}.safetensors")
        if not files[-1].exists():
            save_file({"features": noise[: num_rows - start]}, files[-1])
    return FeatureCache([files])


def more_tags(count: int) -> list[str]:
    return [f"rare {index}" for index in range(count)]


def with_tags(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """The rows with `count` tags each, of which a third are important."""
    random = np.random.default_rng(0)
    tags = [
        [VOCABULARY[tag] for tag in random.choice(len(VOCABULARY), count, replace=False)] for _ in range(len(rows))
    ]
    important = [row[: count // 3] for row in tags]
    rows = rows.remove_columns(["tags", "important_tags"])
    return rows.add_column("tags", tags).add_column("important_tags", important)


if __name__ == "__main__":
    main()
