"""Precision, recall, density and coverage on hand-made sets and against plain loops."""

import numpy as np
import pytest

from unclip.errors import ConfigError, NumericsError
from unclip.measure import neighbours


def points(*values):
    return np.array(values, float)[:, None]


def balls(rows, k):
    """Each row's distance to its k-th nearest other row, by sorting."""
    reach = []
    for i, row in enumerate(rows):
        others = np.delete(rows, i, axis=0)
        reach.append(np.sort(np.linalg.norm(others - row, axis=1))[k - 1])
    return np.array(reach)


def by_loops(real, fake, k):
    distance = np.array([[np.linalg.norm(a - b) for b in fake] for a in real])
    of_real, of_fake = balls(real, k), balls(fake, k)
    precision = np.mean([any(distance[:, j] <= of_real) for j in range(len(fake))])
    recall = np.mean([any(distance[i] <= of_fake) for i in range(len(real))])
    density = np.mean([sum(distance[:, j] < of_real) for j in range(len(fake))]) / k
    coverage = np.mean([distance[i].min() < of_real[i] for i in range(len(real))])
    return precision, recall, density, coverage


def test_on_a_line():
    """Real 0 1 2 10 with k = 1: radii 1 1 1 8; fake 3, 30 and 32: radii 27 2 2."""
    real, fake = points(0, 1, 2, 10), points(3, 30, 32)
    precision, recall, f = neighbours.precision_recall(real, fake, k=1)
    assert precision == pytest.approx(1 / 3)  # 3 lies on the ball of 2 and inside that of 10
    assert recall == 1  # the fake point 3 reaches all
    assert f == pytest.approx(2 * (1 / 3) / (4 / 3))
    density, coverage = neighbours.density_coverage(real, fake, k=1)
    assert density == pytest.approx(1 / 3)  # surfaces are outside: only the ball of 10 has 3
    assert coverage == pytest.approx(1 / 4)


@pytest.mark.parametrize("tile", [4, 512])
def test_equal_plain_loops(monkeypatch, tile):
    monkeypatch.setattr(neighbours, "TILE", tile)
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(23, 3)) + 50, 0.7 * rng.normal(size=(17, 3)) + 50.4
    for k in (1, 3, 5):
        precision, recall, density, coverage = by_loops(real, fake, k)
        measured = neighbours.precision_recall(real, fake, k)
        assert measured[:2] == pytest.approx((precision, recall), abs=1e-15)
        assert neighbours.density_coverage(real, fake, k) == pytest.approx((density, coverage))
        assert precision != recall  # or swapped sides would pass


def test_sides_are_not_swapped():
    """All fake pictures are good and alike: precision 1, little recall."""
    rng = np.random.default_rng(1)
    real = rng.normal(size=(60, 2))
    fake = real[0] + 1e-3 * rng.normal(size=(40, 2))
    precision, recall, _ = neighbours.precision_recall(real, fake)
    assert precision == 1 and recall < 0.05
    assert neighbours.precision_recall(fake, real)[:2] == (recall, precision)


def test_copies_of_the_real_set():
    """Ties everywhere: exact copies, and a grid where all neighbours are equally far."""
    grid = np.stack(np.meshgrid(*[np.arange(4.0)] * 3), -1).reshape(-1, 3) + 0.1
    for real in (grid, np.tile(grid[:5], (4, 1))):
        assert neighbours.precision_recall(real, real.copy())[:2] == (1, 1)
    # On the grid every ball of k = 3 holds its own copy alone inside, the rest on its surface.
    assert neighbours.density_coverage(grid, grid.copy(), k=3) == (pytest.approx(1 / 3), 1)
    # Four copies of each: with k = 3 the balls have no size and nothing lies inside.
    copies = np.tile(np.random.default_rng(0).normal(size=(5, 8)) + 30, (4, 1))
    assert neighbours.density_coverage(copies, copies.copy(), k=3) == (0, 0)


def test_float32_and_shift_change_nothing():
    rng = np.random.default_rng(2)
    real, fake = (rng.normal(size=(n, 6)).astype(np.float32) for n in (40, 30))
    wanted = neighbours.precision_recall(real, fake)
    assert neighbours.precision_recall(real.astype(float), fake.astype(float)) == wanted
    far = [x.astype(float) + 1e4 for x in (real, fake)]
    assert neighbours.precision_recall(*far) == wanted


def test_bad_input():
    rows = np.random.default_rng(0).normal(size=(6, 3))
    with pytest.raises(ConfigError, match=r"3 real features given; at least 4 .* 3 neighbours"):
        neighbours.precision_recall(rows[:3], rows)
    with pytest.raises(ConfigError, match="3 fake features given; at least 4"):
        neighbours.precision_recall(rows, rows[:3])
    with pytest.raises(ConfigError, match="5 real features given; at least 6"):
        neighbours.density_coverage(rows[:5], rows)
    with pytest.raises(ConfigError, match="1 fake features"):
        neighbours.density_coverage(rows, rows[:1])
    neighbours.density_coverage(rows, rows[:2])
    for measure in (neighbours.precision_recall, neighbours.density_coverage):
        with pytest.raises(ConfigError, match="k is 0"):
            measure(rows, rows, k=0)
        with pytest.raises(ConfigError, match="3 and 2 wide"):
            measure(rows, rows[:, :2])
        with pytest.raises(NumericsError, match=r"1 of 6 fake features .* row 5"):
            broken = rows.copy()
            broken[5, 2] = np.nan
            measure(rows, broken)
