"""The modes of `unclip generate`, and `classify`, `search` and `inspect`, as processes."""

import glob
import json
import pathlib
import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from unclip.files import images


@pytest.fixture(scope="module")
def generate(serve_verb, bundle_dir):
    """generate(*arguments) -> (exit code, stdout, stderr), of the micro bundle's decoder alone."""
    with serve_verb("generate") as run:
        yield lambda *given: run("--model", bundle_dir, "--batch_size", 2, *given)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two pictures that nobody drew: a.png and b.jpg."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        blocks = rng.integers(0, 256, (4, 3, 3), np.uint8)
        Image.fromarray(blocks.repeat(10, 0).repeat(10, 1)).save(folder / name)
    return folder


def made(out):
    """[(path, recipe)] of the pictures that a run printed, grids and animations apart."""
    paths = [pathlib.Path(line) for line in out.split("\n") if line.endswith(".png")]
    found = [(path, images.read_recipe(path)) for path in paths]
    return [(path, recipe) for path, recipe in found if "grid_columns" not in recipe]


def pixels(path):
    with Image.open(path) as picture:
        return np.array(picture)


ONE = ("--stages", 1)


def test_a_chain_of_edits_is_repeated_from_its_last_picture(generate, photos, tmp_path):
    """A variation by inversion of a way between two photographs; then from the last file alone."""
    way = tmp_path / "way"
    pictures = ("--image", photos / "a.png", "--image", photos / "b.jpg")
    animation = ("--animation", tmp_path / "way.webp")
    code, out, err = generate(
        "--mode", "interpolate", *pictures, "--n", 3, "--out", way, *ONE, *animation
    )
    assert code == 0, err
    frames = made(out)
    assert [r["weights"] for _, r in frames] == [[1, 0], [0.5, 0.5], [0, 1]]
    with Image.open(tmp_path / "way.webp") as film:
        np.testing.assert_array_equal(film.convert("RGB"), pixels(frames[0][0]))
    other = tmp_path / "other"
    middle = frames[1][0]
    code, out, err = generate(
        "--mode", "variations", "--image", middle, "--invert", "--n", 1, "--seed", 7, *ONE,
        "--out", other,
    )  # fmt: skip
    assert code == 0, err
    ((path, recipe),) = made(out)
    assert [one["name"] for one in recipe["images"][0]["recipe"]["images"]] == ["a.png", "b.jpg"]

    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(path, alone / "last.png")
    shutil.rmtree(way)
    last = ("--from_png", alone / "last.png", "--out", tmp_path / "again")
    code, _, err = generate(*last, "--image", photos / "a.png")
    assert code == 78 and "'b.jpg' (sha256" in err and "'a.png'" not in err
    assert not (tmp_path / "again").exists()
    shutil.copy(photos / "b.jpg", alone)  # beside the file
    code, out, err = generate(*last, "--image", photos / "a.png")
    assert code == 0, err
    ((again, repeated),) = made(out)
    np.testing.assert_array_equal(pixels(again), pixels(path))
    assert repeated == recipe
    code, _, err = generate(*last, "--seed", 3, "--guidance", 2)
    assert code == 78 and "--seed has no effect: --from_png" in err and "--guidance" in err


@pytest.mark.slow
def test_a_grid_is_repeated_whole(generate, tmp_path):
    code, out, err = generate("--prompt", "a red dot", "--n", 2, "--out", tmp_path, *ONE)
    assert code == 0, err
    grid = out.split()[-1]
    code, again, err = generate("--from_png", grid, "--out", tmp_path / "again")
    assert code == 0, err
    for (one, _), (other, _) in zip(made(out), made(again), strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_a_text_difference_and_a_reconstruction(generate, photos, tmp_path):
    picture = ("--image", photos / "a.png")
    code, out, err = generate(
        "--mode", "textdiff", *picture, "--from_prompt", "a red dot", "--prompt", "a blue bar",
        "--angle", 0.4, "--n", 3, *ONE, "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert [r["angle"] for _, r in made(out)] == [0, 0.2, 0.4]
    images.write_png(tmp_path / "basis" / "a.png", pixels(photos / "a.png"))
    images.write_png(tmp_path / "basis" / "b.png", pixels(photos / "b.jpg"))
    code, out, err = generate(
        "--mode", "reconstruct", *picture, "--components", 1, "--components", 3,
        "--basis", tmp_path / "basis", *ONE, "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert [r["components"] for _, r in made(out)] == [1, 3]
    code, out, err = generate("--mode", "upsample", *picture, "--out", tmp_path)
    assert code == 0, err
    ((path, _),) = made(out)
    assert pixels(path).shape == (32, 32, 3)


def broken(folder):
    """{name: what is said of it} of pictures that cannot be drawn from, written to `folder`."""
    (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR broken")
    (folder / "text.png").write_text("no picture")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("1", (9000, 9000)).save(folder / "vast.png")
    return {
        "cut.png": "cut.png",
        "text.png": "is not a JPEG/PNG/WEBP picture",
        "dot.png": "is 1x1 pixels: expected at least 8 a side",
        "vast.png": "is larger than 64 megapixels",
        "none.png": "No such file",
    }


def test_pictures_that_cannot_be_drawn_from_are_all_named(generate, tmp_path):
    said = broken(tmp_path)
    given = [word for name in said for word in ("--image", tmp_path / name)]
    code, out, err = generate("--mode", "variations", *given, "--out", tmp_path / "out")
    assert code == 74 and not out and err.count("\n") == 1
    for line in said.values():
        assert line in err
    code, _, err = generate("--mode", "upsample", "--image", tmp_path / "dot.png")
    assert code == 78 and "1x1" in err
    assert not (tmp_path / "out").exists()


def test_every_kind_of_picture_is_drawn_from(generate, tmp_path):
    """Grey, palette, 16 bits, CMYK, alpha, turned by EXIF: all are the same picture to CLIP."""
    grey = np.random.default_rng(0).integers(0, 256, (4, 4), np.uint8).repeat(4, 0).repeat(4, 1)
    plain = Image.fromarray(grey)
    turned = Image.Exif()
    turned[0x0112] = 6
    plain.convert("RGB").save(tmp_path / "rgb.png")
    plain.save(tmp_path / "grey.png")
    plain.convert("P").save(tmp_path / "palette.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    plain.convert("LA").save(tmp_path / "alpha.png")
    plain.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned)
    frames = [plain.convert("RGB"), Image.new("RGB", plain.size)]
    frames[0].save(tmp_path / "film.webp", save_all=True, append_images=frames[1:], lossless=True)
    plain.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    names = [*("rgb.png", "grey.png", "palette.png", "deep.png", "alpha.png", "turned.png")]
    given = [word for name in (*names, "film.webp") for word in ("--image", tmp_path / name)]
    code, out, err = generate("--mode", "variations", *given, "--n", 1, *ONE, "--out", tmp_path)
    assert code == 0 and "film.webp is animated: its first frame is taken" in err
    hashes = {recipe["images"][0]["sha256"] for _, recipe in made(out)}
    assert len(hashes) == 1 and len(made(out)) == 7
    given = ("--image", tmp_path / "cmyk.jpg")
    code, _, err = generate("--mode", "variations", *given, "--n", 1, *ONE, "--out", tmp_path)
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--mode", "inpaint"), "unknown --mode 'inpaint'"),
        (("--mode", "interpolate", "--image", "a.png"), "interpolate needs at least two --image"),
        (
            ("--mode", "textdiff", "--components", 2, "--best_of", 3),
            "--best_of has no effect: --mode textdiff does not read it; text reads it; --comp",
        ),
        (("--mode", "textdiff"), "needs at least one --prompt; --mode textdiff needs at least one"),
        (("--mode", "reconstruct", "--image", "a"), "needs at least one --components"),
        (("--mode", "upsample", "--image", "a", "--steps", 2), "--steps has no effect: --mode ups"),
        (("--prompt", "a", "--angle", 0.2), "--angle has no effect: --mode text does not read it"),
        (("--prompt", "a", "--n", 3, "--best_of", 2), "best_of=2 with n=3: expected at least n"),
        (("--prompt", "a", "--guidance", "nan"), "guidance nan: expected a finite number"),
        (("--prompt", "a", "--eta", "x"), "--eta=x: expected a number"),
        (("--from_png", "PHOTO"), "a.png holds no recipe"),
        (
            ("--mode", "textdiff", "--image", "PHOTO", "--prompt", "a", "--angle", 1.5),
            "angle 1.5: expected a number from 0 to 1",
        ),
        (
            ("--mode", "interpolate", "--image", "PHOTO", "--image", "PHOTO", "--weights", "1,x"),
            "--weights '1,x': expected numbers between commas",
        ),
        (
            ("--mode", "interpolate", "--image", "a", "--image", "b", "--animation", "a.mp4"),
            "--animation a.mp4: expected a name that ends in .webp",
        ),
    ],
)
def test_what_generate_refuses_leaves_nothing(generate, photos, tmp_path, arguments, said):
    given = [photos / "a.png" if a == "PHOTO" else a for a in arguments]
    code, out, err = generate(*given, "--out", tmp_path)
    assert code == 78 and said in err and not out
    assert not list(tmp_path.iterdir())


def test_classify_and_search_a_folder(serve_verb, bundle_dir, tmp_path):
    rng = np.random.default_rng(0)
    for k, name in enumerate(("red", "red", "not a dot")):
        picture = rng.integers(0, 256, (16, 16, 3), np.uint8)
        images.write_png(tmp_path / name / f"{k}.png", picture)
    with serve_verb("classify") as classify:
        labels = ("--labels", 'red,"not a dot"', "--model", bundle_dir)
        code, out, err = classify(*labels, "--image", tmp_path, "--template", "photo")
        assert code == 0, err
        rows = [line.split("\t") for line in out.splitlines()[:4]]
        assert rows[0] == ["picture", "label", "red", "not a dot"]
        assert [row[0] for row in rows[1:]] == ["not a dot/2.png", "red/0.png", "red/1.png"]
        for row in rows[1:]:
            assert float(row[2]) + float(row[3]) == pytest.approx(1, abs=2e-4)
        assert "accuracy " in out and " of 3\n" in out
        code, out, err = classify(*labels, "--image", tmp_path / "red" / "0.png")
        assert code == 0 and len(out.splitlines()) == 2 and "accuracy" not in out, err
        code, _, err = classify("--labels", "a,a", "--model", bundle_dir, "--image", tmp_path)
        assert code == 78 and "labels given twice: a" in err
        code, _, err = classify(*labels)
        assert code == 78 and "expected --image" in err
        code, _, err = classify(*labels, "--image", tmp_path / "none")
        assert code == 74 and "no such file or folder" in err
    with serve_verb("search") as search:
        given = ("--model", bundle_dir, "--folder", tmp_path, "--prompt", "a red dot")
        code, out, err = search(*given, "--n", 2, "--sheet", tmp_path / "sheet.png")
        assert code == 0, err
        scores = [float(line.split("\t")[0]) for line in out.splitlines()]
        assert len(scores) == 2 and scores == sorted(scores, reverse=True)
        assert pixels(tmp_path / "sheet.png").shape[1] > 256
        code, _, err = search(*given[:-1], " ")
        assert code == 78 and "--prompt is empty" in err


@pytest.mark.slow
def test_inspect_prints_a_recipe_for_people(serve_verb, tmp_path):
    recipe = {"mode": "text", "prompt": "a red fox", "seed": 7, "steps": {"decoder": 25}}
    images.write_png(tmp_path / "one.png", np.zeros((8, 8, 3), np.uint8), recipe)
    images.write_png(tmp_path / "none.png", np.zeros((8, 8, 3), np.uint8))
    with serve_verb("inspect") as inspect:
        code, out, err = inspect(tmp_path / "one.png")
        assert code == 0 and out.splitlines() == images.described(recipe), err
        code, out, _ = inspect("--json", tmp_path / "one.png")
        assert code == 0 and json.loads(out) == recipe
        for given, exit_code, said in (
            ((tmp_path / "none.png",), 78, "holds no recipe"),
            ((tmp_path / "gone.png",), 74, "cannot read"),
            ((), 78, "expected a PNG"),
        ):
            code, _, err = inspect(*given)
            assert code == exit_code and said in err


@pytest.mark.slow
def test_the_page_of_drawing(serve_verb, bundle_dir, tmp_path, monkeypatch):
    """Every command of docs/drawing.md, in its order, with the micro bundle."""
    page = pathlib.Path(__file__).parents[2] / "docs" / "drawing.md"
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    assert len(lines) > 12
    for verb in ("generate", "classify", "search", "inspect"):
        with serve_verb(verb) as run:
            for line in lines:
                _, given, *words = shlex.split(line)
                if given != verb:
                    continue
                words = [w for word in words for w in (sorted(glob.glob(word)) or [word])]
                at = words.index("--model") + 1 if "--model" in words else None
                words = [str(bundle_dir) if k == at else word for k, word in enumerate(words)]
                words = [str(tmp_path / w) if w.split("/")[0] == "out" else w for w in words]
                code, _, err = run(*words)
                assert code == 0, f"{line}: {err}"
