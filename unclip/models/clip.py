"""CLIP (arXiv 2103.00020): the joint embedding of pictures and captions that unCLIP inverts.

An image tower (a vision transformer read at its class token) and a text tower (a causal
transformer read at the end-of-text token) map to z_i and z_t of equal width. The architecture is
OpenAI's, so its checkpoints and OpenCLIP's load leaf for leaf (`PRESETS` gives the known sizes).
Embeddings are returned unnormalised, as the prior and the decoder use them; the contrastive loss
normalises them itself.

The unCLIP paper (arXiv 2204.06125, appendix C) trains a ViT-H/16 at 256 px (width 1280, 32 blocks;
text width 1024, 24 blocks) and leaves open the heads, the embedding's width, the caption's length
and the activation. "ViT-H/16" takes heads of 80 and 64 channels and GELU as OpenCLIP's ViT-H/14
does, 1024 for the embedding (section 2.2 speaks of 1,024 dimensions) and the 77 tokens of every
other CLIP.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip.errors import ConfigError
from unclip.models.transformer import LayerNorm, Transformer, beside, causal_mask

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LOGIT_SCALE = 100.0

VOCAB_SIZE = 49408  # byte-pair merges; 49406 starts a text and 49407, the highest, ends it


def _openai(embed_dim, image_size, vision, patch_size, text) -> dict:
    """OpenAI's sizes; `vision` and `text` are (width, layers, heads)."""
    return dict(
        embed_dim=embed_dim,
        image_size=image_size,
        patch_size=patch_size,
        vision_width=vision[0],
        vision_layers=vision[1],
        vision_heads=vision[2],
        text_width=text[0],
        text_layers=text[1],
        text_heads=text[2],
        context=77,
        activation="quick_gelu",
    )


PRESETS: dict[str, dict] = {
    "ViT-B/32": _openai(512, 224, (768, 12, 12), 32, (512, 12, 8)),
    "ViT-B/16": _openai(512, 224, (768, 12, 12), 16, (512, 12, 8)),
    "ViT-L/14": _openai(768, 224, (1024, 24, 16), 14, (768, 12, 12)),
    "ViT-L/14@336": _openai(768, 336, (1024, 24, 16), 14, (768, 12, 12)),
    "ViT-H/14": _openai(1024, 224, (1280, 32, 16), 14, (1024, 24, 16)) | {"activation": "gelu"},
    "ViT-bigG/14": _openai(1280, 224, (1664, 48, 16), 14, (1280, 32, 20))
    | {"activation": "gelu", "vision_mlp_width": 8192},
    "ViT-H/16": _openai(1024, 256, (1280, 32, 16), 16, (1024, 24, 16)) | {"activation": "gelu"},
    "emoji": _openai(128, 64, (128, 4, 4), 8, (128, 4, 4)) | {"activation": "gelu", "context": 32},
}


def normalise(images: jax.Array) -> jax.Array:
    """CLIP's own scaling of pictures: [-1, 1] -> (value in [0, 1] - IMAGE_MEAN) / IMAGE_STD.

    Args:
      images: float [..., 3] RGB in [-1, 1].

    Returns:
      float32, same shape; about -1.8 to 2.2.
    """
    unit = (images.astype(jnp.float32) + 1.0) / 2.0
    return (unit - beside(IMAGE_MEAN, unit)) / beside(IMAGE_STD, unit)


def resize_for_clip(images: jax.Array, size: int) -> jax.Array:
    """Bring square pictures of any size to what `CLIP.encode_image` takes.

    Bicubic with antialiasing (Keys, a = -1/2, PIL's filter), clipped to [-1, 1], then `normalise`.
    Differentiable, so that a frozen CLIP can also guide sampling.

    Args:
      images: float [B, S, S, 3] in [-1, 1].
      size: the CLIP's image_size.

    Returns:
      float32 [B, size, size, 3], CLIP-normalised.

    Raises:
      ConfigError: the pictures are not square RGB.
    """
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise ConfigError(
            f"pictures for CLIP were given with shape {images.shape}; expected square RGB "
            "[B, S, S, 3] (crop to a square first)"
        )
    images = images.astype(jnp.float32)
    if images.shape[1] != size:
        shape = (images.shape[0], size, size, 3)
        images = jax.image.resize(images, shape, method="cubic", antialias=True)
        images = jnp.clip(images, -1.0, 1.0)
    return normalise(images)


@jax.custom_vjp
def _capped_exp(p):
    return jnp.minimum(jnp.exp(p), MAX_LOGIT_SCALE)


def _capped_exp_forward(p):
    return _capped_exp(p), jnp.exp(p)


def _capped_exp_backward(exp_p, g):
    # A plain minimum has no gradient above the cap, so a temperature that exceeds it once would
    # stay there; here only the gradient that would increase it further is dropped.
    inside = (exp_p <= MAX_LOGIT_SCALE) | (g > 0)
    return (jnp.where(inside, g * jnp.minimum(exp_p, MAX_LOGIT_SCALE), 0.0),)


_capped_exp.defvjp(_capped_exp_forward, _capped_exp_backward)


class VisionTower(nn.Module):
    """ViT: patches without bias, class token, `ln_pre`, blocks, `ln_post` of the class token."""

    embed_dim: int
    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int | None = None
    activation: str = "quick_gelu"
    dtype: Any = jnp.float32
    remat: str | None = None
    fold: bool = False
    attention_impl: str = "xla"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """float [B, image_size, image_size, 3], CLIP-normalised -> z_i float32 [B, embed_dim]."""
        size, patch, width = self.image_size, self.patch_size, self.width
        if images.shape[1:] != (size, size, 3) or size % patch:
            raise ConfigError(
                f"CLIP was given pictures of shape {images.shape}; expected [B, {size}, {size}, 3] "
                f"with the size a multiple of the patch size {patch} (resize_for_clip does this)"
            )
        scaled = nn.initializers.normal(width**-0.5)
        x = nn.Conv(
            width,
            (patch, patch),
            strides=(patch, patch),
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            name="patch",
        )(images)
        x = x.reshape(x.shape[0], -1, width)
        token = self.param("class_token", scaled, (width,), jnp.float32)
        position = self.param("position", scaled, (x.shape[1] + 1, width), jnp.float32)
        token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, width))
        x = jnp.concatenate([token, x], axis=1) + position.astype(x.dtype)[None]
        x = LayerNorm(dtype=self.dtype, name="ln_pre")(x)
        x = Transformer(
            width,
            self.layers,
            self.heads,
            mlp_width=self.mlp_width,
            activation=self.activation,
            dtype=self.dtype,
            remat=self.remat,
            fold=self.fold,
            attention_impl=self.attention_impl,
            name="transformer",
        )(x)
        x = LayerNorm(dtype=self.dtype, name="ln_post")(x[:, 0])
        project = nn.Dense(
            self.embed_dim, use_bias=False, dtype=self.dtype, kernel_init=scaled, name="proj"
        )
        return project(x).astype(jnp.float32)


class TextTower(nn.Module):
    """Causal transformer over byte-pair tokens, `ln_final`, read at the end-of-text token."""

    embed_dim: int
    context: int
    vocab_size: int
    width: int
    layers: int
    heads: int
    activation: str = "quick_gelu"
    dtype: Any = jnp.float32
    remat: str | None = None
    fold: bool = False
    attention_impl: str = "xla"

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """int32 [B, L <= context] -> (z_t float32 [B, embed_dim], hidden [B, L, width])."""
        length = tokens.shape[1]
        if length > self.context:
            raise ConfigError(
                f"CLIP was given texts of {length} tokens; expected at most {self.context}"
            )
        x = nn.Embed(
            self.vocab_size,
            self.width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(0.02),
            name="token",
        )(tokens)
        shape = (self.context, self.width)
        position = self.param("position", nn.initializers.normal(0.01), shape, jnp.float32)
        # No padding mask: nothing after the end of a text reaches it through the causal mask.
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
        )(x + position[None, :length].astype(x.dtype), causal_mask(length))
        hidden = LayerNorm(dtype=self.dtype, name="ln_final")(x)
        end = jnp.argmax(tokens, axis=-1)  # the end-of-text id is the highest; its first place
        pooled = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
        z_t = nn.Dense(
            self.embed_dim,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(self.width**-0.5),
            name="proj",
        )(pooled)
        return z_t.astype(jnp.float32), hidden


class CLIP(nn.Module):
    """Both towers and the learned temperature.

    Fields: `activation` is "quick_gelu" for OpenAI's weights and "gelu" for most of OpenCLIP's;
    `vision_mlp_width` None means 4 x vision_width. `logit_bias=True` adds the bias of the sigmoid
    loss (arXiv 2303.15343) and starts the scale at 10 and the bias at -10 as that paper does;
    otherwise the scale starts at 1/0.07. `vision_layers=0` or `text_layers=0` is a CLIP without
    that tower, as cascades are published with: it has no parameters, and its other fields are not
    used. Parameters: `vision/…`, `text/…`, `logit_scale` (the logarithm) and `logit_bias`.
    """

    embed_dim: int
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_layers: int
    text_heads: int
    context: int = 77
    vocab_size: int = VOCAB_SIZE
    vision_mlp_width: int | None = None
    activation: str = "quick_gelu"
    logit_bias: bool = False
    dtype: Any = jnp.float32
    remat: str | None = None
    fold: bool = False
    attention_impl: str = "xla"

    def setup(self):
        common = dict(
            activation=self.activation,
            dtype=self.dtype,
            remat=self.remat,
            fold=self.fold,
            attention_impl=self.attention_impl,
        )
        if self.vision_layers:
            self.vision = VisionTower(
                self.embed_dim,
                self.image_size,
                self.patch_size,
                self.vision_width,
                self.vision_layers,
                self.vision_heads,
                self.vision_mlp_width,
                **common,
            )
        if self.text_layers:
            self.text = TextTower(
                self.embed_dim,
                self.context,
                self.vocab_size,
                self.text_width,
                self.text_layers,
                self.text_heads,
                **common,
            )
        constant = nn.initializers.constant
        scale = np.log(10.0) if self.logit_bias else np.log(1 / 0.07)
        self.log_scale = self.param("logit_scale", constant(scale), (), jnp.float32)
        if self.logit_bias:
            self.bias = self.param("logit_bias", constant(-10.0), (), jnp.float32)

    def encode_image(self, images: jax.Array) -> jax.Array:
        """z_i float32 [B, embed_dim], unnormalised.

        Args:
          images: float [B, image_size, image_size, 3], CLIP-normalised (see `resize_for_clip`).

        Raises:
          ConfigError: another size, or a CLIP without image tower.
        """
        if not self.vision_layers:
            raise ConfigError(
                "this CLIP has no image tower; convert with the image encoder's folder too "
                "(unclip convert --from FORMAT FOLDER IMAGE_FOLDER)"
            )
        return self.vision(images)

    def encode_text(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(z_t float32 [B, embed_dim], hidden [B, L, text_width]), both unnormalised.

        Args:
          tokens: int32 [B, L], L <= context; start, text, end (49407), then any lower id.

        Returns:
          z_t is the projection of the hidden state at the end-of-text token; hidden is what the
          last layer norm gives, at every position, in `dtype`.

        Raises:
          ConfigError: more tokens than the context holds, or a CLIP without text tower.
        """
        if not self.text_layers:
            raise ConfigError(
                "this CLIP has no text tower; convert with the text encoder's folder too "
                "(unclip convert --from FORMAT FOLDER TEXT_FOLDER)"
            )
        return self.text(tokens)

    def logit_scale_and_bias(self) -> tuple[jax.Array, jax.Array]:
        """(scale in (0, 100], bias), float32 scalars: logits = scale * cosine + bias.

        The bias is 0 unless `logit_bias` is set.
        """
        scale = _capped_exp(
            self.log_scale.astype(jnp.float32)
        )  # converted parameters may be float16
        return scale, self.bias.astype(jnp.float32) if self.logit_bias else jnp.zeros(())

    def __call__(self, images, tokens):
        """(z_i [B, embed_dim], z_t [B, embed_dim], logit scale scalar), float32.

        Raises:
          ConfigError: as `encode_image` and `encode_text`; `init` skips an absent tower.
        """
        scale, _ = self.logit_scale_and_bias()
        absent = self.is_initializing()
        z_i = None if absent and not self.vision_layers else self.encode_image(images)
        z_t = None if absent and not self.text_layers else self.encode_text(tokens)[0]
        return z_i, z_t, scale
