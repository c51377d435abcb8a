"""Batches straight from shards without an index, by webdataset's pipeline.

For large collections that are read once or in part, where indexing all shards beforehand does not
pay. Shards are drawn, opened, shuffled and batched by webdataset's steps; the samples within a
shard are found by our `walk_shard`, so a picture is never paired with the caption of another shard.

What streaming cannot promise, and an indexed collection (`make_source`) does:

- that every sample comes once an epoch: shards are drawn with replacement, there are no epochs, and
  after as many samples as there are about a third has not been seen;
- that a resumed run continues where it was: it starts again with other draws (the position counts
  samples and is mixed into the seed); the same position, processes, workers and seed give the same
  batches, any other number of processes or workers gives others;
- how many samples there are, or that they come in equal parts from all shards;
- that damage is known before training: it is met while reading, counted, and ends the run only
  beyond `max_bad_fraction`.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from unclip.errors import ConfigError, DataError
from unclip.input import captions as caption_sources
from unclip.input.storage.address import COUNTERS, shown
from unclip.input.storage.storage import Storage
from unclip.input.streaming.worker import Fault, Plan
from unclip.input.workers import Watched, start_worker

_LISTED = 10_000  # kept until `drain_bad` asks for them


class Stream(Iterator):
    """The iterator `make_stream` returns: dicts of arrays, this process's rows of each batch.

    Attributes:
      position: samples asked for so far by all processes; save it and pass it as `start`.
      seen: rows delivered, paddings left out.
      bad: samples that were met and could not be used; problems: Counter by reason of these, of
        the members and samples left out in walking, and of the shards that could not be used.
      filtered: Counter by reason of what `filters` rejected.
      examples: the first few that were left out, "SHARD: KEY: REASON".
    """

    def __init__(
        self, plan: Plan, *, workers: int, prefetch: int, max_bad_fraction: float, min_seen: int
    ):
        self.position, self.seen, self.bad = plan.start, 0, 0
        self.problems, self.filtered, self.examples = Counter(), Counter(), []
        self._plan, self._lock = plan, threading.Lock()
        self._max_bad_fraction, self._min_seen = max_bad_fraction, min_seen
        self._bad_shards = self._unlisted = 0
        self._listed: list[Fault] = []
        self._storage: dict[int, list[int]] = {}
        if workers:
            self._iterator = Watched(
                plan.mp_prefetch(
                    grain.MultiprocessingOptions(workers, per_worker_buffer_size=prefetch),
                    worker_init_fn=start_worker,
                ),
                endless=plan.passes is None,
            )
        else:
            self._iterator = iter(plan)

    def __next__(self) -> dict[str, np.ndarray]:
        with self._lock:
            if self._iterator is None:
                raise ValueError("this stream is closed")
            batch = {}
            while not batch:  # a worker's last message has no batch, only what was left out
                found = self._next()
                batch = found["batch"]
                self._storage[found["worker"]] = found["storage"]
                self._count(
                    [Fault(*fault) for fault in found["faults"]],
                    int(batch["valid"].sum()) if batch else 0,
                )
            local = self._plan.local
            first = self.position + self._plan.process_index * local
            numbers = np.arange(first, first + local, dtype=np.uint64)
            batch["sample"] = np.stack(
                [numbers >> np.uint64(32), numbers & np.uint64(0xFFFFFFFF)], 1
            ).astype(np.uint32)
            self.position += local * self._plan.process_count
            return batch

    def _next(self) -> dict[str, Any]:
        try:
            return next(self._iterator)
        except StopIteration:
            if self.seen:
                raise
            raise DataError(
                f"no usable sample in {len(self._plan.paths)} shards, first "
                f"{shown(self._plan.paths[0])!r}: {dict(self.problems)}"
            ) from None
        except DataError:
            self.close()
            raise

    def _count(self, faults: Sequence[Fault], rows: int) -> None:
        self.seen += rows
        for fault in faults:
            if fault.kind == "filtered":
                self.filtered[fault.reason] += 1
                continue
            self.problems[fault.reason] += fault.count
            self.bad += fault.kind == "sample"
            self._bad_shards += fault.kind == "shard"
            if len(self.examples) < 5:
                self.examples.append(f"{fault.shard}: {fault.key}: {fault.reason}")
            if len(self._listed) < _LISTED:
                self._listed.append(fault)
            else:
                self._unlisted += fault.count
        met = self.seen + self.bad
        if met >= self._min_seen and self.bad > self._max_bad_fraction * met:
            self.close()
            raise DataError(
                f"{self.bad} of {met} samples are bad, more than "
                f"max_bad_fraction={self._max_bad_fraction}: {dict(self.problems)}; "
                f"e.g. {'; '.join(self.examples)}"
            )

    def drain_bad(self) -> list[dict[str, int | str]]:
        """What was left out since the last call: {"key", "shard", "reason"} each, with "count"
        where it stands for several; at most 10,000, then {"unlisted": n} says how many more."""
        rows = [
            {"key": fault.key, "shard": fault.shard, "reason": fault.reason}
            | ({"count": fault.count} if fault.count > 1 else {})
            for fault in self._listed
        ]
        rows += [{"unlisted": self._unlisted}] if self._unlisted else []
        self._listed, self._unlisted = [], 0
        return rows

    def counters(self) -> dict[str, float]:
        """Counts so far of this process for a run's metrics; what never happened is left out."""
        found = {"bad": self.bad, "bad_shards": self._bad_shards, "filtered": self.filtered.total()}
        found |= {f"bad/{reason}": n for reason, n in self.problems.items()}
        found |= {f"filtered/{reason}": n for reason, n in self.filtered.items()}
        for name, *counts in zip(COUNTERS, *self._storage.values()):
            found[f"storage/{name}"] = sum(counts)
        return {name: float(n) for name, n in found.items() if n}

    def close(self) -> None:
        """Ends the threads and worker processes; no batch comes after it."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def make_stream(
    patterns: str | Sequence[str],
    transform: Callable,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    passes: int | None = None,
    shuffle_samples: int = 8192,
    threads: int = 4,
    workers: int = 0,
    prefetch: int = 2,
    storage: Storage | None = None,
    text: bool = True,
    captions: Sequence[str] = caption_sources.STANDARD,
    filters: Callable[[dict, str], str] | None = None,
    max_bad_fraction: float = 0.05,
    min_seen: int = 1000,
    max_consecutive_bad: int = 0,
) -> Stream:
    """Streams batches of transformed samples; the module's docstring says what this cannot promise.

    Args:
      patterns: shards, see `Storage.expand`.
      transform: (Sample, Generator) -> {name: array of fixed shape}; must pickle if `workers`.
      batch_size: B, the global batch size, a multiple of `process_count`.
      seed: 0 <= seed < 2**64.
      start: `Stream.position` of an earlier run; further draws differ, they do not continue.
      process_index, process_count: this process; each draws for itself from all shards.
      passes: None: without end, shards drawn with replacement; n: every sample of every readable
        shard n times, in a single process, and each worker's last batch is padded with rows of
        `valid` False.
      shuffle_samples: rows in the shuffle buffer, over as many shards as they span; 0: the order
        of the shards' members.
      threads: reading and decoding threads (of each worker); results do not depend on it.
      workers: processes that read and decode, each its own stream; results depend on it.
      prefetch: batches prepared ahead, per worker.
      storage: for remote shards one with a `cache` folder, where their blocks lie between the walk
        of a shard and the reading of its samples.
      text, captions: as for `open_shards`.
      filters: (json, chosen caption) -> "" or why the sample is skipped; it is not counted as bad.
      max_bad_fraction: of the samples met by this process, checked from `min_seen` on.
      max_consecutive_bad: samples of one stream in a row that may be bad; 0: 10,000.

    Returns:
      `Stream` of {the transform's arrays [B/P, …], "sample": uint32 [B/P, 2] (high and low words
      of the number of the row among all rows), "valid": bool [B/P]}.

    Raises:
      ConfigError: sizes that do not fit, passes on several processes, remote shards without cache.
      DataError: nothing matches; while iterating, too many bad samples, 20 unusable shards or
        10,000 unusable samples in a row, no sample at all, or a worker that was killed.
    """
    if batch_size < 1 or not 0 <= process_index < process_count or batch_size % process_count:
        raise ConfigError(
            f"batch size {batch_size}, process {process_index} of {process_count}: "
            "expected a batch size that is a multiple of the process count"
        )
    if not 0 <= seed < 1 << 64 or not 0 <= start < 1 << 62:
        raise ConfigError(f"seed {seed}, start {start}: expected 0 <= seed < 2**64, 0 <= start")
    numbers = {
        "threads": threads,
        "workers": workers,
        "prefetch": prefetch,
        "shuffle_samples": shuffle_samples,
        "max_consecutive_bad": max_consecutive_bad,
    }
    if min(numbers.values()) < 0 or (passes is not None and passes < 1):
        raise ConfigError(
            f"{numbers}, passes {passes}: expected none below 0, and at least one "
            "pass, or None for no end"
        )
    if passes is not None and process_count > 1:
        raise ConfigError(
            f"{passes} passes on {process_count} processes: shards without an index have no "
            "common length to stop at; `unclip index` them, or passes=None"
        )
    storage = storage or Storage(whole_blocks=True)
    paths = storage.expand(patterns)
    remote = next((path for path in paths if not storage.local(path)), None)
    if remote and not (storage.cache and storage.whole_blocks):
        raise ConfigError(
            f"shard {shown(remote)!r}: streaming remote shards needs a storage with "
            "whole_blocks and a cache folder, where they lie until they are used"
        )
    local = batch_size // process_count
    plan = Plan(
        paths,
        transform,
        local=local,
        seed=seed,
        start=start,
        process_index=process_index,
        process_count=process_count,
        passes=passes,
        shuffle_samples=shuffle_samples,
        threads=threads,
        ahead=max(threads, prefetch * local),
        storage=storage,
        text=text,
        captions=caption_sources.checked(captions),
        filters=filters,
        max_consecutive_bad=max_consecutive_bad,
    )
    return Stream(
        plan,
        workers=workers,
        prefetch=max(1, prefetch),
        max_bad_fraction=max_bad_fraction,
        min_seen=min_seen,
    )
