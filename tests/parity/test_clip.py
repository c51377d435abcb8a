"""CLIP's towers against transformers' CLIPModel and OpenCLIP's CLIP, through the converters.

Every preset with its own options (activation, patch, width of a head, ratio of the MLP), reduced in
width and depth, with random weights in every layer; one at full depth. Full sizes by shape alone.
"""

import functools
import importlib.util
import json
import sys
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from unclip import errors, tasks
from unclip.cascade import bundle
from unclip.files import tensors
from unclip.files.tensors import Lazy
from unclip.interop import clip as hf
from unclip.interop import formats, layout, openai_clip
from unclip.models import clip
from unclip.models.transformer import stack_blocks

pytestmark = pytest.mark.usefixtures("quick_compiles")

BOUND = 1e-4
VOCABULARY = 1000
DEEP = "ViT-B/32"  # at full depth
# Imported by open_clip for its image transforms and its frozen batch norm, unused here.
TORCHVISION = ["", ".transforms", ".transforms.functional", ".ops", ".ops.misc"]
ZOO = {
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336": "ViT-L-14-336-quickgelu",
    "ViT-H/14": "ViT-H-14",
    "ViT-bigG/14": "ViT-bigG-14",
}
FULL = {
    "ViT-B/32": 151_277_313,
    "ViT-L/14": 427_616_513,
    "ViT-H/14": 986_109_441,
    "ViT-bigG/14": 2_539_567_105,
}


@pytest.fixture(scope="module")
def open_clip():
    """OpenCLIP, with substitutes for torchvision while it is imported and not after."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip_torch is not installed")
    if "open_clip" not in sys.modules:
        names = [f"torchvision{name}" for name in TORCHVISION]
        stubs = {name: unittest.mock.MagicMock() for name in names} | {"timm": None}
        if importlib.util.find_spec("torchvision") is not None:
            stubs = {}
        before = {name: sys.modules.get(name) for name in stubs}
        try:
            sys.modules.update(stubs)
            importlib.import_module("open_clip")
        finally:
            for name, module in before.items():
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module
    return sys.modules["open_clip"]


def reduced(preset):
    """The preset's options at two heads a tower, two blocks and 3 x 3 patches."""
    full = clip.PRESETS[preset]
    vision_head = full["vision_width"] // full["vision_heads"]
    text_head = full["text_width"] // full["text_heads"]
    width = 2 * vision_head
    arch = full | {
        "embed_dim": 48,
        "image_size": full["patch_size"] * (4 if "@" in preset else 3),
        "vision_width": width,
        "vision_heads": 2,
        "text_width": 2 * text_head,
        "text_heads": 2,
        "vocab_size": VOCABULARY,
    }
    if "vision_mlp_width" in full:
        arch["vision_mlp_width"] = full["vision_mlp_width"] * width // full["vision_width"]
    return arch if preset == DEEP else arch | {"vision_layers": 2, "text_layers": 2}


def hf_model(arch):
    """transformers' CLIPModel of an architecture."""
    text = dict(
        hidden_size=arch["text_width"],
        intermediate_size=4 * arch["text_width"],
        num_hidden_layers=arch["text_layers"],
        num_attention_heads=arch["text_heads"],
        vocab_size=arch.get("vocab_size", 49408),
        max_position_embeddings=arch["context"],
        eos_token_id=arch.get("vocab_size", 49408) - 1,
        hidden_act=arch["activation"],
    )
    vision = dict(
        hidden_size=arch["vision_width"],
        intermediate_size=arch.get("vision_mlp_width") or 4 * arch["vision_width"],
        num_hidden_layers=arch["vision_layers"],
        num_attention_heads=arch["vision_heads"],
        image_size=arch["image_size"],
        patch_size=arch["patch_size"],
        hidden_act=arch["activation"],
    )
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text, vision_config=vision, projection_dim=arch["embed_dim"]
        )
    )


def open_clip_config(arch):
    mlp = arch.get("vision_mlp_width") or 4 * arch["vision_width"]
    vision = dict(
        image_size=arch["image_size"],
        layers=arch["vision_layers"],
        width=arch["vision_width"],
        head_width=arch["vision_width"] // arch["vision_heads"],
        patch_size=arch["patch_size"],
        mlp_ratio=mlp / arch["vision_width"],
    )
    text = dict(
        context_length=arch["context"],
        vocab_size=arch.get("vocab_size", 49408),
        width=arch["text_width"],
        heads=arch["text_heads"],
        layers=arch["text_layers"],
    )
    quick = {"quick_gelu": True} if arch["activation"] == "quick_gelu" else {}
    return dict(embed_dim=arch["embed_dim"], vision_cfg=vision, text_cfg=text) | quick


def randomise(model, seed=0):
    """Values that make every leaf matter: norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            noise = torch.randn(leaf.shape, generator=generator)
            around = 1.0 if leaf.ndim == 1 and name.endswith("weight") else 0.0
            leaf.copy_(around + (0.1 if leaf.ndim < 2 else 2 * leaf.shape[-1] ** -0.5) * noise)
        model.logit_scale.fill_(3.5)
    return model.eval()


def inputs(arch, batch=3):
    rng = np.random.default_rng(0)
    size, length = arch["image_size"], arch["context"]
    images = rng.normal(size=(batch, size, size, 3)).astype(np.float32)
    tokens = rng.integers(1, VOCABULARY - 2, (batch, length)).astype(np.int32)
    tokens[:, 0] = VOCABULARY - 2
    for row, end in enumerate((length - 1, length // 2, 3)[:batch]):
        tokens[row, end] = VOCABULARY - 1
        tokens[row, end + 1 :] = 0
    return images, tokens


@functools.cache
def jitted(fields):
    module = clip.CLIP(**dict(fields), fold=True)  # which compiles one block, not all

    def run(params, images, tokens):
        variables = {"params": params}
        z_t, hidden = module.apply(variables, tokens, method="encode_text")
        scale, _ = module.apply(variables, method="logit_scale_and_bias")
        return module.apply(variables, images, method="encode_image"), z_t, hidden, scale

    return jax.jit(run)


def loaded(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf.read()), tree)


def ours(part, images, tokens, **fields):
    arch = tasks.arguments(part.arch) | fields
    run = jitted(tuple(sorted(arch.items())))
    params = stack_blocks(loaded(part.params))
    return [np.asarray(a, np.float32) for a in run(params, images, tokens)]


def relative(mine, theirs):
    theirs = theirs.float().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert mine.shape == theirs.shape
    return np.abs(mine - theirs).max() / np.abs(theirs).max()


def to_torch(images, tokens):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(tokens).long()


@torch.no_grad()
def hf_outputs(model, images, tokens):
    pixels, ids = to_torch(images, tokens)
    vision = model.vision_model(pixels.to(model.dtype)).pooler_output
    text = model.text_model(ids)
    z_i, z_t = model.visual_projection(vision), model.text_projection(text.pooler_output)
    return z_i, z_t, text.last_hidden_state, model.logit_scale.exp()


@torch.no_grad()
def open_clip_outputs(model, images, tokens):
    pixels, ids = to_torch(images, tokens)
    return model.encode_image(pixels), model.encode_text(ids), model.logit_scale.exp()


def write_open_clip(folder, model, config):
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors.write(folder / "open_clip_model.safetensors", state)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return folder


def open_clip_model(open_clip, arch, **options):
    config = open_clip_config(arch) | options
    custom = config.pop("custom_text", False)
    made = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    return randomise(made)


@pytest.mark.parametrize("preset", clip.PRESETS)
def test_towers_equal_transformers(preset, parity, tmp_path):
    arch = reduced(preset)
    model = randomise(hf_model(arch))
    model.save_pretrained(tmp_path)
    part = formats.read("hf-clip", [tmp_path])["clip"]
    images, tokens = inputs(arch)
    mine, theirs = ours(part, images, tokens), hf_outputs(model, images, tokens)
    difference = max(relative(a, b) for a, b in zip(mine, theirs, strict=True))
    shown = f"CLIP {preset}, {arch['activation']}: towers, text states, scale (relative)"
    parity(shown, "transformers", difference, BOUND)


@pytest.mark.parametrize("preset", clip.PRESETS)
def test_towers_equal_open_clip(preset, open_clip, parity, tmp_path):
    arch = reduced(preset)
    model = open_clip_model(open_clip, arch)
    folder = write_open_clip(tmp_path, model, open_clip_config(arch))
    part = formats.read("open-clip", [folder])["clip"]
    images, tokens = inputs(arch)
    mine, theirs = ours(part, images, tokens), open_clip_outputs(model, images, tokens)
    pairs = zip((mine[0], mine[1], mine[3]), theirs, strict=True)
    shown = f"CLIP {preset}, {arch['activation']}: towers, scale (relative)"
    parity(shown, "open_clip", max(relative(a, b) for a, b in pairs), BOUND)


def test_bfloat16_stays_close(parity, tmp_path):
    """Ours in bfloat16 against theirs in float32, on weights stored in bfloat16."""
    arch = reduced("ViT-H/14") | {"vision_layers": 4, "text_layers": 4}
    model = randomise(hf_model(arch)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    part = formats.read("hf-clip", [tmp_path])["clip"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(part.params)} == {"bfloat16"}
    images, tokens = inputs(arch)
    mine = ours(part, images, tokens, dtype=jnp.dtype("bfloat16"))
    theirs = hf_outputs(model.float(), images, tokens)
    for name, a, b in zip(("image tower", "text tower"), mine, theirs):
        shown = f"CLIP ViT-H/14, {name}, bfloat16 against float32 (relative)"
        parity(shown, "transformers", relative(a, b), 0.05)


def test_each_towers_own_model(parity, tmp_path):
    """CLIPTextModelWithProjection and CLIPVisionModelWithProjection, apart and together."""
    arch = reduced("ViT-L/14")
    whole = randomise(hf_model(arch))
    text, vision = whole.config.text_config, whole.config.vision_config
    text.projection_dim = vision.projection_dim = arch["embed_dim"]
    models = {
        "text": transformers.CLIPTextModelWithProjection(text),
        "vision": transformers.CLIPVisionModelWithProjection(vision),
    }
    for side, model in models.items():
        state = {name: whole.state_dict()[name] for name in model.state_dict()}
        model.load_state_dict(state)
        model.save_pretrained(tmp_path / side)
    images, tokens = inputs(arch)
    theirs = hf_outputs(whole, images, tokens)
    both = formats.read("hf-clip", [tmp_path / "text", tmp_path / "vision"])["clip"]
    mine = ours(both, images, tokens)
    difference = max(relative(a, b) for a, b in zip(mine[:2], theirs))
    parity("CLIP from two towers' models (relative)", "transformers", difference, BOUND)
    np.testing.assert_allclose(mine[3], 100, rtol=1e-6)
    alone = formats.read("hf-clip", [tmp_path / "text"])["clip"]
    module = clip.CLIP(**alone.arch)
    z_t, _ = module.apply({"params": loaded(alone.params)}, tokens, method="encode_text")
    assert relative(z_t, mine[1]) < 1e-5
    with pytest.raises(errors.ConfigError, match="image encoder's folder too"):
        module.apply({"params": loaded(alone.params)}, images, method="encode_image")


def test_round_trip_to_transformers_is_bitwise(tmp_path):
    arch = reduced("ViT-bigG/14") | {"vocab_size": 49408}
    model = randomise(hf_model(arch)).half()
    model.save_pretrained(tmp_path / "theirs")
    parts = formats.read("hf-clip", [tmp_path / "theirs"])
    bundle.write(tmp_path / "bundle", parts)
    parts = bundle.read(tmp_path / "bundle", lazy=True).parts
    formats.write("hf-clip", parts, tmp_path / "ours")
    files = [tmp_path / side / "model.safetensors" for side in ("theirs", "ours")]
    assert files[0].read_bytes() == files[1].read_bytes()
    again, info = transformers.CLIPModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.dtype == torch.float16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    own = {"transformers_version", "architectures", "dtype", "_name_or_path"}
    mine, theirs = again.config.to_dict(), model.config.to_dict()
    for side in ("text_config", "vision_config"):
        # `projection_dim` of a tower is not used in a CLIPModel, and padding by neither.
        for name in ("projection_dim", "pad_token_id", "bos_token_id", "dtype"):
            mine[side].pop(name, None), theirs[side].pop(name, None)
    assert {k: v for k, v in mine.items() if k not in own} == {
        k: v for k, v in theirs.items() if k not in own
    }


def test_processor_of_a_written_folder(tmp_path):
    """CLIPProcessor prepares captions and pictures as a bundle's pipeline does."""
    from PIL import Image

    from unclip.input.decode.image import for_clip
    from unclip.input.decode.text import Tokenizer

    arch = reduced("ViT-B/32") | {"vocab_size": 49408, "text_layers": 1, "vision_layers": 1}
    hf_model(arch).save_pretrained(tmp_path / "theirs")
    parts = formats.read("hf-clip", [tmp_path / "theirs"])
    formats.write("hf-clip", parts, tmp_path / "ours")
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "ours")
    captions = ["a red fox!", "It's 3 o'clock, naïve café"]
    picture = np.random.default_rng(0).integers(0, 256, (130, 170, 3), np.uint8)
    made = processor(
        text=captions, images=Image.fromarray(picture), padding="max_length", return_tensors="np"
    )
    tokens, mask, _ = Tokenizer().encode(captions, 77)
    np.testing.assert_array_equal(made["input_ids"][mask], tokens[mask])
    np.testing.assert_array_equal(made["attention_mask"].astype(bool), mask)
    size = arch["image_size"]
    prepared = clip.normalise(for_clip(picture, size).astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(made["pixel_values"][0].transpose(1, 2, 0), prepared, atol=0.02)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["state dict", "TorchScript"])
def test_openai_files(kind, open_clip, parity, tmp_path):
    """OpenAI's layout, in half precision, from both kinds of its files."""
    arch = reduced("ViT-B/16") | {
        "vision_width": 128, "vision_heads": 2, "text_width": 64, "text_heads": 1,
    }  # fmt: skip
    model = open_clip_model(open_clip, arch).half()
    file = tmp_path / "ViT-B-16.pt"
    if kind == "state dict":
        numbers = dict(input_resolution=48, context_length=77, vocab_size=VOCABULARY)
        state = model.state_dict() | {k: torch.tensor(v) for k, v in numbers.items()}
        torch.save(state, file)
    else:
        images, tokens = to_torch(*inputs(arch))
        torch.jit.trace(model.float(), (images, tokens), check_trace=False).half().save(file)
    part = formats.read("openai-clip", [file])["clip"]
    assert part.arch["activation"] == "quick_gelu"
    assert part.arch["vision_heads"] == 2 and part.arch["context"] == 77
    assert part.params["vision"]["patch"]["kernel"].dtype == np.float16
    images, tokens = inputs(arch)
    mine = ours(part, images, tokens)
    theirs = open_clip_outputs(model.half().float(), images, tokens)
    difference = max(relative(a, b) for a, b in zip((mine[0], mine[1], mine[3]), theirs))
    parity(f"CLIP from an OpenAI {kind} (relative)", "open_clip", difference, BOUND)


@pytest.mark.parametrize("wrapped", ["module", "custom text", "logit bias", "bare"])
def test_open_clip_files(wrapped, open_clip, parity, tmp_path):
    arch = reduced("ViT-H/14")
    options = {
        "custom text": {"custom_text": True},
        "logit bias": {"init_logit_bias": -10.0, "nonscalar_logit_scale": True},
    }.get(wrapped, {})
    if wrapped == "bare":  # from the file alone: OpenCLIP's heads of 80 at this width
        arch |= {"vision_width": 1280, "vision_heads": 16, "vision_layers": 1, "text_layers": 1}
    model = open_clip_model(open_clip, arch, **options)
    state, path = model.state_dict(), tmp_path
    if wrapped == "module":
        state = {"epoch": 3, "state_dict": {f"module.{n}": tensor for n, tensor in state.items()}}
    if wrapped == "bare":
        path = tmp_path / "epoch_3.pt"
        torch.save(state, path)
    else:
        torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
        config = {"model_cfg": open_clip_config(arch) | options}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    part = formats.read("open-clip", [path])["clip"]
    assert part.arch.get("logit_bias", False) == (wrapped == "logit bias")
    images, tokens = inputs(arch)
    mine = ours(part, images, tokens)
    theirs = open_clip_outputs(model, images, tokens)
    difference = max(relative(a, b.reshape(a.shape)) for a, b in zip(
        (mine[0], mine[1], mine[3]), theirs))  # fmt: skip
    parity(f"CLIP from an OpenCLIP file, {wrapped} (relative)", "open_clip", difference, BOUND)


@functools.cache
def shapes(preset):
    arch = clip.PRESETS[preset]
    return jax.eval_shape(tasks.ClipTask(arch).init, jax.random.key(0))


def meta(model):
    """Their tensors by name, shapes alone."""
    return {
        name: Lazy(tensor.shape, np.float32, lambda: None)
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("preset", FULL)
def test_full_size_by_shape(preset, open_clip):
    arch = clip.PRESETS[preset]
    with torch.device("meta"):
        models = {
            "transformers": hf_model(arch),
            "open_clip": open_clip.CLIP(**open_clip_config(arch)),
        }
    rules = {"transformers": hf.hf_rules(arch), "open_clip": openai_clip.openai_rules(arch)}
    for name, model in models.items():
        source = meta(model)
        layout.take(rules[name], source, shapes(preset), what=f"{name} {preset}")
        assert sum(np.prod(t.shape, dtype=int) for t in source.values()) == FULL[preset], name
    config = models["transformers"].config
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    assert hf.hf_arch(text, vision, config.projection_dim) == {**arch, "vocab_size": 49408}


def test_open_clips_own_configs(open_clip):
    """Each of OpenCLIP's models is the preset it is here, or read, or refused by name."""
    for preset, name in ZOO.items():
        found = openai_clip.open_clip_arch({"model_cfg": open_clip.get_model_config(name)}, name)
        assert found == {**clip.PRESETS[preset], "vocab_size": 49408}, name
    taken = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        try:
            arch = openai_clip.open_clip_arch({"model_cfg": config}, name)
        except errors.ConfigError:
            continue
        taken.append(name)
        width, heads = arch["vision_width"], arch["vision_heads"]
        assert width // heads == openai_clip.HEAD_WIDTHS.get(width, 64), name
    other = ("SigLIP", "CLIPA", "worldwide", "ViT-M-16-alt")  # the last scales its layers
    plain = [name for name in open_clip.list_models() if name.startswith("ViT-")]
    assert set(taken) == {name for name in plain if not any(o in name for o in other)}
