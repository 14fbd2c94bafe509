from __future__ import annotations

import asyncio
import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from blockbuster import BlockBuster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asynctrain.data.tar import CompressedTarShards, TarShards
from asynctrain.errors import ClosedError, DataError, ReadError

pytestmark = pytest.mark.one_loop

Member = tuple[str, bytes | str]


def packed(path: Path, members: Sequence[Member], compress: Callable[[bytes], bytes] = bytes) -> Path:
    """Write a tar by the standard library."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            raw = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    path.write_bytes(compress(content.getvalue()))
    return path


def contents(shards: TarShards) -> list[tuple[str, object, str]]:
    """Return of each record the name within its tar, the content, and the class."""
    records = [shards[i] for i in range(len(shards))]
    return [(Path(str(r.source)).name, r.source.read(), shards.classes[r.label]) for r in records]


WEBDATASET: list[Member] = [
    ("a/0.1.jpg", b"zero"),  # the key ends at the first dot
    ("a/0.cls", "tulip\n"),
    ("a/1.cls", "rose"),
    ("a/1.txt", "what the photo shows"),
    ("a/1.PNG", b"one"),
]


def test_the_webdataset_layout_is_understood_in_any_order_of_a_samples_members(tmp_path: Path) -> None:
    shards = TarShards(packed(tmp_path / "a.tar", WEBDATASET))
    assert contents(shards) == [("0.1.jpg", b"zero", "tulip"), ("1.PNG", b"one", "rose")]
    assert shards.classes == ("rose", "tulip")
    assert shards.labels.tolist() == [1, 0]
    assert str(shards[0].source) == f"{tmp_path}/a.tar/a/0.1.jpg"


def test_labels_may_be_in_json_and_a_cls_counts_more(tmp_path: Path) -> None:
    members: list[Member] = [
        ("0.json", '{"label": 10, "width": 3}'),
        ("0.jpg", b"0"),
        ("1.json", '{"label": 3}'),
        ("1.cls", "9"),
        ("1.jpg", b"1"),
        ("2.cls", "9"),
        ("2.json", "[]"),
        ("2.jpg", b"2"),
    ]
    assert [label for *_, label in contents(TarShards(packed(tmp_path / "a.tar", members)))] == ["10", "9", "9"]


def test_without_labels_the_folder_of_an_image_is_its_class(tmp_path: Path) -> None:
    one = packed(tmp_path / "1.tar", [("./f/rose/x.1.jpg", b"1"), ("./f/rose/x.2.jpg", b"2"), ("./f/notes.txt", "")])
    two = packed(tmp_path / "2.tar", [("tulip/._x.jpg", b"mac"), ("tulip/.thumbs/y.png", b""), ("tulip/x.jpg", b"3")])
    shards = TarShards([one, two])
    assert contents(shards) == [("x.1.jpg", b"1", "rose"), ("x.2.jpg", b"2", "rose"), ("x.jpg", b"3", "tulip")]


def test_a_pattern_stands_for_the_shards_it_matches_sorted(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        packed(tmp_path / f"s-{number}.tar", [(f"k/{number}.png", str(number))])
    assert [content for _, content, _ in contents(TarShards(f"{tmp_path}/s-*.tar"))] == [b"0", b"1", b"2"]
    assert TarShards(tmp_path / "s-1.tar").shards == (f"{tmp_path}/s-1.tar",)
    with pytest.raises(DataError, match=r"t-\*\.tar: matches no file"):
        TarShards(f"{tmp_path}/t-*.tar")
    with pytest.raises(ValueError, match="shards must be one or more paths, got none"):
        TarShards([])


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_is_read_with_long_names_and_odd_characters(tmp_path: Path, layout: int) -> None:
    folder = "f" * 90
    name = f"{folder}/rosé/{'n' * 60}.png" if layout != tarfile.USTAR_FORMAT else f"{folder}/rose/{'n' * 60}.png"
    with tarfile.open(tmp_path / "a.tar", "w", format=layout) as tar:
        info = tarfile.TarInfo(name)
        info.size = 700
        tar.addfile(info, io.BytesIO(b"x" * 700))
    assert [content for _, content, _ in contents(TarShards(tmp_path / "a.tar"))] == [b"x" * 700]
    assert str(TarShards(tmp_path / "a.tar")[0].source) == f"{tmp_path}/a.tar/{name}"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(images=st.lists(st.binary(max_size=1500), min_size=1, max_size=12))
def test_every_image_is_found_whole_where_the_index_says(tmp_path: Path, images: list[bytes]) -> None:
    path = packed(tmp_path / "a.tar", [(f"k/{i}.jpg", image) for i, image in enumerate(images)])
    shards = TarShards(path)
    assert [content for _, content, _ in contents(shards)] == images
    assert [shards[i - len(images)].source.read() for i in range(len(images))] == images


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    images = [bytes([i]) * (i * 37) for i in range(200)]
    shards = TarShards(packed(tmp_path / "a.tar", [(f"k/{i}.jpg", image) for i, image in enumerate(images)]))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: shards[i % 200].source.read(), range(2000))) == images * 10


def test_what_happened_to_a_shard_since_is_told(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar", [("k/0.jpg", b"x" * 1000)])
    source = TarShards(path)[0].source
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ReadError, match=r"a\.tar/k/0\.jpg: cannot be read: the tar has become shorter"):
        source.read()
    path.unlink()
    with pytest.raises(ReadError, match="No such file"):
        source.read()


def test_an_images_identity_changes_with_its_tar_and_its_place(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar", [("k/0.jpg", b"0"), ("k/1.jpg", b"1")])
    sources = [TarShards(path)[i].source for i in (0, 0, 1)]
    first, again, second = (source.identity() for source in sources)  # type: ignore[attr-defined]
    assert first == again != second
    packed(path, [("k/0.jpg", b"0")] * 30)
    assert sources[0].identity() != first  # type: ignore[attr-defined]
    path.unlink()
    assert sources[0].identity() is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("members", "place", "reason"),
    [
        ([], "", "holds no image"),
        ([("a/0.txt", "")], "", "holds no image"),
        ([("0.jpg", "")], "/0.jpg", "has no label: no .cls, no .json, and it lies in no folder"),
        ([*WEBDATASET, ("a/2.jpg", "")], "/a/2.jpg", "has no label: no .cls, no .json"),
        ([*WEBDATASET, ("a/0.png", "")], "/a/0.png", "shares its label with another image"),
        ([*WEBDATASET, ("a/2.cls", "rose")], "/a/2", "has a label but no image"),
        ([("0.jpg", ""), ("0.cls", " ")], "/0.cls", "is no label: the label must be a name or an integer"),
        ([("0.jpg", ""), ("0.cls", b"\xff")], "/0.cls", "is no label: "),
        ([("0.jpg", ""), ("0.json", '{"label": 0.5}')], "/0.json", "is no label: the label must be"),
        ([("0.jpg", ""), ("0.json", "{")], "/0.json", "is no label: "),
    ],
)
def test_what_is_wrong_in_a_shard_is_told_with_its_member(
    tmp_path: Path, members: list[Member], place: str, reason: str
) -> None:
    path = packed(tmp_path / "a.tar", members)
    with pytest.raises(DataError) as caught:
        TarShards(path)
    assert str(caught.value).startswith(f"{path}{place}: {reason}")


def test_shards_with_and_without_labels_do_not_mix(tmp_path: Path) -> None:
    labelled, unlabelled = packed(tmp_path / "a.tar", WEBDATASET), packed(tmp_path / "b.tar", [("k/0.jpg", "")])
    with pytest.raises(DataError, match=r"b\.tar/k/0\.jpg: has no label"):
        TarShards([labelled, unlabelled])
    with pytest.raises(DataError, match=r"a\.tar: has labels .* though the shards before it have none"):
        TarShards([unlabelled, labelled])


def test_given_classes_are_kept_and_others_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar", WEBDATASET)
    assert TarShards(path, classes=["tulip", "aster", "rose"]).labels.tolist() == [0, 2]
    with pytest.raises(DataError, match=r"a\.tar/a/1\.PNG: the label must be one of tulip, got rose"):
        TarShards(path, classes=["tulip"])


def test_an_image_that_is_a_link_is_told_not_lost(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("k/0.jpg")
        info.type, info.linkname = tarfile.LNKTYPE, "k/1.jpg"
        tar.addfile(info)
    with pytest.raises(DataError, match=r"a\.tar/k/0\.jpg: is a link or has holes"):
        TarShards(tmp_path / "a.tar")


IMAGES: list[Member] = [(f"k/{i}.jpg", bytes([i + 1]) * 3000) for i in range(9)]


@pytest.mark.parametrize("cut", [0, 100, 512, 700, 3584, 5000, 4096 * 5, 9 * 3584])
def test_a_tar_that_is_cut_off_anywhere_is_told(tmp_path: Path, cut: int) -> None:
    path = packed(tmp_path / "a.tar", IMAGES)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a\.tar: cannot be read as a tar: ") as caught:
        TarShards(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("member", range(9))
def test_a_broken_header_is_told_and_does_not_end_the_tar_silently(tmp_path: Path, member: int) -> None:
    path = packed(tmp_path / "a.tar", IMAGES)
    raw = bytearray(path.read_bytes())
    raw[member * 3584 + 3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.tar: cannot be read as a tar: "):
        TarShards(path)


def test_tars_put_together_by_cat_are_told(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar", IMAGES)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(DataError, match="something follows its end"):
        TarShards(path)


def test_a_missing_shard_is_told(tmp_path: Path) -> None:
    for kind in (TarShards, CompressedTarShards):
        with pytest.raises(DataError, match=r"gone\.tar: no such file"):
            kind(tmp_path / "gone.tar")


def test_each_kind_of_tar_says_which_class_it_is_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.tar: is compressed: .* CompressedTarShards"):
        TarShards(packed(tmp_path / "a.tar", IMAGES, gzip.compress))
    with pytest.raises(DataError, match=r"b\.tar: is not compressed .* TarShards"):
        CompressedTarShards(packed(tmp_path / "b.tar", IMAGES))


COMPRESSORS = pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])


@pytest.fixture
def three_shards(tmp_path: Path) -> list[Path]:
    """Return shards of 7, 10 and 3 images; an image's content is its number, and its class that number modulo 3."""
    sizes, numbers = (7, 10, 3), iter(range(20))
    return [
        packed(
            tmp_path / f"{shard}.tar.gz",
            [member for i in (next(numbers) for _ in range(size)) for member in sample(i)],
            gzip.compress,
        )
        for shard, size in enumerate(sizes)
    ]


def sample(number: int) -> list[Member]:
    return [(f"{number}.cls", str(number % 3)), (f"{number}.jpg", str(number))]


async def numbers(shards: CompressedTarShards, epoch: int = 0, position: int = 0) -> list[int]:
    """Return what the stream delivers, with each label held against its content."""
    found = []
    async with shards.open(epoch, position) as records:
        async for record in records:
            content = record.source.read()
            assert isinstance(content, bytes)
            found.append(int(content))
            assert record.label == found[-1] % 3
            assert str(record.source).endswith(f"/{found[-1]}.jpg")
    return found


async def test_a_compressed_tar_gives_every_record_once_an_epoch(three_shards: list[Path]) -> None:
    shards = CompressedTarShards(three_shards, buffer=4)
    assert shards.length == 20
    assert shards.classes == ("0", "1", "2")
    assert shards.replayable
    epochs = [await numbers(shards, epoch) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[1] == await numbers(CompressedTarShards(three_shards, buffer=4), 1)
    assert epochs[1] != await numbers(CompressedTarShards(three_shards, buffer=4, seed=1), 1)


@pytest.mark.parametrize(("shuffle", "buffer"), [(True, 1), (True, 4), (True, 5), (True, 100), (False, 3)])
async def test_a_compressed_tar_goes_on_exactly_at_any_position(
    three_shards: list[Path], shuffle: bool, buffer: int
) -> None:
    shards = CompressedTarShards(three_shards, shuffle=shuffle, buffer=buffer)
    whole = await numbers(shards, 1)
    for position in range(21):
        assert await numbers(shards, 1, position) == whole[position:]
    if not shuffle:
        assert whole == list(range(20))


async def test_shuffling_moves_records_within_blocks_only_so_memory_is_bounded(three_shards: list[Path]) -> None:
    shards = CompressedTarShards(three_shards[:1] * 3, buffer=7)
    whole = await numbers(shards, 0)
    blocks = [whole[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(block) == list(range(7)) for block in blocks)
    assert len({tuple(block) for block in blocks}) > 1


@COMPRESSORS
async def test_all_compressions_are_read(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = packed(tmp_path / "a", [member for i in range(5) for member in sample(i)], compress)
    assert await numbers(CompressedTarShards(path, shuffle=False)) == list(range(5))


@COMPRESSORS
def test_a_compressed_tar_that_is_cut_off_or_broken_is_told(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    rng = np.random.default_rng(0)
    path = packed(tmp_path / "a", [(f"k/{i}.jpg", rng.bytes(5000)) for i in range(10)], compress)
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 255
    for content in (whole[:-3], whole[: len(whole) // 2], whole[:20], bytes(broken)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a: cannot be read as a tar: ."):
            CompressedTarShards(path)


@pytest.mark.parametrize("images", [2, 3, 5])
async def test_a_shard_that_changed_since_is_told(tmp_path: Path, images: int) -> None:
    path = packed(tmp_path / "a.tar.gz", [member for i in range(4) for member in sample(i)], gzip.compress)
    shards = CompressedTarShards(path, shuffle=False, buffer=2)
    packed(path, [member for i in range(images) for member in sample(i)], gzip.compress)
    with pytest.raises(DataError, match=rf"a\.tar\.gz: has changed: it held 4 images .* now {images}"):
        await numbers(shards)


async def test_an_error_of_a_stream_is_told_to_whoever_asks_again(three_shards: list[Path]) -> None:
    shards = CompressedTarShards(three_shards, shuffle=False, buffer=4)
    three_shards[1].unlink()
    async with shards.open(0, 0) as records:
        assert [int(bytes((await anext(records)).source.read())) for _ in range(4)] == [0, 1, 2, 3]
        for _ in range(2):
            with pytest.raises(DataError, match=r"1\.tar\.gz: no such file"):
                await anext(records)


async def test_a_stream_can_be_left_at_any_moment_and_is_closed_then(three_shards: list[Path]) -> None:
    shards = CompressedTarShards(three_shards, buffer=4)
    for taken in (0, 1, 4, 5):
        async with shards.open(0, 0) as records:
            for _ in range(taken):
                await anext(records)
        with pytest.raises(ClosedError, match="after their block had ended"):
            await anext(records)


async def test_a_cancelled_wait_loses_no_record(three_shards: list[Path]) -> None:
    shards = CompressedTarShards(three_shards, shuffle=False, buffer=20)
    async with shards.open(0, 0) as records:
        waiting = asyncio.ensure_future(anext(records))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert int(bytes((await anext(records)).source.read())) == 0


async def test_streaming_does_not_block_the_loop(three_shards: list[Path], no_blocking_calls: BlockBuster) -> None:
    # the sizes and labels are known beforehand, in a thread as a program would do it
    shards = await asyncio.to_thread(CompressedTarShards, three_shards, buffer=4)
    assert len(await numbers(shards)) == 20


def test_wrong_arguments_are_told(three_shards: list[Path]) -> None:
    with pytest.raises(ValueError, match="buffer must be 1 or more, got 0"):
        CompressedTarShards(three_shards, buffer=0)
    shards = CompressedTarShards(three_shards)
    for epoch, position in [(-1, 0), (0, -1), (0, 21)]:
        with pytest.raises(ValueError, match=f"position 0 to 20, got epoch {epoch}, position {position}"):
            shards.open(epoch, position)
