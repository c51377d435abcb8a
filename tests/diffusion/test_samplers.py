"""Samplers on data whose exact denoiser is known: x_0 ~ N(m, s^2) in every dimension."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion import reference
from unclip import errors
from unclip.diffusion import gaussian, samplers, schedule

FULL, FINE = schedule.cosine(), schedule.cosine(10000)
MEAN, STD = 0.4, 0.6
SHAPE = (2, 2, 3)

draw_noise = jax.jit(samplers.draw_noise, static_argnums=1)


def exact_x0(s):
    """E[x_0 | x_t] for the Gaussian data: a model_fn in the x0 parametrisation."""
    signal = np.sqrt(s.alpha_bar)
    gain = STD**2 * signal / (STD**2 * s.alpha_bar + 1 - s.alpha_bar)

    def model_fn(x_t, t):
        a, k = (gaussian.expand(s.at(v, t), x_t) for v in (signal, gain))
        return MEAN + k * (x_t - a * MEAN)

    return model_fn


def denoiser(s, **kwargs):
    return gaussian.make_denoise(exact_x0(s), s, parametrisation="x0", **kwargs)


@functools.cache
def runner(n, sampler, eta=0.0):
    s = FULL.respace(n)

    def run(x_T, keys, noise=None):
        return samplers.sample(denoiser(s), s, x_T, keys, sampler=sampler, eta=eta, noise=noise)

    return jax.jit(run)


def keys_of(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def ode_end(x_T, s=FULL):
    """Where the exact probability flow takes x_T: its standard score is kept."""
    a = s.alpha_bar[-1]
    return MEAN + STD * (x_T - a**0.5 * MEAN) / np.sqrt(a * STD**2 + 1 - a)


@pytest.mark.parametrize(
    ("sampler", "eta", "n"),
    [
        ("ddpm", 0.0, 250),
        ("ddim", 0.5, 250),
        pytest.param("ddim", 0.0, 250, marks=pytest.mark.slow),
        pytest.param("ddim", 1.0, 250, marks=pytest.mark.slow),
        ("dpm++2m", 0.0, 40),
    ],
)
def test_samples_have_the_datas_mean_and_variance(sampler, eta, n):
    count = 4000
    keys = keys_of(count)
    x_T = draw_noise(keys, (5,))
    got = np.asarray(runner(n, sampler, eta)(x_T, keys), np.float64)
    # 20000 numbers: the mean is known to 0.6 / sqrt(20000) = 0.004, the deviation to 0.5 %; the
    # steps themselves add at most 2 %.
    assert got.mean() == pytest.approx(MEAN, abs=0.015)
    assert got.std() == pytest.approx(STD, rel=0.03)
    assert np.abs(np.corrcoef(got.T) - np.eye(5)).max() < 0.07


def even_in_log_snr(n):
    """A grid fine enough to round to, as the papers' proofs have it; the first n of -4 to 4."""
    half_log_snr = 0.5 * np.log(FINE.signal_to_noise)
    wanted = np.linspace(-4, 4, n)
    return FINE.respace(timesteps=np.abs(half_log_snr - wanted[:, None]).argmin(1))


@pytest.mark.parametrize(
    ("sampler", "factors"),
    [
        ("ddim", (1.8, 2.2)),
        ("euler", (1.8, 2.2)),
        ("heun", (3.8, 5.5)),
        ("dpm++2m", (3.0, 8.0)),
        ("dpm++2m-sde", (3.0, 8.0)),
        ("unipc", (4.5, 12.0)),
        ("dpm++3m-sde", (7.0, 200.0)),
    ],
)
def test_order_of_convergence(sampler, factors):
    """Twice the steps, 2^order closer to where the probability flow ends."""
    x_T = np.linspace(-2, 2, 8, dtype=np.float32)[:, None]
    error = []
    for n in (15, 29, 57):
        s = even_in_log_snr(n)
        got = samplers.sample(denoiser(s), s, x_T, None, sampler=sampler, eta=0.0)
        error.append(np.abs(np.asarray(got) - ode_end(x_T, s)).max())
    low, high = factors
    assert low < error[0] / error[1] < high and low < error[1] / error[2] < high, error
    assert error[2] < 0.05


@pytest.mark.parametrize(
    ("sampler", "factors"),
    [("euler-ancestral", (1.7, 2.3)), ("dpm++2m-sde", (3.0, 9.0)), ("dpm++3m-sde", (3.0, 60.0))],
)
def test_weak_order_of_the_stochastic_ones(sampler, factors):
    """The variance of what is drawn, exactly: the draw is linear in x_T and in every noise."""
    error = []
    for n in (29, 57, 113):
        s = even_in_log_snr(n)
        one_at_a_time = np.eye(n + 1, n + 2, 1, dtype=np.float32)  # column 0: all of them 0
        x_T, noise = one_at_a_time[0][:, None], one_at_a_time[1:, :, None]
        drawn = samplers.sample(denoiser(s), s, x_T, None, sampler=sampler, noise=noise)
        parts = np.asarray(drawn, np.float64)[1:] - np.asarray(drawn[0], np.float64)
        a = s.alpha_bar[0]
        # Of E[x_0 | x_t] at the cleanest step, which is what the last step gives.
        want = STD**4 * a / (a * STD**2 + 1 - a)
        error.append(abs((parts**2).sum() - want))
    low, high = factors
    assert low < error[0] / error[1] < high and low < error[1] / error[2] < high, error
    assert error[2] < 0.07 * STD**2


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("sampler", reference.SAMPLERS)
def test_samplers_are_those_of_the_papers(sampler, eta):
    if sampler not in samplers.HAVE_ETA and eta:
        pytest.skip("has no eta")
    rng = np.random.default_rng(4)

    def x0_of(x, t):  # x_0 is -1 or 1: as far from Gaussian as may be
        a = FULL.alpha_bar[t]
        return np.tanh(np.sqrt(a) / (1 - a + 0.05) * x)

    def model_fn(x, t):
        a = gaussian.expand(FULL.at(FULL.alpha_bar, t), x)
        rest = gaussian.expand(FULL.at(1 - FULL.alpha_bar + 0.05, t), x)
        return jnp.tanh(jnp.sqrt(a) / rest * x)

    for n, spacing in ((2, "even"), (4, "even"), (12, "log-snr")):
        s = FULL.respace(n, spacing)
        x_T, noise = rng.standard_normal((2, 3)), rng.standard_normal((n, 2, 3))
        denoise = gaussian.make_denoise(model_fn, s, parametrisation="x0")
        got = samplers.sample(
            denoise, s, x_T, None, sampler=sampler, eta=eta, noise=jnp.asarray(noise)
        )
        want = reference.SAMPLERS[sampler](x0_of, s, x_T, noise, eta)
        np.testing.assert_allclose(got, want, atol=2e-4, err_msg=f"{n} {spacing}")


@pytest.mark.parametrize("n", [10, pytest.param(25, marks=pytest.mark.slow)])
def test_second_order_beats_first_in_few_steps(n):
    x_T = np.linspace(-2, 2, 8, dtype=np.float32)[:, None]
    first, second = (
        np.abs(np.asarray(runner(n, name)(x_T, None)) - ode_end(x_T)).max()
        for name in ("ddim", "dpm++2m")
    )
    assert second < first / 2


def test_ancestral_loop_follows_the_equations():
    s = FULL.respace(9)
    rng = np.random.default_rng(1)
    x_T, noise = rng.standard_normal((2, 3)), rng.standard_normal((9, 2, 3))
    value = 0.3
    denoise = gaussian.make_denoise(
        lambda x, t: jnp.concatenate([exact_x0(FULL)(x, t), jnp.full_like(x, value)], -1),
        s,
        parametrisation="x0",
        variance="learned_range",
        clip=0.8,
    )
    got = samplers.sample(denoise, s, x_T, None, noise=jnp.asarray(noise))
    x = x_T
    for visit, i in enumerate(range(8, -1, -1)):
        a = s.alpha_bar[i]
        below = s.alpha_bar[i - 1] if i else 1.0
        alpha = a / below
        t = jnp.full(2, s.timesteps[i])
        x0 = np.clip(np.asarray(exact_x0(FULL)(jnp.float32(x), t), np.float64), -0.8, 0.8)
        if i == 0:
            x = x0
            break
        small, large = (1 - alpha) * (1 - below) / (1 - a), 1 - alpha
        std = np.exp(0.5 * ((1 + value) / 2 * np.log(large) + (1 - value) / 2 * np.log(small)))
        mean = (below**0.5 * (1 - alpha) * x0 + alpha**0.5 * (1 - below) * x) / (1 - a)
        x = mean + std * noise[visit]
    np.testing.assert_allclose(got, x, atol=1e-5)


@pytest.mark.parametrize("n", [pytest.param(1000, marks=pytest.mark.slow), 25])
def test_ddim_with_eta_one_is_ancestral_sampling(n):
    rng = np.random.default_rng(2)
    x_T = rng.standard_normal((2, 3)).astype(np.float32)
    noise = rng.standard_normal((n, 2, 3)).astype(np.float32)
    ancestral = runner(n, "ddpm")(x_T, None, noise)
    ddim = runner(n, "ddim", 1.0)(x_T, None, noise)
    np.testing.assert_allclose(ddim, ancestral, atol=2e-5)


def test_a_denoiser_without_variance_gets_beta_tilde():
    s, keys = FULL.respace(8), keys_of(2)
    x_T = draw_noise(keys, SHAPE)
    full = denoiser(s)
    bare = jax.jit(
        functools.partial(samplers.sample, lambda x, t: full(x, t)._replace(log_variance=None), s)
    )(x_T, keys)
    np.testing.assert_allclose(bare, runner(8, "ddpm")(x_T, keys), atol=1e-6)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.7), ("dpm++2m", 0.0)])
def test_a_picture_alone_is_the_picture_in_a_batch(sampler, eta):
    keys = keys_of(4)
    x_T = draw_noise(keys, SHAPE)
    run = runner(8, sampler, eta)
    batch = run(x_T, keys)
    for k in (0, 3):
        np.testing.assert_allclose(run(x_T[k : k + 1], keys[k : k + 1])[0], batch[k], atol=1e-6)
    backwards = run(x_T[::-1], keys[::-1])[::-1]
    np.testing.assert_allclose(backwards, batch, atol=1e-6)
    assert np.abs(np.asarray(batch[0]) - np.asarray(batch[1])).max() > 0.05


def test_noise_of_a_picture_is_bitwise_its_keys():
    keys = keys_of(3)
    batch = draw_noise(keys, SHAPE, 5)
    np.testing.assert_array_equal(draw_noise(keys[2:], SHAPE, 5)[0], batch[2])
    assert (batch != draw_noise(keys, SHAPE, 6)).all()


def test_given_noise_replaces_the_draws_but_for_the_last():
    keys, n = keys_of(2), 8
    x_T = draw_noise(keys, SHAPE)
    noise = jnp.stack([draw_noise(keys, SHAPE, draw) for draw in range(1, n + 1)])
    run = runner(n, "ddpm")
    want = run(x_T, keys)
    np.testing.assert_allclose(run(x_T, None, noise), want, atol=1e-6)
    np.testing.assert_allclose(run(x_T, None, noise.at[-1].set(1e9)), want, atol=1e-6)
    assert np.abs(np.asarray(run(x_T, None, noise.at[-2].set(1.0)) - want)).max() > 1e-4


def test_different_keys_change_only_random_samplers():
    x_T = draw_noise(keys_of(2), SHAPE)
    for sampler, eta, random in (("ddpm", 0.0, True), ("ddim", 0.0, False), ("ddim", 0.7, True)):
        run = runner(8, sampler, eta)
        same = np.allclose(run(x_T, keys_of(2, 1)), run(x_T, keys_of(2, 2)), atol=1e-4)
        assert same != random, sampler


@pytest.mark.parametrize("sampler", samplers.HAVE_ETA)
def test_eta_can_be_traced(sampler):
    s, keys = FULL.respace(8), keys_of(2)
    x_T = draw_noise(keys, SHAPE)
    run = jax.jit(lambda eta: samplers.sample(denoiser(s), s, x_T, keys, sampler=sampler, eta=eta))
    np.testing.assert_allclose(run(0.0), runner(8, sampler)(x_T, None), atol=1e-6)
    np.testing.assert_allclose(run(0.7), runner(8, sampler, 0.7)(x_T, keys), atol=1e-6)
    assert run._cache_size() == 1


@pytest.mark.parametrize("sampler", sorted(samplers.SAMPLERS))
def test_one_step_is_the_prediction(sampler):
    keys = keys_of(2)
    x_T = draw_noise(keys, SHAPE)
    want = denoiser(FULL)(x_T, jnp.array([999, 999])).x0
    np.testing.assert_allclose(runner(1, sampler)(x_T, keys), want, atol=1e-6)


@pytest.mark.parametrize(
    "variance",
    [
        v if v == "learned_range" else pytest.param(v, marks=pytest.mark.slow)
        for v in gaussian.VARIANCES
    ],
)
@pytest.mark.parametrize("sampler", sorted(samplers.SAMPLERS))
def test_gradients_through_a_sampling_are_finite(sampler, variance):
    s, keys = FULL.respace(4), keys_of(2)
    eta = 1.0 if sampler in samplers.HAVE_ETA else 0.0

    def total(weight):
        def model_fn(x, t):
            return weight * jnp.concatenate([x, x], -1) if "learned" in variance else weight * x

        denoise = gaussian.make_denoise(model_fn, s, variance=variance, clip=1.0)
        return samplers.sample(denoise, s, jnp.ones((2, 3)), keys, sampler=sampler, eta=eta).sum()

    value, slope = jax.jit(jax.value_and_grad(total))(0.5)
    assert np.isfinite(value) and np.isfinite(slope)


def test_the_last_step_can_be_another_network():
    s = FULL.respace(7)

    def model_fn(x_t, t):
        return jax.lax.cond(
            t[0] == s.timesteps[0], lambda x: jnp.full_like(x, 0.7), lambda x: 0 * x, x_t
        )

    denoise = gaussian.make_denoise(model_fn, s, parametrisation="x0")
    np.testing.assert_allclose(samplers.sample(denoise, s, jnp.ones((2, 3)), keys_of(2)), 0.7)


def test_inversion_leads_back_to_the_picture():
    rng = np.random.default_rng(3)
    x_0 = (MEAN + STD * rng.standard_normal((2, *SHAPE))).astype(np.float32)

    def error(n, iterations):
        s = FULL.respace(n)
        x_T = jax.jit(lambda x: samplers.ddim_invert(denoiser(s), s, x, iterations=iterations))(x_0)
        return np.abs(np.asarray(runner(n, "ddim")(x_T, None)) - x_0).max(), x_T

    once, _ = error(20, 1)
    finer, x_T = error(80, 1)
    solved, _ = error(20, 8)
    assert once < 0.2 and finer < once / 2.5 and solved < 1e-3 < once
    # The data's deviation became the noise's.
    score = (x_0 - MEAN) / STD
    np.testing.assert_allclose(x_T, score, atol=0.1)


def test_a_loop_can_be_watched():
    """Every k-th call and the last, with picture 0 as predicted; nothing of it where not asked."""
    s, keys = FULL.respace(7), keys_of(2)
    x_T = draw_noise(keys, SHAPE)
    told = []

    def run(tell, sampler="ddim", every=3):
        draw = lambda x: samplers.sample(
            denoiser(s), s, x, None, sampler=sampler, tell=tell, tell_every=every
        )
        return jax.jit(draw)

    watched = run(lambda *what: told.append(what))
    want = run(None)(x_T)
    np.testing.assert_array_equal(watched(x_T), want)
    jax.effects_barrier()
    assert sorted(int(done) for done, _ in told) == [3, 6, 7]
    last = dict((int(done), x_0) for done, x_0 in told)[7]
    np.testing.assert_allclose(last, want[0], atol=1e-6)
    assert "callback" not in run(None).lower(x_T).as_text()
    assert "callback" in watched.lower(x_T).as_text()
    told.clear()
    run(lambda *what: told.append(what), "heun", 5)(x_T)
    jax.effects_barrier()
    assert sorted(int(done) for done, _ in told) == [5, 10, 13]
    with pytest.raises(errors.ConfigError, match="tell_every 0"):
        run(print, every=0)(x_T)


def test_errors():
    s, x_T, keys = FULL.respace(4), jnp.ones((2, 3)), keys_of(2)
    run = functools.partial(samplers.sample, denoiser(s), s, x_T)
    with pytest.raises(errors.ConfigError, match="did you mean 'ddim'"):
        run(keys, sampler="dim")
    with pytest.raises(errors.ConfigError, match="from 0 to 1"):
        run(keys, sampler="ddim", eta=1.5)
    with pytest.raises(errors.ConfigError, match=r"only 'ddim', .* have an eta"):
        run(keys, sampler="ddpm", eta=0.5)
    with pytest.raises(errors.ConfigError, match=r"expected \(4, 2, 3\)"):
        run(keys, noise=jnp.zeros((3, 2, 3)))
    with pytest.raises(errors.ConfigError, match=r"keys None.*2 typed"):
        run(None)
    with pytest.raises(errors.ConfigError, match="needs 2 typed"):
        run(keys[:1])
    with pytest.raises(errors.ConfigError, match="iterations"):
        samplers.ddim_invert(denoiser(s), s, x_T, iterations=0)
