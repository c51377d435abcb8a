"""The doctor: published parameter counts, and every problem in plain words, with nothing run."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]

EXAMINE = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from configs import clip, decoder, prior, upsampler
from unclip import errors
from unclip.training import checks, checkup as doctor, plan

# Tracing a billion parameters takes a while.
plan.Plan.flops = checks.trace = lambda *_: None
modules = {"clip": clip, "decoder": decoder, "prior": prior, "upsampler": upsampler}
out = {}
for name, stage_name, arg, changes, workdir in json.loads(sys.stdin.read()):
    config = modules[stage_name].get_config(arg)
    config.update_from_flattened_dict(
        {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()})
    out[name] = doctor.examine(config, workdir)
    out[name]["text"] = doctor.text(out[name], leaves=True)
print(json.dumps(out))
"""


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def _shard(path, names):
    """A tar whose members have no pictures in them, only names; JSON has a text in FIELD."""
    with tarfile.open(path, "w") as archive:
        for name in re.findall(r"\S+(?: \(v2\)\S+)?", names):
            data = b'{"FIELD": "text"}'
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def found(shards, run_of, tmp_path_factory):
    """What the doctor finds in several configs, from one process: {name: report}."""
    folder = str(tmp_path_factory.mktemp("work"))
    data = {"input.shards": [shards["train"]], "input.held_out": [shards["held_out"]]}
    fold = {"arch.fold": True}  # quicker to trace, the same parameters
    wanted = [
        ("decoder", "decoder", "karlo", data | fold, folder),
        ("prior", "prior", "karlo", data | fold, folder),
        ("upsampler", "upsampler", "karlo", data | fold, folder),
        ("paper", "prior", "paper", data | fold | {"clip": "random"}, folder),
        (
            "clip",
            "clip",
            "emoji",
            data | {"batch_size": 10, "mesh.data": 2, "mesh.fsdp": 2},
            folder,
        ),
        (
            "gone",
            "decoder",
            "emoji,runlocal",
            {"input.shards": [folder + "/none.tar"], "clip": folder + "/no-run"},
            folder,
        ),
        ("other", "clip", "emoji", data, run_of("clip")),
        ("mesh", "clip", "emoji", data | {"mesh.data": 3, "sharding": "fsdb"}, folder),
        (
            "left out",
            "clip",
            "emoji,runlocal",
            {
                "input.shards": [_shard(folder + "/a.tar", "0.jpg 0.txt 1.jpg 2.gif 2.txt")],
                "input.held_out": [_shard(folder + "/b.tar", "0.jpg 0.txt 0.5.jpg 1.0.jpg")],
            },
            folder,
        ),
        (
            "text",
            "clip",
            "emoji,runlocal",
            {
                "input.shards": [_shard(folder + "/c.tar", "0.jpg 0.json 1.jpg 1.json")],
                "input.held_out": [_shard(folder + "/d.tar", "0.0 (v2).jpg 1.0 (v2).jpg")],
            },
            folder,
        ),
        (
            "layout",
            "clip",
            "emoji",
            data | {"mesh.data": 1, "mesh.fsdp": 4, "batch_size": 64, "total_steps": 3000},
            folder,
        ),
    ]
    done = subprocess.run(
        [sys.executable, "-c", EXAMINE],
        input=json.dumps(wanted),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_published_parameter_counts(found):
    decoder = found["decoder"]["parameters"]
    assert decoder["decoder/unet"] == 885_439_686
    assert decoder["decoder/text_proj"] == 7_878_400
    assert decoder["decoder"] == 885_439_686 + 7_878_400 == found["decoder"]["trained_parameters"]
    # Karlo's checkpoint also counts the whitening mean and deviation, 2 x 768.
    assert found["prior"]["parameters"]["prior"] == 1_022_028_544
    assert found["upsampler"]["parameters"]["upsampler"] == 691_579_523
    assert decoder["clip"] == decoder["clip/vision"] + decoder["clip/text"] + 1


@pytest.mark.slow
def test_memory_of_sharded_state(found):
    """Parameters, average and two moments, split four ways as far as they divide."""
    memory = found["upsampler"]["memory_per_device"]
    whole = 4 * 691_579_523
    assert whole / 4 <= memory["params"] < 1.01 * whole / 4
    assert memory["ema"] == memory["gradients"] == memory["params"]
    assert 2 * memory["params"] <= memory["opt"] < 2.01 * memory["params"]
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total")
    assert found["decoder"]["memory_per_device"]["frozen"] > 0


def test_disk_counts_every_parameter_once(found):
    """Replicated or not, a checkpoint holds one copy; `keep`, one untrusted, one written."""
    report = found["layout"]
    state = 4 * 4 * report["trained_parameters"]
    assert 4 * state <= report["disk"]["needed_bytes"] < 4 * state + 1000


def test_problems_in_plain_words(found):
    said = {name: "\n".join(report["problems"]) for name, report in found.items()}
    assert "needs a trained CLIP: --config.clip=RUN or BUNDLE" in said["decoder"]
    assert "batch_size 10 is not a multiple of 4 (data 2 x fsdp 2 x accumulate 1)" in said["clip"]
    assert "no-run: no such folder" in said["gone"]
    assert "none.tar' is not there" in said["gone"]
    assert found["gone"]["parameters"]["clip"] > 0  # the rest is still reported
    assert "holds a run of another model" in said["other"]
    assert "mesh data=3" in said["mesh"] and "did you mean 'fsdp'" in said["mesh"]
    assert found["layout"]["problems"] == []


def test_samples_that_are_left_out_are_named(found):
    assert found["left out"]["problems"] == [
        "train shards: 1 left out as unknown-extension: a.tar: 2.gif",
        "train shards: 1 left out as no-text: a.tar: 1",
        "held_out shards: 1 left out as dotted-key: b.tar: 1.0.jpg",
    ]
    # Of several problems of the data the first is told.
    said = "\n".join(found["text"]["problems"])
    assert "c.tar' has 2 pictures and no captions: expected KEY.txt or the field" in said
    assert "its JSON has text in 'json:FIELD'" in said


def test_data_found(found):
    data = found["layout"]["data"]
    assert data["train"]["samples"] == 24 and data["held_out"]["samples"] == 8
    assert data["epochs"] == pytest.approx(3000 / (24 / 64))


def test_the_report_for_people(found):
    text = found["decoder"]["text"]
    assert "885,439,686" in text and "problem     the decoder needs a trained CLIP" in text
    assert "params/unet/" in text
    assert "no problems found" in found["layout"]["text"]


def test_what_is_known_of_the_preset(found):
    assert found["clip"]["known"] == {} and "known " not in found["clip"]["text"]
    published, seconds = (found["paper"]["known"][k] for k in ("published", "seconds_per_step"))
    assert published[0]["value"] == 10.39 and seconds[2]["seconds"] < 1
    lines = found["paper"]["text"].splitlines()
    assert (
        "known       zero-shot FID of unCLIP with the diffusion prior, decoder guidance 1.25, "
        "MS-COCO 256x256, 30k: 10.39 (arXiv 2204.06125, Table 2)"
    ) in lines
    assert (
        "known       a step of 4,096 samples on 64 x TPU v5p (the compiler's estimate): "
        f"{seconds[2]['seconds']:g} s (docs/compile.md)"
    ) in lines
    assert set(found["decoder"]["known"]) == {"published"}


def test_the_workdir_does_not_keep_what_is_known(run_of):
    assert "known" not in json.loads((pathlib.Path(run_of("clip")) / "config.json").read_text())


@pytest.mark.slow
def test_exit_codes(shards, tmp_path):
    """0 with problems listed, 78 with --strict."""
    command = [
        sys.executable,
        "-m",
        "unclip",
        "doctor",
        "--config",
        "configs/clip.py:emoji,runlocal",
        "--workdir",
        str(tmp_path),
        "--json",
        "--strict",
        "--config.batch_size=9",
        "--config.mesh.data=1",
        f"--config.input.shards=('{shards['train']}',)",
        "--config.input.held_out=()",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["problems"] == []
    again = [*command, "--config.accumulate=2"]
    done = subprocess.run(
        again, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 78, done.stderr
    assert "batch_size 9" in json.loads(done.stdout)["problems"][0]
