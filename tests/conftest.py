"""Every test sees 8 simulated CPU devices; compiled programs are kept between runs."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

CACHE = pathlib.Path(__file__).resolve().parents[1] / ".cache" / "jax-tests"

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
