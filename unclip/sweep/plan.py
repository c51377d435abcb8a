"""The cells of an evaluation: what is drawn and scored, and under which name.

A sweep is the product of axes over named models. A cell is one setting of every axis; its id is a
readable slug and a hash of everything that decides its numbers, including the weights, so a
finished cell is recognised and a changed setting makes another one. `drawing` draws and scores
cells, `store` keeps them and `report` shows them.
"""

import dataclasses
import itertools
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from unclip import errors, tasks
from unclip.cascade import bundle, runs
from unclip.diffusion.samplers import HAVE_ETA, SAMPLERS, own_eta
from unclip.drawing.text import EMBEDS
from unclip.sweep.store import FORMAT
from unclip.sweep.weights import BRANCHES, NEWEST, branch_of, checkpoint_hash, digest

MAX_SEED = 1 << 12  # of the axis; a picture's own seed has 32 bits
KINDS = {int: "a whole number", float: "a number", str: "a text"}
REQUIRED = "?"  # a path that the user of a preset must give
# Axis -> type of its values; cells are in this order, in which the last axis varies fastest.
AXES = {
    "model": str,
    "step": int,
    "weights": str,
    "embed": str,
    "prior_steps": int,
    "prior_guidance": float,
    "candidates": int,
    "temperature": float,
    "sampler": str,
    "eta": float,
    "steps": int,
    "guidance": float,
    "seed": int,
}
CHOICES = {"weights": BRANCHES, "embed": EMBEDS, "sampler": tuple(SAMPLERS)}
# Axis -> the stage it belongs to and its name there.
DRAW = {
    "prior_steps": ("prior", "steps"),
    "prior_guidance": ("prior", "guidance"),
    "candidates": ("prior", "candidates"),
    "temperature": ("prior", "temperature"),
    "sampler": ("decoder", "sampler"),
    "eta": ("decoder", "eta"),
    "steps": ("decoder", "steps"),
    "guidance": ("decoder", "guidance"),
}
_SHORT = {
    "prior_steps": "ps",
    "prior_guidance": "pg",
    "candidates": "c",
    "temperature": "t",
    "eta": "eta",
    "steps": "s",
    "guidance": "g",
    "seed": "seed",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A named model of the config: the places of its parts.

    Attributes:
      paths: {part of `bundle.KINDS`: RUN or BUNDLE}.
      bundle: the BUNDLE, when every part comes from it; "" otherwise.
      fixed: {axis: value} of axes that are not varied for this model.
    """

    name: str
    paths: dict[str, str]
    bundle: str
    fixed: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting of every axis.

    Attributes:
      id: names its file; letters, digits, "-", "_", "." and "=".
      settings: {axis: value}; None: the model's own value, or an axis that does not apply.
      parts: {part: (path, checkpoint step or None for a bundle)} to load.
      model_hash: names the weights, 10 hex digits.
      identity: everything that the hash in the id covers, JSON-able.
    """

    id: str
    settings: dict[str, Any]
    parts: dict[str, tuple[str, int | None]]
    model_hash: str
    identity: dict[str, Any]

    @property
    def model(self) -> str:
        """The name of its model."""
        return self.settings["model"]


# ============================================================ from the config to cells


def sources(config: Mapping) -> list[Source]:
    """The models a config names: `config.models`, or the one of its top-level fields.

    Raises:
      ConfigError: a model without a decoder, a bad name or field, a path that is not given.
      DataError: a folder that is missing.
    """
    fields = ("model", "clip", "prior", "decoder", "upsamplers")
    entries = config["models"] or {"model": {}}
    wanted = config["sweep"].get("model") or tuple(entries)
    found = []
    for name in wanted:
        if name not in entries:
            raise errors.unknown("model", name, entries)
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise errors.ConfigError(f"model name {name!r}: expected letters, digits, . _ -")
        entry = entries[name]
        for field in entry:
            if field not in (*fields, "embed"):
                raise errors.unknown(f"field of models.{name}", field, (*fields, "embed"))
        value = {field: entry.get(field) or config[field] for field in fields}
        for field in fields:
            if value[field] == REQUIRED:
                raise errors.ConfigError(
                    f"model {name!r} has a {field} of its own: --config.models.{name}.{field}=RUN, "
                    "or leave it out by naming the others in --config.sweep.model"
                )
        fixed = {"embed": entry["embed"]} if entry.get("embed") else {}
        found.append(Source(name, *_paths(name, value), fixed))
    return found


def _paths(name: str, value: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """({part: path}, the one bundle or "") of a model's five fields."""
    if isinstance(value["upsamplers"], str):
        raise errors.ConfigError(
            f"upsamplers {value['upsamplers']!r}: expected a tuple of paths, \"('RUN', 'RUN')\""
        )
    own = {part: value[part] for part in ("clip", "prior", "decoder") if value[part]}
    own |= {f"upsampler_{i}": path for i, path in enumerate(value["upsamplers"])}
    paths = {}
    if value["model"]:
        _folder("model", value["model"])
        held = bundle.describe(value["model"])["parts"]
        cascade = lambda part: part in ("clip", "t5", "prior", "decoder") or "upsampler" in part
        paths = {part: value["model"] for part in held if cascade(part)}
        if value["upsamplers"]:
            paths = {part: path for part, path in paths.items() if "upsampler" not in part}
    for part, path in own.items():
        _folder(part, path)
        runs.describe_part(path, part)
        paths[part] = path
        last = f"{part}_last"
        if not runs.is_run(path) and last in bundle.describe(path)["parts"]:
            paths[last] = path
    if "decoder" not in paths:
        raise errors.ConfigError(
            f"model {name!r} has no decoder: --config.model=BUNDLE (unclip export), or "
            "--config.decoder=RUN"
        )
    if "t5" in tasks.needs("decoder", *runs.describe_part(paths["decoder"], "decoder")):
        paths.setdefault("t5", paths["decoder"])
    return paths, "" if own else value["model"]


def _folder(what: str, path: str) -> None:
    if not pathlib.Path(path).is_dir():
        raise errors.DataError(f"{what} {path}: no such folder; expected a RUN or a BUNDLE")


def cells(config: Mapping, measured: Mapping[str, Any], *, captions: bool = True) -> list[Cell]:
    """Every cell of a config, each once, cells of equal weights next to one another.

    An empty axis takes the model's own value. An axis that does not apply (the prior's where no
    prior draws, eta of a sampler other than ddim) is left out of the cell, so that a product with
    it draws nothing twice.

    Args:
      config: see `configs/evaluate.py`.
      measured: JSON-able facts beside the axes that decide the numbers: the protocol, the metrics
        and their weights.
      captions: whether pictures are drawn from captions; else from pictures, without a prior.

    Raises:
      ConfigError: an unknown axis or value, no cells; DataError: weights that are missing.
    """
    axes = _axes(config["sweep"])
    points = list(itertools.product(*axes.values()))
    points = [dict(zip(axes, point)) for point in points]
    first = {axis: values[0] for axis, values in axes.items()}
    extra = [_checked(dict(cell)) for cell in config["cells"]]
    cells = {}
    for source in sources(config):
        mine = [p for p in extra if p.get("model", source.name) == source.name]
        for point in [*points, *({**first, **cell} for cell in mine)]:
            cell = _cell(source, config, {**point, **source.fixed}, measured, captions)
            cells.setdefault(cell.id, cell)
    for cell in extra:
        if cell.get("model") not in (None, *{c.model for c in cells.values()}):
            raise errors.unknown("model of cells", cell["model"], {c.model for c in cells.values()})
    if not cells:
        raise errors.ConfigError("the sweep has no cells: name at least one model")
    return list(cells.values())


def _axes(sweep: Mapping) -> dict[str, tuple]:
    """{axis: its values, at least one}, without the model."""
    for axis in sweep:
        if axis not in AXES:
            raise errors.unknown("axis of sweep", axis, AXES)
    axes = {}
    for axis in AXES:
        values = sweep.get(axis, ())
        if not isinstance(values, tuple | list):
            raise errors.ConfigError(f'sweep.{axis}={values!r}: expected a tuple, e.g. "(1, 2)"')
        if axis != "model":
            axes[axis] = tuple(_checked({axis: v})[axis] for v in values) or (None,)
    return axes


def _checked(point: dict[str, Any]) -> dict[str, Any]:
    """Axis values in the axis's own type.

    Raises:
      ConfigError: an unknown axis, or a value of another type or outside its range.
    """
    for axis, value in point.items():
        if axis not in AXES:
            raise errors.unknown("axis of cells", axis, AXES)
        kind = AXES[axis]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        good = isinstance(value, str) if kind is str else number and math.isfinite(value)
        if not good or (kind is int and value != int(value)):
            raise errors.ConfigError(f"sweep.{axis}: {value!r}, expected {KINDS[kind]}")
        least = {"step": NEWEST, "steps": 1, "prior_steps": 1, "candidates": 1, "seed": 0, "eta": 0}
        if axis in least and value < least[axis]:
            raise errors.ConfigError(f"sweep.{axis}: {value}, expected at least {least[axis]}")
        if axis == "seed" and value >= MAX_SEED:
            raise errors.ConfigError(f"sweep.seed: {value}, expected less than {MAX_SEED}")
        if axis in CHOICES and value not in CHOICES[axis]:
            raise errors.unknown(f"sweep.{axis}", value, CHOICES[axis])
        point[axis] = kind(value)
    return point


def _cell(source: Source, config: Mapping, point: dict, measured: Mapping, captions: bool) -> Cell:
    settings = {"model": source.name} | {axis: point.get(axis) for axis in AXES if axis != "model"}
    settings["weights"] = settings["weights"] or "ema"
    settings["seed"] = settings["seed"] or 0
    arch, decoder = runs.describe_part(source.paths["decoder"], "decoder")
    draws = {"decoder": decoder.get("draw", {})}
    decoder_sampler = draws["decoder"].get("sampler") or None
    asked = settings["embed"]
    settings["embed"] = _embed(source, arch, decoder, asked) if captions else None
    if settings["embed"] == "prior":
        prior = runs.describe_part(source.paths["prior"], "prior")[1]
        draws["prior"] = prior.get("draw", {})
        has = tasks.task_class("prior", prior).draw_defaults
    else:
        has = ()
    unused = tuple(axis for axis, (part, n) in DRAW.items() if part == "prior" and n not in has)
    for axis, (stage, name) in DRAW.items():
        if axis in unused:
            settings[axis] = None
        elif settings[axis] is None and draws[stage].get(name) not in (None, ""):
            settings[axis] = AXES[axis](draws[stage][name])
    if settings["sampler"] not in (None, *HAVE_ETA):
        settings["eta"] = 0.0  # other samplers have no eta
    elif point.get("eta") is None and point.get("sampler") not in (None, decoder_sampler):
        settings["eta"] = own_eta(settings["sampler"])  # the decoder's is meant for its own
    parts, names = {}, {}
    for part, path in sorted(source.paths.items()):
        wanted = settings["step"] if part == config["step_of"] else None
        branch = branch_of(part, settings["weights"])
        parts[part], names[part] = checkpoint_hash(path, part, wanted, branch)
    if all(step is None for _, step in parts.values()) and settings["weights"] != "ema":
        raise errors.ConfigError(
            f"weights 'params' of model {source.name!r}: a BUNDLE holds one set of weights; give "
            "the stages' RUNs"
        )
    settings["step"] = parts[config["step_of"]][1] if config["step_of"] in parts else None
    if source.bundle:
        model_hash = bundle.describe(source.bundle)["hash"]
    else:
        model_hash = digest(names)
    # Identified by its weights, so that a moved run or bundle gives the same cell.
    identity = {"format": FORMAT, "settings": settings, "model": model_hash, **measured}
    return Cell(f"{_slug(settings)}-{digest(identity)}", settings, parts, model_hash, identity)


def _embed(source: Source, arch: Mapping, decoder: Mapping, asked: str | None) -> str:
    """Where this model's z_i comes from: as asked, or as its decoder was trained."""
    if not arch.get("use_z_i", True):
        return "none"  # it reads only the caption
    trained_on_text = decoder.get("embedding") == "text"
    embed = asked or ("text" if trained_on_text else "prior")
    if embed == "prior" and trained_on_text:
        return "text"  # its prior, if any, belongs to another decoder
    if embed == "prior" and "prior" not in source.paths:
        raise errors.ConfigError(
            f"model {source.name!r} has no prior: --config.prior=RUN, or "
            "--config.sweep.embed=\"('text',)\""
        )
    return embed


def _slug(settings: Mapping[str, Any]) -> str:
    words = [settings["model"]]
    if settings["step"] is not None:
        words.append(f"step{settings['step']}")
    if settings["weights"] != "ema":
        words.append(settings["weights"])
    words += [f"z={settings['embed']}"] if settings["embed"] else []
    words += [settings["sampler"]] if settings["sampler"] else []
    for axis, short in _SHORT.items():
        if settings[axis] not in (None, 0) or axis == "seed":
            words.append(f"{short}{settings[axis]:g}")
    return re.sub(r"[^\w.=-]", "_", "-".join(words))[:150]


def share(cells: Iterable[Cell], index: int, count: int) -> list[Cell]:
    """The cells of job `index` of an array of `count`: every count-th.

    Raises:
      ConfigError: not 0 <= index < count.
    """
    if not 0 <= index < count:
        raise errors.ConfigError(f"array job {index} of {count}: expected 0 <= index < count")
    return list(cells)[index::count]


def array_job(env: Mapping[str, str], index: int | None, count: int | None) -> tuple[int, int]:
    """(index, count) of this job of an array, from the flags or else from SLURM's variables.

    Raises:
      ConfigError: one flag without the other, or an index beyond the count.
    """
    if (index is None) != (count is None):
        raise errors.ConfigError("--array_index and --array_count must be given together")
    if index is None:
        if "SLURM_ARRAY_TASK_ID" not in env:
            return 0, 1
        try:
            first = int(env.get("SLURM_ARRAY_TASK_MIN", "0"))
            step = max(1, int(env.get("SLURM_ARRAY_TASK_STEP", "1")))
            index = (int(env["SLURM_ARRAY_TASK_ID"]) - first) // step
            count = int(env["SLURM_ARRAY_TASK_COUNT"])
        except (KeyError, ValueError) as error:
            raise errors.ConfigError(
                f"SLURM's array variables cannot be read ({error}); give --array_index and "
                "--array_count"
            ) from error
    if not 0 <= index < count:
        raise errors.ConfigError(f"array job {index} of {count}: expected 0 <= index < count")
    return index, count
