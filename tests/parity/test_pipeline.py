"""A converted Karlo draws what diffusers draws: the same picture from the same noise.

The Karlo here is built of diffusers' and transformers' own classes with random weights: every depth
is Karlo's (20 layers in the prior, 12 and 24 in CLIP, 3 blocks a level and 4 levels in each U-Net),
widths and pictures are smaller. Its last layers are fitted, so that pictures have half-tones. It is
saved as its folder, converted, and run with the step counts, guidance and clamps that the
conversion found in it.
"""

import gzip
import json
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.deprecated import unclip as theirs
from diffusers.schedulers import scheduling_unclip
from PIL import Image
from torch.nn import functional

from unclip import UnCLIP
from unclip.cascade import bundle
from unclip.diffusion import schedule
from unclip.input.decode.image import for_clip
from unclip.input.decode.text import VOCABULARY, Tokenizer
from unclip.interop import formats
from unclip.tasks.arrays import to_uint8

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = ["a red fox in the snow", "an oil painting of a lighthouse, at night"]
WIDTH, CROSS, SMALL, LARGE = 64, 48, 16, 64  # embeddings, context, sides of the two pictures
STEPS = {"prior": 25, "decoder": 25, "upsampler_0": 7}
SHAPES = {"prior": (WIDTH,), "decoder": (SMALL, SMALL, 3), "upsampler_0": (LARGE, LARGE, 3)}


def randomised(module, seed, gain=1.0):
    """A module with every parameter random, of a size that keeps its activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda p: torch.randn(p.shape, generator=generator)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim > 1:
                fan_in = p.shape[-1] if "embedding" in name else p[0].numel()
                p.copy_(normal(p) * gain / fan_in**0.5)
            else:
                p.copy_(("norm" in name and name.endswith("weight")) + 0.1 * normal(p))
    return module.eval()


def noisy_pictures(side, rows, seed):
    """(x_t, t, eps, x_0) of smooth pictures [rows, 3, side, side] at timesteps 0 to 999."""
    generator = torch.Generator().manual_seed(seed)
    blobs = 0.4 * torch.randn((rows, 3, 4, 4), generator=generator)
    x_0 = functional.interpolate(blobs, size=side, mode="bicubic").clamp(-1, 1)
    eps = torch.randn(x_0.shape, generator=generator)
    t = torch.linspace(0, 999, rows).round().long()
    a = diffusers.UnCLIPScheduler().alphas_cumprod[t][:, None, None, None]
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps, t, eps, x_0


def fitted(network, eps, **inputs):
    """Sets the last layer by least squares, so that the random network predicts eps from x_t a
    little.

    Otherwise the pictures it draws are black or white at every pixel, and small differences either
    vanish in the clamp or flip a pixel.
    """
    seen = []
    hook = network.conv_out.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        network(**inputs)
        hook.remove()
        patches = functional.unfold(seen[0], 3, padding=1).transpose(1, 2).flatten(0, 1).double()
        patches = torch.cat([patches, torch.ones(len(patches), 1)], 1)
        target = eps.permute(0, 2, 3, 1).flatten(0, 2).double()
        square = patches.T @ patches + 1e-3 * len(patches) * torch.eye(patches.shape[1])
        solution = torch.linalg.solve(square, patches.T @ target).float().T
        last = network.conv_out
        last.weight[:3] = solution[:, :-1].reshape(3, *last.weight.shape[1:])
        last.bias[:3] = solution[:, -1]
    return network


def fit_decoder(network):
    x_t, t, eps, _ = noisy_pictures(SMALL, 96, 20)
    generator = torch.Generator().manual_seed(21)
    context = torch.randn((len(t), 81, CROSS), generator=generator)
    emb = 0.3 * torch.randn((len(t), 4 * 32), generator=generator)
    return fitted(
        network, eps, sample=x_t, timestep=t, encoder_hidden_states=context, class_labels=emb
    )


def fit_upsampler(network, seed):
    x_t, t, eps, x_0 = noisy_pictures(LARGE, 16, seed)
    low = functional.interpolate(functional.interpolate(x_0, SMALL), LARGE, mode="bicubic")
    return fitted(network, eps, sample=torch.cat([x_t, low], 1), timestep=t)


def clip_tokenizer(folder):
    """transformers' CLIPTokenizer over our vocabulary, padded as Karlo's: with "!", id 0."""
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")
    merges = [line.split() for line in lines[1 : 49152 - 256 - 2 + 1]]
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    letters = [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    words = letters + [w + "</w>" for w in letters] + ["".join(m) for m in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    pairs = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(pairs))
    return transformers.CLIPTokenizer.from_pretrained(folder, pad_token="!", model_max_length=77)


def components(folder):
    """Karlo's parts at full depth and reduced width, by the names of its folder."""
    torch.manual_seed(0)
    clip = dict(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_attention_heads=4,
        projection_dim=WIDTH,
        hidden_act="quick_gelu",
    )
    text = transformers.CLIPTextConfig(
        **clip, num_hidden_layers=12, eos_token_id=49407, bos_token_id=49406, pad_token_id=0
    )
    vision = transformers.CLIPVisionConfig(
        **clip, num_hidden_layers=24, image_size=28, patch_size=14
    )
    unet = dict(layers_per_block=3, norm_num_groups=8)
    decoder = diffusers.UNet2DConditionModel(
        sample_size=SMALL,
        in_channels=3,
        out_channels=6,
        block_out_channels=(32, 64, 96, 128),
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        cross_attention_dim=CROSS,
        attention_head_dim=16,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
        **unet,
    )
    upsampler = lambda: diffusers.UNet2DModel(
        sample_size=LARGE,
        in_channels=6,
        out_channels=3,
        block_out_channels=(16, 32, 48, 64),
        down_block_types=("ResnetDownsampleBlock2D",) * 4,
        up_block_types=("ResnetUpsampleBlock2D",) * 4,
        add_attention=False,
        **unet,
    )
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=32, num_layers=20, embedding_dim=WIDTH
    )
    randomised(prior, 3)
    with torch.no_grad():  # statistics of z_i
        prior.clip_mean.normal_()
        prior.clip_std.uniform_(0.5, 1.5)
    scheduler = lambda variance, predicts, limit: diffusers.UnCLIPScheduler(
        variance_type=variance, prediction_type=predicts, clip_sample_range=limit
    )
    return {
        "tokenizer": clip_tokenizer(folder / "words"),
        "text_encoder": randomised(transformers.CLIPTextModelWithProjection(text), 1),
        "image_encoder": randomised(transformers.CLIPVisionModelWithProjection(vision), 2),
        "feature_extractor": transformers.CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        "prior": prior,
        "text_proj": randomised(
            theirs.UnCLIPTextProjModel(
                clip_embeddings_dim=WIDTH, time_embed_dim=4 * 32, cross_attention_dim=CROSS
            ),
            4,
            0.2,
        ),
        "decoder": fit_decoder(randomised(decoder, 5)),
        "super_res_first": fit_upsampler(randomised(upsampler(), 6), 22),
        "super_res_last": fit_upsampler(randomised(upsampler(), 7), 23),
        "prior_scheduler": scheduler("fixed_small_log", "sample", 5.0),
        "decoder_scheduler": scheduler("learned_range", "epsilon", 1.0),
        "super_res_scheduler": scheduler("fixed_small_log", "epsilon", 1.0),
    }


@pytest.fixture(scope="module")
def karlo(tmp_path_factory):
    """.pipeline and .variations of diffusers, and .model, ours, converted from their folders."""
    torch.set_num_threads(1)  # several would wait for one another on a shared machine
    folder = tmp_path_factory.mktemp("karlo")
    parts = components(folder)
    text_only, image_only = {"prior", "prior_scheduler"}, {"image_encoder", "feature_extractor"}
    pipeline = theirs.UnCLIPPipeline(**{k: v for k, v in parts.items() if k not in image_only})
    variations = theirs.UnCLIPImageVariationPipeline(
        **{k: v for k, v in parts.items() if k not in text_only}
    )
    for pipe in (pipeline, variations):
        pipe.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "alpha")
    parts["image_encoder"].save_pretrained(folder / "variations" / "image_encoder")
    found = formats.read("karlo", [folder / "alpha", folder / "variations"])
    bundle.write(folder / "bundle", found)
    model = UnCLIP.load(str(folder / "bundle"), batch_size=2)
    return SimpleNamespace(pipeline=pipeline, variations=variations, model=model)


def normal(rows, seed=0):
    """{stage: [1 + steps, rows, ...]}, the argument `noise` of `UnCLIP`."""
    rng = np.random.default_rng(seed)
    return {
        name: np.float32(rng.standard_normal((1 + STEPS[name], rows, *SHAPES[name])))
        for name in SHAPES
    }


def there(values):
    """[B, H, W, C] to torch's [B, C, H, W]; [B, D] unchanged."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, -1, 1)))


def here(values):
    return values.permute(0, 2, 3, 1).numpy()


def settle(network, x_T, low):
    """Moves values of x_T, in place, away from where rounding would decide the first step.

    The step from t = 999 divides x_T - eps by 5e-5 and clamps. What is nearly zero there is the
    one ill-conditioned place of the pipeline: a few values in 10,000, in any library.
    """
    for _ in range(20):
        eps = network(sample=torch.cat([x_T, low], 1), timestep=999).sample
        near = (x_T - eps).abs() < 1e-3
        if not near.any():
            return
        x_T[near] += 0.05
    raise AssertionError("x_T did not settle")


def run(pipe, noise, *, tables, **arguments):
    """(z_i, picture of the decoder, final picture) of diffusers, pictures in [0, 1].

    Args:
      noise: the upsampler's x_T is changed in place, see `settle`.
      tables: "float32", diffusers' own, or "float64": its schedulers' betas in double precision.
    """
    stages = [name for name in noise if hasattr(pipe, name) or name == "upsampler_0"]
    queue = [z for name in stages for z in noise[name][1:-1]]  # none at the step to x_0
    latents = {
        "prior": "prior_latents",
        "decoder": "decoder_latents",
        "upsampler_0": "super_res_latents",
    }
    arguments |= {latents[name]: there(noise[name][0]) for name in stages}
    x_T = arguments["super_res_latents"]
    seen, project, resize = {}, pipe.text_proj.forward, functional.interpolate

    def noted_project(*, image_embeddings, **rest):
        seen["z_i"] = image_embeddings.numpy()
        return project(image_embeddings=image_embeddings, **rest)

    def noted_resize(x, *args, antialias=False, **rest):
        resized = resize(x, *args, antialias=antialias, **rest)
        if antialias:
            seen["small"] = here(x) / 2 + 0.5
            settle(pipe.super_res_first, x_T, resized)
        return resized

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            scheduling_unclip, "randn_tensor", lambda shape, **_: there(queue.pop(0)).view(shape)
        )
        patch.setattr(pipe, "prepare_latents", lambda *given: given[-2])
        patch.setattr(pipe.text_proj, "forward", noted_project)
        patch.setattr(functional, "interpolate", noted_resize)
        for name in ("prior", "decoder", "super_res"):
            if tables == "float64" and hasattr(pipe, f"{name}_scheduler"):
                scheduler = getattr(pipe, f"{name}_scheduler")
                kept = 1 - torch.from_numpy(np.array(schedule.cosine().betas))
                for table in (
                    (1 - kept, "betas"),
                    (kept, "alphas"),
                    (torch.cumprod(kept, 0), "alphas_cumprod"),
                ):
                    patch.setattr(scheduler, table[1], table[0])
        picture = pipe(**arguments, output_type="np").images
    assert not queue
    noise["upsampler_0"][0] = here(x_T)
    return seen["z_i"], seen["small"], picture


def distance(ours, theirs):
    return np.abs(np.float64(ours) - theirs).max()


def relative(ours, theirs):
    return distance(ours, theirs) / np.abs(theirs).max()


def telling(picture):
    """Asserts that a picture could show a difference: neither flat nor cut at the clamp."""
    at_clamp = np.mean((picture < 0.002) | (picture > 0.998))
    assert picture.std() > 0.05 and at_clamp < 0.5, (picture.std(), at_clamp)


def unit_range(drawn):
    """`UnCLIP.decode`'s pictures in [0, 1]: (the decoder's, the upsampler's)."""
    return drawn["decoder"] / 2 + 0.5, drawn["upsampler_0"] / 2 + 0.5


def test_generate(karlo, parity):
    """Captions to pictures, each library left to itself.

    diffusers' schedulers compute from float64 tables here: its own make the last step of every
    stage 1.0005 times as large (tests/parity/test_scheduler.py), which the guidance of the next
    stage multiplies.
    """
    noise, seeds = normal(len(PROMPTS)), [0, 1]
    z_i, small, large = run(karlo.pipeline, noise, tables="float64", prompt=PROMPTS)
    telling(small)
    telling(large)
    ours = karlo.model.draw_prior(PROMPTS, seeds, noise=noise)
    drawn = karlo.model.decode(ours, PROMPTS, seeds, noise=noise)
    our_small, our_large = unit_range(drawn)
    against = "diffusers UnCLIPPipeline, float64 tables"
    parity("whole pipeline: z_i, relative to the largest", against, relative(ours, z_i), 1e-3)
    parity("whole pipeline: decoder picture in [0, 1]", against, distance(our_small, small), 1e-3)
    parity("whole pipeline: final picture in [0, 1]", against, distance(our_large, large), 1e-3)

    made = karlo.model.generate(PROMPTS, noise=noise)  # the defaults are those of the folder
    np.testing.assert_array_equal(made.images, to_uint8(drawn["upsampler_0"]))
    recipe = made.recipes[0]
    assert recipe["steps"] == {"prior": 25, "decoder": 25, "upsampler_0": 7}
    assert recipe["guidance"] == {"prior": 4.0, "decoder": 8.0}
    unguided = karlo.model.decode(
        ours, PROMPTS, seeds, noise=noise, decoder={"guidance": 1.0}, stages=1
    )["decoder"]
    assert np.abs(unguided - drawn["decoder"]).max() > 0.05  # so guidance was compared above


def test_stages_with_float32_tables(karlo, parity):
    """diffusers unchanged, each of our stages given diffusers' own result of the one before."""
    noise, seeds = normal(len(PROMPTS), 1), [0, 1]
    z_i, small, large = run(karlo.pipeline, noise, tables="float32", prompt=PROMPTS)
    ours = karlo.model.draw_prior(PROMPTS, seeds, noise=noise)
    drawn = karlo.model.decode(z_i, PROMPTS, seeds, noise=noise, stages=1)
    low, names = 2 * small - 1, ["upsampler_0"]
    upsampled = karlo.model.draw_upsamplers(low, seeds, names, noise=noise)["upsampler_0"]
    against = "diffusers UnCLIPPipeline unchanged"
    parity("Karlo's prior: z_i, relative to the largest", against, relative(ours, z_i), 1e-3)
    parity(
        "Karlo's decoder: picture in [0, 1]",
        against,
        distance(drawn["decoder"] / 2 + 0.5, small),
        1e-3,
    )
    parity(
        "Karlo's upsampler: picture in [0, 1]", against, distance(upsampled / 2 + 0.5, large), 1e-3
    )


def test_variations(karlo, parity):
    """A picture that is not square, through the feature extractor, and the empty caption."""
    noise, seeds = normal(2, 2), [0, 1]
    del noise["prior"]
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8)).resize((91, 60))
    z_i, small, large = run(
        karlo.variations, noise, tables="float64", image=picture, num_images_per_prompt=2
    )
    telling(small)
    telling(large)
    ours = karlo.model.embed_image(for_clip(np.asarray(picture), 28)[None])
    drawn = karlo.model.decode(ours.repeat(2, 0), None, seeds, noise=noise)
    our_small, our_large = unit_range(drawn)
    against = "diffusers UnCLIPImageVariationPipeline, float64 tables"
    parity("variations: z_i, relative to the largest", against, relative(ours[0], z_i[0]), 1e-4)
    parity("variations: decoder picture in [0, 1]", against, distance(our_small, small), 1e-3)
    parity("variations: final picture in [0, 1]", against, distance(our_large, large), 1e-3)
    made = karlo.model.variations(np.asarray(picture), n=2, noise=noise)
    np.testing.assert_array_equal(made.images, to_uint8(drawn["upsampler_0"]))


def test_captions_are_padded_as_trained(karlo):
    """Id 0 after the end, a mask from start to end, and the empty caption encoded likewise."""
    captions = [*PROMPTS, "", " ".join(["snow"] * 100)]
    want = karlo.pipeline.tokenizer(
        captions, padding="max_length", max_length=77, truncation=True, return_tensors="np"
    )
    tokens, mask, _ = Tokenizer().encode(captions, 77)
    np.testing.assert_array_equal(tokens, want["input_ids"])
    np.testing.assert_array_equal(mask, want["attention_mask"].astype(bool))
    assert tokens[0, -1] == 0 and not mask[0, -1]
    for ours, row in zip(karlo.model._tasks["decoder"].empty(1), (tokens, mask)):
        np.testing.assert_array_equal(ours[0], row[2])
