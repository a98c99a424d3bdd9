import doctest

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from magneto_training import collation
from magneto_training.augmentation import ImageAugmentation, TagAugmentation
from magneto_training.collation import AugmentedDataset, TagCollator
from magneto_training.photographs import undecoded
from magneto_training.tag_data import DataError
from modeling_magneto import MagnetoProcessor


def test_the_examples_of_the_documentation_hold():
    results = doctest.testmod(collation)

    assert results.attempted >= 4 and results.failed == 0


def test_rows_without_ground_truth_have_no_labels(processor):
    rows = Dataset.from_list([{"item_id": "a", "image": Image.new("RGB", (9, 9)), "tags": ["red", "blue"]}])

    assert set(TagCollator(processor)(undecoded(rows).to_list())) == {"input_ids", "attention_mask", "pixel_values"}


def test_prediction_does_not_cut_and_training_cuts_by_chance():
    names = [f"tag {index}" for index in range(30)]
    processor = MagnetoProcessor.from_vocabulary(names, max_tags=10, use_images=False)
    rows = [{"tags": names, "important_tags": names[:3], "seed": seed} for seed in range(100)]

    assert TagCollator(processor)(rows)["input_ids"].shape == (100, 30)
    cut = TagCollator(processor, training=True)(rows)

    assert cut["input_ids"].shape == (100, 10)
    counts = torch.bincount(cut["input_ids"].flatten(), minlength=32)
    assert counts[:2].sum() == 0 and counts[2:].min() > 10  # each of them about 33 times
    assert torch.equal(cut["labels"] == 1, cut["input_ids"] < 5)


def test_an_augmented_batch_depends_on_its_seeds_alone(processor):
    collate = TagCollator(
        processor, ImageAugmentation(32), TagAugmentation(processor.vocabulary, 1.0, 1.0), training=True
    )
    pixels = np.random.default_rng(0).integers(256, size=(40, 40, 3), dtype=np.uint8)
    rows = [
        {"image": Image.fromarray(pixels), "tags": ["red", "blue", "green"], "important_tags": ["red"], "seed": seed}
        for seed in (1, 2, 1)
    ]
    rows = undecoded(Dataset.from_list(rows)).to_list()

    batch, again = collate(rows), collate(rows)

    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][2])
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["pixel_values"].min() < 0 < batch["pixel_values"].max()  # normalised
    assert torch.equal(batch["labels"] == 1, batch["input_ids"] == processor.vocabulary.index("red") + 2)


def keep_seeds(rows: list[dict]) -> list[tuple[str, int]]:
    return [(row["item_id"], row["seed"]) for row in rows]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_epoch_has_its_own_seeds_in_workers_that_live_on_too(num_workers):
    rows = AugmentedDataset(Dataset.from_dict({"item_id": list("abcdef")}), seed=3)
    loader = torch.utils.data.DataLoader(
        rows, batch_size=2, num_workers=num_workers, persistent_workers=num_workers > 0, collate_fn=keep_seeds
    )
    epochs = []
    for epoch in range(3):
        rows.set_epoch(epoch)
        epochs.append([seed for batch in loader for seed in batch])

    assert [[item for item, _ in epoch] for epoch in epochs] == [list("abcdef")] * 3
    assert len({seed for epoch in epochs for _, seed in epoch}) == 18
    rows.set_epoch(1)
    assert [(row["item_id"], row["seed"]) for row in rows] == epochs[1]  # a resumed run draws the same


def test_a_photograph_that_is_gone_since_it_was_checked_is_named(processor, tmp_path):
    Image.new("RGB", (40, 30), (10, 200, 30)).save(tmp_path / "a.jpg")
    rows = Dataset.from_dict({"item_id": ["a"], "image": [str(tmp_path / "a.jpg")], "tags": [["red"]]})
    rows = AugmentedDataset(rows.cast_column("image", datasets.Image()), seed=0)
    collate = TagCollator(processor)
    assert collate([rows[0]])["pixel_values"].shape == (1, 3, 32, 32)

    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match="item_id a can no longer be read"):
        collate([rows[0]])
