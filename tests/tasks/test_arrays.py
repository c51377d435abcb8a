"""Ways on the sphere between embeddings and between noises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip import errors
from unclip.tasks.arrays import slerp, spherical_mean

RNG = np.random.default_rng(0)
A, B, C = RNG.standard_normal((3, 2, 5))


def textbook(a, b, w):
    """sin((1 - w) angle) / sin(angle) a + sin(w angle) / sin(angle) b, of equal lengths."""
    angle = np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))
    return (np.sin((1 - w) * angle) * a + np.sin(w * angle) * b) / np.sin(angle)


def length(v):
    return np.linalg.norm(v.reshape(len(v), -1), axis=1)


def cosine(a, b):
    return (a * b).reshape(len(a), -1).sum(1) / length(a) / length(b)


@pytest.mark.parametrize("kind", ["numpy", "jax"])
@pytest.mark.parametrize("weight", [-0.2, 0.0, 0.3, 1.0])
def test_slerp_is_the_textbooks(kind, weight):
    b = B * (length(A) / length(B))[:, None]
    args = (A, b) if kind == "numpy" else (jnp.float32(A), jnp.float32(b))
    got = (slerp if kind == "numpy" else jax.jit(slerp))(*args, weight)
    assert isinstance(got, np.ndarray if kind == "numpy" else jax.Array)
    want = [textbook(*rows, weight) for rows in zip(A, b)]
    np.testing.assert_allclose(got, want, atol=1e-12 if kind == "numpy" else 1e-5)


def test_angle_and_length_change_evenly():
    b = 3 * B
    whole = np.arccos(cosine(A, b))
    for w in (0.25, 0.5, 0.9):
        got = slerp(A, b, w)
        np.testing.assert_allclose(np.arccos(cosine(A, got)), w * whole, atol=1e-9)
        np.testing.assert_allclose(length(got), (1 - w) * length(A) + w * length(b))
    # A weight a row.
    rows = slerp(A, b, np.array([0.25, 0.9]))
    np.testing.assert_allclose(rows[1], slerp(A, b, 0.9)[1])


def test_noise_of_pictures_stays_noise():
    a, b = RNG.standard_normal((2, 2, 8, 8, 3)).astype(np.float32)
    got = slerp(a, b, 0.5)
    assert got.shape == a.shape and np.std(got) == pytest.approx(1, abs=0.1)
    assert np.std((a + b) / 2) < 0.8


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_parallel_and_opposite_vectors(make):
    a = make(A.astype(np.float32))
    for w in (0.0, 0.4, 1.0):
        np.testing.assert_allclose(slerp(a, a, w), a, atol=1e-6)
        np.testing.assert_allclose(slerp(a, 2 * a, w), (1 + w) * a, atol=1e-6)
        near = slerp(a, a * (1 + 1e-7) + 1e-7, w)
        np.testing.assert_allclose(near, a, atol=1e-5)
        # The way round keeps the length, and turns evenly.
        got = np.asarray(slerp(a, -a, w))
        np.testing.assert_allclose(length(got), length(A), rtol=1e-5)
        np.testing.assert_allclose(cosine(A, got), np.cos(w * np.pi), atol=1e-5)
    assert np.isfinite(slerp(0 * a, a, 0.5)).all() and np.isfinite(slerp(0 * a, 0 * a, 0.5)).all()


def test_a_mean_of_two_is_slerp_and_of_more_has_no_first():
    for w in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(spherical_mean([A, B], [1 - w, w]), slerp(A, B, w), atol=1e-9)
    a, b, c = (np.abs(v) for v in (A, B, C))
    want = spherical_mean([a, b, c], [1, 2, 3])
    np.testing.assert_allclose(spherical_mean([c, a, b], [3, 1, 2]), want, atol=1e-9)
    np.testing.assert_allclose(spherical_mean([a, b, c], [0.5, 1, 1.5]), want, atol=1e-9)
    np.testing.assert_allclose(length(want), (length(a) + 2 * length(b) + 3 * length(c)) / 6)
    # Between axes with equal weights it is the diagonal.
    axes = np.eye(3)[:, None]
    np.testing.assert_allclose(spherical_mean(list(axes), [1, 1, 1]), np.full((1, 3), 3**-0.5))
    np.testing.assert_allclose(spherical_mean([a, b, c], [0, 1, 0]), b, atol=1e-9)
    traced = jax.jit(lambda w: spherical_mean([a, b, c], w))(jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(traced, want, atol=1e-5)


def test_errors():
    with pytest.raises(errors.ConfigError, match=r"shapes \(2, 5\), \(2, 4\): expected rows"):
        slerp(A, A[:, :4], 0.5)
    with pytest.raises(errors.ConfigError, match="expected rows"):
        slerp(A[0], B[0], 0.5)
    with pytest.raises(errors.ConfigError, match="expected 2 numbers of at least 0"):
        spherical_mean([A, B], [1.0])
    with pytest.raises(errors.ConfigError, match="expected 2 numbers of at least 0"):
        spherical_mean([A, B], [1.0, -1.0])
    with pytest.raises(errors.ConfigError, match="expected one above 0"):
        spherical_mean([A, B], [0, 0])
    with pytest.raises(errors.ConfigError, match="shapes none"):
        spherical_mean([], [])
