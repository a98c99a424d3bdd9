"""Where the time of live training goes, step by step on one core, and how near the backbone is to the machine's limit.

python -m benchmarks.steps

The setting is that of benchmarks.training. The limit is what the product of two large matrices reaches, measured
beside.
"""

import os
import statistics
import time
from collections.abc import Callable

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from magneto_training.frozen_backbone import FrozenBackbone, lacks_bfloat16
from magneto_training.photographs import read_photograph
from magneto_training.quantized_backbone import QuantizedBackbone

from .training import BATCH_SIZE, OurRecipe, draw_rows

NUM_BATCHES, ROUNDS = 8, 5
MATRIX_SIZE = 2048
CPU = torch.device("cpu")


def main() -> None:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:1]))
    options = {"bf16": False, "dataloader_num_workers": 0, "use_cpu": True}
    recipe = OurRecipe(draw_rows(NUM_BATCHES * BATCH_SIZE), "unused", options)
    model, collator = recipe.model.train(), recipe.collator
    dtypes = {"float32": torch.float32} | ({} if lacks_bfloat16(CPU) else {"bfloat16": torch.bfloat16})
    backbones = {name: FrozenBackbone(model, CPU, bf16=dtype == torch.bfloat16) for name, dtype in dtypes.items()}
    indices = [list(range(start, start + BATCH_SIZE)) for start in range(0, NUM_BATCHES * BATCH_SIZE, BATCH_SIZE)]
    rows = [recipe.rows.__getitems__(batch) for batch in indices]
    augmentation = collator.read_photographs.augmentation
    collator.backbone = None  # the backbone's time is taken by itself
    photographs = [collator(batch) for batch in rows]
    pixel_values = [batch.pop("pixel_values") for batch in photographs]
    backbones["8-bit integers"] = QuantizedBackbone(backbones["float32"], pixel_values)
    batches = [
        {**batch, "image_features": backbones["float32"](pixels)}
        for batch, pixels in zip(photographs, pixel_values, strict=True)
    ]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, fused=True)

    def decode() -> list[Image.Image]:
        return [read_photograph(row["image"], augmentation.shortest_side) for batch in rows for row in batch]

    decoded, seeds = decode(), [row["seed"] for batch in rows for row in batch]

    def augment() -> None:
        for photograph, seed in zip(decoded, seeds, strict=True):
            augmentation(photograph, seed)

    def train_heads() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    def step() -> None:
        for _ in batches:
            optimizer.step()

    milliseconds = {
        "read": measure(lambda: [recipe.rows.__getitems__(batch) for batch in indices]),
        "decode": measure(decode),
        "augment the photograph": measure(augment),
    }
    collated = measure(lambda: [collator(batch) for batch in rows])
    milliseconds["photograph and tags to tensors"] = (
        collated - milliseconds["decode"] - milliseconds["augment the photograph"]
    )
    milliseconds |= {
        f"backbone, {name}": measure(lambda backbone=backbone: [backbone(batch) for batch in pixel_values])
        for name, backbone in backbones.items()
    }
    milliseconds["tags, gate and losses, forward and backward"] = measure(train_heads)
    milliseconds["optimizer"] = measure(step)
    print("| step | milliseconds an image, one core |")
    print("|---|---|")
    for name, value in milliseconds.items():
        print(f"| {name} | {value:.2f} |")

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.magneto.image_feature_extractor.feature_map(pixel_values[0])
    gigaflops = counter.get_total_flops() / BATCH_SIZE / 1e9
    print("\n| GFLOP/s, one core | backbone | large matrices | share |")
    print("|---|---|---|---|")
    for name, dtype in dtypes.items():
        reached = 1000 * gigaflops / milliseconds[f"backbone, {name}"]
        limit = matrix_gigaflops(dtype)
        print(f"| {name} | {reached:.0f} | {limit:.0f} | {reached / limit:.0%} |")


def measure(work: Callable[[], object]) -> float:
    """Milliseconds for each image, the median of some rounds after one that warms up."""
    seconds = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[1:]) / (NUM_BATCHES * BATCH_SIZE)


def matrix_gigaflops(dtype: torch.dtype) -> float:
    matrix = torch.randn(MATRIX_SIZE, MATRIX_SIZE).to(dtype)
    milliseconds = measure(lambda: matrix @ matrix) * NUM_BATCHES * BATCH_SIZE
    return 2 * MATRIX_SIZE**3 / milliseconds / 1e6


if __name__ == "__main__":
    main()
