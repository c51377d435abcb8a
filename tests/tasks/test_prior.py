"""The priors' tasks: spaces, statistics, condition dropout, candidates, and learning by heart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unclip import errors, tasks
from unclip.tasks import codes, keys


def cosine(a, b):
    a, b = np.float64(a), np.float64(b)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_statistics_are_numpys(made):
    task, _, _ = made("prior")
    z_i = np.random.default_rng(0).standard_normal((50, 8)) * np.arange(1, 9) + 3
    got = task.fit((part, part) for part in np.split(np.float32(z_i), [7, 8, 30]))
    np.testing.assert_allclose(got["mean"], z_i.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["std"], z_i.std(0, ddof=1), rtol=1e-5)
    assert {k: (v.shape, v.dtype) for k, v in got.items()} == {
        k: (v.shape, v.dtype) for k, v in task.statistics_shapes().items()
    }


def test_ar_statistics_have_the_planned_shapes(made):
    task, _, _ = made("prior", "ar")
    z = np.float32(np.random.default_rng(0).standard_normal((2, 40, 8)))
    got = task.fit([tuple(z)])
    assert {k: (v.shape, v.dtype) for k, v in got.items()} == {
        k: (v.shape, v.dtype) for k, v in task.statistics_shapes().items()
    }
    np.testing.assert_allclose(got["dot_edges"], [np.median(cosine(*z))], atol=1e-6)


def test_whitening_and_back(made):
    task, _, frozen = made("prior")
    z_i = np.float32(np.random.default_rng(0).standard_normal((5, 8)))
    x_0 = task.encode(frozen, z_i)
    statistics = frozen["statistics"]
    np.testing.assert_allclose(x_0, (z_i - statistics["mean"]) / statistics["std"], rtol=1e-6)
    np.testing.assert_allclose(task.decode(frozen, x_0), z_i, rtol=1e-5, atol=1e-6)


def test_scaled_embeddings(made):
    task, _, frozen = made("prior", embedding="scale", scale=17.2)
    z_i = np.float32(np.random.default_rng(0).standard_normal((5, 8)))
    x_0 = task.encode(frozen, z_i)
    np.testing.assert_allclose(np.linalg.norm(x_0, axis=-1), 17.2, rtol=1e-5)
    np.testing.assert_allclose(cosine(task.decode(frozen, x_0), z_i), 1, rtol=1e-6)


def test_the_loss_is_the_error_of_x_0(made, with_model, batch_of):
    """With the network replaced by a constant, the loss is that constant's squared error."""
    task, params, frozen = made("prior")

    class Constant:
        learned_null, vocab_size = False, None

        def apply(self, variables, x_t, t, **_):
            return jnp.full(x_t.shape, 0.5)

    batch = batch_of(task, 6)
    task = with_model(task, Constant())
    loss = jax.jit(lambda f, b: task.loss(params, f, b, jax.random.key(0), train=True)[0])(
        frozen, batch
    )
    x_0 = np.float64(task.encode(frozen, jax.jit(task.image)(frozen, batch)))
    assert float(loss) == pytest.approx(((0.5 - x_0) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_a_tenth_of_the_captions_is_dropped(made, with_model, kind):
    task, params, frozen = made("prior", kind)
    seen = {}

    class Spy:
        codes, buckets, learned_null, vocab_size = 4, 16, False, None

        def apply(self, variables, x, t=None, **conditions):
            seen.update(conditions)
            return jnp.zeros((*x.shape, 16)) if kind == "ar" else x

    task = with_model(dataclasses.replace(task, stored=True), Spy())
    batch = batch_of_rows(4096)

    def run(train):
        def given(frozen, batch):
            task.loss(params, frozen, batch, jax.random.key(3), train=train)
            return {name: seen[name] for name in ("text_mask", "z_t")}

        return jax.device_get(jax.jit(given)(frozen, batch))

    seen |= run(True)
    words = np.asarray(seen["text_mask"]).sum(1)
    dropped = words == 2
    assert abs(dropped.mean() - 0.1) < 4 * np.sqrt(0.09 / 4096)
    empty, _ = task.clip.text(frozen["clip"], task.clip.empty(1, 8)[0])
    np.testing.assert_allclose(
        np.asarray(seen["z_t"])[dropped], np.repeat(empty, dropped.sum(), 0), rtol=1e-5, atol=1e-6
    )  # float32 rounding of values around 1, in differently fused programs
    np.testing.assert_array_equal(words[~dropped], batch["text_mask"].sum(1)[~dropped])
    np.testing.assert_array_equal(run(False)["text_mask"], batch["text_mask"])


def batch_of_rows(rows):
    """Stored embeddings with captions of one to six words."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((rows, 8), np.int32)
    words = rng.integers(1, 7, rows)
    place = np.arange(8)
    tokens = np.where(place <= words[:, None], rng.integers(1, 38, (rows, 8)), 0)
    tokens[:, 0] = 38
    tokens[np.arange(rows), words + 1] = 39
    return {
        "z_i": np.float32(rng.standard_normal((rows, 8))),
        "tokens": np.int32(tokens),
        "text_mask": place <= words[:, None] + 1,
        "sample": np.stack([np.zeros(rows), np.arange(rows)], 1).astype(np.uint32),
        "valid": np.ones(rows, bool),
    }


def captions_of(batch):
    return {name: batch[name] for name in ("tokens", "text_mask")}


@pytest.fixture(scope="module")
def drawing(made, batch_of):
    task, params, frozen = made("prior", draw={"steps": 3})
    batch = batch_of(task, 4)
    sample_keys = keys.sample_keys(jax.random.key(9), batch["sample"])
    draw = lambda x_T=None, noise=None, **options: np.asarray(
        jax.jit(
            lambda p, x_T, noise: task.sample(
                p, frozen, captions_of(batch), sample_keys, draw=options, x_T=x_T, noise=noise
            )
        )(params, x_T, noise)
    )
    return task, frozen, batch, draw


@pytest.mark.slow
def test_the_candidate_nearer_to_the_caption_is_kept(drawing):
    task, frozen, batch, draw = drawing
    noise = np.float32(np.random.default_rng(1).standard_normal((4, 3 * 4, 8)))
    alone = np.stack(
        [
            draw(noise[0, part], noise[1:, part], candidates=1, guidance=2.0)
            for part in (slice(0, 4), slice(4, 8), slice(8, 12))
        ]
    )
    z_t, _ = task.clip.text(frozen["clip"], batch["tokens"])
    score = cosine(alone, np.asarray(z_t)[None])
    best = score.argmax(0)
    assert len(set(best.tolist())) > 1  # or this test could not tell a choice from none
    got = draw(noise[0], noise[1:], candidates=3, guidance=2.0)
    np.testing.assert_allclose(got, alone[best, np.arange(4)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["diffusion", pytest.param("ar", marks=pytest.mark.slow)])
def test_guidance_leads_away_from_a_negative_caption(made, batch_of, kind):
    settings = {"steps": 2} if kind == "diffusion" else {}
    task, params, frozen = made("prior", kind, draw={"candidates": 1, "guidance": 3.0, **settings})
    batch = batch_of(task, 4)
    sample_keys = keys.sample_keys(jax.random.key(9), batch["sample"])
    caption = captions_of(batch)
    draw = jax.jit(
        lambda conditions, scale: task.sample(
            params, frozen, conditions, sample_keys, draw={"guidance": scale}
        )
    )
    negative = lambda step: {f"negative_{k}": v[::step] for k, v in caption.items()}
    scale = 3.0 if kind == "diffusion" else 30.0  # of codes, which do not move by little
    unguided = draw(caption, 1.0)
    np.testing.assert_allclose(draw(caption | negative(1), scale), unguided, atol=1e-4)
    away = draw(caption | negative(-1), scale)
    assert np.abs(away - unguided).max() > 1e-3
    assert np.abs(away - draw(caption, scale)).max() > 1e-3


def test_a_draw_does_not_depend_on_the_rows_beside_it(drawing, made):
    task, frozen, batch, draw = drawing
    params = made("prior")[1]
    every = draw(candidates=2)
    rows = [2, 2, 0, 3]
    sample_keys = keys.sample_keys(jax.random.key(9), batch["sample"][rows])
    others = jax.jit(
        lambda: task.sample(
            params,
            frozen,
            {name: value[rows] for name, value in captions_of(batch).items()},
            sample_keys,
            draw={"candidates": 2},
        )
    )()
    np.testing.assert_allclose(others, every[rows], rtol=1e-5, atol=1e-5)


def test_clamp_zero_is_off(made):
    assert made("prior", clamp=0.0)[0].clamp is None
    assert made("prior", clamp=5.0)[0].clamp == 5.0


def test_unknown_embedding(made):
    with pytest.raises(errors.ConfigError, match="'whitten': did you mean 'whiten'"):
        made("prior", embedding="whitten")


@pytest.mark.slow
def test_the_ar_prior_learns_eight_pictures_by_heart(made):
    task, params, frozen = made("prior", "ar", text_drop=0.0)
    params = jax.jit(task.init)(jax.random.key(0))
    task = dataclasses.replace(task, stored=True)
    batch = batch_of_rows(8)
    tx = optax.adam(1e-2)

    @jax.jit
    def steps(params, opt):
        def one(carry, _):
            params, opt = carry
            gradient = jax.value_and_grad(
                lambda p: task.loss(p, frozen, batch, jax.random.key(0), train=True), has_aux=True
            )
            (_, metrics), grads = gradient(params)
            updates, opt = tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), opt), metrics

        return jax.lax.scan(one, (params, opt), None, 150)

    (params, _), metrics = steps(params, tx.init(params))
    assert float(metrics["accuracy"][-1]) == 1.0
    assert float(metrics["loss"][-1]) < 0.1 < 1.0 < float(metrics["loss"][0])
    sample_keys = keys.sample_keys(jax.random.key(0), batch["sample"])
    z = jax.jit(
        lambda p: task.sample(
            p,
            frozen,
            captions_of(batch),
            sample_keys,
            draw={"temperature": 0.0, "candidates": 1},
        )
    )(params)
    read = lambda z: np.asarray(
        codes.quantise(z[:, :4], frozen["statistics"]["scale"], 16, task.range_sigmas)
    )
    np.testing.assert_array_equal(read(z), read(batch["z_i"]))


def test_the_ar_prior_takes_no_noise(made):
    task, params, frozen = made("prior", "ar")
    with pytest.raises(errors.ConfigError, match="takes no noise"):
        task.sample(params, frozen, {}, None, noise=1)


@pytest.mark.slow
def test_a_learned_null_is_trained_and_drawn_from():
    """With `learned_null`, dropped captions train the model's own stand-ins."""
    arch = {
        "embed_dim": 16,
        "context": 16,
        "text_width": 16,
        "width": 32,
        "layers": 1,
        "heads": 2,
        "learned_null": True,
    }
    clip = {
        "embed_dim": 16,
        "image_size": 16,
        "patch_size": 8,
        "vision_width": 16,
        "vision_layers": 1,
        "vision_heads": 2,
        "text_width": 16,
        "text_layers": 1,
        "text_heads": 2,
        "context": 16,
        "vocab_size": 64,
    }
    ones = np.ones(16, np.float32)
    weights = {
        "clip": jax.jit(tasks.ClipTask(tasks.arguments(clip)).init)(jax.random.key(1)),
        "statistics": {"mean": 0 * ones, "std": ones},
    }
    task = tasks.make("prior", arch, {"text_drop": 1.0}, clip=clip, weights=weights)
    params = jax.jit(task.init)(jax.random.key(0))
    batch = {
        "image": np.zeros((2, 16, 16, 3), np.uint8),
        "tokens": np.array([[62, 5, 63] + 13 * [0], [62, 6, 63] + 13 * [0]], np.int32),
        "text_mask": np.arange(16)[None].repeat(2, 0) < 3,
        "sample": np.array([[0, 0], [0, 1]], np.uint32),
        "valid": np.ones(2, bool),
    }
    loss = lambda p: task.loss(p, task.frozen(), batch, jax.random.key(0), train=True)[0]
    # The output layer starts at random, so the gradient reaches the null embeddings at once.
    grads = jax.jit(jax.grad(loss))(params)
    assert np.abs(grads["text"]["null"]).max() > 0 and np.abs(grads["z_t"]["null"]).max() > 0
    draw = jax.jit(
        lambda tokens: task.sample(
            params,
            task.frozen(),
            {"tokens": tokens, "text_mask": batch["text_mask"]},
            jax.random.split(jax.random.key(2), 2),
            draw={"steps": 2, "guidance": 0.0, "candidates": 1},
        )
    )
    # Without guidance from the caption, captions do not matter.
    np.testing.assert_allclose(
        draw(batch["tokens"])[0], draw(batch["tokens"][::-1])[0], rtol=1e-5, atol=1e-5
    )
