"""One pair of picture and caption as it comes from storage, and why one cannot be used.

Tars and array records alike hand out `Sample`s and raise `BadSample`; what decodes, filters and
batches them does not know where they were stored. The limits here are on bytes from outside.
"""

import json
from typing import Any, NamedTuple

from unclip.errors import DataError

PICTURES = ("webp", "jpg", "jpeg", "png")  # in order of preference where a key has several
MAX_PICTURE_BYTES = 64 << 20
MAX_TEXT_BYTES = 1 << 20


def hidden(path: str) -> bool:
    """Whether a relative path, with "/", is hidden: a file or folder on it begins with a dot.

    Editors and systems keep copies and notes there (.ipynb_checkpoints, ._NAME, __MACOSX), which
    have the names of pictures.
    """
    if not (path.startswith((".", "_")) or "/." in path or "/_" in path):
        return False  # at once: this is asked of every member of every shard
    return any(
        part == "__MACOSX" or (part.startswith(".") and part not in (".", ".."))
        for part in path.split("/")
    )


def printable(name: str) -> str:
    """A name from outside, made safe to print in reports and terminals."""
    return "".join(c if c.isprintable() else "?" for c in name[:200])


class BadSample(DataError):
    """One sample cannot be used; `reason` is a short code under which such samples are counted."""

    def __init__(self, reason: str, message: str = ""):
        super().__init__(": ".join(filter(None, (reason, message))))
        self.reason = reason


class Sample(NamedTuple):
    """One pair; `image` is the encoded picture, `text` "" where there is no caption."""

    key: str
    image: bytes
    text: str
    meta: dict[str, Any]


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object; `where` names it in errors. Raises BadSample("json") for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("json", f"{where}: not JSON") from error
    if not isinstance(value, dict):
        raise BadSample("json", f"{where}: JSON is not an object")
    return value


def caption_text(data: bytes, where: str) -> str:
    """A caption file's text. Raises BadSample("encoding") where it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("encoding", f"{where}: caption is not UTF-8") from error
