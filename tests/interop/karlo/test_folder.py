"""Karlo in diffusers' folder layout and in its own files: names, round trips, refusals.

The values are compared with diffusers itself in tests/parity; here nothing of torch is needed.
"""

import json
import shutil

import jax
import numpy as np
import pytest

from unclip import errors, tasks
from unclip.cascade import bundle
from unclip.files import tensors
from unclip.files.tensors import Lazy
from unclip.interop import formats, layout, weights
from unclip.interop.karlo import config as karlo_config
from unclip.interop.karlo import folder as karlo
from unclip.interop.karlo.networks import decoder_shapes, prior_shapes, upsampler_shapes
from unclip.interop.karlo.original import prior_rules, text_proj_rules, unet_rules
from unclip.models.unet import fold_params
from unclip.runtime.sharding import tree_paths

# Karlo's depth at a fortieth of its widths, and a U-Net as small as they come.
_UNET = dict(channels=8, multipliers=(1, 2, 3, 4), blocks=3, groups=4)
ARCHS = {
    "clip": dict(
        embed_dim=16, image_size=28, patch_size=14, vision_width=16, vision_layers=2,
        vision_heads=2, text_width=16, text_layers=2, text_heads=2,
    ),
    "prior": dict(embed_dim=16, context=77, text_width=16, width=32, layers=20, heads=4),
    "decoder": _UNET | dict(attention=(False, True, True, True), head_dim=8, context_dim=24),
    "upsampler_0": _UNET | dict(attention=(False,) * 4, out_channels=3),
    "upsampler_0_last": _UNET | dict(attention=(False,) * 4, out_channels=3),
}  # fmt: skip
SMALL = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(False, True), groups=4)
PICTURE = {"parametrisation": "eps", "clamp": 1.0}
ORIGINALS = ("prior-x.ckpt", "decoder-x.ckpt", "improved-sr-x.ckpt", "ViT-L-14_stats.th")


def filled(shapes, seed):
    """Random float32 values for a tree of shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)


def make_part(kind, arch, seed=0):
    """A part with random parameters and the settings that Karlo's files give."""
    extra, settings = {}, {}
    if kind == "clip":
        shapes = jax.eval_shape(tasks.ClipTask(arch).init, jax.random.key(0))
    elif kind == "prior":
        shapes = prior_shapes(arch)
        found = {"parametrisation": "x0", "variance": "fixed_small", "clamp": 5.0}
        settings = karlo_config.prior_settings(found, "test")
    elif kind == "decoder":
        shapes = decoder_shapes(arch, 16, 16)
        found = PICTURE | {"variance": "learned_range"}
        settings = karlo_config.decoder_settings({"out_channels": 6}, 8, found, "test")
    else:
        shapes = upsampler_shapes(arch)
        found = PICTURE | {"variance": "fixed_small"}
        settings = karlo_config.upsampler_settings({"out_channels": 3}, 32, 8, found, "test")
    params = filled(shapes, seed)
    if kind == "prior":
        extra = params.pop("statistics")
    return bundle.Part(kind, arch, params, extra, settings)


@pytest.fixture(scope="module")
def parts():
    return {kind: make_part(kind, arch, n) for n, (kind, arch) in enumerate(ARCHS.items())}


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("karlo")
    karlo.write(parts, out)
    return out


@pytest.fixture(scope="module")
def found(folder):
    return karlo.read([folder], {})


def flat(tree):
    return {path: np.asarray(leaf) for path, leaf in tree_paths(tree).items()}


def equal(one, other):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    return all(a.dtype == other[k].dtype and np.array_equal(a, other[k]) for k, a in one.items())


def config_of(folder, name):
    return json.loads((folder / name / "config.json").read_text())


@pytest.mark.slow
def test_stages_of_a_conversion_know_the_clip_beside_them(folder):
    read = formats.read("karlo", [folder])
    space = bundle.tree_hash(read["clip"].params)
    known = {name: part.trained_with for name, part in read.items() if part.trained_with}
    assert known == {"prior": {"clip": space}, "decoder": {"clip": space}}


@pytest.mark.slow
def test_what_is_written_is_read_again(parts, found):
    assert list(found) == list(parts)
    for kind, part in parts.items():
        module = lambda p, kind=kind: tasks.arguments(p.arch)
        if kind == "clip":  # the layout has no place for the temperature
            part.params["logit_scale"] = np.float32(np.log(100.0))
        assert equal(found[kind].params, part.params), kind
        assert equal(found[kind].extra, part.extra)
        given = module(part)
        assert given == {name: module(found[kind])[name] for name in given}
        if kind != "clip":
            assert found[kind].settings == part.settings


@pytest.mark.slow
def test_import_and_export_give_the_same_files(found, folder, tmp_path):
    karlo.write(found, tmp_path)
    names = lambda where: sorted(p.relative_to(where) for p in where.rglob("*") if p.is_file())
    assert names(tmp_path) == names(folder) and len(names(folder)) == 23
    for name in names(folder):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


# Names that diffusers and transformers publish, with the shapes they have at these widths.
PUBLISHED = {
    "prior": {
        "clip_mean": [1, 16],
        "prd_embedding": [1, 1, 32],
        "positional_embedding": [1, 81, 32],
        "embedding_proj.weight": [32, 16],
        "transformer_blocks.19.attn1.to_out.0.weight": [32, 32],
        "transformer_blocks.0.ff.net.0.proj.weight": [128, 32],
        "transformer_blocks.0.norm3.bias": [32],
        "proj_to_clip_embeddings.bias": [16],
    },
    "text_proj": {
        "learned_classifier_free_guidance_embeddings": [16],
        "clip_extra_context_tokens_proj.weight": [96, 16],
        "text_encoder_hidden_states_norm.weight": [24],
    },
    "decoder": {
        "conv_in.weight": [8, 3, 3, 3],
        "down_blocks.0.downsamplers.0.conv1.weight": [8, 8, 3, 3],
        "down_blocks.1.attentions.2.add_k_proj.weight": [16, 24],
        "mid_block.attentions.0.group_norm.bias": [32],
        "up_blocks.0.resnets.0.conv_shortcut.weight": [32, 64, 1, 1],
        "up_blocks.2.upsamplers.0.time_emb_proj.weight": [32, 32],
        "up_blocks.3.resnets.3.norm1.weight": [16],
        "conv_out.bias": [6],
    },
    "super_res_last": {
        "conv_in.weight": [8, 6, 3, 3],
        "mid_block.resnets.1.time_emb_proj.weight": [32, 32],
        "time_embedding.linear_2.weight": [32, 32],
    },
    "text_encoder": {"text_projection.weight": [16, 16]},
    "image_encoder": {"visual_projection.weight": [16, 16]},
}
TENSORS = {"prior": 338, "text_proj": 11, "decoder": 716, "super_res_last": 408}


def test_names_are_the_published_ones(folder):
    for component, expected in PUBLISHED.items():
        held = weights.open_weights(folder / component)
        assert {name: list(held[name].shape) for name in expected} == expected, component
        assert len(held) == TENSORS.get(component, len(held)), component
    config = config_of(folder, "decoder")
    assert config["_class_name"] == "UNet2DConditionModel" and config["attention_head_dim"] == 8
    assert config["block_out_channels"] == [8, 16, 24, 32]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "UnCLIPPipeline"
    assert index["text_proj"] == ["unclip", "UnCLIPTextProjModel"]
    tokens = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    about = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    assert tokens[about["pad_token"]] == 0 and about["model_max_length"] == 77


def test_components_are_looked_up_in_every_folder(folder, tmp_path):
    shutil.copytree(folder / "image_encoder", tmp_path / "b" / "image_encoder")
    for name in ("text_encoder", "prior", "prior_scheduler"):
        shutil.copytree(folder / name, tmp_path / "a" / name)
    assert list(karlo.read([tmp_path / "a", tmp_path / "b"], {})) == ["clip", "prior"]
    arch = karlo.read([tmp_path / "b"], {})["clip"].arch
    assert arch["text_layers"] == 0 and arch["vision_layers"] == 2
    with pytest.raises(errors.DataError, match="no Karlo there"):
        karlo.read([tmp_path], {})


def test_widths_need_not_be_multiples_of_the_first(tmp_path):
    """8 and 12: the layout has a list of widths, and the network is made of them."""
    arch = SMALL | dict(multipliers=(1, 1.5), attention=(False, False), out_channels=3)
    part = make_part("upsampler_0", arch)
    karlo.write({"upsampler_0": part}, tmp_path)
    assert config_of(tmp_path, "super_res_first")["block_out_channels"] == [8, 12]
    found = karlo.read([tmp_path], {})["upsampler_0"]
    assert found.arch["multipliers"] == (1, 1.5) and equal(found.params, part.params)
    assert found.params["unet"]["down_1"]["res_0"]["conv_1"]["kernel"].shape[-1] == 12
    config = config_of(tmp_path, "super_res_first") | {"norm_num_groups": 8}
    arch = karlo_config.upsampler_arch(config, "upsampler")
    with pytest.raises(errors.ConfigError, match="groups=8 does not divide a layer of 12"):
        upsampler_shapes(arch)


def test_wrappers_of_a_training_are_taken_off(folder, found, tmp_path):
    shutil.copytree(folder / "super_res_first", tmp_path / "super_res_first")
    shutil.copytree(folder / "super_res_scheduler", tmp_path / "super_res_scheduler")
    file = tmp_path / "super_res_first" / "diffusion_pytorch_model.safetensors"
    held = {f"module._orig_mod.{name}": tensor for name, tensor in tensors.read(file)[0].items()}
    # A module inside was compiled on its own, and diffusers' name says the precision.
    held = {n.replace("down_blocks.1.", "down_blocks.1._orig_mod."): t for n, t in held.items()}
    tensors.write(file.with_suffix(".fp16.safetensors"), held)
    file.unlink()
    assert equal(karlo.read([tmp_path], {})["upsampler_0"].params, found["upsampler_0"].params)


@pytest.mark.parametrize(
    ("component", "option", "value"),
    [
        ("prior", "added_emb_type", None),
        ("prior", "embedding_proj_norm_type", "layer"),
        ("prior", "num_layers", 10**9),
        ("prior", "clip_embed_dim", 5),
        ("prior", "an_option_of_tomorrow", 1),
        ("decoder", "act_fn", "gelu"),
        ("decoder", "mid_block_type", "UNetMidBlock2DCrossAttn"),
        ("decoder", "down_block_types", ["DownBlock2D"] * 4),
        ("decoder", "up_block_types", ["ResnetUpsampleBlock2D"] * 4),
        ("decoder", "block_out_channels", [8, 12.5, 24, 32]),
        ("decoder", "norm_eps", 1e-6),
        ("decoder", "encoder_hid_dim_type", "text_proj"),
        ("decoder", "attention_head_dim", "8"),
        ("decoder", "_class_name", "UNet2DModel"),
        ("text_proj", "clip_extra_context_tokens", 2),
        ("text_proj", "cross_attention_dim", 48),
        ("super_res_first", "add_attention", True),
        ("super_res_first", "time_embedding_type", "fourier"),
        ("super_res_first", "down_block_types", ["SimpleCrossAttnDownBlock2D"] * 4),
        ("super_res_first", "sample_size", 36),
    ],
)
def test_an_option_that_we_do_not_have_is_named(folder, component, option, value):
    configs = {name: config_of(folder, name) for name in ("prior", "decoder", "text_proj")}
    configs["super_res_first"] = config_of(folder, "super_res_first")
    configs[component][option] = value
    with pytest.raises(errors.ConfigError) as refused:
        karlo_config.prior_arch(configs["prior"], "prior")
        karlo_config.decoder_arch(configs["decoder"], configs["text_proj"], "decoder")
        arch = karlo_config.upsampler_arch(configs["super_res_first"], "upsampler")
        size = karlo_config.image_size(configs["super_res_first"], "upsampler")
        found = PICTURE | {"variance": "fixed_small"}
        karlo_config.upsampler_settings(arch, size, 8, found, "upsampler")
    named = {"_class_name": "UNet2DModel", "sample_size": "36"}.get(option, option)
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("beta_schedule", "linear"),
        ("num_train_timesteps", 500),
        ("prediction_type", "v_prediction"),
        ("variance_type", "fixed_large"),
        ("clip_sample_range", "wide"),
    ],
)
def test_a_schedule_that_we_do_not_have_is_named(option, value):
    with pytest.raises(errors.ConfigError, match=option):
        karlo_config.scheduler({option: value}, "scheduler_config.json")


def test_old_configs_leave_options_out():
    config = {"_class_name": "PriorTransformer", "num_layers": 3, "embedding_dim": 32}
    arch = karlo_config.prior_arch(config, "prior")
    assert arch["layers"] == 3 and arch["heads"] == 32 and arch["width"] == 2048
    found = karlo_config.scheduler({"clip_sample": False, "prediction_type": "sample"}, "s")
    assert karlo_config.prior_settings(found, "s")["clamp"] == 0.0


def test_a_decoder_needs_its_text_projection(folder, tmp_path):
    for name in ("decoder", "decoder_scheduler"):
        shutil.copytree(folder / name, tmp_path / name)
    with pytest.raises(errors.ConfigError, match="without text_proj"):
        karlo.read([tmp_path], {})


def test_another_pipeline_is_refused(folder, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(errors.ConfigError, match="KandinskyPipeline; expected UnCLIPPipeline"):
        karlo.read([tmp_path], {})


def test_every_tensor_counts(folder, tmp_path):
    shutil.copytree(folder / "prior", tmp_path / "prior")
    shutil.copytree(folder / "prior_scheduler", tmp_path / "prior_scheduler")
    file = tmp_path / "prior" / "diffusion_pytorch_model.safetensors"
    held = dict(weights.open_weights(file))
    held["norm_outer.weight"] = held.pop("norm_out.weight")
    held["proj_in.weight"] = np.zeros((32, 15), np.float32)
    tensors.write(tmp_path / "new", held)
    (tmp_path / "new").rename(file)
    with pytest.raises(layout.Mismatch) as refused:
        karlo.read([tmp_path], {})
    for line in (
        r"missing  norm_out.weight  ->  norm_out/scale [32]",
        r"extra    norm_outer.weight [32]",
        r"proj_in.weight [32, 15], [15, 32] as ours  ->  z_i/proj/kernel [16, 32]",
    ):
        assert line in str(refused.value)


def test_parts_must_fit_each_other(folder, tmp_path):
    for name in ("prior", "prior_scheduler"):
        shutil.copytree(folder / name, tmp_path / name)
    other = make_part("clip", ARCHS["clip"] | {"embed_dim": 24})
    karlo.write({"clip": other}, tmp_path)
    with pytest.raises(errors.ConfigError, match="CLIP gives 24, 16 and 77"):
        karlo.read([tmp_path], {})


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("upsampler_0", {"norm": "rms"}, "norm='rms'"),
        ("upsampler_0", {"patch": 2}, "patch=2"),
        ("upsampler_0", {"add_low": True}, "add_low=True"),
        ("upsampler_0", {"multipliers": (2, 4)}, "multipliers"),
        ("upsampler_0", {"settings": {"parametrisation": "v"}}, "parametrisation='v'"),
        ("upsampler_0", {"settings": {"noise": "linear"}}, "noise_schedule='linear'"),
        ("decoder", {"learned_null_text": True}, "learned_null_text=True"),
        ("decoder", {"text_layers": 2}, "text_layers=2"),
        ("decoder", {"mid_attention": False}, "mid_attention=False"),
        ("decoder", {"settings": {"z_scale": 17.2}}, "z_scale=17.2"),
        ("decoder", {"settings": {"draw": {"threshold": "dynamic"}}}, "threshold='dynamic'"),
        ("prior", {"learned_null": True}, "learned_null=True"),
        ("prior", {"text_width": 24}, "text_width=24"),
        ("prior", {"settings": {"embedding": "scale"}}, "embedding='scale'"),
        ("prior", {"codes": 8, "settings": {"kind": "ar"}}, "kind='ar'"),
    ],
)
def test_what_diffusers_cannot_hold_is_named_and_nothing_written(
    parts, tmp_path, kind, changes, named
):
    part = parts[kind]
    changes = dict(changes)
    settings = part.settings | changes.pop("settings", {})
    other = bundle.Part(kind, part.arch | changes, part.params, part.extra, settings)
    with pytest.raises(errors.ConfigError, match=named):
        karlo.write({kind: other}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_without_a_place_are_named(parts, tmp_path):
    with pytest.raises(errors.ConfigError, match="no place for upsampler_1"):
        karlo.write({"upsampler_1": parts["upsampler_0"]}, tmp_path)
    with pytest.raises(errors.ConfigError, match="upsampler_0_last without upsampler_0"):
        karlo.write({"upsampler_0_last": parts["upsampler_0_last"]}, tmp_path)


def test_models_trained_here_go_out_too(tmp_path):
    """A bundle of one upsampler and a folded tree: the last network is the first, runs unfold."""
    arch = SMALL | dict(blocks=2, attention=(False, False), out_channels=3)
    part = make_part("upsampler_0", arch)
    karlo.write({"upsampler_0": part}, tmp_path / "plain")
    stacked = fold_params(part.params)
    assert flat(stacked).keys() != flat(part.params).keys()
    folded = bundle.Part("upsampler_0", arch | {"fold": True}, stacked, {}, part.settings)
    bundle.write(tmp_path / "bundle", {"upsampler_0": folded})
    read = bundle.read(tmp_path / "bundle", lazy=True).parts
    karlo.write(read, tmp_path / "folded")
    files = [*tmp_path.glob("plain/*/*.safetensors"), *tmp_path.glob("folded/*/*.safetensors")]
    assert len(files) == 4 and len({file.read_bytes() for file in files}) == 1
    assert not (tmp_path / "plain" / "model_index.json").exists()


def test_a_folder_without_a_prior_is_that_of_image_variations(parts, tmp_path):
    karlo.write({k: part for k, part in parts.items() if k != "prior"}, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "UnCLIPImageVariationPipeline" and "prior" not in index


# Karlo's own files. Their tensors are built here from ours, by the description of their layout.


def rows_of(params, prefix, names, trailing=False):
    """Fused weight and bias: 64 rows of each in turn, heads one after another."""
    kernels = [params[f"{prefix}/{name}/kernel"].T for name in names]
    biases = [params[f"{prefix}/{name}/bias"] for name in names]
    heads = range(0, len(biases[0]), 64)
    weight = np.concatenate([kernel[h : h + 64] for h in heads for kernel in kernels])
    bias = np.concatenate([bias[h : h + 64] for h in heads for bias in biases])
    return weight[..., None] if trailing else weight, bias


WIDE = dict(channels=64, multipliers=(1, 2), blocks=1, attention=(False, True), context_dim=32)


@pytest.fixture(scope="module")
def original():
    """(parts, {file name: tensors}) of two levels, two layers and heads of 64."""
    prior = make_part("prior", ARCHS["prior"] | dict(width=128, heads=2, layers=2))
    decoder = make_part("decoder", WIDE)
    upsamplers = {
        name: make_part(name, SMALL | dict(channels=32, groups=32, attention=(False, False),
                                           out_channels=3), n)
        for n, name in enumerate(("upsampler_0", "upsampler_0_last"))
    }  # fmt: skip
    files = {name: {} for name in ORIGINALS}
    p, out = flat(prior.params), files["prior-x.ckpt"]
    for i in range(2):
        theirs = f"model.transformer.resblocks.{i}.attn.c_qkv"
        weight, bias = rows_of(p, f"transformer/block_{i}/attn", "qkv")
        out |= {f"{theirs}.weight": weight, f"{theirs}.bias": bias}
    for rule in prior_rules(2):
        if rule.ours in p and rule.transform.write:
            out[rule.theirs] = rule.transform.write(p[rule.ours])
    files["ViT-L-14_stats.th"] = {"0": prior.extra["mean"], "1": prior.extra["std"]}
    p, out = flat(decoder.params), files["decoder-x.ckpt"]
    places = {"down_1": "input_blocks.3.1", "mid": "middle_block.1", "up_1": "output_blocks.{}.1"}
    for path in {path.rpartition("/")[0].rpartition("/")[0] for path in p if "/attn_" in path}:
        _, level, name = path.split("/")
        theirs = "model." + places[level].format(name[-1])
        fused = rows_of(p, path, ("q", "k", "v"), trailing=True)
        both = rows_of(p, path, ("context_k", "context_v"), trailing=True)
        for name, (weight, bias) in (("qkv", fused), ("encoder_kv", both)):
            out |= {f"{theirs}.{name}.weight": weight, f"{theirs}.{name}.bias": bias}
    arch = WIDE | {"mid_attention": True}
    rules = [*text_proj_rules("model."),
             *unet_rules(arch, "unet", "model.")]  # fmt: skip
    for rule in rules:
        if rule.ours in p and rule.transform.write:
            out[rule.theirs] = rule.transform.write(p[rule.ours])
    for name, prefix in (("upsampler_0", "model_first_steps."),
                         ("upsampler_0_last", "model_last_step.")):  # fmt: skip
        arch = upsamplers[name].arch | {"mid_attention": False}
        p = flat(upsamplers[name].params)
        for rule in unet_rules(arch, "unet", prefix):
            if rule.ours in p:
                files["improved-sr-x.ckpt"][rule.theirs] = rule.transform.write(p[rule.ours])
    return {"prior": prior, "decoder": decoder, **upsamplers}, files


@pytest.fixture
def original_folder(original, tmp_path, monkeypatch):
    """A folder of the files' names; their content is `original`'s, changed by the test."""
    content = {name: dict(held) for name, held in original[1].items()}
    for name in content:
        (tmp_path / name).touch()
    lazy = lambda array: Lazy(array.shape, array.dtype, lambda: array)
    monkeypatch.setattr(
        weights, "open_weights", lambda path: {k: lazy(v) for k, v in content[path.name].items()}
    )
    return tmp_path, content


def test_karlos_own_files_are_read(original, original_folder):
    folder, content = original_folder
    content["prior-x.ckpt"]["causal_mask"] = np.zeros((1, 81, 81), np.float32)
    found = karlo.read([folder], {})
    assert list(found) == ["prior", "decoder", "upsampler_0", "upsampler_0_last"]
    for kind, part in original[0].items():
        assert equal(found[kind].params, part.params), kind
        assert equal(found[kind].extra, part.extra)
    assert found["prior"].settings["clamp"] == 10.0 and found["prior"].arch["heads"] == 2
    assert found["decoder"].arch["attention"] == (False, True)
    assert found["decoder"].settings["image_size"] == 64
    assert found["upsampler_0"].arch["scale_shift"] is False


def test_karlos_own_files_under_other_prefixes(original, original_folder):
    folder, content = original_folder
    for file, change in (
        ("prior-x.ckpt", lambda name: name.removeprefix("model.")),
        ("decoder-x.ckpt", lambda name: f"module.{name}"),
        ("improved-sr-x.ckpt", lambda name: name.replace(".", "._orig_mod.", 1)),
    ):
        content[file] = {change(name): value for name, value in content[file].items()}
    content["prior-x.ckpt"]["cf_token"] = np.zeros(77, np.float32)
    found = karlo.read([folder], {})
    for kind, part in original[0].items():
        assert equal(found[kind].params, part.params), kind


def test_the_published_names_of_karlos_own_files(original):
    names = original[1]
    expected = {
        "prior-x.ckpt": {
            "model.clip_img_proj.weight": (128, 16), "model.prd_emb": (1, 1, 128),
            "model.transformer.resblocks.1.attn.c_qkv.weight": (384, 128),
            "model.transformer.resblocks.0.mlp.c_fc.bias": (512,), "model.final_ln.weight": (128,),
        },
        "decoder-x.ckpt": {
            "model.cf_param": (16,), "model.text_seq_proj.1.bias": (32,),
            "model.input_blocks.2.0.in_layers.2.weight": (64, 64, 3, 3),
            "model.input_blocks.3.1.qkv.weight": (384, 128, 1),
            "model.input_blocks.3.1.encoder_kv.weight": (256, 32, 1),
            "model.middle_block.1.proj_out.weight": (128, 128, 1),
            "model.output_blocks.1.2.out_layers.3.weight": (128, 128, 3, 3),
            "model.output_blocks.3.0.skip_connection.weight": (64, 128, 1, 1),
            "model.out.2.weight": (6, 64, 3, 3),
        },
        "improved-sr-x.ckpt": {
            "model_first_steps.output_blocks.1.1.in_layers.0.weight": (64,),
            "model_last_step.middle_block.1.emb_layers.1.weight": (64, 128),
        },
    }  # fmt: skip
    for file, shapes in expected.items():
        assert {name: names[file][name].shape for name in shapes} == shapes


def test_karlos_own_files_are_read_strictly(original_folder):
    folder, content = original_folder
    content["improved-sr-x.ckpt"]["model_middle_step.out.2.bias"] = np.zeros(3, np.float32)
    with pytest.raises(layout.Mismatch, match="extra    model_middle_step"):
        karlo.read([folder / "improved-sr-x.ckpt"], {})
    with pytest.raises(errors.ConfigError, match="expected ViT-L-14_stats"):
        karlo.read([folder / "prior-x.ckpt"], {})
    (folder / "prior-y.ckpt").touch()
    with pytest.raises(errors.ConfigError, match="expected one prior"):
        karlo.read([folder], {})
    (folder / "other.ckpt").touch()
    with pytest.raises(errors.ConfigError, match="not named as Karlo's"):
        karlo.read([folder / "other.ckpt"], {})
    content["decoder-x.ckpt"].pop("model.time_embed.0.weight")
    with pytest.raises(errors.ConfigError, match="no tensor model"):
        karlo.read([folder / "decoder-x.ckpt"], {})


def test_statistics_in_one_tensor(original, original_folder):
    folder, content = original_folder
    pair = content["ViT-L-14_stats.th"]
    content["ViT-L-14_stats.th"] = {"tensor": np.stack(list(pair.values()))}
    files = [folder / "prior-x.ckpt", folder / "ViT-L-14_stats.th"]
    assert equal(karlo.read(files, {})["prior"].extra, original[0]["prior"].extra)
    content["ViT-L-14_stats.th"] = {"0": pair["0"]}
    with pytest.raises(errors.ConfigError, match="two vectors"):
        karlo.read(files, {})
