"""The training loop: resuming bit for bit, stopping, skipped steps, refusals, what a run leaves."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unclip import errors, tasks
from unclip.cascade import runs
from unclip.files import images
from unclip.runtime import checkpoint, distributed, optim
from unclip.training import checks
from unclip.training.checkup import examine
from unclip.training.evaluators.held_out import HeldOutLoss
from unclip.training.loop import Loop
from unclip.training.plan import as_json, frozen_part, make_plan
from unclip.training.start import initial_params, resumed_lines, train, write_config

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("cheap_runs")


def state_of(workdir, step=None):
    branches = ("params", "ema", "opt", "step")
    return checkpoint.load_subtree(pathlib.Path(workdir) / "checkpoints", branches, step)


def lines(workdir):
    return [json.loads(text) for text in (pathlib.Path(workdir) / "metrics.jsonl").open()]


def series(workdir, name):
    return {line["step"]: line[name] for line in lines(workdir) if name in line}


def stop_at(monkeypatch, step):
    monkeypatch.setattr(distributed, "should_stop", lambda at=None: at == step)


@pytest.fixture(scope="module")
def decoder_config(tiny_config, run_of, shards):
    """A decoder with everything on: held-out loss, grids, a warm-up that shows in the metrics."""
    changes = {
        "clip": run_of("clip"),
        "total_steps": 4,
        "save_steps": 3,
        "eval_steps": 2,
        "sample_examples": 4,
        "input.held_out": (shards["held_out"],),
        "optim.warmup_steps": 4,
        "tensorboard": True,
    }
    return lambda **more: tiny_config("decoder", changes | more)


@pytest.fixture(scope="module")
def whole(decoder_config, tmp_path_factory):
    """The decoder's run of four steps without interruption."""
    workdir = str(tmp_path_factory.mktemp("whole"))
    train(decoder_config(), workdir)
    return workdir


def assert_same_state(one, two):
    a, b = state_of(one), state_of(two)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert int(a["step"]) == int(b["step"])


@pytest.mark.parametrize("name", ["clip", pytest.param("decoder", marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_bits(
    name, whole, decoder_config, tiny_config, tmp_path, monkeypatch
):
    straight = whole
    config = decoder_config(sample_examples=0, metric_examples=0, tensorboard=False)
    if name == "clip":
        straight = str(tmp_path / "straight")
        config = tiny_config("clip", {"total_steps": 4})
        train(config, straight)
    workdir = str(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(errors.Stopped, match="saved step 3 of 4"):
            train(config, workdir)
    assert int(state_of(workdir)["step"]) == 3
    train(config, workdir)
    assert_same_state(straight, workdir)
    trained = [line["step"] for line in lines(workdir) if "loss" in line]
    assert trained == [1, 2, 3, 4]
    assert series(workdir, "loss") == series(straight, "loss")
    assert series(workdir, "held_out/loss") == series(straight, "held_out/loss")
    # Once more: the run is over, and nothing is trained, written or lost.
    before = lines(workdir)
    train(config, workdir)
    assert lines(workdir) == before
    assert_same_state(straight, workdir)


@pytest.fixture(scope="module")
def measured_clip(tiny_config, shards):
    """A CLIP of four steps: its loss is measured after 2, retrieval after 1, 2, 3, all after 4."""
    changes = {
        "total_steps": 4,
        "save_steps": 100,
        "eval_steps": 2,
        "metric_steps": 1,
        "metric_examples": 6,
        "input.held_out": (shards["held_out"],),
    }
    return lambda **more: tiny_config("clip", changes | more)


@pytest.fixture(scope="module")
def measured(measured_clip, tmp_path_factory):
    """Its run without interruption."""
    workdir = str(tmp_path_factory.mktemp("measured"))
    train(measured_clip(), workdir)
    return workdir


@pytest.mark.slow
def test_each_evaluator_follows_its_own_steps(measured):
    assert sorted(series(measured, "held_out/loss")) == [2, 4]
    ranks = series(measured, "retrieval/text_to_image_median_rank")
    assert sorted(ranks) == [1, 2, 3, 4]
    assert all(1 <= rank <= 6 for rank in ranks.values())
    assert set(series(measured, "retrieval/captions").values()) == {6}


def stop_in(monkeypatch, step, polls):
    """A request to stop that comes at a step, after so many polls; it stays true, as it does."""
    left = [polls]

    def should_stop(at=None):
        left[0] -= at == step
        return left[0] < 0

    monkeypatch.setattr(distributed, "should_stop", should_stop)


class Counted:
    """An evaluator of two batches, with a poll after each."""

    interval = "metric"

    def __init__(self, prefix):
        self.prefix = prefix

    def run(self, state, step):
        for _ in range(2):
            if distributed.should_stop(step):
                return
        yield f"{self.prefix}/figure", 1.0


class Notes:
    """A writer that remembers."""

    def __init__(self, restored=()):
        self.restored_names, self.written = set(restored), []

    def scalars(self, step, values):
        self.written += values


@pytest.mark.parametrize(
    ("polls", "found"),
    [
        (0, []),
        (1, []),
        (2, []),
        (3, ["a/figure"]),
        (4, ["a/figure"]),
        (5, ["a/figure"]),
        (6, ["a/figure", "b/figure"]),
    ],
)
def test_a_stop_ends_evaluation_at_the_next_poll(tiny_config, tmp_path, monkeypatch, polls, found):
    """Polls: one before each evaluator, one after each of its batches."""
    evaluators, writer = [Counted("a"), Counted("b")], Notes()
    config = tiny_config("clip", {"total_steps": 9, "metric_steps": 3})
    plan = make_plan(config, shapes_only=True)
    loop = Loop(plan, None, tmp_path, None, writer, None, evaluators, fingerprint="")
    stop_in(monkeypatch, 3, polls)
    assert loop.evaluate({}, 3) == (len(found) == 2)
    assert writer.written == found


def test_what_metrics_jsonl_holds_is_not_measured_again(tiny_config, tmp_path):
    writer = Notes({"step", "loss", "a/other", "ab/figure"})
    config = tiny_config("clip", {"total_steps": 9, "metric_steps": 3})
    evaluators = [Counted("a"), Counted("b")]
    plan = make_plan(config, shapes_only=True)
    loop = Loop(plan, None, tmp_path, None, writer, None, evaluators, fingerprint="")
    loop.recall(3)
    assert loop.evaluate({}, 3) and writer.written == ["b/figure"]
    assert loop.evaluate({}, 6) and writer.written == ["b/figure", "a/figure", "b/figure"]
    assert loop.evaluate({}, 8) and len(writer.written) == 3
    assert loop.evaluate({}, 9) and len(writer.written) == 5
    assert loop.evaluate({}, 0) and len(writer.written) == 5


@pytest.mark.slow
def test_an_evaluation_cut_short_is_done_after_the_resume(
    measured, measured_clip, tmp_path, monkeypatch
):
    workdir, step = str(tmp_path / "stopped"), 2
    with monkeypatch.context() as patch:
        stop_in(patch, step, 3)  # the held-out loss is done, retrieval is not
        with pytest.raises(errors.Stopped, match=f"saved step {step} of 4"):
            train(measured_clip(), workdir)
    names = {name for line in lines(workdir) if line["step"] == step for name in line}
    for prefix in ("held_out", "retrieval"):
        there = [name for name in names if name.startswith(f"{prefix}/")]
        assert bool(there) == (prefix == "held_out"), "half an evaluation, or one lost for nothing"
    train(measured_clip(), workdir)
    assert_same_state(measured, workdir)
    values = lambda run: sorted(
        (line["step"], name, value)
        for line in lines(run)
        for name, value in line.items()
        if "/" in name or name == "loss"
    )
    assert values(workdir) == values(measured)
    # The run is over: nothing is measured twice, however often it is started.
    before = lines(workdir)
    train(measured_clip(), workdir)
    assert lines(workdir) == before


def test_a_shorter_run_measures_nothing_of_the_longer(measured, measured_clip):
    """The state is of step 4: under another number its figures would be wrong."""
    before, config = lines(measured), (pathlib.Path(measured) / "config.json").read_bytes()
    train(measured_clip(total_steps=3), measured)
    assert lines(measured) == before
    assert (pathlib.Path(measured) / "config.json").read_bytes() == config


def test_the_last_state_is_saved_before_it_is_measured(
    tiny_config, run_of, shards, tmp_path, monkeypatch, capsys
):
    """What fails in the last evaluation costs no step, and the same command does it again."""
    config = tiny_config("clip", {"input.held_out": (shards["held_out"],), "metric_examples": 0})

    def broken(self, state, step):
        raise errors.DataError("a held-out shard is gone")

    with monkeypatch.context() as patch:
        patch.setattr(HeldOutLoss, "run", broken)
        with pytest.raises(errors.DataError, match="held-out shard is gone"):
            train(config, str(tmp_path))
    assert checkpoint.steps(tmp_path / "checkpoints") == [2]
    assert_same_state(run_of("clip"), tmp_path)
    assert not series(tmp_path, "held_out/loss")
    train(config, str(tmp_path))
    assert "2 of 2 steps: measures held_out" in capsys.readouterr().err.splitlines()
    assert list(series(tmp_path, "held_out/loss")) == [2]
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2]
    assert_same_state(run_of("clip"), tmp_path)


@pytest.fixture
def over(run_of, tmp_path):
    """A copy of a CLIP's run, which is over after its two steps."""
    return shutil.copytree(run_of("clip"), tmp_path / "over")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optim.learning_rate": 0.5}, "nothing to do: 2 of 2 steps"),
        ({"optim.learning_rate": 0.5, "total_steps": 1}, "nothing to do: 2 of 1 steps"),
    ],
)
def test_a_start_with_nothing_to_do_says_so(over, tiny_config, capsys, change, said):
    before = (over / "config.json").read_bytes()
    train(tiny_config("clip", change), str(over))
    assert said in capsys.readouterr().err.splitlines()
    assert (over / "config.json").read_bytes() == before


def test_a_resume_says_what_jumps(over, tiny_config, capsys, monkeypatch):
    """A cosine that had come down to 0 at step 2 is at half of its peak in a run of four."""
    monkeypatch.setattr(Loop, "run", lambda self, step_fn, state, first: state)
    changes = {"total_steps": 4, "optim.schedule": "cosine", "optim.learning_rate": 1e-3}
    old = json.loads((over / "config.json").read_text())
    old["optim"] |= {"schedule": "cosine", "learning_rate": 1e-3}
    (over / "config.json").write_text(json.dumps(old))
    expected = [
        "resumed at step 2 of 4",
        "changed since the start before: total_steps 2 -> 4",
        "the learning rate jumps: 0 -> 0.0005, 50% of its peak",
    ]
    assert examine(tiny_config("clip", changes), str(over))["resume"] == expected
    train(tiny_config("clip", changes), str(over))
    said = capsys.readouterr().err
    assert "\n".join(expected) + "\n" in said
    assert json.loads((over / "config.json").read_text())["total_steps"] == 4


def test_an_unchanged_resume_says_that_alone(over, tiny_config):
    config = tiny_config("clip", {"total_steps": 4})
    write_config(config, over)
    assert resumed_lines(make_plan(config), over, 2) == ["resumed at step 2 of 4"]


def test_another_optimiser_is_refused_by_the_field_that_changed(over, tiny_config):
    before = (over / "config.json").read_bytes()
    change = {"optim.weight_decay": 0.0, "total_steps": 4, "log_steps": 0}
    with pytest.raises(errors.ConfigError, match="2 problems") as caught:
        train(tiny_config("clip", change), str(over))
    assert "--config.log_steps=0: expected a number of at least 1" in caught.value.table
    change.pop("log_steps")
    with pytest.raises(errors.ConfigError, match=r"optim\.weight_decay was 0\.2, now 0\.0"):
        train(tiny_config("clip", change), str(over))
    assert (over / "config.json").read_bytes() == before


@pytest.mark.slow
def test_another_clip_is_told_by_its_flag(run_of, tiny_config, monkeypatch):
    """Its widths are others: no list of tensors says that as well."""
    monkeypatch.setattr(checks, "trace", lambda *_: None)
    change = {"clip": "random", "total_steps": 4}
    folder = run_of("decoder")
    resumed = make_plan(tiny_config("decoder", change), workdir=folder).problems
    assert len(resumed) == 1 and f"clip was {run_of('clip')!r}, now 'random'" in resumed[0].message
    begun = make_plan(tiny_config("decoder", change | {"init_from": folder})).problems
    assert len(begun) == 1 and "of other widths than --config.clip=random" in begun[0].message
    change |= {"init_from": run_of("upsampler_0")}
    assert (
        "'upsampler', not 'decoder'"
        in make_plan(tiny_config("decoder", change)).problems[0].message
    )


def test_what_a_run_leaves(whole, decoder_config):
    config = decoder_config()
    assert runs.run_config(whole)["arch"] == as_json(config)["arch"]
    assert checkpoint.steps(pathlib.Path(whole) / "checkpoints") == [3, 4]
    assert sorted(series(whole, "held_out/loss")) == [2, 4]
    assert all(np.isfinite(v) for v in series(whole, "loss").values())
    rates = series(whole, "learning_rate")
    peak = config.optim.learning_rate
    assert [rates[step] for step in (1, 2, 3, 4)] == pytest.approx(
        [peak / 4, peak / 2, peak * 3 / 4, peak]
    )
    assert list((pathlib.Path(whole) / "tensorboard").iterdir())


def test_sample_grids_are_pictures(whole):
    """Four samples, drawn beside true, 8 pixels a side."""
    folder = pathlib.Path(whole) / "samples"
    assert sorted(p.name for p in folder.iterdir()) == [
        "0000004-samples_held_out.png",
        "0000004-samples_train.png",
    ]
    for path in folder.iterdir():
        with Image.open(path) as picture:
            assert picture.size[0] >= 8 * 8 and picture.size[1] >= 8
        assert images.read_recipe(path)["step"] == 4


def test_a_decoder_is_judged_by_its_own_clip(whole):
    """Once, at the end, on the eight held-out samples."""
    names = {name for line in lines(whole) for name in line if name.startswith("drawn/")}
    assert names == {
        "drawn/mse",
        "drawn/clip_cosine",
        "drawn/clip_cosine_true",
        "drawn/clip_cosine_pictures",
        "drawn/fd_clip_N8",
    }
    for name in names:
        assert list(series(whole, name)) == [4] and np.isfinite(series(whole, name)[4])
    # The same eight samples are drawn for the grid, four of them at least.
    assert series(whole, "drawn/mse")[4] == pytest.approx(
        series(whole, "samples_held_out/mse")[4], rel=0.5
    )


@pytest.mark.slow
def test_stored_embeddings_give_the_same_loss(whole, decoder_config, tmp_path):
    workdir = str(tmp_path / "stored")
    config = decoder_config(
        stored_embeddings=True, sample_examples=0, eval_examples=0, metric_examples=0
    )
    train(config, workdir)
    assert len(list(pathlib.Path(workdir).glob("embeddings/*/*.z_i.npy"))) == 2
    want, got = series(whole, "loss"), series(workdir, "loss")
    assert got.keys() == want.keys()
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-4)


def test_stored_embeddings_need_a_fixed_crop(decoder_config, tmp_path):
    config = decoder_config(**{"stored_embeddings": True, "input.crop": "random"})
    with pytest.raises(errors.ConfigError, match=r"input\.crop='center'"):
        train(config, str(tmp_path / "run"))


def test_a_run_of_bad_steps_ends_with_an_error(tiny_config, tmp_path, monkeypatch):
    """From the third batch on the loss is NaN: two steps are kept, the rest skipped and counted."""
    original = tasks.ClipTask.loss

    def poisoned(self, params, frozen, batch, key, *, train):
        loss, metrics = original(self, params, frozen, batch, key, train=train)
        loss = jnp.where(batch["sample"][0, 1] >= 16, jnp.nan, loss)
        return loss, metrics | {"loss": loss}

    monkeypatch.setattr(tasks.ClipTask, "loss", poisoned)
    config = tiny_config("clip", {"total_steps": 20, "save_steps": 2, "max_skipped_steps": 3})
    with pytest.raises(errors.NumericsError) as caught:
        train(config, str(tmp_path))
    assert caught.value.exit_code == 70
    assert "3 steps in a row up to step 5" in str(caught.value)
    latest = checkpoint.steps(tmp_path / "checkpoints")[-1]
    assert f"checkpoints/{latest}" in str(caught.value)
    assert series(tmp_path, "skipped") == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1}
    assert series(tmp_path, "loss")[3] is None
    assert latest == 2, "the state at step 2 is the one whose loss is NaN"
    assert "--config.skip_examples=24" in str(caught.value)


def test_no_checkpoint_yet_is_said(tiny_config, tmp_path):
    class Saver:
        wait = distrust = lambda self: None

    class Writer:
        scalars = lambda self, step, values: None

    config = tiny_config("clip", {"max_skipped_steps": 1})
    plan = make_plan(config, shapes_only=True)
    loop = Loop(plan, None, tmp_path, Saver(), Writer(), None, [], fingerprint="")
    loop.pending = (1, {"loss": float("nan"), "skipped": 1})
    with pytest.raises(errors.NumericsError, match="there is no checkpoint yet"):
        loop.log_pending()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arch.vision_width": 48}, r"\(vision_width was 16, now 48\)"),
        (
            {"arch.activation": "quick_gelu", "arch.context": 8},
            r"\(activation was gelu, now quick_gelu, context was 16, now 8\)",
        ),
    ],
)
def test_a_workdir_of_another_model_is_refused(run_of, tiny_config, change, said):
    workdir = pathlib.Path(run_of("clip"))
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(errors.ConfigError, match=said) as caught:
        train(tiny_config("clip", change), str(workdir))
    assert "choose another --workdir" in str(caught.value)
    assert (workdir / "config.json").read_bytes() == before


def test_a_run_may_change_what_leaves_its_parameters_alone(run_of, tiny_config):
    workdir = pathlib.Path(run_of("clip"))
    before = (workdir / "config.json").read_bytes()
    change = {"arch.remat": "nothing_saveable", "arch.dtype": "bfloat16"}
    write_config(tiny_config("clip", change), workdir)
    assert json.loads((workdir / "config.json").read_text())["arch"]["dtype"] == "bfloat16"
    (workdir / "config.json").write_bytes(before)


def test_a_workdir_of_another_stage_is_refused(run_of, tiny_config):
    with pytest.raises(errors.ConfigError, match=r"\(stage was clip, now upsampler\)"):
        write_config(tiny_config("upsampler"), pathlib.Path(run_of("clip")))


def test_a_workdir_that_never_saved_may_change_its_mind(tiny_config, tmp_path):
    write_config(tiny_config("clip", {"arch.vision_width": 48}), tmp_path)
    write_config(tiny_config("clip"), tmp_path)
    assert runs.run_config(tmp_path)["arch"]["vision_width"] == 16


def test_init_from_starts_with_those_parameters(run_of, tiny_config, tmp_path):
    config = tiny_config(
        "clip", {"init_from": run_of("clip"), "total_steps": 1, "optim.learning_rate": 0.0}
    )
    train(config, str(tmp_path))
    start, got = state_of(run_of("clip"))["ema"], state_of(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, start, got["params"])
    assert int(got["step"]) == 1


def test_init_from_another_model_names_the_fields(run_of, tiny_config, tmp_path):
    config = tiny_config("clip", {"init_from": run_of("clip"), "arch.embed_dim": 24})
    with pytest.raises(errors.ConfigError, match=r"expected --config\.arch\.embed_dim=16 "):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    plan = make_plan(config, shapes_only=True)
    with pytest.raises(errors.ConfigError, match=r"text/proj/kernel \(16, 16\), the model has"):
        initial_params(config, plan.params)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            {"batch_size": 12, "mesh.data": 8},
            errors.ConfigError,
            "batch_size 12 is not a multiple of 8",
        ),
        ({"accumulate": 2, "mesh.data": 8}, errors.ConfigError, "not a multiple of 16"),
        ({"sharding": "fsdb"}, errors.ConfigError, "'fsdb': did you mean 'fsdp'"),
        ({"mesh.data": 3}, errors.ConfigError, "mesh data=3"),
        ({"task.loss": "sofmax"}, errors.ConfigError, "did you mean 'softmax'"),
        ({"init_from": "/nowhere/run"}, errors.DataError, "/nowhere/run: no such folder"),
        ({"input.captions": ("jsn:name",)}, errors.ConfigError, "unknown caption source"),
        ({"optim.schedule": "cosin"}, errors.ConfigError, "did you mean 'cosine'"),
    ],
)
def test_bad_settings_are_one_line(tiny_config, tmp_path, change, error, said):
    with pytest.raises(error, match=said) as caught:
        train(tiny_config("clip", change), str(tmp_path / "run"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_decoder_without_clip_says_how_to_give_one(tiny_config, tmp_path):
    with pytest.raises(errors.ConfigError, match=r"needs a trained CLIP: --config.clip=RUN"):
        train(tiny_config("decoder"), str(tmp_path / "run"))
    with pytest.raises(errors.DataError, match="no such folder"):
        train(tiny_config("decoder", {"clip": str(tmp_path / "x")}), str(tmp_path / "run"))


@pytest.mark.slow
def test_a_run_of_another_stage_is_no_clip(run_of, tiny_config):
    config = tiny_config("decoder", {"clip": run_of("upsampler_0")})
    with pytest.raises(errors.ConfigError, match="'upsampler', not 'clip'"):
        frozen_part(config, "clip")


def test_a_damaged_run_is_one_line(tmp_path, run_of):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(errors.DataError, match="no training run there"):
        runs.open_part(tmp_path, "clip")
    config = pathlib.Path(run_of("clip")) / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    with pytest.raises(errors.DataError, match="no complete checkpoint"):
        runs.open_part(tmp_path, "clip")
    (tmp_path / runs.STATISTICS).write_bytes(b"damaged")
    with pytest.raises(errors.DataError, match=r"statistics\.safetensors"):
        runs.read_prior_statistics(tmp_path / runs.STATISTICS)


def test_a_workdir_below_a_file_is_one_line(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.DataError, match=r"Not a directory|File exists") as caught:
        train(tiny_config("clip"), str(tmp_path / "file" / "run"))
    assert "\n" not in str(caught.value)


# ============================================================ as a process

CONFIG = """
import json, pathlib
from configs import clip

def get_config(arg=None):
    config = clip.get_config("emoji,runlocal")
    changes = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())
    config.update_from_flattened_dict({k: tuple(v) if isinstance(v, list) else v
                                       for k, v in changes.items()})
    return config
"""


def start(folder, workdir, changes, prefix=""):
    (folder / "tiny.py").write_text(CONFIG)
    (folder / "tiny.json").write_text(json.dumps(changes))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
    }
    program = prefix + (
        "import sys; from absl import app; import unclip.verbs.train as t; from unclip import cli;"
        "cli.run_app(t.main)"
    )
    arguments = ["--config", str(folder / "tiny.py"), "--workdir", str(workdir)]
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def flat(tiny_config):
    """flat(changes): a micro CLIP's settings as {dotted field: value}."""

    def make(changes):
        config = tiny_config("clip")
        names = [f"arch.{n}" for n in config.arch] + [
            "input.shards",
            "input.held_out",
            "input.threads",
            "sample_examples",
            "eval_steps",
        ]
        out = {}
        for name in names:
            value = config
            for part in name.split("."):
                value = value[part]
            out[name] = value
        return {k: v for k, v in out.items() if v is not None} | changes

    return make


def test_sigterm_saves_and_exits_with_75(flat, tmp_path):
    workdir = tmp_path / "run"
    process = start(
        tmp_path, workdir, flat({"total_steps": 100_000, "save_steps": 100_000, "batch_size": 2})
    )
    try:
        deadline = time.monotonic() + 120
        log = workdir / "metrics.jsonl"
        while not (log.exists() and '"loss"' in log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert "of 100000; the same command resumes" in said and "Traceback" not in said
    step = checkpoint.steps(workdir / "checkpoints")[-1]
    assert int(state_of(workdir)["step"]) == step >= 1
    assert max(line["step"] for line in lines(workdir)) == step


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(flat, run_of, tmp_path):
    """No file may grow beyond a limit: the checkpoint fails, the earlier ones stay whole."""
    workdir = tmp_path / "run"
    shutil.copytree(run_of("clip"), workdir)
    before = state_of(workdir)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000));"
    process = start(
        tmp_path,
        workdir,
        flat({"total_steps": 4, "batch_size": 2, "save_steps": 3, "tensorboard": False}),
        limit,
    )
    _, said = process.communicate(timeout=120)
    assert process.returncode == 74, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert "cannot write checkpoint" in last and "latest complete step: 2" in last
    assert checkpoint.steps(workdir / "checkpoints") == [2]
    jax.tree.map(np.testing.assert_array_equal, before, state_of(workdir))


def explode(monkeypatch, step):
    """The learning rate of one step throws the parameters far off, finite; later losses are not."""
    usual = optim.make_learning_rate

    def make(*args, **kwargs):
        rate = usual(*args, **kwargs)
        return lambda applied: jnp.where(applied == step, 1e25, rate(applied))

    monkeypatch.setattr(optim, "make_learning_rate", make)


@pytest.mark.slow
def test_an_explosion_leaves_a_good_state_that_goes_on(tiny_config, tmp_path, monkeypatch):
    """With one checkpoint kept, the lost one, which was saved, does not push out the good one."""
    changes = {"total_steps": 12, "max_skipped_steps": 3, "save_steps": 1, "keep": 1}
    whole, blown = tmp_path / "whole", tmp_path / "blown"
    train(tiny_config("clip", changes), str(whole))
    with monkeypatch.context() as context:
        explode(context, 6)
        with pytest.raises(errors.NumericsError, match=r"the last good state is .*/6, from which"):
            train(tiny_config("clip", changes), str(blown))
    assert checkpoint.steps(blown / "checkpoints") == [6]
    assert len(list((blown / "checkpoints").glob("set-aside-7-*"))) == 1
    train(tiny_config("clip", changes), str(blown))
    assert_same_state(whole, blown)


@pytest.mark.slow
def test_samples_that_are_left_out_are_left_out_once(tiny_config, tmp_path):
    """The input jumps at the start that says so, and not again at the next."""
    changes = {"save_steps": 1, "total_steps": 2, "keep": 9}
    train(tiny_config("clip", changes), str(tmp_path))
    for total in (3, 4):
        train(
            tiny_config("clip", changes | {"total_steps": total, "skip_examples": 16}),
            str(tmp_path),
        )
    position = lambda step: checkpoint.stored(tmp_path / "checkpoints", step)[2]["position"]
    batch = position(2) // 2
    assert [position(step) for step in (2, 3, 4)] == [2 * batch, 3 * batch + 16, 4 * batch + 16]


def test_spikes_and_the_best_step_are_kept(tiny_config, tmp_path):
    """Over a saver that only notes what it is asked."""

    class Saver:
        def __init__(self):
            self.directory, self.calls = tmp_path, []

        def __getattr__(self, name):
            if name == "due":
                return lambda step: False
            return lambda *args, **more: self.calls.append((name, *args)) or 17

    class Batches:
        position = 0

    config = tiny_config("clip", {"spike_factor": 10.0, "keep_best": "lowest held_out/loss"})
    plan, saver = make_plan(config, shapes_only=True), Saver()
    loop = Loop(plan, None, tmp_path, saver, None, Batches(), [], fingerprint="")
    for step in range(1, 60):
        loop.judge(step, {"loss": 2.0 + step % 2, "grad_norm": 1.0, "skipped": 0})
    assert saver.calls == [("trust", step - 1) for step in range(1, 60)]
    saver.calls.clear()
    for step, loss in enumerate((900.0, 900.0, 2.0), 60):
        loop.judge(step, {"loss": loss, "grad_norm": 1.0, "skipped": 0})
    assert saver.calls == [("name_trusted", "before_spike"), ("trust", 61)]
    saver.calls.clear()
    for step, value in ((10, 3.0), (20, 2.0), (30, float("nan")), (40, 2.5)):
        loop.compare(step, {"held_out/loss": value, "other": 0.0})
        loop.save({}, step)
    named = [call[2] for call in saver.calls if call[0] == "name"]
    assert named == [10, 20]


def test_a_workdir_that_vanishes_ends_the_run(tiny_config, tmp_path, monkeypatch):
    """With the code of input and output, at the next save, and without a new folder."""
    folder = tmp_path / "run"

    def vanish(step=None):
        if step == 2:
            shutil.rmtree(folder)
        return False

    monkeypatch.setattr(distributed, "should_stop", vanish)
    with pytest.raises(errors.DataError, match="checkpoints is gone: it was moved or removed"):
        train(tiny_config("clip", {"total_steps": 6, "save_steps": 4}), str(folder))
    assert not folder.exists()
