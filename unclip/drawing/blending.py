"""On the way from one vector to others, along the sphere (section 3.2 of the paper)."""

from collections.abc import Sequence

import numpy as np

_PARALLEL = 1e-6  # sin of the angle below which directions are one, or opposite
_ROUNDS = 50  # a mean of directions within a quarter turn is found in about 20


def slerp(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    """Spherical interpolation between rows: the direction turns evenly, the length changes evenly.

    A row is interpolated whole. Opposite directions, between which no way is shorter than others,
    go round by one fixed direction.

    Args:
      a, b: float [B, ...], equal shapes.
      weight: 0 gives a, 1 gives b.

    Returns:
      float32, the shape of a.
    """
    return spherical_mean([a, b], [1 - weight, weight])


def spherical_mean(vectors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The weighted mean on the sphere of several rows; of two it is `slerp`.

    The point from which the weighted turns to all of them add up to nothing (the Karcher mean),
    found by repetition; its length is the weighted mean of theirs.

    Args:
      vectors: K arrays float [B, ...], equal shapes.
      weights: K numbers, not negative, of any positive sum.

    Returns:
      float32 [B, ...].
    """
    rows = np.stack([np.reshape(np.float64(v), (len(v), -1)) for v in vectors])
    share = (np.float64(weights) / np.sum(weights))[:, None, None]
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    units = rows / np.maximum(lengths, 1e-300)
    at = units[0]
    for _ in range(_ROUNDS):
        step = np.sum([w * _turn(at, one) for w, one in zip(share, units)], axis=0)
        size = np.linalg.norm(step, axis=-1, keepdims=True)
        at = np.cos(size) * at + np.sinc(size / np.pi) * step
        at /= np.maximum(np.linalg.norm(at, axis=-1, keepdims=True), 1e-300)
    return np.float32((share * lengths).sum(0) * at).reshape(np.shape(vectors[0]))


def _turn(start: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """The way from unit rows to others: a tangent at `start` as long as the angle between."""
    across = goal - np.sum(goal * start, axis=-1, keepdims=True) * start
    opposite = np.sum(goal * start, axis=-1, keepdims=True) < 0
    axis = np.eye(start.shape[-1])[np.abs(start).argmin(axis=-1)]
    axis = axis - np.sum(axis * start, axis=-1, keepdims=True) * start
    size = np.linalg.norm(across, axis=-1, keepdims=True)
    across = np.where((size < _PARALLEL) & opposite, axis, across)
    size = np.linalg.norm(across, axis=-1, keepdims=True)
    # Not arccos of the product, which loses half of its digits near 0 and pi.
    apart = np.linalg.norm(start - goal, axis=-1, keepdims=True)
    angle = 2 * np.arctan2(apart, np.linalg.norm(start + goal, axis=-1, keepdims=True))
    return angle / np.maximum(size, 1e-300) * across
