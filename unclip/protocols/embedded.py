"""Pictures through CLIP and the decoder, for protocols that start from pictures (section 3)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unclip import errors
from unclip.cascade.pipeline import Pictures
from unclip.input.decode.image import for_clip
from unclip.models.clip import CLIP
from unclip.protocols import base
from unclip.tasks.arrays import to_uint8


def embed(model: Any, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """z_i float32 [n, D], not normalised, of uint8 [H, W, 3] pictures, as `variations` embeds them.

    Raises:
      ConfigError: the model has no CLIP.
    """
    if "clip" not in model.parts:
        raise errors.ConfigError("embedding pictures needs the part 'clip', which is not there")
    side = CLIP(**model.parts["clip"].arch).image_size
    return model.embed_image(np.stack([for_clip(picture, side) for picture in pictures]))


def decode(
    protocol: base.EvaluationProtocol,
    model: Any,
    z_i: np.ndarray,
    rows: Sequence[int],
    seeds: Sequence[int],
    settings: dict | None,
    facts: Sequence[dict],
) -> Pictures:
    """Draws embeddings without a caption, as `UnCLIP.variations` does.

    Args:
      z_i: float32 [n, D], one per row; rows: their numbers in the protocol; seeds: one per row.
      settings: of `UnCLIP.generate`; those of the prior and of captions are ignored.
      facts: what each row's recipe says of where its embedding comes from.

    Raises:
      ConfigError: no decoder, or one that was not trained on z_i; an unknown setting.
    """
    own = {
        name: value
        for name, value in (settings or {}).items()
        if name not in ("prior", "embed", "caption")
    }
    decoder = model.parts.get("decoder")
    if decoder is None:
        raise errors.ConfigError(f"{protocol.id} needs the part 'decoder', which is not there")
    if decoder.settings.get("embedding") == "text" or not decoder.arch.get("use_z_i", True):
        raise errors.ConfigError(f"{protocol.id} needs a decoder that was trained on z_i")
    drawn = {
        name: to_uint8(stage) for name, stage in model.decode(z_i, None, list(seeds), **own).items()
    }
    chosen = {"decoder": own.get("decoder") or {}}
    chosen |= dict(zip(model.upsamplers, own.get("upsamplers") or ()))
    in_force = model.in_force(chosen, own.get("stages"))
    recipes = [
        {
            "mode": protocol.mode,
            "protocol": protocol.id,
            "key": protocol.keys[row],
            "prompt": "",
            "seed": int(seed),
            **in_force,
            **fact,
        }
        for row, seed, fact in zip(rows, seeds, facts)
    ]
    return Pictures(list(drawn.values())[-1], recipes, drawn)
