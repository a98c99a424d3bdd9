"""Prediction, from the file to the score, against a plain implementation of the paper's recipe.

python -m benchmarks.prediction [--device cuda --workers 12 --batch_size 256]

ResNet-18, 112 px, batches of 32, 240 x 180 JPEG, tags as in NUS-WIDE. The plain recipe reads and transforms
photographs one by one and runs the model eagerly in float32; ours is all that predict.py does when model and rows are
there. On a GPU both have as many workers. All are run in turn in one process. Status 1 where the ratio is missed.
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import pipeline

from magneto_training.arguments import PredictArguments
from magneto_training.frozen_backbone import lacks_bfloat16
from magneto_training.prediction import load_prediction_split
from magneto_training.prediction_parts import load_backbone, predict_dataset
from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization, MagnetoProcessor

from .training import BATCH_SIZE, VOCABULARY, PlainMagneto, PlainRows, draw_rows

NUM_ROWS = 4096
GPU_FACTOR = 3  # as many rows as on a CPU
NUM_LATENCIES = 40
MIN_RATIO = 2.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    on_gpu = args.device != "cpu"
    rows = datasets.concatenate_datasets([draw_rows(NUM_ROWS)] * (GPU_FACTOR if on_gpu else 1))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "data").mkdir()
        rows.remove_columns("important_tags").to_parquet(folder / "data" / "test.parquet")
        plain = PlainPrediction(rows, args.batch_size, args.workers if on_gpu else 0, args.device)
        ours = OurPrediction(folder, args.batch_size, args.workers, args.device)
        ways = {
            "plain": plain.predict,
            "predict.py": ours.predict,
        }
        for precision in ("bf16", "int8"):
            if precision in ours.backbones:
                ways[f"predict.py --{precision} true"] = functools.partial(ours.predict, precision)
        rates = measure(ways, len(rows), args.rounds)
        name = f"prediction, {len(rows):,} photographs, batches of {args.batch_size}"
        print(f"| {name} | images/s, median | ratio, median of the rounds | expected |")
        print("|---|---|---|---|")
        ratios = {}
        for name, values in rates.items():
            ratios[name] = statistics.median(
                value / first for value, first in zip(values, rates["plain"], strict=True)
            )
            expected = f"at least {MIN_RATIO}" if "int8" in name else ""
            print(f"| {name} | {statistics.median(values):.0f} | {ratios[name]:.2f} | {expected} |")

        print("\n| one photograph, from the file to the score | milliseconds, median |")
        print("|---|---|")
        photograph = folder / "photograph.jpg"
        photograph.write_bytes(rows.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"])
        for name, predict_one in (("plain", plain.predict_one), ("pipeline", ours.predict_one)):
            print(f"| {name} | {1000 * latency(predict_one, photograph, rows[0]['tags']):.1f} |")
        if "int8" in ours.backbones:
            print(f"\nThe backbone of 8-bit integers is made in {ours.seconds_to_quantize:.1f} s, once a command.")
    sys.exit(ratios.get("predict.py --int8 true", MIN_RATIO) < MIN_RATIO)


def measure(ways: dict, num_rows: int, rounds: int) -> dict[str, list[float]]:
    """Photographs per second of each way and round; a first round warms up."""
    rates = {name: [] for name in ways}
    for _ in range(1 + rounds):
        for name, predict in ways.items():
            start = time.perf_counter()
            predict()
            rates[name].append(num_rows / (time.perf_counter() - start))
    return {name: values[1:] for name, values in rates.items()}


def latency(predict_one, photograph: Path, tags: list[str]) -> float:
    seconds = []
    for _ in range(NUM_LATENCIES):
        start = time.perf_counter()
        predict_one(photograph, tags)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


class OurPrediction:
    """predict.py's parts, and the pipeline."""

    def __init__(self, folder: Path, batch_size: int, num_workers: int, device: str):
        torch.manual_seed(0)
        self.folder = folder
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.accelerator = Accelerator(cpu=device == "cpu")  # by itself it would take a GPU
        self.model = MagnetoForTagSummarization(MagnetoConfig()).eval().requires_grad_(False)
        self.processor = MagnetoProcessor.from_vocabulary(VOCABULARY)
        self.dataset = load_prediction_split(self._arguments(), use_images=True)
        self.backbones = {}
        device = self.accelerator.device
        possible = {None: True, "bf16": not lacks_bfloat16(device), "int8": device.type == "cpu"}
        for precision in (name for name, is_possible in possible.items() if is_possible):
            start = time.perf_counter()
            self.backbones[precision] = load_backbone(*self._inputs(precision))
            self.seconds_to_quantize = time.perf_counter() - start  # of the last
        self.pipeline = pipeline("tag-summarization", model=self.model, processor=self.processor, device=device)

    def predict(self, precision: str | None = None) -> None:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as accelerate launch does: the workers need the cores
        predict_dataset(*self._inputs(precision), self.backbones[precision])
        torch.set_num_threads(num_threads)

    def predict_one(self, photograph: Path, tags: list[str]) -> list[dict]:
        return self.pipeline(photograph, candidate_labels=tags)

    def _inputs(self, precision: str | None) -> tuple:
        fields = {} if precision is None else {precision: True}
        return self.accelerator, self.model, self.processor, self.dataset, self._arguments(**fields)

    def _arguments(self, **fields) -> PredictArguments:
        return PredictArguments(
            model_name_or_path="drawn",
            dataset_name=str(self.folder / "data"),
            output_file=str(self.folder / "out.parquet"),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            **fields,
        )


class PlainPrediction:
    """The evaluation loop of a tutorial."""

    def __init__(self, rows: datasets.Dataset, batch_size: int, num_workers: int, device: str):
        torch.manual_seed(0)
        self.device = device
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.rows = PlainRows(rows)
        self.rows.transform = v2.Compose(
            [
                v2.Resize(112),
                v2.CenterCrop(112),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )
        self.model = PlainMagneto().to(device).eval()

    @torch.no_grad()
    def predict(self) -> None:
        self.results = []
        for images, tags, _ in DataLoader(self.rows, self.batch_size, num_workers=self.num_workers):
            scores, _, _ = self.model(images.to(self.device), tags.to(self.device))
            for row_tags, row_scores in zip(tags.tolist(), scores.tolist(), strict=True):
                scored = [(VOCABULARY[tag - 1], score) for tag, score in zip(row_tags, row_scores, strict=True) if tag]
                self.results.append((scored, [tag for tag, score in scored if score >= 0.5]))

    @torch.no_grad()
    def predict_one(self, photograph: Path, tags: list[str]) -> list[float]:
        row = self.rows.tensors(datasets.Image().decode_example({"path": str(photograph), "bytes": None}), tags, [])
        scores, _, _ = self.model(*(tensor[None].to(self.device) for tensor in row[:2]))
        return scores[0].tolist()


if __name__ == "__main__":
    main()
