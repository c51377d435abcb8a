"""What is drawn of a cell that is not finished, so that a killed job goes on with it.

Beside a cell's pictures every process keeps `drawn-P.jsonl`: a first line that says of what, then
a line a batch with the SHA-256 of each picture's file. A picture that is not listed, or is other
than listed, is drawn again.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

PICTURES = "pictures"


class Drawn:
    """The pictures of a cell's folder that can be kept.

    Args:
      folder: of the cell.
      head: everything that decides the pictures' bits, JSON-able; what was drawn with another one
        is not kept.

    Attributes:
      names: of the pictures that are there; warnings: that drawing them gave, in order.
    """

    def __init__(self, folder: pathlib.Path, head: Mapping[str, Any]):
        self.folder, self._head = folder, json.dumps(head, sort_keys=True)
        self._sums: dict[str, str] = {}
        self.warnings: dict[str, None] = {}
        for path in sorted(folder.glob("drawn-*.jsonl")):
            first, *lines = path.read_text(encoding="utf-8").split("\n")
            if first != self._head:
                continue
            for line in lines:
                try:
                    found = json.loads(line)
                    self._sums |= found["pictures"]
                    self.warnings |= dict.fromkeys(found["warnings"])
                except (ValueError, KeyError, TypeError):  # cut off by the kill
                    continue

    @property
    def names(self) -> set[str]:
        """The listed pictures whose file is there; whether it is whole, `clear` has looked."""
        there = self.folder / PICTURES
        found = {path.name for path in there.iterdir()} if there.is_dir() else set()
        return found & self._sums.keys()

    def clear(self) -> int:
        """Removes the pictures that cannot be kept; gives the number of the others."""
        there = self.folder / PICTURES
        kept = 0
        for path in there.iterdir() if there.is_dir() else ():
            if self._sums.get(path.name) == _sum(path):
                kept += 1
            else:
                path.unlink()
        if not kept:
            self.forget()
        return kept

    def forget(self) -> None:
        """Removes the lists."""
        for path in self.folder.glob("drawn-*.jsonl"):
            path.unlink(missing_ok=True)

    def add(self, process: int, names: Iterable[str], warnings: Iterable[str]) -> None:
        """Lists pictures whose files are written, as process number `process`."""
        path = self.folder / f"drawn-{process:05d}.jsonl"
        begun = path.exists() and path.read_bytes()[: len(self._head)] == self._head.encode()
        sums = {name: _sum(self.folder / PICTURES / name) for name in names}
        line = json.dumps({"pictures": sums, "warnings": list(warnings)})
        with path.open("a" if begun else "w", encoding="utf-8") as file:
            # On a line of its own, even after one that a kill has cut off.
            file.write(f"\n{line}" if begun else f"{self._head}\n{line}")


def _sum(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
