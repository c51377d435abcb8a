"""The modes by name: what a model lacks for each, and a recipe drawn again with all before it."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unclip import errors, tasks
from unclip.cascade import bundle
from unclip.cascade.pipeline import Pictures, Pipeline
from unclip.drawing import base, interpolate, reconstruct, text, text_diff, upsample, variations
from unclip.files import images

MODES = {
    "text": text,
    "variations": variations,
    "interpolate": interpolate,
    "textdiff": text_diff,
    "reconstruct": reconstruct,
    "upsample": upsample,
}
MAX_CHAIN = 100  # pictures that a recipe may name, all edits before it counted
# Fewest and most pictures that a mode draws from; None: any number more.
SOURCES = {
    "text": (0, 0),
    "variations": (1, 1),
    "interpolate": (2, None),
    "textdiff": (1, 1),
    "reconstruct": (1, 1),
    "upsample": (1, 1),
}


def lacking(parts: Mapping[str, bundle.Part]) -> dict[str, str]:
    """{mode of drawing: what `parts` lack for it, in words; "" where they can}."""
    missing = lambda *names: [f"no {name}" for name in names if name not in parts]
    words = lambda reasons: " and ".join(dict.fromkeys(reasons))
    alone = {"upsample": words(missing("upsampler_0"))}
    if "decoder" not in parts:
        return dict.fromkeys(MODES, "no decoder") | alone
    decoder = parts["decoder"]
    frozen = missing(*tasks.needs("decoder", decoder.arch, decoder.settings))
    reads = decoder.arch.get("use_z_i", True)
    trained_on_text = decoder.settings.get("embedding") == "text"
    from_text, from_picture = list(frozen), [*frozen, *missing("clip")]
    if reads and not trained_on_text:
        from_text += missing("clip", "prior")
    if not reads or trained_on_text:
        from_picture.append("no decoder of z_i")
    return dict.fromkeys(MODES, words(from_picture)) | {"text": words(from_text)} | alone


def redraw(
    model: Pipeline,
    recipe: Mapping[str, Any],
    pictures: Iterable[base.Image] = (),
    *,
    basis: Any = None,
) -> Pictures:
    """The picture of a recipe, drawn again: equal to the bit on the same device and versions.

    Pictures that it was drawn from, and that were drawn themselves, are drawn again too, from the
    first of the chain on.

    Args:
      recipe: of one picture (`files.images.read_recipe`).
      pictures: as in `variations`, in any order: those that the chain begins with, and any others.
      basis: in place of the one that a reconstruction names, see `reconstruct.reconstruct`.

    Raises:
      ConfigError: a recipe of another model or mode, one that is not whole, or pictures that are
        missing: all of these are named, before anything is drawn.
    """
    at_hand = [base.as_source(picture) for picture in pictures]
    known = {source.record["sha256"]: source.pixels for source in at_hand}
    chain = _chain(recipe, known)
    for step in chain:
        _check(model, step)
    for step in chain[:0:-1]:
        drawn = _one(model, step, known, basis).images[0]
        known.setdefault(images.source(drawn)["sha256"], drawn)
    return _one(model, recipe, known, basis)


def missing(recipe: Mapping[str, Any], pictures: Iterable[base.Image] = ()) -> list[dict]:
    """What a recipe says of the pictures that `redraw` would not find, [] where it would find all.

    Raises:
      ConfigError: the recipe is not whole.
    """
    known = {base.as_source(picture).record["sha256"] for picture in pictures}
    return _walk(recipe, known)[1]


def _chain(recipe: Mapping, known: Mapping) -> list[Mapping]:
    """The recipe and those of the pictures to draw before it, each before what it needs."""
    chain, absent = _walk(recipe, known)
    if absent:
        named = [f"{one.get('name')!r} ({one.get('sha256')})" for one in absent]
        raise errors.ConfigError(
            f"the recipe's pictures are not all here: missing {', '.join(named)} (sha256 of the "
            f"pixels); given {', '.join(known) or 'none'}"
        )
    return chain


def _walk(recipe: Mapping, known: Iterable[str]) -> tuple[list[Mapping], list[dict]]:
    chain, absent, todo = [], [], [recipe]
    while todo:
        step = todo.pop()
        chain.append(step)
        if len(chain) > MAX_CHAIN:
            raise errors.ConfigError(f"the recipe is a chain of more than {MAX_CHAIN} pictures")
        for source in _sources(step):
            if source.get("sha256") in known:
                continue
            own = images.kept_recipe(source.get("recipe"))
            if own is None:
                absent += [source] * (source not in absent)
            else:
                todo.append(own)
    return chain, absent


def _sources(recipe: Mapping) -> list[dict]:
    sources = recipe.get("images", [])
    if not isinstance(sources, list) or not all(isinstance(one, dict) for one in sources):
        raise errors.ConfigError("the recipe's images are damaged: expected a list of objects")
    return sources


def _check(model: Pipeline, recipe: Mapping) -> None:
    """Refuses a recipe that cannot be drawn whatever its pictures are."""
    if _field(recipe, "model_hash", str) != model.model_hash:
        raise errors.ConfigError(
            f"the recipe is of model {recipe['model_hash']}, this is {model.model_hash}"
        )
    if "noise" in recipe:
        raise errors.ConfigError(f"the recipe's noise was {recipe['noise']}: not in the recipe")
    mode, count = _field(recipe, "mode", str), len(_sources(recipe))
    if mode not in MODES:
        raise errors.unknown("mode of a recipe", mode, MODES)
    low, high = SOURCES[mode]
    if count < low or (high is not None and count > high):
        raise errors.ConfigError(
            f"a recipe of mode {mode!r} from {count} pictures: expected "
            f"{low if high == low else f'at least {low}'}"
        )
    for name, kind in (("seed", int), ("stages", int), ("prompt", str)):
        _field(recipe, name, kind)


def _one(model: Pipeline, recipe: Mapping, known: Mapping, basis: Any) -> Pictures:
    """The picture of a checked recipe whose own pictures are all `known`, by their hashes."""
    # As many rows as then, that nothing is rounded otherwise.
    rows = recipe.get("batch_size", model.at_once(1))
    if type(rows) is int and model.fits(rows):
        model = model.with_rows(rows)
    else:
        warnings.warn(
            f"drawn in batches of {rows}, here of {model.at_once(1)}: rounding may differ",
            stacklevel=4,
        )
    sources = []
    for one in _sources(recipe):
        if one.get("sha256") not in known:
            raise errors.ConfigError(
                f"{one.get('name')!r}, which is drawn again from its recipe, is another picture "
                "here: a device or version that rounds differently; give the picture itself"
            )
        own = images.kept_recipe(one.get("recipe"))
        sources.append(images.Source(known[one["sha256"]], str(one.get("name", "")), own))
    chosen: dict[str, dict] = {}
    for setting, values in recipe.items():
        for stage, value in values.items() if isinstance(values, dict) else ():
            if stage not in model.parts or stage not in bundle.KINDS:
                raise errors.unknown(f"stage of the recipe's {setting}", stage, model.parts)
            chosen.setdefault(stage, {})[setting] = value
    stages = recipe["stages"]
    settings = {
        "decoder": chosen.pop("decoder", {}),
        "upsamplers": [chosen.pop(name, {}) for name in model.upsamplers[: max(stages, 1) - 1]],
        "stages": stages,
    }
    more = {}
    if recipe["mode"] == "text":
        settings["prior"] = chosen.get("prior", {})
    if recipe["mode"] == "reconstruct":
        more["basis"] = basis
    return MODES[recipe["mode"]].redraw(model, recipe, sources, settings, **more)


def _field(recipe: Mapping, name: str, kind: type):
    """A recipe's field; ConfigError where it is missing or of another type."""
    value = recipe.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise errors.ConfigError(f"the recipe's {name} is {value!r}: expected {kind.__name__}")
    return value


def label(recipe: Mapping[str, Any]) -> str:
    """What tells a picture from the others of its grid, a few words."""
    mode = recipe.get("mode")
    if mode == "interpolate":
        return " : ".join(f"{weight:.2f}" for weight in recipe["weights"])
    if mode == "textdiff":
        return f"{recipe['angle']:.2f} {recipe['prompt']}"
    if mode == "reconstruct":
        return f"{recipe['components']} components"
    names: Sequence[str] = [one["name"] for one in recipe.get("images", [])]
    return recipe.get("prompt") or " ".join(names) or f"seed {recipe.get('seed')}"
