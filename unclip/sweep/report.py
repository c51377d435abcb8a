"""The results of a sweep, from its cell files: JSON, CSV, and a page with plots and pictures.

The page shows FID (or the Fréchet distance on CLIP) against CLIP score over guidance, each metric
over the axes that were varied, the same captions drawn by each model, the best and the worst
captions, and whether the paper's findings hold here.
"""

import csv
import itertools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unclip import errors, files
from unclip.files import images
from unclip.files.report import Report, Row
from unclip.runtime import distributed
from unclip.sweep import store
from unclip.sweep.findings import (
    ALIGNMENT,
    LESS,
    MORE,
    QUALITY,
    axes_of,
    best_cells,
    by_seed,
    claim_of,
    findings,
    is_less,
    keys_of,
    lines,
    mean_of,
    metric_of,
    models_of,
    name_of,
    sort_key,
    telling,
    values_of,
    varied,
)

NUMERIC = (
    "step",
    "guidance",
    "steps",
    "prior_guidance",
    "prior_steps",
    "eta",
    "candidates",
    "temperature",
)
KEYS = 12  # with more metrics than these, a judge's details have a table of their own
COLUMNS = 8  # pictures beside one another
LINES = 8  # of a plot: the number of colours


def write(workdir: str | os.PathLike, config: Mapping[str, Any]) -> pathlib.Path:
    """Writes the results of all finished cells, each file atomically.

    results.jsonl and results.csv have every cell, findings.json has the result of `findings`, and
    report.html has all of it. Only process 0 writes. Cells of earlier configs in the same workdir
    are included.

    Returns:
      The report's path.

    Raises:
      ConfigError: a claim of the config that cannot be read; DataError: no finished cell, or the
        folder cannot be written.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / "report.html"
    if not distributed.is_main():
        return path
    claims = [claim_of(claim) for claim in config.get("claims", ())]
    records, damaged = store.read_cells(workdir)
    if not records:
        why = f": {damaged[0]}" if damaged else ""
        raise errors.DataError(f"{workdir} has no finished cell to report{why}")
    order = lambda r: [sort_key(r["settings"].get(axis)) for axis in axes_of(records)]
    records.sort(key=order)
    _jsonl(workdir / "results.jsonl", records)
    _csv(workdir / "results.csv", records)
    with files.replacing(workdir / "findings.json") as temporary:
        temporary.write_text(json.dumps(findings(records, claims), indent=1) + "\n")
    return _page(workdir, records, claims, config, damaged).write(path)


def _jsonl(path: pathlib.Path, records: Sequence[Mapping]) -> None:
    with files.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as out:
        for record in records:
            line = {
                "id": record["id"],
                **record["settings"],
                "model_hash": record.get("model", {}).get("hash"),
                "protocol": record.get("protocol", {}).get("id"),
                "pictures": record.get("pictures"),
                "seconds": record.get("seconds"),
                "values": record["values"],
                "warnings": record.get("warnings", []),
            }
            out.write(json.dumps(line) + "\n")


def _csv(path: pathlib.Path, records: Sequence[Mapping]) -> None:
    axes, keys = axes_of(records), keys_of(records)
    with files.replacing(path) as temporary, open(temporary, "w", newline="") as out:
        table = csv.writer(out)
        table.writerow(["id", *axes, "model_hash", "protocol", "pictures", *keys])
        for record in records:
            values = values_of(record)
            table.writerow(
                [
                    record["id"],
                    *(record["settings"].get(axis) for axis in axes),
                    record.get("model", {}).get("hash"),
                    record.get("protocol", {}).get("id"),
                    record.get("pictures"),
                    *(values.get(key) for key in keys),
                ]
            )


# ============================================================ the page


def _page(workdir, records, claims, config, damaged) -> Report:
    protocols = sorted({str(record.get("protocol", {}).get("id")) for record in records})
    report = Report("Evaluation", ", ".join(protocols))
    every, models = keys_of(records), models_of(records)
    details = [key for key in every if metric_of(key).count(".") > 1 and len(every) > KEYS]
    keys = [key for key in every if key not in details]
    tiles = {"cells": len(records), "models": len(models)}
    tiles |= {"pictures": sum(record.get("pictures") or 0 for record in records)}
    report.tiles(tiles)
    found = findings(records, claims)
    known = [key for key in keys if metric_of(key).partition("-")[0] in (*LESS, *MORE)]
    ways = {key: "min" if is_less(metric_of(key)) else "max" for key in known}
    if len(models) > 1:
        for row in found["models"]:
            for key in details:
                del row[key]
        report.section(
            "Each model at its best",
            "The cell of the least distance to real pictures over the whole sweep, or of the best "
            "fit to captions where no distance was measured. Means over seeds.",
        )
        report.table(found["models"], best=ways)
    if claims:
        report.section(
            "The paper's findings",
            "Each model's best cell by the metric named, compared as the paper compares its "
            "models. At small scale a difference may be chance: look at the seeds and at N.",
        )
        report.table(found["claims"])
    _plots(report, records, keys)
    report.section(
        "All cells",
        "\n\n".join(
            [
                "A metric's name is its full key: extractor, resize, protocol and number of "
                "pictures.",
                *(f"Left out: {line}." for line in damaged),
            ]
        ),
    )
    axes = [axis for axis in axes_of(records) if axis in varied(records) or axis == "model"]
    rows = [
        {axis: record["settings"].get(axis) for axis in axes}
        | {key: values_of(record).get(key) for key in keys}
        for record in records
    ]
    report.table(rows, [*axes, *keys], best=ways)
    if details:
        _details(report, records, details)
    warnings = dict.fromkeys(w for record in records for w in record.get("warnings", ()))
    if warnings:
        report.table([[text] for text in warnings], ["warnings of the metrics"])
    _pictures(report, workdir, records)
    report.section("Settings")
    report.settings(config, "this evaluation")
    for record in records:
        shown = (
            "settings",
            "identity",
            "model",
            "protocol",
            "recipe",
            "seconds",
            "devices",
            "processes",
            "batch_size",
            "versions",
            "provenance",
        )
        report.settings({name: record[name] for name in shown if name in record}, record["id"])
    return report


def _plots(report: Report, records, keys) -> None:
    ways = [axis for axis in NUMERIC if axis in varied(records)]
    if not ways or not keys:
        return
    report.section("Curves", "Seeds are averaged. Numbers beside points are the varied setting.")
    fidelity = [key for key in keys if metric_of(key) in QUALITY]
    text = [key for key in keys if metric_of(key) in ALIGNMENT]
    count = Counter(map(metric_of, keys))
    title = lambda key: key if count[metric_of(key)] > 1 else metric_of(key)
    if "guidance" in ways:
        for y, x in itertools.product(fidelity, text[:1]):
            found = _few(lines(records, x, y, "guidance"))
            report.curves(
                {name: [(a, b) for _, a, b in points] for name, points in found.items()},
                f"{title(y)} against {title(x)} over guidance",
                metric_of(x),
                metric_of(y),
                labels={name: [f"{at:g}" for at, _, _ in p] for name, p in found.items()},
            )
    for axis, key in itertools.product(ways, keys):
        found = _few(lines(records, "", key, axis))
        if any(len(points) > 1 for points in found.values()):
            curves = {name: [(a, b) for _, a, b in points] for name, points in found.items()}
            report.curves(curves, f"{title(key)} over {axis}", axis, metric_of(key))


def _details(report: Report, records, details) -> None:
    """A table of a judge's many shares, a row each, of the best cell of each model."""
    chosen = dict(list(best_cells(records).items())[:COLUMNS])
    names = [name_of(group[0]["settings"], telling(records)) for group in chosen.values()]
    rows = [[key, *(mean_of(group, key) for group in chosen.values())] for key in details]
    report.section("Details of the judge", "Each model's best cell, means over seeds.")
    report.table(rows, ["metric", *names])


def _few(found: dict[str, list]) -> dict[str, list]:
    return dict(list(found.items())[:LINES])


def _pictures(report: Report, workdir: pathlib.Path, records) -> None:
    with_pictures = [record for record in records if record.get("kept", {}).get("shown")]
    if not with_pictures:
        return
    chosen = {model: group[0] for model, group in best_cells(with_pictures).items()}
    axes = telling(with_pictures)
    if len(chosen) > 1:
        report.section("The same captions by each model", "Each model at its best cell.")
        _gallery(report, workdir, list(chosen.values())[:COLUMNS], axes)
    for model in chosen:
        mine = [r for r in with_pictures if r["settings"].get("model") == model]
        mine = [group[0] for group in by_seed(mine)]
        if len(mine) > 1 or len(chosen) == 1:
            picks = np.linspace(0, len(mine) - 1, min(COLUMNS, len(mine)))
            report.section(f"{model} over the sweep")
            _gallery(report, workdir, [mine[round(i)] for i in picks], axes)
    ranked = [record for record in chosen.values() if record["kept"].get("best")]
    if ranked:
        report.section(
            "Best and worst captions",
            "By the cosine of CLIP's embeddings of picture and caption, in each model's best cell.",
        )
    for record in ranked:
        for group, good in (("best", True), ("worst", False)):
            rows = record["kept"][group]
            shown = [_read(workdir, record, row) for row in rows]
            badges = [(f"{row['score']:.3f}", good) for row in rows if "score" in row]
            report.gallery(
                [Row(f"{name_of(record['settings'], axes)}: {group}", shown, badges)],
                [f"{row.get('caption', '')} {_fact(record, row)}".strip() for row in rows],
            )


def _gallery(report: Report, workdir, records, axes) -> None:
    """Pictures of the same captions, a column per record."""
    by_caption: dict[tuple, dict[str, np.ndarray | None]] = {}
    for record in records:
        for row in record["kept"]["shown"]:
            place = (str(row.get("caption", "")), row.get("number"))
            by_caption.setdefault(place, {})[record["id"]] = _read(workdir, record, row)
    rows = [
        Row(caption, [found.get(record["id"]) for record in records])
        for (caption, _), found in by_caption.items()
    ]
    names = [name_of(record["settings"], axes) for record in records]
    report.gallery(rows, names)


def _fact(record: Mapping, row: Mapping) -> str:
    """The facts of the protocol's judge about a picture, in a line."""
    facts, number = record.get("facts") or [], row.get("number")
    if not isinstance(number, int) or not 0 <= number < len(facts):
        return ""
    return "(" + ", ".join(f"{name} {value}" for name, value in facts[number].items()) + ")"


def _read(workdir: pathlib.Path, record: Mapping, row: Mapping) -> np.ndarray | None:
    """A kept picture; None where it was deleted since, or lies outside the cell's folder."""
    folder = store.cell_folder(workdir, record["id"]).resolve()
    path = (folder / str(row.get("file", ""))).resolve()
    if not path.is_relative_to(folder):
        return None
    try:
        return images.read_image(path)
    except errors.DataError:
        return None
