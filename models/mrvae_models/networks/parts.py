"""What every network needs: checks of its sizes, and layers by name."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from ..likelihoods import Bernoulli, Likelihood
from ..likelihoods.numerics import is_number

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "leaky_relu": nn.LeakyReLU,
    "leaky_relu_0.2": functools.partial(nn.LeakyReLU, 0.2),
    "elu": nn.ELU,
}


def activation_called(name: str) -> Callable[[], nn.Module]:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not known; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def norm_layers(name: str, channels: int) -> list[nn.Module]:
    """The norm after a convolution, as a list of none or one. "group": 8 groups, fewer where 8 does not divide."""
    if name == "batch":
        return [nn.BatchNorm2d(channels)]
    if name == "group":
        return [nn.GroupNorm(math.gcd(8, channels), channels)]
    if name == "none":
        return []
    raise ValueError(f"norm {name!r} is not known; expected 'batch', 'group' or 'none'")


def ends(decoder: nn.Sequential) -> tuple[str, ...]:
    """The posterior's heads and the decoder's first and last layer, which the MR-VAE authors' runs leave ungated.

    Contrary to "each layer" of the paper; without them come the parameters of its Table 1.
    """
    layers = [name for name, module in decoder.named_children() if any(True for _ in module.parameters())]
    return "encoder.mean", "encoder.log_variance", f"decoder.{layers[0]}", f"decoder.{layers[-1]}"


def check_sizes(what: str, sizes: int | Sequence[int]) -> tuple[int, ...]:
    """`sizes`, or one size, as a tuple, after making sure that each is a whole number above 0; else ValueError."""
    if isinstance(sizes, numbers.Integral):
        sizes = (int(sizes),)
    if isinstance(sizes, str) or not isinstance(sizes, Iterable):
        raise ValueError(f"{what} is {sizes!r}; expected whole numbers of at least 1")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
            raise ValueError(f"{what} holds {size!r}; expected whole numbers of at least 1")
    return tuple(int(size) for size in sizes)


def check_flag(name: str, value: bool) -> None:
    """ValueError unless the value is True or False: a text such as "no" counts as true in Python."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; expected true or false")


def check_part(name: str, value: float) -> None:
    """ValueError unless the value is a number from 0 to less than 1."""
    if not (is_number(value) and 0 <= value < 1):
        raise ValueError(f"{name} is {value!r}; expected a part, from 0 to less than 1")


def check_shape(input_shape: Sequence[int], dimensions: int | None = None) -> tuple[int, ...]:
    """`input_shape` as a tuple: not empty, sizes above 0, and (C, H, W) where `dimensions` is 3."""
    shape = check_sizes("input_shape", input_shape)
    if not shape:
        raise ValueError("input_shape is empty; expected the shape of one example, e.g. (1, 28, 28)")
    if dimensions is not None and len(shape) != dimensions:
        raise ValueError(
            f"input_shape is {shape}; this network takes images, (channels, height, width), e.g. (1, 28, 28). "
            "For other shapes use the network 'mlp'"
        )
    return shape


def squash(likelihood: Likelihood, shape: tuple[int, ...]) -> list[nn.Module]:
    """The sigmoid that published decoders of images end in, as a list of none or one.

    One where the decoder's output is the mean itself, in [0, 1]; none for logits, and for likelihoods of several
    numbers a value.
    """
    means = likelihood.parameter_shape(shape) == shape and not isinstance(likelihood, Bernoulli)
    return [nn.Sigmoid()] if means else []


def margins(shape: tuple[int, ...], multiple: int) -> tuple[int, int, int, int]:
    """Rows and columns that make the sides of (C, H, W) multiples: left, right, top and bottom, as F.pad takes them."""
    missing_height, missing_width = (-side % multiple for side in shape[1:])
    top, left = missing_height // 2, missing_width // 2
    return left, missing_width - left, top, missing_height - top
