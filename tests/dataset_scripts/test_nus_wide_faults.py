"""Damaged, missing and disagreeing official files end in one line that names them."""

import random
import zipfile
from pathlib import Path

import pytest

LABELS = "Groundtruth/AllLabels/Labels_sun.txt"
TAGS = "NUS_WID_Tags/AllTags81.txt"
IMAGES = "ImageList/Imagelist.txt"
TRAIN = "ImageList/TrainImagelist.txt"


def edit_lines(path: Path, edit) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(edit(lines)))


def check_failure(run_script, source: Path, *parts: str) -> None:
    """The script ends with one line that holds all parts, and leaves nothing behind."""
    out = source.parent / "out"
    outcome = run_script("prepare_nus_wide", source, out, "--no_images")
    assert outcome.status == 1
    assert outcome.err.count("\n") == 1
    for part in parts:
        assert part in outcome.error
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


def test_a_missing_part_is_named_with_its_download(run_script, small_nus_wide):
    (small_nus_wide / TAGS).unlink()
    (small_nus_wide / LABELS).unlink()
    check_failure(
        run_script,
        small_nus_wide,
        "missing NUS_WID_Tags/AllTags81.txt (usually from NUS_WID_Tags.zip)",
        "Groundtruth/AllLabels/Labels_sun.txt (usually from Groundtruth.zip)",
        "NUS-WIDE.html",
    )


def test_a_missing_folder_is_named(run_script, tmp_path):
    check_failure(run_script, tmp_path / "nowhere", "nowhere: no such folder")


def test_a_truncated_zip_is_named(run_script, small_nus_wide):
    whole = small_nus_wide / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.write(small_nus_wide / TAGS, TAGS)
    (small_nus_wide / TAGS).unlink()
    (small_nus_wide / "NUS_WID_Tags.zip").write_bytes(whole.read_bytes()[:-40])
    whole.unlink()
    check_failure(run_script, small_nus_wide, "AllTags81.txt", "damaged: NUS_WID_Tags.zip")


def test_a_zip_with_a_flipped_byte_is_named(run_script, small_nus_wide):
    damaged = small_nus_wide / "NUS_WID_Tags.zip"
    with zipfile.ZipFile(damaged, "w") as archive:
        archive.write(small_nus_wide / TAGS, TAGS)
    data = bytearray(damaged.read_bytes())
    data[200] ^= 1
    damaged.write_bytes(data)
    (small_nus_wide / TAGS).unlink()
    check_failure(run_script, small_nus_wide, "NUS_WID_Tags.zip/NUS_WID_Tags/AllTags81.txt", "CRC")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_any_flipped_bit_of_a_zip_is_an_input_error_or_harmless(tmp_path, method):
    from nus_wide import NusWideFolder
    from parquet_dataset import InputError

    (tmp_path / "downloads").mkdir()
    path = tmp_path / "downloads/ImageList.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("Imagelist.txt", "actor/0001_2124494179.jpg\n" * 3)
    whole = path.read_bytes()
    errors = 0
    for position in range(len(whole)):
        for bit in (1, 2, 64, 128):
            data = bytearray(whole)
            data[position] ^= bit
            path.write_bytes(data)
            folder = NusWideFolder(tmp_path / "downloads")
            try:
                if "Imagelist.txt" in folder:
                    folder.file("Imagelist.txt").read()
                else:
                    folder.check_complete()
            except InputError as error:
                assert "\n" not in str(error)
                errors += 1
    assert errors > 100


def test_too_little_memory_is_no_damage(run_script, small_nus_wide, monkeypatch):
    def fail(*arguments):
        raise MemoryError

    with zipfile.ZipFile(small_nus_wide / "NUS_WID_Tags.zip", "w") as archive:
        archive.write(small_nus_wide / TAGS, TAGS)
    (small_nus_wide / TAGS).unlink()
    for method in ("read", "namelist"):
        with monkeypatch.context() as patch:
            patch.setattr(zipfile.ZipFile, method, fail)
            check_failure(run_script, small_nus_wide, "error: out of memory")


def test_a_zip_of_an_unknown_version_is_named(run_script, small_nus_wide):
    damaged = small_nus_wide / "NUS_WID_Tags.zip"
    with zipfile.ZipFile(damaged, "w") as archive:
        archive.write(small_nus_wide / TAGS, TAGS)
    data = bytearray(damaged.read_bytes())
    data[data.index(b"PK\x01\x02") + 6] ^= 128  # the version that it takes to read this
    damaged.write_bytes(data)
    (small_nus_wide / TAGS).unlink()
    check_failure(run_script, small_nus_wide, "AllTags81.txt", "damaged: NUS_WID_Tags.zip")


def test_two_different_files_of_one_name_are_named(run_script, small_nus_wide):
    (small_nus_wide / "copy").mkdir()
    (small_nus_wide / "copy/AllTags81.txt").write_text("0 1\n")
    check_failure(run_script, small_nus_wide, "AllTags81.txt and copy/AllTags81.txt differ")


def test_a_short_label_file_is_named(run_script, small_nus_wide):
    edit_lines(small_nus_wide / LABELS, lambda lines: lines[:-1])
    check_failure(run_script, small_nus_wide, "Labels_sun.txt: 19 lines, expected 20 as in Imagelist.txt")


@pytest.mark.parametrize("value", [b"2", b"-1130179", b"", b"yes", b"1 0"])
def test_a_label_that_is_not_0_or_1_is_named(run_script, small_nus_wide, value):
    edit_lines(small_nus_wide / LABELS, lambda lines: [*lines[:4], value + b"\n", *lines[5:]])
    check_failure(run_script, small_nus_wide, "Labels_sun.txt, line 5")


def test_a_tag_row_with_80_columns_is_named(run_script, small_nus_wide):
    edit_lines(small_nus_wide / TAGS, lambda lines: [*lines[:2], b"0 " * 80 + b"\n", *lines[3:]])
    check_failure(run_script, small_nus_wide, "AllTags81.txt, line 3: 80 values, expected 81")


def test_a_tag_that_is_not_0_or_1_is_named_with_its_concept(run_script, small_nus_wide):
    edit_lines(small_nus_wide / TAGS, lambda lines: [*lines[:2], b"7" + lines[2][1:], *lines[3:]])
    check_failure(run_script, small_nus_wide, "AllTags81.txt, line 3, airport: found '7', expected 0 or 1")


def test_digits_that_touch_are_not_two_columns(run_script, small_nus_wide):
    edit_lines(small_nus_wide / TAGS, lambda lines: [b"00 " + b"0 " * 79 + b"\n", *lines[1:]])
    check_failure(run_script, small_nus_wide, "AllTags81.txt, line 1, airport: found '00'")


def test_an_image_in_neither_list_is_named(run_script, small_nus_wide):
    edit_lines(small_nus_wide / TRAIN, lambda lines: [*lines[:5], *lines[6:]])
    check_failure(run_script, small_nus_wide, "Imagelist.txt, line 6: sky/0005_105.jpg is neither in")


def test_a_listed_image_that_does_not_exist_is_named(run_script, small_nus_wide):
    edit_lines(small_nus_wide / TRAIN, lambda lines: [*lines, b"x\\0001_999.jpg\r\n"])
    check_failure(run_script, small_nus_wide, "line 16: x/0001_999.jpg is not in Imagelist.txt")


@pytest.mark.parametrize("name", [IMAGES, TRAIN])
def test_a_shuffled_list_is_named(run_script, small_nus_wide, name):
    def shuffle(lines):
        return random.Random(0).sample(lines, len(lines))

    edit_lines(small_nus_wide / name, shuffle)
    check_failure(run_script, small_nus_wide, "Imagelist.txt, line", "in the same order")


def test_a_repeated_line_is_named(run_script, small_nus_wide):
    edit_lines(small_nus_wide / TRAIN, lambda lines: [*lines[:5], *lines[4:]])
    check_failure(run_script, small_nus_wide, "TrainImagelist.txt, line 6: sky/0004_104.jpg", "each image once")


def test_a_shuffled_concept_list_is_named(run_script, small_nus_wide):
    path = small_nus_wide / "ConceptsList/Concepts81.txt"
    edit_lines(path, lambda lines: [lines[1], lines[0], *lines[2:]])
    check_failure(run_script, small_nus_wide, "line 1: found 'animal', expected 'airport'")


@pytest.mark.parametrize("name", [IMAGES, TAGS, LABELS])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_another_encoding_is_named(run_script, small_nus_wide, name, encoding):
    path = small_nus_wide / name
    path.write_bytes(path.read_text().encode(encoding))
    check_failure(run_script, small_nus_wide, f"{name}, line 1: byte 0x", "expected plain ASCII text")


def test_a_list_of_something_else_is_named(run_script, small_nus_wide):
    edit_lines(small_nus_wide / IMAGES, lambda lines: [*lines[:3], b"../../etc/passwd\n"])
    check_failure(run_script, small_nus_wide, "Imagelist.txt, line 4: found '../../etc/passwd'")


def test_no_photographs_at_all_is_an_error_that_says_the_way_out(run_script, small_nus_wide):
    outcome = run_script("prepare_nus_wide", small_nus_wide, small_nus_wide.parent / "out")
    assert outcome.status == 1
    assert "no photographs" in outcome.error
    assert "--no_images" in outcome.error


def test_a_folder_of_other_files_is_not_overwritten(run_script, small_nus_wide, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    outcome = run_script("prepare_nus_wide", small_nus_wide, tmp_path / "out", "--no_images")
    assert outcome.status == 1
    assert "holds other files" in outcome.error
    assert (tmp_path / "out/thesis.txt").read_text() == "years of work"


def test_random_damage_is_an_error_line_or_harmless(small_nus_wide):
    """Two hundred damaged files: nothing but InputError, with one line, ever comes out."""
    from nus_wide import NusWideFolder, read_nus_wide, select
    from parquet_dataset import InputError

    chance = random.Random(0)
    paths = sorted(small_nus_wide.rglob("*.txt"))
    lists = [path for path in paths if "Groundtruth" not in str(path)]
    damages = {
        "cut": lambda data: data[: chance.randrange(len(data))],
        "empty": lambda data: b"",
        "flip": lambda data: flip(data, chance.randrange(len(data)), chance.randrange(1, 256)),
        "repeat a line": lambda data: data + data.splitlines(keepends=True)[0],
        "drop a line": lambda data: b"".join(data.splitlines(keepends=True)[1:]),
        "shuffle": lambda data: b"".join(sorted(data.splitlines(keepends=True), key=lambda _: chance.random())),
        "photograph": lambda data: b"\xff\xd8\xff\xe0" + chance.randbytes(100),
    }
    errors = 0
    for _ in range(200):
        path = chance.choice(chance.choice([paths, lists]))
        whole = path.read_bytes()
        path.write_bytes(chance.choice(list(damages.values()))(whole))
        try:
            select(read_nus_wide(NusWideFolder(small_nus_wide)))
        except InputError as error:
            assert "\n" not in str(error)
            assert path.name in str(error) or "Imagelist.txt" in str(error)
            errors += 1
        path.write_bytes(whole)
    assert errors > 100


def flip(data: bytes, position: int, mask: int) -> bytes:
    return data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]
