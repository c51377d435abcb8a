"""`unclip search`: the pictures of a folder or of shards that fit a caption best, by CLIP.

    unclip search --model DIR --folder pictures --prompt "a red fox" --n 10
    unclip search --model DIR --folder 'shards/*.tar' --prompt "a red fox" --sheet found.png

Prints a line a picture, the best first: the cosine of its embedding and the caption's, a tab, its
name. Every picture is embedded anew at each call.
"""

import sys
import warnings

from absl import flags

from unclip import errors

_MODEL = flags.DEFINE_string("model", None, "bundle folder with a CLIP", required=True)
_FOLDER = flags.DEFINE_string(
    "folder", None, "folder of pictures, shards, or tfds:NAME:SPLIT", required=True
)
_PROMPT = flags.DEFINE_string("prompt", None, "the caption", required=True)
_N = flags.DEFINE_integer("n", 10, "pictures to name; 0 for all", lower_bound=0)
_SHEET = flags.DEFINE_string("sheet", None, "also write the pictures found as one .png")
_BATCH = flags.DEFINE_integer("batch_size", 32, "pictures embedded at once", lower_bound=1)


def main(argv):
    """Reads the flags, prints a line a picture."""
    if len(argv) > 1:
        raise errors.ConfigError(f"unexpected argument {argv[1]!r}; pictures go into --folder")
    if not _PROMPT.value.strip():
        raise errors.ConfigError("--prompt is empty")
    if _SHEET.value is not None and not _SHEET.value.lower().endswith(".png"):
        raise errors.ConfigError(f"--sheet {_SHEET.value}: expected a name that ends in .png")

    from unclip import UnCLIP
    from unclip.files import images
    from unclip.measure.pictures import open_pictures

    warnings.showwarning = lambda message, *_, **__: print(
        f"unclip search: {message}", file=sys.stderr
    )
    pictures = open_pictures(_FOLDER.value)
    model = UnCLIP.load(_MODEL.value, batch_size=_BATCH.value)
    found = model.search(pictures, _PROMPT.value, _N.value or None)
    for one in found:
        print(f"{one.score:.4f}\t{one.name}")
    if _SHEET.value is not None:
        labels = [f"{one.score:.3f} {one.name}" for one in found]
        sheet = images.contact_sheet([pictures.read(one.number) for one in found], labels)
        images.write_png(_SHEET.value, sheet)
