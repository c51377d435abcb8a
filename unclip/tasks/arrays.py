"""Conversions that all stages share: pictures to and from [-1, 1], embeddings to length one, and
ways between embeddings, or between the noises of pictures.

Each works on numpy and on JAX arrays, traced ones too, and gives back its own kind.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from unclip import errors

Array = np.ndarray | jax.Array
REPEATS = 24  # of the way to a mean on the sphere, each of which shortens it many times


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


def slerp(a: Array, b: Array, weight: Array | float) -> Array:
    """Spherical interpolation between rows: the direction turns evenly, the length changes evenly.

    A row is interpolated whole: an embedding, or all values of a picture's noise, whose length then
    stays that of noise (section 3.2 of the paper). Equal directions give the line between the two;
    opposite ones, between which no way is shorter than others, go round by one fixed direction.

    Args:
      a, b: float [B, ...], equal shapes.
      weight: 0 gives a, 1 gives b; a number, or [B]. May be traced; beyond 0 to 1 it goes on.

    Raises:
      ConfigError: shapes differ, or are not of rows.
    """
    rows = _rows((a, b), weight)
    xp, w = _library(rows[0]), weight
    if xp.ndim(w):
        w = w[:, None]
    lengths = [xp.sqrt(xp.sum(row * row, axis=-1, keepdims=True)) for row in rows]
    start, goal = (unit(row) for row in rows)
    angle, across = _turn(start, goal)
    turned = xp.cos(w * angle) * start + xp.sin(w * angle) * across
    return (((1 - w) * lengths[0] + w * lengths[1]) * turned).reshape(a.shape)


def spherical_mean(vectors: Sequence[Array], weights: Sequence[float] | Array) -> Array:
    """The weighted mean on the sphere of several rows; of two it is `slerp`.

    The point from which the weighted turns to all of them add up to nothing (the Karcher mean),
    found by repetition; its length is the weighted mean of theirs.

    Args:
      vectors: K arrays float [B, ...], equal shapes.
      weights: K numbers, not negative, that need not add up to 1; may be traced.

    Raises:
      ConfigError: shapes differ or are not of rows; weights that are not K, finite, at least 0 and
        more than 0 in sum (not looked at where traced).
    """
    rows = _rows(vectors, weights)
    xp = _library(rows[0])
    if not isinstance(weights, jax.core.Tracer):
        given = np.asarray(weights, np.float64)
        if given.shape != (len(rows),) or not (np.isfinite(given) & (given >= 0)).all():
            raise errors.ConfigError(
                f"weights {given.tolist()}: expected {len(rows)} numbers of at least 0"
            )
        if not given.sum() > 0:
            raise errors.ConfigError(f"weights {given.tolist()}: expected one above 0")
    weights = xp.asarray(weights, rows[0].dtype)
    w = [weights[k] / weights.sum() for k in range(len(rows))]
    length = sum(
        w_k * xp.sqrt(xp.sum(row * row, axis=-1, keepdims=True)) for w_k, row in zip(w, rows)
    )
    units = [unit(row) for row in rows]

    # From a row whose weight may be 0, exact for two: the way there is one turn.
    def nearer(_, at):
        turns = [_turn(at, one) for one in units]
        step = sum(w_k * angle * across for w_k, (angle, across) in zip(w, turns))
        size = xp.sqrt(xp.maximum(xp.sum(step * step, axis=-1, keepdims=True), 1e-30))
        return unit(xp.cos(size) * at + xp.sin(size) * step / size)

    if xp is jnp:
        at = jax.lax.fori_loop(0, REPEATS, nearer, units[0])
    else:
        at = functools.reduce(lambda at, k: nearer(k, at), range(REPEATS), units[0])
    return (length * at).reshape(vectors[0].shape)


def _rows(arrays: Sequence[Array], weight) -> list[Array]:
    """Arrays [B, ...] as [B, N], of JAX where one of them or the weight is."""
    shapes = [np.shape(array) for array in arrays]
    if len(set(shapes)) != 1 or len(shapes[0]) < 2:
        raise errors.ConfigError(
            f"interpolation between arrays of shapes {', '.join(map(str, shapes)) or 'none'}: "
            "expected rows [B, ...], the same of each"
        )
    xp = jnp if any(isinstance(one, jax.Array) for one in (*arrays, weight)) else np
    return [xp.asarray(array).reshape(shapes[0][0], -1) for array in arrays]


def _turn(start: Array, goal: Array) -> tuple[Array, Array]:
    """(angle [B, 1] between unit rows, unit direction [B, N] at `start` that leads to `goal`)."""
    xp = _library(start)
    norm = lambda v: xp.sqrt(xp.sum(v * v, axis=-1, keepdims=True))
    # By chords: an angle from its cosine alone would lose half its digits near 0 and pi.
    angle = 2 * xp.arctan2(norm(goal - start), norm(goal + start))
    across = goal - xp.sum(goal * start, axis=-1, keepdims=True) * start
    # Without a direction of its own (opposite): that of the axis which start is farthest from.
    axis = xp.arange(start.shape[-1])[None] == xp.argmin(xp.abs(start), axis=-1)[:, None]
    other = axis - xp.sum(axis * start, axis=-1, keepdims=True) * start
    opposite = norm(goal + start) < 1e-5
    return angle, unit(xp.where(opposite, other, across))
