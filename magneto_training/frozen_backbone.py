"""A backbone that is not trained, run apart from the model: ahead of training, or where photographs are read.

On a CPU the backbone takes nearly all of the time. There it runs in the workers of the data loader: each works on
batches of its own with one thread, so all cores are busy and none waits for another. What a worker hands over are
feature maps, which are also smaller than photographs.
"""

import copy
import warnings

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError

from modeling_magneto import MagnetoPreTrainedModel

IMAGES_AT_A_TIME = 32


def lacks_bfloat16(device: torch.device) -> bool:
    """Whether `device` is an x86 processor without AVX-512: there, PyTorch computes bfloat16 in software."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("NO AVX", "AVX2")


class FrozenBackbone:
    """What a model's `image_feature_extractor.feature_map` computes in eval mode, by a copy that is made for speed.

    Batch norm is folded into the convolutions before it, where the backbone can be traced and has such pairs.

    Args:
        model: A model that looks at photographs; it stays as it is.
        device: Where to compute.
        bf16: Whether to compute in bfloat16 what autocast does.
    """

    def __init__(self, model: MagnetoPreTrainedModel, device: torch.device, bf16: bool = False):
        if bf16 and lacks_bfloat16(device):
            warnings.warn(
                "bf16: this processor has no instructions for bfloat16; expect a fraction of float32's speed",
                stacklevel=2,
            )
        self.device = device
        self.bf16 = bf16
        self.feature_map = _folded(_FeatureMap(model).to(device).eval().requires_grad_(False))
        for module in self.feature_map.modules():
            # Autocast would do it for every batch. Not so for subclasses, which compute with their weights before.
            if bf16 and type(module) in (nn.Conv2d, nn.Linear):
                module.bfloat16()
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # as the photographs lie in memory

    @classmethod
    def for_workers(
        cls, model: MagnetoPreTrainedModel, device: torch.device, bf16: bool = False
    ) -> "FrozenBackbone | None":
        """The backbone for a collator: on a CPU, where the model has one and no part of it is trained; else None."""
        if device.type != "cpu" or model.config.streams == "tag":
            return None
        trained = any(
            parameter.requires_grad for parameter in model.base_model.image_feature_extractor.backbone.parameters()
        )
        return None if trained else cls(model, device, bf16)

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W), normalised, -> (B, C, h, w), in bfloat16 where convolutions are."""
        # A worker's batch in pieces that its cache can hold, which is quicker and needs less memory.
        parts = pixel_values.split(IMAGES_AT_A_TIME) if self.device.type == "cpu" else [pixel_values.to(self.device)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return torch.cat([self.feature_map(part) for part in parts])


class _FeatureMap(nn.Module):
    def __init__(self, model: MagnetoPreTrainedModel):
        super().__init__()
        self.extractor = copy.deepcopy(model.base_model.image_feature_extractor)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.extractor.feature_map(pixel_values)


def _folded(module: nn.Module) -> nn.Module:
    try:
        return fuse(module)
    except (TraceError, TypeError, RuntimeError):  # its code branches on what it computes: it runs as it is
        return module
