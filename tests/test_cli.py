"""The command line: verbs, exit codes, and one clear line for every kind of mistake."""

import os
import pathlib
import subprocess
import sys

import pytest

import unclip
from unclip import cli

ROOT = pathlib.Path(__file__).parents[1]

APP = '''
"""Draws a number of pictures."""
import errno, os
from absl import app, flags
from ml_collections import config_flags
from unclip import cli, errors

CONFIG = config_flags.DEFINE_config_file("config")
COUNT = flags.DEFINE_integer("count", 4, "how many pictures")
MODE = flags.DEFINE_enum("mode", "text", ["text", "variations"], "what to make")
FAIL = flags.DEFINE_string("fail", "", "how to fail")
STEPS = flags.DEFINE_multi_integer("steps", [], "of every stage")
OUT = flags.DEFINE_multi_string("out", [], "folders")
PROMPT = flags.DEFINE_multi_string("prompt", [], "captions")

def main(argv):
    if FAIL.value == "numerics":
        raise errors.NumericsError("loss is\\nnot finite")
    if FAIL.value == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/x")
    if FAIL.value == "interrupt":
        raise KeyboardInterrupt
    if FAIL.value == "usage":
        raise app.UsageError("too many arguments")
    if FAIL.value == "pipe":
        for _ in range(100_000):
            print("a line of output that is not read")
    if FAIL.value == "defect":
        raise RuntimeError("ours")
    print(COUNT.value, MODE.value, CONFIG.value and CONFIG.value.optim.lr)
    print(*argv[1:], *OUT.value, *PROMPT.value)
    if CONFIG.value and "input" in CONFIG.value:
        print(CONFIG.value.input.to_dict())
    return 75 if FAIL.value == "stopped" else None

if __name__ == "__main__":
    cli.run_app(main)
'''

CONFIG = """
import ml_collections
from unclip import errors

def get_config(preset="emoji"):
    if preset == "boom":
        return {}["missing"]
    if preset == "kind":
        raise TypeError("wrong kind")
    if preset not in ("emoji", "paper"):
        try:
            {}[preset]
        except KeyError:
            raise errors.unknown("preset", preset, ["emoji", "paper"])
    config = ml_collections.ConfigDict(dict(total_steps=10, name="a", size=(64, 64)))
    config.optim = ml_collections.ConfigDict(dict(lr=0.1, beta=0.9, on=True))
    config.input = ml_collections.ConfigDict(dict(shards=("x.tar",), parts=(), where={}))
    return config
"""


# What stands for the configs that come with unclip, and a file of the user's under such a name.
OURS = """
import ml_collections
from configs import common

def get_config(arg="emoji"):
    common.check(arg)
    return ml_collections.ConfigDict(dict(optim=dict(lr=0.3), arg=arg))
"""
COMMON = """
from unclip import errors

def check(preset):
    if preset.partition(",")[0] not in ("emoji", "ViT-L/14"):
        raise errors.unknown("preset", preset, ["emoji", "ViT-L/14"])
"""


@pytest.fixture(scope="module")
def app_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    (folder / "draw.py").write_text(APP)
    (folder / "decoder.py").write_text(CONFIG)
    (folder / "broken.py").write_text("def get_config(:\n")
    ours = folder / "shipped" / "configs"
    ours.mkdir(parents=True)
    for name, text in {"clip": OURS, "prior": OURS, "common": COMMON}.items():
        (ours / f"{name}.py").write_text(text)
    (folder / "configs").mkdir()
    (folder / "configs" / "clip.py").write_text(OURS.replace("0.3", "0.7"))
    return folder / "draw.py"


# Every case runs in this one process: absl's flags are global, so each is a fork with fresh flags.
RUNNER = """
import os, pathlib, runpy, sys
import absl.app, ml_collections.config_flags, unclip.cli
from unclip.files import shipped
shipped.ROOT = pathlib.Path("shipped").absolute()
for number, line in enumerate(open(sys.argv[1]).read().splitlines()):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        out = open(f"{sys.argv[1]}.{number}", "w")
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        sys.argv = line.split("\\t")
        runpy.run_path(sys.argv[0], run_name="__main__")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(code)
"""

CASES = {
    "plain": ([], 0, ["4 text None"]),
    "config": (["--config=decoder.py:paper", "--config.optim.lr=0.5"], 0, ["4 text 0.5"]),
    "stopped": (["--fail=stopped"], 75, []),
    "numerics": (["--fail=numerics"], 70, ["unclip draw: loss is not finite"]),
    "disk": (["--fail=disk"], 74, ["No space left on device: /runs/x"]),
    "interrupt": (["--fail=interrupt"], 130, ["interrupted"]),
    "usage": (["--fail=usage"], 78, ["unclip draw: too many arguments"]),
    "unknown_flag": (["--cuont=3"], 78, ["'--cuont'", "did you mean '--count'"]),
    "bad_integer": (["--count=many"], 78, ["--count=many: expected a whole number"]),
    "bad_enum": (["--mode=txt"], 78, ["unknown --mode 'txt'", "did you mean 'text'"]),
    "no_file": (["--config=decodr.py"], 78, ["'decodr.py'", "did you mean decoder.py"]),
    "no_file_override": (["--config", "x.py", "--config.a=1"], 78, ["no config file 'x.py'"]),
    "preset": (["--config=decoder.py:emojy"], 78, ["preset 'emojy'", "did you mean 'emoji'"]),
    "field": (
        ["--config=decoder.py", "--config.optim.lrr=1"],
        78,
        ["--config.optim.lrr", "did you mean --config.optim.lr?", "beta, lr, on"],
    ),
    "field_elsewhere": (
        ["--config=decoder.py", "--config.lr=1"],
        78,
        ["did you mean --config.optim.lr?", "valid below --config: input, name, optim"],
    ),
    "field_below_leaf": (["--config=decoder.py", "--config.name.x=1"], 78, ["no such field"]),
    "field_value": (
        ["--config=decoder.py", "--config.total_steps=x"],
        78,
        ["--config.total_steps=x: expected a whole number"],
    ),
    "bad_integers": (
        ["--steps=8,4"],
        78,
        ["--steps=8,4: expected a whole number; repeat the flag for several"],
    ),
    "field_number": (
        ["--config=decoder.py", "--config.optim.lr=fast"],
        78,
        ["--config.optim.lr=fast: expected a number"],
    ),
    "field_truth": (
        ["--config=decoder.py", "--config.optim.on=x"],
        78,
        ["--config.optim.on=x: expected true or false"],
    ),
    "field_mapping": (
        ["--config=decoder.py", "--config.input.where=food"],
        78,
        ["--config.input.where=food: expected fields and their values", "{'field': 'value'}"],
    ),
    "list": (["--config=decoder.py", "--config.size=32,16"], 0, ["4 text 0.1"]),
    "list_of_words": (
        ["--config=decoder.py", "--config.input.shards=a-{0,1}.tar, b.tar"],
        0,
        ["'shards': ('a-{0,1}.tar', 'b.tar')"],
    ),
    "list_range": (
        ["--config=decoder.py", "--config.input.shards", "~/a-{000..010}.tar"],
        0,
        ["'shards': ('~/a-{000..010}.tar',)"],
    ),
    "list_in_python": (
        ["--config=decoder.py", "--config.input.shards=('a,b.tar',)"],
        0,
        ["'shards': ('a,b.tar',)"],
    ),
    "list_in_parts": (
        ["--config=decoder.py", "--config.input.shards=a,b", "--config.input.shards=c"],
        0,
        ["'shards': ('a', 'b', 'c')"],
    ),
    "list_of_none": (["--config=decoder.py", "--config.input.shards="], 0, ["'shards': ()"]),
    "list_of_numbers": (
        ["--config=decoder.py", "--config.input.parts=0.5,0.25"],
        0,
        ["'parts': (0.5, 0.25)"],
    ),
    "list_unquoted": (
        ["--config=decoder.py", "--config.input.shards=(a.tar,b.tar)"],
        78,
        ["--config.input.shards=(a.tar,b.tar): expected a list such as x.tar or \"('x.tar',)\""],
    ),
    "list_half_quoted": (
        ["--config=decoder.py", "--config.input.shards='a.tar,b.tar"],
        78,
        ["--config.input.shards='a.tar,b.tar: expected a list such as"],
    ),
    "list_of_another_kind": (
        ["--config=decoder.py", "--config.size=wide"],
        78,
        ['--config.size=wide: expected a list such as 64,64 or "(64, 64)"'],
    ),
    "where": (
        [
            *("--config=decoder.py", "--config.input.where.group=food & drink,animals"),
            *("--config.input.where.n", "3", "--config.input.where.alive=true"),
        ],
        0,
        ["'where': {'alive': (True,), 'group': ('food & drink', 'animals'), 'n': (3,)}"],
    ),
    "home": (
        ["--out=~/runs", "--out", "~", "--out=a~b", "--prompt=~/x", "~/pictures"],
        0,
        ["/home/me/pictures /home/me/runs /home/me a~b ~/x"],
    ),
    "config_at_home": (["--config=~/decodr.py"], 78, ["no config file '/home/me/decodr.py'"]),
    "field_alone": (["--config.optim.lr=1"], 78, ["wants --config=FILE before it"]),
    "field_first": (["--config.name=b", "--config=decoder.py"], 78, ["before a value"]),
    "named": (["--config=prior:emoji,x", "--config.optim.lr=0.5"], 0, ["4 text 0.5"]),
    "named_apart": (["--config", "clip:ViT-L/14", "--config.arg", "b"], 0, ["4 text 0.3"]),
    "named_after": (["--count=7", "--config=prior"], 0, ["7 text 0.3"]),
    "named_by_path": (["--config", "configs/prior.py:emoji"], 0, ["4 text 0.3"]),
    "path_wins": (["--config=configs/clip.py"], 0, ["4 text 0.7"]),
    "no_name": (["--config=priro:emoji"], 78, ["no config 'priro'; did you mean prior?"]),
    "no_name_apart": (["--config", "zzz"], 78, ["no config 'zzz'; valid: clip, prior"]),
    "no_file_by_name": (["--config=configs/priro.py"], 78, ["priro.py'; did you mean prior?"]),
    "shared_name": (["--config=common"], 78, ["no config 'common'"]),
    "named_preset": (["--config=prior:emojy"], 78, ["preset 'emojy'", "did you mean 'emoji'"]),
    "named_field": (["--config", "clip", "--config.optim.lrr=1"], 78, ["--config.optim.lr?"]),
    "syntax": (["--config=broken.py"], 78, ["broken.py:1", "SyntaxError"]),
    "raises": (["--config=decoder.py:boom"], 78, ["decoder.py:7: KeyError: 'missing'"]),
    "type_error": (["--config=decoder.py:kind"], 78, ["decoder.py:9: TypeError: wrong kind"]),
    "help": (["--help"], 0, ["Draws a number of pictures.", "--count", "(default: 4)"]),
}


@pytest.fixture(scope="module")
def outcomes(app_file):
    listing = app_file.parent / "cases"
    lines = ["\t".join([str(app_file), *arguments]) for arguments, _, _ in CASES.values()]
    listing.write_text("\n".join(lines))
    ran = subprocess.run(
        [sys.executable, "-c", RUNNER, str(listing)],
        cwd=app_file.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": "/home/me"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    codes = list(map(int, ran.stdout.split()))
    outputs = [pathlib.Path(f"{listing}.{n}").read_text() for n in range(len(CASES))]
    return dict(zip(CASES, zip(codes, outputs)))


@pytest.mark.parametrize("case", CASES)
def test_exit_code_and_message(outcomes, case):
    _, code, texts = CASES[case]
    got, output = outcomes[case]
    assert got == code, output
    for text in texts:
        assert text in output
    if code not in (0, 75):
        assert len(output.splitlines()) == 1, output
        assert output.startswith("unclip draw: ")


def _run(*args, **kwargs):
    return subprocess.run(
        [sys.executable, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        **kwargs,
    )


def test_a_defect_keeps_its_traceback(app_file):
    ran = _run(app_file, "--fail=defect")
    assert ran.returncode == 1
    assert "Traceback" in ran.stderr and "RuntimeError: ours" in ran.stderr


def test_closed_pipe_is_quiet(app_file):
    process = subprocess.Popen(
        [sys.executable, str(app_file), "--fail=pipe"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 141


@pytest.mark.parametrize("command", [["-m", "unclip", "--help"], ["draw.py", "--count=3"]])
def test_output_that_nobody_reads_is_no_defect(app_file, command):
    # So short that it is written when the process ends.
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(
        [sys.executable, *command],
        cwd=app_file.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (141, b"")


@pytest.mark.parametrize("flag", ["--version", "-version"])
def test_version(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([flag])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"unclip {unclip.__version__}\n"


def test_unknown_verb_names_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(cli, "available", lambda: {"train": "", "generate": ""})
    with pytest.raises(SystemExit) as stopped:
        cli.main(["genrate"])
    assert stopped.value.code == 78
    error = capsys.readouterr().err
    assert error.startswith("unclip: unknown verb 'genrate': did you mean 'generate'?")
    assert len(error.splitlines()) == 1


def test_only_verbs_with_a_module_are_offered(monkeypatch, capsys):
    monkeypatch.setattr(cli, "VERBS", {"export": "one that exists", "nothing-here": "one not"})
    assert list(cli.available()) == ["export"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "one that exists" in shown and "one not" not in shown


def test_no_verb_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 78
    assert "usage: unclip VERB" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    def absent(name):
        raise ModuleNotFoundError("No module named 'gradio'", name="gradio")

    monkeypatch.setattr(cli, "available", lambda: {"studio": ""})
    monkeypatch.setattr(cli.importlib, "import_module", absent)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["studio"])
    assert stopped.value.code == 78
    assert "'gradio'" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    script = (
        "import sys, unclip.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'jax', 'flax', 'numpy', 'PIL', 'matplotlib'} & set(sys.modules)))"
    )
    ran = _run("-c", script)
    assert ran.stdout.splitlines()[-1] == "[]", ran.stdout + ran.stderr


def test_a_stop_before_the_work_began_can_be_resumed():
    """SIGTERM while the verb's libraries are still being imported."""
    code = """
import importlib, os, signal, time
from unclip import cli

def slow(name):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)

importlib.import_module = slow
cli.main(["train"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    assert done.stderr == "unclip train: SIGTERM before it began; the same command starts it\n"
