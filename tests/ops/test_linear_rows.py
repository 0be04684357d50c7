"""One gate for all rows of a Linear: every way in which the CPU kernels cut rows and channels, against float64."""

import pytest
import torch

from mrvae_kernels.ops import EXTENSION

pytestmark = pytest.mark.skipif(not EXTENSION, reason="the compiled core is not built")

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("strategy", ["epilogue", "fold"])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("with_bias", [False, True])
# rows: in one task, in several, too many for sums in float; channels: short rows, with and without a rest, long ones.
# inputs: a channel's run in the weight is below a block, two of them, one with a rest, and a loop of its own
@pytest.mark.parametrize(
    ("rows", "channels", "inputs"),
    [(1, 1, 1), (16, 32, 8), (65, 7, 20), (300, 5, 32), (130, 20, 60), (300, 300, 16), (2100, 24, 7), (40, 900, 80)],
)
def test_gradients(rows, channels, inputs, with_bias, activation, strategy, dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def gates(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.25

    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    values = [
        draw(rows, inputs).to(dtype), (draw(channels, inputs) / inputs**0.5).to(dtype),
        draw(channels).to(dtype) if with_bias else None, gates(channels).to(gate_dtype),
    ]
    x, weight, bias, gate = (None if t is None else t.double() for t in values)
    z = gate * (x @ weight.T + (0 if bias is None else bias))
    grad = (draw(rows, channels) * (z.abs() > 0.05)).to(dtype)  # at a kink rounding decides on which side

    def run(found, of):
        tensors = [None if t is None else found(t).requires_grad_() for t in values]
        y = of(*tensors)
        y.backward(found(grad).to(y.dtype))
        return [y.detach(), *(t.grad for t in tensors if t is not None)]

    def expected(x, weight, bias, gate):
        z = gate * (x @ weight.T + (0 if bias is None else bias))
        return z.relu() if activation == "relu" else z

    want = run(lambda t: t.detach().double(), expected)
    got = run(
        lambda t: t.detach().clone(),
        lambda x, weight, bias, gate: torch.ops.mrvae.gated_linear(x, weight, bias, gate, None, activation, strategy),
    )
    for a, b in zip(got, want, strict=True):
        error = (a.double() - b).norm() / b.norm().clamp_min(1e-3)
        assert error < TOLERANCE[dtype], error
