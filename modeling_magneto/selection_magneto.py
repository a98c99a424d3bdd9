"""From scores to chosen tags: pure functions on scores (B, L) with a mask of the real tags."""

import torch


def select(scores: torch.Tensor, mask: torch.Tensor, threshold: float = 0.5, top_k: int | None = None) -> torch.Tensor:
    """The rule in force: the `top_k` best tags where that is given, else those that reach the threshold.

    Arguments and result as in `select_by_threshold` and `select_top_k`.
    """
    return select_by_threshold(scores, mask, threshold) if top_k is None else select_top_k(scores, mask, top_k)


def select_by_threshold(scores: torch.Tensor, mask: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """The paper's rule: a tag is kept when its score reaches the threshold.

    Args:
        scores: (B, L), in [0, 1].
        mask: (B, L), true for real tags.
        threshold: In [0, 1].

    Returns:
        (B, L) bool, true for the chosen tags; never for padding. An image may end up with no tag at all.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected a number in [0, 1]")
    return (scores >= threshold) & mask.bool()


def select_top_k(scores: torch.Tensor, mask: torch.Tensor, top_k: int) -> torch.Tensor:
    """The `top_k` best tags of each image, or all of them where it has fewer; of equal scores the first tag wins.

    Args:
        scores: (B, L), in [0, 1].
        mask: (B, L), true for real tags.
        top_k: At least 1.

    Returns:
        (B, L) bool, true for the chosen tags; never for padding.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected at least 1")
    mask = mask.bool()
    order = scores.masked_fill(~mask, -1.0).argsort(dim=-1, descending=True, stable=True)  # (B, L)
    ranks = order.argsort(dim=-1)  # (B, L), 0 for the best tag
    return (ranks < top_k) & mask
