import errno
import json
import os

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from magneto_training import prediction_parts
from magneto_training.arguments import PredictArguments, UserError
from magneto_training.evaluation import evaluate_selection
from magneto_training.photographs import undecoded
from magneto_training.prediction import has_ground_truth, load_model, load_prediction_split, predict_batches
from magneto_training.prediction_parts import check_output_file, predict_dataset
from magneto_training.report import write_report
from magneto_training.tag_data import DataError
from modeling_magneto import MagnetoConfig, MagnetoForOutlierDetection, MagnetoForTagSummarization, MagnetoProcessor


def make_args(dataset_name, output_file="out.parquet", **changes) -> PredictArguments:
    return PredictArguments("model", str(dataset_name), str(output_file), **changes)


def write_splits(folder, *names: str, **columns) -> None:
    row = {"item_id": "a", "tags": ["x", "y"], **columns}
    for name in names:
        Dataset.from_list([row]).to_parquet(folder / f"{name}.parquet")


@pytest.fixture
def rows(dataset_dir) -> Dataset:
    return load_prediction_split(make_args(dataset_dir), use_images=True)


# ------------------------------------------------------------------------------------------------------------ choosing


@pytest.mark.parametrize(
    "names, wanted, chosen",
    [
        (("train", "validation", "test"), None, "test"),
        (("train", "test"), "train", "train"),
        (("train",), None, "train"),
    ],
)
def test_the_split_is_the_wanted_one_or_test_or_the_only_one(tmp_path, names, wanted, chosen):
    for name in names:
        write_splits(tmp_path, name, item_id=name)

    dataset = load_prediction_split(make_args(tmp_path, split=wanted), use_images=False)

    assert dataset["item_id"][:] == [chosen]


def test_an_ambiguous_split_is_an_error(tmp_path):
    write_splits(tmp_path, "train", "validation")

    with pytest.raises(DataError, match="has the splits train, validation: choose one with --split"):
        load_prediction_split(make_args(tmp_path), use_images=False)


def test_a_missing_split_is_named(tmp_path):
    write_splits(tmp_path, "train")

    with pytest.raises(DataError, match="split 'nothing' is missing, found train"):
        load_prediction_split(make_args(tmp_path, split="nothing"), use_images=False)


@pytest.mark.parametrize(
    "important_tags, known",
    [([["x"], []], True), ([[], ["x"]], True), ([[], []], False), ([None, None], False), ([None, ["x"]], True)],
)
def test_ground_truth_is_there_when_a_row_has_an_important_tag(important_tags, known):
    features = datasets.Features(important_tags=datasets.List(datasets.Value("string")))

    assert has_ground_truth(Dataset.from_dict({"important_tags": important_tags}, features=features)) is known


def test_without_the_column_there_is_no_ground_truth():
    assert has_ground_truth(Dataset.from_dict({"tags": [["x"]]})) is False


@pytest.mark.parametrize("columns", [{}, {"important_tags": []}, {"important_tags": None}])
def test_rows_without_ground_truth_can_be_predicted(tmp_path, columns):
    write_splits(tmp_path, "test", **columns)

    dataset = load_prediction_split(make_args(tmp_path), use_images=False)

    assert dataset.column_names == ["item_id", "tags"]


def test_bad_tags_stop_before_anything_is_predicted(tmp_path):
    rows = [{"item_id": "a", "tags": ["x"]}, {"item_id": "b", "tags": []}]
    Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")

    with pytest.raises(DataError, match="1 with no tags .item_id b."):
        load_prediction_split(make_args(tmp_path), use_images=False)


# ------------------------------------------------------------------------------------------------------------- scoring


def flatten(batches) -> list[tuple]:
    return [
        (row["item_id"], result) for batch in batches for row, result in zip(batch.rows, batch.results, strict=True)
    ]


@pytest.mark.parametrize("batch_size, num_workers", [(1, 0), (5, 0), (5, 1)])
def test_the_size_of_the_batch_changes_no_score(tiny_model, processor, rows, batch_size, num_workers):
    expected = flatten(predict_batches(tiny_model, processor, undecoded(rows), batch_size=64))
    found = flatten(predict_batches(tiny_model, processor, undecoded(rows), batch_size, num_workers))

    assert [item for item, _ in found] == [item for item, _ in expected] == rows["item_id"][:]
    for (_, one), (_, other), tags in zip(found, expected, rows["tags"][:], strict=True):
        assert [tag for tag, _ in one["tags"]] == [tag for tag, _ in other["tags"]] == tags
        assert [score for _, score in one["tags"]] == pytest.approx([score for _, score in other["tags"]], abs=1e-5)


def test_scores_are_the_models(tiny_model, processor, rows):
    (batch,) = predict_batches(tiny_model, processor, undecoded(rows), batch_size=64)

    with torch.no_grad():
        outputs = tiny_model(**processor(rows["image"][:], rows["tags"][:]))
    for index, result in enumerate(batch.results):
        expected = torch.sigmoid(outputs.logits[index])[: len(result["tags"])].tolist()
        assert [score for _, score in result["tags"]] == pytest.approx(expected, abs=1e-6)
        assert result["selected_tags"] == [tag for tag, score in result["tags"] if score >= 0.5]


@pytest.mark.parametrize("options", [{}, {"threshold": 0.4}, {"top_k": 1}])
def test_a_prediction_file_holds_every_row_once_and_in_order(tiny_model, processor, rows, tmp_path, options):
    output_file = tmp_path / "new" / "out.parquet"
    args = make_args("data", output_file, batch_size=4, **options)

    metrics = predict_dataset(Accelerator(cpu=True), tiny_model, processor, rows, args)

    table = pq.read_table(output_file).to_pydict()
    assert list(table) == ["item_id", "tags", "scores", "selected_tags"]
    assert table["item_id"] == rows["item_id"][:] and table["tags"] == rows["tags"][:]
    for tags, scores, selected in zip(table["tags"], table["scores"], table["selected_tags"], strict=True):
        if "top_k" in options:
            assert selected == [tags[int(np.argmax(scores))]]
        else:
            assert selected == [
                tag for tag, score in zip(tags, scores, strict=True) if score >= options.get("threshold", 0.5)
            ]
    assert {path.name for path in output_file.parent.iterdir()} == {"out.parquet", "out.metrics.json"}

    pairs = list(zip(table["tags"], table["selected_tags"], rows["important_tags"][:], strict=True))
    expected = evaluate_selection(
        {"logits": [np.array([tag in selected for tag in tags], np.int8) for tags, selected, _ in pairs]},
        [np.array([tag in important for tag in tags], np.int8) for tags, _, important in pairs],
    )
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    assert {"tag_f1", "image_f1"} <= set(metrics)
    written = json.loads((output_file.parent / "out.metrics.json").read_text())
    assert written["num_images"] == len(rows) and written["f1"] == metrics["f1"]


def test_without_ground_truth_there_are_no_metrics(tiny_model, processor, rows, tmp_path):
    args = make_args("data", tmp_path / "out.parquet")

    metrics = predict_dataset(
        Accelerator(cpu=True), tiny_model, processor, rows.remove_columns("important_tags"), args
    )

    assert metrics == {}
    assert [path.name for path in tmp_path.glob("out*")] == ["out.parquet"]


def test_an_interrupted_prediction_leaves_no_file_under_the_final_name(tiny_model, processor, rows, tmp_path):
    output_file = tmp_path / "out.parquet"
    output_file.write_bytes(b"the one before")
    bad = Dataset.from_list([*rows.select(range(3)), {**rows[3], "tags": [""]}], features=rows.features)

    with pytest.raises(ValueError):
        predict_dataset(
            Accelerator(cpu=True), tiny_model, processor, bad, make_args("data", output_file, batch_size=2)
        )
    assert output_file.read_bytes() == b"the one before"

    predict_dataset(Accelerator(cpu=True), tiny_model, processor, rows, make_args("data", output_file))
    assert pq.read_table(output_file).num_rows == len(rows)
    assert not list(tmp_path.glob("*.parts"))


# ------------------------------------------------------------------------------------------------------------- loading


def test_a_saved_model_is_loaded_in_eval_mode(tiny_model, processor, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    model, loaded_processor = load_model(str(tmp_path))

    assert type(model) is MagnetoForTagSummarization and not model.training
    assert type(loaded_processor) is MagnetoProcessor


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "runs/nus_wide/model"])
def test_a_model_folder_that_is_not_there_is_called_so(name):
    with pytest.raises(UserError, match=f"^the model '{name}' cannot be loaded: there is no such folder$"):
        load_model(name)


def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(UserError, match="the model .* cannot be loaded") as caught:
        load_model(str(tmp_path / "nowhere"))

    assert "\n" not in str(caught.value)


def test_a_pre_trained_model_is_refused(tiny_config: MagnetoConfig, processor, tmp_path):
    MagnetoForOutlierDetection(tiny_config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    with pytest.raises(UserError, match="holds a MagnetoForOutlierDetection, expected a MagnetoForTagSummarization"):
        load_model(str(tmp_path))


def test_all_rows_are_predicted_and_the_labelled_ones_measured(tiny_model, processor, tmp_path):
    rows = [
        {"item_id": "known", "tags": ["red", "blue"], "important_tags": ["red"]},
        {"item_id": "unknown", "tags": ["green"], "important_tags": []},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    args = make_args(tmp_path, tmp_path / "out" / "x.parquet", batch_size=2)
    check_output_file(args)
    processor.use_images = False
    model = MagnetoForTagSummarization(MagnetoConfig(**{**tiny_model.config.to_dict(), "streams": "tag"})).eval()

    metrics = predict_dataset(Accelerator(), model, processor, load_prediction_split(args, use_images=False), args)

    assert metrics["num_images"] == 1 and metrics["keep_all_precision"] == 50
    assert pq.read_table(args.output_file)["item_id"].to_pylist() == ["known", "unknown"]


@pytest.mark.parametrize("stored", [{"rule": "expected_f1"}, {"tag_thresholds": {"red": 1.0}}])
@pytest.mark.parametrize("rule", [{}, {"threshold": 0.9}, {"threshold": 0.0}, {"top_k": 1}])
def test_the_rule_in_force_is_that_of_every_output(tiny_model, processor, rows, tmp_path, rule, stored):
    processor.use_images = False
    processor.selection = stored
    model = MagnetoForTagSummarization(MagnetoConfig(**{**tiny_model.config.to_dict(), "streams": "tag"})).eval()
    args = make_args("unused", tmp_path / "out.parquet", **rule)

    metrics = predict_dataset(Accelerator(), model, processor, rows, args)

    assert metrics["tag_f1"] == metrics["f1"]  # a single stream is its own final output


def test_the_models_own_rule_is_in_force_unless_another_is_named(tiny_model, processor, rows, tmp_path):
    processor.selection = {"rule": "top_k", "top_k": 1}

    def selected(**rule):
        args = make_args("unused", tmp_path / "out.parquet", **rule)
        predict_dataset(Accelerator(cpu=True), tiny_model, processor, rows, args)
        return pq.read_table(args.output_file)["selected_tags"].to_pylist()

    assert {len(tags) for tags in selected()} == {1}
    assert selected(selection="threshold") == selected(threshold=0.5) != selected()
    assert all(selected(selection="expected_f1"))


def test_a_tag_only_model_reads_no_photographs(tiny_model, processor, rows, tmp_path):
    broken = rows.cast_column("image", datasets.Image(decode=False))
    broken = broken.map(lambda row: {"image": {"bytes": row["image"]["bytes"][:50], "path": None}})
    broken = broken.cast_column("image", datasets.Image())
    processor.use_images = False
    model = MagnetoForTagSummarization(MagnetoConfig(**{**tiny_model.config.to_dict(), "streams": "tag"})).eval()
    args = make_args("unused", tmp_path / "out.parquet")

    metrics = predict_dataset(Accelerator(), model, processor, broken, args)
    write_report(model, processor, broken, args, metrics)

    assert metrics["num_images"] == len(rows)
    assert "<img" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", ["folder.parquet", "file/out.parquet"])
def test_a_result_that_could_not_be_written_stops_before_the_work(tmp_path, name):
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"output_file .*{name}"):
        check_output_file(make_args("unused", tmp_path / name))


def test_a_folder_that_cannot_be_written_to_stops_before_the_work(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), dir)

    monkeypatch.setattr(prediction_parts, "TemporaryFile", refuse)  # a test may run as root, who may write anywhere
    with pytest.raises(UserError, match="output_file .*out.parquet' cannot be written: Read-only file system"):
        check_output_file(make_args("unused", tmp_path / "out.parquet"))


def test_a_damaged_model_is_named(tiny_model, processor, tmp_path):
    for part in (tiny_model, processor):
        part.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(UserError, match="the model .* cannot be loaded"):
        load_model(str(tmp_path))

    (tmp_path / "model.safetensors").write_bytes(weights)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": "eight"}))
    with pytest.raises(UserError, match="hidden_size"):
        load_model(str(tmp_path))
