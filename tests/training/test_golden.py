"""The first three steps of every stage at tiny size, against numbers kept in golden.json.

They move when initialisation, noise, input, loss or optimiser change, on purpose or not. After a
change that was meant, write them anew and say in the commit why they moved:

    UNCLIP_WRITE_GOLDEN=1 pytest tests/training/test_golden.py
"""

import json
import os
import pathlib

import pytest

from unclip.training.start import train

FILE = pathlib.Path(__file__).with_name("golden.json")
WRITE = bool(os.environ.get("UNCLIP_WRITE_GOLDEN"))
RUNS = {
    "clip": ("clip", "emoji,runlocal", {}),
    "clip, sigmoid, accumulated": (
        "clip",
        "emoji,loss=sigmoid,runlocal",
        {"accumulate": 2, "optim.sam_rho": 0.1},
    ),
    "prior": ("prior", "emoji,runlocal", {}),
    "decoder": ("decoder", "emoji,runlocal", {}),
    "upsampler": ("upsampler", "emoji,runlocal", {}),
}
# Rounding differs between processors and versions of JAX; a change of the method is far larger.
TOLERANCE = 1e-3
TIMES = ("compile_seconds", "images_per_second")

pytestmark = pytest.mark.usefixtures("cheap_runs")


def three_steps(name, tiny_config, run_of, workdir):
    stage, argument, changes = RUNS[name]
    if stage in ("prior", "decoder"):
        changes = {"clip": run_of("clip")} | changes
    steps = {"total_steps": 3, "log_steps": 1, "save_steps": 1000}
    train(tiny_config(stage, steps | changes, argument), str(workdir))
    found: dict[str, dict[str, float]] = {}
    for line in (workdir / "metrics.jsonl").open():
        values = json.loads(line)
        values = {k: v for k, v in values.items() if k not in ("time", *TIMES)}
        step = str(values.pop("step"))
        found[step] = found.get(step, {}) | values
    return {step: values for step, values in found.items() if values}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (", " in n or n == "decoder")) for n in RUNS],
)
def test_the_first_three_steps(name, tiny_config, run_of, tmp_path):
    found = three_steps(name, tiny_config, run_of, tmp_path)
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    if WRITE:
        FILE.write_text(json.dumps(kept | {name: found}, indent=1, sort_keys=True) + "\n")
        return
    assert sorted(found) == sorted(kept[name]) == ["1", "2", "3"]
    moved = [
        f"step {step}, {metric}: was {value:.6g}, now {found[step].get(metric)}"
        for step, values in kept[name].items()
        for metric, value in values.items()
        if found[step].get(metric) != pytest.approx(value, rel=TOLERANCE, abs=1e-6)
    ]
    new = [f"step {s}: {m} is new" for s, v in found.items() for m in v.keys() - kept[name][s]]
    assert not moved + new, (
        f"{name}: the first steps are no longer what they were:\n  "
        + "\n  ".join(moved + new)
        + "\nIf that was meant: UNCLIP_WRITE_GOLDEN=1 pytest tests/training/test_golden.py, and "
        "say why in the commit."
    )
