"""A small picture made large by the cascade's upsamplers alone."""

from collections.abc import Mapping, Sequence

import numpy as np

from unclip import errors
from unclip.cascade.pipeline import Noise, Pictures, Pipeline, seeds_of
from unclip.drawing import base
from unclip.files import images
from unclip.input.decode.image import resize_and_crop
from unclip.tasks.arrays import to_float


def upsample(
    model: Pipeline,
    image: base.Image,
    n: int = 1,
    seed: int = 0,
    *,
    upsamplers: Sequence[dict] = (),
    noise: Noise | None = None,
) -> Pictures:
    """Draws a picture larger, as the upsamplers make a decoder's.

    It starts at the last upsampler whose small pictures are not larger than the given one. Of that
    size is what is seen of it: the centre square, resized.

    Args:
      image: as in `variations`, at least as large as the first upsampler's small pictures.
      n, seed: as in `text.generate`.
      upsamplers: settings of those that run, in their order; noise: see `cascade.pipeline`.

    Raises:
      ConfigError: no upsampler, a bad picture or setting.
    """
    if not model.upsamplers:
        model.need("upsampler_0", "making a picture larger")
    source, seeds = base.as_source(image), seeds_of(seed, base.count(n, "n"))
    shorter = min(source.pixels.shape[:2])
    low = lambda name: model.stage_size(name) // model.task(name).factor
    if shorter < low(model.upsamplers[0]):
        raise errors.ConfigError(
            f"picture {source.name!r} is {shorter} pixels at its shorter side: the upsamplers "
            f"start at {low(model.upsamplers[0])}"
        )
    first = max(k for k, name in enumerate(model.upsamplers) if low(name) <= shorter)
    names = model.upsamplers[first:]
    base.check_noise(noise, names)
    if len(upsamplers) > len(names):
        raise errors.ConfigError(
            f"settings for {len(upsamplers)} upsamplers, of which {len(names)} run from "
            f"{low(names[0])} pixels on: they would have no effect"
        )
    for name, settings in zip(names, upsamplers):
        model.task(name).checked_draw(settings, name)
    model = model.drawing(n)
    seen = to_float(resize_and_crop(source.pixels, low(names[0]))[0])
    drawn = model.draw_upsamplers(np.repeat(seen[None], n, axis=0), seeds, names, upsamplers, noise)
    settings = model.in_force(dict(zip(names, upsamplers)), None, noise, names)
    settings["images"] = [source.record]
    return base.pictures(
        drawn, [{"mode": "upsample", "prompt": "", "seed": s, **settings} for s in seeds]
    )


def redraw(
    model: Pipeline, recipe: Mapping, sources: Sequence[images.Source], settings: dict
) -> Pictures:
    """The picture of a recipe."""
    steps = recipe.get("steps")
    given = dict(zip(model.upsamplers, settings["upsamplers"]))
    own = [given[name] for name in model.upsamplers if isinstance(steps, dict) and name in steps]
    return upsample(model, *sources, 1, recipe["seed"], upsamplers=own)
