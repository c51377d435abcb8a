"""The analytic variance of a trained prior: what its network is off, by timestep.

Table 3 of the paper samples the diffusion prior with it (Analytic-DPM, arXiv 2201.06503).
"""

import jax
import numpy as np

from unclip.runtime import sharding
from unclip.training.evaluators import passes

VISITS = 8  # of every timestep at least; each visit is a mean over the D dimensions of a z_i
STRIDE = 619  # coprime to the number of timesteps, so that neighbouring samples spread over them


def x0_error(
    task, frozen, params, batches: passes.Passes, mesh: jax.sharding.Mesh, samples: int, seed: int
) -> np.ndarray | None:
    """Mean squared error of x_0 a dimension at every timestep, float32 [T]; None when stopped.

    Args:
      task: a diffusion prior's; frozen: its frozen trees, on the mesh; params: as they are drawn
        with.
      batches: starts one pass over training samples; samples: how many one has.
      seed: of the noise.
    """
    steps = len(task.schedule)

    def compute(params, frozen, batch, turn):
        t = (batch["sample"][:, 1] * STRIDE + turn * (STRIDE + 2)) % steps
        t = t.astype(np.int32)
        key = jax.random.fold_in(jax.random.key(seed), turn)
        return {"t": t, "error": task.x0_error(params, frozen, batch, t, key)}

    compute = jax.jit(compute, out_shardings=sharding.replicated(mesh))
    total, count = np.zeros(steps), np.zeros(steps)
    for turn in range(-(-VISITS * steps // samples)):
        run = lambda batch, turn=turn: compute(params, frozen, batch, np.uint32(turn))
        found = passes.collect(batches, run, mesh, turn)
        if not found:
            return None
        np.add.at(total, found["t"], found["error"])
        np.add.at(count, found["t"], 1)
    met = count > 0
    # A timestep that no sample met takes what lies between its neighbours.
    values = np.interp(np.arange(steps), np.flatnonzero(met), total[met] / count[met])
    return values.astype(np.float32)
