"""Batches as a pure function of (seed, position), from a collection of shards to NumPy arrays.

The position g is a global sample number: it counts samples over all epochs and processes and is the
whole state of the input. Sample g of a run is the entry `order(g)` of the collection (see
`order.make_order`); its crop and caption come from a generator keyed by (seed, g). So a run resumed
at g, on any number of processes, workers or threads, sees what an uninterrupted one would have
seen. Stages differ only in their transform, see `transforms`.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from unclip.errors import ConfigError, DataError
from unclip.input import order as orders
from unclip.input.filters import Filters
from unclip.input.order import generator
from unclip.input.samples import BadSample, Sample
from unclip.input.shards.collection import Collection
from unclip.input.tally import Bad, Tally
from unclip.input.workers import Watched, start_worker

_ENDLESS = 1 << 62  # rows of a source without an end: grain needs a length
_MAX_CHUNK = 32  # rows that a thread makes at a time
_MAX_FILTERED = 1000  # replacements tried for a row that filters reject
_NEAR_FILTERED = 64  # of these, the first so many are drawn from where the host reads anyway
Transform = Callable[[Sample, np.random.Generator], dict[str, np.ndarray]]


class _LazyGenerator:
    """`order.generator(*words)`, made when it is first used, which many transforms never do."""

    __slots__ = ("_made", "_words")

    def __init__(self, *words: int):
        self._words, self._made = words, None

    def __getattr__(self, name: str) -> Any:
        if self._made is None:
            self._made = generator(*self._words)
        return getattr(self._made, name)


def _storage_counts(collection: Collection) -> dict[str, int]:
    """Counters of this process's reading; {} where the collection has no storage of its own."""
    storage = getattr(collection, "storage", None)
    return storage.counters() if storage else {}


class _Chunk:
    """Some rows of a batch and the problems met while they were made; grain passes it on unchanged.

    Attributes:
      rows: a dict of arrays each; first: the row of the process's batch that the chunk begins with.
      bad: (row, number in the collection, reason) of every bad sample met.
      filtered: (row, reason) of every sample that filters rejected.
      storage: counters of the worker process's reading so far, by its process id.
    """

    __slots__ = ("bad", "filtered", "first", "rows", "storage")

    def __init__(self, first: int):
        self.first, self.rows = first, []
        self.bad: list[tuple[int, int, str]] = []
        self.filtered: list[tuple[int, str]] = []
        self.storage: dict[int, dict[str, int]] = {}


class _Rows:
    """grain's random-access source: chunk j of this process's rows."""

    closed = False

    def __init__(
        self,
        collection: Collection,
        order: Callable[[int], int],
        transform: Transform,
        *,
        filters: Filters,
        seed: int,
        start: int,
        total: int | None,
        batch_size: int,
        process_index: int,
        process_count: int,
        max_attempts: int,
        workers: int,
        chunk: int,
    ):
        self.collection, self.order, self.transform = collection, order, transform
        self.filters, self.seed, self.start, self.total = filters, seed, start, total
        self.batch_size, self.local = batch_size, batch_size // process_count
        self.first_row = process_index * self.local
        self.max_attempts, self.workers = max_attempts, workers
        self.chunk, self.chunks = chunk, -(-self.local // chunk)
        steps = None if total is None else -(-max(total - start, 0) // batch_size)
        self.length = (_ENDLESS // self.local if steps is None else steps) * self.chunks

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, j: int) -> _Chunk:
        step, first = divmod(int(j), self.chunks)
        chunk = _Chunk(first * self.chunk)
        g = self.start + step * self.batch_size + self.first_row
        for row in range(chunk.first, min(chunk.first + self.chunk, self.local)):
            if self.closed:
                break
            chunk.rows.append(self._row(g + row, row, chunk))
        if self.workers:
            chunk.storage[os.getpid()] = _storage_counts(self.collection)
        return chunk

    def _row(self, g: int, row: int, chunk: _Chunk) -> dict[str, np.ndarray]:
        i, bad, filtered, last = self.order(g), 0, 0, ""
        while bad < self.max_attempts and filtered < _MAX_FILTERED:
            try:
                # The caption is drawn anew at every attempt: the same sample may pass with another.
                words = self.seed, g, orders.TRANSFORM + (filtered << 8)
                sample, reason = self._read(i, words)
                if not reason:
                    return self.transform(sample, _LazyGenerator(*words))
                filtered += 1
                chunk.filtered.append((row, reason))
                last = reason
            except BadSample as error:
                bad += 1
                chunk.bad.append((row, i, error.reason))
                last = str(error)
            refused = i
            near = bad < self.max_attempts // 2 and filtered < _NEAR_FILTERED
            low, end = self.order.span(g, near)
            i = low + replacement(self.seed, g, bad + filtered, end - low)
        rejected = f" or rejected by filters ({filtered})" if filtered else ""
        raise DataError(
            f"sample {g} and {bad + filtered - 1} replacements for it are all bad"
            f"{rejected}; the last: {self.collection.key(refused)}: {last}"
        )

    def _read(self, i: int, words: tuple[int, int, int]) -> tuple[Sample | None, str]:
        """(sample i, why filters reject it or ""); (None, why) where its JSON was enough."""
        filters = self.filters
        if filters.reads_json and (reason := filters(self.collection.meta(i))):
            return None, reason
        sample = self.collection.read(i)
        if not filters.reads_caption:
            return sample, ""
        choose = getattr(self.transform, "caption", None)
        text = choose(sample, _LazyGenerator(*words)) if choose else sample.text
        return sample, filters(sample.meta, text)


def replacement(seed: int, g: int, attempt: int, n: int) -> int:
    """Which of n samples replaces an unusable sample g at attempt 1, 2, …"""
    return int(generator(seed, g, orders.REPLACEMENT).integers(n, size=attempt)[-1])


def _stack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    names = rows[0].keys()
    if any(row.keys() != names for row in rows):
        raise ValueError(f"a transform gave {sorted(names)} and then other arrays")
    return {name: np.stack([row[name] for row in rows]) for name in names}


def _packed(chunk: _Chunk) -> dict[str, Any]:
    """A worker's whole batch, laid out so that grain moves its arrays by shared memory."""
    arrays, chunk.rows = _stack(chunk.rows), []
    return {"arrays": arrays, "chunk": chunk}


class Batches(Iterator):
    """The iterator `make_source` returns: dicts of arrays, this process's rows of each batch.

    Attributes:
      position: the next global sample number; save it with the checkpoint and pass it as `start`.
      tally: counts of this process's bad, filtered and replaced samples; `problems`, `filtered`,
        `examples`, `seen` and `bad` are its attributes, see `tally.Tally`.
    """

    def __init__(
        self, rows: _Rows, tally: Tally, *, replace: bool, threads: int, workers: int, prefetch: int
    ):
        self.position, self.tally = rows.start, tally
        self._rows, self._replace, self._lock = rows, replace, threading.Lock()
        self._worker_storage: dict[int, dict[str, int]] = {}
        dataset = grain.MapDataset.source(rows)
        if workers:
            # Each worker process makes whole batches, so that rows of batches never mix.
            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
            dataset = (
                dataset.map(_packed)
                .to_iter_dataset(options)
                .mp_prefetch(
                    grain.MultiprocessingOptions(workers, per_worker_buffer_size=prefetch),
                    worker_init_fn=start_worker,
                )
            )
            self._iterator = Watched(dataset, endless=rows.total is None)
        else:
            ahead = max(threads, prefetch * rows.chunks)
            options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
            self._iterator = iter(dataset.to_iter_dataset(options))
        self._workers = workers

    @property
    def problems(self) -> Counter:
        return self.tally.problems

    @property
    def filtered(self) -> Counter:
        return self.tally.filtered

    @property
    def examples(self) -> list[str]:
        return self.tally.examples

    @property
    def seen(self) -> int:
        return self.tally.seen

    @property
    def bad(self) -> int:
        return self.tally.bad

    def __next__(self) -> dict[str, np.ndarray]:
        with self._lock:
            if self._iterator is None:
                raise ValueError("this source is closed")
            try:
                batch, chunks = self._next()
            except DataError:
                self.close()
                raise
            rows = self._rows
            first = self.position + rows.first_row
            numbers = np.arange(first, first + rows.local, dtype=np.uint64)
            batch["sample"] = np.stack(
                [numbers >> np.uint64(32), numbers & np.uint64(0xFFFFFFFF)], 1
            ).astype(np.uint32)
            real = rows.local if rows.total is None else min(max(rows.total - first, 0), rows.local)
            batch["valid"] = np.arange(rows.local) < real
            self._count(chunks, batch["valid"], first)
            self.position += rows.batch_size
            return batch

    def _next(self) -> tuple[dict[str, np.ndarray], list[_Chunk]]:
        if self._workers:
            found = next(self._iterator)
            return found["arrays"], [found["chunk"]]
        chunks = [next(self._iterator) for _ in range(self._rows.chunks)]
        return _stack([row for chunk in chunks for row in chunk.rows]), chunks

    def _count(self, chunks: list[_Chunk], valid: np.ndarray, first: int) -> None:
        """Counts a batch; without replacing, a row that holds another sample is not valid."""
        real = int(valid.sum())
        bad_rows = np.zeros(real, bool)
        found, filtered = [], Counter()
        substituted = set()
        for chunk in chunks:
            self._worker_storage |= chunk.storage
            for row, i, reason in chunk.bad:
                if row < real:  # padding is not counted
                    bad_rows[row] = True
                    found.append(Bad(first + row, *self._name(i), reason))
                    substituted.add(row)
            for row, reason in chunk.filtered:
                if row < real:
                    filtered[reason] += 1
                    substituted.add(row)
        if not self._replace:
            valid[list(substituted)] = False
        self.tally.add(bad_rows, found, filtered=filtered, substituted=len(substituted))
        verdict = self.tally.verdict()
        if verdict:
            self.close()
            raise DataError(verdict)

    def _name(self, i: int) -> tuple[str, str]:
        collection = self._rows.collection
        return collection.key(i), collection.shard_names[collection.locate(i)[0]]

    def drain_bad(self) -> list[dict[str, int | str]]:
        """The bad samples since the last call, see `Tally.drain`."""
        return self.tally.drain()

    def counters(self) -> dict[str, float]:
        """Counts so far of this process for a run's metrics; what never happened is left out."""
        found = Counter()
        for counts in (
            self._worker_storage.values()
            if self._workers
            else [_storage_counts(self._rows.collection)]
        ):
            found.update(counts)
        return self.tally.counters() | {
            f"storage/{name}": float(n) for name, n in found.items() if n
        }

    def close(self) -> None:
        """Ends the threads and worker processes; no batch comes after it."""
        if self._iterator is not None:
            self._rows.closed = True
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def make_source(
    collection: Collection,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    order: str = "global",
    streams: int = 0,
    window: int = 8192,
    proportions: Sequence[float] = (),
    filters: Filters | None = None,
    num_epochs: int | None = None,
    replace: bool = True,
    threads: int = 4,
    workers: int = 0,
    prefetch: int = 2,
    max_bad_fraction: float = 0.05,
    min_seen: int = 1000,
    max_attempts: int = 16,
    max_consecutive_bad: int = 0,
) -> Batches:
    """Iterates over batches of transformed samples from position `start` on.

    Process p of P delivers rows [p B/P, (p+1) B/P) of each global batch of B samples, so the rows
    of the assembled batch are the same for any P. The row of a sample that is bad, or that the
    filters reject, holds a replacement drawn by (seed, g, attempt).

    Args:
      collection: where samples come from.
      transform: (Sample, Generator) -> {name: array of fixed shape}; must pickle if `workers`. Its
        method `caption(sample, generator)`, if it has one, gives the caption that filters judge.
      batch_size: B, the global batch size, a multiple of `process_count`.
      seed: 0 <= seed < 2**64.
      start: the global sample number to begin with, `Batches.position` of an earlier run.
      shuffle: permute every epoch anew; False: the collection's own order.
      order, streams, window: see `order.make_order`; `streams` a multiple of `process_count`.
      proportions: the part of the rows for each of the patterns that the collection was opened by.
      filters: which samples to use; judged before a picture is decoded, and by the JSON alone, if
        that is enough, before it is read.
      num_epochs: None: without end; otherwise the last batch is padded with rows of `valid` False.
      replace: a replaced row counts as `valid`; False (evaluation) marks it as not valid.
      threads: decoding threads of this process; results do not depend on it.
      workers: decoding processes instead of threads; results do not depend on it.
      prefetch: batches prepared ahead, per worker.
      max_bad_fraction: of this process's rows, checked from `min_seen` rows on.
      max_attempts: a sample and its replacements that may be bad before an error; those that
        filters reject are not counted.
      max_consecutive_bad: rows of this process in a row that may be bad; 0 for any number.

    Returns:
      `Batches` of {the transform's arrays [B/P, …], "sample": uint32 [B/P, 2] (high and low words
      of g), "valid": bool [B/P]}.

    Raises:
      ConfigError: sizes that do not fit.
      DataError: while iterating, too many bad samples, a shard that cannot be read any more or a
        worker that was killed.
    """
    if batch_size < 1 or not 0 <= process_index < process_count or batch_size % process_count:
        raise ConfigError(
            f"batch size {batch_size}, process {process_index} of {process_count}: "
            "expected a batch size that is a multiple of the process count"
        )
    if not 0 <= seed < 1 << 64 or not 0 <= start < 1 << 62:
        raise ConfigError(f"seed {seed}, start {start}: expected 0 <= seed < 2**64, 0 <= start")
    if min(threads, workers, prefetch, max_consecutive_bad) < 0 or max_attempts < 1:
        raise ConfigError(
            f"threads {threads}, workers {workers}, prefetch {prefetch}, attempts "
            f"{max_attempts}, max_consecutive_bad {max_consecutive_bad}: expected "
            "none below 0 and at least one attempt"
        )
    if num_epochs is not None and (num_epochs < 1 or len(proportions)):
        raise ConfigError(
            f"num_epochs {num_epochs}, proportions {tuple(proportions)}: expected at least "
            "1, or None for no end, as with proportions, where each part has its own epochs"
        )
    if not len(collection):
        raise DataError("the collection is empty")
    plain = order == "global" and not len(proportions)  # independent of the shards
    make = orders.make_order(
        [len(collection)] if plain else collection.counts,
        seed if shuffle else None,
        order=order,
        groups=collection.groups if len(proportions) else None,
        proportions=proportions,
        streams=streams,
        batch_size=batch_size,
        window=window,
    )
    if order == "streamed" and orders.default_streams(batch_size, streams) % process_count:
        raise ConfigError(
            f"{orders.default_streams(batch_size, streams)} streams for "
            f"{process_count} processes: expected a multiple of the process count"
        )
    local = batch_size // process_count
    rows = _Rows(
        collection,
        make,
        transform,
        filters=Filters.parse(filters),
        seed=seed,
        start=start,
        total=None if num_epochs is None else num_epochs * len(collection),
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        max_attempts=max_attempts,
        workers=workers,
        chunk=local if workers else min(_MAX_CHUNK, -(-local // max(1, threads))),
    )
    tally = Tally(
        max_bad_fraction=max_bad_fraction,
        min_seen=min_seen,
        max_consecutive_bad=max_consecutive_bad,
    )
    return Batches(
        rows, tally, replace=replace, threads=threads, workers=workers, prefetch=max(1, prefetch)
    )


def make_eval_source(collection: Collection, transform: Transform, **options: Any) -> Batches:
    """One pass in the collection's order, every usable sample once; takes `make_source`'s options.

    The last batch is padded; paddings and bad samples have `valid` False, so the number of valid
    rows over all processes is the number of usable samples.
    """
    options = {"seed": 0, "max_bad_fraction": 1.0, **options}
    return make_source(collection, transform, shuffle=False, num_epochs=1, replace=False, **options)
