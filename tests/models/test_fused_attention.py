"""The TPU's attention kernel, run by JAX itself: a float64 softmax and its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip.models import fused_attention as fused
from unclip.models import transformer as tf
from unclip.runtime import sharding

MASKS = {
    "none": lambda rng, queries, keys: None,
    "by row": lambda rng, queries, keys: rng.random((2, 1, 1, keys)) < 0.6,
    "for all rows": lambda rng, queries, keys: np.tril(np.ones((queries, keys), bool))[None, None],
    "by row and query": lambda rng, queries, keys: rng.random((2, 1, queries, keys)) < 0.6,
}


RUN = fused.Place(interpret=True)


def reference(q, k, v, dy, mask):
    """The result and the gradients of q, k, v, float64."""
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    p = np.exp(np.where(True if mask is None else mask, logits, -np.inf) - logits.max())
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bthd,bshd->bhts", dy, v)
    dlogits = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    return (
        np.einsum("bhts,bshd->bthd", p, v),
        np.einsum("bhts,bshd->bthd", dlogits, k),
        np.einsum("bhts,bthd->bshd", dlogits, q),
        np.einsum("bhts,bthd->bshd", p, dy),
    )


def arrays(queries, keys, heads, width, name):
    rng = np.random.default_rng(4)
    sizes = (queries, keys, keys, queries)
    given = [rng.normal(size=(2, n, heads, width)) for n in sizes]
    mask = MASKS[name](rng, queries, keys)
    if mask is not None:
        mask[..., 0] = True
    return *given, mask


def ours(q, k, v, dy, mask, dtype):
    cut = fused.cut(q.shape[1], k.shape[1], q.shape[2], q.shape[3])

    @jax.jit
    def both(dy, *given):
        y, back = jax.vjp(lambda *a: fused.attend(*a, mask, cut, RUN), *given)
        return y, *back(dy)

    return both(*(jnp.asarray(a, dtype) for a in (dy, q, k, v)))


def as_on_a_tpu(monkeypatch):
    """Runs the kernel by JAX where a TPU would; returns the shapes of the queries it is given."""
    monkeypatch.setattr(tf, "_platform", lambda x: "tpu")
    monkeypatch.setattr(fused, "Place", functools.partial(fused.Place, interpret=True))
    kernel, seen = fused._kernel, []

    def noted(cut, backward, interpret, bias, q, *rest):
        seen.append(q.shape)
        return kernel(cut, backward, interpret, bias, q, *rest)

    monkeypatch.setattr(fused, "_kernel", noted)
    return seen


# Heads side by side in 128 lanes, across them, and of as many; more queries than a step has.
@pytest.mark.parametrize(
    "queries, keys, heads, width, name",
    [
        (32, 41, 4, 32, "by row"),
        (24, 24, 4, 96, "for all rows"),
        (17, 17, 2, 128, "by row and query"),
        (64, 9, 2, 64, "none"),
    ],
)
def test_results_and_gradients(queries, keys, heads, width, name, monkeypatch):
    monkeypatch.setattr(fused, "LOGITS", 16 * 41)
    assert fused.cut(32, 41, 4, 32).rows == 16
    given = arrays(queries, keys, heads, width, name)
    for a, b in zip(ours(*given, jnp.float32), reference(*given), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_rounds_no_more_than_its_operands():
    given = arrays(16, 24, 2, 64, "by row")
    for a, b in zip(ours(*given, jnp.bfloat16), reference(*given), strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(np.asarray(a, np.float64) - b).max() < 0.02 * np.abs(b).max()


def test_a_query_that_may_attend_to_nothing_is_a_mean():
    q, k, v, dy, _ = arrays(16, 24, 2, 64, "none")
    y, *grads = ours(q, k, v, dy, np.zeros((1, 1, 1, 1), bool), jnp.float32)
    np.testing.assert_allclose(y, np.broadcast_to(v.mean(1)[:, None], y.shape), atol=1e-5)
    assert all(np.isfinite(g).all() for g in grads)


def test_sizes_without_a_cut():
    assert fused.cut(16, 16, 3, 64) is None, "192 lanes are no columns of 128"
    assert fused.cut(16, 16, 16, 72) is not None and fused.cut(16, 16, 128, 9) is None
    assert fused.cut(1, 576, 26, 64) is None, "one query, as codes are drawn"
    assert fused.cut(64, 324, 32, 64).heads == 16, "small products, many heads a step"
    assert fused.cut(1024, 1284, 16, 64) == fused.Cut(64, lanes=128, rows=256)
    assert fused.cut(4096, 4356, 8, 64) is None, "keys and their gradients do not fit"
    assert fused.cut(17, 10**6, 2, 64) is None, "no block of queries fits"


@pytest.mark.parametrize(
    "name, mesh",
    [
        ("by row", {"data": 4, "fsdp": 2}),
        ("for all rows", {"fsdp": 2, "tensor": 4}),
        pytest.param("none", {"data": 8}, marks=pytest.mark.slow),
    ],
)
def test_every_device_has_its_own_rows_and_heads(name, mesh, monkeypatch):
    """As on a TPU, but for the kernel being run by JAX."""
    seen = as_on_a_tpu(monkeypatch)
    mesh = sharding.make_mesh(mesh)
    rng, rows = np.random.default_rng(1), 8
    q, k, v = (rng.normal(size=(rows, 16, 8, 64)).astype(np.float32) for _ in range(3))
    mask = MASKS[name](rng, 16, 16)
    if mask is not None:
        mask[..., 0] = True
        mask = np.tile(mask, (rows // 2, 1, 1, 1)) if name == "by row" else mask
    put = functools.partial(jax.device_put, device=sharding.batch_sharding(mesh))
    function = jax.jit(functools.partial(tf.attention, mask=mask, impl="fused"))
    got = function(put(q), put(k), put(v))
    ways = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    assert seen == [(rows // ways[0], 16, 8 // ways[1] * 64)]
    want = jax.nn.dot_product_attention(q, k, v, mask=mask)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["none", "by row", "for all rows"])
def test_groups_are_rows_that_stay_on_their_devices(name, monkeypatch):
    """CLIP's SAM looks at groups of rows under vmap, each with a gradient of its own."""
    seen = as_on_a_tpu(monkeypatch)
    mesh = sharding.make_mesh({"fsdp": 4}, jax.devices()[:4])
    rng, groups = np.random.default_rng(2), 4
    q, k, v = (rng.normal(size=(groups, 4, 16, 2, 64)).astype(np.float32) for _ in range(3))
    mask = MASKS[name](rng, 16, 16)
    if name == "by row":
        mask[..., 0] = True
        mask = np.tile(mask, (2, 1, 1, 1))
    put = functools.partial(jax.device_put, device=sharding.batch_sharding(mesh))

    def grads(attend):
        loss = lambda *given: (attend(*given) ** 2).sum()
        return jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2))))(put(q), put(k), put(v))

    got = grads(functools.partial(tf.attention, mask=mask, impl="fused"))
    want = grads(functools.partial(jax.nn.dot_product_attention, mask=mask))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert seen[-1] == (groups * 4 // 4, 16, 2 * 64)


def test_other_platforms_do_as_xla():
    q, k, v, _, mask = (a for a in arrays(16, 24, 2, 64, "by row"))
    q, k, v = (jnp.asarray(a, jnp.float32) for a in (q, k, v))
    same = [tf.attention(q, k, v, mask, impl=impl) for impl in ("fused", "xla")]
    np.testing.assert_array_equal(*same)
