"""Making protocols, the emoji's, and MS-COCO's caption lists and references."""

import hashlib
import io
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from unclip import protocols
from unclip.errors import ConfigError, DataError
from unclip.measure import caption_files
from unclip.measure.pictures import TfdsPictures
from unclip.protocols import base, coco


def test_every_name_is_known():
    assert set(protocols.WITH_FILE) <= set(protocols.NAMES)
    with pytest.raises(ConfigError, match="did you mean 'scenes'"):
        protocols.make("scene")
    with pytest.raises(ConfigError, match="did you mean 'size'"):
        protocols.make("emoji-held-out", sizes=4)
    for name in ("geneval", "geneval:", "scenes:x", "emoji-held-out:x"):
        with pytest.raises(ConfigError, match="expected"):
            protocols.make(name)


# ============================================================ emoji


@pytest.mark.parametrize("caption", ["txt", "name"])
def test_emoji_are_the_shards_own(caption):
    protocol = protocols.make("emoji-held-out", size=32, caption=caption, count=None)
    with tarfile.open(base.EMOJI / "held-out-0000.tar") as shard:
        texts = {m.name: shard.extractfile(m).read() for m in shard if m.name[-4:] != "webp"}
    assert len(protocol.keys) == len(set(protocol.keys)) == 188
    for key, prompt in zip(protocol.keys, protocol.prompts):
        if caption == "txt":
            assert prompt == texts[f"{key}.txt"].decode()
        else:
            assert prompt == json.loads(texts[f"{key}.json"])["name"]
    assert protocol.id == f"emoji-held-out.{caption}.size32" and protocol.size == 32
    reference = protocol.reference()
    assert reference.read(7).shape == (32, 32, 3) and reference.read(7).dtype == np.uint8
    assert reference.name(7) == protocol.keys[7] and reference.caption(7) == protocol.prompts[7]
    assert protocol.judge(np.zeros((188, 32, 32, 3), np.uint8)) == ({}, [])
    lines = "".join(f"{k}\t{p}\n" for k, p in zip(protocol.keys, protocol.prompts))
    assert protocol.provenance["captions_sha256"] == hashlib.sha256(lines.encode()).hexdigest()


def test_fewer_emoji_have_another_id():
    protocol = protocols.make("emoji-held-out", count=3)
    assert protocol.id == "emoji-held-out.txt.first3.size64" and len(protocol.reference()) == 3
    assert protocols.make("emoji-held-out", count=0, shards="").id == "emoji-held-out.txt.size64"
    for wrong in (-1, 189):
        with pytest.raises(ConfigError, match="1 to 188"):
            protocols.make("emoji-held-out", count=wrong)
    with pytest.raises(ConfigError, match="valid: name, txt"):
        protocols.make("emoji-held-out", caption="keywords")
    with pytest.raises(ConfigError, match="size 4"):
        protocols.make("emoji-held-out", size=4)


def test_other_shards_are_no_emoji(tmp_path):
    """Shards by their content: a copy is the shipped set, another caption or picture is not."""
    source = base.EMOJI / "held-out-0000.tar"
    shutil.copy(source, tmp_path / "copy.tar")
    make = lambda name, **settings: protocols.make(
        "emoji-held-out", shards=str(tmp_path / name), **settings
    )
    assert make("copy.tar", count=5).id == "emoji-held-out.txt.first5.size64"
    ids = set()
    for name, change in (("a", b"another caption"), ("b", b"a third"), ("c", b"a third")):
        with tarfile.open(source) as held, tarfile.open(tmp_path / f"{name}.tar", "w") as shard:
            for number, member in enumerate(held):
                data = held.extractfile(member).read()
                data = change if number < 9 and member.name.endswith(".txt") else data
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
        protocol = make(f"{name}.tar")
        assert re.fullmatch(r"held-out-[0-9a-f]{8}\.txt\.size64", protocol.id)
        ids.add(protocol.id)
    assert len(ids) == 2
    # A part of the shipped set is not that set, though all of its pictures are shipped.
    with tarfile.open(source) as held, tarfile.open(tmp_path / "part.tar", "w") as shard:
        for member in list(held)[:30]:
            shard.addfile(member, held.extractfile(member))
    assert make("part.tar").id.startswith("held-out-")


def test_other_objects_have_another_id(tmp_path):
    """Of scenes and of the attacked pictures alike; a copy of the shipped folder is no other."""
    for path in base.EMOJI.glob("train-*.tar"):
        shutil.copy(path, tmp_path)
    make = lambda name, **given: protocols.make(name, folder=str(tmp_path), size=16, **given).id
    assert make("typographic", count=3) == "typographic.scene-objects.seed0.n3.size16"
    with open(tmp_path / "train-0003.tar", "ab") as file:
        file.write(bytes(512))
    other = make("typographic", count=3)
    marked = re.fullmatch(r"typographic\.scene-objects(-[0-9a-f]{8})\.seed0\.n3\.size16", other)
    assert make("scenes", count=1) == f"scenes{marked[1]}.seed1.n1.size16"


def test_other_reconstructed_pictures_have_another_id(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{i}.png")
    make = lambda **given: (
        protocols.make("reconstruction", count=2, size=8, fit_count=2, **given).id
    )
    shipped, folder = make(), str(tmp_path)
    assert make(pictures=str(base.EMOJI / "held-out-*.tar")) == shipped
    found = {shipped, make(pictures=folder), make(fit=folder), make(pictures=folder, fit=folder)}
    assert len(found) == 4 and all(".n2.d20-" in id for id in found)


def test_text_protocols_draw_with_generate():
    calls = []

    class Model:
        def generate(self, prompts, seed, **settings):
            calls.append((prompts, seed, settings))

    protocol = protocols.make("emoji-held-out", count=3)
    protocol.draw(Model(), [5, 9], {"stages": 1}, rows=[2, 0])
    assert calls == [([protocol.prompts[2], protocol.prompts[0]], [5, 9], {"stages": 1})]
    with pytest.raises(ConfigError, match="2 given for 3 rows"):
        protocol.draw(Model(), [1, 2])


# ============================================================ MS-COCO


@pytest.fixture
def val(tmp_path):
    """Twelve images with up to three captions each: (annotation file, folder of pictures)."""
    rng = np.random.default_rng(0)
    images, rows = [], []
    folder = tmp_path / "val2014"
    folder.mkdir()
    for image in range(100, 112):
        name = f"COCO_val2014_{image:012d}.jpg"
        images.append({"id": image, "file_name": name})
        for k in range(1 + image % 3):
            rows.append(
                {
                    "id": 10 * image + k,
                    "image_id": image,
                    "caption": f"  picture {image},\n caption  {k} ",
                }
            )
        picture = rng.integers(0, 256, (40, 30 + image % 30, 3)).astype(np.uint8)
        Image.fromarray(picture).save(folder / name, "PNG")
    file = tmp_path / "captions_val2014.json"
    file.write_text(json.dumps({"images": images, "annotations": rows[::-1]}))
    return file, folder


def make(**settings):
    paths = {k: str(v) for k, v in settings.items() if k in ("annotations", "captions", "pictures")}
    return protocols.make("coco2014val-30k", **settings | paths)


def test_the_pick_is_by_hash(val):
    """Spelled out here a second time; a list that was published once must never change."""
    protocol = make(annotations=val[0], count=5, seed=3)
    digest = lambda text: hashlib.sha256(text.encode()).digest()
    order = sorted(range(100, 112), key=lambda image: digest(f"3/{image}"))[:5]
    assert protocol.keys == [f"{image:012d}" for image in order]
    for image, prompt in zip(order, protocol.prompts):
        k = int.from_bytes(digest(f"3/{image}/caption")[:8], "big") % (1 + image % 3)
        assert prompt == f"picture {image}, caption {k}"
    listed = protocol.provenance["captions_sha256"][:8]
    assert protocol.id == f"coco2014val-5.one-per-image.seed3.of12.captions-{listed}.crop256"
    assert protocol.reference() is None and protocol.size == 256
    longer = make(annotations=val[0], count=9, seed=3)
    assert longer.prompts[:5] == protocol.prompts
    assert make(annotations=val[0], count=5, seed=4).keys != protocol.keys


def test_published_size_and_full_set_shorten_the_id():
    captions = {image: [f"a {image}"] for image in range(coco.IMAGES)}
    chosen = coco.pick(captions, 30_000, 0)
    assert len(chosen) == 30_000 == len(set(chosen))
    first = [f"{image}" for image in list(chosen)[:3]]
    expected = sorted(captions, key=lambda i: hashlib.sha256(f"0/{i}".encode()).digest())[:3]
    assert first == list(map(str, expected))


def test_references_are_the_same_images_cropped(val):
    protocol = make(annotations=val[0], pictures=val[1], count=6, size=16)
    reference = protocol.reference()
    assert [reference.name(i) for i in range(6)] == protocol.keys
    assert [reference.caption(i) for i in range(6)] == protocol.prompts
    with Image.open(val[1] / f"COCO_val2014_{protocol.keys[2]}.jpg") as picture:
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = picture.crop((left, top, left + side, top + side))
        expected = square.resize((16, 16), Image.Resampling.BICUBIC)
    assert (reference.read(2) == np.asarray(expected)).all()
    box = make(annotations=val[0], pictures=val[1], count=6, size=16, filter="box")
    assert box.id.endswith(".crop16-box") and protocol.id.endswith(".crop16")
    assert (box.reference().read(2) != reference.read(2)).any()


def test_missing_pictures_are_listed(val):
    protocol = make(annotations=val[0], count=12)
    for key in protocol.keys[:2]:
        (val[1] / f"COCO_val2014_{key}.jpg").unlink()
    with pytest.raises(DataError, match=f"lacks 2 of 12 pictures: {protocol.keys[0]}"):
        make(annotations=val[0], pictures=val[1], count=12)
    fewer = make(annotations=val[0], pictures=val[1], count=12, allow_missing=True)
    assert fewer.provenance["missing"] == protocol.keys[:2] and ".missing2." in fewer.id
    assert fewer.keys == protocol.keys[2:] and len(fewer.reference()) == 10


@pytest.mark.parametrize(
    "name, text",
    [
        ("list.csv", 'image_id,text\n103,a dog\n42,"a cat, asleep"\n'),
        (
            "list.csv",
            "file_name,caption\nCOCO_val2014_000000000103.jpg,a dog\n"
            'COCO_val2014_000000000042.jpg,"a cat, asleep"\n',
        ),
        (
            "list.jsonl",
            '{"image_id": 103, "caption": "a dog"}\n{"name": "42", "text": "a cat, asleep"}',
        ),
        ("list.tsv", "name\tprompt\n000000000103\ta dog\n000000000042\ta cat, asleep\n"),
    ],
)
def test_a_fixed_list_is_taken_as_it_is(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    protocol = make(captions=tmp_path / name)
    assert protocol.keys == ["000000000103", "000000000042"]
    assert protocol.prompts == ["a dog", "a cat, asleep"]
    assert protocol.id == f"coco2014val-2.list-{protocol.provenance['captions_sha256'][:8]}.crop256"
    with pytest.raises(DataError, match="2 captions, expected 30000"):
        make(captions=tmp_path / name, count=30_000)


@pytest.mark.parametrize(
    "text, message",
    [
        ("image_id,text\n1,a\n1,b\n", "image ids come more than once: 1"),
        ("image_id,text\nx,a\n", "row 2: expected an image"),
        ("image_id,text\n1,\n", "row 2: the caption is empty"),
        ("image_id,text\n1,a dog, asleep\n", "row 2: 3 fields"),
        ("image_id,text\n", "none there"),
        ("a,b\n1,2\n", "row 1: no name and no caption in the header"),
    ],
)
def test_damaged_lists(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        make(captions=tmp_path / "list.csv")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v["images"].append(v["images"][0]), "image ids come more than once: 100"),
        (lambda v: v["annotations"].append(v["annotations"][0]), "annotation ids"),
        (lambda v: v["annotations"].append({"id": 1, "image_id": 7, "caption": "x"}), "image 7"),
        (lambda v: v["annotations"].append({"id": 1, "caption": "x"}), "has no 'image_id'"),
        (lambda v: v["images"].append({"id": "x", "file_name": "y"}), "expected a number as"),
        (lambda v: v.pop("images"), "layout"),
    ],
)
def test_damaged_annotations(val, change, message):
    value = json.loads(val[0].read_text())
    change(value)
    val[0].write_text(json.dumps(value))
    with pytest.raises(DataError, match=message):
        make(annotations=val[0], count=2)


def test_karpathys_file_is_read_too(val, tmp_path):
    """His file has every image of COCO, those of training among them, and ids as texts."""
    value = json.loads(val[0].read_text())
    images = [
        {
            "cocoid": str(image["id"]),
            "filepath": "val2014" if image["id"] > 103 else "train2014",
            "filename": image["file_name"],
            "sentences": [
                {"sentid": row["id"], "raw": row["caption"]}
                for row in value["annotations"]
                if row["image_id"] == image["id"]
            ],
        }
        for image in value["images"]
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    found = coco.read_annotations(tmp_path / "dataset_coco.json")
    want = coco.read_annotations(val[0])
    assert found == {image: texts for image, texts in want.items() if image > 103}


def test_other_bad_input(val, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="needs captions"):
        make()
    with pytest.raises(ConfigError, match="not both"):
        make(annotations=val[0], captions=val[0])
    with pytest.raises(ConfigError, match="valid: bicubic, box"):
        make(annotations=val[0], filter="lanczos")
    with pytest.raises(DataError, match="12 images have captions, 30000 were asked for"):
        make(annotations=val[0])
    with pytest.raises(ConfigError, match=r"\.csv, \.tsv or \.jsonl"):
        make(captions=val[0])
    with pytest.raises(DataError, match="cannot be read"):
        make(annotations=tmp_path / "none.json")
    monkeypatch.setattr(caption_files, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="larger than 10 bytes"):
        make(annotations=val[0])


def test_shards_by_their_image_ids(tmp_path):
    """Keys may be running numbers: the JSON's image_id says which picture it is."""
    path = tmp_path / "coco-0000.tar"
    with tarfile.open(path, "w") as shard:
        for number, image in enumerate((42, 7, 9)):
            file = io.BytesIO()
            Image.new("RGB", (20, 20), (image, 0, 0)).save(file, "PNG")
            members = {
                "png": file.getvalue(),
                "txt": f"picture {image}".encode(),
                "json": json.dumps({"image_id": image}).encode(),
            }
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    protocol = make(pictures=path, count=3, size=8)
    assert sorted(protocol.keys) == ["000000000007", "000000000009", "000000000042"]
    for i, key in enumerate(protocol.keys):
        assert protocol.prompts[i] == f"picture {int(key)}"
        assert (protocol.reference().read(i) == [int(key), 0, 0]).all()


@pytest.mark.parametrize("columns", [True, False])
def test_tfds_splits_are_in_the_id(monkeypatch, columns):
    def caption(image):
        rows = [(3, b"third"), (1, b"first"), (2, b"second")]
        if columns:
            return {"id": np.array([i for i, _ in rows]), "text": [t for _, t in rows]}
        return [{"id": i, "text": t} for i, t in rows]

    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG")
    records = [{"image": file.getvalue(), "image/id": i, "captions": caption(i)} for i in (5, 6)]

    class Fake(TfdsPictures):
        def __init__(self):
            super(TfdsPictures, self).__init__(coco.KARPATHY, 2)

        def record(self, i):
            return records[i]

    monkeypatch.setattr(coco, "open_pictures", lambda spec: Fake())
    protocol = make(pictures=coco.KARPATHY, count=2, size=8)
    head, _, tail = protocol.id.partition(protocol.provenance["captions_sha256"][:8])
    assert head == "coco2014val-2.one-per-image.seed0.of2.captions-"
    assert tail == ".tfds-restval+val+test.crop8"
    names = {int(key): prompt for key, prompt in zip(protocol.keys, protocol.prompts)}
    assert names == coco.pick({i: ["first", "second", "third"] for i in (5, 6)}, 2, 0)
    assert protocol.reference().read(1).shape == (8, 8, 3)
