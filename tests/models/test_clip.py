"""CLIP against float64 numpy, published parameter counts and the properties unCLIP needs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from unclip.errors import ConfigError
from unclip.models import clip
from unclip.models.transformer import stack_blocks
from unclip.tasks import ClipTask

TINY = dict(
    embed_dim=6,
    image_size=8,
    patch_size=4,
    vision_width=12,
    vision_layers=2,
    vision_heads=3,
    vision_mlp_width=20,
    text_width=8,
    text_layers=2,
    text_heads=2,
    context=7,
    vocab_size=30,
)
EOT = TINY["vocab_size"] - 1
TOKENS = np.array([[28, 5, 9, EOT, 0, 0, 0], [28, 3, 3, 7, 2, 11, EOT]], np.int32)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)


@pytest.fixture(scope="module")
def params(images):
    init = clip.CLIP(**TINY).init
    tree = jax.eval_shape(init, jax.random.key(0), images, jnp.asarray(TOKENS))["params"]
    rng = np.random.default_rng(1)  # zeros and ones of the init would hide mistakes

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape) * (leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.1)
        start = {"scale": 1, "logit_scale": np.log(1 / 0.07)}.get(path[-1].key, 0)
        return jnp.asarray(noise + start, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


@pytest.fixture(scope="module")
def apply():
    """The tiny CLIP, jitted once: apply({"params": …}, images, tokens)."""
    return jax.jit(clip.CLIP(**TINY).apply)


@pytest.fixture(scope="module")
def encode():
    """Its text tower alone: encode({"params": …}, tokens) -> (z_t, hidden states)."""
    return jax.jit(partial(clip.CLIP(**TINY).apply, method="encode_text"))


def np_ln(p, x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p[
        "scale"
    ] + p["bias"]


def np_dense(p, x):
    return x @ p["kernel"] + p["bias"]


def np_blocks(p, x, heads, mask):
    """[T, W] through every block, quick_gelu."""
    for i in range(len(p)):
        b = p[f"block_{i}"]
        q, k, v = (np_dense(b["attn"][n], np_ln(b["ln_1"], x)) for n in "qkv")
        d = x.shape[1] // heads
        y = []
        for h in range(heads):
            s = slice(h * d, (h + 1) * d)
            e = np.where(mask, np.exp(q[:, s] @ k[:, s].T / np.sqrt(d)), 0)
            y.append(e / e.sum(-1, keepdims=True) @ v[:, s])
        x = x + np_dense(b["attn"]["out"], np.concatenate(y, -1))
        h = np_dense(b["mlp"]["fc"], np_ln(b["ln_2"], x))
        x = x + np_dense(b["mlp"]["proj"], h / (1 + np.exp(-1.702 * h)))
    return x


def np_image(p, image):
    kernel = p["patch"]["kernel"]  # [h, w, in, out]
    patches = [
        np.einsum("hwc,hwco->o", image[r : r + 4, c : c + 4], kernel)
        for r in (0, 4)
        for c in (0, 4)
    ]
    x = np.stack([p["class_token"], *patches]) + p["position"]
    x = np_blocks(p["transformer"], np_ln(p["ln_pre"], x), 3, np.ones((5, 5), bool))
    return np_ln(p["ln_post"], x[0]) @ p["proj"]["kernel"]


def np_text(p, tokens):
    x = p["token"]["embedding"][tokens] + p["position"][: len(tokens)]
    x = np_blocks(p["transformer"], x, 2, np.tri(len(tokens), dtype=bool))
    hidden = np_ln(p["ln_final"], x)
    return hidden[list(tokens).index(EOT)] @ p["proj"]["kernel"], hidden


def test_forward_equals_numpy(params, images, apply, encode):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    z_i, z_t, scale = apply({"params": params}, images, jnp.asarray(TOKENS))
    _, hidden = encode({"params": params}, jnp.asarray(TOKENS))
    close = dict(rtol=2e-5, atol=2e-5)
    for row in range(2):
        ref_t, ref_hidden = np_text(p["text"], TOKENS[row])
        np.testing.assert_allclose(z_t[row], ref_t, **close)
        np.testing.assert_allclose(hidden[row], ref_hidden, **close)
        ref_i = np_image(p["vision"], np.asarray(images[row], np.float64))
        np.testing.assert_allclose(z_i[row], ref_i, **close)
    np.testing.assert_allclose(scale, np.exp(p["logit_scale"]), rtol=1e-6)


def count(kwargs):
    size, length = kwargs["image_size"], kwargs.get("context", 77)
    tree = jax.eval_shape(
        clip.CLIP(**kwargs, fold=True).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
    )["params"]
    return sum(int(np.prod(a.shape)) for a in jax.tree.leaves(tree))


# bigG is often quoted as 2,539,567,362: that counts the 257 integer position ids of the vision
# tower, a buffer of some checkpoints, among the parameters.
PUBLISHED = {
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336": 427_944_193,
    "ViT-H/14": 986_109_441,
    "ViT-bigG/14": 2_539_567_362 - 257,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert count(clip.PRESETS[name]) == PUBLISHED[name]


def test_counts_by_arithmetic():
    """bigG and the paper's H/16 from shapes alone."""

    def blocks(width, layers, mlp):
        attention = 4 * width * (width + 1)
        return layers * (attention + 2 * width * mlp + mlp + width + 4 * width)

    def vision(width, layers, mlp, patch, tokens, dim):
        return (
            3 * patch**2 * width
            + width
            + tokens * width
            + 4 * width
            + blocks(width, layers, mlp)
            + width * dim
        )

    def text(width, layers, dim):
        return (
            49408 * width
            + 77 * width
            + 2 * width
            + blocks(width, layers, 4 * width)
            + (width * dim)
        )

    big = vision(1664, 48, 8192, 14, 257, 1280) + text(1280, 32, 1280) + 1
    assert count(clip.PRESETS["ViT-bigG/14"]) == big
    paper = vision(1280, 32, 5120, 16, 257, 1024) + text(1024, 24, 1024) + 1
    assert count(clip.PRESETS["ViT-H/16"]) == paper
    p = clip.PRESETS["ViT-H/16"]  # section 2 of the paper
    assert (p["image_size"], p["vision_width"], p["vision_layers"]) == (256, 1280, 32)
    assert (p["text_width"], p["text_layers"]) == (1024, 24)


def test_text_is_causal_and_read_at_its_end(params, encode):
    encode = partial(encode, {"params": params})
    z, hidden = map(np.asarray, encode(jnp.asarray(TOKENS)))
    after = TOKENS.copy()
    after[0, 4:] = [17, 4, 9]  # beyond the first row's end token
    z2, hidden2 = encode(jnp.asarray(after))
    np.testing.assert_array_equal(z, z2)
    np.testing.assert_array_equal(hidden[0, :4], hidden2[0, :4])
    assert np.abs(hidden[0, 4:] - hidden2[0, 4:]).max() > 1e-3
    before = TOKENS.copy()
    before[0, 1] = 6
    z3, hidden3 = encode(jnp.asarray(before))
    assert np.abs(z[0] - z3[0]).max() > 1e-4
    np.testing.assert_array_equal(hidden[0, 0], hidden3[0, 0])
    short, _ = encode(TOKENS[:1, :4])
    np.testing.assert_allclose(short, z[:1], rtol=1e-5, atol=1e-6)


def test_embeddings_are_not_normalised(params, images, apply):
    z_i, z_t, _ = apply({"params": params}, images, jnp.asarray(TOKENS))
    assert np.abs(np.linalg.norm(z_i, axis=1) - 1).min() > 1e-3
    assert np.abs(np.linalg.norm(z_t, axis=1) - 1).min() > 1e-3


def test_fold_and_remat_change_nothing(params, images, apply):
    tokens = jnp.asarray(TOKENS)
    plain = apply({"params": params}, images, tokens)
    folded = clip.CLIP(**TINY, fold=True, remat="full")
    same = jax.jit(folded.apply)({"params": stack_blocks(params)}, images, tokens)
    for a, b in zip(plain, same):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    shapes = jax.eval_shape(folded.init, jax.random.key(0), images, tokens)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, stack_blocks(params))


def test_bf16_is_close(params, images, apply):
    tokens = jnp.asarray(TOKENS)
    z = apply({"params": params}, images, tokens)
    low = jax.jit(clip.CLIP(**TINY, dtype=jnp.bfloat16).apply)({"params": params}, images, tokens)
    for a, b in zip(z[:2], low[:2]):
        assert b.dtype == jnp.float32
        a, b = np.asarray(a), np.asarray(b)
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert (cosine > 0.999).all()


def test_temperature_starts_caps_and_comes_back():
    model = clip.CLIP(**TINY)

    def scale(p):
        tree = {"params": {"logit_scale": jnp.float32(p)}}
        return model.apply(tree, method="logit_scale_and_bias")[0]

    for value in (np.log(1 / 0.07), 1.3):
        np.testing.assert_allclose(scale(value), np.exp(value), rtol=1e-6)
        np.testing.assert_allclose(jax.grad(scale)(value), np.exp(value), rtol=1e-6)
    assert scale(9.0) == 100.0 and scale(200.0) == 100.0
    # Above the cap: descent may lower the scale, and may not raise it.
    assert jax.grad(lambda p: scale(p))(9.0) == 100.0
    assert jax.grad(lambda p: -scale(p))(9.0) == 0.0
    assert np.isfinite(jax.grad(lambda p: scale(p))(200.0))


def test_initial_values_and_sigmoid_bias(images):
    args = jax.random.key(0), images, jnp.asarray(TOKENS)
    p = jax.eval_shape(clip.CLIP(**TINY).init, *args)["params"]
    assert "logit_bias" not in p and "bias" not in p["vision"]["patch"]
    start = initial(clip.CLIP(**TINY), ("logit_scale",), *args)
    np.testing.assert_allclose(start["logit_scale"], np.log(1 / 0.07), rtol=1e-6)
    model = clip.CLIP(**TINY, logit_bias=True)
    p = initial(model, ("logit_scale", "logit_bias"), *args)
    scale, bias = model.apply({"params": p}, method="logit_scale_and_bias")
    np.testing.assert_allclose([scale, bias], [10.0, -10.0], rtol=1e-6)


def initial(model, paths, *args):
    """The initial values of these parameters: the others are not computed."""

    def init(*args):
        flat = traverse_util.flatten_dict(model.init(*args)["params"], sep="/")
        return {path: flat[path] for path in paths}

    return jax.jit(init)(*args)


def test_initial_deviations():
    kwargs = clip.PRESETS["emoji"] | {"text_layers": 1, "vision_layers": 1, "vocab_size": 2000}
    wanted = {
        "text/token/embedding": 0.02,
        "text/position": 0.01,
        "vision/position": 128**-0.5,
        "vision/class_token": 128**-0.5,
        "vision/proj/kernel": 128**-0.5,
        "text/transformer/block_0/attn/q/kernel": 128**-0.5,
        "text/transformer/block_0/mlp/fc/kernel": 256**-0.5,
        "text/transformer/block_0/mlp/proj/kernel": 256**-0.5,
    }
    patch = "vision/patch/kernel"
    inputs = jax.random.key(0), np.zeros((1, 64, 64, 3), "f4"), np.zeros((1, 32), np.int32)
    p = initial(clip.CLIP(**kwargs), (*wanted, patch), *inputs)
    for path, std in wanted.items():
        assert abs(np.std(p[path]) / std - 1) < 0.2, path
    bound = (3 * 8 * 8) ** -0.5  # torch's convolution default
    assert 0.95 * bound < np.abs(p[patch]).max() <= bound


def test_normalise():
    x = np.random.default_rng(2).uniform(-1, 1, (2, 4, 4, 3)).astype(np.float32)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    np.testing.assert_allclose(clip.normalise(x), ((x + 1) / 2 - mean) / std, atol=1e-5)


@pytest.mark.parametrize("size", [9, 50])
def test_resize_equals_pil_bicubic(size):
    x = np.random.default_rng(3).uniform(-0.6, 0.6, (1, 24, 24, 3)).astype(np.float32)
    ref = np.stack(
        [
            np.asarray(Image.fromarray(x[0, ..., c]).resize((size, size), Image.Resampling.BICUBIC))
            for c in range(3)
        ],
        -1,
    )
    ref = np.asarray(clip.normalise(np.clip(ref, -1, 1)))
    np.testing.assert_allclose(clip.resize_for_clip(x, size)[0], ref, atol=2e-4)


def test_resize_does_not_overshoot_and_leaves_the_right_size_alone():
    x = np.where(np.arange(16)[None, :, None, None] < 8, np.float32(-1), np.float32(1))
    x = np.broadcast_to(x, (1, 16, 16, 3))
    out = np.asarray(clip.resize_for_clip(x, 40))
    black, white = np.asarray(clip.normalise(np.float32([[-1] * 3, [1] * 3])))
    assert out.min() >= black.min() - 1e-6
    assert (out <= white + 1e-6).all()
    np.testing.assert_array_equal(clip.resize_for_clip(x, 16), clip.normalise(x))


def test_errors_say_what_is_expected(params, images):
    model = clip.CLIP(**TINY)
    with pytest.raises(ConfigError, match=r"\(2, 9, 9, 3\).*\[B, 8, 8, 3\]"):
        model.apply({"params": params}, np.zeros((2, 9, 9, 3)), method="encode_image")
    with pytest.raises(ConfigError, match="8 tokens; expected at most 7"):
        model.apply({"params": params}, jnp.zeros((1, 8), jnp.int32), method="encode_text")
    with pytest.raises(ConfigError, match="square"):
        clip.resize_for_clip(jnp.zeros((1, 8, 9, 3)), 8)


@pytest.mark.parametrize("absent, tower", [("vision", "image"), ("text", "text")])
def test_a_clip_with_one_tower(params, images, absent, tower):
    """The other tower has no parameters and says what to convert; this one is as in the whole."""
    task = ClipTask(TINY | {f"{absent}_layers": 0})
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    kept = {name: tree for name, tree in params.items() if name != absent}
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, kept)
    model, variables = task.model, {"params": kept}
    calls = {"image": ("encode_image", images), "text": ("encode_text", jnp.asarray(TOKENS))}
    method, given = calls.pop(tower)
    with pytest.raises(ConfigError, match=f"no {tower} tower; convert with the {tower} encoder's"):
        model.apply(variables, given, method=method)
    with pytest.raises(ConfigError, match=f"no {tower} tower"):
        model.apply(variables, images, jnp.asarray(TOKENS))
    [(method, given)] = calls.values()
    ours = jax.jit(partial(model.apply, method=method))(variables, given)
    whole = jax.jit(partial(clip.CLIP(**TINY).apply, method=method))
    jax.tree.map(np.testing.assert_array_equal, ours, whole({"params": params}, given))
    np.testing.assert_allclose(
        model.apply(variables, method="logit_scale_and_bias")[0],
        np.exp(params["logit_scale"]),
        rtol=1e-6,
    )


def test_half_precision_weights_lose_nothing_more(params, images, apply):
    """Parameters kept in float16, as converted ones may be: the arithmetic is float32."""
    tokens = jnp.asarray(TOKENS)
    half = jax.tree.map(lambda a: np.asarray(a, np.float16), params)
    full = jax.tree.map(np.float32, half)
    for a, b in zip(*(apply({"params": p}, images, tokens) for p in (half, full))):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
