"""The training loss on pictures that training never sees."""

from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from unclip.runtime import distributed, sharding


class HeldOutLoss:
    """Every metric of a task's loss, averaged over a fixed set of samples.

    Noise and timesteps are keyed by the sample's number, so the figure is comparable from step to
    step and run to run.

    Args:
      task: a `tasks.base.Task`; frozen: its frozen trees, on the mesh.
      batches: a function that starts one pass: dicts of this process's rows, padded, with "valid".
      seed: of the noise.
      name: prefix of the metrics.
    """

    interval = "eval"

    def __init__(
        self,
        task,
        frozen,
        batches: Callable[[], Iterable[dict]],
        mesh: jax.sharding.Mesh,
        *,
        seed: int = 0,
        name: str = "held_out",
    ):
        self.frozen, self.batches, self.mesh, self.prefix = frozen, batches, mesh, name

        def loss(params, frozen, batch):
            metrics = task.loss(params, frozen, batch, jax.random.key(seed), train=False)[1]
            return metrics, batch["valid"].sum()

        self.loss = jax.jit(loss, out_shardings=sharding.replicated(mesh))

    def run(self, state: dict, step: int) -> Iterator[tuple[str, float]]:
        """(name, mean over all valid samples) of every metric; nothing when there are none."""
        sums, count = {}, 0
        for batch in self.batches():
            batch = sharding.put_batch(batch, self.mesh)
            metrics, valid = jax.device_get(self.loss(state["ema"], self.frozen, batch))
            count += int(valid)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value) * int(valid)
            if distributed.should_stop(step):
                return
        for name, value in sums.items():
            yield f"{self.prefix}/{name}", float(np.float64(value) / max(count, 1))
