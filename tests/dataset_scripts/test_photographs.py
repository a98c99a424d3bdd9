"""Photographs are verified, turned upright, shrunk and encoded once; a bad one is named."""

import errno
import io
import json
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def encode(folder: Path, name: str, short_side: int = 144) -> Image.Image:
    from parquet_dataset import encode_photograph

    return Image.open(io.BytesIO(encode_photograph(folder, name, short_side)))


def fault(folder: Path, name: str | None) -> str:
    from parquet_dataset import UnusablePhotograph, encode_photograph

    with pytest.raises(UnusablePhotograph) as caught:
        encode_photograph(folder, name, 144)
    return str(caught.value)


def picture(width: int = 500, height: int = 375) -> Image.Image:
    """Red on the left, blue on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((500, 375), (192, 144)), ((375, 500), (144, 192)), ((144, 300), (144, 300)),
     ((90, 60), (90, 60)), ((3000, 60), (3000, 60)), ((1001, 777), (186, 144))],
)  # fmt: skip
def test_the_short_side_is_shrunk_and_never_enlarged(tmp_path, size, expected):
    picture(*size).save(tmp_path / "a.jpg")
    assert encode(tmp_path, "a.jpg").size == expected


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photographs_are_turned_upright(tmp_path, orientation):
    turn = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90,
            8: Image.Transpose.ROTATE_270}[orientation]  # fmt: skip
    stored = picture() if turn is None else picture().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif)
    upright = encode(tmp_path, "a.jpg")
    assert upright.size == (192, 144)
    assert upright.getpixel((20, 70))[0] > 200
    assert upright.getpixel((170, 70))[2] > 200
    assert not upright.getexif()


def test_odd_exif_data_are_no_fault_of_the_photograph(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = 0.0001
    picture().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    resolution_as_text = data.replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02").replace(
        b"\x1a\x01\x05\x00", b"\x1a\x01\x02\x00"
    )
    assert resolution_as_text != data
    (tmp_path / "a.jpg").write_bytes(resolution_as_text)
    assert encode(tmp_path, "a.jpg").size == (192, 144)
    (tmp_path / "b.jpg").write_bytes(data.replace(b"Exif\0\0", b"Exif\0\0broken"))
    assert encode(tmp_path, "b.jpg").size == (144, 192)


def test_no_notes_of_the_camera_or_the_owner_are_stored(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "secret camera"
    for size in ((500, 375), (90, 60)):  # shrunk, and as it is
        picture(*size).save(tmp_path / "a.jpg", exif=exif, comment="secret comment", xmp=b"<secret/>", dpi=(301, 301))
        assert (tmp_path / "a.jpg").read_bytes().count(b"secret") == 3
        encoded = encode(tmp_path, "a.jpg")
        assert set(encoded.info) <= {"jfif", "jfif_version", "jfif_density", "jfif_unit"}


def test_constants_are_those_of_training():
    import parquet_dataset

    from magneto_training import photographs
    from modeling_magneto import processing_magneto

    assert parquet_dataset.MAX_ASPECT_RATIO == processing_magneto.MAX_ASPECT_RATIO
    assert parquet_dataset.TURNS == processing_magneto.TURNS
    assert parquet_dataset.ERRORS_OF_A_PHOTOGRAPH == photographs.ERRORS_OF_A_PHOTOGRAPH


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1", "LA", "I;16"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    name = "a.tiff" if mode in ("CMYK", "I;16") else "a.png"
    picture().convert("L").convert("I;16").save(tmp_path / name) if mode == "I;16" else (
        picture().convert(mode).save(tmp_path / name)
    )
    assert encode(tmp_path, name).mode == "RGB"


@pytest.mark.parametrize("size", [(256, 20), (1024, 288)])
def test_a_gradient_of_sixteen_bits_stays_a_gradient(tmp_path, size):
    width, height = size
    gradient = np.tile(np.linspace(0, 65535, width).astype(np.uint16), (height, 1))
    Image.fromarray(gradient).save(tmp_path / "a.png")
    Image.fromarray(gradient).save(tmp_path / "a.tiff")
    (tmp_path / "a.pgm").write_bytes(b"P5 %d %d 65535\n" % size + gradient.astype(">u2").tobytes())
    for name in ("a.png", "a.tiff", "a.pgm"):
        row = np.asarray(encode(tmp_path, name), int)[10, :, 0]
        assert np.abs(row - np.linspace(0, 255, len(row))).max() < 4


def test_the_detail_that_is_kept_is_that_of_the_whole_decoding(tmp_path):
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))
    smooth.resize((500, 375), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    whole = Image.open(tmp_path / "a.jpg").convert("L").resize((192, 144))
    ours = encode(tmp_path, "a.jpg").convert("L")
    assert np.abs(np.asarray(ours, int) - np.asarray(whole, int)).mean() < 3


def test_a_missing_photograph_is_missing(tmp_path):
    assert fault(tmp_path, "a.jpg") == "missing"
    assert fault(tmp_path, None) == "missing"


def test_a_text_file_is_unreadable(tmp_path):
    (tmp_path / "a.jpg").write_text("<html>this photo is currently unavailable</html>")
    assert fault(tmp_path, "a.jpg").startswith("unreadable: cannot identify image file 'a.jpg'")


def test_a_photograph_that_breaks_off_is_unreadable(tmp_path):
    picture().save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    assert fault(tmp_path, "a.jpg").startswith("unreadable: ")


def test_a_folder_and_an_impossible_path_are_unreadable(tmp_path):
    (tmp_path / "a.jpg").mkdir()
    assert fault(tmp_path, "a.jpg").startswith("unreadable: ")
    assert fault(tmp_path, "a\0.jpg").startswith("unreadable: ")


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES, None])
def test_errors_of_the_machine_are_no_fault_of_the_photograph(tmp_path, monkeypatch, error):
    from parquet_dataset import encode_photograph

    def fail(image):
        raise MemoryError if error is None else OSError(error, os.strerror(error))

    picture().save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(MemoryError if error is None else OSError):
        encode_photograph(tmp_path, "a.png", 144)


def test_paths_that_lead_nowhere_and_damage_are_faults_of_the_photograph(tmp_path):
    (tmp_path / "a.jpg").write_text("no folder")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    for path in ("a.jpg/b.jpg", "loop.jpg", f"{'x' * 300}.jpg"):
        assert fault(tmp_path, path).startswith("unreadable: "), path
    box_of_63_bits = struct.pack(">I4sQ", 1, b"free", 2**63 - 1)
    (tmp_path / "a.jp2").write_bytes(struct.pack(">I4s", 12, b"jP  ") + b"\r\n\x87\n" + box_of_63_bits)
    assert fault(tmp_path, "a.jp2") == "unreadable: [Errno 22] Invalid argument"


@pytest.mark.parametrize("size", [(1021, 20), (70_000, 1), (1, 70_000)])
def test_a_photograph_that_training_refuses_for_its_length_is_unreadable(tmp_path, size):
    Image.new("L", size).save(tmp_path / "a.png")
    expected = f"unreadable: {size[0]} x {size[1]} pixels, expected sides of at most 1 : 50"
    assert fault(tmp_path, "a.png") == expected
    Image.new("L", (1000, 20)).save(tmp_path / "b.png")
    assert encode(tmp_path, "b.png").size == (1000, 20)


def test_a_photograph_too_long_for_a_jpeg_is_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr("parquet_dataset.MAX_JPEG_SIDE", 1_000)
    Image.new("L", (1_001, 100)).save(tmp_path / "a.png")
    assert fault(tmp_path, "a.png") == "unreadable: 1001 x 100 pixels are too long for a JPEG"


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels to speak of."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [13_400, 100_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    (tmp_path / "a.png").write_bytes(png_header(side, side))
    assert fault(tmp_path, "a.png").startswith("unreadable: ")


@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_random_damage_is_a_fault_or_a_photograph(tmp_path):
    from parquet_dataset import UnusablePhotograph

    chance = random.Random(0)
    faults = 0
    for suffix in (".jpg", ".png", ".gif", ".webp", ".bmp", ".tiff"):
        picture(60, 40).save(tmp_path / f"whole{suffix}")
        whole = (tmp_path / f"whole{suffix}").read_bytes()
        for _ in range(40):
            data = bytearray(whole)
            for _ in range(chance.randrange(1, 20)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            (tmp_path / "damaged.jpg").write_bytes(data[: chance.randrange(1, len(data) + 1)])
            try:
                assert encode(tmp_path, "damaged.jpg").mode == "RGB"
            except UnusablePhotograph:
                faults += 1
    assert faults > 100


def test_unusable_photographs_are_listed_counted_and_not_replaced(tmp_path, run_script, sample):
    import datasets

    source = tmp_path / "nus_wide"
    source.mkdir()
    for part in sample.iterdir():
        if part.name != "Flickr":
            os.symlink(part, source / part.name)
    (source / "photographs").mkdir()
    photographs = sorted(sample.rglob("*.jpg"))
    for path in photographs:  # the flat layout: <id>.jpg
        os.link(path, source / "photographs" / f"{path.stem.rpartition('_')[2]}.jpg")
    assert run_script("prepare_nus_wide", source, tmp_path / "whole").status == 0
    whole = datasets.load_dataset(str(tmp_path / "whole"), cache_dir=str(tmp_path / "cache"))

    missing, text = whole["train"]["item_id"][3], whole["test"]["item_id"][5]
    (source / f"photographs/{missing}.jpg").unlink()
    (source / f"photographs/{text}.jpg").unlink()
    (source / f"photographs/{text}.jpg").write_text("no photograph")
    outcome = run_script("prepare_nus_wide", source, tmp_path / "rest")
    assert outcome.status == 0
    assert "missing_images.txt" in outcome.out

    counts = json.loads((tmp_path / "rest/counts.json").read_text())
    assert (counts["missing_images"], counts["unreadable_images"]) == (1, 1)
    lines = (tmp_path / "rest/missing_images.txt").read_text().splitlines()
    assert [line.split("\t")[:2] for line in lines] == [["train", missing], ["test", text]]
    rest = datasets.load_dataset(str(tmp_path / "rest"), cache_dir=str(tmp_path / "cache"))
    for split, gone in (("train", missing), ("validation", None), ("test", text)):
        expected = [row for row in whole[split] if row["item_id"] != gone]
        assert [row["item_id"] for row in rest[split]] == [row["item_id"] for row in expected]
        assert all(a["image"] == b["image"] for a, b in zip(rest[split], expected, strict=True))
