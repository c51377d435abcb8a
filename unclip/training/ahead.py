"""A step compiled for chips that are not here: what it needs and what it would take.

Only shapes are used: no parameter is ever allocated. docs/compile.md says what each figure counts.
"""

import concurrent.futures
import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import resource
import tempfile
import time
from typing import NamedTuple

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from unclip import errors, files
from unclip.runtime import flops, hlo, sharding
from unclip.runtime.flops import readable_bytes as _bytes
from unclip.training import kept
from unclip.training.plan import Plan, make_plan

# generation -> (libtpu's name, its chip configuration, dimensions). A device is a chip: the two
# cores of v4 and v5p work as one ("megacore").
GENERATIONS = {
    "v4": ("v4", "megacore", 3),
    "v5e": ("v5e", "default", 2),
    "v5p": ("v5", "megacore", 3),
    "v6e": ("v6e", "default", 2),
}
_SIDES = {2: (2, 4, 8, 16), 3: (2, 4, 8, 12, 16, 20, 24)}


# ============================================================ the hardware


class Topology(NamedTuple):
    """A slice: generation ("v5p") and chips along each dimension ((4, 4, 4))."""

    generation: str
    shape: tuple[int, ...]


def parse_topology(text: str) -> Topology:
    """ "v5p:4x4x4" -> Topology("v5p", (4, 4, 4)).

    v4 and v5p have three dimensions (the last may be 1), v5e and v6e two. A host holds 2 x 2 chips,
    so a slice is made of those; one chip alone is 1x1 or 1x1x1.

    Raises:
      ConfigError: no such generation, or no such slice of it; names the nearest.
    """
    generation, _, rest = text.partition(":")
    if generation not in GENERATIONS:
        raise errors.unknown("TPU generation", generation, GENERATIONS)
    dims = GENERATIONS[generation][2]
    sides = [int(side) for side in re.findall(r"\d+", rest)[:4]]
    allowed = [_SIDES[dims], _SIDES[dims], (1, *_SIDES[dims])][:dims]
    if re.fullmatch(r"\d+(x\d+)+", rest) and len(sides) == dims:
        fits = all(side in choices for side, choices in zip(sides, allowed))
        if fits or set(sides) == {1}:
            return Topology(generation, tuple(sides))
    near = [
        min(choices, key=lambda choice, side=side: (abs(choice - side), choice))
        for side, choices in zip([*sides, 2, 2, 2], allowed)
    ]
    example = "AxBxC, C may be 1" if dims == 3 else "AxB"
    raise errors.ConfigError(
        f"topology {text!r}: no such slice; did you mean "
        f"'{generation}:{'x'.join(map(str, near))}'? {generation} slices are {example}, each side "
        f"one of {', '.join(map(str, _SIDES[dims]))}"
    )


def topology_devices(topology: Topology) -> list:
    """Descriptions of a slice's chips, from libtpu; no TPU is needed or touched.

    Raises:
      ConfigError: libtpu is not installed, or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise errors.ConfigError(
            "compiling for a TPU needs its compiler: pip install libtpu (or use --devices N)"
        )
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server: outside Google Cloud that hangs
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock file: several compilations may run at once
        "TPU_ACCELERATOR_TYPE": "",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_LOG_DIR": "disabled",
    }.items():
        os.environ.setdefault(name, value)
    generation, shape = topology
    name, chip, dims = GENERATIONS[generation]
    host = (1, 1, 1) if set(shape) == {1} else (2, 2, 1)
    # Rings close where a dimension is as long as the hardware's cubes or pods are.
    wrap = [s % 4 == 0 if dims == 3 else s == 16 for s in shape] + [False] * (3 - dims)
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{name}:{'x'.join(map(str, shape))}",
            chip_config_name=chip,
            chips_per_host_bounds=host,
            num_slices=1,
            wrap=tuple(wrap),
        )
    except jax.errors.JaxRuntimeError as e:
        raise errors.ConfigError(f"libtpu: {str(e).splitlines()[0]}") from e
    return list(found.devices)


# ============================================================ the program


def lower(config: ConfigDict, devices: list, step: str = "train"):
    """Traces what the training loop would run on `devices`, from shapes.

    Args:
      config: of any stage; the frozen CLIP is read if it is named, else it has the preset's shape.
      step: "train", or "sample": drawing `config.sample_examples` rows (as many as fill the mesh
        evenly) with the settings of `config.task.draw` and the averaged parameters.

    Returns:
      (plan, lowered, rows): the `Plan`, the lowered function, and how many rows it works on.

    Raises:
      ConfigError: the config does not fit the mesh, or the stage draws nothing.
    """
    if step == "sample":  # nothing is trained, so any batch size will do
        config = config.copy_and_resolve_references()
        config.batch_size, config.accumulate = len(devices), 1
    plan = make_plan(config, devices=devices, shapes_only=True)
    plan.check()
    config, task = plan.config, plan.task
    frozen = plan.frozen_shapes
    frozen = frozen and {name: plan.placed_shapes(tree) for name, tree in frozen.items()}
    state = sharding.abstract(plan.state, plan.shardings)
    if step == "train":
        rows = config.batch_size
        return plan, plan.make_step().lower(state, frozen, plan.batch_shapes()), rows
    task = task.whole()
    sample = task.predict().get("sample")
    if sample is None:
        raise errors.ConfigError(f"--step sample: the {config.stage} stage draws nothing")
    rows = -(-config.sample_examples // plan.ways) * plan.ways
    seed = config.seed
    function = jax.jit(
        lambda params, frozen, batch: sample(params, frozen, batch, jax.random.key(seed)),
        out_shardings=sharding.replicated(plan.mesh),
    )
    plan = dataclasses.replace(plan, task=task)
    return plan, function.lower(state["ema"], frozen, plan.batch_shapes(rows)), rows


# ============================================================ what the compiler says


def examine(
    config: ConfigDict,
    devices: list,
    *,
    step: str = "train",
    hbm: int | None = None,
    options: dict[str, str | bool] | None = None,
    hlo_file: str | None = None,
    quick: bool = False,
    top: int = 0,
) -> dict:
    """Compiles and reports.

    Args:
      devices: of `topology_devices`, or real or simulated ones.
      hbm: bytes of a chip, where not its own.
      options: given to the compiler as they are.
      hlo_file: where to write the program's text.
      quick: return when memory is assigned, before code is generated; TPU only. The compiler
        cannot be stopped: it goes on in a thread until the process ends.
      top: how many kernels are listed: custom ones, then the others, each by its estimate, or by
        its operations where there is none.

    Returns:
      A JSON-able dict: "stage", "preset", "step", "devices", "mesh", "rows", "parameters",
      "trained_parameters", "memory_per_chip" (bytes by kind), "fits" (None where the chip's size
      is not known), "flops" ("model", "compiled": of all chips), "estimated_seconds",
      "communication_seconds", "utilisation", "collectives" ({kind: {"count", "bytes"}}),
      "unknown_loops", "compile_seconds" ("trace", "wall", "cpu"), "kernels" (the `top` dearest:
      "name", "kind", "source", "runs", "seconds", "share" of all estimated seconds, "flops" and
      "utilisation" of a chip), "advice" (what would be quicker and fit), "problems". What the
      compiler does not tell is None.

    Raises:
      ConfigError: see `lower`; or the compiler has no such option.
    """
    chip = devices[0]
    limit = hbm or flops.chip_memory(chip)
    out = {
        "stage": config.stage,
        "preset": config.preset,
        "step": step,
        "devices": {"count": len(devices), "kind": chip.device_kind, "memory_bytes": limit},
    }
    start = time.perf_counter()
    plan, lowered, rows = lower(config, devices, step)
    config = plan.config
    size = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    frozen = plan.frozen_shapes or {}
    trained = size(plan.params)
    out |= {"mesh": dict(plan.mesh.shape), "rows": rows, "trained_parameters": trained}
    out["parameters"] = trained + sum(size(frozen[name]) for name in plan.parts)
    out["compile_seconds"] = {"trace": round(time.perf_counter() - start, 2)}
    start, cpu = time.perf_counter(), _cpu_seconds()
    needed, program, memory = None, "", None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # `compiled.as_text()` of libtpu fails where a collective is fused in several steps.
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        dump = dump if chip.platform == "tpu" else {}
        compiling = lambda: lowered.compile(compiler_options=(options or {}) | dump or None)
        try:
            if quick and dump:
                program, memory = _until_assigned(compiling, pathlib.Path(folder))
            else:
                program, memory = _whole(compiling(), pathlib.Path(folder))
        except jax.errors.JaxRuntimeError as e:
            needed = _out_of_memory(str(e))
        out["compile_seconds"] |= {
            "wall": round(time.perf_counter() - start, 2),
            "cpu": round(_cpu_seconds() - cpu, 2),
        }
    if hlo_file and program:
        with files.replacing(pathlib.Path(hlo_file)) as path:
            path.write_text(program)
    out |= {"memory_per_chip": {}, "fits": None, "estimated_seconds": None, "utilisation": None}
    out |= {"communication_seconds": None, "collectives": None, "unknown_loops": None}
    out["kernels"] = []
    model = plan.flops() if step == "train" else None
    out["flops"] = {"model": model, "compiled": None}
    if memory is None:
        out["memory_per_chip"] = {"temporaries": needed}
        out["fits"] = False
    else:
        _measure(out, memory, program, chip, top)
    proposed = _remat(out, plan)
    out["advice"] = _advice(out, config, proposed)
    out["problems"] = _problems(out, config, proposed)
    return out


def _whole(compiled, folder: pathlib.Path) -> tuple[str, dict[str, int]]:
    """A compiled program's text and the bytes a chip needs for it, by kind."""
    dumped = sorted(folder.glob("*after_codegen.txt"))
    sizes = compiled.memory_analysis()
    return dumped[-1].read_text() if dumped else compiled.as_text(), {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
    }


def _until_assigned(compiling, folder: pathlib.Path) -> tuple[str, dict[str, int]]:
    """As `_whole`, from what the compiler writes before it generates code."""
    work = concurrent.futures.ThreadPoolExecutor(1).submit(compiling)
    stem, ending = "after_optimizations", "_after_buffer_assignment.txt"
    while not work.done() and not list(folder.glob(f"*{stem}{ending}")):
        time.sleep(0.2)
    if work.done():
        work.result()  # raises what compiling raised
    path = max(folder.glob(f"*{stem}{ending}"), key=lambda found: found.stat().st_size)
    text, before = path.read_text(), -1
    while len(text) != before and not work.done():  # until it is written whole
        time.sleep(1.0)
        text, before = path.read_text(), len(text)
    assigned = path.with_name(path.name.replace(ending, "-buffer-assignment.txt"))
    return text, hlo.assigned_bytes(assigned.read_text())


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _out_of_memory(message: str) -> int | None:
    """Bytes the compiler wanted for temporaries, from its refusal; other refusals are raised."""
    if "RESOURCE_EXHAUSTED" not in message:
        raise errors.ConfigError(f"the compiler: {message.splitlines()[0]}")
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available|Used ([\d.]+)([KMGT]) of", message)
    size, unit = [group for group in found.groups() if group] if found else (None, "")
    return found and int(float(size) * 1024 ** (1 + "KMGT".index(unit)))


def _measure(out: dict, memory: dict[str, int], program: str, chip, top: int) -> None:
    """Adds to a report what the compiled program and its text tell."""
    out["memory_per_chip"] = memory | {"total": sum(memory.values())}
    limit = out["devices"]["memory_bytes"]
    out["fits"] = memory and sum(memory.values()) <= limit if limit else None
    cycle = flops.chip_cycle(chip)
    found = hlo.summarise(program, cycle and hlo.Chip(*cycle))
    chips = out["devices"]["count"]
    out["unknown_loops"] = found.unknown_loops
    out["collectives"] = {kind: c._asdict() for kind, c in found.collectives.items()}
    counted = out["flops"]
    counted["compiled"] = found.flops * chips
    # Drawing recomputes nothing, so what runs is what is needed.
    counted["model"] = counted["model"] or counted["compiled"] or None
    clock, links = flops.chip_clock(chip), flops.chip_links(chip)
    # A custom kernel has its estimate even where the compiler was stopped before it made its own.
    timed = any(kernel.cycles for kernel in found.kernels if kernel.kind != "custom")
    if clock and timed:
        out["estimated_seconds"] = found.cycles / clock
        out["utilisation"] = flops.utilisation(
            counted["model"], out["estimated_seconds"], [chip] * chips
        )
    out["kernels"] = [
        _kernel(k, found.cycles, clock if timed else None, chip) for k in found.kernels[:top]
    ]
    if links:
        moved = sum(
            c.bytes * (2 if kind == "all-reduce" else 1) for kind, c in found.collectives.items()
        )
        out["communication_seconds"] = moved / links


def _kernel(kernel: hlo.Kernel, cycles: int, clock: float | None, chip) -> dict:
    """A line of the report's "kernels"."""
    seconds = kernel.cycles / clock if clock and kernel.cycles else None
    return {
        **{name: getattr(kernel, name) for name in ("name", "kind", "source", "runs")},
        "seconds": seconds,
        "share": seconds and kernel.cycles / cycles,
        "flops": kernel.flops,
        "utilisation": seconds and flops.utilisation(kernel.flops, seconds, [chip]),
    }


SPARE = 0.95  # of a chip's memory, that a proposal counts on


def _remat(out: dict, plan: Plan) -> str | None:
    """The remat policy that the memory of a chip allows; None where it is not known, or is set."""
    memory, limit = out["memory_per_chip"], out["devices"]["memory_bytes"]
    used = memory.get("temporaries")
    if out["step"] != "train" or not limit or used is None:
        return None
    spare = SPARE * limit - (memory.get("total", used) - used)
    now = plan.config.arch.remat or ""
    whole = any(word in now for word in (kept.POLICY, "full"))  # recomputes all of some kind
    set_well = not whole if out["fits"] else now == kept.POLICY
    # No trace where what is free could not hold as much again as is in use.
    if set_well or (out["fits"] and spare < 2 * used):
        return None
    proposed = kept.propose(plan, int(spare), used)
    return None if proposed == now else proposed


def _advice(out: dict, config: ConfigDict, proposed: str | None) -> list[str]:
    if proposed is None or not out["fits"]:
        return []
    free = out["devices"]["memory_bytes"] - out["memory_per_chip"]["total"]
    return [
        f"{_bytes(free)} of a chip stay free: --config.arch.remat={proposed} in place of "
        f"{config.arch.remat} recomputes less"
    ]


def _problems(out: dict, config: ConfigDict, proposed: str | None) -> list[str]:
    """What stands in the way, each with the setting to change."""
    if out["fits"] is not False:
        return []
    memory, limit = out["memory_per_chip"], out["devices"]["memory_bytes"]
    parts = {kind: memory.get(kind) or 0 for kind in ("arguments", "temporaries")}
    shown = _bytes(memory.get("total") or parts["temporaries"])
    said = f"does not fit: a chip needs {shown} and has {_bytes(limit or 0)}"
    ways = out["mesh"]["data"] * out["mesh"]["fsdp"]
    rows = out["rows"] // ways // (config.accumulate if out["step"] == "train" else 1)
    if parts["arguments"] > parts["temporaries"]:
        if out["mesh"]["fsdp"] < out["devices"]["count"] or config.sharding == "data":
            advice = (
                "--config.sharding=fsdp --config.mesh.data=1 --config.mesh.fsdp=-1 spreads "
                "parameters, average and moments over all chips"
            )
        else:
            advice = "they are spread over all chips already: a larger slice"
        return [f"{said}; arguments (parameters, average, moments) are most of it: {advice}"]
    if out["step"] == "sample":
        advice = f"fewer rows (--config.sample_examples={max(ways, out['rows'] // 2)})"
        advice = advice if rows > 1 else "one row a chip is drawn already: a larger chip"
    elif config.arch.dtype == "float32":
        advice = "--config.arch.dtype=bfloat16"
    elif proposed or not config.arch.remat:
        advice = f"--config.arch.remat={proposed or kept.POLICY}"
    elif rows > 1:
        over = parts["temporaries"] / max(1, (limit or 1) - parts["arguments"])
        times = min(rows, 2 ** max(1, math.ceil(math.log2(max(over, 1)))))
        advice = (
            f"{rows} rows are worked on at once: --config.accumulate="
            f"{config.accumulate * times}, a larger slice, or a smaller --config.batch_size"
        )
    else:
        advice = "one row is worked on at a time already: a larger slice or a smaller model"
    return [f"{said}; temporaries are most of it: {advice}"]


def text(found: dict) -> str:
    """The report for people."""
    d, memory, known = found["devices"], found["memory_per_chip"], lambda v, f: f(v) if v else "?"
    limit = known(d["memory_bytes"], _bytes)
    lines = [
        f"stage          {found['stage']}, preset {found['preset']}, {found['step']} step",
        f"chips          {d['count']} x {d['kind']}",
        "mesh           " + ", ".join(f"{k} {v}" for k, v in found["mesh"].items()),
        f"rows           {found['rows']:,}",
        f"parameters     {found['parameters']:,} ({found['trained_parameters']:,} trained)",
        f"memory a chip  of {limit}",
    ]
    lines += [f"  {kind:<13}{known(size, _bytes):>12}" for kind, size in memory.items()]
    lines.append("operations     of a step, all chips")
    lines += [f"  {kind:<13}{known(n, '{:.4g}'.format):>12}" for kind, n in found["flops"].items()]
    seconds = lambda value: f"{value:.4g} s"
    lines += [
        f"estimated      {known(found['estimated_seconds'], seconds)}, communication not counted",
        f"utilisation    {known(found['utilisation'], '{:.3f}'.format)}",
        f"communication  {known(found['communication_seconds'], seconds)} if none is hidden",
        "collectives    of a step, a chip",
    ]
    for kind, c in (found["collectives"] or {}).items():
        lines.append(f"  {kind:<20}{c['count']:>7,} x{_bytes(c['bytes']):>12}")
    if found["collectives"] == {}:
        lines.append("  none")
    if found["unknown_loops"]:
        lines.append(f"  {found['unknown_loops']} loop(s) of unknown length count once")
    if found["kernels"]:
        lines.append("kernels        ms of a step, share, runs, operations, utilisation")
    for k in found["kernels"]:
        lines.append(
            f"  {known(k['seconds'], lambda v: f'{v * 1e3:.3f}'):>10}"
            f" {known(k['share'], '{:.1%}'.format):>6} {k['runs']:>5,} {k['flops']:>10.3g}"
            f" {known(k['utilisation'], '{:.2f}'.format):>5}  {k['kind']} {k['name']}"
            f"  {k['source']}"
        )
    took = found["compile_seconds"]
    shown = "{wall:.1f} s, CPU {cpu:.1f} s; tracing {trace:.1f} s".format(**took)
    lines.append(f"compile time   {shown}")
    lines += [f"advice         {advice}" for advice in found["advice"]]
    return "\n".join(lines + [f"problem        {problem}" for problem in found["problems"]])
