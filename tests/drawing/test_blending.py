"""Spherical interpolation against what it must be by geometry."""

import numpy as np
import pytest

from unclip.drawing.blending import slerp, spherical_mean


def turned(angle, length=1.0):
    return np.float32([[np.cos(angle), np.sin(angle), 0]]) * length


def test_the_angle_grows_evenly_and_so_does_the_length():
    for weight in (0.0, 0.25, 0.5, 0.9, 1.0):
        found = slerp(turned(0.2, 2.0), turned(1.4, 4.0), weight)
        np.testing.assert_allclose(
            found, turned(0.2 + 1.2 * weight, 2 + 2 * weight), rtol=2e-6, atol=1e-6
        )
        assert found.dtype == np.float32


def test_a_picture_is_one_vector():
    """Half-way between noises is noise: a mean of rows would shrink it."""
    a, b = np.random.default_rng(0).standard_normal((2, 1, 16, 16, 3))
    assert slerp(a, b, 0.5).std() == pytest.approx((a.std() + b.std()) / 2, rel=1e-3)


@pytest.mark.parametrize("b", [[3, 0, 0], [-3, 0, 0], [1, 1e-9, 0], [-1, 1e-9, 0], [0, 0, 0]])
def test_parallel_opposite_and_zero_vectors_stay_finite(b):
    a = np.float32([[1, 0, 0]])
    for weight in (0.25, 0.5, 1.0):
        found = slerp(a, np.float32([b]), weight)
        assert np.isfinite(found).all()
        length = (1 - weight) + weight * np.linalg.norm(b)
        assert np.linalg.norm(found) == pytest.approx(length, rel=1e-5)
    if b[0] < 0:  # through the middle of a half circle, not through zero
        assert abs(slerp(a, np.float32([b]), 0.5)[0, 0]) < 1e-6 * abs(b[0])


def test_many_by_weight():
    corners = list(np.eye(3, dtype=np.float32)[:, None])
    even = spherical_mean(corners, [1, 1, 1])
    np.testing.assert_allclose(even, np.full((1, 3), 3**-0.5), atol=1e-6)
    two = spherical_mean(corners, [0, 2, 2])
    np.testing.assert_allclose(two, [[0, 0.5**0.5, 0.5**0.5]], atol=1e-6)
    uneven = spherical_mean(corners, [1, 2, 3])
    np.testing.assert_allclose(uneven, spherical_mean(corners[::-1], [3, 2, 1]), atol=1e-6)
    longer = spherical_mean([k * corner for k, corner in zip((1, 2, 4), corners)], [1, 2, 3])
    np.testing.assert_allclose(longer, uneven * 17 / 6, atol=1e-5)
    across = np.eye(3) - uneven.T * uneven
    arcs = np.arccos(uneven).T * across / np.linalg.norm(across, axis=1, keepdims=True)
    np.testing.assert_allclose(np.float64([1, 2, 3]) @ arcs, 0, atol=1e-5)


def test_directions_that_cancel_and_zeros_stay_finite():
    around = [turned(k * 2 * np.pi / 3) for k in range(3)]
    for vectors in (around, [np.zeros((1, 4), np.float32)] * 3):
        assert np.isfinite(spherical_mean(vectors, [1, 1, 1])).all()
