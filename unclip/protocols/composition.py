"""Composed scenes as captions, and how much of each caption a drawing shows.

Measures what section 7 of arXiv 2204.06125 names as weaknesses of unCLIP: binding attributes to
objects, and relations. Captions are of scenes whose every fact is known (`scenes.Composer`), many
of them of combinations that training never shows, and `Detector` finds the same facts in the
drawing. A fact holds or not; accuracies are shares of facts.

    objects       named objects that are found
    size          named objects that are found at the size named
    background    pictures with the background colour named
    relation      pairs with both objects found, in the relation named
    nothing_else  pictures without an object that is not named
    all           pictures in which all of these hold

`ceiling` are the same shares for the true pictures of these captions, which the judge cannot exceed
at this size, and `chance` those for true pictures of other captions of the list.
"""

import hashlib
import itertools
import pathlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from unclip import errors
from unclip.measure.picture_set import PictureSet
from unclip.protocols import base
from unclip.protocols.detector import Detector, Found
from unclip.protocols.scenes import PAIR_SIZES, RELATIONS, SIZES, WITHHELD_COLOURS, Composer

MAX_SCENES = 100_000
MAX_SIDE = 1024
JUDGED_SIDE = 64  # larger drawings are judged at this size
CALIBRATION = 256  # true pictures, at most, from which ceiling and chance are computed
MEASURES = ("all", "objects", "size", "background", "relation", "nothing_else")
ALL_SIZES = {*SIZES, *(f"{one}, {other}" for one in PAIR_SIZES for other in PAIR_SIZES)}
_COLOURS = {f"{name} on {colour}" for name, colour in WITHHELD_COLOURS}


class Scenes(base.EvaluationProtocol):
    """Scenes number 0 to count - 1 of a seed, drawn from their captions.

    Args:
      count: how many; seed: of the composer, not 0, which training scenes usually have.
      size: side at which pictures are composed and compared.
      folder: where the emoji's training shards are; None: data/emoji.
      withheld: only scenes with a combination that training scenes never show.
      sizes: only scenes whose objects have these sizes, such as ("large", "huge") for one object
        that is at least large, or ("small, large",); () for all.

    Raises:
      ConfigError: a value out of range; DataError: shards that are missing or damaged.
    """

    def __init__(
        self,
        count: int = 500,
        seed: int = 1,
        size: int = 64,
        folder: str | None = None,
        withheld: bool = False,
        sizes: Sequence[str] = (),
    ):
        if not 1 <= count <= MAX_SCENES:
            raise errors.ConfigError(f"{count} scenes: expected 1 to {MAX_SCENES}")
        if size > MAX_SIDE:
            raise errors.ConfigError(f"scenes of {size} pixels: expected 16 to {MAX_SIDE}")
        given, folder = folder, base.EMOJI if folder is None else pathlib.Path(folder)
        self._composer = Composer(folder, size=size, seed=seed, withheld=withheld)
        self._detector = Detector(self._composer.cutouts, min(size, JUDGED_SIDE))
        wanted, sizes = set(sizes), tuple(sizes)
        if not wanted <= ALL_SIZES:
            raise errors.unknown("sizes", sorted(wanted - ALL_SIZES)[0], ALL_SIZES)
        composed = ((i, *self._composer.scene(i)[1:]) for i in itertools.count())
        chosen = (row for row in composed if not wanted or row[2]["sizes"] in wanted)
        numbers, *scenes = zip(*itertools.islice(chosen, count))
        self._numbers, scenes = numbers, list(zip(*scenes))
        prompts = [caption for caption, _ in scenes]
        self._records = [record for _, record in scenes]
        name, marked = "scenes-withheld" if withheld else "scenes", base.folder_mark(given)
        kinds = [_kinds(record) for record in self._records]
        super().__init__(
            ".".join([name + marked, f"seed{seed}", f"n{count}", f"size{size}", *_dotted(sizes)]),
            prompts,
            [f"{index:08d}" for index in numbers],
            size,
            {
                "seed": seed,
                "sizes": list(sizes),
                "withheld": withheld,
                "judged_at": self._detector.size,
                "kinds": {
                    kind: sum(kind in k for k in kinds) for kind in sorted(set().union(*kinds))
                },
                "calibrated_on": min(count, CALIBRATION),
            },
        )

    def reference(self) -> PictureSet:
        """The composed scenes themselves."""
        return _ScenePictures(self)

    def judge(
        self, pictures: np.ndarray, model: Any = None, rows: Sequence[int] | None = None
    ) -> tuple[dict[str, float], list[dict]]:
        """Shares of facts, named "composition.MEASURE", ".KIND.MEASURE", ".ceiling", ".chance".

        Args:
          pictures: uint8 [n, H, W, 3], one per row; model: not used; rows: None for all.

        Returns:
          The shares over the rows; and for each picture what `facts` gives.
        """
        rows = self._rows(rows, pictures)
        facts = [
            self.facts(row, *self._detector(picture))
            for row, picture in zip(rows, base.resized(pictures, self._detector.size))
        ]
        values = _shares("composition", facts)
        for kind in self.provenance["kinds"]:
            some = [f for row, f in zip(rows, facts) if kind in _kinds(self._records[row])]
            values |= _shares(f"composition.{kind}", some)
        return values | self._calibration, facts

    def facts(self, row: int, background: str, found: list[Found]) -> dict:
        """Which facts of a row's caption hold for what was found in a picture.

        Returns:
          "objects", "size": a bool for every named object; "background", "nothing_else", "all":
          bool; "relation": bool, absent where the caption has none; "seen": in words.
        """
        record = self._records[row]
        named = record["objects"]
        by_name = {one.name: one for one in sorted(found, key=lambda one: one.fit)}
        present = [entry["name"] in by_name for entry in named]
        facts = {
            "objects": present,
            "size": [
                here and by_name[entry["name"]].size == entry["size"]
                for here, entry in zip(present, named)
            ],
            "background": background == record["background"]["name"],
            "nothing_else": len(found) == sum(present),  # a second copy counts as something else
        }
        if record["relation"]:
            facts["relation"] = all(present) and record["relation"] == relation(
                *(by_name[entry["name"]].box for entry in named)
            )
        facts["all"] = all(np.all(value) for value in facts.values())
        words = [f"{one.size} {one.name}" for one in found]
        if len(found) == 2:
            words.insert(1, relation(found[0].box, found[1].box))
        return facts | {"seen": f"{' '.join(words) or 'nothing'} on {background}"}

    @cached_property
    def _calibration(self) -> dict[str, float]:
        """ "composition.ceiling.…" and "composition.chance.…"."""
        count = self.provenance["calibrated_on"]
        pictures = np.stack([self.reference().read(row) for row in range(count)])
        seen = [self._detector(p) for p in base.resized(pictures, self._detector.size)]
        true = [self.facts(row, *seen[row]) for row in range(count)]
        other = [self.facts(row, *seen[(row + 1) % count]) for row in range(count)]
        return _shares("composition.ceiling", true) | _shares("composition.chance", other)


def withheld_scenes(
    count: int = 500,
    seed: int = 0,
    size: int = 64,
    folder: str | None = None,
    sizes: Sequence[str] = (),
) -> Scenes:
    """`Scenes` that each hold a withheld combination; no training scene is among them."""
    return Scenes(count, seed, size, folder, withheld=True, sizes=sizes)


class _ScenePictures(PictureSet):
    """Scenes by number, composed when they are read."""

    def __init__(self, protocol: Scenes):
        super().__init__(protocol.id, len(protocol.keys))
        self._protocol = protocol

    def name(self, i: int) -> str:
        """The protocol's key."""
        return self._protocol.keys[i]

    def caption(self, i: int) -> str:
        """The protocol's caption."""
        return self._protocol.prompts[i]

    @property
    def fingerprint(self) -> str:
        """The protocol's id, which says all of how scenes are composed."""
        return hashlib.sha256(self._protocol.id.encode()).hexdigest()

    def _load(self, i):
        return np.array(self._protocol._composer.scene(self._protocol._numbers[i])[0]), 0


def relation(first: Sequence[int], second: Sequence[int]) -> str:
    """The relation of the first box to the second, on the axis where their centres differ more."""
    delta = [first[axis] + first[axis + 2] - second[axis] - second[axis + 2] for axis in (0, 1)]
    axis = int(abs(delta[1]) > abs(delta[0]))
    wanted = (axis, 1 if delta[axis] > 0 else -1)
    return next(words for words, place in RELATIONS.items() if place == wanted)


def _dotted(sizes: Sequence[str]) -> list[str]:
    """The part of an id that names the sizes."""
    return ["+".join(name.replace(", ", "-") for name in sizes)] if sizes else []


def _kinds(record: dict) -> set[str]:
    """What a scene tests: "single" or "pair", "withheld-colour", "withheld-relation"."""
    kinds = {"pair" if record["relation"] else "single"}
    for combination in record["withheld"]:
        kinds.add("withheld-colour" if combination in _COLOURS else "withheld-relation")
    return kinds


def _shares(name: str, facts: list[dict]) -> dict[str, float]:
    """{"NAME.MEASURE": share of the facts that hold}, without measures that no picture has."""
    shares = {}
    for measure in MEASURES:
        held = [value for f in facts if measure in f for value in np.atleast_1d(f[measure])]
        if held:
            shares[f"{name}.{measure}"] = float(np.mean(held))
    return shares
