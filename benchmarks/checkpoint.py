"""What keeping a run costs: saving and restoring beside the disk itself, and steps during a save.

    python benchmarks/checkpoint.py --gib 1 --out benchmarks/results/checkpoint.json

The disk's own speed is that of plain files of the same size: written and synced, and read again
after their pages were dropped. A restore compares checksums and reads every byte onto the device;
a save is over when its checksums are on disk. The delay is how much longer a step takes while a
save runs behind it: on a CPU, which computes both, much longer than on an accelerator.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import record
from unclip.runtime import checkpoint

GIB = 1 << 30
LEAF = 64 << 20  # bytes of an array, and of a plain file


def dropped(folder: pathlib.Path) -> None:
    """Has the pages of a folder's files leave memory, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            number = os.open(path, os.O_RDONLY)
            os.fsync(number)
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(number)


def timed(function, *args) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def write_plain(folder: pathlib.Path, state: dict) -> None:
    """The state's bytes as plain files, synced."""
    folder.mkdir()
    for name, leaf in state.items():
        with open(folder / name, "wb") as file:
            file.write(np.asarray(leaf).data)
            file.flush()
            os.fsync(file.fileno())


def read_plain(folder: pathlib.Path) -> None:
    """Every byte of the files."""
    buffer = bytearray(4 << 20)
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def steps_during(
    saver: checkpoint.Checkpointer, state: dict, seconds: float
) -> tuple[float, float]:
    """Median seconds of a step without a save and while one runs."""
    size = 256
    x = jnp.ones((size, size))
    step = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x), x))
    run = lambda loops: step(x, loops).block_until_ready()
    run(1)
    loops = 1
    while timed(run, loops) < seconds:
        loops *= 2
    once = lambda: timed(run, loops)
    alone = statistics.median(once() for _ in range(5))
    saver.save(1000, state, 0, force=True)
    during = []
    while saver.saving:
        during.append(once())
    saver.wait()
    return alone, statistics.median(during or [once()])


def main() -> None:
    """Measures and prints; --out keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="on the disk to measure; default: the temporary one")
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args()
    count = max(1, round(args.gib * GIB / LEAF))
    leaf = lambda k: jax.random.normal(jax.random.key(k), (LEAF // 4,))
    state = {f"leaf{k}": leaf(k) for k in range(count)}
    size = count * LEAF
    shapes = jax.eval_shape(lambda: state)
    found = {name: [] for name in ("write", "read", "save", "restore")}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = pathlib.Path(name)
        for number in range(args.rounds):
            plain, kept = folder / f"plain{number}", folder / f"kept{number}"
            found["write"].append(size / timed(write_plain, plain, state))
            dropped(plain)
            found["read"].append(size / timed(read_plain, plain))
            with checkpoint.Checkpointer(kept) as saver:

                def save():
                    saver.save(1, state, 0, force=True)
                    saver.wait()

                found["save"].append(size / timed(save))
                dropped(kept)
                found["restore"].append(size / timed(saver.restore, 1, shapes))
                if number == args.rounds - 1:
                    alone, during = steps_during(saver, state, 0.5)
    rate = {name: statistics.median(values) for name, values in found.items()}
    what = f"a state of {size / GIB:g} GiB"
    figures = [
        record.figure(f"{what} saved", rate["save"] / GIB, "GiB/s"),
        record.figure(f"{what} saved", rate["save"] / rate["write"], "×", "plain files"),
        record.figure(f"{what} restored", rate["restore"] / GIB, "GiB/s"),
        record.figure(f"{what} restored", rate["restore"] / rate["read"], "×", "plain files"),
        record.figure(
            f"{what}: a step of {alone:.2f} s during its save", during / alone, "×", "alone"
        ),
    ]
    for one in figures:
        print(f"{one['figure']}: {one['value']:.3g} {one['unit']} {one['against'] or ''}")
    if args.out:
        record.write(args.out, figures, device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
