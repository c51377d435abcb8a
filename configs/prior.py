"""Train a prior: `unclip train --config configs/prior.py:emoji --config.clip=runs/clip ...`.

Presets: emoji, karlo (diffusion; fine-tunes --config.init_from=BUNDLE), paper. Arguments:
kind=diffusion|ar, theme=food, scratch (karlo from random weights), runlocal.
The values of `paper` are those of Table 3.
"""

from ml_collections import ConfigDict

from configs import common, known
from unclip import errors
from unclip.models import prior, prior_ar

KINDS = {
    "diffusion": (prior.DiffusionPrior, prior.PRESETS),
    "ar": (prior_ar.ARPrior, prior_ar.PRESETS),
}
CLIP_OF = {"emoji": "emoji", "karlo": "ViT-L/14", "paper": "ViT-H/16"}


def get_config(arg=None):
    args = common.parse_arg(arg, "emoji", kind="diffusion", theme="", scratch=False, runlocal=False)
    if args.kind not in KINDS:
        raise errors.unknown("prior kind", args.kind, KINDS)
    module, presets = KINDS[args.kind]
    config = common.base("prior", args)
    config.known = known.of("prior", args.preset + (",kind=ar" if args.kind == "ar" else ""))
    common.theme(config, args.theme)
    config.arch = common.arch(module, args.preset, presets, f"{args.kind} prior")
    config.clip = ""  # RUN or BUNDLE of the frozen CLIP; "random" for benchmarks
    config.clip_preset = CLIP_OF[args.preset]
    config.statistics_examples = 1_000_000  # pictures that whitening and PCA are measured on
    config.stored_embeddings = False  # embed every picture once before training
    config.embeddings = ""  # folder of `unclip embed`: z_i of the training pictures, not computed
    common.optimiser(config, "prior_ar" if args.kind == "ar" else "prior")
    if args.kind == "ar":
        config.task = ConfigDict({"kind": "ar", "text_drop": 0.1, "range_sigmas": 4.0})
        # Two candidates are the paper's for the diffusion prior alone.
        config.task.draw = {"guidance": 1.0, "temperature": 1.0, "top_p": 1.0, "candidates": 1}
    else:
        config.task = ConfigDict(
            {
                "kind": "diffusion",
                "noise_schedule": "cosine",
                "embedding": "whiten",
                "scale": 17.2,
                "clamp": 10.0,
                # Table 3 samples with the analytic variance, measured when training ends.
                "variance": "analytic" if args.preset == "paper" else "fixed_small",
                "timesteps": "uniform",  # | loss_aware
                "text_drop": 0.2 if args.preset == "karlo" else 0.1,
            }
        )
        config.task.draw = {
            "steps": 64 if args.preset == "paper" else 25,
            "spacing": "even",
            "guidance": 4.0,
            **common.GUIDANCE,
            "sampler": "ddpm",
            "eta": 0.0,
            "candidates": 2,
        }
    if args.preset == "emoji":
        config.batch_size, config.total_steps = 64, 3000
        config.optim.schedule = "cosine"
        config.optim.learning_rate, config.optim.warmup_steps = 5e-4, 100
        config.ema = 0.995
        config.statistics_examples = 4096
        if args.kind == "diffusion":
            # The few pictures are memorised: stronger guidance only pushes z_i beyond them.
            config.task.draw.guidance = 1.5
    else:
        common.scale(config, batch_size=4096, total_steps=600_000)
        if args.kind == "ar":
            config.total_steps = 1_000_000
    if args.preset == "karlo":
        config.task.draw.candidates = 1
        if not args.scratch:
            common.finetune(config, learning_rate=1e-5, batch_size=1024, total_steps=20_000)
    if args.runlocal:
        common.runlocal(config, common.arch(module, "emoji", presets, "prior"))
        config.clip_preset = "emoji"
        config.statistics_examples = 64
    return config
