"""Blocks of remote shards, kept on disk within a limit.

A block is `block_bytes` of one version of one object; its name is a hash of the object's address,
its version and the block's place, so a block is never out of date: the blocks of a changed object
have other names. The folder is shared by all processes of a host and can be deleted at any time.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from unclip import files
from unclip.errors import DataError

_BLOCK = re.compile(r"[0-9a-f]{40}\.block")
_UNFINISHED = re.compile(r"\.(?:[0-9a-f]{40}\.block|total)\.[0-9a-f]+\.tmp")
_STRIPES = 256  # lock files; two blocks rarely share one
_POLL_SECONDS = 0.02


def block_name(address: str, identity: str, size: int, block_bytes: int, number: int) -> str:
    """40 hex digits for block `number` of one version of one object."""
    words = "\0".join(map(str, (address, identity, size, block_bytes, number)))
    return hashlib.sha256(words.encode("utf-8", "surrogateescape")).hexdigest()[:40]


class Blocks:
    """The blocks of all processes of a host, in a folder that never holds more than `capacity`.

    Files appear whole or not at all; the blocks unused for longest (by the file's time of change)
    are removed first. A file beside them holds the sum of their sizes, so that the folder need not
    be listed for every new block until it is full.

    Raises:
      DataError: the folder cannot be made or written.
    """

    def __init__(self, folder: str, capacity: int):
        self._folder, self._capacity = folder, capacity
        try:
            os.makedirs(folder, exist_ok=True)
            with self._locked("total.lock", 0):
                pass
        except OSError as error:
            raise DataError(f"block cache {folder!r} cannot be used: {error.strerror}") from error

    def get(self, name: str, start: int, stop: int, size: int) -> bytes | None:
        """Bytes [start, stop) of a block of `size` bytes; None where it is missing or
        incomplete."""
        try:
            descriptor = os.open(self._path(name), os.O_RDONLY)
        except OSError:
            return None
        try:
            if os.fstat(descriptor).st_size != size:
                return None
            os.utime(descriptor)
            data = os.pread(descriptor, stop - start, start)
            return data if len(data) == stop - start else None
        except OSError:  # a bad disk under the cache must not stop a run: the object can be read
            return None
        finally:
            os.close(descriptor)

    def put(self, name: str, data: bytes) -> bool:
        """Keeps a block; False where it could not be written (disk full, folder gone)."""
        try:
            with self._locked("total.lock", 60.0) as locked:
                if not locked:
                    return False
                total = self._total()
                if total is None or total + len(data) > self._capacity:
                    total = self._make_room(len(data))
                # Written before the block: a crash between the two leaves a sum that is too large.
                self._write("total", str(total + len(data)).encode())
                self._write(f"{name}.block", data)
                return True
        except (OSError, DataError):
            return False

    @contextlib.contextmanager
    def fetching(self, name: str, seconds: float) -> Iterator[None]:
        """Waits, `seconds` at most, while another process fetches this block."""
        stripe = int(name[:8], 16) % _STRIPES
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # without the lock a block may be fetched twice
                stack.enter_context(self._locked(f"{stripe:02x}.lock", seconds))
            yield

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, f"{name}.block")

    def _write(self, name: str, data: bytes) -> None:
        with files.replacing(os.path.join(self._folder, name)) as path:
            path.write_bytes(data)

    def _total(self) -> int | None:
        try:
            with open(os.path.join(self._folder, "total"), "rb") as file:
                digits = file.read(20)
        except FileNotFoundError:
            return None
        return int(digits) if digits.isdigit() else None

    def _make_room(self, wanted: int) -> int:
        """Removes old blocks, and files of killed writers, until a tenth is free and `wanted` bytes
        fit; returns the bytes that are left."""
        found = []
        for entry in os.scandir(self._folder):
            if _UNFINISHED.fullmatch(entry.name):
                os.unlink(entry.path)  # its writer is dead: writers hold the lock that we hold
            elif _BLOCK.fullmatch(entry.name):
                stat = entry.stat()
                found.append((stat.st_mtime_ns, stat.st_size, entry.path))
        total, room = sum(size for _, size, _ in found), self._capacity - wanted
        if total <= room:
            return total
        for _, size, path in sorted(found):
            if total <= min(room, self._capacity * 9 // 10):
                break
            os.unlink(path)
            total -= size
        return total

    @contextlib.contextmanager
    def _locked(self, name: str, seconds: float) -> Iterator[bool]:
        """Holds a lock file; False where another process kept it for all of `seconds`."""
        descriptor = os.open(os.path.join(self._folder, name), os.O_CREAT | os.O_RDWR, 0o666)
        try:
            deadline = time.monotonic() + seconds
            while not (locked := _try_lock(descriptor)) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            yield locked
        finally:
            os.close(descriptor)  # which also releases the lock


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class SharedCalls:
    """Makes several threads that ask for the same thing at the same time share one call."""

    def __init__(self):
        self._lock, self._futures = threading.Lock(), {}

    def once(self, name: str, make: Callable[[], bytes]) -> bytes:
        """`make()`, or what a thread that is already making `name` returns or raises."""
        with self._lock:
            future = self._futures.get(name)
            first = future is None
            if first:
                future = self._futures[name] = Future()
        if not first:
            return future.result()
        try:
            future.set_result(make())
        except BaseException as error:
            future.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._futures[name]
        return future.result()
