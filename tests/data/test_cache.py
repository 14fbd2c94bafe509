from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from asynctrain.arena import Array
from asynctrain.data import ArrayDataset, ImageFolder, ImageSettings, Subset, decode
from asynctrain.data.cache import Cache, CacheRows, CacheStatistics, FileCache, MemoryCache
from asynctrain.data.datasets import FileSource
from asynctrain.errors import ClosedError, DataError
from asynctrain.types import Record

SETTINGS = ImageSettings((12, 12), 3)
ROW = 12 * 12 * 3  # bytes

MakeCache = Callable[[], Cache]  # each call a cache that has what the one before was given


@dataclass
class NamedSource:
    name: bytes | None

    def read(self) -> bytes:
        return b""

    def identity(self) -> bytes | None:
        return self.name


class NamedDataset:
    """Samples whose identity is a name, so that what is cached for them is the test's to say."""

    def __init__(self, names: Sequence[bytes | None]) -> None:
        self.names = names
        self.classes = ("0",)
        self.labels: Array = np.zeros(len(names), np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> Record:
        return Record(NamedSource(self.names[index]), 0)


def numbered(count: int) -> NamedDataset:
    return NamedDataset([b"%d" % number for number in range(count)])


def pixels_of(number: int, shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def all_pixels(count: int, settings: ImageSettings = SETTINGS) -> Array:
    return np.stack([pixels_of(number, settings.shape) for number in range(count)])


def got(rows: CacheRows, indices: Sequence[int], settings: ImageSettings = SETTINGS) -> dict[int, Array]:
    """Return the images that ``rows`` has of ``indices``."""
    out = np.empty((len(indices), *settings.shape), np.uint8)
    missing = rows.get(np.array(indices, np.int64), out)
    return {index: out[row] for row, index in enumerate(indices) if not missing[row]}


def fill(cache: Cache, count: int, settings: ImageSettings = SETTINGS) -> None:
    with cache.open(numbered(count), settings) as rows:
        rows.put(np.arange(count), all_pixels(count, settings))


@pytest.fixture(params=["memory", "file"])
def make_cache(request: pytest.FixtureRequest, tmp_path: Path) -> MakeCache:
    memory = MemoryCache(10**6)
    return lambda: memory if request.param == "memory" else FileCache(tmp_path / "cache")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """Return the file of a cache that holds 20 images."""
    fill(FileCache(tmp_path / "cache"), 20)
    (path,) = (tmp_path / "cache").iterdir()
    yield path
    assert [*path.parent.glob(".*")] == []


def test_images_that_were_put_come_back_and_the_others_are_told_missing(make_cache: MakeCache) -> None:
    images = all_pixels(10)
    with make_cache().open(numbered(10), SETTINGS) as rows:
        assert got(rows, range(10)) == {}
        rows.put(np.array([7, 2, 4]), images[[7, 2, 4]])
        out = np.empty((4, 12, 12, 3), np.uint8)

        missing = rows.get(np.array([2, 3, 7, 2]), out)

        assert missing.tolist() == [False, True, False, False]
        np.testing.assert_array_equal(out[~missing], images[[2, 7, 2]])


def test_what_was_put_is_there_at_the_next_opening(make_cache: MakeCache) -> None:
    fill(make_cache(), 10)
    with make_cache().open(numbered(10), SETTINGS) as rows:
        np.testing.assert_array_equal([*got(rows, range(10)).values()], all_pixels(10))


def test_other_orders_and_parts_of_a_dataset_share_what_is_held(make_cache: MakeCache) -> None:
    fill(make_cache(), 10)
    with make_cache().open(Subset(numbered(20), [15, 3, 8, 3, 19]), SETTINGS) as rows:
        held = got(rows, range(5))
        assert sorted(held) == [1, 2, 3]
        np.testing.assert_array_equal([held[1], held[2], held[3]], all_pixels(10)[[3, 8, 3]])
        rows.put(np.array([4]), pixels_of(19, SETTINGS.shape)[np.newaxis])
    with make_cache().open(numbered(20), SETTINGS) as rows:
        held = got(rows, range(20))
        assert sorted(held) == [*range(10), 19]
        np.testing.assert_array_equal([*held.values()], all_pixels(20)[[*range(10), 19]])


@pytest.mark.parametrize(
    "other", [ImageSettings((12, 13)), ImageSettings((12, 12), 1), ImageSettings((12, 12), 3, max_pixels=9)]
)
def test_other_settings_do_not_find_it(make_cache: MakeCache, other: ImageSettings) -> None:
    fill(make_cache(), 3)
    with make_cache().open(numbered(3), other) as rows:
        assert got(rows, range(3), other) == {}


def test_a_decoder_of_another_version_does_not_find_it(make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(make_cache(), 3)
    monkeypatch.setattr("asynctrain.data.cache.decoder_fingerprint", lambda settings: {"pillow": "0.0"})
    with make_cache().open(numbered(3), SETTINGS) as rows:
        assert got(rows, range(3)) == {}


def test_a_file_that_was_changed_is_missing_and_the_others_are_not(make_cache: MakeCache, image_folder: Path) -> None:
    data = ImageFolder(image_folder)
    images = np.stack([decode(FileSource(str(data[index].source)).read(), SETTINGS) for index in range(len(data))])
    with make_cache().open(data, SETTINGS) as rows:
        rows.put(np.arange(len(data)), images)
    Image.fromarray(np.zeros((13, 13, 3), np.uint8)).save(image_folder / "rose" / "03.png")
    with make_cache().open(data, SETTINGS) as rows:
        held = got(rows, range(len(data)))
        assert sorted(set(range(len(data))) - set(held)) == [3]
        np.testing.assert_array_equal([*held.values()], np.delete(images, 3, axis=0))


def test_a_file_is_the_same_by_a_relative_path_and_another_after_any_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"12")
    os.utime(path, ns=(0, 1_000))
    before = FileSource(str(path)).identity()
    monkeypatch.chdir(tmp_path)
    assert FileSource("a.png").identity() == before
    os.utime(path, ns=(0, 1_001))
    touched = FileSource("a.png").identity()
    path.write_bytes(b"123")
    os.utime(path, ns=(0, 1_000))
    assert len({before, touched, FileSource("a.png").identity()}) == 3


def test_images_without_an_identity_are_not_kept(make_cache: MakeCache, tmp_path: Path) -> None:
    assert FileSource(str(tmp_path / "not there.png")).identity() is None
    with make_cache().open(NamedDataset([None, b"1"]), SETTINGS) as rows:
        rows.put(np.array([0, 1]), all_pixels(2))
        assert list(got(rows, [0, 1])) == [1]
    with make_cache().open(ArrayDataset(all_pixels(2), [0, 0]), SETTINGS) as rows:
        rows.put(np.array([0, 1]), all_pixels(2))
        assert rows.statistics() == CacheStatistics(samples=2, places=0, held=0, hits=0, misses=0)


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.sampled_from([1, 3]),
    in_memory=st.booleans(),
    openings=st.lists(
        st.tuples(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.lists(st.integers(0, 11), max_size=6)),
        min_size=1,
        max_size=4,
    ),
)
def test_a_cache_holds_exactly_what_a_dictionary_by_name_would(
    tmp_path_factory: pytest.TempPathFactory,
    size: tuple[int, int],
    channels: int,
    in_memory: bool,
    openings: list[tuple[list[int], list[int]]],
) -> None:
    settings = ImageSettings(size, channels)
    cache: Cache = MemoryCache(10**6) if in_memory else FileCache(tmp_path_factory.mktemp("cache"))
    oracle: dict[int, Array] = {}
    for names, written in openings:
        with cache.open(NamedDataset([b"%d" % name for name in names]), settings) as rows:
            chosen = [index for index in written if index < len(names)]
            images = np.array([pixels_of(names[index], settings.shape) for index in chosen], np.uint8)
            rows.put(np.array(chosen, np.int64), images.reshape(-1, *settings.shape))
            oracle |= {names[index]: image for index, image in zip(chosen, images, strict=True)}

            held = got(rows, range(len(names)), settings)

            assert sorted(held) == [index for index, name in enumerate(names) if name in oracle]
            for index, image in held.items():
                np.testing.assert_array_equal(image, oracle[names[index]])


def test_hits_misses_and_what_is_held_are_counted(make_cache: MakeCache) -> None:
    with make_cache().open(NamedDataset([b"0", b"1", b"2", None]), SETTINGS) as rows:
        rows.put(np.array([0, 1]), all_pixels(2))
        got(rows, [0, 1, 2])
        got(rows, [3, 0])
        assert rows.statistics() == CacheStatistics(samples=4, places=3, held=2, hits=3, misses=2)
        assert repr(rows) == "<CacheRows: 2 of 4 images held, no place for 1; 3 hits, 2 misses>"


def test_memory_is_kept_within_its_budget_and_says_what_it_left_out() -> None:
    cache = MemoryCache(7 * ROW + ROW - 1)
    with cache.open(numbered(10), SETTINGS) as rows:
        rows.put(np.arange(10), all_pixels(10))
        held = got(rows, range(10))
        assert len(held) == 7
        np.testing.assert_array_equal([*held.values()], all_pixels(10)[[*held]])
        assert repr(rows).startswith("<CacheRows: 7 of 10 images held, no place for 3;")
    with cache.open(numbered(20), SETTINGS) as rows:
        rows.put(np.arange(20), all_pixels(20))
        assert sorted(got(rows, range(20))) == sorted(held)
    with cache.open(numbered(5), ImageSettings((100, 100))) as rows:
        assert rows.statistics().places == 0
    assert cache.reserved == 7 * ROW
    assert repr(cache) == f"<MemoryCache: {7 * ROW:,} of {8 * ROW - 1:,} bytes given out>"


@pytest.mark.parametrize(("budget", "kind"), [(0, ValueError), (-5, ValueError), (1e6, TypeError), ("1 GB", TypeError)])
def test_a_budget_is_a_positive_number_of_bytes(budget: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"budget must be .* got {re.escape(repr(budget))}"):
        MemoryCache(budget)


def test_arrays_of_another_shape_or_dtype_are_refused(make_cache: MakeCache) -> None:
    with make_cache().open(numbered(3), SETTINGS) as rows:
        with pytest.raises(ValueError, match=r"out must be \(2, 12, 12, 3\) of uint8, got \(2, 12, 12, 1\) of uint8"):
            rows.get(np.arange(2), np.empty((2, 12, 12, 1), np.uint8))
        with pytest.raises(ValueError, match=r"images must be \(2, 12, 12, 3\) of uint8, got .* of float32"):
            rows.put(np.arange(2), np.empty((2, 12, 12, 3), np.float32))


def test_rows_that_were_closed_refuse_to_be_used(make_cache: MakeCache) -> None:
    with make_cache().open(numbered(3), SETTINGS) as rows:
        pass
    with pytest.raises(ClosedError):
        got(rows, [0])
    assert repr(rows) == "<CacheRows: closed>"


def test_opening_leaves_off_when_told_to(make_cache: MakeCache) -> None:
    stopping = threading.Event()

    class Stopping(NamedDataset):
        def __getitem__(self, index: int, /) -> Record:
            assert index <= 5
            if index == 5:
                stopping.set()
            return super().__getitem__(index)

    with pytest.raises(ClosedError):
        make_cache().open(Stopping([b"x"] * 1000), SETTINGS, stopping)


def test_threads_that_read_and_write_the_same_rows_never_see_wrong_pixels(make_cache: MakeCache) -> None:
    settings = ImageSettings((64, 64), 3)
    images = all_pixels(32, settings)
    with make_cache().open(numbered(32), settings) as rows, ThreadPoolExecutor(4) as pool:

        def work(seed: int) -> int:
            rng = np.random.default_rng(seed)
            for _ in range(50):
                indices = rng.integers(0, 32, 8)
                rows.put(indices, images[indices])
                for index, image in got(rows, rng.integers(0, 32, 8).tolist(), settings).items():
                    np.testing.assert_array_equal(image, images[index])
            return len(got(rows, range(32), settings))

        places = rows.statistics().places
        assert [*pool.map(work, range(4))][-1] <= places == 32


# Files that were damaged, and that cannot be made


@pytest.mark.parametrize("flips", range(20))
def test_a_row_with_a_changed_byte_is_missing_and_is_made_good(file: Path, flips: int) -> None:
    content = bytearray(file.read_bytes())
    rows_at = len(content) - 20 * ROW
    place = random.Random(flips).randrange(rows_at - 4096, len(content))  # a page of marks, and the rows
    content[place] ^= 1 << flips % 8
    file.write_bytes(content)
    with FileCache(file.parent).open(numbered(20), SETTINGS) as rows:
        held = got(rows, range(20))
        assert len(held) == (20 if rows_at - 4096 + 20 * 8 <= place < rows_at else 19)  # 20 where the marks have ended
        np.testing.assert_array_equal([*held.values()], all_pixels(20)[[*held]])
        rows.put(np.arange(20), all_pixels(20))
    with FileCache(file.parent).open(numbered(20), SETTINGS) as rows:
        assert len(got(rows, range(20))) == 20


def test_a_row_in_the_place_of_another_is_missing(file: Path) -> None:
    content = bytearray(file.read_bytes())
    rows_at = len(content) - 20 * ROW
    marks = slice(rows_at - 4096, rows_at - 4096 + 8), slice(rows_at - 4096 + 8, rows_at - 4096 + 16)
    pixels = slice(rows_at, rows_at + ROW), slice(rows_at + ROW, rows_at + 2 * ROW)
    for one, other in (marks, pixels):
        content[one], content[other] = content[other], content[one]
    file.write_bytes(content)
    with FileCache(file.parent).open(numbered(20), SETTINGS) as rows:
        assert len(got(rows, range(20))) == 18


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot tell what room a file takes")
def test_a_file_has_all_its_room_on_disk_from_the_beginning_and_again_if_it_was_copied_with_holes(
    tmp_path: Path,
) -> None:
    with FileCache(tmp_path).open(numbered(100), SETTINGS):
        (path,) = tmp_path.iterdir()
        assert path.stat().st_blocks * 512 >= path.stat().st_size >= 100 * ROW
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(2 * 4096)
        file.truncate(size)
    assert path.stat().st_blocks * 512 < size
    with FileCache(tmp_path).open(numbered(100), SETTINGS):
        assert path.stat().st_blocks * 512 >= size


@pytest.mark.parametrize("share", [0.6, 0.8, 0.95])
def test_a_file_that_was_cut_short_has_the_rest_of_its_rows_missing(file: Path, share: float) -> None:
    with file.open("r+b") as content:
        content.truncate(max(int(file.stat().st_size * share), 2 * 4096))
    with FileCache(file.parent).open(numbered(20), SETTINGS) as rows:
        held = got(rows, range(20))
        assert len(held) < 20
        np.testing.assert_array_equal(np.array([*held.values()]).reshape(-1, 12, 12, 3), all_pixels(20)[[*held]])
        rows.put(np.arange(20), all_pixels(20))
        assert len(got(rows, range(20))) == 20


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"somebody else's",
        b"[1, 2]".ljust(9000),
        b'{"rows": "many"}'.ljust(4096, b"\0"),
        b'{"format": "asynctrain decoded images", "rows": 3}'.ljust(9000, b"\0"),
    ],
)
def test_a_file_that_is_none_of_the_caches_is_named_and_left_alone(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(DataError, match="is no file of this cache, or a damaged one; delete it") as caught:
        FileCache(file.parent).open(numbered(20), SETTINGS)
    assert caught.value.path == str(file)
    assert file.read_bytes() == content


def test_a_file_whose_tags_are_cut_off_is_named(file: Path) -> None:
    with file.open("r+b") as content:
        content.truncate(4096 + 19 * 16)
    with pytest.raises(DataError, match="is no file of this cache, or a damaged one"):
        FileCache(file.parent).open(numbered(20), SETTINGS)


def test_a_disk_without_room_is_an_error_that_says_how_much_is_needed(tmp_path: Path) -> None:
    script = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from test_cache import ImageSettings, FileCache, numbered
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
FileCache(sys.argv[1]).open(numbered(1000), ImageSettings((32, 32), 3))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "cache", Path(__file__).parent], stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 1  # not killed by SIGBUS
    size = 4096 + 16_384 + 8192 + 1000 * 32 * 32 * 3  # header, tags, marks, rows
    assert re.search(rf"DataError: {tmp_path}/cache/\w+-\w+\.rows: cannot be given its {size:,} bytes: ", done.stderr)
    assert [*(tmp_path / "cache").iterdir()] == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(DataError, match="cannot be made") as caught:
        FileCache(tmp_path / "occupied" / "cache").open(numbered(3), SETTINGS)
    assert str(tmp_path / "occupied" / "cache") in caught.value.path


def test_who_comes_second_with_a_file_takes_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = Path.hardlink_to
    late: list[Path] = []

    def link_late(self: Path, target: Path) -> None:
        if not late:
            late.append(self)
            fill(FileCache(tmp_path), 5)  # the first one, at the last moment
        link(self, target)

    monkeypatch.setattr(Path, "hardlink_to", link_late)
    with FileCache(tmp_path).open(numbered(5), SETTINGS) as rows:
        assert len(got(rows, range(5))) == 5
    assert [*tmp_path.iterdir()] == late


def test_file_systems_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError("operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    fill(FileCache(tmp_path), 5)
    with FileCache(tmp_path).open(numbered(5), SETTINGS) as rows:
        assert len(got(rows, range(5))) == 5
    assert len([*tmp_path.iterdir()]) == 1


# Several processes

FILL = """
import sys
import numpy as np
from asynctrain.data import ImageSettings
from asynctrain.data.cache import FileCache

class Numbered:
    def __init__(self, number): self.number = number
    source = property(lambda self: self)
    def identity(self): return b"%d" % self.number

class Dataset:
    def __len__(self): return 200
    def __getitem__(self, index): return Numbered(index)

settings = ImageSettings((64, 64), 3)
images = [np.random.default_rng(number).integers(0, 256, settings.shape, np.uint8) for number in range(200)]
print("ready", flush=True)
sys.stdin.readline()
rows = FileCache(sys.argv[1]).open(Dataset(), settings)
order = np.random.default_rng(int(sys.argv[2])).permutation(200)
for start in range(0, 200, 5):
    chunk = order[start : start + 5]
    rows.put(chunk, np.stack([images[index] for index in chunk]))
    print(start, flush=True)
"""


def start_filling(folder: Path, seed: int) -> subprocess.Popen[str]:
    """Start a process that fills a cache of 200 images in chunks of 5, each told on its standard output."""
    process = subprocess.Popen(
        [sys.executable, "-c", FILL, folder, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def held_of_200(folder: Path) -> list[int]:
    """Return which images a cache holds, having compared each to what it ought to be."""
    settings = ImageSettings((64, 64), 3)
    with FileCache(folder).open(numbered(200), settings) as rows:
        held = got(rows, range(200), settings)
        for index, image in held.items():
            np.testing.assert_array_equal(image, pixels_of(index, settings.shape))
        return [*held]


def test_whenever_a_process_that_fills_it_is_killed_every_image_it_still_holds_is_right(tmp_path: Path) -> None:
    moments = random.Random(0)
    for kill in range(10):
        folder = tmp_path / str(kill)
        chunks = moments.randrange(38)
        with start_filling(folder, kill) as process:
            begin(process)
            assert process.stdout is not None
            for _ in range(chunks):
                process.stdout.readline()
            process.kill()
        held = held_of_200(folder)
        assert len(held) >= 5 * chunks
    fill(FileCache(folder), 200, ImageSettings((64, 64), 3))
    assert len(held_of_200(folder)) == 200


def test_two_processes_that_fill_it_at_once_share_one_file(tmp_path: Path) -> None:
    with start_filling(tmp_path, 1) as one, start_filling(tmp_path, 2) as other:
        begin(one)
        begin(other)
        assert [one.communicate()[0].count("\n"), other.communicate()[0].count("\n")] == [40, 40]
    assert len(held_of_200(tmp_path)) == 200
    assert len([*tmp_path.iterdir()]) == 1


def test_a_row_that_another_process_puts_is_found_without_opening_again(tmp_path: Path) -> None:
    settings = ImageSettings((64, 64), 3)
    with FileCache(tmp_path).open(numbered(200), settings) as rows:
        assert got(rows, range(200), settings) == {}
        with start_filling(tmp_path, 1) as process:
            begin(process)
            process.communicate()
        assert len(got(rows, range(200), settings)) == 200
