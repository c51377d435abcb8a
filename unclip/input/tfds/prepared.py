"""Data sets that tensorflow-datasets prepared: where one lies, what it holds and how it is opened.

A prepared set, such as MS-COCO's `coco_captions`, says in JSON which features its records have;
this module finds which of them are the picture, the caption and the key. TensorFlow is not
imported, and no module that the JSON names is, except tensorflow-datasets' own features.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from unclip import files
from unclip.errors import ConfigError, DataError, unknown

CAPTIONS = ("captions", "caption", "text")  # the features that are looked for, in this order
KEYS = ("key", "image/filename", "file_name", "filename", "image/id", "image_id", "id")
# What `record_writer` writes: the encoded picture, and UTF-8.
FEATURES = ("image", "caption", "key", "json")
VERSION = re.compile(r"\d+\.\d+\.\d+")
_SPLIT = r"[\w.-]+(?:\[[^\[\]/]*\])?"
_SPEC = re.compile(rf"tfds:([^\[\]]+?)(?::(\d+\.\d+\.\d+))?:({_SPLIT}(?: *\+ *{_SPLIT})*)")
# Records are read one at a time, in any order: nothing is read ahead.
_READER = "readahead_buffer_size:0,max_parallelism:0"


class Layout(NamedTuple):
    """Which features of a set are picture, caption and key; names are flat, "captions/text".

    Attributes:
      image: the encoded picture; caption, key: a feature or ""; caption_ids: the numbers by which a
        list of captions is ordered, or "".
      texts: feature -> whether it is a list; numbers: feature -> type; labels: feature -> names.
      own: a set of `write_array_record`, whose JSON is the sample's own.
    """

    image: str
    caption: str
    caption_ids: str
    key: str
    texts: dict[str, bool]
    numbers: dict[str, type]
    labels: dict[str, tuple[str, ...]]
    own: bool


def _flat(feature: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any, int]]:
    """(flat name, feature, lists around it) of a feature and all inside it."""
    kind = type(feature).__name__
    if kind == "FeaturesDict":
        for inner, value in feature.items():
            yield from _flat(value, f"{name}/{inner}" if name else inner, depth)
    elif kind == "Sequence":
        yield from _flat(feature.feature, name, depth + 1)
    else:
        yield name, feature, depth


def _layout(features: Any, spec: str, text: bool, caption: str) -> Layout:
    pictures, texts, numbers, labels, ids = [], {}, {}, {}, set()
    known = ", ".join(sorted(features))
    # Sorted, because they come in the order of a hash table, which differs between processes.
    for name, feature, depth in sorted(_flat(features), key=lambda item: item[0]):
        kind = type(feature).__name__
        if kind == "Image" and depth == 0 and feature.np_dtype != np.float32:
            pictures.append(name)
        elif kind == "ClassLabel" and depth == 0:
            labels[name] = tuple(feature.names)
        elif kind in ("Text", "Tensor", "Scalar") and feature.shape == () and depth < 2:
            dtype = np.dtype(feature.np_dtype)
            stored = np.dtype(feature.get_serialized_info().np_dtype)
            if dtype.kind == "O":
                texts[name] = depth == 1
            elif dtype.kind in "biuf" and stored.kind != "O":
                if depth == 0:
                    numbers[name] = {"b": bool, "f": float}.get(dtype.kind, int)
                elif dtype.kind in "iu":
                    ids.add(name)
    if "image" not in pictures and len(pictures) != 1:
        raise DataError(
            f"{spec}: expected one picture, the feature 'image'; pictures there are "
            f"{', '.join(pictures) or 'none'}, of the features {known}"
        )
    if text and not texts and not labels:
        raise DataError(f"{spec}: has no captions; its features are {known}")
    key = next((name for name in KEYS if texts.get(name) is False or numbers.get(name) is int), "")
    wanted = [caption, *CAPTIONS]
    found = [name for name in wanted for name in (name, f"{name}/text") if name in texts]
    # If a set has a single text, that is its caption, whatever its name; among several none is
    # guessed.
    found += [name for name in texts if name != key and len(set(texts) - {key}) == 1]
    chosen = next(iter(found), "")
    beside = chosen.removesuffix("/text") + "/id"
    image = "image" if "image" in pictures else pictures[0]
    own = set(features) == set(FEATURES) == {image, *texts}
    return Layout(image, chosen, beside if beside in ids else "", key, texts, numbers, labels, own)


def _refuse_foreign_code(folder: pathlib.Path) -> None:
    """Refuses features of other packages: tensorflow-datasets would import the modules that a set's
    description names."""
    pending = [files.read_object(folder / "dataset_info.json").get("features", {})]
    if (folder / "features.json").exists():
        pending.append(files.read_object(folder / "features.json"))
    while pending:
        value = pending.pop()
        if isinstance(value, str) and value.lstrip().startswith("{"):
            with contextlib.suppress(ValueError, RecursionError):  # old sets nest JSON in strings
                pending.append(json.loads(value))
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
            for field in ("pythonClassName", "python_class_name", "type"):
                name = value.get(field)
                if (
                    isinstance(name, str)
                    and "." in name
                    and not name.startswith("tensorflow_datasets.core.features.")
                ):
                    raise ConfigError(
                        f"{folder}: a feature is {name!r}, which is code of another "
                        "package; only tensorflow-datasets' own features are read"
                    )


def _needs(package: str, what: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"{what} needs the Python package {package}: pip install unclip[data] ({error})"
    )


@functools.cache
def example_type() -> type:
    """The protobuf class of a record: {"features": {name: a list of bytes, integers or floats}}.

    Raises:
      ConfigError: tensorflow-datasets is missing.
    """
    try:
        from tensorflow_datasets.proto import tf_example_pb2
    except ImportError as error:
        raise _needs("tensorflow-datasets", "a data set of tensorflow-datasets", error) from error
    return tf_example_pb2.Example


def array_record() -> Any:
    """array_record's module of readers and writers. Raises ConfigError where it is missing."""
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise _needs("array-record", "a data set in ArrayRecord files", error) from error
    return array_record_module


def first_line(error: Exception) -> str:
    """The first line of another package's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ============================================================ finding a set


def prepared_folder(spec: str, name: str, version: str | None = None) -> pathlib.Path:
    """The folder with dataset_info.json of a prepared set, of its newest version.

    Args:
      spec: for errors. name: NAME or NAME/CONFIG below TFDS_DATA_DIR, or a folder.
      version: "1.0.0"; None: the newest.

    Raises:
      DataError: not prepared. ConfigError: it has several configs and none is named.
    """
    if "://" in name:
        raise ConfigError(f"{spec}: only local folders are read; copy or mount the set")
    root = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    where, what = f"{root} (TFDS_DATA_DIR)", name
    if name.startswith(("/", "./", "../", "~")):
        path = pathlib.Path(name).expanduser()
        if version is None and (path / "dataset_info.json").exists():
            return path
        root, what, where = path.parent, path.name, str(path.parent)
    # NAME/VERSION, NAME/CONFIG/VERSION, and NAME/VERSION where NAME has the CONFIG.
    found = [
        path.parent
        for pattern in ("*", "*/*")
        for path in (root / what).glob(f"{pattern}/dataset_info.json")
        if VERSION.fullmatch(path.parent.name)
    ]
    if version is not None:
        found = [path for path in found if path.name == version]
    if not found:
        there = sorted(path.name for path in root.glob("*") if path.is_dir())
        raise DataError(
            f"{spec}: not prepared in {where}, which has "
            f"{', '.join(there[:10]) or 'nothing'}; nothing is downloaded here: run "
            "tensorflow-datasets' download_and_prepare with file_format array_record"
        )
    configs = sorted({path.parent.name for path in found})
    if len(configs) > 1:
        raise ConfigError(
            f"{spec}: expected a config, one of {', '.join(configs)}: "
            f"tfds:{name}/{configs[0]}:SPLIT"
        )
    return max(found, key=lambda path: [int(part) for part in path.name.split(".")])


class File(NamedTuple):
    """One ArrayRecord file of a set, and which of its records are used."""

    path: str
    size: int
    records: int
    skip: int
    layout: Layout


def open_spec(spec: str, text: bool, caption: str) -> tuple[list[File], list[int]]:
    """The files of a set, without reading them.

    Args:
      spec, text, caption: see `records.RecordCollection`.

    Returns:
      The files, and how many records of each are used.
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise ConfigError(
            f"{spec}: expected tfds:NAME:SPLIT, e.g. tfds:coco_captions:val, or tfds:/FOLDER:SPLIT"
        )
    name, version, split = match.groups()
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise _needs("tensorflow-datasets", spec, error) from error
    folder = prepared_folder(spec, name, version)
    _refuse_foreign_code(folder)
    try:
        # Not by name: tensorflow-datasets would then run the set's own code, which often needs
        # TensorFlow.
        info = tensorflow_datasets.builder_from_directory(
            str(folder), file_format="array_record"
        ).info
        for part in split.split("+"):
            asked = part.split("[")[0].strip()
            if asked not in (*info.splits, "all"):
                raise unknown(f"split of {spec}", asked, info.splits)
        instructions = info.splits[split.replace(" ", "")].file_instructions
        layout = _layout(info.features, spec, text, caption)
        found = [
            File(
                part.filename,
                os.stat(part.filename).st_size,
                part.examples_in_shard,
                part.skip,
                layout,
            )
            for part in instructions
        ]
    # tensorflow-datasets raises these for a wrong slice, another file format and damaged files.
    except (
        AssertionError,
        AttributeError,
        LookupError,
        NotImplementedError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        ImportError,
    ) as error:
        raise DataError(
            f"{spec}: {folder} cannot be read by number: {first_line(error)}"
        ) from error
    if not found:
        raise DataError(f"{spec}: no samples there")
    return found, [part.take for part in instructions]


def open_file(file: File) -> Any:
    """array_record's reader of a file, which threads may share.

    Raises:
      DataError: gone, damaged, changed since the set was opened, or not what it was described as.
    """
    module = array_record()
    try:
        size = os.stat(file.path).st_size
        if size != file.size:
            raise DataError(f"{file.path} has changed since it was opened")
        reader = module.ArrayRecordReader(file.path, _READER, file_reader_buffer_size=32768)
        if not reader.ok():
            reader.read([0])  # raises with the reason
    except (OSError, RuntimeError) as error:
        raise DataError(f"{file.path} cannot be read: {first_line(error)}") from error
    if reader.num_records() != file.records:
        raise DataError(
            f"{file.path} has {reader.num_records()} records, its dataset_info.json "
            f"says {file.records}; prepare the set again"
        )
    return reader
