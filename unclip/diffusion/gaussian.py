"""The Gaussian diffusion process, and a network used as a denoiser of it.

The process runs over CLIP embeddings in the prior (which predicts x_0) and over pictures in the
decoder and the upsamplers (which predict eps; the decoder also its variance). Equations: DDPM
(arXiv 2006.11239) for the process, Improved DDPM (2102.09672, eq. 15) for the learned variance,
Progressive Distillation (2202.00512, appendix D) for v.

Arrays are float32 [B, H, W, C] pictures or [B, D] vectors; t is int32 [B], original indices.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip import errors
from unclip.diffusion.schedule import Schedule

PARAMETRISATIONS = ("eps", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")

ModelFn = Callable[[jax.Array, jax.Array], jax.Array]
Clip = None | float | Callable[[jax.Array], jax.Array]


class Prediction(NamedTuple):
    """What a denoiser says about x_t.

    Attributes:
      x0: [B, ...], predicted x_0, after clipping.
      eps: [B, ...], the noise that goes with it: x_t = sqrt(alpha_bar) x0 + sqrt(1-alpha_bar) eps.
      log_variance: natural log variance of p(x_{t-1} | x_t), broadcastable to x0; None leaves the
        choice to the sampler.
    """

    x0: jax.Array
    eps: jax.Array
    log_variance: jax.Array | None = None


def expand(values: jax.Array, like: jax.Array) -> jax.Array:
    """Values [B] with trailing axes of size 1, to broadcast against like [B, ...]."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def scales(schedule: Schedule, t: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(signal, sigma) of x_t = signal x_0 + sigma eps, each [B, 1, ...], to broadcast against like.

    signal = sqrt(alpha_bar_t), sigma = sqrt(1 - alpha_bar_t).
    """
    signal = schedule.at(np.sqrt(schedule.alpha_bar), t)
    sigma = schedule.at(np.sqrt(1 - schedule.alpha_bar), t)
    return expand(signal, like), expand(sigma, like)


def q_sample(schedule: Schedule, x_0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """x_t ~ q(x_t | x_0) from standard normal eps (DDPM eq. 4): [B, ...]."""
    signal, sigma = scales(schedule, t, x_0)
    return signal * x_0 + sigma * eps


def _known(parametrisation: str) -> None:
    if parametrisation not in PARAMETRISATIONS:
        raise errors.unknown("parametrisation", parametrisation, PARAMETRISATIONS)


def check(parametrisation: str, variance: str) -> None:
    """Refuses what `predict` does not know.

    Raises:
      ConfigError: unknown parametrisation or variance.
    """
    _known(parametrisation)
    if variance not in VARIANCES:
        raise errors.unknown("variance", variance, VARIANCES)


def predict_x0(
    schedule: Schedule, x_t: jax.Array, t: jax.Array, output: jax.Array, parametrisation: str
) -> jax.Array:
    """x_0 from a network's output in any parametrisation, "eps", "x0" or "v" (DDPM eq. 15)."""
    _known(parametrisation)
    if parametrisation == "x0":
        return output
    signal, sigma = scales(schedule, t, x_t)
    if parametrisation == "v":
        return signal * x_t - sigma * output
    return (x_t - sigma * output) / signal


def predict_eps(
    schedule: Schedule, x_t: jax.Array, t: jax.Array, output: jax.Array, parametrisation: str
) -> jax.Array:
    """eps from a network's output in any parametrisation (inverse of DDPM eq. 4)."""
    _known(parametrisation)
    if parametrisation == "eps":
        return output
    signal, sigma = scales(schedule, t, x_t)
    if parametrisation == "v":
        return sigma * x_t + signal * output
    return (x_t - signal * output) / sigma


def target(
    schedule: Schedule, x_0: jax.Array, t: jax.Array, eps: jax.Array, parametrisation: str
) -> jax.Array:
    """What the network should have predicted, given x_0 and the eps that was added: [B, ...]."""
    _known(parametrisation)
    if parametrisation == "v":
        signal, sigma = scales(schedule, t, x_0)
        return signal * eps - sigma * x_0
    return x_0 if parametrisation == "x0" else eps


def posterior(
    schedule: Schedule, x_0: jax.Array, x_t: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """q(x_{t-1} | x_t, x_0), where t-1 means the kept step below (DDPM eqs. 6-7).

    Returns:
      (mean [B, ...], log variance [B, 1, ...]). At the first step the mean is x_0 and the true
      variance 0; the log variance is then the second step's, so that it stays finite.
    """
    s = schedule
    from_x0 = s.betas * np.sqrt(s.alpha_bar_prev) / (1 - s.alpha_bar)
    from_xt = np.sqrt(1 - s.betas) * (1 - s.alpha_bar_prev) / (1 - s.alpha_bar)
    mean = expand(s.at(from_x0, t), x_t) * x_0 + expand(s.at(from_xt, t), x_t) * x_t
    return mean, expand(s.at(s.posterior_log_variance, t), x_t)


def fixed_small(schedule: Schedule, t: jax.Array) -> jax.Array:
    """Log of beta_tilde_t (DDPM section 3.2, the lower bound): float32 [B].

    The first step's, 0 in truth, is the second's, as in Improved DDPM's code. Karlo's
    fixed_small_log has 1e-20 there; only the bound reads it, since the last step of a draw adds no
    noise, and a picture's likelihood under a deviation of 1e-10 has no meaning.
    """
    return schedule.at(schedule.posterior_log_variance, t)


def fixed_large(schedule: Schedule, t: jax.Array) -> jax.Array:
    """Log of beta_t (DDPM section 3.2, the upper bound): float32 [B].

    The first step's is that of `fixed_small`, as in Improved DDPM's code.
    """
    log = np.append(schedule.posterior_log_variance[:1], np.log(schedule.betas[1:]))
    return schedule.at(log, t)


def learned_range(schedule: Schedule, t: jax.Array, value: jax.Array) -> jax.Array:
    """Log variance between the two fixed ones, by a network's value (Improved DDPM eq. 15).

    Args:
      value: [B, ...]; -1 gives log beta_tilde_t (clipped at the first step), +1 log beta_t.

    Returns:
      float32, the shape of value.
    """
    low = expand(schedule.at(schedule.posterior_log_variance, t), value)
    high = expand(schedule.at(np.log(schedule.betas), t), value)
    fraction = (value + 1) / 2
    return fraction * high + (1 - fraction) * low


def with_analytic_variance(
    denoise: Callable[[jax.Array, jax.Array], Prediction], schedule: Schedule, x0_error: jax.Array
) -> Callable[[jax.Array, jax.Array], Prediction]:
    """denoise with the variance that is best for its mean (Analytic-DPM, arXiv 2201.06503, eq. 8).

    p(x_{t-1} | x_t) has beside beta_tilde_t, which q leaves open even if x_0 is known, what x_0
    itself leaves open: c^2 E|x_0 - x_0(x_t)|^2 / d, c being the posterior mean's factor of x_0. The
    expectation is measured on data instead of following from the mean square of eps, which is the
    same for the best predictor, and stays right for one that is not.

    Args:
      schedule: the one that is sampled, already respaced.
      x0_error: float32 [total], mean squared error of x_0 a dimension by original timestep.
    """
    s = schedule
    factor = s.betas * np.sqrt(s.alpha_bar_prev) / (1 - s.alpha_bar)

    def analytic(x_t: jax.Array, t: jax.Array) -> Prediction:
        known = s.at(s.posterior_variance, t)
        left = s.at(factor, t) ** 2 * jnp.asarray(x0_error)[t]
        log_variance = jnp.log(jnp.maximum(known + left, 1e-20))
        return denoise(x_t, t)._replace(log_variance=expand(log_variance, x_t))

    return analytic


def split_variance(output: jax.Array, channels: int) -> tuple[jax.Array, jax.Array]:
    """A raw output [..., 2C] as (mean part [..., C], variance value [..., C]).

    Raises:
      ConfigError: the last axis is not 2C.
    """
    if output.shape[-1] != 2 * channels:
        raise errors.ConfigError(
            f"a learned variance needs {2 * channels} output channels for {channels} data "
            f"channels; the network gives {output.shape[-1]}"
        )
    return output[..., :channels], output[..., channels:]


def predict(
    schedule: Schedule,
    x_t: jax.Array,
    t: jax.Array,
    output: jax.Array,
    *,
    parametrisation: str = "eps",
    variance: str = "fixed_small",
    clip: Clip = None,
) -> Prediction:
    """Reads a network's raw output as a `Prediction`.

    Args:
      output: [B, ..., C], or [B, ..., 2C] when the variance is learned.
      parametrisation: what its first C channels are: "eps", "x0" or "v".
      variance: "fixed_small", "fixed_large" or "learned_range".
      clip: None; a number c, which clamps x_0 to [-c, c]; or a function of x_0 such as
        `guidance.dynamic_threshold`. After clipping, eps is derived again from x_0.

    Raises:
      ConfigError: unknown name, or an output whose shape does not fit.
    """
    if variance not in VARIANCES:
        raise errors.unknown("variance", variance, VARIANCES)
    output = output.astype(jnp.float32)
    if variance == "learned_range":
        output, value = split_variance(output, x_t.shape[-1])
        log_variance = learned_range(schedule, t, value)
    else:
        fixed = fixed_small if variance == "fixed_small" else fixed_large
        log_variance = expand(fixed(schedule, t), x_t)
    if output.shape != x_t.shape:
        raise errors.ConfigError(
            f"the network gives {output.shape} for x_t of shape {x_t.shape}; with variance "
            f"{variance!r} the shapes must be equal"
        )
    x0 = predict_x0(schedule, x_t, t, output, parametrisation)
    if clip is None:
        eps = predict_eps(schedule, x_t, t, output, parametrisation)
    else:
        x0 = clip(x0) if callable(clip) else jnp.clip(x0, -clip, clip)
        eps = predict_eps(schedule, x_t, t, x0, "x0")
    return Prediction(x0, eps, log_variance)


def make_denoise(
    model_fn: ModelFn,
    schedule: Schedule,
    *,
    parametrisation: str = "eps",
    variance: str = "fixed_small",
    clip: Clip = None,
) -> Callable[[jax.Array, jax.Array], Prediction]:
    """The function the samplers call: denoise(x_t [B, ...], t int32 [B]) -> Prediction.

    Args:
      model_fn: (x_t, t) -> raw output, guidance included; see `predict` for its shape and for the
        other arguments.
      schedule: the one that is sampled, already respaced, from which the variances are computed.

    Raises:
      ConfigError: unknown parametrisation or variance.
    """
    check(parametrisation, variance)

    def denoise(x_t: jax.Array, t: jax.Array) -> Prediction:
        return predict(
            schedule,
            x_t,
            t,
            model_fn(x_t, t),
            parametrisation=parametrisation,
            variance=variance,
            clip=clip,
        )

    return denoise
