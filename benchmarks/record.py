"""What the benchmarks measured, kept as JSON; the table of docs/speed.md is made from it.

    python benchmarks/stages.py --preset emoji --out benchmarks/results/stages.json
    python benchmarks/record.py

The first line is any benchmark, which writes one file; the second rewrites the table, with a row
for every figure of every file in benchmarks/results.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "speed.md"
BEGIN = "<!-- table: python benchmarks/record.py -->"
END = "<!-- end of table -->"


def figure(text: str, value: float, unit: str = "", against: str | None = None) -> dict[str, Any]:
    """One measured number.

    Args:
      text: what was measured, such as "prior, preset emoji, batch 2: a step".
      value: the number, in `unit`.
      unit: such as "s", "images/s"; "×" for a ratio, "" for a plain number.
      against: what a ratio is relative to, None for what stands alone.
    """
    return {"figure": text, "value": value, "unit": unit, "against": against}


def write(
    path: str | os.PathLike, figures: Sequence[Mapping[str, Any]], *, device: str | None = None
) -> None:
    """Stores the figures of this process's benchmark, with its command and this machine.

    Args:
      path: the JSON file; its folder is made.
      figures: of `figure`.
      device: JAX's name of what computed ("cpu", "NVIDIA H100 80GB HBM3"), None without JAX.
    """
    found = {"command": command(), "machine": machine(device), "figures": list(figures)}
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


def command() -> str:
    """This process's command line; the script's path is relative to the repository."""
    script = pathlib.Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", name, *sys.argv[1:]])


def machine(device: str | None = None) -> dict[str, Any]:
    """{"cpu", "cores", "device", "python", "jax"}: cores are those this process may use."""
    cores = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu(),
        "cores": len(cores(0)) if cores else os.cpu_count(),
        "device": device,
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
    }


def _cpu() -> str:
    """The processor's name as Linux gives it, else its architecture."""
    info = pathlib.Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for every figure, in the order given.

    Args:
      results: what `write` stored, a file each.
    """
    lines = ["| figure | value | against | machine | command |", "|---|---|---|---|---|"]
    for found in results:
        where = _where(found["machine"])
        for row in found["figures"]:
            value = f"{_number(row['value'])} {row['unit']}".strip()
            cells = (row["figure"], value, row["against"] or "–", where, f"`{found['command']}`")
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def _where(about: Mapping[str, Any]) -> str:
    """A machine in a cell: the accelerator where one computed, the processor and its cores."""
    cores = f"{about['cores']} core{'s' if about['cores'] != 1 else ''}"
    parts = [f"{about['cpu']}, {cores}", f"Python {about['python']}"]
    if about["device"]:
        device = [about["device"]] if about["device"] != "cpu" else []
        parts = [*device, *parts, f"JAX {about['jax']}"]
    return ", ".join(parts)


def _number(value: float) -> str:
    """Three digits, more where they stand before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def read(folder: pathlib.Path = RESULTS) -> list[dict[str, Any]]:
    """What `write` stored in a folder, by file name."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]


def page(text: str, results: Sequence[Mapping[str, Any]]) -> str:
    """A page with the table between its two marks made anew.

    Raises:
      SystemExit: the page does not hold the marks, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in old + after or END in before + after:
        raise SystemExit(f"the page must hold {BEGIN} and then {END}, once each")
    return f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}"


def main() -> None:
    """Rewrites the table of docs/speed.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    results = read()
    PAGE.write_text(page(PAGE.read_text("utf-8"), results), "utf-8")
    count = sum(len(found["figures"]) for found in results)
    print(f"{PAGE.relative_to(ROOT)}: {count} figures of {len(results)} files")


if __name__ == "__main__":
    main()
