"""A model of paint, configs of it, and what a sweep of it leaves, for every module's tests."""

import importlib
import json
import pathlib
import sys

import numpy as np
import pytest

from unclip import protocols
from unclip.cascade import bundle, pipeline
from unclip.measure.table import Result
from unclip.protocols.base import EvaluationProtocol
from unclip.sweep import drawing, scoring, store

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
