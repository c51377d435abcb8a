"""Scores the pictures of a cell: metrics, the protocol's own judge, and which pictures to keep.

Pictures are compared with a protocol's real pictures, whose statistics are measured once per
workdir, and with their captions, with a score for each so that the best and the worst can be
shown.
"""

import functools
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip import errors
from unclip.cascade.pipeline import Pipeline
from unclip.files import images
from unclip.files.moments import StatisticsFile, read_statistics, write_statistics
from unclip.measure import embedders
from unclip.measure import pictures as picture_sets
from unclip.measure import table as measure
from unclip.protocols.base import EvaluationProtocol
from unclip.runtime import collectives, distributed
from unclip.sweep import plan
from unclip.sweep.weights import digest, file_hash

KEEP = ("all", "grid", "none")
EXTREMES = 4  # best and worst captions that a cell keeps
BARRIER_S = 24 * 3600.0  # others wait while one process scores; that may take hours
# Fields of the config, beside the axes, on which a cell's numbers depend.
DECISIVE = ("samples", "stages", "measure_seed", "candidates", "bootstrap")


def announce(message: str) -> None:
    """Prints one line for the user, from process 0."""
    if distributed.is_main():
        print(f"unclip evaluate: {message}", file=sys.stderr, flush=True)


class Scorer:
    """Scores the cells of one evaluation.

    Args:
      config: see `configs/evaluate.py`; protocol: whose captions are drawn; workdir: keeps the
        statistics of the real pictures.

    Attributes:
      measured: JSON-able, everything beside the axes that the numbers depend on.

    Raises:
      ConfigError: an unknown metric or setting, weights or real pictures that are missing.
      DataError: files that cannot be read.
    """

    def __init__(self, config: Mapping, protocol: EvaluationProtocol, workdir: str | os.PathLike):
        self.config, self.protocol, self.workdir = config, protocol, pathlib.Path(workdir)
        self.total = len(protocol.prompts) * config["samples"]
        if config["keep_pictures"] not in KEEP:
            raise errors.unknown("keep_pictures", config["keep_pictures"], KEEP)
        if config["samples"] > 1 and hasattr(protocol, "export"):
            raise errors.ConfigError(
                f"samples {config['samples']}: protocol {protocol.id} itself decides how "
                "many pictures a caption has; expected 1"
            )
        self.metrics = measure.expand(config["metrics"]) if config["metrics"] else []
        compared = [name for name in self.metrics if measure.METRICS[name].real]
        real = protocol.reference()
        if compared and not config["reference"] and real is None:
            raise errors.ConfigError(
                f"{compared[0]} compares with real pictures; protocol {protocol.id} has none: "
                "--config.reference=STATISTICS.npz (unclip metrics --save_statistics)"
            )
        self.weights = self._metric_weights()
        self.measured = {
            "protocol": {
                "id": protocol.id,
                "captions": digest([list(protocol.keys), list(protocol.prompts)]),
                "pictures": "" if real is None else real.fingerprint,
                "size": protocol.size,
            },
            "metrics": sorted(self.metrics),
            "weights": {name: file_hash(path) for name, path in self.weights.items()},
            "reference": file_hash(config["reference"]) if config["reference"] else "",
            **{name: config[name] for name in DECISIVE},
        }

    def _metric_weights(self) -> dict[str, str]:
        """{"inception" | "clip" | "dinov2": path} of the networks that the metrics read."""
        own = [s.paths["clip"] for s in plan.sources(self.config) if "clip" in s.paths]
        fields = {"inception": "inception", "clip": "clip_for_scores", "dinov2": "dinov2"}
        given = {name: self.config[field] for name, field in fields.items()}
        given["clip"] = given["clip"] or (own[0] if own else "")
        found = {}
        for metric in self.metrics:
            name = measure.METRICS[metric].extractor.partition(".")[0]
            if not given[name]:
                raise errors.ConfigError(
                    f"{metric} needs weights: --config.{fields[name]}=PATH, or other "
                    f"--config.metrics. {measure.WEIGHTS[name]}"
                )
            if not pathlib.Path(given[name]).exists():
                raise errors.DataError(f"{fields[name]} {given[name]}: no such file or folder")
            found[name] = given[name]
        return found

    def score(self, folder: pathlib.Path, model: Pipeline) -> dict[str, Any]:
        """The measurements of a folder of pictures: "values", "scores", "facts", "warnings", …"""
        fake = picture_sets.open_pictures(folder)
        if len(fake) != self.total:
            raise errors.DataError(f"{folder} has {len(fake)} pictures, {self.total} were drawn")
        size, side = self.protocol.size, fake.read(0).shape[0]
        if size and side != size:
            fake = picture_sets.Prepared(fake, crop=size)
        samples = self.config["samples"]
        captions = [p for p in self.protocol.prompts for _ in range(samples)]
        result, scores = self._measure(fake, captions)
        values = list(result.values)
        facts = []
        if distributed.is_main():
            judged, facts = self._judge(fake, model)
            values += judged
        return {
            "values": values,
            "warnings": result.warnings,
            "provenance": result.provenance,
            "protocol": {"id": self.protocol.id, "provenance": self.protocol.provenance},
            "scores": scores,
            "facts": facts,
        }

    def _measure(self, fake, captions: list[str]) -> tuple[measure.Result, dict[str, list]]:
        """The metrics of the drawn pictures, and {metric: scores} of those with one per picture."""
        if not self.metrics:
            return measure.Result([], [], {}), {}
        result = measure.measure(
            self.reference, fake, self.metrics, captions=captions, **self.weights, **self._options
        )
        return result, {
            name: [round(float(score), 6) for score in scores]
            for name, scores in result.scores.items()
        }

    @property
    def _options(self) -> dict[str, Any]:
        names = {"seed": "measure_seed", "candidates": "candidates", "bootstrap": "bootstrap"}
        options = {name: self.config[field] for name, field in names.items()}
        # Statistics that are given stand in for the protocol's pictures, and may be of others.
        named = set(self.protocol.named) - ({"real"} if self.config["reference"] else set())
        return options | {"protocol": self.protocol.id, "named": named}

    @functools.cached_property
    def reference(self) -> StatisticsFile | None:
        """Statistics of the real pictures: given, or measured once per workdir; None without
        any."""
        if self.config["reference"]:
            return read_statistics(self.config["reference"])
        real = self.protocol.reference()
        wanted = [name for name in self.metrics if measure.METRICS[name].real]
        if real is None or not wanted:
            return None
        facts = {name: self.measured[name] for name in ("protocol", "metrics", "weights")}
        path = self.workdir / f"reference-{digest(facts)}.npz"
        if not collectives.from_main(int(path.exists())):
            announce(f"measuring the {len(real)} real pictures of {self.protocol.id}")
            found = measure.measure(real, None, wanted, **self.weights, **self._options)
            if distributed.is_main():
                write_statistics(path, found.statistics, found.features or None)
            distributed.barrier("reference measured", BARRIER_S)
        return read_statistics(path)

    def _judge(self, pictures, model) -> tuple[list[dict], list[dict]]:
        """The judgement of the protocol: (values, averaged over samples; facts of every
        picture)."""
        samples, rounds = self.config["samples"], []
        if type(self.protocol).judge is EvaluationProtocol.judge:  # it has none
            return [], []
        for k in range(samples):
            drawn = [pictures.read(i) for i in range(k, self.total, samples)]
            rounds.append(self.protocol.judge(np.stack(drawn), model))
        names = rounds[0][0]
        by_clip = [name for name in names if name.rpartition(".")[2] in self.protocol.by_clip]
        clip = embedders.clip_id(model.parts["clip"]) if by_clip else ""
        key = lambda name: "/".join(
            [name, *([clip] if name in by_clip else []), self.protocol.id, f"N={self.total}"]
        )
        values = [
            {
                "metric": name,
                "key": key(name),
                "value": float(np.mean([judged[name] for judged, _ in rounds])),
                "n_fake": self.total,
            }
            for name in names
        ]
        facts = [
            rounds[k][1][i]
            for i in range(len(self.protocol.prompts))
            for k in range(samples)
            if rounds[k][1]
        ]
        return values, facts

    def keep(self, record: Mapping, folder: pathlib.Path) -> dict[str, list[dict]]:
        """Which pictures a report shows: {"shown", "best", "worst"}; deletes what is not kept.

        Protocols whose judge runs elsewhere get their pictures in its layout, in `export`.
        """
        keep, pictures = self.config["keep_pictures"], folder / "pictures"
        if hasattr(self.protocol, "export"):  # judged elsewhere
            paths = [pictures / picture_name(n, 1) for n in range(self.total)]
            self.protocol.export(folder / "export", map(images.read_image, paths))
        if keep == "none":
            shutil.rmtree(pictures)
            return {}
        samples, prompts = self.config["samples"], self.protocol.prompts
        even = np.linspace(0, len(prompts) - 1, min(self.config["show"], len(prompts)))
        chosen = {"shown": [round(i) * samples for i in even]}
        score = next(iter(record["scores"].values()), None)
        if score is not None:
            order = [int(i) for i in np.argsort(np.asarray(score), kind="stable")]
            count = min(EXTREMES, len(order) // 2)
            chosen |= {"best": order[::-1][:count], "worst": order[:count]}
        kept = {
            group: [
                {
                    "caption": prompts[n // samples],
                    "number": n,
                    "file": f"pictures/{picture_name(n, samples)}",
                }
                | ({} if score is None else {"score": float(score[n])})
                for n in numbers
            ]
            for group, numbers in chosen.items()
        }
        paths = [folder / row["file"] for row in kept["shown"]]
        recipes = [images.read_recipe(path) or {} for path in paths]
        recipe = images.grid_recipe(recipes, images.columns_of(len(paths)))
        images.write_png(folder / "grid.png", images.grid([*map(images.read_image, paths)]), recipe)
        if keep == "grid":
            wanted = {row["file"] for rows in kept.values() for row in rows}
            for path in pictures.iterdir():
                if f"pictures/{path.name}" not in wanted:
                    path.unlink()
        return kept


def picture_name(number: int, samples: int) -> str:
    """The file of a picture; sorted by name, pictures are ordered by caption."""
    prompt, sample = divmod(number, samples)
    return f"{prompt:07d}-{sample:0{len(str(samples - 1))}d}.png"
