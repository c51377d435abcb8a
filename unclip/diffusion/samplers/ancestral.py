"""One step at a time, without memory: DDPM and DDIM, which are Euler's method too.

Euler's method for dx/dsigma = eps in x / alpha, sigma / alpha (arXiv 2206.00364, algorithm 1
without its second half) moves x_0 + (sigma/alpha) eps along eps: that is DDIM with eta 0. Its
ancestral form, as k-diffusion has it, splits the next sigma into a part that is kept and one that
is drawn, which is DDIM's eta to the digit. So they share one step.
"""

import jax
import jax.numpy as jnp
import numpy as np

from unclip.diffusion.samplers.base import Coefficients, Sampler, Step
from unclip.diffusion.schedule import Schedule


def _ddpm_coefficients(s: Schedule) -> Coefficients:
    ascending = {
        "x0": s.betas * np.sqrt(s.alpha_bar_prev) / (1 - s.alpha_bar),
        "x": np.sqrt(1 - s.betas) * (1 - s.alpha_bar_prev) / (1 - s.alpha_bar),
        "log_variance": s.posterior_log_variance,
    }
    return {name: values[::-1] for name, values in ascending.items()}


def _ddpm_step(s: Step, memory: tuple) -> tuple[jax.Array, tuple]:
    """DDPM algorithm 2 with the posterior mean of eq. 7 and the prediction's variance."""
    mean = s.c["x0"] * s.prediction.x0 + s.c["x"] * s.x
    learned = s.prediction.log_variance
    log_variance = s.c["log_variance"] if learned is None else learned
    return mean + jnp.exp(0.5 * log_variance) * s.noise, memory


def ddim_coefficients(s: Schedule) -> Coefficients:
    """Of `ddim_step`."""
    # sigma^2 of eq. 16 at eta = 1 is beta_tilde, a part `fraction` of the variance below.
    fraction = s.betas / (1 - s.alpha_bar)
    ascending = {
        "x0": np.sqrt(s.alpha_bar_prev),
        "eps": np.sqrt(1 - s.alpha_bar_prev),
        "fraction": np.append(0.0, fraction[1:]),
        "rest": np.append(1.0, 1 - fraction[1:]),  # 4e-8 at the noisiest step: no float32 1 - f
    }
    return {name: values[::-1] for name, values in ascending.items()}


def ddim_step(s: Step, memory: tuple) -> tuple[jax.Array, tuple]:
    """DDIM eq. 12, with sigma = eta sqrt(beta_tilde) (eq. 16)."""
    if s.noise is None:
        return s.c["x0"] * s.prediction.x0 + s.c["eps"] * s.prediction.eps, memory
    random = s.eta * jnp.sqrt(s.c["fraction"])
    kept = jnp.sqrt(1 - s.eta**2 + s.eta**2 * s.c["rest"])
    direction = kept * s.prediction.eps + random * s.noise
    return s.c["x0"] * s.prediction.x0 + s.c["eps"] * direction, memory


SAMPLERS = {
    "ddpm": Sampler(_ddpm_coefficients, _ddpm_step, noisy=True),
    "ddim": Sampler(ddim_coefficients, ddim_step, eta=0.0),
    "euler": Sampler(ddim_coefficients, ddim_step),
    "euler-ancestral": Sampler(ddim_coefficients, ddim_step, eta=1.0),
}
