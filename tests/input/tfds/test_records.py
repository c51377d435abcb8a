"""Prepared data sets: what tensorflow-datasets wrote is read, or refused with one line.

tensorflow-datasets itself, without TensorFlow, serialises the examples that are read here;
`make parity` does the same with TensorFlow.
"""

import io
import json
import pathlib
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from unclip.errors import ConfigError, DataError
from unclip.input import samples
from unclip.input.samples import BadSample
from unclip.input.tfds import records

tfds = pytest.importorskip("tensorflow_datasets")
array_record = pytest.importorskip("array_record.python.array_record_module")
RNG = np.random.default_rng(0)
F = tfds.features


def encoded(format="PNG", seed=0):
    picture = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format)
    return file.getvalue()


def prepare(folder, features, examples, split="train", files=2, name="made"):
    """A prepared set in `folder`, its records made by tensorflow-datasets' own serialiser."""
    folder.mkdir(parents=True, exist_ok=True)
    features = F.FeaturesDict(features)
    lengths = [len(part) for part in np.array_split(np.arange(len(examples)), files)]
    first = 0
    for number, length in enumerate(lengths):
        path = folder / f"{name}-{split}.array_record-{number:05d}-of-{files:05d}"
        writer = array_record.ArrayRecordWriter(str(path), "group_size:1")
        for example in examples[first : first + length]:
            writer.write(features.serialize_example(example))
        writer.close()
        first += length
    info = {
        "name": name,
        "version": "1.0.0",
        "fileFormat": "array_record",
        "splits": [
            {
                "name": split,
                "shardLengths": [str(n) for n in lengths],
                "numBytes": "1",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    features.save_config(str(folder))
    return f"tfds:{folder}:{split}"


COCO = {
    "image": F.Image(encoding_format="jpeg"),
    "image/filename": F.Text(),
    "image/id": np.int64,
    "captions": F.Sequence({"id": np.int64, "text": F.Text()}),
    "objects": F.Sequence({"area": np.int64, "bbox": F.BBoxFeature(), "is_crowd": np.bool_}),
}


def coco(i):
    captions = [{"id": 10 * i - k, "text": f"caption {k} of {i}, é"} for k in range(1 + i % 3)]
    captions = [] if i == 4 else [{"id": 1, "text": "  "}, *captions] if i == 5 else captions
    box = F.BBox(0.1, 0.2, 0.3, 0.4)
    return {
        "image": encoded("JPEG", i),
        "image/filename": f"{i:012d}.jpg",
        "image/id": 100 + i,
        "captions": captions,
        "objects": [{"area": 3, "bbox": box, "is_crowd": False}] * i,
    }


@pytest.fixture
def coco_spec(tmp_path):
    return prepare(tmp_path / "coco_captions" / "2014" / "1.1.0", COCO, [coco(i) for i in range(7)])


# ============================================================ reading


def test_coco_captions_layout(coco_spec):
    found = records.RecordCollection(coco_spec)
    assert (len(found), list(found.counts), list(found.groups)) == (7, [4, 3], [0, 7])
    for i in range(7):
        sample, made = found.read(i), coco(i)
        assert sample.image == made["image"]
        texts = [c["text"] for c in sorted(made["captions"], key=lambda c: c["id"])]
        assert sample.meta["captions"] == [text for text in texts if text.strip()]
        assert sample.text == next((text for text in texts if text.strip()), "")
        assert sample.key == found.key(i) == f"{i:012d}.jpg"
        assert sample.meta["image/id"] == 100 + i and sample.meta == found.meta(i)
        assert found.locate(i) == divmod(i, 4)
    assert found.shard_names[1] == "made-train.array_record-00001-of-00002"
    assert found.shards[0].endswith(found.shard_names[0])


def test_no_tensorflow_no_torch(coco_spec):
    program = (
        "import sys\n"
        "from unclip.input.tfds import records, writer\n"
        f"found = records.RecordCollection({coco_spec!r})\n"
        "assert found.read(3).text\n"
        f"writer.write_array_record(found, sys.argv[1], name='x', split='y')\n"
        "heavy = {m.split('.')[0] for m in sys.modules} & {'tensorflow', 'torch', 'jax'}\n"
        "assert not heavy, heavy\n"
    )
    out = coco_spec.split(":")[1] + "-copy"
    done = subprocess.run(
        [sys.executable, "-c", program, out], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_which_feature_is_what(tmp_path):
    image, other = {"image": F.Image()}, {"photo": F.Image(), "mask": F.LabeledImage(labels=2)}
    row = {
        "image": encoded(),
        "photo": encoded(),
        "text": "t",
        "title": "a title",
        "alt": "an alt",
        "label": 1,
        "id": 5,
        "ok": True,
        "score": 0.5,
        "mask": encoded(),
        "vector": np.ones(3, np.float32),
        "file_name": "f.png",
        "names": ["x", "y"],
    }
    cases = [
        (image | {"text": F.Text(), "title": F.Text()}, "t"),
        (image | {"title": F.Text(), "file_name": F.Text()}, "a title"),
        (image | {"title": F.Text(), "alt": F.Text()}, ""),
        (image | {"label": F.ClassLabel(names=["cat", "dog"])}, ""),
        (image | {"names": F.Sequence(F.Text())}, "x"),
        (
            other
            | {
                "title": F.Text(),
                "id": np.int64,
                "ok": np.bool_,
                "score": np.float32,
                "vector": F.Tensor(shape=(3,), dtype=np.float32),
            },
            "a title",
        ),
    ]
    for number, (features, text) in enumerate(cases):
        example = {name: row[name] for name in features}
        spec = prepare(tmp_path / str(number), features, [example], files=1)
        sample = records.RecordCollection(spec).read(0)
        assert (sample.image, sample.text) == (row["photo"], text)
        expected = {
            name: row[name] for name in features if name not in ("image", "photo", "mask", "vector")
        }
        expected |= {"label": "dog"} if "label" in features else {}
        expected |= {"captions": ["x", "y"]} if "names" in features else {}
        assert sample.meta == expected
        assert [type(v) for v in sample.meta.values()] == [
            type(expected[name]) for name in sample.meta
        ]
    assert sample.key == "5"
    chosen = records.RecordCollection(f"tfds:{tmp_path / '2'}:train", caption="alt")
    assert chosen.read(0).text == "an alt" and chosen.key(0) == "0000000"


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"title": F.Text()}, "expected one picture, .* there are none"),
        ({"a": F.Image(), "b": F.Image(), "title": F.Text()}, "pictures there are a, b"),
        ({"image": F.Image(), "id": np.int64}, "has no captions; its features are id, image"),
    ],
)
def test_sets_without_pairs_are_reported(tmp_path, features, message):
    row = {"title": "t", "a": encoded(), "b": encoded(), "image": encoded(), "id": 1}
    spec = prepare(tmp_path, features, [{name: row[name] for name in features}], files=1)
    with pytest.raises(DataError, match=message):
        records.RecordCollection(spec)
    if "image" in features:
        assert records.RecordCollection(spec, text=False).read(0).text == ""


def test_parts_and_sums_of_splits(coco_spec):
    whole = records.RecordCollection(coco_spec)
    part = records.RecordCollection(f"{coco_spec}[2:6]+train[:1]")
    assert [part.key(i) for i in range(len(part))] == [whole.key(i) for i in (2, 3, 4, 5, 0)]
    assert [part.locate(i) for i in range(5)] == [(0, 2), (0, 3), (1, 0), (1, 1), (2, 0)]
    assert [part.shard_digest(s) for s in range(3)] == [whole.shard_digest(s) for s in (0, 1, 0)]
    assert part.fingerprint != whole.fingerprint
    both = records.RecordCollection([f"{coco_spec}[:50%]", coco_spec])
    assert (len(both), list(both.groups), list(both.counts)) == (11, [0, 4, 11], [4, 4, 3])
    assert both.key(4) == whole.key(0)
    for i in (-1, 5):
        with pytest.raises(IndexError):
            part.read(i)


def test_subsets(coco_spec):
    whole = records.RecordCollection(coco_spec)
    whole.counts, whole.groups, whole.fingerprint  # noqa: B018 (they are cached)
    odd = whole.subset(where={"image/id": [101, 103, 105]})
    assert [odd.key(i) for i in range(3)] == [whole.key(i) for i in (1, 3, 5)]
    assert (list(odd.counts), list(odd.groups)) == ([2, 1], [0, 3])
    assert odd.read(2) == whole.read(5) and odd.locate(2) == whole.locate(5)
    last = odd.subset(keys=[whole.key(5), whole.key(3)], count=1)
    assert (len(last), last.key(0)) == (1, whole.key(3))
    assert len({whole.fingerprint, odd.fingerprint, last.fingerprint}) == 3
    assert whole.subset(count=3).fingerprint == whole.subset(count=3).fingerprint
    for options, message in (
        ({"keys": ["000000000001.jpeg"]}, "nearest: .*000000000001.jpg"),
        ({"where": {"image/id": 7}}, "there are: 100, 101"),
        ({"count": 0}, "empty"),
    ):
        with pytest.raises(DataError, match=message):
            whole.subset(**options)


def test_pickled_and_read_by_many_threads(coco_spec, monkeypatch):
    monkeypatch.setattr(records, "_OPEN_FILES", 1)
    found = records.RecordCollection(coco_spec).subset(count=6)
    expected = [found.read(i) for i in range(6)]
    again = pickle.loads(pickle.dumps(found))
    assert again.fingerprint == found.fingerprint
    wrong = []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, 6, 200):
            wrong.extend([i] * (again.read(i) != expected[i]))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(again._readers) == 1


def test_the_fingerprint_follows_the_records_not_the_place(tmp_path):
    def made(folder, sizes):
        examples = [{"image": bytes([i + 1]) * n, "text": "t"} for i, n in enumerate(sizes)]
        spec = prepare(tmp_path / folder, {"image": F.Image(), "text": F.Text()}, examples)
        return records.RecordCollection(spec).fingerprint

    assert made("a", [10, 20, 30]) == made("b", [10, 20, 30])
    assert len({made("c", [10, 20, 30]), made("d", [20, 10, 30]), made("e", [10, 20, 31])}) == 3


def test_a_set_can_be_copied(coco_spec, tmp_path):
    found = records.RecordCollection(coco_spec)
    records.write_array_record(found, tmp_path / "copy", name="copy", split="train")
    copy = records.RecordCollection(f"tfds:{tmp_path / 'copy'}:train")
    assert [copy.read(i) for i in range(7)] == [found.read(i) for i in range(7)]


# ============================================================ faults


def flipped(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_a_damaged_record_is_one_bad_sample(coco_spec):
    found = records.RecordCollection(coco_spec)
    path = pathlib.Path(found.shards[0])
    flipped(path, path.read_bytes().index(found.read(2).image[-40:]) + 20)
    found = records.RecordCollection(coco_spec)
    with pytest.raises(BadSample) as caught:
        found.read(2)
    assert caught.value.reason == "checksum" and "record 2" in caught.value.message
    assert "\n" not in caught.value.message
    assert found.key(2) == "0000002"
    assert [found.read(i).key for i in (1, 3)] == ["000000000001.jpg", "000000000003.jpg"]


def test_any_damage_is_told_never_served(coco_spec):
    found = records.RecordCollection(coco_spec)
    path, expected = pathlib.Path(found.shards[0]), [found.read(i) for i in range(4)]
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    reported = 0
    for trial in range(60):
        data = bytearray(whole)
        at = int(rng.integers(20_000 if trial % 3 else len(data)))
        if trial % 3 == 0:
            data = data[:at]
        else:
            data[at : at + 8] = rng.bytes(8)
        path.write_bytes(data)
        collection = records.RecordCollection(coco_spec)
        for i in range(4):
            try:
                assert collection.read(i) == expected[i]
            except DataError as error:
                reported += 1
                assert "\n" not in error.message
    assert reported > 20 * 4


def test_examples_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "MAX_TEXT_BYTES", 50)
    monkeypatch.setattr(samples, "MAX_PICTURE_BYTES", 500)
    image = encoded()
    examples = [
        (b"", b"t", "no-picture"),
        (image, b"\xff\xfe", "encoding"),
        (image, b"t" * 51, "too-many-bytes"),
        (image * 9, b"t", "too-many-bytes"),
    ]
    features = {"image": F.Image(), "text": F.Text()}
    spec = prepare(tmp_path, features, [{"image": i, "text": t} for i, t, _ in examples])
    found = records.RecordCollection(spec)
    for i, (_, _, reason) in enumerate(examples):
        with pytest.raises(BadSample) as caught:
            found.read(i)
        assert caught.value.reason == reason
    path = tmp_path / "made-train.array_record-00000-of-00002"
    for record, reason in ((b"\xff\xff", "corrupt"), (b"", "no-picture")):
        writer = array_record.ArrayRecordWriter(str(path), "group_size:1")
        writer.write(record)
        writer.write(record)
        writer.close()
        with pytest.raises(BadSample) as caught:
            records.RecordCollection(spec).read(1)
        assert caught.value.reason == reason


def test_records_of_any_bytes_are_good_or_bad(coco_spec):
    whole = records.RecordCollection(coco_spec)
    path, rng = pathlib.Path(whole.shards[0]), np.random.default_rng(0)
    features = F.FeaturesDict(COCO)
    examples = [features.serialize_example(coco(i)) for i in range(4)]
    good, bad = 0, set()
    for _ in range(40):
        writer = array_record.ArrayRecordWriter(str(path), "group_size:1")
        for example in examples:
            data = bytearray(example)
            for at in rng.integers(0, len(data), 2):  # most hit the picture; some the structure
                data[at if at % 2 else at % 200] = rng.integers(256)
            writer.write(bytes(data[: rng.integers(len(data) - 40, len(data) + 40)]))
        writer.close()
        found = records.RecordCollection(coco_spec)
        for i in range(4):
            try:
                sample = found.read(i)
                assert isinstance(sample.image, bytes) and isinstance(sample.text, str)
                json.dumps(sample.meta)
                good += 1
            except BadSample as error:
                bad.add(error.reason)
                assert "\n" not in error.message
    assert good > 20 and bad >= {"corrupt"}


def test_a_feature_of_another_type_is_corrupt(tmp_path):
    features = {"image": F.Image(), "text": F.Text(), "id": np.int64}
    row = {"image": encoded(), "text": "t", "id": 3}
    spec = prepare(tmp_path, features, [row], files=1)
    path = tmp_path / "made-train.array_record-00000-of-00001"
    other = {"image": np.int64, "text": np.float32, "id": F.Text()}
    for name in features:
        mixed = F.FeaturesDict({**features, name: other[name]})
        writer = array_record.ArrayRecordWriter(str(path), "group_size:1")
        writer.write(mixed.serialize_example({**row, name: "5" if name == "id" else 5}))
        writer.close()
        with pytest.raises(BadSample, match=f"corrupt: .*{name} is a"):
            records.RecordCollection(spec).read(0)


def test_files_that_are_not_as_described(coco_spec):
    found = records.RecordCollection(coco_spec)
    path = pathlib.Path(found.shards[1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="has changed since it was opened"):
        found.read(5)
    with pytest.raises(DataError, match="cannot be read: "):
        records.RecordCollection(coco_spec).read(5)
    path.write_bytes(pathlib.Path(found.shards[0]).read_bytes())
    with pytest.raises(DataError, match=r"has 4 records, its dataset_info\.json says 3"):
        records.RecordCollection(coco_spec).read(5)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        records.RecordCollection(coco_spec)


def test_code_of_other_packages_is_never_imported(coco_spec, tmp_path):
    (tmp_path / "evil_features.py").write_text("raise SystemExit('imported')")
    folder = pathlib.Path(coco_spec.split(":")[1])
    plain = json.loads((folder / "features.json").read_text())
    evil = "evil_features.Image"
    nested = {**plain["featuresDict"]["features"], "image": {"pythonClassName": evil}}
    old = {"type": plain["pythonClassName"], "proto_cls": "tensorflow_datasets.FeaturesDict"}
    sys.path.insert(0, str(tmp_path))
    try:
        for document in (
            {"pythonClassName": evil},
            {"type": evil, "content": {}},
            {**plain, "featuresDict": {"features": nested}},
            {**old, "content": {"features": nested}},
            {**old, "content": json.dumps({"features": nested})},
        ):
            (folder / "features.json").write_text(json.dumps(document))
            with pytest.raises(ConfigError, match=r"is .evil_features\.Image., which is code"):
                records.RecordCollection(coco_spec)
    finally:
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("tfds:one", ConfigError, "expected tfds:NAME:SPLIT"),
        ("tfds:one:vla", ConfigError, "unknown split of tfds:one:vla 'vla': did you mean 'val'"),
        ("tfds:one:val[1:2", ConfigError, "expected tfds:NAME:SPLIT"),
        ("tfds:one:val[x]", DataError, "cannot be read by number"),
        ("tfds:one:val[:0]", DataError, "no samples there"),
        ("tfds:three:val", DataError, "not prepared in .* has one, two; nothing is"),
        ("tfds:one:2.0.0:val", DataError, "not prepared"),
        ("tfds:two:val", ConfigError, "one of a, b: tfds:two/a:SPLIT"),
        ("tfds:gs://bucket/one:val", ConfigError, "only local folders"),
        ("tfds:/nothing/there:val", DataError, "not prepared in /nothing"),
    ],
)
def test_wrong_specs_are_one_line(tmp_path, monkeypatch, spec, error, message):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    row = [{"image": encoded(), "text": "t"}]
    features = {"image": F.Image(), "text": F.Text()}
    for folder in ("one/1.0.0", "two/a/1.0.0", "two/b/1.0.0"):
        prepare(tmp_path / folder, features, row, split="val", files=1)
    with pytest.raises(error, match=message) as caught:
        records.RecordCollection(spec)
    assert "\n" not in caught.value.message


def test_the_newest_version_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    features = {"image": F.Image(), "text": F.Text()}
    for version in ("1.9.0", "1.10.0"):
        row = [{"image": encoded(), "text": version}]
        prepare(tmp_path / "coco_captions" / "2014" / version, features, row, files=1)
    for spec, version in (
        ("coco_captions", "1.10.0"),
        ("coco_captions/2014", "1.10.0"),
        ("coco_captions:1.9.0", "1.9.0"),
        (tmp_path / "coco_captions" / "2014", "1.10.0"),
        (tmp_path / "coco_captions" / "2014" / "1.9.0", "1.9.0"),
    ):
        assert records.RecordCollection(f"tfds:{spec}:train[:1]").read(0).text == version


def test_other_formats_and_missing_packages(coco_spec, monkeypatch):
    info = pathlib.Path(coco_spec.split(":")[1]) / "dataset_info.json"
    text = info.read_text()
    info.write_text(text.replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match=r"cannot be read by number: .*array_record"):
        records.RecordCollection(coco_spec)
    info.write_text("{")
    with pytest.raises(DataError, match="no JSON"):
        records.RecordCollection(coco_spec)
    info.write_text(text)
    found = records.RecordCollection(coco_spec)
    for module, read in (
        ("tensorflow_datasets", lambda: records.RecordCollection(coco_spec)),
        ("array_record.python", lambda: found.read(0)),
    ):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            with pytest.raises(ConfigError, match=r"pip install unclip\[data\]"):
                read()
