"""Captions from files of every layout, and which of them belongs to which picture."""

import json

import numpy as np
import pytest
from PIL import Image

from unclip.errors import ConfigError, DataError
from unclip.measure import caption_files, captions, pictures


def named(*names):
    return pictures.ArrayPictures(np.zeros((len(names), 2, 2, 3), np.uint8), names=names)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        # The header of OpenCLIP's tables, other endings of lines, Excel's mark, names in folders.
        ("c.csv", "filepath,title\nb.png,two\na.png,one\n"),
        ("c.csv", "\ufefffile,caption\r\na.png,one\r\n\r\nb.png,two\r\n"),
        ("c.tsv", "\ufeffFile\tCaption \r\na.png\tone\r\nb.png\ttwo"),
        ("c.csv", "filepath,title\n/data/x/b.png,two\n/data/y/a.png,one\n"),
        ("c.csv", "file,caption\nx\\b.png,two\nx\\a.png,one\n"),
        # Names as COCO has them, of pictures that were drawn as PNG.
        ("c.csv", "file,caption\nb.jpg,two\na.JPG,one\n"),
        ("c.jsonl", '{"FILE": "a.png", "TEXT": "one"}\n{"FILE": "b.png", "TEXT": "two"}\n'),
        ("c.json", '[{"image": "a.png", "caption": ["one"]}, {"image": "b.png", "text": "two"}]'),
        ("c.jsonl", '{"file": "a.png", "caption": "one"}\n\n{"name": "b", "text": "two"}\n'),
        ("c.json", '{"b": "two", "a": ["one"]}'),
        ("c.csv", 'file_name,caption\nb.png,two\na.png,"one"\n'),
        ("c.tsv", "image\tprompt\na\tone\nb\ttwo\n"),
        (
            "c.json",
            json.dumps(
                {
                    "images": [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}],
                    "annotations": [
                        {"image_id": 3, "caption": "two"},
                        {"image_id": 7, "caption": "one"},
                    ],
                }
            ),
        ),
    ],
)
def test_caption_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    found = captions.read_captions(tmp_path / name)
    assert captions.match(found, named("a.png", "b.png"), name) == [["one"], ["two"]]


def test_several_captions_of_a_picture_stay_in_order(tmp_path):
    (tmp_path / "c.csv").write_text("file,caption\na.png,one\na.png,uno\n")
    found = captions.read_captions(tmp_path / "c.csv")
    assert captions.match(found, named("a.png"), "c") == [["one", "uno"]]


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("c.txt", "one", ConfigError, "expected .jsonl"),
        ("c.json", "[1]", DataError, "entry 1: expected an object"),
        ("c.json", '"a"', DataError, "expected an object"),
        ("c.json", '["a.png"]', DataError, "entry 1: expected an object"),
        ("c.jsonl", '"a.png"', DataError, "line 1: expected an object"),
        ("c.json", "{", DataError, "not JSON"),
        ("c.json", '{"a": 3}', DataError, "'a': the caption is 3"),
        ("c.json", '{"a": ""}', DataError, "'a': the caption is empty"),
        ("c.json", '{"a": ["one", null]}', DataError, "'a': the caption is empty"),
        ("c.json", '{"a": "one", "a": "two"}', DataError, "'a' comes more than once"),
        ("c.json", "<!DOCTYPE html>", DataError, "a web page"),
        ("c.json", "{}", DataError, "none there"),
        (
            "c.jsonl",
            '{"file": "a"}',
            DataError,
            "line 1: no caption, there is file; expected a name",
        ),
        ("c.jsonl", '{"file": "a", "caption": "b"}\n{', DataError, r"line 2: not JSON \(.*\)$"),
        ("c.jsonl", '{"file": "a", "caption": "b", "text": "c"}', DataError, "'text' differ"),
        ("c.jsonl", '{"file": "a", "caption": "b\\nc"}', DataError, "line 1: .* line break"),
        ("c.jsonl", '{"file": "", "caption": "b"}', DataError, "line 1: the name is empty"),
        # Cut at a comma, swallowed by a quote, shifted by a missing field: by their numbers.
        (
            "c.csv",
            "file,caption\na.png,a dog, running\nb.png,b\nc.png\n",
            DataError,
            "row 2: 3 fields, the header has 2 .*quotes.*; row 4: 1 field, the header has 2$",
        ),
        ("c.csv", 'file,caption\na.png,"one\nb.png,two\n', DataError, "row 2: unexpected end"),
        ("c.csv", 'file,caption\na,"one"two\n', DataError, "row 2: .* expected after"),
        (
            "c.csv",
            'file,caption\na,"one\ntwo"\nb,\n',
            DataError,
            "row 2: the caption has a line break.*; row 4: the caption is empty",
        ),
        ("c.csv", "file;caption\na.png;one\n", DataError, "divided by semicolons; expected commas"),
        ("c.csv", "file\tcaption\na.png\tone\n", DataError, "divided by tabs; expected commas"),
        ("c.tsv", "file,caption\na.png,one\n", DataError, "divided by commas; expected tabs"),
        ("c.csv", "file,caption,Caption\na,b,c\n", DataError, "columns come more than once"),
        ("c.csv", "file,caption\na,b\nc,d\na,b\n", DataError, "row 4 repeats row 2"),
        ("c.tsv", "file\tcaption\na\tb\tc\n", DataError, "row 2: 3 fields, the header has 2$"),
        ("c.tsv", 'file\tcaption\na\t"say ""b"""\n', DataError, "row 2: .* no quoting"),
        ("c.csv", "file,caption\n", DataError, "none there"),
        (
            "c.csv",
            "id,words\n1,one\n",
            DataError,
            "row 1: no name and no caption in the header, which is id, words; exp",
        ),
        ("absent.csv", None, DataError, "cannot be read"),
    ],
)
def test_wrong_caption_files_are_reported(tmp_path, name, text, error, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        captions.read_captions(tmp_path / name)


def test_a_file_too_large_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_files, "MAX_BYTES", 10)
    (tmp_path / "c.csv").write_text("file,caption\na,b\n")
    with pytest.raises(DataError, match="larger than 10 bytes"):
        captions.read_captions(tmp_path / "c.csv")


def test_captions_and_pictures_that_do_not_match_are_listed():
    given = {"a.png": ["one"], "c.png": ["three"]}
    with pytest.raises(ConfigError) as caught:
        captions.match(given, named("a.png", "b.png"), "c.csv")
    message = caught.value.message
    assert "1 pictures without caption (b.png) and 1 captions without picture (c.png)" in message
    # A name without extension that two pictures share belongs to neither.
    with pytest.raises(ConfigError, match="2 pictures without caption"):
        captions.match({"a": ["one"]}, named("a.png", "a.jpg"), "c.csv")
    both = {"a.png": ["one"], "a.jpg": ["two"]}
    with pytest.raises(ConfigError, match=r"1 captions without picture \(a.jpg\)"):
        captions.match(both, named("a.png"), "c.csv")
    assert captions.match(both, named("a.jpg", "a.png"), "c.csv") == [["two"], ["one"]]
    with pytest.raises(ConfigError, match="2 pictures without caption"):
        captions.match({"x/a.png": ["1"], "y/a.png": ["2"]}, named("a.png", "b.png"), "c.csv")


def test_keys_may_hold_dots():
    """What follows a dot is an extension only where it is that of a picture."""
    given = {"v1.5": ["one"], "v1.6.png": ["two"]}
    assert captions.match(given, named("v1.6", "v1.5"), "c") == [["two"], ["one"]]


def test_texts_are_taken_as_they_are(tmp_path):
    """Lines of JSON end at the line feed alone, and a .tsv knows no quotes."""
    texts = ["a\u2028b", "a\x85b", "„a“", 'the "stop" sign', '"stop" is "red"']
    lines = [json.dumps({"file": f"{i}", "caption": t}, ensure_ascii=False)
             for i, t in enumerate(texts)]  # fmt: skip
    (tmp_path / "c.jsonl").write_text("\n".join(lines), "utf-8", newline="")
    lines = ["file\tcaption", *(f"{i}\t{t}" for i, t in enumerate(texts))]
    (tmp_path / "c.tsv").write_text("\n".join(lines), "utf-8", newline="")
    for name in ("c.jsonl", "c.tsv"):
        found = captions.read_captions(tmp_path / name)
        assert found == {f"{i}": [text] for i, text in enumerate(texts)}


def test_every_wrong_row_is_told(tmp_path):
    rows = [f"{i}.png," for i in range(11)]
    (tmp_path / "c.csv").write_text("\n".join(["file,caption", *rows]))
    with pytest.raises(DataError, match="row 9: the caption is empty; … and 3 more") as caught:
        captions.read_captions(tmp_path / "c.csv")
    assert "\n" not in caught.value.message and "row 12: the" in caught.value.table


def test_other_encodings_are_told(tmp_path):
    for encoding, message in (("utf-16", "UTF-16"), ("latin-1", "byte 0xe9 .* is not UTF-8")):
        (tmp_path / "c.csv").write_text("file,caption\na,caf\xe9\n", encoding)
        with pytest.raises(DataError, match=message):
            captions.read_captions(tmp_path / "c.csv")


# ============================================================ COCO's and Karpathy's layouts


def coco(images, annotations):
    return {"images": images, "annotations": annotations}


@pytest.mark.parametrize(
    "value",
    [
        # Ids as numbers on one side and texts on the other.
        coco(
            [{"id": 0, "file_name": "a.png"}, {"id": "01", "file_name": "b.png"}],
            [{"image_id": "0", "caption": "one\n"}, {"image_id": 1, "caption": " two\nlines"}],
        ),
        coco(
            [{"id": "x", "file_name": "a.png"}, {"id": 7, "file_name": "b.png"}, {"id": 8}],
            [{"image_id": 7.0, "caption": "two lines"}, {"image_id": "x", "caption": "one"}],
        ),
        {
            "dataset": "coco",
            "images": [
                {"filepath": "val2014", "filename": "a.jpg", "sentences": [{"raw": "one"}]},
                {"filepath": "val2014", "filename": "b.jpg", "sentences": [{"raw": "two lines"}]},
            ],
        },
    ],
)
def test_images_with_annotations(tmp_path, value):
    (tmp_path / "c.json").write_text(json.dumps(value))
    found = captions.read_captions(tmp_path / "c.json")
    assert captions.match(found, named("a.png", "b.png"), "c") == [["one"], ["two lines"]]


IMAGE = {"id": 1, "file_name": "a.png"}


@pytest.mark.parametrize(
    "value, message",
    [
        (coco([IMAGE], [{"image_id": 1}]), "no 'caption': expected COCO's captions"),
        (coco([IMAGE], [{"image_id": 2, "caption": "x"}]), "annotation 1 is of image 2"),
        (coco([IMAGE], [{"image_id": 1, "caption": " "}]), r"image 1 \(a.png\): .* empty"),
        (
            coco([IMAGE], [{"caption": "x"}, {"image_id": 1, "caption": 4}]),
            "annotation 1 has no 'image_id'; annotation 2: the caption is 4",
        ),
        (coco([IMAGE, IMAGE], []), "image ids come more than once: 1"),
        (coco([{"file_name": "a.png"}], []), "image 1 has no 'id'"),
        (coco([{"id": 1}], [{"image_id": 1, "caption": "x"}]), "image 1 has no file name"),
        (coco([IMAGE], []), "none there"),
        ({"images": [IMAGE]}, 'without "annotations"'),
        ({"images": [{"filename": "a", "sentences": ["x"]}]}, 'image 1: expected "sentences"'),
    ],
)
def test_wrong_annotations(tmp_path, value, message):
    (tmp_path / "c.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match=message):
        captions.read_captions(tmp_path / "c.json")


def test_one_name_in_two_folders(tmp_path):
    images = [
        {"filepath": folder, "filename": "a.jpg", "sentences": [{"raw": folder}]} for folder in "xy"
    ]
    (tmp_path / "c.json").write_text(json.dumps({"images": images}))
    assert captions.read_captions(tmp_path / "c.json") == {"x/a.jpg": ["x"], "y/a.jpg": ["y"]}


# ============================================================ a set's own captions


def test_own_captions_are_all_or_none():
    some = pictures.ArrayPictures(
        np.zeros((2, 2, 2, 3), np.uint8), names=["a", "b"], captions=["x", None]
    )
    with pytest.raises(ConfigError, match="1 of 2 pictures have no caption: b"):
        captions.own(some)
    assert captions.own(named("a")) is None


def test_a_caption_that_cannot_be_read_is_one_line(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"a caption cannot be read: .*a\.txt") as caught:
        captions.own(pictures.open_pictures(tmp_path))
    assert "\n" not in str(caught.value)
