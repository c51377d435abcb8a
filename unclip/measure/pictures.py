"""Pictures to be measured, opened by name: folders, shards, prepared data sets and arrays.

`PictureSet` is their common interface.
"""

import difflib
import glob
import hashlib
import itertools
import os
import pathlib
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from unclip.errors import ConfigError, DataError
from unclip.input import captions
from unclip.input.samples import BadSample, hidden
from unclip.input.shards.collection import open_shards
from unclip.input.shards.folder import is_index, read_index
from unclip.input.tfds import records
from unclip.measure.picture_set import (
    MAX_BYTES,
    ArrayPictures,
    First,
    PictureSet,
    Prepared,
    content_hash,
    decode,
    describe_notes,
    listing_hash,
)

__all__ = [
    "ArrayPictures",
    "First",
    "FolderPictures",
    "PictureSet",
    "Prepared",
    "ShardPictures",
    "TfdsPictures",
    "content_hash",
    "describe_notes",
    "has_pictures",
    "listing_hash",
    "open_pictures",
]
# Extension -> None for what `image.decode` reads, else Pillow's name of the format.
EXTENSIONS = {
    ".png": None,
    ".jpg": None,
    ".jpeg": None,
    ".webp": None,
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
MAX_ARRAY_BYTES = 1 << 36
MAX_TEXT_BYTES = 1 << 20
_GRID = re.compile(r"grid-\d{4,}\.png")


def open_pictures(spec: str | os.PathLike) -> PictureSet:
    """A set of pictures by its name on the command line.

    Args:
      spec: a folder (searched to any depth, sorted by name); webdataset shards as paths, globs or
        brace ranges of `.tar`, or the folder of their index; "tfds:NAME[/CONFIG]:SPLIT"; a `.npz`
        with `arr_0` uint8 [N, H, W, 3].

    Raises:
      ConfigError: none of these. DataError: nothing there, or it cannot be read.
    """
    spec = os.fspath(spec)
    if spec.startswith("tfds:"):
        return TfdsPictures(spec)
    if is_index(spec):
        return ShardPictures(spec)
    if os.path.isdir(spec):
        return FolderPictures(spec)
    if ".tar" in spec or glob.has_magic(spec):
        return ShardPictures(spec)
    path = pathlib.Path(spec)
    if not path.exists():
        folder = path.parent
        names = os.listdir(folder) if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(str(folder / name) for name in near)}?" if near else ""
        raise DataError(f"{spec}: no such file or folder{hint}")
    if path.suffix == ".npz":
        return npz_pictures(spec)
    raise ConfigError(
        f"{spec}: expected a folder of pictures, shards (.tar), a .npz of pictures "
        "or tfds:NAME:SPLIT"
    )


class FolderPictures(PictureSet):
    """The pictures of a folder and of the folders below it, by their relative names.

    Captions are KEY.txt beside KEY.png. Hidden files and folders are none of it; grids as
    `unclip generate` saves them are left out.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = pathlib.Path(folder)
        found, others = [], Counter()
        for where, _, files in os.walk(self._folder):
            for name in files:
                relative = (pathlib.Path(where) / name).relative_to(self._folder).as_posix()
                if hidden(relative):
                    others["hidden"] += 1
                    continue
                known = os.path.splitext(name)[1].lower() in EXTENSIONS
                found += [relative] if known else []
                others[os.path.splitext(name)[1].lower()] += not known
        grids = [name for name in found if _GRID.fullmatch(os.path.basename(name))]
        self._names = sorted(set(found) - set(grids))
        if not self._names:
            there = ", ".join(f"{n} {extension}" for extension, n in others.most_common(3))
            hint = f"; for shards give {folder}/*.tar" if others[".tar"] else ""
            raise DataError(
                f"{folder}: no pictures there ({', '.join(EXTENSIONS)}), "
                f"but {there or 'nothing'}{hint}"
            )
        super().__init__(str(folder), len(self._names))
        self.left_out = sorted(grids)

    def name(self, i: int) -> str:
        """The path below the folder, with its extension."""
        return self._names[i]

    def path(self, i: int) -> pathlib.Path:
        """The file of picture i."""
        return self._folder / self._names[i]

    def caption(self, i: int) -> str | None:
        """The text of KEY.txt, or None. Raises BadSample where it cannot be read."""
        path = self.path(i).with_suffix(".txt")
        if not path.is_file():
            return None
        try:
            with open(path, "rb") as file:
                return file.read(MAX_TEXT_BYTES).decode("utf-8-sig").strip() or None
        except (OSError, UnicodeDecodeError) as error:
            raise BadSample("caption", f"{path}: {error}") from error

    def data(self, i: int) -> bytes:
        """The file's bytes, `MAX_BYTES` and one at most."""
        try:
            with open(self.path(i), "rb") as file:
                return file.read(MAX_BYTES + 1)
        except OSError as error:
            raise BadSample("unreadable", f"{error.strerror}") from error

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the files' names and sizes."""
        digest = hashlib.sha256()
        for i, name in enumerate(self._names):
            try:
                size = self.path(i).stat().st_size
            except OSError:
                size = -1  # reported when it is read
            digest.update(f"{name}\t{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _load(self, i):
        data = self._note(i, self.data(i))
        return decode(data, EXTENSIONS[self.path(i).suffix.lower()])


class ShardPictures(PictureSet):
    """The pictures of webdataset shards, by their keys.

    Captions are those of the source "txt" of `unclip.input.captions`; of shards named by their
    index, the first of the sources that it was written for.
    """

    def __init__(self, patterns: str | Sequence[str]):
        self._sources = ("txt",)
        if isinstance(patterns, str) and is_index(patterns):
            self._sources = read_index(patterns).captions
        collection = open_shards(patterns, text=False, captions=self._sources)
        self.collection = collection
        source = patterns if isinstance(patterns, str) else ",".join(patterns)
        super().__init__(source, len(collection))
        names = [collection.key(i) for i in range(len(collection))]
        if len(set(names)) < len(names):  # a key is unique only within its shard
            stems = [os.path.basename(path).removesuffix(".tar") for path in collection.shards]
            of = np.repeat(np.arange(len(stems)), collection.counts)
            names = [f"{stems[shard]}/{name}" for shard, name in zip(of, names)]
        self._names = names
        for reason, count in collection.problems.items():
            known = collection.examples.get(reason, [])
            names = itertools.chain(known, itertools.repeat("…"))
            self.damaged += [(next(names), reason) for _ in range(count)]

    def name(self, i: int) -> str:
        """The key, with its shard's name where shards share keys."""
        return self._names[i]

    def caption(self, i: int) -> str | None:
        """The sample's first caption, or None."""
        return captions.first(self.collection.read(i), self._sources).strip() or None

    def data(self, i: int) -> bytes:
        """The encoded picture."""
        return self.collection.read(i).image

    @property
    def fingerprint(self) -> str:
        """The collection's: which samples there are."""
        return self.collection.fingerprint

    def _load(self, i):
        return decode(self._note(i, self.data(i)))


def has_pictures(path: str | os.PathLike) -> bool:
    """Whether a `.npz` holds pictures (`arr_0`), not statistics alone."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "arr_0.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}") from error


def npz_pictures(path: str | os.PathLike) -> ArrayPictures:
    """`arr_0` of a `.npz`, as ADM's samplers write it; mapped, not read, where not compressed.

    Raises:
      DataError: damaged, no `arr_0`, or larger than `MAX_ARRAY_BYTES`.
      ConfigError: `arr_0` is not uint8 [N, H, W, 3].
    """
    if not has_pictures(path):
        raise DataError(f"{path} has no arr_0: expected uint8 pictures [N, H, W, 3]")
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo("arr_0.npy")
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, fortran, dtype = read(file)
                header = file.tell()
                size = header + int(np.prod(shape, dtype=object)) * dtype.itemsize
                if size != entry.file_size or size > MAX_ARRAY_BYTES or dtype.hasobject or fortran:
                    raise DataError(
                        f"{path}: arr_0 is {dtype} {list(shape)} in {entry.file_size} bytes; "
                        f"expected uint8 [N, H, W, 3] of {MAX_ARRAY_BYTES} bytes at most"
                    )
                if entry.compress_type != zipfile.ZIP_STORED:
                    pictures = np.frombuffer(file.read(), dtype).reshape(shape)
                    return ArrayPictures(pictures, source=str(path))
        # The lengths of name and extra field in the local header may differ from the directory's.
        with open(path, "rb") as file:
            file.seek(entry.header_offset + 26)
            lengths = np.frombuffer(file.read(4), "<u2").astype(int)
        offset = entry.header_offset + 30 + int(lengths.sum()) + header
        pictures = np.memmap(path, dtype, "r", offset, shape)
    except (OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}") from error
    return ArrayPictures(pictures, source=str(path))


class TfdsPictures(PictureSet):
    """A split of a data set that tensorflow-datasets has prepared, read without TensorFlow.

    Args:
      spec: "tfds:NAME[/CONFIG][:VERSION]:SPLIT" or "tfds:/FOLDER:SPLIT", e.g.
        "tfds:coco_captions:val", see `records.RecordCollection`.
    """

    def __init__(self, spec: str):
        self.collection = records.RecordCollection(spec, text=False)
        super().__init__(spec, len(self.collection))

    def record(self, i: int) -> dict[str, Any]:
        """The texts, numbers and labels of example i by feature; "image", still encoded; "text".

        Several captions are a column, {"captions": {"text": [...]}}, ordered by their ids; "text"
        is the first that is not blank.
        """
        sample = self.collection.read(i)
        texts = sample.meta.get("captions")
        columns = {"captions": {"text": texts}} if isinstance(texts, list) else {}
        return {**sample.meta, **columns, "text": sample.text, "image": sample.image}

    def caption(self, i: int) -> str | None:
        """The example's first caption that is not blank, or None."""
        return self.record(i).get("text", "").strip() or None

    def data(self, i: int) -> bytes:
        """The encoded picture."""
        return self.record(i)["image"]

    @property
    def fingerprint(self) -> str:
        """The collection's: which examples there are."""
        return self.collection.fingerprint

    def _load(self, i):
        return decode(self._note(i, self.data(i)))
