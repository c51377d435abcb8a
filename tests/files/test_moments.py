"""Moments against numpy, and statistics files: round trips, other tools' files, hostile ones."""

import io
import json
import zipfile

import numpy as np
import pytest

from unclip import errors
from unclip.files import moments
from unclip.files.moments import Moments, Statistics, read_statistics, write_statistics

POOL = "inception2015.tf1bilinear.uint8/pool3"


def _rows(count=50, width=7, seed=0):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, width)) @ rng.standard_normal((width, width))
    return (mixed + 3).astype(np.float32)


def _moments(rows):
    found = Moments(rows.shape[1])
    found.add(rows)
    return found


def test_mean_and_covariance_are_numpys():
    rows = _rows()
    found = _moments(rows)
    np.testing.assert_allclose(found.mean(), rows.mean(0, dtype=np.float64), rtol=1e-12)
    expected = np.cov(rows.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found.covariance(), expected, rtol=1e-10, atol=1e-12)
    assert found.mean().dtype == found.covariance().dtype == np.float64
    # float32 sums would lose the small one.
    found.add(np.array([[1e8] * 7, [1] * 7], np.float32))
    np.testing.assert_allclose(found.total, rows.astype(np.float64).sum(0) + 100000001, rtol=1e-14)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_parts_make_the_whole_and_padding_is_not_counted(size):
    rows = _rows()
    whole, parts = _moments(rows), Moments(7)
    for start in range(0, len(rows), size):
        part, block = Moments(7), rows[start : start + size]
        padded = np.full((size, 7), np.nan, np.float32)
        padded[: len(block)] = block
        part.add(padded, np.arange(size) < len(block))
        parts.merge(part)
    assert parts.count == whole.count == 50
    np.testing.assert_allclose(parts.mean(), whole.mean(), rtol=1e-13)
    np.testing.assert_allclose(parts.covariance(), whole.covariance(), rtol=1e-11)


def test_what_cannot_be_measured_is_said():
    rows = _rows()
    rows[[5, 9], 3] = np.nan, np.inf
    with pytest.raises(errors.NumericsError, match=r"2 of 50 pictures have NaN .* is row 5"):
        _moments(rows)
    found = Moments(7)
    valid = np.arange(50) != 5
    names = [f"{i}.png" for i in range(50)]
    with pytest.raises(errors.NumericsError, match=r"1 of 49 .* first is '9\.png'"):
        found.add(rows, valid, names)
    assert found.count == 0
    with pytest.raises(errors.ConfigError, match="no pictures"):
        found.mean()
    found.add(rows[:1])
    with pytest.raises(errors.ConfigError, match="at least 2"):
        Statistics.of(found)
    with pytest.raises(errors.ConfigError, match=r"\[pictures, 7\]"):
        found.add(np.zeros((2, 6)))
    with pytest.raises(errors.ConfigError, match="width 7 and 6"):
        found.merge(Moments(6))


def _statistics(seed=0, **provenance):
    return Statistics.of(_moments(_rows(seed=seed)), provenance)


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "real.npz"
    stored = {
        POOL: _statistics(weights_sha256="ab", source="é"),
        "inception2015.tf1bilinear.uint8/spatial": _statistics(1),
        "inception2015.pil-bicubic.float/pool3": _statistics(2, mode="clean"),
        "clip.ViT-L-14.openai/z_i": _statistics(3),
    }
    write_statistics(path, stored, {"clip.ViT-L-14.openai/z_i": _rows(seed=3)})
    found = read_statistics(path)
    assert found.ours and found.statistics.keys() == stored.keys()
    for name, one in stored.items():
        assert found.of(name).count == 50 and found.of(name).provenance == one.provenance
        np.testing.assert_array_equal(found.of(name).mean, one.mean)
        np.testing.assert_array_equal(found.of(name).covariance, one.covariance)
    assert list(found.features) == ["clip.ViT-L-14.openai/z_i"]
    np.testing.assert_array_equal(found.features["clip.ViT-L-14.openai/z_i"], _rows(seed=3))
    with pytest.raises(errors.ConfigError, match=r"valid: clip\.ViT-L-14\.openai/z_i"):
        found.of("clip.ViT-L-14.cmmd/z_i")


def test_other_tools_read_ours(tmp_path):
    one = _statistics()
    write_statistics(tmp_path / "real.npz", {POOL: one})
    with np.load(tmp_path / "real.npz") as file:
        np.testing.assert_array_equal(file["mu"], one.mean)
        np.testing.assert_array_equal(file["sigma"], one.covariance)


def test_other_tools_files(tmp_path):
    one, other = _statistics(), _statistics(1)
    pytorch_fid = {"mu": one.mean, "sigma": np.asfortranarray(one.covariance)}
    np.savez(tmp_path / "pytorch-fid.npz", **pytorch_fid)
    found = read_statistics(tmp_path / "pytorch-fid.npz")
    assert not found.ours and found.statistics.keys() == {"pool3"}
    assert found.of(POOL).count is None
    np.testing.assert_array_equal(found.of(POOL).covariance, one.covariance)
    with pytest.raises(errors.ConfigError, match="spatial"):
        found.of("inception2015.tf1bilinear.uint8/spatial")
    openai = pytorch_fid | {"mu_s": other.mean.astype(np.float32), "sigma_s": other.covariance}
    np.savez_compressed(tmp_path / "openai.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8), **openai)
    found = read_statistics(tmp_path / "openai.npz")
    assert found.of("x/spatial").mean.dtype == np.float64
    np.testing.assert_array_equal(found.of("x/spatial").covariance, other.covariance)


def _bytes(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
    return file.getvalue()


def _npz(path, entries, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(f"{name}.npy", data)
    return path


def _header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def test_hostile_and_damaged_files(tmp_path, monkeypatch):
    path, mu, sigma = tmp_path / "bad.npz", _bytes(np.zeros(3)), _bytes(np.eye(3))

    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    shaped = lambda shape: _header(
        f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}\n"
    )
    huge, empty = shaped((10**6, 10**6)), shaped((0, 10**30))
    negative = shaped((-1, -3)) + bytes(24)
    call = _header("__import__('os').abort()\n")
    about = lambda text: {
        "unclip": _bytes(np.frombuffer(text.encode(), np.uint8)),
        "mean_0": mu,
        "covariance_0": sigma,
    }
    for entries, message in [
        ({"mu": _bytes(np.array([Trap()], object)), "sigma": sigma}, "expected real numbers"),
        ({"mu": mu, "sigma": _bytes(np.array(["a"]))}, "expected real numbers"),
        ({"mu": mu, "sigma": _bytes(np.eye(4))}, r"mean \[3\] and covariance \[4, 4\]"),
        ({"mu": mu, "sigma": sigma[:-8]}, "damaged: 'sigma'"),
        ({"mu": huge, "sigma": sigma}, "damaged: 'mu'"),
        ({"mu": negative, "sigma": sigma}, "damaged: 'mu'"),
        ({"mu": empty, "sigma": sigma}, "damaged: 'mu'"),
        ({"mu": call, "sigma": sigma}, "'mu' is not an array"),
        ({"mu": b"", "sigma": sigma}, "'mu' is not an array"),
        ({"arr_0": mu}, "holds arr_0: expected statistics"),
        ({}, "holds nothing"),
        (about("[]"), "description is not valid"),
        (about('{"format": 1, "features": {"a": {"count": -2, "provenance": {}}}}'), "not valid"),
        (about('{"format": 1, "features": {}}'), "not valid"),
        (about("[" * 100000), "not valid"),
    ]:
        with pytest.raises(errors.DataError, match=message):
            read_statistics(_npz(path, entries))
    with pytest.raises(errors.ConfigError, match="format 2, this unclip reads up to 1"):
        read_statistics(_npz(path, about(json.dumps({"format": 2, "features": {}}))))
    with pytest.raises(errors.NumericsError, match="NaN"):
        read_statistics(_npz(path, {"mu": _bytes(np.array([np.nan] * 3)), "sigma": sigma}))
    monkeypatch.setattr(moments, "MAX_WIDTH", 8)
    with pytest.raises(errors.DataError, match="larger than 512 bytes"):
        read_statistics(_npz(path, {"mu": mu, "sigma": _bytes(np.zeros((40, 40)))}))
    with pytest.raises(errors.DataError, match="compressed in a way"):
        read_statistics(_npz(path, {"mu": mu, "sigma": sigma}, zipfile.ZIP_LZMA))
    path.write_bytes(b"PK\x03\x04 no")
    with pytest.raises(errors.DataError, match="not a statistics file"):
        read_statistics(path)
    with pytest.raises(errors.DataError, match="No such file"):
        read_statistics(tmp_path / "none.npz")


def test_files_cut_anywhere_are_refused(tmp_path):
    write_statistics(tmp_path / "real.npz", {POOL: _statistics()})
    data = (tmp_path / "real.npz").read_bytes()
    for end in range(0, len(data), 97):
        (tmp_path / "cut.npz").write_bytes(data[:end])
        with pytest.raises(errors.DataError):
            read_statistics(tmp_path / "cut.npz")
    for place in range(0, len(data), 41):
        flipped = bytearray(data)
        flipped[place] ^= 0xFF
        (tmp_path / "flipped.npz").write_bytes(flipped)
        try:
            read_statistics(tmp_path / "flipped.npz")
        except errors.UnclipError as error:
            assert "\n" not in str(error)


def test_what_is_not_written(tmp_path):
    one = _statistics()
    with pytest.raises(errors.ConfigError, match=r"ends in \.npz"):
        write_statistics(tmp_path / "a", {POOL: one})
    with pytest.raises(errors.ConfigError, match="no statistics"):
        write_statistics(tmp_path / "a.npz", {})
    with pytest.raises(errors.ConfigError, match=r"not \[50, 7\]"):
        write_statistics(tmp_path / "a.npz", {POOL: one}, {POOL: _rows()[:3]})
    with pytest.raises(errors.ConfigError, match="JSON"):
        write_statistics(tmp_path / "a.npz", {POOL: _statistics(x=object())})
    assert not list(tmp_path.iterdir())
