"""--push_to_hub, against a stand-in for the Hub at the level of its HTTP interface."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

SCRIPT = Path(__file__).parents[2] / "dataset_scripts/prepare_nus_wide.py"


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def prepare(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_data_and_card_are_published_and_load_by_their_id(tmp_path, hub, sample):
    environment = hub.environment(tmp_path / "home")
    out = tmp_path / "out"
    ran = prepare(environment, sample, out, "--push_to_hub", "user/nus-wide")
    assert ran.returncode == 0, ran.stderr
    assert f"published: {hub.endpoint}/datasets/user/nus-wide" in ran.stdout
    local = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert hub.files("user/nus-wide", "dataset") == local

    code = """
from datasets import load_dataset
rows = load_dataset("user/nus-wide")
unlabeled = load_dataset("user/nus-wide", "unlabeled", split="train")
stream = load_dataset("user/nus-wide", split="train", streaming=True)
first = next(iter(stream))
assert first["image"].size == (96, 96) and first["item_id"] == rows["train"][0]["item_id"]
print(*[len(rows[split]) for split in ("train", "validation", "test")], len(unlabeled))
"""
    loaded = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    counts = json.loads((out / "counts.json").read_text())["splits"]
    assert loaded.stdout.split() == [str(count) for count in counts.values()]


def test_shards_of_an_earlier_upload_do_not_stay(tmp_path, hub, small_nus_wide):
    environment = hub.environment(tmp_path / "home")
    arguments = (small_nus_wide, tmp_path / "out", "--no_images", "--push_to_hub", "user/x")
    assert prepare(environment, *arguments).returncode == 0
    files = hub.files("user/x", "dataset")
    old = {"key": "file", "value": {"path": "data/train-00001.parquet", "content": "UEFSMQ=="}}
    hub.commit("dataset", "user/x", [old])
    assert len(hub.files("user/x", "dataset")) == len(files) + 1
    assert prepare(environment, *arguments).returncode == 0
    assert hub.files("user/x", "dataset") == files


@pytest.mark.parametrize("change", [{"HF_TOKEN": "hf_wrong"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_without_a_login_nothing_is_begun(tmp_path, hub, small_nus_wide, change):
    environment = hub.environment(tmp_path / "home") | change
    arguments = (small_nus_wide, tmp_path / "out", "--no_images", "--push_to_hub", "user/x")
    ran = prepare(environment, *arguments)
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("error: --push_to_hub user/x: ")
    assert "hf auth login" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_a_malformed_id_is_an_error(tmp_path, hub, small_nus_wide):
    environment = hub.environment(tmp_path / "home")
    ran = prepare(environment, small_nus_wide, tmp_path / "out", "--push_to_hub", "a/b/c")
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert "a/b/c" in ran.stderr
