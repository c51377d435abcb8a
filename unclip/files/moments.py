"""Mean and covariance of features, and the files that keep them.

Fréchet distances (1706.08500) compare two sets of pictures by these alone. Sums are float64:
float32 sums moved published distances by 1e-4. Every picture counts once, whichever device or
process computed its features.

Statistics files are `.npz` of plain arrays, never unpickled. Where the features are Inception's
they carry the names that pytorch-fid, clean-fid (`mu`, `sigma`) and OpenAI's evaluator (`mu_s`,
`sigma_s` as well) read and write; what those files do not say is in one JSON entry beside them.
"""

import dataclasses
import json
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from unclip import files
from unclip.errors import ConfigError, DataError, NumericsError, unknown

FORMAT = 1
MAX_WIDTH = 1 << 14
MAX_ENTRIES = 256
MAX_JSON_BYTES = 16 << 20
MAX_ROWS_BYTES = 1 << 35
# feature -> names of its mean and covariance, in our files and in other people's.
COMMON = {"pool3": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_ABOUT = "unclip"  # the entry of JSON


class Moments:
    """Running sums over feature rows, in float64 on the host.

    Attributes:
      count: rows so far; total: float64 [D], their sum; outer: float64 [D, D], the sum of x xᵀ.
    """

    def __init__(self, width: int):
        self.count = 0
        self.total = np.zeros(width)
        self.outer = np.zeros((width, width))

    def add(
        self,
        rows: np.ndarray,
        valid: np.ndarray | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Adds rows.

        Args:
          rows: [b, D], any float dtype.
          valid: bool [b]; rows that are False are padding and are ignored.
          names: of the pictures, for the message.

        Raises:
          ConfigError: rows of another width.
          NumericsError: NaN or infinity in a valid row; names the first such picture.
        """
        rows = np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] != len(self.total):
            raise ConfigError(f"rows {list(rows.shape)}: expected [pictures, {len(self.total)}]")
        if valid is not None:
            valid = np.asarray(valid, bool)
            names = None if names is None else [names[k] for k in np.flatnonzero(valid)]
            rows = rows[valid]
        rows = rows.astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(rows).all(1))
        if len(bad):
            first = f"row {self.count + bad[0]}" if names is None else repr(names[bad[0]])
            raise NumericsError(
                f"{len(bad)} of {len(rows)} pictures have NaN or infinite features; the first is "
                f"{first}"
            )
        self.count += len(rows)
        self.total += rows.sum(0)
        self.outer += rows.T @ rows

    def merge(self, other: "Moments") -> None:
        """Adds another's sums: those of another device, process or part of a set."""
        if other.total.shape != self.total.shape:
            raise ConfigError(
                f"moments of width {len(self.total)} and {len(other.total)} do not merge"
            )
        self.count += other.count
        self.total += other.total
        self.outer += other.outer

    def mean(self) -> np.ndarray:
        """float64 [D]. Raises ConfigError where no row was added."""
        if not self.count:
            raise ConfigError("no pictures: nothing to take the mean of")
        return self.total / self.count

    def covariance(self) -> np.ndarray:
        """float64 [D, D], unbiased (divided by count - 1). Raises ConfigError under two rows."""
        if self.count < 2:
            raise ConfigError(f"covariance of {self.count} picture(s): at least 2 are needed")
        mean = self.mean()
        return (self.outer - self.count * np.outer(mean, mean)) / (self.count - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What is known of a set's features.

    Attributes:
      count: pictures; None where a file does not say.
      mean: float64 [D]; covariance: float64 [D, D], unbiased.
      provenance: JSON-able: extractor id, resize mode, sha256 of weights and of the list of
        pictures, source. Empty where unknown.
    """

    count: int | None
    mean: np.ndarray
    covariance: np.ndarray
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, moments: Moments, provenance: Mapping[str, Any] | None = None) -> "Statistics":
        """The statistics of rows added up; ConfigError under two rows."""
        covariance = moments.covariance()
        return cls(moments.count, moments.mean(), covariance, dict(provenance or {}))


@dataclasses.dataclass(frozen=True, eq=False)
class StatisticsFile:
    """A statistics file as read.

    Attributes:
      path: of the file.
      statistics: by feature, as they were written: "inception2015.tf1bilinear.uint8/pool3", …;
        those of another tool's file are "pool3" and "spatial" alone.
      features: float32 [N, D] by feature, for those whose rows were kept, in picture order.
      ours: False for a file of another tool, of which extractor and count are unknown.
    """

    path: str
    statistics: dict[str, Statistics]
    features: dict[str, np.ndarray]
    ours: bool

    def of(self, feature: str) -> Statistics:
        """The statistics of one feature, "EXTRACTOR/OUTPUT".

        Another tool's file names no extractor: there OUTPUT is enough.

        Raises:
          ConfigError: it has none of that feature; lists those it has.
        """
        name = feature if self.ours else feature.rpartition("/")[2]
        if name not in self.statistics:
            raise unknown(f"feature in {self.path}", feature, self.statistics)
        return self.statistics[name]


def _entries(features: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """{feature: its entries of the archive: mean, covariance, rows}."""
    found, common = {}, dict(COMMON)
    for number, feature in enumerate(sorted(features)):
        # Of several features of one kind the first carries the names that other tools know.
        pair = common.pop(feature.rpartition("/")[2], (f"mean_{number}", f"covariance_{number}"))
        found[feature] = (*pair, f"rows_{number}")
    return found


def write_statistics(
    path: str | os.PathLike,
    statistics: Mapping[str, Statistics],
    features: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes a statistics file, atomically.

    Args:
      path: ends in ".npz".
      statistics: by feature, named "EXTRACTOR/OUTPUT".
      features: float32 [N, D] rows of some of them, for metrics that need more than two moments.

    Raises:
      ConfigError: rows that do not fit, or provenance that is not JSON.
      DataError: the file cannot be written.
    """
    features = dict(features or {})
    path = pathlib.Path(path)
    if path.suffix != ".npz":
        raise ConfigError(f"{path}: a statistics file ends in .npz")
    if not statistics:
        raise ConfigError(f"{path}: no statistics to write")
    entries, arrays = _entries(statistics), {}
    for name, found in statistics.items():
        arrays[entries[name][0]] = np.float64(found.mean)
        arrays[entries[name][1]] = np.float64(found.covariance)
    for name, rows in features.items():
        if name not in statistics:
            raise unknown("feature among the statistics", name, statistics)
        count, width = statistics[name].count, len(statistics[name].mean)
        if rows.shape != (count, width):
            raise ConfigError(f"rows of {name!r} are {list(rows.shape)}, not [{count}, {width}]")
        arrays[entries[name][2]] = np.float32(rows)
    about = {
        name: {"count": found.count, "provenance": found.provenance}
        for name, found in statistics.items()
    }
    try:
        text = json.dumps({"format": FORMAT, "features": about}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"provenance cannot be written as JSON: {error}") from error
    arrays[_ABOUT] = np.frombuffer(text.encode(), np.uint8)
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_statistics(path: str | os.PathLike) -> StatisticsFile:
    """Reads a statistics file of ours, or one of pytorch-fid, clean-fid or OpenAI's evaluator.

    Raises:
      ConfigError: a file of a newer format.
      DataError: missing, damaged, larger than the limits, or without a mean and covariance.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            return _read(str(path), archive)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        # The last two: an encrypted archive, and names that are not text.
        raise DataError(f"{path} is not a statistics file, or is damaged: {error}") from error


def _read(path: str, archive: zipfile.ZipFile) -> StatisticsFile:
    infos = archive.infolist()
    if len(infos) > MAX_ENTRIES:
        raise DataError(f"{path} has {len(infos)} entries: a statistics file has few")
    entries = {info.filename.removesuffix(".npy"): info for info in infos}
    ours = _ABOUT in entries
    if ours:
        about = _about(path, archive, entries[_ABOUT])
    else:
        about = {name: {} for name, pair in COMMON.items() if set(pair) <= entries.keys()}
        if not about:
            raise DataError(
                f"{path} holds {', '.join(sorted(entries)[:8]) or 'nothing'}: expected statistics "
                "(mu and sigma, or what `unclip metrics --save_statistics` writes)"
            )
    statistics, features = {}, {}
    places = _entries(about)
    for name, facts in about.items():
        place = places[name]
        mean, covariance = (
            _array(path, archive, entries, entry, 8 * MAX_WIDTH**2) for entry in place[:2]
        )
        # Other tools keep float32 or float64; ours is float64.
        mean, covariance = np.float64(np.atleast_1d(mean)), np.float64(np.atleast_2d(covariance))
        width = len(mean)
        if mean.ndim != 1 or covariance.shape != (width, width):
            raise DataError(
                f"{path} is damaged: {name!r} has mean {list(mean.shape)} and covariance "
                f"{list(covariance.shape)}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise NumericsError(f"{path}: the statistics of {name!r} hold NaN or infinity")
        count = facts.get("count")
        statistics[name] = Statistics(count, mean, covariance, facts.get("provenance", {}))
        if ours and place[2] in entries:
            rows = _array(path, archive, entries, place[2], MAX_ROWS_BYTES)
            if rows.shape != (count, width):
                raise DataError(f"{path} is damaged: {name!r} has rows {list(rows.shape)}")
            features[name] = np.float32(rows)
    return StatisticsFile(path, statistics, features, ours)


def _about(path: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> dict[str, dict]:
    """{feature: {"count", "provenance"}} of our own JSON entry."""
    data = _array(path, archive, {_ABOUT: info}, _ABOUT, MAX_JSON_BYTES)
    try:
        document = json.loads(data.astype(np.uint8).tobytes())
        version, about = document["format"], document["features"]
        sound = isinstance(version, int) and all(
            (facts["count"] is None or (isinstance(facts["count"], int) and facts["count"] > 0))
            and isinstance(facts["provenance"], dict)
            for facts in about.values()
        )
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: its description is not valid ({error})") from error
    if sound and version > FORMAT:
        raise ConfigError(
            f"{path} has statistics format {version}, this unclip reads up to {FORMAT}: "
            "upgrade unclip"
        )
    if not sound or not about:
        raise DataError(f"{path} is damaged: its description is not valid")
    return about


def _array(
    path: str,
    archive: zipfile.ZipFile,
    entries: Mapping[str, zipfile.ZipInfo],
    name: str,
    limit: int,
) -> np.ndarray:
    """One real-valued array of the archive; its size is checked before it is read.

    Raises:
      DataError: absent, larger than `limit` bytes, of Python objects, or cut short.
    """
    if name not in entries:
        raise DataError(f"{path} is damaged: it has no {name!r}")
    if entries[name].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{path}: {name!r} is compressed in a way that numpy does not use")
    if entries[name].file_size > limit + 4096:
        raise DataError(f"{path}: {name!r} is larger than {limit} bytes")
    with archive.open(entries[name]) as file:
        try:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"npy version {version}")
            number = version[0]
            header = getattr(np.lib.format, f"read_array_header_{number}_0")
            shape, fortran, dtype = header(file)
        except (ValueError, SyntaxError, TypeError) as error:
            raise DataError(f"{path} is damaged: {name!r} is not an array ({error})") from error
        if dtype.kind not in "fiu":
            raise DataError(f"{path}: {name!r} holds {dtype}, expected real numbers")
        size = dtype.itemsize * math.prod(shape)
        sound = all(0 <= length <= limit for length in shape) and size <= limit
        data = file.read(size + 1) if sound else b""
    if not sound or len(data) != size:
        raise DataError(f"{path} is damaged: {name!r} {list(shape)} has {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
