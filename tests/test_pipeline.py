"""The cascade as a value: pictures that depend on their seed alone, recipes that repeat them."""

import warnings

import jax
import numpy as np
import pytest

from unclip import bundle, errors, tasks
from unclip.pipeline import UnCLIP, to_uint8
from unclip.tasks.clip import unit

pytestmark = pytest.mark.usefixtures("quick_compiles")
FAST = {"prior": {"guidance": 2.0}, "decoder": {"guidance": 3.0}}


def shaken(tree, seed=0):
    """Parameters of a net that is not silent: fresh U-Nets end in zeros."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: np.float32(leaf + 0.1 * rng.standard_normal(leaf.shape)), tree)


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
        "decoder": (6, 8, 8, 3), "upsampler_0": (6, 16, 16, 3), "upsampler_1": (6, 32, 32, 3)}
    assert all(v.dtype == np.uint8 for v in six.stages.values())
    np.testing.assert_array_equal(six.images, six.stages["upsampler_1"])
    assert len(six) == 6 and len({picture.tobytes() for picture in six.images}) == 6


@pytest.mark.parametrize("k", [0, 1, 5])
def test_a_picture_is_the_same_alone(six, model, k):
    """Picture k of seed s is picture 0 of seed s + k, every bit of every stage."""
    alone = model.generate("a red dot", n=1, seed=10 + k, **FAST)
    for name, pictures in alone.stages.items():
        np.testing.assert_array_equal(pictures[0], six.stages[name][k], err_msg=name)


def test_prompts_beside_it_do_not_matter(six, model):
    both = model.generate(["a blue bar", "a red dot"], n=2, seed=11, **FAST)
    np.testing.assert_array_equal(both.images[2:], six.images[1:3])
    assert not np.array_equal(both.images[0], both.images[2])
    assert [r["prompt"] for r in both.recipes] == ["a blue bar"] * 2 + ["a red dot"] * 2
    assert [r["seed"] for r in both.recipes] == [11, 12, 11, 12]


def test_a_recipe_repeats_its_picture(six, model):
    recipe = six.recipes[3]
    assert (recipe["mode"], recipe["prompt"], recipe["seed"]) == ("text", "a red dot", 13)
    assert recipe["model_hash"] == "0123456789" and recipe["stages"] == 3
    settings = {}
    for setting, values in recipe.items():
        if isinstance(values, dict):
            for stage, value in values.items():
                settings.setdefault(stage, {})[setting] = value
    assert settings["decoder"]["guidance"] == 3.0 and settings["prior"]["guidance"] == 2.0
    again = model.generate(
        recipe["prompt"], 1, recipe["seed"], prior=settings["prior"], decoder=settings["decoder"],
        upsamplers=[settings[name] for name in model.upsamplers], stages=recipe["stages"])
    np.testing.assert_array_equal(again.images[0], six.images[3])
    assert again.recipes == [recipe]


def test_nothing_is_compiled_again(six, model):
    """Guidance, seed, prompt and picture count are data of the compiled programs."""
    count = lambda: {key: program._cache_size() for key, program in model._compiled.items()}
    before = count()
    changed = model.generate(
        ["a green bar", "a red dot"], n=3, seed=999, prior={"guidance": 1.5},
        decoder={"guidance": 7.5})
    assert count() == before and set(before.values()) == {1}
    plain = model.generate("a red dot", n=1, seed=999, **FAST)
    assert not np.array_equal(changed.images[3], plain.images[0])  # so the guidance was used
    with pytest.raises(errors.ConfigError, match=r"eta 0\.5 with sampler 'ddpm'; only 'ddim'"):
        model.generate("a red dot", decoder={"eta": 0.5})


def test_the_first_stages_alone(six, model):
    small = model.generate("a red dot", n=2, seed=10, stages=1, **FAST)
    np.testing.assert_array_equal(small.images, six.stages["decoder"][:2])
    assert small.recipes[0]["stages"] == 1 and "upsampler_0" not in small.recipes[0]["steps"]
    with pytest.raises(errors.ConfigError, match="stages=0"):
        model.generate("a red dot", stages=0)


def test_variations_share_the_embedding(model):
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    drawn = model.variations(picture, n=2, seed=3, stages=1)
    assert drawn.images.shape == (2, 8, 8, 3)
    assert [r["seed"] for r in drawn.recipes] == [3, 4]
    assert drawn.recipes[0]["mode"] == "variations"
    cropped = model.variations(picture[5:35], n=1, seed=4, stages=1)
    np.testing.assert_array_equal(cropped.images[0], drawn.images[1])
    other = model.variations(255 - picture, n=2, seed=3, stages=1)
    assert not np.array_equal(other.images, drawn.images)


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
        (("clip", "decoder"), "drawing from a caption needs the part 'prior'; this model has clip, "
                              "decoder"),
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
        ({"upsamplers": [{}, {}, {}]}, "settings for 3 upsamplers; this model has 2"),
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


def test_to_uint8_rounds_once():
    values = np.float32([-2, -1, 0, 0.9999, 1, 3])
    np.testing.assert_array_equal(to_uint8(values), [0, 0, 128, 255, 255, 255])
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(every / np.float32(127.5) - 1), every)
