"""Which operations a profile names, and what they took."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def operations():
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from benchmarks import operations

    return operations


PROGRAM = """HloModule jit_step, entry_computation_layout={()->f32[8]{0}}

%fused_computation (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %e = f32[8]{0} exponential(%p), metadata={op_name="jit(step)/net/block_3/act/exp"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %f.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused_computation
  %f.2 = f32[8]{0} tanh(%f.1), metadata={op_name="jit(step)/net/block_11/act/tanh"}
  ROOT %f.3 = f32[8]{0} tanh(%f.2), metadata={op_name="jit(step)/net/block_2/act/tanh"}
}
"""


def test_layers_are_put_together_and_fusions_named_by_what_they_make(operations):
    events = [("f.2", 3.0), ("f.3", 1.0), ("f.1", 1.0), ("f.1", 1.0), ("strange", 0.5)]
    rows = operations.by_name(events, PROGRAM, steps=2)
    assert rows == [
        ("jit(step)/net/block_*/act/tanh", "tanh", 2.0, 1.0),
        ("jit(step)/net/block_*/act/exp", "fusion", 1.0, 1.0),
        ("strange", "unknown", 0.25, 0.5),
    ]
    lines = operations.table(rows, top=1).splitlines()
    assert lines[1].split() == ["61.5%", "2000.00", "1", "tanh", rows[0].name]
    assert lines[2].split() == ["38.5%", "1250.00", "2", "others"]


def test_a_step_under_the_profiler(operations):
    """A loop is what runs in it; the large product, in the loop, is the dearest by far."""

    def step(x, w):
        with jax.named_scope("layers"):
            x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=3)
        return jnp.sin(x[:1])

    x = jnp.ones((256, 256))
    compiled = jax.jit(step).lower(x, x).compile()
    rows = operations.profile(compiled, lambda: compiled(x, x).block_until_ready(), steps=2)
    assert "layers" in rows[0].name and "dot_general" in rows[0].name and rows[0].times == 3
    assert not any(row.kind == "while" for row in rows)
    assert rows[0].seconds > sum(row.seconds for row in rows) / 2
