"""Captions from files, matched to pictures by name.

Text alignment (CLIP score, R-precision) needs the caption of every picture, and a list shifted by
one gives numbers that look right. So captions and pictures are matched by name only, and a caption
or picture without its counterpart is an error.
"""

import csv
import io
import json
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from unclip.errors import ConfigError, DataError
from unclip.input.samples import BadSample
from unclip.measure.picture_set import PictureSet

MAX_BYTES = 256 << 20
NAMES = ("file", "name", "file_name", "filename", "image", "key")
CAPTIONS = ("caption", "captions", "text", "prompt")
_SHOWN = 8


def read_captions(path: str | os.PathLike) -> dict[str, list[str]]:
    """{name: captions} of a file.

    Args:
      path: `.jsonl`, an object per line with a name (one of `NAMES`) and a caption (one of
        `CAPTIONS`); `.csv` or `.tsv` with such a header; `.json`, {name: caption or list of
        captions} or COCO's {"images": …, "annotations": …}. A name may come several times.

    Raises:
      DataError: it cannot be read, or holds none. ConfigError: another kind of file.
    """
    path = pathlib.Path(path)
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _table, ".tsv": _table}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"captions {path}: expected {', '.join(readers)}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"captions {path}: larger than {MAX_BYTES} bytes")
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"captions {path}: cannot be read: {error}") from error
    found: dict[str, list[str]] = {}
    for name, value in readers[path.suffix.lower()](path, text):
        values = value if isinstance(value, list) else [value]
        if not name or not values or not all(isinstance(v, str) and v.strip() for v in values):
            raise DataError(
                f"captions {path}: {name!r} has the caption {value!r}; expected a text "
                "or a list of texts"
            )
        found.setdefault(name, []).extend(v.strip() for v in values)
    if not found:
        raise DataError(f"captions {path}: none there")
    return found


def _jsonl(path, text):
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _pair(_parse(path, line, f"line {number}"), f"{path} line {number}")


def _json(path, text):
    value = _parse(path, text, "whole file")
    if isinstance(value.get("images"), list) and isinstance(value.get("annotations"), list):
        try:
            names = {row["id"]: row["file_name"] for row in value["images"]}
            return [(names[row["image_id"]], row["caption"]) for row in value["annotations"]]
        except (LookupError, TypeError) as error:
            raise DataError(f"captions {path}: COCO layout, but {error} is missing") from error
    return value.items()


def _parse(path, text, where) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"captions {path}, {where}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"captions {path}, {where}: expected an object")
    return value


def _table(path, text):
    dialect = {"delimiter": "\t"} if path.suffix.lower() == ".tsv" else {}
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), **dialect))
    except csv.Error as error:
        raise DataError(f"captions {path}: {error}") from error
    return [_pair(row, f"{path} row {number}") for number, row in enumerate(rows, 2)]


def _pair(row: Mapping[str, Any], where: str) -> tuple[str, Any]:
    name = next((row[field] for field in NAMES if row.get(field)), None)
    caption = next((row[field] for field in CAPTIONS if row.get(field)), None)
    if not isinstance(name, str) or caption is None:
        raise DataError(
            f"captions {where}: expected a name ({', '.join(NAMES)}) and a caption "
            f"({', '.join(CAPTIONS)}); there is {', '.join(map(str, row))}"
        )
    return name, caption


def match(
    captions: Mapping[str, Sequence[str]], pictures: PictureSet, what: str
) -> list[list[str]]:
    """The captions of every picture, in the set's order.

    A name matches with or without the picture's extension.

    Args:
      captions: {name: captions}; pictures: N of them; what: where the captions are from.

    Raises:
      ConfigError: a picture without caption or a caption without picture; names of both.
    """
    names = [pictures.name(i) for i in range(len(pictures))]
    stems = [os.path.splitext(name)[0] for name in names]
    twice = {stem for stem, count in Counter(stems).items() if count > 1}
    found = [
        captions.get(name) or (None if stem in twice else captions.get(stem))
        for name, stem in zip(names, stems)
    ]
    if all(found) and len(captions) == len(names):
        return [list(texts) for texts in found]
    bare = [name for name, texts in zip(names, found) if not texts]
    spare = sorted(captions.keys() - set(names) - (set(stems) - twice))
    unmatched = " and ".join(
        f"{len(some)} {kind} ({', '.join(some[:_SHOWN])}{', …' if len(some) > _SHOWN else ''})"
        for some, kind in ((bare, "pictures without caption"), (spare, "captions without picture"))
        if some
    )
    raise ConfigError(
        f"{what} and {pictures.source} do not match by name: "
        f"{unmatched or 'some pictures have captions by two names'}"
    )


def own(pictures: PictureSet) -> list[list[str]] | None:
    """The captions that a set itself has, or None where no picture has one.

    Raises:
      ConfigError: some pictures have one and others not. DataError: one cannot be read.
    """
    try:
        found = [pictures.caption(i) for i in range(len(pictures))]
    except BadSample as error:
        reason = ": ".join(str(error).splitlines())
        raise DataError(f"{pictures.source}: a caption cannot be read: {reason}") from error
    if not any(found):
        return None
    bare = [pictures.name(i) for i, text in enumerate(found) if not text]
    if bare:
        more = ", …" if len(bare) > _SHOWN else ""
        raise ConfigError(
            f"{pictures.source}: {len(bare)} of {len(found)} pictures have no "
            f"caption: {', '.join(bare[:_SHOWN])}{more}"
        )
    return [[text] for text in found]
