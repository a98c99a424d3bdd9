"""A small trained folder with its endpoint, and photographs to send to it."""

import base64
import importlib.util
import io
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from magneto_training.trainer import copy_endpoint
from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization, MagnetoProcessor


def save_model(folder: Path, streams: str = "both") -> Path:
    """A model that knows four colours, as train.py saves it."""
    torch.manual_seed(0)
    config = MagnetoConfig(
        vocab_size=6,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        backbone="test_resnet.r160_in1k",
        image_size=64,
        streams=streams,
    )
    MagnetoForTagSummarization(config).save_pretrained(folder)
    processor = MagnetoProcessor.from_vocabulary(
        ["blue", "green", "red", "yellow"], image_size=64, use_images=streams != "tag"
    )
    processor.save_pretrained(folder)
    copy_endpoint(folder)
    return folder


def load_module(folder: Path) -> ModuleType:
    """The folder's handler.py."""
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def photograph(seed: int = 0, size: tuple[int, int] = (90, 70)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(*size[::-1], 3), dtype=np.uint8))


def as_bytes(image: Image.Image, file_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


def as_base64(image: Image.Image) -> str:
    return base64.b64encode(as_bytes(image)).decode()


def bomb() -> bytes:
    """A file of a few kilobytes that would be 100 million pixels."""
    return as_bytes(Image.new("1", (10_000, 10_000)))
