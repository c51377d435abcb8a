"""Every checkpoint of a training scored once, as it appears."""

import os

import pytest

from tests.sweep.conftest import DRAW, write_run
from unclip import errors
from unclip.sweep import drawing, findings, follow, store


def test_every_checkpoint_is_scored_once(paint, tmp_path):
    """New ones as they appear, to the run's end; a second follower finds all done."""
    model, _, config = paint
    run = write_run(tmp_path / "run", "decoder", [10], total=30, draw=DRAW)
    counts = []

    def finish():
        counts.append(len(store.read_cells(tmp_path / "eval")[0]))
        if len(counts) < 3:
            write_run(tmp_path / "run", "decoder", [10 * len(counts) + 10], total=30, draw=DRAW)

    steps = follow.follow(
        config({"decoder": run}), str(tmp_path / "eval"), run, 60.0, finish, poll_s=0.01
    )
    assert steps == [10, 20, 30] and counts == [2, 4, 6]
    records, _ = store.read_cells(tmp_path / "eval")
    assert sorted({r["settings"]["step"] for r in records}) == [10, 20, 30]
    calls = model.calls
    follow.follow(config({"decoder": run}), str(tmp_path / "eval"), run, 60.0, finish, 0.01)
    assert model.calls == calls
    found = findings.lines(records, "", "clip_cosine/x", "step")
    assert [[at for at, _, _ in points] for points in found.values()] == [[10, 20, 30]] * 2


def test_a_checkpoint_deleted_meanwhile_is_left_out(paint, tmp_path, monkeypatch, capsys):
    _, _, config = paint
    run = write_run(tmp_path / "run", "decoder", [10, 20], total=20, draw=DRAW)
    real = drawing.Runner.run

    def deleting(self, cells):
        if cells[0].settings["step"] == 10:
            os.remove(tmp_path / "run" / "checkpoints" / "10" / "commit_success.txt")
            raise errors.DataError("no complete checkpoint of step 10")
        return real(self, cells)

    monkeypatch.setattr(drawing.Runner, "run", deleting)
    done = follow.follow(config({"decoder": run}), str(tmp_path / "e"), run, 9.0, lambda: 0)
    assert done == [20]
    assert "step 10" in capsys.readouterr().err


def test_following_ends_after_silence(paint, tmp_path, capsys):
    _, _, config = paint
    run = write_run(tmp_path / "run", "decoder", [10], total=30, draw=DRAW)
    done = follow.follow(
        config({"decoder": run}), str(tmp_path / "e"), run, 0.05, lambda: None, poll_s=0.01
    )
    assert done == [10] and "the latest is step 10" in capsys.readouterr().err
    with pytest.raises(errors.ConfigError, match=r"no model of the sweep .* --config.decoder="):
        follow.follow(config(), str(tmp_path / "e"), run, 0.05, lambda: None, poll_s=0.01)
