"""Kandinsky 2.2's prior in diffusers' folder layout, into a bundle: `--from kandinsky2_2-prior`.

A diffusion prior in Karlo's architecture, on the embeddings of OpenCLIP's ViT-bigG/14 (1,280
dimensions). The folder holds the text and the image encoder, the prior with the mean and deviation
of z_i, and its noise schedule. Kandinsky's decoder works on latents and is not read. That it takes
the embedding of a picture whose normalised values are all 0 as negative condition does not concern
the prior.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from unclip import errors, files
from unclip.cascade import bundle
from unclip.interop import clip
from unclip.interop.karlo.folder import prior_part
from unclip.interop.karlo.networks import check_widths
from unclip.models import clip as clip_model

# The second pipeline starts from a picture's noised embedding and is stored in the same way.
PIPELINES = ("KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline")


def read(paths: list[pathlib.Path], options: Mapping[str, Any]) -> dict[str, bundle.Part]:
    """{"clip": part, "prior": part} of a KandinskyV22PriorPipeline's folder, tensors unread.

    The prior draws as the pipeline does: 25 steps, guidance 4 against the empty caption, x_0
    clamped to the limit in the scheduler's config (10 as published).

    Args:
      paths: the folder; options: none apply.

    Raises:
      ConfigError: another pipeline, an option or noise schedule that ours do not have, or tensors
        that are not the architecture's (with their table).
      DataError: files that are missing or damaged.
    """
    if options.get("preset"):
        raise errors.ConfigError("--preset: Kandinsky's files give the architecture")
    if len(paths) != 1:
        raise errors.ConfigError(f"given {len(paths)} paths; expected Kandinsky's prior folder")
    root = paths[0]
    name = files.read_object(root / "model_index.json").get("_class_name")
    if name not in PIPELINES:
        raise errors.ConfigError(f"{root} is a {name}; expected {' or '.join(PIPELINES)}")
    parts = clip.read_hf([root / "text_encoder", root / "image_encoder"], {})
    _check_pictures(root / "image_processor" / "preprocessor_config.json", parts["clip"].arch)
    parts["prior"] = prior_part(root / "prior", "scheduler")
    check_widths(parts)
    return parts


def _check_pictures(path: pathlib.Path, arch: Mapping[str, Any]) -> None:
    """Refuses (ConfigError) an image encoder that takes pictures prepared in another way."""
    config, size = files.read_object(path), arch["image_size"]
    for name, expected in (
        ("image_mean", [list(clip_model.IMAGE_MEAN)]),
        ("image_std", [list(clip_model.IMAGE_STD)]),
        ("crop_size", [{"height": size, "width": size}, size]),
    ):
        if config.get(name, expected[0]) not in expected:
            raise errors.ConfigError(f"{path}: {name} is {config[name]}; expected {expected[0]}")
