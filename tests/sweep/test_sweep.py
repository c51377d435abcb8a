"""Sweeps: which cells there are, files that survive a kill, several jobs, following, results."""

import copy
import csv
import importlib
import itertools
import json
import os
import pathlib
import sys

import numpy as np
import pytest

from unclip import errors, protocols
from unclip.cascade import bundle, pipeline
from unclip.files import images, lock
from unclip.measure.table import Result
from unclip.protocols.base import EvaluationProtocol
from unclip.runtime import distributed
from unclip.sweep import drawing, findings, follow, plan, report, scoring, store

ROOT = pathlib.Path(__file__).parents[2]
DRAW = {"steps": 25, "guidance": 3.0, "sampler": "ddpm", "eta": 0.0}
PRIOR = {"steps": 20, "guidance": 1.5, "sampler": "ddpm", "eta": 0.0, "candidates": 2}
MEASURED = {"protocol": {"id": "p"}, "metrics": ["m"]}


@pytest.fixture(scope="module")
def get_config():
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("configs.evaluate").get_config
    sys.path.remove(str(ROOT))


def part(name, value=0.0, **settings):
    return bundle.Part(name, {"class": "X"}, {"w": np.float32([value])}, {}, settings)


@pytest.fixture
def model_dir(tmp_path):
    """A bundle whose networks are one number each: planning reads no tensors."""
    parts = {
        "clip": part("clip"),
        "prior": part("prior", kind="diffusion", draw=PRIOR),
        "decoder": part("decoder", image_size=8, draw=DRAW),
        "upsampler_0": part("upsampler_0", image_size=16, factor=2),
    }
    bundle.write(tmp_path / "bundle", parts)
    return str(tmp_path / "bundle")


def write_run(folder, stage, steps, total=100, **task):
    """What planning looks at in the workdir of a training."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"stage": stage, "arch": {}, "task": task, "total_steps": total}
    (folder / "config.json").write_text(json.dumps(config))
    for step in steps:
        state = folder / "checkpoints" / str(step) / "state"
        state.mkdir(parents=True, exist_ok=True)
        (state.parent / "_CHECKPOINT_METADATA").write_text(f"{stage} {step}")
        for path in (
            state.parent / "commit_success.txt",
            state / "_METADATA",
            state / "manifest.ocdbt",
        ):
            path.write_text("")
    return str(folder)


@pytest.fixture
def plain(get_config, model_dir):
    """plain({"dotted.field": value}, arg) -> a config of `model_dir` as dicts."""

    def make(changes=(), arg="emoji"):
        config = get_config(arg)
        config.model = model_dir
        config.update_from_flattened_dict(dict(changes))
        return config.to_dict()

    return make


# ============================================================ cells


def test_cells_are_the_product_of_the_axes(plain):
    config = plain({"sweep.guidance": (1.0, 2.0), "sweep.steps": (5, 10, 20), "sweep.seed": (0, 1)})
    cells = plan.cells(config, MEASURED)
    points = [(c.settings["steps"], c.settings["guidance"], c.settings["seed"]) for c in cells]
    assert points == list(itertools.product((5, 10, 20), (1.0, 2.0), (0, 1)))
    assert len({c.id for c in cells}) == 12
    own = cells[0].settings
    assert (own["sampler"], own["prior_guidance"], own["prior_steps"]) == ("ddpm", 1.5, 20)
    assert own["embed"] == "prior" and own["weights"] == "ema" and own["temperature"] is None
    assert cells[0].id.startswith("model-z=prior-ddpm-ps20-pg1.5-c2-s5-g1-seed0-")
    assert set(cells[0].parts) == {"clip", "prior", "decoder", "upsampler_0"}


def test_the_models_own_setting_is_the_same_cell(plain):
    implied = plan.cells(plain({"sweep.guidance": ()}), MEASURED)
    named = plan.cells(plain({"sweep.guidance": (3.0,), "sweep.sampler": ("ddpm",)}), MEASURED)
    assert [c.id for c in implied] == [c.id for c in named]
    whole = plan.cells(plain({"sweep.guidance": (3,)}), MEASURED)
    assert whole[0].id == named[0].id


def test_axes_that_do_not_apply_draw_nothing_twice(plain):
    config = plain(
        {
            "sweep.embed": ("prior", "text", "none"),
            "sweep.guidance": (1.0,),
            "sweep.prior_guidance": (1.0, 4.0),
            "sweep.sampler": ("ddpm", "ddim"),
            "sweep.eta": (0.5, 1.0),
        }
    )
    found = [
        (
            c.settings["embed"],
            c.settings["prior_guidance"],
            c.settings["sampler"],
            c.settings["eta"],
        )
        for c in plan.cells(config, MEASURED)
    ]
    draws = [("ddpm", 0.0), ("ddim", 0.5), ("ddim", 1.0)]
    assert sorted(found, key=str) == sorted(
        [("prior", g, *d) for g in (1.0, 4.0) for d in draws]
        + [(e, None, *d) for e in ("text", "none") for d in draws],
        key=str,
    )


def test_every_setting_makes_another_id(plain, model_dir):
    base = {"sweep.guidance": (1.0,)}
    first = plan.cells(plain(base), MEASURED)[0].id
    for change in (
        {"sweep.guidance": (1.5,)},
        {"sweep.seed": (3,)},
        {"sweep.prior_steps": (7,)},
        {"sweep.embed": ("text",)},
    ):
        assert plan.cells(plain(base | change), MEASURED)[0].id != first
    assert plan.cells(plain(base), MEASURED | {"samples": 2})[0].id != first
    opened = bundle.read(model_dir)
    opened.parts["decoder"].params["w"] += 1  # other weights under the same name
    bundle.write(model_dir, opened.parts)
    assert plan.cells(plain(base), MEASURED)[0].id != first


def test_extra_cells_stand_beside_the_product(plain):
    cells = plan.cells(
        plain(
            {
                "sweep.guidance": (1.0, 2.0),
                "cells": ({"guidance": 9.0, "steps": 3}, {"guidance": 2.0}),
            }
        ),
        MEASURED,
    )
    assert [(c.settings["guidance"], c.settings["steps"]) for c in cells] == [
        (1.0, 25),
        (2.0, 25),
        (9.0, 3),
    ]
    assert [c.settings["guidance"] for c in plan.share(cells, 1, 2)] == [2.0]
    shares = [cell.id for k in range(2) for cell in plan.share(cells, k, 2)]
    assert sorted(shares) == sorted(c.id for c in cells)


def test_models_of_runs(plain, tmp_path):
    """Each model takes the parts of its own, by run; the step and the weights are in the id."""
    ar = write_run(tmp_path / "ar", "prior", [5, 40], kind="ar", draw={"guidance": 1.0})
    own = write_run(tmp_path / "own", "decoder", [10, 20], embedding="text", draw=DRAW)
    config = plain(
        {
            "sweep.guidance": (1.0,),
            "models.ar.prior": ar,
            "models.z_t_own.decoder": own,
            "sweep.model": ("caption", "z_t", "z_t_own", "ar", "diffusion"),
        },
        "ablation",
    )
    cells = {c.model: c for c in plan.cells(config, MEASURED)}
    assert {name: c.settings["embed"] for name, c in cells.items()} == {
        "caption": "none",
        "z_t": "text",
        "z_t_own": "text",
        "ar": "prior",
        "diffusion": "prior",
    }
    assert cells["ar"].parts["prior"] == (ar, 40) and cells["ar"].settings["prior_steps"] is None
    assert cells["z_t_own"].parts["decoder"] == (own, 20)
    assert cells["z_t_own"].settings["step"] == 20 and cells["ar"].settings["step"] is None
    assert len({c.model_hash for c in cells.values()}) == 3
    config["sweep"] |= {"step": (10, 20), "weights": ("ema", "params"), "model": ("z_t_own",)}
    found = plan.cells(config, MEASURED)
    assert [(c.settings["step"], c.settings["weights"]) for c in found] == [
        (10, "ema"),
        (10, "params"),
        (20, "ema"),
        (20, "params"),
    ]
    assert len({c.model_hash for c in found}) == 4
    os.rename(own, tmp_path / "moved")  # named by its weights, a moved run is the same cell
    config["models"]["z_t_own"]["decoder"] = str(tmp_path / "moved")
    assert [c.id for c in plan.cells(config, MEASURED)] == [c.id for c in found]


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        (
            {"sweep.sampler": ("dimm",)},
            errors.ConfigError,
            "sweep.sampler 'dimm': did you mean 'ddim'",
        ),
        ({"sweep.embed": ("prio",)}, errors.ConfigError, "did you mean 'prior'"),
        (
            {"sweep.guidance": ("high",)},
            errors.ConfigError,
            "sweep.guidance: 'high', expected a number",
        ),
        ({"sweep.steps": (2.5,)}, errors.ConfigError, "sweep.steps: 2.5, expected a whole number"),
        ({"sweep.steps": (0,)}, errors.ConfigError, "sweep.steps: 0, expected at least 1"),
        ({"sweep.seed": (5000,)}, errors.ConfigError, "less than 4096"),
        ({"sweep.model": ("modle",)}, errors.ConfigError, "model 'modle': did you mean 'model'"),
        ({"sweep.weights": ("params",)}, errors.ConfigError, "a BUNDLE holds one set of weights"),
        ({"sweep.step": (10,)}, errors.ConfigError, "is a BUNDLE and has no steps"),
        ({"cells": ({"guidence": 1.0},)}, errors.ConfigError, "did you mean 'guidance'"),
        ({"cells": ({"model": "other"},)}, errors.ConfigError, "unknown model of cells 'other'"),
        ({"model": "nowhere"}, errors.DataError, "model nowhere: no such folder"),
        ({"model": ""}, errors.ConfigError, "has no decoder: --config.model=BUNDLE"),
        ({"prior": "nowhere"}, errors.DataError, "prior nowhere: no such folder"),
    ],
)
def test_slips_are_named(plain, changes, kind, said):
    with pytest.raises(kind, match=said):
        plan.cells(plain(changes), MEASURED)


def test_more_slips(plain, get_config):
    config = plain()
    config["sweep"]["guidence"] = (1.0,)
    with pytest.raises(errors.ConfigError, match="axis of sweep 'guidence': did you mean 'guida"):
        plan.cells(config, MEASURED)
    config = plain(arg="ablation")
    with pytest.raises(errors.ConfigError, match=r"--config\.models\.ar\.prior=RUN, or leave"):
        plan.cells(config, MEASURED)
    with pytest.raises(errors.ConfigError, match="preset 'emojy': did you mean 'emoji'"):
        get_config("emojy")
    assert plain(arg="emoji,models=a+b")["models"].keys() == {"a", "b"}
    assert plain(arg="emoji,protocol=reconstruction")["metrics"] == ()
    with pytest.raises(errors.ConfigError, match="protocol 'scnes': did you mean 'scenes'"):
        get_config("emoji,protocol=scnes")
    with pytest.raises(errors.ConfigError, match="array job 3 of 3"):
        plan.share([], 3, 3)


@pytest.mark.parametrize(
    ("env", "flags", "job"),
    [
        ({}, (None, None), (0, 1)),
        ({}, (2, 3), (2, 3)),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}, (None, None), (3, 8)),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}, (0, 2), (0, 2)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "9",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "4",
            },
            (None, None),
            (2, 4),
        ),  # --array=1-13:4
    ],
)
def test_jobs_of_an_array(env, flags, job):
    assert plan.array_job(env, *flags) == job


@pytest.mark.parametrize(
    ("env", "flags", "said"),
    [
        ({}, (1, None), "given together"),
        ({}, (2, 2), "array job 2 of 2"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, (None, None), "array variables cannot be read"),
    ],
)
def test_jobs_that_are_none(env, flags, said):
    with pytest.raises(errors.ConfigError, match=said):
        plan.array_job(env, *flags)


# ============================================================ running, with a model of paint


class Paint:
    """Draws a picture that is a function of caption, seed and guidance alone."""

    def __init__(self):
        self.calls, self.after = 0, None

    def generate(self, prompts, seed, *, decoder, **options):
        self.calls += 1
        if self.after and self.calls > self.after[0]:
            self.after[1]()
        images = [
            np.random.default_rng([s, len(p), int(10 * decoder["guidance"])]).integers(
                0, 256, (8, 8, 3), dtype=np.uint8
            )
            for p, s in zip(prompts, seed)
        ]
        recipes = [{"mode": "text", "prompt": p, "seed": s} for p, s in zip(prompts, seed)]
        return pipeline.Pictures(np.stack(images), recipes, {})


class Judged(EvaluationProtocol):
    """Five captions; the judge looks at the first pixel."""

    def __init__(self, count=5):
        prompts = [f"caption {'x' * i}" for i in range(count)]
        super().__init__(f"five{count}", prompts, [f"k{i}" for i in range(count)], 8, {})

    def judge(self, pictures, model=None, rows=None):
        bright = pictures[:, 0, 0, 0] / 255
        return {"bright": float(bright.mean())}, [{"bright": round(float(b), 3)} for b in bright]


@pytest.fixture
def paint(monkeypatch, plain):
    """(paint, runner(changes, workdir)): a runner that draws with paint and measures with a
    substitute."""
    model = Paint()
    monkeypatch.setattr(protocols, "make", lambda name, **settings: Judged(**settings))
    monkeypatch.setattr(drawing.Runner, "model", lambda self, cell: model)

    def measured(self, fake, captions):
        pictures = np.stack([fake.read(i) for i in range(len(fake))])
        value = float(pictures.mean())
        values = [
            {
                "metric": "fd-clip",
                "key": f"fd-clip/x/{self.protocol.id}/N={len(fake)}",
                "value": value,
            },
            {"metric": "clip_cosine", "key": "clip_cosine/x", "value": -value},
        ]
        scores = [float(p.mean()) for p in pictures]
        return Result(values, ["few"], {}), {"clip_cosine": scores}

    monkeypatch.setattr(scoring.Scorer, "_measure", measured)
    monkeypatch.setattr(scoring.Scorer, "_metric_weights", lambda self: {})

    def config(changes=()):
        return plain(
            {
                "protocol": {"name": "five", "count": 5},
                "sweep.guidance": (1.0, 2.0),
                "metrics": ("clip_cosine",),
                "batch_size": 4,
                "show": 2,
                **dict(changes),
            }
        )

    return model, lambda workdir, changes=(): drawing.Runner(config(changes), workdir), config


def files_of(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(pathlib.Path(folder).rglob("*"))
        if p.is_file()
    }


def values_of(workdir):
    records, damaged = store.read_cells(workdir)
    assert not damaged
    return {r["id"]: (r["values"], r["scores"], r["facts"], r["kept"]) for r in records}


def test_a_cell_says_everything(paint, tmp_path):
    _, runner, _ = paint
    job = runner(tmp_path, {"samples": 2, "sweep.seed": (3,), "keep_pictures": "all"})
    cells = job.cells()
    assert job.run(cells) == 2
    record = store.read_cell(store.cell_path(tmp_path, cells[0].id))
    assert record["settings"] == cells[0].settings and record["pictures"] == 10
    assert record["model"]["hash"] == cells[0].model_hash and record["recipe"]["prompt"]
    assert set(record["seconds"]) == {"load", "draw", "score"} and record["versions"]["jax"]
    folder = store.cell_folder(tmp_path, cells[0].id)
    names = sorted(path.name for path in (folder / "pictures").iterdir())
    assert names == [f"{i:07d}-{k}.png" for i in range(5) for k in range(2)]
    seeds = [images.read_recipe(folder / "pictures" / name)["seed"] for name in names]
    assert seeds == [3 * 2**20 + 5 * k + i for i in range(5) for k in range(2)]  # none twice
    # The judge sees every picture once, sample by sample; its facts stand in picture order.
    pixels = [images.read_image(folder / "pictures" / n)[0, 0, 0] / 255 for n in names]
    bright = next(v for v in record["values"] if v["metric"] == "bright")
    assert bright["value"] == pytest.approx(np.mean(pixels))
    assert bright["key"] == "bright/five5/N=10"
    assert [f["bright"] for f in record["facts"]] == [round(float(p), 3) for p in pixels]
    scores = record["scores"]["clip_cosine"]
    assert [row["score"] for row in record["kept"]["best"]] == sorted(scores)[::-1][:4]
    assert record["kept"]["worst"][0]["number"] == int(np.argmin(scores))
    assert not (folder / "lock.json").exists()


@pytest.mark.parametrize("keep", ["grid", "none"])
def test_pictures_that_are_not_kept_go(paint, tmp_path, keep):
    _, runner, _ = paint
    job = runner(tmp_path, {"keep_pictures": keep})
    job.run(job.cells())
    for record in store.read_cells(tmp_path)[0]:
        folder = store.cell_folder(tmp_path, record["id"])
        if keep == "none":
            assert not folder.exists() and record["kept"] == {}
            continue
        wanted = {row["file"] for rows in record["kept"].values() for row in rows}
        assert set(files_of(folder)) == wanted | {"grid.png"}
        assert images.read_image(folder / "grid.png").shape == (12, 22, 3)
    with pytest.raises(errors.ConfigError, match="keep_pictures 'gird': did you mean 'grid'"):
        runner(tmp_path, {"keep_pictures": "gird"})


def test_benchmarks_get_their_layout(paint, tmp_path, monkeypatch):
    _, runner, _ = paint

    class Benchmark(Judged):
        def export(self, out, pictures):
            for key, picture in zip(self.keys, pictures, strict=True):
                images.write_png(out / f"{key}.png", picture)

    monkeypatch.setattr(protocols, "make", lambda name, **settings: Benchmark(**settings))
    job = runner(tmp_path, {"keep_pictures": "none", "sweep.guidance": (1.0,)})
    (cell,) = job.cells()
    job.run([cell])
    folder = store.cell_folder(tmp_path, cell.id)
    assert set(files_of(folder)) == {f"export/k{i}.png" for i in range(5)}
    with pytest.raises(errors.ConfigError, match="samples 2: protocol five5 itself decides"):
        runner(tmp_path, {"samples": 2})


def test_finished_cells_are_skipped_and_new_settings_drawn(paint, tmp_path):
    model, runner, _ = paint
    runner(tmp_path).run(runner(tmp_path).cells())
    calls, before = model.calls, files_of(tmp_path)
    assert runner(tmp_path).run(runner(tmp_path).cells()) == 0
    assert model.calls == calls and files_of(tmp_path) == before
    more = runner(tmp_path, {"sweep.guidance": (1.0, 2.0, 4.0)})
    assert [more.status(cell) for cell in more.cells()] == ["finished", "finished", "to do"]
    assert more.run(more.cells()) == 1
    assert before.items() <= files_of(tmp_path).items()


@pytest.mark.parametrize("blow", ["kill", "stop"])
def test_a_cell_cut_short_is_drawn_again_whole(paint, tmp_path, blow):
    """As if nothing had happened: the same numbers, and nothing of the first try is left."""
    model, runner, _ = paint
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    runner(whole).run(runner(whole).cells())
    model.calls = 0

    def kill():
        raise KeyboardInterrupt

    model.after = (3, kill) if blow == "kill" else (2, distributed.request_stop)
    job = runner(cut)
    try:
        with pytest.raises(KeyboardInterrupt if blow == "kill" else errors.Stopped) as raised:
            job.run(job.cells())
    finally:
        distributed.reset_stop()
    if blow == "stop":
        assert raised.value.exit_code == 75 and "cell 2 of 2" in raised.value.message
    begun = store.cell_folder(cut, job.cells()[1].id)
    assert list((begun / "pictures").iterdir()) and len(store.read_cells(cut)[0]) == 1
    (begun / "pictures" / "0000009-0.png").write_bytes(b"half a picture")
    model.after = None
    assert runner(cut).run(runner(cut).cells()) == 1
    assert values_of(cut) == values_of(whole)
    assert files_of(cut).keys() == files_of(whole).keys()


@pytest.mark.parametrize("text", ["{", "{}", '{"format": 1, "id": "x", "settings": {}}', "[1, 2]"])
def test_a_damaged_cell_is_told_and_drawn_again(paint, tmp_path, text, capsys):
    _, runner, _ = paint
    runner(tmp_path).run(runner(tmp_path).cells())
    cell = runner(tmp_path).cells()[0]
    path = store.cell_path(tmp_path, cell.id)
    path.write_text(text)
    with pytest.raises(errors.DataError, match="is damaged"):
        store.read_cell(path)
    assert len(store.read_cells(tmp_path)[1]) == 1
    report.write(tmp_path, {})  # the others are reported, this one is named
    assert path.stem in (tmp_path / "report.html").read_text()
    assert runner(tmp_path).run(runner(tmp_path).cells()) == 1
    assert "drawn again" in capsys.readouterr().err
    assert len(values_of(tmp_path)) == 2


def test_two_jobs_never_draw_the_same_cell(paint, tmp_path, capsys):
    model, runner, _ = paint
    job = runner(tmp_path)
    cells = job.cells()
    folder = store.cell_folder(tmp_path, cells[0].id)
    folder.mkdir(parents=True)
    held = lock.DirectoryLock(folder)  # another job, alive
    try:
        (folder / "pictures").mkdir()
        (folder / "pictures" / "theirs.png").write_bytes(b"theirs")
        assert job.run(cells) == 1
        assert (folder / "pictures" / "theirs.png").exists()
        assert "left to another job" in capsys.readouterr().err
    finally:
        held.release()
    assert model.calls == 2 and job.run(cells) == 1  # theirs died: wiped and drawn
    assert not (folder / "pictures" / "theirs.png").exists()


def test_array_jobs_share_the_cells(paint, tmp_path):
    _, runner, _ = paint
    changes = {"sweep.guidance": (1.0, 2.0, 3.0), "sweep.seed": (0, 1)}
    for index in range(4):
        job = runner(tmp_path / "array", changes)
        assert job.run(plan.share(job.cells(), index, 4)) == (2, 2, 1, 1)[index]
    job = runner(tmp_path / "alone", changes)
    job.run(job.cells())
    assert values_of(tmp_path / "array") == values_of(tmp_path / "alone")


def test_a_protocol_without_captions(paint, tmp_path, monkeypatch):
    _, runner, _ = paint
    with monkeypatch.context() as patch:
        patch.setattr(protocols, "make", lambda name, **settings: Judged(0))
        with pytest.raises(errors.ConfigError, match="'five0' has no captions"):
            runner(tmp_path)
    with pytest.raises(errors.ConfigError, match="samples 0: expected at least 1"):
        runner(tmp_path, {"samples": 0})
    with pytest.raises(errors.ConfigError, match="unknown metric 'fdi': did you mean 'fid'"):
        runner(tmp_path, {"metrics": ("fdi",)})
    with pytest.raises(errors.ConfigError, match="kid compares with real pictures; protocol five5"):
        runner(tmp_path, {"metrics": ("clip_cosine", "kid")})
    assert not list(tmp_path.glob("cells*"))


# ============================================================ following a training


def test_every_checkpoint_is_scored_once(paint, tmp_path):
    """New ones as they appear, to the run's end; a second follower finds all done."""
    model, _, config = paint
    run = write_run(tmp_path / "run", "decoder", [10], total=30, draw=DRAW)
    counts = []

    def finish():
        counts.append(len(store.read_cells(tmp_path / "eval")[0]))
        if len(counts) < 3:
            write_run(tmp_path / "run", "decoder", [10 * len(counts) + 10], total=30, draw=DRAW)

    steps = follow.follow(
        config({"decoder": run}), str(tmp_path / "eval"), run, 60.0, finish, poll_s=0.01
    )
    assert steps == [10, 20, 30] and counts == [2, 4, 6]
    records, _ = store.read_cells(tmp_path / "eval")
    assert sorted({r["settings"]["step"] for r in records}) == [10, 20, 30]
    calls = model.calls
    follow.follow(config({"decoder": run}), str(tmp_path / "eval"), run, 60.0, finish, 0.01)
    assert model.calls == calls
    found = findings.lines(records, "", "clip_cosine/x", "step")
    assert [[at for at, _, _ in points] for points in found.values()] == [[10, 20, 30]] * 2


def test_a_checkpoint_deleted_meanwhile_is_left_out(paint, tmp_path, monkeypatch, capsys):
    _, _, config = paint
    run = write_run(tmp_path / "run", "decoder", [10, 20], total=20, draw=DRAW)
    real = drawing.Runner.run

    def deleting(self, cells):
        if cells[0].settings["step"] == 10:
            os.remove(tmp_path / "run" / "checkpoints" / "10" / "commit_success.txt")
            raise errors.DataError("no complete checkpoint of step 10")
        return real(self, cells)

    monkeypatch.setattr(drawing.Runner, "run", deleting)
    done = follow.follow(config({"decoder": run}), str(tmp_path / "e"), run, 9.0, lambda: 0)
    assert done == [20]
    assert "step 10" in capsys.readouterr().err


def test_following_ends_after_silence(paint, tmp_path, capsys):
    _, _, config = paint
    run = write_run(tmp_path / "run", "decoder", [10], total=30, draw=DRAW)
    done = follow.follow(
        config({"decoder": run}), str(tmp_path / "e"), run, 0.05, lambda: None, poll_s=0.01
    )
    assert done == [10] and "the latest is step 10" in capsys.readouterr().err
    with pytest.raises(errors.ConfigError, match=r"no model of the sweep .* --config.decoder="):
        follow.follow(config(), str(tmp_path / "e"), run, 0.05, lambda: None, poll_s=0.01)


# ============================================================ results


def record(model, guidance, seed, fd, cosine, **settings):
    own = {"model": model, "guidance": guidance, "seed": seed, **settings}
    values = [
        {"metric": "fd-clip", "key": "fd-clip/x/N=5", "value": fd},
        {"metric": "clip_cosine", "key": "clip_cosine/x/N=5", "value": cosine},
    ]
    return {"id": f"{model}-{guidance}-{seed}", "settings": own, "values": values}


RECORDS = [
    record("a", 1.0, 0, 4.0, 0.1),
    record("a", 1.0, 1, 6.0, 0.3),
    record("a", 2.0, 0, 3.0, 0.5),
    record("b", 1.0, 0, 9.0, 0.2),
    record("b", 2.0, 0, 2.5, 0.4),
]


def test_lines_average_seeds_and_split_by_the_rest():
    found = findings.lines(RECORDS, "clip_cosine/x/N=5", "fd-clip/x/N=5", "guidance")
    assert found["a"] == [(1.0, 0.2, 5.0), (2.0, 0.5, 3.0)]
    assert found["b"] == [(1.0, 0.2, 9.0), (2.0, 0.4, 2.5)] and len(found) == 2
    assert findings.varied(RECORDS) == ["model", "guidance", "seed"]


def test_claims_compare_the_best_cells():
    claims = [
        ("one", "fd-clip", "a", "<", "b"),
        ("two", "clip_cosine", "a", ">", "b"),
        ("three", "fd-clip", "a", "<", "c"),
        ("four", "fid", "a", "<", "b"),
    ]
    rows = findings.judged(RECORDS, claims)
    assert [row["here"] for row in rows] == [
        "does not agree",
        "agrees",
        "not measured",
        "not measured",
    ]
    assert (rows[0]["value"], rows[0]["other value"]) == (3.0, 2.5)
    assert (rows[1]["value"], rows[1]["other value"]) == (0.5, 0.4)
    costs = [("five", "rise:fd-clip", "a", "<", "b"), ("six", "rise:clip_cosine", "a", "<", "z")]
    rising = [*RECORDS, record("a", 3.0, 0, 3.5, 0.6), record("b", 3.0, 0, 8.5, 0.1)]
    cost, none = findings.judged(rising, costs)
    assert (cost["value"], cost["other value"], cost["here"]) == (0.5, 6.0, "agrees")
    assert (none["value"], none["other value"], none["here"]) == (0.0, None, "not measured")
    found = findings.findings(RECORDS, claims)
    assert found["claims"] == rows
    assert [(row["model"], row["guidance"], row["fd-clip/x/N=5"]) for row in found["models"]] == [
        ("a", 2.0, 3.0),
        ("b", 2.0, 2.5),
    ]
    lucky = [
        record("c", 1.0, 0, 1.0, 0.0),
        record("c", 1.0, 1, 9.0, 0.0),
        record("c", 2.0, 0, 4.0, 0.0),
    ]
    (chosen,) = findings.best(lucky, "fd-clip/x/N=5")  # not the luckiest seed
    assert chosen["settings"]["guidance"] == 2.0


def test_results_hold_every_cell(paint, tmp_path):
    _, runner, config = paint
    changes = {
        "sweep.guidance": (1.0, 2.0, 3.0),
        "sweep.embed": ("prior", "text"),
        "claims": (("<b>hostile</b>", "fd-clip", "model", "<", "absent"),),
    }
    job = runner(tmp_path, changes)
    job.run(job.cells())
    path = report.write(tmp_path, config(changes))
    records, _ = store.read_cells(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {r["id"] for r in records} and len(lines) == 6
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["guidance"]) for row in rows] == [1.0, 2.0, 3.0] * 2
    by_id = {r["id"]: r for r in records}
    for row in rows:
        for value in by_id[row["id"]]["values"]:
            assert float(row[value["key"]]) == value["value"]
    page = path.read_text()
    assert all(r["id"] in page for r in records) and "bright/five5/N=5" in page
    assert "fd-clip against clip_cosine over guidance" in page
    assert page.count("<svg") == 1 + 3  # and three metrics over guidance
    assert "&lt;b&gt;hostile" in page and "<b>hostile" not in page and "not measured" in page
    assert page.count("data:image/png") == 2 * 6 + 2 + 2  # shown, best, worst
    before = files_of(tmp_path)
    report.write(tmp_path, config(changes))
    assert files_of(tmp_path) == before


def test_a_report_reads_no_picture_outside_its_cell(paint, tmp_path):
    _, runner, _ = paint
    job = runner(tmp_path)
    job.run(job.cells())
    one = store.read_cells(tmp_path)[0][0]
    changed = copy.deepcopy(one)
    images.write_png(tmp_path / "secret.png", np.zeros((8, 8, 3), np.uint8))
    changed["kept"]["shown"][0]["file"] = "../../secret.png"
    assert report._read(tmp_path, changed, changed["kept"]["shown"][0]) is None
    assert report._read(tmp_path, one, one["kept"]["shown"][0]) is not None
    with pytest.raises(errors.DataError, match="no finished cell"):
        report.write(tmp_path / "empty", {})
    with pytest.raises(errors.ConfigError, match=r"claim .*expected"):
        report.write(tmp_path, {"claims": (("a", "b"),)})
