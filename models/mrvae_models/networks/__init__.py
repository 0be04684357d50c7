"""Encoder and decoder pairs, by name.

    vae = build("cnn", (3, 32, 32), latent=256)

A network is a function of the data's shape that returns a `VAE`, or for more than one latent vector, for videos or for
text, a module with the same face (see `vae.Output`, `hierarchy.Hierarchy`, `svg.SVG` and `lstm.SentenceVAE`).
`NETWORKS` is the list of them. To add one, write the function in a file of its own and name it there and in
network_names.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..data import Rows
from ..likelihoods import Likelihood
from ..likelihoods import likelihood as likelihood_called
from .bs_vae import bs_vae
from .cnn import cnn
from .hvae import hvae
from .linear import Centre, linear
from .lstm import lstm
from .mlp import mlp
from .nvae import nvae
from .resnet import resnet
from .sigma_cnn import sigma_cnn
from .svg import svg_lp
from .tcvae import tcvae_conv, tcvae_mlp

NETWORKS: dict[str, Callable[..., Any]] = {
    "linear": linear,
    "mlp": mlp,
    "cnn": cnn,
    "resnet": resnet,
    "tcvae-mlp": tcvae_mlp,
    "tcvae-conv": tcvae_conv,
    "sigma-cnn": sigma_cnn,
    "bs-vae": bs_vae,
    "nvae": nvae,
    "hvae": hvae,
    "svg-lp": svg_lp,
    "lstm": lstm,
}
"""`network_names.NETWORK_NAMES` has the same names."""

__all__ = [
    "NETWORKS",
    "bs_vae",
    "build",
    "cnn",
    "hvae",
    "linear",
    "lstm",
    "mlp",
    "nvae",
    "resnet",
    "sigma_cnn",
    "start_from",
    "svg_lp",
    "tcvae_conv",
    "tcvae_mlp",
]


def build(
    name: str,
    input_shape: Sequence[int],
    latent: int | None = None,
    *,
    likelihood: str | Likelihood | None = None,
    sigma: float | None = None,
    likelihood_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """The network called `name` for data of shape (N, *input_shape).

    latent: its dimensions; None takes the network's default. likelihood: a name of likelihoods.LIKELIHOODS, with
    `sigma` and `likelihood_options` for its constructor, an instance, or None for the network's default. options: the
    network's own, e.g. hidden=(300,) for "mlp".
    Raises ValueError for a name or option that is not known and for sizes that cannot work.
    """
    if name not in NETWORKS:
        raise ValueError(f"network {name!r} is not known; expected one of {', '.join(NETWORKS)}")
    network = NETWORKS[name]
    own = set(inspect.signature(network).parameters) - {"input_shape", "latent", "likelihood"}
    if unknown := sorted(set(options) - own):
        raise ValueError(f"network {name!r} has no option {unknown[0]!r}; it has {', '.join(sorted(own)) or 'none'}")
    if isinstance(likelihood, str):
        likelihood = likelihood_called(likelihood, sigma, **(likelihood_options or {}))
    elif likelihood_options:
        raise ValueError(
            f"likelihood_options={likelihood_options} need a likelihood's name; likelihood is {likelihood!r}"
        )
    elif sigma is not None:
        raise ValueError(f"sigma={sigma} needs likelihood='gaussian'; likelihood is {likelihood!r}")
    given = {"latent": latent, "likelihood": likelihood}
    return network(tuple(input_shape), **{key: value for key, value in given.items() if value is not None}, **options)


def start_from(network: nn.Module, images: Rows) -> None:
    """Sets what a network takes from its training data, (N, *input_shape), before training: mu of "linear".

    Networks without such parts are left as they are.
    """
    for module in network.modules():
        if isinstance(module, Centre):
            module.start_from(images)
