"""unCLIP (DALL-E 2, arXiv 2204.06125) in JAX/Flax: train the cascade, draw from it, measure it."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`from unclip import UnCLIP` and `images` without importing JAX for `unclip --help`."""
    if name == "UnCLIP":
        from unclip.drawing.model import UnCLIP

        return UnCLIP
    if name == "images":
        from unclip.files import images

        return images
    raise AttributeError(f"module 'unclip' has no attribute {name!r}")
