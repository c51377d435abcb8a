"""DINOv2 in both published layouts, written here from our own leaves; and what is refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from unclip import errors
from unclip.cascade import bundle
from unclip.interop import dinov2, formats
from unclip.models import dinov2 as model

SIZES = dict(width=128, layers=2, heads=2, image_size=12, patch_size=4)
CONFIG = dict(
    model_type="dinov2", hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=12,
    patch_size=4,
)  # fmt: skip
ARCHS = {
    "mlp": dict(ffn="mlp", registers=0),
    "swiglu": dict(ffn="swiglu", registers=0),
    "registers": dict(ffn="mlp", registers=3),
}


def drawn(arch):
    rng = np.random.default_rng(0)
    shapes = dinov2.shapes(SIZES | arch)
    return jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape)), shapes)


def written(params, layout):
    """Tensors of "hub" or "hf", by hand."""
    hub = layout == "hub"
    out = {}

    def put(name, array):
        out[name] = np.ascontiguousarray(array)

    def dense(name, *parts):
        put(f"{name}.weight", np.concatenate([part["kernel"].T for part in parts]))
        put(f"{name}.bias", np.concatenate([part["bias"] for part in parts]))

    def norm(name, part):
        put(f"{name}.weight", part["scale"])
        put(f"{name}.bias", part["bias"])

    at = "" if hub else "embeddings."
    put(f"{at}cls_token", params["class_token"][None, None])
    put(f"{at}mask_token", np.zeros((1, 128), np.float32))
    put("pos_embed" if hub else "embeddings.position_embeddings", params["position"][None])
    if "registers" in params:
        put(f"{at}register_tokens", params["registers"][None])
    patch = "patch_embed.proj" if hub else "embeddings.patch_embeddings.projection"
    put(f"{patch}.weight", params["patch"]["kernel"].transpose(3, 2, 0, 1))
    put(f"{patch}.bias", params["patch"]["bias"])
    norm("norm" if hub else "layernorm", params["ln_final"])
    for i in range(2):
        ours, theirs = params[f"block_{i}"], f"blocks.{i}" if hub else f"encoder.layer.{i}"
        attn = ours["attn"]
        if hub:
            dense(f"{theirs}.attn.qkv", *(attn[n] for n in "qkv"))
            dense(f"{theirs}.attn.proj", attn["out"])
        else:
            for n, word in zip("qkv", ("query", "key", "value")):
                dense(f"{theirs}.attention.attention.{word}", attn[n])
            dense(f"{theirs}.attention.output.dense", attn["out"])
        for side in (1, 2):
            norm(f"{theirs}.norm{side}", ours[f"ln_{side}"])
            scale = f"ls{side}.gamma" if hub else f"layer_scale{side}.lambda1"
            put(f"{theirs}.{scale}", ours[f"scale_{side}"])
        mlp = ours["mlp"]
        if "gate" in mlp:
            dense(f"{theirs}.mlp.{'w12' if hub else 'weights_in'}", mlp["gate"], mlp["up"])
            dense(f"{theirs}.mlp.{'w3' if hub else 'weights_out'}", mlp["down"])
        else:
            dense(f"{theirs}.mlp.fc1", mlp["fc"])
            dense(f"{theirs}.mlp.fc2", mlp["proj"])
    return out


def put(folder, params, layout, arch=None, **config):
    """The path to give to `formats.read`."""
    if layout == "hub":
        save_file(written(params, layout), folder / "dinov2.safetensors")
        return folder / "dinov2.safetensors"
    arch = arch or {}
    config = CONFIG | {"use_swiglu_ffn": arch.get("ffn") == "swiglu"} | config
    if arch.get("registers"):
        config |= {"model_type": "dinov2_with_registers", "num_register_tokens": arch["registers"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(written(params, layout), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("layout", ["hub", "hf"])
@pytest.mark.parametrize("kind", ARCHS)
def test_both_layouts_give_our_leaves(tmp_path, kind, layout):
    arch = ARCHS[kind]
    params = drawn(arch)
    (tmp_path / "theirs").mkdir()
    part = formats.read("dinov2", [put(tmp_path / "theirs", params, layout, arch)])["dinov2"]
    plain = "hub" if layout == "hub" else "transformers"
    usual = {"interpolation": "antialias" if arch["registers"] else plain}
    assert part.arch == {"class": "DINOv2"} | SIZES | arch | usual
    bundle.write(tmp_path / "bundle", {"dinov2": part})
    read = bundle.read_part(tmp_path / "bundle", "dinov2")
    assert jax.tree.structure(read.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, read.params, params)
    fields = {name: value for name, value in read.arch.items() if name != "class"}
    picture = np.zeros((1, 12, 12, 3), np.float32)
    assert model.DINOv2(**fields).apply({"params": read.params}, picture).shape == (1, 128)


@pytest.mark.parametrize("layout", ["hub", "hf"])
def test_differences_are_listed(tmp_path, layout):
    params = drawn(ARCHS["mlp"])
    theirs = written(params, layout)
    gone = "blocks.1.norm2.bias" if layout == "hub" else "encoder.layer.1.norm2.bias"
    theirs["head.weight"] = theirs.pop(gone)
    put(tmp_path, params, layout)
    file = "dinov2.safetensors" if layout == "hub" else "model.safetensors"
    save_file(theirs, tmp_path / file)
    with pytest.raises(errors.ConfigError, match="1 tensors missing, 1 not expected") as caught:
        formats.read("dinov2", [tmp_path / file if layout == "hub" else tmp_path])
    assert gone in caught.value.table and "head.weight" in caught.value.table


@pytest.mark.parametrize("layout", ["hub", "hf"])
def test_the_backbone_of_another_model(tmp_path, layout):
    params = drawn(ARCHS["mlp"])
    theirs = {f"teacher.backbone.{name}": a for name, a in written(params, layout).items()}
    path = put(tmp_path, params, layout)
    save_file(theirs, tmp_path / "model.safetensors" if path.is_dir() else path)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.read(), b),
        formats.read("dinov2", [path])["dinov2"].params,
        params,
    )


def test_mask_token_may_be_absent(tmp_path):
    params = drawn(ARCHS["mlp"])
    theirs = written(params, "hub")
    del theirs["mask_token"]
    save_file(theirs, tmp_path / "dinov2.safetensors")
    assert "dinov2" in formats.read("dinov2", [tmp_path / "dinov2.safetensors"])


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "vit"}, "model_type 'vit'; expected dinov2"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; expected 'gelu'"),
        ({"qkv_bias": False}, "qkv_bias is False"),
        ({"num_hidden_layers": 10**5}, "at most 1000 blocks"),
        ({"num_attention_heads": 3}, "divide evenly"),
        ({"image_size": [12, 16]}, "expected a square"),
        ({"mlp_ratio": "4"}, "mlp_ratio is '4'"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"num_hidden_layers": 3}, "18 tensors missing"),
        ({"use_swiglu_ffn": True}, "tensors missing"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, config, message):
    folder = put(tmp_path, drawn(ARCHS["mlp"]), "hf", **config)
    with pytest.raises(errors.ConfigError, match=message):
        formats.read("dinov2", [folder])


def test_other_files(tmp_path):
    save_file({"conv.weight": np.zeros((1, 2), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(errors.ConfigError, match="no DINOv2 of Meta's layout: it has no tensor"):
        formats.read("dinov2", [tmp_path / "x.safetensors"])
    flat = np.zeros(3, np.float32)
    save_file({"patch_embed.proj.weight": flat, "pos_embed": flat}, tmp_path / "y.safetensors")
    with pytest.raises(errors.ConfigError, match="no DINOv2 of Meta's layout"):
        formats.read("dinov2", [tmp_path / "y.safetensors"])
    with pytest.raises(errors.ConfigError, match="given 2 paths"):
        formats.read("dinov2", [tmp_path / "x.safetensors"] * 2)
    with pytest.raises(errors.ConfigError, match="--preset"):
        formats.read("dinov2", [tmp_path / "x.safetensors"], preset="ViT-L/14")
