"""The endpoint: what Hugging Face's Inference Endpoints run from this folder.

A request is `{"inputs": photograph, "parameters": {"candidate_labels": [...]}}`, the photograph being base64 text, a
data URL, or, where the body was an image, a PIL image. The answer is `[{"label", "score", "selected"}, ...]`, best
first. Labels come back normalised (Unicode NFKC, case folded, white space collapsed), duplicates once.
"""

import base64
import binascii
import copy
import os
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import Pipeline, pipeline

MAX_LABELS = 500
MAX_LABEL_LENGTH = 200  # characters
MAX_IMAGE_BYTES = 20_000_000
MAX_PIXELS = 50_000_000
MAX_BATCH_SIZE = 32
MAX_PREPROCESSORS = 8  # in a container, a machine's cores may be many more than the container may use
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # what browsers and cameras write; Pillow reads many more
OPTIONS = {"threshold": float, "top_k": int, "selection": str, "return_attention": bool}
KINDS = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}


@dataclass
class PreparedRequest:
    """A request that waits for the model: its tensors, a batch of one, and where its outputs are expected."""

    inputs: dict[str, Any]
    return_attention: bool
    outputs: Future = field(default_factory=Future)


class EndpointHandler:
    """Answers requests from any number of threads at a time.

    Each thread prepares its own request, so a bad one is its own affair, and a large one holds up no other while
    there are cores. One more thread runs the model on everything that has been prepared while it was busy with the
    batch before: nobody waits for a batch to fill.

    Args:
        path: The model's folder.
    """

    def __init__(self, path: str):
        self.pipeline = pipeline("tag-summarization", model=path, trust_remote_code=True)
        for module in self.pipeline.model.modules():
            if isinstance(module, torch.nn.Conv2d):
                # As the photographs lie in memory: otherwise PyTorch turns the weights at every call.
                module.to(memory_format=torch.channels_last)
        # Decoded photographs are large: only as many at a time as there are cores. And each with a processor of its
        # own, whose tokenizer is not made for several threads.
        self._preprocessors: queue.SimpleQueue[Pipeline] = queue.SimpleQueue()
        for _ in range(min(_count_cores(), MAX_PREPROCESSORS)):
            preprocessor = copy.copy(self.pipeline)
            preprocessor.processor = copy.deepcopy(self.pipeline.processor)
            self._preprocessors.put(preprocessor)
        self._prepared: queue.Queue[PreparedRequest] = queue.Queue(maxsize=2 * MAX_BATCH_SIZE)
        threading.Thread(target=self._run_model, name="model", daemon=True).start()

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Rank the tags of a photograph.

        Args:
            data: `inputs`, the photograph (not read by a tag-only model), and `parameters`: `candidate_labels`, a list
                of tags or one text with commas; `threshold`, `top_k`, `selection`, `return_attention` as in the
                pipeline, also as text. Nothing is ever fetched from an address or read from a path.

        Returns:
            `[{"label": tag, "score": in [0, 1], "selected": bool}, ...]`, best first, on request with
            `"attention"` and `"gate"`.

        Raises:
            ValueError: The request is bad; the message says why.
        """
        if not isinstance(data, dict):
            raise ValueError(
                f"the request is of type {type(data).__name__}, expected a mapping with inputs and parameters"
            )
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"parameters is of type {type(parameters).__name__}, expected a mapping")
        labels = read_labels(parameters.get("candidate_labels"))
        options = read_options(parameters)

        preprocessor = self._preprocessors.get()
        try:
            image = open_image(data.get("inputs")) if preprocessor.processor.use_images else None
            inputs = preprocessor.preprocess({"image": image, "candidate_labels": labels})
        finally:
            self._preprocessors.put(preprocessor)
        request = PreparedRequest(inputs, options.get("return_attention", False))
        self._prepared.put(request)
        return self.pipeline.postprocess(request.outputs.result(), **options)

    def _collate(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Batches of one to one batch, padded to its longest list of tags."""
        batch = {"tags": [item["tags"] for item in inputs]}
        for name, padding in {"input_ids": self.pipeline.model.config.pad_token_id, "attention_mask": 0}.items():
            batch[name] = pad_sequence([item[name][0] for item in inputs], batch_first=True, padding_value=padding)
        if "pixel_values" in inputs[0]:  # a tag-only model has none
            batch["pixel_values"] = torch.cat([item["pixel_values"] for item in inputs])
        return batch

    def _run_model(self) -> None:
        while True:
            requests = [self._prepared.get()]
            while len(requests) < MAX_BATCH_SIZE and not self._prepared.empty():
                requests.append(self._prepared.get())
            try:
                batch = self._collate([request.inputs for request in requests])
                outputs = self.pipeline.forward(
                    batch, return_attention=any(request.return_attention for request in requests)
                )
                results = [_take(outputs, index) for index in range(len(requests))]
            except Exception as error:  # the threads that wait are told, and this one goes on
                for request in requests:
                    request.outputs.set_exception(error)
            else:
                for request, result in zip(requests, results, strict=True):
                    request.outputs.set_result(result)


def _count_cores() -> int:
    """Those that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _take(outputs: dict[str, Any], index: int) -> dict[str, Any]:
    """One request's share of a batch's outputs, tensors as a batch of one."""
    tensors = {name: outputs[name] for name in ("logits", "gate", "attention")}
    shares = {name: None if tensor is None else tensor[index : index + 1] for name, tensor in tensors.items()}
    return {**shares, "tags": outputs["tags"][index]}


def read_labels(labels: Any) -> list[str]:
    """The tags of a request: a list of texts, or one text with commas.

    Raises:
        ValueError: There are none, too many, or one is no text or too long.
    """
    if isinstance(labels, str):
        labels = [label.strip() for label in labels.split(",") if label.strip()]
    if labels is None:
        raise ValueError("candidate_labels is missing, expected a list of tags")
    if not isinstance(labels, list):
        raise ValueError(f"candidate_labels is of type {type(labels).__name__}, expected a list of tags")
    if not labels:
        raise ValueError("candidate_labels is empty, expected at least one tag")
    if len(labels) > MAX_LABELS:
        raise ValueError(f"found {len(labels)} candidate_labels, expected at most {MAX_LABELS}")
    for index, label in enumerate(labels):
        if not isinstance(label, str):
            raise ValueError(f"candidate_labels[{index}] is of type {type(label).__name__}, expected text")
        if any("\ud800" <= character <= "\udfff" for character in label):
            raise ValueError(f"candidate_labels[{index}] holds half a character, expected text")
        if len(label) > MAX_LABEL_LENGTH:
            raise ValueError(
                f"candidate_labels[{index}] has {len(label)} characters, expected at most {MAX_LABEL_LENGTH}"
            )
    return labels


def read_options(parameters: dict[str, Any]) -> dict[str, Any]:
    """The pipeline's arguments among the parameters; the values of a query string are texts.

    Raises:
        ValueError: A parameter is unknown or has a wrong type.
    """
    # Clients of the Hub's zero-shot-image-classification may send a template for sentences; here tags are tags.
    if unknown := sorted(set(parameters) - {"candidate_labels", "hypothesis_template", *OPTIONS}):
        raise ValueError(f"unknown parameter {unknown[0]!r}, expected candidate_labels, {', '.join(OPTIONS)}")
    options = {}
    for name, kind in OPTIONS.items():
        value = parameters.get(name)
        if value is None:
            continue
        try:
            options[name] = _read_text(value, kind) if isinstance(value, str) else value
        except (KeyError, ValueError):
            raise ValueError(f"{name} is {value[:80]!r}, expected {KINDS[kind]}") from None
        if type(options[name]) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{name} is of type {type(value).__name__}, expected {KINDS[kind]}")
    return options


def _read_text(value: str, kind: type) -> Any:
    return {"true": True, "1": True, "false": False, "0": False}[value.lower()] if kind is bool else kind(value)


def open_image(image: Any) -> Image.Image:
    """The decoded photograph of a request.

    Raises:
        ValueError: It is missing, no photograph, or too large.
    """
    if isinstance(image, str):
        image = _open_base64(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"inputs is of type {type(image).__name__}, expected a photograph as base64 text")
    if image.format not in (None, "MPO", *FORMATS):  # MPO: JPEG as some cameras write it
        raise ValueError(f"the photograph is {image.format}, expected one of {', '.join(FORMATS)}")
    width, height = image.size  # known before anything is decoded
    if width * height > MAX_PIXELS:
        raise ValueError(f"the photograph has {width} x {height} pixels, expected at most {MAX_PIXELS} in all")
    try:
        image.load()
    except Exception as error:  # every decoder of Pillow fails in its own way
        raise ValueError(f"the photograph cannot be decoded: {error}") from None
    return image


def _open_base64(text: str) -> Image.Image:
    if text.startswith(("http://", "https://")):
        raise ValueError("inputs is an address, expected the photograph itself as base64 text: nothing is fetched")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    text = "".join(text.split())  # many an encoder breaks lines
    size = len(text) * 3 // 4 - text.count("=", -2)  # four characters are three bytes, less the padding at the end
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"the photograph has {size} bytes, expected at most {MAX_IMAGE_BYTES}")
    try:
        file = BytesIO(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        raise ValueError("inputs is no base64 text, expected a photograph as base64 text") from None
    try:
        return Image.open(file, formats=FORMATS)
    except Exception:
        raise ValueError(f"inputs is no photograph, expected one of {', '.join(FORMATS)}") from None
