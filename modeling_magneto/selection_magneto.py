"""From scores to chosen tags: pure functions on scores (B, L) with a mask of the real tags."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

MAX_TABLE_SIZE = 2**22  # numbers, of the images that are looked at together
RULES = ("threshold", "top_k", "expected_f1")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_threshold(name: str, threshold: Any) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise ValueError(f"{name} is {threshold!r}, expected a number in [0, 1]")


@dataclass(frozen=True)
class SelectionRule:
    """How tags are chosen; the default is the paper's rule.

    Args:
        rule: `"threshold"`: the tags whose score reaches a threshold. `"top_k"`: the best tags. `"expected_f1"`: the
            subset with the highest expected F1; only meaningful where scores are calibrated.
        threshold: In [0, 1].
        top_k: At least 1; required by `"top_k"`, and `None` otherwise.
        min_tags: So many of the best tags are kept in any case (all of them where an image has fewer).
        max_tags: Never more tags than these are kept; `None` for no limit.
        tag_thresholds: For `"threshold"`, a threshold of its own for some tags, by the tag's name.

    Raises:
        ValueError: A field has a wrong type or value; the message names the field.
    """

    rule: str = "threshold"
    threshold: float = 0.5
    top_k: int | None = None
    min_tags: int = 0
    max_tags: int | None = None
    tag_thresholds: dict[str, float] | None = None

    def __post_init__(self):
        if self.rule not in RULES:
            raise ValueError(f"rule is {self.rule!r}, expected one of {', '.join(RULES)}")
        _check_threshold("threshold", self.threshold)
        for name, lowest in (("top_k", 1), ("min_tags", 0), ("max_tags", 1)):
            value = getattr(self, name)
            optional = " or null" if name != "min_tags" else ""
            if not (_is_whole(value) and value >= lowest) and not (value is None and optional):
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least {lowest}{optional}")
        if (self.rule == "top_k") != (self.top_k is not None):
            raise ValueError(f"top_k is {self.top_k!r}, but the rule is {self.rule!r}")
        if self.max_tags is not None and self.max_tags < self.min_tags:
            raise ValueError(f"max_tags is {self.max_tags}, expected at least min_tags ({self.min_tags})")
        if self.tag_thresholds is not None:
            if not isinstance(self.tag_thresholds, dict):
                raise ValueError(f"tag_thresholds is {self.tag_thresholds!r}, expected a mapping of tags to numbers")
            if self.rule != "threshold":
                raise ValueError(f"tag_thresholds is given, but the rule is {self.rule!r}")
            for tag, threshold in self.tag_thresholds.items():
                _check_threshold(f"tag_thresholds[{tag!r}]", threshold)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "SelectionRule":
        """A rule as it is stored; fields that are missing have their default.

        Raises:
            ValueError: A field is unknown or wrong; the message names it, in one line.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(fields, dict):
            raise ValueError(f"selection is {fields!r}, expected a mapping of {', '.join(names)}")
        for name in fields:
            if name not in names:
                raise ValueError(f"selection has the unknown field {name!r}, expected some of {', '.join(names)}")
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"selection: {error}") from None


PAPER_RULE = SelectionRule()


def find_rule(
    stored: dict[str, Any], selection: str | None = None, threshold: float | None = None, top_k: int | None = None
) -> SelectionRule:
    """The stored rule, or the one that replaces it as a whole, bounds included.

    Args:
        stored: Fields of a `SelectionRule`.
        selection: The name of a rule; by default the one that `top_k` or `threshold` belongs to.
        threshold: In [0, 1]; 0.5 where a rule is named without it, whatever is stored.
        top_k: At least 1; not together with `threshold`.

    Raises:
        ValueError: A field is wrong, or does not belong to the rule that is named; or both `threshold` and `top_k` are
            given.
    """
    if selection is None and threshold is None and top_k is None:
        return SelectionRule.from_dict(stored)
    if selection is None:
        if threshold is not None and top_k is not None:
            raise ValueError(f"threshold is {threshold!r} and top_k is {top_k!r}, expected only one of them")
        selection = "threshold" if top_k is None else "top_k"
    elif threshold is not None and selection != "threshold":
        raise ValueError(f"threshold is {threshold!r}, but the rule is {selection!r}")
    return SelectionRule(selection, PAPER_RULE.threshold if threshold is None else threshold, top_k)


def select(
    scores: torch.Tensor,
    mask: torch.Tensor,
    rule: SelectionRule = PAPER_RULE,
    thresholds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose tags by a rule, whichever it is.

    Args:
        scores: (B, L), in [0, 1].
        mask: (B, L), true for real tags.
        rule: The rule in force.
        thresholds: (B, L), in [0, 1]: `rule.threshold` and `rule.tag_thresholds` spelt out for each tag, where there
            are any of the latter.

    Returns:
        (B, L) bool, true for the chosen tags; never for padding. Of equal scores the earlier tag comes first.
    """
    if rule.rule == "expected_f1":
        return select_by_expected_f1(scores, mask, rule.min_tags, rule.max_tags)
    if rule.rule == "top_k":
        selected = select_top_k(scores, mask, rule.top_k)
    else:
        selected = select_by_threshold(scores, mask, rule.threshold if thresholds is None else thresholds)
    return _keep_bounds(selected, scores, mask, rule.min_tags, rule.max_tags)


def select_by_threshold(
    scores: torch.Tensor, mask: torch.Tensor, threshold: float | torch.Tensor = 0.5
) -> torch.Tensor:
    """The paper's rule: a tag is kept when its score reaches the threshold.

    Args:
        scores: (B, L), in [0, 1].
        mask: (B, L), true for real tags.
        threshold: In [0, 1]; one for all tags, or (B, L).

    Returns:
        (B, L) bool, true for the chosen tags; never for padding. An image may end up with no tag at all.
    """
    if not isinstance(threshold, torch.Tensor):
        _check_threshold("threshold", threshold)
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
    return (_rank(scores, mask) < min(top_k, scores.shape[-1])) & mask.bool()


def select_by_expected_f1(
    scores: torch.Tensor, mask: torch.Tensor, min_tags: int = 0, max_tags: int | None = None
) -> torch.Tensor:
    """The subset with the highest expected F1, where a score is the probability that its tag is important.

    Tags are taken for independent. Then the best subset of k tags is that of the k highest scores, and the expected F1
    of all k is found exactly in O(L^2) for each image (Ye, Chai, Lee and Chieu, 2012: "Optimizing F-measures: a tale
    of two approaches"; compare Waegeman et al., 2014: "On the Bayes-optimality of F-measure maximizers").

    Args:
        scores: (B, L), in [0, 1].
        mask: (B, L), true for real tags.
        min_tags, max_tags: The best of the subsets that have as many tags; see `SelectionRule`.

    Returns:
        (B, L) bool, true for the chosen tags; never for padding. An image with tags keeps at least one, for it always
        has an important tag. Of equally good subsets the smallest is taken.
    """
    mask = mask.bool()
    rank = _rank(scores, mask)  # (B, L)
    probabilities = _as_probabilities(scores, mask)
    best_first = torch.empty_like(probabilities).scatter_(-1, rank, probabilities)
    num_tags = mask.sum(-1, keepdim=True)  # (B, 1)
    size = torch.empty_like(num_tags)  # how many of the best tags to choose
    for images, longest in _blocks(num_tags.flatten()):
        expected = _expected_f1_of_best(best_first[images, :longest])  # (I, L), of the 1, 2, ..., L best tags
        sizes = torch.arange(1, longest + 1, device=scores.device)
        allowed = (sizes >= num_tags[images].clamp(max=max(min_tags, 1))) & (sizes <= num_tags[images])
        if max_tags is not None:
            allowed &= sizes <= max_tags
        size[images] = expected.masked_fill(~allowed, -1.0).argmax(-1, keepdim=True) + 1
    return (rank < size) & mask


def _blocks(num_tags: torch.Tensor) -> Iterator[tuple[torch.Tensor | slice, int]]:
    """Images to look at together, and their longest list: one such must not give all images tables of its size."""
    longest = max([1, *num_tags.tolist()])
    if len(num_tags) * longest**2 <= MAX_TABLE_SIZE:
        yield slice(None), longest
        return
    longest_first, start = num_tags.argsort(descending=True), 0
    while start < len(num_tags):
        longest = max(1, int(num_tags[longest_first[start]]))
        images = longest_first[start : start + max(1, MAX_TABLE_SIZE // longest**2)]  # (I,)
        start += len(images)
        yield images, longest


def _expected_f1_of_best(probabilities: torch.Tensor) -> torch.Tensor:
    """Of each image's 1, 2, ..., L best tags: (B, L), each row in descending order, -> (B, L)."""
    num_images, num_tags = probabilities.shape
    # Images last: the steps below go through whole, contiguous rows of them.
    probabilities = probabilities.T.contiguous()  # (L, B)
    weights = 2.0 * torch.arange(num_tags + 1, device=probabilities.device)
    hits = _count_important(probabilities) * weights[:, None]  # (L + 1, L + 1, B)
    # rest[a - 1] is the mean of 1 / (a + number of important tags that are not among the k best); k is L at first.
    # With i hits among k selected tags the F1 is 2 i / (k + i + that number), so a = k + i.
    rest = 1 / torch.arange(1.0, 2 * num_tags + 1, device=probabilities.device, dtype=probabilities.dtype)
    rest = rest[:, None].expand(-1, num_images)
    expected = torch.empty_like(probabilities)
    for k in range(num_tags, 0, -1):
        torch.sum(hits[k, 1 : k + 1] * rest[k : 2 * k], dim=0, out=expected[k - 1])
        rest = torch.lerp(rest[:-1], rest[1:], probabilities[k - 1])  # the k-th best tag joins the rest
    return expected.T


def _count_important(probabilities: torch.Tensor) -> torch.Tensor:
    """P(i of the first k tags are important) at [k, i]: (L, B) -> (L + 1, L + 1, B)."""
    num_tags, num_images = probabilities.shape
    table = probabilities.new_zeros(num_tags + 1, num_tags + 2, num_images)  # i is shifted by 1: of -1 there is none
    table[0, 1] = 1
    for k, probability in enumerate(probabilities, 1):
        torch.lerp(table[k - 1, 1 : k + 2], table[k - 1, : k + 1], probability, out=table[k, 1 : k + 2])
    return table[:, 1:]


def _as_probabilities(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scores in at least single precision; 0 where the mask is false."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~mask, 0.0)


def _keep_bounds(
    selected: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, min_tags: int, max_tags: int | None
) -> torch.Tensor:
    """Add the `min_tags` best tags to the selected ones, and of these keep the `max_tags` best."""
    if min_tags:
        selected = selected | select_top_k(scores, mask, min_tags)
    return selected if max_tags is None else select_top_k(scores, selected, max_tags)


def _rank(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """0 for the best tag of each image, 1 for the next, ...: (B, L). Padding comes last, of equal scores the later."""
    order = scores.masked_fill(~mask.bool(), -1.0).argsort(dim=-1, descending=True, stable=True)  # (B, L)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
