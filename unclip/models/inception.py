"""FID's Inception-v3.

The network is the one TensorFlow published on 2015-12-05 (Szegedy et al., 1512.00567), which FID
(1706.08500), sFID (2103.03841) and the Inception score (1606.03498) are defined by. It differs from
later Inception-v3: 1008 classes, batch norm with epsilon 1e-3, average pools that do not count the
padding, and a max pool in the last block's pool branch. It is frozen, so that the statistics of its
batch norms are parameters like the rest.

Module names are those of the PyTorch ports (`Mixed_6d`, `branch7x7dbl_3`), each unit holding
`kernel`, `scale`, `bias`, `mean` and `var`: 23,885,392 numbers in all.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip.errors import ConfigError, unknown
from unclip.models.bilinear import SIZE

CLASSES = 1008
SPATIAL_CHANNELS = 7
# (shift, divisor) that take [0, 255] to about [-1, 1].
NORMALISE = {"tf": (128.0, 128.0), "pytorch-fid": (127.5, 127.5)}


class Features(NamedTuple):
    """The network's outputs for B pictures; float32.

    Attributes:
      pool3: [B, 2048], the globally averaged last block: FID, KID, precision and recall.
      spatial: [B, 17, 17, 7], the first channels of `mixed_6/conv`: sFID, flattened to 2023.
      logits: [B, 1008], with the bias.
      logits_unbiased: [B, 1008], without it: the Inception score of OpenAI and torch-fidelity.
    """

    pool3: jax.Array
    spatial: jax.Array
    logits: jax.Array
    logits_unbiased: jax.Array


class Unit(nn.Module):
    """Convolution, frozen batch norm, ReLU.

    Attributes:
      features: channels out.
      kernel: (height, width).
      stride: 1 with the picture's size kept, 2 without padding.
      pad: False leaves out the border where the kernel would need padding.
      dtype: of the computation.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    pad: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, H', W', features] in dtype."""
        shape = (*self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        scale = self.param("scale", nn.initializers.ones, (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        mean = self.param("mean", nn.initializers.zeros, (self.features,))
        var = self.param("var", nn.initializers.ones, (self.features,))
        x = _convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.pad)
        gain = scale.astype(jnp.float32) / jnp.sqrt(var.astype(jnp.float32) + 1e-3)
        mean, gain, bias = (v[None, None, None] for v in (mean, gain, bias))
        x = (x.astype(jnp.float32) - mean) * gain + bias
        return nn.relu(x).astype(self.dtype)


def _convolve(x, kernel, stride, pad):
    """The convolution of `Unit`, in the form that XLA computes fastest on a CPU."""
    # Features are compared across machines, so no accelerator may round float32 to bfloat16.
    precise = {"precision": "highest"}
    if kernel.shape[:2] == (1, 1) and stride == 1:
        return jnp.matmul(x, kernel[0, 0], **precise)
    border = "SAME"
    if not pad:
        # Without any padding XLA uses another algorithm, two to five times as slow, so the columns
        # are padded and what the padding adds is cut off.
        border = ((0, 0), (1, 1)) if stride == 1 else ((0, 1), (0, 1))
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), border, dimension_numbers=("NHWC", "HWIO", "NHWC"), **precise
    )
    if pad:
        return y
    first = int(stride == 1)
    height, width = ((n - k) // stride + 1 for n, k in zip(x.shape[1:3], kernel.shape))
    return y[:, :height, first : first + width]


def _pool(x, join, stride=1):
    """3 × 3 windows joined by rows and then by columns; faster on a CPU than one window at once."""
    for axis in (1, 2):
        count = (x.shape[axis] - 3) // stride + 1
        ends = [(i, i + (count - 1) * stride + 1) for i in range(3)]
        a, b, c = (jax.lax.slice_in_dim(x, *end, stride, axis) for end in ends)
        x = join(join(a, b), c)
    return x


def _maximum(x, stride=1):
    """Stride 1 keeps the picture's size, 2 is without padding."""
    if stride == 1:
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    return _pool(x, jnp.maximum, stride)


def _average(x):
    """The picture's size is kept, and padding is not counted."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    inside = [np.convolve(np.ones(n), np.ones(3), "same") for n in x.shape[1:3]]
    share = 1 / np.outer(*inside)[None, ..., None]
    return _pool(padded, jnp.add) * share.astype(x.dtype)


class Block(nn.Module):
    """One `Mixed_…`: branches side by side, joined in channels in the order written.

    Attributes:
      kind: "A" 35 × 35, "B" to 17 × 17, "C" 17 × 17, "D" to 8 × 8, "E" and "E_max" 8 × 8.
      width: of A, the channels of its pool branch; of C, those of its 7 × 1 and 1 × 7 inside.
      dtype: of the computation.
    """

    kind: str
    width: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, H', W', C']."""

        def unit(name, x, features, kernel=(1, 1), **fields):
            return Unit(features, kernel, dtype=self.dtype, name=name, **fields)(x)

        def chain(branch, x, *layers, first=1):
            for number, (features, kernel) in enumerate(layers, first):
                x = unit(f"{branch}_{number}", x, features, kernel)
            return x

        def shrink(name, x, features):
            return unit(name, x, features, (3, 3), stride=2, pad=False)

        def fork(branch, x):
            return [
                unit(f"{branch}a", x, 384, (1, 3)),
                unit(f"{branch}b", x, 384, (3, 1)),
            ]

        one, three, tall, wide = (1, 1), (3, 3), (7, 1), (1, 7)
        if self.kind == "A":
            branches = [
                unit("branch1x1", x, 64),
                chain("branch5x5", x, (48, one), (64, (5, 5))),
                chain("branch3x3dbl", x, (64, one), (96, three), (96, three)),
                unit("branch_pool", _average(x), self.width),
            ]
        elif self.kind == "B":
            double = chain("branch3x3dbl", x, (64, one), (96, three))
            branches = [
                shrink("branch3x3", x, 384),
                shrink("branch3x3dbl_3", double, 96),
                _maximum(x, 2),
            ]
        elif self.kind == "C":
            c = self.width
            branches = [
                unit("branch1x1", x, 192),
                chain("branch7x7", x, (c, one), (c, wide), (192, tall)),
                chain("branch7x7dbl", x, (c, one), (c, tall), (c, wide), (c, tall), (192, wide)),
                unit("branch_pool", _average(x), 192),
            ]
        elif self.kind == "D":
            seven = chain("branch7x7x3", x, (192, one), (192, wide), (192, tall))
            branches = [
                shrink("branch3x3_2", unit("branch3x3_1", x, 192), 320),
                shrink("branch7x7x3_4", seven, 192),
                _maximum(x, 2),
            ]
        else:
            double = chain("branch3x3dbl", x, (448, one), (384, three))
            # The published graph pools its last block by the maximum, unlike the article.
            largest = self.kind == "E_max"
            pooled = _maximum(x) if largest else _average(x)
            branches = [
                unit("branch1x1", x, 320),
                *fork("branch3x3_2", unit("branch3x3_1", x, 384)),
                *fork("branch3x3dbl_3", double),
                unit("branch_pool", pooled, 192),
            ]
        return jnp.concatenate(branches, -1)


class Head(nn.Module):
    """The classes: float32 [B, 2048] -> logits and logits without the bias, [B, 1008] each."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], CLASSES))
        bias = self.param("bias", nn.initializers.zeros, (CLASSES,))
        unbiased = jnp.matmul(x, kernel.astype(jnp.float32), precision="highest")
        return unbiased + bias[None], unbiased


# name, kind, width.
BLOCKS = (
    ("Mixed_5b", "A", 32),
    ("Mixed_5c", "A", 64),
    ("Mixed_5d", "A", 64),
    ("Mixed_6a", "B", 0),
    ("Mixed_6b", "C", 128),
    ("Mixed_6c", "C", 160),
    ("Mixed_6d", "C", 160),
    ("Mixed_6e", "C", 192),
    ("Mixed_7a", "D", 0),
    ("Mixed_7b", "E", 0),
    ("Mixed_7c", "E_max", 0),
)


class Inception(nn.Module):
    """FID's Inception-v3.

    Attributes:
      dtype: of the convolutions; features are float32 in any case. Published numbers were made
        in float32.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, normalise="tf"):
        """Features of pictures that are already resized.

        Args:
          images: [B, 299, 299, 3] of values in [0, 255], any number type; fractions, which
            `bilinear.resize_tf1` gives, must not be rounded.
          normalise: "tf" feeds the network (x - 128)/128, as FID's graph does; "pytorch-fid" 2x - 1
            of x in [0, 1], which is (x - 127.5)/127.5.

        Returns:
          `Features`.

        Raises:
          ConfigError: another shape or an unknown normalisation.
        """
        if images.ndim != 4 or images.shape[1:] != (SIZE, SIZE, 3):
            raise ConfigError(
                f"pictures of shape {tuple(images.shape)}: expected [B, {SIZE}, {SIZE}, 3]; "
                "resize them first (bilinear.resize_tf1)"
            )
        if normalise not in NORMALISE:
            raise unknown("normalise", normalise, NORMALISE)
        shift, divisor = NORMALISE[normalise]

        def unit(name, x, features, size, **fields):
            return Unit(features, (size, size), dtype=self.dtype, name=name, **fields)(x)

        x = (images.astype(jnp.float32) - shift) / divisor
        x = unit("Conv2d_1a_3x3", x, 32, 3, stride=2, pad=False)
        x = unit("Conv2d_2a_3x3", x, 32, 3, pad=False)
        x = unit("Conv2d_2b_3x3", x, 64, 3)
        x = _maximum(x, 2)
        x = unit("Conv2d_3b_1x1", x, 80, 1)
        x = unit("Conv2d_4a_3x3", x, 192, 3, pad=False)
        x = _maximum(x, 2)
        for name, kind, width in BLOCKS:
            x = Block(kind, width, dtype=self.dtype, name=name)(x)
            if name == "Mixed_6d":
                # This block is mixed_6 of the graph; mixed_6/conv is its first branch.
                spatial = x[..., :SPATIAL_CHANNELS].astype(jnp.float32)
        pool3 = x.astype(jnp.float32).mean((1, 2))
        return Features(pool3, spatial, *Head(name="fc")(pool3))
