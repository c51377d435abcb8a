"""The autoregressive prior: z_i as a sequence of discrete codes (arXiv 2204.06125 section 2.2).

Image embeddings are reduced by PCA (the paper keeps 319 of 1,024 dimensions and loses less than 1 %
of the mean-squared error), ordered by falling eigenvalue, and each dimension is quantised into
1,024 buckets. A causal transformer predicts the codes one after another behind the prefix

    [encoded text (L), z_t, a token for the quantised dot product z_i . z_t]

At sampling time that token is drawn from the upper half of its training distribution. The paper
gives the code model's size (Table 3, "latent decoder": context 384, width 1664, 24 layers, 26
heads) and that of its text encoder (context 256, width 2048, 24 layers, 32 heads), but not how the
two meet, and "1B" for what together has 2.0 billion parameters. Chosen here: the text encoder's 256
outputs, projected, begin the sequence (with z_t, the dot token and 318 codes read that is 576
positions); one bucket embedding is shared by all dimensions, which a learned position
distinguishes, and so is one output matrix; buckets are of equal width over +-`range_sigmas`
standard deviations. With `text_layers=0` the text enters as CLIP's hidden states instead.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip.errors import ConfigError
from unclip.models.captions import TextEncoder
from unclip.models.prior import EmbeddingInput, TextInput
from unclip.models.transformer import LayerNorm, Transformer, causal_mask

PRESETS: dict[str, dict] = {
    "paper": dict(
        embed_dim=1024,
        codes=319,
        buckets=1024,
        context=256,
        vocab_size=49408,
        text_layers=24,
        text_width=2048,
        text_heads=32,
        width=1664,
        layers=24,
        heads=26,
    ),
    "emoji": dict(
        embed_dim=128,
        codes=48,
        buckets=128,
        context=32,
        text_width=128,
        width=192,
        layers=4,
        heads=4,
    ),
}


class ARPrior(nn.Module):
    """The causal transformer over [text, z_t, dot token, codes].

    Fields: `codes` is the number N of quantised dimensions, `dot_buckets` the number of dot-product
    buckets (even); `learned_null` as in `prior.DiffusionPrior`. Text of `text_width` is that of a
    frozen CLIP, or of a transformer of its own over the caption's tokens where `text_layers` is not
    0 (then `vocab_size` and `text_heads` are its). Parameters: [`encoder/…`], `text/…`, `z_t/…`,
    `dot`, `code` (embeddings), `position` [context + 1 + N, width], `transformer/…`, `norm_out`,
    `out`.
    """

    embed_dim: int
    codes: int
    buckets: int
    context: int
    text_width: int
    width: int
    layers: int
    heads: int
    dot_buckets: int = 16
    vocab_size: int | None = None
    text_layers: int = 0
    text_heads: int = 32
    activation: str = "gelu"
    learned_null: bool = False
    dtype: Any = jnp.float32
    remat: str | None = None
    fold: bool = False
    attention_impl: str = "xla"

    def setup(self):
        small = nn.initializers.normal(0.02)
        embed = partial(nn.Embed, features=self.width, dtype=self.dtype, embedding_init=small)
        if bool(self.vocab_size) != bool(self.text_layers):
            raise ConfigError(
                f"the prior was given vocab_size={self.vocab_size} and text_layers="
                f"{self.text_layers}; expected both (a text encoder of its own) or neither"
            )
        if self.text_layers:
            self.encoder = TextEncoder(
                self.vocab_size,
                self.context,
                self.text_width,
                self.text_layers,
                self.text_heads,
                self.dtype,
                self.remat,
                self.fold,
                self.attention_impl,
            )
        self.text = TextInput(
            self.context,
            self.width,
            self.text_width,
            learned_null=self.learned_null,
            dtype=self.dtype,
        )
        self.z_t = EmbeddingInput(self.width, self.learned_null, self.dtype)
        self.dot = embed(self.dot_buckets)
        self.code = embed(self.buckets)
        shape = (self.length, self.width)
        self.position = self.param("position", nn.initializers.normal(0.01), shape, jnp.float32)
        self.transformer = Transformer(
            self.width,
            self.layers,
            self.heads,
            activation=self.activation,
            dtype=self.dtype,
            remat=self.remat,
            fold=self.fold,
            attention_impl=self.attention_impl,
        )
        self.norm_out = LayerNorm(dtype=self.dtype)
        self.out = nn.Dense(self.buckets, dtype=self.dtype, kernel_init=small)

    @property
    def prefix(self) -> int:
        """Tokens before the first code: the text, z_t and the dot product."""
        return self.context + 2

    @property
    def length(self) -> int:
        """Tokens in all; the last code is predicted and never read."""
        return self.prefix + self.codes - 1

    def _prefix(self, z_t, text_hidden, text_mask, dot, drop_text):
        """The prefix [B, prefix, width] and the key mask bool [B, length]."""
        if z_t.shape[-1] != self.embed_dim:
            raise ConfigError(
                f"the prior was given z_t of shape {z_t.shape}; expected [B, {self.embed_dim}]"
            )
        if self.text_layers:  # whose padding is learned, and attended to
            every = jnp.ones(text_hidden.shape, bool)
            text_hidden = self.encoder(text_hidden, every if text_mask is None else text_mask)
            text_mask = every
        text, mask = self.text(text_hidden, text_mask, drop_text)
        x = jnp.concatenate([text, self.z_t(z_t, drop_text), self.dot(dot)[:, None]], axis=1)
        rest = self.length - self.context
        return x, jnp.pad(mask, ((0, 0), (0, rest)), constant_values=True)

    def _logits(self, x):
        return self.out(self.norm_out(x)).astype(jnp.float32)

    def __call__(self, codes, z_t, text_hidden, text_mask, dot, drop_text=None):
        """Teacher-forced logits: those of code n see the prefix and codes 0..n-1.

        Args:
          codes: int32 [B, N] in 0..buckets-1.
          z_t: float [B, embed_dim], unnormalised.
          text_hidden: float [B, context, text_width], or int32 tokens [B, context] for a text
            encoder of its own.
          text_mask: bool [B, context], True = a real token; None = all.
          dot: int32 [B] in 0..dot_buckets-1.
          drop_text: bool [B], rows whose text and z_t become the learned null.

        Returns:
          float32 [B, N, buckets].

        Raises:
          ConfigError: shapes that do not fit.
        """
        if codes.shape[1] != self.codes:
            raise ConfigError(
                f"the prior was given codes of shape {codes.shape}; expected [B, {self.codes}]"
            )
        x, mask = self._prefix(z_t, text_hidden, text_mask, dot, drop_text)
        x = jnp.concatenate([x, self.code(codes[:, :-1])], axis=1)
        x = x + self.position.astype(x.dtype)[None]
        x = self.transformer(x, causal_mask(self.length) & mask[:, None, None])
        return self._logits(x[:, self.prefix - 1 :])

    def prefill(self, z_t, text_hidden, text_mask, dot, drop_text=None):
        """Read the prefix; arguments as in `__call__`.

        Returns:
          (logits float32 [B, buckets] of code 0, the cache that `step` continues: a pytree).
        """
        x, mask = self._prefix(z_t, text_hidden, text_mask, dot, drop_text)
        x = x + self.position[None, : self.prefix].astype(x.dtype)
        # The keys of codes not read yet are behind every prefix position, so causality hides them.
        causal = causal_mask(self.length)[:, :, : self.prefix]
        cache = self.transformer.init_cache(x.shape[0], self.length)
        x, cache = self.transformer(x, causal & mask[:, None, None], cache, 0)
        return self._logits(x[:, -1]), {"attention": cache, "mask": mask}

    def step(self, code, n, cache):
        """Read code n, int32 [B], and give the logits of code n + 1.

        Args:
          code: int32 [B].
          n: int32 scalar in 0..N-2.
          cache: what `prefill` or the last `step` returned.

        Returns:
          (logits float32 [B, buckets], cache).
        """
        at = self.prefix + n
        x = self.code(code)[:, None]
        x = x + jax.lax.dynamic_slice_in_dim(self.position, at, 1).astype(x.dtype)[None]
        seen = cache["mask"] & (jnp.arange(self.length) <= at)[None]
        x, attention = self.transformer(x, seen[:, None, None], cache["attention"], at)
        return self._logits(x[:, 0]), {"attention": attention, "mask": cache["mask"]}
