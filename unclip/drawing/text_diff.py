"""Text differences: a picture turned from one caption to another (section 3.3 of the paper)."""

from collections.abc import Mapping, Sequence

import numpy as np

from unclip import errors
from unclip.cascade.pipeline import Pictures, Pipeline, seeds_of
from unclip.drawing import base
from unclip.files import images
from unclip.tasks.arrays import slerp, unit

ANGLE = 0.5  # the paper's are 0.25 to 0.5
SAME = 1e-4  # |z_t - z_t0| of captions that say the same


def text_diff(
    model: Pipeline,
    image: base.Image,
    from_prompt: str,
    to_prompt: str,
    n: int = 5,
    seed: int = 0,
    *,
    angle: float | Sequence[float] = ANGLE,
    invert: bool = True,
    decoder: dict | None = None,
    upsamplers: Sequence[dict] = (),
    stages: int | None = None,
) -> Pictures:
    """Draws a picture on its way from what one caption says to what another does.

    z_i turns by spherical interpolation towards z_d, the difference of the captions' embeddings
    (unit vectors both), at length one; it keeps its own length. The base noise is one and the same.

    Args:
      image: as in `variations`.
      from_prompt: what the picture shows now; "" takes the embedding of `to_prompt` itself as z_d.
      to_prompt: what it shall show.
      n: pictures; the first is at 0 and the last at `angle`, a single one at `angle`.
      seed: of all pictures, 0 <= seed < 2**32; it matters to the upsamplers, and to the decoder
        without `invert` or with eta over 0.
      angle: theta of the paper, how far to go, 0 (the picture) to 1 (z_d); or one a picture, in
        place of `n`.
      invert: start at the picture's own x_T, as the paper does; see `variations`. False starts at
        the seed's noise.
      Other arguments as in `variations`.

    Returns:
      `Pictures`, whose recipes hold the "angle" of each.

    Raises:
      ConfigError: as `variations`, an angle out of range, or captions that do not differ.
    """
    base.need_z_i(model, "text differences")
    source = base.as_source(image)
    if np.ndim(angle):
        angles = [base.number(one, "angle", 0, 1) for one in angle]
        base.count(len(angles), "number of angles")
    else:
        last, n = base.number(angle, "angle", 0, 1), base.count(n, "n")
        angles = [last * k / (n - 1) for k in range(n)] if n > 1 else [last]
    (seed,) = seeds_of(seed, 1)
    if invert:
        decoder = base.inverting(decoder, None)
    settings = {"decoder": decoder, "upsamplers": upsamplers, "stages": stages}
    base.check(model, **settings)
    model = model.drawing(len(angles))
    z_d = _difference(model, from_prompt, to_prompt)
    z_i, x_T, own = base.embed(model, [source]), None, {}
    if invert:
        x_T, (psnr,) = base.start(model, [source], z_i, decoder)
        x_T, own = np.repeat(x_T, len(angles), axis=0), {"invert": True, "psnr": psnr}
    goal = np.linalg.norm(z_i) * z_d[None]
    z = np.concatenate([slerp(z_i, goal, theta) if theta else z_i for theta in angles])
    seeds = [seed] * len(angles)
    facts = [
        {"prompt": to_prompt, "from_prompt": from_prompt, "angle": theta, **own} for theta in angles
    ]
    return base.draw(model, "textdiff", z, seeds, [source], facts, x_T=x_T, **settings)


def redraw(
    model: Pipeline, recipe: Mapping, sources: Sequence[images.Source], settings: dict
) -> Pictures:
    """The picture of a recipe."""
    prompts = str(recipe.get("from_prompt", "")), recipe["prompt"]
    angle, invert = [recipe.get("angle")], recipe.get("invert") is True
    return text_diff(
        model, *sources, *prompts, seed=recipe["seed"], angle=angle, invert=invert, **settings
    )


def _difference(model: Pipeline, from_prompt: str, to_prompt: str) -> np.ndarray:
    """z_d float32 [D], of length one."""
    if not to_prompt.strip():
        raise errors.ConfigError("the caption to go to is empty")
    if not from_prompt.strip():
        return unit(model.embed_text([to_prompt]))[0]
    before, after = unit(model.embed_text([from_prompt, to_prompt]))
    if np.linalg.norm(after - before) < SAME:
        raise errors.ConfigError(
            f"from {from_prompt!r} to {to_prompt!r}: the CLIP does not tell these captions apart"
        )
    return unit(after - before)
