"""What the modes of drawing share: the pictures they are given, inversion, settings, recipes."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unclip import errors
from unclip.cascade.pipeline import STAGE_TAGS, Noise, Pictures, Pipeline
from unclip.files import images
from unclip.input.decode.image import for_clip, resize_and_crop
from unclip.tasks.arrays import to_uint8

MIN_SIDE = 8  # of a given picture, pixels: a smaller one holds nothing to start from
Image = np.ndarray | str | os.PathLike | images.Source


def as_source(image: Image, name: str = "") -> images.Source:
    """A picture as the modes take it: its pixels, a file, or both with how it was drawn.

    Args:
      image: uint8 [H, W, 3]; a path, whose recipe is kept where it has one; or a `Source`.
      name: of the file that pixels are from.

    Raises:
      ConfigError: pixels of another kind, or fewer than `MIN_SIDE` a side.
      DataError: a file that cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        image = images.open_source(image)
    if not isinstance(image, images.Source):
        image = images.Source(np.asarray(image), name)
    pixels, name = image.pixels, f" {image.name!r}" if image.name else ""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise errors.ConfigError(
            f"picture{name} is {pixels.dtype} {list(pixels.shape)}: expected uint8 [H, W, 3]"
        )
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise errors.ConfigError(
            f"picture{name} is {width}x{height} pixels: expected at least {MIN_SIDE} a side"
        )
    return image


def number(value: Any, what: str, low: float, high: float) -> float:
    """A finite number from `low` to `high`; ConfigError for anything else."""
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not low <= value <= high:
        raise errors.ConfigError(f"{what} {value!r}: expected a number from {low:g} to {high:g}")
    return float(value)


def count(value: Any, what: str) -> int:
    """A whole number from 1 on; ConfigError for anything else."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise errors.ConfigError(f"{what}={value!r}: expected at least 1")
    return int(value)


def need_z_i(model: Pipeline, what: str) -> None:
    """Refuses a model that cannot draw from a picture's embedding: `what` needs it."""
    model.need("clip", what)
    model.need("decoder", what)
    task = model.task("decoder")
    if task.embedding == "text" or not task.model.use_z_i:
        read = "was trained on z_t (embedding='text')" if task.model.use_z_i else "reads none"
        raise errors.ConfigError(f"{what} need a decoder of z_i; this one {read}")


def check_noise(noise: Noise | None, running: Sequence[str]) -> None:
    """Refuses noise of stages that do not draw."""
    for name in noise or {}:
        if name in STAGE_TAGS and name not in running:
            raise errors.ConfigError(
                f"noise of {name!r} would have no effect: here {', '.join(running)} draw"
            )


def check(
    model: Pipeline,
    *,
    decoder: dict | None = None,
    upsamplers: Sequence[dict] = (),
    stages: int | None = None,
    noise: Noise | None = None,
) -> None:
    """Refuses settings of a draw that are wrong or idle, before anything is computed."""
    check_noise(noise, ["decoder", *model.running(stages, decoder, upsamplers)])


def embed(model: Pipeline, sources: Sequence[images.Source]) -> np.ndarray:
    """z_i float32 [n, D] of pictures, each seen as CLIP's own preprocessing shows it."""
    side = model.task("clip").model.image_size
    return model.embed_image(np.stack([for_clip(source.pixels, side) for source in sources]))


def inverting(decoder: dict | None, noise: Noise | None, eta: float = 0.0) -> dict:
    """Settings of a decoder's draw that starts where DDIM leads from a picture: DDIM, and unless
    given otherwise `eta` and no guidance, under which the way back is not the way there."""
    given = dict(decoder or {})
    if given.get("sampler", "ddim") != "ddim":
        raise errors.ConfigError(
            f"sampler {given['sampler']!r} with invert: the way back from a picture is DDIM's, "
            "expected sampler 'ddim' or invert=False"
        )
    if "decoder" in (noise or {}):
        raise errors.ConfigError("noise of 'decoder' with invert: x_T is the picture's own")
    return {"sampler": "ddim", "eta": eta, "guidance": 1.0} | given


def start(
    model: Pipeline, sources: Sequence[images.Source], z_i: np.ndarray, decoder: dict
) -> tuple[np.ndarray, list[float]]:
    """(x_T float32 [n, h, w, 3] of pictures at the decoder's size, by DDIM inversion; how near eta
    0 would lead back to each, peak signal-to-noise ratio in dB, at most 100)."""
    pixels = np.stack([resize_and_crop(s.pixels, model.stage_size("decoder"))[0] for s in sources])
    x_T, error = model.invert(pixels, z_i, decoder=decoder)
    psnr = 20 * np.log10(2 / np.maximum(np.float64(error), 2e-5))
    return x_T, [round(float(one), 3) for one in psnr]


def draw(
    model: Pipeline,
    mode: str,
    z_i: np.ndarray,
    seeds: Sequence[int],
    sources: Sequence[images.Source],
    facts: Sequence[Mapping[str, Any]],
    *,
    x_T: np.ndarray | None = None,
    decoder: dict | None = None,
    upsamplers: Sequence[dict] = (),
    stages: int | None = None,
    noise: Noise | None = None,
) -> Pictures:
    """Draws embeddings as the decoder was trained to without a caption.

    Args:
      z_i: float32 [n, D]; seeds: one a picture; x_T: float32 [n, h, w, 3], or the seeds' noise.
      sources: what the pictures are drawn from; facts: what else each one's recipe says.
      Other arguments as in `Pipeline.decode`.
    """
    drawn = model.decode(
        z_i,
        None,
        seeds,
        decoder=decoder,
        upsamplers=upsamplers,
        stages=stages,
        x_T=x_T,
        noise=noise,
    )
    chosen = {"decoder": decoder or {}} | dict(zip(model.upsamplers, upsamplers))
    settings = model.in_force(chosen, stages, noise)
    settings["images"] = [source.record for source in sources]
    recipes = [
        {"mode": mode, "prompt": "", "seed": seed, **settings, **fact}
        for seed, fact in zip(seeds, facts)
    ]
    return pictures(drawn, recipes)


def pictures(drawn: Mapping[str, np.ndarray], recipes: list[dict]) -> Pictures:
    """`Pictures` of what the stages drew, float32 in [-1, 1] each."""
    stages = {name: to_uint8(found) for name, found in drawn.items()}
    return Pictures(list(stages.values())[-1], recipes, stages)
