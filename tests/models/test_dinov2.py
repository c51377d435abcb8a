"""DINOv2: published sizes, an independent forward pass, and how positions meet another grid."""

import math

import jax
import numpy as np
import pytest

from unclip import errors
from unclip.models import dinov2

PUBLISHED = {  # numbers in the published files; the mask token, one more row, is not kept
    "ViT-S/14": 22_056_576,
    "ViT-B/14": 86_580_480,
    "ViT-L/14": 304_368_640,
    "ViT-g/14": 1_136_480_768,
    "ViT-S/14-reg": 22_058_112,
    "ViT-B/14-reg": 86_583_552,
    "ViT-L/14-reg": 304_372_736,
    "ViT-g/14-reg": 1_136_486_912,
}


@pytest.mark.parametrize("name", dinov2.PRESETS)
def test_published_sizes(name):
    model = dinov2.DINOv2(**dinov2.PRESETS[name])
    picture = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), picture)["params"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count + model.width == PUBLISHED[name]
    assert shapes["position"].shape == (1 + 37 * 37, model.width)
    assert dinov2.name_of(model) == name.replace("/", "-")


def test_names_of_other_sizes():
    model = dinov2.DINOv2(width=64, layers=2, heads=1, image_size=70, registers=3)
    assert dinov2.name_of(model) == "70px14-w64-l2-r3"
    # How positions are read is not the network's name.
    large = dinov2.DINOv2(**dinov2.PRESETS["ViT-L/14"], interpolation="transformers")
    assert dinov2.name_of(large) == "ViT-L-14"


def randomised(shapes, seed=0):
    """Parameters under which every token matters to every other."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        scale = 2 / leaf.shape[-2] ** 0.5 if "kernel" in str(path) else 1
        return np.float32(rng.normal(0, scale, leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def oracle(params, pictures, *, patch, heads, layers, registers):
    """The class token in float64 numpy, from the article's description."""
    p = jax.tree.map(np.float64, params)

    def norm(x, at):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * at["scale"] + at["bias"]

    dense = lambda x, at: x @ at["kernel"] + at["bias"]
    erf = np.vectorize(math.erf)
    count, side = len(pictures), pictures.shape[1] // patch
    tiles = pictures.reshape(count, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    kernel = p["patch"]["kernel"].reshape(patch * patch * 3, -1)
    x = tiles.reshape(count, side * side, -1) @ kernel + p["patch"]["bias"]
    x = np.concatenate([np.broadcast_to(p["class_token"], (count, 1, x.shape[-1])), x], 1)
    x = x + p["position"]
    if registers:
        extra = np.broadcast_to(p["registers"], (count, *p["registers"].shape))
        x = np.concatenate([x[:, :1], extra, x[:, 1:]], 1)
    for i in range(layers):
        block = p[f"block_{i}"]
        h = norm(x, block["ln_1"])
        q, k, v = (
            dense(h, block["attn"][name]).reshape(*h.shape[:2], heads, -1).swapaxes(1, 2)
            for name in "qkv"
        )
        logits = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True)) @ v
        y = dense(y.swapaxes(1, 2).reshape(h.shape), block["attn"]["out"])
        x = x + block["scale_1"] * y
        h, mlp = norm(x, block["ln_2"]), block["mlp"]
        if "gate" in mlp:
            gate = dense(h, mlp["gate"])
            y = dense(gate / (1 + np.exp(-gate)) * dense(h, mlp["up"]), mlp["down"])
        else:
            a = dense(h, mlp["fc"])
            y = dense(a * (1 + erf(a / math.sqrt(2))) / 2, mlp["proj"])
        x = x + block["scale_2"] * y
    return norm(x, p["ln_final"])[:, 0]


@pytest.mark.parametrize("ffn", dinov2.FFNS)
@pytest.mark.parametrize("registers", [0, 3])
def test_forward_against_numpy(ffn, registers):
    sizes = dict(width=16, layers=2, heads=2, registers=registers, image_size=12, patch_size=4)
    model = dinov2.DINOv2(ffn=ffn, **sizes)
    pictures = np.float32(np.random.default_rng(1).normal(size=(2, 12, 12, 3)))
    params = randomised(jax.eval_shape(model.init, jax.random.key(0), pictures)["params"])
    ours = np.asarray(jax.jit(model.apply)({"params": params}, pictures))
    expected = oracle(
        params, pictures.astype(np.float64), patch=4, heads=2, layers=2, registers=registers
    )
    assert ours.dtype == np.float32 and np.abs(expected).max() > 0.1
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-4)


def test_positions_are_resized_as_the_matrix_says():
    """Another picture size is the same network with its positions resized beforehand."""
    sizes = dict(width=16, layers=1, heads=2, patch_size=4)
    stored = dinov2.DINOv2(image_size=20, interpolation="transformers", **sizes)
    small = np.float32(np.random.default_rng(1).normal(size=(1, 12, 12, 3)))
    params = randomised(jax.eval_shape(stored.init, jax.random.key(0), small)["params"])
    assert params["position"].shape == (26, 16)
    matrix = dinov2.position_matrix(5, 3, "transformers")
    grid = params["position"][1:].reshape(5, 5, 16)
    resized = np.stack([matrix @ (matrix @ grid[..., c]).T for c in range(16)], -1).swapaxes(0, 1)
    position = np.concatenate([params["position"][:1], resized.reshape(9, 16)])
    native = dinov2.DINOv2(image_size=12, **sizes)
    expected = native.apply({"params": params | {"position": position}}, small)
    np.testing.assert_allclose(stored.apply({"params": params}, small), expected, atol=1e-5)
    other = stored.clone(interpolation="hub").apply({"params": params}, small)
    assert np.abs(other - expected).max() > 1e-2


@pytest.mark.parametrize("name", dinov2.INTERPOLATIONS)
@pytest.mark.parametrize("old, new", [(37, 16), (16, 37), (5, 5)])
def test_position_matrix(name, old, new):
    matrix = dinov2.position_matrix(old, new, name)
    assert matrix.shape == (new, old) and matrix.dtype == np.float32
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)  # constants stay
    if old == new:
        np.testing.assert_array_equal(matrix, np.eye(old))
    elif name != "hub":  # pixel centres: turning the picture round turns the result round
        np.testing.assert_allclose(matrix[::-1, ::-1], matrix, atol=1e-6)
    elif old > new:  # a step of 37 / 16.1 ends before the last positions
        inside = slice(1, -1)
        centre = (np.arange(new)[inside] + 0.5) * old / (new + 0.1) - 0.5
        np.testing.assert_allclose((matrix @ np.arange(old))[inside], centre, atol=0.08)
    reach = (matrix != 0).sum(1).max()
    assert reach <= 4 if name != "antialias" else (reach > 4) == (old > new)


def test_normalise():
    black_and_white = np.uint8([[0, 0, 0], [255, 255, 255]])
    expected = [(np.float64(v) - dinov2.IMAGE_MEAN) / dinov2.IMAGE_STD for v in (0, 1)]
    np.testing.assert_allclose(dinov2.normalise(black_and_white), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "fields, shape, message",
    [
        ({}, (1, 13, 13, 3), "multiple of the patch size 4"),
        ({}, (1, 12, 8, 3), r"expected \[B, S, S, 3\]"),
        ({"ffn": "swigul"}, (1, 12, 12, 3), "did you mean 'swiglu'"),
        ({"interpolation": "hubs"}, (1, 8, 8, 3), "did you mean 'hub'"),
        ({"heads": 3}, (1, 12, 12, 3), "divide evenly"),
    ],
)
def test_refused(fields, shape, message):
    fields = dict(width=16, layers=1, heads=2, image_size=12, patch_size=4) | fields
    with pytest.raises(errors.ConfigError, match=message):
        jax.eval_shape(dinov2.DINOv2(**fields).init, jax.random.key(0), np.zeros(shape, np.float32))
