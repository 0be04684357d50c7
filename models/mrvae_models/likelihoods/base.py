"""What a likelihood p(x | z) is: the meaning of the decoder's output, and its price in nats."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..data.storage import Rows
from .numerics import HIGHEST, full_precision

CONTINUOUS, LEVELS_256 = "continuous", "256 levels"
"""Measures: a density of x on its own scale, [0, 1] for images, or a probability of its 256 levels, x = level / 255."""

Beta = float | Tensor
"""A KL weight: a number, a 0-d tensor, or one an example, (N,)."""


class Likelihood(nn.Module, abc.ABC):
    """A distribution p(x | z) of N examples, given by the decoder's output: `parameters`, (N, *parameter_shape).

    name       on the command line
    measure    what exp(log_prob) is a density against: CONTINUOUS, Lebesgue's on x's own scale; LEVELS_256, the
               counting measure of 256 levels, so a probability; "2 levels" and "tokens" likewise. convert() leads from
               one of the first two to the other
    normalised whether exp(log_prob) integrates, or sums, to one over x

    All in nats, summed over an example's dimensions, never averaged. Half-precision parameters are taken to float32
    first: a sum over thousands of dimensions loses digits in 16 bits.
    beta: the KL weight that the parameters were made at. A likelihood whose sigma depends on it (`depends_on_beta`) has
    no value without; all others ignore it.
    """

    name: str
    measure: str
    normalised: bool = True
    numbers: int = 1
    """Of `parameters` for each value of x."""

    def parameter_shape(self, input_shape: Sequence[int]) -> tuple[int, ...]:
        """The decoder's output for one example: input_shape, its first axis k times as long for k numbers a value.

        The first C entries of that axis are the first number of each of the C channels, the next C the second.
        """
        return (self.numbers * input_shape[0], *input_shape[1:])

    @abc.abstractmethod
    def distortion(self, parameters: Tensor, x: Tensor, beta: Beta | None = None) -> Tensor:
        """-log p(x | z), (N,), in nats. ValueError where the shapes of parameters and x do not belong together."""

    def log_prob(self, parameters: Tensor, x: Tensor, beta: Beta | None = None) -> Tensor:
        """log p(x | z), (N,), in nats: -distortion."""
        return -self.distortion(parameters, x, beta)

    @abc.abstractmethod
    def mean(self, parameters: Tensor) -> Tensor:
        """E[x | z], in data space, of x's shape."""

    @abc.abstractmethod
    def sample(
        self, parameters: Tensor, generator: torch.Generator | None = None, beta: Beta | None = None
    ) -> Tensor:
        """A draw of x, in data space, of x's shape."""

    @abc.abstractmethod
    def check_data(self, x: Rows) -> None:
        """ValueError, saying what to do, for data (N, *input_shape) of another range or measure than this one's."""

    @property
    def depends_on_beta(self) -> bool:
        """Whether distortion() and sample() need beta."""
        return False

    def at(self, beta: float) -> Likelihood:
        """That of the plain network at one beta: itself, or where it depends on beta, a copy with one sigma."""
        return self

    def check_memory(self, examples: int, input_shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        """ValueError where a training step of so many examples would need more memory than there is."""

    def _check(self, parameters: Tensor, x: Tensor) -> None:
        # Without this a (N, 1, H, W) target would broadcast against (N, 3, H, W) parameters without a word.
        if parameters.shape[0] != x.shape[0] or parameters.shape[1:] != self.parameter_shape(x.shape[1:]):
            found = f"the decoder's output has shape {tuple(parameters.shape)} and the data {tuple(x.shape)}"
            expected = "the same shape" if self.numbers == 1 else f"{self.numbers} channels for each of the data's"
            raise ValueError(
                f"{found}; {self.name} expected {expected}: build the network for the data's shape and this likelihood,"
                f" e.g. build(name, dataset.input_shape, likelihood={self.name!r})"
            )

    def _numbers(self, parameters: Tensor) -> tuple[Tensor, ...]:
        """The numbers of each value, in full precision: `numbers` tensors of x's shape."""
        if parameters.shape[1] % self.numbers:
            raise ValueError(
                f"the decoder's output has shape {tuple(parameters.shape)}; {self.name} expected a multiple of "
                f"{self.numbers} channels: build the network for this likelihood"
            )
        return full_precision(parameters).chunk(self.numbers, dim=1)


def convert(nats: Tensor | float, dimensions: int, source: str, target: str) -> Tensor | float:
    """A -log p of `dimensions` values in the measure `source` as one in `target`: CONTINUOUS or LEVELS_256.

        -log P(levels) = -log p(x) + dimensions * log 255

    for a density that is even over a bin of width 1 / 255, the distance of two levels of x = level / 255. (A density on
    the scale 0 to 256 of x + noise, as bits per dimension are often given, has log 256.) ValueError for other measures.
    """
    for measure in (source, target):
        if measure not in (CONTINUOUS, LEVELS_256):
            raise ValueError(f"measure {measure!r} cannot be converted; expected {CONTINUOUS!r} or {LEVELS_256!r}")
    return nats + dimensions * math.log(HIGHEST) * ((target == LEVELS_256) - (source == LEVELS_256))
