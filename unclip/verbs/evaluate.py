"""`unclip evaluate`: draws pictures over a sweep of settings and models, and scores them.

    unclip evaluate --config configs/evaluate.py:emoji --config.model=DIR --workdir runs/eval

A cell is one setting of every axis of the sweep. Run again, the command skips finished cells and
draws a cell again that a killed job did not finish. Several jobs may share a workdir, as a SLURM
array does. Writes cells/ID.json, results.jsonl, results.csv and report.html.
"""

import os
import pathlib

from absl import flags
from ml_collections import config_flags

from unclip import cli, errors
from unclip.files import paths

_CONFIG = config_flags.DEFINE_config_file("config", None, "NAME|FILE.py:preset[,argument...]")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the evaluation; the same one resumes it")
_INDEX = flags.DEFINE_integer(
    "array_index", None, "which job of an array this is, from 0; default from SLURM", lower_bound=0
)
_COUNT = flags.DEFINE_integer(
    "array_count", None, "how many jobs the array has; default from SLURM", lower_bound=1
)
_FOLLOW = flags.DEFINE_string("follow", None, "RUN in training: score its checkpoints as they come")
_TIMEOUT = flags.DEFINE_float(
    "follow_timeout",
    3600.0,
    "seconds without a new checkpoint after which --follow ends",
    lower_bound=0.0,
)
_DRY = flags.DEFINE_bool("dry_run", False, "list the cells and which are finished, draw nothing")
_REPORT = flags.DEFINE_bool("report_only", False, "write the results of the finished cells again")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT, for processes started by hand")
_PROCESSES = flags.DEFINE_integer("process_count", None, "how many processes, started by hand")
_PROCESS = flags.DEFINE_integer("process_id", None, "which process this is, started by hand")


def main(argv):
    """Reads the flags and evaluates."""
    if len(argv) > 1:
        raise errors.ConfigError(f"unexpected argument {argv[1]!r}")
    if not _WORKDIR.value:
        raise errors.ConfigError("--workdir=FOLDER is needed")
    if _CONFIG.value is None:
        raise errors.ConfigError("--config=configs/evaluate.py:PRESET is needed")
    config = paths.expanded(_CONFIG.value.to_dict())
    if config.get("stage") != "evaluate":
        raise errors.ConfigError("--config: expected configs/evaluate.py:PRESET, or one like it")

    if not _FOLLOW.value:
        cli.refuse_idle({"follow_timeout": "it ends --follow, which is not given"})
    if _REPORT.value:
        nothing = "--report_only draws nothing"
        cli.refuse_idle(dict.fromkeys(("dry_run", "follow"), nothing))
    elif _FOLLOW.value:
        cli.refuse_idle({"dry_run": "--follow draws what is still to come"})

    from unclip.sweep import plan, report

    index, count = plan.array_job(os.environ, _INDEX.value, _COUNT.value)
    if _FOLLOW.value and count > 1:
        raise errors.ConfigError("--follow scores checkpoints in order and cannot be an array job")

    if _REPORT.value:
        print(report.write(_WORKDIR.value, config))
        return

    from unclip.runtime import compiled, distributed
    from unclip.sweep import drawing, follow

    def finish():
        if any(
            pathlib.Path(_WORKDIR.value, "cells").glob("*.json")
        ):  # other jobs may have done them
            return report.write(_WORKDIR.value, config)
        return "no cell is finished yet"

    if config["compilation_cache"]:
        compiled.keep_at(config["compilation_cache"])
    distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    if _FOLLOW.value:
        follow.follow(config, _WORKDIR.value, _FOLLOW.value, _TIMEOUT.value, finish)
    else:
        runner = drawing.Runner(config, _WORKDIR.value)
        cells = plan.share(runner.cells(), index, count)
        if _DRY.value:
            states = {cell.id: runner.status(cell) for cell in cells}
            print("\n".join(f"{state:8}  {name}" for name, state in states.items()))
            finished = sum(state == "finished" for state in states.values())
            print(f"{finished} of {len(cells)} cells finished, {runner.total} pictures a cell")
            return
        runner.run(cells)
    outcome = finish()
    if distributed.is_main():
        print(outcome)
