"""The model card, README.md of a trained folder, written from the run's own figures."""

import functools
import math
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_magneto import MagnetoConfig, MagnetoProcessor

from .arguments import (
    OPTIM_ARGS,
    DataArguments,
    MagnetoTrainingArguments,
    ModelArguments,
    PretrainingDataArguments,
)
from .evaluation import format_percent

TEMPLATE = Path(__file__).parent.parent / "model_card.md"
CONFIG_FIELDS = (
    "streams",
    "tag_encoder",
    "backbone",
    "num_trainable_backbone_stages",
    "freeze_backbone_norm",
    "image_size",
    "hidden_size",
    "num_tag_layers",
    "num_image_layers",
    "dropout",
    "objective",
    "auxiliary_loss_weight",
)
DATA_FIELDS = ("outlier_ratio", "tag_add_ratio", "tag_drop_ratio", "min_crop_scale", "auto_augment")
TRAINING_FIELDS = (
    "optim",
    "optim_args",
    "learning_rate",
    "backbone_learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "train_batch_size",
    "num_train_epochs",
    "seed",
)
FIELDS_WHERE_SET = ("bf16", "int8", "cached_views")  # where training computes otherwise than the saved model
# train.py stores one of these two rules.
RULE_SENTENCES = {
    "threshold": "Tags with a score of at least 0.5 are chosen.",
    "expected_f1": "The tags with the highest expected F1 of an image are chosen.",
}
# What stands before and after an id where a card loads a model.
BEFORE_ID, AFTER_ID = r'(\bfrom_pretrained\("|\bmodel="|--init_from |\bmagneto_training\.export )', r'(?=["`\s]|$)'


def write_model_card(
    output_dir: Path,
    repo_id: str,
    metrics: dict[str, dict[str, float]],
    config: MagnetoConfig,
    processor: MagnetoProcessor,
    model_args: ModelArguments,
    data_args: DataArguments | PretrainingDataArguments,
    training_args: MagnetoTrainingArguments,
) -> None:
    """Write `output_dir/README.md`.

    Args:
        output_dir: The trained folder.
        repo_id: What the model is called on the Hub, or the folder's name.
        metrics: Metrics of `validation` and `test`, as in `metrics.json`.
        config, processor: The model's.
        model_args, data_args, training_args: The run's arguments.
    """
    pretrained = isinstance(data_args, PretrainingDataArguments)
    is_local = Path(data_args.dataset_name).exists()
    dataset_name = Path(data_args.dataset_name).resolve().name if is_local else data_args.dataset_name
    # The dataset's own names of the splits. What is held out of its training split for pre-training has none.
    splits = {} if pretrained else {"validation": data_args.validation_split, "test": data_args.test_split}
    dataset = f"`{dataset_name}`"
    if data_args.dataset_config_name is not None:
        dataset += f", configuration `{data_args.dataset_config_name}`"
    model_name = repo_id.rpartition("/")[2]
    timm_weights = processor.use_images and model_args.backbone_weights == "pretrained" and "." in config.backbone
    card_data = ModelCardData(
        model_name=model_name,
        library_name="transformers",
        pipeline_tag=None if pretrained else "zero-shot-image-classification",
        license="apache-2.0",
        base_model=f"timm/{config.backbone}" if timm_weights else None,
        datasets=None if is_local else [dataset_name],
        tags=["magneto", "extractive-tags-summarization", "image-tagging"],
        eval_results=[
            EvalResult(
                task_type="zero-shot-image-classification",
                task_name="Outlier detection" if pretrained else "Extractive tags summarization",
                dataset_type=dataset_name,
                dataset_name=dataset_name,
                dataset_config=data_args.dataset_config_name,
                dataset_split=splits.get(role),
                metric_type=metric,
                metric_name=metric if pretrained else f"{metric} (keep-all F1 {figures['keep_all_f1']:.1f})",
                metric_value=round(figures[metric], 2),
            )
            for role, figures in metrics.items()
            for metric in (["average_precision"] if pretrained else ["f1", "precision", "recall"])
            if not math.isnan(figures[metric])
        ],
    )
    settings = {
        **{name: getattr(config, name) for name in CONFIG_FIELDS},
        **{name: getattr(data_args, name) for name in DATA_FIELDS if hasattr(data_args, name)},
        **{name: getattr(training_args, name) for name in TRAINING_FIELDS},
        **{name: value for name in FIELDS_WHERE_SET if (value := getattr(training_args, name))},
    }
    if OPTIM_ARGS.get(training_args.optim.value) == ():  # the default, which such an optimizer does not read
        del settings["optim_args"]
    vocabulary, calibration = processor.vocabulary, config.calibration or {}
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        pretrained=pretrained,
        model_name=model_name,
        repo_id=repo_id,
        dataset=dataset,
        splits=splits,
        percent=functools.partial(format_percent, digits=1),
        example_tags=vocabulary[:4],
        use_images=processor.use_images,
        rule=RULE_SENTENCES[processor.selection["rule"]],
        calibration=bool(calibration),
        num_tag_biases=max((len(part.get("tag_biases", {})) for part in calibration.values()), default=0),
        num_tags=len(vocabulary),
        metrics=metrics,
        training_curves=(output_dir / "training_curves.png").exists(),
        settings={name: getattr(value, "value", value) for name, value in settings.items()},
    )
    card.save(output_dir / "README.md")


def name_model(card: ModelCard, repo_id: str) -> None:
    """Call the model of a card `repo_id` from now on: in its title, its metadata, and the code that loads it."""
    title = re.search(r"^# (.+)", card.text, re.MULTILINE)
    old_name = card.data.model_name or (title[1] if title else "")  # without results, the metadata have no name
    card.data.model_name = name = repo_id.rpartition("/")[2]
    text = card.text.replace(f"# {old_name}\n", f"# {name}\n", 1)
    # Its owner may have written of other models, even of one with the same name: its own id comes first.
    old_id = re.search(rf"{BEFORE_ID}((?:[\w.-]+/)?{re.escape(old_name)}){AFTER_ID}", text)
    if old_id is not None:
        text = re.sub(f"{BEFORE_ID}{re.escape(old_id[2])}{AFTER_ID}", rf"\g<1>{repo_id}", text)
    card.content = f"---\n{card.data.to_yaml()}\n---\n{text}"
