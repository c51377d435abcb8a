"""How other people's tensors become ours, and back.

A format is a list of rules, one for each leaf of a part's parameters: where the leaf is in our
tree, which of their tensors holds it, and the transform between the two memory layouts. `take`
applies rules to a checkpoint, strictly: every one of their tensors is used, every leaf of ours is
filled, every shape is the one the architecture asks for. `give` applies them backwards. Both are
lazy: nothing is read here.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from unclip import errors
from unclip.files.tensors import Lazy
from unclip.runtime.sharding import nest, tree_paths

Shape = tuple[int, ...]
# Modules that torch puts around others while it compiles, shards or recomputes them.
_WRAPPERS = {
    "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module",
}  # fmt: skip
# What a checkpoint of a training holds beside the networks.
_TRAINING = (
    "optimizer", "optimizers", "optimizer_states", "optimizer_state_dict", "scaler", "scheduler",
    "lr_scheduler", "lr_schedulers", "callbacks", "loops",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of memory layout: their array -> ours, and back where that exists.

    Attributes:
      read: their array -> ours.
      write: our array -> theirs; None where several of ours share one of theirs.
      parts: how many leaves of ours the tensor of theirs is divided among.
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray] | None
    parts: int = 1


@dataclasses.dataclass(frozen=True)
class Rule:
    """`ours` is a path in the part's parameters ("vision/patch/kernel"), `theirs` a tensor name."""

    ours: str
    theirs: str
    transform: Transform


class Mismatch(errors.ConfigError):
    """A checkpoint of another architecture than expected; the table lists the tensors."""


COPY = Transform(lambda a: a, lambda a: a)
LINEAR = Transform(lambda a: a.T, lambda a: a.T)  # [out, in] <-> [in, out]
# [out, in, H, W] <-> [H, W, in, out]
CONV = Transform(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))


def conv1x1(spatial: int) -> Transform:
    """[out, in, 1, …] with `spatial` ones <-> [in, out]."""
    ones = (1,) * spatial

    def read(a):
        if a.shape[2:] != ones:
            raise ValueError(f"expected [out, in{', 1' * spatial}]")
        return a.reshape(a.shape[:2]).T

    return Transform(read, lambda a: a.T.reshape(a.shape[::-1] + ones))


def leading(ones: int) -> Transform:
    """[1, …, 1, *shape] with `ones` ones <-> [*shape]."""

    def read(a):
        if a.shape[:ones] != (1,) * ones:
            raise ValueError(f"expected {ones} leading axes of length 1")
        return a.reshape(a.shape[ones:])

    return Transform(read, lambda a: a.reshape((1,) * ones + a.shape))


def rows(part: int, parts: int, then: Transform = COPY, chunk: int | None = None) -> Transform:
    """One of `parts` equal groups of rows of a fused tensor, then another transform.

    Args:
      chunk: None takes rows [part n/parts, (part+1) n/parts); a number takes them interleaved:
        groups of `chunk` rows follow one another as part 0, 1, …, parts-1, 0, 1, … (q, k, v fused
        per head, `chunk` being the head's width).
    """

    def read(a):
        each = a.shape[0] // parts if chunk is None else chunk
        if each == 0 or a.shape[0] % (each * parts):
            raise ValueError(f"expected a multiple of {each * parts} rows")
        groups = a.reshape(-1, parts, each, *a.shape[1:])[:, part]
        return then.read(groups.reshape(-1, *a.shape[1:]))

    return Transform(read, None, parts)


def dense(ours: str, theirs: str, *, bias: bool = True) -> list[Rule]:
    """The rules of a Dense: kernel [in, out] from weight [out, in], and bias."""
    rules = [Rule(f"{ours}/kernel", f"{theirs}.weight", LINEAR)]
    return rules + [Rule(f"{ours}/bias", f"{theirs}.bias", COPY)] * bias


def norm(ours: str, theirs: str) -> list[Rule]:
    """The rules of a layer or group norm: scale from weight, and bias."""
    return [
        Rule(f"{ours}/scale", f"{theirs}.weight", COPY),
        Rule(f"{ours}/bias", f"{theirs}.bias", COPY),
    ]


def conv(ours: str, theirs: str, *, bias: bool = True) -> list[Rule]:
    """The rules of a convolution: kernel [H, W, in, out] from weight [out, in, H, W], and bias."""
    rules = [Rule(f"{ours}/kernel", f"{theirs}.weight", CONV)]
    return rules + [Rule(f"{ours}/bias", f"{theirs}.bias", COPY)] * bias


def fused_dense(
    ours: Iterable[str], theirs: str, *, then: Transform = LINEAR, chunk: int | None = None
) -> list[Rule]:
    """The rules of Denses whose weights (and biases) are stored as one; `rows` explains chunk.

    Args:
      ours: the Denses, in the order their rows are stored.
      then: transform applied to the rows of each weight once they are separated.
    """
    names, rules = list(ours), []
    for part, name in enumerate(names):
        weight = rows(part, len(names), then, chunk)
        bias = rows(part, len(names), COPY, chunk)
        rules += [
            Rule(f"{name}/kernel", f"{theirs}.weight", weight),
            Rule(f"{name}/bias", f"{theirs}.bias", bias),
        ]
    return rules


def take(
    rules: Iterable[Rule],
    source: Mapping[str, Lazy],
    abstract: Mapping[str, Any],
    *,
    what: str,
    ignore: Iterable[str] = (),
    constants: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Our parameters from their tensors, lazily and strictly.

    Args:
      rules: one for each leaf of `abstract`.
      source: their tensors.
      abstract: nested dict of shapes, `jax.eval_shape(init)`.
      what: names the checkpoint in messages.
      ignore: names of theirs that are not trained (buffers) and may be present or not.
      constants: leaves of ours, by path, that this format does not store.

    Returns:
      Nested dict of `Lazy`, in their dtypes.

    Raises:
      Mismatch: tensors that are missing, extra or of another shape, as a table.
    """
    wanted = tree_paths(abstract)
    constants = dict(constants or {})
    by_path = {rule.ours: rule for rule in rules if rule.ours in wanted}
    missing, shapes, out = [], [], {}
    used: dict[str, int] = {}
    for path, leaf in wanted.items():
        if path in constants:
            value = np.asarray(constants[path])
            out[path] = Lazy(value.shape, value.dtype, lambda value=value: value)
            continue
        if path not in by_path:
            raise AssertionError(f"{what}: no rule for {path}")
        rule = by_path[path]
        if rule.theirs not in source:
            missing.append((rule.theirs, f"{path} {list(leaf.shape)}"))
            continue
        tensor = source[rule.theirs]
        used[rule.theirs] = used.get(rule.theirs, 0) + 1
        shape = _shape(rule.transform, tensor.shape)
        if shape != tuple(leaf.shape):
            as_ours = "of no use" if shape is None else f"{list(shape)} as ours"
            expected = f"{path} {list(leaf.shape)}"
            shapes.append((f"{rule.theirs} {list(tensor.shape)}, {as_ours}", expected))
            continue
        out[path] = tensor.map(rule.transform.read, shape)
    parts = {rule.theirs: rule.transform.parts for rule in by_path.values()}
    for name, count in used.items():
        if count != parts[name]:
            raise AssertionError(f"{what}: {name} feeds {count} of {parts[name]} leaves")
    unused = source.keys() - used.keys() - set(ignore)
    extra = [(f"{name} {list(source[name].shape)}", "") for name in sorted(unused)]
    if missing or shapes or extra:
        raise Mismatch(
            f"{what}: {len(missing)} tensors missing, {len(extra)} not expected, {len(shapes)} of "
            "another shape",
            _table({"missing": missing, "extra": extra, "shape": shapes}),
        )
    return nest(out)


def give(rules: Iterable[Rule], params: Mapping[str, Any]) -> dict[str, Lazy]:
    """Their tensors from our parameters (arrays or `Lazy`), lazily.

    Raises:
      Mismatch: a leaf that no rule names.
    """
    by_path = {rule.ours: rule for rule in rules}
    out = {}
    for path, leaf in tree_paths(params).items():
        if path not in by_path:
            raise Mismatch(f"{path} {list(leaf.shape)} has no place in the other format")
        rule = by_path[path]
        tensor = leaf if isinstance(leaf, Lazy) else _lazy(leaf)
        shape = np.shape(rule.transform.write(_hollow(tensor.shape)))
        out[rule.theirs] = tensor.map(rule.transform.write, shape)
    return out


def prefixed(source: Mapping[str, Lazy], prefix: str) -> dict[str, Lazy]:
    """The tensors whose name starts with `prefix`, without it."""
    return {n.removeprefix(prefix): t for n, t in source.items() if n.startswith(prefix)}


def unwrapped(source: Mapping[str, Lazy], marks: Iterable[str], what: str) -> dict[str, Lazy]:
    """The tensors of a network under its own names, whatever a training put before them.

    Compilers and data parallelism add segments (`_orig_mod.`, `module.`), a model that holds the
    network adds the name it has there (`model.`, `backbone.`), a checkpoint its fields. The prefix
    is what stands before a tensor that every such network has. States of optimisers are left out;
    other tensors beside the network stay, for `take` to name.

    Args:
      marks: names of tensors of the bare network; the first that is found counts.
      what: names the file in messages.

    Raises:
      ConfigError: several such networks in one file, or two tensors of one name.
    """
    plain: dict[str, Lazy] = {}
    for name, tensor in source.items():
        short = ".".join(word for word in name.split(".") if word not in _WRAPPERS)
        if short in plain:
            raise errors.ConfigError(f"{what} holds {short} twice, once as {name}")
        plain[short] = tensor
    marks, states = list(marks), tuple(f"{field}." for field in _TRAINING)
    if any(mark in plain for mark in marks):
        return {name: tensor for name, tensor in plain.items() if not name.startswith(states)}
    for mark in marks:
        prefixes = [name.removesuffix(mark) for name in plain if name.endswith(f".{mark}")]
        if len(prefixes) > 1:
            raise errors.ConfigError(
                f"{what} holds {len(prefixes)} networks, below {', '.join(map(repr, prefixes))}; "
                "expected one: save it alone"
            )
        for prefix in prefixes:
            beside = {
                name: tensor
                for name, tensor in plain.items()
                if not name.startswith((prefix, *states))
            }
            return beside | prefixed(plain, prefix)
    return plain


def _lazy(leaf: Any) -> Lazy:
    return Lazy(leaf.shape, leaf.dtype, lambda: np.asarray(leaf))


def _hollow(shape: Shape) -> np.ndarray:
    """An array of a shape that uses no memory."""
    return np.broadcast_to(np.zeros((), np.uint8), shape)


def _shape(transform: Transform, shape: Shape) -> Shape | None:
    """The shape that a transform makes of a shape; None where it does not apply."""
    try:
        return tuple(transform.read(_hollow(shape)).shape)
    except (ValueError, IndexError):
        return None


def _table(kinds: Mapping[str, list[tuple[str, str]]], most: int = 40) -> str:
    lines = []
    for kind, pairs in kinds.items():
        for theirs, ours in pairs[:most]:
            lines.append(f"  {kind:<8} {theirs}" + (f"  ->  {ours}" if ours else ""))
        if len(pairs) > most:
            lines.append(f"  {kind:<8} … and {len(pairs) - most} more")
    return "\n".join(lines)
