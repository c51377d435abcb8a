"""RePaint against a plain float64 loop, and what it promises about the known part."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip import errors
from unclip.diffusion import gaussian, repaint, samplers, schedule

FULL = schedule.cosine()
RNG = np.random.default_rng(0)
KNOWN = RNG.uniform(-1, 1, (2, 3, 4, 1)).astype(np.float32)
MASK = np.zeros((1, 3, 4, 1), np.float32)
MASK[:, 1:, 2:] = 1.0


def published(n, jump_length, resamples):
    """`get_schedule_jump` of the paper's code, timesteps -1 ... n - 1 as levels 0 ... n."""
    jumps = dict.fromkeys(range(0, n - jump_length, jump_length), resamples - 1)
    t, times = n, []
    while t >= 1:
        t -= 1
        times.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump_length):
                t += 1
                times.append(t)
    return [t + 1 for t in [*times, -1]]


@pytest.mark.parametrize(
    "settings", [(250, 10, 10), (6, 2, 3), (5, 1, 2), (7, 10, 3), (1, 1, 4), (25, 5, 1)]
)
def test_the_walk_is_the_published_one(settings):
    assert repaint.walk(*settings) == published(*settings)
    assert repaint.calls(*settings) == (np.diff(published(*settings)) < 0).sum()


def smooth(x, t):
    """A denoiser that looks at the whole picture, in the x0 parametrisation."""
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    return 0.3 * x + 0.5 * mean


def runner(n, **settings):
    s = FULL.respace(n)
    denoise = gaussian.make_denoise(smooth, s, parametrisation="x0")
    return s, functools.partial(repaint.inpaint, denoise, s, **settings)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.8)])
def test_it_is_algorithm_1_with_jumps(sampler, eta):
    n, jump, times = 7, 2, 3
    s, run = runner(n, sampler=sampler, eta=eta, jump_length=jump, resamples=times)
    x_T = RNG.standard_normal(KNOWN.shape)
    noise = RNG.standard_normal((repaint.calls(n, jump, times), 3, *KNOWN.shape))
    got = jax.jit(lambda x, z: run(x, None, KNOWN, MASK, noise=z))(x_T, noise)

    alpha_bar = np.append(1.0, s.alpha_bar)  # of levels
    levels, x, call, before = published(n, jump, times), x_T, 0, n
    for level, after in itertools.pairwise(levels):
        if after > level:
            continue
        if level > before:  # up: one draw for all the steps of a jump
            keep = alpha_bar[level] / alpha_bar[before]
            x = np.sqrt(keep) * x + np.sqrt(1 - keep) * noise[call, 0]
        a, below = alpha_bar[level], alpha_bar[after]
        x_0 = smooth(x, None)
        eps = (x - np.sqrt(a) * x_0) / np.sqrt(1 - a)
        sigma2 = (1 - below) / (1 - a) * (1 - a / below) * (1.0 if sampler == "ddpm" else eta**2)
        x = np.sqrt(below) * x_0 + np.sqrt(1 - below - sigma2) * eps
        if after:
            x += np.sqrt(sigma2) * noise[call, 1]
        known = np.sqrt(below) * KNOWN + np.sqrt(1 - below) * noise[call, 2]
        x = MASK * x + (1 - MASK) * known
        call, before = call + 1, after
    assert call == len(noise)
    np.testing.assert_allclose(got, x, atol=2e-5)


@pytest.mark.parametrize("sampler", repaint.ONE_STEP)
def test_the_known_part_is_kept_to_the_bit(sampler):
    keys = jax.random.split(jax.random.key(0), 2)
    x_T = samplers.draw_noise(keys, KNOWN.shape[1:])
    _, run = runner(5, sampler=sampler, jump_length=2, resamples=2)
    run = jax.jit(run)
    got = run(x_T, keys, KNOWN, MASK)
    kept = np.broadcast_to(MASK == 0, KNOWN.shape)
    np.testing.assert_array_equal(np.asarray(got)[kept], KNOWN[kept])
    # What the hole held has no effect, what surrounds it has; another mask compiles nothing.
    other = np.where(kept, KNOWN, 9.0).astype(np.float32)
    np.testing.assert_array_equal(run(x_T, keys, other, MASK), got)
    moved = np.where(kept, KNOWN + 0.5, KNOWN).astype(np.float32)
    assert np.abs(np.asarray(run(x_T, keys, moved, MASK) - got))[~kept].min() > 1e-4
    np.testing.assert_array_equal(run(x_T, keys, KNOWN, 0 * MASK), KNOWN)
    assert run._cache_size() == 1
    # A picture alone is the picture in a batch.
    alone = runner(5, sampler=sampler, jump_length=2, resamples=2)[1](
        x_T[1:], keys[1:], KNOWN[1:], MASK
    )
    np.testing.assert_allclose(alone[0], got[1], atol=1e-6)


def test_without_known_pixels_and_jumps_it_is_the_sampler():
    keys = jax.random.split(jax.random.key(0), 2)
    x_T = samplers.draw_noise(keys, KNOWN.shape[1:])
    s, run = runner(6, sampler="ddim", resamples=1)
    denoise = gaussian.make_denoise(smooth, s, parametrisation="x0")
    want = samplers.sample(denoise, s, x_T, None, sampler="ddim")
    np.testing.assert_allclose(run(x_T, keys, KNOWN, np.ones_like(MASK)), want, atol=1e-6)


def test_errors():
    _, run = runner(5)
    x_T = jnp.zeros(KNOWN.shape)
    with pytest.raises(errors.ConfigError, match=r"'heun' cannot inpaint.*ddpm, ddim"):
        run(x_T, None, KNOWN, MASK, sampler="heun")
    with pytest.raises(errors.ConfigError, match="jump_length 0: expected a positive integer"):
        run(x_T, None, KNOWN, MASK, jump_length=0)
    with pytest.raises(errors.ConfigError, match=r"resamples 1\.5"):
        run(x_T, None, KNOWN, MASK, resamples=1.5)
    with pytest.raises(errors.ConfigError, match="keys None"):
        run(x_T, None, KNOWN, MASK, sampler="ddim")
    with pytest.raises(errors.ConfigError, match="three a call"):
        run(x_T, None, KNOWN, MASK, noise=jnp.zeros((5, 2, 3, 4, 1)))
