"""What a run would be, before it runs: devices, parameters, memory, data, disk, problems."""

import math
import pathlib
import shutil

import jax
from ml_collections import ConfigDict

from unclip import errors, tasks
from unclip.cascade import runs
from unclip.embeddings.store import Store
from unclip.models import t5 as t5_model
from unclip.runtime import checkpoint, distributed, flops, sharding
from unclip.runtime.flops import readable_bytes as _bytes
from unclip.training import data as inputs
from unclip.training import plan as stage
from unclip.training import step as step_of


def examine(config, workdir: str) -> dict:
    """Everything the doctor knows, JSON-able.

    Returns:
      {"stage", "preset", "devices", "mesh", "parameters": {part: count}, "trained_parameters",
      "sharding": {part: bytes a device}, "leaves", "memory_per_device": {kind: bytes},
      "flops_per_step", "data", "disk", "problems": [text]}.
    """
    problems = []
    devices = jax.devices()
    out = {
        "stage": config.stage,
        "preset": config.preset,
        "devices": {
            "count": len(devices),
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "processes": distributed.process_count(),
            "memory_bytes": flops.chip_memory(devices[0]),
        },
    }
    mesh = _tried(problems, lambda: sharding.make_mesh(stage.plain(config.mesh)))
    out["mesh"] = dict(mesh.shape) if mesh else None
    _tried(problems, lambda: stage.follow_init(config))
    key = jax.random.key(0)
    parameters, where, frozen_parts = {}, {}, {}
    for name in stage.needs(config):
        part = parameters_of(config, name, problems)
        parameters |= _counts(name, part.params)
        frozen_parts[name] = part
    clip, t5 = frozen_parts.get("clip"), frozen_parts.get("t5")
    task = stage.make_task(config, clip, t5=t5)
    if config.stage == "prior":
        task.statistics = task.shape_statistics()
    abstract = jax.eval_shape(task.init, key)
    parameters |= _counts(config.stage, abstract)
    out["parameters"] = parameters
    out["trained_parameters"] = parameters[config.stage]

    tx, schedule = step_of.make_optimizer(config, abstract)
    state = jax.eval_shape(step_of.make_init(task, tx), key)
    rules = sharding.PRESETS.get(config.sharding, config.sharding)
    memory, leaves = {}, []
    if mesh is not None and not isinstance(rules, str):
        shardings = _tried(problems, lambda: sharding.shardings(state, mesh, rules))
        if shardings is not None:
            rows = sharding.describe(state, shardings)
            leaves = [row._asdict() for row in rows if row.path.startswith("params/")]
            for row in rows:
                branch, _, rest = row.path.partition("/")
                memory[branch] = memory.get(branch, 0) + row.bytes_per_device
                if branch == "params":
                    part = f"{config.stage}/{rest.split('/')[0]}"
                    where[part] = where.get(part, 0) + row.bytes_per_device
            memory["gradients"] = memory["params"]
            if task.frozen() is not None:
                frozen = sharding.shardings(task.frozen(), mesh, rules)
                rows = sharding.describe(task.frozen(), frozen)
                memory["frozen"] = sum(row.bytes_per_device for row in rows)
            ways = mesh.shape["data"] * mesh.shape["fsdp"]
            spec = task.batch_spec(config.batch_size).values()
            memory["batch"] = sum(math.prod(s.shape) * s.dtype.itemsize for s in spec) // ways
            if config.batch_size % (ways * config.accumulate):
                problems.append(
                    f"batch_size {config.batch_size} is not a multiple of data x fsdp x accumulate "
                    f"= {ways * config.accumulate}"
                )
    elif isinstance(rules, str):
        problems.append(str(errors.unknown("sharding", rules, sharding.PRESETS)))
    memory["total"] = sum(memory.values())
    limit = out["devices"]["memory_bytes"]
    if limit and memory["total"] > limit:
        problems.append(
            f"parameters and moments need {_bytes(memory['total'])} a device, which has "
            f"{_bytes(limit)}: raise mesh.fsdp, or use more devices"
        )
    out |= {"sharding": where, "leaves": leaves, "memory_per_device": memory}
    for name in ("metric_clip", "metric_inception"):
        if config[name] and not pathlib.Path(config[name]).exists():
            problems.append(f"{name} {config[name]}: no such file or folder")
    out["flops_per_step"] = stage.model_flops(config, clip, t5)
    out["learning_rate"] = float(schedule(config.optim.warmup_steps))
    out["data"] = _data(config, problems)
    out["disk"] = _disk(config, workdir, state, problems)
    out["problems"] = problems
    return out


def parameters_of(config, name: str, problems: list[str]):
    """The frozen part `name` of a config with the shapes of its parameters.

    Where it is not given or cannot be read, that is a problem and the preset's shapes stand in.
    """
    find = {"clip": stage.clip_part, "t5": stage.t5_part}[name]
    if config[name] == "":
        problems.append(
            f"the {config.stage} needs a trained {name.upper()}: --config.{name}=RUN or BUNDLE"
        )
    part = _tried(problems, lambda: find(config))
    if part is None:
        part = find(ConfigDict(config.to_dict() | {name: ""}))
    if part.params is not None:
        part.params = jax.eval_shape(lambda tree: tree, part.params)
        return part
    arch = tasks.arguments(part.arch)
    if name == "clip":
        init = tasks.ClipTask(arch).init
    else:
        init = tasks.FrozenT5(t5_model.T5Encoder(**arch)).init
    part.params = jax.eval_shape(init, jax.random.key(0))
    return part


def _tried(problems: list[str], function):
    try:
        return function()
    except errors.UnclipError as e:
        problems.append(" ".join(str(e).split()))
        return None


def _counts(part: str, tree) -> dict[str, int]:
    """{part: all, part/branch: its own} parameters."""
    size = lambda branch: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(branch))
    return {part: size(tree)} | {f"{part}/{name}": size(tree[name]) for name in sorted(tree)}


def _data(config, problems: list[str]) -> dict:
    found = _tried(problems, lambda: inputs.collections(config))
    if found is None:
        return {}
    out = {}
    for name, collection in zip(("train", "held_out"), found):
        if collection is None:
            continue
        out[name] = {
            "samples": len(collection),
            "shards": len(collection.shard_names),
            "problems": dict(collection.problems),
        }
        for reason, count in collection.problems.items():
            problems.append(f"{name} shards: {count} samples left out ({reason})")
    if found[0] is None:
        _tried(problems, lambda: inputs.storage(config).expand(config.input.shards))
        return out
    steps = len(found[0]) / config.batch_size
    out["epochs"] = config.total_steps / max(steps, 1e-9)
    if config.get("embeddings"):
        _embeddings(config, found[0], problems)
    return out


def _embeddings(config, collection, problems: list[str]) -> None:
    """Whether `config.embeddings` holds what this run wants to read."""
    store = _tried(problems, lambda: Store(config.embeddings))
    if store is None:
        return
    _tried(problems, lambda: store.attach(collection))
    clip = _tried(problems, lambda: stage.clip_part(config)) if config.clip else None
    if clip is not None and clip.params is not None:
        _tried(problems, lambda: store.check_clip(runs.tree_hash(clip.params)))


def _disk(config, workdir: str, state, problems: list[str]) -> dict:
    folder = pathlib.Path(workdir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    leaves = jax.tree.leaves(state)
    saved = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)  # one copy of each
    needed = saved * (config.keep + 1)
    if needed > free:
        problems.append(
            f"{config.keep + 1} checkpoints need {_bytes(needed)}, {folder} has {_bytes(free)} free"
        )
    old = _tried(problems, lambda: runs.run_config(workdir)) if runs.is_run(workdir) else None
    other = old and (old["stage"], old["arch"]) != (config.stage, stage.plain(config)["arch"])
    if other and checkpoint.steps(pathlib.Path(workdir) / "checkpoints"):
        problems.append(f"{workdir} holds a run of another model")
    return {"folder": str(folder), "free_bytes": free, "needed_bytes": needed}


def text(found: dict, *, leaves: bool = False) -> str:
    """The report for people."""
    d = found["devices"]
    lines = [
        f"stage       {found['stage']}, preset {found['preset']}",
        f"devices     {d['count']} x {d['kind']} ({d['platform']}), {d['processes']} process(es)",
        "mesh        " + ", ".join(f"{k} {v}" for k, v in (found["mesh"] or {}).items()),
        "parameters",
    ]
    for part, count in found["parameters"].items():
        held = found["sharding"].get(part)
        lines.append(f"  {part:<28}{count:>16,}" + (f"   {_bytes(held)} a device" if held else ""))
    lines.append("memory a device (activations not counted)")
    memory = found["memory_per_device"]
    lines += [f"  {kind:<28}{_bytes(size):>16}" for kind, size in memory.items()]
    if found["flops_per_step"]:
        lines.append(f"a step      {found['flops_per_step']:.3g} floating-point operations")
    for name in ("train", "held_out"):
        if name in found["data"]:
            data = found["data"][name]
            lines.append(f"{name:<12}{data['samples']:,} samples in {data['shards']:,} shards")
    if "epochs" in found["data"]:
        lines.append(f"epochs      {found['data']['epochs']:.3g}")
    disk = found["disk"]
    lines.append(
        f"disk        {_bytes(disk['free_bytes'])} free in {disk['folder']}, "
        f"checkpoints need {_bytes(disk['needed_bytes'])}"
    )
    if leaves:
        lines += [f"  {r['path']} {r['shape']} {r['dtype']} {r['spec']}" for r in found["leaves"]]
    lines += [f"problem     {problem}" for problem in found["problems"]] or ["no problems found"]
    return "\n".join(lines)
