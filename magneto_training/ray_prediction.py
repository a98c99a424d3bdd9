"""The parts of a prediction, made by the workers of a Ray cluster (predict.py --engine ray).

Ray Data hands out the numbers of the rows, not the rows: each worker reads its own, and writes the parts itself. So
dataset, model and output folder must be where every machine finds them, on the Hub or in a folder that all share.
"""

import contextlib
import dataclasses
import functools
from pathlib import Path

import ray
import torch
from datasets import Dataset
from safetensors import SafetensorError
from tqdm.auto import tqdm

from .arguments import PredictArguments, UsageError, UserError
from .frozen_backbone import FrozenBackbone
from .prediction import load_model, load_prediction_split, rows_for_model
from .prediction_parts import missing_parts, part_ranges, predict_parts
from .quantized_backbone import QuantizedBackbone, backbone_for_workers

TASKS_PER_WORKER = 32  # a task may be several parts; few enough that handing them out costs nothing


class _Worker:
    """Loads the model once, and makes a part for each row of a batch."""

    def __init__(self, args: PredictArguments):
        self.args = args
        self.model, self.processor = load_model(args.model_name_or_path)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")  # Ray shows a worker its own GPU
        dataset = load_prediction_split(args, self.processor.use_images)
        self.rows = rows_for_model(dataset, self.processor, args)

    @functools.cached_property
    def backbone(self) -> FrozenBackbone | QuantizedBackbone | None:
        return backbone_for_workers(
            self.model, self.processor, self.rows.dataset, self.model.device, self.args.bf16, self.args.int8
        )

    def __call__(self, batch: dict) -> dict:
        # After the loss of a machine Ray does a task again, with the parts that had been made.
        missing = missing_parts(map(range, batch["start"].tolist(), batch["stop"].tolist()), self.args)
        parts = [(part, self.rows) for part in missing]
        try:
            for _ in predict_parts(self.model, self.processor, self.rows, parts, self.args, self.backbone):
                pass
        except (UserError, OSError, SafetensorError) as error:  # to be told in one line, which Ray would not do
            return {"num_rows": [0], "error": [str(error)]}
        return {"num_rows": [int(sum(batch["stop"] - batch["start"]))], "error": [""]}


def predict_parts_with_ray(dataset: Dataset, args: PredictArguments) -> None:
    """Make the missing parts on all GPUs, or CPUs where there are none, of the cluster of `RAY_ADDRESS`, or else of
    this machine.

    Args:
        dataset: The rows to predict.
        args: The arguments of the prediction.

    Raises:
        UsageError: `num_workers` are more than any machine has cores for.
        UserError: As `predict_parts`.
    """
    parts = missing_parts(part_ranges(0, len(dataset), args.rows_per_part), args)
    if not parts:
        return
    if not ray.is_initialized():
        ray.init()
    ray.data.DataContext.get_current().enable_progress_bars = False
    resources = ray.cluster_resources()
    args = dataclasses.replace(args, num_workers=args.num_workers or 0)  # Ray shares out the cores
    num_cpus, num_gpus = 1 + args.num_workers, int(resources.get("GPU", 0))
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most_cpus = int(max(machine.get("CPU", 0) for machine in machines if machine.get("GPU") or not num_gpus))
    if num_cpus > most_cpus:  # Ray would wait for a larger one
        largest = "Ray's largest machine" + (" with a GPU" if num_gpus else "")
        raise UsageError(f"num_workers is {args.num_workers}, expected less than {most_cpus}, the cores of {largest}")
    num_workers = min(num_gpus or max(1, int(resources["CPU"]) // num_cpus), len(parts))
    tasks = ray.data.from_items(
        [{"start": part.start, "stop": part.stop} for part in parts],
        override_num_blocks=min(TASKS_PER_WORKER * num_workers, len(parts)),
    )
    results = tasks.map_batches(
        _Worker,
        fn_constructor_args=[_with_absolute_paths(args)],
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_cpus=num_cpus,
        num_gpus=1 if num_gpus else 0,
    )
    with tqdm(total=sum(map(len, parts)), unit="image", desc=f"Predicting with {num_workers} workers") as progress:
        # Closed also after an error: a thread of Ray's that is left behind ends the process when it finds Ray gone.
        with contextlib.closing(iter(results.iter_rows())) as rows:
            for result in rows:
                if result["error"]:
                    raise UserError(result["error"])
                progress.update(result["num_rows"])


def _with_absolute_paths(args: PredictArguments) -> PredictArguments:
    """Workers have a working directory of their own."""
    names = ("model_name_or_path", "dataset_name", "output_file")
    paths = {name: Path(getattr(args, name)) for name in names}
    return dataclasses.replace(
        args, **{name: str(path.absolute()) for name, path in paths.items() if path.exists() or name == "output_file"}
    )
