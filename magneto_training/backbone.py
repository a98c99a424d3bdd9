"""ImageNet weights for the backbone of a new training run."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg

from modeling_magneto import MagnetoConfig, MagnetoModel

from .arguments import ModelArguments, UserError

WAYS_OUT = (
    "give --backbone_weights FILE.safetensors (with --image_mean and --image_std where they differ from timm's), "
    "or --backbone_weights none for random weights on purpose"
)


def resolve_normalization(model_args: ModelArguments) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the colour channels: the arguments', or what timm names for the backbone."""
    pretrained = get_pretrained_cfg(model_args.backbone, allow_unregistered=True)
    mean, std = (pretrained.mean, pretrained.std) if pretrained else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return model_args.image_mean or mean, model_args.image_std or std


def prepare_backbone(model: MagnetoModel, source: str) -> None:
    """Put pre-trained weights into the backbone of a newly made model, and warn of a useless feature map.

    Args:
        model: A model with a backbone.
        source: `"pretrained"` for timm's own (from the Hub, or its cache), `"none"` to leave it random, or a
            safetensors file with timm's parameter names; a classifier in it is passed over.

    Raises:
        UserError: The weights cannot be had, or do not fit the backbone.
    """
    size = model.config.image_size
    with torch.inference_mode():
        regions = model.eval().image_feature_extractor(torch.zeros(1, 3, size, size))  # (1, R, D)
    if regions.shape[1] == 1:
        warnings.warn(
            f"the backbone {model.config.backbone!r} gives a single region at {size} px: no tag can look at another "
            "place than the others; raise image_size",
            stacklevel=2,
        )
    if source == "none":
        return
    backbone, config = model.image_feature_extractor.backbone, model.config
    weights = _download(config) if source == "pretrained" else _read(source, backbone)
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"backbone_weights {source!r} do not fit the backbone {config.backbone!r}: {reason}") from None


def _download(config: MagnetoConfig) -> dict[str, torch.Tensor]:
    try:
        pretrained = timm.create_model(
            config.backbone, pretrained=True, num_classes=0, global_pool="", **(config.backbone_kwargs or {})
        )
    except Exception as error:  # no network, no such file, no pretrained weights: timm and the Hub have many
        reason = " ".join(str(error).split())[:200]
        found = f"timm's weights of the backbone {config.backbone!r} cannot be had ({type(error).__name__}: {reason})"
        raise UserError(f"{found}; {WAYS_OUT}") from error
    return pretrained.state_dict()


def _read(source: str, backbone: torch.nn.Module) -> dict[str, torch.Tensor]:
    if Path(source).suffix != ".safetensors":
        raise UserError(f"backbone_weights is {source!r}, expected 'pretrained', 'none' or a .safetensors file")
    try:
        weights = load_file(source)
    except (OSError, SafetensorError) as error:
        raise UserError(f"backbone_weights {source!r} cannot be read: {error}") from None
    classifiers = backbone.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    return {
        name: tensor for name, tensor in weights.items() if not name.startswith(tuple(f"{c}." for c in classifiers))
    }
