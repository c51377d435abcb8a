"""`unclip train`: the one training loop, for CLIP, the priors, the decoder and the upsamplers.

    unclip train --config configs/decoder.py:emoji --config.clip=runs/clip --workdir runs/decoder

The workdir holds config.json, checkpoints/, metrics.jsonl, TensorBoard events and samples/. The
same command resumes: parameters, moments, moving average and data position are restored, and the
run ends with the same bits as one that was never interrupted.
"""

import os

from absl import flags
from ml_collections import config_flags

from unclip import errors

_CONFIG = config_flags.DEFINE_config_file("config", None, "NAME|FILE.py:preset[,argument...]")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; the same folder resumes it")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT, for processes started by hand")
_PROCESSES = flags.DEFINE_integer("process_count", None, "how many processes, started by hand")
_PROCESS = flags.DEFINE_integer("process_id", None, "which process this is, started by hand")


def main(argv):
    """Reads the flags and trains."""
    if len(argv) > 1:
        raise errors.ConfigError(f"unexpected argument {argv[1]!r}")
    if _CONFIG.value is None:
        raise errors.ConfigError("--config=configs/STAGE.py:PRESET is needed")
    if not _WORKDIR.value:
        raise errors.ConfigError("--workdir=FOLDER is needed")
    from unclip.runtime import distributed
    from unclip.training.start import train

    os.environ.setdefault("WDS_SECURE", "1")
    distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    train(_CONFIG.value, _WORKDIR.value)
