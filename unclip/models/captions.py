"""A caption transformer that a stage trains for itself, in place of a frozen CLIP or T5."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from unclip.errors import ConfigError
from unclip.models.transformer import LayerNorm, Transformer


class TextEncoder(nn.Module):
    """GLIDE's caption transformer: no causal mask, a learned embedding in place of padding.

    Because padding is learned and attended to, an all-padding caption is the learned null text.
    """

    vocab: int
    context_length: int
    width: int
    layers: int
    heads: int
    dtype: Any
    remat: str | None
    fold: bool
    attention_impl: str

    @nn.compact
    def __call__(self, tokens, text_mask):
        """tokens int32 [B, L], text_mask bool [B, L], L <= context_length -> [B, L, width]."""
        length = tokens.shape[1]
        if length > self.context_length:
            raise ConfigError(
                f"captions of {length} tokens: this text transformer has positions for "
                f"{self.context_length}"
            )
        normal, shape = nn.initializers.normal, (self.context_length, self.width)
        words = nn.Embed(
            self.vocab, self.width, embedding_init=normal(0.02), dtype=self.dtype, name="token"
        )(tokens)
        positions = self.param("positions", normal(0.01), shape)[None, :length].astype(self.dtype)
        padding = self.param("padding", normal(0.02), shape)[None, :length].astype(self.dtype)
        x = jnp.where(text_mask[..., None], words + positions, padding)
        x = Transformer(
            self.width,
            self.layers,
            self.heads,
            dtype=self.dtype,
            remat=self.remat,
            fold=self.fold,
            attention_impl=self.attention_impl,
            name="transformer",
        )(x)
        return LayerNorm(dtype=self.dtype, name="norm")(x)
