"""The decoder: published sizes, how each condition enters, and how each is dropped."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip.errors import ConfigError
from unclip.models.decoder import PRESETS, Conditioner, Decoder
from unclip.models.unet import fold_params, unfold_params

TINY = dict(
    channels=8,
    multipliers=(1,),
    blocks=1,
    attention=(True,),
    mid_attention=False,
    head_dim=8,
    groups=4,
    time_dim=12,
    context_dim=8,
)
OWN_TEXT = dict(text_layers=2, text_heads=2, text_context=7, vocab=20, use_z_t=False)


def randomise(tree, seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape) * scale, v.dtype), tree)


def conditions(batch=2, size=4, z=6, length=5, width=10):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    lengths = np.array([[4], [2]] * (batch // 2) or [[length]])
    return dict(
        x_t=normal(batch, size, size, 3),
        t=np.arange(batch, dtype=np.int32) * 300 + 5,
        z_i=normal(batch, z),
        z_t=normal(batch, z),
        text_hidden=normal(batch, length, width),
        tokens=rng.integers(0, 20, (batch, length)).astype(np.int32),
        text_mask=np.arange(length) < lengths,
    )


@cache
def abstract(preset, size, z, length, width, fold=True):
    """The parameter shapes of a preset; nothing is computed. Folded, they are found sooner."""
    f, i = jnp.float32, jnp.int32
    shapes = [((1, size, size, 3), f), ((1,), i), ((1, z), f), ((1, z), f)]
    shapes += [((1, length, width), f), ((1, length), i), ((1, length), bool)]
    args = [jax.ShapeDtypeStruct(*s) for s in shapes]
    model = Decoder(**PRESETS[preset] | dict(fold=fold))
    return jax.eval_shape(lambda k, *a: model.init(k, *a)["params"], jax.random.key(0), *args)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def build():
    """(model, random params, jitted apply) for the tiny decoder with some fields changed."""
    made = {}

    def make(**fields):
        key = tuple(sorted(fields.items()))
        if key not in made:
            model = Decoder(**TINY | fields)
            shapes = jax.eval_shape(lambda k: model.init(k, **conditions()), jax.random.key(0))
            params = randomise(shapes["params"])
            made[key] = model, params, jax.jit(lambda p, kw: model.apply({"params": p}, **kw))
        return made[key]

    return make


# --- sizes ---------------------------------------------------------------------------------------


def test_karlo_sizes_to_the_digit():
    params = abstract("karlo", 64, 768, 77, 768, fold=False)
    assert {k: count(v) for k, v in params.items()} == {
        "unet": 885_439_686,
        "text_proj": 7_878_400,
    }
    proj = params["text_proj"]
    assert proj["null_image"].shape == (768,)
    assert proj["image_tokens"]["kernel"].shape == (768, 6144)
    assert proj["text_tokens"]["kernel"].shape == (768, 1536)
    # Going up, each block reads what came up and what the way down left, as in diffusers.
    net = params["unet"]
    reads = {
        i: [net[f"up_{i}"][f"res_{j}"]["conv_1"]["kernel"].shape[2] for j in range(4)]
        for i in range(4)
    }
    assert reads == {
        3: [2560, 2560, 2560, 2240],
        2: [2240, 1920, 1920, 1600],
        1: [1600, 1280, 1280, 960],
        0: [960, 640, 640, 640],
    }


def test_paper_is_3_5_billion():
    params = abstract("paper", 64, 1024, 256, 1024)
    assert count(params["unet"]) == 2_238_164_486
    blocks = params["text_proj"]["text"]["transformer"]
    assert count(blocks) == 1_208_598_528
    assert {leaf.shape[0] for leaf in jax.tree.leaves(blocks)} == {24}
    assert 3.5e9 < count(params) < 3.6e9


def test_glide_is_the_paper_without_the_image():
    paper, glide = (abstract(n, 64, 1024, 256, 1024) for n in ("paper", "glide"))
    assert count(glide["unet"]) == count(paper["unet"])
    assert set(paper["text_proj"]) - set(glide["text_proj"]) == {
        "null_image",
        "image_time",
        "image_tokens",
    }


def test_emoji_is_small():
    assert 2e6 < count(abstract("emoji", 16, 128, 32, 128)) < 4e6


def test_folding_a_whole_decoder_gives_the_folded_shapes():
    small = dict(channels=64, groups=8, context_dim=64, text_heads=4, text_layers=3, vocab=20)
    small |= dict(multipliers=(1, 2), attention=(False, True))
    args, trees = conditions(batch=1, size=8), []
    for fold in (False, True):
        model = Decoder(**PRESETS["paper"] | small | dict(fold=fold))
        init = partial(lambda model, k: model.init(k, **args)["params"], model)
        trees.append(jax.eval_shape(init, jax.random.key(0)))
    flat, folded = (jax.tree.map(jnp.shape, t) for t in trees)
    assert jax.tree.map(jnp.shape, jax.eval_shape(fold_params, trees[0])) == folded
    assert jax.tree.map(jnp.shape, jax.eval_shape(unfold_params, trees[1])) == flat
    assert set(folded["text_proj"]["text"]["transformer"]) == {"blocks"}
    assert set(folded["unet"]["down_0"]) == {"fold_0_2", "downsample"}


# --- how conditions enter ------------------------------------------------------------------------


def conditioner(**fields):
    base = dict(time_dim=12, context_dim=8, use_z_i=True, use_z_t=True, use_text_tokens=True)
    base |= dict(learned_null_text=False, text=None, dtype=jnp.float32)
    model, args = Conditioner(**base | fields), conditions()
    args = [args[k] for k in ("z_i", "z_t", "text_hidden", "tokens", "text_mask")]
    shapes = jax.eval_shape(lambda k: model.init(k, *args, None, None), jax.random.key(0))
    params = jax.tree.map(np.asarray, randomise(shapes["params"]))
    run = jax.jit(model.apply)
    return args, params, lambda *drop: run({"params": params}, *args, *drop)


def test_image_tokens_are_channel_major_as_karlo_stores_them():
    (z_i, *_), p, run = conditioner()
    _, context, mask = run(None, None)
    flat = np.asarray(z_i @ p["image_tokens"]["kernel"] + p["image_tokens"]["bias"])
    for token in range(4):
        np.testing.assert_allclose(context[:, token], flat[:, token::4], atol=1e-5)
    assert np.abs(context[:, 1] - flat[:, 8:16]).max() > 0.1  # the trap: token-major reading
    assert context.shape == (2, 9, 8)
    np.testing.assert_array_equal(mask[:, :4], True)
    np.testing.assert_array_equal(mask[:, 4:], conditions()["text_mask"])


def test_both_embeddings_are_projected_and_added_to_time():
    (z_i, z_t, *_), p, run = conditioner()
    emb, _, _ = run(None, None)
    expected = sum(
        np.asarray(z, np.float64) @ p[n]["kernel"] + p[n]["bias"]
        for z, n in ((z_i, "image_time"), (z_t, "text_time"))
    )
    np.testing.assert_allclose(emb, expected, atol=1e-5)


def test_text_tokens_are_projected_then_normalised():
    (_, _, hidden, *_), p, run = conditioner()
    _, context, _ = run(None, None)
    y = np.asarray(hidden, np.float64) @ p["text_tokens"]["kernel"] + p["text_tokens"]["bias"]
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    expected = y * p["text_norm"]["scale"] + p["text_norm"]["bias"]
    np.testing.assert_allclose(context[:, 4:], expected, atol=1e-4)


def test_dropped_text_is_masked_or_learned():
    drop = jnp.array([True, False])
    _, p, run = conditioner()
    emb, _, mask = run(None, drop)
    assert not mask[0, 4:].any() and mask[1, 4:].any()
    (_, z_t, *_), text = conditioner()[0], p["text_time"]
    np.testing.assert_allclose(
        run(None, None)[0][0] - emb[0], z_t[0] @ text["kernel"], atol=1e-5
    )  # z_t itself becomes zero, the projection's bias stays
    _, p, run = conditioner(learned_null_text=True)
    _, context, mask = run(None, drop)
    np.testing.assert_array_equal(mask[0, 4:], [True, False, False, False, False])
    y = p["null_token"] @ p["text_tokens"]["kernel"] + p["text_tokens"]["bias"]
    y = (y - y.mean()) / np.sqrt(y.var() + 1e-5)
    y = y * p["text_norm"]["scale"] + p["text_norm"]["bias"]
    np.testing.assert_allclose(context[0, 4], y, atol=1e-4)


# --- the decoder ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_fresh_decoder_returns_zeros():
    model, args = Decoder(**TINY), conditions()
    start = jax.jit(lambda k: model.init_with_output(k, **args)[0])
    y = start(jax.random.key(0))
    assert y.shape == (2, 4, 4, 6) and y.dtype == jnp.float32
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize("fields", [{}, OWN_TEXT], ids=["clip text", "own text"])
def test_drop_masks_switch_their_condition_and_their_sample_only(build, fields):
    _, params, apply = build(**fields)
    args, both = conditions(), jnp.array([False, False])
    other = conditions() | {
        "z_i": args["z_i"] + 1,
        "z_t": args["z_t"] + 1,
        "text_hidden": args["text_hidden"][:, ::-1],
        "tokens": (args["tokens"] + 1) % 20,
    }
    texts = ("tokens",) if fields else ("z_t", "text_hidden")

    def run(base, image=both, text=both):
        return np.asarray(apply(params, base | dict(drop_image=image, drop_text=text)))

    one = jnp.array([True, False])
    base = run(args)
    for changed, drop in ((("z_i",), dict(image=one)), (texts, dict(text=one))):
        moved = args | {k: other[k] for k in changed}
        assert (np.abs(run(moved) - base).max((1, 2, 3)) > 1e-3).all()
        dropped = run(args, **drop)
        assert np.abs(dropped[0] - base[0]).max() > 1e-3  # dropping does something
        np.testing.assert_array_equal(dropped[1], base[1])  # to that sample alone
        np.testing.assert_array_equal(run(moved, **drop)[0], dropped[0])  # and hides the value


def test_padding_never_matters(build):
    args = conditions()
    padded = ~args["text_mask"]
    for fields, change in (
        ({}, {"text_hidden": jnp.where(padded[..., None], 9.0, args["text_hidden"])}),
        (OWN_TEXT, {"tokens": jnp.where(padded, 7, args["tokens"])}),
    ):
        _, params, apply = build(**fields)
        drop = dict(drop_image=jnp.zeros(2, bool), drop_text=jnp.zeros(2, bool))
        y = apply(params, args | drop)
        np.testing.assert_array_equal(apply(params, args | change | drop), y)


def test_unused_conditions_may_be_none_and_missing_ones_are_named():
    args = conditions()
    text_only = Decoder(**TINY | OWN_TEXT | dict(use_z_i=False))
    kept = {k: v for k, v in args.items() if k in ("x_t", "t", "tokens", "text_mask")}
    none = dict(z_i=None, z_t=None, text_hidden=None)
    shapes = jax.eval_shape(lambda k: text_only.init(k, **kept, **none), jax.random.key(0))
    assert set(shapes["params"]["text_proj"]) == {"text", "caption_time"}
    image_only = Decoder(**TINY | dict(use_z_t=False, use_text_tokens=False))
    kept = {k: v for k, v in args.items() if k in ("x_t", "t", "z_i")}
    none = dict(z_t=None, text_hidden=None, tokens=None, text_mask=None)
    shapes = jax.eval_shape(lambda k: image_only.init(k, **kept, **none), jax.random.key(0))
    names = {"null_image", "image_time", "image_tokens"}
    assert set(shapes["params"]["text_proj"]) == names
    with pytest.raises(ConfigError, match="conditioned on z_i, z_t: got None"):
        Decoder(**TINY).init(jax.random.key(0), **args | dict(z_i=None, z_t=None))
    with pytest.raises(ConfigError, match="captions of 5 tokens"):
        model = Decoder(**TINY | OWN_TEXT | dict(text_context=4))
        jax.eval_shape(lambda k: model.init(k, **args), jax.random.key(0))


def test_bfloat16_is_close(build):
    _, params, apply = build()
    args = conditions()
    drop = dict(drop_image=jnp.array([True, False]), drop_text=jnp.array([False, True]))
    y_32 = apply(params, args | drop)
    y_16 = build(dtype=jnp.bfloat16)[2](params, args | drop)
    assert y_16.dtype == jnp.float32
    y_16, y_32 = np.asarray(y_16), np.asarray(y_32)
    assert 1e-5 < np.linalg.norm(y_16 - y_32) / np.linalg.norm(y_32) < 0.05


# --- text through a frozen T5 (Imagen) ------------------------------------------------------------


def test_imagen_sizes_to_the_digit():
    """The paper's 2B: the U-Net of unCLIP's decoder and a projection of T5-XXL's 4,096 features."""
    params = abstract("imagen", 64, 1024, 128, 4096)
    assert count(params["unet"]) == 2_238_164_486
    width, time = 2048, 2048
    dense = lambda n, m: n * m + m
    want = dict(
        null_token=4096,
        text_tokens=dense(4096, width),
        text_norm=2 * width,
        pool=3 * dense(width, width),
        pool_time=dense(width, time),
    )
    assert {k: count(v) for k, v in params["text_proj"].items()} == want


POOLED = dict(use_z_i=False, use_z_t=False, pool_text=True)


def test_the_pooled_vector_attends_to_the_real_tokens():
    """Query from the mean of the tokens after the layer norm, keys and values from each."""
    _, p, run = conditioner(**POOLED, context_dim=128)
    emb, context, mask = (np.asarray(a, np.float64) for a in run(None, None))
    project = lambda name, x: x @ p["pool"][name]["kernel"] + p["pool"][name]["bias"]
    for row in range(2):
        x = context[row][mask[row] > 0]
        q, k, v = project("q", x.mean(0)), project("k", x), project("v", x)
        pooled = []
        for head in (slice(0, 64), slice(64, 128)):
            scores = k[:, head] @ q[head] / 8
            weights = np.exp(scores - scores.max())
            pooled.append(weights @ v[:, head] / weights.sum())
        want = np.concatenate(pooled) @ p["pool_time"]["kernel"] + p["pool_time"]["bias"]
        np.testing.assert_allclose(emb[row], want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("learned", [False, True])
def test_a_dropped_caption_leaves_nothing_in_the_pooled_vector(learned):
    """Both captions dropped: the same vector for either, and not that of the captions."""
    _, p, run = conditioner(**POOLED, learned_null_text=learned)
    emb, _, mask = run(None, jnp.array([True, True]))
    np.testing.assert_allclose(emb[0], emb[1], atol=1e-5)
    assert mask.sum() == (2 if learned else 0)
    kept, _, _ = run(None, None)
    assert np.abs(kept - emb).max(1).min() > 1e-3
    if not learned:
        np.testing.assert_allclose(emb[0], p["pool_time"]["bias"], atol=1e-6)


def test_pooling_needs_the_tokens_of_a_frozen_encoder():
    for fields in (OWN_TEXT, dict(use_text_tokens=False)):
        init = Decoder(**TINY | fields | dict(pool_text=True)).init
        with pytest.raises(ConfigError, match="pool_text pools a frozen encoder's tokens"):
            jax.eval_shape(partial(init, **conditions()), jax.random.key(0))
