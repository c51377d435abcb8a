"""Heun's method: Euler's step, then again with the mean slope of both its ends.

arXiv 2206.00364, algorithm 1, in x / alpha and sigma / alpha. With Euler's step to x', r the ratio
of the two sigma / alpha and x_0' what the denoiser says of x', its second half is

    x' + alpha' (r - 1) / 2 (x_0' - x_0)

which for r > 3 goes beyond x_0' itself. The cosine schedule's first steps have r in the thousands,
and there the method would throw x far away; the factor is at most 1, so that such a step ends with
x_0' in the place of x_0. On Gaussian data, 20 steps even in t, that is 20 times closer than
Euler's with 39.
"""

import jax
import jax.numpy as jnp
import numpy as np

from unclip.diffusion.samplers.base import Coefficients, Sampler, Step, levels
from unclip.diffusion.schedule import Schedule


def _visits(n: int) -> np.ndarray:
    """Positions: the noisiest once, each other twice, to correct the step to it and to go on."""
    return np.arange(2 * n - 1)[::-1] // 2


def _coefficients(s: Schedule) -> Coefficients:
    at = levels(s)
    ratio = at.sigma[:-1] / at.alpha[:-1] / (at.sigma[1:] / at.alpha[1:])
    out = {name: np.zeros(2 * len(s) - 1) for name in ("x", "x0", "eps", "change")}
    out["x0"][0::2], out["eps"][0::2] = at.alpha_next, at.sigma_next
    out["x"][1::2] = 1.0
    out["change"][1::2] = at.alpha[1:] * np.minimum((ratio - 1) / 2, 1.0)
    return out


def _step(s: Step, before: jax.Array) -> tuple[jax.Array, jax.Array]:
    x0, eps = s.prediction.x0, s.prediction.eps
    euler = s.c["x"] * s.x + s.c["x0"] * x0 + s.c["eps"] * eps
    return euler + s.c["change"] * (x0 - before), x0


SAMPLERS = {"heun": Sampler(_coefficients, _step, jnp.zeros_like, visits=_visits)}
