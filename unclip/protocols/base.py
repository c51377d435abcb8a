"""The interface of every protocol, and views of picture sets that protocols share."""

import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from unclip import errors
from unclip.files import shipped
from unclip.measure.picture_set import PictureSet, content_hash
from unclip.measure.table import NAMED

EMOJI = shipped.path("data", "emoji")


class EvaluationProtocol:
    """Rows to draw, each with a caption and a key, and what the drawings are measured against.

    Attributes:
      id: part of every metric's key; contains all choices that change a number.
      prompts: the caption of every row.
      keys: the name of every row, unique; as a file name below a folder it is safe.
      size: side in pixels at which pictures are compared.
      provenance: JSON-able: hashes of lists, counts, seeds.
      mode: "text" (prompts through the cascade), "variations" or "reconstruct" (pictures of the
        protocol through the decoder, see `draw`).
      named: of `measure.table.NAMED`, what the id identifies, so that keys need not say it again.
      by_clip: last words of the judge's measures that the model's own CLIP decides; their keys name
        it.
    """

    mode = "text"
    named = NAMED
    by_clip: tuple[str, ...] = ()

    def __init__(
        self, id: str, prompts: Sequence[str], keys: Sequence[str], size: int, provenance: dict
    ):
        self.id, self.prompts, self.keys, self.size = id, list(prompts), list(keys), size
        self.provenance = {
            "protocol": id,
            "rows": len(self.prompts),
            "captions_sha256": captions_hash(self.keys, self.prompts),
            **provenance,
        }

    def reference(self) -> PictureSet | None:
        """The real pictures at `size`, or None where the protocol has none."""
        return None

    def draw(
        self,
        model: Any,
        seeds: Sequence[int],
        settings: dict | None = None,
        rows: Sequence[int] | None = None,
    ) -> Any:
        """Draws rows with a model.

        Args:
          model: `pipeline.UnCLIP`.
          seeds: one per drawn row.
          settings: keyword arguments of `UnCLIP.generate`: prior, decoder, upsamplers, stages, ...
          rows: numbers of the rows; None: all.

        Returns:
          `pipeline.Pictures`, one per row in the order given, at the model's own size.

        Raises:
          ConfigError: a part that the model lacks, or a setting that does not exist.
        """
        rows = self._rows(rows, seeds)
        return model.generate(
            [self.prompts[row] for row in rows], seed=list(seeds), **(settings or {})
        )

    def judge(
        self, pictures: np.ndarray, model: Any = None, rows: Sequence[int] | None = None
    ) -> tuple[dict[str, float], list[dict]]:
        """The protocol's own numbers.

        Args:
          pictures: uint8 [n, H, W, 3], one per row; another size than `size` is resized.
          model: the `UnCLIP` that drew them, for judges that use its CLIP; may be None.
          rows: numbers of the rows; None: all.

        Returns:
          {measure: value}, {} without a judge; and a dict of facts for each picture.
        """
        return {}, []

    def _rows(self, rows: Sequence[int] | None, beside: Sequence) -> list[int]:
        """The rows asked for; ConfigError unless `beside` has one entry for each."""
        rows = range(len(self.prompts)) if rows is None else rows
        if len(rows) != len(beside):
            raise errors.ConfigError(f"{self.id}: {len(beside)} given for {len(rows)} rows")
        return [int(row) for row in rows]


def captions_hash(keys: Sequence[Any], prompts: Sequence[str]) -> str:
    """sha256 (hex) of a caption list: "KEY<tab>CAPTION<newline>" a row, UTF-8, in order."""
    digest = hashlib.sha256()
    for key, prompt in zip(keys, prompts, strict=True):
        digest.update(f"{key}\t{prompt}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def mark(given: str, shipped: str) -> str:
    """What stands behind a name in an id where content is not the shipped one: "-1a2b3c4d".

    Args:
      given, shipped: hashes (hex) of the content that is used, and of what comes with unclip.
    """
    return "" if given == shipped else f"-{given[:8]}"


def content(prompts: Sequence[str], *pictures: PictureSet) -> str:
    """sha256 (hex) of captions and sets of pictures, whatever their names."""
    digest = hashlib.sha256(captions_hash(range(len(prompts)), prompts).encode())
    for one in pictures:
        digest.update(content_hash(one).encode())
    return digest.hexdigest()


def folder_mark(folder: str | os.PathLike | None) -> str:
    """`mark` of a folder of emoji shards, by its files' bytes; None is that of data/emoji."""
    if folder is None or pathlib.Path(folder).resolve() == EMOJI.resolve():
        return ""
    hashes = []
    for place in (pathlib.Path(folder), EMOJI):
        digest = hashlib.sha256()
        for path in sorted(place.glob("train-*.tar")):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        hashes.append(digest.hexdigest())
    return mark(*hashes)


def resized(pictures: np.ndarray, size: int) -> np.ndarray:
    """uint8 [n, size, size, 3]: averaged over areas to shrink, bicubic to enlarge.

    Raises:
      ConfigError: not uint8 [n, H, H, 3].
    """
    shape = pictures.shape
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or shape[3] != 3 or shape[1] != shape[2]:
        raise errors.ConfigError(
            f"pictures to judge are uint8 [n, H, H, 3], given {pictures.dtype} {list(shape)}"
        )
    if shape[1] == size:
        return pictures
    filter = Image.Resampling.BOX if shape[1] > size else Image.Resampling.BICUBIC
    small = [np.array(Image.fromarray(p).resize((size, size), filter)) for p in pictures]
    return np.stack(small) if small else np.zeros((0, size, size, 3), np.uint8)


class Chosen(PictureSet):
    """Some pictures of a set in a chosen order, under names and captions of the protocol."""

    def __init__(
        self,
        base: PictureSet,
        numbers: Sequence[int],
        names: Sequence[str],
        captions: Sequence[str],
    ):
        super().__init__(base.source, len(numbers))
        self.base, self._numbers, self._names, self._captions = base, numbers, names, captions

    def name(self, i: int) -> str:
        """The protocol's key."""
        return self._names[i]

    def caption(self, i: int) -> str:
        """The protocol's caption."""
        return self._captions[i]

    def digest(self, i: int, *, read: bool = True) -> str | None:
        """Of the picture chosen."""
        return self.base.digest(self._numbers[i], read=read)

    @property
    def fingerprint(self) -> str:
        """Which pictures of which set."""
        lines = [self.base.fingerprint, *map(str, self._numbers)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _load(self, i):
        number = self._numbers[i]
        return self.base.read(number), self.base.notes[number]
