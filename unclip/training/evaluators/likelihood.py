"""The variational bound on held-out pictures, in bits per dimension (Improved DDPM, 2102.09672)."""

from collections.abc import Iterator

import jax
import numpy as np

from unclip.runtime import sharding
from unclip.training.evaluators import passes


class Likelihood:
    """Every term of the bound on every picture: as many network calls a picture as timesteps.

    `held_out/bits_per_dim` estimates the same from one term a picture.

    Args:
      task: a decoder's; frozen: its frozen trees, on the mesh.
      batches: starts one pass over the held-out pictures.
      seed: of the noise, which is keyed by the sample's number.
    """

    interval, prefix = "metric", "likelihood"

    def __init__(self, task, frozen, batches: passes.Passes, mesh: jax.sharding.Mesh, *, seed=0):
        self.frozen, self.batches, self.mesh = frozen, batches, mesh

        def bound(params, frozen, batch):
            found = task.predict()["bound"](params, frozen, batch, jax.random.key(seed))
            found = {name: found[name] for name in ("bits_per_dimension", "prior", "terms")}
            return found | {"terms": found["terms"][0]}

        self.bound = jax.jit(bound, out_shardings=sharding.replicated(mesh))

    def run(self, state: dict, step: int) -> Iterator[tuple[str, float]]:
        """The whole bound, "likelihood/bits_per_dim"; of it the first step's term, which is the
        likelihood of the 256 levels, and what noise keeps of the picture."""
        bound = lambda batch: self.bound(state["ema"], self.frozen, batch)
        found = passes.collect(self.batches, bound, self.mesh, step)
        names = {
            "bits_per_dim": "bits_per_dimension",
            "decoder_bits": "terms",
            "prior_bits": "prior",
        }
        for name, key in names.items() if found else ():
            yield f"{self.prefix}/{name}", float(np.float64(found[key]).mean())
