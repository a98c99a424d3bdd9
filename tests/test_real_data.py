"""Real photographs and real ImageNet weights, where the environment says where they are."""

import os

import numpy as np
import pytest
import timm
import torch

from magneto_training.backbone import prepare_backbone
from magneto_training.collation import TagCollator
from magneto_training.evaluation import evaluate_selection
from magneto_training.photographs import undecoded
from magneto_training.tag_data import build_vocabulary, check_rows, load_tag_dataset
from modeling_magneto import MagnetoConfig, MagnetoModel, MagnetoProcessor


def from_environment(variable: str) -> str:
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set")
    return os.environ[variable]


@pytest.fixture(scope="module")
def mirflickr():
    return load_tag_dataset(from_environment("MIRFLICKR_ETS_DIR"))


def test_mirflickr_has_no_bad_row_and_14_tags(mirflickr):
    for split, count in (("train", 5165), ("validation", 787)):
        report = check_rows(mirflickr[split], split, use_images=True, use_labels=True)
        assert not report.problems and len(report.good_rows) == count
    assert len(build_vocabulary(mirflickr["train"])) == 14


def test_keep_all_on_mirflickr_is_as_published(mirflickr):
    rows = mirflickr["validation"].select_columns(["tags", "important_tags"])
    labels = [np.isin(row["tags"], row["important_tags"]).astype(np.int8) for row in rows]
    figures = evaluate_selection({"logits": [np.ones_like(row) for row in labels]}, labels)
    found = {name: round(figures[name], 1) for name in ("precision", "recall", "f1", "keep_all_f1")}
    assert found == {"precision": 79.0, "recall": 100.0, "f1": 85.6, "keep_all_f1": 85.6}


def test_real_photographs_have_the_features_that_timm_gives_them(mirflickr):
    file, kwargs = from_environment("BACKBONE_WEIGHTS_FILE"), {"pad_type": "same"}
    vocabulary = build_vocabulary(mirflickr["train"])
    processor = MagnetoProcessor.from_vocabulary(vocabulary, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model = MagnetoModel(MagnetoConfig(backbone="mobilenetv2_100", backbone_kwargs=kwargs)).eval()
    prepare_backbone(model, file)
    reference = timm.create_model(
        "mobilenetv2_100", pretrained=True, pretrained_cfg_overlay={"file": file}, **kwargs
    ).eval()

    batch = TagCollator(processor)(undecoded(mirflickr["validation"].select(range(8))).to_list())
    with torch.no_grad():
        expected = reference.forward_features(batch["pixel_values"])
        found = model.image_feature_extractor.backbone.forward_features(batch["pixel_values"])

    assert found.shape == (8, 1280, 4, 4) and torch.equal(found, expected) and found.std() > 0.1
