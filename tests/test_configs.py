"""Every preset of every stage builds; arguments are strict; every config runs on a laptop."""

import importlib
import pathlib
import re

import jax
import pytest

from unclip import errors
from unclip.input.decode import transforms
from unclip.models import clip as clip_model
from unclip.training.plan import make_plan

PRESETS = {
    "clip": [
        "emoji",
        "ViT-B/32",
        "ViT-B/16",
        "ViT-L/14",
        "ViT-L/14@336",
        "ViT-H/14",
        "ViT-bigG/14",
        "ViT-H/16",
        "paper",
        "emoji,loss=sigmoid",
        "karlo",
        "karlo,scratch",
    ],
    "prior": ["emoji", "karlo", "karlo,scratch", "paper", "emoji,kind=ar", "paper,kind=ar"],
    "decoder": ["emoji", "karlo", "karlo,scratch", "paper", "glide", "imagen"],
    "upsampler": [
        "emoji",
        "emoji-64",
        "emoji-256",
        "karlo",
        "karlo,scratch",
        "karlo,net=last",
        "paper",
        "paper-256",
        "paper-1024",
    ],
}
EVERY = [(name, arg) for name, args in PRESETS.items() for arg in args]
# Tracing a large model takes seconds: of the published ones, one a stage in `make test`.
QUICK = ("emoji",)
TRACED = [
    pytest.param(name, arg, marks=[pytest.mark.slow] * (not arg.startswith(QUICK)))
    for name, arg in EVERY
]
ROOT = pathlib.Path(__file__).parents[1]


def get(name, arg=None):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def planned(config):
    """(task, abstract parameters) with nothing allocated."""
    config.follow_init = False
    plan = make_plan(config, shapes_only=True)
    plan.check()
    rate = float(plan.learning_rate(config.total_steps // 2))
    assert 0 < rate <= 1.0001 * config.optim.learning_rate
    return plan.task, plan.params


@pytest.mark.parametrize(("name", "arg"), TRACED)
def test_every_preset_builds(name, arg, tiny_config):
    config = get(name, arg)
    assert config.stage == name and config.preset == arg.split(",")[0]
    config.arch.fold = True  # quicker to trace, the same model
    task, params = planned(config)
    assert jax.tree.leaves(params)
    # The parts fit: what the input delivers is what the task asks for.
    for use in ("train", "held_out", "sample"):
        assert isinstance(
            task.transform(use, config.input), transforms.ImageText | transforms.Upsampling
        )
    if name in ("prior", "decoder"):
        clip = clip_model.PRESETS[config.clip_preset]
        if name == "prior":
            assert config.arch.embed_dim == clip["embed_dim"]
            own = config.arch.get("text_layers")  # a text encoder of its own
            assert own or config.arch.get("text_width") in (None, clip["text_width"])
    if name == "upsampler":
        assert config.task.image_size % config.task.factor == 0
        assert config.task.crop % config.task.factor == 0


@pytest.mark.parametrize("arg", PRESETS["upsampler"])
def test_published_upsamplers_degrade_every_small_picture(arg):
    """Section 2.1 of the paper; the demo's half of them is its own."""
    config = get("upsampler", arg)
    second = arg in ("emoji-256", "paper-1024")
    assert config.input.degradation == ("bsr" if second else "blur")
    assert config.input.degradation_probability == (0.5 if arg.startswith("emoji") else 1.0)
    assert config.task.noise_level == 0 and not config.arch.noise_level


@pytest.mark.parametrize(("name", "arg"), EVERY)
def test_every_config_has_a_local_form(name, arg, tiny_config):
    config = get(name, f"{arg},runlocal")
    assert config.total_steps == 2 and config.batch_size == 8 and config.accumulate == 1
    kind = [word for word in arg.split(",") if word.startswith(("kind", "loss"))]
    small = get(name, ",".join(["emoji", *kind, "runlocal"]))
    if arg in ("glide", "imagen"):  # which stay without z_i, and their text encoder with them
        assert not config.arch.use_z_i and not config.arch.use_z_t
        assert bool(config.arch.text_layers) == (arg == "glide")
        assert config.arch.pool_text == (config.task.text_encoder == "t5") == (arg == "imagen")
    else:
        assert config.arch == small.arch
    assert not config.follow_init
    if arg.startswith("emoji,") or arg == "emoji":
        _, params = planned(config)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) < 10e6


def test_paper_scale_is_table_3(tiny_config):
    """Iterations, batch, learning rate, Adam and EMA of the published table."""
    rows = {
        ("prior", "paper,kind=ar"): (1_000_000, 4096, 1.6e-4, 4e-2, 0.91, 1e-10, 0.999),
        ("prior", "paper"): (600_000, 4096, 1.1e-4, 6e-2, 0.96, 1e-6, 0.9999),
        ("decoder", "paper"): (800_000, 2048, 1.2e-4, 0.0, 0.999, 1e-8, 0.9999),
        ("upsampler", "paper-256"): (1_000_000, 1024, 1.2e-4, 0.0, 0.999, 1e-8, 0.9999),
        ("upsampler", "paper-1024"): (1_000_000, 512, 1e-4, 0.0, 0.999, 1e-8, 0.9999),
    }
    for (name, arg), want in rows.items():
        c = get(name, arg)
        o = c.optim
        got = (c.total_steps, c.batch_size, o.learning_rate, o.weight_decay, o.b2, o.eps, c.ema)
        assert got == want, (name, arg)


def test_the_default_is_emoji(tiny_config):
    for name in PRESETS:
        assert get(name).preset == "emoji"
        assert get(name) == get(name, "emoji")
    assert get("decoder", "theme=food").input.where.subgroup


@pytest.mark.parametrize(
    ("name", "arg", "said"),
    [
        ("clip", "ViT-L/15", r"'ViT-L/15': did you mean 'ViT-L/14'"),
        ("prior", "carlo", r"'carlo': did you mean 'karlo'"),
        ("decoder", "papper", r"'papper': did you mean 'paper'"),
        ("upsampler", "emoji-46", r"'emoji-46': did you mean 'emoji-64'"),
        ("prior", "emoji,kind=arr", r"prior kind 'arr': did you mean 'ar'"),
        ("clip", "emoji,themes=food", r"config argument 'themes': did you mean 'theme'"),
        ("clip", "emoji,theme=foot", r"theme 'foot': did you mean 'food'"),
        ("clip", "emoji,paper", r"config argument 'paper'"),
        ("clip", "emoji,runlocal=maybe", r"runlocal=maybe: expected bool"),
        ("decoder", "emoji,kind=ar", r"config argument 'kind'"),
    ],
)
def test_slips_are_named(name, arg, said, tiny_config):
    with pytest.raises(errors.ConfigError, match=said):
        get(name, arg)


def test_arguments_keep_their_type(tiny_config):
    common = importlib.import_module("configs.common")
    args = common.parse_arg("karlo,flag,count=3,text=1e3", "emoji", flag=False, count=1, text="")
    assert args.to_dict() == {"preset": "karlo", "flag": True, "count": 3, "text": "1e3"}
    assert common.parse_arg("flag=False", "emoji", flag=True).flag is False
    assert common.parse_arg(None, "emoji").to_dict() == {"preset": "emoji"}
    for wrong in ("count=3.5", "count=x", "count=__import__('os')"):
        with pytest.raises(errors.ConfigError, match="expected int"):
            common.parse_arg(wrong, "emoji", count=1)


def known():
    return importlib.import_module("configs.known").KNOWN


def test_what_is_known_belongs_to_presets():
    """Every entry is found under a preset's config, has its source, and is not that of a toy."""
    for name, entries in known().items():
        for arg, entry in entries.items():
            assert arg in PRESETS[name] and not arg.startswith("emoji")
            assert get(name, arg).known.to_dict() == entry
            assert get(name, f"{arg},runlocal").known.to_dict() == {}
            assert entry and set(entry) <= {"published", "seconds_per_step"}
            for row in entry.get("published", ()):
                assert set(row) == {"what", "value", "source"} and row["source"]
            for row in entry.get("seconds_per_step", ()):
                assert set(row) == {"hardware", "batch", "seconds", "source"} and row["source"]
    assert get("clip", "paper").known == get("clip", "ViT-H/16").known
    assert get("upsampler", "paper").known == get("upsampler", "paper-256").known
    assert get("clip", "emoji").known.to_dict() == {}


def test_known_seconds_are_those_of_the_documentation():
    rows = {
        "CLIP ViT-H/16": ("clip", "ViT-H/16"),
        "diffusion prior": ("prior", "paper"),
        "AR prior": ("prior", "paper,kind=ar"),
        "decoder 64": ("decoder", "paper"),
        "upsampler 256": ("upsampler", "paper-256"),
        "upsampler 1024": ("upsampler", "paper-1024"),
    }
    shown = {place: [] for place in rows.values()}
    for line in (ROOT / "docs" / "compile.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in rows and re.fullmatch(r"[\d.]+", cells[8]):
            chip, batch = cells[1].partition(":")[0], int(cells[2].split()[0].replace(",", ""))
            shown[rows[cells[0]]].append((f"64 x TPU {chip}", batch, float(cells[8])))
    assert sum(map(len, shown.values())) >= 9
    for (name, arg), expected in shown.items():
        found = known()[name].get(arg, {}).get("seconds_per_step", ())
        found = [(row["hardware"].split(" (")[0], row["batch"], row["seconds"]) for row in found]
        assert found == expected
