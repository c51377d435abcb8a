"""The U-Net against independent numpy, flax's own GroupNorm and the published layout."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip.errors import ConfigError
from unclip.models import unet
from unclip.models.transformer import timestep_embedding
from unclip.models.unet import AttentionBlock, Norm, Reads, ResBlock, Style, UNet

TINY = dict(
    channels=8,
    multipliers=(1, 2),
    blocks=2,
    attention=(False, True),
    out_channels=3,
    head_dim=8,
    groups=4,
)
SMALL = dict(multipliers=(1,), attention=(True,))
STYLE = Style(8, True, "group", 4, 1e-5, 0.0, jnp.float32, None, False, "xla")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def randomise(tree, seed=0, scale=0.2):
    """Every leaf random, so that nothing is hidden by an output layer that starts at zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape) * scale, v.dtype), tree)


@pytest.fixture(scope="module")
def batch():
    mask = jnp.array([[True, True, False, True, False], [True, False, False, False, False]])
    t = jnp.array([3, 977])
    return normal(0, 2, 8, 8, 3), t, normal(1, 2, 32), normal(2, 2, 5, 6), mask


@pytest.fixture(scope="module")
def params(batch):
    shapes = jax.eval_shape(lambda k: UNet(**TINY).init(k, *batch), jax.random.key(0))
    return randomise(shapes["params"])


@pytest.fixture(scope="module")
def value_and_grad():
    """Loss and gradient of the tiny net with the given fields changed, jitted once."""

    @functools.cache
    def make(**fields):
        model = UNet(**TINY | fields)

        def loss(p, args):
            y = model.apply({"params": p}, *args)
            return jnp.sum(y * normal(9, *y.shape)), y

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    return make


@pytest.fixture(scope="module")
def small_params(batch):
    shapes = jax.eval_shape(UNet(**TINY | SMALL).init, jax.random.key(0), *batch)
    return randomise(shapes["params"])


@pytest.fixture(scope="module")
def apply():
    return jax.jit(lambda p, *a: UNet(**TINY).apply({"params": p}, *a))


@pytest.fixture(scope="module")
def y(apply, params, batch):
    return np.asarray(apply(params, *batch))


# --- numpy float64 oracles -----------------------------------------------------------------------


def f64(tree):
    return jax.tree.map(lambda v: np.asarray(v, np.float64), tree)


def np_norm(x, p, groups=4, eps=1e-5):
    b, c = x.shape[0], x.shape[-1]
    out = np.empty_like(x)
    for i in range(b):
        for g in range(groups):
            part = slice(g * c // groups, (g + 1) * c // groups)
            v = x[i, :, :, part]
            out[i, :, :, part] = (v - v.mean()) / np.sqrt(v.var() + eps)
    return out * p["scale"] + p["bias"]


def np_conv(x, p):
    kernel = p["kernel"]
    pad = kernel.shape[0] // 2
    _, h, w, _ = x.shape
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    out = p["bias"] + np.zeros((*x.shape[:3], kernel.shape[-1]))
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            out += padded[:, i : i + h, j : j + w] @ kernel[i, j]
    return out


def np_silu(x):
    return x / (1 + np.exp(-x))


def np_dense(x, p):
    return x @ p["kernel"] + p["bias"]


def np_resample(x, how):
    if how == "down":
        return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    return x.repeat(2, 1).repeat(2, 2) if how == "up" else x


def np_res(x, emb, p, how=None, scale_shift=True):
    h = np_silu(np_norm(x, p["norm_1"]))
    x, h = np_resample(x, how), np_resample(h, how)
    h = np_conv(h, p["conv_1"])
    time = np_dense(emb, p["time"])[:, None, None]
    if scale_shift:
        scale, shift = np.split(time, 2, -1)
        h = np_norm(h, p["norm_2"]) * (1 + scale) + shift
    else:
        h = np_norm(h + time, p["norm_2"])
    h = np_conv(np_silu(h), p["conv_2"])
    return h + (np_conv(x, p["skip"]) if "skip" in p else x)


def np_attention(x, context, mask, p, head_dim=8):
    b, h, w, c = x.shape
    tokens = np_norm(x, p["norm"]).reshape(b, h * w, c)
    q, k, v = (np_dense(tokens, p[n]) for n in "qkv")
    k = np.concatenate([np_dense(context, p["context_k"]), k], 1)
    v = np.concatenate([np_dense(context, p["context_v"]), v], 1)
    keep = np.concatenate([np.asarray(mask), np.ones((b, h * w), bool)], 1)
    y = np.empty_like(q)
    for n in range(c // head_dim):
        s = slice(n * head_dim, (n + 1) * head_dim)
        logits = q[..., s] @ k[..., s].swapaxes(1, 2) / np.sqrt(head_dim)
        weights = np.exp(logits - logits.max()) * keep[:, None]
        y[..., s] = weights / weights.sum(-1, keepdims=True) @ v[..., s]
    return x + np_dense(y, p["out"]).reshape(x.shape)


def np_unet(x, t, emb, context, mask, p):
    """The tiny net (two levels, two blocks, attention on the coarse one), written out."""
    time = np_silu(np_dense(np.asarray(timestep_embedding(t, 8), np.float64), p["time"]["fc_1"]))
    e = np_silu(np_dense(time, p["time"]["fc_2"]) + emb)
    d0, d1, mid, u1, u0 = (p[n] for n in ("down_0", "down_1", "mid", "up_1", "up_0"))
    s0 = np_conv(x, p["conv_in"])
    s1 = np_res(s0, e, d0["res_0"])
    s2 = np_res(s1, e, d0["res_1"])
    s3 = np_res(s2, e, d0["downsample"], "down")
    s4 = np_attention(np_res(s3, e, d1["res_0"]), context, mask, d1["attn_0"])
    s5 = np_attention(np_res(s4, e, d1["res_1"]), context, mask, d1["attn_1"])
    h = np_attention(np_res(s5, e, mid["res_0"]), context, mask, mid["attn_0"])
    h = np_res(h, e, mid["res_1"])
    for j, skip in enumerate((s5, s4, s3)):
        h = np_res(np.concatenate([h, skip], -1), e, u1[f"res_{j}"])
        h = np_attention(h, context, mask, u1[f"attn_{j}"])
    h = np_res(h, e, u1["upsample"], "up")
    for j, skip in enumerate((s2, s1, s0)):
        h = np_res(np.concatenate([h, skip], -1), e, u0[f"res_{j}"])
    return np_conv(np_silu(np_norm(h, p["norm_out"])), p["conv_out"])


# --- norms ---------------------------------------------------------------------------------------


def test_group_norm_equals_flax():
    x, p = normal(0, 2, 6, 4, 16) * 3 + 5, {"scale": normal(1, 16), "bias": normal(2, 16)}
    ours = jax.jit(Norm(STYLE).apply)({"params": p}, x)
    flax = nn.GroupNorm(4, epsilon=1e-5, use_fast_variance=False).apply({"params": p}, x)
    np.testing.assert_allclose(ours, flax, atol=2e-5)


def test_group_norm_film_is_scale_then_shift():
    x, p = normal(0, 2, 4, 4, 8), {"scale": normal(1, 8), "bias": normal(2, 8)}
    scale, shift = normal(3, 2, 8), normal(4, 2, 8)
    expected = np_norm(f64(x), f64(p)) * (1 + f64(scale)[:, None, None]) + f64(shift)[:, None, None]
    ours = Norm(STYLE).apply({"params": p}, x, (scale, shift))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_rms_norm_sees_one_pixel_only():
    x, p = normal(0, 1, 4, 4, 8), {"scale": normal(1, 8)}
    rms = Norm(STYLE._replace(norm="rms"))
    y = rms.apply({"params": p}, x)
    expected = f64(x) / np.sqrt((f64(x) ** 2).mean(-1, keepdims=True) + 1e-5) * f64(p["scale"])
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(rms.apply({"params": p}, x[:, 1:3]), y[:, 1:3])


def test_statistics_are_float32_under_bfloat16():
    x, p = normal(0, 1, 16, 16, 8) + 20, {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    y = Norm(STYLE._replace(dtype=jnp.bfloat16)).apply({"params": p}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(f64(y), np_norm(f64(x), f64(p)), atol=0.03)


# --- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how,scale_shift,features", [(None, True, 12), ("down", False, 8), ("up", True, 8)]
)
def test_res_block_equals_numpy(how, scale_shift, features):
    x, emb = normal(0, 2, 4, 6, 8), normal(1, 2, 5)
    block = ResBlock(STYLE._replace(scale_shift=scale_shift), features, how)
    reads = Reads(emb, None, None, None)
    p = randomise(jax.eval_shape(block.init, jax.random.key(0), x, reads)["params"])
    expected = np_res(f64(x), f64(emb), f64(p), how, scale_shift)
    got = jax.jit(block.apply)({"params": p}, x, reads)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_attention_equals_numpy_one_softmax_over_context_and_self():
    x, context = normal(0, 2, 3, 4, 16), normal(1, 2, 5, 6)
    mask = jnp.array([[True, False, True, True, False], [False] * 5])
    block = AttentionBlock(STYLE)
    reads = Reads(None, context, mask, None)
    p = randomise(jax.eval_shape(block.init, jax.random.key(0), x, reads)["params"], scale=0.6)
    expected = np_attention(f64(x), f64(context), mask, f64(p))
    got = jax.jit(block.apply)({"params": p}, x, reads)
    np.testing.assert_allclose(got, expected, atol=1e-5)


# --- the whole net -------------------------------------------------------------------------------


def test_unet_equals_numpy(y, params, batch):
    expected = np_unet(*(f64(v) if i != 1 else v for i, v in enumerate(batch)), f64(params))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_fresh_unet_returns_zeros_and_only_its_last_layer_learns_first(batch, value_and_grad):
    fresh = jax.jit(UNet(**TINY | SMALL).init)(jax.random.key(0), *batch)["params"]
    (_, y), grads = value_and_grad(**SMALL)(fresh, batch)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, 0)
    assert np.abs(grads["conv_out"]["kernel"]).max() > 0
    zeros = ("mid/res_0/conv_2", "up_0/res_2/conv_2", "down_0/attn_0/out", "mid/attn_0/out")
    for path in zeros:
        leaf = fresh
        for part in path.split("/"):
            leaf = leaf[part]
        np.testing.assert_array_equal(leaf["kernel"], 0)


def test_masked_context_does_not_matter(apply, y, params, batch):
    x, t, emb, context, mask = batch
    context, mask = np.asarray(context), np.asarray(mask)
    masked = np.where(mask[..., None], context, np.float32(1e3))
    np.testing.assert_array_equal(apply(params, x, t, emb, masked, mask), y)
    seen = context + np.eye(5, dtype=np.float32)[None, :, :1]  # the first token, seen by both
    assert np.abs(apply(params, x, t, emb, seen, mask) - y).max() > 1e-3


def test_fold_is_the_same_function(y, params, batch):
    folded = unet.fold_params(params)
    shapes = jax.eval_shape(lambda k: UNet(**TINY, fold=True).init(k, *batch), jax.random.key(0))
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, shapes["params"])
    assert {"fold_0_1", "downsample"} == set(folded["down_0"])
    assert {"res_0", "attn_0", "res_1", "attn_1"} == set(folded["down_1"])
    assert {"fold_0_1", "res_2", "attn_2", "upsample"} == set(folded["up_1"])
    assert {"res_0", "fold_1_2"} == set(folded["up_0"])
    same = jax.jit(UNet(**TINY, fold=True).apply)({"params": folded}, *batch)
    np.testing.assert_allclose(same, y, rtol=1e-4, atol=1e-4)
    round_trip = unet.unfold_params(folded)
    assert jax.tree.structure(round_trip) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, round_trip, params)


@pytest.mark.slow
def test_folding_and_remat_change_no_gradient(value_and_grad, small_params, batch):
    folded = unet.fold_params(small_params)
    assert {"fold_0_1"} == set(folded["down_0"])
    remat = value_and_grad(**SMALL, fold=True, remat="save_attention")
    program = str(remat.trace(folded, batch).jaxpr)
    assert "remat" in program or "checkpoint" in program
    (loss, y), grads = remat(folded, batch)
    grads = unet.unfold_params(grads)
    assert_same(value_and_grad(**SMALL)(small_params, batch), loss, y, grads)


@pytest.mark.slow
def test_gradients_of_two_levels(value_and_grad, params, batch):
    (loss, y), grads = value_and_grad(fold=True, remat="full")(unet.fold_params(params), batch)
    plain = value_and_grad()(params, batch)
    assert_same(plain, loss, y, unet.unfold_params(grads))


@pytest.mark.slow
def test_remat_alone_changes_no_gradient(value_and_grad, small_params, batch):
    (loss, y), grads = value_and_grad(**SMALL, remat="save_attention")(small_params, batch)
    assert_same(value_and_grad(**SMALL)(small_params, batch), loss, y, grads)


@pytest.mark.parametrize(
    "remat, fold", [("residual=full", False), ("attention=full", True), ("text=full", False)]
)
def test_remat_of_one_kind_of_block(value_and_grad, small_params, batch, remat, fold):
    """Convolutions are recomputed in residual blocks alone, a softmax in attention alone."""
    params = unet.fold_params(small_params) if fold else small_params
    program = jax.make_jaxpr(value_and_grad(**SMALL, fold=fold, remat=remat))(params, batch).jaxpr
    inside, outside = set(), set()

    def look(jaxpr, found):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            found.add(name)
            again = inside if name.startswith(("remat", "checkpoint")) else found
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    look(inner, again)

    look(program, outside)
    assert ("conv_general_dilated" in inside) == (remat == "residual=full")
    assert ("reduce_max" in inside or "custom_vjp_call" in inside) == (remat == "attention=full")


def assert_same(plain, loss, y, grads):
    (loss_0, y_0), grads_0 = plain
    np.testing.assert_allclose(loss, loss_0, rtol=1e-4)
    np.testing.assert_allclose(y, y_0, rtol=1e-4, atol=1e-4)
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(grads_0))
    assert jax.tree.structure(grads) == jax.tree.structure(grads_0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), grads, grads_0)


def test_bfloat16_computes_close_and_keeps_float32_outside(y, params, batch):
    model = UNet(**TINY, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(lambda k: model.init(k, *batch), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    low = np.asarray(jax.jit(model.apply)({"params": params}, *batch))
    assert low.dtype == np.float32
    error = np.linalg.norm(low - y) / np.linalg.norm(y)
    assert 1e-5 < error < 0.05


@pytest.mark.slow
def test_dropout_needs_keys_and_an_rng(batch):
    x, t, emb, *_ = batch
    model = UNet(**TINY | dict(dropout=0.5, blocks=1, attention=(False, False), fold=True))
    p = randomise(jax.eval_shape(model.init, jax.random.key(0), x, t, emb))
    rows = jax.random.split(jax.random.key(0), len(x))
    options = lambda key, rows: {"dropout_keys": rows, "rngs": {"dropout": key}}
    run = jax.jit(lambda key, rows: model.apply(p, x, t, emb, **options(key, rows)))
    a, b = run(jax.random.key(1), rows), run(jax.random.key(2), rows)
    assert np.abs(np.asarray(a) - b).max() > 1e-3
    np.testing.assert_array_equal(a, run(jax.random.key(1), rows))
    other = run(jax.random.key(1), rows.at[0].set(jax.random.key(9)))
    assert np.abs(np.asarray(a) - other)[0].max() > 1e-3
    np.testing.assert_array_equal(a[1:], other[1:])


def test_bfloat16_keeps_time_film_and_last_convolution_in_float32(batch):
    """Of each layer, the type that its product is computed in."""
    x, t, emb, *_ = batch
    model = UNet(**TINY | dict(blocks=1, attention=(False, False)), dtype=jnp.bfloat16)
    p = jax.eval_shape(model.init, jax.random.key(0), x, t, emb)
    found = {}

    def watch(next_function, args, kwargs, context):
        out = next_function(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, nn.Conv | nn.Dense):
            found["/".join(context.module.path)] = out.dtype
        return out

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda p: model.apply(p, x, t, emb), p)
    kept = {path for path, dtype in found.items() if dtype == jnp.float32}
    film = {path for path in found if path.endswith("/time")}
    assert film and kept == {"time/fc_1", "time/fc_2", "conv_out"} | film


def test_patch_is_space_to_depth_row_by_row():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    y = unet.space_to_depth(x, 2)
    assert y.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(y[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(unet.depth_to_space(y, 2), x)


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(norm="grop"), "did you mean 'group'"),
        (dict(attention=(True,)), "one bool per level"),
        (dict(groups=3), "groups=3"),
        (dict(head_dim=5), "head_dim=5"),
        (dict(patch=3), "multiples of 6"),
        (dict(time_dim=64), "emb of width 32"),
        (dict(remat="everything"), "remat"),
        (dict(attention_impl="flash"), "flash"),
    ],
)
def test_fields_that_do_not_fit_are_named(fields, message, batch):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(UNet(**TINY | fields).init, jax.random.key(0), *batch)


def test_upsampling_repeats_pixels_and_its_gradient_sums_them():
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 3, 5, 4)), rng.normal(size=(2, 6, 10, 4))
    x, dy = np.float32(x), np.float32(dy)
    y, pull = jax.vjp(unet.upsample_nearest, jnp.asarray(x))
    np.testing.assert_array_equal(y, x.repeat(2, 1).repeat(2, 2))
    sums = sum(dy[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    np.testing.assert_allclose(pull(jnp.asarray(dy))[0], sums, rtol=1e-6, atol=1e-6)
