"""What a config stands for, built once: mesh, parts, task, optimiser, shapes, shardings, data.

`make_plan` looks at everything and runs nothing. `unclip train` carries a plan out, `unclip doctor`
reports it, `unclip compile` and benchmarks/stages.py compile its step.
"""

import ast
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from absl import logging
from ml_collections import ConfigDict

from unclip import errors, tasks
from unclip.cascade import bundle, runs, spaces
from unclip.files import paths
from unclip.input.shards.collection import Collection
from unclip.models import clip as clip_model
from unclip.models import t5 as t5_model
from unclip.runtime import checkpoint, compiled, flops, sharding
from unclip.training import checks
from unclip.training import data as inputs
from unclip.training import step as steps

# Fields of an architecture that a run may choose anew: they leave the parameters as they are.
RUNTIME_FIELDS = {"attention_impl", "dtype", "dropout", "remat"}
# Settings of a task that fine-tuning chooses anew: they are about training alone.
TRAINING_SETTINGS = {
    *("crop", "image_drop", "min_snr", "t_below", "text_drop", "timesteps", "vlb_weight"),
}
# Frozen part -> its architectures by name, for where the config names no trained one.
FROZEN_PRESETS = {"clip": clip_model.PRESETS, "t5": t5_model.PRESETS}
# Fields that decide which leaves a state has and their shapes, beside the architecture.
_DECIDES = {
    *("clip", "clip_preset", "t5", "t5_preset", "task"),
    *("optim.clip_norm", "optim.freeze", "optim.weight_decay"),
}
RANDOM = "random"  # config.clip or config.t5: random parameters, for benchmarks


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run before it runs.

    Attributes:
      config: a copy, with what `follow_init` filled in.
      mesh: the devices; None where the config's mesh does not fit them.
      rules: (pattern, spec) of the parameters' shardings.
      parts: {"clip", "t5": `bundle.Part`} that the task reads; parameters None for a preset's
        shapes.
      task: with the parts' parameters as its weights, as far as they are known; None where the
        config describes none.
      tx: optax transformation; learning_rate: its rate by step.
      params: ShapeDtypeStructs of the trained parameters; state: of the whole state
        {"params", "ema", "opt", "step"}; shardings: NamedShardings of `state`, None without mesh.
      data, held_out: the collections; None for streaming, or where none is given.
      problems: what stands in the way of running; where there are none every field is there.
    """

    config: ConfigDict
    mesh: jax.sharding.Mesh | None
    rules: Sequence[tuple[str, Any]] | None
    parts: Mapping[str, bundle.Part]
    task: tasks.Task | None
    tx: optax.GradientTransformation | None
    learning_rate: Callable | None
    params: Any
    state: Any
    shardings: Any
    data: Collection | None
    held_out: Collection | None
    problems: tuple[errors.UnclipError, ...]

    def check(self) -> None:
        """Raises what stands in the way, all of it in one error of the first one's class."""
        if not self.problems:
            return
        first, *others = self.problems
        if not others:
            raise first
        lines = []
        for problem in self.problems:
            lines.append(f"  {' '.join(problem.message.split())}")
            lines += [f"  {line}" for line in problem.table.splitlines()]
        text = f"{len(self.problems)} problems stand in the way of this run:"
        raise type(first)(text, "\n".join(lines))

    @property
    def ways(self) -> int:
        """How many shares a batch is cut into: data x fsdp."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def put(self, tree: Any) -> Any:
        """A tree of host arrays on the mesh, by the rules for parameters."""
        return jax.device_put(tree, sharding.shardings(tree, self.mesh, self.rules))

    def placed_shapes(self, tree: Any) -> Any:
        """A tree of shapes with the shardings that `put` would give it."""
        return sharding.abstract(tree, sharding.shardings(tree, self.mesh, self.rules))

    @functools.cached_property
    def init(self) -> Callable:
        """init(key, start=None) -> state, jitted: see `step.make_init`."""
        init = steps.make_init(self.task, self.tx)
        options = compiled.options()
        return jax.jit(init, out_shardings=self.shardings, compiler_options=options)

    def make_step(self, task: tasks.Task | None = None) -> Callable:
        """step(state, frozen, batch) -> (state, metrics), jitted; the state is given away."""
        step = steps.make_step(task or self.task, self.tx, self.learning_rate, self.config)
        out = (self.shardings, sharding.replicated(self.mesh))
        return jax.jit(step, out_shardings=out, donate_argnums=0)

    def batch_shapes(self, rows: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch on the mesh, by shape; rows: global, None for the config's batch size."""
        where = sharding.batch_sharding(self.mesh)
        spec = self.task.batch_spec(rows or self.config.batch_size)
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
            for name, leaf in spec.items()
        }

    def flops(self) -> float:
        """Floating-point operations one step needs, recomputation not counted: `flops.count`."""
        key = jax.random.key(0)
        task = self.task.traceable()
        # Dropout and the choice of timesteps are not counted, so the loss is traced without.
        loss = lambda p, f, b: task.loss(p, f, b, key, train=False)[0]
        batch = self.task.batch_spec(self.config.batch_size)
        counted = flops.count(loss, self.params, self.frozen_shapes, batch)
        return counted * (2 if self.config.optim.sam_rho else 1)

    @functools.cached_property
    def frozen_shapes(self) -> dict[str, Any] | None:
        """The task's frozen trees as ShapeDtypeStructs, or None."""
        return self.task.frozen_shapes()


def make_plan(
    config: ConfigDict,
    *,
    devices: Sequence | None = None,
    shapes_only: bool = False,
    workdir: str | os.PathLike | None = None,
) -> Plan:
    """Looks at everything a config names; collects what is wrong with it instead of raising it.

    Args:
      config: of a stage; it is left as it is. `~` in its paths is expanded.
      devices: of the mesh; None: all of this job.
      shapes_only: no shards are opened, frozen parts need not be trained (a preset's shapes do),
        and what only a run needs is not looked at: evaluators, `init_from`, drawing.
      workdir: of the run, where what lies there already is to be looked at too.

    Raises:
      ConfigError: the config is of no stage.
    """
    if config.get("stage") not in tasks.STAGES:
        kinds = [f"configs/{stage}.py:PRESET" for stage in tasks.STAGES]
        raise errors.ConfigError(
            f"a config of stage {config.get('stage')!r} trains nothing; expected "
            f"{', '.join(kinds)}, or one like them"
        )
    problems: list[errors.UnclipError] = []

    def attempt(function: Callable, default: Any = None) -> Any:
        try:
            return function()
        except errors.UnclipError as error:
            problems.append(error)
            return default

    config = _expanded(config)
    attempt(lambda: follow_init(config))
    problems += checks.numbers(config) + checks.best(config)
    no_network = checks.sizes(config)
    problems += no_network
    mesh = attempt(lambda: sharding.make_mesh(as_json(config.mesh), devices))
    rules = attempt(lambda: sharding_rules(config))
    attempt(lambda: _check_layout(config))
    parts = {}
    for name in attempt(lambda: needs(config), ()):
        part = attempt(lambda name=name: frozen_part(config, name))
        untrained = part is not None and part.params is None and config[name] != RANDOM
        if untrained and not shapes_only:
            problems.append(
                errors.ConfigError(
                    f"the {config.stage} needs a trained {name.upper()}: --config.{name}=RUN or "
                    f"BUNDLE (or =random, for benchmarks)"
                )
            )
        if part is None:
            preset = ConfigDict(config.to_dict() | {name: ""})
            part = attempt(lambda name=name, preset=preset: frozen_part(preset, name))
        if part is not None:
            parts[name] = part
    task = None if no_network else attempt(lambda: make_task(config, parts))
    # The rest is looked at with the stage's own settings of drawing.
    if task is None and not no_network:
        with contextlib.suppress(errors.UnclipError):
            task = make_task(_without_draw(config), parts)
    tx = rate = params = state = where = None
    ill_sized = [] if no_network else checks.widths(config)
    if task is not None:
        ill_sized += checks.transforms(config, task)
    problems += ill_sized
    if task is not None and not ill_sized:
        params = attempt(lambda: jax.eval_shape(task.traceable().init, jax.random.key(0)))
    if params is None:
        attempt(lambda: steps.check_optimizer(config))
    else:
        tx, rate = attempt(lambda: steps.make_optimizer(config, params), (None, None))
    if tx is not None:
        fresh = steps.make_init(task.traceable(), tx)
        state = jax.eval_shape(fresh, jax.random.key(0))
    if state is not None and mesh is not None and rules is not None:
        where = attempt(lambda: sharding.shardings(state, mesh, rules))
    if mesh is not None:
        attempt(lambda: _check_batch(config, mesh))
    data = held_out = None
    if not shapes_only:
        data, held_out = attempt(lambda: inputs.collections(config), (None, None))
        problems += checks.judges(config)
        if params is not None:
            attempt(lambda: check_init_from(config, params))
            attempt(lambda: checks.trace(config, task, params))
    if workdir is not None:
        attempt(lambda: check_workdir(config, pathlib.Path(workdir), state))
    told = {str(problem): problem for problem in problems}  # two looks may find the same
    return Plan(
        config, mesh, rules, parts, task, tx, rate, params, state, where, data, held_out,
        tuple(told.values()),
    )  # fmt: skip


def _expanded(config: ConfigDict) -> ConfigDict:
    """A copy with the home folder in place of `~`, in any field that is text."""
    config = config.copy_and_resolve_references()
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            config[name] = _expanded(value)
        elif value != (new := paths.expanded(value)):
            config[name] = new
    return config


def _without_draw(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.task.draw = ConfigDict()
    return config


def sharding_rules(config: ConfigDict) -> sharding.Rules:
    """The rules that `config.sharding` names or is; a tuple may be given as its text.

    Raises:
      ConfigError: no preset, and no tuple of (pattern, spec).
    """
    given = rules = config.sharding
    if isinstance(rules, str):  # a field of text, so a tuple comes as text too
        if rules in sharding.PRESETS:
            return sharding.PRESETS[rules]
        if not rules.lstrip().startswith(("(", "[")):
            raise errors.unknown("sharding", rules, sharding.PRESETS)
        try:
            rules = ast.literal_eval(rules.strip())
        except (ValueError, SyntaxError):
            rules = None
    pair = lambda rule: isinstance(rule, list | tuple) and rule and isinstance(rule[0], str)
    if not rules or not all(map(pair, rules)):
        raise errors.ConfigError(
            f"sharding {given!r}: expected {', '.join(sharding.PRESETS)}, or a tuple of (pattern, "
            "spec) such as \"(('/kernel$', 'fsdp'), ('.', 'replicate'))\""
        )
    return tuple(map(tuple, rules))


def _check_layout(config: ConfigDict) -> None:
    if tasks.task_class(config.stage, as_json(config.task)).splits_over_tensor:
        return
    given = [f"sharding={config.sharding}"] * (config.sharding == "tensor")
    ways = config.mesh.get("tensor", 1)
    given += [f"mesh.tensor={ways}"] * (ways not in (0, 1))
    if given:
        raise errors.ConfigError(
            f"{' and '.join(given)}: the {config.stage}'s convolutions are not split over a tensor "
            "axis, so its devices would all do the same work; expected --config.sharding=fsdp "
            "--config.mesh.data=1 --config.mesh.fsdp=-1 --config.mesh.tensor=1"
        )


def _check_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    rows = config.optim.get("sam_rows", 0) if config.optim.sam_rho else 0
    if rows and config.batch_size % (rows * config.accumulate):
        raise errors.ConfigError(
            f"batch_size {config.batch_size} is not a multiple of {rows * config.accumulate} "
            f"(optim.sam_rows {rows} x accumulate {config.accumulate})"
        )
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate
    if config.batch_size % ways:
        raise errors.ConfigError(
            f"batch_size {config.batch_size} is not a multiple of {ways} "
            f"(data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} x accumulate "
            f"{config.accumulate})"
        )


# ============================================================ the pieces


def as_json(config: Any) -> Any:
    """A ConfigDict as JSON-able dicts; anything else as it is."""
    return json.loads(config.to_json_best_effort()) if isinstance(config, ConfigDict) else config


def needs(config: ConfigDict) -> tuple[str, ...]:
    """The frozen parts a config's stage reads: of "clip" and "t5"."""
    return tasks.needs(config.stage, config.arch.to_dict(), as_json(config.task))


def frozen_part(config: ConfigDict, name: str) -> bundle.Part:
    """The frozen part "clip" or "t5" of a config; parameters None for the preset's shapes.

    T5 computes in the config's dtype, whatever it was saved with. A preset's attention is fused
    where the stage's is.

    Raises:
      ConfigError: the path holds no such part, or an unknown preset; DataError: it cannot be read.
    """
    own = {"dtype": config.arch.dtype}
    if config[name] in ("", RANDOM):
        preset, presets = config[f"{name}_preset"], FROZEN_PRESETS[name]
        if preset not in presets:
            raise errors.unknown(f"{name}_preset", preset, presets)
        fused = {"attention_impl": "fused"} if config.arch.get("attention_impl") == "fused" else {}
        return bundle.Part(name, own | fused | presets[preset], None)
    part = runs.open_part(config[name], name)
    return dataclasses.replace(part, arch=part.arch | own) if name == "t5" else part


def make_task(config: ConfigDict, parts: Mapping[str, bundle.Part]) -> tasks.Task:
    """The task a config describes; parts: those that `needs` names."""
    archs = {name: part.arch for name, part in parts.items()}
    t5 = parts["t5"].extra.get("tokenizer") if "t5" in parts else None
    return tasks.make(
        config.stage,
        config.arch.to_dict(),
        as_json(config.task),
        **archs,
        t5_tokenizer=t5,
        weights={n: part.params for n, part in parts.items() if part.params is not None},
        fold=bool(config.arch.get("fold")),
        **({"stored": True} if inputs.stores_embeddings(config) else {}),
    )


def init_part(config: ConfigDict) -> str:
    """The name of the part of `init_from` that a run starts from."""
    if config.init_part:
        return config.init_part
    settings, held = as_json(config.task), runs.settings_of(config.init_from)
    return tasks.task_class(config.stage, settings).part_name(settings, held)


def follow_init(config: ConfigDict) -> None:
    """Gives a fine-tuning config the architecture and settings of its `init_from`, in place.

    What leaves the parameters' meaning alone stays the config's: `RUNTIME_FIELDS` and folding of
    the architecture, `TRAINING_SETTINGS` of the task.

    Raises:
      ConfigError: no `init_from`, or it holds no such part; DataError: it cannot be read.
    """
    if not config.follow_init:
        return
    if not config.init_from:
        raise errors.ConfigError(
            f"configs/{config.stage}.py:{config.preset} fine-tunes: --config.init_from=BUNDLE or "
            f"RUN (unclip convert makes one), or train anew with {config.preset},scratch"
        )
    arch, settings = runs.describe_part(config.init_from, init_part(config))
    network = tasks.task_class(config.stage, settings).network
    fields = _defaults(network)
    own = {n: v for n, v in config.arch.items() if n in RUNTIME_FIELDS | {"fold"}}
    whole = lambda value: tuple(value) if isinstance(value, list) else value
    fields |= {name: whole(value) for name, value in arch.items() if name != "class"} | own
    kept = {n: v for n, v in settings.items() if n not in TRAINING_SETTINGS}
    with config.unlocked():
        config.arch = ConfigDict(fields)
        config.task = ConfigDict(as_json(config.task) | kept)


def check_init_from(config: ConfigDict, params: Any) -> None:
    """Refuses an `init_from` that holds another model than `params`, by its description alone.

    Raises:
      ConfigError: names the fields to set, or lists the parameters; DataError: it cannot be read.
    """
    if not config.init_from:
        return
    name = init_part(config)
    arch, settings = runs.describe_part(config.init_from, name)
    kind, own = (tasks.task_class(config.stage, s) for s in (settings, as_json(config.task)))
    if kind is not own:
        raise errors.ConfigError(
            f"init_from {config.init_from} is a {config.stage} of kind {settings.get('kind')!r}, "
            f"this run of kind {config.task.get('kind')!r}: expected the same"
        )
    network, free = kind.network, RUNTIME_FIELDS | {"fold"}
    whole = lambda fields: network(**tasks.arguments(fields))
    try:
        old, new = whole(arch), whole(config.arch.to_dict())
    except TypeError as error:
        raise errors.ConfigError(f"init_from {config.init_from}: {error}") from error
    names = [f.name for f in dataclasses.fields(network) if f.name not in ("parent", "name")]
    differ = [n for n in names if n not in free and getattr(old, n) != getattr(new, n)]
    if differ:
        flags = " ".join(f"--config.arch.{n}={_on_command_line(getattr(old, n))}" for n in differ)
        raise errors.ConfigError(
            f"init_from {config.init_from} is another model: expected {flags} (or "
            "--config.follow_init, which takes all of them)"
        )
    shapes = runs.part_shapes(config.init_from, name)
    if bool(old.fold) != bool(new.fold):  # the same parameters, stacked
        return
    table = checkpoint.difference(shapes, sharding.tree_paths(params))
    if table:
        frozen = " ".join(f"--config.{part}={config[part]}" for part in needs(config))
        why = f": it was trained with frozen parts of other widths than {frozen}" if frozen else ":"
        raise errors.ConfigError(f"init_from {config.init_from} is another model{why}", table)


def _on_command_line(value: Any) -> str:
    text = "" if value is None else str(value)
    return f'"{text}"' if isinstance(value, tuple) else text


def changes(old: Mapping, new: Mapping, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted field: (old value, new value)} of the fields that two configs share and differ in."""
    found = {}
    for name in old.keys() & new.keys():
        if isinstance(old[name], Mapping) and isinstance(new[name], Mapping):
            found |= changes(old[name], new[name], f"{prefix}{name}.")
        elif old[name] != new[name]:
            found[prefix + name] = (old[name], new[name])
    return dict(sorted(found.items()))


def changed_fields(network: type, old: Mapping, new: Mapping) -> str:
    """The fields in which two architectures have other parameters, in words; "" for none.

    A field that one of them does not have, being of another version, is the network's default.
    """
    old, new = (_defaults(network) | tasks.arguments(arch) for arch in (old, new))
    names = sorted((old.keys() | new.keys()) - RUNTIME_FIELDS)
    differ = [name for name in names if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)}, now {new.get(name)}" for name in differ)


def _defaults(network: type) -> dict[str, Any]:
    """The fields of a network that have a default, with it."""
    return {
        field.name: field.default
        for field in dataclasses.fields(network)
        if field.name not in ("parent", "name") and field.default is not dataclasses.MISSING
    }


def check_workdir(config: ConfigDict, folder, state: Any = None) -> None:
    """Raises ConfigError where a folder holds checkpoints of another stage, architecture or state.

    A folder where nothing was saved yet may still become another run.

    Args:
      state: shapes of the state that is to go on; None: not looked at.
    """
    if not (runs.is_run(folder) and checkpoint.steps(folder / "checkpoints")):
        return
    old, new = runs.run_config(folder), as_json(config)
    if old["stage"] != new["stage"]:
        changed = f"stage was {old['stage']}, now {new['stage']}"
    else:
        network = tasks.task_class(old["stage"], as_json(config.task)).network
        changed = changed_fields(network, old["arch"], new["arch"])
    if changed:
        raise errors.ConfigError(
            f"{folder} holds a run of another model ({changed}); choose another --workdir"
        )
    if state is None:
        return
    try:
        step, there, _ = checkpoint.stored(folder / "checkpoints")
    except errors.DataError:  # a damaged one is moved aside by the restore
        return
    table = checkpoint.difference(there, sharding.tree_paths(state))
    if table:
        told = changes(old, new)
        told = {n: v for n, v in told.items() if n.split(".")[0] in _DECIDES or n in _DECIDES}
        said = ", ".join(f"{name} was {was!r}, now {now!r}" for name, (was, now) in told.items())
        raise errors.ConfigError(
            f"{folder}: its checkpoint of step {step} is of another model or optimiser"
            f"{f' ({said})' if said else ''}; set that back, or choose another --workdir and "
            f"--config.init_from={folder}",
            table,
        )


def lineage(plan: Plan, folder: pathlib.Path) -> dict[str, Any]:
    """What `runs.lineage` is to know of a run: the spaces of its frozen parts, now and before.

    A run that is resumed, or that starts from another one, works in that one's embedding space;
    with `allow_mixed_spaces` it may change, which is written down.

    Raises:
      ConfigError: another CLIP or T5, or z_i at another scale, than it was trained with.
      DataError: the record cannot be read.
    """
    config, task = plan.config, as_json(plan.config.task)
    now = {name: bundle.space(part) for name, part in plan.parts.items() if part.params is not None}
    resumed = runs.is_run(folder) and bool(checkpoint.steps(folder / "checkpoints"))
    before = {"trained_with": {}, "mixed_spaces": ()}
    lines = []
    if resumed or config.init_from:
        path, name = (folder, config.stage) if resumed else (config.init_from, init_part(config))
        before = runs.lineage(path, name)
        for frozen, space in now.items():
            was = before["trained_with"].get(frozen)
            if was is None:
                logging.warning("%s: the %s it was trained with is unknown", path, frozen)
                continue
            where = f"--config.{frozen}={config[frozen]}"
            lines.append(spaces.another(str(path), frozen, was, where, space))
        settings = runs.describe_part(path, name)[1]
        if tasks.task_class(config.stage, settings) is tasks.task_class(config.stage, task):
            lines.append(spaces.rescaled(str(path), config.stage, settings, task))
    lines = [line for line in lines if line]
    if not config.get(spaces.FLAG):
        spaces.refuse(lines, flag=f"--config.{spaces.FLAG}")
    mixed = dict.fromkeys((*before["mixed_spaces"], *lines))
    return {"trained_with": before["trained_with"] | now, "mixed_spaces": list(mixed)}
