"""Train an upsampler: `unclip train --config configs/upsampler.py:emoji-64 --workdir runs/up64`.

Presets: emoji-64 (16 to 64, also called emoji), emoji-256 (64 to 256), karlo (64 to 256, fine-tunes
--config.init_from=BUNDLE), paper-256 (64 to 256, also called paper), paper-1024 (256 to 1024).
Arguments: theme=food, net=first|last (which of Karlo's two), scratch (karlo from random weights),
runlocal.
"""

from ml_collections import ConfigDict

from configs import common, known
from unclip import errors
from unclip.models import upsampler

ALIASES = {"emoji": "emoji-64", "paper": "paper-256"}
NETS = {"first": "upsampler_0", "last": "upsampler_0_last"}
SIZES = {"emoji-64": 64, "emoji-256": 256, "karlo": 256, "paper-256": 256, "paper-1024": 1024}


def get_config(arg=None):
    args = common.parse_arg(arg, "emoji", theme="", net="first", scratch=False, runlocal=False)
    if args.net not in NETS:
        raise errors.unknown("net", args.net, NETS)
    if args.net == "last" and args.preset != "karlo":
        raise errors.ConfigError(f"net=last is one of karlo's two nets, not of {args.preset!r}")
    name = ALIASES.get(args.preset, args.preset)
    config = common.base("upsampler", args)
    config.known = known.of("upsampler", name)
    common.theme(config, args.theme)
    config.arch = common.arch(upsampler.Upsampler, name, upsampler.PRESETS, "upsampler")
    size = SIZES[name]
    second = name in ("emoji-256", "paper-1024")
    common.optimiser(config, "upsampler_1024" if second else "upsampler_256")
    config.task = ConfigDict(
        {
            "image_size": size,
            "factor": 4,
            "crop": size // 4,  # Table 3: crop fraction .25
            "noise_schedule": "linear" if name == "paper-1024" else "cosine",
            "parametrisation": "eps",
            "variance": "fixed_small",
            "vlb_weight": 1.0,
            "timesteps": "uniform",  # | loss_aware
            "min_snr": 0.0,
            "t_below": 1 if args.net == "last" else 0,  # timesteps trained on; 0 = all
            "noise_level": 0.0,  # of the small picture, at most; 0 = off
        }
    )
    config.task.draw = {
        "steps": 15 if second else 27,
        # Of the paper's 27 steps nothing is said but that GLIDE, the decoder's parent, has a
        # spacing of so many for its upsampler.
        "spacing": "fast27" if name == "paper-256" else "even",
        "sampler": "ddim",
        "eta": 0.0,
        "noise_level": 0.0,
    }
    config.input.degradation = "bsr" if second else "blur"
    config.input.degradation_probability = 1.0  # section 2.1: the conditioning images
    if name.startswith("emoji"):
        # Ours: half of them stay clean, as the decoder's are, which a network trained on degraded
        # ones alone sharpens too much.
        config.input.degradation_probability = 0.5
        config.task.crop = size // 2 if size == 64 else size // 4
        # The network sees 2x2 or 4x4 patches: too narrow to carry noise, wide enough for x_0.
        config.task.parametrisation = "x0"
        config.task.draw.steps = 8
        config.batch_size, config.total_steps = 16, 3000
        config.optim.schedule = "cosine"
        config.optim.learning_rate, config.optim.warmup_steps = 1e-3, 100
        config.ema = 0.995
    else:
        common.scale(config, batch_size=512 if second else 1024, total_steps=1_000_000)
        config.eval_examples = 2048
    if name == "karlo":
        config.task.draw.steps, config.task.draw.sampler = 7, "ddpm"
        config.init_part = NETS[args.net]
        if not args.scratch:
            common.finetune(config, learning_rate=1e-5, batch_size=256, total_steps=20_000)
    if args.runlocal:
        small = common.arch(upsampler.Upsampler, "emoji-64", upsampler.PRESETS, "upsampler")
        common.runlocal(config, small)
        config.task.image_size, config.task.crop = 64, 32
    return config
