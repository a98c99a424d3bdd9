"""Training images per second, live and with cached features, against a plain implementation of the paper's recipe.

python -m benchmarks.training [--device cuda --workers 12 --batch_size 256]

ResNet-18, 112 px, batches of 32, 240 x 180 JPEG, tags as in NUS-WIDE (1.6 for an image in the mean, 13 at most, out of
81). The plain recipe is what the paper describes, written down in the simplest way: eager, float32, photographs
transformed one by one, every list of tags padded to 16, no cache; on a GPU it has as many workers as ours. All are run
in turn in one process. Status 1 where a ratio is missed; they are for two cores and no GPU.
"""

import argparse
import io
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

import datasets
import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import TrainerCallback

from magneto_training.arguments import DataArguments, MagnetoTrainingArguments
from magneto_training.augmentation import TagAugmentation
from magneto_training.collation import AugmentedDataset, TagCollator
from magneto_training.evaluation import compute_metrics
from magneto_training.feature_cache import FeatureCache, build_feature_caches
from magneto_training.frozen_backbone import lacks_bfloat16
from magneto_training.quantized_backbone import backbone_for_workers
from magneto_training.trainer import MagnetoTrainer
from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization, MagnetoProcessor

VOCABULARY = [f"tag {index:02d}" for index in range(81)]
NUM_ROWS, BATCH_SIZE, MAX_TAGS = 2048, 32, 16
WARM_UP_STEPS = 8
NUM_STEPS = {"plain": 12, "live": 48, "cached": 160}
IMAGES_ON_GPU = 8192  # of every recipe: more than the workers have read ahead
MIN_RATIOS = {"live, --int8 true": 2.5, "cached": 40}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    on_gpu = args.device != "cpu"
    warm_up_steps, all_steps = WARM_UP_STEPS, NUM_STEPS
    rows = draw_rows(NUM_ROWS)
    if on_gpu:
        warm_up_steps += 2 * args.workers  # the batches that are there when the first one is asked for
        all_steps = dict.fromkeys(NUM_STEPS, IMAGES_ON_GPU // args.batch_size)
        num_rows = (warm_up_steps + 1) * args.batch_size + IMAGES_ON_GPU
        rows = datasets.concatenate_datasets([rows] * math.ceil(num_rows / NUM_ROWS))
    options = {
        "bf16": False,
        "per_device_train_batch_size": args.batch_size,
        "dataloader_num_workers": args.workers,
        "use_cpu": not on_gpu,
    }
    with tempfile.TemporaryDirectory() as folder:
        recipes = {
            "plain": PlainRecipe(rows, args.device, args.batch_size, args.workers if on_gpu else 0),
            "live": OurRecipe(rows, folder, options),
            # Without the backbone, products are too small for bfloat16 to be quicker than its conversions.
            "cached": OurRecipe(rows, folder, options, cached_views=2),
        }
        if not lacks_bfloat16(torch.device(args.device)):
            recipes["live, --bf16 true"] = OurRecipe(rows, folder, {**options, "bf16": True})
        if not on_gpu:
            recipes["live, --int8 true"] = OurRecipe(rows, folder, {**options, "int8": True})
        rates = {name: [] for name in recipes}
        for _ in range(args.rounds):
            for name, recipe in recipes.items():
                rates[name].append(recipe.images_per_second(all_steps.get(name, all_steps["live"]), warm_up_steps))
    print(f"| training, batches of {args.batch_size} | images/s, median | ratio, median of the rounds | expected |")
    print("|---|---|---|---|")
    missed = False
    for name, values in rates.items():
        ratio = statistics.median(value / plain for value, plain in zip(values, rates["plain"], strict=True))
        least = 0 if on_gpu else MIN_RATIOS.get(name, 0)
        missed |= ratio < least
        expected = f"at least {least}" if least else ""
        print(f"| {name} | {statistics.median(values):.0f} | {ratio:.2f} | {expected} |")
    sys.exit(missed)


def draw_rows(num_rows: int) -> datasets.Dataset:
    """Rows with smooth random photographs of 240 x 180 pixels."""
    random = np.random.default_rng(0)
    rows = []
    for index in range(num_rows):
        photograph = draw_photograph(random, 240, 180)
        num_tags = min(13, random.geometric(1 / 1.6))
        tags = [VOCABULARY[tag] for tag in random.choice(81, num_tags, replace=False)]
        rows.append(
            {
                "item_id": str(index),
                "image": {"bytes": photograph, "path": None},
                "tags": tags,
                "important_tags": tags[: random.integers(1, num_tags, endpoint=True)],
            }
        )
    dataset = datasets.Dataset.from_list(rows)
    return dataset.cast_column("image", datasets.Image())


def draw_photograph(random: np.random.Generator, width: int, height: int) -> bytes:
    """A smooth random JPEG."""
    coarse = Image.fromarray(random.integers(0, 255, (height // 4, width // 4, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------- ours


class Clock(TrainerCallback):
    """Times the steps after the first ones, which allocate."""

    def __init__(self, warm_up_steps: int):
        self.warm_up_steps = warm_up_steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.warm_up_steps:
            self.start = now(args.device)
        elif state.global_step == state.max_steps:
            self.seconds = now(args.device) - self.start


def now(device: torch.device | str) -> float:
    """Seconds, when `device` has done all that it was asked to."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


class OurRecipe:
    """train.py's parts: the model, the collator, the trainer.

    Args:
        rows: As of `draw_rows`.
        folder: For what the trainer writes, and the feature cache.
        options: Of the training arguments.
        cached_views: As in train.py.
        features: Of a cache that is there already.
        vocabulary: All tags.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        folder: str,
        options: dict,
        cached_views: int = 0,
        features: FeatureCache | None = None,
        vocabulary: Sequence[str] = VOCABULARY,
        **config,
    ):
        torch.manual_seed(0)
        self.model = MagnetoForTagSummarization(MagnetoConfig(vocab_size=2 + len(vocabulary), **config))
        self.processor = MagnetoProcessor.from_vocabulary(
            vocabulary, self.model.config.image_size, max_tags=self.model.config.max_tags
        )
        self.data_args = DataArguments(dataset_name="drawn")
        self.options = {
            **options,
            "output_dir": folder,
            "disable_tqdm": True,
            "report_to": "none",
            "save_strategy": "no",
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "cached_views": cached_views,
            "feature_cache_dir": f"{folder}/cache",
        }
        if cached_views:
            arguments = MagnetoTrainingArguments(**self.options)
            caches = build_feature_caches(self.model, self.processor, {"train": rows}, self.data_args, arguments)
            features = caches["train"]
            self.options["dataloader_num_workers"] = arguments.dataloader_num_workers
        device = MagnetoTrainingArguments(**self.options).device
        self.collator = TagCollator.for_training(
            self.processor,
            self.data_args,
            TagAugmentation(vocabulary, 0.5, 0.5),
            backbone_for_workers(
                self.model, self.processor, rows, device, self.options["bf16"], self.options.get("int8", False)
            ),
        )
        self.rows = AugmentedDataset(rows, 0, features)

    def images_per_second(self, num_steps: int, warm_up_steps: int = WARM_UP_STEPS) -> float:
        clock = Clock(warm_up_steps)
        trainer = MagnetoTrainer(
            self.model,
            MagnetoTrainingArguments(**self.options, max_steps=warm_up_steps + num_steps, logging_steps=10_000),
            self.processor,
            train_dataset=self.rows,
            eval_dataset=self.rows,
            train_collator=self.collator,
            eval_collator=TagCollator(self.processor),
            compute_metrics=compute_metrics,
        )
        trainer.add_callback(clock)
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as accelerate launch does
        trainer.train()
        torch.set_num_threads(num_threads)
        return num_steps * trainer.args.train_batch_size / clock.seconds


# ------------------------------------------------------------------------------------------------------------ plain


class PlainRows(torch.utils.data.Dataset):
    """One photograph at a time, as the paper has it (A.1, A.5)."""

    def __init__(self, rows: datasets.Dataset):
        self.rows = rows
        self.indices = {tag: index + 1 for index, tag in enumerate(VOCABULARY)}
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(112, scale=(0.3, 1.0)),
                v2.RandomHorizontalFlip(),
                v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        row = self.rows[index]
        return self.tensors(row["image"], row["tags"], row["important_tags"])

    def tensors(
        self, image: Image.Image, tags: list[str], important_tags: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        indices = torch.zeros(MAX_TAGS, dtype=torch.int64)
        labels = torch.zeros(MAX_TAGS)
        for slot, tag in enumerate(tags):
            indices[slot] = self.indices[tag]
            labels[slot] = tag in important_tags
        return self.transform(image.convert("RGB")), indices, labels


class PlainMagneto(nn.Module):
    """Section 3.1 out of PyTorch's own layers."""

    def __init__(self):
        super().__init__()
        self.embedder = nn.Embedding(1 + len(VOCABULARY), 128, padding_idx=0)
        self.dropout = nn.Dropout(0.3)
        self.backbone = timm.create_model("resnet18", pretrained=False, num_classes=0, global_pool="")
        self.backbone.requires_grad_(False)
        self.projection = nn.Conv2d(512, 128, 1)
        self.norm = nn.BatchNorm2d(128)
        self.attention = nn.MultiheadAttention(128, 4, dropout=0.3, batch_first=True)
        self.tag_encoder, self.image_encoder = (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 4, 512, 0.3, batch_first=True), layers)
            for layers in (2, 1)
        )
        self.gate = nn.Sequential(
            nn.Dropout(0.3), nn.Linear(256, 512), nn.ReLU(), nn.Dropout(0.3), nn.Linear(512, 1), nn.Sigmoid()
        )
        self.tag_head, self.image_head = nn.Linear(128, 1), nn.Linear(128, 1)

    def forward(self, images: torch.Tensor, tags: torch.Tensor) -> tuple[torch.Tensor, ...]:
        padding = tags == 0
        queries = self.dropout(self.embedder(tags))
        regions = self.norm(self.projection(self.backbone(images))).flatten(2).transpose(1, 2)
        looked_at, _ = self.attention(queries, regions, regions)
        tag_states = F.relu(self.tag_encoder(queries, src_key_padding_mask=padding))
        image_states = self.image_encoder(self.dropout(F.relu(looked_at)), src_key_padding_mask=padding)
        image_states = F.relu(image_states)
        gate = self.gate(torch.cat([tag_states, image_states], -1))[..., 0]
        tag_scores = torch.sigmoid(self.tag_head(tag_states))[..., 0]
        image_scores = torch.sigmoid(self.image_head(image_states))[..., 0]
        return gate * image_scores + (1 - gate) * tag_scores, tag_scores, image_scores


def bce_dice(scores: torch.Tensor, labels: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    scores, labels = scores * real, labels * real
    overlap, total = (scores * labels).sum(-1), scores.sum(-1) + labels.sum(-1)
    return F.binary_cross_entropy(scores, labels) + (1 - (2 * overlap + 1) / (total + 1)).mean()


class PlainRecipe:
    """The training loop of a tutorial."""

    def __init__(self, rows: datasets.Dataset, device: str, batch_size: int, num_workers: int):
        torch.manual_seed(0)
        self.device = device
        self.model = PlainMagneto().to(device).train()
        self.loader = DataLoader(PlainRows(rows), batch_size, shuffle=True, num_workers=num_workers)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)

    def images_per_second(self, num_steps: int, warm_up_steps: int) -> float:
        for step, batch in enumerate(self.loader):
            if step == warm_up_steps:
                start = now(self.device)
            if step == warm_up_steps + num_steps:
                return num_steps * self.loader.batch_size / (now(self.device) - start)
            images, tags, labels = (tensor.to(self.device) for tensor in batch)
            real = (tags != 0).float()
            loss = sum(bce_dice(scores, labels, real) for scores in self.model(images, tags))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            loss.item()
        raise ValueError(f"found {step + 1} batches, expected more than {warm_up_steps + num_steps}")


if __name__ == "__main__":
    main()
