"""`unclip compile`: the exact train step (or sampler) of a config, compiled for absent hardware.

    unclip compile --config configs/decoder.py:paper --topology v5p:4x4x4
    unclip compile --config configs/decoder.py:paper --devices 8

With --topology the TPU compiler of the `libtpu` package compiles for a slice that is only
described, not attached; with --devices XLA's CPU compiler compiles for simulated devices. Only
shapes are used: no parameter is ever allocated. It prints parameters, memory per chip,
floating-point operations, the compiler's estimate of the seconds and the utilisation that follows
from it, collectives, compile time. --quick leaves out code generation, which takes most of the
time, and with it the estimate of the seconds. --top 20 lists the dearest kernels. docs/compile.md
says what each figure counts.
"""

import json
import os

from absl import flags
from ml_collections import config_flags

from unclip import cli, errors

_CONFIG = config_flags.DEFINE_config_file("config", None, "NAME|FILE.py:preset[,argument...]")
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice: v4:2x2x4, v5e:4x4, v5p:4x4x4, …")
_DEVICES = flags.DEFINE_integer("devices", None, "simulated CPU devices instead", lower_bound=1)
_STEP = flags.DEFINE_enum("step", "train", ["train", "sample"], "what is compiled")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object")
_STRICT = flags.DEFINE_bool("strict", False, "exit with 78 when there are problems")
_HBM = flags.DEFINE_float("hbm_gib", None, "memory of a chip, GiB, in place of the chip's own")
_OPTION = flags.DEFINE_multi_string("option", [], "NAME=VALUE given to the compiler; repeatable")
_QUICK = flags.DEFINE_bool("quick", False, "stop before code generation: no estimated seconds")
_TOP = flags.DEFINE_integer("top", 0, "list so many of the dearest kernels", lower_bound=0)
_HLO = flags.DEFINE_string("hlo", None, "file to write the compiled program's text to")


def main(argv):
    """Reads the flags, compiles and prints."""
    if len(argv) > 1:
        raise errors.ConfigError(f"unexpected argument {argv[1]!r}")
    if _CONFIG.value is None:
        raise errors.ConfigError("--config=configs/STAGE.py:PRESET is needed")
    if (_TOPOLOGY.value is None) == (_DEVICES.value is None):
        raise errors.ConfigError("give either --topology (v5p:4x4x4, …) or --devices N")
    if _DEVICES.value:
        cli.refuse_idle({"quick": "only the compiler for TPUs can be stopped early; --topology"})
    cli.refuse_idle({"compilation_cache": "what compiling costs is measured"})
    import jax

    from unclip.runtime import compiled
    from unclip.training.ahead import examine, parse_topology, text, topology_devices

    options = {}
    for option in _OPTION.value:
        name, _, value = option.partition("=")
        options[name] = {"true": True, "false": False}.get(value, value)
    compiled.keep(compiled.OFF)
    jax.config.update("jax_platforms", "cpu")
    if _DEVICES.value:
        jax.config.update("jax_num_cpu_devices", _DEVICES.value)
        devices = jax.devices()
    else:
        devices = topology_devices(parse_topology(_TOPOLOGY.value))
    found = examine(
        _CONFIG.value,
        devices,
        step=_STEP.value,
        hbm=_HBM.value and int(_HBM.value * 2**30),
        options=options,
        hlo_file=_HLO.value,
        quick=_QUICK.value,
        top=_TOP.value,
    )
    print(
        json.dumps({"topology": _TOPOLOGY.value} | found, indent=1) if _JSON.value else text(found),
        flush=True,
    )
    code = errors.ConfigError.exit_code if _STRICT.value and found["problems"] else 0
    if _QUICK.value:  # the compiler still works in its thread, and a normal exit would wait for it
        os._exit(code)
    return code
