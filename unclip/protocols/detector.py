"""Finds the objects of a composed scene by synthesis: which cutouts, where and how large.

A drawing is explained as the composer would have made it: a flat background b and one or two
cutouts, each of colour C (premultiplied) and opacity a. At a place, a cutout explains the residual
D = picture - b as T = C - a b, and saves

    gain = |D|^2 - |D - T|^2 = 2 <D, T> - |T|^2        (sums over pixels and channels, levels^2)

of squared error. Gains of all cutouts at all places and several scales are correlations, done by
FFT, at half resolution where the picture is over 32 pixels; the places that explain most are then
refined at every scale and at full resolution. A perfect copy has gain = |T|^2,
so fit = gain / |T|^2 is 1 for it and at most 0 for what is not better than empty background.
"""

from typing import NamedTuple

import numpy as np
import scipy.fft
from PIL import Image

from unclip import errors
from unclip.protocols.scenes import COLOURS, SIZES, Cutout

MIN_FIT = 0.3  # of a detection; about a correlation of 0.65 with the cutout
MIN_CONTRAST = 10.0  # levels, root mean square over the object; every true object has 24 or more
COARSE_STEP = 1.08  # ratio of neighbouring scales in the first pass
COARSE_SIDE = 32  # larger pictures are halved for the first pass
FIRSTS, RIVALS = 6, 6  # explanations whose partners are tried; objects refined at each place
SAME_PLACE = 0.5  # overlap (intersection over union) of boxes that explain one thing


class Found(NamedTuple):
    """An object in a picture."""

    name: str
    size: str  # small | large | huge
    box: tuple[int, int, int, int]  # [x0, y0, x1, y1) in pixels of the judged picture
    fit: float  # 1: an exact copy


class _Scale(NamedTuple):
    """All cutouts at one length of their longer side, in pixels."""

    length: int
    spectra: np.ndarray  # complex64 [4, objects, S, S // 2 + 1]: conjugates of C (3) and of a
    shapes: np.ndarray  # int [objects, 2]: height, width
    sums: np.ndarray  # float32 [objects, 5]: sum C^2, sums of a C (3), sum a^2
    weight: np.ndarray  # float32 [objects]: sum of a


class Detector:
    """Detects cutouts in square pictures of one size; deterministic, not thread-safe.

    Args:
      cutouts: {name: `scenes.Cutout`}.
      size: side of the pictures in pixels, 16 to 64, even over 32.

    Raises:
      ConfigError: another size.
    """

    def __init__(self, cutouts: dict[str, Cutout], size: int):
        if not 16 <= size <= 64 or (size > COARSE_SIDE and size % 2):
            raise errors.ConfigError(
                f"pictures of {size} pixels to judge: expected 16 to 64, even over {COARSE_SIDE}"
            )
        self.size, self.names = size, list(cutouts)
        self._halved = 1 + (size > COARSE_SIDE)
        self._side = size // self._halved  # of the first pass
        self._cutouts = [cutouts[name].pixels for name in self.names]
        self._lengths, chosen = {}, set()
        for name, (low, high) in SIZES.items():
            self._lengths[name] = range(round(low * size), round(high * size) + 1)
            ends = round(low * self._side), round(high * self._side)
            steps = 1 + int(np.ceil(np.log(ends[1] / ends[0]) / np.log(COARSE_STEP)))
            chosen |= {round(length) for length in np.geomspace(*ends, steps)}
        self._scales = [self._scale(length) for length in sorted(chosen)]
        self._templates: dict[tuple[int, int, int], np.ndarray] = {}

    def background(self, picture: np.ndarray) -> tuple[str, np.ndarray]:
        """(nearest named colour, median colour float32 [3]) of the border's pixels."""
        edge = max(1, self.size // 32)
        inside = np.zeros(picture.shape[:2], bool)
        inside[edge:-edge, edge:-edge] = True
        colour = np.median(picture[~inside], axis=0).astype(np.float32)
        distance = {name: np.square(colour - rgb).sum() for name, rgb in COLOURS.items()}
        return min(distance, key=distance.get), colour

    def __call__(self, picture: np.ndarray) -> tuple[str, list[Found]]:
        """(name of the background colour, up to two objects) of uint8 [size, size, 3]."""
        name, colour = self.background(picture)
        residual = picture.astype(np.float32) - colour
        halves = residual.reshape(self._side, self._halved, self._side, self._halved, 3)
        scale, item, y, x, gain = self._candidates(halves.mean((1, 3)), colour)
        if not len(gain):
            return name, []
        shapes = np.stack([s.shapes for s in self._scales])[scale, item]
        boxes = np.stack([x, y, x + shapes[:, 1], y + shapes[:, 0]], axis=1)
        places = self._explain(boxes, item, gain)
        found = []
        for place in places:
            near = _overlap(boxes[place], boxes) > SAME_PLACE
            for other in places:  # a box over the other object would explain that object too
                near &= _apart(boxes[other], boxes) | (other == place)
            rivals = {}
            for number in np.flatnonzero(near)[np.argsort(-gain[near], kind="stable")]:
                rivals.setdefault(int(item[number]), number)
                if len(rivals) == RIVALS:
                    break
            refined = [
                self._refine(residual, colour, i, self._scales[scale[n]].length, boxes[n])
                for i, n in rivals.items()
            ]
            found.append(Found(*max(refined)[1:]))
        return name, [one for one in found if one.fit >= MIN_FIT]

    def _candidates(self, residual: np.ndarray, colour: np.ndarray):
        """(scale, object, y, x, gain), one array each, of every place with a fit over MIN_FIT."""
        spectrum = scipy.fft.rfft2(residual, axes=(0, 1)).transpose(2, 0, 1)
        parts = [*spectrum, -np.tensordot(colour, spectrum, axes=1)]
        found = []
        for number, scale in enumerate(self._scales):
            product = scale.spectra[0] * parts[0]
            for template, part in zip(scale.spectra[1:], parts[1:]):
                product += template * part
            maps = scipy.fft.irfft2(product, s=residual.shape[:2], overwrite_x=True)
            energy = self._energy(scale.sums, colour)
            # 2 <D, T> - |T|^2 > MIN_FIT |T|^2
            least = np.maximum(energy, 3 * MIN_CONTRAST**2 * scale.weight) * (1 + MIN_FIT) / 2
            item, y, x = np.nonzero(maps > least[:, None, None])
            gain = 2 * maps[item, y, x] - energy[item]
            height, width = scale.shapes[item].T
            inside = (y + height <= self._side) & (x + width <= self._side)
            columns = (np.full_like(item, number), item, y, x, gain)
            found.append([column[inside] for column in columns])
        return [np.concatenate(columns) for columns in zip(*found)]

    def _energy(self, sums: np.ndarray, colour: np.ndarray) -> np.ndarray:
        """|T|^2 of templates with these sums on a background colour."""
        return sums[:, 0] - 2 * sums[:, 1:4] @ colour + sums[:, 4] * (colour @ colour)

    def _explain(self, boxes: np.ndarray, item: np.ndarray, gain: np.ndarray) -> list[int]:
        """The one or two candidates, with boxes that do not overlap, that together explain most."""
        best, total, tried = [], -1.0, []
        for first in np.argsort(-gain, kind="stable"):
            if any(
                item[first] == item[t] and _overlap(boxes[first], boxes[t : t + 1])[0] > SAME_PLACE
                for t in tried
            ):
                continue
            apart = _apart(boxes[first], boxes)
            second = int(np.argmax(np.where(apart, gain, -1))) if apart.any() else None
            together = gain[first] + (gain[second] if second is not None else 0)
            if together > total:
                best, total = [int(first), *([second] if second is not None else [])], together
            tried.append(int(first))
            if len(tried) == FIRSTS:
                break
        return best

    def _refine(self, residual, colour, item: int, length: int, box: np.ndarray) -> tuple:
        """(gain, name, size, box, fit) of the best place and shape near a candidate.

        Args:
          residual: at full resolution; length, box: of the first pass.
        """
        length, box = length * self._halved, box * self._halved
        distance = lambda name: min(abs(n - length) for n in self._lengths[name])
        size = min(self._lengths, key=distance)
        reach = max(1, round(length * (COARSE_STEP - 1) / 2)) + self._halved - 1
        best = None
        for long in self._lengths[size]:
            if abs(long - length) > reach:
                continue
            for template, energy in self._shapes(item, long, colour):
                h, w = template.shape[:2]
                centre_x, centre_y = (box[0] + box[2] - w) // 2, (box[1] + box[3] - h) // 2
                x0, y0 = max(0, centre_x - reach), max(0, centre_y - reach)
                window = residual[y0 : centre_y + reach + 1 + h, x0 : centre_x + reach + 1 + w]
                if window.shape[0] < h or window.shape[1] < w:
                    continue
                patches = np.lib.stride_tricks.sliding_window_view(window, (h, w), axis=(0, 1))
                gains = 2 * np.einsum("yxchw,hwc->yx", patches, template, optimize=True) - energy
                y, x = np.unravel_index(np.argmax(gains), gains.shape)
                corner = (int(x0 + x), int(y0 + y))
                place = (*corner, corner[0] + w, corner[1] + h)
                found = (
                    float(gains[y, x]),
                    self.names[item],
                    size,
                    place,
                    float(gains[y, x] / energy),
                )
                best = found if best is None else max(best, found)
        return best

    def _shapes(self, item: int, length: int, colour: np.ndarray):
        """(T, |T|^2) of a cutout at a length, for both roundings of its shorter side."""
        width, height = self._cutouts[item].size
        short = length * min(width, height) / max(width, height)
        for side in sorted({max(1, int(short)), int(np.ceil(short))}):
            key = (item, length, side)
            if key not in self._templates:
                shape = (length, side) if width >= height else (side, length)
                self._templates[key] = _pixels(self._cutouts[item], shape)
            pixels = self._templates[key]
            template = pixels[..., :3] - pixels[..., 3:] * colour
            yield template, float(np.square(template).sum())

    def _scale(self, length: int) -> _Scale:
        layers, shapes, sums, weight = [], [], [], []
        for cutout in self._cutouts:
            ratio = length / max(cutout.size)
            pixels = _pixels(cutout, [max(1, round(side * ratio)) for side in cutout.size])
            alpha = pixels[..., 3:]
            layer = np.zeros((self._side, self._side, 4), np.float32)
            layer[: pixels.shape[0], : pixels.shape[1]] = pixels
            layers.append(layer.transpose(2, 0, 1))
            shapes.append(pixels.shape[:2])
            products = (alpha * pixels[..., :3]).sum((0, 1))
            sums.append([np.square(pixels[..., :3]).sum(), *products, np.square(alpha).sum()])
            weight.append(alpha.sum())
        spectra = np.conj(scipy.fft.rfft2(np.stack(layers, axis=1)))
        return _Scale(
            length,
            spectra,
            np.array(shapes),
            np.array(sums, np.float32),
            np.array(weight, np.float32),
        )


def _pixels(cutout: Image.Image, shape: list[int] | tuple[int, int]) -> np.ndarray:
    """float32 [h, w, 4]: premultiplied colour in levels and opacity, resized as in a scene."""
    pixels = np.asarray(cutout.resize(shape, Image.Resampling.HAMMING), np.float32)
    return pixels / np.array([1, 1, 1, 255], np.float32)


def _apart(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether boxes share no pixel with one box, bool [n]."""
    return ((boxes[:, :2] >= box[2:]) | (boxes[:, 2:] <= box[:2])).any(axis=1)


def _overlap(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of one box with many, [n]."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    shared = np.prod(np.maximum(sides, 0), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return shared / (areas + np.prod(box[2:] - box[:2]) - shared)
