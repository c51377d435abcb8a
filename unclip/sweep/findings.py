"""Results over all cells of a sweep: lines over an axis, each model's best cell, claims.

Models are compared at the best setting of each, as in section 5 of arXiv 2204.06125. A record is an
item of `store.read_cells`. Values are averaged over seeds.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from unclip import errors

# Prefixes of metrics of which lower values are better, and higher; protocols' judges have both.
LESS = ("fid", "sfid", "kid", "cmmd", "fd")
MORE = (
    "is",
    "precision",
    "recall",
    "f_score",
    "density",
    "coverage",
    "clip_score",
    "clip_cosine",
    "ref_clip_score",
    "r_precision",
)
RISE = "rise:"
QUALITY = ("fid", "fid-clean", "fid-pytorch", "fd-dinov2", "fd-clip", "cmmd", "kid")
ALIGNMENT = ("clip_score", "clip_score-torchmetrics", "clip_cosine", "r_precision")


def axes_of(records: Iterable[Mapping]) -> list[str]:
    """Every axis of the records, in their order."""
    return list(dict.fromkeys(axis for record in records for axis in record["settings"]))


def varied(records: Sequence[Mapping]) -> list[str]:
    """The axes in which the records differ."""
    seen = lambda axis: {json.dumps(record["settings"].get(axis)) for record in records}
    return [axis for axis in axes_of(records) if len(seen(axis)) > 1]


def telling(records: Sequence[Mapping]) -> list[str]:
    """The axes in which the records of one model differ, which a cell's name must therefore
    give."""
    models = [[r for r in records if r["settings"].get("model") == m] for m in models_of(records)]
    found = {axis for mine in models for axis in varied(mine)}
    return [axis for axis in axes_of(records) if axis in found]


def values_of(record: Mapping) -> dict[str, float]:
    """{metric key: value} of a record."""
    return {value["key"]: float(value["value"]) for value in record["values"]}


def keys_of(records: Iterable[Mapping]) -> list[str]:
    """Every metric key, in the order in which they first appear."""
    return list(dict.fromkeys(value["key"] for record in records for value in record["values"]))


def metric_of(key: str) -> str:
    """The metric's name, which its key begins with."""
    return key.partition("/")[0]


def is_less(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric.partition("-")[0] in LESS


def sort_key(value: Any) -> tuple:
    """Orders values of an axis, None first."""
    return (value is not None, isinstance(value, str), 0 if value is None else value)


def name_of(settings: Mapping, axes: Iterable[str]) -> str:
    """The name of a cell or line: its model and the values of the axes given."""
    words = [str(settings.get("model", ""))]
    for axis in axes:
        value = settings.get(axis)
        if axis != "model" and value is not None:
            words.append(f"{axis} {value:g}" if isinstance(value, int | float) else str(value))
    return ", ".join(words)


def lines(
    records: Sequence[Mapping], x: str, y: str, along: str
) -> dict[str, list[tuple[float, float, float]]]:
    """{line: [(value of axis `along`, x, y)]}, one line for each setting of all other axes.

    Seeds are averaged.

    Args:
      x: a metric's key, or "" for the axis itself; y: a metric's key.
    """
    others = [axis for axis in telling(records) if axis not in (along, "seed")]
    grouped: dict[tuple, list[Mapping]] = {}
    for record in records:
        values, at = values_of(record), record["settings"].get(along)
        if at is not None and y in values and (not x or x in values):
            grouped.setdefault((name_of(record["settings"], others), at), []).append(values)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for (name, at), same in sorted(grouped.items()):
        mean = lambda key, same=same: float(np.mean([values[key] for values in same]))
        found.setdefault(name, []).append((at, mean(x) if x else at, mean(y)))
    return found


def by_seed(records: Iterable[Mapping]) -> list[list[Mapping]]:
    """The records in groups that differ only in their seed."""
    groups: dict[str, list[Mapping]] = {}
    for record in records:
        settings = {axis: v for axis, v in record["settings"].items() if axis != "seed"}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(record)
    return list(groups.values())


def mean_of(group: Sequence[Mapping], key: str) -> float | None:
    """A metric's mean over a group, None where no record of it has the metric."""
    have = [values_of(record)[key] for record in group if key in values_of(record)]
    return float(np.mean(have)) if have else None


def best(records: Sequence[Mapping], key: str) -> list[Mapping]:
    """The cell with the best mean of a metric over seeds, a record per seed; [] if none has it."""
    groups = [group for group in by_seed(records) if mean_of(group, key) is not None]
    pick = min if is_less(metric_of(key)) else max
    return pick(groups, key=lambda group: mean_of(group, key)) if groups else []


def claim_of(claim: Sequence) -> tuple[str, str, str, str, str]:
    """A claim of the config, checked: (statement, metric, model, "<" or ">", model).

    Raises:
      ConfigError: anything else.
    """
    if len(claim) != 5 or not all(isinstance(w, str) for w in claim) or claim[3] not in ("<", ">"):
        raise errors.ConfigError(
            f"claim {tuple(claim)!r}: expected (statement, metric, model, '<' or '>', model)"
        )
    return tuple(claim)


def judged(records: Sequence[Mapping], claims: Sequence[tuple]) -> list[dict[str, Any]]:
    """Whether claims about models hold: rows of a table, from the best cell of each model.

    The metric "rise:fd-clip" is how much worse fd-clip is at a model's largest guidance than at its
    best, the cost of guidance (arXiv 2204.06125, section 5.3).
    """
    rows = []
    for statement, metric, one, sign, two in claims:
        prefix = RISE if metric.startswith(RISE) else ""
        named = metric.removeprefix(RISE)
        for key in [k for k in keys_of(records) if metric_of(k) == named] or [named]:
            a, b = (
                _worth([r for r in records if r["settings"].get("model") == name], key, prefix)
                for name in (one, two)
            )
            row = {"the paper says": statement, "measured": prefix + key, "this": one, "that": two}
            verdict = "not measured"
            if a is not None and b is not None:
                agrees = a < b if sign == "<" else a > b
                verdict = "agrees" if agrees else "does not agree"
            rows.append(row | {"here": verdict, "value": a, "other value": b})
    return rows


def _worth(records: Sequence[Mapping], key: str, prefix: str) -> float | None:
    """A model's best value of a metric, or with "rise:" its cost of guidance; None if missing."""
    least = best(records, key)
    if not least or not prefix:
        return mean_of(least, key)
    scales = [r["settings"].get("guidance") for r in records if key in values_of(r)]
    scales = [scale for scale in scales if scale is not None]
    if len(set(scales)) < 2:
        return None
    most = best([r for r in records if r["settings"].get("guidance") == max(scales)], key)
    difference = mean_of(most, key) - mean_of(least, key)
    return difference if is_less(metric_of(key)) else -difference


def findings(records: Sequence[Mapping], claims: Sequence[tuple]) -> dict[str, list[dict]]:
    """{"models": a row for each model's best cell, "claims": rows of `judged`}.

    The best cell is that of the least distance to real pictures, or where none was measured of the
    best fit to captions. Values are means over its seeds.
    """
    keys, rows = keys_of(records), []
    axes = [axis for axis in telling(records) if axis != "seed"]
    for model, group in best_cells(records).items():
        settings = {axis: group[0]["settings"].get(axis) for axis in axes}
        means = {key: mean_of(group, key) for key in keys}
        rows.append({"model": model, **settings, "seeds": len(group), **means})
    return {"models": rows, "claims": judged(records, claims)}


def best_cells(records: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    """{model: the records of its best cell, one per seed}."""
    ranked = [m for m in (*QUALITY, *ALIGNMENT) if m in map(metric_of, keys_of(records))]
    found = {}
    for model in models_of(records):
        mine = [record for record in records if record["settings"].get("model") == model]
        keys = [key for key in keys_of(mine) if metric_of(key) in ranked[:1]]
        found[model] = (best(mine, keys[0]) if keys else []) or mine[:1]
    return found


def models_of(records: Sequence[Mapping]) -> list[str]:
    """Names of the models, in the records' order."""
    return list(dict.fromkeys(record["settings"].get("model") for record in records))
