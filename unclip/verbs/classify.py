"""`unclip classify`: which of some labels fits a picture, by CLIP, without training.

    unclip classify --model DIR --labels 'hotdog,"not a hotdog"' --image lunch.jpg
    unclip classify --model DIR --labels cat,dog --image pictures --template "a photo of a {}."

Prints a line a picture, separated by tabs: its name, the likeliest label, then the probability of
every label in the order given. Of a folder whose sub-folders are named by labels also how often the
likeliest label is the right one.
"""

import pathlib
import sys
import warnings

from absl import flags

from unclip import errors

_MODEL = flags.DEFINE_string("model", None, "bundle folder with a CLIP", required=True)
_LABELS = flags.DEFINE_list(
    "labels", None, 'labels between commas, in quotes where they hold one: a,"b, c"', required=True
)
_IMAGE = flags.DEFINE_multi_string(
    "image", [], "picture file, folder of pictures or shards; repeat the flag for several"
)
_TEMPLATE = flags.DEFINE_multi_string(
    "template",
    ["plain"],
    "text with {} for the label, or plain ({} alone), photo (a photo of a {}.), openai7; repeated, "
    "a label is the mean of all",
)
_BATCH = flags.DEFINE_integer("batch_size", 32, "pictures embedded at once", lower_bound=1)


def main(argv):
    """Reads the flags, prints a line a picture."""
    if len(argv) > 1:
        raise errors.ConfigError(f"unexpected argument {argv[1]!r}; a picture goes into --image")
    if not _IMAGE.value:
        raise errors.ConfigError("expected --image, a picture, a folder of pictures or shards")

    from unclip import UnCLIP
    from unclip.drawing import zero_shot
    from unclip.measure.pictures import EXTENSIONS, open_pictures

    warnings.showwarning = lambda message, *_, **__: print(
        f"unclip classify: {message}", file=sys.stderr
    )
    labels = zero_shot.checked_labels(_LABELS.value)
    templates = zero_shot.checked_templates(_TEMPLATE.value)
    file = lambda given: pathlib.Path(given).suffix.lower() in EXTENSIONS
    single = [given for given in _IMAGE.value if file(given) and not pathlib.Path(given).is_dir()]
    sets = [open_pictures(given) for given in _IMAGE.value if given not in single]
    model = UnCLIP.load(_MODEL.value, batch_size=_BATCH.value)
    print("\t".join(["picture", "label", *labels]))
    for pictures in [*([single] if single else []), *sets]:
        found = model.classify(pictures, labels, templates=templates)
        for name, best, row in zip(found.names, found.best, found.probabilities):
            print("\t".join([name, best, *(f"{p:.4f}" for p in row)]))
        if pictures is not single:
            _accuracy(*zero_shot.accuracy(found))


def _accuracy(counts: dict, others: int) -> None:
    if not counts:
        return
    right, count = (sum(column) for column in zip(*counts.values()))
    print(f"accuracy {right / count:.4f}: {right} of {count}")
    for label, (own, all_of) in counts.items():
        print(f"  {label}: {own} of {all_of}")
    if others:
        print(f"  {others} pictures are in no folder named by a label")
