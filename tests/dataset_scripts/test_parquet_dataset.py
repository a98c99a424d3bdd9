"""A dataset appears whole or not at all, the same every time, and `load_dataset` reads it."""

import errno
import filecmp
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

SCRIPTS = Path(__file__).parents[2] / "dataset_scripts"


def same_files(a: Path, b: Path) -> bool:
    names = sorted(str(path.relative_to(a)) for path in a.rglob("*") if path.is_file())
    others = sorted(str(path.relative_to(b)) for path in b.rglob("*") if path.is_file())
    match, mismatch, errors = filecmp.cmpfiles(a, b, names, shallow=False)
    return names == others and not mismatch and not errors


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of about 60 photographs, so that a small sample has several, and 16 that are read ahead."""
    import parquet_dataset

    monkeypatch.setattr(parquet_dataset, "SHARD_BYTES", 150_000)
    monkeypatch.setattr(parquet_dataset, "ROWS_PER_GROUP_WITH_IMAGES", 20)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


@pytest.fixture
def count_photographs(monkeypatch):
    """Counts the photographs that are encoded, and can interrupt after so many."""
    import parquet_dataset

    encode = parquet_dataset.encode_photograph
    calls = []

    def counted(root, path, short_side):
        calls.append(path)
        if len(calls) == counted.limit:
            raise KeyboardInterrupt
        return encode(root, path, short_side)

    counted.limit, counted.calls = None, calls
    monkeypatch.setattr(parquet_dataset, "encode_photograph", counted)
    return counted


def test_a_second_run_gives_the_same_bytes(tmp_path, run_script, sample, small_shards):
    for out in ("a", "b", "b"):  # the last one replaces the one before
        assert run_script("prepare_nus_wide", sample, tmp_path / out).status == 0
    assert same_files(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, run_script, sample, small_shards, count_photographs):
    assert run_script("prepare_nus_wide", sample, tmp_path / "whole").status == 0
    total = len(count_photographs.calls)
    for limit in (120, 100):
        count_photographs.calls.clear()
        count_photographs.limit = limit
        outcome = run_script("prepare_nus_wide", sample, tmp_path / "out")
        assert outcome.status == 130
        assert "goes on" in outcome.error
        assert not (tmp_path / "out").exists()
    count_photographs.calls.clear()
    count_photographs.limit = None
    assert run_script("prepare_nus_wide", sample, tmp_path / "out").status == 0
    assert len(count_photographs.calls) < total - 60
    assert same_files(tmp_path / "whole", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.fixture
def run_and_kill(small_shards, monkeypatch):
    """Runs `prepare_nus_wide.py ARGUMENTS`, and kills it when so many photographs have been read."""
    import parquet_dataset

    monkeypatch.setattr(parquet_dataset, "SHARD_BYTES", 60_000)  # two row groups

    def run(num_photographs: int, *arguments: object) -> None:
        code = f"""
import os, runpy, sys
sys.path.insert(0, {str(SCRIPTS)!r})
import parquet_dataset
parquet_dataset.SHARD_BYTES, parquet_dataset.ROWS_PER_GROUP_WITH_IMAGES = 60_000, 20
os.cpu_count = lambda: 1
encode = parquet_dataset.encode_photograph
calls = []
def killing(*arguments):
    calls.append(arguments)
    if len(calls) == {num_photographs}:
        os._exit(9)
    return encode(*arguments)
parquet_dataset.encode_photograph = killing
sys.argv = ["prepare_nus_wide", *{list(map(str, arguments))!r}]
runpy.run_path({str(SCRIPTS / "prepare_nus_wide.py")!r}, run_name="__main__")
"""
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9

    return run


@pytest.mark.parametrize("num_photographs", [90, 160, 190])
def test_a_killed_run_goes_on_behind_its_last_shard(tmp_path, run_script, sample, run_and_kill, num_photographs):
    source, out = tmp_path / "nus_wide", tmp_path / "out"
    shutil.copytree(sample, source)
    for path in sorted(source.rglob("*.jpg"))[::5]:  # some are read ahead before the shard before them is finished
        path.unlink()
    run_and_kill(num_photographs, source, out)
    assert not out.exists()
    written = (tmp_path / "out.partial/data/train-00000.parquet").stat().st_mtime_ns
    assert run_script("prepare_nus_wide", source, out).status == 0
    assert (out / "data/train-00000.parquet").stat().st_mtime_ns == written
    assert run_script("prepare_nus_wide", source, tmp_path / "whole").status == 0
    assert same_files(tmp_path / "whole", out)


def test_shards_that_a_killed_run_with_other_options_has_removed_are_made_again(
    tmp_path, run_script, sample, run_and_kill
):
    run_and_kill(160, sample, tmp_path / "out")
    run_and_kill(10, sample, tmp_path / "out", "--short_side", 40)
    for out in ("out", "whole"):
        assert run_script("prepare_nus_wide", sample, tmp_path / out).status == 0
    assert same_files(tmp_path / "whole", tmp_path / "out")


def test_a_share_that_is_lost_ends_a_run_which_goes_on_later(
    tmp_path, run_script, sample, small_shards, count_photographs, monkeypatch
):
    import parquet_dataset

    assert run_script("prepare_nus_wide", sample, tmp_path / "whole").status == 0
    total = len(count_photographs.calls)
    count_photographs.calls.clear()

    def lost(*arguments):
        if len(count_photographs.calls) >= 100:
            raise OSError(errno.ESTALE, "Stale file handle")
        return count_photographs(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(parquet_dataset, "encode_photograph", lost)
        outcome = run_script("prepare_nus_wide", sample, tmp_path / "out")
    assert outcome.status == 1
    assert outcome.error == f"error: [Errno {errno.ESTALE}] Stale file handle"
    assert not (tmp_path / "out").exists()

    with monkeypatch.context() as patch:  # still lost, before the first photograph is read
        patch.setattr(parquet_dataset.DatasetWriter, "_state", failing_state(parquet_dataset.DatasetWriter._state))
        assert run_script("prepare_nus_wide", sample, tmp_path / "out").status == 1

    count_photographs.calls.clear()
    assert run_script("prepare_nus_wide", sample, tmp_path / "out").status == 0
    assert len(count_photographs.calls) < total - 50
    assert same_files(tmp_path / "whole", tmp_path / "out")


def failing_state(state):
    """`DatasetWriter._state` on a share that is lost."""

    def stat(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    def failing(self, photograph):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "stat", stat)
            return state(self, photograph)

    return failing


def test_progress_on_other_options_is_not_used(tmp_path, run_script, sample, small_shards, count_photographs):
    count_photographs.limit = 170
    assert run_script("prepare_nus_wide", sample, tmp_path / "out").status == 130
    count_photographs.limit = None
    for out in ("out", "whole"):
        arguments = (sample, tmp_path / out, "--short_side", 40)
        assert run_script("prepare_nus_wide", *arguments).status == 0
    assert same_files(tmp_path / "whole", tmp_path / "out")


def test_two_runs_do_not_write_the_same_dataset(tmp_path, run_script, small_nus_wide):
    from parquet_dataset import DatasetWriter

    with DatasetWriter(tmp_path / "out", None, 144):
        outcome = run_script("prepare_nus_wide", small_nus_wide, tmp_path / "out", "--no_images")
    assert outcome.status == 1
    assert outcome.error.endswith("out.partial: another run is writing this dataset")


def test_no_photograph_that_can_be_used_is_an_error(tmp_path, run_script, small_nus_wide):
    (small_nus_wide / "999.jpg").write_text("none of the list")
    outcome = run_script("prepare_nus_wide", small_nus_wide, tmp_path / "out")
    assert outcome.status == 1
    assert "no row is left for the train split: 18 photographs are unusable" in outcome.error
    assert not (tmp_path / "out").exists()


def test_shards_and_row_groups_are_small(tmp_path, run_script, sample, small_shards):
    assert run_script("prepare_nus_wide", sample, tmp_path / "out").status == 0
    shards = sorted((tmp_path / "out/data").glob("train-*.parquet"))
    assert len(shards) > 2
    for shard in shards:
        metadata = pq.read_metadata(shard)
        assert shard.stat().st_size < 300_000
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert max(groups) <= 20


def test_load_dataset_reads_and_streams_all_splits(tmp_path, run_script, sample, small_shards):
    assert run_script("prepare_nus_wide", sample, tmp_path / "out").status == 0
    counts = json.loads((tmp_path / "out/counts.json").read_text())["splits"]
    for config, splits in (("default", ("train", "validation", "test")), ("unlabeled", ("train",))):
        loaded = datasets.load_dataset(str(tmp_path / "out"), config, cache_dir=str(tmp_path / "c"))
        assert tuple(loaded) == splits
        for split in splits:
            expected = counts["unlabeled" if config == "unlabeled" else split]
            assert len(loaded[split]) == expected
            assert isinstance(loaded[split].features["image"], datasets.Image)
            streamed = datasets.load_dataset(str(tmp_path / "out"), config, split=split, streaming=True)
            rows = list(streamed)
            assert [row["item_id"] for row in rows] == loaded[split]["item_id"][:]
            assert rows[0]["image"].mode == "RGB"
            assert rows[0]["image"].size == (96, 96)


def test_the_card_tells_the_counts_and_shows_the_figures(tmp_path, run_script, sample):
    from huggingface_hub import DatasetCard

    assert run_script("prepare_nus_wide", sample, tmp_path / "out").status == 0
    counts = json.loads((tmp_path / "out/counts.json").read_text())
    card = DatasetCard.load(tmp_path / "out/README.md")
    assert card.data.task_categories == ["zero-shot-image-classification"]
    assert card.data.license == "apache-2.0"
    assert card.data.pretty_name.startswith("Drawn sample")
    assert card.data.size_categories == ["n<1K"]
    assert f"| {counts['kept']:,} |" in card.text
    for figure in ("tags_per_image.png", "class_balance.png"):
        assert f"figures/{figure}" in card.text
        assert (tmp_path / "out/figures" / figure).read_bytes().startswith(b"\x89PNG")
    assert {config["config_name"] for config in card.data.configs} == {"default", "unlabeled"}


@pytest.mark.parametrize(("num_rows", "category"), [(999, "n<1K"), (1_000, "1K<n<10K"), (10_001, "10K<n<100K")])
def test_the_card_tells_the_magnitude(tmp_path, run_script, num_rows, category):
    from huggingface_hub import DatasetCard

    (tmp_path / "rows.csv").write_text("item_id,tags\n" + "".join(f"{index},sky\n" for index in range(num_rows)))
    arguments = (tmp_path / "rows.csv", tmp_path, tmp_path / "out", "--no_images")
    assert run_script("prepare_table", *arguments).status == 0
    assert DatasetCard.load(tmp_path / "out/README.md").data.size_categories == [category]


def test_the_card_of_a_single_image_speaks_of_one(tmp_path, run_script):
    from huggingface_hub import DatasetCard

    (tmp_path / "rows.csv").write_text("item_id,tags,important_tags,part\n1,sky,sky,train\n")
    arguments = (tmp_path / "rows.csv", tmp_path, tmp_path / "out", "--no_images", "--split_column", "part")
    assert run_script("prepare_table", *arguments).status == 0
    text = DatasetCard.load(tmp_path / "out/README.md").text
    assert (
        "\n1 labelled image has 1 candidate tag, 1.00 each, out of a\nvocabulary of 1; 1 of them (100.0%) is" in text
    )
    assert "\nThe tags, by the number of images that they are a candidate for, and important in:" in text


@pytest.fixture
def draw(tmp_path, run_script, monkeypatch):
    """Prepares a table of one row for each of some tags; returns the figures by file name, and what was printed."""
    from matplotlib.figure import Figure

    figures, savefig = {}, Figure.savefig

    def keep(figure, path, **options):
        figures[Path(path).name] = figure
        savefig(figure, path, **options)

    def draw(tags: list[str]) -> tuple[dict[str, Figure], str]:
        rows = [{"item_id": str(i), "tags": [tag], "important_tags": [tag]} for i, tag in enumerate(tags)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr(Figure, "savefig", keep)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            outcome = run_script("prepare_table", tmp_path / "rows.jsonl", tmp_path, tmp_path / "out", "--no_images")
        assert outcome.status == 0, outcome.err
        assert "Warning" not in outcome.err
        return figures, outcome.out

    return draw


def test_long_tags_leave_room_for_the_bars(draw):
    long = ["a" * 30, "b" * 31, "c" * 100, "d" * 100 + "1", "d" * 100 + "2", "W" * 150]
    figures, printed = draw([*long, *(f"tag {i}" for i in range(6))])
    figure = figures["class_balance.png"]
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = axes.get_yticklabels()
    assert sorted(label.get_text() for label in labels)[:6] == [
        *("W" * 29 + "…", "a" * 30, "b" * 29 + "…", "c" * 29 + "…", "d" * 29 + "…", "d" * 29 + "…"),
    ]
    assert len(axes.patches) == 2 * 12  # tags that are shortened to the same have bars of their own
    assert all(label.get_window_extent().x0 >= 0 for label in labels)
    assert axes.get_window_extent().width > 0.5 * figure.bbox.width
    assert "its font lacks" not in printed


@pytest.mark.parametrize("tags", [["a", "b", "c"], [f"tag {i}" for i in range(50)]])
def test_the_legends_cover_no_bars(draw, tags):
    figures, _ = draw(tags)
    assert sorted(figures) == ["class_balance.png", "tags_per_image.png"]
    for figure in figures.values():
        figure.draw_without_rendering()
        (axes,), (legend,) = figure.axes, figure.legends
        assert [text.get_text().split()[0] for text in legend.get_texts()] == ["candidate", "important"]
        assert legend.get_window_extent().y0 >= axes.get_window_extent().y1
        assert axes.get_window_extent().height > 50


def test_characters_that_the_font_lacks_are_one_line(draw):
    _, printed = draw(["天空", "🐶 dog", "été", "sky"])
    assert printed.count("class_balance.png: its font lacks some characters of the tags, which are boxes there\n") == 1


def test_the_card_of_nus_wide_has_its_licence_source_and_citation(tmp_path, run_script, small_nus_wide):
    from huggingface_hub import DatasetCard

    arguments = (small_nus_wide, tmp_path / "out", "--no_images")
    assert run_script("prepare_nus_wide", *arguments).status == 0
    card = DatasetCard.load(tmp_path / "out/README.md")
    assert card.data.license == "other"
    assert "nuswide" in card.data.license_link
    assert "chua2009nuswide" in card.text
    assert "`image`" not in card.text


def test_nothing_here_imports_torch_or_the_model():
    code = (
        "import prepare_command, tag_table, nus_wide, drawn_scenes, sys;"
        "print([m for m in ('torch', 'transformers', 'modeling_magneto', 'magneto_training')"
        " if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
