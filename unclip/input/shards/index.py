"""The index of one shard: where each usable picture, caption and JSON object lies, and their keys.

A training set of hundreds of millions of pairs has more samples than fit into Python objects, so an
index is two arrays, 32 bytes and the key for each sample, which are mapped from a file and never
parsed. Row r is a usable picture; the rows with a caption come first, so the
captioned samples are a prefix and need no list of their own.

The file, little-endian: a header of 128 bytes, the table uint32 [n, 8], the keys, then JSON with
what was left out and a line of JSON for each member or sample that was.
"""

import functools
import hashlib
import json
import mmap
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from unclip import files
from unclip.errors import DataError
from unclip.input import captions as caption_sources
from unclip.input import samples
from unclip.input.samples import BadSample, Sample
from unclip.input.shards.tar import BLOCK, Read

VERSION = 1  # of the file and of what the digest is over
_MAGIC = b"unclip\x00i"
# magic, version, flags; rows, captioned rows, bytes of keys, of JSON, of problems, of the shard;
# digest; crc32 of what follows the header, crc32 of the header up to here.
_HEADER = struct.Struct("<8sII6Q32sII")
_HEADER_BYTES = 128
_CHECKSUMS = 1
_MAX_META = 1 << 20
_GAP = 64 << 10  # members no further apart than this (bytes) are read together, gap included
_COLUMNS = 8
_PICTURE, _TEXT, _META = range(3)
_KEY_END, _CRC = 6, 7
_LIMITS = (samples.MAX_PICTURE_BYTES, samples.MAX_TEXT_BYTES, samples.MAX_TEXT_BYTES)
Span = tuple[int, int]


class ShardIndex:
    """The usable samples of one shard, by row; in memory, or mapped from a file by `open`.

    Attributes:
      name: the shard's file name; size: its bytes; identity: the store's tag of a remote shard.
      captions: source -> rows that have a caption there, see `unclip.input.captions`; None in a
        file of an older unclip, which looked for "txt" alone.
      captioned: rows [0, captioned) have a caption from one of these sources.
      table: uint32 [n, 8], by row: first 512-byte block and bytes of picture, txt and json (block
        0: absent), where the key ends in `keys`, checksum (0: not computed).
      keys: uint8, the UTF-8 keys one after the other.
      checksums: whether every row has a checksum.
      digest: sha256, 64 hex digits, over name, size, table without checksums, and keys: equal
        wherever the shard lies and however it was indexed. With a row it names a sample.
      problems: Counter of what was left out, by reason, see `walk.walk_shard`.
      examples: reason -> the first keys or member names; under "no-text" of rows without caption.
      notes: Counter of what is not a fault but worth knowing.
    """

    def __init__(
        self,
        name: str,
        size: int,
        table: np.ndarray,
        keys: np.ndarray,
        captioned: int,
        *,
        identity: str = "",
        captions: Mapping[str, int] | None = None,
        checksums: bool = False,
        digest: str = "",
        problems: Mapping[str, int] | None = None,
        examples: Mapping[str, Sequence[str]] | None = None,
        notes: Mapping[str, int] | None = None,
        listed: Sequence[tuple[str, str]] = (),
    ):
        self.name, self.size, self.identity, self.captions = name, size, identity, captions
        self.table, self.keys, self.captioned = table, keys, captioned
        self.checksums = checksums
        self.problems, self.notes = Counter(problems or {}), Counter(notes or {})
        self.examples = {reason: list(found) for reason, found in (examples or {}).items()}
        self._listed = listed
        self.digest = digest or self._digest()

    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps([VERSION, self.name, self.size]).encode())
        digest.update(np.ascontiguousarray(self.table[:, :_CRC], "<u4").data)
        digest.update(np.ascontiguousarray(self.keys).data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def count(self) -> int:
        """Usable pictures."""
        return len(self.table)

    def key(self, row: int) -> str:
        """The key of a row, 0 <= row < count."""
        start = int(self.table[row - 1, _KEY_END]) if row else 0
        end = int(self.table[row, _KEY_END])
        return self.keys[start:end].tobytes().decode("utf-8", "surrogateescape")

    def spans(self, row: int) -> tuple[Span | None, Span | None, Span | None]:
        """(offset, bytes) of a row's picture, txt and json, None where absent.

        Raises:
          DataError: one lies outside the shard or is larger than any sample's: the index is damaged
            or of another shard.
        """
        entry = self.table[row].tolist()
        spans = []
        for column, limit in zip((0, 2, 4), _LIMITS):
            offset, size = entry[column] * BLOCK, entry[column + 1]
            if offset + size > self.size or size > limit:
                raise DataError(
                    f"index of {self.name}: row {row} lies beyond the shard's end or "
                    "is too large; index the shards again"
                )
            spans.append((offset, size) if offset else None)
        return tuple(spans)

    def crc(self, row: int) -> int:
        """The checksum of a row's bytes, see `checksum`; 0: not computed."""
        return int(self.table[row, _CRC])

    def sample(self, row: int, read: Read) -> Sample:
        """Reads a row's members, in one piece where they lie close.

        Args:
          read: (offset, bytes) -> those bytes of the shard.

        Raises:
          BadSample: "checksum", "encoding" (caption) or "json".
        """
        spans, key = self.spans(row), self.key(row)
        picture, text, meta = parts = _read_spans(spans, read)
        stored = self.crc(row)
        if stored and stored != checksum([part and zlib.crc32(part) for part in parts]):
            raise BadSample(
                "checksum", f"{self.name}: {key}: its bytes have changed since it was indexed"
            )
        where = f"{self.name}: {key}"
        meta = {} if meta is None else samples.json_object(meta, where)
        text = "" if text is None else samples.caption_text(text, where)
        if not text.strip():
            instead = caption_sources.texts(meta.get(caption_sources.STAND_IN))
            text = instead[0] if instead else text
        return Sample(key, picture, text, meta)

    def meta(self, row: int, read: Read) -> dict[str, Any]:
        """A row's JSON object, {} where it has none; nothing else is read. BadSample("json")."""
        span = self.spans(row)[_META]
        if span is None:
            return {}
        return samples.json_object(read(*span), f"{self.name}: {self.key(row)}")

    def listed(self) -> Iterator[tuple[str, str]]:
        """(reason, key or member) of what was left out, the first `walk.MAX_LISTED`; not of
        "no-text", which are the rows from `captioned` on."""
        yield from self._listed

    def left_out(self) -> Iterator[tuple[str, str]]:
        """`listed`, and ("no-text", key) for every row without a caption."""
        yield from self.listed()
        for row in range(self.captioned, self.count):
            yield "no-text", samples.printable(self.key(row))

    def write(self, path: str | os.PathLike) -> None:
        """Writes the index file, whole or not at all. Raises DataError."""
        table, keys = self.table.astype("<u4").tobytes(), self.keys.tobytes()
        meta = json.dumps(
            {
                "name": self.name,
                "identity": self.identity,
                "captions": self.captions,
                "problems": self.problems,
                "examples": self.examples,
                "notes": self.notes,
            }
        ).encode()
        listed = "".join(json.dumps(item) + "\n" for item in self.listed()).encode()
        crc = 0
        for part in (table, keys, meta, listed):
            crc = zlib.crc32(part, crc)
        head = _HEADER.pack(
            _MAGIC,
            VERSION,
            _CHECKSUMS * self.checksums,
            self.count,
            self.captioned,
            len(keys),
            len(meta),
            len(listed),
            self.size,
            bytes.fromhex(self.digest),
            crc,
            0,
        )[:-4]
        head += struct.pack("<I", zlib.crc32(head))
        with files.replacing(path) as temporary, open(temporary, "wb") as file:
            for part in (head.ljust(_HEADER_BYTES, b"\0"), table, keys, meta, listed):
                file.write(part)

    @classmethod
    def open(cls, path: str | os.PathLike, *, verify: bool = True) -> "ShardIndex":
        """Maps an index file; its pages are read when they are used.

        Args:
          verify: read it once and compare with its checksum.

        Raises:
          DataError: not there, no index, of another version, damaged or cut off.
        """
        try:
            file = os.open(path, os.O_RDONLY)  # not a file object: opened very often, see `shards`
            try:
                header = _header(os.pread(file, _HEADER_BYTES, 0), os.fstat(file).st_size, path)
                if verify and _crc(file) != header.crc:
                    raise _damaged(path, "its checksum is wrong")
                mapped = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
            finally:
                os.close(file)
        except OSError as error:
            raise _damaged(path, f"cannot be read: {error.strerror}") from error
        return _Mapped(path, mapped, header)


class _Header:
    """The numbers of a file's header."""

    def __init__(self, numbers: tuple):
        (
            _,
            self.version,
            self.flags,
            self.count,
            self.captioned,
            self.keys,
            self.meta,
            self.listed,
            self.size,
            digest,
            self.crc,
            _,
        ) = numbers
        self.digest = digest.hex()


def _damaged(path: str | os.PathLike, what: str) -> DataError:
    return DataError(f"index {os.fspath(path)!r}: {what}; index the shards again")


def _header(head: bytes, size: int, path: str | os.PathLike) -> _Header:
    if len(head) < _HEADER_BYTES or not head.startswith(_MAGIC):
        raise _damaged(path, "not an index file of unclip")
    header = _Header(_HEADER.unpack_from(head))
    if header.version != VERSION:
        raise _damaged(path, f"format version {header.version}, this unclip reads {VERSION}")
    at = _HEADER.size - 4
    crc = int.from_bytes(head[at : at + 4], "little")
    if zlib.crc32(head[:at]) != crc or any(head[at + 4 :]):
        raise _damaged(path, "its header is damaged")
    expected = (
        _HEADER_BYTES + 4 * _COLUMNS * header.count + header.keys + header.meta + header.listed
    )
    if size != expected or header.captioned > header.count or header.meta > _MAX_META:
        raise _damaged(path, f"has {size} bytes, expected {expected}")
    return header


def _crc(file: int) -> int:
    """crc32 of what follows the header; read from the file, because reading the mapping would keep
    its pages in memory."""
    crc, at = 0, _HEADER_BYTES
    while data := os.pread(file, 1 << 20, at):
        crc, at = zlib.crc32(data, crc), at + len(data)
    return crc


class _Mapped(ShardIndex):
    """An index file; the JSON in it is parsed only when it is asked for."""

    def __init__(self, path: str | os.PathLike, mapped: mmap.mmap, header: _Header):
        table_end = _HEADER_BYTES + 4 * _COLUMNS * header.count
        self._path, self._mapped = os.fspath(path), mapped
        self._meta_at = table_end + header.keys
        self._listed_at = self._meta_at + header.meta
        self.table = np.frombuffer(mapped, "<u4", header.count * _COLUMNS, _HEADER_BYTES).reshape(
            -1, _COLUMNS
        )
        self.keys = np.frombuffer(mapped, np.uint8, header.keys, table_end)
        self.captioned, self.digest, self.size = header.captioned, header.digest, header.size
        self.checksums = bool(header.flags & _CHECKSUMS)

    @functools.cached_property
    def _about(self) -> dict[str, Any]:
        about = json.loads(self._mapped[self._meta_at : self._listed_at])
        return about | {"problems": Counter(about["problems"]), "notes": Counter(about["notes"])}

    def listed(self):
        for line in self._mapped[self._listed_at :].splitlines():
            yield tuple(json.loads(line))

    name = property(lambda self: self._about["name"])
    identity = property(lambda self: self._about["identity"])
    captions = property(lambda self: self._about.get("captions"))
    problems = property(lambda self: self._about["problems"])
    examples = property(lambda self: self._about["examples"])
    notes = property(lambda self: self._about["notes"])


def checksum(crcs: Sequence[int | None]) -> int:
    """One checksum of a sample: the crc32 of those of picture, txt and json, 0 where absent.

    It is over the parts' checksums because members may come in any order in a shard. Never 0.
    """
    return zlib.crc32(struct.pack("<3I", *(crc or 0 for crc in crcs))) or 1


def _read_spans(spans: Sequence[Span | None], read: Read) -> list[bytes | None]:
    there = [span for span in spans if span]
    if not there:
        return [None, None, None]
    start = min(offset for offset, _ in there)
    end = max(offset + size for offset, size in there)
    if end - start - sum(size for _, size in there) > _GAP:
        return [span and read(*span) for span in spans]
    data = read(start, end - start)
    return [span and data[span[0] - start : span[0] - start + span[1]] for span in spans]
