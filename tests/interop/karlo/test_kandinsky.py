"""Kandinsky 2.2's prior: diffusers' folder into parts that fit and draw as the pipeline does."""

import json

import numpy as np
import pytest

from unclip import UnCLIP
from unclip.cascade import bundle, runs
from unclip.errors import ConfigError, DataError
from unclip.files import tensors
from unclip.interop import clip, formats, layout
from unclip.interop.karlo.config import prior_arch
from unclip.interop.karlo.networks import prior_rules, prior_shapes
from unclip.models.clip import IMAGE_MEAN, IMAGE_STD
from unclip.runtime.sharding import nest, tree_paths

pytestmark = pytest.mark.usefixtures("quick_compiles")

DIM, SIZE = 8, 8
COMMON = dict(
    num_hidden_layers=1, num_attention_heads=2, projection_dim=DIM, hidden_act="gelu"
)  # fmt: skip
TEXT = COMMON | dict(hidden_size=DIM, intermediate_size=4 * DIM, model_type="clip_text_model")
VISION = COMMON | dict(
    hidden_size=12, intermediate_size=30, image_size=SIZE, patch_size=4,
    model_type="clip_vision_model",
)  # fmt: skip
PRIOR = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "embedding_dim": DIM}
SCHEDULE = dict(
    _class_name="UnCLIPScheduler", beta_schedule="squaredcos_cap_v2", clip_sample=True,
    clip_sample_range=10.0, num_train_timesteps=1000, prediction_type="sample",
    variance_type="fixed_small_log",
)  # fmt: skip


def filled(rules, shapes, seed):
    """Tensors under their names, shaped as our architecture asks."""
    rng = np.random.default_rng(seed)
    leaves = tree_paths(shapes)
    make = lambda shape: (0.1 * rng.normal(size=shape)).astype(np.float32)
    wanted = [rule for rule in rules if rule.ours in leaves]
    return layout.give(wanted, nest({r.ours: make(leaves[r.ours].shape) for r in wanted}))


@pytest.fixture
def folder(tmp_path):
    """A folder as KandinskyV22PriorPipeline saves it."""
    root = tmp_path / "kandinsky"
    (root / "image_processor").mkdir(parents=True)
    write = lambda place, content: (root / place).write_text(json.dumps(content))
    write("model_index.json", {"_class_name": "KandinskyV22PriorPipeline"})
    pictures = dict(crop_size={"height": SIZE, "width": SIZE}, image_mean=IMAGE_MEAN)
    write("image_processor/preprocessor_config.json", pictures | {"image_std": IMAGE_STD})
    for name, config in (("text_encoder", TEXT), ("image_encoder", VISION)):
        towers = {"text_config": None, "vision_config": None}
        towers["text_config" if config is TEXT else "vision_config"] = config
        arch = clip.hf_arch(**towers, embed_dim=DIM)
        shapes = clip.shapes(arch)
        shapes.pop("logit_scale")
        tensors.write(root / name / "model.safetensors", filled(clip.hf_rules(arch), shapes, 0))
        write(f"{name}/config.json", config)
    arch = prior_arch(PRIOR, "prior")
    state = filled(prior_rules(1), prior_shapes(arch), 1)
    tensors.write(root / "prior" / "diffusion_pytorch_model.safetensors", state)
    write("prior/config.json", PRIOR | {"_class_name": "PriorTransformer"})
    (root / "scheduler").mkdir()
    write("scheduler/scheduler_config.json", SCHEDULE)
    return root


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_parts_fit_and_draw(folder, tmp_path):
    parts = formats.read("kandinsky2_2-prior", [folder])
    assert list(parts) == ["clip", "prior"]
    runs.check_fit(parts)
    part = parts["prior"]
    assert part.settings["clamp"] == 10.0 and part.settings["embedding"] == "whiten"
    draw = {k: part.settings["draw"][k] for k in ("steps", "guidance", "sampler", "candidates")}
    assert draw == {"steps": 25, "guidance": 4.0, "sampler": "ddpm", "candidates": 1}
    assert parts["clip"].arch["activation"] == "gelu"
    assert parts["clip"].arch["vision_mlp_width"] == 30
    stored = tensors.read(folder / "prior" / "diffusion_pytorch_model.safetensors")[0]
    for ours, theirs in (("mean", "clip_mean"), ("std", "clip_std")):
        np.testing.assert_array_equal(part.extra[ours].read(), stored[theirs].read()[0])
    bundle.write(tmp_path / "bundle", parts)
    records = bundle.describe(tmp_path / "bundle")["parts"]
    assert records["prior"]["trained_with"] == {"clip": records["clip"]["space"]}
    assert records["clip"]["space"] == bundle.tree_hash(parts["clip"].params)
    model = UnCLIP.load(tmp_path / "bundle", batch_size=1)
    drawn = model.draw_prior(["a red fox"], [3], steps=2)
    assert drawn.shape == (1, DIM) and np.isfinite(drawn).all()
    zeros = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    assert model.embed_image(zeros).shape == (1, DIM)


def test_what_is_refused(folder):
    read = lambda *paths: formats.read("kandinsky2_2-prior", list(paths))
    with pytest.raises(ConfigError, match="given 2 paths"):
        read(folder, folder)
    with pytest.raises(ConfigError, match="--preset"):
        formats.read("kandinsky2_2-prior", [folder], "ViT-bigG/14")
    pictures = folder / "image_processor" / "preprocessor_config.json"
    change(pictures, image_mean=[0.5, 0.5, 0.5])
    with pytest.raises(ConfigError, match="image_mean is"):
        read(folder)
    change(pictures, image_mean=IMAGE_MEAN, crop_size=SIZE)  # as older files say it
    read(folder)
    schedule = folder / "scheduler" / "scheduler_config.json"
    change(schedule, prediction_type="epsilon")
    with pytest.raises(ConfigError, match="prediction_type"):
        read(folder)
    change(schedule, prediction_type="sample", clip_sample_range=5.0)
    assert read(folder)["prior"].settings["clamp"] == 5.0
    change(folder / "text_encoder" / "config.json", projection_dim=7)
    with pytest.raises(ConfigError, match="a projection to 8"):
        read(folder)
    change(folder / "model_index.json", _class_name="KandinskyV22Pipeline")
    with pytest.raises(ConfigError, match="is a KandinskyV22Pipeline; expected KandinskyV22Prior"):
        read(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(DataError, match=r"model_index\.json"):
        read(folder)
