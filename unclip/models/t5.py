"""T5's encoder (arXiv 1910.10683), the frozen text encoder of Imagen (2205.11487, section 2.1).

A decoder may read captions through it, instead of through CLIP or a transformer of its own. One
block is

    x <- x + out(attention(q(ln_1 x), k(ln_1 x), v(ln_1 x) | bias));    x <- x + proj(act(ln_2 x))

with root-mean-square norms, no biases anywhere, scores that are not divided by sqrt(D), and one
table of learned biases by relative position that every layer adds to its scores. The first version
of T5 has a ReLU in its MLP, version 1.1 a gated GELU: gelu(gate x) * (fc x).

Parameters are float32: `token`, `bias` (relative positions), `block_i/{ln_1,attn/{q,k,v,out},ln_2,
mlp/{fc,gate,proj}}` (with `fold=True` `blocks/…`, as in `models.transformer`), `norm`.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip.errors import ConfigError, unknown
from unclip.models.transformer import ATTENTION_IMPLS, beside, recomputed

ACTIVATIONS = {"relu": jax.nn.relu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


def _sizes(width, mlp_width, head_dim, heads, layers, gated):
    return dict(
        width=width,
        mlp_width=mlp_width,
        head_dim=head_dim,
        heads=heads,
        layers=layers,
        gated=gated,
        activation="gelu_tanh" if gated else "relu",
    )


PRESETS: dict[str, dict] = {
    "t5-small": _sizes(512, 2048, 64, 8, 6, False),
    "t5-base": _sizes(768, 3072, 64, 12, 12, False),
    "t5-large": _sizes(1024, 4096, 64, 16, 24, False),
    "t5-3b": _sizes(1024, 16384, 128, 32, 24, False),
    "t5-11b": _sizes(1024, 65536, 128, 128, 24, False),
    "t5-v1_1-small": _sizes(512, 1024, 64, 6, 8, True),
    "t5-v1_1-base": _sizes(768, 2048, 64, 12, 12, True),
    "t5-v1_1-large": _sizes(1024, 2816, 64, 16, 24, True),
    "t5-v1_1-xl": _sizes(2048, 5120, 64, 32, 24, True),
    "t5-v1_1-xxl": _sizes(4096, 10240, 64, 64, 24, True),
    # For tests and two-step runs; reads bytes.
    "emoji": _sizes(64, 128, 16, 4, 2, True) | dict(vocab_size=384),
}


def buckets(length: int, count: int = 32, max_distance: int = 128) -> np.ndarray:
    """Which learned bias belongs to each pair of positions: int32 [length, length].

    Entry [q, k] is in 0..count-1: the first half for k <= q, the second for k > q. In each, the
    first half of the numbers are distances 0, 1, …, the rest grow logarithmically up to
    `max_distance`, from where on they are all the last.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = count // 2
    exact = half // 2
    distance = np.abs(offset)
    ratio = np.log(np.float32(np.maximum(distance, exact)) / exact) / np.log(max_distance / exact)
    far = exact + np.int32(ratio * (half - exact))
    near_or_far = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return np.int32(np.where(offset > 0, half, 0) + near_or_far)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * scale, in float32, returned in `dtype`."""

    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[…, W] -> […, W]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * inverse * beside(scale, x)).astype(self.dtype)


class Attention(nn.Module):
    """Self-attention with a bias on its scores, which are not scaled; softmax in float32."""

    heads: int
    head_dim: int
    dtype: Any
    attention_impl: str

    @nn.compact
    def __call__(self, x, bias, mask):
        """x [B, T, W], bias [1, heads, T, T], mask bool [B, 1, 1, T] -> [B, T, W]."""
        width, inner = x.shape[-1], self.heads * self.head_dim
        normal = nn.initializers.normal
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=jnp.float32)
        shape = (*x.shape[:-1], self.heads, self.head_dim)
        stds = {"q": (width * self.head_dim) ** -0.5, "k": width**-0.5, "v": width**-0.5}
        q, k, v = (
            dense(inner, kernel_init=normal(std), name=name)(x).reshape(shape)
            for name, std in stds.items()
        )
        # The fused kernel takes no bias.
        implementation = "cudnn" if self.attention_impl == "cudnn" else "xla"
        if implementation == "cudnn":  # it takes a bias only in the dtype of the scores
            bias = bias.astype(q.dtype)
            mask = jnp.broadcast_to(mask, (x.shape[0], self.heads, x.shape[1], x.shape[1]))
        y = jax.nn.dot_product_attention(
            q, k, v, bias, mask, scale=1.0, implementation=implementation
        )
        y = y.reshape(*x.shape[:-1], inner)
        return dense(width, kernel_init=normal(inner**-0.5), name="out")(y)


class MLP(nn.Module):
    """act(fc x), or act(gate x) * (fc x), then `proj` back to the input's width."""

    mlp_width: int
    activation: str
    gated: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        """[…, W] -> […, W]."""
        width = x.shape[-1]
        normal = nn.initializers.normal
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=jnp.float32)
        fc = dense(self.mlp_width, kernel_init=normal(width**-0.5), name="fc")(x)
        act = ACTIVATIONS[self.activation]
        if self.gated:
            h = act(dense(self.mlp_width, kernel_init=normal(width**-0.5), name="gate")(x)) * fc
        else:
            h = act(fc)
        return dense(width, kernel_init=normal(self.mlp_width**-0.5), name="proj")(h)


class Block(nn.Module):
    """One pre-norm block."""

    heads: int
    head_dim: int
    mlp_width: int
    activation: str
    gated: bool
    eps: float
    dtype: Any
    attention_impl: str

    @nn.compact
    def __call__(self, x, bias, mask):
        """[B, T, W] -> ([B, T, W], None): the pair that `nn.scan` threads."""
        norm = partial(RMSNorm, self.eps, self.dtype)
        attend = Attention(self.heads, self.head_dim, self.dtype, self.attention_impl, name="attn")
        x = x + attend(norm(name="ln_1")(x), bias, mask)
        mlp = MLP(self.mlp_width, self.activation, self.gated, self.dtype, name="mlp")
        return x + mlp(norm(name="ln_2")(x)), None


class T5Encoder(nn.Module):
    """The encoder. Fields:

    vocab_size: rows of the embedding; the published models have 32,128, of which a tokenizer uses
      32,100. ByT5 reads bytes and has 384.
    width, layers, heads, head_dim, mlp_width: heads * head_dim need not be the width.
    activation, gated: "relu" and not gated (T5), "gelu_tanh" and gated (version 1.1).
    relative_buckets, relative_max: number of relative position biases, distance of the last.
    eps: of the norms.
    dtype, remat, fold, attention_impl: as in `models.transformer.Transformer`.
    """

    vocab_size: int = 32128
    width: int = 512
    layers: int = 6
    heads: int = 8
    head_dim: int = 64
    mlp_width: int = 2048
    activation: str = "relu"
    gated: bool = False
    relative_buckets: int = 32
    relative_max: int = 128
    eps: float = 1e-6
    dtype: Any = jnp.float32
    remat: str | None = None
    fold: bool = False
    attention_impl: str = "xla"

    @nn.compact
    def __call__(self, tokens, mask):
        """Encode captions.

        Args:
          tokens: int32 [B, L], any L; ids 0 (padding) .. vocab_size - 1, each caption ending in 1.
          mask: bool [B, L], True = real token. Padding is not attended to.

        Returns:
          float [B, L, width] in `dtype`, after the last norm; rows of padding hold values too, for
          the caller to ignore.

        Raises:
          ConfigError: an unknown activation or attention implementation, or "cudnn" in float32.
        """
        if self.activation not in ACTIVATIONS:
            raise unknown("T5 activation", self.activation, ACTIVATIONS)
        if self.attention_impl not in ATTENTION_IMPLS:
            raise unknown("attention implementation", self.attention_impl, ATTENTION_IMPLS)
        if self.attention_impl == "cudnn" and jnp.dtype(self.dtype).itemsize != 2:
            raise ConfigError(
                "attention implementation 'cudnn' needs dtype bfloat16 or float16 (use 'xla' for "
                "float32)"
            )
        normal = nn.initializers.normal
        x = nn.Embed(
            self.vocab_size, self.width, embedding_init=normal(1.0), dtype=self.dtype, name="token"
        )(tokens)
        # Always float32, because the biases are added to scores in float32.
        table = nn.Embed(
            self.relative_buckets, self.heads, embedding_init=normal(self.width**-0.5), name="bias"
        )
        index = buckets(tokens.shape[1], self.relative_buckets, self.relative_max)
        bias = table(jnp.asarray(index)).transpose(2, 0, 1)[None]
        mask = mask.astype(bool)[:, None, None, :]
        block = recomputed(Block, remat=self.remat, kind="text", prevent_cse=not self.fold)
        fields = dict(
            heads=self.heads,
            head_dim=self.head_dim,
            mlp_width=self.mlp_width,
            activation=self.activation,
            gated=self.gated,
            eps=self.eps,
            dtype=self.dtype,
            attention_impl=self.attention_impl,
        )
        if self.fold:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=self.layers,
            )
            x, _ = scanned(**fields, name="blocks")(x, bias, mask)
        else:
            for i in range(self.layers):
                x, _ = block(**fields, name=f"block_{i}")(x, bias, mask)
        return RMSNorm(self.eps, self.dtype, name="norm")(x)
