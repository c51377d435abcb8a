"""`unclip data-bench`: samples per second of your shards on this machine, by phase and in total.

    unclip data-bench shards/*.tar --size 256
    unclip data-bench 's3://bucket/{0000..0099}.tar' --size 64 --threads 16 --seconds 10

Reads, decodes, resizes, tokenises and batches as training does, and prints what each costs and
which global batches and step times that can feed.
"""

import json
import os

from absl import flags

from unclip import cli, errors, files
from unclip.input import captions

_SIZE = flags.DEFINE_integer("size", 64, "pixels a side of the training pictures", lower_bound=1)
_CROP = flags.DEFINE_enum("crop", "center", ["center", "random"], "which square of a picture")
_FRACTION = flags.DEFINE_float(
    "fraction", 1.0, "the square's side, of the shorter side", lower_bound=0.01, upper_bound=1.0
)
_MARGIN = flags.DEFINE_float(
    "margin",
    2.0,
    "JPEGs are decoded at no less than this many times --size; 1 is fastest",
    lower_bound=1.0,
    upper_bound=8.0,
)
_CAPTIONS = flags.DEFINE_list(
    "captions", list(captions.STANDARD), "where captions come from, txt or json:FIELD"
)
_FILTERS = flags.DEFINE_string(
    "filters", "", "also say what part of the samples they keep, e.g. similarity=0.28:,aspect=:2"
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 64, "samples per batch of this host", lower_bound=1
)
_THREADS = flags.DEFINE_integer(
    "threads", None, "decoding threads; as many as there are cores if not given", lower_bound=1
)
_WORKERS = flags.DEFINE_integer(
    "workers", 0, "decoding processes instead of threads", lower_bound=0
)
_SECONDS = flags.DEFINE_float("seconds", 5.0, "of each measurement", lower_bound=0.01)
_JSON = flags.DEFINE_bool("json", False, "print JSON and nothing else")
_OUT = flags.DEFINE_string("out", None, "also write the JSON to this file")


def main(argv):
    """Reads the flags, measures and prints."""
    if not argv[1:]:
        raise errors.ConfigError("expected SHARDS: paths, globs or ranges such as a-{00..07}.tar")
    if _WORKERS.value:
        cli.refuse_idle({"threads": "--workers decode in place of threads"})
    from unclip.input.decode.text import CONTEXT_LENGTH
    from unclip.input.decode.transforms import ImageText
    from unclip.input.filters import Filters
    from unclip.input.shards.collection import open_shards
    from unclip.input.throughput import PHASES, kept, measure
    from unclip.runtime import progress

    filters = Filters.parse(_FILTERS.value)
    transform = ImageText(
        _SIZE.value,
        CONTEXT_LENGTH,
        crop=_CROP.value,
        fraction=_FRACTION.value,
        captions=_CAPTIONS.value,
        margin=_MARGIN.value,
    )
    collection = open_shards(argv[1:], captions=_CAPTIONS.value)
    threads = _THREADS.value or len(os.sched_getaffinity(0))
    with progress.progress(len(PHASES) + 3, "data-bench", "measurement") as bar:
        found = measure(
            collection,
            transform,
            batch_size=_BATCH_SIZE.value,
            threads=threads,
            workers=_WORKERS.value,
            seconds=_SECONDS.value,
            tell=lambda _: bar.update(),
        )
    values = found.to_json() | {"size": _SIZE.value, "margin": _MARGIN.value}
    lines = [found.table()]
    if filters:
        values["filters"] = passed = kept(collection, filters, captions=_CAPTIONS.value)
        reasons = "".join(f", {reason} {n}" for reason, n in passed["rejected"].items())
        lines.append(f"\n--filters keep {passed['kept']:.1%} of {passed['of']} samples{reasons}")
    if _OUT.value:
        with files.replacing(_OUT.value) as temporary:
            temporary.write_text(json.dumps(values) + "\n")
    print(json.dumps(values) if _JSON.value else "\n".join(lines))
