"""Whole measurements on the same files: from folders of pictures to the numbers people report.

Every tool reads the same PNG and JPEG files and the same random Inception from one file, and takes
its own way to the end. Pictures are few, so that distances are mostly bias; that is what they must
agree on. torch-fidelity's and clean-fid's folders hold pictures of every size, a grey one, one with
transparency; pytorch-fid needs one size.
"""

import importlib
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from tests.parity import peers
from unclip.files.moments import Moments, Statistics
from unclip.measure import frechet
from unclip.measure.pictures import open_pictures
from unclip.measure.table import measure

BOUND = 1e-5
REAL, FAKE = 14, 16


def _write(folder, seed, count, size=None):
    """A folder of pictures; of odd sizes where none is given.

    An odd seed's are the fake ones: every other is dark, so that the two sets are apart.
    """
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        height, width = size or rng.integers(17, 120, 2)
        picture = Image.fromarray(peers.noisy_waves((height, width), 1000 * seed + i)[0])
        if size is None and i == 3:
            picture = picture.convert("L")
        elif size is None and i == 4:
            picture = picture.convert("RGBA")
        if seed % 2 and i % 2:
            picture = picture.point(lambda value: value // 4)
        picture.save(folder / f"{i:03d}.{'jpg' if i % 3 == 2 else 'png'}")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(real, fake)."""
    root = tmp_path_factory.mktemp("pictures")
    return _write(root / "real", 2, REAL), _write(root / "fake", 3, FAKE)


def _measured(folders, metrics, weights):
    real, fake = (open_pictures(folder) for folder in folders)
    allow = ("sizes",)
    result = measure(real, fake, metrics, inception=weights, allow=allow, batch_size=16)
    return {value["metric"]: value for value in result.values}


def _apart(ours, theirs):
    return abs(ours - theirs) / abs(theirs)


def test_torch_fidelity(parity, folders, inception_file):
    ours = _measured(folders, ["fid", "kid", "is", "pr"], inception_file)
    real, fake = (str(folder) for folder in folders)
    theirs = peers.torch_fidelity().calculate_metrics(
        input1=fake, input2=real, cuda=False, isc=True, fid=True, kid=True, prc=True,
        feature_extractor="inception-v3-compat", feature_layer_prc="2048",
        feature_extractor_weights_path=str(inception_file), samples_find_ext="png,jpg",
        kid_subset_size=REAL, batch_size=1, save_cpu_ram=True, cache=False, verbose=False,
    )  # fmt: skip
    for part, metric, field, key in (
        ("FID", "fid", "value", "frechet_inception_distance"),
        ("KID", "kid", "value", "kernel_inception_distance_mean"),
        ("KID's deviation", "kid", "std", "kernel_inception_distance_std"),
        ("Inception score", "is", "value", "inception_score_mean"),
        ("Inception score's deviation, to the score", "is", "std", "inception_score_std"),
        ("precision", "precision", "value", "precision"),
        ("recall", "recall", "value", "recall"),
        ("F of precision and recall", "f_score", "value", "f_score"),
    ):
        # A deviation is as exact as the score, of which it is a small part here.
        scale = theirs["inception_score_mean" if metric == "is" else key]
        difference = abs(ours[metric][field] - theirs[key]) / abs(scale)
        parity(f"files: {part}, relative", "torch-fidelity", difference, BOUND)
    assert 0 < ours["precision"]["value"] < 1 and 0 < ours["recall"]["value"] < 1


def test_pytorch_fid(parity, tmp_path, monkeypatch, inception_file):
    same = [_write(tmp_path / name, seed, 12, (50, 44)) for name, seed in (("a", 4), ("b", 5))]
    ours = _measured(same, ["fid-pytorch"], inception_file)["fid-pytorch"]["value"]
    weights = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    weights.parent.mkdir(parents=True)
    shutil.copy(inception_file, weights)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    score = peers.pytorch_fid().fid_score

    def sqrtm(matrix, disp=True):
        """The root of a matrix of rank 11, of which SciPy warns that it may be inaccurate.

        On an orthonormal basis Q of its range, A = Q C Qᵀ + Q B (1 - Q Qᵀ) has the root
        Q C^-½ Qᵀ A, and C has full rank; as for SciPy before 1.18, `disp` asks for an error too.
        """
        start = np.random.default_rng(0).normal(size=(len(matrix), 11))
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix @ start)[0])[0]
        core = scipy.linalg.sqrtm(basis.T @ matrix @ basis)
        root = basis @ np.linalg.solve(core, basis.T @ matrix)
        return root if disp else (root, None)

    monkeypatch.setattr(score, "linalg", SimpleNamespace(sqrtm=sqrtm))
    theirs = score.calculate_fid_given_paths(
        [str(folder) for folder in same], batch_size=12, device="cpu", dims=2048, num_workers=0
    )
    parity("files: FID of one size, relative", "pytorch-fid", _apart(ours, theirs), BOUND)


def test_clean_fid(parity, folders, monkeypatch, inception_file):
    """clean-fid reads and resizes; its network of TorchScript is torch-fidelity's here."""
    peers.torch_fidelity()
    network = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    # What is already 299 pixels passes through its resize unchanged, unless it insists on uint8.
    monkeypatch.setattr(network, "vassert", lambda *given: None)
    model = network.FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=inception_file
    )
    theirs = [
        peers.clean_fid().fid.get_folder_features(
            str(folder), model=lambda batch: model(batch)[0], num_workers=0, batch_size=11,
            device=torch.device("cpu"), mode="clean", verbose=False,
        ) for folder in folders
    ]  # fmt: skip
    statistics = []
    for rows in theirs:
        moments = Moments(2048)
        moments.add(rows)
        statistics.append(Statistics.of(moments))
    ours = _measured(folders, ["fid-clean"], inception_file)["fid-clean"]["value"]
    difference = _apart(ours, frechet.distance(*statistics))
    parity("files: FID of clean features, relative", "clean-fid", difference, BOUND)
