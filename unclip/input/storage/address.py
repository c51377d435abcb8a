"""Addresses of shards: which protocols are supported, and how an address may be shown.

No address is run as a command, and no chain of addresses or protocol outside the list is opened.
"""

import os
import re

from unclip.errors import ConfigError, unknown
from unclip.files import paths

# Protocol -> the package that fsspec needs for it.
PROTOCOLS = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
    "oci": "ocifs",
    "memory": "fsspec",
    "file": "",
}

COUNTERS = ("requests", "retries", "bytes", "cache_hits", "cache_misses", "cache_errors")


def shown(path: str) -> str:
    """An address for errors and logs: without password and signature."""
    return re.sub(r"//[^/@]*@", "//", path).split("?")[0] if "://" in path else path


def protocol(path: str) -> str:
    """The lower-case protocol of an address, "" of a plain path; ConfigError for anything else."""
    if path.lower().lstrip().startswith("pipe:"):
        raise ConfigError(
            f"shards {path!r}: a command is never run; copy the shards or give their "
            "paths or addresses"
        )
    if "::" in path:
        raise ConfigError(f"shards {shown(path)!r}: chains of addresses (`::`) are not supported")
    name, separator, _ = path.partition("://")
    if not separator:
        return ""
    if name.lower() not in PROTOCOLS:
        raise unknown("protocol of shards", name, PROTOCOLS)
    return name.lower()


def entries(pattern: str) -> list[str]:
    """The paths, globs and addresses that one entry of a list of shards names, at least one.

    `a.tar,b-{0,1}.tar` is two; `~` at the beginning of a path is the home folder. A file whose name
    has commas is one, and so is an address whose parts are no addresses (commas of a signature).
    """
    parts = [pattern] if os.path.exists(pattern) else paths.listed(pattern)
    if not parts or ("://" in pattern and not all("://" in part for part in parts)):
        parts = [pattern]
    return paths.expanded(parts)


def local(path: str) -> str:
    """The path of a local address, without `file://`."""
    return path.partition("://")[2] if "://" in path else path
