"""Outlier detection and the outlier test: strange tags, their labels, and the figures."""

import datasets
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from magneto_training.arguments import PretrainingDataArguments, UserError
from magneto_training.augmentation import draw_outliers
from magneto_training.collation import AugmentedDataset, OutlierCollator, OutlierDataset, SeededDataset, TagCollator
from magneto_training.evaluation import compute_detection_metrics, format_detection_metrics
from magneto_training.tag_data import DataError, load_pretraining_splits
from modeling_magneto import MagnetoConfig, MagnetoProcessor

TAGS = [f"tag{index}" for index in range(50)]


@pytest.mark.parametrize(("ratio", "count"), [(0.1, 1), (0.5, 2), (1.0, 4), (2.5, 10), (100, 46)])
def test_outliers_are_new_and_as_many_as_the_ratio_says(ratio, count):
    own = TAGS[:4]
    outliers = draw_outliers(own, TAGS, ratio, np.random.default_rng(0))
    assert len(outliers) == len(set(outliers)) == count
    assert set(outliers) <= set(TAGS) - set(own)


def test_outliers_are_uniform_over_the_other_tags():
    counts = dict.fromkeys(TAGS, 0)
    for seed in range(4_600):
        for tag in draw_outliers(TAGS[:4], TAGS, 0.25, np.random.default_rng(seed)):
            counts[tag] += 1
    drawn = np.array([counts[tag] for tag in TAGS[4:]])
    assert drawn.sum() == 4_600 and drawn.min() > 60 and drawn.max() < 145  # 100 each, 4.5 deviations


@pytest.fixture
def rows():
    return datasets.Dataset.from_list([{"item_id": str(i), "tags": TAGS[i : i + 1 + i % 3]} for i in range(20)])


@pytest.fixture
def collator():
    return OutlierCollator(TagCollator(MagnetoProcessor.from_vocabulary(TAGS, use_images=False)), 1.0)


def test_labels_tell_own_tags_from_outliers(rows, collator):
    batch = collator([SeededDataset(rows, seed=0)[index] for index in range(20)])
    names = collator.collate.processor.tokenizer.convert_ids_to_tokens
    for index, row in enumerate(rows):
        labels = batch["labels"][index]
        tags = names(batch["input_ids"][index][labels >= 0].tolist())
        own = [tag for tag, label in zip(tags, labels[labels >= 0].tolist(), strict=True) if label == 1]
        assert own == row["tags"] and len(tags) == 2 * len(own)


def test_ground_truth_is_never_read(rows, collator):
    misleading = rows.map(lambda row: {"important_tags": row["tags"][:1]})
    plain, labelled = (
        collator([SeededDataset(dataset, seed=0)[index] for index in range(20)]) for dataset in (rows, misleading)
    )
    for name, tensor in plain.items():
        assert torch.equal(tensor, labelled[name]), name


@pytest.mark.parametrize("important_tags", [None, [7], ["nonsense"], []])
def test_pretraining_accepts_any_ground_truth_and_none(rows, tmp_path, important_tags):
    if important_tags is not None:
        rows = rows.map(lambda row: {"important_tags": important_tags})
    rows.to_parquet(tmp_path / "train.parquet")
    splits = load_pretraining_splits(PretrainingDataArguments(dataset_name=str(tmp_path)), use_images=False)
    assert splits["train"].column_names == splits["validation"].column_names == ["item_id", "tags"]


def test_a_share_is_held_out_where_there_is_no_validation_split(rows, tmp_path):
    rows.to_parquet(tmp_path / "train.parquet")
    arguments = PretrainingDataArguments(dataset_name=str(tmp_path), validation_share=0.25)
    first, again = (load_pretraining_splits(arguments, use_images=False) for _ in range(2))
    assert len(first["train"]) == 15 and len(first["validation"]) == 5
    assert set(first["train"]["item_id"]).isdisjoint(first["validation"]["item_id"])
    assert first["validation"]["item_id"][:] == again["validation"]["item_id"][:]


def test_a_single_row_cannot_be_shared(rows, tmp_path):
    rows.select([0]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="has 1 row, expected 2"):
        load_pretraining_splits(PretrainingDataArguments(dataset_name=str(tmp_path)), use_images=False)


def test_training_outliers_change_with_the_epoch_and_validation_outliers_do_not(rows, collator):
    training, validation = AugmentedDataset(rows, seed=0), SeededDataset(rows, seed=0)
    batches = []
    for epoch in (0, 1):
        training.set_epoch(epoch)
        batches.append([collator([dataset[i] for i in range(20)])["input_ids"] for dataset in (training, validation)])
    assert not torch.equal(batches[0][0], batches[1][0])
    assert torch.equal(batches[0][1], batches[1][1])


def test_the_outlier_test_adds_the_same_tags_whatever_is_read_before(rows):
    whole = OutlierDataset(rows, 0, TAGS, 0.5)
    alone = OutlierDataset(rows, 0, TAGS, 0.5)[17]
    assert [whole[index] for index in range(20)][17] == alone
    assert alone["tags"] == rows[17]["tags"] + alone["outliers"] and alone["outliers"]
    assert OutlierDataset(rows, 1, TAGS, 0.5)[17]["outliers"] != alone["outliers"]


def test_a_diverged_training_has_no_detection_metrics():
    labels = np.array([[1, 0, -100]])
    logits = np.array([[0.5, np.nan, np.nan]])

    with pytest.raises(UserError, match="the training has diverged: image_logits are not finite"):
        compute_detection_metrics(EvalPrediction((np.zeros((1, 3)), logits), labels), MagnetoConfig())


def test_detection_metrics_are_those_of_the_outliers_over_real_tags():
    labels = np.array([[1, 0, 0, -100], [1, 1, 0, 0]])
    tag_logits = np.array([[2.0, -1.0, 1.0, -9.0], [3.0, -2.0, -3.0, 0.5]])
    image_logits = np.where(labels == 0, -5.0, 5.0)

    figures = compute_detection_metrics(EvalPrediction((tag_logits, image_logits), labels), MagnetoConfig())

    # Tag stream: called outliers are -1 (right), -2 (wrong), -3 (right); missed are 1 and 0.5.
    assert figures["tag_f1"] == pytest.approx(100 * 2 * 2 / (3 + 4))
    # From most to least suspicious: -3 outlier, -2 own, -1 outlier, 0.5 outlier, 1 outlier, 2, 3 own.
    assert figures["tag_average_precision"] == pytest.approx(100 * (1 / 1 + 2 / 3 + 3 / 4 + 4 / 5) / 4)
    assert figures["image_f1"] == figures["image_average_precision"] == 100
    assert figures["average_precision"] == pytest.approx((figures["tag_average_precision"] + 100) / 2)
    assert figures["flag_all_f1"] == pytest.approx(100 * 2 * 4 / (7 + 4)) and figures["num_images"] == 2
    assert "F1 72.73" in format_detection_metrics(figures).splitlines()[-1]


def test_detection_metrics_of_a_single_stream():
    labels = np.array([[1, 0]])
    figures = compute_detection_metrics(EvalPrediction(np.array([[1.0, -1.0]]), labels), MagnetoConfig(streams="tag"))
    assert figures["tag_f1"] == 100 and "image_f1" not in figures
