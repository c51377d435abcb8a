"""Faults, injected by the thousand: `python tests/faults [--scale 0.02] [NAME …]`.

Every module here breaks something that training reads or keeps, and counts what came of it. Scale 1
has the counts that docs/input.md and docs/reliability.md state; CI runs a fraction. Exits with 1 if
anything went wrong.
"""

import argparse
import importlib
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from table import table

MODULES = (
    "truncation",
    "hostile_tars",
    "mutation",
    "bombs",
    "server",
    "array_records",
    "resume",
    "workers",
    "locks",
    "checkpoints",
    "runs",
)


def main() -> int:
    """Runs the modules named, all by default, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *MODULES], metavar="NAME")
    parser.add_argument("--scale", type=float, default=1.0)
    args = parser.parse_args()
    rows = []
    for name in args.names or MODULES:
        rows += importlib.import_module(name).run(args.scale)
        print(f"{name}: done", file=sys.stderr)
    print(table(rows))
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
