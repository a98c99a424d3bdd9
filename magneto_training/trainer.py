"""transformers' Trainer for MAGNeto, and what a run is refused before rows are read."""

import functools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainerCallback, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization, MagnetoPreTrainedModel, MagnetoProcessor

from .arguments import (
    OPTIM_ARGS,
    MagnetoTrainingArguments,
    ModelArguments,
    PretrainingArguments,
    UsageError,
    UserError,
)
from .batch_norm import share_batch_norms
from .checkpoints import lasting_arguments
from .collation import AugmentedDataset
from .evaluation import compute_detection_metrics, compute_metrics, output_names
from .publish import files_to_publish, hub_errors, publish
from .quantized_backbone import check_int8
from .streaming import StreamedBatches, StreamedDataset

LOGGED_LOSSES = ("final_loss", "tag_loss", "image_loss")
HUB_FILES = Path(__file__).parent.parent / "hub"
# Trainer's own bookkeeping, of no interest beside a split's metrics.
TIMINGS = ("runtime", "samples_per_second", "steps_per_second")


class EpochCallback(TrainerCallback, ExportableState):
    """Tells training rows which epoch begins, on which their random changes depend, keeps in checkpoints how a run
    began, and checks that a resumed one has epochs of the same size.

    The data loader tells them too, but not where it shares its batches with other processes, or skips some to resume.
    """

    def __init__(self, dataset: AugmentedDataset | StreamedDataset):
        self.dataset = dataset
        self.epoch_size: dict[str, int] = {}
        self.arguments: dict[str, str | bool | None] = {}

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        self.epoch_size = {"rows": len(self.dataset), "steps": steps}
        self.arguments = lasting_arguments(args)
        # An older checkpoint has none, and Trainer would miss it in saving the next.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        for name, number in self.epoch_size.items():
            if saved.get(name, number) != number:
                raise UserError(
                    f"the checkpoint is of a run with {saved[name]} {name} an epoch, and this one has {number}; "
                    "expected as many rows, processes and images a step as before"
                )

    def state(self) -> dict:
        """Kept in checkpoints."""
        return {"args": {}, "attributes": self.epoch_size | self.arguments}

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch))


class PatientStoppingCallback(EarlyStoppingCallback):
    """Early stopping that goes on counting in a resumed run, with whatever patience that has."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = 0
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        self.early_stopping_patience_counter = saved["early_stopping_patience_counter"]


class MagnetoTrainer(Trainer):
    """Trains MAGNeto on rows of tags.

    Args:
        model: A new or loaded model.
        args: Training arguments.
        processor: The model's processor, saved with it.
        train_dataset, eval_dataset: Checked rows, with seeds where the collator needs them.
        train_collator, eval_collator: Rows to batches; training examples are augmented.
        compute_metrics: Called with the collected outputs and the model's configuration.
    """

    def __init__(
        self,
        model: MagnetoPreTrainedModel,
        args: MagnetoTrainingArguments,
        processor: MagnetoProcessor,
        train_dataset: AugmentedDataset | StreamedDataset,
        eval_dataset: Dataset,
        train_collator: Callable[[list[dict]], dict],
        eval_collator: Callable[[list[dict]], dict],
        compute_metrics: Callable[[EvalPrediction, MagnetoConfig], dict[str, float]],
    ):
        self.train_collator = train_collator
        self.eval_collator = eval_collator
        callbacks = [EpochCallback(train_dataset)]
        if args.early_stopping_patience is not None:
            callbacks.append(PatientStoppingCallback(args.early_stopping_patience))
        if args.world_size > 1:
            share_batch_norms(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            compute_metrics=functools.partial(compute_metrics, config=model.config),
            callbacks=callbacks,
        )
        self._logged_sums: dict[str, torch.Tensor] = {}
        self._num_logged = 0

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, StreamedDataset):
            return self._get_stream_loader(self.train_dataset)
        self.data_collator = self.train_collator
        return super().get_train_dataloader()

    def _get_stream_loader(self, dataset: StreamedDataset) -> DataLoader:
        loader = DataLoader(
            dataset,
            batch_sampler=StreamedBatches(
                dataset, self._train_batch_size, self.args.world_size, self.args.process_index
            ),
            collate_fn=self.train_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        # The batches are this process's share already: accelerate would divide them once more, and repeat some.
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def training_step(self, model, inputs, num_items_in_batch=None):
        # Said here and not in the worker that has noticed it, which cannot end a command with one line.
        if "unreadable" in inputs:
            self.train_dataset.leave_out(inputs.pop("unreadable"))
        return super().training_step(model, inputs, num_items_in_batch)

    def get_eval_dataloader(self, eval_dataset=None):
        self.data_collator = self.eval_collator
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        self.data_collator = self.eval_collator
        return super().get_test_dataloader(test_dataset)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        clip = self.accelerator.clip_grad_norm_

        def clip_or_measure(parameters, max_norm, norm_type=2):
            # Trainer learns the norm at every step, by clipping to infinity. With many tags in the vocabulary, that
            # takes longer than a layer, and most of the norms are never seen.
            if max_norm == float("inf") and not self._logs_next():
                return None
            return clip(parameters, max_norm, norm_type)

        self.accelerator.clip_grad_norm_ = clip_or_measure

    def _logs_next(self) -> bool:
        """Whether there will be a line in the log after this step, as far as the arguments tell."""
        step = self.state.global_step + 1
        if self.args.logging_strategy == IntervalStrategy.STEPS:
            return step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)
        return step == self.state.max_steps or self.accelerator.gradient_state.end_of_dataloader

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if optimizer_class is torch.optim.SGD:
            options["fused"] = True  # one call for all parameters, as Trainer has it of AdamW
        return optimizer_class, options

    def create_optimizer(self, model=None):
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        learning_rate = self.args.backbone_learning_rate
        if is_new and learning_rate is not None and self.model.config.streams != "tag":
            backbone = set(self.model.base_model.image_feature_extractor.backbone.parameters())
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if parameter in backbone]
                group["params"] = [parameter for parameter in group["params"] if parameter not in backbone]
                optimizer.add_param_group({**group, "params": own, "lr": learning_rate})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            parts = {name: outputs[name] for name in LOGGED_LOSSES if outputs.get(name) is not None}
            if outputs.get("gate") is not None:
                mask = inputs["attention_mask"]
                parts["mean_gate"] = (outputs["gate"] * mask).sum() / mask.sum()
            for name, value in parts.items():  # summed on the device: a step never waits for a number to be printed
                # The mean is of one number for each GPU, where Trainer uses several in one process.
                self._logged_sums[name] = self._logged_sums.get(name, 0) + value.detach().float().mean()
            self._num_logged += 1
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs):
        # Trainer's estimate is of language models, and to count the parameters at every step takes a tenth of it.
        return 0

    def log(self, logs, start_time=None):
        if "loss" in logs and self._num_logged:
            for name, total in self._logged_sums.items():
                logs[name] = self.accelerator.reduce(total / self._num_logged, reduction="mean").item()
            self._logged_sums, self._num_logged = {}, 0
        super().log(logs, start_time)

    def save_model(self, output_dir=None, _internal_call=False):
        # Never pushed from here: train.py pushes once, when card and metrics are there too.
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            # A pickle that nothing reads, and what was made of other weights.
            for name in (TRAINING_ARGS_NAME, "model.onnx", "model.onnx.data", "calibration.png"):
                (folder / name).unlink(missing_ok=True)
            if isinstance(self.model, MagnetoForTagSummarization):
                copy_endpoint(folder)

    def init_hf_repo(self, token=None, private=None):
        with hub_errors(self.args.hub_model_id or self.args.output_dir):
            super().init_hf_repo(token, private)

    def push_to_hub(self, widget_rows=()):
        """Publish the complete folder as `python -m magneto_training.publish` does, with `widget_rows` as examples."""
        if self.is_world_process_zero():
            files = files_to_publish(Path(self.args.output_dir), self.hub_model_id, widget_rows)
            publish(files, self.hub_model_id, self.args.hub_private_repo, self.args.hub_token, self.args.hub_revision)

    def predict_split(self, name: str, dataset: Dataset) -> tuple[dict[str, float], EvalPrediction]:
        """Metrics of a split, and the arrays behind them: outputs, labels, and as inputs the indices of the tags."""
        compute_metrics, predictions = self.compute_metrics, []

        def keep_and_compute(prediction: EvalPrediction) -> dict[str, float]:
            predictions.append(prediction)
            return compute_metrics(prediction)

        self.compute_metrics = keep_and_compute
        metrics = self.predict(dataset, metric_key_prefix=name).metrics
        self.compute_metrics = compute_metrics
        metrics = {key.removeprefix(f"{name}_"): value for key, value in metrics.items() if key.startswith(f"{name}_")}
        return {key: value for key, value in metrics.items() if key not in TIMINGS}, predictions[0]


def copy_endpoint(output_dir: Path) -> None:
    """Put beside a model what an Inference Endpoint runs and what it installs for that."""
    for name in ("handler.py", "requirements.txt"):
        shutil.copyfile(HUB_FILES / name, output_dir / name)


def check_training_options(model_args: ModelArguments, training_args: MagnetoTrainingArguments) -> None:
    """Raise `UserError` where a run wants what its optimizer, schedule, evaluation or backbone cannot do.

    Before rows are read, which may take hours.
    """
    _check_best_metric(model_args, training_args)
    try:
        get_reporting_integration_callbacks(training_args.report_to)
    except ValueError as error:
        raise UsageError(f"report_to: {error}") from None
    optimizer_class, options = torch.optim.SGD, {}
    if training_args.optim in OPTIM_ARGS:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training_args)
    try:
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **options)
    except ValueError as error:  # a number is out of range
        raise UsageError(f"optim is {training_args.optim.value!r}, which refuses its arguments: {error}") from None
    schedule, options = training_args.lr_scheduler_type, training_args.lr_scheduler_kwargs
    try:
        get_scheduler(schedule, optimizer, 1, 2, scheduler_specific_kwargs=options)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"lr_scheduler_type is {schedule.value!r}, which refuses lr_scheduler_kwargs {options}: {error}"
        ) from None
    if model_args.streams == "tag":  # has no backbone and takes all options: one setting is for all of table 2
        return
    stages, learning_rate = model_args.num_trainable_backbone_stages, training_args.backbone_learning_rate
    if training_args.int8:
        check_int8(training_args.device, is_trained=stages != 0)
    if training_args.cached_views and stages:
        raise UsageError(
            f"cached_views is {training_args.cached_views} and num_trainable_backbone_stages {stages}, expected 0: "
            "only a frozen backbone's features can be kept"
        )
    if learning_rate is not None and not stages:
        raise UsageError(f"backbone_learning_rate is {learning_rate}, but no stage of a backbone is trained")


def _check_best_metric(model_args: ModelArguments, training_args: MagnetoTrainingArguments) -> None:
    """Raise `UsageError` where the best epoch is to be best in what evaluation does not report, or never changes."""
    wanted, config = training_args.metric_for_best_model, model_args.to_config(vocab_size=3)
    compute, names = compute_metrics, output_names(config)
    if isinstance(training_args, PretrainingArguments):
        compute, names = compute_detection_metrics, [name for name in names if name in ("tag_logits", "image_logits")]
    example = EvalPrediction((np.zeros((1, 2), np.float32),) * len(names), np.array([[1, 0]]))
    fixed = ("num_", "keep_all_", "flag_all_")
    reported = ["loss", *(name for name in compute(example, config) if not name.startswith(fixed))]
    if wanted is not None and wanted.removeprefix("eval_") not in reported:
        raise UsageError(f"metric_for_best_model is {wanted!r}, expected one of {', '.join(sorted(reported))}")


def check_output_dir(output_dir: str) -> None:
    """Make the folder of a run; raise `UserError` before the work where its results could not be written after it."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise UserError(f"output_dir is {output_dir!r}, expected a folder to write to: {error.strerror}") from None
