"""`unclip convert`: other people's weights into a bundle, and a bundle into their layouts.

    unclip convert --from karlo karlo-v1-alpha karlo-v1-alpha-image-variations --out models/karlo
    unclip convert --to diffusers models/karlo --out karlo-diffusers

Both directions are strict: every tensor is used once and every leaf filled, or the differences are
listed and nothing is written. One tensor at a time is in memory.
"""

import math
import pathlib

from absl import flags

from unclip import errors

# As `interop.formats` and `cascade.bundle` have them, which import JAX; a help text need not.
FROM = (
    *("karlo", "kandinsky2_2-prior", "openai-clip", "open-clip", "hf-clip", "inception"),
    *("dinov2", "t5"),
)
TO, DTYPES = ("diffusers", "hf-clip"), ("float32", "bfloat16")

_FROM = flags.DEFINE_string("from", None, f"format of the source: {', '.join(FROM)}")
_TO = flags.DEFINE_string("to", None, f"format to write: {', '.join(TO)}")
_OUT = flags.DEFINE_string("out", None, "the bundle, or with --to the folder, to write")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, "dtype of the bundle's tensors; default: that of the source"
)
_PRESET = flags.DEFINE_string(
    "preset", None, "name of an architecture, for files that do not determine it (ViT-H/14)"
)


def main(argv):
    """Reads the flags and converts."""
    paths = [pathlib.Path(path) for path in argv[1:]]
    if (_FROM.value is None) == (_TO.value is None):
        raise errors.ConfigError("expected either --from FORMAT or --to FORMAT")
    if _OUT.value is None:
        raise errors.ConfigError("expected --out")
    if not paths:
        wanted = f"a {_FROM.value} file or folder" if _FROM.value else "a bundle"
        raise errors.ConfigError(f"expected the path of {wanted}")
    from unclip.cascade import bundle, runs
    from unclip.interop import formats
    from unclip.runtime.sharding import tree_paths

    out = pathlib.Path(_OUT.value)
    if _FROM.value is not None:
        bundle.check_out(out)
        parts = formats.read(_FROM.value, paths, _PRESET.value)
        runs.check_fit(parts)
        meta = {"converted_from": _FROM.value, "sources": [path.name for path in paths]}
        digest = bundle.write(out, parts, meta, dtype=_DTYPE.value)
        print(f"{out}: model {digest}")
        for name, part in parts.items():
            count = sum(math.prod(leaf.shape) for leaf in tree_paths(part.params).values())
            print(f"  {name:<17} {count:>14,} parameters")
        return
    if len(paths) > 1:
        raise errors.ConfigError(f"--to takes one bundle, given {len(paths)}")
    if _DTYPE.value or _PRESET.value:
        raise errors.ConfigError("--dtype and --preset can be given with --from only")
    formats.write(_TO.value, bundle.read(paths[0], lazy=True).parts, out)
    print(f"{out}: {_TO.value} layout")
