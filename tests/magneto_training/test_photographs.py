import errno
import io
import struct
import weakref
import zipfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from magneto_training import photographs
from magneto_training.augmentation import ImageAugmentation
from magneto_training.collation import TagCollator
from magneto_training.photographs import PhotographReader, find_photograph_problem, read_photograph, undecoded
from modeling_magneto import MagnetoProcessor


@pytest.fixture(scope="module")
def processor():
    return MagnetoProcessor.from_vocabulary(["x"], image_size=32)


def as_file(photograph: Image.Image, image_format: str, **options) -> dict:
    buffer = io.BytesIO()
    photograph.save(buffer, image_format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("shortest_side", "expected"),
    [(None, (320, 240)), (241, (320, 240)), (121, (320, 240)), (120, (160, 120)), (60, (80, 60)), (1, (40, 30))],
)
def test_a_jpeg_is_decoded_no_smaller_than_needed(shortest_side, expected):
    image = as_file(Image.effect_noise((320, 240), 50).convert("RGB"), "JPEG")

    assert read_photograph(image, shortest_side).size == expected


def test_other_formats_are_decoded_whole():
    image = as_file(Image.new("RGB", (320, 240)), "PNG")

    assert read_photograph(image, 60).size == (320, 240)


def test_a_photograph_decoded_at_a_scale_is_upright_and_looks_the_same(tmp_path):
    gradient = Image.linear_gradient("L").resize((320, 240)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image = as_file(gradient, "JPEG", exif=exif)
    (tmp_path / "photograph.jpg").write_bytes(image["bytes"])

    found = read_photograph({"bytes": None, "path": str(tmp_path / "photograph.jpg")}, 100)

    whole = read_photograph(image)
    assert (whole.size, found.size) == ((240, 320), (120, 160))
    difference = np.asarray(found, dtype=float) - np.asarray(whole.resize((120, 160)), dtype=float)
    assert np.abs(difference).mean() < 2


BROKEN_AVIF = b"\0\0\0\x18ftypavif\0\0\0\0mif1avif"


@pytest.mark.parametrize("shortest_side", [None, 60])
@pytest.mark.parametrize(
    "image",
    [
        None,
        {"bytes": None, "path": None},
        *({"bytes": content, "path": None} for content in (b"", b"no photograph", BROKEN_AVIF)),
    ],
)
def test_what_cannot_be_read_is_a_problem_at_any_scale(image, shortest_side):
    assert read_photograph(image, shortest_side) is None
    assert find_photograph_problem(image) == "a missing or unreadable photograph"


def test_broken_exif_data_are_no_fault_of_the_pixels():
    picture = Image.effect_noise((30, 20), 80).convert("RGB")
    # To be turned by 90 degrees, and with a resolution that is a text.
    entries = struct.pack(">HHI2H", 0x0112, 3, 1, 6, 0) + struct.pack(">HHI4s", 0x011A, 2, 3, b"72\0\0")
    odd = as_file(picture, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + entries + bytes(4))
    broken = as_file(picture, "PNG", exif=b"Exif\0\0neither II nor MM")

    assert find_photograph_problem(odd) is None and find_photograph_problem(broken) is None
    assert read_photograph(odd).tobytes() == picture.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert read_photograph(broken).tobytes() == picture.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_camera_was_held(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = as_file(Image.effect_noise((30, 20), 80).convert("RGB"), "PNG", exif=exif)

    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(image["bytes"])))
    assert read_photograph(image).tobytes() == expected.tobytes()


def test_a_line_of_pixels_is_no_photograph():
    assert find_photograph_problem(as_file(Image.new("RGB", (50, 1)), "PNG")) is None
    line = as_file(Image.new("RGB", (51, 1)), "PNG")

    assert find_photograph_problem(line) == "a photograph more than 50 times as long as it is wide"
    assert read_photograph(line) is None


def test_a_photograph_may_lie_in_an_archive(tmp_path):
    photograph = Image.effect_noise((40, 30), 80).convert("RGB")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("b.png", as_file(photograph, "PNG")["bytes"])
    image = {"bytes": None, "path": f"zip://b.png::{tmp_path / 'a.zip'}"}  # so in the rows of a streamed image folder

    assert find_photograph_problem(image) is None
    assert read_photograph(image).tobytes() == read_photograph(image, 60).tobytes() == photograph.tobytes()
    assert read_photograph({**image, "path": image["path"].replace("b.png", "c.png")}) is None


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_photographs_of_other_colour_modes_become_rgb(mode):
    photograph = Image.new("RGB", (20, 10), (200, 40, 40)).convert(mode)

    found = read_photograph(as_file(photograph, "TIFF"))

    assert (found.mode, found.size) == ("RGB", (20, 10))
    assert np.array_equal(np.asarray(found), np.asarray(photograph.convert("RGB")))


def test_grey_of_16_bits_keeps_its_range():
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)

    found = read_photograph(as_file(Image.fromarray(grey), "PNG"))

    assert found.mode == "RGB"
    assert np.abs(np.asarray(found)[..., 0] - grey / 257).max() <= 1


def test_what_is_wrong_with_a_photograph_is_said(monkeypatch, tmp_path):
    good = as_file(Image.new("RGB", (20, 10)), "PNG")
    assert find_photograph_problem(good) is None
    assert find_photograph_problem({"bytes": None, "path": str(tmp_path)}) == "a missing or unreadable photograph"

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)  # Pillow warns from here on, and refuses twice as many
    assert find_photograph_problem(good) is None
    assert read_photograph(good).size == (20, 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    assert find_photograph_problem(good) == "a photograph of more than 178 million pixels"
    assert read_photograph(good) is None


def test_a_disk_that_fails_is_no_fault_of_the_photograph(monkeypatch):
    def lost(path):
        raise OSError(errno.ESTALE, "Stale file handle", path)

    monkeypatch.setattr(photographs.Image, "open", lost)
    for read in (find_photograph_problem, lambda image: read_photograph(image, 10)):
        with pytest.raises(OSError, match="Stale file handle: 'a.jpg'"):
            read({"bytes": None, "path": "a.jpg"})


# ---------------------------------------------------------------------------------------------------------- to tensors


def test_a_reader_prepares_photographs_as_the_processor_does(processor):
    photographs = [Image.effect_noise((50, 40 + index), 80).convert("RGB") for index in range(3)]
    images = [as_file(photograph, "PNG") for photograph in photographs]
    images.insert(1, {"bytes": b"", "path": None})

    found = PhotographReader(processor.image_processor)(images)

    assert found.pop(1) is None
    assert torch.equal(torch.stack(found), processor(photographs, [["x"]] * 3)["pixel_values"])
    assert PhotographReader(processor.image_processor)(images[1:2]) == [None]


def test_an_augmenting_reader_goes_by_the_seed_and_decodes_no_more_than_it_needs(processor):
    augmentation = ImageAugmentation(32, 0.3)
    image = as_file(Image.effect_noise((400, 300), 80).convert("RGB"), "JPEG")

    first, other, again = PhotographReader(processor.image_processor, augmentation)([image] * 3, [1, 2, 1])

    assert torch.equal(first, again) and not torch.equal(first, other)
    assert read_photograph(image, augmentation.shortest_side).size == (100, 75)
    expected = augmentation(read_photograph(image, augmentation.shortest_side), 1)
    resize = {"do_resize": False, "do_center_crop": False}
    assert torch.equal(first, processor.image_processor(expected, return_tensors="pt", **resize)["pixel_values"][0])


def test_of_a_batch_of_large_photographs_few_are_decoded_at_a_time(processor, monkeypatch):
    image = as_file(Image.new("RGB", (300, 200)), "PNG")
    rows = datasets.Dataset.from_dict({"item_id": list("abcd"), "image": [image] * 4, "tags": [["x"]] * 4})
    rows = undecoded(rows.cast_column("image", datasets.Image())).to_list()
    made, alive = [], []
    monkeypatch.setattr(photographs, "PIXELS_AT_A_TIME", 100_000)  # those of two
    upright_rgb = photographs.upright_rgb

    def counted(photograph):
        found = upright_rgb(photograph)
        made.append(weakref.ref(found))
        alive.append(sum(reference() is not None for reference in made))
        return found

    monkeypatch.setattr(photographs, "upright_rgb", counted)
    assert TagCollator(processor)(rows)["pixel_values"].shape == (4, 3, 32, 32)
    assert max(alive) == 2
