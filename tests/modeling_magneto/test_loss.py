import numpy as np
import pytest
import torch

from modeling_magneto.loss_magneto import OBJECTIVES, bce_dice_loss, bce_loss, dice_loss
from modeling_magneto.modeling_magneto import mixture_logits

LOSSES = [bce_loss, dice_loss, bce_dice_loss]
LABELS = torch.tensor([[1, 0, 0, 1], [0, 1, -100, -100], [1, -100, -100, -100]])


def reference(logits: torch.Tensor, labels: torch.Tensor) -> dict:
    """Equations 2 to 4 in float64, image by image."""
    bce, dice = [], []
    for row, truth in zip(logits.double().numpy(), labels.numpy(), strict=True):
        p, y = 1 / (1 + np.exp(-row[truth != -100])), truth[truth != -100]
        bce += list(-y * np.log(p) - (1 - y) * np.log(1 - p))
        if len(y):
            dice.append(1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1))
    return {bce_loss: np.mean(bce), dice_loss: np.mean(dice), bce_dice_loss: np.mean(bce) + np.mean(dice)}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_equals_the_papers_formula(loss):
    logits = torch.randn(3, 4) * 5

    assert loss(logits, LABELS).item() == pytest.approx(reference(logits, LABELS)[loss], rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ignored", [0.0, 50.0, float("nan"), float("inf")])
def test_the_logit_of_an_ignored_slot_changes_nothing(loss, ignored):
    logits = torch.randn(3, 4)
    changed = logits.masked_fill(LABELS == -100, ignored).requires_grad_()

    value = loss(changed, LABELS)
    value.backward()

    assert value.item() == loss(logits, LABELS).item()
    assert changed.grad[LABELS == -100].abs().sum() == 0
    assert changed.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_an_image_without_real_tags_contributes_nothing(loss):
    logits = torch.randn(3, 4)
    with_empty = torch.cat([logits, torch.full((1, 4), float("nan"))])
    labels = torch.cat([LABELS, torch.full((1, 4), -100)])

    assert loss(with_empty, labels).item() == loss(logits, LABELS).item()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_without_real_tags_has_loss_zero(loss):
    logits = torch.randn(2, 3, requires_grad=True)

    value = loss(logits, torch.full((2, 3), -100))
    value.backward()

    assert value.item() == 0
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_losses_and_gradients(loss, size, dtype):
    logits = torch.tensor([[size, -size, size, -size]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([[1, 1, 0, 0]])  # right and wrong, in both directions

    value = loss(logits, labels)
    value.backward()

    assert value.isfinite() and logits.grad.isfinite().all()
    if loss is bce_loss:  # two of four tags are wrong by `size`; a clamp would show here
        assert value.item() == pytest.approx(size / 2, rel=1e-2)
        assert logits.grad.float().tolist() == [[0, -0.25, 0.25, 0]]


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_does_not_coarsen_a_loss(loss):
    logits = torch.randn(3, 4)

    with torch.autocast("cpu", torch.bfloat16):
        value = loss(logits, LABELS)

    assert value.dtype == torch.float32
    assert value.item() == loss(logits, LABELS).item()


def test_the_objective_bce_has_no_dice_part():
    logits = torch.randn(3, 4)

    assert OBJECTIVES["bce"](logits, LABELS) == bce_loss(logits, LABELS)
    assert OBJECTIVES["bce_dice"](logits, LABELS) == bce_loss(logits, LABELS) + dice_loss(logits, LABELS)


def test_the_mixture_equals_equation_1():
    gate, image, tag = torch.randn(3, 5, 7) * 4
    alpha, image_score, tag_score = (1 / (1 + np.exp(-z.double().numpy())) for z in (gate, image, tag))
    score = alpha * image_score + (1 - alpha) * tag_score

    np.testing.assert_allclose(mixture_logits(gate, image, tag), np.log(score / (1 - score)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_a_finite_mixture_and_gradients(dtype):
    corners = torch.cartesian_prod(*[torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4])] * 3).to(dtype)
    gate, image, tag = (column.requires_grad_() for column in corners.unbind(-1))

    logits = mixture_logits(gate, image, tag)
    bce_loss(logits[None], torch.ones(1, len(corners))).backward()

    assert logits.dtype == torch.float32
    assert logits.isfinite().all() and logits.abs().max() <= 1e4
    assert all(z.grad.isfinite().all() for z in (gate, image, tag))


def test_the_mixture_does_not_saturate_where_both_streams_are_sure():
    gate, stream = torch.zeros(2), torch.tensor([-300.0, 300.0])

    torch.testing.assert_close(mixture_logits(gate, stream, stream), stream)


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_of_half_precision_give_a_loss_of_full_precision(loss):
    logits = torch.randn(3, 4, dtype=torch.bfloat16)

    assert loss(logits, LABELS).item() == loss(logits.float(), LABELS).item()


@pytest.mark.parametrize("objective", OBJECTIVES.values())
def test_several_outputs_at_once_have_the_losses_of_each(objective):
    logits, labels = torch.randn(3, 4, 5), torch.randint(0, 2, (4, 5))
    labels[0, 2:], labels[1] = -100, -100

    losses = objective(logits, labels)

    torch.testing.assert_close(losses, torch.stack([objective(output, labels) for output in logits]))
