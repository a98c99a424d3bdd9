import re

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from conftest import COLORS, damage, make_rows
from torch.utils.data import DataLoader

from magneto_training.arguments import DataArguments, MagnetoTrainingArguments, UsageError
from magneto_training.collation import TagCollator
from magneto_training.evaluation import compute_metrics
from magneto_training.photographs import undecoded
from magneto_training.streaming import (
    StreamedBatches,
    StreamedCollator,
    StreamedDataset,
    check_streaming,
    load_streamed_splits,
)
from magneto_training.tag_data import DataError, build_vocabulary, load_training_splits
from magneto_training.trainer import MagnetoTrainer
from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization, MagnetoProcessor


@pytest.fixture(autouse=True)
def no_pause_after_an_epoch(monkeypatch):
    """`datasets` lets the threads that read Parquet files end in peace, for five seconds."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def write_dataset(folder, train: list[dict], num_files: int = 3):
    """Photographs as bytes; the training rows in several files."""
    folder.mkdir()
    splits = {"validation-0": make_rows(8, seed=1)}
    splits |= {f"train-{file}": train[file::num_files] for file in range(num_files)}
    for name, rows in splits.items():
        table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        table.to_parquet(folder / f"{name}.parquet")
    return folder


def spoil_photographs(folder, item_ids: set[str]) -> None:
    for file in folder.glob("train-*.parquet"):
        features = datasets.Features.from_arrow_schema(pq.read_schema(file))
        rows = pq.read_table(file).to_pylist()
        for row in rows:
            if row["item_id"] in item_ids:
                row["image"]["bytes"] = row["image"]["bytes"][:60]
        datasets.Dataset.from_list(rows, features=features).to_parquet(file)


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "data", make_rows(23))


def stream(folder, seed: int = 0, buffer_size: int = 6, use_images: bool = True, **options) -> StreamedDataset:
    data_args = DataArguments(dataset_name=str(folder), streaming=True, **options)
    return StreamedDataset(load_streamed_splits(data_args, use_images)[0], seed, buffer_size)


def order(dataset: StreamedDataset, epoch: int) -> list[tuple[str, int]]:
    dataset.set_epoch(epoch)
    return [(row["item_id"], row["seed"]) for row in dataset]


ALL_ITEMS = sorted(f"im{index}" for index in range(23))


def test_each_epoch_has_every_row_once_in_an_order_of_its_own_that_the_seed_decides(folder):
    first, second = (order(stream(folder), epoch) for epoch in (0, 1))

    for epoch in (first, second):
        assert sorted(item_id for item_id, _ in epoch) == ALL_ITEMS
        assert len({seed for _, seed in epoch}) == 23
    assert [item_id for item_id, _ in first] != [item_id for item_id, _ in second]
    assert {seed for _, seed in first}.isdisjoint(seed for _, seed in second)

    dataset = stream(folder)  # a resumed run begins with a later epoch, and may come back
    assert [order(dataset, epoch) for epoch in (1, 0)] == [second, first]
    assert order(stream(folder, seed=1), 0) != first


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_same_with_and_without_workers(folder, num_workers):
    dataset = stream(folder)
    expected = [item_id for item_id, _ in order(dataset, 1)]
    batches = StreamedBatches(dataset, 5)

    loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=list)

    found = [[row["item_id"] for row in batch] for batch in loader]
    assert [len(batch) for batch in found] == [5, 5, 5, 5, 3]
    assert sum(found, []) == expected


@pytest.mark.parametrize(
    ("batch_size", "num_processes"), [(4, 1), (3, 2), (11, 2), (4, 5), (50, 3), (1, 22), (23, 23)]
)
def test_processes_share_the_rows_and_take_the_same_number_of_steps(folder, batch_size, num_processes):
    dataset = stream(folder, use_images=False)
    samplers = [StreamedBatches(dataset, batch_size, num_processes, index) for index in range(num_processes)]

    shares = [[[row["item_id"] for row in batch] for batch in sampler] for sampler in samplers]

    assert sorted(sum((sum(share, []) for share in shares), [])) == ALL_ITEMS
    assert {len(share) for share in shares} == {len(samplers[0])}
    assert all(batch for share in shares for batch in share)
    one = [[row["item_id"] for row in batch] for batch in StreamedBatches(dataset, batch_size * num_processes)]
    for step, whole in enumerate(one[: len(samplers[0]) - 1]):
        assert sorted(whole) == sorted(sum((share[step] for share in shares), []))


def test_more_processes_than_rows_are_an_error(folder):
    with pytest.raises(DataError, match="data, train has 23 rows, expected one for each of 24 processes"):
        StreamedBatches(stream(folder, use_images=False), 4, 24)


@pytest.mark.parametrize(("num_rows", "found"), [(9, "9"), (40, "more than 23")])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_files_that_change_under_a_stream_end_the_epoch(folder, num_rows, found, num_processes):
    batches = StreamedBatches(stream(folder, use_images=False), 4, num_processes)
    rows = datasets.Dataset.from_list(make_rows(num_rows)).cast_column("image", datasets.Image())
    for file in range(3):
        rows.shard(3, file).to_parquet(folder / f"train-{file}.parquet")

    with pytest.raises(DataError) as raised:
        list(batches)

    expected = "good rows, expected 23 as at the start: its files have changed"
    assert str(raised.value) == f"{folder}, train has {found} {expected}"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_damaged_file_is_reported_with_its_dataset_and_split(folder, split):
    damage(folder / f"{split}-0.parquet")

    with pytest.raises(DataError) as raised:
        stream(folder)

    assert str(raised.value).startswith(f"{folder}, {split}: the rows cannot be read: OSError: ")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_damaged_later_ends_the_epoch_with_its_dataset(folder):
    dataset = stream(folder)
    damage(folder / "train-1.parquet")

    with pytest.raises(DataError, match="data, train: the rows cannot be read: OSError: "):
        list(StreamedBatches(dataset, 4))


def test_vocabulary_length_and_evaluated_splits_are_those_of_the_ordinary_load(folder):
    data_args = DataArguments(dataset_name=str(folder))
    ordinary = load_training_splits(data_args, use_images=True)

    train, evaluated = load_streamed_splits(data_args, use_images=True)

    assert train.vocabulary == build_vocabulary(ordinary["train"])
    assert train.num_rows == len(ordinary["train"]) == 23
    assert list(evaluated) == ["validation"]
    assert evaluated["validation"].column_names == ordinary["validation"].column_names
    for row, same in zip(evaluated["validation"], ordinary["validation"], strict=True):
        assert row["image"].tobytes() == same["image"].tobytes()
        assert {**row, "image": None} == {**same, "image": None}


def test_a_dataset_with_a_card_and_numbers_as_ids_is_streamed_too(tmp_path):
    folder = write_dataset(tmp_path / "data", [{**row, "item_id": index} for index, row in enumerate(make_rows(6))])
    (folder / "validation-0.parquet").unlink()
    patterns = [{"split": split, "path": "train-*"} for split in ("train", "validation")]
    card = {"configs": [{"config_name": "default", "data_files": patterns}]}
    (folder / "README.md").write_text(f"---\n{card}\n---\n")

    dataset = stream(folder)

    assert sorted(item_id for item_id, _ in order(dataset, 0)) == list("012345")


def test_the_tags_are_read_without_the_photographs(folder, monkeypatch):
    spoil_photographs(folder, set(ALL_ITEMS))
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_: pytest.fail("a photograph was decoded"))

    dataset = stream(folder, use_images=False)

    assert len(dataset) == 23 and all("image" not in row for row in dataset)


def test_bad_rows_stop_the_run_or_are_left_out(tmp_path, capsys):
    rows = make_rows(23)
    rows[4]["important_tags"], rows[9]["tags"] = ["purple"], ["orange", " "]
    rows[9]["important_tags"] = ["orange"]
    folder = write_dataset(tmp_path / "data", rows)

    with pytest.raises(DataError, match="data, train: 2 of 23 rows are bad: .*im4.*skip_bad_rows true"):
        stream(folder)

    dataset = stream(folder, skip_bad_rows=True)
    assert "2 of 23 rows are bad" in capsys.readouterr().out
    assert len(dataset) == 21 and dataset.split.vocabulary == ["blue", "green", "red", "yellow"]
    for epoch in (0, 1):
        assert sorted(item_id for item_id, _ in order(dataset, epoch)) == sorted(set(ALL_ITEMS) - {"im4", "im9"})


def test_missing_splits_and_columns_and_other_files_are_refused(folder, tmp_path):
    with pytest.raises(DataError, match="split 'training' is missing"):
        stream(folder, train_split="training")
    with pytest.raises(DataError, match="split 'dev' is missing"):
        stream(folder, validation_split="dev")
    for file in folder.glob("train-*"):
        pq.write_table(pq.read_table(file).drop_columns("important_tags"), file)
    with pytest.raises(DataError, match="column 'important_tags' is missing"):
        stream(folder)
    table = tmp_path / "table"
    table.mkdir()
    (table / "train.csv").write_text("item_id,image,tags,important_tags\n1,1.jpg,sky,sky\n")
    with pytest.raises(DataError, match="streaming needs .* Parquet"):
        stream(table)


def test_cached_features_need_rows_to_look_up(folder, tmp_path):
    data_args = DataArguments(dataset_name=str(folder), streaming=True)
    with pytest.raises(UsageError, match="cached_views is 2, expected 0 with --streaming true"):
        check_streaming(data_args, MagnetoTrainingArguments(output_dir=str(tmp_path), cached_views=2))


def test_the_shuffle_buffer_holds_a_row_at_least():
    with pytest.raises(UsageError, match="shuffle_buffer_size is 0, expected at least 1"):
        DataArguments(dataset_name="data", shuffle_buffer_size=0)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture
def make_trainer(folder, tiny_config, tmp_path):
    config = MagnetoConfig(**{**tiny_config.to_dict(), "image_size": 64})  # batch norm takes a batch of one
    processor = MagnetoProcessor.from_vocabulary(sorted(COLORS), image_size=64)

    def make(skip_bad_rows: bool = False, **changes) -> MagnetoTrainer:
        args = MagnetoTrainingArguments(
            output_dir=str(tmp_path / "run"), report_to="none", disable_tqdm=True, use_cpu=True, **changes
        )
        data_args = DataArguments(dataset_name=str(folder), streaming=True, skip_bad_rows=skip_bad_rows)
        train, evaluated = load_streamed_splits(data_args, use_images=True)
        return MagnetoTrainer(
            MagnetoForTagSummarization(config),
            args,
            processor,
            train_dataset=StreamedDataset(train, args.seed, buffer_size=6),
            eval_dataset=undecoded(evaluated["validation"]),
            train_collator=StreamedCollator(TagCollator.for_training(processor, data_args)),
            eval_collator=TagCollator(processor),
            compute_metrics=compute_metrics,
        )

    return make


def test_epochs_have_the_steps_that_the_number_of_rows_asks_for(make_trainer):
    trainer = make_trainer(num_train_epochs=2, per_device_train_batch_size=8, dataloader_num_workers=1)

    trainer.train()

    assert trainer.state.global_step == trainer.state.max_steps == 6
    assert [entry["epoch"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]


def test_an_unreadable_photograph_ends_training_with_its_id(make_trainer, folder):
    spoil_photographs(folder, {"im7"})
    trainer = make_trainer(num_train_epochs=1, per_device_train_batch_size=8, dataloader_num_workers=1)

    problem = "item_id im7 has a missing or unreadable photograph"
    message = f"{folder}, train: {problem}; --skip_bad_rows true leaves such rows out"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        trainer.train()


def test_unreadable_photographs_are_left_out_and_said_once_each(make_trainer, folder, capsys):
    spoil_photographs(folder, {"im7", "im8"})
    trainer = make_trainer(skip_bad_rows=True, num_train_epochs=2, per_device_train_batch_size=1)

    trainer.train()

    said = [line for line in capsys.readouterr().out.splitlines() if "unreadable" in line]
    assert len(said) == 2 and said[1].endswith("left out (2 so far)")
    assert trainer.state.global_step == 46  # a batch of none is a step, too


def test_nothing_is_learned_from_a_batch_that_cannot_be_read(processor, tiny_model, folder):
    spoil_photographs(folder, set(ALL_ITEMS))
    dataset = stream(folder)
    rows = next(iter(StreamedBatches(dataset, 4)))
    collate = StreamedCollator(TagCollator.for_training(processor, DataArguments(dataset_name=str(folder))))

    batch = collate(rows)

    assert batch.pop("unreadable") == [row["item_id"] for row in rows]
    loss = tiny_model(**batch).loss
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in tiny_model.parameters() if p.grad is not None)
    assert torch.isfinite(loss)
