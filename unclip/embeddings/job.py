"""Embeddings of collections by a frozen CLIP, and their mean and covariance.

The prior is trained on z_i of the training pictures and measures their mean, deviation and
principal components first. `embed` yields the rows of a collection in order; `embed_shards` writes
those of whole shards to a folder from which training and statistics read them (`embeddings.store`),
whichever process computed them.
"""

import dataclasses
import os
import pathlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from unclip import errors, files, tasks
from unclip.embeddings import store as stored
from unclip.embeddings.pairs import Pair, ShardBatches, reason
from unclip.embeddings.store import Shard, Store
from unclip.embeddings.sums import Sums, merge, unmerged
from unclip.input import source
from unclip.input.decode import transforms
from unclip.models import clip as clip_model
from unclip.runtime import collectives, distributed, progress, sharding
from unclip.tasks.clip import FrozenClip

MAX_BAD_LISTED = 1000  # bad samples of a shard that are listed one by one
_POLL_SECONDS = 1.0
_STOPPED = "asked to stop: finished shards are kept; the same command continues"


def _program(model: clip_model.CLIP):
    """both(params, uint8 pictures, tokens) -> (z_i, z_t), float32."""
    frozen = FrozenClip(model)

    def both(params, image, tokens):
        return frozen.image(params, image), frozen.text(params, tokens)[0]

    return both


# ============================================================ rows one after another


def embed(
    clip_arch: dict,
    params,
    collection,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    captions: tuple[str, ...] = ("txt",),
    limit: int | None = None,
    start: int = 0,
    threads: int = 4,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Embeds samples in the collection's order, centre crops.

    Every process yields every row, so that all of them compute the same statistics.

    Args:
      clip_arch: fields of the frozen CLIP; params: its parameters.
      batch_size: global, a multiple of the mesh's data and fsdp axes.
      captions: where captions come from: the first of these that a sample has.
      limit: the number of the sample to stop before; start: of the one to begin with.

    Yields:
      (z_i float32 [b, D], z_t float32 [b, D], valid bool [b]); rows that are not valid are bad
      pictures or padding.
    """
    model = clip_model.CLIP(**tasks.arguments(clip_arch))
    run = jax.jit(_program(model), out_shardings=sharding.replicated(mesh))
    batches = source.make_eval_source(
        collection,
        transforms.ImageText(
            model.image_size, model.context, captions=captions, draw_caption=False
        ),
        batch_size=batch_size,
        start=start,
        process_index=distributed.process_index(),
        process_count=distributed.process_count(),
        threads=threads,
    )
    total = len(collection) if limit is None else min(limit, len(collection))
    if start >= total:
        return
    with batches, progress.progress(total, "embedding", "img", initial=start) as bar:
        seen = start
        for batch in batches:
            valid = collectives.gather_rows(batch["valid"])
            batch = sharding.put_batch(batch, mesh)
            z_i, z_t = run(params, batch["image"], batch["tokens"])
            yield np.asarray(z_i), np.asarray(z_t), valid
            seen += len(valid)
            bar.update(min(len(valid), total - bar.count))
            if seen >= total:
                return


# ============================================================ a folder of rows


@dataclasses.dataclass
class Job:
    """Shards to be embedded into a folder; `embed_shards` runs every step.

    Args:
      clip_arch, params: of the CLIP, on the host; clip_hash: its `bundle.space`.
      collection: whose shards are embedded; rows that a subset leaves out stay NaN.
      folder: to write to; made when missing.
      batch_size: pictures on this process's devices at once, rounded up to fill every device, and
        at most the samples of the largest shard.
      captions: where captions come from: the first of these that a sample has.
      dtype: of the files, "float32" or "float16".
      threads, workers: of decoding.
      devices: of this process; None: all local ones.

    Raises:
      ConfigError: an impossible setting.
    """

    clip_arch: dict
    params: dict
    clip_hash: str
    collection: object
    folder: str | os.PathLike
    batch_size: int = 256
    captions: Sequence[str] = ("txt",)
    dtype: str = "float32"
    threads: int = 4
    workers: int = 0
    devices: Sequence | None = None

    def __post_init__(self):
        if self.dtype not in stored.DTYPES:
            raise errors.unknown("dtype of embeddings", self.dtype, stored.DTYPES)
        if self.batch_size < 1:
            raise errors.ConfigError(f"batch size {self.batch_size}: expected at least 1")
        self.folder = pathlib.Path(self.folder)
        self.devices = list(jax.local_devices() if self.devices is None else self.devices)
        rows = min(self.batch_size, max(self.collection.counts, default=1))
        self.batch_size = -(-int(rows) // len(self.devices)) * len(self.devices)
        self.model = clip_model.CLIP(**tasks.arguments(self.clip_arch))
        size = self.model.image_size
        self.transform = Pair(size, self.model.context, self.captions)
        self.settings = {
            "clip": self.clip_hash,
            "embed_dim": self.model.embed_dim,
            "dtype": self.dtype,
            "captions": list(self.captions),
            "picture": f"centre square, {size} x {size}",
        }
        counts, first = self.collection.counts, {}
        for number in np.flatnonzero(counts):  # equal shards share their files
            first.setdefault(self.collection.shard_digest(int(number)), int(number))
        self.wanted = sorted(first.values())

    def stem(self, number: int) -> str:
        """The beginning of the names of a shard's files."""
        return stored.stem(
            self.collection.shard_names[number], self.collection.shard_digest(number)
        )

    def begin(self) -> Store:
        """Opens the folder; a new one gets its description first.

        Raises:
          ConfigError: it holds embeddings of another CLIP or with other settings.
        """
        if distributed.is_main():
            if not (self.folder / stored.FILE).is_file():
                self.describe([], complete=False)
            for path in self.folder.glob(".*.tmp"):  # of a job that was killed while writing
                path.unlink(missing_ok=True)
        distributed.barrier("embeddings begin")
        store = Store(self.folder)
        store.check_clip(self.clip_hash)
        for name, value in self.settings.items():
            if store.settings[name] != value:
                raise errors.ConfigError(
                    f"{self.folder} holds embeddings with {name} {store.settings[name]}, not "
                    f"{value}: choose another --out"
                )
        return store

    def describe(self, shards: Sequence[Shard], complete: bool, statistics: bool = False) -> None:
        """Writes embeddings.json."""
        totals = {
            name: sum(getattr(shard, name) for shard in shards)
            for name in ("samples", "embedded", "captioned")
        }
        bad = sum((Counter(shard.bad) for shard in shards), Counter())
        files.write_object(
            self.folder / stored.FILE,
            {
                "format": stored.FORMAT,
                "complete": complete,
                **self.settings,
                **totals,
                "bad": dict(bad),
                "statistics": stored.STATISTICS if statistics else None,
                "shards": [shard._asdict() for shard in shards],
            },
        )

    def done(self, store: Store, number: int) -> Shard | None:
        """The shard if it is embedded already, all of its files being there and correct; else
        None."""
        path = self.folder / f"{self.stem(number)}.json"
        if not path.is_file():
            return None
        try:
            document = files.read_object(path, stored.MAX_JSON_BYTES)
            shard = stored.shard_of(document, path)
        except errors.DataError:  # damaged, so it is embedded again
            return None
        fits = (
            document.get("settings") == self.settings
            and shard.digest == self.collection.shard_digest(number)
            and shard.samples == self.collection.counts[number]
        )
        return shard if fits and store.whole(shard) else None

    def mine(self, process: int, processes: int) -> list[int]:
        """The shards of one process, the same ones when the job is resumed."""
        return self.wanted[process::processes]

    def undone(self, store: Store, numbers: Sequence[int]) -> list[int]:
        """Which of `numbers` are not embedded yet."""
        return [number for number in numbers if self.done(store, number) is None]

    def own(
        self,
        store: Store,
        process: int,
        todo: Sequence[int],
        *,
        should_stop: Callable[[], bool] = distributed.should_stop,
        update: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Embeds some of this process's shards.

        Args:
          update: called with the number of samples finished.

        Raises:
          Stopped: `should_stop` returned True; the shards that are written are kept.
          NumericsError: the CLIP gives NaN or infinity for a good picture or caption.
        """
        if not todo:
            return
        view = ShardBatches(self.collection, todo, self.batch_size)
        batches = source.make_eval_source(
            view,
            self.transform,
            batch_size=self.batch_size,
            threads=self.threads,
            workers=self.workers,
        )
        digests = {self.collection.shard_digest(number) for number in todo}
        sums = Sums(self.folder, process, self.model.embed_dim, new=digests)
        try:
            with batches:
                rows = self._embedded(batches, should_stop, update)
                for which, number in enumerate(todo):
                    samples = int(view.samples[which])
                    shard = self._shard(number, samples, int(view.counts[which]), rows)
                    store.shards[shard.digest] = shard
                    sums.add(store, shard)
        finally:
            sums.save()

    def _embedded(self, batches, should_stop, update) -> Iterator[tuple]:
        """(z_i, z_t, captioned, reasons) of every batch; the devices compute one batch ahead."""
        mesh = sharding.make_mesh({"data": len(self.devices)}, self.devices)
        place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
        params = jax.device_put(self.params, place())
        run = jax.jit(_program(self.model), out_shardings=place())

        def fetched(running, batch):
            update(self.batch_size)
            return *map(np.asarray, running), batch["captioned"], batch["reason"]

        waiting = None
        for batch in batches:
            put = [jax.device_put(batch[name], place("data")) for name in ("image", "tokens")]
            running = run(params, *put)
            if waiting is not None:
                yield fetched(*waiting)
            waiting = running, batch
            if should_stop():
                raise errors.Stopped(_STOPPED)
        if waiting is not None:
            yield fetched(*waiting)

    def _shard(self, number: int, samples: int, padded: int, rows: Iterator[tuple]) -> Shard:
        """Takes a shard's rows, `padded` of them, and writes its files, the description last."""
        width = self.model.embed_dim
        first = int(self.collection.counts[:number].sum())
        places = np.array(
            [self.collection.locate(first + sample)[1] for sample in range(samples)], np.int64
        )
        tables = [np.full((int(places.max()) + 1, width), np.nan, self.dtype) for _ in range(2)]
        counts, bad, listed = [0, 0], Counter(), []
        for start in range(0, padded, self.batch_size):
            z_i, z_t, captioned, reasons = next(rows)
            count = min(self.batch_size, samples - start)
            good = ~reasons[:count].any(1)
            for sample in np.flatnonzero(~good):
                why = reason(reasons[sample])
                bad[why] += 1
                if len(listed) < MAX_BAD_LISTED:
                    key = self.collection.key(first + start + int(sample))
                    listed.append([int(places[start + sample]), key, why])
            for which, (z, has) in enumerate(((z_i, good), (z_t, good & captioned[:count]))):
                chosen = np.flatnonzero(has)
                values = z[chosen].astype(self.dtype)
                broken = np.flatnonzero(~np.isfinite(values).all(1))
                if len(broken):
                    key = self.collection.key(first + start + int(chosen[broken[0]]))
                    raise errors.NumericsError(
                        f"{stored.KINDS[which]} of {key!r} has NaN or infinity in {self.dtype}"
                    )
                tables[which][places[start + chosen]] = values
                counts[which] += len(chosen)
        name = self.collection.shard_names[number]
        shard = Shard(
            name, self.collection.shard_digest(number), len(tables[0]), samples, *counts, dict(bad)
        )
        for kind, table in zip(stored.KINDS, tables):
            path = self.folder / f"{shard.stem}.{kind}.npy"
            with files.replacing(path) as temporary, open(temporary, "wb") as file:
                file.write(stored.header(*table.shape, self.dtype))
                file.write(table.data)
        files.write_object(
            self.folder / f"{shard.stem}.json",
            {
                "format": stored.FORMAT,
                **shard._asdict(),
                "settings": self.settings,
                "listed": listed,
            },
        )
        return shard

    def finish(self, store: Store) -> Store:
        """Merges the moments, writes them and the table of all shards; by one process.

        Raises:
          DataError: a shard is not done.
        """
        found = {n: self.done(store, n) for n in self.wanted}
        undone = [self.collection.shard_names[n] for n, shard in found.items() if shard is None]
        if undone:
            raise errors.DataError(
                f"{len(undone)} shards are not embedded, the first {undone[0]}: run the same "
                "command again"
            )
        now = {shard.digest: shard for shard in found.values()}
        described = Store(self.folder)
        if described.complete and now.items() <= described.shards.items() and not unmerged(store):
            return described
        earlier = {d: s for d, s in store.shards.items() if d not in now and store.whole(s)}
        store.shards = earlier | now
        written = merge(store, {"clip": self.clip_hash, "captions": list(self.captions)})
        self.describe(list(store.shards.values()), complete=True, statistics=written)
        return Store(self.folder)


class _Poll:
    """Calls `distributed.should_stop` at most once per interval of time.

    `should_stop` must be called equally often by all processes, which reach it at different rates
    here; `even` makes up the difference.
    """

    def __init__(self):
        distributed.barrier("embeddings poll")
        self.start, self.asked = time.monotonic(), 0

    def __call__(self) -> bool:
        if distributed.process_count() == 1:
            return distributed.should_stop()
        return self._until(int((time.monotonic() - self.start) / _POLL_SECONDS))

    def even(self) -> bool:
        """Calls it until every process has called it as often as the one with the most calls."""
        if distributed.process_count() == 1:
            return False
        return self._until(int(collectives.gather_rows(np.array([self.asked])).max()))

    def _until(self, count: int) -> bool:
        while self.asked < count:
            self.asked += 1
            if distributed.should_stop():
                return True
        return False


def embed_shards(job: Job) -> Store:
    """Embeds every shard of a collection that is not in the folder already.

    Each shard is embedded by one process alone, on that process's devices. Batches never cross
    shards, so a shard's rows do not depend on the number of processes or on other shards.

    Returns:
      The finished folder, with the moments of all of its shards in statistics.npz.

    Raises:
      ConfigError: the folder holds embeddings of another CLIP or with other settings.
      DataError: a shard cannot be read, or the folder not written.
      NumericsError: the CLIP gives NaN or infinity.
      Stopped: the job was asked to stop; finished shards are kept.
    """
    process = distributed.process_index()
    store = job.begin()
    poll = _Poll()
    mine = job.mine(process, distributed.process_count())
    todo = job.undone(store, mine)
    if todo:
        total, left = (int(job.collection.counts[numbers].sum()) for numbers in (mine, todo))
        with progress.progress(total, "embedding", "img", initial=total - left) as bar:
            advance = lambda count: bar.update(
                min(count, total - bar.count)
            )  # without the padding rows
            job.own(store, process, todo, should_stop=poll, update=advance)
    waited = sorted({*job.wanted} - {*mine})
    while waited := job.undone(store, waited):
        if poll():
            raise errors.Stopped(_STOPPED)
        time.sleep(_POLL_SECONDS)
    if poll.even():
        raise errors.Stopped(_STOPPED)
    if distributed.is_main():
        job.finish(store)
    distributed.barrier("embeddings finished", 3600)
    return Store(job.folder)
