"""One decoding process's part of a stream: shards drawn, walked, shuffled, read and batched.

The steps are webdataset's (`DataPipeline`, its shard lists and its shuffle buffer), the samples of
a shard are ours (`walk_shard`), so that a picture and its caption are always of one key of one
shard. The shuffle buffer holds rows of an index and not samples: ten thousand of them are a few
megabytes, and a shard's own rows are fully shuffled before.
"""

import functools
import itertools
import os
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import numpy as np

from unclip.errors import ConfigError, DataError
from unclip.input.samples import BadSample
from unclip.input.shards.index import ShardIndex
from unclip.input.shards.walk import MAX_LISTED, NOT_TARS, walk_shard
from unclip.input.storage.address import COUNTERS, shown
from unclip.input.storage.storage import Storage

MAX_SKIPPED = 10_000  # bad or filtered samples in a row
MAX_EMPTY_SHARDS = 20  # shards in a row without a sample
_FETCHERS = 4  # blocks of a remote shard that are fetched at the same time


class Fault(NamedTuple):
    """What was left out: `kind` is "sample", "filtered", "shard", or "member" (a member, or the
    `count` samples of a shard, that its walk left out); `key` is "" where there is none."""

    kind: str
    reason: str
    shard: str
    key: str
    count: int = 1


class _Row(NamedTuple):
    path: str
    shard: ShardIndex
    row: int


class Plan(grain.IterDataset):
    """What a stream reads; iterating gives a `_Stream` in each decoding process."""

    def __init__(
        self,
        paths: Sequence[str],
        transform: Callable,
        *,
        local: int,
        seed: int,
        start: int,
        process_index: int,
        process_count: int,
        passes: int | None,
        shuffle_samples: int,
        threads: int,
        ahead: int,
        storage: Storage,
        text: bool,
        captions: Sequence[str],
        filters: Callable[[dict, str], str] | None,
        max_consecutive_bad: int,
    ):
        super().__init__()
        self.paths, self.transform, self.local = list(paths), transform, local
        self.seed, self.start = seed, start
        self.process_index, self.process_count = process_index, process_count
        self.passes, self.shuffle_samples = passes, shuffle_samples
        self.threads, self.ahead = threads, ahead
        self.storage, self.text, self.captions, self.filters = storage, text, captions, filters
        self.max_consecutive_bad = max_consecutive_bad
        self.worker, self.workers = 0, 1

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Called by grain in each decoding process: the slice says which of them it is."""
        self.worker, self.workers = sl.start, sl.step

    def __iter__(self) -> "_Stream":
        return _Stream(self)


class _Stream(grain.DatasetIterator):
    """One decoding process's batches, with what was left out on the way."""

    def __init__(self, plan: Plan):
        super().__init__()
        self._plan = plan
        # Derived from the arguments alone, never from the environment.
        self._seed = [
            plan.seed,
            plan.start,
            plan.process_index,
            plan.process_count,
            plan.worker,
            plan.workers,
        ]
        self._faults: deque[Fault] = deque()
        self._empty = 0
        self._opener = ThreadPoolExecutor(1, "stream-shards")
        self._readers = ThreadPoolExecutor(plan.threads, "stream-read") if plan.threads else None
        self._samples = self._arrays()

    def __next__(self) -> dict[str, Any]:
        """{"batch": arrays, or {} at the end, "faults", "worker", "storage": its counters}."""
        rows = list(itertools.islice(self._samples, self._plan.local))
        batch = {}
        if rows:
            batch["valid"] = np.arange(self._plan.local) < len(rows)
            rows += rows[-1:] * (self._plan.local - len(rows))
            batch |= {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        elif not self._faults:
            raise StopIteration
        faults = [tuple(self._faults.popleft()) for _ in range(len(self._faults))]
        counters = self._plan.storage.counters()
        return {
            "batch": batch,
            "faults": faults,
            "worker": self._plan.worker,
            "storage": [counters[name] for name in COUNTERS],
        }

    def get_state(self) -> dict[str, int]:
        return {}  # a stream cannot be resumed

    def set_state(self, state: dict[str, int]) -> None:
        raise ConfigError("a stream has no state to go back to")

    def close(self) -> None:
        self._samples.close()
        for pool in (self._opener, self._readers):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    def _arrays(self) -> Iterator[dict[str, np.ndarray]]:
        skipped = bad = 0
        limit = self._plan.max_consecutive_bad or MAX_SKIPPED
        rows = enumerate(self._pipeline())
        for found in _in_order(self._readers, self._read, rows, self._plan.ahead):
            if not isinstance(found, Fault):
                skipped = bad = 0
                yield found
                continue
            self._faults.append(found)
            skipped += 1
            bad += found.kind == "sample"
            if skipped == MAX_SKIPPED or bad > limit:
                raise DataError(
                    f"{skipped} samples in a row could not be used, {bad} of them bad, the last "
                    f"{found.shard}: {found.key}: {found.reason}; {dict(totals(self._faults))}"
                )

    def _pipeline(self) -> Iterable[_Row]:
        webdataset, plan = secure_webdataset(), self._plan
        word = int(np.random.default_rng(self._seed).integers(1 << 31))
        if plan.passes is None:
            # Every stream draws from all shards, so none can be left without shards.
            steps = [
                webdataset.ResampledShards(
                    plan.paths, seed=word, worker_seed=lambda: 0, deterministic=True
                )
            ]
        else:
            # All workers must see the same order, or the shards they take would overlap.
            seeds = [
                int(np.random.default_rng([plan.seed, plan.start, n]).integers(1 << 31))
                if plan.shuffle_samples
                else None
                for n in range(plan.passes)
            ]
            passes = [webdataset.SimpleShardList(plan.paths, seed=seed) for seed in seeds]
            steps = [
                lambda: itertools.chain.from_iterable(passes),
                lambda shards: itertools.islice(shards, plan.worker, None, plan.workers),
            ]
        steps.append(self._rows)
        if plan.shuffle_samples:
            steps.append(
                webdataset.shuffle(
                    plan.shuffle_samples,
                    initial=min(1000, plan.shuffle_samples),
                    rng=random.Random(word),
                )
            )
        return webdataset.DataPipeline(*steps)

    def _rows(self, shards: Iterable[dict[str, str]]) -> Iterator[_Row]:
        """The rows of one shard after the other, each shard's shuffled."""
        paths = (shard["url"] for shard in shards)
        for n, (path, shard) in enumerate(_in_order(self._opener, self._open, paths, 1)):
            if shard is None:
                continue
            count = shard.captioned if self._plan.text else shard.count
            order = np.arange(count)
            if self._plan.shuffle_samples:
                np.random.default_rng([*self._seed, n]).shuffle(order)
            for row in order.tolist():
                yield _Row(path, shard, row)

    def _open(self, path: str) -> tuple[str, ShardIndex | None]:
        """Walks a shard; None, and a fault is counted, where it has no sample."""
        plan, name = self._plan, os.path.basename(shown(path))
        try:
            size, identity = plan.storage.stat(path)
            read = functools.partial(plan.storage.read, path, expected=(size, identity))
            if not plan.storage.local(path):
                self._fetch(read, size)
            shard = walk_shard(name, read, size, identity, captions=plan.captions)
        except DataError as error:
            shard = None
            self._faults.append(Fault("shard", "shard-unreadable", name, str(error)))
        usable = shard is not None and (shard.captioned if plan.text else shard.count)
        if shard is not None:
            self._faults += _left_out(shard, plan.text)
        self._empty = 0 if usable else self._empty + 1
        if self._empty == MAX_EMPTY_SHARDS:
            raise DataError(
                f"{MAX_EMPTY_SHARDS} shards in a row gave no sample, the last "
                f"{shown(path)!r}: {dict(totals(self._faults))}"
            )
        return path, shard if usable else None

    def _fetch(self, read: Callable[[int, int], bytes], size: int) -> None:
        """Brings a remote shard's blocks into the cache, several at a time; the walk alone would
        fetch them one after the other."""
        with ThreadPoolExecutor(_FETCHERS, "stream-fetch") as pool:
            starts = range(0, size, self._plan.storage.block_bytes)
            deque(pool.map(lambda at: read(at, 1), starts), maxlen=0)

    def _read(self, numbered: tuple[int, _Row]) -> dict[str, np.ndarray] | Fault:
        n, (path, shard, row) = numbered
        plan, key = self._plan, shard.key(row)
        read = functools.partial(plan.storage.read, path, expected=(shard.size, shard.identity))
        draw = lambda: np.random.default_rng([*self._seed, n, 1])
        try:
            sample = shard.sample(row, read)
        except BadSample as error:
            return Fault("sample", error.reason, shard.name, key)
        except DataError:  # the shard is gone or has changed since it was opened
            return Fault("sample", "shard-unreadable", shard.name, key)
        try:
            if plan.filters:
                choose = getattr(plan.transform, "caption", None)
                text = choose(sample, draw()) if choose else sample.text
                if reason := plan.filters(sample.meta, text):
                    return Fault("filtered", reason, shard.name, key)
            return dict(plan.transform(sample, draw()))
        except BadSample as error:
            return Fault("sample", error.reason, shard.name, key)


def _left_out(shard: ShardIndex, text: bool) -> list[Fault]:
    """What a shard's walk could not use."""
    counts = Counter(shard.problems)
    counts["no-text"] += text * (shard.count - shard.captioned)
    faults = [
        Fault("shard" if reason in NOT_TARS else "member", reason, shard.name, key)
        for reason, key in itertools.islice(
            shard.left_out() if text else shard.listed(), MAX_LISTED
        )
    ]
    rest = counts - totals(faults)
    return faults + [Fault("member", reason, shard.name, "", n) for reason, n in rest.items()]


def secure_webdataset():
    """The webdataset module, set never to run commands or unpickle, as its own readers would."""
    os.environ["WDS_SECURE"] = "1"
    import webdataset  # here: it imports torch where that is installed

    webdataset.utils.enforce_security = True
    return webdataset


def _in_order(
    pool: ThreadPoolExecutor | None, function: Callable, items: Iterable, ahead: int
) -> Iterator:
    """Like `map`, with up to `ahead` items started in advance by a pool's threads."""
    if pool is None:
        yield from map(function, items)
        return
    begun = deque()
    for item in items:
        begun.append(pool.submit(function, item))
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def totals(faults: Iterable[Fault]) -> Counter:
    """How many of each reason."""
    totals = Counter()
    for fault in faults:
        totals[fault.reason] += fault.count
    return totals
