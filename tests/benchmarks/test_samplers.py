"""The table that benchmarks/samplers.py makes of what it measured."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from benchmarks import samplers

    return samplers


def test_a_row_a_sampler_and_a_column_a_number_of_steps(benchmark):
    figures = [
        ("prior: floor, ddpm, 1,000 steps: fd of 8", 0.25),
        ("prior: ddim, even, 5 steps: distance", 0.5),
        ("prior: ddim, even, 5 steps: fd", 2.0),
        ("prior: ddim, even, 25 steps: distance", 0.125),
        ("prior: ddim, even, 25 steps: fd", 1.0),
        ("prior: ddpm, even, 25 steps: fd", 3.0),
    ]
    found = {
        "command": "python benchmarks/samplers.py --count 8",
        "figures": [{"figure": text, "value": value} for text, value in figures],
    }
    text = f"before\n{benchmark.BEGIN}\nold\n{benchmark.END}\nafter\n"
    made = benchmark.page(text, [found])
    assert made.startswith("before\n") and made.endswith("\nafter\n") and "old" not in made
    lines = made.splitlines()
    assert "`python benchmarks/samplers.py --count 8`" in lines
    assert "- prior, floor, ddpm, 1,000 steps: fd of 8: 0.25" in lines
    assert "| stage | sampler | spacing | 5 steps | 25 steps |" in lines
    assert "| prior | ddim | even | 0.500 / 2 | 0.125 / 1 |" in lines
    assert "| prior | ddpm | even |  | – / 3 |" in lines
    with pytest.raises(SystemExit, match="must hold"):
        benchmark.page("no marks", [found])


def test_the_page_has_its_place(benchmark):
    page = benchmark.PAGE.read_text("utf-8")
    assert page.count(benchmark.BEGIN) == page.count(benchmark.END) == 1
