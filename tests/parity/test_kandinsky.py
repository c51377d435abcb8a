"""Kandinsky 2.2's prior: what `UnCLIP.draw_prior` draws against diffusers' own pipeline.

The pipeline is built with random weights at full depth (prior 20 blocks, text encoder 32) and
reduced width, saved as on the hub, converted, and both draw from the same noise.
"""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers.schedulers import scheduling_unclip

from unclip import UnCLIP
from unclip.cascade import bundle, runs
from unclip.files import tensors
from unclip.interop import clip as hf
from unclip.interop import formats
from unclip.models import clip
from unclip.models.transformer import stack_blocks

pytestmark = pytest.mark.usefixtures("quick_compiles")

DIM, SIZE, STEPS = 40, 28, 25
CAPTIONS = ["a red fox in the snow", "an astronaut riding a horse, oil on canvas"]


def randomise(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in module.named_parameters():
            noise = torch.randn(leaf.shape, generator=generator)
            norm = (name.endswith("weight") and leaf.ndim == 1) or name == "clip_std"
            around = 1.0 if norm else 0.0
            scale = 0.1 if leaf.ndim < 2 or norm else 0.5 * leaf.shape[-1] ** -0.5
            leaf.copy_(around + scale * noise)
    return module.eval()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """KandinskyV22PriorPipeline at full depth, and its folder."""
    folder = tmp_path_factory.mktemp("kandinsky")
    text = transformers.CLIPTextConfig(
        hidden_size=DIM, intermediate_size=4 * DIM, num_hidden_layers=32, num_attention_heads=2,
        projection_dim=DIM, hidden_act="gelu",
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=160, num_hidden_layers=4, num_attention_heads=2,
        projection_dim=DIM, hidden_act="gelu", image_size=SIZE, patch_size=14,
    )  # fmt: skip
    hf.write_tokenizer(folder / "tokenizer", "<|endoftext|>")
    hf.write_json(folder / "image" / "preprocessor_config.json", hf.image_processor(SIZE))
    made = diffusers.KandinskyV22PriorPipeline(
        prior=randomise(
            diffusers.PriorTransformer(
                num_attention_heads=2, attention_head_dim=16, embedding_dim=DIM
            ),
            0,
        ),
        text_encoder=randomise(transformers.CLIPTextModelWithProjection(text), 1),
        image_encoder=randomise(transformers.CLIPVisionModelWithProjection(vision), 2),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        image_processor=transformers.AutoImageProcessor.from_pretrained(folder / "image"),
        scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
    )
    assert len(made.prior.transformer_blocks) == 20
    made.save_pretrained(folder / "pipeline")
    made.set_progress_bar_config(disable=True)
    return made, folder


@pytest.fixture(scope="module")
def parts(pipeline):
    return formats.read("kandinsky2_2-prior", [pipeline[1] / "pipeline"])


def test_draws_as_the_pipeline(pipeline, parts, parity, monkeypatch):
    theirs, folder = pipeline
    assert parts.keys() == {"clip", "prior"}
    runs.check_fit(parts)
    settings = parts["prior"].settings
    assert settings["clamp"] == 10.0
    assert (settings["draw"]["steps"], settings["draw"]["guidance"]) == (STEPS, 4.0)
    bundle.write(folder / "bundle", parts)
    read = bundle.read(folder / "bundle").parts
    for name in ("clip", "prior"):  # folded, which compiles one block, not all
        read[name].arch["fold"], read[name].params = True, stack_blocks(read[name].params)
    noise = np.random.default_rng(0).normal(size=(1 + STEPS, len(CAPTIONS), DIM)).astype("f4")

    def draw():
        steps = iter(noise[1:])
        given = lambda *args, **kwargs: torch.from_numpy(next(steps))
        monkeypatch.setattr(scheduling_unclip, "randn_tensor", given)
        drawn = theirs(CAPTIONS, latents=torch.from_numpy(noise[0]), output_type="np")
        assert sum(1 for _ in steps) == 1  # none at the last step
        return drawn

    drawn = draw()
    model = UnCLIP(read, batch_size=2)
    mine = model.draw_prior(CAPTIONS, [0, 1], noise={"prior": noise})
    reference = drawn.image_embeds
    assert reference.shape == (len(CAPTIONS), DIM)
    difference = np.abs(mine - reference).max() / np.abs(reference).max()
    parity("Kandinsky 2.2 prior, whole draw (relative)", "diffusers", difference, 1e-3)
    # Nearly all of it is their last step: 1 - alpha_bar_0 = 4e-5 has three digits in float32, so
    # x_0 comes out scaled by 1.0005. With their tables in double precision:
    angle = (np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2
    betas = np.minimum(1 - np.cos(angle[1:]) ** 2 / np.cos(angle[:-1]) ** 2, 0.999)
    tables = {"betas": betas, "alphas": 1 - betas, "alphas_cumprod": np.cumprod(1 - betas)}
    for name, table in tables.items():
        monkeypatch.setattr(theirs.scheduler, name, torch.from_numpy(table))
    monkeypatch.setattr(theirs.scheduler, "one", torch.tensor(1.0, dtype=torch.float64))
    exact = draw().image_embeds
    difference = np.abs(mine - exact).max() / np.abs(exact).max()
    parity("Kandinsky 2.2 prior, whole draw, its schedule in double", "diffusers", difference, 2e-5)
    other = model.draw_prior(CAPTIONS, [0, 1], noise={"prior": noise}, guidance=3.0)
    assert np.abs(other - reference).max() / np.abs(reference).max() > 1e-2

    # What Kandinsky's decoder takes as negative: the embedding of normalised zeros.
    tower = clip.CLIP(**read["clip"].arch)
    zeros = jnp.zeros((1, SIZE, SIZE, 3))
    z_i = tower.apply({"params": read["clip"].params}, zeros, method="encode_image")
    reference = drawn.negative_image_embeds
    difference = np.abs(np.asarray(z_i) - reference).max() / np.abs(reference).max()
    parity("Kandinsky 2.2, image embedding of zeros (relative)", "diffusers", difference, 1e-4)


def test_one_prediction(pipeline, parts, parity):
    """The network alone, text masked at different lengths."""
    from unclip.models import prior

    rng = np.random.default_rng(1)
    z, z_t = rng.normal(size=(2, 3, DIM)).astype("f4")
    hidden = rng.normal(size=(3, 77, DIM)).astype("f4")
    mask = np.arange(77)[None] < np.array([77, 9, 2])[:, None]
    t = np.array([999, 500, 0])
    with torch.no_grad():
        theirs = pipeline[0].prior(
            torch.from_numpy(z), torch.from_numpy(t), torch.from_numpy(z_t),
            torch.from_numpy(hidden), torch.from_numpy(mask),
        ).predicted_image_embedding.numpy()  # fmt: skip
    part = parts["prior"]
    module = prior.DiffusionPrior(**part.arch | {"fold": True, "dtype": jnp.float32})
    params = stack_blocks(_loaded(part.params))
    mine = module.apply({"params": params}, z, jnp.asarray(t), z_t, hidden, mask)
    difference = np.abs(mine - theirs).max() / np.abs(theirs).max()
    parity("Kandinsky 2.2 prior, one prediction (relative)", "diffusers", difference, 1e-4)


def test_full_size_by_shape():
    """The published sizes: 1,280-dimensional embeddings, 32 heads of 64, 20 blocks."""
    from unclip.interop import layout
    from unclip.interop.karlo import config as karlo_config
    from unclip.interop.karlo import networks as karlo_networks

    with torch.device("meta"):
        theirs = diffusers.PriorTransformer(embedding_dim=1280)
    source = {
        name: tensors.Lazy(tensor.shape, np.float32, lambda: None)
        for name, tensor in theirs.state_dict().items()
    }
    arch = karlo_config.prior_arch(dict(theirs.config), "prior")
    shapes = karlo_networks.prior_shapes(arch)
    layout.take(karlo_networks.prior_rules(20), source, shapes, what="Kandinsky 2.2's prior")
    assert arch["text_width"] == arch["embed_dim"] == clip.PRESETS["ViT-bigG/14"]["embed_dim"]


def _loaded(tree):
    return {k: _loaded(v) if isinstance(v, dict) else np.asarray(v) for k, v in tree.items()}
