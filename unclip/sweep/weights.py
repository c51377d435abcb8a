"""Weights by path: what identifies them before they are read, and how a cell loads them.

A network is a part of a BUNDLE, or one checkpoint of a RUN with or without its moving average.
"""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from unclip import errors
from unclip.cascade import bundle, runs, spaces
from unclip.runtime import checkpoint

NEWEST = -1  # as a step: the newest checkpoint
BRANCHES = ("ema", "params")
_ROOT = ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt")


def checkpoint_hash(
    path: str, part: str, step: int | None, branch: str
) -> tuple[tuple[str, int | None], str]:
    """((path, step or None for a bundle), a hash of the weights), without reading their tensors.

    Args:
      path: RUN or BUNDLE; step: of a RUN, None or `NEWEST` for its newest; branch: of `BRANCHES`.

    Raises:
      ConfigError: a step of a bundle; DataError: no such checkpoint, or it cannot be read.
    """
    if not runs.is_run(path):
        if step not in (None, NEWEST):
            raise errors.ConfigError(f"sweep.step {step}: {path} is a BUNDLE and has no steps")
        return (path, None), bundle.describe(path)["parts"][part]["sha256"]
    if part == "t5":  # no run trains a T5; it is the one in the decoder's config
        return (path, None), json.dumps(runs.run_config(path).get("t5"))
    folder = pathlib.Path(path) / "checkpoints"
    there = checkpoint.steps(folder)
    step = there[-1] if there and step in (None, NEWEST) else step
    if step not in there:
        listed = ", ".join(map(str, there)) or "none"
        raise errors.DataError(
            f"no complete checkpoint of step {step} in {folder}; there: {listed}"
        )
    # A checkpoint is never written twice, and the file hashed here names all of its files.
    hashed = hashlib.sha256(branch.encode())
    names = [folder / str(step) / name for name in _ROOT]
    statistics = pathlib.Path(path) / runs.STATISTICS
    try:
        for name in [*names, *([statistics] if statistics.exists() else [])]:
            hashed.update(name.read_bytes())
    except OSError as error:
        raise errors.DataError(f"cannot read {error.filename}: {error.strerror}") from error
    described = json.dumps(runs.describe_part(path, part), sort_keys=True)
    return (path, step), digest([hashed.hexdigest(), described, step])


def branch_of(part: str, weights: str) -> str:
    """The branch of a RUN to load: CLIP and T5 by their average, with which others are trained."""
    return "ema" if part in bundle.SPACES else weights


def check_spaces(models: Iterable[Mapping[str, tuple[str, int | None]]]) -> None:
    """Refuses models whose stages work in several embedding spaces, before anything is drawn.

    What a BUNDLE says of itself was let through by its exporter. The tensors of a CLIP or T5 are
    read only where no record gives its hash and a stage needs it.

    Args:
      models: {part: (path, checkpoint step or None for a bundle)} of each.

    Raises:
      ConfigError: with all that was found.
    """
    lines: dict[str, None] = {}
    for places in models:
        parts = {part: _outline(path, part) for part, (path, _) in places.items()}
        parts = {part: found for part, found in parts.items() if found is not None}
        wanted = {frozen for part in parts.values() for frozen in part.trained_with}
        for frozen in wanted & parts.keys():
            if not parts[frozen].space:
                parts[frozen].space = _space(frozen, *places[frozen])
        bundles = {path for path, _ in places.values() if not runs.is_run(path)}
        said = [bundle.describe(path)["meta"].get(spaces.RECORD, ()) for path in bundles]
        allowed = {line for some in said for line in some}
        lines |= dict.fromkeys(line for line in spaces.mixed(parts) if line not in allowed)
    spaces.refuse(list(lines), flag=f"--config.{spaces.FLAG}")


def _outline(path: str, part: str) -> bundle.Part | None:
    """A part without its tensors; None for a random T5."""
    space = ""
    if not runs.is_run(path):
        space = bundle.describe(path)["parts"][part].get("space", "")
    elif part == "t5":  # no run trains a T5; it is the one in the decoder's config
        path = runs.run_config(path).get("t5")
        return None if path in (None, "", "random") else _outline(path, part)
    arch, settings = runs.describe_part(path, part)
    return bundle.Part(part, arch, {}, {}, settings, space, **runs.lineage(path, part))


@functools.lru_cache(16)  # a CLIP is hashed once for all cells and checkpoints
def _space(part: str, path: str, step: int | None) -> str:
    return bundle.space(load_part(path, part, step, "ema"))


def load_part(path: str, part: str, step: int | None, weights: str) -> bundle.Part:
    """A part of a BUNDLE (step None), or of a RUN at one of its checkpoints.

    Args:
      weights: of `BRANCHES`, for a RUN; see `branch_of`.

    Raises:
      DataError: the checkpoint is missing, perhaps deleted meanwhile, or damaged.
    """
    if step is None:
        return runs.open_part(path, part)
    return runs.part_from_run(path, part, ema=branch_of(part, weights) == "ema", step=step)


def file_hash(path: str | os.PathLike) -> str:
    """A name for a network's weights: a bundle's hash, or the files' sha256 cut to 10 digits."""
    path = pathlib.Path(path)
    if runs.is_run(path):
        return checkpoint_hash(str(path), "clip", None, "ema")[1]
    if (path / "model.json").is_file():
        return bundle.describe(path)["hash"]
    hashed = hashlib.sha256()
    try:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with open(file, "rb") as opened:
                    hashed.update(hashlib.file_digest(opened, "sha256").digest())
    except OSError as error:
        raise errors.DataError(f"cannot read {path}: {error.strerror or error}") from error
    return hashed.hexdigest()[:10]


def digest(value: Any) -> str:
    """The first 10 hex digits of the sha256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
