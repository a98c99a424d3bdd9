"""Kills predict.py at random moments, starts it again each time, and looks whether every row is there exactly once.

python -m benchmarks.prediction_kills
"""

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.prediction_memory import predict_command, write_dataset, write_model

NUM_ROWS, NUM_KILLS, ROWS_PER_PART = 20_000, 10, 256
MOST_PARTS = 7  # between two kills: the prediction is never finished before the last of them


def main() -> None:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_model(folder / "model")
        write_dataset(folder / "data", NUM_ROWS)
        print(f"| {NUM_ROWS:,} rows in parts of {ROWS_PER_PART} | seconds after the start | parts that are there |")
        print("|---|---|---|")
        quiet = {
            "env": os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
        }
        command = [*predict_command(folder, "killed.parquet"), "--rows_per_part", str(ROWS_PER_PART)]
        parts = folder / "killed.parquet.parts"
        for kill in range(1, NUM_KILLS + 1):
            wanted = count_parts(parts) + rng.randrange(MOST_PARTS)
            start = time.perf_counter()
            process = subprocess.Popen(command, **quiet)
            # A number of parts, and then any moment while the next one is computed or written.
            while count_parts(parts) < wanted and process.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.random())
            process.send_signal(signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                raise SystemExit("the prediction was finished before it was killed: fewer MOST_PARTS are needed")
            print(f"| kill {kill} | {time.perf_counter() - start:.1f} | {count_parts(parts)} |", flush=True)
        subprocess.run(command, check=True, **quiet)
        whole = [*predict_command(folder, "whole.parquet"), "--rows_per_part", str(ROWS_PER_PART)]
        subprocess.run(whole, check=True, **quiet)

        killed, uninterrupted = (pq.read_table(folder / name) for name in ("killed.parquet", "whole.parquet"))
        item_ids, expected = killed["item_id"].to_pylist(), [str(index) for index in range(NUM_ROWS)]
        metrics = [json.loads((folder / f"{name}.metrics.json").read_text()) for name in ("killed", "whole")]
        print(f"\n| after {NUM_KILLS} kills | measured | expected |")
        print("|---|---|---|")
        print(f"| rows that are missing | {len(set(expected) - set(item_ids))} | 0 |")
        print(f"| rows that are there twice | {len(item_ids) - len(set(item_ids))} | 0 |")
        print(f"| in the order of the dataset | {item_ids == expected} | True |")
        print(f"| the same scores and tags as without a kill | {killed.equals(uninterrupted)} | True |")
        print(f"| the same metrics as without a kill | {metrics[0] == metrics[1]} | True |")


def count_parts(folder: Path) -> int:
    return len(list(folder.glob("*.parquet")))


if __name__ == "__main__":
    main()
