"""The transformer against a float64 numpy copy, and the properties its users rely on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from unclip.errors import ConfigError
from unclip.models import transformer as tf

WIDTH, LAYERS, HEADS = 16, 2, 4


def make(**kwargs):
    return tf.Transformer(**{"width": WIDTH, "layers": LAYERS, "heads": HEADS, **kwargs})


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, WIDTH)), jnp.float32)


@pytest.fixture(scope="module")
def params(x):
    tree = jax.eval_shape(make().init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(1)  # no zeros or ones, which would hide mistakes

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape) * (leaf.shape[0] ** -0.5 if leaf.ndim > 1 else 0.1)
        return jnp.asarray(noise + (path[-1].key == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


@pytest.fixture(scope="module")
def causal(params, x):
    """What the plain transformer makes of x under the causal mask."""
    return run(make(), params, x, tf.causal_mask(7))


def run(module, params, *args):
    return jax.jit(module.apply)({"params": params}, *args)


def np_act(name, x):
    if name == "gelu":
        return 0.5 * x * (1 + erf(x / np.sqrt(2)))
    if name == "quick_gelu":
        return x / (1 + np.exp(-1.702 * x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def np_ln(p, x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * p[
        "scale"
    ] + p["bias"]


def np_dense(p, x):
    return x @ p["kernel"] + p["bias"]


def np_attend(q, k, v, mask):
    """One head at a time: q, k, v [T, H, D], mask [T, T]."""
    out = np.zeros_like(q)
    for h in range(q.shape[1]):
        logits = q[:, h] @ k[:, h].T / np.sqrt(q.shape[2])
        weights = np.where(mask, np.exp(logits), 0)
        out[:, h] = weights / weights.sum(-1, keepdims=True) @ v[:, h]
    return out


def np_block(p, x, mask, act, eps=1e-5):
    h = np_ln(p["ln_1"], x, eps)
    q, k, v = (np_dense(p["attn"][n], h).reshape(len(x), HEADS, -1) for n in "qkv")
    x = x + np_dense(p["attn"]["out"], np_attend(q, k, v, mask).reshape(x.shape))
    h = np_act(act, np_dense(p["mlp"]["fc"], np_ln(p["ln_2"], x, eps)))
    return x + np_dense(p["mlp"]["proj"], h)


@pytest.mark.parametrize("act, eps", [("gelu", 1e-5), ("gelu_tanh", 1e-5), ("quick_gelu", 0.1)])
def test_forward_equals_numpy(params, x, act, eps):
    mask = np.array(tf.causal_mask(7)[0, 0])
    ours = run(make(activation=act, eps=eps), params, x, mask)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    for row in range(2):
        ref = np.asarray(x[row], np.float64)
        for i in range(LAYERS):
            ref = np_block(p[f"block_{i}"], ref, mask, act, eps)
        np.testing.assert_allclose(ours[row], ref, rtol=2e-5, atol=2e-5)


def test_parameter_layout(params):
    paths = {
        jax.tree_util.keystr(k, simple=True, separator="/")
        for k, _ in jax.tree_util.tree_leaves_with_path(params["block_0"])
    }
    dense = ["attn/q", "attn/k", "attn/v", "attn/out", "mlp/fc", "mlp/proj"]
    assert paths == {f"{d}/{n}" for d in dense for n in ("kernel", "bias")} | {
        f"{ln}/{n}" for ln in ("ln_1", "ln_2") for n in ("scale", "bias")
    }
    assert params["block_0"]["mlp"]["fc"]["kernel"].shape == (WIDTH, 4 * WIDTH)
    wide = jax.eval_shape(make(mlp_width=50).init, jax.random.key(0), jnp.zeros((1, 2, WIDTH)))
    assert wide["params"]["block_1"]["mlp"]["fc"]["kernel"].shape == (WIDTH, 50)


MASKS = {
    "none": lambda rng: None,
    "by row": lambda rng: rng.random((3, 1, 1, 9)) < 0.6,
    "for all rows": lambda rng: np.tril(np.ones((7, 9), bool), 2)[None, None],
    "by row and query": lambda rng: rng.random((3, 1, 7, 9)) < 0.6,
    "by head": lambda rng: rng.random((1, 2, 7, 9)) < 0.6,
}


@pytest.mark.parametrize("at_once", [1, 3 * 63, 1 << 20], ids=["one", "some", "all"])
@pytest.mark.parametrize("name", MASKS)
def test_attention_of_a_few_heads_at_a_time(name, at_once, monkeypatch):
    """On a CPU: a float64 softmax, and its gradients, however many heads are looked at together."""
    monkeypatch.setattr(tf, "LOGITS_AT_ONCE", at_once)
    rng = np.random.default_rng(4)
    q, k, v, dy = (rng.normal(size=(3, n, 2, 4)) for n in (7, 9, 9, 7))
    mask = MASKS[name](rng)
    logits = np.einsum("bthd,bshd->bhts", q, k) / 2
    if mask is not None:
        logits = np.where(mask, logits, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bthd,bshd->bhts", dy, v)
    dl = p * (dp - (p * dp).sum(-1, keepdims=True)) / 2
    wanted = (
        np.einsum("bhts,bshd->bthd", p, v),
        np.einsum("bhts,bshd->bthd", dl, k),
        np.einsum("bhts,bthd->bshd", dl, q),
        np.einsum("bhts,bthd->bshd", p, dy),
    )

    @jax.jit
    def both(q, k, v, dy):
        y, pull = jax.vjp(lambda *a: tf.attention(*a, mask), q, k, v)
        return y, *pull(dy)

    for got, want in zip(both(*map(jnp.float32, (q, k, v, dy))), wanted):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_attention_masks_and_empty_rows():
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 5, 2, 4)), jnp.float32) for _ in range(3))
    mask = rng.random((2, 1, 5, 5)) > 0.4
    mask[:, :, :, 0] = True
    mask[1, 0, 3] = False  # nothing to attend to

    @jax.jit
    def slopes(q, k, v, mask):
        out, pull = jax.vjp(lambda q, k, v: tf.attention(q, k, v, mask), q, k, v)
        return out, pull(2 * out)

    out, grads = slopes(q, k, v, jnp.asarray(mask))
    out = np.asarray(out)
    assert np.isfinite(out).all()
    assert all(np.isfinite(g).all() for g in grads)
    for b in range(2):
        rows = [i for i in range(5) if mask[b, 0, i].any()]
        ref = np_attend(
            *(np.asarray(a[b], np.float64) for a in (q, k, v)),
            np.where(mask[b, 0].any(-1, keepdims=True), mask[b, 0], True),
        )
        np.testing.assert_allclose(out[b][rows], ref[rows], rtol=1e-5, atol=1e-5)
    # Lower-rank masks broadcast from the right.
    flat = np.array([True, False, True, True, False])
    attend = jax.jit(tf.attention)
    np.testing.assert_array_equal(
        attend(q, k, v, flat), attend(q, k, v, np.broadcast_to(flat, (2, 2, 5, 5)))
    )


def test_softmax_is_float32_under_bf16():
    """512 equal keys: a bf16 softmax sum would stall at 256 and double the result."""
    q = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    k, v = jnp.ones((1, 512, 1, 8), jnp.bfloat16), jnp.ones((1, 512, 1, 8), jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(tf.attention(q, k, v), np.float32), 1.0, rtol=4e-3)


def test_bad_names_name_the_choices(x):
    q = jnp.ones((1, 2, 1, 8))
    with pytest.raises(ConfigError, match=r"'flash'.*cudnn, fused, xla"):
        tf.attention(q, q, q, impl="flash")
    with pytest.raises(ConfigError, match=r"cudnn.*float32.*bfloat16"):
        tf.attention(q, q, q, impl="cudnn")
    with pytest.raises(ConfigError, match="did you mean 'gelu"):
        tf.activation_fn("gelu_tahn")
    with pytest.raises(ConfigError, match="did you mean 'dots_saveable'"):
        tf.remat_policy("dot_saveable")
    with pytest.raises(ConfigError, match="did you mean 'dots_saveable'"):
        tf.remat_policy("residual=full,attention=dot_saveable", "residual")
    with pytest.raises(ConfigError, match=r"kind of block.*'resdual'.*did you mean 'residual'"):
        tf.remat_policy("resdual=full")
    with pytest.raises(ConfigError, match=r"kind of block.*'full'"):
        tf.remat_policy("full,residual=full")
    with pytest.raises(ConfigError, match="width 16 does not divide into 3 heads"):
        make(heads=3).init(jax.random.key(0), x)
    assert tf.remat_policy(None) is None


def test_a_remat_policy_by_kind():
    both = "residual=full, text=save_attention"
    assert tf.remat_policy(both, "residual") is tf.REMAT_POLICIES["full"]
    assert tf.remat_policy(both, "text") is tf.REMAT_POLICIES["save_attention"]
    assert tf.remat_policy(both, "attention") is None
    for kind in tf.REMAT_KINDS:
        assert tf.remat_policy("full", kind) is tf.REMAT_POLICIES["full"]


def test_causal_mask_hides_the_future(params, x):
    apply = jax.jit(lambda x: make().apply({"params": params}, x, tf.causal_mask(7)))
    changed = np.array(x)
    changed[:, 4, 0] += 3.0  # not every channel: layer norm would not see it
    before, after = apply(x), apply(changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (np.abs(before[:, 4:] - after[:, 4:]).max(-1) > 1e-3).all()


def test_folded_equals_unfolded_both_ways(params, x, causal):
    mask = tf.causal_mask(7)
    folded = tf.stack_blocks({"deep": params, "other": {"block_0": jnp.ones(3)}})
    assert folded["deep"]["blocks"]["attn"]["q"]["kernel"].shape == (LAYERS, WIDTH, WIDTH)
    assert "block_0" in folded["other"]  # not a transformer block: left alone
    np.testing.assert_allclose(
        run(make(fold=True), folded["deep"], x, mask), causal, rtol=1e-5, atol=1e-5
    )
    back = tf.unstack_blocks(folded)
    jax.tree.map(np.testing.assert_array_equal, back["deep"], params)
    fresh = jax.eval_shape(make(fold=True).init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, folded["deep"])
    host = tf.stack_blocks(jax.tree.map(np.asarray, params))
    assert all(isinstance(a, np.ndarray) for a in jax.tree.leaves(host))


def test_stacking_orders_by_number():
    block = {part: {} for part in ("ln_2", "attn", "mlp")}
    tree = {f"block_{i}": {**block, "ln_1": {"scale": np.full(2, i)}} for i in (10, 2, 0, 1)}
    tree |= {f"block_{i}": {**block, "ln_1": {"scale": np.full(2, i)}} for i in range(3, 10)}
    np.testing.assert_array_equal(
        tf.stack_blocks(tree)["blocks"]["ln_1"]["scale"][:, 0], np.arange(11)
    )


def test_folded_init_draws_each_block_alone(x):
    p = jax.jit(make(fold=True).init)(jax.random.key(3), x)["params"]["blocks"]
    kernel = np.asarray(p["mlp"]["fc"]["kernel"])
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1
    # fan-in must not count the [layers] axis
    assert abs(kernel.std() - (2 * WIDTH) ** -0.5) < 0.02
    assert abs(np.std(p["attn"]["out"]["kernel"]) - (2 * LAYERS * WIDTH) ** -0.5) < 0.02


def gradient(params, x, **fields):
    module = make(**fields)
    return jax.jit(jax.grad(lambda p: jnp.square(module.apply({"params": p}, x)).mean()))(params)


@pytest.fixture(scope="module")
def plain_gradient(params, x):
    return gradient(params, x)


@pytest.mark.parametrize(
    "fold, remat",
    [
        (False, "save_attention"),
        (True, "full"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (False, "full"),
                (False, "dots_with_no_batch_dims_saveable"),
                (True, "dots_with_no_batch_dims_saveable"),
                (True, "save_attention"),
            )
        ),
    ],
)
def test_remat_changes_no_gradient(params, x, plain_gradient, fold, remat):
    """Nor does folding, with it."""
    change = tf.stack_blocks if fold else lambda tree: tree
    ours = gradient(change(params), x, fold=fold, remat=remat)
    for a, b in zip(jax.tree.leaves(change(plain_gradient)), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_remat_recomputes(params, x):
    def text(remat):
        module = make(remat=remat)
        loss = jax.grad(lambda p: module.apply({"params": p}, x).sum())
        return str(jax.make_jaxpr(loss)(params))

    assert "nothing_saveable" in text("full") and "nothing_saveable" not in text(None)


@pytest.mark.parametrize("fold", [False, True])
def test_cached_equals_whole(params, x, causal, fold):
    tree = {"params": tf.stack_blocks(params) if fold else params}
    module = make(fold=fold)
    cache = module.init_cache(2, 9)  # longer than the sequence: the rest is masked
    seen = jnp.arange(9)[None] <= jnp.arange(7)[:, None]
    step = jax.jit(lambda x, m, c, i: module.apply(tree, x, m, c, i))
    x, seen = np.asarray(x), np.asarray(seen)
    out, cache = step(x[:, :4], seen[:4], cache, 0)
    parts = [out]
    for i in range(4, 7):
        out, cache = step(x[:, i : i + 1], seen[i : i + 1], cache, i)
        parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, 1), causal, rtol=1e-5, atol=1e-5)


def test_bf16_is_close_and_params_stay_float32(params, x, causal):
    low = make(dtype=jnp.bfloat16)
    out = run(low, params, x, tf.causal_mask(7))
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.asarray(out, np.float32) - causal).max()
    assert error < 0.05 * float(np.abs(causal).max())
    leaves = jax.tree.leaves(jax.eval_shape(low.init, jax.random.key(0), x))
    assert {a.dtype for a in leaves} == {jnp.dtype(jnp.float32)}


def test_layer_norm_is_exact_far_from_zero():
    """mean(x^2) - mean(x)^2 in float32 would lose everything at an offset of 1e4."""
    rng = np.random.default_rng(5)
    x = (1e4 + rng.normal(size=(3, 64))).astype(np.float32)
    y = tf.LayerNorm().apply({"params": {"scale": jnp.ones(64), "bias": jnp.zeros(64)}}, x)
    ref = x.astype(np.float64)
    ref = (ref - ref.mean(-1, keepdims=True)) / np.sqrt(ref.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, ref, atol=5e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_layer_norm_gradient_is_that_of_its_formula(dtype):
    """Gains and biases may be kept in half precision, by converted weights."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(1, 2, (3, 5, 8)), jnp.float32) for _ in range(2))
    params = {n: jnp.asarray(rng.normal(1, 0.5, 8), dtype) for n in ("scale", "bias")}

    def formula(params, x):
        middle = x - x.mean(-1, keepdims=True)
        normed = middle / jnp.sqrt((middle**2).mean(-1, keepdims=True) + 1e-5)
        return normed * tf.beside(params["scale"], x) + tf.beside(params["bias"], x)

    ours = lambda params, x: tf.LayerNorm().apply({"params": params}, x)
    pull = lambda f: jax.jit(lambda p, x, dy: jax.vjp(f, p, x)[1](dy))(params, x, dy)
    for got, want in zip(*(jax.tree.leaves(pull(f)) for f in (ours, formula)), strict=True):
        assert got.dtype == want.dtype
        tolerance = 1e-5 if got.dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_products_over_rows_are_plain_products_and_transpose_no_activations():
    rng = np.random.default_rng(0)
    x, kernel, dy = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 50, 8), (8, 16), (3, 50, 16))
    )
    numbers = (((2,), (0,)), ((), ()))

    def gradients(product):
        pull = lambda x, kernel, dy: jax.vjp(lambda *a: product(*a, numbers), x, kernel)[1](dy)
        return jax.jit(pull).lower(x, kernel, dy).compile()

    ours, plain = gradients(tf.over_rows), gradients(jax.lax.dot_general)
    for got, want in zip(ours(x, kernel, dy), plain(x, kernel, dy), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert " copy(" in plain.as_text() and " copy(" not in ours.as_text()


def test_timestep_embedding():
    t = np.array([0, 1, 500, 999])
    out = np.asarray(tf.timestep_embedding(jnp.asarray(t, jnp.int32), 320))
    assert out.dtype == np.float32 and out.shape == (4, 320)
    angle = t[:, None] * 10000.0 ** (-np.arange(160) / 160)
    np.testing.assert_allclose(out, np.concatenate([np.cos(angle), np.sin(angle)], 1), atol=1e-4)
    np.testing.assert_array_equal(out[0], [1.0] * 160 + [0.0] * 160)
    odd = tf.timestep_embedding(jnp.asarray(t), 7)
    assert odd.shape == (4, 7) and not np.any(odd[:, -1])
