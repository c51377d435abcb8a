"""Schedules against published constants and a plain float64 loop."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip import errors
from unclip.diffusion import schedule as schedule_lib


def cosine_betas(n):
    def level(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - level((i + 1) / n) / level(i / n), 0.999) for i in range(n)]


def test_cosine_has_the_published_constants():
    s = schedule_lib.cosine()
    assert s.betas[0] == pytest.approx(4.1284e-05, rel=1e-4)
    assert s.betas[999] == pytest.approx(0.999, abs=1e-12)
    assert s.alpha_bar[999] == pytest.approx(2.4288e-09, rel=1e-4)
    assert s.timesteps.tolist() == list(range(1000)) and s.total == 1000


@pytest.mark.parametrize("n", [1000, 64, 2, 1])
def test_cosine_equals_the_formula(n):
    s, betas = schedule_lib.cosine(n), cosine_betas(n)
    kept = 1.0
    for i, beta in enumerate(betas):
        assert s.alpha_bar_prev[i] == pytest.approx(kept, rel=1e-12)
        kept *= 1 - beta
        assert s.betas[i] == pytest.approx(beta, rel=1e-9)
        assert s.alpha_bar[i] == pytest.approx(kept, rel=1e-12)


def test_linear_keeps_the_total_noise_when_n_changes():
    s = schedule_lib.linear()
    assert s.betas[[0, 999]] == pytest.approx([1e-4, 0.02])
    assert np.diff(s.betas) == pytest.approx(np.full(999, (0.02 - 1e-4) / 999))
    assert s.alpha_bar[999] == pytest.approx(4.0358e-05, rel=1e-4)
    assert schedule_lib.linear(250).betas[[0, 249]] == pytest.approx([4e-4, 0.08])
    assert schedule_lib.linear(start=0.00085, end=0.012).betas[999] == pytest.approx(0.012)


def test_sampling_timesteps_are_the_published_ones():
    s = schedule_lib.cosine()
    assert s.respace(7).timesteps[::-1].tolist() == [999, 832, 666, 500, 333, 166, 0]
    steps = s.respace(25).timesteps[::-1].tolist()
    assert steps[:5] == [999, 957, 916, 874, 832] and steps[5] == 791
    assert steps[-3:] == [83, 42, 0] and len(steps) == 25
    assert s.respace(2).timesteps.tolist() == [0, 999]
    assert s.respace(1).timesteps.tolist() == [999]


def test_sections_are_guided_diffusions():
    """What its space_timesteps gives; fast27 with GLIDE's change at the noisiest step."""
    s = schedule_lib.cosine()

    def space(counts):
        steps, start = [], 0
        for i, count in enumerate(counts):
            size = 1000 // len(counts) + (i < 1000 % len(counts))
            stride, at = (size - 1) / (count - 1) if count > 1 else 1, 0.0
            for _ in range(count):
                steps.append(start + round(at))
                at += stride
            start += size
        return steps

    glide = [*space([10, 10, 3, 2, 2])[:-1], 997]
    assert s.respace(27, "fast27").timesteps.tolist() == glide
    assert glide[:4] == [0, 22, 44, 66] and glide[-5:] == [599, 600, 799, 800, 997]
    for counts in ([10, 10, 3, 2, 2], [5, 1, 4], [300, 3, 1], [1]):
        got = s.respace(sum(counts), ",".join(map(str, counts)))
        assert got.timesteps.tolist() == space(counts)
    with pytest.raises(errors.ConfigError, match="has 27 steps: expected as many as steps=25"):
        s.respace(25, "10,10,3,2,2")
    with pytest.raises(errors.ConfigError, match="501 steps in a section of 500"):
        s.respace(502, "501,1")
    with pytest.raises(errors.ConfigError, match=r"unknown spacing 'trailling'.*'trailing'"):
        s.respace(25, "trailling")


def test_trailing_steps_end_at_noise():
    """np.round(np.arange(1000, 0, -1000 / n)) - 1 (arXiv 2305.08891, table 2)."""
    s = schedule_lib.cosine()
    assert s.respace(5, "trailing").timesteps[::-1].tolist() == [999, 799, 599, 399, 199]
    for n in (1, 3, 7, 25, 27, 300):
        want = np.round(np.arange(1000, 0, -1000 / n))[:n] - 1
        np.testing.assert_array_equal(s.respace(n, "trailing").timesteps[::-1], want)


@pytest.mark.parametrize("n", [2, 10, 27, 300, 999])
def test_log_snr_steps_are_even_in_log_snr(n):
    s = schedule_lib.linear()
    log = np.log(s.signal_to_noise)
    kept = s.respace(n, "log-snr").timesteps
    assert len(kept) == n and kept[0] == 0 and kept[-1] == 999 and (np.diff(kept) > 0).all()
    if n == 10:
        wanted = np.linspace(log[0], log[-1], n)
        assert np.abs(log[kept] - wanted).max() < 0.4 < np.abs(np.diff(wanted)).min()


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("n", [1, 2, 27, 250, 999])
def test_respacing_leaves_alpha_bar_alone(name, n):
    full = schedule_lib.make(name)
    s = full.respace(n)
    assert len(s) == n and s.total == 1000
    assert (np.diff(s.timesteps) > 0).all() and s.timesteps[-1] == 999
    kept = 1.0
    for i, t in enumerate(s.timesteps):
        assert s.alpha_bar_prev[i] == pytest.approx(kept, rel=1e-9)
        kept *= 1 - s.betas[i]
        assert kept == pytest.approx(full.alpha_bar[t], rel=1e-9)
        if i and s.timesteps[i - 1] == t - 1:
            assert s.betas[i] == full.betas[t]


def test_keeping_every_step_changes_nothing():
    full = schedule_lib.cosine()
    s = full.respace(1000)
    np.testing.assert_array_equal(s.betas, full.betas)
    np.testing.assert_array_equal(s.timesteps, full.timesteps)


def test_explicit_timesteps_and_respacing_twice():
    full = schedule_lib.cosine()
    s = full.respace(timesteps=[700, 0, 350])
    assert s.timesteps.tolist() == [0, 350, 700]
    assert s.betas[2] == pytest.approx(1 - full.alpha_bar[700] / full.alpha_bar[350], rel=1e-12)
    assert s.betas[0] == full.betas[0]
    twice = s.respace(2)
    assert twice.timesteps.tolist() == [0, 700] and twice.total == 1000
    late = full.respace(timesteps=[400, 401])
    assert late.betas[0] == pytest.approx(1 - full.alpha_bar[400])
    assert late.betas[1] == full.betas[401]


def test_lookups_read_original_timesteps_under_jit():
    full = schedule_lib.cosine()
    s = full.respace(7)
    t = jnp.array([0, 500, 999], jnp.int32)
    np.testing.assert_allclose(
        jax.jit(lambda t: s.at(s.alpha_bar, t))(t), full.alpha_bar[[0, 500, 999]], rtol=1e-6
    )
    assert jax.jit(s.position)(t).tolist() == [0, 3, 6]
    assert s.is_first(t).tolist() == [True, False, False]
    snr = full.alpha_bar[[0, 500, 999]] / (1 - full.alpha_bar[[0, 500, 999]])
    np.testing.assert_allclose(jax.jit(s.snr)(t), snr, rtol=1e-6)


def test_a_timestep_that_is_not_kept_is_not_answered():
    s = schedule_lib.cosine().respace(7)
    t = jnp.array([1, 1000], jnp.int32)
    assert np.isnan(s.at(s.betas, t)).all()
    assert s.position(t).tolist() == [-1, -1]


def test_constants_cannot_be_changed():
    s = schedule_lib.cosine(10)
    with pytest.raises(ValueError, match="read-only"):
        s.betas[0] = 0.5
    assert hash(s) == hash(s)


@pytest.mark.parametrize("n", [0, -3, 2.5, "10", None, True])
def test_bad_numbers_of_steps(n):
    for make in (schedule_lib.cosine, schedule_lib.linear, schedule_lib.cosine().respace):
        with pytest.raises(errors.ConfigError):
            make(n)


@pytest.mark.parametrize(
    "bad", [[], [0, 0], [0, 1000], [-1, 5], [0.5], "all"], ids=lambda x: str(x)
)
def test_bad_timesteps(bad):
    with pytest.raises(errors.ConfigError):
        schedule_lib.cosine().respace(timesteps=bad)


def test_errors_name_what_is_valid():
    s = schedule_lib.cosine()
    with pytest.raises(errors.ConfigError, match=r"1001.*1 to 1000"):
        s.respace(1001)
    with pytest.raises(errors.ConfigError, match=r"timestep 300 .*nearest: 333"):
        s.respace(7).respace(timesteps=[0, 300])
    with pytest.raises(errors.ConfigError, match="either"):
        s.respace(5, timesteps=[1])
    with pytest.raises(errors.ConfigError, match="did you mean 'cosine'"):
        schedule_lib.make("cosin")
    with pytest.raises(errors.ConfigError, match="more than 20"):
        schedule_lib.linear(20)
    with pytest.raises(errors.ConfigError, match=r"0 to 0\.5"):
        schedule_lib.from_betas([0.0, 0.5])


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_karras_steps_round_to_the_nearest_trained_ones(name):
    """Eq. 5 of arXiv 2206.00364 from sigma = 80, rho 7, and the noisiest step before them."""
    s = schedule_lib.make(name)
    sigma = np.sqrt((1 - s.alpha_bar) / s.alpha_bar)
    n = 18
    i = np.arange(n - 1) / (n - 2)
    wanted = (80 ** (1 / 7) + i * (sigma[0] ** (1 / 7) - 80 ** (1 / 7))) ** 7
    nearest = [int(np.abs(np.log(sigma / one)).argmin()) for one in wanted]
    assert s.respace(n, "karras").timesteps[::-1].tolist() == [999, *nearest]
    # An integer timestep is off by at most half the way to its neighbours.
    there = s.respace(n, "karras").timesteps[::-1][1:]
    gap = np.maximum(
        np.diff(np.log(sigma))[np.maximum(there - 1, 0)], np.diff(np.log(sigma))[there]
    )
    assert (np.abs(np.log(sigma[there] / wanted)) <= gap / 2 + 1e-12).all()
    assert [s.respace(k, "karras").timesteps.tolist() for k in (1, 2)] == [[999], [0, 999]]


def test_a_step_that_is_taken_is_replaced_up_to_a_tenth():
    s = schedule_lib.cosine()
    most = 142
    kept = s.respace(most, "karras").timesteps
    assert len(kept) == most and (np.diff(kept) > 0).all() and kept[-1] == 999
    with pytest.raises(errors.ConfigError, match=r"'karras' of 400 .* at most 142 steps"):
        s.respace(400, "karras")
    with pytest.raises(errors.ConfigError, match="at most 142 steps"):
        s.respace(143, "karras")
