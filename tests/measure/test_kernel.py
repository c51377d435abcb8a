"""KID and CMMD against plain loops and closed forms."""

import numpy as np
import pytest

from unclip.errors import ConfigError, NumericsError
from unclip.measure import kernel


def loops(fake, real, subsets, size, seed=2020):
    """KID as defined: one pair at a time, the pairs of a row with itself left out."""
    generator = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = fake[generator.choice(len(fake), size, replace=False)]
        y = real[generator.choice(len(real), size, replace=False)]
        k = lambda a, b: (np.dot(a, b) / len(a) + 1) ** 3
        pairs = [(i, j) for i in range(size) for j in range(size)]
        within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j)
        between = sum(k(x[i], y[j]) for i, j in pairs)
        values.append(within / (size * (size - 1)) - 2 * between / size**2)
    return np.mean(values), np.std(values)


@pytest.mark.parametrize("block", [3, 512])
@pytest.mark.parametrize("subsets, size", [(6, 8), (1, 4)], ids=["all pairs", "by subset"])
def test_kid_equals_its_definition(monkeypatch, subsets, size, block):
    monkeypatch.setattr(kernel, "BLOCK", block)
    rng = np.random.default_rng(0)
    fake, real = rng.normal(size=(13, 5)), rng.normal(size=(11, 5)) + 0.3
    wanted = loops(fake, real, subsets, size)
    assert kernel.kid(fake, real, subsets, size) == pytest.approx(wanted, rel=1e-11)
    assert kernel.kid(fake, real, subsets, size, seed=1) != pytest.approx(wanted, rel=1e-3)
    swapped = kernel.kid(real, fake, subsets, size)
    assert swapped != pytest.approx(wanted, rel=1e-6)  # fake rows are drawn first


def test_kid_is_unbiased():
    rng = np.random.default_rng(0)
    means = [
        kernel.kid(rng.normal(size=(20, 4)), rng.normal(size=(20, 4)), subsets=1, size=20)[0]
        for _ in range(400)
    ]
    assert abs(np.mean(means)) < 4 * np.std(means) / 20
    assert min(means) < 0 < max(means)


def test_cmmd_equals_its_definition(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 4)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 6)), rng.normal(size=(7, 6)) + 0.4
    u, v = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))

    def mean(a, b, sigma):
        return np.mean([[np.exp(-((p - q) @ (p - q)) / (2 * sigma**2)) for q in b] for p in a])

    for sigma in (0.5, 10):
        wanted = 1000 * (mean(u, u, sigma) + mean(v, v, sigma) - 2 * mean(u, v, sigma))
        assert kernel.cmmd(x, y, sigma=sigma) == pytest.approx(wanted, rel=1e-9)
    assert kernel.cmmd(x, 3 * y) == pytest.approx(kernel.cmmd(x, y), rel=1e-12)
    assert kernel.cmmd(y, x) == pytest.approx(kernel.cmmd(x, y), rel=1e-12)
    assert kernel.cmmd(x, x) == pytest.approx(0, abs=1e-12)


def test_cmmd_of_opposite_points():
    """Each set is one direction: 2 (1 − exp(−|x − y|² / 200)), |x − y| = 2."""
    x, y = np.tile([1.0, 0], (3, 1)), np.tile([-2.0, 0], (5, 1))
    assert kernel.cmmd(x, y) == pytest.approx(2000 * (1 - np.exp(-4 / 200)), rel=1e-12)


def test_bad_input():
    rows = np.random.default_rng(0).normal(size=(10, 3))
    with pytest.raises(ConfigError, match="10 fake features given; at least 1000"):
        kernel.kid(rows, rows)
    with pytest.raises(ConfigError, match="9 real features given; at least 10"):
        kernel.kid(rows, rows[:9], size=10)
    with pytest.raises(ConfigError, match="size 1"):
        kernel.kid(rows, rows, size=1)
    broken = rows.copy()
    broken[[3, 8], 0] = np.nan
    with pytest.raises(NumericsError, match=r"2 of 10 real features .* row 3"):
        kernel.kid(rows, broken, size=5)
    with pytest.raises(NumericsError, match="row 3"):
        kernel.cmmd(rows, broken)
    for measure in (kernel.cmmd, lambda a, b: kernel.kid(a, b, size=5)):
        with pytest.raises(ConfigError, match="3 and 2 wide"):
            measure(rows, rows[:, :2])
        with pytest.raises(ConfigError, match=r"shape \(10,\)"):
            measure(rows[:, 0], rows)
    with pytest.raises(NumericsError, match="row 2 of the second embeddings is all zero"):
        zero = rows.copy()
        zero[2] = 0
        kernel.cmmd(rows, zero)
    with pytest.raises(ConfigError, match="sigma"):
        kernel.cmmd(rows, rows, sigma=0)
    with pytest.raises(ConfigError, match="1 first embeddings"):
        kernel.cmmd(rows[:1], rows)
