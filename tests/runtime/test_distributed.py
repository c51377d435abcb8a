"""Start-up, stopping, and one real job of two processes."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from unclip.errors import ConfigError
from unclip.runtime import checkpoint, distributed

ROOT = pathlib.Path(__file__).resolve().parents[2]
SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    "env, kind",
    [
        ({}, None),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({**SLURM, "SLURM_NTASKS": "2"}, "slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "ompi"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
        ({"JOB_COMPLETION_INDEX": "0", "KUBERNETES_SERVICE_HOST": "x"}, "k8s"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, "explicit"),
    ],
)
def test_clusters_are_told_by_their_environment(env, kind):
    assert distributed.detect(env) == kind


@pytest.mark.parametrize(
    "env, devices",
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_TASKS_PER_NODE": "1"}, [0, 1, 2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_TASKS_PER_NODE": "4(x2)"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_TASKS_PER_NODE": "2"}, [2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "3", "SLURM_TASKS_PER_NODE": "4"}, [0]),
        (
            {
                "CUDA_VISIBLE_DEVICES": "0,1",
                "SLURM_TASKS_PER_NODE": "2",
                "SLURM_GPUS_PER_TASK": "2",
            },
            [0, 1],
        ),
        ({"SLURM_TASKS_PER_NODE": "2"}, None),
    ],
)
def test_slurm_tasks_share_the_gpus_of_a_node(env, devices):
    assert distributed.slurm_devices({**SLURM, **env}) == devices


def test_uneven_sharing_is_refused():
    with pytest.raises(ConfigError, match="3 SLURM tasks"):
        distributed.slurm_devices(
            {**SLURM, "CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_TASKS_PER_NODE": "3"}
        )


@pytest.mark.parametrize(
    "arguments, word",
    [
        (("host:1", 2, None), "all three"),
        (("host:1", 2, 2), "process_id"),
        (("host", 2, 0), "port"),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ConfigError, match=word):
        distributed.initialize(*arguments)


def test_alone_everything_is_a_no_op(monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ})
    for name in ("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX"):
        os.environ.pop(name, None)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        distributed.initialize()
        assert distributed.process_index() == 0 and distributed.process_count() == 1
        assert distributed.is_main()
        distributed.barrier("nobody else")
        assert not distributed.should_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert distributed.should_stop(2) and distributed.should_stop(3)
        distributed.reset_stop()
        distributed.listen()
        os.kill(os.getpid(), signal.SIGINT)
        assert distributed.should_stop(4), "the first Ctrl-C stops in good order"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        distributed.reset_stop()
        signal.signal(signal.SIGTERM, handlers[0])
        signal.signal(signal.SIGINT, handlers[1])


WORKER = """
import os, pathlib, sys, time
from unclip.runtime import checkpoint, distributed, sharding, sums
from unclip.errors import Stopped
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jax, jax.numpy as jnp, numpy as np
me = distributed.process_index()
assert (me, distributed.process_count(), jax.device_count()) == (int(sys.argv[2]), 2, 4)
mesh = sharding.make_mesh({"data": 2, "fsdp": 2})
batch = sharding.put_batch({"x": np.arange(4) + 4 * me}, mesh)
total = jax.jit(jnp.sum, out_shardings=sharding.replicated(mesh))(batch["x"])
assert int(total) == 28, total
init = lambda key: {"params": {"w": jax.random.normal(key, (8, 4))}, "step": jnp.int32(3)}
abstract = jax.eval_shape(init, jax.random.key(0))
where = sharding.shardings(abstract, mesh, sharding.FSDP, min_size=1)
state = jax.jit(init, out_shardings=where)(jax.random.key(0))
norm = float(jax.jit(lambda s: jnp.sum(s["params"]["w"] ** 2))(state))
with checkpoint.Checkpointer(sys.argv[3], 1) as checkpointer:
    checkpointer.save(3, state, 12, {"norm": norm})
    checkpointer.wait()
    got, position, meta = checkpointer.restore(None, sharding.abstract(abstract, where))
    assert position == 12 and meta == {"norm": norm}
    for a, b in zip(got["params"]["w"].addressable_shards, state["params"]["w"].addressable_shards):
        assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
    checkpointer.save(4, state, 16)
    checkpointer.wait()
    distributed.barrier("saved twice")
    sums.SMALL_BYTES = 0
    if me == 1:
        data = max(pathlib.Path(sys.argv[3], "4", "state").rglob("d/*"), key=os.path.getsize)
        data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    distributed.barrier("damaged")
    assert checkpointer.restore(None, sharding.abstract(abstract, where))[1] == 12
try:
    distributed.barrier("only one comes", 0.5) if me == 0 else time.sleep(1)
    assert me == 1
except Stopped as error:
    assert "only one comes" in str(error) and me == 0
print("ready", flush=True)
stop = None
for step in range(2000):
    if distributed.should_stop(step):
        stop = step
        break
    time.sleep(0.01)
assert distributed.should_stop(step)
print("stopped", stop, flush=True)
"""


def test_two_processes_sum_save_restore_and_stop_together(tmp_path):
    """SIGTERM goes to one process only; both must leave at the same step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": str(ROOT),
    }
    workers = []
    for i in range(2):
        with open(tmp_path / f"{i}.log", "w") as log:
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-c", WORKER, address, str(i), str(tmp_path / "checkpoints")],
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            )
    watchdog = threading.Timer(120, lambda: [worker.kill() for worker in workers])
    watchdog.start()
    try:
        for i, worker in enumerate(workers):  # gloo greets on standard output too
            assert any(line == "ready\n" for line in worker.stdout), (
                tmp_path / f"{i}.log"
            ).read_text()[-3000:]
        workers[1].send_signal(signal.SIGTERM)
        outs = [worker.communicate(timeout=60)[0] for worker in workers]
        logs = "".join((tmp_path / f"{i}.log").read_text()[-3000:] for i in range(2))
        assert [worker.returncode for worker in workers] == [0, 0], logs
        assert outs[0] == outs[1] and outs[0].startswith("stopped ") and "None" not in outs[0]
    finally:
        watchdog.cancel()
        for worker in workers:
            worker.kill()
            worker.wait()
    # What two processes wrote, one process reads.
    abstract = {
        "params": {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)},
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    state, position, meta = checkpoint.load(tmp_path / "checkpoints", None, abstract)
    assert position == 12 and int(state["step"]) == 3
    assert abs(float(jnp.sum(state["params"]["w"] ** 2)) - meta["norm"]) < 1e-4
