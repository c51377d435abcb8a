"""How good the pictures are that a decoder or an upsampler draws while it trains.

Every held-out sample is drawn again from its conditions and the set compared with the true
pictures: the Fréchet distance of their CLIP embeddings, FID where an Inception network is given
(section 5 of the paper reports FID), the cosine of a drawn picture with its caption, and the error
a pixel. Distances fall with the number of pictures, so that number is part of their names.
"""

from collections.abc import Iterator

import jax
import numpy as np
from absl import logging

from unclip import errors
from unclip.files.moments import Moments, Statistics
from unclip.input import samples, source
from unclip.input.decode import transforms
from unclip.measure import features, frechet, picture_set
from unclip.runtime import sharding
from unclip.tasks.arrays import to_float, to_uint8, unit
from unclip.tasks.clip import FrozenClip
from unclip.training.evaluators import passes

POOL = "pool3"  # the output of Inception that FID is measured on


class Drawn:
    """Figures of pictures drawn for every held-out sample, with the task's own settings.

    Noise is keyed by the sample's number: figures are comparable from step to step and run to run.

    Args:
      task: a task whose `predict` has a "sample" that gives "pictures"; frozen: its frozen trees.
      batches: starts one pass; besides what the task reads, batches hold "image" uint8
        [b, S, S, 3], the true picture, and with `clip` also "caption" int32 [b, L], see
        `WithCaption`.
      clip: the CLIP that judges, and its parameters on the mesh; None leaves its figures out.
      inception: an extractor with the output "pool3"; None leaves FID out.
      seed: of the noise.
    """

    interval, prefix = "metric", "drawn"

    def __init__(
        self,
        task,
        frozen,
        batches: passes.Passes,
        mesh: jax.sharding.Mesh,
        *,
        clip: tuple[FrozenClip, dict] | None = None,
        inception: features.Extractor | None = None,
        seed: int = 0,
    ):
        self.frozen, self.batches, self.mesh = frozen, batches, mesh
        self.inception, self.true = inception, None
        network, self.clip_params = clip or (None, None)
        sample = task.predict()["sample"]

        def draw(params, frozen, clip_params, batch):
            drawn = sample(params, frozen, batch, jax.random.key(seed))["pictures"]
            error = (drawn - to_float(batch["image"])) ** 2
            rows = {"mse": error.mean((1, 2, 3))}
            # Judged as it would be saved.
            drawn = to_uint8(drawn)
            if network is not None:
                rows["z_drawn"] = network.image(clip_params, drawn)
                rows["z_true"] = network.image(clip_params, batch["image"])
                rows["z_t"] = network.text(clip_params, batch["caption"])[0]
                rows["captioned"] = batch["caption"].any(axis=1)
            if inception is not None:
                rows |= {"drawn": drawn, "true": batch["image"]}
            return rows

        self.draw = jax.jit(draw, out_shardings=sharding.replicated(mesh))

    def run(self, state: dict, step: int) -> Iterator[tuple[str, float]]:
        """("drawn/...", number); nothing when asked to stop or without samples.

        "mse" is of pixels in [-1, 1]. With a CLIP: "clip_cosine" and "clip_cosine_true" of the
        drawn and the true picture with the caption, "clip_cosine_pictures" of one with the other,
        "fd_clip_N<pictures>". With an Inception network "fid_<its id>_N<pictures>".
        """
        sums: dict[str, Moments] = {}
        draw = lambda batch: self.draw(state["ema"], self.frozen, self.clip_params, batch)
        try:
            found = passes.collect(
                self.batches, draw, self.mesh, step, each=lambda rows: self._look(rows, sums)
            )
        except errors.Stopped:  # between two pictures, by `features.extract`
            return
        if not found:
            return
        figures = {"mse": found["mse"].mean(dtype=np.float64)}
        if self.clip_params is not None:
            figures |= clip_figures(
                found["z_drawn"], found["z_true"], found["z_t"], found["captioned"]
            )
        if self.inception is not None:
            self.true = self.true or sums["true"]
            name = f"fid_{self.inception.id}_N{sums['drawn'].count}"
            figures[name] = distance(sums["drawn"], self.true)
        for name, value in figures.items():
            yield f"{self.prefix}/{name}", float(value)

    def _look(self, rows: dict, sums: dict[str, Moments]) -> None:
        """Takes the pictures out of a batch's rows and adds their Inception features to `sums`."""
        for name in ("drawn", "true"):
            shown = rows.pop(name, None)
            if shown is None or not len(shown) or (name == "true" and self.true is not None):
                continue
            own = features.extract(
                self.inception, picture_set.ArrayPictures(shown), outputs=(POOL,), keep=False
            ).moments[POOL]
            if name in sums:
                sums[name].merge(own)
            else:
                sums[name] = own


def clip_figures(
    z_drawn: np.ndarray, z_true: np.ndarray, z_t: np.ndarray, captioned: np.ndarray
) -> dict[str, float]:
    """Mean cosines and the Fréchet distance of N drawn and N true pictures' embeddings.

    Args:
      z_drawn, z_true, z_t: [N, D], row by row of one sample, as CLIP gives them.
      captioned: bool [N], whether the sample has a caption; the others have no z_t.
    """
    cosine = lambda a, b: np.sum(unit(a) * unit(b), 1, dtype=np.float64)
    figures = {"clip_cosine_pictures": cosine(z_drawn, z_true).mean()}
    if captioned.any():
        figures["clip_cosine"] = cosine(z_drawn, z_t)[captioned].mean()
        figures["clip_cosine_true"] = cosine(z_true, z_t)[captioned].mean()
    count, width = z_drawn.shape
    sums = []
    for rows in (z_drawn, z_true):
        sums.append(Moments(width))
        try:
            sums[-1].add(rows)
        except errors.NumericsError:  # a figure that is not finite is a line in the log, no end
            return figures | {f"fd_clip_N{count}": float("nan")}
    return figures | {f"fd_clip_N{count}": distance(*sums)}


def distance(drawn: Moments, true: Moments) -> float:
    """The Fréchet distance; NaN of fewer than two pictures. Says so where there are too few."""
    count, width = drawn.count, len(drawn.total)
    if count <= width:
        logging.log_first_n(
            logging.WARNING,
            "a Fréchet distance over %d features of %d pictures: the covariance is singular and "
            "the figure says little; raise metric_examples",
            1,
            width,
            count,
        )
    if count < 2:
        return float("nan")
    return frechet.distance(Statistics.of(drawn, {}), Statistics.of(true, {}))


class WithCaption:
    """A transform that also delivers the caption as CLIP's tokens, whatever its stage reads.

    Adds "caption" int32 [L] of the first that the sample has, zeros where it has none.

    Args:
      transform: the stage's own; context: L of the CLIP.
      captions: see `input.decode.transforms.ImageText`.
    """

    def __init__(self, transform: source.Transform, context: int, captions: tuple[str, ...]):
        self.transform, self.context = transform, context
        self.text = transforms.ImageText(None, context, captions=captions, draw_caption=False)

    def __call__(self, sample: samples.Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        arrays = self.transform(sample, rng)
        try:
            caption = self.text(sample, rng)["tokens"]
        except samples.BadSample:
            caption = np.zeros(self.context, np.int32)
        return arrays | {"caption": caption}
