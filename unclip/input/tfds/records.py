"""Pairs of picture and caption in data sets that tensorflow-datasets prepared, without TensorFlow.

A set in tensorflow-datasets' ArrayRecord format can be read by number: `RecordCollection` gives the
samples of any set with pictures and text as a `Collection` of tar shards does, the pictures still
encoded. `write_array_record` writes such a set.
"""

import bisect
import difflib
import functools
import hashlib
import json
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from unclip.errors import DataError
from unclip.input import samples
from unclip.input.samples import BadSample, Sample
from unclip.input.tfds import prepared
from unclip.input.tfds.writer import write_array_record

__all__ = ["RecordCollection", "write_array_record"]
_DIGEST = 1  # version of how digests are computed
_TAIL_BYTES = 256 << 10  # end of a file that digests cover: it ends with the index of its records
_OPEN_FILES = 64


class RecordCollection:
    """Samples of prepared data sets, read by number; safe between threads, and picklable.

    Args:
      specs: one or several of "tfds:NAME[/CONFIG][:VERSION]:SPLIT", a set below TFDS_DATA_DIR
        (~/tensorflow_datasets), and "tfds:/FOLDER:SPLIT". SPLIT may be a part or a sum,
        "train[:10%]+test".
      text: refuse a set without any text; False: pictures are enough. Which samples of a set have
        no caption is known only when they are read: their text is "".
      caption: the feature with the caption, looked for before `prepared.CAPTIONS`.

    A sample's text is its first caption that is not blank; `meta` has all its texts, numbers and
    labels (by name), by feature. Where a sample has a list of captions, meta["captions"] is that
    list, ordered by the captions' ids.

    Attributes:
      shards: paths of the files; shard_names: their names.
      counts: int64 [S], samples of each file; groups: int64 [K + 1], where each of K specs begins.
      problems, examples: empty; nothing is left out before it is read.

    Raises:
      ConfigError: no such spec, split or config; a package is missing; features that need code of
        other packages.
      DataError: not prepared, another file format, damaged; no picture; no text.
    """

    def __init__(self, specs: str | Sequence[str], *, text: bool = True, caption: str = "caption"):
        specs = [specs] if isinstance(specs, str) else list(specs)
        opened = [prepared.open_spec(spec, text, caption) for spec in specs]
        self.source = ",".join(specs)
        self._files = [file for found, _ in opened for file in found]
        self.shards = tuple(file.path for file in self._files)
        self.shard_names = tuple(map(os.path.basename, self.shards))
        self._takes = np.array([take for _, takes in opened for take in takes], np.int64)
        self._ends = np.cumsum(self._takes).tolist()
        self._groups = np.cumsum([0, *(sum(takes) for _, takes in opened)])
        self._chosen: np.ndarray | None = None
        self._digests: dict[int, str] = {}
        self.problems: Counter = Counter()
        self.examples: dict[str, list[str]] = {}
        self._start()

    def _start(self):
        self._lock, self._readers = threading.Lock(), OrderedDict()
        self._last = threading.local()

    def __getstate__(self):
        state = self.__dict__.copy()
        for name in ("_lock", "_readers", "_last"):
            del state[name]
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def __len__(self) -> int:
        return self._ends[-1] if self._chosen is None else len(self._chosen)

    def __repr__(self) -> str:
        return f"RecordCollection({self.source}: {len(self)} samples in {len(self._files)} files)"

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """int64 [S], samples of each file."""
        if self._chosen is None:
            return self._takes
        shards = np.searchsorted(self._ends, self._chosen, side="right")
        return np.bincount(shards, minlength=len(self._files)).astype(np.int64)

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """int64 [K + 1], the first sample of each spec, and the end."""
        if self._chosen is None:
            return self._groups
        return np.searchsorted(self._chosen, self._groups).astype(np.int64)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over the files' digests and which records are used; equal after moving them."""
        digest = hashlib.sha256(
            json.dumps(
                [
                    (self.shard_digest(s), file.skip, int(take))
                    for s, (file, take) in enumerate(zip(self._files, self._takes))
                ]
            ).encode()
        )
        if self._chosen is not None:
            digest.update(np.ascontiguousarray(self._chosen, "<i8").data)
        return digest.hexdigest()

    def shard_digest(self, shard: int) -> str:
        """sha256 (hex) over a file's name, size, number of records and last 256 KiB.

        There its index of records ends, so that records of other sizes have another digest.
        """
        if shard not in self._digests:
            file = self._files[shard]
            about = [_DIGEST, self.shard_names[shard], file.size, file.records]
            digest = hashlib.sha256(json.dumps(about).encode())
            try:
                with open(file.path, "rb") as stream:
                    stream.seek(max(0, file.size - _TAIL_BYTES))
                    digest.update(stream.read(_TAIL_BYTES))
            except OSError as error:
                raise DataError(f"{file.path} cannot be read: {error.strerror}") from error
            self._digests[shard] = digest.hexdigest()
        return self._digests[shard]

    def locate(self, i: int) -> tuple[int, int]:
        """(number of the file, record in it) of sample i."""
        i = int(i if self._chosen is None else self._chosen[i])
        if not 0 <= i < self._ends[-1]:
            raise IndexError(f"sample {i} of {self._ends[-1]}")
        shard = bisect.bisect_right(self._ends, i)
        first = self._ends[shard - 1] if shard else 0
        return shard, self._files[shard].skip + i - first

    def key(self, i: int) -> str:
        """The sample's key or file name where the set has one and it can be read, else a number."""
        try:
            return self._record(i).key()
        except BadSample:  # a list of bad samples needs a name in any case
            return f"{self.locate(i)[1]:07d}"

    def meta(self, i: int) -> dict[str, Any]:
        """The sample's texts, numbers and labels by feature. Raises BadSample, see `read`."""
        return self._record(i).meta()

    def read(self, i: int) -> Sample:
        """Reads sample i, 0 <= i < len(self).

        Raises:
          BadSample: "checksum" or "corrupt" (the record is damaged), "no-picture",
            "too-many-bytes" (a picture or a text over the limits of `samples`), "encoding" (a text
            is not UTF-8), "json".
          DataError: its file is gone, damaged as a whole or has changed since it was opened.
        """
        return self._record(i).sample()

    def subset(
        self,
        *,
        keys: Iterable[str] | None = None,
        where: Mapping[str, Any] | None = None,
        count: int | None = None,
    ) -> "RecordCollection":
        """The samples that pass every filter given, in the same order.

        Args:
          keys: keep these keys; where: keep these values of `meta`. Both read every record.
          count: of what is left, keep only this many, the first ones.

        Raises:
          DataError: an unknown key, or nothing left.
        """
        chosen = self._choose(keys, where)[:count]
        if not len(chosen):
            raise DataError(f"a subset of {count} samples is empty; expected a count of at least 1")
        new = type(self).__new__(type(self))
        new.__setstate__(self.__getstate__())
        for name in ("counts", "groups", "fingerprint"):  # cached, of the whole
            new.__dict__.pop(name, None)
        new._chosen = chosen if self._chosen is None else self._chosen[chosen]
        return new

    def _choose(self, keys: Iterable[str] | None, where: Mapping[str, Any] | None) -> np.ndarray:
        chosen = np.arange(len(self), dtype=np.int64)
        if keys is not None:
            named, wanted = [self.key(i) for i in range(len(self))], set(keys)
            for missing in sorted(wanted - set(named)):
                near = difflib.get_close_matches(missing, set(named), n=3)
                raise DataError(f"no sample has the key {missing!r}; nearest: {near}")
            chosen = chosen[[name in wanted for name in named]]
        for field, values in (where or {}).items():
            values = list(values) if isinstance(values, list | tuple | set) else [values]
            found = [self.meta(i).get(field) for i in chosen]
            chosen = chosen[[value in values for value in found]]
            if not len(chosen):
                there = sorted({repr(value) for value in found})[:20]
                raise DataError(f"no sample has {field} in {values}; there are: {', '.join(there)}")
        return chosen

    def _record(self, i: int) -> "_Record":
        """The record of sample i; the last one of each thread is kept and not read again."""
        place = self.locate(i)
        if getattr(self._last, "place", None) != place:
            self._last.record = self._read_record(*place)
            self._last.place = place
        return self._last.record

    def _read_record(self, shard: int, row: int) -> "_Record":
        file = self._files[shard]
        where = f"{self.shard_names[shard]}: record {row}"
        try:
            data = self._reader(file).read([row])[0]
            return _Record(where, row, file.layout, prepared.example_type().FromString(data))
        except RuntimeError as error:  # the only type that array_record raises
            message = prepared.first_line(error)
            if "orrupted" in message:
                raise BadSample("checksum", f"{where}: {message}") from error
            raise DataError(f"{file.path} cannot be read: {message}") from error
        except DecodeError as error:
            raise BadSample("corrupt", f"{where}: not an example") from error

    def _reader(self, file: prepared.File) -> Any:
        with self._lock:
            reader = self._readers.pop(file.path, None)
            if reader is None:
                reader = prepared.open_file(file)
            self._readers[file.path] = reader
            if len(self._readers) > _OPEN_FILES:
                self._readers.popitem(last=False)  # a thread that is reading still holds it
        return reader


class _Record:
    """One record: an example of named features, and the set's `Layout`."""

    def __init__(self, where: str, row: int, layout: prepared.Layout, example: Any):
        self._where, self._row, self._layout, self._example = where, row, layout, example
        self._features = example.features.feature

    def _values(self, name: str, kind: str) -> Sequence[Any]:
        """The values of a feature; `kind` is "bytes_list", "int64_list" or "float_list"."""
        if name not in self._features:
            return ()
        feature = self._features[name]
        found = feature.WhichOneof("kind") or kind
        if found != kind:
            raise BadSample("corrupt", f"{self._where}: {name} is a {found}, not a {kind}")
        return getattr(feature, kind).value

    def _bytes(self, name: str) -> Sequence[bytes]:
        values = self._values(name, "bytes_list")
        if sum(map(len, values)) > samples.MAX_TEXT_BYTES:
            raise BadSample(
                "too-many-bytes", f"{self._where}: {name}: over {samples.MAX_TEXT_BYTES} bytes"
            )
        return values

    def _texts(self, name: str) -> list[str]:
        try:
            # JSON's escapes can hold half a surrogate pair, which UTF-8 does not allow.
            return [value.decode("utf-8", "surrogatepass") for value in self._bytes(name)]
        except UnicodeDecodeError as error:
            raise BadSample("encoding", f"{self._where}: {name} is not UTF-8") from error

    def key(self) -> str:
        name = self._layout.key
        if name in self._layout.texts:
            found = [value.decode("utf-8", "surrogateescape") for value in self._bytes(name)]
        else:
            found = list(map(str, self._values(name, "int64_list")))
        return found[0] if found else f"{self._row:07d}"

    def meta(self) -> dict[str, Any]:
        layout = self._layout
        if layout.own:
            return samples.json_object(b"".join(self._bytes("json")), self._where)
        meta: dict[str, Any] = {}
        for name, is_list in layout.texts.items():
            found = self._texts(name)
            if is_list:
                meta[name.removesuffix("/text")] = found
            elif found:
                meta[name] = found[0]
        for name, convert in layout.numbers.items():
            kind = "float_list" if convert is float else "int64_list"
            for value in self._values(name, kind)[:1]:
                meta[name] = convert(value)
        for name, names in layout.labels.items():
            for value in self._values(name, "int64_list")[:1]:
                if 0 <= value < len(names):  # -1 is an unknown label
                    meta[name] = names[value]
        if layout.texts.get(layout.caption):
            meta["captions"] = self._captions()
        return meta

    def sample(self) -> Sample:
        image = next(iter(self._values(self._layout.image, "bytes_list")), b"")
        if not image:
            raise BadSample("no-picture", self._where)
        if len(image) > samples.MAX_PICTURE_BYTES:
            raise BadSample("too-many-bytes", f"{self._where}: {len(image)} bytes")
        text = next(iter(self._captions()), "")
        return Sample(self.key(), image, text, self.meta())

    def _captions(self) -> list[str]:
        """The captions that are not blank, by their ids where they have some."""
        layout = self._layout
        texts = self._texts(layout.caption) if layout.caption else []
        ids = self._values(layout.caption_ids, "int64_list") if layout.caption_ids else ()
        if len(ids) == len(texts):
            texts = [texts[n] for n in sorted(range(len(texts)), key=ids.__getitem__)]
        return [text for text in texts if text.strip()]
