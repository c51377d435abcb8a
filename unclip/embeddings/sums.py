"""Mean and covariance of stored embeddings, summed shard by shard so that a job can be resumed.

Both follow from float64 sums over all rows. Each process saves the sums of the shards that it
embedded with the list of these shards, so a resumed job neither counts a shard twice nor reads
again what was summed. Shards that no saved sum covers are read from their files. The rows are
summed with the precision in which they are stored.
"""

import json
import os
import pathlib
import time
from collections.abc import Collection as Container
from typing import Any

import numpy as np

from unclip import errors
from unclip.embeddings.store import FORMAT, KINDS, STATISTICS, Shard, Store
from unclip.files import moments, tensors

FEATURES = {kind: f"clip/{kind}" for kind in KINDS}  # their names in the statistics file
_CHUNK = 4096  # rows summed at once
_SAVE_SECONDS = 120.0
_MERGED = "moments.safetensors"


class Sums:
    """The moments of z_i and z_t over the shards that one process embeds.

    Args:
      folder: of the store; process: whose file it is.
      width: D.
      new: digests of shards that will be added. An earlier file that covers one of them is not
        continued, or that shard would count twice.
    """

    def __init__(self, folder: pathlib.Path, process: int, width: int, new: Container[str] = ()):
        self.path = folder / f"moments-{process:05d}.safetensors"
        found = _read(self.path, width)
        if found is None or any(digest in new for digest in found[1]):
            found = {kind: moments.Moments(width) for kind in KINDS}, []
        self.moments, self.digests = found
        self.saved = time.monotonic()

    def add(self, store: Store, shard: Shard) -> None:
        """Adds a shard's rows as its files hold them; saves at intervals of time."""
        add(self.moments, store, shard)
        self.digests.append(shard.digest)
        if time.monotonic() - self.saved > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Writes the file unless it would be empty."""
        if self.digests:
            _write(self.path, self.moments, self.digests)
        self.saved = time.monotonic()


def add(sums: dict[str, moments.Moments], store: Store, shard: Shard) -> None:
    """Adds the rows of one stored shard to the moments of z_i and z_t."""
    for kind, total in sums.items():
        for first in range(0, shard.rows, _CHUNK):
            count = min(_CHUNK, shard.rows - first)
            rows = store.rows(shard.digest, kind, first, count)
            total.add(rows, np.isfinite(rows).all(1))


def unmerged(store: Store) -> list[pathlib.Path]:
    """The files of sums that `merge` has not merged yet."""
    return sorted(store.folder.glob("moments-*.safetensors"))


def merge(store: Store, provenance: dict[str, Any]) -> bool:
    """Moments of every shard of a store from the saved sums, and the statistics file.

    Args:
      provenance: JSON-able, goes into the file.

    Returns:
      Whether there were enough rows for a covariance.

    Raises:
      DataError: a file of rows cannot be read, or the statistics not be written.
    """
    total = {kind: moments.Moments(store.embed_dim) for kind in KINDS}
    missing = dict(store.shards)
    parts = unmerged(store)
    paths = [store.folder / _MERGED, *parts]
    found = [sums for sums in (_read(path, store.embed_dim) for path in paths) if sums is not None]
    # The sums that cover most shards come first; a file that repeats one of their shards is left
    # out.
    for sums, digests in sorted(found, key=lambda sums: -len(sums[1])):
        if digests and missing.keys() >= set(digests):
            for kind in KINDS:
                total[kind].merge(sums[kind])
            for digest in digests:
                del missing[digest]
    for shard in missing.values():
        add(total, store, shard)
    _write(store.folder / _MERGED, total, list(store.shards))
    for path in parts:
        path.unlink(missing_ok=True)
    statistics = {
        FEATURES[kind]: moments.Statistics.of(sums, provenance)
        for kind, sums in total.items()
        if sums.count > 1
    }
    if statistics:
        moments.write_statistics(store.folder / STATISTICS, statistics)
    return bool(statistics)


def read(folder: str | os.PathLike) -> dict[str, moments.Statistics]:
    """{"z_i", "z_t": count, mean and covariance} of a finished folder of embeddings.

    Raises:
      DataError: there are none, or they are damaged.
    """
    found = moments.read_statistics(pathlib.Path(folder) / STATISTICS).statistics
    return {kind: found[name] for kind, name in FEATURES.items() if name in found}


def _write(path: pathlib.Path, sums: dict[str, moments.Moments], digests: list[str]) -> None:
    arrays = {}
    for kind, total in sums.items():
        arrays |= {f"{kind}/total": total.total, f"{kind}/outer": total.outer}
    counts = {kind: total.count for kind, total in sums.items()}
    about = {"format": FORMAT, "shards": digests, "counts": counts}
    tensors.write(path, arrays, {"unclip": json.dumps(about)})


def _read(path: pathlib.Path, width: int) -> tuple[dict[str, moments.Moments], list[str]] | None:
    """(moments by kind, digests they cover); None where there is no such file, or a damaged one."""
    if not path.is_file():
        return None
    try:
        found, metadata = tensors.read(path)
        about = json.loads(metadata["unclip"])
        sums = {}
        for kind in KINDS:
            sums[kind] = moments.Moments(width)
            sums[kind].count = int(about["counts"][kind])
            sums[kind].total = found[f"{kind}/total"].read()
            sums[kind].outer = found[f"{kind}/outer"].read()
            sound = (
                sums[kind].total.shape == (width,)
                and sums[kind].outer.shape == (width, width)
                and np.isfinite(sums[kind].outer).all()
            )
            if not sound:
                return None
        digests = list(map(str, about["shards"]))
    except (errors.DataError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return sums, digests
