"""Likelihoods p(x | z): what the decoder's output means, and what it costs in nats.

A likelihood turns the decoder's output (`parameters`, shape (N, *input_shape)) into

- `distortion(parameters, x)` = -log p(x | z), shape (N,), in nats, summed over an example's dimensions;
- `mean(parameters)`, the expected x, and `sample(parameters)`, a draw of x, both of the shape of `parameters`.

Sequences of categories (`Categorical`) are the exception: one parameter a category, so one axis more than x has.

Half-precision parameters are taken to float32 first: a sum over thousands of dimensions loses digits in 16 bits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def full_precision(x: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_shapes(parameters: Tensor, x: Tensor) -> None:
    # Without this a (N, 1, H, W) target would broadcast against (N, 3, H, W) parameters without a word.
    if parameters.shape != x.shape:
        raise ValueError(
            f"the decoder's output has shape {tuple(parameters.shape)} and the data {tuple(x.shape)}; "
            "expected the same shape: build the network for the data's shape, e.g. build(name, dataset.input_shape)"
        )


class Bernoulli(nn.Module):
    """Independent Bernoulli pixels; `parameters` are logits l, p = sigmoid(l).

    distortion = -sum_i [x_i log p_i + (1 - x_i) log(1 - p_i)]

    A decoder for it ends without a sigmoid. Targets are 0 or 1; any real x in [0, 1] is accepted too, and then this is
    the usual continuous relaxation (cross-entropy against x), which is not the log of a normalised density.
    """

    def distortion(self, parameters: Tensor, x: Tensor) -> Tensor:
        _check_shapes(parameters, x)
        logits = full_precision(parameters)
        losses = F.binary_cross_entropy_with_logits(logits, x.to(logits.dtype), reduction="none")
        return losses.flatten(1).sum(1)

    def mean(self, parameters: Tensor) -> Tensor:
        return torch.sigmoid(full_precision(parameters))

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self.mean(parameters), generator=generator)


class Gaussian(nn.Module):
    """Independent Gaussian pixels with one fixed standard deviation; `parameters` are the means.

    distortion = 1/2 sum_i (x_i - mean_i)^2 / sigma^2 + d/2 log(2 pi sigma^2),    d = dimensions of an example

    Convention: half the squared error. With sigma = 1, minimising distortion + beta * rate is minimising the negative
    ELBO of a decoder with sigma^2 = beta (up to the factor beta and a constant). Code that leaves out the 1/2 reaches
    the same point at twice this beta.

    sigma: positive and finite; anything else raises ValueError.
    """

    def __init__(self, sigma: float = 1.0):
        super().__init__()
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"sigma is {sigma}; expected a positive, finite standard deviation, e.g. 1.0")
        self.sigma = float(sigma)

    def distortion(self, parameters: Tensor, x: Tensor) -> Tensor:
        _check_shapes(parameters, x)
        mean = full_precision(parameters)
        squared_error = (x.to(mean.dtype) - mean).square().flatten(1).sum(1)
        dimensions = math.prod(mean.shape[1:])
        constant = 0.5 * dimensions * math.log(2 * math.pi * self.sigma**2)
        return 0.5 * squared_error / self.sigma**2 + constant

    def mean(self, parameters: Tensor) -> Tensor:
        return full_precision(parameters)

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean = full_precision(parameters)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return mean + self.sigma * noise

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}"


class Categorical(nn.Module):
    """Sequences of categories (tokens) from 0 to V - 1; `parameters` are logits l, (N, T, V), p = softmax(l).

    distortion = -sum_{t: x_t != padding} log p_t(x_t)

    in nats a sequence: what ends a sentence counts as a token of it, padding does not. x: (N, T), integers; the mean is
    of one-hot vectors, (N, T, V), and a sample, (N, T), int64, has a category everywhere.
    """

    def __init__(self, padding: int = 0):
        super().__init__()
        self.padding = padding

    def distortion(self, parameters: Tensor, x: Tensor) -> Tensor:
        if parameters.dim() != 3 or parameters.shape[:2] != x.shape or x.is_floating_point():
            raise ValueError(
                f"the decoder's output has shape {tuple(parameters.shape)} and the data {tuple(x.shape)}, {x.dtype}; "
                "expected (N, T, V) and (N, T), integers"
            )
        logits = full_precision(parameters)
        losses = F.cross_entropy(logits.flatten(0, 1), x.flatten(), ignore_index=self.padding, reduction="none")
        return losses.view(x.shape).sum(1)

    def mean(self, parameters: Tensor) -> Tensor:
        return full_precision(parameters).softmax(-1)

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        probabilities = self.mean(parameters)
        drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
        return drawn.view(probabilities.shape[:-1])

    def extra_repr(self) -> str:
        return f"padding={self.padding}"


def perplexity(nats: float, tokens: float) -> float:
    """exp(nats / tokens) of sentences that cost `nats` altogether and have so many tokens, their ends counted in.

    With nats = rate + distortion, an upper bound of a VAE's perplexity. ValueError without a token.
    """
    if not tokens > 0:
        raise ValueError(f"tokens is {tokens}; expected the number of tokens, at least 1")
    return math.exp(nats / tokens)


Likelihood = Bernoulli | Gaussian | Categorical


def likelihood(name: str, sigma: float | None = None) -> Likelihood:
    """The likelihood called `name`: "bernoulli", or "gaussian" with `sigma` (1.0 unless given)."""
    if name == "bernoulli":
        if sigma is not None:
            raise ValueError(
                f"sigma={sigma} given for a Bernoulli likelihood, which has none; use likelihood='gaussian'"
            )
        return Bernoulli()
    if name == "gaussian":
        return Gaussian(1.0 if sigma is None else sigma)
    raise ValueError(f"likelihood {name!r} is not known; expected 'bernoulli' or 'gaussian'")
