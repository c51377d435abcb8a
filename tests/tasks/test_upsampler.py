"""Drawing from an upsampler: its second network, injected noise, and what the network is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip import errors, tasks
from unclip.tasks import keys

STEPS = 3


class Marked:
    """A network whose predicted x_0 is its parameter; notes the timesteps it was called at."""

    def __init__(self):
        self.called = []

    def apply(self, variables, x_t, t, low):
        jax.debug.callback(self.note, variables["params"], t[0], x_t)
        return jnp.full(x_t.shape, variables["params"], jnp.float32)

    def note(self, mark, t, x_t):
        self.called.append((float(mark), int(t), np.asarray(x_t)))


@pytest.fixture
def marked(made, with_model):
    task, _, _ = made("upsampler", parametrisation="x0", draw={"steps": STEPS, "sampler": "ddpm"})
    return with_model(task, Marked())


def draw(task, first, last=None, steps=STEPS, **noise):
    key = keys.sample_keys(jax.random.key(0), np.uint32([[0, 1], [0, 2]]))
    low = jnp.zeros((2, 4, 4, 3))
    run = jax.jit(
        lambda first, last: task.sample(
            first, {"last": last}, {"low": low}, key, draw={"steps": steps}, **noise
        )
    )
    return np.asarray(run(first, last))


def test_the_second_network_makes_the_last_step_alone(marked):
    pictures = draw(marked, 0.25, 0.75)
    jax.effects_barrier()
    np.testing.assert_array_equal(pictures, np.float32(0.75))
    seen = sorted((t, mark) for mark, t, _ in marked.model.called)
    assert seen == [(0, 0.75), (500, 0.25), (999, 0.25)]


def test_without_a_second_network_the_first_makes_every_step(marked):
    pictures = draw(marked, 0.25)
    jax.effects_barrier()
    np.testing.assert_array_equal(pictures, np.float32(0.25))
    assert {mark for mark, _, _ in marked.model.called} == {0.25}


def test_the_only_step_is_the_last(marked):
    np.testing.assert_array_equal(draw(marked, 0.25, 0.75, steps=1), np.float32(0.75))


def test_injected_noise_is_what_the_network_sees(marked):
    """x_T first, then the posterior mean of the marks and the given noise."""
    rng = np.random.default_rng(0)
    x_T = np.float32(rng.standard_normal((2, 8, 8, 3)))
    noise = np.float32(rng.standard_normal((STEPS, 2, 8, 8, 3)))
    draw(marked, 0.25, 0.75, x_T=x_T, noise=noise)
    jax.effects_barrier()
    seen = {t: x for _, t, x in marked.model.called}
    s = marked.schedule
    x = np.float64(x_T)
    for visit, (t, below) in enumerate(((999, 500), (500, 0))):
        np.testing.assert_allclose(seen[t], x, atol=1e-6)
        a, b = s.alpha_bar[t], s.alpha_bar[below]
        beta = 1 - a / b
        x = (b**0.5 * beta * 0.25 + (1 - beta) ** 0.5 * (1 - b) * x) / (1 - a)
        x += np.sqrt(beta * (1 - b) / (1 - a)) * noise[visit]
    np.testing.assert_allclose(seen[0], x, atol=1e-6)


@pytest.mark.slow
def test_sam_by_groups_of_rows(made, batch_of):
    """The mean of what every group finds alone (m-sharpness), however it is accumulated."""
    task, params, frozen = made("upsampler")
    batch, key = batch_of(task, 4), jax.random.key(0)
    run = jax.jit(
        lambda rows, accumulate, b: task.sharpness_aware(
            params, frozen, b, key, accumulate, 0.1, rows
        )[1],
        static_argnums=(0, 1),
    )
    alone = [run(0, 1, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(4)]
    want = jax.tree.map(lambda *g: sum(g) / 4, *alone)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6)
    jax.tree.map(close, run(1, 1, batch), want)
    jax.tree.map(close, run(1, 2, batch), want)
    whole = jax.tree.leaves(run(0, 1, batch))
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(whole, jax.tree.leaves(want)))


# ============================================================ noise on the small picture

LEVELS = {"channels": 8, "multipliers": (1,), "blocks": 1, "groups": 4, "attention": (False,)}


class Told:
    """A network that predicts x_0 = 0 and notes the small picture and its level."""

    def apply(self, variables, x_t, t, low, level=None, **_):
        jax.debug.callback(self.note, low, jnp.int32(-1) if level is None else level)
        return jnp.zeros(x_t.shape, jnp.float32)

    def note(self, low, level):
        self.low, self.level = np.asarray(low), np.asarray(level)


@pytest.fixture
def told(with_model):
    """told(noise_level): a task of which the network is told the level."""

    def make(noise_level):
        arch = LEVELS | {"noise_level": noise_level > 0}
        settings = {"parametrisation": "x0", "draw": {"steps": 2}, "noise_level": noise_level}
        task = tasks.make("upsampler", arch, {"image_size": 8, "factor": 2} | settings)
        return with_model(task, Told())

    return make


@functools.partial(jax.jit, static_argnums=0)
def train(task, rows):
    return task.loss({}, None, rows, jax.random.key(0), train=True)[0]


def batch(rows=64, side=8):
    rng = np.random.default_rng(0)
    sample = np.stack([np.zeros(rows), np.arange(rows)], -1).astype(np.uint32)
    image, low = (rng.integers(0, 256, (rows, n, n, 3)).astype(np.uint8) for n in (side, side // 2))
    return {"image": image, "low": low, "sample": sample, "valid": np.ones(rows, bool)}


def test_training_noises_the_small_picture_by_the_level_it_tells(told):
    task, rows = told(0.5), batch()
    clean = rows["low"] / 127.5 - 1
    train(task, rows)
    jax.effects_barrier()
    level, low = task.model.level, task.model.low
    top = round(0.5 * 999)
    assert level.dtype == np.int32 and level.min() >= 0 and level.max() <= top
    assert abs(level.mean() - top / 2) < top / 6 and len(set(level)) > 50
    signal = np.sqrt(task.schedule.alpha_bar[level])[:, None, None, None]
    noise = (low - signal * clean) / np.sqrt(1 - signal**2)
    kept = level > 0
    assert noise[kept].std() == pytest.approx(1, abs=0.05) and abs(noise[kept].mean()) < 0.05
    # By sample, not by row.
    reverse = {name: value[::-1] for name, value in rows.items()}
    train(task, reverse)
    jax.effects_barrier()
    np.testing.assert_array_equal(task.model.level, level[::-1])
    np.testing.assert_allclose(task.model.low, low[::-1], atol=1e-6)


def test_off_the_network_is_given_the_clean_picture_and_no_level(told):
    task, rows = told(0.0), batch(2)
    train(task, rows)
    jax.effects_barrier()
    assert task.model.level == -1
    np.testing.assert_allclose(task.model.low, rows["low"] / 127.5 - 1, atol=1e-6)


def test_drawing_takes_a_level_up_to_the_trained_one(told):
    task = told(0.5)
    low = jnp.full((2, 4, 4, 3), 0.25)
    sample_keys = keys.sample_keys(jax.random.key(0), np.uint32([[0, 1], [0, 2]]))

    @jax.jit
    def run(noise_level):
        draw = {"noise_level": noise_level}
        return task.sample({}, None, {"low": low}, sample_keys, draw=draw)

    seen = []
    for level in (0.0, 0.5, 0.5):
        run(jnp.float32(level)).block_until_ready()
        jax.effects_barrier()
        seen.append((task.model.low, task.model.level))
    np.testing.assert_array_equal(seen[0][0], low)
    assert [list(level) for _, level in seen[:2]] == [[0, 0], [500, 500]]
    np.testing.assert_array_equal(seen[1][0], seen[2][0])  # by the picture's key
    assert not np.array_equal(seen[1][0][0], seen[1][0][1])
    assert run._cache_size() == 1
    assert task.checked_draw({"noise_level": 0.25})["noise_level"] == 0.25
    for wrong in (0.6, -0.1, float("nan"), "0.1", None):
        with pytest.raises(errors.ConfigError, match=r"trained with levels 0 to 0\.5"):
            task.checked_draw({"noise_level": wrong})
    with pytest.raises(errors.ConfigError, match=r"upsampler_1: .* trained with no noise"):
        told(0.0).checked_draw({"noise_level": 0.1}, "upsampler_1")


def test_levels_need_a_network_that_is_told():
    settings = {"image_size": 8, "factor": 2}
    with pytest.raises(errors.ConfigError, match=r"arch\.noise_level=True"):
        tasks.make("upsampler", LEVELS, settings | {"noise_level": 0.3})
    with pytest.raises(errors.ConfigError, match=r"noise_level is 1\.5: expected 0"):
        tasks.make("upsampler", LEVELS | {"noise_level": True}, settings | {"noise_level": 1.5})
