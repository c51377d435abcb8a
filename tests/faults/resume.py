"""Runs stopped at any step and resumed on another number of hosts and decoding workers.

What every step delivers is compared, bit for bit, with one uninterrupted run on one host: pictures
cut at random places, captions drawn among two, sample numbers. Each sample must come once an epoch.
"""

import io
import itertools
import json
import pathlib
import tarfile
import tempfile
import time

import numpy as np
from PIL import Image
from table import Row

from unclip.errors import UnclipError
from unclip.input.decode.transforms import ImageText
from unclip.input.shards.collection import open_shards
from unclip.input.source import make_source

BATCH, STEPS, SEED = 16, 40, 7
SHARDS = (30, 11, 25, 1, 20, 17)
HOSTS, WORKERS = (1, 2, 4), (0, 1, 2)
ORDERS = {
    "global": {},
    "streamed": {"order": "streamed", "streams": 4, "window": 8},
    "mixed": {"order": "streamed", "streams": 4, "window": 8, "proportions": (3, 1)},
}


def tokenise(texts, context_length):
    """A byte a token."""
    tokens = np.zeros((len(texts), context_length), np.int32)
    for row, text in zip(tokens, texts):
        row[: len(text)] = list(text.encode())[:context_length]
    return tokens, tokens > 0


class Numbered(ImageText):
    """`ImageText` that also gives the number in the sample's key."""

    def __call__(self, sample, rng):
        return super().__call__(sample, rng) | {"key": np.int64(sample.key)}


def transform() -> Numbered:
    """Draws a caption and a place of the crop for each sample."""
    return Numbered(
        8, 12, tokenise, crop="random", fraction=0.6, with_crop=True, captions=("txt", "json:alt")
    )


def png(k: int) -> bytes:
    """A picture of noise, another for each k."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(k).integers(0, 256, (14, 18, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: pathlib.Path, numbers, broken=frozenset()) -> str:
    """A shard of the samples with these numbers; the pictures of `broken` cannot be decoded."""
    with tarfile.open(path, "w") as archive:
        for k in numbers:
            picture = b"no picture" if k in broken else png(k)
            meta = json.dumps({"alt": f"other {k}"}).encode()
            for extension, data in (("png", picture), ("txt", b"text %d" % k), ("json", meta)):
                info = tarfile.TarInfo(f"{k:04d}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return str(path)


def collection(folder: pathlib.Path, broken=frozenset()):
    """Shards of uneven sizes, as two patterns; sample i has the key i."""
    ends = list(itertools.accumulate(SHARDS))
    paths = [
        write(folder / f"{s:02d}.tar", range(end - count, end), broken)
        for s, (count, end) in enumerate(zip(SHARDS, ends))
    ]
    first = ",".join(path for path in paths[:3])
    return open_shards([f"{{{first}}}", f"{{{','.join(paths[3:])}}}"])


def deliver(samples, start, steps, hosts, workers, options):
    """The hosts' rows of `steps` global batches from a position, put together, and the next one."""
    parts, ends = [], set()
    for host in range(hosts):
        with make_source(
            samples,
            transform(),
            batch_size=BATCH,
            seed=SEED,
            start=start,
            process_index=host,
            process_count=hosts,
            workers=workers,
            threads=2,
            prefetch=1,
            max_bad_fraction=1.0,
            **options,
        ) as batches:
            parts.append([next(batches) for _ in range(steps)])
            ends.add(batches.position)
    (end,) = ends
    return [
        {name: np.concatenate([part[s][name] for part in parts]) for name in parts[0][s]}
        for s in range(steps)
    ], end


def same(ours, theirs) -> bool:
    """Whether two lists of batches have the same bits."""
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys()
        and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)
        for a, b in zip(ours, theirs)
    )


def complete(reference, samples, options) -> bool:
    """Whether every sample number comes once, and every sample once an epoch of its part."""
    numbers = np.concatenate([b["sample"][:, 1] for b in reference])
    keys = np.concatenate([b["key"] for b in reference])
    if not np.array_equal(numbers, np.arange(BATCH * STEPS)):
        return False
    groups = samples.groups if options.get("proportions") else np.array([0, len(samples)])
    for low, end in itertools.pairwise(groups):
        own = keys[(keys >= low) & (keys < end)]
        n, seen = end - low, np.bincount(own - low, minlength=end - low)
        # A mixture's streams are not all at the same place of a part's epoch; without one they are.
        slack = 1 if options.get("proportions") or len(own) % n else 0
        if seen.max() - seen.min() > slack:
            return False
        if not options.get("proportions") and any(
            len(set(own[e : e + n].tolist())) != n for e in range(0, len(own) - n + 1, n)
        ):
            return False
    return True


def run(scale: float) -> list[Row]:
    """Random stops in this process, then every number of hosts with every number of workers."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        samples = collection(pathlib.Path(folder), broken={5, 40, 90})
        for name, options in ORDERS.items():
            rng = np.random.default_rng(1)
            begin, wrong = time.perf_counter(), 0
            # The broken samples are replaced, so the count of each sample is taken without them.
            whole = collection(pathlib.Path(tempfile.mkdtemp(dir=folder)))
            clean, _ = deliver(whole, 0, STEPS, 1, 0, options)
            wrong += not complete(clean, whole, options)
            reference, _ = deliver(samples, 0, STEPS, 1, 0, options)
            tries = max(3, round(200 * scale))
            for _ in range(tries):
                stop = int(rng.integers(STEPS - 3))
                steps, hosts = int(rng.integers(1, 4)), int(rng.choice(HOSTS))
                wrong += not _resumed(samples, reference, stop, steps, hosts, 0, options)
            rows.append(
                Row(
                    f"stopped at a random step, {name} order",
                    tries,
                    tries - wrong,
                    0,
                    wrong,
                    time.perf_counter() - begin,
                    f"{STEPS} steps of {BATCH}, {len(samples)} samples, 1, 2 or 4 hosts",
                )
            )
            begin, wrong = time.perf_counter(), 0
            pairs = sorted(itertools.product(HOSTS, WORKERS[1:]), key=np.prod)
            pairs = pairs[: max(1, round(len(pairs) * scale))]
            for hosts, workers in pairs:
                stop = int(rng.integers(STEPS - 3))
                wrong += not _resumed(samples, reference, stop, 3, hosts, workers, options)
            rows.append(
                Row(
                    f"resumed by worker processes, {name} order",
                    len(pairs),
                    len(pairs) - wrong,
                    0,
                    wrong,
                    time.perf_counter() - begin,
                    "1 or 2 workers on each of 1, 2 or 4 hosts",
                )
            )
    return rows


def _resumed(samples, reference, stop, steps, hosts, workers, options) -> bool:
    try:
        batches, end = deliver(samples, stop * BATCH, steps, hosts, workers, options)
    except UnclipError:
        return False
    return end == (stop + steps) * BATCH and same(batches, reference[stop : stop + steps])
