"""Shards: whole samples or none, counted; nothing followed, extracted or run."""

import gzip
import io
import json
import os
import pickle
import tarfile
import threading

import pytest
import webdataset

from unclip.errors import DataError
from unclip.input.samples import BadSample
from unclip.input.shards import tar, walk
from unclip.input.shards.collection import open_shards
from unclip.input.storage import storage


def write(path, members, form=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def pair(key, tag):
    return [(f"{key}.jpg", f"picture {tag}".encode() * 60), (f"{key}.txt", f"text {tag}".encode())]


def test_reads_what_was_written(tmp_path):
    meta = {"caption": "from json", "group": "food"}
    path = write(
        tmp_path / "a.tar",
        [
            *pair("x/y.z/0001", "one"),
            ("0002.json", json.dumps(meta).encode()),
            ("0002.PNG", b"two"),
            ("README.md", b"no sample"),
            ("._0002.png", b"no sample"),
            ("LICENSE", b"no sample"),
        ],
    )
    collection = open_shards(path)
    assert len(collection) == 2 and not collection.problems
    assert collection.read(0) == ("x/y.z/0001", b"picture one" * 60, "text one", {})
    assert collection.read(1) == ("0002", b"two", "from json", meta)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_non_ascii_names(tmp_path, form):
    keys = ["d" * 120 + "/0001", "ключ/ü", "k" * 99]
    path = write(tmp_path / "a.tar", [m for k in keys for m in pair(k, k[:3])], form)
    collection = open_shards(path)
    assert [collection.key(i) for i in range(3)] == keys
    assert [collection.read(i).text for i in range(3)] == [f"text {k[:3]}" for k in keys]


def test_agrees_with_webdataset(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar"), mtime=0) as writer:
        for k in range(5):
            writer.write(
                {
                    "__key__": f"f/{k:03d}.a"[:-2],
                    "jpg": bytes([k]) * (600 * k + 1),
                    "txt": f"t{k}",
                    "json": {"k": k},
                }
            )
    theirs = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    ours = open_shards(str(tmp_path / "a.tar"))
    assert [(s["__key__"], s["jpg"], s["txt"].decode()) for s in theirs] == [
        tuple(ours.read(i))[:3] for i in range(len(ours))
    ]


def test_truncation_at_every_block(tmp_path):
    """Shard A is cut anywhere; shard B begins with A's keys. No key may meet another's caption."""
    keys = ["0000", "0001", "0002"]
    whole = write(tmp_path / "whole.tar", [m for k in keys for m in pair(k, "A" + k)])
    with tarfile.open(whole) as archive:
        ends = {m.name: m.offset_data + m.size for m in archive}
        starts = {m.name: m.offset_data for m in archive}
        last = max(-(-end // 512) * 512 for end in ends.values())
    data = (tmp_path / "whole.tar").read_bytes()
    write(tmp_path / "b.tar", [m for k in keys for m in pair(k, "B" + k)])
    for size in [*range(0, len(data) + 1, 512), ends["0001.txt"], ends["0001.txt"] - 1, 100]:
        (tmp_path / "a.tar").write_bytes(data[:size])
        collection = open_shards([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")])
        complete = [k for k in keys if ends[f"{k}.txt"] <= size and ends[f"{k}.jpg"] <= size]
        samples = [collection.read(i) for i in range(len(collection))]
        assert [s.key for s in samples] == complete + keys
        tags = ["A" + k for k in complete] + ["B" + k for k in keys]
        assert [s.text for s in samples] == [f"text {t}" for t in tags]
        assert [s.image for s in samples] == [f"picture {t}".encode() * 60 for t in tags]
        cut = sum(starts[n] <= size < ends[n] for n in ends)
        no_text = sum(ends[f"{k}.jpg"] <= size < starts[f"{k}.txt"] for k in keys)
        expected = {"shard-truncated": int(size < last + 512), "truncated": cut, "no-text": no_text}
        assert collection.problems == {k: n for k, n in expected.items() if n}, size


def test_incomplete_ambiguous_and_large_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "MAX_PICTURE_BYTES", 2000)
    path = write(
        tmp_path / "a.tar",
        [
            *pair("good", "g"),
            ("lonely.jpg", b"j"),
            ("silent.txt", b"t"),
            ("empty.jpg", b""),
            ("empty.txt", b"t"),
            *pair("twice", "1"),
            *pair("twice", "2"),
            ("big.jpg", b"j" * 2001),
            ("big.txt", b"t"),
            ("blank.jpg", b"j"),
            ("blank.json", b'{"caption": " "}'),
            ("odd.jpg", b"j"),
            ("odd.json", b"[1"),
            ("late.txt", b"late"),
            ("x.jpg", b"x"),
            ("x.txt", b"x"),
            ("late.jpg", b"picture"),
        ],
    )
    collection = open_shards(path)
    assert [collection.key(i) for i in range(len(collection))] == ["good", "late", "x"]
    assert collection.read(1).text == "late"
    assert collection.problems == {
        "no-text": 3,
        "no-picture": 2,
        "duplicate": 1,
        "too-many-bytes": 1,
    }
    assert collection.examples["duplicate"] == ["a.tar: twice"]
    assert len(open_shards(path, text=False)) == 6


def test_links_and_escaping_names_are_refused(tmp_path):
    outside = tmp_path / "secret.txt"
    outside.write_text("secret")
    link, hard = tarfile.TarInfo("l.txt"), tarfile.TarInfo("h.txt")
    link.type, link.linkname = tarfile.SYMTYPE, str(outside)
    hard.type, hard.linkname = tarfile.LNKTYPE, "good.txt"
    fifo = tarfile.TarInfo("f.txt")
    fifo.type = tarfile.FIFOTYPE
    path = write(
        tmp_path / "a.tar",
        [
            *pair("good", "g"),
            ("l.jpg", b"j"),
            (link, b""),
            ("h.jpg", b"j"),
            (hard, b""),
            ("f.jpg", b"j"),
            (fifo, b""),
            *pair("../up", "u"),
            *pair("/etc/abs", "a"),
            *pair("a/../../up", "u"),
        ],
    )
    before = sorted(os.listdir(tmp_path))
    collection = open_shards(path)
    assert [collection.key(i) for i in range(len(collection))] == ["good"]
    assert collection.problems == {
        "refused-link": 2,
        "refused-type": 1,
        "refused-name": 6,
        "no-text": 3,
    }
    assert sorted(os.listdir(tmp_path)) == before


def test_not_a_shard(tmp_path):
    (tmp_path / "page.tar").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "zip.tar").write_bytes(gzip.compress(os.urandom(4096)))
    with pytest.raises(DataError, match="not a tar file"):
        open_shards(str(tmp_path / "page.tar"))
    with pytest.raises(DataError, match="compressed"):
        open_shards(str(tmp_path / "zip.tar"))
    with pytest.raises(DataError, match="2 pictures and no captions"):
        open_shards(write(tmp_path / "p.tar", [("a.jpg", b"a"), ("b.jpg", b"b")]))
    with pytest.raises(DataError, match=r"no complete sample.*no-picture 1"):
        open_shards(write(tmp_path / "t.tar", [("a.txt", b"a")]))
    with pytest.raises(
        DataError, match=r"dotted-key 1 \(d\.tar: a\.0 \(v2\)\.jpg\), ignored \.xyz 2"
    ):
        open_shards(
            write(tmp_path / "d.tar", [("a.0 (v2).jpg", b"a"), ("b.xyz", b"b"), ("c.xyz", b"c")])
        )


def test_damaged_headers_never_crash(tmp_path):
    """Every byte of a header flipped, and sizes beyond the file: counted, never read past."""
    path = write(tmp_path / "a.tar", pair("0000", "A") + pair("0001", "B"), tarfile.PAX_FORMAT)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    second = data.index(b"0000.txt")
    for at in set(range(512)) - {154, 155}:  # these two end the checksum's digits: no damage
        damaged = data.copy()
        damaged[second + at] ^= 0xFF
        (tmp_path / "a.tar").write_bytes(damaged)
        with pytest.raises(DataError, match=r"no complete sample.*shard-corrupt 1"):
            open_shards(path)
    info = tarfile.TarInfo("0001.jpg")
    info.size = 1 << 80
    first = data[: data.index(b"0001.jpg")]
    (tmp_path / "a.tar").write_bytes(first + info.tobuf(tarfile.GNU_FORMAT))
    with open(path, "rb") as file:

        def read(offset, size):
            assert offset + size <= os.path.getsize(path)
            return os.pread(file.fileno(), size, offset)

        steps = list(tar.walk(read, os.path.getsize(path)))
    assert [s.kind for s in steps] == ["file", "file", "cut", "shard-truncated"]
    collection = open_shards(path)
    assert collection.problems == {"shard-truncated": 1, "truncated": 1} and len(collection) == 1


def test_subset_and_fingerprint(tmp_path):
    members = []
    for k, group in enumerate(["food", "faces", "food", "animals"]):
        members += [*pair(f"{k}", k), (f"{k}.json", json.dumps({"group": group}).encode())]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    whole = open_shards(write(tmp_path / "one" / "a.tar", members))
    moved = open_shards(write(tmp_path / "two" / "a.tar", members))
    other = open_shards(write(tmp_path / "two" / "b.tar", members[:-3]))
    assert whole.fingerprint == moved.fingerprint != other.fingerprint

    def keys(c):
        return [c.read(i).key for i in range(len(c))]

    food = whole.subset(where={"group": "food"})
    assert keys(food) == ["0", "2"] and food.read(1).text == "text 2"
    assert keys(whole.subset(where={"group": ["food", "animals"]}, count=2)) == ["0", "2"]
    assert keys(whole.subset(keys=["3", "1"])) == ["1", "3"]
    assert keys(whole.subset(count=3)) == ["0", "1", "2"]
    assert len({whole.fingerprint, food.fingerprint, whole.subset(count=3).fingerprint}) == 3
    with pytest.raises(DataError, match="'animals'"):
        whole.subset(where={"group": "cars"})
    with pytest.raises(DataError, match="no sample has the key '9'"):
        whole.subset(keys=["9"])
    with pytest.raises(DataError, match="empty"):
        whole.subset(count=0)


def test_bad_text_is_the_samples_fault_and_a_changed_shard_is_not(tmp_path):
    path = write(
        tmp_path / "a.tar",
        [
            ("0.jpg", b"j"),
            ("0.txt", b"\xff\xfe"),
            ("1.jpg", b"j"),
            ("1.txt", b"t"),
            ("1.json", b"[" * 100_000),
            *pair("2", "2"),
        ],
    )
    collection = open_shards(path)
    for i, reason in enumerate(["encoding", "json"]):
        with pytest.raises(BadSample) as error:
            collection.read(i)
        assert pickle.loads(pickle.dumps(error.value)).reason == reason
    with open(path, "ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match="has changed") as changed:
        pickle.loads(pickle.dumps(collection)).read(2)
    assert not isinstance(changed.value, BadSample)


def test_threads_share_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_OPEN_FILES", 2)
    paths = [write(tmp_path / f"{k}.tar", pair("k", k)) for k in range(8)]
    collection = open_shards(paths)
    right = []

    def reader(shift):
        for n in range(400):
            k = (n * 3 + shift) % 8
            right.append(collection.read(k).text == f"text {k}")

    threads = [threading.Thread(target=reader, args=(k,)) for k in range(4)]
    opened = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 1600 and all(right)
    if opened:
        assert len(os.listdir("/proc/self/fd")) <= opened + 2
