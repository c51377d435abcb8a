"""`unclip doctor --config FILE.py:preset`: describes a run before it starts.

Prints devices and mesh, parameters by part, memory per device by kind, the data found, free disk,
and problems in plain words. Nothing is allocated: only shapes are traced, so a paper-size stage can
be examined on a laptop. `--json` prints the same as one object.
"""

import json

from absl import flags
from ml_collections import config_flags

from unclip import cli, errors

_CONFIG = config_flags.DEFINE_config_file("config", None, "NAME|FILE.py:preset[,argument...]")
_WORKDIR = flags.DEFINE_string("workdir", "runs", "where the run would write")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object")
_STRICT = flags.DEFINE_bool("strict", False, "exit with 78 when there are problems")
_LEAVES = flags.DEFINE_bool("leaves", False, "also list every parameter with its sharding")


def main(argv):
    """Reads the flags and prints what was found."""
    if len(argv) > 1:
        raise errors.ConfigError(f"unexpected argument {argv[1]!r}")
    if _CONFIG.value is None:
        raise errors.ConfigError("--config=configs/STAGE.py:PRESET is needed")
    if _JSON.value:
        cli.refuse_idle({"leaves": "--json holds every parameter in any case"})
    from unclip.training.checkup import examine, text

    found = examine(_CONFIG.value, _WORKDIR.value)
    print(json.dumps(found, indent=1) if _JSON.value else text(found, leaves=_LEAVES.value))
    return errors.ConfigError.exit_code if _STRICT.value and found["problems"] else 0
