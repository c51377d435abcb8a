"""Conversions that all stages share: pictures to and from [-1, 1], embeddings to length one.

Each works on numpy and on JAX arrays, traced ones too, and gives back its own kind.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray | jax.Array


def _library(array: Array):
    return np if isinstance(array, np.ndarray) else jnp


def to_float(pictures: Array) -> jax.Array:
    """uint8 [..., 3] to float32 in [-1, 1]."""
    return pictures.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(pictures: Array) -> Array:
    """[-1, 1] float to uint8, clipped and rounded once, as pictures are saved and measured."""
    xp = _library(pictures)
    return xp.round((xp.clip(pictures, -1, 1) + 1) * 127.5).astype(xp.uint8)


def unit(z: Array) -> Array:
    """Embeddings [..., D] scaled to length one; a zero vector stays finite."""
    xp = _library(z)
    # The floor is inside the root: the gradient of a norm is NaN at zero, this one's is finite.
    return z / xp.sqrt(xp.maximum(xp.sum(z * z, axis=-1, keepdims=True), 1e-16))
