"""Shards of picture and caption pairs as one collection, any sample of which is a positional read.

A `Collection` is a list of shard indexes, mapped from files that `unclip index` wrote or made by
walking the shards' headers when they are opened: either way it has the same samples under the same
numbers. The time to open indexed shards grows with their number, not with the samples.
"""

import bisect
import difflib
import functools
import hashlib
import itertools
import os
import resource
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from unclip.errors import ConfigError, DataError
from unclip.input import captions as caption_sources
from unclip.input.samples import PICTURES, BadSample, Sample
from unclip.input.shards import folder as index_folder
from unclip.input.shards.folder import Entry
from unclip.input.shards.index import ShardIndex, Span
from unclip.input.shards.walk import NOT_TARS
from unclip.input.storage import address
from unclip.input.storage.address import shown
from unclip.input.storage.storage import Storage
from unclip.input.tfds import records

# Index files mapped at once; each holds a file descriptor, of which the system allows only some.
_MAPPED = min(max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, 64), 16_384)
_EXAMPLES = 5


def open_shards(
    patterns: str | Sequence[str],
    *,
    text: bool = True,
    captions: Sequence[str] = caption_sources.STANDARD,
    storage: Storage | None = None,
) -> "Collection":
    """Opens shards: by their index where there is one, or by walking their headers.

    Args:
      patterns: paths, globs, brace ranges, addresses and lists of them, see `Storage.expand`; a
        folder that `unclip index` wrote stands for all its shards. Shards beside which lie such
        folders, named `index` or `index-NAME`, are opened by them. Or "tfds:NAME:SPLIT", prepared
        data sets; what is returned is a `records.RecordCollection` then.
      text: a sample needs a caption from one of `captions`. False: a picture is enough.
      captions: where captions come from, see `unclip.input.captions`.
      storage: how shards are read; None: the defaults.

    Returns:
      The `Collection` of all complete samples, in the order of the shards and, within one, of the
      members; with `text` False those without a caption come last in their shard.

    Raises:
      ConfigError: an unsupported address, an unknown caption source, or an index made for others.
      DataError: nothing matches; a shard is missing, unreadable, or has changed since it was
        indexed; an index is damaged; a remote shard has none; one that had to be walked is not a
        tar or has no captions at all; or there is no complete sample.
    """
    patterns = [patterns] if isinstance(patterns, str | os.PathLike) else list(patterns)
    captions = caption_sources.checked(captions)
    entries = [address.entries(os.fspath(pattern)) for pattern in patterns]
    prepared = [part.startswith("tfds:") for parts in entries for part in parts]
    if any(prepared):
        if not all(prepared):
            raise ConfigError(
                f"{patterns}: tars and prepared data sets (tfds:) cannot be mixed; "
                "`unclip index --to_array_record` makes one of the other"
            )
        specs = [part for parts in entries for part in parts]
        field = caption_sources.field(captions[0])
        return records.RecordCollection(specs, text=text, caption=field)
    if not patterns:
        raise ConfigError("no shards given: expected paths, globs or ranges such as a-{00..07}.tar")
    opener = _Opener(storage or Storage(), text, captions)
    groups = [[shard for part in parts for shard in opener.find(part)] for parts in entries]
    found = list(itertools.chain.from_iterable(groups))
    with ThreadPoolExecutor(8, thread_name_prefix="index-shards") as pool:
        shards = list(pool.map(opener.open, found))
    opener.storage.close()  # samples are read later, by other threads or processes
    collection = Collection(
        shards,
        text=text,
        storage=opener.storage,
        patterns=[len(group) for group in groups],
        unread=opener.unread,
    )
    if not len(collection):
        problems = collection.problems
        known = ", ".join(
            f"{reason} {n}{_for_example(collection.examples.get(reason))}"
            for reason, n in problems.items()
        )
        ignored = [f"{note} {n}" for note, n in _notes(collection) if note.startswith("ignored")]
        known = ", ".join(filter(None, [known, *ignored[:5]]))
        first = f", first {shown(shards[0].path)!r}" if shards else ""
        raise DataError(
            f"no complete sample in {len(shards)} shards{first}: {known or 'no known member'}; a "
            f"sample is KEY.{'|'.join(PICTURES)}{' and ' * text}"
            f"{caption_sources.wanted(captions) * text}, KEY being without dots"
        )
    return collection


class _Opener:
    """Finds the shards of patterns, each once, and what is known of them."""

    def __init__(self, storage: Storage, text: bool, captions: tuple[str, ...]):
        self.storage, self._text, self._captions = storage, text, captions
        self.unread: dict[str, list[str]] = {}
        self._seen: set[str] = set()
        self._beside: dict[str, dict[str, Entry]] = {}

    def find(self, pattern: str) -> list[str | Entry]:
        """The shards of one pattern that no earlier one had."""
        if index_folder.is_index(pattern):
            sources, shards, unread = index_folder.read_index(pattern)
            unfit = sum(not shard.fits(self._captions) for shard in shards)
            if unfit:
                asked = ",".join(self._captions)
                raise ConfigError(
                    f"index {pattern!r} was written for captions from {','.join(sources)} and does "
                    f"not tell which samples of {unfit} of its {len(shards)} shards have one from "
                    f"{asked}: `unclip index SHARDS --captions {asked} --out DIR`"
                )
        else:
            shards, unread = self.storage.expand(pattern), self.storage.unread(pattern)
        for reason, names in unread.items():
            known = self.unread.setdefault(reason, [])
            known += [name for name in names if name not in known]
        new = []
        for shard in shards:
            place = self._place(shard.path if isinstance(shard, Entry) else shard)
            if place not in self._seen:
                self._seen.add(place)
                new.append(shard)
        for folder in {
            os.path.dirname(path)
            for path in new
            if isinstance(path, str) and self.storage.local(path)
        }:
            if folder not in self._beside:
                self._beside[folder] = self._read_beside(folder)
        return new

    def _place(self, path: str) -> str:
        return os.path.abspath(path) if self.storage.local(path) else path

    def _read_beside(self, folder: str) -> dict[str, Entry]:
        found = {}
        for index in index_folder.beside(folder):
            for entry in index_folder.read_index(index).shards:
                if entry.fits(self._captions):
                    found[self._place(entry.path)] = entry
        return found

    def open(self, shard: str | Entry) -> Entry:
        """One shard's entry, of an index that is about this very file, or else by walking it."""
        if isinstance(shard, Entry):
            if self.storage.local(shard.path) and self.storage.stat(shard.path)[0] != shard.size:
                raise DataError(
                    f"shard {shard.path!r} has changed since it was indexed: index the shards again"
                )
            return shard
        if not self.storage.local(shard):
            raise DataError(
                f"shard {shown(shard)!r} is remote and has no index: run `unclip index "
                "SHARDS --out DIR` once and give DIR, or read it as a stream"
            )
        known = self._beside[os.path.dirname(shard)].get(self._place(shard))
        if known is not None and known.size == self.storage.stat(shard)[0]:
            return known._replace(path=shard)
        index = index_folder.walk_path(shard, self.storage, captions=self._captions)
        self._refuse(shard, index)
        return index_folder.entry(shard, index)

    def _refuse(self, path: str, index: ShardIndex) -> None:
        """Refuses a shard just walked that is not a tar or has no captions at all."""
        for reason in NOT_TARS:
            if index.problems[reason]:
                zipped = "compressed; gunzip it first, samples are read at their offsets"
                hint = zipped if reason == "compressed" else "not a tar file"
                raise DataError(f"shard {path!r} is {hint}")
        damaged = any(reason.startswith("shard-") for reason in index.problems)
        if self._text and index.count and not index.captioned and not damaged:
            read = functools.partial(self.storage.read, path)
            try:
                there = ", ".join(map(repr, caption_sources.known(index.meta(0, read))))
            except BadSample:
                there = ""
            raise DataError(
                f"shard {path!r} has {index.count} pictures and no captions: expected "
                f"{caption_sources.wanted(self._captions)} beside each picture"
                f"{'; its JSON has text in ' * bool(there)}{there}"
            )


def _notes(collection: "Collection") -> list[tuple[str, int]]:
    """What was noticed in the first shards, the most frequent first."""
    shards = range(min(len(collection.shards), 100))
    return sum((collection.index(n).notes for n in shards), Counter()).most_common()


def _for_example(found: Sequence[str] | None) -> str:
    return f" ({found[0]})" if found else ""


class Collection:
    """Complete samples, read by number; safe to share between threads and to pickle.

    Attributes:
      shards: paths; shard_names: their file names; sizes: their bytes when they were indexed.
      counts: int64 [S], samples of each shard; numbers run through the shards in their order.
      groups: int64 [K + 1], where the samples of each of the K patterns begin, and the end.
      problems: Counter of what was left out, by reason: "no-text" and what `walk.walk_shard` names.
      storage: reads the shards.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        text: bool = True,
        storage: Storage | None = None,
        patterns: Sequence[int] | None = None,
        limit: int | None = None,
        chosen: np.ndarray | None = None,
        problems: Mapping[str, int] | None = None,
        unread: Mapping[str, Sequence[str]] | None = None,
    ):
        """
        Args:
          entries: one per shard.
          patterns: how many of the shards each pattern gave.
          limit: only this many samples, the first ones.
          chosen: int64, ascending: only these samples.
          problems: counts to add to those of the shards.
          unread: reason -> names of files beside the shards that are none, see `Storage.unread`.
        """
        self._entries, self._text = tuple(entries), text
        self._patterns = tuple(patterns if patterns is not None else [len(self._entries)])
        self.storage = storage or Storage()
        self.shards = tuple(entry.path for entry in self._entries)
        self.shard_names = tuple(entry.name for entry in self._entries)
        self.sizes = tuple(entry.size for entry in self._entries)
        self._limit, self._chosen, self._further = limit, chosen, dict(problems or {})
        self._unread = dict(unread or {})
        self.problems = Counter(self._further)
        self.problems.update({reason: len(names) for reason, names in self._unread.items()})
        for entry in self._entries:
            self.problems.update(entry.problems)
            self.problems["no-text"] += text * (entry.count - entry.captioned)
        self.problems = +self.problems
        usable = [entry.captioned if text else entry.count for entry in self._entries]
        starts = np.concatenate([[0], np.cumsum(usable, dtype=np.int64)])
        if limit is not None:
            starts = np.minimum(starts, limit)
        self._starts = starts.tolist()  # of the shards among all samples, chosen or not
        if chosen is not None:
            starts = np.searchsorted(chosen, starts).astype(np.int64)
        self.counts = np.diff(starts)
        self.groups = starts[np.concatenate([[0], np.cumsum(self._patterns, dtype=np.int64)])]
        self._length = int(starts[-1])
        self._start()

    def _start(self):
        self._lock, self._mapped, self._verified = threading.Lock(), OrderedDict(), set()

    def __getstate__(self):
        own = ("_lock", "_mapped", "_verified")  # each process maps for itself
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        left_out = f", left out {dict(self.problems)}" if self.problems else ""
        return f"Collection({len(self)} samples in {len(self.shards)} shards{left_out})"

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over which samples there are; equal after moving or indexing the shards."""
        digest = hashlib.sha256(b"caption\0")
        for entry, count in zip(self._entries, np.diff(self._starts).tolist()):
            digest.update(bytes.fromhex(entry.digest) + count.to_bytes(8, "little"))
        if self._chosen is not None:
            digest.update(np.ascontiguousarray(self._chosen, "<i8").data)
        return digest.hexdigest()

    @functools.cached_property
    def examples(self) -> dict[str, list[str]]:
        """reason -> the first few that were left out, "SHARD: KEY"."""
        found = {reason: [] for reason in self.problems if reason not in self._further}
        found |= {reason: list(names[:_EXAMPLES]) for reason, names in self._unread.items()}
        for shard, entry in enumerate(self._entries):
            reasons = {*entry.problems, *(["no-text"] if entry.captioned < entry.count else [])}
            wanted = [r for r in reasons if len(found.get(r, range(_EXAMPLES))) < _EXAMPLES]
            if wanted:
                there = self.index(shard).examples
                for reason in wanted:
                    named = [f"{entry.name}: {what}" for what in there.get(reason, [])]
                    found[reason] = (found[reason] + named)[:_EXAMPLES]
        return found

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard. Raises DataError where its file is damaged or of another shard."""
        entry = self._entries[shard]
        if isinstance(entry.index, ShardIndex):
            return entry.index
        with self._lock:
            index = self._mapped.get(shard)
            if index is not None:
                self._mapped.move_to_end(shard)
                return index
        index = ShardIndex.open(entry.index, verify=shard not in self._verified)
        if (index.digest, index.count, index.captioned, index.size) != (
            entry.digest,
            entry.count,
            entry.captioned,
            entry.size,
        ):
            raise DataError(
                f"index {entry.index!r} is not the one that index.json beside it was "
                "written for: index the shards again"
            )
        with self._lock:
            self._verified.add(shard)
            self._mapped[shard] = index
            if len(self._mapped) > _MAPPED:
                self._mapped.popitem(last=False)
        return index

    def locate(self, i: int) -> tuple[int, int]:
        """(shard, row of its index) of sample i. Raises IndexError."""
        if not 0 <= i < self._length:
            raise IndexError(f"sample {i} of {self._length}")
        if self._chosen is not None:
            i = int(self._chosen[i])
        shard = bisect.bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]

    def shard_digest(self, shard: int) -> str:
        """64 hex digits that identify the shard's content, wherever it lies."""
        return self._entries[shard].digest

    def key(self, i: int) -> str:
        """The key of sample i, 0 <= i < len(self)."""
        shard, row = self.locate(i)
        return self.index(shard).key(row)

    def spans(self, i: int) -> tuple[Span | None, Span | None, Span | None]:
        """(offset, bytes) in its shard of sample i's picture, txt and json; None where absent."""
        shard, row = self.locate(i)
        return self.index(shard).spans(row)

    def read(self, i: int) -> Sample:
        """Reads sample i, 0 <= i < len(self).

        Raises:
          BadSample: its bytes are not those that were indexed ("checksum"), its caption is not
            UTF-8 ("encoding") or its JSON is broken ("json").
          DataError: its shard is gone or has changed since it was indexed.
        """
        shard, row = self.locate(i)
        return self.index(shard).sample(row, self._reader(shard))

    def meta(self, i: int) -> dict[str, Any]:
        """The JSON object of sample i, {} where it has none. Raises BadSample("json")."""
        shard, row = self.locate(i)
        return self.index(shard).meta(row, self._reader(shard))

    def _reader(self, shard: int):
        entry = self._entries[shard]
        return functools.partial(
            self.storage.read, entry.path, expected=(entry.size, entry.identity)
        )

    def subset(
        self,
        *,
        keys: Iterable[str] | None = None,
        where: Mapping[str, Any] | None = None,
        count: int | None = None,
    ) -> "Collection":
        """The samples that pass every filter given, in the same order.

        Args:
          keys: keep these keys.
          where: JSON field -> value or list of values, e.g. {"group": ["food", "faces"]}; a sample
            whose JSON is broken passes none, and is counted.
          count: of what is left, keep only this many, the first ones.

        Raises:
          DataError: an unknown key, or nothing left.
        """
        chosen, problems = None, Counter(self._further)
        if keys is not None:
            wanted, chosen, found = set(keys), [], set()
            for i in range(len(self)):
                key = self.key(i)
                if key in wanted:
                    chosen.append(i)
                    found.add(key)
            for missing in sorted(wanted - found):
                every = [self.key(i) for i in range(min(len(self), 10_000))]
                near = difflib.get_close_matches(missing, every, n=3)
                raise DataError(f"no sample has the key {missing!r}; nearest: {near}")
        for field, values in (where or {}).items():
            values = list(values) if isinstance(values, list | tuple | set) else [values]
            there, passed = Counter(), []
            for i in range(len(self)) if chosen is None else chosen:
                try:
                    value = self.meta(i).get(field)
                except BadSample as error:
                    problems[error.reason] += 1
                    continue
                if value in values:
                    passed.append(i)
                elif len(there) < 1000:
                    there[repr(value)] += 1
            chosen = passed
            if not chosen:
                raise DataError(
                    f"no sample has {field} in {values}; there are: {', '.join(sorted(there)[:20])}"
                )
        length = len(self) if chosen is None else len(chosen)
        length = length if count is None else len(range(length)[:count])
        if not length:
            raise DataError(f"a subset of {count} samples is empty; expected a count of at least 1")
        limit, numbers = self._limit, self._chosen
        if chosen is not None and chosen[length - 1] != length - 1:
            picked = np.array(chosen[:length], np.int64)
            numbers = picked if numbers is None else numbers[picked]
            limit = None
        elif numbers is None:
            limit = length  # a prefix needs no list
        else:
            numbers = numbers[:length]
        return Collection(
            self._entries,
            text=self._text,
            storage=self.storage,
            patterns=self._patterns,
            limit=limit,
            chosen=numbers,
            problems=problems,
            unread=self._unread,
        )
