"""Likelihoods p(x | z), by name: what the decoder's output means, and what it costs in nats.

    model = likelihood("logistic-mixture", components=5)
    model.parameter_shape((3, 32, 32))          # of the decoder's output, for which networks.build makes the network
    model.distortion(parameters, x)             # -log p(x | z), (N,), in nats, summed over an example's dimensions
    model.mean(parameters), model.sample(parameters)        # in data space

`base.Likelihood` says what they have in common. To add one, write it in a file of its own, and name it here and,
with its constructor's options, in likelihood_names.py.
"""

from __future__ import annotations

from typing import Any

from ..likelihood_names import LIKELIHOOD_OPTIONS
from .base import CONTINUOUS, LEVELS_256, Likelihood, convert
from .bernoulli import Bernoulli
from .bitwise import Bitwise
from .calibrated import CalibratedGaussian, GaussianImage, GaussianOptimal, GaussianShared
from .categorical import Categorical256
from .discretized import DiscretizedGaussian, DiscretizedLogistic
from .gaussian import Gaussian, GaussianPixel
from .logistic_mixture import LogisticMixture
from .numerics import full_precision
from .student_t import StudentT
from .text import Categorical, TextCategorical, perplexity

LIKELIHOODS: dict[str, type[Likelihood]] = {
    kind.name: kind
    for kind in (
        Bernoulli, Gaussian, GaussianShared, GaussianOptimal, GaussianImage, GaussianPixel, StudentT, Categorical256,
        Bitwise, LogisticMixture, DiscretizedGaussian, DiscretizedLogistic,
    )
}
"""`likelihood_names.LIKELIHOOD_NAMES` has the same names. TextCategorical is the lstm's own."""

__all__ = [
    "CONTINUOUS",
    "LEVELS_256",
    "LIKELIHOODS",
    "Bernoulli",
    "Bitwise",
    "CalibratedGaussian",
    "Categorical",
    "Categorical256",
    "DiscretizedGaussian",
    "DiscretizedLogistic",
    "Gaussian",
    "GaussianImage",
    "GaussianOptimal",
    "GaussianPixel",
    "GaussianShared",
    "Likelihood",
    "LogisticMixture",
    "StudentT",
    "TextCategorical",
    "convert",
    "full_precision",
    "likelihood",
    "perplexity",
]


def likelihood(name: str, sigma: float | None = None, **options: Any) -> Likelihood:
    """The likelihood called `name`, with the options of its constructor; None leaves sigma at its default.

    ValueError for a name that is not known, and for options that this likelihood does not have.
    """
    if name not in LIKELIHOODS:
        raise ValueError(f"likelihood {name!r} is not known; expected one of {', '.join(map(repr, LIKELIHOODS))}")
    given = {**options, **({} if sigma is None else {"sigma": sigma})}
    known = LIKELIHOOD_OPTIONS[name]
    for key, value in given.items():
        if key not in known:
            raise ValueError(
                f"{key}={value!r} given for likelihood {name!r}; expected options of it: {', '.join(known) or 'none'}"
            )
    return LIKELIHOODS[name](**given)
