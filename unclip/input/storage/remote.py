"""Byte ranges of objects in a store, through fsspec: retried, bounded in time, cached by block.

A store may fail for moments, cut answers short or stall, and a proxy in front of it may ignore the
requested range; every such answer is recognised and the request is repeated, with growing pauses
and a time limit. The result is what the store holds, or an error.
"""

import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from unclip.errors import ConfigError, DataError
from unclip.input.storage import blocks
from unclip.input.storage.address import COUNTERS, PROTOCOLS, shown

_PAUSE_SECONDS, _LONGEST_PAUSE = 0.1, 10.0
_CHECK_SECONDS = 60.0
_RETRIED = {408, 425, 429}  # and every status from 500 on: asking again may help
# Names under which fsspec's drivers give the tag of an object's version, the most exact first.
_IDENTITY = (
    "ETag",
    "etag",
    "e_tag",
    "generation",
    "blob_id",
    "content_md5",
    "md5Hash",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "updated",
    "mtime",
    "created",
)


class _RetryableError(OSError):
    """A failure that may pass; `seconds`: how long the store asks to wait before the next try."""

    def __init__(self, message: str, seconds: float = 0.0):
        super().__init__(message)
        self.seconds = seconds


class Objects:
    """The remote half of `storage.Storage`, which documents the options."""

    def __init__(
        self,
        *,
        cache: str,
        cache_bytes: int,
        block_bytes: int,
        attempts: int,
        timeout_seconds: float,
        whole_blocks: bool,
    ):
        self._attempts, self._seconds = attempts, timeout_seconds
        self._cache = blocks.Blocks(cache, cache_bytes) if cache else None
        self._block_bytes, self._whole_blocks = block_bytes, whole_blocks and bool(cache)
        self._shared_calls = blocks.SharedCalls()
        self._lock, self._counts = threading.Lock(), Counter()
        self._drivers: dict[str, tuple[Any, str]] = {}
        self._versions: dict[str, tuple[int, str]] = {}
        self._checked: dict[str, float] = {}

    def counters(self) -> dict[str, int]:
        with self._lock:
            return {name: int(self._counts[name]) for name in COUNTERS}

    def glob(self, pattern: str) -> list[str]:
        """The addresses that match, sorted."""
        if pattern.lower().startswith(("http://", "https://")):
            raise ConfigError(
                f"shards {shown(pattern)!r}: http has no listing to match `*` with; "
                "give a range such as a-{0000..0031}.tar"
            )
        driver, inner = self._driver(pattern)
        found = self._retried(
            f"listing {shown(pattern)}", lambda seconds: _call(driver, "glob", seconds, inner)
        )
        return sorted(map(driver.unstrip_protocol, found))

    def stat(self, address: str) -> tuple[int, str]:
        """(bytes, identity) of an object."""
        driver, inner = self._driver(address)
        what = f"shard {shown(address)!r}: its size"
        if _is_http(driver):
            return self._retried(what, lambda seconds: _http(driver, address, 0, 1, seconds)[1:])
        info = self._retried(what, lambda seconds: _info(driver, inner, seconds))
        if not isinstance(info.get("size"), int) or info.get("type") == "directory":
            raise DataError(f"shard {shown(address)!r} is not an object with a size")
        return info["size"], str(next((info[n] for n in _IDENTITY if info.get(n)), ""))

    def read(self, address: str, offset: int, size: int, expected: tuple[int, str] | None) -> bytes:
        """Exactly `size` bytes at `offset`."""
        version = self._version(address, expected)
        if not 0 <= offset <= offset + size <= version[0]:
            raise DataError(
                f"shard {shown(address)!r} has {version[0]} bytes: {size} bytes at "
                f"{offset} are not there"
            )
        if not size:
            return b""
        if not self._whole_blocks:
            return self._kept(address, version, offset, size) or self._fetch(
                address, version, offset, offset + size
            )
        return b"".join(
            self._block(address, version, *part) for part in _parts(offset, size, self._block_bytes)
        )

    def _version(self, address: str, expected: tuple[int, str] | None) -> tuple[int, str]:
        """(bytes, identity) of the object, asked for once; http repeats it with every answer."""
        known = self._versions.get(address)
        if known is None:
            if expected is not None and _is_http(self._driver(address)[0]):
                known = expected
            else:
                known = self._shared_calls.once(f"stat {address}", lambda: self.stat(address))
            self._versions[address] = known
        if expected is not None:
            _same(address, expected, known)
        return known

    def _kept(self, address: str, version: tuple[int, str], offset: int, size: int) -> bytes:
        """The bytes from blocks that are on disk already; b"" if any of them is not."""
        if self._cache is None:
            return b""
        found = []
        for number, start, stop in _parts(offset, size, self._block_bytes):
            name, _, length = self._place(address, version, number)
            data = self._cache.get(name, start, stop, length)
            if data is None:
                return b""
            found.append(data)
        self._count(cache_hits=len(found))
        return b"".join(found)

    def _block(
        self, address: str, version: tuple[int, str], number: int, start: int, stop: int
    ) -> bytes:
        name, first, length = self._place(address, version, number)
        data = self._cache.get(name, start, stop, length)
        if data is not None:
            self._count(cache_hits=1)
            return data

        def load() -> bytes:
            with self._cache.fetching(name, self._attempts * self._seconds):
                block = self._cache.get(name, 0, length, length)  # another process was faster
                if block is not None:
                    self._count(cache_hits=1)
                    return block
                block = self._fetch(address, version, first, first + length)
                kept = self._cache.put(name, block)
                self._count(cache_misses=1, cache_errors=not kept)
                return block

        return self._shared_calls.once(name, load)[start:stop]

    def _place(self, address: str, version: tuple[int, str], number: int) -> tuple[str, int, int]:
        """(name, offset, bytes) of a block."""
        first = number * self._block_bytes
        name = blocks.block_name(address, version[1], version[0], self._block_bytes, number)
        return name, first, min(self._block_bytes, version[0] - first)

    def _fetch(self, address: str, version: tuple[int, str], start: int, stop: int) -> bytes:
        driver, inner = self._driver(address)

        def once(seconds: float) -> bytes:
            if _is_http(driver):
                data, *found = _http(driver, address, start, stop, seconds)
                _same(address, version, tuple(found))
            else:
                data = bytes(_call(driver, "cat_file", seconds, inner, start=start, end=stop))
            self._count(bytes=len(data))
            if len(data) != stop - start:
                raise _RetryableError(f"{len(data)} of {stop - start} bytes came")
            return data

        data = self._retried(f"shard {shown(address)!r}, bytes {start} to {stop - 1}", once)
        if not _is_http(driver):
            self._check(address, version)
        return data

    def _check(self, address: str, version: tuple[int, str]) -> None:
        """Checks after a read that the object's version has not changed: after every block, and
        once a minute after exact ranges, which cost no more than this check."""
        now = time.monotonic()
        if self._whole_blocks or now - self._checked.get(address, now) > _CHECK_SECONDS:
            _same(address, version, self.stat(address))
            self._checked[address] = now
        self._checked.setdefault(address, now)

    def _retried(self, what: str, once: Callable[[float], Any]) -> Any:
        """Calls `once(seconds)` until it succeeds; DataError with its last error at the end."""
        deadline = time.monotonic() + self._attempts * self._seconds
        tried, cause = 0, None
        while tried < self._attempts and (left := deadline - time.monotonic()) > 0:
            self._count(requests=1, retries=tried > 0)
            tried += 1
            try:
                return once(min(self._seconds, left))
            except (ConfigError, DataError):
                raise
            except (FileNotFoundError, PermissionError) as error:
                reason = "not there" if isinstance(error, FileNotFoundError) else "not allowed"
                raise DataError(f"{what}: {reason}{f' ({error})' if str(error) else ''}") from error
            except Exception as error:  # a driver may raise anything: fsspec promises no types
                cause = error
            if tried < self._attempts:
                # The pause is partly random, so that hosts that failed together do not retry
                # together.
                pause = min(_PAUSE_SECONDS * 2 ** (tried - 1), _LONGEST_PAUSE)
                pause = max(pause * random.uniform(0.5, 1.5), getattr(cause, "seconds", 0.0))
                time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        raise DataError(
            f"{what} could not be read in {tried} attempts; the last: {shown(_words(cause))}"
        ) from cause

    def _driver(self, address: str) -> tuple[Any, str]:
        """(fsspec's file system, the address in the form that it expects)."""
        found = self._drivers.get(address)
        if found is None:
            found = self._drivers[address] = _open(address)
        return found

    def _count(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)


def _open(address: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError as error:
        raise ConfigError("remote shards need fsspec: pip install unclip[data]") from error
    protocol, _, rest = address.partition("://")
    try:
        return fsspec.core.url_to_fs(f"{protocol.lower()}://{rest}")
    except ImportError as error:
        package = PROTOCOLS[protocol.lower()]
        hint = "unclip[data]" if package == "aiohttp" else package
        raise ConfigError(
            f"shards {shown(address)!r} need {package}: pip install {hint}"
        ) from error
    except Exception as error:  # a driver may raise anything: fsspec promises no types
        raise DataError(f"shard {shown(address)!r} cannot be opened: {_words(error)}") from error


def _call(driver: Any, method: str, seconds: float, *args: Any, **options: Any) -> Any:
    """Calls a driver's method; ends within `seconds`, whether or not the driver has a timeout."""
    if driver.async_impl:
        from fsspec import asyn

        return asyn.sync(
            driver.loop, getattr(driver, f"_{method}"), *args, timeout=seconds, **options
        )
    return _within(seconds, lambda: getattr(driver, method)(*args, **options))


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """`function()` in a thread that is abandoned when it takes longer. A thread of its own and not
    of a pool, because one that never returns must not block the next call."""
    future = Future()

    def work():
        try:
            future.set_result(function())
        except BaseException as error:  # handed to the waiting thread, whatever it is
            future.set_exception(error)

    threading.Thread(target=work, daemon=True, name="shard-read").start()
    return future.result(timeout=seconds)


def _info(driver: Any, inner: str, seconds: float) -> dict[str, Any]:
    """The object's info from the store, not from the listings that drivers keep."""
    if driver.async_impl:
        driver.invalidate_cache()
        return _call(driver, "info", seconds, inner)
    return _within(seconds, lambda: (driver.invalidate_cache(), driver.info(inner))[1])


def _is_http(driver: Any) -> bool:
    return "http" in driver.protocol


def _http(
    driver: Any, address: str, start: int, stop: int, seconds: float
) -> tuple[bytes, int, str]:
    """(bytes [start, stop) as far as they exist, size, identity) of an object over http."""
    from fsspec import asyn

    return asyn.sync(driver.loop, _http_range, driver, address, start, stop, timeout=seconds)


async def _http_range(driver: Any, address: str, start: int, stop: int) -> tuple[bytes, int, str]:
    """Reads one range and refuses any other answer, which fsspec's own reader would accept."""
    session = await driver.set_session()
    options = {"read_bufsize": 1 << 20, **driver.kwargs}
    options["headers"] = {
        **options.get("headers", {}),
        "Range": f"bytes={start}-{stop - 1}",
        "Accept-Encoding": "identity",
    }
    async with session.get(driver.encode_url(address), **options) as reply:
        identity = reply.headers.get("ETag") or reply.headers.get("Last-Modified") or ""
        given = reply.headers.get("Content-Range", "")
        if reply.status == 416:
            size = re.fullmatch(r"bytes \*/(\d{1,18})", given)
            if size is None or int(size[1]) > start:
                raise _RetryableError(f"answered 416 {given!r} to bytes {start}-{stop - 1}")
            return b"", int(size[1]), identity
        if reply.status in (404, 410):
            raise FileNotFoundError(f"answered {reply.status}")
        if reply.status in _RETRIED or reply.status >= 500:
            wait = reply.headers.get("Retry-After", "")
            seconds = min(int(wait), 60) if re.fullmatch(r"\d{1,6}", wait) else 0.0
            raise _RetryableError(f"answered {reply.status}", seconds)
        if reply.status >= 400:
            raise PermissionError(f"answered {reply.status}")
        if reply.status != 206:
            raise _RetryableError(
                f"answered {reply.status} to a request for a range: it ignores ranges"
            )
        if reply.headers.get("Content-Encoding", "identity") != "identity":
            raise _RetryableError("answered with compressed bytes")
        match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", given)
        if match is None:
            raise _RetryableError(f"answered with the range {given!r}")
        first, last, size = map(int, match.groups())
        if first != start or last != min(stop, size) - 1:
            raise _RetryableError(f"answered with {given!r} to bytes {start}-{stop - 1}")
        chunks, came, wanted = [], 0, last + 1 - first
        async for chunk in reply.content.iter_any():
            chunks.append(chunk)
            came += len(chunk)
            if came > wanted:
                raise _RetryableError("sent more bytes than it announced")
        if came != wanted:
            raise _RetryableError(f"sent {came} of {wanted} bytes")
        return b"".join(chunks), size, identity


def _same(address: str, expected: tuple[int, str], found: tuple[int, str]) -> None:
    both = expected[1] and found[1]
    if expected[0] != found[0] or (both and expected[1] != found[1]):
        raise DataError(
            f"shard {shown(address)!r} has changed since it was indexed or opened: "
            f"{found[0]} bytes {found[1]}, not {expected[0]} bytes {expected[1]}"
        )


def _parts(offset: int, size: int, block_bytes: int) -> list[tuple[int, int, int]]:
    """(block, start, stop within it) of every block that a range touches."""
    end = offset + size
    numbers = range(offset // block_bytes, (end - 1) // block_bytes + 1)
    return [
        (n, max(offset - n * block_bytes, 0), min(end - n * block_bytes, block_bytes))
        for n in numbers
    ]


def _words(error: BaseException | None) -> str:
    text = str(error).splitlines()[0][:300] if str(error) else ""
    if isinstance(error, _RetryableError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
