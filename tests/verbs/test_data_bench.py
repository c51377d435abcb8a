"""`unclip data-bench`: what is measured, what follows from it, and how it is asked for."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from unclip.errors import ConfigError, DataError
from unclip.input import throughput
from unclip.input.decode.transforms import ImageText
from unclip.input.filters import Filters
from unclip.input.shards.collection import open_shards
from unclip.input.throughput import Throughput, kept, measure


def tokenise(texts, length):
    return np.ones((len(texts), length), np.int32), np.ones((len(texts), length), bool)


FOUND = Throughput(
    samples=10,
    bad={"corrupt": 1},
    encoded=2e4,
    pixels=65_536.0,
    seconds={"read": 1e-4, "decode": 1e-3, "resize": 5e-4, "tokenise": 1e-4, "batch": 0.0},
    one_core=500.0,
    total=2000.0,
    threads=4,
    workers=0,
    cores=4,
)


def test_what_follows_from_the_rates():
    assert FOUND.sustained(4096) == 4096 / 2000
    assert FOUND.cores_for(4096, 1.0) == 9  # 8.192 cores
    assert FOUND.cores_for(500, 1.0) == 1 and FOUND.cores_for(501, 1.0) == 2
    assert FOUND.cores_for(4096, 0.5) == 17
    table = FOUND.table()
    rows = {line.split("  ")[0]: line.split() for line in table.splitlines()}
    assert rows["decode"][1:] == ["1.000", "1,000", "59%"]
    assert rows["batch"][1:] == ["0.000", "-", "0%"]
    assert rows["prior"][1:] == ["4,096", "2.05", "9"]
    assert rows["decoder"][1:] == ["2,048", "1.02", "5"]
    assert "200 samples in 0.1 s" in table and "2,000 samples/s in total" in table
    assert json.loads(json.dumps(FOUND.to_json()))["cores_for_a_step_a_second"]["clip"] == 66


def test_every_phase_does_its_work_once_a_sample(shards, monkeypatch):
    """Stages are slowed down by a known time; what is measured must show it, in its own row."""
    clock = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    costs = {"read": 0.25, "decode": 0.5, "resize": 0.125, "tokenise": 1.0}
    collection = open_shards(shards["train"])

    def costly(phase, function):
        def work(*args, **options):
            clock[0] += costs[phase]
            return function(*args, **options)

        return work

    class Source:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __next__(self):
            clock[0] += 4.0 if options["threads"] == 1 else 1.0
            return {}

    def make(*_, **given):
        options.update(given)
        return Source()

    options = {}
    monkeypatch.setattr(type(collection), "read", costly("read", type(collection).read))
    monkeypatch.setattr(throughput.pictures, "decode", costly("decode", throughput.pictures.decode))
    monkeypatch.setattr(
        throughput.pictures,
        "resize_and_crop",
        costly("resize", throughput.pictures.resize_and_crop),
    )
    monkeypatch.setattr(throughput, "make_source", make)
    monkeypatch.setattr(throughput.np, "stack", costly("read", np.stack))
    announced = []
    found = measure(
        collection,
        ImageText(8, 4, costly("tokenise", tokenise)),
        batch_size=8,
        threads=3,
        seconds=20.0,
        tell=announced.append,
    )
    assert {n: found.seconds[n] for n in costs} == costs
    assert found.seconds["batch"] == 3 * 0.25 / 8  # image, tokens and mask are stacked
    assert (found.one_core, found.total) == (2.0, 8.0) and options["batch_size"] == 8
    assert found.pixels == 32 * 32 and found.bad == {} and len(announced) == 8


def test_measures_real_work_and_counts_bad_samples(shards, tmp_path, shard_writer):
    path = pathlib.Path(shard_writer(tmp_path / "bad.tar", 24))
    path.write_bytes(path.read_bytes().replace(b"IHDR", b"XXXX", 1))  # the first picture's header
    found = measure(open_shards(str(path)), ImageText(8, 4, tokenise), batch_size=4, seconds=0.02)
    assert set(found.seconds) == set(throughput.PHASES) and min(found.seconds.values()) > 0
    assert found.total == found.one_core > 0 and sum(found.bad.values()) > 0
    assert found.samples == 256


def test_filters_are_counted(shards):
    collection = open_shards(shards["train"])
    found = kept(collection, Filters.parse("name=red|green"), count=300)
    assert found["of"] == 300 and found["rejected"] == {
        "other-name": round(300 * (1 - found["kept"]))
    }
    assert 0.5 < found["kept"] < 0.8


def test_mistakes_are_reported(shards, tmp_path, shard_writer):
    collection = open_shards(shards["train"])
    with pytest.raises(ConfigError, match="no picture"):
        measure(collection, ImageText(None, 4, tokenise))
    with pytest.raises(ConfigError, match="above 0"):
        measure(collection, ImageText(8, 4, tokenise), seconds=0)
    with pytest.raises(DataError, match=r"none of 256 .*'too-small': 256"):
        measure(collection, ImageText(8, 4, tokenise, min_side=99))


def test_the_verb(shards, tmp_path):
    command = [
        sys.executable,
        "-m",
        "unclip",
        "data-bench",
        shards["train"],
        "--size=8",
        "--json",
        "--seconds=0.02",
        "--batch_size=4",
        "--threads=2",
        "--filters=name=red",
        f"--out={tmp_path / 'a.json'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values == json.loads((tmp_path / "a.json").read_text())
    assert values["threads"] == 2 and 0 < values["filters"]["kept"] < 1 and values["size"] == 8
