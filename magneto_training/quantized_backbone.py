"""A frozen backbone in 8-bit integers (--int8): three to four times as fast as in float32 on processors with VNNI,
twice as fast on most others, and no faster on AMD's first Zen, which multiplies integers as slowly as floats.

Weights and activations become integers of 8 bits, by ONNX Runtime's static quantization. The range of each activation
is what the first photographs of the dataset reach, so every process finds the same. Everything behind the backbone
stays as it is. x86 processors without VNNI get weights of 7 bits, whose sums cannot overflow there.
"""

import contextlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from modeling_magneto import MagnetoPreTrainedModel, MagnetoProcessor

from .arguments import UsageError, UserError
from .frozen_backbone import IMAGES_AT_A_TIME, FrozenBackbone
from .photographs import PhotographReader, undecoded
from .tag_data import read_stream

NUM_PHOTOGRAPHS = 128  # whose activations set the ranges
LARGEST_ERROR = 1.0  # of the features, relative to their norm: that of features of zeros


class QuantizedBackbone:
    """What `FrozenBackbone` computes, in integers of 8 bits.

    How far features are off, relative to their norm, on the first 32 photographs of MIRFLICKR-ETS's validation split:
    MobileNetV2 with ImageNet weights 0.25 at 128 px (F1 is 91.8 with and 91.7 without the error), 0.34 at 224 px. With
    random weights at 112 px, ResNet-18 and 50, RegNetY and ConvNeXt 0.03 to 0.05, MobileNetV2 and V3 and EfficientNet
    0.13 to 0.24; where batch norm has the statistics of the photographs, 0.06 to 0.08 and 0.52 to 0.78.

    Args:
        backbone: In float32, on the CPU.
        photographs: Batches (B, 3, H, W), normalised, that show what activations there are.

    Raises:
        UserError: There is no photograph, the backbone cannot be exported, or the features of the first batch have an
            error that is as large as themselves.
    """

    def __init__(self, backbone: FrozenBackbone, photographs: Iterable[torch.Tensor]):
        self.model = _quantize(backbone, photographs)
        self._session = None

    def __getstate__(self):
        return {**self.__dict__, "_session": None}  # a worker opens its own

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W), normalised, -> (B, C, h, w) float32."""
        if self._session is None:
            self._session = _open(self.model)
        parts = pixel_values.split(IMAGES_AT_A_TIME)
        return torch.cat(
            [torch.from_numpy(self._session.run(None, {"pixel_values": part.numpy()})[0]) for part in parts]
        )


def check_int8(device: torch.device, is_trained: bool) -> None:
    """Raise `UserError` where a backbone cannot run in 8-bit integers: on a GPU, trained, or without a package."""
    if device.type != "cpu" or is_trained:
        found = "a GPU" if device.type != "cpu" else "a backbone that is trained"
        raise UsageError(f"int8 is for a frozen backbone on a CPU, found {found}")
    check_onnx_packages("int8")


def check_onnx_packages(purpose: str) -> None:
    """Raise `UserError` where a package that writes or runs ONNX models is missing, saying what it was needed for."""
    for package in ("onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{purpose} needs the package {package}, expected what pip install -e '.[export]' installs"
            )


def backbone_for_workers(
    model: MagnetoPreTrainedModel,
    processor: MagnetoProcessor,
    rows: Dataset | IterableDataset,
    device: torch.device,
    bf16: bool = False,
    int8: bool = False,
) -> FrozenBackbone | QuantizedBackbone | None:
    """As `FrozenBackbone.for_workers`, in 8-bit integers on request: the ranges are those of the first photographs.

    Args:
        model: A model; it stays as it is.
        processor: Its processor.
        rows: Photographs, decoded or not; those that cannot be read are passed over.
        device: Where to compute.
        bf16: Whether to compute in bfloat16; of no effect with `int8`.
        int8: Whether to compute in integers of 8 bits.

    Raises:
        UserError: As in `check_int8` and `QuantizedBackbone`.
    """
    backbone = FrozenBackbone.for_workers(model, device, bf16 and not int8)
    if not int8 or model.config.streams == "tag":
        return backbone
    check_int8(device, is_trained=backbone is None)
    return QuantizedBackbone(backbone, _first_photographs(rows, processor))


def _first_photographs(rows: Dataset | IterableDataset, processor: MagnetoProcessor) -> Iterator[torch.Tensor]:
    read_photographs = PhotographReader(processor.image_processor)
    batches = undecoded(rows.select_columns("image")).iter(IMAGES_AT_A_TIME)
    batches = read_stream(batches, "int8, which needs photographs to set the ranges by")
    photographs = (photograph for batch in batches for photograph in read_photographs(batch["image"]))
    first = islice((photograph for photograph in photographs if photograph is not None), NUM_PHOTOGRAPHS)
    while batch := list(islice(first, IMAGES_AT_A_TIME)):
        yield torch.stack(batch)


def _quantize(backbone: FrozenBackbone, photographs: Iterable[torch.Tensor]) -> bytes:
    """The backbone as an ONNX model of 8-bit integers, compared with the exact one on the first batch."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quant_pre_process, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(batches)

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"pixel_values": batch.numpy()}

    batches = list(photographs)
    if not batches:
        raise UserError("int8 needs photographs to set the ranges by, found none that can be read")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        exported, prepared, quantized = (Path(folder) / name for name in ("exported", "prepared", "quantized"))
        try:
            program = torch.onnx.export(
                backbone.feature_map,
                (batches[0][:1].expand(2, -1, -1, -1),),
                input_names=["pixel_values"],
                dynamic_shapes=({0: "batch"},),
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(f"int8: this backbone cannot be exported: {str(error).splitlines()[0]}") from None
        program.save(exported)
        try:
            quant_pre_process(exported, prepared)
            quantize_static(
                prepared,
                quantized,
                Reader(),
                activation_type=QuantType.QUInt8,  # what processors multiply with signed weights
                per_channel=True,
                reduce_range=_saturates(),  # weights of 7 bits; exact sums of 8-bit ones take an eighth longer
            )
            model = quantized.read_bytes()
            found = torch.from_numpy(_open(model).run(None, {"pixel_values": batches[0].numpy()})[0])
        except Exception as error:  # ONNX Runtime's own, which have no public name
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"int8: this backbone cannot run in 8-bit integers: {reason}") from error
    expected = backbone(batches[0])
    error = ((found - expected).norm() / expected.norm()).item()
    if not error < LARGEST_ERROR:  # also where it is not a number
        raise UserError(f"int8: the features have a relative error of {error:.2f}, expected less than {LARGEST_ERROR}")
    return model


@contextlib.contextmanager
def _quiet():
    """Exporter and quantizer tell much that is of no use to whoever asked for a prediction."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)


def _open(model: bytes):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # one in a worker
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _saturates() -> bool:
    """Whether this processor adds up products in 16 bits, which may not hold them: x86 without VNNI does."""
    import onnx.parser
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    probe = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 13]>
        probe (uint8[1, 2] a) => (int32[1, 1] sum) <int8[2, 1] b = {127, 127}> { sum = MatMulInteger(a, b) }"""
    )
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"a": np.full((1, 2), 255, np.uint8)})[0].item() != 2 * 255 * 127
