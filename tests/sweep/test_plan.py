"""Which cells a sweep has, and which of them are a job's own."""

import itertools
import os

import pytest

from tests.sweep.conftest import DRAW, MEASURED, write_run
from unclip import errors
from unclip.cascade import bundle
from unclip.sweep import plan


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


def test_a_sampler_brings_its_own_eta(plain):
    samplers = ("ddpm", "ddim", "euler-ancestral", "dpm++2m")
    cells = plan.cells(plain({"sweep.guidance": (1.0,), "sweep.sampler": samplers}), MEASURED)
    assert {c.settings["sampler"]: c.settings["eta"] for c in cells} == {
        "ddpm": 0.0, "ddim": 0.0, "euler-ancestral": 1.0, "dpm++2m": 0.0,
    }  # fmt: skip


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
