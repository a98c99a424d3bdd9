"""The drawn sample: the official layout, and importance that only the picture tells."""

import filecmp
from collections import Counter
from random import Random

import pytest
from PIL import Image


def plans(count: int):
    from drawn_scenes import plan_scene

    return [plan_scene(Random(f"plan 0 {number}")) for number in range(count)]


def kept(scenes):
    """What the paper's filter keeps."""
    return [s for s in scenes if s.tags and s.ground_truth and set(s.ground_truth) <= set(s.tags)]


def test_the_same_seed_draws_the_same_files(tmp_path, run_script):
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        arguments = (tmp_path / out, "--num_images", 30, "--seed", seed)
        assert run_script("make_sample", *arguments).status == 0
    names = sorted(str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*.*"))
    assert sum(name.endswith(".jpg") for name in names) == 30
    match, mismatch, errors = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)
    assert (len(match), mismatch, errors) == (len(names), [], [])
    pictures = [sorted((tmp_path / out).rglob("*_7000003.jpg"))[0] for out in ("a", "c")]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


def test_the_layout_has_the_quirks_of_the_official_one(sample):
    listed = (sample / "ImageList/Imagelist.txt").read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b".jpg\r\n") and line.count(b"\\") == 1 for line in listed)
    tags = (sample / "NUS_WID_Tags/AllTags81.txt").read_text().splitlines()
    assert all(line.endswith(" ") and len(line.split()) == 81 for line in tags)
    assert len(list((sample / "Groundtruth/AllLabels").iterdir())) == 81
    for line in listed:
        path = sample / "Flickr" / line.decode().strip().replace("\\", "/")
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", (96, 96))


def test_keep_all_is_a_baseline_with_much_room_above():
    scenes = kept(plans(4000))
    assert 2_800 < len(scenes) < 3_300
    shares = [len(s.ground_truth) / len(s.tags) for s in scenes]
    assert 0.60 < sum(shares) / len(shares) < 0.66
    f1 = [2 * share / (1 + share) for share in shares]
    assert 0.72 < sum(f1) / len(f1) < 0.78
    assert 3.5 < sum(len(s.tags) for s in scenes) / len(scenes) < 4.5


def test_a_tag_alone_says_next_to_nothing_about_importance():
    tagged, important = Counter(), Counter()
    for scene in kept(plans(8000)):
        tagged.update(scene.tags)
        important.update(scene.ground_truth)
    for tag, count in tagged.items():
        assert 0.52 < important[tag] / count < 0.72, tag


def test_some_scenes_are_left_for_pretraining():
    scenes = plans(2000)
    left_out = [s for s in scenes if s.tags and s not in kept(scenes[:0])]
    assert any(not s.tags for s in scenes)
    assert any(not s.ground_truth for s in left_out)
    assert any(set(s.ground_truth) - set(s.tags) for s in left_out)


def test_a_main_subject_covers_more_of_the_picture_than_a_small_one():
    from drawn_scenes import DRAWN_CONCEPTS, LARGE, TINY, Scene, draw_scene

    def changed(concept, how):
        """Pixels that differ from the same scene without the concept."""
        empty = draw_scene(Scene({}, []), Random("scene"))
        scene = draw_scene(Scene({concept: how}, [concept]), Random("scene"))
        pairs = zip(empty.get_flattened_data(), scene.get_flattened_data(), strict=True)
        return sum(max(abs(x - y) for x, y in zip(a, b, strict=True)) > 16 for a, b in pairs)

    for concept in DRAWN_CONCEPTS:
        assert changed(concept, LARGE) > 3 * changed(concept, TINY) > 0, concept


def test_a_folder_that_is_no_sample_is_not_replaced(tmp_path, run_script):
    (tmp_path / "Flickr").mkdir()
    (tmp_path / "Flickr/photo.jpg").write_bytes(b"dear")
    outcome = run_script("make_sample", tmp_path, "--num_images", 1)
    assert outcome.status == 1
    assert "is not a drawn sample" in outcome.error
    assert (tmp_path / "Flickr/photo.jpg").read_bytes() == b"dear"


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("make_sample out --num_images 0", "--num_images is 0, expected at least 1"),
        ("make_sample out --num_images abc", "argument --num_images: invalid int value: 'abc'"),
        ("prepare_nus_wide downloads", "the following arguments are required: OUT"),
        ("prepare_table rows.csv images out --tag_seperator |", "unrecognized arguments: --tag_seperator |"),
    ],
)
def test_a_usage_error_is_one_line(tmp_path, run_script, monkeypatch, command, error):
    monkeypatch.chdir(tmp_path)
    name, *arguments = command.split()
    outcome = run_script(name, *arguments)
    assert (outcome.status, outcome.err) == (2, f"{name}.py: error: {error}\n")
