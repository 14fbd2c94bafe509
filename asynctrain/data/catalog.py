"""Long lists of names and of labels, kept compact: what a dataset remembers of each record."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from numbers import Integral

import numpy as np

from asynctrain.arena import Array


class Names:
    """Strings side by side in one buffer: 8 bytes each beside their own UTF-8, where a list takes about 60."""

    __slots__ = ("_ends", "_text")

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._text = bytearray()
        self._ends = array("q")
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        """Add a name at the end."""
        self._text += name.encode("utf-8", "surrogatepass")  # file names of other encodings hold lone surrogates
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        end = self._ends[index]
        start = self._ends[index - 1] if index % len(self._ends) else 0
        return self._text[start:end].decode("utf-8", "surrogatepass")


class Labels:
    """Labels as they come, names or integers, that become the numbers 0, 1, ... of sorted classes.

    Args:
        classes: the names of the labels; by default those that come, in the order of ``sorted_classes``.
    """

    def __init__(self, classes: Sequence[str] | None = None) -> None:
        self._classes = None if classes is None else distinct(classes)
        self._numbers = {name: number for number, name in enumerate(self._classes or ())}
        self._labels = array("q")

    def append(self, label: object) -> None:
        """Add a label; raises ``ValueError`` if it is neither a name nor an integer, or not among the classes."""
        name = label_name(label)
        if self._classes is not None and name not in self._numbers:
            raise ValueError(f"the label must be one of {', '.join(self._classes)}, got {name}")
        self._labels.append(self._numbers.setdefault(name, len(self._numbers)))

    def encoded(self) -> tuple[tuple[str, ...], Array]:
        """Return the classes, and the label of each record as the number of its class, (len,) int64."""
        labels = np.array(self._labels, np.int64)
        if self._classes is not None:
            return self._classes, labels
        classes = sorted_classes(self._numbers)
        places = {name: place for place, name in enumerate(classes)}
        return classes, np.array([places[name] for name in self._numbers], np.int64)[labels]


def label_name(label: object) -> str:
    """Return a label as the name of its class; raises ``ValueError`` if it is neither a name nor an integer."""
    if isinstance(label, str) and label.strip():
        return label.strip()
    if isinstance(label, Integral) and not isinstance(label, bool):
        return str(int(label))
    raise ValueError(f"the label must be a name or an integer, got {label!r}")


def sorted_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Return names sorted as text, or by value if all of them are integers (``"007"`` is text)."""
    names = list(names)
    if all(_is_integer(name) for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def _is_integer(name: str) -> bool:
    digits = name.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and str(int(name)) == name


def distinct(classes: Sequence[str]) -> tuple[str, ...]:
    """Return ``classes`` as a tuple; raises ``ValueError`` if one comes twice."""
    if len(set(classes)) < len(classes):
        raise ValueError(f"classes must differ from one another, got {', '.join(classes)}")
    return tuple(classes)
