"""The report, and the results as a table."""

import copy
import csv
import json

import numpy as np
import pytest

from tests.sweep.conftest import files_of
from unclip import errors
from unclip.files import images
from unclip.sweep import report, store


def test_results_hold_every_cell(paint, tmp_path):
    _, runner, config = paint
    changes = {
        "sweep.guidance": (1.0, 2.0, 3.0),
        "sweep.embed": ("prior", "text"),
        "claims": (("<b>hostile</b>", "fd-clip", "model", "<", "absent"),),
    }
    job = runner(tmp_path, changes)
    job.run(job.cells())
    path = report.write(tmp_path, config(changes))
    records, _ = store.read_cells(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {r["id"] for r in records} and len(lines) == 6
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["guidance"]) for row in rows] == [1.0, 2.0, 3.0] * 2
    by_id = {r["id"]: r for r in records}
    for row in rows:
        for value in by_id[row["id"]]["values"]:
            assert float(row[value["key"]]) == value["value"]
    page = path.read_text()
    assert all(r["id"] in page for r in records) and "bright/five5/N=5" in page
    assert "fd-clip against clip_cosine over guidance" in page
    assert page.count("<svg") == 1 + 3  # and three metrics over guidance
    assert "&lt;b&gt;hostile" in page and "<b>hostile" not in page and "not measured" in page
    assert page.count("data:image/png") == 2 * 6 + 2 + 2  # shown, best, worst
    before = files_of(tmp_path)
    report.write(tmp_path, config(changes))
    assert files_of(tmp_path) == before


def test_a_report_reads_no_picture_outside_its_cell(paint, tmp_path):
    _, runner, _ = paint
    job = runner(tmp_path)
    job.run(job.cells())
    one = store.read_cells(tmp_path)[0][0]
    changed = copy.deepcopy(one)
    images.write_png(tmp_path / "secret.png", np.zeros((8, 8, 3), np.uint8))
    changed["kept"]["shown"][0]["file"] = "../../secret.png"
    assert report._read(tmp_path, changed, changed["kept"]["shown"][0]) is None
    assert report._read(tmp_path, one, one["kept"]["shown"][0]) is not None
    with pytest.raises(errors.DataError, match="no finished cell"):
        report.write(tmp_path / "empty", {})
    with pytest.raises(errors.ConfigError, match=r"claim .*expected"):
        report.write(tmp_path, {"claims": (("a", "b"),)})
