"""The categorical likelihood of 256 levels, and what it takes of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.memory import available
from ..data.storage import Rows
from .base import LEVELS_256, Beta, Likelihood
from .data_checks import check_levels
from .numerics import HIGHEST, LEVELS, full_precision, is_number, levels_of

COPIES = 4
"""Tensors of the size of the logits that a training step holds at once: the logits, their log-softmax, and the
gradients of both. Evaluating holds the first two."""

USABLE = 0.9
"""Part of the memory that is free which they may take where there is no `memory_limit`."""


class Categorical256(Likelihood):
    """Each value any of 256 levels; `parameters` are 256 logits a value: C channels for level 0, C for level 1, ...

        distortion = -sum_i log softmax(l_i)[level_i]        (sigma-VAE, Section 3.2)

    Memory: a training step holds 4 tensors of batch * dimensions * 256 numbers, so 4096 bytes a value in float32: at
    batch 128, 1.6 GB for images of 3x32x32 and 6.4 GB for 3x64x64, besides the network's own activations. What is more
    than `memory_limit`, in GB of 10^9 bytes, is refused with a ValueError before it is tried, and so is, without a
    limit, what is more than 90 % of what is free on the device.
    """

    name = "categorical"
    measure = LEVELS_256
    numbers = LEVELS

    def __init__(self, memory_limit: float | None = None):
        super().__init__()
        if memory_limit is not None and not (is_number(memory_limit) and memory_limit > 0):
            raise ValueError(f"memory_limit is {memory_limit!r}; expected a positive number of GB, or None")
        self.memory_limit = memory_limit
        self._passed = 0  # bytes: the most that was found to fit

    def distortion(self, parameters: Tensor, x: Tensor, beta: Beta | None = None) -> Tensor:
        self._check(parameters, x)
        copies = COPIES if torch.is_grad_enabled() and parameters.requires_grad else 2
        itemsize = max(4, parameters.element_size())
        if not torch.compiler.is_compiling():  # the logits themselves are there already
            self._refuse(parameters.numel() * itemsize, copies, copies - 1, parameters.device)
        logits = full_precision(parameters).unflatten(1, (LEVELS, -1))
        losses = F.cross_entropy(logits, levels_of(x, logits.dtype).long(), reduction="none")
        return losses.flatten(1).sum(1)

    def mean(self, parameters: Tensor) -> Tensor:
        probabilities = full_precision(parameters).unflatten(1, (LEVELS, -1)).softmax(1)
        levels = torch.arange(LEVELS, device=probabilities.device).to(probabilities.dtype) / HIGHEST
        return (probabilities * levels.view(-1, *[1] * (probabilities.dim() - 2))).sum(1)  # autocast leaves sums alone

    def sample(
        self, parameters: Tensor, generator: torch.Generator | None = None, beta: Beta | None = None
    ) -> Tensor:
        logits = full_precision(parameters).unflatten(1, (LEVELS, -1)).movedim(1, -1)
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, -2), 1, generator=generator)
        return drawn.view(logits.shape[:-1]).to(logits.dtype) / HIGHEST

    def check_data(self, x: Rows) -> None:
        check_levels(x, self.name)

    def check_memory(self, examples: int, input_shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._refuse(4 * examples * math.prod(self.parameter_shape(input_shape)), COPIES, COPIES, torch.device(device))

    def _refuse(self, logits: int, copies: int, to_come: int, device: torch.device) -> None:
        """ValueError where `copies` of so many bytes are over the limit, or `to_come` of them over what is free."""
        needed = copies * logits
        if needed <= self._passed:
            return
        if self.memory_limit is not None:
            enough, have = needed <= 1e9 * self.memory_limit, f"memory_limit is {self.memory_limit:g} GB"
        else:
            free = free_memory(device)
            enough = free is None or to_come * logits <= USABLE * free
            have = f"{(free or 0) / 1e9:.3g} GB are free on {device}, of which it may take {USABLE:.0%}"
        if not enough:
            raise ValueError(
                f"the categorical likelihood needs {needed / 1e9:.3g} GB for a batch, {copies} tensors of 256 numbers "
                f"for each value, and {have}: take a smaller batch, smaller images, or likelihood 'bitwise' (8 numbers "
                "a value) or 'logistic-mixture'"
            )
        self._passed = needed


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return available() if device.type == "cpu" else None
