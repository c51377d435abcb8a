"""The page of the paper's figures, drawn whole by a micro bundle."""

import sys

import pytest

from unclip.files import images


@pytest.mark.slow
def test_every_figure_is_drawn(script, bundle_dir, tmp_path, monkeypatch, capsys):
    prompts = ["--prompt", "a red dot", "--prompt", "a blue bar"]
    fast = ["--n", "2", "--stages", "1", "--basis", str(tmp_path / "figure3")]
    command = ["--model", bundle_dir, "--out", str(tmp_path), *prompts, *fast]
    monkeypatch.setattr(sys, "argv", ["figures.py", *command])
    script("figures").main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Not drawn" not in page and page.count("<h2") >= 7
    modes = {3: "variations", 4: "interpolate", 5: "textdiff", 6: "variations", 7: "reconstruct"}
    for number in range(3, 10):
        drawn = sorted((tmp_path / f"figure{number}").glob("*.png"))
        assert len(drawn) >= 2
        recipe = images.read_recipe(drawn[0])
        assert recipe["mode"] == modes.get(number, "text")
    started = images.read_recipe(next((tmp_path / "figure3").glob("*.png")))
    assert started["images"][0]["recipe"]["prompt"] == "a red dot"
