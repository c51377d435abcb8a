"""Files that appear whole or not at all, and JSON objects that are read within limits."""

import contextlib
import json
import os
import pathlib
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

from unclip import errors

MAX_JSON_BYTES = 64 << 20
_STRAY = re.compile(r"\..*\.[0-9a-f]{12}\.tmp")  # as `replacing` names them
# What a file is that was expected to be another, by its first bytes, in lower case.
_MISTAKEN = {
    b"version http": "a Git LFS pointer, not the file: fetch the file itself",
    b"<!doctype": "a web page: the download went wrong",
    b"<html": "a web page: the download went wrong",
    b"<head": "a web page: the download went wrong",
    b"<?xml": "an XML answer of a server: the download went wrong",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"\x89hdf": "an HDF5 file",
}


def mistaken(head: bytes) -> str | None:
    """What a file is that is no such file as expected, or None where nothing is known of it.

    Args:
      head: its first 512 bytes, or all where it has fewer.
    """
    if not head:
        return "empty, 0 bytes: the download went wrong"
    if not head.strip(b"\0"):
        return "nothing but zeros at its beginning: the download was cut off"
    plain = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for start, what in _MISTAKEN.items() if plain.startswith(start)), None)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path` that replaces it, atomically, when the block succeeds.

    Readers see the old file or the new one, never a part of either, also after a power cut. The
    folder is made when missing. An `OSError` in the block (disk full, read-only, no permission)
    becomes a one-line `DataError`, and the temporary file is removed.
    """
    path = pathlib.Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile: its files are readable by their owner alone, other new files are not.
        name = path.parent / f".{path.name[:64]}.{secrets.token_hex(6)}.tmp"
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        temporary = name
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        _sync(path.parent)
    except OSError as error:
        raise errors.DataError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _sync(folder: pathlib.Path) -> None:
    """Has a folder's names on disk itself, where its file system can."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(number)
    finally:
        os.close(number)


def remove_strays(folder: str | os.PathLike) -> None:
    """Removes the temporary files that killed jobs left in a folder.

    Those younger than an hour may be another job's that is alive, and stay.
    """
    for path in pathlib.Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if _STRAY.fullmatch(path.name) and time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def read_object(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `max_bytes`.

    Raises:
      DataError: missing, too large, or not a JSON object.
    """
    path = pathlib.Path(path)
    try:
        if path.stat().st_size > max_bytes:
            raise errors.DataError(f"{path} is larger than {max_bytes} bytes")
        data = path.read_bytes()
        found = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise errors.DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        what = mistaken(data[:512])
        line = f"{path} is {what}" if what else f"{path} is damaged, no JSON: {error}"
        raise errors.DataError(line) from error
    if not isinstance(found, dict):
        raise errors.DataError(f"{path} is damaged: expected a JSON object")
    return found


def write_object(path: str | os.PathLike, found: Mapping[str, Any]) -> None:
    """Writes what `read_object` reads, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
