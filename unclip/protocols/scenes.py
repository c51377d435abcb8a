"""Captioned scenes composed from the embedded emoji, for training and for tests of composition.

A scene is one object, or two in a named relation, on a background of a named colour, and its
caption says exactly what is there: "a large red apple to the left of a small guitar on a blue
background". The record beside it holds the same as data, boxes included. Every scene is a pure
function of (seed, index). Combinations on the two WITHHELD lists never occur in training scenes;
`withheld=True` composes scenes that each hold one of them.
"""

import functools
import io
import json
import pathlib
import tarfile
from typing import NamedTuple

import numpy as np
from PIL import Image

from unclip.errors import ConfigError, DataError

# Pictures that a caption can name as "a …", of one colour scheme, and not white at the border.
SCENE_OBJECTS = (
    *("black cat", "butterfly", "cat face", "cow face", "crab", "dog face", "elephant", "fox"),
    *("frog", "giraffe", "koala", "lion", "mushroom", "octopus", "owl", "parrot", "pig face"),
    *("penguin", "tropical fish", "turtle", "unicorn", "avocado", "banana", "birthday cake"),
    *("broccoli", "carrot", "cupcake", "doughnut", "green apple", "hamburger", "lemon", "mango"),
    *("pineapple", "red apple", "strawberry", "tomato", "watermelon", "alarm clock", "anchor"),
    *("automobile", "backpack", "balloon", "basketball", "bicycle", "bus", "cactus", "crown"),
    *("drum", "guitar", "helicopter", "key", "light bulb", "maple leaf", "rocket", "rose"),
    *("sailboat", "sunflower", "teddy bear", "tent", "top hat", "tractor", "trophy", "trumpet"),
    *("umbrella", "violin", "wrapped gift", "wrench"),
)
COLOURS = {
    "white": (255, 255, 255),
    "grey": (150, 150, 150),
    "black": (20, 20, 20),
    "red": (220, 40, 40),
    "orange": (250, 140, 30),
    "yellow": (250, 215, 50),
    "green": (50, 160, 70),
    "blue": (45, 95, 215),
    "purple": (130, 60, 180),
    "pink": (250, 160, 195),
    "brown": (125, 80, 45),
}
# Longer side of the object as a part of the scene's side.
SIZES = {"small": (0.20, 0.26), "large": (0.40, 0.46), "huge": (0.68, 0.84)}
PAIR_SIZES = ("small", "large")
# Relation -> (axis, sign): the first object lies on this side of the second.
RELATIONS = {
    "to the left of": (0, -1),
    "to the right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}
MIRROR = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}
# Objects that training never shows on this background, alone or in a pair.
WITHHELD_COLOURS = (
    ("red apple", "blue"),
    ("banana", "purple"),
    ("dog face", "green"),
    ("pig face", "yellow"),
    ("rocket", "pink"),
    ("guitar", "white"),
    ("umbrella", "orange"),
    ("frog", "red"),
    ("bus", "black"),
    ("crown", "grey"),
    ("sunflower", "brown"),
    ("octopus", "green"),
)
# Pairs that training never shows in this relation; the mirrored wording is the same picture.
WITHHELD_RELATIONS = (
    ("dog face", "to the left of", "guitar"),
    ("red apple", "above", "tent"),
    ("fox", "below", "umbrella"),
    ("rocket", "to the right of", "cactus"),
    ("penguin", "to the left of", "birthday cake"),
    ("elephant", "above", "drum"),
    ("lion", "to the right of", "bicycle"),
    ("key", "below", "top hat"),
    ("pineapple", "to the left of", "rose"),
    ("butterfly", "above", "hamburger"),
    ("turtle", "below", "trophy"),
    ("owl", "to the right of", "lemon"),
)
MARGIN = 0.02
WEBP = {"format": "WEBP", "quality": 90, "method": 4}


class Cutout(NamedTuple):
    """An object without its white background, cropped to its size."""

    code_points: str
    pixels: Image.Image  # premultiplied (mode RGBa), so that resizing mixes no white into the edge


def matte(picture: np.ndarray) -> np.ndarray:
    """Opacity and own colour of an object that was composed on white.

    White that is reachable from the border is background, and so is white reachable from a hole:
    an enclosed place at least seven pixels wide without any shading. On the two-pixel rim the
    composite C = αF + (1 − α)·255 is solved for α with F, the object's colour, taken from the
    strongest pixel near by.

    Args:
      picture: uint8 [H, W, 3].

    Returns:
      float32 [H, W, 4] in [0, 1]: colour premultiplied by α, then α.
    """
    strength = 255 - picture.min(axis=-1)  # 0 is white
    # The frame lets the fill pass around an object that touches the border of the picture.
    nearly_white = np.pad(strength < 14, 1, constant_values=True)
    hole = strength <= 2
    for _ in range(3):
        hole = ~_grow(~hole)
    outside = np.pad(hole, 1)
    outside[0] = outside[-1] = outside[:, 0] = outside[:, -1] = True
    count = 0
    while count != (count := int(outside.sum())):
        outside = _spread(outside, nearly_white)
        outside = _spread(outside.T, nearly_white.T).T
    rim = outside
    for _ in range(2):
        rim = _grow(rim)
    outside, rim = outside[1:-1, 1:-1], rim[1:-1, 1:-1]
    height, width = strength.shape
    near = np.pad(strength, 3).astype(np.float32)
    near = np.maximum.reduce([near[i : i + height] for i in range(7)])
    near = np.maximum.reduce([near[:, i : i + width] for i in range(7)])
    alpha = np.where(rim, strength / np.maximum(near, 1), 1.0)
    alpha = np.where(outside, 0.0, alpha).astype(np.float32)[..., None]
    colour = picture.astype(np.float32) / 255 - (1 - alpha)
    return np.concatenate([np.clip(colour, 0, alpha), alpha], axis=-1)


def _grow(region: np.ndarray) -> np.ndarray:
    """The region and its pixels' four neighbours; what wraps around falls into the frame."""
    grown = region.copy()
    for axis, shift in ((0, 1), (0, -1), (1, 1), (1, -1)):
        grown |= np.roll(region, shift, axis)
    return grown


def _spread(region: np.ndarray, passable: np.ndarray) -> np.ndarray:
    """The region, spread along the rows as far as they are passable.

    Runs at the end of one row and the start of the next count as one, which changes nothing: the
    frame, which is part of the region, joins them.
    """
    run = np.cumsum(~passable)  # an impassable pixel starts a new run
    reached = np.bincount(run, weights=region.ravel()) > 0
    return reached[run].reshape(region.shape) & passable


@functools.lru_cache(maxsize=2)
def load_cutouts(folder: pathlib.Path) -> dict[str, Cutout]:
    """Name -> Cutout for all SCENE_OBJECTS, read once from `train-*.tar` in `folder`.

    Raises:
      DataError: an object is not among the training pictures.
    """
    cutouts = {}
    for path in sorted(folder.glob("train-*.tar")):
        with tarfile.open(path) as shard:
            for entry in shard:
                if not entry.name.endswith(".json"):
                    continue
                record = json.load(shard.extractfile(entry))
                if record["name"] not in SCENE_OBJECTS:
                    continue
                member = shard.getmember(entry.name.removesuffix("json") + "webp")
                picture = Image.open(io.BytesIO(shard.extractfile(member).read()))
                premultiplied = matte(np.asarray(picture.convert("RGB")))
                rows, columns = np.nonzero(premultiplied[..., 3] > 0.5)
                box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
                pixels = (premultiplied[box] * 255).round().astype(np.uint8)
                size = pixels.shape[1::-1]
                rgba = Image.frombytes("RGBa", size, pixels.tobytes())
                cutouts[record["name"]] = Cutout(record["code_points"], rgba)
    missing = [name for name in SCENE_OBJECTS if name not in cutouts]
    if missing:
        raise DataError(
            f"no training picture in {folder} is named {', '.join(missing[:5])}; "
            "expected the shards that data/emoji/prepare.py writes"
        )
    return cutouts


def withheld_in(names: list[str], colour: str, relation: str | None) -> list[str]:
    """The withheld combinations that a scene holds, in words; empty for a training scene."""
    found = [f"{n} on {c}" for n, c in WITHHELD_COLOURS if n in names and c == colour]
    for first, word, second in WITHHELD_RELATIONS:
        if [first, word, second] in (
            [names[0], relation, names[-1]],
            [names[-1], MIRROR.get(relation), names[0]],
        ):
            found.append(f"{first} {word} {second}")
    return found


class Composer:
    """Composes scene `index`; thread-safe, and equal for equal (seed, index, size, withheld).

    Args:
      folder: where the embedded `train-*.tar` are.
      size: side of a scene in pixels, at least 16.
      seed: a non-negative integer.
      withheld: compose only scenes with a withheld combination; else only scenes without any.

    Raises:
      ConfigError: size or seed is out of range.
      DataError: the shards do not hold every object.
    """

    def __init__(self, folder: pathlib.Path, *, size: int, seed: int, withheld: bool = False):
        if size < 16:
            raise ConfigError(f"the size of a scene is {size} pixels, expected at least 16")
        if seed < 0:
            raise ConfigError(f"the seed of the scenes is {seed}, expected 0 or more")
        self.cutouts = load_cutouts(folder)
        self.size, self.seed, self.withheld = size, seed, withheld

    def scene(self, index: int) -> tuple[Image.Image, str, dict]:
        """Scene number `index`: (RGB picture, caption, record with every fact of the scene)."""
        rng = np.random.default_rng([self.seed, index, int(self.withheld)])
        names, colour, relation = self._content(rng)
        sizes = [_choose(rng, PAIR_SIZES if relation else SIZES) for _ in names]
        scaled = [self._scaled(rng, name, size) for name, size in zip(names, sizes, strict=True)]
        boxes = self._boxes(rng, [(p.width, p.height) for p in scaled], relation)
        canvas = Image.new("RGB", (self.size, self.size), COLOURS[colour])
        pixels = np.asarray(canvas).astype(np.float32)
        for cutout, (x0, y0, x1, y1) in zip(scaled, boxes, strict=True):
            layer = np.asarray(cutout, np.float32)
            below = pixels[y0:y1, x0:x1]
            pixels[y0:y1, x0:x1] = layer[..., :3] + below * (1 - layer[..., 3:] / 255)
        picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
        phrases = [f"a {size} {name}" for size, name in zip(sizes, names, strict=True)]
        caption = f" {relation} ".join(phrases) + f" on a{'n' * (colour == 'orange')} {colour}"
        record = {
            "seed": self.seed,
            "index": index,
            "background": {"name": colour, "rgb": COLOURS[colour]},
            "objects": [
                {"name": n, "code_points": self.cutouts[n].code_points, "size": s, "box": b}
                for n, s, b in zip(names, sizes, boxes, strict=True)
            ],
            "sizes": ", ".join(sizes),
            "relation": relation,
            "withheld": withheld_in(names, colour, relation),
        }
        return picture, f"{caption} background", record

    def sample(self, index: int) -> dict:
        """Scene number `index` as a webdataset sample, all bytes."""
        picture, caption, record = self.scene(index)
        encoded = io.BytesIO()
        picture.save(encoded, **WEBP)
        return {
            "__key__": f"{index:08d}",
            "webp": encoded.getvalue(),
            "txt": caption.encode(),
            "json": json.dumps(record, separators=(",", ":")).encode(),
        }

    def _content(self, rng: np.random.Generator) -> tuple[list[str], str, str | None]:
        """Names, background colour and relation (None for one object)."""
        while True:
            names = [SCENE_OBJECTS[i] for i in rng.permutation(len(SCENE_OBJECTS))[:2]]
            colour = _choose(rng, COLOURS)
            relation = _choose(rng, RELATIONS) if rng.random() < 0.7 else None
            kind = rng.integers(2)
            if self.withheld and kind:
                first, relation, second = _choose(rng, WITHHELD_RELATIONS)
                names = [first, second]
                if rng.integers(2):
                    names, relation = [second, first], MIRROR[relation]
            elif self.withheld:
                name, colour = _choose(rng, WITHHELD_COLOURS)
                names[rng.integers(2) if relation else 0] = name
            if relation is None:
                names = names[:1]
            distinct = len(set(names)) == len(names)
            if distinct and bool(withheld_in(names, colour, relation)) == self.withheld:
                return names, colour, relation

    def _scaled(self, rng: np.random.Generator, name: str, size: str) -> Image.Image:
        """The cutout with its longer side at a random length inside the range of `size`."""
        pixels = self.cutouts[name].pixels
        scale = rng.uniform(*SIZES[size]) * self.size / max(pixels.size)
        shape = [max(1, round(side * scale)) for side in pixels.size]
        # A filter without negative lobes keeps every premultiplied colour at or below its alpha.
        return pixels.resize(shape, Image.Resampling.HAMMING)

    def _boxes(self, rng: np.random.Generator, shapes: list, relation: str | None) -> list:
        """Pixel boxes [x0, y0, x1, y1), apart along the axis of the relation.

        Across that axis the centres differ by less than half of what they differ along it, so
        "to the left of" is never also "above".
        """
        margin = max(1, round(MARGIN * self.size))
        room = self.size - 2 * margin
        if relation is None:
            corners = [[margin + int(rng.integers(room - side + 1)) for side in shapes[0]]]
        else:
            axis, sign = RELATIONS[relation]
            order = (0, 1) if sign < 0 else (1, 0)
            along = [shapes[i][axis] for i in order]
            across = [shapes[i][1 - axis] for i in order]
            gap = rng.uniform(0.3, 1.0) * (room - sum(along))
            start = margin + rng.random() * (room - sum(along) - gap)
            near, far = round(start), int(start + along[0] + gap)
            distance = far + along[1] / 2 - near - along[0] / 2
            middle = margin + room / 2 + rng.uniform(-0.2, 0.2) * (room - max(across))
            shift = rng.uniform(-0.2, 0.2) * distance
            sides = [round(middle + s * shift - a / 2) for s, a in zip((1, -1), across)]
            sides = [min(max(s, margin), margin + room - a) for s, a in zip(sides, across)]
            placed = [(near, sides[0]), (far, sides[1])]
            corners = [placed[order.index(i)][:: 1 if axis == 0 else -1] for i in (0, 1)]
        return [[x, y, x + w, y + h] for (x, y), (w, h) in zip(corners, shapes, strict=True)]


def _choose(rng: np.random.Generator, options):
    """One of `options`, all equally likely."""
    options = list(options)
    return options[rng.integers(len(options))]
