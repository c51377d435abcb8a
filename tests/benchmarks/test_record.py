"""What benchmarks keep, and the table that is made of it."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def record():
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from benchmarks import record

    return record


FILES = {
    "b.json": {
        "command": "python benchmarks/stages.py --batch 2",
        "machine": {
            "cpu": "Big CPU",
            "cores": 16,
            "device": "NVIDIA H100 80GB HBM3",
            "python": "3.12.1",
            "jax": "0.10.2",
        },
        "figures": [
            {"figure": "prior: a step", "value": 0.01234, "unit": "s", "against": None},
            {"figure": "prior: of the peak", "value": 0.4, "unit": "", "against": "bf16 peak"},
        ],
    },
    "a.json": {
        "command": "python benchmarks/index.py --shards '/data/a|b'",
        "machine": {
            "cpu": "Small CPU",
            "cores": 1,
            "device": None,
            "python": "3.11.7",
            "jax": "0.11.0",
        },
        "figures": [
            {"figure": "look-ups", "value": 154319.5, "unit": "/s", "against": None},
            {"figure": "walk", "value": 2.333, "unit": "×", "against": "webdataset"},
        ],
    },
}
TABLE = """\
| figure | value | against | machine | command |
|---|---|---|---|---|
| look-ups | 154,320 /s | – | Small CPU, 1 core, Python 3.11.7 | `python benchmarks/index.py --shards '/data/a/b'` |
| walk | 2.33 × | webdataset | Small CPU, 1 core, Python 3.11.7 | `python benchmarks/index.py --shards '/data/a/b'` |
| prior: a step | 0.0123 s | – | NVIDIA H100 80GB HBM3, Big CPU, 16 cores, Python 3.12.1, JAX 0.10.2 | `python benchmarks/stages.py --batch 2` |
| prior: of the peak | 0.4 | bf16 peak | NVIDIA H100 80GB HBM3, Big CPU, 16 cores, Python 3.12.1, JAX 0.10.2 | `python benchmarks/stages.py --batch 2` |"""  # noqa: E501


def test_table_of_two_files(record, tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert record.table(record.read(tmp_path)) == TABLE


def test_only_what_is_between_the_marks_changes(record):
    text = f"above\n{record.BEGIN}\nold\n{record.END}\nbelow\n"
    once = record.page(text, [FILES["a.json"]])
    assert once.startswith(f"above\n{record.BEGIN}\n\n| figure |")
    assert once.endswith(f"\n\n{record.END}\nbelow\n") and "old" not in once
    assert record.page(once, [FILES["a.json"]]) == once


@pytest.mark.parametrize(
    "text", ["", "{BEGIN}", "{END} {BEGIN}", "{BEGIN} {BEGIN} {END}", "{BEGIN} {END} {END}"]
)
def test_a_page_without_its_marks_is_refused(record, text):
    with pytest.raises(SystemExit):
        record.page(text.format(BEGIN=record.BEGIN, END=record.END), [])


def test_the_page_is_up_to_date(record):
    text = record.PAGE.read_text("utf-8")
    assert record.page(text, record.read()) == text, "run: python benchmarks/record.py"


def test_the_kept_results_say_command_and_machine(record):
    assert record.read()
    for found in record.read():
        check(found)
        script = found["command"].split()[1]
        assert (ROOT / script).is_file()


def check(found):
    """The form of a file that a benchmark wrote."""
    assert set(found) == {"command", "machine", "figures"}
    assert set(found["machine"]) == {"cpu", "cores", "device", "python", "jax"}
    assert found["machine"]["cpu"] and found["machine"]["cores"] >= 1
    assert found["figures"]
    for row in found["figures"]:
        assert set(row) == {"figure", "value", "unit", "against"}
        assert isinstance(row["value"], int | float) and row["figure"]


def test_a_benchmark_writes_command_and_machine(tmp_path):
    """compile_table.py compiles nothing with --table: it reads the cells that are there."""
    cell = {
        "topology": "v5p:4x4x4",
        "rows": 4096,
        "accumulate": 1,
        "trained_parameters": 1_330_000_000,
        "memory_per_chip": {"arguments": 2**28, "temporaries": 3 * 2**30},
        "fits": True,
        "flops": {"model": 9.49e15},
        "estimated_seconds": None,
        "utilisation": None,
        "collectives": {},
        "communication_seconds": None,
        "compile_seconds": {"wall": 1.0, "cpu": 1.0},
    }
    (tmp_path / "diffusion-prior_v5p.json").write_text(json.dumps(cell))
    (tmp_path / "AR-prior_v5p.json").write_text(
        json.dumps(cell | {"estimated_seconds": 1.17, "utilisation": 0.29})
    )
    script = ROOT / "benchmarks" / "compile_table.py"
    arguments = ["--table", "--out", str(tmp_path), "--record", str(tmp_path / "new" / "kept.json")]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("v5p:4x4x4") == 2
    found = json.loads((tmp_path / "new" / "kept.json").read_text())
    check(found)
    assert found["command"] == f"python benchmarks/compile_table.py {' '.join(arguments)}"
    values = {row["figure"].split(": ")[0]: [] for row in found["figures"]}
    for row in found["figures"]:
        values[row["figure"].split(": ")[0]].append((row["value"], row["unit"]))
    assert list(values.values()) == [[(3.0, "GiB")], [(3.0, "GiB"), (1.17, "s"), (0.29, "")]]


def test_fid_keeps_a_peers_seconds_over_ours(record, monkeypatch, capsys):
    from benchmarks import fid

    seconds = {"unclip": 1.0, "torch-fidelity": 2.0, "pytorch-fid": 3.0}
    monkeypatch.setattr(
        fid,
        "ask",
        lambda tool, kind, folder=None: {"seconds": seconds[tool], "version": "9", "fid": 1.0},
    )
    kept = fid.compare({tool: tool for tool in seconds}, [("real", "a"), ("fake", "b")], 10)
    assert [(row["value"], row["unit"], row["against"]) for row in kept] == [
        (2.0, "×", "torch-fidelity 9"),
        (2.0, "×", "torch-fidelity 9"),
        (3.0, "×", "pytorch-fid 9"),
        (3.0, "×", "pytorch-fid 9"),
    ]
    assert len({row["figure"] for row in kept}) == 2
    assert capsys.readouterr().out.count('"against"') == 2


def test_input_keeps_our_rate_over_theirs(record, monkeypatch):
    from benchmarks import input as benchmark

    rates = {"ours, 1 thread": 20.0, "limit": 25.0, "peer, 0 workers, reduced": 16.0}

    def turn(command, **_):
        name = command[command.index("--turn") + 1]
        found = {"rate": rates.get(name, 10.0), "cpu": rates.get(name, 10.0), "memory": [1.0]}
        return subprocess.CompletedProcess(command, 0, json.dumps(found), "")

    monkeypatch.setattr(benchmark.subprocess, "run", turn)
    kept = benchmark.compare("256-64", ["a.tar"], rounds=1, seconds=1.0, cores=2)
    assert [row["value"] for row in kept] == [2.0, 1.25, 0.8, 2.0, 1.25, 0.8, 1.0]
    assert kept[0]["figure"] == "pictures 256 to 64 pixels, one core, by the clock"
    assert kept[-1]["against"].endswith("2 workers")
