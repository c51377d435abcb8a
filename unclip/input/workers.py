"""Decoding worker processes: their batches, or a named error soon after one of them was killed.

Pictures may be decoded in processes of grain's, which the system may kill when memory runs out.
grain notices most such deaths, but not a worker that ended with status 0, nor one that died while
it held a lock that both sides share. So a thread fetches the batches, and the caller that waits for
it checks that the processes are alive.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from unclip.errors import DataError

_PATIENCE_SECONDS = 10.0  # from a worker's death to the error, where grain does not notice it
_CLOSE_SECONDS = 3.0  # grain itself may wait for a dead worker without end
_TICK_SECONDS = 0.5
_LOST = (
    "a decoding worker process was killed, often because memory ran out: use fewer workers or a "
    "smaller prefetch"
)


def start_worker(_index: int, _count: int) -> None:
    """Makes a worker ignore the signals that ask the job to stop, and end with the job itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True, name="follow-parent").start()


class Watched(Iterator):
    """Iterates over a grain dataset of worker processes, which start at the first batch.

    Args:
      dataset: made by `mp_prefetch`.
      endless: the dataset has no end, so any worker that ends was lost.

    Raises (while iterating):
      DataError: a worker process is gone. Errors of the workers are raised again.
    """

    def __init__(self, dataset, *, endless: bool):
        if not flags.FLAGS.is_parsed():  # outside an absl app; grain reads its flags
            flags.FLAGS.mark_as_parsed()
        self._endless = endless
        self._iterator = iter(dataset)
        self._fetched: queue.Queue = queue.Queue(maxsize=1)
        self._closed, self._ended = threading.Event(), False
        self._pump = threading.Thread(target=self._fetch, daemon=True, name="fetch-batches")
        self._workers: dict[int, Any] = {}
        self._strangers: set[int] = set()  # child processes that are not workers

    def __next__(self) -> Any:
        if not self._pump.ident:
            self._strangers = {child.pid for child in multiprocessing.active_children()}
            self._pump.start()
            found = self._get(starting=True)
            self._note_workers()  # all of them run by now; processes started later are not workers
            return found
        return self._get()

    def _get(self, starting: bool = False) -> Any:
        lost_since = None
        while not (self._closed.is_set() or self._ended):
            try:
                batch, error = self._fetched.get(timeout=_TICK_SECONDS)
            except queue.Empty:
                if starting:
                    self._note_workers()
                if self._lost():
                    lost_since = lost_since or time.monotonic()
                    if time.monotonic() - lost_since > _PATIENCE_SECONDS:
                        self._abandon()
                        raise DataError(_LOST) from None
                continue
            if error is None:
                return batch
            self._ended = True
            if isinstance(error, RuntimeError) and "terminated unexpectedly" in str(error):
                self._abandon()  # grain reports a dead worker by this
                raise DataError(_LOST) from error
            raise error
        raise StopIteration

    def _fetch(self) -> None:
        while not self._closed.is_set():
            try:
                found = next(self._iterator), None
            except BaseException as error:  # raised again by the thread that waits
                found = None, error
            while not self._closed.is_set():
                with contextlib.suppress(queue.Full):
                    self._fetched.put(found, timeout=_TICK_SECONDS)
                    break
            if found[1] is not None:
                return

    def _note_workers(self) -> None:
        for child in multiprocessing.active_children():
            if child.pid not in self._strangers and "process-prefetch" in child.name:
                self._workers.setdefault(child.pid, child)

    def _lost(self) -> bool:
        codes = [worker.exitcode for worker in self._workers.values()]
        return any(code or (code == 0 and self._endless) for code in codes)

    def _abandon(self) -> None:
        """Ends the other workers at once: waiting for each to finish its batch takes too long."""
        for worker in self._workers.values():
            worker.kill()
        self._closed.set()
        # grain may wait for a message or a lock of a dead worker, so it is closed in a thread.
        closing = threading.Thread(target=self._iterator.close, daemon=True, name="close-workers")
        closing.start()
        closing.join(_CLOSE_SECONDS)

    def close(self) -> None:
        """Ends the worker processes."""
        if not self._closed.is_set():
            self._closed.set()
            self._iterator.close()
            self._pump.join(_CLOSE_SECONDS)
