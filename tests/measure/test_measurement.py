"""Metrics by name: the plumbing from pictures to keyed values, on small substitutes for
networks."""

import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unclip import errors, tasks
from unclip.cascade import bundle
from unclip.files.moments import read_statistics, write_statistics
from unclip.measure import embedders, measurement, pictures
from unclip.measure.table import ALIASES, METRICS, expand, measure

RNG = np.random.default_rng(0)
REAL = RNG.integers(0, 256, (30, 6, 6, 3), dtype=np.uint8)
FAKE = RNG.integers(0, 220, (26, 6, 6, 3), dtype=np.uint8)
WEIGHTS = RNG.normal(size=(108, 5)).astype(np.float32) / 50
ARCH = dict(
    embed_dim=8, image_size=16, patch_size=8, vision_width=64, vision_layers=1, vision_heads=1,
    text_width=64, text_layers=1, text_heads=1, context=16,
)  # fmt: skip


class StandIn:
    """A linear "Inception" of 5 features; the mode changes what it is shown."""

    def __init__(self, path, mode):
        self.id = f"stand-in.{mode}"
        self.provenance = {"weights_sha256": str(path)}
        self.outputs = {"pool3": 5, "spatial": 2, "logits_unbiased": 5}
        self.params = WEIGHTS
        self.scale = {"tf1": 1.0, "clean": 2.0, "pytorch-fid": 3.0}[mode]

    def prepare(self, picture):
        return {"image": picture}

    def apply(self, params, batch):
        flat = batch["image"].astype(jnp.float32).reshape(len(batch["image"]), -1)
        pool3 = self.scale * (flat @ params)
        return {"pool3": pool3, "spatial": pool3[:, :2], "logits_unbiased": pool3 / 5}


def rows(array):
    return array.reshape(len(array), -1).astype(np.float64) @ WEIGHTS.astype(np.float64)


def frechet(a, b):
    """Dowson and Landau's formula by the eigenvalues of the product."""
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(covariance_a @ covariance_b).real.clip(0))
    shift = a.mean(0) - b.mean(0)
    return shift @ shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * roots.sum()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(measurement.features, "inception_extractor", StandIn)


@pytest.fixture
def sets():
    return pictures.ArrayPictures(REAL), pictures.ArrayPictures(FAKE)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP whose embeddings differ from picture to picture."""
    shapes = jax.eval_shape(tasks.ClipTask(ARCH).init, jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes)
    folder = tmp_path_factory.mktemp("clip") / "bundle"
    bundle.write(folder, {"clip": bundle.Part("clip", ARCH, params)})
    return folder


# ============================================================ values


def test_fid_is_the_formula_and_its_key_says_what_it_is_of(sets):
    result = measure(*sets, ["fid", "fid-clean", "sfid"], inception="w", protocol="coco.seed0")
    fid, clean, sfid = result.values
    real = f"real={pictures.content_hash(sets[0])[:8]}"
    assert fid["key"] == f"fid/stand-in.tf1/coco.seed0/{real}/N=26"
    assert clean["key"] == f"fid-clean/stand-in.clean/coco.seed0/{real}/N=26"
    assert (fid["n_real"], fid["n_fake"]) == (30, 26)
    np.testing.assert_allclose(fid["value"], frechet(rows(REAL), rows(FAKE)), rtol=1e-5)
    np.testing.assert_allclose(sfid["value"], frechet(rows(REAL)[:, :2], rows(FAKE)[:, :2]),
                               rtol=1e-5)  # fmt: skip
    np.testing.assert_allclose(clean["value"], 4 * fid["value"], rtol=1e-6)
    assert any("30 real and 26 fake" in line for line in result.warnings)
    assert not any("fewer than the" in line for line in result.warnings)


def test_each_metric_gives_its_values_and_settings(sets):
    names = ["fid-infinity", "is", "is-openai", "kid", "prdc"]
    result = measure(*sets, names, inception="w", seed=3)
    keys = [value["key"] for value in result.values]
    head = "stand-in.tf1"
    tail = f"real={pictures.content_hash(sets[0])[:8]}/N=26"
    assert keys == [
        f"fid-infinity/{head}/points=15.seed=3/{tail}", f"is/{head}/splits=10.seed=2020/N=26",
        f"is-openai/{head}/split_size=5000/N=26", f"kid/{head}/subsets=100x26.seed=2020/{tail}",
        f"precision/{head}/k=3/{tail}", f"recall/{head}/k=3/{tail}", f"f_score/{head}/k=3/{tail}",
        f"density/{head}/k=5/{tail}", f"coverage/{head}/k=5/{tail}",
    ]  # fmt: skip
    by_name = {value["metric"]: value for value in result.values}
    logits = rows(FAKE) / 5
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    score = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    np.testing.assert_allclose(by_name["is-openai"]["value"], score, rtol=1e-5)
    assert by_name["is"]["n_real"] is None and by_name["kid"]["std"] >= 0
    message = "\n".join(result.warnings)
    assert "subsets of 26 pictures" in message and "split has only 2 pictures" in message


def test_identical_sets_are_at_no_distance(sets):
    real, _ = sets
    result = measure(real, pictures.ArrayPictures(REAL), ["fid", "pr", "dc"], inception="w")
    values = {value["metric"]: value["value"] for value in result.values}
    assert values["fid"] == pytest.approx(0, abs=1e-8) and values["precision"] == 1
    assert values["recall"] == values["coverage"] == 1


def test_a_set_is_read_once_however_many_metrics_read_it(sets):
    class Counting(pictures.ArrayPictures):
        reads = 0

        def read(self, i):
            self.reads += 1
            return super().read(i)

    fake = Counting(FAKE)
    measure(sets[0], fake, ["fid", "kid", "is", "prdc", "sfid"], inception="w")
    assert fake.reads <= len(FAKE) + 8  # and a few to find other sizes early


def test_intervals_are_made_where_they_mean_something(sets):
    result = measure(*sets, ["fid"], inception="w", bootstrap=40)
    (low, high), value = result.values[0]["interval"], result.values[0]["value"]
    assert low < value < high
    few = pictures.First(sets[1], 9)
    result = measure(sets[0], few, ["fid"], inception="w", bootstrap=40)
    assert "interval" not in result.values[0]
    assert any("9 pictures are fewer than twice the 5 features" in w for w in result.warnings)


def test_fewer_pictures_than_features_is_told_in_the_result(sets):
    result = measure(sets[0], pictures.First(sets[1], 4), ["fid"], inception="w")
    assert any("4 fake pictures are fewer than the 5 features" in w for w in result.warnings)
    assert json.loads(result.json())["warnings"] == result.warnings


def test_the_result_says_where_it_came_from(sets):
    result = measure(*sets, ["fid"], inception="w")
    found = json.loads(result.json())
    assert found["provenance"]["extractors"] == {"stand-in.tf1": {"weights_sha256": "w"}}
    real = found["provenance"]["real"]
    assert real["listing_sha256"] == pictures.listing_hash(sets[0])
    assert (real["count"], real["sizes"]) == (30, {"6x6": 30})
    lines = result.table().splitlines()
    assert lines[0].split() == ["metric", "value", "key"] and len(lines) == 2 + len(result.warnings)
    assert lines[1].startswith("fid") and lines[-1].startswith("warning: ")


# ============================================================ CLIP


def test_text_metrics_compare_each_picture_with_its_own_caption(clip):
    texts = [f"picture {i}" for i in range(26)]
    fake = pictures.ArrayPictures(FAKE, captions=texts)
    names = ["clip_cosine", "clip_score", "clip_score-torchmetrics", "r_precision", "fd-clip"]
    real = pictures.ArrayPictures(REAL)
    result = measure(real, fake, names, clip=clip, candidates=5, seed=2)
    values = {value["metric"]: value for value in result.values}
    extractor, encoder = embedders.clip_extractor(clip), embedders.CaptionEncoder(clip)
    batch = {"image": np.stack([extractor.prepare(p)["image"] for p in FAKE])}
    z_i = np.asarray(jax.jit(extractor.apply)(extractor.params, batch)["z_i"])
    unit = lambda z: z / np.linalg.norm(z, axis=1, keepdims=True)
    cosine = (unit(z_i) * unit(encoder.encode(texts))).sum(1)
    prefixed = encoder.encode(texts, prefix="A photo depicts ")
    hessel = 2.5 * np.maximum((unit(z_i) * unit(prefixed)).sum(1), 0)
    assert values["clip_cosine"]["value"] == pytest.approx(cosine.mean(), abs=1e-5)
    assert values["clip_score"]["value"] == pytest.approx(hessel.mean(), abs=1e-5)
    low, high = values["clip_cosine"]["interval"]
    assert low < values["clip_cosine"]["value"] < high
    tail = "captions=[0-9a-f]{8}/N=26"
    assert re.fullmatch(f"clip_cosine/{extractor.id}/{tail}", values["clip_cosine"]["key"])
    settings = "candidates=5.seed=2"
    key = values["r_precision"]["key"]
    assert re.fullmatch(f"r_precision/{extractor.id}/{settings}/{tail}", key)
    assert values["fd-clip"]["key"].startswith("fd-clip/clip.") and values["fd-clip"]["value"] > 0
    assert result.provenance["captions_sha256"]
    # The order of the captions matters, and a list that is given goes before the set's own.
    turned = measure(None, fake, ["clip_cosine"], clip=clip, captions=texts[1:] + texts[:1])
    assert turned.values[0]["value"] != values["clip_cosine"]["value"]


def test_references_beside_the_caption(clip):
    texts = [[f"picture {i}", f"number {i}", "a number"] for i in range(26)]
    fake = pictures.ArrayPictures(FAKE)
    result = measure(None, fake, ["ref_clip_score", "clip_score"], clip=clip, captions=texts)
    assert [value["metric"] for value in result.values] == ["ref_clip_score", "clip_score"]
    with pytest.raises(errors.ConfigError, match="references of every picture; 26 of 26"):
        measure(None, fake, ["ref_clip_score"], clip=clip, captions=["a"] * 26)


@pytest.fixture
def damaged(tmp_path):
    """26 PNGs with captions, of which number 3 is cut short, and what is left of the captions."""
    for i, array in enumerate(FAKE):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        data = file.getvalue()[:70] if i == 3 else file.getvalue()
        (tmp_path / f"{i:02}.png").write_bytes(data)
        (tmp_path / f"{i:02}.txt").write_text(f"picture {i}")
    return pictures.open_pictures(tmp_path)


def test_unreadable_pictures_are_refused_or_counted(damaged, clip):
    with pytest.raises(errors.DataError, match=r"1 of 26 fake pictures .*: 03\.png \(") as caught:
        measure(None, damaged, ["clip_cosine"], clip=clip)
    assert "--allow corrupt" in caught.value.message and "\n" not in str(caught.value)
    unused = pictures.ArrayPictures(np.zeros((9, 3, 3, 3), np.uint8))
    result = measure(unused, damaged, ["clip_cosine"], clip=clip, allow=["corrupt"])
    assert "real" not in result.provenance
    assert "fake: 1 unreadable pictures were left out" in result.warnings
    assert result.provenance["fake"]["unreadable"][0][0] == "03.png"
    # The captions of those that are left stay with their pictures.
    kept = [i for i in range(26) if i != 3]
    whole = pictures.ArrayPictures(FAKE[kept], captions=[f"picture {i}" for i in kept])
    want = measure(None, whole, ["clip_cosine"], clip=clip)
    assert result.values == want.values


# ============================================================ keys


def keys(*sets, metrics=("fid",), **options):
    return [value["key"] for value in measure(*sets, metrics, inception="w", **options).values]


def test_equal_keys_mean_equal_references(sets, tmp_path):
    """By content: not by where pictures lie or what they are called, nor by the user's word."""
    real, fake = sets
    first = keys(real, fake, protocol="mine")
    for folder, change in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / folder).mkdir()
        for i, array in enumerate(REAL):
            array = array ^ np.uint8(change * (i == 7))
            Image.fromarray(array).save(tmp_path / folder / f"{folder}{i:02}.png")
    opened = [pictures.open_pictures(tmp_path / name) for name in "abc"]
    one, same, other = (keys(each, fake, protocol="mine") for each in opened)
    assert one == same != other
    assert keys(real, pictures.ArrayPictures(FAKE[::-1].copy()), protocol="mine") == first
    fewer = pictures.First(real, 29)
    assert keys(fewer, fake, protocol="mine") != first
    # A file of statistics has the pictures' fingerprint; another tool's has that of its numbers.
    saved = measure(real, None, ["fid"], inception="w")
    write_statistics(tmp_path / "real.npz", saved.statistics)
    assert keys(read_statistics(tmp_path / "real.npz"), fake, protocol="mine") == first
    theirs = []
    for shift in (0, 1e-3):
        found = saved.statistics["pool3"]
        np.savez(tmp_path / "theirs.npz", mu=found.mean + shift, sigma=found.covariance)
        theirs += keys(read_statistics(tmp_path / "theirs.npz"), fake)
    assert len({*theirs, *first}) == 3
    # What a protocol's id names already is not said again.
    assert keys(real, fake, protocol="p", named=("real",)) == ["fid/stand-in.tf1/p/N=26"]
    with pytest.raises(errors.ConfigError, match="unknown part of a protocol's id 'reel'"):
        keys(real, fake, named=("reel",))


def test_the_way_pictures_were_cropped_is_in_the_key(sets):
    real, fake = (pictures.Prepared(each, 6, "box") for each in sets)
    (key,) = keys(real, fake)
    assert key.startswith("fid/stand-in.tf1/crop6-box/real=")
    assert keys(None, fake, metrics=["is-openai"]) == [
        "is-openai/stand-in.tf1/split_size=5000/crop6-box/N=26"
    ]
    # The reference's own preparation is part of its fingerprint.
    (other,) = keys(pictures.Prepared(sets[0], 6), fake)
    assert other != key


def test_captions_are_in_the_keys_of_what_reads_them(clip):
    fake = pictures.ArrayPictures(FAKE)
    measured = lambda texts, name: measure(None, fake, [name], clip=clip, captions=texts).values[0][
        "key"
    ]
    plain = [f"picture {i}" for i in range(26)]
    both = [[text, "another"] for text in plain]
    other = ["picture x", *plain[1:]]
    assert measured(plain, "clip_cosine") == measured(both, "clip_cosine")
    assert measured(plain, "clip_cosine") != measured(other, "clip_cosine")
    third = [[text, "a third"] for text in plain]
    assert measured(both, "ref_clip_score") != measured(third, "ref_clip_score")


def test_statistics_of_before_have_no_hash_in_their_extractors_name(clip, tmp_path):
    real, fake = pictures.ArrayPictures(REAL), pictures.ArrayPictures(FAKE)
    saved = measure(real, None, ["fd-clip"], clip=clip).statistics["z_i"]
    about = dict(saved.provenance)
    del about["network_sha256"]
    about["extractor"] = re.sub("-[0-9a-f]{8}[.]", ".", about["extractor"])
    for weights, sound in ((about["weights_sha256"], True), ("0" * 64, False)):
        old = dataclasses.replace(saved, provenance=about | {"weights_sha256": weights})
        write_statistics(tmp_path / "old.npz", {"z_i": old})
        file = read_statistics(tmp_path / "old.npz")
        if sound:
            assert measure(file, fake, ["fd-clip"], clip=clip).values[0]["value"] > 0
            continue
        with pytest.raises(errors.ConfigError, match="was measured with weights_sha256 0000"):
            measure(file, fake, ["fd-clip"], clip=clip)


# ============================================================ statistics


def test_statistics_stand_in_for_the_pictures(sets, tmp_path):
    real, fake = sets
    names = ["fid", "kid", "fid-clean"]
    want = measure(real, fake, names, inception="w")
    saved = measure(real, None, names, inception="w")
    assert saved.values == [] and set(saved.features) == {"pool3"}
    write_statistics(tmp_path / "real.npz", saved.statistics, saved.features)
    file = read_statistics(tmp_path / "real.npz")
    assert measure(file, fake, names, inception="w").values == want.values
    provenance = file.of("pool3").provenance
    assert provenance["extractor"] == "stand-in.tf1" and provenance["weights_sha256"] == "w"
    assert provenance["pictures"]["listing_sha256"] == pictures.listing_hash(real)
    with pytest.raises(errors.ConfigError, match="weights_sha256 w, fid needs v"):
        measure(file, fake, ["fid"], inception="v")
    with pytest.raises(errors.ConfigError, match="pool3-pytorch-fid"):
        measure(file, fake, ["fid-pytorch"], inception="w")


def test_statistics_without_rows_are_reported(sets, tmp_path):
    real, fake = sets
    saved = measure(real, None, ["fid"], inception="w")
    assert saved.features == {}
    write_statistics(tmp_path / "real.npz", saved.statistics, saved.features)
    with pytest.raises(errors.ConfigError, match="only the mean and covariance of pool3"):
        measure(read_statistics(tmp_path / "real.npz"), fake, ["kid"], inception="w")


def test_other_peoples_statistics_are_used_with_warnings(sets, tmp_path):
    real, fake = sets
    mean, covariance = rows(REAL).mean(0), np.cov(rows(REAL), rowvar=False)
    np.savez(tmp_path / "theirs.npz", mu=mean, sigma=covariance)
    file = read_statistics(tmp_path / "theirs.npz")
    result = measure(file, fake, ["fid"], inception="w")
    want = measure(real, fake, ["fid"], inception="w").values[0]
    assert result.values[0]["value"] == pytest.approx(want["value"], rel=1e-5)
    assert result.values[0]["n_real"] is None
    message = "\n".join(result.warnings)
    assert "does not say of how many pictures" in message and "which resize" in message
    np.savez(tmp_path / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(errors.ConfigError, match="pool3 is 7 wide, expected 5"):
        measure(read_statistics(tmp_path / "wide.npz"), fake, ["fid"], inception="w")


# ============================================================ refusals


def test_sizes_are_refused_unless_allowed_or_cropped(sets):
    real, _ = sets
    wide = np.zeros((4, 6, 9, 3), np.uint8)
    wide[:] = np.arange(4, dtype=np.uint8)[:, None, None, None] * 50
    fake = pictures.ArrayPictures(wide)
    with pytest.raises(errors.ConfigError, match=r"real 6x6 \(8\); fake 9x6 \(4\)") as caught:
        measure(real, fake, ["fid"], inception="w")
    assert "--crop N" in caught.value.message and "--allow sizes" in caught.value.message
    cropped = measure(real, pictures.Prepared(fake, 6), ["fid"], inception="w")
    assert not any("different sizes" in line for line in cropped.warnings)


def test_sizes_that_show_late_are_refused_too(sets, tmp_path, clip):
    # The picture of another size is not among the few that are probed first.
    for i in range(40):
        side = 7 if i == 1 else 6
        Image.fromarray(np.full((side, side, 3), i * 5, np.uint8)).save(tmp_path / f"{i:02}.png")
    fake, real = pictures.open_pictures(tmp_path), pictures.ArrayPictures(REAL)
    with pytest.raises(errors.ConfigError, match=r"fake 6x6 \(39\), 7x7 \(1\)"):
        measure(real, fake, ["fd-clip"], clip=clip)
    result = measure(real, fake, ["fd-clip"], clip=clip, allow=["sizes"])
    assert any("fake 6x6 (39), 7x7 (1)" in line for line in result.warnings)


def test_what_files_were_is_reported(tmp_path, clip):
    for i in range(6):
        grey = Image.fromarray(np.full((6, 6), 40 * i, np.uint8))
        grey.save(tmp_path / (f"{i}.png" if i < 2 else f"{i}.jpg"))
    found = pictures.open_pictures(tmp_path)
    real = pictures.ArrayPictures(REAL)
    message = "\n".join(measure(real, found, ["fd-clip"], clip=clip).warnings)
    assert "fake: 6 of 6 pictures are greyscale" in message
    assert "fake: 4 of 6 pictures are lossy" in message


def test_features_that_are_not_numbers_name_the_picture(sets, monkeypatch):
    def broken(path, mode):
        extractor = StandIn(path, mode)
        extractor.params = np.full_like(WEIGHTS, np.nan)
        return extractor

    monkeypatch.setattr(measurement.features, "inception_extractor", broken)
    with pytest.raises(errors.NumericsError, match="'000000'"):
        measure(*sets, ["fid"], inception="broken")


def test_networks_are_kept_until_their_files_change(sets, tmp_path, monkeypatch):
    opened = []

    def counting(path, mode):
        opened.append(path)
        return StandIn(path, mode)

    monkeypatch.setattr(measurement.features, "inception_extractor", counting)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"one")
    for _ in range(3):
        measure(*sets, ["fid"], inception=weights)
    assert len(opened) == 1
    weights.write_bytes(b"another")
    measure(*sets, ["fid"], inception=weights)
    assert len(opened) == 2


@pytest.mark.parametrize(
    ("metrics", "options", "message"),
    [
        (["fdi"], {}, "unknown metric 'fdi': did you mean"),
        ([], {}, "no metric given"),
        (["fid"], {}, r"get pt_inception-2015-12-05-6726825d\.pth .* fd-clip needs neither"),
        (["clip_score"], {}, "clip_score needs a CLIP"),
        (["fd-dinov2"], {}, "fd-dinov2 needs DINOv2"),
        (["fid"], {"inception": "w", "allow": ["size"]}, "did you mean 'sizes'"),
    ],
)
def test_wrong_requests_are_reported(sets, metrics, options, message):
    with pytest.raises(errors.ConfigError, match=message) as caught:
        measure(*sets, metrics, **options)
    assert "\n" not in caught.value.message


def test_missing_sets_are_reported(sets, clip):
    real, fake = sets
    with pytest.raises(errors.ConfigError, match="fid compares with real pictures"):
        measure(None, fake, ["fid"], inception="w")
    with pytest.raises(errors.ConfigError, match="is is computed from fake pictures"):
        measure(real, None, ["is"], inception="w")
    with pytest.raises(errors.ConfigError, match="1 fake picture; at least 2"):
        measure(real, pictures.First(fake, 1), ["fid"], inception="w")
    with pytest.raises(errors.ConfigError, match="clip_score needs the caption of every picture"):
        measure(None, fake, ["clip_score"], clip=clip)
    with pytest.raises(errors.ConfigError, match="3 captions for the 26 pictures"):
        measure(None, fake, ["clip_score"], clip=clip, captions=["a", "b", "c"])


def test_aliases():
    assert expand(["prdc", "pr", "fid"]) == ["pr", "dc", "fid"]
    assert not set(ALIASES) & set(METRICS)
