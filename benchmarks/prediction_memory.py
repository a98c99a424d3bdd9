"""Measures the memory of predict.py against the number of rows.

python -m benchmarks.prediction_memory [NUM_ROWS ...]     by default 1,000, 10,000 and 100,000
"""

import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization, MagnetoProcessor

REPOSITORY = Path(__file__).parents[1]
SIZES = [1_000, 10_000, 100_000]
VOCABULARY = [f"tag{index:02d}" for index in range(81)]
IMAGE_SIZE = 32
SECONDS_BETWEEN_LOOKS = 0.05


def main() -> None:
    sizes = [int(argument) for argument in sys.argv[1:]] or SIZES
    print("| rows | rows/s | peak of its own memory, MB | ratio | peak with mapped files, MB | Arrow files, MB |")
    print("|---|---|---|---|---|---|")
    first = None
    for num_rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            write_model(folder / "model")
            write_dataset(folder / "data", num_rows)
            own, with_files, seconds = measure(predict_command(folder, "out.parquet"), folder / "cache")
            if pq.read_metadata(folder / "out.parquet").num_rows != num_rows:
                raise SystemExit("rows are missing")
            arrow = sum(path.stat().st_size for path in (folder / "cache").rglob("*.arrow")) / 1e6
        first = first or own
        print(
            f"| {num_rows:,} | {num_rows / seconds:.0f} | {own:.0f} | {own / first:.2f} | {with_files:.0f} "
            f"| {arrow:.0f} |",
            flush=True,
        )


def write_model(folder: Path) -> None:
    """A new MAGNeto with a small backbone: speed and memory do not depend on what it has learned."""
    config = MagnetoConfig(
        vocab_size=2 + len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        backbone="test_resnet.r160_in1k",
        image_size=IMAGE_SIZE,
    )
    MagnetoForTagSummarization(config).save_pretrained(folder)
    MagnetoProcessor.from_vocabulary(VOCABULARY, IMAGE_SIZE).save_pretrained(folder)


def write_dataset(folder: Path, num_rows: int) -> None:
    """Photographs of 64 px with 1 to 13 tags, in one Parquet file."""
    rng = np.random.default_rng(0)
    photographs = []
    for _ in range(16):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=50)
        photographs.append({"bytes": buffer.getvalue(), "path": None})
    tags = datasets.List(datasets.Value("string"))
    features = datasets.Features(
        item_id=datasets.Value("string"), image=datasets.Image(), tags=tags, important_tags=tags
    )
    folder.mkdir()
    with pq.ParquetWriter(folder / "test.parquet", features.arrow_schema) as writer:
        for start in range(0, num_rows, 1_000):
            rows = []
            for index in range(start, min(start + 1_000, num_rows)):
                own = [VOCABULARY[place] for place in rng.permutation(len(VOCABULARY))[: rng.integers(1, 14)]]
                rows.append(
                    {"item_id": str(index), "image": photographs[index % 16], "tags": own, "important_tags": own[:1]}
                )
            writer.write_table(pa.Table.from_pylist(rows, features.arrow_schema))


def predict_command(folder: Path, output_name: str) -> list[str]:
    return [
        *(sys.executable, str(REPOSITORY / "predict.py"), "--model_name_or_path", str(folder / "model")),
        *("--dataset_name", str(folder / "data"), "--output_file", str(folder / output_name), "--report_images", "20"),
    ]


def measure(command: list[str], cache: Path) -> tuple[float, float, float]:
    """The highest memory of a command in MB, its own alone and with the files that it has mapped, and its seconds.

    Pages of mapped files count as a process's memory as long as nobody else needs the room, and so grow with the
    dataset; they are the system's to take back.
    """
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    own = with_files = 0.0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory = {line.split(":")[0]: int(line.split()[1]) / 1e3 for line in status.splitlines() if " kB" in line}
            own = max(own, memory.get("RssAnon", 0) + memory.get("RssShmem", 0))
            with_files = max(with_files, memory.get("VmHWM", 0))
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if process.returncode:
            log.seek(0)
            raise SystemExit(log.read().decode()[-2000:])
    return own, with_files, time.perf_counter() - start


if __name__ == "__main__":
    main()
