"""A collection written as a prepared data set of tensorflow-datasets, without TensorFlow.

For other programs that read tensorflow-datasets' ArrayRecord files. A record holds a sample
unchanged: the picture's bytes, the caption, the key and the JSON object.
`records.RecordCollection` reads it back.
"""

import json
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from unclip import files
from unclip.errors import ConfigError, DataError
from unclip.input import captions as caption_sources
from unclip.input.samples import BadSample, Sample
from unclip.input.tfds import prepared
from unclip.input.tfds.prepared import FEATURES

FORMAT = 1  # of the file in which the state of writing is kept
_NAME = re.compile(r"[A-Za-z_]\w*")
_OPTIONS = "group_size:1,uncompressed"  # pictures are compressed already
_PROGRESS = 100  # samples between reports


def write_array_record(
    collection: Any,
    folder: str | os.PathLike,
    *,
    name: str,
    split: str,
    shard_samples: int = 10_000,
    version: str = "1.0.0",
    captions: Sequence[str] = ("txt",),
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Writes a collection as a prepared data set of tensorflow-datasets.

    Each record has the features `FEATURES`: the picture's bytes unchanged, caption, key and JSON.
    A folder takes several splits, one call each. A call that was cut short is resumed by the same
    call: files appear whole, and the split is in dataset_info.json when all of them are there.

    Args:
      collection: of samples, as `shards.open_shards` or `RecordCollection` gives it.
      folder: the set's folder, that with dataset_info.json; TFDS_DATA_DIR/NAME/VERSION to be found
        by its name.
      name, split: Python names, e.g. "foxes" and "train".
      shard_samples: samples of the collection per file; bad ones are left out.
      captions: sources of the caption, see `unclip.input.captions`: the first that a sample has.
      progress: called with the number of samples each time some are done, also those done before.

    Returns:
      {"folder", "files", "written" (files written by this call), "samples", "bytes" (of records),
      "left_out": {reason: samples}}.

    Raises:
      ConfigError: names, sizes, or a folder that holds another set or another collection.
      DataError: no good sample; a shard that cannot be read any more; a full disk.
    """
    folder = pathlib.Path(folder)
    for what, value, rule, example in (
        ("name", name, _NAME, "foxes"),
        ("split", split, _NAME, "train"),
        ("version", version, prepared.VERSION, "1.0.0"),
    ):
        if not rule.fullmatch(value):
            raise ConfigError(f"{what} {value!r}: expected something like {example}")
    if shard_samples < 1 or not len(collection):
        raise ConfigError(f"{len(collection)} samples, {shard_samples} a file: expected at least 1")
    info = _description(folder, name, version)
    count = -(-len(collection) // shard_samples)
    settings = {
        "format": FORMAT,
        "name": name,
        "version": version,
        "split": split,
        "source": collection.fingerprint,
        "samples": len(collection),
        "shard_samples": shard_samples,
    }
    state_path = folder / f"unclip-{split}.json"
    if state_path.exists():
        state = files.read_object(state_path)
        differences = [
            f"{field} {state.get(field)!r}, now {value!r}"
            for field, value in settings.items()
            if state.get(field) != value
        ]
        if differences:
            raise ConfigError(
                f"{folder} holds split {split!r} of another collection: "
                f"{', '.join(differences)}; give another folder"
            )
        if not isinstance(state.get("files"), dict):
            state["files"] = {}
    elif any(known.get("name") == split for known in info["splits"]):
        raise ConfigError(f"{folder} has a split {split!r} already, written by something else")
    else:
        state = {**settings, "files": {}}
    for left in folder.glob(f".{name}-{split}.*.tmp"):  # of a call that was killed
        left.unlink(missing_ok=True)
    written = 0
    for number in range(count):
        path = folder / f"{name}-{split}.array_record-{number:05d}-of-{count:05d}"
        first = number * shard_samples
        numbers = range(first, min(first + shard_samples, len(collection)))
        if not _is_whole(path, state["files"].get(str(number))):
            state["files"][str(number)] = _write_file(collection, numbers, path, captions, progress)
            with files.replacing(state_path) as temporary:
                temporary.write_text(json.dumps(state, indent=1) + "\n")
            written += 1
        elif progress:
            progress(len(numbers))
    done = [state["files"][str(number)] for number in range(count)]
    left_out = Counter()
    for file in done:
        left_out.update(file["left_out"])
    total = sum(file["samples"] for file in done)
    if not total:
        raise DataError(f"none of {len(collection)} samples can be used: {dict(left_out)}")
    info["splits"] = [known for known in info["splits"] if known.get("name") != split] + [
        {
            "name": split,
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "shardLengths": [str(file["samples"]) for file in done],
            "numBytes": str(sum(file["bytes"] for file in done)),
        }
    ]
    # The description comes last: a set without it is not prepared.
    for file_name, document in (("features.json", _features_json()), ("dataset_info.json", info)):
        with files.replacing(folder / file_name) as temporary:
            temporary.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    return {
        "folder": str(folder),
        "files": count,
        "written": written,
        "samples": total,
        "bytes": sum(file["bytes"] for file in done),
        "left_out": dict(left_out),
    }


def _description(folder: pathlib.Path, name: str, version: str) -> dict[str, Any]:
    """The set's dataset_info.json, a new one where there is none."""
    mine = {"name": name, "version": version, "fileFormat": "array_record"}
    path = folder / "dataset_info.json"
    if not path.exists():
        return {**mine, "description": "Pictures and captions, written by unclip.", "splits": []}
    info = files.read_object(path)
    differences = [
        f"{field} {info.get(field)!r}, not {value!r}"
        for field, value in mine.items()
        if info.get(field) != value
    ]
    features = files.read_object(folder / "features.json")
    if features != _features_json():
        differences.append("other features")
    if differences or not isinstance(info.get("splits", []), list):
        raise ConfigError(
            f"{folder} holds another data set: {', '.join(differences) or 'damaged splits'}"
        )
    return {**info, "splits": info.get("splits", [])}


def _features_json() -> dict[str, Any]:
    """features.json of `FEATURES`."""
    module = "tensorflow_datasets.core.features"
    text = {"pythonClassName": f"{module}.text_feature.Text", "text": {}}
    image = {
        "pythonClassName": f"{module}.image_feature.Image",
        "image": {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8"},
    }
    features = {**dict.fromkeys(FEATURES, text), "image": image}
    return {
        "pythonClassName": f"{module}.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }


def _is_whole(path: pathlib.Path, known: Any) -> bool:
    """Whether a file exists with the size that the state file has for it."""
    try:
        return path.stat().st_size == known["size"] and known["samples"] + known["bytes"] >= 0
    except (OSError, LookupError, TypeError):  # missing, or the state file's entry is unusable
        return False


def _write_file(
    collection: Any,
    numbers: range,
    path: pathlib.Path,
    captions: Sequence[str],
    progress: Callable[[int], Any] | None,
) -> dict[str, Any]:
    """Writes one file; returns the state file's entry for it."""
    example_type, left_out = prepared.example_type(), Counter()
    count = total = 0
    with files.replacing(path) as temporary:
        try:
            writer = prepared.array_record().ArrayRecordWriter(str(temporary), _OPTIONS)
            for done, i in enumerate(numbers, 1):
                try:
                    sample = collection.read(i)
                    text = caption_sources.first(sample, captions)
                    record = _serialise(sample._replace(text=text), example_type)
                    writer.write(record)
                    count, total = count + 1, total + len(record)
                except BadSample as error:
                    left_out[error.reason] += 1
                if progress and (done % _PROGRESS == 0 or done == len(numbers)):
                    progress((done - 1) % _PROGRESS + 1)
            writer.close()
        except RuntimeError as error:  # the only type that array_record raises
            raise DataError(f"cannot write {path}: {prepared.first_line(error)}") from error
    return {"samples": count, "bytes": total, "size": path.stat().st_size, "left_out": left_out}


def _serialise(sample: Sample, example_type: type) -> bytes:
    example = example_type()
    feature = example.features.feature
    values = (
        sample.image,
        sample.text.encode("utf-8", "surrogatepass"),
        sample.key.encode("utf-8", "surrogateescape"),
        json.dumps(sample.meta).encode(),
    )
    for name, value in zip(FEATURES, values):
        feature[name].bytes_list.value.append(value)
    return example.SerializeToString(deterministic=True)
