"""`unclip metrics` as a user sees it: output, files, and every mistake in one line."""

import json
import re
import struct
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from unclip import tasks
from unclip.cascade import bundle
from unclip.files import images

ARCH = dict(
    embed_dim=8, image_size=16, patch_size=8, vision_width=64, vision_layers=1, vision_heads=1,
    text_width=64, text_layers=1, text_heads=1, context=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def metrics(serve_verb):
    """metrics(*arguments) -> (exit code, stdout, stderr), see `serve_verb`."""
    with serve_verb("metrics") as run:
        yield run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of everything: pictures good and bad, captions, a CLIP and a broken one."""
    folder = tmp_path_factory.mktemp("metrics")
    rng = np.random.default_rng(0)
    for name, count, side in (("real", 12, 16), ("fake", 10, 16), ("wide", 3, 20), ("bad", 3, 16),
                              ("one", 1, 16)):  # fmt: skip
        (folder / name).mkdir()
        for i in range(count):
            picture = rng.integers(0, 256, (16, side, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / name / f"{i}.png")
    # Six bytes of EXIF, and a copy that an editor left.
    picture = (folder / "fake" / "2.png").read_bytes()
    chunk = b"eXIf" + b"MM\0*\0\0"
    chunk = struct.pack(">I", 6) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (folder / "fake" / "2.png").write_bytes(picture[:33] + chunk + picture[33:])
    (folder / "fake" / ".ipynb_checkpoints").mkdir()
    (folder / "fake" / ".ipynb_checkpoints" / "2-checkpoint.png").write_bytes(picture)
    (folder / "bad" / "1.png").write_bytes((folder / "bad" / "1.png").read_bytes()[:90])
    rows = [f"{i}.png,picture {i}" for i in range(10)]
    (folder / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    (folder / "others.csv").write_text("file,caption\n0.png,zero\nx.png,none\n")
    (folder / "cut.csv").write_text("file,caption\n0.png,a dog, running\n")
    (folder / "drawn").mkdir()
    for i in range(2):
        picture = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        images.write_png(folder / "drawn" / f"{i}.png", picture, {"prompt": f"picture {i}"})
    shapes = jax.eval_shape(tasks.ClipTask(ARCH).init, jax.random.key(0))
    for name, scale in (("clip", 0.2), ("broken", np.nan)):
        params = jax.tree.map(
            lambda s, scale=scale: (scale * rng.normal(size=s.shape)).astype(np.float32), shapes
        )
        bundle.write(folder / name, {"clip": bundle.Part("clip", ARCH, params)})
    return folder


def test_a_table_and_the_same_as_json(metrics, files):
    asked = ("--real", files / "real", "--fake", files / "fake", "--clip", files / "clip",
             "--captions", files / "captions.csv", "--metrics", "fd-clip,clip_score",
             "--candidates", 4, "--out", files / "out.json")  # fmt: skip
    code, out, err = metrics(*asked)
    assert code == 0 and "EXIF" not in err, err
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["metric", "value"] and lines[1].split()[0] == "fd-clip"
    assert any(line.startswith("warning: 12 real and 10 fake pictures") for line in lines)
    found = json.loads((files / "out.json").read_text())
    keys = [value["key"] for value in found["values"]]
    hex8 = "[0-9a-f]{8}"  # of the CLIP, which nobody published, of the pictures, of the captions
    clip = rf"clip\.16px8-w64-l1-d8-{hex8}\.openai"
    assert re.fullmatch(f"fd-clip/{clip}/real={hex8}/N=10", keys[0])
    assert re.fullmatch(f"clip_score/{clip}/captions={hex8}/N=10", keys[1])
    assert f"{found['values'][0]['value']:.6g}" in lines[1] and keys[1] in lines[2]
    code, out, _ = metrics(*asked, "--json", "--batch_size", 7)
    printed = json.loads(out)
    assert (code, printed["values"], printed["warnings"]) == (0, found["values"], found["warnings"])


def test_statistics_are_saved_and_used(metrics, files):
    saved = files / "real.npz"
    code, out, err = metrics("--real", files / "real", "--clip", files / "clip", "--metrics",
                             "fd-clip", "--save_statistics", saved)  # fmt: skip
    assert code == 0, err
    assert out == f"{saved}: statistics of z_i\n"
    values = []
    for real in (files / "real", saved):
        code, out, err = metrics("--real", real, "--fake", files / "fake", "--clip",
                                 files / "clip", "--metrics", "fd-clip", "--json")  # fmt: skip
        assert code == 0, err
        values.append(json.loads(out)["values"])
    assert values[0] == values[1]


def test_prompts_in_generated_pictures_are_captions(metrics, files):
    code, out, err = metrics("--fake", files / "drawn", "--clip", files / "clip", "--metrics",
                             "clip_cosine", "--json")  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["provenance"]["captions_sha256"]


def test_crop_limit_and_allow(metrics, files):
    code, out, err = metrics("--real", files / "real", "--fake", files / "wide", "--clip",
                             files / "clip", "--metrics", "fd-clip", "--crop", 8, "--limit", 2,
                             "--json")  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["provenance"]["fake"]["sizes"] == {"8x8": 2}
    assert "[:2] (centre square, bicubic 8x8)" in found["provenance"]["fake"]["source"]
    code, out, err = metrics(
        "--real",
        files / "real",
        "--fake",
        files / "bad",
        "--clip",
        files / "clip",
        "--metrics",
        "fd-clip",
        "--allow",
        "corrupt",
    )
    assert code == 0 and "warning: fake: 1 unreadable pictures were left out" in out


def test_mistakes_are_one_line(metrics, files):
    fid = ("--metrics", "fid")
    clip = ("--metrics", "fd-clip", "--clip", files / "clip")
    fake, real = ("--fake", files / "fake"), ("--real", files / "real")
    score = (*fake, "--metrics", "clip_score", "--clip", files / "clip")
    cases = [
        ((), 78, "expected --metrics, of fid"),
        (fid, 78, "expected --fake"),
        ((*fid, *fake, *real), 78, "get pt_inception-2015-12-05-6726825d.pth"),
        ((*fid, *fake, *real), 78, "fd-clip needs neither (give it --clip)"),
        (("--metrics", "fdi", *fake), 78, "did you mean 'fid'"),
        ((*clip, *fake), 78, "give --real"),
        ((*clip, *fake, *real, "--allow", "corupt"), 78, "did you mean 'corrupt'"),
        ((*clip, *fake, *real, "more"), 78, "unexpected 'more'"),
        ((*clip, *fake, *real, "--batchsize", 3), 78, "did you mean '--batch_size'"),
        ((*clip, *fake, *real, "--limit", 1), 78, "limit"),
        ((*clip, *fake, "--real", files / "rael"), 74, "did you mean"),
        ((*clip, *real, "--fake", files / "one"), 78, "1 fake picture; at least 2"),
        ((*clip, *real, "--fake", files / "wide"), 78, "fake 20x16 (3)"),
        ((*clip, *real, "--fake", files / "bad"), 74, "1.png (truncated"),
        ((*clip, *real, "--save_statistics", "x.txt"), 78, "ending in .npz"),
        ((*clip, *fake, "--save_statistics", "x.npz"), 78, "those of --real"),
        ((*clip, *real, *fake, "--process_id", 1), 78, "give all three"),
        (score, 78, "clip_score needs the caption of every picture"),
        ((*score, "--captions", files / "others.csv"), 78, "9 pictures without caption (1.png"),
        ((*score, "--captions", files / "absent.csv"), 74, "cannot be read"),
        ((*score, "--captions", files / "cut.csv"), 74, "row 2: 3 fields, the header has 2"),
        ((*fid, *fake, *real, "--inception", files / "absent.pth"), 74, "no such file or folder"),
        ((*fake, *real, "--metrics", "fd-clip", "--clip", files / "broken"), 70, "'0.png'"),
    ]
    for arguments, want, message in cases:
        code, out, err = metrics(*arguments)
        assert (code, message in err, out) == (want, True, ""), (arguments, code, err)
        assert len(err.splitlines()) == 1, err
