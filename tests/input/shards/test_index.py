"""The index: mapped and walked are the same, damage and staleness are reported."""

import io
import json
import os
import pathlib
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter

import numpy as np
import pytest

from unclip.errors import ConfigError, DataError
from unclip.input import captions, samples
from unclip.input.samples import BadSample
from unclip.input.shards import collection as shards
from unclip.input.shards import folder as index_folder
from unclip.input.shards import walk
from unclip.input.shards.collection import open_shards
from unclip.input.shards.index import ShardIndex
from unclip.input.storage.storage import Storage


def write(path, members, form=tarfile.GNU_FORMAT):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def sample(key, *, text=True, meta=None):
    members = [(f"{key}.jpg", f"picture {key}".encode() * 60)]
    members += [(f"{key}.txt", f"text {key}".encode())] * text
    return members + [(f"{key}.json", json.dumps(meta).encode())] * (meta is not None)


def walked(path, **options):
    return index_folder.walk_path(path, Storage(), **options)


@pytest.fixture
def folder(tmp_path):
    """Three shards of 4, 0 and 3 captioned samples, with faults."""
    write(
        tmp_path / "a.tar",
        [
            *sample("d/0"),
            *sample("d/1", text=False),
            *sample("d/2", text=False, meta={"caption": "c"}),
            *sample("ключ"),
            ("twice.jpg", b"1"),
            ("twice.jpg", b"2"),
            ("x.pkl", b"p"),
            *sample("d/3", meta={"n": 1}),
        ],
    )
    write(tmp_path / "b.tar", [("no.txt", b"picture")])
    write(tmp_path / "c.tar", [m for k in range(3) for m in sample(f"{k}")])
    return tmp_path


def contents(collection):
    return [collection.read(i) for i in range(len(collection))]


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("text", [False, True])
def test_walked_and_mapped_are_the_same_collection(folder, text, checksums):
    plain = open_shards(str(folder / "*.tar"), text=text)
    summary = index_folder.index_folder(
        str(folder / "*.tar"), folder / "index", checksums=checksums, jobs=1
    )
    assert summary[:5] == (3, 8, 7, 3, 0)
    assert summary.problems == {
        "duplicate": 1,
        "refused-pickle": 1,
        "no-picture": 1,
        "no-text": 1,
    }
    beside, whole = (
        open_shards(str(folder / "*.tar"), text=text),
        open_shards(str(folder / "index"), text=text),
    )
    keys = ["d/0", "d/2", "ключ", "d/3", *([] if text else ["d/1"]), "0", "1", "2"]
    for collection in (plain, beside, whole, pickle.loads(pickle.dumps(whole))):
        assert [collection.key(i) for i in range(len(collection))] == keys
        assert collection.fingerprint == plain.fingerprint
        assert contents(collection) == contents(plain)
        left_out = {k: n for k, n in summary.problems.items() if text or k != "no-text"}
        assert collection.problems == left_out
        assert collection.examples == plain.examples
        assert collection.counts.tolist() == [4 + (not text), 0, 3]
        assert collection.shard_names == ("a.tar", "b.tar", "c.tar")
    assert plain.examples["refused-pickle"] == ["a.tar: x.pkl"]
    assert plain.examples.get("no-text") == (["a.tar: d/1"] if text else None)
    assert [whole.locate(i) for i in (0, 3, len(keys) - 3)] == [(0, 0), (0, 3), (2, 0)]
    assert [whole.shard_digest(s) for s in range(3)] == [plain.shard_digest(s) for s in range(3)]
    for wrong in (-1, len(whole)):
        with pytest.raises(IndexError):
            whole.locate(wrong)
    listed = [json.loads(line) for line in (folder / "index" / "problems.jsonl").open()]
    assert [(e["reason"], e["what"]) for e in listed] == [
        ("refused-pickle", "x.pkl"),
        ("duplicate", "twice"),
        ("no-text", "d/1"),
        ("no-picture", "no"),
    ]
    assert summary.examples["no-text"] == ["a.tar: d/1"]


def test_the_digest_names_the_samples_not_the_place(folder):
    here = walked(str(folder / "c.tar"))
    (folder / "other").mkdir()
    moved = folder / "other" / "c.tar"
    moved.write_bytes((folder / "c.tar").read_bytes())
    assert walked(str(moved), checksums=True).digest == here.digest
    os.rename(moved, folder / "other" / "e.tar")
    assert walked(str(folder / "other" / "e.tar")).digest != here.digest
    write(moved, [m for k in range(3) for m in sample(f"{k + 1}")])
    assert os.path.getsize(moved) == os.path.getsize(folder / "c.tar")
    assert walked(str(moved)).digest != here.digest


def test_parts_of_different_samples_and_surprises(tmp_path):
    path = write(
        tmp_path / "a.tar",
        [
            *sample("f/1", meta={"key": "1"}),
            *sample("2", meta={"key": "3"}),
            *sample("3", meta={"key": "3"}),
            ("5.jpg", b"p"),
            ("4.jpg", b"p"),
            ("4.txt", b"t"),
            ("5.txt", b"t"),
            ("4.cls", b"7"),
            ("5.tokens.pt", b"z"),
            ("6.PICKLE", b"z"),
        ],
    )
    with open(path, "ab") as file:
        file.write((tmp_path / "a.tar").read_bytes())
    index = walked(path)
    assert [index.key(r) for r in range(len(index))] == ["f/1", "3", "5", "4"]
    assert index.problems == {"other-key": 1, "refused-pickle": 2}
    assert index.notes == {"not-adjacent": 2, "ignored .cls": 1, "bytes-after-end": 1}


def test_collections_that_were_numbered_anew_are_whole(tmp_path):
    """Filtered, filtered near the end, shuffled, cropped, repeated, other numbers: JSON keeps its
    key."""
    kept = [k for k in range(40) if k % 3]
    renumbered = {
        "filtered": kept,
        "late": [*range(18), *range(20, 30)],
        "shuffled": [(7 * k + 3) % 25 for k in range(25)],
        "cropped": [k // 4 for k in range(24)],
        "repeated": [*range(12), *range(12)],
        "merged": [*range(15), *range(9)],
        "elsewhere": [k + 1000 for k in range(9)],
    }
    for name, keys in renumbered.items():
        members = [
            m for k, key in enumerate(keys) for m in sample(f"{k:05d}", meta={"key": f"{key:05d}"})
        ]
        index = walked(write(tmp_path / f"{name}.tar", members))
        assert (index.captioned, index.problems) == (len(keys), {}), name
        assert index.notes == {"renumbered": sum(k != key for k, key in enumerate(keys))}, name


def test_every_sample_that_is_left_out_is_counted_and_listed_alike(tmp_path):
    members = [
        *sample("good"),
        *sample("silent", text=False),
        ("blank.jpg", b"p"),
        ("blank.txt", b""),
        ("page0.0 (v2).json", b"{}"),
        ("page0.0 (v2).png", b"p"),
        ("img.0001.jpg", b"p"),
        ("img.0001.txt", b"t"),
        ("img.0002.jpg", b"p"),
        ("s/2.jpg.part", b"p"),
        ("s/2.txt", b"t"),
        ("s/3.AVIF", b"p"),
        ("s/4.gif", b"p"),
        ("s/4.txt", b"t"),
        ("s/5.mp4", b"v"),
        ("s/5.txt", b"t"),
        ("s/7.part.mp4", b"v"),
        ("s/8.xyz", b"v"),  # noticed, but it may be anything
        ("s/6.txt", b"t"),
        ("good.seg.png", b"p"),  # these are nobody's samples
        ("good.cls", b"1"),
        ("README.md", b"m"),
        ("LICENSE", b"l"),
        ("._good.jpg", b"h"),
        ("__MACOSX/._good.jpg", b"h"),
        (".ipynb_checkpoints/good-checkpoint.jpg", b"h"),
    ]
    write(tmp_path / "a.tar", members)
    for name in ("b.tar.part", "c.tar.gz", "a.tar.gz", "a.tar.md5", "notes.part"):
        (tmp_path / name).write_bytes(b"x")
    expected = {
        ("no-text", "silent"),
        ("no-text", "blank"),
        ("dotted-key", "page0.0 (v2).png"),
        ("dotted-key", "img.0001.jpg"),
        ("dotted-key", "img.0002.jpg"),
        ("unknown-extension", "s/2.jpg.part"),
        ("unknown-extension", "s/3.AVIF"),
        ("unknown-extension", "s/4.gif"),
        ("unknown-extension", "s/5.mp4"),
        ("unknown-extension", "s/7.part.mp4"),
        ("no-picture", "s/6"),
        ("unfinished-shard", "b.tar.part"),
        ("compressed", "c.tar.gz"),
    }
    counts = Counter(reason for reason, _ in expected)
    plain = open_shards(str(tmp_path / "*.tar"))
    summary = index_folder.index_folder(str(tmp_path / "*.tar"), tmp_path / "index", jobs=1)
    assert summary.problems == counts and summary.notes["hidden"] == 3
    listed = [json.loads(line) for line in (tmp_path / "index" / "problems.jsonl").open()]
    assert {(row["reason"], row["what"]) for row in listed} == expected and len(listed) == 13
    beside, whole = (open_shards(str(tmp_path / name)) for name in ("*.tar", "index"))
    for collection in (plain, beside, whole, pickle.loads(pickle.dumps(whole)).subset(count=1)):
        assert [collection.key(i) for i in range(len(collection))] == ["good"]
        assert collection.problems == counts
        named = {(r, e) for r, examples in collection.examples.items() for e in examples}
        assert {(reason, what.removeprefix("a.tar: ")) for reason, what in named} == expected


def test_captions_are_where_the_sources_say(tmp_path):
    """Without any KEY.txt; a walk and an index find the same samples, and read the same texts."""
    texts = {"a": "one", "b": ["two", "zwei"], "c": ["", " "], "d": 5, "e": None, "f": [3, "three"]}
    members = [m for k, t in texts.items() for m in sample(k, text=False, meta={"TEXT": t, "n": k})]
    pattern = write(tmp_path / "a.tar", [*members, *sample("g", text=False)])
    with pytest.raises(DataError, match=r"7 pictures and no captions: .*'json:TEXT', 'json:n'"):
        open_shards(pattern)
    walked_here = open_shards(pattern, captions=("json:TEXT",))
    index_folder.index_folder(pattern, tmp_path / "index", captions=("txt", "json:TEXT"), jobs=1)
    for name in ("a.tar", "index"):
        for sources in (("json:TEXT",), ("json:TEXT", "txt")):
            found = open_shards(str(tmp_path / name), captions=sources)
            assert [found.key(i) for i in range(len(found))] == ["a", "b", "f"]
            assert found.problems == {"no-text": 4}
            assert found.fingerprint == walked_here.fingerprint
            assert [captions.first(found.read(i), sources) for i in range(3)] == [
                "one",
                "two",
                "three",
            ]
    with pytest.raises(
        ConfigError, match=r"from txt,json:TEXT and.*from json:n.*--captions json:n"
    ):
        open_shards(str(tmp_path / "index"), captions=("json:n",))
    # The index beside the shards says nothing of this source, so they are walked.
    assert len(open_shards(pattern, captions=("json:n",))) == 6


def test_an_index_serves_other_sources_only_where_they_give_the_same_samples(tmp_path):
    write(tmp_path / "a.tar", [*sample("0", meta={"x": "x"}), *sample("1", meta={"x": "y"})])
    write(tmp_path / "b.tar", [*sample("2"), *sample("3", text=False, meta={"x": "z"})])
    for name in ("a", "b"):
        pattern, out = str(tmp_path / f"{name}.tar"), tmp_path / f"of-{name}"
        index_folder.index_folder(pattern, out, captions=("txt", "json:x"), jobs=1)
    for sources in (("json:x",), ("txt",), ("txt", "json:x", "json:new"), ("json:x", "json:new")):
        assert len(open_shards(str(tmp_path / "of-a"), captions=sources)) == 2
    assert len(open_shards(str(tmp_path / "of-b"), captions=("json:new", "txt", "json:x"))) == 2
    for sources in (("json:x",), ("txt",), ("json:new",)):
        with pytest.raises(ConfigError, match="does not tell which samples of 1 of its 1 shards"):
            open_shards(str(tmp_path / "of-b"), captions=sources)


def test_the_index_of_an_older_unclip_is_read_as_it_was_meant(folder):
    """It looked for KEY.txt and one field in its place, and for no other source."""
    out = folder / "index"
    index_folder.index_folder(str(folder / "*.tar"), out, captions=("txt",), jobs=1)
    now = open_shards(str(out), captions=("txt",))
    table = json.loads((out / "index.json").read_text()) | {"caption": "caption"}
    for shard in table["shards"]:
        del shard["captions"]
    del table["captions"], table["unread"]
    (out / "index.json").write_text(json.dumps(table))
    for sources in (("txt",), captions.STANDARD):
        then = open_shards(str(out), captions=sources)
        assert (then.fingerprint, then.problems) == (now.fingerprint, now.problems)
        assert contents(then) == contents(now)
    with pytest.raises(ConfigError, match=r"from txt and.*from json:x"):
        open_shards(str(out), captions=("json:x",))
    (out / "index.json").write_text(json.dumps(table | {"caption": "alt"}))
    assert len(open_shards(str(out), captions=("json:alt", "txt"))) == len(now)
    with pytest.raises(ConfigError, match="from txt,json:alt and"):
        open_shards(str(out))


def test_indices_of_different_sets_lie_side_by_side(tmp_path):
    def index(pattern):
        out = index_folder.place_for(str(tmp_path / pattern), Storage())
        index_folder.index_folder(str(tmp_path / pattern), out, jobs=1)
        return os.path.basename(out)

    def shards_of(name):
        return [entry.name for entry in index_folder.read_index(str(tmp_path / name)).shards]

    for name in ("train-00", "train-01", "held-out-00", "00000", "00001"):
        write(tmp_path / f"{name}.tar", sample(name))
    assert index("train-*.tar") == "index" and index("held-out-*.tar") == "index-held-out"
    assert index("0000*.tar") == "index-shards" and index("train-*.tar") == "index"
    assert index("held-out-*.tar") == "index-held-out"
    write(tmp_path / "train-02.tar", sample("train-02"))  # a set that has grown
    assert index("train-*.tar") == "index"
    assert shards_of("index") == ["train-00.tar", "train-01.tar", "train-02.tar"]
    assert index("train-01.tar") == "index-train" and len(shards_of("index")) == 3
    assert index("*.tar") == "index-shards-2"  # not one set that has grown, but all of them
    assert shards_of("index-shards") == ["00000.tar", "00001.tar"]
    assert shards_of("index-held-out") == ["held-out-00.tar"]
    with pytest.raises(ConfigError, match=r"index of 3 other shards.*train-00\.tar.*another --out"):
        index_folder.index_folder(str(tmp_path / "held-out-00.tar"), tmp_path / "index", jobs=1)
    assert len(shards_of("index")) == 3
    (tmp_path / "index" / "index.json").write_text("{")  # damaged: it is written anew
    assert index("train-*.tar") == "index" and len(shards_of("index")) == 3
    for name in ("train-00.tar", "train-01.tar", "train-02.tar"):
        (tmp_path / name).unlink()
    assert index("held-out-*.tar") == "index-held-out"


def test_shards_are_opened_by_any_index_beside_them(folder, monkeypatch):
    expected = open_shards(str(folder / "*.tar"))
    for name in ("a", "b", "c"):
        pattern = str(folder / f"{name}.tar")
        out = index_folder.place_for(pattern, Storage())
        index_folder.index_folder(pattern, out, jobs=1)
    assert {path.name for path in folder.glob("index*")} == {"index", "index-b", "index-c"}
    monkeypatch.setattr(index_folder, "walk_path", None)
    found = open_shards(str(folder / "*.tar"))
    assert found.fingerprint == expected.fingerprint and contents(found) == contents(expected)


def test_changed_bytes_are_noticed(folder):
    index_folder.index_folder(str(folder / "*.tar"), folder / "index", jobs=1)
    index_folder.index_folder(str(folder / "*.tar"), folder / "plain", jobs=1, checksums=False)
    assert index_folder.check_index(str(folder / "index"), jobs=1) == []
    data = bytearray((folder / "c.tar").read_bytes())
    data[data.index(b"picture 1")] ^= 1
    (folder / "c.tar").write_bytes(data)
    checked, unchecked = (open_shards(str(folder / name)) for name in ("index", "plain"))
    assert checked.read(4) == unchecked.read(4) and unchecked.read(5).image[:1] == b"q"
    with pytest.raises(BadSample) as error:
        checked.read(5)
    assert error.value.reason == "checksum"
    found = index_folder.check_index(str(folder / "index"), jobs=1)
    assert found == [("c.tar", "the bytes of 1 samples have changed")]
    data[data.index(b"2.txt") :][:5] = b"9.txt"
    (folder / "a.tar").write_bytes(data)
    found = dict(index_folder.check_index(str(folder / "plain"), jobs=1))
    assert found.keys() == {"a.tar"} and "another size" in found["a.tar"]


def test_a_changed_shard_is_walked_again_or_refused(folder):
    pattern = str(folder / "*.tar")
    index_folder.index_folder(pattern, folder / "index", jobs=1)
    write(folder / "c.tar", [m for k in range(9) for m in sample(f"{k}")])
    assert len(open_shards(pattern)) == 4 + 9  # beside: a, b by the index, c walked
    with pytest.raises(DataError, match=r"c\.tar' has changed since it was indexed"):
        open_shards(str(folder / "index"))
    (folder / "c.tar").unlink()
    with pytest.raises(DataError, match=r"c\.tar"):
        open_shards(str(folder / "index"))


def test_a_second_run_reads_only_what_is_new(folder, monkeypatch):
    pattern, out = str(folder / "*.tar"), folder / "index"
    index_folder.index_folder(pattern, out, jobs=1, checksums=False)
    seen = []
    real = index_folder.walk_path
    monkeypatch.setattr(
        index_folder,
        "walk_path",
        lambda path, *args, **options: (
            seen.append(os.path.basename(path)),
            real(path, *args, **options),
        )[1],
    )

    def run(**options):
        seen.clear()
        index_folder.index_folder(pattern, out, jobs=1, **options)
        return list(seen)

    assert run(checksums=False) == []
    assert run() == ["a.tar", "b.tar", "c.tar"]  # now with checksums
    assert run(checksums=False) == []
    write(folder / "d.tar", sample("d"))
    assert run() == ["d.tar"]
    (out / "b.idx").write_bytes(b"unclip")
    os.utime(folder / "d.tar", (2**31, 2**31))  # written after its index
    assert run() == ["b.tar", "d.tar"]
    assert run(captions=["json:alt"]) == ["a.tar", "b.tar", "c.tar", "d.tar"]
    with pytest.raises(ConfigError, match=r"from json:alt and.* of 3 of its 4 .*--captions txt,"):
        open_shards(str(out))
    assert run(captions=["json:alt"]) == ["d.tar"]
    assert run(captions=["json:alt"], force=True) == ["a.tar", "b.tar", "c.tar", "d.tar"]


def test_processes_make_the_same_files(folder):
    pattern = str(folder / "*.tar")
    index_folder.index_folder(pattern, folder / "one", jobs=1)
    counted = []

    class Bar:
        def update(self):
            counted.append(1)

        def close(self):
            counted.append("closed")

    index_folder.index_folder(
        pattern, folder / "two", jobs=2, progress=lambda total: counted.append(total) or Bar()
    )
    assert counted == [3, 1, 1, 1, "closed"]
    for name in ("a.idx", "b.idx", "c.idx", "problems.jsonl", "index.json"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()


class KilledStorage(Storage):
    """Kills the process that reads a.tar, as the system does when memory runs out."""

    def read(self, path, *args, **options):
        if path.endswith("a.tar"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(path, *args, **options)


def test_a_killed_process_is_an_error_and_the_next_run_goes_on(folder):
    out = folder / "index"
    index_folder.index_folder(str(folder / "c.tar"), out, jobs=1)
    (out / "index.json").unlink()
    with pytest.raises(DataError, match="indexing process was killed"):
        index_folder.index_folder(str(folder / "*.tar"), out, jobs=2, storage=KilledStorage())
    assert not (out / "index.json").exists()
    summary = index_folder.index_folder(str(folder / "*.tar"), out, jobs=1)
    assert summary.kept >= 1 and summary.walked + summary.kept == 3
    assert len(open_shards(str(out))) == 7


def test_faults_are_listed_up_to_a_limit_and_all_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "MAX_LISTED", 3)
    write(tmp_path / "a.tar", [*sample("0"), *[(f"{k}\x1b[31m.txt", b"t") for k in range(1, 9)]])
    summary = index_folder.index_folder(str(tmp_path / "a.tar"), tmp_path / "index", jobs=1)
    assert summary.problems == {"no-picture": 8}
    lines = [json.loads(line) for line in (tmp_path / "index" / "problems.jsonl").open()]
    assert [line["what"] for line in lines] == ["1?[31m", "2?[31m", "3?[31m", "… and 5 more"]


def test_unreadable_shards_are_named_and_the_others_kept(folder, monkeypatch):
    real = Storage.read

    def read(self, path, *args, **options):
        if path.endswith("b.tar"):
            raise DataError("shard b.tar: input/output error")
        return real(self, path, *args, **options)

    monkeypatch.setattr(Storage, "read", read)
    with pytest.raises(DataError, match=r"1 of 3 shards cannot be indexed.*b\.tar"):
        index_folder.index_folder(str(folder / "*.tar"), folder / "index", jobs=1)
    assert sorted(os.listdir(folder / "index")) == ["a.idx", "c.idx"]
    monkeypatch.undo()
    summary = index_folder.index_folder(str(folder / "*.tar"), folder / "index", jobs=1)
    assert (summary.walked, summary.kept) == (1, 2)


def test_shards_of_one_name_and_shards_that_are_none(folder):
    (folder / "x").mkdir()
    (folder / "x" / "c.tar").write_bytes((folder / "c.tar").read_bytes())
    (folder / "page.tar").write_bytes(b"<html>" * 1000)
    (folder / "x" / "zip.tar").write_bytes(b"\x1f\x8b" + b"z" * 1000)
    patterns = [str(folder / "c.tar"), str(folder / "x" / "*.tar"), str(folder / "page.tar")]
    summary = index_folder.index_folder(patterns, folder / "index", jobs=1)
    assert summary.problems == {"compressed": 1, "not-a-tar": 1} and summary.samples == 6
    names = {p.name for p in (folder / "index").glob("c-????????.idx")}
    assert len(names) == 2
    collection = open_shards(str(folder / "index"))
    assert len(collection) == 6 and collection.shards[0] != collection.shards[1]
    assert [collection.read(i).text for i in (0, 3)] == ["text 0"] * 2


def test_img2dataset_statistics_are_compared(folder):
    (folder / "a_stats.json").write_text(json.dumps({"count": 9, "successes": 5}))
    (folder / "b_stats.json").write_text("{")
    (folder / "c_stats.json").write_text(json.dumps({"count": 9, "successes": 4}))
    summary = index_folder.index_folder(str(folder / "*.tar"), folder / "index", jobs=1)
    assert summary.differences == [("c.tar", 4, 3)]


def test_damaged_index_files_are_refused_in_a_line(folder, tmp_path):
    path = tmp_path / "c.idx"
    walked(str(folder / "c.tar"), checksums=True).write(path)
    data = path.read_bytes()
    ShardIndex.open(path)
    damages = [b"", data[:100], data[:-1], data + b"\0", b"\0" * len(data)]
    for at in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[at] ^= 0x10
        damages.append(bytes(flipped))
    for damaged in damages:
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="index the shards again"):
            ShardIndex.open(path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        ShardIndex.open(path)


def test_spans_beyond_the_shard_are_refused(folder, tmp_path):
    index = walked(str(folder / "c.tar"))
    table = index.table.copy()
    table[1, 0] = 1 << 31
    forged = ShardIndex(index.name, index.size, table, index.keys, index.captioned)
    forged.write(tmp_path / "f.idx")
    with pytest.raises(DataError, match="beyond the shard's end"):
        ShardIndex.open(tmp_path / "f.idx").spans(1)


def test_a_table_of_shards_that_is_damaged_or_of_another_run(folder):
    out = folder / "index"
    index_folder.index_folder(str(folder / "*.tar"), out, jobs=1)
    table = json.loads((out / "index.json").read_text())

    def opening(**changes):
        first = {**table["shards"][0], **changes.pop("first", {})}
        (out / "index.json").write_text(
            json.dumps({**table, "shards": [first, *table["shards"][1:]], **changes})
        )
        return open_shards(str(out))

    for wrong in (
        {"file": "../a.idx"},
        {"file": "a.tar"},
        {"samples": -1},
        {"size": "1"},
        {"digest": "0"},
        {"problems": []},
        {"path": None},
        {"captioned": 99},
    ):
        with pytest.raises(DataError, match="damaged"):
            opening(first=wrong)
    with pytest.raises(DataError, match="version 2"):
        opening(version=2)
    with pytest.raises(DataError, match="not written by `unclip index`"):
        opening(format="other")
    with pytest.raises(DataError, match="not the one that"):
        opening(first={"digest": "0" * 64}).read(0)
    (out / "index.json").write_text("[")
    with pytest.raises(DataError, match="not JSON"):
        open_shards(str(out))


def test_more_mapped_shards_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_MAPPED", 2)
    paths = [write(tmp_path / f"{k}.tar", sample(f"k{k}")) for k in range(6)]
    index_folder.index_folder(paths, tmp_path / "index", jobs=1)
    collection = open_shards(str(tmp_path / "index"))
    opened = len(os.listdir("/proc/self/fd"))
    for n in range(60):
        assert collection.key(n * 5 % 6) == f"k{n * 5 % 6}"
    assert len(collection._mapped) == 2
    assert len(os.listdir("/proc/self/fd")) <= opened + 3


def test_groups_subsets_and_counts(tmp_path):
    for k in range(4):
        write(
            tmp_path / f"{k}.tar",
            [m for n in range(k + 1) for m in sample(f"{k}-{n}", meta={"even": n % 2 == 0})],
        )
    patterns = [str(tmp_path / "{2,3}.tar"), str(tmp_path / "*.tar")]
    collection = open_shards(patterns)
    assert collection.groups.tolist() == [0, 7, 10]  # a shard belongs to the first that names it
    assert collection.counts.tolist() == [3, 4, 1, 2]
    assert collection.groups.dtype == collection.counts.dtype == np.int64
    index_folder.index_folder(patterns[0], tmp_path / "three", jobs=1)
    mixed = open_shards([str(tmp_path / "three"), patterns[1]])
    assert mixed.groups.tolist() == [0, 7, 10] and mixed.fingerprint == collection.fingerprint
    with pytest.raises(ConfigError, match="no shards given"):
        open_shards([])
    first = collection.subset(count=8)
    assert first.groups.tolist() == [0, 7, 8] and first.counts.tolist() == [3, 4, 1, 0]
    even = collection.subset(where={"even": True})
    assert even.counts.tolist() == [2, 2, 1, 1] and even.groups.tolist() == [0, 4, 6]
    keys = ["2-0", "2-2", "3-0", "3-2", "0-0", "1-0"]
    assert [even.key(i) for i in range(6)] == keys
    assert [even.locate(i) for i in range(6)] == [(0, 0), (0, 2), (1, 0), (1, 2), (2, 0), (3, 0)]
    again = pickle.loads(pickle.dumps(even.subset(count=3)))
    assert [s.key for s in contents(again)] == keys[:3] and again.counts.tolist() == [2, 1, 0, 0]
    # The same samples have the same fingerprint, however they were chosen.
    by_key = collection.subset(keys=[collection.key(i) for i in range(8)])
    assert by_key.fingerprint == first.fingerprint
    assert collection.subset(keys=keys[:3]).fingerprint == again.fingerprint
    assert collection.subset(count=10).fingerprint == collection.fingerprint
    assert first.subset(keys=keys[:3]).fingerprint == again.fingerprint


def test_a_filter_passes_no_broken_json(tmp_path):
    path = write(
        tmp_path / "a.tar",
        [*sample("0", meta={"g": 1}), *sample("1"), ("1.json", b"{"), *sample("2", meta={"g": 1})],
    )
    found = open_shards(path).subset(where={"g": 1})
    assert [s.key for s in contents(found)] == ["0", "2"] and found.problems == {"json": 1}


def test_members_far_apart_are_read_one_by_one(tmp_path):
    path = write(
        tmp_path / "a.tar",
        [("0.jpg", b"first"), ("1.jpg", b"x" * 200_000), ("1.txt", b"one"), ("0.txt", b"zero")],
    )
    collection = open_shards(path)
    asked = []
    real = collection.storage.read
    collection.storage.read = lambda path, offset, size, expected: (
        asked.append(size),
        real(path, offset, size, expected),
    )[1]
    assert collection.read(0)[:3] == ("0", b"first", "zero") and asked == [5, 4]
    asked.clear()
    assert collection.read(1)[:3] == ("1", b"x" * 200_000, "one") and len(asked) == 1


def test_remote_shards_need_an_index(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name in ("a", "b"):
        path = write(tmp_path / f"{name}.tar", [m for k in range(3) for m in sample(f"{name}{k}")])
        memory.pipe_file(f"/indexed/{name}.tar", pathlib.Path(path).read_bytes())
    try:
        with pytest.raises(DataError, match="remote and has no index"):
            open_shards("memory://indexed/a.tar")
        index_folder.index_folder("memory://indexed/*.tar", tmp_path / "index", jobs=1)
        remote, local = open_shards(str(tmp_path / "index")), open_shards(str(tmp_path / "*.tar"))
        assert contents(remote) == contents(local)
        assert remote.fingerprint == local.fingerprint
    finally:
        memory.rm("/indexed", recursive=True)


def test_the_file_is_as_documented(folder, tmp_path):
    """Reads one without unclip, so that the layout cannot change by accident."""
    walked(str(folder / "c.tar"), checksums=True).write(tmp_path / "c.idx")
    data = (tmp_path / "c.idx").read_bytes()
    magic, version, flags, count, captioned, keys = struct.unpack_from("<8sII3Q", data)
    assert (magic, version, flags, count, captioned, keys) == (b"unclip\0i", 1, 1, 3, 3, 3)
    table = np.frombuffer(data, "<u4", 24, 128).reshape(3, 8)
    assert data[128 + 96 : 128 + 99] == b"012"
    assert table[:, 6].tolist() == [1, 2, 3] and not table[:, 4:6].any()
    shard = (folder / "c.tar").read_bytes()
    for row in table.tolist():
        parts = [shard[512 * b : 512 * b + size] for b, size in (row[:2], row[2:4])]
        assert parts[0].startswith(b"picture") and parts[1].startswith(b"text")
        crcs = struct.pack("<3I", *(zlib.crc32(part) for part in parts), 0)
        assert row[7] == zlib.crc32(crcs)


def test_too_many_members_end_the_walk(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "MAX_MEMBERS", 4)
    index = walked(write(tmp_path / "a.tar", [m for k in range(3) for m in sample(f"{k}")]))
    assert index.count == 2 and index.problems == {"too-many-members": 1}


def test_opening_an_index_imports_nothing_heavy(folder):
    index_folder.index_folder(str(folder / "*.tar"), folder / "index", jobs=1)
    program = (
        "import sys; from unclip.input.shards.collection import open_shards; "
        "c = open_shards(sys.argv[1]); "
        "c.read(0); bad = {'jax', 'grain', 'fsspec', 'webdataset', 'tensorflow', 'PIL', "
        "'tensorflow_datasets', 'array_record'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", program, str(folder / "index")], check=True, timeout=60)


def test_a_table_that_was_tampered_with_is_refused(tmp_path, shard_writer):
    shard_writer(tmp_path / "a.tar", 3)
    index_folder.index_folder(str(tmp_path / "a.tar"), tmp_path / "index", jobs=1)
    table = json.loads((tmp_path / "index" / "index.json").read_text())
    (entry,) = table["shards"]
    for damaged, field in (
        (entry | {"digest": "z" * 64}, "digest"),
        (entry | {"path": "a\0.tar"}, "path"),
    ):
        (tmp_path / "index" / "index.json").write_text(json.dumps(table | {"shards": [damaged]}))
        with pytest.raises(DataError, match=f"damaged.*'{field}'.*index the shards again"):
            index_folder.read_index(str(tmp_path / "index"))


def test_a_member_larger_than_any_is_not_asked_for(tmp_path, shard_writer):
    path = shard_writer(tmp_path / "a.tar", 3)
    index = index_folder.walk_path(path, Storage())
    index.table[1, 3] = samples.MAX_TEXT_BYTES + 1
    index.size = 1 << 40
    with pytest.raises(DataError, match=r"row 1 .* is too large"):
        index.spans(1)
