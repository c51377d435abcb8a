"""Orders are pure functions of the sample number, complete in every epoch, and keep to a host."""

import pickle
import threading
import time
from collections import Counter

import grain
import numpy as np
import pytest

from unclip.errors import ConfigError
from unclip.input.order import default_streams, generator, make_order

COUNTS = np.array([100, 0, 37, 50, 13, 80, 1])
N = int(COUNTS.sum())
GROUPS = np.array([0, 137, 187, N])


def shards_of(numbers, counts):
    return np.searchsorted(np.cumsum(counts), numbers, "right")


@pytest.mark.parametrize("n, seed", [(1009, 3), (3000, 2**63)])
def test_the_global_order_is_grains_shuffle(n, seed):
    """The order is fixed: a run resumed by another version sees the same samples."""
    word = int(generator(seed, 0, 0).integers(1 << 32))
    theirs = grain.MapDataset.range(n).shuffle(seed=word).repeat()
    ours = make_order([n], seed)
    places = [*range(30), *range(n - 15, n + 15), 7 * n + 3, 10**9]
    assert [ours(g) for g in places] == [int(theirs[g]) for g in places]


@pytest.mark.parametrize("window", [1, 16, 8192])
@pytest.mark.parametrize(
    "streams, batch_size",
    [(1, 8), (4, 8), (8, 8), (4, 16), (16, 64), (64, 64), (512, 512), (32, 4096)],
)
def test_streams_hold_every_sample_once_an_epoch(streams, batch_size, window):
    order = make_order(
        COUNTS, 3, order="streamed", streams=streams, batch_size=batch_size, window=window
    )
    epochs = [[order(g) for g in range(e * N, (e + 1) * N)] for e in (0, 1, 2, 10**6)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


@pytest.mark.parametrize("proportions", [(), (1, 1)])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_host_reads_its_own_shards_only(hosts, proportions):
    """In every epoch a host's rows touch its part of the shards, and at most two at the edges."""
    counts = np.full(64, 100)
    batch_size, streams = 64, 16
    groups = [0, 3200, 6400] if proportions else None
    order = make_order(
        counts,
        1,
        order="streamed",
        streams=streams,
        batch_size=batch_size,
        window=150,
        proportions=proportions,
        groups=groups,
    )
    local = batch_size // hosts
    touched = {}
    for g in range(4 * 6400):
        k, own = order.component(g) if proportions else (0, g)
        n = order.orders[k].n if proportions else 6400
        key = k, own // n, g % batch_size // local
        touched.setdefault(key, []).append(order(g))
    for (k, epoch, host), numbers in touched.items():
        shards = 32 if proportions else 64
        assert len(np.unique(shards_of(numbers, counts))) <= shards // hosts + 2, (k, epoch, host)
    # At any time it has few of them open: a window or its border for each of its streams.
    for start in range(0, 6400, 640):
        mine = [g for g in range(start, start + 640) if g % batch_size < local]
        opened = np.unique(shards_of([order(g) for g in mine], counts))
        assert len(opened) <= 4 * streams // hosts * (2 if proportions else 1)


def test_streams_are_shuffled_and_mixed():
    counts = np.full(64, 100)
    order = make_order(counts, 1, order="streamed", streams=16, batch_size=64, window=100)
    epochs = [np.array([order(g) for g in range(e * 6400, (e + 1) * 6400)]) for e in range(3)]
    for epoch in epochs:
        first = shards_of(epoch[:64], counts)
        assert len(set(first.tolist())) >= 8  # a batch mixes the streams
        # A stream does not walk its window in order.
        steps = np.diff(epoch.reshape(-1, 16, 4)[:, 0].ravel())
        assert np.mean(steps == 1) < 0.1 and np.mean(steps > 0) > 0.3
    first = [shards_of(epoch[:4], counts)[0] for epoch in epochs]
    assert len(set(first)) == 3, "epochs begin with the same shard"
    other = make_order(counts, 2, order="streamed", streams=16, batch_size=64, window=100)
    assert np.mean([other(g) == order(g) for g in range(2000)]) < 0.05


@pytest.mark.parametrize("order", ["global", "streamed"])
@pytest.mark.parametrize("proportions", [(), (1, 2, 0.3)])
def test_orders_are_pure(order, proportions):
    make = lambda: make_order(
        COUNTS,
        5,
        order=order,
        streams=4,
        batch_size=16,
        window=32,
        proportions=proportions,
        groups=GROUPS if proportions else None,
    )
    numbers = [*range(60), 10**7, *range(9 * N, 9 * N + 60)]
    first = make()
    expected = [first(g) for g in numbers]
    again = pickle.loads(pickle.dumps(first))
    assert [again(g) for g in reversed(numbers)][::-1] == expected
    shared, results = make(), {}

    def ask(k):
        results[k] = [shared(g) for g in numbers]

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[k] == expected for k in range(4))


@pytest.mark.parametrize("order, streams", [("global", 0), ("streamed", 4), ("streamed", 16)])
@pytest.mark.parametrize("proportions", [(1, 2, 0.3), (5, 5, 5), (0.001, 7, 2)])
def test_mixtures_keep_their_proportions(order, streams, proportions):
    batch_size = 64
    counts, groups = 100 * COUNTS, 100 * GROUPS  # grain's shuffle is slow where there is little
    mixed = make_order(
        counts,
        5,
        order=order,
        streams=streams,
        batch_size=batch_size,
        window=32,
        proportions=proportions,
        groups=groups,
    )
    rows = 256 * batch_size
    owner = np.searchsorted(groups, [mixed(g) for g in range(rows)], "right") - 1
    wanted = np.array(proportions) / sum(proportions)
    found = np.bincount(owner, minlength=3)
    assert np.abs(found - rows * wanted).max() <= 2 * max(1, streams)
    # Small batches are mixed as well, not only the long run.
    by_batch = np.stack([np.bincount(b, minlength=3) for b in owner.reshape(-1, batch_size)])
    assert np.abs(by_batch - batch_size * wanted).max() <= 2 + max(1, streams)
    assert np.abs(by_batch - batch_size * wanted).mean() < 2.5


@pytest.mark.parametrize("order, streams", [("global", 0), ("streamed", 4)])
def test_a_part_of_a_mixture_is_seen_whole_in_each_of_its_epochs(order, streams):
    mixed = make_order(
        COUNTS,
        5,
        order=order,
        streams=streams,
        batch_size=16,
        window=32,
        proportions=(1, 2, 0.5),
        groups=GROUPS,
    )
    seen = {k: {} for k in range(3)}
    for g in range(3000):
        k, own = mixed.component(g)
        assert own not in seen[k], "a part's number came twice"
        seen[k][own] = mixed(g) - GROUPS[k]
    for k, n in enumerate(np.diff(GROUPS)):
        numbers = np.array(sorted(seen[k]))
        whole = int(np.flatnonzero(numbers != np.arange(len(numbers)))[:1].sum()) or len(numbers)
        assert whole > 1.5 * n and len(numbers) - whole <= 16, "numbers are left out"
        for epoch in range(whole // n):
            there = sorted(seen[k][own] for own in range(epoch * n, (epoch + 1) * n))
            assert there == list(range(n))


def test_parts_of_one_size_have_orders_of_their_own():
    mixed = make_order([500, 500], 5, proportions=(1, 1), groups=[0, 500, 1000], batch_size=8)
    first, second = (
        [mixed(g) - 500 * k for g in range(1000) if mixed.component(g)[0] == k] for k in range(2)
    )
    assert sum(a == b for a, b in zip(first, second)) < 20


def test_stand_ins_come_from_near_or_from_the_same_part():
    plain = make_order(COUNTS, 5)
    assert plain.span(3, True) == plain.span(3, False) == (0, N)
    ends = np.cumsum(COUNTS)
    order = make_order(
        COUNTS, 5, order="streamed", streams=4, batch_size=16, proportions=(1, 2, 3), groups=GROUPS
    )
    spans = Counter()
    for g in range(500):
        i = order(g)
        shard = int(shards_of(i, COUNTS))
        part = int(np.searchsorted(GROUPS, i, "right")) - 1
        if COUNTS[shard] > 1:
            assert order.span(g, True) == (ends[shard] - COUNTS[shard], ends[shard])
        else:
            assert order.span(g, True) == order.span(g, False)
        assert order.span(g, False) == tuple(GROUPS[part : part + 2])
        spans[shard] += 1
    assert len(spans) == 6  # all but the empty one


def test_a_hundred_million_samples_need_no_table():
    counts = np.full(10_000, 10_000)
    start = time.perf_counter()
    for options in (
        {},
        {"order": "streamed", "streams": 64},
        {
            "order": "streamed",
            "streams": 64,
            "proportions": (1, 3),
            "groups": [0, 30_000_000, 100_000_000],
        },
    ):
        order = make_order(counts, 3, batch_size=2048, **options)
        assert len({order(g) for g in range(2048)}) == 2048
        assert len(pickle.dumps(order)) < 1_000_000
    assert time.perf_counter() - start < 5


def test_the_usual_streams():
    assert [default_streams(b) for b in (1, 6, 32, 48, 2048, 4097)] == [1, 2, 32, 16, 64, 1]
    assert default_streams(48, 6) == 6
    usual, named = (
        make_order(COUNTS, 5, order="streamed", batch_size=48, streams=streams)
        for streams in (0, 16)
    )
    assert [usual(g) for g in range(N)] == [named(g) for g in range(N)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"order": "random"}, "unknown order 'random'.*global, streamed"),
        ({"order": "streamed", "streams": 3, "batch_size": 8}, "3 streams"),
        ({"order": "streamed", "streams": -1, "batch_size": 8}, "-1 streams"),
        ({"order": "streamed", "batch_size": 8, "window": 0}, "window 0"),
        ({"proportions": (1, 2), "groups": GROUPS}, "2 proportions for 3 patterns"),
        ({"proportions": (1, 2, 0), "groups": GROUPS}, "above 0"),
        ({"proportions": (1, 2, float("nan")), "groups": GROUPS}, "above 0"),
        ({"proportions": (1, 1, 1e-9), "groups": GROUPS}, "below 1/65536"),
        ({"proportions": (1, 1), "groups": [0, 0, N]}, "pattern 0 of the shards has no sample"),
        ({"seed": None, "order": "streamed", "batch_size": 8}, "without shuffling"),
    ],
)
def test_orders_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        make_order(COUNTS, **{"seed": 3, **options})
