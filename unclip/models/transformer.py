"""The pre-layer-norm transformer in every text and embedding network of unCLIP.

These are CLIP's two towers, the decoder's caption encoder and the priors. One block is

    x <- x + out(attention(q(ln_1 x), k(ln_1 x), v(ln_1 x)));    x <- x + proj(act(fc(ln_2 x)))

Parameters are float32 and sit at `block_i/{ln_1,attn/{q,k,v,out},ln_2,mlp/{fc,proj}}`. With
`fold=True` the blocks run under `nn.scan` and the same leaves sit at `blocks/…` with a leading
[layers] axis, so that compile time does not grow with depth; `stack_blocks` and `unstack_blocks`
convert any tree between the two. Statistics and softmax are float32 whatever `dtype` is.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from unclip.errors import ConfigError, unknown

ATTENTION_IMPLS = ("xla", "fused", "cudnn")
BATCH_AXES = ("data", "fsdp")  # mesh axes over which rows are split, see `runtime.sharding`

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    # By erf, which compilers make a polynomial of; JAX's own goes by erfc, several times slower.
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * np.asarray(0.5**0.5, x.dtype))),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "save_attention": jax.checkpoint_policies.save_only_these_names("attention"),
}

REMAT_KINDS = ("attention", "residual", "text")

_BLOCK_PARTS = {"ln_1", "attn", "ln_2", "mlp"}


def remat_policy(remat: str | None, kind: str = "text") -> Callable[..., bool] | None:
    """What a rematerialised block may keep for the backward pass, by name.

    "full" and "nothing_saveable" recompute everything; "save_attention" keeps the values named
    "attention" (each attention's output before its last projection).

    Args:
      remat: one policy for every block, or one a kind, as "residual=full,text=save_attention";
        blocks of a kind that is not named keep everything, as all do where remat is None or "".
      kind: "attention" and "residual" are the U-Net's blocks, "text" is every transformer's.

    Returns:
      The policy, None for no remat.

    Raises:
      ConfigError: a policy is not in `REMAT_POLICIES`, or a kind not in `REMAT_KINDS`; also where
        it is another kind's.
    """
    if not remat:
        return None
    named = [part.rpartition("=")[::2] for part in remat.split(",")]
    for name, policy in named:
        if name.strip() not in REMAT_KINDS and (name or len(named) > 1):
            raise unknown("kind of block of a remat policy", name or policy, REMAT_KINDS)
        if policy.strip() not in REMAT_POLICIES:
            raise unknown("remat policy", policy, REMAT_POLICIES)
    found = {name.strip(): REMAT_POLICIES[policy.strip()] for name, policy in named}
    return found.get(kind, found.get(""))


def recomputed(block: type, *, remat: str | None, kind: str, prevent_cse: bool) -> type:
    """A block's class, under `nn.remat` if `remat_policy` says so."""
    policy = remat_policy(remat, kind)
    return block if policy is None else nn.remat(block, policy=policy, prevent_cse=prevent_cse)


def activation_fn(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation called `name`: "gelu" (exact, erf), "gelu_tanh" or "quick_gelu".

    Raises:
      ConfigError: the name is not in `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    impl: str = "xla",
) -> jax.Array:
    """Scaled dot-product attention, softmax(q k^T / sqrt(D)) v, with a float32 softmax.

    Args:
      q: [B, Tq, H, D].
      k, v: [B, Tk, H, D], same dtype as q.
      mask: bool, broadcastable to [B, H, Tq, Tk]; True = may attend. A row with no True gives
        the mean over all keys, which is finite; the caller must ignore it.
      impl: "xla"; "fused", which on TPUs is the kernel of `fused_attention` for all arrays that it
        takes and everywhere else as "xla"; or "cudnn" (NVIDIA GPUs; q, k, v in bfloat16 or
        float16).

    Returns:
      [B, Tq, H, D] in q's dtype.

    Raises:
      ConfigError: unknown impl, or "cudnn" with a dtype it does not have.
    """
    if impl not in ATTENTION_IMPLS:
        raise unknown("attention implementation", impl, ATTENTION_IMPLS)
    if impl == "cudnn" and q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ConfigError(
            f"attention implementation 'cudnn' was given {q.dtype}; it needs dtype bfloat16 or "
            "float16 (use 'xla' for float32)"
        )
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        if impl == "cudnn":  # its own broadcasting of masks fails (jax-ml/jax#28974)
            mask = jnp.broadcast_to(mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    if impl == "fused":
        y = _fused(q, k, v, mask) if _platform(q) == "tpu" else None
        if y is not None:
            return y
        impl = "xla"
    if impl == "xla" and _platform(q) == "cpu":
        return attention_by_heads(q, k, v, mask)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=impl)


def _fused(q, k, v, mask):
    """`attention` by the kernel for TPUs, on each device its own rows and heads; the mask with four
    dimensions. None where the kernel does not take such arrays."""
    from unclip.models import fused_attention  # imports Pallas, which others need not wait for

    mesh = _mesh(q)
    rows = tuple(name for name in BATCH_AXES if mesh.shape.get(name, 1) > 1)
    heads = "tensor" if mesh.shape.get("tensor", 1) > 1 else None
    ways = math.prod(mesh.shape[name] for name in rows), mesh.shape.get(heads, 1)
    one_for_all = mask is None or mask.shape[1] == 1
    if q.shape[0] % ways[0] or q.shape[2] % ways[1] or not one_for_all:
        return None
    cut = fused_attention.cut(q.shape[1], k.shape[1], q.shape[2] // ways[1], q.shape[3])
    if cut is None:
        return None
    mesh = mesh if math.prod(ways) > 1 else None
    return fused_attention.attend(q, k, v, mask, cut, fused_attention.Place(mesh, rows, heads))


LOGITS_AT_ONCE = 1 << 18  # float32 numbers: what a CPU's cache holds


def attention_by_heads(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """`attention` for CPUs: a few heads at a time, and again in the backward pass.

    Their logits then stay in the cache, and products are of whole matrices. Arguments and result as
    of `attention`, the mask with four dimensions.
    """
    batch, _, heads, width = q.shape
    flat = lambda x: x.swapaxes(1, 2).reshape(batch * heads, x.shape[1], width)
    shared = None  # a mask for all rows
    if mask is None:
        own = None
    elif mask.shape[:2] == (1, 1):
        own, shared = None, jnp.broadcast_to(mask[0], (1, q.shape[1], k.shape[1]))
    else:
        own = jnp.broadcast_to(mask, (batch, heads, mask.shape[2], k.shape[1]))
        own = own.reshape(batch * heads, *own.shape[2:])
    y = _by_heads(flat(q), flat(k), flat(v), own, shared)
    return y.reshape(batch, heads, -1, width).swapaxes(1, 2)


def _parts(*arrays: jax.Array | None) -> tuple:
    """Arrays [N, ...] as [parts, N / parts, ...], so many parts that a part's logits fit."""
    rows, queries, keys = len(arrays[0]), arrays[0].shape[1], arrays[1].shape[1]
    size = min(max(LOGITS_AT_ONCE // (queries * keys), 1), rows)
    while rows % size:
        size -= 1
    return jax.tree.map(lambda x: x.reshape(rows // size, size, *x.shape[1:]), arrays)


def _over_parts(function: Callable, parts: tuple) -> Any:
    """function of every part, its results put together again."""
    if len(parts[0]) == 1:
        return function(jax.tree.map(lambda x: x[0], parts))
    out = jax.lax.map(function, parts)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def _product(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    """Matrix products float32 [N, ...] of rows of a and b over one axis of each."""
    numbers = (((over_a,), (over_b,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


_apart = jax.lax.optimization_barrier  # between products and what XLA would fuse into their loops


def _logits(q, k, own, shared):
    logits = _apart(_product(q, k, 2, 2)) * np.float32(q.shape[-1] ** -0.5)
    for mask in (own, shared):
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    return logits


def _weights(q, k, own, shared):
    """exp(logits - their greatest) [N, Tq, Tk], that greatest and the sum [N, Tq, 1]."""
    logits = _logits(q, k, own, shared)
    top = logits.max(-1, keepdims=True)
    weights = _apart(jnp.exp(logits - top))
    return weights, top, weights.sum(-1, keepdims=True)


@jax.custom_vjp
def _by_heads(q, k, v, own, shared):
    """q [N, Tq, D], k, v [N, Tk, D]; masks: own [N, 1 or Tq, Tk], shared [1, Tq, Tk], or None."""
    return _by_heads_forward(q, k, v, own, shared)[0]


def _by_heads_forward(q, k, v, own, shared):
    def one(part):
        q, k, v, own = part
        weights, top, total = _weights(q, k, own, shared)
        y = _product(weights.astype(v.dtype), v, 2, 1) / total
        return y, top, total

    y, top, total = _over_parts(one, _parts(q, k, v, own))
    return y.astype(q.dtype), (q, k, v, own, shared, y, top, total)


def _by_heads_backward(kept, dy):
    *inputs, shared, y, top, total = kept

    def one(part):
        q, k, v, own, y, top, total, dy = part
        softmax = _apart(jnp.exp(_logits(q, k, own, shared) - top) / total)
        dy = dy.astype(jnp.float32)
        along = (dy * y) @ jnp.ones((y.shape[-1], 1), y.dtype)  # sums over a last axis are slow
        dlogits = softmax * (_apart(_product(dy, v.astype(jnp.float32), 2, 2)) - along)
        for mask in (own, shared):
            if mask is not None:
                dlogits = jnp.where(mask, dlogits, 0)
        dlogits = _apart(dlogits * np.float32(q.shape[-1] ** -0.5)).astype(q.dtype)
        grads = (
            _product(dlogits, k, 2, 1),
            _product(dlogits, q, 1, 1),
            _product(softmax.astype(v.dtype), dy.astype(v.dtype), 1, 1),
        )
        return tuple(g.astype(q.dtype) for g in grads)

    grads = _over_parts(one, _parts(*inputs, y, top, total, dy))
    return (*grads, None, None)


_by_heads.defvjp(_by_heads_forward, _by_heads_backward)


def _mesh(x: jax.Array):
    """The mesh that a traced array is spread over; its shape is empty where there is none."""
    return jax.typeof(x).sharding.mesh


def _platform(x: jax.Array) -> str:
    """What computes a traced array, "cpu", "gpu" or "tpu": its mesh, or the default device."""
    device = _mesh(x).abstract_device
    return device.platform if device is not None else jax.default_backend()


def keep_rows(x: jax.Array) -> jax.Array:
    """x with the constraint to stay split by rows (its first dimension) over `BATCH_AXES`.

    Where parameters are split too (FSDP), XLA may otherwise split activations by channels, as the
    parameters are, and move them back and forth. On one device, or if the rows do not divide, x is
    returned unchanged.
    """
    mesh = _mesh(x)
    axes = tuple(name for name in BATCH_AXES if name in mesh.shape)
    ways = math.prod(mesh.shape[name] for name in axes)
    if ways == 1 or x.shape[0] % ways:
        return x
    other = PartitionSpec.UNCONSTRAINED if mesh.shape.get("tensor", 1) > 1 else None
    spec = PartitionSpec(axes, *[other] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def over_rows(x: jax.Array, kernel: jax.Array, numbers: Any, *args, **options) -> jax.Array:
    """`jax.lax.dot_general` as `nn.Dense` calls it, x [..., W] as one matrix on CPUs.

    The gradient of the kernel would else be a product over several axes, for which XLA transposes
    all of x or of its cotangent first.
    """
    if _platform(x) != "cpu":
        return jax.lax.dot_general(x, kernel, numbers, *args, **options)
    rows, whole = x.reshape(-1, x.shape[-1]), (((1,), (0,)), ((), ()))
    y = jax.lax.dot_general(rows, kernel, whole, *args, **options)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _gather(kernel):
    return jax.lax.with_sharding_constraint(kernel, NamedSharding(_mesh(kernel), PartitionSpec()))


# The gradient has no such constraint: if it had to be whole too, every device would sum all of it
# and then drop the rest.
_whole = jax.custom_vjp(_gather)
_whole.defvjp(lambda kernel: (_gather(kernel), None), lambda _, gradient: (gradient,))


def gather_dtype(x, *weights, dtype=None, **options):
    """Flax's promotion of a layer's operands to `dtype`, after which the weights are gathered.

    FSDP keeps kernels in slices. Without this, XLA gathers some and slices the activations for
    others; here every kernel is gathered just before its layer, in half the bytes where `dtype` is
    bfloat16. Nothing changes on one device, or where a tensor axis splits the kernels.
    """
    x, *weights = promote_dtype(x, *weights, dtype=dtype, **options)
    shape = _mesh(weights[0]).shape
    if shape.get("fsdp", 1) > 1 and shape.get("tensor", 1) == 1:
        weights = [w if w is None else _whole(w) for w in weights]
    return (x, *weights)


def beside(vector, x: jax.Array) -> jax.Array:
    """`vector` [W] as [1, …, 1, W], of as many dimensions as x [..., W]."""
    return jax.lax.expand_dims(jnp.asarray(vector), range(x.ndim - 1))


def causal_mask(length: int) -> jax.Array:
    """bool [1, 1, length, length]: position i may attend to positions 0..i."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def timestep_embedding(t: jax.Array, dim: int, max_period: float = 10_000.0) -> jax.Array:
    """Sinusoids of the timestep: cos(t f_i) for every i, then sin(t f_i).

    f_i = max_period^(-i / half) for i in 0..half-1, half = dim // 2 (in diffusers' words:
    flip_sin_to_cos, frequency shift 0). An odd `dim` ends in a zero.

    Args:
      t: [B] timesteps, int or float.
      dim: width of the result.

    Returns:
      float32 [B, dim], values in [-1, 1].
    """
    half = dim // 2
    frequencies = jnp.exp(-np.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim - 2 * half)))


class LayerNorm(nn.Module):
    """Layer norm computed in float32 and returned in `dtype`. Parameters `scale`, `bias`."""

    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[…, W] -> […, W], mean 0 and variance 1 over the last axis, then scale and bias."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        if _platform(x) == "cpu":
            y = _norm_rows(x.reshape(-1, x.shape[-1]), scale, bias, self.eps).reshape(x.shape)
        else:
            centred, inverse = _centred(x, self.eps)
            y = centred * inverse * beside(scale, x) + beside(bias, x)
        return y.astype(self.dtype)


def _centred(x, eps):
    """x less its mean over the last axis, and one over its standard deviation there."""
    centred = x - x.mean(-1, keepdims=True)
    return centred, jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm_rows(x, scale, bias, eps):
    """`LayerNorm` of float32 x [N, W] for CPUs, its gradient's sums as products with vectors.

    XLA fuses a product's operand with nothing, so that the cotangent, which comes from several
    layers, is made once, not again for every sum and for the result.
    """
    return _norm_rows_forward(x, scale, bias, eps)[0]


def _norm_rows_forward(x, scale, bias, eps):
    centred, inverse = _centred(x, eps)
    return centred * inverse * scale[None] + bias[None], (x, scale, bias, inverse)


def _norm_rows_backward(eps, kept, dy):
    x, scale, bias, inverse = kept
    normed = (x - x.mean(-1, keepdims=True)) * inverse
    moved, ones = dy * normed, jnp.ones(len(x), x.dtype)
    along = lambda rows: (rows @ (scale / x.shape[1]).astype(x.dtype))[:, None]
    dx = inverse * (dy * scale[None] - along(dy) - normed * along(moved))
    return dx, (ones @ moved).astype(scale.dtype), (ones @ dy).astype(bias.dtype)


_norm_rows.defvjp(_norm_rows_forward, _norm_rows_backward)


class Attention(nn.Module):
    """Multi-head self-attention: Dense `q`, `k`, `v`, `out`, each with a bias."""

    width: int
    heads: int
    out_std: float
    dtype: Any = jnp.float32
    attention_impl: str = "xla"

    @nn.compact
    def __call__(self, x, mask=None, cache=None, index=None):
        """Attend over x, or over a cache of earlier keys and values that x extends.

        Args:
          x: [B, T, width].
          mask: bool, broadcastable to [B, H, T, keys], or None.
          cache: None, or {"k", "v"}, each [B, S, heads, width // heads]; x's keys and values are
            written at positions index..index+T-1 and the S positions are attended to under mask.
          index: int32 scalar, used with a cache.

        Returns:
          ([B, T, width], the updated cache or None).
        """
        dense = partial(
            nn.Dense,
            self.width,
            dtype=self.dtype,
            param_dtype=jnp.float32,
            promote_dtype=gather_dtype,
            dot_general=over_rows,
        )
        std = nn.initializers.normal(self.width**-0.5)
        shape = (*x.shape[:-1], self.heads, self.width // self.heads)
        q, k, v = (dense(name=n, kernel_init=std)(x).reshape(shape) for n in "qkv")
        if cache is not None:
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=index, axis=1)
            cache = {
                "k": write(cache["k"], k.astype(cache["k"].dtype)),
                "v": write(cache["v"], v.astype(cache["v"].dtype)),
            }
            k, v = cache["k"].astype(q.dtype), cache["v"].astype(q.dtype)
        y = attention(q, k, v, mask, impl=self.attention_impl).reshape(x.shape)
        y = checkpoint_name(y, "attention")
        return dense(name="out", kernel_init=nn.initializers.normal(self.out_std))(y), cache


class MLP(nn.Module):
    """Dense `fc` to `mlp_width`, the activation, Dense `proj` back to the input's width."""

    mlp_width: int
    activation: str = "gelu"
    out_std: float | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[…, W] -> […, W] in `dtype`."""
        width = x.shape[-1]
        dense = partial(
            nn.Dense,
            dtype=self.dtype,
            param_dtype=jnp.float32,
            promote_dtype=gather_dtype,
            dot_general=over_rows,
        )
        std = nn.initializers.normal((2 * width) ** -0.5)
        h = activation_fn(self.activation)(dense(self.mlp_width, kernel_init=std, name="fc")(x))
        out = nn.initializers.normal(width**-0.5 if self.out_std is None else self.out_std)
        return dense(width, kernel_init=out, name="proj")(h)


class Block(nn.Module):
    """One pre-layer-norm block; `out_std` is the init deviation of the two residual outputs."""

    width: int
    heads: int
    mlp_width: int
    activation: str = "gelu"
    out_std: float = 0.02
    eps: float = 1e-5
    dtype: Any = jnp.float32
    attention_impl: str = "xla"

    @nn.compact
    def __call__(self, x, mask=None, cache=None, index=None):
        """[B, T, width] -> ([B, T, width], cache): the pair that `nn.scan` threads."""
        norm = partial(LayerNorm, eps=self.eps, dtype=self.dtype)
        attend = Attention(
            self.width, self.heads, self.out_std, self.dtype, self.attention_impl, name="attn"
        )
        y, cache = attend(norm(name="ln_1")(x), mask, cache, index)
        x = keep_rows(x + y)
        mlp = MLP(self.mlp_width, self.activation, self.out_std, self.dtype, name="mlp")
        return keep_rows(x + mlp(norm(name="ln_2")(x))), cache


class Transformer(nn.Module):
    """A stack of `layers` blocks, with no embedding before it and no norm after it.

    Fields: `width` must divide by `heads`; the hidden width of the MLPs is `mlp_width`, or
    `mlp_ratio` x width where that is None; `remat` names what is recomputed (`remat_policy`);
    `fold` scans over the blocks. Weights start as CLIP's do: normal with deviation width^-1/2
    (queries, keys, values), (2 width)^-1/2 (fc) and (2 layers width)^-1/2 (both residual outputs);
    biases 0.
    """

    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    mlp_width: int | None = None
    activation: str = "gelu"
    eps: float = 1e-5
    dtype: Any = jnp.float32
    remat: str | None = None
    fold: bool = False
    attention_impl: str = "xla"

    @nn.compact
    def __call__(self, x, mask=None, cache=None, index=None):
        """Run the blocks.

        Args:
          x: [B, T, width].
          mask: bool, broadcastable to [B, heads, T, keys], True = may attend; None = all.
          cache: None, or from `init_cache`; x is then at positions index..index+T-1.
          index: int32 scalar, used with a cache.

        Returns:
          [B, T, width] in `dtype`; with a cache, the pair of it and the updated cache.

        Raises:
          ConfigError: width and heads do not fit, or a name is not known.
        """
        if self.width % self.heads:
            raise ConfigError(
                f"transformer width {self.width} does not divide into {self.heads} heads; "
                f"expected a multiple of {self.heads}"
            )
        cached = cache is not None
        # Under scan the loop itself keeps XLA from merging the recomputation with the forward.
        block = recomputed(Block, remat=self.remat, kind="text", prevent_cse=not self.fold)
        fields = dict(
            width=self.width,
            heads=self.heads,
            mlp_width=self.mlp_width or round(self.mlp_ratio * self.width),
            activation=self.activation,
            out_std=(2 * self.layers * self.width) ** -0.5,
            eps=self.eps,
            dtype=self.dtype,
            attention_impl=self.attention_impl,
        )
        x = x.astype(self.dtype)
        if self.fold:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0, nn.broadcast),
                length=self.layers,
            )
            x, cache = scanned(**fields, name="blocks")(x, mask, cache, index)
        else:
            new = []
            for i in range(self.layers):
                layer = jax.tree.map(lambda c, i=i: c[i], cache)
                x, layer = block(**fields, name=f"block_{i}")(x, mask, layer, index)
                new.append(layer)
            cache = jax.tree.map(lambda *c: jnp.stack(c), *new) if cached else None
        return (x, cache) if cached else x

    def init_cache(self, batch: int, length: int) -> dict[str, jax.Array]:
        """Empty keys and values for `length` positions: {"k", "v"} [layers, B, length, H, D]."""
        shape = (self.layers, batch, length, self.heads, self.width // self.heads)
        return {"k": jnp.zeros(shape, self.dtype), "v": jnp.zeros(shape, self.dtype)}


def _is_block(tree: Any) -> bool:
    return isinstance(tree, dict) and set(tree) == _BLOCK_PARTS


def stack_blocks(params: dict) -> dict:
    """The `fold=True` form of a tree of `fold=False`: block_0, block_1, … become `blocks`.

    Every Transformer in the nested dict is converted, all other leaves are passed through. numpy
    leaves stay numpy. Under `jax.eval_shape` it converts abstract trees.
    """
    if not isinstance(params, dict):
        return params
    names = [n for n in params if re.fullmatch(r"block_\d+", n) and _is_block(params[n])]
    names.sort(key=lambda n: int(n.removeprefix("block_")))
    out = {n: stack_blocks(p) for n, p in params.items() if n not in names}
    if names:
        out["blocks"] = jax.tree.map(
            lambda *x: (np if isinstance(x[0], np.ndarray) else jnp).stack(x),
            *(params[n] for n in names),
        )
    return out


def unstack_blocks(params: dict) -> dict:
    """The inverse of `stack_blocks`: `blocks` becomes block_0, block_1, …"""
    if not isinstance(params, dict):
        return params
    out = {}
    for name, part in params.items():
        if name == "blocks" and _is_block(part):
            for i in range(jax.tree.leaves(part)[0].shape[0]):
                out[f"block_{i}"] = jax.tree.map(lambda x, i=i: x[i], part)
        else:
            out[name] = unstack_blocks(part)
    return out
