"""Processes: start-up on one machine or a pod, barriers with a deadline, and requests to stop.

It lets the same command train on a laptop core, on SLURM, on GKE and on a TPU pod.
"""

import itertools
import os
import signal
from collections.abc import Mapping

import jax
from absl import logging
from jax._src import distributed as _jax_distributed  # the barrier client has no public name
from jax.experimental import multihost_utils

from unclip.errors import ConfigError, Stopped

_stop = False
_polls = itertools.count(1)
_barriers = itertools.count()


def detect(env: Mapping[str, str]) -> str | None:
    """The cluster a process was started by: "explicit", "tpu", "slurm", "ompi", "k8s" or None.

    None means a single process. Only environment variables are read, so that nothing here can hang
    on a metadata server; a SLURM or MPI job of one task counts as a single process.

    Args:
      env: the environment, normally `os.environ`.
    """
    if env.get("JAX_COORDINATOR_ADDRESS") and env.get("JAX_NUM_PROCESSES"):
        return "explicit"
    on_tpu = not env.get("JAX_PLATFORMS", "tpu").startswith(("cpu", "cuda", "gpu"))
    if on_tpu and (
        "," in env.get("TPU_WORKER_HOSTNAMES", "") or env.get("MEGASCALE_COORDINATOR_ADDRESS")
    ):
        return "tpu"
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in env for name in slurm) and int(env.get("SLURM_NTASKS", "1")) > 1:
        return "slurm"
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "ompi"
    if "JOB_COMPLETION_INDEX" in env and "KUBERNETES_SERVICE_HOST" in env:
        return "k8s"
    return None


def slurm_devices(env: Mapping[str, str]) -> list[int] | None:
    """Which of the visible GPUs a SLURM task takes, as indices into CUDA_VISIBLE_DEVICES.

    JAX alone assumes one task per GPU. Here a task that is alone on its node takes every GPU, one
    restricted by --gpus-per-task takes the GPUs it sees, and tasks that share one list split it
    evenly.

    Returns:
      The indices, or None where CUDA_VISIBLE_DEVICES or the tasks per node are unknown.

    Raises:
      ConfigError: the tasks of a node cannot share its GPUs evenly.
    """
    visible = [d for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip()]
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", ""))
    tasks = tasks.split("(")[0].split(",")[0]  # "4(x2)" and "4,3" both begin with this node group
    if not visible or not tasks.isdigit():
        return None
    count, tasks, local = len(visible), int(tasks), int(env.get("SLURM_LOCALID", "0"))
    if tasks == 1 or count == 1 or "SLURM_GPUS_PER_TASK" in env:
        return list(range(count))
    if count % tasks:
        raise ConfigError(
            f"{tasks} SLURM tasks on a node cannot share {count} GPUs evenly "
            f"(CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']}): "
            f"use --ntasks-per-node=1 or --ntasks-per-node={count}"
        )
    each = count // tasks
    return list(range(local * each, (local + 1) * each))


def _on_cloud_tpu() -> bool:
    """Whether JAX itself found a Cloud TPU VM when it was imported (a pod made without GKE)."""
    from jax._src import cloud_tpu_init

    return cloud_tpu_init.running_in_cloud_tpu_vm and not os.environ.get(
        "JAX_PLATFORMS", "tpu"
    ).startswith("cpu")


def initialize(
    coordinator: str | None = None, process_count: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a job and starts listening for SIGTERM. Call before any device query.

    With no arguments the cluster is detected (TPU pod, SLURM, Open MPI, Kubernetes indexed job, or
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID); a single process joins nothing.
    A second call does nothing.

    Args:
      coordinator: "host:port" of process 0.
      process_count: how many processes.
      process_id: which one this is, in [0, process_count).

    Raises:
      ConfigError: some of the three are given but not all, or they contradict one another.
      Stopped: the other processes did not arrive.
    """
    given = (coordinator, process_count, process_id)
    kind = "explicit" if any(g is not None for g in given) else detect(os.environ)
    if kind is None and _on_cloud_tpu():
        kind = "tpu"
    if kind == "explicit" and given == (None, None, None):
        coordinator = os.environ["JAX_COORDINATOR_ADDRESS"]
        process_count = int(os.environ["JAX_NUM_PROCESSES"])
        process_id = int(os.environ.get("JAX_PROCESS_ID", "-1"))
    if kind == "explicit":
        if coordinator is None or process_count is None or process_id is None:
            raise ConfigError(
                f"coordinator={coordinator!r}, process_count={process_count!r}, process_id="
                f"{process_id!r}: give all three, or none to detect the cluster"
            )
        if not 0 <= process_id < process_count:
            raise ConfigError(f"process_id is {process_id}, expected 0 … {process_count - 1}")
        if ":" not in coordinator:
            raise ConfigError(f"coordinator is {coordinator!r}, expected host:port")
    if kind is not None and process_count != 1 and not jax.distributed.is_initialized():
        arguments = dict(
            coordinator_address=coordinator, num_processes=process_count, process_id=process_id
        )
        if kind == "explicit":
            arguments["cluster_detection_method"] = "deactivate"
        if kind == "slurm":
            arguments["local_device_ids"] = slurm_devices(os.environ)
        try:
            jax.distributed.initialize(**arguments)
        except RuntimeError as error:
            raise Stopped(f"the processes of this job did not meet ({kind}): {error}") from error
        logging.info("process %d of %d (%s)", jax.process_index(), jax.process_count(), kind)
    listen()


def process_index() -> int:
    """This process's number, in [0, process_count()); in a single process JAX is not
    initialised."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def process_count() -> int:
    """How many processes train together; in a single process JAX is not initialised."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this is process 0, the one that writes logs, metrics and lock files."""
    return process_index() == 0


def barrier(name: str, timeout_s: float = 600.0) -> None:
    """Waits until every process of the job has reached the same call.

    It goes through the coordination service, not through a device collective, so that one slow
    process ends the job with a message instead of holding every accelerator.

    Args:
      name: what is being waited for, in the message.
      timeout_s: seconds.

    Raises:
      Stopped: some process did not arrive in time; the job can be started again.
    """
    if process_count() == 1:
        return
    client = _jax_distributed.global_state.client
    try:
        client.wait_at_barrier(f"unclip/{name}/{next(_barriers)}", int(timeout_s * 1000))
    except Exception as error:  # jaxlib raises its own status class, which has no public name
        raise Stopped(
            f"barrier {name!r}: not every one of {process_count()} processes arrived "
            f"within {timeout_s:g} s ({str(error).splitlines()[0]})"
        ) from error


def listen() -> None:
    """Installs the signal handlers; must run in the main thread, elsewhere it does nothing.

    In a single process, SIGTERM and the first Ctrl-C set the flag that `should_stop` reads and the
    second Ctrl-C interrupts. In a job of several processes JAX's preemption service already handles
    SIGTERM (it has to inform the other processes), so only Ctrl-C is passed on to it.
    """

    def stop(number, _frame):
        request_stop()
        logging.warning("%s: stopping at the next step", signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def forward(_number, _frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.raise_signal(signal.SIGTERM)

    try:
        if process_count() > 1:
            signal.signal(signal.SIGINT, forward)
        else:
            signal.signal(signal.SIGINT, stop)
            signal.signal(signal.SIGTERM, stop)
    except ValueError:
        logging.info("signals are handled by the main thread only; none installed here")


def request_stop() -> None:
    """Asks this job to stop at its next poll, as SIGTERM does; from any thread."""
    global _stop
    if process_count() > 1:  # JAX's preemption service tells the others
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        _stop = True


def should_stop(step: int | None = None) -> bool:
    """Whether to save and leave now; once true it stays true.

    In a job of several processes all agree on the answer: every process must call this equally
    often, and all of them see true at the same call, even if only one got SIGTERM. Evaluators
    should call it between batches too, or a preemption notice is missed while they run.

    Args:
      step: only for the log line.
    """
    global _stop
    if process_count() > 1 and not _stop:
        # Polls, not steps, are counted: an evaluator polls many times within one step.
        _stop = multihost_utils.reached_preemption_sync_point(next(_polls))
        if _stop:
            logging.warning("preemption notice: every process stops at step %s", step)
    return _stop


def reset_stop() -> None:
    """Forgets an earlier request to stop, for a caller that runs several jobs in one process."""
    global _stop
    _stop = False
