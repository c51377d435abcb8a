"""A set of pictures to be measured: its interface, pictures in memory, and views of a set.

A set is N pictures with names and, where it has them, captions; `measure.pictures` opens them.
Pictures are decoded as in training, under the same limits. What a file was before it became RGB is
noted, because a Fréchet distance depends on it.
"""

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import BmpImagePlugin, Image, TiffImagePlugin

from unclip.errors import ConfigError, UnclipError
from unclip.files import picture as pictures
from unclip.input.decode import image
from unclip.input.samples import BadSample
from unclip.runtime import collectives, distributed

_PLUGINS = (BmpImagePlugin, TiffImagePlugin)  # imported once, as in `unclip.files.picture`
MAX_BYTES = 64 << 20
MAX_PIXELS = 1 << 26
GREY, ALPHA, TURNED, DEEP, LOSSY = 1, 2, 4, 8, 16
NOTES = {
    GREY: "greyscale, converted to RGB",
    ALPHA: "with transparency, laid on white (pytorch-fid and torch-fidelity drop the alpha)",
    TURNED: "turned upright by their EXIF orientation (pytorch-fid and torch-fidelity do not)",
    DEEP: "of more than 8 bits per channel, rounded to 8",
    LOSSY: "lossy (JPEG or WebP): compression itself changes a Fréchet distance",
}


class PictureSet:
    """N pictures by number; safe to read from several threads.

    Attributes:
      source: what the set is, for messages and provenance.
      notes: uint8 [N], bits of `NOTES`, set as pictures are read.
      damaged: (name, reason) of samples that the source left out before numbering.
      left_out: names of files in the source that are not pictures of the set.
      preparation: how pictures are changed before they are measured, as keys say it: "crop64".
    """

    preparation = ""

    def __init__(self, source: str, count: int):
        self.source = source
        self.notes = np.zeros(count, np.uint8)
        self.damaged: list[tuple[str, str]] = []
        self.left_out: list[str] = []
        self._digests: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.notes)

    def read(self, i: int) -> np.ndarray:
        """uint8 [H, W, 3] RGB of picture i. Raises `samples.BadSample` with the reason."""
        picture, self.notes[i] = self._load(i)
        return picture

    def greyscale(self, i: int) -> bool:
        """Whether picture i, which has been read, was stored without colour."""
        return bool(self.notes[i] & GREY)

    def name(self, i: int) -> str:
        """The name of picture i, unique in the set."""
        return f"{i:06d}"

    def caption(self, i: int) -> str | None:
        """The caption that the source itself has for picture i, or None."""
        return None

    def data(self, i: int) -> bytes:
        """The bytes that picture i is made of: encoded, or its shape and pixels."""
        picture = self.read(i)
        return f"{picture.shape}".encode() + picture.tobytes()

    def digest(self, i: int, *, read: bool = True) -> str | None:
        """sha256 (hex) of `data(i)`; with `read` False None where that was not read so far."""
        if read and i not in self._digests:
            self._note(i, self.data(i))
        return self._digests.get(i)

    def _note(self, i: int, data: bytes) -> bytes:
        self._digests[i] = hashlib.sha256(data).hexdigest()
        return data

    @property
    def fingerprint(self) -> str:
        """Hex digits that differ where the set does, as far as is seen without reading pictures."""
        return content_hash(self)

    def _load(self, i: int) -> tuple[np.ndarray, int]:
        raise NotImplementedError


def content_hash(pictures: PictureSet) -> str:
    """sha256 (hex) of a set's pictures in order and of their preparation, whatever their names.

    Every process of a job calls it. Pictures that one of them has read are not read again.
    """
    known = {i: pictures.digest(i, read=False) for i in range(len(pictures))}
    found = _shared({i: digest for i, digest in known.items() if digest is not None})
    missing = [i for i in known if i not in found]
    mine = missing[distributed.process_index() :: distributed.process_count()]

    def read(i: int) -> str:
        try:
            return pictures.digest(i)
        except BadSample as error:
            return error.reason  # in place of the picture that cannot be read

    failure, own = None, {}
    try:
        with ThreadPoolExecutor(8) as pool:
            own = dict(zip(mine, pool.map(read, mine)))
    except UnclipError as error:
        failure = error
    collectives.raise_together(failure)
    found |= _shared(own)
    lines = [pictures.preparation, *(found[i] for i in known)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _shared(own: dict[int, str]) -> dict[int, str]:
    """The digests of all processes."""
    parts = collectives.gather_objects([list(own), list(own.values())])
    return {i: digest for part in parts for i, digest in zip(*part)}


def listing_hash(pictures: PictureSet) -> str:
    """sha256 (hex) of the set's names in order: which pictures were measured."""
    digest = hashlib.sha256()
    for i in range(len(pictures)):
        digest.update(pictures.name(i).encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def describe_notes(notes: np.ndarray) -> dict[str, int]:
    """{what: how many pictures} of `PictureSet.notes`, where there are any."""
    counts = {text: int(np.count_nonzero(notes & bit)) for bit, text in NOTES.items()}
    return {text: count for text, count in counts.items() if count}


# ============================================================ one picture


def decode(data: bytes, format: str | None = None) -> tuple[np.ndarray, int]:
    """Decodes a picture under the limits of `unclip.input.decode.image`, which are checked first.

    Args:
      data: the encoded picture.
      format: None for JPEG, PNG and WebP; "BMP" or "TIFF".

    Returns:
      uint8 [H, W, 3] RGB and the bits of `NOTES`.

    Raises:
      BadPicture: with the reason.
    """
    limits = {"max_bytes": MAX_BYTES, "max_pixels": MAX_PIXELS}
    formats = (format,) if format else pictures.FORMATS
    with image.refusing(), pictures.opened(data, formats=formats, **limits) as header:
        # Before pixels are decoded: Pillow turns a TIFF then, and forgets that it was turned.
        mode = header.mode
        deep = mode == "F" or mode.startswith("I")
        notes = GREY * (deep or mode in ("1", "L", "LA", "La"))
        notes |= ALPHA * header.has_transparency_data | DEEP * deep
        # WebP says so in the name of the chunk that holds the pixels.
        lossless = header.format not in ("JPEG", "WEBP") or b"VP8L" in data[:4096]
        notes |= LOSSY * (not lossless)
        notes |= TURNED * (pictures.orientation(header) > 1)
    if format is not None:
        data, limits["max_bytes"] = _as_png(data, format, limits), 2 * MAX_BYTES
    return image.decode(data, **limits), notes


def _as_png(data: bytes, format: str, limits: dict[str, int]) -> bytes:
    """BMP and TIFF become PNG, bit for bit, so that one decoder makes RGB of everything."""
    with image.refusing(), pictures.upright(data, formats=(format,), **limits) as picture:
        plain = picture.convert("RGB") if picture.mode in ("CMYK", "YCbCr", "LAB") else picture
        file = io.BytesIO()
        plain.save(file, "PNG", compress_level=0)
        return file.getvalue()


# ============================================================ in memory, and views of a set


class ArrayPictures(PictureSet):
    """Pictures in memory.

    Args:
      pictures: uint8 [N, H, W, 3] RGB.
      names: N names; numbers when None.
      captions: N captions, or None.
    """

    def __init__(
        self,
        pictures: np.ndarray,
        names: Sequence[str] | None = None,
        captions: Sequence[str] | None = None,
        source: str = "pictures in memory",
    ):
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
            raise ConfigError(
                f"{source}: pictures are uint8 [N, H, W, 3], given "
                f"{pictures.dtype} {list(pictures.shape)}"
            )
        for what, given in (("names", names), ("captions", captions)):
            if given is not None and len(given) != len(pictures):
                raise ConfigError(f"{source}: {len(pictures)} pictures but {len(given)} {what}")
        super().__init__(source, len(pictures))
        self._pictures, self._names, self._captions = pictures, names, captions

    def name(self, i: int) -> str:
        """The name given, or the number."""
        return super().name(i) if self._names is None else self._names[i]

    def caption(self, i: int) -> str | None:
        """The caption given, or None."""
        return None if self._captions is None else self._captions[i]

    def _load(self, i):
        return np.array(self._pictures[i]), 0


class _View(PictureSet):
    """Another set's pictures, changed when they are read; notes are the other set's."""

    def __init__(self, base: PictureSet, source: str, count: int):
        super().__init__(source, 0)
        self.base = base
        self.notes = base.notes[:count]  # a view of the base's array, so both have the same notes
        self.damaged, self.left_out = base.damaged, base.left_out
        self.preparation = base.preparation

    def digest(self, i: int, *, read: bool = True) -> str | None:
        """The base's."""
        return self.base.digest(i, read=read)

    @property
    def fingerprint(self) -> str:
        """The base's."""
        return self.base.fingerprint

    def read(self, i: int) -> np.ndarray:
        """uint8 [H, W, 3] of picture i."""
        return self.base.read(i)

    def name(self, i: int) -> str:
        """The base's name."""
        return self.base.name(i)

    def caption(self, i: int) -> str | None:
        """The base's caption."""
        return self.base.caption(i)


class First(_View):
    """The first `count` pictures of a set."""

    def __init__(self, base: PictureSet, count: int):
        if count < 1:
            raise ConfigError(f"the first {count} pictures: expected a count of at least 1")
        count = min(count, len(base))
        super().__init__(base, f"{base.source}[:{count}]", count)


class Prepared(_View):
    """Pictures of one size: the centre square, resized to crop x crop with antialiasing.

    Args:
      base: any set; crop: the side in pixels.
      filter: "bicubic" or "box", Pillow's; a picture of the right size is not changed.
    """

    def __init__(self, base: PictureSet, crop: int, filter: str = "bicubic"):
        if crop < 1 or filter not in ("bicubic", "box"):
            raise ConfigError(
                f"crop {crop}, filter {filter!r}: expected a side of at least 1 and bicubic or box"
            )
        super().__init__(base, f"{base.source} (centre square, {filter} {crop}x{crop})", len(base))
        self._crop, self._filter = crop, Image.Resampling[filter.upper()]
        own = f"crop{crop}{'' if filter == 'bicubic' else '-' + filter}"
        self.preparation = f"{base.preparation}.{own}" if base.preparation else own

    def read(self, i: int) -> np.ndarray:
        """uint8 [crop, crop, 3] of picture i."""
        picture = self.base.read(i)
        box = image.crop_box(picture.shape[1], picture.shape[0])
        if picture.shape[:2] == (self._crop, self._crop):
            return picture
        # Cropped first: the filter of `resize(box=…)` would reach beyond the box.
        square = Image.fromarray(picture).crop(box)
        return np.array(square.resize((self._crop, self._crop), self._filter))
