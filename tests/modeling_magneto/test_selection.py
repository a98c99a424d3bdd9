import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_magneto.selection_magneto import select_by_threshold, select_top_k

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


def test_a_top_k_below_1_is_refused():
    with pytest.raises(ValueError, match="top_k"):
        select_top_k(torch.rand(1, 2), torch.ones(1, 2), 0)


def test_of_many_equal_scores_the_first_tags_win():
    selected = select_top_k(torch.full((2, 100), 0.5), torch.ones(2, 100), 3)

    assert selected.nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_padding_in_front_takes_no_place_of_a_tag_with_score_0():
    assert select_top_k(torch.zeros(1, 3), torch.tensor([[0, 0, 1]]), 1).tolist() == [[False, False, True]]
