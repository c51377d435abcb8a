"""Checksums of a checkpoint's files: taken once a step is whole, compared before it is trusted.

`<directory>/sums/<step>.json` holds the size and CRC-32 of every file of a step, since the array
format does not detect a flipped bit, and a CRC-32 of its own. While a step is being saved there is
`<step>.pending`: a whole step with neither has lost its sums, and nothing speaks for its files.
"""

import concurrent.futures
import json
import os
import pathlib
import zlib
from collections.abc import Iterable

from unclip import files
from unclip.errors import DataError

SMALL_BYTES = 1 << 20  # descriptions are smaller, arrays are not; these are read twice
_THREADS = 4  # CRC-32 runs outside Python's lock

Sums = dict[str, list[int]]  # {path inside the step: [size, CRC-32]}


def _path(directory: pathlib.Path, step: int) -> pathlib.Path:
    return directory / "sums" / f"{step}.json"


def _pending(directory: pathlib.Path, step: int) -> pathlib.Path:
    return directory / "sums" / f"{step}.pending"


def _own(sums: Sums) -> int:
    return zlib.crc32(json.dumps(sums, sort_keys=True).encode())


def _of(path: pathlib.Path) -> list[int]:
    crc, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def _synced(path: pathlib.Path) -> list[int] | None:
    """Has a file, or a folder's entries, on disk itself; the sum of a file."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
    return None if path.is_dir() else _of(path)


def expect(directory: pathlib.Path, step: int) -> None:
    """Notes that a step is about to be saved.

    Raises:
      OSError: it cannot be written.
    """
    _pending(directory, step).parent.mkdir(exist_ok=True)
    _pending(directory, step).touch()


def expected(directory: pathlib.Path, step: int) -> bool:
    """Whether a step was being saved, and its sums were not taken yet, when its job died."""
    return _pending(directory, step).exists()


def take(directory: pathlib.Path, step: int) -> None:
    """Writes the sums of a step, whose files are on disk by then, so that a power cut spares them.

    Raises:
      OSError: a file cannot be read; DataError: the sums cannot be written.
    """
    folder = directory / str(step)
    paths = [*sorted(folder.rglob("*")), folder, directory]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(paths, pool.map(_synced, paths)))
    sums = {p.relative_to(folder).as_posix(): s for p, s in found.items() if s is not None}
    files.write_object(_path(directory, step), {"files": sums, "crc": _own(sums)})
    _pending(directory, step).unlink(missing_ok=True)


def read(directory: pathlib.Path, step: int) -> Sums | None:
    """The sums of a step; None where there are none, or where they are damaged themselves.

    Raises:
      OSError: they cannot be read.
    """
    path = _path(directory, step)
    try:
        found = files.read_object(path)
    except DataError as error:
        if isinstance(error.__cause__, OSError) and path.exists():
            raise error.__cause__ from None
        return None
    sums = found.get("files", found)  # without a CRC-32 of its own: of an older version
    whole = isinstance(sums, dict) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in sums.values()
    )
    if not whole or not sums or ("files" in found and found.get("crc") != _own(sums)):
        return None
    return sums


def forget(directory: pathlib.Path, kept: Iterable[int]) -> None:
    """Removes the sums of all steps but those kept."""
    kept = set(kept)
    for path in (directory / "sums").glob("*.json"):
        if path.stem.isdecimal() and int(path.stem) not in kept:
            path.unlink(missing_ok=True)


def damage(
    directory: pathlib.Path, step: int, sums: Sums, *, small: bool = False, share=(0, 1)
) -> str:
    """What is wrong with a step's files, in words; "" where nothing is.

    Args:
      small: only those of at most `SMALL_BYTES`, and whether every one is there.
      share: (i, n): every n-th file, from the i-th on.

    Raises:
      OSError: a file that is there cannot be read, which says nothing of its contents.
    """
    folder = directory / str(step)

    def compare(item) -> str:
        name, (size, crc) = item
        try:
            there = (folder / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        if there != size:
            return f"{name} has {there} bytes, expected {size}"
        if small and size > SMALL_BYTES:
            return ""
        return "" if _of(folder / name) == [size, crc] else f"{name} has other contents"

    items = sorted(sums.items())[share[0] :: share[1]]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return next(filter(None, pool.map(compare, items)), "")
