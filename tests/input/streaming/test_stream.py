"""Streaming: pairs of one key and shard, draws made of what was given alone, losses counted."""

import importlib.util
import io
import os
import pathlib
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
import webdataset

from unclip.errors import ConfigError, DataError
from unclip.input.samples import BadSample
from unclip.input.storage import remote
from unclip.input.storage.storage import Storage
from unclip.input.streaming import worker as stream_worker
from unclip.input.streaming.stream import make_stream


def write(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def pairs(shard, count, first=0):
    return [
        (f"{k:03d}.{extension}", f"{word} {shard} {k}".encode())
        for k in range(first, first + count)
        for extension, word in (("jpg", "picture"), ("txt", "text"))
    ]


def transform(sample, rng):
    """The numbers of shard and key; a picture with another's caption ends the test."""
    shard, k = sample.image.decode().split()[1:]
    assert sample.text == f"text {shard} {k}"
    if k == "13":
        raise BadSample("corrupt", "unlucky")
    return {"id": np.array([int(shard), int(k)]), "draw": np.float64(rng.random())}


@pytest.fixture(autouse=True)
def open_again(monkeypatch):
    """A stream closes webdataset's own readers for its whole process; other tests use them."""
    monkeypatch.setattr(webdataset.utils, "enforce_security", False)
    monkeypatch.setenv("WDS_SECURE", "0")


@pytest.fixture
def shards(tmp_path):
    for shard, count in enumerate((5, 1, 9, 12)):
        write(tmp_path / f"{shard}.tar", pairs(shard, count))
    return f"{tmp_path}/{{0..3}}.tar"


def take(stream, batches):
    with stream:
        found = [next(stream) for _ in range(batches)]
    return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}


def ids(batches):
    return sorted(tuple(map(int, row)) for batch in batches for row in batch["id"][batch["valid"]])


def test_the_same_draws_whatever_the_threads_and_the_environment(shards, monkeypatch):
    options = {"batch_size": 8, "seed": 3, "shuffle_samples": 16}
    first = take(make_stream(shards, transform, threads=0, **options), 6)
    for name in ("RANK", "WORLD_SIZE", "WORKER", "NUM_WORKERS", "LOCAL_RANK"):
        monkeypatch.setenv(name, "3")
    again = take(make_stream(shards, transform, threads=3, **options), 6)
    assert sorted(first) == ["draw", "id", "sample", "valid"]
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert first["sample"].dtype == np.uint32 and first["sample"].tolist() == [
        [0, g] for g in range(48)
    ]
    others = [
        take(make_stream(shards, transform, **options | other), 6)
        for other in (
            {"seed": 4},
            {"start": 8},
            {"process_count": 2},
            {"process_count": 2, "process_index": 1},
        )
    ]
    orders = [tuple(map(tuple, other["id"][:24])) for other in [first, *others]]
    assert len(set(orders)) == 5


def test_processes_number_their_rows_apart(shards):
    for index in range(2):
        stream = make_stream(
            shards,
            transform,
            batch_size=4,
            seed=0,
            start=(1 << 32) - 4,
            process_index=index,
            process_count=2,
        )
        batch = [next(stream), next(stream)]
        stream.close()
        assert batch[0]["sample"].tolist() == [[0, (1 << 32) - 4 + 2 * index + n] for n in (0, 1)]
        assert batch[1]["sample"].tolist() == [[1, 2 * index + n] for n in (0, 1)]
        assert stream.position == (1 << 32) + 4 and stream.seen == 4


@pytest.mark.parametrize("shuffle", [0, 1, 1000])
def test_a_pass_has_every_sample_once(shards, shuffle):
    stream = make_stream(
        shards, transform, batch_size=4, seed=0, passes=1, threads=2, shuffle_samples=shuffle
    )
    batches = list(stream)
    expected = [(shard, k) for shard, count in enumerate((5, 1, 9, 12)) for k in range(count)]
    assert ids(batches) == expected and stream.seen == 27
    assert batches[-1]["valid"].tolist() == [True] * 3 + [False]
    if shuffle == 0:
        rows = np.concatenate([batch["id"] for batch in batches])[:27]
        assert [tuple(row) for row in rows.tolist()] == expected
    twice = list(make_stream(shards, transform, batch_size=4, seed=0, passes=2))
    assert ids(twice) == sorted(expected * 2)


def everything():
    return Counter((shard, k) for shard, count in enumerate((5, 1, 9, 12)) for k in range(count))


@pytest.mark.parametrize("workers", [2, 3, 7])
def test_a_pass_is_dealt_to_the_workers(shards, workers):
    """Also to more than there are shards: no worker waits without end or reads another's shards."""
    parts = []
    for worker in range(workers):
        plan = make_stream(shards, transform, batch_size=4, seed=0, passes=1)._plan
        plan.set_slice(slice(worker, None, workers))
        parts.append([one["batch"] for one in plan])
    assert sum((Counter(ids(part)) for part in parts), Counter()) == everything()
    assert all(len({shard for shard, _ in ids(part)}) <= -(-4 // workers) for part in parts)


@pytest.mark.slow
def test_decoding_processes(shards):
    with make_stream(
        shards, transform, batch_size=4, seed=0, passes=1, threads=1, workers=2
    ) as stream:
        batches = [{name: array.copy() for name, array in batch.items()} for batch in stream]
    assert Counter(ids(batches)) == everything()


def test_shards_are_drawn_evenly_with_replacement(tmp_path):
    for shard in range(4):
        write(tmp_path / f"{shard}.tar", pairs(shard, 3))
    found = take(
        make_stream(f"{tmp_path}/*.tar", transform, batch_size=100, seed=1, shuffle_samples=8), 12
    )
    counts = Counter(found["id"][:, 0].tolist())
    assert set(counts) == set(range(4)) and all(200 < n < 400 for n in counts.values())
    assert len(set(map(tuple, found["id"].tolist()))) == 12


def test_a_cut_shard_never_lends_its_pictures(tmp_path):
    """Shard 0 is cut anywhere; shard 1 continues with the same keys."""
    whole = pathlib.Path(write(tmp_path / "whole.tar", pairs(0, 3))).read_bytes()
    write(tmp_path / "1.tar", pairs(1, 3))
    for size in range(512, len(whole) + 1, 512):
        (tmp_path / "0.tar").write_bytes(whole[:size])
        stream = make_stream(f"{tmp_path}/{{0,1}}.tar", transform, batch_size=4, seed=0, passes=1)
        kept = min(3, size // 2048)  # two headers and two blocks a pair
        assert ids(stream) == [(0, k) for k in range(kept)] + [(1, k) for k in range(3)]
        assert bool(stream.problems) == (size < 3 * 2048 + 512)  # until the end block is there


def test_losses_are_counted_listed_and_bounded(tmp_path):
    write(tmp_path / "0.tar", [*pairs(0, 30), ("x.jpg", b"picture 0 99"), ("y.txt", b"text")])
    write(tmp_path / "1.tar", [("a.jpg", b"picture"), ("b.txt", b"\xff")])
    (tmp_path / "2.tar").write_bytes(b"no tar at all" * 100)  # the last word of the last worker
    passes_over = lambda meta, text: "even" if int(text.split()[2]) % 2 == 0 else ""
    stream = make_stream(
        f"{tmp_path}/{{0..2}}.tar",
        transform,
        batch_size=4,
        seed=0,
        passes=1,
        filters=passes_over,
        shuffle_samples=0,
    )
    assert ids(stream) == [(0, k) for k in range(1, 30, 2) if k != 13]
    assert (
        stream.bad == 1
        and stream.filtered == {"even": 15}
        and stream.problems == {"corrupt": 1, "no-text": 2, "no-picture": 2, "not-a-tar": 1}
    )
    drained = stream.drain_bad()
    assert {"key": "013", "shard": "0.tar", "reason": "corrupt"} in drained
    assert sorted(row["reason"] for row in drained) == [
        "corrupt",
        "no-picture",
        "no-picture",
        "no-text",
        "no-text",
        "not-a-tar",
    ]
    assert not stream.drain_bad() and len(stream.examples) == 5
    assert stream.counters() == {
        "bad": 1,
        "filtered": 15,
        "filtered/even": 15,
        "bad_shards": 1,
        "bad/corrupt": 1,
        "bad/no-text": 2,
        "bad/no-picture": 2,
        "bad/not-a-tar": 1,
    }
    strict = make_stream(
        f"{tmp_path}/0.tar", transform, batch_size=10, seed=0, max_bad_fraction=0.01, min_seen=20
    )
    with pytest.raises(DataError, match=r"bad, more than max_bad_fraction=0\.01: .*'corrupt'"):
        list(strict)


def test_bad_ones_in_a_row_end_the_stream(tmp_path):
    path = write(
        tmp_path / "a.tar",
        [("13.jpg", b"picture 0 13"), ("13.txt", b"text 0 13")]
        + [member for k in range(20) for member in pairs(0, 1, first=k + 20)],
    )
    options = {"batch_size": 1, "seed": 0, "shuffle_samples": 0, "max_bad_fraction": 1.0}

    def only_unlucky(sample, rng):
        raise BadSample("corrupt", sample.key)

    assert take(make_stream(path, transform, max_consecutive_bad=1, **options), 40)
    with pytest.raises(DataError, match=r"4 samples in a row could not be used, 4 of them bad"):
        next(make_stream(path, only_unlucky, max_consecutive_bad=3, **options))


def test_filters_judge_the_caption_that_the_transform_takes(tmp_path):
    path = write(tmp_path / "a.tar", pairs(0, 30))

    def chosen(sample, rng):
        return {"caption": np.array(chosen.caption(sample, rng))}

    chosen.caption = lambda sample, rng: f"{sample.key}{'ab'[rng.integers(2)]}"
    stream = make_stream(
        path,
        chosen,
        batch_size=5,
        seed=0,
        passes=1,
        filters=lambda meta, text: "" if text.endswith("a") else "not-a",
    )
    found = np.concatenate([batch["caption"][batch["valid"]] for batch in stream])
    assert 0 < len(found) < 30 and all(caption.endswith("a") for caption in found)
    assert stream.filtered == {"not-a": 30 - len(found)}


def test_what_gives_nothing_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_worker, "MAX_SKIPPED", 50)
    path = write(tmp_path / "a.tar", pairs(0, 5))
    with pytest.raises(DataError, match=r"50 samples in a row .*'never': 50"):
        next(make_stream(path, transform, batch_size=2, seed=0, filters=lambda *_: "never"))
    (tmp_path / "b.tar").write_bytes(b"junk" * 500)
    with pytest.raises(DataError, match=r"20 shards in a row gave no sample.*'not-a-tar': 20"):
        next(make_stream(str(tmp_path / "b.tar"), transform, batch_size=2, seed=0))
    with pytest.raises(DataError, match=r"no usable sample in 1 shards.*'not-a-tar': 1"):
        next(make_stream(str(tmp_path / "b.tar"), transform, batch_size=2, seed=0, passes=1))
    stream = make_stream(
        [path, str(tmp_path / "b.tar")], transform, batch_size=2, seed=0, shuffle_samples=4
    )
    next(stream)
    os.remove(path)  # while it is being read
    with pytest.raises(DataError, match="20 shards in a row"):
        for _ in range(1000):
            next(stream)


class _Canary:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_nothing_is_run_or_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(
        "a.tar",
        [("0.pkl", pickle.dumps(_Canary())), ("0.pyd", pickle.dumps(_Canary())), *pairs(0, 2)],
    )
    stream = make_stream("a.tar", transform, batch_size=2, seed=0, passes=1)
    assert ids(stream) == [(0, 0), (0, 1)] and stream.problems["refused-pickle"] == 2
    with pytest.raises(ConfigError, match="never run"):
        make_stream("pipe:mkdir ran", transform, batch_size=2, seed=0)
    assert webdataset.utils.enforce_security and os.environ["WDS_SECURE"] == "1"
    assert not os.path.exists("ran")


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 3, "process_count": 2},
        {"process_index": 1},
        {"seed": -1},
        {"start": -1},
        {"threads": -1},
        {"max_consecutive_bad": -1},
        {"passes": 0},
        {"passes": 1, "process_count": 2},
    ],
)
def test_bad_options(shards, options):
    with pytest.raises(ConfigError, match=r"expected|passes"):
        make_stream(shards, transform, **{"batch_size": 4, "seed": 0} | options)


def objects():
    path = pathlib.Path(__file__).parents[2] / "faults" / "objects.py"
    spec = importlib.util.spec_from_file_location("faults_objects", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_remote_shards_equal_local_ones_and_are_fetched_once(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_PAUSE_SECONDS", 0.01)
    stored = {f"{n}.tar": (tmp_path / f"{n}.tar").read_bytes() for n in range(4)}
    left = ["503", "cut", "short", "shifted"]
    with objects().ObjectServer(stored, lambda *_: left.pop() if left else "") as server:
        address = server.address("{0..3}.tar")
        storage = Storage(str(tmp_path / "cache"), block_bytes=4096, whole_blocks=True)
        options = {"batch_size": 4, "seed": 5, "passes": 1, "shuffle_samples": 8}
        with pytest.raises(ConfigError, match="needs a storage with whole_blocks and a cache"):
            make_stream(address, transform, **options)
        streamed = make_stream(address, transform, storage=storage, **options)
        found, local = list(streamed), list(make_stream(shards, transform, **options))
        blocks = sum(-(-len(data) // 4096) for data in stored.values())
        counts = streamed.counters()
        assert counts["storage/cache_misses"] == blocks and counts["storage/retries"] == 4
        server.objects["2.tar"] = stored["3.tar"]  # replaced: refused by who knew the old one
        changed = make_stream(address, transform, storage=storage, **options)
        assert {shard for shard, _ in ids(changed)} == {0, 1, 3}
        assert changed.problems == {"shard-unreadable": 1}
    for ours, theirs in zip(found, local, strict=True):
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
