"""Precision and recall, density and coverage: fidelity and diversity measured by neighbours.

A set's manifold is the union of the balls around its rows that reach the k-th nearest other row.
Precision and recall: 1904.06991. Density and coverage: 2002.09797. All depend on the features'
network, which is part of the metric's name.

Distances are float64, in tiles. Rounding must not decide a comparison: squared distances within
1e-9 of each other count as equal, and rows within a millionth of their lengths as the same. The
reference tools compare float32 distances, where a near-tie may fall on either side.
"""

from collections.abc import Iterator

import numpy as np

from unclip.errors import ConfigError
from unclip.measure.rows import checked, same_width

TILE = 1024  # rows of either side whose distances are held at a time
TIE = 1e-9
SAME = 1e-12


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float, float]:
    """Improved precision and recall, as torch-fidelity 0.4.0 and OpenAI's evaluator define them.

    Precision is the share of fake rows inside the ball of some real row; recall the share of real
    rows inside the ball of some fake row. A row on a ball's surface is inside.

    Args:
      real: [M, D] reference features (torch-fidelity's second input); fake: [N, D] (its first).
      k: the neighbour that a ball reaches; a row is not its own neighbour.

    Returns:
      (precision, recall, F-score), each in [0, 1].

    Raises:
      ConfigError: fewer than k + 1 rows, k below 1, widths that differ.
      NumericsError: NaN or infinite features.
    """
    real, fake = _prepared(real, fake, k)
    within_real, within_fake = _reach(real, k, closed=True), _reach(fake, k, closed=True)
    precise, recalled = np.zeros(len(fake), bool), np.zeros(len(real), bool)
    for of_real, of_fake, squared in _distances(real, fake):
        precise[of_fake] |= (squared <= within_real[of_real, None]).any(axis=0)
        recalled[of_real] |= (squared <= within_fake[of_fake]).any(axis=1)
    precision, recall = float(precise.mean()), float(recalled.mean())
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-5)


def density_coverage(real: np.ndarray, fake: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density and coverage, as prdc defines them.

    Density is how many real balls a fake row lies in on average, over k; it can exceed 1. Coverage
    is the share of real balls with a fake row inside. A row on a ball's surface is outside.

    Args:
      real: [M, D] reference features; fake: [N, D].
      k: the neighbour that a real row's ball reaches (prdc's nearest_k).

    Returns:
      (density, coverage).

    Raises:
      ConfigError: fewer than k + 1 real or 2 fake rows, k below 1, widths that differ.
      NumericsError: NaN or infinite features.
    """
    real, fake = _prepared(real, fake, k, least_fake=2)
    within = _reach(real, k, closed=False)
    inside = np.zeros(len(real), np.int64)
    for of_real, _, squared in _distances(real, fake):
        inside[of_real] += np.count_nonzero(squared < within[of_real, None], axis=1)
    return float(inside.sum() / (k * len(fake))), float((inside > 0).mean())


def _prepared(real, fake, k, least_fake=None):
    """Both sets as `_raised` around the real mean, which keeps distances and loses fewer digits."""
    if k < 1:
        raise ConfigError(f"k is {k}; the nearest other row is k = 1")
    why = f"for {k} neighbours each"
    real = checked(real, "real features", least=k + 1, why=why)
    fake = checked(fake, "fake features", least=least_fake or k + 1, why="" if least_fake else why)
    same_width(real, fake, "real and fake features")
    centre = real.mean(axis=0, dtype=np.float64)
    return _raised(real, centre), _raised(fake, centre)


def _raised(rows, centre):
    """[N, D + 2]: x − centre, its square and 1; see `_against`."""
    raised = np.ones((len(rows), rows.shape[1] + 2))
    x = np.subtract(rows, centre, out=raised[:, :-2])
    np.einsum("nd,nd->n", x, x, out=raised[:, -2])
    return raised


def _against(raised):
    """[N, D + 2]: −2 x, 1 and the square, whose product with `_raised` y is |x − y|²."""
    return np.concatenate([-2 * raised[:, :-2], raised[:, -1:], raised[:, -2:-1]], axis=1)


def _distances(x, y) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """(rows of x, rows of y, squared distances between them) tile by tile; only j ≥ i if x is y."""
    for i in range(0, len(x), TILE):
        rows = slice(i, min(i + TILE, len(x)))
        left = _against(x[rows])
        for j in range(i if x is y else 0, len(y), TILE):
            columns = slice(j, min(j + TILE, len(y)))
            yield rows, columns, left @ y[columns].T


def _reach(x, k, *, closed):
    """The squared radius [N] of row i's ball: distances up to it (closed) or below it are inside.

    It is the squared distance of the k-th nearest other row, moved by its possible rounding.
    """
    nearest = np.full((len(x), k), np.inf)
    for rows, columns, squared in _distances(x, x):
        if rows == columns:
            np.fill_diagonal(squared, np.inf)  # not one's own neighbour
        else:
            _keep_smallest(nearest[columns], squared.T)
        _keep_smallest(nearest[rows], squared)
    reach = np.maximum(nearest.max(axis=1), 0)
    slack = TIE * reach + SAME * x[:, -2]
    return reach + slack if closed else reach - slack


def _keep_smallest(nearest, found):
    """Puts into `nearest` [n, k], in place, the k smallest of it and `found` [n, m], by row."""
    better = found.min(axis=1) < nearest.max(axis=1)
    both = np.concatenate([nearest[better], found[better]], axis=1)
    k = nearest.shape[1]
    nearest[better] = np.partition(both, k - 1, axis=1)[:, :k]
