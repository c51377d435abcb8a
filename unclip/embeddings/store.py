"""CLIP embeddings of a collection on disk, found again by shard and row.

The prior learns z_i and the decoder is conditioned on it, both from a CLIP that no longer changes,
so `unclip embed` computes z_i and z_t of every sample once. A folder of embeddings holds

    embeddings.json        which CLIP, and a table of the shards
    NAME-DIGEST12.z_i.npy  [rows, D]: row r belongs to row r of the shard's index
    NAME-DIGEST12.z_t.npy  likewise; NaN where a sample is bad or has no caption
    NAME-DIGEST12.json     of one finished shard: counts and bad samples
    statistics.npz         mean and covariance of all rows

A shard is identified by the digest of its index, so subsets and other mixtures of the same shards
use the same files, while a shard that was written anew is refused.
"""

import functools
import io
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from unclip import errors, files
from unclip.input.samples import BadSample, Sample
from unclip.input.storage.storage import Storage

FORMAT = 1
FILE = "embeddings.json"
STATISTICS = "statistics.npz"
KINDS = ("z_i", "z_t")
DTYPES = ("float32", "float16")
MAX_JSON_BYTES = 256 << 20
MAX_WIDTH = 1 << 16
# Settings that every shard of a folder shares.
SETTINGS = ("clip", "embed_dim", "dtype", "captions", "picture")


class Shard(NamedTuple):
    """One embedded shard.

    Attributes:
      name: of its file; digest: of its index.
      rows: of the .npy files; samples: how many of them were to be embedded.
      embedded: rows with a z_i; captioned: rows with a z_t.
      bad: samples without embeddings, by reason.
    """

    name: str
    digest: str
    rows: int
    samples: int
    embedded: int
    captioned: int
    bad: dict[str, int]

    @property
    def stem(self) -> str:
        """The beginning of the names of its files."""
        return stem(self.name, self.digest)


@functools.lru_cache(4096)
def stem(name: str, digest: str) -> str:
    """The beginning of the names of a shard's files; always a plain file name, without folders."""
    plain = re.sub(r"[^\w-]+", "-", os.path.basename(name).removesuffix(".tar")).strip("-")
    return f"{plain[:80] or 'shard'}-{digest[:12]}"


@functools.lru_cache(4096)  # called at every read, and slow
def header(rows: int, width: int, dtype: str) -> bytes:
    """The first bytes of the .npy file of [rows, width]; the values follow, row after row."""
    start = io.BytesIO()
    description = {
        "descr": np.dtype(dtype).newbyteorder("<").str,
        "fortran_order": False,
        "shape": (rows, width),
    }
    np.lib.format.write_array_header_1_0(start, description)
    return start.getvalue()


def shard_of(document: Mapping[str, Any], path: str | os.PathLike) -> Shard:
    """A `Shard` from JSON.

    Raises:
      DataError: fields that are missing or not valid.
    """
    try:
        found = Shard(*(document[name] for name in Shard._fields))
        counts = (found.rows, found.samples, found.embedded, found.captioned, *found.bad.values())
        sound = (
            isinstance(found.name, str)
            and isinstance(found.digest, str)
            and re.fullmatch("[0-9a-f]{64}", found.digest)
            and all(type(count) is int and count >= 0 for count in counts)
            and max(found.embedded, found.captioned) <= found.samples <= found.rows
        )
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise errors.DataError(f"{path} is damaged: it does not describe an embedded shard")
    return found


class Store:
    """A folder of embeddings, read by shard and row; safe between threads, picklable.

    Args:
      folder: as `unclip embed --out` wrote it.

    Attributes:
      clip: `bundle.space` of the CLIP; embed_dim: D; dtype: of the files.
      captions: where z_t's captions come from, the first that a sample has.
      shards: `Shard` by digest.
      complete: False while `unclip embed` has shards to do.

    Raises:
      ConfigError: the folder has a newer format.
      DataError: it holds no embeddings, or they are damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        path = self.folder / FILE
        if not path.is_file():
            raise errors.DataError(
                f"{folder} holds no embeddings: there is no {path}; "
                "`unclip embed --out DIR` writes it"
            )
        document = files.read_object(path, MAX_JSON_BYTES)
        version = document.get("format")
        if isinstance(version, int) and version > FORMAT:
            raise errors.ConfigError(
                f"{path} has format {version}, this unclip reads up to {FORMAT}: upgrade unclip"
            )
        width, table = document.get("embed_dim"), document.get("shards")
        if (
            version != FORMAT
            or type(width) is not int
            or not 0 < width <= MAX_WIDTH
            or document.get("dtype") not in DTYPES
            or not isinstance(table, list)
            or not isinstance(document.get("clip"), str)
            or not isinstance(document.get("captions"), list)
        ):
            raise errors.DataError(f"{path} is damaged: it does not describe embeddings")
        self.clip, self.embed_dim, self.dtype = document["clip"], width, document["dtype"]
        self.captions = tuple(document["captions"])
        self.complete = document.get("complete") is True
        self.settings = {name: document.get(name) for name in SETTINGS}
        self.shards = {shard.digest: shard for shard in (shard_of(row, path) for row in table)}
        self._storage = Storage()

    def __repr__(self) -> str:
        return (
            f"Store({self.folder}: {self.samples} samples in {len(self.shards)} shards, "
            f"{self.embedded} with z_i, CLIP {self.clip[:12]})"
        )

    @property
    def samples(self) -> int:
        """Rows that were to be embedded."""
        return sum(shard.samples for shard in self.shards.values())

    @property
    def embedded(self) -> int:
        """Rows with a z_i."""
        return sum(shard.embedded for shard in self.shards.values())

    @property
    def captioned(self) -> int:
        """Rows with a z_t."""
        return sum(shard.captioned for shard in self.shards.values())

    @property
    def bad(self) -> Counter:
        """Samples without embeddings, by reason."""
        return sum((Counter(shard.bad) for shard in self.shards.values()), Counter())

    def check_clip(self, clip: str) -> None:
        """Refuses embeddings of another CLIP than the one of this hash.

        Raises:
          ConfigError: names both.
        """
        if self.clip != clip:
            raise errors.ConfigError(
                f"the embeddings in {self.folder} were made by CLIP {self.clip[:12]}, but this run "
                f"uses CLIP {clip[:12]}: give that CLIP, or run unclip embed with this one and "
                "another --out"
            )

    def missing(self, collection) -> list[str]:
        """The names of a collection's shards that are not embedded here."""
        return [
            name
            for number, name in enumerate(collection.shard_names)
            if collection.counts[number] and collection.shard_digest(number) not in self.shards
        ]

    def attach(self, collection) -> "WithEmbeddings":
        """The collection with its embeddings.

        Raises:
          DataError: some of its shards are not embedded here; names them.
        """
        missing = self.missing(collection)
        if missing:
            listed = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            hint = (
                "it has other shards, these were changed since, or its --captions, "
                f"{','.join(self.captions)}, tell other samples apart than input.captions"
            )
            if not self.complete:
                hint = "unclip embed was stopped there: the same command continues it"
            raise errors.DataError(
                f"{self.folder} has no embeddings of {len(missing)} of "
                f"{len(collection.shard_names)} shards ({listed}): {hint}"
            )
        return WithEmbeddings(collection, self)

    def rows(self, digest: str, kind: str, first: int, count: int) -> np.ndarray:
        """Rows of one shard as they are stored.

        Args:
          kind: "z_i" or "z_t".

        Returns:
          [count, D] of the store's dtype, NaN where there is none.

        Raises:
          DataError: the file is missing, cut short or of other rows.
        """
        shard = self.shards[digest]
        if not 0 <= first <= first + count <= shard.rows:
            raise IndexError(f"rows {first} to {first + count} of {shard.rows}")
        path = str(self.folder / f"{shard.stem}.{kind}.npy")
        start = header(shard.rows, self.embed_dim, self.dtype)
        width = self.embed_dim * np.dtype(self.dtype).itemsize
        size = (len(start) + shard.rows * width, "")
        try:
            data = self._storage.read(path, len(start) + first * width, count * width, size)
        except errors.DataError as error:
            raise errors.DataError(
                f"embeddings of {shard.name}: {error}; run unclip embed again"
            ) from error
        return np.frombuffer(data, self.dtype).reshape(count, self.embed_dim)

    def whole(self, shard: Shard) -> bool:
        """Whether both files of a shard are there, of the right size and kind."""
        start = header(shard.rows, self.embed_dim, self.dtype)
        width = self.embed_dim * np.dtype(self.dtype).itemsize
        for kind in KINDS:
            try:
                with open(self.folder / f"{shard.stem}.{kind}.npy", "rb") as file:
                    if (
                        os.fstat(file.fileno()).st_size != len(start) + shard.rows * width
                        or file.read(len(start)) != start
                    ):
                        return False
            except OSError:
                return False
        return True


class WithEmbeddings:
    """A collection whose samples carry the stored z_i of their picture.

    Args:
      collection: all of its shards are in the store.
      store: see `Store`.

    It can be used like a collection: length, keys, reading, subsets, shards and fingerprint.
    """

    def __init__(self, collection, store: Store):
        self.collection, self.store = collection, store
        self.counts, self.groups = collection.counts, collection.groups
        self.shard_names = collection.shard_names
        self.storage = getattr(collection, "storage", None)
        self.problems, self.examples = collection.problems, collection.examples
        self.fingerprint = collection.fingerprint

    def __len__(self) -> int:
        return len(self.collection)

    def __repr__(self) -> str:
        return f"WithEmbeddings({self.collection!r}, {self.store!r})"

    def key(self, i: int) -> str:
        """The key of sample i."""
        return self.collection.key(i)

    def meta(self, i: int) -> dict[str, Any]:
        """The JSON object of sample i."""
        return self.collection.meta(i)

    def locate(self, i: int) -> tuple[int, int]:
        """(shard number, row) of sample i."""
        return self.collection.locate(i)

    def shard_digest(self, number: int) -> str:
        """The digest of a shard's index."""
        return self.collection.shard_digest(number)

    def read(self, i: int) -> Sample:
        """Sample i with meta["z_i"] float32 [D]; BadSample("no-embedding") where there is none."""
        number, row = self.collection.locate(i)
        digest = self.collection.shard_digest(number)
        if row >= self.store.shards[digest].rows:
            raise BadSample("no-embedding", "it was not to be embedded")
        z_i = np.float32(self.store.rows(digest, "z_i", row, 1)[0])
        if not np.isfinite(z_i).all():
            raise BadSample("no-embedding", "its picture or caption could not be read")
        sample = self.collection.read(i)
        return sample._replace(meta={**sample.meta, "z_i": z_i})

    def subset(self, **choice: Any) -> "WithEmbeddings":
        """The samples that a `Collection.subset` of the same arguments keeps."""
        return WithEmbeddings(self.collection.subset(**choice), self.store)

    def pairs(
        self, limit: int | None = None, chunk: int = 4096
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(z_i, z_t) float32 [b, D] of the first `limit` samples, without those that lack either.

        In the collection's order, at most `chunk` rows of one shard at a time.
        """
        count = len(self) if limit is None else min(limit, len(self))
        start = 0
        while start < count:
            number, first = self.locate(start)
            rows = [first]
            while start + len(rows) < min(count, start + chunk):
                other, row = self.locate(start + len(rows))
                if other != number or not rows[-1] < row < first + 4 * chunk:
                    break
                rows.append(row)
            start += len(rows)
            shard = self.store.shards[self.shard_digest(number)]
            rows = np.array([row for row in rows if row < shard.rows], np.int64)
            if not len(rows):
                continue
            span = (int(rows[0]), int(rows[-1] - rows[0]) + 1)
            z_i, z_t = (
                np.float32(self.store.rows(shard.digest, kind, *span)[rows - rows[0]])
                for kind in KINDS
            )
            good = np.isfinite(z_i).all(1) & np.isfinite(z_t).all(1)
            if good.any():
                yield z_i[good], z_t[good]
