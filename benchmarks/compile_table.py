"""The table of docs/compile.md: every paper-size stage compiled for four TPU generations.

    python benchmarks/compile_table.py --out runs/compile_table

Each cell is one run of `unclip compile` in a process of its own, so that its memory is returned,
and one JSON file in --out; a cell whose file exists is not compiled again. --stages and --chips
choose cells; --parallel runs several at once; --quick leaves out code generation and with it the
estimated seconds. The table of all finished cells is printed last; --record FILE.json keeps their
figures for docs/speed.md.
"""

import argparse
import concurrent.futures
import json
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import record

ROOT = record.ROOT

SLICES = {"v4": "v4:4x4x4", "v5e": "v5e:8x8", "v5p": "v5p:4x4x4", "v6e": "v6e:8x8"}
# stage -> (config, {generation: slices of a batch}); "" is for the others. The batch is the
# paper's; where a chip cannot hold its rows at once, they are processed in slices.
STAGES = {
    "CLIP ViT-H/16": ("configs/clip.py:paper", {"v5e": 8, "v5p": 8, "": 4}),
    "diffusion prior": ("configs/prior.py:paper", {"v5e": 8, "v5p": 1, "": 4}),
    "AR prior": ("configs/prior.py:paper,kind=ar", {"v5e": 8, "v5p": 1, "": 4}),
    "decoder 64": ("configs/decoder.py:paper", {"v5e": 8, "v5p": 1, "": 4}),
    "upsampler 256": ("configs/upsampler.py:paper-256", {"v5e": 4, "v5p": 1, "": 2}),
    "upsampler 1024": ("configs/upsampler.py:paper-1024", {"v5e": 4, "v5p": 1, "": 2}),
}
# What is recomputed: chips of 95 GiB hold nearly everything.
REMAT = {"v5p": "text=dots_saveable", "": "nothing_saveable"}
# These compile in a third less time; a step is estimated a few percent slower. See docs/compile.md.
OPTIONS = (
    "xla_tpu_scoped_vmem_limit_kib=12288",
    "xla_jf_use_multi_colors_in_all_reduce_if_supported=false",
)


def compile_cell(out: pathlib.Path, stage: str, chip: str, limit: float, quick: bool) -> str:
    """Runs one cell unless its file exists; returns a line about it."""
    path = _cell(out, stage, chip)
    if path.exists():
        return f"{path.name}: there already"
    config, slices = STAGES[stage]
    command = [sys.executable, "-m", "unclip", "compile", "--json", f"--config={config}"]
    command += [f"--topology={SLICES[chip]}", "--config.arch.fold=True"]
    command += [f"--config.accumulate={slices.get(chip, slices[''])}"]
    command += [f"--config.arch.remat={REMAT.get(chip, REMAT[''])}"]
    command += [f"--option={option}" for option in OPTIONS] + ["--quick"] * quick
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{path.name}: not done in {limit:.0f} s"
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        return f"{path.name}: exit code {done.returncode}: {last[0]}"
    found = json.loads(done.stdout)
    found["accumulate"] = slices.get(chip, slices[""])
    path.write_text(json.dumps(found, indent=1))
    return f"{path.name}: {found['compile_seconds']['wall']:.0f} s"


def table(out: pathlib.Path) -> str:
    """Markdown: a row per compiled cell, in the order of STAGES and SLICES."""
    lines = [
        "| stage | slice | batch / slices | trained | arguments | temporaries | fits | "
        "model FLOPs | estimate s | utilisation | collectives GiB (s) | compile s (CPU) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(stage, cell) for stage, cell in finished(out)]
    return "\n".join(lines)


def finished(out: pathlib.Path) -> list[tuple[str, dict]]:
    """(stage, what `unclip compile` found) of every cell with a file, in the table's order."""
    paths = [(stage, _cell(out, stage, chip)) for stage in STAGES for chip in SLICES]
    return [(stage, json.loads(path.read_text())) for stage, path in paths if path.exists()]


def figures(out: pathlib.Path) -> list[dict]:
    """What is kept of the finished cells: temporaries of a chip; where code was generated, the
    compiler's estimate of a step too."""
    kept = []
    for stage, cell in finished(out):
        what = f"{stage}, {cell['rows']:,} rows on {cell['topology']}, by the compiler"
        temporaries = cell["memory_per_chip"].get("temporaries")
        for text, value, unit, against in (
            ("temporaries of a chip", temporaries and temporaries / 2**30, "GiB", None),
            ("a step", cell["estimated_seconds"], "s", None),
            ("utilisation", cell["utilisation"], "", "bfloat16 peak of the chip"),
        ):
            if value is not None:
                kept.append(record.figure(f"{what}: {text}", value, unit, against))
    return kept


def _cell(out: pathlib.Path, stage: str, chip: str) -> pathlib.Path:
    return out / f"{stage.replace(' ', '-').replace('/', '-')}_{chip}.json"


def _row(stage: str, found: dict) -> str:
    memory, took = found["memory_per_chip"], found["compile_seconds"]
    gib = lambda value: f"{value / 2**30:.1f} GiB" if value is not None else "–"
    number = lambda value, digits: f"{value:.{digits}f}" if value is not None else "–"
    collectives = found["collectives"] or {}
    moved = sum(kind["bytes"] for kind in collectives.values()) / 2**30
    shown = f"{moved:.0f} ({number(found['communication_seconds'], 2)})" if collectives else "–"
    return (
        f"| {stage} | {found['topology']} | {found['rows']:,} / {found['accumulate']} | "
        f"{found['trained_parameters'] / 1e9:.2f} B | {gib(memory.get('arguments'))} | "
        f"{gib(memory.get('temporaries'))} | {'yes' if found['fits'] else 'no'} | "
        f"{found['flops']['model']:.3g} | {number(found['estimated_seconds'], 2)} | "
        f"{number(found['utilisation'], 2)} | {shown} | "
        f"{took['wall']:.0f} ({took['cpu']:.0f}) |"
    )


def main() -> None:
    """Reads the flags, compiles what is missing, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "compile_table")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--chips", nargs="+", default=list(SLICES), choices=list(SLICES))
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--limit_seconds", type=float, default=3600)
    parser.add_argument("--quick", action="store_true", help="no code generation, no estimate")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    parser.add_argument("--record", help="FILE.json that keeps the figures of all finished cells")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cells = [(stage, chip) for chip in arguments.chips for stage in arguments.stages]
    with concurrent.futures.ThreadPoolExecutor(arguments.parallel) as pool:
        run = lambda cell: compile_cell(
            arguments.out, *cell, arguments.limit_seconds, arguments.quick
        )
        for line in pool.map(run, [] if arguments.table else cells):
            print(line, file=sys.stderr, flush=True)
    print(table(arguments.out))
    if arguments.record:
        record.write(arguments.record, figures(arguments.out))


if __name__ == "__main__":
    main()
