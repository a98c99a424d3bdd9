"""Batch norm where several processes train together: over the photographs of all of them, as in one process."""

import torch
from torch import nn
from torch.distributed.nn.functional import all_reduce


class SharedBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose batch is that of all processes; `nn.SyncBatchNorm`, which is the same, needs GPUs."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C, h, w); B may differ from process to process."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(states)
        exact = states.float()
        axes = (0, 2, 3)
        own_count = exact.new_tensor([exact.numel() / exact.shape[1]])
        *_, count = totals = all_reduce(torch.cat([exact.sum(axes), own_count]))
        mean = totals[:-1] / count
        centered = exact - mean[:, None, None]
        variance = all_reduce(centered.square().sum(axes)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(states.dtype)


def share_batch_norms(model: nn.Module) -> None:
    """Let every plain batch norm of a model that is trained look at the photographs of all processes, in place."""
    for module in model.modules():
        # A subclass does more than to normalise. One that is not trained stays what a tracer can fold.
        if type(module) is nn.BatchNorm2d and any(parameter.requires_grad for parameter in module.parameters()):
            module.__class__ = SharedBatchNorm
