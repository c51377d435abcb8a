"""Between pictures: spherical interpolation of their embeddings (section 3.2 of the paper)."""

from collections.abc import Mapping, Sequence

import numpy as np

from unclip import errors
from unclip.cascade.pipeline import Pictures, Pipeline, seeds_of
from unclip.drawing import base
from unclip.files import images as image_files
from unclip.tasks.arrays import spherical_mean

FRAMES = 8


def interpolate(
    model: Pipeline,
    *images: base.Image,
    n: int | None = None,
    weights: Sequence[float | Sequence[float]] | None = None,
    seed: int = 0,
    invert: bool = False,
    decoder: dict | None = None,
    upsamplers: Sequence[dict] = (),
    stages: int | None = None,
) -> Pictures:
    """Draws pictures on the way from one picture to the next, by spherical interpolation of z_i.

    Args:
      images: two or more, as in `variations`.
      n: pictures on the way, the first at the first picture and the last at the last, at least 2;
        None: 8, or one for every row of `weights`.
      weights: what to draw in place of a way: for each picture one weight an image, of any positive
        sum; of two images the second's share alone, 0 to 1, is enough.
      seed: of all pictures, 0 <= seed < 2**32: the decoder's noise is one and the same (figure 4).
      invert: start at the pictures' own x_T, interpolated like z_i, so that both ends reconstruct
        them; see `variations`.
      Other arguments as in `variations`.

    Returns:
      `Pictures`, whose recipes hold the "weights" of each.

    Raises:
      ConfigError: as `variations`, fewer than two images, or weights that are none.
    """
    base.need_z_i(model, "interpolations")
    if len(images) < 2:
        raise errors.ConfigError(f"interpolation of {len(images)} picture(s): expected at least 2")
    sources = [base.as_source(image) for image in images]
    rows = _path(len(sources), n) if weights is None else _rows(len(sources), n, weights)
    (seed,) = seeds_of(seed, 1)
    if invert:
        decoder = base.inverting(decoder, None)
    settings = {"decoder": decoder, "upsamplers": upsamplers, "stages": stages}
    base.check(model, **settings)
    model = model.drawing(len(rows))
    z_i, x_T = base.embed(model, sources), None
    own = {}
    if invert:
        starts, psnr = base.start(model, sources, z_i, decoder)
        x_T = np.stack([_blend(starts, row) for row in rows])
        own = {"invert": True, "psnr": psnr}
    facts = [{"weights": row, **own} for row in rows]
    z_i, seeds = np.stack([_blend(z_i, row) for row in rows]), [seed] * len(rows)
    return base.draw(model, "interpolate", z_i, seeds, sources, facts, x_T=x_T, **settings)


def redraw(
    model: Pipeline, recipe: Mapping, sources: Sequence[image_files.Source], settings: dict
) -> Pictures:
    """The picture of a recipe."""
    row, invert = recipe.get("weights"), recipe.get("invert") is True
    rows = [row if isinstance(row, list) else None]
    return interpolate(
        model, *sources, weights=rows, seed=recipe["seed"], invert=invert, **settings
    )


def _blend(arrays: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """One array of several [n, ...] by weight; at a single weight exactly its own."""
    some = [k for k, weight in enumerate(weights) if weight]
    if len(some) == 1:
        return arrays[some[0]]
    return spherical_mean([arrays[k : k + 1] for k in some], [weights[k] for k in some])[0]


def _path(images: int, n: int | None) -> list[list[float]]:
    """Weights of `n` pictures evenly on the way through all images."""
    n = FRAMES if n is None else n
    if base.count(n, "n") < 2:
        raise errors.ConfigError(f"n={n} pictures on the way between {images}: expected at least 2")
    rows = []
    for place in range(n):
        # Whole numbers decide the piece of the way, so that no rounding steps over a picture.
        piece, rest = divmod(place * (images - 1), n - 1)
        row = [0.0] * images
        row[piece] = 1 - rest / (n - 1)
        if rest:
            row[piece + 1] = rest / (n - 1)
        rows.append(row)
    return rows


def _rows(images: int, n: int | None, weights: Sequence) -> list[list[float]]:
    if n not in (None, len(weights)) or not len(weights):
        raise errors.ConfigError(f"n={n} with {len(weights)} rows of weights: one a picture")
    rows = []
    for given in weights:
        row = given
        if images == 2 and np.ndim(given) == 0 and given is not None:
            share = base.number(given, "weight of the second picture", 0, 1)
            row = [1 - share, share]
        if np.shape(row) != (images,):
            raise errors.ConfigError(f"weights {given!r}: expected {images}, one a picture")
        row = [base.number(weight, "weight", 0, 1e6) for weight in row]
        if not sum(row):
            raise errors.ConfigError(f"weights {given!r}: expected a positive sum")
        rows.append(row)
    return rows
