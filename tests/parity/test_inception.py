"""FID's Inception against torch-fidelity's graph, from one random state dict and uint8 pictures.

torch-fidelity's package asks for torchvision when it is imported whole; its Inception does not.
"""

import importlib
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
import torch

from unclip import bundle
from unclip.evaluators.inception import Inception, resize_tf1
from unclip.interop import inception

torch.set_num_threads(1)  # several would wait for one another on a shared machine

PEER = "torch-fidelity"
PEERS = pathlib.Path(__file__).parents[2] / ".cache" / "peers"
SIZES = ((299, 299), (32, 32), (64, 48), (300, 512))


@pytest.fixture(scope="module")
def peer():
    folder = PEERS / "torch-fidelity-0.4.0" / "torch_fidelity"
    if not folder.is_dir():
        pytest.skip(f"torch-fidelity is not in {folder.parent}: `make parity` puts it there")
    if "torch_fidelity" not in sys.modules:
        # Submodules are found through this stand-in, and the package's own imports left out.
        package = types.ModuleType("torch_fidelity")
        package.__path__ = [str(folder)]
        sys.modules["torch_fidelity"] = package
    return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")


def _pictures(size, seed, count=1):
    """uint8 [count, H, W, 3] of smooth colours with noise, over the whole range."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(*(np.linspace(0, 3, n) for n in size), indexing="ij")
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(-3, 3, (count * 3, 3))]
    smooth = np.stack(waves, -1).reshape(*size, count, 3).transpose(2, 0, 1, 3)
    values = 127.5 + 110 * smooth + rng.normal(0, 25, smooth.shape)
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def _nchw(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def theirs(peer, tmp_path_factory):
    """(their network, the file it was read from): every tensor random, activations alive."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "none.pth")

    class Untrained(peer.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    torch.manual_seed(0)
    names = ["2048"]
    model = Untrained("inception", names, feature_extractor_weights_path=folder / "none.pth")
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.normal_(1, 0.1)
            norm.bias.normal_(0, 0.2)
            norm.momentum = 1.0
        for conv in (m for m in model.modules() if isinstance(m, torch.nn.Conv2d)):
            conv.weight.normal_(0, (2 / conv.weight[0].numel()) ** 0.5)
        model.fc.weight.normal_(0, 0.05)
        model.fc.bias.normal_(0, 1)
        # The statistics are those of some pictures, a little wrong.
        model.train()
        model(_nchw(_pictures((299, 299), 9, 2)))
        for norm in norms:
            norm.running_mean += 0.1 * torch.randn_like(norm.running_mean)
            norm.running_var *= 0.8 + 0.4 * torch.rand_like(norm.running_var)
    path = folder / "pt_inception.pth"
    # FID's file is as old as this layout.
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    names = ["2048", "logits_unbiased", "logits"]
    model = peer.FeatureExtractorInceptionV3(
        "inception", names, feature_extractor_weights_path=path
    )
    return model, path


@pytest.fixture(scope="module")
def features(theirs, tmp_path_factory):
    """Features of a picture of each size, theirs [4, …] and ours, through a stored bundle."""
    model, path = theirs
    folder = tmp_path_factory.mktemp("bundle")
    bundle.write(folder, inception.read([path], {}))
    params = bundle.read(folder).parts["inception"].params
    pictures = [_pictures(size, seed) for seed, size in enumerate(SIZES)]
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
        pictures = _pictures(size, seed, 2)
        theirs = peer.interpolate_bilinear_2d_like_tensorflow1x(
            _nchw(pictures).float(), size=(299, 299), align_corners=False
        )
        difference = np.asarray(resize_tf1(pictures)) - theirs.permute(0, 2, 3, 1).numpy()
        worst = max(worst, np.abs(difference).max())
    parity("TensorFlow 1's bilinear resize, on [0, 255]", PEER, worst, 1e-4)
