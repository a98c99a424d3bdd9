import functools
import importlib.util
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import TINY_BACKBONE, draw

from magneto_training import export
from magneto_training.arguments import UserError
from magneto_training.evaluation import output_names
from magneto_training.export import export_onnx
from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization

CALIBRATION = {"temperature": 1.4, "bias": 0.1, "tag_biases": {"2": -0.3, "5": 0.7}}
ALL_OUTPUTS = {name: CALIBRATION for name in ("logits", "tag_logits", "image_logits")}
KINDS = [("both", ALL_OUTPUTS), ("image", {"logits": CALIBRATION}), ("tag", None)]
COLORS = ["blue", "green", "red", "yellow"]


def make_model(streams="both", calibration=None, **kwargs) -> MagnetoForTagSummarization:
    sizes = {"vocab_size": 6, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}
    config = MagnetoConfig(streams=streams, calibration=calibration, backbone=TINY_BACKBONE, **sizes, **kwargs)
    return MagnetoForTagSummarization(config).eval()


def make_inputs(processor, streams, tags):
    inputs = processor([draw(COLORS, COLORS[: len(row)]) for row in tags], tags)
    return {name: tensor for name, tensor in inputs.items() if streams != "tag" or name != "pixel_values"}


@pytest.fixture(scope="module", params=KINDS, ids=["both", "image", "tag"])
def exported(request, tmp_path_factory):
    """A model and its ONNX file."""
    torch.manual_seed(0)
    model = make_model(*request.param)
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    difference = export_onnx(model, file)
    assert 0 < difference < 1e-4
    return model, file


@pytest.mark.parametrize(
    "tags",
    [
        [["red"]],
        [["green", "blue", "yellow", "red", "of nobody's vocabulary"]],
        [["red", "blue"], ["yellow"], ["green", "red", "blue", "yellow"], ["blue"], ["never heard of", "red"]],
    ],
    ids=["one tag", "one image", "five images"],
)
def test_onnx_runtime_gives_what_pytorch_gives(exported, processor, tags):
    model, file = exported
    inputs = make_inputs(processor, model.config.streams, tags)
    with torch.no_grad():
        expected = model(**inputs)

    session = onnxruntime.InferenceSession(file)
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})

    names = [output.name for output in session.get_outputs()]
    assert names == output_names(model.config)
    for name, array in zip(names, found, strict=True):
        assert array.dtype == np.float32 and array.shape == inputs["input_ids"].shape
        np.testing.assert_allclose(array, expected[name].numpy(), atol=1e-4, rtol=0)


def test_the_file_is_alone_and_names_its_free_axes(exported):
    model, file = exported

    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    shapes = {item.name: item.shape for item in onnxruntime.InferenceSession(file).get_inputs()}
    expected = {"input_ids": ["batch", "tags"], "attention_mask": ["batch", "tags"]}
    if model.config.streams != "tag":
        expected["pixel_values"] = ["batch", 3, 32, 32]
    assert shapes == expected


def test_a_model_that_is_not_the_same_in_onnx_runtime_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1)

    with pytest.raises(UserError, match="differ from PyTorch's by .*, expected at most"):
        export_onnx(make_model("tag"), tmp_path / "model.onnx")

    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))

    with pytest.raises(UserError, match=r"^ONNX needs the package onnxruntime, .*\[export\]"):
        export_onnx(make_model("tag"), tmp_path / "model.onnx")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("beside", [True, False], ids=["weights beside the model", "weights in it"])
def test_weights_of_an_earlier_export_do_not_stay(tmp_path, monkeypatch, beside):
    file, weights = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    file.write_text("earlier model")
    weights.write_text("earlier weights")
    if beside:
        save = torch.onnx.ONNXProgram.save
        monkeypatch.setattr(torch.onnx.ONNXProgram, "save", functools.partialmethod(save, external_data=True))

    export_onnx(make_model("tag"), file)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"][: 1 + beside]
    assert onnxruntime.InferenceSession(file).get_outputs()


def run(monkeypatch, *arguments) -> int:
    """The command's exit status."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    try:
        export.main()
    except SystemExit as ended:
        return ended.code
    return 0


def test_the_command_exports_a_trained_folder(processor, tmp_path, monkeypatch, capsys):
    make_model("tag").half().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")

    assert run(monkeypatch, tmp_path / "model", "--format", "onnx") == 0
    assert run(monkeypatch, tmp_path / "model", "--output_file", tmp_path / "new" / "other.onnx") == 0

    printed = capsys.readouterr().out
    for file in (tmp_path / "model" / "model.onnx", tmp_path / "new" / "other.onnx"):
        assert str(file) in printed
        assert [item.type for item in onnxruntime.InferenceSession(file).get_outputs()] == ["tensor(float)"] * 2


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["missing"], 2, "'missing' is no folder"),
        ([], 2, "DIR"),
        (["missing", "--format", "coreml"], 2, "coreml"),
        (["."], 1, "cannot be loaded"),
    ],
)
def test_bad_input_ends_the_command_with_one_line(tmp_path, monkeypatch, capsys, arguments, status, expected):
    monkeypatch.chdir(tmp_path)

    assert run(monkeypatch, *arguments) == status

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("export: error:") and expected in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("streams", "calibration"), KINDS)
def test_torch_export_takes_the_model_at_any_number_of_images_and_tags(processor, streams, calibration):
    model = make_model(streams, calibration)
    inputs = make_inputs(processor, streams, [["red", "blue", "green"], ["yellow", "green"]])
    images, tags = torch.export.Dim("images"), torch.export.Dim("tags")
    shapes = {name: {0: images} if name == "pixel_values" else {0: images, 1: tags} for name in inputs}

    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()

    others = make_inputs(processor, streams, [["red"], ["blue", "green", "yellow", "red"], ["green"]])
    with torch.no_grad():
        found, expected = program(**others), model(**others)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


@pytest.mark.parametrize(
    ("streams", "calibration", "training"), [*((*kind, False) for kind in KINDS), ("both", ALL_OUTPUTS, True)]
)
def test_torch_compile_needs_no_graph_break(processor, streams, calibration, training):
    torch.compiler.reset()
    model = make_model(streams, calibration, dropout=0.0).train(training)
    rows = [["red", "blue", "green"], ["yellow", "green"]]
    inputs = make_inputs(processor, streams, rows)
    if training:
        inputs["labels"] = processor([draw(COLORS, COLORS[:1])] * 2, rows, [["red"], ["green"]])["labels"]

    # The graph breaks where Dynamo gives up; what is made of the graph afterwards is PyTorch's affair.
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)

    found, expected = compiled(**inputs), model(**inputs)
    assert len(graphs) == 1
    assert found.keys() == expected.keys()
    real = inputs["attention_mask"].bool()  # what stands in the padding means nothing, and training leaves it out
    for name in expected:
        at = real if expected[name].shape == real.shape else ...
        torch.testing.assert_close(found[name][at], expected[name][at], atol=1e-6, rtol=1e-5)
