"""The categorical likelihood of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.storage import Rows
from .base import Beta, Likelihood
from .numerics import full_precision


class TextCategorical(Likelihood):
    """Sequences of categories (tokens) from 0 to V - 1; `parameters` are logits l, (N, T, V), p = softmax(l).

    distortion = -sum_{t: x_t != padding} log p_t(x_t)

    in nats a sequence: what ends a sentence counts as a token of it, padding does not. x: (N, T), integers; the mean is
    of one-hot vectors, (N, T, V), and a sample, (N, T), int64, has a category everywhere.
    """

    name = "tokens"
    measure = "tokens"

    def __init__(self, padding: int = 0):
        super().__init__()
        self.padding = padding

    def parameter_shape(self, input_shape: Sequence[int]) -> tuple[int, ...]:
        """(T, V), as a TextDataset's input_shape is."""
        return tuple(input_shape)

    def distortion(self, parameters: Tensor, x: Tensor, beta: Beta | None = None) -> Tensor:
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

    def sample(
        self, parameters: Tensor, generator: torch.Generator | None = None, beta: Beta | None = None
    ) -> Tensor:
        probabilities = self.mean(parameters)
        drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
        return drawn.view(probabilities.shape[:-1])

    def check_data(self, x: Rows) -> None:
        dtype = x.dtype
        if dtype.is_floating_point or len(x.shape) != 2:
            raise ValueError(
                f"the data are {dtype}, shape {tuple(x.shape)}; a likelihood of tokens expected whole numbers, (N, T), "
                "as vocabulary.encode(sentences) makes them"
            )

    def extra_repr(self) -> str:
        return f"padding={self.padding}"


Categorical = TextCategorical

MOST_NATS = 709.0
"""e^709 is near the largest float64."""


def perplexity(nats: float, tokens: float) -> float:
    """exp(nats / tokens) of sentences that cost `nats` altogether and have so many tokens, their ends counted in.

    inf above e^MOST_NATS, and nan of nan.
    With nats = rate + distortion, an upper bound of a VAE's perplexity. ValueError without a token.
    """
    if not tokens > 0:
        raise ValueError(f"tokens is {tokens}; expected the number of tokens, at least 1")
    each = nats / tokens
    return math.inf if each > MOST_NATS else math.exp(each)
