"""Noise schedules: how much of x_0 is left in x_t, and which steps sampling visits.

unCLIP (arXiv 2204.06125, table 3) trains every diffusion model with 1000 steps, on the cosine
schedule of Improved DDPM (arXiv 2102.09672, eq. 17) but for the last upsampler, which uses the
linear one of DDPM (arXiv 2006.11239, section 4), and samples in fewer steps.

A timestep `t` is always the ORIGINAL index, 0 (almost clean) to total - 1 (noise), because that is
what the network was trained to read; a step's *position* is its place in a respaced schedule.
Constants stay float64 on the host, where 1 - alpha_bar keeps its digits, and become float32 only
when a traced computation looks them up.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from unclip import errors

SPACINGS = ("even", "trailing", "log-snr", "karras", "fast27")
KARRAS_RHO, KARRAS_MOST = 7.0, 80.0  # arXiv 2206.00364, table 1: rho and sigma_max
SAME = 0.1  # of the steps by "karras": so many may fall on a timestep that is taken


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A variance-preserving schedule of n steps, ascending in t; hashable by identity.

    Attributes:
      betas: float64 [n], variance added between consecutive kept steps.
      alpha_bar: float64 [n], alpha_bar_t: x_t keeps sqrt(alpha_bar) of x_0.
      alpha_bar_prev: float64 [n], alpha_bar of the kept step below; 1 for the first.
      timesteps: int32 [n], original indices, ascending.
      total: number of steps the network was trained with.
    """

    betas: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_prev: np.ndarray
    timesteps: np.ndarray
    total: int

    def __post_init__(self):
        for array in (self.betas, self.alpha_bar, self.alpha_bar_prev, self.timesteps):
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.timesteps)

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        """Float64 [n]: beta_tilde (DDPM eq. 7); exactly 0 at the first step."""
        return self.betas * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)

    @functools.cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """Float64 [n]: log beta_tilde, the first step taking the second's finite value.

        That is the clipping of Improved DDPM (section 3.1). A schedule of one step has no second
        and takes log beta.
        """
        first = self.posterior_variance[1] if len(self) > 1 else self.betas[0]
        return np.log(np.append(first, self.posterior_variance[1:]))

    @functools.cached_property
    def signal_to_noise(self) -> np.ndarray:
        """Float64 [n]: alpha_bar / (1 - alpha_bar)."""
        return self.alpha_bar / (1 - self.alpha_bar)

    def at(self, values: np.ndarray, t: jax.Array) -> jax.Array:
        """Looks per-step constants up by original timestep; works under jit.

        Args:
          values: [n], one value a kept step, ascending.
          t: int32 [B], original indices.

        Returns:
          float32 [B]. A t that this schedule does not keep gives NaN: traced code cannot raise an
          error, and a neighbour's value would be wrong without a sign of it.
        """
        table = np.full(self.total, np.nan, np.float32)
        table[self.timesteps] = values
        return jnp.asarray(table).at[t].get(mode="fill", fill_value=np.nan)

    def position(self, t: jax.Array) -> jax.Array:
        """Position of original timesteps t (int32 [B]) among the kept steps; -1 if not kept."""
        table = np.full(self.total, -1, np.int32)
        table[self.timesteps] = np.arange(len(self))
        return jnp.asarray(table).at[t].get(mode="fill", fill_value=-1)

    def is_first(self, t: jax.Array) -> jax.Array:
        """Bool [B]: whether t is the lowest kept step, the one that leads to x_0."""
        return t == int(self.timesteps[0])

    def snr(self, t: jax.Array) -> jax.Array:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar), float32 [B]."""
        return self.at(self.signal_to_noise, t)

    def respace(
        self,
        n: int | None = None,
        spacing: str = "even",
        *,
        timesteps: Sequence[int] | None = None,
    ) -> "Schedule":
        """Keeps some steps, with the betas that leave alpha_bar unchanged at each.

        Improved DDPM, section 4: beta_t = 1 - alpha_bar_t / alpha_bar_prev over the kept steps.

        Args:
          n: number of steps among the N of this schedule.
          spacing: how they are spread:
            "even": both ends included, round(i (N-1) / (n-1)), halves to even; one step keeps the
              noisiest (Karlo).
            "trailing": N - 1 - round(i N / n), the noisiest included and the cleanest not
              (arXiv 2305.08891, section 3.3).
            "log-snr": evenly in the logarithm of the signal-to-noise ratio, both ends included
              (DPM-Solver, arXiv 2206.00927, section 3.4); a step that is taken is replaced by the
              next noisier one.
            "karras": even in (sigma / alpha)^(1/7) from 80 down to the cleanest step, and the
              noisiest step before them (arXiv 2206.00364, eq. 5, whose networks start from 80;
              cosine's noisiest is at 20,000, where a draw has to start from noise alone).
            "10,10,3,2,2": so many in each of equal sections, from the cleanest on, each section's
              ends included (GLIDE, Improved DDPM); the numbers add up to n.
            "fast27": that, but for the noisiest step, in place of which stands the second below it
              (GLIDE's, for 27 steps of DDIM).
            Timesteps are integers, those that the network was trained on. "log-snr" and "karras"
            take the one that is nearest in log-SNR; one that is taken is replaced by the next
            noisier one, in "karras" for at most a tenth of the steps, beyond which it is refused.
          timesteps: or the original indices to keep, in any order. Sampling then starts at the
            greatest of them, which need not be the noisiest step.

        Raises:
          ConfigError: n is not an integer in 1..N; unknown spacing, or sections that do not add up
            to n or hold more steps than there are, or more steps than "karras" can tell apart; a
            timestep is not of this schedule or comes twice; both or neither of n and timesteps are
            given.
        """
        if (n is None) == (timesteps is None):
            raise errors.ConfigError("respace needs either a number of steps or timesteps")
        if timesteps is None:
            n = _count(n, "number of sampling steps", len(self))
            keep = self._spread(n, spacing)
        else:
            keep = self._positions(timesteps)
        if len(keep) == len(self):
            return self
        alpha_bar = self.alpha_bar[keep]
        alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
        # A neighbour's beta is copied, not recomputed, so that no digit is lost.
        unchanged = alpha_bar_prev == self.alpha_bar_prev[keep]
        betas = np.where(unchanged, self.betas[keep], 1 - alpha_bar / alpha_bar_prev)
        return Schedule(betas, alpha_bar, alpha_bar_prev, self.timesteps[keep], self.total)

    def _spread(self, n: int, spacing: str) -> np.ndarray:
        """Positions [n] of the kept steps, ascending; see `respace`."""
        most = len(self) - 1
        if spacing == "fast27":
            keep = self._spread(n, "10,10,3,2,2")
            return np.append(keep[:-1], most - 2)
        if spacing == "even":
            return _ends(0, most, n) if n > 1 else np.array([most])
        if spacing == "trailing":
            return (most - np.round(np.arange(n) * (len(self) / n))[::-1]).astype(int)
        if spacing == "log-snr":
            log = np.log(self.signal_to_noise)
            wanted = np.linspace(log[0], log[-1], n) if n > 1 else log[-1:]
            return _apart(np.abs(log[None] - wanted[:, None]).argmin(1), most)
        if spacing == "karras":
            return self._karras(n)
        words = str(spacing).split(",")
        if not all(word.strip().isdecimal() for word in words):
            raise errors.unknown("spacing", str(spacing), (*SPACINGS, "10,10,3,2,2"))
        counts = [int(word) for word in words]
        if sum(counts) != n:
            raise errors.ConfigError(
                f"spacing {spacing!r} has {sum(counts)} steps: expected as many as steps={n}"
            )
        keep, first = [], 0
        for section, count in enumerate(counts):
            size = len(self) // len(counts) + (section < len(self) % len(counts))
            if not 1 <= count <= size:
                raise errors.ConfigError(
                    f"spacing {spacing!r}: {count} steps in a section of {size}: expected 1 to "
                    f"{size}"
                )
            keep += list(_ends(first, first + size - 1, count))
            first += size
        return np.array(keep)

    def _karras(self, n: int) -> np.ndarray:
        most, sigma = len(self) - 1, self.signal_to_noise**-0.5
        halfway = (np.log(sigma[1:]) + np.log(sigma[:-1])) / 2

        def nearest(n):
            ends = np.minimum([sigma[0], KARRAS_MOST], sigma[-1]) ** (1 / KARRAS_RHO)
            wanted = np.linspace(*ends, n - 1) ** KARRAS_RHO if n > 2 else sigma[: n - 1]
            return np.append(np.searchsorted(halfway, np.log(wanted)), most)

        fits = lambda n: n - len(np.unique(nearest(n))) <= SAME * n
        if not fits(n):
            largest = next(m for m in range(n - 1, 0, -1) if fits(m))
            raise errors.ConfigError(
                f"spacing 'karras' of {n} steps: they fall on {len(np.unique(nearest(n)))} "
                f"different timesteps of {len(self)}; expected at most {largest} steps"
            )
        return _apart(nearest(n), most)

    def _positions(self, timesteps: Sequence[int]) -> np.ndarray:
        given = np.sort(np.asarray(timesteps).reshape(-1))
        if not given.size or given.dtype.kind not in "iu":
            raise errors.ConfigError(f"timesteps {timesteps!r}: expected one or more integers")
        if (given[1:] == given[:-1]).any():
            raise errors.ConfigError(f"timesteps {given.tolist()}: one comes twice")
        missing = given[~np.isin(given, self.timesteps)]
        if missing.size:
            nearest = self.timesteps[np.abs(self.timesteps - missing[0]).argmin()]
            raise errors.ConfigError(
                f"timestep {missing[0]} is not in this schedule of {len(self)} steps, "
                f"{self.timesteps[0]} to {self.timesteps[-1]}; nearest: {nearest}"
            )
        return np.searchsorted(self.timesteps, given)


def _apart(keep: np.ndarray, most: int) -> np.ndarray:
    """Ascending positions with each that is taken moved up, and back from the last, `most`."""
    at = np.arange(len(keep))
    keep = np.maximum.accumulate(keep - at) + at
    return np.minimum(keep, most - at[::-1])


def _ends(first: int, last: int, n: int) -> np.ndarray:
    """n integers evenly from first to last, both included; first alone for one."""
    # The stride is rounded before it is multiplied, as in diffusers and guided-diffusion; this
    # decides how some halves (n = 27) are rounded.
    stride = (last - first) / max(n - 1, 1)
    return first + np.round(np.arange(n) * stride).astype(int)


def _count(n, what: str, most: int | None = None) -> int:
    expected = f"an integer from 1 to {most}" if most else "a positive integer"
    try:
        number = operator.index(n)
    except TypeError:
        number = 0
    if isinstance(n, bool) or number < 1 or (most and number > most):
        raise errors.ConfigError(f"{what} {n!r}: expected {expected}")
    return number


def from_betas(betas: Sequence[float]) -> Schedule:
    """A schedule from its betas [n], each inside (0, 1).

    Raises:
      ConfigError: a beta is outside (0, 1), or there is none.
    """
    betas = np.array(betas, np.float64)
    if betas.ndim != 1 or not betas.size or not ((betas > 0) & (betas < 1)).all():
        given = f"{betas.min():g} to {betas.max():g}" if betas.size else "none"
        raise errors.ConfigError(f"betas {given}: expected a list of numbers inside (0, 1)")
    alpha_bar = np.cumprod(1 - betas)
    timesteps = np.arange(len(betas), dtype=np.int32)
    return Schedule(betas, alpha_bar, np.append(1.0, alpha_bar[:-1]), timesteps, len(betas))


def cosine(n: int = 1000, *, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """The cosine schedule (Improved DDPM eq. 17), called squaredcos_cap_v2 elsewhere.

    alpha_bar follows cos^2(pi/2 (t/n + s) / (1 + s)), with every beta capped at max_beta.

    Raises:
      ConfigError: n is not a positive integer.
    """
    n = _count(n, "number of diffusion steps")
    level = np.cos((np.arange(n + 1) / n + s) / (1 + s) * np.pi / 2) ** 2
    return from_betas(np.minimum(1 - level[1:] / level[:-1], max_beta))


def linear(n: int = 1000, *, start: float = 1e-4, end: float = 0.02) -> Schedule:
    """The linear schedule (DDPM section 4): betas from start to end, scaled by 1000 / n.

    The scaling keeps the total noise when n changes; start and end are the 1000-step values.

    Raises:
      ConfigError: n is not a positive integer, or so small that a scaled beta reaches 1.
    """
    n = _count(n, "number of diffusion steps")
    if n <= 1000 * end:
        raise errors.ConfigError(
            f"number of diffusion steps {n}: a linear schedule ending at beta {end:g} needs more "
            f"than {1000 * end:g}; train with more steps and respace, or use 'cosine'"
        )
    return from_betas(np.linspace(start, end, n) * (1000 / n))


SCHEDULES = {"cosine": cosine, "linear": linear}


def make(name: str, n: int = 1000) -> Schedule:
    """The schedule called name, "cosine" or "linear", with n training steps.

    Raises:
      ConfigError: unknown name or bad n.
    """
    if name not in SCHEDULES:
        raise errors.unknown("noise schedule", name, SCHEDULES)
    return SCHEDULES[name](n)
