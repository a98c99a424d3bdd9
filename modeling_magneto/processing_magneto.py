"""Photographs and tags to tensors, and the model's outputs back to tags."""

import base64
import binascii
import functools
import os
import unicodedata
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

import torch
from huggingface_hub.utils import httpx  # as transformers does: httpx or its successor, whichever is there
from PIL import ExifTags, Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BatchFeature, CLIPImageProcessor, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageInput,
    PILImageResampling,
    make_flat_list_of_images,
)

from .selection_magneto import PAPER_RULE, SelectionRule, find_rule, select

PAD, UNKNOWN = "[PAD]", "[UNK]"
IGNORED_LABEL = -100  # as in loss_magneto, which this file must not import
MAX_ASPECT_RATIO = 50  # the short side is scaled to the model's size: a line of pixels would become a huge picture
MAX_CACHED_LENGTH = 64  # of a tag: longer ones are rare, and strangers' could fill the memory
# How a photograph is turned upright, by the orientation in its EXIF data.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def normalize_tag(tag: str) -> str:
    """The one spelling of a tag: Unicode NFKC, case folded, white space collapsed. Idempotent.

    Raises:
        ValueError: The tag is no text, or nothing is left of it.
    """
    if not isinstance(tag, str):
        raise ValueError(f"found the tag {tag!r} of type {type(tag).__name__}, expected text")
    tag = _normalized(tag) if len(tag) <= MAX_CACHED_LENGTH else _normalized.__wrapped__(tag)
    if not tag:
        raise ValueError("found an empty tag, expected text")
    return tag


@functools.lru_cache(2**16)
def _normalized(tag: str) -> str:
    # Folding can undo the normal form, and the normal form can undo folding: two rounds settle every character.
    for _ in range(2):
        tag = unicodedata.normalize("NFKC", tag).casefold()
    return " ".join(unicodedata.normalize("NFKC", tag).split())


def normalize_tags(tags: Iterable[str]) -> list[str]:
    """Normalised tags in their order; of duplicates the first is kept.

    Raises:
        ValueError: There is no tag, one is empty, or `tags` is a single text.
    """
    if isinstance(tags, str):
        raise ValueError(f"found the text {tags!r}, expected a list of tags")
    tags = list(dict.fromkeys(normalize_tag(tag) for tag in tags))
    if not tags:
        raise ValueError("found an empty list of tags, expected at least one")
    return tags


def upright_rgb(photograph: Image.Image) -> Image.Image:
    """A photograph in RGB, and turned as its camera was held."""
    photograph.load()  # before its EXIF data, which may stand behind the pixels
    if photograph.mode.startswith("I;16") or (photograph.mode == "I" and photograph.format in ("PNG", "PPM")):
        # 16-bit grey, of which `convert("RGB")` would make everything white.
        photograph = photograph.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
    try:
        turn = TURNS.get(photograph.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # broken EXIF data, whose errors are of many kinds, are no fault of the pixels
        turn = None
    if turn is not None:  # `ImageOps.exif_transpose` would write all EXIF data anew, and fail where it cannot
        photograph = photograph.transpose(turn)
        photograph.info = {}  # where the orientation stood: whoever looks again must not turn it once more
    return photograph if photograph.mode == "RGB" else photograph.convert("RGB")


def load_photograph(image: Any, timeout: float | None = None) -> Image.Image:
    """Open a photograph of any form: upright, in RGB, and with the same pixels whichever way it came.

    Args:
        image: A path, a URL, base64 text, a data URL, the bytes of a file, or a PIL image.
        timeout: Seconds to wait for the server of a URL; by default for ever.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        opened = image
        if isinstance(opened, str) and not os.path.isfile(opened):
            opened = _read_text(opened, timeout)
        if not isinstance(opened, Image.Image):
            opened = Image.open(BytesIO(opened) if isinstance(opened, (bytes, bytearray)) else opened)
        return upright_rgb(opened)
    except Exception as error:  # a file, a download, base64, and each of Pillow's decoders fail in their own way
        found = repr(image[:60]) if isinstance(image, (str, bytes)) else f"of type {type(image).__name__}"
        raise ValueError(
            f"the photograph {found} cannot be read ({type(error).__name__}): "
            "expected a path, a URL, base64 text, the bytes of a file or a PIL image"
        ) from error


def _read_text(text: str, timeout: float | None) -> bytes:
    """The file that an address leads to, or that base64 text or a data URL holds."""
    if text.startswith(("http://", "https://")):
        return httpx.get(text, timeout=timeout, follow_redirects=True).raise_for_status().content
    is_url = text.startswith("data:")
    content = text.partition(",")[2] if is_url else text
    try:
        return base64.b64decode("".join(content.split()), validate=True)  # many an encoder breaks lines
    except binascii.Error:
        if is_url:
            raise ValueError("no base64 text") from None
        raise FileNotFoundError(text) from None  # what it is most likely meant to be


class MagnetoProcessor(ProcessorMixin):
    """Prepares photographs and tags for MAGNeto, and reads its outputs.

    Args:
        image_processor: A transformers image processor; used where the model looks at photographs.
        tokenizer: A word-level tokenizer in which one tag is one token.
        max_tags: l, the number of tags to which *training* examples are cut.
        use_images: Whether the model looks at photographs; `False` for the tag-only models.
        selection: The fields of the `SelectionRule` that is in force unless `post_process` is told otherwise; by
            default the paper's, a threshold of 0.5.

    Raises:
        ValueError: A field of `selection` is unknown or has a wrong value, or `max_tags` is below 1.
    """

    def __init__(
        self,
        image_processor,
        tokenizer,
        max_tags: int = 16,
        use_images: bool = True,
        selection: dict[str, Any] | None = None,
    ):
        super().__init__(image_processor, tokenizer)
        if max_tags < 1:
            raise ValueError(f"max_tags is {max_tags}, expected at least 1")
        self.max_tags = max_tags
        self.use_images = use_images
        self.selection = (
            {"rule": PAPER_RULE.rule, "threshold": PAPER_RULE.threshold} if selection is None else selection
        )
        SelectionRule.from_dict(self.selection)

    @classmethod
    def from_vocabulary(
        cls,
        tags: Iterable[str],
        image_size: int = 112,
        image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
        max_tags: int = 16,
        use_images: bool = True,
    ) -> "MagnetoProcessor":
        """A new processor for a vocabulary.

        Args:
            tags: The vocabulary, in the order of its indices; `[PAD]` and `[UNK]` are put before it.
            image_size: The short side is scaled to it, then the centre square is taken (pixels).
            image_mean, image_std: One number per colour channel; photographs are scaled to [0, 1] before.
            max_tags, use_images: As in the class.
        """
        vocabulary = {tag: index for index, tag in enumerate((PAD, UNKNOWN, *normalize_tags(tags)))}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN)),
            pad_token=PAD,
            unk_token=UNKNOWN,
            model_input_names=["input_ids", "attention_mask"],
        )
        image_processor = CLIPImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            resample=PILImageResampling.BILINEAR,
            image_mean=list(image_mean),
            image_std=list(image_std),
        )
        return cls(image_processor, tokenizer, max_tags=max_tags, use_images=use_images)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """As every processor's; raises `ValueError` where `selection` has become none that could be loaded again."""
        SelectionRule.from_dict(self.selection)
        return super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @property
    def vocabulary(self) -> list[str]:
        """The tags that the model knows, in the order of their indices."""
        vocabulary = self.tokenizer.get_vocab()
        return [tag for tag in sorted(vocabulary, key=vocabulary.get) if tag not in self.tokenizer.all_special_tokens]

    def __call__(
        self,
        images: ImageInput | None = None,
        tags: Sequence[str] | Sequence[Sequence[str]] | None = None,
        important_tags: Sequence[str] | Sequence[Sequence[str]] | None = None,
        truncation: bool = False,
        return_tensors: str = "pt",
        **images_kwargs,
    ) -> BatchFeature:
        """Turn a batch, or a single photograph with its tags, into the model's tensors.

        Args:
            images: One photograph for each list of tags, as of `load_photograph`, or as an array or tensor; ignored by
                a tag-only model's processor.
            tags: A list of tags, or a list of such lists.
            important_tags: The ground truth, for `labels`: a subset of each list of tags; an empty list where it is
                unknown.
            truncation: Cut each list to `max_tags`, as in training.
            return_tensors: Only PyTorch tensors, `"pt"`, are made.
            images_kwargs: Passed on to the image processor.

        Returns:
            `input_ids` (B, L) and `attention_mask` (B, L), padded to the longest list; `pixel_values`
            (B, 3, `image_size`, `image_size`); with `important_tags`, `labels` (B, L) of 1, 0, and -100 for padding
            and for images whose ground truth is unknown.

        Raises:
            ValueError: A list is empty or holds an empty tag; photographs are missing or cannot be read, or their
                number differs from that of the lists; an important tag is not among the tags.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}, expected 'pt': the model is PyTorch's")
        if tags is None or not len(tags):
            raise ValueError(f"tags is {tags!r}, expected a list of tags or a list of such lists")
        if isinstance(tags[0], str):
            tags = [tags]
            important_tags = None if important_tags is None else [important_tags]
        tags = [self._normalize_row(row, index) for index, row in enumerate(tags)]
        important_tags = None if important_tags is None else self._normalize_important(important_tags, tags)
        if truncation:
            tags = [row[: self.max_tags] for row in tags]

        # Dynamic padding: to the longest list of this batch. Whole tags are looked up, without the tokenizer's own
        # splitting: one tag is one token, whatever was added to its vocabulary.
        input_ids = [self.tokenizer.convert_tokens_to_ids(row) for row in tags]
        inputs = self.tokenizer.pad({"input_ids": input_ids}, padding_side="right", return_tensors="pt")
        if self.use_images:
            inputs["pixel_values"] = self._pixel_values(images, len(tags), images_kwargs)
        if important_tags is not None:
            inputs["labels"] = self._labels(tags, important_tags, inputs["input_ids"].shape[1])
        return BatchFeature(dict(inputs))

    def _normalize_row(self, row: Sequence[str], index: int) -> list[str]:
        try:
            return normalize_tags(row)
        except ValueError as error:
            raise ValueError(f"tags[{index}]: {error}") from None

    def _pixel_values(self, images: ImageInput | None, expected: int, images_kwargs: dict) -> torch.Tensor:
        if images is None or (isinstance(images, (list, tuple)) and any(image is None for image in images)):
            raise ValueError("images is missing: this model needs one photograph for each list of tags")
        # Not by `fetch_images`, which of 16-bit grey makes everything white.
        images = make_flat_list_of_images(_load_photographs(images))
        if len(images) != expected:
            raise ValueError(f"found {len(images)} photographs for {expected} lists of tags, expected as many")
        for image in images:
            if isinstance(image, Image.Image) and max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                raise ValueError(
                    f"a photograph has {image.width} x {image.height} pixels, "
                    f"expected sides of at most 1 : {MAX_ASPECT_RATIO}"
                )
        return self.image_processor(images, return_tensors="pt", **images_kwargs)["pixel_values"]

    def _normalize_important(self, important_tags: Sequence[Sequence[str]], tags: list[list[str]]) -> list[set[str]]:
        if len(important_tags) != len(tags):
            raise ValueError(f"found {len(important_tags)} lists of important tags for {len(tags)} lists of tags")
        normalized = []
        for index, (row, important) in enumerate(zip(tags, important_tags, strict=True)):
            if isinstance(important, str):
                raise ValueError(f"important_tags[{index}]: found the text {important!r}, expected a list of tags")
            normalized.append({normalize_tag(tag) for tag in (() if important is None else important)})
            if strange := normalized[-1].difference(row):
                raise ValueError(f"important_tags[{index}]: {sorted(strange)} are not among the tags")
        return normalized

    @staticmethod
    def _labels(tags: list[list[str]], important_tags: list[set[str]], width: int) -> torch.Tensor:
        labels = [[IGNORED_LABEL] * width for _ in tags]
        for row_labels, row, important in zip(labels, tags, important_tags, strict=True):
            if important:  # otherwise unknown
                row_labels[: len(row)] = [int(tag in important) for tag in row]
        return torch.tensor(labels)

    def post_process(
        self,
        outputs,
        tags: Sequence[str] | Sequence[Sequence[str]],
        selection: str | None = None,
        threshold: float | None = None,
        top_k: int | None = None,
    ) -> list[dict]:
        """Read the model's outputs as tags.

        Args:
            outputs: A `MagnetoOutput` with `logits` (B, L).
            tags: What the processor was called with.
            selection, threshold, top_k: As in `select`.

        Returns:
            For each image `{"tags": [(tag, score), ...], "selected_tags": [tag, ...]}`, in the order of the tags,
            normalised and without duplicates.
        """
        if len(tags) and isinstance(tags[0], str):
            tags = [tags]
        rows = [self._normalize_row(row, index) for index, row in enumerate(tags)]
        selected = self.select(outputs.logits, rows, selection, threshold, top_k)  # (B, L)
        scores = torch.sigmoid(outputs.logits.detach().float()).cpu()  # (B, L)
        return [
            {
                "tags": list(zip(row, row_scores[: len(row)], strict=True)),
                "selected_tags": [tag for tag, kept in zip(row, row_selected, strict=False) if kept],
            }
            for row, row_scores, row_selected in zip(rows, scores.tolist(), selected.tolist(), strict=True)
        ]

    def select(
        self,
        logits: torch.Tensor,
        tags: Sequence[Sequence[str]],
        selection: str | None = None,
        threshold: float | None = None,
        top_k: int | None = None,
    ) -> torch.Tensor:
        """Choose tags by any output of the model.

        Args:
            logits: (B, L), on any device.
            tags: B lists of at most L tags, normalised.
            selection: A rule's name, `"threshold"`, `"top_k"` or `"expected_f1"`, to use in place of the stored rule.
            threshold: The threshold to use, in place of the stored rule; in [0, 1].
            top_k: Choose this many tags, in place of the stored rule; at least 1, and not together with `threshold`.

        Returns:
            (B, L) bool, on the CPU, true for the chosen tags.

        Raises:
            ValueError: The rule or its parameters are wrong, or there are not as many lists of tags as images, or one
                is longer than L.
        """
        rule = find_rule(self.selection, selection, threshold, top_k)
        scores = torch.sigmoid(logits.detach().float()).cpu()  # (B, L)
        if len(tags) != len(scores):
            raise ValueError(f"found {len(tags)} lists of tags for the scores of {len(scores)} images")
        for index, row in enumerate(tags):
            if len(row) > scores.shape[1]:
                raise ValueError(f"tags[{index}] has {len(row)} tags, but there are scores of {scores.shape[1]}")
        lengths = torch.tensor([len(row) for row in tags])
        mask = torch.arange(scores.shape[1]) < lengths[:, None]  # (B, L)
        return select(scores, mask, rule, self._thresholds(rule, tags, scores))

    def _thresholds(self, rule: SelectionRule, tags: Sequence[Sequence[str]], scores: torch.Tensor):
        """The threshold of each tag (B, L), where some have their own."""
        if not rule.tag_thresholds:
            return None
        own = {normalize_tag(tag): threshold for tag, threshold in rule.tag_thresholds.items()}
        thresholds = torch.full_like(scores, rule.threshold)
        for row_thresholds, row in zip(thresholds, tags, strict=True):
            row_thresholds[: len(row)] = torch.tensor([own.get(tag, rule.threshold) for tag in row])
        return thresholds

    @property
    def model_input_names(self) -> list[str]:
        images = self.image_processor.model_input_names if self.use_images else []
        return [*self.tokenizer.model_input_names, *images]


def _load_photographs(images: Any) -> Any:
    """The same lists, with photographs loaded; arrays and tensors stay as they are."""
    if isinstance(images, (list, tuple)):
        return [_load_photographs(image) for image in images]
    return load_photograph(images) if isinstance(images, (str, bytes, bytearray, os.PathLike, Image.Image)) else images


__all__ = ["MagnetoProcessor"]
