"""DINOv2 against transformers with random weights, and FD-DINOv2's features from picture files."""

import math
import re

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional

from unclip.cascade import bundle
from unclip.files import tensors
from unclip.interop import dinov2 as interop
from unclip.interop import formats, layout
from unclip.measure import embedders, features
from unclip.measure.pictures import open_pictures
from unclip.models import dinov2

PEER = "transformers"
SMALL = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, patch_size=14)
CASES = {
    "MLP": (transformers.Dinov2Model, dict(image_size=70)),
    "SwiGLU": (transformers.Dinov2Model, dict(image_size=70, use_swiglu_ffn=True)),
    "registers": (transformers.Dinov2WithRegistersModel, dict(image_size=70)),
}
# Names that a file holds where transformers' own modules now have others.
SAVED = (
    (r"attention\.q_proj", "attention.attention.query"),
    (r"attention\.k_proj", "attention.attention.key"),
    (r"attention\.v_proj", "attention.attention.value"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.down_proj", "mlp.weights_out"),
)
HUB = (
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^layernorm", "norm"),
    (r"^encoder\.layer\.", "blocks."),
    (r"attention\.output\.dense", "attn.proj"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"mlp\.weights_in", "mlp.w12"),
    (r"mlp\.weights_out", "mlp.w3"),
)


def renamed(name, pairs):
    for pattern, new in pairs:
        name = re.sub(pattern, new, name)
    return name


def random_model(kind, **fields):
    """Every parameter drawn anew; norms and LayerScale near 1, positions that matter."""
    config = kind.config_class(**SMALL | fields)
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            one = (name.endswith("weight") and "norm" in name) or "lambda1" in name
            wide = "token" in name or "position" in name
            scale = 0.2 if one else 0.5 if wide else parameter[0].numel() ** -0.5
            if parameter.ndim == 1 and not one:
                scale = 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + one)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{case: (their model, its folder)}."""
    out = {}
    for name, (kind, fields) in CASES.items():
        folder = tmp_path_factory.mktemp("dinov2")
        model = random_model(kind, **fields)
        model.save_pretrained(folder)
        out[name] = model, folder
    return out


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def cls_of(model, pictures):
    """Their class token of float [B, H, W, 3]."""
    with torch.no_grad():
        out = model(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous())
    return out.pooler_output.numpy()


@pytest.mark.parametrize("case", CASES)
def test_class_token(parity, folders, case):
    model, folder = folders[case]
    part = interop.read([folder], {})["dinov2"]
    arch = {name: value for name, value in part.arch.items() if name != "class"}
    params, worst = jax.tree.map(np.asarray, part.params), 0
    for size in (70, 42, 98):
        pictures = np.random.default_rng(size).normal(0, 1, (2, size, size, 3)).astype(np.float32)
        ours = jax.jit(dinov2.DINOv2(**arch).apply)({"params": params}, pictures)
        worst = max(worst, relative(np.asarray(ours), cls_of(model, pictures)))
    what = f"DINOv2 class token, {case}, 5 x 5 positions at 5 x 5, 3 x 3, 7 x 7, relative"
    parity(what, PEER, worst, 1e-4)


@pytest.mark.parametrize("name", dinov2.INTERPOLATIONS)
def test_interpolations(parity, name):
    """The matrix against torch's own bicubic, called as Meta's code and transformers call it."""
    worst = 0
    for old, new in [(37, 16), (37, 40), (16, 37), (37, 5)]:
        call = {
            "hub": dict(scale_factor=((new + 0.1) / old,) * 2),
            "transformers": dict(size=(new, new), align_corners=False),
            "antialias": dict(size=(new, new), align_corners=False, antialias=True),
        }[name]
        grid = torch.randn(1, 3, old, old, generator=torch.Generator().manual_seed(1))
        theirs = functional.interpolate(grid, mode="bicubic", **call).numpy()
        matrix = dinov2.position_matrix(old, new, name).astype(np.float64)
        ours = np.einsum("ia,jb,ncab->ncij", matrix, matrix, grid.numpy().astype(np.float64))
        worst = max(worst, np.abs(ours - theirs).max())
    what = f"positions of 37 x 37 at 16, 40 and 5, of 16 x 16 at 37, {name}"
    parity(what, "torch's interpolate", worst, 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_metas_layout(folders, case, tmp_path):
    """One network in both layouts becomes the same leaves, to the bit."""
    _, folder = folders[case]
    stored = {name: torch.from_numpy(np.array(t)) for name, t in _stored(folder).items()}
    theirs = {}
    for name, tensor in stored.items():
        if ".attention.attention." not in name:
            theirs[renamed(name, HUB)] = tensor
    for name in stored:
        if found := re.match(r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(\w+)", name):
            words = [name.replace("query", word) for word in ("query", "key", "value")]
            fused = torch.cat([stored[word] for word in words])
            theirs[f"blocks.{found[1]}.attn.qkv.{found[2]}"] = fused
    path = tmp_path / "dinov2_pretrain.pth"
    torch.save(theirs, path)
    hub = formats.read("dinov2", [path])["dinov2"]
    hf = formats.read("dinov2", [folder])["dinov2"]
    assert jax.tree.structure(hub.params) == jax.tree.structure(hf.params)
    jax.tree.map(np.testing.assert_array_equal, hub.params, hf.params)
    usual = {"interpolation": "antialias" if case == "registers" else "hub"}
    assert hub.arch == hf.arch | usual


def _stored(folder):
    return tensors.read(folder / "model.safetensors")[0]


@pytest.mark.parametrize("name", dinov2.PRESETS)
def test_presets_take_the_published_tensors(name):
    """Names and shapes of every preset are those of transformers' model of the same sizes."""
    preset = dinov2.PRESETS[name]
    registers = preset.get("registers", 0)
    kind = transformers.Dinov2WithRegistersModel if registers else transformers.Dinov2Model
    config = kind.config_class(
        hidden_size=preset["width"], num_hidden_layers=preset["layers"], image_size=518,
        num_attention_heads=preset["heads"], patch_size=14,
        use_swiglu_ffn=preset["ffn"] == "swiglu",
    )  # fmt: skip
    with torch.device("meta"):
        state = kind(config).state_dict()
    source = {}
    for key, tensor in state.items():
        shape = tuple(tensor.shape)
        if "mlp.gate_proj" in key:
            key, shape = key.replace("gate_proj", "weights_in"), (2 * shape[0], *shape[1:])
        elif "mlp.up_proj" in key:
            continue
        source[renamed(key, SAVED)] = tensors.Lazy(shape, np.float32, None)
    arch = interop.hf_arch(config.to_dict(), name)
    assert {k: v for k, v in arch.items() if preset.get(k, v) != v} in (
        {}, {"interpolation": "transformers"}
    )  # fmt: skip
    taken = layout.take(
        interop.hf_rules(arch), source, interop.shapes(arch), what=name, ignore=interop.MASK_TOKENS
    )
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(taken))
    assert count == sum(t.numel() for t in state.values()) - preset["width"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(their model with 37 x 37 positions, its folder): the sizes of FD-DINOv2."""
    folder = tmp_path_factory.mktemp("dinov2_518")
    model = random_model(transformers.Dinov2Model, image_size=518)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def picture_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    files = []
    for number, (height, width) in enumerate([(224, 224), (301, 187), (64, 65), (500, 333)]):
        coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        files.append(folder / f"{number}.{'jpg' if number == 3 else 'png'}")
        picture.save(files[-1])
    return files


def fd_dinov2(model, files):
    """The published preparation, then their model."""
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    pictures = []
    for file in files:
        with Image.open(file) as opened:
            squashed = opened.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        pictures.append((np.asarray(squashed, np.float32) / 255 - mean) / std)
    return cls_of(model, np.stack(pictures))


def ours_of(extractor, files):
    pictures = open_pictures(files[0].parent)
    assert [pictures.name(k) for k in range(len(pictures))] == [file.name for file in files]
    return features.extract(extractor, pictures).rows["cls"]


def test_features_of_files(parity, whole, picture_files, tmp_path):
    """FD-DINOv2's features from files through a bundle, by both codes' reading of positions."""
    model, folder = whole
    bundle.write(tmp_path, formats.read("dinov2", [folder]))
    what = "FD-DINOv2 features from files, 37 x 37 positions at 16 x 16, relative"
    extractor = embedders.dinov2_extractor(tmp_path, interpolation="transformers")
    by_transformers = fd_dinov2(model, picture_files)
    parity(what, PEER, relative(ours_of(extractor, picture_files), by_transformers), 1e-4)
    # Meta's code resizes the positions by a scale factor of 16.1 / 37 and then is the same network.
    position = model.embeddings.position_embeddings.detach()
    square = position[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    square = functional.interpolate(square, scale_factor=(16.1 / 37,) * 2, mode="bicubic")
    hub = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL | {"image_size": 224})).eval()
    state = model.state_dict()
    resized = torch.cat([position[:, :1], square.flatten(2).transpose(1, 2)], 1)
    hub.load_state_dict(state | {"embeddings.position_embeddings": resized})
    by_hub = fd_dinov2(hub, picture_files)
    extractor = embedders.dinov2_extractor(tmp_path)
    assert extractor.id.endswith(".bicubic224.hub")
    parity(f"{what}, Meta's step", PEER, relative(ours_of(extractor, picture_files), by_hub), 1e-4)
    # The two readings are not one number.
    assert relative(by_hub, by_transformers) > 1e-2
