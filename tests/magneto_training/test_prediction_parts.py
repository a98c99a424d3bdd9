"""Large predictions: parts, resuming, skipped rows, streams; the result is the same whatever happened on the way."""

import csv
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from conftest import COLORS, damage, make_rows
from datasets import Dataset
from tqdm.auto import tqdm

from magneto_training import prediction, prediction_parts
from magneto_training.arguments import PredictArguments, UsageError, UserError
from magneto_training.prediction import load_prediction_split, rows_for_model
from magneto_training.prediction_parts import (
    describe_files,
    load_backbone,
    parts_folder,
    predict_dataset,
    predict_parts,
    read_skipped,
)
from magneto_training.report import write_report
from magneto_training.tag_data import DataError
from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization

ROOT = Path(__file__).parents[2]
NUM_ROWS = 22


@pytest.fixture
def rows() -> list[dict]:
    return make_rows(NUM_ROWS, seed=5)


@pytest.fixture
def predict(tiny_model, processor, tmp_path):
    """Predicts rows; returns what OUT.parquet holds, and the metrics."""

    def predict(rows: list[dict], name: str = "out", model=tiny_model, **options):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        features = datasets.Features(
            item_id=datasets.Value("string"),
            image=datasets.Image(),
            tags=datasets.List(datasets.Value("string")),
            important_tags=datasets.List(datasets.Value("string")),
        )
        Dataset.from_list(rows, features=features).to_parquet(folder / "test.parquet")
        options = {"batch_size": 4, "rows_per_part": 6, **options}
        predict.args = PredictArguments("model", str(folder), str(tmp_path / f"{name}.parquet"), **options)
        predict.dataset = load_prediction_split(predict.args, processor.use_images)
        inputs = Accelerator(cpu=True), model, processor, predict.dataset, predict.args
        metrics = predict_dataset(*inputs, load_backbone(*inputs))
        return pq.read_table(predict.args.output_file).to_pylist(), metrics

    return predict


def assert_same(found: list[dict], expected: list[dict]) -> None:
    assert [row["item_id"] for row in found] == [row["item_id"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["tags"] == other["tags"] and one["selected_tags"] == other["selected_tags"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)


def break_photograph(row: dict) -> dict:
    return {**row, "image": {"bytes": b"no photograph", "path": None}}


class WatchedModel(MagnetoForTagSummarization):
    """Stands in for a process that is killed: fails after some batches. Knows how many tags the images had."""

    batches_left = 1000

    def forward(self, input_ids, attention_mask, **kwargs):
        if self.batches_left == 0:
            raise KeyboardInterrupt
        self.batches_left -= 1
        self.lengths += attention_mask.sum(1).tolist()
        return super().forward(input_ids, attention_mask, **kwargs)


@pytest.fixture
def watched_model(tiny_model) -> WatchedModel:
    model = WatchedModel(tiny_model.config).eval()
    model.load_state_dict(tiny_model.state_dict())
    model.lengths = []
    return model


# ----------------------------------------------------------------------------------------------- whatever the settings


@pytest.mark.parametrize(
    "options",
    [{"rows_per_part": 1}, {"rows_per_part": 1000}, {"batch_size": 1}, {"num_workers": 2}, {"streaming": True}],
    ids=str,
)
@pytest.mark.parametrize("inject_outliers", [None, 0.5])
def test_results_and_metrics_are_the_same_whatever_the_way(predict, rows, options, inject_outliers):
    expected, metrics = predict(rows, inject_outliers=inject_outliers)
    found, same_metrics = predict(rows, "other", inject_outliers=inject_outliers, **options)

    assert [row["item_id"] for row in expected] == [row["item_id"] for row in rows]
    assert_same(found, expected)
    assert same_metrics == pytest.approx(metrics, nan_ok=True)
    assert metrics["num_images"] == NUM_ROWS and ("outlier_percent" in metrics) == (inject_outliers is not None)


def test_rows_of_a_batch_have_about_as_many_tags(predict, rows, watched_model):
    predict(rows, model=watched_model, rows_per_part=100)

    assert watched_model.lengths == sorted(len(row["tags"]) for row in rows)


def test_an_endless_list_of_tags_makes_no_other_image_wait(predict, rows, monkeypatch, processor):
    monkeypatch.setattr(prediction_parts, "MAX_TAGS_PER_IMAGE", 5)
    rows[3]["tags"] = sorted(COLORS) + [f"unheard of {index}" for index in range(50)]
    predict(rows, rows_per_part=100, batch_size=10)
    reader = rows_for_model(predict.dataset, processor, predict.args)

    part = prediction_parts._Part(reader, range(len(rows)), predict.args)

    assert part.batches[-1] == [3] and sorted(sum(part.batches, [])) == list(range(len(rows)))
    assert [len(batch) for batch in part.batches] == [10, 10, 1, 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_parts_of_a_stream_come_from_one_data_loader_and_are_the_very_same(
    predict, rows, monkeypatch, num_workers
):
    expected, metrics = predict(rows, inject_outliers=0.5)
    loaders = []

    class CountedLoader(prediction.DataLoader):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            loaders.append(self)

    monkeypatch.setattr(prediction, "DataLoader", CountedLoader)

    streamed = predict(rows, "streamed", inject_outliers=0.5, streaming=True, num_workers=num_workers)

    assert streamed == (expected, metrics)
    assert [loader.num_workers for loader in loaders] == [num_workers]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("rank", "share"), [(0, [range(6), range(12, 18)]), (1, [range(6, 12), range(18, 22)])])
def test_processes_make_every_other_part(predict, rows, tiny_model, processor, streaming, rank, share):
    predict(rows, streaming=streaming)
    folder = parts_folder(predict.args.output_file)
    folder.mkdir()
    process = SimpleNamespace(
        device=torch.device("cpu"), process_index=rank, num_processes=2, is_local_main_process=False
    )

    num_rows = prediction_parts._predict_share(process, tiny_model, processor, predict.dataset, predict.args, None)

    assert num_rows == NUM_ROWS
    assert sorted(path.name for path in folder.iterdir()) == [
        f"rows-{part.start:09d}-{part.stop:09d}.parquet" for part in share
    ]


def test_a_stream_needs_parquet(predict, rows, tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "test.csv").write_text("item_id,tags\na,x\n")
    args = PredictArguments("model", str(tmp_path / "csv"), "out.parquet", streaming=True)

    with pytest.raises(DataError, match="streaming needs .* Parquet"):
        load_prediction_split(args, use_images=False)


def test_ray_does_not_stream():
    with pytest.raises(UsageError, match="streaming"):
        PredictArguments("model", "data", "out.parquet", streaming=True, engine="ray")


def test_a_damaged_file_of_a_stream_is_reported_with_its_dataset(predict, rows, tiny_model, processor, tmp_path):
    predict(
        rows, streaming=True, num_workers=0
    )  # workers of a loader that fails as it starts are ended some time later
    damage(tmp_path / "data" / "test.parquet")

    name = re.escape(str(tmp_path / "data"))
    with pytest.raises(DataError, match=rf"^{name}: the rows cannot be read: OSError: [^\n]+$"):
        predict_dataset(Accelerator(cpu=True), tiny_model, processor, predict.dataset, predict.args)


# ------------------------------------------------------------------------------------------------------------ bad rows


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"streaming": True}], ids=str)
def test_an_unreadable_photograph_stops_with_its_item_id(predict, rows, tmp_path, options):
    rows[13] = break_photograph(rows[13])

    with pytest.raises(
        DataError, match="row 13 .item_id im13. has a missing or unreadable photograph; --skip_bad_rows"
    ) as caught:
        predict(rows, **options)

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.parquet").exists()


def test_tags_that_the_model_does_not_know_are_counted(predict, processor, rows):
    predict(rows)
    assert "unknown" not in describe_files(predict.args, processor)

    predict([*rows, {**rows[0], "tags": ["Blue", "#blue", "ocean"], "important_tags": ["Blue"]}])
    num_tags = sum(len(row["tags"]) for row in rows) + 3
    assert f"\n2 of {num_tags} tags are unknown to the model" in describe_files(predict.args, processor)


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"streaming": True}], ids=str)
def test_bad_rows_are_skipped_listed_and_counted(predict, processor, rows, tmp_path, monkeypatch, options):
    expected, _ = predict(rows, "all")
    progress = []
    monkeypatch.setattr(prediction_parts, "tqdm", lambda **settings: progress.append(tqdm(**settings)) or progress[-1])
    bad = list(rows)
    for index in (2, 12, 13, 14, 15, 16, 17):  # all of the third part
        bad[index] = break_photograph(bad[index])
    bad[7] = {**bad[7], "tags": []}
    bad[21] = {**bad[21], "important_tags": ["purple"]}

    found, metrics = predict(bad, skip_bad_rows=True, **options)
    assert progress[-1].n == NUM_ROWS

    gone = [2, 7, 12, 13, 14, 15, 16, 17, 21]
    assert_same(found, [row for index, row in enumerate(expected) if index not in gone])
    assert metrics["num_images"] == NUM_ROWS - len(gone)
    with (tmp_path / "out.skipped.csv").open(newline="") as file:
        listed = [tuple(row.values()) for row in csv.DictReader(file)]
    reasons = {7: "no tags", 21: "important_tags that are not among tags"}
    assert listed == [(str(i), f"im{i}", reasons.get(i, "a missing or unreadable photograph")) for i in gone]
    assert describe_files(predict.args, processor).endswith(f"9 rows were left out: {tmp_path / 'out.skipped.csv'}")

    predict(rows)
    assert not (tmp_path / "out.skipped.csv").exists() and not read_skipped(tmp_path / "out.parquet")


def test_the_report_shows_the_rows_that_were_predicted(tiny_model, processor, predict, rows, tmp_path):
    for index in (0, 5, 6):
        rows[index] = break_photograph(rows[index])
    rows = [{**row, "important_tags": row["tags"][:1]} for row in rows]
    _, metrics = predict(rows, skip_bad_rows=True, selection="threshold", threshold=0.0)

    write_report(tiny_model, processor, predict.dataset, predict.args, metrics)

    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == NUM_ROWS - 3  # nobody's photograph is missing
    for index, row in enumerate(rows):
        assert (f">{row['item_id']}<" in page) == (index not in (0, 5, 6))


def test_without_a_good_row_there_is_no_result(predict, rows, tmp_path):
    with pytest.raises(DataError, match="all 22 rows are bad"):
        predict([break_photograph(row) for row in rows], skip_bad_rows=True)

    assert not list(tmp_path.glob("out*"))


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("streaming", [False, True])
def test_an_interrupted_prediction_goes_on_where_it_was(predict, rows, watched_model, tmp_path, streaming):
    expected, metrics = predict(rows, "whole", inject_outliers=0.5, streaming=streaming)
    watched_model.batches_left = 5  # two a part: the third is begun

    with pytest.raises(KeyboardInterrupt):
        predict(rows, model=watched_model, inject_outliers=0.5, streaming=streaming)
    folder = parts_folder(str(tmp_path / "out.parquet"))
    assert len(list(folder.glob("*.parquet"))) == 2 and not (tmp_path / "out.parquet").exists()

    watched_model.batches_left = 3  # just enough for the third, and the fourth with its 4 rows
    found, same_metrics = predict(rows, model=watched_model, inject_outliers=0.5, streaming=streaming)
    assert_same(found, expected)
    assert same_metrics == metrics == json.loads((tmp_path / "out.metrics.json").read_text())
    assert not folder.exists() and watched_model.batches_left == 0


def test_photographs_of_streamed_parts_that_are_there_are_not_looked_at(predict, rows, watched_model):
    expected, _ = predict(rows, "whole")
    watched_model.batches_left = 5
    with pytest.raises(KeyboardInterrupt):
        predict(rows, model=watched_model, streaming=True)
    rows[:12] = map(break_photograph, rows[:12])

    watched_model.batches_left = 3
    found, _ = predict(rows, model=watched_model, streaming=True)

    assert_same(found, expected)


def test_streamed_parts_of_other_rows_are_not_mixed(predict, rows, watched_model, tmp_path):
    expected, _ = predict(rows, "whole")
    bad = [*rows[:13], {**rows[13], "tags": []}, *rows[14:]]
    with pytest.raises(DataError, match="row 13 .item_id im13. has no tags"):
        predict(bad, streaming=True, num_workers=0)  # workers would be further ahead than the parts
    folder = parts_folder(str(tmp_path / "out.parquet"))
    assert len(list(folder.glob("*.parquet"))) == 2

    for others, start in (([*rows[:3], *rows[5:13], *rows[14:]], 0), ([*rows[:9], *rows[10:]], 6)):
        file = folder / f"rows-{start:09d}-{start + 6:09d}.parquet"
        message = (
            f"{file} was made of other rows than rows {start} to {start + 5} of {tmp_path / 'data'} are now; "
            f"give the dataset back its rows, or remove the folder {folder} to start afresh"
        )
        # Not `as raised`: the error, kept, would keep the data loader until Python looks for cycles. Its pipes would
        # then be closed twice, the second time perhaps as another test's files, which have their numbers by now.
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            predict(others, model=watched_model, streaming=True)
    assert not watched_model.lengths and not (tmp_path / "out.parquet").exists()

    watched_model.batches_left = 3
    found, _ = predict(rows, model=watched_model, streaming=True)
    assert_same(found, expected)


def test_what_is_left_of_a_longer_stream_is_not_in_the_result(predict, rows, watched_model, monkeypatch, tmp_path):
    expected, _ = predict(rows, "whole")
    with monkeypatch.context() as patched:
        patched.setattr(prediction_parts, "_finish", lambda *_: {})
        with pytest.raises(FileNotFoundError):  # all parts are there, and no output
            predict(rows, streaming=True)

    watched_model.batches_left = 1  # the last part has 2 rows now, and another name
    found, metrics = predict(rows[:20], model=watched_model, streaming=True)

    assert_same(found, expected[:20])
    assert metrics["num_images"] == 20 and not parts_folder(str(tmp_path / "out.parquet")).exists()


def test_the_digest_of_rows_is_of_their_contents(rows):
    tagged = [{"item_id": row["item_id"], "tags": row["tags"]} for row in rows]
    tagged[2]["tags"], tagged[4]["item_id"], tagged[7]["tags"] = None, None, [None]
    whole = pa.Table.from_pylist(tagged)
    lengths = (2, 3, 5)  # as row groups may be

    def digest(table: pa.Table) -> str:
        return prediction_parts._digest_rows([table])

    cut = pa.concat_tables([whole[sum(lengths[:index]) :][:length] for index, length in enumerate(lengths)])
    assert digest(whole[:10]) == digest(cut) == digest(pa.Table.from_pylist(tagged[:10]))
    assert digest(whole[3:9]) == digest(pa.Table.from_pylist(tagged[3:9]))
    assert len({digest(whole[start:stop]) for start in range(3) for stop in range(3, 10)}) == 21


def test_parts_may_be_made_by_anybody_in_any_order(tiny_model, processor, predict, rows, watched_model):
    expected, metrics = predict(rows, "whole")
    watched_model.batches_left = 0
    with pytest.raises(KeyboardInterrupt):
        predict(rows, model=watched_model)

    reader = rows_for_model(predict.dataset, processor, predict.args)
    for part in (range(18, 22), range(6, 12)):
        assert sum(predict_parts(tiny_model, processor, reader, [(part, reader)], predict.args)) == len(part)

    watched_model.batches_left = 4  # two each for the other two
    found, same_metrics = predict(rows, model=watched_model)
    assert_same(found, expected)
    assert same_metrics == metrics


@pytest.mark.parametrize(
    ("cores", "processes", "num_rows", "expected"),
    [(8, 1, 100_000, 8), (8, 2, 100_000, 4), (8, 1, 200, 3), (8, 1, 100, 0), (1, 1, 100_000, 0), (96, 1, 100_000, 96)],
)
def test_a_process_starts_workers_on_its_share_of_the_cores(
    tiny_model, processor, tmp_path, monkeypatch, cores, processes, num_rows, expected
):
    args = PredictArguments("model", "data", str(tmp_path / "out.parquet"))
    asked = []
    monkeypatch.setattr(prediction_parts.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(
        prediction_parts, "predict_batches", lambda *positional, **_: asked.append(positional[4]) or []
    )

    assert list(predict_parts(tiny_model, processor, None, [(range(num_rows), None)], args)) == []

    assert asked == [expected]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_lower_precision_changes_scores_a_little(predict, rows, precision):
    exact, _ = predict(rows)
    rounded, _ = predict(rows, **{precision: True})

    differences = [
        abs(score - other)
        for row, other_row in zip(exact, rounded, strict=True)
        for score, other in zip(row["scores"], other_row["scores"], strict=True)
    ]
    assert 0 < max(differences) < 0.02


def test_parts_of_other_settings_are_not_mixed(predict, rows, watched_model, processor, tmp_path):
    def interrupt(**options):
        watched_model.batches_left = 2
        with pytest.raises(KeyboardInterrupt):
            predict(rows, model=watched_model, **options)
        watched_model.batches_left = 100

    interrupt()
    for options, name in (
        ({"threshold": 0.4}, "threshold"),
        ({"bf16": True}, "bf16"),
        ({"rows_per_part": 5}, "rows_per_part"),
        ({"inject_outliers": 1.0, "seed": 3}, "inject_outliers, seed"),
    ):
        with pytest.raises(UserError, match=f"out.parquet.parts holds .* with another {name}; .* remove the folder"):
            predict(rows, model=watched_model, **options)
    with pytest.raises(UserError, match="with another rows;"):
        predict([*rows[:3], {**rows[3], "item_id": "new"}, *rows[4:]], model=watched_model)
    processor.selection = {"rule": "top_k", "top_k": 2}
    with pytest.raises(UserError, match="with another model;"):
        predict(rows, model=watched_model)
    processor.selection = {"rule": "threshold", "threshold": 0.5}
    with pytest.raises(UserError, match="with another model;"):
        predict(rows, model=MagnetoForTagSummarization(watched_model.config).eval())  # other weights

    predict(rows, model=watched_model, batch_size=3, num_workers=1)  # these change no result
    assert not parts_folder(str(tmp_path / "out.parquet")).exists()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("content", ["cut", "empty", "another table"])
def test_a_damaged_part_is_named_and_made_again(predict, rows, watched_model, tmp_path, capsys, content, streaming):
    expected, metrics = predict(rows, "whole")
    watched_model.batches_left = 4
    with pytest.raises(KeyboardInterrupt):
        predict(rows, model=watched_model, streaming=streaming)
    file = min(parts_folder(str(tmp_path / "out.parquet")).glob("rows-*.parquet"))
    if content == "another table":  # without what the metrics need
        pq.write_table(pa.table({"item_id": ["a"]}), file)
    else:
        file.write_bytes(file.read_bytes()[:-30] if content == "cut" else b"")
    capsys.readouterr()

    watched_model.batches_left = 100
    found, same_metrics = predict(rows, model=watched_model, streaming=streaming)

    assert (f"{file} is damaged, and is made again" in capsys.readouterr().out) == (content != "another table")
    assert_same(found, expected)
    assert same_metrics == metrics


def test_a_part_whose_rows_are_damaged_is_named_and_no_result_written(predict, rows, watched_model, tmp_path):
    watched_model.batches_left = 4
    with pytest.raises(KeyboardInterrupt):
        predict(rows, model=watched_model)
    file = min(parts_folder(str(tmp_path / "out.parquet")).glob("rows-*.parquet"))
    damage(file)
    watched_model.batches_left = 100

    with pytest.raises(
        UserError, match=f"^{re.escape(str(file))} cannot be read: .*; the same command makes it again"
    ):
        predict(rows, model=watched_model)
    assert not (tmp_path / "out.parquet").exists()

    file.unlink()
    found, _ = predict(rows, model=watched_model)
    assert len(found) == NUM_ROWS


def test_a_full_disk_is_told_with_the_name_of_the_file(predict, rows, monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError("[Errno 28] Error writing bytes to file")

    out = re.escape(str(tmp_path / "out.parquet"))
    for name, file in (("write_table", rf"{out}.parts/rows-000000000-[0-9]+.parquet"), ("ParquetWriter", out)):
        with monkeypatch.context() as patched:
            patched.setattr(prediction_parts, "pq", SimpleNamespace(**{**vars(pq), name: refuse}))
            with pytest.raises(UserError, match=rf"^{file} cannot be written: .Errno 28. Error writing bytes"):
                predict(rows)

    found, _ = predict(rows)
    assert len(found) == NUM_ROWS


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_damaged_settings_are_of_another_prediction(predict, rows, watched_model, tmp_path, content):
    watched_model.batches_left = 2
    with pytest.raises(KeyboardInterrupt):
        predict(rows, model=watched_model)
    (parts_folder(str(tmp_path / "out.parquet")) / "settings.json").write_text(content)

    with pytest.raises(UserError, match="holds parts of a prediction that was not finished, with another model, rows"):
        predict(rows, model=watched_model)


def test_skipping_may_begin_later_but_not_end_unnoticed(predict, rows, watched_model):
    rows[20] = break_photograph(rows[20])
    with pytest.raises(DataError, match="im20"):
        predict(rows)
    watched_model.batches_left = 1  # the others are there
    found, _ = predict(rows, model=watched_model, skip_bad_rows=True)
    assert len(found) == NUM_ROWS - 1

    rows[1] = break_photograph(rows[1])
    watched_model.batches_left = 3
    with pytest.raises(KeyboardInterrupt):
        predict(rows, model=watched_model, skip_bad_rows=True)
    rows[20] = make_rows(NUM_ROWS, seed=5)[20]
    watched_model.batches_left = 100
    with pytest.raises(DataError, match="row 1 .item_id im1. has a missing or unreadable photograph"):
        predict(rows, model=watched_model)


# ------------------------------------------------------------------------------------------------------------- killing


def test_every_row_is_there_exactly_once_after_kills_at_random_moments(tiny_model, processor, tmp_path):
    tiny_model = MagnetoForTagSummarization(MagnetoConfig(**{**tiny_model.config.to_dict(), "streams": "tag"}))
    processor.use_images = False
    for part in (tiny_model, processor):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = Dataset.from_list([{**row, "image": None} for row in make_rows(400)]).remove_columns("image")
    rows.to_parquet(tmp_path / "data" / "test.parquet")
    output_file = tmp_path / "out.parquet"
    command = [sys.executable, str(ROOT / "predict.py"), "--model_name_or_path", str(tmp_path / "model")]
    command += ["--dataset_name", str(tmp_path / "data"), "--output_file", str(output_file)]
    command += ["--rows_per_part", "5", "--report_images", "0"]
    folder, rng = parts_folder(str(output_file)), random.Random(0)

    for wanted in (1, 20, 45):  # parts, and then any moment while the next ones are made
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while len(list(folder.glob("*.parquet"))) < wanted:
            assert process.poll() is None, process.stderr.read().decode()[-2000:]
            time.sleep(0.001)
        time.sleep(0.02 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not output_file.exists()
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0 and f"400 images: {output_file}" in done.stdout, done.stderr[-2000:]
    predicted = pq.read_table(output_file).to_pylist()
    assert [row["item_id"] for row in predicted] == rows["item_id"][:]
    assert [row["tags"] for row in predicted] == rows["tags"][:]
    assert json.loads((tmp_path / "out.metrics.json").read_text())["num_images"] == 400
    assert not folder.exists()
