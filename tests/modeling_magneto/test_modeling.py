import copy

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import nn

from modeling_magneto import MagnetoConfig, MagnetoForOutlierDetection, MagnetoForTagSummarization, MagnetoModel
from modeling_magneto import modeling_magneto as modeling
from modeling_magneto.modeling_magneto import MagnetoDropout, MagnetoSlots

ARCHITECTURES = [
    {"streams": "both"},
    {"streams": "both", "tag_encoder": "feed_forward", "num_image_layers": 2},
    {"streams": "tag"},
    {"streams": "tag", "tag_encoder": "feed_forward"},
    {"streams": "image"},
]


def build(config: MagnetoConfig, model_class: type = MagnetoForTagSummarization, **changes):
    """A model in eval mode of which every weight and statistic counts: random, and large enough to tell tags apart."""
    config = MagnetoConfig(**{**config.to_dict(), **changes})
    model = model_class(config).eval()
    for name, tensor in model.state_dict().items():
        if "backbone" not in name and tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor) * 0.3)
            if name.endswith("extractor.norm.running_var"):
                tensor.uniform_(0.01, 0.03)
    return model


def make_batch(size: int = 64) -> dict[str, torch.Tensor]:
    """Three images with 5, 3 and 1 tags; 2 x 2 regions, for with a single one there is nothing to attend to."""
    return {
        "input_ids": torch.tensor([[2, 3, 4, 5, 1], [5, 3, 2, 0, 0], [4, 0, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]),
        "pixel_values": torch.randn(3, 3, size, size),
        "labels": torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, -100, -100], [1, -100, -100, -100, -100]]),
    }


# ----------------------------------------------------------------------------------------------------------- equations


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


class NumpyMagneto:
    """Section 3 for one image without padding, in float64, from the weights alone."""

    def __init__(self, model):
        self.w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
        self.config = model.config

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attention(self, name, queries, keys):
        q, k, v = (
            self.linear(f"{name}.{part}", x) for part, x in (("query", queries), ("key", keys), ("value", keys))
        )
        width = self.config.hidden_size // self.config.num_attention_heads
        heads = [slice(start, start + width) for start in range(0, self.config.hidden_size, width)]
        weights = [softmax(q[:, head] @ k[:, head].T / np.sqrt(width)) for head in heads]
        looked_at = np.concatenate([w @ v[:, head] for w, head in zip(weights, heads, strict=True)], -1)
        return self.linear(f"{name}.output", looked_at), np.stack(weights)

    def encoder(self, name, x, num_layers, self_attention=True):
        for layer in (f"{name}.layers.{index}" for index in range(num_layers)):
            if self_attention:
                x = self.norm(f"{layer}.attention_norm", x + self.attention(f"{layer}.attention", x, x)[0])
            hidden = np.maximum(self.linear(f"{layer}.intermediate", x), 0)
            x = self.norm(f"{layer}.output_norm", x + self.linear(f"{layer}.output", hidden))
        return np.maximum(x, 0)

    def __call__(self, input_ids, features):
        """Tags (L,) and the backbone's feature map (C, h, w) -> logits of each output, and what the tags looked at."""
        config, result = self.config, {}
        tags = self.w["magneto.tag_embedder.weight"][input_ids]
        if config.streams != "image":
            transformer = config.tag_encoder == "transformer"
            tag_states = self.encoder("magneto.tag_encoder", tags, config.num_tag_layers, transformer)
            result["tag_logits"] = self.linear("classifiers.tag", tag_states)[:, 0]
        if config.streams != "tag":
            extractor = "magneto.image_feature_extractor"
            regions = features.reshape(len(features), -1).T @ self.w[f"{extractor}.projection.weight"][..., 0, 0].T
            regions = regions + self.w[f"{extractor}.projection.bias"]
            mean, variance = self.w[f"{extractor}.norm.running_mean"], self.w[f"{extractor}.norm.running_var"]
            regions = (regions - mean) / np.sqrt(variance + 1e-5)
            regions = regions * self.w[f"{extractor}.norm.weight"] + self.w[f"{extractor}.norm.bias"]
            looked_at, result["attentions"] = self.attention("magneto.tag_to_image_attention", tags, regions)
            image_states = self.encoder("magneto.image_encoder", np.maximum(looked_at, 0), config.num_image_layers)
            result["image_logits"] = self.linear("classifiers.image", image_states)[:, 0]
        if config.streams != "both":
            return {**result, "logits": result[f"{config.streams}_logits"]}
        both = np.concatenate([tag_states, image_states], -1)  # table 1
        alpha = sigmoid(self.linear("gate.output", np.maximum(self.linear("gate.intermediate", both), 0))[:, 0])
        score = alpha * sigmoid(result["image_logits"]) + (1 - alpha) * sigmoid(result["tag_logits"])  # equation 1
        return {**result, "gate": alpha, "logits": np.log(score / (1 - score))}


def bce_dice(rows_of_logits, rows_of_labels):
    """Equations 2 to 4, over rows without padding."""
    rows = [(sigmoid(z), y) for z, y in zip(rows_of_logits, rows_of_labels, strict=True)]
    bce = np.concatenate([-y * np.log(p) - (1 - y) * np.log(1 - p) for p, y in rows]).mean()
    return bce + np.mean([1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1) for p, y in rows])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_and_losses_equal_the_papers_equations(tiny_config, architecture):
    model = build(tiny_config, image_size=96, auxiliary_loss_weight=0.5, **architecture)  # 3 x 3 regions
    batch = make_batch(size=96)
    paper = NumpyMagneto(model)
    features = torch.zeros(3, 1, 1, 1)

    with torch.no_grad():
        outputs = model(**batch, output_attentions=True)
        if model.config.streams != "tag":
            features = model.magneto.image_feature_extractor.backbone(batch["pixel_values"])
            assert features.shape[-2:] == (3, 3)

    lengths = batch["attention_mask"].sum(-1).tolist()
    expected = [
        paper(batch["input_ids"][index, :length].numpy(), features[index].double().numpy())
        for index, length in enumerate(lengths)
    ]
    for name in ("logits", "tag_logits", "image_logits", "gate", "attentions"):
        assert (outputs[name] is not None) == (name in expected[0]) if name in outputs else name not in expected[0]
        for index, length in enumerate(lengths):
            if name in expected[index]:
                found = outputs[name][index, :, :length] if name == "attentions" else outputs[name][index, :length]
                np.testing.assert_allclose(found, expected[index][name], rtol=1e-4, atol=2e-5, err_msg=name)

    labels = [row[:length].numpy() for row, length in zip(batch["labels"], lengths, strict=True)]
    losses = {name: bce_dice([row[name] for row in expected], labels) for name in expected[0] if "logits" in name}
    assert outputs.final_loss.item() == pytest.approx(losses["logits"], rel=1e-4)
    if model.config.streams == "both":  # equation 5
        total = losses["logits"] + 0.5 * (losses["tag_logits"] + losses["image_logits"])
        assert outputs.tag_loss.item() == pytest.approx(losses["tag_logits"], rel=1e-4)
        assert outputs.image_loss.item() == pytest.approx(losses["image_logits"], rel=1e-4)
        assert outputs.loss.item() == pytest.approx(total, rel=1e-4)
    else:
        assert outputs.loss.item() == pytest.approx(losses["logits"], rel=1e-4)
        assert outputs.tag_loss is None and outputs.image_loss is None and outputs.gate is None


def test_the_objective_bce_is_without_dice(tiny_config):
    model, batch = build(tiny_config, objective="bce"), make_batch()

    with torch.no_grad():
        outputs = model(**batch)

    real = batch["labels"] != -100
    score, truth = torch.sigmoid(outputs.logits[real]), batch["labels"][real].float()
    assert outputs.final_loss.item() == pytest.approx(
        nn.functional.binary_cross_entropy(score, truth).item(), rel=1e-4
    )


# ----------------------------------------------------------------------------------------- padding, order, composition


def real_scores(outputs, batch) -> dict[str, torch.Tensor]:
    mask = batch["attention_mask"].bool()
    return {
        name: torch.sigmoid(outputs[name])[mask]
        for name in ("logits", "tag_logits", "image_logits")
        if name in outputs
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_no_score(tiny_config, architecture):
    model, batch = build(tiny_config, **architecture), make_batch()
    longer = {**batch, "labels": None}
    # Nothing at a padded slot counts, not even a real tag's embedding.
    longer["input_ids"] = torch.cat([batch["input_ids"], torch.full((3, 4), 5)], -1)
    longer["attention_mask"] = torch.cat([batch["attention_mask"], torch.zeros(3, 4, dtype=torch.int64)], -1)

    with torch.no_grad():
        short, long = real_scores(model(**batch), batch), real_scores(model(**longer), longer)

    for name in short:
        torch.testing.assert_close(long[name], short[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_order_of_the_tags_changes_no_score(tiny_config, architecture):
    model, batch = build(tiny_config, **architecture), make_batch()
    order = torch.tensor([[4, 2, 0, 1, 3], [3, 1, 4, 2, 0], [4, 3, 2, 1, 0]])
    shuffled = {name: batch[name].gather(-1, order) for name in ("input_ids", "attention_mask", "labels")}

    with torch.no_grad():
        outputs = model(**batch)
        shuffled_outputs = model(**shuffled, pixel_values=batch["pixel_values"])

    mask = shuffled["attention_mask"].bool()
    for name in ("logits", "tag_logits", "image_logits"):
        if name in outputs:
            expected = torch.sigmoid(outputs[name]).gather(-1, order)[mask]
            torch.testing.assert_close(torch.sigmoid(shuffled_outputs[name])[mask], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(shuffled_outputs.loss, outputs.loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_rest_of_the_batch_changes_no_score(tiny_config, architecture):
    model, batch = build(tiny_config, **architecture), make_batch()

    with torch.no_grad():
        together = real_scores(model(**batch), batch)
        alone = []
        for index in range(3):
            length = int(batch["attention_mask"][index].sum())
            single = {"input_ids": batch["input_ids"][index : index + 1, :length]}
            single["pixel_values"] = batch["pixel_values"][index : index + 1]
            single["attention_mask"] = torch.ones_like(single["input_ids"])
            alone.append(real_scores(model(**single), single))

    for name in together:
        torch.testing.assert_close(torch.cat([row[name] for row in alone]), together[name], atol=1e-5, rtol=0)


def test_other_tags_and_other_photographs_do_change_scores(tiny_config):
    model, batch = build(tiny_config), make_batch()
    other_tags = {**batch, "input_ids": batch["input_ids"].flip(0)}
    other_images = {**batch, "pixel_values": batch["pixel_values"].flip(0)}

    with torch.no_grad():
        outputs, tags, images = model(**batch), model(**other_tags), model(**other_images)

    assert (outputs.tag_logits - tags.tag_logits).abs().max() > 1e-3
    assert (outputs.image_logits - tags.image_logits).abs().max() > 1e-3
    assert (outputs.image_logits - images.image_logits).abs().max() > 1e-3
    assert torch.equal(outputs.tag_logits, images.tag_logits)


def test_without_a_mask_everything_but_pad_is_a_tag(tiny_config):
    model, batch = build(tiny_config), make_batch()
    without = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}

    with torch.no_grad():
        assert torch.equal(model(**without).logits, model(**batch).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_image_without_tags_adds_no_loss_and_no_nan(tiny_config, architecture):
    model, batch = build(tiny_config, dropout=0.0, **architecture).eval(), make_batch()
    empty = {
        "input_ids": torch.zeros(1, 5, dtype=torch.int64),
        "attention_mask": torch.zeros(1, 5, dtype=torch.int64),
        "pixel_values": torch.randn(1, 3, 64, 64),
        "labels": torch.full((1, 5), -100),
    }
    gradients = []
    losses = []
    for inputs in (batch, {name: torch.cat([batch[name], empty[name]]) for name in batch}):
        model.zero_grad()
        outputs = model(**inputs)
        outputs.loss.backward()
        losses.append(outputs.loss.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert outputs.logits.isfinite().all()

    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_training_under_bf16_autocast_is_finite(tiny_config):
    model, batch = build(tiny_config, num_trainable_backbone_stages=-1).train(), make_batch()
    for name, parameter in model.named_parameters():  # streams and gate that are sure of themselves
        if name.startswith(("classifiers", "gate.output")):
            parameter.data *= 1e4

    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**batch)
    outputs.loss.backward()

    assert outputs.tag_logits.abs().max() > 1e3
    assert outputs.loss.dtype == torch.float32 and outputs.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ----------------------------------------------------------------------------------------------- what a user gets back


@pytest.mark.parametrize("streams", ["both", "image"])
def test_attentions_on_request_are_weights_and_change_no_score(tiny_config, streams):
    model, batch = build(tiny_config, streams=streams), make_batch()

    with torch.no_grad():
        outputs, without = model(**batch, output_attentions=True), model(**batch)

    assert outputs.attentions.shape == (3, 2, 5, 4)  # images, heads, tags, 2 x 2 regions
    torch.testing.assert_close(outputs.attentions.sum(-1), torch.ones(3, 2, 5))
    assert (outputs.attentions >= 0).all()
    assert without.attentions is None
    torch.testing.assert_close(outputs.logits, without.logits, rtol=0, atol=1e-6)


def test_a_tag_only_model_builds_no_backbone_and_needs_no_photograph(tiny_config):
    model, batch = build(tiny_config, streams="tag"), make_batch()

    with torch.no_grad():
        without = model(batch["input_ids"], batch["attention_mask"])
        ignored = model(**batch)

    assert not any("image" in name for name, _ in model.named_parameters())
    assert torch.equal(without.logits, ignored.logits)
    assert torch.equal(without.logits, without.tag_logits) and without.image_logits is None


@pytest.mark.parametrize("streams", ["both", "image"])
@pytest.mark.parametrize("model_class", [MagnetoForTagSummarization, MagnetoForOutlierDetection, MagnetoModel])
def test_a_missing_photograph_is_a_clear_error(tiny_config, streams, model_class):
    model = build(tiny_config, model_class, streams=streams)

    with pytest.raises(ValueError, match="pixel_values is missing"):
        model(torch.tensor([[2, 3]]))


def test_the_bare_model_returns_the_hidden_states_of_the_streams(tiny_config):
    model, batch = build(tiny_config, MagnetoModel), make_batch()

    with torch.no_grad():
        outputs = model(**batch)

    assert outputs.tag_hidden_state.shape == outputs.image_hidden_state.shape == (3, 5, 16)
    assert (outputs.tag_hidden_state >= 0).all() and (outputs.image_hidden_state >= 0).all()  # ReLU on both


@pytest.mark.parametrize("streams", ["both", "image", "tag"])
def test_outlier_detection_sums_the_losses_of_its_streams(tiny_config, streams):
    model, batch = build(tiny_config, MagnetoForOutlierDetection, streams=streams), make_batch()

    with torch.no_grad():
        outputs = model(**batch)

    losses = []
    for name in ("tag", "image"):
        logits, loss = outputs[f"{name}_logits"] if f"{name}_logits" in outputs else None, None
        assert (logits is None) == (streams not in ("both", name))
        if logits is not None:
            rows = [row[mask].double().numpy() for row, mask in zip(logits, batch["labels"] >= 0, strict=True)]
            loss = bce_dice(rows, [row[row >= 0].numpy() for row in batch["labels"]])
            assert outputs[f"{name}_loss"].item() == pytest.approx(loss, rel=1e-4)
            losses.append(loss)
    assert outputs.loss.item() == pytest.approx(sum(losses), rel=1e-4)
    assert outputs.logits is None and outputs.gate is None and not hasattr(model, "gate")


def test_dropout_acts_in_training_only(tiny_config):
    model, batch = build(tiny_config, dropout=0.5), make_batch()

    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**batch).logits)
        model.train()
        assert not torch.equal(model(**batch).tag_logits, model(**batch).tag_logits)


def test_both_streams_read_the_same_dropped_out_embeddings(tiny_config):
    model, seen = build(tiny_config, dropout=0.5).train(), {}
    for name in ("tag_encoder", "tag_to_image_attention"):
        part = getattr(model.magneto, name)
        part.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))

    model(**make_batch())

    dropped = seen["tag_encoder"] == 0
    assert 0.3 < dropped[0].float().mean() < 0.7
    assert torch.equal(seen["tag_to_image_attention"], seen["tag_encoder"])


def test_attention_weights_are_dropped_in_training(tiny_config):
    attention, regions = build(tiny_config, dropout=0.5).magneto.tag_to_image_attention, torch.randn(1, 4, 16)
    tags, slots = torch.randn(4, 16), MagnetoSlots(torch.ones(1, 4, dtype=torch.bool), packed=False)

    with torch.no_grad():
        assert torch.equal(attention(tags, slots, regions)[0], attention(tags, slots, regions)[0])
        attention.train()
        assert not torch.equal(attention(tags, slots, regions)[0], attention(tags, slots, regions)[0])


@pytest.mark.parametrize("probability", [0.1, 0.3, 0.5])
def test_dropout_keeps_its_share_and_the_expectation(tiny_config, probability):
    tiny_config.dropout = probability
    dropout = MagnetoDropout(tiny_config)
    ones = torch.ones(501, 999, requires_grad=True)  # no multiple of four

    dropped = dropout(ones)
    dropped.sum().backward()

    share = (dropped != 0).float().mean().item()
    assert abs(share - (1 - probability)) < 5 * (probability * (1 - probability) / ones.numel()) ** 0.5
    torch.testing.assert_close(
        dropped[dropped != 0].unique(), torch.tensor([1 / (1 - probability)]), rtol=1e-4, atol=0
    )
    assert torch.equal(ones.grad, dropped)
    assert not torch.equal(dropped, dropout(ones))
    neighbours = (dropped[:, :-1] * dropped[:, 1:] != 0).float().mean().item()
    assert abs(neighbours - (1 - probability) ** 2) < 0.005
    assert torch.equal(dropout.eval()(ones), ones)


def test_dropout_keeps_the_type_of_its_input(tiny_config):
    states = torch.randn(3, 5, dtype=torch.bfloat16)

    assert MagnetoDropout(tiny_config)(states).dtype == torch.bfloat16


@pytest.mark.parametrize("max_tags_in_one_row", [0, 128])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_leaves_the_padding_out_and_computes_the_same(
    tiny_config, architecture, max_tags_in_one_row, monkeypatch
):
    monkeypatch.setattr(modeling, "MAX_TAGS_IN_ONE_ROW", max_tags_in_one_row)
    model, batch = build(tiny_config, dropout=0.0, **architecture), make_batch()
    widths = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.in_features == tiny_config.intermediate_size:
            module.register_forward_hook(lambda _module, inputs, _output: widths.append(inputs[0].shape[0]))
    real = batch["attention_mask"].bool()
    assert not real.all()
    for norm in model.modules():  # of the regions; its statistics are the batch's in training
        if isinstance(norm, nn.BatchNorm2d):
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None

    def gradients(loss):
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        found = torch.autograd.grad(loss, parameters.values(), materialize_grads=True)
        return dict(zip(parameters, found, strict=True))

    padded = model(**batch)
    assert set(widths) == {real.numel()}
    widths.clear()
    packed = model.train()(**batch)

    assert set(widths) == {int(real.sum())}
    torch.testing.assert_close(packed.loss, padded.loss)
    for name in ("logits", "tag_logits", "image_logits", "gate"):
        if padded.get(name) is not None:
            torch.testing.assert_close(packed[name][real], padded[name][real])
            assert packed[name].shape == real.shape
    torch.testing.assert_close(gradients(packed.loss), gradients(padded.loss), atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("stages", [0, 1, -1])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_trainable_parameter_moves_and_nothing_frozen_does(tiny_config, architecture, stages):
    model, batch = build(tiny_config, num_trainable_backbone_stages=stages, **architecture).train(), make_batch()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    for _ in range(3):  # dropout hides some of the weights from a single step
        optimizer.zero_grad()
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        optimizer.step()

    after = model.state_dict()
    unmoved = [name for name, _ in model.named_parameters() if torch.equal(before[name], after[name])]
    # Softmax and batch norm cancel these two constants: their gradient is nothing but rounding.
    unmoved = [name for name in unmoved if not name.endswith(("key.bias", "extractor.projection.bias"))]
    assert unmoved == [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert all("backbone" in name for name in unmoved)
    assert bool(unmoved) == (stages != -1 and model.config.streams != "tag")


def backbone_statistics(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if "backbone" in name}


def test_a_frozen_backbone_keeps_eval_mode_and_its_statistics(tiny_config):
    model, batch = build(tiny_config), make_batch()
    before = backbone_statistics(model)

    model.train()
    model(**batch)

    backbone = model.magneto.image_feature_extractor.backbone
    assert not any(module.training for module in backbone.modules())
    assert model.magneto.image_feature_extractor.norm.training and model.magneto.dropout.training
    after = backbone_statistics(model)
    assert before and all(torch.equal(value, after[name]) for name, value in before.items())


def test_training_mode_freezes_again_what_somebody_has_unfrozen(tiny_config):
    model = build(tiny_config).train()
    backbone = model.magneto.image_feature_extractor.backbone

    model.requires_grad_(True)
    model.train()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    backbone.train()
    model.train()
    assert not any(module.training for module in backbone.modules())
    assert model.training and model.magneto.image_feature_extractor.norm.training


def test_norms_can_be_frozen_in_trained_stages(tiny_config):
    model, batch = build(tiny_config, num_trainable_backbone_stages=-1, freeze_backbone_norm=True), make_batch()
    before = backbone_statistics(model)

    model.train()
    model(**batch).loss.backward()

    after = backbone_statistics(model)
    assert before and all(torch.equal(value, after[name]) for name, value in before.items())
    backbone = model.magneto.image_feature_extractor.backbone
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    assert model.magneto.image_feature_extractor.norm.training


@pytest.mark.parametrize(
    "stages, trained",
    [(0, set()), (1, {"layer4"}), (2, {"layer3", "layer4"}), (5, None), (-1, None)],
)
def test_stages_are_unfrozen_from_the_top(tiny_config, stages, trained):
    model, batch = build(tiny_config, num_trainable_backbone_stages=stages), make_batch()
    before = backbone_statistics(model)

    model.train()
    model(**batch)

    backbone = model.magneto.image_feature_extractor.backbone
    parts = {name.split(".")[0] for name, _ in backbone.named_parameters()}
    trained = parts if trained is None else trained
    assert {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad} == trained
    norms = {name: m for name, m in backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {name.split(".")[0] for name, module in norms.items() if module.training} <= trained
    after = backbone_statistics(model)
    for name, value in before.items():
        moved = not torch.equal(value, after[name])
        assert moved == (name.split("backbone.")[1].split(".")[0] in trained), name


def test_more_stages_than_the_backbone_has_are_an_error(tiny_config):
    with pytest.raises(ValueError, match="num_trainable_backbone_stages is 6, expected at most the 5 stages"):
        build(tiny_config, num_trainable_backbone_stages=6)


def test_padding_has_no_embedding_to_learn(tiny_config):
    model, batch = build(tiny_config), make_batch()

    model(**batch).loss.backward()

    assert model.magneto.tag_embedder.weight.grad[0].abs().sum() == 0
    assert (model.magneto.tag_embedder.weight.grad[1:].abs().sum(-1) > 0).all()


# ----------------------------------------------------------------------------------------------------------- backbones


@pytest.mark.parametrize(
    "backbone, size, regions, kwargs",
    [
        ("resnet18", 112, 16, None),
        ("mobilenetv2_100", 64, 4, {"pad_type": "same"}),
        ("convnext_atto", 64, 4, None),
        ("test_vit3", None, None, None),
        ("swin_tiny_patch4_window7_224", 224, 49, {"depths": (1, 1, 1, 1)}),  # channels last; cut short, for speed
    ],
)
def test_backbones_of_other_families_give_regions(tiny_config, backbone, size, regions, kwargs):
    if size is None:
        with pytest.raises(ValueError, match="test_vit3 returns .* expected a feature map"):
            build(tiny_config, backbone=backbone, image_size=160)
        with pytest.raises(ValueError, match="test_vit3 cannot be used at 32 px"):
            build(tiny_config, backbone=backbone, image_size=32)
        return
    model = build(tiny_config, MagnetoModel, backbone=backbone, image_size=size, backbone_kwargs=kwargs)

    with torch.no_grad():
        found = model.image_feature_extractor(torch.randn(1, 3, size, size))

    assert found.shape == (1, regions, 16)


@pytest.mark.parametrize("backbone", ["test_resnet.r160_in1k", "swin_tiny_patch4_window7_224"])
def test_regions_come_row_by_row(tiny_config, backbone):
    swin = backbone.startswith("swin")
    changes = {"image_size": 224, "backbone_kwargs": {"depths": (1, 1, 1, 1)}} if swin else {"image_size": 128}
    model = build(tiny_config, MagnetoModel, backbone=backbone, **changes)
    extractor = model.image_feature_extractor
    photograph = torch.randn(1, 3, model.config.image_size, model.config.image_size)

    with torch.no_grad():
        features = extractor.backbone.forward_features(photograph)
        features = features.movedim(-1, 1) if swin else features  # (1, C, h, w)
        regions = extractor(photograph)
        corner = extractor.norm(extractor.projection(features[:, :, :1, -1:])).flatten()

    torch.testing.assert_close(regions[0, features.shape[-1] - 1], corner, atol=1e-4, rtol=1e-4)


def test_a_photograph_of_another_size_gives_more_regions(tiny_config, processor):
    model = build(tiny_config)
    inputs = processor(Image.new("RGB", (96, 96)), ["red"], do_resize=False, do_center_crop=False)

    with torch.no_grad():
        assert model(**inputs, output_attentions=True).attentions.shape == (1, 2, 1, 9)


# --------------------------------------------------------------------------------------------------------- calibration

CALIBRATION = {
    "logits": {"temperature": 2.0, "bias": 0.5, "tag_biases": {"3": -1.0, "1": 0.25}},
    "tag_logits": {"temperature": 0.5, "bias": -1.0},
}


@pytest.mark.parametrize("streams", ["both", "image", "tag"])
def test_calibration_changes_scores_as_configured_and_no_loss(tiny_config, streams):
    model, batch = build(tiny_config, streams=streams), make_batch()
    with torch.no_grad():
        raw = model(**batch)
        model.set_calibration(CALIBRATION)
        calibrated = model(**batch)
        model.set_calibration(None)
        again = model(**batch)

    biases = torch.tensor([0.5, 0.75, 0.5, -0.5, 0.5, 0.5])[batch["input_ids"]]
    torch.testing.assert_close(calibrated.logits, raw.logits / 2 + biases)
    if streams != "image":
        torch.testing.assert_close(calibrated.tag_logits, raw.tag_logits * 2 - 1)
    assert raw.keys() == calibrated.keys() == again.keys()
    for name in raw.keys() - {"logits", "tag_logits"}:
        assert torch.equal(calibrated[name], raw[name]), name
    assert all(torch.equal(again[name], raw[name]) for name in raw)


def test_a_calibrated_model_is_built_from_its_configuration_alone(tiny_config):
    model = build(tiny_config, calibration=CALIBRATION)
    other = build(tiny_config)
    other.load_state_dict(model.state_dict())
    other.set_calibration(CALIBRATION)

    batch = make_batch()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, other(**batch).logits)


@pytest.mark.parametrize("vocab_size", [4, 9])
def test_another_number_of_embeddings_leaves_a_calibrated_model_usable(tiny_config, tmp_path, vocab_size):
    model = build(tiny_config, calibration=CALIBRATION)

    model.resize_token_embeddings(vocab_size)
    model.save_pretrained(tmp_path)
    loaded = MagnetoForTagSummarization.from_pretrained(tmp_path)

    batch = make_batch()
    batch["input_ids"] = batch["input_ids"].clamp(max=vocab_size - 1)
    for name, calibration in loaded.calibration.items():
        kept = {index: bias for index, bias in model.calibration[name].tag_biases.items() if int(index) < vocab_size}
        assert calibration.tag_biases == kept
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_a_tuple_is_returned_and_attentions_are_as_the_configuration_says(tiny_config):
    model, batch = build(tiny_config, output_attentions=True, attn_implementation="eager"), make_batch()

    outputs = model(**batch)
    loss, logits, *_ = model(**batch, return_dict=False)

    assert outputs.attentions.shape[:3] == (3, tiny_config.num_attention_heads, 5)
    assert torch.equal(loss, outputs.loss) and torch.equal(logits, outputs.logits)


def test_one_photograph_is_not_shared_by_several_lists_of_tags(tiny_config):
    batch = make_batch()

    with pytest.raises(ValueError, match="found 1 photographs for 3 lists of tags"):
        build(tiny_config)(batch["input_ids"], pixel_values=batch["pixel_values"][:1])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["attention_mask", "labels"])
def test_no_mask_or_label_is_another_images(tiny_config, name, training):
    model, batch = build(tiny_config).train(training), make_batch()

    for wrong in (batch[name][:1], batch[name][:, :1], batch[name][0]):
        with pytest.raises(ValueError, match=rf"{name} is \(.*\), expected the shape of input_ids, \(3, 5\)"):
            model(**{**batch, name: wrong})


def test_eager_attention_is_written_out(tiny_config, monkeypatch):
    model, batch = build(tiny_config), make_batch()
    expected = model(**batch).logits
    eager = build(tiny_config, attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)

    torch.testing.assert_close(eager(**batch).logits, expected)


def test_calibration_of_another_vocabulary_is_refused(tiny_config, tmp_path):
    calibration = {"logits": {"temperature": 1.0, "bias": 0.0, "tag_biases": {"5": 0.7}}}
    build(tiny_config, calibration=calibration).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="has a bias of tag '5', expected an index below vocab_size"):
        MagnetoForTagSummarization.from_pretrained(tmp_path, vocab_size=3, ignore_mismatched_sizes=True)


def test_a_wrong_calibration_is_refused_and_the_old_one_stays(tiny_config):
    model = build(tiny_config, calibration=CALIBRATION)

    with pytest.raises(StrictDataclassError, match="calibration"):
        model.set_calibration({"logits": {"temperature": -1.0, "bias": 0.0}})

    assert model.config.calibration == CALIBRATION


def test_a_calibrated_model_is_exported_and_compiled(tiny_config):
    model, batch = build(tiny_config, streams="tag", calibration=CALIBRATION), make_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    exported = torch.export.export(model, (), inputs).module()
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(exported(**inputs)["logits"], expected)
        torch.testing.assert_close(compiled(**inputs).logits, expected)
