"""metrics.jsonl through kills and resumes, progress lines, and the arithmetic of utilisation."""

import io
import json
import math
import resource
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip.errors import ConfigError, DataError
from unclip.runtime import flops
from unclip.runtime.progress import progress
from unclip.runtime.writer import MetricWriter, distributed


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_valid_json_and_flushed_at_once(tmp_path):
    writer = MetricWriter(tmp_path, tensorboard=False)
    writer.scalars(
        1,
        {
            "loss": jnp.float32(0.5),
            "n": np.int64(2**40),
            "bad": math.nan,
            "big": -math.inf,
            "half": jnp.bfloat16(1.5),
        },
    )
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line.pop("time") > 1e9
    assert line == {
        "step": 1,
        "loss": 0.5,
        "n": 2**40,
        "bad": None,
        "big": None,
        "half": 1.5,
        "nonfinite": ["bad", "big"],
    }
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    writer.close()
    writer.close()


def test_resume_drops_later_lines_and_a_torn_one(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.scalars(step, {"loss": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    with MetricWriter(tmp_path, tensorboard=False, restored_step=3) as writer:
        writer.scalars(4, {"loss": 40})
    got = lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in got] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert [line["step"] for line in lines(tmp_path / "metrics.dropped.jsonl")] == [4, 5]


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.scalars(1, {"loss": 1.0, "bad": math.nan})
        writer.images(1, "samples", np.zeros((4, 5, 3), np.uint8))
        with pytest.raises(ValueError, match="samples"):
            writer.images(1, "samples", np.zeros((4, 5, 3), np.float32))
    (events,) = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    assert b"loss" in data and b"samples" in data and b"\x89PNG" in data and b"bad" not in data


def test_wandb_missing_is_said_and_present_is_used(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"unclip\[tracking\]"):
        MetricWriter(tmp_path, wandb={"project": "p"})
    calls = []
    run = types.SimpleNamespace(
        log=lambda v, step: calls.append((step, v)), finish=lambda: calls.append("end")
    )
    fake = types.SimpleNamespace(init=lambda **kw: calls.append(kw) or run, Image=np.shape)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with MetricWriter(tmp_path, tensorboard=False, wandb={"project": "p"}) as writer:
        writer.scalars(3, {"loss": 2.0})
        writer.images(3, "x", np.zeros((1, 1, 3), np.uint8))
    assert calls[0]["project"] == "p" and calls[0]["resume"] == "allow"
    assert calls[1:] == [(3, {"loss": 2.0}), (3, {"x": (1, 1, 3)}), "end"]


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with MetricWriter(tmp_path / "run") as writer:
        writer.scalars(1, {"loss": 1.0})
        writer.images(1, "x", np.zeros((1, 1, 3), np.uint8))
        writer.flush()
    assert not (tmp_path / "run").exists()


def test_disk_errors_are_data_errors(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Not a directory"):
        MetricWriter(tmp_path / "file" / "run")
    writer = MetricWriter(tmp_path, tensorboard=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        with pytest.raises(DataError, match=r"metrics\.jsonl: File too large"):
            writer.scalars(1, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.close()


def test_progress_prints_plain_lines_with_rate_and_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("unclip.runtime.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with progress(100, "train", initial=40, stream=stream) as bar:
        for _ in range(30):
            now[0] += 1.0
            bar.update(loss="0.5")
    out = stream.getvalue().splitlines()
    assert out == [
        "train: 50/100 step, 1 step/s, 0:50 left, loss 0.5",
        "train: 60/100 step, 1 step/s, 0:40 left, loss 0.5",
        "train: 70/100 step, 1 step/s, 0:30 left, loss 0.5",
        "train: 70/100 step, 1 step/s, 0:30 left",
    ]
    assert "\r" not in stream.getvalue()


def test_progress_wraps_iterables_and_closes_when_left_early():
    stream = io.StringIO()
    assert list(progress([1, 2, 3], "read", "file", stream=stream)) == [1, 2, 3]
    assert stream.getvalue().startswith("read: 3/3 file")
    for _ in progress(iter(range(10)), "read", stream=stream):
        break
    assert progress(None, stream=stream).count == 0


def test_progress_is_a_bar_on_a_terminal_and_silent_elsewhere(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    list(progress(range(3), "read", stream=stream))
    assert "3/3" in stream.getvalue() and "\r" in stream.getvalue()
    monkeypatch.setattr("unclip.runtime.distributed.is_main", lambda: False)
    stream = io.StringIO()
    list(progress(range(3), "read", stream=stream))
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_published_peaks(kind, peak):
    assert flops.chip_peak(kind) == peak
    assert (flops.chip_memory(kind) is None) == (peak is None)


def test_utilisation():
    assert flops.utilisation(1e12, 1.0, jax.devices()) is None, "no peak is known for a CPU"
    assert flops.utilisation(4e12, 2.0, jax.devices()[:2], peak=2e12) == 0.5
    h100 = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    np.testing.assert_allclose(flops.utilisation(989e12, 1.0, [h100] * 4), 0.25)
