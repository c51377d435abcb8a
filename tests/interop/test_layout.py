"""Rules between tensor layouts: against hand-written permutations, and strictness."""

import jax
import numpy as np
import pytest

from unclip import errors
from unclip.files.tensors import Lazy
from unclip.interop import layout
from unclip.runtime.sharding import nest


def _lazy(array):
    return Lazy(array.shape, array.dtype, lambda: array)


def _random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def _abstract(**shapes):
    tree = {
        path.replace("__", "/"): jax.ShapeDtypeStruct(s, np.float32) for path, s in shapes.items()
    }
    return nest(tree)


@pytest.mark.parametrize(
    ("transform", "shape", "index"),
    [
        (layout.COPY, (3,), lambda i: (i,)),
        (layout.LINEAR, (4, 3), lambda i, o: (o, i)),
        (layout.CONV, (4, 3, 2, 5), lambda h, w, i, o: (o, i, h, w)),
        (layout.conv1x1(1), (4, 3, 1), lambda i, o: (o, i, 0)),
        (layout.conv1x1(2), (4, 3, 1, 1), lambda i, o: (o, i, 0, 0)),
        (layout.leading(2), (1, 1, 4, 3), lambda a, b: (0, 0, a, b)),
    ],
)
def test_each_transform_moves_every_value_where_it_belongs_and_back(transform, shape, index):
    theirs = _random(*shape)
    ours = transform.read(theirs)
    for place in np.ndindex(ours.shape):
        assert ours[place] == theirs[index(*place)]
    assert ours.size == theirs.size
    np.testing.assert_array_equal(transform.write(ours), theirs)


def test_fused_rows_side_by_side_and_interleaved_by_head():
    q, k, v = (_random(6, 4) + n for n in range(3))
    beside = np.concatenate([q, k, v])
    heads = np.concatenate([m[2 * h : 2 * h + 2] for h in range(3) for m in (q, k, v)])
    for part, want in enumerate((q, k, v)):
        np.testing.assert_array_equal(layout.rows(part, 3).read(beside), want)
        np.testing.assert_array_equal(layout.rows(part, 3, chunk=2).read(heads), want)
        turned = layout.rows(part, 3, layout.LINEAR, chunk=2).read(heads)
        np.testing.assert_array_equal(turned, want.T)


def _model():
    rules = [
        *layout.dense("a", "first"),
        *layout.norm("n", "ln"),
        *layout.conv("c", "conv", bias=False),
        *layout.fused_dense(["q", "k", "v"], "qkv"),
    ]
    source = {
        "first.weight": _random(2, 3),
        "first.bias": _random(2),
        "ln.weight": _random(5),
        "ln.bias": _random(5) + 1,
        "conv.weight": _random(4, 3, 1, 2),
        "qkv.weight": _random(6, 3),
        "qkv.bias": _random(6),
    }
    abstract = _abstract(
        a__kernel=(3, 2), a__bias=(2,), n__scale=(5,), n__bias=(5,), c__kernel=(1, 2, 3, 4),
        **{f"{m}__kernel": (3, 2) for m in "qkv"}, **{f"{m}__bias": (2,) for m in "qkv"},
    )  # fmt: skip
    return rules, source, abstract


def test_take_reads_every_leaf_from_its_tensor():
    rules, source, abstract = _model()
    taken = layout.take(rules, {k: _lazy(v) for k, v in source.items()}, abstract, what="x")
    assert jax.tree.structure(jax.tree.map(np.asarray, taken)) == jax.tree.structure(abstract)
    np.testing.assert_array_equal(taken["a"]["kernel"], source["first.weight"].T)
    np.testing.assert_array_equal(taken["n"]["scale"], source["ln.weight"])
    np.testing.assert_array_equal(taken["k"]["kernel"], source["qkv.weight"][2:4].T)
    np.testing.assert_array_equal(taken["v"]["bias"], source["qkv.bias"][4:])


def test_give_inverts_take():
    rules, source, abstract = _model()
    rules = [r for r in rules if r.theirs[:3] != "qkv"]
    source = {k: v for k, v in source.items() if k[:3] != "qkv"}
    abstract = {k: v for k, v in abstract.items() if k not in "qkv"}
    taken = layout.take(rules, {k: _lazy(v) for k, v in source.items()}, abstract, what="x")
    given = layout.give(rules, taken)
    assert given.keys() == source.keys()
    for name, array in source.items():
        assert given[name].shape == array.shape
        np.testing.assert_array_equal(given[name].read(), array)
    with pytest.raises(layout.Mismatch, match=r"strange \[2\]"):
        layout.give(rules, {"strange": np.zeros(2)})


def test_every_difference_is_in_the_table():
    rules, source, abstract = _model()
    del source["ln.bias"]
    source["surplus"] = _random(7)
    source["first.weight"] = _random(2, 4)
    source["buffer"] = _random(1)
    lazy = {k: _lazy(v) for k, v in source.items()}
    with pytest.raises(layout.Mismatch) as caught:
        layout.take(rules, lazy, abstract, what="model.bin", ignore=["buffer", "absent"])
    text = str(caught.value)
    assert caught.value.exit_code == 78
    assert text.startswith("model.bin: 1 tensors missing, 1 not expected, 1 of another shape\n")
    assert "missing  ln.bias  ->  n/bias [5]" in text
    assert "extra    surplus [7]" in text
    assert "shape    first.weight [2, 4], [4, 2] as ours  ->  a/kernel [3, 2]" in text
    assert "buffer" not in text


def test_nothing_is_read_before_it_is_wanted():
    rules, source, abstract = _model()

    def never():
        raise AssertionError("read too early")

    lazy = {k: Lazy(v.shape, v.dtype, never) for k, v in source.items()}
    taken = layout.take(rules, lazy, abstract, what="x")
    with pytest.raises(AssertionError, match="read too early"):
        taken["a"]["kernel"].read()


def test_what_a_training_puts_before_names_is_taken_off():
    tensor = _lazy(_random(2))
    names = lambda *given: sorted(layout.unwrapped(dict.fromkeys(given, tensor), ["a.w"], "x"))
    assert names("a.w", "b.a.w", "optimizer_states.0.m") == ["a.w", "b.a.w"]
    assert names("m.a.w", "m.b._orig_mod.w") == ["a.w", "b.w"]
    assert names("_orig_mod.a._fsdp_wrapped_module.w") == ["a.w"]
    # Optimisers' states go, other tensors stay for `take` to name.
    assert names("x.y.a.w", "optimizer.state.0.exp_avg", "loss.w") == ["a.w", "loss.w"]
    assert names("other.w") == ["other.w"]
    with pytest.raises(errors.ConfigError, match=r"x holds 2 networks, below 'm\.', 'ema\.'"):
        names("m.a.w", "ema.a.w")
    with pytest.raises(errors.ConfigError, match=r"x holds a\.w twice"):
        names("a.w", "_orig_mod.a.w")


def test_constants_fill_leaves_the_format_does_not_have():
    rules, abstract = layout.dense("a", "first"), _abstract(a__kernel=(3, 2), a__bias=(2,), s=())
    source = {"first.weight": _lazy(_random(2, 3)), "first.bias": _lazy(_random(2))}
    taken = layout.take(
        rules, source, abstract, what="x", constants={"s": np.array(4.6, np.float32)}
    )
    assert taken["s"].read() == np.float32(4.6)
