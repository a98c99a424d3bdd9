"""Augmentation of training examples: photographs by AutoAugment, tags by adding and dropping (section 5.1, A.5)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

CROP_RATIOS = (3 / 4, 4 / 3)  # width to height


@dataclass
class TagAugmentation:
    """TAD, tag adding and dropping: unimportant tags go, random tags of the vocabulary come.

    First `drop` unimportant tags are taken away, then `add` tags that the image did not have are put in as
    unimportant ones. Both numbers are uniform on the integers 0 ... floor(ratio * unimportant tags of the image).

    Args:
        vocabulary: All tags, normalised.
        add_ratio: beta, at least 0.
        drop_ratio: beta-hat, in [0, 1].
    """

    vocabulary: Sequence[str]
    add_ratio: float
    drop_ratio: float

    def __post_init__(self):
        if self.add_ratio < 0:
            raise ValueError(f"tag_add_ratio is {self.add_ratio}, expected at least 0")
        if not 0 <= self.drop_ratio <= 1:
            raise ValueError(f"tag_drop_ratio is {self.drop_ratio}, expected a ratio in [0, 1]")

    def __call__(self, tags: list[str], important_tags: list[str], seed: int) -> list[str]:
        """Augment one image's tags (normalised, without duplicates) by its seed; its important tags all stay."""
        unimportant = [tag for tag in tags if tag not in set(important_tags)]
        most_dropped, most_added = int(self.drop_ratio * len(unimportant)), int(self.add_ratio * len(unimportant))
        if not most_dropped and not most_added:  # as for most images with few tags: there is nothing to draw
            return tags
        rng = np.random.default_rng(seed)
        num_dropped, num_added = rng.integers(most_dropped, endpoint=True), rng.integers(most_added, endpoint=True)
        dropped = {unimportant[index] for index in rng.choice(len(unimportant), num_dropped, replace=False)}
        return [tag for tag in tags if tag not in dropped] + draw_strange_tags(tags, self.vocabulary, num_added, rng)


def draw_strange_tags(
    tags: Sequence[str], vocabulary: Sequence[str], count: int, rng: np.random.Generator
) -> list[str]:
    """Tags that an image does not have: different ones, uniform over the vocabulary; fewer where that is exhausted."""
    # Drawing as many more as the image has tags, and passing over its own, is uniform over all the others.
    num_drawn = min(count + len(tags), len(vocabulary))
    drawn = (vocabulary[index] for index in rng.choice(len(vocabulary), num_drawn, replace=False))
    return [tag for tag in drawn if tag not in set(tags)][:count]


def draw_outliers(tags: Sequence[str], vocabulary: Sequence[str], ratio: float, rng: np.random.Generator) -> list[str]:
    """The outliers of one image, for pre-training (section 5.2) and the outlier test (section 5.1).

    Args:
        tags: The image's own, normalised.
        vocabulary: All tags, normalised.
        ratio: Outliers for each own tag, above 0; the number is rounded up, so every image gets one at least.
        rng: Decides which.
    """
    return draw_strange_tags(tags, vocabulary, math.ceil(ratio * len(tags)), rng)


class ImageAugmentation:
    """Random crop to the model's size, flip, and the ImageNet policy of AutoAugment, on uint8 photographs.

    Args:
        image_size: Height and width of the result, in pixels.
        min_crop_scale: The crop covers at least this share of the photograph's area, in (0, 1].
        auto_augment: Whether the AutoAugment policy follows crop and flip.
    """

    def __init__(self, image_size: int, min_crop_scale: float = 0.3, auto_augment: bool = True):
        if not 0 < min_crop_scale <= 1:
            raise ValueError(f"min_crop_scale is {min_crop_scale}, expected a share in (0, 1]")
        # Below this many pixels on a photograph's shortest side, the smallest crop of it would have to be enlarged.
        self.shortest_side = math.ceil(image_size / math.sqrt(min_crop_scale * min(CROP_RATIOS)))
        crop = v2.RandomResizedCrop(image_size, scale=(min_crop_scale, 1.0), ratio=CROP_RATIOS)
        steps = [crop, v2.RandomHorizontalFlip()]
        if auto_augment:
            steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET))
        self.transform = v2.Compose(steps)

    def __call__(self, image: Image.Image, seed: int) -> Image.Image:
        """Augment one photograph, in RGB: the same for the same seed, and the caller's random state stays as it is."""
        # What `torch.random.fork_rng` and `torch.manual_seed` do, without the third of the time that they take here.
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed)
            return self.transform(image)
        finally:
            torch.set_rng_state(state)


def example_seed(seed: int, epoch: int, index: int) -> int:
    """The 64-bit seed of one example in one epoch: the same in whatever worker, process or resumed run it falls."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0])
