"""Batches are a function of (seed, position): on any number of processes, workers and threads."""

import functools
import io
import json
import multiprocessing
import os
import pickle
import signal
import tarfile
import threading
import time

import numpy as np
import pytest
from PIL import Image

from unclip.errors import ConfigError, DataError
from unclip.input import source, tally
from unclip.input import workers as worker_processes
from unclip.input.decode import image as im
from unclip.input.decode.degradation import gaussian_blur
from unclip.input.decode.text import T5Tokenizer
from unclip.input.decode.transforms import ImageText, Upsampling
from unclip.input.filters import Filters
from unclip.input.order import Order, generator
from unclip.input.samples import BadSample, Sample
from unclip.input.shards.collection import open_shards
from unclip.input.source import make_eval_source, make_source

N = 13


def tokenise(texts, context_length):
    """A byte a token: enough to tell captions apart."""
    tokens = np.zeros((len(texts), context_length), np.int32)
    for row, text in zip(tokens, texts):
        codes = list(text.encode())[:context_length]
        row[: len(codes)] = codes
    return tokens, tokens > 0, [None] * len(texts)


def png(k, side=12):
    noise = np.random.default_rng(k).integers(0, 256, (side, side + 6, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path, samples, similarity=lambda key: 0.3):
    with tarfile.open(path, "w") as archive:
        for key, picture, text in samples:
            meta = {"alt": f"alt {key}", "n": 3, "similarity": similarity(key)}
            meta = json.dumps(meta).encode()
            for extension, data in (("png", picture), ("txt", text), ("json", meta)):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "a.tar"
    return open_shards(shard(path, [(f"{k:02d}", png(k), b"text %d" % k) for k in range(N)]))


@pytest.fixture(scope="module")
def partly_bad(tmp_path_factory):
    samples = [(f"{k:02d}", png(k), b"text %d" % k) for k in range(N)]
    samples[3] = ("03", b"no picture", b"text 3")
    samples[7] = ("07", png(7)[:150], b"text 7")
    samples[9] = ("09", png(9), b"  \n")
    return open_shards(shard(tmp_path_factory.mktemp("bad") / "a.tar", samples))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Six shards of ten: samples with a similarity, one bad in three shards."""
    folder = tmp_path_factory.mktemp("several")
    return open_shards(
        [
            shard(
                folder / f"{s}.tar",
                [
                    (
                        f"{s}{k}",
                        b"no picture" if k == 4 and s % 2 else png(10 * s + k),
                        b"text %d" % (10 * s + k),
                    )
                    for k in range(10)
                ],
                similarity=lambda key: int(key) / 100,
            )
            for s in range(6)
        ]
    )


@functools.cache
def transform():
    return ImageText(
        8, 10, tokenise, crop="random", fraction=0.75, captions=("txt", "json:alt"), with_crop=True
    )


def take(collection, steps, *, process_count=1, batch_size=8, start=0, seed=5, **options):
    """`steps` global batches: the processes' rows one below the other, as on a pod."""
    parts, end = [], set()
    for p in range(process_count):
        with make_source(
            collection,
            transform(),
            batch_size=batch_size,
            seed=seed,
            start=start,
            process_index=p,
            process_count=process_count,
            **options,
        ) as batches:
            parts.append([next(batches) for _ in range(steps)])
            end.add(batches.position)
    assert end == {start + steps * batch_size}
    return [
        {name: np.concatenate([part[s][name] for part in parts]) for name in parts[0][s]}
        for s in range(steps)
    ]


def equal(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys()
        and all(x[k].dtype == y[k].dtype and np.array_equal(x[k], y[k]) for k in x)
        for x, y in zip(a, b)
    )


def numbers(batch):
    return [int(high) << 32 | int(low) for high, low in batch["sample"]]


def test_batch_spec(collection):
    (batch,) = take(collection, 1)
    spec = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
    assert spec == {
        "image": ("uint8", (8, 8, 8, 3)),
        "tokens": ("int32", (8, 10)),
        "text_mask": ("bool", (8, 10)),
        "crop": ("float32", (8, 4)),
        "sample": ("uint32", (8, 2)),
        "valid": ("bool", (8,)),
    }
    assert numbers(batch) == list(range(8)) and batch["valid"].all()


def words(batch, row):
    return bytes(batch["tokens"][row][batch["text_mask"][row]].tolist())


@pytest.mark.parametrize("n", [1, 2, 3, 100, 1009])
def test_every_epoch_is_another_permutation(n):
    order = Order(n, seed=3)
    epochs = [[order(e * n + i) for i in range(n)] for e in range(4)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n >= 100:
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert epochs[0] != list(range(n))
        fixed = sum(a == b for epoch in epochs for a, b in zip(epoch, range(n)))
        assert fixed < 0.1 * n
        # grain adds the epoch to its seed: another seed's epochs must not be ours, shifted.
        other = Order(n, seed=4)
        assert [other(i) for i in range(n)] not in epochs
    assert [Order(n, seed=3)(g) for g in range(n)] == epochs[0]
    assert [Order(n, None)(g) for g in range(2 * n)] == 2 * list(range(n))


def test_order_is_random_access_far_out():
    order = Order(1000, seed=0)
    far = 10**12
    assert sorted(order(far * 1000 + i) for i in range(1000)) == list(range(1000))


def test_the_rows_are_the_orders_samples(collection):
    batches = take(collection, 5)
    order = Order(N, 5)
    for batch in batches:
        for row, g in enumerate(numbers(batch)):
            i = order(g)
            rng = generator(5, g)
            expected = transform()(collection.read(i), rng)
            assert all(np.array_equal(batch[k][row], expected[k]) for k in expected)
            text = words(batch, row)
            assert text in (b"text %d" % i, b"alt %02d" % i)


def test_resume_at_any_position_on_any_process_count(collection):
    whole = take(collection, 6)
    for step, counts in ((1, (1, 8)), (3, (2,)), (5, (4,))):
        for process_count in counts:
            rest = take(collection, 6 - step, start=8 * step, process_count=process_count)
            assert equal(whole[step:], rest), (step, process_count)
    odd = take(collection, 4, start=5)  # another batch size's position
    assert [g for b in odd for g in numbers(b)] == list(range(5, 37))
    at = {g: b["image"][r] for b in whole for r, g in enumerate(numbers(b))}
    assert all(np.array_equal(at[g], b["image"][r]) for b in odd for r, g in enumerate(numbers(b)))


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"threads": 1}, {"threads": 7, "prefetch": 3}, {"prefetch": 0}]
)
def test_threads_change_nothing(collection, options):
    assert equal(take(collection, 4), take(collection, 4, **options))


@pytest.mark.parametrize("workers", [2])
@pytest.mark.slow
def test_worker_processes_change_nothing(partly_bad, workers):
    here = take(partly_bad, 4, start=8, max_bad_fraction=1.0)
    with make_source(
        partly_bad,
        transform(),
        batch_size=8,
        seed=5,
        start=8,
        workers=workers,
        max_bad_fraction=1.0,
    ) as batches:
        there = [next(batches) for _ in range(2)]
        children = [c for c in multiprocessing.active_children() if "prefetch" in c.name]
        assert len(children) == workers
        for child in children:  # what a scheduler sends to the whole job must not end its input
            os.kill(child.pid, signal.SIGTERM)
        there += [next(batches) for _ in range(2)]
        counted = batches.problems.copy()
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(DataError, match="worker process was killed"):
            for _ in range(20):
                next(batches)
    assert not any(child.is_alive() for child in children)
    assert equal(here, there)
    with make_source(
        partly_bad, transform(), batch_size=8, seed=5, start=8, max_bad_fraction=1.0
    ) as batches:
        for _ in range(4):
            next(batches)
        assert counted == batches.problems and counted.total() > 0


class Slow:
    """A transform that reports when it has begun a sample, and is slow."""

    def __init__(self, folder, ends_at=-1):
        self.folder, self.ends_at = str(folder), ends_at

    def __call__(self, sample, rng):
        open(os.path.join(self.folder, str(os.getpid())), "w").close()
        if int(sample.key) == self.ends_at:
            os._exit(0)
        time.sleep(0.03)
        return {"key": np.int64(sample.key)}


def test_a_worker_killed_amid_a_batch_is_an_error_soon(collection, tmp_path):
    with make_source(collection, Slow(tmp_path), batch_size=32, seed=5, workers=2) as batches:
        first = next(batches)
        position = batches.position

        def kill():
            os.kill(int(os.listdir(tmp_path)[0]), signal.SIGKILL)

        timer = threading.Timer(0.3, kill)  # a batch takes a second
        timer.start()
        start = time.monotonic()
        with pytest.raises(DataError, match="worker process was killed"):
            for _ in range(4):
                position = batches.position
                next(batches)
        assert time.monotonic() - start < 20
        assert batches.position == position
    assert not [c for c in multiprocessing.active_children() if "prefetch" in c.name]
    with make_source(collection, Slow(tmp_path), batch_size=32, seed=5, threads=32) as again:
        assert equal([first], [next(again)])


@pytest.mark.slow
def test_a_worker_that_ends_in_silence_is_an_error_too(collection, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_processes, "_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(worker_processes, "_CLOSE_SECONDS", 0.5)
    with (
        make_source(
            collection, Slow(tmp_path, ends_at=3), batch_size=8, seed=5, workers=1
        ) as batches,
        pytest.raises(DataError, match="worker process was killed"),
    ):
        for _ in range(4):
            next(batches)


def test_augmentation_differs_by_epoch_and_seed(collection):
    def crops(seed, start):
        batches = take(collection, 2, seed=seed, start=start)
        order = Order(N, seed)
        return {order(g): b["crop"][r].tolist() for b in batches for r, g in enumerate(numbers(b))}

    a, b, c = crops(1, 0), crops(1, 13 * 8), crops(2, 0)
    for other in (b, c):
        shared = a.keys() & other.keys()
        assert len(shared) > 8 and sum(a[k] != other[k] for k in shared) > len(shared) // 2


def test_sample_words_hold_large_positions(collection):
    start = (3 << 32) - 4
    (batch,) = take(collection, 1, start=start)
    assert numbers(batch) == list(range(start, start + 8))
    assert batch["sample"][0].tolist() == [2, 2**32 - 4] and batch["sample"][4].tolist() == [3, 0]


def test_bad_samples_are_replaced_and_counted(partly_bad):
    order = Order(N, 5)
    why = {3: "format", 7: "truncated", 9: "empty-text"}
    plain = ImageText(8, 10, tokenise)
    with make_source(partly_bad, plain, batch_size=N, seed=5, max_bad_fraction=1.0) as batches:
        first = next(batches)
        assert first["valid"].all() and "problems" not in first
        expected = dict.fromkeys(why.values(), 0)
        for row, g in enumerate(numbers(first)):
            i, attempt = order(g), 0
            while i in why:
                expected[why[i]] += 1
                attempt += 1
                i = source.replacement(5, g, attempt, N)
            assert words(first, row) == b"text %d" % i
        assert batches.problems == expected and min(expected.values()) >= 1
        assert batches.bad == 3 and batches.seen == N
        keys = {example.split(":")[0] for example in batches.examples}
        assert keys == {"03", "07", "09"}
    again = make_source(partly_bad, plain, batch_size=N, seed=5, max_bad_fraction=1.0)
    assert equal([first], [next(again)])
    again.close()


def test_replacements_spread_over_the_collection():
    first = [source.replacement(0, g, 1, 10) for g in range(2000)]
    second = [source.replacement(0, g, 2, 10) for g in range(2000)]
    for drawn in (first, second):
        assert np.abs(np.bincount(drawn, minlength=10) - 200).max() < 80
    assert sum(a == b for a, b in zip(first, second)) < 300


def test_too_many_bad_samples_stop_the_run(partly_bad):
    with make_source(
        partly_bad, transform(), batch_size=8, seed=5, max_bad_fraction=0.1, min_seen=24
    ) as batches:
        next(batches), next(batches)
        with pytest.raises(DataError, match=r"of 24 samples are bad.*fraction=0.1") as error:
            next(batches)
    assert "format" in str(error.value)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_collection_of_bad_samples_stops_at_once(tmp_path, workers):
    bad = open_shards(shard(tmp_path / "a.tar", [(f"{k}", b"junk", b"t") for k in range(4)]))
    with (
        make_source(bad, transform(), batch_size=2, seed=0, workers=workers) as batches,
        pytest.raises(DataError, match=r"15 replacements.*format"),
    ):
        next(batches)


def test_a_lost_shard_stops_the_run_by_name(tmp_path):
    path = shard(tmp_path / "a.tar", [(f"{k}", png(k), b"t") for k in range(4)])
    lost = open_shards(path)
    (tmp_path / "a.tar").unlink()
    with (
        make_source(lost, transform(), batch_size=2, seed=0) as batches,
        pytest.raises(DataError, match=r"a\.tar"),
    ):
        next(batches)


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_evaluation_sees_every_sample_once(collection, process_count):
    rows = []
    for p in range(process_count):
        with make_eval_source(
            collection,
            ImageText(8, 10, tokenise),
            batch_size=8,
            process_index=p,
            process_count=process_count,
        ) as batches:
            done = list(batches)
        assert len(done) == 2 and all(len(b["valid"]) == 8 // process_count for b in done)
        rows += [
            (g, bool(b["valid"][row]), words(b, row))
            for b in done
            for row, g in enumerate(numbers(b))
        ]
        assert batches.seen == sum(ok for b in done for ok in b["valid"])
    rows.sort()
    assert [g for g, _, _ in rows] == list(range(16))
    assert [ok for _, ok, _ in rows] == [g < N for g in range(16)]
    assert [text for _, ok, text in rows if ok] == [b"text %d" % k for k in range(N)]


def test_evaluation_marks_bad_samples(partly_bad):
    with make_eval_source(partly_bad, ImageText(8, 10, tokenise), batch_size=10) as batches:
        valid = np.concatenate([b["valid"] for b in batches])
        # Rows 13 to 19 are padding, made from samples 0 to 6; the bad one there counts no more.
        assert np.flatnonzero(~valid).tolist() == [3, 7, 9, *range(13, 20)]
        assert batches.problems["format"] >= 1 and batches.seen == N and batches.bad == 3


def test_finite_epochs_end_and_resume(collection):
    with make_source(collection, transform(), batch_size=8, seed=1, num_epochs=2) as batches:
        done = list(batches)
    seen = [Order(N, 1)(g) for b in done for g, ok in zip(numbers(b), b["valid"]) if ok]
    assert sorted(seen) == sorted(2 * list(range(N))) and len(done) == 4
    with make_source(
        collection, transform(), batch_size=8, seed=1, num_epochs=2, start=24
    ) as batches:
        assert equal(done[3:], list(batches))
    with make_source(
        collection, transform(), batch_size=8, seed=1, num_epochs=2, start=batches.position
    ) as after:
        assert list(after) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 6, "process_count": 4}, "multiple of the process count"),
        ({"process_index": 1}, "process 1 of 1"),
        ({"start": -1}, "start -1"),
        ({"seed": -1}, "seed -1"),
        ({"workers": -1}, "workers -1"),
        ({"num_epochs": 0}, "num_epochs 0"),
        ({"max_consecutive_bad": -1}, "consecutive_bad -1"),
        ({"num_epochs": 1, "proportions": (1,)}, "proportions"),
        ({"proportions": (1, 2)}, "2 proportions"),
        ({"order": "streamed", "streams": 2, "process_count": 4}, "2 streams for 4 processes"),
        ({"order": "streamed", "shuffle": False}, "without shuffling"),
        ({"order": "sorted"}, "unknown order"),
    ],
)
def test_sizes_that_do_not_fit(collection, options, message):
    with pytest.raises(ConfigError, match=message):
        make_source(collection, transform(), **{"batch_size": 8, "seed": 0, **options})


KINDS = {
    "global": {},
    "streamed": {"order": "streamed", "streams": 4, "window": 4},
    "mixed": {"proportions": (2, 1, 1, 1, 1, 3)},
    "both": {"order": "streamed", "streams": 4, "proportions": (2, 1, 1, 1, 1, 3)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_order_resumes_on_any_process_count(several, kind):
    options = {"batch_size": 16, "max_bad_fraction": 1.0, **KINDS[kind]}
    whole = take(several, 8, **options)
    for step, process_count in ((1, 2), (3, 4), (4, 1), (7, 4)):
        rest = take(several, 8 - step, start=16 * step, process_count=process_count, **options)
        assert equal(whole[step:], rest), (step, process_count)
    assert [g for b in whole for g in numbers(b)] == list(range(128))
    if "proportions" not in options:
        with make_source(
            several, lambda sample, rng: {"i": np.int64(sample.key)}, seed=5, **options
        ) as batches:
            seen = np.concatenate([next(batches)["i"] for _ in range(15)])
        assert sorted(seen[:60]) == sorted(seen[60:120]) == sorted(seen[120:180])


@pytest.mark.slow
def test_workers_deliver_any_order(several):
    options = {
        "batch_size": 16,
        "max_bad_fraction": 1.0,
        **KINDS["both"],
        "filters": Filters.parse({"similarity": (0.05, None)}),
    }
    sources = [
        make_source(several, transform(), seed=5, **options, **more)
        for more in ({"workers": 2}, {"threads": 1}, {"threads": 5})
    ]
    batches = [[next(s) for _ in range(5)] for s in sources]
    assert equal(batches[0], batches[1]) and equal(batches[0], batches[2])
    counts = [s.counters() for s in sources]
    assert counts[0] == counts[1] == counts[2]
    assert counts[0]["bad/format"] > 0 and counts[0]["filtered/low-similarity"] > 0
    lists = [s.drain_bad() for s in sources]
    assert lists[0] == lists[1] == lists[2] and len(lists[0]) == counts[0]["bad"]
    for s in sources:
        s.close()


class Priced:
    """A collection whose storage says that each reading process made as many requests as reads."""

    def __init__(self, collection):
        self.collection, self.storage, self.requests = collection, self, 0

    def __len__(self):
        return len(self.collection)

    def read(self, i):
        self.requests += 1
        return self.collection.read(i)

    def counters(self):
        return {"requests": self.requests, "retries": 0}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_one_pass_ends_and_its_reading_is_counted(collection, workers):
    with make_eval_source(
        Priced(collection), ImageText(8, 10, tokenise), batch_size=4, workers=workers
    ) as batches:
        done = list(batches)
        assert list(batches) == []
        found = batches.counters()
    assert [words(b, row) for b in done for row in range(4) if b["valid"][row]] == [
        b"text %d" % k for k in range(N)
    ]
    assert found == {"storage/requests": 16}  # the last three are paddings


class Recorded:
    """A collection that notes which shards are read, and which samples."""

    def __init__(self, collection):
        self.collection, self.shards, self.read_samples = collection, set(), []

    def __len__(self):
        return len(self.collection)

    def __getattr__(self, name):
        return getattr(self.collection, name)

    def read(self, i):
        self.shards.add(self.collection.locate(i)[0])
        self.read_samples.append(i)
        return self.collection.read(i)


def test_a_streamed_host_opens_only_its_own_shards(several):
    for process_count, allowed in ((1, 6), (2, 4)):
        opened = []
        for p in range(process_count):
            recorded = Recorded(several)
            with make_source(
                recorded,
                transform(),
                batch_size=20,
                seed=0,
                order="streamed",
                streams=4,
                process_index=p,
                process_count=process_count,
                threads=0,
                max_bad_fraction=1.0,
                prefetch=1,
            ) as batches:
                for _ in range(3):  # one epoch, with replacements of three bad samples
                    next(batches)
            opened.append(recorded.shards)
            assert len(recorded.shards) <= allowed
        assert set.union(*opened) == set(range(6))


def test_filtered_samples_are_replaced_and_counted_apart(several):
    recorded = Recorded(several)
    filters = Filters.parse({"similarity": (None, 0.295)})  # keys 00 to 29
    with make_source(
        recorded,
        lambda s, rng: im.decode(s.image) is None or {"i": np.int64(s.key)},
        batch_size=60,
        seed=5,
        filters=filters,
        threads=0,
        max_bad_fraction=0.3,
        min_seen=1,
    ) as batches:
        keys = next(batches)["i"]
        assert keys.max() < 30 and not {14} & set(keys.tolist())
        own = [i for i in (batches._rows.order(g) for g in range(60))]
        assert all(key == i for key, i in zip(keys, own) if i < 30 and i != 14)
        assert batches.filtered["high-similarity"] >= 30
        assert set(batches.filtered) == {"high-similarity"}
        assert batches.counters()["substituted"] == 31 and batches.bad >= 1
        assert batches.problems == {"format": batches.bad}
    assert max(recorded.read_samples) < 30, "a rejected picture was read"


def test_filters_see_the_caption_that_is_chosen(several):
    several_words = Filters.parse({"caption_chars": (None, 6)})  # "text 7" passes, "text 12" not

    class Words(ImageText):
        def __call__(self, sample, rng):
            return {"chars": np.int64(len(self.caption(sample, rng)))}

    with make_source(
        several,
        Words(8, 10, tokenise, captions=("txt", "json:alt")),
        batch_size=30,
        seed=5,
        filters=several_words,
    ) as batches:
        assert set(next(batches)["chars"].tolist()) == {6}  # "text 7", "alt 33"
        assert batches.bad == 0 and batches.filtered["high-caption_chars"] > 0


def test_a_rejected_caption_is_drawn_anew(several):
    """Of several sources one may never pass; a row that drew it must not fail for that."""
    with make_source(
        several,
        ImageText(8, 10, tokenise, captions=("txt", "json:alt")),
        batch_size=40,
        seed=5,
        filters={"caption_chars": (7, None)},
        max_bad_fraction=1.0,
    ) as batches:
        batch = next(batches)
        again = make_source(
            several,
            ImageText(8, 10, tokenise, captions=("txt", "json:alt")),
            batch_size=40,
            seed=5,
            filters={"caption_chars": (7, None)},
            max_bad_fraction=1.0,
            threads=0,
        )
        assert equal([batch], [next(again)])
    assert all(words(batch, row).startswith(b"text ") for row in range(40))
    assert batches.filtered["low-caption_chars"] > 10  # "alt 33"


def test_filters_that_reject_everything_stop_the_run(several):
    with (
        make_source(
            several,
            transform(),
            batch_size=4,
            seed=5,
            order="streamed",
            filters={"similarity": (0.9, None)},
        ) as batches,
        pytest.raises(DataError, match=r"rejected by filters \(1000\).*low-similarity"),
    ):
        next(batches)


def test_evaluation_marks_filtered_samples(several):
    with make_eval_source(
        several, transform(), batch_size=64, filters={"similarity": (0.2, None)}
    ) as batches:
        valid = np.concatenate([b["valid"] for b in batches])
    assert np.flatnonzero(valid).tolist() == [i for i in range(20, 60) if i not in (34, 54)]


@pytest.mark.parametrize("order", ["global", "streamed"])
def test_every_bad_sample_is_listed(several, order):
    with make_source(
        several,
        transform(),
        batch_size=20,
        seed=5,
        order=order,
        streams=4 * (order == "streamed"),
        max_bad_fraction=1.0,
    ) as batches:
        own = {}
        for _ in range(6):
            own |= {g: batches._rows.order(g) for g in numbers(next(batches))}
        listed = batches.drain_bad()
        assert batches.drain_bad() == []
    firsts = {bad["sample"]: bad for bad in reversed(listed)}
    expected = {g: i for g, i in own.items() if i in (14, 34, 54)}
    assert firsts.keys() == expected.keys() and len(expected) == 6
    for g, i in expected.items():
        assert firsts[g] == {
            "sample": g,
            "key": str(i),
            "shard": f"{i // 10}.tar",
            "reason": "format",
        }
    assert len(listed) == batches.counters()["bad"] == batches.counters()["bad/format"]


def test_the_list_of_bad_samples_is_bounded():
    counts = tally.Tally(max_bad_fraction=1.0, min_seen=1)
    for start in range(0, 12000, 1000):
        found = [tally.Bad(g, str(g), "a.tar", "format") for g in range(start, start + 1000)]
        counts.add(np.ones(1000, bool), found)
    rows = counts.drain()
    assert len(rows) == 10_001 and rows[-1] == {"unlisted": 2000} and rows[0]["sample"] == 0
    assert counts.problems["format"] == 12000 and not counts.drain() and not counts.verdict()


def test_bad_samples_in_a_row_stop_the_run(tmp_path):
    run = open_shards(
        shard(
            tmp_path / "a.tar",
            [(f"{k:02d}", b"junk" if 10 <= k < 16 else png(k), b"t") for k in range(40)],
        )
    )
    options = {"batch_size": 8, "seed": 0, "shuffle": False, "max_bad_fraction": 1.0}
    with make_source(run, transform(), max_consecutive_bad=6, **options) as batches:
        assert len([next(batches) for _ in range(5)]) == 5
    with make_source(run, transform(), max_consecutive_bad=5, **options) as batches:
        next(batches)
        with pytest.raises(DataError, match=r"6 samples in a row are bad.*bad=5.*format"):
            next(batches)
        assert batches.position == 8


def test_captions_follow_the_sample_number():
    sample = Sample("k", png(0), "  ", {"alt": "a", "other": "b", "n": 3})
    both = ImageText(8, 10, tokenise, captions=("txt", "json:alt", "json:other"))
    drawn = [both.caption(sample, generator(0, g)) for g in range(400)]
    assert drawn == [both.caption(sample, generator(0, g)) for g in range(400)]
    assert set(drawn) == {"a", "b"} and 150 < drawn.count("a") < 250
    for captions, reason in ((("json:n",), "caption"), (("txt", "json:none"), "empty-text")):
        with pytest.raises(BadSample) as error:
            ImageText(8, 10, tokenise, captions=captions)(sample, generator(0, 0))
        assert error.value.reason == reason
    with pytest.raises(ConfigError, match="caption source"):
        ImageText(8, 10, tokenise, captions=("alt",))
    with pytest.raises(ConfigError, match="crop"):
        ImageText(8, 10, tokenise, crop="middle")


def test_recorded_crop_is_the_crop():
    sample = Sample("k", png(4, side=40), "t", {})
    for g in range(8):
        out = ImageText(16, 4, tokenise, crop="random", fraction=0.5, with_crop=True)(
            sample, generator(0, g)
        )
        full = im.decode(sample.image)
        left, upper, right, lower = np.rint(out["crop"] * np.array([46, 40, 46, 40])).astype(int)
        assert right - left == lower - upper == 20
        inside = Image.fromarray(full[upper:lower, left:right]).resize((16, 16), 3)
        assert np.abs(np.array(inside).astype(int) - out["image"])[2:-2, 2:-2].max() <= 2


def test_a_small_crop_of_a_large_jpeg_keeps_its_detail():
    """The reduced JPEG decoding goes by the crop, not by the picture."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    Image.fromarray(noise).resize((800, 800)).save(buffer, "JPEG", quality=95)
    sample = Sample("k", buffer.getvalue(), "t", {})
    out = ImageText(64, 4, tokenise, fraction=0.25)(sample, generator(0, 0))
    exact, _ = im.resize_and_crop(im.decode(sample.image), 64, fraction=0.25)
    assert np.array_equal(out["image"], exact)


def test_upsampling_pairs_the_crop_with_its_own_reduction():
    sample = Sample("k", png(1, side=80), "", {})
    full, _ = im.resize_and_crop(im.decode(sample.image), 64)
    places = set()
    for g in range(6):
        out = Upsampling(64, 4, crop=16)(sample, generator(0, g))
        assert out["image"].shape == (16, 16, 3) and out["low"].shape == (4, 4, 3)
        found = [
            (y, x)
            for y in range(49)
            for x in range(49)
            if np.array_equal(full[y : y + 16, x : x + 16], out["image"])
        ]
        assert len(found) == 1
        places.update(found)
        assert np.array_equal(out["low"], np.rint(out["image"].reshape(4, 4, 4, 4, 3).mean((1, 3))))
    assert len(places) > 4


def test_upsampling_degrades_the_conditioning_only_in_training():
    sample = Sample("k", png(1, side=80), "", {})

    def make(degradation, **options):
        return Upsampling(64, 4, degradation=degradation, **options)(sample, generator(0, 1))

    clean, blurred, degraded = (make(d) for d in ("none", "blur", "bsr"))
    assert np.array_equal(blurred["low"], gaussian_blur(clean["low"], 3, 0.6))
    assert not np.array_equal(degraded["low"], clean["low"])
    assert np.array_equal(degraded["low"], make("bsr")["low"])
    assert np.array_equal(degraded["image"], clean["image"])
    for degradation in ("blur", "bsr"):
        out = make(degradation, train=False, crop=16)
        assert np.array_equal(out["image"], clean["image"])
        assert np.array_equal(out["low"], clean["low"])
    for wrong in ({"crop": 18}, {"crop": 68}, {"degradation": "rain"}):
        with pytest.raises(ConfigError):
            Upsampling(64, 4, **wrong)


def test_the_default_tokenizer(collection):
    default = ImageText(8, 77)
    out = pickle.loads(pickle.dumps(default))(collection.read(0), generator(0, 0))
    length = int(out["text_mask"].sum())
    assert out["tokens"][0] == 49406 and out["tokens"][length - 1] == 49407
    assert out["text_mask"][:length].all() and not out["tokens"][length:].any()


def test_transforms_and_collections_pickle(collection):
    for thing in (transform(), Upsampling(64, 4, crop=16, degradation="bsr")):
        again = pickle.loads(pickle.dumps(thing))
        a, b = (t(collection.read(2), generator(0, 7)) for t in (thing, again))
        assert all(np.array_equal(a[k], b[k]) for k in a)
    assert pickle.loads(pickle.dumps(collection)).fingerprint == collection.fingerprint


@pytest.mark.slow
def test_t5_captions_from_worker_processes(collection):
    """A T5 tokenizer goes to the workers; the batches are a function of (seed, position) still."""
    transform = ImageText(8, 12, T5Tokenizer().encode, captions=("txt", "json:alt"))
    runs = []
    for workers in (0, 1):
        with make_source(collection, transform, batch_size=4, seed=5, workers=workers) as batches:
            runs.append([next(batches) for _ in range(2)])
    assert equal(*runs)
    row, real = runs[0][0]["tokens"][0], runs[0][0]["text_mask"][0]
    text = bytes((row[real][:-1] - 3).tolist())
    i = Order(N, 5)(0)
    assert text in (b"text %d" % i, b"alt %02d" % i) and row[real][-1] == 1
