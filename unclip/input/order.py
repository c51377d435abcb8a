"""Orders: global sample number g -> number in the collection, a pure function of the seed.

Every epoch is another permutation of the collection, and the single number g says how far a run has
come. Nothing is stored that grows with the samples, so any process can ask for any g at any time: a
run can be resumed at g on any number of hosts, workers and threads.

`global` permutes all samples, for shards on fast disks. `streamed` walks V canonical streams, each
through its own shards, so that a host reads long runs of a few shards and no others. `Mixed` draws
from several collections in fixed proportions.
"""

import math
from collections.abc import Sequence

import numpy as np
from grain.experimental import index_shuffle

from unclip.errors import ConfigError, unknown

ORDERS = ("global", "streamed")
_PERIOD = 1 << 16  # rows after which a mixture repeats: proportions are rounded to parts of it
ORDER, REPLACEMENT, TRANSFORM = 0, 1, 2  # independent random streams of one sample number
_SHARDS, _WINDOW, _COMPONENT = 1, 2, 3  # what a word (a random 64-bit number) is drawn for


def generator(seed: int, g: int, stream: int = TRANSFORM) -> np.random.Generator:
    """The generator of global sample number g; equal on every host and thread."""
    words = [n >> shift & 0xFFFFFFFF for n in (seed, g) for shift in (32, 0)]
    return np.random.default_rng([*words, stream])


def _hash(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64: the finaliser of SplitMix64, one to one and well mixed."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def _word(*numbers: int) -> np.ndarray:
    """uint64 [1], a hash of the numbers in their order."""
    word = np.zeros(1, np.uint64)
    for number in numbers:
        word = _hash(word + np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(number))
    return word


def _permutation(n: int, word: np.ndarray) -> np.ndarray:
    """A permutation, int64 [n]; unlike NumPy's own shuffles it never changes between versions."""
    return np.argsort(_hash(word + _hash(np.arange(n, dtype=np.uint64))), kind="stable")


class Order:
    """Every epoch is a permutation of all samples; O(1) memory.

    Args:
      n: samples in the collection.
      seed: decides the order; None keeps the collection's own.
    """

    def __init__(self, n: int, seed: int | None):
        self.n, self._word = n, None
        if seed is not None:
            # Hashed, because the epoch is added to it: without hashing, the first epoch of seed 1
            # would equal the second epoch of seed 0.
            self._word = int(generator(seed, 0, ORDER).integers(1 << 32))

    def __call__(self, g: int) -> int:
        """The number of sample g in the collection."""
        epoch, i = divmod(g, self.n)
        if self._word is None:
            return i
        return index_shuffle(i, max_index=self.n - 1, seed=(self._word + epoch) % 2**32, rounds=4)

    def span(self, g: int, near: bool) -> tuple[int, int]:
        """(first, end) of the numbers among which a replacement for sample g is drawn.

        Args:
          near: prefer samples that the same host reads anyway.
        """
        return 0, self.n


class Streamed:
    """V streams side by side, each through its own part of the epoch's shards.

    Row r of a global batch of B always belongs to stream r // (B / V). The shards of epoch e,
    permuted by (seed, e) and laid end to end, are cut into V runs, one per stream, as long as that
    stream has rows in the epoch; a stream walks its run in windows of `window` samples, shuffled
    inside. So a process that delivers whole streams reads its own run of shards and no other, apart
    from the shards at its two ends.

    Args:
      counts: int64 [S], samples of each shard, in the collection's order.
      seed: 0 <= seed < 2**64.
      streams: V; batch_size: B, a multiple of V.
      window: samples that are shuffled among each other.
    """

    def __init__(
        self, counts: np.ndarray, seed: int, *, streams: int, batch_size: int, window: int
    ):
        self.counts = np.asarray(counts, np.int64)
        self.n = int(self.counts.sum())
        self._base = np.cumsum(self.counts) - self.counts
        self.seed, self.streams, self.window = seed, streams, window
        self.batch_size, self._rows = batch_size, batch_size // streams
        self._start()

    def _start(self) -> None:
        # Several threads may fill these at the same time: all of them compute the same values.
        self._epochs, self._windows = {}, {}

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_epochs", "_windows")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def __call__(self, g: int) -> int:
        """The number of sample g in the collection."""
        return self._place(g)[1]

    def span(self, g: int, near: bool) -> tuple[int, int]:
        """As `Order.span`; near is the shard that sample g lies in, unless it lies there alone."""
        shard = self._place(g)[0]
        if not near or self.counts[shard] == 1:
            return 0, self.n
        return int(self._base[shard]), int(self._base[shard] + self.counts[shard])

    def _before(self, g: int, stream: int) -> int:
        """How many of the numbers 0 … g-1 belong to the streams 0 … stream-1."""
        batch, row = divmod(g, self.batch_size)
        return batch * stream * self._rows + min(row, stream * self._rows)

    def _place(self, g: int) -> tuple[int, int]:
        epoch = g // self.n
        first, end = epoch * self.n, (epoch + 1) * self.n
        stream = g % self.batch_size // self._rows
        low = self._before(first, stream)
        start = self._before(end, stream) - low
        length = self._before(end, stream + 1) - self._before(first, stream + 1) - start
        # How many rows of this stream the epoch has before g: those before g minus those before
        # `first`.
        k = (
            self._before(g, stream + 1)
            - self._before(g, stream)
            - self._before(first, stream + 1)
            + low
        )
        window, k = divmod(k, self.window)
        size = min(self.window, length - window * self.window)
        at = start + window * self.window + int(self._window(epoch, stream, window, size)[k])
        shards, ends = self._epoch(epoch)
        which = int(ends.searchsorted(at, "right"))
        shard = int(shards[which])
        return shard, int(self._base[shard] + at - (ends[which] - self.counts[shard]))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's permutation of the shards and where each of them ends."""
        found = self._epochs.get(epoch)
        if found is None:
            shards = _permutation(len(self.counts), _word(self.seed, _SHARDS, epoch))
            found = shards, np.cumsum(self.counts[shards])
            if len(self._epochs) > 2:
                self._epochs = {}
            self._epochs[epoch] = found
        return found

    def _window(self, epoch: int, stream: int, window: int, size: int) -> np.ndarray:
        key = epoch, stream, window
        found = self._windows.get(key)
        if found is None:
            word = _word(self.seed, _WINDOW, *key)
            found = _permutation(size, word).astype(np.int32 if size >> 16 else np.uint16)
            if len(self._windows) > 2 * self.streams:
                self._windows = {}
            self._windows[key] = found
        return found


class Mixed:
    """Several orders in fixed proportions; each keeps its own epochs.

    Which component a row takes follows a pattern of 65,536 rows in which every component's rows are
    spread as evenly as possible; each stream starts at another place of it, so that small batches
    are mixed too. A component counts its own rows, so each of its epochs has each of its samples
    once.

    Args:
      orders: one per component; first: int64 [K], where each begins in the collection.
      proportions: [K], above 0, in any unit.
      streams, batch_size: of the orders; 1 stream for `global`.
    """

    def __init__(
        self,
        orders: Sequence[Order | Streamed],
        first: Sequence[int],
        proportions: Sequence[float],
        *,
        streams: int,
        batch_size: int,
    ):
        self.orders, self.first = tuple(orders), tuple(map(int, first))
        self.batch_size, self._rows = batch_size, batch_size // streams
        self.rows_of_period = _rows_of_period(proportions)
        at = np.concatenate([(np.arange(n) + 0.5) / n for n in self.rows_of_period])
        owner = np.repeat(np.arange(len(self.rows_of_period)), self.rows_of_period)
        self._pattern = owner[np.argsort(at, kind="stable")].astype(np.int16)
        self._rank = np.zeros(_PERIOD, np.int32)
        for k, n in enumerate(self.rows_of_period):
            self._rank[self._pattern == k] = np.arange(n)
        # 40503 / 65536 is close to the golden ratio, which keeps the starts far apart.
        self._begin = np.arange(streams) * 40503 % _PERIOD
        self._skip = np.stack(
            [
                np.searchsorted(np.flatnonzero(self._pattern == k), self._begin)
                for k in range(len(self.rows_of_period))
            ],
            1,
        )

    def __call__(self, g: int) -> int:
        """The number of sample g in the collection."""
        k, own = self.component(g)
        return self.first[k] + self.orders[k](own)

    def span(self, g: int, near: bool) -> tuple[int, int]:
        """As `Order.span`, within the component of sample g."""
        k, own = self.component(g)
        low, end = self.orders[k].span(own, near)
        return self.first[k] + low, self.first[k] + end

    def component(self, g: int) -> tuple[int, int]:
        """(the component that sample g belongs to, its number in that component's own order)."""
        batch, row = divmod(g, self.batch_size)
        stream, within = divmod(row, self._rows)
        turn, slot = divmod(batch * self._rows + within + int(self._begin[stream]), _PERIOD)
        k = int(self._pattern[slot])
        m = turn * self.rows_of_period[k] + int(self._rank[slot]) - int(self._skip[stream, k])
        batch, within = divmod(m, self._rows)
        return k, batch * self.batch_size + stream * self._rows + within


def _rows_of_period(proportions: Sequence[float]) -> list[int]:
    """How many rows of a period each component gets, by largest remainder."""
    proportions = [float(proportion) for proportion in proportions]
    if not proportions or not all(0 < proportion < math.inf for proportion in proportions):
        raise ConfigError(
            f"proportions {tuple(proportions)}: expected a number above 0 for each pattern "
            "of shards; leave out what has none"
        )
    exact = np.array(proportions) / sum(proportions) * _PERIOD
    rows = np.floor(exact).astype(int)
    rows[np.argsort(rows - exact, kind="stable")[: _PERIOD - rows.sum()]] += 1
    if rows.min() < 1:
        raise ConfigError(
            f"proportions {tuple(proportions)}: the smallest is below 1/{_PERIOD} of all"
        )
    return rows.tolist()


def make_order(
    counts: Sequence[int],
    seed: int | None,
    *,
    order: str = "global",
    groups: Sequence[int] | None = None,
    proportions: Sequence[float] = (),
    streams: int = 0,
    batch_size: int = 1,
    window: int = 8192,
) -> Order | Streamed | Mixed:
    """The order of a run: a callable g -> i, pure, picklable and safe between threads.

    Args:
      counts: int [S], samples of each shard.
      seed: 0 <= seed < 2**64; None keeps the collection's own order.
      order: one of `ORDERS`.
      groups: int [K + 1], where the samples of each mixed collection begin, and the number of all.
      proportions: [K], the part of the rows each collection gets; (): all are one collection.
      streams: V of `streamed`, a divisor of `batch_size` and a multiple of the processes; 0: the
        largest such power of two up to 64. The order depends on V, not on the number of hosts.
      batch_size: B, the global batch size.
      window: of `streamed`, the samples shuffled among each other.

    Raises:
      ConfigError: an unknown order, sizes or proportions that do not fit.
    """
    if order not in ORDERS:
        raise unknown("order", order, ORDERS)
    if seed is None and (order != "global" or len(proportions)):
        raise ConfigError("without shuffling there are no streams and no proportions")
    counts = np.asarray(counts, np.int64)
    streams = default_streams(batch_size, streams) if order == "streamed" else 1
    if batch_size < 1 or batch_size % streams or window < 1:
        raise ConfigError(
            f"batch size {batch_size}, {streams} streams, window {window}: expected "
            "the streams to divide the batch size, and a window of at least 1"
        )

    def single(counts: np.ndarray, seed: int | None) -> Order | Streamed:
        if order == "global":
            return Order(int(counts.sum()), seed)
        return Streamed(counts, seed, streams=streams, batch_size=batch_size, window=window)

    if not len(proportions):
        return single(counts, seed)
    groups = np.asarray([0, counts.sum()] if groups is None else groups, np.int64)
    if len(proportions) != len(groups) - 1:
        raise ConfigError(
            f"{len(proportions)} proportions for {len(groups) - 1} patterns of shards: expected "
            "one each"
        )
    if np.diff(groups).min() < 1:
        empty = int(np.diff(groups).argmin())
        raise ConfigError(
            f"proportions {tuple(proportions)}: pattern {empty} of the shards has no sample"
        )
    begin = np.cumsum(counts) - counts
    seeds = [int(_word(seed, _COMPONENT, k)[0]) for k in range(len(proportions))]
    orders = [
        single(counts[(begin >= low) & (begin < end)], own)
        for low, end, own in zip(groups, groups[1:], seeds)
    ]
    return Mixed(orders, groups[:-1], proportions, streams=streams, batch_size=batch_size)


def default_streams(batch_size: int, streams: int = 0) -> int:
    """`streams`, or where it is 0 the largest power of two up to 64 that divides the batch."""
    if streams < 0:
        raise ConfigError(f"{streams} streams: expected at least 1, or 0 for the usual number")
    return streams or math.gcd(batch_size, 64)
