"""Uploaded images land in a folder per class, whole, bounded, and nowhere else."""

from __future__ import annotations

import io
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

import asynctrain as at
from asynctrain.data import Uploads
from asynctrain.errors import DataError


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(tmp_path / "home" / "images", largest=1000, unpacked=3000)


def zipped(*names: str, content: bytes = b"image", method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name in names:
            archive.writestr(name, content)
    return file.getvalue()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def patched(archive: bytes, local: int, central: int, value: int) -> bytes:
    """Return the zip with a byte of the first file's header changed, at both places where it is kept."""
    changed = bytearray(archive)
    changed[local] = value
    changed[archive.index(b"PK\1\2") + central] = value
    return bytes(changed)


def test_images_are_kept_by_their_class(uploads: Uploads) -> None:
    assert uploads.keep(io.BytesIO(b"image"), "rose.JPG", " flowers ") == 1
    assert uploads.keep(io.BytesIO(b"new"), "rose.JPG", "flowers") == 1
    assert uploads.counts() == {"flowers": 1}
    assert (uploads.folder / "flowers" / "rose.JPG").read_bytes() == b"new"
    uploads.remove("flowers")
    assert uploads.counts() == {}


def test_a_zip_has_a_folder_per_class_and_folders_above_them_are_told_apart(uploads: Uploads) -> None:
    names = "cat/0.png", "train/cat/0.png", "test/cat/0.png", "dog/0.png", "0.png"
    rest = "__MACOSX/cat/._0.png", "cat/.hidden.png", "cat/readme.txt", "cat/"
    assert uploads.keep(io.BytesIO(zipped(*names, *rest)), "pets.ZIP", "top") == 5
    assert files(uploads.folder) == {"cat/0.png", "cat/train-0.png", "cat/test-0.png", "dog/0.png", "top/0.png"}
    assert uploads.counts() == {"cat": 3, "dog": 1, "top": 1}


def test_names_lead_out_of_the_folder_nowhere(uploads: Uploads, tmp_path: Path) -> None:
    uploads.keep(
        io.BytesIO(zipped("../../../up/0.png", "/abs/1.png", "a/../../b/2.png", "w\\..\\3.png")), "a.zip", "top"
    )
    uploads.keep(io.BytesIO(b"image"), "../../4.png", "../../etc")
    assert len(files(tmp_path)) == 5
    assert files(tmp_path) == {f"home/images/{name}" for name in files(uploads.folder)}
    assert {"up/0.png", "abs/1.png", "b/a-2.png", "etc/4.png"} < files(uploads.folder)


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [
        ("0.png", "", "label must have 1 to 200 bytes"),
        ("0.png", "  ", "label must have"),
        ("0.png", "..", "label must have"),
        ("0.png", ".git", "label must have"),
        ("0.png", "a\0b", "label must have"),
        ("0.png", "a\nb", "label must have"),
        ("0.png", "l" * 201, "label must have"),
        ("", "cat", "name must have"),
        (".png", "cat", "name must have"),
        ("x" * 197 + ".png", "cat", "name must have"),
        ("passwd", "cat", "name must end in one of .*png.* or .zip, got 'passwd'"),
    ],
)
def test_a_name_that_cannot_be_one_is_told_and_leaves_nothing(
    uploads: Uploads, name: str, label: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        uploads.keep(io.BytesIO(b"image"), name, label)
    assert list(uploads.folder.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"no zip", id="no zip"),
        pytest.param(zipped("cat/0.png")[:-30], id="truncated"),
        pytest.param(zipped("cat/0.png").replace(b"image", b"IMAGE"), id="another checksum"),
        pytest.param(patched(zipped("cat/0.png"), 6, 8, 1), id="encrypted"),
        pytest.param(patched(zipped("cat/0.png"), 8, 10, 99), id="of an unknown method"),
        pytest.param(
            zipped("cat/0.png", content=bytes(500), method=zipfile.ZIP_DEFLATED)[:39]
            + b"\xff" * 8
            + zipped("cat/0.png", content=bytes(500), method=zipfile.ZIP_DEFLATED)[47:],
            id="a damaged stream",
        ),
    ],
)
def test_a_zip_that_cannot_be_unpacked_is_told(uploads: Uploads, content: bytes) -> None:
    with pytest.raises(DataError, match=r"^pets.zip: this is no zip that can be unpacked: "):
        uploads.keep(io.BytesIO(content), "pets.zip")
    assert files(uploads.folder) == set()


def test_what_is_too_large_is_refused_before_it_is_on_disk(uploads: Uploads) -> None:
    with pytest.raises(DataError, match=r"^0.png: an image may have 1,000 bytes, and this one has more$"):
        uploads.keep(io.BytesIO(bytes(1001)), "0.png", "cat")
    bomb = zipped(*(f"cat/{number}.png" for number in range(4)), content=bytes(999), method=zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=r"^bomb.zip: the images of a zip may have 3,000 bytes"):
        uploads.keep(io.BytesIO(bomb), "bomb.zip")
    assert files(uploads.folder) == set()


def test_two_uploads_of_one_name_at_once_leave_one_of_them_whole(uploads: Uploads) -> None:
    both = threading.Barrier(2)

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            both.wait(20)
            return super().read(size)

    def keep(file: IO[bytes]) -> int:
        return uploads.keep(file, "0.png", "cat")

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(keep, [Slow(b"a" * 900), Slow(b"b" * 900)])) == [1, 1]
    assert files(uploads.folder) == {"cat/0.png"}
    assert (uploads.folder / "cat" / "0.png").read_bytes() in (b"a" * 900, b"b" * 900)


def test_what_a_crash_has_left_half_written_is_removed(uploads: Uploads) -> None:
    uploads.keep(io.BytesIO(b"image"), "0.png", "cat")
    (uploads.folder / "cat" / ".1.png.x7").write_bytes(b"half")
    assert Uploads(uploads.folder).counts() == {"cat": 1}
    assert files(uploads.folder) == {"cat/0.png"}


def test_an_image_folder_reads_what_was_kept_and_no_class_is_removed_that_is_not_there(uploads: Uploads) -> None:
    uploads.keep(io.BytesIO(zipped("cat/0.png", "dog/0.png")), "pets.zip")
    assert at.ImageFolder(uploads.folder).classes == ("cat", "dog")
    with pytest.raises(ValueError, match=r"label must be among cat, dog, got '../images'"):
        uploads.remove("../images")
