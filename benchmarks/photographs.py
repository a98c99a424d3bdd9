"""Times prepare_table.py on photographs of 500 x 375, and shows that memory stays flat.

python benchmarks/photographs.py
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
FEW, MANY = 1_000, 5_000
MIN_RATE = 300
CORES = 2


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:CORES]))
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), MANY)
        few, few_gigabytes = run(Path(folder), FEW)
        many, many_gigabytes = run(Path(folder), MANY)
    rate = (MANY - FEW) / (many - few)  # without the time that the command needs to start
    print(f"| 500 x 375 JPEG on {CORES} cores | measured | expected |")
    print("|---|---|---|")
    print(f"| images/s | {rate:.0f} | at least {MIN_RATE} |")
    print(f"| peak memory in GB, {FEW:,} photographs | {few_gigabytes:.2f} | |")
    print(f"| peak memory in GB, {MANY:,} photographs | {many_gigabytes:.2f} | about the same |")


def generate(folder: Path, count: int) -> None:
    """Draws a few photographs of natural size in bytes, and links the others to them."""
    random = np.random.default_rng(0)
    (folder / "photographs").mkdir()
    for index in range(count):
        path = folder / f"photographs/{index}.jpg"
        if index < 50:
            coarse = Image.fromarray(random.integers(0, 255, (75, 100, 3), np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        else:
            os.link(folder / f"photographs/{index % 50}.jpg", path)


def run(folder: Path, count: int) -> tuple[float, float]:
    """Prepares `count` photographs; returns seconds and the peak memory in GB of all runs."""
    table = folder / f"{count}.jsonl"
    rows = ({"item_id": str(i), "tags": "sky", "important_tags": "sky"} for i in range(count))
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = REPOSITORY / "dataset_scripts/prepare_table.py"
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, script, table, folder / "photographs", folder / f"out_{count}"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
