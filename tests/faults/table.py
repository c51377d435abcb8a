"""One line per fault: what was injected, and the outcome."""

from typing import NamedTuple


class Row(NamedTuple):
    """A fault and its counts.

    Attributes:
      fault: what was done, in words.
      tried: how often.
      good: of them, read as if nothing had been done (or after retrying).
      refused: of them, recognised, named and counted.
      wrong: of them, neither: a crash, a hang, a wrong count, a picture with another's caption.
      seconds: it took.
      note: what else was measured, such as memory.
    """

    fault: str
    tried: int
    good: int
    refused: int
    wrong: int
    seconds: float
    note: str = ""


def table(rows: list[Row]) -> str:
    """The rows as text, right-aligned counts."""
    lines = [("fault", "tried", "good", "refused", "wrong", "seconds", "note")]
    lines += [
        (
            r.fault,
            f"{r.tried:,}",
            f"{r.good:,}",
            f"{r.refused:,}",
            f"{r.wrong:,}",
            f"{r.seconds:.1f}",
            r.note,
        )
        for r in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    return "\n".join(
        f"{line[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(line[1:6], widths[1:]))
        + f"  {line[6]}".rstrip()
        for line in lines
    )
