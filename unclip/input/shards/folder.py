"""The folder that `unclip index` writes: an index file for each shard and a table of them.

    OUT/NAME.idx       one `ShardIndex`
    OUT/index.json     format, caption field, totals; of each shard its place, relative to OUT if
                       local, and the digest that identifies its content
    OUT/problems.jsonl what was left out: shard, key or member, reason

A large collection is thousands of shards: opening one reads index.json alone. Shards are indexed in
parallel, and an index file is written whole or not at all, so indexing that was interrupted can be
resumed; index.json is written last.
"""

import concurrent.futures
import concurrent.futures.process
import hashlib
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
from unclip.input.shards import walk
from unclip.input.shards.index import VERSION, ShardIndex
from unclip.input.storage.address import shown
from unclip.input.storage.storage import Storage

TABLE, PROBLEMS = "index.json", "problems.jsonl"
_FORMAT = "unclip-index"
_MAX_TABLE = 1 << 30
_MAX_STATS = 1 << 20
_LOCAL_BLOCK, _REMOTE_BLOCK = 8 << 10, 8 << 20  # bytes read at once where headers are wanted


class Entry(NamedTuple):
    """What is known of a shard without looking into its index.

    Attributes:
      path: where the shard lies.
      index: its index, or the path of the index file.
      name, size, identity, digest, count, captioned, problems: see `ShardIndex`.
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


class Summary(NamedTuple):
    """What an index holds.

    Attributes:
      shards, samples, captioned: how many; walked, kept: shards read now, and those whose index was
        there already.
      problems, notes: Counters over all shards, see `walk.walk_shard`.
      differences: (shard, successes that img2dataset noted, samples found), where they differ.
      file_bytes: of all index files.
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
    )


def name_of(path: str) -> str:
    """The file name of a path or an address, without what follows a `?`."""
    return os.path.basename(path.partition("?")[0] if "://" in path else path)


def walk_path(
    path: str, storage: Storage, *, caption: str = "caption", checksums: bool = False
) -> ShardIndex:
    """Walks one shard wherever it lies. Raises DataError."""
    size, identity = storage.stat(path)

    def read(offset: int, count: int) -> bytes:
        return storage.read(path, offset, count, (size, identity))

    block = _LOCAL_BLOCK if storage.local(path) else _REMOTE_BLOCK
    return walk.walk_shard(
        name_of(path), read, size, identity, caption=caption, checksums=checksums, block=block
    )


# ------------------------------------------------------------------------------------ reading one


def is_index(path: str) -> bool:
    """Whether `path` is a folder that `unclip index` wrote."""
    return "://" not in path and os.path.isfile(os.path.join(path, TABLE))


def read_index(folder: str) -> tuple[str, list[Entry]]:
    """(caption field, entries) of an index folder; index files are not touched.

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
        caption = _typed(table, "caption", str)
        return caption, [_read_entry(folder, shard) for shard in _typed(table, "shards", list)]
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
    caption: str = "caption",
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
      caption: the JSON field that stands in for a missing KEY.txt.
      jobs: processes; None: one per core.
      force: index every shard again.
      progress: called with the number of shards; returns a bar with `update()` and `close()`.

    Raises:
      ConfigError: no pattern, an unsupported address, jobs below 1.
      DataError: no shard, or some cannot be read: they are named, the others are kept, and a
        second run indexes the missing ones.
    """
    storage = storage or Storage()
    out = os.path.abspath(out)
    paths = storage.expand(patterns)
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs {jobs}: expected at least 1")
    found, failed = {}, []
    bar = progress(len(paths)) if progress else None
    work = [
        (path, os.path.join(out, file), storage, caption, checksums, force)
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
    return _write_table(out, [(path, *found[path]) for path in paths], caption, checksums, storage)


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
    path: str, file: str, storage: Storage, caption: str, checksums: bool, force: bool
) -> tuple[bool, Entry, dict[str, int], int] | DataError:
    """(walked now, entry, notes, bytes of the index file) of one shard, or why it has none."""
    try:
        index = None if force else _kept(path, file, storage, caption, checksums)
        walked = index is None
        if walked:
            index = walk_path(path, storage, caption=caption, checksums=checksums)
            index.write(file)
        return walked, entry(path, index, file), dict(index.notes), os.path.getsize(file)
    except DataError as error:
        return error


def _kept(
    path: str, file: str, storage: Storage, caption: str, checksums: bool
) -> ShardIndex | None:
    """The index that is there already, if it is of this very shard."""
    if not os.path.exists(file):
        return None
    try:
        index = ShardIndex.open(file)
    except DataError:  # damaged or of another version: made anew
        return None
    newer = storage.local(path) and os.path.getmtime(path) > os.path.getmtime(file)
    fits = (index.name, (index.size, index.identity), index.caption) == (
        name_of(path),
        storage.stat(path),
        caption,
    )
    return index if fits and not newer and index.checksums >= checksums else None


def _write_table(
    out: str, results: list[tuple], caption: str, checksums: bool, storage: Storage
) -> Summary:
    problems, notes, rows, differences = Counter(), Counter(), [], []
    for path, _, shard, shard_notes, _ in results:
        problems.update(shard.problems)
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
            }
        )
    summary = Summary(
        len(results),
        sum(r["samples"] for r in rows),
        sum(r["captioned"] for r in rows),
        sum(walked for _, walked, *_ in results),
        sum(not walked for _, walked, *_ in results),
        problems,
        notes,
        differences,
        sum(size for *_, size in results),
    )
    with files.replacing(os.path.join(out, PROBLEMS)) as temporary, open(temporary, "w") as file:
        for path, _, shard, _, _ in results:
            listed = ShardIndex.open(shard.index).listed() if shard.problems else ()
            for reason, what in listed:
                print(json.dumps({"shard": shown(path), "what": what, "reason": reason}), file=file)
            more = sum(shard.problems.values()) - walk.MAX_LISTED
            if more > 0:
                print(
                    json.dumps({"shard": shown(path), "what": f"… and {more} more", "reason": ""}),
                    file=file,
                )
    table = {
        "format": _FORMAT,
        "version": VERSION,
        "caption": caption,
        "checksums": checksums,
        "samples": summary.samples,
        "captioned": summary.captioned,
        "problems": problems,
        "notes": notes,
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
    caption, entries = read_index(folder)
    storage = storage or Storage()
    bar = progress(len(entries)) if progress else None
    wrong = {}
    try:
        work = [(e.path, e, storage, caption) for e in entries]
        for path, what in _in_parallel(_check_one, work, jobs):
            if what:
                wrong[path] = what
            if bar is not None:
                bar.update()
    finally:
        if bar is not None:
            bar.close()
    return [(e.name, wrong[e.path]) for e in entries if e.path in wrong]


def _check_one(path: str, shard: Entry, storage: Storage, caption: str) -> str:
    try:
        index = ShardIndex.open(shard.index)
        if index.digest != shard.digest:
            return "its index file is not the one that index.json was written for"
        if storage.stat(path) != (shard.size, shard.identity):
            return "has changed since it was indexed (another size or version)"
        found = walk_path(path, storage, caption=caption, checksums=index.checksums)
    except DataError as error:
        return str(error)
    if found.digest != index.digest:
        return "has changed since it was indexed (other members)"
    changed = int(np.count_nonzero(found.table[:, -1] != index.table[:, -1]))
    return f"the bytes of {changed} samples have changed" if changed else ""
