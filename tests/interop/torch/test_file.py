"""Reading torch files without torch: both layouts, TorchScript, and what hostile ones may not do.

The files are assembled here, instruction by instruction; tests/parity has those torch writes.
"""

import io
import pickle
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from unclip import errors
from unclip.interop.torch import file as torch_file
from unclip.interop.torch import pickle as torch_pickle

MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {name: np.dtype(torch_pickle.DTYPES[d]) for name, d in torch_pickle.STORAGES.items()}


# ================================================================== a small assembler of pickles


def plain(value):
    """The instructions that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def storage(key, kind, count, module="torch", view=None):
    place = plain("storage") + named(module, kind) + plain(key) + plain("cpu") + plain(count)
    return b"(" + place + (b"" if view is None else plain(view)) + b"tQ"


def rebuilt(data, offset, shape, stride, function="_rebuild_tensor_v2", extra=b""):
    hooks = named("collections", "OrderedDict") + b")R"
    arguments = data + plain(offset) + plain(shape) + plain(stride) + plain(False) + hooks + extra
    return named("torch._utils", function) + b"(" + arguments + b"tR"


def tensor(key="0", kind="FloatStorage", count=6, offset=0, shape=(2, 3), stride=(3, 1)):
    return rebuilt(storage(key, kind, count), offset, shape, stride)


def table(**items):
    return b"}(" + b"".join(plain(k) + v for k, v in items.items()) + b"u"


def write_zip(path, body, storages=(), *, compression=zipfile.ZIP_STORED, order=None, **others):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        if order:
            archive.writestr("archive/byteorder", order)
        for number, array in enumerate(storages):
            archive.writestr(f"archive/data/{number}", np.asarray(array).tobytes())
        for name, content in others.items():
            archive.writestr(f"archive/{name.replace('__', '/')}", content)
    return path


def write_stream(path, body, storages=(), keys=None):
    arrays = [np.asarray(array).reshape(-1) for array in storages]
    facts = {"protocol_version": 1001, "little_endian": True}
    parts = [pickle.dumps(value, 2) for value in (MAGIC, 1001, facts)]
    parts += [b"\x80\x02" + body + b".", pickle.dumps(keys or list(map(str, range(len(arrays)))))]
    for array in arrays:
        parts += [struct.pack("<q", array.size), array.tobytes()]
    path.write_bytes(b"".join(parts))
    return path


SIX = np.arange(6, dtype=np.float32)
LAYOUTS = pytest.mark.parametrize("write", [write_zip, write_stream])


# ================================================================================ what is read


@LAYOUTS
def test_views_of_one_storage(tmp_path, write):
    body = table(
        whole=tensor(),
        turned=tensor(shape=(3, 2), stride=(1, 3)),
        later=tensor(offset=4, shape=(2,), stride=(1,)),
        every_second=tensor(shape=(3,), stride=(2,)),
        scalar=tensor(offset=5, shape=(), stride=()),
        none=tensor(shape=(0, 7), stride=(7, 1)),
        repeated=tensor(offset=1, shape=(4, 2), stride=(0, 1)),
    )
    found = torch_file.open_torch(write(tmp_path / "x.pt", body, [SIX]))
    whole = SIX.reshape(2, 3)
    expected = {
        "whole": whole, "turned": whole.T, "later": SIX[4:], "every_second": SIX[::2],
        "scalar": SIX[5], "none": np.zeros((0, 7), np.float32), "repeated": [[1, 2]] * 4,
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].shape == np.shape(values) and found[name].dtype == np.float32
        read = found[name].read()
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read, values)


@LAYOUTS
@pytest.mark.parametrize("kind", STORAGES)
def test_every_storage_type(tmp_path, write, kind):
    dtype = STORAGES[kind]
    values = np.array([0, 1, 3, 1]).astype(dtype)
    body = table(a=tensor(kind=kind, count=4, shape=(4,), stride=(1,)))
    found = torch_file.open_torch(write(tmp_path / "x.pt", body, [values]))["a"].read()
    assert found.dtype == dtype and found.tobytes() == values.tobytes()
    assert kind != "BFloat16Storage" or dtype == ml_dtypes.bfloat16


def test_types_without_a_storage_of_their_own(tmp_path):
    values = np.array([1, 2, 65535], np.uint16)
    raw = storage("0", "UntypedStorage", values.nbytes, "torch.storage")
    dtype = named("torch", "uint16")
    body = table(a=rebuilt(raw, 0, (3,), (1,), "_rebuild_tensor_v3", dtype))
    found = torch_file.open_torch(write_zip(tmp_path / "x.pt", body, [values]))["a"].read()
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, values)


def test_a_file_of_the_other_byte_order(tmp_path):
    values = np.array([1 + 2j, -3.5j], np.complex64)
    kind = {"kind": "ComplexFloatStorage", "count": 2, "shape": (2,), "stride": (1,)}
    path = write_zip(tmp_path / "x.pt", table(a=tensor(**kind)), [values.byteswap()], order=b"big")
    np.testing.assert_array_equal(torch_file.open_torch(path)["a"].read(), values)


@LAYOUTS
def test_names_are_nested_and_the_rest_is_scalars(tmp_path, write):
    layers = b"](" + tensor() + table(gain=tensor()) + b"e"
    numbered = b"}K\x07" + tensor() + b"s"
    body = table(layers=layers, epoch=plain(3), note=plain("x"), by_number=numbered)
    path = write(tmp_path / "x.pt", body, [SIX])
    assert torch_file.open_torch(path).keys() == {"layers.0", "layers.1.gain", "by_number.7"}
    assert torch_file.scalars(path) == {"epoch": 3, "note": "x"}


def test_the_oldest_streams(tmp_path):
    pair = b"](" + plain("w") + tensor("140", count=2, shape=(2,), stride=(1,)) + b"e"
    view = storage("140", "FloatStorage", 6, view=("141", 2, 3))
    other = b"](" + plain("v") + rebuilt(view, 1, (2,), (1,)) + b"e"
    body = named("collections", "OrderedDict") + b"(](" + pair + other + b"etR"
    # The first mention of a storage gives its length.
    body = body.replace(plain(2) + b"tQ", plain(6) + b"tQ")
    found = torch_file.open_torch(write_stream(tmp_path / "x.pth", body, [SIX], ["140"]))
    np.testing.assert_array_equal(found["w"].read(), SIX[:2])
    np.testing.assert_array_equal(found["v"].read(), SIX[3:5])


def test_a_lightning_checkpoint_gives_its_state_dict(tmp_path):
    callback = named("lightning.callbacks", "ModelCheckpoint")
    callback += b")\x81" + table(best=plain(1)) + b"b"
    state = named("collections", "OrderedDict") + b")R(" + plain("w") + tensor() + b"u"
    # An OrderedDict's own attributes (torch keeps versions there) are not entries.
    state += table(_metadata=plain({"": {"version": 1}})) + b"b"
    body = table(
        epoch=plain(7),
        callbacks=table(a=callback),
        state_dict=state,
        optimizer_states=b"](" + table(exp_avg=tensor()) + b"e",
        when=named("datetime", "datetime") + b"(" + plain(2026) + b"tR",
        seen=named("builtins", "set") + b"(](K\x01K\x02etR",
    )
    path = write_zip(tmp_path / "x.ckpt", body, [SIX])
    assert torch_file.open_torch(path).keys() == {"w"}
    assert torch_file.scalars(path) == {"epoch": 7}


def test_torchscript_modules_nest_as_their_state_dict(tmp_path):
    def module(kind, **attributes):
        return named("__torch__.model", kind) + b")\x81" + table(**attributes) + b"b"

    sizes = named("torch.jit._pickle", "build_intlist") + b"(" + plain([3, 5]) + b"tR"
    parameter = named("torch._utils", "_rebuild_parameter") + b"(" + tensor() + plain(True)
    parameter += named("collections", "OrderedDict") + b")RtR"
    visual = module("Visual", conv1=module("Conv", weight=parameter), input_resolution=plain(224))
    body = module("CLIP", visual=visual, scale=tensor(shape=(), stride=()), sizes=sizes)
    bomb = b"cos\nsystem\n(X\x05\x00\x00\x00falsetR."
    path = write_zip(tmp_path / "x.pt", body, [SIX], constants__pkl=bomb, code__model__py=b"1/0")
    found = torch_file.open_torch(path)
    assert found.keys() == {"visual.conv1.weight", "scale"}
    np.testing.assert_array_equal(found["visual.conv1.weight"].read(), SIX.reshape(2, 3))
    expected = {"visual.input_resolution": 224, "sizes.0": 3, "sizes.1": 5}
    assert torch_file.scalars(path) == expected


def test_tensors_are_read_one_at_a_time(tmp_path):
    each = 1 << 18
    arrays = [np.full(each, n, np.float32) for n in range(16)]
    views = {f"t{n}": tensor(str(n), count=each, shape=(each,), stride=(1,)) for n in range(16)}
    path = write_stream(tmp_path / "x.pt", table(**views), arrays)
    del arrays
    tracemalloc.start()
    found = torch_file.open_torch(path)
    assert tracemalloc.get_traced_memory()[1] < each
    for number in range(16):
        assert found[f"t{number}"].read()[-1] == number
    assert tracemalloc.get_traced_memory()[1] < 4 * each * 2.5
    tracemalloc.stop()


# ============================================================================= what is refused


@LAYOUTS
def test_code_in_a_file_is_not_run(tmp_path, write):
    trace = tmp_path / "ran"
    call = named("os", "system") + b"(" + plain(f"touch {trace}") + b"tR"
    by_name = plain("os") + plain("system") + b"\x93(" + plain(f"touch {trace}") + b"tR"
    old = b"(" + plain(f"touch {trace}") + b"ios\nsystem\n"
    path = write(tmp_path / "x.pt", table(w=tensor(), a=call, b=by_name, c=old), [SIX])
    assert torch_file.open_torch(path).keys() == {"w"}
    np.testing.assert_array_equal(torch_file.open_torch(path)["w"].read(), SIX.reshape(2, 3))
    with pytest.raises(errors.DataError, match=r"no tensors: it is a whole os\.system object"):
        torch_file.open_torch(write(tmp_path / "y.pt", call))
    assert not trace.exists()


@LAYOUTS
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (table(w=tensor(shape=(2, 4), stride=(4, 1))), "reaches beyond its storage of 24"),
        (table(w=tensor(offset=1)), "reaches beyond"),
        (table(w=tensor(shape=(1 << 50,), stride=(1,))), "reaches beyond"),
        (table(w=tensor(shape=(1 << 40,), stride=(0,))), "larger than the file"),
        (table(w=tensor(shape=(2,), stride=(-1,))), "not sizes"),
        (table(w=tensor(offset=-1)), "not sizes"),
        (table(w=tensor(shape=(1 << 200,), stride=(0,))), "not sizes"),
        (table(w=tensor(shape=(True,), stride=(1,))), "not sizes"),
        (table(w=tensor(shape=(1,) * 40, stride=(0,) * 40)), "40 axes"),
        (table(w=tensor(shape=(2,))), "1 axes and 2 strides"),
        (table(w=tensor(shape=7, stride=7)), "shape is not a list"),
        (table(w=tensor(count=-1)), "not a storage"),
        (table(ok=tensor(), w=rebuilt(plain(3), 0, (2,), (1,))), "'w' is of a kind"),
        (table(ok=tensor(), w=rebuilt(storage("0", "NewStorage", 6), 0, (2,), (1,))),
         "kind that is not read"),
        (table(w=rebuilt(storage("0", "FloatStorage", 6), 0, (2,), (1,), "_rebuild_qtensor")),
         r"kind that is not read \(torch._utils._rebuild_qtensor\)"),
        (table(w=rebuilt(storage("0", "FloatStorage", 6), 0, (2,), (1,), extra=plain({"conj": 1}))),
         "kind that is not read"),
        (table(w=rebuilt(storage("0", "FloatStorage", 6, view=("1", 4, 3)), 0, (), ())), "beyond"),
        (table(**{"a.b": tensor(), "a": table(b=tensor())}), "two tensors are named 'a.b'"),
        (b"0", "takes what is not there"),
        (b"h\x05", "takes what is not there"),
        (b"u", "takes what is not there"),
        (b"\x97", "uses NEXT_BUFFER"),
        (b"\x82\x01", "uses EXT1"),
        (b"X\xff\xff\xff\x7f", "larger than|expected .* bytes"),
        (b"\x8e" + b"\xff" * 7 + b"\x7f", "larger than|bytes"),
        (b"}(K\x01u", "key without a value"),
        (table(w=storage("0", "FloatStorage", 6)), "holds no tensors"),
    ],
)  # fmt: skip
def test_damage_is_one_line(tmp_path, write, body, message):
    path = write(tmp_path / "x.pt", body, [SIX])
    with pytest.raises(errors.DataError, match=message) as caught:
        torch_file.open_torch(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@LAYOUTS
def test_values_nested_without_end(tmp_path, write, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_STEPS", 10_000)
    doubled = b")" + b"2\x86" * 40
    deep = b"]" * 200 + b"a" * 199
    itself = b"]q\x00h\x00a"
    path = write(tmp_path / "x.pt", table(a=doubled, w=tensor()), [SIX])
    with pytest.raises(errors.DataError, match="more than 10000 values"):
        torch_file.open_torch(path)
    with pytest.raises(errors.DataError, match="nested more than 64 deep"):
        torch_file.open_torch(write(tmp_path / "y.pt", table(a=deep, w=tensor()), [SIX]))
    path = write(tmp_path / "z.pt", table(a=itself, w=tensor()), [SIX])
    assert torch_file.open_torch(path).keys() == {"w"}
    # Hashing a nested tuple has no limit of depth: it must not be a dict's key.
    key = b")" + b"\x85" * 100_000
    body = b"}" + key + plain(1) + b"s" + plain("w") + tensor() + b"s"
    path = write(tmp_path / "k.pt", body, [SIX])
    assert torch_file.open_torch(path).keys() == {"w"}


def test_long_pickles_are_refused(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "x.pt", b"N0" * 600, compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(torch_pickle, "MAX_STEPS", 1000)
    with pytest.raises(errors.DataError, match="more than 1000 instructions"):
        torch_file.open_torch(path)
    monkeypatch.setattr(torch_file, "MAX_PICKLE_BYTES", 1000)
    with pytest.raises(errors.DataError, match="larger than 1000 bytes"):
        torch_file.open_torch(path)
    with pytest.raises(errors.DataError, match="larger than 1000 bytes"):
        torch_file.open_torch(write_stream(tmp_path / "y.pt", plain("x" * 2000)))


@LAYOUTS
def test_every_cut_of_a_file_is_refused(tmp_path, write):
    body = table(w=tensor(), v=tensor("1", "LongStorage", 2, shape=(2,), stride=(1,)))
    whole = write(tmp_path / "x.pt", body, [SIX, np.arange(2)]).read_bytes()
    for length in range(0, len(whole), 3):
        (tmp_path / "y.pt").write_bytes(whole[:length])
        with pytest.raises(errors.DataError, match=r"y\.pt"):
            torch_file.open_torch(tmp_path / "y.pt")


def test_a_byte_changed_anywhere_never_escapes(tmp_path):
    whole = bytearray(write_zip(tmp_path / "x.pt", table(w=tensor()), [SIX]).read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] = rng.integers(256)
        (tmp_path / "y.pt").write_bytes(changed)
        try:
            for found in torch_file.open_torch(tmp_path / "y.pt").values():
                found.read()
        except errors.DataError:
            pass


def test_storages_are_found_in_the_archive_alone(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(24))
    path = write_zip(tmp_path / "x.pt", table(w=tensor("../../secret")), [SIX])
    with pytest.raises(errors.DataError, match=r"storage ../../secret is missing"):
        torch_file.open_torch(path)
    path = write_zip(tmp_path / "y.pt", table(w=tensor()), [SIX], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(errors.DataError, match="storage 0 is compressed"):
        torch_file.open_torch(path)
    path = write_zip(tmp_path / "z.pt", table(w=tensor()), [SIX[:5]])
    with pytest.raises(errors.DataError, match="storage 0 of tensor 'w' is cut off"):
        torch_file.open_torch(path)
    stream = write_stream(tmp_path / "s.pt", table(w=tensor()), [SIX[:5]])
    with pytest.raises(errors.DataError, match="storage 0 is not as long as its pickle says"):
        torch_file.open_torch(stream)


def test_sizes_that_no_array_has(tmp_path):
    odd = tensor(shape=(1, 2), stride=(1 << 61, 1))
    body = table(empty=tensor(shape=(0, 1 << 61), stride=(1, 1)), odd=odd)
    found = torch_file.open_torch(write_zip(tmp_path / "x.pt", body, [SIX]))
    np.testing.assert_array_equal(found["odd"].read(), [[0, 1]])
    with pytest.raises(errors.DataError, match=r"x\.pt is damaged: .*(big|large|maximum)"):
        found["empty"].read()


def test_a_file_that_changed_since(tmp_path):
    path = write_stream(tmp_path / "x.pt", table(w=tensor()), [SIX])
    found = torch_file.open_torch(path)["w"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(errors.DataError, match="became shorter"):
        found.read()
    path.unlink()
    with pytest.raises(errors.DataError, match=r"cannot read .*No such file"):
        found.read()


def _bytes_of_zip():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("word/document.xml", "x")
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"w": [1.0]}), "a plain pickle, which is never read"),
        (b"version http...\noid sha256:0", "a Git LFS pointer"),
        (b"\x1f\x8b\x08", "a gzip archive"),
        (bytes(257) + b"ustar" + bytes(250), "a tar archive"),
        (_bytes_of_zip(), "a zip archive without a data.pkl"),
        (b"", "empty, 0 bytes"),
        (bytes(1000), "nothing but zeros"),
        (b" \r\n<HTML><body>", "a web page"),
        (b"\x40" + bytes(7) + b'{"w":{"dtype":', "a safetensors file"),
        (b"nothing known", "of an unknown kind"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(errors.DataError, match=f"not a torch file: (it is )?{message}"):
        torch_file.open_torch(tmp_path / "x.pt")


def test_a_missing_file(tmp_path):
    with pytest.raises(errors.DataError, match=r"cannot read .*x\.pt: No such file"):
        torch_file.open_torch(tmp_path / "x.pt")
