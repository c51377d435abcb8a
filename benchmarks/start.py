"""What a start costs: CPU seconds from a command to its first picture, or to its first step.

    python benchmarks/start.py --model runs/demo/model --out benchmarks/results/start.json

Every figure but the warm call is what a process of its own used, of all its threads, so other work
on the machine changes it little. "First" finds no compiled programs, "second" those that the first
kept. Without --model, a bundle of the demo's size is made of random weights; --short draws with few
steps, and leaves training out. Aims, in CPU seconds on one core of a server of 2024:

    generate, one picture     first 15     second 5     warm call 0.7
    train to its first step   first 12     second 6
    --help of a verb          0.2
"""

import argparse
import importlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import record
from unclip import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
STAGES = {
    "clip": ("clip", "emoji"),
    "prior": ("prior", "emoji"),
    "decoder": ("decoder", "emoji"),
    "upsampler_0": ("upsampler", "emoji-64"),
    "upsampler_1": ("upsampler", "emoji-256"),
}
_WARM = """
import sys, time
from unclip import UnCLIP
model = UnCLIP.load(sys.argv[1])
options = {"stages": 1} if sys.argv[2] == "short" else {}
seconds = []
for seed in range(4):
    start = time.process_time()
    model.generate("a red fox", seed=seed, **options)
    seconds.append(time.process_time() - start)
print(sorted(seconds[1:])[1])
"""


def cpu_seconds(command: list[str], caches: pathlib.Path) -> tuple[float, str]:
    """(CPU seconds, standard output) of a child whose folder of caches is `caches`.

    Raises:
      SystemExit: it failed.
    """
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(caches), "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, done.stdout


def random_bundle(folder: pathlib.Path) -> None:
    """Writes a bundle of the demo's architectures, random weights in every layer."""
    import jax
    import numpy as np

    from unclip import tasks
    from unclip.cascade import bundle
    from unclip.training.plan import as_json

    parts, rng = {}, np.random.default_rng(0)

    def leaf(shape):
        spread = np.prod(shape.shape[:-1], initial=1.0) ** -0.5 if len(shape.shape) > 1 else 0.02
        return np.float32(spread * rng.standard_normal(shape.shape) + (len(shape.shape) < 2))

    for name, (stage, preset) in STAGES.items():
        config = importlib.import_module(f"configs.{stage}").get_config(preset)
        arch, settings = as_json(config.arch), as_json(config.task)
        needed = {n: parts[n].arch for n in tasks.needs(stage, arch, settings)}
        task = tasks.make(stage, arch, settings, **needed)
        shapes = jax.eval_shape(task.init, jax.random.key(0))
        statistics = task.statistics_shapes() or {}
        extra = {n: np.full(s.shape, n == "std", np.float32) for n, s in statistics.items()}
        parts[name] = bundle.Part(name, arch, jax.tree.map(leaf, shapes), extra, settings)
    bundle.write(folder, parts)


def main() -> None:
    """Measures, prints a line a figure, keeps them where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="BUNDLE; default: random weights")
    parser.add_argument("--short", action="store_true", help="few steps, and no training")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for docs/speed.md")
    arguments = parser.parse_args()
    figures = []

    def tell(text: str, seconds: float) -> None:
        figures.append(record.figure(text, round(seconds, 3), "CPU s"))
        print(json.dumps({"figure": text, "cpu_seconds": round(seconds, 3)}), flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        model = arguments.model and arguments.model.resolve()
        if model is None:
            model = folder / "model"
            random_bundle(model)
        draw = ["-m", "unclip", "generate", "--model", str(model), "--prompt", "a red fox"]
        draw += ["--n", "1", "--out", str(folder / "out")]
        if arguments.short:
            draw += ["--stages", "1", "--steps", "2", "--prior_steps", "2"]
        for which in ("first", "second"):
            seconds, _ = cpu_seconds(draw, folder / "drawn")
            tell(f"generate --n 1, {which} process", seconds)
        kind = "short" if arguments.short else "whole"
        _, said = cpu_seconds(["-c", _WARM, str(model), kind], folder / "drawn")
        tell("generate, one picture, warm call", float(said))
        train = ["-m", "unclip", "train", "--config", "configs/clip.py:emoji,runlocal"]
        train += ["--config.total_steps=1", "--config.metric_examples=0"]
        train += ["--config.eval_examples=0", "--config.sample_examples=0"]
        for which in () if arguments.short else ("first", "second"):
            workdir = ["--workdir", str(folder / f"run-{which}")]
            seconds, _ = cpu_seconds([*train, *workdir], folder / "trained")
            tell(f"train clip:emoji,runlocal to its first step, {which} start", seconds)
        help_of = {
            v: cpu_seconds(["-m", "unclip", v, "--help"], folder)[0] for v in cli.available()
        }
        slowest = max(help_of, key=help_of.get)
        tell(f"--help of the slowest verb ({slowest})", help_of[slowest])
    if arguments.out:
        record.write(arguments.out, figures, device="cpu")


if __name__ == "__main__":
    main()
