"""`unclip index`: walks shards once, so that training starts quickly and at any sample.

    unclip index 'data/train-*.tar'              writes data/index
    unclip index 'data/held-out-*.tar'           writes data/index-held-out, beside it
    unclip index 's3://bucket/{0000..0999}.tar' --out index
    unclip index index --check

Training reads samples by number. The index says where each is, holds its checksum and lists what
was left out: truncated shards, duplicate and incomplete keys, samples without a caption. The same
command continues after an interruption.
"""

import contextlib
import functools
import os
import re

from absl import flags

from unclip import errors
from unclip.input import captions as caption_sources
from unclip.input.samples import BadSample
from unclip.input.shards import folder as index_folder
from unclip.input.shards.collection import open_shards
from unclip.input.storage.storage import Storage
from unclip.input.tfds.writer import write_array_record
from unclip.runtime.progress import progress

_OUT = flags.DEFINE_string(
    "out",
    None,
    "the index folder; default: `index` beside the first shard, or `index-NAME` where that is the "
    "index of other shards; training finds both by itself",
)
_CHECKSUMS = flags.DEFINE_bool(
    "checksums",
    True,
    "read every byte and keep a checksum of each sample, so that bytes that change "
    "later are detected; --nochecksums reads only headers and JSON",
)
_CAPTIONS = flags.DEFINE_list(
    "captions",
    None,
    "where captions come from, txt or json:FIELD, as input.captions of the config that will train; "
    f"default: {','.join(caption_sources.STANDARD)}",
)
_CAPTION = flags.DEFINE_string("caption", None, "FIELD: the same as --captions=txt,json:FIELD")
_JOBS = flags.DEFINE_integer("jobs", None, "processes; default: one per core", lower_bound=1)
_FORCE = flags.DEFINE_bool("force", False, "index also the shards whose index is there")
_CHECK = flags.DEFINE_bool(
    "check", False, "write nothing; walk the shards of an index again and compare"
)
_TO_ARRAY_RECORD = flags.DEFINE_string(
    "to_array_record",
    None,
    "also write the captioned samples as a prepared tensorflow-datasets "
    "set to this folder, such as ~/tensorflow_datasets/NAME/1.0.0",
)
flags.DEFINE_alias("to-array-record", "to_array_record")
_NAME = flags.DEFINE_string(
    "name", None, "of the set that --to_array_record writes; default: by its folder"
)
_SPLIT = flags.DEFINE_string("split", "train", "of the set that --to_array_record writes")


def main(argv):
    """Reads the flags, indexes or checks, and prints the totals."""
    patterns = argv[1:]
    if not patterns:
        raise errors.ConfigError(
            "expected shards: paths, globs, ranges or addresses, such as "
            "'data/train-{0000..0099}.tar'; with --check also an index folder"
        )
    folder = patterns[0] if len(patterns) == 1 and index_folder.is_index(patterns[0]) else None
    captions = _captions(walking=not (_CHECK.value or folder))
    storage = Storage()
    if _CHECK.value and _TO_ARRAY_RECORD.value:
        raise errors.ConfigError("--check writes nothing: leave out --to_array_record, or --check")
    if _CHECK.value:
        return _check(folder or _folder(patterns, storage), storage)
    if folder is None:
        folder = _folder(patterns, storage)
        summary = index_folder.index_folder(
            patterns,
            folder,
            checksums=_CHECKSUMS.value,
            captions=captions,
            jobs=_JOBS.value,
            force=_FORCE.value,
            storage=storage,
            progress=_bar("index"),
        )
        _tell(summary, folder, captions)
    elif not _TO_ARRAY_RECORD.value:
        raise errors.ConfigError(f"{folder!r} is an index: give the shards to index, or --check")
    if _TO_ARRAY_RECORD.value:
        _write_records(folder)


def _captions(walking):
    """The caption sources that the flags name."""
    given = [flag for flag in (_CAPTION, _CAPTIONS) if flag.value is not None]
    if len(given) == 2:
        raise errors.ConfigError("--caption FIELD is short for --captions: give one of them")
    if given and not walking:
        raise errors.ConfigError(f"--{given[0].name}: the index has its own, leave the flag out")
    if _CAPTION.value is not None:
        return caption_sources.checked(["txt", f"json:{_CAPTION.value}"])
    return caption_sources.checked(_CAPTIONS.value or caption_sources.STANDARD)


def _folder(patterns, storage):
    """The folder of the index."""
    return _OUT.value or index_folder.place_for(patterns, storage)


def _bar(what):
    return functools.partial(progress, description=what, unit="shard")


def _tell(summary, folder, captions):
    print(
        f"{summary.samples:,} samples in {summary.shards:,} shards, {summary.captioned:,} with a "
        f"caption; {summary.walked:,} shards read, {summary.kept:,} known already"
    )
    if summary.problems:
        print(f"left out, each in {os.path.join(folder, index_folder.PROBLEMS)}:")
        rows = {reason: f"{reason} {n:,}" for reason, n in summary.problems.most_common()}
        width = max(map(len, rows.values()))
        for reason, row in rows.items():
            named = summary.examples.get(reason, [])
            more = ", …" * (summary.problems[reason] > len(named))
            print(f"  {row:<{width}}  {', '.join(named)}{more}")
    if summary.samples and not summary.captioned:
        collection = open_shards(folder, text=False, captions=captions)
        there = []
        with contextlib.suppress(BadSample):
            there = caption_sources.known(collection.meta(0))
        print(
            f"no sample has a caption from {','.join(captions)}; the first has text in "
            f"{', '.join(there) or 'no field of KEY.json'}: see --captions"
        )
    if summary.notes:
        print(f"noticed: {_counts(summary.notes)}")
    for name, noted, found in summary.differences[:10]:
        print(f"{name}: img2dataset noted {noted:,} samples, {found:,} are usable")
    if len(summary.differences) > 10:
        print(f"… and {len(summary.differences) - 10:,} more shards differ from their _stats.json")
    if not summary.samples:
        raise errors.DataError(f"no usable picture in {summary.shards:,} shards")
    print(f"index: {folder}, {summary.file_bytes / summary.samples:.1f} bytes a sample")


def _counts(counter):
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common())


def _check(folder, storage):
    if not index_folder.is_index(folder):
        raise errors.DataError(f"there is no index in {folder!r}: run `unclip index` first")
    wrong = index_folder.check_index(
        folder, jobs=_JOBS.value, storage=storage, progress=_bar("check")
    )
    if wrong:
        raise errors.DataError(
            f"{len(wrong):,} shards are not as they were indexed: index them again",
            "\n".join(f"{name}: {what}" for name, what in wrong),
        )
    print(f"{folder}: every shard is as it was indexed")


def _write_records(folder):
    out = os.path.abspath(os.path.expanduser(_TO_ARRAY_RECORD.value))
    above, last = os.path.split(out)
    versioned = re.fullmatch(r"\d+\.\d+\.\d+", last)
    name = _NAME.value or (os.path.basename(above) if versioned else last)
    captions = index_folder.read_index(folder).captions
    collection = open_shards(folder, captions=captions)
    with progress(len(collection), "write", "sample") as bar:
        info = write_array_record(
            collection,
            out,
            name=name,
            split=_SPLIT.value,
            captions=captions,
            progress=bar.update,
            version=last if versioned else "1.0.0",
        )
    print(f"{info['samples']:,} samples in {info['files']:,} files: {out}")
    if info["left_out"]:
        print("left out: " + ", ".join(f"{r} {n:,}" for r, n in info["left_out"].items()))
