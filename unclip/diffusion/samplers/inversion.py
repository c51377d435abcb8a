"""DDIM backwards: from a picture to the noise that leads to it."""

import jax
import jax.numpy as jnp
import numpy as np

from unclip import errors
from unclip.diffusion import gaussian
from unclip.diffusion.samplers.base import Denoise
from unclip.diffusion.schedule import Schedule


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
