"""Files that appear whole or not at all, for everything the project writes by itself."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator

from unclip import errors


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
        # Not tempfile: its files are private, and a result is shared as any new file would be.
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
