"""How good the embeddings are that a prior draws while it trains (section 2.2 of the paper).

A drawn z_i is compared with the z_i of the caption's own picture, with z_t, and with every other
held-out picture: its rank says how much of the caption is left in it, which a cosine alone does
not, since all z_i of one CLIP lie in a narrow cone.
"""

from collections.abc import Iterator

import jax
import numpy as np

from unclip.runtime import sharding
from unclip.tasks import keys
from unclip.tasks.arrays import unit
from unclip.training.evaluators import passes, ranking


class PriorQuality:
    """Cosines, ranks and lengths of z_i drawn for every held-out caption.

    Draws use the task's own settings (`config.task.draw`); their noise is keyed by the sample's
    number, so the figures are comparable from step to step and run to run.

    Args:
      task: one of the prior tasks; frozen: its frozen trees, on the mesh.
      batches: starts one pass over the held-out pairs.
      seed: of the noise, and of which caption is the other one.
    """

    interval, prefix = "metric", "prior"

    def __init__(self, task, frozen, batches: passes.Passes, mesh: jax.sharding.Mesh, *, seed=0):
        self.frozen, self.batches, self.mesh, self.seed = frozen, batches, mesh, seed
        self.picture = "z_i" if task.stored else "image"

        def draw(params, frozen, batch):
            sample_keys = keys.sample_keys(jax.random.key(seed), batch["sample"])
            captions = {name: batch[name] for name in ("tokens", "text_mask")}
            return {
                "drawn": task.sample(params, frozen, captions, sample_keys),
                "z_i": task.image(frozen, batch),
                "z_t": task.clip.text(frozen["clip"], batch["tokens"])[0],
            }

        self.draw = jax.jit(draw, out_shardings=sharding.replicated(mesh))

    def run(self, state: dict, step: int) -> Iterator[tuple[str, float]]:
        """("prior/...", number); nothing when asked to stop or without samples."""
        draw = lambda batch: self.draw(state["ema"], self.frozen, batch)
        found = passes.collect(
            self.batches, draw, self.mesh, step, identify=(self.picture, "tokens")
        )
        if not found:
            return
        figures = quality(
            found["drawn"],
            found["z_i"],
            found["z_t"],
            found[f"{self.picture}_id"],
            found["tokens_id"],
            seed=self.seed,
        )
        for name, value in figures.items():
            yield f"{self.prefix}/{name}", value


def quality(
    drawn: np.ndarray,
    z_i: np.ndarray,
    z_t: np.ndarray,
    picture: np.ndarray,
    caption: np.ndarray,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Figures of N drawn embeddings.

    Args:
      drawn, z_i, z_t: [N, D], row by row of one sample; any length.
      picture, caption: int [N], equal where pictures or captions are.
      seed: of the shuffle.

    Returns:
      "cosine": drawn with the true z_i; "cosine_other": drawn with the z_i of another caption's
      picture, which is what chance gives (absent where there is one caption); "cosine_text" and
      "cosine_text_true": z_t with the drawn and with the true z_i; "recall_1", "recall_5",
      "recall_10", "median_rank": of the true picture among all "candidates" by cosine with the
      drawn z_i, any picture of an equal caption being right; "norm_mean", "norm_std" of the drawn
      and "norm_true_mean", "norm_true_std" of the true z_i, in CLIP's own scale.
    """
    cosine = lambda a, b: np.sum(unit(a) * unit(b), 1, dtype=np.float64)
    figures = {
        "cosine": cosine(drawn, z_i).mean(),
        "cosine_text": cosine(drawn, z_t).mean(),
        "cosine_text_true": cosine(z_i, z_t).mean(),
    }
    order = np.random.default_rng(seed).permutation(len(drawn))
    own, other = order, np.roll(order, 1)
    differ = caption[own] != caption[other]
    if differ.any():
        figures["cosine_other"] = cosine(drawn[own[differ]], z_i[other[differ]]).mean()
    _, first, picture = np.unique(picture, return_index=True, return_inverse=True)
    rank = ranking.ranks(drawn, z_i[first], ranking.pairs_through(caption, caption, picture))
    figures |= ranking.summary(rank) | {"candidates": len(first)}
    for name, rows in (("norm", drawn), ("norm_true", z_i)):
        lengths = np.linalg.norm(np.float64(rows), axis=1)
        figures |= {f"{name}_mean": lengths.mean(), f"{name}_std": lengths.std()}
    return {name: float(value) for name, value in figures.items()}
