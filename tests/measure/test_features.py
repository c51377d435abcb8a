"""Extraction: the same numbers however it is cut up, every picture once, and what goes wrong."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from unclip import errors, tasks
from unclip.cascade import bundle
from unclip.input.samples import BadSample
from unclip.measure import embedders, features, inception_extractor
from unclip.measure.features import extract
from unclip.measure.picture_set import ArrayPictures, PictureSet, content_hash
from unclip.models import bilinear
from unclip.runtime import distributed

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = ((16, 16), (16, 16), (9, 21), (40, 12))


class Conv:
    """A random convolution, pooled; each picture is padded to one of two shapes."""

    id = "conv.test"
    outputs = {"mean": 6, "sum": 6}  # noqa: RUF012
    provenance = {}  # noqa: RUF012

    def __init__(self):
        rng = np.random.default_rng(1)
        self.params = {"kernel": rng.standard_normal((3, 3, 3, 6)).astype(np.float32)}
        self.traced = 0

    def prepare(self, picture):
        side = 16 if max(picture.shape[:2]) <= 16 else 40
        image = np.zeros((side, side, 3), np.uint8)
        image[: picture.shape[0], : picture.shape[1]] = picture
        return {"image": image, "area": np.float32(picture.shape[0] * picture.shape[1])}

    def apply(self, params, batch):
        self.traced += 1
        x = batch["image"].astype(np.float32) / 255
        x = jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        total = jax.nn.relu(x).sum((1, 2))
        return {"sum": total, "mean": total / batch["area"][:, None]}


class Mixed(PictureSet):
    """Pictures of several sizes; every seventh is greyscale, `damaged` ones are bad."""

    def __init__(self, count, damaged=()):
        super().__init__("mixed", count)
        self.bad = damaged
        self.reads = np.zeros(count, int)

    def name(self, i):
        return f"{i:03d}.png"

    def _load(self, i):
        self.reads[i] += 1
        if i in self.bad:
            raise BadSample("corrupt", "its end is missing")
        rng = np.random.default_rng(i)
        return rng.integers(0, 256, (*SIZES[i % len(SIZES)], 3), np.uint8), int(i % 7 == 0)


class _From(PictureSet):
    """A set without its first pictures."""

    def __init__(self, base, first):
        super().__init__("part", len(base) - first)
        self.base, self.first = base, first

    def _load(self, i):
        return self.base._load(i + self.first)


def _reference(pictures, numbers):
    """One picture at a time, by numpy."""
    conv, rows = Conv(), []
    kernel = conv.params["kernel"].astype(np.float64)
    for i in numbers:
        found = conv.prepare(pictures.read(i))
        x = np.pad(found["image"] / 255, ((1, 1), (1, 1), (0, 0)))
        side = len(found["image"])
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (0, 1))
        y = np.einsum("hwcij,ijco->hwo", windows[:side, :side], kernel)
        rows.append(np.maximum(y, 0).sum((0, 1)))
    return np.stack(rows)


def _relative(one, other):
    return np.abs(one - other).max() / np.abs(other).max()


def test_every_picture_once_in_order_padding_never():
    pictures = Mixed(21, damaged=(3, 17))
    found = extract(Conv(), pictures, batch_size=4)
    numbers = [i for i in range(21) if i not in (3, 17)]
    assert (pictures.reads == 1).all()
    assert found.count == 19 and found.names == [f"{i:03d}.png" for i in numbers]
    reason = "corrupt: its end is missing"
    assert found.bad == [("003.png", reason), ("017.png", reason)]
    assert found.greyscale == 3  # 0, 7, 14
    assert found.sizes == {(16, 16): 10, (9, 21): 5, (40, 12): 4}
    expected = _reference(Mixed(21), numbers)
    np.testing.assert_allclose(found.rows["sum"], expected, rtol=1e-4)
    assert found.rows["sum"].dtype == np.float32 and found.rows["mean"].shape == (19, 6)
    for name, rows in found.rows.items():
        moments = found.moments[name]
        assert moments.count == 19
        np.testing.assert_allclose(moments.mean(), rows.mean(0, dtype=np.float64), rtol=1e-13)
        covariance = np.cov(rows.astype(np.float64), rowvar=False)
        np.testing.assert_allclose(moments.covariance(), covariance, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP as an extractor."""
    arch = dict(
        embed_dim=24, image_size=16, patch_size=4, vision_width=32, vision_layers=1, vision_heads=2,
        text_width=16, text_layers=1, text_heads=2, context=12,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(tasks.ClipTask(arch).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.float32(rng.normal(0, 0.3, leaf.shape)), shapes)
    folder = tmp_path_factory.mktemp("clip")
    bundle.write(folder, {"clip": bundle.Part("clip", arch, params)})
    return embedders.clip_extractor(folder)


@pytest.mark.parametrize("kind", ["conv", "clip"])
def test_numbers_do_not_depend_on_how_they_are_made(kind, clip, monkeypatch):
    extractor, pictures = {"conv": Conv(), "clip": clip}[kind], Mixed(70)
    monkeypatch.setattr(features, "MOMENT_ROWS", 16)
    one = extract(extractor, pictures, batch_size=7, devices=jax.devices()[:1])
    for size, devices, threads in [(1, 1, 1), (64, 1, 3), (7, 8, 2), (64, 8, None), (7, 3, 1)]:
        settings = {"devices": jax.devices()[:devices], "threads": threads}
        other = extract(extractor, pictures, batch_size=size, **settings)
        for name in extractor.outputs:
            np.testing.assert_array_equal(other.rows[name], one.rows[name])
            assert _relative(other.moments[name].total, one.moments[name].total) < 1e-12
            assert _relative(other.moments[name].outer, one.moments[name].outer) < 1e-12
    # A process whose part begins elsewhere has its pictures at other places of a call.
    shifted = extract(extractor, _From(pictures, 3), devices=jax.devices()[:1])
    for name in extractor.outputs:
        assert _relative(shifted.rows[name], one.rows[name][3:]) < 1e-9


def test_only_what_is_asked_for_and_no_program_twice():
    conv, pictures = Conv(), ArrayPictures(np.zeros((5, 8, 8, 3), np.uint8))
    found = extract(conv, pictures, outputs=["sum"], keep=False)
    assert found.rows is None and found.moments.keys() == {"sum"}
    assert found.moments["sum"].count == 5 and conv.traced == 1
    extract(conv, pictures, outputs=["sum"], keep=False)
    assert conv.traced == 1


def test_many_shapes_wait_in_bounded_memory():
    calls = features._Calls(lambda params, batch: batch, None, jax.devices()[0], 2, lambda *_: None)
    for number in range(40):
        calls.put(number, {"x": np.zeros(number // 3)})
        assert sum(map(len, calls.buckets.values())) <= 8


def test_nan_is_named_and_nothing_is_dropped_silently():
    class Broken(Conv):
        def prepare(self, picture):
            found = super().prepare(picture)
            return found | {"area": np.float32(picture[0, 0, 0])}

    images = np.full((9, 8, 8, 3), 5, np.uint8)
    images[6, 0, 0, 0] = 0
    pictures = ArrayPictures(images, names=list("abcdefghi"))
    with pytest.raises(errors.NumericsError, match=r"1 of 9 pictures .* the first is 'g'"):
        extract(Broken(), pictures)
    found = extract(Conv(), Mixed(3, damaged=(0, 1, 2)))
    assert found.count == 0 and len(found.bad) == 3 and found.rows["sum"].shape == (0, 6)


def test_what_is_asked_wrongly():
    with pytest.raises(errors.ConfigError, match="did you mean 'mean'"):
        extract(Conv(), Mixed(3), outputs=["means"])
    with pytest.raises(errors.ConfigError, match="batch_size 0"):
        extract(Conv(), Mixed(3), batch_size=0)
    with pytest.raises(errors.ConfigError, match="mixed: no pictures"):
        extract(Conv(), Mixed(0))


def test_asked_to_stop():
    try:
        distributed.request_stop()
        with pytest.raises(errors.Stopped, match="measuring mixed"):
            extract(Conv(), Mixed(50), batch_size=4)
    finally:
        distributed.reset_stop()


WORKER = """
import hashlib, sys
sys.path.insert(0, sys.argv[3])
from test_features import Conv, Mixed, content_hash, extract
from unclip import errors
from unclip.runtime import distributed
import numpy as np
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
found = extract(Conv(), Mixed(37, damaged=(3, 30)), batch_size=5)
digest = hashlib.sha256(repr((found.names, found.bad, found.greyscale, found.sizes)).encode())
for name in found.rows:
    digest.update(found.rows[name].tobytes())
    digest.update(np.float64(found.moments[name].outer).round(6).tobytes())
assert found.moments["sum"].count == 35
some = Mixed(37, damaged=(3, 30))
for i in range(10 * int(sys.argv[2]), 15, 2):  # what one process has read, none reads again
    if i not in some.bad:
        some.digest(i)
content = content_hash(some)
class Broken(Mixed):
    def read(self, i):
        if i == 30:  # the second process's
            raise errors.DataError("shard is gone")
        return super().read(i)
try:
    extract(Conv(), Broken(37), batch_size=5)
except errors.DataError as error:
    total = [float(x).hex() for x in found.moments["sum"].total]
    print("FOUND", digest.hexdigest(), content, error, *total)
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", WORKER, address]
    folder = str(pathlib.Path(__file__).parent)
    workers = [
        subprocess.Popen([*command, str(i), folder], env=env, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(2)
    ]  # fmt: skip
    try:
        texts = [worker.communicate(timeout=90) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0], texts[0][1][-2000:]
    lines = [next(x for x in out.splitlines() if x.startswith("FOUND")) for out, _ in texts]
    assert lines[0] == lines[1] and "shard is gone" in lines[0]
    one = extract(Conv(), Mixed(37, damaged=(3, 30)))
    assert lines[0].split()[2] == content_hash(Mixed(37, damaged=(3, 30)))
    totals = np.array([float.fromhex(x) for x in lines[0].split()[-6:]])
    assert _relative(totals, one.moments["sum"].total) < 1e-12


# ============================================================ Inception's three ways


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A bundle whose Inception has random weights."""
    from unclip.models.inception import Inception

    rng = np.random.default_rng(0)
    pictures = jax.ShapeDtypeStruct((1, 299, 299, 3), np.uint8)
    tree = jax.eval_shape(Inception().init, jax.random.key(0), pictures)["params"]
    values = lambda leaf: rng.standard_normal(leaf.shape, np.float32) * 0.05
    folder = tmp_path_factory.mktemp("inception")
    settings = {"source": "pt_inception.pth", "sha256": "12" * 32}
    params = jax.tree.map(values, tree)
    part = bundle.Part("inception", {"class": "Inception"}, params, {}, settings)
    bundle.write(folder, {"inception": part})
    return folder, part


def test_where_the_weights_come_from(published, tmp_path):
    folder, part = published
    found = inception_extractor.inception_extractor(folder, "clean")
    assert re.fullmatch(r"inception2015-[0-9a-f]{8}\.pil-bicubic\.float", found.id)
    known = bundle.Part("inception", part.arch, part.params)
    known.settings = {"source": "x.pth", "sha256": inception_extractor.PUBLISHED}
    bundle.write(tmp_path / "known", {"inception": known})
    named = inception_extractor.inception_extractor(tmp_path / "known", "clean")
    assert named.id == "inception2015.pil-bicubic.float"
    assert found.provenance["weights_sha256"] == "12" * 32
    assert not found.provenance["weights_known"]
    assert found.outputs == {
        "pool3": 2048, "spatial": 2023, "logits_unbiased": 1008, "logits": 1008,
    }  # fmt: skip
    np.testing.assert_array_equal(found.params["fc"]["bias"], part.params["fc"]["bias"])
    with pytest.raises(errors.ConfigError, match="did you mean 'tf1'"):
        inception_extractor.inception_extractor(folder, "tf")
    with pytest.raises(errors.DataError, match=r"6726825d.*unclip convert .*fd-clip needs neither"):
        inception_extractor.inception_extractor(tmp_path / "none.pth", "tf1")
    promising = bundle.Part(
        "inception",
        part.arch,
        {"fc": part.params["fc"]},
        {},
        {"source": "pt_inception-2015-12-05-6726825d.pth", "sha256": "12" * 32},
    )
    bundle.write(tmp_path / "other", {"inception": promising})
    with pytest.raises(errors.DataError, match=r"begins with 12121212, not 6726825d"):
        inception_extractor.inception_extractor(tmp_path / "other", "tf1")
    promising.settings = {}
    bundle.write(tmp_path / "rounded", {"inception": promising}, dtype="bfloat16")
    with pytest.raises(errors.ConfigError, match="rounded to fewer bits"):
        inception_extractor.inception_extractor(tmp_path / "rounded", "tf1")
    bundle.write(tmp_path / "without", {})
    with pytest.raises(errors.ConfigError, match=r"holds no Inception: get .*6726825d"):
        inception_extractor.inception_extractor(tmp_path / "without", "tf1")


def test_how_pictures_are_prepared(published):
    """Against resizes written here: every mode's picture reaches the network in one shape."""
    rng = np.random.default_rng(0)
    shapes = set()
    for size in ((32, 48), (299, 299), (301, 517), (1, 1)):
        picture = rng.integers(0, 256, (*size, 3), np.uint8)
        tf1 = bilinear.corners(picture)
        mixed = bilinear.mix(*(value[None] for value in tf1.values()))
        np.testing.assert_array_equal(mixed, bilinear.resize_tf1(picture[None]))
        torch = bilinear.corners(picture, bilinear.torch_positions)
        mixed = np.asarray(bilinear.mix(*(value[None] for value in torch.values())))[0]
        np.testing.assert_allclose(mixed, _half_pixel(picture, 299), atol=0.02)
        shapes.add(tuple(value.shape for value in tf1.values()))
        clean = inception_extractor.resize_clean(picture)
        assert clean.shape == (299, 299, 3) and clean.dtype == np.float32
        if size == (299, 299):
            np.testing.assert_array_equal(clean, picture)
        assert clean.min() >= 0 and clean.max() <= 255
    assert len(shapes) == 1
    # Antialiased where it shrinks, and not rounded.
    stripes = np.zeros((598, 598, 3), np.uint8)
    stripes[::2] = 255
    middle = inception_extractor.resize_clean(stripes)[100:200, 100:200]
    assert middle.min() > 100 and middle.max() < 155 and (middle != np.round(middle)).any()
    assert set(np.unique(bilinear.resize_tf1(stripes[None]))) == {255}


def _half_pixel(picture, size):
    out = picture.astype(np.float64)
    for axis in (0, 1):
        length = out.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, length - 1)
        weight = (at - low).reshape(-1, *(1,) * (2 - axis))
        out = out.take(low, axis) * (1 - weight) + out.take(high, axis) * weight
    return out
