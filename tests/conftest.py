"""Every test sees 8 simulated CPU devices; compiled programs are kept between runs.

Programs are compiled with hardly any optimisation, since compiling is most of what tests do: a
module of which that is not true asks for `optimised`. Between modules JAX's caches are emptied.
"""

import contextlib
import ctypes
import fcntl
import gc
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's older way to generate code for fusions compiles in half the time.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

# Of the processes that tests start too, none of which may write to the user's folder of caches.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    pathlib.Path(__file__).resolve().parents[1] / ".cache" / "jax-tests"
)

import jax
import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_disable_most_optimizations", True)
# Tests of rooms that leave [B] + [A, B] to NumPy's rules; elsewhere it is an error.
PROMOTING = (
    "test_kandinsky.py",
    "test_embedded.py",
)


@pytest.fixture(scope="module", autouse=True)
def caches(request):
    """Programs of other modules go: they hold memory, and the setting they were compiled under."""
    parts = {*request.path.relative_to(ROOT / "tests").parts}
    promoting = bool({*PROMOTING, "parity"} & parts)
    jax.config.update("jax_numpy_rank_promotion", "allow" if promoting else "raise")
    jax.config.update("jax_disable_most_optimizations", "parity" not in parts)
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":  # or the allocator keeps what was freed
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module")
def optimised(caches):
    """Programs as users run them, for a module that computes more than it compiles."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make) -> folder that make(folder) has filled, in one worker for all of them."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    shared = shared / "once"
    shared.mkdir(exist_ok=True)

    def get(name, make):
        folder = shared / name
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (shared / f"{name}.done").exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that died
                folder.mkdir()
                make(folder)
                (shared / f"{name}.done").touch()
        return folder

    return get


# ============================================================ micro runs of every stage, made once

COLOURS = {"red": (220, 30, 20), "green": (20, 180, 40), "blue": (30, 60, 230)}
SHAPES = ("square", "bar", "dot")


def write_shard(path, count, first=0, *, captions=True):
    """A webdataset tar of `count` 32 x 32 pictures of coloured shapes with their captions."""
    rng = np.random.default_rng(first)
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            colour, shape = list(COLOURS)[number % 3], SHAPES[number // 3 % 3]
            picture = np.full((32, 32, 3), 255 - number % 7, np.uint8)
            top, left = rng.integers(0, 16, 2)
            height, width = {"square": (16, 16), "bar": (6, 16), "dot": (5, 5)}[shape]
            picture[top : top + height, left : left + width] = COLOURS[colour]
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "PNG")
            members = {"png": file.getvalue(), "json": json.dumps({"name": colour}).encode()}
            if captions:
                members["txt"] = f"a {colour} {shape}, number {number}".encode()
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture(scope="session")
def shard_writer():
    """`write_shard`, for tests that need another shard."""
    return write_shard


@pytest.fixture(scope="session")
def shards(once):
    """{"train": 24 samples, "held_out": 8} as paths of tars."""

    def make(folder):
        write_shard(folder / "train-0000.tar", 24)
        write_shard(folder / "held-out-0000.tar", 8, first=100)

    folder = once("shards", make)
    return {
        "train": str(folder / "train-0000.tar"),
        "held_out": str(folder / "held-out-0000.tar"),
    }


CASCADE = ("clip", "prior", "decoder", "upsampler_0", "upsampler_1")
# Sizes of the micro cascade: 8 -> 16 -> 32 pixels, CLIP at 16.
_UNET = {
    "channels": 16,
    "multipliers": (1,),
    "blocks": 1,
    "head_dim": 16,
    "groups": 8,
    "time_dim": 32,
}
MICRO = {
    "clip": {
        "embed_dim": 16,
        "image_size": 16,
        "patch_size": 8,
        "vision_width": 16,
        "vision_layers": 1,
        "vision_heads": 2,
        "text_width": 16,
        "text_layers": 1,
        "text_heads": 2,
        "context": 16,
    },
    "prior": {
        "embed_dim": 16,
        "context": 16,
        "text_width": 16,
        "width": 32,
        "layers": 1,
        "heads": 2,
        "head_dim": 16,
    },
    "decoder": _UNET | {"attention": (True,), "context_dim": 32},
    "upsampler": _UNET | {"attention": (False,), "patch": 2},
}


@pytest.fixture(scope="session")
def tiny_config(shards):
    """tiny_config(stage, {"dotted.field": value}, arg="emoji,runlocal") -> a two-step config."""
    import importlib

    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))

    def make(stage, changes=(), arg="emoji,runlocal"):
        config = importlib.import_module(f"configs.{stage}").get_config(arg)
        fields = {f"arch.{name}": value for name, value in MICRO[stage].items()}
        fields |= {
            "input.shards": (shards["train"],),
            "input.held_out": (),
            "input.threads": 1,
            "tensorboard": False,
            "save_steps": 1000,
            "eval_steps": 0,
            "sample_examples": 0,
        }
        if stage == "decoder":
            fields |= {"task.image_size": 8, "task.draw.steps": 2}
        if stage == "prior":
            fields |= {"task.draw.steps": 2, "statistics_examples": 24}
        if stage == "upsampler":
            second = arg.startswith("emoji-256")
            fields |= {
                "task.image_size": 32 if second else 16,
                "task.factor": 2,
                "task.crop": 8,
                "task.draw.steps": 2,
            }
        config.update_from_flattened_dict(fields | dict(changes))
        return config

    return make


@contextlib.contextmanager
def cheaply():
    """Trains on one device: on eight, orbax slices each replicated array eight ways to save it.

    Programs that take 0.1 s to compile are kept, since the runs repeat them.
    """
    from unclip.runtime import sharding

    real = sharding.make_mesh
    ranks = jax.config.jax_numpy_rank_promotion
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs

    def one_device(spec=None, devices=None):
        whole = {"data": -1, "fsdp": 1, "tensor": 1}
        free = devices is None and (spec is None or dict(spec) == whole)
        return real({"data": 1}, jax.devices()[:1]) if free else real(spec, devices)

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    sharding.make_mesh = one_device
    jax.config.update("jax_numpy_rank_promotion", "allow")
    try:
        yield
    finally:
        jax.config.update("jax_numpy_rank_promotion", ranks)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
        sharding.make_mesh = real


@pytest.fixture(scope="module")
def quick_compiles():
    """Cheap compiles for a module of tests/parity; all others have them."""
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def cheap_runs():
    """Training on one device unless the config asks for a mesh."""
    with cheaply():
        yield


@pytest.fixture(scope="session")
def run_of(tiny_config, once):
    """run_of(name): workdir of a run of two steps, trained at the first request of any worker.

    Names: clip, prior, decoder, upsampler_0 (8 to 16), upsampler_1 (16 to 32).
    """

    def get(name):
        def make(folder):
            from unclip.training.start import train

            stage = name.partition("_")[0]
            changes = {"clip": get("clip")} if stage in ("prior", "decoder") else {}
            arg = "emoji-256,runlocal" if name == "upsampler_1" else "emoji,runlocal"
            with cheaply():
                train(tiny_config(stage, changes, arg), str(folder / name))

        return str(once(f"run-{name}", make) / name)

    return get


@pytest.fixture(scope="session")
def bundle_dir(run_of, once):
    """A bundle of the five micro runs, as `unclip export` writes it."""

    def make(folder):
        from unclip.cascade import bundle, runs

        parts = {}
        for name in CASCADE:
            parts[name] = runs.open_part(run_of(name), name)
        runs.check_fit(parts)
        bundle.write(folder / "bundle", parts, {})

    return str(once("bundle", make) / "bundle")


# ============================================================ verbs as a user sees them

# Runs a verb once a line, each in a fork of one process that has imported everything: what the verb
# imports once its flags are read, too.
_VERB_SERVER = """
import ast, contextlib, importlib, json, os, sys, tempfile, warnings
import jax
from unclip import cli
from unclip.cascade import pipeline
for kind in (DeprecationWarning, FutureWarning, RuntimeWarning):
    warnings.simplefilter("ignore", kind)
verb = importlib.import_module("unclip.verbs." + sys.argv[1])
for node in ast.walk(ast.parse(open(verb.__file__).read())):
    if isinstance(node, ast.ImportFrom):
        for name in ["", *("." + one.name for one in node.names)]:
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(node.module + name)
for line in sys.stdin:
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    child = os.fork()
    if not child:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.argv = [f"unclip-{sys.argv[1]}", *json.loads(line)]
        try:
            cli.run_app(verb.main)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(getattr(sys.exc_info()[1], "code", 1) or 0)
    print(child, flush=True)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
    print(json.dumps([code, *texts]), flush=True)
"""


@pytest.fixture(scope="session")
def serve_verb():
    """`with serve_verb("index") as run`: run(*arguments, meanwhile=…) -> (exit code, stdout,
    stderr) without a traceback; meanwhile gets the number of the process."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    @contextlib.contextmanager
    def serve(verb):
        server = subprocess.Popen(
            [sys.executable, "-c", _VERB_SERVER, verb],
            env=environment,
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

        def run(*arguments, meanwhile=lambda process: None):
            server.stdin.write(json.dumps([str(a) for a in arguments]) + "\n")
            server.stdin.flush()
            meanwhile(int(server.stdout.readline()))
            code, out, err = json.loads(server.stdout.readline())
            assert "Traceback" not in err, err
            return code, out, err

        yield run
        server.stdin.close()
        assert server.wait(60) == 0

    return serve
