"""The cascade as a value: pictures that depend on their seed alone, recipes that repeat them."""

import dataclasses
import types
import warnings

import jax
import numpy as np
import pytest

from unclip import UnCLIP, errors, tasks
from unclip.cascade import bundle, runs
from unclip.cascade.pipeline import STAGE_TAGS
from unclip.drawing.modes import lacking
from unclip.files import images
from unclip.input.decode.image import for_clip
from unclip.models.t5 import T5Encoder
from unclip.runtime import sharding
from unclip.tasks.arrays import to_uint8, unit
from unclip.tasks.t5 import FrozenT5

pytestmark = pytest.mark.usefixtures("quick_compiles")
FAST = {"prior": {"guidance": 2.0}, "decoder": {"guidance": 3.0}}


def shaken(tree, seed=0):
    """Parameters of a net that is not silent: fresh U-Nets end in zeros."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(leaf + 0.1 * rng.standard_normal(leaf.shape)), tree)


@pytest.fixture(scope="module")
def parts(bundle_dir):
    found = bundle.read(bundle_dir).parts
    for part in found.values():
        part.params = shaken(part.params)
    return found


@pytest.fixture(scope="module")
def model(parts):
    return UnCLIP(parts, model_hash="0123456789", batch_size=4)


@pytest.fixture(scope="module")
def six(model):
    return model.generate("a red dot", n=6, seed=10, **FAST)


def test_pictures_are_the_last_stage(six, model):
    assert model.upsamplers == ["upsampler_0", "upsampler_1"]
    assert {k: v.shape for k, v in six.stages.items()} == {
        "decoder": (6, 8, 8, 3),
        "upsampler_0": (6, 16, 16, 3),
        "upsampler_1": (6, 32, 32, 3),
    }
    assert all(v.dtype == np.uint8 for v in six.stages.values())
    np.testing.assert_array_equal(six.images, six.stages["upsampler_1"])
    assert len(six) == 6 and len({picture.tobytes() for picture in six.images}) == 6


@pytest.fixture(scope="module")
def nine(model):
    return model.generate("a red dot", n=9, seed=10, **FAST)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_a_picture_is_the_same_alone(nine, model, n):
    """Picture k of seed s is picture 0 of seed s + k, every bit of every stage, whatever n is."""
    first = 9 - n
    fewer = model.generate("a red dot", n=n, seed=10 + first, **FAST)
    for name, pictures in fewer.stages.items():
        np.testing.assert_array_equal(pictures, nine.stages[name][first:], err_msg=name)
    assert fewer.recipes == nine.recipes[first:]


def test_embeddings_are_the_same_alone(nine, model):
    many = model.embed_image(nine.stages["upsampler_0"])
    np.testing.assert_array_equal(many[4:7], model.embed_image(nine.stages["upsampler_0"][4:7]))


def test_a_fixed_batch_draws_the_same_rows_whatever_is_left(parts):
    """Five pictures and the last of them alone, both four rows at once, and redrawn so."""
    fixed = UnCLIP(parts, batch_size=4, fixed_batch=True)
    draw = lambda n, seed: fixed.generate("a red dot", n=n, seed=seed, stages=1, embed="text")
    five, last = draw(5, 10), draw(1, 14)
    np.testing.assert_array_equal(five.images[4:], last.images)
    assert {row["batch_size"] for row in five.recipes} == {4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = UnCLIP(parts, batch_size=8).redraw(five.recipes[4])
    np.testing.assert_array_equal(again.images, last.images)
    assert again.recipes == last.recipes


@pytest.mark.parametrize(
    ("platform", "rows"), [("cpu", [1, 1, 1, 1, 1, 1]), ("gpu", [1, 2, 4, 8, 8, 8])]
)
def test_rows_of_a_program(parts, monkeypatch, platform, rows):
    """One on a CPU; elsewhere the next power of two, at most the batch size."""
    model = UnCLIP({"clip": parts["clip"]}, batch_size=8)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform=platform)])
    assert [model.at_once(count) for count in (1, 2, 3, 5, 8, 9)] == rows
    few = UnCLIP({"clip": parts["clip"]}, batch_size=6)
    assert few.at_once(5) == (1 if platform == "cpu" else 6)
    assert UnCLIP({}, batch_size=8, fixed_batch=True).at_once(1) == 8


def test_prompts_beside_it_do_not_matter(six, model):
    both = model.generate(["a blue bar", "a red dot"], n=2, seed=11, **FAST)
    np.testing.assert_array_equal(both.images[2:], six.images[1:3])
    assert not np.array_equal(both.images[0], both.images[2])
    assert [r["prompt"] for r in both.recipes] == ["a blue bar"] * 2 + ["a red dot"] * 2
    assert [r["seed"] for r in both.recipes] == [11, 12, 11, 12]


def from_png(image, recipe, folder):
    """The recipe as its picture's PNG gives it."""
    images.write_png(folder / "one.png", image, recipe)
    return images.read_recipe(folder / "one.png")


def test_a_recipe_repeats_its_picture(six, model, tmp_path):
    recipe = from_png(six.images[3], six.recipes[3], tmp_path)
    assert (recipe["mode"], recipe["prompt"], recipe["seed"]) == ("text", "a red dot", 13)
    assert recipe["model_hash"] == "0123456789" and recipe["stages"] == 3
    assert recipe["guidance"] == {"prior": 2.0, "decoder": 3.0}
    again = model.redraw(recipe)
    np.testing.assert_array_equal(again.images[0], six.images[3])
    assert again.recipes == [six.recipes[3]]


@pytest.mark.parametrize(
    "settings",
    [{"embed": "text", "caption": False}, {"embed": "none", "stages": 2}, {"stages": 1}],
)
def test_a_recipe_has_every_setting_that_was_changed(model, settings, tmp_path):
    drawn = model.generate("a blue bar", n=2, seed=5, decoder={"guidance": 2.5}, **settings)
    recipe = from_png(drawn.images[1], drawn.recipes[1], tmp_path)
    np.testing.assert_array_equal(model.redraw(recipe).images[0], drawn.images[1])


def test_a_variation_is_drawn_again_from_its_recipe_and_the_picture(model, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    drawn = model.variations(
        picture, n=2, seed=3, decoder={"guidance": 1.5}, stages=2, name="cat.jpg"
    )
    recipe = from_png(drawn.images[1], drawn.recipes[1], tmp_path)
    (source,) = recipe["images"]
    assert (source["name"], source["width"], source["height"]) == ("cat.jpg", 30, 40)
    images.write_png(tmp_path / "another name.png", picture)  # the same pixels
    again = model.redraw(recipe, [images.read_image(tmp_path / "another name.png")])
    np.testing.assert_array_equal(again.images[0], drawn.images[1])
    assert again.recipes[0] == drawn.recipes[1]
    picture[0, 0, 0] ^= 1
    for wrong in ([picture], [], [picture, picture]):
        with pytest.raises(errors.ConfigError, match=r"missing 'cat\.jpg' \([0-9a-f]{64}\)"):
            model.redraw(recipe, wrong)


def test_a_noised_small_picture_is_drawn_again_too(parts, tmp_path):
    """The level changes the picture, compiles nothing, and is in the recipe."""
    part = parts["upsampler_0"]
    arch, settings = part.arch | {"noise_level": True}, part.settings | {"noise_level": 0.5}
    task = tasks.make("upsampler", arch, settings)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    params = shaken(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes), 4)
    few = {"clip": parts["clip"], "decoder": parts["decoder"]}
    few["upsampler_0"] = bundle.Part("upsampler_0", arch, params, {}, settings)
    model = UnCLIP(few, batch_size=1)
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    drawn = [
        model.variations(picture, 1, 3, upsamplers=[{"noise_level": level}])
        for level in (0.0, 0.25)
    ]
    assert [program._cache_size() for program in model._compiled.values()] == [1, 1, 1]
    assert not np.array_equal(drawn[0].images, drawn[1].images)
    recipe = from_png(drawn[1].images[0], drawn[1].recipes[0], tmp_path)
    assert recipe["noise_level"] == {"upsampler_0": 0.25}
    np.testing.assert_array_equal(model.redraw(recipe, [picture]).images, drawn[1].images)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_hash": "9876543210"}, "of model 9876543210, this is 0123456789"),
        ({"noise": "given: decoder"}, "noise was given: decoder"),
        ({"seed": "5"}, "seed is '5': expected int"),
        ({"mode": "inpant"}, "unknown mode of a recipe 'inpant'"),
        ({"mode": "variations"}, "mode 'variations' from 0 pictures: expected 1"),
        ({"mode": "interpolate", "images": []}, "from 0 pictures: expected at least 2"),
        ({"images": "x"}, "images are damaged"),
        ({"steps": {"decoders": 3}}, "did you mean 'decoder'"),
        ({"stages": None}, "stages is None"),
    ],
)
def test_a_recipe_that_cannot_be_repeated_says_why(six, model, changes, said):
    with pytest.raises(errors.ConfigError, match=said):
        model.redraw(six.recipes[0] | changes)


def test_a_recipe_of_another_batch_size_warns(six, model):
    with pytest.warns(UserWarning, match="in batches of 64, here of 1"):
        model.redraw(six.recipes[0] | {"batch_size": 64})


def test_nothing_is_compiled_again(six, model):
    """Guidance, seed, prompt and picture count are data of the compiled programs, and nothing is
    computed outside of them that would be compiled for a count."""
    count = lambda: {key: program._cache_size() for key, program in model._compiled.items()}
    before = count()
    compiled = []
    heard = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        changed = model.generate(
            ["a green bar", "a red dot"],
            n=3,
            seed=999,
            prior={"guidance": 1.5, "guidance_low": 0.5},
            decoder={"guidance": 7.5, "guidance_high": 0.9, "guidance_rescale": 0.3},
        )
        assert not compiled
        jax.jit(lambda x: x + len(compiled))(1.0)
        assert compiled  # what is listened for is what JAX says
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert count() == before and set(before.values()) == {1}
    plain = model.generate("a red dot", n=1, seed=999, **FAST)
    assert not np.array_equal(changed.images[3], plain.images[0])  # so the guidance was used
    with pytest.raises(errors.ConfigError, match=r"eta 0\.5 with sampler 'ddpm': only 'ddim'"):
        model.generate("a red dot", decoder={"eta": 0.5})


def test_a_recipe_holds_the_samplers_own_eta(model):
    """Another sampler than the model's brings its eta, which the recipe must say."""
    settings = {"stages": 1, "embed": "none", "decoder": {"sampler": "euler-ancestral", "steps": 2}}
    drawn = model.generate("a red dot", n=1, seed=4, **settings)
    assert drawn.recipes[0]["eta"] == {"decoder": 1.0}
    np.testing.assert_array_equal(model.redraw(drawn.recipes[0]).images, drawn.images)
    settings["decoder"] = settings["decoder"] | {"eta": 0.0}
    still = model.generate("a red dot", n=1, seed=4, **settings)
    assert still.recipes[0]["eta"] == {"decoder": 0.0}
    assert not np.array_equal(still.images, drawn.images)


def test_the_first_stages_alone(six, model):
    small = model.generate("a red dot", n=2, seed=10, stages=1, **FAST)
    np.testing.assert_array_equal(small.images, six.stages["decoder"][:2])
    assert small.recipes[0]["stages"] == 1 and "upsampler_0" not in small.recipes[0]["steps"]
    with pytest.raises(errors.ConfigError, match="stages=0"):
        model.generate("a red dot", stages=0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"stages": 4}, r"stages=4: expected 1 \(the decoder alone\) to 3; .* upsampler_1"),
        ({"stages": 2, "upsamplers": [{}, {"steps": 2}]}, "for 2 upsamplers, of which 1 run"),
        ({"upsamplers": [{}] * 3}, "for 3 upsamplers, of which 2 run: they would"),
        ({"embed": "text", "prior": {"steps": 9}}, r"prior \(steps\) would have no effect"),
        ({"stages": 2, "noise": {"upsampler_1": 0}}, "noise of 'upsampler_1' would have no effect"),
        ({"embed": "text", "noise": {"prior": 0}}, "noise of 'prior' would have no effect"),
        ({"decoder": {"sampler": "eular"}}, "unknown sampler 'eular'"),
        ({"upsamplers": [{"steps": 0}]}, "sampling steps 0"),
    ],
)
def test_what_would_have_no_effect_is_refused(model, monkeypatch, arguments, said):
    """Before anything is drawn."""
    monkeypatch.setattr(model, "_call", None)
    with pytest.raises(errors.ConfigError, match=said):
        model.generate("a red dot", **arguments)
    arguments.pop("embed", None)
    if "prior" not in arguments:
        with pytest.raises(errors.ConfigError, match=said):
            model.variations(np.zeros((8, 8, 3), np.uint8), **arguments)


def test_a_model_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    with pytest.raises(errors.DataError, match="/home/me/none is no bundle"):
        UnCLIP.load("~/none")


def test_what_parts_lack(parts):
    few = lambda found: {mode: found[mode] for mode in ("text", "variations")}
    assert set(lacking(parts).values()) == {""}
    without = lambda *names: {n: part for n, part in parts.items() if n not in names}
    assert few(lacking(without("prior"))) == {"text": "no prior", "variations": ""}
    assert few(lacking(without("clip"))) == {"text": "no clip", "variations": "no clip"}
    blind = lacking(without("decoder"))
    assert blind.pop("upsample") == "" and set(blind.values()) == {"no decoder"}
    assert lacking(without("upsampler_0"))["upsample"] == "no upsampler_0"
    own = parts["decoder"]
    part = dataclasses.replace(own, settings=own.settings | {"embedding": "text"})
    assert few(lacking(without("prior") | {"decoder": part})) == {
        "text": "",
        "variations": "no decoder of z_i",
    }


def test_variations_share_the_embedding(model):
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    drawn = model.variations(picture, n=2, seed=3, stages=1)
    assert drawn.images.shape == (2, 8, 8, 3)
    assert [r["seed"] for r in drawn.recipes] == [3, 4]
    assert drawn.recipes[0]["mode"] == "variations"
    seen = model.variations(for_clip(picture, 16), n=1, seed=4, stages=1)
    np.testing.assert_array_equal(seen.images[0], drawn.images[1])
    other = model.variations(255 - picture, n=2, seed=3, stages=1)
    assert not np.array_equal(other.images, drawn.images)


def test_clip_sees_the_centre_of_a_picture():
    """The shorter side becomes 16; the longer is 21, of which 2 and 3 rows are cut."""
    rows = np.repeat(np.arange(42, dtype=np.uint8)[:, None, None] * 6, 32, axis=1).repeat(3, axis=2)
    seen = for_clip(rows, 16)
    assert seen.shape == (16, 16, 3) and seen.dtype == np.uint8
    centres = (np.arange(2, 18) + 0.5) * 2 - 0.5  # of the 21 rows, in rows of the picture
    assert np.abs(seen[:, 0, 0] - 6 * centres).max() <= 1
    np.testing.assert_array_equal(for_clip(rows.swapaxes(0, 1), 16), seen.swapaxes(0, 1))
    square = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    np.testing.assert_array_equal(for_clip(square, 16), square)


def test_scores_are_cosines(model):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
    prompts = ["a red dot", "a green bar", "a blue square", "a dot", "a bar"]
    z_i, z_t = model.embed_image(pictures), model.embed_text(prompts)
    assert z_i.shape == z_t.shape == (5, 16)
    want = np.sum(np.asarray(unit(z_i)) * np.asarray(unit(z_t)), -1)
    np.testing.assert_allclose(model.score(pictures, prompts), want, rtol=1e-5, atol=1e-6)
    assert np.abs(want).max() <= 1
    np.testing.assert_array_equal(model.embed_text(prompts[3:4]), z_t[3:4])


def test_load_gives_the_same_model(model, parts, tmp_path):
    digest = bundle.write(tmp_path, parts)
    loaded = UnCLIP.load(str(tmp_path), batch_size=4)
    assert loaded.model_hash == digest and set(loaded.parts) == set(model.parts)
    one, two = (m.draw_prior(["a red dot"], [5]) for m in (model, loaded))
    np.testing.assert_array_equal(one, two)
    for name, task in model._tasks.items():
        assert getattr(loaded._tasks[name], "draw", None) == getattr(task, "draw", None)


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (
            ("clip", "decoder"),
            "drawing from a caption needs the part 'prior'; this model has clip, decoder",
        ),
        (("clip", "prior"), "drawing a picture needs the part 'decoder'; this model has clip, "),
        (("prior",), "the prior needs the part 'clip'"),
    ],
)
def test_a_missing_part_is_named(parts, keep, said):
    with pytest.raises(errors.ConfigError, match=said):
        UnCLIP({name: parts[name] for name in keep}).generate("a red dot")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decoder": {"guidence": 1}}, "decoder setting 'guidence': did you mean 'guidance'"),
        ({"prior": {"threshold": 1}}, "unknown prior setting 'threshold'"),
        ({"n": 0}, "n=0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "seed 4294967296"),
    ],
)
def test_bad_settings(model, options, said):
    with pytest.raises(errors.ConfigError, match=said):
        model.generate("a red dot", **options)


@pytest.mark.parametrize("prompt", ["", "  \n", ["a red dot", ""]])
def test_an_empty_prompt_is_refused(model, prompt):
    with pytest.raises(errors.ConfigError, match="is empty") as caught:
        model.generate(prompt)
    assert caught.value.exit_code == 78


def test_a_long_prompt_says_once_where_it_was_cut(model):
    """16 tokens hold the start, 14 of the words, and the end."""
    prompt = " ".join(["red"] * 13 + ["dot", "blue", "bar"])
    with pytest.warns(UserWarning, match="blue bar") as caught:
        model.embed_text([prompt])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = model.embed_text([prompt])
    np.testing.assert_array_equal(again, model.embed_text([" ".join(["red"] * 13 + ["dot"])]))


def test_where_the_embedding_comes_from(model):
    """Section 5.1: z_t in place of z_i, or the caption alone; the decoder is the same."""
    prompts, fast = ["a red dot", "a blue bar"], {"decoder": FAST["decoder"], "stages": 1}
    z_t, seeds = model.embed_text(prompts), [5, 5]
    text = model.generate(prompts, seed=5, embed="text", **fast)
    assert text.recipes[0]["embed"] == "text" and "prior" not in text.recipes[0]["steps"]
    drawn = model.decode(z_t, prompts, seeds, decoder=fast["decoder"], stages=1)["decoder"]
    np.testing.assert_array_equal(text.images, to_uint8(drawn))
    none = model.generate(prompts, seed=5, embed="none", **fast)
    assert not np.array_equal(none.images, text.images)
    other = model.decode(
        10 - z_t, prompts, seeds, drop_image=True, decoder=fast["decoder"], stages=1
    )["decoder"]
    np.testing.assert_array_equal(none.images, to_uint8(other))
    silent = model.generate(prompts, seed=5, embed="text", caption=False, **fast)
    assert silent.recipes[0]["caption"] is False
    drawn = model.decode(z_t, None, seeds, decoder=fast["decoder"], stages=1)["decoder"]
    np.testing.assert_array_equal(silent.images, to_uint8(drawn))
    assert not np.array_equal(silent.images, text.images)


def test_a_decoder_of_text_embeddings_needs_no_prior(parts):
    own = parts["decoder"]
    part = bundle.Part(
        "decoder", own.arch, own.params, own.extra, own.settings | {"embedding": "text"}
    )
    model = UnCLIP({"clip": parts["clip"], "decoder": part}, batch_size=4)
    drawn = model.generate("a red dot", 1, **{"decoder": FAST["decoder"]})
    assert drawn.recipes[0]["embed"] == "text"
    with pytest.raises(errors.ConfigError, match=r"'text' or 'none'"):
        model.generate("a red dot", 1, embed="prior")
    with pytest.raises(errors.ConfigError, match=r"prior \(guidance\) would have no effect"):
        model.generate("a red dot", 1, prior={"guidance": 2.0})
    with pytest.raises(errors.ConfigError, match="variations need a decoder of z_i"):
        model.variations(drawn.images[0], 1)


def test_a_seed_for_every_prompt(model):
    prompts, fast = ["a red dot", "a blue bar"], {**FAST, "stages": 1}
    both = model.generate(prompts, 2, [3, 8], **fast)
    assert [r["seed"] for r in both.recipes] == [3, 4, 8, 9]
    alone = model.generate(prompts[1], 1, 9, **fast)
    np.testing.assert_array_equal(both.images[3], alone.images[0])
    with pytest.raises(errors.ConfigError, match="3 seeds for 2 prompts"):
        model.generate(prompts, 2, [1, 2, 3])


@pytest.mark.slow
def test_a_mesh_draws_the_same_pictures(parts, six):
    """Rows over data and fsdp, parameters sharded: rounding apart, what one device draws."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    model = UnCLIP(parts, batch_size=8, mesh=mesh)
    drawn = model.generate("a red dot", n=6, seed=10, **FAST)
    for name, pictures in drawn.stages.items():
        apart = np.abs(pictures.astype(int) - six.stages[name])
        assert apart.max() <= 1, name
    with pytest.raises(errors.ConfigError, match="batch_size 6 is not a multiple of 4 devices"):
        UnCLIP(parts, batch_size=6, mesh=mesh)


@pytest.mark.slow
def test_a_text_only_decoder_needs_no_prior(parts):
    """GLIDE's form: the decoder reads the caption, no z_i is drawn or used."""
    arch = dict(parts["decoder"].arch) | {"use_z_i": False}
    task = tasks.make("decoder", arch, parts["decoder"].settings, clip=parts["clip"].arch)
    params = shaken(jax.device_get(jax.jit(task.init)(jax.random.key(0))))
    decoder = bundle.Part("decoder", arch, params, {}, parts["decoder"].settings)
    glide = UnCLIP({"clip": parts["clip"], "decoder": decoder}, batch_size=2)
    drawn = glide.generate(["a red dot", "a blue bar"], seed=4)
    assert drawn.images.shape == (2, 8, 8, 3) and "prior" not in drawn.recipes[0]["steps"]
    assert not np.array_equal(*drawn.images)


# =============================================================================== injected noise

SHAPES = {"prior": (16,), "decoder": (8, 8, 3), "upsampler_0": (16, 16, 3)}
STEPS = 2
ONE = FAST | {"prior": {"guidance": 2.0, "candidates": 1}}


def noise_for(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: np.float32(rng.standard_normal((1 + STEPS, rows, *shape)))
        for name, shape in SHAPES.items()
    }


@pytest.fixture(scope="module")
def noisy(parts):
    """A cascade whose every stage draws noise, three pictures at once."""
    changed = {}
    for name in ("clip", "prior", "decoder", "upsampler_0"):
        part = parts[name]
        draw = dict(part.settings.get("draw", {})) | {"sampler": "ddpm", "steps": STEPS}
        settings = part.settings if name == "clip" else part.settings | {"draw": draw}
        changed[name] = bundle.Part(name, part.arch, part.params, part.extra, settings)
    return UnCLIP(changed, batch_size=3)


def test_given_noise_is_all_there_is(noisy):
    """Seeds no longer matter, rows keep their own noise, and padding rows are harmless."""
    noise = noise_for(4)
    want = noisy.generate("a red dot", n=4, seed=0, noise=noise, **ONE)
    assert want.recipes[0]["noise"] == "given: prior, decoder, upsampler_0"
    for name, pictures in noisy.generate("a red dot", 4, 77, noise=noise, **ONE).stages.items():
        np.testing.assert_array_equal(pictures, want.stages[name], err_msg=name)
    for row in (0, 3):
        alone = {name: values[:, row : row + 1] for name, values in noise.items()}
        drawn = noisy.generate("a red dot", noise=alone, **ONE)
        np.testing.assert_array_equal(drawn.images[0], want.images[row])
    assert len({picture.tobytes() for picture in want.images}) == 4


@pytest.mark.parametrize("name", SHAPES)
def test_every_entry_of_the_noise_counts_but_the_last(noisy, name):
    def last(noise):
        if name == "prior":
            return noisy.draw_prior(["a red dot"], [0], candidates=1, noise=noise)
        z_i = np.ones((1, 16), np.float32)
        return noisy.decode(z_i, ["a red dot"], [0], noise=noise)[name]

    noise = noise_for(1)
    want = last(noise)
    for entry in range(1 + STEPS):
        changed = noise | {name: noise[name].copy()}
        changed[name][entry] *= -1
        same = np.allclose(last(changed), want, atol=1e-4)
        assert same == (entry == STEPS), entry


@pytest.mark.slow
def test_a_stage_without_given_noise_draws_its_own(noisy):
    noise = {"prior": noise_for(2)["prior"]}
    z_i = noisy.draw_prior(["a red dot"] * 2, [3, 4], noise=noise, candidates=1)
    drawn = noisy.decode(z_i, ["a red dot"] * 2, [3, 4], noise=noise)
    np.testing.assert_array_equal(
        drawn["upsampler_0"], noisy.decode(z_i, ["a red dot"] * 2, [3, 4])["upsampler_0"]
    )


def test_noise_for_variations(noisy):
    picture = np.random.default_rng(0).integers(0, 256, (20, 16, 3), np.uint8)
    noise = noise_for(2)
    del noise["prior"]
    one, two = (noisy.variations(picture, 2, seed, noise=noise).images for seed in (0, 5))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, noisy.variations(picture, 2, 0).images)


@pytest.mark.parametrize(
    ("noise", "prior", "said"),
    [
        ({"decodr": None}, 1, "unknown stage of noise 'decodr': did you mean 'decoder'"),
        (
            {"prior": np.zeros((3, 2, 16))},
            1,
            r"noise of prior has shape \(3, 2, 16\); expected \(3, 1, 16\): x_T, then one a step",
        ),
        (
            {"decoder": np.zeros((2, 1, 8, 8, 3))},
            1,
            r"noise of decoder .* expected \(3, 1, 8, 8, 3\)",
        ),
        ({"prior": np.zeros((3, 1, 16))}, 2, "noise for the prior with candidates=2"),
    ],
)
def test_bad_noise(noisy, noise, prior, said):
    with pytest.raises(errors.ConfigError, match=said):
        noisy.generate("a red dot", noise=noise, prior={"candidates": prior})


# ================================================================== parts that are no stages


def test_two_networks_share_one_upsampler(noisy):
    """`upsampler_0_last` makes the last step of `upsampler_0` and is no stage of its own."""
    parts = noisy.parts
    first = parts["upsampler_0"]
    arch = dict(first.arch) | {"dropout": 0.1}  # it was trained on, in other ways than the first
    last = bundle.Part("upsampler_0_last", arch, shaken(first.params, 9), {}, {})
    both = UnCLIP(parts | {"upsampler_0_last": last}, batch_size=3)
    assert both.upsamplers == ["upsampler_0"] and set(both._tasks) <= {"clip", *STAGE_TAGS}
    drawn, plain = (m.generate("a red dot", noise=noise_for(1), **ONE) for m in (both, noisy))
    assert list(drawn.stages) == ["decoder", "upsampler_0"] and drawn.recipes == plain.recipes
    np.testing.assert_array_equal(drawn.stages["decoder"], plain.stages["decoder"])
    assert not np.array_equal(drawn.images, plain.images)
    runs.check_fit(both.parts)

    other = dict(first.arch) | {"groups": 4}
    odd = bundle.Part("upsampler_0_last", other, last.params, {}, {})
    with pytest.raises(errors.ConfigError, match="upsampler_0_last has another architecture"):
        UnCLIP(parts | {"upsampler_0_last": odd})


@pytest.mark.slow
def test_a_decoder_that_reads_t5_needs_no_clip(parts):
    """Imagen's form: the caption through T5's own tokenizer (here bytes), and nothing else."""
    t5_arch = {
        "vocab_size": 384,
        "width": 16,
        "mlp_width": 16,
        "head_dim": 8,
        "heads": 2,
        "layers": 1,
    }
    t5 = FrozenT5(T5Encoder(**t5_arch))
    arch = dict(parts["decoder"].arch) | {
        "use_z_i": False,
        "use_z_t": False,
        "text_context": 12,
        "learned_null_text": False,
    }
    settings = dict(parts["decoder"].settings) | {"text_encoder": "t5"}
    task = tasks.make("decoder", arch, settings, t5=t5_arch)
    init = lambda function: shaken(jax.device_get(jax.jit(function)(jax.random.key(0))))
    t5_part = bundle.Part("t5", t5_arch, init(t5.init), {}, {})
    decoder = bundle.Part("decoder", arch, init(task.init), {}, settings)
    model = UnCLIP({"t5": t5_part, "decoder": decoder}, batch_size=2)
    drawn = model.generate(["a red dot", "a Red dot"], seed=4)  # T5 minds capitals
    assert drawn.images.shape == (2, 8, 8, 3) and not np.array_equal(*drawn.images)
    np.testing.assert_array_equal(model.generate("a Red dot", seed=4).images[0], drawn.images[1])
    with pytest.warns(UserWarning, match="11 fit"):  # T5's tokens end, they do not start
        model.generate("a red dot far away", seed=4)
    with pytest.raises(errors.ConfigError, match="the decoder needs the part 't5'"):
        UnCLIP({"decoder": decoder})


def test_parts_that_draw_nothing_are_left_alone(parts, noisy):
    inception = bundle.Part("inception", {"class": "Inception"}, {"w": np.ones(3)}, {}, {})
    model = UnCLIP(parts | {"inception": inception}, batch_size=3)
    assert model.upsamplers == ["upsampler_0", "upsampler_1"]
    assert model.generate("a red dot", stages=1, **FAST).images.shape == (1, 8, 8, 3)


def test_to_uint8_rounds_once():
    values = np.float32([-2, -1, 0, 0.9999, 1, 3])
    np.testing.assert_array_equal(to_uint8(values), [0, 0, 128, 255, 255, 255])
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(every / np.float32(127.5) - 1), every)
