"""Variations of a picture: its embedding z_i, drawn again (section 3.1 of the paper)."""

from collections.abc import Mapping, Sequence

import numpy as np

from unclip import errors
from unclip.cascade.pipeline import Noise, Pictures, Pipeline, seeds_of
from unclip.drawing import base
from unclip.files import images

ETA = 0.5  # of variations that start at the picture's own x_T


def variations(
    model: Pipeline,
    image: base.Image,
    n: int = 4,
    seed: int = 0,
    *,
    invert: bool = False,
    decoder: dict | None = None,
    upsamplers: Sequence[dict] = (),
    stages: int | None = None,
    noise: Noise | None = None,
    name: str = "",
) -> Pictures:
    """Draws `n` pictures that share the embedding z_i of a picture.

    Args:
      image: uint8 [H, W, 3], a file, or a `files.images.Source`; a picture that is not square is
        cropped to its centre.
      invert: start at the picture's own x_T too, found by DDIM inversion of the decoder, in place
        of the seed's noise. Then the decoder draws by DDIM with eta 0.5 and without guidance unless
        `decoder` says otherwise. Eta 0 reconstructs the picture; how well it does, or would, the
        recipe says: "psnr", dB, at the decoder's size.
      name: of the file that pixels are from, for the recipe.
      Other arguments as in `text.generate`; the decoder draws as it was trained to without a
        caption, with guidance too.

    Raises:
      ConfigError: a part that is missing, a bad picture or setting, or several pictures that
        would be equal.
    """
    base.need_z_i(model, "variations")
    source, seeds = base.as_source(image, name), seeds_of(seed, base.count(n, "n"))
    facts, x_T = {}, None
    if invert:
        decoder = base.inverting(decoder, noise, ETA)
    settings = {"decoder": decoder, "upsamplers": upsamplers, "stages": stages, "noise": noise}
    base.check(model, **settings)
    exact = invert and decoder["eta"] == 0
    if exact and n > 1 and "upsampler_0" not in model.running(stages, decoder, upsamplers):
        raise errors.ConfigError(f"n={n} with invert and eta 0: all would be one picture; n=1")
    model = model.drawing(n)
    z_i = base.embed(model, [source])
    if invert:
        x_T, (psnr,) = base.start(model, [source], z_i, decoder)
        x_T, facts = np.repeat(x_T, n, axis=0), {"invert": True, "psnr": psnr}
    z_i = np.repeat(z_i, n, axis=0)
    return base.draw(model, "variations", z_i, seeds, [source], [facts] * n, x_T=x_T, **settings)


def redraw(
    model: Pipeline, recipe: Mapping, sources: Sequence[images.Source], settings: dict
) -> Pictures:
    """The picture of a recipe."""
    invert = recipe.get("invert") is True
    return variations(model, *sources, 1, recipe["seed"], invert=invert, **settings)
