"""T5's encoder: published sizes, and a NumPy oracle for what sets it apart from other encoders."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip.errors import ConfigError
from unclip.models import t5
from unclip.models.transformer import stack_blocks

TINY = dict(
    vocab_size=20,
    width=6,
    layers=2,
    heads=2,
    head_dim=4,
    mlp_width=10,
    relative_buckets=8,
    relative_max=6,
)
# Parameters of transformers' T5EncoderModel (tests/parity counts them live).
SIZES = {
    "t5-small": 35_330_816,
    "t5-base": 109_628_544,
    "t5-large": 334_939_648,
    "t5-3b": 1_240_909_824,
    "t5-11b": 4_864_791_552,
    "t5-v1_1-small": 35_332_800,
    "t5-v1_1-base": 109_628_544,
    "t5-v1_1-large": 341_231_104,
    "t5-v1_1-xl": 1_223_527_424,
    "t5-v1_1-xxl": 4_762_310_656,
}
TOKENS = np.array([[5, 7, 3, 1, 0, 0, 0], [4, 9, 2, 6, 8, 11, 1]], np.int32)
MASK = TOKENS > 0


def shapes(**fields):
    model = t5.T5Encoder(**fields)
    return jax.eval_shape(model.init, jax.random.key(0), TOKENS, MASK)["params"]


def randomised(**fields):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda v: np.float32(rng.normal(size=v.shape) * 0.6), shapes(**fields))


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_to_the_digit(name):
    leaves = jax.tree.leaves(shapes(**t5.PRESETS[name], fold=True))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == SIZES[name]


def oracle(p, tokens, mask, gated):
    """The encoder in float64, one sentence after the other, padding left out altogether."""
    norm = lambda x, s: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * s
    tanh = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    relu = lambda x: np.maximum(x, 0)
    p = jax.tree.map(np.float64, p)
    x = p["token"]["embedding"][tokens[mask]]
    n = len(x)
    bias = np.zeros((2, n, n))
    for q in range(n):
        for k in range(n):
            d = abs(k - q)  # 8 buckets: 4 a direction, distances 0 and 1 exact, up to 6
            far = 2 + int(math.log(d / 2) / math.log(6 / 2) * 2) if d >= 2 else d
            bias[:, q, k] = p["bias"]["embedding"][(4 if k > q else 0) + min(far, 3)]
    for i in range(2):
        b = p[f"block_{i}"]
        h = norm(x, b["ln_1"]["scale"])
        q, k, v = ((h @ b["attn"][s]["kernel"]).reshape(n, 2, 4).swapaxes(0, 1) for s in "qkv")
        scores = q @ k.swapaxes(1, 2) + bias
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = weights / weights.sum(-1, keepdims=True) @ v
        x = x + y.swapaxes(0, 1).reshape(n, 8) @ b["attn"]["out"]["kernel"]
        h = norm(x, b["ln_2"]["scale"])
        fc = h @ b["mlp"]["fc"]["kernel"]
        h = tanh(h @ b["mlp"]["gate"]["kernel"]) * fc if gated else relu(fc)
        x = x + h @ b["mlp"]["proj"]["kernel"]
    return norm(x, p["norm"]["scale"])


@pytest.mark.parametrize("gated", [False, True])
def test_the_oracle_agrees(gated):
    fields = TINY | dict(gated=gated, activation="gelu_tanh" if gated else "relu")
    params = randomised(**fields)
    got = t5.T5Encoder(**fields).apply({"params": params}, TOKENS, MASK)
    for row in range(2):
        want = oracle(params, TOKENS[row], MASK[row], gated)
        np.testing.assert_allclose(got[row][MASK[row]], want, atol=2e-5)


def test_padding_is_not_read():
    params = randomised(**TINY)
    run = lambda tokens, mask: t5.T5Encoder(**TINY).apply({"params": params}, tokens, mask)
    other = np.where(MASK, TOKENS, 9)
    np.testing.assert_array_equal(run(TOKENS, MASK)[0, :4], run(other, MASK)[0, :4])
    short = run(TOKENS[:1, :4], MASK[:1, :4])
    np.testing.assert_allclose(run(TOKENS, MASK)[0, :4], short[0], atol=1e-5)
    assert np.abs(run(TOKENS, np.ones_like(MASK))[0, :4] - short[0]).max() > 1e-2


def test_folding_changes_nothing():
    params = randomised(**TINY)
    want = t5.T5Encoder(**TINY).apply({"params": params}, TOKENS, MASK)
    folded = t5.T5Encoder(**TINY, fold=True, remat="full")
    got = folded.apply({"params": stack_blocks(params)}, TOKENS, MASK)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_buckets_of_the_published_models():
    """Distances 0..7 have their own, 8..11 share one, from 91 on all share the last; 16 a side."""
    table = t5.buckets(200)
    assert table[0, :9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert table[150, 142:151].tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert set(table[0, 8:12]) == {24} and table[0, 12] == 25
    assert table[0, 90] == 30 and set(table[0, 91:]) == {31}
    assert table.min() == 0 and table.max() == 31


def test_bfloat16_and_slips():
    params = randomised(**TINY)
    got = t5.T5Encoder(**TINY, dtype=jnp.bfloat16).apply({"params": params}, TOKENS, MASK)
    want = t5.T5Encoder(**TINY).apply({"params": params}, TOKENS, MASK)
    assert got.dtype == jnp.bfloat16
    assert 1e-4 < np.abs(np.float32(got) - want)[MASK].max() < 0.2
    for fields, said in (
        (dict(activation="gelu_tan"), "did you mean 'gelu_tanh'"),
        (dict(attention_impl="cuddn"), "did you mean 'cudnn'"),
        (dict(attention_impl="cudnn"), "needs dtype bfloat16"),
    ):
        with pytest.raises(ConfigError, match=said):
            shapes(**TINY | fields)
