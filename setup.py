"""Packaging of unclip; tool settings are in pyproject.toml.

Lower bounds are the versions the tests were run with. The core needs no GPU or TPU package, no
TensorFlow and no PyTorch: those are extras.
"""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent

REQUIRES = [
    "absl-py>=2.1",
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
    "psutil>=7.0",
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
    "test": ["pytest>=8.4", "pytest-xdist>=3.8", "scipy>=1.15"],
    "compile": ["libtpu>=0.0.50"],
    "parity": ["diffusers>=0.42", "ftfy>=6.3", "sentencepiece>=0.2", "transformers>=5.0"],
}
EXTRAS["dev"] = [*EXTRAS["test"], *EXTRAS["data"], "ruff>=0.17,<0.18"]

setuptools.setup(
    name="unclip",
    version="0.1.0",
    description="unCLIP (DALL-E 2) in JAX/Flax: training, sampling and evaluation of the cascade",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["unclip", "unclip.*"]),
    package_data={"unclip.files": ["templates/*.html"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["unclip=unclip.cli:main"]},
)
