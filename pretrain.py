"""Pre-train MAGNeto without labels: accelerate launch pretrain.py CONFIG.yaml [--field value ...]

The model learns to detect strange tags (section 5.2); train.py --init_from OUTPUT_DIR goes on from there.
"""

from pathlib import Path

from transformers import set_seed

from magneto_training.arguments import (
    DataArguments,
    ModelArguments,
    PretrainingArguments,
    PretrainingDataArguments,
    parse_arguments,
    user_errors_in_one_line,
)
from magneto_training.checkpoints import find_checkpoint
from magneto_training.collation import AugmentedDataset, OutlierCollator, SeededDataset, TagCollator
from magneto_training.evaluation import compute_detection_metrics, format_detection_metrics, write_metrics
from magneto_training.feature_cache import build_feature_caches
from magneto_training.figures import write_training_curves
from magneto_training.initialization import start_model
from magneto_training.model_card import write_model_card
from magneto_training.quantized_backbone import backbone_for_workers
from magneto_training.tag_data import build_vocabulary, load_pretraining_splits
from magneto_training.trainer import MagnetoTrainer, check_output_dir, check_training_options
from modeling_magneto import MagnetoForOutlierDetection


def main() -> None:
    model_args, data_args, training_args = parse_arguments(
        (ModelArguments, PretrainingDataArguments, PretrainingArguments), passed_over=(DataArguments,)
    )
    check_training_options(model_args, training_args)
    check_output_dir(training_args.output_dir)
    checkpoint = find_checkpoint(training_args)
    set_seed(training_args.seed)

    # Data: one process reads and checks, the others find its result in the cache.
    use_images = model_args.streams != "tag"
    with training_args.main_process_first(desc="reading the dataset"):
        splits = load_pretraining_splits(data_args, use_images)
        vocabulary = build_vocabulary(splits["train"])

    # Model.
    model, processor = start_model(MagnetoForOutlierDetection, vocabulary, model_args, training_args.seed, checkpoint)
    features = {}
    if training_args.cached_views and use_images:
        features = build_feature_caches(model, processor, splits, data_args, training_args)

    # Training. The validation split's outliers are the same in every epoch.
    backbone = None
    if not features:
        backbone = backbone_for_workers(
            model, processor, splits["train"], training_args.device, training_args.bf16, training_args.int8
        )
    train_collator = TagCollator.for_training(processor, data_args, backbone=backbone)
    eval_collator = TagCollator(processor, backbone=backbone)
    train = AugmentedDataset(splits["train"], training_args.seed, features.get("train"))
    validation = SeededDataset(splits["validation"], training_args.seed, features.get("validation"))
    trainer = MagnetoTrainer(
        model,
        training_args,
        processor,
        train_dataset=train,
        eval_dataset=validation,
        train_collator=OutlierCollator(train_collator, data_args.outlier_ratio),
        eval_collator=OutlierCollator(eval_collator, data_args.outlier_ratio),
        compute_metrics=compute_detection_metrics,
    )
    trainer.train(resume_from_checkpoint=checkpoint)

    if training_args.int8:  # the results are those of the saved model, which is exact
        exact = backbone_for_workers(model, processor, splits["validation"], training_args.device)
        trainer.eval_collator = OutlierCollator(TagCollator(processor, backbone=exact), data_args.outlier_ratio)

    # Results.
    metrics = {"validation": trainer.predict_split("validation", validation)[0]}
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        output_dir = Path(training_args.output_dir)
        write_training_curves(trainer.state.log_history, output_dir / "training_curves.png")
        write_metrics(output_dir / "metrics.json", metrics)
        print(format_detection_metrics(metrics["validation"]))
        repo_id = trainer.hub_model_id or output_dir.name
        write_model_card(output_dir, repo_id, metrics, model.config, processor, model_args, data_args, training_args)
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    with user_errors_in_one_line("pretrain.py"):
        main()
