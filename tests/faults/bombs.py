"""Small members that would unfold into gigabytes or hours: refused in bounded memory and time."""

import io
import json
import pathlib
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib

import numpy as np
from PIL import Image
from table import Row

CAP_MIB = 128  # above what reading good samples takes
SECONDS_EACH = 5.0
GOOD = 8


def run(scale: float) -> list[Row]:
    """Every bomb some times among good samples, in a process of its own."""
    began, repeats = time.monotonic(), max(1, round(10 * scale))
    with tempfile.TemporaryDirectory() as folder:
        found = bombs()
        _write(pathlib.Path(folder) / "a.tar", found, repeats)
        # By a file: what making the bombs took must not count as the reader's memory.
        reasons = {name: reasons for name, (_, _, reasons) in found.items()}
        (pathlib.Path(folder) / "reasons.json").write_text(json.dumps(reasons))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, folder, str(repeats)],
            check=False,
            capture_output=True,
            text=True,
            timeout=600,
        )
    if done.returncode:
        count = repeats * len(found)
        return [Row("bombs", count, 0, 0, count, time.monotonic() - began, done.stderr[-300:])]
    found = json.loads(done.stdout.splitlines()[-1])
    return [
        Row(
            "decompression bombs",
            found["tried"],
            0,
            found["refused"],
            found["wrong"],
            time.monotonic() - began,
            f"+{found['mib']:.0f} MiB of at most {CAP_MIB}, slowest {found['slowest']:.2f} s",
        )
    ]


def bombs() -> dict[str, tuple[str, bytes, tuple[str, ...]]]:
    """Name -> extension, bytes, the reasons that may be given."""
    many = ("too-many-pixels",)
    found = {
        "png-sides": ("png", _png(65_000, 65_000, b"\0" * 1000), many),
        "png-real": ("png", _png(20_000, 20_000, b"\0" * (20_000 * 60_001 // 64)), many),
        "png-16-bit": ("png", _png(12_000, 12_000, b"\0" * 1000, depth=16, colour=6), many),
        "png-unfolding": ("png", _png(64, 64, b"\0" * (192 << 20)), ("corrupt", "truncated", "")),
        "png-ztxt": ("png", _png(8, 8, b"\0" * 200, _text(b"zTXt", 64 << 20)), ("corrupt",)),
        "png-itxt": ("png", _png(8, 8, b"\0" * 200, _text(b"iTXt", 64 << 20)), ("corrupt",)),
        "png-ztxt-many": (
            "png",
            _png(
                8,
                8,
                b"\0" * 200,
                b"".join(_text(b"zTXt", 1_000_000, b"key %d" % k) for k in range(100)),
            ),
            ("corrupt",),
        ),
        "png-iccp": (
            "png",
            _png(
                8,
                8,
                b"\0" * 200,
                _chunk(b"iCCP", b"name\0\0" + zlib.compress(b"\0" * (64 << 20), 9)),
            ),
            ("corrupt", ""),
        ),
        "jpeg-sides": ("jpg", _jpeg(65_500, 65_500), many),
        "jpeg-sides-progressive": ("jpg", _jpeg(65_500, 65_500, progressive=True), many),
        "jpeg-strip": ("jpg", _jpeg(65_500, 1100), many),
        "jpeg-scans": ("jpg", _scans(4000), ("too-many-scans",)),
        "webp-lossy": ("webp", _webp(False), many),
        "webp-lossless": ("webp", _webp(True), many),
        "webp-canvas": ("webp", _webp_canvas(), many),
    }
    deep = b"[" * 500_000 + b"]" * 500_000
    huge = b'{"n": ' + b"9" * 1_000_000 + b"}"
    members = {
        "json-deep": ("json", b'{"a": ' + deep + b"}", ("json",)),
        "json-objects": ("json", b'{"a":' * 150_000 + b"1" + b"}" * 150_000, ("json",)),
        "json-number": ("json", huge, ("json",)),
        "json-bytes": ("json", b'{"a": "' + b"x" * (2 << 20) + b'"}', ("too-many-bytes",)),
        "caption-bytes": ("txt", b"word " * (1 << 19), ("too-many-bytes",)),
        "caption-one-word": ("txt", b"x" * 1_000_000, ("",)),
        "caption-emoji": ("txt", "😀".encode() * 250_000, ("",)),
    }
    return found | members


def _chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width, height, raw, extra=b"", *, depth=8, colour=2):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + extra
        + _chunk(b"IDAT", zlib.compress(raw, 9))
        + _chunk(b"IEND", b"")
    )


def _text(kind, size, key=b"key"):
    head = b"\0\0" if kind == b"zTXt" else b"\0\x01\0\0\0"
    return _chunk(kind, key + head + zlib.compress(b"a" * size, 9))


def _encoded(form, **options):
    file = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(file, form, **options)
    return bytearray(file.getvalue())


def _jpeg(width, height, **options):
    data = _encoded("JPEG", **options)
    at = data.index(b"\xff\xc2" if options else b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _scans(count):
    """A progressive JPEG of 8,000 x 8,000 whose first scan comes `count` times."""
    data = _jpeg(8000, 8000, progressive=True)
    start = data.index(b"\xff\xda")
    scan = data[start : data.index(b"\xff", start + 12)]
    return data[:start] + scan * count + data[start:]


def _webp(lossless):
    data = _encoded("WEBP", lossless=lossless)
    if lossless:
        data[21:25] = (16_382 | 16_382 << 14).to_bytes(4, "little")
    else:
        data[26:30] = struct.pack("<2H", 16_383, 16_383)
    return bytes(data)


def _webp_canvas():
    data = _encoded("WEBP", save_all=True, append_images=[Image.new("RGBA", (16, 16), "red")])
    data[24:30] = (16_382).to_bytes(3, "little") * 2
    return bytes(data)


def _write(path, found, repeats):
    good = bytes(_encoded("PNG"))
    with tarfile.open(path, "w") as tar:
        for number in range(repeats):
            for name, (extension, data, _) in found.items():
                members = {"txt": b"a caption", "json": b'{"width": 16}'}
                members |= {} if extension in ("jpg", "png", "webp") else {"png": good}
                _add(tar, f"{name}-{number:03d}", members | {extension: data})
        _add_good(tar, good)
    with tarfile.open(path.with_name("good.tar"), "w") as tar:
        _add_good(tar, good)


def _add_good(tar, good):
    for number in range(GOOD):
        _add(tar, f"good-{number}", {"png": good, "txt": b"a caption"})


def _add(tar, key, members):
    for extension, data in members.items():
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def _mib(field):
    """VmRSS, the memory now, or VmHWM, its peak since `_forget_peak`."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def _forget_peak():
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def _child(folder, repeats):
    """Reads the good ones, then all; prints counts and by how much the memory's peak rose."""
    from unclip.input.decode.transforms import ImageText
    from unclip.input.shards.collection import open_shards
    from unclip.input.source import make_eval_source

    expected = json.loads((pathlib.Path(folder) / "reasons.json").read_text())
    transform = ImageText(16, 77, captions=("txt",))
    options = {"batch_size": 1, "threads": 1, "prefetch": 1, "max_attempts": 500}
    with make_eval_source(open_shards(f"{folder}/good.tar"), transform, **options) as batches:
        seen = sum(int(batch["valid"][0]) for batch in batches)
    before, wrong, slowest = _mib("VmRSS"), seen != GOOD, 0.0
    _forget_peak()
    collection = open_shards(f"{folder}/a.tar")
    refused = repeats * len(expected) + GOOD - len(collection)  # left out of the index
    wrong += collection.problems["too-many-bytes"] != refused
    with make_eval_source(collection, transform, **options) as batches:
        for g in range(len(collection)):
            start = time.monotonic()
            batch = next(batches)
            slowest = max(slowest, time.monotonic() - start)
            key = collection.key(g)
            own = [bad["reason"] for bad in batches.drain_bad() if bad["key"] == key]
            name = key.rpartition("-")[0]
            refused += name in expected
            wrong += (own[0] if own else "") not in expected.get(name, ("",))
            wrong += bool(batch["valid"][0]) == bool(own)
    mib = _mib("VmHWM") - before
    wrong += (mib > CAP_MIB) + (slowest > SECONDS_EACH)
    print(
        json.dumps(
            {
                "tried": repeats * len(expected),
                "refused": refused,
                "wrong": int(wrong),
                "mib": mib,
                "slowest": slowest,
            }
        )
    )


if __name__ == "__main__":
    _child(sys.argv[1], int(sys.argv[2]))
