"""Reconstructions from more and more principal components of z_i (arXiv 2204.06125, figure 7).

z_i of a few pictures is projected on the first d components of a PCA of many embeddings and given
to the decoder "on a fixed seed": few components keep a picture's subject, more of them its form.
Measured for every d, and for z_i itself ("full"):

    reconstruction.dD.explained     share of the variance in the first d components
    reconstruction.dD.cosine        of the projection and z_i
    reconstruction.dD.drawn_cosine  of the drawing's embedding and z_i
    reconstruction.dD.mse           of the drawing and the picture, pixels in [0, 1]

The last needs no model. A d above the width D of the embedding is reduced to D.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from unclip import errors
from unclip.drawing.basis import projected
from unclip.files import images
from unclip.files.moments import Moments
from unclip.measure.picture_set import First, PictureSet, Prepared
from unclip.measure.pictures import open_pictures
from unclip.protocols import base, embedded
from unclip.tasks import codes
from unclip.tasks.arrays import unit

DIMS = (20, 30, 40, 80, 120, 160, 200, 320)  # figure 7
HELD_OUT, TRAINING = "held-out-*.tar", "train-*.tar"  # in data/emoji
FULL = 0  # in `columns`: z_i itself
MAX_PICTURES = 10_000


class Reconstruction(base.EvaluationProtocol):
    """Every picture at every number of components; a row is one drawing, picture by picture.

    Args:
      count: pictures, the first of `pictures`.
      size: side at which pictures are compared.
      dims: numbers of components, ascending.
      width: width of the embedding, if known: limits `dims` and leaves repetitions out.
      pictures: to reconstruct, as `open_pictures` takes them; None: the held-out emoji.
      fit: to fit the PCA on; None: the training emoji. fit_count: how many, the first ones.

    Attributes:
      columns: numbers of components, one per row of a picture; 0 stands for z_i itself.
    """

    mode = "reconstruct"
    by_clip = ("explained", "cosine", "drawn_cosine")

    def __init__(
        self,
        count: int = 8,
        size: int = 64,
        dims: Sequence[int] = DIMS,
        width: int | None = None,
        pictures: str | None = None,
        fit: str | None = None,
        fit_count: int = 2000,
    ):
        dims = [min(int(d), width or int(d)) for d in dims]
        dims = sorted(set(dims)) if width else dims
        if not dims or dims[0] < 1 or sorted(set(dims)) != dims:
            raise errors.ConfigError(f"reconstruction: dims {dims}, expected rising numbers over 0")
        if not 8 <= size <= 4096 or not 2 <= fit_count <= MAX_PICTURES:
            raise errors.ConfigError(
                f"reconstruction: size {size}, fit_count {fit_count}: expected 8 to 4096 pixels "
                f"and 2 to {MAX_PICTURES} pictures to fit on"
            )
        self._source = open_pictures(pictures or str(base.EMOJI / HELD_OUT))
        self._fit = open_pictures(fit or str(base.EMOJI / TRAINING))
        self._fit_count = min(fit_count, len(self._fit))
        if not 1 <= count <= min(len(self._source), MAX_PICTURES):
            raise errors.ConfigError(
                f"reconstruction: count {count}, expected 1 to {len(self._source)}"
            )
        self.columns = (*dims, FULL)
        captions = [self._source.caption(i) or self._source.name(i) for i in range(count)]
        names = [self._source.name(i) for i in range(count)]
        self._reference = Prepared(base.Chosen(self._source, range(count), names, captions), size)
        words = [f"d{d}" if d else "full" for d in self.columns]
        name = "reconstruction" + (self._mark(count) if pictures or fit else "")
        parts = (name, f"n{count}", f"d{'-'.join(map(str, dims))}", f"fit{self._fit_count}")
        super().__init__(
            ".".join([*parts, f"size{size}"]),
            [caption for caption in captions for _ in self.columns],
            [f"{i:04d}-{word}" for i in range(count) for word in words],
            size,
            {
                "pictures": self._source.source,
                "fit": self._fit.source,
                "count": count,
                "fit_count": self._fit_count,
                "dims": list(self.columns),
            },
        )
        # A weak reference: parameters of a model no longer in use must not stay on the device.
        self._known: tuple[Any, tuple] = (lambda: None, ())

    def reference(self) -> PictureSet:
        """The pictures themselves at `size`, one each."""
        return self._reference

    def draw(
        self,
        model: Any,
        seeds: Sequence[int],
        settings: dict | None = None,
        rows: Sequence[int] | None = None,
    ):
        """Decodes the projections of rows; the PCA is fitted at a model's first call.

        Columns of one picture share their noise: a row's column is subtracted from its seed, which
        makes them equal where seeds increase by one from row to row.
        """
        rows = self._rows(rows, seeds)
        z_i = np.stack([self._projected(model, row) for row in rows]).astype(np.float32)
        shared = [max(0, int(seed) - row % len(self.columns)) for row, seed in zip(rows, seeds)]
        facts = [self._facts(row) for row in rows]
        return embedded.decode(self, model, z_i, rows, shared, settings, facts)

    def _facts(self, row: int) -> dict:
        """What a row's z_i is made of, for its recipe."""
        number, column = divmod(row, len(self.columns))
        picture = images.source(self._source.read(number), self._source.name(number))
        fit = {"fit": self._fit.source, "fit_count": self._fit_count}
        return {"images": [picture], "components": self.columns[column] or "full", **fit}

    def judge(
        self, pictures: np.ndarray, model: Any = None, rows: Sequence[int] | None = None
    ) -> tuple[dict[str, float], list[dict]]:
        """The measures of the module's docstring, means over pictures; and those of each
        drawing."""
        rows = self._rows(rows, pictures)
        true = {i: self._reference.read(i) / 255.0 for i in {r // len(self.columns) for r in rows}}
        facts = []
        for row, picture in zip(rows, base.resized(pictures, self.size)):
            number, column = divmod(row, len(self.columns))
            mse = float(np.square(picture / 255.0 - true[number]).mean())
            facts.append({"components": self.columns[column] or "full", "mse": round(mse, 6)})
        if model is not None and "clip" in model.parts:
            z_drawn = unit(embedded.embed(model, list(pictures)))
            for fact, row, drawn in zip(facts, rows, z_drawn):
                z = unit(self._embeddings(model)[1][row // len(self.columns)])
                projected = unit(self._projected(model, row))
                fact |= {
                    "explained": self.explained(model, self.columns[row % len(self.columns)]),
                    "cosine": float(projected @ z),
                    "drawn_cosine": float(drawn @ z),
                }
        values = {}
        for measure in ("explained", "cosine", "drawn_cosine", "mse"):
            for components in self.columns:
                found = [
                    f[measure]
                    for f in facts
                    if measure in f and f["components"] == (components or "full")
                ]
                name = f"d{components}" if components else "full"
                if found:
                    values[f"reconstruction.{name}.{measure}"] = float(np.mean(found))
        return values, facts

    def explained(self, model: Any, components: int) -> float:
        """Share of the variance of the fitted embeddings in the first components; 1 for 0."""
        variance = np.square(self._embeddings(model)[0].scale)
        return float(variance[: components or None].sum() / variance.sum())

    def grid(self, pictures: np.ndarray) -> np.ndarray:
        """As figure 7: a row per picture, more components to the right, the original at the end."""
        columns = len(self.columns)
        small = base.resized(pictures, self.size)
        cells, labels = [], []
        for i in range(len(self._reference)):
            cells += [*small[i * columns : (i + 1) * columns], self._reference.read(i)]
            labels += [*(f"{d}" if d else "full" for d in self.columns), "original"]
        return images.grid(cells, columns=columns + 1, labels=labels)

    def _mark(self, count: int) -> str:
        """`base.mark` of the pictures and of those that the PCA is fitted on."""
        shipped = tuple(open_pictures(str(base.EMOJI / name)) for name in (HELD_OUT, TRAINING))
        hashes = []
        for source, fit in ((self._source, self._fit), shipped):
            rows = range(min(count, len(source)))
            captions = [source.caption(i) or source.name(i) for i in rows]
            sets = First(source, count), First(fit, self._fit_count)
            hashes.append(base.content(captions, *sets))
        return base.mark(*hashes)

    def _embeddings(self, model: Any) -> tuple[codes.PCA, np.ndarray]:
        """(PCA with all components, z_i float32 [count, D]) under a model's CLIP."""
        if self._known[0]() is not model:
            z_i = embedded.embed(model, [self._source.read(i) for i in range(len(self._reference))])
            seen = Moments(z_i.shape[1])
            for start in range(0, self._fit_count, 256):
                numbers = range(start, min(start + 256, self._fit_count))
                seen.add(embedded.embed(model, [self._fit.read(i) for i in numbers]))
            pca = codes.fit_pca(seen.mean(), seen.covariance(), dims=z_i.shape[1])
            self._known = (weakref.ref(model), (pca, z_i))
        return self._known[1]

    def _projected(self, model: Any, row: int) -> np.ndarray:
        """What a row decodes: z_i on its first components, float [D]."""
        pca, z_i = self._embeddings(model)
        number, column = divmod(row, len(self.columns))
        components = self.columns[column]
        if components == FULL:
            return z_i[number]
        return projected(pca, z_i[number], components)
