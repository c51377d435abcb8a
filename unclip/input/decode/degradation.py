"""What makes the small picture of an upsampler's training worse than a clean one.

"To improve the robustness of our upsamplers, we slightly corrupt the conditioning images during
training" (section 2.1 of arXiv 2204.06125): the first stage's by a 3 x 3 Gaussian of sigma 0.6
(appendix C), the second's by "a more diverse BSR degradation", for which the paper cites latent
diffusion (arXiv 2112.10752) and BSRGAN (arXiv 2103.14006). Both published ranges are here: `bsr`
has the moderate ones that latent diffusion trained with, since BSRGAN's own, `bsrgan`, proved very
strong there. Everything is NumPy, SciPy and Pillow on uint8 RGB, and every choice comes from the
sample's own generator.
"""

import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from unclip.errors import ConfigError, unknown
from unclip.input.decode.image import downsample, rounded

GREY = np.array([0.299, 0.587, 0.114])


def degrade(kind: str, image: np.ndarray, factor: int, rng: np.random.Generator) -> np.ndarray:
    """The small, degraded version of a picture.

    Args:
      kind: of `KINDS`.
      image: uint8 [H, W, 3], both sides multiples of `factor`.
      rng: decides everything, so the same generator state gives the same picture.

    Returns:
      uint8 [H/factor, W/factor, 3].
    """
    return KINDS[kind](image, factor, rng)


def check(kind: str) -> None:
    """Raises ConfigError for a kind of degradation that does not exist."""
    if kind not in KINDS:
        raise unknown("degradation", kind, KINDS)


# ============================================================ filters


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
    return rounded(_convolve(image.astype(np.float64), weights, weights))


def anisotropic_kernel(kernel: int, angle: float, variances: Sequence[float]) -> np.ndarray:
    """float64 [kernel, kernel]: a normalised Gaussian whose axes are turned by `angle` (radians)
    and have the two variances (pixels squared, over 0)."""
    y, x = np.mgrid[:kernel, :kernel] - kernel // 2
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    weights = np.exp(-0.5 * (along**2 / variances[0] + across**2 / variances[1]))
    return weights / weights.sum()


def sinc_kernel(kernel: int, cutoff: float) -> np.ndarray:
    """float64 [kernel, kernel]: a circular low pass that rings, as sharpening and compression do.

    The ideal filter of that cutoff (radians a pixel, up to pi), cut to the kernel (odd) and
    normalised; Real-ESRGAN, arXiv 2107.10833, eq. 6.
    """
    y, x = np.mgrid[:kernel, :kernel] - kernel // 2
    radius = np.hypot(x, y)
    radius[kernel // 2, kernel // 2] = 1
    from scipy import special

    weights = cutoff * special.j1(cutoff * radius) / (2 * np.pi * radius)
    weights[kernel // 2, kernel // 2] = cutoff**2 / (4 * np.pi)
    return weights / weights.sum()


def filtered(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] convolved by a kernel [k, k] (k odd), borders mirrored, values clipped."""
    from scipy import fft

    half = len(kernel) // 2
    pad = [(half, half), (half, half), (0, 0)]
    padded = np.pad(image.astype(np.float32), pad, mode="reflect")
    shape = [fft.next_fast_len(side, real=True) for side in padded.shape[:2]]
    product = fft.rfft2(padded, shape, axes=(0, 1))
    product *= fft.rfft2(kernel.astype(np.float32), shape)[..., None]
    whole = fft.irfft2(product, shape, axes=(0, 1), overwrite_x=True)
    height, width = image.shape[:2]
    return rounded(whole[2 * half : 2 * half + height, 2 * half : 2 * half + width])


# ============================================================ the steps of BSR


class Ranges(NamedTuple):
    """What a BSR draws from; every range includes both ends.

    Attributes:
      blurs: how many blurs; kernels: their odd sizes, pixels; softness: of the greatest sigma and
        variance, which are (2 + sf / 5) and (4 + sf) times it for a scale of sf.
      resized: probability that the free resize interpolates; else it blurs and takes every sf-th.
      noise: standard deviations of Gaussian noise, of 255; quality: of JPEG.
      sinc, poisson, sensor, jpeg: probabilities of a ringing kernel in place of a Gaussian, of shot
        noise, of camera noise, and of a JPEG beside the last one.
    """

    blurs: int
    kernels: tuple[int, int]
    softness: float
    resized: float
    noise: tuple[int, int]
    quality: tuple[int, int]
    sinc: float = 0.1  # as Real-ESRGAN's
    poisson: float = 0.1  # as the extended model of BSRGAN's authors
    sensor: float = 0.25
    jpeg: float = 0.9


MODERATE = Ranges(1, (5, 13), 0.25, 0.8, (1, 2), (80, 95))  # latent diffusion's
ORIGINAL = Ranges(2, (7, 25), 1.0, 0.75, (2, 25), (30, 95))  # BSRGAN's


def _blurred(image: np.ndarray, sf: int, ranges: Ranges, rng: np.random.Generator) -> np.ndarray:
    least, most = ranges.kernels
    kernel = least + 2 * int(rng.integers((most - least) // 2 + 1))
    if rng.random() < ranges.sinc:
        lowest = np.pi / 3 if kernel < 13 else np.pi / 5
        return filtered(image, sinc_kernel(kernel, rng.uniform(lowest, np.pi)))
    if rng.random() < 0.5:
        variances = np.maximum(rng.uniform(0, ranges.softness * (4 + sf), 2), 1e-2)
        return filtered(image, anisotropic_kernel(kernel, rng.uniform(0, np.pi), variances))
    sigma = max(rng.uniform(0, ranges.softness * (2 + 0.2 * sf)), 0.1)
    return filtered(image, anisotropic_kernel(kernel, 0.0, (sigma**2, sigma**2)))


def _resized(image: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Resized to (height, width) by area, or by interpolation that lets high frequencies alias."""
    height, width = (max(1, side) for side in size)
    given, picture = image.shape[:2], Image.fromarray(image)
    choice = int(rng.integers(3))
    if choice == 2 and height <= given[0] and width <= given[1]:
        return np.array(picture.resize((width, height), Image.Resampling.BOX))
    step = (given[1] / width, 0, 0, 0, given[0] / height, 0)
    how = Image.Resampling.BICUBIC if choice == 1 else Image.Resampling.BILINEAR
    return np.array(picture.transform((width, height), Image.Transform.AFFINE, step, how))


def _shrunk(image: np.ndarray, sf: int, ranges: Ranges, rng: np.random.Generator) -> np.ndarray:
    """Smaller by a factor of 1 to 2 sf, or blurred and every sf-th pixel taken."""
    height, width = image.shape[:2]
    if rng.random() < ranges.resized:
        scale = rng.uniform(1, 2 * sf)
        return _resized(image, (int(height / scale), int(width / scale)), rng)
    sigma = rng.uniform(0.1, 0.6 * sf)
    # Centred on the middle of the sf x sf pixels that each result stands for.
    offsets = np.arange(25) - 12 + (sf - 1) / 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    return filtered(image, np.outer(weights, weights))[::sf, ::sf]


def _gaussian_noise(
    image: np.ndarray, levels: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Noise of every channel alone, of all alike, or correlated between them."""
    deviation = int(rng.integers(levels[0], levels[1] + 1))
    kind = rng.random()
    if kind > 0.6:
        noise = deviation * rng.standard_normal(image.shape)
    elif kind < 0.4:
        noise = deviation * rng.standard_normal((*image.shape[:2], 1))
    else:
        turn = np.linalg.qr(rng.random((3, 3)))[0]
        mix = levels[1] * np.sqrt(rng.random(3))[:, None] * turn
        noise = rng.standard_normal(image.shape) @ mix
    return rounded(image + noise)


def _poisson_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shot noise of 100 to 10,000 photons at white, of every channel alone or of the grey."""
    photons, value = 10 ** rng.uniform(2, 4) / 255, image.astype(np.float64)
    if rng.random() < 0.5:
        return rounded(rng.poisson(value * photons) / photons)
    grey = np.rint(value @ GREY)
    return rounded(value + (rng.poisson(grey * photons) / photons - grey)[..., None])


def _sensor_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shot and read noise of a sensor: variance a x + b^2 per value, in linear light."""
    value = image / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    shot, read = rng.uniform(0, 2e-3), rng.uniform(0, 5e-3)
    noise = rng.standard_normal(image.shape) * np.sqrt(shot * linear + read**2)
    linear = np.clip(linear + noise, 0, 1)
    return rounded(
        255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    )


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """A picture compressed as JPEG and decoded again: uint8 [H, W, 3], quality 1 to 95."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer, formats=("JPEG",)) as picture:
        return np.array(picture.convert("RGB"))


def bsr(
    image: np.ndarray, factor: int, rng: np.random.Generator, ranges: Ranges = MODERATE
) -> np.ndarray:
    """BSR (arXiv 2103.14006): blur, resizing, noise and JPEG in random order, JPEG once more.

    Its two resizes keep their order, the second one to the size of the result. A quarter of the
    pictures that shrink by 4 are halved before. The camera noise is a model of a sensor in place
    of BSRGAN's pipeline of a camera.

    Args:
      image: uint8 [H, W, 3], both sides multiples of `factor`; rng: decides everything.

    Returns:
      uint8 [H/factor, W/factor, 3].
    """
    size, sf = tuple(side // factor for side in image.shape[:2]), factor
    if factor == 4 and rng.random() < 0.25:
        half = tuple(side // 2 for side in image.shape[:2])
        image = _resized(image, half, rng) if rng.random() < 0.5 else downsample(image, 2)
        sf = 2
    quality = lambda: int(rng.integers(ranges.quality[0], ranges.quality[1] + 1))
    maybe = lambda step, probability: step if rng.random() < probability else lambda image: image
    steps: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "shrink": lambda image: _shrunk(image, sf, ranges, rng),
        "resize": lambda image: _resized(image, size, rng),
        "noise": lambda image: _gaussian_noise(image, ranges.noise, rng),
        "poisson": maybe(lambda image: _poisson_noise(image, rng), ranges.poisson),
        "sensor": maybe(lambda image: _sensor_noise(image, rng), ranges.sensor),
        "jpeg": maybe(lambda image: jpeg(image, quality()), ranges.jpeg),
    }
    for number in range(ranges.blurs):
        steps[f"blur_{number}"] = lambda image: _blurred(image, sf, ranges, rng)
    order = [list(steps)[k] for k in rng.permutation(len(steps))]
    first, second = sorted((order.index("shrink"), order.index("resize")))
    order[first], order[second] = "shrink", "resize"
    for name in order:
        image = steps[name](image)
    return jpeg(image, quality())


# Name in configs -> function (image, factor, rng) of what the network is given.
KINDS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "none": lambda image, factor, rng: downsample(image, factor),
    "blur": lambda image, factor, rng: gaussian_blur(downsample(image, factor)),
    "bsr": lambda image, factor, rng: bsr(image, factor, rng, MODERATE),
    "bsrgan": lambda image, factor, rng: bsr(image, factor, rng, ORIGINAL),
}
