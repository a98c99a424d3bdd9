"""Times a new process from its start to the first scored photograph, against the imports that it cannot do without.

python -m benchmarks.cold_start [MODEL_DIR]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from .endpoint import make_model

MAX_RATIO = 1.3
REPEATS = 9
IMPORTS = "import torch, transformers, timm"
AUTO_CLASSES = f"{IMPORTS}\nfrom transformers import AutoModel, AutoProcessor"  # nothing of ours yet
FIRST_PHOTOGRAPH = """
import sys, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
tags = processor.vocabulary[:12]
with torch.inference_mode():
    outputs = model(**processor(Image.open(sys.argv[2]), tags))
assert len(processor.post_process(outputs, tags)[0]["tags"]) == len(tags)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir", nargs="?", help="A trained folder; by default a new ResNet-18 at 112 px.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model_dir = args.model_dir or make_model(Path(folder) / "model")
        photograph = Path(folder) / "photo.jpg"
        Image.effect_noise((500, 375), 80).convert("RGB").save(photograph, quality=90)
        arguments = [str(Path(model_dir).resolve()), str(photograph)]
        seconds = {IMPORTS: [], AUTO_CLASSES: [], FIRST_PHOTOGRAPH: []}
        for _ in range(REPEATS + 1):  # in turn, so that whatever else the machine does meets all
            for script, times in seconds.items():
                times.append(run(script, arguments, folder))
    medians = [statistics.median(times[1:]) for times in seconds.values()]  # the first round fills caches
    print("| new process | seconds | of the imports |")
    print("|---|---|---|")
    names = (
        "torch, transformers, timm imported",
        "AutoModel, AutoProcessor imported too",
        "first photograph scored",
    )
    for name, median in zip(names, medians, strict=True):
        print(f"| {name} | {median:.2f} | {median / medians[0]:.2f} |")
    ratio = medians[-1] / medians[0]
    print(f"\nratio {ratio:.2f}, expected at most {MAX_RATIO}")
    sys.exit(ratio > MAX_RATIO)


def run(script: str, arguments: list[str], folder: str) -> float:
    """Seconds that a new process needs, in a folder where it finds nothing of ours but the model."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-I", "-c", script, *arguments],
        check=True,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
