"""Principal components, buckets and dot products against numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip.errors import ConfigError
from unclip.tasks import codes as c


@pytest.fixture(scope="module")
def data():
    """[400, 10] correlated, off-centre embeddings with a clear order of variances."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(10, 10)))[0]
    return rng.normal(size=(400, 10)) * 2.0 ** -np.arange(10) @ basis.T + rng.normal(size=10)


def test_pca_equals_svd(data):
    pca = c.fit_pca(data.mean(0), np.cov(data.T), dims=4)
    _, s, vt = np.linalg.svd(data - data.mean(0), full_matrices=False)
    np.testing.assert_allclose(pca.scale, (s / np.sqrt(399))[:4], rtol=1e-9)
    assert (np.diff(pca.scale) < 0).all()
    np.testing.assert_allclose(np.abs(pca.components.T @ vt[:4].T), np.eye(4), atol=1e-8)
    top = np.abs(pca.components).argmax(0)
    assert (pca.components[top, range(4)] > 0).all()
    coefficients = np.asarray(c.encode(pca, data.astype(np.float32)))
    np.testing.assert_allclose(coefficients, (data - data.mean(0)) @ pca.components, atol=1e-5)
    # what the codes are scaled by: uncorrelated, standard deviation `scale`
    np.testing.assert_allclose(np.cov(coefficients.T), np.diag(pca.scale**2), atol=1e-4)


def test_reconstruction_error_is_the_dropped_variance(data):
    values = np.linalg.eigvalsh(np.cov(data.T))[::-1]
    for dims in (3, 7, 10):
        pca = c.fit_pca(data.mean(0), np.cov(data.T), dims=dims)
        back = c.decode(pca, c.encode(pca, data.astype(np.float32)))
        error = np.square(np.asarray(back, np.float64) - data).sum(1).sum() / 399
        np.testing.assert_allclose(error, values[dims:].sum(), rtol=1e-4, atol=1e-9)


def test_explained_keeps_the_fewest(data):
    values = np.linalg.eigvalsh(np.cov(data.T))[::-1]
    share = np.cumsum(values) / values.sum()
    fit = partial(c.fit_pca, data.mean(0), np.cov(data.T))
    for explained in (0.5, 0.99, 0.9999):
        dims = len(fit(explained=explained).scale)
        assert share[dims - 1] >= explained and (dims == 1 or share[dims - 2] < explained)
    assert len(fit(explained=1.0).scale) == 10
    for bad in ({}, {"dims": 3, "explained": 0.9}, {"dims": 11}, {"dims": 0}, {"explained": 1.5}):
        with pytest.raises(ConfigError, match="expected"):
            fit(**bad)


def test_quantise_round_trip():
    rng = np.random.default_rng(4)
    scale = np.array([3.0, 0.5, 1e-3])
    x = rng.uniform(-4, 4, size=(2000, 3)) * scale
    codes = c.quantise(x, scale, 64, 4.0)
    assert codes.dtype == jnp.int32 and codes.min() == 0 and codes.max() == 63
    back = np.asarray(c.dequantise(codes, scale, 64, 4.0))
    half = 4.0 * scale / 64
    assert (np.abs(back - x) <= half * (1 + 1e-5)).all()
    assert (np.abs(back - x).max(0) > 0.9 * half).all()
    np.testing.assert_array_equal(c.quantise(back, scale, 64, 4.0), codes)  # centres stay
    edges = np.array([[-99.0, 99.0, 0.0]]) * scale
    np.testing.assert_array_equal(c.quantise(edges, scale, 64, 4.0), [[0, 63, 32]])
    rising = np.asarray(c.quantise(np.sort(x[:, :1], axis=0), scale[:1], 64))
    assert (np.diff(rising, axis=0) >= 0).all()
    flat = c.dequantise(c.quantise(np.zeros((1, 1)), np.zeros(1), 64), np.zeros(1), 64)
    assert np.isfinite(flat).all() and np.abs(flat).max() < 1e-6


def test_dot_buckets_split_the_training_data_in_half():
    dots = np.random.default_rng(5).gamma(2.0, size=1000)  # skewed
    edges = c.fit_dot_edges(dots, 8)
    codes = np.asarray(c.quantise_dot(jnp.asarray(dots), edges))
    np.testing.assert_array_equal(codes >= 4, dots > np.median(dots))
    np.testing.assert_array_equal(np.bincount(codes), [125] * 8)
    assert c.quantise_dot(jnp.asarray([-9.0, 99.0]), edges).tolist() == [0, 7]
    drawn = np.asarray(c.draw_dot(jax.random.split(jax.random.key(0), 400), 8))
    assert set(drawn) == {4, 5, 6, 7}
    with pytest.raises(ConfigError, match="even"):
        c.fit_dot_edges(dots, 7)


def test_keep_top_p():
    logits = jnp.log(jnp.asarray([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]]))
    keep = np.isfinite(np.asarray(c.keep_top_p(logits, 0.7)))
    assert keep[0].tolist() == [False, True, False, True] and keep[1].all()
    assert np.isfinite(c.keep_top_p(logits, 0.0))[0].tolist() == [False, True, False, False]
    np.testing.assert_array_equal(c.keep_top_p(logits, 1.1), logits)
