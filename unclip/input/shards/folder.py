"""The folder that `unclip index` writes: an index file for each shard and a table of them.

    OUT/NAME.idx       one `ShardIndex`
    OUT/index.json     format, caption sources, totals; of each shard its place, relative to OUT if
                       local, and the digest that identifies its content
    OUT/problems.jsonl what was left out: shard, key or member, reason

A large collection is thousands of shards: opening one reads index.json alone. Shards are indexed in
parallel, and an index file is written whole or not at all, so indexing that was interrupted can be
resumed; index.json is written last.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from unclip import files
from unclip.errors import ConfigError, DataError
from unclip.input import captions as caption_sources
from unclip.input.shards import walk
from unclip.input.shards.index import VERSION, ShardIndex
from unclip.input.storage.address import shown
from unclip.input.storage.storage import Storage

TABLE, PROBLEMS = "index.json", "problems.jsonl"
_FORMAT = "unclip-index"
_MAX_TABLE = 1 << 30
_MAX_STATS = 1 << 20
_EXAMPLES = 3
_LOCAL_BLOCK, _REMOTE_BLOCK = 8 << 10, 8 << 20  # bytes read at once where headers are wanted


class Entry(NamedTuple):
    """What is known of a shard without looking into its index.

    Attributes:
      path: where the shard lies.
      index: its index, or the path of the index file.
      name, size, identity, digest, count, captioned, problems, captions: see `ShardIndex`.
    """

    path: str
    index: ShardIndex | str
    name: str
    size: int
    identity: str
    digest: str
    count: int
    captioned: int
    problems: Mapping[str, int]
    captions: Mapping[str, int] | None = None

    def fits(self, sources: Sequence[str]) -> bool:
        """Whether a walk for these caption sources would find the same samples with a caption."""
        if self.captions is None:
            return "txt" in sources
        asked, known = set(sources), set(self.captions)
        least = self.captioned if known <= asked else max(self.captions.get(s, 0) for s in asked)
        return least == (self.captioned if asked <= known else self.count)


class Table(NamedTuple):
    """What index.json says.

    Attributes:
      captions: the caption sources that were looked for.
      shards: an `Entry` each.
      unread: see `Storage.unread`.
    """

    captions: tuple[str, ...]
    shards: list[Entry]
    unread: Mapping[str, Sequence[str]]


class Summary(NamedTuple):
    """What an index holds.

    Attributes:
      shards, samples, captioned: how many; walked, kept: shards read now, and those whose index was
        there already.
      problems, notes: Counters over all shards, see `walk.walk_shard`, and "no-text": usable
        pictures without a caption.
      differences: (shard, successes that img2dataset noted, samples found), where they differ.
      file_bytes: of all index files.
      examples: reason -> the first few that were left out, "SHARD: KEY or member".
    """

    shards: int
    samples: int
    captioned: int
    walked: int
    kept: int
    problems: Counter
    notes: Counter
    differences: list[tuple[str, int, int]]
    file_bytes: int
    examples: dict[str, list[str]]


def entry(path: str, index: ShardIndex, place: ShardIndex | str | None = None) -> Entry:
    """The entry of an open index; `place`: its file, where it is not to be kept open."""
    return Entry(
        path,
        index if place is None else place,
        index.name,
        index.size,
        index.identity,
        index.digest,
        index.count,
        index.captioned,
        dict(index.problems),
        index.captions,
    )


def name_of(path: str) -> str:
    """The file name of a path or an address, without what follows a `?`."""
    return os.path.basename(path.partition("?")[0] if "://" in path else path)


def walk_path(
    path: str,
    storage: Storage,
    *,
    captions: Sequence[str] = caption_sources.STANDARD,
    checksums: bool = False,
) -> ShardIndex:
    """Walks one shard wherever it lies. Raises DataError."""
    size, identity = storage.stat(path)

    def read(offset: int, count: int) -> bytes:
        return storage.read(path, offset, count, (size, identity))

    block = _LOCAL_BLOCK if storage.local(path) else _REMOTE_BLOCK
    return walk.walk_shard(
        name_of(path), read, size, identity, captions=captions, checksums=checksums, block=block
    )


# ------------------------------------------------------------------------------------ reading one


def is_index(path: str) -> bool:
    """Whether `path` is a folder that `unclip index` wrote."""
    return "://" not in path and os.path.isfile(os.path.join(path, TABLE))


def beside(folder: str) -> list[str]:
    """The index folders in a folder of shards, named "index" or "index-NAME"."""
    try:
        names = sorted(os.listdir(folder or "."))
    except OSError:
        return []
    paths = [os.path.join(folder, n) for n in names if n == "index" or n.startswith("index-")]
    return [path for path in paths if is_index(path)]


def place_for(patterns: str | Sequence[str], storage: Storage) -> str:
    """The folder beside local shards for their index: no index of other shards is written over.

    It is one that holds these very shards, or some of them under the same name (train-0000,
    train-0001, …) and no other index the added ones; else a new one, `index` or `index-NAME`.

    Raises:
      ConfigError: the shards are remote. DataError: no shard matches.
    """
    paths = storage.expand(patterns)
    if not storage.local(paths[0]):
        raise ConfigError("the shards are remote: give the folder of the index with --out")
    folder, names, wanted = os.path.dirname(paths[0]), _stem(paths), _places(paths, storage)
    indices = {index: _known(index, storage) for index in beside(folder)}
    for index, known in indices.items():
        added = wanted - known
        if known == wanted or (
            known < wanted
            and _stem([*known]) == names
            and all(added.isdisjoint(others) for others in indices.values())
        ):
            return index
    stem = names or _stem([paths[0]]) or "shards"
    numbered = (f"index-{stem}-{number}" for number in itertools.count(2))
    choices = itertools.chain(["index", f"index-{stem}"], numbered)
    return next(
        path
        for path in (os.path.join(folder, choice) for choice in choices)
        if not _known(path, storage)
    )


def _known(index: str, storage: Storage) -> set[str]:
    """The shards of an index folder that are there; none where it is damaged, and has to be written
    anew."""
    with contextlib.suppress(DataError):
        known = _places([shard.path for shard in read_index(index).shards], storage)
        return {path for path in known if not storage.local(path) or os.path.exists(path)}
    return set()


def _places(paths: Sequence[str], storage: Storage) -> set[str]:
    return {os.path.abspath(path) if storage.local(path) else path for path in paths}


def _stem(paths: Sequence[str]) -> str:
    """What the names of shards have in common, without their number: "train" of train-0007.tar."""
    names = [name_of(path).removesuffix(".tar") for path in paths]
    common = os.path.commonprefix(names)  # noqa: RUF071 (names, not paths)
    return re.sub(r"[^\w.-]+", "-", common.rstrip("0123456789"))[:80].strip("-_.")


def read_index(folder: str) -> Table:
    """What index.json of an index folder says; index files are not touched.

    Raises:
      DataError: index.json is not there, none of unclip's, of another version or damaged.
    """
    path = os.path.join(folder, TABLE)
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_TABLE + 1)
        table = json.loads(data) if len(data) <= _MAX_TABLE else None
    except OSError as error:
        raise DataError(f"{path!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path!r} is not JSON: index the shards again") from error
    if not isinstance(table, dict) or table.get("format") != _FORMAT:
        raise DataError(f"{path!r} was not written by `unclip index`")
    if table.get("version") != VERSION:
        raise DataError(
            f"{path!r} has format version {table.get('version')}, this unclip reads "
            f"{VERSION}: index the shards again"
        )
    try:
        # An older unclip noted the field that took the place of KEY.txt.
        older = "captions" not in table
        field = _typed(table, "caption", str) if older else ""
        sources = tuple(_typed(table, "captions", list)) if not older else ("txt",)
        entries = [_read_entry(folder, shard) for shard in _typed(table, "shards", list)]
        if older and field != caption_sources.STAND_IN:
            sources = ("txt", f"json:{field}")
            unknown = dict.fromkeys(sources, 0)
            entries = [found._replace(captions=unknown) for found in entries]
        unread = _typed(table, "unread", dict) if "unread" in table else {}
        return Table(sources, entries, {why: _typed(unread, why, list) for why in unread})
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path!r} is damaged ({error}): index the shards again") from error


def _typed(table: Any, field: str, kind: type) -> Any:
    value = table[field]
    if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 0)):
        raise ValueError(f"field {field!r} is {str(value)[:40]!r}")
    return value


def _read_entry(folder: str, shard: dict[str, Any]) -> Entry:
    path, file, digest = (_typed(shard, field, str) for field in ("path", "file", "digest"))
    if os.path.basename(file) != file or not file.endswith(".idx"):
        raise ValueError(f"field 'file' is {file[:40]!r}")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"field 'digest' is {digest[:40]!r}")
    if "\0" in path:
        raise ValueError(f"field 'path' is {path[:40]!r}")
    if "://" not in path:
        path = os.path.normpath(os.path.join(folder, path))
    problems = _typed(shard, "problems", dict)
    captions = _typed(shard, "captions", dict) if "captions" in shard else None
    found = Entry(
        path,
        os.path.join(folder, file),
        name_of(path),
        _typed(shard, "size", int),
        _typed(shard, "identity", str),
        digest,
        _typed(shard, "samples", int),
        _typed(shard, "captioned", int),
        {reason: _typed(problems, reason, int) for reason in problems},
        captions and {source: _typed(captions, source, int) for source in captions},
    )
    if found.captioned > found.count:
        raise ValueError(f"{found.captioned} of {found.count} samples have a caption")
    return found


# ------------------------------------------------------------------------------------ writing one


def index_folder(
    patterns: str | Sequence[str],
    out: str | os.PathLike,
    *,
    checksums: bool = True,
    captions: Sequence[str] = caption_sources.STANDARD,
    jobs: int | None = None,
    force: bool = False,
    storage: Storage | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Summary:
    """Indexes shards into a folder; keeps the index files there that still fit their shards.

    Args:
      patterns: see `Storage.expand`.
      out: the folder; made if missing. Its index.json afterwards lists exactly these shards.
      checksums: read every byte and keep a checksum of each sample; False: read only headers and
        JSON.
      captions: where captions come from, see `unclip.input.captions`.
      jobs: processes; None: one per core.
      force: index every shard again.
      progress: called with the number of shards; returns a bar with `update()` and `close()`.

    Raises:
      ConfigError: no pattern, an unsupported address, jobs below 1, or `out` is the index of other
        shards, which it would forget.
      DataError: no shard, or some cannot be read: they are named, the others are kept, and a
        second run indexes the missing ones.
    """
    storage = storage or Storage()
    out, captions = os.path.abspath(out), caption_sources.checked(captions)
    paths = storage.expand(patterns)
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs {jobs}: expected at least 1")
    _refuse_others(out, paths, storage)
    found, failed = {}, []
    bar = progress(len(paths)) if progress else None
    work = [
        (path, os.path.join(out, file), storage, captions, checksums, force)
        for path, file in zip(paths, _file_names(paths))
    ]
    try:
        for path, result in _in_parallel(_index_one, work, jobs):
            if isinstance(result, DataError):
                failed.append(str(result))
            else:
                found[path] = result
            if bar is not None:
                bar.update()
    finally:
        if bar is not None:
            bar.close()
    if failed:
        raise DataError(
            f"{len(failed)} of {len(paths)} shards cannot be indexed; the others are, "
            f"and are kept if this is run again: {'; '.join(sorted(failed)[:3])}"
        )
    _refuse_others(out, paths, storage)  # another command may have written one meanwhile
    results, unread = [(path, *found[path]) for path in paths], storage.unread(patterns)
    return _write_table(out, results, unread, captions, checksums, storage)


def _refuse_others(out: str, paths: Sequence[str], storage: Storage) -> None:
    """Refuses a folder with the index of shards that are there and not among `paths`."""
    others = sorted(_known(out, storage) - _places(paths, storage))
    if others:
        raise ConfigError(
            f"{out} is the index of {len(others)} other shards, the first {shown(others[0])!r}, "
            "and would forget them: give another --out, or name those shards too"
        )


def _file_names(paths: Sequence[str]) -> list[str]:
    """NAME.idx for each shard; with a hash of the path where two shards have the same name."""
    names = [name_of(path).removesuffix(".tar")[:200] for path in paths]
    often = Counter(names)
    return [
        f"{name}.idx"
        if often[name] == 1
        else f"{name}-{hashlib.sha256(path.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}.idx"
        for name, path in zip(names, paths)
    ]


def _cores() -> int:
    """The number of cores that this process may use."""
    own = getattr(os, "sched_getaffinity", None)
    return len(own(0)) if own else os.cpu_count() or 1


def _in_parallel(function: Callable, work: Sequence[tuple], jobs: int | None) -> Iterator[tuple]:
    """(first argument, result) of each call, as they come."""
    jobs = min(jobs or _cores(), len(work))
    if jobs <= 1:
        for arguments in work:
            yield arguments[0], function(*arguments)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(function, *arguments): arguments[0] for arguments in work}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise DataError(
                "an indexing process was killed, often because memory ran out: run again "
                "with fewer jobs; finished shards are kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _index_one(
    path: str,
    file: str,
    storage: Storage,
    captions: tuple[str, ...],
    checksums: bool,
    force: bool,
) -> tuple[bool, Entry, dict[str, int], int] | DataError:
    """(walked now, entry, notes, bytes of the index file) of one shard, or why it has none."""
    try:
        index = None if force else _kept(path, file, storage, captions, checksums)
        walked = index is None
        if walked:
            index = walk_path(path, storage, captions=captions, checksums=checksums)
            index.write(file)
        return walked, entry(path, index, file), dict(index.notes), os.path.getsize(file)
    except DataError as error:
        return error


def _kept(
    path: str, file: str, storage: Storage, captions: tuple[str, ...], checksums: bool
) -> ShardIndex | None:
    """The index that is there already, if it is of this very shard."""
    if not os.path.exists(file):
        return None
    try:
        index = ShardIndex.open(file)
    except DataError:  # damaged or of another version: made anew
        return None
    newer = storage.local(path) and os.path.getmtime(path) > os.path.getmtime(file)
    fits = (index.name, (index.size, index.identity), set(index.captions or ())) == (
        name_of(path),
        storage.stat(path),
        set(captions),
    )
    return index if fits and not newer and index.checksums >= checksums else None


def _write_table(
    out: str,
    results: list[tuple],
    unread: Mapping[str, Sequence[str]],
    captions: tuple[str, ...],
    checksums: bool,
    storage: Storage,
) -> Summary:
    problems, notes, rows, differences, examples = Counter(), Counter(), [], [], {}
    for path, _, shard, shard_notes, _ in results:
        problems.update(shard.problems)
        problems["no-text"] += shard.count - shard.captioned
        notes.update(shard_notes)
        local = storage.local(path)
        successes = _img2dataset_successes(path) if local else None
        if successes not in (None, shard.count):
            differences.append((shard.name, successes, shard.count))
        rows.append(
            {
                "path": os.path.relpath(os.path.abspath(path), out) if local else path,
                "file": os.path.basename(shard.index),
                "size": shard.size,
                "identity": shard.identity,
                "samples": shard.count,
                "captioned": shard.captioned,
                "digest": shard.digest,
                "problems": shard.problems,
                "captions": shard.captions,
            }
        )
    with files.replacing(os.path.join(out, PROBLEMS)) as temporary, open(temporary, "w") as file:
        for path, _, shard, _, _ in results:
            total = sum(shard.problems.values()) + shard.count - shard.captioned
            listed = ShardIndex.open(shard.index).left_out() if total else ()
            for reason, what in itertools.islice(listed, walk.MAX_LISTED):
                print(json.dumps({"shard": shown(path), "what": what, "reason": reason}), file=file)
                if len(named := examples.setdefault(reason, [])) < _EXAMPLES:
                    named.append(f"{shard.name}: {what}")
            if total > walk.MAX_LISTED:
                more = f"… and {total - walk.MAX_LISTED} more"
                print(json.dumps({"shard": shown(path), "what": more, "reason": ""}), file=file)
        for reason, names in unread.items():
            problems[reason] += len(names)
            examples.setdefault(reason, []).extend(names[:_EXAMPLES])
            for name in names:
                print(json.dumps({"shard": name, "what": name, "reason": reason}), file=file)
    summary = Summary(
        len(results),
        sum(r["samples"] for r in rows),
        sum(r["captioned"] for r in rows),
        sum(walked for _, walked, *_ in results),
        sum(not walked for _, walked, *_ in results),
        +problems,
        notes,
        differences,
        sum(size for *_, size in results),
        examples,
    )
    table = {
        "format": _FORMAT,
        "version": VERSION,
        "captions": captions,
        "checksums": checksums,
        "samples": summary.samples,
        "captioned": summary.captioned,
        "problems": summary.problems,
        "notes": notes,
        "unread": unread,
        "img2dataset_differences": differences,
        "shards": rows,
    }
    with files.replacing(os.path.join(out, TABLE)) as temporary, open(temporary, "w") as file:
        json.dump(table, file, indent=1)
    return summary


def _img2dataset_successes(path: str) -> int | None:
    """How many samples img2dataset noted beside a shard that it wrote; None without a note."""
    try:
        with open(f"{path.removesuffix('.tar')}_stats.json", "rb") as file:
            successes = json.loads(file.read(_MAX_STATS)).get("successes")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return successes if isinstance(successes, int) else None


# ----------------------------------------------------------------------------------- checking one


def check_index(
    folder: str,
    *,
    jobs: int | None = None,
    storage: Storage | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Iterable[tuple[str, str]]:
    """Walks every shard of an index again and compares; checksums too, where it has them.

    Returns:
      (shard, what is wrong with it), for each that differs.
    """
    captions, entries, _ = read_index(folder)
    storage = storage or Storage()
    bar = progress(len(entries)) if progress else None
    wrong = {}
    try:
        work = [(e.path, e, storage, captions) for e in entries]
        for path, what in _in_parallel(_check_one, work, jobs):
            if what:
                wrong[path] = what
            if bar is not None:
                bar.update()
    finally:
        if bar is not None:
            bar.close()
    return [(e.name, wrong[e.path]) for e in entries if e.path in wrong]


def _check_one(path: str, shard: Entry, storage: Storage, captions: tuple[str, ...]) -> str:
    try:
        index = ShardIndex.open(shard.index)
        if index.digest != shard.digest:
            return "its index file is not the one that index.json was written for"
        if storage.stat(path) != (shard.size, shard.identity):
            return "has changed since it was indexed (another size or version)"
        found = walk_path(path, storage, captions=captions, checksums=index.checksums)
    except DataError as error:
        return str(error)
    if found.digest != index.digest:
        return "has changed since it was indexed (other members)"
    changed = int(np.count_nonzero(found.table[:, -1] != index.table[:, -1]))
    return f"the bytes of {changed} samples have changed" if changed else ""
