"""Training objectives of the diffusion models, one number per sample.

unCLIP (arXiv 2204.06125) trains the prior on the mean squared error of x_0 (its eq. 2) and the
decoder, as GLIDE, on Improved DDPM's hybrid: L_simple (DDPM, arXiv 2006.11239, eq. 14) plus a
little of the variational bound (Improved DDPM, arXiv 2102.09672, eqs. 4-7 and 16) that trains the
learned variance alone. min-SNR weights: arXiv 2303.09556.

Every function returns float32 [B], a mean over the other axes. The bound is in bits per dimension.
x_0 is float32 [B, ..., C]; t is int32 [B], original indices; eps is the noise that made x_t.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from unclip import errors
from unclip.diffusion import gaussian
from unclip.diffusion.gaussian import Prediction
from unclip.diffusion.schedule import Schedule

# Above this, exp() is continued as a straight line: its square, and so a gradient norm, stays
# finite in float32, and the slope still pushes a variance that has grown too large back.
_EXP_LIMIT = 40.0


def _mean(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1).mean(axis=1)


def _exp(x: jax.Array) -> jax.Array:
    capped = jnp.exp(jnp.minimum(x, _EXP_LIMIT))
    return capped * (1 + jnp.maximum(x - _EXP_LIMIT, 0))


def gaussian_kl(
    mean_1: jax.Array, log_variance_1: jax.Array, mean_2: jax.Array, log_variance_2: jax.Array
) -> jax.Array:
    """KL(N_1 || N_2) of diagonal Gaussians, elementwise, in nats; arguments broadcast.

    Finite in float32, with finite gradients, for log variances up to 1e6 either way.
    """
    ratio = log_variance_1 - log_variance_2
    distance = (mean_1 - mean_2) ** 2 * _exp(-log_variance_2)
    return 0.5 * (_exp(ratio) - 1 - ratio + distance)


def _log_cdf(x: jax.Array) -> jax.Array:
    # The far tail is the asymptotic series, whose derivative, unlike that of the logarithm of a
    # vanishing cdf, has no cancelling exponentials.
    near = jnp.log(0.5 * jax.lax.erfc(jnp.maximum(x, -10.0) * -(0.5**0.5)))
    far = jnp.clip(x, -1e15, -10.0)
    inverse = 1 / far**2
    series = jnp.log1p(inverse * (-1 + inverse * (3 - 15 * inverse)))
    tail = -0.5 * far**2 - jnp.log(-far) - 0.5 * np.log(2 * np.pi) + series
    return jnp.where(x < -10.0, tail, near)


def discretised_log_likelihood(
    x_0: jax.Array, mean: jax.Array, log_variance: jax.Array
) -> jax.Array:
    """Log probability, in nats, of 8-bit pictures under a Gaussian (DDPM eq. 13), elementwise.

    Each of the 256 levels owns the interval of width 2/255 around it; the outermost two reach to
    infinity, so that the probabilities of all levels add up to 1.

    Args:
      x_0: levels k / 127.5 - 1, in [-1, 1].
      mean, log_variance: of the Gaussian, broadcastable to x_0.
    """
    inverse_std = _exp(-0.5 * log_variance)
    low = (x_0 - mean - 1 / 255) * inverse_std
    high = (x_0 - mean + 1 / 255) * inverse_std
    bottom, top = x_0 < -0.999, x_0 > 0.999
    # Mirrored into the lower tail, where the difference of two cdfs keeps its digits; an open
    # interval has only one end.
    mirror = jnp.where(bottom | top, top, low + high > 0)
    log_high = _log_cdf(jnp.where(mirror, -low, high))
    log_low = _log_cdf(jnp.where(mirror, -high, low))
    both = jnp.log(-jnp.expm1(jnp.minimum(log_low - log_high, -1e-7)))
    return log_high + jnp.where(bottom | top, 0.0, both)


def min_snr_weight(
    schedule: Schedule, t: jax.Array, *, gamma: float = 5.0, parametrisation: str = "eps"
) -> jax.Array:
    """Min-SNR weight of a sample's squared error (arXiv 2303.09556 section 3.4): float32 [B].

    min(SNR, gamma) on the error of x_0, which is min(SNR, gamma) / SNR on that of eps and
    min(SNR, gamma) / (SNR + 1) on that of v.

    Raises:
      ConfigError: unknown parametrisation or a gamma that is not positive.
    """
    if not gamma > 0:
        raise errors.ConfigError(f"min-SNR gamma {gamma!r}: expected a positive number")
    snr = schedule.signal_to_noise
    per = {"x0": 1.0, "eps": snr, "v": snr + 1}
    if parametrisation not in per:
        raise errors.unknown("parametrisation", parametrisation, per)
    return schedule.at(np.minimum(snr, gamma) / per[parametrisation], t)


def l_simple(
    schedule: Schedule,
    x_0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    output: jax.Array,
    *,
    parametrisation: str = "eps",
    min_snr_gamma: float | None = None,
) -> jax.Array:
    """Squared error of what the network predicts (DDPM eq. 14), min-SNR weighted if asked: [B].

    Args:
      output: the network's prediction, without variance channels: the shape of x_0.
      parametrisation: "eps", "x0" or "v", what it predicts.
      min_snr_gamma: gamma of `min_snr_weight`; None weighs every t alike.

    Raises:
      ConfigError: output is not of x_0's shape, or an unknown parametrisation.
    """
    if output.shape != x_0.shape:
        raise errors.ConfigError(
            f"the network gives {output.shape} for x_0 of shape {x_0.shape}; expected equal shapes"
        )
    wanted = gaussian.target(schedule, x_0, t, eps, parametrisation)
    loss = _mean((wanted - output.astype(jnp.float32)) ** 2)
    if min_snr_gamma is None:
        return loss
    weight = min_snr_weight(schedule, t, gamma=min_snr_gamma, parametrisation=parametrisation)
    return weight * loss


def l_vlb(
    schedule: Schedule, x_0: jax.Array, x_t: jax.Array, t: jax.Array, prediction: Prediction
) -> jax.Array:
    """One term of the variational bound, in bits per dimension: [B].

    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) (Improved DDPM eq. 6); at the first
    step L_0 = -log p(x_0 | x_1), discretised (eq. 5). The whole bound on a picture is the sum over
    the schedule's steps, plus `l_prior`.

    Args:
      x_0: 8-bit pictures in [-1, 1]; for other data the first term has no meaning.
      prediction: with its log_variance.

    Raises:
      ConfigError: the prediction has no log variance.
    """
    if prediction.log_variance is None:
        raise errors.ConfigError("l_vlb needs a prediction with a log variance; this one has None")
    true_mean, true_log_variance = gaussian.posterior(schedule, x_0, x_t, t)
    mean, _ = gaussian.posterior(schedule, prediction.x0, x_t, t)
    kl = gaussian_kl(true_mean, true_log_variance, mean, prediction.log_variance)
    decoder = -discretised_log_likelihood(x_0, mean, prediction.log_variance)
    return jnp.where(schedule.is_first(t), _mean(decoder), _mean(kl)) / np.log(2)


def bits_per_dimension(
    denoise: Callable[[jax.Array, jax.Array], Prediction],
    schedule: Schedule,
    x_0: jax.Array,
    keys: jax.Array,
) -> dict[str, jax.Array]:
    """The whole variational bound on 8-bit pictures: every step's `l_vlb`, then `l_prior`.

    One call of denoise a step; x_t is drawn anew at each (Improved DDPM's evaluation).

    Args:
      denoise: (x_t [B, ...], t int32 [B]) -> Prediction with its log variance, without guidance.
      schedule: all of its steps are visited; a respaced one bounds the likelihood of the coarser
        process.
      x_0: float32 [B, ...], 8-bit pictures in [-1, 1].
      keys: typed keys [B], one a picture.

    Returns:
      {"bits_per_dimension": [B], their sum; "terms": [n, B], by step, ascending in t;
      "prior": [B]}.
    """

    def term(_, step):
        at, t = step
        noise = lambda key: jax.random.normal(jax.random.fold_in(key, at), x_0.shape[1:])
        steps = jnp.full(x_0.shape[0], t)
        x_t = gaussian.q_sample(schedule, x_0, steps, jax.vmap(noise)(keys))
        return None, l_vlb(schedule, x_0, x_t, steps, denoise(x_t, steps))

    visited = jnp.arange(len(schedule)), jnp.asarray(schedule.timesteps)
    _, terms = jax.lax.scan(term, None, visited)
    prior = l_prior(schedule, x_0)
    return {"bits_per_dimension": terms.sum(0) + prior, "terms": terms, "prior": prior}


def l_prior(schedule: Schedule, x_0: jax.Array) -> jax.Array:
    """L_T = KL(q(x_T | x_0) || N(0, 1)) in bits per dimension (Improved DDPM eq. 7): [B]."""
    mean = np.sqrt(schedule.alpha_bar[-1]) * x_0
    kl = gaussian_kl(mean, np.log1p(-schedule.alpha_bar[-1]), 0.0, 0.0)
    return _mean(kl) / np.log(2)


def learned_vlb(
    schedule: Schedule,
    x_0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    output: jax.Array,
    *,
    parametrisation: str = "eps",
) -> jax.Array:
    """`l_vlb` of a raw output [B, ..., 2C], its mean half under stop_gradient: bits/dim, [B]."""
    mean, value = gaussian.split_variance(output, x_0.shape[-1])
    output = jnp.concatenate([jax.lax.stop_gradient(mean), value], axis=-1)
    x_t = gaussian.q_sample(schedule, x_0, t, eps)
    prediction = gaussian.predict(
        schedule, x_t, t, output, parametrisation=parametrisation, variance="learned_range"
    )
    return l_vlb(schedule, x_0, x_t, t, prediction)


def hybrid(
    schedule: Schedule,
    x_0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    output: jax.Array,
    *,
    parametrisation: str = "eps",
    vlb_weight: float | None = None,
    min_snr_gamma: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(L_hybrid, L_simple, L_vlb), [B] each: the first is w L_simple + lambda L_vlb (Improved DDPM
    eq. 16), w being min-SNR's weight, 1 without it; the second is not weighted.

    The bound trains the variance channels alone: the mean is under stop_gradient in it.

    Args:
      output: [B, ..., 2C], prediction and variance value.
      vlb_weight: weight of one term of the bound, in bits per dimension. Improved DDPM's lambda is
        0.001 on the sum over all steps; a uniformly drawn t stands for len(schedule) terms, so
        the default is len(schedule) / 1000, what guided-diffusion calls rescaled learned sigmas.
      min_snr_gamma: of w, see `min_snr_weight`.

    Raises:
      ConfigError: output is not twice as deep as x_0, or an unknown parametrisation.
    """
    mean, _ = gaussian.split_variance(output, x_0.shape[-1])
    simple = l_simple(schedule, x_0, t, eps, mean, parametrisation=parametrisation)
    weighted = simple
    if min_snr_gamma is not None:
        snr = {"gamma": min_snr_gamma, "parametrisation": parametrisation}
        weighted = min_snr_weight(schedule, t, **snr) * simple
    weight = len(schedule) / 1000 if vlb_weight is None else vlb_weight
    bound = learned_vlb(schedule, x_0, t, eps, output, parametrisation=parametrisation)
    return weighted + weight * bound, simple, bound
