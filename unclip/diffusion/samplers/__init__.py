"""From noise to x_0 and back: the reverse processes, each one jitted loop over a schedule.

unCLIP (arXiv 2204.06125, table 3) samples its decoder with the ancestral process of DDPM (arXiv
2006.11239, algorithm 2) and its upsamplers with DDIM (arXiv 2010.02502, eq. 12), whose inversion
(its section 4.3) also gives the x_T that unCLIP's manipulations keep (section 3). The others need
fewer steps of the same weights: `dpm`, `heun`, `unipc`; see docs/samplers.md for what they are and
how near they come. The proofs of their orders rest on a smooth denoiser, which guidance and
thresholds break.

A denoiser is any function (x_t, t) -> Prediction, so two networks can share one trajectory, as
Karlo's super-resolution has the last step done by a second network:

    def model_fn(x_t, t):
        return jax.lax.cond(t[0] == schedule.timesteps[0], last_net, first_net, x_t, t)

Every picture has its own key, and its noise depends on nothing else: a picture sampled alone is
the picture sampled in a batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from unclip import errors
from unclip.diffusion.samplers import ancestral, dpm, heun, unipc
from unclip.diffusion.samplers.base import Denoise, Sampler, Step
from unclip.diffusion.samplers.inversion import ddim_invert
from unclip.diffusion.schedule import Schedule

__all__ = [
    "HAVE_ETA",
    "SAMPLERS",
    "Denoise",
    "Tell",
    "check",
    "check_keys",
    "ddim_invert",
    "draw_noise",
    "is_noisy",
    "own_eta",
    "report",
    "sample",
    "visits",
]

SAMPLERS: dict[str, Sampler] = {
    **ancestral.SAMPLERS,
    **dpm.SAMPLERS,
    **heun.SAMPLERS,
    **unipc.SAMPLERS,
}
HAVE_ETA = tuple(name for name, method in SAMPLERS.items() if method.eta is not None)

Tell = Callable[[np.ndarray, np.ndarray], None]


def _traced(value) -> bool:
    return isinstance(value, jax.core.Tracer)


def own_eta(sampler: str) -> float:
    """The eta that a sampler has where none is asked for; 0 for one without, or unknown."""
    return (SAMPLERS[sampler].eta or 0.0) if sampler in SAMPLERS else 0.0


def is_noisy(sampler: str, eta: float | jax.Array) -> bool:
    """Whether a draw takes noise beside x_T; one whose eta is traced always does."""
    method = SAMPLERS[sampler]
    return method.noisy or (method.eta is not None and (_traced(eta) or eta > 0))


def visits(sampler: str, schedule: Schedule) -> np.ndarray:
    """Positions of the schedule's steps in the order the denoiser is called at, int [calls]."""
    n, order = len(schedule), SAMPLERS[sampler].visits
    return np.arange(n)[::-1] if order is None else order(n)


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
        have = ", ".join(map(repr, HAVE_ETA))
        raise errors.ConfigError(f"eta {eta!r} with sampler {sampler!r}: only {have} have an eta")


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
    eta: float | jax.Array | None = None,
    noise: jax.Array | None = None,
    tell: Tell | None = None,
    tell_every: int = 1,
) -> jax.Array:
    """Runs the reverse process from x_T to x_0, with one call of denoise a step (heun: two).

    Works under jit with denoise, schedule and sampler closed over; only denoise clamps. The last
    step returns the predicted x_0, without noise, in every sampler.

    Args:
      denoise: (x_t [B, ...], t int32 [B]) -> Prediction; t are original indices.
      schedule: the respaced one, visited from its last step to its first.
      x_T: float32 [B, ...], standard normal noise, or x_t at the schedule's greatest t.
      keys: typed PRNG keys [B]; may be None when nothing is drawn (no eta, or eta 0).
      sampler: one of SAMPLERS. "ddpm" draws the prediction's variance, else beta_tilde.
      eta: of HAVE_ETA: 0 is deterministic, 1 has the noise of the process that training reverses;
        None takes the sampler's own. A traced eta is not checked.
      noise: float32 [n, B, ...] to use in place of the draws, first visited step first; its last
        entry, at the step to x_0, is not used.
      tell: called as (calls done int, x_0 as predicted float32 [...] of picture 0) while the loop
        runs, out of order if need be; None leaves nothing of it in the program. It is a part of
        the compiled program, so give the same function to each draw.
      tell_every: after how many calls; the last one is told in any case.

    Returns:
      x_0, float32 [B, ...].

    Raises:
      ConfigError: unknown sampler, bad eta, noise of another shape, missing or miscounted keys.
    """
    eta = own_eta(sampler) if eta is None else eta
    check(sampler, eta)
    method, noisy = SAMPLERS[sampler], is_noisy(sampler, eta)
    x_T = jnp.asarray(x_T, jnp.float32)
    n, batch = len(schedule), x_T.shape[0]
    if noise is not None and noise.shape != (n, *x_T.shape):
        raise errors.ConfigError(f"noise {noise.shape}: expected {(n, *x_T.shape)}, one per step")
    if noisy and noise is None:
        check_keys(keys, batch, sampler)
    order = visits(sampler, schedule)

    def body(carry, step):
        x, memory = carry
        prediction = denoise(x, jnp.full(batch, step["t"], jnp.int32))
        z = None
        if noisy:
            z = draw_noise(keys, x.shape[1:], step["draw"]) if noise is None else step["noise"]
        x_next, memory = method.step(Step(x, prediction, z, eta, step["c"]), memory)
        is_last = step["draw"] == len(order)
        if tell is not None:
            report(tell, tell_every, step["draw"], is_last, prediction.x0)
        # Selected, not multiplied by zero, so that not even NaN in the last step's noise has
        # effect.
        return (jnp.where(is_last, prediction.x0, x_next), memory), None

    steps = {
        "t": jnp.asarray(schedule.timesteps[order]),
        "draw": jnp.arange(1, len(order) + 1),
        "c": {k: jnp.asarray(v, jnp.float32) for k, v in method.coefficients(schedule).items()},
    }
    if noisy and noise is not None:
        steps["noise"] = jnp.asarray(noise, jnp.float32)
    return jax.lax.scan(body, (x_T, method.memory(x_T)), steps)[0][0]


def check_keys(keys: jax.Array | None, batch: int, sampler: str) -> None:
    """Refuses keys that are not one a picture.

    Raises:
      ConfigError: missing or miscounted keys.
    """
    if keys is None or keys.shape != (batch,):
        given = "None" if keys is None else f"shape {keys.shape}"
        raise errors.ConfigError(
            f"keys {given}: sampler {sampler!r} needs {batch} typed PRNG keys, one per picture"
        )


def report(tell: Tell, every: int, done: jax.Array, is_last: jax.Array, x_0: jax.Array) -> None:
    """Tells of picture 0 of x_0 [B, ...] from inside a traced loop, every so many calls."""
    if every < 1:
        raise errors.ConfigError(f"tell_every {every!r}: expected a positive integer")
    now = lambda: jax.debug.callback(tell, done, x_0[0])
    jax.lax.cond((done % every == 0) | is_last, now, lambda: None)
