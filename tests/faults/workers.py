"""Decoding workers killed at any moment, and collections with too many bad samples.

A killed worker must end the run by name within 30 seconds, with a position from which it continues
as if nothing had happened. Bad samples must end it exactly where they pass the limit, and not
before.
"""

import multiprocessing
import os
import pathlib
import signal
import tempfile
import threading
import time

import numpy as np
import resume
from table import Row

from unclip.errors import DataError
from unclip.input.source import make_source

LIMIT_SECONDS = 30.0
STEPS = 12


class Slow:
    """`resume.transform`, slowed down so that a kill falls amid a batch."""

    def __init__(self):
        self.transform = resume.transform()

    def __call__(self, sample, rng):
        time.sleep(0.01)
        return self.transform(sample, rng)


def run(scale: float) -> list[Row]:
    """Kills, then limits."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        return [
            _kills(folder, max(1, round(14 * scale))),
            _limits(folder, max(6, round(60 * scale))),
        ]


def _kills(folder: pathlib.Path, tries: int) -> Row:
    samples = resume.collection(folder)
    options = {"batch_size": resume.BATCH, "seed": resume.SEED}
    with make_source(samples, Slow(), threads=16, **options) as batches:
        reference = [next(batches) for _ in range(STEPS)]
    rng = np.random.default_rng(2)
    begin, slowest, wrong = time.perf_counter(), 0.0, 0
    for k in range(tries):
        # The first kills fall into the start of the processes, the others anywhere later.
        delay = float(rng.uniform(0, 0.5) if k < 3 else rng.uniform(0, 1.5))
        late, right = _killed(samples, options, reference, delay, k >= 3, rng)
        slowest, wrong = max(slowest, late), wrong + (not right)
    return Row(
        "decoding worker killed",
        tries,
        0,
        tries - wrong,
        wrong,
        time.perf_counter() - begin,
        f"slowest error after {slowest:.1f} s, then resumed",
    )


def _killed(samples, options, reference, delay, running, rng) -> tuple[float, bool]:
    """(seconds from the kill to the error, whether all went as it should)."""
    struck = []

    def kill():
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            workers = [c for c in multiprocessing.active_children() if "prefetch" in c.name]
            if workers:
                os.kill(workers[int(rng.integers(len(workers)))].pid, signal.SIGKILL)
                struck.append(time.monotonic())
                return
            time.sleep(0.01)

    done = []
    with make_source(samples, Slow(), workers=2, prefetch=1, **options) as batches:
        if running:
            done.append(next(batches))
        killer = threading.Timer(delay, kill)
        killer.start()
        try:
            while len(done) < 1000:
                done.append(next(batches))
        except DataError as error:
            named = "worker process was killed" in str(error)
        else:
            named = False
        seconds = time.monotonic() - struck[0] if struck else LIMIT_SECONDS
        position = batches.position
    killer.join()
    left = [c for c in multiprocessing.active_children() if "prefetch" in c.name]
    head = resume.same(done[:STEPS], reference[: len(done)])
    step = min(position // resume.BATCH, STEPS - 1)
    start = step * resume.BATCH
    with make_source(samples, Slow(), threads=16, start=start, **options) as batches:
        rest = [next(batches) for _ in range(STEPS - step)]
    right = (
        named
        and seconds < LIMIT_SECONDS
        and not left
        and head
        and position == len(done) * resume.BATCH
        and resume.same(rest, reference[step:])
    )
    return seconds, right


def _limits(folder: pathlib.Path, tries: int) -> Row:
    """Random shares of bad samples against random limits; rows are judged in their order."""
    rng = np.random.default_rng(3)
    n = sum(resume.SHARDS)
    begin, good, refused, wrong = time.perf_counter(), 0, 0, 0
    for k in range(tries):
        share, limit = rng.uniform(0, 0.3), float(rng.uniform(0.02, 0.3))
        row = int(rng.integers(2, 6)) if k % 2 else 0
        broken = frozenset(np.flatnonzero(rng.random(n) < share).tolist())
        inside = folder / str(k)
        inside.mkdir()
        samples = resume.collection(inside, broken)
        expected = _stops_after(n, broken, limit, row)
        with make_source(
            samples,
            resume.transform(),
            batch_size=resume.BATCH,
            seed=0,
            threads=2,
            shuffle=False,
            max_bad_fraction=limit,
            min_seen=2 * resume.BATCH,
            max_consecutive_bad=row,
        ) as batches:
            steps = 0
            try:
                while steps < 6:
                    next(batches)
                    steps += 1
            except DataError as error:
                found = steps
                known = "samples are bad" in str(error) or "in a row are bad" in str(error)
            else:
                found, known = None, True
            listed = {int(bad["key"]) for bad in batches.drain_bad()}
        read = set(range(min((steps + (found is not None)) * resume.BATCH, n)))
        right = found == expected and known and read & broken <= listed <= broken
        wrong += not right
        refused += right and found is not None
        good += right and found is None
    return Row(
        "share of bad samples beside its limit",
        tries,
        good,
        refused,
        wrong,
        time.perf_counter() - begin,
        "or several in a row; each bad one listed by its key",
    )


def _stops_after(n: int, broken: frozenset, limit: float, row: int) -> int | None:
    """How many of six batches pass before the run must end; None where it must not."""
    run_length = longest = bad = 0
    for step in range(6):
        for g in range(step * resume.BATCH, (step + 1) * resume.BATCH):
            is_bad = g % n in broken
            bad += is_bad
            run_length = run_length + 1 if is_bad else 0
            longest = max(longest, run_length)
        seen = (step + 1) * resume.BATCH
        if (row and longest > row) or (seen >= 2 * resume.BATCH and bad > limit * seen):
            return step
    return None
