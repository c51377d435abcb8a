"""What can be wrong with a config beside what keeps a plan from being made; nothing is computed.

Every function gives or raises what it found, and looks at a matter of its own, so that a user is
told of everything at once.
"""

import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from unclip import errors
from unclip.cascade import runs
from unclip.tasks import Task

# Field -> (least, greatest, what it is).
_COUNT, _FRACTION = (1, math.inf, "a number of at least 1"), (0, 1, "a number from 0 to 1")
_NOT_NEGATIVE = (0, math.inf, "a number of at least 0")
RANGES = {
    "seed": (0, 2**32 - 1, "a number from 0 to 4294967295"),
    **dict.fromkeys(("batch_size", "total_steps", "accumulate", "max_skipped_steps"), _COUNT),
    **dict.fromkeys(("log_steps", "save_steps", "keep", "statistics_examples"), _COUNT),
    **dict.fromkeys(("eval_steps", "sample_steps", "metric_steps"), _NOT_NEGATIVE),
    **dict.fromkeys(("keep_every_steps", "spike_factor", "skip_examples"), _NOT_NEGATIVE),
    **dict.fromkeys(("eval_examples", "sample_examples", "metric_examples"), _NOT_NEGATIVE),
    "ema": _FRACTION,
    "input.cache_gib": (1 / 64, math.inf, "a number of GiB of at least 0.016"),
    "input.threads": _COUNT,
    "input.workers": _NOT_NEGATIVE,
    "input.streams": _NOT_NEGATIVE,
    "input.window_examples": _COUNT,
    "input.max_consecutive_bad": _COUNT,
    "input.max_bad_fraction": _FRACTION,
    **dict.fromkeys(("optim.sam_rho", "optim.sam_rows", "metric_bits_examples"), _NOT_NEGATIVE),
    **dict.fromkeys(("task.image_drop", "task.text_drop"), _FRACTION),
    **dict.fromkeys(("task.clamp", "task.min_snr", "task.vlb_weight"), _NOT_NEGATIVE),
    **dict.fromkeys(("task.scale", "task.range_sigmas", "task.z_scale"), _NOT_NEGATIVE),
}


def numbers(config: ConfigDict) -> list[errors.ConfigError]:
    """The numbers of a config that are outside their range.

    Each is set to the nearest that is inside, so that the rest can be looked at.
    """
    found = []
    for name, (least, greatest, expected) in RANGES.items():
        *parents, leaf = name.split(".")
        node = config
        for parent in parents:
            node = node.get(parent, {})
        value = node.get(leaf)
        if value is None:  # of another stage
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and least <= value <= greatest and math.isfinite(value)):
            found.append(errors.ConfigError(f"--config.{name}={value}: expected {expected}"))
            node[leaf] = type(value)(greatest if number and math.inf > value > least else least)
    return found


def best(config: ConfigDict) -> list[errors.ConfigError]:
    """What is wrong with the metric whose best step is kept."""
    order, _, metric = config.keep_best.partition(" ")
    if not config.keep_best or (order in ("lowest", "highest") and "/" in metric):
        return []
    return [
        errors.ConfigError(
            f"--config.keep_best={config.keep_best!r}: expected 'lowest NAME' or 'highest NAME', "
            "with a name of metrics.jsonl, such as 'lowest held_out/loss'"
        )
    ]


def sizes(config: ConfigDict) -> list[errors.ConfigError]:
    """The sizes of networks and pictures that there are none of."""
    found = []
    fields = {f"arch.{name}": value for name, value in config.arch.items()}
    for name in ("image_size", "factor", "crop"):
        fields[f"task.{name}"] = config.task.get(name)
    for name, value in fields.items():
        least = 0 if name.endswith(("_layers", ".crop")) or isinstance(value, float) else 1
        values = value if isinstance(value, tuple) else (value,)
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if value == () or any(not least <= number < math.inf for number in numbers):
            expected = "one or more" if value == () else f"at least {least}"
            found.append(errors.ConfigError(f"--config.{name}={value}: expected {expected}"))
    return found


def widths(config: ConfigDict) -> list[errors.ConfigError]:
    """The fields of architecture and task that a network cannot have together."""
    found, arch, task = [], config.arch, config.task
    levels = arch.get("multipliers")
    if levels:
        unit = (arch.get("patch") or 1) * 2 ** (len(levels) - 1)
        found += [
            errors.ConfigError(
                f"--config.task.{name}={task[name]}: expected a multiple of {unit}, which is "
                f"arch.patch x 2^(levels of arch.multipliers - 1)"
            )
            for name in ("image_size", "crop")
            if (task.get(name) or 0) % unit
        ]
    if task.get("variance") == "learned_range" and arch.get("out_channels") != 6:
        found.append(
            errors.ConfigError(
                f"task.variance='learned_range' needs --config.arch.out_channels=6, given "
                f"{arch.get('out_channels')}; or --config.task.variance=fixed_small"
            )
        )
    if arch.get("patch_size") and arch.image_size % arch.patch_size:
        found.append(
            errors.ConfigError(
                f"--config.arch.image_size={arch.image_size}: expected a multiple of "
                f"arch.patch_size={arch.patch_size}"
            )
        )
    return found


# Fields of `config.input` that transforms read, with values that none refuses.
_READ = {
    "crop": "center",
    "captions": ("txt",),
    "margin": 2.0,
    "degradation": "none",
    "degradation_probability": 1.0,
}


def transforms(config: ConfigDict, task: Task) -> list[errors.ConfigError]:
    """What the task's transforms of training, held-out and sampled pictures refuse."""
    given, found = config.input.to_dict(), {}
    # A transform names the first mistake: one field at a time, so that all are named.
    for name in _READ.keys() & given.keys():
        settings = given | _READ | {name: given[name]}
        for use in ("train", "held_out", "sample"):
            try:
                task.transform(use, settings)
            except errors.ConfigError as error:
                found.setdefault(error.message, error)
    return list(found.values())


def judges(config: ConfigDict) -> Iterator[errors.UnclipError]:
    """What keeps `metric_clip` and `metric_inception` from judging drawn pictures."""
    if config.metric_clip:
        try:
            arch, _ = runs.describe_part(config.metric_clip, "clip")
            for tower in ("vision", "text"):
                if not arch.get(f"{tower}_layers", True):
                    raise errors.ConfigError(
                        f"{config.metric_clip}: its CLIP has no {tower} tower; both are needed"
                    )
        except errors.UnclipError as error:
            yield type(error)(f"metric_clip: {error.message}")
    if config.metric_inception and not pathlib.Path(config.metric_inception).exists():
        yield errors.DataError(
            f"metric_inception {config.metric_inception}: no such file or folder"
        )


def trace(config: ConfigDict, task: Task, params: Any) -> None:
    """Traces a loss and what evaluators will call: networks refuse what does not fit.

    Args:
      config: says which of them run; params: shapes of the trained parameters.

    Raises:
      ConfigError: conditions, widths or settings that do not fit one another.
    """
    task = task.traceable()
    key, frozen, whole = jax.random.key(0), task.frozen_shapes(), task.whole()
    memory = task.memory()
    given = frozen if memory is None else {**(frozen or {}), "memory": memory}
    loss = lambda p, f, batch: task.loss(p, f, batch, key, train=True)[0]
    jax.eval_shape(loss, params, given, task.batch_spec(2))
    measures = bool(config.input.held_out and config.metric_examples)
    asked = {"bound": measures and config.get("metric_bits_examples")}
    for name, function in whole.predict().items():
        if not asked.get(name, measures or config.sample_examples):
            continue
        call = lambda p, f, batch, function=function: function(p, f, batch, key)
        jax.eval_shape(call, params, frozen, whole.batch_spec(2))
