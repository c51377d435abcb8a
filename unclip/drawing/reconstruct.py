"""A picture from the first principal components of its embedding (figure 7 of the paper)."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from unclip import errors
from unclip.cascade.pipeline import Pictures, Pipeline, seeds_of
from unclip.drawing import base
from unclip.drawing.basis import PRIOR, Basis, open_basis, projected
from unclip.files import images


def reconstruct(
    model: Pipeline,
    image: base.Image,
    components: int | Sequence[int],
    seed: int = 0,
    *,
    basis: Basis | str | os.PathLike | None = None,
    decoder: dict | None = None,
    upsamplers: Sequence[dict] = (),
    stages: int | None = None,
) -> Pictures:
    """Draws z_i of a picture on its first principal components: few keep its subject alone.

    Args:
      image: as in `variations`.
      components: how many, or several numbers for a picture each.
      seed: of all pictures, 0 <= seed < 2**32: the decoder's noise is one and the same.
      basis: see `basis.open_basis`; fit it once with that for many pictures.
      Other arguments as in `variations`.

    Returns:
      `Pictures`, whose recipes hold the "components" of each, and name of the basis "basis" and
      "basis_sha256".

    Raises:
      ConfigError: as `variations`, no basis, or more components than it has.
    """
    base.need_z_i(model, "reconstructions")
    source, (seed,) = base.as_source(image), seeds_of(seed, 1)
    wanted = [components] if np.ndim(components) == 0 else list(components)
    base.count(len(wanted), "numbers of components")
    for k in wanted:
        base.count(k, "components")
    settings = {"decoder": decoder, "upsamplers": upsamplers, "stages": stages}
    base.check(model, **settings)
    if not isinstance(basis, Basis):
        basis = open_basis(model, basis)
    width, most = basis.pca.components.shape
    if width != model.task("clip").model.embed_dim or max(wanted) > most:
        raise errors.ConfigError(
            f"components={max(wanted)}: the basis {basis.source!r} has {most} of z_i with {width} "
            f"numbers; this model's z_i has {model.task('clip').model.embed_dim}"
        )
    model = model.drawing(len(wanted))
    z_i = base.embed(model, [source])[0]
    z = np.stack([projected(basis.pca, z_i, k) for k in wanted])
    named = {"basis": basis.source, "basis_sha256": basis.sha256}
    facts = [{"components": int(k), **named} for k in wanted]
    return base.draw(model, "reconstruct", z, [seed] * len(wanted), [source], facts, **settings)


def redraw(
    model: Pipeline,
    recipe: Mapping,
    sources: Sequence[images.Source],
    settings: dict,
    basis: Basis | str | os.PathLike | None = None,
) -> Pictures:
    """The picture of a recipe; its basis is fitted again where it is not given.

    Raises:
      ConfigError: another basis than the recipe's.
    """
    named, digest = recipe.get("basis"), recipe.get("basis_sha256")
    if not isinstance(named, str):
        raise errors.ConfigError(f"the recipe's basis is {named!r}: expected its name")
    if not isinstance(basis, Basis):
        try:
            basis = open_basis(model, basis or (None if named == PRIOR else named))
        except errors.UnclipError as error:
            raise errors.ConfigError(f"the recipe's basis {named!r}: {error.message}") from error
    if basis.sha256 != digest:
        raise errors.ConfigError(
            f"the recipe's basis is {named!r} ({digest}), {basis.source!r} is {basis.sha256}"
        )
    basis = basis._replace(source=named)
    k = recipe.get("components")
    return reconstruct(model, *sources, k, recipe["seed"], basis=basis, **settings)
