"""The upsamplers: published sizes, the bicubic they are fed, and crops against the full size."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unclip.errors import ConfigError
from unclip.models.upsampler import PRESETS, Upsampler, upsample

TINY = dict(channels=4, multipliers=(1, 1), blocks=1, attention=(False, False), groups=2)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def randomised(model, *args):
    shapes = jax.eval_shape(lambda k: model.init(k, *args), jax.random.key(0))
    rng = np.random.default_rng(0)
    draw = lambda v: jnp.asarray(rng.normal(size=v.shape) * 0.3, v.dtype)
    return jax.tree.map(draw, shapes)


@pytest.mark.parametrize(
    "preset,low,high,expected",
    [
        ("karlo", 64, 256, 691_579_523),
        ("paper-256", 64, 256, 691_579_523),
        ("paper-1024", 256, 1024, 282_059_139),
        ("emoji-64", 16, 64, None),
        ("emoji-256", 64, 256, None),
    ],
)
def test_sizes(preset, low, high, expected):
    f = jnp.float32
    x, t = jax.ShapeDtypeStruct((1, high, high, 3), f), jax.ShapeDtypeStruct((1,), jnp.int32)
    small = jax.ShapeDtypeStruct((1, low, low, 3), f)
    model = Upsampler(**PRESETS[preset])
    y, variables = jax.eval_shape(
        lambda k, *a: model.init_with_output(k, *a), jax.random.key(0), x, t, small
    )
    params = variables["params"]["unet"]
    assert y.shape == (1, high, high, 3)
    assert not any("attn" in name for part in params.values() for name in part)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert total == expected if expected else total < 2e6
    if expected:
        assert params["conv_in"]["kernel"].shape[2:] == (6, model.channels)


def test_upsample_is_pillows_bicubic():
    low = normal(0, 1, 5, 7, 1)
    ours = upsample(low, (20, 21))
    picture = Image.fromarray(np.asarray(low[0, :, :, 0]))
    assert picture.mode == "F"
    pillow = np.asarray(picture.resize((21, 20), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(ours[0, :, :, 0], pillow, atol=1e-5)


def test_upsample_is_keys_kernel_with_a_minus_half():
    def keys(d, a=-0.5):
        d = np.abs(d)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        return np.where(d <= 1, near, np.where(d < 2, far, 0.0))

    def matrix(n, size):
        centres = (np.arange(size) + 0.5) * n / size - 0.5
        w = keys(centres[:, None] - np.arange(n)[None])
        return w / w.sum(1, keepdims=True)

    low = normal(1, 2, 4, 6, 3)
    expected = np.einsum("Hh,Ww,bhwc->bHWc", matrix(4, 16), matrix(6, 24), np.float64(low))
    np.testing.assert_allclose(upsample(low, (16, 24)), expected, atol=1e-5)
    np.testing.assert_allclose(upsample(jnp.full((1, 4, 4, 3), 0.3), 16), 0.3, atol=1e-6)


def test_a_crop_sees_what_the_full_picture_sees():
    """One set of parameters at two sizes; with per-pixel norms the inside of a crop is equal."""
    model = Upsampler(**TINY, norm="rms")
    x, low, t = normal(0, 1, 128, 128, 3), normal(1, 1, 32, 32, 3), jnp.array([40])
    params = randomised(model, x, t, low)
    apply = jax.jit(model.apply)
    full = apply(params, x, t, low)
    crop = apply(params, x[:, 8:120, 8:120], t, low[:, 2:30, 2:30])
    np.testing.assert_allclose(crop[:, 48:64, 48:64], full[:, 56:72, 56:72], atol=1e-4)
    assert np.abs(crop[:, :4, :4] - full[:, 8:12, 8:12]).max() > 1e-3  # borders do differ


def test_group_norm_params_run_at_any_multiple_of_the_unit():
    model = Upsampler(**TINY, patch=2)
    params = randomised(model, normal(0, 1, 16, 16, 3), jnp.array([1]), normal(1, 1, 4, 4, 3))
    shape = jax.eval_shape(
        model.apply, params, normal(0, 2, 24, 40, 3), jnp.array([1, 2]), normal(1, 2, 6, 10, 3)
    ).shape
    assert shape == (2, 24, 40, 3)


def test_it_reads_the_small_picture_and_starts_at_zero():
    model = Upsampler(**TINY, patch=2)
    args = normal(0, 2, 16, 16, 3), jnp.array([7, 900]), normal(1, 2, 4, 4, 3)
    apply = jax.jit(model.apply)
    params = randomised(model, *args)
    zero = jax.tree.map(jnp.copy, params)
    out = zero["params"]["unet"]["conv_out"]
    out["kernel"], out["bias"] = out["kernel"] * 0, out["bias"] * 0
    np.testing.assert_array_equal(apply(zero, *args), 0)
    moved = apply(params, *args[:2], args[2].at[0].add(0.5)) - apply(params, *args)
    assert np.abs(moved[0]).max() > 1e-3
    np.testing.assert_array_equal(moved[1], 0)


def test_a_noise_level_is_read_and_a_fresh_network_ignores_it():
    args = normal(0, 2, 8, 8, 3), jnp.array([7, 7]), normal(1, 2, 4, 4, 3)
    fields = dict(channels=4, multipliers=(1,), blocks=1, attention=(False,), groups=2)
    plain, model = Upsampler(**fields), Upsampler(**fields, noise_level=True)
    shapes = lambda m: jax.eval_shape(lambda k: m.init(k, *args), jax.random.key(0))["params"]
    assert shapes(model).keys() == {"unet", "level"}
    assert shapes(plain).keys() == {"unet"}  # the published layout is as it was
    params, apply = randomised(model, *args), jax.jit(model.apply)
    clean = apply(params, *args)  # no level is level 0
    moved = apply(params, *args, jnp.array([0, 500])) - clean
    np.testing.assert_array_equal(moved[0], 0)
    assert np.abs(moved[1]).max() > 1e-3
    key = jax.random.key(1)
    fresh = jax.jit(lambda key: model.init(key, *args)["params"]["level"])(key)
    np.testing.assert_array_equal(fresh["fc_2"]["kernel"], 0)
    np.testing.assert_array_equal(fresh["fc_2"]["bias"], 0)
    with pytest.raises(ConfigError, match=r"without arch\.noise_level"):
        jax.eval_shape(plain.apply, randomised(plain, *args), *args, jnp.array([0, 1]))


def test_shapes_that_do_not_fit_are_named():
    model = Upsampler(**TINY)
    with pytest.raises(ConfigError, match="at most its height and width"):
        model.init(jax.random.key(0), normal(0, 1, 8, 8, 3), jnp.array([1]), normal(0, 1, 16, 8, 3))
    with pytest.raises(ConfigError, match="multiples of 2"):
        model.init(jax.random.key(0), normal(0, 1, 9, 8, 3), jnp.array([1]), normal(0, 1, 3, 2, 3))
