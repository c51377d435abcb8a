"""CLIP score from pictures and captions, against torchmetrics with a random CLIP of transformers.

The processor is built from files that we write: the tokenizer's vocabulary and the image settings.
CMMD's and Hessel's preparations are compared with their published formulas, derived anew.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.parity import peers
from unclip.cascade import bundle
from unclip.interop import formats
from unclip.measure import clip_score, embedders, features
from unclip.measure.pictures import open_pictures
from unclip.models import clip

SIZES = ((224, 224), (231, 97), (64, 67), (150, 333), (99, 512), (30, 47))
CAPTIONS = [
    "a photo of a cat",
    "It's 3 o'clock, naïve café: 1234 emoji!",
    "",
    "a corgi playing a flame throwing trumpet " * 3,
    "an oil painting of a lighthouse, at night, with a very long story " * 9,
    "one two three four five six seven eight nine ten " * 8,
]
SIDE = 56


class Tensors(transformers.CLIPModel):
    """Gives embeddings as plain tensors, as torchmetrics and transformers before 5 expect."""

    def get_image_features(self, *args, **kwargs):
        return super().get_image_features(*args, **kwargs).pooler_output

    def get_text_features(self, *args, **kwargs):
        return super().get_text_features(*args, **kwargs).pooler_output


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(CLIPModel, CLIPProcessor, folder of both) with every parameter random."""
    folder = tmp_path_factory.mktemp("clip")
    config = transformers.CLIPConfig(
        projection_dim=32,
        text_config=dict(
            hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=49408, eos_token_id=49407, bos_token_id=49406, max_position_embeddings=77,
        ),
        vision_config=dict(
            hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
            image_size=SIDE, patch_size=14,
        ),
    )  # fmt: skip
    model = Tensors(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name or "layrnorm" in name
            scale = 0.2 if parameter.ndim < 2 else 0.5 * parameter[0].numel() ** -0.5
            scale = 0.3 if "embedding" in name else scale
            one = float(norm and name.endswith("weight"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + one)
        model.logit_scale.fill_(math.log(100))
    model.save_pretrained(folder / "theirs")
    formats.write("hf-clip", formats.read("hf-clip", [folder / "theirs"]), folder / "ours")
    return model, transformers.CLIPProcessor.from_pretrained(folder / "ours"), folder / "theirs"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A set of files of odd sizes, with edges that a crop of another place shows."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        coarse = rng.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.NEAREST)
        picture.save(folder / f"{number}.png")
    return open_pictures(folder)


def arrays(pictures):
    return [pictures.read(number) for number in range(len(pictures))]


@pytest.fixture(scope="module")
def bundled(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    bundle.write(folder, formats.read("hf-clip", [theirs[2]]))
    return folder


def embed(extractor, pictures):
    return features.extract(extractor, pictures).rows["z_i"]


def test_clip_score(parity, theirs, bundled, pictures):
    """Every pair alone and all together, from picture files and texts."""
    model, processor, folder = theirs
    score = peers.torchmetrics().multimodal.clip_score.CLIPScore(lambda: (model, processor))
    tensors = [torch.from_numpy(p).permute(2, 0, 1) for p in arrays(pictures)]
    with torch.no_grad(), pytest.warns(UserWarning, match="caption longer than"):
        alone = np.array([score(t, c).item() for t, c in zip(tensors, CAPTIONS)])
        score.reset()
        score.update(tensors, CAPTIONS)
        together = score.compute().item()
    for path, source in ((bundled, "a bundle"), (folder, "their folder")):
        z_i = embed(embedders.clip_extractor(path, "transformers"), pictures)
        z_t = embedders.CaptionEncoder(path).encode(CAPTIONS, truncate="slice")
        kept = 100 * np.maximum(clip_score.cosine(z_i, z_t), 0)
        assert alone.std() > 0.5
        what = "CLIP score of 100, single pairs, odd sizes, up to 130 words, from"
        parity(f"{what} {source}", "torchmetrics", np.abs(kept - alone).max(), 1e-4)
        difference = abs(clip_score.torchmetrics(z_i, z_t) - together)
        parity(f"CLIP score of 100, all pairs, from {source}", "torchmetrics", difference, 1e-4)


def test_cut_captions_are_read_at_their_first_token(theirs, bundled):
    """What torchmetrics' slice does: two long captions of no common word are the same to CLIP."""
    model, processor, _ = theirs
    long = [caption for caption in CAPTIONS if len(caption.split()) > 70]
    assert len(long) == 2
    with torch.no_grad():
        made = processor(text=long, return_tensors="pt", padding=True)
        cut = made["input_ids"][:, :77], made["attention_mask"][:, :77]
        theirs = model.get_text_features(*cut).numpy()
    np.testing.assert_allclose(theirs[0], theirs[1], atol=1e-6)
    encoder = embedders.CaptionEncoder(bundled)
    sliced, whole = encoder.encode(long, truncate="slice"), encoder.encode(long)
    np.testing.assert_allclose(sliced, theirs, atol=1e-5)
    assert np.abs(whole[0] - whole[1]).max() > 0.05


def test_hessel_captions(parity, theirs, bundled):
    """Prefix, and the end of text kept: what OpenAI's tokenizer does with truncate=True."""
    model, processor, _ = theirs
    texts = ["A photo depicts " + caption for caption in CAPTIONS]
    made = processor(text=texts, return_tensors="pt", padding=True, truncation=True, max_length=77)
    assert (made["input_ids"].max(1).values == 49407).all() and made["input_ids"].shape[1] == 77
    with torch.no_grad():
        theirs = model.get_text_features(**made).numpy()
    ours = embedders.CaptionEncoder(bundled).encode(CAPTIONS, prefix=embedders.HESSEL_PREFIX)
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    parity("z_t of cut and prefixed captions, relative", "transformers", difference, 1e-4)


def published_cmmd(picture, size):
    """CMMD's preparation: square crop, Pillow's bicubic, [0, 1], jax's resize, CLIP's scaling."""
    opened = Image.fromarray(picture)
    shorter = min(opened.size)
    left, top = ((side - shorter) // 2 for side in opened.size)
    square = opened.crop((left, top, left + shorter, top + shorter))
    values = np.asarray(square.resize((size, size), Image.BICUBIC)).astype(np.float32) / 255
    values = jax.image.resize(jnp.asarray(values), (size, size, 3), "bicubic")
    return np.asarray((values - np.float32(clip.IMAGE_MEAN)) / np.float32(clip.IMAGE_STD))


def published_openai(picture, size):
    """torchvision's Resize and CenterCrop, ToTensor and Normalize on a PIL picture."""
    opened = Image.fromarray(picture)
    width, height = opened.size
    if width <= height:
        opened = opened.resize((size, int(size * height / width)), Image.BICUBIC)
    else:
        opened = opened.resize((int(size * width / height), size), Image.BICUBIC)
    left, top = (round((side - size) / 2.0) for side in opened.size)
    values = np.asarray(opened.crop((left, top, left + size, top + size)), np.float32) / 255
    return (values - np.float32(clip.IMAGE_MEAN)) / np.float32(clip.IMAGE_STD)


PUBLISHED = {"cmmd": published_cmmd, "openai": published_openai}


@pytest.mark.parametrize("name", PUBLISHED)
def test_other_preparations(parity, theirs, bundled, pictures, name):
    """z_i after the published preparation, through transformers' CLIP."""
    model, _, _ = theirs
    prepared = np.stack([PUBLISHED[name](picture, SIDE) for picture in arrays(pictures)])
    with torch.no_grad():
        values = torch.from_numpy(prepared).permute(0, 3, 1, 2).contiguous()
        theirs = model.get_image_features(values).numpy()
    ours = embed(embedders.clip_extractor(bundled, name), pictures)
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    parity(f"z_i as {name} prepares pictures, relative", "published formula", difference, 1e-4)
