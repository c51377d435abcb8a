"""The four stages as tasks: pure losses and draws for the one training loop.

`make(stage, arch, settings, ...)` builds the task of a stage from what a config or a bundle holds.
"""

import inspect

import jax.numpy as jnp

from unclip import errors
from unclip.tasks.base import Task
from unclip.tasks.clip import ClipTask
from unclip.tasks.decoder import DecoderTask
from unclip.tasks.prior import ARPriorTask, DiffusionPriorTask
from unclip.tasks.upsampler import UpsamplerTask

__all__ = ["ARPriorTask", "ClipTask", "DecoderTask", "DiffusionPriorTask", "Task", "UpsamplerTask"]

STAGES = ("clip", "prior", "decoder", "upsampler")
NEEDS_CLIP = ("prior", "decoder")


def arguments(arch: dict) -> dict:
    """Stored architecture fields as module arguments: "" is None, lists are tuples, dtypes real."""
    out = {}
    for name, value in dict(arch).items():
        if name == "class":
            continue
        if name == "dtype":
            value = jnp.dtype(value)
        elif isinstance(value, list):
            value = tuple(value)
        elif value == "":
            value = None
        out[name] = value
    return out


def make(stage: str, arch: dict, settings: dict, **parts) -> Task:
    """The task of a stage.

    Args:
      stage: one of STAGES.
      arch: the model's fields, JSON-able as in a config or a bundle.
      settings: the task's own arguments (`config.task`); "kind" chooses the prior; zeros and
        empty strings of optional settings mean "off".
      **parts: clip (architecture), clip_params, statistics, where the stage has them.

    Raises:
      ConfigError: unknown stage, or a setting or field the stage does not have.
    """
    if stage not in STAGES:
        raise errors.unknown("stage", stage, STAGES)
    settings = {name: value for name, value in dict(settings).items() if value != ""}
    kind = settings.pop("kind", "diffusion") if stage == "prior" else ""
    priors = {"diffusion": DiffusionPriorTask, "ar": ARPriorTask}
    if stage == "prior" and kind not in priors:
        raise errors.unknown("prior kind", kind, priors)
    task = {
        "clip": ClipTask,
        "prior": priors.get(kind),
        "decoder": DecoderTask,
        "upsampler": UpsamplerTask,
    }[stage]
    known = inspect.signature(task).parameters
    for name in settings:
        if name not in known:
            raise errors.unknown(f"{stage} setting", name, set(known) - {"arch", *parts})
    if "draw" in settings:
        settings["draw"] = {k: v for k, v in dict(settings["draw"]).items() if v != ""}
    if parts.get("clip") is not None:
        parts["clip"] = arguments(parts["clip"])
    try:
        return task(arguments(arch), **settings, **parts)
    except TypeError as e:
        raise errors.ConfigError(f"{stage}: {e}") from e
