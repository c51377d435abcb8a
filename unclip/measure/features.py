"""Features of a set of pictures: read on host threads, computed on every device, gathered.

Fréchet distances, kernel distances, precision and recall all start from one row of numbers per
picture. Every picture that can be read gives exactly one row, with the same bits for any batch
size, devices and processes: the device program always computes the same number of rows, and rows
of padding are never counted.
"""

import contextlib
import dataclasses
import itertools
import os
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unclip import errors
from unclip.files.moments import Moments
from unclip.input.samples import BadSample
from unclip.measure.inception_extractor import inception_extractor
from unclip.measure.picture_set import PictureSet
from unclip.runtime import collectives, distributed
from unclip.runtime.progress import progress

__all__ = ["Extracted", "Extractor", "extract", "inception_extractor"]

ROWS = {"cpu": 8}  # rows that a device computes at once, by platform; on others
ACCELERATOR_ROWS = 64
IN_FLIGHT = 2  # calls that the devices have to do while the next one is prepared
MOMENT_ROWS = 512  # added up at a time: one large product in place of many small ones
MANY = 256  # pictures from which on progress is shown


class Extractor(Protocol):
    """A network that computes features of pictures. It must not change while it is in use.

    Attributes:
      id: names the network and how pictures are prepared for it; part of every metric's key.
      provenance: JSON-able facts, "weights_sha256" among them.
      outputs: width of each output by name.
      params: parameters of the network, a tree of arrays.
    """

    id: str
    provenance: dict[str, Any]
    outputs: dict[str, int]
    params: Any

    def prepare(self, picture: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays that `apply` needs of a picture uint8 [H, W, 3]; runs in threads.

        Each different set of shapes is compiled separately, so there should be few.
        """

    def apply(self, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """{output: float [b, width]} of b prepared pictures; traced; rows are independent."""


@dataclasses.dataclass(eq=False)
class Extracted:
    """The features of a set, equal on every process.

    Attributes:
      count: pictures measured, all except `bad`.
      moments: by output.
      rows: float32 [count, width] by output, in picture order; None without `keep`.
      bad: (name, reason) of the pictures that could not be read, in picture order. The caller
        decides whether the others may be measured without them.
      names: of the pictures measured.
      greyscale: how many of them were stored without colour.
      sizes: how many have each (height, width).
    """

    count: int
    moments: dict[str, Moments]
    rows: dict[str, np.ndarray] | None
    bad: list[tuple[str, str]]
    names: list[str]
    greyscale: int
    sizes: Counter


def extract(
    extractor: Extractor,
    pictures: PictureSet,
    *,
    devices: Sequence[jax.Device] | None = None,
    batch_size: int = 64,
    outputs: Sequence[str] | None = None,
    keep: bool = True,
    threads: int | None = None,
) -> Extracted:
    """Features of all pictures; called by every process of a job with the same arguments.

    Each process takes a contiguous part of the picture numbers, on its own devices. With another
    number of processes, moments differ only by the order of float64 sums.

    Args:
      extractor: what is computed; its compiled programs are kept as long as the object exists.
      pictures: of which.
      devices: of this process; None: all of them.
      batch_size: pictures that a process reads ahead at most, and between two checks whether to
        stop; no result depends on it.
      outputs: names of the extractor's outputs; all when None.
      keep: also return the rows.
      threads: that read and prepare pictures; None: one per core, at most 16.

    Raises:
      ConfigError: an unknown output, or no pictures.
      NumericsError: a picture with NaN or infinite features; names it.
      Stopped: the job was asked to stop; features of a part of the set are not returned.
      DataError: errors of the set other than `BadSample`.
    """
    outputs = tuple(extractor.outputs) if outputs is None else tuple(outputs)
    for name in outputs:
        if name not in extractor.outputs:
            raise errors.unknown(f"output of {extractor.id}", name, extractor.outputs)
    if batch_size < 1:
        raise errors.ConfigError(f"batch_size {batch_size}: expected at least 1")
    if not len(pictures):
        raise errors.ConfigError(f"{pictures.source}: no pictures")
    index, count = distributed.process_index(), distributed.process_count()
    share = -(-len(pictures) // count)
    numbers = range(len(pictures))[index * share : (index + 1) * share]
    devices = tuple(devices or jax.local_devices())
    rows = ROWS.get(devices[0].platform, ACCELERATOR_ROWS)
    # A small set does not fill every device.
    devices = devices[: max(1, -(-share // rows))]
    own = _Part(extractor, pictures, outputs, keep)
    calls = _Calls(*_program(extractor, outputs, devices), rows * len(devices), own.add)
    threads = threads or min(16, os.cpu_count() or 1)
    failure = None
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        shown = None
        if len(numbers) >= MANY:
            what = f"{extractor.id} of {pictures.source}"
            shown = stack.enter_context(progress(len(numbers), what, "picture"))
        read = _read_ahead(pool, own.read, numbers, max(batch_size, threads))
        # Every process must ask equally often, also one that has fewer pictures or has failed.
        for _ in range(-(-share // batch_size)):
            try:
                for number, found in itertools.islice(read, batch_size if failure is None else 0):
                    prepared = own.take(number, found)
                    if prepared is not None:
                        calls.put(number, prepared)
                    if shown is not None:
                        shown.update()
            except errors.UnclipError as error:
                failure = error
            if distributed.should_stop():
                read.close()
                raise errors.Stopped(f"asked to stop while measuring {pictures.source}")
        read.close()
        try:
            if failure is None:
                calls.finish()
                own.finish()
        except errors.UnclipError as error:
            failure = error
    collectives.raise_together(failure)
    return own.everywhere()


# ============================================================ one process


class _Part:
    """What this process has measured."""

    def __init__(self, extractor, pictures, outputs, keep):
        self.extractor, self.pictures, self.keep = extractor, pictures, keep
        self.moments = {name: Moments(extractor.outputs[name]) for name in outputs}
        self.rows: dict[str, list[np.ndarray]] = {name: [] for name in outputs}
        self.waiting: list[tuple[list[int], dict[str, np.ndarray]]] = []
        self.numbers: list[int] = []
        self.bad: list[tuple[int, str]] = []
        self.sizes: Counter = Counter()
        self.greyscale = 0

    def read(self, number: int) -> tuple[tuple[int, int], bool, dict[str, np.ndarray]] | BadSample:
        """(size, greyscale, prepared) of a picture, or why it is bad; called in threads."""
        try:
            picture = self.pictures.read(number)
        except BadSample as error:
            return error
        grey = bool(self.pictures.greyscale(number))
        return picture.shape[:2], grey, self.extractor.prepare(picture)

    def take(self, number: int, found) -> dict[str, np.ndarray] | None:
        """Notes a picture that was read; returns its prepared arrays, None for a bad one."""
        if isinstance(found, BadSample):
            self.bad.append((number, " ".join(found.message.split())))
            return None
        size, grey, prepared = found
        self.sizes[size] += 1
        self.greyscale += grey
        return prepared

    def add(self, numbers: list[int], rows: dict[str, np.ndarray]) -> None:
        """Takes rows float32 [b, width] of b pictures."""
        self.waiting.append((numbers, rows))
        if sum(len(numbers) for numbers, _ in self.waiting) >= MOMENT_ROWS:
            self.finish()

    def finish(self) -> None:
        """Adds up the rows that wait."""
        if not self.waiting:
            return
        numbers = [number for numbers, _ in self.waiting for number in numbers]
        names = [self.pictures.name(number) for number in numbers]
        for name, moments in self.moments.items():
            rows = np.concatenate([rows[name] for _, rows in self.waiting])
            moments.add(rows, names=names)
            if self.keep:
                self.rows[name].append(rows)
        self.numbers += numbers
        self.waiting = []

    def everywhere(self) -> Extracted:
        """The results of all processes together, in picture order."""
        facts = {
            "numbers": self.numbers, "bad": self.bad, "greyscale": self.greyscale,
            "sizes": [[*size, count] for size, count in self.sizes.items()],
        }  # fmt: skip
        facts = collectives.gather_objects(facts)
        numbers = np.array([n for part in facts for n in part["numbers"]], np.int64)
        order = np.argsort(numbers)
        moments, rows = {}, {}
        for name, own in self.moments.items():
            width = len(own.total)
            moments[name] = Moments(width)
            sums = np.concatenate([[own.count], own.total, own.outer.reshape(-1)])
            for values in collectives.gather_arrays(sums):
                part = Moments(width)
                part.count, part.total = int(values[0]), values[1 : 1 + width]
                part.outer = values[1 + width :].reshape(width, width)
                moments[name].merge(part)
            if self.keep:
                kept = np.concatenate([np.zeros((0, width), np.float32), *self.rows.pop(name)])
                rows[name] = np.concatenate(
                    [part.reshape(-1, width) for part in collectives.gather_arrays(kept)]
                )
                rows[name] = rows[name][order]
        sizes: Counter = Counter()
        for part in facts:
            sizes.update({(height, width): n for height, width, n in part["sizes"]})
        bad = sorted((n, reason) for part in facts for n, reason in part["bad"])
        return Extracted(
            count=len(numbers),
            moments=moments,
            rows=rows if self.keep else None,
            bad=[(self.pictures.name(n), reason) for n, reason in bad],
            names=[self.pictures.name(int(n)) for n in numbers[order]],
            greyscale=sum(part["greyscale"] for part in facts),
            sizes=sizes,
        )


def _read_ahead(pool: ThreadPoolExecutor, read: Callable, numbers: range, ahead: int) -> Iterator:
    """(number, read(number)) in order; at most `ahead` of them are started in advance."""
    futures: deque = deque()
    try:
        for number in numbers:
            futures.append((number, pool.submit(read, number)))
            if len(futures) == ahead:
                number, future = futures.popleft()
                yield number, future.result()
        while futures:
            number, future = futures.popleft()
            yield number, future.result()
    finally:
        for _, future in futures:
            future.cancel()


class _Calls:
    """Groups pictures of equal shapes into calls of the device program.

    Args:
      program: params, {name: [size, ...]} -> {output: float32 [size, width]}.
      params: on the devices; place: the sharding of a batch.
      size: rows of every call.
      give: called with (picture numbers, {output: rows}) of a finished call.
    """

    def __init__(self, program, params, place, size, give):
        self.program, self.params, self.place = program, params, place
        self.size, self.give = size, give
        self.buckets: dict[tuple, list[tuple[int, dict[str, np.ndarray]]]] = {}
        self.flying: deque = deque()

    def put(self, number: int, prepared: dict[str, np.ndarray]) -> None:
        """Adds a picture."""
        key = tuple((name, prepared[name].shape) for name in sorted(prepared))
        self.buckets.setdefault(key, []).append((number, prepared))
        if len(self.buckets[key]) == self.size:
            self._start(key)
        elif sum(map(len, self.buckets.values())) > 4 * self.size:
            # Pictures of many shapes wait for others of their shape: the memory for them is
            # bounded.
            self._start(max(self.buckets, key=lambda key: len(self.buckets[key])))

    def finish(self) -> None:
        """Computes the pictures that wait."""
        for key in list(self.buckets):
            self._start(key)
        while self.flying:
            self._land()

    def _start(self, key: tuple) -> None:
        bucket = self.buckets.pop(key)
        batch = {}
        for name, shape in key:
            first = bucket[0][1][name]
            batch[name] = np.empty((self.size, *shape), first.dtype)
            for row, (_, prepared) in enumerate(bucket):
                batch[name][row] = prepared[name]
            batch[name][len(bucket) :] = first  # padding; not counted
        found = self.program(self.params, jax.device_put(batch, self.place))
        self.flying.append(([number for number, _ in bucket], found))
        if len(self.flying) > IN_FLIGHT:
            self._land()

    def _land(self) -> None:
        numbers, found = self.flying.popleft()
        found = jax.device_get(found)
        self.give(numbers, {name: rows[: len(numbers)] for name, rows in found.items()})


_programs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _program(extractor: Extractor, outputs: tuple[str, ...], devices: tuple) -> tuple:
    """(program, params on the devices, sharding of a batch); made once per extractor."""
    known = _programs.setdefault(extractor, {})
    # Not named "data": networks know that axis and would shard their rows over it themselves.
    mesh = Mesh(np.array(devices), ("pictures",))
    rows, whole = PartitionSpec("pictures"), PartitionSpec()
    if devices not in known:
        known[devices] = jax.device_put(extractor.params, NamedSharding(mesh, whole))
    if (devices, outputs) not in known:
        alive = weakref.ref(extractor)

        def run(params, batch):
            found = alive().apply(params, batch)
            return {name: found[name].astype(np.float32) for name in outputs}

        run = jax.shard_map(run, mesh=mesh, in_specs=(whole, rows), out_specs=rows, check_vma=False)
        known[devices, outputs] = jax.jit(run)
    return known[devices, outputs], known[devices], NamedSharding(mesh, rows)
