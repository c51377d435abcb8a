"""Which operations of a compiled step take its time, from JAX's profiler. Not a benchmark itself:
`stages.py --profile` and `peers.py --profile` print it.

Works wherever the profiler names operations: CPUs (every thread that runs them), GPUs and TPUs. An
operation is what XLA made of the step, mostly a fusion; it is called by where it stands in the
network, and those that differ in a layer's number alone are one.
"""

import pathlib
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from unclip.runtime import hlo

_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
_LAYER = re.compile(r"_\d+(?=[/)]|$)")
_SELF = ("while", "conditional")  # what they contain is timed itself


class Operation(NamedTuple):
    """One row: seconds and times are of a step, summed over threads or devices.

    name: its place in the network, "…/block_*/mlp/fc/dot_general"; kind: XLA's word for it.
    """

    name: str
    kind: str
    seconds: float
    times: float


def profile(compiled: Any, call: Callable[[], Any], steps: int = 2) -> list[Operation]:
    """Calls the step a few times under the profiler.

    Args:
      compiled: the executable that `call` runs, of `jit(…).lower(…).compile()`.
      call: runs one step and waits for it.
      steps: how many calls.

    Returns:
      Dearest first.

    Raises:
      SystemExit: the profiler names no operation of this executable.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(steps):
                call()
        files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
        text = compiled.as_text()
        module = text.partition(",")[0].removeprefix("HloModule ")
        found = [
            event
            for file in files
            for event in _events(jax.profiler.ProfileData.from_file(str(file)), module)
        ]
    if not found:
        raise SystemExit(f"the profiler names no operation of {module} on {jax.default_backend()}")
    return by_name(found, text, steps)


def by_name(events: Iterable[tuple[str, float]], text: str, steps: int) -> list[Operation]:
    """Operations of a program in XLA's text form, dearest first, from (instruction, seconds) of all
    steps together."""
    program = hlo.parse(text)
    instructions = {i.name: i for body in program.computations.values() for i in body}
    groups: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for name, seconds in events:
        instruction = instructions.get(name)
        kind = instruction.opcode if instruction else "unknown"
        if kind in _SELF:
            continue
        place = _place(instruction, program) if instruction else ""
        group = groups[_LAYER.sub("_*", place) or name, kind]
        group[0] += seconds
        group[1] += 1
    rows = [Operation(*key, total / steps, n / steps) for key, (total, n) in groups.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def _place(instruction: hlo.Instruction, program: hlo.Program) -> str:
    """The op_name that JAX gave an instruction, or the last one of the fusion that it is."""
    named = _OP_NAME.search(instruction.rest)
    if named:
        return named[1]
    called = _CALLS.search(instruction.rest)
    inside = program.computations.get(called[1], []) if called else []
    names = [found[1] for i in inside if (found := _OP_NAME.search(i.rest))]
    return names[-1] if names else ""


def _events(data: Any, module: str) -> list[tuple[str, float]]:
    """(instruction, seconds without what runs inside it) of every run of one."""
    found = []
    for plane in data.planes:
        for line in plane.lines:
            own = []
            for event in line.events:
                stats = dict(event.stats)
                name = stats.get("hlo_op")
                if name is None and line.name == "XLA Ops":  # TPUs: the event is the instruction
                    name = event.name.partition(" = ")[0].lstrip("%")
                if name is not None and stats.get("hlo_module", module).startswith(module):
                    own.append((event.start_ns, event.duration_ns, str(name)))
            found += _alone(own)
    return found


def _alone(events: list[tuple[float, float, str]]) -> list[tuple[str, float]]:
    """(name, seconds) of one thread's (start, length, name) in ns, less those within them."""
    out, open_ = [], []  # open_: (end, place in out)
    for start, length, name in sorted(events, key=lambda e: (e[0], -e[1])):
        while open_ and open_[-1][0] <= start:
            open_.pop()
        if open_:
            at = open_[-1][1]
            out[at] = (out[at][0], out[at][1] - length / 1e9)
        open_.append((start + length, len(out)))
        out.append((name, length / 1e9))
    return out


def table(rows: list[Operation], top: int = 10) -> str:
    """Lines to print: share of the whole, milliseconds and times a step, kind, place."""
    total = sum(row.seconds for row in rows)
    lines = [f"{'share':>6} {'ms':>9} {'times':>6}  operation"]
    for row in rows[:top]:
        share = row.seconds / total if total else 0.0
        lines.append(
            f"{share:>6.1%} {row.seconds * 1e3:>9.2f} {row.times:>6.0f}  {row.kind} {row.name}"
        )
    rest = rows[top:]
    if rest:
        seconds = sum(row.seconds for row in rest)
        lines.append(f"{seconds / total:>6.1%} {seconds * 1e3:>9.2f} {'':>6}  {len(rest)} others")
    return "\n".join(lines)
