"""How contenders take turns, and what is refused before any of them is made."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_both_take_turns_after_a_first_call_each():
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from benchmarks import peers

    called, work = [], iter(range(1, 9))

    def ours():
        called.append("ours")
        sum(range(10_000))

    def theirs():
        called.append("theirs")
        sum(range(10_000 * (40 if next(work) > 1 else 400)))

    (cpu, clock), (other_cpu, other_clock) = peers.by_turns((ours, theirs), turns=3)
    assert called == ["ours", "theirs"] * 4
    assert 10 < other_cpu / cpu < 200  # the first call, far dearer, does not count
    assert 0 < cpu <= clock * 1.5 and 0 < other_cpu <= other_clock * 1.5


def test_all_that_is_wrong_is_told_at_once():
    command = [sys.executable, "benchmarks/peers.py", "--turns", "0", "--short", "--out", "x.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 78 and not done.stdout
    [line] = done.stderr.splitlines()
    assert "--turns is 0, expected 1 or more" in line and "--short" in line and "--out" in line
