"""Images behind a network: whatever fsspec can read, many reads in flight."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from operator import index as as_index
from posixpath import basename, dirname
from types import TracebackType
from typing import Any, TypeVar, TypeVarTuple

from asynctrain.arena import Array
from asynctrain.data.catalog import Labels, Names
from asynctrain.data.datasets import SUFFIXES, Splitting, is_image
from asynctrain.data.fetching import Patience
from asynctrain.errors import DataError
from asynctrain.types import Record

R = TypeVar("R")
Ts = TypeVarTuple("Ts")

GRACE = 0.5  # seconds in which a call in a thread that nobody waits for any more should end


@dataclass(frozen=True, slots=True)
class RemoteSource:
    """An image at a URL."""

    url: str
    connection: Connection

    async def fetch(self) -> bytes:
        """Return the file's bytes; waits its turn, then tries as long as the dataset's settings say.

        Raises:
            ReadError: with the URL; what the last try raised is its cause.
        """
        return await self.connection.read(self.url)

    def read(self) -> bytes:
        """Return the same from a thread without a loop, on a connection of its own. Blocks; raises ``ReadError``."""
        return asyncio.run(self.fetch())

    def __str__(self) -> str:
        return self.url


class RemoteImages(Splitting):
    """Images behind URLs, all of one filesystem that fsspec knows: ``https://``, ``s3://``, ``gs://``, ``memory://``.

        data = RemoteImages(urls, labels)                                 # or, where files can be listed:
        data = await RemoteImages.glob("s3://bucket/flowers/*/*.jpg")

    They are read on the event loop if the filesystem is asynchronous, else each in a thread of its own. A read that is
    late, or fails in a way that may pass (network trouble, HTTP status 408, 429 or 5xx), is tried again after a pause;
    what will not pass (no such file, no permission, another status) fails at once.

    Args:
        urls: one for each image.
        labels: one for each image, names or integers.
        classes: the names of the labels 0, 1, ...; by default those that occur, sorted, as numbers if all of them are.
        in_flight: how many reads may be under way at once, in each event loop, 1 or more.
        timeout: seconds, positive; the deadline of each try.
        retries: further tries after the first, 0 or more.
        backoff: seconds, 0 or more: the first pause, the next ones being twice as long each, up to 10 s, all shortened
            by up to a half, differently for each URL.
        options: what fsspec is given to open the filesystem (``{"anon": True}``).

    Raises:
        ValueError: ``urls`` is empty, of several filesystems or of an unknown one, there are more or fewer ``labels``,
            a label is neither name nor integer or not in ``classes``, or a number is out of range.
        ImportError: fsspec, or what it needs for this filesystem, is not installed.
    """

    def __init__(
        self,
        urls: Sequence[str],
        labels: Sequence[str | int] | Array,
        classes: Sequence[str] | None = None,
        *,
        in_flight: int = 32,
        timeout: float = 30.0,
        retries: int = 3,
        backoff: float = 0.1,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if len(urls) != len(labels):
            raise ValueError(f"labels must be as many as urls, {len(urls)}, got {len(labels)}")
        patience = Patience(timeout, retries, backoff)
        self._connection = Connection(_filesystem(urls), options or {}, in_flight, patience)
        self.in_flight = in_flight
        self._urls = Names(urls)
        encoded = Labels(classes)
        for label in labels:
            encoded.append(label)
        self.classes: tuple[str, ...]
        self.labels: Array
        self.classes, self.labels = encoded.encoded()

    @classmethod
    async def glob(cls, pattern: str, *, listing: float = 300.0, **settings: Any) -> RemoteImages:
        """Return the images whose URLs match, sorted; the folder that an image lies in is its class.

        Args:
            pattern: a URL with ``*``, ``**``, ``?`` or ``[...]``, as fsspec understands them.
            listing: seconds, positive; the deadline of the search.
            settings: ``classes``, ``in_flight``, ``timeout``, ... as above.

        Raises:
            DataError: nothing matches, or not within ``listing``, or the filesystem cannot be listed.
        """
        connection = Connection(_filesystem([pattern]), settings.get("options") or {}, 1, Patience(timeout=listing))
        urls = [url for url in await connection.find(pattern) if is_image(basename(url))]
        if not urls:
            raise DataError(pattern, f"matches no image ({', '.join(sorted(SUFFIXES))})")
        return cls(urls, [basename(dirname(url)) for url in urls], **settings)

    def __len__(self) -> int:
        return len(self._urls)

    def __getitem__(self, index: int, /) -> Record:
        index = range(len(self))[as_index(index)]
        return Record(RemoteSource(self._urls[index], self._connection), int(self.labels[index]))

    def __repr__(self) -> str:
        return f"<RemoteImages {self._urls[0]}, ...: {len(self):,} images, {len(self.classes)} classes>"


class Connection:
    """What the sources of one dataset share: in each event loop a filesystem with its session, and a bound.

    It is open while anybody reads, or holds it open by ``async with``; the last one out closes it.

    Args:
        filesystem: a class of fsspec's.
        options: what it is created with.
        in_flight: how many reads may be under way at once, 1 or more.
        patience: of each read.
    """

    def __init__(self, filesystem: Any, options: Mapping[str, Any], in_flight: int, patience: Patience) -> None:
        if in_flight < 1:
            raise ValueError(f"in_flight must be 1 or more, got {in_flight}")
        self._filesystem = filesystem
        self._options = dict(options)
        self._in_flight = in_flight
        self._patience = patience
        self._shared: dict[asyncio.AbstractEventLoop, _Shared] = {}

    async def read(self, url: str) -> bytes:
        """Return the bytes of the file at ``url``; raises ``ReadError``."""
        async with self as shared:

            async def attempt() -> bytes:
                filesystem = await shared.opened(self._open)
                if filesystem.async_impl:
                    return bytes(await filesystem._cat_file(filesystem._strip_protocol(url)))
                return bytes(await _in_thread(filesystem.cat_file, url))

            return await self._patience.read(attempt, url, _may_pass, shared.places)

    async def find(self, pattern: str) -> list[str]:
        """Return the URLs that match, sorted; raises ``DataError``."""
        try:
            async with self as shared, asyncio.timeout(self._patience.timeout):
                filesystem = await shared.opened(self._open)
                path = filesystem._strip_protocol(pattern)
                found = await (filesystem._glob(path) if filesystem.async_impl else _in_thread(filesystem.glob, path))
        except TimeoutError as error:
            raise DataError(pattern, f"could not be listed within {self._patience.timeout:g} s") from error
        except Exception as error:
            raise DataError(pattern, f"cannot be listed: {type(error).__name__}: {error}") from error
        return sorted(filesystem.unstrip_protocol(name) for name in found)

    async def _open(self) -> tuple[Any, Any]:
        """Return a filesystem for this loop, and its session if it knows such."""
        if not self._filesystem.async_impl:
            return await _in_thread(lambda: self._filesystem(**self._options)), None
        filesystem = self._filesystem(asynchronous=True, skip_instance_cache=True, **self._options)
        return filesystem, await filesystem.set_session() if hasattr(filesystem, "set_session") else None

    async def __aenter__(self) -> _Shared:
        loop = asyncio.get_running_loop()
        shared = self._shared.get(loop)
        if shared is None:
            shared = self._shared[loop] = _Shared(self._in_flight)
        shared.users += 1
        return shared

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        shared = self._shared[loop]
        shared.users -= 1
        if not shared.users:
            del self._shared[loop]
            await shared.close()

    def __repr__(self) -> str:
        return f"<Connection by {self._filesystem.__name__}: {self._in_flight} in flight, {len(self._shared)} open>"


class _Shared:
    """A connection in one event loop.

    Attributes:
        users: how many hold it open.
        places: of the reads under way.
    """

    def __init__(self, in_flight: int) -> None:
        self.users = 0
        self.places = asyncio.Semaphore(in_flight)
        self._filesystem: Any = None
        self._session: Any = None
        self._opening = asyncio.Lock()

    async def opened(self, open_: Callable[[], Awaitable[tuple[Any, Any]]]) -> Any:
        """Return the filesystem, opened by whoever asks first."""
        async with self._opening:
            if self._filesystem is None:
                self._filesystem, self._session = await open_()
        return self._filesystem

    async def close(self) -> None:
        """Close the session, if there is one."""
        if self._session is not None:
            await self._session.close()


def _filesystem(urls: Sequence[str]) -> Any:
    """Return fsspec's class for all of ``urls``."""
    protocols = {url.partition("://")[0] if "://" in url else "" for url in urls}
    if not protocols or "" in protocols:
        wrong = next((url for url in urls if "://" not in url), "none")
        raise ValueError(f"urls must be one or more like https://host/a.jpg or s3://bucket/a.jpg, got {wrong}")
    try:
        import fsspec  # type: ignore[import-untyped]

        classes = {fsspec.get_filesystem_class(protocol) for protocol in sorted(protocols)}
    except ImportError as error:
        raise ImportError(
            f"reading {min(protocols)}:// needs more than is installed ({error}); fsspec and aiohttp come with "
            'pip install "asynctrain[remote]"'
        ) from error
    if len(classes) > 1:
        raise ValueError(f"urls must all be of one filesystem, got {', '.join(sorted(protocols))}")
    return classes.pop()


def _may_pass(error: Exception) -> bool:
    """Whether it makes sense to try again."""
    status = getattr(error, "status", None)  # aiohttp's errors, among others, have that of HTTP
    if isinstance(status, int) and 400 <= status < 600:
        return status in (408, 429) or status >= 500
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)):
        return False
    aiohttp = sys.modules.get("aiohttp")  # whose errors are not all OSError; where one was raised, it is imported
    return isinstance(error, OSError) or (aiohttp is not None and isinstance(error, aiohttp.ClientError))


async def _in_thread(function: Callable[[*Ts], R], *args: *Ts) -> R:
    """Return ``function(*args)``, run in a thread of its own.

    When cancelled, it waits ``GRACE`` seconds for the thread and then leaves it behind: a call that never returns can
    neither be stopped nor waited for. The thread is a daemon, so that it does not hold up the end of the program.
    """
    promise: Future[R] = Future()
    promise.set_running_or_notify_cancel()  # so that the asyncio side cannot cancel it

    def run() -> None:
        try:
            promise.set_result(function(*args))
        except BaseException as error:
            promise.set_exception(error)

    threading.Thread(target=run, name="asynctrain-remote", daemon=True).start()
    outcome = asyncio.wrap_future(promise)
    try:
        await asyncio.wait([outcome])
    except asyncio.CancelledError:
        await asyncio.wait([outcome], timeout=GRACE)
        if not outcome.cancel():
            outcome.exception()  # nobody wants it; asking keeps asyncio from logging that nobody asked
        raise
    return outcome.result()
