"""The ablation's commands, without running them: that they fit the configs and one another."""

import pathlib
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from configs import evaluate

ROOT = pathlib.Path(__file__).parents[2]
SHARDS = {"shards": "a-*.tar", "held_out": "b-*.tar"}


@pytest.fixture(scope="module")
def ablation(script):
    return script("ablation")


@pytest.fixture
def parsed(monkeypatch):
    """parsed(command) -> the config its flags make; an unknown field or a wrong type fails."""

    def parse(command):
        values = flags.FlagValues()
        holder = config_flags.DEFINE_config_file("config", flag_values=values)
        words = [w for w in command[1:] if w.startswith("--config")]
        words = [word.replace("=configs/", f"={ROOT / 'configs'}/") for word in words]
        words = [word if "=" in word else f"{word}=True" for word in words]
        monkeypatch.setattr(sys, "argv", ["x", *words])
        values(["x", *words])
        return holder.value

    return parse


def test_the_trainings_fit_together(ablation, parsed, tmp_path):
    lanes = ablation.trainings(tmp_path, SHARDS, 1.0)
    configs = {job.name: parsed(job.command) for lane in lanes for job in lane}
    names = [job.name for lane in lanes for job in lane]
    assert len(set(names)) == len(names)
    for job in (job for lane in lanes for job in lane):
        assert set(job.after) <= set(names)
        config = configs[job.name]
        assert config.input.shards == ("a-*.tar",) and config.input.held_out == ("b-*.tar",)
        assert config.input.where.sizes == ("large", "huge")
        if job.after:
            assert config.clip == str(tmp_path / "clip")
            assert config.arch.get("context", 16) == configs["clip"].arch.context
    assert configs["judge"].seed != configs["clip"].seed
    assert configs["decoder"].task.embedding == "image"
    assert configs["decoder_z_t"].task.embedding == "text"
    assert not configs["decoder_caption"].arch.use_z_i
    assert configs["prior"].task.kind == "diffusion" and configs["prior_ar"].task.kind == "ar"
    # What the three decoders differ in is what they are given.
    same = ("batch_size", "total_steps", "optim", "arch.channels", "task.image_size")
    for name in ("decoder_z_t", "decoder_caption"):
        for field in same:
            one, other = configs["decoder"], configs[name]
            for part in field.split("."):
                one, other = one[part], other[part]
            assert one == other, (name, field)


def test_every_model_of_the_sweep_is_trained(ablation, parsed, tmp_path):
    trained = {job.name for lane in ablation.trainings(tmp_path, SHARDS, 1.0) for job in lane}
    (first,), (second,) = ablation.evaluations(tmp_path, 400, 2)
    assert first.name != second.name
    assert parsed(ablation.evaluations(tmp_path, 8, 1, [3.0])[0][0].command).sweep.guidance == (3,)
    config = parsed(first.command)
    assert config.protocol.size == ablation.SIZE
    assert config.clip_for_scores == str(tmp_path / "judge")
    asked = {
        f"{m}.{part}" for m, own in evaluate.ABLATION.items() for part in own if own[part] == "?"
    }
    given = {f"{m}.{part}" for m, own in ablation.MODELS.items() for part in own}
    assert given == asked
    assert {run for own in ablation.MODELS.values() for run in own.values()} <= trained
