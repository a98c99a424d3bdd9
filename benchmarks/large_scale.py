"""Training in the paper's large-scale setting (configs/large_scale.yaml), from streamed Parquet files.

python -m benchmarks.large_scale [--device cuda --bf16 --workers 16]

ResNet-50 of which the last stage is trained, 224 px, batches of 256, 24,056 tags in all and 43 of an image. The
photographs are JPEG of 640 x 480. What the workers deliver without a model is measured beside.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from magneto_training.arguments import DataArguments, MagnetoTrainingArguments, ModelArguments, parse_arguments
from magneto_training.augmentation import TagAugmentation
from magneto_training.collation import TagCollator
from magneto_training.evaluation import compute_metrics
from magneto_training.initialization import start_model
from magneto_training.streaming import StreamedCollator, StreamedDataset, load_streamed_splits
from magneto_training.trainer import MagnetoTrainer
from modeling_magneto import MagnetoForTagSummarization

from .training import Clock, draw_photograph, now

CONFIG = Path(__file__).parents[1] / "configs/large_scale.yaml"
NUM_TAGS, TAGS_PER_ROW = 24_056, 43
NUM_DIFFERENT = 512  # photographs, which files repeat
ROWS_PER_FILE = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()

    warm_up_steps = 2 * args.workers + 4  # workers read two batches each ahead
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), (warm_up_steps + args.steps) * args.batch_size)
        trainer = new_trainer(folder, args, warm_up_steps + args.steps)
        rates = {"read, decode and augment": read_alone(trainer, warm_up_steps, args)}
        clock = Clock(warm_up_steps)
        trainer.add_callback(clock)
        trainer.train()
        rates["train"] = args.steps * args.batch_size / clock.seconds
    print(f"| large-scale setting, batches of {args.batch_size}, {args.workers} workers | images/s |")
    print("|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} |")
    if args.device != "cpu":
        print(f"\nMemory of the GPU: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most.")


def write_files(folder: Path, num_rows: int) -> None:
    """Rows whose tags are as unevenly frequent as those of people; together they have all tags."""
    random = np.random.default_rng(0)
    photographs = [draw_photograph(random, 640, 480) for _ in range(NUM_DIFFERENT)]
    names = np.array([f"tag {index:05d}" for index in range(NUM_TAGS)])
    num_rows = max(num_rows, ROWS_PER_FILE)
    for start in range(0, num_rows, ROWS_PER_FILE):
        rows = []
        for index in range(start, min(start + ROWS_PER_FILE, num_rows)):
            ranks = NUM_TAGS * random.random(3 * TAGS_PER_ROW) ** 2
            every = (index * TAGS_PER_ROW + np.arange(TAGS_PER_ROW)) % NUM_TAGS if start == 0 else []
            tags = names[list(dict.fromkeys([*every, *ranks.astype(int)]))[:TAGS_PER_ROW]].tolist()
            image = {"bytes": photographs[index % NUM_DIFFERENT], "path": None}
            rows.append({"item_id": str(index), "image": image, "tags": tags, "important_tags": tags[: 1 + index % 9]})
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, folder / f"train-{start:07d}.parquet", row_group_size=100)
    pq.write_table(table.slice(0, 16), folder / "validation.parquet")


def new_trainer(folder: str, args: argparse.Namespace, num_steps: int) -> MagnetoTrainer:
    """train.py's parts, in its order."""
    options = {
        "dataset_name": folder,
        "output_dir": f"{folder}/model",
        "backbone_weights": "none",
        "streaming": "true",
        "max_steps": num_steps,
        "per_device_train_batch_size": args.batch_size,
        "dataloader_num_workers": args.workers,
        "bf16": args.bf16,
        "use_cpu": args.device == "cpu",
        "lr_scheduler_type": "constant",  # that of the paper waits for evaluations
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": "false",
        "logging_steps": 10_000,
        "report_to": "none",
        "disable_tqdm": "true",
    }
    command_line = [str(CONFIG), *(f"--{name}={value}" for name, value in options.items())]
    model_args, data_args, training_args = parse_arguments(
        (ModelArguments, DataArguments, MagnetoTrainingArguments), command_line
    )
    stream, splits = load_streamed_splits(data_args, use_images=True)
    model, processor = start_model(MagnetoForTagSummarization, stream.vocabulary, model_args, training_args.seed, None)
    tag_augmentation = TagAugmentation(stream.vocabulary, data_args.tag_add_ratio, data_args.tag_drop_ratio)
    return MagnetoTrainer(
        model,
        training_args,
        processor,
        train_dataset=StreamedDataset(stream, training_args.seed, data_args.shuffle_buffer_size),
        eval_dataset=splits["validation"],
        train_collator=StreamedCollator(TagCollator.for_training(processor, data_args, tag_augmentation)),
        eval_collator=TagCollator(processor),
        compute_metrics=compute_metrics,
    )


def read_alone(trainer: MagnetoTrainer, warm_up_steps: int, args: argparse.Namespace) -> float:
    """Images per second that the data loader delivers, on the device."""
    for step, _ in enumerate(trainer.get_train_dataloader(), 1):
        if step == warm_up_steps:
            start = now(args.device)
        elif step == warm_up_steps + args.steps:
            return args.steps * args.batch_size / (now(args.device) - start)
    raise ValueError(f"found {step} batches, expected {warm_up_steps + args.steps}")


if __name__ == "__main__":
    main()
