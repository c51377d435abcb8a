"""Embeddings of a collection by a frozen CLIP: what whitening, PCA and stored training inputs need.

The prior is trained on z_i of the training pictures and measures their mean, deviation and
principal components first (section 2.2 of the paper).
"""

from collections.abc import Iterator

import jax
import numpy as np

from unclip import tasks
from unclip.input import shards, source
from unclip.models import clip as clip_model
from unclip.runtime import distributed, progress, sharding
from unclip.tasks.clip import FrozenClip


def embed(
    clip_arch: dict,
    params,
    collection: shards.Collection,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    captions: tuple[str, ...] = ("txt",),
    limit: int | None = None,
    threads: int = 4,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Embeds samples in the collection's order, centre crops.

    Every process yields every row, so that all of them compute the same statistics.

    Args:
      clip_arch: fields of the frozen CLIP; params: its parameters.
      batch_size: global, a multiple of the mesh's data and fsdp axes.
      captions: where captions come from, see `input.source.ImageText`.
      limit: stop after this many samples.

    Yields:
      (z_i float32 [b, D], z_t float32 [b, D], valid bool [b]); rows that are not valid are bad
      pictures or padding.
    """
    model = clip_model.CLIP(**tasks.arguments(clip_arch))
    frozen = FrozenClip(model)

    def both(params, image, tokens):
        return frozen.image(params, image), frozen.text(params, tokens)[0]

    run = jax.jit(both, out_shardings=sharding.replicated(mesh))
    batches = source.make_eval_source(
        collection,
        source.ImageText(model.image_size, model.context, captions=captions),
        batch_size=batch_size,
        process_index=distributed.process_index(),
        process_count=distributed.process_count(),
        threads=threads,
    )
    total = len(collection) if limit is None else min(limit, len(collection))
    with batches, progress.progress(total, "embedding", "img") as bar:
        seen = 0
        for batch in batches:
            valid = gather(batch["valid"])
            batch = sharding.put_batch(batch, mesh)
            z_i, z_t = run(params, batch["image"], batch["tokens"])
            yield np.asarray(z_i), np.asarray(z_t), valid
            seen += len(valid)
            bar.update(min(len(valid), total - bar.count))
            if seen >= total:
                return


def gather(rows: np.ndarray) -> np.ndarray:
    """This process's rows [b, ...] of every process, in process order [b * processes, ...]."""
    if distributed.process_count() == 1:
        return rows
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))
