"""From noise to x_0 and back: the reverse processes, each one jitted loop over a schedule.

unCLIP (arXiv 2204.06125, table 3) samples its decoder with the ancestral process of DDPM (arXiv
2006.11239, algorithm 2) and its upsamplers with DDIM (arXiv 2010.02502, eq. 12), whose inversion
(its section 4.3) also gives the x_T that unCLIP's manipulations keep (section 3). DPM-Solver++(2M)
(arXiv 2211.01095, algorithm 2) is of second order in the steps' length in log-SNR: on Gaussian data
with the exact denoiser, its error at 10 steps is less than half of DDIM's. Nothing was measured on
pictures, where guidance and thresholds break what the order rests on.

A denoiser is any function (x_t, t) -> Prediction, so two networks can share one trajectory, as
Karlo's super-resolution has the last step done by a second network:

    def model_fn(x_t, t):
        return jax.lax.cond(t[0] == schedule.timesteps[0], last_net, first_net, x_t, t)

Every picture has its own key, and its noise depends on nothing else: a picture sampled alone is
the picture sampled in a batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip import errors
from unclip.diffusion import gaussian
from unclip.diffusion.gaussian import Prediction
from unclip.diffusion.schedule import Schedule

Denoise = Callable[[jax.Array, jax.Array], Prediction]
Coefficients = dict[str, np.ndarray]


class _Step(NamedTuple):
    """One step's inputs; c holds the sampler's coefficients as traced float32 scalars."""

    x: jax.Array
    prediction: Prediction
    x0_before: jax.Array
    noise: jax.Array | None
    eta: jax.Array | float
    c: dict[str, jax.Array]


class _Sampler(NamedTuple):
    """A reverse process: float64 [n] coefficients, ascending in t, and one step with them."""

    coefficients: Callable[[Schedule], Coefficients]
    step: Callable[[_Step], jax.Array]
    noisy: Callable[[float], bool]


def _ddpm_coefficients(s: Schedule) -> Coefficients:
    return {
        "x0": s.betas * np.sqrt(s.alpha_bar_prev) / (1 - s.alpha_bar),
        "x": np.sqrt(1 - s.betas) * (1 - s.alpha_bar_prev) / (1 - s.alpha_bar),
        "log_variance": s.posterior_log_variance,
    }


def _ddpm_step(s: _Step) -> jax.Array:
    """DDPM algorithm 2 with the posterior mean of eq. 7 and the prediction's variance."""
    mean = s.c["x0"] * s.prediction.x0 + s.c["x"] * s.x
    learned = s.prediction.log_variance
    log_variance = s.c["log_variance"] if learned is None else learned
    return mean + jnp.exp(0.5 * log_variance) * s.noise


def _ddim_coefficients(s: Schedule) -> Coefficients:
    # sigma^2 of eq. 16 at eta = 1 is beta_tilde, a part `fraction` of the variance below.
    fraction = s.betas / (1 - s.alpha_bar)
    return {
        "x0": np.sqrt(s.alpha_bar_prev),
        "eps": np.sqrt(1 - s.alpha_bar_prev),
        "fraction": np.append(0.0, fraction[1:]),
        "rest": np.append(1.0, 1 - fraction[1:]),  # 4e-8 at the noisiest step: no float32 1 - f
    }


def _ddim_step(s: _Step) -> jax.Array:
    """DDIM eq. 12, with sigma = eta sqrt(beta_tilde) (eq. 16)."""
    if s.noise is None:
        return s.c["x0"] * s.prediction.x0 + s.c["eps"] * s.prediction.eps
    random = s.eta * jnp.sqrt(s.c["fraction"])
    kept = jnp.sqrt(1 - s.eta**2 + s.eta**2 * s.c["rest"])
    direction = kept * s.prediction.eps + random * s.noise
    return s.c["x0"] * s.prediction.x0 + s.c["eps"] * direction


def _dpm_coefficients(s: Schedule) -> Coefficients:
    half_log_snr = 0.5 * np.log(s.signal_to_noise)
    # The last step, to infinite signal-to-noise, is the prediction itself: see `sample`.
    h = np.append(np.inf, half_log_snr[:-1] - half_log_snr[1:])
    # First order at the first step, which has no step before it, and at the one into the first
    # timestep: with timesteps evenly spaced in t that step is so long in log-SNR that extrapolating
    # would overshoot.
    slope = np.zeros(len(s))
    slope[2:-1] = h[2:-1] / (2 * h[3:])
    return {
        "x": np.sqrt((1 - s.alpha_bar_prev) / (1 - s.alpha_bar)),
        "x0": -np.sqrt(s.alpha_bar_prev) * np.expm1(-h),
        "slope": slope,
    }


def _dpm_step(s: _Step) -> jax.Array:
    """DPM-Solver++(2M), algorithm 2: x_0 extrapolated from this step and the one before."""
    x0 = s.prediction.x0 + s.c["slope"] * (s.prediction.x0 - s.x0_before)
    return s.c["x"] * s.x + s.c["x0"] * x0


def _traced(value) -> bool:
    return isinstance(value, jax.core.Tracer)


SAMPLERS: dict[str, _Sampler] = {
    "ddpm": _Sampler(_ddpm_coefficients, _ddpm_step, lambda eta: True),
    "ddim": _Sampler(_ddim_coefficients, _ddim_step, lambda eta: _traced(eta) or eta > 0),
    "dpm++2m": _Sampler(_dpm_coefficients, _dpm_step, lambda eta: False),
}


HAVE_ETA = ("ddim",)


def check(sampler: str, eta: float | jax.Array) -> None:
    """Refuses an unknown sampler, and an eta that is out of range or not the sampler's.

    Raises:
      ConfigError: names the samplers there are, or those that have an eta. A traced eta passes.
    """
    if sampler not in SAMPLERS:
        raise errors.unknown("sampler", sampler, SAMPLERS)
    if _traced(eta):
        return
    if not 0 <= eta <= 1:
        raise errors.ConfigError(f"eta {eta!r}: expected a number from 0 to 1")
    if sampler not in HAVE_ETA and eta != 0:
        only = " and ".join(map(repr, HAVE_ETA))
        raise errors.ConfigError(f"eta {eta!r} with sampler {sampler!r}: only {only} has an eta")


def draw_noise(keys: jax.Array, shape: tuple[int, ...], draw: int | jax.Array = 0) -> jax.Array:
    """Standard normal noise, row k from keys[k] alone.

    Args:
      keys: typed PRNG keys [B], one per picture.
      shape: of one picture, e.g. (H, W, C).
      draw: which draw of each key; 0 is meant for x_T, and `sample` takes 1 to n.

    Returns:
      float32 [B, *shape].
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, draw), shape))(keys)


def sample(
    denoise: Denoise,
    schedule: Schedule,
    x_T: jax.Array,
    keys: jax.Array | None,
    *,
    sampler: str = "ddpm",
    eta: float | jax.Array = 0.0,
    noise: jax.Array | None = None,
) -> jax.Array:
    """Runs the reverse process from x_T to x_0, with one call of denoise per step.

    Works under jit with denoise, schedule and sampler closed over; only denoise clamps. The last
    step returns the predicted x_0, without noise, in every sampler.

    Args:
      denoise: (x_t [B, ...], t int32 [B]) -> Prediction; t are original indices.
      schedule: the respaced one, visited from its last step to its first.
      x_T: float32 [B, ...], standard normal noise, or x_t at the schedule's greatest t.
      keys: typed PRNG keys [B]; may be None when nothing is drawn (ddim with eta 0, dpm++2m).
      sampler: "ddpm" (the prediction's variance, else beta_tilde), "ddim" or "dpm++2m".
      eta: DDIM's randomness, 0 deterministic to 1 ancestral; a traced eta is not checked.
      noise: float32 [n, B, ...] to use in place of the draws, first visited step first; its last
        entry, at the step to x_0, is not used.

    Returns:
      x_0, float32 [B, ...].

    Raises:
      ConfigError: unknown sampler, bad eta, noise of another shape, missing or miscounted keys.
    """
    check(sampler, eta)
    method = SAMPLERS[sampler]
    noisy = method.noisy(eta)
    x_T = jnp.asarray(x_T, jnp.float32)
    n, batch = len(schedule), x_T.shape[0]
    if noise is not None and noise.shape != (n, *x_T.shape):
        raise errors.ConfigError(f"noise {noise.shape}: expected {(n, *x_T.shape)}, one per step")
    if noisy and noise is None and (keys is None or keys.shape != (batch,)):
        given = "None" if keys is None else f"shape {keys.shape}"
        raise errors.ConfigError(
            f"keys {given}: sampler {sampler!r} needs {batch} typed PRNG keys, one per picture"
        )

    def body(carry, step):
        x, x0_before = carry
        prediction = denoise(x, jnp.full(batch, step["t"], jnp.int32))
        z = None
        if noisy:
            z = draw_noise(keys, x.shape[1:], step["draw"]) if noise is None else step["noise"]
        x_next = method.step(_Step(x, prediction, x0_before, z, eta, step["c"]))
        # Selected, not multiplied by zero, so that not even NaN in the last step's noise has
        # effect.
        x_next = jnp.where(step["draw"] == n, prediction.x0, x_next)
        return (x_next, prediction.x0), None

    coefficients = method.coefficients(schedule)
    steps = {
        "t": jnp.asarray(schedule.timesteps[::-1]),
        "draw": jnp.arange(1, n + 1),
        "c": {k: jnp.asarray(v[::-1], jnp.float32) for k, v in coefficients.items()},
    }
    if noisy and noise is not None:
        steps["noise"] = jnp.asarray(noise, jnp.float32)
    (x_0, _), _ = jax.lax.scan(body, (x_T, jnp.zeros_like(x_T)), steps)
    return x_0


def ddim_invert(
    denoise: Denoise, schedule: Schedule, x_0: jax.Array, *, iterations: int = 1
) -> jax.Array:
    """The x_T from which deterministic DDIM leads back to x_0 (arXiv 2010.02502, section 4.3).

    In angles, with alpha_bar = cos^2(phi), a DDIM step down is the rotation
    x_prev = cos(d) x_t - sin(d) v(x_t, t), d = phi_t - phi_prev (arXiv 2202.00512, appendix D).
    Going up, x_t = (x_prev + sin(d) v(x_t, t)) / cos(d) is solved by repetition from
    x_t = x_prev: once is the usual first-order inversion. On Gaussian data with the exact denoiser
    and 20 steps, DDIM leads back to within 0.2 of values in [-1, 1] with one call a step and to
    within 0.001 with eight. A network need not be as smooth: with strong guidance the repetition
    may not converge, so compare what DDIM makes of the result.

    Args:
      denoise: as in `sample`, with the guidance that sampling will have.
      schedule: the respaced one that sampling will use.
      x_0: float32 [B, ...].
      iterations: calls of denoise per step.

    Returns:
      x_T, float32 [B, ...], for `sample(..., sampler="ddim")`.

    Raises:
      ConfigError: iterations is not positive.
    """
    if iterations < 1:
        raise errors.ConfigError(f"iterations {iterations!r}: expected a positive integer")
    x_0 = jnp.asarray(x_0, jnp.float32)
    angle = np.arccos(np.sqrt(schedule.alpha_bar))
    turn = angle - np.arccos(np.sqrt(schedule.alpha_bar_prev))

    def body(x, step):
        t = jnp.full(x.shape[0], step["t"], jnp.int32)
        signal, sigma = gaussian.scales(schedule, t, x)

        def solve(_, guess):
            prediction = denoise(guess, t)
            v = signal * prediction.eps - sigma * prediction.x0
            return (x + step["sin"] * v) / step["cos"]

        return jax.lax.fori_loop(0, iterations, solve, x), None

    steps = {
        "t": jnp.asarray(schedule.timesteps),
        "sin": jnp.asarray(np.sin(turn), jnp.float32),
        "cos": jnp.asarray(np.cos(turn), jnp.float32),
    }
    return jax.lax.scan(body, x_0, steps)[0]
