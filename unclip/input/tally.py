"""What a source could not use: counts by reason, a list of the bad samples, and when to give up.

A run must neither stop for one picture that cannot be decoded nor continue silently when most are
broken: each is replaced, counted and named, and too many end the run.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_LISTED = 10_000  # bad samples kept until `drain` is called
_EXAMPLES = 5


class Bad(NamedTuple):
    """A sample that could not be used: the global number it was read for, and the reason."""

    sample: int
    key: str
    shard: str
    reason: str


class Tally:
    """Counts of one process's rows.

    Args:
      max_bad_fraction: of the rows, checked from `min_seen` rows on.
      max_consecutive_bad: rows in a row; 0 for any number.

    Attributes:
      seen: rows without padding; bad: of them, rows with at least one bad sample; substituted: of
        them, rows that hold a replacement.
      problems, filtered: Counters of samples by reason, bad ones and those that filters rejected.
      examples: the first few bad ones, "KEY: REASON, …".
    """

    def __init__(self, *, max_bad_fraction: float, min_seen: int, max_consecutive_bad: int = 0):
        self.max_bad_fraction, self.min_seen = max_bad_fraction, min_seen
        self.max_consecutive_bad = max_consecutive_bad
        self.seen = self.bad = self.substituted = 0
        self.problems, self.filtered = Counter(), Counter()
        self.examples: list[str] = []
        self._consecutive = self._most_consecutive = self._unlisted = 0
        self._listed: list[Bad] = []

    def add(
        self,
        bad_rows: np.ndarray,
        found: Sequence[Bad] = (),
        *,
        filtered: Mapping[str, int] | None = None,
        substituted: int = 0,
    ) -> None:
        """Counts some rows in their order.

        Args:
          bad_rows: bool [n], whether row r met a bad sample; without padding.
          found: every bad sample met, also those tried as replacements.
          filtered: samples rejected by filters, by reason.
          substituted: rows that hold a replacement.
        """
        self.seen += len(bad_rows)
        self.substituted += substituted
        self.filtered.update(filtered or {})
        if not bad_rows.any():
            self._consecutive = 0 if len(bad_rows) else self._consecutive
            return
        self.bad += int(bad_rows.sum())
        for is_bad in bad_rows.tolist():
            self._consecutive = self._consecutive + 1 if is_bad else 0
            self._most_consecutive = max(self._most_consecutive, self._consecutive)
        self.problems.update(bad.reason for bad in found)
        by_row: dict[int, list[Bad]] = {}
        for bad in found:
            by_row.setdefault(bad.sample, []).append(bad)
        for row in list(by_row.values())[: max(0, _EXAMPLES - len(self.examples))]:
            self.examples.append(f"{row[0].key}: {', '.join(bad.reason for bad in row)}")
        room = _LISTED - len(self._listed)
        self._listed += found[:room]
        self._unlisted += len(found[room:])

    def verdict(self) -> str:
        """Why the run should end, or ""."""
        reasons = f"{dict(self.problems)}; e.g. {'; '.join(self.examples)}"
        if 0 < self.max_consecutive_bad < self._most_consecutive:
            return (
                f"{self._most_consecutive} samples in a row are bad, more than "
                f"max_consecutive_bad={self.max_consecutive_bad}: {reasons}"
            )
        if self.seen >= self.min_seen and self.bad > self.max_bad_fraction * self.seen:
            return (
                f"{self.bad} of {self.seen} samples are bad, more than "
                f"max_bad_fraction={self.max_bad_fraction}: {reasons}"
            )
        return ""

    def drain(self) -> list[dict[str, int | str]]:
        """The bad samples since the last call: {"sample", "key", "shard", "reason"} each.

        At most 10,000; a last entry {"unlisted": n} says how many more there were.
        """
        rows = [bad._asdict() for bad in self._listed]
        if self._unlisted:
            rows.append({"unlisted": self._unlisted})
        self._listed, self._unlisted = [], 0
        return rows

    def counters(self) -> dict[str, float]:
        """Counts so far for a run's metrics; what never happened is left out."""
        found = {
            "bad": self.problems.total(),
            "filtered": self.filtered.total(),
            "substituted": self.substituted,
        }
        found |= {f"bad/{reason}": n for reason, n in self.problems.items()}
        found |= {f"filtered/{reason}": n for reason, n in self.filtered.items()}
        return {name: float(n) for name, n in found.items() if n}
