"""Contenders for a stale lock, live owners that look dead, and owners that lost their directory.

Each contender is a process of its own. "No locks" is a mount whose flock answers ENOSYS; there the
claim alone decides, by its heartbeats.
"""

import errno
import multiprocessing
import os
import pathlib
import tempfile
import time

import filelock
from absl import logging
from table import Row

from unclip import errors
from unclip.files import lock

HEARTBEAT_S, SILENCE_S, HOLD_S = 0.05, 0.5, 0.15


def prepare(locks: bool) -> None:
    """This process's clockwork, quick, on a mount with or without locks."""
    lock.HEARTBEAT_S, lock.SILENCE_S = HEARTBEAT_S, SILENCE_S
    if not locks:

        def acquire(self, **_):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        filelock.FileLock.acquire = acquire


def contender(folder, locks, barrier, results) -> None:
    """Round after round: all begin together, one may hold the directory at a time."""
    prepare(locks)
    while True:
        barrier.wait()
        number = folder / (folder / "round").read_text()
        if number.name == "end":
            return
        try:
            held = lock.DirectoryLock(number)
        except errors.DataError:
            results.put("refused")
        else:
            try:  # alone, for as long as it is held
                (number / "inside").mkdir()
                time.sleep(HOLD_S)
                held.check()
                (number / "inside").rmdir()
                results.put("held")
            except Exception as error:
                results.put(f"wrong: {error!r}")
            # Later than the last contender's wait, so that none comes when it is free.
            time.sleep(SILENCE_S)
            held.release()
        barrier.wait()


def stale(folder: pathlib.Path, foreign: bool) -> None:
    """Leaves a dead owner's claim in a folder; of this host or, by its words, of another."""
    folder.mkdir()
    child = os.fork()
    if child == 0:
        held = lock.DirectoryLock(folder)
        held.check()
        os._exit(9)
    os.waitpid(child, 0)
    if foreign:
        path = folder / lock.CLAIM
        lines = path.read_text().splitlines()
        path.write_text("".join(("host=x" if "host=" in one else one) + "\n" for one in lines))


def contend(rounds: int, count: int, locks: bool) -> Row:
    """Of `count` processes that find a dead owner's claim at once, one gets it."""
    context = multiprocessing.get_context("fork")
    begin, right, wrong, note = time.perf_counter(), 0, 0, ""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        barrier, results = context.Barrier(count + 1), context.Queue()
        jobs = [
            context.Process(target=contender, args=(folder, locks, barrier, results), daemon=True)
            for _ in range(count)
        ]
        for job in jobs:
            job.start()
        prepare(True)
        for number in range(rounds):
            stale(folder / str(number), foreign=bool(number % 2))
            (folder / "round").write_text(str(number))
            barrier.wait()
            barrier.wait()
            found = sorted(results.get() for _ in jobs)
            if found == ["held"] + ["refused"] * (count - 1):
                right += 1
            else:
                wrong, note = wrong + 1, str(found)
        (folder / "round").write_text("end")
        barrier.wait()
    where = "local disk" if locks else "a mount without locks"
    seconds = time.perf_counter() - begin
    what = f"{count} contenders for a stale lock, {where}"
    return Row(
        what, rounds, right, 0, wrong, seconds, note or "one owner each, half of them foreign"
    )


def alive(tries: int) -> Row:
    """A live owner: in another PID namespace by its name, with its clock stepped, asked again."""
    prepare(False)
    begin, wrong = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as name:
        for number in range(tries):
            folder = pathlib.Path(name) / str(number)
            folder.mkdir()
            held = lock.DirectoryLock(folder)
            claim = folder / lock.CLAIM
            kind = number % 3
            if kind == 0:  # the same host name, another namespace: its number says nothing here
                with claim.open("r+") as file:
                    text = file.read()
                    host = text.split("host=")[1].split("\n")[0]
                    text = text.replace(f"host={host}", f"host={host}%f0000abc")
                    text = text.replace(f"pid={os.getpid()}\n", "pid=1\n")
                    file.seek(0)
                    file.write(text)
            else:  # an hour forth or back
                step = 3600 if kind == 1 else -3600
                os.utime(claim, (time.time() + step, time.time() + step))
            try:
                lock.DirectoryLock(folder).release()
                wrong += 1
            except errors.DataError:
                pass
            held.check()
            held.release()
    seconds = time.perf_counter() - begin
    return Row("a live owner that may look dead", tries, 0, tries - wrong, wrong, seconds)


def displaced(tries: int) -> Row:
    """An owner whose claim was removed by force, and taken or not, stops before it writes."""
    prepare(False)
    begin, wrong = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as name:
        for number in range(tries):
            folder = pathlib.Path(name) / str(number)
            folder.mkdir()
            held = lock.DirectoryLock(folder)
            (folder / lock.CLAIM).unlink()
            other = lock.DirectoryLock(folder) if number % 2 else None
            try:
                held.check()
                wrong += 1
            except errors.Stopped:
                pass
            held.release()
            if other is not None:
                try:
                    other.check()
                except errors.UnclipError:
                    wrong += 1
                other.release()
    seconds = time.perf_counter() - begin
    return Row("an owner displaced by force", tries, 0, tries - wrong, wrong, seconds, "stops: 75")


def run(scale: float) -> list[Row]:
    """Every kind; contenders first, since they fork."""
    logging.set_verbosity(logging.ERROR)
    rounds = max(2, round(125 * scale))
    rows = [contend(rounds, count, locks) for count in (2, 4) for locks in (True, False)]
    return [*rows, alive(max(3, round(30 * scale))), displaced(max(2, round(20 * scale)))]
