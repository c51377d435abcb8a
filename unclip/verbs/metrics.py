"""`unclip metrics`: FID, KID, CLIP score and more, of pictures from any source.

    unclip metrics --real coco/val --fake samples --crop 256 --metrics fid,kid --inception FILE
    unclip metrics --fake samples --captions captions.csv --metrics clip_score --clip models/clip

Pictures are a folder, webdataset shards, a .npz or a prepared tfds split. Every value is printed
with a key that gives the network and its weights, the resize, the number of pictures, and
fingerprints of the reference and the captions: equal keys mean equal measurements.
"""

import contextlib
import os
import sys

from absl import flags

from unclip import errors, files
from unclip.files import images
from unclip.files.moments import StatisticsFile, read_statistics, write_statistics

# As `measure.table` has them, which imports JAX; a help text need not.
NAMES = (
    *("fid", "fid-clean", "fid-pytorch", "fid-infinity", "sfid", "is", "is-openai", "kid"),
    *("kid-clean", "pr", "dc", "pr-clip", "dc-clip", "clip_score", "clip_score-torchmetrics"),
    *("clip_cosine", "ref_clip_score", "r_precision", "cmmd", "fd-clip", "fd-dinov2"),
    *("prdc", "prdc-clip"),
)
ALLOW = ("corrupt", "sizes")

_REAL = flags.DEFINE_string(
    "real", None, "the reference: DIR, SHARDS, tfds:NAME:SPLIT, .npz of pictures or of statistics"
)
_FAKE = flags.DEFINE_string("fake", None, "pictures to judge: DIR, SHARDS, tfds:NAME:SPLIT or .npz")
_METRICS = flags.DEFINE_list("metrics", None, f"of {', '.join(NAMES)}")
_CAPTIONS = flags.DEFINE_string(
    "captions",
    None,
    "captions of --fake by name: .jsonl, .json, .csv or .tsv; without it, those that the pictures "
    "have themselves: KEY.txt, the shards' or the prompts in PNGs of unclip generate",
)
_INCEPTION = flags.DEFINE_string("inception", None, "FID's Inception network: FILE or BUNDLE")
_CLIP = flags.DEFINE_string("clip", None, "the CLIP to judge by: BUNDLE or RUN")
_DINOV2 = flags.DEFINE_string("dinov2", None, "DINOv2: BUNDLE, folder or file")
_CROP = flags.DEFINE_integer(
    "crop", None, "measure the centre squares, resized to this many pixels a side", lower_bound=1
)
_FILTER = flags.DEFINE_enum("filter", "bicubic", ["bicubic", "box"], "of --crop; antialiased")
_LIMIT = flags.DEFINE_integer(
    "limit", None, "only this many of each set, the first ones", lower_bound=2
)
_ALLOW = flags.DEFINE_list(
    "allow", [], f"of {', '.join(ALLOW)}: leave unreadable pictures out; take several sizes"
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 64, "pictures on the devices at once; changes no value", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "of r_precision, fid-infinity and intervals", lower_bound=0)
_CANDIDATES = flags.DEFINE_integer(
    "candidates", 100, "captions that r_precision chooses from", lower_bound=2
)
_BOOTSTRAP = flags.DEFINE_integer(
    "bootstrap", 0, "resamples for an interval of Fréchet distances; 200 are enough", lower_bound=0
)
_PROTOCOL = flags.DEFINE_string(
    "protocol", "", "id of how prompts and reference were chosen; becomes part of the keys"
)
_JSON = flags.DEFINE_bool("json", False, "print JSON, with provenance, and nothing else")
_OUT = flags.DEFINE_string("out", None, "also write the JSON to this file")
_SAVE = flags.DEFINE_string(
    "save_statistics",
    None,
    "write what the metrics need of --real to this .npz, which can be given as --real "
    "later; --fake may then be left out",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT, for processes started by hand")
_PROCESSES = flags.DEFINE_integer("process_count", None, "how many processes, started by hand")
_PROCESS = flags.DEFINE_integer("process_id", None, "which process this is, started by hand")


def main(argv):
    """Reads the flags, measures and prints."""
    if argv[1:]:
        raise errors.ConfigError(f"unexpected {argv[1]!r}: give pictures as --real and --fake")
    if not _METRICS.value:
        raise errors.ConfigError(f"expected --metrics, of {', '.join(NAMES)}")
    if _FAKE.value is None and not (_SAVE.value and _REAL.value):
        raise errors.ConfigError(
            "expected --fake, the pictures to judge (or --real with --save_statistics)"
        )
    if _SAVE.value and _REAL.value is None:
        raise errors.ConfigError("--save_statistics writes those of --real, which is not given")
    if _SAVE.value and not _SAVE.value.endswith(".npz"):
        raise errors.ConfigError(f"--save_statistics {_SAVE.value}: expected a name ending in .npz")
    if _CAPTIONS.value and _FAKE.value is None:
        raise errors.ConfigError("--captions are those of --fake, which is not given")
    from unclip.measure.table import check_needs, expand
    from unclip.runtime import distributed

    names = expand(_METRICS.value)
    weights = {"inception": _INCEPTION.value, "clip": _CLIP.value, "dinov2": _DINOV2.value}
    check_needs(names, weights, real=_REAL.value is not None, fake=_FAKE.value is not None)

    with _stdout_kept_clean():
        result = _measured(names, weights)
    if distributed.is_main():
        _tell(result)


def _measured(names, weights):
    """Opens what the flags name, and measures: a `measure.table.Result`."""
    from unclip.measure.table import measure
    from unclip.runtime import distributed

    distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    real = None if _REAL.value is None else _open_real(_REAL.value)
    if _SAVE.value and isinstance(real, StatisticsFile):
        raise errors.ConfigError(f"--save_statistics: {_REAL.value} is statistics already")
    fake, texts = (None, None) if _FAKE.value is None else _open_fake(names)
    return measure(
        real,
        fake,
        names,
        captions=texts,
        batch_size=_BATCH_SIZE.value,
        allow=_ALLOW.value,
        seed=_SEED.value,
        candidates=_CANDIDATES.value,
        bootstrap=_BOOTSTRAP.value,
        protocol=_PROTOCOL.value,
        **weights,
    )


@contextlib.contextmanager
def _stdout_kept_clean():
    """Sends to stderr what libraries print, also from C++: stdout is only for the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _open_real(spec: str):
    """Pictures, or a file of statistics."""
    from unclip.measure import pictures

    if spec.endswith(".npz") and os.path.isfile(spec) and not pictures.has_pictures(spec):
        return read_statistics(spec)
    return _prepared(pictures.open_pictures(spec))


def _open_fake(names):
    """Pictures and the captions of those that are measured; None where none are needed."""
    from unclip.measure import captions, pictures
    from unclip.measure.table import METRICS

    found = pictures.open_pictures(_FAKE.value)
    texts = None
    if any(METRICS[name].captions for name in names):
        if _CAPTIONS.value:
            texts = captions.match(captions.read_captions(_CAPTIONS.value), found, _CAPTIONS.value)
        else:
            texts = captions.own(found) or _prompts(found)
        texts = texts and texts[: _LIMIT.value]
    return _prepared(found), texts


def _prompts(found):
    """The prompts that `unclip generate` wrote into its PNGs; None where one has none."""
    from unclip.measure import pictures

    if not isinstance(found, pictures.FolderPictures):
        return None
    texts = []
    for i in range(len(found)):
        recipe = images.read_recipe(found.path(i)) if found.name(i).endswith(".png") else None
        prompt = (recipe or {}).get("prompt")
        if not isinstance(prompt, str) or not prompt:
            return None
        texts.append([prompt])
    return texts


def _prepared(found):
    from unclip.measure import pictures

    found = pictures.First(found, _LIMIT.value) if _LIMIT.value else found
    return pictures.Prepared(found, _CROP.value, _FILTER.value) if _CROP.value else found


def _tell(result) -> None:
    """Writes the files and prints, in one process of the job."""
    if _SAVE.value:
        write_statistics(_SAVE.value, result.statistics, result.features)
    if _OUT.value:
        with files.replacing(_OUT.value) as temporary:
            temporary.write_text(result.json() + "\n")
    if _JSON.value:
        print(result.json())
        return
    if result.values or result.warnings:
        print(result.table())
    if _SAVE.value:
        print(
            f"{_SAVE.value}: statistics of {', '.join(result.statistics)}"
            f"{', rows too' if result.features else ''}"
        )
