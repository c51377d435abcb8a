"""The decoder p(x | z_i, y): noised picture, CLIP image embedding and caption to (eps ‖ v).

Section 2.1 of arXiv 2204.06125: a GLIDE U-Net (`unet.UNet`) whose conditions enter twice. z_i is
  projected and
added to the timestep embedding, and projected into four extra tokens of context; the caption
supplies the other tokens: CLIP's own hidden states (Karlo), those of a frozen T5 (Imagen,
arXiv 2205.11487) or the output of a text transformer trained with the decoder (GLIDE, unCLIP).
Image embedding and caption are dropped independently (10 % and 50 % of the time in the paper), for
classifier-free guidance; which samples are dropped is decided outside and given as masks.

Parameters: `unet/…`, and `text_proj/…` for everything that turns conditions into the U-Net's
inputs; Karlo's are 885,439,686 and 7,878,400.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from unclip.errors import ConfigError
from unclip.models.captions import TextEncoder
from unclip.models.transformer import LayerNorm, attention
from unclip.models.unet import UNet, unet_fields

IMAGE_TOKENS = 4


class Pool(nn.Module):
    """One vector of a caption by attention: the query is the mean of its tokens.

    Imagen adds such a vector to the timestep embedding (section 2.4) without saying how it is
    pooled; attention is the better of the ways that its appendix compares.
    """

    width: int
    dtype: Any
    attention_impl: str

    @nn.compact
    def __call__(self, hidden, mask):
        """hidden [B, L, W] and mask bool [B, L] -> [B, W]; finite but without meaning where no
        token is."""
        count = jnp.maximum(mask.sum(1, keepdims=True), 1)
        real = jnp.where(mask[..., None], hidden, 0)
        mean = real.astype(jnp.float32).sum(1) / count
        heads = self.width // 64 if self.width % 64 == 0 else 1
        dense = lambda name: nn.Dense(self.width, dtype=self.dtype, name=name)
        split = lambda x: x.reshape(*x.shape[:-1], heads, self.width // heads)
        q = split(dense("q")(mean.astype(self.dtype)))[:, None]
        k, v = split(dense("k")(hidden)), split(dense("v")(hidden))
        pooled = attention(q, k, v, mask[:, None, None, :], impl=self.attention_impl)
        return pooled.reshape(-1, self.width)


class Conditioner(nn.Module):
    """Conditions -> (emb [B, time_dim], context [B, T, context_dim], context_mask [B, T]).

    Context is [four image tokens, text tokens]. A dropped image is the learned `null_image` in both
    places. A dropped caption read from CLIP or T5 loses its tokens (mask), z_t and pooled vector
    (zero), or becomes one learned token (which is then pooled) and a learned z_t; a dropped caption
    read by the text transformer is all padding.
    """

    time_dim: int
    context_dim: int
    use_z_i: bool
    use_z_t: bool
    use_text_tokens: bool
    learned_null_text: bool
    text: dict[str, Any] | None
    dtype: Any
    pool_text: bool = False
    attention_impl: str = "xla"

    @nn.compact
    def __call__(self, z_i, z_t, text_hidden, tokens, text_mask, drop_image, drop_text):
        embs, context, masks = [], [], []
        if self.use_z_i:
            z_i = self._drop(z_i, drop_image, self._null("null_image", z_i))
            embs.append(self._time(self.time_dim, "image_time")(z_i))
            # Karlo's memory order: channel by channel, the four tokens of each side by side.
            extra = self._dense(self.context_dim * IMAGE_TOKENS, "image_tokens")(z_i)
            context.append(extra.reshape(-1, self.context_dim, IMAGE_TOKENS).swapaxes(1, 2))
            masks.append(jnp.ones((z_i.shape[0], IMAGE_TOKENS), bool))
        if self.use_z_t:
            null = self._null("null_z_t", z_t) if self.learned_null_text else 0.0
            z_t = self._drop(z_t, drop_text, null)
            embs.append(self._time(self.time_dim, "text_time")(z_t))
        if self.text is not None:
            if drop_text is not None:
                text_mask = text_mask & ~drop_text[:, None]
            fields = {**self.text, "width": self.context_dim, "dtype": self.dtype}
            hidden = TextEncoder(**fields, name="text")(tokens, text_mask)
            embs.append(self._time(self.time_dim, "caption_time")(hidden[:, -1]))
            if self.use_text_tokens:
                context.append(hidden)
                masks.append(jnp.ones_like(text_mask))
        elif self.use_text_tokens:
            hidden, mask = text_hidden, text_mask
            if drop_text is not None:
                mask = mask & ~drop_text[:, None]
            if self.learned_null_text:
                hidden = self._drop(hidden, drop_text, self._null("null_token", hidden))
                if drop_text is not None:
                    mask = mask.at[:, 0].set(mask[:, 0] | drop_text)
            hidden = self._dense(self.context_dim, "text_tokens")(hidden)
            hidden = LayerNorm(dtype=self.dtype, name="text_norm")(hidden)
            context.append(hidden)
            masks.append(mask)
            if self.pool_text:
                pool = Pool(self.context_dim, self.dtype, self.attention_impl, name="pool")
                pooled = pool(hidden, mask)
                if not self.learned_null_text:
                    pooled = self._drop(pooled, drop_text, 0.0)
                embs.append(self._time(self.time_dim, "pool_time")(pooled))
        emb = sum(embs) if embs else None
        if not context:
            return emb, None, None
        return emb, jnp.concatenate(context, axis=1), jnp.concatenate(masks, axis=1)

    def _dense(self, features, name):
        return nn.Dense(features, dtype=self.dtype, name=name)

    def _time(self, features, name):
        """Into the time embedding, which is float32 in every dtype."""
        return nn.Dense(features, dtype=jnp.float32, name=name)

    def _null(self, name, like):
        return self.param(name, nn.initializers.normal(0.02), like.shape[-1:])

    def _drop(self, value, drop, null):
        if drop is None:
            return value
        return jnp.where(drop.reshape((-1,) + (1,) * (value.ndim - 1)), null, value)


class Decoder(UNet):
    """The decoder: every field of `UNet`, and these.

    Fields:
      context_dim: width of the context tokens; with a text transformer, its width too.
      use_z_i: condition on the CLIP image embedding (off: GLIDE, or the text-only ablations).
      use_z_t: add the projected CLIP text embedding to the time embedding.
      use_text_tokens: let attention see the caption's tokens.
      pool_text: add a vector pooled from CLIP's or T5's hidden states to the time embedding.
      learned_null_text: a dropped CLIP or T5 caption is learned rather than absent.
      text_layers: depth of the decoder's own text transformer; 0 reads a frozen encoder's hidden
        states, whose width is free.
      text_context: longest caption of its own transformer, or of T5.
      text_heads, vocab: the own transformer's heads and number of tokens.
    """

    context_dim: int = 1536
    use_z_i: bool = True
    use_z_t: bool = True
    use_text_tokens: bool = True
    pool_text: bool = False
    learned_null_text: bool = False
    text_layers: int = 0
    text_heads: int = 32
    text_context: int = 256
    vocab: int = 49408

    @nn.compact
    def __call__(
        self,
        x_t,
        t,
        z_i,
        z_t,
        text_hidden,
        tokens,
        text_mask,
        *,
        drop_image=None,
        drop_text=None,
        dropout_keys=None,
    ):
        """Predict the noise and its variance from a noised picture and its conditions.

        Conditions that the fields above do not use may be None. z_i and z_t come as CLIP gives
        them or scaled, but always the same way; here they are only projected.

        Args:
          x_t: float [B, H, W, 3].
          t: int32 [B], original timesteps 0..999.
          z_i: float [B, D], CLIP image embedding.
          z_t: float [B, D], CLIP text embedding.
          text_hidden: float [B, L, W], hidden states of a frozen CLIP or T5.
          tokens: int32 [B, L].
          text_mask: bool [B, L], True = real token.
          drop_image: None or bool [B], True = without z_i.
          drop_text: None or bool [B], True = without the caption (z_t and its tokens).
          dropout_keys: None or typed keys [B], one a sample: dropout on, see `UNet`.

        Returns:
          float32 [B, H, W, out_channels]: eps, then the variance value v if out_channels is 6.

        Raises:
          ConfigError: a condition is missing, or shapes do not fit the fields.
        """
        own_text = self.text_layers > 0
        if self.pool_text and (own_text or not self.use_text_tokens):
            raise ConfigError(
                "pool_text pools a frozen encoder's tokens: expected text_layers=0 and "
                "use_text_tokens=True"
            )
        needs = {
            "z_i": (self.use_z_i, z_i),
            "z_t": (self.use_z_t, z_t),
            "text_hidden": (self.use_text_tokens and not own_text, text_hidden),
            "tokens": (own_text, tokens),
            "text_mask": (self.use_text_tokens or own_text, text_mask),
        }
        missing = [name for name, (used, value) in needs.items() if used and value is None]
        if missing:
            raise ConfigError(f"this decoder is conditioned on {', '.join(missing)}: got None")
        text = None
        if own_text:
            text = {
                "vocab": self.vocab,
                "context_length": self.text_context,
                "layers": self.text_layers,
                "heads": self.text_heads,
                "remat": self.remat,
                "fold": self.fold,
                "attention_impl": self.attention_impl,
            }
        emb, context, mask = Conditioner(
            time_dim=self.time_dim or 4 * self.channels,
            context_dim=self.context_dim,
            use_z_i=self.use_z_i,
            use_z_t=self.use_z_t,
            use_text_tokens=self.use_text_tokens,
            learned_null_text=self.learned_null_text,
            text=text,
            dtype=self.dtype,
            pool_text=self.pool_text,
            attention_impl=self.attention_impl,
            name="text_proj",
        )(z_i, z_t, text_hidden, tokens, text_mask, drop_image, drop_text)
        unet = UNet(**unet_fields(self), name="unet")
        return unet(x_t, t, emb, context, mask, dropout_keys=dropout_keys)


# The paper's Table 3: 64 × 64, own text transformer; GLIDE is the same net without z_i.
_PAPER = dict(
    channels=512,
    multipliers=(1, 2, 3, 4),
    blocks=3,
    attention=(False, True, True, True),
    dropout=0.1,
    context_dim=2048,
    use_z_t=False,
    text_layers=24,
    text_heads=32,
    text_context=256,
)

PRESETS = {
    "karlo": dict(
        channels=320,
        multipliers=(1, 2, 3, 4),
        blocks=3,
        attention=(False, True, True, True),
        context_dim=1536,
    ),
    "paper": _PAPER,
    "glide": _PAPER | dict(use_z_i=False, dropout=0.0),
    # Imagen's 64 × 64 base (2B) as far as its paper describes it, on this U-Net; captions through
    # T5.
    "imagen": dict(
        channels=512,
        multipliers=(1, 2, 3, 4),
        blocks=3,
        attention=(False, True, True, True),
        context_dim=2048,
        use_z_i=False,
        use_z_t=False,
        pool_text=True,
        learned_null_text=True,
        text_context=128,
    ),
    # 16 × 16 on a CPU, with attention at 4.
    "emoji": dict(
        channels=32,
        multipliers=(1, 2, 3),
        blocks=1,
        attention=(False, False, True),
        head_dim=32,
        groups=8,
        time_dim=128,
        context_dim=128,
        learned_null_text=True,
    ),
}
