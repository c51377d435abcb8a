"""Compiled programs that the next start finds again: one folder for all verbs.

It is JAX's persistent compilation cache. What is in it is machine code that is loaded and run, so a
folder is used only if it belongs to the user who runs and nobody else may write to it; and code
made for another machine may stop with an illegal instruction, so every kind of machine and every
version of JAX has a sub-folder of its own. JAX's own key tells accelerators apart. Importing this
module does not import JAX.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import stat
import sys
import time

from unclip import errors

OFF = "off"
LEVEL = "xla_backend_optimization_level"
VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MAX_BYTES = 4 << 30  # of a sub-folder; what was not used for longest goes
UNUSED_DAYS = 60  # after which the sub-folder of another machine or version goes
MIN_COMPILE_SECONDS = 0.05  # reading a smaller program costs as much as compiling it
_UNFINISHED_S = 600.0


def keep(where: str | None = None) -> pathlib.Path | None:
    """Keeps the programs that this process and its children compile, and uses those kept before.

    To be called before the first program is compiled. JAX_COMPILATION_CACHE_DIR in the environment,
    or a folder that JAX was given already, is left as it is, unless `where` says otherwise.

    Args:
      where: a folder, made when missing; "off"; None: `default_folder`.

    Returns:
      The sub-folder in use, or None where this function set none.

    Raises:
      ConfigError: the folder `where` cannot be used. The default one is then done without, with a
        line on standard error.
    """
    if where == OFF:
        _set("jax_compilation_cache_dir", None)
        return None
    jax = sys.modules.get("jax")
    set_already = jax and jax.config.jax_compilation_cache_dir
    if where is None and (set_already or VARIABLE in os.environ):
        return None
    try:
        folder = _usable(pathlib.Path(where) if where else default_folder())
    except OSError as error:
        said = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if where:
            raise errors.ConfigError(
                f"--compilation_cache={where}: {said}; expected a folder of your own that nobody "
                f"else may write to, or {OFF}"
            ) from error
        said += f" (--compilation_cache=FOLDER moves it, --compilation_cache={OFF} is quiet)"
        print(f"unclip: compiled programs are not kept: {said}", file=sys.stderr)
        return None
    _set("jax_compilation_cache_dir", str(folder))
    _set("jax_compilation_cache_max_size", MAX_BYTES)
    _set("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return folder


def keep_at(folder: str) -> None:
    """Keeps programs in a folder of the user's choice, as it is: local or of a store, no limit."""
    _set("jax_compilation_cache_dir", folder)
    _set("jax_compilation_cache_max_size", -1)


def options() -> dict[str, int] | None:
    """`compiler_options` of `jax.jit` for programs of this process's own devices.

    On a CPU, LLVM's first level in place of its third: a third less time to compile draws and first
    parameters, which are the same bits, as fast: products and convolutions are calls of a library,
    and XLA makes its loops for vectors itself. Not for train steps, where it saves a twentieth and
    rounds otherwise. None where the user chose a level, and for other devices.
    """
    import jax

    chosen = LEVEL in os.environ.get("XLA_FLAGS", "")
    chosen = chosen or jax.config.read("jax_disable_most_optimizations")
    return None if chosen or jax.default_backend() != "cpu" else {LEVEL: 1}


def default_folder() -> pathlib.Path:
    """unclip/compiled in the user's folder of caches, by the custom of the system."""
    home = pathlib.Path(os.path.expanduser("~"))
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the standard says to ignore any other
        caches = pathlib.Path(given)
    elif sys.platform == "darwin":
        caches = home / "Library" / "Caches"
    elif os.name == "nt":
        caches = pathlib.Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        caches = home / ".cache"
    return caches / "unclip" / "compiled"


def machine() -> str:
    """A name for what a kept program depends on besides JAX's key: versions of JAX, kind of CPU and
    how many cores this process may use, as XLA divides loops among them when it compiles."""
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = [platform.machine(), platform.processor(), str(cores)]
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read(1 << 16).partition("\n\n")[0].splitlines()
        named = ("vendor_id", "model name", "flags", "Features", "CPU part")
        processor += [line for line in first if line.split("\t")[0].strip() in named]
    except OSError:  # no Linux
        pass
    digest = hashlib.sha256("\n".join(processor).encode()).hexdigest()[:12]
    return f"jax-{'-'.join(dict.fromkeys(versions))}-{platform.machine() or 'cpu'}-{digest}"


def _usable(parent: pathlib.Path) -> pathlib.Path:
    """The sub-folder for this machine, made and tidied; OSError where it cannot be used."""
    folder = parent / machine()
    for path in (parent, folder):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
        if not hasattr(os, "getuid"):
            continue
        if found.st_uid != os.getuid():
            raise OSError(0, "it belongs to another user", str(path))
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(0, "others may write to it", str(path))
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise OSError(0, "not readable and writable", str(folder))
    os.utime(folder)  # says that it is used
    _tidy(parent, folder)
    return folder


def _tidy(parent: pathlib.Path, folder: pathlib.Path) -> None:
    """Removes what a killed process left half written, and sub-folders that nobody uses now."""
    now = time.time()
    names = {entry.name: entry for entry in os.scandir(folder)}
    for name, entry in names.items():
        # JAX writes the program, then the time of its use; without it, its own tidying fails too.
        stem = name.removesuffix("-cache")
        if stem != name and f"{stem}-atime" not in names:
            _forget(entry, now)
    for entry in os.scandir(parent):
        old = entry.name.startswith("jax-") and entry.name != folder.name
        if old and entry.stat().st_mtime < now - UNUSED_DAYS * 86400:
            shutil.rmtree(entry.path, ignore_errors=True)


def _forget(entry: os.DirEntry, now: float) -> None:
    try:
        if entry.stat().st_mtime < now - _UNFINISHED_S:  # not of a process that writes it just now
            os.unlink(entry.path)
    except FileNotFoundError:
        pass


def _set(name: str, value) -> None:
    """A setting of JAX, whether it is imported already or will be, here or in a child."""
    if value is None:
        os.environ.pop(name.upper(), None)
    else:
        os.environ[name.upper()] = str(value)
    if "jax" in sys.modules:
        sys.modules["jax"].config.update(name, value)
