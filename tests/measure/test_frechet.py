"""The Fréchet distance against closed forms, scipy's matrix root and an exact low-rank formula."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg

from unclip.errors import ConfigError, NumericsError
from unclip.measure import frechet


def gaussian(mean, covariance):
    return SimpleNamespace(mean=np.asarray(mean, float), covariance=np.asarray(covariance, float))


def of(rows):
    return gaussian(rows.mean(axis=0), np.cov(rows, rowvar=False))


def graded(rng, count, width, decay):
    """Rows whose directions fade, as those of a network's features do."""
    return rng.normal(size=(count, width)) @ np.diag(np.exp(-np.arange(width) / decay))


def exact(x, y):
    """From rows alone: tr (S₁S₂)^½ is the nuclear norm of XYᵀ, exact at any rank."""
    centred_x, centred_y = x - x.mean(axis=0), y - y.mean(axis=0)
    scale = np.sqrt((len(x) - 1) * (len(y) - 1))
    mixed = scipy.linalg.svdvals(centred_x @ centred_y.T).sum() / scale
    traces = (centred_x**2).sum() / (len(x) - 1) + (centred_y**2).sum() / (len(y) - 1)
    return ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + traces - 2 * mixed


def test_closed_forms():
    eye = np.eye(3)
    a = gaussian([0, 0, 0], eye)
    assert frechet.distance(a, a) == 0
    assert frechet.distance(a, gaussian([3, 4, 0], eye)) == pytest.approx(25, rel=1e-14)
    # Axis-aligned Gaussians: the squared difference of the standard deviations.
    b = gaussian([0, 0, 0], np.diag([4.0, 9.0, 0.0]))
    assert frechet.distance(a, b) == pytest.approx(1 + 4 + 1, rel=1e-14)
    none = gaussian([0, 0, 0], np.zeros((3, 3)))
    assert frechet.distance(a, none) == pytest.approx(3, rel=1e-14)
    assert frechet.distance(none, none) == 0


def test_equals_scipys_matrix_root_at_full_rank():
    rng = np.random.default_rng(0)
    a, b = of(graded(rng, 400, 48, 20)), of(graded(rng, 300, 48, 15) + 0.1)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    wanted = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet.distance(a, b) == pytest.approx(wanted, rel=1e-10)
    assert frechet.distance(b, a) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("count, other", [(20, 30), (20, 200), (64, 64), (65, 65), (300, 200)])
def test_no_digits_are_lost_below_full_rank(count, other):
    """N below the width: roots of rounded zeros would already cost 1e-8 each."""
    rng = np.random.default_rng(count)
    x, y = graded(rng, count, 64, 9), graded(rng, other, 64, 9) + 0.05
    assert frechet.distance(of(x), of(y)) == pytest.approx(exact(x, y), rel=1e-10)
    assert frechet.distance(of(x), of(x)) == pytest.approx(0, abs=1e-9)


def test_infinity_removes_the_bias():
    rng = np.random.default_rng(0)
    width, count = 24, 1500
    real = gaussian(np.zeros(width), np.eye(width))
    fake = rng.normal(size=(count, width)) * 1.2 + 0.1
    truth = width * (0.1**2 + 0.2**2)
    measured = frechet.distance(of(fake), real)
    value, slope = frechet.infinity(fake, real, seed=3)
    assert measured - truth > 0.1  # what there is to remove
    assert abs(value - truth) < 0.5 * (measured - truth)
    assert value + slope / count == pytest.approx(measured, rel=0.05)
    assert frechet.infinity(fake.astype(np.float32), real, seed=3)[0] == pytest.approx(value, 1e-5)
    assert frechet.infinity(fake, real, seed=4)[0] != value


def test_infinity_fits_a_line_in_one_over_n():
    """The same sizes, draws and least squares, written out."""
    rng = np.random.default_rng(5)
    fake, real = graded(rng, 90, 8, 5) + 0.2, of(graded(rng, 70, 8, 5))
    sizes = np.linspace(9, 90, 15).astype(int)
    draws = np.random.default_rng(11)
    distances = [
        frechet.distance(of(fake[draws.choice(90, size, replace=False)]), real) for size in sizes
    ]
    slope, value = np.polyfit(1 / sizes, distances, 1)
    assert frechet.infinity(fake, real, seed=11) == pytest.approx((value, slope), rel=1e-6)


def test_bootstrap_covers_the_distance_at_this_count():
    """95 % intervals of many sets: they hold E[d_N]; plain percentiles, biased twice, do not."""
    width, count, resamples = 16, 100, 60
    real = gaussian(np.zeros(width), np.eye(width))
    rng = np.random.default_rng(0)

    def draw():
        return rng.normal(size=(count, width)) * 1.2 + 0.3

    expected = np.mean([frechet.distance(of(draw()), real) for _ in range(300)])
    covered, naive = [], []
    for seed in range(50):
        rows = draw()
        low, high = frechet.bootstrap(rows, real, resamples=resamples, seed=seed)
        covered.append(low <= expected <= high)
        again = [frechet.distance(of(rows[rng.integers(0, count, count)]), real) for _ in range(40)]
        naive.append(np.quantile(again, 0.025) <= expected <= np.quantile(again, 0.975))
    assert np.mean(covered) >= 0.86
    assert np.mean(naive) < 0.6


def test_bootstrap_covers_the_true_distance_of_many_pictures():
    """N much larger than the width: the bias is small beside the noise."""
    real = gaussian(np.zeros(2), np.eye(2))
    rng = np.random.default_rng(1)
    truth = 2 * (0.5**2 + 0.1**2)
    intervals = [
        frechet.bootstrap(rng.normal(size=(400, 2)) * 1.1 + 0.5, real, resamples=60, seed=seed)
        for seed in range(60)
    ]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert covered >= 0.85
    widths = [high - low for low, high in intervals]
    wide = frechet.bootstrap(rng.normal(size=(100, 2)) * 1.1 + 0.5, real, seed=0)
    assert 1.4 < (wide[1] - wide[0]) / np.mean(widths) < 2.9  # noise goes with √N


def test_bootstrap_repeats_by_seed_and_holds_the_number():
    rng = np.random.default_rng(2)
    fake, real = graded(rng, 60, 8, 5) + 0.2, of(graded(rng, 70, 8, 5))
    low, high = frechet.bootstrap(fake, real, seed=7)
    assert (low, high) == frechet.bootstrap(fake, real, seed=7)
    assert (low, high) != frechet.bootstrap(fake, real, seed=8)
    assert 0 <= low < frechet.distance(of(fake), real) < high
    inner = frechet.bootstrap(fake, real, seed=7, level=0.5)
    assert low < inner[0] < inner[1] < high


def test_bad_input():
    ok = gaussian(np.zeros(3), np.eye(3))
    rows = np.random.default_rng(0).normal(size=(9, 3))
    with pytest.raises(ConfigError, match="3 and 2 wide"):
        frechet.distance(ok, gaussian(np.zeros(2), np.eye(2)))
    with pytest.raises(ConfigError, match=r"covariance of shape \(2, 2\)"):
        frechet.distance(ok, gaussian(np.zeros(3), np.eye(2)))
    with pytest.raises(NumericsError, match="second statistics"):
        frechet.distance(ok, gaussian([0, np.nan, 0], np.eye(3)))
    for measure in (frechet.infinity, frechet.bootstrap):
        with pytest.raises(ConfigError, match="2 wide"):
            measure(rows[:, :2], ok)
        with pytest.raises(NumericsError, match="first is row 4"):
            broken = rows.copy()
            broken[4, 1] = np.inf
            measure(broken, ok)
        with pytest.raises(ConfigError, match="1 fake features given"):
            measure(rows[:1], ok)
    with pytest.raises(ConfigError, match="points"):
        frechet.infinity(rows, ok, points=1)
    with pytest.raises(ConfigError, match="resamples"):
        frechet.bootstrap(rows, ok, resamples=5)
    with pytest.raises(ConfigError, match="level"):
        frechet.bootstrap(rows, ok, level=95)
