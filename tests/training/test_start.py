"""The karlo configs: every stage goes on from a bundle's weights, in its architecture and space."""

import importlib
import itertools

import jax
import ml_dtypes
import numpy as np
import pytest

from unclip import errors, tasks
from unclip.cascade import bundle, runs
from unclip.models.unet import fold_params
from unclip.runtime import checkpoint, distributed
from unclip.training.loop import Loop
from unclip.training.plan import follow_init, make_plan, make_task
from unclip.training.start import PARTIAL, Prepared, initial_params, train

pytestmark = pytest.mark.usefixtures("cheap_runs")
# Karlo's architecture at tiny width, named as a converter does: what differs from the defaults.
UNET = {"channels": 16, "multipliers": (1,), "blocks": 1, "head_dim": 16, "groups": 8}
PARTS = {
    "clip": (
        dict(
            embed_dim=16,
            image_size=16,
            patch_size=8,
            vision_width=16,
            vision_layers=1,
            vision_heads=2,
            text_width=16,
            text_layers=1,
            text_heads=2,
            context=16,
            activation="quick_gelu",
        ),
        {},
    ),
    "prior": (
        dict(embed_dim=16, context=16, text_width=16, width=32, layers=1, heads=2, head_dim=16),
        dict(
            kind="diffusion",
            noise="cosine",
            embedding="whiten",
            clamp=5.0,
            text_drop=0.7,
            draw=dict(steps=2, guidance=4.0, sampler="ddpm", candidates=1),
        ),
    ),
    "decoder": (
        UNET | dict(attention=(True,), context_dim=32),
        dict(
            image_size=8,
            noise="cosine",
            parametrisation="eps",
            variance="learned_range",
            draw=dict(steps=2, guidance=8.0, sampler="ddpm"),
        ),
    ),
    "upsampler": (
        UNET | dict(attention=(False,)),
        dict(
            image_size=32,
            factor=4,
            noise="cosine",
            variance="fixed_small",
            draw=dict(steps=7, sampler="ddpm"),
        ),
    ),
}
DTYPES = {"clip": np.float16, "prior": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def karlo(tmp_path_factory):
    """A bundle of random weights in every dtype they come in, with statistics of its own."""
    rng = np.random.default_rng(0)
    parts = {}
    for name in ("clip", "prior", "decoder", "upsampler_0", "upsampler_0_last"):
        stage_name = name.partition("_")[0]
        arch, settings = PARTS[stage_name]
        task = tasks.make(stage_name, arch, settings, clip=PARTS["clip"][0])
        shapes = jax.eval_shape(task.init, jax.random.key(0))
        dtype = DTYPES.get(name, np.float32)
        draw = lambda v, dtype=dtype: (0.1 * rng.standard_normal(v.shape)).astype(dtype)
        parts[name] = bundle.Part(name, arch, jax.tree.map(draw, shapes), {}, settings)
    parts["prior"].extra = {
        "mean": np.float32(rng.normal(size=16)),
        "std": np.float32(rng.uniform(1, 2, 16)),
    }
    folder = tmp_path_factory.mktemp("karlo")
    bundle.write(folder, parts)
    return str(folder)


@pytest.fixture(scope="module")
def config_of(tiny_config, shards, karlo):
    """config_of(stage, arg): the full-size config pointed at the bundle, with little data."""

    def make(name, arg="karlo", **changes):
        config = importlib.import_module(f"configs.{name}").get_config(arg)
        fields = {
            "init_from": karlo,
            "batch_size": 8,
            "total_steps": 2,
            "log_steps": 1,
            "input.shards": (shards["train"],),
            "input.held_out": (),
            "input.threads": 1,
            "tensorboard": False,
            "eval_steps": 0,
            "sample_examples": 0,
            "sharding": "data",
            "arch.dtype": "float32",
            "arch.remat": "",
            "optim.warmup_steps": 0,
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
        if name in ("prior", "decoder"):
            fields["clip"] = karlo
        if name == "upsampler":
            fields["task.crop"] = 8
        config.update_from_flattened_dict(fields | changes)
        return config

    return make


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        pytest.param("clip", "karlo", marks=pytest.mark.slow),
        ("prior", "karlo"),
        pytest.param("decoder", "karlo", marks=pytest.mark.slow),
        ("upsampler", "karlo,net=last"),
    ],
)
@pytest.mark.slow
def test_two_steps_from_the_bundle(name, arg, config_of, karlo, tmp_path, monkeypatch):
    """Step 0 is the bundle bit for bit, in float32; two steps move it a little."""
    begun = {}
    run = Loop.run

    def remember(self, step_fn, state, first):
        begun["state"], begun["frozen"] = jax.device_get((state, self.frozen))
        return run(self, step_fn, state, first)

    monkeypatch.setattr(Loop, "run", remember)
    config = config_of(name, arg)
    train(config, str(tmp_path))
    part = "upsampler_0_last" if name == "upsampler" else name
    want = bundle.read_part(karlo, part)
    for branch in ("params", "ema"):
        got = begun["state"][branch]
        assert jax.tree.structure(got) == jax.tree.structure(want.params)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want.params)):
            assert a.dtype == np.float32
            np.testing.assert_array_equal(a, b.astype(np.float32))
    ended = checkpoint.load_subtree(tmp_path / "checkpoints", ("params", "step"))
    moved = [
        np.abs(a - b.astype(np.float32)).max()
        for a, b in zip(jax.tree.leaves(ended["params"]), jax.tree.leaves(want.params))
    ]
    rate = config.optim.learning_rate
    assert int(ended["step"]) == 2 and rate <= 1e-5
    assert rate < max(moved) < 3 * rate + 1e-6  # two of Adam's steps, and float32's rounding
    kept = runs.run_config(tmp_path)
    assert kept["arch"]["dtype"] == "float32"
    for field, value in want.settings.items():
        field = {"noise": "noise_schedule"}.get(field, field)
        if field != "text_drop":
            assert kept["task"][field] == (dict(value) if field == "draw" else value), field
    if name == "prior":
        for key, value in want.extra.items():
            np.testing.assert_array_equal(begun["frozen"]["statistics"][key], value)
        found = runs.open_part(tmp_path, "prior")
        np.testing.assert_array_equal(found.extra["mean"], want.extra["mean"])
        assert kept["task"]["clamp"] == 5.0 and kept["task"]["text_drop"] == 0.2
    if name == "upsampler":
        assert kept["task"]["t_below"] == 1
        other = bundle.read_part(karlo, "upsampler_0").params
        assert not np.array_equal(jax.tree.leaves(other)[0], jax.tree.leaves(want.params)[0])


def test_the_architecture_is_the_bundles(config_of):
    config = config_of("decoder", **{"arch.attention_impl": "cudnn", "arch.dropout": 0.3})
    assert config.arch.channels == 320
    follow_init(config)
    # Named in the bundle; not named there, so the module's default and not the preset's; our own.
    assert config.arch.channels == 16 and config.arch.multipliers == (1,)
    assert config.arch.learned_null_text is False and config.arch.time_dim is None
    assert (config.arch.attention_impl, config.arch.dropout) == ("cudnn", 0.3)
    assert config.task.image_size == 8 and config.task.text_drop == 0.5


def test_the_last_net_is_trained_on_the_last_step(config_of, karlo):
    """At the last of its seven steps Karlo's second network meets t = 0 alone."""
    assert config_of("upsampler").init_part == "upsampler_0"
    config = config_of("upsampler", "karlo,net=last")
    follow_init(config)
    task = make_task(config, {})
    assert task.t_below == 1 and task.schedule.respace(task.draw["steps"]).timesteps[0] == 0
    assert make_task(config_of("upsampler"), {}).t_below == 1000
    with pytest.raises(errors.ConfigError, match="t_below is 2000: expected 0"):
        tasks.make("upsampler", PARTS["upsampler"][0], {"image_size": 8, "t_below": 2000})


def test_a_folded_run_begins_with_the_same_weights(config_of, karlo):
    config = config_of("upsampler", **{"arch.fold": True})
    follow_init(config)
    assert config.arch.fold
    task = make_task(config, {})
    got = initial_params(config, jax.eval_shape(task.init, jax.random.key(0)))
    want = fold_params(bundle.read_part(karlo, "upsampler_0").params)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_what_is_missing_is_named(config_of, karlo, tmp_path):
    with pytest.raises(errors.ConfigError, match=r"karlo fine-tunes: .*init_from=BUNDLE") as caught:
        train(config_of("prior", init_from=""), str(tmp_path))
    assert "karlo,scratch" in str(caught.value)
    with pytest.raises(errors.ConfigError, match="no part 'upsampler_1'"):
        follow_init(config_of("upsampler", init_part="upsampler_1"))
    with pytest.raises(errors.DataError, match="no such folder"):
        follow_init(config_of("decoder", init_from="/nowhere"))
    with pytest.raises(errors.ConfigError, match="net=last is one of karlo's two nets"):
        config_of("upsampler", "paper-256,net=last")
    assert not config_of("decoder", "karlo,scratch").follow_init


def test_statistics_of_another_size_are_refused(config_of, karlo, tmp_path):
    whole = bundle.read(karlo).parts
    whole["prior"].extra["mean"] = np.zeros(8, np.float32)
    bundle.write(tmp_path / "other", {"prior": whole["prior"]})
    config = config_of("prior", init_from=str(tmp_path / "other"))
    with pytest.raises(errors.ConfigError, match=r"statistics {'mean': \(8,\)"):
        train(config, str(tmp_path / "run"))


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_statistics_go_on_where_they_were_stopped(tiny_config, run_of, tmp_path, monkeypatch, kind):
    """Bit for bit those of a start that was not stopped."""
    changes = {"clip": run_of("clip"), "batch_size": 8}
    if kind == "ar":
        changes |= {"arch.codes": 4, "arch.buckets": 8}
    config = tiny_config("prior", changes, arg=f"emoji,runlocal,kind={kind}")
    if kind == "ar":
        with config.unlocked():
            del config.arch["head_dim"], config.task.draw["steps"]
    fits = []
    for folder, stops in ((tmp_path / "whole", ()), (tmp_path / "parts", (1, 1))):
        folder.mkdir()
        plan = make_plan(config, workdir=folder)
        plan.check()
        for number in stops:
            calls = itertools.count(1)
            stop = lambda step=None, calls=calls, number=number: next(calls) == number
            with monkeypatch.context() as context, pytest.raises(errors.Stopped, match="embedded"):
                context.setattr(distributed, "should_stop", stop)
                Prepared(plan, folder)
        fits.append(Prepared(plan, folder).task.weights["statistics"])
        assert not (folder / PARTIAL).exists()
    jax.tree.map(np.testing.assert_array_equal, *fits)
