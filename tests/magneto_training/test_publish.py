"""Publishing, against a stand-in for the Hub at the level of its HTTP interface."""

import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from conftest import make_rows
from datasets import Dataset
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file, save_file

from magneto_training import publish
from magneto_training.arguments import DataArguments, MagnetoTrainingArguments, ModelArguments, UserError
from magneto_training.model_card import write_model_card
from magneto_training.publish import choose_widget_rows, files_to_publish

ROOT = Path(__file__).parents[2]
FIGURES = dict.fromkeys(
    [
        *("num_images", "precision", "recall", "f1", "reducible_f1", "tag_f1", "image_f1"),
        *("keep_all_precision", "keep_all_recall", "keep_all_f1", "keep_all_reducible_f1"),
        *("expected_calibration_error_before", "expected_calibration_error_after"),
    ],
    50.0,
)
SECRETS = ("model.bin", "optimizer.pt", "training_args.bin", "trainer_state.json", "my_script.py", "notes.txt")


@pytest.fixture
def folder(tmp_path, tiny_model, processor) -> Path:
    """A trained folder, and much in it that is nobody else's business."""
    folder = tmp_path / "my_model"
    tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in (*SECRETS, "runs/events.1", "checkpoint-3/model.safetensors", "checkpoint-3/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    for name in ("training_curves.png", "handler.py", "requirements.txt", "metrics.json"):
        (folder / name).write_text("published")
    training_args = MagnetoTrainingArguments(output_dir=str(folder), report_to="none")
    arguments = (tiny_model.config, processor, ModelArguments(), DataArguments("user/photos"), training_args)
    write_model_card(folder, folder.name, {"validation": FIGURES}, *arguments)
    return folder


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def logged_in(hub, monkeypatch):
    """This process takes the stand-in for the Hub; what its environment says, it has read already."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def run(monkeypatch, logged_in):
    """Runs the command in this process; returns its exit status."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["publish.py", *map(str, arguments)])
        try:
            publish.main()
        except SystemExit as ended:
            return ended.code
        return 0

    return run


def test_a_published_model_is_loaded_by_its_id_from_an_empty_cache(folder, hub, dataset_dir, tmp_path):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    environment = hub.environment(tmp_path / "home")

    arguments = [folder, "user/tiny", "--private", "--widget_dataset", dataset_dir]
    command = [sys.executable, "-m", "magneto_training.publish", *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"published: {hub.endpoint}/user/tiny"
    assert hub.commits("user/tiny") == 1 and hub.is_private("user/tiny")
    assert ("POST", "/api/validate-yaml") in hub.requests
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    files = hub.files("user/tiny")
    assert {"handler.py", "requirements.txt", "metrics.json", "training_curves.png"} < files.keys()
    assert [path for path in files if "/" in path] == [f"widget/example_{number}.jpg" for number in (1, 2, 3)]
    assert not files.keys() & set(SECRETS) and not any(b"secret" in content for content in files.values())

    script = """
from transformers import AutoModel, AutoProcessor, pipeline
model = AutoModel.from_pretrained("user/tiny", trust_remote_code=True)
model.save_pretrained("loaded")
summarizer = pipeline("tag-summarization", model="user/tiny", trust_remote_code=True)
from PIL import Image
print([item["label"] for item in summarizer(Image.new("RGB", (40, 40)), candidate_labels=["red"])])
"""
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", script],
        env=os.environ | hub.environment(tmp_path / "other_home"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert loaded.stdout.splitlines() == ["['red']"]
    weights, same = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "loaded"))
    assert weights.keys() == same.keys() and all(weights[name].equal(same[name]) for name in weights)


def test_the_published_card_names_the_model_and_its_examples(folder, dataset_dir):
    rows = choose_widget_rows(Dataset.from_parquet(str(dataset_dir / "validation.parquet")), 2)

    files = files_to_publish(folder, "someone/other-name", rows)

    card = ModelCard(files["README.md"].decode())
    assert card.data.model_name == "other-name" and card.text.lstrip().startswith("# other-name\n")
    assert "my_model" not in card.content and 'from_pretrained("someone/other-name"' in card.text
    assert 'pipeline("tag-summarization", model="someone/other-name"' in card.text
    assert {result.metric_value for result in card.data.eval_results} == {50.0}
    assert len(card.data.widget) == 2
    for example, row in zip(card.data.widget, rows, strict=True):
        assert example["candidate_labels"].split(", ") == row["tags"]
        assert Image.open(BytesIO(files[example["src"]])).size == row["image"].size


def test_a_card_that_names_the_model_already_is_published_as_it_is(folder):
    renamed = files_to_publish(folder, "someone/other-name")["README.md"]
    (folder / "README.md").write_bytes(renamed)

    assert files_to_publish(folder, "someone/other-name")["README.md"] == renamed


def test_photographs_are_published_small_and_without_the_cameras_notes(folder):
    exif, file = Image.Exif(), BytesIO()
    exif[0x010F] = "camera"
    notes = {"exif": exif, "comment": b"a secret place", "xmp": b"<x>a secret place</x>"}
    Image.new("RGB", (1200, 800), "red").save(file, "JPEG", **notes)
    photograph = Image.open(file)

    files = files_to_publish(folder, "a/b", [{"image": photograph, "tags": ["red"]}])

    published = Image.open(BytesIO(files["widget/example_1.jpg"]))
    assert published.size == (768, 512) and not published.getexif()
    assert "secret" in str(photograph.info) and b"secret" not in files["widget/example_1.jpg"]


def test_examples_are_rows_whose_tags_the_widget_can_say():
    rows = make_rows(6)
    rows[2]["tags"] = ["paris, texas"]
    dataset = Dataset.from_list(rows)

    chosen = choose_widget_rows(dataset, 10)["item_id"][:]

    assert sorted(chosen) == ["im0", "im1", "im3", "im4", "im5"]
    assert choose_widget_rows(dataset, 3)["item_id"][:] == chosen[:3]


def test_files_of_an_earlier_upload_do_not_stay_and_strangers_do(folder, hub, run, capsys):
    assert run(folder, "user/tiny") == 0
    first = hub.files("user/tiny")
    added = ("model.onnx", "widget/example_1.jpg", "LICENSE", "docs/extra_magneto.py")
    hub.commit("model", "user/tiny", [{"key": "file", "value": {"path": path, "content": ""}} for path in added])
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, folder / "model.safetensors")

    assert run(folder, "user/tiny") == 0

    files = hub.files("user/tiny")
    assert files.keys() == first.keys() | {"LICENSE", "docs/extra_magneto.py"}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert run(folder, "user/tiny", "--private") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "publish: error: user/tiny is there already, and public"


@pytest.mark.parametrize("branch", ["v1", "feature/new"])
def test_a_branch_is_made_where_there_is_none(folder, hub, logged_in, branch):
    files = files_to_publish(folder, "user/tiny")

    for number in (1, 2):
        publish.publish({**files, "metrics.json": b"%d" % number}, "user/tiny", revision=branch)

        assert hub.files("user/tiny", branch=branch).keys() == files.keys()
        assert hub.files("user/tiny", branch=branch)["metrics.json"] == b"%d" % number
    assert hub.files("user/tiny") == {}
    publish.publish(files, "user/tiny", revision="main")
    assert hub.files("user/tiny").keys() == files.keys()


def test_a_dry_run_lists_the_files_and_sends_nothing(folder, hub, run, capsys):
    assert run(folder, "user/tiny", "--dry_run") == 0

    assert hub.requests == []
    *lines, total, last = capsys.readouterr().out.splitlines()
    sizes = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in lines}
    assert last == "nothing was uploaded" and f"in {len(sizes)} files" in total
    assert sizes["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert {"README.md", "handler.py", "pipeline_magneto.py"} < sizes.keys() and not sizes.keys() & set(SECRETS)


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["missing", "user/tiny"], 1, "'missing' is no folder"),
        ([".", "user/tiny"], 1, "cannot be loaded"),
        (["FOLDER", "tiny"], 2, "expected user/name"),
        (["FOLDER", "user/a--b"], 2, "user/a--b"),
        (["FOLDER"], 2, "USER/NAME"),
        (["FOLDER", "user/tiny", "--widget_dataset", "missing"], 1, "missing"),
        (["FOLDER", "user/tiny", "--widget_dataset", "no_tags"], 1, "no_tags, validation: column 'tags' is missing"),
    ],
)
def test_bad_input_ends_with_one_line(folder, hub, run, tmp_path, monkeypatch, capsys, arguments, status, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_tags").mkdir()
    Dataset.from_list(make_rows(3)).remove_columns("tags").to_parquet(tmp_path / "no_tags" / "validation.parquet")

    assert run(*(folder if argument == "FOLDER" else argument for argument in arguments)) == status

    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("publish: error:") and expected in message
    assert hub.requests == []


@pytest.mark.parametrize("trouble", ["wrong login", "no login", "no network", "offline"])
def test_a_hub_that_refuses_or_is_not_there_is_told_in_one_line(folder, hub, run, monkeypatch, capsys, trouble):
    if trouble == "wrong login":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif trouble == "no login":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no_token"))
    elif trouble == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert run(folder, "user/tiny") == 1

    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("publish: error: user/tiny: ")
    assert message.endswith("(to log in: hf auth login)") == (trouble in ("wrong login", "no login"))


def test_a_folder_without_a_card_is_not_published(folder):
    (folder / "README.md").unlink()

    with pytest.raises(UserError, match="has no README.md"):
        files_to_publish(folder, "user/tiny")


@pytest.mark.parametrize("name", ["modeling_magneto.py", "pipeline_magneto.py", "handler.py"])
def test_a_folder_without_its_code_is_not_published(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"lacks {name}, expected the code that training writes"):
        files_to_publish(folder, "user/my_model")
