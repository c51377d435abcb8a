"""Files that come with unclip but are no modules: configs, the embedded emoji, CLIP's vocabulary.

In a checkout (also one installed with `pip install -e`) they lie beside the package. setup.py puts
a copy into a wheel, below `unclip/_shipped` and laid out as in the checkout.
"""

import difflib
import pathlib

from unclip import errors

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
# A wheel's own folder first: what lies beside the package there belongs to other packages.
ROOT = _PACKAGE / "_shipped" if (_PACKAGE / "_shipped").is_dir() else _PACKAGE.parent


def path(*parts: str) -> pathlib.Path:
    """Where a file is that the checkout has at `parts`, such as path("data", "emoji")."""
    return ROOT.joinpath(*parts)


def configs() -> list[str]:
    """The names of the configs: `decoder` is `configs/decoder.py`."""
    files = path("configs").glob("*.py")
    # What the configs share lies among them.
    return sorted(file.stem for file in files if "\ndef get_config(" in file.read_text("utf-8"))


def find_config(value: str) -> str:
    """A value of --config with its file as a path that exists.

    Args:
      value: FILE or NAME, also followed by :ARGUMENT. A file that exists is taken. NAME is a config
        of ours; so is configs/NAME.py where there is no such file.

    Returns:
      PATH or PATH:ARGUMENT.

    Raises:
      ConfigError: neither a file nor a config of ours; names the nearest of either.
    """
    given, colon, argument = value.partition(":")
    file = pathlib.Path(given)
    if file.is_file():
        return value
    known = configs()
    name = file.stem if file.parent == pathlib.Path("configs") and file.suffix == ".py" else given
    if name in known:
        return f"{path('configs', f'{name}.py')}{colon}{argument}"
    what = "config file" if "/" in given or file.suffix == ".py" else "config"
    beside = {file.stem: str(file) for file in file.parent.glob("*.py")}
    choices = dict(zip(known, known)) | beside
    near = difflib.get_close_matches(file.stem, choices, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(choices[stem] for stem in near)}?"
    else:
        hint = f"valid: {', '.join(known)}"
    raise errors.ConfigError(f"there is no {what} {given!r}; {hint}")
