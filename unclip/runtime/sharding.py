"""Where every array lives: the mesh, rules from parameter paths to partition specs, and batches.

One mesh with axes `data`, `fsdp` and `tensor` serves every stage, and layouts are chosen from
outside the models by path patterns.

A path is the names on the way to a leaf joined with "/", e.g. "params/unet/down_0/res_0/kernel".
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unclip.errors import ConfigError, unknown

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
FSDP_MIN_SIZE = 2**16  # elements; below it gathering costs more than the memory saved

# (pattern, spec) or (pattern, spec, "optional"). A spec is "replicate", "fsdp" (the largest
# dimension that the fsdp axis divides) or a tuple of mesh axes; a leading ... leaves the
# dimensions before it whole, so one rule serves a layer and a folded stack of layers.
Rule = tuple
Rules = Sequence[Rule]

DATA: Rules = ((".", "replicate"),)
FSDP: Rules = ((".", "fsdp"),)
# Megatron's split of a transformer: q, k, v and the MLP's first layer by columns, the layers after
# them by rows, so that a block needs two reductions. A U-Net's convolutions are not split, and its
# stages refuse it (docs/compile.md).
TENSOR: Rules = (
    (r"/(q|k|v|qkv|context_k|context_v|fc|fc1|c_fc)/kernel$", (..., "fsdp", "tensor"), "optional"),
    (r"/(q|k|v|qkv|context_k|context_v|fc|fc1|c_fc)/bias$", (..., "tensor"), "optional"),
    (r"/(out|proj|out_proj|c_proj|fc2)/kernel$", (..., "tensor", "fsdp"), "optional"),
    (".", "fsdp"),
)
PRESETS: dict[str, Rules] = {"data": DATA, "fsdp": FSDP, "tensor": TENSOR}


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def tree_paths(tree: Any) -> dict[str, Any]:
    """Every leaf of a pytree by its "/"-joined path, in the tree's own order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_name(key) for key in path): leaf for path, leaf in leaves}


def nest(paths: Mapping[str, Any]) -> dict[str, Any]:
    """Plain nested dicts from {path: leaf}; the inverse of `tree_paths` on nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in paths.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def near_paths(pattern: str, paths: Sequence[str], count: int = 3) -> list[str]:
    """The paths that look most like what a regular expression was meant to match."""
    plain = re.sub(r"[\\^$.*+?()\[\]|]+", "/", pattern).strip("/")
    ranked = sorted(paths, key=lambda p: -difflib.SequenceMatcher(None, plain, p).ratio())
    return ranked[:count]


def compile_pattern(pattern: str) -> re.Pattern:
    """A compiled path pattern (found anywhere in a path).

    Raises:
      ConfigError: it is not a regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"path pattern {pattern!r} is not a regular expression: {error}"
        ) from error


def make_mesh(spec: Mapping[str, int] | None = None, devices: Sequence | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over every device of the job.

    On several TPU slices `data` runs over the network between them and the rest stays inside.

    Args:
      spec: {axis: size}; an axis left out has size 1, and -1 (at most once) takes the rest.
        Default {"data": -1}.
      devices: default `jax.devices()`.

    Returns:
      A Mesh whose axes are all `AxisType.Auto`.

    Raises:
      ConfigError: an unknown axis, or sizes that do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    spec = dict({"data": -1} if spec is None else spec)
    for axis in spec:
        if axis not in AXES:
            raise unknown("mesh axis", axis, AXES)
    sizes = [int(spec.get(axis, 1)) for axis in AXES]
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(f"mesh {shown}: sizes are positive, and one of them may be -1 (the rest)")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    elif -1 in sizes or known != len(devices):
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise ConfigError(
            f"mesh {shown} does not fit {len(devices)} devices: the sizes must "
            f"multiply to {len(devices)}, each one of {divisors}, or one be -1"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if sizes[0] % slices:
            raise ConfigError(
                f"mesh axis data={sizes[0]} must be a multiple of the {slices} "
                "slices: only data parallelism crosses the network between slices"
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // slices, *sizes[1:]), (slices, 1, 1), devices=devices
        )
        mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    else:
        mesh = jax.make_mesh(
            tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
        )
    for row in mesh.devices.reshape(-1, sizes[2]):
        if len({device.process_index for device in row}) > 1:
            raise ConfigError(
                f"mesh axis tensor={sizes[2]} would span processes; it may be at "
                "most the number of devices of one process, so that every process "
                "feeds its own rows of the batch"
            )
    return mesh


def _fsdp(shape: tuple[int, ...], size: int, min_size: int) -> PartitionSpec:
    fits = [d for d, n in enumerate(shape) if n % size == 0 and n >= size]
    if size == 1 or math.prod(shape) < min_size or not fits:
        return PartitionSpec()
    # Of equally large dimensions the last one: `out` of folded layers [layers, in, out] with square
    # kernels.
    best = max(fits, key=lambda d: (shape[d], d))
    return PartitionSpec(*([None] * best), "fsdp")


def _resolve(
    path: str, shape: tuple[int, ...], spec: Any, mesh: Mesh, min_size: int
) -> PartitionSpec:
    if spec == "replicate":
        return PartitionSpec()
    if spec == "fsdp":
        return _fsdp(shape, mesh.shape["fsdp"], min_size)
    if isinstance(spec, str):
        raise unknown("sharding rule", spec, ("replicate", "fsdp"))
    spec = tuple(spec)
    if spec[:1] == (...,):
        spec = (None,) * (len(shape) - len(spec) + 1) + spec[1:]
    if len(spec) > len(shape):
        raise ConfigError(f"sharding rule {spec} has {len(spec)} dimensions, but {path} is {shape}")
    for size, names in zip(shape, spec):
        names = () if names is None else (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            if name not in mesh.shape:
                raise unknown("mesh axis", name, mesh.axis_names)
        ways = math.prod(mesh.shape[name] for name in names)
        if size % ways:
            raise ConfigError(
                f"{path} {shape}: dimension {size} cannot be split {ways} ways over "
                f"mesh axes {'×'.join(names)}; change the mesh or the rule"
            )
    return PartitionSpec(*spec)


def _check_rules(rules: Rules, paths: Sequence[str]) -> list[tuple[re.Pattern, Any]]:
    compiled = []
    for rule in rules:
        if len(rule) not in (2, 3) or (len(rule) == 3 and rule[2] != "optional"):
            raise ConfigError(
                f"sharding rule {rule!r}: expected (pattern, spec) or (pattern, spec, 'optional')"
            )
        pattern = compile_pattern(rule[0])
        if len(rule) == 2 and paths and not any(pattern.search(path) for path in paths):
            raise ConfigError(
                f"sharding pattern {rule[0]!r} matches no parameter; near it: "
                + ", ".join(near_paths(rule[0], paths))
            )
        compiled.append((pattern, rule[1]))
    return compiled


def shardings(
    abstract_tree: Any, mesh: Mesh, rules: Rules = DATA, *, min_size: int = FSDP_MIN_SIZE
) -> Any:
    """A NamedSharding for every leaf of a state, for `jit(init, out_shardings=…)`.

    The first rule found in a path decides. In a tree with a "params" entry the rules are about the
    parameters: leaves elsewhere ("ema", "opt") whose path ends like a parameter's and whose shape
    is equal inherit its spec; other leaves of "opt" (counters, factored moments) are replicated.
    Scalars are always replicated.

    Args:
      abstract_tree: arrays or ShapeDtypeStructs.
      mesh: from `make_mesh`.
      rules: (pattern, spec) pairs; patterns are regular expressions found anywhere in the path.
      min_size: elements below which "fsdp" replicates.

    Raises:
      ConfigError: a pattern matches nothing, a leaf is matched by nothing, or a dimension does not
        divide.
    """
    leaves = tree_paths(abstract_tree)
    whole = not any(path.startswith("params/") for path in leaves)
    ruled = [p for p in leaves if whole or p.startswith("params/")]
    compiled = _check_rules(rules, ruled)

    def by_rule(path: str, shape: tuple[int, ...]) -> PartitionSpec:
        for pattern, spec in compiled:
            if pattern.search(path):
                return PartitionSpec() if not shape else _resolve(path, shape, spec, mesh, min_size)
        raise ConfigError(
            f"no sharding rule matches {path} {shape}; "
            "end the rules with ('.', 'replicate') or ('.', 'fsdp')"
        )

    specs = {path: by_rule(path, leaves[path].shape) for path in ruled}
    parameters = (
        {}
        if whole
        else {path.removeprefix("params/"): (leaves[path].shape, specs[path]) for path in ruled}
    )
    for path, leaf in leaves.items():
        if path not in specs:
            parts = path.split("/")
            tails = ("/".join(parts[i:]) for i in range(1, len(parts)))
            found = next((parameters[t] for t in tails if t in parameters), None)
            if not leaf.shape:
                specs[path] = PartitionSpec()
            elif found and found[0] == leaf.shape:
                specs[path] = found[1]
            else:
                specs[path] = PartitionSpec() if parts[0] == "opt" else by_rule(path, leaf.shape)
    structure = jax.tree.structure(abstract_tree)
    return jax.tree.unflatten(structure, [NamedSharding(mesh, specs[path]) for path in leaves])


def abstract(tree: Any, tree_shardings: Any) -> Any:
    """ShapeDtypeStructs that carry their shardings, what a restore or an AOT compile asks for."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        tree_shardings,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole: scalars, keys, metrics."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch [B, …]: rows over data and fsdp together."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from the rows this process holds.

    Args:
      batch: host arrays [B / process_count, …], the same shapes on every process.
      mesh: from `make_mesh`.

    Returns:
      The same names, arrays [B, …] sharded by `batch_sharding`.

    Raises:
      ConfigError: the rows do not divide over this process's share of the mesh.
    """
    where = batch_sharding(mesh)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    local = max(1, ways * len(mesh.local_devices) // mesh.devices.size)
    for name, value in batch.items():
        if np.ndim(value) == 0 or len(value) % local:
            raise ConfigError(
                f"batch entry {name!r} has shape {np.shape(value)}: its rows must "
                f"be a multiple of the {local} devices (data×fsdp) of this process"
            )
    return {
        name: jax.make_array_from_process_local_data(where, np.asarray(value))
        for name, value in batch.items()
    }


class Row(NamedTuple):
    """One line of `describe`."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes_per_device: int


def describe(abstract_tree: Any, tree_shardings: Any) -> list[Row]:
    """The memory of every leaf on one device.

    Args:
      abstract_tree: arrays or ShapeDtypeStructs.
      tree_shardings: the same structure, from `shardings`.
    """
    where = tree_paths(tree_shardings)
    rows = []
    for path, leaf in tree_paths(abstract_tree).items():
        shard = where[path].shard_shape(leaf.shape)
        spec = ", ".join(
            "×".join(s) if isinstance(s, tuple) else str(s or "·") for s in where[path].spec
        )
        rows.append(
            Row(
                path,
                tuple(leaf.shape),
                str(leaf.dtype),
                spec or "replicated",
                math.prod(shard) * leaf.dtype.itemsize,
            )
        )
    return rows
