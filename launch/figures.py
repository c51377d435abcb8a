"""The counterparts of the paper's figures 3 to 9, drawn by any bundle on one page.

    python launch/figures.py --model runs/demo/model --out runs/figures

Pictures to start from are drawn from the prompts, or given by --pictures. Writes report.html (one
file, opens offline) and the pictures of each figure as PNG with their recipes, which
`unclip generate --from_png` draws again.
"""

import argparse
import math
import pathlib
import sys

from lanes import ROOT

PROMPTS = ("red apple", "green apple", "doughnut", "watermelon")
COMPONENTS = (2, 4, 8, 16, 32, 64, 128, 256)
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0)


class Figures:
    """What the figures share: the model, the pictures to start from, how many to draw."""

    def __init__(self, model, arguments):
        from unclip.files import images
        from unclip.input.samples import printable
        from unclip.measure.pictures import open_pictures

        self.model, self.out = model, arguments.out
        self.n, self.seed, self.basis = arguments.n, arguments.seed, arguments.basis
        self.prompts, self.settings = arguments.prompt, {}
        if arguments.steps:
            self.settings["decoder"] = {"steps": arguments.steps}
        if arguments.stages:
            self.settings["stages"] = arguments.stages
        if arguments.pictures:
            given = open_pictures(arguments.pictures)
            rows = range(min(len(given), arguments.rows))
            names = [printable(given.name(i)) for i in rows]
            self.sources = [images.Source(given.read(i), name) for i, name in zip(rows, names)]
            captions = [given.caption(i) for i in rows]
            self.captions = [caption or name for caption, name in zip(captions, names)]
        else:
            drawn = model.generate(self.prompts, 1, self.seed, **self.settings)
            kept = map(images.kept_recipe, drawn.recipes)
            names = [f"{prompt}.png" for prompt in self.prompts]
            self.sources = list(map(images.Source, drawn.images, names, kept))
            self.captions = list(self.prompts)

    def save(self, name: str, drawn):
        """The pictures of a figure, kept as PNG; returns uint8 [n, H, W, 3]."""
        from unclip.files import images

        images.save_pictures(drawn.images, drawn.recipes, self.out / name, with_grid=False)
        return drawn.images

    def variations(self, page, row):
        """Figure 3: z_i and x_T of a picture, decoded with eta over 0."""
        rows = [
            row(caption, [source.pixels, *self.save("figure3", self._variations(source))])
            for caption, source in zip(self.captions, self.sources)
        ]
        page.section("Figure 3: variations", "Of the picture to the left, from its own x_T.")
        page.gallery(rows, ["picture", *[""] * self.n])

    def _variations(self, source):
        return self.model.variations(source, self.n, self.seed, invert=True, **self.settings)

    def interpolations(self, page, row):
        """Figure 4: between two pictures, from one and the same noise."""
        rows = []
        for k in range(len(self.sources) - 1):
            pair, count = self.sources[k : k + 2], max(self.n, 2)
            drawn = self.model.interpolate(*pair, n=count, seed=self.seed, **self.settings)
            pixels = [pair[0].pixels, *self.save("figure4", drawn), pair[1].pixels]
            rows.append(row(" to ".join(self.captions[k : k + 2]), pixels))
        page.section("Figure 4: interpolations", "Between the pictures at both ends.")
        page.gallery(rows, ["picture", *[""] * max(self.n, 2), "picture"])

    def text_differences(self, page, row):
        """Figure 5: a picture on its way from its caption to the next one's."""
        rows = []
        for k, source in enumerate(self.sources):
            words = self.captions[k], self.captions[(k + 1) % len(self.captions)]
            if words[0] == words[1]:
                continue
            drawn = self.model.text_diff(source, *words, self.n, self.seed, **self.settings)
            pixels = self.save("figure5", drawn)
            prompts = [words[1]] * len(pixels)
            scores = self.model.score(pixels, prompts)
            note = f"cosine with “{words[1]}”: {scores[0]:.3f} to {scores[-1]:.3f}"
            rows.append(row(" to ".join(words), [source.pixels, *pixels], (), note))
        page.section("Figure 5: text differences", "theta from 0 to 0.5.")
        page.gallery(rows, ["picture", *(f"{0.5 * k / max(self.n - 1, 1):.2f}" for k in self._of)])

    @property
    def _of(self):
        return range(self.n)

    def attacks(self, page, row):
        """Figure 6: another picture's name written across; CLIP is fooled more than the decoder."""
        from unclip.drawing.base import as_source
        from unclip.protocols.typographic import SIDE, paste_label

        rows, labels = [], list(dict.fromkeys(self.captions))
        for k, source in enumerate(self.sources if len(labels) > 1 else []):
            true, pasted = self.captions[k], self.captions[(k + 1) % len(self.captions)]
            larger = math.ceil(SIDE / min(source.pixels.shape[:2]))
            pixels = source.pixels.repeat(larger, axis=0).repeat(larger, axis=1)
            attacked = as_source(paste_label(pixels, pasted), f"{true} as {pasted}.png")
            found = self.model.classify([source, attacked], labels)
            drawn = self.model.variations(attacked, self.n, self.seed, **self.settings)
            clean, written = (dict(zip(labels, odds)) for odds in found.probabilities)
            note = (
                f"“{true}” {clean[true]:.2f} without the label, {written[true]:.2f} with it; "
                f"“{pasted}” {written[pasted]:.2f}"
            )
            pixels = [attacked.pixels, *self.save("figure6", drawn)]
            rows.append(row(f"{true}, labelled {pasted}", pixels, (), note))
        page.section("Figure 6: a written label", "Variations of the attacked picture.")
        page.gallery(rows, ["attacked", *[""] * self.n])

    def components(self, page, row):
        """Figure 7: z_i on its first principal components."""
        from unclip.drawing.basis import open_basis

        basis = open_basis(self.model, self.basis)
        counts = [k for k in COMPONENTS if k < basis.pca.components.shape[1]]
        counts.append(basis.pca.components.shape[1])
        rows = []
        for caption, source in zip(self.captions, self.sources):
            drawn = self.model.reconstruct(source, counts, self.seed, basis=basis, **self.settings)
            rows.append(row(caption, [*self.save("figure7", drawn), source.pixels]))
        page.section("Figure 7: principal components of z_i", f"Fitted on {basis.source}.")
        page.gallery(rows, [*map(str, counts), "picture"])

    def without_prior(self, page, row):
        """Figure 8: the decoder given the caption alone, z_t, or z_i of the prior."""
        given = {"caption alone": "none", "caption and z_t": "text", "caption and prior": "prior"}
        drawn = {
            words: self.model.generate(self.prompts, 1, self.seed, embed=embed, **self.settings)
            for words, embed in given.items()
        }
        for one in drawn.values():
            self.save("figure8", one)
        rows = [
            row(prompt, [one.images[k] for one in drawn.values()])
            for k, prompt in enumerate(self.prompts)
        ]
        page.section("Figure 8: with and without the prior")
        page.gallery(rows, list(given))

    def guidance(self, page, row):
        """Figure 9: more guidance of the decoder, the pictures' z_i unchanged."""
        rows = []
        for scale in GUIDANCE:
            own = self.settings | {"decoder": {**self.settings.get("decoder", {})}}
            own["decoder"]["guidance"] = scale
            drawn = self.model.generate(self.prompts[0], self.n, self.seed, **own)
            rows.append(row(f"guidance {scale:g}", self.save("figure9", drawn)))
        page.section(f"Figure 9: guidance, “{self.prompts[0]}”")
        page.gallery(rows, [""] * self.n)


def main() -> None:
    """Draws every figure that the model can; what it lacks for another stands on the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True, help="bundle")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "figures")
    parser.add_argument("--prompt", action="append", help="caption; repeat it for several")
    parser.add_argument("--pictures", help="folder or shards to start from; default: drawn")
    parser.add_argument("--basis", default=str(ROOT / "data" / "emoji" / "train-*.tar"))
    parser.add_argument("--rows", type=int, default=4, help="of --pictures that are taken")
    parser.add_argument("--n", type=int, default=5, help="pictures in a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of the decoder")
    parser.add_argument("--stages", type=int, help="of decoder and upsamplers that run")
    parser.add_argument("--only", type=int, action="append", choices=range(3, 10), help="figure")
    parser.add_argument("--batch_size", type=int, default=8)
    arguments = parser.parse_args()
    arguments.prompt = arguments.prompt or list(PROMPTS)

    from unclip import UnCLIP, errors
    from unclip.files.report import Report, Row

    try:
        model = UnCLIP.load(arguments.model, batch_size=arguments.batch_size)
        figures = Figures(model, arguments)
    except errors.UnclipError as error:
        print(f"figures: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
    page = Report("Figures 3 to 9 of arXiv 2204.06125", f"drawn by model {model.model_hash}")
    draws = {
        3: figures.variations,
        4: figures.interpolations,
        5: figures.text_differences,
        6: figures.attacks,
        7: figures.components,
        8: figures.without_prior,
        9: figures.guidance,
    }
    for number, draw in draws.items():
        if arguments.only and number not in arguments.only:
            continue
        print(f"figure {number}", file=sys.stderr)
        try:
            draw(page, Row)
        except errors.ConfigError as error:  # a part that this bundle does not have
            page.section(f"Figure {number}", f"Not drawn: {error.message}")
    print(page.write(arguments.out / "report.html"))


if __name__ == "__main__":
    main()
