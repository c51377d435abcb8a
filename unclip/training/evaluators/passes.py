"""One pass over the held-out samples: what the evaluators of a training run share.

Figures of a run are means over pictures that training never sees. Every process feeds its own rows
of a batch and gets every row of the results, so that all of them compute the same figures from
every sample once.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from unclip.runtime import collectives, distributed, sharding

Passes = Callable[[], Iterator[dict]]  # starts one pass: this process's rows, padded, with "valid"


class Evaluator(Protocol):
    """Measures a state at the intervals of a config.

    Attributes:
      interval: which of the config's intervals it follows: "eval", "sample" or "metric" for
        `eval_steps`, `sample_steps` and `metric_steps`.
      prefix: every number's name begins with it and a slash; unique in a run, since a resumed run
        knows by it what was measured already.
    """

    interval: str
    prefix: str

    def run(self, state: dict, step: int) -> Iterator[tuple[str, float | np.ndarray]]:
        """(name, number) or (name, picture), the same on every process.

        Polls `distributed.should_stop` between batches and, once it is true, gives nothing: the
        figure of half a pass is another figure.
        """


def collect(
    passes: Passes,
    compute: Callable[[dict], dict],
    mesh: jax.sharding.Mesh,
    step: int,
    *,
    identify: tuple[str, ...] = (),
    each: Callable[[dict], None] = lambda rows: None,
) -> dict[str, np.ndarray]:
    """Rows that `compute` makes of every valid sample, in the collection's order.

    Args:
      compute: a batch on the mesh -> {name: [B, ...]}, replicated over the mesh.
      step: of the run, for the log line of a stop.
      identify: batch entries whose equality matters; "NAME_id" int64 [N] is added for each, equal
        where the samples' entries are equal.
      each: called with the valid rows of every batch; what it takes out is not kept.

    Returns:
      {name: [N, ...]}, the same on every process; {} when the job is asked to stop, or where no
      sample is usable.
    """
    parts: dict[str, list] = {}
    with contextlib.closing(passes()) as batches:
        for batch in batches:
            rows = {f"{name}_id": digests(batch[name]) for name in identify}
            rows = {name: collectives.gather_rows(own) for name, own in rows.items()}
            valid = collectives.gather_rows(batch["valid"])
            rows |= jax.device_get(compute(sharding.put_batch(batch, mesh)))
            rows = {name: value[valid] for name, value in rows.items()}
            each(rows)
            for name, value in rows.items():
                parts.setdefault(name, []).append(value)
            if distributed.should_stop(step):
                return {}
    found = {name: np.concatenate(values) for name, values in parts.items()}
    if not found or not len(next(iter(found.values()))):
        return {}
    for name in identify:
        _, numbers = np.unique(found[f"{name}_id"], axis=0, return_inverse=True)
        found[f"{name}_id"] = numbers.reshape(-1)
    return found


def digests(rows: Any) -> np.ndarray:
    """uint32 [b, 4]: 128 bits of a hash of every row's bytes, equal for equal rows."""
    words = [hashlib.blake2b(np.ascontiguousarray(row), digest_size=16).digest() for row in rows]
    return np.frombuffer(b"".join(words), np.uint32).reshape(-1, 4)
