"""Sets of pictures compared by name: FID and related distances, fidelity, diversity, text fit.

Such numbers have a meaning only together with the features, the resize, the number of pictures, the
reference, the captions and the protocol, so a value's key contains all of these: equal keys mean
equal measurements. The result has warnings and provenance for whatever else can change it.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from unclip import errors
from unclip.files.moments import Statistics, StatisticsFile
from unclip.measure import (
    clip_score,
    frechet,
    inception_score,
    kernel,
    neighbours,
)
from unclip.measure.embedders import HESSEL_PREFIX
from unclip.measure.inception_extractor import HELP
from unclip.measure.measurement import Measurement, Metric, Settings
from unclip.measure.picture_set import PictureSet

ALLOW = ("corrupt", "sizes")
NAMED = ("real", "captions", "size")
ALIASES = {"prdc": ("pr", "dc"), "prdc-clip": ("pr-clip", "dc-clip")}
KID_SUBSETS, KID_SIZE, KID_SEED = 100, 1000, 2020
IS_SPLITS, IS_SEED, IS_SPLIT_SIZE = 10, 2020, 5000
PR_NEIGHBOURS, DC_NEIGHBOURS = 3, 5
CMMD_SIGMA, CMMD_SCALE = 10, 1000
INFINITY_POINTS = 15
MEAN_RESAMPLES = 1000
WEIGHTS = {
    "inception": f"FID's Inception network as --inception: {HELP} (give it --clip)",
    "clip": "a CLIP: give --clip, a BUNDLE or RUN that holds one",
    "dinov2": "DINOv2: give --dinov2, its folder or file, or a bundle (unclip convert --from "
    "dinov2)",
}


@dataclasses.dataclass
class Result:
    """What was measured.

    Attributes:
      values: a dict per value: "metric", "key" (everything that defines it), "value", "n_real",
        "n_fake", and where they exist "std" and "interval" [low, high] of 95 %.
      warnings: what else changes the values, a line each.
      scores: {metric: float64 [n_fake]}, a score for every picture, of metrics that have one.
      provenance: sources, lists of pictures, weights and versions, JSON-able.
      statistics: {feature: Statistics} of the real pictures; features: {feature: float32 [N, D]}
        of those that a metric reads row by row. For `moments.write_statistics`.
    """

    values: list[dict[str, Any]]
    warnings: list[str]
    provenance: dict[str, Any]
    statistics: dict[str, Statistics] = dataclasses.field(default_factory=dict)
    features: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    scores: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def json(self) -> str:
        """Values, warnings and provenance as one JSON object."""
        fields = {"values": self.values, "warnings": self.warnings, "provenance": self.provenance}
        return json.dumps(fields, indent=2, allow_nan=False)

    def table(self) -> str:
        """The values as aligned columns, then the warnings."""
        rows = [("metric", "value", "std", "95 % interval", "key")]
        for value in self.values:
            low, high = value.get("interval", (None, None))
            rows.append(
                (
                    value["metric"],
                    f"{value['value']:.6g}",
                    f"{value['std']:.3g}" if "std" in value else "",
                    f"{low:.5g} … {high:.5g}" if low is not None else "",
                    value["key"],
                )
            )
        used = [k for k in range(5) if any(row[k] for row in rows[1:])]
        widths = {k: max(len(row[k]) for row in rows) for k in used}
        lines = [
            "  ".join(
                row[k].rjust(widths[k]) if k in (1, 2) else row[k].ljust(widths[k]) for k in used
            ).rstrip()
            for row in (rows if self.values else ())
        ]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def measure(
    real: PictureSet | StatisticsFile | None,
    fake: PictureSet | None,
    metrics: Sequence[str],
    *,
    inception: str | os.PathLike | None = None,
    clip: str | os.PathLike | None = None,
    dinov2: str | os.PathLike | None = None,
    captions: Sequence[str] | Sequence[Sequence[str]] | None = None,
    batch_size: int = 64,
    allow: Iterable[str] = (),
    seed: int = 0,
    candidates: int = 100,
    bootstrap: int = 0,
    protocol: str = "",
    named: Iterable[str] = (),
) -> Result:
    """Measures pictures; every process of a job calls it and gets the same result.

    Args:
      real: the reference: pictures, a file of statistics, or None where no metric compares.
      fake: the pictures to judge; None only gathers the statistics of `real` that `metrics` need.
      metrics: names in `METRICS` or `ALIASES`.
      inception: FID's Inception network, a file or a bundle; clip: BUNDLE or RUN; dinov2: bundle,
        folder or file. Only those that the metrics read are needed.
      captions: of `fake`, in order; a text per picture, or a list of which the first is the
        caption and the others are references. None: the captions that `fake` has.
      batch_size: pictures on the devices at once; no value depends on it.
      allow: "corrupt" leaves unreadable pictures out and counts them, "sizes" accepts pictures of
        several sizes.
      seed: of random draws: r_precision's candidates, fid-infinity, bootstraps.
      candidates: captions that r_precision chooses from.
      bootstrap: resamples for the interval of Fréchet distances, 0 for none. It is computed where
        there are at least twice as many pictures as features; with fewer, bias exceeds noise.
      protocol: id of how prompts and reference were chosen; becomes part of every key.
      named: of `NAMED`, what that id already identifies; keys have fingerprints of the others.

    Raises:
      ConfigError: an unknown metric, missing weights, captions or reference, pictures of several
        sizes, fewer than two of them, statistics of other features.
      DataError: pictures that cannot be read. NumericsError: NaN features.
    """
    names, allow = expand(metrics), frozenset(allow)
    for name in sorted(allow - set(ALLOW)):
        raise errors.unknown("--allow", name, ALLOW)
    for name in sorted(set(named) - set(NAMED)):
        raise errors.unknown("part of a protocol's id", name, NAMED)
    weights = {"inception": inception, "clip": clip, "dinov2": dinov2}
    check_needs(names, weights, real=real is not None, fake=fake is not None)
    settings = Settings(batch_size, allow, seed, candidates, bootstrap, protocol, frozenset(named))
    run = Measurement(
        real, fake, {name: METRICS[name] for name in names}, weights, captions, settings
    )
    values = []
    for name in names if fake is not None else ():
        values += [_labelled(run, name, row) for row in METRICS[name].compute(run, name)]
    if fake is not None and any(METRICS[name].real for name in names):
        counts = run.count("real"), run.count("fake")
        if None not in counts and counts[0] != counts[1]:
            run.warnings.append(
                f"{counts[0]} real and {counts[1]} fake pictures: distances depend "
                "on both numbers and can be compared only at equal ones"
            )
    warnings = list(dict.fromkeys(run.warnings))
    return Result(values, warnings, run.provenance(), *run.kept(), run.scores)


def expand(metrics: Sequence[str]) -> list[str]:
    """Names of `METRICS` with aliases spelt out, each once. Raises ConfigError: unknown, none."""
    names: dict[str, None] = {}
    for name in metrics:
        if name not in METRICS and name not in ALIASES:
            raise errors.unknown("metric", name, [*METRICS, *ALIASES])
        names |= dict.fromkeys(ALIASES.get(name, (name,)))
    if not names:
        raise errors.ConfigError(f"no metric given; valid: {', '.join([*METRICS, *ALIASES])}")
    return list(names)


def check_needs(names: Sequence[str], weights: dict[str, Any], *, real: bool, fake: bool) -> None:
    """Refuses what cannot be measured, before any file is read.

    Raises:
      ConfigError: a metric without its weights, or without a set that it reads.
    """
    for name in names:
        kind = METRICS[name].extractor.partition(".")[0]
        if weights[kind] is None:
            raise errors.ConfigError(f"{name} needs {WEIGHTS[kind]}")
        if METRICS[name].real and not real:
            raise errors.ConfigError(f"{name} compares with real pictures: give --real")
        if not METRICS[name].real and not fake:
            raise errors.ConfigError(f"{name} is computed from fake pictures: give --fake")


def _labelled(run: Measurement, name: str, row: dict[str, Any]) -> dict[str, Any]:
    row = dict(row)
    shown, detail = row.pop("name", name), row.pop("detail", "")
    if not math.isfinite(row["value"]):
        raise errors.NumericsError(f"{shown} is {row['value']}")
    count, protocol = run.count("fake"), run.settings.protocol
    which = run.fingerprints(name)
    parts = (shown, run.extractor(name).id, detail, protocol, *which, f"N={count}")
    real = run.count("real") if METRICS[name].real else None
    return {
        "metric": shown,
        "key": "/".join(filter(None, parts)),
        **row,
        "n_real": real,
        "n_fake": count,
    }


# ============================================================ each metric


def _frechet(run: Measurement, name: str) -> list[dict[str, Any]]:
    real, fake = run.statistics("real", name), run.statistics("fake", name)
    row: dict[str, Any] = {"value": frechet.distance(fake, real)}
    _warn_of_few(run, name, real)
    settings = run.settings
    if settings.bootstrap and fake.count >= 2 * run.width(name):
        rows = run.rows("fake", name)
        row["interval"] = list(frechet.bootstrap(rows, real, settings.bootstrap, settings.seed))
    elif settings.bootstrap:
        run.warnings.append(
            f"{name}: no interval, {fake.count} pictures are fewer than twice the "
            f"{run.width(name)} features"
        )
    return [row]


def _infinity(run: Measurement, name: str) -> list[dict[str, Any]]:
    real = run.statistics("real", name)
    _warn_of_few(run, name, real)
    seed = run.settings.seed
    value, _ = frechet.infinity(run.rows("fake", name), real, INFINITY_POINTS, seed)
    return [{"value": value, "detail": f"points={INFINITY_POINTS}.seed={seed}"}]


def _warn_of_few(run: Measurement, name: str, real: Statistics) -> None:
    width = run.width(name)
    for which, count in (("real", real.count), ("fake", run.count("fake"))):
        if count is not None and count < width:
            run.warnings.append(
                f"{name}: {count} {which} pictures are fewer than the {width} features: the "
                "covariance is singular and the distance is mostly bias"
            )


def _score(run: Measurement, name: str) -> list[dict[str, Any]]:
    logits = run.rows("fake", name)
    count = len(logits)
    if name == "is":
        value, std = inception_score.inception_score(logits, IS_SPLITS, IS_SEED)
        detail, least = f"splits={IS_SPLITS}.seed={IS_SEED}", count // IS_SPLITS
    else:
        value, std = inception_score.openai(logits, IS_SPLIT_SIZE)
        detail, least = f"split_size={IS_SPLIT_SIZE}", count % IS_SPLIT_SIZE or IS_SPLIT_SIZE
    if least < IS_SPLIT_SIZE:
        run.warnings.append(
            f"{name}: a split has only {least} pictures, the usual "
            f"{IS_SPLIT_SIZE}; the score rises with that number"
        )
    return [{"value": value, "std": std, "detail": detail}]


def _kid(run: Measurement, name: str) -> list[dict[str, Any]]:
    fake, real = run.rows("fake", name), run.rows("real", name)
    size = min(KID_SIZE, len(fake), len(real))
    if size < KID_SIZE:
        run.warnings.append(f"{name}: subsets of {size} pictures, there are no {KID_SIZE} a side")
    value, std = kernel.kid(fake, real, KID_SUBSETS, size, KID_SEED)
    return [{"value": value, "std": std, "detail": f"subsets={KID_SUBSETS}x{size}.seed={KID_SEED}"}]


def _pr(run: Measurement, name: str) -> list[dict[str, Any]]:
    real, fake = run.rows("real", name), run.rows("fake", name)
    values = neighbours.precision_recall(real, fake, PR_NEIGHBOURS)
    suffix = name.removeprefix("pr")  # "-clip" of another network than Inception
    return [
        {"name": shown + suffix, "value": value, "detail": f"k={PR_NEIGHBOURS}"}
        for shown, value in zip(("precision", "recall", "f_score"), values)
    ]


def _dc(run: Measurement, name: str) -> list[dict[str, Any]]:
    real, fake = run.rows("real", name), run.rows("fake", name)
    values = neighbours.density_coverage(real, fake, DC_NEIGHBOURS)
    suffix = name.removeprefix("dc")
    return [
        {"name": shown + suffix, "value": value, "detail": f"k={DC_NEIGHBOURS}"}
        for shown, value in zip(("density", "coverage"), values)
    ]


def _cmmd(run: Measurement, name: str) -> list[dict[str, Any]]:
    value = kernel.cmmd(run.rows("real", name), run.rows("fake", name), CMMD_SIGMA, CMMD_SCALE)
    return [{"value": value, "detail": f"sigma={CMMD_SIGMA}.scale={CMMD_SCALE}"}]


def _mean(run: Measurement, name: str, scores: np.ndarray) -> list[dict[str, Any]]:
    """The mean of scores, one per picture, and the bootstrap interval of that mean."""
    run.scores[name] = scores
    generator = np.random.default_rng(run.settings.seed)
    count = len(scores)
    draws = [scores[generator.integers(0, count, count)].mean() for _ in range(MEAN_RESAMPLES)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return [{"value": float(scores.mean()), "interval": [float(low), float(high)]}]


def _hessel(run: Measurement, name: str) -> list[dict[str, Any]]:
    z_t = run.texts(prefix=HESSEL_PREFIX)
    return _mean(run, name, clip_score.hessel(run.rows("fake", name), z_t))


def _references(run: Measurement, name: str) -> list[dict[str, Any]]:
    z_t = run.texts(prefix=HESSEL_PREFIX)
    others = run.texts(prefix=HESSEL_PREFIX, references=True)
    return _mean(run, name, clip_score.ref_clip_score(run.rows("fake", name), z_t, others))


def _torchmetrics(run: Measurement, name: str) -> list[dict[str, Any]]:
    z_t = run.texts(truncate="slice")
    return [{"value": clip_score.torchmetrics(run.rows("fake", name), z_t)}]


def _cosine(run: Measurement, name: str) -> list[dict[str, Any]]:
    return _mean(run, name, clip_score.cosine(run.rows("fake", name), run.texts()))


def _r_precision(run: Measurement, name: str) -> list[dict[str, Any]]:
    texts = [texts[0] for texts in run.captions]
    wanted, seed, distinct = run.settings.candidates, run.settings.seed, len(set(texts))
    candidates = min(wanted, distinct)
    if candidates < wanted:
        run.warnings.append(
            f"{name}: {candidates} candidates, there are no {wanted} different captions"
        )
    value = clip_score.r_precision(
        run.rows("fake", name), run.texts(), candidates, seed, captions=texts
    )
    return [{"value": value, "detail": f"candidates={candidates}.seed={seed}"}]


_frechet_on = functools.partial(Metric, compute=_frechet, real="statistics", fake="statistics")
_text_on = functools.partial(Metric, output="z_i", real="", captions=1)
METRICS: dict[str, Metric] = {
    "fid": _frechet_on(
        "Fréchet distance on Inception, TensorFlow's resize: the original FID",
        "inception.tf1",
        "pool3",
    ),
    "fid-clean": _frechet_on("FID with clean-fid's antialiased resize", "inception.clean", "pool3"),
    "fid-pytorch": _frechet_on("FID as pytorch-fid resizes", "inception.pytorch-fid", "pool3"),
    "fid-infinity": Metric(
        "FID extrapolated to infinitely many fake pictures",
        "inception.tf1",
        "pool3",
        _infinity,
        real="statistics",
    ),
    "sfid": _frechet_on(
        "Fréchet distance on Inception's spatial features", "inception.tf1", "spatial"
    ),
    "is": Metric(
        "Inception score, torch-fidelity's splits",
        "inception.tf1",
        "logits_unbiased",
        _score,
        real="",
    ),
    "is-openai": Metric(
        "Inception score, OpenAI's splits", "inception.tf1", "logits_unbiased", _score, real=""
    ),
    "kid": Metric("kernel Inception distance", "inception.tf1", "pool3", _kid),
    "kid-clean": Metric(
        "KID with clean-fid's antialiased resize", "inception.clean", "pool3", _kid
    ),
    "pr": Metric("precision and recall on Inception", "inception.tf1", "pool3", _pr),
    "dc": Metric("density and coverage on Inception", "inception.tf1", "pool3", _dc),
    "pr-clip": Metric("precision and recall on CLIP", "clip.openai", "z_i", _pr),
    "dc-clip": Metric("density and coverage on CLIP", "clip.openai", "z_i", _dc),
    "clip_score": _text_on("CLIP score of Hessel et al.", "clip.openai", compute=_hessel),
    "clip_score-torchmetrics": _text_on(
        "CLIP score as torchmetrics has it", "clip.transformers", compute=_torchmetrics
    ),
    "clip_cosine": _text_on("mean cosine of picture and caption", "clip.openai", compute=_cosine),
    "ref_clip_score": _text_on(
        "RefCLIPScore of Hessel et al.", "clip.openai", compute=_references, captions=2
    ),
    "r_precision": _text_on(
        "how often CLIP picks a picture's own caption", "clip.openai", compute=_r_precision
    ),
    "cmmd": Metric("maximum mean discrepancy on CLIP", "clip.cmmd", "z_i", _cmmd),
    "fd-clip": _frechet_on("Fréchet distance on CLIP; not an FID", "clip.openai", "z_i"),
    "fd-dinov2": _frechet_on("Fréchet distance on DINOv2", "dinov2.hub", "cls"),
}
