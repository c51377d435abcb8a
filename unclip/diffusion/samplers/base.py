"""What every sampler is made of, and the noise levels it walks along."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from unclip.diffusion.gaussian import Prediction
from unclip.diffusion.schedule import Schedule

Denoise = Callable[[jax.Array, jax.Array], Prediction]
Coefficients = dict[str, np.ndarray]
Memory = Any


class Step(NamedTuple):
    """One visit's inputs.

    Attributes:
      x: float32 [B, ...], x_t; prediction: what the denoiser said of it.
      noise: float32 [B, ...] standard normal, None for a draw without noise.
      eta: number or traced scalar; c: the sampler's coefficients as traced float32 scalars.
    """

    x: jax.Array
    prediction: Prediction
    noise: jax.Array | None
    eta: jax.Array | float
    c: dict[str, jax.Array]


class Sampler(NamedTuple):
    """A reverse process, which calls the denoiser once a visit.

    A method that needs the denoiser twice a step visits twice, so that the network stands once in
    the compiled program.

    Attributes:
      coefficients: float64 [visits] each, in the order visited, from a schedule.
      step: (Step, memory) -> (x at the next visit, memory).
      memory: what it remembers before the first visit, from x_T.
      eta: its own amount of noise, where it has that setting; None where it has not.
      noisy: whether a sampler without eta draws noise.
      visits: positions visited in a schedule of n steps; None: each once, noisiest first.
    """

    coefficients: Callable[[Schedule], Coefficients]
    step: Callable[[Step, Memory], tuple[jax.Array, Memory]]
    memory: Callable[[jax.Array], Memory] = lambda x_T: ()
    eta: float | None = None
    noisy: bool = False
    visits: Callable[[int], np.ndarray] | None = None


class Levels(NamedTuple):
    """Noise levels in the order visited, float64 [n]: x_t = alpha x_0 + sigma eps.

    Attributes:
      alpha, sigma: of each step; alpha_next, sigma_next: of the one after it, 1 and 0 at the end.
      h: how much half the log-SNR grows until the next step; infinite at the last.
    """

    alpha: np.ndarray
    sigma: np.ndarray
    alpha_next: np.ndarray
    sigma_next: np.ndarray
    h: np.ndarray


def levels(s: Schedule) -> Levels:
    """The levels of a schedule's kept steps."""
    half_log_snr = 0.5 * np.log(s.signal_to_noise)[::-1]
    now, below = s.alpha_bar[::-1], s.alpha_bar_prev[::-1]
    return Levels(
        np.sqrt(now),
        np.sqrt(1 - now),
        np.sqrt(below),
        np.sqrt(1 - below),
        np.append(half_log_snr[1:] - half_log_snr[:-1], np.inf),
    )
