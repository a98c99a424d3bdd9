"""Cached features: equal to computing them, found again, resumed, refused where they cannot be right."""

import os
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import make_rows
from filelock import FileLock

from magneto_training import feature_cache
from magneto_training.arguments import DataArguments, MagnetoTrainingArguments, UserError
from magneto_training.augmentation import ImageAugmentation, example_seed
from magneto_training.collation import AugmentedDataset, SeededDataset, TagCollator
from magneto_training.feature_cache import build_feature_caches
from magneto_training.tag_data import load_tag_dataset


@pytest.fixture
def splits() -> dict[str, datasets.Dataset]:
    return {
        name: datasets.Dataset.from_list(make_rows(count, seed=count)).cast_column("image", datasets.Image())
        for name, count in (("train", 7), ("validation", 4))
    }


@pytest.fixture
def build(tiny_model, processor, splits, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "ROWS_PER_FILE", 3)

    def _build(views: int = 2, rows=splits, model=tiny_model, **options):
        options = {"dataloader_num_workers": 0, "disable_tqdm": True, **options}
        args = MagnetoTrainingArguments(
            output_dir=str(tmp_path / "run"),
            cached_views=views,
            feature_cache_dir=str(tmp_path / "cache"),
            per_device_eval_batch_size=2,
            use_cpu=True,
            **options,
        )
        return build_feature_caches(model, processor, rows, DataArguments(dataset_name="drawn"), args)

    return _build


def stored_files(tmp_path):
    return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}


def save_photographs(rows: datasets.Dataset, folder) -> list[str]:
    paths = [str(folder / f"{index}.png") for index in range(len(rows))]
    for image, path in zip(rows["image"], paths, strict=True):
        image.save(path)
    return paths


def test_scores_from_cached_features_equal_those_from_photographs(build, tiny_model, processor, splits):
    cache = build()["validation"]
    collate = TagCollator(processor)
    cached = collate(SeededDataset(splits["validation"], 0, cache).__getitems__([0, 1, 2, 3]))
    live = collate(SeededDataset(splits["validation"], 0).__getitems__([0, 1, 2, 3]))
    assert "pixel_values" not in cached and cached["image_features"].dtype == torch.float16
    with torch.inference_mode():
        difference = (tiny_model(**cached).logits.sigmoid() - tiny_model(**live).logits.sigmoid()).abs().max()
    assert difference < 1e-3


def test_each_view_is_the_augmentation_of_its_own_seed(build, tiny_model, processor, splits):
    cache = build(views=3)["train"]
    augmentation = ImageAugmentation(32)
    for index, view in ((0, 0), (4, 2), (6, 1)):
        image = augmentation(splits["train"][index]["image"], example_seed(0, view, index))
        pixel_values = processor.image_processor(image, return_tensors="pt", do_resize=False)["pixel_values"]
        with torch.inference_mode():
            expected = tiny_model.magneto.image_feature_extractor.feature_map(pixel_values)[0]
        torch.testing.assert_close(cache.read(index, view).float(), expected.permute(1, 2, 0), rtol=1e-3, atol=1e-3)


def test_every_turn_mixes_two_views_region_by_region(build):
    cache = build(views=4)["train"]
    drawn = cache.draw([3] * 20, range(20))

    assert drawn.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(cache.draw([2, 3], [7, 5])[1], drawn[5])  # whatever is drawn beside it
    views = [cache.read(3, view).permute(2, 0, 1) for view in range(4)]
    pairs = set()
    for features in drawn:
        # (views, h, w): which views have just this region
        origin = torch.stack([(features == view).all(0) for view in views])
        assert origin.any(0).all()
        pairs.add(tuple(origin.flatten(1).any(1).nonzero().flatten().tolist()))
    assert max(map(len, pairs)) <= 2 and len(pairs) > 3


def test_views_and_mixtures_are_drawn_evenly():
    numbers = feature_cache._uniform_numbers([2**63 + 5 * seed for seed in range(4000)], 5)

    assert numbers.shape == (4000, 5) and 0 <= numbers.min() and numbers.max() < 1
    counts = [np.histogram(column, 10, (0, 1))[0] for column in numbers.T]
    assert np.abs(np.array(counts) - 400).max() < 5 * (400 * 0.9) ** 0.5
    assert np.abs(np.corrcoef(numbers.T) - np.eye(5)).max() < 5 / 4000**0.5


def test_reading_features_takes_no_workers(tiny_model, processor, splits, tmp_path):
    workers = {"num_workers": 1, "persistent_workers": True, "prefetch_factor": 2, "multiprocessing_context": "fork"}
    options = {f"dataloader_{name}": value for name, value in workers.items()}
    args = MagnetoTrainingArguments(
        str(tmp_path / "run"), cached_views=1, feature_cache_dir=str(tmp_path), use_cpu=True, **options
    )

    build_feature_caches(tiny_model, processor, splits, DataArguments(dataset_name="drawn"), args)

    settings = {name: getattr(args, f"dataloader_{name}") for name in workers}
    assert torch.utils.data.DataLoader(splits["train"], **settings).num_workers == 0


def test_epochs_draw_differently_and_the_same_again(build, splits):
    rows = AugmentedDataset(splits["train"], 0, build(views=4)["train"])
    first = [row["image_features"] for row in rows.__getitems__([0, 1, 2])]
    rows.set_epoch(1)
    second = [row["image_features"] for row in rows.__getitems__([0, 1, 2])]
    rows.set_epoch(0)

    assert not all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert all(
        torch.equal(features, row["image_features"])
        for features, row in zip(first, rows.__getitems__([0, 1, 2]), strict=True)
    )


def test_one_view_is_what_evaluation_sees(build, tiny_model, processor, splits):
    cache = build(views=1)["train"]
    pixel_values = processor(splits["train"][5]["image"], ["blue"])["pixel_values"]
    with torch.inference_mode():
        expected = tiny_model.magneto.image_feature_extractor.feature_map(pixel_values)[0]
    torch.testing.assert_close(cache.draw([5], [0])[0].float(), expected, rtol=1e-3, atol=1e-3)


def test_another_run_finds_the_files_whatever_its_seed_and_number_of_views(build, tmp_path, capsys):
    build(views=2)
    before = stored_files(tmp_path)
    assert len(before) == 2 * 3 + 2  # 7 rows in files of 3, twice, and 4 rows once
    build(views=3, seed=1)
    after = stored_files(tmp_path)
    assert len(after) == 3 * 3 + 2 and before.items() <= after.items()
    assert "7 are to be computed" in capsys.readouterr().out


def test_an_interrupted_build_goes_on_with_the_missing_files(build, tmp_path):
    whole = build()["train"]
    expected = [whole.read(index, 1).clone() for index in range(7)]
    lost = whole.files[1][1]
    kept = {path: time for path, time in stored_files(tmp_path).items() if path != lost}
    lost.unlink()
    lost.with_name(lost.name + ".partial").write_bytes(b"cut short")
    again = build()["train"]
    assert kept.items() <= stored_files(tmp_path).items()
    assert all(torch.equal(again.read(index, 1), features) for index, features in enumerate(expected))


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "fewer rows"])
def test_a_damaged_file_is_named_and_made_again(build, tmp_path, capsys, damage):
    whole = build()["train"]
    expected = [whole.read(index, 1).clone() for index in range(7)]
    file = whole.files[1][1]
    content = file.read_bytes()
    if damage == "fewer rows":
        feature_cache._write(file, torch.zeros(2, 4, 1, 1))
    else:
        file.write_bytes({"cut": content[:-10], "empty": b"", "noise": bytes(range(256))}[damage])
    kept = {path: time for path, time in stored_files(tmp_path).items() if path != file}
    capsys.readouterr()

    again = build()["train"]

    assert f"{file} is damaged, and is made again\n" in capsys.readouterr().out
    assert kept.items() <= stored_files(tmp_path).items() and file.read_bytes() == content
    assert all(torch.equal(again.read(index, 1), features) for index, features in enumerate(expected))


def test_an_error_leaves_the_files_before_it_and_no_lock(build, splits, tmp_path):
    images = [{"bytes": b"damaged" if index == 4 else None, "path": None} for index in range(7)]
    for index, path in enumerate(save_photographs(splits["train"], tmp_path)):
        images[index]["path"] = path
    rows = splits["train"].remove_columns("image").add_column("image", images)
    with pytest.raises(UserError, match="item_id im4 can no longer be read"):
        build(views=1, rows={"train": rows.cast_column("image", datasets.Image())})
    (file,) = stored_files(tmp_path)
    assert file.name == "view-000-000000000.safetensors"
    for lock in file.parent.glob("*.lock"):
        with FileLock(lock, timeout=0):
            pass


def test_a_file_that_another_run_is_making_is_waited_for(build, tmp_path):
    cache = build(views=1)["train"]
    lost, content = cache.files[0][1], cache.files[0][1].read_bytes()
    lost.unlink()
    waiting, lock = threading.Event(), FileLock(f"{lost}.lock", thread_local=False)

    def make():
        with lock:
            waiting.set()
            time.sleep(0.5)
            lost.write_bytes(content)
            times.append(lost.stat().st_mtime_ns)

    times, other_run = [], threading.Thread(target=make)
    other_run.start()
    waiting.wait()
    build(views=1)
    other_run.join()
    assert lost.stat().st_mtime_ns == times[0]


def test_the_same_workers_make_all_files_of_a_split(build, splits, tmp_path, monkeypatch):
    read, pids = feature_cache.PhotographReader.__call__, tmp_path / "pids"

    def read_and_tell(self, images, seeds=None):
        with pids.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return read(self, images, seeds)

    monkeypatch.setattr(feature_cache.PhotographReader, "__call__", read_and_tell)
    build(rows={"train": splits["train"]}, dataloader_num_workers=1)
    assert len(stored_files(tmp_path)) == 6
    assert len(set(pids.read_text().split()) - {str(os.getpid())}) == 1


def test_photographs_that_are_files_are_read_again_where_one_has_changed(build, splits, tmp_path, monkeypatch):
    folder = tmp_path / "dataset"
    folder.mkdir()
    paths = save_photographs(splits["train"], folder)
    named = [{"item_id": path, "image": {"bytes": None, "path": path}, "tags": ["blue"]} for path in paths]
    datasets.Dataset.from_list(named).to_parquet(folder / "train.parquet")
    read, calls = datasets.Image.embed_storage, []
    monkeypatch.setattr(datasets.Image, "embed_storage", lambda *args: calls.append(args) or read(*args))

    def num_read() -> int:
        calls.clear()
        build(views=1, rows=load_tag_dataset(str(folder)))
        return len(calls)

    assert (num_read(), num_read()) == (7, 0)
    folders = set((tmp_path / "cache").iterdir())
    splits["train"][0]["image"].transpose(0).save(paths[1])
    assert num_read() == 7
    assert len(set((tmp_path / "cache").iterdir()) - folders) == 1


def test_photographs_in_an_archive_have_the_same_features_as_files(build, splits, tmp_path):
    paths = save_photographs(splits["train"], tmp_path)
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for path in paths:
            archive.write(path, Path(path).name)
    in_archive = [f"zip://{Path(path).name}::{tmp_path / 'train.zip'}" for path in paths]  # as an image folder has it
    for images in (paths, in_archive):
        rows = splits["train"].remove_columns("image").add_column("image", images)
        build(views=1, rows={"train": rows.cast_column("image", datasets.Image())})
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_processes_share_out_all_files_whatever_the_others_have_made(build, monkeypatch):
    builders = []
    monkeypatch.setattr(feature_cache._Builder, "build", lambda self, state: builders.append(self))
    with pytest.raises(UserError, match="lacks 3 files that another process has made"):
        build(views=1)
    builder = builders[0]
    feature_cache._write(builder.files[0][0], torch.zeros(3, 4, 1, 1))  # the first of two processes has been at work
    shares = [builder.missing(builder.all_files()[rank::2]) for rank in (0, 1)]
    assert shares == [[(0, 2)], [(0, 1)]]


def test_no_process_has_all_the_small_files(build, splits, monkeypatch):
    builders = []
    monkeypatch.setattr(feature_cache._Builder, "build", lambda self, state: builders.append(self))
    with pytest.raises(UserError, match="lacks 4 files"):
        build(views=2, rows={"train": splits["validation"]})  # of each view, a file of 3 rows and one of 1
    shares = [builders[0].all_files()[rank::2] for rank in (0, 1)]
    assert [sorted(number for _, number in share) for share in shares] == [[0, 1], [0, 1]]


def test_other_photographs_or_weights_never_share_files(build, tiny_model, splits, tmp_path):
    build(views=1)
    folders = set((tmp_path / "cache").iterdir())
    other = {**splits, "train": splits["train"].select(range(6))}
    build(views=1, rows=other)
    assert len(set((tmp_path / "cache").iterdir()) - folders) == 1
    folders = set((tmp_path / "cache").iterdir())
    with torch.no_grad():
        next(tiny_model.magneto.image_feature_extractor.backbone.parameters()).add_(0.1)
    build(views=1)
    assert len(set((tmp_path / "cache").iterdir()) - folders) == 2


def test_a_full_disk_is_named_before_the_work(build, monkeypatch, tmp_path):
    usage = SimpleNamespace(total=1000, used=999, free=1)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"needs 0\.\d+ GB and .* has 0\.00 GB free; give another --feature_cache_dir"):
        build()
    assert not stored_files(tmp_path)


def test_features_beyond_float16_are_refused(build, tiny_model, tmp_path):
    for module in tiny_model.magneto.image_feature_extractor.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data *= 1e6
    with pytest.raises(UserError, match="beyond what float16 holds"):
        build()
    assert not stored_files(tmp_path)
