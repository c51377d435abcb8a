"""CLIP and DINOv2 as judges: what they are shown, what they embed, and what they say of it."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest
from PIL import Image

from unclip import errors, tasks
from unclip.cascade import bundle, runs
from unclip.input.decode import image
from unclip.input.decode.text import EOT, SOT, Tokenizer
from unclip.interop import dinov2 as interop
from unclip.interop import formats, published
from unclip.measure import embedders
from unclip.models import clip as clip_model
from unclip.models import dinov2 as dinov2_model
from unclip.models.transformer import stack_blocks

pytestmark = pytest.mark.usefixtures("quick_compiles")

ARCH = dict(
    embed_dim=24, image_size=16, patch_size=8, vision_width=16, vision_layers=1, vision_heads=2,
    text_width=16, text_layers=1, text_heads=2, context=12,
)  # fmt: skip
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"
CAPTIONS = ["a red fox", "", LONG, LONG.replace("one", "blue"), "a dog, barking"]


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(rng.normal(0, 0.5, leaf.shape)), shapes)


@pytest.fixture(scope="module")
def clip_params():
    return drawn(jax.eval_shape(tasks.ClipTask(ARCH).init, jax.random.key(0)))


@pytest.fixture(scope="module")
def clip_bundle(clip_params, tmp_path_factory):
    """A CLIP that is stored for training: bfloat16 computation, remat."""
    folder = tmp_path_factory.mktemp("clip")
    arch = ARCH | {"dtype": "bfloat16", "remat": "full"}
    bundle.write(folder, {"clip": bundle.Part("clip", arch, clip_params)})
    return folder


@pytest.fixture(scope="module")
def dinov2_bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    arch = dict(width=16, layers=1, heads=2, image_size=70)
    part = bundle.Part("dinov2", {"class": "DINOv2"} | arch, drawn(interop.shapes(arch)))
    bundle.write(folder, {"dinov2": part})
    return folder


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def features(extractor, pictures):
    batch = {"image": np.stack([extractor.prepare(p)["image"] for p in pictures])}
    return jax.tree.map(np.asarray, jax.jit(extractor.apply)(extractor.params, batch))


PICTURES = [picture(*size, seed) for seed, size in enumerate([(16, 16), (40, 25), (31, 90)])]


# ------------------------------------------------------------------------------- how CLIP is shown


@pytest.mark.parametrize("name", embedders.PREPROCESSES)
def test_one_shape_whatever_comes(clip_bundle, name):
    extractor = embedders.clip_extractor(clip_bundle, name)
    for height, width in [(1, 1), (16, 16), (17, 16), (5, 301), (300, 7), (64, 48)]:
        made = extractor.prepare(picture(height, width))
        assert list(made) == ["image"]
        assert made["image"].shape == (16, 16, 3) and made["image"].dtype == np.uint8
    same = picture(16, 16)
    np.testing.assert_array_equal(extractor.prepare(same)["image"], same)


def test_crops_of_half_a_pixel():
    """Columns beyond the square: torchvision takes the even neighbour, transformers the lower."""
    for width in range(16, 29):
        columns = np.broadcast_to(np.uint8(np.arange(width))[None, :, None], (16, width, 3))
        columns = np.ascontiguousarray(columns)
        first = {name: int(f(columns, 16)[0, 0, 0]) for name, f in embedders.PREPROCESSES.items()}
        rest = width - 16
        even = rest // 2 + (rest % 4 == 3)
        assert first == {"openai": even, "transformers": rest // 2, "cmmd": rest // 2}


def test_cmmd_crops_before_it_resizes():
    """Nothing beyond the square may reach the result, as a resize before the crop lets it."""
    inside, bars = picture(40, 40), np.full((40, 20, 3), 255, np.uint8)
    resized = np.array(Image.fromarray(inside).resize((16, 16), Image.Resampling.BICUBIC))
    wide = np.concatenate([bars, inside, bars], 1)
    tall = np.concatenate([bars.swapaxes(0, 1), inside, bars.swapaxes(0, 1)], 0)
    for whole in (wide, tall):
        np.testing.assert_array_equal(embedders.crop_then_resize(whole, 16), resized)
        assert (image.for_clip(whole, 16) != resized).any()


def test_long_strips_are_cropped_before_they_fill_the_memory(monkeypatch):
    """A picture of 2 x 60,000 resized whole would be 16 x 480,000."""
    made = {}
    for half in ("down", "even"):
        for strip in (picture(2, 701), picture(701, 2), picture(3, 1000), picture(1400, 37)):
            made[half, strip.shape] = image.for_clip(strip, 16, half=half)
    monkeypatch.setattr(image, "_STRIP", 10**9)
    for (half, shape), small in made.items():
        whole = image.for_clip(picture(*shape[:2]), 16, half=half)
        assert np.abs(small.astype(int) - whole).max() <= 1
    monkeypatch.undo()
    assert image.for_clip(picture(2, 60_000), 16).shape == (16, 16, 3)


@pytest.mark.parametrize("wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_pictures_that_are_none(clip_bundle, wrong):
    with pytest.raises(errors.ConfigError, match=r"expected uint8 \[H, W, 3\]"):
        embedders.clip_extractor(clip_bundle).prepare(wrong)


# ------------------------------------------------------------------------------------- embeddings


def test_clip_computes_in_float32(clip_bundle, clip_params):
    extractor = embedders.clip_extractor(clip_bundle)
    shown = np.stack([image.for_clip(p, 16, half="even") for p in PICTURES])
    scaled = (shown / 255 - clip_model.IMAGE_MEAN) / clip_model.IMAGE_STD
    expected = clip_model.CLIP(**ARCH).apply(
        {"params": clip_params}, scaled.astype(np.float32), method="encode_image"
    )
    made = features(extractor, PICTURES)
    assert list(made) == list(extractor.outputs) == ["z_i"] and extractor.outputs["z_i"] == 24
    assert made["z_i"].dtype == np.float32
    np.testing.assert_allclose(made["z_i"], expected, rtol=1e-4, atol=1e-4)
    coarse = embedders.clip_extractor(clip_bundle, dtype="bfloat16")
    difference = np.abs(features(coarse, PICTURES)["z_i"] - expected).max()
    assert 1e-3 < difference < 0.2 * np.abs(expected).max()
    assert coarse.id == extractor.id + ".bfloat16" and coarse.provenance["dtype"] == "bfloat16"


def test_no_accelerator_rounds_a_product(clip_bundle, dinov2_bundle):
    """Every product asks for full float32: a GPU would else round to TF32, a TPU to bfloat16."""
    extractors = embedders.clip_extractor(clip_bundle), embedders.dinov2_extractor(dinov2_bundle)
    for extractor in extractors:
        batch = {"image": np.zeros((1, extractor.size, extractor.size, 3), np.uint8)}
        program = jax.jit(extractor.apply).lower(extractor.params, batch).as_text()
        products = [line for line in program.splitlines() if "dot_general" in line
                    or "stablehlo.convolution" in line]  # fmt: skip
        assert len(products) >= 9
        assert all("HIGHEST" in line for line in products)


def test_length_is_kept(clip_bundle):
    z_i = features(embedders.clip_extractor(clip_bundle), PICTURES)["z_i"]
    assert np.abs(np.linalg.norm(z_i, axis=1) - 1).min() > 0.05


def test_what_an_extractor_says(clip_bundle):
    extractor = embedders.clip_extractor(clip_bundle, "cmmd")
    network = extractor.provenance["network_sha256"]
    assert extractor.id == f"clip.16px8-w16-l1-d24-{network[:8]}.cmmd"
    recorded = json.loads((clip_bundle / "model.json").read_text())["parts"]["clip"]["sha256"]
    assert json.loads(json.dumps(extractor.provenance)) == {
        "weights_sha256": recorded, "weights_sha256_of": "file of the bundle's part",
        "source": clip_bundle.name, "dtype": "float32", "preprocess": "cmmd", "size": 16,
        "network_sha256": network,
    }  # fmt: skip
    # Half of a CLIP is enough for its features; the rest is not moved to a device.
    assert "text" not in extractor.params
    assert embedders.clip_extractor(clip_bundle).id.endswith(".openai")


def test_names_are_those_of_presets():
    for name, preset in clip_model.PRESETS.items():
        assert embedders.clip_name(clip_model.CLIP(**preset)) == name.replace("/", "-")
    one = clip_model.CLIP(**clip_model.PRESETS["ViT-L/14"])
    other = dataclasses.replace(one, activation="gelu")
    assert embedders.clip_name(other) == "224px14-w1024-l24-d768"


def test_equal_ids_mean_equal_networks(clip_params, tmp_path):
    """Whatever holds the weights; another weight, activation or number of heads is another id."""
    ids = {}
    other = jax.tree.map(np.copy, clip_params)
    other["vision"]["position"][0, 0] += 1
    for name, arch, params in (
        ("same", ARCH, clip_params),
        ("trained", ARCH | {"dtype": "bfloat16", "remat": "full"}, clip_params),
        ("folded", ARCH | {"fold": True}, stack_blocks(clip_params)),
        ("weight", ARCH, other),
        ("gelu", ARCH | {"activation": "gelu"}, clip_params),
        ("heads", ARCH | {"vision_heads": 4}, clip_params),
    ):
        bundle.write(tmp_path / name, {"clip": bundle.Part("clip", arch, params)})
        part = bundle.read_part(tmp_path / name, "clip")
        ids[name] = embedders.clip_id(part)
        assert embedders.clip_extractor(tmp_path / name).id == f"{ids[name]}.openai"
    assert ids["same"] == ids["trained"] == ids["folded"]
    assert len(set(ids.values())) == 4


def test_only_published_weights_bear_their_name(clip_params, tmp_path, monkeypatch):
    """A file that is known by its sha256 gives its name to the part, until that is changed."""
    preset = {
        f.name: getattr(clip_model.CLIP(**ARCH), f.name)
        for f in dataclasses.fields(clip_model.CLIP)
        if f.name in ARCH or f.name == "activation"
    }
    monkeypatch.setitem(clip_model.PRESETS, "ViT-T/8", preset)
    folder = tmp_path / "hf"
    formats.write("hf-clip", {"clip": bundle.Part("clip", ARCH, clip_params)}, folder)
    file = folder / "model.safetensors"
    own = embedders.clip_extractor(folder).id
    assert own.startswith("clip.ViT-T-8-") and own.endswith(".openai")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(published.FILES, sha256, "ViT-T/8")
    assert embedders.clip_extractor(folder).id == "clip.ViT-T-8.openai"
    part = formats.read("hf-clip", [folder])["clip"]
    assert part.settings == {"loss": "softmax"}  # what the task of training takes
    bundle.write(tmp_path / "kept", {"clip": part})
    kept = bundle.read_part(tmp_path / "kept", "clip")
    assert embedders.clip_id(kept) == "clip.ViT-T-8"
    bundle.write(tmp_path / "rounded", {"clip": kept}, dtype="bfloat16")
    assert embedders.clip_extractor(tmp_path / "rounded").id.startswith("clip.ViT-T-8-")
    kept.params["logit_scale"] = kept.params["logit_scale"] + 1  # trained further
    assert embedders.clip_id(kept).startswith("clip.ViT-T-8-")
    # The published tensors with another activation are another network.
    config = json.loads((folder / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        config[tower]["hidden_act"] = "gelu"
    (folder / "config.json").write_text(json.dumps(config))
    assert embedders.clip_extractor(folder).id.startswith("clip.16px8-w16-l1-d24-")


def test_names_in_the_table_are_presets():
    known = {*clip_model.PRESETS, *dinov2_model.PRESETS}
    assert set(published.FILES.values()) <= known
    assert all(len(bytes.fromhex(name)) == 32 for name in published.FILES)


def test_a_run_is_read_too(run_of):
    workdir = run_of("clip")
    extractor, encoder = embedders.clip_extractor(workdir), embedders.CaptionEncoder(workdir)
    part = runs.open_part(workdir, "clip")
    assert extractor.provenance["weights_sha256"] == bundle.tree_hash(part.params)
    assert encoder.provenance["weights_sha256"] == extractor.provenance["weights_sha256"]
    assert features(extractor, PICTURES)["z_i"].shape == (3, 16)
    assert encoder.encode(CAPTIONS).shape == (5, 16)


def test_a_folder_of_transformers(clip_bundle, clip_params, tmp_path):
    arch = ARCH | {"activation": "gelu"}
    folder = tmp_path / "hf"
    formats.write("hf-clip", {"clip": bundle.Part("clip", arch, clip_params)}, folder)
    bundle.write(tmp_path / "ours", {"clip": bundle.Part("clip", arch, clip_params)})
    theirs, ours = (
        (embedders.clip_extractor(path), embedders.CaptionEncoder(path))
        for path in (folder, tmp_path / "ours")
    )
    expected = features(ours[0], PICTURES)["z_i"]
    np.testing.assert_array_equal(features(theirs[0], PICTURES)["z_i"], expected)
    np.testing.assert_array_equal(theirs[1].encode(CAPTIONS), ours[1].encode(CAPTIONS))
    assert theirs[0].provenance["weights_sha256_of"] == "parameters"


def test_paths_that_hold_no_clip(tmp_path, clip_bundle, dinov2_bundle, clip_params):
    with pytest.raises(errors.DataError, match="no such file or folder"):
        embedders.clip_extractor(tmp_path / "nowhere")
    with pytest.raises(errors.ConfigError, match="no part 'clip': it holds dinov2"):
        embedders.CaptionEncoder(dinov2_bundle)
    (tmp_path / "ViT-B-32.pt").write_bytes(b"")
    with pytest.raises(errors.ConfigError, match="unclip convert --from openai-clip"):
        embedders.clip_extractor(tmp_path / "ViT-B-32.pt")
    with pytest.raises(errors.ConfigError, match="did you mean 'openai'"):
        embedders.clip_extractor(clip_bundle, "openia")
    with pytest.raises(errors.ConfigError, match="unknown dtype"):
        embedders.clip_extractor(clip_bundle, dtype="float16")
    blind = bundle.Part("clip", ARCH | {"vision_layers": 0}, {"text": clip_params["text"]})
    bundle.write(tmp_path / "blind", {"clip": blind})
    with pytest.raises(errors.ConfigError, match="no image tower"):
        embedders.clip_extractor(tmp_path / "blind")


# --------------------------------------------------------------------------------------- captions


@pytest.fixture(scope="module")
def encoder(clip_bundle):
    return embedders.CaptionEncoder(clip_bundle)


def test_cut_captions(encoder):
    whole = Tokenizer().encode(CAPTIONS, 40)[0]
    kept, cut = encoder.tokens(CAPTIONS)
    sliced, again = encoder.tokens(CAPTIONS, truncate="slice")
    assert kept.shape == sliced.shape == (5, 12)
    np.testing.assert_array_equal(cut, [False, False, True, True, False])
    np.testing.assert_array_equal(again, cut)
    assert encoder.cut(CAPTIONS) == [2, 3] == [int(k) for k in np.flatnonzero(cut)]
    np.testing.assert_array_equal(sliced, whole[:, :12])
    np.testing.assert_array_equal(kept[~cut], whole[~cut, :12])
    np.testing.assert_array_equal(kept[cut, :11], whole[cut, :11])
    assert (kept[cut, 11] == EOT).all() and (sliced[cut] != EOT).all()


def test_what_a_slice_does_to_an_embedding(encoder):
    """Without an end CLIP reads a text at its start, where it has seen no word."""
    z_t, sliced = encoder.encode(CAPTIONS), encoder.encode(CAPTIONS, truncate="slice")
    np.testing.assert_array_equal(sliced[[0, 1, 4]], z_t[[0, 1, 4]])
    np.testing.assert_allclose(sliced[2], sliced[3], atol=1e-6)
    assert np.abs(z_t[2] - z_t[3]).max() > 1e-2


def test_rows_do_not_depend_on_one_another(encoder):
    z_t = encoder.encode(CAPTIONS, batch_size=3)
    assert z_t.shape == (5, 24) and z_t.dtype == np.float32
    for k, caption in enumerate(CAPTIONS):
        np.testing.assert_array_equal(encoder.encode([caption], batch_size=3)[0], z_t[k])
    assert encoder.encode([]).shape == (0, 24)


def test_prefix(encoder):
    made = encoder.encode(["a fox"], prefix=embedders.HESSEL_PREFIX)
    np.testing.assert_array_equal(made, encoder.encode(["A photo depicts a fox"]))
    assert encoder.tokens(["a fox"], prefix="x ")[0][0, 0] == SOT
    # A prefix can be what makes a caption too long.
    eight = "one two three four five six seven eight nine"
    assert encoder.cut([eight]) == [] and encoder.cut([eight], prefix="A photo depicts ") == [0]


def test_captions_that_are_none(encoder):
    with pytest.raises(errors.ConfigError, match="captions is one text"):
        encoder.encode("a fox")
    with pytest.raises(errors.ConfigError, match="did you mean 'slice'"):
        encoder.encode(["a fox"], truncate="slices")


# ----------------------------------------------------------------------------------------- DINOv2


def test_dinov2(dinov2_bundle):
    extractor = embedders.dinov2_extractor(dinov2_bundle)
    network = extractor.provenance["network_sha256"]
    assert extractor.id == f"dinov2.70px14-w16-l1-{network[:8]}.bicubic224.hub"
    assert extractor.outputs == {"cls": 16} and extractor.provenance["interpolation"] == "hub"
    shown = extractor.prepare(PICTURES[1])["image"]
    squashed = Image.fromarray(PICTURES[1]).resize((224, 224), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(shown, np.array(squashed))
    made = features(extractor, PICTURES)["cls"]
    assert made.shape == (3, 16) and made.dtype == np.float32
    other = embedders.dinov2_extractor(dinov2_bundle, interpolation="transformers")
    assert other.id.endswith(".transformers")
    assert np.abs(features(other, PICTURES)["cls"] - made).max() > 1e-4
    with pytest.raises(errors.ConfigError, match="did you mean 'transformers'"):
        embedders.dinov2_extractor(dinov2_bundle, interpolation="transformer")
    with pytest.raises(errors.ConfigError, match="no DINOv2 of Meta's layout"):
        embedders.dinov2_extractor(dinov2_bundle / "dinov2.safetensors")


def test_dinov2_with_registers_reads_positions_its_own_way(tmp_path):
    arch = dict(width=16, layers=1, heads=2, image_size=70, registers=2, interpolation="antialias")
    part = bundle.Part("dinov2", {"class": "DINOv2"} | arch, drawn(interop.shapes(arch)))
    bundle.write(tmp_path, {"dinov2": part})
    extractor = embedders.dinov2_extractor(tmp_path)
    network = extractor.provenance["network_sha256"]
    assert extractor.id == f"dinov2.70px14-w16-l1-r2-{network[:8]}.bicubic224.antialias"
