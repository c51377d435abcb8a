"""`unclip evaluate` as a process: the emoji preset on the micro cascade, twice; what it refuses."""

import concurrent.futures
import csv
import importlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from unclip import errors
from unclip.cascade import bundle
from unclip.files import images
from unclip.files.moments import read_statistics
from unclip.measure import clip_score, embedders, features, pictures
from unclip.sweep import drawing, scoring, store, weights

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick_compiles")
CHANGES = {
    "protocol.size": 16,
    "protocol.count": 6,
    "metrics": ("fd-clip", "clip_cosine"),
    "stages": 2,
    "sweep.guidance": (1.0, 4.0),
    "sweep.embed": ("prior", "none"),
    "show": 2,
    "batch_size": 4,
    "mesh.data": 1,
    "candidates": 4,
}


def verb(*arguments, timeout=200, **environment):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-m", "unclip", "evaluate", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def overrides(changes):
    return [f"--config.{name}={value}" for name, value in changes.items()]


@pytest.fixture(scope="module")
def evaluate(serve_verb):
    """evaluate(*arguments) -> (exit code, stdout, stderr), see `serve_verb`."""
    with serve_verb("evaluate") as run:
        yield run


@pytest.fixture(scope="module")
def done(evaluate, bundle_dir, tmp_path_factory):
    """(workdir, command line) of a finished sweep of four cells."""
    workdir = tmp_path_factory.mktemp("eval")
    command = [
        "--config=configs/evaluate.py:emoji,runlocal",
        f"--config.model={bundle_dir}",
        f"--workdir={workdir}",
        *overrides(CHANGES),
    ]
    code, out, err = evaluate(*command)
    assert code == 0, err
    assert out.split() == [str(workdir / "report.html")]
    return workdir, command


@pytest.fixture(scope="module")
def config(bundle_dir):
    sys.path.insert(0, str(ROOT))
    found = importlib.import_module("configs.evaluate").get_config("emoji,runlocal")
    sys.path.remove(str(ROOT))
    found.model = bundle_dir
    found.update_from_flattened_dict(CHANGES)
    return found.to_dict()


def test_the_sweep_is_drawn_and_scored(done):
    workdir, _ = done
    records, damaged = store.read_cells(workdir)
    assert len(records) == 4 and not damaged
    with open(workdir / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    points = [(row["embed"], float(row["guidance"])) for row in rows]
    assert points == [("none", 1.0), ("none", 4.0), ("prior", 1.0), ("prior", 4.0)]
    found = {}
    for record in records:
        keys = {v["metric"]: v["key"] for v in record["values"]}
        assert set(keys) == {"fd-clip", "clip_cosine"}
        for key in keys.values():
            assert "/emoji-held-out.txt.first6.size16/N=6" in key
        assert record["recipe"]["guidance"]["decoder"] == record["settings"]["guidance"]
        assert record["recipe"]["steps"]["decoder"] == 2
        assert ("prior" in record["recipe"]["steps"]) == (record["settings"]["embed"] == "prior")
        found[record["id"]] = tuple(v["value"] for v in record["values"])
    assert len(set(found.values())) == 4
    assert "fd-clip against clip_cosine over guidance" in (workdir / "report.html").read_text()


def test_scores_are_those_of_the_kept_pictures(done, bundle_dir):
    """Cosines in the cell file, and the metric, equal those of the PNGs on disk."""
    workdir, _ = done
    extractor, encoder = embedders.clip_extractor(bundle_dir), embedders.CaptionEncoder(bundle_dir)
    record = store.read_cells(workdir)[0][0]
    folder = store.cell_folder(workdir, record["id"])
    shown = record["kept"]["shown"] + record["kept"]["worst"]
    drawn = np.stack([images.read_image(folder / row["file"]) for row in shown])
    z_i = features.extract(extractor, pictures.ArrayPictures(drawn)).rows["z_i"]
    z_t = encoder.encode([row["caption"] for row in shown])
    scores = record["scores"]["clip_cosine"]
    np.testing.assert_allclose(
        clip_score.cosine(z_i, z_t), [row["score"] for row in shown], atol=2e-6
    )
    assert [row["score"] for row in shown] == [scores[row["number"]] for row in shown]
    value = next(v["value"] for v in record["values"] if v["metric"] == "clip_cosine")
    assert value == pytest.approx(np.mean(scores), abs=1e-6)
    assert record["kept"]["worst"][0]["score"] == min(scores)


def test_the_same_command_does_nothing_again(done, config, evaluate):
    workdir, command = done
    before = {p: p.stat().st_mtime_ns for p in workdir.glob("cells/*.json")}
    runner = drawing.Runner(config, workdir)  # another process, the same ids
    cells = runner.cells()
    assert {store.cell_path(workdir, cell.id) for cell in cells} == set(before)
    assert runner.run(cells) == 0
    command = [word for word in command if "sweep.guidance" not in word]
    code, out, err = evaluate(*command, "--dry_run", "--config.sweep.guidance=(1.0,2.0)")
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["finished", "to", "finished", "to"]
    assert lines[-1] == "2 of 4 cells finished, 6 pictures a cell"
    assert {p: p.stat().st_mtime_ns for p in workdir.glob("cells/*.json")} == before


@pytest.mark.slow
def test_two_processes_draw_the_same(done, tmp_path):
    """Each draws half of the captions, both score: the same numbers, to the bit."""
    workdir, command = done
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    changed = ("workdir", "sweep.guidance", "sweep.embed")
    command = [word for word in command if not any(name in word for name in changed)]
    command += [
        f"--workdir={tmp_path}",
        "--config.sweep.guidance=(4.0,)",
        "--config.sweep.embed=('none',)",
        f"--coordinator=localhost:{port}",
        "--process_count=2",
    ]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ran = list(pool.map(lambda i: verb(*command, f"--process_id={i}"), range(2)))
    assert [job.returncode for job in ran] == [0, 0], ran[0].stderr + ran[1].stderr
    (one,) = store.read_cells(tmp_path)[0]
    alone = store.read_cell(store.cell_path(workdir, one["id"]))
    assert one["processes"] == 2 and alone["processes"] == 1
    assert (one["values"], one["scores"]) == (alone["values"], alone["scores"])
    assert one["kept"] == alone["kept"]


def test_runs_are_as_good_as_their_bundle(config, run_of, bundle_dir, tmp_path):
    """The stages' RUNs, at a step by number, give the bundle's parts; `params` gives others."""
    names = ("clip", "prior", "decoder")
    own = {name: run_of(name) for name in names} | {"model": "", "clip_for_scores": bundle_dir}
    own["upsamplers"] = (run_of("upsampler_0"), run_of("upsampler_1"))
    own["sweep"] = config["sweep"] | {"step": (2,), "weights": ("ema", "params")}
    cells = drawing.Runner(config | own, tmp_path).cells()
    ema, raw = (next(c for c in cells if c.settings["weights"] == w) for w in ("ema", "params"))
    assert ema.settings["step"] == 2 and ema.model_hash != raw.model_hash
    for name, (path, step) in ema.parts.items():
        assert step == 2
        part = weights.load_part(path, name, step, "ema")
        saved = bundle.read_part(bundle_dir, name)
        jax.tree.map(np.testing.assert_array_equal, part.params, saved.params)
        jax.tree.map(np.testing.assert_array_equal, part.extra, saved.extra)
    changed = weights.load_part(run_of("decoder"), "decoder", 2, "params")
    saved = bundle.read_part(bundle_dir, "decoder")
    same = jax.tree.map(np.array_equal, changed.params, saved.params)
    assert not all(jax.tree.leaves(same))
    with pytest.raises(errors.DataError, match="no complete checkpoint of step 7"):
        gone = config["sweep"] | {"step": (7,)}
        drawing.Runner(config | own | {"sweep": gone}, tmp_path).cells()


def test_real_pictures_are_measured_once(done, config, monkeypatch):
    workdir, _ = done
    (path,) = workdir.glob("reference-*.npz")
    assert [s.count for s in read_statistics(path).statistics.values()] == [6]
    runner = drawing.Runner(config, workdir)
    monkeypatch.setattr(scoring.measure, "measure", None)  # would fail if it were called
    assert runner.scorer.reference.statistics


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--config=configs/evaluate.py:emoji", "--config.model=nowhere"], 74, "nowhere: no such"),
        (["--config=configs/clip.py:emoji"], 78, "expected configs/evaluate.py"),
        (
            ["--config=configs/evaluate.py:emoji", "--follow_timeout=9"],
            78,
            "--follow_timeout has no effect",
        ),
        (
            ["--config=configs/evaluate.py:emoji", "--report_only", "--dry_run"],
            78,
            "--dry_run has no effect: --report_only draws nothing",
        ),
    ],
)
def test_one_line_before_anything_is_drawn(evaluate, tmp_path, arguments, code, said):
    got, _, err = evaluate(*arguments, f"--workdir={tmp_path}/eval")
    assert got == code and said in err
    assert len(err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        (
            {"protocol": {"name": "emoji-heldout"}},
            errors.ConfigError,
            "did you mean 'emoji-held-out'",
        ),
        ({"protocol": {"name": "emoji-held-out", "sise": 8}}, errors.ConfigError, "'size'"),
        ({"metrics": ("fid",)}, errors.ConfigError, "fid needs weights: --config.inception=PATH"),
        (
            {"metrics": ("fid",), "inception": "none.pth"},
            errors.DataError,
            "none.pth: no such file",
        ),
        ({"metrics": ("fd-clop",)}, errors.ConfigError, "did you mean 'fd-clip'"),
    ],
)
def test_refused_before_anything_is_drawn(config, tmp_path, changes, kind, said):
    with pytest.raises(kind, match=said) as raised:
        drawing.Runner(config | changes, tmp_path).cells()
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())
    json.dumps(config, default=list)
