"""Losses against numerical integration and float64 loops."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip import errors
from unclip.diffusion import gaussian, losses, schedule

# Float32 sums in differently fused programs agree to 1e-5 only where XLA optimises them.
pytestmark = pytest.mark.usefixtures("optimised")
FULL = schedule.cosine()
RESPACED = FULL.respace(timesteps=[0, 1, 250, 487, 999])
RNG = np.random.default_rng(0)
SHAPE = (4, 2, 3, 3)
T = np.array([0, 1, 487, 999], np.int32)
X_0 = RNG.integers(0, 256, SHAPE) / 127.5 - 1
EPS = RNG.standard_normal(SHAPE)
MEAN = RNG.standard_normal(SHAPE)
VALUE = RNG.uniform(-1, 1, SHAPE)

log_likelihood = jax.jit(losses.discretised_log_likelihood)


@functools.cache
def measured(s, parametrisation="eps"):
    """output -> {loss: ([B], gradient of its sum)} for each loss of a raw output."""

    def l_simple(output, **kwargs):
        return losses.l_simple(s, X_0, T, EPS, output[..., :3], **kwargs)

    named = {"simple": l_simple}
    named["learned_vlb"] = functools.partial(losses.learned_vlb, s, X_0, T, EPS)
    named["hybrid"] = lambda output, **kwargs: losses.hybrid(s, X_0, T, EPS, output, **kwargs)[0]

    def measure(output):
        result = {}
        for name, loss in named.items():
            value, back = jax.vjp(functools.partial(loss, parametrisation=parametrisation), output)
            result[name] = value, back(jnp.ones_like(value))[0]
        return result

    return jax.jit(measure)


@jax.jit
@jax.value_and_grad
def absurd(log_variance):
    kl = losses.gaussian_kl(0.1, -9.0, 0.2, log_variance)
    kl += losses.gaussian_kl(0.1, log_variance, 0.2, -9.0)
    level = jnp.array([-1.0, 1 / 255, 1.0])
    return kl + losses.discretised_log_likelihood(level, jnp.float32(0.3), log_variance).sum()


def level_probability(k, mean, std):
    """P(level k) in float64, from erfc on whichever side keeps the digits."""

    def upper(x):
        return 0.5 * math.erfc((x - mean) / std / math.sqrt(2))

    def lower(x):
        return 0.5 * math.erfc(-(x - mean) / std / math.sqrt(2))

    low, high = (2 * k - 1) / 255 - 1, (2 * k + 1) / 255 - 1
    if k == 0:
        return lower(high)
    if k == 255:
        return upper(low)
    return upper(low) - upper(high) if low + high > 2 * mean else lower(high) - lower(low)


@pytest.mark.parametrize(
    ("mean_1", "log_1", "mean_2", "log_2"),
    [(0.0, 0.0, 0.0, 0.0), (0.3, -1.0, -0.2, 0.5), (1.0, 1.2, 0.9, -1.5), (-2.0, -3.0, -2.1, -3.2)],
)
def test_kl_is_the_integral(mean_1, log_1, mean_2, log_2):
    def log_density(x, mean, log_variance):
        spread = (x - mean) ** 2 / np.exp(log_variance)
        return -0.5 * (spread + log_variance + np.log(2 * np.pi))

    x = mean_1 + np.exp(0.5 * log_1) * np.linspace(-12, 12, 20001)
    p, q = log_density(x, mean_1, log_1), log_density(x, mean_2, log_2)
    want = np.trapezoid(np.exp(p) * (p - q), x)
    got = losses.gaussian_kl(*map(jnp.float32, (mean_1, log_1, mean_2, log_2)))
    assert float(got) == pytest.approx(want, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("log_variance", [1e6, 200.0, -200.0, -1e6])
def test_kl_and_likelihood_stay_finite_for_absurd_variances(log_variance):
    value, slope = absurd(log_variance)
    assert np.isfinite(value) and np.isfinite(slope)


def test_a_variance_that_ran_away_is_pushed_back():
    slope = jax.jit(jax.grad(lambda x: losses.gaussian_kl(0.0, -9.0, 0.1, x)))
    assert slope(-500.0) < 0 < slope(500.0)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.006), (0.4, 0.05), (-0.99, 0.3), (1.3, 1.0)])
def test_level_probabilities_are_a_distribution(mean, std):
    levels = jnp.arange(256) / 127.5 - 1
    log_p = log_likelihood(levels, mean, 2 * np.log(std))
    log_p = np.asarray(log_p, np.float64)
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-4)
    for k in range(256):
        p = level_probability(k, mean, std)
        if p > 1e-290:
            assert log_p[k] == pytest.approx(math.log(p), rel=1e-3, abs=2e-3), k


def test_far_levels_keep_their_likelihood_and_gradient():
    # 1000 standard deviations out: -z^2/2 dominates, and its slope pulls the mean in.
    @jax.jit
    @jax.value_and_grad
    def log_p(mean):
        return losses.discretised_log_likelihood(jnp.float32(1 / 255), mean, 2 * np.log(1e-3))

    value, slope = log_p(1.0)
    edge = (1 - 2 / 255) / 1e-3
    assert value == pytest.approx(-(edge**2) / 2, rel=1e-3)
    assert slope == pytest.approx(-edge / 1e-3, rel=1e-2)


@pytest.mark.parametrize("parametrisation", gaussian.PARAMETRISATIONS)
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_l_simple_is_the_weighted_error(parametrisation, gamma):
    got = losses.l_simple(
        FULL, X_0, T, EPS, jnp.asarray(MEAN), parametrisation=parametrisation, min_snr_gamma=gamma
    )
    for row, t in enumerate(T):
        a = FULL.alpha_bar[t]
        wanted = {
            "eps": EPS[row],
            "x0": X_0[row],
            "v": a**0.5 * EPS[row] - (1 - a) ** 0.5 * X_0[row],
        }[parametrisation]
        snr = a / (1 - a)
        weight = 1.0
        if gamma:
            weight = min(snr, gamma) / {"eps": snr, "x0": 1, "v": snr + 1}[parametrisation]
        assert got[row] == pytest.approx(weight * ((wanted - MEAN[row]) ** 2).mean(), rel=1e-5)


def test_min_snr_weighs_the_same_x0_error_alike():
    # An error e of x_0 is an error sqrt(snr) e of eps and sqrt(snr + 1) e of v.
    t = np.arange(1000)
    snr = FULL.alpha_bar / (1 - FULL.alpha_bar)
    x0, eps, v = (losses.min_snr_weight(FULL, t, parametrisation=p) for p in ("x0", "eps", "v"))
    np.testing.assert_allclose(x0, np.minimum(snr, 5), rtol=1e-5)
    np.testing.assert_allclose(eps * snr, x0, rtol=1e-5)
    np.testing.assert_allclose(v * (snr + 1), x0, rtol=1e-5)


def numpy_vlb(s, row, x_0, eps, mean, value):
    """One term in bits a dimension: product of Gaussians, KL, or the levels' likelihood."""
    position = list(s.timesteps).index(T[row])
    a = s.alpha_bar[position]
    below = s.alpha_bar[position - 1] if position else 1.0
    alpha = a / below
    x_t = a**0.5 * x_0 + (1 - a) ** 0.5 * eps
    x0_hat = (x_t - (1 - a) ** 0.5 * mean) / a**0.5

    def variance(i):
        now, before = s.alpha_bar[i], s.alpha_bar[i - 1]
        return (1 - now / before) * (1 - before) / (1 - now)

    small = math.log(variance(max(position, 1)))
    log_variance = small + (value + 1) / 2 * (math.log(1 - alpha) - small)
    if position == 0:
        k = np.round((x_0 + 1) * 127.5).astype(int)
        p = [
            level_probability(k, m, math.exp(0.5 * lv))
            for k, m, lv in zip(k.flat, x0_hat.flat, log_variance.flat)
        ]
        return -np.log2(p).mean()
    distance = (below**0.5 * (1 - alpha) / (1 - a)) * (x_0 - x0_hat)
    kl = log_variance - small - 1 + np.exp(small - log_variance)
    return 0.5 * (kl + distance**2 / np.exp(log_variance)).mean() / math.log(2)


@pytest.mark.parametrize("s", [FULL, RESPACED], ids=["all", "respaced"])
def test_l_vlb_is_the_bound_in_bits(s):
    mean = EPS + 0.5 * MEAN
    output = jnp.concatenate([mean, VALUE], -1)

    @jax.jit
    def bound(output):
        x_t = gaussian.q_sample(s, X_0, T, EPS)
        prediction = gaussian.predict(s, x_t, T, output, variance="learned_range")
        return losses.l_vlb(s, X_0, x_t, T, prediction)

    got = bound(output)
    stopped, _ = measured(s)(output)["learned_vlb"]
    np.testing.assert_allclose(stopped, got, rtol=1e-5)
    for row in range(4):
        want = numpy_vlb(s, row, X_0[row], EPS[row], mean[row], VALUE[row])
        assert got[row] == pytest.approx(want, rel=2e-3), row


def test_a_perfect_denoiser_with_the_true_variance_costs_nothing():
    @jax.jit
    def bound(x_0, t, eps):
        x_t = gaussian.q_sample(FULL, x_0, t, eps)
        prediction = gaussian.predict(FULL, x_t, t, x_0, parametrisation="x0")
        return losses.l_vlb(FULL, x_0, x_t, t, prediction)

    np.testing.assert_allclose(bound(X_0[1:], T[1:], EPS[1:]), 0, atol=1e-5)


def test_l_prior_is_small_and_exact():
    s = FULL.respace(timesteps=[0, 700])
    a = FULL.alpha_bar[700]
    want = 0.5 * (a * X_0**2 + (1 - a) - 1 - math.log(1 - a)).mean((1, 2, 3)) / math.log(2)
    np.testing.assert_allclose(losses.l_prior(s, X_0), want, rtol=1e-5)
    assert np.abs(losses.l_prior(FULL, X_0)).max() < 1e-7


def test_hybrid_trains_the_mean_on_l_simple_alone():
    output = jnp.concatenate([EPS + 0.1 * MEAN, VALUE], -1)
    got = measured(FULL)(output)
    hybrid, simple, bound = (got[name][1] for name in ("hybrid", "simple", "learned_vlb"))
    np.testing.assert_allclose(hybrid[..., :3], simple[..., :3], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(hybrid[..., 3:], bound[..., 3:], rtol=1e-5, atol=1e-8)
    assert (bound[..., :3] == 0).all() and (bound[..., 3:] != 0).any((1, 2, 3)).all()
    assert np.isfinite(hybrid).all()


def test_hybrid_weight_is_the_papers_lambda_over_the_whole_sum():
    output = jnp.concatenate([EPS + 0.1 * MEAN, VALUE], -1)
    for s in (FULL, RESPACED):
        got = {name: value for name, (value, _) in measured(s)(output).items()}
        want = got["simple"] + 0.001 * len(s) * got["learned_vlb"]
        np.testing.assert_allclose(got["hybrid"], want, rtol=1e-5)
    given = jax.jit(
        lambda out: losses.hybrid(s, X_0, T, EPS, out, vlb_weight=2.0, min_snr_gamma=1.0)[0]
    )(output)
    weight = losses.min_snr_weight(s, T, gamma=1.0)
    want = weight * got["simple"] + 2.0 * got["learned_vlb"]
    np.testing.assert_allclose(given, want, rtol=1e-5)


@pytest.mark.parametrize("parametrisation", gaussian.PARAMETRISATIONS)
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_hybrid_is_finite_at_every_end_for_wild_networks(parametrisation, size):
    output = size * jnp.concatenate([MEAN, VALUE], -1)
    for leaf in jax.tree.leaves(measured(FULL, parametrisation)(output)):
        assert np.isfinite(leaf).all()


def test_errors():
    with pytest.raises(errors.ConfigError, match="expected equal shapes"):
        losses.l_simple(FULL, X_0, T, EPS, jnp.zeros((4, 2, 3, 6)))
    with pytest.raises(errors.ConfigError, match="needs 6 output channels"):
        losses.hybrid(FULL, X_0, T, EPS, jnp.zeros(SHAPE))
    with pytest.raises(errors.ConfigError, match="gamma"):
        losses.min_snr_weight(FULL, T, gamma=0)
    with pytest.raises(errors.ConfigError, match="parametrisation"):
        losses.min_snr_weight(FULL, T, parametrisation="score")
    with pytest.raises(errors.ConfigError, match="log variance"):
        losses.l_vlb(FULL, X_0, X_0, T, gaussian.Prediction(X_0, EPS))


def guided_diffusion_bound(s, x_0, noise, predicted, variance):
    """The loop of guided-diffusion's calc_bpd_loop in float64: clipped x_0, fixed variances.

    Its `_vb_terms_bpd`: the first term a discretised likelihood, the others Kullback-Leibler
    divergences; log variances of "fixed_small" and "fixed_large" with the first entry clipped.
    """
    a, below, betas = s.alpha_bar, s.alpha_bar_prev, s.betas
    posterior = betas * (1 - below) / (1 - a)
    clipped = np.log(np.append(posterior[1], posterior[1:]))
    model = {"fixed_small": clipped, "fixed_large": np.log(np.append(posterior[1], betas[1:]))}
    terms = []
    for i in range(len(s)):
        x_t = np.sqrt(a[i]) * x_0 + np.sqrt(1 - a[i]) * noise[i]
        c_0 = betas[i] * np.sqrt(below[i]) / (1 - a[i])
        c_t = np.sqrt(1 - betas[i]) * (1 - below[i]) / (1 - a[i])
        mean = c_0 * np.clip(predicted[i], -1, 1) + c_t * x_t
        log_p = model[variance][i]
        if i:
            true = c_0 * x_0 + c_t * x_t
            ratio = clipped[i] - log_p
            nats = 0.5 * (-1 - ratio + np.exp(ratio) + (true - mean) ** 2 * np.exp(-log_p))
        else:
            levels = np.rint((x_0 + 1) * 127.5).astype(int)
            std = np.exp(0.5 * log_p)
            each = [level_probability(k, m, std) for k, m in zip(levels.flat, mean.flat)]
            nats = -np.log(np.maximum(each, 1e-300)).reshape(x_0.shape)
        terms.append(nats.mean((1, 2, 3)) / math.log(2))
    prior = 0.5 * (a[-1] * x_0**2 + (1 - a[-1]) - 1 - math.log(1 - a[-1]))
    return np.array(terms), prior.mean((1, 2, 3)) / math.log(2)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_bits_per_dimension_are_guided_diffusions(variance):
    s = FULL.respace(timesteps=[0, 1, 40, 300, 700, 999])
    keys = jax.random.split(jax.random.key(4), 2)
    x_0 = X_0[:2]
    draw = lambda key, at: jax.random.normal(jax.random.fold_in(key, at), x_0.shape[1:])
    noise = np.array([[draw(key, at) for key in keys] for at in range(len(s))], np.float64)
    # A predictor that is a little off, more so where there is more noise.
    off = np.random.default_rng(2).normal(size=(len(s), *x_0.shape))
    predicted = x_0 + off * np.sqrt(1 - s.alpha_bar)[:, None, None, None, None] * 0.05

    def denoise(x_t, t):
        output = jnp.asarray(predicted, jnp.float32)[s.position(t)[0]]
        options = dict(parametrisation="x0", variance=variance, clip=1.0)
        return gaussian.predict(s, x_t, t, output, **options)

    got = jax.jit(lambda: losses.bits_per_dimension(denoise, s, jnp.float32(x_0), keys))()
    terms, prior = guided_diffusion_bound(s, x_0, noise, predicted, variance)
    np.testing.assert_allclose(got["terms"], terms, rtol=3e-3, atol=3e-5)
    np.testing.assert_allclose(got["prior"], prior, rtol=1e-4, atol=1e-8)
    total = terms.sum(0) + prior
    np.testing.assert_allclose(got["bits_per_dimension"], total, rtol=3e-3)
    assert (total < 20).all()  # with a first deviation of 1e-10 it is 2e15


def test_the_error_is_told_without_its_weight():
    output = jnp.concatenate([EPS + 0.1 * MEAN, VALUE], -1)
    run = lambda gamma: losses.hybrid(FULL, X_0, T, EPS, output, min_snr_gamma=gamma)
    (weighted, simple, bound), (_, plain, _) = run(0.5), run(None)
    np.testing.assert_array_equal(simple, plain)
    weight = losses.min_snr_weight(FULL, T, gamma=0.5)
    np.testing.assert_allclose(weighted, weight * plain + bound, rtol=1e-5)
    assert float(weight[0]) < 0.1
