"""Choose the tags of a dataset.

accelerate launch predict.py --model_name_or_path M --dataset_name D [--split S] --output_file OUT.parquet
"""

from magneto_training.arguments import PredictArguments, parse_arguments, user_errors_in_one_line
from magneto_training.evaluation import format_metrics
from magneto_training.prediction import load_model, load_prediction_split
from magneto_training.prediction_parts import (
    check_output_file,
    describe_files,
    load_backbone,
    new_accelerator,
    predict_dataset,
)
from magneto_training.report import write_report


def main() -> None:
    (args,) = parse_arguments((PredictArguments,))
    check_output_file(args)
    accelerator = new_accelerator()
    model, processor = load_model(args.model_name_or_path)
    with accelerator.main_process_first():
        dataset = load_prediction_split(args, processor.use_images)

    backbone = load_backbone(accelerator, model, processor, dataset, args)
    metrics = predict_dataset(accelerator, model, processor, dataset, args, backbone)

    if accelerator.is_main_process:
        if "f1" in metrics:
            print(format_metrics({args.dataset_name: metrics}))
        if "outlier_percent" in metrics:
            print(f"images with a strange tag among the selected ones: {metrics['outlier_percent']:.2f} %")
        print(describe_files(args, processor))
        if args.report_images and not args.streaming:
            print(f"report: {write_report(model, processor, dataset, args, metrics)}")


if __name__ == "__main__":
    with user_errors_in_one_line("predict.py"):
        main()
