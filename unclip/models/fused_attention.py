"""Attention for TPUs as one kernel: logits and softmax never leave the chip's own memory.

XLA writes the logits to memory between the products. Here a step of the kernel works on a few heads
and a block of queries against all keys, so that a softmax is over whole rows. Nothing but the
result is kept for the backward pass, which computes the logits again and all gradients in one
kernel.

Queries, keys and values stay as the layers before them leave them, [B, T, H * D]. A step reads
columns of 128 lanes, and a head is what is left when the other heads' lanes are set to zero; this
costs nothing, since the matrix units are 128 deep whatever D is.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

LANES = 128
LOGITS = 256 * 1408  # float32 numbers of one head that a step holds, several times: 1.4 MiB
KEYS = 324 * 1024  # of a step, times its lanes: they, their gradients and sums take 24 bytes each
HEADS = 16  # of a step at most, whose instructions are written one after another
MASKED = -1e30  # added to a logit: finite, so that a row of nothing else is a mean


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the work is cut: a step has `lanes` of H * D, so `lanes // width` heads, and `rows`
    queries."""

    width: int
    lanes: int
    rows: int

    @property
    def heads(self) -> int:
        return self.lanes // self.width

    def columns(self, head: int) -> slice:
        """The whole columns of 128 lanes that a head touches."""
        first, last = head * self.width // LANES, -(-(head + 1) * self.width // LANES)
        return slice(first * LANES, last * LANES)

    def own(self, head: int, x: jax.Array) -> jax.Array:
        """float32 [T, columns of the head], zero in the lanes of other heads."""
        start = head * self.width - self.columns(head).start
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        mine = (lane >= start) & (lane < start + self.width)
        x = x.astype(jnp.float32)
        return x if self.width == x.shape[1] else jnp.where(mine, x, 0.0)


def cut(queries: int, keys: int, heads: int, width: int) -> Cut | None:
    """The cut for arrays of these sizes; None where the kernel has none, or has nothing to gain."""
    least = math.lcm(width, LANES)
    if heads * width % least or least // width > HEADS or queries < 16:
        return None
    whole = [queries] + [n for n in range(queries - queries % 16, 0, -16) if queries % n == 0]
    rows = next((n for n in whole if n * keys <= LOGITS), None)
    if rows is None or keys * least > KEYS:
        return None
    # More heads where the products are small, since a step has costs of its own.
    more = max(1, min(LOGITS // (rows * keys), HEADS, KEYS // (keys * width)) // (least // width))
    times = max(n for n in range(1, more + 1) if heads * width // least % n == 0)
    return Cut(width, least * times, rows)


def _product(a, b, over_a, over_b):
    numbers = (((over_a,), (over_b,)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def _weights(q, k, bias, scale):
    """exp(logits - their greatest) [Tq, Tk] and its sum over keys [Tq, 1]."""
    logits = _product(q, k, 1, 1)
    if bias is not None:
        logits = logits + bias
    logits = logits - logits.max(-1, keepdims=True)
    weights = jnp.exp2(logits * np.float32(scale / math.log(2)))
    return weights, weights.sum(-1, keepdims=True)


def _add(ref, where, values):
    ref[:, where] = ref[:, where] + values


def _forward(cut, q_ref, k_ref, v_ref, *rest):
    *bias_ref, y_ref, sums = rest
    bias = bias_ref[0][0] if bias_ref else None
    sums[...] = jnp.zeros_like(sums)
    for head in range(cut.heads):
        where = cut.columns(head)
        q = cut.own(head, q_ref[0, :, where]).astype(k_ref.dtype)
        weights, total = _weights(q, k_ref[0, :, where], bias, cut.width**-0.5)
        y = _product(weights.astype(v_ref.dtype), v_ref[0, :, where], 1, 0)
        _add(sums, where, cut.own(head, y / total))
    y_ref[0] = sums[...].astype(y_ref.dtype)


def _backward(cut, q_ref, k_ref, v_ref, *rest):
    *bias_ref, y_ref, dy_ref, dq_ref, dk_ref, dv_ref, dq, dk, dv = rest
    bias = bias_ref[0][0] if bias_ref else None
    scale, dtype = np.float32(cut.width**-0.5), k_ref.dtype
    step, steps = pl.program_id(2), pl.num_programs(2)
    dq[...] = jnp.zeros_like(dq)

    @pl.when(step == 0)
    def _():
        dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)

    for head in range(cut.heads):
        where = cut.columns(head)
        q = cut.own(head, q_ref[0, :, where]).astype(dtype)
        k, v = k_ref[0, :, where], v_ref[0, :, where]
        weights, total = _weights(q, k, bias, scale)
        # The sum divides the small factors of a product, not the weights.
        dy = cut.own(head, dy_ref[0, :, where]) / total
        along = (dy * y_ref[0, :, where].astype(jnp.float32)).sum(-1, keepdims=True)
        dy = dy.astype(dtype)
        _add(dv, where, _product(weights.astype(dtype), dy, 0, 0))
        dlogits = (weights * (_product(dy, v, 1, 1) - along)).astype(dtype)
        _add(dq, where, cut.own(head, _product(dlogits, k, 1, 0)) * scale)
        _add(dk, where, _product(dlogits, q, 0, 0) * scale)
    dq_ref[0] = dq[...].astype(dq_ref.dtype)

    @pl.when(step == steps - 1)
    def _():
        dk_ref[0] = dk[...].astype(dk_ref.dtype)
        dv_ref[0] = dv[...].astype(dv_ref.dtype)


def _cycles(cut: Cut, keys: int, backward: bool) -> int:
    """About how many instructions of a TPU core a step is: within 20 % of the compiler's schedules
    for v5p, of which docs/compile.md has some. None of them is in a loop."""
    tiles = -(-cut.rows // 8) * -(-keys // LANES)
    columns = [(c.stop - c.start) // LANES for c in map(cut.columns, range(cut.heads))]
    each, more = (12.0, 200) if backward else (4.4, 110)
    return round(240 + cut.heads * more + each * tiles * sum(columns))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the work is: rows and heads are split over axes of a mesh, or nothing is."""

    mesh: jax.sharding.AbstractMesh | None = None
    rows: tuple[str, ...] = ()
    heads: str | None = None
    interpret: bool = False


def _kernel(cut, backward, interpret, bias, *given):
    """A kernel over (row, heads, block of queries). given: queries, keys, values [B, T, H * D], and
    to go back the result and its gradient; gives [the result], or the gradients of the three."""
    kernel = _backward if backward else _forward
    products, queries_out, keys_out = (5, 1, 2) if backward else (2, 1, 0)
    q, k = given[:2]
    (batch, queries, lanes), keys = q.shape, k.shape[1]
    of_queries = pl.BlockSpec((1, cut.rows, cut.lanes), lambda b, h, i: (b, i, h))
    of_keys = pl.BlockSpec((1, keys, cut.lanes), lambda b, h, i: (b, 0, h))
    in_specs = [of_queries, of_keys, of_keys]
    if bias is not None:
        alike, one = len(bias) == 1, bias.shape[1] == 1
        block = (1, 1 if one else cut.rows, keys)
        in_specs += [pl.BlockSpec(block, lambda b, h, i: (0 if alike else b, 0 if one else i, 0))]
        given = (*given[:3], bias, *given[3:])
    in_specs += [of_queries] * (len(given) - len(in_specs))
    logits = batch * queries * keys * lanes // cut.width
    moved = queries * (1 + queries_out + 2 * backward) + keys * (2 + keys_out)
    grid = (batch, lanes // cut.lanes, queries // cut.rows)
    return pl.pallas_call(
        functools.partial(kernel, cut),
        grid=grid,
        in_specs=in_specs,
        out_specs=(of_queries,) * queries_out + (of_keys,) * keys_out,
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype),) * queries_out
        + (jax.ShapeDtypeStruct(k.shape, k.dtype),) * keys_out,
        scratch_shapes=[pltpu.VMEM((cut.rows, cut.lanes), jnp.float32)] * queries_out
        + [pltpu.VMEM((keys, cut.lanes), jnp.float32)] * keys_out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * logits * cut.width,
            transcendentals=logits,
            bytes_accessed=q.dtype.itemsize * batch * lanes * moved,
        ),
        name="attention" + kernel.__name__,
        metadata={"cycles": str(math.prod(grid) * _cycles(cut, keys, backward))},
        interpret=interpret,
    )(*given)


def _call(cut, place, backward, bias, *given):
    """`_kernel` on every device. Under vmap the groups' rows are one batch, which stays where it
    is: to split each group's rows over the mesh would move all of them."""
    function = functools.partial(_kernel, cut, backward, place.interpret)
    if place.mesh is not None:
        spec = PartitionSpec(place.rows, None, place.heads)
        own = PartitionSpec(place.rows if bias is not None and len(bias) > 1 else None)
        function = jax.shard_map(
            function,
            mesh=place.mesh,
            in_specs=(own, *[spec] * len(given)),
            out_specs=(spec,) * (3 if backward else 1),
            check_vma=False,
        )
    function = jax.custom_batching.custom_vmap(function)

    @function.def_vmap
    def _(size, batched, bias, *given):
        whole = lambda x, own: x if own else jnp.broadcast_to(x, (size, *x.shape))
        given = [whole(x, own) for x, own in zip(given, batched[1:])]
        rows = given[0].shape[1]
        one = lambda x: x.reshape(size * rows, *x.shape[2:])
        if bias is not None and (batched[0] or len(bias) > 1):
            bias = whole(bias, batched[0])
            bias = one(jnp.broadcast_to(bias, (size, rows, *bias.shape[2:])))
        out = _call(cut, place, backward, bias, *map(one, given))
        return tuple(y.reshape(size, rows, *y.shape[1:]) for y in out), (True,) * len(out)

    return function(bias, *given)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(cut, place, q, k, v, bias):
    return _call(cut, place, False, bias, q, k, v)[0]


def _attend_forward(cut, place, q, k, v, bias):
    y = _attend(cut, place, q, k, v, bias)
    return y, (q, k, v, bias, y)


def _attend_backward(cut, place, kept, dy):
    q, k, v, bias, y = kept
    return *_call(cut, place, True, bias, q, k, v, y, dy), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    cut: Cut,
    place: Place = Place(),
) -> jax.Array:
    """Scaled dot-product attention by the kernel, with a float32 softmax; it has a gradient.

    Args:
      q, k, v, mask: as of `transformer.attention`, the mask with four dimensions and one for all
        heads.
      cut: from `cut`, for the heads of one device.
      place: of the arrays; its axes must divide their rows and heads.

    Returns:
      [B, Tq, H, D] in q's dtype.
    """
    bias = None
    if mask is not None:
        bias = jnp.where(mask[:, 0], np.float32(0), np.float32(MASKED))
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], k.shape[1]))
    flat = lambda x: x.reshape(*x.shape[:2], -1)
    return _attend(cut, place, flat(q), flat(k), flat(v), bias).reshape(q.shape)
