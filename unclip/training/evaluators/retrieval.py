"""Zero-shot retrieval while CLIP trains: does a caption find its picture among all held-out ones?

Recall at k in both directions, as CLIP reports it on Flickr30k and COCO (arXiv 2103.00020, table
13), here on the run's own held-out pairs. Unlike the accuracy within a batch it compares every
picture with every caption, so it does not depend on the batch size.
"""

from collections.abc import Iterator

import jax
import numpy as np

from unclip.runtime import sharding
from unclip.training.evaluators import passes, ranking


class Retrieval:
    """Recall at 1, 5, 10 and median rank, picture to caption and back.

    Equal captions (by their tokens) are one candidate, and so are equal pictures (by their pixels);
    each is asked once, and a hit is any partner that some sample gives it.

    Args:
      task: a task whose `predict` has "z_i" and "z_t"; frozen: its frozen trees.
      batches: starts one pass over the held-out pairs.
    """

    interval, prefix = "metric", "retrieval"

    def __init__(self, task, frozen, batches: passes.Passes, mesh: jax.sharding.Mesh):
        self.frozen, self.batches, self.mesh = frozen, batches, mesh
        towers = {name: task.predict()[name] for name in ("z_i", "z_t")}
        self.embed = jax.jit(
            lambda params, frozen, batch: {
                name: tower(params, frozen, batch, None) for name, tower in towers.items()
            },
            out_shardings=sharding.replicated(mesh),
        )

    def run(self, state: dict, step: int) -> Iterator[tuple[str, float]]:
        """("retrieval/...", number); nothing when asked to stop or without samples."""
        embed = lambda batch: self.embed(state["ema"], self.frozen, batch)
        found = passes.collect(self.batches, embed, self.mesh, step, identify=("image", "tokens"))
        if not found:
            return
        figures = retrieval(found["z_i"], found["z_t"], found["image_id"], found["tokens_id"])
        for name, value in figures.items():
            yield f"{self.prefix}/{name}", value


def retrieval(
    z_i: np.ndarray, z_t: np.ndarray, picture: np.ndarray, caption: np.ndarray
) -> dict[str, float]:
    """Recalls in [0, 1], median ranks and how many candidates there were.

    Args:
      z_i, z_t: [N, D], row by row of one pair; any length.
      picture, caption: int [N], equal where pictures or captions are.

    Returns:
      {"image_to_text_recall_1", ..., "text_to_image_median_rank", "pictures", "captions"}.
    """
    pictures, first_picture, picture = np.unique(picture, return_index=True, return_inverse=True)
    captions, first_caption, caption = np.unique(caption, return_index=True, return_inverse=True)
    z_i, z_t = z_i[first_picture], z_t[first_caption]
    every_picture, every_caption = np.arange(len(pictures)), np.arange(len(captions))
    to_text = ranking.pairs_through(every_picture, picture, caption)
    to_image = ranking.pairs_through(every_caption, caption, picture)
    found = {}
    for name, rank in (
        ("image_to_text", ranking.ranks(z_i, z_t, to_text)),
        ("text_to_image", ranking.ranks(z_t, z_i, to_image)),
    ):
        found |= {f"{name}_{key}": value for key, value in ranking.summary(rank).items()}
    return found | {"pictures": float(len(pictures)), "captions": float(len(captions))}
