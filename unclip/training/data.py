"""What a config reads: its collections of shards, and batches of them."""

from ml_collections import ConfigDict

from unclip import errors
from unclip.input import filters, order, source
from unclip.input.shards.collection import open_shards
from unclip.input.storage.storage import Storage
from unclip.input.streaming.stream import make_stream


def stores_embeddings(config: ConfigDict) -> bool:
    """Whether z_i of the training pictures is read, not computed in each step."""
    return bool(config.get("stored_embeddings") or config.get("embeddings"))


def storage(config: ConfigDict) -> Storage:
    """How the shards of a config are read; by whole blocks where their neighbours come next."""
    blocks = config.input.streaming or config.input.order == "streamed"
    size = int(config.input.cache_gib * 2**30)
    return Storage(config.input.cache, cache_bytes=size, whole_blocks=blocks)


def collections(config: ConfigDict):
    """(training collection or None, held-out collection or None) of a config.

    Streaming has no training collection: nobody knows what its shards hold.

    Raises:
      ConfigError: no training shards, or settings that do not go together.
      DataError: shards that are missing, unreadable or without complete samples.
    """
    given = config.input
    if not given.shards:
        raise errors.ConfigError("no training shards: --config.input.shards=\"('FILE.tar',)\"")
    if given.streaming and (given.where or given.proportions or given.order != "global"):
        raise errors.ConfigError(
            "input.streaming draws shards at random: where, proportions and order need indexed "
            "shards (unclip index)"
        )
    if given.streaming and stores_embeddings(config):
        raise errors.ConfigError("stored embeddings belong to indexed shards, not to streaming")
    if stores_embeddings(config) and given.crop != "center":
        raise errors.ConfigError("stored embeddings need input.crop='center': one z_i a picture")
    found = []
    for patterns, where in (
        (() if given.streaming else given.shards, given.where),
        (given.held_out, given.held_out_where),
    ):
        collection = None
        if patterns:
            collection = open_shards(patterns, captions=given.captions, storage=storage(config))
        narrowed = collection is not None and where
        found.append(collection.subset(where=where.to_dict()) if narrowed else collection)
    if found[0] is not None:
        check_order(config, found[0])
    return tuple(found)


def check_order(config: ConfigDict, data) -> None:
    """Raises ConfigError where order, proportions or filters of a config do not fit its shards."""
    filters.Filters.parse(config.input.filters)
    proportions = config.input.proportions
    order.make_order(
        data.counts,
        config.seed,
        order=config.input.order,
        streams=config.input.streams,
        groups=data.groups if proportions else None,
        proportions=proportions,
        batch_size=config.batch_size,
        window=config.input.window_examples,
    )


def batches(config: ConfigDict, data, transform, *, start: int = 0, **rows):
    """The training batches of a config from sample number `start` on.

    Args:
      data: the training collection, None for streaming.
      transform: a sample to arrays, from `Task.transform`.
      rows: process_index, process_count, threads and workers of the input.

    Returns:
      `source.Batches` or `streaming.Stream`: an iterator with position, counters() and drain_bad().
    """
    given = config.input
    rows |= {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "start": start,
        "filters": filters.Filters.parse(given.filters),
        "max_bad_fraction": given.max_bad_fraction,
        "max_consecutive_bad": given.max_consecutive_bad,
    }
    if given.streaming:
        return make_stream(
            given.shards,
            transform,
            captions=given.captions,
            shuffle_samples=given.window_examples,
            storage=storage(config),
            **rows,
        )
    return source.make_source(
        data,
        transform,
        order=given.order,
        streams=given.streams,
        proportions=given.proportions,
        window=given.window_examples,
        **rows,
    )
