"""The lock of a directory: one owner, whatever happens to him."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import filelock
import pytest

from unclip import errors
from unclip.files import lock

HOLD = """
import os, sys, time
from unclip.files import lock
lock.HEARTBEAT_S, lock.SILENCE_S = 0.05, 0.6
held = lock.DirectoryLock(sys.argv[1])
print("held", flush=True)
{}
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lock, "SILENCE_S", 0.6)


@pytest.fixture(params=["flock", "no locks"])
def mount(request, monkeypatch):
    """With the system's locks, and as a mount without them."""
    if request.param == "no locks":
        without_locks(monkeypatch)
    return request.param


def without_locks(monkeypatch):
    def acquire(self, **_):
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)


def holder(folder, then: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(then), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_one_owner_at_a_time(tmp_path, mount):
    held = lock.DirectoryLock(tmp_path)
    with pytest.raises(errors.DataError, match=f"in use by process {os.getpid()} on "):
        lock.DirectoryLock(tmp_path)
    held.check()
    held.release()
    held.release()
    assert not list(tmp_path.iterdir())
    lock.DirectoryLock(tmp_path).release()


def test_a_dead_owner_is_replaced_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE_S", 60.0)
    holder(tmp_path, "lock.SILENCE_S = 60; os._exit(9)").wait()
    path = tmp_path / lock.CLAIM
    path.write_text(path.read_text().replace("duration=0.6", "duration=60.0"))
    start = time.monotonic()
    lock.DirectoryLock(tmp_path).release()
    assert time.monotonic() - start < 5


def test_an_owner_of_another_host_is_watched(tmp_path, mount):
    holder(tmp_path, "os._exit(9)").wait()
    path = tmp_path / lock.CLAIM
    lines = path.read_text().splitlines()
    path.write_text("\n".join("host=elsewhere" if "host=" in x else x for x in lines) + "\n")
    start = time.monotonic()
    held = lock.DirectoryLock(tmp_path)
    assert time.monotonic() - start >= 0.6, "silent for long enough: taken over"
    held.release()


def test_a_live_owner_of_another_host_stays(tmp_path, monkeypatch):
    """It touches its claim, whatever its clock says; the system's lock does not reach there."""
    without_locks(monkeypatch)
    held = lock.DirectoryLock(tmp_path)
    for hour in (-3600, 3600):
        now = time.time() + hour
        os.utime(tmp_path / lock.CLAIM, (now, now))
        monkeypatch.setattr(filelock._identity._host.socket, "gethostname", lambda: "a third")
        with pytest.raises(errors.DataError, match="in use"):
            lock.DirectoryLock(tmp_path)
    monkeypatch.undo()
    held.check()
    held.release()


def test_a_frozen_owner_keeps_the_directory_where_there_are_locks(tmp_path):
    process = holder(tmp_path, "time.sleep(60)")
    os.kill(process.pid, signal.SIGSTOP)
    try:
        time.sleep(0.8)
        with pytest.raises(errors.DataError, match=f"in use by process {process.pid} on"):
            lock.DirectoryLock(tmp_path)
    finally:
        process.kill()
        process.wait()
    lock.DirectoryLock(tmp_path).release()


def test_who_lost_it_is_told_and_writes_no_more(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    lost = []
    held = lock.DirectoryLock(tmp_path, on_lost=lambda: lost.append(1))
    (tmp_path / lock.CLAIM).unlink()
    other = lock.DirectoryLock(tmp_path)
    with pytest.raises(errors.Stopped, match=f"taken from this job by process {os.getpid()}"):
        held.check()
    deadline = time.monotonic() + 10
    while not lost and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lost
    held.release()  # not the other's
    other.check()
    other.release()
    (tmp_path / "x").mkdir()
    gone = lock.DirectoryLock(tmp_path / "x")
    for path in (tmp_path / "x").iterdir():
        path.unlink()
    (tmp_path / "x").rmdir()
    with pytest.raises(errors.DataError, match="is gone"):
        gone.check()
    gone.release()


def contend(folder, start, results, locks):
    lock.HEARTBEAT_S, lock.SILENCE_S = 0.05, 0.6
    if not locks:
        without_locks(pytest.MonkeyPatch())
    start.wait()
    try:
        held = lock.DirectoryLock(folder)
    except errors.DataError:
        results.put(0)
        return
    results.put(1)
    time.sleep(1.5)
    held.check()
    held.release()


@pytest.mark.parametrize("locks", [True, False])
def test_of_contenders_for_a_stale_lock_one_gets_it(tmp_path, locks):
    holder(tmp_path, "os._exit(9)").wait()
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    jobs = [
        context.Process(target=contend, args=(tmp_path, start, results, locks)) for _ in range(2)
    ]
    for job in jobs:
        job.start()
    start.set()
    assert sum(results.get(timeout=60) for _ in jobs) == 1
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
