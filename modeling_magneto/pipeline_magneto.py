"""`pipeline("tag-summarization")`: photographs and their tags in, ranked and chosen tags out."""

import math
import os
from collections.abc import Collection, Iterable, Sequence
from io import IOBase
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Pipeline
from transformers.image_utils import is_valid_image
from transformers.utils import ModelOutput

from .processing_magneto import load_photograph, normalize_tags


class TagSummarizationPipeline(Pipeline):
    """Extractive tags summarization: which of a photograph's tags say what it is about?

    ```python
    summarizer = pipeline("tag-summarization", model="my_model", trust_remote_code=True)
    summarizer("photo.jpg", candidate_labels=["beach", "ocean", "summer"], top_k=1)
    # [{"label": "ocean", "score": 0.93, "selected": True}, {"label": "beach", ...}, {"label": "summer", ...}]
    ```

    The processor prepares and reads everything, as in prediction: equal photographs and tags have equal scores.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False

    def __call__(self, image: Any = None, candidate_labels: Sequence | None = None, **kwargs) -> Any:
        """Rank the tags of photographs.

        Args:
            image: A photograph: a path, a URL, base64 text, a data URL, the bytes of a file, or a PIL image. Also a
                mapping `{"image": ..., "candidate_labels": [...]}`, a list of any of these, or a generator or dataset
                of them, which is read as the results are. A tag-only model needs none.
            candidate_labels: The tags: a list for one photograph, or for all of them; or, for a list of photographs,
                as many lists. Spelled as they like; duplicates count once. A mapping's own tags take precedence.
            selection, threshold, top_k: The rule that selects tags, as in `MagnetoProcessor.post_process`; by
                default the one that the pipeline was made with, or else that is stored with the processor.
            return_attention: Say for each tag where the model looked, and whether it trusted what it saw.
            timeout: Seconds to wait for the server of a URL; by default for ever.
            batch_size: Photographs a step; scores do not depend on it.
            num_workers: Processes that read photographs; 0 reads them in this one.

        Returns:
            For one photograph a list `[{"label": tag, "score": in [0, 1], "selected": bool}, ...]`, best first, with
            tags as `normalize_tag` spells them; for a list of photographs a list of such lists; for a generator or
            dataset an iterator over them. With `return_attention`, `"attention"` holds (h, w) numbers that sum to 1,
            the mean over the heads on the h x w regions of the photograph's centre square, top row first, and
            `"gate"` how far the picture was trusted, and not the other tags, in [0, 1]; each None where the model has
            none.

        Raises:
            ValueError: There are no tags, one is empty, or there are several lists of them, but not a list of as many
                photographs; a photograph is missing or cannot be read; the rule's values are out of range.
        """
        if image is None and _is_nested(candidate_labels):
            image = [None] * len(candidate_labels)
        if isinstance(image, (list, tuple)):
            if _is_nested(candidate_labels):
                if len(image) != len(candidate_labels):
                    raise ValueError(
                        f"found {len(image)} photographs for {len(candidate_labels)} lists of tags, expected as many"
                    )
                image = [
                    {"image": item, "candidate_labels": labels}
                    for item, labels in zip(image, candidate_labels, strict=True)
                ]
                candidate_labels = None
            if not image:
                return []
            image = list(image)
        elif _is_nested(candidate_labels):
            raise ValueError(
                f"found an image of type {type(image).__name__} for several lists of tags, "
                "expected a list of as many photographs"
            )
        elif isinstance(image, Iterable) and not (
            isinstance(image, (str, bytes, bytearray, dict, IOBase, Dataset)) or is_valid_image(image)
        ):
            image = (item for item in image)  # the form in which the base class reads on demand
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        return super().__call__(image, **kwargs)

    def _sanitize_parameters(
        self,
        candidate_labels: Sequence[str] | None = None,
        selection: str | None = None,
        threshold: float | None = None,
        top_k: int | None = None,
        return_attention: bool | None = None,
        timeout: float | None = None,
    ) -> tuple[dict, dict, dict]:
        preprocessing = {"candidate_labels": candidate_labels, "timeout": timeout}
        preprocessing = {name: value for name, value in preprocessing.items() if value is not None}
        attention = {} if return_attention is None else {"return_attention": return_attention}
        rule = {"selection": selection, "threshold": threshold, "top_k": top_k}
        if all(value is None for value in rule.values()):
            rule = {}  # otherwise a call's takes the place of the pipeline's as a whole
        return preprocessing, attention, {**attention, **rule}

    def preprocess(
        self, input_: Any, candidate_labels: Sequence[str] | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """One photograph with its tags -> the model's tensors for a batch of one, and the normalised `tags`."""
        image = input_
        if isinstance(input_, dict):
            image, candidate_labels = input_.get("image"), input_.get("candidate_labels", candidate_labels)
        if candidate_labels is None:
            raise ValueError("candidate_labels is missing, expected a list of tags")
        try:
            tags = normalize_tags(candidate_labels)
        except (TypeError, ValueError) as error:
            raise ValueError(f"candidate_labels: {error}") from None
        image = None if image is None or not self.processor.use_images else load_photograph(image, timeout)
        return {"tags": tags, **self.processor(image, tags)}

    def _forward(self, input_tensors: dict[str, Any], return_attention: bool = False) -> dict[str, Any]:
        """The model's tensors for B photographs, and their `tags`, to the pipeline's outputs.

        Returns:
            `logits` (B, L), `gate` (B, L) or None, `attention` (B, L, R) or None, and `tags` as they came.
        """
        inputs = {name: value for name, value in input_tensors.items() if name != "tags"}
        outputs = self.model(**inputs, output_attentions=return_attention)
        attention = None if outputs.attentions is None else outputs.attentions.mean(1)
        # The base class takes a batch apart again by the length of the first value.
        return {"logits": outputs.logits, "gate": outputs.gate, "attention": attention, "tags": input_tensors["tags"]}

    def postprocess(self, model_outputs: dict[str, Any], return_attention: bool = False, **rule) -> list[dict]:
        """What `_forward` returns for one photograph -> its tags, best first."""
        tags, attention, gate = (model_outputs[name] for name in ("tags", "attention", "gate"))
        logits = ModelOutput(logits=model_outputs["logits"])
        (result,) = self.processor.post_process(logits, tags, **rule)
        selected = set(result["selected_tags"])
        ranked = [{"label": tag, "score": score, "selected": tag in selected} for tag, score in result["tags"]]
        if return_attention:
            for index, item in enumerate(ranked):
                item["attention"] = None if attention is None else _heat_map(attention[0, index])
                item["gate"] = None if gate is None else gate[0, index].item()
        return sorted(ranked, key=lambda item: -item["score"])

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Model, code and processor, as `pipeline` loads them again."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def _is_nested(candidate_labels: Any) -> bool:
    if isinstance(candidate_labels, (str, bytes)) or not isinstance(candidate_labels, Collection):
        return False
    first = next(iter(candidate_labels), None)
    return isinstance(first, Iterable) and not isinstance(first, (str, bytes))


def _heat_map(attention: torch.Tensor) -> list[list[float]]:
    """(R,) -> h rows of w numbers: the processor cuts photographs to squares, so h = w."""
    return attention.float().unflatten(0, (math.isqrt(len(attention)), -1)).tolist()


__all__ = ["TagSummarizationPipeline"]
