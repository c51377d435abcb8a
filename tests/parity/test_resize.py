"""The three ways a picture comes to Inception's 299 pixels, each against the tool it is named by.

Differences are shares of 255, the range of a picture.
"""

import numpy as np
import pytest
import torch

from tests.parity import peers
from unclip.measure.inception_extractor import resize_clean
from unclip.models import bilinear

SIZES = ((299, 299), (32, 32), (64, 48), (300, 512), (1, 7), (37, 701), (898, 640))


@pytest.fixture(scope="module")
def pictures():
    """One of each size, and two of only black and white, where bicubic overshoots."""
    rng = np.random.default_rng(1)
    extreme = [255 * rng.integers(0, 2, (*size, 3), np.uint8) for size in ((40, 55), (400, 333))]
    return [peers.noisy_waves(size, seed)[0] for seed, size in enumerate(SIZES)] + extreme


def _worst(ours, theirs):
    assert all(a.shape == b.shape == (299, 299, 3) for a, b in zip(ours, theirs, strict=True))
    return max(np.abs(a - b).max() for a, b in zip(ours, theirs)) / 255


def _bilinear(picture, positions):
    four = bilinear.corners(picture, positions)
    return np.asarray(bilinear.mix(**{name: value[None] for name, value in four.items()}))[0]


def test_clean(parity, pictures):
    resize = peers.clean_fid_resize("clean")
    difference = _worst([resize_clean(p) for p in pictures], [resize(p) for p in pictures])
    parity("clean resize, of 255", "clean-fid", difference, 1e-6)


def test_pytorch(parity, pictures):
    ours = [_bilinear(p, bilinear.torch_positions) for p in pictures]
    resize = peers.clean_fid_resize("legacy_pytorch")
    difference = _worst(ours, [resize(p) for p in pictures])
    parity("pytorch-fid's bilinear resize, of 255", "clean-fid", difference, 1e-6)
    unit = [torch.from_numpy(p).permute(2, 0, 1)[None] / 255 for p in pictures]
    made = [
        torch.nn.functional.interpolate(u, size=(299, 299), mode="bilinear", align_corners=False)
        for u in unit
    ]
    theirs = [255 * m[0].permute(1, 2, 0).numpy() for m in made]
    parity("pytorch-fid's bilinear resize, of 255", "torch", _worst(ours, theirs), 1e-6)


def test_tensorflow(parity, pictures, tmp_path):
    ours = [_bilinear(p, bilinear.tf1_positions) for p in pictures]
    theirs = peers.tensorflow_resize(pictures, tmp_path)
    parity("TensorFlow 1's bilinear resize, of 255", "TensorFlow", _worst(ours, theirs), 1e-6)
