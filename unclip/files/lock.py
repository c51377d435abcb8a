"""A lock that lets only one job at a time write to a directory; used by `checkpoint`."""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time

import psutil
from absl import logging

from unclip.errors import DataError

HEARTBEAT_S = 20.0
SILENCE_S = 90.0  # longer than a heartbeat plus the attribute cache of a network file system


class DirectoryLock:
    """Holds `<directory>/lock.json` until `release`, taking it over from a run that has died.

    On the same host a dead process is recognised by its number and start time. A lock of another
    host is watched: its owner touches the file every `HEARTBEAT_S` seconds, and a lock that was not
    touched for `SILENCE_S` seconds is stale. A pre-empted job that restarts on another host waits
    no longer than that.

    Raises:
      DataError: a live run holds the directory, or the file cannot be written.
    """

    def __init__(self, directory: str | os.PathLike):
        self._path = pathlib.Path(directory) / "lock.json"
        self._text = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": psutil.Process().create_time(),
                "id": os.urandom(8).hex(),
            }
        )
        if not self._create():
            self._take_over()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="checkpoint-lock", daemon=True)
        self._thread.start()

    def _create(self) -> bool:
        try:
            with open(self._path, "x") as file:
                file.write(self._text)
        except FileExistsError:
            return False
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror}") from error
        return True

    def _take_over(self) -> None:
        owner = self._owner()
        if self._alive(owner):
            raise DataError(
                f"{self._path.parent} is in use by process {owner['pid']} on "
                f"{owner['host']}; give this run another --workdir, or remove "
                f"{self._path} if that run is gone"
            )
        logging.warning(
            "taking over %s from process %s on %s, which is gone",
            self._path.parent,
            owner["pid"],
            owner["host"],
        )
        # If two jobs find the same stale lock, renaming decides: only one rename succeeds.
        grave = self._path.with_name(f"lock.{os.urandom(8).hex()}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path, grave)
        if not self._create():
            raise DataError(f"{self._path.parent} was taken by another run just now")
        grave.unlink(missing_ok=True)

    def _owner(self) -> dict:
        try:
            owner = json.loads(self._path.read_text())
            return {
                "pid": int(owner["pid"]),
                "host": str(owner["host"]),
                "started": float(owner["started"]),
            }
        except (OSError, ValueError, KeyError, TypeError):
            # The writer was killed while writing it, so it names no owner: stale unless it is
            # touched.
            return {"pid": 0, "host": "an unknown host", "started": 0.0}

    def _alive(self, owner: dict) -> bool:
        if owner["host"] == socket.gethostname():
            try:
                # Containers reuse process numbers, so the start time decides.
                return abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) < 2.0
            except psutil.NoSuchProcess:
                return False
        logging.warning(
            "%s belongs to process %s on %s: watching it for %g s",
            self._path,
            owner["pid"],
            owner["host"],
            SILENCE_S,
        )
        before, deadline = self._path.stat().st_mtime_ns, time.monotonic() + SILENCE_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SILENCE_S / 10))
            try:
                if self._path.stat().st_mtime_ns != before:
                    return True
            except FileNotFoundError:
                return False
        return False

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):  # a full disk must not end the run from this thread
                os.utime(self._path)

    def release(self) -> None:
        """Removes the lock if it is still ours; safe to call twice."""
        if not self._done.is_set():
            self._done.set()
            self._thread.join()
            with contextlib.suppress(OSError):
                if self._path.read_text() == self._text:
                    self._path.unlink()
