"""`unclip export`: gathers trained stages into one bundle that `UnCLIP.load` opens.

    unclip export --clip RUN --prior RUN --decoder RUN --upsampler RUN --upsampler RUN --out DIR
    unclip export --t5 BUNDLE --decoder RUN --out DIR

A RUN is the workdir of `unclip train`, or a bundle that holds that part already. Runs give their
exponential moving average unless `--noema`.
"""

import dataclasses

from absl import flags

from unclip import cli, errors

# As `cascade.bundle` and `cascade.spaces` have them, which import JAX; a help text need not.
DTYPES, FLAG = ("float32", "bfloat16"), "allow_mixed_spaces"

_CLIP = flags.DEFINE_string("clip", None, "RUN or BUNDLE of CLIP")
_PRIOR = flags.DEFINE_string("prior", None, "RUN or BUNDLE of the prior")
_T5 = flags.DEFINE_string(
    "t5", None, "BUNDLE of the T5 that the decoder reads, or the decoder's RUN: the one it had"
)
_DECODER = flags.DEFINE_string("decoder", None, "RUN or BUNDLE of the decoder")
_UPSAMPLERS = flags.DEFINE_multi_string(
    "upsampler", [], "RUN or BUNDLE of an upsampler; once each, in the order they run"
)
_LAST = flags.DEFINE_string(
    "upsampler_last", None, "RUN or BUNDLE of a second net for the first upsampler's last step"
)
_OUT = flags.DEFINE_string("out", None, "folder of the new bundle", required=True)
_EMA = flags.DEFINE_bool("ema", True, "take the moving average of the parameters")
_MIXED = flags.DEFINE_bool(
    FLAG, False, "take stages that were not trained with one another; the bundle says so"
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "dtype of the tensors")


def main(argv):
    """Reads the flags and writes the bundle."""
    if len(argv) > 1:
        raise errors.ConfigError(f"unexpected argument {argv[1]!r}; parts are given by flags")
    from unclip.cascade import bundle, runs, spaces
    from unclip.drawing import modes

    wanted = {"clip": _CLIP.value, "t5": _T5.value, "prior": _PRIOR.value}
    wanted |= {"decoder": _DECODER.value}
    wanted |= {f"upsampler_{i}": path for i, path in enumerate(_UPSAMPLERS.value)}
    wanted |= {"upsampler_0_last": _LAST.value}
    wanted = {name: path for name, path in wanted.items() if path}
    if not wanted:
        raise errors.ConfigError(
            "nothing to export: give --clip, --t5, --prior, --decoder or --upsampler"
        )
    if _LAST.value and "upsampler_0" not in wanted:
        raise errors.ConfigError("--upsampler_last is a net of the first --upsampler, not given")
    if not any(map(runs.is_run, wanted.values())):
        cli.refuse_idle({"ema": "a BUNDLE holds one set of parameters"})
    bundle.check_out(_OUT.value)
    parts = {}
    for name, path in wanted.items():
        part = runs.open_part(path, name, ema=_EMA.value)
        parts[name] = dataclasses.replace(part, kind=name)
        last = f"{name}_last"  # the network of an upsampler's last step comes after it
        if not runs.is_run(path) and last in bundle.describe(path)["parts"]:
            parts[last] = bundle.read_part(path, last)
    runs.check_fit(parts)
    raw = "--noema takes a run's raw CLIP, others are trained with its average. "
    mixed = spaces.check(parts, _MIXED.value, "" if _EMA.value else raw)
    meta = {"sources": {name: str(path) for name, path in wanted.items()}, "ema": _EMA.value}
    meta |= {spaces.RECORD: mixed} if mixed else {}
    digest = bundle.write(_OUT.value, parts, meta, dtype=_DTYPE.value)
    print(f"{_OUT.value}: model {digest}, parts {', '.join(parts)}")
    for line in (*mixed, *(line for part in parts.values() for line in part.mixed_spaces)):
        print(f"  several embedding spaces: {line}")
    for line in spaces.unknown(parts):
        print(f"  what it was trained with is unknown: {line}")
    for mode, lacks in modes.lacking(parts).items():
        print(f"  --mode {mode}: {f'no, it has {lacks}' if lacks else 'yes'}")
