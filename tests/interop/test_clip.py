"""CLIP of transformers, OpenAI and OpenCLIP into a part, strictly, and back for transformers."""

import json

import jax
import numpy as np
import pytest

from unclip.cascade import bundle
from unclip.errors import ConfigError, DataError
from unclip.files import tensors
from unclip.files.tensors import Lazy
from unclip.interop import clip, formats, layout, openai_clip
from unclip.models.clip import IMAGE_MEAN, IMAGE_STD, PRESETS
from unclip.models.transformer import stack_blocks, unstack_blocks
from unclip.runtime.sharding import tree_paths

DIM, PATCH, GRID, CONTEXT, WORDS = 24, 4, 2, 5, 60
SIDES = {"vision": (128, 192), "text": (64, 256)}  # width, width of the MLP
LAYERS = 2
TEXT = dict(
    hidden_size=64, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=1,
    vocab_size=WORDS, max_position_embeddings=CONTEXT, eos_token_id=WORDS - 1,
)  # fmt: skip
VISION = dict(
    hidden_size=128, intermediate_size=192, num_hidden_layers=LAYERS, num_attention_heads=2,
    image_size=PATCH * GRID, patch_size=PATCH,
)  # fmt: skip
CONFIG = dict(model_type="clip", projection_dim=DIM, text_config=TEXT, vision_config=VISION)
OPEN_CLIP = dict(
    embed_dim=DIM,
    vision_cfg=dict(
        image_size=PATCH * GRID, layers=LAYERS, width=128, patch_size=PATCH, mlp_ratio=1.5
    ),
    text_cfg=dict(context_length=CONTEXT, vocab_size=WORDS, width=64, heads=1, layers=LAYERS),
    quick_gelu=True,
)


@pytest.fixture(scope="module")
def weights():
    """One CLIP as [out, in] matrices under neutral names."""
    rng = np.random.default_rng(0)
    make = lambda *shape: rng.normal(size=shape).astype(np.float32)
    out = {
        "scale": make(),
        "class": make(128),
        "patch": make(128, 3, PATCH, PATCH),
        "token": make(WORDS, 64),
        "vision position": make(GRID**2 + 1, 128),
        "text position": make(CONTEXT, 64),
    }
    for side, (width, mlp) in SIDES.items():
        out[f"{side} projection"] = make(DIM, width)
        norms = {"vision": ("pre", "post"), "text": ("final",)}[side]
        for name in norms:
            out[f"{side} {name} weight"], out[f"{side} {name} bias"] = make(width), make(width)
        for i in range(LAYERS):
            for name in ("q", "k", "v", "out"):
                out[f"{side} {i} {name} weight"] = make(width, width)
                out[f"{side} {i} {name} bias"] = make(width)
            for name, shape in (("fc1", (mlp, width)), ("fc2", (width, mlp))):
                out[f"{side} {i} {name} weight"] = make(*shape)
                out[f"{side} {i} {name} bias"] = make(shape[0])
            for name in ("norm1", "norm2"):
                out[f"{side} {i} {name} weight"] = make(width)
                out[f"{side} {i} {name} bias"] = make(width)
    return out


def as_transformers(w, sides=("vision", "text")):
    """The names that transformers 5.23 saves, and those of 4.x."""
    names = {
        "class": "vision_model.embeddings.class_embedding",
        "patch": "vision_model.embeddings.patch_embedding.weight",
        "token": "text_model.embeddings.token_embedding.weight",
        "vision position": "vision_model.embeddings.position_embedding.weight",
        "text position": "text_model.embeddings.position_embedding.weight",
        "vision projection": "visual_projection.weight",
        "text projection": "text_projection.weight",
    }
    if len(sides) == 2:
        names["scale"] = "logit_scale"
    norms = {
        "vision pre": "vision_model.pre_layrnorm",
        "vision post": "vision_model.post_layernorm",
        "text final": "text_model.final_layer_norm",
    }
    for side in SIDES:
        for i in range(LAYERS):
            at = f"{side}_model.encoder.layers.{i}"
            norms |= {f"{side} {i} {n}": f"{at}.self_attn.{n}_proj" for n in ("q", "k", "v", "out")}
            norms |= {f"{side} {i} {n}": f"{at}.mlp.{n}" for n in ("fc1", "fc2")}
            norms |= {f"{side} {i} norm{n}": f"{at}.layer_norm{n}" for n in (1, 2)}
    for neutral, theirs in norms.items():
        names |= {f"{neutral} {kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    other = {"vision": ("text", "token"), "text": ("vision", "class", "patch")}
    absent = [p for side in SIDES if side not in sides for p in other[sides[0]]]
    return {
        theirs: w[neutral]
        for neutral, theirs in names.items()
        if not any(neutral.startswith(a) for a in absent)
    }


def as_openai(w):
    out = {
        "logit_scale": w["scale"],
        "visual.class_embedding": w["class"],
        "visual.conv1.weight": w["patch"],
        "visual.positional_embedding": w["vision position"],
        "visual.proj": w["vision projection"].T,
        "token_embedding.weight": w["token"],
        "positional_embedding": w["text position"],
        "text_projection": w["text projection"].T,
    }
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = w[f"vision pre {kind}"]
        out[f"visual.ln_post.{kind}"] = w[f"vision post {kind}"]
        out[f"ln_final.{kind}"] = w[f"text final {kind}"]
        for side, prefix in (("vision", "visual."), ("text", "")):
            for i in range(LAYERS):
                at = f"{prefix}transformer.resblocks.{i}"
                fused = [w[f"{side} {i} {name} {kind}"] for name in "qkv"]
                out[f"{at}.attn.in_proj_{kind}"] = np.concatenate(fused)
                for ours, theirs in (
                    ("out", "attn.out_proj"), ("fc1", "mlp.c_fc"), ("fc2", "mlp.c_proj"),
                    ("norm1", "ln_1"), ("norm2", "ln_2"),
                ):  # fmt: skip
                    out[f"{at}.{theirs}.{kind}"] = w[f"{side} {i} {ours} {kind}"]
    return {name: np.array(value, order="C") for name, value in out.items()}


def hf_folder(folder, state, config):
    tensors.write(folder / "model.safetensors", state)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def loaded(part):
    return {path: leaf.read() for path, leaf in tree_paths(part.params).items()}


def test_transformers_layout(weights, tmp_path):
    state = {name: value.astype(np.float16) for name, value in as_transformers(weights).items()}
    buffer = np.arange(5)[None]
    state["text_model.embeddings.position_ids"] = buffer  # saved before transformers 4.31
    state["vision_model.embeddings.position_ids"] = buffer
    part = formats.read("hf-clip", [hf_folder(tmp_path, state, CONFIG)])["clip"]
    assert part.settings == {"loss": "softmax"} and part.arch["vision_mlp_width"] == 192
    assert part.arch["activation"] == "quick_gelu" and part.arch["image_size"] == 8
    ours = loaded(part)
    assert all(isinstance(leaf, Lazy) for _, leaf in tree_paths(part.params).items())
    assert {leaf.dtype for leaf in ours.values()} == {np.dtype(np.float16)}
    half = {name: value.astype(np.float16) for name, value in weights.items()}
    assert sum(leaf.size for leaf in ours.values()) == sum(v.size for v in half.values())
    np.testing.assert_array_equal(ours["logit_scale"], half["scale"])
    np.testing.assert_array_equal(ours["vision/patch/kernel"], half["patch"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(ours["text/token/embedding"], half["token"])
    np.testing.assert_array_equal(ours["vision/ln_pre/scale"], half["vision pre weight"])
    np.testing.assert_array_equal(ours["text/proj/kernel"], half["text projection"].T)
    np.testing.assert_array_equal(
        ours["text/transformer/block_1/attn/k/kernel"], half["text 1 k weight"].T
    )
    np.testing.assert_array_equal(
        ours["vision/transformer/block_0/mlp/proj/bias"], half["vision 0 fc2 bias"]
    )


def test_three_layouts_give_the_same_leaves(weights, tmp_path):
    state = as_openai(weights)
    for name in ("hf", "hub"):
        (tmp_path / name).mkdir()
    hf = formats.read("hf-clip", [hf_folder(tmp_path / "hf", as_transformers(weights), CONFIG)])
    numbers = dict(input_resolution=8, context_length=CONTEXT, vocab_size=WORDS)
    tensors.write(
        tmp_path / "openai.safetensors", state | {n: np.asarray(v) for n, v in numbers.items()}
    )
    openai = formats.read("openai-clip", [tmp_path / "openai.safetensors"])
    # A folder of the hub holds transformers' file too, under the name that is looked for first.
    hf_folder(tmp_path / "hub", as_transformers(weights), CONFIG)
    wrapped = {
        f"module.{'' if name.startswith(('visual', 'logit')) else 'text.'}{name}": value
        for name, value in state.items()
    }
    wrapped["module.logit_scale"] = state["logit_scale"][None]
    tensors.write(tmp_path / "hub" / "open_clip_model.safetensors", wrapped)
    (tmp_path / "hub" / "open_clip_config.json").write_text(
        json.dumps(
            {"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": IMAGE_MEAN, "std": IMAGE_STD}}
        )
    )
    open_clip = formats.read("open-clip", [tmp_path / "hub"])
    reference = loaded(hf["clip"])
    for parts in (openai, open_clip):
        assert parts["clip"].arch == hf["clip"].arch
        ours = loaded(parts["clip"])
        assert ours.keys() == reference.keys()
        for path, leaf in ours.items():
            np.testing.assert_array_equal(leaf, reference[path], err_msg=path)


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.module.", "model.", "model.clip.", ""])
def test_a_training_of_open_clip_is_read(weights, tmp_path, save_torch, wrap):
    """{"epoch", "name", "state_dict", "optimizer"}, as open_clip saves, and others' wrappers."""
    named = {wrap + name: value for name, value in as_openai(weights).items()}
    moments = {"state": {0: {"exp_avg": np.zeros((2, 3), np.float32)}}}
    tree = {"epoch": 3, "name": "run", "state_dict": named, "optimizer": moments}
    plain = formats.read("open-clip", [save_torch(tmp_path / "epoch_3.pt", tree)])["clip"]
    nested = {"model": named, "optimizer": moments, "step": 7}
    other = formats.read("open-clip", [save_torch(tmp_path / "last.ckpt", nested)])["clip"]
    tensors.write(tmp_path / "clip.safetensors", as_openai(weights))
    want = loaded(formats.read("open-clip", [tmp_path / "clip.safetensors"])["clip"])
    for part in (plain, other):
        found = loaded(part)
        assert found.keys() == want.keys()
        for path, leaf in found.items():
            np.testing.assert_array_equal(leaf, want[path], err_msg=path)


def test_two_networks_in_one_file_are_told(weights, tmp_path):
    both = {f"{at}.{n}": v for at in ("model", "ema") for n, v in as_openai(weights).items()}
    tensors.write(tmp_path / "clip.safetensors", both)
    with pytest.raises(ConfigError, match=r"2 networks, below '\w+\.', '\w+\.'; expected"):
        formats.read("open-clip", [tmp_path / "clip.safetensors"])
    beside = {f"model.{n}": v for n, v in as_openai(weights).items()} | {"loss.bias": np.zeros(2)}
    tensors.write(tmp_path / "clip.safetensors", beside)
    with pytest.raises(layout.Mismatch, match=r"extra    loss.bias \[2\]"):
        formats.read("open-clip", [tmp_path / "clip.safetensors"])


def test_wrappers_of_transformers_folders(weights, tmp_path):
    """torch.compile and a model that holds the CLIP put names before it; fp16 ends its file's."""
    state = {f"_orig_mod.model.{n}": v for n, v in as_transformers(weights).items()}
    folder = hf_folder(tmp_path, state, CONFIG)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    found = loaded(formats.read("hf-clip", [folder])["clip"])
    hf_folder(tmp_path, as_transformers(weights), CONFIG)
    want = loaded(formats.read("hf-clip", [folder])["clip"])
    assert all(np.array_equal(leaf, want[path]) for path, leaf in found.items())


def test_towers_apart(weights, tmp_path):
    """One projected tower's folder gives a CLIP without the other; two give a whole one."""
    folders = {}
    for side, config in (("text", TEXT), ("vision", VISION)):
        folders[side] = tmp_path / side
        folders[side].mkdir()
        config = config | {"model_type": f"clip_{side}_model", "projection_dim": DIM}
        hf_folder(folders[side], as_transformers(weights, (side,)), config)
    text = formats.read("hf-clip", [folders["text"]])["clip"]
    assert text.arch["vision_layers"] == 0 and set(text.params) == {"text", "logit_scale"}
    np.testing.assert_allclose(np.exp(text.params["logit_scale"].read()), 100, rtol=1e-6)
    both = formats.read("hf-clip", [folders["vision"], folders["text"]])["clip"]
    assert set(both.params) == {"vision", "text", "logit_scale"}
    assert both.arch["vision_layers"] == both.arch["text_layers"] == LAYERS
    with pytest.raises(ConfigError, match="a second text tower"):
        formats.read("hf-clip", [folders["text"], folders["text"]])
    other = json.loads((folders["vision"] / "config.json").read_text()) | {"projection_dim": 7}
    (folders["vision"] / "config.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="a projection to 7"):
        formats.read("hf-clip", [folders["text"], folders["vision"]])
    with pytest.raises(ConfigError, match="no vision tower"):
        formats.write("hf-clip", {"clip": text}, tmp_path / "out")


def test_configs_that_hold_only_what_differs():
    """Silent and null fields have transformers' defaults, OpenAI's ViT-B/32."""
    towers, embed_dim = clip.hf_configs({"model_type": "clip", "text_config": None}, "")
    arch = clip.hf_arch(towers["text"], towers["vision"], embed_dim)
    assert arch == PRESETS["ViT-B/32"] | {"vocab_size": 49408}
    old = dict(
        model_type="clip",
        projection_dim=1024,
        text_config={"hidden_size": 999},  # a `_dict` counts instead, whole
        text_config_dict=dict(
            hidden_act="gelu", hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
            num_hidden_layers=24, eos_token_id=2, layer_norm_eps=None,
        ),
        vision_config_dict=dict(
            hidden_act="gelu", hidden_size=1280, intermediate_size=5120, num_attention_heads=16,
            num_hidden_layers=32, patch_size=[14, 14],
        ),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="no readable text_config"):
        clip.hf_configs(old | {"text_config_dict": 3}, "")
    towers, embed_dim = clip.hf_configs(old, "")
    arch = clip.hf_arch(towers["text"], towers["vision"], embed_dim)
    assert arch == PRESETS["ViT-H/14"] | {"vocab_size": 49408}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": {"hidden_act": "gelu"}}, "gelu and quick_gelu"),
        ({"text": {"hidden_act": "relu"}, "vision": {"hidden_act": "relu"}}, "is relu"),
        ({"vision": {"layer_norm_eps": 1e-6}}, "layer_norm_eps is 1e-06; expected 1e-05"),
        ({"text": {"intermediate_size": 300}}, "intermediate_size is 300; expected 256"),
        ({"text": {"eos_token_id": 7}}, "eos_token_id is 7; expected 2 or"),
        ({"vision": {"image_size": [8, 9]}}, "expected a square"),
        ({"vision": {"num_channels": 1}}, "num_channels is 1"),
        ({"vision": {"hidden_size": "128"}}, "'128'; expected a whole number"),
        ({"text": {"num_hidden_layers": 999_999}}, "at most 1000"),
        ({"text": {"num_attention_heads": 0}}, "heads is 0"),
    ],
)
def test_options_that_ours_does_not_have(change, message):
    towers = {"text": dict(TEXT), "vision": dict(VISION)}
    for side, fields in change.items():
        towers[side] |= fields
    with pytest.raises(ConfigError, match=message):
        clip.hf_part(towers["text"], towers["vision"], DIM, {}, "nothing")


def test_strictness(weights, tmp_path):
    state = as_transformers(weights)
    moved = state.pop("text_projection.weight")
    state["extra"], state["logit_scale"] = moved, np.zeros(2, np.float32)
    with pytest.raises(layout.Mismatch) as found:
        formats.read("hf-clip", [hf_folder(tmp_path, state, CONFIG)])
    text = str(found.value)
    assert "missing  text_projection.weight" in text and "extra    extra" in text
    assert "shape    logit_scale [2]" in text
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "siglip"}))
    with pytest.raises(ConfigError, match="model_type 'siglip'; expected 'clip'"):
        formats.read("hf-clip", [tmp_path])
    with pytest.raises(ConfigError, match="--preset"):
        formats.read("hf-clip", [tmp_path], "ViT-B/32")
    (tmp_path / "config.json").unlink()
    with pytest.raises(DataError, match=r"config\.json"):
        formats.read("hf-clip", [tmp_path])


def test_round_trip_and_folder(weights, tmp_path):
    """Back for transformers: every bit, in any form of the bundle."""
    words = np.random.default_rng(1).normal(size=(49408, 64)).astype(np.float32)
    state = as_transformers(weights | {"token": words})
    config = CONFIG | {"text_config": TEXT | {"vocab_size": 49408, "eos_token_id": 2}}
    (tmp_path / "in").mkdir()
    parts = formats.read("hf-clip", [hf_folder(tmp_path / "in", state, config)])
    bundle.write(tmp_path / "bundle", parts)
    lazy = bundle.read(tmp_path / "bundle", lazy=True).parts
    eager = bundle.read(tmp_path / "bundle").parts["clip"]
    folded = bundle.Part(
        "clip", eager.arch | {"fold": True, "dtype": "bfloat16", "remat": ""},
        stack_blocks(eager.params), {}, {},
    )  # fmt: skip
    for name, given in (("lazy", lazy), ("folded", {"clip": folded})):
        formats.write("hf-clip", given, tmp_path / name)
        back, metadata = tensors.read(tmp_path / name / "model.safetensors")
        assert back.keys() == state.keys() and metadata == {"format": "pt"}
        for key, tensor in back.items():
            assert tensor.dtype == state[key].dtype
            np.testing.assert_array_equal(tensor.read(), state[key], err_msg=key)
    read = lambda name: json.loads((tmp_path / "lazy" / name).read_text())
    written = read("config.json")
    assert written["model_type"] == "clip" and written["torch_dtype"] == "float32"
    towers, embed_dim = clip.hf_configs(written, "")
    assert clip.hf_arch(towers["text"], towers["vision"], embed_dim) == eager.arch
    pictures = read("preprocessor_config.json")
    assert pictures["size"] == {"shortest_edge": 8} and pictures["resample"] == 3
    assert pictures["image_mean"] == list(IMAGE_MEAN)
    vocabulary = read("vocab.json")
    assert len(vocabulary) == 49408 and vocabulary["!"] == 0
    assert vocabulary["<|startoftext|>"] == 49406 and vocabulary["<|endoftext|>"] == 49407
    merges = (tmp_path / "lazy" / "merges.txt").read_text().splitlines()
    assert merges[0].startswith("#version") and merges[1] == "i n" and len(merges) == 48895
    assert read("tokenizer_config.json")["model_max_length"] == CONTEXT
    assert read("special_tokens_map.json")["pad_token"] == "<|endoftext|>"


@pytest.mark.parametrize(
    "arch, message",
    [
        ({"logit_bias": True}, "a logit_bias"),
        ({"activation": "gelu_tanh"}, "activation gelu_tanh"),
        ({"text_layers": 0}, "no text tower"),
        ({"vocab_size": 99}, "99 words"),
    ],
)
def test_what_clipmodel_cannot_hold(arch, message, tmp_path):
    part = bundle.Part("clip", PRESETS["emoji"] | arch, {}, {}, {})
    with pytest.raises(ConfigError, match=message):
        formats.write("hf-clip", {"clip": part}, tmp_path / "out")
    with pytest.raises(ConfigError, match="needs the part 'clip'; this bundle has nothing"):
        formats.write("hf-clip", {}, tmp_path / "out")


def stubs(shapes):
    return {name: Lazy(shape, np.float32, lambda: None) for name, shape in shapes.items()}


def towers(width, text_width, mlp=None):
    return stubs(
        {
            "visual.conv1.weight": (width, 3, 14, 14),
            "visual.positional_embedding": (257, width),
            "positional_embedding": (77, text_width),
            "token_embedding.weight": (49408, text_width),
            "text_projection": (text_width, 1024),
            "visual.transformer.resblocks.0.mlp.c_fc.weight": (mlp or 4 * width, width),
            "visual.transformer.resblocks.31.ln_1.bias": (width,),
            "transformer.resblocks.23.ln_1.bias": (text_width,),
        }
    )


@pytest.mark.parametrize("width, heads", [(768, 12), (1280, 16), (1664, 16), (1792, 16)])
def test_heads_of_a_bare_file(width, heads):
    arch = openai_clip.shape_arch(towers(width, 1024), "file", openai_clip.HEAD_WIDTHS)
    assert arch["vision_heads"] == heads and arch["text_heads"] == 16
    if width == 1280:
        assert arch | {"activation": "gelu"} == PRESETS["ViT-H/14"] | {"vocab_size": 49408}
        assert openai_clip.shape_arch(towers(width, 1024), "file", {})["vision_heads"] == 20


def test_presets_name_heads_and_activation(weights, tmp_path, monkeypatch):
    file = tmp_path / "clip.safetensors"
    tensors.write(file, as_openai(weights))
    arch = formats.read("open-clip", [file])["clip"].arch
    assert (arch["vision_heads"], arch["activation"]) == (2, "gelu")
    named = arch | {"vision_heads": 4, "activation": "quick_gelu"}
    monkeypatch.setitem(PRESETS, "tiny", named)
    for kind in ("openai-clip", "open-clip"):
        assert formats.read(kind, [file], "tiny")["clip"].arch == named
    with pytest.raises(ConfigError, match="has context 5, preset 'ViT-B/32' has 77"):
        formats.read("open-clip", [file], "ViT-B/32")
    with pytest.raises(ConfigError, match="did you mean 'ViT-B/32'"):
        formats.read("openai-clip", [file], "ViTB/32")
    with pytest.raises(ConfigError, match="given 2 paths"):
        formats.read("openai-clip", [file, file])


def test_sigmoid_clip_has_its_bias(weights, tmp_path):
    state = as_openai(weights) | {"logit_bias": np.float32([-10])}
    state["logit_scale"] = state["logit_scale"][None]
    tensors.write(tmp_path / "clip.safetensors", state)
    part = formats.read("open-clip", [tmp_path / "clip.safetensors"])["clip"]
    assert part.arch["logit_bias"] is True and part.settings == {"loss": "sigmoid"}
    assert part.params["logit_bias"].read() == -10


@pytest.mark.parametrize(
    "name, what",
    [
        ("visual.layer1.0.conv1.weight", "ResNet"),
        ("visual.trunk.pos_embed", "timm"),
        ("text.transformer.encoder.layer.0.output.dense.weight", "Hugging Face text tower"),
        ("text_decoder.ln_final.weight", "CoCa"),
    ],
)
def test_other_towers_are_named(name, what, tmp_path):
    file = tmp_path / "other.safetensors"
    tensors.write(file, {name: np.zeros(3, np.float32), "logit_scale": np.float32(1)})
    for kind in ("openai-clip", "open-clip"):
        with pytest.raises(ConfigError, match=what) as found:
            formats.read(kind, [file])
        assert "\n" not in str(found.value)
    tensors.write(file, {"weight": np.zeros(3, np.float32)})
    with pytest.raises(ConfigError, match="has no tensor 'visual"):
        formats.read("openai-clip", [file])


@pytest.mark.parametrize(
    "place, message",
    [
        ({"vision_cfg": {"timm_model_name": "vit_base"}}, "timm_model_name = 'vit_base'"),
        ({"vision_cfg": {"pool_type": "avg"}}, "pool_type = 'avg'"),
        ({"vision_cfg": {"attentional_pool": True}}, "attentional_pool"),
        ({"vision_cfg": {"ls_init_value": 1e-4}}, "ls_init_value"),
        ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "ResNet"),
        ({"vision_cfg": {"head_width": 100}}, "does not divide into heads of 100"),
        ({"vision_cfg": {"mlp_ratio": "4"}}, "mlp_ratio = '4'"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "hf_model_name"),
        ({"text_cfg": {"no_causal_mask": True}}, "no_causal_mask"),
        ({"text_cfg": {"act_kwargs": {"approximate": "tanh"}}}, "act_kwargs"),
        ({"text_cfg": {"mlp_ratio": 3.0}}, "mlp_ratio is 3.0"),
        ({"multimodal_cfg": {"width": 512}}, "multimodal_cfg"),
        ({"text_cfg": None}, "no text_cfg"),
    ],
)
def test_open_clip_options_that_ours_does_not_have(place, message):
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in OPEN_CLIP.items()}
    for section, fields in place.items():
        inner = isinstance(config.get(section), dict) and fields is not None
        config[section] = config[section] | fields if inner else fields
    with pytest.raises(ConfigError, match=message):
        openai_clip.open_clip_arch({"model_cfg": config}, "file")


def test_pictures_normalised_otherwise_are_refused():
    document = {"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}
    with pytest.raises(ConfigError, match=r"mean \[0.5, 0.5, 0.5\]"):
        openai_clip.open_clip_arch(document, "file")
    off = {"timm_model_name": None, "attentional_pool": False, "pool_type": "tok"}
    harmless = OPEN_CLIP | {"vision_cfg": OPEN_CLIP["vision_cfg"] | off, "custom_text": True}
    arch = openai_clip.open_clip_arch({"model_cfg": harmless}, "file")
    assert arch == openai_clip.open_clip_arch({"model_cfg": OPEN_CLIP}, "file")
    assert (arch["vision_heads"], arch["vision_mlp_width"]) == (2, 192)


def test_unread_stacks_come_apart_unread():
    tree = {"block_0": {"ln_1": 1.0, "attn": 2.0, "ln_2": 3.0, "mlp": {"fc": 4.0}}}
    tree["block_1"] = jax.tree.map(lambda x: x + 10, tree["block_0"])
    tree = jax.tree.map(np.float32, {"text": {"transformer": tree}, "logit_scale": 5.0})
    stacked = stack_blocks(tree)
    assert jax.tree.map(np.asarray, unstack_blocks(stacked)) == tree
    lazy = jax.tree.map(lambda a: Lazy(a.shape, a.dtype, lambda: np.asarray(a)), stacked)
    again = unstack_blocks(lazy)["text"]["transformer"]["block_1"]["mlp"]["fc"]
    assert again.shape == () and again.read() == 14
