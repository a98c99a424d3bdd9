"""prepare_table.py takes anyone's table: kinds of files, layouts, checks, splits."""

import csv
import json
import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

ROWS = [
    {"item_id": f"{i:02d}", "tags": ["red car", "été", f"t{i % 3}"], "important_tags": ["red car"]} for i in range(20)
] + [
    {"item_id": "20", "tags": ["sky"], "important_tags": []},  # unlabeled
    {"item_id": "21", "tags": ["sky"], "important_tags": ["sky", "sea"]},  # not covered
    {"item_id": "22", "tags": [], "important_tags": ["sky"]},  # without tags
    {"item_id": "03", "tags": ["sky"], "important_tags": ["sky"]},  # an id that was there before
]


def write_csv(path: Path, rows: list[dict], separator: str = ",", tags: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=separator)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: tags.join(v) if isinstance(v, list) else v for k, v in row.items()})
    return path


def write_wide(path: Path, rows: list[dict]) -> Path:
    vocabulary = list(dict.fromkeys(tag for row in rows for tag in [*row["tags"], "sea", "sky"]))
    wide = [
        {"item_id": row["item_id"]}
        | {f"tags_{tag}": int(tag in row["tags"]) for tag in vocabulary}
        | {f"important_tags_{tag}": int(tag in row["important_tags"]) for tag in vocabulary}
        for row in rows
    ]
    return write_csv(path, wide)


def write_wide_booleans(path: Path, rows: list[dict]) -> Path:
    vocabulary = list(dict.fromkeys(tag for row in rows for tag in [*row["tags"], "sea", "sky"]))
    wide = [
        {"item_id": row["item_id"]}
        | {f"{column}_{tag}": tag in row[column] for column in ("tags", "important_tags") for tag in vocabulary}
        for row in rows
    ]
    return write_parquet(path, wide)


def write_json_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def load(tmp_path, run_script):
    """Prepares a table without photographs; returns counts and the rows of every split."""

    def load(table: Path, *options: str) -> tuple[dict, dict]:
        out = tmp_path / f"out_{table.name}"
        outcome = run_script("prepare_table", table, tmp_path, out, "--no_images", *options)
        assert outcome.status == 0, outcome.err
        cache = str(tmp_path / "cache")
        labelled = any(out.glob("data/*.parquet"))
        splits = dict(datasets.load_dataset(str(out), cache_dir=cache)) if labelled else {}
        if (out / "unlabeled/train-00000.parquet").exists():
            config = datasets.load_dataset(str(out), "unlabeled", cache_dir=cache)
            splits["unlabeled"] = config["train"]
        counts = json.loads((out / "counts.json").read_text())
        return counts, {split: list(rows) for split, rows in splits.items()}

    return load


@pytest.fixture
def fails(tmp_path, run_script):
    """Prepares a table that cannot be used; returns its one line."""

    def fails(table: Path, *options: str) -> str:
        out = tmp_path / "out"
        outcome = run_script("prepare_table", table, tmp_path, out, "--no_images", *options)
        assert outcome.status == 1
        assert outcome.err.count("\n") == 1
        assert not out.exists()
        assert not out.with_name("out.partial").exists()
        return outcome.error

    return fails


def test_all_kinds_of_tables_give_the_same_dataset(tmp_path, load):
    counts, splits = load(write_parquet(tmp_path / "a.parquet", ROWS))
    assert counts == {
        "rows": 24,
        "repeated_ids": 1,
        "with_tags": 22,
        "with_tags_and_important_tags": 21,
        "not_covered": 1,
        "covered": 20,
        "kept": 20,
        "missing_images": 0,
        "unreadable_images": 0,
        "splits": {"train": 16, "validation": 2, "test": 2, "unlabeled": 2},
    }
    labelled = {r["item_id"]: r for s in ("train", "validation", "test") for r in splits[s]}
    assert labelled == {row["item_id"]: row for row in ROWS[:20]}
    assert splits["unlabeled"] == [
        {"item_id": "20", "tags": ["sky"], "important_tags": []},
        {"item_id": "21", "tags": ["sky"], "important_tags": []},
    ]
    for table, *options in (
        (write_json_lines(tmp_path / "a.jsonl", ROWS),),
        (write_csv(tmp_path / "a.csv", ROWS),),
        (write_csv(tmp_path / "a.tsv", ROWS, separator="\t"),),
        (write_csv(tmp_path / "b.csv", ROWS, ";", "|"), "--column_separator", ";",
         "--tag_separator", "|"),
        (write_wide(tmp_path / "wide.csv", ROWS),),
        (write_wide_booleans(tmp_path / "wide.parquet", ROWS),),
        (write_csv(tmp_path / "json_cells.csv", [spelled_out(row, json.dumps) for row in ROWS]),),
        (write_csv(tmp_path / "python_cells.csv", [spelled_out(row, str) for row in ROWS]),),
    ):  # fmt: skip
        assert load(table, *options) == (counts, splits), table.name


def spelled_out(row: dict, spell) -> dict:
    return {k: spell(v) if isinstance(v, list) else v for k, v in row.items()}


@pytest.mark.parametrize(
    "cell",
    [
        "[sky, sea]",
        '["sky", "sea]',
        '["sky", 1]',
        '["sky", null]',
        '["sky"], ["sea"]',
        "['sky' 'sea']",  # how numpy writes an array
        '["\\ud800"]',
        "[" * 5_000 + "]" * 5_000,
    ],
)
def test_brackets_without_a_list_of_text_are_named(tmp_path, fails, cell):
    table = write_csv(tmp_path / "a.csv", [ROWS[0], ROWS[1] | {"tags": cell}])
    error = fails(table)
    assert "a.csv, row 2, tags: found " in error
    assert "expected a list of text in the brackets" in error


def test_tags_are_compared_as_training_compares_them(tmp_path, load):
    rows = [ROWS[0] | {"item_id": str(i), "tags": ["x"], "important_tags": ["x"]} for i in range(3)]
    rows.append({"item_id": "a", "tags": ["Beach", "b", "beach"], "important_tags": ["beach"]})
    rows.append({"item_id": "b", "tags": ["Red  Car", "Straße"], "important_tags": ["STRASSE", "red car"]})
    counts, splits = load(write_json_lines(tmp_path / "a.jsonl", rows))
    assert (counts["kept"], counts["not_covered"]) == (5, 0)
    train = {row["item_id"]: row for row in splits["train"]}
    assert train["a"] == {"item_id": "a", "tags": ["Beach", "b"], "important_tags": ["Beach"]}
    assert train["b"]["important_tags"] == ["Straße", "Red  Car"]


def test_the_normal_form_of_a_tag_is_that_of_training():
    from tag_table import _normal_form

    from modeling_magneto.processing_magneto import normalize_tag

    for tag in ("Red \t Car", "STRASSE", "Straße", "ﬁlm", "Å", "ͅα", "a\u00a0b", "İ", "ΰ"):
        assert _normal_form(tag) == normalize_tag(tag)


def test_columns_may_have_other_names(tmp_path, load):
    names = {"item_id": "photo", "tags": "keywords", "important_tags": "best"}
    rows = [{names[k]: v for k, v in row.items()} for row in ROWS]
    options = ("--id_column", "photo", "--tags_column", "keywords")
    counts, _ = load(write_json_lines(tmp_path / "a.jsonl", rows),
                     *options, "--important_tags_column", "best")  # fmt: skip
    assert counts["kept"] == 20


def test_a_table_says_its_own_splits(tmp_path, load):
    names = ["train"] * 14 + ["test"] * 8 + ["train", "test"]
    rows = [row | {"part": name} for row, name in zip(ROWS, names, strict=True)]
    counts, splits = load(write_csv(tmp_path / "a.csv", rows), "--split_column", "part")
    assert {row["item_id"] for row in splits["test"]} == {f"{i:02d}" for i in range(14, 20)}
    # A tenth of train is validation; what is left out of test is nowhere.
    assert counts["splits"] == {"train": 13, "validation": 1, "test": 6, "unlabeled": 0}

    rows = [row | {"part": "validation" if i == 5 else "train"} for i, row in enumerate(ROWS)]
    counts, splits = load(write_csv(tmp_path / "b.csv", rows), "--split_column", "part")
    assert [row["item_id"] for row in splits["validation"]] == ["05"]
    assert counts["splits"] == {"train": 19, "validation": 1, "test": 0, "unlabeled": 2}


def test_three_rows_are_enough_for_three_splits(tmp_path, load):
    counts, _ = load(write_csv(tmp_path / "a.csv", ROWS[:3]))
    assert counts["splits"] == {"train": 1, "validation": 1, "test": 1, "unlabeled": 0}


def test_photographs_are_found_by_column_or_by_item_id(tmp_path, run_script):
    (tmp_path / "photographs/deeper").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (20, 20), (50 * i, 0, 0)).save(tmp_path / f"photographs/{i:02d}.png")
    (tmp_path / "photographs/03.png").rename(tmp_path / "photographs/deeper/x.png")
    by_id = write_csv(tmp_path / "a.csv", ROWS[:5])
    images = ["00.png", "01.png", "02.png", "deeper/x.png", ""]
    rows = [row | {"image": image} for row, image in zip(ROWS[:5], images, strict=True)]
    by_column = write_csv(tmp_path / "b.csv", rows)
    for table, missing in ((by_id, ["03", "04"]), (by_column, ["04"])):
        out = tmp_path / f"out_{table.stem}"
        assert run_script("prepare_table", table, tmp_path / "photographs", out).status == 0
        lines = (out / "missing_images.txt").read_text().splitlines()
        assert [line.split("\t")[1] for line in lines] == missing
    loaded = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    reds = {row["item_id"]: row["image"].getpixel((10, 10))[0] for row in loaded}
    assert abs(reds["03"] - 150) < 3


@pytest.mark.parametrize(
    "path",
    ["../secret.jpg", "a/../../secret.jpg", "/etc/secret.jpg", "..\\secret.jpg", "C:\\s.jpg", ".."],
)
def test_a_path_may_not_leave_the_folder(tmp_path, run_script, path):
    (tmp_path / "photographs").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.jpg")
    rows = [*({**row, "image": "a.jpg"} for row in ROWS[:3]), ROWS[3] | {"image": path}]
    table = write_json_lines(tmp_path / "a.jsonl", rows)
    outcome = run_script("prepare_table", table, tmp_path / "photographs", tmp_path / "out")
    assert outcome.status == 1
    assert "a.jsonl, row 4, image" in outcome.error
    assert "expected a path inside" in outcome.error
    assert not (tmp_path / "out").exists()


def test_an_item_id_may_not_leave_the_folder_either(tmp_path, run_script):
    table = write_json_lines(tmp_path / "a.jsonl", [ROWS[0] | {"item_id": "../secret"}])
    outcome = run_script("prepare_table", table, tmp_path, tmp_path / "out")
    assert outcome.status == 1
    assert "a.jsonl, row 1, item_id: found '../secret.jpg'" in outcome.error


def test_links_may_lead_anywhere_inside_the_folder_but_not_out_of_it(tmp_path, run_script):
    (tmp_path / "outside").mkdir()
    (tmp_path / "photographs/inside").mkdir(parents=True)
    for path in ("outside/s.jpg", "photographs/inside/a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / path)
    (tmp_path / "photographs/link").symlink_to("../outside")
    (tmp_path / "photographs/secret.jpg").symlink_to("../outside/s.jpg")
    (tmp_path / "photographs/fine").symlink_to("inside")
    (tmp_path / "also_photographs").symlink_to("photographs")

    rows = [row | {"image": "fine/a.jpg"} for row in ROWS[:3]]
    for name, row, found in (
        ("folder", ROWS[3] | {"image": "link/s.jpg"}, "row 4, image: found 'link/s.jpg'"),
        ("file", ROWS[3] | {"image": "secret.jpg"}, "row 4, image: found 'secret.jpg'"),
    ):
        table = write_json_lines(tmp_path / f"{name}.jsonl", [*rows, row])
        outcome = run_script("prepare_table", table, tmp_path / "also_photographs", tmp_path / "out")
        assert outcome.status == 1
        assert found in outcome.error
        assert "expected a path inside" in outcome.error
    by_id = write_json_lines(tmp_path / "by_id.jsonl", [ROWS[0] | {"item_id": "secret"}])
    outcome = run_script("prepare_table", by_id, tmp_path / "photographs", tmp_path / "out")
    assert "row 1, item_id: found 'secret.jpg', expected a path inside" in outcome.error
    assert not (tmp_path / "out").exists()

    table = write_json_lines(tmp_path / "fine.jsonl", rows)
    assert run_script("prepare_table", table, tmp_path / "also_photographs", tmp_path / "out").status == 0
    counts = json.loads((tmp_path / "out/counts.json").read_text())
    assert (counts["missing_images"], counts["kept"]) == (0, 3)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("item_id", "", "row 2, item_id: found '', expected an id"),
        ("item_id", None, "row 2, item_id: found None, expected an id"),
        ("item_id", 1.5, "row 2, item_id: found 1.5, expected an id"),
        ("tags", 7, "row 2, tags: found 7, expected a list of tags or a string"),
        ("tags", [1], "row 2, tags: found [1], expected a list"),
        ("important_tags", {"a": 1}, "row 2, important_tags: found {'a': 1}"),
    ],
)
def test_a_bad_value_is_named_with_row_and_column(tmp_path, fails, field, value, expected):
    rows = [ROWS[0], ROWS[1] | {field: value}, ROWS[2]]
    assert expected in fails(write_json_lines(tmp_path / "a.jsonl", rows))


def test_a_bad_split_is_named(tmp_path, fails):
    rows = [row | {"part": "train"} for row in ROWS[:3]] + [ROWS[3] | {"part": "dev"}]
    table = write_csv(tmp_path / "a.csv", rows)
    expected = "row 4, part: found 'dev', expected one of train, validation, test"
    assert expected in fails(table, "--split_column", "part")


def test_a_wide_table_holds_0_and_1_only(tmp_path, fails):
    table = write_wide(tmp_path / "a.csv", ROWS)
    table.write_text(table.read_text().replace("\n04,1", "\n04,x"))
    assert "a.csv, row 5, tags_red car: found 'x', expected 0 or 1" in fails(table)


@pytest.mark.parametrize("column", ["item_id", "tags"])
def test_a_missing_column_is_named(tmp_path, fails, column):
    rows = [{k: v for k, v in row.items() if k != column} for row in ROWS]
    assert f"no column '{column}', found" in fails(write_csv(tmp_path / "a.csv", rows))


@pytest.mark.parametrize("column", ["important_tag", "important_tags", ""])
def test_a_missing_column_of_ground_truth_is_an_error_where_it_was_named(tmp_path, fails, column):
    rows = [{k: v for k, v in row.items() if k != "important_tags"} for row in ROWS]
    error = fails(write_csv(tmp_path / "a.csv", rows), "--important_tags_column", column)
    assert f"no column '{column}', found" in error


def without_ground_truth(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "important_tags"} for row in rows]


def test_a_table_without_ground_truth_is_all_unlabeled(tmp_path, load):
    rows = without_ground_truth(ROWS)
    counts, splits = load(write_parquet(tmp_path / "a.parquet", rows))
    assert counts.pop("notes") == [
        "a.parquet has no column 'important_tags': the ground truth is unknown, all rows are unlabeled "
        "(--important_tags_column names another column)"
    ]
    assert counts == {
        "rows": 24,
        "repeated_ids": 1,
        "with_tags": 22,
        "with_tags_and_important_tags": 0,
        "not_covered": 0,
        "covered": 0,
        "kept": 0,
        "missing_images": 0,
        "unreadable_images": 0,
        "splits": {"train": 0, "validation": 0, "test": 0, "unlabeled": 22},
    }
    assert splits == {"unlabeled": [row | {"important_tags": []} for row in rows[:22]]}
    wide = write_wide(tmp_path / "whole_wide.csv", ROWS)
    with wide.open(encoding="utf-8-sig", newline="") as file:
        wide_rows = [
            {k: v for k, v in row.items() if not k.startswith("important_tags_")} for row in csv.DictReader(file)
        ]
    for table in (
        write_csv(tmp_path / "a.csv", rows),
        write_json_lines(tmp_path / "a.jsonl", rows),
        write_csv(tmp_path / "wide.csv", wide_rows),
        write_csv(tmp_path / "empty_cells.csv", [row | {"important_tags": ""} for row in rows]),
    ):
        others, same_splits = load(table)
        assert ("notes" in others) == (table.name != "empty_cells.csv")
        others.pop("notes", None)
        assert (others, same_splits) == (counts, splits), table.name


def test_the_dataset_of_a_table_without_ground_truth_can_be_predicted(tmp_path, run_script, monkeypatch):
    from huggingface_hub import DatasetCard

    from magneto_training.arguments import PredictArguments
    from magneto_training.prediction import load_prediction_split
    from magneto_training.tag_data import load_tag_dataset

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for i in range(4):
        Image.new("RGB", (20, 20), (50 * i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    table, out = write_csv(tmp_path / "a.csv", without_ground_truth(ROWS[:5])), tmp_path / "out"
    outcome = run_script("prepare_table", table, tmp_path, out)
    assert outcome.status == 0, outcome.err
    assert f"done: load_dataset('{out}', 'unlabeled')" in outcome.out
    assert "the ground truth is unknown" in outcome.out
    assert not (out / "data").exists()

    card = DatasetCard.load(out / "README.md")
    assert [config["config_name"] for config in card.data.configs] == ["unlabeled"]
    assert 'unlabeled = load_dataset("PATH OR HUB ID", "unlabeled", split="train")' in card.text
    assert 'load_dataset("PATH OR HUB ID")' not in card.text
    assert "4 images have 12 candidate tags, 3.00 each, out of a\nvocabulary of 5.\n" in card.text
    assert "are important" not in card.text

    rows = load_tag_dataset(str(out), "unlabeled")
    assert {split: len(found) for split, found in rows.items()} == {"train": 4}
    args = PredictArguments("model", str(out), str(tmp_path / "p.parquet"), dataset_config_name="unlabeled")
    predicted = load_prediction_split(args, use_images=True)
    assert predicted["item_id"][:] == ["00", "01", "02", "03"]
    assert "important_tags" not in predicted.column_names


def test_a_dataset_without_any_row_is_an_error(tmp_path, fails, run_script):
    rows = [row | {"tags": []} for row in without_ground_truth(ROWS)]
    assert "no row is left: the filter kept none" in fails(write_json_lines(tmp_path / "a.jsonl", rows))
    (tmp_path / "photographs").mkdir()
    table = write_csv(tmp_path / "b.csv", without_ground_truth(ROWS))
    outcome = run_script("prepare_table", table, tmp_path / "photographs", tmp_path / "out")
    assert outcome.status == 1
    assert "no row is left: 22 photographs are unusable, first 00 00.jpg: missing" in outcome.error
    assert not (tmp_path / "out").exists()


def test_no_train_row_is_found_before_photographs_are_encoded(tmp_path, fails, monkeypatch):
    monkeypatch.setattr("parquet_dataset.DatasetWriter._write_split", None)
    table = write_csv(tmp_path / "a.csv", [row | {"part": "test"} for row in ROWS[:3]])
    error = fails(table, "--split_column", "part")
    assert "no row is left for the train split: the filter kept none" in error


def test_important_tags_of_which_none_is_among_the_tags_are_a_mistake(tmp_path, fails):
    table = write_csv(tmp_path / "a.csv", [ROWS[0] | {"important_tags": "red car|été"}, ROWS[20]])
    assert "a.csv: of 1 rows with tags and important tags, none has all" in fails(table)


def test_ground_truth_that_begins_after_the_first_row_is_named(tmp_path, fails):
    table = write_json_lines(tmp_path / "a.jsonl", [*without_ground_truth(ROWS[:2]), *ROWS[2:]])
    assert "a.jsonl, row 3: found a column 'important_tags' that row 1 lacks" in fails(table)


def test_tags_with_dollar_signs_stand_in_the_figure(tmp_path, run_script):
    rows = [row | {"tags": ["red car", "$$", "a$b$", "\\$", "$x_$"]} for row in ROWS[:3]]
    table = write_json_lines(tmp_path / "a.jsonl", rows)
    outcome = run_script("prepare_table", table, tmp_path, tmp_path / "out", "--no_images")
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize("column", ["tags", "important_tags"])
def test_a_row_without_a_field_is_named(tmp_path, fails, load, column):
    typo = {column[:-1] if k == column else k: v for k, v in ROWS[3].items()}
    table = write_json_lines(tmp_path / "a.jsonl", [*ROWS[:3], typo])
    assert f"a.jsonl, row 4: no column '{column}', found 'item_id, " in fails(table)
    counts, _ = load(write_json_lines(tmp_path / "b.jsonl", [*ROWS[:3], ROWS[3] | {column: None}]))
    assert counts["kept"] == 3


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.csv", b"", "a.csv: no rows"),
        ("a.csv", b"item_id,tags,important_tags\n", "a.csv: no rows"),
        ("a.csv", b"item_id,tags,important_tags\n1,a\n", "line 2: 2 cells, expected 3"),
        ("a.csv", b'item_id,tags,important_tags\n1,"a,a\n', "after row 0: unexpected end of data"),
        ("a.csv", b"item_id,tags,tags\n1,a,a\n", "a column name occurs twice"),
        ("a.csv", b"item_id,tags,important_tags\n1,\xe9t\xe9,a\n", "expected UTF-8 text"),
        ("a.csv", "item_id,tags,important_tags\n".encode("utf-16"), "expected UTF-8 text"),
        ("a.jsonl", b'{"item_id": 1\n', "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: found [1], expected an object"),
        ("a.jsonl", b'{"item_id": "\\ud800", "tags": "a", "important_tags": "a"}\n', "not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not JSON"),
        ("a.parquet", b"PAR1 but not really", "a.parquet, after row 0"),
        ("a.xlsx", b"PK", "expected a table that ends in .csv, .tsv, .jsonl"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, fails, name, data, expected):
    (tmp_path / name).write_bytes(data)
    assert expected in fails(tmp_path / name)


def test_a_missing_table_or_folder_is_named(tmp_path, fails, run_script):
    assert "nowhere.csv: no such file" in fails(tmp_path / "nowhere.csv")
    table = write_csv(tmp_path / "a.csv", ROWS)
    outcome = run_script("prepare_table", table, tmp_path / "nowhere", tmp_path / "out")
    assert outcome.status == 1
    assert "nowhere: no such folder" in outcome.error


@pytest.mark.parametrize("option", ["--column_separator", "--tag_separator"])
def test_an_empty_separator_is_named(tmp_path, fails, option):
    assert option in fails(write_csv(tmp_path / "a.csv", ROWS), option, "")


def test_random_damage_is_an_error_line_or_harmless(tmp_path):
    """Damaged tables: nothing but InputError, with one line, ever comes out."""
    from parquet_dataset import InputError
    from tag_table import TableFormat, TagTable

    tables = [
        write_csv(tmp_path / "a.csv", ROWS),
        write_wide(tmp_path / "wide.csv", ROWS),
        write_json_lines(tmp_path / "a.jsonl", ROWS),
        write_parquet(tmp_path / "a.parquet", ROWS),
    ]
    chance = random.Random(0)
    errors = 0
    for _ in range(400):
        table = chance.choice(tables)
        data = bytearray(table.read_bytes())
        if chance.random() < 0.5:
            del data[chance.randrange(len(data)) :]
        else:
            for _ in range(chance.randrange(1, 10)):
                data[chance.randrange(len(data))] = chance.randrange(256)
        damaged = tmp_path / f"damaged{table.suffix}"
        damaged.write_bytes(data)
        try:
            list(TagTable(damaged, None, TableFormat()).items())
        except InputError as error:
            assert "\n" not in str(error)
            assert "damaged" in str(error)
            errors += 1
    assert errors > 100
