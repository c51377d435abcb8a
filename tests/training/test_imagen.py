"""A decoder that reads captions through a frozen T5: trained, resumed, exported, drawn."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from unclip import errors, tasks
from unclip.cascade import bundle, runs
from unclip.input.decode.text import T5Tokenizer
from unclip.models import t5
from unclip.runtime import checkpoint
from unclip.training.plan import as_json, frozen_part, make_plan, needs
from unclip.training.start import train

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap_runs")]
SMALL = dict(
    vocab_size=40,
    width=8,
    layers=1,
    heads=2,
    head_dim=4,
    mlp_width=12,
    gated=True,
    activation="gelu_tanh",
)
ARCH = {
    "channels": 16,
    "multipliers": (1,),
    "blocks": 1,
    "head_dim": 16,
    "groups": 8,
    "time_dim": 32,
    "attention": (True,),
    "context_dim": 32,
    "text_context": 12,
}


@pytest.fixture(scope="module")
def t5_bundle(tmp_path_factory):
    """A bundle of a random T5 of its own shape, with a tokenizer of whole words."""
    words = ["a", "red", "green", "blue", "square", "bar", "dot", ",", "number"]
    names = {"<pad>": 0, "</s>": 1, "?": 2} | {word: 3 + i for i, word in enumerate(words)}
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="?"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    params = jax.device_get(tasks.FrozenT5(t5.T5Encoder(**SMALL)).init(jax.random.key(4)))
    part = bundle.Part("t5", SMALL, params)
    part.extra["tokenizer"] = np.frombuffer(engine.to_str().encode(), np.uint8)
    folder = tmp_path_factory.mktemp("t5")
    bundle.write(folder, {"t5": part}, dtype="bfloat16")
    return str(folder)


@pytest.fixture(scope="module")
def imagen(tiny_config, shards):
    """imagen({field: value}): the preset's local form at micro size."""
    from configs import decoder

    def make(changes=()):
        config = decoder.get_config("imagen,runlocal")
        fields = {f"arch.{name}": value for name, value in ARCH.items()}
        fields |= {
            "input.shards": (shards["train"],),
            "input.held_out": (),
            "input.threads": 1,
            "tensorboard": False,
            "eval_steps": 0,
            "sample_examples": 0,
            "task.image_size": 8,
            "task.draw.steps": 2,
        }
        config.update_from_flattened_dict(fields | dict(changes))
        return config

    return make


@pytest.fixture(scope="module")
def run(imagen, t5_bundle, tmp_path_factory):
    """A run of two steps that draws its samples at the end."""
    workdir = str(tmp_path_factory.mktemp("run"))
    train(imagen({"t5": t5_bundle, "sample_examples": 2}), workdir)
    return workdir


def state(workdir):
    return checkpoint.load_subtree(pathlib.Path(workdir) / "checkpoints", ("params", "step"))


def test_it_needs_a_t5_and_no_clip(imagen, tmp_path):
    with pytest.raises(errors.ConfigError, match=r"needs a trained T5: --config\.t5=RUN or BUNDLE"):
        train(imagen(), str(tmp_path))
    config = imagen({"clip": "/nowhere"})
    assert needs(config) == ("t5",) and set(make_plan(config, shapes_only=True).parts) == {"t5"}
    with pytest.raises(errors.ConfigError, match="'t5-v1_1-xll': did you mean 't5-v1_1-xl"):
        frozen_part(imagen({"t5_preset": "t5-v1_1-xll"}), "t5")


def test_a_random_t5_trains(imagen, tmp_path):
    """For benchmarks: the preset's shapes, captions read as bytes."""
    train(imagen({"t5": "random"}), str(tmp_path))
    assert int(state(tmp_path)["step"]) == 2
    with pytest.raises(errors.ConfigError, match="not trained with a T5 that was kept"):
        runs.open_part(tmp_path, "t5")


def test_a_run_says_which_t5_it_had(run, t5_bundle):
    assert json.loads((pathlib.Path(run) / "config.json").read_text())["t5"] == t5_bundle
    assert list(pathlib.Path(run).glob("samples/*.png"))


EXAMINE = """
import json, sys
from ml_collections import ConfigDict
from unclip.training import checkup as doctor
out = []
for fields in json.loads(sys.stdin.read()):
    out.append(doctor.examine(ConfigDict(fields), "runs"))
print(json.dumps(out))
"""


def test_the_doctor_counts_both(imagen, t5_bundle):
    configs = [as_json(imagen(changes)) for changes in ({"t5": t5_bundle}, {})]
    done = subprocess.run(
        [sys.executable, "-c", EXAMINE],
        input=json.dumps(configs),
        cwd=ROOT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found, missing = json.loads(done.stdout)
    assert found["problems"] == [] and found["memory_per_device"]["frozen"] > 0
    assert found["parameters"]["t5"] == sum(
        leaf.size for leaf in jax.tree.leaves(bundle.read_part(t5_bundle, "t5").params)
    )
    assert "clip" not in found["parameters"] and found["flops_per_step"] > 1e6
    assert any("needs a trained T5" in problem for problem in missing["problems"])
    assert missing["parameters"]["t5"] > 0


def test_export_and_drawing(run, t5_bundle, tmp_path):
    """The bundle holds decoder and T5 alone, and its task draws from the tokenizer it brings."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "unclip",
            "export",
            "--decoder",
            run,
            "--t5",
            run,
            "--out",
            str(tmp_path),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    parts = bundle.read(tmp_path).parts
    assert set(parts) == {"decoder", "t5"}
    part = parts["decoder"]
    assert tasks.needs("decoder", part.arch, part.settings) == ("t5",)
    task = tasks.make("decoder", part.arch, part.settings, t5=parts["t5"].arch)
    assert task.draw["threshold"] == "dynamic" and task.context == 12
    tokenizer = T5Tokenizer(parts["t5"].extra["tokenizer"])
    tokens, mask, _ = tokenizer.encode(["a red square", "a blue dot"], task.context)
    assert tokens[0, :4].tolist() == [3, 4, 7, 1]
    params = scrambled(part.params)
    keys = jax.random.split(jax.random.key(0), 2)
    draw = jax.jit(
        lambda tokens, mask: task.sample(
            params,
            {"t5": parts["t5"].params},
            {"tokens": tokens, "text_mask": mask},
            keys,
            draw={"guidance": 2.0},
        )
    )
    pictures = np.asarray(draw(tokens, mask))
    assert pictures.shape == (2, 8, 8, 3) and np.abs(pictures).max() <= 1
    other = np.asarray(draw(tokens[[1, 1]], mask[[1, 1]]))
    np.testing.assert_allclose(other[1], pictures[1], atol=1e-5)
    assert np.abs(other[0] - pictures[0]).max() > 1e-3
    empty, empty_mask = task.empty(2)
    assert empty[0, :2].tolist() == [1, 0] and empty_mask.sum() == 2


def scrambled(params):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda v: jnp.asarray(v + 0.2 * rng.standard_normal(v.shape), jnp.float32), params
    )


def test_parts_of_two_t5s_are_told_apart(run, t5_bundle):
    decoder, part = runs.open_part(run, "decoder"), runs.open_part(run, "t5")
    runs.check_fit({"decoder": decoder, "t5": part})
    part.arch = part.arch | {"width": 16}
    with pytest.raises(errors.ConfigError, match="reads 8 features a token, T5 gives 16"):
        runs.check_fit({"decoder": decoder, "t5": part})
