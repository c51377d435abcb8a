"""FID's Inception against torch-fidelity's graph, from one random state dict and uint8 pictures."""

import importlib

import jax
import numpy as np
import pytest
import torch

from tests.parity import peers
from unclip.cascade import bundle
from unclip.interop import inception
from unclip.models.bilinear import resize_tf1
from unclip.models.inception import Inception

torch.set_num_threads(1)  # several would wait for one another on a shared machine

PEER = "torch-fidelity"
SIZES = ((299, 299), (32, 32), (64, 48), (300, 512))


@pytest.fixture(scope="module")
def peer():
    peers.torch_fidelity()
    return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")


def _nchw(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def theirs(peer, inception_file):
    """(their network, the file it was read from)."""
    names = ["2048", "logits_unbiased", "logits"]
    model = peer.FeatureExtractorInceptionV3(
        "inception", names, feature_extractor_weights_path=inception_file
    )
    return model, inception_file


@pytest.fixture(scope="module")
def features(theirs, tmp_path_factory):
    """Features of a picture of each size, theirs [4, …] and ours, through a stored bundle."""
    model, path = theirs
    folder = tmp_path_factory.mktemp("bundle")
    bundle.write(folder, inception.read([path], {}))
    params = bundle.read(folder).parts["inception"].params
    pictures = [peers.noisy_waves(size, seed) for seed, size in enumerate(SIZES)]
    spatial = []
    hook = lambda module, args, output: spatial.append(output[:, :7].permute(0, 2, 3, 1).numpy())
    handle = model.Mixed_6d.branch1x1.register_forward_hook(hook)
    outputs = [[out.numpy() for out in model(_nchw(p))] for p in pictures]
    handle.remove()
    pool3, unbiased, logits = (np.concatenate(parts) for parts in zip(*outputs))
    expected = {"pool3": pool3, "logits_unbiased": unbiased, "logits": logits}
    expected["spatial"] = np.concatenate(spatial)
    resized = np.concatenate([resize_tf1(p) for p in pictures])
    ours = jax.jit(Inception().apply)({"params": params}, resized)
    return expected, {name: np.asarray(value) for name, value in ours._asdict().items()}


def _relative(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def test_the_random_network_is_alive(features):
    expected, _ = features
    for name, values in expected.items():
        assert np.isfinite(values).all()
        # Pictures differ, channels differ, and nothing is all zero.
        assert values.std(0).mean() > 0.05 * np.abs(values).mean() > 0, name
        assert (np.abs(values) > 0).mean() > 0.3, name


@pytest.mark.parametrize("name", ["pool3", "spatial", "logits_unbiased", "logits"])
def test_features(parity, features, name):
    expected, ours = features
    part = f"Inception {name} of 299 px, relative to the largest"
    parity(part, PEER, _relative(ours[name][:1], expected[name][:1]), 1e-4)


def test_features_of_other_sizes(parity, features):
    expected, ours = features
    part = "Inception pool3 of 32, 64 × 48, 300 × 512 px, relative"
    parity(part, PEER, _relative(ours["pool3"][1:], expected["pool3"][1:]), 1e-4)


def test_resize(parity, peer):
    worst = 0
    for seed, size in enumerate((*SIZES, (1, 5), (37, 701))):
        pictures = peers.noisy_waves(size, seed, 2)
        theirs = peer.interpolate_bilinear_2d_like_tensorflow1x(
            _nchw(pictures).float(), size=(299, 299), align_corners=False
        )
        difference = np.asarray(resize_tf1(pictures)) - theirs.permute(0, 2, 3, 1).numpy()
        worst = max(worst, np.abs(difference).max())
    parity("TensorFlow 1's bilinear resize, on [0, 255]", PEER, worst, 1e-4)
