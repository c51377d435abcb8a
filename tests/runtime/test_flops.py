"""Operations of a step by the trace of its loss, against counts by hand."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from unclip.runtime import flops

F32 = jnp.float32


def shape(*sides):
    return jax.ShapeDtypeStruct(sides, F32)


def test_products_cost_as_often_as_the_gradient_needs_them():
    """The first kernel's input is data: forward and one gradient. The second's is not: both."""
    m, k, n, p = 4, 5, 6, 7
    loss = lambda w, x: ((x @ w["a"]) @ w["b"]).sum()
    weights = {"a": shape(k, n), "b": shape(n, p)}
    want = 2 * (2 * m * k * n) + 3 * (2 * m * n * p) + 2 * m * p  # and the sum, both ways
    assert flops.count(loss, weights, shape(m, k)) == want


def test_what_is_frozen_costs_its_forward_pass_alone():
    m, k, n = 4, 5, 6
    loss = lambda w, frozen, x: ((x @ frozen) @ w).sum()
    want = 2 * m * k * n + 2 * (2 * m * n * 3) + 2 * m * 3
    assert flops.count(loss, shape(n, 3), shape(k, n), shape(m, k)) == want


@pytest.mark.parametrize("rematerialised", [False, True])
def test_a_loop_counts_as_often_as_it_runs_and_nothing_twice(rematerialised):
    m, n, layers = 4, 6, 5
    turn = lambda h, w: (h @ w, None)
    turn = jax.checkpoint(turn) if rematerialised else turn
    loss = lambda w, x: jax.lax.scan(turn, x, w)[0].sum()
    # What a turn is given depends on the weights of the turns before it.
    want = layers * 3 * (2 * m * n * n) + 2 * m * n
    assert flops.count(loss, shape(layers, n, n), shape(m, n)) == want


@pytest.mark.parametrize(("stride", "spread"), [(1, 1), (2, 1), (1, 2)])
def test_a_convolution_counts_what_is_neither_padding_nor_dilation(stride, spread):
    size, kernel, channels, features, pad = 6, 3, 2, 5, 1
    loss = lambda w, x: jax.lax.conv_general_dilated(
        x, w, (stride, stride), [(pad, pad)] * 2, lhs_dilation=(spread, spread)
    ).sum()
    x, w = shape(3, channels, size, size), shape(features, channels, kernel, kernel)
    out = jax.eval_shape(
        lambda w, x: jax.lax.conv_general_dilated(
            x, w, (stride, stride), [(pad, pad)] * 2, lhs_dilation=(spread, spread)
        ),
        w,
        x,
    ).shape
    pairs = 0  # (place of the result, place of the kernel) that read a number, along one side
    for o, k in itertools.product(range(out[2]), range(kernel)):
        at = o * stride + k - pad
        pairs += 0 <= at <= (size - 1) * spread and at % spread == 0
    want = 2 * (2 * 3 * features * channels * pairs**2) + 2 * 3 * features * out[2] * out[3]
    assert flops.count(loss, w, x) == want
