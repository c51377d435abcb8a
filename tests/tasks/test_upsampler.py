"""Drawing from an upsampler: its second network, injected noise, and what the network is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
