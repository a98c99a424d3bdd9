import json

import numpy as np
import pytest
import timm
import torch
from conftest import run_alone
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor

from magneto_training.backbone import prepare_backbone
from modeling_magneto import (
    MagnetoConfig,
    MagnetoForOutlierDetection,
    MagnetoForTagSummarization,
    MagnetoModel,
    MagnetoProcessor,
)

MODEL_CLASSES = [MagnetoForTagSummarization, MagnetoForOutlierDetection, MagnetoModel]


def make_inputs(processor):
    rng = np.random.default_rng(0)
    photographs = [
        Image.fromarray(rng.integers(256, size=size, dtype=np.uint8)) for size in ((64, 48, 3), (40, 40, 3))
    ]
    return processor(photographs, [["red", "blue"], ["green", "yellow", "unheard of"]])


def moved(model):
    """The model after a few training steps' worth of changes: no weight or statistic is at its start value."""
    for tensor in model.state_dict().values():
        tensor.add_(torch.rand_like(tensor) / 30 if tensor.is_floating_point() else 3)
    return model.eval()


def assert_same_state(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.fixture
def saved(tiny_config, processor, tmp_path):
    """A folder with a model and its processor, and the two."""
    model = moved(MagnetoForTagSummarization(tiny_config))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model, processor


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_auto_classes_give_back_what_was_saved(tiny_config, processor, tmp_path, model_class):
    model = moved(model_class(tiny_config))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    loaded, loaded_processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)

    assert type(loaded) is model_class and type(loaded_processor) is MagnetoProcessor
    assert type(AutoConfig.from_pretrained(tmp_path)) is MagnetoConfig
    assert not loaded.training
    assert_same_state(loaded, model)
    with torch.no_grad():
        outputs, expected = loaded(**make_inputs(loaded_processor)), model(**make_inputs(processor))
    assert outputs.keys() == expected.keys()
    # Weights that lie in a file's memory are aligned differently, for which PyTorch's kernels round differently.
    assert all(torch.allclose(outputs[name], expected[name], atol=1e-6, rtol=1e-6) for name in outputs)


def test_a_fresh_process_loads_a_saved_folder_from_its_own_code(saved, tmp_path):
    folder, _, processor = saved
    inputs = make_inputs(processor)
    with torch.no_grad():
        outputs = AutoModel.from_pretrained(folder)(**inputs)
    torch.save((dict(inputs), dict(outputs)), tmp_path / "expected.pt")
    script = """
import sys, torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor
config = AutoConfig.from_pretrained("model", trust_remote_code=True)
model = AutoModel.from_pretrained("model", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("model", trust_remote_code=True)
inputs, expected = torch.load("expected.pt")
with torch.no_grad():
    outputs = model(**inputs)
assert outputs.keys() == expected.keys()
assert all(torch.equal(outputs[name], expected[name]) for name in outputs)
assert processor.vocabulary == ["blue", "green", "red", "yellow"]
print(type(config).__name__, type(model).__name__, type(processor).__name__, "modeling_magneto" in sys.modules)
print(processor(Image.new("RGB", (50, 40), "red"), ["Red ", "blue"])["input_ids"].tolist())
print(config.model_type, config.hidden_size, not model.training)
"""

    printed = run_alone(script, tmp_path)

    assert printed.splitlines() == [
        "MagnetoConfig MagnetoForTagSummarization MagnetoProcessor False",
        "[[4, 2]]",
        "magneto 16 True",
    ]


def test_a_saved_folder_holds_safetensors_and_code_and_no_pickle(saved):
    folder, model, _ = saved

    names = {path.name for path in folder.rglob("*") if path.is_file()}

    assert {"model.safetensors", "config.json", "processor_config.json", "tokenizer.json"} <= names
    assert {f"{part}_magneto.py" for part in ("configuration", "loss", "modeling", "selection", "processing")} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_magneto.MagnetoForTagSummarization"


def test_a_processor_comes_back_with_its_settings(tmp_path):
    processor = MagnetoProcessor.from_vocabulary(
        ["red car", "blue"], image_size=48, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], max_tags=7
    )
    processor.save_pretrained(tmp_path)

    loaded = AutoProcessor.from_pretrained(tmp_path)

    assert loaded.vocabulary == ["red car", "blue"]
    assert loaded.max_tags == 7 and loaded.use_images is True
    photograph = Image.effect_noise((90, 60), 80).convert("RGB")
    inputs, expected = loaded(photograph, ["blue", "red car"]), processor(photograph, ["blue", "red car"])
    assert inputs.keys() == expected.keys() and all(torch.equal(inputs[name], expected[name]) for name in inputs)


SELECTION = {"rule": "threshold", "threshold": 0.25, "max_tags": 3, "tag_thresholds": {"blue": 0.9}}


def test_a_processor_comes_back_with_its_rule(processor, tmp_path):
    processor.selection = SELECTION
    processor.save_pretrained(tmp_path)

    assert json.loads((tmp_path / "processor_config.json").read_text())["selection"] == SELECTION
    assert AutoProcessor.from_pretrained(tmp_path).selection == SELECTION


def test_a_processor_of_before_there_were_rules_has_the_papers(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    settings = json.loads(file.read_text())
    del settings["selection"]
    file.write_text(json.dumps(settings))

    assert AutoProcessor.from_pretrained(tmp_path).selection == {"rule": "threshold", "threshold": 0.5}


def test_a_wrong_saved_rule_is_an_error_in_one_line_that_names_the_field(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "selection": {"rule": "threshold", "threshold": "half"}}))

    with pytest.raises(ValueError, match="threshold is 'half', expected a number in .0, 1.") as caught:
        AutoProcessor.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tag_only_processor_stays_one(tmp_path):
    MagnetoProcessor.from_vocabulary(["red"], use_images=False).save_pretrained(tmp_path)

    loaded = AutoProcessor.from_pretrained(tmp_path)

    assert loaded.use_images is False
    assert set(loaded(tags=["red"])) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("stages, trained", [(0, set()), (1, {"layer4"})])
def test_frozen_stages_stay_frozen_after_loading(tiny_config, tmp_path, stages, trained):
    config = MagnetoConfig(**{**tiny_config.to_dict(), "num_trainable_backbone_stages": stages})
    MagnetoForTagSummarization(config).save_pretrained(tmp_path)

    loaded = MagnetoForTagSummarization.from_pretrained(tmp_path)

    backbone = loaded.magneto.image_feature_extractor.backbone
    assert {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad} == trained
    assert all(p.requires_grad for name, p in loaded.named_parameters() if "backbone" not in name)


@pytest.mark.parametrize("stages", [0, 1])
def test_convolutions_lie_as_the_photographs_do(tiny_config, tmp_path, stages):
    """Otherwise PyTorch turns the weights round for every batch, which a single photograph has to wait for."""
    tiny_config.num_trainable_backbone_stages = stages
    fresh = MagnetoForTagSummarization(tiny_config)
    fresh.save_pretrained(tmp_path)

    for model in (fresh, MagnetoForTagSummarization.from_pretrained(tmp_path)):
        backbone = model.magneto.image_feature_extractor.backbone
        kernels = [weight for weight in backbone.parameters() if weight.ndim == 4]
        assert kernels and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)


CALIBRATION = {
    "logits": {"temperature": 1.4, "bias": 0.1, "tag_biases": {"2": -0.3, "5": 0.7}},
    "image_logits": {"temperature": 0.6, "bias": -1.1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_calibration_survives_saving_and_loading_bit_for_bit(tiny_config, processor, tmp_path, dtype):
    model = moved(MagnetoForTagSummarization(tiny_config)).to(dtype)
    raw_state = model.state_dict().keys()
    model.set_calibration(CALIBRATION)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)

        assert loaded.config.calibration == CALIBRATION
        assert loaded.state_dict().keys() == raw_state == load_file(tmp_path / "model.safetensors").keys()
        for name, biases in (("logits", [0.1, 0.1, -0.2, 0.1, 0.1, 0.8]), ("image_logits", [-1.1] * 6)):
            assert loaded.calibration[name].biases.tolist() == pytest.approx(biases, abs=1e-6)
            assert torch.equal(loaded.calibration[name].biases, model.calibration[name].biases)
        with torch.no_grad():
            outputs, expected = loaded(**make_inputs(processor)), model(**make_inputs(processor))
        tolerance = 1e-6 if dtype == torch.float32 else 0.02
        for name in ("logits", "tag_logits", "image_logits"):
            torch.testing.assert_close(outputs[name], expected[name], atol=tolerance, rtol=tolerance)
        model = loaded


def test_a_fresh_process_loads_rule_and_calibration_from_the_folders_own_code(saved, tmp_path):
    folder, model, processor = saved
    model.set_calibration(CALIBRATION)
    model.save_pretrained(folder)
    processor.selection = SELECTION
    processor.save_pretrained(folder)
    script = """
import sys
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained("model", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("model", trust_remote_code=True)
print("modeling_magneto" in sys.modules)
print(sorted(processor.selection.items()))
print(model.calibration["logits"].biases.tolist())
"""

    printed = run_alone(script, tmp_path)

    biases = model.calibration["logits"].biases.tolist()
    assert printed.splitlines() == ["False", str(sorted(SELECTION.items())), str(biases)]


def test_pretraining_ignores_a_calibration(tiny_config, processor, tmp_path):
    model = moved(MagnetoForTagSummarization(tiny_config))
    model.set_calibration(CALIBRATION)
    model.save_pretrained(tmp_path)

    detector = MagnetoForOutlierDetection.from_pretrained(tmp_path)

    with torch.no_grad():
        states = detector.magneto(**make_inputs(processor))
        raw = detector.detectors(states.tag_hidden_state, states.image_hidden_state)
        outputs = detector(**make_inputs(processor))
    assert torch.equal(outputs.tag_logits, raw[0]) and torch.equal(outputs.image_logits, raw[1])


# ------------------------------------------------------------------------------------------------------ initialisation


def test_the_initialisation_of_timm_and_pytorch_is_kept(tiny_config):
    config = MagnetoConfig(**{**tiny_config.to_dict(), "backbone_kwargs": {"zero_init_last": True}})
    expected = timm.create_model(config.backbone, num_classes=0, global_pool="", zero_init_last=True).state_dict()

    model = MagnetoForTagSummarization(config)
    backbone = model.magneto.image_feature_extractor.backbone

    zeros = {name for name, tensor in expected.items() if tensor.count_nonzero() == 0}
    assert any(name.endswith("bn3.weight") or name.endswith("bn2.weight") for name in zeros)
    for name, tensor in backbone.state_dict().items():
        if tensor.ndim == 4:  # a convolution, drawn anew; PyTorch's own initialisation would have another deviation
            assert tensor.std().item() == pytest.approx(expected[name].std().item(), rel=0.15), name
        else:
            assert torch.equal(tensor, expected[name]), name
    limit = config.hidden_size**-0.5  # torch.nn.Linear's
    assert limit * 0.9 < model.classifiers.tag.weight.abs().max() < limit
    assert model.magneto.tag_embedder.weight[0].count_nonzero() == 0
    assert model.magneto.tag_embedder.weight[1:].std().item() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("classifier", [True, False])
def test_backbone_weights_survive_construction_saving_and_loading_bit_for_bit(tiny_config, tmp_path, classifier):
    source = moved(timm.create_model(tiny_config.backbone, num_classes=10 if classifier else 0))
    weights = {name: tensor.contiguous() for name, tensor in source.state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")

    model = MagnetoForTagSummarization(tiny_config)
    prepare_backbone(model.magneto, str(tmp_path / "weights.safetensors"))
    model.train()(**{"input_ids": torch.tensor([[2, 3], [4, 5]]), "pixel_values": torch.randn(2, 3, 32, 32)})
    model.save_pretrained(tmp_path / "model")
    loaded = MagnetoForTagSummarization.from_pretrained(tmp_path / "model")

    for kept in (model, loaded):
        state = kept.magneto.image_feature_extractor.backbone.state_dict()
        assert any(name.endswith("running_mean") for name in state)
        assert weights.keys() - state.keys() == ({"fc.weight", "fc.bias"} if classifier else set())
        assert [name for name, tensor in state.items() if not torch.equal(tensor, weights[name])] == []
    assert_same_state(loaded, model)


@pytest.mark.parametrize("from_class", [MagnetoForTagSummarization, MagnetoForOutlierDetection])
def test_a_model_without_backbone_loads_into_one_with_and_the_rest_starts_afresh(tiny_config, tmp_path, from_class):
    tag_only = moved(from_class(MagnetoConfig(**{**tiny_config.to_dict(), "streams": "tag"})))
    tag_only.save_pretrained(tmp_path)

    model = MagnetoForTagSummarization.from_pretrained(tmp_path, config=tiny_config)

    for name, tensor in model.magneto.tag_encoder.state_dict().items():
        assert torch.equal(tensor, tag_only.magneto.tag_encoder.state_dict()[name])
    fresh = from_class(tiny_config).magneto.image_feature_extractor.state_dict()
    for name, tensor in model.magneto.image_feature_extractor.state_dict().items():
        if tensor.ndim < 2 and name != "projection.bias":  # batch norm
            assert torch.equal(tensor, fresh[name]), name
        else:
            assert tensor.isfinite().all() and tensor.abs().max() <= 1 and tensor.std() > 0.01, name
    with torch.no_grad():
        outputs = model(torch.tensor([[2, 3]]), pixel_values=torch.randn(1, 3, 64, 64))
    assert outputs.logits.isfinite().all() and outputs.image_logits.abs().max() < 10


def test_a_backbone_that_a_checkpoint_lacks_is_initialised_as_timm_does_it(tiny_config, tmp_path):
    fields = {**tiny_config.to_dict(), "backbone": "test_convnext.r160_in1k"}
    MagnetoForTagSummarization(MagnetoConfig(**{**fields, "streams": "tag"})).save_pretrained(tmp_path)

    model = MagnetoForTagSummarization.from_pretrained(tmp_path, config=MagnetoConfig(**fields))

    expected = MagnetoForTagSummarization(
        MagnetoConfig(**fields)
    ).magneto.image_feature_extractor.backbone.state_dict()
    for name, tensor in model.magneto.image_feature_extractor.backbone.state_dict().items():
        if name.endswith(("gamma", "bias")):  # constants; PyTorch's own biases are random
            assert torch.equal(tensor, expected[name]), name
        elif tensor.numel() > 50:
            assert tensor.std().item() == pytest.approx(expected[name].std().item(), rel=0.3), name


def test_what_timm_computes_at_construction_is_computed_again_at_loading(tiny_config, tmp_path):
    options = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "patch_size": 2}
    config = MagnetoConfig(
        **{**tiny_config.to_dict(), "backbone": "swin_tiny_patch4_window7_224", "backbone_kwargs": options}
    )
    config.backbone_kwargs["img_size"] = config.image_size
    model = moved(MagnetoForTagSummarization(config))
    model.save_pretrained(tmp_path)

    loaded = MagnetoForTagSummarization.from_pretrained(tmp_path).eval()

    inputs = {"input_ids": torch.tensor([[2, 3]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_pretraining_hands_over_everything_but_heads_and_gate(tiny_config, tmp_path):
    pretrained = moved(MagnetoForOutlierDetection(tiny_config))
    pretrained.save_pretrained(tmp_path)

    model, report = MagnetoForTagSummarization.from_pretrained(tmp_path, output_loading_info=True)

    assert_same_state(model.magneto, pretrained.magneto)
    new = {name for name in model.state_dict() if not name.startswith("magneto.")}
    assert set(report["missing_keys"]) == new
    assert {name.split(".")[0] for name in new} == {"classifiers", "gate"}
    limit = tiny_config.hidden_size**-0.5  # a fresh torch.nn.Linear, not the moved detectors
    assert all(head.weight.abs().max() <= limit for head in (model.classifiers.tag, model.classifiers.image))


def test_a_model_is_made_and_loaded_under_inference_mode(tiny_model, processor, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = MagnetoForTagSummarization.from_pretrained(tmp_path)
        logits = loaded(**make_inputs(processor)).logits
    torch.testing.assert_close(logits, tiny_model(**make_inputs(processor)).logits, atol=1e-6, rtol=0)


def test_half_precision_weights_score_like_whole_ones(tiny_model, processor, tmp_path):
    tiny_model.to(torch.bfloat16).save_pretrained(tmp_path)
    inputs = make_inputs(processor)

    half = AutoModel.from_pretrained(tmp_path)
    whole = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)

    assert half.dtype == torch.bfloat16 and whole.dtype == torch.float32
    with torch.no_grad():
        scores = [torch.sigmoid(model(**inputs).logits.float()) for model in (half, whole)]
    torch.testing.assert_close(*scores, atol=0.03, rtol=0)
