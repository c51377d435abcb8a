"""A training run on disk: its config, and its latest checkpoint as a part of the cascade.

Later stages take their frozen CLIP from the run of an earlier one, and `unclip export` gathers
runs into a bundle; both accept a run's workdir and a bundle's folder alike.
"""

import json
import pathlib

from safetensors.numpy import load_file

from unclip import bundle, errors
from unclip.runtime import checkpoint

STATISTICS = "statistics.safetensors"


def is_run(path: str | pathlib.Path) -> bool:
    """Whether a folder is the workdir of a training run."""
    return (pathlib.Path(path) / "config.json").is_file()


def run_config(workdir: str | pathlib.Path) -> dict:
    """The config a run was started with, as plain JSON values.

    Raises:
      DataError: there is none, or it cannot be read.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise errors.DataError(f"{workdir}: no training run there ({path}: {e})") from e


def part_from_run(workdir: str | pathlib.Path, stage: str, *, ema: bool = True) -> bundle.Part:
    """The latest checkpoint of a run as a bundle part.

    Args:
      workdir: folder of `unclip train`.
      stage: what the caller expects to find there.
      ema: the moving average instead of the raw parameters.

    Raises:
      DataError: no run or no checkpoint; ConfigError: a run of another stage.
    """
    config = run_config(workdir)
    if config["stage"] != stage:
        raise errors.ConfigError(f"{workdir} is a run of stage {config['stage']!r}, not {stage!r}")
    branch = "ema" if ema else "params"
    folder = pathlib.Path(workdir) / "checkpoints"
    params = checkpoint.load_subtree(folder, (branch,))[branch]
    statistics = pathlib.Path(workdir) / STATISTICS
    return bundle.Part(
        kind=stage,
        arch=config["arch"],
        params=params,
        extra=load_file(statistics) if statistics.exists() else {},
        settings=config["task"],
    )


def open_part(path: str | pathlib.Path, name: str, *, ema: bool = True) -> bundle.Part:
    """The part `name` of a RUN or a BUNDLE.

    Args:
      path: folder; name: "clip", "prior", "decoder", "upsampler_0" or "upsampler_1".
    """
    if not pathlib.Path(path).is_dir():
        raise errors.DataError(f"{path}: no such folder; expected a training run or a bundle")
    if is_run(path):
        return part_from_run(path, name.partition("_")[0], ema=ema)
    return bundle.read_part(path, name)


def check_fit(parts: dict[str, bundle.Part]) -> None:
    """Refuses parts that cannot follow one another: sizes of embeddings and pictures.

    Raises:
      ConfigError: names the two sizes.
    """
    side = parts["decoder"].settings["image_size"] if "decoder" in parts else None
    for name in sorted(n for n in parts if n.startswith("upsampler")):
        settings = parts[name].settings
        low = settings["image_size"] // settings["factor"]
        if side is not None and low != side:
            raise errors.ConfigError(
                f"{name} takes {low}x{low} pictures, but the stage before it makes {side}x{side}"
            )
        side = settings["image_size"]
    if "clip" not in parts:
        return
    width = parts["clip"].arch["embed_dim"]
    for name in ("prior", "decoder"):
        own = parts[name].arch.get("embed_dim", width) if name in parts else width
        if own != width:
            raise errors.ConfigError(f"{name} has {own}-dimensional z_i, CLIP gives {width}")
