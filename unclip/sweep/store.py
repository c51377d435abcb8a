"""The files of a sweep: `cells/<id>.json` once a cell is measured, `cells/<id>/` for its pictures.

A record holds every setting, every metric under its full key, a score for each picture, and which
pictures to show.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from unclip import errors, files

FORMAT = 1
MAX_CELL_BYTES = 256 << 20  # a cell of 30,000 captions has about 5 MB


def cell_path(workdir: str | os.PathLike, cell_id: str) -> pathlib.Path:
    """The file of a finished cell's measurements."""
    return pathlib.Path(workdir) / "cells" / f"{cell_id}.json"


def cell_folder(workdir: str | os.PathLike, cell_id: str) -> pathlib.Path:
    """The folder of a cell's pictures, and of its lock while a job works on it."""
    return pathlib.Path(workdir) / "cells" / cell_id


def write_cell(workdir: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Writes a finished cell, atomically: the file is there whole or not at all.

    Args:
      record: "id", "settings", "values" (a list of {"metric", "key", "value"}), and more.

    Raises:
      DataError: the disk is full or cannot be written.
    """
    with files.replacing(cell_path(workdir, record["id"])) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, **record}, indent=1) + "\n")


def read_cell(path: str | os.PathLike) -> dict[str, Any]:
    """A finished cell's record.

    Raises:
      DataError: it cannot be read, or is not such a file.
    """
    path = pathlib.Path(path)
    try:
        if path.stat().st_size > MAX_CELL_BYTES:
            raise errors.DataError(f"cell {path} is larger than {MAX_CELL_BYTES >> 20} MiB")
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise errors.DataError(f"cannot read cell {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise errors.DataError(f"cell {path} is damaged: {error}; delete it") from error
    if isinstance(record, dict) and isinstance(record.get("format"), int):
        if record["format"] > FORMAT:
            raise errors.DataError(f"cell {path} was written by a newer unclip: upgrade unclip")
        values = record.get("values")
        known = isinstance(record.get("settings"), dict) and isinstance(values, list)
        if known and record.get("id") == path.stem and all(map(_is_value, values)):
            return record
    raise errors.DataError(f"cell {path} is damaged: it is not a record of {path.stem}; delete it")


def _is_value(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("metric"), str)
        and isinstance(value.get("key"), str)
        and isinstance(value.get("value"), int | float)
    )


def read_cells(workdir: str | os.PathLike) -> tuple[list[dict[str, Any]], list[str]]:
    """(records of all finished cells by id, one line about each damaged file)."""
    records, damaged = [], []
    for path in sorted(pathlib.Path(workdir, "cells").glob("*.json")):
        try:
            records.append(read_cell(path))
        except errors.DataError as error:
            damaged.append(error.message)
    return records, damaged
