"""Embeddings on disk: the right rows, the same bits however they came about, exact moments."""

import io
import json
import pathlib
import pickle
import subprocess
import sys
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

from unclip import errors, tasks
from unclip.cascade import bundle, runs
from unclip.embeddings import sums as embedding_sums
from unclip.embeddings.job import Job, distributed, embed_shards
from unclip.embeddings.pairs import Pair
from unclip.embeddings.store import Store
from unclip.input.decode import text
from unclip.input.samples import BadSample, Sample
from unclip.input.shards import collection as shards

pytestmark = pytest.mark.usefixtures("quick_compiles")
ARCH = dict(
    embed_dim=6, image_size=16, patch_size=8, vision_width=16, vision_layers=1, vision_heads=2,
    text_width=16, text_layers=1, text_heads=2, context=16,
)  # fmt: skip
COUNTS = (5, 9, 1, 6)  # samples of the four shards; of the second one is bad, one has no caption


def picture(number):
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (16, 16, 3), np.uint8)


def write_tar(path, numbers, *, bad=(), bare=(), more=None):
    """A shard of noise pictures named by their number; those of `bare` have no KEY.txt, those of
    `more` further fields."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            file = io.BytesIO()
            Image.fromarray(picture(number)).save(file, "PNG")
            data = b"no picture" if number in bad else file.getvalue()
            meta = {"odd": number % 2, **(more or {}).get(number, {})}
            members = {"png": data, "json": json.dumps(meta).encode()}
            if number not in bare:
                members["txt"] = caption(number).encode()
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def caption(number):
    return f"picture number {number}"


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder, first = tmp_path_factory.mktemp("tars"), 0
    for shard, count in enumerate(COUNTS):
        write_tar(folder / f"s-{shard}.tar", range(first, first + count), bad={6}, bare={8})
        first += count
    return str(folder / "s-*.tar")


@pytest.fixture(scope="module")
def clip():
    """(arch, parameters that do not ignore their input, their hash)."""
    shapes = jax.eval_shape(tasks.ClipTask(ARCH).init, jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: np.float32(0.3 * rng.normal(size=leaf.shape)), shapes)
    return ARCH, params, bundle.tree_hash(params)


@pytest.fixture(scope="module")
def job(clip, tars):
    """job(folder, **changes) of every picture of the four shards, four a batch on two devices."""

    def make(folder, patterns=tars, **changes):
        settings = {"batch_size": 4, "threads": 2, "devices": jax.devices()[:2]} | changes
        return Job(*clip, shards.open_shards(patterns, text=False), folder, **settings)

    return make


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """The finished folder, made at once."""
    return embed_shards(job(tmp_path_factory.mktemp("whole"))).folder


def rows(folder):
    """{file name: bytes} of all rows."""
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).glob("*.npy")}


def tables(folder, kind):
    """The rows of every shard, in order, as NumPy reads them."""
    paths = sorted(pathlib.Path(folder).glob(f"*.{kind}.npy"))
    return np.concatenate([np.load(path, allow_pickle=False) for path in paths])


def test_rows_are_those_of_the_clip(whole, clip):
    """Against the trained task's own forward pass on pictures that never saw a file."""
    assert [len(np.load(path)) for path in sorted(whole.glob("s-*.z_i.npy"))] == list(COUNTS)
    # The index puts what has no caption last: picture 8 comes after the others of its shard.
    numbers = [*range(5), *(n for n in range(5, 14) if n != 8), 8, *range(14, 21)]
    tokens = text.Tokenizer().encode([caption(n) for n in numbers], ARCH["context"])[0]
    batch = {"image": np.stack([picture(n) for n in numbers]), "tokens": tokens}
    z_i, z_t = map(np.array, jax.jit(tasks.ClipTask(ARCH).embed)(clip[1], batch))
    z_i[numbers.index(6)] = z_t[numbers.index(6)] = z_t[numbers.index(8)] = np.nan
    np.testing.assert_allclose(tables(whole, "z_i"), z_i, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tables(whole, "z_t"), z_t, rtol=1e-5, atol=1e-6)
    assert np.ptp(z_i[:5], axis=0).min() > 1e-3


def test_what_a_folder_says_of_itself(whole, clip):
    store = Store(whole)
    assert store.complete and store.clip == clip[2] and store.embed_dim == 6
    assert (store.samples, store.embedded, store.captioned) == (21, 20, 19)
    assert store.bad == {"format": 1}
    second = json.loads(next(whole.glob("s-1-*.json")).read_text())
    assert second["listed"] == [[1, "00006", "format"]]
    names = {path.name.partition("-")[0] for path in whole.iterdir()}
    assert names == {"s", "embeddings.json", "moments.safetensors", "statistics.npz"}


def test_moments_are_those_of_all_rows(whole):
    found = embedding_sums.read(whole)
    for kind, count in (("z_i", 20), ("z_t", 19)):
        table = np.float64(tables(whole, kind))
        table = table[np.isfinite(table).all(1)]
        assert found[kind].count == len(table) == count
        np.testing.assert_allclose(found[kind].mean, table.mean(0), rtol=1e-12)
        np.testing.assert_allclose(
            found[kind].covariance, np.cov(table, rowvar=False), rtol=1e-9, atol=1e-12
        )


def stopping(after):
    """A `should_stop` that says yes at its call number `after`."""
    calls = iter(range(1, 1000))
    return lambda *_: next(calls) >= after


@pytest.mark.parametrize(
    "after", [3, 6, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 8))]
)
def test_a_stopped_job_goes_on_to_the_same_bits(after, whole, job, tmp_path, monkeypatch):
    """The four shards are 2, 3, 1 and 2 batches; a batch waits on the devices while one is read."""
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "should_stop", stopping(after))
        with pytest.raises(errors.Stopped, match="the same command continues"):
            embed_shards(job(tmp_path))
    there = rows(tmp_path)
    assert len(there) == 2 * sum(after > batches for batches in (2, 5, 6))
    with pytest.raises(errors.DataError, match="the same command continues"):
        Store(tmp_path).attach(job(tmp_path).collection)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    embed_shards(job(tmp_path))
    assert rows(tmp_path) == rows(whole) and there.items() <= rows(whole).items()
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    same_statistics(tmp_path, whole)


def same_statistics(one, two):
    a, b = embedding_sums.read(one), embedding_sums.read(two)
    assert a.keys() == b.keys() == {"z_i", "z_t"}
    for kind in a:
        assert a[kind].count == b[kind].count
        np.testing.assert_allclose(a[kind].mean, b[kind].mean, rtol=1e-12)
        np.testing.assert_allclose(a[kind].covariance, b[kind].covariance, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("processes", [2, 5])
def test_any_number_of_processes(processes, whole, job, tmp_path):
    """Also processes without a shard; the last one writes first."""
    work = job(tmp_path)
    store = work.begin()
    for process in reversed(range(processes)):
        work.own(store, process, work.mine(process, processes))
    assert len(list(tmp_path.glob("moments-*"))) == min(processes, len(COUNTS))
    work.finish(Store(tmp_path))
    assert rows(tmp_path) == rows(whole)
    same_statistics(tmp_path, whole)


@pytest.mark.parametrize("damage", ["moments", "rows", "description", "cut", "other moments"])
def test_what_was_lost_is_made_again_and_counts_once(damage, whole, job, tmp_path):
    work = job(tmp_path)
    store = work.begin()
    work.own(store, 0, work.wanted)  # killed before the table was written
    second = next(tmp_path.glob("s-1-*.z_i.npy"))
    if damage == "moments":
        (tmp_path / "moments-00000.safetensors").write_bytes(b"cut short")
    elif damage == "rows":
        second.unlink()
    elif damage == "description":
        next(tmp_path.glob("s-1-*.json")).write_text("{")
    elif damage == "cut":
        second.write_bytes(second.read_bytes()[:-1])
    else:  # of another run, over some of the same shards
        sums = embedding_sums.Sums(tmp_path, 7, 6)
        sums.add(store, next(iter(store.shards.values())))
        sums.save()
    assert embed_shards(job(tmp_path)).complete
    assert rows(tmp_path) == rows(whole)
    same_statistics(tmp_path, whole)


def test_a_finished_folder_is_left_alone(whole, job):
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    assert embed_shards(job(whole)).complete
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_shards_can_be_added(whole, tars, job, tmp_path):
    first, rest = tars.replace("*", "[01]"), tars.replace("*", "[23]")
    embed_shards(job(tmp_path, first))
    assert embed_shards(job(tmp_path, rest)).samples == 21
    assert rows(tmp_path) == rows(whole)
    same_statistics(tmp_path, whole)


def test_half_precision(whole, job, tmp_path):
    store = embed_shards(job(tmp_path, dtype="float16"))
    table = tables(tmp_path, "z_i")
    assert table.dtype == np.float16
    np.testing.assert_array_equal(table, np.float16(tables(whole, "z_i")))
    good = np.float64(table[np.isfinite(table).all(1)])
    np.testing.assert_allclose(
        embedding_sums.read(tmp_path)["z_i"].covariance, np.cov(good, rowvar=False), rtol=1e-9
    )
    z_i = store.attach(job(tmp_path).collection).read(0).meta["z_i"]
    assert z_i.dtype == np.float32 and np.array_equal(z_i, table[0])


def test_the_first_caption_there_is():
    """In the order asked for; of a list its first text."""
    pair, file = Pair(16, 16, ("json:alt", "txt")), io.BytesIO()
    Image.fromarray(picture(0)).save(file, "PNG")
    image = file.getvalue()
    tokens = lambda text, alt: pair(Sample("k", image, text, {"alt": alt}), None)["tokens"]
    assert np.array_equal(tokens("one", [" ", "two"]), tokens("two", None))
    assert np.array_equal(tokens("one", [3, None]), tokens("one", {"en": "two"}))
    assert not tokens(" ", []).any()
    with pytest.raises(errors.ConfigError, match="json:FIELD"):
        Pair(16, 16, ("alt",))


def test_array_records_give_the_same_rows(whole, tars, job, tmp_path):
    """The same pairs out of a prepared data set, where files and rows are others."""
    pytest.importorskip("array_record")
    from unclip.input.tfds.records import write_array_record

    folder = tmp_path / "foxes" / "1.0.0"
    write_array_record(
        shards.open_shards(tars, text=False), folder, name="foxes", split="train", shard_samples=8
    )
    store = embed_shards(job(tmp_path / "out", f"tfds:{folder}:train"))
    assert (store.samples, store.embedded, store.captioned) == (21, 20, 19)
    table = np.concatenate(
        [store.rows(digest, "z_i", 0, shard.rows) for digest, shard in store.shards.items()]
    )
    np.testing.assert_allclose(table, tables(whole, "z_i"), rtol=1e-5, atol=1e-6)
    found = store.attach(shards.open_shards(f"tfds:{folder}:train"))
    np.testing.assert_array_equal(found.read(20).meta["z_i"], table[20])


# ============================================================ attached to a collection


def test_every_sample_finds_its_row(whole, tars):
    """By shard and row: in subsets, with the captioned alone and with the shards in other order."""
    table = tables(whole, "z_i")  # shard by shard, the uncaptioned 8 at row 13
    row_of = {n: n if n < 8 else 13 if n == 8 else n - 1 if n < 14 else n for n in range(21)}
    every = shards.open_shards(tars)
    backwards = shards.open_shards([tars.replace("*", str(n)) for n in (3, 1, 0, 2)])
    bare = shards.open_shards(tars, text=False).subset(keys=["00008", "00020"])
    for collection, count in (
        (every, 20), (backwards, 20), (bare, 2), (every.subset(where={"odd": 1}), 10),
    ):  # fmt: skip
        found = Store(whole).attach(collection)
        assert len(found) == len(collection) == count
        assert found.fingerprint == collection.fingerprint
        for i in range(count):
            if found.key(i) == "00006":
                with pytest.raises(BadSample, match="no-embedding"):
                    found.read(i)
                continue
            sample = found.read(i)
            assert sample.key == collection.key(i) and sample.meta["odd"] == int(sample.key) % 2
            np.testing.assert_array_equal(sample.meta["z_i"], table[row_of[int(sample.key)]])
    few = Store(whole).attach(every).subset(count=3)
    assert len(few) == 3 and few.read(2).meta["z_i"] is not None


@pytest.mark.parametrize("chunk", [1, 3, 4096])
def test_pairs_are_the_usable_rows_in_order(chunk, whole, tars):
    found = Store(whole).attach(shards.open_shards(tars))
    z_i, z_t = (tables(whole, kind) for kind in ("z_i", "z_t"))
    good = np.isfinite(z_t).all(1)  # all but 6, which is bad, and 8, which has no caption
    parts = list(zip(*found.pairs(chunk=chunk)))
    np.testing.assert_array_equal(np.concatenate(parts[0]), z_i[good])
    np.testing.assert_array_equal(np.concatenate(parts[1]), z_t[good])
    odd = found.subset(where={"odd": 1})
    np.testing.assert_array_equal(
        np.concatenate([a for a, _ in odd.pairs(5, chunk=chunk)]), z_i[[1, 3, 5, 7, 8]]
    )


def test_shards_that_are_not_embedded_are_named(whole, tars, tmp_path):
    write_tar(tmp_path / "new.tar", range(3))
    other = shards.open_shards([tars, str(tmp_path / "new.tar")])
    with pytest.raises(errors.DataError, match=r"of 1 of 5 shards \(new\.tar\)"):
        Store(whole).attach(other)
    write_tar(tmp_path / "s-2.tar", range(3))  # the name alone is not enough
    with pytest.raises(errors.DataError, match=r"\(s-2\.tar\): it has other shards, these were"):
        Store(whole).attach(shards.open_shards(str(tmp_path / "s-2.tar")))


def test_captions_of_any_field_are_embedded_and_found_again(clip, tmp_path):
    """By the sources of training, which say where in its shard a row is."""
    more = {1: {"TEXT": ["", "one"]}, 3: {"TEXT": "three"}}
    write_tar(tmp_path / "a.tar", range(4), bare=range(4), more=more)
    path, sources = str(tmp_path / "a.tar"), ("json:TEXT", "txt")
    whole = shards.open_shards(path, text=False, captions=sources)
    store = embed_shards(Job(*clip, whole, tmp_path / "out", captions=sources))
    assert (store.embedded, store.captioned) == (4, 2)
    training = store.attach(shards.open_shards(path, captions=("json:TEXT",)))
    assert [training.key(i) for i in range(2)] == ["00001", "00003"]
    z_i, _ = next(training.pairs())
    assert np.array_equal(z_i, [training.read(i).meta["z_i"] for i in range(2)])
    with pytest.raises(errors.DataError, match=r"its --captions, json:TEXT,txt, tell other"):
        store.attach(shards.open_shards(path, captions=("json:odd", "txt"), text=False))


def test_embeddings_of_another_clip_are_refused(whole, job, clip):
    with pytest.raises(errors.ConfigError, match=f"CLIP {clip[2][:12]}, but this run uses CLIP 00"):
        Store(whole).check_clip("00" * 32)
    other = job(whole)
    other.settings["clip"] = other.clip_hash = "11" * 32
    with pytest.raises(errors.ConfigError, match="another --out"):
        embed_shards(other)
    with pytest.raises(errors.ConfigError, match="with dtype float32, not float16"):
        embed_shards(job(whole, dtype="float16"))
    with pytest.raises(errors.ConfigError, match="with captions"):
        embed_shards(job(whole, captions=("json:odd",)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.update(format=2), "upgrade"),
        (lambda d: d.update(embed_dim=0), "damaged"),
        (lambda d: d.update(dtype="object"), "damaged"),
        (lambda d: d["shards"][0].pop("rows"), "embedded shard"),
        (lambda d: d["shards"][0].update(digest="../../x"), "embedded shard"),
    ],
)
def test_a_damaged_description_is_refused(change, match, whole, tmp_path):
    document = json.loads((whole / "embeddings.json").read_text())
    change(document)
    (tmp_path / "embeddings.json").write_text(json.dumps(document))
    with pytest.raises(errors.UnclipError, match=match):
        Store(tmp_path)
    with pytest.raises(errors.DataError, match="unclip embed --out DIR"):
        Store(tmp_path / "nowhere")


def test_rows_that_were_cut_are_not_read(job, tars, tmp_path):
    store = embed_shards(job(tmp_path))
    path = next(tmp_path.glob("s-0-*.z_i.npy"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(errors.DataError, match=r"s-0\.tar.*run unclip embed again"):
        store.attach(shards.open_shards(tars)).read(0)


def test_a_clip_that_gives_nan_ends_the_job(clip, tars, tmp_path):
    params = jax.tree.map(lambda leaf: leaf * np.nan, clip[1])
    work = Job(
        ARCH,
        params,
        "00" * 32,
        shards.open_shards(tars),
        tmp_path,
        batch_size=4,
        devices=jax.devices()[:2],
    )
    with pytest.raises(errors.NumericsError, match="z_i of '00000' has NaN"):
        embed_shards(work)
    assert not rows(tmp_path)


def test_decoding_workers_need_no_network(whole, tars):
    """What they are sent unpickles without JAX, and reads."""
    sent = pickle.dumps(Store(whole).attach(shards.open_shards(tars)))
    program = """
import pickle, sys
found = pickle.load(sys.stdin.buffer)
assert found.read(3).meta["z_i"].shape == (6,)
assert not {"jax", "flax", "torch", "tensorflow"} & sys.modules.keys()
"""
    subprocess.run(
        [sys.executable, "-c", program],
        input=sent,
        check=True,
        timeout=60,
        cwd=pathlib.Path(__file__).parents[2],
    )


# ============================================================ training on them


@pytest.fixture(scope="module")
def prior_config(tiny_config, run_of, shards):
    """A prior of two steps that takes z_i from files, of held-out pictures too."""
    changes = {
        "clip": run_of("clip"),
        "input.held_out": (shards["held_out"],),
        "eval_examples": 0,
        "metric_examples": 0,
    }
    return lambda **more: tiny_config("prior", changes | more, "emoji,runlocal,kind=diffusion")


@pytest.mark.slow
@pytest.mark.usefixtures("cheap_runs")
def test_training_on_a_folder_is_training_on_the_fly(prior_config, run_of, shards, tmp_path):
    """Bit for bit, statistics of z_i too; held-out pictures that it lacks go to the workdir."""
    from unclip.input.shards.collection import open_shards
    from unclip.runtime import checkpoint
    from unclip.training.start import train

    clip = runs.open_part(run_of("clip"), "clip")
    embed_shards(
        Job(
            clip.arch,
            clip.params,
            bundle.space(clip),
            open_shards(shards["train"], text=False),
            tmp_path / "z",
            batch_size=8,
            devices=jax.devices()[:1],
        )
    )
    states, statistics = [], []
    for name, where in (
        ("fly", {"stored_embeddings": True}),
        ("folder", {"embeddings": str(tmp_path / "z")}),
    ):
        workdir = tmp_path / name
        train(prior_config(**where), str(workdir))
        states.append(checkpoint.load_subtree(workdir / "checkpoints", ("params", "opt"), None))
        statistics.append((workdir / "statistics.safetensors").read_bytes())
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert statistics[0] == statistics[1]
    assert len(list((tmp_path / "fly" / "embeddings").iterdir())) == 2
    assert len(list((tmp_path / "folder" / "embeddings").iterdir())) == 1
    table = np.float64(tables(tmp_path / "z", "z_i"))
    np.testing.assert_allclose(
        runs.read_prior_statistics(tmp_path / "fly" / "statistics.safetensors")["std"],
        table.std(0, ddof=1),
        rtol=1e-5,
    )


@pytest.mark.usefixtures("cheap_runs")
def test_training_refuses_embeddings_of_another_clip(prior_config, whole, tmp_path):
    from unclip.training.start import train

    with pytest.raises(errors.ConfigError, match="were made by CLIP"):
        train(prior_config(embeddings=str(whole)), str(tmp_path))
