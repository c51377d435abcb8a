"""The formats that other people's weights come in, and those that a bundle can be written in.

A format's module lists how its tensors become those of our networks; it is imported when it is
used. `unclip convert` is the verb.
"""

import importlib
import pathlib
from collections.abc import Mapping

from unclip import errors
from unclip.cascade import bundle, spaces

# Each is "module:function" of unclip.interop; a module is imported when it is used.
FROM = {
    "karlo": "karlo.folder:read",
    "kandinsky2_2-prior": "karlo.kandinsky:read",
    "openai-clip": "openai_clip:read_openai",
    "open-clip": "openai_clip:read_open_clip",
    "hf-clip": "clip:read_hf",
    "inception": "inception:read",
    "dinov2": "dinov2:read",
    "t5": "t5:read",
}
TO = {"diffusers": "karlo.folder:write", "hf-clip": "clip:write_hf"}


def read(kind: str, paths: list[pathlib.Path], preset: str | None = None) -> dict[str, bundle.Part]:
    """{name: `bundle.Part`} of another project's weights, tensors unread.

    Where stages come with their CLIP or T5, that is read once, for its hash (`cascade.spaces`).

    Args:
      kind: one of `FROM`; paths: files or folders, as the format has them.
      preset: name of an architecture, for files that do not determine it.

    Raises:
      ConfigError: unknown format, or tensors that are not the architecture's (with their table).
      DataError: a file that cannot be read.
    """
    if kind not in FROM:
        raise errors.unknown("format", kind, FROM)
    for path in paths:
        if not path.exists():
            raise errors.DataError(f"{path}: no such file or folder")
    return spaces.completed(function(FROM[kind])(paths, {"preset": preset}))


def write(kind: str, parts: Mapping[str, bundle.Part], out: pathlib.Path) -> None:
    """Writes parts in another project's layout.

    Raises:
      ConfigError: unknown format, a missing part, or an architecture the format cannot hold.
      DataError: the folder is not empty or cannot be written.
    """
    if kind not in TO:
        raise errors.unknown("format", kind, TO)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise errors.DataError(f"{out} exists and is not an empty folder")
    function(TO[kind])(parts, out)


def function(place: str):
    """The function that an entry of `FROM` or `TO` names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"unclip.interop.{module}"), name)
