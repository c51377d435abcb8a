"""Principal components of z_i, the basis that a picture is reconstructed in (figure 7)."""

import hashlib
import os
import pathlib
from typing import NamedTuple

import numpy as np

from unclip import errors
from unclip.cascade import bundle
from unclip.cascade.pipeline import Pipeline
from unclip.drawing.embedded import embedded
from unclip.embeddings import sums
from unclip.embeddings.store import FILE, Store
from unclip.files.moments import Moments
from unclip.measure.pictures import First, open_pictures
from unclip.tasks import codes

MAX_PICTURES = 10_000
PRIOR = "prior"  # the source of a bundle's own basis


class Basis(NamedTuple):
    """A fitted basis.

    Attributes:
      pca: of z_i in CLIP's own length.
      source: what it was fitted on, as it was named; "prior" for the autoregressive prior's own.
    """

    pca: codes.PCA
    source: str

    @property
    def sha256(self) -> str:
        """Of mean and components as float32, hex."""
        arrays = (self.pca.mean, self.pca.components)
        return hashlib.sha256(b"".join(np.float32(a).tobytes() for a in arrays)).hexdigest()


def open_basis(model: Pipeline, source: str | os.PathLike | None = None) -> Basis:
    """A basis for a model's z_i.

    Args:
      source: a folder of embeddings (`unclip embed`) by the model's CLIP; or pictures as
        `measure.pictures.open_pictures` takes them, of which the first 10,000 are embedded. None:
        that of the model's autoregressive prior.

    Raises:
      ConfigError: no source and no such prior, embeddings of another CLIP, too few of them.
      DataError: what cannot be read.
    """
    clip = model.need("clip", "a basis of z_i")
    if source is None:
        extra = model.parts["prior"].extra if "prior" in model.parts else {}
        if "components" not in extra:
            raise errors.ConfigError(
                "no basis: expected a folder of embeddings (unclip embed) or of pictures to find "
                "the principal components of; without one, a bundle with an autoregressive prior"
            )
        return Basis(codes.PCA(*(extra[name] for name in codes.PCA._fields)), PRIOR)
    if (pathlib.Path(source) / FILE).is_file():
        Store(source).check_clip(bundle.space(clip))
        found = sums.read(source)
        if "z_i" not in found:
            raise errors.ConfigError(f"{source}: fewer than 2 embeddings, no principal components")
        mean, covariance = found["z_i"].mean, found["z_i"].covariance
    else:
        pictures = open_pictures(source)
        seen = Moments(model.task("clip").model.embed_dim)
        for _, z_i in embedded(model, First(pictures, MAX_PICTURES)):
            seen.add(z_i)
        if seen.count < 2:
            raise errors.ConfigError(f"{source}: {seen.count} picture(s) to fit on, expected 2")
        mean, covariance = seen.mean(), seen.covariance()
    return Basis(codes.fit_pca(mean, covariance, dims=len(mean)), os.fspath(source))


def projected(pca: codes.PCA, z_i: np.ndarray, components: int) -> np.ndarray:
    """z_i float32 [..., D] on the first `components` alone."""
    first = codes.PCA(pca.mean, pca.components[:, :components], pca.scale[:components])
    return np.asarray(codes.decode(first, codes.encode(first, z_i)))
