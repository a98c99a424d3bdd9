"""A backbone in 8-bit integers: near the exact one, the same for every process, refused where it cannot be."""

import pickle

import datasets
import numpy as np
import onnx.parser
import pytest
import torch
from conftest import damage, make_rows
from torch import nn

from magneto_training import quantized_backbone
from magneto_training.arguments import MagnetoTrainingArguments, UsageError, UserError
from magneto_training.frozen_backbone import FrozenBackbone
from magneto_training.quantized_backbone import QuantizedBackbone, backbone_for_workers, check_int8
from magneto_training.tag_data import DataError
from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photographs():
    return [torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(number)) for number in range(3)]


@pytest.fixture
def rows() -> datasets.Dataset:
    return datasets.Dataset.from_list(make_rows(5)).cast_column("image", datasets.Image())


@pytest.fixture
def ranges(monkeypatch) -> list[torch.Tensor]:
    """The batches that set the ranges; nothing is quantized."""
    seen = []
    monkeypatch.setattr(quantized_backbone, "_quantize", lambda _, batches: seen.extend(batches) or b"")
    return seen


def test_it_computes_nearly_what_the_backbone_does(tiny_model, photographs):
    exact = FrozenBackbone(tiny_model, CPU)
    expected = exact(photographs[0])

    found = QuantizedBackbone(exact, photographs)(photographs[0])

    assert found.shape == expected.shape and found.dtype == torch.float32
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()


def test_a_batch_of_any_size_has_the_features_of_each_photograph(tiny_model, photographs, monkeypatch):
    backbone = QuantizedBackbone(FrozenBackbone(tiny_model, CPU), photographs)
    each = torch.cat([backbone(photograph[None]) for photograph in photographs[0]])
    monkeypatch.setattr(quantized_backbone, "IMAGES_AT_A_TIME", 3)

    torch.testing.assert_close(backbone(photographs[0]), each)


@pytest.mark.parametrize(("saturates", "largest"), [(True, 64), (False, 127)])
def test_weights_have_7_bits_only_where_the_sums_of_8_would_overflow(
    tiny_model, photographs, monkeypatch, saturates, largest
):
    monkeypatch.setattr(quantized_backbone, "_saturates", lambda: saturates)
    model = onnx.load_from_string(QuantizedBackbone(FrozenBackbone(tiny_model, CPU), photographs).model)

    weights = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    assert max(abs(tensor.astype(int)).max() for tensor in weights if tensor.dtype == np.int8) == largest


def test_sums_of_7_bit_weights_are_right_on_every_processor():
    # 255 * 64 twice is 32640: processors without VNNI would stop at 32767.
    product = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 13]>
        product (uint8[1, 2] a) => (int32[1, 1] c) <int8[2, 1] b = {64, 64}> { c = MatMulInteger(a, b) }"""
    )
    session = quantized_backbone._open(product.SerializeToString())

    assert session.run(None, {"a": np.full((1, 2), 255, np.uint8)})[0].tolist() == [[32640]]


def test_features_with_an_error_as_large_as_themselves_are_refused(tiny_model, photographs, monkeypatch):
    exact = FrozenBackbone(tiny_model, CPU)

    class Broken:
        def run(self, _, inputs):
            return [-exact(torch.from_numpy(inputs["pixel_values"])).numpy()]

    monkeypatch.setattr(quantized_backbone, "_open", lambda _: Broken())

    with pytest.raises(UserError, match=r"^int8: the features have a relative error of 2.00, expected less than 1.0$"):
        QuantizedBackbone(exact, photographs)


def test_another_process_gets_the_same_and_finds_the_same_by_itself(tiny_model, photographs):
    backbone = QuantizedBackbone(FrozenBackbone(tiny_model, CPU), photographs)
    expected = backbone(photographs[1])

    sent = pickle.loads(pickle.dumps(backbone))
    made_again = QuantizedBackbone(FrozenBackbone(tiny_model, CPU), photographs)

    assert torch.equal(sent(photographs[1]), expected)
    assert torch.equal(made_again(photographs[1]), expected)


def test_the_ranges_are_of_the_first_photographs_that_can_be_read(tiny_model, processor, rows, ranges, monkeypatch):
    monkeypatch.setattr(quantized_backbone, "NUM_PHOTOGRAPHS", 3)
    monkeypatch.setattr(quantized_backbone, "IMAGES_AT_A_TIME", 2)
    undecoded = rows.cast_column("image", datasets.Image(decode=False)).to_list()
    undecoded[1]["image"] = {"bytes": b"no photograph", "path": None}
    broken = datasets.Dataset.from_list(undecoded, features=rows.features)

    backbone_for_workers(tiny_model, processor, broken, CPU, int8=True)
    backbone_for_workers(tiny_model, processor, broken.to_iterable_dataset(), CPU, int8=True)

    expected = torch.cat([processor(rows[index]["image"], ["blue"])["pixel_values"] for index in (0, 2, 3)])
    assert [len(batch) for batch in ranges] == [2, 1, 2, 1]
    assert torch.equal(torch.cat(ranges), torch.cat([expected, expected]))


def test_without_a_readable_photograph_there_are_no_ranges(tiny_model, processor, rows):
    with pytest.raises(UserError, match="int8 needs photographs"):
        backbone_for_workers(tiny_model, processor, rows.select([]), CPU, int8=True)


def test_a_stream_that_cannot_be_read_is_an_error_in_one_line(tiny_model, processor, rows, tmp_path):
    rows.to_parquet(tmp_path / "train.parquet")
    stream = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "train.parquet"), split="train", streaming=True
    )
    damage(tmp_path / "train.parquet")

    with pytest.raises(DataError, match=r"^int8, .*: the rows cannot be read: [^\n]+$"):
        backbone_for_workers(tiny_model, processor, stream, CPU, int8=True)


def test_a_missing_package_is_named(tiny_model, processor, rows, monkeypatch):
    monkeypatch.setattr(quantized_backbone.importlib.util, "find_spec", lambda _: None)

    with pytest.raises(UserError, match=r"^int8 needs the package onnxscript, .*\[export\]"):
        check_int8(CPU, is_trained=False)
    with pytest.raises(UserError, match=r"^int8 needs the package onnxscript, .*\[export\]"):
        backbone_for_workers(tiny_model, processor, rows, CPU, int8=True)


def test_it_is_refused_on_a_gpu_and_for_a_trained_backbone(tiny_model, tiny_config, processor, rows):
    trained = MagnetoForTagSummarization(
        MagnetoConfig(**{**tiny_config.to_dict(), "num_trainable_backbone_stages": 1})
    )
    with pytest.raises(UsageError, match="found a GPU"):
        backbone_for_workers(tiny_model, processor, rows, torch.device("cuda"), int8=True)
    with pytest.raises(UsageError, match="found a backbone that is trained"):
        backbone_for_workers(trained, processor, rows, CPU, int8=True)


def test_a_tag_only_model_has_nothing_to_quantize(processor, rows):
    tag_only = MagnetoForTagSummarization(MagnetoConfig(vocab_size=6, streams="tag"))

    assert backbone_for_workers(tag_only, processor, rows, CPU, int8=True) is None


def test_cached_features_are_not_of_8_bits(tmp_path):
    with pytest.raises(UsageError, match="int8"):
        MagnetoTrainingArguments(str(tmp_path), int8=True, cached_views=2)


class Branching(nn.Module):
    """A backbone that cannot be exported: what it does depends on what it sees."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)

    def forward_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.convolution(pixel_values)
        return features if features.sum() > 0 else -features


def test_a_backbone_that_cannot_run_in_integers_is_an_error_in_one_line(tiny_model, photographs, monkeypatch):
    def fail(model):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(quantized_backbone, "_open", fail)

    with pytest.raises(UserError, match=r"^int8: this backbone cannot run in 8-bit integers: no kernel for this$"):
        QuantizedBackbone(FrozenBackbone(tiny_model, CPU), photographs)


def test_a_backbone_that_cannot_be_exported_is_an_error_in_one_line(tiny_model, photographs):
    tiny_model.magneto.image_feature_extractor.backbone = Branching().eval()

    with pytest.raises(UserError, match="int8: this backbone cannot be exported") as error:
        QuantizedBackbone(FrozenBackbone(tiny_model, CPU), photographs)

    assert "\n" not in str(error.value)
