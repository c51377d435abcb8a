"""Kernel distances between two sets of pictures: KID and CMMD.

Neither assumes that features are Gaussian, as FID does, and KID is unbiased at any N, as FID is
not. KID (1801.01401) uses Inception's pool3 and a cubic kernel; CMMD (2401.09603) uses CLIP's image
embeddings and a Gaussian one. Sums are float64.
"""

import numpy as np

from unclip.errors import ConfigError
from unclip.measure.rows import checked, checked_unit, same_width

BLOCK = 512  # rows of a kernel matrix held at a time


def kid(
    fake: np.ndarray,
    real: np.ndarray,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """The kernel Inception distance: unbiased MMD² under k(x, y) = (x·y / D + 1)³.

    Subsets are torch-fidelity's: from one `RandomState(seed)`, first the fake rows of a subset and
    then its real ones, without replacement. The mean over subsets may be slightly negative.

    Args:
      fake: [N, D] features of its first input, the generated pictures; real: [M, D].
      subsets: how many; size: rows of each side in each.

    Returns:
      (mean, standard deviation) over the subsets; times 1000 in many papers.

    Raises:
      ConfigError: N or M below `size` (as in torch-fidelity, which also requires a lower `size`
        then), fewer than 1 subset or 2 rows in one, widths that differ.
      NumericsError: NaN or infinite features.
    """
    if subsets < 1 or size < 2:
        raise ConfigError(f"subsets is {subsets} and size {size}; expected at least 1 and 2")
    why = f"for subsets of {size}: lower the size of the subsets or give more pictures"
    fake = checked(fake, "fake features", least=size, why=why)
    real = checked(real, "real features", least=size, why=why)
    same_width(fake, real, "fake and real features")
    fake, real = fake.astype(np.float64, copy=False), real.astype(np.float64, copy=False)
    generator = np.random.RandomState(seed)
    picks = [
        [generator.choice(len(rows), size, replace=False) for rows in (fake, real)]
        for _ in range(subsets)
    ]
    if (len(fake) + len(real)) ** 2 <= subsets * (2 * size) ** 2:
        # All pairs once: a subset is then a row of zeros and ones on either side of their kernel.
        drawn_fake, drawn_real = np.zeros((subsets, len(fake))), np.zeros((subsets, len(real)))
        for i, (of_fake, of_real) in enumerate(picks):
            drawn_fake[i, of_fake] = drawn_real[i, of_real] = 1
        values = _unbiased(fake, real, drawn_fake, drawn_real)
    else:
        whole = np.ones((1, size))
        values = [_unbiased(fake[f], real[r], whole, whole)[0] for f, r in picks]
    return float(np.mean(values)), float(np.std(values))


def cmmd(a: np.ndarray, b: np.ndarray, sigma: float = 10, scale: float = 1000) -> float:
    """CMMD: the biased MMD² (V-statistic) under exp(−|x − y|² / 2σ²), times `scale`.

    Rows are normalised to length 1 here, as CLIP's embeddings are in the published code. The
    diagonal is included, so that equal sets give 0 and small sets a value that is too large.

    Args:
      a: [N, D] image embeddings; b: [M, D]; the order does not matter.
      sigma: the kernel's width; scale: for legibility only.

    Returns:
      the distance, at least 0.

    Raises:
      ConfigError: fewer than 2 rows a side, widths that differ, a sigma that is not positive.
      NumericsError: NaN, infinite or all-zero embeddings.
    """
    if not sigma > 0:
        raise ConfigError(f"sigma is {sigma}; expected a positive width of the kernel")
    a, b = checked_unit(a, "first embeddings"), checked_unit(b, "second embeddings")
    same_width(a, b, "the embeddings")

    def gaussian(x, y):
        # |x − y|² = 2 − 2 x·y. The constants cancel in the distance, so leaving them out here loses
        # no digits.
        return np.expm1((x @ y.T - 1) / sigma**2)

    one_a, one_b = np.ones((1, len(a))), np.ones((1, len(b)))
    within = _within(a, one_a, gaussian) / len(a) ** 2 + _within(b, one_b, gaussian) / len(b) ** 2
    between = _between(a, b, one_a, one_b, gaussian) / (len(a) * len(b))
    return max(float(scale * (within - 2 * between)[0]), 0.0)


def _cubic(x, y):
    product = x @ y.T / x.shape[1] + 1
    return product * product * product


def _unbiased(fake, real, drawn_fake, drawn_real):
    """KID of every subset [S]; `drawn` [S, N] and [S, M] hold 1 where a subset has the row."""
    size = drawn_fake[0].sum()
    within = 0
    for rows, drawn in ((fake, drawn_fake), (real, drawn_real)):
        diagonal = (np.einsum("nd,nd->n", rows, rows) / rows.shape[1] + 1) ** 3
        within += _within(rows, drawn, _cubic) - drawn @ diagonal
    between = _between(fake, real, drawn_fake, drawn_real, _cubic)
    return within / (size * (size - 1)) - 2 * between / size**2


def _between(x, y, weights_x, weights_y, kernel):
    """Σᵢⱼ wᵢ k(xᵢ, yⱼ) vⱼ for every row of the weights: [S]."""
    total = np.zeros(len(weights_x))
    for at in range(0, len(x), BLOCK):
        part = weights_x[:, at : at + BLOCK] @ kernel(x[at : at + BLOCK], y)
        total += np.einsum("sm,sm->s", part, weights_y)
    return total


def _within(x, weights, kernel):
    """Σᵢⱼ wᵢ k(xᵢ, xⱼ) wⱼ for every row of the weights: [S]; each pair is computed once."""
    total = np.zeros(len(weights))
    for at in range(0, len(x), BLOCK):
        rows = slice(at, at + BLOCK)
        part = weights[:, rows] @ kernel(x[rows], x[at:])
        twice = weights[:, at:] * 2
        twice[:, :BLOCK] /= 2  # the square on the diagonal already has both orders
        total += np.einsum("sn,sn->s", part, twice)
    return total
