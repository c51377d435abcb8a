"""Karlo's networks and files against diffusers' own classes, both directions.

The modules are diffusers' and transformers', with random weights and Karlo's full depth (20 layers;
4 levels of 3 blocks), heads of 64 channels and norms of 32 groups; widths are a tenth. Pictures are
16 x 16, text is 77 tokens. Differences are absolute, of values near 1, which is asserted.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.deprecated import unclip as theirs
from PIL import Image

from unclip import tasks
from unclip.files.tensors import Lazy
from unclip.interop import layout
from unclip.interop.karlo import folder as karlo
from unclip.interop.karlo.classes import VERSION
from unclip.interop.karlo.config import decoder_arch, prior_arch, upsampler_arch
from unclip.interop.karlo.networks import (
    decoder_rules,
    decoder_shapes,
    prior_rules,
    prior_shapes,
    unet_rules,
    upsampler_shapes,
)
from unclip.models.decoder import Conditioner, Decoder
from unclip.models.prior import DiffusionPrior
from unclip.models.upsampler import Upsampler
from unclip.runtime.sharding import tree_paths

pytestmark = pytest.mark.usefixtures("quick_compiles")

WIDTH, CONTEXT, CHANNELS, BATCH = 64, 96, 32, 3
SMALL, LARGE = 8, 16  # sides of the pictures that the pipelines draw
NETWORKS = ("prior", "text_proj", "decoder", "super_res_first", "super_res_last")
TIMES = np.array([0, 487, 999], np.int32)
LENGTHS = (77, 2, 20)  # tokens of each text, the second being empty
# With guidance diffusers runs every row without the picture, then every row with it: of these, one
# without and two with.
ROWS = [0, 4, 5]
OLD = pathlib.Path(__file__).parents[2] / ".cache" / "peers" / f"diffusers-{VERSION}"

KARLO = {  # what diffusers' conversion script gives Karlo's networks; the prior is all defaults
    "prior": {},
    "text_proj": dict(time_embed_dim=1280, cross_attention_dim=1536),
    "decoder": dict(
        sample_size=64, in_channels=3, out_channels=6, layers_per_block=3,
        block_out_channels=(320, 640, 960, 1280), cross_attention_dim=1536, attention_head_dim=64,
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift", class_embed_type="identity",
    ),
    "super_res_first": dict(
        sample_size=256, in_channels=6, out_channels=3, layers_per_block=3,
        block_out_channels=(320, 640, 960, 1280), add_attention=False,
        down_block_types=("ResnetDownsampleBlock2D",) * 4,
        up_block_types=("ResnetUpsampleBlock2D",) * 4,
    ),
}  # fmt: skip
KARLO["super_res_last"] = {k: v for k, v in KARLO["super_res_first"].items() if k != "sample_size"}
REDUCED = {
    "prior": dict(embedding_dim=WIDTH, num_attention_heads=2),
    "text_proj": dict(
        clip_embeddings_dim=WIDTH, time_embed_dim=4 * CHANNELS, cross_attention_dim=CONTEXT
    ),
    "decoder": dict(
        sample_size=SMALL, block_out_channels=(32, 64, 128, 192), cross_attention_dim=CONTEXT
    ),
    "super_res_first": dict(sample_size=LARGE, block_out_channels=(32, 64, 96, 128)),
    "super_res_last": dict(block_out_channels=(32, 64, 96, 128)),
}
CLASSES = {
    "prior": diffusers.PriorTransformer,
    "text_proj": theirs.UnCLIPTextProjModel,
    "decoder": diffusers.UNet2DConditionModel,
    "super_res_first": diffusers.UNet2DModel,
    "super_res_last": diffusers.UNet2DModel,
    "text_encoder": transformers.CLIPTextModelWithProjection,
    "image_encoder": transformers.CLIPVisionModelWithProjection,
    "prior_scheduler": diffusers.UnCLIPScheduler,
    "decoder_scheduler": diffusers.UnCLIPScheduler,
    "super_res_scheduler": diffusers.UnCLIPScheduler,
}


def random_(module, seed):
    """Every parameter drawn anew, norms, biases and zero-initialised layers too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            normal = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2 or name.startswith("clip_"):
                parameter.copy_(("norm" in name and name.endswith("weight")) + 0.1 * normal)
            else:
                parameter.copy_(normal / parameter[0].numel() ** 0.5)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def modules():
    """Karlo of diffusers' and transformers' making, by the names of its folder."""
    out = {
        name: random_(CLASSES[name](**KARLO[name] | REDUCED[name]), seed)
        for seed, name in enumerate(NETWORKS)
    }
    tower = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH,
                 num_hidden_layers=2, num_attention_heads=2)  # fmt: skip
    text = transformers.CLIPTextConfig(**tower, eos_token_id=49407, bos_token_id=49406)
    vision = transformers.CLIPVisionConfig(**tower, image_size=28, patch_size=14)
    out["text_encoder"] = random_(CLASSES["text_encoder"](text), 10)
    out["image_encoder"] = random_(CLASSES["image_encoder"](vision), 11)
    scheduler = diffusers.UnCLIPScheduler
    out["prior_scheduler"] = scheduler(prediction_type="sample", clip_sample_range=5.0)
    out["decoder_scheduler"] = scheduler(variance_type="learned_range")
    out["super_res_scheduler"] = scheduler()
    return out


@pytest.fixture(scope="module")
def folder(modules, tmp_path_factory):
    """The modules saved by their own save_pretrained: a torch file, shards, and plain files."""
    out = tmp_path_factory.mktemp("karlo")
    ways = {"text_proj": {"safe_serialization": False}, "super_res_last": {"max_shard_size": "9MB"}}
    for name, module in modules.items():
        module.save_pretrained(out / name, **ways.get(name, {}))
    assert (out / "text_proj" / "diffusion_pytorch_model.bin").exists()
    assert len(list((out / "super_res_last").glob("*.safetensors"))) > 1
    return out


@pytest.fixture(scope="module")
def parts(folder):
    return karlo.read([folder], {})


@pytest.fixture(scope="module")
def exported(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported")
    karlo.write(parts, out)
    return out


@pytest.fixture(scope="module")
def inputs():
    """Conditions and noised inputs, float32."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {
        "z_i": draw(BATCH, WIDTH),
        "z_t": draw(BATCH, WIDTH),
        "hidden": draw(BATCH, 77, WIDTH),
        "mask": np.arange(77)[None] < np.array(LENGTHS)[:, None],
        "z": draw(BATCH, WIDTH),
        "x": draw(BATCH, 16, 16, 3),
        "low": draw(BATCH, 8, 8, 3),
    }


def torch_of(array):
    """To torch, pictures [B, H, W, C] as [B, C, H, W]."""
    array = np.moveaxis(array, -1, 1) if array.ndim == 4 else array
    return torch.from_numpy(np.ascontiguousarray(array))


def loaded(part):
    return {"params": jax.tree.map(np.asarray, part.params)}


@functools.cache
def compiled(module):
    return jax.jit(module.apply)


def difference(ours, reference):
    """Largest absolute difference; the reference, a tensor, must be of values near 1."""
    reference = reference.float().numpy()
    if reference.ndim == 4:
        reference = np.moveaxis(reference, 1, -1)
    assert 0.3 < np.sqrt(np.mean(np.square(reference))) < 10
    return np.max(np.abs(np.asarray(ours, np.float32) - reference))


# The rows of the table.


def run_prior(part, inputs, **changes):
    module = DiffusionPrior(**tasks.arguments(part.arch | changes))
    arguments = (TIMES, inputs["z_t"], inputs["hidden"], inputs["mask"])
    return compiled(module)(loaded(part), inputs["z"], *arguments)


@pytest.fixture(scope="module")
def prior_reference(modules, inputs):
    wanted = modules["prior"](
        torch_of(inputs["z"]), torch_of(TIMES), torch_of(inputs["z_t"]),
        torch_of(inputs["hidden"]), torch_of(inputs["mask"]),
    )  # fmt: skip
    return wanted.predicted_image_embedding


def test_prior(parts, modules, inputs, prior_reference, parity):
    part = parts["prior"]
    measured = difference(run_prior(part, inputs), prior_reference)
    parity("prior: 20 layers, padded text, t = 0, 487, 999", "diffusers", measured, 1e-4)
    statistics = {name: np.asarray(value) for name, value in part.extra.items()}
    z = np.float32(inputs["z"] * statistics["std"] + statistics["mean"])
    assert np.allclose(z, modules["prior"].post_process_latents(torch_of(inputs["z"])), atol=1e-6)
    assert part.settings["clamp"] == 5.0


def test_prior_in_bfloat16(parts, inputs, prior_reference, parity):
    ours = run_prior(parts["prior"], inputs, dtype="bfloat16")
    measured = difference(ours, prior_reference) / np.abs(prior_reference.numpy()).max()
    parity("prior in bfloat16, relative to the largest value", "diffusers", measured, 5e-2)


@pytest.fixture(scope="module")
def text_projection(modules, inputs):
    """diffusers' (context, embedding) of `ROWS`."""
    twice = lambda name: torch_of(np.concatenate([inputs[name]] * 2))
    out = modules["text_proj"](
        image_embeddings=torch_of(inputs["z_i"]), prompt_embeds=twice("z_t"),
        text_encoder_hidden_states=twice("hidden"), do_classifier_free_guidance=True,
    )  # fmt: skip
    return tuple(tensor[ROWS] for tensor in out)


def conditions(inputs):
    """The same as our decoder takes them."""
    return {
        "z_i": inputs["z_i"], "z_t": inputs["z_t"], "text_hidden": inputs["hidden"],
        "tokens": None, "text_mask": inputs["mask"], "drop_image": np.array(ROWS) < BATCH,
    }  # fmt: skip


def test_text_projection(parts, text_projection, inputs, parity):
    module = Conditioner(
        time_dim=4 * CHANNELS, context_dim=CONTEXT, use_z_i=True, use_z_t=True,
        use_text_tokens=True, learned_null_text=False, text=None, dtype=jnp.float32,
    )  # fmt: skip
    params = {"params": loaded(parts["decoder"])["params"]["text_proj"]}
    emb, context, mask = module.apply(params, **conditions(inputs), drop_text=None)
    measured = max(map(difference, (context, emb), text_projection))
    parity("text projection, without and with picture", "diffusers", measured, 1e-4)
    assert np.array_equal(mask[:, 4:], inputs["mask"]) and np.all(mask[:, :4])


@pytest.fixture(scope="module")
def decoder_reference(modules, text_projection, inputs):
    context, emb = text_projection
    mask = torch.nn.functional.pad(torch_of(inputs["mask"]), (4, 0), value=True)
    return modules["decoder"](
        torch_of(inputs["x"]), torch_of(TIMES), encoder_hidden_states=context, class_labels=emb,
        attention_mask=mask,
    ).sample  # fmt: skip


def run_decoder(part, inputs):
    module = Decoder(**tasks.arguments(part.arch))
    return compiled(module)(loaded(part), inputs["x"], TIMES, **conditions(inputs))


def test_decoder(parts, inputs, decoder_reference, parity):
    measured = difference(run_decoder(parts["decoder"], inputs), decoder_reference)
    parity("decoder U-Net with its text projection", "diffusers", measured, 1e-4)


def run_upsampler(part, inputs):
    module = Upsampler(**tasks.arguments(part.arch))
    return compiled(module)(loaded(part), inputs["x"], TIMES, inputs["low"])


@pytest.fixture(scope="module")
def upsampler_references(modules, inputs):
    low = torch.nn.functional.interpolate(
        torch_of(inputs["low"]), size=16, mode="bicubic", antialias=True
    )
    seen = torch.cat([torch_of(inputs["x"]), low], dim=1)
    return {
        name: modules[folder](seen, torch_of(TIMES)).sample
        for name, folder in karlo.UPSAMPLERS.items()
    }


def test_upsamplers(parts, inputs, upsampler_references, parity):
    measured = max(
        difference(run_upsampler(parts[name], inputs), reference)
        for name, reference in upsampler_references.items()
    )
    parity("super-resolution U-Nets, first and last", "diffusers", measured, 1e-4)


# Karlo's own files.


def interleaved(*pieces):
    """Rows of equal tensors, 64 of each in turn: how Karlo stores what its heads read."""
    chunks = zip(*(torch.split(piece, 64) for piece in pieces), strict=True)
    return torch.cat([rows for group in chunks for rows in group])


def original_prior(module):
    """Karlo's names and layout of a PriorTransformer's tensors, without the statistics."""
    held, out = module.state_dict(), {}
    names = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "proj_in": "clip_img_proj", "embedding_proj": "text_emb_proj",
        "encoder_hidden_states_proj": "text_enc_proj", "norm_out": "final_ln",
        "proj_to_clip_embeddings": "out_proj",
    }  # fmt: skip
    in_block = {
        "norm1": "ln_1", "norm3": "ln_2", "attn1.to_out.0": "attn.c_proj",
        "ff.net.0.proj": "mlp.c_fc", "ff.net.2": "mlp.c_proj",
    }  # fmt: skip
    for i in range(20):
        block, karlos = f"transformer_blocks.{i}", f"transformer.resblocks.{i}"
        names |= {f"{block}.{a}": f"{karlos}.{b}" for a, b in in_block.items()}
        for kind in ("weight", "bias"):
            fused = [held[f"{block}.attn1.to_{x}.{kind}"] for x in "qkv"]
            out[f"{karlos}.attn.c_qkv.{kind}"] = interleaved(*fused)
    for a, b in names.items():
        out |= {f"{b}.{kind}": held[f"{a}.{kind}"] for kind in ("weight", "bias")}
    out["positional_embedding"], out["prd_emb"] = (
        held["positional_embedding"], held["prd_embedding"])  # fmt: skip
    return {f"model.{name}": tensor for name, tensor in out.items()}


def original_unet(module, prefix):
    """Karlo's names and layout of one of diffusers' U-Nets."""
    held, out = module.state_dict(), {}

    def copy(karlos, name):
        for kind in ("weight", "bias"):
            out[f"{prefix}.{karlos}.{kind}"] = held[f"{name}.{kind}"]

    def residual(karlos, name):
        for a, b in (("in_layers.0", "norm1"), ("in_layers.2", "conv1"),
                     ("emb_layers.1", "time_emb_proj"), ("out_layers.0", "norm2"),
                     ("out_layers.3", "conv2")):  # fmt: skip
            copy(f"{karlos}.{a}", f"{name}.{b}")
        if f"{name}.conv_shortcut.weight" in held:
            copy(f"{karlos}.skip_connection", f"{name}.conv_shortcut")

    def attention(karlos, name):
        copy(f"{karlos}.norm", f"{name}.group_norm")
        for fused, pieces in (("qkv", ("to_q", "to_k", "to_v")),
                              ("encoder_kv", ("add_k_proj", "add_v_proj")),
                              ("proj_out", ("to_out.0",))):  # fmt: skip
            weight, bias = (interleaved(*(held[f"{name}.{piece}.{kind}"] for piece in pieces))
                            for kind in ("weight", "bias"))  # fmt: skip
            out[f"{prefix}.{karlos}.{fused}.weight"] = weight[:, :, None]
            out[f"{prefix}.{karlos}.{fused}.bias"] = bias

    def block(karlos, level, j):
        residual(f"{karlos}.0", f"{level}.resnets.{j}")
        if f"{level}.attentions.{j}.to_q.weight" in held:
            attention(f"{karlos}.1", f"{level}.attentions.{j}")
            return 2
        return 1

    copy("time_embed.0", "time_embedding.linear_1")
    copy("time_embed.2", "time_embedding.linear_2")
    copy("input_blocks.0.0", "conv_in")
    copy("out.0", "conv_norm_out")
    copy("out.2", "conv_out")
    entry = 1
    for level in range(4):
        for j in range(3):
            block(f"input_blocks.{entry}", f"down_blocks.{level}", j)
            entry += 1
        if level < 3:
            residual(f"input_blocks.{entry}.0", f"down_blocks.{level}.downsamplers.0")
            entry += 1
    residual("middle_block.0", "mid_block.resnets.0")
    if "mid_block.attentions.0.to_q.weight" in held:
        attention("middle_block.1", "mid_block.attentions.0")
        residual("middle_block.2", "mid_block.resnets.1")
    else:
        residual("middle_block.1", "mid_block.resnets.1")
    for entry in range(16):
        level, j = f"up_blocks.{entry // 4}", entry % 4
        after = block(f"output_blocks.{entry}", level, j)
        if j == 3 and entry < 15:
            residual(f"output_blocks.{entry}.{after}", f"{level}.upsamplers.0")
    return out


def original_text_projection(module):
    held = module.state_dict()
    names = {
        "clip_image_embeddings_project_to_time_embeddings": "clip_emb",
        "clip_extra_context_tokens_proj": "clip_tok_proj", "embedding_proj": "text_feat_proj",
        "encoder_hidden_states_proj": "text_seq_proj.0",
        "text_encoder_hidden_states_norm": "text_seq_proj.1",
    }  # fmt: skip
    out = {f"model.{b}.{kind}": held[f"{a}.{kind}"]
           for a, b in names.items() for kind in ("weight", "bias")}  # fmt: skip
    return out | {"model.cf_param": held["learned_classifier_free_guidance_embeddings"]}


@pytest.fixture(scope="module")
def original_parts(modules, tmp_path_factory):
    """Karlo's own checkpoints, made of the same modules, and read."""
    out = tmp_path_factory.mktemp("original")
    save = lambda name, content: torch.save(content, out / name)
    prior, decoder = modules["prior"], modules["decoder"]
    buffers = {"cf_token": torch.zeros(1, 77), "cf_mask": torch.ones(1, 77, dtype=torch.bool)}
    lightning = {"epoch": 3, "global_step": 1_000_000}
    save("prior-ckpt-step=01000000-of-01000000.ckpt",
         {"state_dict": original_prior(prior) | buffers, **lightning})  # fmt: skip
    both = original_unet(decoder, "model") | original_text_projection(modules["text_proj"])
    save("decoder-ckpt-step=01000000-of-01000000.ckpt", {"state_dict": both, **lightning})
    both = original_unet(modules["super_res_first"], "model_first_steps")
    both |= original_unet(modules["super_res_last"], "model_last_step")
    save("improved-sr-ckpt-step=1.2M.ckpt", {"state_dict": both, **lightning})
    save("ViT-L-14_stats.th", [prior.clip_mean[0].clone(), prior.clip_std[0].clone()])
    return karlo.read([out], {})


def test_karlos_own_files(
    parts, original_parts, inputs, prior_reference, decoder_reference, upsampler_references, parity
):
    name = "Karlo's own checkpoint files: "
    measured = difference(run_prior(original_parts["prior"], inputs), prior_reference)
    parity(name + "prior", "diffusers", measured, 1e-4)
    measured = difference(run_decoder(original_parts["decoder"], inputs), decoder_reference)
    parity(name + "decoder", "diffusers", measured, 1e-4)
    last = "upsampler_0_last"
    ours = run_upsampler(original_parts[last], inputs)
    measured = difference(ours, upsampler_references[last])
    parity(name + "super-resolution, last", "diffusers", measured, 1e-4)
    for kind, part in original_parts.items():
        ours, folders = (tree_paths(p.params) for p in (part, parts[kind]))
        assert ours.keys() == folders.keys()
        assert all(np.array_equal(value, folders[path]) for path, value in ours.items())
        module = {"prior": DiffusionPrior, "decoder": Decoder}.get(kind, Upsampler)
        assert module(**tasks.arguments(part.arch)) == module(**tasks.arguments(parts[kind].arch))
    assert original_parts["prior"].settings["clamp"] == 10.0
    assert np.array_equal(original_parts["prior"].extra["std"], parts["prior"].extra["std"])


# Back to diffusers.


def options(module):
    """The config of a module or scheduler, without what Karlo does not give or nothing reads."""
    config = module.config
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    vague = ("sample_size", "architectures", "transformers_version", "pad_token_id", "dtype")
    lists = lambda value: list(value) if isinstance(value, tuple) else value
    return {k: lists(v) for k, v in config.items() if k[0] != "_" and k not in vague}


def test_every_component_loads_and_equals_the_one_it_came_from(modules, exported):
    for name, module in modules.items():
        again = CLASSES[name].from_pretrained(exported, subfolder=name)
        assert options(again) == options(module), name
        if "scheduler" not in name:
            ours, diffusers_own = again.state_dict(), module.state_dict()
            assert ours.keys() == diffusers_own.keys(), name
            assert all(torch.equal(ours[key], value) for key, value in diffusers_own.items()), name


def assembled(pipeline, exported, absent):
    """The lines of docs/convert.md: every component by the class that the index names."""
    source = {"diffusers": diffusers, "transformers": transformers, "unclip": theirs}
    index = json.loads((exported / "model_index.json").read_text())
    load = lambda name: getattr(source[index[name][0]], index[name][1]).from_pretrained(
        exported, subfolder=name
    )
    names = [name for name in index if name[0] != "_" and name not in absent]
    pipe = pipeline(**{name: load(name) for name in names})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_pipelines_assembled_from_the_components_run(exported):
    steps = dict(decoder_num_inference_steps=2, super_res_num_inference_steps=2, output_type="np")
    pipe = assembled(theirs.UnCLIPPipeline, exported, ("image_encoder", "feature_extractor"))
    assert pipe.tokenizer.pad_token_id == 0
    drawn = pipe("a red fox", prior_num_inference_steps=2, **steps).images
    assert drawn.shape == (1, LARGE, LARGE, 3) and np.isfinite(drawn).all()
    pipe = assembled(theirs.UnCLIPImageVariationPipeline, exported, ("prior", "prior_scheduler"))
    drawn = pipe(Image.new("RGB", (40, 30), "red"), **steps).images
    assert drawn.shape == (1, LARGE, LARGE, 3) and np.isfinite(drawn).all()


WHOLE = """
import sys
sys.path.insert(0, sys.argv[1])
import diffusers
from PIL import Image
steps = dict(decoder_num_inference_steps=2, super_res_num_inference_steps=2, output_type="np")
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[2])
drawn = pipe("a red fox", prior_num_inference_steps=2, **steps).images
print(diffusers.__version__, type(pipe).__name__, drawn.shape)
pipe = diffusers.UnCLIPImageVariationPipeline.from_pretrained(sys.argv[2])
print(type(pipe).__name__, pipe(Image.new("RGB", (40, 30)), **steps).images.shape)
"""


def test_the_last_diffusers_that_had_the_pipeline_opens_the_whole_folder(exported):
    if not (OLD / "diffusers").is_dir():
        pytest.skip(
            f"no diffusers {VERSION}: pip install --no-deps --target {OLD} "
            f"diffusers=={VERSION} httpx==0.28.1 httpcore==1.0.9 h11 anyio"
        )
    # One thread: the networks are tiny, and the threads of several processes wait for each other.
    ran = subprocess.run(
        [sys.executable, "-c", WHOLE, OLD, exported], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    shape = f"(1, {LARGE}, {LARGE}, 3)"
    assert ran.stdout.splitlines() == [
        f"{VERSION} UnCLIPPipeline {shape}", f"UnCLIPImageVariationPipeline {shape}"
    ], ran.stderr  # fmt: skip


# Karlo's true size, nothing allocated.

COUNTS = {
    "prior": 1_022_028_544 + 2 * 768,
    "text_proj": 7_878_400,
    "decoder": 885_439_686,
    "super_res_first": 691_579_523,
    "super_res_last": 691_579_523,
}


def hollow(shapes):
    """A tree of shapes as unread tensors."""
    return jax.tree.map(lambda leaf: Lazy(leaf.shape, leaf.dtype, None), shapes)


def test_full_size_keys_and_shapes_are_those_of_diffusers():
    with torch.device("meta"):
        full = {name: CLASSES[name](**KARLO[name]) for name in NETWORKS}
    configs = {name: json.loads(module.to_json_string()) for name, module in full.items()}
    ours = {}
    arch = prior_arch(configs["prior"], "prior")
    shapes = prior_shapes(arch)
    ours["prior"] = layout.give(prior_rules(20), hollow(shapes))
    arch, width = decoder_arch(configs["decoder"], configs["text_proj"], "decoder")
    shapes = decoder_shapes(arch, width, width)
    both = layout.give(decoder_rules(4, 3), hollow(shapes))
    ours |= {name: layout.prefixed(both, f"{name}.") for name in ("decoder", "text_proj")}
    archs = [upsampler_arch(configs[name], name) for name in karlo.UPSAMPLERS.values()]
    assert archs[0] == archs[1]
    shapes = upsampler_shapes(archs[0])
    for name in karlo.UPSAMPLERS.values():
        ours[name] = layout.give(unet_rules(4, 3), hollow(shapes))
    for name, module in full.items():
        expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        assert {key: tensor.shape for key, tensor in ours[name].items()} == expected, name
        assert sum(np.prod(s, dtype=np.int64) for s in expected.values()) == COUNTS[name]
