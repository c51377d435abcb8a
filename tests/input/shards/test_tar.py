"""The header walk: never past the end, the same as tarfile where tarfile is right."""

import io
import random
import tarfile

import pytest

from unclip.input.shards import tar


def reader(data):
    def read(offset, size):
        assert offset >= 0 and offset + size <= len(data)
        return data[offset : offset + size]

    return read


def archive(members, form=tarfile.GNU_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as out:
        for info, data in members:
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return file.getvalue()


def test_headers_mean_what_they_mean_to_tarfile():
    """Mutated headers, checksum made good again: same type, name and size, or no plain header."""
    rng = random.Random(0)
    plain = 0
    for trial in range(2000):
        info = tarfile.TarInfo(f"folder/{trial:08d}.jpg")
        info.size = rng.randrange(1 << 30)
        block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(rng.randrange(3)):
            at = rng.choice([0, 5, 99, 124, 130, 134, 135, 156, 257, 345, 346, 499, 511])
            block[at] = rng.choice(b"\0 078/.x\xff\x80")
        if rng.random() < 0.8:
            block[148:156] = b" " * 8
            digits = f"{sum(block):06o}"
            block[148:156] = rng.choice([f"{digits}\0 ", f"0{digits}\0", f" {digits} "]).encode()
        try:
            expected = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            assert tar._plain(bytes(block)) is None
            continue
        found = tar._plain(bytes(block))
        if found is not None:
            plain += 1
            assert found == (expected.type, expected.name, expected.size)
    assert plain > 300


def test_the_end_is_told_and_the_walk_stays_below_it():
    data = archive([(tarfile.TarInfo("a.jpg"), b"x" * 700), (tarfile.TarInfo("b"), b"")])
    steps = list(tar.walk(reader(data), len(data)))
    assert steps == [("file", "a.jpg", 512, 700), ("file", "b", 2048, 0), ("end", "", 2048, 0)]
    for size in range(0, 2048, 64):
        steps = list(tar.walk(reader(data[:size]), size))
        assert steps[-1].kind == "shard-truncated"
        assert [s.kind for s in steps[:-1]] == ["cut"] * (512 <= size < 1212) + ["file"] * (
            size >= 1212
        )


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_longer_than_any_path_are_refused(form):
    long, short = "n" * 5000 + ".jpg", "n" * 3000 + ".jpg"
    data = archive([(tarfile.TarInfo(long), b"1"), (tarfile.TarInfo(short), b"2")], form)
    steps = list(tar.walk(reader(data), len(data)))
    assert [(s.kind, s.name) for s in steps[:-1]] == [("refused-name", long), ("file", short)]


def test_a_long_name_beyond_its_limit_ends_the_walk_unread():
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = b"L", 2 << 20
    data = info.tobuf(tarfile.GNU_FORMAT) + b"n" * (2 << 20) + b"\0" * 1024
    asked = []

    def read(offset, size):
        asked.append(size)
        return data[offset : offset + size]

    assert [s.kind for s in tar.walk(read, len(data))] == ["shard-corrupt"]
    assert max(asked) == 512
