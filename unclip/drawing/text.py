"""Pictures of a caption: prior, decoder, upsamplers (figure 2 of the paper); the best of many."""

from collections.abc import Mapping, Sequence

import numpy as np

from unclip import errors
from unclip.cascade.pipeline import Noise, Pictures, Pipeline, seeds_of
from unclip.drawing import base
from unclip.files import images

EMBEDS = ("prior", "text", "none")  # where the decoder's z_i comes from
RANKED = ("best_of", "rank", "clip_score")  # what best-of-n adds to a recipe


def generate(
    model: Pipeline,
    prompt: str | Sequence[str],
    n: int = 1,
    seed: int | Sequence[int] = 0,
    *,
    negative_prompt: str = "",
    best_of: int | None = None,
    prior: dict | None = None,
    decoder: dict | None = None,
    upsamplers: Sequence[dict] = (),
    stages: int | None = None,
    embed: str | None = None,
    caption: bool = True,
    noise: Noise | None = None,
) -> Pictures:
    """Draws `n` pictures of every caption.

    Picture k of a caption uses seed `seed` + k, and is the same picture when drawn alone: to the
    bit by programs of equally many rows, as on a CPU, else up to rounding.

    Args:
      prompt: one caption or several.
      n: pictures a caption; seed: of the first one, 0 <= seed < 2**32; or one for every caption,
        so that an evaluation's pictures do not share their noise.
      negative_prompt: caption that guidance leads away from, in place of none, in the prior and
        in a decoder that reads captions.
      best_of: draw so many of every caption and keep the `n` whose z_i is nearest to z_t by the
        model's own CLIP, best first. The recipe has the seed of each, so that it can be drawn
        alone, and "best_of", "rank" and "clip_score" (cosine).
      prior, decoder, upsamplers: settings that replace the model's own, by stage: steps, guidance,
        sampler, eta, and the prior's candidates.
      stages: how many of decoder and upsamplers run; None = all.
      embed: where the decoder's z_i comes from (section 5.1 of the paper): "prior" draws it, "text"
        gives z_t in its place, "none" drops it. None: "text" for a decoder that was trained so,
        "prior" for any other; a decoder without z_i has only "none".
      caption: whether the decoder reads the caption too.
      noise: in place of what the seeds would draw, one row a picture; see `cascade.pipeline`.

    Returns:
      `Pictures`, caption-major.

    Raises:
      ConfigError: empty prompt, a part that is missing, a setting that does not exist or would
        have no effect.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if n < 1 or not prompts:
        raise errors.ConfigError(f"given {len(prompts)} prompts and n={n}: at least 1 of each")
    drawn_each = n if best_of is None else base.count(best_of, "best_of")
    if drawn_each < n:
        raise errors.ConfigError(f"best_of={best_of} with n={n}: expected at least n")
    wanted = [p for p in prompts for _ in range(drawn_each)]
    first = [seed] * len(prompts) if np.ndim(seed) == 0 else list(map(int, seed))
    if len(first) != len(prompts):
        raise errors.ConfigError(f"{len(first)} seeds for {len(prompts)} prompts")
    seeds = [s for one in first for s in seeds_of(one, drawn_each)]
    model.need("decoder", "drawing a picture")
    if best_of is not None:
        model.need("clip", "the best of several")
    task, z_i = model.task("decoder"), None
    asked, embed = embed, embed or ("text" if task.embedding == "text" else "prior")
    if embed not in EMBEDS:
        raise errors.unknown("embed", embed, EMBEDS)
    if embed == "prior" and task.embedding == "text":
        raise errors.ConfigError(
            "embed 'prior': this decoder was trained on z_t in place of z_i; "
            "expected 'text' or 'none'"
        )
    unread = not task.model.use_z_i  # a text-only decoder (GLIDE, Imagen)
    if unread and asked not in (None, "none"):
        raise errors.ConfigError(
            f"embed {asked!r} would have no effect: this decoder reads the caption alone"
        )
    by_prior = embed == "prior" and not unread
    if prior and not by_prior:
        why = "reads the caption alone" if unread else f"is given z_i by embed={embed!r}"
        raise errors.ConfigError(
            f"settings of the prior ({', '.join(prior)}) would have no effect: this decoder {why}"
        )
    running = model.running(stages, decoder, upsamplers)
    base.check_noise(noise, ["prior"] * by_prior + ["decoder", *running])
    model = model.drawing(len(seeds))
    chosen = {"decoder": decoder or {}} | ({"prior": prior or {}} if by_prior else {})
    negative = _negative(model, negative_prompt, chosen, caption)
    if unread:
        embed = None
    elif by_prior:
        z_i = model.draw_prior(
            wanted, seeds, negative=negative.get("prior", ""), noise=noise, **(prior or {})
        )
    else:
        z_i = model.embed_text(wanted)
    drawn = model.decode(
        z_i,
        wanted if caption else None,
        seeds,
        drop_image=embed == "none",
        decoder=decoder,
        upsamplers=upsamplers,
        stages=stages,
        negative=negative.get("decoder", ""),
        noise=noise,
    )
    settings = model.in_force(chosen | dict(zip(model.upsamplers, upsamplers)), stages, noise)
    if negative:
        settings["negative_prompt"] = negative_prompt
    if embed not in (None, "prior"):
        settings["embed"] = embed
    if not caption:
        settings["caption"] = False
    recipes = [{"mode": "text", "prompt": p, "seed": s, **settings} for p, s in zip(wanted, seeds)]
    found = base.pictures(drawn, recipes)
    return found if best_of is None else _best(model, found, n, drawn_each)


def redraw(
    model: Pipeline, recipe: Mapping, sources: Sequence[images.Source], settings: dict
) -> Pictures:
    """The picture of a recipe."""
    del sources
    drawn = generate(
        model,
        recipe["prompt"],
        1,
        recipe["seed"],
        negative_prompt=str(recipe.get("negative_prompt", "")),
        embed=recipe.get("embed"),
        caption=recipe.get("caption", True) is not False,
        **settings,
    )
    drawn.recipes[0] |= {name: recipe[name] for name in RANKED if name in recipe}
    return drawn


def _negative(model: Pipeline, prompt: str, chosen: dict, caption: bool) -> dict[str, str]:
    """{stage: the negative prompt it is drawn with}; refuses one that no stage would heed."""
    if not prompt.strip():
        return {}
    reads, network = list(chosen), model.task("decoder").model
    if not caption or not (network.use_text_tokens or network.use_z_t or network.text_layers):
        reads.remove("decoder")
    guidance = {name: (model.task(name).draw | chosen[name]).get("guidance", 1) for name in reads}
    if all(scale == 1 for scale in guidance.values()):
        said = ", ".join(f"{name} guidance {scale:g}" for name, scale in guidance.items())
        raise errors.ConfigError(
            f"negative prompt {prompt!r} would have no effect: {said or 'no stage reads a caption'}"
        )
    return dict.fromkeys(reads, prompt)


def _best(model: Pipeline, drawn: Pictures, n: int, of: int) -> Pictures:
    """The `n` best of every `of` pictures by CLIP, best first; equal ones by their seeds."""
    scores = model.score(drawn.images, [recipe["prompt"] for recipe in drawn.recipes])
    order = np.argsort(-scores.reshape(-1, of), axis=1, kind="stable")[:, :n]
    kept = (order + np.arange(len(order))[:, None] * of).ravel()
    recipes = [
        drawn.recipes[k]
        | {"best_of": of, "rank": place % n + 1, "clip_score": round(float(scores[k]), 6)}
        for place, k in enumerate(kept)
    ]
    stages = {name: found[kept] for name, found in drawn.stages.items()}
    return Pictures(drawn.images[kept], recipes, stages)
