"""Where compiled programs are kept, whose folders are used, and that a second start finds them."""

import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from unclip import errors
from unclip.runtime import compiled

ROOT = pathlib.Path(__file__).parents[2]
MINE = {"XDG_CACHE_HOME", compiled.VARIABLE}


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """{setting of JAX: value} that `compiled` makes, made nowhere; the home is a new folder."""
    found = {}
    monkeypatch.setattr(compiled, "_set", found.__setitem__)
    monkeypatch.setitem(sys.modules, "jax", None)  # as before it is imported
    for name in MINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return found


def test_the_default_is_in_the_users_caches(settings, monkeypatch, tmp_path):
    folder = compiled.keep()
    assert folder.parent == compiled.default_folder()
    assert tmp_path in folder.parents and folder.name == compiled.machine()
    assert settings["jax_compilation_cache_dir"] == str(folder)
    assert settings["jax_compilation_cache_max_size"] == compiled.MAX_BYTES
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert compiled.default_folder() == tmp_path / "elsewhere" / "unclip" / "compiled"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert tmp_path in compiled.default_folder().parents


def test_what_wins(settings, monkeypatch, tmp_path):
    """The flag over the environment over the default."""
    monkeypatch.setenv(compiled.VARIABLE, str(tmp_path / "theirs"))
    assert compiled.keep() is None and settings == {} and list(tmp_path.iterdir()) == []
    assert compiled.keep(str(tmp_path / "given")).parent == tmp_path / "given"
    assert compiled.keep("off") is None and settings["jax_compilation_cache_dir"] is None
    compiled.keep_at("gs://bucket/compiled")
    assert settings["jax_compilation_cache_dir"] == "gs://bucket/compiled"
    assert settings["jax_compilation_cache_max_size"] == -1


def _a_file(folder):
    folder.parent.mkdir(parents=True)
    folder.write_text("")


def _open_to_all(folder):
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def _open_below(folder):
    (folder / compiled.machine()).mkdir(parents=True)
    (folder / compiled.machine()).chmod(0o775)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_a_file, "File exists"),
        (_open_to_all, "others may write to it"),
        (_open_below, "others may write to it"),
    ],
)
def test_a_folder_that_cannot_be_used(settings, spoil, said, capsys):
    """One line and no cache; an error where it was asked for."""
    spoil(compiled.default_folder())
    assert compiled.keep() is None and settings == {}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("unclip: compiled programs are not kept: ") and said in line
    assert str(compiled.default_folder()) in line
    with pytest.raises(errors.ConfigError, match=said):
        compiled.keep(str(compiled.default_folder()))


def test_a_folder_of_another_user(settings, monkeypatch, capsys):
    compiled.default_folder().mkdir(parents=True)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert compiled.keep() is None and "belongs to another user" in capsys.readouterr().err


def test_another_machine_has_another_folder(monkeypatch):
    here = compiled.machine()
    assert here == compiled.machine() and "/" not in here
    monkeypatch.setattr(compiled.platform, "processor", lambda: "another")
    assert compiled.machine() != here
    monkeypatch.undo()
    versions = {"jax": "0.10.2", "jaxlib": "99.0"}
    monkeypatch.setattr(compiled.importlib.metadata, "version", versions.get)
    assert compiled.machine() != here and "99.0" in compiled.machine()


def test_it_is_tidied(settings):
    """Half-written programs and folders that were long not used go; what is in use stays."""
    folder = compiled.keep()
    day = 86400
    other, old = (folder.parent / f"jax-9.{k}-x86_64-0" for k in range(2))
    for path in (other, old):
        path.mkdir()
        (path / "a-cache").write_text("")
    os.utime(old, (0, time.time() - (compiled.UNUSED_DAYS + 1) * day))
    foreign = folder.parent / "notes"
    foreign.mkdir()
    os.utime(foreign, (0, 0))
    for name in ("whole-cache", "whole-atime", "cut-cache", "young-cache"):
        (folder / name).write_text("x")
        if "young" not in name:
            os.utime(folder / name, (0, time.time() - day))
    compiled.keep()
    assert {path.name for path in folder.iterdir()} == {"whole-cache", "whole-atime", "young-cache"}
    assert other.exists() and foreign.exists() and not old.exists()


@pytest.mark.parametrize(
    ("platform", "flags", "tests", "level"),
    [
        ("cpu", "", False, {compiled.LEVEL: 1}),
        ("gpu", "", False, None),
        ("cpu", f"--{compiled.LEVEL}=3", False, None),
        ("cpu", "", True, None),
    ],
)
def test_code_generation_on_a_cpu(monkeypatch, platform, flags, tests, level):
    """LLVM's first level, unless the user chose one, or JAX was told not to optimise."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setenv("XLA_FLAGS", flags)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", tests)
    try:
        assert compiled.options() == level
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def test_the_level_changes_no_bit():
    """Of what random numbers and a network's layer compute; the option is one that XLA takes."""

    def compute(key, x):
        x = jax.numpy.tanh(x @ jax.random.normal(key, (16, 16)))
        return x / jax.numpy.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    given = jax.random.key(3), np.linspace(-1, 1, 8 * 16, dtype=np.float32).reshape(8, 16)
    levels = [jax.jit(compute, compiler_options={compiled.LEVEL: n})(*given) for n in (1, 3)]
    np.testing.assert_array_equal(*levels)


# A verb as small as one can be: the folder, and how often programs were found in it.
_VERB = """
import os
from absl import flags
from unclip import cli

COMPUTE = flags.DEFINE_bool("compute", False, "")

def main(argv):
    print(os.environ.get("JAX_COMPILATION_CACHE_DIR"))
    if COMPUTE.value:
        import jax
        heard = []
        jax.monitoring.register_event_listener(lambda event, **_: heard.append(event))
        draw = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), (8, 9, 10)))
        draw(0).block_until_ready()  # takes 0.5 s to compile
        print(sum("cache_hits" in event for event in heard))

if __name__ == "__main__":
    cli.run_app(main)
"""


@pytest.fixture
def verb(tmp_path):
    """verb(*flags) -> a process that runs it, in an environment that names no folder."""
    script = tmp_path / "verb.py"
    script.write_text(_VERB)
    drop = {*MINE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "caches")}

    def start(*arguments):
        command = [sys.executable, str(script), *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    return start


def said(process):
    """The lines that a process prints."""
    lines = process.communicate(timeout=120)[0].split()
    assert process.returncode == 0
    return lines


def test_every_verb_has_it_and_a_flag(verb, tmp_path):
    default = tmp_path / "caches" / "unclip" / "compiled" / compiled.machine()
    assert said(verb()) == [str(default)] and default.is_dir()
    assert said(verb("--compilation_cache=off")) == ["None"]
    moved = tmp_path / "moved"
    assert said(verb("--compilation_cache", str(moved))) == [str(moved / compiled.machine())]


@pytest.mark.slow
def test_a_second_start_finds_the_programs(verb):
    """Of several processes at once too, each of which may write the same program."""
    both = [said(process) for process in [verb("--compute"), verb("--compute")]]
    assert both[0][0] == both[1][0]
    assert int(said(verb("--compute"))[1]) > 0
    assert said(verb("--compute", "--compilation_cache=off"))[1] == "0"
