import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_magneto import selection_magneto
from modeling_magneto.selection_magneto import (
    PAPER_RULE,
    SelectionRule,
    find_rule,
    select,
    select_by_expected_f1,
    select_by_threshold,
    select_top_k,
)

# Few different scores, so that ties are common; lengths differ, so that there is padding.
rows_of_scores = st.lists(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=0, max_size=6), min_size=1, max_size=4
)


def padded(rows: list[list[float]], padding: float) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(1, *map(len, rows))
    scores = torch.tensor([row + [padding] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return scores, mask


@given(rows_of_scores, st.sampled_from([0.0, 0.25, 0.4, 0.5, 1.0]), st.sampled_from([0.0, 0.99, 1.0]))
def test_the_threshold_keeps_what_a_plain_loop_keeps(rows, threshold, padding):
    scores, mask = padded(rows, padding)

    selected = select_by_threshold(scores, mask, threshold).tolist()

    for row, kept in zip(rows, selected, strict=True):
        assert kept[: len(row)] == [score >= threshold for score in row]
        assert not any(kept[len(row) :])


@given(rows_of_scores, st.integers(1, 8), st.sampled_from([0.0, 0.99, 1.0]))
def test_top_k_keeps_what_a_plain_loop_keeps(rows, top_k, padding):
    scores, mask = padded(rows, padding)

    selected = select_top_k(scores, mask, top_k).tolist()

    for row, kept in zip(rows, selected, strict=True):
        best = sorted(range(len(row)), key=lambda index: (-row[index], index))[:top_k]
        assert [index for index, is_kept in enumerate(kept) if is_kept] == sorted(best)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_outside_0_and_1_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        select_by_threshold(torch.rand(1, 2), torch.ones(1, 2), threshold)


def test_a_top_k_beyond_any_number_of_tags_keeps_them_all():
    assert select_top_k(torch.rand(1, 2), torch.ones(1, 2), 10**30).all()


def test_a_top_k_below_1_is_refused():
    with pytest.raises(ValueError, match="top_k"):
        select_top_k(torch.rand(1, 2), torch.ones(1, 2), 0)


def test_of_many_equal_scores_the_first_tags_win():
    selected = select_top_k(torch.full((2, 100), 0.5), torch.ones(2, 100), 3)

    assert selected.nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_padding_in_front_takes_no_place_of_a_tag_with_score_0():
    assert select_top_k(torch.zeros(1, 3), torch.tensor([[0, 0, 1]]), 1).tolist() == [[False, False, True]]


# --------------------------------------------------------------------------------------------------------- expected F1

# Scores of every kind, among them ties, certainties and near-certainties; at most 10 tags, so that all subsets can be
# gone through.
rows_of_probabilities = st.lists(
    st.lists(
        st.one_of(st.sampled_from([0.0, 1e-6, 0.25, 0.5, 1.0]), st.floats(0, 1, width=32)), min_size=1, max_size=10
    ),
    min_size=1,
    max_size=3,
)


def brute_force(probabilities: list[float]) -> dict[tuple[bool, ...], float]:
    """The expected F1 of every subset, over every truth, in double precision."""
    subsets = np.array(list(itertools.product([0, 1], repeat=len(probabilities))), float)  # (2^L, L)
    p = np.array(probabilities, float)
    chances = np.where(subsets == 1, p, 1 - p).prod(-1)  # of each subset as the truth
    sizes = subsets.sum(-1)
    f1 = 2 * subsets @ subsets.T / np.maximum(sizes[:, None] + sizes, 1)  # (selection, truth)
    return {tuple(subset.astype(bool).tolist()): value for subset, value in zip(subsets, f1 @ chances, strict=True)}


@settings(deadline=None)
@given(rows_of_probabilities)
def test_no_subset_has_a_higher_expected_f1(rows):
    scores, mask = padded(rows, 0.9)

    selected = select_by_expected_f1(scores, mask)

    for row, kept in zip(rows, selected.tolist(), strict=True):
        expected = brute_force(row)
        assert any(kept) and not any(kept[len(row) :])
        assert expected[tuple(kept[: len(row)])] == pytest.approx(max(expected.values()), abs=1e-6)


@settings(deadline=None)
@given(rows_of_probabilities, st.integers(0, 4), st.integers(0, 4))
def test_within_bounds_the_best_subset_of_a_permitted_size_is_chosen(rows, min_tags, more):
    scores, mask = padded(rows, 0.9)
    max_tags = max(1, min_tags + more)

    selected = select(scores, mask, SelectionRule("expected_f1", min_tags=min_tags, max_tags=max_tags))

    for row, kept in zip(rows, selected.tolist(), strict=True):
        lowest = min(max(1, min_tags), len(row))
        permitted = {subset: f1 for subset, f1 in brute_force(row).items() if lowest <= sum(subset) <= max_tags}
        assert permitted[tuple(kept[: len(row)])] == pytest.approx(max(permitted.values()), abs=1e-6)


@settings(deadline=None)
@given(rows_of_probabilities, st.integers(1, 5), st.randoms(use_true_random=False))
def test_neither_padding_nor_the_order_of_the_tags_changes_what_is_chosen(rows, more, random):
    rows = [list(dict.fromkeys(row)) for row in rows]  # of equal scores the first tag wins, whatever its place
    scores, mask = padded(rows, 0.9)
    order = torch.tensor(random.sample(range(scores.shape[1] + more), scores.shape[1] + more))
    wider = torch.nn.functional.pad(scores, (0, more), value=0.9)[:, order]
    wider_mask = torch.nn.functional.pad(mask, (0, more))[:, order]

    selected = select_by_expected_f1(scores, mask)
    again = select_by_expected_f1(wider, wider_mask)

    assert not (again & ~wider_mask.bool()).any()
    assert [sorted(row[kept].tolist()) for row, kept in zip(scores, selected, strict=True)] == [
        sorted(row[kept].tolist()) for row, kept in zip(wider, again, strict=True)
    ]


def expected_f1(scores: torch.Tensor, mask: torch.Tensor, selected: torch.Tensor) -> np.ndarray:
    """The expected F1 of each image's selection, (B,), in double precision."""

    def chances(probabilities: np.ndarray) -> np.ndarray:  # of 0, 1, 2, ... important tags
        return functools.reduce(lambda counts, p: np.convolve(counts, (1 - p, p)), probabilities, np.ones(1))

    values = []
    for row, real, kept in zip(scores.double().numpy(), mask.bool().numpy(), selected.numpy(), strict=True):
        hits, misses = chances(row[real & kept]), chances(row[real & ~kept])
        hit, miss = np.ogrid[: len(hits), : len(misses)]
        values.append(hits @ (2 * hit / np.maximum((real & kept).sum() + hit + miss, 1)) @ misses)
    return np.array(values)


@pytest.mark.parametrize("num_tags", [16, 64])
def test_it_is_never_below_the_threshold_in_expected_f1_and_single_precision_is_enough(num_tags):
    scores = torch.rand(256, num_tags) ** 2
    mask = torch.arange(num_tags) < torch.randint(1, num_tags + 1, (256, 1))

    selected = select_by_expected_f1(scores, mask)

    found = expected_f1(scores, mask, selected)
    best = expected_f1(scores, mask, select_by_expected_f1(scores.double(), mask))
    np.testing.assert_allclose(found, best, atol=1e-6)
    for threshold in (0.3, 0.5, 0.7):
        assert (found + 1e-6 >= expected_f1(scores, mask, scores >= threshold)).all()


def test_a_long_list_neither_changes_nor_delays_the_choices_for_the_others(monkeypatch):
    scores = torch.rand(256, 40) ** 2
    mask = torch.arange(40) < torch.randint(1, 17, (256, 1))
    mask[7] = True
    expected = select_by_expected_f1(scores, mask)
    sizes = []
    whole = selection_magneto._count_important
    monkeypatch.setattr(selection_magneto, "MAX_TABLE_SIZE", 5000)
    monkeypatch.setattr(selection_magneto, "_count_important", lambda p: sizes.append(p.numel() * len(p)) or whole(p))

    selected = select_by_expected_f1(scores, mask)

    assert torch.equal(selected, expected)
    assert len(sizes) > 2 and max(sizes) <= 5000


@pytest.mark.parametrize(
    "scores, kept",
    [
        ([0.45, 0.4, 0.3], [True, True, True]),  # at 0.5 nothing would be left
        ([0.9, 0.1, 0.05], [True, False, False]),
        ([0.0, 0.0], [True, False]),  # an image always has an important tag
        ([0.6, 0.6, 0.6], [True, True, True]),
        ([0.2, 1.0, 0.2], [False, True, False]),
    ],
)
def test_what_is_kept_depends_on_the_whole_image(scores, kept):
    assert select_by_expected_f1(torch.tensor([scores]), torch.ones(1, len(scores))).tolist() == [kept]


def test_of_equal_scores_the_earlier_tag_is_chosen():
    rule = SelectionRule("expected_f1", max_tags=1)
    assert select(torch.tensor([[0.2, 0.7, 0.7]]), torch.ones(1, 3), rule).tolist() == [[False, True, False]]


def test_an_image_without_tags_keeps_none():
    assert not select_by_expected_f1(torch.rand(2, 3), torch.zeros(2, 3)).any()


def test_half_precision_scores_are_enough_to_choose_by():
    scores = torch.tensor([[0.875, 0.75, 0.125]])
    for dtype in (torch.bfloat16, torch.float16):
        assert select_by_expected_f1(scores.to(dtype), torch.ones(1, 3)).tolist() == [[True, True, False]]


# --------------------------------------------------------------------------------------------------------------- rules


@given(rows_of_scores, st.sampled_from([0.25, 0.5, 1.0]), st.integers(0, 3), st.integers(0, 3))
def test_bounds_hold_on_top_of_the_threshold(rows, threshold, min_tags, more):
    scores, mask = padded(rows, 1.0)
    max_tags = max(1, min_tags + more)

    selected = select(scores, mask, SelectionRule(threshold=threshold, min_tags=min_tags, max_tags=max_tags)).tolist()

    for row, kept in zip(rows, selected, strict=True):
        best = sorted(range(len(row)), key=lambda index: (-row[index], index))
        wanted = sum(score >= threshold for score in row)
        expected = best[: min(max(wanted, min_tags), max_tags)]
        assert [index for index, is_kept in enumerate(kept) if is_kept] == sorted(expected)


def test_each_tag_may_have_its_own_threshold():
    scores, mask = torch.tensor([[0.9, 0.4, 0.4]]), torch.ones(1, 3)
    thresholds = torch.tensor([[0.95, 0.3, 0.5]])

    assert select(scores, mask, SelectionRule(), thresholds).tolist() == [[False, True, False]]
    assert select(scores, mask, SelectionRule(min_tags=1), thresholds).tolist() == [[True, True, False]]
    assert select(scores, mask, SelectionRule(min_tags=1, max_tags=1), thresholds).tolist() == [[True, False, False]]


def test_the_rule_decides_which_function_chooses():
    scores, mask = torch.tensor([[0.45, 0.4, 0.3]]), torch.ones(1, 3)

    assert not select(scores, mask).any()  # the paper's
    assert select(scores, mask, SelectionRule("top_k", top_k=2)).tolist() == [[True, True, False]]
    assert select(scores, mask, SelectionRule("expected_f1")).all()


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"rule": "best"}, "rule"),
        ({"rule": None}, "rule"),
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": "0.5"}, "threshold"),
        ({"threshold": None}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"top_k": 3}, "top_k"),  # the rule is another
        ({"rule": "top_k"}, "top_k"),
        ({"rule": "top_k", "top_k": 0}, "top_k"),
        ({"rule": "top_k", "top_k": True}, "top_k"),
        ({"min_tags": -1}, "min_tags"),
        ({"min_tags": None}, "min_tags"),
        ({"max_tags": 0}, "max_tags"),
        ({"min_tags": 3, "max_tags": 2}, "max_tags"),
        ({"tag_thresholds": [0.5]}, "tag_thresholds"),
        ({"tag_thresholds": {"sea": 2}}, "tag_thresholds.'sea'."),
        ({"rule": "expected_f1", "tag_thresholds": {"sea": 0.2}}, "tag_thresholds"),
        ({"treshold": 0.5}, "treshold"),
        ("threshold", "selection"),
    ],
)
def test_a_wrong_stored_rule_is_an_error_in_one_line_that_names_the_field(fields, name):
    with pytest.raises(ValueError, match=name) as caught:
        SelectionRule.from_dict(fields)

    assert "\n" not in str(caught.value)


def test_a_threshold_and_a_number_are_two_rules():
    with pytest.raises(ValueError, match="^threshold is 0.0 and top_k is 2, expected only one of them$"):
        find_rule({}, threshold=0.0, top_k=2)


def test_a_stored_rule_has_the_defaults_of_what_it_leaves_out():
    assert SelectionRule.from_dict({}) == PAPER_RULE == SelectionRule("threshold", 0.5)
    assert SelectionRule.from_dict({"rule": "top_k", "top_k": 3, "max_tags": 2}) == SelectionRule(
        "top_k", top_k=3, max_tags=2
    )
