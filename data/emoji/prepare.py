"""Fluent Emoji 3D with Unicode names as image-caption shards: the embedded data set.

The pictures come from one npm package, their names and keywords from another; both are pinned by
SHA-256. Every picture is composed on white, encoded as lossy WebP and written with webdataset's
TarWriter as `key.webp`, `key.txt` (caption) and `key.json`. No time stamp, user or random number
enters a shard, so the same packages and the same libwebp give the same bytes again.

  python data/emoji/prepare.py                        rebuild the shards in data/emoji
  python data/emoji/prepare.py --check                rebuild elsewhere and compare with data/emoji
  python data/emoji/prepare.py --packages DIR         use tarballs that were downloaded before
  python data/emoji/prepare.py --scenes 10000 --size 64 --out DIR     compose captioned scenes

The data set is small enough to be part of a repository.
"""

import argparse
import hashlib
import io
import json
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import webdataset
from PIL import Image
from tqdm import tqdm

from unclip.errors import ConfigError, DataError, UnclipError
from unclip.protocols import scenes

HERE = pathlib.Path(__file__).resolve().parent
PICTURES = (
    "@lobehub/fluent-emoji-3d@1.1.0",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
NAMES = (
    "emojibase-data@17.0.0",
    "emojibase-data-17.0.0.tgz",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)

# Quality 77 is the highest that keeps all shards, tar padding included, under 19.5 MB.
WEBP = {"format": "WEBP", "quality": 77, "method": 6}
SAMPLES_A_SHARD = 1000
# The salt was chosen so that each group has held-out pictures and no object of a scene is one.
SPLIT_SALT = b"unclip emoji split 384/"
HELD_OUT_PER_MILLE = 50
TONES = {1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}
TONE_POINTS = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


def fetch(package: tuple[str, str, str], folder: pathlib.Path | None) -> bytes:
    """The bytes of a package's tarball, checked against its SHA-256.

    Args:
      package: (npm specifier, file name of the tarball, SHA-256 in hex).
      folder: where the tarball already is; None fetches it with `npm pack`.

    Raises:
      DataError: the tarball is missing, cannot be fetched or is not the pinned one.
    """
    specifier, file_name, expected = package
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            command = ["npm", "pack", specifier, "--silent", "--pack-destination", scratch]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
            except FileNotFoundError as error:
                raise DataError(
                    f"npm is not installed, so {specifier} cannot be fetched; put {file_name} in "
                    "a folder and name it with --packages"
                ) from error
            except subprocess.TimeoutExpired as error:
                raise DataError(f"npm pack {specifier} took longer than 600 s") from error
            except subprocess.CalledProcessError as error:
                reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
                raise DataError(f"npm pack {specifier} failed: {reason}") from error
        path = (folder or pathlib.Path(scratch)) / file_name
        if not path.is_file():
            raise DataError(f"{path} does not exist; expected the tarball of {specifier}")
        content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(f"{path}: SHA-256 is {found}, expected {expected} for {specifier}")
    return content


def members(tarball: bytes, prefix: str) -> dict[str, bytes]:
    """Regular files of a gzipped tar whose name starts with `prefix`; nothing is extracted."""
    with tarfile.open(fileobj=io.BytesIO(tarball), mode="r:gz") as archive:
        return {
            entry.name.removeprefix(prefix): archive.extractfile(entry).read()
            for entry in archive
            if entry.isfile() and entry.name.startswith(prefix)
        }


def points(text: str) -> list[str]:
    """Code points of a file name or hexcode: lower case, no leading zeros, no FE0F, no tag end.

    The packages disagree on all of these ("0039-fe0f-20e3" and "39-fe0f-20e3" are both there, the
    flag of England has underscores and no E007F), and none of them changes which emoji it is.
    """
    parts = [f"{int(part, 16):x}" for part in re.split("[-_]", text)]
    return [part for part in parts if part not in ("fe0f", "e007f")]


def base(code_points: list[str]) -> str:
    """The code points that an emoji shares with its variants of skin tone, gender and direction.

    Such variants are near copies of one picture, so the split must keep them together.
    """
    kept = [part for part in code_points if part not in TONE_POINTS]
    text = "-".join("1f9d1" if part in ("1f468", "1f469") else part for part in kept)
    return re.sub("-200d-(2640|2642|27a1)", "", text)


def caption(name: str, keywords: Iterable[str]) -> str:
    """The CLDR name and then the keywords with words that the name does not have.

    >>> caption("flag: Japan", ["JP", "flag"])
    'flag, Japan, JP'
    """
    name = name.replace(": ", ", ")
    words = set(re.findall(r"\w+", name.lower()))
    extra = [k for k in keywords if not set(re.findall(r"\w+", k.lower())) <= words]
    return ", ".join([name, *extra])


def annotations(package: dict[str, bytes]) -> dict[tuple[str, ...], dict]:
    """Code points (without FE0F) -> name, keywords, group, subgroup, skin tones and base."""
    messages = json.loads(package["en/messages.json"])
    groups = {entry["order"]: entry["message"] for entry in messages["groups"]}
    subgroups = {entry["order"]: entry["message"] for entry in messages["subgroups"]}
    table = {}
    for parent in json.loads(package["en/data.json"]):
        for entry in [parent, *parent.get("skins", [])]:
            tone = entry.get("tone")
            tones = [tone] if isinstance(tone, int) else tone or []
            table[tuple(points(entry["hexcode"]))] = {
                "base": base(points(parent["hexcode"])),
                "name": entry["label"],
                "keywords": parent.get("tags", []),
                "group": groups.get(parent.get("group")),
                "subgroup": subgroups.get(parent.get("subgroup")),
                "skin_tone": [TONES[tone] for tone in tones] or None,
            }
    return table


def on_white(picture: bytes) -> bytes:
    """An RGBA picture composed on white, as lossy WebP without metadata."""
    rgba = Image.open(io.BytesIO(picture)).convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    encoded = io.BytesIO()
    white.convert("RGB").save(encoded, **WEBP)
    return encoded.getvalue()


def samples(packages: pathlib.Path | None) -> list[dict]:
    """Every picture with its annotation, not yet encoded, in the order of the shards.

    The order is by the SHA-256 of the key, so that any shard, and any part of one, is a random
    sample of the whole, also for a reader that streams without shuffling.
    """
    pictures = members(fetch(PICTURES, packages), "package/assets/")
    table = annotations(members(fetch(NAMES, packages), "package/"))
    found, seen = [], {}
    for file_name, picture in sorted(pictures.items()):
        key = file_name.removesuffix(".webp").replace("_", "-")
        entry = table.get(tuple(points(key)))
        if entry is None:
            raise DataError(f"{file_name} of {PICTURES[0]} has no name in {NAMES[0]}")
        # One picture is stored under two names ("cat face", "grinning cat"): it keeps one base.
        shared = seen.setdefault(hashlib.sha256(picture).digest(), entry["base"])
        found.append({"key": key, "picture": picture, **entry, "base": shared})
    return sorted(found, key=lambda sample: hashlib.sha256(sample["key"].encode()).digest())


def is_held_out(base_points: str) -> bool:
    """Whether an emoji and its variants are held out: a function of its code points alone."""
    digest = hashlib.sha256(SPLIT_SALT + base_points.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PER_MILLE


def encode(sample: dict) -> dict:
    """A webdataset sample: `key.webp`, `key.txt` and `key.json`, all bytes."""
    record = {"code_points": sample["key"]}
    fields = ("base", "name", "keywords", "group", "subgroup", "skin_tone")
    record |= {field: sample[field] for field in fields}
    return {
        "__key__": sample["key"],
        "webp": on_white(sample["picture"]),
        "txt": caption(sample["name"], sample["keywords"]).encode(),
        "json": json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode(),
    }


def write_shards(out: pathlib.Path, name: str, items: Iterator[dict], total: int) -> list:
    """Write `total` samples as `name-0000.tar` … of equal size; -> their paths."""
    count = -(-total // SAMPLES_A_SHARD)
    paths = []
    for shard in range(count):
        paths.append(out / f"{name}-{shard:04d}.tar")
        size = total * (shard + 1) // count - total * shard // count
        with paths[-1].open("wb") as stream:
            # Every field that could differ between two machines is fixed.
            writer = webdataset.TarWriter(stream, user="", group="", mode=0o644, mtime=0)
            with writer:
                for _ in range(size):
                    writer.write(next(items))
    return paths


def counted(items: Iterable[dict], bar: tqdm) -> Iterator[dict]:
    """The same items; each moves the progress bar by one."""
    for item in items:
        yield item
        bar.update()


def write_pictures(out: pathlib.Path, packages: pathlib.Path | None) -> list[pathlib.Path]:
    """Write `train-*.tar` and `held-out-*.tar` into `out`; -> their paths."""
    everything = samples(packages)
    held_out = [sample for sample in everything if is_held_out(sample["base"])]
    train = [sample for sample in everything if not is_held_out(sample["base"])]
    paths = []
    with ThreadPoolExecutor() as pool, tqdm(total=len(everything), unit="picture") as bar:
        for name, part in (("train", train), ("held-out", held_out)):
            paths += write_shards(out, name, counted(pool.map(encode, part), bar), len(part))
    return paths


def check(packages: pathlib.Path | None) -> None:
    """Rebuild the shards in a scratch folder and compare them byte for byte with the ones here.

    Raises:
      DataError: a shard differs, is missing or should not be there.
    """
    with tempfile.TemporaryDirectory() as scratch:
        rebuilt = {p.name: p.read_bytes() for p in write_pictures(pathlib.Path(scratch), packages)}
    here = {path.name: path.read_bytes() for path in HERE.glob("*.tar")}
    wrong = sorted(name for name in rebuilt | here if rebuilt.get(name) != here.get(name))
    if wrong:
        raise DataError(
            f"{', '.join(wrong)} in {HERE} differ from a rebuild; expected equal bytes "
            "(another libwebp also changes them: README.md names the one that was used)"
        )
    print(f"{len(here)} shards, {sum(map(len, here.values()))} bytes: equal to the rebuild")


def write_scenes(out: pathlib.Path, count: int, size: int, seed: int, withheld: bool) -> list:
    """Write `count` scenes of `size`² pixels as `scenes-*.tar` or `withheld-*.tar`."""
    composer = scenes.Composer(HERE, size=size, seed=seed, withheld=withheld)
    with ThreadPoolExecutor() as pool:
        # In blocks, because `map` would otherwise compose everything before the first write.
        blocks = (range(i, min(i + 256, count)) for i in range(0, count, 256))
        items = (sample for block in blocks for sample in pool.map(composer.sample, block))
        bar = tqdm(items, total=count, unit="scene")
        return write_shards(out, "withheld" if withheld else "scenes", iter(bar), count)


def main(argv: list[str]) -> None:
    """Parse the command line and do what it asks; the module docstring has examples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=pathlib.Path, help=f"folder for the shards (default {HERE})")
    add("--packages", type=pathlib.Path, help="folder with the two npm tarballs")
    add("--check", action="store_true", help="compare a rebuild with the shards in data/emoji")
    add("--scenes", type=int, metavar="N", help="compose N scenes from the shards in data/emoji")
    add("--size", type=int, default=64, help="side of a scene in pixels")
    add("--seed", type=int, default=0, help="scenes are a function of (seed, index)")
    add("--withheld", action="store_true", help="only scenes with a combination never trained on")
    args = parser.parse_args(argv)
    if args.check:
        return check(args.packages)
    if args.scenes is None:
        if args.withheld:
            raise ConfigError("--withheld is given without --scenes N")
        args.out = args.out or HERE
    else:
        if args.out is None:
            raise ConfigError("--scenes needs --out DIR: scenes are not kept in data/emoji")
        if args.scenes < 1:
            raise ConfigError(f"--scenes is {args.scenes}, expected at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.scenes is None:
        paths = write_pictures(args.out, args.packages)
    else:
        paths = write_scenes(args.out, args.scenes, args.size, args.seed, args.withheld)
    print(f"{len(paths)} shards, {sum(p.stat().st_size for p in paths)} bytes in {args.out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UnclipError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
