"""Losses of section 3.2 over the real tags of a batch.

Every function takes logits z, whose sigmoid is the predicted probability, and works in float32 on log-probabilities:
finite for any logit, whatever autocast does around it. Labels are 1, 0, or -100 for slots that do not count (padding,
unknown); an image without a single counting tag contributes nothing. Several outputs of the same images may come at
once, (..., B, L), each of which has a loss of its own.

Where several processes train together (DistributedDataParallel), the batch is that of all of them: their gradients are
those of one process with all of the images, though one process may have more tags than another.
"""

import torch
import torch.distributed
import torch.nn.functional as F

IGNORED_LABEL = -100


def bce_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy (equation 2), averaged over the real tags of the batch.

    Args:
        logits: (..., B, L), any real number.
        labels: (B, L), 1, 0 or -100.

    Returns:
        (...) float32, a scalar for (B, L); 0 for a batch without real tags.
    """
    real = labels != IGNORED_LABEL
    # An ignored slot's logit is replaced before the loss: multiplying afterwards would let a NaN through.
    logits = logits.float().masked_fill(~real, 0.0)
    truth = labels.clamp(min=0).float().expand_as(logits)
    losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return _mean(losses, real)


def dice_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Dice loss (equation 3), smoothed by 1 and averaged over the images that have real tags.

    Args:
        logits: (..., B, L), any real number.
        labels: (B, L), 1, 0 or -100.

    Returns:
        (...) float32 in [0, 1), a scalar for (B, L); 0 for a batch without real tags.
    """
    real = labels != IGNORED_LABEL
    probabilities = torch.sigmoid(logits.float().masked_fill(~real, 0.0)) * real  # (..., B, L)
    truth = labels.clamp(min=0).float()  # (B, L)
    overlap = (probabilities * truth).sum(-1)  # (..., B)
    losses = 1 - (2 * overlap + 1) / (probabilities.sum(-1) + truth.sum(-1) + 1)  # (..., B)
    return _mean(losses, real.any(-1))


def _mean(losses: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The mean of the losses that count, over as many last axes as `counts` has; 0 where none does."""
    total = counts.sum()
    num_processes = 1
    if torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized():
        # The mean over processes, which is what becomes of the gradients, is to be the mean over all that counts.
        num_processes = torch.distributed.get_world_size()
        torch.distributed.all_reduce(total)
    return num_processes * (losses * counts).flatten(-counts.ndim).sum(-1) / total.clamp(min=1)


def bce_dice_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """BCE-Dice, the sum of both (equation 4). Arguments and result as in `bce_loss`."""
    return bce_loss(logits, labels) + dice_loss(logits, labels)


OBJECTIVES = {"bce": bce_loss, "bce_dice": bce_dice_loss}
