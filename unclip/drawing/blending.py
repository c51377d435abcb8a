"""On the way from one vector to another, along the sphere (section 3.2 of the paper)."""

from collections.abc import Sequence

import numpy as np

_PARALLEL = 1e-6  # sin of the angle below which directions are one, or opposite
_ROUNDS = 100  # a mean of directions within a quarter turn is found in about 20


def slerp(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    """Spherical interpolation over the whole of two arrays, as if each were one vector.

    The direction turns by an even angle, the length goes evenly from one's to the other's. Opposite
    directions, between which no arc is the shortest, turn through a coordinate axis; arrays of
    zeros are joined by a straight line.

    Args:
      a, b: float of one shape.
      weight: 0 gives a, 1 gives b, exactly.

    Returns:
      float32, the shape of a.
    """
    if weight in (0, 1):
        return np.float32(b if weight else a)
    shape, a, b = np.shape(a), np.ravel(np.float64(a)), np.ravel(np.float64(b))
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    if not all(lengths):
        return np.float32((1 - weight) * a + weight * b).reshape(shape)
    a, b = a / lengths[0], b / lengths[1]
    across = b - (a @ b) * a
    if np.linalg.norm(across) < _PARALLEL:
        if a @ b > 0:
            across = np.zeros_like(a)
        else:
            axis = np.eye(1, len(a), np.abs(a).argmin())[0]
            across = axis - (a @ axis) * a
    # Not arccos of the product, which loses half of its digits near 0 and pi.
    angle = 2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b))
    across = across / max(np.linalg.norm(across), 1e-300)
    turned = np.cos(weight * angle) * a + np.sin(weight * angle) * across
    return np.float32(((1 - weight) * lengths[0] + weight * lengths[1]) * turned).reshape(shape)


def blend(arrays: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Several arrays of one shape by weight: the mean of their directions on the sphere, the one
    from which the weighted arcs to all of them add up to nothing; its length is the weighted mean
    of theirs. Of two arrays it is `slerp`.

    Args:
      weights: one each, none negative, of any positive sum. Those of weight 0 play no part.

    Returns:
      float32, the shape of each.
    """
    some = [(array, weight) for array, weight in zip(arrays, weights) if weight]
    arrays, weights = zip(*some)
    if len(some) < 3:
        return slerp(arrays[0], arrays[-1], weights[-1] / sum(weights) if some[1:] else 0)
    rows = np.stack([np.ravel(np.float64(array)) for array in arrays])
    share = np.float64(weights) / sum(weights)
    lengths = np.linalg.norm(rows, axis=1)
    units = rows / np.maximum(lengths, 1e-300)[:, None]
    mean = share @ units
    if np.linalg.norm(mean) < _PARALLEL:  # they cancel: any direction is as good
        mean = units[0]
    mean = mean / max(np.linalg.norm(mean), 1e-300)
    for _ in range(_ROUNDS):  # arcs from the mean, averaged in its tangent plane
        along = units @ mean
        across = units - along[:, None] * mean
        width = np.linalg.norm(across, axis=1)
        arcs = np.arctan2(width, along) / np.maximum(width, 1e-300)
        step = (share * arcs) @ across
        size = np.linalg.norm(step)
        if size < 1e-12:
            break
        mean = np.cos(size) * mean + np.sin(size) / size * step
        mean /= np.linalg.norm(mean)
    return np.float32(share @ lengths * mean).reshape(np.shape(arrays[0]))
