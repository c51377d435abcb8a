"""Guidance and thresholds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip import errors
from unclip.diffusion import gaussian, guidance, samplers, schedule

RNG = np.random.default_rng(0)
COND, UNCOND = (RNG.standard_normal((2, 3, 3, 4)).astype(np.float32) for _ in range(2))


def test_guidance_extrapolates_from_the_unconditional():
    guided = jax.jit(guidance.classifier_free)
    np.testing.assert_array_equal(guided(COND, UNCOND, 1.0), COND)
    np.testing.assert_allclose(guided(COND, UNCOND, 0.0), UNCOND, atol=1e-6)
    want = UNCOND + 4.0 * (COND - UNCOND)
    np.testing.assert_allclose(guided(COND, UNCOND, 4.0), want, atol=1e-5)
    rows = guided(COND, UNCOND, jnp.array([1.0, 4.0]))
    np.testing.assert_array_equal(rows[0], COND[0])
    np.testing.assert_allclose(rows[1], want[1], atol=1e-5)


def test_the_learned_variance_is_the_conditional_one():
    got = guidance.classifier_free(COND, UNCOND, 3.0, learned_variance=True)
    np.testing.assert_array_equal(got[..., 2:], COND[..., 2:])
    want = (UNCOND + 3.0 * (COND - UNCOND))[..., :2]
    np.testing.assert_allclose(got[..., :2], want, atol=1e-5)


@pytest.mark.parametrize("learned", [False, True])
def test_rescaling_brings_the_deviation_back(learned):
    """Eqs. 14-16 of arXiv 2305.08891, a picture at a time, of the mean alone."""
    run = jax.jit(
        lambda scale, rescale: guidance.classifier_free(
            COND, UNCOND, scale, rescale=rescale, learned_variance=learned
        )
    )
    cond, uncond = (a[..., : 2 if learned else 4].astype(np.float64) for a in (COND, UNCOND))
    guided = uncond + 5.0 * (cond - uncond)
    std = lambda a: a.std(axis=(1, 2, 3), keepdims=True)
    for rescale in (0.7, 1.0):
        want = rescale * guided * std(cond) / std(guided) + (1 - rescale) * guided
        np.testing.assert_allclose(run(5.0, rescale)[..., : cond.shape[-1]], want, rtol=2e-4)
    if learned:
        np.testing.assert_array_equal(run(5.0, 0.7)[..., 2:], COND[..., 2:])
    np.testing.assert_array_equal(run(1.0, 0.7), COND)
    plain = jax.jit(
        lambda scale: guidance.classifier_free(COND, UNCOND, scale, learned_variance=learned)
    )
    np.testing.assert_array_equal(run(5.0, 0.0), plain(5.0))
    assert np.isfinite(guidance.classifier_free(COND, 0 * COND, 0.0, rescale=0.5)).all()


def test_guidance_acts_inside_its_interval_alone():
    """Ends included; outside, the guided network is the conditional one; traced."""
    net = lambda x, t, drop: jnp.where(drop[:, None], 0.3, 0.7) * x + t[:, None] / 7
    t, x = jnp.arange(1000), jnp.linspace(1, 2, 1000)[:, None]
    conditional = jax.jit(lambda: net(x, t, jnp.zeros(1000, bool)))()

    @jax.jit
    def run(scale, low, high):
        inside = guidance.in_interval(scale, low, high, 999)
        return guidance.with_guidance(net, inside, rescale=0.0)(x, t)

    for low, high in ((0.0, 1.0), (0.2, 0.8), (100 / 999, 100 / 999), (0.0, 0.0)):
        got = run(3.0, low, high)
        guided = (np.abs(np.asarray(got) - conditional) > 1e-3)[:, 0]
        k = np.arange(1000)
        want = (k >= np.ceil(low * 999 - 1e-4)) & (k <= high * 999 + 1e-4)
        np.testing.assert_array_equal(guided, want)
    assert run._cache_size() == 1


def test_with_guidance_asks_once_for_both_halves():
    calls = []
    label = jnp.array([10.0, 20.0])[:, None]
    (doubled,) = guidance.twice((label,))

    def net(x, t, drop):
        calls.append(x.shape)
        assert t.shape == drop.shape == (4,)
        return x + t[:, None] + jnp.where(drop[:, None], 0.0, doubled)

    x, t = jnp.array([[1.0], [2.0]]), jnp.array([0, 5])
    got = guidance.with_guidance(net, 3.0)(x, t)
    np.testing.assert_allclose(got, [[1 + 0 + 30.0], [2 + 5 + 60.0]])
    assert calls == [(4, 1)]


def test_scale_is_traced_through_a_whole_sampling():
    s = schedule.cosine().respace(4)
    traces = []

    def net(x, t, drop):
        traces.append(1)
        return jnp.where(drop[:, None], 0.0, 0.25) * jnp.ones_like(x)

    @jax.jit
    def run(scale):
        model_fn = guidance.with_guidance(net, scale)
        denoise = gaussian.make_denoise(model_fn, s, parametrisation="x0")
        return samplers.sample(denoise, s, jnp.zeros((1, 2)), None, sampler="ddim")

    np.testing.assert_allclose(run(2.0), 0.5)
    np.testing.assert_allclose(run(4.0), 1.0)
    assert len(traces) == 1


def test_static_threshold():
    np.testing.assert_array_equal(
        guidance.static_threshold(2.0)(jnp.array([[-5.0, 1.0, 2.5]])), [[-2.0, 1.0, 2.0]]
    )


def test_dynamic_threshold_is_each_pictures_own():
    x = RNG.standard_normal((3, 5, 5, 2)).astype(np.float32)
    x[0] *= 0.2
    x[1] *= 4
    got = guidance.dynamic_threshold(0.9)(x)
    for row in range(3):
        s = max(np.quantile(np.abs(x[row].astype(np.float64)), 0.9), 1.0)
        np.testing.assert_allclose(got[row], np.clip(x[row], -s, s) / s, rtol=1e-5)
    np.testing.assert_array_equal(got[0], x[0])
    assert np.abs(got).max() <= 1


def test_errors():
    with pytest.raises(errors.ConfigError, match="expected equal"):
        guidance.classifier_free(COND, UNCOND[:1], 2.0)
    with pytest.raises(errors.ConfigError, match="output channels"):
        guidance.classifier_free(COND[..., :3], UNCOND[..., :3], 2.0, learned_variance=True)
    for bad in (0.0, 1.5, -1.0):
        with pytest.raises(errors.ConfigError, match="percentile"):
            guidance.dynamic_threshold(bad)
    with pytest.raises(errors.ConfigError, match="positive"):
        guidance.static_threshold(0.0)
