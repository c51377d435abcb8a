"""The `--help` texts are kept in tests/verbs/help, so that a change of one is seen in its review.

    UNCLIP_WRITE_HELP=1 pytest tests/verbs/test_help.py

writes them anew. tests/test_docs.py checks the documentation's commands against the kept texts.
"""

import difflib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from unclip import cli

ROOT = pathlib.Path(__file__).parents[2]
KEPT = pathlib.Path(__file__).parent / "help"
VERBS = sorted(cli.available())
WRITE = "UNCLIP_WRITE_HELP"

# absl's flags belong to a process, so every verb has a fork of its own. What most verbs import is
# imported before, once; it uses no device, and neither may a verb: there is no such platform.
_HELP = """
import importlib, json, os, sys, tempfile, warnings
warnings.simplefilter("ignore")
for common in ("unclip.training.start", "unclip.cascade.pipeline", "ml_collections.config_flags"):
    importlib.import_module(common)
from unclip import cli
found = {}
for arguments in json.load(sys.stdin):
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    child = os.fork()
    if not child:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            cli.main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(getattr(sys.exc_info()[1], "code", 1) or 0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
    found[arguments[0].replace("--help", "unclip")] = [code, *texts]
print(json.dumps(found))
"""


def test_help_is_as_kept():
    """One test, so that the texts are made once however the suite is spread over processes."""
    done = subprocess.run(
        [sys.executable, "-c", _HELP],
        input=json.dumps([["--help"], *([verb, "--help"] for verb in VERBS)]),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "none", "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown.keys() == {"unclip", *VERBS}
    assert {verb: (code, err) for verb, (code, _, err) in shown.items() if code or err} == {}
    if os.environ.get(WRITE):
        KEPT.mkdir(exist_ok=True)
        for path in KEPT.glob("*.txt"):
            path.unlink()
        for verb, (_, out, _) in shown.items():
            (KEPT / f"{verb}.txt").write_text(out, "utf-8")
    kept = {path.stem: path.read_text("utf-8") for path in KEPT.glob("*.txt")}
    differences = []
    for verb in sorted(shown.keys() | kept.keys()):
        old, new = kept.get(verb, ""), shown.get(verb, ["", "", ""])[1]
        lines = [text.splitlines(keepends=True) for text in (old, new)]
        differences += difflib.unified_diff(*lines, f"help/{verb}.txt", f"{verb} --help")
    if differences:
        again = f"{WRITE}=1 pytest {pathlib.Path(__file__).relative_to(ROOT)}"
        pytest.fail(f"if this change is meant, {again}\n{''.join(differences)}", pytrace=False)


# What a verb's module imports, and the choices that it writes down so that it need not import more.
_LIGHT = """
import importlib, json, os, sys
from unclip import cli
for verb in cli.available():
    child = os.fork()  # absl's flags belong to a process
    if not child:
        module = importlib.import_module("unclip.verbs." + verb.replace("-", "_"))
        names = ("NAMES", "ALLOW", "FROM", "TO", "DTYPES", "FLAG")
        heavy = sorted({"jax", "flax", "orbax", "torch"} & sys.modules.keys())
        written = {name: getattr(module, name) for name in names if hasattr(module, name)}
        print(json.dumps([verb, heavy, written]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_no_help_imports_jax():
    """A text is no reason to wait for seconds; and what it names is what there is."""
    from unclip.cascade import bundle, spaces
    from unclip.embeddings import store
    from unclip.interop import formats
    from unclip.measure import table

    done = subprocess.run(
        [sys.executable, "-c", _LIGHT],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {verb: heavy for verb, heavy, _ in rows} == {verb: [] for verb in VERBS}, done.stderr
    written = {verb: found for verb, _, found in rows if found}
    dtypes = list(bundle.DTYPES)
    assert written == {
        "convert": {"FROM": list(formats.FROM), "TO": list(formats.TO), "DTYPES": dtypes},
        "embed": {"DTYPES": list(store.DTYPES)},
        "export": {"DTYPES": dtypes, "FLAG": spaces.FLAG},
        "metrics": {"NAMES": [*table.METRICS, *table.ALIASES], "ALLOW": list(table.ALLOW)},
    }
