"""Checkpoints: bit equality across meshes, other models' refused, damage, locks, full disks."""

import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip.errors import ConfigError, DataError, Stopped
from unclip.files import lock
from unclip.runtime import checkpoint, optim, sharding, sums


def make_state(mesh, seed=0, width=16):
    rng = np.random.default_rng(seed)
    params = {
        "dense": {
            "kernel": rng.normal(size=(8, width)).astype(np.float32),
            "bias": rng.normal(size=width).astype(jnp.bfloat16),
        }
    }
    tx, _ = optim.make_optimizer(params, learning_rate=1e-3, total_steps=10)
    state = {
        "params": params,
        "ema": jax.tree.map(lambda p: p.astype(np.float32), params),
        "opt": jax.tree.map(np.asarray, tx.init(params)),
        "step": np.int32(seed),
    }
    where = sharding.shardings(state, mesh, sharding.FSDP, min_size=1)
    return jax.device_put(state, where), sharding.abstract(state, where)


@pytest.fixture(scope="module")
def mesh8():
    return sharding.make_mesh({"data": 2, "fsdp": 4})


@pytest.fixture(scope="module")
def saved(tmp_path_factory, mesh8):
    """A directory with steps 2 and 4, and their states."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    states = {}
    with checkpoint.Checkpointer(directory, save_every_steps=2) as checkpointer:
        for step in range(5):
            states[step], _ = make_state(mesh8, step)
            acted = checkpointer.save(step, states[step], 100 * step, {"config": {"lr": step / 3}})
            assert acted == (step in (2, 4))
    return directory, states


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    return tmp_path / "checkpoints", saved[1]


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_round_trip_is_bitwise_and_keeps_position_and_meta(saved, mesh8):
    directory, states = saved
    assert checkpoint.steps(directory) == [2, 4]
    assert not (directory / lock.CLAIM).exists(), "closing releases the directory"
    with checkpoint.Checkpointer(directory) as checkpointer:
        assert checkpointer.latest() == 4
        state, position, meta = checkpointer.restore(None, make_state(mesh8)[1])
        same_bits(state, states[4])
        assert state["params"]["dense"]["bias"].dtype == jnp.bfloat16 and int(state["step"]) == 4
        assert position == 400 and meta == {"config": {"lr": 4 / 3}}
        same_bits(checkpointer.restore(2, make_state(mesh8)[1])[0], states[2])


@pytest.mark.parametrize("spec, count", [({"data": 4}, 4), ({"fsdp": 2, "tensor": 1}, 2), ({}, 1)])
def test_restores_onto_other_meshes(saved, spec, count):
    mesh = sharding.make_mesh(spec, jax.devices()[:count])
    _, abstract = make_state(mesh)
    state, _, _ = checkpoint.load(saved[0], None, abstract)
    same_bits(state, saved[1][4])
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract)):
        assert leaf.sharding == wanted.sharding and len(leaf.sharding.device_set) == count


def test_dtypes_are_cast_and_shardings_may_be_left_out(saved):
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved[1][4])
    params["params"]["dense"]["kernel"] = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)
    state, _, _ = checkpoint.load(saved[0], 4, params)
    got = state["params"]["dense"]["kernel"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, saved[1][4]["params"]["dense"]["kernel"].astype(got.dtype))


def test_another_models_checkpoint_is_reported_leaf_by_leaf(saved, mesh8):
    _, abstract = make_state(mesh8, width=32)
    dense = abstract["params"].pop("dense")
    abstract["params"]["dense"] = {"kernel": dense["kernel"]}
    abstract["params"]["attn"] = {"q": dense["bias"]}
    with pytest.raises(ConfigError) as error:
        checkpoint.load(saved[0], None, abstract)
    text = str(error.value)
    assert "another model" in text
    assert "missing  params/attn/q (32,)" in text
    assert "extra    params/dense/bias (16,)" in text
    assert "shape    params/dense/kernel (8, 16), the model has (8, 32)" in text


def test_long_differences_are_cut_with_a_count():
    wanted = {f"params/{i:02}": np.zeros(1) for i in range(25)}
    lines = checkpoint.difference({}, wanted).splitlines()
    assert len(lines) == 11 and lines[-1].strip() == "… and 15 more"
    assert checkpoint.difference(wanted, wanted) == ""


def test_subtrees_load_without_knowing_the_rest(saved, mesh8):
    directory, states = saved
    tree = checkpoint.load_subtree(directory, ("ema",))
    assert set(tree) == {"ema"}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))
    same_bits(tree["ema"], states[4]["ema"])
    where = sharding.shardings({"params": states[2]["params"]}, mesh8, sharding.FSDP, min_size=1)
    both = checkpoint.load_subtree(directory, ("params", "ema/dense/bias"), 2, where)
    same_bits(both["params"], states[2]["params"])
    assert both["params"]["dense"]["kernel"].sharding == where["params"]["dense"]["kernel"]
    assert set(both["ema"]["dense"]) == {"bias"}
    half = checkpoint.load_subtree(directory, ("params",), dtype=jnp.bfloat16)
    assert half["params"]["dense"]["kernel"].dtype == jnp.bfloat16
    with pytest.raises(ConfigError, match=r"'emma'.*ema, opt, params, step"):
        checkpoint.load_subtree(directory, ("emma",))


def test_keep_and_keep_every(tmp_path, mesh8):
    state, _ = make_state(mesh8)
    with checkpoint.Checkpointer(tmp_path, 1, keep=1, keep_every=2) as checkpointer:
        for step in (1, 2, 3):
            assert checkpointer.save(step, state, 0)
        assert not checkpointer.save(3, state, 0, force=True), "the step is there already"
    assert checkpoint.steps(tmp_path) == [2, 3]
    assert sorted(p.stem for p in (tmp_path / "sums").glob("[0-9]*.json")) == ["2", "3"]


def test_incomplete_steps_are_ignored_and_their_numbers_free_again(copied, mesh8):
    directory, states = copied
    for step, lost in ((6, "commit_success.txt"), (8, "_CHECKPOINT_METADATA")):
        shutil.copytree(directory / "4", directory / str(step))
        (directory / str(step) / lost).unlink()
    (directory / "10").mkdir()
    (directory / "3" / "state").mkdir(parents=True)
    (directory / "12.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.steps(directory) == [2, 4]
    with checkpoint.Checkpointer(directory, 2, keep=9) as checkpointer:
        assert checkpointer.latest() == 4
        assert checkpointer.save(6, states[3], 1)
    assert checkpoint.steps(directory) == [2, 4, 6]
    left = {path.name.rsplit("-", 1)[0] for path in directory.iterdir()}
    assert left == {"2", "4", "6", "sums", "set-aside-6", "set-aside-8", "set-aside-10"}


def test_nothing_to_restore_is_said(tmp_path, copied):
    with pytest.raises(DataError, match="no complete checkpoint in"):
        checkpoint.load(tmp_path / "nowhere", None, {})
    with pytest.raises(DataError, match=r"step 3.*there: 2, 4"):
        checkpoint.load(copied[0], 3, {})


def biggest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_the_step_before_is_used(copied, mesh8, monkeypatch, damage, late):
    directory, states = copied
    victim = biggest(directory / "4" / "state")
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "truncate":
        victim.write_bytes(data[:-1])
    else:
        victim.unlink()
    with pytest.raises(DataError, match=f"4 is damaged: .*{victim.name}"):
        checkpoint.load(directory, 4, make_state(mesh8)[1])
    if late:  # as a file too large to be read before orbax sees the folder
        monkeypatch.setattr(sums, "SMALL_BYTES", 0)
    with checkpoint.Checkpointer(directory, 2) as checkpointer:
        state, position, _ = checkpointer.restore(None, make_state(mesh8)[1])
        same_bits(state, states[2])
        assert position == 200
        assert checkpointer.save(4, states[4], 400), "the number is free again"
    assert checkpoint.verify(directory, 4) > 3


def test_unwritable_directory_is_a_data_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Not a directory"):
        checkpoint.Checkpointer(tmp_path / "file" / "checkpoints")
    with pytest.raises(ConfigError, match="mount"):
        checkpoint.Checkpointer("gs://bucket/run")


def test_full_disk_is_named_and_loses_nothing(copied, mesh8):
    """A limit on file size makes every write beyond it fail, as a full disk would."""
    directory, states = copied
    big = {**states[3], "params": {"w": jax.random.normal(jax.random.key(0), (256, 256))}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpointer = checkpoint.Checkpointer(directory, 2)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        with pytest.raises(DataError) as error:
            checkpointer.save(6, big, 0)
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(error.value) and str(directory / "6") in str(error.value)
    assert "latest complete step: 4" in str(error.value)
    assert checkpointer.latest() == 4
    same_bits(checkpointer.restore(None, make_state(mesh8)[1])[0], states[4])
    assert checkpointer.save(6, big, 0), "and once there is room again it continues"
    checkpointer.close()
    assert checkpoint.steps(directory) == [2, 4, 6]


def test_two_runs_cannot_share_a_directory(tmp_path):
    first = checkpoint.Checkpointer(tmp_path)
    with pytest.raises(DataError, match=f"in use by process {os.getpid()}"):
        checkpoint.Checkpointer(tmp_path)
    first.close()
    checkpoint.Checkpointer(tmp_path).close()


def test_a_donated_buffer_does_not_reach_the_disk(tmp_path):
    """The next step reuses the state's memory while the save is still being written."""
    state = {"w": jnp.arange(2**20, dtype=jnp.float32)}
    wanted = np.arange(2**20, dtype=np.float32)
    overwrite = jax.jit(lambda s: {"w": s["w"] * 0 - 1}, donate_argnums=0)
    with checkpoint.Checkpointer(tmp_path, 1) as checkpointer:
        checkpointer.save(1, state, 0)
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
    np.testing.assert_array_equal(checkpoint.load_subtree(tmp_path, ("w",))["w"], wanted)


def test_a_run_that_lost_its_directory_writes_no_more(tmp_path):
    with checkpoint.Checkpointer(tmp_path, 1) as checkpointer:
        checkpointer.save(1, {"w": jnp.arange(3.0)}, 0)
        checkpointer.wait()
        (tmp_path / lock.CLAIM).unlink()
        with pytest.raises(Stopped, match="taken from this job"):
            checkpointer.save(2, {"w": jnp.arange(3.0)}, 0)
    assert checkpoint.steps(tmp_path) == [1]


def test_fingerprint_knows_shapes_and_names_but_not_dtypes():
    a = {"w": np.zeros((2, 3)), "b": np.zeros(3)}
    assert checkpoint.fingerprint(a) == checkpoint.fingerprint(
        {"b": np.zeros(3, np.float32), "w": np.ones((2, 3))}
    )
    assert checkpoint.fingerprint(a) != checkpoint.fingerprint({**a, "b": np.zeros(4)})
    assert checkpoint.fingerprint(a) != checkpoint.fingerprint({"w": a["w"], "c": a["b"]})
