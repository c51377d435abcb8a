"""How fast pairs are read, decoded, resized, tokenised and batched, and what training that feeds.

Each phase of that work is timed by itself on one thread, then all of it together through the source
that training uses.
"""

import dataclasses
import itertools
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from unclip.errors import ConfigError, DataError
from unclip.input import captions as caption_sources
from unclip.input.decode import image as pictures
from unclip.input.decode.transforms import ImageText
from unclip.input.filters import Filters
from unclip.input.samples import BadSample, Sample
from unclip.input.source import make_source

PHASES = ("read", "decode", "resize", "tokenise", "batch")
PAPER = {  # stage: global batch size, appendix C of arXiv 2204.06125
    "clip": 32_768,
    "prior": 4096,
    "decoder": 2048,
    "upsampler 64→256": 1024,
    "upsampler 256→1024": 512,
}
_SAMPLES = 256
_HELD_BYTES = 256 << 20  # of pictures kept in memory to time one phase alone


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What was measured.

    Attributes:
      samples: how many were looked at; bad: of them, by reason.
      encoded: mean bytes of a picture file; pixels: its mean width x height.
      seconds: of one sample by phase (`PHASES`), one thread.
      one_core: samples a second of the source with one thread; total: with `threads` and `workers`.
      cores: this process may use.
    """

    samples: int
    bad: dict[str, int]
    encoded: float
    pixels: float
    seconds: dict[str, float]
    one_core: float
    total: float
    threads: int
    workers: int
    cores: int

    def sustained(self, batch: int) -> float:
        """The least seconds a step of `batch` samples per host can take."""
        return batch / self.total

    def cores_for(self, batch: int, step_seconds: float) -> int:
        """Cores, of all hosts together, that feed a global batch in `step_seconds`."""
        return math.ceil(batch / step_seconds / self.one_core)

    def to_json(self) -> dict[str, Any]:
        """All fields, and the cores that the batch sizes of `PAPER` need."""
        return dataclasses.asdict(self) | {
            "cores_for_a_step_a_second": {n: self.cores_for(b, 1.0) for n, b in PAPER.items()}
        }

    def table(self) -> str:
        """The same as text."""
        whole = sum(self.seconds.values())  # of a sample
        rows = [("stage", "ms a sample", "samples/s a core", "share")]
        rows += [
            (name, f"{1e3 * s:.3f}", _rate(s), f"{s / whole:.0%}")
            for name, s in self.seconds.items()
        ]
        rows += [
            ("sum of the stages", f"{1e3 * whole:.3f}", _rate(whole), "100%"),
            (
                "source, 1 thread",
                f"{1e3 / self.one_core:.3f}",
                f"{self.one_core:,.0f}",
                f"{1 / self.one_core / whole:.0%}",
            ),
        ]
        how = _parallel(self.threads, self.workers)
        lines = [
            f"{self.samples} samples, {sum(self.bad.values())} bad {self.bad or ''}".rstrip()
            + f"; a picture has {self.pixels / 1e6:.2f} megapixels in {self.encoded:,.0f} "
            "bytes",
            "",
            *_columns(rows),
            "",
            f"{self.total:,.0f} samples/s in total, {how}, {self.cores} cores",
            "",
        ]
        rows = [
            (
                "training of the paper",
                "global batch",
                "least seconds a step, this host",
                "cores for a step a second",
            )
        ]
        rows += [
            (name, f"{batch:,}", f"{self.sustained(batch):.2f}", f"{self.cores_for(batch, 1.0):,}")
            for name, batch in PAPER.items()
        ]
        feeds = ", ".join(
            f"{math.floor(seconds * self.total):,} samples in {seconds} s"
            for seconds in (0.1, 0.25, 1)
        )
        return "\n".join([*lines, *_columns(rows), "", f"this host feeds steps of {feeds}"])


def _rate(seconds: float) -> str:
    return f"{1 / seconds:,.0f}" if seconds else "-"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in rows
    ]


def measure(
    collection: Any,
    transform: ImageText,
    *,
    batch_size: int = 64,
    threads: int = 1,
    workers: int = 0,
    seconds: float = 5.0,
    seed: int = 0,
    tell: Callable[[str], Any] = lambda what: None,
) -> Throughput:
    """Times the phases one by one on this thread, then the source with 1 and with all threads.

    What is read a second time comes from the operating system's memory, so "read" is what a page
    cache or a filled block cache gives, not a cold disk.

    Args:
      collection: of `shards.open_shards`.
      transform: what a sample becomes; its picture's size may not be None.
      batch_size: samples per batch, of this host.
      threads, workers: of the source, as in training.
      seconds: for each of the 7 measurements, the 5 phases and the source twice.
      seed: which samples.
      tell: called with the name of what is measured next.

    Raises:
      ConfigError: sizes that do not fit.
      DataError: there is no good sample, or the shards cannot be read.
    """
    if seconds <= 0 or batch_size < 1:
        raise ConfigError(f"seconds {seconds}, batch size {batch_size}: expected both above 0")
    if transform.size is None:
        raise ConfigError("the transform delivers no picture: there is no decoding to measure")
    tell("samples")
    usable, bad = _usable(collection, transform, seed)
    if not usable:
        raise DataError(f"none of {sum(bad.values())} samples can be used: {dict(bad)}")

    def rng() -> np.random.Generator:
        return np.random.default_rng(seed)

    texts = [transform.caption(one.sample, rng()) for one in usable]
    row = transform(usable[0].sample, rng())
    work = {
        "read": lambda k: collection.read(usable[k].i),
        "decode": lambda k: pictures.decode(
            usable[k].sample.image, target=transform.target, **transform.limits
        ),
        "resize": lambda k: pictures.resize_and_crop(
            usable[k].decoded,
            transform.size,
            crop=transform.crop,
            fraction=transform.fraction,
            rng=rng(),
        ),
        "tokenise": lambda k: transform.tokenise([texts[k]], transform.context_length),
        "batch": lambda k: {name: np.stack([row[name]] * batch_size) for name in row},
    }
    phases = {}
    for phase in PHASES:
        tell(phase)
        taken = _each(work[phase], len(usable), seconds)
        phases[phase] = taken / batch_size if phase == "batch" else taken

    def through_source(threads: int, workers: int) -> float:
        with make_source(
            collection,
            transform,
            batch_size=batch_size,
            seed=seed,
            threads=threads,
            workers=workers,
            max_bad_fraction=1.0,
        ) as batches:
            for _ in range(2 + 2 * workers):  # leaves out what was prefetched while it started
                next(batches)
            return batch_size / _each(lambda k: next(batches), 1, seconds)

    tell("source, 1 thread")
    one_core = through_source(1, 0)
    tell(f"source, {_parallel(threads, workers)}")
    return Throughput(
        samples=len(usable) + sum(bad.values()),
        bad=dict(bad),
        encoded=statistics.fmean(len(one.sample.image) for one in usable),
        pixels=statistics.fmean(one.pixels for one in usable),
        seconds=phases,
        one_core=one_core,
        total=one_core if (threads, workers) == (1, 0) else through_source(threads, workers),
        threads=threads,
        workers=workers,
        cores=len(os.sched_getaffinity(0)),
    )


class _Usable(NamedTuple):
    i: int
    sample: Sample
    pixels: int  # of the whole picture
    decoded: np.ndarray


def _usable(collection: Any, transform: ImageText, seed: int) -> tuple[list[_Usable], Counter]:
    """A few hundred samples with their decoded pictures, and the reasons of those left out."""
    rng, usable, bad, held = np.random.default_rng(seed), [], Counter(), 0
    for i in map(int, rng.integers(len(collection), size=_SAMPLES)):
        try:
            sample = collection.read(i)
            transform.caption(sample, rng)
            height, width, _ = pictures.decode(sample.image, **transform.limits).shape
            decoded = pictures.decode(sample.image, target=transform.target, **transform.limits)
        except BadSample as error:
            bad[error.reason] += 1
            continue
        usable.append(_Usable(i, sample, width * height, decoded))
        held += len(sample.image) + decoded.nbytes
        if held > _HELD_BYTES:
            break
    return usable, bad


def _each(work: Callable[[int], Any], count: int, seconds: float) -> float:
    """Mean seconds of work(0), …, work(count - 1), repeated until `seconds` have passed."""
    start = time.perf_counter()
    for done in itertools.count(1):
        work(done % count)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return elapsed / done


def _parallel(threads: int, workers: int) -> str:
    return f"{workers} workers" if workers else f"{threads} threads"


def kept(
    collection: Any,
    filters: Filters,
    *,
    captions: Sequence[str] = caption_sources.STANDARD,
    seed: int = 0,
    count: int = 1000,
) -> dict[str, Any]:
    """What filters do to `count` samples drawn at random: {"of", "kept" (part), "rejected"}.

    Rules on captions see the first that a sample has; samples that cannot be read are left out.
    """
    reasons = Counter()
    for i in map(int, np.random.default_rng(seed).integers(len(collection), size=count)):
        try:
            sample = collection.read(i)
        except BadSample:
            continue
        reasons[filters(sample.meta, caption_sources.first(sample, captions))] += 1
    of, passed = sum(reasons.values()), reasons.pop("", 0)
    return {"of": of, "kept": passed / max(of, 1), "rejected": dict(reasons.most_common())}
