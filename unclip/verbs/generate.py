"""`unclip generate`: pictures from captions, or from pictures given, by one of several modes.

    unclip generate --model DIR --prompt "a red fox" --n 4 --seed 0 --out DIR
    unclip generate --model DIR --mode variations --image fox.png --out DIR
    unclip generate --model DIR --mode interpolate --image fox.png --image owl.png --out DIR
    unclip generate --model DIR --from_png out/0002-seed2.png --out DIR

Writes numbered PNG files, each with its prompt, seed, every setting and the model's hash inside
(readable by `unclip inspect`, Automatic1111 and any PNG tool), and a grid.

    text         --prompt: a caption through prior, decoder and upsamplers
    variations   --image: other pictures of the same z_i; with --invert of the same x_T too
    interpolate  --image, twice or more: on the way from one picture to the next
    textdiff     --image, --prompt: the picture on its way to the caption, from --from_prompt
    reconstruct  --image, --components: z_i on its first principal components
    upsample     --image: a small picture made large
"""

import itertools
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator

from absl import flags

from unclip import cli, errors

MODES = ("text", "variations", "interpolate", "textdiff", "reconstruct", "upsample")
# Flags that only some modes read, with those modes.
PRIOR_FLAGS = (
    *("prior_steps", "prior_spacing", "prior_guidance", "temperature", "top_p", "candidates"),
)
GUIDANCE_FLAGS = ("guidance", "guidance_low", "guidance_high", "guidance_rescale")
DECODER_FLAGS = ("steps", "spacing", *GUIDANCE_FLAGS, "sampler", "eta", "stages")
READ_BY = {
    "prompt": ("text", "textdiff"),
    "image": MODES[1:],
    **dict.fromkeys((*PRIOR_FLAGS, "negative_prompt", "best_of"), ("text",)),
    **dict.fromkeys(DECODER_FLAGS, tuple(mode for mode in MODES if mode != "upsample")),
    "n": tuple(mode for mode in MODES if mode != "reconstruct"),
    "from_prompt": ("textdiff",),
    "angle": ("textdiff",),
    "weights": ("interpolate",),
    "invert": ("variations", "interpolate", "textdiff"),
    "components": ("reconstruct",),
    "basis": ("reconstruct",),
    "animation": ("interpolate", "textdiff", "reconstruct"),
}
OF_ITS_OWN = ("model", "out", "batch_size", "allow_mixed_spaces", "image", "basis", "from_png")

_MODEL = flags.DEFINE_string("model", None, "bundle folder (unclip export)", required=True)
_MODE = flags.DEFINE_enum("mode", "text", MODES, "what to make")
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "caption; repeat the flag for several. textdiff: what the picture shall show"
)
_NEGATIVE = flags.DEFINE_string(
    "negative_prompt", "", "text: caption that guidance leads away from, in place of none"
)
_FROM_PROMPT = flags.DEFINE_string(
    "from_prompt", "", "textdiff: what the picture shows; without it --prompt itself is gone to"
)
_IMAGE = flags.DEFINE_multi_string("image", [], "picture file; repeat the flag for several")
_FROM_PNG = flags.DEFINE_string(
    "from_png",
    None,
    "picture of ours to draw again, with all that it was drawn from, by its recipe. Pictures that "
    "the chain begins with are looked for in --image and beside the file",
)
_N = flags.DEFINE_integer(
    "n",
    None,
    "pictures: a prompt or picture (default 4; upsample 1), on the way between pictures (default "
    "8), of angles (default 5)",
    lower_bound=1,
)
_BEST_OF = flags.DEFINE_integer(
    "best_of", None, "text: draw so many a prompt and keep the --n that CLIP finds best"
)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the first picture; picture k has seed + k")
_OUT = flags.DEFINE_string("out", "out", "folder for the pictures")
_BATCH = flags.DEFINE_integer(
    "batch_size", 8, "pictures drawn at once, at most; a CPU draws one by one", lower_bound=1
)
_INVERT = flags.DEFINE_bool(
    "invert",
    None,
    "start at the picture's own x_T, by DDIM inversion; default: textdiff yes, others no",
)
_ANGLE = flags.DEFINE_float("angle", 0.5, "textdiff: how far to go, 0 (the picture) to 1")
_WEIGHTS = flags.DEFINE_multi_string(
    "weights",
    [],
    "interpolate: in place of a way, one picture of these weights, a number an image, such as "
    "0.2,0.3,0.5; repeat the flag for several",
)
_COMPONENTS = flags.DEFINE_multi_integer(
    "components", [], "reconstruct: of z_i; repeat the flag for several", lower_bound=1
)
_BASIS = flags.DEFINE_string(
    "basis",
    None,
    "reconstruct: embeddings (unclip embed), a folder of pictures or shards to find the principal "
    "components of; default: the autoregressive prior's",
)
_ANIMATION = flags.DEFINE_string(
    "animation", None, "also write the pictures of the way as this .webp file, there and back"
)
_SAMPLER = flags.DEFINE_string("sampler", None, "decoder: ddpm, ddim, … (docs/samplers.md)")
_STEPS = flags.DEFINE_integer("steps", None, "decoder: steps", lower_bound=1)
_SPACING = flags.DEFINE_string(
    "spacing",
    None,
    "decoder: even, trailing, log-snr, karras, fast27, or steps by section as 10,10,3,2,2",
)
_GUIDANCE = flags.DEFINE_float("guidance", None, "decoder: classifier-free guidance scale")
_LOW = flags.DEFINE_float(
    "guidance_low", None, "decoder: guidance acts from this fraction of the timesteps on, 0 to 1"
)
_HIGH = flags.DEFINE_float("guidance_high", None, "decoder: and up to this one, 0 to 1")
_RESCALE = flags.DEFINE_float(
    "guidance_rescale", None, "decoder: how far guided outputs get back their contrast, 0 to 1"
)
_ETA = flags.DEFINE_float("eta", None, "decoder: noise of a sampler that has an eta, 0 none to 1")
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
    _check_flags()

    from unclip import UnCLIP
    from unclip.files import images
    from unclip.runtime import progress

    def warn(message, *_, **__):
        print(f"unclip generate: {message}", file=sys.stderr)

    warnings.showwarning = warn  # standard output holds only the files' names
    # Read before the model is: a picture that is none costs no time.
    sources = _sources()
    recipes = _recipes(sources) if _FROM_PNG.value is not None else []
    model = UnCLIP.load(_MODEL.value, batch_size=_BATCH.value, allow_mixed_spaces=_MIXED.value)
    if recipes:
        draws, total = _again(model, recipes, sources), len(recipes)
    else:
        draws, total = _draws(model, sources)
    images.writable_folder(_OUT.value)
    pictures, drawn_recipes, paths = [], [], []
    with progress.progress(total, "drawing", "img") as bar:
        for draw in draws:
            drawn = draw()
            # Saved at once, so that a failure at the hundredth picture loses none before it.
            paths += images.save_pictures(drawn.images, drawn.recipes, _OUT.value, with_grid=False)
            pictures.extend(drawn.images)
            drawn_recipes.extend(drawn.recipes)
            bar.update(len(drawn))
    if len({picture.shape for picture in pictures}) == 1 < len(pictures):
        paths.append(_grid(pictures, drawn_recipes))
    if _ANIMATION.value is not None:
        paths.append(images.save_animation(_ANIMATION.value, pictures))
    print("\n".join(map(str, paths)))


def _sources() -> list:
    """The pictures of --image; all that cannot be used are named at once."""
    from unclip.drawing import base

    found, wrong = [], []
    for path in _IMAGE.value:
        try:
            found.append(base.as_source(path))
        except errors.UnclipError as error:
            wrong.append(error)
    if wrong:
        raise type(wrong[0])("; ".join(error.message for error in wrong))
    return found


def _draws(model, sources) -> tuple[Iterator[Callable], int]:
    """(functions that draw a few pictures each, how many in all) of the mode."""
    mode, n, seed = _MODE.value, _N.value or 4, _SEED.value
    settings = {
        "decoder": _given(
            steps=_STEPS.value,
            spacing=_SPACING.value,
            guidance=_GUIDANCE.value,
            guidance_low=_LOW.value,
            guidance_high=_HIGH.value,
            guidance_rescale=_RESCALE.value,
            sampler=_SAMPLER.value,
            eta=_ETA.value,
        ),
        "upsamplers": [
            _given(steps=steps, noise_level=level)
            for steps, level in itertools.zip_longest(_UP_STEPS.value, _UP_LEVELS.value)
        ],
        "stages": _STAGES.value,
    }
    if _INVERT.value is not None:
        settings["invert"] = _INVERT.value
    if mode == "text":
        settings["prior"] = _given(
            steps=_PRIOR_STEPS.value,
            spacing=_PRIOR_SPACING.value,
            guidance=_PRIOR_GUIDANCE.value,
            temperature=_TEMPERATURE.value,
            top_p=_TOP_P.value,
            candidates=_CANDIDATES.value,
        )
        settings["negative_prompt"] = _NEGATIVE.value
        prompts, best_of = _PROMPT.value, _BEST_OF.value
        # Captions that share a batch are drawn together; a batch is padded in any case.
        several = max(1, _BATCH.value // (best_of or n))
        groups = [prompts[i : i + several] for i in range(0, len(prompts), several)]
        if best_of is not None:
            draw = lambda group: model.generate(group, n, seed, best_of=best_of, **settings)
            return (lambda group=group: draw(group) for group in groups), n * len(prompts)
        return _chunks(model.generate, groups, n, seed, settings), n * len(prompts)
    if mode == "variations":
        return _chunks(model.variations, sources, n, seed, settings), n * len(sources)
    if mode == "interpolate":
        rows = [_row(text) for text in _WEIGHTS.value]
        more = {"n": _N.value, "weights": rows or None}
        draw = lambda: model.interpolate(*sources, seed=seed, **more, **settings)
        return iter([draw]), len(rows) or _N.value or 8
    if mode == "textdiff":
        prompts = _FROM_PROMPT.value, _PROMPT.value[0]
        more = {"n": _N.value or 5, "seed": seed, "angle": _ANGLE.value}
        draw = lambda: model.text_diff(*sources, *prompts, **more, **settings)
        return iter([draw]), _N.value or 5
    if mode == "reconstruct":
        from unclip.drawing.basis import open_basis

        basis, wanted = open_basis(model, _BASIS.value), _COMPONENTS.value
        draw = lambda source: model.reconstruct(source, wanted, seed, basis=basis, **settings)
        draws = (lambda source=source: draw(source) for source in sources)
        return draws, len(wanted) * len(sources)
    settings = {"upsamplers": settings["upsamplers"]}
    n = _N.value or 1
    return _chunks(model.upsample, sources, n, seed, settings), n * len(sources)


def _chunks(method, groups, n: int, seed: int, settings: dict) -> Iterator[Callable]:
    """Draws of `n` pictures of every group, a batch at a time."""
    for group in groups:
        for start in range(0, n, _BATCH.value):
            count = min(_BATCH.value, n - start)
            yield lambda group=group, count=count, start=start: method(
                group, count, seed + start, **settings
            )


def _again(model, recipes, sources) -> Iterator[Callable]:
    """Draws of recipes; all pictures that are missing are named before the first."""
    from unclip.drawing import modes

    basis = {} if _BASIS.value is None else {"basis": _BASIS.value}
    absent = [one for recipe in recipes for one in modes.missing(recipe, sources)]
    if absent:
        named = dict.fromkeys(f"{one.get('name')!r} (sha256 {one.get('sha256')})" for one in absent)
        raise errors.ConfigError(
            f"{_FROM_PNG.value} was drawn from pictures that are neither in --image nor beside it: "
            f"{', '.join(named)}"
        )
    return (lambda recipe=recipe: model.redraw(recipe, sources, **basis) for recipe in recipes)


def _recipes(sources) -> list[dict]:
    """The recipes of --from_png; adds to `sources` what lies beside it under a recipe's names."""
    from unclip.drawing import base, modes
    from unclip.files import images

    path = pathlib.Path(_FROM_PNG.value)
    recipe = images.read_recipe(path)
    if recipe is None:
        raise errors.ConfigError(f"{path} holds no recipe: it is no picture of unclip generate")
    recipes = images.recipes_of(recipe)
    for one in [one for recipe in recipes for one in modes.missing(recipe, sources)]:
        # A name from a file is no path: nothing but the folder itself is looked into.
        beside = path.parent / os.path.basename(str(one.get("name")))
        if beside.is_file():
            sources.append(base.as_source(beside))
    return recipes


def _grid(pictures, recipes):
    from unclip.drawing import modes
    from unclip.files import images

    several = len(_PROMPT.value) > 1 or _MODE.value in ("interpolate", "textdiff", "reconstruct")
    labels = [modes.label(recipe) for recipe in recipes] if several else None
    columns = {"text": _N.value or 4, "variations": _N.value or 4}.get(_MODE.value)
    columns = len(_COMPONENTS.value) if _MODE.value == "reconstruct" else columns
    return images.save_grid(pictures, _OUT.value, columns, labels, recipes=recipes)


def _row(text: str) -> list[float]:
    """The weights of one picture."""
    try:
        row = [float(part) for part in text.split(",")]
    except ValueError:
        raise errors.ConfigError(
            f"--weights {text!r}: expected numbers between commas, one an --image, as 0.2,0.8"
        ) from None
    return row


def _check_flags() -> None:
    """Refuses flags that the mode does not read, and a mode without what it needs."""
    mode = _MODE.value
    if _FROM_PNG.value is not None:
        own = flags.FLAGS.get_flags_for_module(sys.modules[__name__])
        idle = [flag.name for flag in own if flag.name not in OF_ITS_OWN]
        cli.refuse_idle(dict.fromkeys(idle, "--from_png takes every setting from the recipe"))
        return
    why = {
        "image": "draws from --prompt",
        "prompt": "draws from --image alone",
        **dict.fromkeys(PRIOR_FLAGS, "uses no prior"),
        **dict.fromkeys(DECODER_FLAGS, "uses no decoder"),
    }
    read = lambda flag: f"; {' and '.join(READ_BY[flag])} read{'s' * (len(READ_BY[flag]) == 1)} it"
    idle = [flag for flag, modes in READ_BY.items() if mode not in modes]
    said = {
        flag: f"--mode {mode} {why.get(flag, 'does not read it' + read(flag))}" for flag in idle
    }
    cli.refuse_idle(said)
    wrong = []
    prompts, pictures = _PROMPT.value, _IMAGE.value
    if mode in READ_BY["prompt"] and not prompts:
        wrong.append(f"--mode {mode} needs at least one --prompt")
    if mode == "textdiff" and len(prompts) > 1:
        wrong.append(f"--mode textdiff goes to one --prompt, given {len(prompts)}")
    least = 2 if mode == "interpolate" else 1
    if mode in READ_BY["image"] and len(pictures) < least:
        number = "two" if least == 2 else "one"
        wrong.append(f"--mode {mode} needs at least {number} --image")
    if mode == "textdiff" and len(pictures) > 1:
        wrong.append(f"--mode textdiff starts at one --image, given {len(pictures)}")
    if mode == "reconstruct" and not _COMPONENTS.value:
        wrong.append("--mode reconstruct needs at least one --components")
    for what, given in (("prompt", prompts), ("image", pictures)):
        for number, one in enumerate(given, 1):  # before the first is drawn, which takes time
            if not one.strip():
                wrong.append(f"--{what} {number} of {len(given)} is empty")
    if _ANIMATION.value is not None and not _ANIMATION.value.lower().endswith(".webp"):
        wrong.append(f"--animation {_ANIMATION.value}: expected a name that ends in .webp")
    if wrong:
        raise errors.ConfigError("; ".join(wrong))


def _given(**settings) -> dict:
    return {name: value for name, value in settings.items() if value is not None}
