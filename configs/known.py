"""What is known of presets: published FID, and expected seconds a step on named hardware.

`config.known` holds a preset's entry; `unclip doctor` prints it, and nothing else reads it. A
preset of which nothing is known has no entry. tests/test_configs.py holds the seconds against the
table of docs/compile.md.
"""

from ml_collections import ConfigDict

_UNCLIP = "arXiv 2204.06125, Table 2"
_COCO = "MS-COCO 256x256, 30k"


def _fid(whose: str, value: float, source: str) -> dict:
    """One published distance; `whose` names the cascade, for a single stage has none."""
    return {"what": f"zero-shot FID of {whose}", "value": value, "source": source}


_WITH = f"prior, decoder guidance 1.25, {_COCO}"
_DIFFUSION_PRIOR = (
    _fid(f"unCLIP with the diffusion {_WITH}", 10.39, _UNCLIP),
    _fid(f"unCLIP with the diffusion {_WITH}, filtered", 10.87, _UNCLIP),
)
_AR_PRIOR = (
    _fid(f"unCLIP with the AR {_WITH}", 10.63, _UNCLIP),
    _fid(f"unCLIP with the AR {_WITH}, filtered", 11.08, _UNCLIP),
)
_KARLO = (
    _fid("Karlo, 50 steps, MS-COCO, 30k", 14.43, "Karlo's README"),
    _fid("Karlo, 25 steps, MS-COCO, 30k", 15.24, "Karlo's README"),
)
_GLIDE = (
    _fid(f"GLIDE, {_COCO}", 12.24, _UNCLIP),
    _fid(f"GLIDE, {_COCO}, filtered", 12.89, "GLIDE's paper"),
)
_IMAGEN = (
    _fid(
        f"Imagen, guidance 1.35 and 8.0 in its upsamplers, {_COCO}",
        7.27,
        "arXiv 2205.11487, as others quote it",
    ),
)


def _estimates(batch: int, seconds: dict[str, float]) -> tuple[dict, ...]:
    """Rows of docs/compile.md: {topology: seconds}, each of 64 chips."""
    return tuple(
        {
            "hardware": f"64 x TPU {topology.partition(':')[0]} (the compiler's estimate)",
            "batch": batch,
            "seconds": value,
            "source": "docs/compile.md",
        }
        for topology, value in seconds.items()
    )


# stage -> argument of its config -> {"published": …, "seconds_per_step": …}
KNOWN = {
    "clip": {
        "ViT-H/16": {
            "seconds_per_step": _estimates(
                32_768, {"v4:4x4x4": 20.66, "v5e:8x8": 24.29, "v5p:4x4x4": 16.44, "v6e:8x8": 16.09}
            ),
        },
    },
    "prior": {
        "karlo": {"published": _KARLO},
        "paper": {
            "published": _DIFFUSION_PRIOR,
            "seconds_per_step": _estimates(
                4096, {"v4:4x4x4": 1.59, "v5e:8x8": 1.84, "v5p:4x4x4": 0.70, "v6e:8x8": 1.01}
            ),
        },
        "paper,kind=ar": {
            "published": _AR_PRIOR,
        },
    },
    "decoder": {
        "karlo": {"published": _KARLO},
        "paper": {
            "published": _DIFFUSION_PRIOR + _AR_PRIOR,
            "seconds_per_step": _estimates(2048, {"v5p:4x4x4": 0.94}),
        },
        "glide": {"published": _GLIDE},
        "imagen": {"published": _IMAGEN},
    },
    "upsampler": {
        "karlo": {"published": _KARLO},
        "paper-256": {"published": _DIFFUSION_PRIOR + _AR_PRIOR},
    },
}


def of(stage: str, argument: str) -> ConfigDict:
    """What is known of one preset, as `config.known`; empty where nothing is.

    Args:
      stage: clip, prior, decoder or upsampler.
      argument: the preset by the name of its architecture, with what else makes it another model.
    """
    return ConfigDict(KNOWN[stage].get(argument, {}))
