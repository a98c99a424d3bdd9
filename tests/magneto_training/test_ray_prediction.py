"""Prediction by the workers of a local Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import ray
from accelerate import Accelerator
from conftest import make_rows
from datasets import Dataset

from magneto_training.arguments import PredictArguments, UsageError
from magneto_training.prediction import load_prediction_split
from magneto_training.prediction_parts import parts_folder, predict_dataset
from magneto_training.ray_prediction import predict_parts_with_ray

ROOT = Path(__file__).parents[2]


def test_ray_makes_the_same_file_as_one_process_and_names_a_bad_row(tiny_model, processor, tmp_path):
    for part in (tiny_model, processor):
        part.save_pretrained(tmp_path / "model")
    rows = make_rows(24)
    images = Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))["image"][:]
    bad = [{**row, "image": image} for row, image in zip(rows, images, strict=True)]
    bad[7]["image"] = {"bytes": b"no photograph", "path": None}

    def prepare(name: str, rows, engine: str) -> PredictArguments:
        folder = tmp_path / name
        folder.mkdir()
        Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(folder / "test.parquet")
        output_file = str(tmp_path / f"{name}.parquet")
        return PredictArguments(str(tmp_path / "model"), str(folder), output_file, rows_per_part=5, engine=engine)

    def predict_with_ray(args: PredictArguments) -> subprocess.CompletedProcess:
        """In a process of its own, which Ray ends where a thread of its is late."""
        names = ("model_name_or_path", "dataset_name", "output_file", "rows_per_part", "engine")
        command = [sys.executable, ROOT / "predict.py", "--report_images", "0"]
        command += [part for name in names for part in (f"--{name}", str(getattr(args, name)))]
        environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    plain, with_ray, with_bad = (
        prepare("plain", rows, "accelerate"),
        prepare("ray", rows, "ray"),
        prepare("bad", bad, "ray"),
    )
    metrics = predict_dataset(
        Accelerator(cpu=True), tiny_model, processor, load_prediction_split(plain, use_images=True), plain
    )
    done, failed = predict_with_ray(with_ray), predict_with_ray(with_bad)

    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = (pq.read_table(args.output_file).to_pylist() for args in (with_ray, plain))
    assert [row["item_id"] for row in found] == [row["item_id"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["selected_tags"] == other["selected_tags"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    same_metrics = json.loads((tmp_path / "ray.metrics.json").read_text())
    assert same_metrics == pytest.approx(metrics, nan_ok=True)
    assert not parts_folder(with_ray.output_file).exists()
    assert failed.returncode == 1
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("predict.py: error: ")]
    assert "row 7 (item_id im7) has a missing or unreadable photograph" in line


def test_more_workers_than_the_largest_machine_has_cores_for_are_refused_at_once(tmp_path, monkeypatch):
    dataset = Dataset.from_dict({"item_id": ["a", "b"]})

    def predict(num_workers: int) -> None:
        args = PredictArguments("model", "data", str(tmp_path / "out.parquet"), num_workers=num_workers)
        predict_parts_with_ray(dataset, args)

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    with pytest.raises(UsageError, match="^num_workers is 2, expected less than 2, the cores of Ray's largest"):
        predict(2)

    resources = [{"CPU": 8.0}, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 64.0, "GPU": 8.0}]
    nodes = [{"Alive": number < 2, "Resources": machine} for number, machine in enumerate(resources)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    with pytest.raises(UsageError, match="^num_workers is 8, expected less than 8, the cores of .* machine$"):
        predict(8)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 12.0, "GPU": 1.0})
    with pytest.raises(UsageError, match="^num_workers is 4, expected less than 4, .* machine with a GPU$"):
        predict(4)
