"""A lock that lets only one job at a time write to a directory; used by `checkpoint`."""

import contextlib
import errno
import os
import pathlib
import threading
import time
from collections.abc import Callable

import filelock
from absl import logging

from unclip.errors import DataError, Stopped

HEARTBEAT_S = 20.0
SILENCE_S = 90.0  # longer than a heartbeat plus the attribute cache of a network file system
OS_LOCK = "lock"  # held open by its owner; says nothing of him
CLAIM = "lock.owner"  # who the owner is, touched at every heartbeat


class DirectoryLock:
    """Holds a directory until `release`, taking it over from a run that has died.

    Two locks of the library filelock, since neither is enough. The operating system's (flock) goes
    with its process, even one that is killed, and stays with one that is frozen; but some mounts
    have none, and some keep it to one host. The claim beside it is a file that its owner touches
    every `HEARTBEAT_S` seconds. It is replaced at once where its process is known to be gone, by
    boot, process number and start, and otherwise when it was not touched for `SILENCE_S` seconds by
    the clock of the one who waits: a pre-empted job that restarts on another host waits no longer
    than that. Of several that wait, one gets it.

    Args:
      directory: exists.
      on_lost: called, by another thread, when the directory was taken away from this job.

    Raises:
      DataError: a live job holds the directory, or it cannot be written.
    """

    def __init__(self, directory: str | os.PathLike, on_lost: Callable[[], None] | None = None):
        self.directory = pathlib.Path(directory)
        self._os = filelock.FileLock(
            self.directory / OS_LOCK, fallback_to_soft=False, thread_local=False
        )
        self._claim = filelock.SoftFileLease(
            self.directory / CLAIM,
            lease_duration=SILENCE_S,
            heartbeat_interval=HEARTBEAT_S,
            on_compromise=lambda _: on_lost and on_lost(),
            thread_local=False,
        )
        self._releasing = threading.Lock()
        try:
            self._take()
        except OSError as error:
            self._let_go()
            raise DataError(f"cannot write to {directory}: {error.strerror or error}") from error
        except BaseException:
            self._let_go()
            raise

    def _take(self) -> None:
        try:
            self._os.acquire(timeout=0)
        except filelock.Timeout:
            raise DataError(self._in_use()) from None
        except (OSError, NotImplementedError) as error:
            if not _no_such_lock(error):
                raise
            logging.info("%s has no locks of the system: %s", self.directory, error)
        try:
            self._claim.acquire(timeout=0)
            return
        except filelock.Timeout:
            logging.warning("%s: watching it for %g s", self._in_use(), SILENCE_S)
        path, seen, touched = self.directory / CLAIM, None, False

        def touched_or_replaced() -> bool:
            nonlocal seen, touched
            with contextlib.suppress(OSError):
                now = path.stat()
                mark = (now.st_ino, now.st_mtime_ns)
                touched = seen not in (None, mark)
                seen = mark
            return touched

        try:
            self._claim.acquire(
                timeout=SILENCE_S + 2 * HEARTBEAT_S,
                poll_interval=min(1.0, SILENCE_S / 10),
                cancel_check=touched_or_replaced,
            )
        except filelock.Timeout:
            raise DataError(self._in_use()) from None
        logging.warning("took over %s from a job that is gone", self.directory)

    def _in_use(self) -> str:
        owner = self._claim.owner
        who = f"process {owner.pid} on {owner.hostname}" if owner else "another process"
        return (
            f"{self.directory} is in use by {who}; give this run another folder, or remove "
            f"{self.directory / CLAIM} if that run is gone"
        )

    def check(self) -> None:
        """Returns if the directory is still this job's; call it before what must be written alone.

        Raises:
          Stopped: another job has taken it.
          DataError: the directory is gone.
        """
        for pause in (0.0, 0.1, 1.0):  # a network file system may be late
            time.sleep(pause)
            owner = self._claim.owner
            if owner is not None and owner.token == self._claim.token:
                return
        if not self.directory.is_dir():
            raise DataError(f"{self.directory} is gone: it was moved or removed while in use")
        who = f"process {owner.pid} on {owner.hostname}" if owner else "somebody"
        raise Stopped(
            f"{self.directory} was taken from this job by {who}: it writes no more there; "
            "what it saved before is whole"
        )

    def release(self) -> None:
        """Lets the next one have the directory; safe to call twice."""
        with self._releasing:
            self._let_go()

    def _let_go(self) -> None:
        with contextlib.suppress(OSError):
            self._claim.release(force=True)
        if self._os.is_locked:
            # While it is still held: whoever opened this file meanwhile sees that it is no more.
            with contextlib.suppress(OSError):
                (self.directory / OS_LOCK).unlink()
            with contextlib.suppress(OSError):
                self._os.release(force=True)


def _no_such_lock(error: Exception) -> bool:
    """Whether a mount has no locks, as its answer to flock."""
    names = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
    return isinstance(error, NotImplementedError) or error.errno in names
