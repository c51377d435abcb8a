"""An object server that fails by the thousand: bytes equal, time bounded, cache within its cap."""

import collections
import contextlib
import multiprocessing
import os
import pathlib
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from objects import FAULTS, ObjectServer
from table import Row

from unclip.errors import DataError
from unclip.input.storage import blocks
from unclip.input.storage.storage import Storage

ATTEMPTS, SECONDS, BLOCK, CAP = 6, 1.0, 1 << 14, 1 << 17
IN_A_ROW = 3  # faults of one range before it is served: fewer than ATTEMPTS
_THREADS = 24


def run(scale: float) -> list[Row]:
    """Reads random ranges while the server breaks most answers; then three that never get well."""
    count = max(len(FAULTS), round(1000 * scale))
    return [
        _ranges(count, whole_blocks=False),
        _ranges(count, whole_blocks=True),
        _dead(),
        _killed(max(1, round(10 * scale))),
        _changed(),
        _large(),
    ]


class _Injector:
    """Deals faults in turn, four to five answers, until `count` were dealt."""

    def __init__(self, count):
        self.left, self.dealt = count, collections.Counter()
        self.rows, self.lock = collections.Counter(), threading.Lock()
        self.random = random.Random(0)

    def __call__(self, *place):
        with self.lock:
            if not self.left or self.rows[place] >= IN_A_ROW or self.random.random() < 0.2:
                self.rows[place] = 0
                return ""
            self.left -= 1
            self.rows[place] += 1
            fault = FAULTS[self.left % len(FAULTS)]
            self.dealt[fault] += 1
            return fault


def _ranges(count, *, whole_blocks):
    data = random.Random(1).randbytes(700_001)
    inject, began, worst, wrong = _Injector(count), time.monotonic(), 0.0, 0
    with tempfile.TemporaryDirectory() as folder, ObjectServer({"a.tar": data}, inject) as server:
        storage = Storage(folder, CAP, BLOCK, ATTEMPTS, SECONDS, whole_blocks)
        address, largest = server.address("a.tar"), 0

        def read(number):
            rng = random.Random(number)
            offset = rng.randrange(len(data) - 2)
            size = min(rng.randrange(1, 40_000), len(data) - offset)
            start = time.monotonic()
            got = storage.read(address, offset, size, (len(data), server.tags["a.tar"]))
            blocks = size // BLOCK + 2 if whole_blocks else 1
            return got == data[offset : offset + size], time.monotonic() - start, blocks

        reads = 0
        with ThreadPoolExecutor(_THREADS) as pool:
            while inject.left:
                for equal, seconds, blocks in pool.map(read, range(reads, reads + 60)):
                    worst = max(worst, seconds)
                    # Two waits at most for each block: for another thread's reading, and one's own.
                    wrong += not equal or seconds > 2 * blocks * ATTEMPTS * SECONDS
                reads += 60
                held = _size(folder)
                largest, wrong = max(largest, held), wrong + (held > CAP)
        counts = storage.counters()
        # aiohttp itself asks once more where a kept connection was closed under it.
        seen = counts["retries"] >= count - inject.dealt["hang-up"]
        wrong += not seen or set(inject.dealt) != set(FAULTS)
        note = (
            f"{reads} reads, {counts['requests']} requests, {counts['retries']} retries, "
            f"{counts['bytes'] / 1e6:.1f} MB, worst {worst:.1f} s"
        )
        if whole_blocks:
            note += f", cache at most {largest} of {CAP} bytes, {counts['cache_hits']} hits"
    mode = "blocks" if whole_blocks else "ranges"
    return Row(
        f"object server, {mode}", count, count - wrong, 0, wrong, time.monotonic() - began, note
    )


def _dead():
    """A server that only ever fails is named, with range, attempts and cause, in bounded time."""
    began, data = time.monotonic(), bytes(1000)

    def refused(fault):
        with ObjectServer({"a.tar": data}, lambda *_: fault) as server:
            start = time.monotonic()
            try:
                Storage(attempts=3, timeout_seconds=0.5).read(
                    server.address("a.tar"), 10, 500, (len(data), "")
                )
            except DataError as error:
                named = all(word in str(error) for word in ("a.tar", "10 to 509", "attempts"))
                return named and time.monotonic() - start < 2.5
            return False

    with ThreadPoolExecutor(len(FAULTS)) as pool:
        good = sum(pool.map(refused, FAULTS))
    return Row(
        "object server, never gets well",
        len(FAULTS),
        0,
        good,
        len(FAULTS) - good,
        time.monotonic() - began,
    )


def _killed(rounds):
    """Two processes fill one cache and one is killed: the other reads on, the cap holds."""
    began, wrong, data, largest = time.monotonic(), 0, random.Random(1).randbytes(700_001), 0
    context, rng = multiprocessing.get_context("spawn"), random.Random(2)
    with tempfile.TemporaryDirectory() as folder, ObjectServer({"a.tar": data}) as server:
        for number in range(rounds):
            # The victim has no end of its own; the other counts its reads.
            ready, others = context.Event(), []
            for reads in (1 << 40, 300):
                others.append(
                    context.Process(
                        target=_fill,
                        args=(folder, server.address("a.tar"), data, reads, number, ready),
                    )
                )
                others[-1].start()
            ready.wait(60)
            time.sleep(rng.uniform(0.0, 0.3))
            others[0].kill()
            while others[1].is_alive():
                largest = max(largest, _size(folder))
                time.sleep(0.01)
            for other in others:
                other.join()
            wrong += others[1].exitcode != 0 or largest > CAP
        left = blocks.Blocks(folder, CAP)
        for n in range(2 * CAP // BLOCK):
            wrong += not left.put(blocks.block_name("b", "", 1, BLOCK, n), bytes(BLOCK))
        wrong += bool(list(pathlib.Path(folder).glob(".*.tmp"))) or _size(folder) > CAP
    return Row(
        "reader killed beside a shared cache",
        rounds,
        rounds - wrong,
        0,
        wrong,
        time.monotonic() - began,
        f"cache at most {largest} of {CAP} bytes",
    )


def _fill(folder, address, data, reads, seed, ready):
    """A process of `_killed`: ends with 1 where it reads wrong bytes."""
    storage, rng = Storage(folder, CAP, BLOCK, whole_blocks=True), random.Random(f"{seed} {reads}")
    for _ in range(reads):
        offset = rng.randrange(len(data) - 1000)
        if storage.read(address, offset, 1000, (len(data), '"0"')) != data[offset : offset + 1000]:
            sys.exit(1)
        if reads > 1 << 30:
            ready.set()


def _changed():
    """An object that is replaced while it is read is refused, not mixed with the old one."""
    began, refused, data = time.monotonic(), 0, bytes(1000)
    for new, tag in ((bytes(1000), '"new"'), (bytes(1001), '"0"'), (bytes(10), '"new"')):
        with ObjectServer({"a.tar": data}) as server:
            storage = Storage()
            storage.read(server.address("a.tar"), 0, 100)
            server.objects["a.tar"], server.tags["a.tar"] = new, tag
            try:
                storage.read(server.address("a.tar"), 100, 100)
            except DataError as error:
                refused += "has changed" in str(error)
    return Row(
        "object replaced while it is read", 3, 0, refused, 3 - refused, time.monotonic() - began
    )


def _large():
    """A server that ignores ranges, or never ends, is not listened to for the whole object."""
    began, sent, size = time.monotonic(), [], 64 << 20
    for fault in ("ignored", "endless", "more"):
        with ObjectServer({"a.tar": bytes(size)}, lambda *_, fault=fault: fault) as server:
            try:
                Storage(attempts=1, timeout_seconds=5.0).read(
                    server.address("a.tar"), 0, 1000, (size, "")
                )
            except DataError:
                time.sleep(0.2)  # what the kernel had taken over is counted too
                sent.append(server.sent)
    good = sum(n < 16 << 20 for n in sent)
    return Row(
        "more bytes than asked for",
        3,
        0,
        good,
        3 - good,
        time.monotonic() - began,
        f"at most {max(sent, default=0) / 1e6:.1f} MB of 67 taken by the sockets",
    )


def _size(folder):
    total = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            total += entry.stat().st_size if ".block" in entry.name else 0
    return total


if __name__ == "__main__":
    from table import table

    print(table(run(float(os.environ.get("SCALE", "1")))))
