"""Train MAGNeto: accelerate launch train.py CONFIG.yaml [--field value ...]"""

from pathlib import Path

from transformers import set_seed

from magneto_training.arguments import (
    DataArguments,
    MagnetoTrainingArguments,
    ModelArguments,
    parse_arguments,
    user_errors_in_one_line,
)
from magneto_training.augmentation import TagAugmentation
from magneto_training.calibration import calibrate, write_reliability_diagram
from magneto_training.checkpoints import find_checkpoint
from magneto_training.collation import AugmentedDataset, SeededDataset, TagCollator
from magneto_training.evaluation import add_stored_rule, compute_metrics, format_metrics, write_metrics
from magneto_training.feature_cache import build_feature_caches
from magneto_training.figures import write_training_curves
from magneto_training.initialization import start_model
from magneto_training.model_card import write_model_card
from magneto_training.publish import choose_widget_rows
from magneto_training.quantized_backbone import backbone_for_workers
from magneto_training.streaming import StreamedCollator, StreamedDataset, check_streaming, load_streamed_splits
from magneto_training.tag_data import build_vocabulary, load_training_splits
from magneto_training.trainer import MagnetoTrainer, check_output_dir, check_training_options
from modeling_magneto import MagnetoForTagSummarization


def main() -> None:
    model_args, data_args, training_args = parse_arguments((ModelArguments, DataArguments, MagnetoTrainingArguments))
    check_streaming(data_args, training_args)
    check_training_options(model_args, training_args)
    check_output_dir(training_args.output_dir)
    checkpoint = find_checkpoint(training_args)
    set_seed(training_args.seed)

    # Data: one process reads and checks, the others find its result in the cache. Of a stream nothing is kept, so they
    # read it at the same time.
    use_images = model_args.streams != "tag"
    if data_args.streaming:
        stream, splits = load_streamed_splits(data_args, use_images)
        vocabulary = stream.vocabulary
    else:
        with training_args.main_process_first(desc="reading the dataset"):
            splits = load_training_splits(data_args, use_images)
            vocabulary = build_vocabulary(splits["train"])

    # Model.
    model, processor = start_model(MagnetoForTagSummarization, vocabulary, model_args, training_args.seed, checkpoint)
    features = {}
    if training_args.cached_views and use_images:
        features = build_feature_caches(model, processor, splits, data_args, training_args)

    # Training.
    rows = stream.rows if data_args.streaming else splits["train"]
    backbone = None
    if not features:
        backbone = backbone_for_workers(
            model, processor, rows, training_args.device, training_args.bf16, training_args.int8
        )
    tag_augmentation = TagAugmentation(vocabulary, data_args.tag_add_ratio, data_args.tag_drop_ratio)
    train_collator = TagCollator.for_training(processor, data_args, tag_augmentation, backbone)
    if data_args.streaming:
        train = StreamedDataset(stream, training_args.seed, data_args.shuffle_buffer_size)
        train_collator = StreamedCollator(train_collator)
    else:
        train = AugmentedDataset(splits.pop("train"), training_args.seed, features.get("train"))
    evaluated = {name: SeededDataset(rows, training_args.seed, features.get(name)) for name, rows in splits.items()}
    trainer = MagnetoTrainer(
        model,
        training_args,
        processor,
        train_dataset=train,
        eval_dataset=evaluated["validation"],
        train_collator=train_collator,
        eval_collator=TagCollator(processor, backbone=backbone),
        compute_metrics=compute_metrics,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if training_args.int8:  # the results are those of the saved model, which is exact
        exact = backbone_for_workers(model, processor, rows, training_args.device)
        trainer.eval_collator = TagCollator(processor, backbone=exact)

    # Choosing the tags: the paper's rule on raw scores, or the highest expected F1 of scores that are calibrated on
    # validation. How much that helps is measured in either case.
    results = {name: trainer.predict_split(name, rows) for name, rows in evaluated.items()}
    cross_fit = calibrate(model, results["validation"][1], training_args.seed)
    fitted = model.config.calibration
    if data_args.selection == "expected_f1":
        processor.selection = {"rule": "expected_f1"}
    else:
        model.set_calibration(None)

    # Results.
    metrics = {
        name: add_stored_rule(figures, prediction, model.config, processor.selection, fitted)
        for name, (figures, prediction) in results.items()
    }
    metrics["validation"] |= cross_fit.errors(model.config)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        output_dir = Path(training_args.output_dir)
        write_training_curves(trainer.state.log_history, output_dir / "training_curves.png")
        write_reliability_diagram(cross_fit, output_dir / "calibration.png")
        write_metrics(output_dir / "metrics.json", metrics)
        print(format_metrics(metrics))
        repo_id = trainer.hub_model_id or output_dir.name
        write_model_card(output_dir, repo_id, metrics, model.config, processor, model_args, data_args, training_args)
    if training_args.push_to_hub:
        trainer.push_to_hub(choose_widget_rows(splits["validation"], data_args.widget_images) if use_images else ())


if __name__ == "__main__":
    with user_errors_in_one_line("train.py"):
        main()
