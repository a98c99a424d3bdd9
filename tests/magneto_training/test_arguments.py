import dataclasses
from datetime import timedelta

import pytest
import torch
from safetensors import SafetensorError
from transformers import Trainer

from magneto_training import arguments as arguments_module
from magneto_training.arguments import (
    OPTIM_ARGS,
    OPTIM_FLAGS,
    TRAINING_METRICS,
    DataArguments,
    MagnetoTrainingArguments,
    ModelArguments,
    PredictArguments,
    PretrainingArguments,
    PretrainingDataArguments,
    UsageError,
    UserError,
    parse_arguments,
    user_errors_in_one_line,
)
from magneto_training.tag_data import DataError
from modeling_magneto import MagnetoConfig

PREDICT = ["--model_name_or_path", "model", "--dataset_name", "data", "--output_file", "out.parquet"]


def write_yaml(tmp_path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_a_file_sets_fields_and_the_command_line_wins(tmp_path):
    config = write_yaml(
        tmp_path,
        """
        dataset_name: photos
        hidden_size: 64
        dropout: 1e-1
        backbone_kwargs: {pad_type: same}
        image_mean: [0.1, 0.2, 0.3]
        auto_augment: false
        num_trainable_backbone_stages: -1
        dataset_config_name: null
        """,
    )

    model_args, data_args = parse_arguments(
        (ModelArguments, DataArguments),
        [config, "--hidden_size", "32", "--image_mean", "0.5", "0.5", "0.4", "--train_split=all"],
    )

    assert (model_args.hidden_size, model_args.dropout) == (32, 0.1)
    assert model_args.backbone_kwargs == {"pad_type": "same"}
    assert model_args.image_mean == [0.5, 0.5, 0.4] and model_args.image_std is None
    assert model_args.num_trainable_backbone_stages == -1
    assert (data_args.dataset_name, data_args.train_split, data_args.auto_augment) == ("photos", "all", False)
    assert data_args.dataset_config_name is None
    assert model_args.num_tag_layers == ModelArguments().num_tag_layers


def test_no_file_is_needed():
    (data_args,) = parse_arguments((DataArguments,), ["--dataset_name", "photos", "--skip_bad_rows", "true"])

    assert data_args == DataArguments(dataset_name="photos", skip_bad_rows=True)


def test_json_on_the_command_line():
    (model_args,) = parse_arguments((ModelArguments,), ["--backbone_kwargs", '{"drop_path_rate": 0.1}'])

    assert model_args.backbone_kwargs == {"drop_path_rate": 0.1}


def test_an_unknown_field_in_the_file_suggests_the_nearest(tmp_path):
    config = write_yaml(tmp_path, "dataset_name: photos\nhiden_size: 64\n")

    with pytest.raises(UsageError, match="unknown field 'hiden_size' in .*config.yaml; did you mean 'hidden_size'?"):
        parse_arguments((ModelArguments, DataArguments), [config])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("lr", "lr_scheduler_kwargs' or 'lr_scheduler_type"),
        ("epochs", "num_train_epochs"),
        ("patience", "early_stopping_patience"),
        ("num_workers", "dataloader_num_workers"),
        ("learning_rat", "learning_rate"),
    ],
)
def test_an_unknown_field_suggests_those_that_hold_the_word_or_else_the_nearest(tmp_path, name, nearest):
    for argv in ([f"--{name}", "1"], [write_yaml(tmp_path, f"{name}: 1\n")]):
        with pytest.raises(UsageError, match=f"unknown field '{name}' in .*; did you mean '{nearest}'[?]$"):
            parse_arguments((ModelArguments, DataArguments, MagnetoTrainingArguments), argv)


@pytest.mark.parametrize("arguments", [["--hiden_size", "64"], ["--hiden_size=64"], ["--hiden-size", "64"]])
def test_an_unknown_field_on_the_command_line_suggests_the_nearest(arguments):
    with pytest.raises(UsageError, match="'hiden_size' in the command line; did you mean 'hidden_size'?"):
        parse_arguments((ModelArguments,), arguments)


def test_an_abbreviation_is_no_field():
    with pytest.raises(UsageError, match="unknown field 'hidden'"):
        parse_arguments((ModelArguments,), ["--hidden", "64"])


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("hidden_size", "eight", "hidden_size"),
        ("hidden_size", "1.5", "hidden_size"),
        ("dropout", "little", "dropout"),
        ("streams", "three", "streams"),
        ("backbone_kwargs", "pad_type", "backbone_kwargs .* expected JSON"),
        ("image_mean", "[0.5]", "image_mean has 1 numbers, expected 3"),
        ("image_std", "a", "image_std"),
        ("backbone", "resnet188", "backbone is 'resnet188', which timm does not know; did you mean 'resnet18"),
        ("backbone", "resnet18.foo", "backbone is 'resnet18.foo', which timm .*; did you mean 'resnet18[.]"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_field(tmp_path, name, value, message):
    with pytest.raises(UsageError, match=message):
        parse_arguments((ModelArguments,), [write_yaml(tmp_path, f"{name}: {value}\n")])
    with pytest.raises(UsageError, match=message):
        parse_arguments((ModelArguments,), [f"--{name}", value.strip("[]")])


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [1", "is no YAML"),
        ("- a\n- b\n", "holds a list, expected a mapping"),
        ("just text", "holds a str, expected a mapping"),
        ("", "dataset_name is missing"),
    ],
)
def test_a_file_that_is_no_mapping_is_an_error(tmp_path, text, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse_arguments((DataArguments,), [write_yaml(tmp_path, text)])

    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UsageError, match="nowhere.yaml cannot be read"):
        parse_arguments((ModelArguments,), [str(tmp_path / "nowhere.yaml")])


def test_a_stray_value_is_an_error():
    with pytest.raises(UsageError, match="'stray'"):
        parse_arguments((ModelArguments,), ["--hidden_size", "64", "stray"])


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--threshold", "1.5"], "threshold is 1.5"),
        (["--top_k", "0"], "top_k is 0"),
        (["--threshold", "0.99", "--top_k", "2"], "threshold is 0.99 and top_k is 2, expected only one of them"),
        (["--selection", "best"], "selection: invalid choice: 'best'"),
        (["--selection", "top_k"], "top_k is None, but the rule is 'top_k'"),
        (["--selection", "expected_f1", "--threshold", "0.3"], "threshold is 0.3, but the rule is 'expected_f1'"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--num_workers", "-1"], "num_workers is -1"),
        (["--output_file", "out.csv"], "out.csv"),
        (["--model_name_or_path", ""], "--model_name_or_path is missing"),
    ],
)
def test_wrong_prediction_arguments_are_named(extra, message):
    with pytest.raises(UsageError, match=message):
        parse_arguments((PredictArguments,), [*PREDICT, *extra])


def test_model_arguments_have_the_configurations_defaults():
    defaults = {item.name: getattr(ModelArguments(), item.name) for item in dataclasses.fields(ModelArguments)}
    config = MagnetoConfig()
    shared = [item.name for item in dataclasses.fields(MagnetoConfig) if item.name in defaults]

    # All fields of the architecture but the two that the vocabulary decides and the one that is fitted.
    own = set(MagnetoConfig.__annotations__) - {"vocab_size", "pad_token_id", "calibration"}
    assert own <= set(shared)
    assert {name: defaults[name] for name in shared} == {name: getattr(config, name) for name in shared}


def test_every_argument_of_the_model_reaches_the_configuration():
    changed = {
        "streams": "image",
        "tag_encoder": "feed_forward",
        "hidden_size": 12,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "num_tag_layers": 3,
        "num_image_layers": 4,
        "dropout": 0.25,
        "max_tags": 5,
        "objective": "bce",
        "auxiliary_loss_weight": 0.5,
        "backbone": "mobilenetv2_100",
        "backbone_kwargs": {"pad_type": "same"},
        "num_trainable_backbone_stages": -1,
        "image_size": 64,
    }

    config = ModelArguments(**changed).to_config(vocab_size=9)

    assert {name: getattr(config, name) for name in changed} == changed and config.vocab_size == 9


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 10},
        {"dropout": 1.0},
        {"num_tag_layers": 0},
        {"image_std": [0.2, 0.0, 0.2]},
        {"image_std": [0.2, 0.2, -0.2]},
        {"image_std": [float("nan"), 0.2, 0.2]},
    ],
)
def test_a_value_out_of_range_is_named(change):
    with pytest.raises(UsageError, match=next(iter(change))):
        ModelArguments(**change)  # and not only when the rows have been read


def test_every_argument_has_help():
    for argument_class in (ModelArguments, DataArguments, PredictArguments):
        for item in dataclasses.fields(argument_class):
            assert item.metadata["help"], item.name


def test_the_help_begins_with_the_configuration(capsys):
    with pytest.raises(SystemExit):
        parse_arguments((PredictArguments,), ["--help"])

    assert "[CONFIG.yaml] [--field value ...]" in capsys.readouterr().out.splitlines()[0]


def test_the_default_optimiser_is_the_papers(tmp_path):
    args = MagnetoTrainingArguments(output_dir=str(tmp_path))

    assert (args.optim, args.optim_args, args.learning_rate) == ("sgd", "momentum=0.9", 1e-2)  # A.4
    assert (args.weight_decay, args.max_grad_norm, args.lr_scheduler_type, args.warmup_steps) == (0, 0, "constant", 0)
    assert (args.per_device_train_batch_size, args.num_train_epochs) == (32, 500)
    assert (args.metric_for_best_model, args.greater_is_better, args.load_best_model_at_end) == ("f1", True, True)
    assert not MagnetoTrainingArguments(str(tmp_path), metric_for_best_model="loss").greater_is_better
    assert args.remove_unused_columns is False


@pytest.mark.parametrize("error, status", [(UserError("the data is bad"), 1), (UsageError("no such field"), 2)])
def test_a_command_ends_with_one_line_and_a_status(capsys, error, status):
    with pytest.raises(SystemExit) as caught, user_errors_in_one_line("train.py"):
        raise error

    assert caught.value.code == status
    captured = capsys.readouterr()
    assert captured.err == f"train.py: error: {error}\n" and captured.out == ""


def test_a_message_is_not_cut_where_it_names_another_error(capsys):
    with pytest.raises(SystemExit), user_errors_in_one_line("train.py"):
        raise UserError("the dataset 'x' cannot be loaded: UserError: no columns")

    assert capsys.readouterr().err == "train.py: error: the dataset 'x' cannot be loaded: UserError: no columns\n"


def test_a_workers_message_is_not_cut_where_it_names_another_error(capsys):
    worker = (
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1\nmagneto_training.arguments.UserError: found item_id UserError: 1\n'
    )
    with pytest.raises(SystemExit), user_errors_in_one_line("train.py"):
        raise UserError(worker)

    assert capsys.readouterr().err == "train.py: error: found item_id UserError: 1\n"


def test_an_interrupted_command_says_so_in_one_line(capsys):
    with pytest.raises(SystemExit) as caught, user_errors_in_one_line("train.py"):
        raise KeyboardInterrupt

    assert caught.value.code == 130 and capsys.readouterr().err == "train.py: interrupted\n"


@pytest.mark.parametrize("error", [KeyError("oops"), RuntimeError("shape '[2]' is invalid"), NotImplementedError()])
def test_our_own_mistakes_keep_their_traceback(error):
    with pytest.raises(type(error)), user_errors_in_one_line("train.py"):
        raise error


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("per_device_train_batch_size", "0", "per_device_train_batch_size is 0"),
        ("learning_rate", "-1", "learning_rate is -1"),
        ("learning_rate", "nan", "learning_rate is nan"),
        ("num_train_epochs", "-1", "num_train_epochs is -1"),
        ("seed", "-1", "seed is -1"),
        ("seed", str(2**32), "seed is 4294967296, expected less than 2.32"),
        ("optim_args", "momentum0.9", "optim_args is 'momentum0.9', expected name=value"),
        ("early_stopping_patience", "0", "early_stopping_patience is 0, expected at least 1"),
        ("gradient_accumulation_steps", "0", "gradient_accumulation_steps is 0, expected at least 1"),
        ("dataloader_num_workers", "-1", "dataloader_num_workers is -1, expected at least 0"),
    ],
)
def test_training_arguments_out_of_range_are_named(name, value, message):
    with pytest.raises(UsageError, match=message):
        parse_arguments((MagnetoTrainingArguments,), [f"--{name}={value}"])


@pytest.mark.parametrize("ratio", [0.0, float("nan"), float("inf")])
def test_a_ratio_of_strange_tags_is_a_number_above_0(ratio):
    with pytest.raises(UsageError, match=f"^outlier_ratio is {ratio}, expected a ratio above 0$"):
        PretrainingDataArguments("data", outlier_ratio=ratio)
    with pytest.raises(UsageError, match=f"^inject_outliers is {ratio}, expected a ratio above 0$"):
        PredictArguments("model", "data", "out.parquet", inject_outliers=ratio)


@pytest.mark.parametrize(
    ("optim", "optim_args", "message"),
    [
        ("sgd", "momentm=0.9", "optim_args has 'momentm' for sgd, expected some of momentum, dampening, nesterov$"),
        ("sgd", "momentum=0.9, fused=true", "optim_args has 'fused' for sgd"),
        ("sgd", "weight_decay=0.1", "optim_args has 'weight_decay' .*; --weight_decay is an option"),
        ("sgd", "momentum=much", "momentum is 'much' in optim_args, expected a number"),
        ("sgd", "momentum=nan", "momentum is 'nan' in optim_args, expected a number"),
        ("sgd", "momentum=0.9=1", "momentum is '0.9=1' in optim_args, expected a number"),
        ("sgd", "momentum=0.9,nesterov=on", "nesterov is 'on' in optim_args, expected true or false"),
        ("rmsprop", "dampening=0.9", "optim_args has 'dampening' for rmsprop"),
        ("adagrad", "momentum=0.8", "optim_args has 'momentum' for adagrad, expected some of lr_decay, eps"),
        ("adamw_torch", "adam_beta1=0.8", "optim_args has 'adam_beta1' .*, expected none; --adam_beta1 is an option"),
    ],
)
def test_what_the_optimizer_would_pass_over_is_refused(optim, optim_args, message):
    with pytest.raises(UsageError, match=message):
        parse_arguments((MagnetoTrainingArguments,), ["--optim", optim, "--optim_args", optim_args])


@pytest.mark.parametrize("optim", OPTIM_ARGS)
def test_all_that_is_taken_reaches_the_optimizer(optim, tmp_path):
    values = {name: "true" if name in OPTIM_FLAGS else "0.25" for name in OPTIM_ARGS[optim]}
    optim_args = ", ".join(f"{name}={value}" for name, value in values.items())
    args = MagnetoTrainingArguments(str(tmp_path), optim=optim, optim_args=optim_args or None)

    _, options = Trainer.get_optimizer_cls_and_kwargs(args)

    assert {name: options[name] for name in values} == {
        name: True if value == "true" else 0.25 for name, value in values.items()
    }


def test_another_optimizer_does_without_the_default(tmp_path):
    args = MagnetoTrainingArguments(str(tmp_path), optim="adamw_torch")
    assert dataclasses.replace(args).optim == "adamw_torch"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_strategy": "no"}, "eval_strategy is 'no', expected another with early_stopping_patience"),
        ({"metric_for_best_model": None}, "metric_for_best_model is None, expected another with early_stopping"),
    ],
)
def test_early_stopping_without_anything_to_go_by_is_refused(tmp_path, changes, message):
    options = {"early_stopping_patience": 1, "load_best_model_at_end": False}
    with pytest.raises(UsageError, match=message):
        MagnetoTrainingArguments(str(tmp_path), **options, **changes)
    MagnetoTrainingArguments(str(tmp_path), **options)  # the last epoch is kept, not the best one


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dataloader_drop_last", "true", "is True, expected False: Trainer would leave images out of evaluation"),
        ("label_smoothing_factor", "0.1", "is 0.1, expected 0.0: the model computes its losses itself"),
        ("gradient_checkpointing", "true", "is True, expected False: the model does not support it"),
        ("activation_checkpointing", "true", "is True, expected False: the model does not support it"),
        ("train_sampling_strategy", "group_by_length", "is 'group_by_length', expected 'random' or 'sequential': how"),
        ("remove_unused_columns", "true", "is True, expected False: the collator needs all columns"),
        ("include_for_metrics", "loss", r"is \['loss'\], expected \['inputs'\]: calibration needs to know the tags"),
        ("batch_eval_metrics", "true", "is True, expected False: metrics are those of a whole split"),
        ("eval_do_concat_batches", "false", "is False, expected True: metrics are those of a whole split"),
        ("prediction_loss_only", "true", "is True, expected False: metrics need the scores"),
        ("neftune_noise_alpha", "5", "is 5.0, expected None: the tags of a batch are embedded"),
        ("train_sampling_strategy", "batch_rebalance", "is 'batch_rebalance', expected 'random' or 'sequential': how"),
        ("bf16_full_eval", "true", "is True, expected False: Trainer would leave the model in half precision"),
        ("fp16_full_eval", "true", "is True, expected False: Trainer would leave the model in half precision"),
    ],
)
def test_what_trainer_offers_and_cannot_be_had_is_refused_with_the_reason(name, value, message):
    with pytest.raises(UsageError, match=f"^{name} {message}"):
        parse_arguments((MagnetoTrainingArguments,), [f"--{name}", value])


def test_values_that_change_nothing_are_taken():
    options = ["--dataloader_drop_last", "false", "--label_smoothing_factor", "0", "--gradient_checkpointing", "false"]
    (args,) = parse_arguments((MagnetoTrainingArguments,), [*options, "--train_sampling_strategy", "sequential"])
    assert args.train_sampling_strategy == "sequential"
    dataclasses.replace(args)  # what Trainer made of the values is taken, too


def test_processes_wait_a_day_for_each_other_on_cpus_too(tmp_path, monkeypatch):
    states = []
    monkeypatch.setattr(arguments_module, "PartialState", lambda **options: states.append(options))

    args = MagnetoTrainingArguments(str(tmp_path), use_cpu=True)
    MagnetoTrainingArguments(str(tmp_path), use_cpu=True, ddp_timeout=60)

    assert args.ddp_timeout_delta == timedelta(days=1)
    assert [state["timeout"] for state in states] == [timedelta(days=1), timedelta(minutes=1)]


def test_a_null_is_null_where_it_may_be_and_an_error_elsewhere(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("optim_args: null\nsave_total_limit: null\n")
    (arguments,) = parse_arguments((MagnetoTrainingArguments,), [str(file)])
    assert arguments.optim_args is None and arguments.save_total_limit is None

    file.write_text("learning_rate: null\n")
    with pytest.raises(UsageError, match="learning_rate is null, expected a value"):
        parse_arguments((MagnetoTrainingArguments,), [str(file)])


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        ("[tensorboard, wandb]", ["tensorboard", "wandb"], ["tensorboard", "wandb"]),
        ("[]", ["none"], []),
        ("none", ["none"], []),
        ("wandb", ["wandb"], ["wandb"]),
    ],
)
def test_the_curves_go_to_as_many_places_as_are_named(tmp_path, text, argv, expected):
    (from_file,) = parse_arguments((MagnetoTrainingArguments,), [write_yaml(tmp_path, f"report_to: {text}\n")])
    (from_command_line,) = parse_arguments((MagnetoTrainingArguments,), ["--report_to", *argv])
    assert from_file.report_to == from_command_line.report_to == expected
    assert MagnetoTrainingArguments(str(tmp_path)).report_to == ["tensorboard"]


@pytest.mark.parametrize(("name", "message"), [("hidden_size", "is empty, expected"), ("image_mean", "has 0 numbers")])
def test_an_empty_list_is_an_error_where_there_must_be_something(tmp_path, name, message):
    with pytest.raises(UsageError, match=f"{name} {message}"):
        parse_arguments((ModelArguments,), [write_yaml(tmp_path, f"{name}: []\n")])


def test_help_is_no_setting_of_a_file(tmp_path):
    (tmp_path / "config.yaml").write_text("help: true\n")
    with pytest.raises(UsageError, match="unknown field 'help'"):
        parse_arguments((MagnetoTrainingArguments,), [str(tmp_path / "config.yaml")])


def test_a_file_system_error_is_one_line_too(capsys):
    with pytest.raises(SystemExit) as ended, user_errors_in_one_line("train.py"):
        raise NotADirectoryError(20, "Not a directory", "file/x")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "train.py: error: [Errno 20] Not a directory: 'file/x'\n"


def test_weights_that_cannot_be_saved_are_one_line_too(capsys):
    with pytest.raises(SystemExit) as ended, user_errors_in_one_line("train.py"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: Error while serializing: ") and "No space left" in line


def test_a_full_disk_under_a_checkpoint_is_one_line_too(capsys):
    with pytest.raises(SystemExit) as ended, user_errors_in_one_line("train.py"):
        torch.save({"momentum": torch.zeros(100_000)}, "/dev/full")
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: a file cannot be written, the disk may be full: ")


def test_a_full_gpu_is_one_line_too(capsys):
    with pytest.raises(SystemExit) as ended, user_errors_in_one_line("train.py"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nGPU 0 has 1.00 GiB free.")
    assert ended.value.code == 1
    expected = "train.py: error: CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has 1.00 GiB free.\n"
    assert capsys.readouterr().err == expected


def test_a_file_for_two_commands_may_hold_the_fields_of_both(tmp_path):
    file = tmp_path / "both.yaml"
    file.write_text("dataset_name: photos\ntag_add_ratio: 0.25\noutlier_ratio: 2\n")
    (pretraining,) = parse_arguments((PretrainingDataArguments,), [str(file)], passed_over=(DataArguments,))
    assert (pretraining.dataset_name, pretraining.outlier_ratio) == ("photos", 2)
    with pytest.raises(UsageError, match="unknown field 'tag_add_ratio'"):
        parse_arguments((PretrainingDataArguments,), [str(file)])
    with pytest.raises(UsageError, match="unknown field 'tag_add_ratio' in the command line"):
        parse_arguments((PretrainingDataArguments,), [str(file), "--tag_add_ratio", "1"], passed_over=(DataArguments,))


def test_pretraining_passes_over_a_best_epoch_in_what_only_training_reports(tmp_path):
    def read(text, *argv):
        classes = (PretrainingDataArguments, PretrainingArguments)
        argv = [write_yaml(tmp_path, f"dataset_name: photos\n{text}\n"), *argv]
        _, args = parse_arguments(classes, argv, passed_over=(DataArguments,))
        return args.metric_for_best_model, args.greater_is_better

    for metric in (*TRAINING_METRICS, "eval_f1"):
        assert read(f"metric_for_best_model: {metric}\ngreater_is_better: false") == ("average_precision", True)
    assert read("metric_for_best_model: tag_average_precision") == ("tag_average_precision", True)
    assert read("metric_for_best_model: loss") == ("loss", False)
    assert read("learning_rate: 0.1", "--metric_for_best_model", "f1") == ("f1", True)  # which is refused later


def test_a_command_that_reads_no_stream_does_not_pass_over_the_wish_for_one(tmp_path):
    classes = {"argument_classes": (PretrainingDataArguments,), "passed_over": (DataArguments,)}
    wanted = write_yaml(tmp_path, "dataset_name: photos\nstreaming: true\n")
    with pytest.raises(UsageError, match="streaming is true in .*config.yaml, expected false: this command reads no"):
        parse_arguments(argv=[wanted], **classes)
    assert parse_arguments((DataArguments,), [wanted])[0].streaming
    (args,) = parse_arguments(argv=[write_yaml(tmp_path, "dataset_name: photos\nstreaming: false\n")], **classes)
    assert args.dataset_name == "photos"


class UnreadableRows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        raise DataError("row 0 is bad")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_worker_is_as_short_as_any_other(num_workers, capsys):
    with pytest.raises(SystemExit) as end, user_errors_in_one_line("train.py"):
        next(iter(torch.utils.data.DataLoader(UnreadableRows(), num_workers=num_workers)))

    assert end.value.code == 1
    assert capsys.readouterr().err == "train.py: error: row 0 is bad\n"
