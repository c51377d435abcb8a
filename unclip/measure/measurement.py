"""One measurement: sets of pictures, the extractors that metrics ask for, features computed once.

Each extractor runs once over each set, captions are encoded once for each way of encoding them, and
everything about the pictures that can change a value is refused, or counted and reported.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import unclip
from unclip import errors
from unclip.files.moments import Statistics, StatisticsFile
from unclip.input.samples import BadSample
from unclip.measure import captions as caption_files
from unclip.measure import embedders, features
from unclip.measure.pictures import PictureSet, content_hash, describe_notes, listing_hash
from unclip.runtime import collectives

# Modes of extractors that a file of statistics does not name.
USUAL = ("tf1", "openai", "hub")
_HASH = re.compile(r"-[0-9a-f]{8}(?=\.)")  # of the weights, in an extractor's id
_PROBES = 8
_LISTED = 5


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a name on the command line is computed.

    Attributes:
      about: a line of help.
      extractor: "WEIGHTS.MODE": which network, and how it is shown pictures.
      output: which of the extractor's features.
      compute: (Measurement, name) -> rows of the result, each {"value", and where they exist
        "name", "detail", "std", "interval"}.
      real: what it needs of the real set: "" nothing, "statistics" or "rows".
      fake: "statistics" or "rows".
      captions: 1 if it needs the caption of every fake picture, 2 with references.
    """

    about: str
    extractor: str
    output: str
    compute: Callable[["Measurement", str], list[dict[str, Any]]]
    real: str = "rows"
    fake: str = "rows"
    captions: int = 0


@dataclasses.dataclass
class Settings:
    """The options of `measure.table.measure`, under their names there."""

    batch_size: int = 64
    allow: frozenset[str] = frozenset()
    seed: int = 0
    candidates: int = 100
    bootstrap: int = 0
    protocol: str = ""
    named: frozenset[str] = frozenset()


class Measurement:
    """The sets to be compared and what was measured of them.

    Args:
      real: pictures, a file of statistics, or None; fake: pictures or None.
      metrics: {name: Metric} to compute.
      weights: {"inception", "clip", "dinov2"} -> path or None.
      captions: of `fake`, in order: a text each, or a list of texts each; None takes its own.
      settings: the options.

    Attributes:
      warnings: lines, added while measuring; scores: {metric: float64 [N]}, likewise.
      captions: a list of texts for each fake picture that was read; [] if no metric needs them.
    """

    def __init__(
        self,
        real: PictureSet | StatisticsFile | None,
        fake: PictureSet | None,
        metrics: Mapping[str, Metric],
        weights: Mapping[str, str | os.PathLike | None],
        captions: Sequence[str] | Sequence[Sequence[str]] | None,
        settings: Settings,
    ):
        self.real, self.fake, self.metrics, self.settings = real, fake, metrics, settings
        self.warnings: list[str] = []
        self.scores: dict[str, np.ndarray] = {}
        self.captions = self._aligned(captions)
        # A reference that no metric needs is not read.
        compared = any(metric.real for metric in metrics.values())
        used = {"real": real if compared else None, "fake": fake}
        self._sets = {which: p for which, p in used.items() if isinstance(p, PictureSet)}
        for which, pictures in self._sets.items():
            if len(pictures) < 2:
                raise errors.ConfigError(
                    f"{pictures.source}: {len(pictures)} {which} picture; at least 2 are needed"
                )
        self._facts: dict[str, dict[str, Any]] = {}
        self._refuse_sizes({which: _probe(p) for which, p in self._sets.items()})
        self._weights = dict(weights)
        self._extractors = {}
        for name in {m.extractor: None for m in metrics.values()}:
            path = str(self._weights[name.partition(".")[0]])
            self._extractors[name] = _extractor(name, path, _signature(path))
        self._found: dict[tuple[str, str], features.Extracted] = {}
        self._texts: dict[tuple[bool, str, str], list[np.ndarray]] = {}
        for which in self._sets:
            self._extract(which)
        self._refuse_sizes({which: facts["sizes"] for which, facts in self._facts.items()})

    # ------------------------------------------------------------ what the metrics read

    def extractor(self, name: str) -> features.Extractor:
        """The extractor that a metric reads."""
        return self._extractors[self.metrics[name].extractor]

    def feature(self, name: str) -> str:
        """What a metric's features are called in a file of statistics: "pool3", "pool3-clean"."""
        metric = self.metrics[name]
        mode = metric.extractor.partition(".")[2]
        return metric.output if mode in USUAL else f"{metric.output}-{mode}"

    def width(self, name: str) -> int:
        """The width of a metric's features."""
        return self.extractor(name).outputs[self.metrics[name].output]

    def count(self, which: str) -> int | None:
        """How many pictures of a side were measured; None where its statistics do not say."""
        if which == "real" and isinstance(self.real, StatisticsFile):
            counts = {found.count for found in self.real.statistics.values()}
            return counts.pop() if len(counts) == 1 else None
        return self._facts[which]["count"] if which in self._facts else None

    def fingerprints(self, name: str) -> list[str]:
        """The parts of a metric's key that say which pictures and captions it is of.

        "crop64" how pictures were prepared, "captions=1a2b3c4d" and "real=1a2b3c4d" the captions
        and the reference; without what the protocol's id names.
        """
        metric, named = self.metrics[name], self.settings.named
        found = []
        if self.fake is not None and "size" not in named:
            found.append(self.fake.preparation)
        if metric.captions and "captions" not in named:
            texts = [texts if metric.captions > 1 else texts[:1] for texts in self.captions]
            found.append(f"captions={_text_hash(texts)[:8]}")
        if metric.real and "real" not in named:
            found.append(f"real={self._real_hash(name)[:8]}")
        return list(filter(None, found))

    def statistics(self, which: str, name: str) -> Statistics:
        """Mean and covariance of a side's features for a metric."""
        if which == "real" and isinstance(self.real, StatisticsFile):
            return self._stored(name)
        metric = self.metrics[name]
        moments = self._found[which, metric.extractor].moments[metric.output]
        return Statistics.of(moments, self._source(which, name))

    def rows(self, which: str, name: str) -> np.ndarray:
        """float32 [N, D], a side's features for a metric, in the order of the pictures."""
        metric = self.metrics[name]
        if which == "real" and isinstance(self.real, StatisticsFile):
            self._stored(name)
            if self.feature(name) not in self.real.features:
                raise errors.ConfigError(
                    f"{name} compares picture by picture, but {self.real.path} holds only the mean "
                    f"and covariance of {self.feature(name)}: give the pictures, or write the file "
                    f"again with --metrics {name}"
                )
            return self.real.features[self.feature(name)]
        return self._found[which, metric.extractor].rows[metric.output]

    def texts(self, *, prefix: str = "", truncate: str = "eot", references: bool = False):
        """z_t of the captions, float32 [N, D]; with `references` a list of [R, D] of the others."""
        path = str(self._weights["clip"])
        encoder = _encoder(path, _signature(path))
        key = (references, prefix, truncate)
        if key not in self._texts:
            lists = [texts[1:] if references else texts[:1] for texts in self.captions]
            flat = [text for texts in lists for text in texts]
            rows = encoder.encode(flat, prefix=prefix, truncate=truncate)
            ends = np.cumsum([len(texts) for texts in lists])
            self._texts[key] = np.split(rows, ends[:-1]) if references else rows
            cut = encoder.cut(flat, prefix=prefix)
            if cut:
                self.warnings.append(
                    f"{len(cut)} of {len(flat)} captions are longer than CLIP "
                    f"reads and were cut ({truncate})"
                )
        return self._texts[key]

    def kept(self) -> tuple[dict[str, Statistics], dict[str, np.ndarray]]:
        """({feature: Statistics}, {feature: rows}) of the real pictures, for a statistics file."""
        if "real" not in self._sets:
            return {}, {}
        names = [name for name, metric in self.metrics.items() if metric.real]
        statistics = {self.feature(name): self.statistics("real", name) for name in names}
        rows = {
            self.feature(name): self.rows("real", name)
            for name in names
            if self.metrics[name].real == "rows"
        }
        return statistics, rows

    def provenance(self) -> dict[str, Any]:
        """Everything that the values were computed from, JSON-able."""
        found = {
            "unclip": unclip.__version__,
            "jax": jax.__version__,
            "devices": f"{jax.device_count()} {jax.devices()[0].platform}",
            "settings": dataclasses.asdict(self.settings)
            | {name: sorted(getattr(self.settings, name)) for name in ("allow", "named")},
            "extractors": {e.id: e.provenance for e in self._extractors.values()},
            "captions_sha256": None,
        }
        if self.captions:
            found["captions_sha256"] = _text_hash(self.captions)
        if isinstance(self.real, StatisticsFile):
            found["real"] = {"source": str(self.real.path)} | {
                name: one.provenance for name, one in self.real.statistics.items()
            }
        for which in self._sets:
            facts = dict(self._facts[which])
            facts["sizes"] = {size: count for size, count in facts["sizes"].most_common(20)}
            found[which] = facts
        return found

    # ------------------------------------------------------------ reading

    def _extract(self, which: str) -> None:
        pictures = self._sets[which]
        for name, extractor in self._extractors.items():
            asked = [m for m in self.metrics.values() if m.extractor == name and getattr(m, which)]
            if not asked:
                continue
            keep = any(getattr(m, which) == "rows" for m in asked)
            found = self._found[which, name] = features.extract(
                extractor,
                pictures,
                batch_size=self.settings.batch_size,
                outputs=sorted({m.output for m in asked}),
                keep=keep or (which == "fake" and self.settings.bootstrap > 0),
            )
            if which not in self._facts:
                self._facts[which] = self._checked(which, pictures, found)

    def _checked(self, which: str, pictures: PictureSet, found) -> dict[str, Any]:
        """The facts found by reading a set; refuses unreadable pictures."""
        bad = [
            (name, ": ".join(reason.splitlines()))
            for name, reason in (*pictures.damaged, *found.bad)
        ]
        if bad and "corrupt" not in self.settings.allow:
            shown = ", ".join(f"{_printable(name)} ({reason})" for name, reason in bad[:_LISTED])
            table = "\n".join(f"  {_printable(name)}  {reason}" for name, reason in bad)
            raise errors.DataError(
                f"{len(bad)} of {len(pictures) + len(pictures.damaged)} {which} pictures in "
                f"{pictures.source} cannot be read: {shown}{', …' if len(bad) > _LISTED else ''}; "
                "--allow corrupt leaves them out and counts them",
                table if len(bad) > _LISTED else "",
            )
        if bad:
            self.warnings.append(f"{which}: {len(bad)} unreadable pictures were left out")
        if found.count < 2:
            raise errors.ConfigError(
                f"{pictures.source}: {found.count} {which} picture can be "
                "read; at least 2 are needed"
            )
        if which == "fake" and self.captions and found.bad:
            lost = {name for name, _ in found.bad}
            self.captions = [
                texts for i, texts in enumerate(self.captions) if pictures.name(i) not in lost
            ]
        notes = describe_notes(collectives.bitwise_or(pictures.notes))
        self.warnings += [
            f"{which}: {count} of {found.count} pictures are {what}"
            for what, count in notes.items()
        ]
        if pictures.left_out:
            self.warnings.append(
                f"{which}: {len(pictures.left_out)} grids of pictures were left "
                f"out ({pictures.left_out[0]} …)"
            )
        return {
            "source": pictures.source,
            "count": found.count,
            "listing_sha256": listing_hash(pictures),
            "content_sha256": self._content_hash(which, pictures),
            "sizes": Counter({_size(size): n for size, n in found.sizes.items()}),
            "notes": notes,
            "unreadable": [[_printable(name), reason] for name, reason in bad],
        }

    def _content_hash(self, which: str, pictures: PictureSet) -> str | None:
        """Of the reference, where its key needs it."""
        needed = which == "real" and "real" not in self.settings.named
        return content_hash(pictures) if needed else None

    def _refuse_sizes(self, sizes: Mapping[str, Counter]) -> None:
        every = sum(sizes.values(), Counter())
        if len(every) < 2:
            return
        listed = "; ".join(
            f"{which} "
            + ", ".join(f"{size} ({n})" for size, n in found.most_common(_LISTED))
            + (", …" if len(found) > _LISTED else "")
            for which, found in sizes.items()
        )
        tried = "" if self._facts else f", of {every.total()} looked at first"
        if "sizes" not in self.settings.allow:
            raise errors.ConfigError(
                f"pictures have different sizes{tried}: {listed}; --crop N makes the centre "
                "squares one size, --allow sizes measures them as they are"
            )
        if self._facts:  # all were read, not only some probed
            self.warnings.append(f"pictures have different sizes: {listed}")

    def _aligned(self, captions) -> list[list[str]]:
        """A list of texts for every fake picture; [] where nothing needs them."""
        need = {name: m.captions for name, m in self.metrics.items() if m.captions}
        if not need or self.fake is None:
            return []
        name = max(need, key=need.get)
        if captions is None:
            lists = caption_files.own(self.fake)
            if lists is None:
                raise errors.ConfigError(
                    f"{name} needs the caption of every picture, and "
                    f"{self.fake.source} has none: give --captions FILE"
                )
        else:
            lists = [[texts] if isinstance(texts, str) else list(texts) for texts in captions]
        if len(lists) != len(self.fake):
            raise errors.ConfigError(
                f"{len(lists)} captions for the {len(self.fake)} pictures of {self.fake.source}"
            )
        few = sum(len(texts) < need[name] for texts in lists)
        if few:
            raise errors.ConfigError(
                f"{name} needs a caption and references of every picture; "
                f"{few} of {len(lists)} have fewer than 2 texts"
            )
        return lists

    # ------------------------------------------------------------ statistics from a file

    def _stored(self, name: str) -> Statistics:
        """The real side's statistics for a metric, where they are of the same features."""
        file, wanted, extractor = self.real, self.feature(name), self.extractor(name)
        # Other tools' files have the same names whichever way their pictures were resized.
        found = file.of(wanted if file.ours else self.metrics[name].output)
        theirs = found.provenance
        # The network's own hash is of any container; files of older versions have that of the file.
        network = "network_sha256" if "network_sha256" in theirs else "weights_sha256"
        for what, ours in (
            ("extractor", extractor.id),
            (network, extractor.provenance.get(network)),
        ):
            known = theirs.get(what, ours)
            if ours and known != ours and (what != "extractor" or known != _HASH.sub("", ours)):
                raise errors.ConfigError(
                    f"{file.path} was measured with {what} {theirs[what]}, {name} needs {ours}"
                )
        if len(found.mean) != self.width(name):
            raise errors.ConfigError(
                f"{file.path}: {wanted} is {len(found.mean)} wide, expected {self.width(name)}"
            )
        if not file.ours:
            self.warnings.append(
                f"{file.path} does not say which resize its {wanted} was made "
                f"with; {name} assumes {extractor.id}"
            )
        if found.count is None:
            self.warnings.append(
                f"{file.path} does not say of how many pictures it is, and a "
                "Fréchet distance depends on that"
            )
        return found

    def _real_hash(self, name: str) -> str:
        """sha256 (hex) of the reference's pictures, or of a metric's statistics of them."""
        if not isinstance(self.real, StatisticsFile):
            return self._facts["real"]["content_sha256"]
        found = self._stored(name)
        known = found.provenance.get("pictures", {}).get("content_sha256")
        return (
            known or hashlib.sha256(found.mean.tobytes() + found.covariance.tobytes()).hexdigest()
        )

    def _source(self, which: str, name: str) -> dict[str, Any]:
        facts = self._facts[which]
        names = ("source", "listing_sha256", "content_sha256", "notes")
        pictures = {key: facts[key] for key in names}
        pictures["sizes"] = dict(facts["sizes"].most_common(20))
        extractor = self.extractor(name)
        return extractor.provenance | {"extractor": extractor.id, "pictures": pictures}


# A sweep measures set after set with the same networks: they are kept, with their programs, until
# their files change or other networks have replaced them.
@functools.lru_cache(maxsize=4)
def _extractor(name: str, path: str, signature: tuple) -> features.Extractor:
    kind, _, mode = name.partition(".")
    if kind == "inception":
        return features.inception_extractor(path, mode)
    if kind == "clip":
        return embedders.clip_extractor(path, mode)
    return embedders.dinov2_extractor(path)


@functools.lru_cache(maxsize=1)
def _encoder(path: str, signature: tuple) -> embedders.CaptionEncoder:
    return embedders.CaptionEncoder(path)


def _signature(path: str) -> tuple:
    """Sizes and times that change with the weights at a path: a file, a bundle or a run."""
    if not os.path.isdir(path):
        inside = [path] if os.path.isfile(path) else []
    else:
        inside = sorted(entry.path for entry in os.scandir(path))
    return tuple((name, (s := os.stat(name)).st_mtime_ns, s.st_size) for name in inside)


def _text_hash(texts: list[list[str]]) -> str:
    """sha256 (hex) of lists of captions in order."""
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()


def _probe(pictures: PictureSet) -> Counter:
    """Sizes of a few pictures from all over the set, to find most mixtures before hours of work."""
    sizes: Counter = Counter()
    for i in np.unique(np.linspace(0, len(pictures) - 1, _PROBES).astype(int)):
        try:
            sizes[_size(pictures.read(int(i)).shape)] += 1
        except BadSample:
            continue  # reported with the others when all are read
    return sizes


def _size(shape) -> str:
    """(height, width, …) as WIDTHxHEIGHT."""
    return shape if isinstance(shape, str) else f"{shape[1]}x{shape[0]}"


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
