"""Pictures on the host: safe decoding, crops, and the degradations that train the upsamplers.

As in appendix C of arXiv 2204.06125, pictures are resized and cropped to a square; the first
upsampler's conditioning is blurred with a 3 x 3 Gaussian of sigma 0.6, the second's degraded by BSR
(Zhang et al. 2021, arXiv 2103.14006): JPEG, sensor noise, resizing by different kernels and blur,
in random order. Everything here is NumPy and Pillow, uint8 RGB; plain JPEGs are decoded by
`unclip.input.decode.jpeg`, to the same bits.
"""

import contextlib
import io
import math
from collections.abc import Iterator, Sequence

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
    return _to_uint8(tiles.sum((1, 3), dtype=np.uint32) / factor**2)


def gaussian_kernel(kernel: int, sigma: float) -> np.ndarray:
    """The 1-D factor, float64 [kernel], of a normalised kernel x kernel Gaussian (kernel odd)."""
    if kernel < 1 or kernel % 2 == 0 or sigma <= 0:
        raise ConfigError(f"blur kernel {kernel}, sigma {sigma}: expected an odd kernel, sigma > 0")
    offsets = np.arange(kernel) - kernel // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def _convolve(image: np.ndarray, rows: Sequence[float], columns: Sequence[float]) -> np.ndarray:
    """Separable convolution of [H, W, C] by symmetric kernels, borders mirrored."""
    for axis, weights in ((0, rows), (1, columns)):
        pad = [(0, 0)] * 3
        pad[axis] = (len(weights) // 2,) * 2
        padded = np.pad(image, pad, mode="reflect")
        length = image.shape[axis]
        image = sum(w * padded.take(range(k, k + length), axis) for k, w in enumerate(weights))
    return image


def gaussian_blur(image: np.ndarray, kernel: int = 3, sigma: float = 0.6) -> np.ndarray:
    """Gaussian blur by an exact kernel x kernel window; the defaults are the first upsampler's.

    Args:
      image: uint8 [H, W, C]; borders are mirrored without repeating the edge.

    Returns:
      uint8 [H, W, C], rounded to the nearest.
    """
    weights = gaussian_kernel(kernel, sigma)
    return _to_uint8(_convolve(image.astype(np.float64), weights, weights))


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _random_blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    kernel = 2 * int(rng.integers(1, 4)) + 1
    rows, columns = (gaussian_kernel(kernel, sigma) for sigma in rng.uniform(0.2, 1.6, 2))
    return _to_uint8(_convolve(image.astype(np.float64), rows, columns))


def _random_resize(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    filters = (
        Image.Resampling.NEAREST,
        Image.Resampling.BILINEAR,
        Image.Resampling.BICUBIC,
        Image.Resampling.BOX,
    )
    height, width = image.shape[:2]
    scale = rng.uniform(0.5, 1.5)
    there, back = (filters[k] for k in rng.integers(len(filters), size=2))
    between = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.fromarray(image).resize(between, there).resize((width, height), back)
    return np.array(picture)


def _sensor_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shot and read noise of a sensor: variance a x + b^2 per value, in linear light."""
    value = image / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    shot, read = rng.uniform(0, 2e-3), rng.uniform(0, 5e-3)
    noise = rng.standard_normal(image.shape) * np.sqrt(shot * linear + read**2)
    linear = np.clip(linear + noise, 0, 1)
    return _to_uint8(
        255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    )


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """A picture compressed as JPEG and decoded again: uint8 [H, W, 3], quality 1 to 95."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer, formats=("JPEG",)) as picture:
        return np.array(picture.convert("RGB"))


def _random_jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return jpeg(image, int(rng.integers(30, 96)))


DEGRADATIONS = {
    "blur": _random_blur,
    "resize": _random_resize,
    "noise": _sensor_noise,
    "jpeg": _random_jpeg,
}


def bsr(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    probability: float = 0.75,
    steps: Sequence[str] = tuple(DEGRADATIONS),
) -> np.ndarray:
    """BSR degradation at constant size, the second upsampler's: random steps in random order.

    Args:
      image: uint8 [H, W, 3], the already downsampled conditioning.
      rng: decides everything, so the same generator state gives the same picture.
      probability: of each step.
      steps: names from `DEGRADATIONS`.

    Returns:
      uint8 [H, W, 3].
    """
    for k in rng.permutation(len(steps)):
        if rng.random() < probability:
            image = DEGRADATIONS[steps[k]](image, rng)
    return image
