"""DPM-Solver++: x_0 as a polynomial in log-SNR through the visits before, exact in x.

2M: arXiv 2211.01095, algorithm 2. 2M SDE: its stochastic form (its section 5, "SDE-DPM-Solver++
(2M)"), 3M SDE: the next order, both with the amount of noise eta that k-diffusion gives them: 1 is
the reverse-time SDE, 0 the ODE, for which 2M SDE is 2M.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from unclip.diffusion.samplers.base import Coefficients, Sampler, Step, levels
from unclip.diffusion.schedule import Schedule

Memory = jax.Array


def slope(h: np.ndarray) -> np.ndarray:
    """[n] weights of (x_0 - x_0 before) that make a step of second order; h as in `Levels`.

    First order at the first step, which has no step before it, and at the one into the first
    timestep: with timesteps evenly spaced in t that step is so long in log-SNR that extrapolating
    would overshoot.
    """
    out = np.zeros(len(h))
    out[1:-2] = h[1:-2] / (2 * h[:-3])
    return out


def _2m_coefficients(s: Schedule) -> Coefficients:
    at = levels(s)
    return {
        "x": np.sqrt((1 - s.alpha_bar_prev) / (1 - s.alpha_bar))[::-1],
        "x0": -at.alpha_next * np.expm1(-at.h),
        "slope": slope(at.h),
    }


def _2m_step(s: Step, before: Memory) -> tuple[jax.Array, Memory]:
    x0 = s.prediction.x0 + s.c["slope"] * (s.prediction.x0 - before)
    return s.c["x"] * s.x + s.c["x0"] * x0, s.prediction.x0


def _sde_coefficients(s: Schedule) -> Coefficients:
    at = levels(s)
    # The last step, to infinite signal-to-noise, is the prediction itself: any h does.
    h = np.append(at.h[:-1], 1.0)
    return {"x": at.sigma_next / at.sigma, "alpha": at.alpha_next, "sigma": at.sigma_next, "h": h}


def _sde_parts(s: Step) -> tuple[jax.Array, jax.Array]:
    """(the part of the next x that x and the noise make, (1 + eta) h)."""
    kept = s.c["x"] * jnp.exp(-s.eta * s.c["h"]) * s.x
    if s.noise is not None:
        kept += s.c["sigma"] * jnp.sqrt(-jnp.expm1(-2 * s.eta * s.c["h"])) * s.noise
    return kept, (1 + s.eta) * s.c["h"]


def _2m_sde_coefficients(s: Schedule) -> Coefficients:
    return _sde_coefficients(s) | {"slope": slope(levels(s).h)}


def _2m_sde_step(s: Step, before: Memory) -> tuple[jax.Array, Memory]:
    kept, h = _sde_parts(s)
    x0 = s.prediction.x0 + s.c["slope"] * (s.prediction.x0 - before)
    return kept - s.c["alpha"] * jnp.expm1(-h) * x0, s.prediction.x0


def _3m_sde_coefficients(s: Schedule) -> Coefficients:
    h = levels(s).h
    out = {name: np.zeros(len(h)) for name in ("slope", "slope_before", "first", "second")}
    out["slope"][1:-2] = h[1:-2] / h[:-3]
    # r_0 and r_1: the step before and the one before that, in steps; steps into the first
    # timestep are as in `slope`.
    r_0, r_1 = h[1:-3] / h[2:-2], h[:-4] / h[2:-2]
    out["slope_before"][2:-2] = 1 / r_1
    out["first"][2:-2] = r_0 / (r_0 + r_1)
    out["second"][2:-2] = 1 / (r_0 + r_1)
    return _sde_coefficients(s) | out


def _3m_sde_step(s: Step, before: tuple[Memory, Memory]) -> tuple[jax.Array, tuple]:
    kept, h = _sde_parts(s)
    x0, (x0_1, x0_2) = s.prediction.x0, before
    slope_now = s.c["slope"] * (x0 - x0_1)
    bend = slope_now - s.c["slope_before"] * (x0_1 - x0_2)
    phi_2, phi_3 = _phi(h)
    change = phi_2 * (slope_now + s.c["first"] * bend) - phi_3 * s.c["second"] * bend
    return kept + s.c["alpha"] * (change - jnp.expm1(-h) * x0), (x0, x0_1)


def _phi(h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """phi_2 = (e^-h - 1) / h + 1 and phi_3 = phi_2 / h - 1/2, with all digits at small h too."""
    long, short = jnp.maximum(h, 0.3), jnp.minimum(h, 0.3)
    phi_2 = jnp.expm1(-long) / long + 1
    series = sum((-short) ** (k - 2) / math.factorial(k) for k in range(3, 10))
    is_short = h < 0.3
    return (
        jnp.where(is_short, short * (series + 0.5), phi_2),
        jnp.where(is_short, series, phi_2 / long - 0.5),
    )


SAMPLERS = {
    "dpm++2m": Sampler(_2m_coefficients, _2m_step, jnp.zeros_like),
    "dpm++2m-sde": Sampler(_2m_sde_coefficients, _2m_sde_step, jnp.zeros_like, eta=1.0),
    "dpm++3m-sde": Sampler(
        _3m_sde_coefficients,
        _3m_sde_step,
        lambda x_T: (jnp.zeros_like(x_T), jnp.zeros_like(x_T)),
        eta=1.0,
    ),
}
