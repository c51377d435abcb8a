"""Checkpoints of a training run: asynchronous, resharding, checked leaf by leaf and by checksum.

A step is a folder `<directory>/<step>` written by orbax (a temporary name, then one rename). The
state is stored as plain nested dicts named by path, so that the containers of an optimiser do not
matter; the data position and the meta (config, fingerprint) are in its JSON. `sums` proves what is
damaged; only that is ever set aside. What cannot be read for another reason (memory, a network file
system, too many open files) is tried again and then left as it is.

A step is trusted once the loss after it was sound, and steps are deleted only when enough trusted
ones follow: a run that blows up, which shows one step late, keeps the state from before.
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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from unclip import files
from unclip.errors import ConfigError, Damaged, DataError, UnclipError
from unclip.files.lock import CLAIM, DirectoryLock
from unclip.runtime import collectives, distributed, sums
from unclip.runtime.sharding import nest, tree_paths

STATE = "state"
_COMPLETE = (
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
    f"{STATE}/_METADATA",
    f"{STATE}/manifest.ocdbt",
)
NAMED = "named.json"  # the steps that are kept by name
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


def verify(directory: str | os.PathLike, step: int | None = None) -> int:
    """Compares every file of a step with the checksums taken when it was written.

    Every process of a job compares a share of them, and all raise what any one found.

    Returns:
      How many files there are; 0 where the sums are not taken yet.

    Raises:
      Damaged: a file is missing or different. DataError: one cannot be read.
    """
    directory = pathlib.Path(directory)
    step = _choose(directory, step)
    found, expected, failure = "", None, None
    share = (distributed.process_index(), distributed.process_count())
    try:
        with _io(f"cannot read checkpoint {directory / str(step)}"):
            expected = sums.read(directory, step)
            if expected is None and not sums.expected(directory, step):
                expected = sums.read(directory, step)  # taken just now, perhaps
                found = "" if expected else "it has no checksums"
            if expected is not None:
                found = sums.damage(directory, step, expected, share=share)
    except DataError as error:
        failure = error
    if found:
        failure = Damaged(f"checkpoint {directory / str(step)} is damaged: {found}")
    collectives.raise_together(failure)
    return len(expected or ())


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
    metadata = _patiently(directory / str(step), lambda: _description(directory / str(step)))
    if metadata is None:
        raise DataError(f"cannot read checkpoint {directory / str(step)}: damaged description")
    return step, tree_paths(metadata.metadata[STATE]), dict(metadata.custom_metadata)


def _description(folder: pathlib.Path) -> Any:
    """What orbax says of a step; None where that is damaged.

    Raises:
      OSError: it cannot be read.
    """
    try:
        found = ocp.checkpointables_metadata(folder)
        # orbax logs a damaged description and continues without one.
        whole = found.metadata.get(STATE) is not None and "position" in found.custom_metadata
        return found if whole else None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a parser's: of JSON, of a database
        if re.search(_TRANSIENT, str(error)):
            raise OSError(_reason(error)) from error
        return None


# As the array library and XLA tell of what has nothing to do with a file's contents.
_TRANSIENT = "os_error_code=|RESOURCE_EXHAUSTED|Out of memory|DEADLINE_EXCEEDED|UNAVAILABLE"
PAUSES_S = (0.5, 2.0, 8.0)  # before a read is tried again


def _patiently(folder: pathlib.Path, read: Callable, alone: bool = False) -> Any:
    """What `read` gives, tried again after a while where it fails.

    Args:
      alone: whether no other process of the job reads along, and would have to try again too.

    Raises:
      DataError: it failed again; nothing was changed.
    """
    pauses = PAUSES_S if alone or distributed.process_count() == 1 else ()
    for pause in (*pauses, None):
        try:
            with _io(f"cannot read checkpoint {folder}"):
                return read()
        except Damaged:
            raise
        except DataError as error:
            if pause is None:
                raise
            logging.warning("%s: tried again in %g s", error, pause)
            time.sleep(pause)


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
        failure = None
        try:
            if distributed.is_main():
                self._lock = DirectoryLock(self.directory, on_lost=distributed.request_stop)
                _patiently(self.directory, self._inspect, alone=True)
        except UnclipError as error:
            failure = error
            self._release()
        collectives.raise_together(failure)
        if not (self.directory / CLAIM).exists():
            raise ConfigError(
                f"{self.directory} is not shared: process 0 wrote to it and process "
                f"{distributed.process_index()} does not see that; put --workdir on "
                "storage that every process mounts"
            )
        self._kept, self._kept_every = keep, keep_every
        self._trusted = (steps(self.directory) or [0])[-1] - 1  # of the newest nothing is known
        self._untrusted = None  # the newest step that was saved and is not trusted yet
        self._failed = False
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        try:
            self._orbax = self._open()
        except DataError:
            self._release()
            raise

    def _open(self) -> ocp.training.Checkpointer:
        with _io(f"cannot write checkpoints to {self.directory}"):
            return ocp.training.Checkpointer(
                self.directory,
                # We alone decide which steps are saved: every call that reaches orbax is forced.
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(
                    self._every
                ),
                # And which are deleted: `_prune`.
                preservation_policy=ocp.training.preservation_policies.PreserveAll(),
                cleanup_tmp_directories=True,
            )

    def _reopen(self) -> None:
        """Makes a new orbax manager: after a failure the old one reports it again and lists wrong
        steps."""
        with contextlib.suppress(DataError), _io("closing"):
            self._orbax.close()
        self._orbax = self._open()
        self._failed = False

    def _inspect(self) -> None:
        """Clears the way for orbax, which reads the descriptions of all steps at once.

        A step that is not complete and older than a complete one was being deleted when the job
        was killed. One that was saved by a job that died before it took the sums gets them. What
        is damaged is set aside, unless nothing would be left.

        Raises:
          DataError: something cannot be read, or all steps are damaged.
        """
        whole = set(steps(self.directory))
        there = {int(p.name) for p in self.directory.iterdir() if p.name.isdecimal()}
        bad = {}
        with _io(f"cannot read the checkpoints in {self.directory}"):
            for path in self.directory.glob(".deleting-*"):
                shutil.rmtree(path)
            for step in sorted(there):
                folder = self.directory / str(step)
                if step not in whole and whole and step < max(whole):
                    shutil.rmtree(folder)
                elif step not in whole:
                    bad[step] = "is not complete"
                elif (expected := sums.read(self.directory, step)) is not None:
                    bad[step] = sums.damage(self.directory, step, expected, small=True)
                elif sums.expected(self.directory, step) and _description(folder) is not None:
                    sums.take(self.directory, step)
                else:
                    bad[step] = "has no checksums, or damaged ones"
            bad = {step: why for step, why in bad.items() if why}
            if bad and not whole - set(bad):
                told = "; ".join(f"{step} {why}" for step, why in sorted(bad.items()))
                raise Damaged(
                    f"no step in {self.directory} is whole ({told}): put a copy of one in its "
                    "place, or move the folder away to start anew"
                )
            for step, why in bad.items():
                self._set_aside(step, why)
            sums.forget(self.directory, steps(self.directory))
            for path in (self.directory / "sums").glob("*.pending"):
                path.unlink()

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
        trusted: bool = True,
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
          trusted: whether it is among those that are kept at once, or only when `trust` is told.

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
        self._still_ours()
        if collectives.from_main(int(step in steps(self.directory))):
            return False
        if self._failed:
            self._reopen()
        record = {"position": int(position), "meta": json.loads(json.dumps(dict(meta or {})))}
        with self._saving(step):
            if distributed.is_main():
                sums.expect(self.directory, step)
            response = self._orbax.save_checkpointables_async(
                step, {STATE: nest(tree_paths(state))}, custom_metadata=record, force=True
            )
        self._pending = self._pool.submit(self._commit, step, response, trusted)
        self._untrusted = None if trusted else step
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

    def _commit(self, step: int, response: Any, trusted: bool) -> None:
        with self._saving(step):
            response.result()
            if distributed.is_main():
                sums.take(self.directory, step)
                if trusted:
                    self._prune(step)

    def trust(self, step: int) -> None:
        """Says that the states up to this step are sound, so that older ones may go.

        Deletes, in the background, the complete steps that are neither among the `keep` newest
        trusted ones, nor multiples of `keep_every`, nor kept by name.
        """
        self._trusted = max(step, self._trusted)
        if self._untrusted is not None and self._untrusted <= step:
            self._untrusted = None
            if distributed.is_main():  # after the save, by the same thread
                self._pool.submit(self._prune, self._trusted)

    def _prune(self, trusted: int) -> None:
        there = steps(self.directory)
        sound = [step for step in there if step <= trusted]
        kept = {*sound[-self._kept :], *(about["step"] for about in self.named().values())}
        for step in sound:
            if step not in kept and not (self._kept_every and step % self._kept_every == 0):
                # Renamed first: what has its step's name is whole.
                grave = self.directory / f".deleting-{step}"
                with contextlib.suppress(OSError):  # what is left goes at the next start
                    (self.directory / str(step)).rename(grave)
                    shutil.rmtree(grave)
        sums.forget(self.directory, steps(self.directory))

    def named(self) -> dict[str, dict[str, Any]]:
        """{name: {"step": int, …}} of the steps that are kept by name."""
        path = self.directory / NAMED
        if not path.exists():
            return {}
        try:
            found = files.read_object(path)
            return {
                str(name): {**about, "step": int(about["step"])} for name, about in found.items()
            }
        except (DataError, KeyError, TypeError, ValueError) as error:
            logging.warning("%s is damaged, nothing is kept by name: %s", path, error)
            return {}

    def about(self, name: str) -> dict[str, Any]:
        """What is said of the step of a name; empty where there is none."""
        return self.named().get(name, {})

    def name(self, name: str, step: int, about: Mapping[str, Any] | None = None) -> None:
        """Keeps a step until another one gets its name."""
        if distributed.is_main():
            named = self.named() | {name: {**(about or {}), "step": int(step)}}
            files.write_object(self.directory / NAMED, named)

    def name_trusted(self, name: str) -> int | None:
        """`name` for the newest trusted step, which is returned; None where there is none."""
        sound = [step for step in steps(self.directory) if step <= self._trusted]
        if sound:
            self.name(name, sound[-1])
        return sound[-1] if sound else None

    def distrust(self) -> int | None:
        """Sets aside the steps that were never trusted, where a trusted one is left.

        Returns:
          The step that the next start goes on from; None where there is none.
        """
        self.wait()
        there = steps(self.directory)
        sound = [step for step in there if step <= self._trusted]
        if sound and distributed.is_main():
            for step in there:
                if step > self._trusted:
                    self._set_aside(step, "was followed by a loss that is not sound")
        distributed.barrier("distrusted steps set aside")
        return (sound or there or [None])[-1]

    @property
    def saving(self) -> bool:
        """Whether a save that was started is not on disk yet."""
        return self._pending is not None and not self._pending.done()

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
        save. With `step` None a newest step that is proven damaged is moved aside with a warning
        and the one before it is read; process 0 chooses, the others follow.

        Args:
          step: which, or None for the newest complete one.
          abstract_state: ShapeDtypeStructs with shardings, or arrays.

        Returns:
          (state, position, meta) as given to `save`.

        Raises:
          ConfigError: the checkpoint is of another model; a table says which leaves differ.
          DataError: nothing to read, or it cannot be read; nothing was changed.
        """
        self.wait()
        while True:
            # One process sees the folder first, and another must not see it otherwise.
            tried = step or collectives.from_main(self.latest() or 0) or None
            try:
                found = load(self.directory, tried, abstract_state)
                self._trusted = min(self._trusted, (tried or 0) - 1)
                return found
            except Damaged as error:
                if step is not None or collectives.from_main(len(steps(self.directory))) < 2:
                    raise
                logging.warning("%s", error)
                if distributed.is_main():
                    self._set_aside(tried, "is damaged")
                distributed.barrier("damaged step set aside")
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
    step = _choose(directory, step)
    # First, so that damage is not reported as another model.
    _patiently(directory / str(step), lambda: verify(directory, step))
    step, there, record = stored(directory, step)
    wanted = tree_paths(abstract_state)
    table = difference(there, wanted)
    if table:
        raise ConfigError(
            f"{directory / str(step)} is a checkpoint of another model "
            f"(expected {len(wanted)} leaves, found {len(there)}):",
            table,
        )
    placed = nest({path: _placed(leaf) for path, leaf in wanted.items()})
    read = lambda: ocp.load_checkpointables(directory / str(step), {STATE: placed})[STATE]
    tree = _patiently(directory / str(step), read)
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
    step = _choose(directory, step)
    _patiently(directory / str(step), lambda: verify(directory, step))
    step, there, _ = stored(directory, step)
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

    def read():
        with context:
            return ocp.load_checkpointables(directory / str(step), {STATE: nest(wanted)})[STATE]

    return _patiently(directory / str(step), read)
