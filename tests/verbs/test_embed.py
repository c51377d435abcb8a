"""`unclip embed` as a user sees it: output, a stop half way, and every mistake in one line."""

import os
import pathlib
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from unclip import tasks
from unclip.cascade import bundle

ARCH = dict(
    embed_dim=8, image_size=16, patch_size=8, vision_width=16, vision_layers=1, vision_heads=1,
    text_width=16, text_layers=1, text_heads=1, context=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def embed(serve_verb):
    """embed(*arguments) -> (exit code, stdout, stderr), see `serve_verb`."""
    with serve_verb("embed") as run:
        yield run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("model"), seed=0)


def write_clip(folder, seed):
    """A bundle of a random CLIP."""
    shapes = jax.eval_shape(tasks.ClipTask(ARCH).init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: np.float32(0.2 * rng.normal(size=leaf.shape)), shapes)
    bundle.write(folder, {"clip": bundle.Part("clip", ARCH, params)})
    return folder


@pytest.fixture(scope="module")
def tars(shards, tmp_path_factory):
    """80 shards of 24 samples: the same bytes, but names count."""
    folder = tmp_path_factory.mktemp("tars")
    for number in range(80):
        shutil.copy(shards["train"], folder / f"{number:05d}.tar")
    return folder


def rows(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).glob("*.npy")}


def test_a_job_is_stopped_killed_and_resumed(embed, model, tars, tmp_path):
    """By SIGTERM and SIGKILL, each once some shards are there; then nothing is left to be done."""
    command = ("--model", model, "--shards", tars / "{00000..00079}.tar", "--batch_size", 8)

    def strike(number, shards):
        def meanwhile(process):
            deadline = time.monotonic() + 60
            while len(list(tmp_path.glob("out/*-*.json"))) < shards:
                assert time.monotonic() < deadline
                time.sleep(0.002)
            os.kill(process, number)

        return meanwhile

    code, _, err = embed(*command, "--out", tmp_path / "out", meanwhile=strike(signal.SIGTERM, 3))
    assert code == 75 and "the same command continues" in err
    stopped = rows(tmp_path / "out")
    assert 6 <= len(stopped) < 160
    code, _, err = embed(
        *command, "--out", tmp_path / "out", meanwhile=strike(signal.SIGKILL, len(stopped) // 2 + 3)
    )
    assert code == -9
    killed = rows(tmp_path / "out")
    assert len(stopped) < len(killed) < 160 and stopped.items() <= killed.items()
    code, out, err = embed(*command, "--out", tmp_path / "out")
    assert code == 0, err
    assert "1,920 samples in 80 shards: 1,920 with z_i, 1,920 with z_t, 8 numbers each" in out
    assert killed.items() <= rows(tmp_path / "out").items()
    assert not list((tmp_path / "out").glob(".*"))
    # Every shard holds the same samples, and the statistics are those of any of them.
    assert len(set(rows(tmp_path / "out").values())) == 2
    with np.load(tmp_path / "out" / "statistics.npz") as file:
        mean = file["mean_0"]
    one = np.load(next((tmp_path / "out").glob("00007-*.z_i.npy")))
    np.testing.assert_allclose(mean, np.float64(one).mean(0), rtol=1e-9)
    code, out, err = embed(*command, "--out", tmp_path / "out")
    assert code == 0 and "embedding:" not in err and "1,920 samples" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--model", "{model}", "--out", "{out}"), 78, "expected --shards"),
        (("--model", "{model}", "--shards", "{tars}/00000.tar"), 78, "--out is required"),
        (("--model", "{tars}", "--out", "{out}", "{tars}/00000.tar"), 74, "model.json"),
        (("--model", "{model}", "--out", "{out}", "{tars}/0000.tar"), 74, "did you mean"),
        (
            ("--model", "{model}", "--out", "{out}", "--dtype", "float64", "{tars}/00000.tar"),
            78,
            "did you mean",
        ),
        (
            ("--model", "{model}", "--out", "{out}", "--captions", "text", "{tars}/00000.tar"),
            78,
            "caption source",
        ),
        (("--model", "{model}", "--out", "{tars}/00001.tar", "{tars}/00000.tar"), 74, "00001.tar"),
        (
            ("--model", "{model}", "--out", "{out}", "--workers", "1", "--threads", "2", "x.tar"),
            78,
            "--threads has no effect: --workers decode in place of threads",
        ),
        (("--model=~/none", "--out={out}", "{tars}/0.tar"), 74, "/none: no such folder"),
    ],
)
def test_mistakes(arguments, code, message, embed, model, tars, tmp_path):
    words = [a.format(model=model, tars=tars, out=tmp_path / "out") for a in arguments]
    got, _, err = embed(*words)
    assert "~" not in err
    assert got == code and message in err and len(err.strip().splitlines()) == 1, err


def test_another_clip_is_refused(embed, model, tars, tmp_path):
    command = ("--out", tmp_path / "out", "--shards", tars / "00000.tar", "--dtype", "float16")
    assert embed("--model", model, *command)[0] == 0
    code, _, err = embed("--model", write_clip(tmp_path / "other", seed=1), *command)
    assert code == 78 and "were made by CLIP" in err and "another --out" in err
