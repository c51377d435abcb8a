"""Other people's metrics, imported from `.cache/peers`, where `make parity` puts them.

They stand outside the environment because they pin, shadow or depend on what ours must not hold.
torchvision, which three of them ask for, has no build for the CPU alone: its Python code is the
real one, the operators of its compiled half are declared without a body, and after each import it
is hidden again, so that transformers and diffusers do not meet it.
"""

import contextlib
import functools
import importlib
import os
import pathlib
import subprocess
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2] / ".cache" / "peers"
TORCHVISION = "torchvision-0.28.0"
# torchvision registers shapes for these while it is imported; nothing here calls them.
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_torchvision = {}  # its modules by name, while they are hidden


def folder(name):
    """The folder of a peer; skips the test that asks where it is missing."""
    path = ROOT / name
    if not path.is_dir():
        pytest.skip(f"{name} is not in {ROOT}: `make parity` puts it there")
    return path


@contextlib.contextmanager
def _path(name):
    """Puts a peer's folder in front of the others for as long as an import takes."""
    added = str(folder(name))
    sys.path.insert(0, added)
    try:
        yield
    finally:
        sys.path.remove(added)


@functools.cache
def _operators():
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in OPERATORS:
        library.define(schema)
    return library  # kept: its operators live as long as it does


@contextlib.contextmanager
def torchvision():
    """Inside, `import torchvision` works on any build of torch; afterwards it is hidden."""
    _operators()
    with _path(TORCHVISION):
        sys.modules.update(_torchvision)
        try:
            yield
        finally:
            for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
                _torchvision[name] = sys.modules.pop(name)


def _import(where, *names):
    with torchvision(), _path(where):
        package, *_ = [importlib.import_module(name) for name in names]
        return package


@functools.cache
def torch_fidelity():
    """torch-fidelity whole: `.calculate_metrics`, `.metric_kid` and so on."""
    return _import("torch-fidelity-0.4.0", "torch_fidelity")


@functools.cache
def pytorch_fid():
    """pytorch-fid: `.fid_score.calculate_fid_given_paths`, `.inception`."""
    return _import("pytorch-fid-0.3.0", "pytorch_fid", "pytorch_fid.fid_score")


@functools.cache
def clean_fid():
    """clean-fid: `.fid`, `.resize`; it asks for no weights until a feature network is built."""
    return _import("clean-fid-0.1.35", "cleanfid", "cleanfid.fid", "cleanfid.resize")


def clean_fid_resize(mode="clean"):
    """clean-fid's function of one picture: uint8 [H, W, 3] -> float32 [299, 299, 3]."""
    return clean_fid().resize.build_resizer(mode)


@functools.cache
def torchmetrics():
    """torchmetrics: `.image.fid`, `.image.kid`, `.image.inception`, `.multimodal.clip_score`."""
    names = ("image.fid", "image.kid", "image.inception", "multimodal.clip_score")
    return _import(
        "torchmetrics-1.9.0", "torchmetrics", *(f"torchmetrics.{name}" for name in names)
    )


@functools.cache
def prdc():
    """prdc: `.compute_prdc(real, fake, nearest_k)`, on scikit-learn's distances."""
    return _import("prdc-0.2", "prdc")


DALLE2_PYTORCH = "dalle2-pytorch-1.15.6"
# It imports these for CLIPs, VQGANs and pictures' augmentation; its networks call none of them.
UNUSED = (
    *("coca_pytorch", "kornia", "kornia.augmentation", "kornia.filters", "resize_right"),
    *("vector_quantize_pytorch", "x_clip"),
)


@functools.cache
def dalle2_pytorch():
    """DALLE2-pytorch's networks and losses: `.Unet`, `.DiffusionPrior`, `.DiffusionPriorNetwork`.

    Without its trainers, which its package imports first and which need much more.
    """
    package = types.ModuleType("dalle2_pytorch")
    package.__path__ = [str(folder(DALLE2_PYTORCH) / "dalle2_pytorch")]
    absent = {name: mock.MagicMock() for name in UNUSED if name not in sys.modules}
    sys.modules.update({"dalle2_pytorch": package, **absent})
    try:
        _import(DALLE2_PYTORCH, "dalle2_pytorch.dalle2_pytorch")
    finally:
        for name in absent:
            del sys.modules[name]
    return sys.modules["dalle2_pytorch.dalle2_pytorch"]


def random_inception(folder):
    """Writes FID's Inception in torch-fidelity's layout: every tensor random, activations alive.

    The layout is also pytorch-fid's; the file's name promises no hash. Returns its path.
    """
    torch_fidelity()
    network = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    folder = pathlib.Path(folder)
    torch.save({}, folder / "none.pth")

    class Untrained(network.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    torch.manual_seed(0)
    path = folder / "none.pth"
    model = Untrained("inception", ["2048"], feature_extractor_weights_path=path)
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
        model(torch.from_numpy(noisy_waves((299, 299), 9, 2)).permute(0, 3, 1, 2))
        for norm in norms:
            norm.running_mean += 0.1 * torch.randn_like(norm.running_mean)
            norm.running_var *= 0.8 + 0.4 * torch.rand_like(norm.running_var)
    path = folder / "pt_inception.pth"
    # FID's file is as old as this layout.
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    return path


def noisy_waves(size, seed, count=1):
    """uint8 [count, H, W, 3] of smooth colours with noise, over the whole range."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(*(np.linspace(0, 3, n) for n in size), indexing="ij")
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(-3, 3, (count * 3, 3))]
    smooth = np.stack(waves, -1).reshape(*size, count, 3).transpose(2, 0, 1, 3)
    values = 127.5 + 110 * smooth + rng.normal(0, 25, smooth.shape)
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


TENSORFLOW = "tensorflow-cpu-2.21.0"
_RESIZE = """
import sys
import numpy as np
import tensorflow as tf
with np.load(sys.argv[1]) as pictures, open(sys.argv[2], "wb") as out:
    size = (299, 299)
    old = tf.compat.v1.image.resize_bilinear
    resized = {
        name: old(picture[None], size, align_corners=False, half_pixel_centers=False)[0].numpy()
        for name, picture in pictures.items()
    }
    np.savez(out, **resized)
"""


def tensorflow_resize(pictures, scratch):
    """TensorFlow's own resize_bilinear of TensorFlow 1, in a process of its own.

    Args:
      pictures: list of uint8 [H, W, 3].
      scratch: a folder for the pictures on their way there and back.

    Returns:
      list of float32 [299, 299, 3].
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder(TENSORFLOW)),
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    given, made = pathlib.Path(scratch) / "given.npz", pathlib.Path(scratch) / "made.npz"
    np.savez(given, **{str(i): picture for i, picture in enumerate(pictures)})
    command = [sys.executable, "-c", _RESIZE, str(given), str(made)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with np.load(made) as resized:
        return [resized[str(i)] for i in range(len(pictures))]
