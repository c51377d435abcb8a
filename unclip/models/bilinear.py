"""Bilinear resizing as two tools do it, for pictures of any size by one program.

FIDs depend on how pictures are resized to Inception's 299 pixels. Without antialiasing a pixel of
the result is a mix of four of the picture. The host picks these (`corners`), which gives arrays of
one shape for pictures of any shape; the device mixes them. Positions are float32 throughout, as
both tools compute them; float64 would pick other neighbours.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

SIZE = 299
# (low index, high index, weight of high), int32, int32 and float32 [size].
Positions = tuple[np.ndarray, np.ndarray, np.ndarray]


def tf1_positions(length: int, size: int = SIZE) -> Positions:
    """TensorFlow 1: pixel i is taken at i · in/out, the upper left corners aligned."""
    at = np.arange(size, dtype=np.float32) * (np.float32(length) / np.float32(size))
    return _neighbours(at, length)


def torch_positions(length: int, size: int = SIZE) -> Positions:
    """PyTorch's `interpolate(align_corners=False)`: half-pixel centres, held at the border."""
    scale = np.float32(length) / np.float32(size)
    # Multiplied and subtracted with one rounding, as its vector code does.
    at = np.float32(np.float64(scale) * (np.arange(size) + 0.5) - 0.5)
    return _neighbours(np.maximum(at, np.float32(0)), length)


def _neighbours(at: np.ndarray, length: int) -> Positions:
    # Rounding can move the last position onto the edge.
    low = np.minimum(at.astype(np.int32), length - 1)
    high = np.minimum(low + 1, length - 1)
    return low, high, (at - low).astype(np.float32)


def corners(
    picture: np.ndarray,
    positions: Callable[[int, int], Positions] = tf1_positions,
    size: int = SIZE,
) -> dict[str, np.ndarray]:
    """The arrays that `mix` needs of a picture [H, W, C], on the host.

    Returns:
      "corners" [2, size, 2, size, C] in the picture's dtype: low and high rows, low and high
      columns; "down" and "right" float32 [size], the weights of the high ones.
    """
    top, bottom, down = positions(picture.shape[0], size)
    left, right, across = positions(picture.shape[1], size)
    rows = picture.take(np.concatenate([top, bottom]), 0)
    four = rows.take(np.concatenate([left, right]), 1)
    four = four.reshape(2, size, 2, size, picture.shape[2])
    return {"corners": four, "down": down, "right": across}


def mix(corners: jax.Array, down: jax.Array, right: jax.Array) -> jax.Array:
    """float32 [B, size, size, C], not rounded, of a batch of what `corners` gives."""
    left, other = corners[:, :, :, 0].astype(jnp.float32), corners[:, :, :, 1].astype(jnp.float32)
    rows = left + (other - left) * right[:, None, None, :, None]
    return rows[:, 0] + (rows[:, 1] - rows[:, 0]) * down[:, :, None, None]


def resize_tf1(images: np.ndarray, size: int = SIZE) -> jax.Array:
    """TensorFlow 1's bilinear resize: what FID's graph does to a picture before the network.

    Nothing is antialiased; `jax.image.resize` cannot do this. Values equal TensorFlow's to float32
    rounding.

    Args:
      images: uint8 [B, H, W, C], or float of the same range, on the host.
      size: height and width of the result.

    Returns:
      float32 [B, size, size, C], not rounded.
    """
    prepared = [corners(np.asarray(image), tf1_positions, size) for image in images]
    return mix(*(np.stack([one[name] for one in prepared]) for name in prepared[0]))
