"""The four stages as tasks: pure losses and draws for the one training loop.

`make(stage, arch, settings, ...)` builds the task of a stage from what a config or a bundle holds.
What differs between stages is a method or field of its task; nobody else asks a stage's name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from unclip import errors
from unclip.input.decode.text import T5Tokenizer
from unclip.models.clip import CLIP
from unclip.models.t5 import T5Encoder
from unclip.tasks.base import Task
from unclip.tasks.clip import ClipTask, FrozenClip
from unclip.tasks.decoder import DecoderTask
from unclip.tasks.prior import ARPriorTask, DiffusionPriorTask
from unclip.tasks.t5 import FrozenT5
from unclip.tasks.upsampler import UpsamplerTask

__all__ = [
    "ARPriorTask",
    "ClipTask",
    "DecoderTask",
    "DiffusionPriorTask",
    "FrozenClip",
    "FrozenT5",
    "Task",
    "UpsamplerTask",
]

# stage -> its tasks by kind; the first is meant where the settings name none.
KINDS: dict[str, dict[str, type[Task]]] = {
    "clip": {"": ClipTask},
    "prior": {"diffusion": DiffusionPriorTask, "ar": ARPriorTask},
    "decoder": {"": DecoderTask},
    "upsampler": {"": UpsamplerTask},
}
STAGES = tuple(KINDS)
OLD_NAMES = {"noise": "noise_schedule"}


def stage_of(part: str) -> str:
    """The stage of a part: "upsampler_0" and "upsampler_0_last" are "upsampler"."""
    return part.partition("_")[0]


def task_class(stage: str, settings: Mapping[str, Any]) -> type[Task]:
    """The class of a stage's task; settings' "kind" chooses where there are several.

    Raises:
      ConfigError: unknown stage or kind.
    """
    if stage not in KINDS:
        raise errors.unknown("stage", stage, STAGES)
    kinds = KINDS[stage]
    first = next(iter(kinds))
    kind = (settings.get("kind") or first) if len(kinds) > 1 else first
    if kind not in kinds:
        raise errors.unknown(f"{stage} kind", kind, kinds)
    return kinds[kind]


def arguments(arch: Mapping) -> dict:
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


def needs(stage: str, arch: Mapping, settings: Mapping) -> tuple[str, ...]:
    """The frozen parts a stage is trained and drawn with: of "clip" and "t5", those it reads.

    Args:
      stage: one of STAGES; arch, settings: as in `make`.

    Raises:
      ConfigError: a field the model does not have, or conditions that contradict one another.
    """
    try:
        return task_class(stage, settings).needs(arguments(arch), settings)
    except TypeError as e:
        raise errors.ConfigError(f"{stage}: {e}") from e


def current_names(settings: Mapping) -> dict[str, Any]:
    """Settings of a task, or of a bundle's part, with fields of older versions under their names
    of today."""
    return {OLD_NAMES.get(name, name): value for name, value in dict(settings).items()}


def make(
    stage: str,
    arch: Mapping,
    settings: Mapping,
    *,
    clip: Mapping | None = None,
    t5: Mapping | None = None,
    t5_tokenizer: Any = None,
    weights: Mapping[str, Any] | None = None,
    fold: bool = False,
    **options,
) -> Task:
    """The task of a stage.

    Args:
      stage: one of STAGES.
      arch: the model's fields, JSON-able as in a config or a bundle.
      settings: the task's own arguments (`config.task`); "kind" chooses the prior; zeros and
        empty strings of optional settings mean "off".
      clip, t5: architectures of the frozen parts that `needs` names, JSON-able too.
      t5_tokenizer: the content of T5's tokenizer file, from its part; None reads bytes.
      weights: {"clip", "t5", "statistics": tree}, where they are known.
      fold: run the frozen CLIP's blocks under a scan.
      **options: `stored`, where z_i is delivered by the input.

    Raises:
      ConfigError: unknown stage, or settings or fields that the stage does not have.
    """
    task = task_class(stage, settings)
    known = {field.name for field in dataclasses.fields(task) if field.init}
    settings = current_names({name: value for name, value in settings.items() if value != ""})
    if len(KINDS[stage]) > 1:
        settings.pop("kind", None)
    called = {argument: name for name, argument in task.aliases.items()}
    own = {called.get(name, name) for name in known - {"arch", "weights", "clip", "t5", "stored"}}
    wrong = [errors.unknown(f"{stage} setting", n, own).message for n in settings if n not in own]
    if wrong:
        raise errors.ConfigError("; ".join(wrong))
    settings = {task.aliases.get(name, name): value for name, value in settings.items()}
    if "draw" in settings:
        settings["draw"] = {k: v for k, v in dict(settings["draw"]).items() if v != ""}
    if "clip" in known and clip is not None:
        options["clip"] = FrozenClip(CLIP(**arguments(clip)), fold)
    if "t5" in known and t5 is not None:
        options["t5"] = FrozenT5(T5Encoder(**arguments(t5)), T5Tokenizer(t5_tokenizer))
    if weights is not None:
        options["weights"] = weights
    try:
        return task(arguments(arch), **settings, **options)
    except TypeError as e:
        raise errors.ConfigError(f"{stage}: {e}") from e
