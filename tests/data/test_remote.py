from __future__ import annotations

import asyncio
import builtins
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from blockbuster import BlockBuster

from asynctrain.data import Subset
from asynctrain.data.fetching import Connections, is_async
from asynctrain.data.remote import RemoteImages
from asynctrain.errors import DataError, ReadError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[str]:
    """Serve HTTP on 127.0.0.1 and yield the address."""
    application = web.Application()
    application.router.add_get("/{name:.*}", handler)
    server = TestServer(application, shutdown_timeout=0)
    await server.start_server()
    try:
        yield str(server.make_url("/"))
    finally:
        await server.close()


async def fetched(images: RemoteImages | Subset) -> list[bytes]:
    """Read all images at once, over one connection."""
    async with Connections() as connections:
        sources = [images[i].source for i in range(len(images))]
        return await asyncio.gather(*(connections.fetch(source) for source in sources if is_async(source)))


async def name_of(request: web.Request) -> web.Response:
    return web.Response(body=request.path.encode())


async def test_images_are_fetched_from_a_server_without_blocking_the_loop(no_blocking_calls: BlockBuster) -> None:
    async with served(name_of) as address:
        images = RemoteImages([f"{address}{number}.png" for number in range(50)], [number % 3 for number in range(50)])
        assert await fetched(images) == [f"/{number}.png".encode() for number in range(50)]
    assert images.classes == ("0", "1", "2")
    assert images.labels.tolist()[:4] == [0, 1, 2, 0]
    assert str(images[-1].source) == f"{address}49.png"


async def test_as_many_reads_as_permitted_are_under_way_and_no_more() -> None:
    together, under_way, most = asyncio.Barrier(4), 0, 0

    async def held(request: web.Request) -> web.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await together.wait()  # nobody gets an answer before four have asked
        under_way -= 1
        return web.Response(body=b"content")

    async with served(held) as address:
        images = RemoteImages([f"{address}{n}.png" for n in range(20)], [0] * 20, in_flight=4)
        assert images.in_flight == images.split(0.5)[0].in_flight == 4
        assert await fetched(images) == [b"content"] * 20
    assert most == 4


class Flaky:
    """Answers with each status in turn, and then with the content."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.requests = 0

    async def answer(self, request: web.Request) -> web.Response:
        self.requests += 1
        if self.statuses:
            return web.Response(status=self.statuses.pop(0))
        return web.Response(body=b"content")


async def test_what_may_pass_is_tried_again() -> None:
    flaky = Flaky(503, 429, 500)
    async with served(flaky.answer) as address:
        assert await fetched(RemoteImages([f"{address}a.png"], [0], backoff=0)) == [b"content"]
    assert flaky.requests == 4


@pytest.mark.parametrize(
    ("statuses", "requests", "reason"),
    [
        ((404,), 1, r"cannot be read: FileNotFoundError: "),
        ((403,), 1, r"cannot be read: ClientResponseError: 403"),
        ((500, 500, 502), 3, r"cannot be read, tried 3 times: ClientResponseError: 502"),
    ],
)
async def test_what_does_not_pass_is_told_with_the_url_and_the_last_cause(
    statuses: tuple[int, ...], requests: int, reason: str
) -> None:
    flaky = Flaky(*statuses)
    async with served(flaky.answer) as address:
        with pytest.raises(ReadError, match=reason) as caught:
            await fetched(RemoteImages([f"{address}a.png"], [0], backoff=0, retries=2))
    assert caught.value.path == f"{address}a.png"
    assert flaky.requests == requests


async def silence(request: web.Request) -> web.Response:
    await asyncio.Event().wait()
    raise AssertionError


async def cut_off(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b"half")
    assert request.transport is not None
    request.transport.close()
    return response


@pytest.mark.parametrize(
    ("handler", "reason"),
    [(silence, r"tried 2 times: no answer within 0\.1 s"), (cut_off, "tried 2 times: Client.*Error: ")],
)
async def test_a_server_that_never_answers_or_hangs_up_is_told(handler: Handler, reason: str) -> None:
    async with served(handler) as address:
        with pytest.raises(ReadError, match=reason):
            await fetched(RemoteImages([f"{address}a.png"], [0], timeout=0.1, retries=1, backoff=0))


async def test_no_server_at_all_is_told() -> None:
    async with served(name_of) as address:
        pass
    with pytest.raises(ReadError, match="tried 2 times: ClientConnectorError: "):
        await fetched(RemoteImages([f"{address}a.png"], [0], retries=1, backoff=0))


async def test_cancelling_leaves_nothing_open() -> None:
    asked = asyncio.Event()

    async def held(request: web.Request) -> web.Response:
        asked.set()
        return await silence(request)

    async with served(held) as address:
        reading = asyncio.ensure_future(fetched(RemoteImages([f"{address}{n}.png" for n in range(9)], [0] * 9)))
        await asked.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading


async def test_one_connection_serves_all_reads_and_a_lone_read_brings_its_own() -> None:
    peers = []

    async def peer(request: web.Request) -> web.Response:
        assert request.transport is not None
        peers.append(request.transport.get_extra_info("peername"))
        return web.Response(body=b"content")

    async with served(peer) as address:
        images = RemoteImages([f"{address}{n}.png" for n in range(3)], [0] * 3)
        async with Connections() as connections:
            for n in range(3):
                source = images[n].source
                assert is_async(source)
                await connections.fetch(source)
        assert len(set(peers)) == 1
        assert is_async(source)
        assert await source.fetch() == b"content"
        assert len(set(peers)) == 2


async def test_a_thread_can_read_without_a_loop() -> None:
    async with served(name_of) as address:
        source = RemoteImages([f"{address}a.png"], [0])[0].source
        assert await asyncio.to_thread(source.read) == b"/a.png"


@pytest.fixture
def memory() -> Iterator[Any]:
    """Return fsspec's filesystem in memory, which is a synchronous one."""
    filesystem = fsspec.filesystem("memory")
    for name in ("rose/b.png", "rose/a.jpg", "tulip/spring/c.png", "tulip/notes.txt", "tulip/.hidden.png"):
        filesystem.pipe(f"/flowers/{name}", name.encode())
    yield filesystem
    filesystem.rm("/flowers", recursive=True)


@pytest.mark.usefixtures("memory")
async def test_a_pattern_finds_the_images_of_a_filesystem_and_their_folders_are_their_classes() -> None:
    images = await RemoteImages.glob("memory://flowers/**")
    found = [(str(images[i].source), images.classes[images[i].label]) for i in range(len(images))]
    assert found == [
        ("memory:///flowers/rose/a.jpg", "rose"),
        ("memory:///flowers/rose/b.png", "rose"),
        ("memory:///flowers/tulip/spring/c.png", "spring"),
    ]
    assert await fetched(images) == [b"rose/a.jpg", b"rose/b.png", b"tulip/spring/c.png"]
    some = await RemoteImages.glob("memory://flowers/rose/*.png", classes=["tulip", "rose"], in_flight=2)
    assert (some.labels.tolist(), some.in_flight) == ([1], 2)
    with pytest.raises(DataError, match=r"memory://flowers/\*\.png: matches no image"):
        await RemoteImages.glob("memory://flowers/*.png")


async def test_a_listing_that_fails_or_never_ends_is_told(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = threading.Event()

    def stuck(self: object, path: str) -> list[str]:
        ending.wait()
        return []

    monkeypatch.setattr(type(memory), "glob", stuck)
    monkeypatch.setattr("asynctrain.data.remote.GRACE", 0.05)
    with pytest.raises(DataError, match=r"memory://flowers/\*: could not be listed within 0\.05 s"):
        await RemoteImages.glob("memory://flowers/*", listing=0.05)
    ending.set()
    async with served(Flaky(500).answer) as address:
        with pytest.raises(DataError, match="cannot be listed: ClientResponseError: 500"):
            await RemoteImages.glob(f"{address}*.png")


async def test_a_server_can_be_listed_by_the_links_on_its_page() -> None:
    async def page(request: web.Request) -> web.Response:
        links = '<a href="rose/">roses</a>' if request.path == "/flowers/" else '<a href="a.png">a</a>'
        return web.Response(text=links, content_type="text/html")

    async with served(page) as address:
        images = await RemoteImages.glob(f"{address}flowers/rose/*.png")
    assert [str(image.source) for image in images] == [f"{address}flowers/rose/a.png"]  # type: ignore[attr-defined]
    assert images.classes == ("rose",)


async def test_a_missing_file_of_a_synchronous_filesystem_is_told_at_once(memory: Any) -> None:
    with pytest.raises(ReadError, match=r"^memory://flowers/gone\.png: cannot be read: FileNotFoundError"):
        await fetched(RemoteImages(["memory://flowers/gone.png"], [0]))


async def test_a_synchronous_call_that_never_returns_ends_by_the_deadline_and_in_a_daemon(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending, stuck_in = threading.Event(), []

    def stuck(self: object, path: str) -> bytes:
        stuck_in.append(threading.current_thread())
        ending.wait()
        return b""

    monkeypatch.setattr(type(memory), "cat_file", stuck)
    monkeypatch.setattr("asynctrain.data.remote.GRACE", 0.05)
    with pytest.raises(ReadError, match=r"tried 2 times: no answer within 0\.05 s"):
        await fetched(RemoteImages(["memory://flowers/rose/a.jpg"], [0], timeout=0.05, retries=1, backoff=0))
    assert [thread.daemon for thread in stuck_in] == [True, True]
    ending.set()
    for thread in stuck_in:
        await asyncio.to_thread(thread.join)


async def test_a_cancelled_synchronous_call_is_waited_for(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ending, returned = threading.Event(), threading.Event(), threading.Event()

    def slow(self: object, path: str) -> bytes:
        begun.set()
        ending.wait()
        returned.set()
        raise OSError("nobody hears of this")

    monkeypatch.setattr(type(memory), "cat_file", slow)
    monkeypatch.setattr("asynctrain.data.remote.GRACE", 60)
    reading = asyncio.ensure_future(fetched(RemoteImages(["memory://flowers/rose/a.jpg"], [0])))
    await asyncio.to_thread(begun.wait)
    reading.cancel()
    await asyncio.sleep(0)
    ending.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert returned.is_set()


@pytest.mark.parametrize(
    ("urls", "labels", "settings", "message"),
    [
        ([], [], {}, "urls must be one or more like https://host/a.jpg or s3://bucket/a.jpg, got none"),
        (["memory://a", "b.jpg"], [0, 0], {}, r"urls must be .*, got b\.jpg"),
        (["memory://a", "http://b"], [0, 0], {}, "urls must all be of one filesystem, got http, memory"),
        (["nosuch://a"], [0], {}, "nosuch"),
        (["memory://a"], [0, 1], {}, "labels must be as many as urls, 1, got 2"),
        (["memory://a"], [0.5], {}, "the label must be a name or an integer, got 0.5"),
        (["memory://a"], ["b"], {"classes": ["a"]}, "the label must be one of a, got b"),
        (["memory://a"], [0], {"in_flight": 0}, "in_flight must be 1 or more, got 0"),
        (["memory://a"], [0], {"timeout": 0}, "timeout must be more than 0 seconds, got 0"),
    ],
)
def test_wrong_arguments_are_told(urls: list[str], labels: list[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RemoteImages(urls, labels, **settings)


def test_a_missing_library_is_told_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "fsspec":
            raise ModuleNotFoundError("No module named 'fsspec'", name="fsspec")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"memory:// needs .* pip install \"asynctrain\[remote\]\""):
        RemoteImages(["memory://a"], [0])
