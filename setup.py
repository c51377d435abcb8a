"""Packaging of unclip; tool settings are in pyproject.toml.

Lower bounds are the versions the tests were run with. The core needs no GPU or TPU package, no
TensorFlow and no PyTorch: those are extras.
"""

import pathlib
import re
import shutil

import setuptools
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).resolve().parent
VERSION = re.search('^__version__ = "(.+)"$', (HERE / "unclip/__init__.py").read_text(), re.M)[1]
# What a wheel needs of the checkout beside the package; unclip/files/shipped.py finds it.
SHIPPED = ("configs/*.py", "data/emoji/*.tar", "third_party/*/*")

REQUIRES = [
    "absl-py>=2.1",
    "filelock>=4.3",
    "flax>=0.12.8",
    "grain>=0.2.18",
    "jax>=0.10.2,<0.13",
    "jinja2>=3.1",
    "matplotlib>=3.10",
    "ml_collections>=1.1",
    "ml_dtypes>=0.5",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=12.0",
    "protobuf>=5.29",
    "safetensors>=0.6",
    "tensorboardX>=2.6.4",
    "tokenizers>=0.22",
    "tqdm>=4.67",
    "webdataset>=1.0.2",
]
EXTRAS = {
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "cuda": ["jax[cuda13]>=0.10.2,<0.13"],
    "data": [
        "array-record>=0.8",
        "fsspec[http]>=2026.9",
        "simplejpeg>=1.9",
        "tensorflow-datasets>=4.9.10",
    ],
    "studio": ["gradio>=6.31"],
    "tracking": ["wandb>=0.22"],
    "test": ["pytest>=8.4", "pytest-xdist>=3.8", "scipy>=1.15", "setuptools>=70.1"],
    "compile": ["libtpu>=0.0.50"],
    "parity": ["diffusers>=0.42", "ftfy>=6.3", "sentencepiece>=0.2", "transformers>=5.0"],
}
EXTRAS["dev"] = [*EXTRAS["test"], *EXTRAS["data"], "ruff>=0.17,<0.18"]


class BuildPy(build_py):
    """Copies SHIPPED below unclip/_shipped of what is built."""

    def run(self):
        if self.editable_mode:  # the checkout itself is used
            return super().run()
        package = pathlib.Path(self.build_lib).resolve() / "unclip"
        if package != HERE / "unclip":
            # Modules that have moved since an earlier build in this folder are no part of a wheel.
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        for pattern in SHIPPED:
            for file in HERE.glob(pattern):
                copy = package / "_shipped" / file.relative_to(HERE)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


setuptools.setup(
    name="unclip",
    version=VERSION,
    description="unCLIP (DALL-E 2) in JAX/Flax: training, sampling and evaluation of the cascade",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["unclip", "unclip.*"]),
    package_data={"unclip.files": ["templates/*.html"]},
    cmdclass={"build_py": BuildPy},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["unclip=unclip.cli:main"]},
)
