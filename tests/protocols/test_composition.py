"""The judge of composed scenes: what it sees on true pictures, and every fact it must catch."""

import numpy as np
import pytest
from PIL import Image

from unclip import protocols
from unclip.errors import ConfigError
from unclip.protocols import base, scenes
from unclip.protocols.composition import MEASURES, relation
from unclip.protocols.detector import Detector


@pytest.fixture(scope="module")
def withheld():
    return protocols.make("scenes-withheld", count=24, size=64)


@pytest.fixture(scope="module")
def true(withheld):
    reference = withheld.reference()
    return np.stack([reference.read(i) for i in range(len(reference))])


@pytest.fixture(scope="module")
def detect(withheld):
    return withheld._detector


def compose(protocol, objects, colour):
    """A picture of (name, longer side, x, y) on a colour, made apart from `scenes.Composer`."""
    canvas = Image.new("RGBA", (64, 64), (*scenes.COLOURS[colour], 255))
    for name, side, x, y in objects:
        cutout = protocol._composer.cutouts[name].pixels
        shape = [max(1, round(s * side / max(cutout.size))) for s in cutout.size]
        layer = np.asarray(cutout.resize(shape, Image.Resampling.BOX), float)
        alpha = layer[..., 3:]
        straight = np.where(alpha > 0, layer[..., :3] * 255 / np.maximum(alpha, 1), 0)
        rgba = np.concatenate([straight.clip(0, 255), alpha], axis=-1).astype(np.uint8)
        canvas.alpha_composite(Image.fromarray(rgba), (x, y))
    return np.array(canvas.convert("RGB"))


@pytest.mark.slow
def test_true_scenes_have_every_fact(withheld, true):
    values, facts = withheld.judge(true)
    assert values["composition.objects"] >= 0.95 and values["composition.all"] >= 0.9
    assert values["composition.background"] == 1
    assert all(len(f["objects"]) == len(r["objects"]) for f, r in zip(facts, withheld._records))
    # The calibration beside it: these very pictures are the ceiling, and chance is far below.
    for measure in MEASURES:
        assert values[f"composition.ceiling.{measure}"] == values[f"composition.{measure}"]
        assert values[f"composition.chance.{measure}"] < 0.5
    kinds = withheld.provenance["kinds"]
    assert {"withheld-colour", "withheld-relation"} <= set(kinds)
    assert all(f"composition.{kind}.all" in values for kind in kinds)
    assert "composition.single.relation" not in values


def test_boxes_and_names_at_32_pixels():
    protocol = protocols.make("scenes", count=24, size=32)
    reference, right = protocol.reference(), 0
    for i, record in enumerate(protocol._records):
        background, found = protocol._detector(reference.read(i))
        assert background == record["background"]["name"]
        places = {one.name: one.box for one in found}
        for entry in record["objects"]:
            box = places.get(entry["name"])
            right += box is not None and np.abs(np.subtract(box, entry["box"])).max() <= 1
    assert right >= 0.9 * sum(len(record["objects"]) for record in protocol._records)


def test_another_size_is_judged_at_the_judges(withheld, true):
    large = np.stack([np.array(Image.fromarray(p).resize((128, 128), 0)) for p in true[:4]])
    assert withheld.judge(large, rows=range(4))[1] == withheld.judge(true[:4], rows=range(4))[1]
    with pytest.raises(ConfigError, match="uint8"):
        withheld.judge(true.astype(np.float32))
    with pytest.raises(ConfigError, match="3 given for 24 rows"):
        withheld.judge(true[:3])


# A caption's picture, drawn apart from the composer, and what can be wrong with it.
RIGHT = [("fox", 27, 3, 18), ("key", 15, 44, 24)]
WRONG = {
    "relation": [("fox", 27, 33, 18), ("key", 15, 6, 24)],
    "objects": [("lion", 27, 3, 18), ("key", 15, 44, 24)],
    "size": [("fox", 15, 8, 24), ("key", 15, 44, 24)],
}


@pytest.fixture
def fox_and_key(withheld, monkeypatch):
    """One caption: a large fox to the left of a small key on a blue background."""
    record = {
        "background": {"name": "blue"},
        "relation": "to the left of",
        "withheld": [],
        "objects": [{"name": "fox", "size": "large"}, {"name": "key", "size": "small"}],
    }
    monkeypatch.setattr(withheld, "_records", [record])
    return lambda objects, colour: withheld.facts(
        0, *withheld._detector(compose(withheld, objects, colour))
    )


def test_a_right_picture_is_all_right(fox_and_key):
    facts = fox_and_key(RIGHT, "blue")
    assert facts["all"] and facts["relation"] and facts["nothing_else"]
    assert facts["seen"] == "large fox to the left of small key on blue"


@pytest.mark.parametrize("wrong", WRONG)
def test_each_wrong_fact_is_caught_alone(fox_and_key, wrong):
    facts = fox_and_key(WRONG[wrong], "blue")
    assert not facts["all"] and not np.all(facts[wrong])
    unaffected = {"relation": ("objects", "size"), "objects": (), "size": ("objects", "relation")}
    assert facts["background"] and all(np.all(facts[name]) for name in unaffected[wrong])
    if wrong == "objects":
        assert facts["objects"] == [False, True] and not facts["nothing_else"]


def test_a_second_copy_is_something_else(fox_and_key):
    facts = fox_and_key([("fox", 27, 3, 18), ("fox", 15, 44, 24)], "blue")
    assert facts["objects"] == [True, False] and not facts["nothing_else"]


def test_another_background_is_caught(fox_and_key):
    facts = fox_and_key(RIGHT, "purple")
    assert not facts["background"] and not facts["all"]
    assert facts["relation"] and facts["objects"] == [True, True]


def test_one_of_two_and_none(fox_and_key):
    facts = fox_and_key(RIGHT[:1], "blue")
    assert facts["objects"] == [True, False] and not facts["relation"] and facts["nothing_else"]
    facts = fox_and_key([], "blue")
    assert facts["objects"] == facts["size"] == [False, False]
    assert facts["seen"] == "nothing on blue"


def test_noise_is_no_object(detect):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert detect(noise)[1] == []
    grey = np.random.default_rng(1).normal(150, 12, (64, 64, 3)).clip(0, 255).astype(np.uint8)
    assert detect(grey) == ("grey", [])


def test_the_fit_of_an_exact_copy_is_one(withheld, true, detect):
    for record, picture in zip(withheld._records[:6], true):
        fits = [one.fit for one in detect(picture)[1]]
        assert len(fits) == len(record["objects"]) and min(fits) > 0.85 and max(fits) < 1.1


def test_judging_twice_gives_the_same(withheld, true):
    again = Detector(withheld._composer.cutouts, 64)
    assert [again(p) for p in true[:4]] == [withheld._detector(p) for p in true[:4]]


@pytest.mark.parametrize(
    "delta, words",
    [
        ((-10, 3), "to the left of"),
        ((10, -3), "to the right of"),
        ((2, -9), "above"),
        ((-2, 9), "below"),
    ],
)
def test_relation_of_boxes(delta, words):
    x, y = delta
    assert relation((20 + x, 20 + y, 30 + x, 30 + y), (20, 20, 30, 30)) == words


def test_scenes_are_a_function_of_their_settings(withheld):
    again = protocols.make("scenes-withheld", count=24, size=64)
    assert again.prompts == withheld.prompts and again.keys == withheld.keys
    assert again.provenance == withheld.provenance
    assert withheld.id == "scenes-withheld.seed0.n24.size64"
    fewer = protocols.make("scenes-withheld", count=5, size=32)
    assert fewer.prompts[0].split()[-2:] == withheld.prompts[0].split()[-2:]
    other = protocols.make("scenes-withheld", count=5, seed=3)
    assert other.provenance["captions_sha256"] != fewer.provenance["captions_sha256"]
    for i in range(24):
        picture, caption, record = withheld._composer.scene(i)
        assert caption == withheld.prompts[i] and record["withheld"]
        assert withheld.reference().caption(i) == caption
        assert (withheld.reference().read(i) == np.asarray(picture)).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"count": 0}, "0 scenes"),
        ({"size": 2000}, "2000 pixels"),
        ({"size": 8}, "at least 16"),
        ({"seed": -1}, "seed"),
        ({"size": 33}, "even over 32"),
        ({"sise": 64}, "did you mean 'size'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        protocols.make("scenes", **settings)


def test_resized():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    assert base.resized(pictures, 8) is pictures
    means = pictures.reshape(2, 4, 2, 4, 2, 3).mean((2, 4))
    assert np.abs(base.resized(pictures, 4) - means).max() <= 1  # rounded a side at a time
    assert base.resized(pictures[:0], 4).shape == (0, 4, 4, 3)
