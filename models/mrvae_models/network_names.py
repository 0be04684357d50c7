"""Names of the networks, for help that is made without torch; `networks.NETWORKS` has their functions."""

from __future__ import annotations

NETWORK_NAMES = (
    "linear",
    "mlp",
    "cnn",
    "resnet",
    "tcvae-mlp",
    "tcvae-conv",
    "sigma-cnn",
    "bs-vae",
    "nvae",
    "hvae",
    "svg-lp",
    "lstm",
)
