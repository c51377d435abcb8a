"""Tars made to do harm: links, names that leave the archive, devices, pickles, bombs, commands.

Every tar holds two good samples, before and after what is hostile, and lies beside a file whose
text must never appear in a sample. A process of its own reads them, so that its memory can be held
to a stated cap.
"""

import bz2
import collections
import gzip
import io
import json
import lzma
import os
import pickle
import random
import subprocess
import sys
import tarfile
import tempfile
import time

from table import Row

CAP = 64 << 20  # bytes of memory, above what the imports take
SECRET = b"the text of another file"
TRIALS = 200  # tars of a kind at scale 1


def plain(archive: tarfile.TarFile, key: str) -> None:
    """Adds a good sample."""
    for extension, data in (("jpg", b"picture " + key.encode()), ("txt", b"text " + key.encode())):
        add(archive, f"{key}.{extension}", data)


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    """Adds a member, its header's fields as given."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(data))


def links(archive, rng):
    """Symbolic and hard links to a secret, to a good member and to devices."""
    target = rng.choice(["secret.txt", "../secret.txt", "/etc/hostname", "first.txt", "/dev/zero"])
    add(archive, "x.jpg", b"picture x")
    _header(
        archive,
        rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]),
        rng.choice([0, 0, 1 << 20]),
        "x.txt",
        target,
    )  # a link has no data, even if its size is not 0
    return {"refused-link": 1}


def names(archive, rng):
    """Absolute names, `..` in any place, and names longer than any path."""
    name = rng.choice(["/etc/x", "../x", "a/../../x", "a/b/..", "/x", "y/../x", "n" * 5000])
    for extension in ("jpg", "txt"):
        add(
            archive,
            f"{name}.{extension}" if not name.endswith("..") else f"{name}/x.{extension}",
            SECRET,
        )
    return {"refused-name": 2}


def devices(archive, rng):
    """Devices, fifos and unknown types."""
    kind = rng.choice([tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z", b"D", b"M"])
    add(archive, "x.jpg", type=kind, devmajor=1, devminor=5)
    return {"refused-type": 1}


def sparse(archive, rng):
    """Sparse files in GNU's two ways, which say to be much larger than they are."""
    if rng.random() < 0.5:
        add(archive, "x.jpg", b"x" * 512, type=tarfile.GNUTYPE_SPARSE)
    else:
        add(
            archive,
            "x.jpg",
            b"x" * 512,
            pax_headers={"GNU.sparse.major": "1", "GNU.sparse.realsize": str(1 << 50)},
        )
    return {"refused-type": 1}


class _Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickles(archive, rng):
    """Pickled members, which other readers load, beside a good sample."""
    add(
        archive,
        f"first.{rng.choice(['pkl', 'pickle', 'pyd', 'pth', 'pt', 'x.pth', 'PKL'])}",
        pickle.dumps(_Runs("ran")),
    )
    return {"refused-pickle": 1}


def long_names(archive, rng):
    """Names, comments and link names of a MiB in their hundreds, and ones that claim more."""
    for _ in range(rng.randrange(1, 40)):
        _header(archive, rng.choice([b"L", b"K", b"g"]), 1 << 20)
        archive.fileobj.seek(1 << 20, os.SEEK_CUR)
        archive.offset = archive.fileobj.tell()
    size = rng.choice([(1 << 20) + 1, 1 << 33, 1 << 62, -1])
    _header(archive, rng.choice([b"L", b"x", b"g"]), size)
    return None


def pax_records(archive, rng):
    """Pax headers with ten thousands of records, no record, absurd lengths or none at all."""
    data = rng.choice(
        [
            b"".join(b"%d k%d=v\n" % (8 + len(str(k)) - 1, k) for k in range(10_000, 90_000)),
            b"9" * 4000 + b" path=x\n",
            b"0 path=x\n",
            b"-5 path=x\n",
            b"\xff" * 512,
            b"20 path=" + b"x" * 4000,
            b"12 size=a\n\n",
            b"10 path=x",
        ]
    )
    _header(archive, b"x", len(data))
    archive.fileobj.write(data.ljust(-(-len(data) // 512) * 512, b"\0"))
    archive.offset = archive.fileobj.tell()
    return None


def sizes(archive, rng):
    """A member that says to be larger than the tar, or smaller than nothing."""
    _header(archive, b"0", rng.choice([1 << 33, 1 << 40, 1 << 63, 1 << 80, -1, -(1 << 70)]))
    return None


def crowds(archive, rng):
    """Thousands of empty members, of one key or of as many."""
    one = rng.random() < 0.5
    block = bytearray(tarfile.TarInfo("k0000000.txt").tobuf(tarfile.GNU_FORMAT))
    for number in range(20_000):
        if not one:
            block[1:8] = b"%07d" % number
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
        archive.fileobj.write(block)
    archive.offset = archive.fileobj.tell()
    return {"no-picture" if not one else "duplicate": 1 if one else 20_000}


def texts(archive, rng):
    """JSON nested without end, crowded or with absurd numbers, and captions that are too long."""
    kind, value = rng.choice(
        [
            ("json", b"[" * 1_000_000),
            ("json", b'{"a":' * 200_000),
            ("json", b"[[]," * 250_000),
            ("json", b"9" * 1_000_000),
            ("txt", b"x" * ((1 << 20) + 1)),
            ("json", b"[" + b"{}," * 340_000 + b"{}]"),
            ("json", b" " * ((1 << 20) + 1)),
        ]
    )
    add(archive, "x.jpg", b"picture x")
    add(archive, f"x.{kind}", value)
    return {"too-many-bytes": 1} if len(value) > 1 << 20 else {"no-text": 1}


def _header(archive, kind: bytes, size: int, name: str = "x.jpg", target: str = "") -> None:
    """A header alone; sizes that octal digits cannot say are in base 256."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (
        b"%011o\0" % size
        if 0 <= size < 8**11
        else bytes([0x80 if size > 0 else 0xFF]) + (size % 256**11).to_bytes(11, "big")
    )
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    archive.fileobj.write(block)
    archive.offset = archive.fileobj.tell()


KINDS = {
    links: 1,
    names: 1,
    devices: 1,
    sparse: 1,
    pickles: 1,
    long_names: 0.1,
    pax_records: 0.5,
    sizes: 1,
    crowds: 0.02,
    texts: 0.3,
}
# Where damage ends the walk what comes after it is not found: the first sample remains, and that is
# reported; where the odd header was harmless, both do.
ENDING = (long_names, pax_records, sizes)


def _tars(scale: float, folder: str) -> list[Row]:
    """Reads tars of every kind, in this process."""
    from unclip.errors import DataError
    from unclip.input.shards import collection as shards
    from unclip.input.shards import folder as index_folder

    rows, path = [], os.path.join(folder, "a.tar")
    for number, (kind, part) in enumerate(KINDS.items()):
        rng, start = random.Random(number), time.perf_counter()
        trials = max(2, round(TRIALS * part * scale))
        refused = 0
        for trial in range(trials):
            form = rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
            form = tarfile.PAX_FORMAT if kind is sparse else form
            with tarfile.open(path, "w", format=form) as archive:
                plain(archive, "first")
                expected = kind(archive, rng)
                plain(archive, "second")
            checked = trial % 4 == 0
            pattern = path
            try:
                if checked:
                    pattern = os.path.join(folder, "indexed")
                    index_folder.index_folder(path, pattern, jobs=1, force=True)
                collection = shards.open_shards(pattern)
                found = [collection.read(i) for i in range(len(collection))]
            except DataError:
                continue
            keys = [s.key for s in found]
            both = keys == ["first", "second"]
            fine = both or (kind in ENDING and keys == ["first"])
            clean = all(
                (s.image, s.text) == (b"picture " + s.key.encode(), "text " + s.key)
                for s in found
                if s.key in ("first", "second")
            )
            told = (
                both or bool(collection.problems)
                if expected is None
                else all(collection.problems[reason] == count for reason, count in expected.items())
            )
            leaked = any(SECRET in s.image or SECRET.decode() in s.text for s in found)
            refused += fine and clean and told and not leaked
        rows.append(
            Row(
                f"tars with {kind.__name__.replace('_', ' ')}",
                trials,
                0,
                refused,
                trials - refused,
                time.perf_counter() - start,
            )
        )
    return rows


def _not_tars(scale: float, folder: str) -> list[Row]:
    """Compressed tars and addresses that other readers would run as commands."""
    from unclip.errors import UnclipError
    from unclip.input.shards import collection as shards
    from unclip.input.shards import folder as index_folder
    from unclip.input.streaming import stream as streaming

    start, tally = time.perf_counter(), collections.Counter()
    path = os.path.join(folder, "zipped.tar")
    with tarfile.open(path, "w") as archive:
        plain(archive, "first")
        add(archive, "noise.jpg", random.Random(0).randbytes(4096))
    with open(path, "rb") as file:
        whole = file.read()
    bomb = gzip.compress(b"\0" * (1 << 20)) * 1024  # a GiB, in a MiB
    for data in (gzip.compress(whole), bz2.compress(whole), lzma.compress(whole), bomb):
        with open(path, "wb") as file:
            file.write(data)
        for read in (shards.open_shards, _indexed):
            tally["tried"] += 1
            try:
                read(path)
            except UnclipError as error:
                tally["refused"] += "compressed" in str(error)
    rows = [
        Row(
            "compressed tars",
            tally["tried"],
            0,
            tally["refused"],
            tally["tried"] - tally["refused"],
            time.perf_counter() - start,
        )
    ]

    start, tally = time.perf_counter(), collections.Counter()
    mark = os.path.join(folder, "ran")
    commands = [
        f"pipe:touch {mark}",
        f" PIPE:touch {mark}",
        f"pipe:touch {mark} #.tar",
        f"simplecache::file://{folder}/a.tar",
        f"zip://a.tar::{folder}/a.zip",
        f"ssh://host/{mark}",
        f"ftp://host/{mark}",
        "reference://x.tar",
        "data://x",
    ]
    readers = {
        "open_shards": shards.open_shards,
        "index_folder": lambda spec: index_folder.index_folder(spec, folder + "/out", jobs=1),
        "make_stream": lambda spec: streaming.make_stream(
            spec, lambda sample, rng: {}, batch_size=1, seed=0
        ),
    }
    for spec in commands:
        for read in readers.values():
            tally["tried"] += 1
            try:
                read(spec)
            except UnclipError:
                tally["refused"] += 1
    wrong = tally["tried"] - tally["refused"] + os.path.exists(mark) + os.path.exists("ran")
    rows.append(
        Row(
            "commands, chains, other protocols",
            tally["tried"],
            0,
            tally["refused"],
            wrong,
            time.perf_counter() - start,
        )
    )
    return rows


def _indexed(path):
    """What the index says about a file that is no tar, as an error."""
    from unclip.errors import DataError
    from unclip.input.shards import folder as index_folder

    summary = index_folder.index_folder(path, os.path.dirname(path) + "/out", jobs=1, force=True)
    raise DataError(str(dict(summary.problems)))


def _peak() -> int:
    """The most memory this process has had, in bytes; getrusage would count its parent's too."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) << 10


def _child(scale: float) -> None:
    """Prints the rows and the growth of memory as JSON."""
    from unclip.input.shards import collection  # noqa: F401 (counted as imports)
    from unclip.input.streaming import stream  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with open("secret.txt", "wb") as file:
            file.write(SECRET)
        before = _peak()
        rows = _tars(scale, folder) + _not_tars(scale, folder)
        grown = _peak() - before
        left = set(os.listdir(folder)) - {"secret.txt", "a.tar", "zipped.tar", "indexed", "out"}
    print(json.dumps([rows, grown, sorted(left)]))


def run(scale: float) -> list[Row]:
    """Reads hostile tars in a process of its own, whose memory is held to `CAP`."""
    start = time.perf_counter()
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__), str(scale)],
        timeout=600,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        return [
            Row(
                "hostile tars",
                1,
                0,
                0,
                1,
                time.perf_counter() - start,
                f"the process ended with {done.returncode}",
            )
        ]
    rows, grown, left = json.loads(done.stdout.splitlines()[-1])
    rows = [Row(*row) for row in rows]
    rows.append(
        Row(
            "memory while reading them",
            1,
            0,
            int(grown <= CAP),
            int(grown > CAP or bool(left)),
            time.perf_counter() - start,
            f"grew by {grown / 2**20:.0f} MiB of {CAP >> 20} allowed"
            + (f"; left behind: {left}" if left else ""),
        )
    )
    return rows


if __name__ == "__main__":
    _child(float(sys.argv[1]))
