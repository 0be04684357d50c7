"""Hierarchies of latent groups: q(z | x) = prod_l q(z_l | z_<l, x), p(z) = prod_l p(z_l | z_<l), all Gaussian.

Groups are numbered from the top, which is drawn first. NVAE's residual posterior (Vahdat and Kautz, 2020, Section 3.2):

    p(z_l | z_<l) = N(mu_p, sigma_p),    q(z_l | z_<l, x) = N(mu_p + mu_q, sigma_p sigma_q)
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..likelihoods import Likelihood, full_precision

CLAMP = 5.0
LEAST_SIGMA = 1e-2


class Normal(NamedTuple):
    """Independent normal distributions, all tensors (N, *shape of the group)."""

    mean: Tensor
    sigma: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """mean + sigma * noise."""
        return self.mean + self.sigma * noise

    def kl_from(self, prior: Normal) -> Tensor:
        """KL(self || prior) of each element, in nats.

        1/2 [((mean - mean_p) / sigma_p)^2 + r^2 - 1] - log r,    r = sigma / sigma_p
        """
        mean, sigma = full_precision(self.mean), full_precision(self.sigma)
        prior_mean, prior_sigma = full_precision(prior.mean), full_precision(prior.sigma)
        log_ratio = (sigma / prior_sigma).log()
        return 0.5 * (((mean - prior_mean) / prior_sigma).square() + torch.expm1(2 * log_ratio)) - log_ratio

    def log_ratio(self, prior: Normal, noise: Tensor) -> Tensor:
        """log N(z; self) - log N(z; prior) of each element at z = mean + sigma * noise, in nats.

        1/2 [((z - mean_p) / sigma_p)^2 - noise^2] - log(sigma / sigma_p), whose mean over noise is kl_from(prior)
        """
        mean, sigma = full_precision(self.mean), full_precision(self.sigma)
        prior_mean, prior_sigma = full_precision(prior.mean), full_precision(prior.sigma)
        standardised = (mean + sigma * noise - prior_mean) / prior_sigma
        return 0.5 * (standardised.square() - noise.square()) - (sigma / prior_sigma).log()


class Raw(NamedTuple):
    """What a head gives of a normal distribution, before soft clamps: mu and log sigma, (N, *shape) each."""

    mu: Tensor
    log_sigma: Tensor

    @classmethod
    def of(cls, head: Tensor) -> Raw:
        """A head's output, (N, 2 k, H, W), split in two."""
        return cls(*head.chunk(2, dim=1))

    def normal(self) -> Normal:
        """N(c(mu), exp(c(log sigma)) + 0.01), c the soft clamp: finite whatever a head gives."""
        return Normal(soft_clamp(self.mu), torch.exp(soft_clamp(self.log_sigma)) + LEAST_SIGMA)

    def residual(self, relative: Raw) -> Normal:
        """The posterior over this prior: N(mu_p + mu_q, exp(log sigma_p + log sigma_q)), clamped as `normal` is."""
        return Raw(self.mu + relative.mu, self.log_sigma + relative.log_sigma).normal()


def soft_clamp(x: Tensor) -> Tensor:
    """5 tanh(x / 5): x for small ones, within (-5, 5)."""
    return CLAMP * torch.tanh(x / CLAMP)


class HierarchicalOutput(NamedTuple):
    """What one forward pass of a hierarchy gives; N examples, k latent variables in all groups together."""

    parameters: Tensor  # (N, *likelihood.parameter_shape(input_shape))
    mean: Tensor  # (N, k), of the posterior less the prior's, given the draws above, groups from the top
    rates: Tensor  # (N, groups), KL of each group in nats, or what has it for a mean (see `divergence`, `at_means`)
    noise: Tensor  # (N, k), standard normal, of which z = mean + sigma * noise was drawn


class Hierarchy(nn.Module, abc.ABC):
    """A VAE of latent groups. A network says how it goes up and down:

        ascend(x) -> features                          what the posteriors need of x
        descend(features, noise) -> parameters, pairs  z_l = mean + sigma noise_l, noise by group, (N, *shape) each;
                                                       pairs of each group's (posterior, prior), or (prior, prior),
                                                       drawn from, where features is None

    group_shapes: the shape of each group's z, from the top. `latent` is the number of all latent variables.
    """

    def __init__(
        self, likelihood: Likelihood, input_shape: Sequence[int], group_shapes: Sequence[tuple[int, ...]]
    ) -> None:
        super().__init__()
        self.likelihood = likelihood
        self.input_shape = tuple(input_shape)
        self.group_shapes = tuple(group_shapes)
        self.latent = sum(map(math.prod, self.group_shapes))

    @abc.abstractmethod
    def ascend(self, x: Tensor) -> Any: ...

    @abc.abstractmethod
    def descend(self, features: Any, noise: Sequence[Tensor]) -> tuple[Tensor, list[tuple[Normal, Normal]]]: ...

    def forward(self, x: Tensor, noise: Tensor | None = None) -> HierarchicalOutput:
        """One draw from the posterior. x: (N, *input_shape), noise: (N, latent), groups from the top; else ValueError.

        Without noise it is drawn by torch's global generator, in train and in eval mode alike.
        """
        return self._output(x, noise, self.divergence)

    def _output(
        self, x: Tensor, noise: Tensor | None, divergence: Callable[[Normal, Normal, Tensor], Tensor]
    ) -> HierarchicalOutput:
        if x.shape[1:] != self.input_shape:
            expected = ", ".join(["N", *map(str, self.input_shape)])
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this network was built for ({expected}): "
                "reshape the data, or build the network with build(name, dataset.input_shape)"
            )
        if noise is None:
            noise = torch.randn(x.shape[0], self.latent, dtype=x.dtype, device=x.device)
        if noise.shape[0] != x.shape[0]:  # not by len(), of which torch.export would make a constant
            raise ValueError(
                f"noise has {noise.shape[0]} rows and x has {x.shape[0]} examples; expected one row an example"
            )
        parts = self._by_group(noise)
        parameters, pairs = self.descend(self.ascend(x), parts)
        divergences = [divergence(q, p, part) for (q, p), part in zip(pairs, parts, strict=True)]
        return HierarchicalOutput(
            parameters,
            torch.cat([(q.mean - p.mean).flatten(1) for q, p in pairs], 1),
            torch.stack([divergence.flatten(1).sum(1) for divergence in divergences], 1),
            noise,
        )

    def divergence(self, posterior: Normal, prior: Normal, noise: Tensor) -> Tensor:
        """KL(q(z_l | z_<l, x) || p(z_l | z_<l)) of a group's elements, both given the draws above.

        A network whose posteriors depend on other draws than its priors has log q - log p at its own draw instead.
        """
        return posterior.kl_from(prior)

    def at_means(self, x: Tensor) -> HierarchicalOutput:
        """The same with every z the mean of its posterior: no noise.

        rates are KL(q(z_l | .) || p(z_l | .)) of each group, both given means for the other draws, in every network:
        log q - log p at the mean has no KL divergence for a mean.
        """
        zeros = x.new_zeros(x.shape[0], self.latent)
        return self._output(x, zeros, lambda posterior, prior, noise: posterior.kl_from(prior))

    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x | z] with every z the mean of its posterior, (N, *input_shape), in data space."""
        return self.likelihood.mean(self.at_means(x).parameters)

    def decode(self, noise: Tensor) -> Tensor:
        """Parameters of p(x | z), z_l = mean_p + sigma_p noise_l, for noise (N, latent).

        noise is standard normal for samples, groups from the top; a hierarchy's z have no fixed distribution of their
        own, as each prior depends on the groups above. Another shape raises ValueError.
        """
        return self.descend(None, self._by_group(noise))[0]

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """E[x | z] for n draws z from the prior, (n, *input_shape), in data space.

        temperature multiplies each group's sigma: less than 1 gives more likely, less varied samples.
        ValueError where it is negative or not finite.
        """
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature is {temperature}; expected a finite number of at least 0, e.g. 0.8")
        like = next(self.parameters())
        noise = torch.randn(n, self.latent, generator=generator, dtype=like.dtype, device=like.device)
        return self.likelihood.mean(self.decode(temperature * noise))

    def balance(self, rates: Tensor) -> Tensor:
        """Weights of the groups' KL terms while the KL weight is being annealed: (N, groups) -> (groups,), mean 1.

        w_l = (R_l / s_l) / mean_k(R_k / s_k), with R_l the batch's mean rate of group l and s_l its size: groups that
        carry little for their size are pushed little towards collapse (Vahdat and Kautz, 2020, Appendix A, where s_l
        R_l is a misprint by the authors' word, github.com/NVlabs/NVAE/issues/26). No gradient flows through them; all
        are 1 where no group carries anything.
        """
        sizes = torch.tensor([math.prod(shape) for shape in self.group_shapes], device=rates.device, dtype=rates.dtype)
        densities = rates.detach().mean(0) / sizes
        mean = densities.mean()
        return torch.where(mean > 0, densities / mean, torch.ones_like(densities))

    def _by_group(self, noise: Tensor) -> list[Tensor]:
        if noise.dim() != 2 or noise.shape[1] != self.latent:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}; expected (N, {self.latent}), the noise of all groups a row"
            )
        parts = noise.split([math.prod(shape) for shape in self.group_shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.group_shapes, strict=True)]
