"""Scripts of `launch` as modules, found as Python finds them when they are run."""

import importlib.util
import pathlib
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


@pytest.fixture(scope="session")
def script():
    """script(name) -> the module launch/NAME.py; it is not run."""

    def load(name):
        sys.path.insert(0, str(LAUNCH))
        spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.path.remove(str(LAUNCH))
        return module

    return load
