"""CLIP itself on pictures: which label fits (zero-shot), which picture fits a caption (search)."""

import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unclip import errors
from unclip.cascade.pipeline import Pipeline
from unclip.drawing import base
from unclip.drawing.embedded import embedded
from unclip.files import images
from unclip.measure.picture_set import PictureSet
from unclip.measure.pictures import open_pictures
from unclip.tasks.arrays import unit

# Templates by name; "openai7" are those that OpenAI published as enough for ImageNet.
TEMPLATES = {
    "plain": ("{}",),
    "photo": ("a photo of a {}.",),
    "openai7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}


class Classified(NamedTuple):
    """What `classify` found.

    Attributes:
      names: of the pictures, n.
      labels: k.
      probabilities: float32 [n, k], each row of sum 1.
    """

    names: list[str]
    labels: list[str]
    probabilities: np.ndarray

    @property
    def best(self) -> list[str]:
        """The likeliest label of each picture."""
        return [self.labels[k] for k in self.probabilities.argmax(axis=1)]


class Found(NamedTuple):
    """A picture that `search` found: name, number in the set, cosine with the caption."""

    name: str
    number: int
    score: float


def classify(
    model: Pipeline,
    pictures: base.Image | Sequence[base.Image] | PictureSet,
    labels: Sequence[str],
    *,
    templates: str | Sequence[str] = "plain",
) -> Classified:
    """Probabilities of labels by CLIP, without training (arXiv 2103.00020, section 3.1).

    The softmax of CLIP's own logits. A label's embedding is the mean of the unit embeddings of its
    text in every template.

    Args:
      pictures: one or several, as in `variations`; or a set of `measure.pictures`, of which those
        that cannot be read are left out with a warning.
      labels: two or more, all different.
      templates: texts with {} where the label goes, or names of `TEMPLATES`.

    Raises:
      ConfigError: no CLIP, labels that are empty or equal, a template without {}.
      DataError: a picture that cannot be read.
    """
    clip = model.need("clip", "classifying pictures")
    labels, texts = checked_labels(labels), checked_templates(templates)
    if isinstance(pictures, PictureSet):
        names, rows = [], []
        for numbers, z_i in embedded(model, pictures):
            names += [pictures.name(i) for i in numbers]
            rows.append(z_i)
        z_i = np.concatenate(rows)
    else:
        one = isinstance(pictures, images.Source | str | os.PathLike)
        one = one or getattr(pictures, "ndim", 0) == 3
        sources = [base.as_source(picture) for picture in ([pictures] if one else pictures)]
        base.count(len(sources), "number of pictures")
        names, z_i = [source.name for source in sources], base.embed(model, sources)
    z_t = unit(model.embed_text([text.format(label) for label in labels for text in texts]))
    z_t = unit(z_t.reshape(len(labels), len(texts), -1).mean(axis=1))
    logits = np.exp(np.float64(clip.params["logit_scale"])) * (unit(z_i) @ z_t.T)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return Classified(names, labels, np.float32(odds / odds.sum(axis=1, keepdims=True)))


def checked_labels(labels: Sequence[str]) -> list[str]:
    """Labels without blanks around them. ConfigError: empty or equal ones, or fewer than two."""
    labels = [str(label).strip() for label in labels]
    wrong = []
    if "" in labels:
        wrong.append(f"label {labels.index('') + 1} of {len(labels)} is empty")
    twice = sorted({label for label in labels if label and labels.count(label) > 1})
    if twice:
        wrong.append(f"labels given twice: {', '.join(twice)}")
    if len(labels) < 2:
        wrong.append(f"{len(labels)} label(s): expected at least 2 to choose from")
    if wrong:
        raise errors.ConfigError("; ".join(wrong))
    return labels


def checked_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Templates, names of `TEMPLATES` replaced by theirs. ConfigError: one without one {}."""
    given = [templates] if isinstance(templates, str) else list(templates)
    found = [text for one in given for text in TEMPLATES.get(one, (one,))]
    for text in found:
        if text.count("{}") != 1 or text.count("{") != 1 or text.count("}") != 1:
            raise errors.ConfigError(
                f"template {text!r}: expected a text with one {{}} where the label goes, or one of "
                f"{', '.join(TEMPLATES)}"
            )
    if not found:
        raise errors.ConfigError("no template: expected a text with {} where the label goes")
    return tuple(found)


def accuracy(found: Classified) -> tuple[dict[str, tuple[int, int]], int]:
    """How often the likeliest label is the name of the picture's folder.

    Returns:
      ({label: (right, pictures)} of labels that some folder is named by, whatever its case;
      pictures in no such folder).
    """
    labels = {label.casefold(): label for label in found.labels}
    counts, others = {}, 0
    for name, best in zip(found.names, found.best):
        folders = [part.casefold() for part in pathlib.PurePath(name).parts[:-1]]
        true = next((labels[folder] for folder in reversed(folders) if folder in labels), None)
        if true is None:
            others += 1
            continue
        right, count = counts.get(true, (0, 0))
        counts[true] = right + (best == true), count + 1
    return counts, others


def search(
    model: Pipeline,
    pictures: str | os.PathLike | PictureSet,
    caption: str,
    n: int | None = 10,
) -> list[Found]:
    """The pictures of a collection that fit a caption best, by CLIP.

    Args:
      pictures: a folder or shards, as `measure.pictures.open_pictures` takes them, or a set; those
        that cannot be read are left out with a warning.
      n: how many, the best first; None: all. Equal ones keep their order.

    Raises:
      ConfigError: no CLIP, an empty caption. DataError: no pictures there, or none can be read.
    """
    model.need("clip", "searching pictures")
    if n is not None:
        base.count(n, "n")
    z_t = unit(model.embed_text([caption]))[0]
    if not isinstance(pictures, PictureSet):
        pictures = open_pictures(pictures)
    found = []
    for numbers, z_i in embedded(model, pictures):
        scores = unit(z_i) @ z_t
        found += [Found(pictures.name(i), i, float(s)) for i, s in zip(numbers, scores)]
    return sorted(found, key=lambda one: -one.score)[:n]
