"""Files of captions: tables and JSON, read strictly, each problem under the number of its row.

Text metrics and protocols read captions here, so that a file means the same to both. A caption
that is cut at a comma, or a row that a stray quote has swallowed, gives numbers that look right:
whatever has two readings is refused, and all problems of a file are told at once.

    .csv           a header, commas, quotes as in RFC 4180
    .tsv           a header, tabs, no quoting at all
    .jsonl         an object a line; lines end at the line feed alone
    .json          a list of such objects, or {name: caption or captions}
    .json          COCO's {"images", "annotations"}, or Karpathy's {"images": [{"sentences"}]}
"""

import csv
import dataclasses
import io
import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from unclip import files
from unclip.errors import ConfigError, DataError

MAX_BYTES = 256 << 20  # COCO's own have 32 MB
# What the columns may be called. Of several names of the picture the first here is taken.
NAMES = (
    "file", "name", "file_name", "filename", "filepath", "image", "key", "image_id", "cocoid",
)  # fmt: skip
CAPTIONS = ("caption", "captions", "text", "prompt")
TITLE = "title"  # the caption in OpenCLIP's tables; elsewhere a title stands beside a caption
EXPECTED = f"; expected a name ({', '.join(NAMES)}) and a caption ({', '.join((*CAPTIONS, TITLE))})"
KINDS = (".jsonl", ".json", ".csv", ".tsv")
_SHOWN, _LISTED = 8, 200  # problems in the line, and in the table below it


class _Problem(str):
    """What is wrong with a row, in its place."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A picture's name and captions, stripped, without line breaks.

    Attributes:
      where: the place in the file, for messages: "row 3", "line 2", "entry 5".
    """

    where: str
    name: str
    captions: list[str]


@dataclasses.dataclass(frozen=True)
class Image:
    """An image of COCO's or Karpathy's layout.

    Attributes:
      id: int where it is a number or the text of one; None where there is none.
      file: its file's name; None where it has none. folder: Karpathy's `filepath`, or "".
      captions: (number of the annotation or None, text) in the file's order. White space inside a
        text is one space: annotators left line breaks in COCO's captions.
    """

    id: int | str | None
    file: str | None
    folder: str
    captions: list[tuple[Any, str]]


def read_rows(
    path: str | os.PathLike, names: Sequence[str] = NAMES, kinds: Sequence[str] = KINDS
) -> list[Row]:
    """The rows of a file of any kind but COCO's and Karpathy's layouts, in its order.

    Args:
      names: the columns that may name the picture, the first that is there being taken.
      kinds: the suffixes that are read.

    Raises:
      ConfigError: another kind of file.
      DataError: it cannot be read, holds no row, or rows are wrong: too many or too few fields, no
        name, an empty caption, a line break in one, the same row twice. A table lists them.
    """
    value = _opened(path, kinds)
    if isinstance(value, dict) and _is_layout(value):
        raise ConfigError(f"captions {path}: COCO's layout; expected a list of pictures")
    return _rows(path, value, names)


def read_images(path: str | os.PathLike) -> list[Image]:
    """The images of a file in COCO's or Karpathy's layout.

    Raises:
      ConfigError: another kind of file. DataError: unreadable, another layout, an id that comes
        twice, an annotation of an image that is not listed. A table lists them.
    """
    value = _opened(path, (".json",))
    if not isinstance(value, dict) or not _is_layout(value):
        raise DataError(
            f'captions {path}: not in the layout of COCO\'s captions_val2014.json ("images", '
            '"annotations") or of Karpathy\'s ("images" with "sentences")'
        )
    return _images(path, value)


def read(path: str | os.PathLike) -> list[Row] | list[Image]:
    """`read_images` of a file in one of these layouts, else `read_rows`."""
    value = _opened(path, KINDS)
    if isinstance(value, dict) and _is_layout(value):
        return _images(path, value)
    return _rows(path, value, NAMES)


def refuse(path: str | os.PathLike, problems: Sequence[str], hint: str = "") -> None:
    """Raises DataError with all problems of a file, the first of them in its line; [] is none."""
    if problems:
        more = f"; … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        table = "\n".join(f"  {one}" for one in problems[:_LISTED]) if more else ""
        raise DataError(f"captions {path}: {'; '.join(problems[:_SHOWN])}{more}{hint}", table)


def twice(what: str, values: Iterable[Any]) -> list[str]:
    """[] where all values differ, else one line that names those that come more than once."""
    found = [value for value, count in Counter(values).items() if count > 1]
    shown = ", ".join(map(str, found[:_SHOWN]))
    more = ", …" if len(found) > _SHOWN else ""
    return [f"{len(found)} {what} come more than once: {shown}{more}"] if found else []


# ============================================================ text


def _opened(path, kinds) -> Any:
    """The value of a JSON file; [(where, {field: value} or a problem)] of the others."""
    path = pathlib.Path(path)
    kind = path.suffix.lower()
    if kind not in kinds:
        listed = f"{', '.join(kinds[:-1])} or {kinds[-1]}" if len(kinds) > 1 else kinds[0]
        raise ConfigError(f"captions {path}: expected {listed}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"captions {path}: larger than {MAX_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"captions {path}: cannot be read: {error.strerror or error}") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"captions {path}: UTF-16; expected UTF-8: save it so")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"captions {path}: cannot be read: byte {data[error.start]:#04x} at position "
            f"{error.start} is not UTF-8; save the file as UTF-8"
        ) from error
    if kind == ".json":
        value = _parsed(text)
        if isinstance(value, _Problem):
            what = files.mistaken(data[:512]) or value
            raise DataError(f"captions {path}: {what}")
        return value
    return list({".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl}[kind](path, text))


def _parsed(text: str) -> Any:
    """The value of a JSON text, or what is wrong with it."""

    def once(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            name = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
            raise KeyError(name)
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        return _Problem(f"not JSON ({error})")
    except KeyError as error:
        return _Problem(f"{error} comes more than once in one object")


def _jsonl(path, text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines: U+2028, U+0085 and others may stand in a JSON text as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parsed(line)


def _csv(path, text: str) -> Iterator[tuple[str, Any]]:
    records, begin, cut = [], 1, []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for fields in reader:
            records.append((begin, fields))
            begin = reader.line_num + 1
    except csv.Error as error:
        what = _Problem(f"{error}: is a quote opened and not closed there?")
        cut = [(f"row {begin}", what)]
    yield from _table(path, records, ",")
    yield from cut


def _tsv(path, text: str) -> Iterator[tuple[str, Any]]:
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    records = [(n, line.split("\t")) for n, line in enumerate(lines, 1) if line]
    problems = [
        f'row {number}: {field[:40]} is quoted as in CSV (with ""), but a .tsv has no quoting: '
        "write the text as it is, or a .csv"
        for number, fields in records
        for field in fields
        if field.startswith('"') and field.endswith('"') and '""' in field[1:-1]
    ]
    refuse(path, problems)
    return _table(path, records, "\t")


def _table(path, records: list[tuple[int, list[str]]], delimiter: str) -> Iterator[tuple[str, Any]]:
    """(where, {column: field}) of the rows below the header; rows are numbered as lines are."""
    records = [(number, fields) for number, fields in records if fields]
    if not records:
        return
    number, header = records[0]
    header = [field.strip().lower() for field in header]
    known = (*NAMES, *CAPTIONS, TITLE)
    for other, called in ((",", "commas"), (";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        columns = [field.strip().lower() for field in delimiter.join(header).split(other)]
        if other != delimiter and not {*header} & {*known} and len({*columns} & {*known}) > 1:
            expected = "commas" if delimiter == "," else "tabs"
            raise DataError(
                f"captions {path}: row {number}: its columns are divided by {called}; expected "
                f"{expected}, as its name says"
            )
    refuse(path, twice("columns", [field for field in header if field in known]))
    lacks = _lacks(header, NAMES)
    if lacks:
        refuse(
            path, [f"row {number}: {lacks} in the header, which is {', '.join(header)}"], EXPECTED
        )
    for number, fields in records[1:]:
        if len(fields) == len(header):
            yield f"row {number}", dict(zip(header, fields))
            continue
        hint = ""
        if len(fields) > len(header) and delimiter == ",":
            hint = " (a caption with a comma is put in quotes)"
        count = f"{len(fields)} field{'s' if len(fields) > 1 else ''}"
        yield f"row {number}", _Problem(f"{count}, the header has {len(header)}{hint}")


# ============================================================ rows


def _rows(path, value: Any, names: Sequence[str]) -> list[Row]:
    if isinstance(value, dict):
        found = [_checked(repr(name), name, caption) for name, caption in value.items()]
    elif isinstance(value, list):
        if pathlib.Path(path).suffix.lower() == ".json":
            value = [(f"entry {number}", row) for number, row in enumerate(value, 1)]
        found = [_row(where, row, names) for where, row in value]
    else:
        raise DataError(f"captions {path}: expected an object or a list of objects")
    problems = [one for one in found if isinstance(one, str)]
    rows = [one for one in found if isinstance(one, Row)]
    seen: dict[tuple, str] = {}
    for row in rows:
        same = seen.setdefault((row.name, *row.captions), row.where)
        if same != row.where:
            problems.append(f"{row.where} repeats {same}")
    columns = any(" there is " in problem for problem in problems)
    refuse(path, problems, EXPECTED if columns else "")
    if not rows:
        raise DataError(f"captions {path}: none there")
    return rows


def _row(where: str, row: Any, names: Sequence[str]) -> Row | str:
    """A row, or what is wrong with it."""
    if isinstance(row, _Problem):
        return f"{where}: {row}"
    if not isinstance(row, dict):
        return f"{where}: expected an object with a name and a caption"
    given, row = row, {str(field).strip().lower(): value for field, value in row.items()}
    if len(row) < len(given):
        return f"{where}: two fields of one name; there is {', '.join(map(str, given))}"
    name = next((row[field] for field in names if row.get(field) not in (None, "")), None)
    fields = [field for field in CAPTIONS if field in row] or [f for f in (TITLE,) if f in row]
    lacks = _lacks(row, names)
    if lacks:
        return f"{where}: {lacks}, there is {', '.join(given) or 'nothing'}"
    if name is None:
        return f"{where}: the name is empty"
    if len({json.dumps(row[field]) for field in fields}) > 1:
        return f"{where}: {' and '.join(map(repr, fields))} differ; expected one caption"
    return _checked(where, name, row[fields[0]])


def _lacks(fields: Iterable[str], names: Sequence[str]) -> str:
    """ "no name", "no caption" or both, where none of the fields is one."""
    missing = {"no name": names, "no caption": (*CAPTIONS, TITLE)}
    return " and ".join(what for what, known in missing.items() if not {*fields} & {*known})


def _checked(where: str, name: Any, caption: Any) -> Row | str:
    if isinstance(name, bool) or not isinstance(name, str | int):
        return f"{where}: the name is {str(name)[:60]!r}; expected a text"
    name, texts = str(name).strip(), caption if isinstance(caption, list) else [caption]
    if not name:
        return f"{where}: the name is empty"
    for text in texts or [None]:
        if text is None or (isinstance(text, str) and not text.strip()):
            return f"{where}: the caption is empty"
        if not isinstance(text, str):
            return f"{where}: the caption is {str(text)[:60]}; expected a text or a list of texts"
        if any(end in text.strip() for end in "\r\n"):
            return (
                f"{where}: the caption has a line break: {text.strip()[:40]!r}…; expected one line"
            )
    return Row(where, name, [text.strip() for text in texts])


# ============================================================ COCO's and Karpathy's layouts


def _is_layout(value: dict) -> bool:
    return isinstance(value.get("images"), list)


def _images(path, value: dict) -> list[Image]:
    images, annotations = value["images"], value.get("annotations")
    karpathy = any(isinstance(row, dict) and "sentences" in row for row in images)
    if not karpathy and not isinstance(annotations, list):
        raise DataError(
            f'captions {path}: "images" without "annotations" (COCO) and without "sentences" '
            "(Karpathy): no captions there"
        )
    problems: list[str] = []
    found = []
    for number, row in enumerate(images, 1):
        place = f"image {number}"
        if not isinstance(row, dict):
            problems.append(f"{place}: expected an object")
            continue
        id = next((row[field] for field in ("id", "cocoid", "imgid") if field in row), None)
        file = next(
            (row[f] for f in ("file_name", "filename") if isinstance(row.get(f), str)), None
        )
        texts = []
        if karpathy:
            sentences = row.get("sentences")
            sound = isinstance(sentences, list) and all(
                isinstance(one, dict) and isinstance(one.get("raw"), str) for one in sentences
            )
            if not sound:
                problems.append(f'{place}: expected "sentences", each with a "raw" text')
                continue
            texts = [(one.get("sentid"), " ".join(one["raw"].split())) for one in sentences]
        folder = row["filepath"] if isinstance(row.get("filepath"), str) else ""
        found.append(Image(_number(id), file, folder, texts))
        if not karpathy and id is None:
            problems.append(f"{place} has no 'id'")
    refuse(path, problems)
    problems += twice("image ids", [image.id for image in found if image.id is not None])
    if not karpathy:
        problems += _annotated(found, annotations)
    refuse(path, problems)
    if not found:
        raise DataError(f"captions {path}: none there")
    return found


def _annotated(images: list[Image], annotations: list) -> list[str]:
    """Gives COCO's annotations to their images; what is wrong with them."""
    problems, ids = [], []
    if annotations and not any(isinstance(row, dict) and "caption" in row for row in annotations):
        return ["its annotations have no 'caption': expected COCO's captions_….json"]
    by_id = {image.id: image for image in images}
    for number, row in enumerate(annotations, 1):
        place = f"annotation {number}"
        lacks = [f for f in ("image_id", "caption") if not isinstance(row, dict) or f not in row]
        if lacks:
            problems.append(f"{place} has no {' and no '.join(map(repr, lacks))}")
        elif not isinstance(row["caption"], str):
            problems.append(f"{place}: the caption is {str(row['caption'])[:60]}; expected a text")
        elif _number(row["image_id"]) not in by_id:
            problems.append(f"{place} is of image {row['image_id']}, which is not listed")
        else:
            ids += [_number(row["id"])] if "id" in row else []
            text = " ".join(row["caption"].split())
            by_id[_number(row["image_id"])].captions.append((_number(row.get("id")), text))
    return problems + twice("annotation ids", ids)


def _number(id: Any) -> int | str | None:
    """An id, which files give as a number or as its text."""
    if isinstance(id, float) and id.is_integer():
        return int(id)
    if isinstance(id, str) and id.strip().isascii() and id.strip().isdigit():
        return int(id)
    return id if isinstance(id, int | str) else None
