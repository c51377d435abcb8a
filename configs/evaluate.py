"""Draw and score a sweep: `unclip evaluate --config configs/evaluate.py:emoji --config.model=DIR`.

Presets: emoji (held-out captions), scenes (withheld compositions), coco (MS-COCO 2014, 30k
captions), ablation (sections 5.1 and 5.2 of the paper: what the decoder is given, which prior).
Arguments: protocol=NAME, models=NAME+NAME, runlocal. docs/evaluate.md explains every field.
"""

import importlib
import inspect
import typing

from ml_collections import ConfigDict

from configs import common
from unclip import errors, protocols

GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0)  # section 5.3 sweeps it; the emoji decoder's own is among them
# Preset -> protocol, and the settings in which it differs from that protocol's own.
PROTOCOLS = {
    "emoji": ("emoji-held-out", {}),
    "scenes": ("scenes-withheld", {"count": 200}),
    "coco": ("coco2014val-30k", {"count": 30_000}),
    "ablation": ("scenes", {"count": 400, "size": 16, "sizes": ("large", "huge")}),
}
JUDGES = ("typographic", "reconstruction")  # protocols that draw from pictures and judge themselves
MODEL = {"model": "", "clip": "", "prior": "", "decoder": "", "upsamplers": (), "embed": ""}
# "?" is a part of its own that the user must name.
ABLATION = {
    "caption": {"embed": "none"},  # our decoder, z_i dropped
    "text_only": {"embed": "none", "decoder": "?"},  # a decoder without z_i, as GLIDE
    "z_t": {"embed": "text"},  # our decoder, z_t in place of z_i
    "z_t_own": {"embed": "text", "decoder": "?"},  # a decoder trained on z_t
    "ar": {"embed": "prior", "prior": "?"},
    "diffusion": {"embed": "prior"},
}
# (statement, metric, model, "<" or ">", model): findings of section 5 of arXiv 2204.06125, to be
# compared with the best cell of each model. Its FIDs: 7.99 with the prior, 9.16 with a decoder
# trained on z_t, 16.55 with z_t in place of z_i.
CLAIMS = (
    ("z_i of a prior beats a decoder trained on z_t (5.1)", "fd-clip", "diffusion", "<", "z_t_own"),
    ("a decoder trained on z_t beats z_t in place of z_i (5.1)", "fd-clip", "z_t_own", "<", "z_t"),
    ("the caption alone is worst: z_t is better (5.1)", "fd-clip", "z_t", "<", "caption"),
    ("the caption alone is worst: a prior is better (5.1)", "fd-clip", "diffusion", "<", "caption"),
    ("the diffusion prior beats the AR prior (5.1)", "fd-clip", "diffusion", "<", "ar"),
    (
        "guidance costs less with z_i than with the caption alone (5.3)",
        "rise:fd-clip",
        "diffusion",
        "<",
        "text_only",
    ),
)


def protocol(name, settings):
    """A protocol's settings as a config; "" or a count of 0 leave a setting to the protocol."""
    kind, fields = name.partition(":")[0], {"name": name}
    if kind not in protocols.NAMES:
        raise errors.unknown("protocol", kind, protocols.NAMES)
    module, maker = protocols.NAMES[kind]
    maker = getattr(importlib.import_module(f"unclip.protocols.{module}"), maker)
    for parameter in inspect.signature(maker).parameters.values():
        empty = 0 if int in typing.get_args(parameter.annotation) else ""
        fields[parameter.name] = empty if parameter.default is None else parameter.default
    return ConfigDict(fields | settings)


def get_config(arg=None):
    args = common.parse_arg(arg, "emoji", protocol="", models="", runlocal=False)
    if args.preset not in PROTOCOLS:
        raise errors.unknown("evaluate preset", args.preset, PROTOCOLS)
    config = ConfigDict({"stage": "evaluate", "preset": args.preset})
    config.model = ""  # BUNDLE
    config.clip = ""  # RUN or BUNDLE, in place of the bundle's part; so the next three
    config.prior = ""
    config.decoder = ""
    config.upsamplers = ()
    config.models = ConfigDict()  # name -> the five fields above where they differ, and embed
    config.allow_mixed_spaces = False  # draw with stages that were not trained with one another
    config.step_of = "decoder"  # the part whose checkpoints the axis `step` counts
    config.protocol = protocol(*((args.protocol, {}) if args.protocol else PROTOCOLS[args.preset]))
    kind = args.protocol.partition(":")[0]
    config.metrics = ("fd-clip", "clip_cosine", "r_precision")
    config.inception = ""  # FILE or BUNDLE
    config.clip_for_scores = ""  # BUNDLE or RUN; "" = the first model's own CLIP
    config.dinov2 = ""  # FILE or BUNDLE
    config.reference = ""  # statistics .npz in place of the protocol's real pictures
    config.measure_seed = 0
    config.candidates = 100  # captions that r_precision chooses from
    config.bootstrap = 0  # resamples of a confidence interval; 0 = none
    config.sweep = ConfigDict(
        {
            "model": (),  # names in `models`; () = all of them
            "step": (),
            "weights": ("ema",),
            "embed": (),
            "prior_steps": (),
            "prior_guidance": (),
            "candidates": (),
            "temperature": (),
            "sampler": (),
            "eta": (),
            "steps": (),
            "guidance": GUIDANCE,
            "seed": (0,),
        }
    )
    config.cells = ()  # dicts {axis: value}: cells beside the product
    config.samples = 1  # pictures per caption
    config.stages = 0  # how many of decoder and upsamplers run; 0 = all
    config.batch_size = 64  # pictures on this process's devices at once
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})  # of this process's devices
    config.keep_pictures = "grid"  # all | grid | none
    config.show = 8  # captions whose pictures the report shows
    config.claims = ()  # (statement, metric, model, "<" or ">", model)
    config.compilation_cache = ""  # folder of its own; "" = that of all verbs
    if kind in protocols.WITH_FILE:  # no real pictures; judged elsewhere
        config.metrics, config.keep_pictures = ("clip_cosine",), "all"
    elif kind in JUDGES:
        config.metrics = ()
    elif args.preset == "coco":
        config.metrics = ("fid", "clip_score", "fd-clip")
        config.keep_pictures = "all"
    if args.preset == "ablation":
        config.models = ConfigDict({name: MODEL | own for name, own in ABLATION.items()})
        config.metrics = ("fd-clip", "clip_cosine", "r_precision", "prdc-clip")
        config.claims = CLAIMS
    if args.models:  # names of the user's own, to be filled in
        config.models = ConfigDict({name: dict(MODEL) for name in args.models.split("+")})
        config.claims = ()
    if args.runlocal:
        if "count" in config.protocol:
            config.protocol.count = 8
        config.sweep.guidance = (1.0, 3.0)
        config.sweep.steps, config.sweep.prior_steps = (2,), (2,)
        config.batch_size = 8
        config.mesh = ConfigDict({"data": 1, "fsdp": 1})
        config.show = 4
    return config
