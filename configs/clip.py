"""Train CLIP: `unclip train --config configs/clip.py:emoji --workdir runs/clip`.

Presets: emoji (minutes on a CPU) and the published shapes ViT-B/32, ViT-B/16, ViT-L/14,
ViT-L/14@336, ViT-H/14, ViT-bigG/14 and the paper's ViT-H/16 (also called `paper`). `karlo` is
ViT-L/14 fine-tuned: --config.init_from=BUNDLE, a converted one.
Arguments: loss=softmax|sigmoid, theme=food, scratch (karlo from random weights), runlocal.
"""

from ml_collections import ConfigDict

from configs import common, known
from unclip.models import clip


def get_config(arg=None):
    args = common.parse_arg(arg, "emoji", loss="softmax", theme="", scratch=False, runlocal=False)
    name = {"paper": "ViT-H/16", "karlo": "ViT-L/14"}.get(args.preset, args.preset)
    config = common.base("clip", args)
    config.known = known.of("clip", name)
    common.theme(config, args.theme)
    config.arch = common.arch(clip.CLIP, name, clip.PRESETS, "CLIP")
    config.task = ConfigDict({"loss": args.loss})
    config.input.crop = "random"  # CLIP's only augmentation (arXiv 2103.00020, section 2.5)
    if args.loss == "sigmoid":
        config.arch.logit_bias = True
    common.optimiser(config, "clip")
    if name == "emoji":
        config.batch_size, config.total_steps = 64, 3000
        config.optim.learning_rate, config.optim.warmup_steps = 1e-3, 100
        config.optim.sam_rho = 0.0
        config.ema = 0.99
    else:
        # Appendix C gives the learning rate, SAM and its per-replica batch of 64; the batch is
        # that of the public CLIP models.
        common.scale(config, batch_size=32_768, total_steps=400_000)
        config.arch.remat = "nothing_saveable"  # 512 rows a chip, and SAM's copies of parameters
        config.optim.sam_rows = 64
        config.ema = 0.999
    if args.preset == "karlo" and not args.scratch:
        common.finetune(config, learning_rate=1e-6, batch_size=4096, total_steps=20_000)
    if args.runlocal:
        common.runlocal(config, common.arch(clip.CLIP, "emoji", clip.PRESETS, "CLIP"))
    return config
