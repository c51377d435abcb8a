"""Meshes, rules from paths to specs, and batches, on 8 simulated devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from unclip.errors import ConfigError
from unclip.models import transformer, unet
from unclip.runtime import hlo, optim, sharding


@pytest.fixture(scope="module")
def params():
    leaf = jax.ShapeDtypeStruct
    return {
        "unet": {
            "conv": {
                "kernel": leaf((3, 3, 64, 128), jnp.float32),
                "bias": leaf((128,), jnp.float32),
            },
            "attn": {
                "q": {"kernel": leaf((4, 128, 128), jnp.float32)},
                "out": {"kernel": leaf((128, 256), jnp.float32)},
            },
        },
        "odd": {"kernel": leaf((255, 257), jnp.float32)},
    }


def state_of(params):
    tx, _ = optim.make_optimizer(
        params, learning_rate=1e-3, total_steps=10, weight_decay=0.1, freeze=("odd",)
    )
    return jax.eval_shape(
        lambda p: {
            "params": p,
            "ema": optim.ema_init(p),
            "opt": tx.init(p),
            "step": jnp.zeros((), jnp.int32),
        },
        params,
    )


def specs(tree):
    return {path: s.spec for path, s in sharding.tree_paths(tree).items()}


def test_paths_and_nest_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    paths = sharding.tree_paths(tree)
    assert paths == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert sharding.nest(paths) == tree


def test_paths_name_containers_of_an_optimiser(params):
    paths = sharding.tree_paths(state_of(params)["opt"])
    assert "inner_states/train/inner_state/1/mu/unet/conv/kernel" in paths
    assert not any("odd" in path for path in paths), "frozen parameters must have no moments"


def test_mesh_sizes_and_axis_types():
    mesh = sharding.make_mesh({"data": -1, "fsdp": 2})
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert sharding.make_mesh({"fsdp": 2}, jax.devices()[:2]).devices.size == 2


@pytest.mark.parametrize(
    "spec, words",
    [
        ({"data": 3}, ["8 devices", "data=3"]),
        ({"data": -1, "fsdp": 3}, ["8 devices", "fsdp=3"]),
        ({"data": -1, "fsdp": -1}, ["-1"]),
        ({"data": 0}, ["positive"]),
        ({"fdsp": 8}, ["'fdsp'", "did you mean 'fsdp'"]),
    ],
)
def test_mesh_errors_say_what_fits(spec, words):
    with pytest.raises(ConfigError) as error:
        sharding.make_mesh(spec)
    assert all(word in str(error.value) for word in words)


class Slice:
    """A substitute for a TPU core of a multi-slice pod."""

    platform, device_kind, process_index = "cpu", "fake", 0

    def __init__(self, number, slice_index):
        self.id, self.slice_index = number, slice_index


def test_data_axis_crosses_slices_and_nothing_else_does():
    devices = [Slice(i, i // 4) for i in range(8)]
    mesh = sharding.make_mesh({"data": -1, "fsdp": 4}, devices)
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(ConfigError, match="2 slices"):
        sharding.make_mesh({"data": 1, "fsdp": 8}, devices)


def test_fsdp_takes_the_largest_divisible_dimension(params):
    mesh = sharding.make_mesh({"fsdp": 8})
    got = specs(sharding.shardings({"params": params}, mesh, sharding.FSDP))
    assert got["params/unet/conv/kernel"] == P(None, None, None, "fsdp")
    assert got["params/unet/attn/q/kernel"] == P(None, None, "fsdp"), "not the stacked axis"
    assert got["params/unet/conv/bias"] == P(), "small leaves stay whole"
    assert got["params/odd/kernel"] == P(), "nothing divides"
    small = sharding.shardings({"params": params}, mesh, sharding.FSDP, min_size=1)
    assert specs(small)["params/unet/conv/bias"] == P("fsdp")


def test_first_match_wins_and_ellipsis_aligns_to_the_right(params):
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
    got = specs(sharding.shardings({"params": params}, mesh, sharding.TENSOR))
    assert got["params/unet/attn/q/kernel"] == P(None, "fsdp", "tensor")
    assert got["params/unet/attn/out/kernel"] == P("tensor", "fsdp")
    first = (("conv", "replicate"), (".", "fsdp"))
    assert (
        specs(sharding.shardings({"params": params}, mesh, first))["params/unet/conv/kernel"] == P()
    )


def test_opt_and_ema_inherit_and_scalars_are_replicated(params):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    rules = (("attn/q", (..., "fsdp", None)), (".", "fsdp"))
    state = state_of(params)
    where = sharding.shardings(state, mesh, rules)
    assert jax.tree.structure(where) == jax.tree.structure(state)
    got = specs(where)
    wanted = P(None, "fsdp", None)
    for prefix in (
        "params",
        "ema",
        "opt/inner_states/train/inner_state/1/mu",
        "opt/inner_states/train/inner_state/1/nu",
    ):
        assert got[f"{prefix}/unet/attn/q/kernel"] == wanted
        assert got[f"{prefix}/unet/conv/kernel"] == P(None, None, None, "fsdp")
    assert got["step"] == P()
    assert got["opt/inner_states/train/inner_state/1/count"] == P()


def test_factored_moments_of_another_shape_are_replicated():
    params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    tx = optax.adafactor(1e-3)
    state = jax.eval_shape(lambda p: {"params": p, "opt": tx.init(p)}, params)
    got = specs(
        sharding.shardings(state, sharding.make_mesh({"fsdp": 8}), (("w$", (None, "fsdp")),))
    )
    rows = [path for path in got if "v_row" in path and path.endswith("/w")]
    assert rows and all(got[path] == P() for path in rows)


@pytest.mark.parametrize(
    "rules, words",
    [
        ((("unet/convv/kernel", "fsdp"), (".", "fsdp")), ["unet/convv", "params/unet/conv/kernel"]),
        ((("unet", "fsdp"),), ["params/odd/kernel", "no sharding rule"]),
        ((("odd", (None, "fsdp")), (".", "fsdp")), ["params/odd/kernel", "257"]),
        (((".", "fsfp"),), ["fsfp", "fsdp"]),
        ((("odd", ("modell",)), (".", "fsdp")), ["modell", "tensor"]),
        ((("(", "fsdp"),), ["regular expression"]),
        ((("bias", (None, "fsdp")), (".", "fsdp")), ["2 dimensions", "bias"]),
    ],
)
def test_rule_errors_name_the_rule_and_what_is_near(params, rules, words):
    mesh = sharding.make_mesh({"fsdp": 8})
    with pytest.raises(ConfigError) as error:
        sharding.shardings({"params": params}, mesh, rules)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_tree_without_params_follows_the_rules(params):
    got = specs(sharding.shardings(params, sharding.make_mesh({"fsdp": 8}), sharding.FSDP))
    assert got["unet/conv/kernel"] == P(None, None, None, "fsdp")


def test_batch_rows_are_split_over_data_and_fsdp_and_keep_their_order():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rows = np.arange(16, dtype=np.int32).reshape(8, 2)
    batch = sharding.put_batch({"tokens": rows}, mesh)
    np.testing.assert_array_equal(batch["tokens"], rows)
    assert batch["tokens"].sharding == sharding.batch_sharding(mesh)
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 2)}
    with pytest.raises(ConfigError, match="tokens"):
        sharding.put_batch({"tokens": rows[:6]}, mesh)


def test_describe_counts_what_a_device_really_holds(params):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    tree = {"params": params}
    where = sharding.shardings(tree, mesh, sharding.FSDP)
    arrays = jax.jit(
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree), out_shardings=where
    )()
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(arrays)
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    )
    rows = sharding.describe(tree, where)
    assert sum(row.bytes_per_device for row in rows) == held
    assert {row.path for row in rows} == set(sharding.tree_paths(tree))


def residual_block(mesh, rows, dtype):
    """(gradient of a residual block's loss, its parameters, its input), for a mesh or None."""
    style = unet.Style(64, True, "group", 8, 1e-5, 0.0, dtype, None, False, "xla")
    block = unet.ResBlock(style, 96)
    x = jax.random.normal(jax.random.key(0), (rows, 8, 8, 96))
    emb = jax.random.normal(jax.random.key(1), (rows, 16))
    reads = lambda emb: unet.Reads(emb, None, None, None)
    params = block.init(jax.random.key(2), x, reads(emb))["params"]
    params["conv_2"]["kernel"] = 0.02 * jnp.ones_like(params["conv_2"]["kernel"])
    if mesh is not None:
        where = sharding.shardings(params, mesh, sharding.FSDP)
        params = jax.tree.map(jax.device_put, params, where)
        x, emb = (jax.device_put(a, sharding.batch_sharding(mesh)) for a in (x, emb))
    apply = lambda p, x, emb: block.apply({"params": p}, x, reads(emb)).astype(jnp.float32)
    loss = lambda p, x, emb: jnp.mean(apply(p, x, emb) ** 2)
    return jax.jit(jax.grad(loss)), params, (x, emb)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_are_gathered_in_the_compute_type_and_rows_stay(dtype):
    """FSDP moves kernels and gradients, never pictures, and gives the gradients of one device."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1})
    gradient, params, inputs = residual_block(mesh, 16, dtype)
    compiled = gradient.lower(params, *inputs).compile()
    found = hlo.summarise(compiled.as_text()).collectives
    assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}
    kernels = 2 * 9 * 96 * 96  # of two convolutions; the time kernel is too small to be sharded
    assert found["all-gather"].bytes >= kernels * jnp.dtype(dtype).itemsize
    if dtype == jnp.float32:  # bfloat16 sums of another order differ by percents
        alone, whole, same = residual_block(None, 16, dtype)
        for ours, theirs in zip(
            jax.tree.leaves(compiled(params, *inputs)), jax.tree.leaves(alone(whole, *same))
        ):
            size = float(jnp.abs(theirs).max())
            np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=1e-4 * size)


def test_constraints_vanish_without_a_mesh_and_leave_a_tensor_axis_alone():
    x = jnp.ones((6, 4))
    assert transformer.keep_rows(x) is x
    kernel = jnp.ones((4, 4))
    assert transformer.gather_dtype(x, kernel, dtype=jnp.float32)[1] is kernel

    def lowered(spec, rows):
        mesh = sharding.make_mesh(spec)
        where = jax.sharding.NamedSharding(mesh, P(None, "fsdp"))
        a = jax.ShapeDtypeStruct((rows, 8), jnp.float32, sharding=sharding.replicated(mesh))
        w = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=where)
        layer = lambda a, w: transformer.keep_rows(
            jnp.matmul(*transformer.gather_dtype(a, w, dtype=jnp.float32))
        )
        return jax.jit(layer).lower(a, w).as_text().count("sharding_constraint")

    assert lowered({"data": 2, "fsdp": 4}, 16) == 2
    assert lowered({"data": 2, "fsdp": 4}, 12) == 1, "12 rows do not divide by 8"
    assert lowered({"fsdp": 4, "tensor": 2}, 16) == 1, "the kernel stays split"
    assert lowered({"data": 8}, 16) == 1, "nothing to gather"
