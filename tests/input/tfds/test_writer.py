"""Prepared data sets that are written here: read back by tensorflow-datasets and by ourselves."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from unclip.errors import ConfigError, DataError
from unclip.input import source
from unclip.input.decode import transforms
from unclip.input.shards.collection import open_shards
from unclip.input.tfds import prepared, records

tfds = pytest.importorskip("tensorflow_datasets")
array_record = pytest.importorskip("array_record.python.array_record_module")


def encoded(format="PNG", seed=0):
    picture = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format)
    return file.getvalue()


def tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture
def tars(tmp_path):
    """Two shards of nine good samples and one with a broken JSON member."""
    members = []
    for i in range(10):
        key, format = f"k/{i:03d}", ("PNG", "JPEG", "WEBP")[i % 3]
        extension = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[format]
        meta = json.dumps({"width": 7, "score": i / 3, "big": 1 << 70, "odd": "\ud800", "é": [1]})
        members += [
            (f"{key}.{extension}", encoded(format, i)),
            (f"{key}.txt", f"\ufeffnumber {i}\n".encode()),
            (f"{key}.json", b"{" if i == 7 else meta.encode()),
        ]
    members[0] = ("k/\udcff.png", members[0][1])
    members[1] = ("k/\udcff.txt", members[1][1])
    del members[2]
    return [tar(tmp_path / "a.tar", members[:14]), tar(tmp_path / "b.tar", members[14:])]


def test_written_sets_are_read_back_by_both(tars, tmp_path):
    collection = open_shards(tars)
    folder = tmp_path / "sets" / "foxes" / "1.0.0"
    counts = []
    info = records.write_array_record(
        collection, folder, name="foxes", split="train", shard_samples=4, progress=counts.append
    )
    good = [i for i in range(10) if collection.key(i) != "k/007"]
    assert info == {
        "folder": str(folder),
        "files": 3,
        "written": 3,
        "samples": 9,
        "bytes": info["bytes"],
        "left_out": {"json": 1},
    }
    assert sum(counts) == 10
    ours = records.RecordCollection(f"tfds:{folder}:train")
    expected = [collection.read(i) for i in good]
    assert [ours.read(i) for i in range(9)] == expected
    assert [ours.key(i) for i in range(9)] == [sample.key for sample in expected]
    assert {sample.image[:4] for sample in expected} >= {b"RIFF", b"\x89PNG"}
    theirs = tfds.builder_from_directory(str(folder)).as_data_source(
        split="train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    assert len(theirs) == 9
    for i, sample in enumerate(expected):
        assert theirs[i]["image"] == sample.image
        assert theirs[i]["caption"] == sample.text.encode()
        assert theirs[i]["key"] == sample.key.encode("utf-8", "surrogateescape")
        assert json.loads(theirs[i]["json"]) == sample.meta
    # tensorflow-datasets decodes such pictures too.
    png = next(i for i, sample in enumerate(expected) if sample.image.startswith(b"\x89PNG"))
    decoded = tfds.builder_from_directory(str(folder)).as_data_source(split="train")[png]["image"]
    np.testing.assert_array_equal(decoded, Image.open(io.BytesIO(expected[png].image)))


def words(texts, length):
    tokens = np.array([[sum(map(ord, text))] + [0] * (length - 1) for text in texts], np.int32)
    return tokens, tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_training_sees_the_same_batches(tars, tmp_path, workers):
    tarred = open_shards(tars).subset(keys=[f"k/{i:03d}" for i in range(1, 10) if i != 7])
    records.write_array_record(tarred, tmp_path / "set", name="s", split="train", shard_samples=3)
    made = open_shards(f"tfds:{tmp_path / 'set'}:train")
    assert (len(made), list(made.counts)) == (8, [3, 3, 2])
    transform = transforms.ImageText(4, 6, words, captions=("txt", "json:é"), crop="random")

    def batches(collection, count, **options):
        with source.make_source(collection, transform, batch_size=4, seed=5, **options) as found:
            return [next(found) for _ in range(count)]

    for one, other in zip(batches(tarred, 4), batches(made, 4, workers=workers), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    if not workers:
        rows = [batch["tokens"][:, 0] for batch in batches(made, 4, order="streamed", streams=2)]
        expected = sorted(sum(map(ord, tarred.read(i).text)) for i in range(8))
        for epoch in (rows[:2], rows[2:]):
            assert sorted(np.concatenate(epoch)) == expected
    with (
        source.make_source(
            made, transform, batch_size=4, seed=5, filters={"score": (100, None)}
        ) as found,
        pytest.raises(DataError, match="rejected by filters"),
    ):
        next(found)


def test_writing_is_resumed_by_file_to_the_same_bits(tars, tmp_path):
    collection = open_shards(tars)

    class Dying:
        """The collection, until its sample 6 is read."""

        fingerprint = collection.fingerprint

        def __len__(self):
            return len(collection)

        def read(self, i):
            if i == 6:
                raise KeyboardInterrupt
            return collection.read(i)

    def write(source, folder, **options):
        options = {"name": "foxes", "split": "train", "shard_samples": 4, **options}
        return records.write_array_record(source, tmp_path / folder, **options)

    with pytest.raises(KeyboardInterrupt):
        write(Dying(), "cut")
    assert not (tmp_path / "cut" / "dataset_info.json").exists()
    first = tmp_path / "cut" / "foxes-train.array_record-00000-of-00003"
    stamp = first.stat().st_mtime_ns
    (tmp_path / "cut" / ".foxes-train.array_record-00001-of-00003.ab.tmp").write_text("killed")
    assert write(collection, "cut")["written"] == 2 and write(collection, "cut")["written"] == 0
    assert first.stat().st_mtime_ns == stamp
    write(collection, "whole")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "cut").iterdir())
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # A file that is gone or was cut off is written again.
    first.write_bytes(first.read_bytes()[:-1])
    assert write(collection, "cut")["written"] == 1
    # So is one that the state file does not know.
    state = tmp_path / "cut" / "unclip-train.json"
    known = json.loads(state.read_text())
    state.write_text(json.dumps({**known, "files": {"0": {}, "1": known["files"]["1"], "2": 3}}))
    assert write(collection, "cut")["written"] == 2
    assert json.loads(state.read_text()) == known
    # Another split joins, another collection does not.
    half = collection.subset(count=3)
    write(half, "cut", split="held_out")
    both = tfds.builder_from_directory(str(tmp_path / "cut")).info.splits
    assert {name: split.num_examples for name, split in both.items()} == {"train": 9, "held_out": 3}
    for given, options, message in (
        (half, {}, "of another collection: source"),
        (collection, {"shard_samples": 5}, "shard_samples 4, now 5"),
        (half, {"name": "cats", "split": "x"}, "another data set: name"),
        (half, {"name": "a-b"}, "expected something like foxes"),
        (half, {"version": "1"}, "expected something like 1.0.0"),
        (half, {"shard_samples": 0}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            write(given, "cut", **options)


def test_a_file_may_lose_all_its_samples(tmp_path):
    members = []
    for i in range(6):
        members += [(f"{i}.png", encoded()), (f"{i}.txt", b"\xff" if i in (2, 3) else b"t")]
    collection = open_shards(tar(tmp_path / "a.tar", members))
    info = records.write_array_record(
        collection, tmp_path / "set", name="s", split="train", shard_samples=2
    )
    assert (info["samples"], info["left_out"]) == (4, {"encoding": 2})
    found = records.RecordCollection(f"tfds:{tmp_path / 'set'}:train")
    assert [found.key(i) for i in range(4)] == ["0", "1", "4", "5"]
    bad = collection.subset(keys=["2", "3"])
    with pytest.raises(DataError, match=r"none of 2 samples can be used: .*'encoding': 2"):
        records.write_array_record(bad, tmp_path / "bad", name="s", split="train")


def test_the_disk_is_full(tars, tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, options):
            self.writer = array_record.ArrayRecordWriter("/dev/full", options)

        def write(self, record):
            self.writer.write(record)

        def close(self):
            self.writer.close()

    module = type(sys)("module")
    module.ArrayRecordWriter = Full
    monkeypatch.setattr(prepared, "array_record", lambda: module)
    with pytest.raises(DataError, match=r"cannot write .*No space left on device"):
        records.write_array_record(open_shards(tars), tmp_path / "set", name="s", split="train")
    assert not [path for path in (tmp_path / "set").iterdir() if "array_record" in path.name]
