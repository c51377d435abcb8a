"""How far a long loop is: a bar on a terminal, plain lines in a log file, silence elsewhere.

Used by every verb that takes more than seconds.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import tqdm


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Counts units of work. Iterate it, or call `update`; close it, or use it in `with`."""

    def __init__(
        self,
        iterable: Iterable | None,
        total: int | None,
        description: str,
        unit: str,
        initial: int,
        interval: float,
        stream: TextIO,
    ):
        self._iterable, self._total, self._unit = iterable, total, unit
        self._description, self._interval, self._stream = description, interval, stream
        self._initial = self.count = initial
        self._start = self._said = time.monotonic()
        from unclip.runtime import distributed  # JAX, which a help text need not import

        self._shown = distributed.is_main()
        self._bar = None
        if self._shown and stream.isatty():
            self._bar = tqdm.tqdm(
                total=total,
                desc=description or None,
                unit=unit,
                initial=initial,
                file=stream,
                dynamic_ncols=True,
            )

    def update(self, count: int = 1, **notes: Any) -> None:
        """Adds finished units; `notes` (e.g. loss="0.123") are shown beside the count."""
        self.count += count
        if self._bar is not None:
            if notes:
                self._bar.set_postfix(notes, refresh=False)
            self._bar.update(count)
        elif self._shown and time.monotonic() - self._said >= self._interval:
            self._say(notes)

    def _say(self, notes: dict[str, Any]) -> None:
        now = time.monotonic()
        self._said = now
        done, seconds = self.count - self._initial, max(now - self._start, 1e-9)
        line = f"{self._description or 'progress'}: {self.count}"
        line += f"/{self._total} {self._unit}" if self._total else f" {self._unit}"
        line += f", {done / seconds:.3g} {self._unit}/s"
        if self._total and done > 0 and self.count < self._total:
            line += f", {_clock((self._total - self.count) * seconds / done)} left"
        else:
            line += f", {_clock(seconds)}"
        line += "".join(f", {name} {value}" for name, value in notes.items())
        print(line, file=self._stream, flush=True)

    def __iter__(self) -> Iterator:
        try:
            for item in self._iterable if self._iterable is not None else ():
                yield item
                self.update()
        finally:
            self.close()

    def close(self) -> None:
        """Ends the bar or prints the last line; safe to call twice."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._shown:
            self._say({})
        self._shown = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def progress(
    work: Iterable | int | None,
    description: str = "",
    unit: str = "step",
    *,
    initial: int = 0,
    interval: float = 10.0,
    stream: TextIO | None = None,
) -> Progress:
    """Progress with rate and time left, on process 0 only.

    Args:
      work: an iterable to wrap, or how many units there are, or None if that is unknown.
      description: what is being done.
      unit: what is counted.
      initial: units done before, e.g. the step a run resumes from; not counted in the rate.
      interval: seconds between lines where the stream is not a terminal.
      stream: default standard error.
    """
    iterable = None if work is None or isinstance(work, int) else work
    if iterable is None:
        total = work
    else:
        total = len(iterable) if hasattr(iterable, "__len__") else None
    return Progress(iterable, total, description, unit, initial, interval, stream or sys.stderr)
