"""Numbers and pictures of a run: one JSON object per line, TensorBoard, and W&B where asked for.

`metrics.jsonl` is the record from which everything else can be drawn.
"""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip.errors import ConfigError, DataError
from unclip.runtime import distributed


def _number(value: Any) -> int | float | None:
    """A JSON number; None for what is not finite, which JSON cannot hold."""
    item = np.asarray(value).item()
    if isinstance(item, int | bool):
        return int(item)
    return float(item) if math.isfinite(item) else None


class MetricWriter:
    """Writes scalars and pictures; on every process but the first it does nothing.

    Args:
      workdir: gets metrics.jsonl and, for TensorBoard, event files in tensorboard/.
      tensorboard: whether to write event files (read by `tensorboard --logdir`).
      wandb: None, or keyword arguments for `wandb.init` ({} for its defaults).
      restored_step: the step the run resumes from. Lines of later steps, which are trained again,
        move to metrics.dropped.jsonl, and TensorBoard drops its own. None keeps everything.

    Attributes:
      restored_names: of the values that metrics.jsonl held of `restored_step`; on every process but
        the first empty.

    Raises:
      ConfigError: W&B is asked for and not installed.
      DataError: the directory cannot be written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
        restored_step: int | None = None,
    ):
        self._file = self._board = self._wandb = None
        self.restored_names: set[str] = set()
        if not distributed.is_main():
            return
        workdir = pathlib.Path(workdir)
        if wandb is not None:
            try:
                import wandb as wandb_module
            except ImportError as error:
                raise ConfigError(
                    "W&B logging is on and the package wandb is not installed: "
                    "pip install 'unclip[tracking]', or set wandb to None"
                ) from error
            self._wandb = wandb_module.init(
                **{"dir": str(workdir), "id": workdir.resolve().name, "resume": "allow", **wandb}
            )
        self._path = workdir / "metrics.jsonl"
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self._repair(restored_step)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
            if tensorboard:
                self._board = _tensorboard().SummaryWriter(
                    str(workdir / "tensorboard"),
                    purge_step=None if restored_step is None else restored_step + 1,
                )
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror}") from error

    def _repair(self, restored_step: int | None) -> None:
        """Drops a line cut short by a kill, and lines after the step the run resumes from."""
        if not self._path.exists():
            return
        kept, dropped = [], []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                values = json.loads(line)
                step = values["step"]
            except (ValueError, KeyError, TypeError):
                continue
            late = restored_step is not None and step > restored_step
            if step == restored_step:
                self.restored_names |= values.keys()
            (dropped if late else kept).append(line + "\n")
        if dropped:
            with open(self._path.with_name("metrics.dropped.jsonl"), "a", encoding="utf-8") as file:
                file.writelines(dropped)
        temporary = self._path.with_name(".metrics.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self._path)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line {"step", "time", name: number, …}.

        A value that is not finite becomes null, and "nonfinite" lists its name.

        Args:
          step: training step the values belong to.
          values: names to Python, numpy or JAX scalars.

        Raises:
          DataError: the disk is full or gone.
        """
        if self._file is None:
            return
        numbers = {name: _number(value) for name, value in values.items()}
        line: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3), **numbers}
        missing = [name for name, number in numbers.items() if number is None]
        if missing:
            line["nonfinite"] = missing
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror}") from error
        finite = {name: number for name, number in numbers.items() if number is not None}
        if self._board is not None:
            for name, number in finite.items():
                self._board.add_scalar(name, number, int(step))
        if self._wandb is not None:
            self._wandb.log(finite, step=int(step))

    def images(self, step: int, name: str, picture: np.ndarray) -> None:
        """Sends a picture to TensorBoard and W&B.

        Args:
          step: training step.
          name: e.g. "samples/ema".
          picture: uint8 [H, W, 3].

        Raises:
          ValueError: it is not of that form.
        """
        picture = np.asarray(picture)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
            raise ValueError(
                f"picture {name!r} is {picture.dtype} {picture.shape}, expected uint8 [H, W, 3]"
            )
        if self._board is not None:
            self._board.add_image(name, picture, int(step), dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(picture)}, step=int(step))

    def flush(self) -> None:
        """Pushes event files to disk; lines of metrics.jsonl are there already."""
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Ends every sink; safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _tensorboard():
    """tensorboardX without PyTorch, which it would import where that is installed: two seconds, for
    arrays of a kind that it is never given here."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        import tensorboardX
    finally:
        if hidden:
            del sys.modules["torch"]
    return tensorboardX
