"""Torch's own files read without torch: bit for bit what `torch.load` gives."""

import argparse
import collections
import datetime
import io
import random

import numpy as np
import pytest
import torch

from unclip import errors
from unclip.interop.torch.file import open_torch, scalars

LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    *(torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn),
    *(torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]


def _bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        array = found[name].read()
        assert array.shape == tuple(tensor.shape) == found[name].shape, name
        assert str(array.dtype) == str(tensor.dtype).removeprefix("torch."), name
        assert array.tobytes() == _bits(tensor), name


def _save(path, value, zipped, **options):
    torch.save(value, path, _use_new_zipfile_serialization=zipped, **options)
    return path


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path, zipped, dtype):
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 96, np.uint8))
    whole = (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)
    shaped = whole.reshape(2, 3, -1)
    values = {
        "whole": whole, "shaped": shaped, "turned": shaped.permute(2, 0, 1),
        "part": shaped[1:, ::2], "scalar": whole[3], "none": whole[:0].reshape(0, 4),
    }  # fmt: skip
    _equal(open_torch(_save(tmp_path / "x.pt", values, zipped)), values)


@LAYOUTS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path, zipped, protocol):
    state = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).state_dict()
    path = _save(tmp_path / "x.pt", state, zipped, pickle_protocol=protocol)
    _equal(open_torch(path), state)


@LAYOUTS
def test_tied_and_wrapped_parameters(tmp_path, zipped):
    weight = torch.nn.Parameter(torch.randn(3, 4))
    buffer = torch.nn.Buffer(torch.randn(2))
    state = {"a": weight, "tied": weight, "view": weight.detach()[1], "buffer": buffer}
    state["wide"] = torch.randn(3, 1).expand(3, 5)
    _equal(open_torch(_save(tmp_path / "x.pt", state, zipped)), state)


class Callback:
    """Something a checkpoint drags along."""

    def __init__(self):
        self.best = torch.tensor(0.5)
        self.other = self


@LAYOUTS
def test_a_lightning_checkpoint(tmp_path, zipped):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimiser.step()
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "1.9",
        "state_dict": model.state_dict(),
        "loops": {"fit": collections.defaultdict(list, a=[1]), "set": {1}, "ice": frozenset("a")},
        "callbacks": {"Checkpoint{'monitor': None}": Callback(), ("a", 1): Callback},
        "optimizer_states": [optimiser.state_dict()],
        "hyper_parameters": argparse.Namespace(betas=(0.9, 0.999), when=datetime.datetime.now()),
        "numpy": [np.float64(3), np.arange(4), np.dtype("float32")],
        "random": random.getstate(),
        "odd": [complex(1, 2), b"bytes", bytearray(b"x"), 1 << 100, 1e300, None, slice(1, 2), open],
        "types": [torch.float16, torch.Size([2, 3]), torch.device("cpu"), torch.nn.Linear],
        "sparse": torch.eye(3).to_sparse(),
    }  # fmt: skip
    path = _save(tmp_path / "x.ckpt", content, zipped)
    _equal(open_torch(path), model.state_dict())
    found = scalars(path)
    assert found["epoch"] == 3 and found["pytorch-lightning_version"] == "1.9"
    assert found["optimizer_states.0.param_groups.0.lr"] == 1e-3
    del content["state_dict"], content["sparse"]
    found = open_torch(_save(tmp_path / "y.ckpt", content, zipped))
    moments = optimiser.state_dict()["state"][0]
    assert found["optimizer_states.0.state.0.exp_avg"].read().tobytes() == _bits(moments["exp_avg"])


@LAYOUTS
def test_kinds_that_are_not_read_are_named(tmp_path, zipped):
    conjugated = torch.randn(3, dtype=torch.complex64).conj()
    for odd in (torch.eye(2).to_sparse(), conjugated):
        state = {"w": torch.randn(2), "layer": {"odd": odd}}
        with pytest.raises(errors.DataError, match=r"tensor 'layer\.odd' is of a kind"):
            open_torch(_save(tmp_path / "x.pt", state, zipped))
    with pytest.raises(errors.DataError, match=r"a whole torch\.nn\.modules\.linear\.Linear"):
        open_torch(_save(tmp_path / "y.pt", torch.nn.Linear(2, 2), zipped))


class Tower(torch.nn.Module):
    input_resolution: int

    def __init__(self):
        super().__init__()
        self.input_resolution = 224
        self.conv1 = torch.nn.Conv2d(3, 4, 2, bias=False)
        self.blocks = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(2)))
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

    def forward(self, x):
        return self.blocks(self.conv1(x).mean((2, 3)))


class Both(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = Tower()
        self.logit_scale = torch.nn.Parameter(torch.tensor(4.6))
        self.register_buffer("context_length", torch.tensor(77))

    def forward(self, x):
        return self.visual(x) * self.logit_scale.exp()


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(tmp_path, how):
    model = Both().half().eval()
    pictures = torch.randn(1, 3, 4, 4, dtype=torch.float16)
    made = torch.jit.script(model) if how == "script" else torch.jit.trace(model, pictures)
    made.save(tmp_path / "x.pt")
    _equal(open_torch(tmp_path / "x.pt"), model.state_dict())
    assert how == "trace" or scalars(tmp_path / "x.pt")["visual.input_resolution"] == 224


def test_larger_storages_are_aligned(tmp_path):
    # The zip writer pads each header so that storages begin at multiples of 64.
    state = {f"layer.{n}": torch.randn(n * 37 + 1) for n in range(40)}
    path = _save(tmp_path / "x.pt", state, True)
    _equal(open_torch(path), torch.load(io.BytesIO(path.read_bytes()), weights_only=True))
