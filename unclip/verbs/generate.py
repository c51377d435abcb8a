"""`unclip generate`: pictures from captions, or variations of a given picture.

    unclip generate --model DIR --prompt "a red fox" --n 4 --seed 0 --out DIR

Writes numbered PNG files, each with its prompt, seed, every setting and the model's hash inside
(readable by `unclip.files.images.read_recipe`, Automatic1111 and any PNG tool), and a grid.
"""

import itertools
import os
import sys
import warnings
from functools import partial

from absl import flags

from unclip import cli, errors

MODES = ("text", "variations")
PRIOR_FLAGS = (
    *("prior_steps", "prior_spacing", "prior_guidance", "temperature", "top_p", "candidates"),
)

_MODEL = flags.DEFINE_string("model", None, "bundle folder (unclip export)", required=True)
_MODE = flags.DEFINE_enum("mode", "text", MODES, "what to make")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "caption; repeat the flag for several")
_IMAGE = flags.DEFINE_multi_string("image", [], "picture file, for variations")
_N = flags.DEFINE_integer("n", 4, "pictures per prompt or picture", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the first picture; picture k has seed + k")
_OUT = flags.DEFINE_string("out", "out", "folder for the pictures")
_BATCH = flags.DEFINE_integer(
    "batch_size", 8, "pictures drawn at once, at most; a CPU draws one by one", lower_bound=1
)
_SAMPLER = flags.DEFINE_string("sampler", None, "decoder: ddpm, ddim or dpm++2m")
_STEPS = flags.DEFINE_integer("steps", None, "decoder: steps", lower_bound=1)
_SPACING = flags.DEFINE_string(
    "spacing", None, "decoder: even, trailing, log-snr, fast27, or steps by section as 10,10,3,2,2"
)
_GUIDANCE = flags.DEFINE_float("guidance", None, "decoder: classifier-free guidance scale")
_ETA = flags.DEFINE_float("eta", None, "decoder: DDIM eta, 0 deterministic to 1 ancestral")
_PRIOR_STEPS = flags.DEFINE_integer("prior_steps", None, "prior: steps", lower_bound=1)
_PRIOR_GUIDANCE = flags.DEFINE_float("prior_guidance", None, "prior: guidance scale")
_PRIOR_SPACING = flags.DEFINE_string("prior_spacing", None, "prior: as --spacing")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "autoregressive prior: of its codes")
_TOP_P = flags.DEFINE_float(
    "top_p", None, "autoregressive prior: draws from the likeliest codes of this probability"
)
_CANDIDATES = flags.DEFINE_integer(
    "candidates", None, "prior: draws, the best dot product with z_t is kept", lower_bound=1
)
_UP_STEPS = flags.DEFINE_multi_integer("upsampler_steps", [], "upsamplers: steps, in their order")
_MIXED = flags.DEFINE_bool(
    "allow_mixed_spaces", False, "draw with stages that were not trained with one another"
)
_UP_LEVELS = flags.DEFINE_multi_float(
    "upsampler_noise_level",
    [],
    "upsamplers trained with a noise level: that of their small pictures, in their order",
    lower_bound=0.0,
)
_STAGES = flags.DEFINE_integer(
    "stages", None, "how many of decoder and upsamplers run; default all", lower_bound=1
)


def main(argv):
    """Reads the flags, draws, writes; prints the folder and the files."""
    if len(argv) > 1:
        raise errors.ConfigError(f"unexpected argument {argv[1]!r}; a caption goes into --prompt")
    _refuse_idle()
    asked = _PROMPT.value if _MODE.value == "text" else _IMAGE.value
    if not asked:
        flag = "prompt" if _MODE.value == "text" else "image"
        raise errors.ConfigError(f"--mode {_MODE.value} needs at least one --{flag}")
    for number, one in enumerate(asked, 1):  # before the first is drawn, which takes time
        if not one.strip():
            what = "prompt" if _MODE.value == "text" else "image"
            raise errors.ConfigError(f"--{what} {number} of {len(asked)} is empty")

    from unclip.cascade import pipeline
    from unclip.files import images
    from unclip.runtime import progress

    def warn(message, *_, **__):
        print(f"unclip generate: {message}", file=sys.stderr)

    warnings.showwarning = warn  # standard output holds only the files' names
    model = pipeline.UnCLIP.load(
        _MODEL.value, batch_size=_BATCH.value, allow_mixed_spaces=_MIXED.value
    )
    settings = {
        "prior": _given(
            steps=_PRIOR_STEPS.value,
            spacing=_PRIOR_SPACING.value,
            guidance=_PRIOR_GUIDANCE.value,
            temperature=_TEMPERATURE.value,
            top_p=_TOP_P.value,
            candidates=_CANDIDATES.value,
        ),
        "decoder": _given(
            steps=_STEPS.value,
            spacing=_SPACING.value,
            guidance=_GUIDANCE.value,
            sampler=_SAMPLER.value,
            eta=_ETA.value,
        ),
        "upsamplers": [
            _given(steps=steps, noise_level=level)
            for steps, level in itertools.zip_longest(_UP_STEPS.value, _UP_LEVELS.value)
        ],
        "stages": _STAGES.value,
    }
    images.writable_folder(_OUT.value)
    # Captions that share a batch are drawn together; a batch is padded in any case.
    several = max(1, _BATCH.value // _N.value) if _MODE.value == "text" else 1
    groups = [asked[i : i + several] for i in range(0, len(asked), several)]
    pictures, recipes, paths = [], [], []
    with progress.progress(len(asked) * _N.value, "drawing", "img") as bar:
        for group in groups:
            if _MODE.value == "variations":
                settings.pop("prior", None)  # empty, see _refuse_idle
                draw = partial(model.variations, name=os.path.basename(group[0]))
                group = images.read_image(group[0])
            else:
                draw = model.generate
            for start in range(0, _N.value, _BATCH.value):
                count = min(_BATCH.value, _N.value - start)
                drawn = draw(group, count, _SEED.value + start, **settings)
                # Saved at once, so that a failure at the hundredth picture loses none before it.
                paths += images.save_pictures(
                    drawn.images, drawn.recipes, _OUT.value, with_grid=False
                )
                pictures.extend(drawn.images)
                recipes.extend(drawn.recipes)
                bar.update(len(drawn))
    if len(pictures) > 1:
        paths.append(images.save_grid(pictures, _OUT.value, _N.value, recipes=recipes))
    print("\n".join(map(str, paths)))


def _refuse_idle():
    """Refuses flags that the mode does not read."""
    mode = _MODE.value
    idle = {
        "text": {"image": "draws from --prompt"},
        "variations": {
            "prompt": "draws from --image alone",
            **dict.fromkeys(PRIOR_FLAGS, "uses no prior"),
        },
    }[mode]
    cli.refuse_idle({name: f"--mode {mode} {why}" for name, why in idle.items()})


def _given(**settings) -> dict:
    return {name: value for name, value in settings.items() if value is not None}
