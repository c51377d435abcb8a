"""The four stages as tasks: pure losses and draws for the one training loop.

`make(stage, arch, settings, ...)` builds the task of a stage from what a config or a bundle holds.
"""

import inspect

import jax.numpy as jnp

from unclip import errors
from unclip.models.decoder import Decoder
from unclip.tasks import decoder
from unclip.tasks.base import Task
from unclip.tasks.clip import ClipTask
from unclip.tasks.decoder import DecoderTask
from unclip.tasks.prior import ARPriorTask, DiffusionPriorTask
from unclip.tasks.t5 import FrozenT5
from unclip.tasks.upsampler import UpsamplerTask

__all__ = [
    "ARPriorTask",
    "ClipTask",
    "DecoderTask",
    "DiffusionPriorTask",
    "FrozenT5",
    "Task",
    "UpsamplerTask",
]

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


def needs(stage: str, arch: dict, settings: dict) -> tuple[str, ...]:
    """The frozen parts a stage is trained and drawn with: of "clip" and "t5", those it reads.

    Args:
      stage: one of STAGES; arch, settings: as in `make`.

    Raises:
      ConfigError: a field the model does not have, or conditions that contradict one another.
    """
    if stage != "decoder":
        return ("clip",) if stage == "prior" else ()
    try:
        model = Decoder(**arguments(arch))
    except TypeError as e:
        raise errors.ConfigError(f"{stage}: {e}") from e
    return decoder.needs(model, settings.get("text_encoder") or "clip")


def make(stage: str, arch: dict, settings: dict, **parts) -> Task:
    """The task of a stage.

    Args:
      stage: one of STAGES.
      arch: the model's fields, JSON-able as in a config or a bundle.
      settings: the task's own arguments (`config.task`); "kind" chooses the prior; zeros and
        empty strings of optional settings mean "off".
      **parts: clip (architecture), clip_params, t5, t5_params, statistics, where the stage has
        them; see `needs`.

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
    for name in ("clip", "t5"):
        if parts.get(name) is not None:
            parts[name] = arguments(parts[name])
    try:
        return task(arguments(arch), **settings, **parts)
    except TypeError as e:
        raise errors.ConfigError(f"{stage}: {e}") from e
