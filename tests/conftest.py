"""What the tests share: one thread for each test process, no network, small models and drawn photographs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Before torch is imported: two test processes on two cores must not fight over threads.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from playwright.sync_api import sync_playwright

from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization, MagnetoProcessor

COLORS = {"blue": (40, 80, 220), "green": (40, 170, 60), "red": (210, 40, 40), "yellow": (240, 210, 40)}
TINY_BACKBONE = "test_resnet.r160_in1k"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny_config() -> MagnetoConfig:
    """A model of both streams that runs in milliseconds."""
    return MagnetoConfig(
        vocab_size=2 + len(COLORS),
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        backbone=TINY_BACKBONE,
        image_size=32,
    )


@pytest.fixture
def tiny_model(tiny_config) -> MagnetoForTagSummarization:
    return MagnetoForTagSummarization(tiny_config).eval()


@pytest.fixture
def processor() -> MagnetoProcessor:
    """Knows the four colours; photographs of 32 px."""
    return MagnetoProcessor.from_vocabulary(sorted(COLORS), image_size=32)


def draw(tags: list[str], important: list[str], size: int = 40) -> Image.Image:
    """A photograph in which important colours are large stripes and the other tags are missing."""
    image = Image.new("RGB", (size, size), (128, 128, 128))
    canvas = ImageDraw.Draw(image)
    for index, color in enumerate(important):
        canvas.rectangle((0, index * size // 4, size, (index + 1) * size // 4 - 2), fill=COLORS[color])
    return image


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows as the datasets hold them, photographs included."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        tags = [str(tag) for tag in rng.permutation(sorted(COLORS))[: rng.integers(2, 5)]]
        important = tags[: rng.integers(1, len(tags))]
        rows.append(
            {
                "item_id": f"im{index}",
                "image": draw(tags, important),
                "tags": sorted(tags),
                "important_tags": important,
            }
        )
    return rows


def damage(file: Path) -> None:
    """Overwrite the rows of a Parquet file; which columns it has can still be read."""
    content = file.read_bytes()
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # where what it says of itself begins
    file.write_bytes(content[:4] + b"\xff" * (end - 4) + content[end:])


def run_alone(script: str, folder: Path) -> str:
    """What a script prints in a new process that runs in `folder` and knows neither this checkout nor the network."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    finished = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def browser():
    """Chromium; where there is none, the tests that want it are skipped."""
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory):
    """A folder that `load_dataset` takes: 48 training, 16 validation and 13 test rows with photographs."""
    folder = tmp_path_factory.mktemp("dataset")
    for split, count in (("train", 48), ("validation", 16), ("test", 13)):
        rows = datasets.Dataset.from_list(make_rows(count, seed=count))
        rows.cast_column("image", datasets.Image()).to_parquet(folder / f"{split}.parquet")
    return folder
