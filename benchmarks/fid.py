"""Speed of features and FID on the same files and cores, beside torch-fidelity and pytorch-fid.

    python benchmarks/fid.py --count 5000

Needs what `make parity` installs. Half of the pictures are the real ones. Every tool runs in a
process of its own with a thread per core and its own defaults for batches and readers; they take
turns, slice by slice, so that other load of the machine affects all of them. Weights are random, so
values have no meaning, but the tools must agree on them (pytorch-fid resizes differently).

Prints JSON lines: what is measured, a line per tool (seconds of features and of the distance), and
a line per peer with our speed divided by its speed: `features` is the median over slices, `total`
of the sums. Imports, compilation and a first call are `start_s`, which is not part of the rest.
--out FILE.json keeps the ratios for docs/speed.md.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import record

ROOT = record.ROOT

TOOLS = ("unclip", "torch-fidelity", "pytorch-fid")
CORES = len(os.sched_getaffinity(0))


def unclip(weights):
    """(features of a folder, distance of two lists of those, version)."""
    from unclip.files.moments import Statistics
    from unclip.measure import frechet
    from unclip.measure.features import extract, inception_extractor
    from unclip.measure.pictures import open_pictures

    extractor = inception_extractor(weights, "tf1")

    def features(folder):
        found = extract(extractor, open_pictures(folder), outputs=["pool3"], keep=False)
        return found.moments["pool3"]

    def gaussian(parts):
        for part in parts[1:]:
            parts[0].merge(part)
        return Statistics.of(parts[0])

    version = f"jax {importlib.metadata.version('jax')}"
    return features, lambda a, b: frechet.distance(gaussian(a), gaussian(b)), version


def torch_fidelity(weights):
    """The same of torch-fidelity, from the functions that its calculate_metrics calls."""
    import torch

    from tests.parity import peers

    torch.set_num_threads(CORES)
    version = peers.torch_fidelity().__version__
    utils, metric = (
        importlib.import_module(f"torch_fidelity.{name}") for name in ("utils", "metric_fid")
    )
    settings = {"feature_extractor_weights_path": weights, "verbose": False}
    model = utils.create_feature_extractor("inception-v3-compat", ["2048"], cuda=False, **settings)

    def features(folder):
        pictures = utils.ImagesPathDataset(sorted(map(str, pathlib.Path(folder).iterdir())))
        return utils.get_featuresdict_from_dataset(pictures, model, 64, False, False, False)["2048"]

    def distance(a, b):
        found = [metric.fid_features_to_statistics(torch.cat(parts)) for parts in (a, b)]
        return metric.fid_statistics_to_metric(*found, False)["frechet_inception_distance"]

    return features, distance, f"{version}, torch {torch.__version__}"


def pytorch_fid(weights):
    """The same of pytorch-fid, from the functions that its calculate_fid_given_paths calls."""
    import torch

    from tests.parity import peers

    torch.set_num_threads(CORES)
    score = peers.pytorch_fid().fid_score
    inception = importlib.import_module("pytorch_fid.inception")
    inception.load_state_dict_from_url = lambda *given, **_: torch.load(weights, weights_only=True)
    model = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    score.tqdm = lambda batches: batches

    def features(folder):
        files = sorted(pathlib.Path(folder).iterdir())
        return score.get_activations(files, model, num_workers=min(CORES, 8))

    def distance(a, b):
        rows = [np.concatenate(parts) for parts in (a, b)]
        moments = [m for r in rows for m in (r.mean(0), np.cov(r, rowvar=False))]
        return score.calculate_frechet_distance(*moments)

    return features, distance, f"0.3.0, torch {torch.__version__}"


def work(tool, weights):
    """One tool: reads requests, lines of folder names, and answers each with a line of JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # the tools print, too
    begun = time.perf_counter()
    prepare = {"unclip": unclip, "torch-fidelity": torch_fidelity, "pytorch-fid": pytorch_fid}
    features, distance, version = prepare[tool](weights)
    kept = {"real": [], "fake": []}
    for line in sys.stdin:
        kind, folder = json.loads(line)
        if kind != "start":
            begun = time.perf_counter()
        answer = {}
        if kind == "distance":
            answer["fid"] = float(distance(kept["real"], kept["fake"]))
        else:
            found = features(folder)
            if kind in kept:
                kept[kind].append(found)
        answer |= {"seconds": time.perf_counter() - begun, "version": version}
        print(json.dumps(answer), file=answers, flush=True)


def ask(process, kind, folder=None):
    """A worker's answer to one request."""
    process.stdin.write(json.dumps([kind, folder and str(folder)]) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        sys.exit(f"{process.args[-1]} ended with code {process.wait()}; its own messages are above")
    return json.loads(answer)


def write_pictures(root, count, size, slices):
    """[(kind, folder)] of PNG pictures, real and fake in turn."""
    from PIL import Image

    from tests.parity import peers

    folders = []
    for i, numbers in enumerate(np.array_split(np.arange(count), slices)):
        kind = ("real", "fake")[i % 2]
        folder = root / f"{i:03d}"
        folder.mkdir()
        for number in numbers:
            picture = peers.noisy_waves((size, size), number)[0]
            Image.fromarray(picture).save(folder / f"{number:06d}.png")
        folders.append((kind, folder))
    return folders


def main():
    """Runs the tools, or one of them as a worker."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=5000, help="pictures, real and fake together")
    parser.add_argument("--size", type=int, default=256, help="their side in pixels")
    parser.add_argument("--slices", type=int, default=20, help="turns a tool takes; even")
    parser.add_argument("--inception", help="the published .pth; random weights without it")
    parser.add_argument("--out", help="FILE.json that keeps the ratios")
    parser.add_argument("--tool", choices=TOOLS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tool:
        work(given.tool, given.inception)
        return
    if given.slices < 2 or given.slices % 2 or given.count < 2 * given.slices:
        parser.error("--slices must be even, and --count at least twice as large")
    from tests.parity import peers

    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        weights = given.inception or str(peers.random_inception(root))
        folders = write_pictures(root, given.count, given.size, given.slices)
        facts = {"pictures": given.count, "size": given.size, "slices": given.slices}
        print(json.dumps({**facts, "cores": CORES, "machine": platform.machine()}), flush=True)
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, "--inception", weights, "--tool"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        tools = {
            tool: subprocess.Popen([*command, tool], env=environment, **pipes) for tool in TOOLS
        }
        try:
            kept = compare(tools, folders, given.count)
        finally:
            for process in tools.values():
                process.stdin.close()
                process.wait()
    if given.out:
        record.write(given.out, kept, device="cpu")


def compare(tools, folders, count):
    """Runs the tools in turn and prints a line for each, then the ratios, which it returns."""
    started = {tool: ask(process, "start", folders[0][1]) for tool, process in tools.items()}
    seconds = {tool: [] for tool in tools}
    for i, (kind, folder) in enumerate(folders):
        # The tools take turns in being the first to read a slice.
        order = list(tools)[i % len(tools) :] + list(tools)[: i % len(tools)]
        for tool in order:
            seconds[tool].append(ask(tools[tool], kind, folder)["seconds"])
    totals, versions, kept = {}, {}, []
    for tool, process in tools.items():
        last = ask(process, "distance")
        versions[tool] = last["version"]
        taken = sum(seconds[tool])
        totals[tool] = taken + last["seconds"]
        print(json.dumps({
            "tool": tool, "version": last["version"], "features_s": round(taken, 2),
            "distance_s": round(last["seconds"], 2), "total_s": round(totals[tool], 2),
            "pictures_per_s": round(count / taken, 2), "fid": last["fid"],
            "start_s": round(started[tool]["seconds"], 2),
        }), flush=True)  # fmt: skip
    for peer in list(tools)[1:]:
        ratios = [theirs / ours for ours, theirs in zip(seconds["unclip"], seconds[peer])]
        found = {
            "features": round(statistics.median(ratios), 2),
            "total": round(totals[peer] / totals["unclip"], 2),
        }
        print(json.dumps({"against": peer, **found}), flush=True)
        against = f"{peer} {versions[peer]}"
        for name, text in (("features", "Inception features"), ("total", "FID, features and all")):
            text = f"{text} of {count:,} pictures: speed"
            kept.append(record.figure(text, found[name], "×", against))
    return kept


if __name__ == "__main__":
    main()
