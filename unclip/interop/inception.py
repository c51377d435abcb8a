"""FID's Inception-v3 from the files that hold it: PyTorch state dict or TensorFlow graph.

The network was published as a frozen TensorFlow graph, `classify_image_graph_def.pb` of 2015-12-05;
pytorch-fid and torch-fidelity share a state dict made from it,
`pt_inception-2015-12-05-6726825d.pth`. Both give equal parameters.
"""

import hashlib
import math
import pathlib
import re
from typing import Any

import google.protobuf.message
import jax
import jax.numpy as jnp
import numpy as np

from unclip import errors, files
from unclip.cascade.bundle import Part
from unclip.files.tensors import Lazy
from unclip.interop import layout, weights
from unclip.interop.layout import CONV, COPY, Rule
from unclip.models.inception import BLOCKS, SIZE, Inception
from unclip.runtime.sharding import tree_paths

MAX_GRAPH_BYTES = 256 << 20
MARK = "Conv2d_1a_3x3.conv.weight"
# Our leaf of a batch norm -> the graph's and torch's.
NORM = {
    "scale": ("gamma", "weight"),
    "bias": ("beta", "bias"),
    "mean": ("moving_mean", "running_mean"),
    "var": ("moving_variance", "running_var"),
}
# The tower of the graph's block in which a branch is; "" is the block itself.
TOWERS = {
    "A": {"branch1x1": "", "branch5x5": "tower/", "branch3x3dbl": "tower_1/"},
    "B": {"branch3x3": "", "branch3x3dbl": "tower/"},
    "C": {"branch1x1": "", "branch7x7": "tower/", "branch7x7dbl": "tower_1/"},
    "D": {"branch3x3": "tower/", "branch7x7x3": "tower_1/"},
    "E": {"branch1x1": "", "branch3x3": "tower/", "branch3x3dbl": "tower_1/"},
}


def read(paths: list[pathlib.Path], options: dict[str, Any]) -> dict[str, Part]:
    """{"inception": Part}, tensors unread.

    Args:
      paths: one file: `.pb`, or a state dict in the names of pytorch-fid (`.pth`, `.safetensors`).
      options: none are used.

    Returns:
      A part with `settings` {"source": file name, "sha256": of the file}, which says which weights
      a number was measured with.

    Raises:
      ConfigError: not one file, or tensors that are not this network's (with their table).
      DataError: the file cannot be read.
    """
    if len(paths) != 1 or paths[0].is_dir():
        given = ", ".join(map(str, paths))
        raise errors.ConfigError(f"inception: expected one .pb or .pth file, given {given}")
    path = paths[0]
    graph = path.suffix == ".pb"
    if graph:
        source = _read_graph(path)
    else:
        source = layout.unwrapped(weights.open_weights(path), (MARK,), str(path))
    pictures = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.uint8)
    abstract = jax.eval_shape(Inception().init, jax.random.key(0), pictures)["params"]
    rules = graph_rules(abstract) if graph else torch_rules(abstract)
    counters = [name for name in source if name.endswith(".num_batches_tracked")]
    params = layout.take(rules, source, abstract, what=f"{path} as Inception", ignore=counters)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    settings = {"source": path.name, "sha256": digest}
    return {"inception": Part("inception", {"class": "Inception"}, params, settings=settings)}


def torch_rules(abstract: dict[str, Any]) -> list[Rule]:
    """The rules of a state dict as pytorch-fid and torch-fidelity name it."""
    rules = layout.dense("fc", "fc")
    for unit in _units(abstract):
        theirs = unit.replace("/", ".")
        rules.append(Rule(f"{unit}/kernel", f"{theirs}.conv.weight", CONV))
        for ours, (_, name) in NORM.items():
            rules.append(Rule(f"{unit}/{ours}", f"{theirs}.bn.{name}", COPY))
    return rules


def graph_rules(abstract: dict[str, Any]) -> list[Rule]:
    """The rules of the TensorFlow graph's constants, whose memory layout is ours."""
    rules = [Rule("fc/kernel", "softmax/weights", COPY), Rule("fc/bias", "softmax/biases", COPY)]
    for unit in _units(abstract):
        theirs = graph_name(unit)
        rules.append(Rule(f"{unit}/kernel", f"{theirs}/conv2d_params", COPY))
        for ours, (name, _) in NORM.items():
            rules.append(Rule(f"{unit}/{ours}", f"{theirs}/batchnorm/{name}", COPY))
    return rules


def graph_name(unit: str) -> str:
    """The graph's unit of ours: Mixed_7b/branch3x3_2b is mixed_9/tower/mixed/conv_1."""
    stem = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
    if unit in stem:
        return _numbered("conv", stem.index(unit))
    block, _, layer = unit.partition("/")
    order = [name for name, _, _ in BLOCKS].index(block)
    towers = TOWERS[BLOCKS[order][1][0]]
    # branch7x7dbl_3: third convolution of its tower; branch3x3_2a, 2b: a fork at its end.
    matched = re.fullmatch(r"(branch_pool|branch\w+?)(?:_(\d)([ab])?)?", layer)
    branch, number, side = matched.groups()
    tower = "tower_2/" if branch == "branch_pool" else towers[branch]
    if side:
        conv = "mixed/" + _numbered("conv", "ab".index(side))
    else:
        conv = _numbered("conv", int(number or 1) - 1)
    return f"{_numbered('mixed', order)}/{tower}{conv}"


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


def _units(abstract: dict[str, Any]) -> list[str]:
    """Paths of the units: convolution, batch norm, ReLU."""
    leaves = tree_paths(abstract)
    return [path.removesuffix("/var") for path in leaves if path.endswith("/var")]


def _read_graph(path: pathlib.Path) -> dict[str, Lazy]:
    """The trained constants of a frozen graph by name.

    Raises:
      DataError: not a graph, one larger than `MAX_GRAPH_BYTES`, or a damaged constant.
    """
    # Here, because it loads torch where that is installed, which takes seconds.
    from tensorboardX.proto import graph_pb2, types_pb2

    try:
        if path.stat().st_size > MAX_GRAPH_BYTES:
            raise errors.DataError(f"{path} is larger than {MAX_GRAPH_BYTES} bytes")
        data = path.read_bytes()
        graph = graph_pb2.GraphDef.FromString(data)
    except OSError as error:
        raise errors.DataError(f"cannot read {path}: {error.strerror or error}") from error
    except google.protobuf.message.DecodeError as error:
        what = files.mistaken(data[:512])
        why = f"it is {what}" if what else error
        raise errors.DataError(f"{path} is not a TensorFlow graph: {why}") from error
    found, unscaled = {}, set()
    for node in graph.node:
        # This operation always has a gamma as input, and an option whether it is applied.
        normalises = node.op == "BatchNormWithGlobalNormalization" and len(node.input) == 5
        if normalises and not node.attr["scale_after_normalization"].b:
            unscaled.add(node.input[4].removesuffix(":0"))
        # Scalars and integers are constants of the graph's arithmetic: shapes, axes, (x - 128)/128.
        tensor = node.attr["value"].tensor if node.op == "Const" else None
        if tensor is not None and tensor.dtype == types_pb2.DT_FLOAT and tensor.tensor_shape.dim:
            found[node.name] = _constant(path, node.name, tensor)
    for name in unscaled & found.keys():
        found[name] = found[name].map(np.ones_like)
    return found


def _constant(path: pathlib.Path, name: str, tensor: Any) -> Lazy:
    """A float32 constant: raw little-endian bytes, or values of which the last is repeated."""
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
    count = math.prod(shape)
    raw, values = tensor.tensor_content, tensor.float_val
    whole = len(raw) == 4 * count if raw else 1 <= len(values) <= count
    if min(shape) < 0 or 4 * count > MAX_GRAPH_BYTES or not whole:
        raise errors.DataError(f"{path} is damaged: constant {name!r} is not {list(shape)}")

    def read() -> np.ndarray:
        if raw:
            return np.frombuffer(raw, "<f4").astype(np.float32).reshape(shape)
        given = np.array(values, np.float32)
        return np.pad(given, (0, count - given.size), "edge").reshape(shape)

    return Lazy(shape, np.float32, read)
