"""Names of the networks, for help and options that are made without torch; `networks.NETWORKS` has their functions."""

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

DEFAULT_LIKELIHOODS = {
    "sigma-cnn": "gaussian-optimal",
    "bs-vae": "gaussian-image",
    "hvae": "gaussian-optimal",
    "svg-lp": "gaussian-optimal",
}
"""Of the networks whose default depends on beta: a run names it, so that its sigma becomes a function of beta."""
