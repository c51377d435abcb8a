"""Drawn pictures against true ones: NumPy and SciPy oracles, pairing, any mesh, whole runs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from unclip import errors, tasks
from unclip.cascade import runs
from unclip.input.decode import transforms
from unclip.input.samples import Sample
from unclip.models.clip import CLIP
from unclip.runtime import distributed, sharding
from unclip.tasks import keys
from unclip.tasks.clip import FrozenClip
from unclip.training.evaluators import choose
from unclip.training.evaluators.drawn import Drawn, WithCaption
from unclip.training.plan import make_plan

pytestmark = pytest.mark.usefixtures("quick_compiles")


class Painter:
    """Draws the picture that its parameter says: the true one plus noise, or another sample's."""

    def predict(self):
        def sample(params, frozen, batch, key):
            noise = keys.normal(keys.sample_keys(key, batch["sample"]), batch["image"].shape[1:], 0)
            true = batch["shown"].astype(jnp.float32) / 127.5 - 1
            return {"pictures": jnp.clip(true + params["noise"] * noise, -1, 1)}

        return {"sample": sample}


class Judge:
    """A CLIP of one layer: random features of the pixels; a caption is the number of a picture."""

    def image(self, params, images):
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 127.5 - 1
        return jnp.tanh(images.reshape(len(images), -1) @ params["w"])

    def text(self, params, tokens):
        return params["texts"][tokens[:, 0] - 1], None


def cosine(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def frechet(a, b):
    """The textbook's formula, by SciPy's square root of a general matrix."""
    a, b = np.float64(a), np.float64(b)
    one, two = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(one @ two).real
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(one + two - 2 * root)


@pytest.fixture(scope="module")
def world():
    """45 samples, 38 usable, in six batches of eight; captions are the pictures' embeddings."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (48, 3, 3, 3), np.uint8)
    valid = np.arange(48) < 45
    valid[5:12] = False
    params = {"w": np.float32(rng.standard_normal((27, 6)) / 5)}
    texts = np.asarray(Judge().image(params, jnp.asarray(image)))
    params["texts"] = texts + np.float32(0.1 * rng.standard_normal(texts.shape))
    caption = np.zeros((48, 2), np.int32)
    caption[:, 0] = 1 + np.arange(48)
    caption[20] = 0  # a sample without a caption
    rows = {
        "image": image,
        "shown": image,
        "caption": caption,
        "valid": valid,
        "sample": np.stack([np.zeros(48), np.arange(48)], 1).astype(np.uint32),
    }
    return rows, params


def batches_of(rows):
    return lambda: ({k: v[i : i + 8] for k, v in rows.items()} for i in range(0, 48, 8))


def state(noise):
    return {"params": {"noise": jnp.float32(9)}, "ema": {"noise": jnp.float32(noise)}}


def figures(world, noise=0.0, devices=1, clip=True, **options):
    rows, params = world
    mesh = sharding.make_mesh({"data": devices}, jax.devices()[:devices])
    judge = (Judge(), params) if clip else None
    evaluator = Drawn(Painter(), None, batches_of(rows), mesh, clip=judge, **options)
    assert evaluator.interval == "metric"
    return dict(evaluator.run(state(noise), 1))


def test_figures_against_numpy(world):
    rows, params = world
    got = figures(world, 0.4, seed=7)
    noise = np.asarray(
        keys.normal(keys.sample_keys(jax.random.key(7), jnp.asarray(rows["sample"])), (3, 3, 3), 0)
    )
    true = np.float32(rows["image"]) / 127.5 - 1
    drawn = np.clip(true + np.float32(0.4) * noise, -1, 1)
    z = lambda pictures: np.asarray(Judge().image(params, jnp.asarray(pictures)))
    valid = rows["valid"]
    z_drawn = z(np.uint8(np.round((drawn + 1) * 127.5)))[valid]
    z_true, z_t = z(rows["image"])[valid], params["texts"][rows["caption"][:, 0] - 1][valid]
    captioned = rows["caption"][valid].any(1)
    assert captioned.sum() == 37
    want = {
        "drawn/mse": ((drawn - true) ** 2)[valid].mean(),
        "drawn/clip_cosine": cosine(z_drawn, z_t)[captioned].mean(),
        "drawn/clip_cosine_true": cosine(z_true, z_t)[captioned].mean(),
        "drawn/clip_cosine_pictures": cosine(z_drawn, z_true).mean(),
        "drawn/fd_clip_N38": frechet(z_drawn, z_true),
    }
    assert got == pytest.approx(want, rel=2e-4)
    assert want["drawn/fd_clip_N38"] > 1e-3


@pytest.mark.parametrize("devices", [2, 8])
def test_every_sample_counts_once_on_any_mesh(world, devices):
    assert figures(world, 0.4, devices) == pytest.approx(figures(world, 0.4), rel=1e-4)


def test_the_right_pictures_for_the_wrong_captions(world):
    """The set is right, so its distance is 0; its pictures are not, so their cosines are chance."""
    rows, params = world
    right = figures(world)
    assert right["drawn/mse"] < 1e-10
    assert right["drawn/fd_clip_N38"] == pytest.approx(0, abs=1e-6)
    assert right["drawn/clip_cosine"] == pytest.approx(right["drawn/clip_cosine_true"], abs=1e-6)
    assert right["drawn/clip_cosine"] > 0.9
    usable = np.flatnonzero(rows["valid"])
    shown = rows["image"].copy()
    shown[usable] = rows["image"][np.roll(usable, 3)]
    wrong = figures((rows | {"shown": shown}, params))
    assert wrong["drawn/fd_clip_N38"] == pytest.approx(0, abs=1e-6)
    assert wrong["drawn/clip_cosine"] == pytest.approx(0, abs=0.25)
    assert wrong["drawn/clip_cosine_true"] == pytest.approx(right["drawn/clip_cosine_true"])
    assert wrong["drawn/mse"] > 0.3


def test_without_a_judge_there_is_the_error_alone(world):
    assert figures(world, 0.4, clip=False).keys() == {"drawn/mse"}


def test_a_broken_model_gives_a_figure_that_is_not_finite(world):
    rows, params = world
    got = figures((rows, params | {"w": params["w"] * np.nan}))
    assert np.isnan(got["drawn/fd_clip_N38"]) and np.isfinite(got["drawn/mse"])


def test_a_request_to_stop_gives_no_figures(world, monkeypatch):
    monkeypatch.setattr(distributed, "should_stop", lambda step=None: True)
    assert figures(world) == {}


class Means:
    """An extractor of a picture's mean colours and of their squares."""

    id, provenance, outputs, params = "means", {}, {"pool3": 6, "other": 1}, {"power": 2.0}

    def prepare(self, picture):
        return {"image": picture}

    def apply(self, params, batch):
        image = batch["image"].astype(jnp.float32) / 255
        colours = jnp.concatenate([image, image ** params["power"]], -1).mean((1, 2))
        return {"pool3": colours, "other": colours[:, :1]}


def test_fid_is_of_all_pictures_once(world):
    """True pictures are looked at in the first run alone; the second gives the same figure."""
    rows, _ = world
    evaluator = Drawn(
        Painter(), None, batches_of(rows), sharding.make_mesh({"data": -1}), inception=Means()
    )
    first = dict(evaluator.run(state(0.4), 1))
    kept = evaluator.true
    assert dict(evaluator.run(state(0.4), 2)) == first and evaluator.true is kept
    noise = np.asarray(
        keys.normal(keys.sample_keys(jax.random.key(0), jnp.asarray(rows["sample"])), (3, 3, 3), 0)
    )
    true = np.float32(rows["image"])
    drawn = np.round((np.clip(true / 127.5 - 1 + np.float32(0.4) * noise, -1, 1) + 1) * 127.5)
    look = lambda p: np.concatenate([p / 255, (p / 255) ** 2], -1).mean((1, 2))[rows["valid"]]
    assert first["drawn/fid_means_N38"] == pytest.approx(frechet(look(drawn), look(true)), rel=1e-4)
    assert dict(evaluator.run(state(0.0), 3))["drawn/fid_means_N38"] == pytest.approx(0, abs=1e-6)


def test_a_stop_while_features_are_computed_gives_no_figures(world, monkeypatch):
    """The loop saves and leaves; what it is raised to is no business of its own."""
    polls = []
    monkeypatch.setattr(distributed, "should_stop", lambda step=None: bool(polls.append(step) or 1))
    assert figures(world, clip=False, inception=Means()) == {}
    assert len(polls) == 1


# ============================================================ in a run


def plan_of(config):
    config.mesh.data = 1
    plan = make_plan(config, devices=jax.devices()[:1])
    plan.check()
    return plan


def made(plan):
    """The evaluators of a run on one device, without those of the loss and the grids."""
    rows = {"process_index": 0, "process_count": 1, "threads": 1, "more": None}
    return choose.make(plan, plan.task, plan.task.frozen(), plan.data, plan.held_out, rows)


@pytest.mark.parametrize("judged", [True, False])
@pytest.mark.slow
def test_an_upsampler_is_judged_by_the_clip_it_is_given(judged, run_of, tiny_config, shards):
    config = tiny_config(
        "upsampler",
        {
            "metric_clip": run_of("clip") if judged else "",
            "eval_examples": 0,
            "metric_examples": 6,
            "input.held_out": (shards["held_out"],),
        },
    )
    plan = plan_of(config)
    (evaluator,) = made(plan)
    state = {"ema": jax.jit(plan.task.init)(jax.random.key(0))}
    found = dict(evaluator.run(state, 1))
    if not judged:
        assert found.keys() == {"drawn/mse"}
        return
    assert found.keys() == {
        "drawn/mse",
        "drawn/clip_cosine",
        "drawn/clip_cosine_true",
        "drawn/clip_cosine_pictures",
        "drawn/fd_clip_N6",
    }
    assert all(np.isfinite(value) for value in found.values())
    # The true pictures by the same CLIP, read and embedded apart.
    part = runs.open_part(run_of("clip"), "clip")
    clip = FrozenClip(CLIP(**tasks.arguments(part.arch)))
    collection, rng = plan.held_out, np.random.default_rng(0)
    read = transforms.ImageText(16, 16, captions=("txt",))
    samples = [read(collection.read(k), rng) for k in range(6)]
    z_i = clip.image(part.params, np.stack([s["image"] for s in samples]))
    z_t = clip.text(part.params, np.stack([s["tokens"] for s in samples]))[0]
    want = cosine(np.asarray(z_i), np.asarray(z_t)).mean()
    assert found["drawn/clip_cosine_true"] == pytest.approx(want, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("change", [{"metric_examples": 0}, {"input.held_out": ()}])
def test_no_examples_are_no_metrics(change, tiny_config, shards):
    config = tiny_config(
        "upsampler", {"eval_examples": 0, "input.held_out": (shards["held_out"],)} | change
    )
    assert made(plan_of(config)) == []


@pytest.mark.slow
def test_a_metric_clip_needs_both_towers(run_of, tiny_config, monkeypatch):
    config = tiny_config("upsampler", {"metric_clip": run_of("clip")})
    part = runs.open_part(run_of("clip"), "clip")
    del part.params["text"]
    monkeypatch.setattr(runs, "open_part", lambda path, name: part)
    with pytest.raises(errors.ConfigError, match="its CLIP has no text tower") as caught:
        choose.judge(plan_of(config), None, None)
    assert "\n" not in str(caught.value)


def test_the_caption_comes_along_as_clip_reads_it():
    """Also for an upsampler, which reads none, and for a sample that has none."""
    rng = np.random.default_rng(0)
    transform = WithCaption(lambda sample, rng: {"low": 1}, 8, ("txt",))
    sample = Sample("00001", b"", "a red square", {"name": "red"})
    got = transform(sample, rng)
    want = transforms.ImageText(None, 8)(sample, rng)["tokens"]
    assert got["low"] == 1
    np.testing.assert_array_equal(got["caption"], want)
    assert want.any()
    none = transform(sample._replace(text=" "), rng)["caption"]
    assert none.shape == (8,) and none.dtype == np.int32 and not none.any()


def test_names_hold_no_letter_that_tensorboard_replaces(world):
    assert all(re.fullmatch(r"[-/\w.]+", name) for name in figures(world, 0.4))


@pytest.mark.slow
def test_bits_per_dimension_of_a_run(tiny_config, run_of, shards):
    """The whole bound of a fresh decoder, which predicts no noise at all; and only where asked."""
    from unclip.training.evaluators.likelihood import Likelihood

    fields = {"clip": run_of("clip"), "input.held_out": (shards["held_out"],)}
    config = tiny_config("decoder", fields | {"metric_bits_examples": 4, "metric_examples": 4})
    plan = make_plan(config)
    state = plan.init(jax.random.key(0), None)
    weights = {name: plan.put(part.params) for name, part in plan.parts.items()}
    task = dataclasses.replace(plan.task, weights=weights)
    rows = {"process_index": 0, "process_count": 1, "threads": 1}
    made = lambda plan: choose.make(plan, task, task.frozen(), plan.data, plan.held_out, rows)
    (likelihood,) = (e for e in made(plan) if isinstance(e, Likelihood))
    got = dict(likelihood.run(state, 2))
    assert got.keys() == {f"likelihood/{n}_bits" for n in ("decoder", "prior")} | {
        "likelihood/bits_per_dim"
    }
    assert 0 < got["likelihood/decoder_bits"] < got["likelihood/bits_per_dim"] < 100
    assert got["likelihood/prior_bits"] < 1e-5
    without = make_plan(tiny_config("decoder", fields | {"metric_examples": 4}))
    assert not any(isinstance(e, Likelihood) for e in made(without))
