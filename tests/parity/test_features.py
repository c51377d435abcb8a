"""Inception's moments on real code paths: batch sizes, devices and processes against each other."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

from unclip.cascade import bundle
from unclip.files import tensors
from unclip.measure import features
from unclip.measure.features import extract, inception_extractor
from unclip.measure.picture_set import PictureSet
from unclip.models import bilinear
from unclip.models.inception import Inception

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUTPUTS = ("pool3", "spatial", "logits_unbiased")
SIZES = ((64, 64), (48, 81), (256, 256), (33, 20))


class Noise(PictureSet):
    """Pictures of several sizes, smooth waves and noise."""

    def __init__(self, count=16):
        super().__init__("noise", count)

    def _load(self, i):
        rng = np.random.default_rng(i)
        height, width = SIZES[i % len(SIZES)]
        y, x = np.mgrid[:height, :width, :1][:2] / 20
        waves = np.sin(x * rng.uniform(-2, 2, 3) + y * rng.uniform(-2, 2, 3))
        noise = rng.normal(0, 25, waves.shape)
        return np.uint8(np.clip(127.5 + 100 * waves + noise, 0, 255)), 0


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A bundle with random weights that keep activations alive."""
    rng = np.random.default_rng(0)
    pictures = jax.ShapeDtypeStruct((1, 299, 299, 3), np.uint8)
    tree = jax.eval_shape(Inception().init, jax.random.key(0), pictures)["params"]

    def value(path, leaf):
        if path[-1].key == "kernel":
            gain = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            return np.float32(gain) * rng.standard_normal(leaf.shape, np.float32)
        wanted = 0.9 if path[-1].key in ("scale", "var") else 0.1
        return np.full(leaf.shape, wanted, np.float32)

    folder = tmp_path_factory.mktemp("inception")
    params = jax.tree_util.tree_map_with_path(value, tree)
    bundle.write(folder, {"inception": bundle.Part("inception", {"class": "Inception"}, params)})
    return folder


def _difference(one, other):
    """The largest difference of first and second moments, relative to the largest value."""
    found = 0.0
    for name in OUTPUTS:
        for part in ("total", "outer"):
            a, b = getattr(one[name], part), getattr(other[name], part)
            found = max(found, np.abs(a - b).max() / np.abs(b).max())
    return found


@pytest.fixture(scope="module")
def whole(weights):
    """The extractor, and the moments of one device and batches of 64."""
    extractor = inception_extractor(weights, "tf1")
    found = extract(extractor, Noise(), devices=jax.devices()[:1], outputs=OUTPUTS)
    for rows in found.rows.values():
        assert rows.std(0).mean() > 1e-2 * np.abs(rows).mean() > 0  # the network is alive
    return extractor, found.moments


def test_batch_sizes(parity, whole):
    extractor, expected = whole
    worst = 0.0
    for size in (1, 7):
        found = extract(extractor, Noise(), devices=jax.devices()[:1], outputs=OUTPUTS,
                        batch_size=size, keep=False)  # fmt: skip
        worst = max(worst, _difference(found.moments, expected))
    parity("Inception moments, batches of 1 and 7, relative", "batches of 64", worst, 1e-9)


def test_devices(parity, whole, monkeypatch):
    extractor, expected = whole
    # So few pictures fill eight devices when each is given fewer at a time.
    monkeypatch.setattr(features, "ROWS", {"cpu": 2})
    found = extract(extractor, Noise(), devices=jax.devices(), outputs=OUTPUTS, keep=False)
    difference = _difference(found.moments, expected)
    parity("Inception moments, 8 devices, relative", "1 device", difference, 1e-9)


def test_resize_of_pytorch_fid(parity):
    worst = 0.0
    for seed, size in enumerate((*SIZES, (299, 299), (37, 701), (1, 5))):
        picture = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
        given = bilinear.corners(picture, bilinear.torch_positions)
        ours = bilinear.mix(*(value[None] for value in given.values()))
        theirs = torch.nn.functional.interpolate(
            torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, (299, 299), mode="bilinear"
        )
        worst = max(worst, np.abs(ours / 255 - theirs.permute(0, 2, 3, 1).numpy()).max())
    parity("pytorch-fid's bilinear resize, on [0, 1]", "torch", worst, 1e-6)


WORKER = """
import pathlib, sys
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[5])
sys.path.insert(0, sys.argv[4])
from test_features import Noise, OUTPUTS
from unclip.files import tensors
from unclip.measure.features import extract, inception_extractor
from unclip.runtime import distributed
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
found = extract(inception_extractor(sys.argv[3]), Noise(), outputs=OUTPUTS, keep=False)
moments = {f"{k}.{part}": getattr(m, part) for k, m in found.moments.items()
           for part in ("total", "outer")}
tensors.write(pathlib.Path(sys.argv[3]) / f"found-{sys.argv[2]}.safetensors", moments)
"""


def test_processes(parity, whole, weights):
    _, expected = whole
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    # One device each: also another number of threads than here.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    env["PYTHONPATH"] = str(ROOT)
    here, cache = str(pathlib.Path(__file__).parent), str(jax.config.jax_compilation_cache_dir)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(i), str(weights), here, cache],
            env=env, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        texts = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0], texts[0][-2000:]
    worst = 0.0
    for i in range(2):
        found, _ = tensors.read(weights / f"found-{i}.safetensors")
        for name in OUTPUTS:
            for part in ("total", "outer"):
                wanted = getattr(expected[name], part)
                difference = np.abs(found[f"{name}.{part}"].read() - wanted).max()
                worst = max(worst, difference / np.abs(wanted).max())
    parity("Inception moments, 2 processes, relative", "1 process", worst, 1e-9)
