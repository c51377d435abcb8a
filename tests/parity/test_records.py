"""Prepared data sets, written by one side and read by the other: tensorflow-datasets on TensorFlow.

TensorFlow parses what was written here, and decodes its pictures; a builder that runs on it writes
a set laid out as coco_captions, which is read here. It has a process of its own.
"""

import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.parity import peers
from unclip.input.shards.collection import open_shards
from unclip.input.tfds import records

pytest.importorskip("tensorflow_datasets")

_READ = """
import json, sys
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory(sys.argv[1])
raw = builder.as_data_source("train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
numpy = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
pictures, texts = {}, []
for i in range(len(raw)):
    example = builder.info.features.deserialize_example(tf.constant(raw[i]))
    encoded = builder.info.features.deserialize_example(
        tf.constant(raw[i]), decoders={"image": tfds.decode.SkipDecoding()})["image"].numpy()
    assert encoded == numpy[i]["image"]
    pictures[str(i)], pictures[f"bytes{i}"] = example["image"].numpy(), np.frombuffer(encoded, "u1")
    texts.append([example[name].numpy().decode() for name in ("caption", "key", "json")])
np.savez(sys.argv[2], **pictures)
print(json.dumps(texts))
"""
_WRITE = """
import sys
import numpy as np
import tensorflow_datasets as tfds
class Coco(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
            "objects": tfds.features.Sequence({
                "bbox": tfds.features.BBoxFeature(),
                "label": tfds.features.ClassLabel(names=["cat", "dog"])})}))
    def _split_generators(self, manager):
        return {"val": self._generate_examples()}
    def _generate_examples(self):
        for i in range(5):
            picture = np.full((8, 9, 3), 40 * i, np.uint8)
            captions = [{"id": k, "text": f"{k} of {i}"} for k in range(i)]
            box = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
            yield i, {"image": picture, "image/filename": f"{i}.jpg", "image/id": i,
                      "captions": captions, "objects": [{"bbox": box, "label": "dog"}] * i}
builder = Coco(data_dir=sys.argv[1], file_format="array_record")
builder.download_and_prepare()
"""


def tensorflow(program, *arguments):
    environment = {
        **os.environ,
        "PYTHONPATH": str(peers.folder(peers.TENSORFLOW)),
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        cwd=arguments[0],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tensorflow_reads_what_is_written(tmp_path, parity):
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(6):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(
                file, "PNG" if i % 2 else "JPEG"
            )
            members = {
                "png" if i % 2 else "jpg": file.getvalue(),
                "txt": f"{i} é\n".encode(),
                "json": json.dumps({"n": i / 3}).encode(),
            }
            for extension, data in members.items():
                info = tarfile.TarInfo(f"k/{i}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    collection = open_shards(str(tmp_path / "a.tar"))
    records.write_array_record(
        collection, tmp_path / "set", name="made", split="train", shard_samples=4
    )
    printed = tensorflow(_READ, tmp_path / "set", tmp_path / "pictures.npz")
    texts = json.loads(printed.splitlines()[-1])
    assert len(texts) == len(collection)
    differ = 0
    with np.load(tmp_path / "pictures.npz") as pictures:
        for i, (caption, key, meta) in enumerate(texts):
            sample = collection.read(i)
            differ += pictures[f"bytes{i}"].tobytes() != sample.image
            differ += (caption, key, json.loads(meta)) != (sample.text, sample.key, sample.meta)
            if i % 2:  # PNG: TensorFlow decodes it to the same pixels
                differ += not np.array_equal(
                    pictures[str(i)], np.array(Image.open(io.BytesIO(sample.image)))
                )
    parity(
        "ArrayRecord written here", "tensorflow-datasets on TensorFlow 2.21.0: samples", differ, 0
    )


def test_what_a_builder_on_tensorflow_wrote_is_read(tmp_path, monkeypatch, parity):
    tensorflow(_WRITE, tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    found = records.RecordCollection("tfds:coco:val")
    assert len(found) == 5
    differ = 0
    for sample in map(found.read, range(5)):
        i = sample.meta["image/id"]
        differ += sample.key != f"{i}.jpg" or sample.text != (f"0 of {i}" if i else "")
        differ += sample.meta["captions"] != [f"{k} of {i}" for k in range(i)]
        picture = np.array(Image.open(io.BytesIO(sample.image)))
        assert picture.shape == (8, 9, 3)
        differ += np.abs(picture.astype(int) - 40 * i).max() > 2  # it is a JPEG of one grey
    parity("ArrayRecord read here", "a builder on TensorFlow 2.21.0: samples", differ, 0)
    assert sorted(found.key(i) for i in range(5)) == [f"{i}.jpg" for i in range(5)]
