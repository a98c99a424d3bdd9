import csv
import io
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from magneto_training import tag_data
from magneto_training.arguments import DataArguments, PretrainingDataArguments
from magneto_training.photographs import undecoded
from magneto_training.prediction_parts import SCHEMA
from magneto_training.tag_data import (
    DataError,
    build_vocabulary,
    check_rows,
    checked_split,
    load_pretraining_splits,
    load_tag_dataset,
    load_training_splits,
)


def photograph(color="red", size=(8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def write_photographs(folder, **colors: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, color in colors.items():
        (folder / f"{name}.png").write_bytes(photograph(color))


def write_csv(path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def cache_size() -> int:
    """Bytes of what `datasets` keeps."""
    return sum(file.stat().st_size for file in datasets.config.HF_DATASETS_CACHE.rglob("*") if file.is_file())


def make_split(rows: list[dict]) -> datasets.Dataset:
    """Rows in the project's form; a missing column gets a good value."""
    good = {
        "item_id": "a",
        "image": {"bytes": photograph(), "path": None},
        "tags": ["x", "y"],
        "important_tags": ["x"],
    }
    features = datasets.Features(
        item_id=datasets.Value("string"),
        image=datasets.Image(),
        tags=datasets.List(datasets.Value("string")),
        important_tags=datasets.List(datasets.Value("string")),
    )
    rows = [{**good, "item_id": f"im{index}", **row} for index, row in enumerate(rows)]
    return datasets.Dataset.from_list(rows, features=features)


# ------------------------------------------------------------------------------------------------------------- loading


def test_a_parquet_folder(dataset_dir):
    splits = load_tag_dataset(str(dataset_dir))

    assert {name: len(split) for name, split in splits.items()} == {"train": 48, "validation": 16, "test": 13}
    row = splits["test"][0]
    assert isinstance(row["image"], Image.Image)
    assert set(row["important_tags"]) < set(row["tags"]) or row["important_tags"] == row["tags"]
    assert isinstance(row["item_id"], str)


def test_a_csv_folder_with_comma_separated_tags_and_relative_paths(tmp_path):
    folder = tmp_path / "photos"
    write_photographs(folder / "images", sea="blue", wood="green")
    write_csv(
        folder / "train.csv",
        [
            {"item_id": 7, "image": "images/sea.png", "tags": "sea, big boat ,sun", "important_tags": "sea"},
            {"item_id": 8, "image": "images/wood.png", "tags": "tree", "important_tags": "tree"},
        ],
    )

    splits = load_tag_dataset(str(folder))

    first, second = splits["train"]
    assert (first["item_id"], second["item_id"]) == ("7", "8")
    assert first["tags"] == ["sea", "big boat", "sun"] and first["important_tags"] == ["sea"]
    assert [row["image"].convert("RGB").getpixel((0, 0)) for row in (first, second)] == [(0, 0, 255), (0, 128, 0)]


def test_a_jsonl_folder_with_lists_and_splits_by_name(tmp_path):
    folder = tmp_path / "photos"
    write_photographs(folder, sea="blue")
    row = {"item_id": "a", "image": "sea.png", "tags": ["sea", "a, b"], "important_tags": ["sea"]}
    for name in ("train", "validation", "test"):
        (folder / f"{name}.jsonl").write_text(json.dumps({**row, "item_id": name}) + "\n")

    splits = load_tag_dataset(str(folder))

    assert {name: split[0]["item_id"] for name, split in splits.items()} == {
        name: name for name in ("train", "validation", "test")
    }
    assert splits["test"][0]["tags"] == ["sea", "a, b"]
    assert splits["test"][0]["image"].size == (8, 8)


def test_a_path_belongs_to_the_table_that_names_it(tmp_path):
    for split, color in (("test", "blue"), ("train", "red")):
        write_photographs(tmp_path / "photos" / split, a=color)
        rows = [{"item_id": split, "image": "a.png", "tags": "x", "important_tags": "x"}]
        write_csv(tmp_path / "photos" / split / "metadata.csv", rows)

    splits = load_tag_dataset(str(tmp_path / "photos"))

    assert splits["train"][0]["image"].convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert splits["test"][0]["image"].convert("RGB").getpixel((0, 0)) == (0, 0, 255)


def test_paths_in_a_parquet_table_are_relative_to_the_folder(tmp_path):
    write_photographs(tmp_path / "images", a="blue")
    datasets.Dataset.from_list([{"item_id": "a", "image": "images/a.png", "tags": ["x"]}]).to_parquet(
        tmp_path / "train.parquet"
    )

    assert load_tag_dataset(str(tmp_path))["train"][0]["image"].convert("RGB").getpixel((0, 0)) == (0, 0, 255)


def test_two_tables_of_a_split_have_their_own_photographs(tmp_path):
    for name in ("one", "two"):
        write_photographs(tmp_path / "photos" / name, a="red" if name == "one" else "blue")
        write_csv(tmp_path / "photos" / name / "table.csv", [{"item_id": name, "image": "a.png", "tags": "x"}])

    rows = load_tag_dataset(str(tmp_path / "photos"))["train"]

    colors = {row["item_id"]: row["image"].convert("RGB").getpixel((0, 0)) for row in rows}
    assert colors == {"one": (255, 0, 0), "two": (0, 0, 255)}


def test_cells_of_a_csv_are_read_as_they_are_written(tmp_path):
    rows = [
        {"item_id": "001", "tags": "1984, null", "important_tags": ""},
        {"item_id": "1e3", "tags": '["red, green", "sea"]', "important_tags": "['sea']"},
        {"item_id": "", "tags": "null", "important_tags": ""},
    ]
    write_csv(tmp_path / "train.csv", rows)

    dataset = load_tag_dataset(str(tmp_path))["train"]

    assert dataset["item_id"][:] == ["001", "1e3", ""]
    assert dataset["tags"][:] == [["1984", "null"], ["red, green", "sea"], ["null"]]
    assert dataset["important_tags"][:] == [[], ["sea"], []]
    report = check_rows(dataset, "csv", use_images=False, use_labels=True, allow_unlabeled=True)
    assert {problem: len(items) for problem, items in report.problems.items()} == {"no item_id": 1}


@pytest.mark.parametrize(
    "cell",
    [
        '["red", sea',
        "[ 'red', 'sea'",
        "[red, sea",
        "[1, 2",
        "['red' 'sea']",
        "['red'\n 'sea']",
        '["red", "\\ud83d"]',
        "[1, 2]",
    ],
)
def test_a_cell_that_only_looks_like_a_list_is_an_error(tmp_path, cell):
    write_csv(tmp_path / "train.csv", [{"item_id": "1", "tags": cell}])
    with pytest.raises(DataError, match="tags holds .* expected a list of texts"):
        load_tag_dataset(str(tmp_path))


def test_a_list_in_a_cell_is_read_as_json(tmp_path):
    write_csv(
        tmp_path / "train.csv", [{"item_id": "1", "tags": json.dumps(["a/b", "\U0001f600"]).replace("/", "\\/")}]
    )

    assert load_tag_dataset(str(tmp_path))["train"]["tags"][:] == [["a/b", "\U0001f600"]]


@pytest.mark.parametrize("row", ["1,beach,ocean", "\n1,a,b,c,d"])
def test_tags_without_quotation_marks_are_an_error(tmp_path, row):
    (tmp_path / "train-0.csv").write_text('item_id,tags\n0,"beach,ocean"\n')
    (tmp_path / "train-1.csv").write_text(f"item_id,tags\n{row}\n2,beach\n")

    with pytest.raises(DataError, match=r"train-1.csv, line [23]: found [35] cells, expected 2; .* quotation marks$"):
        load_tag_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("latest.csv", "train"),
        ("my_test_rows.csv", "test"),
        ("devices.csv", "train"),
        ("val.csv", "validation"),
        ("training.csv", "train"),
        ("testing.csv", "test"),
        ("evaluation-00001.csv", "test"),
        ("test/part-1.csv", "test"),
        ("test/train.csv", "train"),
    ],
)
def test_a_whole_word_of_the_name_says_the_split(tmp_path, name, split):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write_csv(tmp_path / name, [{"item_id": "1", "tags": "x"}])
    (tmp_path / "out.metrics.json").write_text("{}")
    assert list(load_tag_dataset(str(tmp_path))) == [split]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tags": [2020, "red"]}, r"train: column 'tags' holds \[2020, 'red'\] in row 1, expected lists of text"),
        ({"tags": "red"}, r"column 'tags' holds 'red' in row 1, expected lists of text"),
        ({"important_tags": [["sea"]]}, r"column 'important_tags' holds \[\['sea'\]\] in row 1"),
        ({"image": 5}, r"column 'image' holds 5 in row 1, expected photographs"),
        ({"item_id": 5}, r"column 'item_id' holds 5 in row 1, expected text alone"),
    ],
)
def test_one_value_of_another_type_does_not_spoil_a_json_column(tmp_path, change, message):
    write_photographs(tmp_path, a="red")
    row = {"item_id": "x", "image": "a.png", "tags": ["sea", "sun"], "important_tags": ["sea"]}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, row | change, row)))

    with pytest.raises(DataError, match=message):
        load_tag_dataset(str(tmp_path))


def test_what_predict_has_written_is_no_table_of_rows(tmp_path):
    write_csv(tmp_path / "photos.csv", [{"item_id": "1", "tags": "sea, sun"}])
    pq.write_table(SCHEMA.empty_table(), tmp_path / "chosen.parquet")
    (tmp_path / "chosen.skipped.csv").write_text("index,item_id,reason\n")
    (tmp_path / "chosen.metrics.json").write_text("{}")

    assert load_tag_dataset(str(tmp_path))["train"]["tags"][:] == [["sea", "sun"]]


def test_rows_may_have_scores(tmp_path):
    rows = {"item_id": ["1"], "tags": [["sea"]], "important_tags": [["sea"]], "scores": [[0.5]], "selected_tags": [[]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")

    assert load_tag_dataset(str(tmp_path))["train"]["tags"][:] == [["sea"]]


def test_a_tag_may_begin_with_a_bracket(tmp_path):
    write_csv(tmp_path / "photos.csv", [{"item_id": "1", "tags": "[sic] sign, red"}])

    assert load_tag_dataset(str(tmp_path))["train"]["tags"][:] == [["[sic] sign", "red"]]


def test_the_first_of_several_odd_columns_is_named(tmp_path):
    rows = [
        {"item_id": 1, "tags": ["a"], "important_tags": ["a"]},
        {"item_id": "x", "tags": [1], "important_tags": [1]},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    with pytest.raises(DataError, match="column 'item_id' holds 1 in row 0"):
        load_tag_dataset(str(tmp_path))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"item_id,tags\n", r"train.csv: found no rows, expected at least one"),
        (b"item_id;tags\n1;cow, sky\n", r"train.csv: found the columns 'item_id;tags', expected commas between them"),
        ("item_id,tags\n1,K\u00fcche\n".encode("cp1252"), "found other text than UTF-8 in a table"),
    ],
)
def test_a_csv_of_another_kind_is_an_error_that_says_so(tmp_path, content, message):
    (tmp_path / "train.csv").write_bytes(content)

    with pytest.raises(DataError, match=message):
        load_tag_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["holdout.csv", "validate.csv", "unlabeled/rows.csv"])
def test_a_table_of_no_split_beside_those_of_splits_is_an_error(tmp_path, name):
    for path in ("train.csv", "validation.csv", name):
        write_csv(tmp_path / path, [{"item_id": "1", "tags": "x"}])

    with pytest.raises(DataError, match=rf"{name}: found no split .* expected one of train, .*test.* tables' names$"):
        load_tag_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["unlabeled", "nothing"])
def test_a_configuration_of_a_folder_that_has_none_is_an_error(tmp_path, name):
    write_csv(tmp_path / "unlabeled" / "train.csv", [{"item_id": "1", "tags": "x"}])

    with pytest.raises(DataError, match=f"the configuration is '{name}', expected none where no README.md"):
        load_tag_dataset(str(tmp_path), name)

    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: unlabeled\n  data_files: unlabeled/*\n---\n")
    if name == "unlabeled":
        assert load_tag_dataset(str(tmp_path), name)["train"]["tags"][:] == [["x"]]
    else:
        with pytest.raises(DataError, match="'nothing' not found"):
            load_tag_dataset(str(tmp_path), name)


@pytest.mark.parametrize(
    "card",
    ["# My photographs\n", "---\nconfigs:\n- config_name: default\n  data_files: data/rows.csv\n---\n"],
    ids=["prose", "configs"],
)
def test_a_readme_beside_the_tables_does_no_harm(tmp_path, card):
    # More photographs than tables: without a word in the README, datasets would see an image folder.
    write_photographs(tmp_path / "data", a="red", b="blue", c="green")
    write_csv(tmp_path / "data" / "rows.csv", [{"item_id": "x", "image": "a.png", "tags": "red, sea"}])
    (tmp_path / "README.md").write_text(card)

    row = load_tag_dataset(str(tmp_path))["train"][0]

    assert row["tags"] == ["red", "sea"] and row["image"].convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_tables_that_a_readme_names_have_their_own_photographs_and_are_read_as_it_says(tmp_path):
    for name, color in (("one", "red"), ("two", "blue")):
        write_photographs(tmp_path / name, a=color)
        (tmp_path / name / "rows.csv").write_text(f"item_id;image;tags\n{name};a.png;x, y\n")
    files = [{"split": "train", "path": "*/rows.csv"}, {"split": "test", "path": "two/rows.csv"}]
    card = {"configs": [{"config_name": "default", "sep": ";", "data_files": files}]}
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")

    splits = load_tag_dataset(str(tmp_path))

    assert list(splits) == ["train", "test"]
    for split, colors in (("train", {"one": (255, 0, 0), "two": (0, 0, 255)}), ("test", {"two": (0, 0, 255)})):
        assert splits[split].column_names == ["item_id", "image", "tags"] and splits[split][0]["tags"] == ["x", "y"]
        assert {row["item_id"]: row["image"].convert("RGB").getpixel((0, 0)) for row in splits[split]} == colors


def test_an_image_folder_is_left_to_datasets(tmp_path):
    write_photographs(tmp_path / "train", a="red")
    write_csv(tmp_path / "train" / "metadata.csv", [{"file_name": "a.png", "item_id": "x1", "tags": "x"}])
    row = load_tag_dataset(str(tmp_path))["train"][0]
    assert row["item_id"] == "x1" and row["tags"] == ["x"] and row["image"].size


def test_parquet_tables_may_name_their_photographs(tmp_path):
    write_photographs(tmp_path / "data", a="red")
    datasets.Dataset.from_list([{"item_id": "1", "image": "a.png", "tags": ["x"]}]).to_parquet(
        tmp_path / "data" / "test.parquet"
    )
    assert load_tag_dataset(str(tmp_path))["test"][0]["image"].convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_columns_in_another_form_are_parsed_without_a_copy_of_the_photographs(tmp_path):
    size, noise = 200_000, os.urandom(200_000)
    rows = {
        "item_id": [1, 2],  # as pandas writes it
        "image": [{"bytes": photograph() + noise, "path": None}] * 2,
        "tags": ["x, y", "z"],
        "width": [8, 9],
        "important_tags": pa.array([["x"], ["z"]], pa.large_list(pa.large_string())),  # as polars does
    }
    pq.write_table(pa.table(rows), tmp_path / "train.parquet")

    split = load_tag_dataset(str(tmp_path))["train"]

    assert 2 * size < cache_size() < 3 * size
    assert split.column_names == list(split.features) == list(rows)
    assert [{**row, "image": row["image"].size} for row in split] == [
        {"item_id": "1", "image": (8, 8), "tags": ["x", "y"], "width": 8, "important_tags": ["x"]},
        {"item_id": "2", "image": (8, 8), "tags": ["z"], "width": 9, "important_tags": ["z"]},
    ]
    report = check_rows(split, "photos, train", use_images=True, use_labels=True)
    assert report.problems == {} and cache_size() < 3 * size


def test_a_photograph_missing_from_the_folder_is_not_sought_elsewhere(tmp_path, monkeypatch):
    write_photographs(tmp_path, a="red")
    monkeypatch.chdir(tmp_path)
    rows = [{"item_id": 1, "image": "a.png", "tags": "x"}]
    write_csv(tmp_path / "photos" / "train.csv", rows)

    split = load_tag_dataset(str(tmp_path / "photos"))["train"]

    report = check_rows(split, "photos, train", use_images=True, use_labels=False)
    assert report.problems == {"a missing or unreadable photograph": ["1"]}


@pytest.mark.parametrize("path", ["../secret.png", "/{absolute}", "link/secret.png"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, path):
    write_photographs(tmp_path, secret="red")
    folder = tmp_path / "photos"
    write_photographs(folder, a="red")
    os.symlink(tmp_path, folder / "link")
    path = path.replace("/{absolute}", str(tmp_path / "secret.png"))
    write_csv(folder / "train.csv", [{"item_id": 1, "image": path, "tags": "x", "important_tags": "x"}])

    with pytest.raises(DataError, match="leaves .*photos"):
        load_tag_dataset(str(folder))


@pytest.mark.parametrize("path", ["{outside}", "http://127.0.0.1:1/a.png", "a.png"])
def test_a_photograph_that_parquet_names_outside_of_its_folder_is_refused(tmp_path, path):
    write_photographs(tmp_path, secret="red")
    (tmp_path / "photos").mkdir()
    path = path.replace("{outside}", str(tmp_path / "secret.png"))
    rows = [{"item_id": "1", "image": {"bytes": photograph(), "path": "b.png"}, "tags": ["x"]}]
    rows.append({**rows[0], "image": {"bytes": None, "path": path}})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "photos" / "train.parquet")

    refused = rf"train: a photograph is given as '{path}', expected .* path inside .*photos$"
    with pytest.raises(DataError, match=refused):
        load_tag_dataset(str(tmp_path / "photos"))
    stream = load_tag_dataset(str(tmp_path / "photos"), streaming=True)["train"]
    with pytest.raises(DataError, match=refused):  # when it is its turn
        list(undecoded(stream))

    write_photographs(tmp_path / "photos", a="red")
    rows[1]["image"]["path"] = str(tmp_path / "photos" / "a.png")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "photos" / "train.parquet")
    assert load_tag_dataset(str(tmp_path / "photos"))["train"][1]["image"].size == (8, 8)
    stream = load_tag_dataset(str(tmp_path / "photos"), streaming=True)["train"]
    assert [row["image"].size for row in stream] == [(8, 8), (8, 8)]


def test_a_table_from_the_hub_names_no_file_of_this_machine(tmp_path, monkeypatch):
    write_photographs(tmp_path, secret="red")
    real = tag_data.load_dataset
    for path in ("http://127.0.0.1:1/a.png", tmp_path / "secret.png"):
        write_csv(tmp_path / "train.csv", [{"item_id": 1, "image": path, "tags": "x"}])
        splits = real("csv", data_files={"train": str(tmp_path / "train.csv")})
        monkeypatch.setattr(tag_data, "load_dataset", lambda *_, splits=splits, **__: splits)
        if path != tmp_path / "secret.png":
            assert load_tag_dataset("user/name")["train"].features["image"] == datasets.Image()

    with pytest.raises(DataError, match="a photograph is given as '.*secret.png', expected its bytes$"):
        load_tag_dataset("user/name")


def test_a_json_table_names_no_file_outside_of_its_folder(tmp_path):
    write_photographs(tmp_path, secret="red")
    (tmp_path / "photos").mkdir()
    row = {"item_id": "1", "image": {"bytes": None, "path": str(tmp_path / "secret.png")}, "tags": ["x"]}
    (tmp_path / "photos" / "train.jsonl").write_text(json.dumps(row))

    with pytest.raises(DataError, match="a photograph is given as '.*secret.png', expected its bytes, or a path"):
        load_tag_dataset(str(tmp_path / "photos"))


def test_the_default_configuration_is_none(tmp_path):
    write_csv(tmp_path / "train.csv", [{"item_id": 1, "tags": "x"}])

    assert load_tag_dataset(str(tmp_path), "default")["train"].num_rows == 1


def test_both_csv_and_json_are_refused(tmp_path):
    write_csv(tmp_path / "train.csv", [{"item_id": 1, "tags": "x"}])
    (tmp_path / "test.jsonl").write_text('{"item_id": 1, "tags": ["x"]}\n')

    with pytest.raises(DataError, match=r"several kinds \(csv, json\)"):
        load_tag_dataset(str(tmp_path))


def test_a_dataset_that_is_not_there_is_named():
    with pytest.raises(DataError, match="'no/such/folder' cannot be loaded") as caught:
        load_tag_dataset("no/such/folder")

    assert "\n" not in str(caught.value)


def test_a_broken_table_is_an_error_that_says_why(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"item_id": "a", "tags": ["x"]}\n{"item_id": \n')

    with pytest.raises(DataError, match="cannot be loaded: .*(JSON|Expected|Unterminated)") as caught:
        load_tag_dataset(str(tmp_path))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_without_rows_adds_none(tmp_path, streaming):
    table = pa.Table.from_pylist([{"item_id": name, "tags": [name]} for name in "abcd"])
    for number, part in enumerate((table[:0], table[:2], table[:0], table[2:])):
        pq.write_table(part, tmp_path / f"train-{number}.parquet")

    split = load_tag_dataset(str(tmp_path), streaming=streaming)["train"]
    assert [row["item_id"] for row in split] == list("abcd")

    for gone in ((1, 3), (2,)):  # two files without rows are left, and then one
        for number in gone:
            (tmp_path / f"train-{number}.parquet").unlink()
        with pytest.raises(DataError, match="train-0.parquet: found no rows, expected at least one"):
            load_tag_dataset(str(tmp_path), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_parquet_file_is_named(tmp_path, streaming):
    table = pa.Table.from_pylist([{"item_id": "a", "tags": ["x"]}])
    for number in (0, 1):
        pq.write_table(table, tmp_path / f"train-{number}.parquet")
    file = tmp_path / "train-1.parquet"
    file.write_bytes(file.read_bytes()[:-20])

    with pytest.raises(DataError, match=r"train-1.parquet cannot be read: ArrowInvalid: [^\n]+$"):
        load_tag_dataset(str(tmp_path), streaming=streaming)


def test_a_column_of_a_wrong_type_is_named(tmp_path):
    datasets.Dataset.from_list([{"item_id": "a", "tags": 3}]).to_parquet(tmp_path / "train.parquet")

    with pytest.raises(DataError, match="train: column 'tags' is"):
        load_tag_dataset(str(tmp_path))


# ------------------------------------------------------------------------------------------------------------ checking


BAD_ROWS = [
    ({"image": None}, "a missing or unreadable photograph"),
    ({"image": {"bytes": b"no photograph", "path": None}}, "a missing or unreadable photograph"),
    ({"image": {"bytes": photograph()[:-30], "path": None}}, "a missing or unreadable photograph"),
    ({"image": {"bytes": None, "path": "nowhere.png"}}, "a missing or unreadable photograph"),
    (
        {"image": {"bytes": photograph(size=(510, 10)), "path": None}},
        "a photograph more than 50 times as long as it is wide",
    ),
    ({"tags": []}, "no tags"),
    ({"tags": None}, "no tags"),
    ({"tags": ["x", " "]}, "an empty tag"),
    ({"tags": ["x", None]}, "an empty tag"),
    ({"important_tags": []}, "no important_tags"),
    ({"important_tags": None}, "no important_tags"),
    ({"important_tags": ["x", "z"]}, "important_tags that are not among tags"),
    ({"important_tags": [""]}, "important_tags that are not among tags"),
    ({"item_id": None}, "no item_id"),
]


@pytest.mark.parametrize("row, problem", BAD_ROWS)
def test_every_problem_of_a_row_is_found(row, problem):
    rows = make_split([{}, row, {}])

    report = check_rows(rows, "photos, train", use_images=True, use_labels=True)

    assert report.problems == {problem: [str(row.get("item_id", "im1"))]}
    assert report.good_rows.tolist() == [0, 2]


@pytest.mark.parametrize(
    "rows, bad",
    [
        # An empty tag of one row is no tag of the row before it, nor the other way round.
        ([{"tags": ["x"], "important_tags": ["y"]}, {"tags": ["", "x", "y"]}], ["im0", "im1"]),
        ([{"tags": ["y", "x"]}, {"tags": ["x"], "important_tags": [""]}], ["im1"]),
        ([{"tags": ["x"]}, {"tags": ["y"], "important_tags": ["x"]}, {"tags": ["x"]}], ["im1"]),
    ],
)
def test_the_tags_of_one_row_are_not_those_of_its_neighbours(rows, bad):
    report = check_rows(make_split(rows), "photos, train", use_images=False, use_labels=True)

    assert sorted(item for items in report.problems.values() for item in items) == bad


def test_important_tags_are_compared_in_their_one_spelling():
    rows = make_split([{"tags": ["Blue  Sky", "x"], "important_tags": ["blue sky"]}])

    assert check_rows(rows, "photos, train", use_images=True, use_labels=True).problems == {}


def test_what_the_model_does_not_look_at_is_not_checked():
    rows = make_split([{"image": None, "important_tags": []}])

    assert check_rows(rows, "photos, test", use_images=False, use_labels=False).problems == {}


def test_bad_rows_stop_with_counts_and_the_first_item_ids():
    rows = make_split([{"tags": []}] * 7 + [{}, {"image": None}, {}])

    with pytest.raises(DataError) as caught:
        checked_split(rows, "photos, train", True, True, skip_bad_rows=False)

    assert str(caught.value) == (
        "photos, train: 8 of 10 rows are bad: 7 with no tags (item_id im0, im1, im2, im3, im4, ...); "
        "1 with a missing or unreadable photograph (item_id im8); --skip_bad_rows true leaves them out"
    )


def test_skip_bad_rows_keeps_the_rest_and_says_how_many_went(capsys):
    rows = make_split([{"tags": []}, {}, {"image": None}, {}])

    kept = checked_split(rows, "photos, train", True, True, skip_bad_rows=True)

    assert kept["item_id"][:] == ["im1", "im3"]
    assert "2 of 4 rows are bad" in capsys.readouterr().out


def test_an_image_cell_with_nothing_in_it_is_a_bad_row_as_any_other(tmp_path, capsys):
    make_split([{}, {}]).to_parquet(tmp_path / "train.parquet")
    table = pq.read_table(tmp_path / "train.parquet")
    rows = table.to_pylist()
    rows[1]["image"] = {"bytes": None, "path": None}  # `datasets` writes no such cell, other programs do
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "train.parquet")
    split = load_tag_dataset(str(tmp_path))["train"]
    report = "photos, train: 1 of 2 rows are bad: 1 with a missing or unreadable photograph (item_id im1); "

    with pytest.raises(DataError) as caught:
        checked_split(split, "photos, train", True, True, skip_bad_rows=False)
    kept = checked_split(split, "photos, train", True, True, skip_bad_rows=True)

    assert str(caught.value) == report + "--skip_bad_rows true leaves them out"
    assert kept["item_id"][:] == ["im0"]
    assert report + "left out" in capsys.readouterr().out


def test_without_a_good_row_there_is_nothing_to_go_on_with():
    with pytest.raises(DataError, match="none is left"):
        checked_split(make_split([{"tags": []}]), "photos, train", True, True, skip_bad_rows=True)


def test_good_rows_are_left_as_they_are():
    rows = make_split([{}, {}])

    assert checked_split(rows, "photos, train", True, True, skip_bad_rows=False) is rows


@pytest.mark.parametrize("column", ["item_id", "tags", "important_tags", "image"])
def test_a_missing_column_is_named(column):
    with pytest.raises(DataError, match=f"photos, train: column '{column}' is missing, found .*"):
        check_rows(make_split([{}]).remove_columns(column), "photos, train", True, True)


@pytest.mark.parametrize("field", ["train_split", "validation_split"])
def test_a_missing_split_is_named(dataset_dir, field):
    with pytest.raises(DataError, match="split 'nothing' is missing, found train, validation, test"):
        load_training_splits(DataArguments(dataset_name=str(dataset_dir), **{field: "nothing"}), use_images=False)


def test_a_test_split_is_not_needed(dataset_dir):
    data_args = DataArguments(dataset_name=str(dataset_dir), test_split="nothing")

    splits = load_training_splits(data_args, use_images=False)

    assert {name: len(split) for name, split in splits.items()} == {"train": 48, "validation": 16}
    assert splits["train"].column_names == ["item_id", "tags", "important_tags"]


def test_a_mended_photograph_is_seen_by_the_next_run(tmp_path):
    folder = tmp_path / "photos"
    write_csv(folder / "train.csv", [{"item_id": 1, "image": "a.png", "tags": "x", "important_tags": "x"}])

    def bad_rows():
        return check_rows(load_tag_dataset(str(folder))["train"], "photos, train", True, True).problems

    assert bad_rows() == {"a missing or unreadable photograph": ["1"]}
    write_photographs(folder, a="red")
    assert bad_rows() == {}
    (folder / "a.png").write_bytes(b"no photograph")
    assert bad_rows() == {"a missing or unreadable photograph": ["1"]}


def test_what_another_code_has_parsed_and_checked_is_not_used(tmp_path, monkeypatch):
    write_photographs(tmp_path, a="red")
    write_csv(tmp_path / "train.csv", [{"item_id": 1, "image": "a.png", "tags": "x, y"}])

    def load():
        split = load_tag_dataset(str(tmp_path))["train"]
        return split["tags"][:], check_rows(split, "photos, train", use_images=True, use_labels=False).problems

    assert load() == ([["x", "y"]], {})
    monkeypatch.setattr(tag_data, "_split_tags", lambda text, column: [text])
    monkeypatch.setattr(tag_data, "FORMAT", tag_data.FORMAT + 1)
    assert load() == ([["x, y"]], {})
    monkeypatch.setattr(tag_data, "find_photograph_problem", lambda image: "a new problem")
    monkeypatch.setattr("PIL.__version__", "another")
    assert load() == ([["x, y"]], {"a new problem": ["1"]})


def test_another_spelling_of_the_folder_is_the_same_dataset(tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    write_photographs(folder, a="red")
    write_csv(folder / "train.csv", [{"item_id": 1, "image": "a.png", "tags": "x", "important_tags": "x"}])
    monkeypatch.chdir(tmp_path)

    def check(name):
        return check_rows(load_tag_dataset(name)["train"], "photos, train", True, True).problems

    assert check("photos") == {}
    size = cache_size()
    monkeypatch.chdir(folder)
    os.symlink(folder, tmp_path / "link")
    for name in (str(folder), "../photos", ".", "../link"):
        assert check(name) == {}
    assert cache_size() == size


def test_the_files_of_a_folder_are_looked_at_once_for_all_splits(tmp_path, monkeypatch):
    write_photographs(tmp_path, a="red")
    for split in ("train", "validation", "test"):
        write_csv(tmp_path / f"{split}.csv", [{"item_id": 1, "image": "a.png", "tags": "x"}])
    looks = []
    state_of_files = tag_data._state_of_files
    monkeypatch.setattr(tag_data, "_state_of_files", lambda folder: looks.append(folder) or state_of_files(folder))

    load_tag_dataset(str(tmp_path))

    assert looks == [tmp_path]


def test_pretraining_does_not_read_the_ground_truth(tmp_path):
    rows = [{"item_id": index, "tags": "x, y", "important_tags": "[x]"} for index in range(3)]
    write_csv(tmp_path / "train.csv", rows)

    splits = load_pretraining_splits(PretrainingDataArguments(dataset_name=str(tmp_path)), use_images=False)

    assert splits["train"][0]["tags"] == ["x", "y"]
    with pytest.raises(DataError, match="important_tags holds"):
        load_training_splits(DataArguments(dataset_name=str(tmp_path)), use_images=False)


# ---------------------------------------------------------------------------------------------------------- vocabulary


def test_the_vocabulary_is_every_tag_once_in_alphabetical_order():
    rows = make_split([{"tags": ["Sun", "blue  sky"]}, {"tags": ["boat", "sun ", "Blue Sky"]}])

    assert build_vocabulary(rows) == ["blue sky", "boat", "sun"]
