"""Metrics of the same features: torch-fidelity, pytorch-fid, torchmetrics, prdc, and formulas.

The rows are made to look like Inception's: positive, correlated, with directions that fade. Where
a peer has a random order of its own, its draws are repeated here. The formulas of tools that cannot
be installed (dgm-eval, CMMD, CLIPScore, OpenAI's evaluator) are written out again in torch.
"""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch

from tests.parity import peers
from unclip.files.moments import Moments, Statistics
from unclip.measure import (
    clip_score,
    frechet,
    inception_score,
    kernel,
    neighbours,
)

BOUND = 1e-5
WIDTH = 128


def features(seed, count, shift=0.0):
    """float32 [count, WIDTH]."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH)
    faded = rng.normal(size=(count, WIDTH)) * np.exp(-np.arange(WIDTH) / 40)
    return np.maximum(faded @ mixing + 0.4 + shift, 0).astype(np.float32)


def statistics(rows):
    moments = Moments(rows.shape[1])
    moments.add(rows)
    return Statistics.of(moments)


def apart(ours, theirs):
    """The largest relative difference between numbers of two tools."""
    ours, theirs = np.atleast_1d(ours).astype(float), np.atleast_1d(theirs).astype(float)
    return np.max(np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-12))


def fidelity(module):
    peers.torch_fidelity()
    return importlib.import_module(f"torch_fidelity.{module}")


@pytest.mark.parametrize("count", [700, 120], ids=["N > D", "N < D"])
def test_frechet_distance(parity, monkeypatch, count):
    fake, real = features(0, count, 0.05), features(1, count + 50)
    ours = frechet.distance(statistics(fake), statistics(real))
    part = f"Fréchet distance {'above' if count > WIDTH else 'below'} full rank"

    metric = fidelity("metric_fid")
    # Of float32 rows it takes the mean in float32, which is most of what is measured here.
    pair = [metric.fid_features_to_statistics(torch.tensor(x)) for x in (fake, real)]
    theirs = metric.fid_statistics_to_metric(
        *[{"mu": s["mu"].astype(float), "sigma": s["sigma"].astype(float)} for s in pair], False
    )
    parity(
        f"{part}, relative", "torch-fidelity",
        apart(ours, theirs["frechet_inception_distance"]), BOUND,
    )  # fmt: skip

    peers.pytorch_fid()
    score = importlib.import_module("pytorch_fid.fid_score")

    def sqrtm(matrix, disp=True):
        """SciPy 1.18 has no `disp`, with which pytorch-fid asks for an error estimate as well."""
        root = scipy.linalg.sqrtm(matrix)
        return root if disp else (root, None)

    monkeypatch.setattr(score, "linalg", SimpleNamespace(sqrtm=sqrtm))
    moments = [value for s in pair for value in (s["mu"].astype(float), s["sigma"].astype(float))]
    theirs = score.calculate_frechet_distance(*moments)
    parity(f"{part}, relative", "pytorch-fid", apart(ours, theirs), BOUND)

    identity = torch.nn.Identity()
    identity.num_features = WIDTH
    theirs = peers.torchmetrics().image.fid.FrechetInceptionDistance(feature=identity)
    theirs.update(torch.tensor(fake).double(), real=False)
    theirs.update(torch.tensor(real).double(), real=True)
    parity(f"{part}, relative", "torchmetrics", apart(ours, theirs.compute()), BOUND)


def test_frechet_infinity(parity):
    """dgm-eval's sizes, its generator with a seed, scipy's root and a line in 1 / N."""
    fake, real = features(2, 500, 0.05)[:, :64], features(3, 400)[:, :64]
    draws, distances = np.random.default_rng(4), []
    sizes = np.linspace(min(5000, max(len(fake) // 10, 2)), len(fake), 15).astype("int32")
    covariance = np.cov(real.astype(float), rowvar=False)
    for size in sizes:
        rows = draws.choice(fake, size, replace=False).astype(float)
        other = np.cov(rows, rowvar=False)
        root = scipy.linalg.sqrtm(covariance @ other)
        gap = real.mean(axis=0, dtype=float) - rows.mean(axis=0)
        distances.append(gap @ gap + np.trace(covariance + other - 2 * root.real))
    line = torch.linalg.lstsq(
        torch.tensor(np.stack([np.ones(15), 1 / sizes], axis=1)),
        torch.tensor(np.array(distances))[:, None],
    ).solution
    ours = frechet.infinity(fake, statistics(real), seed=4)
    parity("FID-infinity and slope, relative", "dgm-eval (formula)", apart(ours, line[:, 0]), BOUND)


def test_kid(parity):
    fake, real = features(4, 1300, 0.1), features(5, 1200)
    settings = {"kid_subset_size": 1000, "rng_seed": 2020, "verbose": False}
    names = ("kernel_inception_distance_mean", "kernel_inception_distance_std")
    metric = fidelity("metric_kid")
    for subsets, name in ((5, "kernel of all pairs"), (1, "subset by subset")):
        settings["kid_subsets"] = subsets
        ours = kernel.kid(fake, real, subsets=subsets)
        found = metric.kid_features_to_metric(
            torch.tensor(fake).double(), torch.tensor(real).double(), **settings
        )
        theirs = [found[key] for key in names if found[key]]  # one subset has no deviation
        parity(
            f"KID, {name}, relative", "torch-fidelity, its draws",
            apart(ours[: len(theirs)], theirs), BOUND,
        )  # fmt: skip
    # What it does by default: products and sums in float32, whose mean is good to these digits.
    settings["kid_subsets"] = 5
    found = metric.kid_features_to_metric(torch.tensor(fake), torch.tensor(real), **settings)
    parity(
        "KID's mean, relative", "torch-fidelity in float32",
        apart(kernel.kid(fake, real, subsets=5)[0], found[names[0]]), BOUND,
    )  # fmt: skip

    count = len(real)
    theirs = peers.torchmetrics().image.kid.KernelInceptionDistance(
        feature=torch.nn.Identity(), subsets=1, subset_size=count
    )
    theirs.update(torch.tensor(fake[:count]).double(), real=False)
    theirs.update(torch.tensor(real).double(), real=True)
    ours = kernel.kid(fake[:count], real, subsets=1, size=count)[0]
    difference = apart(ours, theirs.compute()[0])
    parity("KID of one whole set, relative", "torchmetrics", difference, BOUND)


def test_inception_score(parity):
    logits = (np.random.default_rng(6).normal(size=(1234, 1008)) * 2.5).astype(np.float32)
    found = fidelity("metric_isc").isc_features_to_metric(torch.tensor(logits))
    theirs = [found["inception_score_mean"], found["inception_score_std"]]
    ours = inception_score.inception_score(logits)
    parity("Inception score, its shuffle, relative", "torch-fidelity", apart(ours, theirs), BOUND)

    metric = peers.torchmetrics().image.inception.InceptionScore(feature=torch.nn.Identity())
    metric.update(torch.tensor(logits).double())
    torch.manual_seed(7)
    theirs = [float(value) for value in metric.compute()]
    torch.manual_seed(7)
    # Its parts are torch.chunk's, all of ⌈N / 10⌉ rows but the last; its deviation has ddof 1.
    mean, deviation = inception_score.openai(logits[torch.randperm(1234).numpy()], split_size=124)
    parity(
        "Inception score, its shuffle, relative", "torchmetrics",
        apart([mean, deviation * np.sqrt(10 / 9)], theirs), BOUND,
    )  # fmt: skip

    scores = []
    for part in torch.tensor(logits).softmax(dim=1).split(500):
        divergence = part * (part.log() - part.mean(dim=0, keepdim=True).log())
        scores.append(float(divergence.sum(dim=1).mean().exp()))
    ours = inception_score.openai(logits, split_size=500)[0]
    parity(
        "Inception score in the given order, relative", "OpenAI's evaluator (formula, float32)",
        apart(ours, np.mean(scores)), BOUND,
    )  # fmt: skip


def test_precision_and_recall(parity):
    fake, real = features(8, 900, 0.02), features(9, 800)
    keys = ("precision", "recall", "f_score")
    ours = neighbours.precision_recall(real, fake)
    assert all(0.05 < value < 0.95 for value in ours)
    settings = {"prc_neighborhood": 3, "prc_batch_size": 500, "verbose": False}
    metric = fidelity("metric_prc")
    for dtype in (torch.float64, torch.float32):
        for save in (False, True):
            found = metric.prc_features_to_metric(
                torch.tensor(fake).to(dtype), torch.tensor(real).to(dtype),
                save_cpu_ram=save, **settings,
            )  # fmt: skip
            name = str(dtype).removeprefix("torch.")
            parity(
                f"precision, recall, F{' by parts' if save else ''}, relative",
                f"torch-fidelity in {name}", apart(ours, [found[key] for key in keys]), BOUND,
            )  # fmt: skip


def test_density_and_coverage(parity):
    fake, real = features(10, 120, 0.02), features(11, 600)
    found = peers.prdc().compute_prdc(real, fake, nearest_k=5)
    ours = neighbours.density_coverage(real, fake)
    assert 0.05 < ours[1] < 0.95
    theirs = [found["density"], found["coverage"]]
    parity("density and coverage, relative", "prdc", apart(ours, theirs), BOUND)
    # Its balls are open, torch-fidelity's closed: without ties the same numbers.
    ours = neighbours.precision_recall(real, fake, k=5)[:2]
    theirs = [found["precision"], found["recall"]]
    parity("precision and recall at k = 5, relative", "prdc", apart(ours, theirs), BOUND)


def test_cmmd(parity):
    """Far sets: in float32, as published, means close to 1 are subtracted, good to 4e-4 in all."""
    x, y = torch.tensor(features(12, 300)), torch.tensor(features(13, 300))
    y[:, ::2] *= -1
    ours = kernel.cmmd(x.numpy(), y.numpy())
    for dtype in (torch.float64, torch.float32):
        u, v = (torch.nn.functional.normalize(z.to(dtype)) for z in (x, y))

        def mean(a, b):
            squared = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
            return torch.exp(-squared / (2 * 10**2)).mean()

        theirs = 1000 * (mean(u, u) + mean(v, v) - 2 * mean(u, v))
        name = str(dtype).removeprefix("torch.")
        parity("CMMD, relative", f"CMMD (formula, {name})", apart(ours, theirs), 1e-4)


def test_clip_scores(parity):
    rng = np.random.default_rng(14)
    z_t = rng.normal(size=(40, 64)).astype(np.float32)
    z_i = (0.1 * z_t + rng.normal(size=(40, 64))).astype(np.float32)

    class Model(torch.nn.Module):
        """Embeds picture k and caption "k" as rows k."""

        config = None

        def get_image_features(self, pixels):
            return torch.tensor(z_i)[pixels[:, 0, 0, 0].long()]

        def get_text_features(self, ids, mask):
            return torch.tensor(z_t)[ids]

    def processor(images=None, text=None, **_):
        if text is None:
            return {"pixel_values": torch.stack(images)}
        ids = torch.tensor([int(caption) for caption in text])
        return {"input_ids": ids, "attention_mask": ids[:, None] * 0 + 1}

    score = peers.torchmetrics().multimodal.clip_score.CLIPScore(lambda: (Model(), processor))
    pictures = torch.arange(40.0)[:, None, None, None].expand(40, 3, 2, 2)
    score.update(pictures, [str(k) for k in range(40)])
    ours = clip_score.torchmetrics(z_i, z_t)
    parity("CLIP score, relative", "torchmetrics", apart(ours, score.compute()), BOUND)

    u, v = (torch.nn.functional.normalize(torch.tensor(z)) for z in (z_i, z_t))
    theirs = 2.5 * (u * v).sum(dim=1).clamp(min=0)
    ours = clip_score.hessel(z_i, z_t)
    assert (ours == 0).any()
    difference = np.abs(ours - theirs.numpy()).max() / ours.max()
    parity("CLIP-S per picture, largest", "CLIPScore (formula)", difference, BOUND)

    references = rng.normal(size=(40, 5, 64)) + z_t[:, None]
    best = torch.nn.functional.normalize(torch.tensor(references), dim=2) @ v.double()[..., None]
    best = best[..., 0].max(dim=1).values.clamp(min=0)
    theirs = (2 * theirs * best / (theirs + best)).numpy()
    ours = clip_score.ref_clip_score(z_i, z_t, list(references))
    difference = np.abs(ours - theirs).max() / ours.max()
    parity("RefCLIP-S per picture, largest", "CLIPScore (formula)", difference, BOUND)
