"""The diffusion prior against float64 numpy, Karlo's size, and its masking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from unclip.errors import ConfigError
from unclip.models import prior
from unclip.models.transformer import stack_blocks

B, D, L, W, HEADS = 3, 6, 5, 16, 4
TINY = dict(embed_dim=D, context=L, text_width=7, width=W, layers=2, heads=HEADS, head_dim=4)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    mask = np.arange(L)[None] < np.array([[5], [3], [2]])
    return (
        jnp.asarray(rng.normal(size=(B, D)), jnp.float32),
        jnp.asarray([0, 417, 999], jnp.int32),
        jnp.asarray(rng.normal(size=(B, D)), jnp.float32),
        jnp.asarray(rng.normal(size=(B, L, 7)), jnp.float32),
        jnp.asarray(mask),
    )


def perturbed(model, inputs):
    tree = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(1)  # no zeros or ones, which would hide mistakes

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape) * (leaf.shape[0] ** -0.5 if leaf.ndim > 1 else 0.1)
        return jnp.asarray(noise + (path[-1].key == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


@pytest.fixture(scope="module")
def params(inputs):
    return perturbed(prior.DiffusionPrior(**TINY), inputs)


@pytest.fixture(scope="module")
def apply():
    model = prior.DiffusionPrior(**TINY)
    return jax.jit(lambda p, *a: model.apply({"params": p}, *a))


def np_ln(p, x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p[
        "scale"
    ] + p["bias"]


def np_dense(p, x):
    return x @ p["kernel"] + p["bias"]


def np_prior(p, z_noised, t, z_t, text, text_mask):
    """One row, every line written from the paper's sequence and Karlo's facts."""
    half = W // 2
    angle = t * 10000.0 ** (-np.arange(half) / half)
    time = np_dense(p["time_in"], np.concatenate([np.cos(angle), np.sin(angle)]))
    time = np_dense(p["time_out"], time / (1 + np.exp(-time)))
    x = (
        np.stack(
            [
                *np_dense(p["text"]["proj"], text),
                np_dense(p["z_t"]["proj"], z_t),
                time,
                np_dense(p["z_i"]["proj"], z_noised),
                p["query"],
            ]
        )
        + p["position"]
    )
    n = len(x)
    mask = np.tri(n, dtype=bool) & np.concatenate([text_mask, np.ones(4, bool)])
    for i in range(2):
        b = p["transformer"][f"block_{i}"]
        q, k, v = (np_dense(b["attn"][m], np_ln(b["ln_1"], x)).reshape(n, HEADS, -1) for m in "qkv")
        e = np.exp(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(W // HEADS)) * mask
        y = np.einsum("hqk,khd->qhd", e / e.sum(-1, keepdims=True), v).reshape(n, W)
        x = x + np_dense(b["attn"]["out"], y)
        h = np_dense(b["mlp"]["fc"], np_ln(b["ln_2"], x))
        x = x + np_dense(b["mlp"]["proj"], 0.5 * h * (1 + erf(h / np.sqrt(2))))
    return np_dense(p["out"], np_ln(p["norm_out"], x[-1]))


def test_forward_equals_numpy(params, inputs, apply):
    out = apply(params, *inputs)
    assert out.shape == (B, D) and out.dtype == jnp.float32
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    for row in range(B):
        ref = np_prior(
            p,
            *(
                np.asarray(a[row], np.float64 if a.dtype == jnp.float32 else a.dtype)
                for a in inputs
            ),
        )
        np.testing.assert_allclose(out[row], ref, rtol=3e-5, atol=3e-5)


def count(kwargs):
    model = prior.DiffusionPrior(**kwargs, fold=True)
    length, dim = kwargs["context"], kwargs["embed_dim"]
    text = jax.ShapeDtypeStruct((1, length), jnp.int32)
    if "text_width" in kwargs:
        text = jax.ShapeDtypeStruct((1, length, kwargs["text_width"]), jnp.float32)
    z = jax.ShapeDtypeStruct((1, dim), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, length), bool)
    tree = jax.eval_shape(model.init, jax.random.key(0), z, t, z, text, mask)
    return sum(int(np.prod(a.shape)) for a in jax.tree.leaves(tree))


def test_karlo_parameter_count():
    assert count(prior.PRESETS["karlo"]) == 1_022_028_544


def test_paper_parameter_count_by_arithmetic():
    w, length, dim, vocab = 2048, 256, 1024, 49408
    block = 12 * w * w + 13 * w
    inputs = vocab * w + 2 * (dim * w + w) + 2 * (w * w + w) + w + (length + 4) * w
    null = length * w + w
    assert count(prior.PRESETS["paper"]) == 24 * block + inputs + null + 2 * w + w * dim + dim
    assert 1.0e9 < count(prior.PRESETS["paper"]) < 1.5e9  # "1B" in Table 3


def test_every_input_matters(params, inputs, apply):
    base = apply(params, *inputs)
    z, t, z_t, text, mask = map(np.asarray, inputs)
    for changed in [
        (z + 0.5, t, z_t, text, mask),
        (z, t + 50, z_t, text, mask),
        (z, t, z_t + 0.5, text, mask),
        (z, t, z_t, text + np.eye(L)[None, :, :1], mask),
        (z, t, z_t, text, mask & (np.arange(L) != 1)),
    ]:
        assert (np.abs(apply(params, *changed) - base).max(-1) > 1e-5).all()


def test_padding_is_not_read(params, inputs, apply):
    z, t, z_t, text, mask = map(np.asarray, inputs)
    noisy = np.where(mask[..., None], text, 1e3)
    np.testing.assert_array_equal(apply(params, *inputs), apply(params, z, t, z_t, noisy, mask))
    everything = apply(params, z, t, z_t, text, np.ones_like(mask))
    none = apply(params, z, t, z_t, text, None)
    np.testing.assert_array_equal(everything, none)
    empty = apply(params, z, t, z_t, text, np.zeros_like(mask))  # no text token at all
    assert np.isfinite(empty).all()


def test_rows_do_not_mix(params, inputs, apply):
    one = [np.asarray(a)[1:2] for a in inputs]
    np.testing.assert_allclose(
        apply(params, *one)[0], apply(params, *inputs)[1], rtol=1e-5, atol=1e-6
    )


def test_fold_remat_and_bf16(params, inputs, apply):
    def value_and_grad(tree, **fields):
        def loss(tree):
            out = prior.DiffusionPrior(**TINY, **fields).apply({"params": tree}, *inputs)
            return jnp.square(out).mean(), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(tree)
        return out, grads

    base, plain = value_and_grad(params)
    np.testing.assert_allclose(apply(params, *inputs), base, rtol=1e-5, atol=1e-5)
    same, remat = value_and_grad(stack_blocks(params), fold=True, remat="full")
    np.testing.assert_allclose(same, base, rtol=1e-5, atol=1e-5)
    low = prior.DiffusionPrior(**TINY, dtype=jnp.bfloat16)
    low = jax.jit(low.apply)({"params": params}, *inputs)
    assert low.dtype == jnp.float32
    assert np.abs(low - base).max() < 0.05 * np.abs(base).max()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        stack_blocks(plain),
        remat,
    )
    # every parameter takes part
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(plain))


def test_learned_null_hides_the_text(inputs):
    model = prior.DiffusionPrior(**TINY, learned_null=True)
    p = perturbed(model, inputs)
    assert p["text"]["null"].shape == (L, W) and p["z_t"]["null"].shape == (W,)
    z, t, z_t, text, mask = map(np.asarray, inputs)
    run = jax.jit(lambda *a: model.apply({"params": p}, *a))
    drop = np.asarray([True, False, True])
    out = run(z, t, z_t, text, mask, drop)
    other = run(z, t, z_t + 1, text * 2, ~mask, drop)
    np.testing.assert_array_equal(out[::2], other[::2])  # dropped rows see none of it
    assert np.abs(out[1] - other[1]).max() > 1e-4
    kept = run(z, t, z_t, text, mask, np.zeros(B, bool))
    np.testing.assert_array_equal(out[1], kept[1])
    assert (np.abs(out[::2] - kept[::2]).max(-1) > 1e-4).all()
    np.testing.assert_allclose(kept, run(*inputs), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="learned_null"):
        jax.eval_shape(prior.DiffusionPrior(**TINY).init, jax.random.key(0), *inputs, drop)


def test_tokens_instead_of_hidden_states(inputs):
    kwargs = {k: v for k, v in TINY.items() if k != "text_width"} | {"vocab_size": 11}
    model = prior.DiffusionPrior(**kwargs, norm_in=True)
    z, t, z_t, _, mask = map(np.asarray, inputs)
    tokens = np.random.default_rng(3).integers(0, 11, (B, L)).astype(np.int32)
    p = perturbed(model, (z, t, z_t, tokens, mask))
    assert p["text"]["token"]["embedding"].shape == (11, W) and "norm_in" in p
    run = jax.jit(lambda tokens: model.apply({"params": p}, z, t, z_t, tokens, mask))
    out = run(tokens)
    np.testing.assert_array_equal(out, run(np.where(mask, tokens, 4).astype(np.int32)))
    moved = np.where(np.arange(L) == 1, (tokens + 1) % 11, tokens)
    assert (np.abs(out - run(moved)).max(-1) > 1e-5).all()


def test_errors_say_what_is_expected(inputs):
    z, t, z_t, text, mask = inputs

    def init(*args, **kwargs):
        jax.eval_shape(prior.DiffusionPrior(**TINY | kwargs).init, jax.random.key(0), *args)

    with pytest.raises(ConfigError, match="exactly one"):
        init(*inputs, vocab_size=11)
    with pytest.raises(ConfigError, match="exactly one"):
        init(*inputs, text_width=None)
    with pytest.raises(ConfigError, match="heads x head_dim = width"):
        init(*inputs, head_dim=3)
    with pytest.raises(ConfigError, match=r"\(3, 4, 7\).*float hidden states \[B, 5, 7\]"):
        init(z, t, z_t, text[:, :4], mask)
    with pytest.raises(ConfigError, match=r"expected both \[B, 6\]"):
        init(z[:, :5], t, z_t, text, mask)


def test_presets_fit_their_clip():
    for name in ("karlo", "paper", "emoji"):
        kwargs = prior.PRESETS[name]
        assert kwargs["heads"] * kwargs["head_dim"] == kwargs["width"]
    paper = prior.PRESETS["paper"]  # Table 3
    assert [paper[k] for k in ("context", "width", "layers", "heads")] == [256, 2048, 24, 32]
