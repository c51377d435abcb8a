"""Jobs that run side by side as children, each lane on its share of the processors.

A small network uses one core better than two, so a small cascade, whose stages hardly depend on one
another, trains in lanes. Used by the demo and the ablation.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence
from typing import NamedTuple

import psutil

ROOT = pathlib.Path(__file__).parents[1]


class Job(NamedTuple):
    """A child of a lane: `unclip` with these arguments.

    Attributes:
      name: of its log; other jobs give it in `after`.
      command: arguments of `unclip`.
      after: names of jobs, also of other lanes, that must have ended first.
    """

    name: str
    command: list[str]
    after: tuple[str, ...] = ()


def training_jobs(
    out: pathlib.Path,
    lanes: Sequence[Sequence[tuple[str, str, int, Sequence[str]]]],
    scale: float,
    *,
    warmup: int,
    options: Sequence[str] = (),
) -> list[list[Job]]:
    """`unclip train` of every (folder, config, steps, flags) of some lanes.

    Priors and decoders read the run in the folder "clip", and wait for it.

    Args:
      out: holds the folders; scale: multiplies steps, but never to less than two.
      warmup: steps of warm-up, at most a quarter of all; options: flags of every job.
    """
    found = []
    for lane in lanes:
        found.append([])
        for name, config, steps, flags in lane:
            steps = max(2, round(steps * scale))
            command = ["train", f"--config=configs/{config}", f"--workdir={out / name}"]
            command += [f"--config.total_steps={steps}"]
            command += [f"--config.optim.warmup_steps={min(warmup, steps // 4)}"]
            after = ("clip",) if config.startswith(("prior", "decoder")) else ()
            command += [f"--config.clip={out / 'clip'}" for _ in after]
            found[-1].append(Job(name, [*command, *options, *flags], after))
    return found


class Lanes:
    """Runs jobs and records what they used.

    Args:
      out: folder; logs go to its `logs`.
      split: each lane has its own share of the processors; False: all lanes share all.

    Attributes:
      commands: every command that was run; peak: resident bytes of all processes together.
    """

    def __init__(self, out: pathlib.Path, *, split: bool = True):
        self.out, self.split = out, split
        self.commands: list[list[str]] = []
        self.peak = 0
        self.started = time.monotonic()
        self._status: dict[str, str] = {}
        self._ended: dict[str, threading.Event] = {}
        self._failed = threading.Event()
        self._code = 0

    def run(self, lanes: Sequence[Collection[Job]]) -> None:
        """Every lane's jobs one after another; SystemExit with the first failing job's code."""
        names = [job.name for lane in lanes for job in lane]
        self._ended = {name: threading.Event() for name in names}
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // len(lanes))
        threads = []
        for number, lane in enumerate(lanes):
            own = cores[number * share : (number + 1) * share] if self.split else cores
            threads.append(threading.Thread(target=self._lane, args=(lane, own or cores)))
        for thread in threads:
            thread.start()
        printed = 0.0
        while any(thread.is_alive() for thread in threads):
            self.measure()
            if time.monotonic() - printed > (1 if sys.stderr.isatty() else 15):
                printed = time.monotonic()
                self._print_status()
            time.sleep(0.5)
        if sys.stderr.isatty():
            print(file=sys.stderr)
        if self._failed.is_set():
            raise SystemExit(self._code)

    def _print_status(self) -> None:
        minutes, seconds = divmod(round(time.monotonic() - self.started), 60)
        line = f"[{minutes}:{seconds:02}] " + " | ".join(self._status.values())
        end = "\r" if sys.stderr.isatty() else "\n"
        print(line[: shutil.get_terminal_size((160, 24)).columns - 1], end=end, file=sys.stderr)

    def _lane(self, jobs: Collection[Job], cores: list[int]) -> None:
        for job in jobs:
            for name in job.after:
                self._ended[name].wait()
            if not self._failed.is_set():
                code = self._child(job, cores)
                if code and not self._failed.is_set():
                    self._code = code
                    self._failed.set()
                    log = (self.out / "logs" / f"{job.name}.log").read_text().splitlines()
                    message = f"\n{job.name} failed with exit code {code}:"
                    print(message, *log[-5:], sep="\n", file=sys.stderr)
            self._ended[job.name].set()

    def _child(self, job: Job, cores: list[int]) -> int:
        self.commands.append(["unclip", *job.command])
        log = self.out / "logs" / f"{job.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file:
            child = subprocess.Popen(
                [sys.executable, "-m", "unclip", *job.command],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
            os.sched_setaffinity(child.pid, cores)
            while child.poll() is None:
                lines = log.read_text(errors="replace").splitlines()
                self._status[job.name] = lines[-1] if lines else f"{job.name}: starting"
                time.sleep(1)
        self._status.pop(job.name, None)
        return child.returncode

    def measure(self) -> None:
        """Records the resident memory of this process and its children, bytes."""
        total = 0
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue  # ended meanwhile
        self.peak = max(self.peak, total)
