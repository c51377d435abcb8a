"""Pictures for benchmarks whose judges run elsewhere: GenEval and T2I-CompBench.

Both judge binding, counting and relations with detectors and question-answering models of their
own. Here their prompt files are read and the folders that their programs expect are written:

    GenEval        OUT/00000/metadata.jsonl, OUT/00000/samples/0000.png, ... 4 pictures per prompt
    T2I-CompBench  OUT/samples/PROMPT_000000.png, ... 10 per prompt, numbered consecutively

A prompt file comes from outside: sizes are limited, and a prompt that cannot be a file name where
it has to be one is refused.
"""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from unclip import errors
from unclip.files import images, replacing
from unclip.protocols import base

MAX_BYTES = 16 << 20  # of a prompt file
MAX_PROMPTS = 100_000
MAX_PROMPT_CHARS = 2000
MAX_NAME_BYTES = 255  # of a file, on the file systems in use
MAX_PICTURES = 1000  # a prompt
SIZE = 256  # which ids leave out
# Characters that would lead out of the folder or are not allowed in a name, and "_", at which
# T2I-CompBench cuts the prompt off.
_NO_NAME = re.compile(r"[\x00-\x1f\x7f/\\_]")


class _Export(base.EvaluationProtocol):
    """A prompt file, every prompt drawn `pictures` times; the judge runs elsewhere.

    Subclasses place row `row` in `path(row)` below the folder that `export` writes.
    """

    def __init__(self, id: str, source: str, prompts: list[str], pictures: int, size: int):
        if not 1 <= pictures <= MAX_PICTURES:
            raise errors.ConfigError(
                f"{id}: {pictures} pictures per prompt, expected 1 to {MAX_PICTURES}"
            )
        if not 16 <= size <= 4096:
            raise errors.ConfigError(f"{id}: size {size}, expected 16 to 4096 pixels")
        self.pictures = pictures
        numbers = [(i, k) for i in range(len(prompts)) for k in range(pictures)]
        super().__init__(
            f"{id}-{base.content(prompts)[:8]}.x{pictures}{'' if size == SIZE else f'.size{size}'}",
            [prompts[i] for i, _ in numbers],
            [f"{i:05d}-{k:04d}" for i, k in numbers],
            size,
            {"prompt_file": os.path.basename(source), "prompts": len(prompts)},
        )

    def path(self, row: int) -> pathlib.PurePosixPath:
        """Where the picture of a row lies below the exported folder."""
        raise NotImplementedError

    def export(
        self,
        out: str | os.PathLike,
        pictures: Iterable[np.ndarray],
        keys: Sequence[str] | None = None,
    ) -> list[pathlib.Path]:
        """Writes pictures in the benchmark's layout.

        Args:
          out: the folder; made when missing, files of the same name are replaced.
          pictures: uint8 [H, W, 3] each, at the model's own size; may be a generator.
          keys: which rows they are, one per picture; None: all, in order.

        Returns:
          The paths of the pictures.

        Raises:
          ConfigError: an unknown key, or another number of pictures than keys.
          DataError: a file cannot be written.
        """
        rows = {key: row for row, key in enumerate(self.keys)}
        keys = self.keys if keys is None else list(keys)
        for key in keys:
            if key not in rows:
                raise errors.unknown(f"key of {self.id}", key, self.keys)
        out, written = pathlib.Path(out), []
        for number, picture in enumerate(pictures):
            if number == len(keys):
                raise errors.ConfigError(f"{self.id}: more than {len(keys)} pictures for the keys")
            row = rows[keys[number]]
            written.append(out / self.path(row))
            self._beside(out, row)
            images.write_png(written[-1], picture)
        if len(written) != len(keys):
            raise errors.ConfigError(f"{self.id}: {len(written)} pictures for {len(keys)} keys")
        return written

    def _beside(self, out: pathlib.Path, row: int) -> None:
        """Writes the files that belong beside the picture of a row."""


class GenEval(_Export):
    """GenEval's prompts (`evaluation_metadata.jsonl`).

    Args:
      prompts: the file; an object per line with "prompt", "tag" and "include", as in GenEval.
      pictures: per prompt; the benchmark uses 4.
      size: only for metrics computed beside it; pictures are exported as drawn.

    Raises:
      DataError: unreadable, too large, or a line in another layout.
    """

    def __init__(self, prompts: str | None = None, pictures: int = 4, size: int = SIZE):
        self._metadata = read_geneval(prompts)
        texts = [_parsed(line)["prompt"].strip() for line in self._metadata]
        super().__init__("geneval", prompts, texts, pictures, size)

    def path(self, row: int) -> pathlib.PurePosixPath:
        """ "00000/samples/0000.png": prompt, picture."""
        prompt, picture = divmod(row, self.pictures)
        return pathlib.PurePosixPath(f"{prompt:05d}", "samples", f"{picture:04d}.png")

    def _beside(self, out, row):
        if row % self.pictures == 0:
            prompt = row // self.pictures
            with replacing(out / f"{prompt:05d}" / "metadata.jsonl") as temporary:
                temporary.write_text(self._metadata[prompt] + "\n", "utf-8")


class T2ICompBench(_Export):
    """T2I-CompBench's prompts (`color_val.txt`, `spatial_val.txt`, ...).

    Args:
      prompts: the file, a prompt per line.
      pictures: per prompt; the benchmark uses 10.
      size: as in `GenEval`.

    Raises:
      DataError: unreadable, too large, or a prompt that cannot be a file name.
    """

    def __init__(self, prompts: str | None = None, pictures: int = 10, size: int = SIZE):
        super().__init__("t2i-compbench", prompts, read_t2i_compbench(prompts), pictures, size)

    def path(self, row: int) -> pathlib.PurePosixPath:
        """ "samples/PROMPT_000000.png", numbered consecutively: its judges sort by the number."""
        return pathlib.PurePosixPath("samples", f"{self.prompts[row]}_{row:06d}.png")


def read_geneval(path: str | os.PathLike) -> list[str]:
    """The lines of GenEval's prompt file, checked and unchanged.

    Raises:
      DataError: as in `GenEval`.
    """
    lines = [(number, line.strip()) for number, line in enumerate(_lines(path), 1)]
    lines = [(number, line) for number, line in lines if line]
    for number, line in lines:
        record = _parsed(line)
        where = f"{path} line {number}"
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise errors.DataError(f'{where}: expected an object with "prompt", given {line[:60]}')
        if not isinstance(record.get("tag"), str) or not isinstance(record.get("include"), list):
            raise errors.DataError(
                f'{where}: GenEval scores by "tag" and "include"; there is {", ".join(record)}'
            )
        _checked(record["prompt"].strip(), where)
    return [line for _, line in _counted(lines, path)]


def read_t2i_compbench(path: str | os.PathLike) -> list[str]:
    """The prompts of a T2I-CompBench file, without line ends.

    Raises:
      DataError: as in `T2ICompBench`.
    """
    lines = [(number, line.strip()) for number, line in enumerate(_lines(path), 1)]
    lines = [(number, line) for number, line in lines if line]
    for number, line in lines:
        where = f"{path} line {number}"
        _checked(line, where)
        bad = _NO_NAME.search(line)
        if bad or line.startswith("."):
            raise errors.DataError(
                f"{where}: {line[:60]!r} has {bad[0] if bad else '.'!r}, but the benchmark makes "
                "prompts into file names; expected none of / \\ _ and no leading ."
            )
        if len(f"{line}_000000.png".encode()) > MAX_NAME_BYTES:
            raise errors.DataError(f"{where}: too long for a file name: {line[:60]!r}…")
    return [line for _, line in _counted(lines, path)]


def _lines(path: str | os.PathLike) -> list[str]:
    try:
        if os.stat(path).st_size > MAX_BYTES:
            raise errors.DataError(f"{path}: larger than {MAX_BYTES} bytes")
        return pathlib.Path(path).read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise errors.DataError(f"prompts {path}: cannot be read: {error}") from error


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None  # the caller names the line


def _checked(prompt: str, where: str) -> None:
    if not prompt or len(prompt) > MAX_PROMPT_CHARS:
        raise errors.DataError(
            f"{where}: a prompt of {len(prompt)} characters, expected 1 to {MAX_PROMPT_CHARS}"
        )


def _counted(lines: list, path: str | os.PathLike) -> list:
    if not 1 <= len(lines) <= MAX_PROMPTS:
        raise errors.DataError(f"{path}: {len(lines)} prompts, expected 1 to {MAX_PROMPTS}")
    return lines
