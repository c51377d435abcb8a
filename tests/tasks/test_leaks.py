"""No stage keeps a tracer beyond its trace, where it would fail or go stale in the next one."""

import jax
import numpy as np
import pytest

STAGES = [("clip", ""), ("prior", ""), ("decoder", ""), ("upsampler", "")]


@pytest.mark.parametrize(("stage", "kind"), STAGES)
@pytest.mark.slow
def test_losses_and_draws_leak_nothing(made, batch_of, stage, kind):
    task, params, frozen = made(stage, kind)
    batch = batch_of(task, 2)
    with jax.checking_leaks():
        step = lambda p, f, b: task.value_and_grad(p, f, b, jax.random.key(0), 2)[0]
        jax.make_jaxpr(step)(params, frozen, batch)
        sample = task.predict().get("sample")
        if sample is not None:
            draw = lambda p, f, b: sample(p, f, b, jax.random.key(0))
            jax.make_jaxpr(draw)(params, frozen, batch)


def test_a_leak_would_be_seen():
    """What the check above relies on."""
    kept = []

    def leaking(x):
        kept.append(x)
        return x + 1

    with pytest.raises(Exception, match=r"[Ll]eak"), jax.checking_leaks():
        jax.jit(leaking)(np.float32(1))
