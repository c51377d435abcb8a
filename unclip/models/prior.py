"""The diffusion prior P(z_i | y): a causal transformer that predicts the clean image embedding.

arXiv 2204.06125 section 2.2: a decoder-only transformer over the sequence

    [encoded text (L), z_t, timestep, noised z_i, a learned query]

whose last position gives z_i itself, not the noise (equation 2). The layout is that of Karlo's and
diffusers' PriorTransformer, so that their weights load leaf for leaf ("karlo"). There the
text enters as the hidden states of a frozen CLIP; in the paper the prior reads the caption's tokens
with a transformer of its own size (Table 3: context 256, width 2048, 24 layers, 32 heads, 1B
parameters), which here is the same causal stack over the tokens ("paper", `vocab_size`).

Whitening of z_i and classifier-free guidance happen outside. For guidance the text is dropped
either by passing the empty caption (Karlo) or, with `learned_null`, by `drop_text`.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from unclip.errors import ConfigError
from unclip.models.transformer import (
    LayerNorm,
    Transformer,
    causal_mask,
    over_rows,
    timestep_embedding,
)

EXTRA_TOKENS = 4  # z_t, timestep, noised z_i, query

PRESETS: dict[str, dict] = {
    # Karlo v1 alpha; its checkpoint carries 1,536 more numbers, the whitening mean and deviation.
    "karlo": dict(
        embed_dim=768, context=77, text_width=768, width=2048, layers=20, heads=32, head_dim=64
    ),
    "paper": dict(
        embed_dim=1024,
        context=256,
        vocab_size=49408,
        width=2048,
        layers=24,
        heads=32,
        head_dim=64,
        learned_null=True,
    ),
    "emoji": dict(
        embed_dim=128, context=32, text_width=128, width=256, layers=4, heads=4, head_dim=64
    ),
}


class TextInput(nn.Module):
    """The caption as a sequence of `width`: CLIP hidden states projected, or tokens embedded.

    With `learned_null`, rows of `drop_text` become a learned sequence instead, all of it attended.
    """

    context: int
    width: int
    text_width: int | None = None
    vocab_size: int | None = None
    learned_null: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, text, text_mask, drop_text=None):
        """([B, L, width], bool [B, L]) from hidden states [B, L, W] or tokens [B, L]; L = context.

        Raises:
          ConfigError: the text does not fit the fields.
        """
        tokens = self.vocab_size is not None
        if (self.text_width is None) == (self.vocab_size is None):
            raise ConfigError(
                f"the prior was given text_width={self.text_width} and vocab_size="
                f"{self.vocab_size}; expected exactly one (hidden states or tokens)"
            )
        expected = (self.context,) if tokens else (self.context, self.text_width)
        if text.shape[1:] != expected or jnp.issubdtype(text.dtype, jnp.integer) != tokens:
            kind = "integer tokens" if tokens else "float hidden states"
            raise ConfigError(
                f"the prior was given text of shape {text.shape} and type {text.dtype}; expected "
                f"{kind} [B, {', '.join(map(str, expected))}]"
            )
        if tokens:
            init = nn.initializers.normal(0.02)
            x = nn.Embed(
                self.vocab_size, self.width, dtype=self.dtype, embedding_init=init, name="token"
            )(text)
        else:
            x = nn.Dense(self.width, dtype=self.dtype, dot_general=over_rows, name="proj")(text)
        mask = jnp.ones(text.shape[:2], bool) if text_mask is None else text_mask.astype(bool)
        if self.learned_null:
            shape = (self.context, self.width)
            null = self.param("null", nn.initializers.normal(0.02), shape, jnp.float32)
            if drop_text is not None:
                x = jnp.where(drop_text[:, None, None], null.astype(x.dtype), x)
                mask = mask | drop_text[:, None]
        elif drop_text is not None:
            raise ConfigError(
                "drop_text was given to a prior with learned_null=False; expected the empty "
                "caption's encoding in place of the text, or learned_null=True"
            )
        return x, mask


class EmbeddingInput(nn.Module):
    """One CLIP embedding as one token of `width`; a learned vector where `drop` says so."""

    width: int
    learned_null: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z, drop=None):
        """float [B, D] -> [B, 1, width]."""
        x = nn.Dense(self.width, dtype=self.dtype, name="proj")(z)
        if self.learned_null:
            null = self.param("null", nn.initializers.normal(0.02), (self.width,), jnp.float32)
            if drop is not None:
                x = jnp.where(drop[:, None], null.astype(x.dtype), x)
        return x[:, None]


class DiffusionPrior(nn.Module):
    """x_0-prediction network of the diffusion prior.

    Fields: exactly one of `text_width` (CLIP hidden states are projected) and `vocab_size` (tokens
    are embedded, and read by this transformer alone); `head_dim`, if given, must equal
    width // heads; `learned_null` adds learned stand-ins for dropped text and z_t; `norm_in` adds a
    layer norm before the blocks (Karlo has none) and `norm_out` the one after them.
    Parameters: `text/…`, `z_t/…`, `z_i/proj`, `time_in`, `time_out`, `query`, `position`
    [context + 4, width], `transformer/…`, `norm_out`, `out`.
    """

    embed_dim: int
    context: int
    width: int
    layers: int
    heads: int
    text_width: int | None = None
    vocab_size: int | None = None
    head_dim: int | None = None
    activation: str = "gelu"
    learned_null: bool = False
    norm_in: bool = False
    norm_out: bool = True
    dtype: Any = jnp.float32
    remat: str | None = None
    fold: bool = False
    attention_impl: str = "xla"

    @nn.compact
    def __call__(self, z_noised, t, z_t, text_hidden, text_mask, drop_text=None):
        """Predict the clean image embedding.

        Args:
          z_noised: float [B, embed_dim], the noised (whitened) z_i.
          t: int32 [B], timesteps as original indices 0..999.
          z_t: float [B, embed_dim], CLIP's text embedding, unnormalised.
          text_hidden: float [B, context, text_width], CLIP's hidden states after its last norm; or
            int32 tokens [B, context] where `vocab_size` is set.
          text_mask: bool [B, context], True = a real token; None = all.
          drop_text: bool [B], rows whose text and z_t are replaced by the learned null; needs
            `learned_null`.

        Returns:
          float32 [B, embed_dim], the predicted x_0.

        Raises:
          ConfigError: shapes or fields that do not fit.
        """
        if self.head_dim is not None and self.heads * self.head_dim != self.width:
            raise ConfigError(
                f"the prior was given width={self.width}, heads={self.heads}, head_dim="
                f"{self.head_dim}; expected heads x head_dim = width"
            )
        if not z_noised.shape[1:] == z_t.shape[1:] == (self.embed_dim,):
            raise ConfigError(
                f"the prior was given z_noised of shape {z_noised.shape} and z_t of shape "
                f"{z_t.shape}; expected both [B, {self.embed_dim}]"
            )
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=jnp.float32)
        text, mask = TextInput(
            self.context,
            self.width,
            self.text_width,
            self.vocab_size,
            self.learned_null,
            self.dtype,
            name="text",
        )(text_hidden, text_mask, drop_text)
        z_t = EmbeddingInput(self.width, self.learned_null, self.dtype, name="z_t")(z_t, drop_text)
        full = partial(nn.Dense, dtype=jnp.float32)  # bfloat16 has too few digits for t
        time = full(self.width, name="time_in")(timestep_embedding(t, self.width))
        time = full(self.width, name="time_out")(nn.silu(time))[:, None].astype(self.dtype)
        z_i = EmbeddingInput(self.width, dtype=self.dtype, name="z_i")(z_noised)
        small = nn.initializers.normal(0.01)
        query = self.param("query", small, (self.width,), jnp.float32)
        query = jnp.broadcast_to(query.astype(self.dtype), z_t.shape)

        length = self.context + EXTRA_TOKENS
        position = self.param("position", small, (length, self.width), jnp.float32)
        x = jnp.concatenate([text, z_t, time, z_i, query], axis=1)
        x = x + position.astype(self.dtype)[None]
        mask = jnp.pad(mask, ((0, 0), (0, EXTRA_TOKENS)), constant_values=True)
        if self.norm_in:
            x = LayerNorm(dtype=self.dtype, name="norm_in")(x)
        x = Transformer(
            self.width,
            self.layers,
            self.heads,
            activation=self.activation,
            dtype=self.dtype,
            remat=self.remat,
            fold=self.fold,
            attention_impl=self.attention_impl,
            name="transformer",
        )(x, causal_mask(length) & mask[:, None, None, :])
        x = x[:, -1]
        if self.norm_out:
            x = LayerNorm(dtype=self.dtype, name="norm_out")(x)
        return dense(self.embed_dim, name="out")(x).astype(jnp.float32)
