"""An encoded picture: opened under limits, turned upright by EXIF, refused with a reason.

Everything that comes from outside is opened here: training pictures, measured ones and a user's.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from unclip import errors

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 64 << 20
MAX_PIXELS = 1 << 26
REASONS = (
    "unreadable",
    "too-many-bytes",
    "too-many-pixels",
    "too-small",
    "format",
    "truncated",
    "corrupt",
)
# Imported for their side effect, once and here: Pillow would otherwise load its plugins, all of
# them, lazily and from several decoding threads at a time.
_PLUGINS = (JpegImagePlugin, PngImagePlugin, WebPImagePlugin)
# Pillow warns of broken EXIF, which costs nothing, and of sizes, which are checked here. Once for
# the process: `warnings.catch_warnings` a picture would not be safe between decoding threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(errors.DataError):
    """A picture that is not read; `reason` is one of `REASONS`, `detail` says more."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(": ".join(filter(None, (reason, detail))))
        self.reason, self.detail = reason, detail


@contextlib.contextmanager
def opened(
    source: bytes | str | os.PathLike,
    *,
    formats: Sequence[str] = FORMATS,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    min_side: int = 1,
) -> Iterator[Image.Image]:
    """A picture's header, for a `with` block; pixels are decoded where the block asks for them.

    Args:
      source: the encoded picture or its file.
      formats: Pillow's names of those that are accepted.
      max_bytes, max_pixels: limits on the encoded size and on width x height.
      min_side: the least width and height.

    Raises:
      PictureError: with the reason; also for whatever Pillow raises inside the block.
    """
    try:
        size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
        check_bytes(size, max_bytes)
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=tuple(formats)) as picture:
            check_size(picture.size, max_pixels, min_side)
            yield picture
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError("too-many-pixels", str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise PictureError("format", f"expected {', '.join(formats)}") from error
    except Exception as error:  # Pillow documents no list of exceptions for damaged files
        if isinstance(error, OSError) and error.strerror:
            raise PictureError("unreadable", error.strerror) from error
        reason = "truncated" if "truncat" in str(error).lower() else "corrupt"
        raise PictureError(reason, f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def upright(
    source: bytes | str | os.PathLike, *, least: int | None = None, **limits
) -> Iterator[Image.Image]:
    """A decoded picture in its own mode, turned by its EXIF orientation, for a `with` block.

    Args:
      source: the encoded picture or its file; of an animation the first frame is taken.
      least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size while no side gets shorter than
        this; None: full size.
      limits: `formats`, `max_bytes`, `max_pixels` and `min_side` of `opened`.

    Raises:
      PictureError: as `opened`, but never for broken EXIF, which does not affect the pixels.
    """
    with opened(source, **limits) as picture:
        if least:
            picture.draft(None, (least, least))
        picture.load()
        turn = _UPRIGHT.get(orientation(picture))
        yield picture if turn is None else picture.transpose(turn)


def orientation(picture: Image.Image) -> int:
    """EXIF's orientation of an opened picture, 1 (upright) to 8; 1 where EXIF is absent or broken.

    A TIFF is turned by Pillow itself when it is decoded, and is upright from then on.
    """
    try:
        found = picture.getexif().get(ExifTags.Base.Orientation, 1)
        return int(found) if found in _UPRIGHT else 1
    except Exception:  # Pillow documents no list of exceptions for damaged EXIF either
        return 1


def rgb(picture: Image.Image) -> Image.Image:
    """A decoded picture of any mode as 8-bit RGB, its transparency laid on white.

    16-bit grey v becomes v * 255 / 65535, rounded: Pillow's own conversion would clip it at 255.
    """
    if picture.mode.startswith("I") or picture.mode == "F":
        grey = np.clip(np.asarray(picture), 0, 65535).astype(np.uint32)
        if isinstance(picture.info.get("transparency"), int):
            grey[grey == picture.info["transparency"]] = 65535
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def check_bytes(count: int, max_bytes: int) -> None:
    """Raises PictureError("too-many-bytes")."""
    if count > max_bytes:
        raise PictureError("too-many-bytes", f"{count} bytes, at most {max_bytes}")


def check_size(size: tuple[int, int], max_pixels: int, min_side: int = 1) -> None:
    """Raises PictureError("too-many-pixels") or ("too-small") for a (width, height)."""
    if size[0] * size[1] > max_pixels:
        raise PictureError("too-many-pixels", f"{size[0]}x{size[1]}, at most {max_pixels} pixels")
    if min(size) < min_side:
        raise PictureError("too-small", f"{size[0]}x{size[1]}, at least {min_side} a side")
