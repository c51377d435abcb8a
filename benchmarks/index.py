"""The cost of an index of very many samples, and how fast shards are indexed.

    python benchmarks/index.py --shards 1000 --rows 10000

First, with `shards` x `rows` synthetic entries, written by unclip's own writer over sparse tars:
bytes per sample; then in a fresh process the seconds until sample 0 is found, by how much memory
has grown at that point and after random look-ups of key and place, and look-ups per second.
Second, on one real tar of random pictures: samples indexed per second, with and without checksums,
in turn with tarfile and webdataset reading the same tar. Prints JSON lines; memory is split into
the process's own and pages of mapped files, which the system reclaims when it needs them.
--out FILE.json keeps the figures for docs/speed.md.
"""

import argparse
import io
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import record

ROOT = record.ROOT

# unclip itself is imported where it is used, because the time of the import is measured too.
PAPER = 650_000_000  # pairs that CLIP was trained on in appendix C of arXiv 2204.06125


def make_entries(folder: pathlib.Path, shards: int, rows: int) -> None:
    """Sparse tars and index files of rows such as img2dataset's shards give: 9-digit keys."""
    from unclip.input.captions import STANDARD
    from unclip.input.shards.index import ShardIndex

    rng = np.random.default_rng(0)
    for shard in range(shards):
        sizes = np.stack(
            [
                rng.integers(8_000, 60_000, rows),
                rng.integers(20, 200, rows),
                rng.integers(300, 900, rows),
            ],
            axis=1,
        )
        blocks = 1 + -(-sizes // 512)  # each member's header and data
        starts = np.cumsum(blocks.ravel()).reshape(rows, 3) - blocks + 1
        table = np.zeros((rows, 8), np.uint32)
        table[:, 0:6:2], table[:, 1:6:2] = starts, sizes
        table[:, 6] = 9 * np.arange(1, rows + 1)
        table[:, 7] = rng.integers(1, 1 << 32, rows)
        keys = "".join(f"{shard:05d}{row:04d}"[:9] for row in range(rows)).encode()
        size = int(blocks.sum() + 2) * 512
        path = folder / f"{shard:05d}.tar"
        with open(path, "wb") as file:
            file.truncate(size)
        ShardIndex(
            path.name,
            size,
            table,
            np.frombuffer(keys, np.uint8),
            rows,
            captions=dict.fromkeys(STANDARD, rows),
            checksums=True,
        ).write(folder / "index" / f"{shard:05d}.idx")


def memory() -> dict[str, float]:
    """This process's resident MiB: its own memory, and pages of mapped files."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {
        name: int(fields[field].split()[0]) / 1024
        for name, field in (("own", "RssAnon"), ("files", "RssFile"))
    }


def load(folder: str, lookups: int) -> None:
    """In a process of its own: opens the index, looks samples up, prints time and memory."""
    start = time.perf_counter()
    from unclip.input.shards.collection import open_shards

    imported, at_import = time.perf_counter() - start, memory()
    start = time.perf_counter()
    collection = open_shards(folder)
    collection.key(0)
    opened, at_open = time.perf_counter() - start, memory()
    numbers = np.random.default_rng(0).integers(len(collection), size=lookups).tolist()
    # The first round opens and checks every index file; the second is as during training.
    rates = []
    for _ in range(2):
        start = time.perf_counter()
        for number in numbers:
            collection.key(number)
            collection.spans(number)
        rates.append(lookups / (time.perf_counter() - start))
    at_end = memory()
    print(
        json.dumps(
            {
                "samples": len(collection),
                "import_s": imported,
                "open_s": opened,
                "open_own_MiB": at_open["own"] - at_import["own"],
                "open_files_MiB": at_open["files"] - at_import["files"],
                "lookups": lookups,
                "first_lookups_per_s": rates[0],
                "later_lookups_per_s": rates[1],
                "lookups_own_MiB": at_end["own"] - at_import["own"],
                "lookups_files_MiB": at_end["files"] - at_import["files"],
            }
        )
    )


def entries(shards: int, rows: int, lookups: int) -> list[dict]:
    """Measures an index of shards x rows entries; returns the figures to keep."""
    from unclip.input.shards import folder as index_folder

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        start = time.perf_counter()
        make_entries(folder, shards, rows)
        written = time.perf_counter() - start
        start = time.perf_counter()
        # Every index file fits its tar, so this measures the checks of a resumed indexing alone.
        summary = index_folder.index_folder(
            str(folder / "*.tar"), folder / "index", jobs=1, checksums=True
        )
        resumed = time.perf_counter() - start
        if (summary.walked, summary.samples) != (0, shards * rows):
            raise SystemExit(f"expected {shards * rows} known samples, found {summary}")
        table = os.path.getsize(folder / "index" / index_folder.TABLE)
        runs = [
            json.loads(
                subprocess.run(
                    [
                        sys.executable,
                        __file__,
                        "--load",
                        str(folder / "index"),
                        "--lookups",
                        str(lookups),
                    ],
                    check=True,
                    stdout=subprocess.PIPE,
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                ).stdout
            )
            for _ in range(3)
        ]
    line = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    bytes_a_sample = (summary.file_bytes + table) / summary.samples
    print(
        json.dumps(
            {
                "what": "index",
                "shards": shards,
                "bytes_per_sample": round(bytes_a_sample, 2),
                "write_s": round(written, 1),
                "look_around_again_s": round(resumed, 1),
                **{key: round(value, 3) for key, value in line.items()},
            }
        )
    )
    scale = 100_000_000 / summary.samples
    print(
        json.dumps(
            {
                "what": "index of 100 million, by proportion",
                "shards": round(shards * scale),
                "index_GB": round(bytes_a_sample / 10, 2),
                "open_s": round(line["open_s"] * scale, 2),
                "open_own_MiB": round(line["open_own_MiB"] * scale, 1),
                "index_GB_of_the_paper": round(bytes_a_sample * PAPER / 1e9, 1),
            }
        )
    )
    what = f"index of {summary.samples:,} samples in {shards:,} shards"
    return [
        record.figure(f"{what}: size", bytes_a_sample, "bytes a sample"),
        record.figure(f"{what}: until the first sample is found", line["open_s"], "s"),
        record.figure(f"{what}: memory at start", line["open_own_MiB"], "MiB"),
        record.figure(
            f"{what}: memory after {lookups:,} random look-ups", line["lookups_own_MiB"], "MiB"
        ),
        record.figure(f"{what}: later look-ups", line["later_lookups_per_s"], "/s"),
    ]


def write_tar(path: str, samples: int, size: int) -> None:
    """A tar as img2dataset writes it, of random pictures."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for number in range(samples):
            key = f"{number:09d}"
            meta = {
                "key": key,
                "url": "x" * 80,
                "caption": "a picture " * 5,
                "status": "success",
                "width": 512,
                "height": 384,
                "similarity": 0.31,
                "sha256": "0" * 64,
            }
            for extension, data in (
                ("jpg", rng.bytes(size)),
                ("txt", b"a picture " * 5),
                ("json", json.dumps(meta).encode()),
            ):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def indexed(path: str, checksums: bool) -> int:
    """Samples that our walk finds."""
    from unclip.input.shards import folder as index_folder
    from unclip.input.storage.storage import Storage

    return index_folder.walk_path(path, Storage(), checksums=checksums).count


def by_tarfile(path: str, read: bool) -> int:
    """Samples that tarfile's walk finds; `read`: with the members' bytes."""
    members = 0
    with tarfile.open(path) as archive:
        for member in archive:
            members += 1
            if read:
                archive.extractfile(member).read()
    return members // 3


def by_webdataset(path: str) -> int:
    """Samples that webdataset delivers, undecoded: it reads every byte."""
    import webdataset

    return sum(1 for _ in webdataset.WebDataset(path, shardshuffle=False, empty_check=False))


def walks(samples: int, size: int, rounds: int) -> list[dict]:
    """Measures the walk beside its peers; returns the figures to keep."""
    contenders = {
        "unclip": lambda path: indexed(path, False),
        "unclip, checksums": lambda path: indexed(path, True),
        "tarfile, headers": lambda path: by_tarfile(path, False),
        "tarfile, all bytes": lambda path: by_tarfile(path, True),
        "webdataset, all bytes": by_webdataset,
    }
    seconds = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.tar")
        write_tar(path, samples, size)
        for _ in range(rounds + 1):  # the first round is a warm-up
            for name, count in contenders.items():
                start = time.perf_counter()
                if count(path) != samples:
                    raise SystemExit(f"{name} does not find {samples} samples")
                seconds[name].append(time.perf_counter() - start)
        megabytes = os.path.getsize(path) / 1e6
    rates = {name: samples / statistics.median(found[1:]) for name, found in seconds.items()}
    for name, rate in rates.items():
        print(
            json.dumps(
                {
                    "what": "walk",
                    "who": name,
                    "samples_per_s": round(rate),
                    "MB_per_s": round(rate * megabytes / samples),
                }
            )
        )
    ratios = {
        (what, peer): round(rates[ours] / rates[f"{peer}, {what}"], 2)
        for what, ours, peer in (
            ("headers", "unclip", "tarfile"),
            ("all bytes", "unclip, checksums", "tarfile"),
            ("all bytes", "unclip, checksums", "webdataset"),
        )
    }
    named = {f"{what}, over {peer}": ratio for (what, peer), ratio in ratios.items()}
    print(json.dumps({"what": "walk, ours over theirs", **named}))
    return [
        record.figure(
            f"samples of {size:,} bytes indexed a second, {what} read", ratio, "×", against=peer
        )
        for (what, peer), ratio in ratios.items()
    ]


def main() -> None:
    """Reads the arguments and prints what is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument(
        "--rows", type=int, default=10_000, help="samples per shard, at most 10,000"
    )
    parser.add_argument("--lookups", type=int, default=100_000)
    parser.add_argument("--walk_samples", type=int, default=10_000)
    parser.add_argument("--picture_bytes", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="FILE.json that keeps the figures")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.load, args.lookups)
        return
    print(
        json.dumps(
            {
                "what": "machine",
                "cpu": platform.processor() or platform.machine(),
                "cores": len(os.sched_getaffinity(0)),
                "python": platform.python_version(),
            }
        )
    )
    kept = entries(args.shards, min(args.rows, 10_000), args.lookups)
    kept += walks(args.walk_samples, args.picture_bytes, args.rounds)
    if args.out:
        record.write(args.out, kept)


if __name__ == "__main__":
    main()
