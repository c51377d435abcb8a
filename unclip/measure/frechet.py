"""The Fréchet distance between two sets of pictures: FID, sFID, and the same on other features.

FID is this distance on Inception's pool3 features (1706.08500), sFID on its spatial ones
(2103.03841); on features of CLIP or DINOv2 the formula is the same but the name must differ.

    d = |m₁ − m₂|² + tr S₁ + tr S₂ − 2 tr (S₁^½ S₂ S₁^½)^½

Everything is float64 and roots are taken of symmetric matrices only, so there are no complex
numbers, and no small multiple of the identity is added to a singular product.
"""

from typing import TYPE_CHECKING

import numpy as np

from unclip.errors import ConfigError, NumericsError
from unclip.measure.rows import checked

if TYPE_CHECKING:
    from unclip.files.moments import Statistics


def distance(a: "Statistics", b: "Statistics") -> float:
    """The Fréchet distance between the Gaussians with two sets' means and covariances.

    It is biased upwards by about c / N for N pictures a side: compare only values of the same N.

    Args:
      a, b: anything with `mean` [D] and `covariance` [D, D], float64; the order does not matter.

    Returns:
      the distance in squared units of the features, at least 0.

    Raises:
      ConfigError: widths differ or the shapes are not [D] and [D, D].
      NumericsError: a mean or a covariance holds NaN or infinity.
    """
    mean_a, covariance_a = _gaussian(a, "first")
    mean_b, covariance_b = _gaussian(b, "second")
    if mean_a.shape != mean_b.shape:
        raise ConfigError(
            f"the statistics are {len(mean_a)} and {len(mean_b)} wide; "
            "both must come from the same extractor"
        )
    # The singular values of S₁^½ S₂^½ are the roots of the eigenvalues in question, but exact near
    # zero, where taking a root turns rounding of 1e-16 into 1e-8, for each missing rank if N < D.
    product = _root(covariance_a).T @ _root(covariance_b)
    mixed = np.linalg.svd(product, compute_uv=False).sum()
    traces = np.trace(covariance_a) + np.trace(covariance_b)
    return max(float(np.sum((mean_a - mean_b) ** 2) + traces - 2 * mixed), 0.0)


def infinity(
    rows_fake: np.ndarray, real: "Statistics", points: int = 15, seed: int = 0
) -> tuple[float, float]:
    """The distance that infinitely many fake pictures would have: FID∞ of 1911.07023.

    The distance is measured on `points` random subsets, of equally spaced sizes from a tenth of
    the rows (at most 5000) to all of them, and a line in 1 / size is fitted and read at 0. Sizes,
    draws and the fit are those of dgm-eval, with a seed. The bias of the real side remains.

    Args:
      rows_fake: [N, D] features, N at least 3; real: the reference's statistics of width D.

    Returns:
      (value at 1/N = 0, slope); it may be slightly negative. Slope / N is the bias at N.

    Raises:
      ConfigError: fewer than 3 rows or 2 points, widths that differ.
      NumericsError: NaN or infinite features.
    """
    rows_fake = checked(rows_fake, "fake features", least=3, why="for an extrapolation in N")
    if points < 2:
        raise ConfigError(f"points is {points}; a line needs at least 2")
    count = len(rows_fake)
    smallest = min(5000, max(count // 10, 2))
    sizes = np.linspace(smallest, count, points).astype(np.int64)
    against = _Against(rows_fake, real)
    generator = np.random.default_rng(seed)
    distances = []
    for size in sizes:
        weights = np.zeros(count)
        weights[generator.choice(count, size, replace=False)] = 1
        distances.append(against.distance(weights))
    inverse = 1 / sizes
    spread = inverse - inverse.mean()
    slope = float(spread @ distances / (spread @ spread))
    return float(np.mean(distances) - slope * inverse.mean()), slope


def bootstrap(
    rows_fake: np.ndarray,
    real: "Statistics",
    resamples: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """A confidence interval for the distance at this number of fake pictures.

    It says how far another draw of N fake pictures may move the number, and is meant for comparing
    two models at the same N. It covers the expected distance *at N*, whose bias of about c / N it
    does not remove: that bias exceeds the noise unless N is many times the width D (see
    `infinity`). The reference is taken as fixed. Where the two distributions are equal the
    distance is nothing but bias, and the interval is only rough.

    Drawing rows again with replacement adds the bias a second time, so that plain percentiles lie
    too high and often miss the number itself. The resamples' own mean is therefore taken out, and
    their spread is reflected around the distance (the centred, basic bootstrap).

    Args:
      rows_fake: [N, D] features; real: the reference's statistics of width D.
      resamples: how many times N rows are drawn again; each costs one eigen-decomposition.
      seed: of the draws; level: coverage, in (0, 1).

    Returns:
      (low, high), low at least 0.

    Raises:
      ConfigError: fewer than 2 rows, fewer than 20 resamples, a level outside (0, 1), or widths
        that differ.
      NumericsError: NaN or infinite features.
    """
    rows_fake = checked(rows_fake, "fake features")
    if resamples < 20:
        raise ConfigError(f"resamples is {resamples}; quantiles need at least 20")
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}; expected a fraction between 0 and 1")
    count = len(rows_fake)
    against = _Against(rows_fake, real)
    generator = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        drawn = generator.integers(0, count, count)
        draws[i] = against.distance(np.bincount(drawn, minlength=count))
    tail = (1 - level) / 2
    above, below = np.quantile(draws - draws.mean(), (1 - tail, tail))
    measured = against.distance(np.ones(count))
    return float(max(measured - above, 0.0)), float(measured - below)


class _Against:
    """The distance from weighted rows [N, D] to one Gaussian, for many choices of weights.

    With R Rᵀ = S_real and Y = (X − mean) R, the mixed term of weighted rows needs only YᵀwY: one
    product and one eigen-decomposition per call. Holds two [N, D] float64 matrices.
    """

    def __init__(self, rows: np.ndarray, real: "Statistics"):
        mean, covariance = _gaussian(real, "reference")
        if rows.shape[1] != len(mean):
            raise ConfigError(
                f"fake features are {rows.shape[1]} wide and the reference {len(mean)}; "
                "both must come from the same extractor"
            )
        centre = rows.mean(axis=0, dtype=np.float64)
        self.rows = rows - centre  # centred once: no cancellation later
        self.squares = np.einsum("nd,nd->n", self.rows, self.rows)
        self.offset = centre - mean
        self.trace = np.trace(covariance)
        self.mixed = self.rows @ _root(covariance)

    def distance(self, weights: np.ndarray) -> float:
        """The distance of the set in which row i occurs weights[i] times; [N], sum at least 2."""
        size = weights.sum()
        shift = weights @ self.rows / size
        trace = (weights @ self.squares - size * shift @ shift) / (size - 1)
        used = weights > 0
        # Rows scaled by √w give a symmetric product, which BLAS does at half the cost.
        scaled = self.mixed[used]
        scaled -= weights[used] @ scaled / size
        scaled *= np.sqrt(weights[used])[:, None]
        few = len(scaled) < scaled.shape[1]
        gram = scaled @ scaled.T if few else scaled.T @ scaled  # the same non-zero eigenvalues
        # Negative values are rounding and count as 0; singular values would be more exact, but take
        # three times as long.
        values = np.maximum(np.linalg.eigvalsh(gram), 0.0)
        mixed = np.sqrt(values).sum() / np.sqrt(size - 1)
        mean_term = np.sum((self.offset + shift) ** 2)
        return max(float(mean_term + trace + self.trace - 2 * mixed), 0.0)


def _gaussian(statistics: "Statistics", which: str) -> tuple[np.ndarray, np.ndarray]:
    mean = np.asarray(statistics.mean, np.float64)
    covariance = np.asarray(statistics.covariance, np.float64)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ConfigError(
            f"the {which} statistics have a mean of shape {mean.shape} and a covariance of shape "
            f"{covariance.shape}; expected [D] and [D, D]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise NumericsError(f"the {which} statistics hold NaN or infinity")
    return mean, covariance


def _root(covariance: np.ndarray) -> np.ndarray:
    """R [D, r] with R Rᵀ = covariance, r its numerical rank."""
    try:
        return np.linalg.cholesky(covariance)  # ten times as fast, where the rank is full
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
    # Rounding of zero eigenvalues, of either sign, would be enlarged by the root.
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])
