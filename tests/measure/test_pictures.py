"""Sets of pictures from each source, and what is noted of their files."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from unclip.errors import ConfigError, DataError
from unclip.input.samples import BadSample
from unclip.input.shards.collection import open_shards
from unclip.input.shards.folder import index_folder
from unclip.input.tfds import records
from unclip.measure import pictures
from unclip.measure.picture_set import (
    ALPHA,
    DEEP,
    GREY,
    LOSSY,
    TURNED,
)

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (4, 5, 7, 3), dtype=np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def encoded(array, format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, **options)
    return file.getvalue()


def test_a_folder_is_read_to_any_depth_and_sorted(tmp_path):
    names = ["b.png", "a/c.bmp", "a/b.tif", "z.webp"]
    for name, array in zip(names, PICTURES):
        save(tmp_path / name, array, **({"lossless": True} if name == "z.webp" else {}))
    (tmp_path / "notes.md").write_text("no picture")
    (tmp_path / "b.txt").write_text(" a caption \n")
    save(tmp_path / "grid-0000.png", np.zeros((20, 20, 3), np.uint8))
    found = pictures.open_pictures(tmp_path)
    assert [found.name(i) for i in range(len(found))] == sorted(names)
    assert found.left_out == ["grid-0000.png"]
    for i, name in enumerate(sorted(names)):
        np.testing.assert_array_equal(found.read(i), PICTURES[names.index(name)])
        assert found.caption(i) == ("a caption" if name == "b.png" else None)
    assert not found.notes.any()
    assert pictures.listing_hash(found) != pictures.listing_hash(pictures.First(found, 3))


def test_hidden_files_and_folders_are_no_pictures(tmp_path):
    seen = [".hidden/a/1.png", ".hidden/a/b..c.png"]  # below a hidden folder that was named
    for name in (
        *seen,
        ".hidden/a/.2.png",
        ".hidden/a/.ipynb_checkpoints/1-checkpoint.png",
        ".hidden/a/__MACOSX/._1.png",
        ".hidden/a/__MACOSX/1.png",
    ):
        save(tmp_path / name, PICTURES[0])
    found = pictures.open_pictures(tmp_path / ".hidden")
    assert [found.name(i) for i in range(len(found))] == ["a/1.png", "a/b..c.png"]
    save(tmp_path / "only" / ".a.png", PICTURES[0])
    with pytest.raises(DataError, match=r"no pictures there.*but 1 hidden"):
        pictures.open_pictures(tmp_path / "only")


def test_what_a_file_was_is_noted(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = (RNG.random((5, 7)) * 65535).astype(np.uint16)
    alpha = np.dstack([PICTURES[0], np.full((5, 7), 128, np.uint8)])
    cases = {
        "a.png": (encoded(PICTURES[0, ..., 0]), GREY),
        "b.png": (encoded(alpha), ALPHA),
        "c.png": (encoded(PICTURES[0], exif=turned), TURNED),
        "d.png": (encoded(deep), GREY | DEEP),
        "e.jpg": (encoded(PICTURES[0], "JPEG"), LOSSY),
        "f.webp": (encoded(PICTURES[0], "WEBP"), LOSSY),
        "g.webp": (encoded(PICTURES[0], "WEBP", lossless=True), 0),
        "h.tif": (encoded(deep, "TIFF"), GREY | DEEP),
        "i.png": (encoded(PICTURES[0]), 0),
    }
    for name, (data, _) in cases.items():
        (tmp_path / name).write_bytes(data)
    found = pictures.open_pictures(tmp_path)
    read = [found.read(i) for i in range(len(found))]
    assert dict(zip(cases, found.notes.tolist())) == {k: bits for k, (_, bits) in cases.items()}
    assert read[0].shape == (5, 7, 3) and (read[0] == PICTURES[0, ..., :1]).all()
    assert read[2].shape == (7, 5, 3)
    rounded = np.rint(deep / 65535 * 255)[..., None]
    for k in (3, 7):
        assert np.abs(read[k].astype(float) - rounded).max() <= 1
    assert found.greyscale(0) and not found.greyscale(8)
    counts = list(pictures.describe_notes(found.notes).values())
    assert counts == [3, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.png", encoded(PICTURES[0])[:60], "truncated|corrupt"),
        ("a.png", b"GIF89a nothing", "format"),
        ("a.bmp", b"BM nothing", "format"),
        ("a.tif", encoded(PICTURES[0]), "format"),
    ],
)
def test_unreadable_pictures_say_why(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadSample, match=reason):
        pictures.open_pictures(tmp_path).read(0)


def test_large_pictures_are_refused_before_decoding(tmp_path, monkeypatch):
    from unclip.measure import picture_set

    monkeypatch.setattr(picture_set, "MAX_PIXELS", 30)
    save(tmp_path / "a.png", PICTURES[0])
    save(tmp_path / "b.bmp", PICTURES[0])
    found = pictures.open_pictures(tmp_path)
    for i in range(2):
        with pytest.raises(BadSample, match="too-many-pixels"):
            found.read(i)


def test_shards(shards, shard_writer, tmp_path):
    found = pictures.open_pictures(shards["train"])
    assert (len(found), found.name(0), found.read(0).shape) == (24, "00000", (32, 32, 3))
    assert found.caption(4) == "a green bar, number 4"
    bare = pictures.open_pictures(shard_writer(tmp_path / "bare.tar", 3, captions=False))
    assert len(bare) == 3 and bare.caption(0) is None


def test_shards_by_an_index_of_other_captions(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("k.png", encoded(PICTURES[0])),
            ("k.json", b'{"TEXT": [" ", "a fox"], "name": "fox"}'),
            ("l.png", encoded(PICTURES[1])),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index_folder(str(tmp_path / "a.tar"), tmp_path / "of", captions=("json:TEXT",), jobs=1)
    for name, caption in (("a.tar", None), ("of", "a fox")):
        found = pictures.open_pictures(tmp_path / name)
        assert [found.caption(i) for i in range(len(found))] == [caption, None]


def test_shards_that_share_keys_and_lose_samples(tmp_path):
    for name in ("x", "y"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for member in ("k.png", "k.jpg", "k.png") if name == "y" else ("k.png", "l.png"):
                info = tarfile.TarInfo(member)
                data = encoded(PICTURES[0])
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with tarfile.open(tmp_path / "z.tar", "w") as tar:
        info = tarfile.TarInfo("k.png")
        info.size = len(encoded(PICTURES[0]))
        tar.addfile(info, io.BytesIO(encoded(PICTURES[0])))
    found = pictures.open_pictures(str(tmp_path / "{x,y,z}.tar"))
    assert [found.name(i) for i in range(len(found))] == ["x/k", "x/l", "z/k"]
    assert found.damaged == [("y.tar: k", "duplicate")]


@pytest.mark.parametrize("compress", [False, True])
def test_arrays(tmp_path, compress):
    (np.savez_compressed if compress else np.savez)(tmp_path / "a.npz", PICTURES, np.arange(4))
    found = pictures.open_pictures(tmp_path / "a.npz")
    assert len(found) == 4 and pictures.has_pictures(tmp_path / "a.npz")
    np.testing.assert_array_equal(found.read(3), PICTURES[3])
    assert found.read(0).flags.writeable
    memory = pictures.ArrayPictures(PICTURES, names=list("abcd"), captions=["x"] * 4)
    assert (memory.name(1), memory.caption(2)) == ("b", "x")


def test_arrays_that_are_no_pictures(tmp_path):
    np.savez(tmp_path / "a.npz", PICTURES.astype(np.float32))
    with pytest.raises(ConfigError, match="float32"):
        pictures.open_pictures(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="object"):
        pictures.open_pictures(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", mu=np.zeros(3))
    assert not pictures.has_pictures(tmp_path / "c.npz")
    with pytest.raises(DataError, match="no arr_0"):
        pictures.open_pictures(tmp_path / "c.npz")
    (tmp_path / "d.npz").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        pictures.open_pictures(tmp_path / "d.npz")
    for wrong in (dict(names=["a"]), dict(captions=["a"])):
        with pytest.raises(ConfigError, match="4 pictures but 1"):
            pictures.ArrayPictures(PICTURES, **wrong)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("absent", DataError, "no such file or folder"),
        ("pics", DataError, "did you mean .*/pix"),
        ("empty", DataError, "no pictures there"),
        ("tars", DataError, "for shards give .*tars/\\*.tar"),
        ("a.png", ConfigError, "expected a folder of pictures"),
        ("x-{0..3}.tar", DataError, "is not there"),
    ],
)
def test_wrong_sources_are_reported(tmp_path, spec, error, message):
    for name in ("pix", "empty", "tars"):
        (tmp_path / name).mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(b"")
    save(tmp_path / "a.png", PICTURES[0])
    with pytest.raises(error, match=message) as caught:
        pictures.open_pictures(str(tmp_path / spec))
    assert "\n" not in caught.value.message


# ============================================================ tensorflow-datasets


def test_a_prepared_data_set(shards, tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    collection = open_shards(shards["held_out"])
    folder = tmp_path / "shapes" / "1.0.0"
    records.write_array_record(collection, folder, name="shapes", split="val", shard_samples=3)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    tars = pictures.open_pictures(shards["held_out"])
    for spec in ("tfds:shapes:val[2:]", "tfds:shapes:1.0.0:val[2:]", f"tfds:{folder}:val[2:]"):
        found = pictures.open_pictures(spec)
        assert (len(found), found.name(0), found.source) == (6, "000000", spec)
        for i in range(6):
            np.testing.assert_array_equal(found.read(i), tars.read(i + 2))
            assert found.caption(i) == tars.caption(i + 2)
        assert not found.notes.any()
    with pytest.raises(ConfigError, match=r"unknown split .*did you mean 'val'"):
        pictures.open_pictures("tfds:shapes:vla")


# ============================================================ views


def test_content_is_told_by_what_was_read_already(tmp_path, monkeypatch):
    """Equal bytes in equal order are equal sets, whatever their names; no file is read twice."""
    for folder, names in (("one", "abc"), ("two", "xyz")):
        for name, array in zip(names, PICTURES):
            save(tmp_path / folder / f"{name}.png", array)
    one, two = (pictures.open_pictures(tmp_path / name) for name in ("one", "two"))
    content = pictures.content_hash(one)
    assert pictures.content_hash(two) == content and one.fingerprint != two.fingerprint
    assert pictures.content_hash(pictures.First(one, 2)) != content
    assert pictures.content_hash(pictures.Prepared(one, 4)) != content
    # A picture that cannot be read is a part of what the set is, and does not hinder.
    (tmp_path / "two" / "y.png").unlink()
    assert pictures.content_hash(pictures.open_pictures(tmp_path / "two")) != content
    for i in range(3):
        one.read(i)
    monkeypatch.setattr(pictures.FolderPictures, "data", None)
    assert pictures.content_hash(one) == content


def test_the_first_of_a_set():
    base = pictures.ArrayPictures(PICTURES, names=list("abcd"), captions=list("wxyz"))
    first = pictures.First(base, 2)
    assert (len(first), first.name(1), first.caption(1)) == (2, "b", "x")
    assert len(pictures.First(base, 9)) == 4 and "[:2]" in first.source
    with pytest.raises(ConfigError, match="at least 1"):
        pictures.First(base, 0)


def test_prepared_is_the_centre_square_resized_once():
    ramp = np.zeros((8, 16, 3), np.uint8)
    ramp[:, 4:12] = np.arange(8, dtype=np.uint8)[None, :, None] * 20
    box = pictures.Prepared(pictures.ArrayPictures(ramp[None]), 4, "box")
    want = ramp[:, 4:12].reshape(4, 2, 4, 2, 3).mean((1, 3))
    np.testing.assert_allclose(box.read(0), want, atol=1)
    assert "box 4x4" in box.source
    # Nothing outside of the square may have an effect, whatever the filter's support.
    outside = ramp.copy()
    outside[:, :4], outside[:, 12:] = 255, 255
    cubic = [pictures.Prepared(pictures.ArrayPictures(p[None]), 4).read(0) for p in (ramp, outside)]
    np.testing.assert_array_equal(*cubic)
    same = pictures.Prepared(pictures.ArrayPictures(PICTURES[:, :, :5]), 5)
    np.testing.assert_array_equal(same.read(0), PICTURES[0, :, :5])


def test_notes_are_seen_through_views(tmp_path):
    for k in range(3):
        save(tmp_path / f"{k}.jpg", PICTURES[k])
    view = pictures.Prepared(pictures.First(pictures.open_pictures(tmp_path), 2), 4)
    view.read(1)
    assert view.notes.tolist() == [0, LOSSY] and not view.greyscale(1)


# ============================================================ captions
