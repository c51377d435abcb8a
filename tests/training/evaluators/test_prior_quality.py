"""What is measured of drawn z_i: against NumPy, against chance, and with the real prior tasks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip import tasks
from unclip.runtime import distributed, sharding
from unclip.training.evaluators.prior_quality import PriorQuality, quality

MESHES = {1: {"data": 1}, 8: {"data": 4, "fsdp": 2}}


def cosine(a, b):
    a, b = np.float64(a), np.float64(b)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.fixture(scope="module")
def cone():
    """60 embeddings that share a large common part, as CLIP's do; texts a little off."""
    rng = np.random.default_rng(0)
    z_i = 3 + rng.standard_normal((60, 16))
    return z_i, z_i + 0.3 * rng.standard_normal((60, 16))


def test_figures_against_numpy(cone):
    rng = np.random.default_rng(1)
    z_i, z_t = cone
    drawn = 2 * z_i + 4 * rng.standard_normal((60, 16))
    number = np.arange(60)
    got = quality(drawn, z_i, z_t, number, number)
    similarity = cosine(np.repeat(drawn, 60, 0), np.tile(z_i, (60, 1))).reshape(60, 60)
    rank = (similarity >= np.diag(similarity)[:, None]).sum(1)
    assert rank.max() > 3
    want = {
        "cosine": cosine(drawn, z_i).mean(),
        "cosine_text": cosine(drawn, z_t).mean(),
        "cosine_text_true": cosine(z_i, z_t).mean(),
        "median_rank": np.median(rank),
        "candidates": 60,
        "norm_mean": np.linalg.norm(drawn, axis=1).mean(),
        "norm_std": np.linalg.norm(drawn, axis=1).std(),
        "norm_true_mean": np.linalg.norm(z_i, axis=1).mean(),
        "norm_true_std": np.linalg.norm(z_i, axis=1).std(),
    } | {f"recall_{k}": (rank <= k).mean() for k in (1, 5, 10)}
    other = got.pop("cosine_other")
    assert got == pytest.approx(want, rel=1e-6)
    off_diagonal = similarity[~np.eye(60, dtype=bool)]
    assert other == pytest.approx(off_diagonal.mean(), abs=0.02) and other < want["cosine"]


def test_a_wrong_pairing_is_chance(cone):
    """The cosine stays high in a cone: it is the rank that shows the draws to be of other texts."""
    z_i, z_t = cone
    number = np.arange(60)
    wrong = quality(np.roll(z_i, 7, axis=0), z_i, z_t, number, number)
    assert wrong["cosine"] > 0.8
    assert wrong["cosine"] == pytest.approx(wrong["cosine_other"], abs=0.02)
    assert wrong["recall_1"] == 0 and wrong["median_rank"] == pytest.approx(30, abs=10)
    right = quality(z_i, z_i, z_t, number, number)
    assert right["recall_1"] == 1 and right["cosine"] == pytest.approx(1)


def test_any_picture_of_an_equal_caption_is_right(cone):
    """Captions come in pairs: the picture of either is what the caption asks for."""
    z_i, z_t = cone
    number = np.arange(60)
    swapped = z_i[number ^ 1]
    assert quality(swapped, z_i, z_t, number, number)["recall_1"] == 0
    assert quality(swapped, z_i, z_t, number, number // 2)["recall_1"] == 1
    got = quality(np.repeat(z_i[:1], 60, 0), np.repeat(z_i[:1], 60, 0), z_t, 0 * number, number)
    assert got["candidates"] == 1 and got["median_rank"] == 1


def test_one_caption_has_no_other(cone):
    z_i, z_t = cone
    got = quality(z_i, z_i, z_t, np.arange(60), np.zeros(60, int))
    assert "cosine_other" not in got
    one = np.zeros(1, int)
    assert quality(z_i[:1], z_i[:1], z_t[:1], one, one)["cosine"] == pytest.approx(1)


# ============================================================ as an evaluator

CLIP = {
    "embed_dim": 8,
    "image_size": 8,
    "patch_size": 4,
    "vision_width": 8,
    "vision_layers": 1,
    "vision_heads": 1,
    "text_width": 8,
    "text_layers": 1,
    "text_heads": 1,
    "context": 8,
    "vocab_size": 40,
}
ARCH = {
    "embed_dim": 8,
    "context": 8,
    "text_width": 8,
    "width": 16,
    "layers": 1,
    "heads": 1,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def prior(quick_compiles):
    """A random diffusion prior of two steps above a random CLIP."""
    clip_params = jax.jit(tasks.make("clip", CLIP, {}).init)(jax.random.key(0))
    statistics = {"mean": jnp.zeros(8), "std": jnp.ones(8)}
    task = tasks.make(
        "prior",
        ARCH,
        {"draw": {"steps": 2}},
        clip=CLIP,
        weights={"clip": clip_params, "statistics": statistics},
    )
    return task, jax.jit(task.init)(jax.random.key(1))


@pytest.fixture(scope="module")
def batches():
    """13 samples in two batches of eight."""
    rng = np.random.default_rng(2)
    out = []
    for first in (0, 8):
        numbers = first + np.arange(8)
        tokens = np.zeros((8, 8), np.int32)
        tokens[:, 0], tokens[:, 1], tokens[:, 2], tokens[:, 3] = 38, numbers, numbers + 16, 39
        out.append(
            {
                "image": rng.integers(0, 256, (8, 8, 8, 3), np.uint8),
                "tokens": tokens,
                "text_mask": np.arange(8)[None].repeat(8, 0) < 4,
                "valid": numbers < 13,
                "sample": np.stack([np.zeros(8), numbers], 1).astype(np.uint32),
            }
        )
    return out


def figures(prior, batches, devices=1, **options):
    task, params = prior
    mesh = sharding.make_mesh(MESHES[devices], jax.devices()[:devices])
    evaluator = PriorQuality(task, task.frozen(), lambda: (b for b in batches), mesh, **options)
    assert evaluator.interval == "metric"
    state = {"params": jax.tree.map(lambda leaf: leaf * jnp.nan, params), "ema": params}
    return dict(evaluator.run(state, 1))


@pytest.fixture(scope="module")
def one(prior, batches):
    """The figures on one device."""
    return figures(prior, batches)


@pytest.mark.slow
def test_every_sample_counts_once_on_any_mesh(prior, batches, one):
    eight = figures(prior, batches, 8)
    assert one == pytest.approx(eight, rel=1e-4, abs=1e-5)
    assert one["prior/candidates"] == 13
    task = prior[0]
    frozen = task.frozen()
    z_i = np.concatenate([task.clip.image(frozen["clip"], b["image"])[b["valid"]] for b in batches])
    z_t = np.concatenate(
        [task.clip.text(frozen["clip"], b["tokens"])[0][b["valid"]] for b in batches]
    )
    assert one["prior/cosine_text_true"] == pytest.approx(cosine(z_i, z_t).mean(), rel=1e-4)
    assert one["prior/norm_true_mean"] == pytest.approx(
        np.linalg.norm(z_i, axis=1).mean(), rel=1e-4
    )


@pytest.mark.slow
def test_draws_do_not_depend_on_the_batches(prior, batches, one):
    """Noise belongs to a sample's number: one batch of 16 gives what two of eight give."""
    whole = [{name: np.concatenate([b[name] for b in batches]) for name in batches[0]}]
    assert figures(prior, whole) == pytest.approx(one, rel=1e-4, abs=1e-5)
    other = figures(prior, batches, seed=9)
    assert abs(other["prior/cosine"] - one["prior/cosine"]) > 1e-4


@pytest.mark.slow
def test_stored_embeddings_are_the_pictures(prior, batches, one):
    task, params = prior
    frozen = task.frozen()
    stored = dataclasses.replace(task, stored=True)
    rows = [
        {name: value for name, value in batch.items() if name != "image"}
        | {"z_i": np.asarray(task.clip.image(frozen["clip"], batch["image"]))}
        for batch in batches
    ]
    assert figures((stored, params), rows) == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_a_request_to_stop_gives_no_figures(prior, batches, monkeypatch):
    monkeypatch.setattr(distributed, "should_stop", lambda step=None: True)
    assert figures(prior, batches) == {}
