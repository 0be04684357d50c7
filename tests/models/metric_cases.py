"""Models whose metrics are known: a linear Gaussian VAE, and one whose codes are what the test says."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from mrvae_models.likelihoods import Gaussian
from mrvae_models.vae import VAE
from torch import nn


class Codes(nn.Module):
    """x (N, 2k) -> mean, log variance: the data are the posteriors."""

    def __init__(self, latent):
        super().__init__()
        self.latent = latent
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))  # its device and dtype are the model's

    def forward(self, x):
        return x[:, : self.latent], x[:, self.latent :]


def coded(mean, log_variance, **more):
    """A VAE and a data set with these posteriors, (N, k) each."""
    mean = torch.as_tensor(mean, dtype=torch.float64)
    log_variance = torch.as_tensor(log_variance, dtype=torch.float64).expand_as(mean)
    k = mean.shape[1]
    vae = VAE(Codes(k), nn.Linear(k, 2 * k).double(), Gaussian(), k, (2 * k,))
    return vae, SimpleNamespace(examples=torch.cat([mean, log_variance], 1), **more)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Hierarchy(nn.Module):
    """A network of no single latent vector."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
