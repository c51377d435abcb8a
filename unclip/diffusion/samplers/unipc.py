"""UniPC of second order, predicting x_0, with B(h) = e^h - 1 (arXiv 2302.04867, "bh2").

What the denoiser says at a predicted x first corrects that x (algorithm 1, UniC), then predicts
the next (UniP, of second order DPM-Solver++(2M)'s step): one call a step.
"""

import jax
import jax.numpy as jnp
import numpy as np

from unclip.diffusion.samplers.base import Coefficients, Sampler, Step, levels
from unclip.diffusion.samplers.dpm import slope
from unclip.diffusion.schedule import Schedule


def _coefficients(s: Schedule) -> Coefficients:
    at = levels(s)
    n = len(s)
    names = ("own", "kept", "before", "before_change", "change")
    c = {name: np.zeros(n) for name in names}
    c["own"][0] = 1.0  # nothing to correct at x_T
    if n > 1:
        h = at.h[:-1]  # of the step that led to visit k, k = 1 ... n - 1
        gain = -at.alpha[1:] * np.expm1(-h)
        c["kept"][1:] = at.sigma[1:] / at.sigma[:-1]
        c["before"][1:] = gain
        c["change"][1] = gain[0] / 2
        if n > 2:
            ratio = -h[:-1] / h[1:]
            first = (np.expm1(-h[1:]) / -h[1:] - 1) / np.expm1(-h[1:])
            second = 2 * ((np.expm1(-h[1:]) / -h[1:] - 1) / -h[1:] - 0.5) / np.expm1(-h[1:])
            # weights w of [1, 1; ratio, 1] w = (first, second)
            earlier = (second - first) / (ratio - 1)
            c["before_change"][2:] = gain[1:] * earlier / ratio
            c["change"][2:] = gain[1:] * (first - earlier)
    return c | {
        "x": at.sigma_next / at.sigma,
        "x0": -at.alpha_next * np.expm1(-at.h),
        "slope": slope(at.h),
    }


def _step(s: Step, memory: tuple) -> tuple[jax.Array, tuple]:
    x_before, x0_1, x0_2 = memory
    x0, c = s.prediction.x0, s.c
    corrected = c["own"] * s.x + c["kept"] * x_before + c["before"] * x0_1
    corrected += c["before_change"] * (x0_2 - x0_1) + c["change"] * (x0 - x0_1)
    ahead = x0 + c["slope"] * (x0 - x0_1)
    return c["x"] * corrected + c["x0"] * ahead, (corrected, x0, x0_1)


SAMPLERS = {"unipc": Sampler(_coefficients, _step, lambda x_T: (jnp.zeros_like(x_T),) * 3)}
