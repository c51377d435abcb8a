"""Pictures with their recipe: round trips, other programs' files, hostile files, numbering."""

import json
import os
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from unclip import errors
from unclip.files import images


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(1).integers(0, 256, (12, 20, 3), dtype=np.uint8)


RECIPE = {
    "prompt": "a red fox, in the snow",
    "negative_prompt": "blurry: bad",
    "steps": {"prior": 25, "decoder": 50},
    "sampler": "ddim",
    "guidance": 3.5,
    "seed": 1234,
    "model_hash": "0012345678",
    "mode": "text",
    "eta": 0.0,
    "comment": 'commas, "quotes": and\nlines',
    "looks_like": "7.0",
    "exact": True,
}


def test_plain_pillow_reads_both_chunks(tmp_path, picture):
    path = tmp_path / "a.png"
    images.write_png(path, picture, RECIPE)
    with Image.open(path) as file:
        np.testing.assert_array_equal(np.asarray(file), picture)
        texts = dict(file.text)
    assert json.loads(texts["unclip"]) == RECIPE
    assert texts["unclip"].isascii()
    assert list(json.loads(texts["unclip"])) == sorted(RECIPE)
    first, second, third = texts["parameters"].split("\n")
    assert first == RECIPE["prompt"]
    assert second == "Negative prompt: blurry: bad"
    # The documented order of AUTOMATIC1111, then ours.
    assert third.startswith(
        "Steps: 50, Sampler: ddim, CFG scale: 3.5, Seed: 1234, Size: 20x12, "
        "Model hash: 0012345678, Prior steps: 25, "
    )
    assert 'Comment: "commas, \\"quotes\\": and\\nlines"' in third
    assert 'Looks like: "7.0"' in third


def test_recipe_round_trip(tmp_path, picture):
    path = tmp_path / "a.png"
    given = {**RECIPE, "seed": np.int64(7), "z_i": np.array([0.5, 1.5], np.float32)}
    images.write_png(path, picture, given)
    assert images.read_recipe(path) == {**RECIPE, "seed": 7, "z_i": [0.5, 1.5]}
    images.write_png(path, picture)
    assert images.read_recipe(path) is None


def test_parameters_round_trip():
    parsed = images.parse_parameters(images.format_parameters(RECIPE, "20x12"))
    want = {**RECIPE, "steps": 50, "prior_steps": 25, "size": "20x12"}
    assert parsed == want


def test_parameters_of_another_program():
    text = (
        "masterpiece, (fox:1.2)\nsecond line\nNegative prompt: low quality,\nugly\n"
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, "
        'Model hash: 45dee52b7c, Lora hashes: "a: 12, b: 34", Version: v1.6.0'
    )
    assert images.parse_parameters(text) == {
        "prompt": "masterpiece, (fox:1.2)\nsecond line",
        "negative_prompt": "low quality,\nugly",
        "steps": 20,
        "sampler": "DPM++ 2M Karras",
        "guidance": 7,
        "seed": 965400086,
        "size": "512x768",
        "model_hash": "45dee52b7c",
        "lora_hashes": "a: 12, b: 34",
        "version": "v1.6.0",
    }
    # Fewer than three settings in the last line: it belongs to the prompt.
    assert images.parse_parameters("note: a fox") == {"prompt": "note: a fox"}


@pytest.mark.parametrize("seed", range(3))
def test_any_setting_survives(seed):
    rng = random.Random(seed)
    alphabet = 'ab ,:"\\\n7.-é🦊{}[]'
    for _ in range(200):
        value = "".join(rng.choices(alphabet, k=rng.randrange(8)))
        text = images.format_parameters({"prompt": "p", "note": value, "seed": 1}, "1x1")
        assert images.parse_parameters(text).get("note") == value, text


def test_parsing_never_raises():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices('Steps: ,"\\\n0aN{[é\0', k=rng.randrange(60)))
        assert isinstance(images.parse_parameters(text)["prompt"], str)


def test_hostile_prompts_are_kept(tmp_path, picture):
    path = tmp_path / "a.png"
    for prompt in (
        "",
        "\0",
        "\udcff",
        "🦊 Ünï",
        "Negative prompt: x\nSteps: 1, a: b, c: d",
        "x" * 5000,
    ):
        images.write_png(path, picture, {"prompt": prompt})
        assert images.read_recipe(path) == {"prompt": prompt}


def test_a_recipe_must_be_json(tmp_path, picture):
    for value in (float("nan"), object()):
        with pytest.raises(errors.ConfigError, match="JSON"):
            images.write_png(tmp_path / "a.png", picture, {"x": value})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (1, 4, 4, 3)])
def test_wrong_arrays_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match="uint8"):
        images.write_png(tmp_path / "a.png", np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        images.write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.float32))


def _with_text(path, **texts):
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_text(key, text)
    Image.new("RGB", (2, 2)).save(path, pnginfo=chunks)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 50_000, "9" * 5000, "null", '"x"'])
def test_damaged_json_falls_back_to_the_text(tmp_path, text):
    _with_text(tmp_path / "a.png", unclip=text, parameters="a fox\nSteps: 1, Seed: 2, Size: 2x2")
    assert images.read_recipe(tmp_path / "a.png")["prompt"] == "a fox"
    _with_text(tmp_path / "b.png", unclip=text)
    assert images.read_recipe(tmp_path / "b.png") is None


def test_long_text_is_not_read(tmp_path):
    long = json.dumps({"prompt": "x" * images.MAX_RECIPE_CHARS})
    _with_text(tmp_path / "a.png", unclip=long)
    assert images.read_recipe(tmp_path / "a.png") is None


def _png_of(width, height, *chunks):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(k, d) for k, d in chunks)


def test_bombs_are_refused(tmp_path):
    path = tmp_path / "bomb.png"
    for width, height in ((65_000, 65_000), (10_000, 7_000)):
        path.write_bytes(_png_of(width, height, (b"IDAT", zlib.compress(b"0" * 100))))
        with pytest.raises(errors.DataError, match="64 megapixels"):
            images.read_image(path)
        with pytest.raises(errors.DataError):
            images.read_recipe(path)
    packed = b"unclip\0\0" + zlib.compress(b"x" * (8 << 20))
    path.write_bytes(_png_of(2, 2, (b"zTXt", packed), (b"IDAT", zlib.compress(bytes(14)))))
    with pytest.raises(errors.DataError):
        images.read_recipe(path)


def test_bad_files_are_one_line(tmp_path, picture):
    path = tmp_path / "a.png"
    images.write_png(path, picture, RECIPE)
    whole = path.read_bytes()
    Image.fromarray(picture).save(tmp_path / "a.gif")
    cases = {"empty": b"", "text": b"hello", "gif": (tmp_path / "a.gif").read_bytes()}
    cases |= {f"cut{n}": whole[:n] for n in range(8, len(whole) - 20, 97)}
    for name, data in cases.items():
        bad = tmp_path / name
        bad.write_bytes(data)
        with pytest.raises(errors.DataError) as raised:
            images.read_image(bad)
        assert len(str(raised.value).splitlines()) == 1
    for missing in (tmp_path / "none.png", tmp_path):
        with pytest.raises(errors.DataError):
            images.read_image(missing)
        with pytest.raises(errors.DataError):
            images.read_recipe(missing)


def test_read_image_formats(tmp_path, picture):
    for extension, options in (("png", {}), ("webp", {"lossless": True})):
        Image.fromarray(picture).save(tmp_path / f"a.{extension}", **options)
        got = images.read_image(tmp_path / f"a.{extension}")
        assert got.dtype == np.uint8 and got.flags.writeable
        np.testing.assert_array_equal(got, picture)


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (200, 0, 0, 255)
    rgba[0, 1] = (0, 0, 0, 102)  # 40 % black over white
    Image.fromarray(rgba).save(tmp_path / "a.png")
    got = images.read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(got[0, 0], (200, 0, 0))
    assert abs(int(got[0, 1, 0]) - 153) <= 1
    np.testing.assert_array_equal(got[1, 1], (255, 255, 255))


def test_sixteen_bit_grey_is_scaled(tmp_path):
    Image.fromarray(np.array([[0, 0x80FF, 0xFFFF]], np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png")[0, :, 0], [0, 128, 255])


def test_camera_orientation_is_applied(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    got = images.read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(got, np.rot90(picture, -1))


def test_size_crops_the_centre(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = (10, 20, 30)
    Image.fromarray(wide).save(tmp_path / "a.png")
    got = images.read_image(tmp_path / "a.png", 4)
    np.testing.assert_array_equal(got, np.broadcast_to(np.uint8((10, 20, 30)), (4, 4, 3)))


def test_grid_places_every_picture():
    cells = np.stack([np.full((4, 6, 3), 10 * k, np.uint8) for k in range(5)])
    sheet = images.grid(cells, columns=3, pad=2)
    assert sheet.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    for k in range(5):
        row, column = divmod(k, 3)
        top, left = 2 + 6 * row, 2 + 8 * column
        np.testing.assert_array_equal(sheet[top : top + 4, left : left + 6], cells[k])
    assert (sheet[8:, 18:] == 255).all()
    assert images.grid(cells[:1], columns=4).shape == (8, 10, 3)
    assert images.grid(cells).shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    with pytest.raises(ValueError, match="one shape"):
        images.grid([cells[0], cells[0][:2]])
    with pytest.raises(ValueError, match="labels"):
        images.grid(cells, labels=["one"])


def test_a_grid_has_the_recipes_of_its_pictures(tmp_path):
    picture = np.zeros((4, 6, 3), np.uint8)
    shared = {"mode": "text", "model_hash": "0123456789", "steps": {"decoder": 25}}
    recipes = [shared | {"prompt": p, "seed": s} for p in ("a fox", "a cat") for s in (5, 6)]
    recipes[3]["caption"] = False
    path = images.save_grid([picture] * 4, tmp_path, 2, recipes=recipes)
    found = images.read_recipe(path)
    assert found["grid_columns"] == 2 and found["steps"] == {"decoder": 25}
    assert found["pictures"][0] == {"prompt": "a fox", "seed": 5}
    assert images.recipes_of(found) == recipes
    assert images.recipes_of(recipes[0]) == recipes[:1]
    with Image.open(path) as opened:
        assert "fox" not in opened.text["parameters"]  # a line for people
    *_, path = images.save_pictures([picture] * 4, recipes, tmp_path / "all")
    assert images.recipes_of(images.read_recipe(path)) == recipes
    # Too many to be read back: their number, and what they share.
    many = images.grid_recipe([{"prompt": "x" * 2000, "seed": s} for s in range(200)], 10)
    assert many["pictures"] == 200 or len(json.dumps(many)) < images.MAX_RECIPE_CHARS
    many = images.grid_recipe([{"prompt": f"{s}" * 2000} for s in range(200)], 10)
    assert many["pictures"] == 200
    with pytest.raises(errors.ConfigError, match="each is in its own PNG"):
        images.recipes_of(many)


def test_a_source_picture_is_known_by_its_pixels(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    images.write_png(tmp_path / "a.png", picture, {"seed": 1})
    one = images.source(images.read_image(tmp_path / "a.png"), tmp_path / "a.png")
    assert one == {"name": "a.png", "width": 6, "height": 4, "sha256": one["sha256"]}
    assert images.source(picture)["sha256"] == one["sha256"]
    turned = np.ascontiguousarray(picture.reshape(6, 4, 3))  # the same bytes, another shape
    assert images.source(turned)["sha256"] != one["sha256"]


def test_grid_labels_stay_below_their_picture():
    cells = np.full((2, 40, 60, 3), 128, np.uint8)
    plain = images.grid(cells, labels=["", ""])
    marked = images.grid(cells, labels=["a very long label that cannot fit, é 🦊", ""])
    assert plain.shape == marked.shape
    changed = np.argwhere((plain != marked).any(-1))
    assert len(changed) > 20
    assert changed[:, 0].min() >= 2 + 40
    assert changed[:, 1].max() < 2 + 60 + 2


def test_saving_continues_the_numbering(tmp_path, picture):
    recipes = [{"prompt": "../../etc/passwd", "seed": 5}, {"prompt": "x", "seed": 6}]
    first = images.save_pictures([picture, picture], recipes, tmp_path / "out")
    assert [path.name for path in first] == ["0000-seed5.png", "0001-seed6.png", "grid-0000.png"]
    before = {path: path.read_bytes() for path in first}
    second = images.save_pictures([255 - picture] * 2, recipes, tmp_path / "out")
    assert [path.name for path in second] == ["0002-seed5.png", "0003-seed6.png", "grid-0001.png"]
    assert all(path.read_bytes() == data for path, data in before.items())
    third = images.save_pictures(picture[None], [{"prompt": "no seed"}], tmp_path / "out")
    assert [path.name for path in third] == ["0004.png"]
    assert len(list((tmp_path / "out").iterdir())) == 7
    assert images.read_recipe(first[1]) == recipes[1]


def test_a_name_taken_meanwhile_is_skipped(tmp_path, picture, monkeypatch):
    (tmp_path / "0000-seed1.png").write_bytes(b"theirs")
    # As if the other process had written after our look at the folder.
    monkeypatch.setattr(images.os, "scandir", lambda path: iter(()))
    paths = images.save_pictures([picture], [{"seed": 1}], tmp_path)
    assert [path.name for path in paths] == ["0001-seed1.png"]
    assert (tmp_path / "0000-seed1.png").read_bytes() == b"theirs"


def test_a_failed_save_leaves_nothing(tmp_path, picture, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(errors.DataError, match="No space left on device"):
        images.save_pictures([picture], [{"seed": 1}], tmp_path)
    assert os.listdir(tmp_path) == []


def test_an_unwritable_folder_is_one_line(tmp_path, picture):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.DataError, match="cannot write"):
        images.save_pictures([picture], [{}], tmp_path / "file")
    with pytest.raises(errors.DataError, match="cannot write"):
        images.write_png(tmp_path / "file" / "a.png", picture)
    with pytest.raises(errors.DataError, match="cannot write to folder"):
        images.writable_folder(tmp_path / "file" / "out")


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    folder = images.writable_folder(tmp_path / "a" / "b")
    assert folder.is_dir() and os.listdir(folder) == []


# ============================================================ chains, sheets, animations


def test_a_recipe_for_people():
    own = {"mode": "text", "model_hash": "0123456789", "prompt": "a red fox", "seed": 5}
    source = {"name": "fox.png", "width": 8, "height": 8, "sha256": "ab" * 32, "recipe": own}
    evil = {"name": "evil\x1b[2J\n", "width": 1, "height": 1, "sha256": "cd"}
    recipe = {
        "mode": "variations",
        "prompt": "x" * 300,
        "steps": {"decoder": 25, "upsampler_0": 27},
        "guidance": {"decoder": 1.5},
        "images": [source, evil],
    }
    found = images.described(recipe)
    assert all(line.isprintable() and len(line) < 300 for line in found)
    lines = [" ".join(line.split()) for line in found]
    for line in (
        "mode variations",
        "decoder upsampler_0",
        "guidance 1.5 -",
        "steps 25 27",
        f"drawn from 1: fox.png, 8x8, sha256 {'ab' * 32}, drawn by:",
        "prompt a red fox",
        "drawn from 2: evil [2J , 1x1, sha256 cd, given".replace("  ", " "),
    ):
        assert line in lines
    hostile = {"images": {"a": 1}, "pictures": [3], "steps": {"x": [1, {"y": None}]}, "seed": None}
    assert images.described(hostile)


def test_a_source_keeps_the_recipe_of_ours_alone(tmp_path):
    pixels = np.zeros((9, 8, 3), np.uint8)
    own = {"mode": "text", "model_hash": "0123456789", "prompt": "a red fox", "seed": 5}
    images.write_png(tmp_path / "ours.png", pixels, own)
    images.write_png(tmp_path / "other.png", pixels, {"prompt": "theirs", "steps": 20})
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    found = {path.name: images.open_source(path) for path in tmp_path.iterdir()}
    assert {name: one.recipe for name, one in found.items()} == {
        "ours.png": own,
        "other.png": None,
        "photo.jpg": None,
    }
    record = found["ours.png"].record
    assert record == images.source(pixels, "ours.png") | {"recipe": own}
    # The chain is in the text for other programs too, and is read back whole.
    images.write_png(tmp_path / "next.png", pixels, own | {"images": [record]})
    with Image.open(tmp_path / "next.png") as picture:
        parameters = images.parse_parameters(picture.text["parameters"])
    assert json.loads(parameters["images"]) == [record]


def test_a_contact_sheet_takes_pictures_of_any_size():
    sizes = [(8, 8), (300, 100), (40, 30)]
    given = [np.full((*size, 3), k * 50, np.uint8) for k, size in enumerate(sizes)]
    sheet = images.contact_sheet(given, ["a", "b", "c"], side=64, columns=3)
    assert sheet.shape[1] == 3 * 66 + 2 and sheet.shape[0] > 66
    assert (sheet[2:66, 2:66] == 0).all()  # 8 x 8, enlarged eight times
    middle = sheet[2:66, 68:132]
    assert (middle[:, :20] == 255).all() and abs(int(middle[32, 32, 0]) - 50) <= 1


def test_an_animation_goes_there_and_back(tmp_path):
    frames = [np.full((8, 8, 3), k * 60, np.uint8) for k in range(4)]
    path = images.save_animation(tmp_path / "a.webp", frames, milliseconds=50)
    with Image.open(path) as film:
        shown = []
        for k in range(film.n_frames):
            film.seek(k)
            shown.append(np.asarray(film.convert("RGB"))[0, 0, 0])
    assert shown == [0, 60, 120, 180, 120, 60]
    for name, some in (("a.mp4", frames), ("a.webp", frames[:1])):
        with pytest.raises(errors.ConfigError, match=r"expected"):
            images.save_animation(tmp_path / name, some)
    assert [file.name for file in tmp_path.iterdir()] == ["a.webp"]
