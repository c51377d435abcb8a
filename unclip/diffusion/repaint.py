"""RePaint: a picture's hole filled by any sampler's denoiser (arXiv 2201.09865).

What is known is put back after every step, noised as far as the rest, so that the hole grows into
it. One pass leaves the two strangers to one another: the loop goes back up by `jump_length` steps
of noise and down again, `resamples` times in all (its section 4.2 and appendix B).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from unclip import errors
from unclip.diffusion import samplers
from unclip.diffusion.samplers.base import Step
from unclip.diffusion.schedule import Schedule

_X_T = jax.ShapeDtypeStruct((1,), np.float32)  # a shape: to import this takes no device
ONE_STEP = tuple(
    name
    for name, method in samplers.SAMPLERS.items()
    if method.visits is None and not jax.tree.leaves(jax.eval_shape(method.memory, _X_T))
)


def walk(n: int, jump_length: int, resamples: int) -> list[int]:
    """Levels visited, n (x_T) first and 0 (x_0) last; level k is x_t at the k-th cleanest step.

    A step down calls the denoiser; a step up adds noise. Whenever the walk first comes down to a
    level 1, 1 + jump_length, 1 + 2 jump_length, ... it jumps up from there resamples - 1 times,
    except where the jump would end above the noisiest step (the published code's schedule).

    Args:
      n: steps of the schedule; jump_length: steps a jump, at least 1; resamples: at least 1; 1 =
        no jump.

    Raises:
      ConfigError: a jump_length or number of resamples that is not a positive integer.
    """
    for name, value in (("jump_length", jump_length), ("resamples", resamples)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            raise errors.ConfigError(f"{name} {value!r}: expected a positive integer")
    left = {level: resamples - 1 for level in range(1, n - jump_length + 1, jump_length)}
    levels = [n]
    while levels[-1] > 0:
        level = levels[-1]
        if len(levels) > 1 and left.get(level, 0):
            left[level] -= 1
            levels += range(level + 1, level + jump_length + 1)
            level += jump_length
        levels.append(level - 1)
    return levels


def calls(n: int, jump_length: int, resamples: int) -> int:
    """How often `inpaint` calls the denoiser."""
    levels = walk(n, jump_length, resamples)
    return sum(after < level for level, after in itertools.pairwise(levels))


def inpaint(
    denoise: samplers.Denoise,
    schedule: Schedule,
    x_T: jax.Array,
    keys: jax.Array | None,
    known: jax.Array,
    mask: jax.Array,
    *,
    sampler: str = "ddpm",
    eta: float | jax.Array | None = None,
    jump_length: int = 10,
    resamples: int = 10,
    noise: jax.Array | None = None,
    tell: samplers.Tell | None = None,
    tell_every: int = 1,
) -> jax.Array:
    """Fills a picture's hole; where mask is 0 the result is `known` to the bit.

    One jitted loop over a list of levels that `walk` fixes; known, mask and eta may be traced.

    Args:
      denoise, schedule, x_T, eta, tell, tell_every: as in `samplers.sample`.
      keys: typed PRNG keys [B], one a picture; needed with every sampler, as what is known is
        noised too.
      known: float32 [B, ...], the picture, in the range of x_0; what it holds in the hole has no
        effect as long as it is finite.
      mask: broadcastable to known, 1 or True = to be filled, 0 = kept; between them, mixed.
      sampler: one of ONE_STEP: a method that remembers earlier steps would remember the other side
        of a jump.
      jump_length, resamples: see `walk`; 10 and 10 are the paper's for 250 steps.
      noise: float32 [calls, 3, B, ...] in place of the draws of each call: of the jump up before
        it, of the sampler, of what is known after it.

    Returns:
      x_0, float32 [B, ...].

    Raises:
      ConfigError: a sampler or numbers that do not fit, noise of another shape, keys missing or
        miscounted.
    """
    eta = samplers.own_eta(sampler) if eta is None else eta
    samplers.check(sampler, eta)
    if sampler not in ONE_STEP:
        raise errors.ConfigError(
            f"sampler {sampler!r} cannot inpaint: it remembers the steps before a jump; expected "
            f"one of {', '.join(ONE_STEP)}"
        )
    levels = np.array(walk(len(schedule), jump_length, resamples))
    x_T = jnp.asarray(x_T, jnp.float32)
    known, mask = jnp.asarray(known, jnp.float32), jnp.asarray(mask, jnp.float32)
    down = np.flatnonzero(levels[1:] < levels[:-1])
    n, shape = len(down), x_T.shape
    if noise is not None and noise.shape != (n, 3, *shape):
        raise errors.ConfigError(f"noise {noise.shape}: expected {(n, 3, *shape)}, three a call")
    if noise is None:
        samplers.check_keys(keys, shape[0], sampler)
    method, noisy = samplers.SAMPLERS[sampler], samplers.is_noisy(sampler, eta)

    signal = np.append(1.0, np.sqrt(schedule.alpha_bar))  # of every level
    sigma = np.append(0.0, np.sqrt(1 - schedule.alpha_bar))
    top = levels[down]  # where each call happens, and where the walk was after the call before
    bottom = np.append(len(schedule), top[:-1] - 1)
    # Several steps up in a row are one draw: q(x_t | x_s) is Gaussian.
    kept = (signal[top] / signal[bottom]) ** 2
    coefficients = method.coefficients(schedule)  # in the order of levels n, n - 1, ..., 1
    steps = {
        "t": jnp.asarray(schedule.timesteps[top - 1]),
        "call": jnp.arange(1, n + 1),
        "up_signal": np.sqrt(kept),
        "up_sigma": np.sqrt(1 - kept),
        "signal": signal[top - 1],
        "sigma": sigma[top - 1],
        "c": {name: values[len(schedule) - top] for name, values in coefficients.items()},
    }
    as_float = lambda a: jnp.asarray(a, jnp.float32 if a.dtype.kind == "f" else None)
    steps = jax.tree.map(as_float, steps)
    if noise is not None:
        steps["noise"] = jnp.asarray(noise, jnp.float32)

    def body(x, step):
        if noise is not None:
            up, own, of_known = step["noise"]
        else:
            draw = lambda i: samplers.draw_noise(keys, shape[1:], 3 * step["call"] - 2 + i)
            up, own, of_known = draw(0), draw(1) if noisy else None, draw(2)
        x = step["up_signal"] * x + step["up_sigma"] * up
        prediction = denoise(x, jnp.full(shape[0], step["t"], jnp.int32))
        x, _ = method.step(Step(x, prediction, own if noisy else None, eta, step["c"]), ())
        is_last = step["call"] == n
        if tell is not None:
            samplers.report(tell, tell_every, step["call"], is_last, prediction.x0)
        x = jnp.where(is_last, prediction.x0, x)
        there = step["signal"] * known + step["sigma"] * of_known
        return mask * x + (1 - mask) * jnp.where(is_last, known, there), None

    return jax.lax.scan(body, x_T, steps)[0]
