"""The multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from ..likelihoods import Bernoulli, Likelihood
from ..vae import VAE, Encoder
from .parts import activation_called, check_shape, check_sizes, ends


def mlp(
    input_shape: Sequence[int],
    latent: int = 16,
    hidden: Sequence[int] = (300,),
    activation: str = "relu",
    likelihood: Likelihood | None = None,
) -> VAE:
    """Encoder x -> hidden -> heads, decoder z -> hidden reversed -> x, activation after every hidden layer.

    input_shape: any. hidden: sizes from the data to the latent, () for none. likelihood: Bernoulli unless given; the
    decoder's last layer is linear (logits, means, or whatever
    the likelihood takes).
    """
    shape = check_shape(input_shape)
    (latent,) = check_sizes("latent", [latent])
    likelihood = likelihood or Bernoulli()
    parameters = likelihood.parameter_shape(shape)
    sizes = (math.prod(shape), *check_sizes("hidden", hidden))
    act = activation_called(activation)
    down = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), act())]
    up = [layer for a, b in pairwise((latent, *sizes[:0:-1])) for layer in (nn.Linear(a, b), act())]
    last = sizes[1] if len(sizes) > 1 else latent
    encoder = Encoder(nn.Sequential(nn.Flatten(), *down), sizes[-1], latent)
    decoder = nn.Sequential(*up, nn.Linear(last, math.prod(parameters)), nn.Unflatten(1, parameters))
    return VAE(encoder, decoder, likelihood, latent, shape, ends(decoder))
