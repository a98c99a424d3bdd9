import json

import pytest
from huggingface_hub.errors import StrictDataclassError

from modeling_magneto import MagnetoConfig


def test_the_defaults_are_the_papers_nus_wide_setting():
    config = MagnetoConfig()

    assert config.backbone == "resnet18" and config.num_trainable_backbone_stages == 0  # A.2
    assert config.image_size == 112 and config.max_tags == 16  # A.1
    assert (config.num_image_layers, config.num_tag_layers) == (1, 2)  # N, M in A.3
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (128, 4, 512)
    assert config.dropout == 0.3
    assert config.vocab_size == 81 + 2  # the concepts, [PAD] and [UNK]
    assert (config.streams, config.tag_encoder) == ("both", "transformer")
    assert (config.objective, config.auxiliary_loss_weight) == ("bce_dice", 1)
    assert config.calibration is None  # raw scores


@pytest.mark.parametrize(
    "name, value",
    [
        ("vocab_size", 0),
        ("vocab_size", "many"),
        ("pad_token_id", "[PAD]"),
        ("hidden_size", "eight"),
        ("hidden_size", 16.0),
        ("hidden_size", 0),
        ("num_attention_heads", 0),
        ("num_attention_heads", 5),  # 128 is no multiple of it
        ("intermediate_size", -1),
        ("num_tag_layers", 0),
        ("num_image_layers", 0),
        ("num_image_layers", None),
        ("dropout", -0.1),
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("dropout", "a little"),
        ("max_tags", 0),
        ("streams", "three"),
        ("streams", None),
        ("tag_encoder", "lstm"),
        ("objective", "dice"),
        ("auxiliary_loss_weight", -1),
        ("auxiliary_loss_weight", "1"),
        ("backbone", 18),
        ("backbone_kwargs", "pad_type=same"),
        ("num_trainable_backbone_stages", -2),
        ("num_trainable_backbone_stages", 1.5),
        ("image_size", 0),
        ("image_size", (112, 112)),
        ("calibration", 1.5),
        ("calibration", {"logits": 1.5}),
        ("calibration", {"gate": {"temperature": 1.0, "bias": 0.0}}),
        ("calibration", {"logits": {"temperature": 1.0}}),
        ("calibration", {"logits": {"temperature": 1.0, "bias": 0.0, "slope": 1.0}}),
        ("calibration", {"logits": {"temperature": 0, "bias": 0.0}}),
        ("calibration", {"logits": {"temperature": -1.0, "bias": 0.0}}),
        ("calibration", {"logits": {"temperature": float("inf"), "bias": 0.0}}),
        ("calibration", {"logits": {"temperature": 1.0, "bias": float("nan")}}),
        ("calibration", {"logits": {"temperature": 1.0, "bias": None}}),
        ("calibration", {"logits": {"temperature": 1.0, "bias": 0.0, "tag_biases": [0.1]}}),
        ("calibration", {"logits": {"temperature": 1.0, "bias": 0.0, "tag_biases": {"83": 0.1}}}),
        ("calibration", {"logits": {"temperature": 1.0, "bias": 0.0, "tag_biases": {"-1": 0.1}}}),
        ("calibration", {"logits": {"temperature": 1.0, "bias": 0.0, "tag_biases": {2: 0.1}}}),
        ("calibration", {"logits": {"temperature": 1.0, "bias": 0.0, "tag_biases": {"2": "a little"}}}),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_field(name, value):
    with pytest.raises(StrictDataclassError) as caught:
        MagnetoConfig(**{name: value})

    assert name in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize("ratio", [0, 0.0, 0.5])
def test_ratios_may_be_whole_numbers(ratio):
    config = MagnetoConfig(dropout=ratio, auxiliary_loss_weight=ratio)

    assert (config.dropout, config.auxiliary_loss_weight) == (ratio, ratio)


def test_a_saved_configuration_comes_back_with_every_field(tmp_path):
    changed = {
        "vocab_size": 7,
        "pad_token_id": 1,
        "hidden_size": 12,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "num_tag_layers": 3,
        "num_image_layers": 4,
        "dropout": 0.25,
        "max_tags": 5,
        "streams": "image",
        "tag_encoder": "feed_forward",
        "objective": "bce",
        "auxiliary_loss_weight": 0.5,
        "backbone": "mobilenetv2_100",
        "backbone_kwargs": {"pad_type": "same"},
        "num_trainable_backbone_stages": -1,
        "image_size": 64,
        "calibration": {"logits": {"temperature": 1.5, "bias": -0.25, "tag_biases": {"3": 0.125}}},
    }
    MagnetoConfig(**changed).save_pretrained(tmp_path)

    loaded = MagnetoConfig.from_pretrained(tmp_path)

    assert {name: getattr(loaded, name) for name in changed} == changed
    assert all(value != getattr(MagnetoConfig(), name) for name, value in changed.items())


def test_a_saved_configuration_with_a_wrong_value_is_refused(tmp_path):
    MagnetoConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "streams": "three"}))

    with pytest.raises(StrictDataclassError, match="streams"):
        MagnetoConfig.from_pretrained(tmp_path)
