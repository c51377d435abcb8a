"""Shards that end too early: a three-sample tar cut at every 512-byte boundary and beside it.

After the cut shard comes a whole one that begins with the same keys, the case in which other
readers pair one shard's picture with the next one's caption. What should come out is worked out
here from the members' places in the whole tar.
"""

import contextlib
import io
import json
import os
import signal
import tarfile
import tempfile
import time
from collections import Counter

import numpy as np
from table import Row

from unclip.errors import DataError
from unclip.input.shards import folder as index_folder
from unclip.input.shards.collection import open_shards
from unclip.input.streaming.stream import make_stream

KEYS = ("folder/0000", "folder/0001", "n" * 120)
PARTS = ("jpg", "txt", "json")
SECONDS = 20  # no cut may take longer


def members(tag: str) -> list[tuple[str, bytes]]:
    """The three samples' members: sizes below, at and above a block; the last has no json."""
    found = []
    for number, key in enumerate(KEYS):
        found += [
            (f"{key}.jpg", f"{tag} {number} picture ".encode() * (40 + 37 * number)),
            (f"{key}.txt", f"{tag} {number} text".encode()),
        ]
        if number < 2:
            meta = json.dumps({"tag": f"{tag} {number}"}).encode()
            found.append((f"{key}.json", meta.ljust(512) if number else meta))
    return found


def write(path: str, tag: str, form: int) -> dict[str, tuple[int, int]]:
    """Writes the shard; name -> where its bytes begin and end."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members(tag):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as archive:
        return {m.name: (m.offset_data, m.offset_data + m.size) for m in archive}


def expected(places: dict[str, tuple[int, int]], size: int) -> tuple[list[str], Counter]:
    """(keys that are whole, what is left out) of the shard cut to `size` bytes."""
    last = max(-(-end // 512) * 512 for _, end in places.values())
    begun = Counter({"shard-truncated": int(size < last + 512)})
    whole = []
    for key in KEYS:
        spans = [places[f"{key}.{part}"] for part in PARTS if f"{key}.{part}" in places]
        seen = [(start, end) for start, end in spans if start <= size]
        if any(start <= size < end for start, end in seen):
            begun["truncated"] += 1
        elif len(seen) >= 2:
            whole.append(key)  # without its json, where the cut is before that begins
        elif seen:
            begun["no-text"] += 1
    return whole, +begun


@contextlib.contextmanager
def within(seconds: int):
    """Raises TimeoutError in this thread after so long."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def through_walk(paths: list[str], folder: str):
    """The shards as training opens them without an index."""
    return opened(paths)


def through_index(paths: list[str], folder: str):
    """The shards by an index, with checksums."""
    out = os.path.join(folder, "indexed")
    index_folder.index_folder(paths, out, jobs=1, force=True)
    return opened(out)


def opened(pattern):
    """((picture, text, JSON) of every sample, what was left out)."""
    collection = open_shards(pattern)
    found = [collection.read(i) for i in range(len(collection))]
    return [(s.image, s.text, s.meta) for s in found], Counter(collection.problems)


class AsBytes:
    """Transform: a sample's picture, text and JSON as arrays of a fixed shape."""

    def __call__(self, sample, rng):
        def array(data):
            return np.frombuffer(data.ljust(4096, b"\0"), np.uint8)

        return {
            "image": array(sample.image),
            "text": array(sample.text.encode()),
            "meta": array(json.dumps(sample.meta).encode()),
        }


def through_stream(paths: list[str], folder: str):
    """One pass of the streaming mode."""
    found = []
    with make_stream(
        paths,
        AsBytes(),
        batch_size=2,
        seed=0,
        passes=1,
        shuffle_samples=0,
        threads=1,
        max_bad_fraction=1,
    ) as stream:
        for batch in stream:
            for row in np.flatnonzero(batch["valid"]):
                image, text, meta = (
                    batch[name][row].tobytes().rstrip(b"\0") for name in ("image", "text", "meta")
                )
                found.append((image, text.decode(), json.loads(meta)))
        return found, Counter(stream.problems)


def run(scale: float) -> list[Row]:
    """Cuts at every boundary and a byte beside it; below scale 0.1 the slower readers skip some."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cut, second = os.path.join(folder, "a.tar"), os.path.join(folder, "b.tar")
        cases = []
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            places = write(cut, "A", form)
            with open(cut, "rb") as file:
                data = file.read()
            end = max(end for _, end in places.values()) + 2048  # past it there are zeros alone
            for boundary in range(0, end, 512):
                cases += [
                    (data[:size], places)
                    for size in (boundary - 1, boundary, boundary + 1)
                    if size >= 0
                ]
        write(second, "B", tarfile.GNU_FORMAT)
        whole = {tag: whole_samples(tag) for tag in "AB"}
        some = max(1, round(0.1 / scale))
        for name, read, step in (
            ("walked", through_walk, 1),
            ("indexed", through_index, some),
            ("streamed", through_stream, some),
        ):
            start, tally = time.perf_counter(), Counter()
            for data, places in cases[::step]:
                with open(cut, "wb") as file:
                    file.write(data)
                tally[judge(read, [cut, second], folder, data, places, whole)] += 1
            rows.append(
                Row(
                    f"shard cut off anywhere, {name}",
                    tally.total(),
                    tally["good"],
                    tally["refused"],
                    tally["wrong"],
                    time.perf_counter() - start,
                )
            )
    return rows


def whole_samples(tag: str) -> dict[str, tuple[bytes, str, dict]]:
    """key -> what its sample holds."""
    by_name = dict(members(tag))
    return {
        key: (
            by_name[f"{key}.jpg"],
            by_name[f"{key}.txt"].decode(),
            json.loads(by_name.get(f"{key}.json", b"{}")),
        )
        for key in KEYS
    }


def judge(read, paths, folder, data, places, whole) -> str:
    """ "good": nothing was missing; "refused": exactly what was is counted; or "wrong"."""
    keys, problems = expected(places, len(data))
    samples = []
    for key in keys:
        image, text, meta = whole["A"][key]
        has_json = f"{key}.json" in places and places[f"{key}.json"][0] <= len(data)
        samples.append((image, text, meta if has_json else {}))
    samples += whole["B"].values()
    try:
        with within(SECONDS):
            found, counted = read(paths, folder)
    except (DataError, TimeoutError):
        return "wrong"
    if found != samples or counted != problems:
        return "wrong"
    return "refused" if problems else "good"
