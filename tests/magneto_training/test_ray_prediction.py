"""Prediction by the workers of a local Ray."""

import datasets
import pyarrow.parquet as pq
import pytest
import ray
from accelerate import Accelerator
from conftest import make_rows
from datasets import Dataset

from magneto_training.arguments import PredictArguments, UsageError, UserError
from magneto_training.prediction import load_prediction_split
from magneto_training.prediction_parts import parts_folder, predict_dataset
from magneto_training.ray_prediction import predict_parts_with_ray


@pytest.fixture(scope="module", autouse=True)
def local_ray(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"HF_DATASETS_CACHE": cache}})
    yield
    ray.shutdown()


def test_ray_makes_the_same_file_as_one_process_and_names_a_bad_row(tiny_model, processor, tmp_path):
    for part in (tiny_model, processor):
        part.save_pretrained(tmp_path / "model")
    rows = make_rows(24)

    def predict(rows, name: str, **options):
        folder = tmp_path / name
        folder.mkdir()
        dataset = Dataset.from_list(rows).cast_column("image", datasets.Image())
        dataset.to_parquet(folder / "test.parquet")
        args = PredictArguments(
            str(tmp_path / "model"), str(folder), str(tmp_path / f"{name}.parquet"), rows_per_part=5, **options
        )
        dataset = load_prediction_split(args, use_images=True)
        metrics = predict_dataset(Accelerator(cpu=True), tiny_model, processor, dataset, args)
        return pq.read_table(args.output_file).to_pylist(), metrics

    expected, metrics = predict(rows, "plain")
    found, same_metrics = predict(rows, "ray", engine="ray")

    assert [row["item_id"] for row in found] == [row["item_id"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["selected_tags"] == other["selected_tags"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    assert same_metrics == pytest.approx(metrics, nan_ok=True)
    assert not parts_folder(str(tmp_path / "ray.parquet")).exists()

    images = Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))["image"][:]
    bad = [{**row, "image": image} for row, image in zip(rows, images, strict=True)]
    bad[7]["image"] = {"bytes": b"no photograph", "path": None}
    with pytest.raises(UserError, match="row 7 .item_id im7. has an unreadable photograph") as caught:
        predict(bad, "bad", engine="ray")
    assert "\n" not in str(caught.value)


def test_more_workers_than_the_largest_machine_has_cores_for_are_refused_at_once(tmp_path, monkeypatch):
    dataset = Dataset.from_dict({"item_id": ["a", "b"]})

    def predict(num_workers: int) -> None:
        args = PredictArguments("model", "data", str(tmp_path / "out.parquet"), num_workers=num_workers)
        predict_parts_with_ray(dataset, args)

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
