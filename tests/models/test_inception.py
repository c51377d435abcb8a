"""FID's Inception: its geometry, its known departures, and TensorFlow 1's resize."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip import errors
from unclip.models.bilinear import resize_tf1
from unclip.models.inception import Block, Features, Inception, Unit

SIZES = [(32, 32), (64, 48), (299, 299), (300, 512), (1, 7)]


def _tf1_by_hand(picture, size):
    """Pixel by pixel: neighbours of i · in/out in float32, rows then columns."""
    height, width, _ = picture.shape
    x = picture.astype(np.float32)
    out = np.empty((size, size, x.shape[-1]), np.float32)
    steps = np.float32(height) / np.float32(size), np.float32(width) / np.float32(size)
    for i in range(size):
        row = np.float32(i) * steps[0]
        top = min(int(row), height - 1)
        bottom = min(top + 1, height - 1)
        for j in range(size):
            column = np.float32(j) * steps[1]
            left = min(int(column), width - 1)
            right = min(left + 1, width - 1)
            above = x[top, left] + (x[top, right] - x[top, left]) * (column - left)
            below = x[bottom, left] + (x[bottom, right] - x[bottom, left]) * (column - left)
            out[i, j] = above + (below - above) * (row - top)
    return out


@pytest.mark.parametrize("size", SIZES)
def test_resize_equals_the_rule_pixel_by_pixel(size):
    pictures = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    ours = np.asarray(resize_tf1(pictures, 50))
    assert ours.dtype == np.float32
    for picture, result in zip(pictures, ours):
        np.testing.assert_allclose(result, _tf1_by_hand(picture, 50), atol=1e-4)


def test_resize_is_the_old_one():
    # Half-pixel centres would give 0, 25, 75, 100; antialiasing would blur the halving.
    ramp = np.array([0, 100], np.uint8).reshape(1, 1, 2, 1)
    np.testing.assert_array_equal(resize_tf1(ramp, 4)[0, 0, :, 0], [0, 50, 100, 100])
    fine = np.array([0, 200, 0, 200], np.uint8).reshape(1, 1, 4, 1)
    np.testing.assert_array_equal(resize_tf1(fine, 2)[0, 0, :, 0], [0, 0])
    same = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), np.uint8)
    np.testing.assert_array_equal(resize_tf1(same), same)


def test_shapes_and_parameter_count():
    pictures = jax.ShapeDtypeStruct((3, 299, 299, 3), np.uint8)
    (features, params) = jax.eval_shape(Inception().init_with_output, jax.random.key(0), pictures)
    assert [f.shape for f in features] == [(3, 2048), (3, 17, 17, 7), (3, 1008), (3, 1008)]
    assert {f.dtype for f in features} == {np.dtype(np.float32)}
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 23_885_392
    unit = params["params"]["Mixed_6e"]["branch7x7dbl_4"]
    assert unit["kernel"].shape == (7, 1, 192, 192)
    assert set(unit) == {"kernel", "scale", "bias", "mean", "var"}


def test_a_unit_is_convolution_frozen_norm_and_relu():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, 5, 2), np.float32)
    values = {n: rng.uniform(0.5, 2, 3).astype(np.float32) for n in ("scale", "bias", "mean")}
    params = {"kernel": rng.standard_normal((1, 1, 2, 3), np.float32), **values}
    params["var"] = np.array([0, 1e-3, 4], np.float32)
    expected = (x @ params["kernel"][0, 0] - params["mean"]) / np.sqrt(params["var"] + 1e-3)
    expected = np.maximum(expected * params["scale"] + params["bias"], 0)
    ours = Unit(3).apply({"params": params}, x)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    assert (expected == 0).any() and (expected > 0).any()


def _with_units(stand_in, run):
    """Calls run() with every unit's computation replaced by stand_in(unit, its input)."""

    def replace(next_fun, args, kwargs, context):
        if isinstance(context.module, Unit):
            return stand_in(context.module, args[0])
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(replace):
        return run()


def test_pools_do_as_the_published_graph():
    x = np.zeros((1, 3, 3, 1), np.float32)
    x[0, :, :, 0] = np.arange(9).reshape(3, 3)

    def pooled(kind):
        only = lambda unit, x: x if unit.name == "branch_pool" else 0 * x
        return _with_units(only, lambda: Block(kind, 1).apply({}, x))[0, :, :, -1]

    # Corners see four pixels, edges six; padding is not counted.
    average = [[2, 2.5, 3], [3.5, 4, 4.5], [5, 5.5, 6]]
    for kind in "ACE":
        np.testing.assert_allclose(pooled(kind), average, rtol=1e-5)
    np.testing.assert_array_equal(pooled("E_max"), [[4, 5, 5], [7, 8, 8], [7, 8, 8]])


def test_where_the_features_are_taken():
    marks = {
        ("Mixed_6d", "branch1x1"): 1, ("Mixed_7c", "branch1x1"): 2, ("Mixed_7c", "branch_pool"): 3,
    }  # fmt: skip

    def marked(unit, x):
        height, width = x.shape[1:3]
        if not unit.pad:
            shrunk = [(n - k) // unit.stride + 1 for n, k in zip((height, width), unit.kernel)]
            height, width = shrunk
        mark = marks.get(unit.path[-2:], 0)
        values = (jnp.arange(unit.features) + 1000 * mark) * (mark > 0)
        values = values[None, None, None] + 0 * x[:, :1, :1, :1]
        return jnp.broadcast_to(values, (len(x), height, width, unit.features))

    rng = np.random.default_rng(0)
    head = {"kernel": rng.standard_normal((2048, 1008)), "bias": np.arange(1008.0)}
    pictures = np.zeros((2, 299, 299, 3), np.uint8)
    run = jax.jit(lambda pictures: Inception().apply({"params": {"fc": head}}, pictures))
    features = _with_units(marked, lambda: run(pictures))
    assert isinstance(features, Features)
    expected = np.broadcast_to(1000 + np.arange(7), (2, 17, 17, 7))
    np.testing.assert_array_equal(features.spatial, expected)
    pool3 = np.concatenate([2000 + np.arange(320), np.zeros(1536), 3000 + np.arange(192)])
    np.testing.assert_allclose(features.pool3, np.stack([pool3] * 2), rtol=1e-5)
    np.testing.assert_allclose(features.logits_unbiased[0], pool3 @ head["kernel"], rtol=1e-3)
    np.testing.assert_allclose(
        features.logits, np.asarray(features.logits_unbiased) + head["bias"], rtol=1e-5
    )


def test_what_is_asked_wrongly():
    for shape in ((1, 64, 64, 3), (299, 299, 3), (1, 299, 299, 1)):
        with pytest.raises(errors.ConfigError, match=r"expected \[B, 299, 299, 3\]"):
            jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros(shape, jnp.uint8))
    with pytest.raises(errors.ConfigError, match="did you mean 'tf'"):
        Inception().init(jax.random.key(0), np.zeros((1, 299, 299, 3), np.uint8), normalise="tf1")


@pytest.mark.parametrize(("normalise", "white"), [("tf", 127 / 128), ("pytorch-fid", 1.0)])
def test_normalisation_of_the_two_traditions(normalise, white):
    seen = []

    def look(unit, x):
        seen.append(x)
        raise StopIteration

    pictures = np.array([0, 255], np.uint8).repeat(299 * 299 * 3).reshape(2, 299, 299, 3)
    with pytest.raises(StopIteration):
        _with_units(look, lambda: Inception().apply({}, pictures, normalise=normalise))
    assert float(seen[0].min()) == -1 and float(seen[0].max()) == white
