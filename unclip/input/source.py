"""Batches as a pure function of (seed, position), from a collection of shards to NumPy arrays.

The position g is a global sample number: it counts samples over all epochs and processes and is the
whole state of the input. Sample g of a run is the entry `order(g)` of an epoch's permutation
(grain's index shuffle, reseeded each epoch); its crop and caption come from a generator keyed by
(seed, g). So a run resumed at g, on any number of processes, workers or threads, sees what an
uninterrupted one would have seen. The stages of the paper (arXiv 2204.06125) differ only in their
transform: `ImageText` for CLIP, prior and decoder, `Upsampling` for the two upsamplers.
"""

import math
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from unclip.errors import ConfigError, DataError, unknown
from unclip.input import image as pictures
from unclip.input.shards import BadSample, Collection, Sample

REASONS = (*pictures.REASONS, "empty-text", "encoding", "json", "caption", "other")
_ENDLESS = 1 << 62  # rows: grain wants a length
_REPLACEMENT, _TRANSFORM = 1, 2  # streams of randomness of one sample number
Transform = Callable[[Sample, np.random.Generator], dict[str, np.ndarray]]


def generator(seed: int, g: int, stream: int = _TRANSFORM) -> np.random.Generator:
    """The generator of global sample number g; equal on every host and thread."""
    words = [n >> shift & 0xFFFFFFFF for n in (seed, g) for shift in (32, 0)]
    return np.random.default_rng([*words, stream])


class Order:
    """Global sample number -> number in the collection; every epoch is a permutation.

    Args:
      n: samples in the collection.
      seed: decides the order; None keeps the collection's own.
    """

    def __init__(self, n: int, seed: int | None):
        self.n = n
        self._order = None
        if seed is not None:
            # Hashed, as grain adds the epoch to the seed: seed 1 must not start where 0 goes next.
            word = int(generator(seed, 0, 0).integers(1 << 32))
            self._order = grain.MapDataset.range(n).shuffle(seed=word).repeat()
            self._order[0]  # grain completes itself at the first access, which is not thread-safe

    def __call__(self, g: int) -> int:
        return g % self.n if self._order is None else int(self._order[g])


class _Rows:
    """grain's random-access source: row j of this process -> one sample, ready to be stacked."""

    def __init__(self, collection: Collection, order: Order, transform: Transform, *, seed: int,
                 start: int, total: int | None, batch_size: int, process_index: int,
                 process_count: int, replace: bool, max_attempts: int):
        self.collection, self.order, self.transform = collection, order, transform
        self.seed, self.start, self.total = seed, start, total
        self.batch_size, self.local = batch_size, batch_size // process_count
        self.first_row = process_index * self.local
        self.replace, self.max_attempts = replace, max_attempts
        steps = None if total is None else -(-max(total - start, 0) // batch_size)
        self.length = _ENDLESS // self.local * self.local if steps is None else steps * self.local

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, j: int) -> dict[str, np.ndarray]:
        step, row = divmod(int(j), self.local)
        g = self.start + step * self.batch_size + self.first_row + row
        problems = np.zeros(len(REASONS), np.int32)
        arrays = self._sample(g, problems)
        padding = self.total is not None and g >= self.total
        if padding:
            problems[:] = 0
        arrays["sample"] = np.array([g >> 32, g & 0xFFFFFFFF], np.uint32)
        arrays["valid"] = np.bool_(not padding and (self.replace or not problems.any()))
        arrays["problems"] = problems
        return arrays

    def _sample(self, g: int, problems: np.ndarray) -> dict[str, np.ndarray]:
        for attempt in range(self.max_attempts):
            i = self.order(g)
            if attempt:
                i = replacement(self.seed, g, attempt, len(self.collection))
            try:
                return dict(self.transform(self.collection.read(i), generator(self.seed, g)))
            except BadSample as error:
                known = error.reason if error.reason in REASONS else "other"
                problems[REASONS.index(known)] += 1
                last = f"{self.collection.key(i)}: {error}"
        raise DataError(f"sample {g} and {self.max_attempts - 1} replacements for it are all bad; "
                        f"the last: {last}")


def replacement(seed: int, g: int, attempt: int, n: int) -> int:
    """Which of n samples stands in for a bad sample g at its attempt 1, 2, …"""
    return int(generator(seed, g, _REPLACEMENT).integers(n, size=attempt)[-1])


def _start_worker(index: int, count: int) -> None:
    """A worker outlives the signals that ask the job to save and stop, but not the job itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True, name="follow-parent").start()


class Batches(Iterator):
    """The iterator `make_source` returns: dicts of arrays, this process's rows of each batch.

    Attributes:
      position: the next global sample number; save it with the checkpoint and pass it as `start`.
      problems: Counter of this process's bad samples so far, by reason (see `REASONS`).
      examples: the keys of the first few, "KEY: REASON, …".
      seen: rows delivered, paddings left out.
    """

    def __init__(self, rows: _Rows, *, threads: int, workers: int, prefetch: int,
                 max_bad_fraction: float, min_seen: int):
        self.position = rows.start
        self.problems: Counter = Counter()
        self.examples: list[str] = []
        self.seen = self.bad = 0
        self._rows, self._lock = rows, threading.Lock()
        self._max_bad_fraction, self._min_seen = max_bad_fraction, min_seen
        dataset = grain.MapDataset.source(rows)
        if workers:
            if not flags.FLAGS.is_parsed():  # outside an absl app; grain reads its flags
                flags.FLAGS.mark_as_parsed()
            # Whole batches are dealt to the worker processes, so that rows never mix.
            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
            dataset = dataset.batch(rows.local).to_iter_dataset(options).mp_prefetch(
                grain.MultiprocessingOptions(workers, per_worker_buffer_size=prefetch),
                worker_init_fn=_start_worker)
        else:
            ahead = max(threads, prefetch * rows.local)
            options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
            dataset = dataset.to_iter_dataset(options).batch(rows.local)
        self._iterator = iter(dataset)

    def __next__(self) -> dict[str, np.ndarray]:
        with self._lock:
            if self._iterator is None:
                raise ValueError("this source is closed")
            try:
                batch = next(self._iterator)
            except RuntimeError as error:
                if "terminated unexpectedly" in str(error):  # grain's word for a dead worker
                    self.close()
                    raise DataError("a decoding worker process was killed, often for want of "
                                    "memory: use fewer workers or a smaller prefetch") from error
                raise
            problems = batch.pop("problems")
            self.position += self._rows.batch_size
            self._count(problems, batch)
            return batch

    def _count(self, problems: np.ndarray, batch: dict[str, np.ndarray]) -> None:
        bad = problems.any(axis=1)
        self.seen += int((batch["valid"] | bad).sum())
        if not bad.any():
            return
        self.bad += int(bad.sum())
        self.problems.update({r: int(n) for r, n in zip(REASONS, problems.sum(0, int)) if n})
        for row in np.flatnonzero(bad)[: max(0, 5 - len(self.examples))]:
            high, low = map(int, batch["sample"][row])
            key = self._rows.collection.key(self._rows.order(high << 32 | low))
            reasons = [r for r, n in zip(REASONS, problems[row]) if n]
            self.examples.append(f"{key}: {', '.join(reasons)}")
        if self.seen >= self._min_seen and self.bad > self._max_bad_fraction * self.seen:
            self.close()
            raise DataError(f"{self.bad} of {self.seen} samples are bad, more than "
                            f"max_bad_fraction={self._max_bad_fraction}: {dict(self.problems)}; "
                            f"e.g. {'; '.join(self.examples)}")

    def close(self) -> None:
        """Ends the threads and worker processes; no batch comes after it."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def make_source(collection: Collection, transform: Transform, *, batch_size: int, seed: int,
                start: int = 0, process_index: int = 0, process_count: int = 1,
                shuffle: bool = True, num_epochs: int | None = None, replace: bool = True,
                threads: int = 4, workers: int = 0, prefetch: int = 2,
                max_bad_fraction: float = 0.05, min_seen: int = 1000, max_attempts: int = 16
                ) -> Batches:
    """Iterates over batches of transformed samples from position `start` on.

    Process p of P delivers rows [p B/P, (p+1) B/P) of each global batch of B samples, so the rows
    of the assembled batch are the same for any P. A bad sample's row holds a replacement drawn by
    (seed, g, attempt).

    Args:
      collection: where samples come from.
      transform: (Sample, Generator) -> {name: array of fixed shape}; must pickle if `workers`.
      batch_size: B, the global batch size, a multiple of `process_count`.
      seed: 0 <= seed < 2**64.
      start: the global sample number to begin with, `Batches.position` of an earlier run.
      shuffle: permute every epoch anew; False: the collection's own order.
      num_epochs: None for ever; otherwise the last batch is filled up with rows of `valid` False.
      replace: a replaced row counts as `valid`; False (evaluation) marks it as not valid.
      threads: decoding threads of this process; results do not depend on it.
      workers: decoding processes instead of threads; results do not depend on it.
      prefetch: batches ready ahead, per worker.
      max_bad_fraction: of this process's rows, judged from `min_seen` rows on.
      max_attempts: a sample and its replacements tried before giving up.

    Returns:
      `Batches` of {the transform's arrays [B/P, …], "sample": uint32 [B/P, 2] (high and low words
      of g), "valid": bool [B/P]}.

    Raises:
      ConfigError: sizes that do not fit.
      DataError: while iterating, too many bad samples, a shard that cannot be read any more or a
        worker that was killed.
    """
    if batch_size < 1 or not 0 <= process_index < process_count or batch_size % process_count:
        raise ConfigError(f"batch size {batch_size}, process {process_index} of {process_count}: "
                          "expected a batch size that is a multiple of the process count")
    if not 0 <= seed < 1 << 64 or not 0 <= start < 1 << 62:
        raise ConfigError(f"seed {seed}, start {start}: expected 0 <= seed < 2**64, 0 <= start")
    if min(threads, workers, prefetch) < 0 or max_attempts < 1:
        raise ConfigError(f"threads {threads}, workers {workers}, prefetch {prefetch}, attempts "
                          f"{max_attempts}: expected none below 0 and at least one attempt")
    if num_epochs is not None and num_epochs < 1:
        raise ConfigError(f"num_epochs {num_epochs}: expected at least 1, or None for ever")
    if not len(collection):
        raise DataError("the collection is empty")
    rows = _Rows(
        collection, Order(len(collection), seed if shuffle else None), transform, seed=seed,
        start=start, total=None if num_epochs is None else num_epochs * len(collection),
        batch_size=batch_size, process_index=process_index, process_count=process_count,
        replace=replace, max_attempts=max_attempts)
    return Batches(rows, threads=threads, workers=workers, prefetch=max(1, prefetch),
                   max_bad_fraction=max_bad_fraction, min_seen=min_seen)


def make_eval_source(collection: Collection, transform: Transform, **options: Any) -> Batches:
    """One pass in the collection's order, every usable sample once; takes `make_source`'s options.

    The last batch is padded; paddings and bad samples have `valid` False, so the number of valid
    rows over all processes is the number of usable samples.
    """
    options = {"seed": 0, "max_bad_fraction": 1.0, **options}
    return make_source(
        collection, transform, shuffle=False, num_epochs=1, replace=False, **options)


class WithEmbeddings:
    """A collection whose samples carry the z_i of their picture, computed once by a frozen CLIP.

    Args:
      collection: what was embedded, in its order.
      z_i: float32 [len(collection), D], rows of NaN where the picture was bad; may be mapped.
    """

    def __init__(self, collection: Collection, z_i: np.ndarray):
        if len(z_i) != len(collection):
            raise ConfigError(f"{len(z_i)} embeddings for {len(collection)} samples: they belong "
                              "to another collection")
        self.collection, self.z_i = collection, z_i
        self.fingerprint = collection.fingerprint

    def __len__(self) -> int:
        return len(self.collection)

    def key(self, i: int) -> str:
        return self.collection.key(i)

    def read(self, i: int) -> Sample:
        """Sample i with meta["z_i"] float32 [D]; BadSample where there is none."""
        z_i = np.array(self.z_i[i], np.float32)
        if not np.isfinite(z_i).all():
            raise BadSample("corrupt", "its picture could not be embedded")
        sample = self.collection.read(i)
        return sample._replace(meta={**sample.meta, "z_i": z_i})

    def subset(self, count: int) -> "WithEmbeddings":
        """The first `count` samples."""
        return WithEmbeddings(self.collection.subset(count=count), self.z_i[:count])


class ImageText:
    """Transform to a square picture and its tokens, for CLIP, the prior and the decoder.

    Args:
      size: the picture's side S; None: no picture is decoded, for stored embeddings.
      context_length: L.
      tokenise: (texts, L) -> (int32 [n, L], bool [n, L], …); None: unclip's own tokenizer.
      crop: "center" or "random" square of the picture.
      fraction: the crop's side as a part of the shorter side.
      clip_size: also deliver the same crop at this side, for a CLIP that sees more than `size`.
      captions: where captions come from, "txt" or "json:FIELD"; a sample with several takes one by
        its number.
      with_crop: adds "crop".
      max_bytes, max_pixels, min_side: see `image.decode`.

    Returns (when called with a Sample and a generator):
      "image" uint8 [S, S, 3], "tokens" int32 [L], "text_mask" bool [L]; with `clip_size` C also
      "clip_image" uint8 [C, C, 3]; with `with_crop` also "crop" float32 [4]: left, upper, right,
      lower as parts of width and height; from `WithEmbeddings` also "z_i" float32 [D].

    Raises:
      BadSample: "empty-text", "caption" (not a string) or what `decode` finds.
    """

    def __init__(self, size: int | None, context_length: int, tokenise: Callable | None = None, *,
                 clip_size: int | None = None, crop: str = "center", fraction: float = 1.0,
                 captions: Sequence[str] = ("txt",), with_crop: bool = False,
                 max_bytes: int = 64 << 20, max_pixels: int = 1 << 26, min_side: int = 1):
        for caption in captions:
            if caption != "txt" and not caption.startswith("json:"):
                raise unknown("caption source", caption, ["txt", "json:FIELD"])
        pictures.crop_box(1, 1, crop="center", fraction=fraction)
        if crop not in ("center", "random"):
            raise unknown("crop", crop, ["center", "random"])
        if tokenise is None:
            from unclip.input.text import Tokenizer  # here: a vocabulary only where one is needed
            tokenise = Tokenizer().encode
        self.size, self.context_length, self.tokenise = size, context_length, tokenise
        self.clip_size = clip_size
        self.crop, self.fraction, self.captions = crop, fraction, tuple(captions)
        self.with_crop = with_crop
        self.limits = {"max_bytes": max_bytes, "max_pixels": max_pixels, "min_side": min_side}

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        text = self.caption(sample, rng)
        tokens, mask = self.tokenise([text], self.context_length)[:2]
        arrays = {"tokens": np.asarray(tokens[0], np.int32),
                  "text_mask": np.asarray(mask[0], bool)}
        if "z_i" in sample.meta:
            arrays["z_i"] = sample.meta["z_i"]
        if self.size is None:
            return arrays
        # A JPEG is decoded no smaller than the crop needs, rather than the whole picture.
        target = math.ceil(max(self.size, self.clip_size or 0) / self.fraction)
        decoded = pictures.decode(sample.image, target=target, **self.limits)
        arrays["image"], box = pictures.resize_and_crop(
            decoded, self.size, crop=self.crop, fraction=self.fraction, rng=rng)
        if self.clip_size:
            arrays["clip_image"] = pictures.resize_box(decoded, self.clip_size, box)
        if self.with_crop:
            height, width = decoded.shape[:2]
            arrays["crop"] = np.array(box, np.float32) / np.float32([width, height] * 2)
        return arrays

    def caption(self, sample: Sample, rng: np.random.Generator) -> str:
        """One of the sample's non-empty captions."""
        found = [sample.text if c == "txt" else sample.meta.get(c.removeprefix("json:"))
                 for c in self.captions]
        texts = [text for text in found if isinstance(text, str) and text.strip()]
        if not texts:
            odd = any(text is not None and not isinstance(text, str) for text in found)
            raise BadSample("caption" if odd else "empty-text", f"no caption in {self.captions}")
        return texts[int(rng.integers(len(texts)))] if len(self.captions) > 1 else texts[0]


class Upsampling:
    """Transform to a picture and its degraded, smaller version, for the upsamplers.

    The picture's middle square is resized to `size`; the paper trains on random crops of it
    (appendix C: a quarter of the side). The crop itself is downsampled by area, then degraded.

    Args:
      size: side of the full target, 256 or 1024 in the paper.
      factor: 4 in the paper.
      crop: side c of the training crop; None: the full picture. A multiple of `factor`.
      degradation: "blur" (first upsampler), "bsr" (second) or "none".
      probability: of degrading a sample. Below 1 the network meets clean conditioning too; one that
        only ever saw blur sharpens the decoder's clean pictures too much (Cascaded Diffusion
        Models, arXiv 2106.15282, blurs half of them; the unCLIP paper does not say).
      train: False gives the full picture and clean conditioning, as at sampling time.

    Returns (when called with a Sample and a generator):
      "image" uint8 [c, c, 3], "low" uint8 [c/factor, c/factor, 3].

    Raises:
      BadPicture: what `decode` finds.
    """

    def __init__(self, size: int, factor: int = 4, *, crop: int | None = None,
                 degradation: str = "none", probability: float = 1.0, train: bool = True,
                 max_bytes: int = 64 << 20,
                 max_pixels: int = 1 << 26, min_side: int = 1):
        if degradation not in ("blur", "bsr", "none"):
            raise unknown("degradation", degradation, ["blur", "bsr", "none"])
        crop = size if crop is None or not train else crop
        if factor < 1 or not 0 < crop <= size or crop % factor:
            raise ConfigError(f"crop {crop} of {size} by factor {factor}: expected a multiple of "
                              "the factor that is at most the size")
        self.size, self.factor, self.crop, self.train = size, factor, crop, train
        if not 0 <= probability <= 1:
            raise ConfigError(f"degradation probability {probability}: expected 0 to 1")
        self.degradation = degradation if train else "none"
        self.probability = probability
        self.limits = {"max_bytes": max_bytes, "max_pixels": max_pixels, "min_side": min_side}

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        decoded = pictures.decode(sample.image, target=self.size, **self.limits)
        image, _ = pictures.resize_and_crop(decoded, self.size)
        left, upper = (int(n) for n in rng.integers(self.size - self.crop + 1, size=2))
        image = image[upper : upper + self.crop, left : left + self.crop]
        low = pictures.downsample(image, self.factor)
        if rng.random() < self.probability:
            if self.degradation == "blur":
                low = pictures.gaussian_blur(low)
            elif self.degradation == "bsr":
                low = pictures.bsr(low, rng)
        return {"image": np.ascontiguousarray(image), "low": low}
