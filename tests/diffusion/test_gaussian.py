"""The process against Bayes' rule in float64, and published variances."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip import errors
from unclip.diffusion import gaussian, schedule

FULL = schedule.cosine()
T = np.array([0, 1, 487, 998, 999], np.int32)
RNG = np.random.default_rng(0)
SHAPES = [(5, 2, 3, 2), (5, 4)]


def draw(shape):
    return RNG.standard_normal(shape)


def column(values, shape):
    return np.asarray(values).reshape((-1,) + (1,) * (len(shape) - 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_q_sample_adds_the_noise_of_its_own_row(shape):
    x_0, eps = draw(shape), draw(shape)
    a = column(FULL.alpha_bar[T], shape)
    got = jax.jit(lambda *args: gaussian.q_sample(FULL, *args))(x_0, T, eps)
    np.testing.assert_allclose(got, a**0.5 * x_0 + (1 - a) ** 0.5 * eps, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("given", gaussian.PARAMETRISATIONS)
def test_every_parametrisation_says_the_same(shape, given):
    x_0, eps = draw(shape), draw(shape)
    a = column(FULL.alpha_bar[T], shape)
    x_t = np.float32(a**0.5 * x_0 + (1 - a) ** 0.5 * eps).astype(np.float64)
    eps = (x_t - a**0.5 * x_0) / (1 - a) ** 0.5
    want = {"x0": x_0, "eps": eps, "v": a**0.5 * eps - (1 - a) ** 0.5 * x_0}
    output = want[given]
    # Rounding of the input is amplified by at most 1 / sqrt(alpha_bar) or 1 / sqrt(1 - alpha_bar).
    loss = np.maximum(a**-0.5, (1 - a) ** -0.5)
    for name, convert in {
        "x0": gaussian.predict_x0,
        "eps": gaussian.predict_eps,
    }.items():
        got = np.asarray(convert(FULL, x_t, T, output, given), np.float64)
        assert (np.abs(got - want[name]) / loss).max() < 2e-6, name
    np.testing.assert_allclose(gaussian.target(FULL, x_0, T, eps, given), output, atol=2e-6)


@pytest.mark.parametrize("s", [FULL, FULL.respace(25), schedule.linear()], ids=["all", "25", "lin"])
def test_posterior_is_the_product_of_two_gaussians(s):
    # q(x_prev | x_t, x_0) is proportional to q(x_t | x_prev) q(x_prev | x_0): precisions add.
    t = s.timesteps[[0, 1, len(s) // 2, len(s) - 1]]
    x_0, x_t = draw((4, 3)), draw((4, 3))
    mean, log_variance = gaussian.posterior(s, x_0, x_t, t)
    for row, position in enumerate([0, 1, len(s) // 2, len(s) - 1]):
        if position == 0:
            np.testing.assert_allclose(mean[row], x_0[row], rtol=1e-6)
            np.testing.assert_array_equal(log_variance[0], log_variance[1])
            continue
        below = float(np.prod(1 - s.betas[:position]))
        alpha = 1 - s.betas[position]
        precision = alpha / (1 - alpha) + 1 / (1 - below)
        want = x_t[row] * alpha**0.5 / (1 - alpha) + x_0[row] * below**0.5 / (1 - below)
        np.testing.assert_allclose(mean[row], want / precision, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(log_variance[row], -np.log(precision), rtol=1e-5)


def test_fixed_small_has_the_published_deviations():
    std = np.exp(0.5 * np.asarray(gaussian.fixed_small(FULL, np.array([487, 999])), np.float64))
    np.testing.assert_allclose(std, [0.05496255, 0.99949866], rtol=2e-5)


def test_the_first_fixed_variance_is_clipped_as_in_improved_ddpm():
    """Both take beta_tilde of the second step, computed here in float64 from the definition."""
    beta, a = 1 - FULL.alpha_bar[1] / FULL.alpha_bar[0], FULL.alpha_bar
    second = math.log(beta * (1 - a[0]) / (1 - a[1]))
    for fixed in (gaussian.fixed_small, gaussian.fixed_large):
        assert float(fixed(FULL, np.array([0]))[0]) == pytest.approx(second, rel=1e-6)
    assert float(gaussian.fixed_large(FULL, np.array([1]))[0]) == pytest.approx(math.log(beta))


def test_the_analytic_variance_is_that_of_gaussian_data():
    """x_0 ~ N(0, v) has p(x_{t-1} | x_t) in closed form: the product of two Gaussians."""
    v, s = 0.3, FULL.respace(12)
    a, below, t = s.alpha_bar, s.alpha_bar_prev, s.timesteps
    error = np.zeros(1000, np.float32)
    error[t] = v * (1 - a) / (a * v + 1 - a)  # of the best predictor, E[x_0 | x_t]

    def denoise(x_t, t):
        return gaussian.Prediction(x_t, x_t, None)

    known = gaussian.with_analytic_variance(denoise, s, error)
    got = known(jnp.zeros((len(t), 3)), jnp.asarray(t)).log_variance[:, 0]
    before = below * v + 1 - below  # variance of x_{t-1}; x_t = sqrt(1 - beta) x_{t-1} + noise
    want = 1 / (1 / before + (1 - s.betas) / s.betas)
    np.testing.assert_allclose(got[1:], np.log(want)[1:], rtol=1e-4, atol=1e-4)


def test_learned_range_has_the_published_log_variances():
    t = np.array([1, 487, 999])
    got = gaussian.learned_range(FULL, t, jnp.full((3, 1), 0.5))[:, 0]
    np.testing.assert_allclose(got, [-10.1712790, -5.7998052, -0.0010011], rtol=1e-5)


def test_learned_range_ends_at_the_fixed_variances():
    value = jnp.ones((5, 2, 2, 3))
    high = gaussian.learned_range(FULL, T, value)
    low = gaussian.learned_range(FULL, T, -value)
    np.testing.assert_allclose(high[:, 0, 1, 2], np.log(FULL.betas[T]), rtol=1e-6)
    np.testing.assert_array_equal(high[1:, 0, 1, 2], gaussian.fixed_large(FULL, T)[1:])
    np.testing.assert_allclose(low[1:, 1, 0, 0], gaussian.fixed_small(FULL, T)[1:], rtol=1e-6)
    # The first step's beta_tilde is 0: it takes the second's.
    np.testing.assert_allclose(low[0, 0, 0, 0], low[1, 0, 0, 0])


def test_one_step_schedule_has_finite_variances():
    one = FULL.respace(1)
    t = np.array([999])
    for value in (
        gaussian.fixed_small(one, t),
        gaussian.fixed_large(one, t),
        gaussian.learned_range(one, t, jnp.zeros(1)),
        *gaussian.posterior(one, jnp.ones((1, 2)), jnp.ones((1, 2)), t),
    ):
        assert np.isfinite(value).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parametrisation", gaussian.PARAMETRISATIONS)
def test_denoise_clips_x0_and_derives_eps_again(shape, parametrisation):
    output, x_t = draw(shape), draw(shape)
    a = column(FULL.alpha_bar[T], shape)
    kwargs = {"parametrisation": parametrisation}
    free = gaussian.make_denoise(lambda x, t: jnp.asarray(output), FULL, **kwargs)(x_t, T)
    np.testing.assert_allclose(
        a**0.5 * np.asarray(free.x0, np.float64) + (1 - a) ** 0.5 * np.asarray(free.eps),
        x_t,
        atol=1e-5,
    )
    assert free.log_variance.shape == (5,) + (1,) * (len(shape) - 1)
    for clip in (0.5, lambda x: jnp.clip(x, -0.5, 0.5)):
        got = gaussian.make_denoise(lambda x, t: jnp.asarray(output), FULL, clip=clip, **kwargs)(
            x_t, T
        )
        np.testing.assert_allclose(got.x0, np.clip(free.x0, -0.5, 0.5))
        want = (x_t - a**0.5 * np.asarray(got.x0, np.float64)) / (1 - a) ** 0.5
        np.testing.assert_allclose(got.eps, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_learned_variance_comes_from_the_last_channels(shape):
    mean, value = draw(shape), draw(shape)
    output = jnp.concatenate([mean, value], -1)
    denoise = gaussian.make_denoise(
        lambda x, t: output, FULL, parametrisation="x0", variance="learned_range"
    )
    got = denoise(jnp.zeros(shape), T)
    np.testing.assert_allclose(got.x0, mean, rtol=1e-6)
    want = gaussian.learned_range(FULL, T, jnp.asarray(value))
    np.testing.assert_allclose(got.log_variance, want)


def test_bf16_outputs_are_read_in_float32():
    denoise = gaussian.make_denoise(lambda x, t: jnp.ones_like(x, jnp.bfloat16), FULL)
    got = denoise(jnp.zeros((5, 2)), T)
    assert {leaf.dtype for leaf in got} == {jnp.dtype("float32")}


@pytest.mark.parametrize("variance", gaussian.VARIANCES)
def test_gradients_are_finite_at_the_ends(variance):
    channels = 4 if variance == "learned_range" else 2

    def total(scale):
        denoise = gaussian.make_denoise(
            lambda x, t: scale * jnp.ones((2, channels)), FULL, variance=variance, clip=1.0
        )
        return sum(leaf.sum() for leaf in denoise(jnp.ones((2, 2)), jnp.array([0, 999])))

    value, slope = jax.value_and_grad(total)(0.3)
    assert np.isfinite(value) and np.isfinite(slope)


def test_errors():
    def same(x, t):
        return x

    with pytest.raises(errors.ConfigError, match="valid: eps, v, x0"):
        gaussian.make_denoise(same, FULL, parametrisation="epsilon")
    with pytest.raises(errors.ConfigError, match="did you mean 'fixed_small'"):
        gaussian.make_denoise(same, FULL, variance="fixed_smal")
    with pytest.raises(errors.ConfigError, match="needs 4 output channels"):
        gaussian.make_denoise(same, FULL, variance="learned_range")(jnp.ones((1, 2)), T[:1])
    with pytest.raises(errors.ConfigError, match="shapes must be equal"):
        gaussian.make_denoise(lambda x, t: x[..., :1], FULL)(jnp.ones((1, 2)), T[:1])
