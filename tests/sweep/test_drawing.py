"""Cells drawn and kept: files that survive a kill, several jobs at once."""

import numpy as np
import pytest

from tests.sweep.conftest import Judged, files_of, values_of
from unclip import errors, protocols
from unclip.files import images, lock
from unclip.measure.picture_set import ArrayPictures
from unclip.runtime import distributed
from unclip.sweep import plan, report, scoring, store


def test_a_cell_says_everything(paint, tmp_path):
    _, runner, _ = paint
    job = runner(tmp_path, {"samples": 2, "sweep.seed": (3,), "keep_pictures": "all"})
    cells = job.cells()
    assert job.run(cells) == 2
    record = store.read_cell(store.cell_path(tmp_path, cells[0].id))
    assert record["settings"] == cells[0].settings and record["pictures"] == 10
    assert record["model"]["hash"] == cells[0].model_hash and record["recipe"]["prompt"]
    assert set(record["seconds"]) == {"load", "draw", "score"} and record["versions"]["jax"]
    folder = store.cell_folder(tmp_path, cells[0].id)
    names = sorted(path.name for path in (folder / "pictures").iterdir())
    assert names == [f"{i:07d}-{k}.png" for i in range(5) for k in range(2)]
    seeds = [images.read_recipe(folder / "pictures" / name)["seed"] for name in names]
    assert seeds == [3 * 2**20 + 5 * k + i for i in range(5) for k in range(2)]  # none twice
    # The judge sees every picture once, sample by sample; its facts stand in picture order.
    pixels = [images.read_image(folder / "pictures" / n)[0, 0, 0] / 255 for n in names]
    bright = next(v for v in record["values"] if v["metric"] == "bright")
    assert bright["value"] == pytest.approx(np.mean(pixels))
    assert bright["key"] == "bright/five5/N=10"
    assert [f["bright"] for f in record["facts"]] == [round(float(p), 3) for p in pixels]
    scores = record["scores"]["clip_cosine"]
    assert [row["score"] for row in record["kept"]["best"]] == sorted(scores)[::-1][:4]
    assert record["kept"]["worst"][0]["number"] == int(np.argmin(scores))
    assert not (folder / lock.CLAIM).exists()


def test_judges_by_clip_name_it_in_their_keys(paint, tmp_path, monkeypatch):
    """Another model's CLIP is another judge; what pixels alone decide is the same for both."""
    model, runner, _ = paint
    own = Judged.judge
    monkeypatch.setattr(Judged, "by_clip", ("seen",))
    monkeypatch.setattr(
        Judged, "judge", lambda self, *args, **kw: ({"five.seen": 1.0, **own(self, *args)[0]}, [])
    )
    monkeypatch.setattr(scoring.embedders, "clip_id", lambda part: f"clip.{part}")
    keys = []
    for name in ("one", "two"):
        model.parts = {"clip": name}
        job = runner(tmp_path / name, {"sweep.guidance": (1.0,)})
        job.run(job.cells())
        records, _ = store.read_cells(tmp_path / name)
        keys.append({v["key"] for v in records[0]["values"]})
    assert "five.seen/clip.one/five5/N=5" in keys[0] and "five.seen/clip.two/five5/N=5" in keys[1]
    assert "bright/five5/N=5" in keys[0] & keys[1]


def test_other_real_pictures_make_another_cell(paint, tmp_path, monkeypatch):
    """Also under an id that does not say so: a finished cell is not taken for theirs."""
    _, runner, _ = paint
    ids = []
    for value in (0, 0, 1):
        real = ArrayPictures(np.full((5, 8, 8, 3), value, np.uint8))
        monkeypatch.setattr(Judged, "reference", lambda self, real=real: real)
        ids.append([cell.id for cell in runner(tmp_path).cells()])
    assert ids[0] == ids[1] and not set(ids[0]) & set(ids[2])


@pytest.mark.parametrize(
    "reference, named", [("", {"real", "captions", "size"}), ("x.npz", {"captions", "size"})]
)
def test_what_the_protocols_id_says_is_not_said_again(paint, tmp_path, reference, named):
    _, runner, _ = paint
    if reference:
        reference = str(tmp_path / reference)
        np.savez(reference, mu=np.zeros(2), sigma=np.eye(2))
    scorer = runner(tmp_path, {"reference": reference}).scorer
    assert scorer._options["named"] == named


@pytest.mark.parametrize("keep", ["grid", "none"])
def test_pictures_that_are_not_kept_go(paint, tmp_path, keep):
    _, runner, _ = paint
    job = runner(tmp_path, {"keep_pictures": keep})
    job.run(job.cells())
    for record in store.read_cells(tmp_path)[0]:
        folder = store.cell_folder(tmp_path, record["id"])
        if keep == "none":
            assert not folder.exists() and record["kept"] == {}
            continue
        wanted = {row["file"] for rows in record["kept"].values() for row in rows}
        assert set(files_of(folder)) == wanted | {"grid.png"}
        assert images.read_image(folder / "grid.png").shape == (12, 22, 3)
        shown = [folder / row["file"] for row in record["kept"]["shown"]]
        found = images.recipes_of(images.read_recipe(folder / "grid.png"))
        assert found == [images.read_recipe(path) for path in shown]
    with pytest.raises(errors.ConfigError, match="keep_pictures 'gird': did you mean 'grid'"):
        runner(tmp_path, {"keep_pictures": "gird"})


def test_benchmarks_get_their_layout(paint, tmp_path, monkeypatch):
    _, runner, _ = paint

    class Benchmark(Judged):
        def export(self, out, pictures):
            for key, picture in zip(self.keys, pictures, strict=True):
                images.write_png(out / f"{key}.png", picture)

    monkeypatch.setattr(protocols, "make", lambda name, **settings: Benchmark(**settings))
    job = runner(tmp_path, {"keep_pictures": "none", "sweep.guidance": (1.0,)})
    (cell,) = job.cells()
    job.run([cell])
    folder = store.cell_folder(tmp_path, cell.id)
    assert set(files_of(folder)) == {f"export/k{i}.png" for i in range(5)}
    with pytest.raises(errors.ConfigError, match="samples 2: protocol five5 itself decides"):
        runner(tmp_path, {"samples": 2})


def test_finished_cells_are_skipped_and_new_settings_drawn(paint, tmp_path):
    model, runner, _ = paint
    runner(tmp_path).run(runner(tmp_path).cells())
    calls, before = model.calls, files_of(tmp_path)
    assert runner(tmp_path).run(runner(tmp_path).cells()) == 0
    assert model.calls == calls and files_of(tmp_path) == before
    more = runner(tmp_path, {"sweep.guidance": (1.0, 2.0, 4.0)})
    assert [more.status(cell) for cell in more.cells()] == ["finished", "finished", "to do"]
    assert more.run(more.cells()) == 1
    assert before.items() <= files_of(tmp_path).items()


@pytest.mark.parametrize("blow", ["kill", "stop"])
def test_a_cell_cut_short_goes_on_with_what_is_whole(paint, tmp_path, blow):
    """As if nothing had happened: the same numbers, and what is damaged is drawn again."""
    model, runner, _ = paint
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    runner(whole).run(runner(whole).cells())
    each, model.calls = model.calls // 2, 0

    def kill():
        raise KeyboardInterrupt

    model.after = (3, kill) if blow == "kill" else (2, distributed.request_stop)
    job = runner(cut)
    try:
        with pytest.raises(KeyboardInterrupt if blow == "kill" else errors.Stopped) as raised:
            job.run(job.cells())
    finally:
        distributed.reset_stop()
    if blow == "stop":
        assert raised.value.exit_code == 75 and "cell 2 of 2" in raised.value.message
    begun = store.cell_folder(cut, job.cells()[1].id)
    there = sorted((begun / "pictures").iterdir())
    assert there and len(store.read_cells(cut)[0]) == 1
    (begun / "pictures" / "0000009-0.png").write_bytes(b"half a picture")
    model.after, before = None, model.calls
    assert runner(cut).run(runner(cut).cells()) == 1
    assert each > 1 and 0 < model.calls - before < each
    assert not list(begun.glob("drawn-*"))
    assert values_of(cut) == values_of(whole)
    assert files_of(cut).keys() == files_of(whole).keys()


@pytest.mark.parametrize("text", ["{", "{}", '{"format": 1, "id": "x", "settings": {}}', "[1, 2]"])
def test_a_damaged_cell_is_told_and_drawn_again(paint, tmp_path, text, capsys):
    _, runner, _ = paint
    runner(tmp_path).run(runner(tmp_path).cells())
    cell = runner(tmp_path).cells()[0]
    path = store.cell_path(tmp_path, cell.id)
    path.write_text(text)
    with pytest.raises(errors.DataError, match="is damaged"):
        store.read_cell(path)
    assert len(store.read_cells(tmp_path)[1]) == 1
    report.write(tmp_path, {})  # the others are reported, this one is named
    assert path.stem in (tmp_path / "report.html").read_text()
    assert runner(tmp_path).run(runner(tmp_path).cells()) == 1
    assert "drawn again" in capsys.readouterr().err
    assert len(values_of(tmp_path)) == 2


def test_two_jobs_never_draw_the_same_cell(paint, tmp_path, capsys):
    model, runner, _ = paint
    job = runner(tmp_path)
    cells = job.cells()
    folder = store.cell_folder(tmp_path, cells[0].id)
    folder.mkdir(parents=True)
    held = lock.DirectoryLock(folder)  # another job, alive
    try:
        (folder / "pictures").mkdir()
        (folder / "pictures" / "theirs.png").write_bytes(b"theirs")
        assert job.run(cells) == 1
        assert (folder / "pictures" / "theirs.png").exists()
        assert "left to another job" in capsys.readouterr().err
    finally:
        held.release()
    assert model.calls == 2 and job.run(cells) == 1  # theirs died: wiped and drawn
    assert not (folder / "pictures" / "theirs.png").exists()


def test_array_jobs_share_the_cells(paint, tmp_path):
    _, runner, _ = paint
    changes = {"sweep.guidance": (1.0, 2.0, 3.0), "sweep.seed": (0, 1)}
    for index in range(4):
        job = runner(tmp_path / "array", changes)
        assert job.run(plan.share(job.cells(), index, 4)) == (2, 2, 1, 1)[index]
    job = runner(tmp_path / "alone", changes)
    job.run(job.cells())
    assert values_of(tmp_path / "array") == values_of(tmp_path / "alone")


def test_a_protocol_without_captions(paint, tmp_path, monkeypatch):
    _, runner, _ = paint
    with monkeypatch.context() as patch:
        patch.setattr(protocols, "make", lambda name, **settings: Judged(0))
        with pytest.raises(errors.ConfigError, match="'five0' has no captions"):
            runner(tmp_path)
    with pytest.raises(errors.ConfigError, match="samples 0: expected at least 1"):
        runner(tmp_path, {"samples": 0})
    with pytest.raises(errors.ConfigError, match="unknown metric 'fdi': did you mean 'fid'"):
        runner(tmp_path, {"metrics": ("fdi",)})
    with pytest.raises(errors.ConfigError, match="kid compares with real pictures; protocol five5"):
        runner(tmp_path, {"metrics": ("clip_cosine", "kid")})
    assert not list(tmp_path.glob("cells*"))
