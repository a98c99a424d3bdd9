"""Draws a small dataset in the official layout of NUS-WIDE, photographs included.

python dataset_scripts/make_sample.py OUT [--num_images N] [--seed S]
"""

import io
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from random import Random

from drawn_scenes import SAMPLE_MARKER, Scene, draw_scene, plan_scene
from nus_wide import CONCEPTS
from prepare_command import ArgumentParser
from tqdm import tqdm

TEST_SHARE = 0.25


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument("--num_images", type=int, default=4000, help="pictures; the filter keeps about 3 of 4")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures")
    args = parser.parse_args()
    if args.num_images < 1:
        parser.error(f"--num_images is {args.num_images}, expected at least 1")
    # Only a sample is ever replaced, never somebody's download of the real NUS-WIDE.
    try:
        if args.out.exists() and any(args.out.iterdir()):
            if not (args.out / SAMPLE_MARKER).exists():
                raise FileExistsError(f"{args.out} is not a drawn sample, expected a new folder")
        make_sample(args.out.absolute(), args.num_images, args.seed)
    except OSError as error:  # a full disk, a folder without permission
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"{args.num_images} drawn photographs in {args.out}")
    return 0


def make_sample(out: Path, num_images: int, seed: int) -> None:
    """Draws a sample beside OUT and gives it its name when it is complete."""
    partial_out = out.with_name(out.name + ".partial")
    shutil.rmtree(partial_out, ignore_errors=True)
    scenes = plan_scenes(num_images, seed)
    write_lists(partial_out, scenes, Random(f"split {seed}"))
    draw_photographs(partial_out, scenes, seed)
    settings = f"--num_images {num_images} --seed {seed}"
    (partial_out / SAMPLE_MARKER).write_text(f"Drawn by make_sample.py {settings}\n")
    shutil.rmtree(out, ignore_errors=True)
    partial_out.rename(out)


def plan_scenes(num_images: int, seed: int) -> dict[str, tuple[int, Scene]]:
    """Plans all scenes, sorted by path as in the official list: path -> (number, scene)."""
    scenes = {}
    for number in range(num_images):
        scene = plan_scene(Random(f"plan {seed} {number}"))
        folder = (scene.ground_truth or list(scene.appearance))[0]
        scenes[f"{folder}/{number:04d}_{7_000_000 + number}.jpg"] = number, scene
    return dict(sorted(scenes.items()))


def write_lists(out: Path, scenes: dict[str, tuple[int, Scene]], random: Random) -> None:
    """Writes image lists, tags and ground truth, with the quirks of the official files."""
    for folder in ("ConceptsList", "ImageList", "NUS_WID_Tags", "Groundtruth/AllLabels"):
        (out / folder).mkdir(parents=True)
    (out / "ConceptsList/Concepts81.txt").write_text("".join(f"{name}\n" for name in CONCEPTS))

    lines = [path.replace("/", "\\") + "\r\n" for path in scenes]
    test = [random.random() < TEST_SHARE for _ in lines]
    for name, chosen in {
        "Imagelist": lines,
        "TrainImagelist": [line for line, in_test in zip(lines, test, strict=True) if not in_test],
        "TestImagelist": [line for line, in_test in zip(lines, test, strict=True) if in_test],
    }.items():
        (out / f"ImageList/{name}.txt").write_text("".join(chosen), newline="")

    rows = [
        " ".join("1" if concept in scene.tags else "0" for concept in CONCEPTS) + " \n" for _, scene in scenes.values()
    ]
    (out / "NUS_WID_Tags/AllTags81.txt").write_text("".join(rows))
    for concept in CONCEPTS:
        (out / f"Groundtruth/AllLabels/Labels_{concept}.txt").write_text(
            "".join(f"{int(concept in scene.ground_truth)}\n" for _, scene in scenes.values())
        )


def draw_photographs(out: Path, scenes: dict[str, tuple[int, Scene]], seed: int) -> None:
    """Draws every scene into Flickr/, in parallel."""
    for folder in {path.split("/")[0] for path in scenes}:
        (out / "Flickr" / folder).mkdir(parents=True)
    numbers, planned = zip(*scenes.values(), strict=True)
    with ProcessPoolExecutor() as pool:
        photographs = pool.map(partial(draw_jpeg, seed), numbers, planned, chunksize=16)
        for path, jpeg in zip(scenes, tqdm(photographs, "drawing", len(scenes), unit="image"), strict=True):
            (out / "Flickr" / path).write_bytes(jpeg)


def draw_jpeg(seed: int, number: int, scene: Scene) -> bytes:
    """Draws one scene and encodes it."""
    file = io.BytesIO()
    draw_scene(scene, Random(f"draw {seed} {number}")).save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
