"""Train a decoder: `unclip train --config configs/decoder.py:emoji --config.clip=runs/clip ...`.

Presets: emoji (16x16), karlo (fine-tunes --config.init_from=BUNDLE), paper (64x64, Table 3), and
two that read only the caption: glide (a text transformer of its own), imagen (a frozen T5,
--config.t5=BUNDLE). Arguments: theme=food, scratch (karlo from random weights), runlocal.
"""

from ml_collections import ConfigDict

from configs import common, known
from unclip.models import decoder

CLIP_OF = {"emoji": "emoji", "paper": "ViT-H/16"}
GUIDANCE = {"karlo": 8.0, "paper": 1.25, "glide": 3.0, "imagen": 7.5, "emoji": 1.5}
TEXT_DROP = {"glide": 0.2, "imagen": 0.1}
# Settings with which a small decoder reads captions as the large one does.
SMALL = {
    "glide": dict(
        use_z_i=False,
        use_z_t=False,
        learned_null_text=False,
        text_layers=1,
        text_heads=4,
        text_context=32,
    ),
    "imagen": dict(use_z_i=False, use_z_t=False, pool_text=True, text_context=32),
}


def get_config(arg=None):
    args = common.parse_arg(arg, "emoji", theme="", scratch=False, runlocal=False)
    config = common.base("decoder", args)
    config.known = known.of("decoder", args.preset)
    common.theme(config, args.theme)
    config.arch = common.arch(decoder.Decoder, args.preset, decoder.PRESETS, "decoder")
    config.clip = ""  # RUN or BUNDLE of the frozen CLIP; "random" for benchmarks
    config.clip_preset = CLIP_OF.get(args.preset, "ViT-L/14")
    config.t5 = ""  # BUNDLE of the frozen T5, or a decoder's RUN; "random" for benchmarks
    config.t5_preset = "t5-v1_1-xxl"
    config.metric_bits_examples = 0  # held-out pictures whose whole bound is measured: 1,000 calls
    config.stored_embeddings = False  # embed every picture once before training
    config.embeddings = ""  # folder of `unclip embed`: z_i of the training pictures, not computed
    common.optimiser(config, "decoder")
    config.task = ConfigDict(
        {
            "image_size": 64,
            "text_encoder": "t5" if args.preset == "imagen" else "clip",
            "noise_schedule": "cosine",
            "parametrisation": "eps",
            "variance": "learned_range",
            "vlb_weight": 1.0,
            "timesteps": "uniform",  # | loss_aware
            "min_snr": 0.0,  # 0 = off
            "embedding": "image",  # "text": trained on z_t in place of z_i, drawn without a prior
            "z_scale": 0.0,  # 0 = z_i as CLIP gives it
            "image_drop": 0.1,
            "text_drop": TEXT_DROP.get(args.preset, 0.5),
        }
    )
    config.task.draw = {
        "steps": 250 if args.preset in ("paper", "imagen") else 25,
        # | trailing | log-snr | karras | so many in each section, as "10,10,3,2,2"
        "spacing": "even",
        "guidance": GUIDANCE[args.preset],
        **common.GUIDANCE,
        "sampler": "ddpm",
        "eta": 0.0,
        # "static" clamps x_0 to [-1, 1]; "dynamic" is Imagen's, percentile 99.5
        "threshold": "dynamic" if args.preset == "imagen" else "static",
    }
    if args.preset == "emoji":
        config.task.image_size = 16
        # v needs far fewer steps than eps for clean pictures; its learned variance hardly matters.
        config.task.parametrisation, config.task.vlb_weight = "v", 0.1
        config.batch_size, config.total_steps = 32, 4000
        config.optim.schedule = "cosine"
        config.optim.learning_rate, config.optim.warmup_steps = 2e-3, 100
        config.ema = 0.995
    else:
        common.scale(config, batch_size=2048, total_steps=800_000)
        config.eval_examples = 4096
        if args.preset == "imagen":
            config.total_steps = 2_500_000
        if args.preset == "karlo" and not args.scratch:
            common.finetune(config, learning_rate=1e-5, batch_size=512, total_steps=20_000)
    if args.runlocal:
        small = common.arch(decoder.Decoder, "emoji", decoder.PRESETS, "decoder")
        small.update(SMALL.get(args.preset, {}))
        common.runlocal(config, small)
        config.clip_preset, config.task.image_size = "emoji", 16
        config.t5_preset = "emoji"
    return config
