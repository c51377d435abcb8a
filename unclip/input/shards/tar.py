"""The headers of a tar file, walked without reading or extracting a member.

Members become byte ranges. Links, devices, sparse files and names that lead out of the archive are
refused with a reason, so no caller can follow them, and damage ends the walk with a reason.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = tarfile.BLOCKSIZE
Read = Callable[[int, int], bytes]  # (offset, size) -> exactly that many bytes
_MAX_EXTENSION = 1 << 20  # bytes of a long name or a pax header
_MAX_NAME = 4096
_OCTAL = re.compile(rb"[0-7]+")


class Member(NamedTuple):
    """A step of the header walk: `kind` is "file", "cut", why it is refused, or an end."""

    kind: str
    name: str
    offset: int = 0
    size: int = 0


def walk(read: Read, end: int) -> Iterator[Member]:
    """Walks the headers of a tar of `end` bytes; reads no member and stops at the first damage.

    `read` is asked only for ranges below `end`, in ascending order. Long names (GNU `L`,
    pax `path`) and long sizes (base 256, pax `size`) are understood. The last step is of kind
    "end" (at its offset lies the end block), "shard-truncated" or "shard-corrupt".
    """
    position, long_name, pax = 0, None, {}
    while True:
        block = read(position, BLOCK) if position + BLOCK <= end else b""
        if not block:
            yield Member("shard-truncated", f"byte {end}")
            return
        if not any(block):
            yield Member("end", "", position)
            return
        try:
            kind, name, size = _plain(block) or _header(block)
        except tarfile.HeaderError:
            yield Member("shard-corrupt", f"byte {position}")
            return
        position += BLOCK
        # Links, folders and devices carry no data, whatever their size field says.
        extension = kind in (b"L", b"K", b"x", b"X", b"g")
        carries = kind in tarfile.REGULAR_TYPES or kind not in tarfile.SUPPORTED_TYPES
        size = size if carries or extension else 0
        if extension:
            here = 0 <= size <= _MAX_EXTENSION and position + size <= end
            data = read(position, size) if here else None
            if data is None or (kind in (b"x", b"X") and _pax(data) is None):
                kind = "shard-truncated" if position + size > end else "shard-corrupt"
                yield Member(kind, f"byte {position}")
                return
            if kind == b"L":
                long_name = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            elif kind in (b"x", b"X"):
                pax = _pax(data)
        else:
            name = pax.get("path", long_name or name)
            digits = pax.get("size", "")
            size = int(digits) if carries and digits.isdecimal() and len(digits) < 20 else size
            if size < 0:
                yield Member("shard-corrupt", f"byte {position}")
                return
            if kind != tarfile.DIRTYPE:
                verdict = _verdict(kind, name, pax, cut=position + size > end)
                yield Member(verdict, name, position, size)
            long_name, pax = None, {}
        position = min(position + -(-size // BLOCK) * BLOCK, end)


def _plain(block: bytes) -> tuple[bytes, str, int] | None:
    """(type, name, size) of a regular file's header, the usual case; None: `_header` must
    decide."""
    name, size, stored = (
        field.partition(b"\0")[0] for field in (block[:100], block[124:136], block[148:156])
    )
    size, stored = size.strip(b" "), stored.strip(b" ")
    if (
        block[156] not in b"0\0"
        or block[345]
        or name.endswith(b"/")
        or not _OCTAL.fullmatch(size)
        or not _OCTAL.fullmatch(stored)
        or sum(block) - sum(block[148:156]) + 8 * ord(" ") != int(stored, 8)
    ):
        return None
    return block[156:157], name.decode("utf-8", "surrogateescape"), int(size, 8)


def _header(block: bytes) -> tuple[bytes, str, int]:
    """(type, name, size) of any header. Raises tarfile.HeaderError."""
    header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    return header.type, header.name, header.size


def _verdict(kind: bytes, name: str, pax: dict[str, str], cut: bool) -> str:
    if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        return "refused-link"
    sparse = kind == tarfile.GNUTYPE_SPARSE or "GNU.sparse.major" in pax
    if kind not in tarfile.REGULAR_TYPES or sparse:
        return "refused-type"
    unsafe = name.startswith("/") or ".." in name.split("/") or "\0" in name
    if unsafe or len(name) > _MAX_NAME:
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
