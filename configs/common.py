"""What the stage configs share: argument strings, run-local shrinking, mesh and sharding presets.

`--config configs/decoder.py:emoji,runlocal` gives `get_config("emoji,runlocal")`: the first bare
word is the preset, further words are switches, `name=value` sets an argument.
"""

import ast
import dataclasses
import pathlib

from ml_collections import ConfigDict

from unclip import errors
from unclip.input import captions
from unclip.runtime import optim

DATA = pathlib.Path(__file__).parents[1] / "data"
EMOJI_TRAIN = str(DATA / "emoji" / "train-*.tar")
EMOJI_HELD_OUT = str(DATA / "emoji" / "held-out-*.tar")
# Of a diffusion's draw: guidance at every timestep, as fractions of them, not rescaled.
GUIDANCE = {"guidance_low": 0.0, "guidance_high": 1.0, "guidance_rescale": 0.0}


# Pictures of one kind, few enough for a CPU to memorise: `theme=food`.
THEMES = {
    "": {},
    "food": {"subgroup": ("fruit", "vegetables", "sweets & candy", "drink", "asian")},
    # Scenes of one object that is large enough to know at 16 pixels (data/emoji/README.md).
    "scenes": {"sizes": ("large", "huge")},
}


def parse_arg(arg: str | None, preset: str, **defaults) -> ConfigDict:
    """The argument string of a config file as {"preset": ..., **defaults}, strictly.

    Args:
      arg: e.g. "karlo,runlocal,kind=ar"; None or "" gives the defaults.
      preset: the preset when none is named.
      **defaults: the other arguments and their default values; the default's type is kept.

    Raises:
      ConfigError: an argument that is not in `defaults`, or a value of another type.
    """
    values = {"preset": preset, **defaults}
    for position, word in enumerate(filter(None, (arg or "").split(","))):
        name, equals, text = word.partition("=")
        if not equals and name in defaults and isinstance(defaults[name], bool):
            values[name] = True
        elif not equals and position == 0:
            values["preset"] = name
        elif not equals or name not in values:
            raise errors.unknown("config argument", name, values)
        elif isinstance(values[name], str):
            values[name] = text
        else:
            values[name] = _literal(name, text, type(values[name]))
    return ConfigDict(values)


def _literal(name: str, text: str, kind: type):
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if type(value) is not kind:
        raise errors.ConfigError(f"config argument {name}={text}: expected {kind.__name__}")
    return value


def arch(module: type, name: str, presets: dict, stage: str) -> ConfigDict:
    """A model preset as the config's `arch`: every field of the module, so that each can be set.

    Raises:
      ConfigError: no such preset.
    """
    if name not in presets:
        raise errors.unknown(f"{stage} preset", name, presets)
    fields = {
        field.name: field.default
        for field in dataclasses.fields(module)
        if field.name not in ("parent", "name") and field.default is not dataclasses.MISSING
    }
    fields |= {"dtype": "float32", "remat": ""} | presets[name]
    return ConfigDict(fields)


def base(stage: str, args: ConfigDict) -> ConfigDict:
    """Every field of a run, with the values that are common to all stages.

    Durations carry their unit in the suffix. `optim` follows `runtime.optim`.
    """
    config = ConfigDict()
    config.stage = stage
    config.preset = args.preset
    config.known = ConfigDict()  # published and expected figures of the preset, for the doctor
    config.seed = 0
    config.batch_size = 64
    config.total_steps = 1000
    config.accumulate = 1  # microbatches a step
    config.ema = 0.9999
    config.max_skipped_steps = 10  # consecutive non-finite steps before the job gives up

    config.input = ConfigDict(
        {
            "shards": (EMOJI_TRAIN,),
            "held_out": (EMOJI_HELD_OUT,),
            "where": {},  # JSON field -> values: only these samples of the training shards
            "held_out_where": {},
            "filters": "",  # such as "similarity=0.28:,aspect=:2,min_side?=256:"
            "captions": captions.STANDARD,  # one of these, by the sample's number
            "crop": "center",
            "margin": 2.0,  # JPEGs are decoded at no less than this many times the size needed
            "order": "global",  # global | streamed: a host reads shards of its own
            "streams": 0,  # of the streamed order: a multiple of the hosts; 0 = up to 64, by batch
            "window_examples": 8192,  # shuffled together in a stream
            "proportions": (),  # of a batch, one an entry of shards; () = all are one collection
            "streaming": False,  # unindexed shards, drawn with replacement, no exact resume
            "cache": "",  # folder for blocks of remote shards; "" = none, each read asks the store
            "cache_gib": 20.0,
            "threads": 4,
            "workers": 0,
            "max_bad_fraction": 0.01,
            "max_consecutive_bad": 100,
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.sharding = "data"  # data | fsdp | tensor, or a tuple of (pattern, spec)
    config.init_from = ""  # RUN or BUNDLE whose parameters start this run
    config.init_part = ""  # of a bundle; "" = the stage's own, an upsampler's by its size
    config.follow_init = False  # architecture and settings are those of init_from
    config.allow_mixed_spaces = False  # another CLIP, T5 or scale of z_i than it was trained with

    config.log_steps = 20
    config.save_steps = 1000
    config.keep = 2
    config.keep_every_steps = 0  # multiples of it are never deleted; 0 = none
    config.keep_best = ""  # such as "lowest held_out/loss": its best step is saved and kept
    config.spike_factor = 10.0  # see training/spikes.py; 0 judges no step
    config.skip_examples = 0  # left out, in all, since the run began: on resuming the input jumps
    config.eval_steps = 500
    config.eval_examples = 512
    config.sample_steps = 0  # sample grids every so many steps; 0 = only at the end
    config.sample_examples = 16
    config.metric_steps = 0  # retrieval, prior, drawn pictures; 0 = only at the end
    config.metric_examples = 512  # held-out samples a measurement; 0 = none
    config.metric_clip = ""  # RUN or BUNDLE: judges pictures; "" = the stage's own CLIP, if any
    config.metric_inception = ""  # BUNDLE or FILE: adds FID of drawn pictures; "" = off
    config.tensorboard = True
    config.wandb = ""  # project name; "" = off
    config.compilation_cache = ""  # folder of its own; "" = that of all verbs
    config.task = ConfigDict()
    return config


def theme(config: ConfigDict, name: str) -> None:
    """Narrows both collections to a named theme of the emoji shards."""
    if name not in THEMES:
        raise errors.unknown("theme", name, THEMES)
    config.input.where = ConfigDict(THEMES[name])
    config.input.held_out_where = ConfigDict(THEMES[name])


def optimiser(config: ConfigDict, name: str) -> None:
    """The settings of a stage in Table 3 of arXiv 2204.06125, as `config.optim` and
    `config.ema`."""
    values = {
        "schedule": "constant",
        "warmup_steps": 1000,
        "end_fraction": 0.0,
        "clip_norm": 1.0,  # 0 = off
        "freeze": (),  # path patterns of parameters that are not trained
        "no_decay": (),  # path patterns without weight decay, beside gains, biases and vectors
        "sam_rho": 0.0,
        "sam_rows": 0,  # of the batch, that go to a point of their own; 0 = all to one
    }
    values |= optim.PRESETS[name]
    config.ema = values.pop("ema_decay", config.ema)
    for elsewhere in ("total_steps", "batch_size"):
        values.pop(elsewhere, None)
    config.optim = ConfigDict(values)


def scale(config: ConfigDict, *, batch_size: int, total_steps: int) -> None:
    """Paper-scale runs: save, evaluate and log at pod-sized intervals; FSDP over all chips."""
    config.batch_size, config.total_steps = batch_size, total_steps
    config.log_steps, config.save_steps, config.eval_steps = 100, 5000, 5000
    config.eval_examples = 8192
    config.sample_steps = config.metric_steps = 25_000
    config.metric_examples = 8192
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
    config.sharding = "fsdp"
    config.arch.dtype = "bfloat16"
    # docs/compile.md: 64 chips of v5p hold what these keep of the paper's batches, `unclip compile`
    # says what smaller ones hold. Folding halves the compile time; published weights are laid out
    # unfolded.
    paper = config.preset.startswith("paper")
    config.arch.remat = "text=dots_saveable" if paper else "nothing_saveable"
    config.arch.attention_impl = "fused"
    config.arch.fold = paper


def finetune(
    config: ConfigDict, *, learning_rate: float, batch_size: int, total_steps: int
) -> None:
    """Fine-tunes converted weights: a low constant rate, a short average, frequent evaluations.

    None of these values were published: a tenth of the stage's own learning rate or less, and no
    weight decay, so that little of what was learned from more data is lost.
    """
    scale(config, batch_size=batch_size, total_steps=total_steps)
    config.follow_init = True
    config.save_steps = config.eval_steps = 1000
    config.sample_steps = config.metric_steps = 5000
    config.ema = 0.999
    config.optim.schedule = "constant"
    config.optim.learning_rate, config.optim.warmup_steps = learning_rate, 500
    config.optim.weight_decay, config.optim.sam_rho = 0.0, 0.0


def runlocal(config: ConfigDict, small_arch: ConfigDict) -> ConfigDict:
    """The same config with a small model and two steps, for a laptop."""
    config.arch = small_arch
    config.known = ConfigDict()
    config.follow_init, config.init_part = False, ""
    config.batch_size = 8
    config.total_steps = 2
    config.accumulate = 1
    config.log_steps = config.eval_steps = config.save_steps = 1
    config.eval_examples = config.sample_examples = config.metric_examples = 8
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.sharding = "data"
    config.optim.warmup_steps = 0
    config.optim.sam_rows = min(config.optim.sam_rows, config.batch_size // 2)
    return config
