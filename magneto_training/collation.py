"""Rows to batches: augmentation by the seed of each row, strange tags for outlier detection, tensors."""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset

from modeling_magneto import MagnetoProcessor
from modeling_magneto.processing_magneto import normalize_tag, normalize_tags

from .arguments import RowArguments
from .augmentation import ImageAugmentation, TagAugmentation, draw_outliers, example_seed
from .feature_cache import FeatureCache
from .frozen_backbone import FrozenBackbone
from .photographs import PhotographReader, undecoded
from .quantized_backbone import QuantizedBackbone
from .tag_data import DataError


class SeededDataset(torch.utils.data.Dataset):
    """Rows that know their index and the seed of their random changes: the same whenever they are read.

    Args:
        dataset: Rows as of `load_tag_dataset`. Their photographs stay undecoded.
        seed: The run's seed.
        features: Drawn from instead of reading the photographs.
        first_index: The index of the first row in the whole dataset, where this is a part of one.
    """

    epoch = 0

    def __init__(self, dataset: Dataset, seed: int, features: FeatureCache | None = None, first_index: int = 0):
        self.dataset = undecoded(dataset) if features is None else without_images(dataset)
        self.seed = seed
        self.features = features
        self.first_index = first_index

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """The rows of a batch at once, which is quicker; called by the data loader."""
        columns = self.dataset[indices]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        epoch = int(self.epoch)
        for row, index in zip(rows, indices, strict=True):
            row["index"] = self.first_index + index
            row["seed"] = example_seed(self.seed, epoch, row["index"])
        if self.features is not None:
            features = self.features.draw(indices, [row["seed"] for row in rows])
            for row, row_features in zip(rows, features, strict=True):
                row["image_features"] = row_features
        return rows


class AugmentedDataset(SeededDataset):
    """Training rows, whose random changes differ in every epoch.

    Args:
        dataset, seed, features: As in `SeededDataset`.
    """

    def __init__(self, dataset: Dataset, seed: int, features: FeatureCache | None = None):
        super().__init__(dataset, seed, features)
        # Shared memory: workers that outlive an epoch see the next one too.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch.fill_(epoch)


def without_images(dataset: Dataset) -> Dataset:
    """The same rows, of which no photograph will be decoded."""
    return dataset.select_columns([name for name in dataset.column_names if name != "image"])


class TagCollator:
    """Rows to a batch of tensors; with augmentations (training), rows are changed by their own seed before.

    >>> processor = MagnetoProcessor.from_vocabulary(["boat", "sky", "sun"], use_images=False)
    >>> rows = [
    ...     {"item_id": "a", "tags": ["Sky", "boat"], "important_tags": ["boat"]},
    ...     {"item_id": "b", "tags": ["sun"], "important_tags": ["sun"]},
    ... ]
    >>> batch = TagCollator(processor)(rows)
    >>> batch["input_ids"]
    tensor([[3, 2],
            [4, 0]])
    >>> batch["labels"]
    tensor([[   0,    1],
            [   1, -100]])

    Args:
        processor: The model's processor.
        image_augmentation: Replaces the processor's resizing; for training.
        tag_augmentation: TAD; for training.
        training: Cut lists of tags to the processor's `max_tags`.
        backbone: Turns photographs into `image_features`, in place of the model.
    """

    def __init__(
        self,
        processor: MagnetoProcessor,
        image_augmentation: ImageAugmentation | None = None,
        tag_augmentation: TagAugmentation | None = None,
        training: bool = False,
        backbone: FrozenBackbone | QuantizedBackbone | None = None,
    ):
        self.processor = processor
        self.tag_processor = MagnetoProcessor(
            processor.image_processor, processor.tokenizer, processor.max_tags, use_images=False
        )
        self.read_photographs = PhotographReader(processor.image_processor, image_augmentation)
        self.tag_augmentation = tag_augmentation
        self.training = training
        self.backbone = backbone

    @classmethod
    def for_training(
        cls,
        processor: MagnetoProcessor,
        data_args: RowArguments,
        tag_augmentation: TagAugmentation | None = None,
        backbone: FrozenBackbone | QuantizedBackbone | None = None,
    ) -> "TagCollator":
        """A collator that augments photographs as the arguments say."""
        image_size = processor.image_processor.crop_size["height"]
        image_augmentation = ImageAugmentation(image_size, data_args.min_crop_scale, data_args.auto_augment)
        return cls(processor, image_augmentation, tag_augmentation, training=True, backbone=backbone)

    def read(self, rows: list[dict]) -> tuple[list[dict], list[dict]]:
        """Read the photographs of a batch, where the model looks at them and there are no features of them yet.

        Returns:
            The rows with `pixel_values` (3, S, S) in place of `image`, and those whose photograph cannot be read.
        """
        if not self.processor.use_images or "image_features" in rows[0]:
            return rows, []
        photographs = self.read_photographs([row["image"] for row in rows], [row.get("seed") for row in rows])
        read = [
            {name: row[name] for name in row if name != "image"} | {"pixel_values": pixel_values}
            for row, pixel_values in zip(rows, photographs, strict=True)
        ]
        return (
            [row for row in read if row["pixel_values"] is not None],
            [row for row in read if row["pixel_values"] is None],
        )

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Rows, as they come from a dataset or from `read`, to a batch.

        Raises:
            DataError: A photograph cannot be read, and when the rows were checked, it could be.
        """
        if "pixel_values" not in rows[0]:
            rows, unreadable = self.read(rows)
            if unreadable:
                raise DataError(f"the photograph of item_id {unreadable[0]['item_id']} can no longer be read")
        tags = [row["tags"] for row in rows]
        important_tags = [row["important_tags"] for row in rows] if "important_tags" in rows[0] else None
        if self.training:
            tags = [self._augmented_tags(row["tags"], row["important_tags"], row["seed"]) for row in rows]
        batch = dict(self.tag_processor(tags=tags, important_tags=important_tags, truncation=self.training))
        if "image_features" in rows[0]:
            # Channels last in memory, as the rows have them: rearranging would take longer than copying.
            features = torch.stack([row["image_features"].permute(1, 2, 0) for row in rows])
            batch["image_features"] = features.permute(0, 3, 1, 2)
        elif self.processor.use_images:
            pixel_values = torch.stack([row["pixel_values"] for row in rows])
            if self.backbone is None:
                batch["pixel_values"] = pixel_values
            else:
                batch["image_features"] = self.backbone(pixel_values)
        return batch

    def _augmented_tags(self, tags: list[str], important_tags: list[str], seed: int) -> list[str]:
        tags = normalize_tags(tags)
        if self.tag_augmentation is not None:
            tags = self.tag_augmentation(tags, [normalize_tag(tag) for tag in important_tags], seed)
        if len(tags) > self.processor.max_tags:
            # Which tags the cut spares is chance, not their place in the list.
            np.random.default_rng((seed, 2)).shuffle(tags)
        return tags


class OutlierCollator:
    """Rows to a batch for outlier detection: every image gets strange tags, and a label says which tags are its own.

    Ground truth is not looked at: a row's `important_tags`, if there are any, are replaced by its own tags.

    Args:
        collate: Makes the tensors; the training collator augments photographs.
        outlier_ratio: Strange tags for each own tag, above 0.
    """

    def __init__(self, collate: TagCollator, outlier_ratio: float):
        self.collate = collate
        self.outlier_ratio = outlier_ratio
        self.vocabulary = collate.processor.vocabulary

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        injected = [inject_outliers(row, self.vocabulary, self.outlier_ratio) for row in rows]
        own = [{"important_tags": [tag for tag in row["tags"] if tag not in set(row["outliers"])]} for row in injected]
        return self.collate([row | labels for row, labels in zip(injected, own, strict=True)])


class OutlierDataset(SeededDataset):
    """Rows to which strange tags have been added, for the outlier test (section 5.1): always the same ones.

    Args:
        dataset: Rows as of `load_tag_dataset`.
        seed: Decides which tags.
        vocabulary: All tags, normalised.
        outlier_ratio: Strange tags for each own tag, above 0.
        first_index: As in `SeededDataset`.
    """

    def __init__(
        self, dataset: Dataset, seed: int, vocabulary: Sequence[str], outlier_ratio: float, first_index: int = 0
    ):
        super().__init__(dataset, seed, first_index=first_index)
        self.vocabulary = vocabulary
        self.outlier_ratio = outlier_ratio

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return [inject_outliers(row, self.vocabulary, self.outlier_ratio) for row in super().__getitems__(indices)]


def inject_outliers(row: dict, vocabulary: Sequence[str], outlier_ratio: float) -> dict:
    """A row with a seed, with strange tags behind its own, and named in `outliers`."""
    tags = normalize_tags(row["tags"])
    # The seed alone belongs to TAD; one more number keeps the two apart.
    outliers = draw_outliers(tags, vocabulary, outlier_ratio, np.random.default_rng((row["seed"], 1)))
    return {**row, "tags": tags + outliers, "outliers": outliers}
