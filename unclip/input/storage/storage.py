"""Where shards lie: local files, and objects in a store that are read by byte range.

`Storage` gives the bytes at an offset of either. No address is run as a command, and no chain of
addresses or protocol outside `address.PROTOCOLS` is opened.
"""

import difflib
import glob
import itertools
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from unclip.errors import ConfigError, DataError
from unclip.input.storage import address

_OPEN_FILES = 64
_MAX_PATHS = 1_000_000
# Names that "*.tar" does not match although a shard was meant: while it is copied, or packed.
_UNREAD = {
    "unfinished-shard": r"\.tar\.(part|partial|tmp|temp|crdownload|download|filepart|incomplete)",
    "compressed": r"\.tar\.(gz|bz2|xz|zst)",
}


class Storage:
    """Reads byte ranges of shards by path or address; safe between threads, picklable.

    Args:
      cache: local folder that keeps blocks of remote shards, shared by all processes of a host; "":
        none, and every read asks the store.
      cache_bytes: what the folder may hold; the blocks unused for longest are removed first.
      block_bytes: remote shards are read in blocks of this size.
      attempts: how often a remote read is tried.
      timeout_seconds: of one attempt; all attempts at a range or block together take at most
        attempts x timeout_seconds.
      whole_blocks: with a cache, read whole blocks and keep them: for streamed order, where the
        neighbouring samples are needed soon, or where the cache holds everything. False: read only
        the bytes asked for, from cached blocks where they exist: for global order, where the
        neighbours are rarely needed.

    Raises:
      ConfigError: sizes below 1, or a cache smaller than two blocks.
    """

    def __init__(
        self,
        cache: str = "",
        cache_bytes: int = 20 << 30,
        block_bytes: int = 8 << 20,
        attempts: int = 8,
        timeout_seconds: float = 30.0,
        whole_blocks: bool = False,
    ):
        if min(block_bytes, attempts) < 1 or not 0 < timeout_seconds < float("inf"):
            raise ConfigError(
                f"block_bytes {block_bytes}, attempts {attempts}, timeout_seconds "
                f"{timeout_seconds}: expected each above 0"
            )
        if cache_bytes < 2 * block_bytes:
            raise ConfigError(
                f"cache_bytes {cache_bytes}: expected room for two blocks of "
                f"{block_bytes} bytes at least"
            )
        self.cache, self.cache_bytes, self.block_bytes = os.fspath(cache), cache_bytes, block_bytes
        self.attempts, self.timeout_seconds = attempts, timeout_seconds
        self.whole_blocks = whole_blocks
        self._start()

    def _start(self) -> None:
        self._lock, self._files, self._remote = threading.Lock(), OrderedDict(), None

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def local(self, path: str) -> bool:
        """Whether `path` names a local file rather than a remote object."""
        return address.protocol(path) in ("", "file")

    def expand(self, patterns: str | Sequence[str]) -> list[str]:
        """Paths, addresses, globs and brace ranges -> the shards they name, each once, in order.

        Args:
          patterns: e.g. "train-{0000..0003}.tar", "~/shards/*.tar", "s3://bucket/{a,b}.tar",
            "a.tar,b.tar". Remote addresses without `*` are not looked up here.

        Raises:
          ConfigError: no pattern at all, `pipe:`, a chain `::`, a protocol that is not in
            `address.PROTOCOLS`, or a glob over http, which has no listing.
          DataError: a pattern that matches nothing or a local shard that is not there.
        """
        patterns = [patterns] if isinstance(patterns, str | os.PathLike) else list(patterns)
        if not patterns:
            raise ConfigError(
                "no shards given: expected paths, globs or ranges such as a-{00..07}.tar"
            )
        found = {}
        patterns = [part for given in patterns for part in address.entries(os.fspath(given))]
        for pattern in patterns:
            matched = []
            for path in itertools.islice(_braces(pattern), _MAX_PATHS + 1):
                if self.local(path):
                    path = address.local(path)
                    is_glob = glob.has_magic(path) and not os.path.exists(path)
                    matched += sorted(glob.glob(path)) if is_glob else [_existing(path)]
                elif "*" in path:
                    matched += self._objects().glob(path)
                else:
                    matched.append(path)
            if not matched:
                near = _near(address.local(pattern)) if self.local(pattern) else ""
                raise DataError(f"no shard matches {address.shown(pattern)!r}{near}")
            if len(matched) > _MAX_PATHS:
                raise ConfigError(f"shards {pattern!r}: names more than {_MAX_PATHS} files")
            found |= {os.path.abspath(p) if self.local(p) else p: p for p in matched}
        return list(found.values())

    def unread(self, patterns: str | Sequence[str]) -> dict[str, list[str]]:
        """Files that local globs pass over although shards were meant, by reason.

        Returns:
          {"unfinished-shard": names such as "a.tar.part", "compressed": "a.tar.gz"}, what there is;
          none beside which the shard itself lies.
        """
        patterns = [patterns] if isinstance(patterns, str | os.PathLike) else list(patterns)
        paths = set()
        for pattern in itertools.chain(*(address.entries(os.fspath(p)) for p in patterns)):
            for path in itertools.islice(_braces(pattern), _MAX_PATHS):
                if self.local(path) and glob.has_magic(path):
                    path = address.local(path)
                    paths.update(set(glob.glob(f"{path}.*")) - set(glob.glob(path)))
        found: dict[str, list[str]] = {}
        for path in sorted(paths):
            for reason, ending in _UNREAD.items():
                match = re.search(f"{ending}$", path, re.IGNORECASE)
                if match and not os.path.exists(path[: match.start(1) - 1]):
                    found.setdefault(reason, []).append(os.path.basename(path))
        return found

    def stat(self, path: str) -> tuple[int, str]:
        """(bytes, identity) of a shard; identity is "" for a local file, else the store's tag for
        this version of the object (ETag, generation or time of change), "" where it has none.

        Raises:
          DataError: it does not exist or the store cannot be reached.
        """
        if not self.local(path):
            return self._objects().stat(path)
        try:
            return os.stat(address.local(path)).st_size, ""
        except OSError as error:
            raise DataError(f"shard {path!r} cannot be read: {error.strerror}") from error

    def read(
        self, path: str, offset: int, size: int, expected: tuple[int, str] | None = None
    ) -> bytes:
        """Exactly `size` bytes at `offset`.

        Args:
          expected: what `stat` said when the shard was indexed; compared when a file is opened, and
            with what the store says of an object.

        Raises:
          DataError: the shard is gone, has changed or ends earlier; of a remote one also with the
            last cause when every attempt failed.
        """
        if not self.local(path):
            return self._objects().read(path, offset, size, expected)
        try:
            file = self._open(path, expected)  # held while it is read: eviction must not close it
            data = os.pread(file.number, size, offset)
        except OSError as error:
            raise DataError(f"shard {path!r} cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise DataError(f"shard {path!r} gave {len(data)} of {size} bytes at {offset}")
        return data

    def counters(self) -> dict[str, int]:
        """What remote reading cost this process so far: requests, retries, bytes, cache_hits,
        cache_misses, cache_errors; all 0 while shards are local."""
        return self._remote.counters() if self._remote else dict.fromkeys(address.COUNTERS, 0)

    def close(self) -> None:
        """Closes the files; they are opened again when they are read."""
        with self._lock:
            self._files.clear()

    def _open(self, path: str, expected: tuple[int, str] | None) -> "_Descriptor":
        with self._lock:
            file = self._files.pop(path, None)
            if file is None:
                file = _Descriptor(address.local(path))
            if expected is not None and file.size != expected[0]:
                raise DataError(
                    f"shard {path!r} has changed since it was indexed: {file.size} "
                    f"bytes, not {expected[0]}"
                )
            self._files[path] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def _objects(self):
        from unclip.input.storage import remote

        with self._lock:
            if self._remote is None:
                self._remote = remote.Objects(
                    cache=self.cache,
                    cache_bytes=self.cache_bytes,
                    block_bytes=self.block_bytes,
                    attempts=self.attempts,
                    timeout_seconds=self.timeout_seconds,
                    whole_blocks=self.whole_blocks,
                )
            return self._remote


class _Descriptor:
    """An open file that is closed when its last reader has finished."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.number).st_size

    def __del__(self):
        if hasattr(self, "number") and os is not None:  # None while Python ends
            os.close(self.number)


def _braces(pattern: str) -> Iterator[str]:
    """{0000..0003} and {a,b}, leftmost first."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        yield pattern
        return
    first, last, words = match.groups()
    if words is None:
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        words = (f"{n:0{width}d}" for n in range(int(first), int(last) + 1))
    else:
        words = words.split(",")
    for word in words:
        for rest in _braces(pattern[match.end() :]):
            yield pattern[: match.start()] + word + rest


def _existing(path: str) -> str:
    if os.path.isdir(path):
        inside = os.path.join(path, "*.tar")
        raise DataError(f"shard {path!r} is a folder; give its files: {inside!r}")
    if not os.path.exists(path):
        raise DataError(f"shard {path!r} is not there{_near(path)}")
    return path


def _near(path: str) -> str:
    folder, name = os.path.split(path)
    if not os.path.isdir(folder or "."):
        return f": there is no folder {folder!r}"
    near = difflib.get_close_matches(name, os.listdir(folder or "."), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
