"""The paper's ablation at small scale: what the decoder is given, and which prior draws it.

Sections 5.1 to 5.3 of arXiv 2204.06125 compare, over guidance, a decoder given only the caption,
given z_t in place of z_i, and given z_i drawn by an autoregressive or a diffusion prior. Here the
same is trained and swept on captioned scenes of one emoji on a coloured background, 16 pixels wide:

    python launch/ablation.py --out runs/ablation

composes the scenes, trains CLIP, a second CLIP that only judges, three decoders and two priors,
runs `unclip evaluate --config configs/evaluate.py:ablation`, and prints where the outcome agrees
with the paper. `--out`/evaluation/report.html has the table, the curves and the pictures.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

from lanes import ROOT, Job, Lanes, training_jobs

SCENES = 20_000  # of which a fifth are of one object, large or huge
SIZE = 16
CLIP = ("--config.arch.image_size=16", "--config.arch.patch_size=4", "--config.arch.context=16")
CLIP += ("--config.batch_size=128",)
DECODER = ("--config.batch_size=64",)
PRIOR = ("--config.batch_size=64", "--config.arch.context=16", "--config.stored_embeddings")
# (folder, config, steps, flags). The lanes take about equally long on two processors.
LANES = (
    (
        ("clip", "clip.py:emoji", 200, CLIP),
        ("decoder", "decoder.py:emoji", 900, (*DECODER, "--config.task.z_scale=11.3")),
        ("decoder_caption", "decoder.py:emoji", 900, (*DECODER, "--config.arch.use_z_i=False")),
    ),
    (
        ("judge", "clip.py:emoji", 200, (*CLIP, "--config.seed=1")),
        (
            "decoder_z_t",
            "decoder.py:emoji",
            900,
            (*DECODER, "--config.task.z_scale=11.3", "--config.task.embedding=text"),
        ),
        ("prior", "prior.py:emoji", 800, PRIOR),
        ("prior_ar", "prior.py:emoji,kind=ar", 600, PRIOR),
    ),
)
# What the paper's decoder is given -> the runs that the sweep draws it with.
MODELS = {
    "text_only": {"decoder": "decoder_caption"},
    "z_t_own": {"decoder": "decoder_z_t"},
    "ar": {"prior": "prior_ar"},
}


def scenes(out: pathlib.Path, count: int) -> dict[str, str]:
    """Training and held-out shards of composed scenes: {"shards", "held_out"} as globs."""
    found = {}
    for name, number, seed in (("shards", count, 0), ("held_out", max(count // 10, 200), 2)):
        folder = out / name
        if not folder.is_dir():
            command = ["--scenes", number, "--size", SIZE, "--seed", seed, "--out", folder]
            script = ROOT / "data" / "emoji" / "prepare.py"
            subprocess.run([sys.executable, script, *map(str, command)], check=True)
        found[name] = str(folder / "*.tar")
    return found


def trainings(out: pathlib.Path, shards: dict[str, str], scale: float) -> list[list[Job]]:
    """The lanes of `LANES` as commands."""
    lanes = [[(name, f"{c},theme=scenes", *rest) for name, c, *rest in lane] for lane in LANES]
    options = [f"--config.input.{name}=('{glob}',)" for name, glob in shards.items()]
    options += ["--config.input.captions=('txt',)", "--config.metric_examples=64"]
    options.append(f"--config.compilation_cache={out / 'compiled'}")
    return training_jobs(out, lanes, scale, warmup=100, options=options)


def evaluations(
    out: pathlib.Path, count: int, jobs: int, guidance: list[float] | None = None
) -> list[list[Job]]:
    """The sweep as the jobs of an array, one per lane."""
    command = ["evaluate", "--config=configs/evaluate.py:ablation"]
    command += [f"--workdir={out / 'evaluation'}", f"--config.protocol.count={count}"]
    command += [f"--config.{part}={out / part}" for part in ("clip", "prior", "decoder")]
    command.append(f"--config.clip_for_scores={out / 'judge'}")
    command.append(f"--config.compilation_cache={out / 'compiled'}")
    command += ["--config.sweep.sampler=('dpm++2m',)", "--config.sweep.steps=(12,)"]
    if guidance:
        command.append(f"--config.sweep.guidance={tuple(guidance)}")
    for model, parts in MODELS.items():
        command += [f"--config.models.{model}.{p}={out / run}" for p, run in parts.items()]
    job = lambda i: [*command, f"--array_index={i}", f"--array_count={jobs}"]
    return [[Job(f"evaluate_{i}", job(i))] for i in range(jobs)]


def main() -> None:
    """Composes, trains, evaluates, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "ablation")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies steps and pictures")
    parser.add_argument("--guidance", type=float, nargs="+", help="scales; default: the config's")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    shards = scenes(out, max(400, round(SCENES * arguments.scale)))
    lanes = Lanes(out)
    print(f"training in {out}; logs in {out / 'logs'}", file=sys.stderr)
    lanes.run(trainings(out, shards, arguments.scale))
    pictures = max(8, round(400 * arguments.scale))
    lanes.run(evaluations(out, pictures, 2, arguments.guidance))
    minutes = (time.monotonic() - lanes.started) / 60
    print(f"{minutes:.1f} minutes, {lanes.peak / 2**30:.2f} GiB at most", file=sys.stderr)
    for claim in json.loads((out / "evaluation" / "findings.json").read_text())["claims"]:
        values = " against ".join(_short(claim[name]) for name in ("value", "other value"))
        print(f"{claim['here']:14}  {claim['the paper says']}: {claim['measured']}: {values}")
    print(out / "evaluation" / "report.html")


def _short(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    main()
