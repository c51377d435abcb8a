"""Train a decoder: `unclip train --config configs/decoder.py:emoji --config.clip=runs/clip ...`.

Presets: emoji (16x16), karlo, paper (64x64, Table 3), glide (text only).
Arguments: theme=food, runlocal.
"""

from ml_collections import ConfigDict

from configs import common
from unclip.models import decoder

CLIP_OF = {"emoji": "emoji", "karlo": "ViT-L/14", "paper": "ViT-H/16", "glide": "ViT-L/14"}


def get_config(arg=None):
    args = common.parse_arg(arg, "emoji", theme="", runlocal=False)
    config = common.base("decoder", args)
    common.theme(config, args.theme)
    config.arch = common.arch(decoder.Decoder, args.preset, decoder.PRESETS, "decoder")
    config.clip = ""  # RUN or BUNDLE of the frozen CLIP; "random" for benchmarks
    config.clip_preset = CLIP_OF[args.preset]
    config.stored_embeddings = False  # embed every picture once before training
    common.optimiser(config, "decoder")
    config.task = ConfigDict(
        {
            "image_size": 64,
            "noise": "cosine",
            "parametrisation": "eps",
            "variance": "learned_range",
            "vlb_weight": 1.0,
            "min_snr": 0.0,  # 0 = off
            "z_scale": 0.0,  # 0 = z_i as CLIP gives it
            "image_drop": 1.0 if args.preset == "glide" else 0.1,
            "text_drop": 0.2 if args.preset == "glide" else 0.5,
        }
    )
    config.task.draw = {
        "steps": 250 if args.preset == "paper" else 25,
        "guidance": {"karlo": 8.0, "paper": 1.25, "glide": 3.0, "emoji": 1.5}[args.preset],
        "sampler": "ddpm",
        "eta": 0.0,
        "threshold": "static",  # clamp x_0 to [-1, 1]; "dynamic" is Imagen's
    }
    if args.preset == "emoji":
        config.task.image_size = 16
        # v needs far fewer steps than eps for clean pictures; its variance head stays a side show.
        config.task.parametrisation, config.task.vlb_weight = "v", 0.1
        config.batch_size, config.total_steps = 32, 4000
        config.optim.schedule = "cosine"
        config.optim.learning_rate, config.optim.warmup_steps = 2e-3, 100
        config.ema = 0.995
    else:
        common.scale(config, batch_size=2048, total_steps=800_000)
        config.eval_examples = 4096
    if args.runlocal:
        common.runlocal(config, common.arch(decoder.Decoder, "emoji", decoder.PRESETS, "decoder"))
        config.clip_preset, config.task.image_size = "emoji", 16
    return config
