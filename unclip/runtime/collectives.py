"""Values over the processes of a job: every process must call each function equally often.

In a job of one process each returns its own value at once. Arrays keep their dtype: float64 never
becomes float32 on the way, so results are the same for any number of processes.
"""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from unclip import errors
from unclip.runtime import distributed

PIECE_BYTES = 16 << 20  # bytes that a process sends at once


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """This process's rows [b, ...] of every process, in process order [b * processes, ...].

    Every process gives equally many rows, of 32 bits a number or fewer.
    """
    if distributed.process_count() == 1:
        return rows
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def gather_arrays(own: np.ndarray) -> list[np.ndarray]:
    """The arrays of every process, in process order, flat; lengths may differ, no bit is lost."""
    if distributed.process_count() == 1:
        return [own.reshape(-1)]
    # Sent as bytes, because JAX would turn float64 into float32.
    data = own.reshape(-1).view(np.uint8)
    halves = np.array([data.size >> 20, data.size % (1 << 20)], np.int32)
    sizes = [(int(a) << 20) + int(b) for a, b in multihost_utils.process_allgather(halves)]
    data = np.pad(data, (0, max(sizes) - data.size))
    pieces = [
        multihost_utils.process_allgather(data[start : start + PIECE_BYTES])
        for start in range(0, len(data), PIECE_BYTES)
    ]
    pieces = pieces or [np.zeros((len(sizes), 0), np.uint8)]
    return [row[:size].view(own.dtype) for row, size in zip(np.concatenate(pieces, 1), sizes)]


def gather_objects(own: Any) -> list[Any]:
    """The JSON-able values of every process, in process order."""
    text = np.frombuffer(json.dumps(own).encode(), np.uint8)
    return [json.loads(data.tobytes()) for data in gather_arrays(text)]


def from_main(value: int) -> int:
    """Process 0's value, of 32 bits, on every process."""
    if distributed.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def bitwise_or(flags: np.ndarray) -> np.ndarray:
    """The bits that any process has set, of integer arrays of one shape."""
    if distributed.process_count() == 1:
        return flags
    return np.bitwise_or.reduce(multihost_utils.process_allgather(flags), axis=0)


def raise_together(failure: errors.UnclipError | None) -> None:
    """Raises the first process's failure on every process, so that none waits for another."""
    found = gather_objects(None if failure is None else [type(failure).__name__, str(failure)])
    if failure is not None:
        raise failure
    for kind, message in filter(None, found):
        raise getattr(errors, kind, errors.DataError)(message)


def on_host(tree):
    """A tree of arrays sharded over a mesh, as whole arrays in this process's memory."""
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
