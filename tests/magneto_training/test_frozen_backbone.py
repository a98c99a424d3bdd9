import pytest
import torch
from conftest import make_rows
from datasets import Dataset
from torch import nn

from magneto_training import frozen_backbone
from magneto_training.collation import TagCollator
from magneto_training.frozen_backbone import FrozenBackbone
from magneto_training.photographs import undecoded
from magneto_training.prediction import load_model
from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization

CPU = torch.device("cpu")


@pytest.fixture
def moved_model(tiny_model):
    """A model whose batch norm has seen something: folding must take it into account."""
    for module in tiny_model.magneto.image_feature_extractor.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_(0, 0.3)
    return tiny_model


@pytest.fixture
def pixel_values():
    return torch.randn(3, 3, 32, 32)


def test_it_computes_the_models_feature_map_without_batch_norm(moved_model, pixel_values):
    expected = moved_model.magneto.image_feature_extractor.feature_map(pixel_values)
    backbone = FrozenBackbone(moved_model, CPU)

    found = backbone(pixel_values)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not found.requires_grad
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.feature_map.modules())


def test_the_model_stays_as_it_is(moved_model, pixel_values):
    moved_model.train()
    before = {name: tensor.clone() for name, tensor in moved_model.state_dict().items()}
    modes = [module.training for module in moved_model.modules()]

    FrozenBackbone(moved_model, CPU, bf16=True)(pixel_values)

    after = moved_model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert [module.training for module in moved_model.modules()] == modes
    assert any(parameter.requires_grad for parameter in moved_model.parameters())


@pytest.mark.parametrize(("capability", "is_slow"), [("AVX2", True), ("AVX512", False), ("SVE256", False)])
def test_bfloat16_in_software_is_warned_of(tiny_model, monkeypatch, recwarn, capability, is_slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)

    FrozenBackbone(tiny_model, CPU, bf16=True)
    FrozenBackbone(tiny_model, CPU)

    assert sum("no instructions for bfloat16" in str(warning.message) for warning in recwarn) == is_slow


def test_in_bfloat16_it_computes_what_autocast_does(moved_model, pixel_values):
    extractor = moved_model.magneto.image_feature_extractor
    with torch.autocast("cpu", torch.bfloat16):
        expected = extractor.feature_map(pixel_values)

    found = FrozenBackbone(moved_model, CPU, bf16=True)(pixel_values)

    assert found.dtype == torch.bfloat16
    exact = extractor.feature_map(pixel_values)
    assert (found.float() - exact).norm() < 1.5 * (expected.float() - exact).norm() < 0.05 * exact.norm()


class Branching(nn.Module):
    """A backbone that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.convolution(pixel_values))
        return features if features.sum() > 0 else -features


@pytest.mark.parametrize("bf16", [False, True])
def test_a_backbone_with_channels_last_and_shifted_windows(tiny_config, bf16):
    swin = {"backbone": "swin_tiny_patch4_window7_224", "backbone_kwargs": {"depths": (2, 1, 1, 1)}, "image_size": 224}
    model = MagnetoForTagSummarization(MagnetoConfig(**{**tiny_config.to_dict(), **swin})).eval()
    pixel_values = torch.randn(1, 3, 224, 224)
    expected = model.magneto.image_feature_extractor.feature_map(pixel_values)

    found = FrozenBackbone(model, CPU, bf16)(pixel_values)

    assert found.shape == expected.shape == (1, 768, 7, 7)
    assert (found.float() - expected).norm() < (0.02 if bf16 else 1e-5) * expected.norm()


def test_a_large_batch_is_computed_in_pieces(tiny_model, monkeypatch):
    pixel_values = torch.randn(7, 3, 32, 32)
    whole = FrozenBackbone(tiny_model, CPU)(pixel_values)
    monkeypatch.setattr(frozen_backbone, "IMAGES_AT_A_TIME", 3)

    torch.testing.assert_close(FrozenBackbone(tiny_model, CPU)(pixel_values), whole)


def test_a_backbone_that_cannot_be_traced_runs_as_it_is(tiny_model, pixel_values):
    tiny_model.magneto.image_feature_extractor.backbone = Branching().eval()
    expected = tiny_model.magneto.image_feature_extractor.feature_map(pixel_values)

    torch.testing.assert_close(FrozenBackbone(tiny_model, CPU)(pixel_values), expected)


def test_a_batch_is_scored_alike_with_features_from_the_collator(tiny_model, processor):
    rows = undecoded(Dataset.from_list(make_rows(6))).to_list()
    backbone = FrozenBackbone.for_workers(tiny_model, CPU)
    photographs, features = TagCollator(processor)(rows), TagCollator(processor, backbone=backbone)(rows)

    assert "pixel_values" in photographs and "pixel_values" not in features
    with torch.no_grad():
        torch.testing.assert_close(tiny_model(**features).logits, tiny_model(**photographs).logits)


def test_the_workers_get_no_backbone_that_is_trained_or_belongs_on_a_gpu(tiny_model, tiny_config, tmp_path, processor):
    tag_only = MagnetoForTagSummarization(MagnetoConfig(vocab_size=6, streams="tag"))
    fine_tuned = MagnetoForTagSummarization(
        MagnetoConfig(**{**tiny_config.to_dict(), "num_trainable_backbone_stages": 1})
    )
    fine_tuned.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    assert FrozenBackbone.for_workers(tiny_model, CPU) is not None
    assert FrozenBackbone.for_workers(tiny_model, torch.device("cuda")) is None
    assert FrozenBackbone.for_workers(tag_only, CPU) is None
    assert FrozenBackbone.for_workers(fine_tuned.eval(), CPU) is None
    # Whoever only predicts trains nothing.
    assert FrozenBackbone.for_workers(load_model(str(tmp_path))[0], CPU) is not None
