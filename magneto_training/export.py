"""A trained model as ONNX, for ONNX Runtime: python -m magneto_training.export DIR --format onnx"""

import shutil
import warnings
from pathlib import Path

import numpy as np
import torch

from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization

from .arguments import CommandParser, UsageError, UserError, user_errors_in_one_line
from .evaluation import output_names
from .prediction import load_model
from .quantized_backbone import check_onnx_packages

TOLERANCE = 1e-4
# Images and tags; of one image or one tag an exporter may wrongly make a constant.
EXPORTED_SHAPE, CHECKED_SHAPES = (2, 3), ((1, 1), (3, 17))


def export_onnx(model: MagnetoForTagSummarization, output_file: Path) -> float:
    """Write a model as ONNX, when ONNX Runtime has been seen to compute the same.

    The inputs are `input_ids` and `attention_mask` (batch, tags), int64, and but for a tag-only model `pixel_values`
    (batch, 3, `image_size`, `image_size`), float32; batch and tags are free. The outputs are those of
    `evaluation.output_names`, each (batch, tags), float32, calibrated where the model is.

    Args:
        model: In eval mode, in float32, on the CPU.
        output_file: The file to write. Where the weights exceed what one ONNX file can hold, they lie beside it in
            `output_file` with `.data` appended.

    Returns:
        The largest difference from PyTorch that was seen.

    Raises:
        UserError: A package is missing, or ONNX Runtime's outputs differ from PyTorch's by more than `TOLERANCE`;
            nothing is written then.
    """
    check_onnx_packages("ONNX")
    inputs = _example_inputs(model.config, *EXPORTED_SHAPE)
    with warnings.catch_warnings():  # several inputs share their axes, as they should
        warnings.filterwarnings("ignore", message=".*axis name: .* will not be used")
        program = torch.onnx.export(
            model,
            kwargs=inputs,
            output_names=output_names(model.config),
            dynamic_shapes={
                name: {0: "batch"} if name == "pixel_values" else {0: "batch", 1: "tags"} for name in inputs
            },
            dynamo=True,
            verbose=False,
        )
    partial = output_file.with_name(output_file.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        program.save(partial / output_file.name)
        difference = max(_difference(model, partial / output_file.name, *shape) for shape in CHECKED_SHAPES)
        if not difference <= TOLERANCE:
            raise UserError(
                f"the outputs of the exported model differ from PyTorch's by {difference:.1e}, "
                f"expected at most {TOLERANCE:.0e}"
            )
        written = sorted(partial.iterdir(), reverse=True)  # the weights before the model that refers to them
        for file in written:
            file.replace(output_file.with_name(file.name))
        weights = output_file.with_name(output_file.name + ".data")
        if weights.name not in [file.name for file in written]:  # then they are an earlier, larger model's
            weights.unlink(missing_ok=True)
    finally:
        shutil.rmtree(partial)
    return difference


def _example_inputs(config: MagnetoConfig, num_images: int, num_tags: int) -> dict[str, torch.Tensor]:
    """Noise as photographs, any tags, and padding in the last row where there is room for it."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(config.vocab_size, (num_images, num_tags), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[-1, (num_tags + 1) // 2 :] = 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if config.streams != "tag":
        size = config.image_size
        inputs["pixel_values"] = torch.randn(num_images, 3, size, size, generator=generator)
    return inputs


def _difference(model: MagnetoForTagSummarization, file: Path, num_images: int, num_tags: int) -> float:
    """The largest difference of any output between PyTorch and ONNX Runtime."""
    import onnxruntime

    inputs = _example_inputs(model.config, num_images, num_tags)
    names = output_names(model.config)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.inference_mode():
        outputs = model(**inputs)
    return max(float(np.abs(array - outputs[name].numpy()).max()) for name, array in zip(names, found, strict=True))


def main() -> None:
    parser = CommandParser("python -m magneto_training.export", description=__doc__.partition(":")[0])
    parser.add_argument("model_dir", metavar="DIR", help="a trained folder, or a Hub id with --output_file")
    parser.add_argument("--format", choices=["onnx"], default="onnx", help="what to write")
    parser.add_argument("--output_file", metavar="FILE", type=Path, help="by default DIR/model.onnx")
    with user_errors_in_one_line("export"):
        args = parser.parse_args()
        if args.output_file is None and not Path(args.model_dir).is_dir():
            raise UsageError(f"{args.model_dir!r} is no folder, expected one, or --output_file beside a Hub id")
        model, _ = load_model(args.model_dir)
        output_file = args.output_file or Path(args.model_dir) / "model.onnx"
        difference = export_onnx(model.float(), output_file)
        print(f"{output_file}: differs from PyTorch by at most {difference:.1e}")


if __name__ == "__main__":
    main()
