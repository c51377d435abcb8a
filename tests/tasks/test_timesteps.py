"""Loss-aware timesteps against a plain loop, and in the step of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from unclip import errors
from unclip.tasks import timesteps
from unclip.training import step as steps


def told(t, loss, valid=None):
    valid = np.ones(len(t), bool) if valid is None else np.array(valid)
    return timesteps.seen(4, jnp.asarray(t), jnp.asarray(loss, jnp.float32), jnp.asarray(valid))


def remembered(memory, t, loss, **rest):
    return timesteps.remember(memory, told(t, loss, **rest), len(t))


def test_uniform_until_each_was_seen_ten_times():
    memory = timesteps.remember_nothing(4)
    for _ in range(9):
        memory = remembered(memory, [0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0])
        np.testing.assert_array_equal(timesteps.probabilities(memory), np.full(4, 0.25))
    memory = remembered(memory, [0, 1, 2], [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(timesteps.probabilities(memory), np.full(4, 0.25))
    p = np.asarray(timesteps.probabilities(remembered(memory, [3], [4.0])))
    np.testing.assert_allclose(p, 0.999 * np.arange(1, 5) / 10 + 0.00025, rtol=1e-5)


def test_the_memory_is_a_mean_and_then_forgets_a_tenth_a_visit():
    rng = np.random.default_rng(0)
    memory, mean, visits = timesteps.remember_nothing(4), np.zeros(4), np.zeros(4)
    for _ in range(40):
        t, loss = rng.integers(0, 4, 1), rng.uniform(0.1, 3, 1)
        memory = remembered(memory, t, loss)
        visits[t] = np.minimum(visits[t] + 1, 10)
        mean[t] += (loss**2 - mean[t]) / visits[t]
    np.testing.assert_allclose(memory["mean_square"], mean, rtol=1e-4)


def test_rows_that_are_not_valid_and_parts_of_a_batch():
    memory = remembered(
        timesteps.remember_nothing(4), [0, 1, 1], [1.0, 2.0, 9.0], valid=[True, True, False]
    )
    np.testing.assert_array_equal(memory["visits"], [1, 1, 0, 0])
    np.testing.assert_allclose(memory["mean_square"], [1, 4, 0, 0])
    halves = [told([0, 2], [1.0, 3.0]), told([2, 3], [5.0, 1.0])]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    nothing = timesteps.remember_nothing(4)
    whole = remembered(nothing, [0, 2, 2, 3], [1.0, 3.0, 5.0, 1.0])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(close, timesteps.remember(nothing, mean, 4), whole)


def test_weights_leave_the_mean_as_it_is():
    p = jnp.float32([0.1, 0.2, 0.3, 0.4])
    uniform = (jnp.arange(10_000) + 0.5) / 10_000
    t, weight = timesteps.draw(p, uniform)
    np.testing.assert_allclose(np.bincount(t) / 10_000, p, atol=2e-4)
    loss = jnp.float32([7.0, -1.0, 3.0, 0.5])
    assert float((weight * loss[t]).mean()) == pytest.approx(float(loss.mean()), rel=1e-3)
    assert int(timesteps.draw(p, jnp.float32([1.0]))[0][0]) == 3


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_run_keeps_the_memory_in_its_state(made, batch_of, accumulate):
    task, params, _ = made("upsampler", timesteps="loss_aware", t_below=6)
    config = ConfigDict({"seed": 0, "ema": 0.9, "accumulate": accumulate})
    config.optim = {"sam_rho": 0.0}
    tx = optax.chain(optax.scale_by_adam(), optax.scale(-1e-4))
    state = steps.make_init(task, tx)(jax.random.key(0), params)
    step = jax.jit(steps.make_step(task, tx, lambda step: 1e-4, config))
    first = {name: np.asarray(leaf) for name, leaf in state["memory"].items()}
    assert first["visits"].shape == (6,) and not first["visits"].any()
    for number in range(20):
        state, metrics = step(state, None, batch_of(task, 8, first=8 * number))
        assert all(jnp.ndim(value) == 0 for value in metrics.values())
        if number == 0:
            assert float(state["memory"]["visits"].sum()) == 8
    p = np.asarray(timesteps.probabilities(state["memory"]))
    assert (state["memory"]["visits"] == 10).all() and np.ptp(p) > 1e-3
    held = task.loss(params, None, batch_of(task, 4), jax.random.key(0), train=False)[1]
    assert "memory" not in held


def test_an_unknown_choice(made):
    with pytest.raises(errors.ConfigError, match="'loss-aware': did you mean 'loss_aware'"):
        made("upsampler", timesteps="loss-aware")
