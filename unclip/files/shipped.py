"""Files that come with unclip but are no modules: configs, the embedded emoji, CLIP's vocabulary.

In a checkout (also one installed with `pip install -e`) they lie beside the package. setup.py puts
a copy into a wheel, below `unclip/_shipped` and laid out as in the checkout.
"""

import pathlib

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
# A wheel's own folder first: what lies beside the package there belongs to other packages.
ROOT = _PACKAGE / "_shipped" if (_PACKAGE / "_shipped").is_dir() else _PACKAGE.parent


def path(*parts: str) -> pathlib.Path:
    """Where a file is that the checkout has at `parts`, such as path("data", "emoji")."""
    return ROOT.joinpath(*parts)
