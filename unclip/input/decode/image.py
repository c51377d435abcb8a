"""Pictures on the host: safe decoding and crops.

As in appendix C of arXiv 2204.06125, pictures are resized and cropped to a square. Everything here
is NumPy and Pillow, uint8 RGB; plain JPEGs are decoded by `unclip.input.decode.jpeg`, to the same
bits.
"""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
from PIL import Image

from unclip.errors import ConfigError
from unclip.files import picture as pictures
from unclip.input.decode import jpeg as jpegs
from unclip.input.samples import BadSample

_STRIP = 32  # longer side by shorter: beyond it only the part that is needed is resized
Box = tuple[int, int, int, int]  # left, upper, right, lower in pixels


class BadPicture(BadSample):
    """A picture that is not decoded; `reason` is one of `REASONS`."""


REASONS = ("too-many-scans", *pictures.REASONS)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Raises as `BadPicture` what `unclip.files.picture` refuses in the block."""
    try:
        yield
    except pictures.PictureError as error:
        raise BadPicture(error.reason, error.detail) from error


def decode(
    data: bytes,
    *,
    max_bytes: int = 64 << 20,
    max_pixels: int = 1 << 26,
    min_side: int = 1,
    target: int | None = None,
    margin: float = 2.0,
) -> np.ndarray:
    """Decodes JPEG, PNG or WebP to upright RGB; sizes are checked before any pixel is decoded.

    Greyscale, palette, CMYK and 16-bit pictures become 8-bit RGB, alpha is laid on white, the EXIF
    orientation is applied and an animation gives its first frame. What is read does not depend on
    whether simplejpeg is installed, only how fast.

    Args:
      data: the encoded picture.
      max_bytes, max_pixels: limits on the encoded size and on width x height.
      min_side: the least width and height.
      target: the side it will be resized to; lets a JPEG decode at 1/2, 1/4 or 1/8 of its size, as
        long as both sides stay at least `margin` x target. None: full size.
      margin: at 2, photographs differ from a full decode by 44 to 50 dB (PSNR) once resized, less
        than another resampling filter would change them. At 1 they differ by 34 to 43 dB, as much
        as between a bilinear and a bicubic filter, for up to 2.3 times the speed (docs/input.md).

    Returns:
      uint8 [H, W, 3] RGB, which may be read-only. At its peak, decoding holds 3 bytes per pixel of
      a plain JPEG, 10 of an RGB PNG, 18 of a WebP and up to 28 of a WebP with alpha.

    Raises:
      BadPicture: with the reason.
    """
    least = math.ceil(margin * target) if target else None
    with refusing():
        pictures.check_bytes(len(data), max_bytes)
        header = jpegs.read_header(data)
        if jpegs.too_many_scans(data, header):
            raise BadPicture("too-many-scans", f"a JPEG of more than {jpegs.SCANS} scans")
        if header is not None:
            pictures.check_size(header[:2], max_pixels, min_side)
            array = jpegs.decode_plain(data, header, least)
            if array is not None:
                return array
        limits = {"max_bytes": max_bytes, "max_pixels": max_pixels, "min_side": min_side}
        with pictures.upright(data, least=least, **limits) as picture:
            # Not np.array: it would copy the copy that Pillow hands out.
            return np.asarray(pictures.rgb(picture))


def crop_box(
    width: int,
    height: int,
    *,
    crop: str = "center",
    fraction: float = 1.0,
    rng: np.random.Generator | None = None,
) -> Box:
    """A square box of side `fraction` x the shorter side, in the middle or anywhere (by `rng`)."""
    if crop not in ("center", "random"):
        raise ConfigError(f"unknown crop {crop!r}: valid: center, random")
    if not 0 < fraction <= 1:
        raise ConfigError(f"crop fraction {fraction}: expected 0 < fraction <= 1")
    side = max(1, round(min(width, height) * fraction))
    if crop == "center":
        left, upper = (width - side) // 2, (height - side) // 2
    else:
        left, upper = (int(n) for n in rng.integers((width - side + 1, height - side + 1)))
    return left, upper, left + side, upper + side


def resize_and_crop(
    image: np.ndarray,
    size: int,
    *,
    crop: str = "center",
    fraction: float = 1.0,
    rng: np.random.Generator | None = None,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> tuple[np.ndarray, Box]:
    """Resizes a square box of the picture to size x size, with antialiasing.

    Args:
      image: uint8 [H, W, 3].
      size: the side of the result.
      crop: "center" or "random" (by `rng`).
      fraction: the box's side as a part of the shorter side.
      resample: Pillow's filter; its support grows with the scale when it shrinks.

    Returns:
      uint8 [size, size, 3] and the box (left, upper, right, lower) in pixels of `image`.
    """
    height, width = image.shape[:2]
    box = crop_box(width, height, crop=crop, fraction=fraction, rng=rng)
    return resize_box(image, size, box, resample), box


def resize_box(
    image: np.ndarray, size: int, box: Box, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """uint8 [size, size, 3] of a box (left, upper, right, lower) of a picture, antialiased."""
    picture = Image.fromarray(image).resize((size, size), resample, box=box, reducing_gap=3.0)
    return np.array(picture)


def for_clip(image: np.ndarray, size: int, *, half: str = "down") -> np.ndarray:
    """The centre of a picture as CLIP's own preprocessing takes it, uint8 [size, size, 3].

    Pillow's bicubic resize of the shorter side to `size`, then a centre crop, as OpenAI trained
    its CLIPs and as Karlo embeds the picture to vary.

    Args:
      image: uint8 [H, W, 3].
      half: where the crop starts if its middle falls on half a pixel. "down", as transformers
        does; "even", the nearest even pixel, as torchvision and so OpenAI's own code does.

    Raises:
      ConfigError: an unknown `half`.
    """
    if half not in ("down", "even"):
        raise ConfigError(f"unknown half {half!r}: valid: down, even")
    shorter = min(image.shape[:2])
    height, width = (side * size // shorter for side in image.shape[:2])
    start = (lambda rest: rest // 2) if half == "down" else (lambda rest: round(rest / 2))
    top, left = start(height - size), start(width - size)
    if max(width, height) <= _STRIP * size:
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        return np.array(resized.crop((left, top, left + size, top + size)))
    # A long strip resized as a whole could fill the memory: the part that the crop needs, with a
    # margin for the filter, is cut out first.
    margin = 2 * max(shorter // size, 1) + 4
    edges, slices = [], []
    for at, new, old in ((top, height, image.shape[0]), (left, width, image.shape[1])):
        low, high = at * old / new, (at + size) * old / new
        first = max(int(low) - margin, 0)
        edges.append((low - first, high - first))
        slices.append(slice(first, int(high) + margin))
    (upper, lower), (left, right) = edges
    part = Image.fromarray(np.ascontiguousarray(image[tuple(slices)]))
    box = left, upper, right, lower
    return np.array(part.resize((size, size), Image.Resampling.BICUBIC, box=box))


def downsample(image: np.ndarray, factor: int) -> np.ndarray:
    """Area downsampling: uint8 [H, W, 3] -> [H/factor, W/factor, 3], rounded factor x factor means.

    Exact, where Pillow's box filter rounds after each of its two passes.
    """
    height, width = image.shape[:2]
    if height % factor or width % factor:
        raise ConfigError(f"a {width}x{height} picture does not shrink by {factor} evenly")
    tiles = image.reshape(height // factor, factor, width // factor, factor, 3)
    return rounded(tiles.sum((1, 3), dtype=np.uint32) / factor**2)


def rounded(image: np.ndarray) -> np.ndarray:
    """Values 0 to 255 of any type as uint8, rounded to the nearest and clipped."""
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
