"""Protocols that start from pictures: typographic attack and the PCA reconstructions."""

import types

import numpy as np
import pytest

from unclip import UnCLIP, protocols
from unclip.errors import ConfigError
from unclip.files import images
from unclip.input.decode.image import for_clip
from unclip.protocols.typographic import paste_label
from unclip.tasks.arrays import to_uint8

SETTINGS = {"decoder": {"steps": 2}, "stages": 1, "prior": {"steps": 3}, "embed": "prior"}
D = 16  # of the micro CLIP


@pytest.fixture(scope="module")
def model(bundle_dir, quick_compiles):
    return UnCLIP.load(bundle_dir, batch_size=4)


@pytest.fixture(scope="module")
def attack():
    return protocols.make("typographic", count=6, size=32)


@pytest.fixture(scope="module")
def sweep(shards):
    return protocols.make(
        "reconstruction",
        count=2,
        size=8,
        dims=(1, 4, 40),
        width=D,
        fit_count=24,
        pictures=shards["held_out"],
        fit=shards["train"],
    )


# ============================================================ typographic attack


def test_rows_have_three_different_labels(attack):
    assert attack.mode == "variations" and len(attack.prompts) == 6 == len(set(attack.keys))
    for prompt, labels in zip(attack.prompts, attack.labels):
        assert labels[0] == prompt and len(set(labels)) == 3
    # Every object is the true, the pasted and the control label once.
    assert all(sorted(column) == sorted(attack.prompts) for column in zip(*attack.labels))
    again = protocols.make("typographic", count=6, size=32)
    assert again.provenance == attack.provenance
    assert protocols.make("typographic", count=6, seed=1).prompts != attack.prompts


def test_the_label_is_all_that_changes(attack):
    for i in range(6):
        clean, attacked = attack.clean.read(i), attack.attacked.read(i)
        rows, columns = np.nonzero((clean != attacked).any(-1))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert 16 < height < 160 and 40 < width <= 0.9 * 256
        label = attacked[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (label == 255).all(-1).mean() > 0.3 and (label < 60).all(-1).mean() > 0.05
        # Around the middle, so that a centre crop keeps it.
        assert abs(rows.mean() - 128) < 24 and abs(columns.mean() - 128) < 24


def test_text_is_what_is_asked_for():
    blank = np.full((256, 256, 3), 200, np.uint8)
    one, other = paste_label(blank, "key"), paste_label(blank, "birthday cake")
    assert (one != other).any() and (paste_label(blank, "key") == one).all()
    assert (blank == 200).all()


@pytest.mark.slow
def test_draws_are_the_pipelines_variations(attack, model):
    drawn = attack.draw(model, [7, 3], SETTINGS, rows=[4, 1])
    for number, (row, seed) in enumerate([(4, 7), (1, 3)]):
        own = model.variations(
            attack.attacked.read(row), n=1, seed=seed, decoder={"steps": 2}, stages=1
        )
        assert (own.images[0] == drawn.images[number]).all()
    recipe = drawn.recipes[0]
    assert recipe["seed"] == 7 and recipe["key"] == attack.keys[4]
    assert "prior" not in recipe and recipe["mode"] == "variations"
    # Drawn again from the recipe and the attacked picture alone.
    again = model.redraw(recipe, [attack.attacked.read(4)])
    assert (again.images[0] == drawn.images[0]).all()


def test_judge_of_the_attack(attack, model):
    reference = attack.reference()
    clean = np.stack([reference.read(i) for i in range(6)])
    values, facts = attack.judge(clean)
    assert values == {"typographic.drawn.nearest_true": 1, "typographic.drawn.nearest_pasted": 0}
    turned = np.roll(clean, -1, axis=0)  # every drawing is of the pasted label
    values, facts = attack.judge(turned, model)
    assert values["typographic.drawn.nearest_true"] == 0
    assert values["typographic.drawn.nearest_pasted"] == 1
    assert facts[2]["nearest"] == attack.labels[2][1] and len(facts) == 6
    names = {
        f"typographic.{s}.{p}"
        for s in ("clean", "attacked", "drawn")
        for p in ("p_true", "p_pasted")
    }
    assert names <= set(values)


def test_probabilities_are_clips(attack, model):
    """Against the model's own score, by hand."""
    rows = [0, 3]
    found = attack.probabilities(model, [attack.attacked.read(r) for r in rows], rows)
    assert np.allclose(found.sum(1), 1)
    scale = np.exp(model.parts["clip"].params["logit_scale"])
    for row, shares in zip(rows, found):
        picture = for_clip(attack.attacked.read(row), 16)
        logits = scale * model.score(np.stack([picture] * 3), list(attack.labels[row]))
        expected = np.exp(logits) / np.exp(logits).sum()
        assert np.abs(shares - expected).max() < 1e-4


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"count": 2}, "3 to 67"),
        ({"count": 68}, "3 to 67"),
        ({"size": 512}, "size 512"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_typographic_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        protocols.make("typographic", **settings)


def test_a_model_without_the_part(attack):
    with pytest.raises(ConfigError, match="'clip'"):
        attack.draw(types.SimpleNamespace(parts={}), [0], SETTINGS, rows=[0])


# ============================================================ reconstruction


def test_dims_are_capped_by_the_width(sweep):
    assert sweep.columns == (1, 4, D, 0) and sweep.mode == "reconstruct"
    assert sweep.keys[:4] == ["0000-d1", "0000-d4", "0000-d16", "0000-full"]
    assert len(sweep.prompts) == 8 and len(set(sweep.keys)) == 8 and len(sweep.reference()) == 2


def test_projections_against_numpy(sweep, model):
    """An SVD of the centred embeddings of the fitted set is the same PCA."""
    embed = lambda pictures, n: model.embed_image(
        np.stack([for_clip(pictures.read(i), 16) for i in range(n)])
    ).astype(np.float64)
    fit, z = embed(sweep._fit, 24), embed(sweep._source, 2)
    mean = fit.mean(0)
    _, scale, components = np.linalg.svd(fit - mean, full_matrices=False)
    for row in range(8):
        d = sweep.columns[row % 4] or D
        first = components[:d]
        expected = mean + (z[row // 4] - mean) @ first.T @ first
        expected = z[row // 4] if row % 4 >= 2 else expected
        assert np.abs(sweep._projected(model, row) - expected).max() < 1e-3 * np.abs(z).max()
    share = np.cumsum(scale**2) / np.sum(scale**2)
    assert [sweep.explained(model, d) for d in (1, 4)] == pytest.approx([share[0], share[3]], 1e-4)
    assert sweep.explained(model, 0) == 1


def test_drawing_and_judging_a_sweep(sweep, model):
    drawn = sweep.draw(model, range(50, 58), SETTINGS)
    assert drawn.images.shape == (8, 8, 8, 3)
    # The decoder's seed is fixed along a picture's row; all components are z_i itself.
    assert [r["seed"] for r in drawn.recipes] == [50] * 4 + [54] * 4
    own = model.variations(sweep._source.read(0), n=1, seed=50, decoder={"steps": 2}, stages=1)
    assert (drawn.images[3] == own.images[0]).all()
    # A recipe says of which picture, of how many components fitted on what, and every setting.
    recipe = drawn.recipes[5]
    assert recipe["images"] == [images.source(sweep._source.read(1), sweep._source.name(1))]
    assert (recipe["components"], recipe["fit_count"]) == (4, 24)
    assert recipe["fit"] == sweep._fit.source and recipe["steps"] == {"decoder": 2}
    z_i = np.float32(sweep._projected(model, sweep.columns.index(recipe["components"]) + 4))
    settings = {name: recipe[name]["decoder"] for name in ("steps", "sampler", "guidance", "eta")}
    again = model.decode(z_i[None], None, [recipe["seed"]], decoder=settings, stages=1)
    assert (to_uint8(again["decoder"][0]) == drawn.images[5]).all()
    values, facts = sweep.judge(drawn.images, model)
    assert len(facts) == 8
    cosines = [values[f"reconstruction.{d}.cosine"] for d in ("d1", "d4", "d16", "full")]
    assert cosines == sorted(cosines) and cosines[3] == pytest.approx(1)
    assert values["reconstruction.d1.explained"] < values["reconstruction.d16.explained"] <= 1
    part, _ = sweep.judge(drawn.images[[1, 5]], model, rows=[1, 5])
    name = "reconstruction.d4.drawn_cosine"
    assert part[name] == pytest.approx(values[name], abs=1e-6) and len(part) == 4


def test_mse_needs_no_model(sweep):
    reference = sweep.reference()
    exact = np.stack([reference.read(i) for i in (0, 0, 0, 0, 1, 1, 1, 1)])
    values, _ = sweep.judge(exact)
    assert values == {f"reconstruction.{d}.mse": 0 for d in ("d1", "d4", "d16", "full")}
    exact[1] ^= 1
    assert sweep.judge(exact)[0]["reconstruction.d4.mse"] == pytest.approx(0.5 / 255**2, abs=1e-6)
    grid = sweep.grid(exact)
    assert grid.dtype == np.uint8 and grid.shape[1] == 5 * (8 + 2) + 2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dims": (4, 2)}, "rising"),
        ({"dims": ()}, "rising"),
        ({"dims": (0, 2)}, "rising"),
        ({"count": 0}, "count 0"),
        ({"fit_count": 1}, "fit on"),
        ({"size": 1}, "size 1"),
    ],
)
def test_reconstruction_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        protocols.make("reconstruction", **settings)
