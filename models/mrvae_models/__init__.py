"""Variational autoencoders, data, training and rate-distortion curves on top of `mrvae_kernels`.

    from mrvae_models import build, data
    digits = data.load("digits", split="train")
    vae = build("mlp", digits.input_shape)

Public names are imported when first used, so that `import mrvae_models` (and `mrvae --help`) does not load torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULE_OF = {
    "Bernoulli": "likelihoods",
    "Gaussian": "likelihoods",
    "Categorical": "likelihoods",
    "perplexity": "likelihoods",
    "build": "networks",
    "VAE": "vae",
    "VAEOutput": "vae",
    "Encoder": "vae",
    "Objective": "objectives",
    "beta_vae": "objectives",
    "rate": "objectives",
    "sample_beta": "objectives",
    "TrainConfig": "training",
    "train": "training",
    "Curve": "curve",
    "evaluate": "curve",
    "select_beta": "selection",
}
_MODULES = ("conventions", "curve", "data", "likelihoods", "metrics", "networks", "objectives", "training", "vae")

__all__ = sorted([*_MODULE_OF, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
