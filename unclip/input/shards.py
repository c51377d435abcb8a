"""webdataset tar shards as a random-access collection of picture and caption pairs.

The paper (arXiv 2204.06125, section 2) trains every stage on pairs (x, y) of an image and its
caption. Here such pairs live in plain tar files under webdataset's key rule: the name up to the
first dot of its last component is the key (folders belong to it), the rest is the extension.

The headers of each shard are walked once; afterwards sample i is a positional read. Keys are closed
at the end of their shard, so one shard's picture can never meet another shard's caption, and a
sample that is incomplete, ambiguous or cut off is left out and counted. Nothing is ever extracted,
links are never followed and no address is ever opened or run.
"""

import difflib
import functools
import glob
import hashlib
import itertools
import json
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from unclip.errors import ConfigError, DataError
from unclip.input import tar

PICTURES = ("webp", "jpg", "jpeg", "png")  # in order of preference where a key has several
MAX_PICTURE_BYTES = 64 << 20
MAX_TEXT_BYTES = 1 << 20

_PICTURE, _TEXT, _META = range(3)
_COLUMN = {**dict.fromkeys(PICTURES, _PICTURE), "txt": _TEXT, "json": _META}
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_OPEN_FILES = 64
_EXAMPLES = 5
_MAX_PATHS = 1_000_000


class BadSample(DataError):
    """One sample cannot be used; `reason` is a short code that counters are kept by."""

    def __init__(self, reason: str, message: str = ""):
        super().__init__(": ".join(filter(None, (reason, message))))
        self.reason = reason


class Sample(NamedTuple):
    """One pair; `image` is the encoded picture, `text` "" where there is no caption."""

    key: str
    image: bytes
    text: str
    meta: dict[str, Any]


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Paths, globs and brace ranges -> the shard paths they name, each once, in the order given.

    Args:
      patterns: e.g. "train-{0000..0003}.tar", "shards/*.tar", "{a,b}.tar" or a plain path.

    Raises:
      ConfigError: no pattern at all, or an address (`pipe:`, `scheme://`).
      DataError: a pattern that matches nothing or a shard that is not there.
    """
    patterns = [patterns] if isinstance(patterns, str | os.PathLike) else list(patterns)
    if not patterns:
        raise ConfigError("no shards given: expected paths, globs or ranges such as a-{00..07}.tar")
    found = {}
    for pattern in map(os.fspath, patterns):
        if pattern.lower().lstrip().startswith("pipe:") or "://" in pattern:
            raise ConfigError(f"shards {pattern!r}: only local files are read, not addresses or "
                              "commands; copy or mount the shards and give their paths")
        matched = []
        for path in itertools.islice(_braces(pattern), _MAX_PATHS + 1):
            is_glob = glob.has_magic(path) and not os.path.exists(path)
            matched += sorted(glob.glob(path)) if is_glob else [_existing(path)]
        if not matched:
            raise DataError(f"no shard matches {pattern!r}{_near(pattern)}")
        if len(matched) > _MAX_PATHS:
            raise ConfigError(f"shards {pattern!r}: names more than {_MAX_PATHS} files")
        found |= {os.path.abspath(path): path for path in matched}
    return list(found.values())


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
        for rest in _braces(pattern[match.end():]):
            yield pattern[:match.start()] + word + rest


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


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("json", f"{where}: not JSON") from error
    if not isinstance(value, dict):
        raise BadSample("json", f"{where}: JSON is not an object")
    return value


class _Shard(NamedTuple):
    size: int
    keys: list[str]
    members: np.ndarray  # int64 [n, 3, 2]
    problems: list[tuple[str, str]]


def _index_shard(path: str, *, text: bool, caption: str) -> _Shard:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return _index_open_shard(path, descriptor, text, caption)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"shard {path!r} cannot be read: {error.strerror}") from error


def _index_open_shard(path: str, descriptor: int, text: bool, caption: str) -> _Shard:
    end = os.fstat(descriptor).st_size
    short = os.path.basename(path)
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    unusable: dict[str, str] = {}
    problems = []
    for kind, name, offset, size in tar.walk(descriptor, end):
        if (kind, name) == ("shard-corrupt", "byte 0"):
            zipped = os.pread(descriptor, 2, 0) == b"\x1f\x8b"
            hint = "compressed; gunzip it first, samples are read at their offsets"
            raise DataError(f"shard {path!r} is {hint if zipped else 'not a tar file'}")
        match = _KEY.fullmatch(name)
        extension = match[2].lower() if match else ""
        if kind not in ("file", "cut"):
            problems.append((kind, f"{short}: {name}"))
        elif extension in _COLUMN:
            key = match[1]
            spans = samples.setdefault(key, {})
            limit = MAX_PICTURE_BYTES if extension in PICTURES else MAX_TEXT_BYTES
            if extension in spans:
                # Which picture belongs to which caption is anyone's guess: drop the key.
                unusable[key] = "duplicate"
            elif kind == "cut":
                unusable.setdefault(key, "truncated")
            elif size > limit:
                unusable.setdefault(key, "too-many-bytes")
            spans[extension] = (offset, size)

    def has_caption(spans: dict[str, tuple[int, int]]) -> bool:
        if "json" not in spans:
            return False
        offset, size = spans["json"]
        try:
            value = _object(os.pread(descriptor, size, offset), path).get(caption)
        except BadSample:
            return False
        return isinstance(value, str) and bool(value.strip())

    keys, rows, captions = [], [], 0
    for key, spans in samples.items():
        spans = {extension: span for extension, span in spans.items() if span[1]}
        picture = next((spans[e] for e in PICTURES if e in spans), None)
        captioned = key not in unusable and ("txt" in spans or (text and has_caption(spans)))
        captions += captioned
        reason = unusable.get(key) or (
            "no-picture" if not picture else "no-text" if text and not captioned else "")
        if reason:
            problems.append((reason, f"{short}: {key}"))
        else:
            keys.append(key)
            rows.append((picture, spans.get("txt", (0, -1)), spans.get("json", (0, -1))))
    no_text = sum(reason == "no-text" for reason, _ in problems)
    damaged = any(reason.startswith("shard-") for reason, _ in problems)
    if text and no_text and not captions and not damaged:
        raise DataError(f"shard {path!r} has {no_text} pictures and no captions: expected KEY.txt "
                        f"or a field {caption!r} in KEY.json beside each picture")
    return _Shard(end, keys, np.array(rows, np.int64).reshape(-1, 3, 2), problems)


def index_shards(patterns: str | Sequence[str], *, text: bool = True,
                 caption: str = "caption") -> "Collection":
    """Walks the headers of every shard once.

    Args:
      patterns: paths, globs and brace ranges, see `expand`.
      text: a sample needs a caption: KEY.txt, or `caption` in KEY.json. False: a picture is enough.
      caption: the JSON field that stands in for a missing KEY.txt.

    Returns:
      The `Collection` of all complete samples, in the order of the shards and, within one, of the
      members.

    Raises:
      ConfigError: an address instead of a path.
      DataError: nothing matches, a shard is missing, unreadable, no tar or without captions, or
        there is no complete sample at all.
    """
    paths = expand(patterns)
    index = functools.partial(_index_shard, text=text, caption=caption)
    with ThreadPoolExecutor(min(8, len(paths)), thread_name_prefix="index-shards") as pool:
        shards = list(pool.map(index, paths))
    problems, examples = Counter(), {}
    for reason, where in itertools.chain.from_iterable(shard.problems for shard in shards):
        problems[reason] += 1
        if len(examples.setdefault(reason, [])) < _EXAMPLES:
            examples[reason].append(where.encode("utf-8", "replace").decode())
    keys = list(itertools.chain.from_iterable(shard.keys for shard in shards))
    if not keys:
        found = ", ".join(f"{reason} {n}" for reason, n in problems.items()) or "no known member"
        raise DataError(f"no complete sample in {len(paths)} shards, first {paths[0]!r}: {found}; "
                        f"a sample is KEY.{'|'.join(PICTURES)}{' and KEY.txt' if text else ''}")
    key_bytes, key_ends = _pack(keys)
    return Collection(
        shards=paths, sizes=[shard.size for shard in shards],
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), [len(s.keys) for s in shards]),
        members=np.concatenate([shard.members for shard in shards]),
        key_bytes=key_bytes, key_ends=key_ends, caption=caption,
        problems=problems, examples=examples)


def _pack(keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    ends = np.cumsum([len(key) for key in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


class _Descriptor:
    """An open file that closes itself when its last reader lets go."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "number") and os is not None:  # None while Python ends
            os.close(self.number)


class Collection:
    """Complete samples, read by number; safe to share between threads and to pickle.

    Attributes:
      shards: paths; sizes: their bytes when they were indexed.
      shard: int32 [N], the shard of each sample.
      members: int64 [N, 3, 2], (offset, size) of picture, txt and json; size -1: absent.
      key_bytes, key_ends: the keys, UTF-8 one after the other, and where each ends.
      problems: Counter of what was left out, by reason: "no-text", "no-picture", "duplicate",
        "truncated", "too-many-bytes" count samples; "refused-link", "refused-name", "refused-type"
        members; "shard-truncated", "shard-corrupt" shards.
      examples: the first few of each, "SHARD: KEY".
    """

    def __init__(self, *, shards: Sequence[str], sizes: Sequence[int], shard: np.ndarray,
                 members: np.ndarray, key_bytes: np.ndarray, key_ends: np.ndarray,
                 caption: str = "caption", problems: Mapping[str, int] | None = None,
                 examples: Mapping[str, list[str]] | None = None):
        self.shards, self.sizes = tuple(shards), tuple(sizes)
        self.shard, self.members = shard, members
        self.key_bytes, self.key_ends = key_bytes, key_ends
        self.caption = caption
        self.problems, self.examples = Counter(problems or {}), dict(examples or {})
        self._start()

    def _start(self):
        self._lock, self._files = threading.Lock(), OrderedDict()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_files")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def __len__(self) -> int:
        return len(self.shard)

    def __repr__(self) -> str:
        left_out = f", left out {dict(self.problems)}" if self.problems else ""
        return f"Collection({len(self)} samples in {len(self.shards)} shards{left_out})"

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over shard names and sizes and the member index; equal after moving the folder."""
        names = [[os.path.basename(p), size] for p, size in zip(self.shards, self.sizes)]
        digest = hashlib.sha256(json.dumps([names, self.caption]).encode())
        for array in (self.shard, self.members, self.key_bytes, self.key_ends):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def key(self, i: int) -> str:
        """The key of sample i."""
        start = int(self.key_ends[i - 1]) if i else 0
        return self.key_bytes[start : int(self.key_ends[i])].tobytes().decode(
            "utf-8", "surrogateescape")

    def read(self, i: int) -> Sample:
        """Reads sample i, 0 <= i < len(self).

        Raises:
          BadSample: its caption is not UTF-8 ("encoding") or its JSON is broken ("json").
          DataError: its shard is gone or has changed since it was indexed.
        """
        key, image = self.key(i), self._member(i, _PICTURE)
        text, meta = self._member(i, _TEXT), self.meta(i)
        if text is None:
            caption = meta.get(self.caption)
            return Sample(key, image, caption if isinstance(caption, str) else "", meta)
        try:
            return Sample(key, image, text.decode("utf-8-sig"), meta)
        except UnicodeDecodeError as error:
            raise BadSample("encoding", f"{self._where(i)}: caption is not UTF-8") from error

    def meta(self, i: int) -> dict[str, Any]:
        """The JSON object of sample i, {} where it has none. Raises BadSample("json")."""
        data = self._member(i, _META)
        return {} if data is None else _object(data, self._where(i))

    def subset(self, *, keys: Iterable[str] | None = None,
               where: Mapping[str, Any] | None = None, count: int | None = None) -> "Collection":
        """The samples that pass every filter given, in the same order.

        Args:
          keys: keep these keys.
          where: JSON field -> value or list of values, e.g. {"group": ["food", "faces"]}.
          count: keep the first so many of what is left.

        Raises:
          DataError: an unknown key, or nothing left.
        """
        chosen = range(len(self))
        if keys is not None:
            wanted = set(keys)
            named = {i: self.key(i) for i in chosen}
            for missing in sorted(wanted - set(named.values())):
                near = difflib.get_close_matches(missing, set(named.values()), n=3)
                raise DataError(f"no sample has the key {missing!r}; nearest: {near}")
            chosen = [i for i in chosen if named[i] in wanted]
        for field, values in (where or {}).items():
            values = list(values) if isinstance(values, list | tuple | set) else [values]
            found = [(i, self.meta(i).get(field)) for i in chosen]
            chosen = [i for i, value in found if value in values]
            if not chosen:
                there = sorted({repr(value) for _, value in found})[:20]
                raise DataError(f"no sample has {field} in {values}; there are: {', '.join(there)}")
        chosen = list(chosen)[:count]
        if not chosen:
            raise DataError(f"a subset of {count} samples is empty; expected a count of at least 1")
        key_bytes, key_ends = _pack([self.key(i) for i in chosen])
        return Collection(
            shards=self.shards, sizes=self.sizes, shard=self.shard[chosen],
            members=self.members[chosen], key_bytes=key_bytes, key_ends=key_ends,
            caption=self.caption, problems=self.problems, examples=self.examples)

    def _where(self, i: int) -> str:
        return f"{os.path.basename(self.shards[self.shard[i]])}: {self.key(i)}"

    def _member(self, i: int, column: int) -> bytes | None:
        offset, size = map(int, self.members[i, column])
        if size < 0:
            return None
        shard = int(self.shard[i])
        try:
            file = self._open(shard)  # held while it is read: eviction must not close it
            data = os.pread(file.number, size, offset)
        except OSError as error:
            raise DataError(f"shard {self.shards[shard]!r} cannot be read: {error}") from error
        if len(data) != size:
            raise DataError(f"shard {self.shards[shard]!r} gave {len(data)} of {size} bytes")
        return data

    def _open(self, shard: int) -> _Descriptor:
        with self._lock:
            file = self._files.pop(shard, None)
            if file is None:
                path = self.shards[shard]
                file = _Descriptor(path)
                if os.fstat(file.number).st_size != self.sizes[shard]:
                    raise DataError(f"shard {path!r} has changed since it was indexed")
            self._files[shard] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return file
