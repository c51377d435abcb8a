"""A training run on disk: its config, and its latest checkpoint as a part of the cascade.

Later stages take their frozen CLIP from the run of an earlier one, and `unclip export` gathers
runs into a bundle; both accept a run's workdir and a bundle's folder alike.
"""

import json
import pathlib
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from unclip import errors, files, tasks
from unclip.cascade import bundle
from unclip.models import t5
from unclip.runtime import checkpoint, sharding

STATISTICS = "statistics.safetensors"
TRAINED_WITH = "trained_with.json"


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
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise errors.DataError(f"{workdir}: no training run there ({path}: {e})") from e
    if not isinstance(config, dict) or not {"stage", "arch", "task"} <= config.keys():
        raise errors.DataError(f"{workdir}: no training run there ({path} is another file)")
    # Fields of older versions under their names of today.
    config["task"] = tasks.current_names(config["task"])
    if "weights" in config.get("input", {}):
        config["input"]["proportions"] = config["input"].pop("weights")
    return config


def read_prior_statistics(
    path: str | pathlib.Path, clip_hash: str | None = None
) -> dict[str, np.ndarray]:
    """What a prior measured of z_i before it was trained.

    Args:
      clip_hash: `bundle.space` of the CLIP it must have been measured with; None takes any.

    Raises:
      DataError: the file is damaged or cannot be read; ConfigError: it belongs to another CLIP.
    """
    statistics, measured = _read_statistics(path)
    if clip_hash is not None and measured != clip_hash:
        raise errors.ConfigError(
            f"{path} was measured with another CLIP ({str(measured)[:12]}, now {clip_hash[:12]}): "
            "choose another --workdir, or go back to that CLIP"
        )
    return statistics


def read_partial(path: str | pathlib.Path, space: str) -> dict[str, np.ndarray]:
    """What `write_prior_statistics` wrote of the same space; empty where there is nothing of it."""
    try:
        found, of = _read_statistics(path)
    except errors.DataError:
        return {}
    return found if of == space else {}


def _read_statistics(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], str | None]:
    try:
        with safetensors.safe_open(path, "np") as file:
            measured = (file.metadata() or {}).get("clip")
            return {name: file.get_tensor(name) for name in file.keys()}, measured  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as e:
        raise errors.DataError(f"cannot read {path}: {e}; delete it to measure again") from e


def write_prior_statistics(
    path: str | pathlib.Path, statistics: dict[str, np.ndarray], clip_hash: str
) -> None:
    """Writes what `read_prior_statistics` reads, atomically.

    Raises:
      DataError: the disk is full or cannot be written.
    """
    with files.replacing(path) as temporary:
        try:
            save_file(statistics, temporary, {"clip": clip_hash})
        except safetensors.SafetensorError as e:  # its own type, for a full disk too
            raise errors.DataError(f"cannot write {path}: {e}") from e


def lineage(path: str | pathlib.Path, name: str) -> dict[str, Any]:
    """{"trained_with", "mixed_spaces"} of the part `name` of a RUN or a BUNDLE: fields of
    `bundle.Part`, empty where nothing is known.

    Raises:
      ConfigError: no such part; DataError: the record is damaged.
    """
    _folder(path)
    if not is_run(path):
        describe_part(path, name)
        record = bundle.describe(path)["parts"][name]
        return {
            "trained_with": dict(record.get("trained_with", {})),
            "mixed_spaces": tuple(record.get("mixed_spaces", ())),
        }
    file, statistics = pathlib.Path(path) / TRAINED_WITH, pathlib.Path(path) / STATISTICS
    found = {"trained_with": {}, "mixed_spaces": []}
    if file.exists():
        found |= files.read_object(file)
        kinds = isinstance(found["trained_with"], dict) and isinstance(found["mixed_spaces"], list)
        if not kinds or not all(isinstance(v, str) for v in found["trained_with"].values()):
            raise errors.DataError(f"{file} is damaged: it does not say what was trained with what")
    elif statistics.exists():  # a run older than the record, whose statistics name their CLIP
        _, clip = _read_statistics(statistics)
        found["trained_with"] = {"clip": clip} if clip else {}
    return {
        "trained_with": found["trained_with"], "mixed_spaces": tuple(found["mixed_spaces"]),
    }  # fmt: skip


def write_lineage(workdir: str | pathlib.Path, found: dict[str, Any]) -> None:
    """Writes what `lineage` reads of a RUN, atomically.

    Raises:
      DataError: it cannot be written.
    """
    files.write_object(pathlib.Path(workdir) / TRAINED_WITH, found)


def part_from_run(
    workdir: str | pathlib.Path, name: str, *, ema: bool = True, step: int | None = None
) -> bundle.Part:
    """A checkpoint of a run as a bundle part.

    Args:
      workdir: folder of `unclip train`.
      name: of the part that the caller expects to find there.
      ema: the moving average instead of the raw parameters.
      step: of the checkpoint; None: the latest.

    Raises:
      DataError: no run or no checkpoint; ConfigError: a run of another stage.
    """
    arch, settings = describe_part(workdir, name)
    branch = "ema" if ema else "params"
    folder = pathlib.Path(workdir) / "checkpoints"
    params = checkpoint.load_subtree(folder, (branch,), step=step)[branch]
    extra = statistics_of(workdir)
    return bundle.Part(name, arch, params, extra, settings, **lineage(workdir, name))


def open_part(path: str | pathlib.Path, name: str, *, ema: bool = True) -> bundle.Part:
    """The part `name` of a RUN or a BUNDLE.

    Args:
      path: folder; name: one of `bundle.KINDS`. No run trains a T5: of a decoder's run, "t5" is
        the part that it was trained with.
    """
    _folder(path)
    if is_run(path) and name == "t5":
        trained_with = run_config(path).get("t5")
        if trained_with in (None, "", "random"):
            raise errors.ConfigError(
                f"{path} was not trained with a T5 that was kept; give the BUNDLE of one "
                "(unclip convert --from t5)"
            )
        return open_part(trained_with, "t5")
    if is_run(path):
        return part_from_run(path, name, ema=ema)
    return bundle.read_part(path, name)


def _folder(path: str | pathlib.Path) -> None:
    if not pathlib.Path(path).is_dir():
        raise errors.DataError(f"{path}: no such folder; expected a training run or a bundle")


def describe_part(path: str | pathlib.Path, name: str) -> tuple[dict, dict]:
    """(arch, settings) of the part `name` of a RUN or a BUNDLE, without its tensors.

    Raises:
      DataError: nothing to read there; ConfigError: it holds no such part.
    """
    _folder(path)
    if is_run(path):
        config = run_config(path)
        if config["stage"] != tasks.stage_of(name):
            raise errors.ConfigError(f"{path} is a run of stage {config['stage']!r}, not {name!r}")
        return config["arch"], config["task"]
    parts = bundle.describe(path)["parts"]
    if name not in parts:
        raise errors.ConfigError(
            f"{path} has no part {name!r}: it holds {', '.join(sorted(parts)) or 'nothing'}"
        )
    return parts[name]["arch"], tasks.current_names(parts[name]["settings"])


def part_shapes(path: str | pathlib.Path, name: str) -> dict[str, Any]:
    """{path of a parameter: leaf with .shape} of the part `name` of a RUN or a BUNDLE, not read.

    Raises:
      DataError: nothing to read there; ConfigError: it holds no such part.
    """
    _folder(path)
    if is_run(path):
        leaves = checkpoint.stored(pathlib.Path(path) / "checkpoints")[1]
        branch = "ema/"
        return {n.removeprefix(branch): v for n, v in leaves.items() if n.startswith(branch)}
    part = bundle.read(path, [name], verify=False, lazy=True).parts[name]
    return sharding.tree_paths(part.params)


def settings_of(path: str | pathlib.Path) -> dict[str, dict]:
    """{part: settings} of what a BUNDLE holds; {} of a RUN, which holds one stage alone."""
    _folder(path)
    if is_run(path):
        return {}
    parts = bundle.describe(path)["parts"]
    return {name: tasks.current_names(part["settings"]) for name, part in parts.items()}


def statistics_of(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """What the prior of a RUN or a BUNDLE knows of z_i; {} where it was kept without."""
    _folder(path)
    if is_run(path):
        file = pathlib.Path(path) / STATISTICS
        return read_prior_statistics(file) if file.exists() else {}
    extra = bundle.read(path, ["prior"], lazy=True).parts["prior"].extra
    return {name: np.asarray(value) for name, value in extra.items()}


def check_fit(parts: dict[str, bundle.Part]) -> None:
    """Refuses parts that cannot follow one another: sizes of embeddings and pictures.

    Raises:
      ConfigError: names the two sizes.
    """
    side = parts["decoder"].settings["image_size"] if "decoder" in parts else None
    # "upsampler_0_last" is the same stage's second network, not a stage.
    for name in sorted(n for n in parts if n in ("upsampler_0", "upsampler_1")):
        settings = parts[name].settings
        low = settings["image_size"] // settings["factor"]
        if side is not None and low != side:
            raise errors.ConfigError(
                f"{name} takes {low}x{low} pictures, but the stage before it makes {side}x{side}"
            )
        side = settings["image_size"]
    if {"t5", "decoder"} <= parts.keys() and parts["decoder"].settings.get("text_encoder") == "t5":
        read = parts["decoder"].params["text_proj"]["text_tokens"]["kernel"].shape[0]
        given = parts["t5"].arch.get("width", t5.T5Encoder.width)
        if read != given:
            raise errors.ConfigError(f"the decoder reads {read} features a token, T5 gives {given}")
    if "clip" not in parts:
        return
    clip = parts["clip"].arch
    for name in sorted({"prior", "decoder"} & parts.keys()):
        own = _widths(parts[name])
        for what, field in (("z_i", "embed_dim"), ("hidden states", "text_width")):
            if field == "text_width" and not clip.get("text_layers"):
                continue  # a CLIP without that tower gives none
            if own.get(field, clip[field]) != clip[field]:
                raise errors.ConfigError(
                    f"{name} has {own[field]}-dimensional {what}, CLIP gives {clip[field]}: "
                    f"expected the CLIP that the {name} was trained with"
                )


# Layers of a decoder's `text_proj` -> the field of CLIP that they are as wide as.
_READS = {"image_time": "embed_dim", "text_time": "embed_dim", "text_tokens": "text_width"}


def _widths(part: bundle.Part) -> dict[str, int]:
    """{field of CLIP: its value} as a part reads it, by its architecture or else its parameters."""
    found = {name: part.arch[name] for name in _READS.values() if part.arch.get(name)}
    for name, layer in part.params.get("text_proj", {}).items():
        of_t5 = name == "text_tokens" and part.settings.get("text_encoder") == "t5"
        if name in _READS and not of_t5:
            found[_READS[name]] = layer["kernel"].shape[0]
    return found
