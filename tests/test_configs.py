"""The published settings say what the paper says."""

import re
from pathlib import Path

import torch
import transformers

from magneto_training.arguments import DataArguments, MagnetoTrainingArguments, ModelArguments, parse_arguments
from magneto_training.augmentation import ImageAugmentation
from modeling_magneto import MagnetoForTagSummarization

CONFIGS = Path(__file__).parent.parent / "configs"


def test_the_large_scale_setting_is_that_of_appendix_a(tmp_path):
    argv = [str(CONFIGS / "large_scale.yaml"), "--dataset_name", "data", "--output_dir", str(tmp_path)]
    model_args, data_args, training_args = parse_arguments(
        (ModelArguments, DataArguments, MagnetoTrainingArguments), argv
    )

    assert (model_args.num_image_layers, model_args.num_tag_layers) == (2, 6)
    assert (model_args.hidden_size, model_args.num_attention_heads, model_args.intermediate_size) == (512, 8, 2048)
    assert (model_args.dropout, model_args.max_tags, model_args.image_size) == (0.1, 64, 224)
    assert (data_args.tag_add_ratio, data_args.tag_drop_ratio) == (0.3, 0.3)
    assert training_args.per_device_train_batch_size == 256
    assert (training_args.optim, training_args.optim_args) == ("sgd", "momentum=0.9")

    with torch.device("meta"):  # 24,056 tags, and no memory for them
        model = MagnetoForTagSummarization(model_args.to_config(2 + 24_056))
    backbone = model.base_model.image_feature_extractor.backbone
    trained = {name.split(".")[0] for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained == {"layer4"} and "layer3" in {name.split(".")[0] for name, _ in backbone.named_parameters()}


def test_photographs_are_to_be_kept_as_large_as_the_crops_of_the_settings_need_them():
    config = CONFIGS / "large_scale.yaml"
    (data_args, model_args) = parse_arguments(
        (DataArguments, ModelArguments),
        [str(config), "--dataset_name", "data"],
        passed_over=(MagnetoTrainingArguments,),
    )
    sides = [ImageAugmentation(size, data_args.min_crop_scale).shortest_side for size in (112, model_args.image_size)]

    guide = (CONFIGS.parent / "dataset_scripts" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"--short_side (\d+)", guide) == [str(side) for side in sides]
    assert re.findall(r"--short_side (\d+)", config.read_text(encoding="utf-8")) == [str(sides[1])]


def test_the_large_scale_rate_falls_when_the_f1_no_longer_rises(tmp_path):
    argv = [str(CONFIGS / "large_scale.yaml"), "--output_dir", str(tmp_path)]
    (args,) = parse_arguments((MagnetoTrainingArguments,), argv, passed_over=(ModelArguments, DataArguments))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], args.learning_rate)
    schedule = transformers.get_scheduler(
        args.lr_scheduler_type, optimizer, scheduler_specific_kwargs=args.lr_scheduler_kwargs
    )

    rates = []
    for f1 in (60, 70, 80, *[80] * 6):  # after five epochs of patience, in the sixth
        schedule.step(f1)
        rates.append(optimizer.param_groups[0]["lr"])

    assert rates == [3e-2] * 8 + [3e-2 * 0.1]
    assert args.metric_for_best_model == "f1" and args.greater_is_better
