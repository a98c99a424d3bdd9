"""prepare_nus_wide.py reads what people have and keeps what the paper keeps."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import datasets
import pytest
from official_files import Row, write_official_files


def prepared(run_script, source: Path, out: Path) -> tuple[dict, dict[str, list[dict]]]:
    """Prepares without photographs; returns the counts and the rows of every split."""
    outcome = run_script("prepare_nus_wide", source, out, "--no_images")
    assert outcome.status == 0, outcome.err
    cache = str(out.parent / "cache")
    splits = {s: list(d) for s, d in datasets.load_dataset(str(out), cache_dir=cache).items()}
    unlabeled = datasets.load_dataset(str(out), "unlabeled", split="train", cache_dir=cache)
    return json.loads((out / "counts.json").read_text()), splits | {"unlabeled": list(unlabeled)}


def ids(rows: list[dict]) -> set[str]:
    return {row["item_id"] for row in rows}


@pytest.mark.skipif("NUS_WIDE_SUBSET_DIR" not in os.environ, reason="NUS_WIDE_SUBSET_DIR is not set")
def test_the_real_subset_gives_the_counts_of_its_readme(tmp_path, run_script):
    source = Path(os.environ["NUS_WIDE_SUBSET_DIR"])
    counts, splits = prepared(run_script, source, tmp_path / "out")
    expected = {
        "rows": 6_294,
        "with_tags": 3_527,
        "kept": 805,
        "kept_in_train_list": 482,
        "kept_in_test_list": 323,
        "kept_with_two_or_more_tags": 461,
        "mean_important_ratio": 0.859648,
    }
    assert expected.items() <= counts.items()
    assert {s: len(rows) for s, rows in splits.items()} == counts["splits"]
    assert counts["splits"]["train"] + counts["splits"]["validation"] == 482
    assert counts["splits"]["validation"] == 48
    assert counts["splits"]["test"] == 323
    labelled = [*splits["train"], *splits["validation"], *splits["test"]]
    assert len(ids(labelled)) == 805
    assert all(set(row["important_tags"]) <= set(row["tags"]) for row in labelled)
    assert all(row["important_tags"] for row in labelled)


def test_the_drawn_sample_gives_exact_counts(tmp_path, run_script, sample):
    counts, _ = prepared(run_script, sample, tmp_path / "out")
    tags = (sample / "NUS_WID_Tags/AllTags81.txt").read_text().splitlines()
    labels = [path.read_text().split() for path in sorted((sample / "Groundtruth/AllLabels").iterdir())]
    tags = [line.split() for line in tags]
    truth = list(zip(*labels, strict=True))
    with_tags = [i for i in range(240) if "1" in tags[i]]
    kept = [
        i
        for i in with_tags
        if "1" in truth[i] and all(t == "1" for t, g in zip(tags[i], truth[i], strict=True) if g == "1")
    ]
    assert (counts["rows"], counts["with_tags"], counts["kept"]) == (240, len(with_tags), len(kept))
    ratios = [truth[i].count("1") / tags[i].count("1") for i in kept]
    assert counts["mean_important_ratio"] == pytest.approx(sum(ratios) / len(ratios), abs=1e-6)


def test_each_filter_step_is_counted(tmp_path, run_script, small_nus_wide):
    counts, splits = prepared(run_script, small_nus_wide, tmp_path / "out")
    assert counts["rows"] == 20
    assert counts["with_tags"] == 19
    assert counts["with_tags_and_ground_truth"] == 18
    assert counts["covered"] == counts["kept"] == 16
    assert counts["splits"] == {"train": 11, "validation": 1, "test": 4, "unlabeled": 2}
    # Only of the official train list, only with tags, and without any ground truth.
    assert ids(splits["unlabeled"]) == {"302", "303"}
    assert all(row["important_tags"] == [] for row in splits["unlabeled"])


def test_official_files_of_which_no_image_is_kept_are_an_error(tmp_path, run_script):
    source = write_official_files(tmp_path / "nus_wide", [Row(f"a/000{i}_{i}.jpg", "sky", "sun") for i in range(4)])
    outcome = run_script("prepare_nus_wide", source, tmp_path / "out", "--no_images")
    assert outcome.status == 1
    assert "none is kept" in outcome.error
    assert not (tmp_path / "out").exists()


def test_a_repeated_photo_id_is_kept_once_and_in_test(tmp_path, run_script):
    rows = [
        Row("a/0001_1.jpg", "sky", "sky"),
        Row("a/0002_2.jpg", "sky", "sky"),
        Row("a/0003_3.jpg", "sky", "sky"),
        Row("a/0004_4.jpg", "sky", ""),  # left out, and in test elsewhere: not to be in unlabeled
        Row("b/0001_1.jpg", "sky", "sky", "Test"),
        Row("b/0002_2.jpg", "sky", "sky"),
        Row("b/0004_4.jpg", "sky", "sky", "Test"),
        Row("b/0005_5.jpg", "sky", "sky", "Train Test"),
        Row("b/0006_6.jpg", "sky", ""),
        Row("c/0006_6.jpg", "sky", "sun"),
    ]
    source = write_official_files(tmp_path / "nus_wide", rows)
    counts, splits = prepared(run_script, source, tmp_path / "out")
    assert ids(splits["test"]) == {"1", "4", "5"}
    assert ids(splits["train"]) | ids(splits["validation"]) == {"2", "3"}
    assert ids(splits["unlabeled"]) == {"6"}
    assert sum(counts["splits"].values()) == 6
    assert counts["kept"] == 5
    assert counts["photo_ids_listed_twice"] == 4
    assert counts["photo_ids_in_both_lists"] == 3
    assert "kept once" in counts["notes"][0]


def test_a_path_that_is_listed_twice_is_one_of_each_list(tmp_path, run_script):
    rows = [Row(f"a/000{i}_{i}.jpg", "sky", "sky") for i in range(1, 5)]
    rows += [Row("a/0001_1.jpg", "sky", "sky", "Test"), Row("a/0002_2.jpg", "sky", "sky")]
    rows += [Row("a/0005_5.jpg", "sky", "sky"), Row("a/0006_6.jpg", "sky", "sky", "Test")]
    rows += [Row("a/0007_7.jpg", "sky", "")]
    source = write_official_files(tmp_path / "nus_wide", rows)
    counts, splits = prepared(run_script, source, tmp_path / "out")
    assert (counts["covered"], counts["kept"]) == (8, 6)
    assert (counts["kept_in_train_list"], counts["kept_in_test_list"]) == (6, 2)
    assert ids(splits["test"]) == {"1", "6"}


def test_zip_files_as_downloaded_are_read_like_folders(tmp_path, run_script, small_nus_wide):
    zipped = tmp_path / "downloads" / "deeper"
    zipped.mkdir(parents=True)
    for part in small_nus_wide.iterdir():
        with zipfile.ZipFile(zipped / f"{part.name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(part.rglob("*.txt")):
                archive.write(path, path.relative_to(small_nus_wide))
            archive.writestr(f"__MACOSX/{part.name}/._Imagelist.txt", b"\0\5\26\7")
    assert prepared(run_script, tmp_path / "downloads", tmp_path / "a") == prepared(
        run_script, small_nus_wide, tmp_path / "b"
    )


def test_parts_are_found_anywhere_below(tmp_path, run_script, small_nus_wide):
    expected = prepared(run_script, small_nus_wide, tmp_path / "a")
    deeper = tmp_path / "x" / "y" / "unpacked"
    deeper.parent.mkdir(parents=True)
    shutil.move(small_nus_wide, deeper)
    assert prepared(run_script, tmp_path / "x", tmp_path / "b") == expected


def test_the_known_bad_value_of_the_lake_labels_is_explained(tmp_path, run_script, small_nus_wide):
    folder = small_nus_wide / "Groundtruth/TrainTestLabels"
    folder.mkdir()
    lines = ["0"] * 15
    lines[3] = "-1130179"
    (folder / "Labels_lake_Train.txt").write_text("\n".join(lines) + "\n")
    outcome = run_script("prepare_nus_wide", small_nus_wide, tmp_path / "out", "--no_images")
    assert outcome.status == 0
    assert "Labels_lake_Train.txt, line 4: -1130179 is a known fault" in outcome.out
    notes = json.loads((tmp_path / "out/counts.json").read_text())["notes"]
    assert any("-1130179" in note for note in notes)


def test_train_labels_that_disagree_are_named_with_line_and_value(tmp_path, run_script, small_nus_wide):
    folder = small_nus_wide / "Groundtruth/TrainTestLabels"
    folder.mkdir()
    (folder / "Labels_sun_Test.txt").write_text("1\n1\n0\n1\n1\n")
    outcome = run_script("prepare_nus_wide", small_nus_wide, tmp_path / "out", "--no_images")
    assert outcome.status == 1
    assert "Labels_sun_Test.txt, line 3: 0, but AllLabels/Labels_sun.txt has 1" in outcome.error


def test_the_validation_split_is_the_same_with_and_without_photographs(tmp_path, run_script, sample):
    _, splits = prepared(run_script, sample, tmp_path / "tags")
    assert run_script("prepare_nus_wide", sample, tmp_path / "images").status == 0
    images = datasets.load_dataset(str(tmp_path / "images"), cache_dir=str(tmp_path / "cache2"))
    assert images["validation"]["item_id"][:] == [row["item_id"] for row in splits["validation"]]
