"""A wheel, made from the source distribution and installed alone, does without the checkout."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from unclip import __version__

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What needs files that are no modules: the vocabulary, the emoji's shards, the report's template.
USE = """
import hashlib, json, pathlib
from unclip import protocols
from unclip.files import report
from unclip.input.decode.text import Tokenizer
held_out = protocols.make("emoji-held-out", size=16)
scenes = protocols.make("scenes", count=3, size=16)
print(json.dumps({
    "tokens": Tokenizer().encode(["a red apple, café"], 16)[0].tolist(),
    "held_out": [len(held_out.prompts), held_out.provenance["shards_sha256"]],
    "picture": hashlib.sha256(held_out.reference().read(0).tobytes()).hexdigest(),
    "scenes": scenes.prompts,
    "templates": sorted(path.name for path in report.TEMPLATES.iterdir()),
}))
"""
MICRO = {
    "embed_dim": 16,
    "image_size": 16,
    "patch_size": 8,
    "vision_width": 16,
    "vision_layers": 1,
    "vision_heads": 2,
    "text_width": 16,
    "text_layers": 1,
    "text_heads": 2,
}


def _run(folder, package, *args):
    """stdout of Python in `folder` with the unclip of `package`."""
    environment = os.environ | {
        "PYTHONPATH": str(package),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    ran = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The folder that a wheel is installed in; nothing is written into the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    inherited = os.environ.get("PYTHONPATH", "")
    pip = ("-m", "pip", "-q", "--disable-pip-version-check")
    egg_info, sdist = ("egg_info", "--egg-base", folder), ("sdist", "--dist-dir", folder)
    _run(ROOT, inherited, "setup.py", "-q", *egg_info, *sdist)
    (source,) = folder.glob("*.tar.gz")
    build = ("wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, source)
    _run(folder, inherited, *pip, *build)
    (built,) = folder.glob("*.whl")
    _run(folder, inherited, *pip, "install", "--no-deps", "--target", folder / "site", built)
    return folder / "site"


@pytest.fixture
def unclip(wheel, tmp_path):
    """unclip(*arguments): stdout of the installed `unclip` in an empty folder."""
    return lambda *arguments: _run(tmp_path, wheel, "-m", "unclip", *arguments)


def test_it_is_the_wheel_that_runs(wheel, tmp_path):
    script = "import unclip; from unclip.files import shipped; print(unclip.__file__, shipped.ROOT)"
    file, root = _run(tmp_path, wheel, "-c", script).split()
    assert file == str(wheel / "unclip" / "__init__.py")
    assert root == str(wheel / "unclip" / "_shipped")


def test_it_holds_every_module_and_nothing_else_on_top(wheel):
    modules = lambda folder: {p.relative_to(folder) for p in (folder / "unclip").rglob("*.py")}
    shipped = {p for p in modules(wheel) if "_shipped" in p.parts}
    assert modules(wheel) - shipped == modules(ROOT)
    assert {p.name for p in shipped} == {p.name for p in (ROOT / "configs").glob("*.py")}
    tops = {path.name for path in wheel.iterdir()} - {"bin"}
    assert tops == {"unclip", f"unclip-{__version__}.dist-info"}


def test_what_is_read_beside_the_modules_is_the_same(wheel, tmp_path):
    assert json.loads(_run(tmp_path, wheel, "-c", USE)) == json.loads(
        _run(tmp_path, ROOT, "-c", USE)
    )


def test_version(unclip):
    assert unclip("--version") == f"unclip {__version__}\n"


def test_the_command_is_there(wheel, tmp_path):
    assert _run(tmp_path, wheel, wheel / "bin" / "unclip", "--version").startswith("unclip ")


@pytest.mark.parametrize("config", ["decoder:karlo,scratch", "configs/upsampler.py:emoji-64"])
def test_configs_by_name(unclip, config):
    found = json.loads(unclip("doctor", "--json", "--config", config, "--config.seed=3"))
    assert found["preset"] in config
    assert [problem for problem in found["problems"] if "trained CLIP" not in problem] == []


def test_a_config_of_ones_own_starts_from_ours(unclip, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from configs import clip\n"
        "def get_config(arg):\n"
        "    config = clip.get_config(arg)\n"
        "    config.batch_size = 3\n"
        "    return config\n"
    )
    assert "stage       clip" in unclip("doctor", "--config=mine.py:emoji,runlocal")


def test_two_steps_of_training(unclip, tmp_path):
    arch = [f"--config.arch.{name}={value}" for name, value in MICRO.items()]
    config = ("--config=clip:emoji,runlocal", "--config.metric_examples=0")
    unclip("train", *config, *arch, "--workdir=run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert any("loss" in json.loads(line) for line in lines)
