"""Checkpoints of a training run: asynchronous, resharding, checked leaf by leaf and by checksum.

A step is a folder `<directory>/<step>` written by orbax (a temporary name, then one rename). The
state is stored as plain nested dicts named by path, so that the containers of an optimiser do not
matter; the data position and the meta (config, fingerprint) are in its JSON. Beside it,
`sums/<step>.json` holds a CRC-32 of every file, since the array format does not detect a flipped
bit.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import logging as std_logging
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from unclip.errors import ConfigError, DataError, UnclipError
from unclip.files.lock import CLAIM, DirectoryLock
from unclip.runtime import collectives, distributed
from unclip.runtime.sharding import nest, tree_paths

STATE = "state"
_COMPLETE = (
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
    f"{STATE}/_METADATA",
    f"{STATE}/manifest.ocdbt",
)
_SHOWN = 10


class _Quiet(std_logging.Filter):
    """Drops the tracebacks orbax's threads log for errors that reach us as exceptions anyway."""

    def filter(self, record: std_logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)


logging.get_absl_logger().addFilter(_Quiet())


def _reason(error: BaseException) -> str:
    """The errno text of an I/O failure, also where the array library has wrapped the error."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    found = re.search(r"os_error_code='(\d+)'", str(error))
    if found:
        return os.strerror(int(found.group(1)))
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def _io(what: str) -> Iterator[None]:
    try:
        yield
    except (DataError, ConfigError):
        raise
    except Exception as error:  # orbax raises OSError, ValueError and its own for a failing disk
        raise DataError(f"{what}: {_reason(error)}") from error


def fingerprint(tree: Any) -> str:
    """A short name for a model's parameter tree: a hash of paths and shapes, not of dtypes."""
    lines = sorted(f"{path} {tuple(leaf.shape)}" for path, leaf in tree_paths(tree).items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def steps(directory: str | os.PathLike) -> list[int]:
    """The complete steps in a checkpoint directory, ascending; half-written ones are left out."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in directory.iterdir()
        if path.name.isdecimal() and all((path / name).exists() for name in _COMPLETE)
    )


def _choose(directory: pathlib.Path, step: int | None) -> int:
    there = steps(directory)
    if not there:
        raise DataError(f"no complete checkpoint in {directory}")
    if step is not None and step not in there:
        raise DataError(
            f"no complete checkpoint of step {step} in {directory}; "
            f"there: {', '.join(map(str, there))}"
        )
    return there[-1] if step is None else step


def _sums(folder: pathlib.Path) -> dict[str, list[int]]:
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        crc, size = 0, 0
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                crc, size = zlib.crc32(block, crc), size + len(block)
        sums[path.relative_to(folder).as_posix()] = [size, crc]
    return sums


def verify(directory: str | os.PathLike, step: int | None = None) -> int:
    """Compares every file of a step with the checksums taken when it was written.

    Returns:
      How many files were compared; 0 where the job died before the sums were written.

    Raises:
      DataError: a file is missing or different.
    """
    directory = pathlib.Path(directory)
    step = _choose(directory, step)
    record = directory / "sums" / f"{step}.json"
    if not record.exists():
        return 0
    with _io(f"cannot read checkpoint {directory / str(step)}"):
        expected = json.loads(record.read_text())
        found = _sums(directory / str(step))
    for name, (size, crc) in expected.items():
        if name not in found:
            raise DataError(f"checkpoint {directory / str(step)} is damaged: {name} is missing")
        if found[name] != [size, crc]:
            how = (
                "has other contents"
                if found[name][0] == size
                else (f"has {found[name][0]} bytes, expected {size}")
            )
            raise DataError(f"checkpoint {directory / str(step)} is damaged: {name} {how}")
    return len(expected)


def stored(
    directory: str | os.PathLike, step: int | None = None
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """What a checkpoint holds, without reading its arrays.

    Returns:
      (step, {path: leaf with .shape and .dtype}, {"position": int, "meta": dict}).

    Raises:
      DataError: no such complete step, or it cannot be read.
    """
    directory = pathlib.Path(directory).absolute()
    step = _choose(directory, step)
    with _io(f"cannot read checkpoint {directory / str(step)}"):
        metadata = ocp.checkpointables_metadata(directory / str(step))
        if metadata.metadata.get(STATE) is None:
            # orbax logs a damaged description and continues without one.
            raise DataError(
                f"cannot read checkpoint {directory / str(step)}: its description "
                f"{STATE}/_METADATA is damaged"
            )
        return step, tree_paths(metadata.metadata[STATE]), dict(metadata.custom_metadata)


def difference(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """A table of the leaves in which a checkpoint and a model differ; empty where they fit.

    Args:
      there: {path: leaf} of the checkpoint.
      wanted: {path: leaf} of the model.
    """
    lines = [
        f"  missing  {path} {tuple(wanted[path].shape)}" for path in wanted if path not in there
    ]
    lines += [
        f"  extra    {path} {tuple(there[path].shape)}" for path in there if path not in wanted
    ]
    lines += [
        f"  shape    {path} {tuple(there[path].shape)}, the model has {tuple(wanted[path].shape)}"
        for path in wanted
        if path in there and tuple(there[path].shape) != tuple(wanted[path].shape)
    ]
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"  … and {len(lines) - _SHOWN} more"]
    return "\n".join(lines)


class Checkpointer:
    """Saves and restores the state of one run.

    Calls are collective: every process makes the same ones in the same order. Keep them outside
    `jax.set_mesh`.

    Args:
      directory: made if missing.
      save_every_steps: `save` acts at multiples of this, and at any step with `force`.
      keep: how many of the latest steps are kept.
      keep_every: steps that are multiples of this are kept for good; None keeps no others.

    Raises:
      DataError: the directory cannot be written, or a live run holds it.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        save_every_steps: int = 1000,
        keep: int = 3,
        keep_every: int | None = None,
    ):
        if save_every_steps < 1 or keep < 1 or (keep_every is not None and keep_every < 1):
            raise ConfigError(
                f"checkpoints: save_every_steps={save_every_steps}, keep={keep}, "
                f"keep_every={keep_every} must all be at least 1"
            )
        if "://" in os.fspath(directory):
            raise ConfigError(
                f"checkpoint directory {directory}: expected a path of a file "
                "system; mount the bucket (gcsfuse, s3fs) and give that path"
            )
        self.directory = pathlib.Path(directory).absolute()
        self._every = save_every_steps
        self._lock = None
        self._pending: concurrent.futures.Future | None = None
        with _io(f"cannot write checkpoints to {self.directory}"):
            self.directory.mkdir(parents=True, exist_ok=True)
        if distributed.is_main():
            self._lock = DirectoryLock(self.directory, on_lost=distributed.request_stop)
            self._tidy()
        distributed.barrier("checkpoint directory ready")
        if not (self.directory / CLAIM).exists():
            raise ConfigError(
                f"{self.directory} is not shared: process 0 wrote to it and process "
                f"{distributed.process_index()} does not see that; put --workdir on "
                "storage that every process mounts"
            )
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep)]
        if keep_every is not None:
            kept.append(policies.EveryNSteps(keep_every))
        self._keep = policies.AnyPreservationPolicy(kept)
        try:
            self._orbax = self._open()
        except DataError:
            self._release()
            raise
        self._failed = False
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")

    def _open(self) -> ocp.training.Checkpointer:
        with _io(f"cannot write checkpoints to {self.directory}"):
            return ocp.training.Checkpointer(
                self.directory,
                # We alone decide which steps are saved: every call that reaches orbax is forced.
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(
                    self._every
                ),
                preservation_policy=self._keep,
                cleanup_tmp_directories=True,
            )

    def _reopen(self) -> None:
        """Makes a new orbax manager: after a failure the old one reports it again and lists wrong
        steps."""
        with contextlib.suppress(DataError), _io("closing"):
            self._orbax.close()
        self._orbax = self._open()
        self._failed = False

    def _tidy(self) -> None:
        """Clears away half-written steps, so that their numbers can be saved again.

        One older than a complete step was being deleted when the job was killed; a newer one is
        kept under another name, for inspection.
        """
        whole = set(steps(self.directory))
        for path in list(self.directory.iterdir()):
            if path.name.isdecimal() and int(path.name) not in whole:
                if whole and int(path.name) < max(whole):
                    with _io(f"cannot remove {path}"):
                        shutil.rmtree(path)
                else:
                    self._set_aside(int(path.name), "was not complete")
        for record in (self.directory / "sums").glob("*.json"):
            if record.stem.isdecimal() and int(record.stem) not in whole:
                record.unlink()

    def _set_aside(self, step: int, why: str) -> None:
        target = self.directory / f"set-aside-{step}-{os.urandom(3).hex()}"
        with _io(f"cannot rename {self.directory / str(step)}"):
            (self.directory / str(step)).rename(target)
            (self.directory / "sums" / f"{step}.json").unlink(missing_ok=True)
        logging.warning("checkpoint step %d %s: moved to %s", step, why, target.name)

    def latest(self) -> int | None:
        """The newest complete step on disk, or None."""
        there = steps(self.directory)
        return there[-1] if there else None

    def due(self, step: int) -> bool:
        """Whether `save(step, …)` would act without `force`."""
        return step > 0 and step % self._every == 0

    def save(
        self,
        step: int,
        state: Any,
        position: int,
        meta: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> bool:
        """Starts writing a step and returns once the arrays are copied off the devices.

        An earlier save is waited for first, and its failure is raised here. A step that is already
        there is not written again.

        Args:
          step: how many training steps `state` has seen.
          state: a pytree of global arrays.
          position: the data source's state, one integer.
          meta: JSON values, e.g. {"config": …, "fingerprint": fingerprint(params)}.
          force: save at this step regardless of the interval.

        Returns:
          Whether a save was started.

        Raises:
          DataError: this or the previous save could not be written; earlier steps are intact.
          Stopped: another run has taken the directory.
        """
        step = int(step)
        if not (force or self.due(step)):
            return False
        self.wait()
        if step in steps(self.directory):
            return False
        self._still_ours()
        if self._failed:
            self._reopen()
        record = {"position": int(position), "meta": json.loads(json.dumps(dict(meta or {})))}
        with self._saving(step):
            response = self._orbax.save_checkpointables_async(
                step, {STATE: nest(tree_paths(state))}, custom_metadata=record, force=True
            )
        self._pending = self._pool.submit(self._commit, step, response)
        return True

    def _still_ours(self) -> None:
        """Raises on every process where another run has taken the directory, or it is gone."""
        failure = None
        if self._lock is not None:
            try:
                self._lock.check()
            except UnclipError as error:
                failure = error
        collectives.raise_together(failure)

    @contextlib.contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        try:
            with _io(f"cannot write checkpoint {self.directory / str(step)}"):
                yield
        except DataError as error:
            self._failed = True
            there = self.latest()
            raise DataError(f"{error} (latest complete step: {there})") from error

    def _commit(self, step: int, response: Any) -> None:
        with self._saving(step):
            response.result()
            if distributed.is_main():
                folder = self.directory / "sums"
                folder.mkdir(exist_ok=True)
                temporary = folder / f".{step}.tmp"
                temporary.write_text(json.dumps(_sums(self.directory / str(step))))
                temporary.replace(folder / f"{step}.json")
                whole = set(steps(self.directory))
                for record in folder.glob("*.json"):
                    if record.stem.isdecimal() and int(record.stem) not in whole:
                        record.unlink(missing_ok=True)

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
          DataError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, step: int | None, abstract_state: Any) -> tuple[Any, int, dict[str, Any]]:
        """Reads a step onto the given shapes, dtypes and shardings.

        The mesh, the device count, the process count and the dtypes may differ from those of the
        save. With `step` None a damaged newest step is moved aside with a warning and the one
        before it is read (in a job of several processes it is an error instead, since they must
        agree).

        Args:
          step: which, or None for the newest complete one.
          abstract_state: ShapeDtypeStructs with shardings, or arrays.

        Returns:
          (state, position, meta) as given to `save`.

        Raises:
          ConfigError: the checkpoint is of another model; a table says which leaves differ.
          DataError: nothing to read, or it cannot be read.
        """
        self.wait()
        tried = step
        while True:
            try:
                return load(self.directory, tried, abstract_state)
            except DataError as error:
                there = steps(self.directory)
                if step is not None or distributed.process_count() > 1 or len(there) < 2:
                    raise
                logging.warning("%s", error)
                self._set_aside(there[-1], "cannot be read")
                self._reopen()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def close(self) -> None:
        """Waits for the last save, then releases the directory; safe to call twice."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            with contextlib.suppress(DataError), _io("closing"):  # its failure was raised by wait
                self._orbax.close()
            self._release()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    where = getattr(leaf, "sharding", None)
    if where is None:
        where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def load(
    directory: str | os.PathLike, step: int | None, abstract_state: Any
) -> tuple[Any, int, dict[str, Any]]:
    """`Checkpointer.restore` without locking the directory: for evaluation beside a running job.

    Arguments, results and errors are those of `restore`.
    """
    directory = pathlib.Path(directory).absolute()
    step, there, record = stored(directory, step)
    wanted = tree_paths(abstract_state)
    if distributed.is_main():
        verify(directory, step)  # first, so that damage is not reported as another model
    table = difference(there, wanted)
    if table:
        raise ConfigError(
            f"{directory / str(step)} is a checkpoint of another model "
            f"(expected {len(wanted)} leaves, found {len(there)}):",
            table,
        )
    with _io(f"cannot read checkpoint {directory / str(step)}"):
        tree = ocp.load_checkpointables(
            directory / str(step),
            {STATE: nest({path: _placed(leaf) for path, leaf in wanted.items()})},
        )[STATE]
    found = tree_paths(tree)
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), [found[p] for p in wanted])
    return state, int(record["position"]), dict(record["meta"])


def load_subtree(
    directory: str | os.PathLike,
    prefixes: Sequence[str] = ("params",),
    step: int | None = None,
    shardings: Mapping[str, Any] | None = None,
    dtype: Any = None,
) -> dict[str, Any]:
    """Some branches of a checkpoint, without knowing the rest: for export and frozen parts.

    Args:
      directory: a checkpoint directory, also of a running job.
      prefixes: paths of branches, e.g. ("ema",) or ("params/unet",).
      step: which, or None for the newest complete one.
      shardings: {path: Sharding} or a nested tree of them; leaves without one become numpy arrays.
      dtype: cast floating leaves to it; None keeps what is stored.

    Returns:
      Nested dicts that begin at the top, e.g. {"ema": {…}}.

    Raises:
      ConfigError: a prefix is not in the checkpoint.
      DataError: it cannot be read.
    """
    directory = pathlib.Path(directory).absolute()
    step, there, _ = stored(directory, step)
    if distributed.is_main():
        verify(directory, step)
    for prefix in prefixes:
        if not any(path == prefix or path.startswith(prefix + "/") for path in there):
            top = sorted({path.split("/")[0] for path in there})
            raise ConfigError(
                f"no {prefix!r} in {directory / str(step)}: it holds " + ", ".join(top)
            )
    where = tree_paths(shardings) if shardings else {}
    wanted = {}
    for path, leaf in there.items():
        if any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes):
            kind = leaf.dtype
            if dtype is not None and jax.numpy.issubdtype(kind, jax.numpy.floating):
                kind = np.dtype(dtype)
            wanted[path] = (
                jax.ShapeDtypeStruct(leaf.shape, kind, sharding=where[path])
                if path in where
                else np.empty(leaf.shape, kind)
            )
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    with _io(f"cannot read checkpoint {directory / str(step)}"), context:
        return ocp.load_checkpointables(directory / str(step), {STATE: nest(wanted)})[STATE]
