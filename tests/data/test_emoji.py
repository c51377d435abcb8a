"""The embedded emoji shards and the scenes composed from them."""

import hashlib
import importlib.util
import io
import json
import pathlib
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from unclip.errors import ConfigError, DataError

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "data" / "emoji"


@pytest.fixture(scope="module")
def prepare():
    """data/emoji/prepare.py, which is a program outside the package."""
    spec = importlib.util.spec_from_file_location("emoji_prepare", FOLDER / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shards():
    """Split -> key -> {extension: bytes}; the split is the name of the shard."""
    found = {"train": {}, "held-out": {}}
    for path in sorted(FOLDER.glob("*.tar")):
        split = found[path.name.rsplit("-", 1)[0]]
        with tarfile.open(path) as shard:
            for entry in shard:
                key, extension = entry.name.split(".", 1)
                sample = split.setdefault(key, {})
                assert extension not in sample
                assert (entry.mtime, entry.uid, entry.uname) == (0, 0, "")
                sample[extension] = shard.extractfile(entry).read()
    return found


@pytest.fixture(scope="module")
def records(shards):
    return {
        split: {key: json.loads(sample["json"]) for key, sample in part.items()}
        for split, part in shards.items()
    }


def test_every_picture_is_there_once(shards):
    assert len(shards["train"]) + len(shards["held-out"]) == 3391
    assert not set(shards["train"]) & set(shards["held-out"])
    assert 0.04 < len(shards["held-out"]) / 3391 < 0.06
    for part in shards.values():
        assert all(set(sample) == {"webp", "txt", "json"} for sample in part.values())


def test_size_of_the_repository():
    assert sum(path.stat().st_size for path in FOLDER.glob("*")) <= 20_000_000


def test_no_variant_of_a_held_out_emoji_is_in_train(shards, records):
    """Checked from the code points alone: tones, gender signs, direction and FE0F removed."""

    def stem(key):
        people = re.sub("1f46[89]", "1f9d1", key)
        return re.sub("-(1f3f[b-f]|fe0f)|-200d-(2640|2642|27a1)(-fe0f)?", "", people).lstrip("0")

    train, held_out = ({stem(key) for key in shards[split]} for split in ("train", "held-out"))
    assert not train & held_out
    bases = [{r["base"] for r in part.values()} for part in records.values()]
    assert not bases[0] & bases[1]
    pictures = [{hashlib.sha256(s["webp"]).digest() for s in p.values()} for p in shards.values()]
    assert not pictures[0] & pictures[1]


def test_split_is_the_hash_rule(prepare, records):
    for split, part in records.items():
        for record in part.values():
            assert prepare.is_held_out(record["base"]) == (split == "held-out")


def test_pictures_are_emoji_on_white(shards):
    samples = [sample for part in shards.values() for sample in part.values()]
    corners = []
    for sample in samples[::9]:
        picture = Image.open(io.BytesIO(sample["webp"]))
        assert picture.mode == "RGB" and picture.size == (256, 256)
        pixels = np.asarray(picture)
        corners.append(pixels[[0, 0, -1, -1], [0, -1, 0, -1]].min() >= 250)
        assert pixels.std() > 5
    assert np.mean(corners) > 0.9


def test_names_keywords_and_tones(shards, records):
    every = records["train"] | records["held-out"]
    for key, record in every.items():
        assert record["code_points"] == key and record["name"] and record["group"]
        assert (record["skin_tone"] is not None) == bool(re.search("1f3f[b-f]", key))
    apple = every["1f34e"]
    assert (apple["name"], apple["group"]) == ("red apple", "food & drink")
    assert "fruit" in apple["keywords"] and apple["skin_tone"] is None
    assert every["1f44b-1f3fd"]["skin_tone"] == ["medium"]
    assert every["39-fe0f-20e3"]["name"] == every["0039-fe0f-20e3"]["name"] == "keycap: 9"
    assert every["1f3f4-e0067-e0062-e0073-e0063-e0074"]["name"] == "flag: Scotland"
    text = {key: s["txt"].decode() for part in shards.values() for key, s in part.items()}
    assert text["1f34e"] == "red apple, diet, food, fruit, health, ripe"
    assert all(t.strip() and "\n" not in t for t in text.values())


@pytest.mark.parametrize(
    "name, keywords, expected",
    [
        ("red apple", ["apple", "fruit"], "red apple, fruit"),
        ("flag: Japan", ["JP", "flag"], "flag, Japan, JP"),
        ("sun", [], "sun"),
        ("man office worker", ["office worker", "white-collar"], "man office worker, white-collar"),
    ],
)
def test_caption_repeats_no_word_of_the_name(prepare, name, keywords, expected):
    assert prepare.caption(name, keywords) == expected


def test_shards_can_be_written_again_byte_for_byte(prepare, shards, tmp_path):
    samples = [{"__key__": key, **sample} for key, sample in shards["held-out"].items()]
    [path] = prepare.write_shards(tmp_path, "held-out", iter(samples), len(samples))
    assert path.read_bytes() == (FOLDER / "held-out-0000.tar").read_bytes()


def test_shards_are_even_and_lose_nothing(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLES_A_SHARD", 4)
    samples = ({"__key__": f"{i}", "txt": b"x"} for i in range(10))
    paths = prepare.write_shards(tmp_path, "part", samples, 10)
    keys = []
    for path in paths:
        with tarfile.open(path) as shard:
            keys.append(shard.getnames())
    assert [len(k) for k in keys] == [3, 3, 4]
    assert [name for names in keys for name in names] == [f"{i}.txt" for i in range(10)]


def test_wrong_or_missing_package_is_refused(prepare, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        prepare.samples(tmp_path)
    (tmp_path / prepare.PICTURES[1]).write_bytes(b"something else")
    with pytest.raises(DataError, match="SHA-256"):
        prepare.samples(tmp_path)


@pytest.fixture(scope="module")
def composers(prepare):
    """A composer of training scenes and one of withheld scenes that share the cutouts."""
    train = prepare.scenes.Composer(FOLDER, size=64, seed=3)
    withheld = prepare.scenes.Composer.__new__(prepare.scenes.Composer)
    vars(withheld).update(vars(train), withheld=True)
    return train, withheld


def test_matte_takes_white_away_and_keeps_the_object(prepare):
    """A disc with a soft edge, an enclosed hole and a white spot too small to be one."""
    rows, columns = np.mgrid[:96, :96] - 47.5
    radius = np.hypot(rows, columns)
    alpha = np.clip(36.5 - radius, 0, 1) * np.clip(radius - 11.5, 0, 1)
    colour = np.array([200.0, 60.0, 30.0])
    picture = (alpha[..., None] * colour + (1 - alpha[..., None]) * 255).round().astype(np.uint8)
    picture[20:24, 46:50] = 255
    found = prepare.scenes.matte(picture)
    alpha[20:24, 46:50] = 1
    assert np.abs(found[..., 3] - alpha).max() < 0.1
    assert found[48, 48, 3] == 0 and found[22, 48].tolist() == [1, 1, 1, 1]
    # The edge has the object's own colour: no white is left in it.
    edge = (alpha > 0.3) & (alpha < 0.9)
    own = found[edge][:, :3] / found[edge][:, 3:]
    assert edge.sum() > 50 and np.abs(own * 255 - colour).max() < 40


def test_a_scene_is_a_function_of_seed_and_index(prepare, composers):
    first, second = composers[0].sample(17), composers[0].sample(17)
    assert first == second and first["__key__"] == "00000017"
    assert composers[0].sample(18)["webp"] != first["webp"]
    other = prepare.scenes.Composer.__new__(prepare.scenes.Composer)
    vars(other).update(vars(composers[0]), seed=4)
    assert other.scene(17)[1:] != composers[0].scene(17)[1:]


CAPTION = re.compile(
    r"a (small|large|huge) ([\w ]+?)"
    r"(?: (to the left of|to the right of|above|below) a (small|large) ([\w ]+?))?"
    r" on an? (\w+) background"
)


@pytest.mark.parametrize("which", [0, 1])
def test_caption_record_and_picture_agree(prepare, composers, which):
    longest = {"small": (0.18, 0.28), "large": (0.38, 0.48), "huge": (0.66, 0.86)}
    seen = set()
    for index in range(150):
        picture, caption, record = composers[which].scene(index)
        size, name, relation, other_size, other, colour = CAPTION.fullmatch(caption).groups()
        objects = record["objects"]
        assert [o["name"] for o in objects] == [name, other][: 1 + bool(other)]
        assert [o["size"] for o in objects] == [size, other_size][: 1 + bool(other)]
        assert record["relation"] == relation and record["background"]["name"] == colour
        assert ("an orange" in caption) == (colour == "orange") and name != other
        pixels = np.asarray(picture).astype(int)
        background = np.array(record["background"]["rgb"])
        outside = np.ones((64, 64), bool)
        for entry in objects:
            x0, y0, x1, y1 = entry["box"]
            assert 0 < x0 < x1 < 64 and 0 < y0 < y1 < 64
            low, high = longest[entry["size"]]
            assert low <= max(x1 - x0, y1 - y0) / 64 <= high
            assert np.abs(pixels[y0:y1, x0:x1] - background).max() > 20
            outside[y0:y1, x0:x1] = False
        assert (pixels[outside] == background).all()
        if relation:
            a, b = (np.array(o["box"], float) for o in objects)
            # Horizontally or vertically apart, and clearly more so than across.
            along = 0 if "left" in relation or "right" in relation else 1
            first, second = (a, b) if relation in ("to the left of", "above") else (b, a)
            assert first[along + 2] <= second[along]
            delta = np.abs((a[:2] + a[2:] - b[:2] - b[2:]) / 2)
            assert delta[1 - along] < delta[along] * 0.6
        seen.add(relation)
    assert len(seen) >= 4


def test_training_never_holds_a_withheld_combination(prepare, composers):
    """Decided here from the record alone, in both wordings of a relation."""
    scenes = prepare.scenes
    mirror = {"to the left of": "to the right of", "above": "below"}
    mirror |= {word: opposite for opposite, word in mirror.items()}
    forbidden = set(scenes.WITHHELD_RELATIONS)
    forbidden |= {(b, mirror[relation], a) for a, relation, b in forbidden}

    def held(names, colour, relation):
        pairs = {(name, colour) for name in names} & set(scenes.WITHHELD_COLOURS)
        return bool(pairs) or (names[0], relation, names[-1]) in forbidden

    for composer, expected in zip(composers, (False, True), strict=True):
        for index in range(3000):
            content = composer._content(np.random.default_rng([index, expected]))
            assert held(*content) == expected
            assert bool(scenes.withheld_in(*content)) == expected
    # The filter works at all: without it, several of these would hold one.
    _, _, record = composers[1].scene(5)
    assert record["withheld"]


def test_withheld_scenes_cover_every_combination(prepare, composers):
    scenes = prepare.scenes
    found = set()
    for index in range(600):
        content = composers[1]._content(np.random.default_rng(index))
        found.update(scenes.withheld_in(*content))
    assert len(found) == len(scenes.WITHHELD_COLOURS) + len(scenes.WITHHELD_RELATIONS)


def test_either_wording_of_a_withheld_relation_is_recognised(prepare):
    scenes = prepare.scenes
    opposite = {"to the left of": "to the right of", "above": "below"}
    opposite |= {word: other for other, word in opposite.items()}
    for first, relation, second in scenes.WITHHELD_RELATIONS:
        words = [f"{first} {relation} {second}"]
        assert words == scenes.withheld_in([first, second], "plaid", relation)
        assert words == scenes.withheld_in([second, first], "plaid", opposite[relation])
        assert not scenes.withheld_in([second, first], "plaid", relation)
        assert not scenes.withheld_in([first], "plaid", None)


def test_withheld_lists_name_things_that_exist(prepare):
    scenes = prepare.scenes
    names = set(scenes.SCENE_OBJECTS)
    assert len(names) == len(scenes.SCENE_OBJECTS)
    assert {n for n, _ in scenes.WITHHELD_COLOURS} <= names
    assert {c for _, c in scenes.WITHHELD_COLOURS} <= set(scenes.COLOURS)
    assert {n for a, _, b in scenes.WITHHELD_RELATIONS for n in (a, b)} <= names
    assert {r for _, r, _ in scenes.WITHHELD_RELATIONS} <= set(scenes.RELATIONS)


def test_scenes_never_show_a_held_out_emoji(composers, records):
    shown = {cutout.code_points for cutout in composers[0].cutouts.values()}
    assert shown <= set(records["train"])


def test_command_line_writes_scenes(prepare, composers, tmp_path, capsys):
    prepare.main(["--scenes", "3", "--size", "64", "--seed", "3", "--out", str(tmp_path / "new")])
    with tarfile.open(tmp_path / "new" / "scenes-0000.tar") as shard:
        assert len(shard.getnames()) == 9
        written = {name: shard.extractfile(name).read() for name in shard.getnames()}
    sample = composers[0].sample(2)
    for extension in ("webp", "txt", "json"):
        assert written[f"00000002.{extension}"] == sample[extension]
    assert "1 shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--withheld"], "without --scenes"),
        (["--scenes", "4"], "--out"),
        (["--scenes", "0", "--out", "x"], "at least 1"),
    ],
)
def test_command_line_refuses(prepare, argv, message):
    with pytest.raises(ConfigError, match=message):
        prepare.main(argv)


def test_composer_refuses_bad_sizes_and_empty_folders(prepare, tmp_path):
    with pytest.raises(ConfigError, match="at least 16"):
        prepare.scenes.Composer(FOLDER, size=8, seed=0)
    with pytest.raises(ConfigError, match="seed"):
        prepare.scenes.Composer(FOLDER, size=64, seed=-1)
    with pytest.raises(DataError, match="no training picture"):
        prepare.scenes.Composer(tmp_path, size=64, seed=0)
