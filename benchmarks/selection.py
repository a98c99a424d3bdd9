"""Times the choice of the subset with the highest expected F1 against a plain implementation, image by image.

python -m benchmarks.selection
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from modeling_magneto.selection_magneto import select_by_expected_f1

NUM_IMAGES = 256
MOST_MILLISECONDS = {16: 3, 64: 50}  # by tags an image
REPEATS = 9


def main() -> None:
    torch.set_num_threads(1)
    print(f"| {NUM_IMAGES} images, one core | batched, ms | expected | image by image, ms | ratio |")
    print("|---|---|---|---|---|")
    for num_tags, most in MOST_MILLISECONDS.items():
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(NUM_IMAGES, num_tags, generator=generator)
        lengths = torch.randint(1, num_tags + 1, (NUM_IMAGES, 1), generator=generator)
        mask = torch.arange(num_tags) < lengths
        ways = (select_by_expected_f1, select_image_by_image)
        # Almost: single precision sees some subsets as equal that are not.
        found, expected = (select(scores, mask) for select in ways)
        assert (found == expected).all(-1).float().mean() > 0.98, "the two ways choose differently"
        batched, single = in_turn(ways, scores, mask)
        print(f"| {num_tags} tags | {batched:.1f} | at most {most} | {single:.0f} | {single / batched:.0f} |")


def in_turn(ways: tuple[Callable, ...], scores: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """The median of each way in milliseconds; they take turns, so that both see the same machine."""
    milliseconds = [[] for _ in ways]
    for _ in range(REPEATS):
        for times, select in zip(milliseconds, ways, strict=True):
            start = time.perf_counter()
            select(scores, mask)
            times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times) for times in milliseconds]


def select_image_by_image(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same choice as NumPy would make it of one image after the other, in O(L^3)."""
    selected = np.zeros(scores.shape, bool)
    for row, row_scores, row_mask in zip(selected, scores.numpy(), mask.numpy(), strict=True):
        tags = np.flatnonzero(row_mask)
        best = tags[np.argsort(-row_scores[tags], kind="stable")]
        probabilities = row_scores[best].astype(np.float64)
        expected = [expected_f1_of_first(probabilities, size) for size in range(1, len(best) + 1)]
        row[best[: np.argmax(expected) + 1]] = True
    return torch.from_numpy(selected)


def expected_f1_of_first(probabilities: np.ndarray, size: int) -> float:
    hits, misses = count_important(probabilities[:size]), count_important(probabilities[size:])
    hit, miss = np.ogrid[: len(hits), : len(misses)]
    return float(hits @ (2 * hit / (size + hit + miss)) @ misses)


def count_important(probabilities: np.ndarray) -> np.ndarray:
    counts = np.ones(1)
    for probability in probabilities:
        counts = np.convolve(counts, (1 - probability, probability))
    return counts


if __name__ == "__main__":
    main()
