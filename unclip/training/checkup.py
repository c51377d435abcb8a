"""What a run would be, before it runs: devices, parameters, memory, data, disk, problems."""

import math
import pathlib
import re
import shutil

import jax

from unclip import errors
from unclip.cascade import bundle
from unclip.embeddings.store import Store
from unclip.files import paths
from unclip.runtime import checkpoint, distributed, flops, optim, sharding
from unclip.runtime.flops import readable_bytes as _bytes
from unclip.training import data as inputs
from unclip.training import kept
from unclip.training.plan import Plan, as_json, lineage, make_plan
from unclip.training.start import resumed_lines


def examine(config, workdir: str) -> dict:
    """Everything the doctor knows, JSON-able; of what is wrong, everything too.

    Returns:
      {"stage", "preset", "known": as in configs/known.py, "devices", "mesh",
      "parameters": {part: count}, "trained_parameters",
      "sharding": {part: bytes a device}, "leaves", "memory_per_device": {kind: bytes},
      "remat": the `arch.remat` that fits, by the trace alone; None where a device's memory is not
      known, "flops_per_step", "learning_rate", "weight_decay": {"rate", "decayed", "not_decayed":
      {path, its numbers as *: parameters}}, "data", "disk", "resume": [what a start would say of
      the run that is there], "problems": [text]}. What a problem keeps from being known is None or
      empty.
    """
    plan = make_plan(config, workdir=paths.expanded(workdir))
    config = plan.config
    problems = [_line(problem) for problem in plan.problems]
    devices = jax.devices()
    limit = flops.chip_memory(devices[0])
    parameters = _parameters(plan)
    where, leaves, memory = _memory(plan)
    out = {
        "stage": config.stage,
        "preset": config.preset,
        "known": as_json(config.get("known")) or {},  # a config of somebody's own may have none
        "devices": {
            "count": len(devices),
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "processes": distributed.process_count(),
            "memory_bytes": limit,
        },
        "mesh": dict(plan.mesh.shape) if plan.mesh else None,
        "parameters": parameters,
        "trained_parameters": parameters.get(config.stage),
        "sharding": where,
        "leaves": leaves,
        "memory_per_device": memory,
        "flops_per_step": None if plan.params is None or plan.problems else plan.flops(),
        "learning_rate": _peak_rate(plan),
        "weight_decay": _decay(plan),
    }
    if limit and memory["total"] > limit:
        problems.append(
            f"parameters and moments need {_bytes(memory['total'])} a device, which has "
            f"{_bytes(limit)}: raise mesh.fsdp, or use more devices"
        )
    out["remat"] = None
    if limit and memory["total"] < limit and not plan.problems:
        out["remat"] = kept.propose(plan, int(limit - memory["total"]))
    out["data"] = _data(plan, problems)
    out["disk"] = _disk(plan, paths.expanded(workdir), problems)
    out["resume"] = _resume(plan, pathlib.Path(paths.expanded(workdir)))
    return out | {"problems": problems}


def _peak_rate(plan: Plan) -> float | None:
    """The learning rate at the end of the warm-up."""
    rate = plan.learning_rate
    return None if rate is None else float(rate(plan.config.optim.warmup_steps))


def _decay(plan: Plan) -> dict | None:
    """Which parameters weight decay acts on, the blocks of a stack under one name."""
    if plan.tx is None:
        return None
    settings = plan.config.optim
    decays = sharding.tree_paths(optim.decay_mask(plan.params, settings.get("no_decay", ())))
    found = {"decayed": {}, "not_decayed": {}}
    for path, leaf in sharding.tree_paths(plan.params).items():
        kind = found["decayed" if decays[path] else "not_decayed"]
        name = re.sub(r"\d+", "*", path)
        kind[name] = kind.get(name, 0) + leaf.size
    return {"rate": settings.weight_decay} | found


def _parameters(plan: Plan) -> dict[str, int]:
    """{part: all, part/branch: its own} parameters, the frozen parts first."""
    found = {}
    frozen = (plan.task and plan.frozen_shapes) or {}
    for name in plan.parts:
        if name in frozen:
            found |= _counts(name, frozen[name])
    if plan.params is not None:
        found |= _counts(plan.config.stage, plan.params)
    return found


def _memory(plan: Plan) -> tuple[dict, list, dict]:
    """(bytes a device by part, the trained leaves, bytes a device by kind)."""
    where, leaves, memory = {}, [], {}
    if plan.shardings is not None:
        rows = sharding.describe(plan.state, plan.shardings)
        leaves = [row._asdict() for row in rows if row.path.startswith("params/")]
        for row in rows:
            branch, _, rest = row.path.partition("/")
            memory[branch] = memory.get(branch, 0) + row.bytes_per_device
            if branch == "params":
                part = f"{plan.config.stage}/{rest.split('/')[0]}"
                where[part] = where.get(part, 0) + row.bytes_per_device
        memory["gradients"] = memory["params"]
        frozen = plan.frozen_shapes
        if frozen is not None:
            shardings = sharding.shardings(frozen, plan.mesh, plan.rules)
            rows = sharding.describe(frozen, shardings)
            memory["frozen"] = sum(row.bytes_per_device for row in rows)
        spec = plan.task.batch_spec(plan.config.batch_size).values()
        memory["batch"] = sum(math.prod(s.shape) * s.dtype.itemsize for s in spec) // plan.ways
    memory["total"] = sum(memory.values())
    return where, leaves, memory


def _line(error: errors.UnclipError) -> str:
    return " ".join(str(error).split())


def _tried(problems: list[str], function):
    try:
        return function()
    except errors.UnclipError as e:
        if _line(e) not in problems:  # the plan may have found it already
            problems.append(_line(e))
        return None


def _counts(part: str, tree) -> dict[str, int]:
    """{part: all, part/branch: its own} parameters."""
    size = lambda branch: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(branch))
    return {part: size(tree)} | {f"{part}/{name}": size(tree[name]) for name in sorted(tree)}


def _data(plan: Plan, problems: list[str]) -> dict:
    config, out = plan.config, {}
    for name, collection in (("train", plan.data), ("held_out", plan.held_out)):
        if collection is None:
            continue
        out[name] = {
            "samples": len(collection),
            "shards": len(collection.shard_names),
            "problems": dict(collection.problems),
        }
        for reason, count in collection.problems.items():
            named = ", ".join(collection.examples.get(reason, ())[:3])
            problems.append(
                f"{name} shards: {count} left out as {reason}{': ' * bool(named)}{named}"
                f"{', …' * (count > 3)}"
            )
    if plan.data is not None:
        out["epochs"] = config.total_steps / max(len(plan.data) / config.batch_size, 1e-9)
        if config.get("embeddings"):
            _embeddings(plan, problems)
    elif config.input.streaming and config.input.shards:
        _tried(problems, lambda: inputs.storage(config).expand(config.input.shards))
    return out


def _embeddings(plan: Plan, problems: list[str]) -> None:
    """Whether `config.embeddings` holds what this run wants to read."""
    store = _tried(problems, lambda: Store(plan.config.embeddings))
    if store is None:
        return
    _tried(problems, lambda: store.attach(plan.data))
    clip = plan.parts.get("clip")
    if clip is not None and clip.params is not None:
        _tried(problems, lambda: store.check_clip(bundle.space(clip)))


def _disk(plan: Plan, workdir: str, problems: list[str]) -> dict:
    folder = pathlib.Path(workdir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    leaves = jax.tree.leaves(plan.state)
    saved = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)  # one copy of each
    copies = plan.config.keep + 2
    needed = saved * copies
    if needed > free:
        problems.append(
            f"{copies} checkpoints need {_bytes(needed)}, {folder} has {_bytes(free)} free"
        )
    _tried(problems, lambda: lineage(plan, pathlib.Path(workdir)))
    return {"folder": str(folder), "free_bytes": free, "needed_bytes": needed}


def _resume(plan: Plan, folder: pathlib.Path) -> list[str]:
    """What a start in this workdir would say of the run that is there."""
    there = checkpoint.steps(folder / "checkpoints")
    if not there or plan.learning_rate is None:
        return []
    total = plan.config.total_steps
    if there[-1] >= total:
        return [f"nothing to do: {there[-1]} of {total} steps"]
    return resumed_lines(plan, folder, there[-1])


def _known(known: dict) -> list[str]:
    """A line for every figure of `config.known`, with its source."""
    published = [
        f"{row['what']}: {row['value']:g} ({row['source']})" for row in known.get("published", ())
    ]
    return published + [
        f"a step of {row['batch']:,} samples on {row['hardware']}: {row['seconds']:g} s "
        f"({row['source']})"
        for row in known.get("seconds_per_step", ())
    ]


def text(found: dict, *, leaves: bool = False) -> str:
    """The report for people."""
    d = found["devices"]
    lines = [
        f"stage       {found['stage']}, preset {found['preset']}",
        *(f"known       {line}" for line in _known(found["known"])),
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
    if found["remat"] is not None:
        lines.append(f"remat       --config.arch.remat={found['remat']} recomputes least and fits")
    if found["flops_per_step"]:
        lines.append(f"a step      {found['flops_per_step']:.3g} floating-point operations")
    decay = found["weight_decay"]
    if decay and decay["rate"]:
        held = {kind: sum(decay[kind].values()) for kind in ("decayed", "not_decayed")}
        lines.append(
            f"decay       {decay['rate']:g} on {held['decayed']:,} parameters, not on "
            f"{held['not_decayed']:,}"
        )
        lines += [f"  decays    {name}" for name in decay["decayed"]]
        lines += [f"  does not  {name}" for name in decay["not_decayed"] if leaves]
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
    lines += [f"resume      {line}" for line in found["resume"]]
    if leaves:
        lines += [f"  {r['path']} {r['shape']} {r['dtype']} {r['spec']}" for r in found["leaves"]]
    lines += [f"problem     {problem}" for problem in found["problems"]] or ["no problems found"]
    return "\n".join(lines)
