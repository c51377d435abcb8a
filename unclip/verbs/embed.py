"""`unclip embed`: CLIP embeddings of every sample of a collection, computed once.

    unclip embed --model runs/clip --shards 'cc12m/{00000..01242}.tar' --out cc12m/embeddings
    unclip train --config configs/prior.py:paper --config.clip=runs/clip \\
        --config.embeddings=cc12m/embeddings --workdir runs/prior

Writes z_i and z_t of every picture and caption, a pair of .npy files per shard, with the hash of
the CLIP and the mean and covariance of all rows. Training of the prior and the decoder reads them
instead of running the CLIP. The same command resumes, and adds the embeddings of further shards;
several processes divide the shards among themselves.
"""

import os

from absl import flags

from unclip import cli, errors, files
from unclip.embeddings.store import DTYPES, FILE
from unclip.files.lock import DirectoryLock
from unclip.input import captions

_MODEL = flags.DEFINE_string("model", None, "BUNDLE, or RUN of a CLIP", required=True)
_SHARDS = flags.DEFINE_multi_string(
    "shards",
    [],
    "paths, globs, ranges such as a-{00..07}.tar, an index folder or "
    "tfds:NAME:SPLIT; may be repeated",
)
_OUT = flags.DEFINE_string("out", None, "folder of the embeddings", required=True)
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "of the files")
_CAPTIONS = flags.DEFINE_list(
    "captions",
    list(captions.STANDARD),
    "where captions come from, txt or json:FIELD, as input.captions of the config that will train: "
    "z_t is of the first that a sample has",
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 256, "pictures on the devices of a process at once", lower_bound=1
)
_THREADS = flags.DEFINE_integer("threads", 4, "decoding threads of a process", lower_bound=1)
_WORKERS = flags.DEFINE_integer(
    "workers", 0, "decoding processes in place of threads", lower_bound=0
)
_CACHE = flags.DEFINE_string(
    "cache", "", "folder for blocks of remote shards; without it a few are kept in memory"
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT, for processes started by hand")
_PROCESSES = flags.DEFINE_integer("process_count", None, "how many processes, started by hand")
_PROCESS = flags.DEFINE_integer("process_id", None, "which process this is, started by hand")


def main(argv):
    """Reads the flags, embeds and prints the counts."""
    patterns = [*_SHARDS.value, *argv[1:]]
    if not patterns:
        raise errors.ConfigError("expected --shards, the collection to embed")
    if _WORKERS.value:
        cli.refuse_idle({"threads": "--workers decode in place of threads"})
    from unclip.cascade import bundle, runs
    from unclip.embeddings.job import Job, embed_shards
    from unclip.input.shards.collection import open_shards
    from unclip.input.storage.storage import Storage
    from unclip.runtime import distributed

    os.environ.setdefault("WDS_SECURE", "1")
    distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    clip = runs.open_part(_MODEL.value, "clip")
    missing = {"vision", "text"} - set(clip.params)
    if missing:
        raise errors.ConfigError(
            f"{_MODEL.value}: its CLIP has no {min(missing)} tower; both are needed"
        )
    # A shard is read from beginning to end, so a remote one is read in whole blocks.
    storage = Storage(_CACHE.value, whole_blocks=True)
    collection = open_shards(patterns, text=False, captions=_CAPTIONS.value, storage=storage)
    job = Job(
        clip.arch,
        clip.params,
        bundle.space(clip),
        collection,
        _OUT.value,
        batch_size=_BATCH_SIZE.value,
        captions=_CAPTIONS.value,
        dtype=_DTYPE.value,
        threads=_THREADS.value,
        workers=_WORKERS.value,
    )
    lock = None
    if distributed.is_main():
        try:
            os.makedirs(_OUT.value, exist_ok=True)
        except OSError as error:
            raise errors.DataError(f"cannot make {_OUT.value}: {error.strerror}") from error
        lock = DirectoryLock(_OUT.value, on_lost=distributed.request_stop)
        files.remove_strays(_OUT.value)
    try:
        store = embed_shards(job)
    finally:
        if lock is not None:
            lock.release()
    if distributed.is_main():
        _tell(store, collection)


def _tell(store, collection) -> None:
    print(
        f"{store.samples:,} samples in {len(store.shards):,} shards: {store.embedded:,} with "
        f"z_i, {store.captioned:,} with z_t, {store.embed_dim} numbers each, {store.dtype}"
    )
    for reason, count in sorted((store.bad + collection.problems).items()):
        print(f"  left out: {count:,} {reason}")
    print(f"{store.folder / FILE}: CLIP {store.clip[:12]}")
    if not store.embedded:
        raise errors.DataError(f"no picture of {len(collection):,} could be embedded")
