import ast
import math

import numpy as np
import pytest
import torch
import yaml
from conftest import draw
from huggingface_hub import ModelCard

from magneto_training import model_card
from magneto_training.arguments import (
    DataArguments,
    MagnetoTrainingArguments,
    ModelArguments,
    PretrainingDataArguments,
)
from magneto_training.export import export_onnx
from magneto_training.model_card import name_model, write_model_card
from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization, MagnetoProcessor

FIGURES = {
    "num_images": 13,
    **{"precision": 81.111, "recall": 82.222, "f1": 83.333, "reducible_f1": 73.333},
    **{"tag_f1": 41.414, "image_f1": 42.424},
    **{"keep_all_precision": 61.111, "keep_all_recall": 100.0, "keep_all_f1": 63.333, "keep_all_reducible_f1": 53.333},
    **{"expected_calibration_error_before": 5.678, "expected_calibration_error_after": 1.234},
}


@pytest.fixture
def make_card(tmp_path):
    def make(
        metrics=None,
        config=None,
        data_args=None,
        dataset_name="someone/photos",
        use_images=True,
        selection=None,
        **training,
    ) -> ModelCard:
        folder = tmp_path / "my-model"
        processor = MagnetoProcessor.from_vocabulary(["sea", "it's", 'a "b"', "sun", "wood"], use_images=use_images)
        processor.selection = selection or processor.selection
        folder.mkdir(exist_ok=True)
        write_model_card(
            folder,
            training.get("hub_model_id") or folder.name,
            metrics or {"validation": FIGURES, "test": {**FIGURES, "f1": 84.444}},
            config or MagnetoConfig(),
            processor,
            ModelArguments(),
            data_args or DataArguments(dataset_name=str(dataset_name)),
            MagnetoTrainingArguments(output_dir=str(folder), **training),
        )
        return ModelCard.load(folder / "README.md")

    return make


def test_the_metadata_are_the_hubs(make_card):
    data = make_card().data.to_dict()

    assert data["library_name"] == "transformers" and data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "zero-shot-image-classification"
    assert "magneto" in data["tags"]
    assert data["model-index"][0]["name"] == "my-model"


def test_the_results_in_the_metadata_are_the_runs_own(make_card):
    card = make_card()

    found = {(result.dataset_split, result.metric_type): result.metric_value for result in card.data.eval_results}

    assert found == {
        ("validation", "f1"): 83.33,
        ("validation", "precision"): 81.11,
        ("validation", "recall"): 82.22,
        ("test", "f1"): 84.44,
        ("test", "precision"): 81.11,
        ("test", "recall"): 82.22,
    }
    assert all("63.3" in result.metric_name for result in card.data.eval_results)  # keep-all stands beside
    assert {result.dataset_name for result in card.data.eval_results} == {"someone/photos"}


def test_the_table_shows_the_runs_own_figures(make_card):
    results = make_card().text.split("## Results")[1].split("Scores are")[0]
    lines = [line for line in results.splitlines() if line.startswith("|")]

    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert all(len(row) == 7 for row in rows)
    for start, (split, f1) in zip((0, 4), (("validation", "83.3"), ("test", "84.4")), strict=True):
        assert rows[start] == [split, "13", "MAGNeto", "81.1", "82.2", f"**{f1}**", "73.3"]
        assert [row[5] for row in rows[start + 1 : start + 3]] == ["41.4", "42.4"]
        assert rows[start + 3] == ["", "", "keep all", "61.1", "100.0", "63.3", "53.3"]
    assert len(rows) == 8


def test_undefined_figures_are_left_out_of_the_metadata_and_a_dash_in_the_table(make_card):
    card = make_card({"test": {**FIGURES, "precision": math.nan}})

    assert {result.metric_type for result in card.data.eval_results} == {"f1", "recall"}
    assert "| test | 13 | MAGNeto | – | 82.2 |" in card.text and "nan" not in card.text


def test_splits_and_configuration_have_the_datasets_own_names(make_card):
    names = {"dataset_config_name": "small", "validation_split": "dev", "test_split": "holdout"}

    card = make_card(data_args=DataArguments(dataset_name="someone/photos", **names))

    assert {result.dataset_split for result in card.data.eval_results} == {"dev", "holdout"}
    assert {result.dataset_config for result in card.data.eval_results} == {"small"}
    assert "On `someone/photos`, configuration `small`, in percent" in card.text
    assert "| dev | 13 | MAGNeto |" in card.text and "| holdout | 13 | MAGNeto |" in card.text
    assert "`validation`" not in card.text


def test_the_card_of_pretraining_names_no_split(make_card):
    data_args = PretrainingDataArguments(dataset_name="someone/photos", dataset_config_name="unlabeled")
    figures = {"flag_all_f1": 66.6, "average_precision": 71.0, "tag_f1": 70.0, "tag_average_precision": 71.0}

    card = make_card({"validation": figures}, data_args=data_args)

    assert "validation images of `someone/photos`, configuration `unlabeled`, in percent" in card.text
    assert [result.dataset_split for result in card.data.eval_results] == [None]


def test_an_optimizer_that_reads_no_arguments_has_none_in_the_card(make_card):
    assert "- `optim_args`: momentum=0.9" in make_card().text
    assert "optim_args" not in make_card(optim="adamw_torch").text


def test_the_settings_are_the_runs_own(make_card):
    config = MagnetoConfig(hidden_size=32, dropout=0.25, backbone="mobilenetv2_100")

    text = make_card(config=config, learning_rate=0.125, num_train_epochs=7, seed=99).text

    for line in ("hidden_size`: 32", "dropout`: 0.25", "backbone`: mobilenetv2_100", "learning_rate`: 0.125"):
        assert f"- `{line}" in text
    assert "- `seed`: 99" in text and "- `num_train_epochs`: 7" in text
    assert "5 tags" in text


def test_the_settings_name_a_backbone_that_was_computed_in_another_way(make_card):
    assert not [name for name in ("bf16", "int8", "cached_views") if f"- `{name}`" in make_card().text]
    assert "- `int8`: True" in make_card(int8=True).text
    text = make_card(bf16=True, cached_views=8).text
    assert "- `bf16`: True" in text and "- `cached_views`: 8" in text and "int8" not in text


def test_a_local_folder_is_named_without_its_path(make_card, tmp_path):
    (tmp_path / "photos").mkdir()

    text = make_card(dataset_name=tmp_path / "photos").content

    assert "`photos`" in text and str(tmp_path) not in text


def python_blocks(card: ModelCard) -> list[str]:
    return [block.split("```")[0] for block in card.text.split("```python\n")[1:]]


@pytest.mark.parametrize("use_images", [True, False])
def test_the_code_in_the_card_is_python(make_card, use_images):
    blocks = python_blocks(make_card(use_images=use_images, hub_model_id="someone/my-model"))

    for code in blocks:
        compile(code, "README.md", "exec")
    assert len(blocks) == (4 if use_images else 3)
    assert 'pipeline("tag-summarization", model="someone/my-model"' in blocks[0]
    assert 'AutoModel.from_pretrained("someone/my-model"' in blocks[1]
    assert ("photo.jpg" in blocks[0] and "photo.jpg" in blocks[1]) == use_images


def test_the_code_in_the_card_runs(make_card, tiny_config, tmp_path, monkeypatch, capsys):
    card = make_card()
    model = MagnetoForTagSummarization(MagnetoConfig(**{**tiny_config.to_dict(), "vocab_size": 7})).eval()
    processor = MagnetoProcessor.from_vocabulary(["sea", "it's", 'a "b"', "sun", "wood"], image_size=32)
    model.save_pretrained(tmp_path / "my-model")
    processor.save_pretrained(tmp_path / "my-model")
    export_onnx(model, tmp_path / "model.onnx")
    draw([], ["red"]).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}

    for code in python_blocks(card)[:3]:  # the endpoint has its own tests
        exec(code, names)

    assert set(ast.literal_eval(capsys.readouterr().out.splitlines()[-1])) <= set(names["tags"])
    expected = torch.sigmoid(names["outputs"].logits)
    np.testing.assert_allclose(names["scores"], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["someone/photos", "photos: 2", "it's #1", '"quoted"', "*", "2024", "été"])
def test_any_name_of_a_dataset_makes_valid_metadata(make_card, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if "/" not in name:
        (tmp_path / name).mkdir()

    card = make_card(dataset_name=name)

    assert {result.dataset_name for result in card.data.eval_results} == {name}
    assert card.data.datasets == (["someone/photos"] if "/" in name else None)
    assert ModelCard(card.content).data.to_dict() == yaml.safe_load(card.content.split("---\n")[1])


def test_a_card_is_given_another_name(make_card):
    card = make_card(hub_model_id="someone/my-model")
    expected = make_card(hub_model_id="other-one/its-name").content

    name_model(card, "other-one/its-name")

    assert card.content == expected
    name_model(card, "other-one/its-name")
    assert card.content == expected


def test_other_models_of_a_card_keep_their_names(make_card):
    card = make_card(hub_model_id="someone/my-model")
    others = """
features = MyFeatures(base_model="my-model", model="resnet")
pipeline("image-classification", model="other/model")
AutoModel.from_pretrained("my-model-2"), AutoModel.from_pretrained("someone/my-model-2")
AutoModel.from_pretrained("other/my-model")
python train.py --init_from other/start
"""
    card.content += others

    name_model(card, "other-one/its-name")

    assert card.content == make_card(hub_model_id="other-one/its-name").content + others


def test_a_card_without_results_in_its_metadata_is_given_another_name(make_card):
    card = make_card()
    card.data.model_name = card.data.eval_results = None

    name_model(card, "other-one/its-name")

    assert card.text.lstrip().startswith("# its-name\n")
    assert "my-model" not in card.text and 'model="other-one/its-name"' in card.text


def test_the_limits_are_told(make_card):
    limits = " ".join(make_card().text.split("## Limits")[1].split("## Citation")[0].split())

    for words in ("The vocabulary is closed: 5 tags", "scored as `[UNK]`", "Flickr", "prejudices"):
        assert words in limits


AT_HALF = {"precision_at_half": 83.1, "recall_at_half": 84.1, "f1_at_half": 82.1}


def test_a_calibrated_model_says_how_it_chooses_and_how_far_to_trust_its_scores(make_card):
    config = MagnetoConfig(calibration={"logits": {"temperature": 2.0, "bias": 0.0}})

    text = make_card({"validation": {**FIGURES, **AT_HALF}}, config, selection={"rule": "expected_f1"}).text

    assert "\nScores are calibrated: about 70 %" in text and "Scores are raw" not in text
    assert "The tags with the highest expected F1 of an image are chosen." in text
    assert "| | | MAGNeto, raw scores at 0.5 | 83.1 | 84.1 | 82.1 | |" in text
    assert "| validation | 5.7 | 1.2 |" in text and "(calibration.png)" in text


def test_a_calibrated_model_says_what_was_fitted(make_card):
    fields = {"temperature": 2.0, "bias": 0.0}
    biased = {"logits": {**fields, "tag_biases": {"2": 0.5, "3": -0.5}}, "tag_logits": fields}

    for calibration, fitted in (
        ({"logits": fields}, "Temperature and bias of each output were fitted on `validation`."),
        (biased, "Temperature and bias of each output, and biases of 2 frequent tags, were fitted on `validation`."),
    ):
        text = make_card({"validation": {**FIGURES, **AT_HALF}}, MagnetoConfig(calibration=calibration)).text
        assert fitted in " ".join(text.split())


def test_an_uncalibrated_model_shows_the_papers_rule_alone_and_what_calibration_would_do(make_card):
    text = make_card({"validation": {**FIGURES, **AT_HALF}}).text

    assert "Tags with a score of at least 0.5 are chosen." in text
    assert "MAGNeto, raw scores at 0.5" not in text and "Scores are calibrated" not in text
    assert "\nScores are raw, as before calibration: " in text and "but not stored.\nThe expected calibration" in text
    assert "| validation | 5.7 | 1.2 |" in text and "(calibration.png)" in text


def test_the_card_has_no_gaps(make_card):
    text = make_card().content

    assert not [gap for gap in ("{{", "}}", "{%", "None`", "Undefined") if gap in text]
    assert model_card.TEMPLATE.is_file()


def test_the_card_shows_the_training_curves_where_there_are_any(make_card, tmp_path):
    assert "training_curves" not in make_card().text

    (tmp_path / "my-model" / "training_curves.png").touch()
    assert "![Curves of the training](training_curves.png)" in make_card().text
