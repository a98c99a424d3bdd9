"""Times prepare_table.py on 700,000 rows with 43 tags each out of 24,056.

python benchmarks/large_table.py [OUT]     keeps the dataset in OUT, for train.py
"""

import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[1]
ROWS, TAGS_PER_ROW, VOCABULARY = 700_000, 43, 24_056
MAX_GIGABYTES = 3


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "table.csv")
        out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder, "out")
        generate(table)
        script = REPOSITORY / "dataset_scripts/prepare_table.py"
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, script, table, folder, out, "--no_images"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - start
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"| {ROWS:,} rows x {TAGS_PER_ROW} of {VOCABULARY:,} tags | measured | at most |")
    print("|---|---|---|")
    print(f"| seconds on {os.cpu_count()} cores | {seconds:.0f} | |")
    print(f"| peak memory in GB | {gigabytes:.2f} | {MAX_GIGABYTES} |")


def generate(path: Path) -> None:
    """Writes a CSV table whose tags are as unevenly frequent as those of people."""
    random = np.random.default_rng(0)
    names = [f"tag{index:05d}" for index in range(VOCABULARY)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["item_id", "tags", "important_tags"])
        for start in range(0, ROWS, 10_000):
            # A few more than needed, because the same tag is drawn twice now and then.
            ranks = VOCABULARY * random.random((10_000, 3 * TAGS_PER_ROW)) ** 2
            for row, drawn in enumerate(ranks.astype(int).tolist(), start):
                tags = [names[rank] for rank in list(dict.fromkeys(drawn))[:TAGS_PER_ROW]]
                writer.writerow([row, ",".join(tags), ",".join(tags[: 1 + row % 9])])


if __name__ == "__main__":
    main()
