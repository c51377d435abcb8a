"""Whether the stages of a cascade work in one embedding space, and what is said where they do not.

A prior draws z_i of the CLIP it was trained with, and a decoder reads z_i (or hidden states) of its
own (arXiv 2204.06125, section 2); with another CLIP, however equal in shape, every picture is
wrong and nothing fails. So parts carry the hashes of what they were trained with (`bundle`), and
everything that puts parts together asks here first.
"""

from collections.abc import Collection, Mapping

from unclip import errors, tasks
from unclip.cascade import bundle

FLAG = "allow_mixed_spaces"
RECORD = "mixed_spaces"  # in a bundle's meta: the lines of `mixed` that its exporter let through


def mixed(parts: Mapping[str, bundle.Part]) -> list[str]:
    """Where parts do not share one embedding space, a line each; [] where they do.

    What a part was trained with may be unknown (it is older than the record): nothing is said of
    it then, see `unknown`.
    """
    lines = []
    for frozen in bundle.SPACES:
        known = {
            name: part.trained_with[frozen]
            for name, part in sorted(parts.items())
            if frozen in part.trained_with
        }
        if not known:
            continue
        if frozen in parts:
            owner, own = f"the {frozen} here", bundle.space(parts[frozen])
        else:
            first = next(iter(known))
            owner, own = f"that of the {first}", known.pop(first)
        lines += [
            another(f"the {name}", frozen, found, owner, own) for name, found in known.items()
        ]
    if {"prior", "decoder"} <= parts.keys():
        lines.append(_scales(parts["prior"], parts["decoder"]))
    return [line for line in lines if line]


def another(what: str, frozen: str, found: str, owner: str, own: str) -> str:
    """What is said of something that was trained with another CLIP or T5; "" for the same one."""
    if found == own:
        return ""
    return f"{what} was trained with another {frozen}: {found[:12]}, {owner} is {own[:12]}"


def rescaled(what: str, stage: str, old: Mapping, new: Mapping) -> str:
    """What is said of a stage whose settings give its network z_i at another scale; "" for the
    same one."""
    was, now = (tasks.task_class(stage, s).z_scale_of(s) for s in (old, new))
    if was == now:
        return ""
    return f"{what} was trained on {_words(was)}, the config gives it {_words(now)}"


def _words(scale: float) -> str:
    return f"{scale:g} * z_i / |z_i|" if scale else "z_i of CLIP's own length"


def _scales(prior: bundle.Part, decoder: bundle.Part) -> str:
    if not decoder.arch.get("use_z_i", True) or decoder.settings.get("embedding") == "text":
        return ""
    of = lambda stage, part: tasks.task_class(stage, part.settings).z_scale_of(part.settings)
    gives, reads = of("prior", prior), of("decoder", decoder)
    if not gives or gives == reads:  # a prior that is not scaled gives z_i of CLIP's own length
        return ""
    return (
        f"the prior draws z_i of length one (embedding='scale', scale={gives:g}), the decoder was "
        f"trained with z_scale={reads:g}"
    )


def check(
    parts: Mapping[str, bundle.Part], allowed: bool | Collection[str] = False, hint: str = ""
) -> list[str]:
    """Refuses parts of several embedding spaces.

    Args:
      allowed: True takes them all the same, as does a list with every line of `mixed`.
      hint: a sentence for the message.

    Returns:
      The lines of `mixed` that were let through.

    Raises:
      ConfigError: with all of them.
    """
    lines = mixed(parts)
    if allowed is not True:
        known = allowed if isinstance(allowed, list | tuple | set) else ()
        refuse([line for line in lines if line not in known], hint)
    return lines


def refuse(lines: Collection[str], hint: str = "", flag: str = f"--{FLAG}") -> None:
    """Raises ConfigError with every line, where there is any."""
    if lines:
        said = "; ".join(lines)
        raise errors.ConfigError(
            f"several embedding spaces: {said}. {hint}Expected stages trained with one another, or "
            f"{flag} to mix them all the same"
        )


def unknown(parts: Mapping[str, bundle.Part]) -> list[str]:
    """ "PART (clip)": the parts of which it is not known what they were trained with."""
    found = []
    for name, part in sorted(parts.items()):
        stage = tasks.stage_of(name)
        if stage not in tasks.STAGES:
            continue
        found += [
            f"{name} ({frozen})"
            for frozen in tasks.needs(stage, part.arch, part.settings)
            if frozen not in part.trained_with
        ]
    return found


def completed(parts: Mapping[str, bundle.Part]) -> dict[str, bundle.Part]:
    """The parts of one publication, each trained with the CLIP and T5 beside it; as it is where
    more is known."""
    for name, part in parts.items():
        stage = tasks.stage_of(name)
        if stage not in tasks.STAGES:
            continue
        for frozen in tasks.needs(stage, part.arch, part.settings):
            if frozen in parts:
                part.trained_with.setdefault(frozen, bundle.space(parts[frozen]))
    return dict(parts)
