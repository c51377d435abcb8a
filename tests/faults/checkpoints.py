"""Damage to every file of a checkpoint, and reads that fail for another reason.

What comes back must be the bits that were saved, of that step or of the one before, or one line
that refuses; an error of reading must leave every step where it is.
"""

import errno
import os
import pathlib
import shutil
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp
from table import Row

from unclip import errors
from unclip.runtime import checkpoint, sums


def state(step: int) -> dict:
    """A small state, another for every step."""
    kernel = jax.random.normal(jax.random.key(step), (64, 64))
    return {"params": {"kernel": kernel}, "step": jnp.int32(step)}


SHAPES = jax.eval_shape(lambda: state(0))


def damage(path: pathlib.Path, how: str, rng: np.random.Generator) -> None:
    """Changes a file, or removes it."""
    data = path.read_bytes()
    if how == "remove":
        path.unlink()
        return
    half = len(data) // 2
    if how == "flip" and data:
        place = int(rng.integers(len(data)))
        new = data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :]
    else:
        new = {
            "truncate": data[:-1],
            "empty": b"",
            "zero tail": data[:half] + bytes(len(data) - half),
        }
        new = new.get(how, data)
    path.write_bytes(new)


def outcome(directory: pathlib.Path) -> str:
    """ "newest", "older" or "refused" as a start finds it; anything else is wrong."""
    try:
        with checkpoint.Checkpointer(directory) as saver:
            found, position, _ = saver.restore(None, SHAPES)
    except errors.DataError:
        return "refused"
    except Exception as error:
        return f"a traceback: {error!r}"
    step = int(found["step"])
    same = all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (found, state(step)))))
    if not same or position != 10 * step:
        return f"wrong values of step {step}"
    return {2: "newest", 1: "older"}[step]


def files_of(kept: pathlib.Path, step: int) -> list[pathlib.Path]:
    """The files that belong to a step, from the folder on."""
    own = [p.relative_to(kept) for p in (kept / str(step)).rglob("*") if p.is_file()]
    return [*sorted(own), pathlib.Path("sums") / f"{step}.json"]


def damaged(kept: pathlib.Path, scale: float) -> Row:
    """Every file, way and step; with sums, and with those of that step lost too; one step alone."""
    rng, begin = np.random.default_rng(0), time.perf_counter()
    cases = [
        (step, path, how, lost, alone)
        for step, alone in ((2, False), (1, False), (2, True))
        for path in files_of(kept, step)
        for how in ("truncate", "flip", "remove", "empty", "zero tail")
        for lost in (False, True)
    ]
    rng.shuffle(cases)
    cases = cases[: max(4, round(len(cases) * scale))]
    counts, wrong = {"newest": 0, "older": 0, "refused": 0}, []
    with tempfile.TemporaryDirectory() as name:
        for number, (step, path, how, lost, alone) in enumerate(cases):
            folder = pathlib.Path(name) / str(number)
            shutil.copytree(kept, folder)
            if alone:
                shutil.rmtree(folder / "1")
            damage(folder / path, how, rng)
            if lost:
                (folder / "sums" / f"{step}.json").unlink(missing_ok=True)
            got = outcome(folder)
            if got in (["newest"] if step == 1 else counts):
                counts[got] += 1
            else:
                wrong.append(f"{path} {how}: {got}")
            shutil.rmtree(folder)
    seconds = time.perf_counter() - begin
    note = "; ".join(wrong[:2]) or f"{counts['newest']} newest, {counts['older']} the one before"
    good = counts["newest"] + counts["older"]
    what = "a file of a step damaged, 5 ways; newest, older, alone; sums there or lost"
    return Row(what, len(cases), good, counts["refused"], len(wrong), seconds, note)


def failing(kept: pathlib.Path, tries: int) -> Row:
    """Reads that fail once or always, of sums or of arrays: nothing is moved."""
    os_error = lambda number: OSError(number, os.strerror(number))
    faults = [
        MemoryError("out of memory"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"),
        *map(os_error, (errno.ESTALE, errno.EIO, errno.EMFILE)),
    ]
    places = [(ocp, "load_checkpointables"), (sums, "_of"), (ocp, "checkpointables_metadata")]
    begin, good, refused, wrong, note = time.perf_counter(), 0, 0, 0, ""
    with tempfile.TemporaryDirectory() as name:
        for number in range(tries):
            folder = pathlib.Path(name) / str(number)
            shutil.copytree(kept, folder)
            fault, (module, function) = faults[number % 5], places[number // 5 % 3]
            always, real, failed = number % 2, getattr(module, function), []

            def fails(*args, _real=real, _fault=fault, _always=always, _failed=failed, **more):
                if _always or not _failed:
                    _failed.append(1)
                    raise _fault
                return _real(*args, **more)

            with mock.patch.object(module, function, fails):
                got = outcome(folder)
            left = sorted(p.name for p in folder.iterdir())
            if left != ["1", "2", "sums"] or not (got == "newest" or got == "refused"):
                wrong, note = wrong + 1, f"{function} {fault!r}: {got}, {left}"
            good, refused = good + (got == "newest"), refused + (got == "refused")
    seconds = time.perf_counter() - begin
    what = "reading fails (memory, ESTALE, EIO, EMFILE), once or always"
    return Row(what, tries, good, refused, wrong, seconds, note or "no step was moved")


def run(scale: float) -> list[Row]:
    """Over copies of one folder with two steps."""
    logging.set_verbosity(logging.ERROR)
    checkpoint.PAUSES_S = (0.0, 0.0)
    with tempfile.TemporaryDirectory() as name:
        kept = pathlib.Path(name) / "kept"
        with checkpoint.Checkpointer(kept) as saver:
            for step in (1, 2):
                saver.save(step, state(step), 10 * step, force=True)
        return [damaged(kept, scale), failing(kept, max(5, round(40 * scale)))]
