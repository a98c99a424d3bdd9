"""Times prepare_nus_wide.py on tags and ground truth of the size of the complete NUS-WIDE.

python benchmarks/nus_wide_filter.py
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[1]
ROWS, CONCEPTS = 269_648, 81
MAX_SECONDS, MAX_GIGABYTES = 10, 1.5


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "nus_wide"), Path(folder, "out")
        generate(source)
        if hasattr(os, "sched_setaffinity"):  # one core, inherited by the command
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        script = REPOSITORY / "dataset_scripts/prepare_nus_wide.py"
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, script, source, out, "--no_images"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - start
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print("| prepare_nus_wide.py --no_images, 1 core | measured | at most |")
    print("|---|---|---|")
    print(f"| seconds for {ROWS:,} rows x {CONCEPTS} | {seconds:.1f} | {MAX_SECONDS} |")
    print(f"| peak memory in GB | {gigabytes:.2f} | {MAX_GIGABYTES} |")


def generate(folder: Path) -> None:
    """Writes random official files: about half of the rows have tags, a fifth of these is kept."""
    random = np.random.default_rng(0)
    sys.path.insert(0, str(REPOSITORY / "dataset_scripts"))
    from nus_wide import CONCEPTS as names

    for part in ("ConceptsList", "ImageList", "NUS_WID_Tags", "Groundtruth/AllLabels"):
        (folder / part).mkdir(parents=True)
    (folder / "ConceptsList/Concepts81.txt").write_text("\n".join(names) + "\n")
    lines = [f"folder\\{row:06d}_{10_000_000 + row}.jpg\r\n" for row in range(ROWS)]
    in_test = random.random(ROWS) < 0.4
    for name, chosen in {
        "Imagelist": lines,
        "TrainImagelist": [line for line, test in zip(lines, in_test, strict=True) if not test],
        "TestImagelist": [line for line, test in zip(lines, in_test, strict=True) if test],
    }.items():
        (folder / f"ImageList/{name}.txt").write_text("".join(chosen), newline="")

    tags = (random.random((ROWS, CONCEPTS)) < 0.03) & (random.random((ROWS, 1)) < 0.55)
    truth = tags & (random.random(tags.shape) < 0.85) | (random.random(tags.shape) < 0.018)
    table = np.full((ROWS, 2 * CONCEPTS + 1), ord(" "), np.uint8)
    table[:, 0:-1:2] = tags + ord("0")
    table[:, -1] = ord("\n")
    (folder / "NUS_WID_Tags/AllTags81.txt").write_bytes(table.tobytes())
    for column, name in enumerate(names):
        labels = np.full((ROWS, 2), ord("\n"), np.uint8)
        labels[:, 0] = truth[:, column] + ord("0")
        path = folder / f"Groundtruth/AllLabels/Labels_{name}.txt"
        path.write_bytes(labels.tobytes())


if __name__ == "__main__":
    main()
