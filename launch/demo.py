"""`make demo`: trains the whole cascade on a theme of the embedded emoji and draws from captions.

Runs the same verbs a user runs, with small numbers: `unclip train` for CLIP, decoder, prior and the
two upsamplers (16 -> 64 -> 256), `unclip export`, then `UnCLIP.load(...).generate(...)`. Two lanes
train side by side. Writes `report.html` (one file, opens offline) and `summary.json`.
"""

import argparse
import json
import pathlib
import shutil
import sys
import time

import numpy as np
from lanes import ROOT, Job, Lanes, training_jobs

PROMPTS = 32
# (run's folder, config, steps, flags). A lane's trainings run one after another.
LANES = (
    (
        ("clip", "clip.py:emoji,theme={theme}", 100, ("--config.batch_size=82",)),
        ("decoder", "decoder.py:emoji,theme={theme}", 900, ("--config.stored_embeddings",)),
    ),
    (
        ("upsampler_0", "upsampler.py:emoji-64,theme={theme}", 700, ()),
        ("upsampler_1", "upsampler.py:emoji-256,theme={theme}", 700, ()),
        (
            "prior",
            "prior.py:emoji,theme={theme}",
            400,
            ("--config.batch_size=41", "--config.stored_embeddings"),
        ),
    ),
)


def trainings(out: pathlib.Path, theme: str, scale: float) -> list[list[Job]]:
    """The lanes of `LANES` as commands."""
    lanes = [[(name, c.format(theme=theme), *rest) for name, c, *rest in lane] for lane in LANES]
    # The report measures the cascade itself.
    return training_jobs(out, lanes, scale, warmup=30, options=("--config.metric_examples=0",))


def export(demo: Lanes) -> pathlib.Path:
    """The bundle of the five runs."""
    bundle = demo.out / "model"
    command = ["export", f"--out={bundle}"]
    for name in ("clip", "prior", "decoder", "upsampler_0", "upsampler_1"):
        command.append(f"--{name.partition('_')[0]}={demo.out / name}")
    demo.run([[Job("export", command)]])
    return bundle


def truth(theme: str, sizes) -> tuple[list[dict], dict[str, list[dict]]]:
    """The training pictures of a theme and its held-out ones: name, key and uint8 by size."""
    sys.path.insert(0, str(ROOT))
    from configs import common
    from unclip.input.decode import image
    from unclip.input.shards import collection as shards

    found = []
    for pattern in (common.EMOJI_TRAIN, common.EMOJI_HELD_OUT):
        collection = shards.open_shards([pattern])
        collection = collection.subset(where=common.THEMES[theme])
        rows = []
        for number in range(len(collection)):
            sample = collection.read(number)
            decoded = image.decode(sample.image)
            pictures = {s: image.resize_and_crop(decoded, s)[0] for s in sizes}
            rows.append({"name": sample.meta["name"], "key": sample.key, "pictures": pictures})
        found.append(rows)
    return found[0], found[1]


def squared_error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[len(a), len(b)] mean squared errors of uint8 pictures, of values in [0, 1]."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) / 255 for x in (a, b))
    return ((a[:, None] - b[None]) ** 2).mean(axis=-1)


def draw(demo: Lanes, bundle: pathlib.Path, theme: str) -> dict:
    """Draws the prompts and measures the pictures; returns everything the report shows."""
    from unclip import UnCLIP
    from unclip.files import images

    model = UnCLIP.load(bundle, batch_size=16)
    demo.measure()
    sizes = [model.stage_size(name) for name in ("decoder", *model.upsamplers)]
    train, held_out = truth(theme, sizes)
    chosen = [round(i) for i in np.linspace(0, len(train) - 1, min(PROMPTS, len(train)))]
    prompts = [train[i]["name"] for i in chosen]
    drawn = model.generate(prompts, n=1, seed=0)
    demo.measure()
    base = np.stack([row["pictures"][sizes[0]] for row in train])
    errors = squared_error(drawn.stages["decoder"], base)
    nearest = errors.argmin(axis=1)
    own = errors[np.arange(len(chosen)), chosen]
    unseen = model.generate([row["name"] for row in held_out], n=1, seed=0) if held_out else None
    demo.measure()
    images.save_pictures(drawn.images, drawn.recipes, demo.out / "pictures", grid_columns=8)
    true = np.stack([train[i]["pictures"][sizes[-1]] for i in chosen])
    return {
        "prompts": prompts,
        "drawn": drawn,
        "train": train,
        "held_out": held_out,
        "unseen": unseen,
        "unseen_nearest": unseen and squared_error(unseen.stages["decoder"], base).argmin(axis=1),
        "chosen": chosen,
        "nearest": nearest,
        "hits": nearest == np.array(chosen),
        "own_error": own,
        "other_error": np.where(
            np.arange(len(train)) == np.array(chosen)[:, None], np.inf, errors
        ).min(axis=1),
        "clip_drawn": model.score(drawn.images, prompts),
        "clip_true": model.score(true, prompts),
        "sizes": sizes,
        "hash": model.model_hash,
    }


def metrics(folder: pathlib.Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def report(demo: Lanes, found: dict, summary: dict, theme: str) -> None:
    """report.html: scores, loss curves, every prompt at every stage beside the truth."""
    from unclip.files.report import Report, Row

    sizes, drawn, train = found["sizes"], found["drawn"], found["train"]
    page = Report(
        "unCLIP demo",
        f"CLIP, prior, decoder and two upsamplers trained on {len(train)} pictures of the theme "
        f"“{theme}”, then drawn from their captions",
    )
    page.tiles(
        {
            "nearest training picture is the prompted one": f"{summary['nearest_hits']} of "
            f"{summary['prompts']}",
            "time": f"{summary['seconds'] / 60:.1f} min",
            "peak memory": f"{summary['peak_rss_mb'] / 1024:.2f} GiB",
            "model": found["hash"],
        }
    )
    page.section(
        "What was drawn",
        "Each row is one caption: the decoder's picture, each upsampler's, the true picture, and "
        "the training picture nearest to the decoder's (mean squared error at base resolution). "
        "These are training pictures: the test is whether a caption leads to its picture "
        "through the prior, not whether it generalises.",
    )
    columns = [f"{side} × {side}" for side in sizes] + ["true picture", "nearest"]
    rows = []
    for k, prompt in enumerate(found["prompts"]):
        near = train[found["nearest"][k]]
        rows.append(
            Row(
                prompt,
                [
                    *(stage[k] for stage in drawn.stages.values()),
                    train[found["chosen"][k]]["pictures"][sizes[-1]],
                    near["pictures"][sizes[0]],
                ],
                badges=[("hit", True) if found["hits"][k] else (f"miss: {near['name']}", False)],
                note=f"error {found['own_error'][k]:.4f}, nearest other "
                f"{found['other_error'][k]:.4f}, CLIP {found['clip_drawn'][k]:.3f}",
            )
        )
    page.gallery(rows, columns)
    if found["unseen"] is not None:
        page.section(
            "Captions that training never showed",
            "Held-out emoji of the same theme. A few dozen training pictures teach no general "
            "idea of food; what is drawn resembles one training picture or a blend of several.",
        )
        stages = found["unseen"].stages.values()
        near = found["unseen_nearest"]
        page.gallery(
            [
                Row(
                    row["name"],
                    [
                        *(s[k] for s in stages),
                        row["pictures"][sizes[-1]],
                        train[near[k]]["pictures"][sizes[0]],
                    ],
                    note=f"nearest training picture: {train[near[k]]['name']}",
                )
                for k, row in enumerate(found["held_out"])
            ],
            columns,
        )
    page.section("Training", "Loss of every stage against its step, on training batches.")
    table = []
    for lane in LANES:
        for name, *_ in lane:
            lines = metrics(demo.out / name)
            losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
            held = [(x["step"], x["held_out/loss"]) for x in lines if "held_out/loss" in x]
            series = {"training": losses} | ({"held out": held} if held else {})
            page.curves(series, title=name, xlabel="step", ylabel="loss", logy=True)
            rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
            compiled = [x["compile_seconds"] for x in lines if "compile_seconds" in x]
            table.append(
                {
                    "stage": name,
                    "parameters": summary["parameters"][name],
                    "steps": losses[-1][0],
                    "last loss": losses[-1][1],
                    "images/s": float(np.median(rates)) if rates else None,
                    "compile, s": sum(compiled),
                }
            )
    page.table(table)
    page.section("Scores", "By this demo's own CLIP and by pixels.")
    page.table(
        [
            {"score": "mean squared error to the prompted picture", "value": summary["mse_own"]},
            {"score": "to the nearest other picture", "value": summary["mse_other"]},
            {"score": "CLIP cosine of drawn pictures and captions", "value": summary["clip_drawn"]},
            {"score": "of the true pictures and captions", "value": summary["clip_true"]},
        ]
    )
    page.settings({"commands": "\n".join(" ".join(c) for c in demo.commands)}, "Commands")
    page.settings(drawn.recipes[0], "Recipe of the first picture")
    page.write(demo.out / "report.html")


def main() -> None:
    """Trains, draws, reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--theme", default="food", help="a theme of configs/common.py")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every stage's steps")
    parser.add_argument("--threads", choices=("split", "shared"), default="split")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted demo")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if not arguments.resume:
        for name in ("clip", "prior", "decoder", "upsampler_0", "upsampler_1", "model", "pictures"):
            shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    demo = Lanes(out, split=arguments.threads == "split")
    print(f"training in {out}; logs in {out / 'logs'}", file=sys.stderr)
    demo.run(trainings(out, arguments.theme, arguments.scale))
    bundle = export(demo)
    print("drawing", file=sys.stderr)
    found = draw(demo, bundle, arguments.theme)

    from unclip.cascade.bundle import read

    parts = read(bundle, verify=False).parts
    count = lambda tree: sum(map(count, tree.values())) if isinstance(tree, dict) else tree.size
    summary = {
        "seconds": round(time.monotonic() - demo.started, 1),
        "peak_rss_mb": round(demo.peak / 2**20, 1),
        "prompts": len(found["prompts"]),
        "nearest_hits": int(found["hits"].sum()),
        "training_pictures": len(found["train"]),
        "mse_own": float(found["own_error"].mean()),
        "mse_other": float(found["other_error"].mean()),
        "clip_drawn": float(found["clip_drawn"].mean()),
        "clip_true": float(found["clip_true"].mean()),
        "parameters": {name: int(count(part.params)) for name, part in parts.items()},
        "model_hash": found["hash"],
        "missed": [p for p, hit in zip(found["prompts"], found["hits"]) if not hit],
    }
    report(demo, found, summary, arguments.theme)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    print(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    main()
