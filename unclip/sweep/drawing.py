"""Draws and scores the cells of a sweep; it may be killed at any point and resumed.

A cell is drawn by the processes of a job together, each its share of the captions on its own
devices, into `cells/<id>/pictures`; then all of them score it and process 0 writes
`cells/<id>.json` last. A cell without that file is drawn again from the beginning. Picture k of
caption i of n in seed s has the seed s * 2**20 + k * n + i, so no two pictures of a cell share
their noise and no two seeds of a sweep do; the same caption has the same noise in every cell.
"""

import concurrent.futures
import contextlib
import json
import math
import os
import pathlib
import platform
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import unclip
from unclip import errors, files, protocols
from unclip.cascade import runs, spaces
from unclip.drawing.model import UnCLIP
from unclip.files import images, lock
from unclip.runtime import collectives, distributed, progress, sharding
from unclip.sweep import plan, store
from unclip.sweep.drawn import PICTURES, Drawn
from unclip.sweep.scoring import BARRIER_S, Scorer, announce, picture_name
from unclip.sweep.weights import check_spaces, digest, load_part

SEED_STRIDE = 1 << 20  # pictures that a seed of the sweep can have


class Runner:
    """What the cells of one evaluation share: protocol, scorer, the loaded model.

    Args:
      config: see `configs/evaluate.py`; workdir: shared by every process and job.

    Raises:
      ConfigError: an unknown protocol, metric or setting, weights that are missing, no captions.
      DataError: files that cannot be read. Nothing has been drawn or written then.
    """

    def __init__(self, config: Mapping, workdir: str | os.PathLike):
        self.config, self.workdir = config, pathlib.Path(workdir)
        settings = dict(config["protocol"])
        # A config has no None: "" and a count of 0 leave a setting to the protocol.
        settings = {k: v for k, v in settings.items() if v != "" and (k, v) != ("count", 0)}
        self.protocol = protocols.make(settings.pop("name"), **settings)
        if not self.protocol.prompts:
            raise errors.ConfigError(f"protocol {self.protocol.id!r} has no captions to draw")
        for name in ("samples", "batch_size"):
            if config[name] < 1:
                raise errors.ConfigError(f"{name} {config[name]}: expected at least 1")
        self.total = len(self.protocol.prompts) * config["samples"]
        if self.total > SEED_STRIDE:
            raise errors.ConfigError(
                f"{len(self.protocol.prompts)} captions x {config['samples']} samples: expected at "
                f"most {SEED_STRIDE} pictures per cell"
            )
        self.scorer = Scorer(config, self.protocol, workdir)
        self._model: tuple[Any, UnCLIP | None] = (None, None)
        self._warnings: dict[str, None] = {}  # warnings of the loaded model

    def cells(self) -> list[plan.Cell]:
        """Every cell of the config, with the models that are on disk now."""
        found = plan.cells(self.config, self.scorer.measured, captions=self.protocol.mode == "text")
        if not self.config.get(spaces.FLAG):
            models = {json.dumps(cell.parts, sort_keys=True): cell.parts for cell in found}
            check_spaces(models.values())
        return found

    def status(self, cell: plan.Cell) -> str:
        """ "finished", "damaged" or "to do"."""
        path = store.cell_path(self.workdir, cell.id)
        if not path.exists():
            return "to do"
        try:
            store.read_cell(path)
        except errors.DataError:
            return "damaged"
        return "finished"

    def run(self, cells: Sequence[plan.Cell]) -> int:
        """Draws and scores the cells that are not finished and not held by another live job.

        Returns:
          How many this job finished.

        Raises:
          Stopped: asked to stop; the same command starts again with the unfinished cell.
        """
        images.writable_folder(self.workdir / "cells")
        if distributed.is_main():
            for folder in (self.workdir, self.workdir / "cells"):
                files.remove_strays(folder)
        same = int(digest([cell.id for cell in cells])[:7], 16)
        if collectives.from_main(same) != same:
            raise errors.Stopped("the processes saw different checkpoints; run the command again")
        done = 0
        for number, cell in enumerate(cells):
            with self._held(cell) as mine:
                if not mine:
                    continue
                announce(f"cell {number + 1} of {len(cells)}: {cell.id}")
                try:
                    self._run_cell(cell)
                except errors.Stopped as error:
                    raise errors.Stopped(
                        f"asked to stop in cell {number + 1} of {len(cells)}; the same command "
                        f"continues there ({error.message})"
                    ) from error
                done += 1
        return done

    @contextlib.contextmanager
    def _held(self, cell: plan.Cell):
        """Yields whether this job should do the cell; holds the cell's lock while it does."""
        mine, folder = 0, store.cell_folder(self.workdir, cell.id)
        held = None
        status = self.status(cell) if distributed.is_main() else "finished"
        if status == "damaged":
            announce(f"{store.cell_path(self.workdir, cell.id)} is damaged: drawn again")
        if status != "finished":
            folder.mkdir(parents=True, exist_ok=True)
            try:
                held = self._lock = lock.DirectoryLock(folder, on_lost=distributed.request_stop)
                # Another job may have finished it between the check above and the lock.
                mine = int(self.status(cell) != "finished")
            except errors.DataError as error:
                announce(f"left to another job: {error.message}")
        try:
            yield bool(collectives.from_main(mine))
        finally:
            if held is not None:
                held.release()
                with contextlib.suppress(OSError):  # kept where pictures are in it
                    folder.rmdir()

    def _run_cell(self, cell: plan.Cell) -> None:
        folder = store.cell_folder(self.workdir, cell.id)
        if distributed.is_main():  # what a killed job left
            store.cell_path(self.workdir, cell.id).unlink(missing_ok=True)
            kept = self._drawn(cell, folder).clear()
            if kept:
                announce(f"{cell.id}: goes on with {kept} of {self.total} pictures")
            for old in folder.iterdir():
                if old.is_dir() and old.name != PICTURES:
                    shutil.rmtree(old)
                elif old.is_file() and not old.name.startswith(("drawn-", lock.OS_LOCK)):
                    old.unlink()
        distributed.barrier("cell cleared", BARRIER_S)
        started = time.perf_counter()
        model = self.model(cell)
        loaded = time.perf_counter()
        self._draw(cell, model, folder)
        drawn = time.perf_counter()
        distributed.barrier("cell drawn", BARRIER_S)
        drawn_now = self._drawn(cell, folder)
        self._warnings = drawn_now.warnings | self._warnings
        record = self.scorer.score(folder / PICTURES, model)
        if not distributed.is_main():
            return
        recipe = images.read_recipe(folder / PICTURES / picture_name(0, self.config["samples"]))
        record["kept"] = self.scorer.keep(record, folder)
        record["warnings"] = [*record["warnings"], *_summary(list(self._warnings))]
        scored = time.perf_counter()
        self._lock.check()
        record |= {
            "id": cell.id,
            "settings": cell.settings,
            "identity": cell.identity,
            "model": {
                "name": cell.model,
                "hash": cell.model_hash,
                "parts": {part: list(where) for part, where in cell.parts.items()},
            },
            "recipe": recipe,
            "seconds": {
                "load": loaded - started,
                "draw": drawn - loaded,
                "score": scored - drawn,
            },
            "pictures": self.total,
            "batch_size": self.config["batch_size"],
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "processes": distributed.process_count(),
            "versions": versions(),
        }
        store.write_cell(self.workdir, record)
        drawn_now.forget()

    def _drawn(self, cell: plan.Cell, folder: pathlib.Path) -> Drawn:
        """What an earlier job drew of the cell, with the same software on the same devices."""
        devices = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
        head = {
            "cell": cell.identity,
            "batch_size": self.config["batch_size"],
            "devices": devices,
            "versions": versions(),
        }
        return Drawn(folder, head)

    # ------------------------------------------------------------ drawing

    def model(self, cell: plan.Cell) -> UnCLIP:
        """The cell's model, loaded once for neighbouring cells of the same weights."""
        if self._model[0] != cell.parts | {"weights": cell.settings["weights"]}:
            # The old model is dropped before the new one is loaded: both may not fit in memory.
            self._model, self._warnings = (None, None), {}
            parts = {
                part: load_part(path, part, step, cell.settings["weights"])
                for part, (path, step) in cell.parts.items()
            }
            runs.check_fit(parts)
            self._warnings = dict.fromkeys(spaces.mixed(parts))
            mesh = sharding.make_mesh(self.config["mesh"], jax.local_devices())
            model = UnCLIP(
                parts,
                model_hash=cell.model_hash,
                batch_size=self.config["batch_size"],
                fixed_batch=True,
                mesh=mesh,
            )
            self._model = (cell.parts | {"weights": cell.settings["weights"]}, model)
        return self._model[1]

    def _draw(self, cell: plan.Cell, model: UnCLIP, folder: pathlib.Path) -> None:
        """This process's share of the cell's pictures, as PNG with recipes."""
        drawn = self._drawn(cell, folder)
        there = drawn.names
        settings = cell.settings
        stages = {"prior": {}, "decoder": {}}
        for axis, (stage, name) in plan.DRAW.items():
            if settings[axis] is not None:
                stages[stage][name] = settings[axis]
        options = stages | {"embed": settings["embed"], "stages": self.config["stages"] or None}
        prompts, samples = self.protocol.prompts, self.config["samples"]
        seed = settings["seed"] * SEED_STRIDE
        count = distributed.process_count()
        mine = range(distributed.process_index(), len(prompts), count)
        chunk = max(1, self.config["batch_size"] // samples)
        # Every process polls equally often, so that all stop at the same poll.
        polls = math.ceil(math.ceil(len(prompts) / count) / chunk)
        bar = progress.progress(len(mine) * samples, cell.model, "img")
        with bar, concurrent.futures.ThreadPoolExecutor(4, "png") as pool:
            for start in range(0, polls * chunk, chunk):
                if distributed.should_stop():
                    raise errors.Stopped(f"its {bar.count} pictures here are kept")
                rows = mine[start : start + chunk]
                if not rows:
                    continue
                both = [(i, k) for i in rows for k in range(samples)]
                names = [picture_name(i * samples + k, samples) for i, k in both]
                if there.issuperset(names):
                    bar.update(len(names))
                    continue
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    made = self.protocol.draw(
                        model,
                        [seed + k * len(prompts) + i for i, k in both],
                        options,
                        rows=[i for i, _ in both],
                    )
                # The model warns of each only once, at the first cell.
                told = dict.fromkeys(str(warning.message) for warning in caught)
                self._warnings |= told
                written = [
                    pool.submit(images.write_png, folder / PICTURES / name, image, recipe)
                    for name, image, recipe in zip(names, made.images, made.recipes)
                ]
                for future in written:
                    future.result()
                drawn.add(distributed.process_index(), names, told)
                bar.update(len(made))


def _summary(warned: Sequence[str]) -> list[str]:
    """The first three warnings of drawing and the number of the others."""
    few = list(warned)[:3]
    return [*few, *([f"… and {len(warned) - 3} more like these"] if len(warned) > 3 else [])]


def versions() -> dict[str, str]:
    """Versions of the software that computed a cell."""
    return {
        "unclip": unclip.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
