"""Draws on a fixed set of captions and pictures while a stage trains: numbers and a grid."""

from collections.abc import Iterator

import jax
import numpy as np

from unclip.files import images
from unclip.runtime import sharding
from unclip.tasks.arrays import to_uint8


class Samples:
    """Calls a task's `sample` on one fixed batch.

    A picture stage gives a grid: the drawn picture of every sample, beside the true one (and the
    low-resolution one, for an upsampler). The prior gives how near its embeddings come.

    Args:
      task: a `tasks.base.Task` whose `predict` may have "sample"; frozen: its frozen trees.
      batch: this process's rows of the fixed batch.
      name: what the samples are, e.g. "train" or "held_out".
    """

    interval = "sample"

    def __init__(self, task, frozen, batch: dict, mesh: jax.sharding.Mesh, *, seed=0, name="train"):
        self.frozen, self.mesh, self.prefix = frozen, mesh, f"samples_{name}"
        self.batch = sharding.put_batch(batch, mesh)
        sample = task.predict().get("sample")
        self.sample = sample and jax.jit(
            lambda params, frozen, batch: (
                sample(params, frozen, batch, jax.random.key(seed)),
                {k: batch[k] for k in ("low", "image", "valid") if k in batch},
            ),
            out_shardings=sharding.replicated(mesh),
        )

    def run(self, state: dict, step: int) -> Iterator[tuple[str, float | np.ndarray]]:
        """(name, number) and, for picture stages, ("samples/...", uint8 [H, W, 3])."""
        if self.sample is None:
            return
        drawn, true = jax.device_get(self.sample(state["ema"], self.frozen, self.batch))
        pictures = drawn.pop("pictures", None)
        for name, value in drawn.items():
            yield f"{self.prefix}/{name}", float(value)
        if pictures is None:
            return
        valid = true.pop("valid")  # a small collection is padded to the device count
        true = {name: rows[valid] for name, rows in true.items()}
        drawn = to_uint8(pictures[valid])
        side = drawn.shape[1]
        columns = [drawn, true["image"]]
        if "low" in true:
            repeat = side // true["low"].shape[1]
            columns.insert(0, true["low"].repeat(repeat, axis=1).repeat(repeat, axis=2))
        rows = np.stack(columns, axis=1).reshape(-1, side, side, 3)
        pairs = max(1, 12 // len(columns))
        yield self.prefix, images.grid(list(rows), columns=pairs * len(columns))
