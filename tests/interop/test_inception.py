"""FID's Inception from both of its files: equal parameters, and strictness."""

import hashlib
import zlib

import jax
import numpy as np
import pytest
from tensorboardX.proto import graph_pb2, types_pb2

from unclip import errors
from unclip.cascade import bundle
from unclip.files import tensors
from unclip.interop import inception
from unclip.runtime.sharding import tree_paths

# Written out apart from the rules under test: torch's unit = the graph's, block by block.
A = """branch1x1=conv branch5x5_1=tower/conv branch5x5_2=tower/conv_1 branch3x3dbl_1=tower_1/conv
branch3x3dbl_2=tower_1/conv_1 branch3x3dbl_3=tower_1/conv_2 branch_pool=tower_2/conv"""
B = """branch3x3=conv branch3x3dbl_1=tower/conv branch3x3dbl_2=tower/conv_1
branch3x3dbl_3=tower/conv_2"""
C = """branch1x1=conv branch7x7_1=tower/conv branch7x7_2=tower/conv_1 branch7x7_3=tower/conv_2
branch7x7dbl_1=tower_1/conv branch7x7dbl_2=tower_1/conv_1 branch7x7dbl_3=tower_1/conv_2
branch7x7dbl_4=tower_1/conv_3 branch7x7dbl_5=tower_1/conv_4 branch_pool=tower_2/conv"""
D = """branch3x3_1=tower/conv branch3x3_2=tower/conv_1 branch7x7x3_1=tower_1/conv
branch7x7x3_2=tower_1/conv_1 branch7x7x3_3=tower_1/conv_2 branch7x7x3_4=tower_1/conv_3"""
E = """branch1x1=conv branch3x3_1=tower/conv branch3x3_2a=tower/mixed/conv
branch3x3_2b=tower/mixed/conv_1 branch3x3dbl_1=tower_1/conv branch3x3dbl_2=tower_1/conv_1
branch3x3dbl_3a=tower_1/mixed/conv branch3x3dbl_3b=tower_1/mixed/conv_1 branch_pool=tower_2/conv"""
BLOCKS = {
    "Mixed_5b=mixed": A, "Mixed_5c=mixed_1": A, "Mixed_5d=mixed_2": A, "Mixed_6a=mixed_3": B,
    "Mixed_6b=mixed_4": C, "Mixed_6c=mixed_5": C, "Mixed_6d=mixed_6": C, "Mixed_6e=mixed_7": C,
    "Mixed_7a=mixed_8": D, "Mixed_7b=mixed_9": E, "Mixed_7c=mixed_10": E,
}  # fmt: skip
STEM = "Conv2d_1a_3x3=conv Conv2d_2a_3x3=conv_1 Conv2d_2b_3x3=conv_2 Conv2d_3b_1x1=conv_3 \
Conv2d_4a_3x3=conv_4"


def _units():
    """{torch's unit: the graph's}, 94 of them."""
    found = dict(pair.split("=") for pair in STEM.split())
    for blocks, units in BLOCKS.items():
        torch_block, graph_block = blocks.split("=")
        for pair in units.split():
            ours, theirs = pair.split("=")
            found[f"{torch_block}.{ours}"] = f"{graph_block}/{theirs}"
    return found


def _values(name, shape):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape, np.float32)


@pytest.fixture(scope="module")
def state():
    """A random state dict as the ports name it; a unit's shapes are those of ours."""
    from unclip.models.inception import Inception

    pictures = jax.ShapeDtypeStruct((1, 299, 299, 3), np.uint8)
    tree = jax.eval_shape(Inception().init, jax.random.key(0), pictures)["params"]
    shapes = {path: leaf.shape for path, leaf in tree_paths(tree).items()}
    out = {"fc.weight": _values("fc", (1008, 2048)), "fc.bias": _values("fc.bias", 1008)}
    for unit in _units():
        height, width, narrow, wide = shapes[f"{unit.replace('.', '/')}/kernel"]
        out[f"{unit}.conv.weight"] = _values(unit, (wide, narrow, height, width))
        for name in ("weight", "bias", "running_mean", "running_var"):
            out[f"{unit}.bn.{name}"] = _values(f"{unit} {name}", wide)
        out[f"{unit}.bn.num_batches_tracked"] = np.array(0)
    return out


def _graph(state, *, scaled=True):
    graph = graph_pb2.GraphDef()

    def constant(name, array, *, as_list=False, dtype=types_pb2.DT_FLOAT):
        node = graph.node.add(name=name, op="Const")
        tensor = node.attr["value"].tensor
        tensor.dtype = dtype
        for length in array.shape:
            tensor.tensor_shape.dim.add(size=length)
        if as_list:
            # Values may be given singly, and an end of equal ones once.
            equal = np.flatnonzero(array != array[-1])
            tensor.float_val.extend(array[: equal[-1] + 2] if equal.size else array[:1])
        else:
            tensor.tensor_content = array.tobytes()

    constant("Sub/y", np.float32(128))
    constant("pool_3/_reshape/shape", np.array([-1, 2048], np.int32), dtype=types_pb2.DT_INT32)
    for ours, theirs in _units().items():
        constant(f"{theirs}/conv2d_params", state[f"{ours}.conv.weight"].transpose(2, 3, 1, 0))
        for name, part in (
            ("beta", "bias"),
            ("gamma", "weight"),
            ("moving_mean", "running_mean"),
            ("moving_variance", "running_var"),
        ):
            as_list = name == "beta"
            constant(f"{theirs}/batchnorm/{name}", state[f"{ours}.bn.{part}"], as_list=as_list)
        norm = graph.node.add(name=f"{theirs}/batchnorm", op="BatchNormWithGlobalNormalization")
        norm.input.append(f"{theirs}/Conv2D")
        for name in ("moving_mean", "moving_variance", "beta", "gamma"):
            norm.input.append(f"{theirs}/batchnorm/{name}")
        norm.attr["scale_after_normalization"].b = scaled
    constant("softmax/weights", np.ascontiguousarray(state["fc.weight"].T))
    constant("softmax/biases", state["fc.bias"])
    return graph


def _read(path):
    return inception.read([path], {"preset": None})["inception"]


@pytest.mark.slow
def test_both_files_give_equal_parameters(tmp_path, state):
    state = dict(state)
    # The graph keeps a run of equal values as one.
    state["Mixed_6d.branch1x1.bn.bias"] = np.full(192, 0.5, np.float32)
    state["Conv2d_1a_3x3.bn.bias"] = np.repeat(np.float32([1, 2]), 16)
    tensors.write(tmp_path / "weights.safetensors", state)
    (tmp_path / "graph.pb").write_bytes(_graph(state).SerializeToString())
    one, other = _read(tmp_path / "weights.safetensors"), _read(tmp_path / "graph.pb")
    flat, same = tree_paths(one.params), tree_paths(other.params)
    assert flat.keys() == same.keys() and len(flat) == 94 * 5 + 2
    for path in flat:
        np.testing.assert_array_equal(flat[path].read(), same[path].read(), err_msg=path)
    kernel = one.params["Mixed_7a"]["branch7x7x3_2"]["kernel"].read()
    theirs = state["Mixed_7a.branch7x7x3_2.conv.weight"]
    assert kernel.shape == (1, 7, 192, 192)
    assert kernel[0, 2, 5, 7] == theirs[7, 5, 0, 2]
    np.testing.assert_array_equal(one.params["fc"]["kernel"].read(), state["fc.weight"].T)
    digest = hashlib.sha256((tmp_path / "graph.pb").read_bytes()).hexdigest()
    assert other.settings == {"source": "graph.pb", "sha256": digest}
    bundle.write(tmp_path / "bundle", {"inception": other})
    stored = bundle.read(tmp_path / "bundle").parts["inception"]
    assert stored.settings["sha256"] == digest and stored.arch["class"] == "Inception"
    np.testing.assert_array_equal(stored.params["fc"]["bias"], state["fc.bias"])


def test_a_gamma_that_the_graph_does_not_apply_is_one(tmp_path, state):
    (tmp_path / "graph.pb").write_bytes(_graph(state, scaled=False).SerializeToString())
    unit = _read(tmp_path / "graph.pb").params["Mixed_5b"]["branch1x1"]
    assert (unit["scale"].read() == 1).all()
    np.testing.assert_array_equal(unit["bias"].read(), state["Mixed_5b.branch1x1.bn.bias"])


def test_other_networks_are_listed(tmp_path, state):
    changed = {name: value for name, value in state.items() if name != "Mixed_6d.branch1x1.bn.bias"}
    changed["AuxLogits.fc.weight"] = np.zeros((1000, 768), np.float32)
    changed["fc.weight"] = np.zeros((1000, 2048), np.float32)
    tensors.write(tmp_path / "weights.safetensors", changed)
    with pytest.raises(errors.ConfigError) as caught:
        _read(tmp_path / "weights.safetensors")
    text = str(caught.value)
    assert "1 tensors missing, 1 not expected, 1 of another shape" in text
    assert "missing  Mixed_6d.branch1x1.bn.bias" in text
    assert "extra    AuxLogits.fc.weight [1000, 768]" in text
    assert "fc.weight [1000, 2048]" in text and "fc/kernel [2048, 1008]" in text
    graph = _graph(state)
    graph.node.add().CopyFrom(graph.node[len(graph.node) - 2])
    graph.node[-1].name = "more"
    (tmp_path / "graph.pb").write_bytes(graph.SerializeToString())
    with pytest.raises(errors.ConfigError, match=r"extra    more \[1008\]"):
        _read(tmp_path / "graph.pb")


def test_damaged_graphs(tmp_path, state, monkeypatch):
    path = tmp_path / "graph.pb"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(errors.DataError, match="is not a TensorFlow graph"):
        _read(path)
    graph = graph_pb2.GraphDef()
    tensor = graph.node.add(name="w", op="Const").attr["value"].tensor
    tensor.dtype = types_pb2.DT_FLOAT
    for sizes, content in (((2, 3), b"x" * 20), ((-1, -4), b"x" * 16), ((1 << 40,), b"")):
        del tensor.tensor_shape.dim[:]
        for size in sizes:
            tensor.tensor_shape.dim.add(size=size)
        tensor.tensor_content = content
        tensor.float_val[:] = [1.0]
        path.write_bytes(graph.SerializeToString())
        with pytest.raises(errors.DataError, match="constant 'w' is not"):
            _read(path)
    monkeypatch.setattr(inception, "MAX_GRAPH_BYTES", 10)
    with pytest.raises(errors.DataError, match="larger than 10 bytes"):
        _read(path)
    with pytest.raises(errors.DataError, match="No such file"):
        _read(tmp_path / "none.pb")
    with pytest.raises(errors.ConfigError, match=r"expected one \.pb or \.pth file"):
        inception.read([path, path], {})
