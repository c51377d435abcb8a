"""How near each sampler comes to a result of 1,000 steps, by steps and spacing, of a bundle.

    python benchmarks/samplers.py --model runs/demo/model --out benchmarks/results/samplers/a.json
    python benchmarks/samplers.py --page

The first line draws, from captions of the emoji, z_i with the prior and small pictures with the
decoder, all settings but these the bundle's own; the second writes what it kept into the table of
docs/samplers.md. Two numbers a setting:

- distance: root mean square between what it draws and what DDIM with eta 0 draws in 1,000 steps
  from the same x_T, over the standard deviation of the latter; of samplers without noise alone.
- fd: Fréchet distance of the drawn z_i, or of CLIP's z_i of the drawn pictures (the bundle's own
  CLIP, so this is no published fd-clip), from those of DDPM in 1,000 steps with other seeds. Its
  floor, DDPM in 1,000 steps again, stands in the first line printed of a stage.

--reference takes fewer steps than 1,000, for a try.
"""

import argparse
import itertools
import json
import pathlib
import sys
import time

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import record
from configs import common
from unclip import UnCLIP, errors
from unclip.diffusion import samplers, schedule
from unclip.files.moments import Moments, Statistics
from unclip.input.decode.image import for_clip
from unclip.input.shards import collection
from unclip.measure import frechet
from unclip.tasks.arrays import to_uint8

PAGE = record.ROOT / "docs" / "samplers.md"
KEPT = record.RESULTS / "samplers"
BEGIN, END = "<!-- table: python benchmarks/samplers.py --page -->", "<!-- end of table -->"
SPACINGS = ("even", "trailing", "log-snr", "karras")
EXACT = {"sampler": "ddim", "eta": 0.0, "spacing": "even"}
RANDOM = {"sampler": "ddpm", "eta": 0.0, "spacing": "even"}
OTHER_SEEDS = 1_000_000


def captions(count: int) -> list[str]:
    """Names of emoji, evenly over the training shards, from the first again where they end."""
    shards = collection.open_shards([common.EMOJI_TRAIN])
    numbers = np.linspace(0, len(shards) - 1, min(count, len(shards))).round().astype(int)
    names = [shards.read(int(number)).meta["name"] for number in numbers]
    return [names[k % len(names)] for k in range(count)]


def statistics(rows: np.ndarray) -> Statistics:
    """Mean and covariance of rows [n, D]."""
    moments = Moments(rows.shape[1])
    moments.add(rows)
    return Statistics.of(moments)


def drawers(model: UnCLIP, prompts: list[str]) -> dict:
    """{stage: (settings, first seed) -> (what it draws, its rows of features)}."""
    seeds = lambda first: list(range(first, first + len(prompts)))
    z_i, size = model.draw_prior(prompts, seeds(0)), model.parts["clip"].arch["image_size"]

    def prior(settings, first):
        drawn = model.draw_prior(prompts, seeds(first), **settings)
        return drawn, drawn

    def decoder(settings, first):
        drawn = model.decode(z_i, prompts, seeds(first), decoder=settings, stages=1)["decoder"]
        shown = [for_clip(picture, size) for picture in to_uint8(drawn)]
        return drawn, model.embed_image(np.stack(shown))

    return {"prior": prior, "decoder": decoder}


def measure(draw, settings: dict, exact: np.ndarray | None, random: Statistics) -> dict:
    """One setting's numbers; exact: what it should draw, None for a sampler with noise."""
    start = time.perf_counter()
    drawn, features = draw(settings, 0)
    found = {"fd": frechet.distance(statistics(features), random)}
    if exact is not None:
        found["distance"] = float(np.sqrt(np.mean((drawn - exact) ** 2)) / np.std(exact))
    return found | {"seconds": round(time.perf_counter() - start, 2)}


def main() -> None:
    """Draws, prints a JSON line a setting and keeps them, or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="bundle folder")
    parser.add_argument("--stages", default="prior,decoder")
    parser.add_argument("--samplers", default=",".join(samplers.SAMPLERS))
    parser.add_argument("--spacings", default=",".join(SPACINGS))
    parser.add_argument("--steps", default="5,10,15,25,50")
    parser.add_argument("--reference", type=int, default=1000, help="steps of what is compared to")
    parser.add_argument("--count", type=int, default=256, help="pictures a setting")
    parser.add_argument("--batch", type=int, default=64, help="pictures drawn at once")
    parser.add_argument("--out", help="keep the figures in this JSON file")
    parser.add_argument("--page", action="store_true", help="write the table of docs/samplers.md")
    arguments = parser.parse_args()
    if arguments.page:
        results = record.read(KEPT)
        PAGE.write_text(page(PAGE.read_text("utf-8"), results), "utf-8")
        print(f"{PAGE.relative_to(record.ROOT)}: {len(results)} files")
        return
    if not arguments.model:
        parser.error("--model BUNDLE is needed, or --page")
    chosen = {name: getattr(arguments, name).split(",") for name in ("samplers", "spacings")}
    for name in chosen["samplers"]:
        samplers.check(name, 0.0)
    steps = [int(word) for word in arguments.steps.split(",")]
    for spacing, n in itertools.product(chosen["spacings"], steps):
        schedule.cosine().respace(n, spacing)
    model = UnCLIP.load(arguments.model, batch_size=arguments.batch)
    prompts = captions(arguments.count)
    draw_of = drawers(model, prompts)
    figures = []
    for stage in arguments.stages.split(","):
        if stage not in draw_of:
            raise errors.unknown("stage", stage, draw_of)
        draw = draw_of[stage]
        most = {"steps": arguments.reference}
        exact, _ = draw(EXACT | most, 0)
        random = statistics(draw(RANDOM | most, OTHER_SEEDS)[1])
        floor = frechet.distance(statistics(draw(RANDOM | most, 0)[1]), random)
        print(json.dumps({"stage": stage, "floor": floor}), flush=True)
        what = f"{stage}: floor, ddpm, {arguments.reference:,} steps: fd of {arguments.count}"
        figures.append(record.figure(what, floor, "", "other seeds"))
        for name, spacing, n in itertools.product(chosen["samplers"], chosen["spacings"], steps):
            eta = samplers.own_eta(name)
            settings = {"sampler": name, "eta": eta, "spacing": spacing, "steps": n}
            calls = len(samplers.visits(name, schedule.cosine().respace(n, spacing)))
            noisy = samplers.is_noisy(name, eta)
            found = measure(draw, settings, None if noisy else exact, random)
            print(json.dumps({"stage": stage, **settings, "calls": calls, **found}), flush=True)
            for number in ("distance", "fd"):
                if number in found:
                    what = f"{stage}: {name}, {spacing}, {n} steps: {number}"
                    figures.append(
                        record.figure(what, found[number], "", f"{arguments.reference:,} steps")
                    )
            if arguments.out:  # kept as it grows: the whole takes long
                record.write(arguments.out, figures, device=jax.devices()[0].device_kind)


def table(found: dict) -> str:
    """Markdown of one kept file: a row a sampler and spacing, a column a number of steps."""
    cells: dict[tuple[str, str, str], dict[int, dict[str, float]]] = {}
    lines = []
    for row in found["figures"]:
        stage, setting, number = row["figure"].split(": ")
        if setting.startswith("floor"):
            lines.append(f"- {stage}, {setting}: {number}: {row['value']:.3g}")
            continue
        sampler, spacing, n = setting.split(", ")
        at = cells.setdefault((stage, sampler, spacing), {})
        at.setdefault(int(n.split()[0]), {})[number] = row["value"]
    steps = sorted({n for row in cells.values() for n in row})
    lines += ["", f"| stage | sampler | spacing | {' | '.join(f'{n} steps' for n in steps)} |"]
    lines.append("|---|---|---|" + "---|" * len(steps))
    for names, row in cells.items():
        text = []
        for n in steps:
            value = row.get(n, {})
            near = f"{value['distance']:.3f}" if "distance" in value else "–"
            text.append(f"{near} / {value['fd']:.3g}" if value else "")
        lines.append(f"| {' | '.join([*names, *text])} |")
    return "\n".join([f"`{found['command']}`", "", *lines])


def page(text: str, results: list[dict]) -> str:
    """The page with the tables of the kept files between its two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"the page must hold {BEGIN} and then {END}")
    tables = "\n\n".join(map(table, results))
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


if __name__ == "__main__":
    main()
