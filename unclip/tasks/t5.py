"""A frozen T5 as a decoder reads captions through it (Imagen, arXiv 2205.11487, section 2.1)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from unclip.input.decode.text import T5Tokenizer
from unclip.models import t5 as t5_model

EOS = 1  # ends every caption; padding is 0


@dataclasses.dataclass(frozen=True)
class FrozenT5:
    """A trained T5 encoder: no gradient, float32 results.

    Args:
      model: its network.
      tokenizer: reads captions for it, of `input.decode.text`.
    """

    model: t5_model.T5Encoder
    tokenizer: T5Tokenizer | None = None

    def init(self, key: jax.Array) -> dict:
        """Random parameters float32, for benchmarks and for shapes."""
        tokens = jnp.ones((1, 2), jnp.int32)
        return self.model.init(key, tokens, tokens == 1)["params"]

    def text(self, params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Hidden states [B, L, W] after the final norm, of tokens int32 and mask bool [B, L]."""
        hidden = self.model.apply({"params": params}, jnp.asarray(tokens), jnp.asarray(mask))
        return jax.lax.stop_gradient(hidden.astype(jnp.float32))

    def empty(self, batch_size: int, context: int) -> tuple[np.ndarray, np.ndarray]:
        """The empty caption: (tokens int32 [B, L], mask bool [B, L]), its end alone."""
        tokens = np.zeros((batch_size, context), np.int32)
        tokens[:, 0] = EOS
        return tokens, tokens == EOS
