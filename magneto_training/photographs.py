"""Photographs as they lie in a table, undecoded, to what the model takes: large ones one at a time.

Decoded, a photograph of 24 million pixels takes 72 MB: a batch of them, in each of several workers, is beyond many a
machine's memory.
"""

import errno
import io
import struct
import warnings
from collections.abc import Sequence

import datasets
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from transformers import CLIPImageProcessor

from modeling_magneto.processing_magneto import MAX_ASPECT_RATIO, upright_rgb

from .augmentation import ImageAugmentation

# What the system says of a photograph that is not there, or that is damaged and sends its reader to where no file may
# reach. Anything else, as of a network share that is lost, may pass.
ERRORS_OF_A_PHOTOGRAPH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
PIXELS_AT_A_TIME = 4_000_000  # at least, that are decoded together
UNREADABLE = "a missing or unreadable photograph"
TOO_THIN = f"a photograph more than {MAX_ASPECT_RATIO} times as long as it is wide"
TOO_LARGE = f"a photograph of more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} million pixels"


def undecoded(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The same rows; their photographs, where they have any, come as `{bytes, path}`."""
    return rows.cast_column("image", datasets.Image(decode=False)) if "image" in rows.features else rows


class PhotographReader:
    """Undecoded photographs to tensors of the model's.

    Args:
        image_processor: That of the model's processor.
        augmentation: Replaces its resizing and cropping; for training.
    """

    def __init__(self, image_processor: CLIPImageProcessor, augmentation: ImageAugmentation | None = None):
        self.image_processor = image_processor
        self.augmentation = augmentation

    def __call__(self, images: Sequence[dict | None], seeds: Sequence[int] | None = None) -> list[torch.Tensor | None]:
        """Read some photographs, by their seeds where they are augmented.

        Args:
            images: Each as of `read_photograph`.
            seeds: One for each photograph; for training.

        Returns:
            For each photograph (3, S, S), normalised, or none where it cannot be read.

        Raises:
            OSError: As `read_photograph`.
        """
        shortest_side = None if self.augmentation is None else self.augmentation.shortest_side
        tensors: dict[int, torch.Tensor] = {}
        decoded: dict[int, Image.Image] = {}
        num_pixels = 0
        for index, image in enumerate(images):
            photograph = read_photograph(image, shortest_side)
            if photograph is None:
                continue
            if self.augmentation is not None:
                photograph = self.augmentation(photograph, seeds[index])
            decoded[index] = photograph
            num_pixels += photograph.width * photograph.height
            if num_pixels >= PIXELS_AT_A_TIME:
                tensors |= self._to_tensors(decoded)
                decoded, num_pixels = {}, 0
        tensors |= self._to_tensors(decoded)
        return [tensors.get(index) for index in range(len(images))]

    def _to_tensors(self, decoded: dict[int, Image.Image]) -> dict[int, torch.Tensor]:
        if not decoded:
            return {}
        resize = {} if self.augmentation is None else {"do_resize": False, "do_center_crop": False}
        pixel_values = self.image_processor(list(decoded.values()), return_tensors="pt", **resize)["pixel_values"]
        return dict(zip(decoded, pixel_values, strict=True))


def read_photograph(image: dict | None, shortest_side: int | None = None) -> Image.Image | None:
    """Decode a photograph, upright and in RGB; none where it cannot be read.

    Args:
        image: `bytes`, or else `path`, as `datasets` leaves photographs undecoded.
        shortest_side: A JPEG may be decoded at a half, a quarter or an eighth of its size, which is much quicker,
            where at least this many pixels stay on its shortest side.

    Raises:
        OSError: It is not the photograph that is at fault, but the disk or the network.
    """
    try:
        return _decode(image, shortest_side)
    except _UnreadablePhotograph:
        return None


def find_photograph_problem(image: dict | None) -> str | None:
    """What is wrong with an undecoded photograph; none where it can be read.

    Raises:
        OSError: As `read_photograph`.
    """
    try:
        _decode(image, shortest_side=64)  # a truncated file shows at any scale, and a small one is quick
    except _UnreadablePhotograph as problem:
        return str(problem)
    return None


class _UnreadablePhotograph(Exception):
    """The message says what is wrong, as a `RowReport` has it."""


def _decode(image: dict | None, shortest_side: int | None) -> Image.Image:
    """As `read_photograph`; all that the libraries raise of a photograph becomes `_UnreadablePhotograph`."""
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise _UnreadablePhotograph(UNREADABLE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of half as many pixels as the error
            with _open(image) as opened:
                if max(opened.size) > MAX_ASPECT_RATIO * min(opened.size):
                    raise _UnreadablePhotograph(TOO_THIN)
                if shortest_side is not None:
                    opened.draft(None, (shortest_side, shortest_side))  # of no effect on other formats
                opened.load()
                return upright_rgb(opened)
    except Image.DecompressionBombError:
        raise _UnreadablePhotograph(TOO_LARGE) from None
    except OSError as error:
        if error.errno not in (None, *ERRORS_OF_A_PHOTOGRAPH):  # of what is in a file, Pillow says it without a number
            raise
        raise _UnreadablePhotograph(UNREADABLE) from None
    except (ValueError, SyntaxError, TypeError, struct.error, RuntimeError):  # the last one of an AVIF
        raise _UnreadablePhotograph(UNREADABLE) from None


def _open(image: dict) -> Image.Image:
    if image["bytes"] is not None:
        return Image.open(io.BytesIO(image["bytes"]))
    if "://" in image["path"]:  # in an archive or on the Hub, as in streamed image folders; comes whole
        return datasets.Image().decode_example(image)
    return Image.open(image["path"])
