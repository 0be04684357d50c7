"""Small networks, and their steps, for the tests of bench.overhead."""

from __future__ import annotations

from typing import Any

import torch

from bench.variants import TrainingStep, training_step

CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "tiny": ("mlp", (1, 6, 6), {"latent": 4, "hidden": (24,)}),
    "tiny-cnn": ("cnn", (1, 8, 8), {"latent": 4, "channels": (8, 8)}),
}


def step_of(variant: str, case: str = "tiny", batch: int = 16, **more: Any) -> TrainingStep:
    """The variant's step on one of CASES."""
    network, shape, options = CASES[case]
    return training_step(variant, network, shape, batch, **more, **options)


def drop_a_gradient(step: TrainingStep, *_: object) -> None:
    """From now on decoder.0.weight gets no gradient."""
    step.parameters["decoder.0.weight"].register_hook(torch.zeros_like)
