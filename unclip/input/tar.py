"""The headers of a tar file, walked without reading or extracting a member.

The shards that hold the paper's image and caption pairs are plain tars; here their members become
byte ranges. Links, devices, sparse files and names that leave the archive are refused by name, so
no caller can follow them, and damage ends the walk with a word for it.
"""

import os
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = tarfile.BLOCKSIZE
_MAX_EXTENSION = 1 << 20  # bytes of a long name or a pax header


class Member(NamedTuple):
    """A step of the header walk: `kind` is "file", "cut" or the reason why it is refused."""

    kind: str
    name: str
    offset: int = 0
    size: int = 0


def walk(descriptor: int, end: int) -> Iterator[Member]:
    """Walks the headers of a tar of `end` bytes; reads no member and stops at the first damage.

    Long names (GNU `L`, pax `path`) and long sizes (base 256, pax `size`) are understood. The last
    step is of kind "shard-truncated" or "shard-corrupt" unless an end block was found.
    """
    position, long_name, pax = 0, None, {}
    while True:
        block = os.pread(descriptor, BLOCK, position)
        if len(block) < BLOCK:
            yield Member("shard-truncated", f"byte {end}")
            return
        if not any(block):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            yield Member("shard-corrupt", f"byte {position}")
            return
        position += BLOCK
        # Links, folders and devices carry no data, whatever their size field says.
        extension = header.type in (b"L", b"K", b"x", b"X", b"g")
        carries = header.isreg() or extension or header.type not in tarfile.SUPPORTED_TYPES
        size = header.size if carries else 0
        if extension:
            data = os.pread(descriptor, size, position) if 0 <= size <= _MAX_EXTENSION else None
            if data is None or (header.type in (b"x", b"X") and _pax(data) is None):
                kind = "shard-truncated" if position + size > end else "shard-corrupt"
                yield Member(kind, f"byte {position}")
                return
            if header.type == b"L":
                long_name = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            elif header.type in (b"x", b"X"):
                pax = _pax(data)
        else:
            name = pax.get("path", long_name or header.name)
            digits = pax.get("size", "")
            size = int(digits) if carries and digits.isdecimal() and len(digits) < 20 else size
            if size < 0:
                yield Member("shard-corrupt", f"byte {position}")
                return
            if not header.isdir():
                kind = _verdict(header, name, pax, cut=position + size > end)
                yield Member(kind, name, position, size)
            long_name, pax = None, {}
        position = min(position + -(-size // BLOCK) * BLOCK, end)


def _verdict(header: tarfile.TarInfo, name: str, pax: dict[str, str], cut: bool) -> str:
    if header.issym() or header.islnk():
        return "refused-link"
    if not header.isreg() or header.type == tarfile.GNUTYPE_SPARSE or "GNU.sparse.major" in pax:
        return "refused-type"
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return "refused-name"
    return "cut" if cut else "file"


def _pax(data: bytes) -> dict[str, str] | None:
    """The records "LENGTH KEY=VALUE\\n" of a pax header, or None where they are malformed."""
    records, position = {}, 0
    while position < len(data) and data[position]:
        digits, space, _ = data[position : position + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = data[position + len(digits) + 1 : position + length]
        name, equals, value = record[:-1].partition(b"=")
        if not (space and equals and record.endswith(b"\n")):
            return None
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position += length
    return records
