import pytest
import timm
import torch
from safetensors.torch import save_file

from magneto_training.arguments import ModelArguments, UserError
from magneto_training.backbone import prepare_backbone, resolve_normalization
from magneto_training.initialization import new_model
from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization, MagnetoModel


def make_model(config: MagnetoConfig, **changes) -> MagnetoModel:
    return MagnetoModel(MagnetoConfig(**{**config.to_dict(), **changes}))


def backbone_state(model: MagnetoModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.image_feature_extractor.backbone.state_dict().items()}


@pytest.mark.parametrize(
    "backbone, size, kwargs, message",
    [
        ("test_vit", 160, None, "test_vit returns .* expected a feature map"),
        ("swin_tiny_patch4_window7_224", 64, {"depths": (1, 1, 1, 1)}, "cannot be used at 64 px"),
        ("resnet18", 64, {"pad_typ": "same"}, "pad_typ"),
        (
            "resnet18",
            64,
            {"features_only": True},
            "backbone_kwargs is {'features_only': True}, .*num_features",
        ),
        ("resnet18", 64, {"act_layer": "reluu"}, "backbone_kwargs is .*KeyError: 'reluu'"),
    ],
)
def test_a_backbone_that_cannot_be_used_is_refused(processor, backbone, size, kwargs, message):
    arguments = ModelArguments(backbone=backbone, image_size=size, backbone_kwargs=kwargs)
    with pytest.raises(UserError, match=message):
        new_model(MagnetoForTagSummarization, processor, arguments)


def test_a_single_region_is_warned_of(tiny_config):
    with pytest.warns(UserWarning, match="single region at 32 px"):
        prepare_backbone(make_model(tiny_config), "none")


def test_random_weights_on_purpose_are_left_as_they_are(tiny_config):
    model = make_model(tiny_config, num_trainable_backbone_stages=-1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    prepare_backbone(model, "none")

    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_the_weights_of_a_file_are_put_in(tiny_config, tmp_path):
    source = timm.create_model(tiny_config.backbone)  # with its classifier
    for tensor in source.state_dict().values():
        tensor.add_(1)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = make_model(tiny_config)

    prepare_backbone(model, str(tmp_path / "weights.safetensors"))

    expected = source.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in backbone_state(model).items())


def test_weights_of_another_backbone_are_refused(tiny_config, tmp_path):
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "weights.safetensors")

    with pytest.raises(UserError, match="do not fit the backbone 'test_resnet.r160_in1k'") as caught:
        prepare_backbone(make_model(tiny_config), str(tmp_path / "weights.safetensors"))

    assert "\n" not in str(caught.value)


def test_incomplete_weights_are_refused(tiny_config, tmp_path):
    weights = timm.create_model(tiny_config.backbone).state_dict()
    weights.pop("layer4.0.bn1.running_mean")
    save_file(weights, tmp_path / "weights.safetensors")

    with pytest.raises(UserError, match="layer4.0.bn1.running_mean"):
        prepare_backbone(make_model(tiny_config), str(tmp_path / "weights.safetensors"))


@pytest.mark.parametrize(
    "source, message",
    [
        ("weights.pth", "expected 'pretrained', 'none' or a .safetensors file"),
        ("nowhere.safetensors", "'nowhere.safetensors' cannot be read"),
        ("broken.safetensors", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tiny_config, tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of use")

    with pytest.raises(UserError, match=message):
        prepare_backbone(make_model(tiny_config), source)


def test_pretrained_weights_out_of_reach_are_an_error_with_both_ways_out(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(UserError) as caught:
        prepare_backbone(make_model(tiny_config), "pretrained")

    message = str(caught.value)
    assert "'test_resnet.r160_in1k'" in message and "\n" not in message
    assert "--backbone_weights FILE.safetensors" in message and "--backbone_weights none" in message


def test_timms_normalisation_unless_one_is_given():
    mean, std = resolve_normalization(ModelArguments(backbone="test_resnet.r160_in1k"))
    cfg = timm.get_pretrained_cfg("test_resnet.r160_in1k")
    assert (tuple(mean), tuple(std)) == (cfg.mean, cfg.std)

    given = ModelArguments(backbone="resnet18", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    assert resolve_normalization(given) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
