"""Pictures per second: ours, webdataset with torch's DataLoader at the same work, and the limit.

    python benchmarks/input.py --rounds 3 --seconds 3

Two cases: pictures of 256 pixels to crops of 64, and of 512 to crops of 256. The contenders take
turns, each in a fresh process pinned to one core (or to --cores), on the same tar of synthetic
JPEGs as img2dataset writes them (quality 95, 4:2:0, a third wider than high): read, decode, centre
crop, Pillow's antialiased bicubic resize, CLIP's tokens, a batch of 64. The limit is a loop that
reads, decodes by libjpeg-turbo and resizes, without captions or batches; a second one has captions.
Prints a table of medians, the ratios, and the memory (PSS) of each process. The peers decode as
webdataset does, by Pillow at full size, and a second time with Pillow's reduced decode, which
webdataset does not do by itself. --out FILE.json keeps the ratios for docs/speed.md.
"""

import argparse
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import record

ROOT = record.ROOT

CASES = {"256-64": (256, 64), "512-256": (512, 256)}
BATCH, CONTEXT, SHARDS = 64, 77, 10
WORDS = [
    "a",
    "an",
    "the",
    "of",
    "in",
    "on",
    "with",
    "red",
    "blue",
    "small",
    "large",
    "old",
    "young",
    "photo",
    "painting",
    "drawing",
    "dog",
    "cat",
    "horse",
    "fox",
    "house",
    "street",
    "river",
    "snow",
    "mountain",
    "forest",
    "woman",
    "man",
    "child",
    "running",
    "sitting",
    "sunny",
    "evening",
    "portrait",
    "landscape",
    "oil",
    "watercolour",
    "vintage",
    "poster",
    "number",
]


def picture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3] with a photograph's falling spectrum, and a few edges.

    At quality 95 it takes about 3.5 bits per pixel, as photographs of that size do (3.0 to 4.2).
    """
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1

    def layer(slope):
        phases = np.exp(2j * np.pi * rng.random(frequency.shape))
        found = np.fft.irfft2(phases / frequency**slope, s=(height, width))
        return found / found.std()

    light = layer(1.45)
    image = np.stack([light + 0.3 * layer(1.7) for _ in range(3)], -1)
    y, x = np.mgrid[0:height, 0:width] / height
    for _ in range(6):
        left, upper, radius = rng.random(3) * (width / height, 1, 0.3)
        image[np.hypot(x - left, y - upper) < radius] += rng.normal(size=3) / 2
    return np.clip(128 + 45 * image, 0, 255).astype(np.uint8)


def write_tar(path: pathlib.Path, side: int, count: int, distinct: int = 64) -> float:
    """Writes `count` samples of `distinct` pictures of shorter side `side`; returns bits per
    pixel."""
    rng = np.random.default_rng(side)
    encoded = []
    for _ in range(distinct):
        file = io.BytesIO()
        Image.fromarray(picture(rng, side * 4 // 3, side)).save(
            file, "JPEG", quality=95, subsampling="4:2:0"
        )
        encoded.append(file.getvalue())
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            text = " ".join(rng.choice(WORDS, rng.integers(6, 16)))
            meta = {"caption": text, "width": side * 4 // 3, "height": side, "similarity": 0.31}
            for extension, data in (
                ("jpg", encoded[number % distinct]),
                ("txt", text.encode()),
                ("json", json.dumps(meta).encode()),
            ):
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return 8 * sum(map(len, encoded)) / distinct / (side * (side * 4 // 3))


# ========================================================================= contenders: iterators
# that yield the number of samples of each finished batch.


def ours(
    tars: list[str], size: int, threads: int, workers: int, margin: float = 2.0
) -> Iterator[int]:
    """Our source with random order, as in training."""
    from unclip.input.decode.transforms import ImageText
    from unclip.input.shards.collection import open_shards
    from unclip.input.source import make_source

    transform = ImageText(size, CONTEXT, margin=margin)
    with make_source(
        open_shards(tars), transform, batch_size=BATCH, seed=0, threads=threads, workers=workers
    ) as batches:
        for batch in batches:
            assert batch["image"].shape == (BATCH, size, size, 3)
            yield BATCH


def peer(tars: list[str], size: int, workers: int, reduced: bool) -> Iterator[int]:
    """webdataset read in the tars' order, batched in the worker, through torch's DataLoader."""
    import torch
    import webdataset

    from unclip.input.decode.text import Tokenizer

    torch.set_num_threads(1)
    tokenizer = Tokenizer()

    def by_draft(key, data):
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (2 * size, 2 * size))
        return image.convert("RGB")

    def crop(image):
        width, height = image.size
        side = min(width, height)
        left, upper = (width - side) // 2, (height - side) // 2
        square = image.resize(
            (size, size), Image.Resampling.BICUBIC, box=(left, upper, left + side, upper + side)
        )
        return torch.from_numpy(np.array(square))

    def tokens(text):
        ids, mask, _ = tokenizer.encode([text], CONTEXT)
        return torch.from_numpy(ids[0]), torch.from_numpy(mask[0])

    dataset = webdataset.WebDataset(tars, shardshuffle=False, nodesplitter=None).repeat()
    if reduced:
        decoders = [webdataset.handle_extension("jpg", lambda data: by_draft("jpg", data))]
        dataset = dataset.decode(*decoders)
    else:
        dataset = dataset.decode("pil")
    dataset = dataset.to_tuple("jpg", "txt").map_tuple(crop, tokens).batched(BATCH, partial=False)
    for images, _ in torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers):
        assert images.shape == (BATCH, size, size, 3)
        yield BATCH


def limit(tars: list[str], size: int, full: bool = False, captions: bool = False) -> Iterator[int]:
    """Read, libjpeg-turbo, resize: nothing else, or captions read and tokenised as well."""
    import simplejpeg

    from unclip.input.decode.jpeg import scale
    from unclip.input.decode.text import Tokenizer

    encode = Tokenizer().encode
    with tarfile.open(tars[0]) as archive:
        members = [(m.name[-3:], m.offset_data, m.size) for m in archive]
    spans, texts = (
        [(offset, size) for name, offset, size in members if name == wanted]
        for wanted in ("jpg", "txt")
    )
    descriptor = os.open(tars[0], os.O_RDONLY)
    with Image.open(io.BytesIO(os.pread(descriptor, spans[0][1], spans[0][0]))) as first:
        factor = 1 if full else scale(*first.size, 2 * size)
        width, height = (-(-n // factor) for n in first.size)
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    box = left, upper, left + side, upper + side
    while True:
        for start in range(0, len(spans) - BATCH + 1, BATCH):
            for number in range(start, start + BATCH):
                offset, length = spans[number]
                if captions:
                    text = os.pread(descriptor, texts[number][1], texts[number][0])
                    encode([text.decode()], CONTEXT)
                array = simplejpeg.decode_jpeg(
                    os.pread(descriptor, length, offset), min_height=height, min_width=width
                )
                np.asarray(
                    Image.fromarray(array).resize((size, size), Image.Resampling.BICUBIC, box=box)
                )
            yield BATCH


Contender = tuple[Callable[..., Iterator[int]], dict, int]
ONE_CORE: dict[str, Contender] = {
    "limit": (limit, {}, 1),
    "limit with captions": (limit, {"captions": True}, 1),
    "limit, full decode": (limit, {"full": True}, 1),
    "ours, 1 thread": (ours, {"threads": 1, "workers": 0}, 1),
    "ours, 1 thread, margin 1": (ours, {"threads": 1, "workers": 0, "margin": 1.0}, 1),
    "ours, 1 worker": (ours, {"threads": 0, "workers": 1}, 1),
    "peer, 0 workers": (peer, {"workers": 0, "reduced": False}, 1),
    "peer, 1 worker": (peer, {"workers": 1, "reduced": False}, 1),
    "peer, 0 workers, reduced": (peer, {"workers": 0, "reduced": True}, 1),
}


def contenders(cores: int) -> dict[str, Contender]:
    """One core each, then all of them."""
    several = {
        f"ours, {cores} threads": (ours, {"threads": cores, "workers": 0}, cores),
        f"ours, {cores} workers": (ours, {"threads": 0, "workers": cores}, cores),
        f"peer, {cores} workers": (peer, {"workers": cores, "reduced": False}, cores),
    }
    return ONE_CORE | (several if cores > 1 else {})


def processes() -> list[int]:
    """This process and its descendants."""
    found, pids = [], [os.getpid()]
    while pids:
        found.append(pid := pids.pop())
        for file in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
            pids += map(int, file.read_text().split())
    return found


def memory() -> list[float]:
    """PSS in MiB of each of our processes."""
    rollups = [pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in processes()]
    return [
        next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("Pss:"))
        for text in rollups
    ]


def cpu_seconds() -> float:
    """CPU seconds of all our processes since they started."""
    fields = [
        pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        for pid in processes()
    ]
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


def turn(name: str, tars: list[str], size: int, seconds: float, cores: int) -> dict:
    """Runs one contender: samples per second, samples per CPU second, MiB of each process."""
    make, options, used = contenders(cores)[name]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-used:])
    samples = make(tars, size, **options)
    # Batches that were prefetched during the start must not count, so as many are skipped.
    for _ in range(2 + 2 * max(1, options.get("workers", 0))):
        next(samples)
    start, cpu, count = time.perf_counter(), cpu_seconds(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        count += next(samples)
    cpu, used_memory = cpu_seconds() - cpu, memory()
    samples.close()
    return {"rate": count / elapsed, "cpu": count / cpu, "memory": used_memory}


def compare(case: str, tars: list[str], rounds: int, seconds: float, cores: int) -> list[dict]:
    """Runs every contender by turns and prints medians and ratios; returns the ratios to keep."""
    turns: dict[str, list[dict]] = {name: [] for name in contenders(cores)}
    for _ in range(rounds):
        for name, found in turns.items():
            command = [
                sys.executable,
                __file__,
                "--turn",
                name,
                "--case",
                case,
                "--tars",
                *tars,
                "--seconds",
                str(seconds),
                "--cores",
                str(cores),
            ]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=120,
                cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                check=False,
            )
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
    rate, cpu = (
        {name: statistics.median(t[field] for t in found) for name, found in turns.items()}
        for field in ("rate", "cpu")
    )
    print(f"\n{case:<28}samples/s (least to most)  a CPU second  of the limit  MiB a process")
    for name, found in turns.items():
        spread = f"({min(t['rate'] for t in found):.0f} to {max(t['rate'] for t in found):.0f})"
        sizes = " + ".join(f"{n:.0f}" for n in found[-1]["memory"])
        print(
            f"  {name:<26}{rate[name]:>9.0f} {spread:<16}{cpu[name]:>14.0f}"
            f"{cpu[name] / cpu['limit']:>14.2f}  {sizes}"
        )
    usual = ("peer, 0 workers", "peer, 1 worker")
    peer_name, kept = "webdataset with torch's DataLoader", []
    for what, found in (("by the clock", rate), ("by CPU time", cpu)):
        mine = found["ours, 1 thread"]
        better, reduced, of_limit = (
            mine / theirs
            for theirs in (
                max(found[p] for p in usual),
                found["peer, 0 workers, reduced"],
                found["limit"],
            )
        )
        print(
            f"  one core, {what}: ours is {better:.2f} x the better "
            f"peer, {reduced:.2f} x one that decodes reduced, "
            f"{of_limit:.2f} of the limit"
        )
        text = f"pictures {case.replace('-', ' to ')} pixels, one core, {what}"
        kept += [
            record.figure(text, better, "×", peer_name),
            record.figure(text, reduced, "×", f"{peer_name}, decoding reduced"),
            record.figure(text, of_limit, "×", "a loop that reads, decodes and resizes"),
        ]
    if cores > 1:
        best = max(rate[f"ours, {cores} threads"], rate[f"ours, {cores} workers"])
        ratio = best / rate[f"peer, {cores} workers"]
        print(f"  {cores} cores, by the clock: ours is {ratio:.2f} x the peer")
        text = f"pictures {case.replace('-', ' to ')} pixels, {cores} cores, by the clock"
        kept.append(record.figure(text, ratio, "×", f"{peer_name}, {cores} workers"))
    return kept


def main() -> None:
    """Makes the tars and compares; `--turn` is one turn of one contender."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", help="FILE.json that keeps the ratios")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    parser.add_argument("--tars", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        size = CASES[args.case][1]
        print(json.dumps(turn(args.turn, args.tars, size, args.seconds, args.cores)))
        return
    kept = []
    for case in [args.case] if args.case else CASES:
        with tempfile.TemporaryDirectory() as folder:
            tars = [pathlib.Path(folder) / f"{n:05d}.tar" for n in range(SHARDS)]
            bits = write_tar(tars[0], CASES[case][0], count=1000)
            for link in tars[1:]:  # a collection of realistic length, read from memory
                link.symlink_to(tars[0])
            print(
                f"{case}: {SHARDS} shards of {tars[0].stat().st_size >> 20} MiB, "
                f"{bits:.1f} bits a pixel"
            )
            kept += compare(case, list(map(str, tars)), args.rounds, args.seconds, args.cores)
    if args.out:
        record.write(args.out, kept)


if __name__ == "__main__":
    main()
