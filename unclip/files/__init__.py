"""Files that appear whole or not at all, and JSON objects that are read within limits."""

import contextlib
import json
import os
import pathlib
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from unclip import errors

MAX_JSON_BYTES = 64 << 20


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
    except OSError as error:
        raise errors.DataError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def read_object(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `max_bytes`.

    Raises:
      DataError: missing, too large, or not a JSON object.
    """
    path = pathlib.Path(path)
    try:
        if path.stat().st_size > max_bytes:
            raise errors.DataError(f"{path} is larger than {max_bytes} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise errors.DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise errors.DataError(f"{path} is damaged, no JSON: {error}") from error
    if not isinstance(found, dict):
        raise errors.DataError(f"{path} is damaged: expected a JSON object")
    return found


def write_object(path: str | os.PathLike, found: Mapping[str, Any]) -> None:
    """Writes what `read_object` reads, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
