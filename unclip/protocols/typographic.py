"""Typographic attack: an object with a label that gives another name.

CLIP can read a label in a picture and takes it for the object (Goh et al. 2021). Figure 5 of arXiv
2204.06125 shows apples with a paper "iPod" on them: CLIP's zero-shot probability goes to the
  written
label, yet the decoder still draws apples from the attacked embedding. Measured here, over labels
{true, pasted, control}:

    typographic.clean.p_true       mean probability of the true label, pictures without a label
    typographic.attacked.p_true, .p_pasted      the same, and of the written one, with it
    typographic.drawn.p_true, .p_pasted         for the decoder's variations of attacked pictures
    typographic.drawn.nearest_true, .nearest_pasted   shares of variations whose nearest clean
        picture, by squared error over all objects of the protocol, is the true or pasted object's

Objects are the emoji of the composed scenes, which training shows, but never with labels. The text
is drawn with Pillow's own font.
"""

import hashlib
import pathlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unclip import errors
from unclip.files import images
from unclip.measure.picture_set import ArrayPictures, PictureSet, Prepared
from unclip.protocols import base, embedded
from unclip.protocols.scenes import load_cutouts
from unclip.tasks.arrays import unit

SIDE = 256  # at which pictures are made
OBJECT = 0.8  # longer side of the object, as a part of the picture's
LABEL_WIDTH = 0.8  # the label's greatest width, likewise
FONT_SIZES = (56, 48, 40, 34, 28, 24)  # pixels; the first that fits


class Typographic(base.EvaluationProtocol):
    """Attacked pictures, one per row, of which variations are drawn.

    Args:
      count: how many, at most one per object; seed: which, and which label each gets.
      size: side at which pictures are compared.
      folder: where the emoji's training shards are; None: data/emoji.

    Attributes:
      labels: (true, pasted, control) of every row.
      attacked: the attacked pictures, a `PictureSet` at 256 pixels.
      clean: the same without label.
    """

    mode = "variations"
    by_clip = ("p_true", "p_pasted")

    def __init__(self, count: int = 32, seed: int = 0, size: int = 64, folder: str | None = None):
        cutouts = load_cutouts(base.EMOJI if folder is None else pathlib.Path(folder))
        if not 3 <= count <= len(cutouts):
            raise errors.ConfigError(
                f"typographic: count {count}, expected 3 to {len(cutouts)} objects"
            )
        if seed < 0 or not 16 <= size <= SIDE:
            raise errors.ConfigError(
                f"typographic: seed {seed}, size {size}, expected 0 or more and 16 to {SIDE}"
            )
        order = lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest()
        names = sorted(cutouts, key=order)[:count]
        turned = [names[k:] + names[:k] for k in range(3)]
        self.labels = list(zip(*turned))
        keys = [f"{row:04d}-{name.replace(' ', '-')}" for row, name in enumerate(names)]
        super().__init__(
            f"typographic.scene-objects{base.folder_mark(folder)}.seed{seed}.n{count}.size{size}",
            names,
            keys,
            size,
            {"seed": seed, "labels": self.labels},
        )
        clean = np.stack([_on_white(cutouts[name].pixels) for name in names])
        attacked = np.stack([paste_label(p, labels[1]) for p, labels in zip(clean, self.labels)])
        self.clean = ArrayPictures(clean, keys, names, f"{self.id}, clean")
        self.attacked = ArrayPictures(attacked, keys, names, f"{self.id}, attacked")

    def reference(self) -> PictureSet:
        """The clean pictures at `size`."""
        return Prepared(self.clean, self.size)

    def draw(
        self,
        model: Any,
        seeds: Sequence[int],
        settings: dict | None = None,
        rows: Sequence[int] | None = None,
    ):
        """Variations of attacked pictures, one per row (`UnCLIP.variations`)."""
        rows = self._rows(rows, seeds)
        pictures = [self.attacked.read(row) for row in rows]
        facts = [{"images": [images.source(p, self.keys[r])]} for p, r in zip(pictures, rows)]
        z_i = embedded.embed(model, pictures)
        return embedded.decode(self, model, z_i, rows, seeds, settings, facts)

    def judge(
        self, pictures: np.ndarray, model: Any = None, rows: Sequence[int] | None = None
    ) -> tuple[dict[str, float], list[dict]]:
        """The measures of the module's docstring; those of CLIP only with a model that has one.

        Returns:
          Means over the rows; and for each picture "nearest" (the name of an object) and, with
          CLIP, its probabilities of the three labels.
        """
        rows = self._rows(rows, pictures)
        small = base.resized(pictures, self.size).astype(np.float32)
        nearest = [int(np.argmin(np.square(self._small - one).mean((1, 2, 3)))) for one in small]
        facts = [{"nearest": self.prompts[number]} for number in nearest]
        hit = lambda k: np.mean([f["nearest"] == self.labels[r][k] for f, r in zip(facts, rows)])
        values = {
            "typographic.drawn.nearest_true": float(hit(0)),
            "typographic.drawn.nearest_pasted": float(hit(1)),
        }
        if model is None or "clip" not in model.parts:
            return values, facts
        sets = {
            "clean": [self.clean.read(row) for row in rows],
            "attacked": [self.attacked.read(row) for row in rows],
            "drawn": list(pictures),
        }
        for name, some in sets.items():
            shares = self.probabilities(model, some, rows)
            values[f"typographic.{name}.p_true"] = float(shares[:, 0].mean())
            values[f"typographic.{name}.p_pasted"] = float(shares[:, 1].mean())
        for fact, labels, row in zip(facts, shares, rows):
            fact |= {f"p({name})": round(float(p), 4) for name, p in zip(self.labels[row], labels)}
        return values, facts

    def probabilities(
        self, model: Any, pictures: Sequence[np.ndarray], rows: Sequence[int]
    ) -> np.ndarray:
        """CLIP's softmax over (true, pasted, control) of each row, float64 [n, 3]."""
        z_i = unit(embedded.embed(model, pictures))
        names = sorted({name for row in rows for name in self.labels[row]})
        z_t = dict(zip(names, unit(model.embed_text(names))))
        scale = float(np.exp(np.asarray(model.parts["clip"].params["logit_scale"])))
        candidates = np.stack([[z_t[name] for name in self.labels[row]] for row in rows])
        logits = scale * np.einsum("nd,nkd->nk", z_i, candidates)
        logits = np.exp(logits - logits.max(axis=1, keepdims=True))
        return logits / logits.sum(axis=1, keepdims=True)

    @cached_property
    def _small(self) -> np.ndarray:
        reference = self.reference()
        return np.stack([reference.read(row) for row in range(len(reference))]).astype(np.float32)


def _on_white(cutout: Image.Image) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]: a premultiplied cutout in the middle of white."""
    ratio = OBJECT * SIDE / max(cutout.size)
    shape = [max(1, round(side * ratio)) for side in cutout.size]
    layer = np.asarray(cutout.resize(shape, Image.Resampling.HAMMING), np.float32)
    canvas = np.full((SIDE, SIDE, 3), 255, np.float32)
    y, x = (SIDE - shape[1]) // 2, (SIDE - shape[0]) // 2
    place = canvas[y : y + shape[1], x : x + shape[0]]
    place *= 1 - layer[..., 3:] / 255
    place += layer[..., :3]
    return canvas.round().clip(0, 255).astype(np.uint8)


def paste_label(picture: np.ndarray, text: str) -> np.ndarray:
    """A picture with a white label across its middle, black text and border.

    Args:
      picture: uint8 [H, W, 3]; text: broken at spaces into at most two lines.

    Returns:
      uint8 [H, W, 3], the same outside the label.
    """
    canvas = Image.fromarray(picture)
    pen = ImageDraw.Draw(canvas)
    words = text.split()
    lines = [text] + [
        "\n".join((" ".join(words[:k]), " ".join(words[k:]))) for k in range(1, len(words))
    ]
    for size in FONT_SIZES:
        font = ImageFont.load_default(size * canvas.width / SIDE)
        boxes = {line: pen.multiline_textbbox((0, 0), line, font, align="center") for line in lines}
        line = min(lines, key=lambda one: boxes[one][2] - boxes[one][0])
        line = lines[0] if boxes[lines[0]][2] <= LABEL_WIDTH * canvas.width else line
        if boxes[line][2] - boxes[line][0] <= LABEL_WIDTH * canvas.width:
            break
    left, top, right, bottom = boxes[line]
    pad = canvas.width // 32
    x, y = (canvas.width - right - left) / 2, (canvas.height - bottom - top) / 2
    frame = (x + left - pad, y + top - pad, x + right + pad, y + bottom + pad)
    pen.rectangle(frame, fill="white", outline="black", width=max(1, canvas.width // 128))
    pen.multiline_text((x, y), line, "black", font, align="center")
    return np.array(canvas)
