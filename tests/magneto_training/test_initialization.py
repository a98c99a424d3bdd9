import gzip

import pytest
import torch
from conftest import TINY_BACKBONE
from safetensors.torch import load_file, save_file

from magneto_training.arguments import ModelArguments, UserError
from magneto_training.initialization import (
    copy_weights,
    init_tag_vectors,
    initialize_model,
    load_source,
    start_model,
)
from modeling_magneto import (
    MagnetoConfig,
    MagnetoForOutlierDetection,
    MagnetoForTagSummarization,
    MagnetoModel,
    MagnetoProcessor,
)


@pytest.fixture
def pretrained(tiny_config, processor):
    """A pre-trained model of the four colours, every weight and statistic of it changed."""
    model = MagnetoForOutlierDetection(tiny_config)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(1.0)
    return model, processor


def new_model(tiny_config, tags, **changes):
    processor = MagnetoProcessor.from_vocabulary(tags, image_size=32)
    config = MagnetoConfig(**{**tiny_config.to_dict(), "vocab_size": len(processor.tokenizer), **changes})
    return MagnetoForTagSummarization(config), processor


def test_an_unknown_tag_starts_without_a_meaning_of_its_own():
    arguments = ModelArguments(backbone=TINY_BACKBONE, image_size=32, backbone_weights="none")

    model, processor = start_model(MagnetoForTagSummarization, ["blue", "red"], arguments, seed=0)

    embeddings = model.get_input_embeddings().weight
    assert (embeddings.abs().sum(-1) > 0).tolist() == [False, False, True, True]
    assert processor.tokenizer.unk_token_id == 1


def test_everything_but_heads_and_gate_is_copied(tiny_config, pretrained):
    model, processor = new_model(tiny_config, ["blue", "green", "red", "yellow"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    message = copy_weights(*pretrained, model, processor)

    source = pretrained[0].state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source[name] if name.startswith("magneto.") else before[name]), name
    assert "4 of 4 tags" in message and message.endswith("started afresh: classifiers, gate")


def test_embeddings_follow_their_tags_into_another_vocabulary(tiny_config, pretrained):
    model, processor = new_model(tiny_config, ["amber", "red", "blue"])
    fresh = model.magneto.tag_embedder.weight.clone()

    message = copy_weights(*pretrained, model, processor)

    source, copied = pretrained[0].magneto.tag_embedder.weight, model.magneto.tag_embedder.weight
    for tag, index in processor.tokenizer.get_vocab().items():
        known = pretrained[1].tokenizer.get_vocab().get(tag)
        assert torch.equal(copied[index], fresh[index] if known is None else source[known]), tag
    assert "2 of 3 tags" in message


def test_copying_freezes_nothing_and_thaws_nothing(tiny_config, pretrained):
    model, processor = new_model(tiny_config, ["red"], num_trainable_backbone_stages=1)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    copy_weights(*pretrained, model, processor)

    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable


def test_a_source_without_a_stream_leaves_that_stream_fresh_and_says_so(tiny_config, processor):
    tag_only = MagnetoForOutlierDetection(MagnetoConfig(**{**tiny_config.to_dict(), "streams": "tag"}))
    model, new_processor = new_model(tiny_config, ["blue", "green", "red", "yellow"])

    message = copy_weights(tag_only, processor, model, new_processor)

    assert "copied tag_encoder and" in message
    assert "image_encoder, image_feature_extractor, tag_to_image_attention, classifiers, gate" in message


def test_another_width_is_refused_by_name(tiny_config, pretrained):
    model, processor = new_model(tiny_config, ["red"], hidden_size=32)
    with pytest.raises(UserError, match=r"init_from: the weight .* is \(.*16.*\), expected \(.*32"):
        copy_weights(*pretrained, model, processor)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"backbone": "test_resnet"}, "backbone is 'test_resnet.r160_in1k', expected 'test_resnet' as in this run"),
        ({"num_tag_layers": 3}, "the weight tag_encoder.layers.2..* is missing, expected one"),
        ({"num_image_layers": 2}, "the weight image_encoder.layers.1..* is missing, expected one"),
        ({"num_tag_layers": 1}, "the weight tag_encoder.layers.1..* is there, expected none as in this run"),
        ({"tag_encoder": "feed_forward"}, "the weight tag_encoder.layers.0.attention.* is there, expected none"),
    ],
    ids=str,
)
def test_nothing_of_a_part_is_left_random_or_left_out(tiny_config, pretrained, changes, found):
    model, processor = new_model(tiny_config, ["red"], **changes)
    with pytest.raises(UserError, match=f"^init_from: {found}"):
        copy_weights(*pretrained, model, processor)


def test_a_saved_folder_is_copied_and_needs_no_backbone_weights(tiny_config, pretrained, tmp_path, capsys):
    for part in pretrained:
        part.save_pretrained(tmp_path)
    model, processor = new_model(tiny_config, ["blue", "green", "red", "yellow"])

    # The default backbone_weights, "pretrained", would have to be downloaded.
    initialize_model(model, processor, ModelArguments(init_from=str(tmp_path)), seed=0)

    copied = model.magneto.state_dict()
    for name, tensor in pretrained[0].magneto.state_dict().items():
        assert torch.equal(copied[name], tensor), name
    assert f"{tmp_path}: copied" in capsys.readouterr().out


def test_a_calibrated_source_gives_an_uncalibrated_model(tiny_config, processor, tmp_path):
    model, new_processor = new_model(tiny_config, ["blue", "green", "red", "yellow"])
    source = MagnetoForTagSummarization(tiny_config)
    source.set_calibration({"logits": {"temperature": 2.0, "bias": 1.0}})
    processor.selection = {"rule": "expected_f1"}
    for part in (source, processor):
        part.save_pretrained(tmp_path)

    initialize_model(model, new_processor, ModelArguments(init_from=str(tmp_path)), seed=0)

    assert torch.equal(model.magneto.tag_embedder.weight, source.magneto.tag_embedder.weight)
    assert model.config.calibration is None and model.calibration is None
    assert new_processor.selection == {"rule": "threshold", "threshold": 0.5}


def test_a_missing_folder_is_named(tiny_config, tmp_path):
    model, processor = new_model(tiny_config, ["red"])
    with pytest.raises(UserError, match="nowhere"):
        initialize_model(model, processor, ModelArguments(init_from=str(tmp_path / "nowhere")), seed=0)


@pytest.mark.parametrize("streams", ["both", "image", "tag"])
@pytest.mark.parametrize("model_class", [MagnetoForTagSummarization, MagnetoForOutlierDetection, MagnetoModel])
@pytest.mark.parametrize("is_calibrated", [False, True], ids=["raw", "calibrated"])
def test_a_saved_model_of_any_kind_is_complete(tiny_config, processor, tmp_path, model_class, streams, is_calibrated):
    calibration = {"logits": {"temperature": 2.0, "bias": 1.0, "tag_biases": {"3": 0.5}}} if is_calibrated else None
    changes = {"streams": streams, "calibration": calibration}
    saved = model_class(MagnetoConfig(**{**tiny_config.to_dict(), **changes}))
    for part in (saved, processor):
        part.save_pretrained(tmp_path)

    model, _ = load_source(str(tmp_path))

    assert type(model) is model_class
    found = model.state_dict()
    assert all(torch.equal(found.pop(name), tensor) for name, tensor in saved.state_dict().items()) and not found


def damage(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda weights: [weights.pop(name) for name in list(weights) if name.startswith("classifiers.")],
            "lacks tensors: 4, the first is classifiers.image.bias; expected",
        ),
        (
            lambda weights: weights.pop("magneto.image_feature_extractor.backbone.layer1.0.bn1.running_mean"),
            "lacks tensors: 1, the first is magneto.image_feature_extractor.backbone.layer1.0.bn1.running_mean;",
        ),
        (
            lambda weights: weights.update({"magneto.tag_embedder.weight": torch.zeros(3, 3)}),
            "has tensors of another shape: 1, the first is magneto.tag_embedder.weight;",
        ),
    ],
    ids=["no classifiers", "no statistic", "another shape"],
)
def test_a_folder_without_all_weights_is_refused(tiny_model, processor, tmp_path, change, expected):
    for part in (tiny_model, processor):
        part.save_pretrained(tmp_path)
    damage(tmp_path, change)

    with pytest.raises(UserError, match=f"{tmp_path.name}' {expected}") as caught:
        load_source(str(tmp_path))

    assert "\n" not in str(caught.value)


def test_a_weight_too_many_does_no_harm(tiny_model, processor, tmp_path):
    for part in (tiny_model, processor):
        part.save_pretrained(tmp_path)
    damage(tmp_path, lambda weights: weights.update(strange=torch.zeros(1)))

    assert load_source(str(tmp_path))[0].state_dict().keys() == tiny_model.state_dict().keys()


# --------------------------------------------------------------------------------------------------------- tag vectors


def write_vectors(path, words, header=False):
    width = len(next(iter(words.values())))
    lines = [f"{len(words)} {width}"] if header else []
    lines += [" ".join([word, *map(str, numbers)]) for word, numbers in words.items()]
    text = "\n".join(lines) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def vector(seed, width=16):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", ["glove.txt", "glove.txt.gz"])
@pytest.mark.parametrize("header", [False, True], ids=["glove", "word2vec"])
def test_vectors_of_the_same_width_are_taken_up_to_one_scale(tiny_config, tmp_path, name, header):
    model, processor = new_model(tiny_config, ["red", "sea", "unheard of"])
    fresh = model.magneto.tag_embedder.weight.clone()
    words = {"the": vector(0), "Red": vector(1), "sea": vector(2)}

    message = init_tag_vectors(model, processor, write_vectors(tmp_path / name, words, header), seed=0)

    indices = processor.tokenizer.get_vocab()
    found = model.magneto.tag_embedder.weight[[indices["red"], indices["sea"]]]
    expected = torch.tensor([words["Red"], words["sea"]])
    torch.testing.assert_close(found, expected / expected.std())
    assert torch.equal(model.magneto.tag_embedder.weight[indices["unheard of"]], fresh[indices["unheard of"]])
    assert "2 of 3 tags (66.7%)" in message


def test_a_tag_of_several_words_is_the_mean_of_those_the_file_knows(tiny_config, tmp_path):
    model, processor = new_model(tiny_config, ["big red dog", "new york", "dog"])
    words = {"big": vector(0), "dog": vector(1), "new_york": vector(2), "new": vector(3), "york": vector(4)}

    init_tag_vectors(model, processor, write_vectors(tmp_path / "vectors.txt", words), seed=0)

    indices, weight = processor.tokenizer.get_vocab(), model.magneto.tag_embedder.weight.detach()
    scale = torch.tensor(words["dog"]) / weight[indices["dog"]]
    mean = (torch.tensor(words["big"]) + torch.tensor(words["dog"])) / 2
    torch.testing.assert_close(weight[indices["big red dog"]] * scale, mean)
    torch.testing.assert_close(weight[indices["new york"]] * scale, torch.tensor(words["new_york"]))


def test_a_word_may_have_blanks_in_it(tiny_config, tmp_path):
    model, processor = new_model(tiny_config, ["red", "new york"])
    words = {"red": vector(0), ". . .": vector(1), "at name@domain.com": vector(2), "new york": vector(3)}

    init_tag_vectors(model, processor, write_vectors(tmp_path / "vectors.txt", words), seed=0)

    indices, weight = processor.tokenizer.get_vocab(), model.magneto.tag_embedder.weight.detach()
    expected = torch.tensor([words["red"], words["new york"]])
    torch.testing.assert_close(weight[[indices["red"], indices["new york"]]], expected / expected.std())


@pytest.mark.parametrize("width", [5, 50])
def test_vectors_of_another_width_are_projected_repeatably(tiny_config, tmp_path, width):
    tags = [f"tag{index}" for index in range(30)]
    file = write_vectors(tmp_path / "vectors.txt", {tag: vector(index, width) for index, tag in enumerate(tags)})
    embeddings = []
    for seed in (0, 0, 1):
        model, processor = new_model(tiny_config, tags)
        init_tag_vectors(model, processor, file, seed)
        embeddings.append(model.magneto.tag_embedder.weight[2:].detach())

    assert torch.equal(embeddings[0], embeddings[1]) and not torch.equal(embeddings[0], embeddings[2])
    assert embeddings[0].std().item() == pytest.approx(1, abs=1e-5)
    if width < 16:  # an orthogonal projection into more dimensions keeps every angle
        original = torch.tensor([vector(index, width) for index in range(30)])
        cosines = torch.nn.functional.cosine_similarity
        torch.testing.assert_close(
            cosines(embeddings[0][:1], embeddings[0]), cosines(original[:1], original), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("red 1 2 3\nsea 1 2\n", "line 2: 2 numbers after the word, expected 3"),
        ("sea 1 2 3\n\n", "line 2: 0 numbers after the word, expected 3"),
        ("red 1 two 3\n", "line 1: .*two"),
        ("sea 1 2 3\nred 1 two 3\n", "line 2: .*two"),
        ("green 1 2 3\n", "knows none of the 2 tags"),
    ],
)
def test_a_wrong_file_is_an_error_with_its_line(tiny_config, tmp_path, content, expected):
    model, processor = new_model(tiny_config, ["red", "sea"])
    (tmp_path / "vectors.txt").write_text(content)
    with pytest.raises(UserError, match=expected):
        init_tag_vectors(model, processor, str(tmp_path / "vectors.txt"), seed=0)


def test_a_missing_or_damaged_file_is_named(tiny_config, tmp_path):
    model, processor = new_model(tiny_config, ["red"])
    (tmp_path / "vectors.txt.gz").write_bytes(b"no gzip")
    for name in ("missing.txt", "vectors.txt.gz"):
        with pytest.raises(UserError, match=f"{name}.*cannot be read"):
            init_tag_vectors(model, processor, str(tmp_path / name), seed=0)
