"""The optimiser against numpy float64, and the pure functions around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip.errors import ConfigError
from unclip.runtime import optim, sharding


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "dense": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=(4,))},
        "stack": {"bias": rng.normal(size=(2, 4))},
        "norm": {"scale": rng.normal(size=(2, 3))},
        "text": {"token_embedding": rng.normal(size=(5, 2))},
        "time_embed": {"kernel": rng.normal(size=(2, 2))},
    }


def jaxed(t):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t)


DECAYED = {"dense/kernel", "text/token_embedding", "time_embed/kernel"}


def adamw(weights, gradients, rates, *, b1, b2, eps, weight_decay, clip):
    """Algorithm 2 of decoupled weight decay, float64, over {path: array}."""
    m = {k: np.zeros_like(w) for k, w in weights.items()}
    v = {k: np.zeros_like(w) for k, w in weights.items()}
    for t, (grads, rate) in enumerate(zip(gradients, rates), 1):
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        for k in weights:
            g = grads[k] * min(1.0, clip / norm)
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g**2
            u = (m[k] / (1 - b1**t)) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
            if k in DECAYED:
                u = u + weight_decay * weights[k]
            weights[k] = weights[k] - rate * u
    return weights


def flat(t):
    return {f"{a}/{b}": x for a, sub in t.items() for b, x in sub.items()}


def test_adamw_with_clip_mask_and_schedule_against_float64():
    params, gradients = tree(0), [tree(10 + i) for i in range(6)]
    rates = [1e-2 * 0.5, 1e-2] + [
        1e-2 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * i / 4))) for i in range(4)
    ]
    kwargs = dict(b1=0.9, b2=0.96, eps=1e-6, weight_decay=0.3)
    tx, rate = optim.make_optimizer(
        jaxed(params),
        learning_rate=1e-2,
        total_steps=6,
        schedule="cosine",
        warmup_steps=2,
        end_fraction=0.1,
        clip_norm=2.0,
        **kwargs,
    )
    np.testing.assert_allclose([rate(i) for i in range(6)], rates, rtol=1e-6)
    weights, state = jaxed(params), None
    state = tx.init(weights)
    step = jax.jit(
        lambda w, s, g: (lambda u, s: (jax.tree.map(jnp.add, w, u), s))(*tx.update(g, s, w))
    )
    for grads in gradients:
        weights, state = step(weights, state, jaxed(grads))
    wanted = adamw(flat(params), [flat(g) for g in gradients], rates, clip=2.0, **kwargs)
    for path, value in flat(weights).items():
        np.testing.assert_allclose(value, wanted[path], rtol=2e-5, atol=1e-6, err_msg=path)


def test_small_gradients_are_not_clipped():
    params = {"w": jnp.zeros(4)}
    updates = []
    for clip in (None, 1.0):
        tx, _ = optim.make_optimizer(params, learning_rate=1.0, total_steps=1, clip_norm=clip)
        updates.append(tx.update({"w": jnp.full(4, 0.1)}, tx.init(params), params)[0]["w"])
    np.testing.assert_array_equal(*updates)


def test_schedules():
    def values(name, steps, **kw):
        rate = optim.make_learning_rate(2.0, 10, schedule=name, **kw)
        return [float(rate(s)) for s in steps]

    np.testing.assert_allclose(values("constant", [0, 1, 2, 99], warmup_steps=2), [1, 2, 2, 2])
    np.testing.assert_allclose(values("linear", [0, 5, 10, 20], end_fraction=0.5), [2, 1.5, 1, 1])
    np.testing.assert_allclose(values("cosine", [0, 5, 10, 20]), [2, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(
        values("rsqrt", [1, 3, 15, 63], warmup_steps=4), [1, 2, 1, 0.5], rtol=1e-6
    )


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(schedule="cosin"), ["'cosin'", "'cosine'"]),
        (dict(schedule="rsqrt"), ["warmup_steps"]),
        (dict(warmup_steps=11), ["11", "total_steps=10"]),
        (dict(b2=1.0), ["b2"]),
        (dict(freeze=("dens/kernel",)), ["dens/kernel", "dense/kernel"]),
        (dict(freeze=(".",)), ["no parameter to train"]),
    ],
)
def test_bad_options_are_named(kwargs, words):
    with pytest.raises(ConfigError) as error:
        optim.make_optimizer(tree(0), learning_rate=1e-3, total_steps=10, **kwargs)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_frozen_parameters_stay_without_moments_and_out_of_the_norm():
    params = jaxed({"a": {"kernel": np.ones((2, 2))}, "text": {"kernel": np.ones((2, 2))}})
    tx, _ = optim.make_optimizer(
        params,
        learning_rate=0.1,
        total_steps=4,
        freeze=("^text/",),
        weight_decay=0.5,
        clip_norm=1.0,
        eps=1.0,
    )
    state = tx.init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * 4
    grads = {"a": {"kernel": jnp.full((2, 2), 0.25)}, "text": {"kernel": jnp.full((2, 2), 1e6)}}
    updates, _ = tx.update(grads, state, params)
    assert not np.any(updates["text"]["kernel"])
    # ‖g‖ of the trained part is 0.5: no clip, so u = 0.25 / (0.25 + 1) + 0.5 · 1.
    np.testing.assert_allclose(updates["a"]["kernel"], -0.1 * (0.2 + 0.5), rtol=1e-6)


def test_table_3_of_the_paper():
    p = optim.PRESETS
    got = {
        k: (v["learning_rate"], v["b2"], v["eps"], v["weight_decay"], v.get("ema_decay"))
        for k, v in p.items()
    }
    assert got["prior_ar"] == (1.6e-4, 0.91, 1e-10, 4e-2, 0.999)
    assert got["prior"] == (1.1e-4, 0.96, 1e-6, 6e-2, 0.9999)
    assert got["decoder"] == (1.2e-4, 0.999, 1e-8, 0.0, 0.9999)
    assert got["upsampler_256"] == (1.2e-4, 0.999, 1e-8, 0.0, 0.9999)
    assert got["upsampler_1024"] == (1e-4, 0.999, 1e-8, 0.0, 0.9999)
    assert p["clip"]["learning_rate"] == 3e-4 and p["clip"]["sam_rho"] == 0.1
    assert {v["b1"] for v in p.values()} == {0.9}


def test_ema_numbers_and_precision():
    params = {"w": jnp.asarray([3.0], jnp.bfloat16)}
    ema = {"w": jnp.asarray([1.0], jnp.float32)}
    first = optim.ema_update(ema, params, 0, 0.9999)
    np.testing.assert_allclose(first["w"], [0.1 * 1 + 0.9 * 3], rtol=1e-6)
    late = optim.ema_update(ema, params, 10**6, 0.9999)
    np.testing.assert_allclose(late["w"], [1 + 1e-4 * 2], rtol=1e-6)
    plain = optim.ema_update(ema, params, 0, 0.9, warmup=False)
    np.testing.assert_allclose(plain["w"], [1.2], rtol=1e-6)
    assert first["w"].dtype == jnp.float32 == optim.ema_init(params)["w"].dtype


def test_sam_by_hand():
    """L = ½ Σ aᵢ wᵢ²: ∇L(w) = a w, and at the perturbed point a (w + rho a w / ‖a w‖)."""
    a, w, rho = np.array([1.0, 3.0]), np.array([4.0, 1.0]), 0.1
    g = a * w
    wanted = a * (w + rho * g / 5.0)
    vg = jax.value_and_grad(lambda w, a: 0.5 * jnp.sum(a * w**2))
    value, grads = jax.jit(lambda w, a: optim.sam_gradient(vg, w, rho, a))(
        jnp.asarray(w, jnp.float32), jnp.asarray(a, jnp.float32)
    )
    np.testing.assert_allclose(value, 0.5 * np.sum(a * w**2), rtol=1e-6)
    np.testing.assert_allclose(grads, wanted, rtol=1e-6)
    zero, none = optim.sam_gradient(vg, jnp.zeros(2), rho, jnp.ones(2))
    assert zero == 0 and not np.any(none), "a zero gradient perturbs nothing"


def test_accumulation_is_the_full_batch():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(8,)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(3,)), jnp.float32)

    def loss(w, batch, scale):
        error = jnp.square(batch["x"] @ w - batch["y"])
        return scale * jnp.mean(error), {"mse": jnp.mean(error), "first": batch["y"][0]}

    vg = jax.value_and_grad(loss, has_aux=True)
    (full, full_metrics), full_grads = vg(w, {"x": x, "y": y}, 2.0)
    (value, metrics), grads = jax.jit(optim.accumulate(vg, 4))(w, {"x": x, "y": y}, 2.0)
    np.testing.assert_allclose(value, full, rtol=1e-6)
    np.testing.assert_allclose(grads, full_grads, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["mse"], full_metrics["mse"], rtol=1e-6)
    np.testing.assert_allclose(metrics["first"], np.mean(y[:4]), rtol=1e-6)
    with pytest.raises(ConfigError, match="8"):
        optim.accumulate(vg, 3)(w, {"x": x, "y": y}, 2.0)


def test_accumulation_adds_low_precision_gradients_in_float32():
    vg = jax.value_and_grad(lambda w, batch: jnp.sum(w * batch.mean()))
    batch = jnp.asarray([1.0] + [2.0**-9] * 3, jnp.bfloat16)
    _, grads = optim.accumulate(vg, 4)(jnp.ones((), jnp.bfloat16), batch)
    assert grads.dtype == jnp.float32
    assert float(grads) == (1 + 3 * 2.0**-9) / 4, "bfloat16 sums would lose the small ones"


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_nonfinite_steps_keep_every_bit(bad):
    old = {
        "params": {"w": jnp.asarray([0.1, -0.0, 1e-40], jnp.float32)},
        "opt": {"count": jnp.int32(7)},
        "half": jnp.asarray([0.3], jnp.bfloat16),
    }
    new = jax.tree.map(lambda x: (x + 1).astype(x.dtype), old)
    ok, _ = optim.all_finite(jnp.float32(1.0), {"g": jnp.asarray([1.0, bad], jnp.float32)})
    kept, skipped = jax.jit(optim.skip_nonfinite)(old, new, ok)
    assert not bool(ok) and int(skipped) == 1
    for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(kept)):
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()
        assert before.dtype == after.dtype
    ok, norm = optim.all_finite(jnp.float32(1.0), {"g": jnp.asarray([3.0, 4.0])})
    taken, skipped = optim.skip_nonfinite(old, new, ok)
    assert bool(ok) and float(norm) == 5 and int(skipped) == 0
    assert np.asarray(taken["opt"]["count"]) == 8
    assert not bool(optim.all_finite(jnp.float32(np.nan), {"g": jnp.zeros(1)})[0])


def test_what_decays_is_neither_gain_nor_bias():
    """The rule of CLIP's paper on every stage's own tree, folded or not."""
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = {
        "text": {"null": leaf(8, 4), "token": {"embedding": leaf(40, 4)}},
        "position": leaf(9, 4),
        "class_token": leaf(4),
        "logit_scale": leaf(),
        "fold": {
            "norm_1": {"scale": leaf(3, 4), "bias": leaf(3, 4)},
            "fc": {"kernel": leaf(3, 4, 4)},
        },
    }
    got = {path for path, decays in sharding.tree_paths(optim.decay_mask(params)).items() if decays}
    assert got == {"text/null", "text/token/embedding", "position", "fold/fc/kernel"}
    kept = sharding.tree_paths(optim.decay_mask(params, ("position", "token/")))
    assert {path for path, decays in kept.items() if decays} == {"text/null", "fold/fc/kernel"}
    with pytest.raises(ConfigError, match=r"no_decay 'positions' matches no parameter.*position"):
        optim.decay_mask(params, ("positions",))


def test_the_rate_that_is_told_is_the_one_applied():
    """After skipped steps the optimiser is behind the step's number."""
    params = {"w": jnp.zeros((2, 2))}
    tx, rate = optim.make_optimizer(
        params, learning_rate=1.0, total_steps=4, schedule="linear", freeze=()
    )
    state = tx.init(params)
    for taken in range(3):
        assert int(optim.applied_steps(state)) == taken
        updates, state = tx.update({"w": jnp.ones((2, 2))}, state, params)
        np.testing.assert_allclose(updates["w"], -rate(taken), rtol=1e-4)
