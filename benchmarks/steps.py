"""Where the time of live training goes, step by step on one core, and how near the backbone is to the machine's limit.

python -m benchmarks.steps [--device cuda]

The setting is that of benchmarks.training; on a GPU, which a batch of 32 leaves idle, the backbone also has 256
photographs at a time. The limit is what the product of two large matrices reaches, measured beside.
"""

import argparse
import os
import statistics
from collections.abc import Callable

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from magneto_training.frozen_backbone import FrozenBackbone, lacks_bfloat16
from magneto_training.photographs import read_photograph
from magneto_training.quantized_backbone import QuantizedBackbone

from .training import BATCH_SIZE, OurRecipe, draw_rows, now

NUM_BATCHES, ROUNDS = 8, 5
MATRIX_SIZES = {"cpu": 2048, "cuda": 8192}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    on_gpu = device.type != "cpu"
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:1]))
    options = {"bf16": False, "dataloader_num_workers": 0, "use_cpu": not on_gpu}
    recipe = OurRecipe(draw_rows(NUM_BATCHES * BATCH_SIZE), "unused", options)
    model, collator = recipe.model.to(device).train(), recipe.collator
    dtypes = {"float32": torch.float32} | ({} if lacks_bfloat16(device) else {"bfloat16": torch.bfloat16})
    backbones = {name: FrozenBackbone(model, device, bf16=dtype == torch.bfloat16) for name, dtype in dtypes.items()}
    indices = [list(range(start, start + BATCH_SIZE)) for start in range(0, NUM_BATCHES * BATCH_SIZE, BATCH_SIZE)]
    rows = [recipe.rows.__getitems__(batch) for batch in indices]
    augmentation = collator.read_photographs.augmentation
    collator.backbone = None  # the backbone's time is taken by itself
    photographs = [{name: tensor.to(device) for name, tensor in collator(batch).items()} for batch in rows]
    pixel_values = [batch.pop("pixel_values") for batch in photographs]
    if not on_gpu:
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

    def measure(work: Callable[[], object]) -> float:
        """Milliseconds for each image, the median of some rounds after one that warms up."""
        seconds = []
        for _ in range(1 + ROUNDS):
            start = now(device)
            work()
            seconds.append(now(device) - start)
        return 1000 * statistics.median(seconds[1:]) / (NUM_BATCHES * BATCH_SIZE)

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
        print(f"| {name} | {value:.3f} |")

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.magneto.image_feature_extractor.feature_map(pixel_values[0])
    gigaflops = counter.get_total_flops() / BATCH_SIZE / 1e9
    all_at_once = torch.cat(pixel_values)
    print("\n| GFLOP/s | photographs | backbone | large matrices | share |")
    print("|---|---|---|---|---|")
    for name, dtype in dtypes.items():
        size = MATRIX_SIZES[device.type]
        matrix = torch.randn(size, size, device=device).to(dtype)
        limit = 2 * size**3 / (measure(lambda matrix=matrix: matrix @ matrix) * NUM_BATCHES * BATCH_SIZE) / 1e6
        taken = {BATCH_SIZE: milliseconds[f"backbone, {name}"]}
        if on_gpu:
            taken[len(all_at_once)] = measure(lambda backbone=backbones[name]: backbone(all_at_once))
        for num_photographs, value in taken.items():
            reached = 1000 * gigaflops / value
            print(f"| {name} | {num_photographs} | {reached:.0f} | {limit:.0f} | {reached / limit:.0%} |")


if __name__ == "__main__":
    main()
