"""No traced value outlives its trace: one loss of every stage under JAX's leak checker.

It keeps no program it has traced and is slow; so only abstract values go through each loss.
"""

import jax
import numpy as np
import pytest

from unclip import tasks


@pytest.fixture(scope="module")
def task_of(tiny_config):
    """task_of(stage) -> the micro task of its config, with what its frozen parts look like."""

    def make(stage):
        config, parts = tiny_config(stage), {}
        if stage in tasks.NEEDS_CLIP:
            clip = tiny_config("clip").arch.to_dict()
            shapes = jax.eval_shape(tasks.make("clip", clip, {}).init, jax.random.key(0))
            parts = {"clip": clip, "clip_params": jax.tree.map(zeros, shapes)}
        if stage == "prior":
            width = config.arch.embed_dim
            parts["statistics"] = {"mean": np.zeros(width, "f4"), "std": np.ones(width, "f4")}
        return tasks.make(stage, config.arch.to_dict(), config.task.to_dict(), **parts)

    return make


def zeros(leaf):
    return np.zeros(leaf.shape, leaf.dtype)


def gradient_shapes(task):
    params = jax.eval_shape(task.init, jax.random.key(0))
    loss = lambda *args: task.loss(*args, train=True)
    slope = jax.value_and_grad(loss, has_aux=True)
    batch = task.batch_spec(2)
    return params, jax.eval_shape(slope, params, task.frozen(), batch, jax.random.key(1))[1]


@pytest.mark.parametrize("stage", tasks.STAGES)
def test_no_stage_leaks(stage, task_of):
    with jax.numpy_rank_promotion("allow"), jax.checking_leaks():
        params, slopes = gradient_shapes(task_of(stage))
    assert jax.tree.map(np.shape, slopes) == jax.tree.map(np.shape, params)


def test_a_leak_is_found():
    kept = []

    def loss(x):
        kept.append(2 * x)
        return x

    with pytest.raises(Exception, match="Leaked"), jax.checking_leaks():
        jax.eval_shape(loss, np.float32(1))
