"""The names of the likelihoods and of their options, for the help and for checks: no torch here.

`likelihoods.LIKELIHOODS` has the same names, and their constructors these options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OF_BETA = ("knots", "beta_range")

LIKELIHOOD_OPTIONS: dict[str, tuple[str, ...]] = {
    "bernoulli": (),
    "gaussian": ("sigma",),
    "gaussian-shared": ("sigma", "min_log_sigma", *_OF_BETA),
    "gaussian-optimal": ("min_log_sigma", "decay", *_OF_BETA),
    "gaussian-image": ("min_log_sigma", "decay", *_OF_BETA),
    "gaussian-pixel": ("min_log_sigma",),
    "student-t": ("min_log_scale",),
    "categorical": ("memory_limit",),
    "bitwise": (),
    "logistic-mixture": ("components", "min_log_scale"),
    "discretized-gaussian": ("scale", "sigma", "min_log_scale", *_OF_BETA),
    "discretized-logistic": ("scale", "sigma", "min_log_scale", *_OF_BETA),
}

LIKELIHOOD_NAMES = tuple(LIKELIHOOD_OPTIONS)


def takes_beta_range(name: str | None) -> bool:
    """Whether the likelihood has a sigma that a multi-rate network learns as a function of beta."""
    return name is not None and "beta_range" in LIKELIHOOD_OPTIONS.get(name, ())


def check_likelihood_options(name: str | None, sigma: float | None, options: Mapping[str, Any]) -> None:
    """ValueError for options that the likelihood does not have; `sigma` and the range of betas are options apart."""
    with_sigma = [other for other, known in LIKELIHOOD_OPTIONS.items() if "sigma" in known]
    if sigma is not None and name not in with_sigma:
        raise ValueError(
            f"sigma is {sigma!r}; expected none with likelihood {name!r}: only {', '.join(with_sigma)} have one"
        )
    own = sorted(set(LIKELIHOOD_OPTIONS.get(name or "", ())) - {"sigma", "beta_range"})
    for key in options:
        if key not in own:
            raise ValueError(
                f"likelihood_options name {key!r}; expected options of likelihood {name!r}: {', '.join(own) or 'none'}"
            )
