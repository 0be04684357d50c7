"""Micro-benchmarks: one gated layer, forward and backward, beside the plain layer: `pytest bench/`.

Shapes are those of the bundled networks. Inputs rotate, so that they do not stay in the caches.
"""

import itertools

import pytest
import torch
from torch import nn

import mrvae_kernels as mk
from mrvae_kernels import ops

LAYERS = {
    "Linear(784, 300)": (lambda: nn.Linear(784, 300), (784,)),
    "Linear(300, 784)": (lambda: nn.Linear(300, 784), (300,)),
    "Conv2d(32, 64, 4, 2, 1)": (lambda: nn.Conv2d(32, 64, 4, 2, 1), (32, 14, 14)),
    "ConvTranspose2d(64, 32, 4, 2, 1)": (lambda: nn.ConvTranspose2d(64, 32, 4, 2, 1), (64, 7, 7)),
}

VARIANTS = ("plain", "fold", "epilogue", "one beta a sample", "reference")


def timed(call, batch, shape):
    """A function that runs `call` forward and backward on the next of eight inputs."""
    inputs = itertools.cycle([torch.randn(batch, *shape, requires_grad=True) for _ in range(8)])

    def run():
        call(next(inputs)).sum().backward()

    return run


@pytest.mark.parametrize("batch", [16, 128])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(benchmark, name, variant, batch):
    if variant in ("fold", "epilogue") and not ops.EXTENSION:
        pytest.skip(str(ops.EXTENSION_ERROR))
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    benchmark.group = f"{name}, batch {batch}"
    if variant == "plain":
        benchmark(timed(layer, batch, shape))
        return
    gated = getattr(mk, f"Gated{type(layer).__name__}").from_plain(layer)
    beta = torch.full((batch,), 0.5) if variant == "one beta a sample" else 0.5
    x = torch.randn(batch, *shape)
    with mk.override(backend="reference"):
        expected = gated(x, beta)
    strategy = variant if variant in ("fold", "epilogue") else None
    with mk.override(strategy=strategy, backend="reference" if variant == "reference" else None):
        torch.testing.assert_close(gated(x, beta), expected, rtol=1e-4, atol=1e-5)  # no time for wrong numbers
        benchmark(timed(lambda inputs: gated(inputs, beta), batch, shape))
