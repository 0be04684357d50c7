"""sigma^2 and beta: what each paper's KL weight means as the variance of a Gaussian decoder. No torch here.

A Gaussian decoder of constant variance v costs, d being the dimensions of an example and SSE = |x - mean|^2,

    -log p(x|z) + R = SSE / (2 v) + d/2 log(2 pi v) + R = 1/v [1/2 SSE + v R] + constant

so that an objective a SSE + beta R, which is 2 a [1/2 SSE + beta / (2 a) R], has the minimum of the decoder with

    v = beta / (2 a)

(sigma-VAE, Eq. 6 and 7: the variance is constant, and d log sigma can be left out). Papers differ in a alone:

    name              objective                            a          sigma^2        from
    mrvae_kernels     1/2 SSE + beta R                     1/2        beta           this project, Gaussian(sigma=1)
    sigma-vae-eq7     d/2 MSE + beta R                     1/2        beta           sigma-VAE, Eq. 7 as printed
    sigma-vae-text    d MSE + beta R                       1          beta / 2       sigma-VAE, Sections 3.1 and 5.1
    mr-vae            SSE + beta R                         1          beta / 2       MR-VAE, its code of images
    pythae            1/2 SSE + beta R                     1/2        beta           pythae's VAEs
    bs-vae-constant   SSE + beta R                         1          beta / 2       BS-VAE's constant-variance beta-VAE
    l-vae             s0^-2 MSE + s1^-2 R                  1/d        d beta / 2     L-VAE, beta = s0^2 / s1^2
    l-vae-sum         s0^-2 1/2 SSE + s1^-2 R              1/2        beta           L-VAE with this project's sums

MSE = SSE / d. sigma-VAE's Eq. 7 and its text contradict each other by a factor of two. Its Table 1 was scored by the
text: on d = 2352 the best bound that a variance allows is d/2 log(2 pi v) and a little, and at beta = 10, where the
rate is near 0, the table's 4056 nats are 1176 log(2 pi 5) = 4054 and SSE / 10, while v = 10 would need 4869.
BS-VAE prints beta = 2 sigma^2 + sigma^2 log(2 pi sigma^2); its second term is a constant of the optimisation where
sigma is constant, and only the first weighs R.

In a model whose variance is not constant, beta and sigma^2 are apart (BS-VAE, Section 3.3): SSE / (2 v) + beta R has
the minimum of 1/2 SSE + beta v R. So unit_beta(beta, v) = beta v is where it lands on the curve of Gaussian(sigma=1):
of a sigma-VAE, beta = 1, its sigma^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HERE = "mrvae_kernels"
"""The convention of this project."""


@dataclass(frozen=True)
class Convention:
    """One paper's objective, a SSE + beta R."""

    objective: str
    source: str
    weight: float | None  # a; None for 1 / d

    def of_squared_error(self, dimensions: int | None) -> float:
        """a. ValueError without `dimensions` where a is 1 / d."""
        if self.weight is not None:
            return self.weight
        if dimensions is None or dimensions < 1:
            raise ValueError(
                f"dimensions is {dimensions}; {self.objective} ({self.source}) averages over an example's dimensions: "
                "give their number, e.g. dimensions=3 * 32 * 32"
            )
        return 1 / dimensions


CONVENTIONS: dict[str, Convention] = {
    HERE: Convention("1/2 SSE + beta R", "this project, Gaussian(sigma=1)", 0.5),
    "sigma-vae-eq7": Convention("d/2 MSE + beta R", "sigma-VAE, Eq. 7 as printed", 0.5),
    "sigma-vae-text": Convention("d MSE + beta R", "sigma-VAE, sigma^2 = beta / 2 of Section 5.1 and Table 1", 1.0),
    "mr-vae": Convention("SSE + beta R", "MR-VAE, its code of images", 1.0),
    "pythae": Convention("1/2 SSE + beta R", "pythae", 0.5),
    "bs-vae-constant": Convention("SSE + beta R", "BS-VAE, its beta-VAEs of constant variance", 1.0),
    "l-vae": Convention("s0^-2 MSE + s1^-2 R", "L-VAE, beta = s0^2 / s1^2", None),
    "l-vae-sum": Convention("s0^-2 1/2 SSE + s1^-2 R", "L-VAE with sums, beta = s0^2 / s1^2", 0.5),
}


def variance_of(beta: float, convention: str = HERE, dimensions: int | None = None) -> float:
    """sigma^2 = beta / (2 a): the constant variance that a KL weight means, by the convention of that name.

    dimensions: of an example, needed by conventions that average. ValueError for another name, and for a beta that is
    not positive and finite.
    """
    return _positive("beta", beta) / (2 * _convention(convention).of_squared_error(dimensions))


def beta_of(variance: float, convention: str = HERE, dimensions: int | None = None) -> float:
    """beta = 2 a sigma^2: the KL weight, by the convention of that name, that means this constant variance."""
    return 2 * _convention(convention).of_squared_error(dimensions) * _positive("variance", variance)


def convert(beta: float, source: str, target: str = HERE, dimensions: int | None = None) -> float:
    """The KL weight by `target` of an objective whose minimum is that of `beta` by `source`."""
    return beta_of(variance_of(beta, source, dimensions), target, dimensions)


def unit_beta(beta: float, variance: float) -> float:
    """beta sigma^2: the KL weight of Gaussian(sigma=1) with the minimum of a decoder of that variance at `beta`."""
    return _positive("beta", beta) * _positive("variance", variance)


def learned_beta(s0: float, s1: float) -> float:
    """L-VAE's beta = s0^2 / s1^2, by the convention of its reconstruction loss: "l-vae" or "l-vae-sum"."""
    return (_positive("s0", s0) / _positive("s1", s1)) ** 2


def _convention(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise ValueError(f"convention {name!r} is not known; expected one of {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; expected a positive, finite number")
    return value
