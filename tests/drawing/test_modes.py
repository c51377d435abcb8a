"""The modes of `UnCLIP` on a micro cascade: what they draw, repeat and refuse."""

import numpy as np
import pytest

from unclip import UnCLIP, errors, images
from unclip.drawing import modes
from unclip.drawing.basis import Basis, open_basis
from unclip.input.decode.image import resize_and_crop
from unclip.tasks import codes
from unclip.tasks.arrays import to_float, to_uint8, unit

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def basis(model, picture):
    z_i = np.random.default_rng(0).standard_normal((40, 16)) * np.linspace(3, 0.1, 16)
    return Basis(codes.fit_pca(z_i.mean(0), np.cov(z_i.T), dims=16), "mine")


@pytest.fixture(scope="module")
def drawn(model, picture, basis):
    """{mode: Pictures} of every mode that starts from pictures, two stages or three."""
    a, b, c = (images.Source(picture(k), f"{k}.png") for k in range(3))
    return {
        "variations": model.variations(a, 2, 3, invert=True, stages=1),
        "interpolate": model.interpolate(a, b, c, n=5, seed=3, stages=1),
        "textdiff": model.text_diff(a, "a red dot", "a blue bar", 3, 3, stages=1),
        "reconstruct": model.reconstruct(a, [1, 4, 16], 3, basis=basis, stages=1),
        "upsample": model.upsample(a, 2, 3),
    }


def through_png(recipe, folder):
    images.write_png(folder / "one.png", np.zeros((8, 8, 3), np.uint8), recipe)
    return images.read_recipe(folder / "one.png")


@pytest.mark.parametrize("mode", ["variations", "interpolate", "textdiff", "reconstruct"])
def test_every_recipe_repeats_its_picture_alone(drawn, model, picture, basis, mode, tmp_path):
    made = drawn[mode]
    for k in (0, len(made) - 1):
        recipe = through_png(made.recipes[k], tmp_path)
        assert recipe["mode"] == mode and recipe["stages"] == 1
        more = {"basis": basis} if mode == "reconstruct" else {}
        again = model.redraw(recipe, [picture(k) for k in (2, 1, 0)], **more)
        np.testing.assert_array_equal(again.images[0], made.images[k])
        assert through_png(again.recipes[0], tmp_path) == recipe


def test_an_upsampled_picture_is_drawn_again(drawn, model, picture, tmp_path):
    recipe = through_png(drawn["upsample"].recipes[1], tmp_path)
    assert recipe["steps"].keys() == {"upsampler_1"}  # 30 pixels: it starts at 16
    again = model.redraw(recipe, [picture()])
    np.testing.assert_array_equal(again.images[0], drawn["upsample"].images[1])
    seen = to_float(resize_and_crop(picture(), 16)[0])[None]
    plain = model.draw_upsamplers(seen, [4], ["upsampler_1"])["upsampler_1"]
    assert np.abs(to_float(drawn["upsample"].images[1]) - plain[0]).max() < 1 / 127
    both = model.upsample(picture()[:15, :15])  # 15 pixels: from 8 on, through both
    assert both.recipes[0]["steps"].keys() == {"upsampler_0", "upsampler_1"}
    assert both.images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("steps", [(2,), pytest.param((2, 16, 64), marks=pytest.mark.slow)])
def test_inversion_and_eta_0_reconstruct(model, picture, steps):
    """The way back and the way there: the nearer the more steps; a random start is far off."""
    true = to_float(resize_and_crop(picture(), 8)[0])
    far = lambda drawn: np.square(to_float(drawn.images[0]) - true).mean()
    blind = {"sampler": "ddim", "guidance": 1.0}
    blind = model.variations(picture(), 1, decoder=blind, stages=1)
    assert "psnr" not in blind.recipes[0] and "invert" not in blind.recipes[0]
    falling = [far(blind) / 2]
    for count in steps:
        own = {"eta": 0.0, "steps": count}
        found = model.variations(picture(), 1, invert=True, decoder=own, stages=1)
        falling.append(far(found))
        psnr = 10 * np.log10(4 / falling[-1])  # of the rounded picture, which matters over 50 dB
        assert found.recipes[0]["psnr"] == pytest.approx(psnr, abs=0.5) or psnr > 50
        assert found.recipes[0]["invert"] is True
    assert sorted(falling, reverse=True) == falling


def test_variations_by_inversion_vary(drawn):
    one, other = drawn["variations"].images
    assert not np.array_equal(one, other)
    recipe = drawn["variations"].recipes[0]
    assert recipe["sampler"]["decoder"] == "ddim" and recipe["eta"]["decoder"] == 0.5


def test_an_interpolation_passes_through_its_pictures(drawn, model, picture):
    """Five on the way through three: the pictures themselves are the first, third and last."""
    weights = [recipe["weights"] for recipe in drawn["interpolate"].recipes]
    assert weights == [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]
    for k, place in enumerate((0, 2, 4)):
        alone = model.variations(picture(k), 1, 3, stages=1)
        np.testing.assert_array_equal(alone.images[0], drawn["interpolate"].images[place])
    share = model.interpolate(picture(0), picture(1), weights=[0.5], seed=3, stages=1)
    np.testing.assert_array_equal(share.images[0], drawn["interpolate"].images[1])


def test_an_inverted_interpolation_ends_in_reconstructions(model, picture):
    ends = model.interpolate(picture(0), picture(1), n=2, invert=True, stages=1)
    for k, image in enumerate(ends.images):
        exact = model.variations(picture(k), 1, invert=True, decoder={"eta": 0.0}, stages=1)
        np.testing.assert_array_equal(image, exact.images[0])


def test_a_text_difference_turns_z_i_by_the_angle(drawn, model, picture, monkeypatch):
    assert [r["angle"] for r in drawn["textdiff"].recipes] == [0, 0.25, 0.5]
    assert drawn["textdiff"].recipes[0]["from_prompt"] == "a red dot"
    start = model.variations(picture(), 1, 3, invert=True, decoder={"eta": 0.0}, stages=1)
    np.testing.assert_array_equal(drawn["textdiff"].images[0], start.images[0])
    seen = {}
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda z, *a, **k: seen.update(z=z) or decode(z, *a, **k))
    model.text_diff(picture(), "", "a blue bar", angle=[0, 0.5, 1], stages=1)
    z, z_t = seen["z"], unit(model.embed_text(["a blue bar"]))[0]
    lengths = np.linalg.norm(z, axis=1)
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5)
    np.testing.assert_allclose(unit(z[2]), z_t, atol=1e-5)  # no from_prompt: z_t itself
    half = np.arccos(np.clip(unit(z[:1]) @ unit(z[1]), -1, 1))[0]
    whole = np.arccos(np.clip(unit(z[:1]) @ z_t, -1, 1))[0]
    assert half == pytest.approx(whole / 2, rel=1e-3)


def test_a_reconstruction_from_all_components_is_z_i_itself(drawn, model, picture):
    assert [r["components"] for r in drawn["reconstruct"].recipes] == [1, 4, 16]
    full = model.variations(picture(), 1, 3, stages=1).images[0].astype(int)
    apart = [np.abs(image - full).mean() for image in drawn["reconstruct"].images.astype(int)]
    assert apart[2] < 1 < apart[0]


def test_a_basis_from_a_folder_of_pictures(model, picture, tmp_path):
    for k in range(6):
        images.write_png(tmp_path / f"{k}.png", picture(k))
    found = open_basis(model, tmp_path)
    assert found.pca.components.shape == (16, 16) and found.source == str(tmp_path)
    drawn = model.reconstruct(picture(), 3, basis=tmp_path, stages=1)
    assert drawn.recipes[0]["basis_sha256"] == found.sha256
    again = model.redraw(drawn.recipes[0], [picture()])  # finds the folder by its name
    np.testing.assert_array_equal(again.images, drawn.images)
    images.write_png(tmp_path / "more.png", picture(9))
    with pytest.raises(errors.ConfigError, match="the recipe's basis is"):
        model.redraw(drawn.recipes[0], [picture()])
    recipe = drawn.recipes[0] | {"basis": str(tmp_path / "gone")}
    with pytest.raises(errors.ConfigError, match=r"the recipe's basis .*gone': .* no such file"):
        model.redraw(recipe, [picture()])


# ------------------------------------------------------------ text


def test_the_best_of_several(model):
    every = model.generate(["a red dot", "a blue bar"], 4, 5, stages=1)
    scores = model.score(every.images, [r["prompt"] for r in every.recipes])
    kept = model.generate(["a red dot", "a blue bar"], 2, 5, best_of=4, stages=1)
    for row, first in ((0, 0), (2, 4)):
        order = np.argsort(-scores[first : first + 4], kind="stable")[:2]
        assert [r["seed"] for r in kept.recipes[row : row + 2]] == [5 + k for k in order]
        np.testing.assert_array_equal(kept.images[row : row + 2], every.images[first + order])
    assert [r["rank"] for r in kept.recipes] == [1, 2, 1, 2]
    assert kept.recipes[0]["clip_score"] == pytest.approx(scores[:4].max(), abs=1e-5)
    again = model.redraw(kept.recipes[1])
    np.testing.assert_array_equal(again.images[0], kept.images[1])
    assert again.recipes[0] == kept.recipes[1] and again.recipes[0]["best_of"] == 4


def test_a_negative_prompt_reaches_the_stages_that_read(model, monkeypatch):
    """The conditions it becomes, by the stage; and in the recipe."""
    seen, draw = {}, model._draw
    record = lambda name, conditions, *a, **k: (
        seen.update({name: conditions}) or draw(name, conditions, *a, **k)
    )
    monkeypatch.setattr(model, "_draw", record)
    given = model.generate("a red dot", 2, 3, negative_prompt="a blue bar", stages=1)
    tokens, mask = model.tokenize(["a blue bar"])
    for stage in ("prior", "decoder"):
        assert seen[stage]["negative_tokens"].shape == seen[stage]["tokens"].shape
        np.testing.assert_array_equal(seen[stage]["negative_tokens"], tokens.repeat(2, 0))
        np.testing.assert_array_equal(seen[stage]["negative_text_mask"], mask.repeat(2, 0))
    assert given.recipes[0]["negative_prompt"] == "a blue bar"
    assert not np.array_equal(given.images, model.generate("a red dot", 2, 3, stages=1).images)
    assert model.redraw(given.recipes[1]).recipes == [given.recipes[1]]
    model.generate("a red dot", negative_prompt="a blue bar", caption=False, stages=1)
    assert "negative_tokens" not in seen["decoder"] and "negative_tokens" in seen["prior"]
    model.generate("a red dot", stages=1)
    assert "negative_tokens" not in seen["prior"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"best_of": 1}, "best_of=1 with n=2: expected at least n"),
        ({"best_of": 0}, "best_of=0: expected at least 1"),
        (
            {"negative_prompt": "a", "decoder": {"guidance": 1.0}, "prior": {"guidance": 1.0}},
            "would have no effect: prior guidance 1, decoder guidance 1|decoder guidance 1, prior",
        ),
        ({"negative_prompt": "a", "embed": "none", "caption": False}, "no stage reads a caption"),
        ({"decoder": {"guidance": float("nan")}}, "guidance nan: expected a finite number"),
        ({"prior": {"guidance": float("inf")}}, "guidance inf: expected a finite number"),
    ],
)
def test_text_settings_that_are_refused(model, settings, said):
    with pytest.raises(errors.ConfigError, match=said):
        model.generate("a red dot", 2, stages=1, **settings)


# ------------------------------------------------------------ cost


def test_another_angle_weight_seed_picture_or_prompt_compiles_nothing(drawn, model, picture):
    count = lambda: {key: program._cache_size() for key, program in model._compiled.items()}
    own = {"guidance": 1.5}
    a, b = picture(5), picture(6)[:, ::-1]
    model.variations(a, 1, invert=True, decoder=own, stages=1)
    before = count()
    model.variations(b, 3, 9, invert=True, decoder={"guidance": 2.5, "eta": 0.25}, stages=1)
    model.interpolate(a, b, n=6, invert=True, decoder={"guidance": 1.1}, stages=1)
    model.interpolate(b, a, picture(7), weights=[[1, 2, 3]], invert=True, stages=1)
    model.text_diff(b, "a green dot", "a red bar", 4, 7, angle=0.3, stages=1)
    model.text_diff(b, "", "a green bar", angle=[0.1, 0.9], stages=1)
    assert count() == before


def test_drawing_tells_how_far_it_is(model):
    """Every stage, every call, a preview whose last is the picture; another function is free."""
    silent = model.generate("a red dot", 1, 5, stages=2)
    told, later = [], []
    drawn = model.telling(lambda *said: told.append(said)).generate("a red dot", 1, 5, stages=2)
    np.testing.assert_array_equal(drawn.images, silent.images)
    assert drawn.recipes == silent.recipes
    stages = {name: sorted(n for stage, n, _ in told if stage == name) for name, _, _ in told}
    steps = silent.recipes[0]["steps"]
    assert stages == {name: list(range(1, count + 1)) for name, count in steps.items()}
    last = max((n, x) for stage, n, x in told if stage == "upsampler_0")[1]
    np.testing.assert_array_equal(to_uint8(np.clip(last, -1, 1)), drawn.images[0])
    before = {key: program._cache_size() for key, program in model._compiled.items()}
    model.telling(lambda *said: later.append(said)).generate("a red dot", 1, 6, stages=2)
    assert {key: program._cache_size() for key, program in model._compiled.items()} == before
    assert len(later) == len(told) == sum(steps.values())
    with pytest.raises(errors.ConfigError, match="every=0"):
        model.telling(print, 0)


# ------------------------------------------------------------ chains


@pytest.fixture(scope="module")
def chain(model, picture):
    """A caption's picture, its variation, and an interpolation of that with a photograph."""
    first = model.generate("a red dot", 1, 5)
    one = images.Source(first.images[0], "first.png", first.recipes[0])
    second = model.variations(one, 1, 6)
    two = images.Source(second.images[0], "second.png", second.recipes[0])
    photo = images.Source(picture(), "photo.jpg")
    return model.interpolate(two, photo, weights=[0.3], seed=8, stages=2)


def test_a_chain_is_drawn_again_from_what_it_began_with(chain, model, picture, tmp_path):
    recipe = through_png(chain.recipes[0], tmp_path)
    second, photo = recipe["images"]
    assert second["recipe"]["images"][0]["recipe"]["prompt"] == "a red dot"
    assert "recipe" not in photo
    again = model.redraw(recipe, [picture()])
    np.testing.assert_array_equal(again.images, chain.images)
    assert through_png(again.recipes[0], tmp_path) == recipe


def test_a_chain_names_all_that_is_missing(chain, model, picture, monkeypatch):
    monkeypatch.setattr(model, "_call", None)  # nothing is computed
    recipe = chain.recipes[0]
    (absent,) = modes.missing(recipe)
    assert absent["name"] == "photo.jpg" and modes.missing(recipe, [picture()]) == []
    with pytest.raises(errors.ConfigError, match=r"missing 'photo\.jpg' \([0-9a-f]{64}\)"):
        model.redraw(recipe)
    without = {k: v for k, v in recipe["images"][0].items() if k != "recipe"}
    recipe = recipe | {"images": [without, recipe["images"][1]]}
    with pytest.raises(errors.ConfigError, match=r"missing 'second\.png' .*, 'photo\.jpg' \("):
        model.redraw(recipe)


def test_a_chain_of_another_model_is_refused_before_it_is_drawn(chain, parts, picture, monkeypatch):
    other = UnCLIP(parts, model_hash="0123456789", batch_size=4)
    monkeypatch.setattr(other, "_call", None)
    recipe = chain.recipes[0]
    second, photo = recipe["images"]
    foreign = second | {"recipe": second["recipe"] | {"model_hash": "9999999999"}}
    with pytest.raises(errors.ConfigError, match="of model 9999999999, this is 0123456789"):
        other.redraw(recipe | {"images": [foreign, photo]}, [picture()])


def test_an_endless_chain_is_refused(chain, model):
    recipe = {"mode": "variations", "model_hash": "0123456789"}
    for _ in range(120):
        recipe = recipe | {"images": [{"name": "a", "sha256": "0", "recipe": recipe}]}
    with pytest.raises(errors.ConfigError, match="chain of more than 100"):
        model.redraw(recipe)


def test_pictures_that_cannot_be_carried_leave_the_chain():
    good = {"mode": "text", "model_hash": "0123456789", "prompt": "x"}
    assert images.kept_recipe(good) == good
    for bad in (
        None,
        "text",
        {"prompt": "of another program", "steps": 20},
        good | {"grid_columns": 2},
        good | {"eta": float("nan")},
        good | {"prompt": "x" * (65 << 10)},
    ):
        assert images.kept_recipe(bad) is None


# ------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, p: m.interpolate(p), "interpolation of 1 picture"),
        (lambda m, p: m.interpolate(p, p, n=1), "n=1 pictures on the way"),
        (lambda m, p: m.interpolate(p, p, weights=[[1, 2, 3]]), "expected 2, one a picture"),
        (lambda m, p: m.interpolate(p, p, weights=[1.5]), "from 0 to 1"),
        (lambda m, p: m.interpolate(p, p, weights=[[0, 0]]), "expected a positive sum"),
        (lambda m, p: m.interpolate(p, p, weights=[[1, float("nan")]]), "weight nan"),
        (lambda m, p: m.interpolate(p, p, weights=[]), "0 rows of weights"),
        (lambda m, p: m.interpolate(p, p, n=3, weights=[0.5]), "n=3 with 1 rows"),
        (lambda m, p: m.text_diff(p, "a", "b", angle=1.5), "angle 1.5: expected .* 0 to 1"),
        (lambda m, p: m.text_diff(p, "a", "b", angle=float("nan")), "angle nan"),
        (lambda m, p: m.text_diff(p, "a", "b", angle="x"), "angle 'x'"),
        (lambda m, p: m.text_diff(p, "a", " "), "caption to go to is empty"),
        (lambda m, p: m.text_diff(p, "a", "b", angle=[]), "number of angles=0"),
        (lambda m, p: m.reconstruct(p, 0), "components=0: expected at least 1"),
        (lambda m, p: m.reconstruct(p, True), "components=True"),
        (lambda m, p: m.reconstruct(p, 3), "no basis: expected a folder of embeddings"),
        (lambda m, p: m.variations(p, 0), "n=0: expected at least 1"),
        (
            lambda m, p: m.variations(p, 2, invert=True, decoder={"eta": 0.0}, stages=1),
            "all would be one picture",
        ),
        (
            lambda m, p: m.variations(p, invert=True, decoder={"sampler": "ddpm"}),
            "sampler 'ddpm' with invert",
        ),
        (lambda m, p: m.variations(p, decoder={"eta": float("nan")}), "eta nan"),
        (lambda m, p: m.variations(p[:1, :1]), "is 1x1 pixels: expected at least 8 a side"),
        (lambda m, p: m.variations(p[..., 0]), r"is uint8 \[40, 30\]: expected uint8 \[H, W, 3\]"),
        (lambda m, p: m.variations(p / 255), r"float64 \[40, 30, 3\]: expected uint8"),
        (lambda m, p: m.upsample(p, upsamplers=[{}, {}]), "of which 1 run from 16 pixels on"),
        (lambda m, p: m.upsample(p, upsamplers=[{"steps": 0}]), "sampling steps 0"),
    ],
)
def test_what_is_refused_before_anything_is_computed(model, picture, monkeypatch, call, said):
    monkeypatch.setattr(model, "_call", None)
    with pytest.raises(errors.ConfigError, match=said):
        call(model, picture())


def test_captions_that_say_the_same_are_refused(model, picture):
    with pytest.raises(errors.ConfigError, match="does not tell these captions apart"):
        model.text_diff(picture(), "a red dot", "A red  dot")


@pytest.mark.parametrize(
    ("mode", "gone"),
    [
        ("variations", "clip"),
        ("interpolate", "decoder"),
        ("textdiff", "decoder"),
        ("reconstruct", "decoder"),
        ("upsample", "upsampler_0"),
    ],
)
def test_a_mode_without_its_part_says_which(parts, picture, mode, gone):
    apart = {"decoder", "prior"} if gone == "clip" else set()
    kept = {n: p for n, p in parts.items() if n not in apart | {gone, "upsampler_1"}}
    model, p = UnCLIP(kept, batch_size=1), picture()
    calls = {
        "variations": lambda: model.variations(p),
        "interpolate": lambda: model.interpolate(p, p),
        "textdiff": lambda: model.text_diff(p, "a", "b"),
        "reconstruct": lambda: model.reconstruct(p, 3),
        "upsample": lambda: model.upsample(p),
    }
    with pytest.raises(errors.ConfigError, match=f"need.* the part '{gone}'"):
        calls[mode]()
    assert modes.lacking(kept)[mode] == f"no {'decoder' if gone == 'clip' else gone}"
