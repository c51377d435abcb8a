"""DINOv2's vision transformer (arXiv 2304.07193): features for FD-DINOv2 (arXiv 2306.04675).

It was trained without labels, and distances between its features rank generated pictures closer to
human judgement than Inception's. Blocks are pre-norm with LayerScale; the largest has SwiGLU
instead of an MLP; the variants "-reg" have four register tokens (arXiv 2309.16588).

The networks were trained at 518 px and are read at 224, so the position embeddings are resized from
37 x 37 to 16 x 16. Three resizes are in use and give different features (`INTERPOLATIONS`).

Parameters: the published files count 22,056,576 (S), 86,580,480 (B), 304,368,640 (L) and
1,136,480,768 (g), with registers 4 x width more. These include the mask token [width], which only
training uses and which is not kept here.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip.errors import ConfigError, unknown
from unclip.models.transformer import MLP, Attention, LayerNorm, beside

IMAGE_MEAN = (0.485, 0.456, 0.406)  # of ImageNet
IMAGE_STD = (0.229, 0.224, 0.225)
FFNS = ("mlp", "swiglu")
# How position embeddings are resized to another grid: (offset, antialias). Bicubic, a = -3/4 or,
# with antialias, -1/2. The offset is added to the new side before the step is computed from it.
INTERPOLATIONS = {
    "hub": (0.1, False),  # Meta's code for the four models of 2023
    "transformers": (0.0, False),  # Dinov2Model, for the same four
    "antialias": (0.0, True),  # both, for the models with registers
}


def _preset(width: int, layers: int, heads: int, ffn: str = "mlp") -> dict:
    return dict(width=width, layers=layers, heads=heads, ffn=ffn)


_PLAIN = {
    "ViT-S/14": _preset(384, 12, 6),
    "ViT-B/14": _preset(768, 12, 12),
    "ViT-L/14": _preset(1024, 24, 16),
    "ViT-g/14": _preset(1536, 40, 24, "swiglu"),
}
PRESETS: dict[str, dict] = _PLAIN | {
    f"{name}-reg": fields | {"registers": 4, "interpolation": "antialias"}
    for name, fields in _PLAIN.items()
}


def normalise(images: jax.Array) -> jax.Array:
    """uint8 [..., 3] RGB -> float32, (value / 255 - IMAGE_MEAN) / IMAGE_STD."""
    unit = images.astype(jnp.float32) / 255.0
    return (unit - beside(IMAGE_MEAN, unit)) / beside(IMAGE_STD, unit)


def position_matrix(old: int, new: int, interpolation: str) -> np.ndarray:
    """float32 [new, old]: what one axis of the grid of position embeddings is multiplied by.

    Args:
      old, new: positions along the axis; equal ones give the identity, as in both codes.
      interpolation: one of `INTERPOLATIONS`.

    Raises:
      ConfigError: an unknown interpolation.
    """
    if interpolation not in INTERPOLATIONS:
        raise unknown("interpolation", interpolation, INTERPOLATIONS)
    if old == new:
        return np.eye(old, dtype=np.float32)
    offset, antialias = INTERPOLATIONS[interpolation]
    step = old / (new + offset)
    matrix = np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * step
        if antialias:
            stretch = max(step, 1.0)
            low, high = int(centre - 2 * stretch + 0.5), int(centre + 2 * stretch + 0.5)
            columns = np.arange(max(low, 0), min(high, old))
            weights = _cubic((columns + 0.5 - centre) / stretch, -0.5)
            matrix[row, columns] = weights / weights.sum()
        else:
            first = math.floor(centre - 0.5) - 1
            columns = np.arange(first, first + 4)
            weights = _cubic(columns + 0.5 - centre, -0.75)
            # Beyond the edge, the edge is repeated.
            np.add.at(matrix[row], np.clip(columns, 0, old - 1), weights)
    return matrix.astype(np.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


class SwiGLU(nn.Module):
    """Dense `gate` and `up`, SiLU(gate) x up, Dense `down` (arXiv 2002.05202)."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[…, W] -> […, W] in `dtype`."""
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=jnp.float32)
        gated = nn.silu(dense(self.hidden, name="gate")(x)) * dense(self.hidden, name="up")(x)
        return dense(x.shape[-1], name="down")(gated)


class Block(nn.Module):
    """x + scale_1 attention(ln_1 x), then x + scale_2 ffn(ln_2 x)."""

    width: int
    heads: int
    hidden: int
    ffn: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, width] -> [B, T, width]."""
        norm = partial(LayerNorm, eps=1e-6, dtype=self.dtype)
        y, _ = Attention(self.width, self.heads, 0.02, self.dtype, name="attn")(
            norm(name="ln_1")(x)
        )
        x = x + y * beside(self._scale("scale_1", y), y)
        if self.ffn == "swiglu":
            ffn = SwiGLU(self.hidden, self.dtype, name="mlp")
        else:
            ffn = MLP(self.hidden, "gelu", 0.02, self.dtype, name="mlp")
        y = ffn(norm(name="ln_2")(x))
        return x + y * beside(self._scale("scale_2", y), y)

    def _scale(self, name: str, y: jax.Array) -> jax.Array:
        scale = self.param(name, nn.initializers.ones, (self.width,), jnp.float32)
        return scale.astype(y.dtype)


class DINOv2(nn.Module):
    """The network without a head; `PRESETS` gives the known sizes.

    Attributes:
      width, layers, heads: of the transformer; width divides by heads.
      ffn: "mlp" (GELU) or "swiglu".
      mlp_width: hidden width; None is 4 x width, for "swiglu" two thirds of it up to a multiple
        of 8.
      registers: tokens between the class token and the patches.
      image_size: of the pictures whose position embeddings are stored.
      patch_size: side of a patch in pixels.
      interpolation: one of `INTERPOLATIONS`, for pictures of another size.
      dtype: of the computation; norms and softmax are float32.
    """

    width: int
    layers: int
    heads: int
    ffn: str = "mlp"
    mlp_width: int | None = None
    registers: int = 0
    image_size: int = 518
    patch_size: int = 14
    interpolation: str = "hub"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """The class token after the last norm, float32 [B, width].

        Args:
          images: float [B, S, S, 3], as `normalise` gives, S a multiple of the patch size.

        Raises:
          ConfigError: pictures of another shape, or fields that contradict one another.
        """
        patch, size = self.patch_size, images.shape[1]
        if images.ndim != 4 or images.shape[1:] != (size, size, 3) or size % patch or not size:
            raise ConfigError(
                f"DINOv2 was given pictures of shape {images.shape}; expected [B, S, S, 3] with S "
                f"a multiple of the patch size {patch}"
            )
        if self.ffn not in FFNS:
            raise unknown("DINOv2 ffn", self.ffn, FFNS)
        if self.width % self.heads or self.image_size % patch:
            raise ConfigError(
                f"DINOv2 of width {self.width}, {self.heads} heads, {self.image_size} px and patch "
                f"{patch}; expected a width and a size that divide evenly"
            )
        normal = nn.initializers.normal(0.02)
        param = lambda name, *shape: self.param(name, normal, shape, jnp.float32)
        x = nn.Conv(
            self.width, (patch, patch), (patch, patch), "VALID", dtype=self.dtype, name="patch"
        )(images)
        x = x.reshape(x.shape[0], -1, self.width)
        token, grid = param("class_token", self.width), self.image_size // patch
        position = param("position", 1 + grid**2, self.width)
        x = x + self._resized(position[1:], grid, size // patch).astype(x.dtype)[None]
        leading = [token + position[0]]
        if self.registers:
            leading += list(param("registers", self.registers, self.width))
        leading = jnp.stack(leading).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(leading, (len(x), *leading.shape)), x], axis=1)
        for i in range(self.layers):
            block = Block(
                self.width, self.heads, hidden_width(self), self.ffn, self.dtype, name=f"block_{i}"
            )
            x = block(x)
        x = LayerNorm(eps=1e-6, dtype=self.dtype, name="ln_final")(x[:, 0])
        return x.astype(jnp.float32)

    def _resized(self, position: jax.Array, old: int, new: int) -> jax.Array:
        """[old², W] -> [new², W]."""
        if old == new:
            return position
        matrix = position_matrix(old, new, self.interpolation)
        grid = position.reshape(old, old, -1)
        grid = jnp.einsum("ia,jb,abw->ijw", matrix, matrix, grid, precision="highest")
        return grid.reshape(new * new, -1)


def hidden_width(model: DINOv2) -> int:
    """The hidden width of a model's MLPs or SwiGLUs."""
    if model.mlp_width is not None:
        return model.mlp_width
    return swiglu_width(4 * model.width) if model.ffn == "swiglu" else 4 * model.width


def swiglu_width(mlp_width: int) -> int:
    """Two thirds of an MLP's hidden width, rounded up to a multiple of 8: equally many
    parameters."""
    return (int(mlp_width * 2 / 3) + 7) // 8 * 8


def name_of(model: DINOv2) -> str:
    """A name for ids: that of the model's preset ("ViT-L-14"), or its sizes ("518px14-w64-l2")."""
    for name, preset in PRESETS.items():
        sizes = {"registers": 0, "image_size": 518, "patch_size": 14, "mlp_width": None} | preset
        sizes.pop("interpolation", None)
        if all(getattr(model, field) == value for field, value in sizes.items()):
            return name.replace("/", "-")
    registers = f"-r{model.registers}" if model.registers else ""
    return f"{model.image_size}px{model.patch_size}-w{model.width}-l{model.layers}{registers}"
