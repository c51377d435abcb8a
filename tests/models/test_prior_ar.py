"""The autoregressive prior: PCA and codes against numpy, the cache against teacher forcing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip.errors import ConfigError
from unclip.models import prior_ar as ar
from unclip.models.transformer import stack_blocks
from unclip.tasks.codes import sample

B, N, K, L, D = 3, 5, 8, 4, 6
TINY = dict(
    embed_dim=D,
    codes=N,
    buckets=K,
    context=L,
    text_width=7,
    width=16,
    layers=2,
    heads=4,
    dot_buckets=4,
)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    return (
        jnp.asarray(rng.integers(0, K, (B, N)), jnp.int32),
        jnp.asarray(rng.normal(size=(B, D)), jnp.float32),
        jnp.asarray(rng.normal(size=(B, L, 7)), jnp.float32),
        jnp.asarray(np.arange(L)[None] < np.array([[4], [2], [3]])),
        jnp.asarray([0, 2, 3], jnp.int32),
    )


@pytest.fixture(scope="module")
def params(inputs):
    model = ar.ARPrior(**TINY, learned_null=True)
    tree = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(2)  # no zeros or ones, which would hide mistakes

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape) * (leaf.shape[0] ** -0.5 if leaf.ndim > 1 else 0.2)
        return jnp.asarray(noise + (path[-1].key == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


@pytest.fixture(scope="module")
def apply(params):
    model = ar.ARPrior(**TINY, learned_null=True)
    return jax.jit(lambda *a: model.apply({"params": params}, *a))


def test_logits_see_only_earlier_codes(inputs, apply):
    codes, *rest = inputs
    base = apply(*inputs)
    assert base.shape == (B, N, K) and base.dtype == jnp.float32
    for n in range(N):
        changed = apply(codes.at[:, n].set((codes[:, n] + 1) % K), *rest)
        np.testing.assert_array_equal(base[:, : n + 1], changed[:, : n + 1])
        if n + 1 < N:
            assert (np.abs(base - changed)[:, n + 1 :].max(-1) > 1e-5).all()


def test_prefix_matters_and_padding_does_not(inputs, apply):
    codes, z_t, text, mask, dot = inputs
    base = apply(*inputs)
    np.testing.assert_array_equal(
        base, apply(codes, z_t, jnp.where(mask[..., None], text, 1e3), mask, dot)
    )
    for changed in [
        (codes, z_t + 1, text, mask, dot),
        (codes, z_t, text + 1, mask, dot),
        (codes, z_t, text, mask, (dot + 1) % 4),
    ]:
        assert (np.abs(apply(*changed) - base).max(-1) > 1e-5).all()


@pytest.mark.parametrize("fold", [False, True])
def test_cached_decoding_equals_teacher_forcing(params, inputs, apply, fold):
    codes, *condition = inputs
    model = ar.ARPrior(**TINY, learned_null=True, fold=fold)
    tree = {"params": stack_blocks(params) if fold else params}
    logits, cache = jax.jit(partial(model.apply, method="prefill"))(tree, *condition)
    step = jax.jit(partial(model.apply, method="step"))
    all_logits = [logits]
    for n in range(N - 1):
        logits, cache = step(tree, codes[:, n], n, cache)
        all_logits.append(logits)
    np.testing.assert_allclose(jnp.stack(all_logits, 1), apply(*inputs), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def sampler(params):
    model = ar.ARPrior(**TINY, learned_null=True)
    compiled = jax.jit(partial(sample, model, params))
    return partial(compiled, temperature=1.0)


def test_greedy_sampling_is_the_argmax(inputs, apply, sampler):
    _, *condition, dot = inputs
    keys = jax.random.split(jax.random.key(1), B)
    codes = sampler(keys, *condition, dot=dot, temperature=0.0)
    assert codes.shape == (B, N) and codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, apply(codes, *condition, dot).argmax(-1))


def test_guided_sampling_follows_the_guided_logits(inputs, params, apply, sampler):
    _, *condition, dot = inputs
    keys = jax.random.split(jax.random.key(1), B)
    codes = sampler(keys, *condition, dot=dot, temperature=0.0, guidance=3.0)

    def logits(drop):
        return apply(codes, *condition, dot, jnp.full(B, drop))

    guided = logits(True) + 3.0 * (logits(False) - logits(True))
    np.testing.assert_array_equal(codes, guided.argmax(-1))
    plain = sampler(keys, *condition, dot=dot)  # w = 1 is the conditional model
    np.testing.assert_array_equal(plain, sampler(keys, *condition, dot=dot, guidance=1.0))
    # the empty caption given by hand: w = 0 is the model under that caption
    empty = tuple(a[::-1] for a in condition)
    by_hand = sampler(keys, *condition, dot=dot, guidance=0.0, uncond=empty)
    np.testing.assert_array_equal(by_hand, sampler(keys, *empty, dot=dot))
    with pytest.raises(ConfigError, match="uncond"):
        sample(ar.ARPrior(**TINY), params, keys, *condition, guidance=2.0)


def test_rows_depend_on_their_own_key(inputs, sampler):
    _, *condition, _ = inputs
    keys = jax.random.split(jax.random.key(2), B)
    codes = sampler(keys, *condition, top_p=1.0)
    # the same row in another place, among other keys and conditions
    others = jax.random.split(jax.random.key(3), B)
    mixed = [a[jnp.asarray([2, 0, 1])] for a in condition]
    np.testing.assert_array_equal(
        codes[1], sampler(others.at[2].set(keys[1]), *mixed, top_p=1.0)[2]
    )
    assert (codes != sampler(others, *condition, top_p=1.0)).any()


def test_dot_defaults_to_the_upper_half_and_top_p_0_is_greedy(inputs, apply, sampler):
    _, *condition, _ = inputs
    keys = jax.random.split(jax.random.key(5), B)
    codes = sampler(keys, *condition, top_p=0.0)
    likeliest = [apply(codes, *condition, jnp.full(B, dot)).argmax(-1) for dot in (2, 3)]
    assert all(any((best[row] == codes[row]).all() for best in likeliest) for row in range(B))


def test_sampled_frequencies_follow_the_model(inputs, apply, sampler):
    """The first code of every row over 1,000 draws, against its exact distribution."""
    codes, *condition, dot = inputs
    exact = np.asarray(jax.nn.softmax(apply(codes, *condition, dot)[:, 0]))
    keys = jax.random.split(jax.random.key(4), (1000, B))
    drawn = np.stack([sampler(k, *condition, dot=dot) for k in keys])
    for row in range(B):
        seen = np.bincount(drawn[:, row, 0], minlength=K) / 1000
        assert (np.abs(seen - exact[row]) < 5 * np.sqrt(exact[row] / 1000)).all()
    # successive codes of a row, and neighbouring rows, use different randomness
    same = np.corrcoef((drawn[:, :2, :2] == drawn[0, :2, :2]).reshape(1000, 4).T)
    assert np.abs(same - np.eye(4)).max() < 0.3


def test_fold_remat_bf16(params, inputs, apply):
    base = apply(*inputs)
    folded = ar.ARPrior(**TINY, learned_null=True, fold=True, remat="full")
    tree = {"params": stack_blocks(params)}
    same = jax.jit(folded.apply)(tree, *inputs)
    np.testing.assert_allclose(same, base, rtol=1e-5, atol=1e-5)
    low = ar.ARPrior(**TINY, learned_null=True, dtype=jnp.bfloat16)
    out = jax.jit(low.apply)({"params": params}, *inputs)
    assert out.dtype == jnp.float32
    assert np.abs(out - base).max() < 0.05 * np.abs(base).max()


def test_paper_parameter_count_by_arithmetic():
    k = ar.PRESETS["paper"]
    assert [k[n] for n in ("width", "layers", "heads", "codes", "buckets")] == [
        1664,
        24,
        26,
        319,
        1024,
    ]  # Table 3 and section 2.2
    text = [k[n] for n in ("context", "text_width", "text_layers", "text_heads")]
    assert text == [256, 2048, 24, 32]
    w, v, dim, length = 1664, 2048, 1024, 256 + 2 + 318
    model = ar.ARPrior(**k, fold=True)
    assert model.length == length
    shape = jax.ShapeDtypeStruct
    tree = jax.eval_shape(
        model.init,
        jax.random.key(0),
        shape((1, 319), jnp.int32),
        shape((1, dim), jnp.float32),
        shape((1, 256), jnp.int32),
        shape((1, 256), bool),
        shape((1,), jnp.int32),
    )
    blocks = 24 * (12 * w * w + 13 * w)
    ends = v * w + w + dim * w + w + 16 * w + 1024 * w + length * w + 2 * w + w * 1024 + 1024
    encoder = 24 * (12 * v * v + 13 * v) + 49408 * v + 2 * 256 * v + 2 * v
    found = sum(int(np.prod(a.shape)) for a in jax.tree.leaves(tree))
    assert found == blocks + ends + encoder == 2_118_312_448


def test_errors_say_what_is_expected(params, inputs):
    codes, z_t, *rest = inputs
    model = ar.ARPrior(**TINY, learned_null=True)
    with pytest.raises(ConfigError, match=r"expected \[B, 5\]"):
        model.apply({"params": params}, codes[:, :4], z_t, *rest)
    with pytest.raises(ConfigError, match=r"expected \[B, 6\]"):
        model.apply({"params": params}, codes, z_t[:, :5], *rest)


@pytest.mark.slow
def test_a_text_encoder_of_its_own(inputs):
    """Tokens in place of hidden states; padding is learned, and what is behind it is not read."""
    codes, z_t, _, mask, dot = inputs
    fields = TINY | dict(text_width=8, vocab_size=40, text_layers=1, text_heads=2)
    model = ar.ARPrior(**fields)
    tokens = jnp.asarray(np.random.default_rng(3).integers(1, 40, (B, L)), jnp.int32)
    tree = jax.jit(model.init)(jax.random.key(0), codes, z_t, tokens, mask, dot)
    assert {"token", "positions", "padding"} < tree["params"]["encoder"].keys()
    apply = jax.jit(model.apply)
    base = apply(tree, codes, z_t, tokens, mask, dot)
    hidden = jnp.where(mask, tokens, (tokens + 1) % 40)
    np.testing.assert_array_equal(base, apply(tree, codes, z_t, hidden, mask, dot))
    # Not causal: the last word reaches the first code through every place of the caption.
    first = apply(tree, codes, z_t, tokens.at[:, 0].set((tokens[:, 0] + 1) % 40), mask, dot)
    assert (np.abs(first - base).max((1, 2)) > 1e-6).all()
    logits, cache = jax.jit(partial(model.apply, method="prefill"))(tree, z_t, tokens, mask, dot)
    np.testing.assert_allclose(logits, base[:, 0], rtol=1e-5, atol=1e-5)
    logits, _ = jax.jit(partial(model.apply, method="step"))(tree, codes[:, 0], 0, cache)
    np.testing.assert_allclose(logits, base[:, 1], rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=r"expected both .* or neither"):
        ar.ARPrior(**TINY, vocab_size=40).init(jax.random.key(0), codes, z_t, tokens, mask, dot)
