"""Images that come from outside, one by one or in zips, into a folder per class as ``ImageFolder`` reads them."""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from asynctrain._files import write_whole
from asynctrain.data.datasets import SUFFIXES, is_image
from asynctrain.errors import DataError

LONGEST = 200  # bytes of a name, which most file systems let be 255; a file has a longer one while it is written
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)  # damaged, or encrypted


class Uploads:
    """Keeps images from people one need not trust in ``folder``, in a folder per class. Everything blocks.

    Names lead nowhere else, and each file is there whole or not at all. Images are not looked into: that is done when
    they are decoded, with the limits of that.

    Args:
        folder: made where there is none. What a crash has left half-written in it is removed, so have one for each.
        largest: bytes that an image may have.
        unpacked: bytes that all images of a zip may have together.
    """

    def __init__(self, folder: str | os.PathLike[str], *, largest: int = 32 * 2**20, unpacked: int = 2 * 2**30) -> None:
        self.folder = Path(folder)
        self.largest = largest
        self.unpacked = unpacked
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*/.*.*"):
            if leftover.is_file():
                leftover.unlink()

    def keep(self, file: IO[bytes], name: str, label: str = "") -> int:
        """Store an image of the class ``label``, or those of a zip with a folder per class; return how many.

        ``name`` tells by its suffix which it is, and an image of the same name and class is replaced. In a zip the
        folder that an image lies in is its class, and the folders above are put before its name; what lies in none is
        of the class ``label``. Hidden files, and files of other kinds, are passed over there.

        Raises:
            ValueError: a name or label cannot be one of a file, or the suffix is that of no image and no zip.
            DataError: an image, or all of a zip together, have more bytes than they may, or this is no zip that can be
                unpacked: damaged, encrypted, of an unknown method. The images before that one stay.
            OSError: the disk is full, say.
        """
        if PurePosixPath(name).suffix.lower() != ".zip":
            self._store(file, name, label)
            return 1
        try:
            with zipfile.ZipFile(file) as archive:
                return sum(self._keep_member(archive, info, label) for info in self._images_in(archive, name))
        except UNREADABLE as error:
            raise DataError(name, f"this is no zip that can be unpacked: {error}") from error

    def counts(self) -> dict[str, int]:
        """Return how many images each class has."""
        folders = sorted(path for path in self.folder.iterdir() if path.is_dir())
        return {folder.name: sum(is_image(path.name) for path in folder.iterdir()) for folder in folders}

    def remove(self, label: str) -> None:
        """Remove a class and its images; raises ``ValueError`` where there is none of that name."""
        if label not in self.counts():
            raise ValueError(f"label must be among {', '.join(self.counts()) or 'none'}, got {label!r}")
        shutil.rmtree(self.folder / label)

    def _images_in(self, archive: zipfile.ZipFile, name: str) -> Iterator[zipfile.ZipInfo]:
        images = [info for info in archive.infolist() if _is_meant(PurePosixPath(info.filename))]
        if sum(info.file_size for info in images) > self.unpacked:  # a zip cannot unpack to more than it says
            raise DataError(name, f"the images of a zip may have {self.unpacked:,} bytes, and here they have more")
        yield from images

    def _keep_member(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, label: str) -> int:
        *above, name = [part for part in PurePosixPath(info.filename).parts if part not in ("/", "..")]
        with archive.open(info) as image:
            self._store(image, "-".join([*above[:-1], name]), above[-1] if above else label)
        return 1

    def _store(self, file: IO[bytes], name: str, label: str) -> None:
        name, label = PurePosixPath(name).name, PurePosixPath(label).name.strip()
        for what, text in ("label", label), ("name", name):
            if not _is_name(text):
                raise ValueError(
                    f"{what} must have 1 to {LONGEST} bytes that can be printed and begin with no dot, got {text!r}"
                )
        if not is_image(name):
            raise ValueError(f"name must end in one of {', '.join(sorted(SUFFIXES))} or .zip, got {name!r}")
        content = file.read(self.largest + 1)
        if len(content) > self.largest:
            raise DataError(name, f"an image may have {self.largest:,} bytes, and this one has more")
        (self.folder / label).mkdir(exist_ok=True)
        write_whole(self.folder / label / name, content)


def _is_meant(path: PurePosixPath) -> bool:
    """Return whether it is an image, and none of those that a Mac adds."""
    return is_image(path.name) and path.parts[0] != "__MACOSX"


def _is_name(text: str) -> bool:
    return text.isprintable() and 0 < len(os.fsencode(text)) <= LONGEST and not text.startswith(".")
