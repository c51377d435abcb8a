"""Training runs that are killed at any moment, and runs whose parameters explode at any step.

A killed run is started again by the same command until it ends, and must end with the bits of one
that was never touched. An exploding run, which keeps one checkpoint, must leave a good one.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax.numpy as jnp
import numpy as np
from table import Row

from unclip import errors
from unclip.cascade import runs
from unclip.runtime import checkpoint, optim

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 24
MICRO = {
    "arch.embed_dim": 16,
    "arch.image_size": 16,
    "arch.patch_size": 8,
    "arch.vision_width": 16,
    "arch.vision_layers": 1,
    "arch.vision_heads": 2,
    "arch.text_width": 16,
    "arch.text_layers": 1,
    "arch.text_heads": 2,
    "arch.context": 16,
    "batch_size": 8,
    "total_steps": STEPS,
    "save_steps": 1,  # nearly always within a save
    "keep": 1,
    "eval_steps": 0,
    "eval_examples": 0,
    "sample_examples": 0,
    "metric_examples": 0,
    "tensorboard": False,
    "input.held_out": "()",
    "input.threads": 1,
}
CONFIG = "configs/clip.py:emoji,runlocal"


def command(workdir: pathlib.Path, cache: pathlib.Path) -> list[str]:
    """`unclip train` of a CLIP of a few thousand parameters."""
    fields = MICRO | {"compilation_cache": str(cache)}
    return [
        *(sys.executable, "-m", "unclip", "train", "--config", CONFIG, "--workdir", str(workdir)),
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def start(workdir: pathlib.Path, cache: pathlib.Path) -> subprocess.Popen:
    """The command as a process of its own."""
    return subprocess.Popen(
        command(workdir, cache),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def bits(workdir: pathlib.Path) -> bytes:
    """Everything a run's last checkpoint holds."""
    tree = checkpoint.load_subtree(workdir / "checkpoints", ("params", "ema", "opt", "step"))
    return b"".join(np.asarray(leaf).tobytes() for leaf in _leaves(tree))


def _leaves(tree):
    for _, value in sorted(tree.items()):
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield value


def killed(folder: pathlib.Path, kills: int) -> Row:
    """SIGKILL at random moments of the time that steps and saves take, until the run has ended."""
    rng, begin, wrong, note = np.random.default_rng(0), time.perf_counter(), 0, ""
    cache, whole = folder / "cache", folder / "whole"
    if start(whole, cache).wait():
        return Row("a run killed", kills, 0, 0, kills, 0.0, "the run itself failed")
    expected, struck, ended = bits(whole), 0, 0
    while struck < kills:
        workdir = folder / f"killed{ended}"
        while True:
            process = start(workdir, cache)
            if struck < kills:
                checkpoints = workdir / "checkpoints"
                first = max(checkpoint.steps(checkpoints), default=0)
                while process.poll() is None and not (
                    max(checkpoint.steps(checkpoints), default=0) > first
                ):
                    time.sleep(0.005)
                time.sleep(float(rng.uniform(0, 0.3)))
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    struck += 1
            said = process.communicate()[1]
            if process.returncode == 0:
                break
            if process.returncode != -signal.SIGKILL:
                wrong, note = wrong + 1, f"exit {process.returncode}: {said[-200:]}"
                break
        ended += 1
        if bits(workdir) != expected:
            wrong, note = wrong + 1, note or "other bits"
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
        steps = [line["step"] for line in lines if "loss" in line]
        if steps != sorted(set(steps)):
            wrong, note = wrong + 1, note or f"metrics of steps {steps}"
    seconds = time.perf_counter() - begin
    note = note or f"{ended} runs of {STEPS} steps, a save each, ended with the same bits"
    return Row(
        "SIGKILL of a trainer at a random moment", struck, struck - wrong, 0, wrong, seconds, note
    )


def exploded(folder: pathlib.Path, tries: int) -> Row:
    """The update of a random step throws the parameters far off; they are saved before it shows."""
    sys.path.insert(0, str(ROOT))
    from configs import clip as config_file
    from unclip.training.start import train

    rng, begin, wrong, note = np.random.default_rng(0), time.perf_counter(), 0, ""
    usual = optim.make_learning_rate
    os.chdir(ROOT)
    for number in range(tries):
        at, every = int(rng.integers(3, STEPS - 6)), int(rng.integers(1, 4))

        def make(*args, at=at, **more):
            rate = usual(*args, **more)
            return lambda applied: jnp.where(applied == at, 1e25, rate(applied))

        config = config_file.get_config("emoji,runlocal")
        fields = MICRO | {"save_steps": every, "max_skipped_steps": 4, "input.held_out": ()}
        config.update_from_flattened_dict(fields | {"compilation_cache": str(folder / "cache")})
        workdir = folder / f"exploded{number}"
        named = None
        with mock.patch.object(optim, "make_learning_rate", make):
            try:
                train(config, str(workdir))
            except errors.NumericsError as error:
                named = re.search(r"the last good state is .*/(\d+), from", str(error))
        left = checkpoint.steps(workdir / "checkpoints")
        good = at - at % every  # the newest that was saved before the update
        if (named is None) != (good == 0) or (good and (int(named[1]) != good or left != [good])):
            wrong, note = wrong + 1, f"exploded at {at}, saves every {every}: left {left}"
            continue
        train(config, str(workdir))
        finite = all(np.isfinite(x).all() for x in _leaves(_params(workdir)))
        wrong += not finite
    seconds = time.perf_counter() - begin
    what = "an explosion at a random step, one checkpoint kept"
    return Row(what, tries, tries - wrong, 0, wrong, seconds, note or "named, and gone on from")


def _params(workdir: pathlib.Path):
    assert runs.is_run(workdir)
    return checkpoint.load_subtree(workdir / "checkpoints", ("params",))["params"]


def run(scale: float) -> list[Row]:
    """Kills in processes of their own, explosions in this one."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        return [
            killed(folder, max(2, round(60 * scale))),
            exploded(folder, max(1, round(30 * scale))),
        ]
