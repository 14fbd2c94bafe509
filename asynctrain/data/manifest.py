"""Datasets that are written down: a file that lists images and their labels."""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from math import inf, nan
from pathlib import Path
from typing import IO

import numpy as np

from asynctrain.arena import Array
from asynctrain.data.catalog import Labels, Names
from asynctrain.data.datasets import SUFFIXES, FileSource, Splitting, is_image
from asynctrain.errors import DataError
from asynctrain.types import Record

Row = tuple[int, object, object, object]  # the number of the line, the path, the label, the weight


class ImageManifest(Splitting):
    """Image files listed with their labels in a CSV or JSON Lines file.

    A CSV file has a header with the columns ``path`` and ``label``, in any order and among others, or no header and
    these two as its first columns. Each line of a ``.jsonl`` file is ``{"path": "a/1.jpg", "label": "rose"}``, with
    whatever else. Paths are relative to the manifest's folder; whether the files are there shows when they are read.
    Labels are names or integers; classes are sorted, as numbers if all of them are integers.

    The manifest is read once, when this is created, which blocks: about 1 us a line of CSV and 2 us of JSON. Kept are
    the paths in UTF-8 and 16 bytes a record.

    Args:
        path: the manifest, ``.csv`` or ``.jsonl``, in UTF-8.
        classes: the names of the labels 0, 1, ...; by default those that occur.
        weight: the column, or key, that tells how much each image counts in the loss: a finite number of at least 0.
            None: all count 1.

    Raises:
        ValueError: the suffix of ``path`` is another one, or ``classes`` has a name twice.
        DataError: the manifest is missing or empty, or a line of it lacks a path, a label or a weight that is asked
            for, has a label that is not in ``classes``, or cannot be understood; file and line are named.
    """

    def __init__(
        self, path: str | os.PathLike[str], classes: Sequence[str] | None = None, *, weight: str | None = None
    ) -> None:
        self.path = os.fspath(path)
        self._folder = os.path.dirname(self.path)  # noqa: PTH120 (the paths stay plain strings)
        self._paths = Names()
        labels, weights = Labels(classes), array("f")
        for line, name, label, told in _rows(Path(path), weight):
            if not isinstance(name, str) or not name.strip():
                raise _at(self.path, line, "has no path")
            if label is None or label == "":
                raise _at(self.path, line, "has no label")
            try:
                labels.append(label)
            except ValueError as error:
                raise _at(self.path, line, str(error)) from error
            if weight is not None:
                weights.append(_weight(told, weight, self.path, line))
            self._paths.append(name.strip())
        if not len(self._paths):
            raise DataError(self.path, "lists no images")
        self.classes: tuple[str, ...]
        self.labels: Array
        self.classes, self.labels = labels.encoded()
        self.weights: Array | None = None if weight is None else np.array(weights, np.float32)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int, /) -> Record:
        path = os.path.join(self._folder, self._paths[index])  # noqa: PTH118 (as above)
        weight = 1.0 if self.weights is None else float(self.weights[index])
        return Record(FileSource(path), int(self.labels[index]), weight)

    def __repr__(self) -> str:
        return f"<ImageManifest {self.path}: {len(self):,} images, {len(self.classes)} classes>"


def _at(path: str, line: int, reason: str) -> DataError:
    return DataError(path, f"line {line}: {reason}")


def _weight(told: object, name: str, path: str, line: int) -> float:
    try:
        weight = float(told) if isinstance(told, str | int | float) else nan
    except ValueError:
        weight = nan
    if not 0 <= weight < inf:
        raise _at(path, line, f"{name} must be a finite number of at least 0, got {told!r}")
    return weight


def _rows(path: Path, weight: str | None) -> Iterator[Row]:
    formats = {".csv": _csv_rows, ".jsonl": _json_rows}
    rows = formats.get(path.suffix.lower())
    if rows is None:
        raise ValueError(f"path must end in {' or '.join(formats)}, got {path}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from rows(file, str(path), weight)
    except FileNotFoundError as error:
        raise DataError(path, "no such file") from error
    except UnicodeDecodeError as error:
        raise DataError(path, f"is not in UTF-8: {error}") from error
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror or error}") from error


def _csv_rows(file: IO[str], path: str, weight: str | None) -> Iterator[Row]:
    reader = csv.reader(file, strict=True)
    columns: tuple[int, ...] | None = None
    try:
        for cells in reader:
            if not any(cells):
                continue
            if columns is None:
                columns, is_header = _columns(cells, path, reader.line_num, weight)
                if is_header:
                    continue
            name, label, *told = (cells[column] if column < len(cells) else "" for column in columns)
            yield reader.line_num, name, label.strip(), told[0] if told else None
    except csv.Error as error:
        raise _at(path, reader.line_num, f"is no CSV: {error}") from error


def _columns(cells: list[str], path: str, line: int, weight: str | None) -> tuple[tuple[int, ...], bool]:
    """Return the columns of path, label and perhaps weight, and whether ``cells``, the first line, is a header."""
    names = [cell.strip().lower() for cell in cells]
    wanted = ["path", "label"] if weight is None else ["path", "label", weight.lower()]
    if all(name in names for name in wanted):
        return tuple(map(names.index, wanted)), True
    if weight is not None:
        raise _at(path, line, f"is no header with the columns {', '.join(wanted)}")
    if not is_image(Path(cells[0].strip()).name):
        raise _at(
            path,
            line,
            "is neither a header with the columns path and label, nor does it begin with the path of an image "
            f"({', '.join(sorted(SUFFIXES))})",
        )
    return (0, 1), False


def _json_rows(file: IO[str], path: str, weight: str | None) -> Iterator[Row]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _at(path, line, f"is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise _at(path, line, 'is no JSON object such as {"path": "a.jpg", "label": "rose"}')
        yield line, row.get("path"), row.get("label"), None if weight is None else row.get(weight)
