import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from magneto_training.augmentation import ImageAugmentation, TagAugmentation, example_seed

VOCABULARY = [f"tag {index}" for index in range(12)]
TAGS, IMPORTANT = VOCABULARY[:7], VOCABULARY[:2]  # five unimportant tags
NUM_SEEDS = 3000


def augment(augmentation: TagAugmentation, tags=TAGS, important=IMPORTANT, seeds: int = NUM_SEEDS) -> list[list[str]]:
    return [augmentation(list(tags), list(important), seed) for seed in range(seeds)]


def assert_uniform(counts: Counter, values) -> None:
    """Each value has its share, within five standard deviations."""
    assert set(counts) == set(values)
    total, share = sum(counts.values()), 1 / len(set(values))
    for value in values:
        assert abs(counts[value] - total * share) <= 5 * (total * share * (1 - share)) ** 0.5, (value, counts)


@pytest.mark.parametrize("ratio, most", [(0.0, 0), (0.19, 0), (0.5, 2), (0.6, 3), (1.0, 5)])
def test_the_number_of_dropped_tags_is_uniform_up_to_its_bound(ratio, most):
    results = augment(TagAugmentation(VOCABULARY, 0.0, ratio))

    assert_uniform(Counter(len(TAGS) - len(result) for result in results), range(most + 1))
    assert all(set(result) <= set(TAGS) for result in results)


@pytest.mark.parametrize("ratio, most", [(0.0, 0), (0.19, 0), (0.5, 2), (0.6, 3), (1.0, 5)])
def test_the_number_of_added_tags_is_uniform_up_to_its_bound(ratio, most):
    results = augment(TagAugmentation(VOCABULARY, ratio, 0.0))

    assert_uniform(Counter(len(result) - len(TAGS) for result in results), range(most + 1))
    assert all(result[: len(TAGS)] == TAGS for result in results)


def test_the_bounds_are_those_of_the_original_list_even_after_dropping():
    results = augment(TagAugmentation(VOCABULARY, 0.5, 0.5))

    dropped_and_added = Counter((len(set(TAGS) - set(result)), len(set(result) - set(TAGS))) for result in results)
    assert_uniform(dropped_and_added, [(dropped, added) for dropped in range(3) for added in range(3)])


def test_the_papers_example():
    vocabulary = [f"tag {index}" for index in range(200)]
    results = augment(TagAugmentation(vocabulary, 0.3, 0.0), vocabulary[:50], vocabulary[:5], seeds=500)

    assert max(map(len, results)) == 50 + 13  # floor(0.3 * 45), section 5.1


def test_important_tags_always_stay_and_no_tag_is_there_twice():
    for result in augment(TagAugmentation(VOCABULARY, 1.0, 1.0)):
        assert set(IMPORTANT) <= set(result)
        assert len(set(result)) == len(result)


def test_dropped_tags_do_not_come_back_as_added_ones():
    for result in augment(TagAugmentation(VOCABULARY, 1.0, 1.0)):
        assert result == [tag for tag in TAGS if tag in result] + [tag for tag in result if tag not in TAGS]
    dropped_all = [result for result in augment(TagAugmentation(TAGS, 1.0, 1.0)) if len(result) == 2]
    assert dropped_all  # with the vocabulary exhausted, all five can be gone and none returns


def test_dropped_tags_are_uniform_over_the_unimportant_ones():
    results = augment(TagAugmentation(VOCABULARY, 0.0, 0.5))

    dropped = [next(iter(set(TAGS) - set(result))) for result in results if len(result) == len(TAGS) - 1]
    assert_uniform(Counter(dropped), TAGS[2:])


def test_added_tags_are_uniform_over_the_rest_of_the_vocabulary():
    results = augment(TagAugmentation(VOCABULARY, 0.5, 0.0))

    assert_uniform(Counter(tag for result in results for tag in result[len(TAGS) :]), VOCABULARY[7:])


def test_an_exhausted_vocabulary_adds_what_is_left():
    results = augment(TagAugmentation(VOCABULARY[:8], 1.0, 0.0), seeds=200)

    assert {tuple(result[7:]) for result in results} == {(), (VOCABULARY[7],)}


@pytest.mark.parametrize("tags", [IMPORTANT, IMPORTANT[:1]])
def test_without_unimportant_tags_nothing_changes(tags):
    assert all(result == tags for result in augment(TagAugmentation(VOCABULARY, 5.0, 1.0), tags, tags, seeds=50))


def test_tags_outside_the_vocabulary_are_no_trouble():
    results = augment(TagAugmentation(VOCABULARY, 1.0, 0.0), ["other", "strange"], ["other"], seeds=50)

    assert all(result[:2] == ["other", "strange"] and set(result[2:]) <= set(VOCABULARY) for result in results)


@pytest.mark.parametrize("ratios, name", [((-0.1, 0.5), "tag_add_ratio"), ((0.5, 1.1), "tag_drop_ratio")])
def test_a_wrong_ratio_is_an_error_that_names_the_field(ratios, name):
    with pytest.raises(ValueError, match=name):
        TagAugmentation(VOCABULARY, *ratios)


# -------------------------------------------------------------------------------------------------------------- images


def photograph() -> Image.Image:
    y, x = np.mgrid[:48, :64]
    return Image.fromarray(np.stack([x * 4, y * 5, x + y], -1).astype(np.uint8))


def pixels(image: Image.Image) -> bytes:
    return np.asarray(image).tobytes()


def test_the_same_seed_gives_the_same_photograph_and_others_differ():
    augmentation = ImageAugmentation(32)

    results = [pixels(augmentation(photograph(), seed)) for seed in range(20)]

    assert results == [pixels(ImageAugmentation(32)(photograph(), seed)) for seed in range(20)]
    assert len(set(results)) == 20


def test_the_result_is_an_rgb_photograph_of_the_models_size():
    result = ImageAugmentation(32)(photograph(), seed=1)

    assert (result.mode, result.size) == ("RGB", (32, 32))


def test_the_callers_random_state_is_left_alone():
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)

    ImageAugmentation(32)(photograph(), seed=99)

    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_the_callers_random_state_does_not_matter():
    augmentation, results = ImageAugmentation(32), set()
    for state in range(5):
        torch.manual_seed(state), random.seed(state), np.random.seed(state)
        results.add(pixels(augmentation(photograph(), seed=7)))

    assert len(results) == 1


def test_without_cropping_and_policy_only_the_flip_is_left():
    square = photograph().crop((0, 0, 40, 40))
    results = {pixels(ImageAugmentation(40, 1.0, auto_augment=False)(square, seed)) for seed in range(40)}

    flipped = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert {pixels(square), pixels(flipped)} <= results  # the rest are crops of another aspect ratio


def test_the_policy_can_be_left_out():
    with_policy, without = ImageAugmentation(32), ImageAugmentation(32, auto_augment=False)

    assert [type(step).__name__ for step in with_policy.transform.transforms][-1] == "AutoAugment"
    changed = [pixels(with_policy(photograph(), seed)) != pixels(without(photograph(), seed)) for seed in range(20)]
    assert sum(changed) > 10


@pytest.mark.parametrize("scale", [0.0, 1.1, -1])
def test_a_wrong_crop_scale_is_an_error_that_names_the_field(scale):
    with pytest.raises(ValueError, match="min_crop_scale"):
        ImageAugmentation(32, scale)


def test_every_example_of_every_epoch_of_every_run_has_its_own_seed():
    seeds = {example_seed(run, epoch, index) for run in range(5) for epoch in range(10) for index in range(100)}

    assert len(seeds) == 5 * 10 * 100
    assert example_seed(1, 2, 3) == example_seed(1, 2, 3)
    assert all(0 <= seed < 2**64 for seed in seeds)
    torch.manual_seed(max(seeds)), np.random.default_rng(max(seeds))  # both take all 64 bits


@pytest.mark.parametrize("size", [(100, 100), (160, 90), (90, 160)])
def test_no_crop_of_a_photograph_with_the_shortest_side_is_enlarged(size):
    augmentation = ImageAugmentation(32, 0.3, auto_augment=False)
    scale = augmentation.shortest_side / min(size)
    photograph = Image.new("RGB", (math.ceil(size[0] * scale), math.ceil(size[1] * scale)))
    crop = augmentation.transform.transforms[0]

    for seed in range(300):
        torch.manual_seed(seed)
        sides = crop.make_params([v2.functional.to_image(photograph)])
        assert min(sides["height"], sides["width"]) >= 32 - 1  # sides are rounded
