"""Steps of every stage: the same on any mesh, exact accumulation, skipped steps; clear refusals."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip import errors, tasks
from unclip.cascade import bundle
from unclip.runtime import sharding
from unclip.training.data import collections
from unclip.training.plan import make_plan, make_task
from unclip.training.step import make_init, make_optimizer, make_step

pytestmark = pytest.mark.usefixtures("quick_compiles")
STAGES = tasks.STAGES
ROWS = 8


def random_batch(task, first):
    rng = np.random.default_rng(first)
    out = {}
    for name, leaf in task.batch_spec(ROWS).items():
        out[name] = np.zeros(leaf.shape, leaf.dtype)
        if leaf.dtype == np.uint8:
            out[name] = rng.integers(0, 256, leaf.shape, np.uint8)
    if "tokens" in out:
        length = out["tokens"].shape[1]
        for row in range(ROWS):
            words = 1 + row % (length - 2)
            out["tokens"][row, : words + 2] = [49406, *rng.integers(1, 49406, words), 49407]
            out["text_mask"][row, : words + 2] = True
    out["sample"][:, 1] = first + np.arange(ROWS)
    out["valid"][:] = True
    return out


@pytest.fixture(scope="module")
def prepared(tiny_config):
    """prepared(stage, changes) -> (config, task, tx, schedule, state on the host, batches)."""
    made = {}
    clip_config = tiny_config("clip").arch.to_dict()

    def make(name, changes=()):
        config = tiny_config(name, {"optim.learning_rate": 1e-3} | dict(changes))
        parts = {}
        if name in ("prior", "decoder"):
            if "clip" not in made:
                model = tasks.make("clip", clip_config, {})
                made["clip"] = jax.device_get(jax.jit(model.init)(jax.random.key(7)))
            parts["clip"] = bundle.Part("clip", clip_config, made["clip"])
        task = make_task(config, parts)
        if name == "prior":
            statistics = {"mean": np.zeros(16, np.float32), "std": np.ones(16, np.float32)}
            weights = {**task.weights, "statistics": statistics}
            task = dataclasses.replace(task, weights=weights)
        abstract = jax.eval_shape(task.init, jax.random.key(0))
        tx, schedule = make_optimizer(config, abstract)
        if ("state", name) not in made:
            init = jax.jit(make_init(task, tx))
            made["state", name] = jax.device_get(init(jax.random.key(0)))
        batches = [random_batch(task, ROWS * step) for step in range(3)]
        return config, task, tx, schedule, made["state", name], batches

    return make


def run(parts, spec, devices, rules="data", min_size=64):
    """(losses, last metrics, parameters) of the prepared steps on a mesh."""
    config, task, tx, schedule, state, batches = parts
    mesh = sharding.make_mesh(spec, devices)
    where = sharding.shardings(state, mesh, sharding.PRESETS[rules], min_size=min_size)
    state = jax.tree.map(jax.device_put, state, where)
    frozen = task.frozen()
    if frozen is not None:
        frozen = jax.tree.map(
            jax.device_put,
            frozen,
            sharding.shardings(frozen, mesh, sharding.PRESETS[rules], min_size=min_size),
        )
    step = jax.jit(
        make_step(task, tx, schedule, config),
        out_shardings=(where, sharding.replicated(mesh)),
    )
    losses = []
    for batch in batches:
        state, metrics = step(state, frozen, sharding.put_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
    return np.array(losses), jax.device_get(metrics), jax.device_get(state)


@pytest.fixture(scope="module")
def alone(prepared):
    """alone(stage): the steps on one device."""
    done = {}

    def make(name):
        if name not in done:
            done[name] = run(prepared(name), {"data": 1}, jax.devices()[:1])
        return done[name]

    return make


@pytest.mark.parametrize(
    "name",
    [n if n == "clip" else pytest.param(n, marks=pytest.mark.slow) for n in STAGES],
)
@pytest.mark.slow
def test_eight_devices_are_one(name, prepared, alone):
    want, got = alone(name), run(prepared(name), {"data": 8}, jax.devices())
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert len(set(want[0].tolist())) == 3
    assert got[1]["skipped"] == 0 and got[2]["step"] == 3


@pytest.mark.slow
def test_sharded_parameters_change_nothing(prepared, alone):
    """Parameters and moments split over fsdp, and kernels over tensor as well."""
    got = run(prepared("clip"), {"fsdp": 4, "tensor": 2}, jax.devices(), "tensor")
    np.testing.assert_allclose(got[0], alone("clip")[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["decoder", "upsampler"])
@pytest.mark.parametrize(
    "change, said",
    [
        ({"sharding": "tensor"}, "sharding=tensor"),
        ({"mesh.data": 1, "mesh.tensor": -1}, "mesh.tensor=-1"),
    ],
)
def test_convolutions_are_not_split_over_tensor(name, change, said, tiny_config):
    config = tiny_config(name)
    config.update_from_flattened_dict(change)
    problems = make_plan(config, shapes_only=True).problems
    found = [str(problem) for problem in problems if said in str(problem)]
    assert len(found) == 1 and "--config.sharding=fsdp" in found[0] and "\n" not in found[0]


@pytest.mark.slow
def test_accumulation_of_the_decoder(prepared, alone):
    """Two microbatches of four give the step of eight, on one device and on four."""
    parts = prepared("decoder", {"accumulate": 2})
    got = run(parts, {"data": 4}, jax.devices()[:4])
    np.testing.assert_allclose(got[0], alone("decoder")[0], rtol=1e-5)
    np.testing.assert_allclose(got[1]["mse"], alone("decoder")[1]["mse"], rtol=1e-5)


@pytest.mark.slow
def test_accumulation_of_clip_is_exact(prepared, alone):
    """Every other row of the batch stays a negative, also at SAM's perturbed point (rho 0.1)."""
    changes = {"optim.sam_rho": 0.1}
    want = run(prepared("clip", changes), {"data": 1}, jax.devices()[:1])
    got = run(prepared("clip", changes | {"accumulate": 4}), {"data": 2}, jax.devices()[:2])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for name in ("grad_norm", "image_to_text", "temperature"):
        np.testing.assert_allclose(got[1][name], want[1][name], rtol=1e-4)
    assert abs(want[1]["grad_norm"] / alone("clip")[1]["grad_norm"] - 1) > 1e-3


def test_a_step_that_is_not_finite_leaves_everything(prepared):
    config, task, tx, schedule, state, batches = prepared("clip")

    class Poisoned(tasks.ClipTask):
        def loss(self, params, frozen, batch, key, *, train):
            loss, metrics = super().loss(params, frozen, batch, key, train=train)
            bad = jnp.where(batch["sample"][0, 1] == ROWS, jnp.nan, 0.0)
            return loss + bad * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)), metrics

    task = Poisoned(task.arch)
    step = jax.jit(make_step(task, tx, schedule, config))
    one, first = step(state, None, batches[0])
    two, second = step(one, None, batches[1])
    three, third = step(two, None, batches[2])
    assert [int(m["skipped"]) for m in (first, second, third)] == [0, 1, 0]
    for branch in ("params", "ema", "opt"):
        for a, b in zip(jax.tree.leaves(one[branch]), jax.tree.leaves(two[branch])):
            np.testing.assert_array_equal(a, b)
    moved = zip(jax.tree.leaves(two["params"]), jax.tree.leaves(three["params"]))
    assert any(not np.array_equal(a, b) for a, b in moved)
    assert [int(s["step"]) for s in (one, two, three)] == [1, 2, 3]


def test_missing_shards_are_named(tiny_config, tmp_path):
    gone = str(tmp_path / "train-0009.tar")
    config = tiny_config("clip", {"input.shards": (gone,)})
    with pytest.raises(errors.DataError, match=r"train-0009\.tar' is not there"):
        collections(config)
    with pytest.raises(errors.ConfigError, match="no training shards"):
        collections(tiny_config("clip", {"input.shards": ()}))


def test_a_file_that_is_no_tar(tiny_config, tmp_path):
    path = tmp_path / "bad.tar"
    path.write_bytes(b"not a tar" * 200)
    with pytest.raises(errors.DataError, match=r"bad\.tar") as caught:
        collections(tiny_config("clip", {"input.shards": (str(path),)}))
    assert "\n" not in str(caught.value)


def test_a_tar_without_captions(tiny_config, shard_writer, tmp_path):
    path = shard_writer(tmp_path / "bare.tar", 3, captions=False)
    for sources, there in ((("txt",), "txt.*'json:name'"), (("json:alt",), "'alt'.*'json:name'")):
        config = tiny_config("clip", {"input.shards": (path,), "input.captions": sources})
        with pytest.raises(errors.DataError, match=f"3 pictures and no captions: .*{there}"):
            collections(config)
    config = tiny_config("clip", {"input.shards": (path,), "input.captions": ("txt", "json:name")})
    assert len(collections(config)[0]) == 3


def test_flops_do_not_depend_on_folding_or_remat(tiny_config):
    """And are twice with sharpness-aware minimisation; XLA's count agrees within a few percent."""
    changes = {"arch.vision_layers": 2}
    config = tiny_config("clip", changes)
    plan = make_plan(config, shapes_only=True)
    plain = plan.flops()
    folded = changes | {"arch.fold": True, "arch.remat": "nothing_saveable"}
    assert make_plan(tiny_config("clip", folded), shapes_only=True).flops() == plain > 1e5
    config.optim.sam_rho = 0.1
    assert make_plan(config, shapes_only=True).flops() == 2 * plain
    loss = lambda p, b: plan.task.loss(p, None, b, jax.random.key(0), train=True)[0]
    batch = plan.task.batch_spec(config.batch_size)
    lowered = jax.jit(jax.grad(loss)).lower(plan.params, batch)
    # So small a network spends much on what only XLA counts, such as comparisons.
    assert plain == pytest.approx(lowered.cost_analysis()["flops"], rel=0.2)


def test_every_problem_is_told_at_once(tiny_config, tmp_path):
    """Before anything is computed; one alone keeps its class and its line."""
    wrong = {
        "sharding": "fsdb",
        "batch_size": 12,
        "mesh.data": 8,
        "task.draw.sampler": "dimm",
        "clip": str(tmp_path / "nowhere"),
        "optim.schedule": "cosin",
        "input.shards": ("/nowhere/x.tar",),
    }
    config = tiny_config("decoder", wrong)
    plan = make_plan(config)
    with pytest.raises(errors.UnclipError, match="problems stand in the way") as caught:
        plan.check()
    said = caught.value.table
    for words in ("'fsdb'", "batch_size 12", "'dimm'", "no such folder", "x.tar' is not there"):
        assert words in said, words
    one = make_plan(tiny_config("clip", {"input.shards": ("/nowhere/x.tar",)}))
    with pytest.raises(errors.DataError, match=r"x\.tar' is not there"):
        one.check()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "upsampler",
            {
                "input.degradation": "bsrr",
                "input.margin": 20.0,
                "input.degradation_probability": 3.0,
                "task.draw.sampler": "plms",
                "optim.schedule": "cosin",
                "optim.b2": 1.5,
                "save_steps": 0,
                "eval_steps": -3,
                "ema": float("nan"),
            },
            [
                "degradation 'bsrr': did you mean 'bsr'",
                "margin 20.0: expected 1 to 8",
                "degradation probability 3.0: expected 0 to 1",
                "unknown sampler 'plms': did you mean 'ddpm'? valid: ddim",
                "did you mean 'cosine'",
                "b2 is 1.5",
                "--config.save_steps=0: expected a number of at least 1",
                "--config.eval_steps=-3",
                "--config.ema=nan: expected a number from 0 to 1",
            ],
        ),
        ("upsampler", {"task.factor": 3, "task.crop": 8}, ["crop 8 of 16 by factor 3"]),
        (
            "upsampler",
            {
                "task.factor": 0,
                "arch.channels": 0,
                "arch.multipliers": (),
                "arch.dropout": float("nan"),
                "batch_size": 0,
                "accumulate": 0,
                "total_steps": 0,
                "optim.eps": 0.0,
            },
            [
                "--config.task.factor=0: expected at least 1",
                "--config.arch.channels=0: expected at least 1",
                "--config.arch.multipliers=(): expected one or more",
                "--config.arch.dropout=nan: expected at least 0",
                "--config.batch_size=0",
                "--config.accumulate=0",
                "--config.total_steps=0: expected a number of at least 1",
                "eps is 0.0, expected more than 0",
            ],
        ),
        (
            "upsampler",
            {"task.image_size": 18, "arch.patch": 4},
            ["--config.task.image_size=18: expected a multiple of 4"],
        ),
        ("upsampler", {"task.variance": "fixt_small"}, ["unknown variance 'fixt_small'"]),
        ("upsampler", {"task.parametrisation": "x"}, ["unknown parametrisation 'x'"]),
        ("clip", {"arch.patch_size": 7}, ["image_size=16: expected a multiple of arch.patch"]),
        (
            "clip",
            {"sharding": "(('vision', 'fsdp')"},
            ["expected data, fsdp, tensor, or", "('/kernel$', 'fsdp')"],
        ),
        ("clip", {"sharding": "(('visoin', 'fsdp'),)"}, ["'visoin' matches no parameter"]),
        ("clip", {"metric_clip": "/nowhere/clip"}, ["metric_clip: /nowhere/clip: no such folder"]),
        ("clip", {"metric_inception": "/nowhere/i"}, ["metric_inception /nowhere/i: no such"]),
        ("prior", {"arch.embed_dim": 24}, ["--config.arch.embed_dim=16"]),
        (
            "prior",
            {"arch.text_width": 8, "arch.context": 40},
            ["--config.arch.text_width=16", "--config.arch.context=16"],
        ),
        ("clip", {"arch.dtype": "float33"}, ["data type 'float33' not understood"]),
        ("decoder", {"arch.out_channels": 3}, ["needs --config.arch.out_channels=6, given 3"]),
    ],
)
def test_what_costs_a_run_is_told_before_it(tiny_config, run_of, name, change, said):
    """All of it, as flags to set."""
    own = {"clip": run_of("clip")} if name in ("prior", "decoder") else {}
    plan = make_plan(tiny_config(name, own | change))
    told = "\n".join(problem.message for problem in plan.problems)
    for words in said:
        assert told.count(words) == 1, told


def test_a_sharding_may_be_given_as_text(tiny_config):
    """On the command line it cannot be given otherwise."""
    config = tiny_config("clip", {"sharding": "(('vision/', 'fsdp'), ('.', 'replicate'))"})
    plan = make_plan(config, shapes_only=True)
    assert not plan.problems
    assert plan.rules == (("vision/", "fsdp"), (".", "replicate"))


def test_a_config_that_trains_nothing(tiny_config):
    config = tiny_config("clip")
    config.stage = "evaluate"
    with pytest.raises(errors.ConfigError, match=r"stage 'evaluate' trains nothing; .*clip\.py"):
        make_plan(config)


def test_paths_of_a_config_may_begin_at_home(tiny_config, shards, run_of, monkeypatch):
    """The shell leaves `~` alone behind `--config.clip=`."""
    monkeypatch.setenv("HOME", str(pathlib.Path(shards["train"]).parent))
    files = ("~/train-*.tar", "~/held-out-0000.tar")
    change = {"input.shards": files[:1], "input.held_out": files[1:], "init_from": "~/none"}
    plan = make_plan(tiny_config("clip", change))
    assert (len(plan.data), len(plan.held_out)) == (24, 8)
    folder = pathlib.Path(shards["train"]).parent
    assert [problem.message.split(":")[0] for problem in plan.problems] == [f"{folder}/none"]


def test_the_config_is_left_alone(tiny_config):
    config = tiny_config("clip")
    before = config.to_json()
    plan = make_plan(config)
    plan.check()
    assert plan.config is not config and config.to_json() == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.task = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.task.draw = {}


@pytest.mark.slow
def test_operations_are_those_whatever_runs_attention(tiny_config):
    """cuDNN's kernel is none that a trace sees into, and needs a GPU to be traced at all."""
    fields = {"clip": "random", "clip_preset": "emoji", "arch.dtype": "bfloat16"}
    plain = make_plan(tiny_config("decoder", fields), shapes_only=True)
    cudnn = fields | {"arch.attention_impl": "cudnn"}
    assert make_plan(tiny_config("decoder", cudnn), shapes_only=True).flops() == plain.flops() > 0


def test_a_preset_of_a_frozen_part_takes_the_fused_attention(tiny_config):
    impls = {}
    for impl in ("xla", "fused"):
        config = tiny_config("prior", {"arch.attention_impl": impl})
        frozen = make_plan(config, shapes_only=True).parts["clip"]
        impls[impl] = frozen.arch.get("attention_impl", "xla")
    assert impls == {"xla": "xla", "fused": "fused"}
