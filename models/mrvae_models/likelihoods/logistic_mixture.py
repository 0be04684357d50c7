"""The mixture of discretised logistics, without the channels' autoregression (sigma-VAE, Appendix E)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.storage import Rows
from .base import LEVELS_256, Beta, Likelihood
from .data_checks import check_levels
from .discretized import clipped_mean, standard_logistic, to_levels
from .gaussian import check_minimum
from .numerics import MAX_LOG_SIGMA, MIN_LOG_SCALE, full_precision, levels_of, log_logistic_mass, soft_clip, softplus

COMPONENTS = 10


class LogisticMixture(Likelihood):
    """Pixels of 256 levels from K discretised logistics; a pixel's C channels share the choice of the component.

        distortion = -sum_pixels log sum_j pi_j prod_c P(level_c; m_jc, s_jc),  pi = softmax(l)
        P the mass of a bin (numerics.log_logistic_mass),  log s = soft_clip(raw, min_log_scale, 6)

    (Salimans et al., 2017, Eq. 1 and 2, without the coefficients by which a channel's mean depends on the channels
    before it: with them the decoder explains colours without z.) `parameters`, K (1 + 2 C) channels: K logits, then the
    means of K components by C channels, then their log scales. Data with fewer than three axes have no channels: there
    each value has a choice of its own, 3 K numbers.
    """

    name = "logistic-mixture"
    measure = LEVELS_256

    def __init__(self, components: int = COMPONENTS, min_log_scale: float = MIN_LOG_SCALE):
        super().__init__()
        if isinstance(components, bool) or not isinstance(components, int) or components < 1:
            raise ValueError(f"components is {components!r}; expected a positive integer, e.g. {COMPONENTS}")
        self.components = components
        self.min_log_scale = check_minimum("min_log_scale", min_log_scale)

    def parameter_shape(self, input_shape: Sequence[int]) -> tuple[int, ...]:
        """(K (1 + 2 C), H, W) for images (C, H, W); (3 K D, ...) for data (D, ...) without channels."""
        first, *rest = input_shape
        each = self.components * (1 + 2 * first) if len(input_shape) >= 3 else 3 * self.components * first
        return (each, *rest)

    def distortion(self, parameters: Tensor, x: Tensor, beta: Beta | None = None) -> Tensor:
        if parameters.shape[0] != x.shape[0] or parameters.shape[1:] != self.parameter_shape(x.shape[1:]):
            raise ValueError(
                f"the decoder's output has shape {tuple(parameters.shape)} and the data {tuple(x.shape)}; {self.name} "
                f"expected {(len(x), *self.parameter_shape(x.shape[1:]))}: build the network for the data's shape and "
                f"this likelihood, e.g. build(name, dataset.input_shape, likelihood={self.name!r})"
            )
        log_choice, mean, log_scale = self._split(parameters)
        levels = levels_of(x, mean.dtype).reshape(len(x), 1, *mean.shape[2:])
        each = log_logistic_mass(levels, mean, log_scale).sum(2)
        return -torch.logsumexp(log_choice + each, 1).flatten(1).sum(1)

    def mean(self, parameters: Tensor) -> Tensor:
        """sum_j pi_j E_j[x], with clipped_mean()'s E: to half a level."""
        log_choice, mean, log_scale = self._split(parameters)
        each = clipped_mean(mean, log_scale, softplus)
        return self._of_data((log_choice.exp().unsqueeze(2) * each).sum(1), parameters)

    def sample(
        self, parameters: Tensor, generator: torch.Generator | None = None, beta: Beta | None = None
    ) -> Tensor:
        log_choice, mean, log_scale = self._split(parameters)
        odds = log_choice.exp().movedim(1, -1)
        chosen = torch.multinomial(odds.flatten(0, -2), 1, generator=generator).view(odds.shape[:-1])
        index = chosen[:, None, None].expand(-1, 1, *mean.shape[2:])
        location, log_scale = mean.gather(1, index)[:, 0], log_scale.gather(1, index)[:, 0]
        drawn = to_levels(location + log_scale.exp() * standard_logistic(location, generator))
        return self._of_data(drawn, parameters)

    def check_data(self, x: Rows) -> None:
        check_levels(x, self.name)

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log pi (N, K, *pixels), means and log scales (N, K, C, *pixels), C = 1 where data have no channels."""
        k = self.components
        parameters = full_precision(parameters)
        if parameters.dim() < 4:
            parameters = parameters.unflatten(1, (3 * k, -1))
        channels = (parameters.shape[1] // k - 1) // 2
        if parameters.shape[1] != k * (1 + 2 * channels) or channels < 1:
            raise ValueError(
                f"the decoder's output has {parameters.shape[1]} channels; {self.name} expected {k} * (1 + 2 C) for "
                "data of C channels: build the network for this likelihood"
            )
        logits, mean, raw = parameters.split([k, k * channels, k * channels], 1)
        mean, raw = (part.unflatten(1, (k, channels)) for part in (mean, raw))
        return logits.log_softmax(1), mean, soft_clip(raw, self.min_log_scale, MAX_LOG_SIGMA)

    def _of_data(self, x: Tensor, parameters: Tensor) -> Tensor:
        """(N, C, *pixels) in the shape of the data: without the axis of channels where those have none."""
        return x[:, 0] if parameters.dim() < 4 else x

    def extra_repr(self) -> str:
        return f"components={self.components}, min_log_scale={self.min_log_scale}"
