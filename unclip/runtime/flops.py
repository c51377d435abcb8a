"""How fast the hardware could be: peak FLOP/s and memory by chip, and how much of it a step uses.

Peaks are the makers' dense bfloat16 figures for one JAX device. `unclip doctor`, `unclip compile`
and the training log use them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# (substring of device_kind in lower case, bf16 FLOP/s, bytes of HBM); the first match wins, so the
# more specific name comes first. TPU v2 and v3 show each core as a device: half a chip.
_GIB = 2**30
_CHIPS: tuple[tuple[str, float, int], ...] = (
    ("tpu v2", 22.5e12, 8 * _GIB),
    ("tpu v3", 61.5e12, 16 * _GIB),
    ("tpu v4 lite", 138e12, 8 * _GIB),
    ("tpu v4", 275e12, 32 * _GIB),
    ("tpu v5 lite", 197e12, 16 * _GIB),
    ("tpu v5e", 197e12, 16 * _GIB),
    ("tpu v5", 459e12, 95 * _GIB),
    ("tpu v6", 918e12, 32 * _GIB),
    ("b200", 2250e12, 180_000_000_000),
    ("gh200", 989e12, 96_000_000_000),
    ("h200", 989e12, 141_000_000_000),
    ("h100 nvl", 835e12, 94_000_000_000),
    ("h100 pcie", 756e12, 80_000_000_000),
    ("h100", 989e12, 80_000_000_000),
    ("a100-sxm4-40gb", 312e12, 40_000_000_000),
    ("a100-pcie-40gb", 312e12, 40_000_000_000),
    ("a100", 312e12, 80_000_000_000),
    ("l40s", 362e12, 48_000_000_000),
    ("nvidia l4", 121e12, 24_000_000_000),
)


# (substring of device_kind, clock in Hz, bytes/s of all links to neighbouring chips together,
# bytes/s of its memory, cores that work as one device), for reading the TPU compiler's estimates.
# The clock is the one at which its matrix units make _CHIPS' peak; the rest are the maker's
# figures.
_TIMING: tuple[tuple[str, float, float, float, int], ...] = (
    ("tpu v4 lite", 1.05e9, 0.0, 614e9, 1),
    ("tpu v4", 1.05e9, 300e9, 1228e9, 2),
    ("tpu v5 lite", 1.5e9, 200e9, 819e9, 1),
    ("tpu v5e", 1.5e9, 200e9, 819e9, 1),
    ("tpu v5", 1.75e9, 600e9, 2765e9, 2),
    ("tpu v6", 1.75e9, 448e9, 1640e9, 1),
)


def _timing(device: Any) -> tuple[str, float, float, float, int] | None:
    kind = device if isinstance(device, str) else device.device_kind
    return next((chip for chip in _TIMING if chip[0] in kind.lower()), None)


def chip_clock(device: Any) -> float | None:
    """Cycles per second of a TPU (or device_kind string); None where it is not known."""
    found = _timing(device)
    return found[1] if found else None


def chip_links(device: Any) -> float | None:
    """Bytes per second between a TPU chip and its neighbours, all links together; None: unknown."""
    found = _timing(device)
    return (found[2] or None) if found else None


def chip_cycle(device: Any) -> tuple[float, float, int] | None:
    """(operations, bytes of memory) a TPU does in a cycle at most, and its cores; None: unknown."""
    found = _timing(device)
    peak = chip_peak(device)
    return (peak / found[1], found[3] / found[1], found[4]) if found and peak else None


def _chip(device: Any) -> tuple[str, float, int] | None:
    kind = device if isinstance(device, str) else device.device_kind
    return next((chip for chip in _CHIPS if chip[0] in kind.lower()), None)


def chip_peak(device: Any) -> float | None:
    """Dense bfloat16 FLOP/s of a device (or device_kind string); None where it is not known."""
    chip = _chip(device)
    return chip[1] if chip else None


def chip_memory(device: Any) -> int | None:
    """Bytes of high-bandwidth memory of a device; None where it is not known (a CPU, say).

    What the runtime itself reports is preferred to the table.
    """
    if not isinstance(device, str):
        try:
            stats = device.memory_stats() or {}
        except (
            RuntimeError,
            NotImplementedError,
        ):  # a description of a device that this machine does not have
            stats = {}
        if stats.get("bytes_limit"):
            return int(stats["bytes_limit"])
    chip = _chip(device)
    return chip[2] if chip else None


# One operation an element of the result, as XLA counts them; exp and its like are not among them.
_ELEMENTWISE = {
    *("add", "sub", "mul", "div", "max", "min", "neg", "abs", "sign", "rem", "pow"),
    *("integer_pow", "square", "add_any", "select_n", "clamp"),
}
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "cumsum"}


def count(function: Callable, trained: Any, *args: Any) -> float:
    """Floating-point operations of a training step, from the trace of its loss alone.

    A multiplication and an addition count two. Of a product of matrices or a convolution the
    gradient costs as much again for each factor that depends on the trained parameters, and what
    depends on none costs nothing more; what rematerialisation computes again is not counted. Loops
    of known length (folded layers) count as often as they run, of branches the dearest. A kernel of
    Pallas counts as its own estimate says.

    Args:
      function: (trained, *args) -> loss, traceable; all arrays or ShapeDtypeStructs.
    """
    jaxpr = jax.make_jaxpr(function)(trained, *args).jaxpr
    learned = len(jax.tree.leaves(trained))
    return _count(jaxpr, [k < learned for k in range(len(jaxpr.invars))])[0]


def _count(jaxpr: Any, learned: Sequence[bool]) -> tuple[float, list[bool]]:
    """(operations, which results depend on the trained parameters) of a jaxpr.

    Args:
      learned: which of its arguments do.
    """
    known = {variable for variable, is_learned in zip(jaxpr.invars, learned) if is_learned}
    depends = lambda variable: not hasattr(variable, "val") and variable in known
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        given = [depends(variable) for variable in equation.invars]
        results = [any(given)] * len(equation.outvars)
        shapes = [variable.aval.shape for variable in equation.invars]
        out = equation.outvars[0].aval if equation.outvars else None
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            once = 2.0 * out.size * math.prod(shapes[0][axis] for axis in contracted)
            total += once * (1 + sum(given))
        elif name == "conv_general_dilated":
            total += _convolution(*shapes, out.shape, params) * (1 + sum(given))
        elif name == "pallas_call":
            total += getattr(params.get("cost_estimate"), "flops", 0) * (1 + 2 * any(given))
        elif name in _ELEMENTWISE:
            counted = out.size if jnp.issubdtype(out.dtype, jnp.floating) else 0
            total += counted * (1 + any(given))
        elif name in _REDUCTIONS:
            total += equation.invars[0].aval.size * (1 + any(given))
        elif name == "cond":
            inside = [_count(branch.jaxpr, given[1:]) for branch in params["branches"]]
            total += max(operations for operations, _ in inside)
        elif name == "scan":
            first, carries = params["num_consts"], params["num_carry"]
            while True:  # until what one turn passes on to the next is known
                inside, results = _count(params["jaxpr"].jaxpr, given)
                carried = [a or b for a, b in zip(given[first : first + carries], results)]
                if carried == given[first : first + carries]:
                    break
                given[first : first + carries] = carried
            total += inside * params["length"]
        else:
            for inner in filter(None, (params.get(key) for key in _INNER)):
                inner = getattr(inner, "jaxpr", inner)
                # Of a function with constants of its own, these come first.
                more = len(inner.invars) - len(given)
                inside, results = _count(inner, [False] * more + given if more >= 0 else given)
                total += inside
        known.update(v for v, is_learned in zip(equation.outvars, results) if is_learned)
    return total, [depends(variable) for variable in jaxpr.outvars]


_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr")


def _convolution(left: tuple, right: tuple, out: tuple, params: dict) -> float:
    """Of a convolution: multiplications by padding and by the zeros of dilation do not count."""
    numbers = params["dimension_numbers"]
    total = 2.0 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * right[numbers.rhs_spec[1]]
    for axis, stride in enumerate(params["window_strides"]):
        spread = params["lhs_dilation"][axis]
        size = left[numbers.lhs_spec[2 + axis]]
        window = np.arange(right[numbers.rhs_spec[2 + axis]]) * params["rhs_dilation"][axis]
        starts = np.arange(out[numbers.out_spec[2 + axis]]) * stride - params["padding"][axis][0]
        read = starts[:, None] + window
        total *= ((read >= 0) & (read <= (size - 1) * spread) & (read % spread == 0)).sum()
    return float(total)


def utilisation(
    flops: float | None, seconds: float, devices: Sequence, *, peak: float | None = None
) -> float | None:
    """The fraction of the devices' peak that a step reached, in [0, 1].

    Args:
      flops: floating-point operations of the whole step on all devices, from `count`.
      seconds: how long the step took.
      devices: what it ran on.
      peak: FLOP/s of one device; default from the table, which knows no CPU.

    Returns:
      The fraction, or None where flops or the peak are not known.
    """
    peaks = [chip_peak(device) if peak is None else peak for device in devices]
    if flops is None or not peaks or any(p is None for p in peaks) or seconds <= 0:
        return None
    return flops / seconds / sum(peaks)


def readable_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
