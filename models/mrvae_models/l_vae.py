"""L-VAE: a KL weight that is learned along with the network (arXiv 2507.02619).

    loss = L_R / s0^2 + KL / s1^2 + s0^2 + s1^2,        beta = s0^2 / s1^2

L_R and KL are means over the batch. Where the gradient of a weight vanishes, s_i^4 = L_i; put back in, the loss is
2 sqrt(L_R) + 2 sqrt(KL), and beta = sqrt(L_R / KL). Two things follow from that. The learned beta depends on the units
of L_R: see `FORMS`. And the slope of sqrt(KL) is infinite at KL = 0: posteriors that have collapsed once drive s1 to 0,
and stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .likelihoods import Gaussian, Likelihood, TextCategorical
from .objective_options import LVAE_FORMS as FORMS
from .precision import AtLeastFloat32
from .vae import dimensions_of

BOUND = 10.0
"""Of |log s|: weights 1 / s^2 from 2e-9 to 5e8. The fixed point s^4 = L of any loss from 1e-17 to 1e17 lies within."""

COLLAPSED_WEIGHT = 1e-2
"""Without the regulariser s only grows; the run is told once both weights 1 / s^2 are below this part of the first."""

COLLAPSED_RATE = 1e-3
"""Nats: KL = s1^4 at the fixed point, below which the posteriors are told of as collapsed."""


class Scale:
    """What a likelihood's distortion D is in the units of L_R = (D - least) / unit, by one of FORMS.

    "sum"   L_R = D - least, summed over dimensions as everything here: SSE / (2 sigma^2) of a Gaussian, D of a
            likelihood of probabilities. s0^2 / s1^2 is then beta as in D + beta R.
    "mean"  the paper's: MSE = SSE / d of a Gaussian, D / d of probabilities. L_R / s0^2 + KL / s1^2 has the minimum of
            D + beta R with beta = unit s0^2 / s1^2, unit being d / (2 sigma^2) or d. (The review of the paper in hand
            says MSE and not what it is a mean of; here it is the mean over an example's dimensions.)

    least is the value of D at a perfect reconstruction: d/2 log(2 pi sigma^2), or 0 of probabilities. A density whose
    variance is learned has none, and ValueError says so: sqrt(L_R) would be of a negative number.
    """

    def __init__(self, likelihood: Likelihood, dimensions: int, form: str) -> None:
        if form not in FORMS:
            raise ValueError(f"the form of L_R is {form!r}; expected one of {', '.join(FORMS)}")
        if form == "mean" and getattr(likelihood, "measure", None) == TextCategorical.measure:
            raise ValueError(
                "lvae_form is 'mean' and the data are sentences, which differ in length: D has no number of dimensions "
                "to be a mean over; use lvae_form = 'sum'"
            )
        if isinstance(likelihood, Gaussian):
            variance = likelihood.sigma**2
            self.least = 0.5 * dimensions * math.log(2 * math.pi * variance)
            unit = dimensions / (2 * variance)
        elif is_probability(likelihood):
            self.least, unit = 0.0, float(dimensions)
        else:
            raise ValueError(
                f"objective is 'l-vae' and the likelihood {type(likelihood).__name__}, a density that has no least "
                "distortion; L-VAE weighs a reconstruction loss of zero or more: use likelihood = 'gaussian', "
                "'bernoulli' or one of 256 levels"
            )
        self.unit = 1.0 if form == "sum" else unit

    def reconstruction(self, distortion: Tensor) -> Tensor:
        """L_R of each example, (N,) -> (N,), zero or more; rounding may leave D a hair below its least."""
        return ((distortion - self.least) / self.unit).clamp_min(0)


def is_probability(likelihood: Likelihood) -> bool:
    """Whether p(x|z) is a probability, so that -log p is zero or more, and not a density."""
    return getattr(likelihood, "measure", None) != "continuous"


class LearnedWeights(AtLeastFloat32):
    """s0 and s1 of L-VAE, s = exp(parameter): positive by construction, and within exp(+-BOUND), so never 0 or inf.

    At least float32, whatever the network is: bfloat16 has no room for an optimiser's small steps.

    beta: s0^2 / s1^2 to start from, with s1 = 1; the paper starts with s0 = s1 = 1.
    regulariser: without s0^2 + s1^2 both weights shrink for ever (the paper's ablation); `trouble()` says when.
    """

    def __init__(self, scale: Scale, beta: float = 1.0, regulariser: bool = True) -> None:
        super().__init__()
        if not 0 < beta < math.inf:
            raise ValueError(f"beta is {beta}; expected a positive, finite s0^2 / s1^2 to start from")
        self.scale = scale
        self.regulariser = regulariser
        self.first = (1 / beta, 1.0)  # weights 1 / s^2 at the start
        self.log_s = nn.Parameter(torch.tensor([0.5 * math.log(beta), 0.0]))

    @property
    def squares(self) -> Tensor:
        """(2,): s0^2 and s1^2."""
        return torch.exp(2 * self.log_s.clamp(-BOUND, BOUND))

    def forward(self, reconstruction: Tensor, rate: Tensor) -> Tensor:
        """L_R / s0^2 + KL / s1^2 + s0^2 + s1^2, a scalar, of two scalars."""
        squares = self.squares
        loss = reconstruction / squares[0] + rate / squares[1]
        return loss + squares.sum() if self.regulariser else loss

    def values(self) -> dict[str, float]:
        """s0, s1 and beta = unit s0^2 / s1^2, the KL weight in D + beta R."""
        first, second = self.squares.detach().double().tolist()
        return {"s0": math.sqrt(first), "s1": math.sqrt(second), "beta": self.scale.unit * first / second}

    def trouble(self) -> str | None:
        """A sentence about weights that have collapsed, or None."""
        first, second = self.squares.detach().double().tolist()
        if not self.regulariser:
            weights = (1 / first, 1 / second)
            if any(weight >= COLLAPSED_WEIGHT * start for weight, start in zip(weights, self.first, strict=True)):
                return None
            return (
                f"l-vae: both weights have collapsed, 1/s0^2 = {weights[0]:.2g} and 1/s1^2 = {weights[1]:.2g}: the "
                "loss goes to 0 whatever the network does, and s0^2/s1^2 is no learned beta; leave out "
                "--no-lvae-regulariser"
            )
        if second**2 < COLLAPSED_RATE:
            return (
                f"l-vae: s1^2 = {second:.2g}, so the rate is near {second**2:.1g} nats: the posteriors have collapsed, "
                "and with them the KL weight grows without end; start from a smaller beta (--beta 0.01), or choose the "
                "other --lvae-form"
            )
        return None


@dataclass(frozen=True)
class LearnedTerms:
    """What the L-VAE loss of a batch is made of, with the face of objectives.Terms."""

    distortion: Tensor  # (N,), nats
    rate: Tensor  # (N,), nats
    weights: LearnedWeights

    def loss(self, weights: Tensor | None = None) -> Tensor:
        """A scalar; `weights` of the examples, (N,), or None for ones."""
        parts = torch.stack([self.weights.scale.reconstruction(self.distortion), self.rate])
        reconstruction, rate = (parts if weights is None else weights * parts).mean(1)
        return self.weights(reconstruction, rate)


def learned_weights(config: TrainConfig, network: Any) -> LearnedWeights | None:
    """What L-VAE learns of a run by `config`, as it is at the start; None for other objectives."""
    if config.objective != "l-vae":
        return None
    scale = Scale(network.likelihood, dimensions_of(network), config.lvae_form)
    return LearnedWeights(scale, 1.0 if config.beta is None else config.beta, config.lvae_regulariser)


def learned_values(config: TrainConfig, network: Any, state: Mapping[str, Tensor]) -> dict[str, float] | None:
    """s0, s1 and beta of a checkpoint's `state`, whose entry learned.log_s they are; None for other objectives."""
    weights = learned_weights(config, network)
    if weights is None:
        return None
    weights.load_state_dict({"log_s": state["learned.log_s"]})
    return weights.values()
