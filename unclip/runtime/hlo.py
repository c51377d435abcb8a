"""What a compiled program says about itself: loops, collectives, the compiler's estimated cycles.

`compiled.as_text()` is XLA's final program of one device. It is read here, once, as text: which
computation calls which, how often a loop runs, which instructions move bytes between chips, and
what the TPU compiler estimates each instruction to cost. XLA's own `cost_analysis()` counts the
body of a loop once; here every instruction counts as often as it runs. `unclip compile` prints
these figures.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_WIDTH = re.compile(r"\d+")  # of a type's name: f32, bf16, s4, f8e4m3fn
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"?(\d+)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_SOURCE = re.compile(r'\bop_name="([^"]*)"')
_COST = re.compile(r'"cost_estimate":\{([^}]*)\}')


class Instruction(NamedTuple):
    """One line of a computation; `rest` is everything from the operands on."""

    name: str
    shape: str
    opcode: str
    rest: str


class Program(NamedTuple):
    """A parsed program: instructions by computation, and the entry's name."""

    computations: dict[str, list[Instruction]]
    entry: str


class Collective(NamedTuple):
    """All collectives of one kind: how often they run in a step, and what one chip holds of them.

    bytes: of the larger of operand and result, summed over the runs: the gathered array of an
      all-gather, the array before it is scattered of a reduce-scatter.
    """

    count: int
    bytes: int


class Chip(NamedTuple):
    """What turns a custom kernel's own estimate into cycles of a device.

    flops, bytes: at most in a cycle, of its matrix units and of its memory.
    cores: how many share the steps of a kernel, each with half of `flops` where they are two.
    """

    flops: float
    bytes: float
    cores: int


class Kernel(NamedTuple):
    """An instruction that computes something, with all that it calls.

    kind: its opcode, "custom" for a kernel of Pallas; source: what it was traced from.
    runs: how often in a step; cycles and flops: of all runs together, as of `Summary`.
    """

    name: str
    kind: str
    source: str
    runs: int
    cycles: int
    flops: int


class Summary(NamedTuple):
    """What one run of the program does on one device.

    collectives: {kind: Collective}, kinds that occur.
    flops: of matrix products and convolutions, a multiplication and an addition counting two;
      padding does not count. Of custom kernels: as they say themselves.
    cycles: the TPU compiler's estimate, all instructions one after another; 0 where it gives none.
      Of custom kernels: see `_custom`.
    kernels: custom ones first, each group's dearest first.
    unknown_loops: how many loops have no known trip count; they are counted as running once.
    """

    collectives: dict[str, Collective]
    flops: int
    cycles: int
    unknown_loops: int
    kernels: tuple[Kernel, ...]


def parse(text: str) -> Program:
    """The computations of a program in XLA's text form.

    Raises:
      ValueError: the text holds no entry computation.
    """
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
            continue
        match = _INSTRUCTION.match(line) if current is not None else None
        if match is None:
            if current and line.strip() != "}":  # an attribute may hold a text of several lines
                current[-1] = current[-1]._replace(rest=f"{current[-1].rest} {line.strip()}")
            continue
        shape, rest = _split_shape(match[3])
        opcode, _, rest = rest.partition("(")
        current.append(Instruction(match[2], shape, opcode, rest))
    if not entry:
        raise ValueError("the program's text has no entry computation")
    return Program(computations, entry)


def _split_shape(text: str) -> tuple[str, str]:
    """("f32[2]{0}", "add(…)…") of "f32[2]{0} add(…)…"; tuples may nest and hold layouts."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter in "({") - (letter in ")}")
        if letter == " " and depth == 0:
            return text[:position], text[position + 1 :]
    return text, ""


def shape_bytes(shape: str) -> list[int]:
    """Bytes of every array of a shape, "bf16[2,8]{1,0:T(8,128)}" or a tuple of such."""
    sizes = []
    for kind, dims in _ARRAY.findall(shape):
        width = _WIDTH.search(kind)
        bits = int(width[0]) if width else 8 * (kind == "pred")
        for side in filter(None, dims.split(",")):
            bits *= int(side)
        sizes.append(-(-bits // 8))
    return sizes


def trip_count(program: Program, loop: Instruction) -> int | None:
    """How often a `while` runs: as XLA notes it, or from a condition `counter < constant`.

    The counter is taken to start at zero and go up by one, as those of `jax.lax.scan` do.
    """
    noted = _TRIPS.search(loop.rest)
    if noted:
        return int(noted[1])
    condition = dict(_CALLED.findall(loop.rest)).get("condition", "")
    found, pending = [], [condition]
    constants = []
    while pending:
        for instruction in program.computations.get(pending.pop(), ()):
            pending += [name for _, name in _CALLED.findall(instruction.rest)]
            if instruction.opcode == "compare":
                found += re.findall(r"direction=(\w+)", instruction.rest)
            if instruction.opcode == "constant" and instruction.shape.startswith(("s32", "u32")):
                constants += re.findall(r"^(\d+)\)", instruction.rest)
    return int(constants[0]) if found == ["LT"] and len(constants) == 1 else None


def runs(program: Program) -> tuple[dict[str, int], int]:
    """({computation: how often it runs a step}, loops whose trip count is not known).

    Both branches of a conditional count as run.
    """
    calls: dict[str, list[tuple[str, int]]] = {name: [] for name in program.computations}
    unknown = 0
    for name, instructions in program.computations.items():
        for instruction in instructions:
            times = 1
            if instruction.opcode == "while":
                trips = trip_count(program, instruction)
                unknown += trips is None
                times = 1 if trips is None else trips
            called = [callee for _, callee in _CALLED.findall(instruction.rest)]
            for branches in _BRANCHES.findall(instruction.rest):
                called += [callee.strip().lstrip("%") for callee in branches.split(",")]
            calls[name] += [(callee, times) for callee in called if callee in calls]
    order, seen = [], set()
    stack = [(program.entry, iter(calls[program.entry]))]
    while stack:  # callees first; chains of calls can be deeper than Python's own stack
        name, rest = stack[-1]
        callee = next(rest, (None, 0))[0]
        if callee is None:
            order.append(name)
            stack.pop()
        elif callee not in seen:
            seen.add(callee)
            stack.append((callee, iter(calls[callee])))
    times_run = Counter({program.entry: 1})
    for name in reversed(order):
        for callee, times in calls[name]:
            times_run[callee] += times_run[name] * times
    return dict(times_run), unknown


def _dims(shape: str) -> list[int]:
    """Sizes of the first array of a shape."""
    found = _ARRAY.search(shape)
    return [int(side) for side in filter(None, found[2].split(","))] if found else []


def _product_flops(instruction: Instruction, shapes: dict[str, str]) -> int:
    """Floating-point operations of a `dot` or `convolution`, 0 of anything else."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    operands = _NAME.findall(instruction.rest.partition(")")[0])[:2]
    left, right = (_dims(shapes.get(operand, "")) for operand in operands)
    made = math.prod(_dims(instruction.shape))
    if instruction.opcode == "dot":
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        return 2 * made * math.prod(left[int(d)] for d in summed[1].split(",") if d)
    # dim_labels=b01f_01io->b01f: of the operands, then of the result; digits are spatial.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
    size = lambda shape, of, label: shape[of.index(label)]
    result = _dims(instruction.shape)
    count = 2 * size(right, labels[1], "i") * size(result, labels[2], "b")
    count *= size(result, labels[2], "f")
    for position, label in enumerate(sorted(filter(str.isdigit, labels[2]))):
        sides = (size(s, of, label) for s, of in zip((left, right, result), labels))
        count *= _hits(*sides, *_window(instruction.rest, position))
    return count


def _window(rest: str, position: int) -> tuple[int, int, int, int]:
    """(stride, padding before, input dilation, kernel dilation) of a spatial dimension."""
    window = re.search(r"window=\{([^}]*)\}", rest)
    found = dict(part.split("=") for part in window[1].split()) if window else {}
    at = lambda name, default: found[name].split("x")[position] if name in found else default
    low = int(at("pad", "0_0").split("_")[0])
    return int(at("stride", 1)), low, int(at("lhs_dilate", 1)), int(at("rhs_dilate", 1))


def _hits(given: int, kernel: int, made: int, stride: int, low: int, dilate: int, step: int) -> int:
    """How many (result, kernel) positions of one dimension meet a real input position.

    XLA writes products with batch dimensions as convolutions whose windows mostly meet padding.
    """
    reach = (given - 1) * dilate
    return sum(
        1
        for out in range(made)
        for tap in range(kernel)
        if 0 <= (place := out * stride + tap * step - low) <= reach and place % dilate == 0
    )


def _custom(rest: str, chip: Chip | None) -> tuple[int, int]:
    """(cycles, operations) of a custom kernel, by what it says of itself.

    The compiler estimates none. A kernel that knows its schedule names the cycles of all its steps
    on one core ("cycles" of its metadata); of another only the least is known: what its
    `cost_estimate` takes at the peak of the chip.
    """
    cost = _COST.search(rest)
    said = dict(re.findall(r'"(\w+)":"?(\d+)', cost[1])) if cost else {}
    flops = int(said.get("flops", 0))
    known = re.search(r'kernel_metadata=\{[^}]*"cycles":"(\d+)"', rest)
    if known:
        return int(known[1]) // (chip.cores if chip else 1), flops
    if chip is None:
        return 0, flops
    least = max(flops / chip.flops, int(said.get("bytes_accessed", 0)) / chip.bytes)
    return math.ceil(least), flops


def summarise(text: str, chip: Chip | None = None) -> Summary:
    """Collectives, estimated cycles, kernels and loops of `compiled.as_text()`.

    An asynchronous collective counts once, at its start; one that the TPU compiler has spread over
    several fusions counts once too, by its channel.

    Args:
      chip: what runs it, for custom kernels.
    """
    program = parse(text)
    times_run, unknown = runs(program)
    counts, sizes, cycles, flops = Counter(), Counter(), 0, 0
    channels: set[tuple[str, str]] = set()
    found, fused, within = [], set(), {}
    for name, instructions in program.computations.items():
        times = times_run.get(name, 0)
        if not times:
            continue
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        within[name] = 0
        for instruction in instructions:
            if '"tpu_custom_call"' in instruction.rest:
                own, operations = _custom(instruction.rest, chip)
            else:
                estimate = _CYCLES.search(instruction.rest)
                own = int(estimate[1]) if estimate else 0
                operations = _product_flops(instruction, shapes)
            cycles += times * own
            flops += times * operations
            within[name] += operations
            if instruction.opcode == "fusion":
                fused |= {callee for _, callee in _CALLED.findall(instruction.rest)}
            found.append((name, instruction, own, operations))
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            channel = _CHANNEL.search(instruction.rest)
            if channel and (kind, channel[1]) in channels:
                continue
            if channel:
                channels.add((kind, channel[1]))
            operands = _NAME.findall(instruction.rest.partition(")")[0])
            given = sum(sum(shape_bytes(shapes.get(operand, ""))) for operand in operands)
            result = shape_bytes(instruction.shape)
            if instruction.opcode != kind:  # the start of an asynchronous one: (operands, results)
                result = result[len(result) // 2 :]
            counts[kind] += times
            sizes[kind] += times * max(given, sum(result))
    collectives = {kind: Collective(counts[kind], sizes[kind]) for kind in KINDS if counts[kind]}
    kernels = []
    for name, instruction, own, operations in found:
        if instruction.opcode == "fusion":
            called = (callee for _, callee in _CALLED.findall(instruction.rest))
            operations = sum(within.get(callee, 0) for callee in called)
        if name in fused or not (own or operations):
            continue
        kind = "custom" if '"tpu_custom_call"' in instruction.rest else instruction.opcode
        source = _SOURCE.search(instruction.rest)
        times = times_run[name]
        kernels.append(
            Kernel(
                *(instruction.name, kind, source[1] if source else "", times),
                *(times * own, times * operations),
            )
        )
    kernels.sort(key=lambda kernel: (kernel.kind != "custom", -kernel.cycles, -kernel.flops))
    return Summary(collectives, flops, cycles, unknown, tuple(kernels))


def assigned_bytes(text: str) -> dict[str, int]:
    """Bytes of a chip's HBM by kind, from the compiler's table of buffers ("allocation N: …").

    Memories within the chip ("color N"), and buffers that reuse an argument's memory, are not
    counted.
    """
    memory = {"arguments": 0, "outputs": 0, "temporaries": 0}
    for size, facts in re.findall(r"^allocation \d+: size (\d+), (.*)", text, re.MULTILINE):
        kinds = {"parameter ": "arguments", "preallocated-temp": "temporaries"}
        kinds |= {"maybe-live-out": "outputs", "output shape": "outputs"}
        kind = next((kind for word, kind in kinds.items() if word in facts), None)
        if kind and not facts.startswith("color "):
            memory[kind] += int(size)
    return memory
