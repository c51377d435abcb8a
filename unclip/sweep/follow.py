"""Scores the checkpoints of a training while it runs: metrics over steps.

A run deletes a checkpoint when there are `keep` newer ones. One that was deleted before it could be
loaded is left out with a message.
"""

import pathlib
import time
from collections.abc import Callable, Mapping

from unclip import errors
from unclip.cascade import runs
from unclip.runtime import checkpoint, collectives, distributed
from unclip.sweep import plan
from unclip.sweep.drawing import Runner, announce

POLL_S = 5.0


def followed_part(config: Mapping, run: str) -> str:
    """The part of the sweep's models that a RUN trains.

    Raises:
      ConfigError: no model uses that run.
    """
    same = lambda path: pathlib.Path(path).resolve() == pathlib.Path(run).resolve()
    for source in plan.sources(config):
        for part, path in source.paths.items():
            if same(path):
                return part
    stage = runs.run_config(run)["stage"]
    raise errors.ConfigError(
        f"--follow {run}: no model of the sweep has that run; name it, e.g. "
        f"--config.{stage if stage in config else f'{stage}s'}={run}"
    )


def follow(
    config: Mapping,
    workdir: str,
    run: str,
    timeout_s: float,
    finish: Callable[[], None],
    poll_s: float = POLL_S,
) -> list[int]:
    """Runs the sweep on every checkpoint of a RUN as it appears, oldest first.

    Ends at the run's `total_steps`, or after `timeout_s` seconds without a new checkpoint.

    Args:
      config: as for `Runner`; its axis "step" is set here.
      finish: called after each checkpoint, to write the results.

    Returns:
      The steps scored, now or earlier.

    Raises:
      Stopped: asked to stop; the same command continues.
    """
    runner, seen, scored = None, set(), []
    if not checkpoint.steps(pathlib.Path(run) / "checkpoints"):
        announce(f"{run} has no checkpoint yet: waiting for the first, {timeout_s:g} s at most")
    since = time.monotonic()
    while True:
        # One process looks for checkpoints, so that all see the same ones.
        there = checkpoint.steps(pathlib.Path(run) / "checkpoints")
        new = [step for step in there if step not in seen]
        step = collectives.from_main(new[0] if new else plan.NEWEST)
        if step != plan.NEWEST:
            seen.add(step)
            if runner is None:
                config = dict(config) | {"step_of": followed_part(config, run)}
                runner = Runner(config, workdir)
            runner.config = config | {"sweep": dict(config["sweep"]) | {"step": (step,)}}
            if _scored(runner, run, step):
                scored.append(step)
            finish()
            since = time.monotonic()
            if collectives.from_main(int(step >= int(runs.run_config(run).get("total_steps", 0)))):
                return scored
        elif collectives.from_main(int(time.monotonic() - since > timeout_s)):
            latest = f"the latest is step {max(seen)}" if seen else "there is none yet"
            announce(f"no new checkpoint of {run} for {timeout_s:g} s ({latest}): done here")
            return scored
        else:
            if distributed.should_stop():
                raise errors.Stopped("asked to stop; the same command continues following")
            time.sleep(poll_s)


def _scored(runner: Runner, run: str, step: int) -> bool:
    try:
        runner.run(runner.cells())
    except errors.DataError as error:
        if step in checkpoint.steps(pathlib.Path(run) / "checkpoints"):
            raise
        announce(f"step {step} of {run} was deleted before it was loaded ({error.message})")
        return False
    return True
