"""One sigma, or one as a function of the KL weight: a number at each of a few knots on log beta, linear between them.

In a multi-rate network every beta is a decoder of its own, with a variance of its own. Of D + beta R only D has
sigma in it, so that its best value at beta is the root of the decoder's mean squared error there (sigma-VAE, Eq. 8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..precision import AtLeastFloat32
from .base import Beta
from .numerics import is_number, soft_clip

KNOTS = 13
"""Some four a decade over the default range with its margins, 0.005 to 15. Between two knots log sigma is off by at
most step^2 / 8 times its second derivative in log beta."""

STEPS = 3
"""Errors that grow as beta^0.6 leave sigma wrong by 7 % at the end of the range after one, 1.5 % after three: 128
examples, 13 knots, the mean of 400 batches."""

DECAY = 0.99
"""What a batch leaves of the running average of a variance."""


class Knots:
    """Where on log beta there is a number, and how much each counts: K knots, log-spaced over `beta_range`.

        weight_k(beta) = max(0, 1 - |u - k|),  u = (K - 1) log(beta / low) / log(high / low), kept within 0 and K - 1

    so that weights sum to 1 and sum_k weight_k value_k is linear between knots. beta_range None: one number for all.
    """

    def __init__(self, beta_range: Sequence[float] | None, knots: int) -> None:
        if isinstance(knots, bool) or not isinstance(knots, int) or knots < 2:
            raise ValueError(f"knots is {knots!r}; expected a whole number of at least 2, e.g. {KNOTS}")
        if beta_range is not None:
            low, high = beta_range
            if not (0 < low < high < math.inf):
                raise ValueError(f"beta_range is ({low}, {high}); expected 0 < low < high, both finite")
        self.beta_range = None if beta_range is None else (float(beta_range[0]), float(beta_range[1]))
        self.count = 1 if beta_range is None else knots

    def weights(self, beta: Beta | None, like: Tensor) -> Tensor:
        """(N, K) for one beta an example, else (1, K). ValueError where beta is needed and missing, or not positive."""
        if self.beta_range is None:
            return like.new_ones(1, 1)
        if beta is None:
            raise ValueError(
                f"this likelihood's sigma is a function of beta over {self.beta_range}: pass beta=, the KL weight that "
                "the parameters were made at, or take likelihood.at(beta), which has one sigma"
            )
        if not isinstance(beta, Tensor):
            if not 0 < beta < math.inf:
                raise ValueError(f"beta is {beta}; expected a positive, finite KL weight")
            beta = torch.tensor(beta, dtype=torch.float64)
        low, high = map(math.log, self.beta_range)
        place = (beta.detach().log().to(like) - low) * ((self.count - 1) / (high - low))
        place = place.clamp(0, self.count - 1).reshape(-1, 1)
        return (1 - (place - torch.arange(self.count).to(like)).abs()).clamp_min(0)

    def shaped(self, values: Tensor, beta: Beta | None) -> Tensor:
        """What weights() made of `beta`, (N,) or (1,): 0-d unless there is one beta an example."""
        of_each = self.beta_range is not None and isinstance(beta, Tensor) and beta.dim() > 0
        return values if of_each else values[0]


def at_knots(weights: Tensor, values: Tensor) -> Tensor:
    """sum_k weight_ik value_k, (N, K), (K,) -> (N,), in the numbers that they have.

    No product of matrices, which autocast takes to 16 bits: log sigma^2 off by 0.4 % is D off by 90 nats of an image of
    3x64x64.
    """
    return (weights * values).sum(-1)


class LearnedLogSigma(AtLeastFloat32):
    """log sigma as a parameter, one number or K over log beta: soft_clip(sum_k weight_k l_k, minimum).

    At least float32, whatever the network is: in bfloat16 Adam's steps of 0.01 leave log sigma = -2.8 where it is.
    sigma: what it starts from. The number l of a plain network, (1,), is that which K numbers have at its beta.
    """

    def __init__(self, knots: Knots, sigma: float, minimum: float) -> None:
        super().__init__()
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"sigma is {sigma}; expected a positive, finite standard deviation, e.g. 1.0")
        if math.log(sigma) <= minimum:
            raise ValueError(f"sigma is {sigma}, and its log is clipped at {minimum}; expected more than e^{minimum}")
        self.knots, self.minimum = knots, minimum
        self.log_sigma = nn.Parameter(torch.full((knots.count,), self._clipped_to(math.log(sigma))))

    def _clipped_to(self, log_sigma: float) -> float:
        """The l of which soft_clip() makes log_sigma, or, at the minimum, what float32 tells from it."""
        above = max(log_sigma - self.minimum, 1e-6 * max(1.0, abs(self.minimum)))
        return self.minimum + above + math.log(-math.expm1(-above))

    @torch.no_grad()
    def set(self, sigma: float) -> None:
        """Have this sigma at every beta."""
        self.log_sigma.fill_(self._clipped_to(math.log(sigma)))

    def forward(self, beta: Beta | None, like: Tensor) -> Tensor:
        """(N,) for one beta an example, else (1,), with the dtype of `like`."""
        return soft_clip(at_knots(self.knots.weights(beta, like), self.log_sigma.to(like.dtype)), self.minimum)

    @torch.no_grad()
    def keep(self, beta: float) -> None:
        """Become the one number of this beta."""
        raw = at_knots(self.knots.weights(beta, self.log_sigma), self.log_sigma)
        self.knots, self.log_sigma = Knots(None, self.knots.count), nn.Parameter(raw)


def towards_best(variances: Tensor, errors: Tensor, weights: Tensor) -> Tensor:
    """Variances at knots, (K,), brought nearer to the likeliest for squared errors e_i (a mean over dimensions, (N,)):

        v_k sum_i w_ik e_i / s_i / sum_i w_ik,    log s_i = sum_k w_ik log v_k

    At the maximum of the likelihood in log v the factor is 1, since sum_i w_ik (e_i / s_i - 1) is its slope; from equal
    variances it is the weighted mean of the errors near the knot, which lags where they change with beta. A knot
    without weight keeps its variance.
    """
    evidence = weights.sum(0)
    near = evidence > 0
    ratio = errors / torch.exp(at_knots(weights, variances.log()))
    return torch.where(near, variances * at_knots(weights.T, ratio) / torch.where(near, evidence, 1.0), variances)


def best_variances(errors: Tensor, weights: Tensor, least: float) -> Tensor:
    """The variance at each knot that a batch has, (K,), at least `least`: STEPS of towards_best() from the mean error.

    For one knot, or one beta for all, the mean error itself.
    """
    spread = weights.expand(len(errors), -1)
    variances = errors.mean().clamp_min(least).expand(weights.shape[1])
    for _ in range(STEPS):
        variances = towards_best(variances, errors, spread).clamp_min(least)
    return variances


class RunningVariance(AtLeastFloat32):
    """A running average of variances at knots, as buffers: what training saw lately, for when there is no batch.

        a_k = 1 - decay^e_k,  weight_k += a_k (1 - weight_k),  total_k += a_k (v_k - total_k),  r_k = total_k / weight_k

    v_k is towards_best() of r, for one knot the batch's mean squared error. e_k is K times the mean weight of knot k
    in the batch: 1 for one knot, and on average over betas, whatever K is; a knot that no beta was near keeps what it
    had. Dividing by weight corrects for the start from nothing. A knot that no batch spoke for takes the average of
    the nearest one, and 1 where there was no batch. Averages are at least `least`, and at least float32, whatever the
    network is.
    """

    total: Tensor
    weight: Tensor

    def __init__(self, knots: Knots, decay: float, least: float) -> None:
        super().__init__()
        if not (is_number(decay) and 0 <= decay < 1):
            raise ValueError(f"decay is {decay!r}; expected a number from 0 to less than 1, e.g. {DECAY}")
        self.knots, self.decay, self.least = knots, decay, least
        self.register_buffer("total", torch.zeros(knots.count))
        self.register_buffer("weight", torch.zeros(knots.count))

    @torch.no_grad()
    def update(self, errors: Tensor, weights: Tensor) -> None:
        """Count a batch: the mean squared error of each example, (N,), and what it weighs at each knot, (N or 1, K)."""
        spread = weights.expand(len(errors), -1).to(self.total)
        start = self.values().to(self.total)
        target = towards_best(start, errors.to(self.total), spread)
        share = 1 - self.decay ** (spread.mean(0) * self.knots.count)
        self.weight += share * (1 - self.weight)
        self.total += share * (target - self.total)

    def values(self) -> Tensor:
        """r_k, (K,)."""
        seen = self.weight > 0
        own = torch.where(seen, self.total / torch.where(seen, self.weight, 1.0), 1.0).clamp_min(self.least)
        places = torch.arange(len(own), device=own.device)
        distances = (places[:, None] - places).abs() + len(own) * ~seen
        return own[distances.argmin(1)]

    def at(self, beta: Beta | None, like: Tensor) -> Tensor:
        """The variance at beta, log-linear between knots: (N,) for one beta an example, else (1,)."""
        return torch.exp(at_knots(self.knots.weights(beta, like), self.values().to(like.dtype).log()))

    @torch.no_grad()
    def keep(self, beta: float) -> None:
        """Become the one average of this beta."""
        seen = self.weight.max().reshape(1).clone()
        self.total, self.weight = self.at(beta, self.total) * seen, seen
        self.knots = Knots(None, self.knots.count)

    @torch.no_grad()
    def set(self, variance: float) -> None:
        """Have this average at every beta."""
        self.total.fill_(max(variance, self.least))
        self.weight.fill_(1.0)

