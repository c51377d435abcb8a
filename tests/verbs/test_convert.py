"""`unclip convert` as a user sees it: the verb, its errors and its exit codes."""

import json
import pathlib

import jax
import numpy as np
import pytest

from unclip import errors, tasks
from unclip.cascade import bundle
from unclip.files import tensors
from unclip.interop import formats

ARCH = dict(
    embed_dim=8, image_size=8, patch_size=4, vision_width=64, vision_layers=1, vision_heads=1,
    text_width=64, text_layers=1, text_heads=1, context=77, activation="quick_gelu",
)  # fmt: skip


@pytest.fixture(scope="module")
def clip_bundle(tmp_path_factory):
    """A small random CLIP as a bundle, half its tensors bfloat16."""
    shapes = jax.eval_shape(tasks.ClipTask(ARCH).init, jax.random.key(0))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
    folder = tmp_path_factory.mktemp("clip") / "bundle"
    bundle.write(folder, {"clip": bundle.Part("clip", ARCH, params)}, dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def hf_folder(clip_bundle):
    """The same as `unclip convert --to hf-clip` writes it."""
    folder = clip_bundle.parent / "hf"
    formats.write("hf-clip", bundle.read(clip_bundle, lazy=True).parts, folder)
    return folder


@pytest.fixture(scope="module")
def convert(serve_verb):
    """convert(*arguments) -> (exit code, stdout, stderr), see `serve_verb`."""
    with serve_verb("convert") as run:
        yield run


def test_there_and_back_keeps_every_bit(convert, clip_bundle, hf_folder, tmp_path):
    code, out, err = convert("--from", "hf-clip", hf_folder, "--out", tmp_path / "back")
    assert code == 0, err
    want, got = (bundle.read_part(f, "clip") for f in (clip_bundle, tmp_path / "back"))
    count = sum(leaf.size for leaf in jax.tree.leaves(want.params))
    assert f"{count:,} parameters" in out
    assert bundle.describe(tmp_path / "back")["hash"] in out
    assert jax.tree.structure(want.params) == jax.tree.structure(got.params)
    for a, b in zip(jax.tree.leaves(want.params), jax.tree.leaves(got.params)):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    assert {name: got.arch[name] for name in ARCH} == ARCH


def test_dtype_is_cast_on_the_way(convert, hf_folder, tmp_path):
    code, _, err = convert(
        "--from=hf-clip", hf_folder, f"--out={tmp_path / 'b'}", "--dtype=float32"
    )
    assert code == 0, err
    leaves = jax.tree.leaves(bundle.read_part(tmp_path / "b", "clip").params)
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}


def test_other_tensors_are_listed_and_nothing_is_written(convert, hf_folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    found, _ = tensors.read(hf_folder / "model.safetensors")
    del found["text_projection.weight"]
    found["lora.weight"] = np.zeros((2, 3), np.float32)
    found["visual_projection.weight"] = np.zeros((8, 32), np.float32)
    tensors.write(source / "model.safetensors", found)
    code, _, err = convert("--from", "hf-clip", source, "--out", tmp_path / "out")
    assert code == 78
    for line in (
        "1 tensors missing, 1 not expected, 1 of another shape",
        "missing  text_projection.weight  ->  text/proj/kernel [64, 8]",
        "extra    lora.weight [2, 3]",
        "shape    visual_projection.weight [8, 32], [32, 8] as ours  ->  vision/proj/kernel",
    ):
        assert line in err
    assert not (tmp_path / "out").exists()


def test_wrong_commands_are_one_line(convert, clip_bundle, hf_folder, tmp_path):
    out = tmp_path / "o"
    cases = [
        (["x", "--out", out], "expected either --from FORMAT or --to FORMAT"),
        (["--from", "karlo", "--to", "diffusers", "x", "--out", out], "expected either --from"),
        (["--from", "karlo", "x"], "expected --out"),
        (["--from", "karlo", "--out", out], "expected the path of a karlo file or folder"),
        (["--to", "hf-clip", "--out", out], "expected the path of a bundle"),
        (["--to", "hf-clip", clip_bundle, hf_folder, "--out", out], "takes one bundle, given 2"),
        (["--to", "hf-clip", clip_bundle, "--dtype=float32", "--out", out], "with --from only"),
    ]
    for arguments, message in cases:
        code, _, err = convert(*arguments)
        assert (code, message in err) == (78, True), (arguments, err)
        assert len(err.splitlines()) == 1 and not out.exists()


@pytest.mark.parametrize(
    ("kind", "path", "error", "message"),
    [
        ("karl", "{hf}", errors.ConfigError, "did you mean 'karlo'"),
        ("karlo", "absent", errors.DataError, "absent: no such file or folder"),
        ("karlo", "{hf}", errors.DataError, "no Karlo there"),
        ("t5", "{hf}", errors.ConfigError, "clip"),
        ("inception", "{hf}", errors.ConfigError, "expected"),
        ("kandinsky2_2-prior", "{hf}", errors.DataError, "model_index.json"),
        ("openai-clip", "{hf}", errors.ConfigError, "OpenAI|image tower|expected"),
    ],
)
def test_wrong_sources_are_reported(kind, path, error, message, hf_folder):
    with pytest.raises(error, match=message):
        formats.read(kind, [pathlib.Path(path.format(hf=hf_folder))])


def test_wrong_targets_are_reported(clip_bundle, hf_folder):
    parts = bundle.read(clip_bundle, lazy=True).parts
    with pytest.raises(errors.ConfigError, match="did you mean 'diffusers'"):
        formats.write("diffuser", parts, hf_folder)
    with pytest.raises(errors.DataError, match="is not an empty folder"):
        formats.write("hf-clip", parts, hf_folder)
    with pytest.raises(errors.ConfigError, match="this bundle has nothing"):
        formats.write("hf-clip", {}, hf_folder.parent / "new")


def test_a_truncated_source_leaves_no_bundle(hf_folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    whole = (hf_folder / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(errors.DataError, match="is damaged"):
        formats.read("hf-clip", [source])


def test_downloads_that_went_wrong_are_told(convert, hf_folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"
    (source / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    (source / "model.safetensors").write_text(pointer)
    (tmp_path / "html.safetensors").write_text("<!DOCTYPE html><html>")
    for kind, path, message in (
        ("hf-clip", source, "it is a Git LFS pointer, not the file"),
        ("open-clip", tmp_path / "html.safetensors", "it is a web page"),
    ):
        code, _, err = convert("--from", kind, path, "--out", tmp_path / "out")
        assert code == 74 and message in err and len(err.splitlines()) == 1
    (source / "config.json").write_text(pointer)
    code, _, err = convert("--from", "hf-clip", source, "--out", tmp_path / "out")
    assert code == 74 and "config.json is a Git LFS pointer" in err


def test_every_format_has_its_reader():
    places = [*formats.FROM.values(), *formats.TO.values()]
    assert all(callable(formats.function(place)) for place in places)


def test_what_is_written_says_what_it_is(hf_folder):
    config = json.loads((hf_folder / "config.json").read_text())
    assert config["model_type"] == "clip" and config["projection_dim"] == 8
    assert (hf_folder / "vocab.json").exists() and (hf_folder / "merges.txt").exists()
