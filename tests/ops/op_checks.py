"""What the tests of the C++ operators share: comparison with a float64 oracle, subsets, compilation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from mrvae_kernels import ops

requires_extension = pytest.mark.skipif(not ops.EXTENSION, reason=f"no C++ core: {ops.EXTENSION_ERROR}")

DEVICE = "cuda" if torch.cuda.is_available() and ops.GPU_TYPE == "cuda" else "cpu"
"""Where conftest.py has tensors drawn."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest error allowed relative to the largest element, for results of at most a few thousand terms."""

Outputs = Tensor | Sequence[Tensor]


def reversed_strides(tensor: Tensor) -> Tensor:
    """Random, of the same shape, with the first axis innermost."""
    return torch.randn(tensor.shape[::-1], dtype=tensor.dtype).permute(*reversed(range(tensor.dim())))


def leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy with the same strides that requires a gradient."""
    copy = tensor.detach().clone(memory_format=torch.preserve_format)
    return copy.to(dtype or tensor.dtype).requires_grad_()


def flat(outputs: Outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [t for t in outputs if t is not None and t.requires_grad]


def listed(outputs: Outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    assert actual.shape == expected.shape, name
    if actual.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * max(1e-3, expected.double().abs().max().item()), f"{name}: error {error}"


def agree(
    run: Callable[..., Outputs], oracle: Callable[..., Outputs], tensors: Sequence[Tensor | None],
    tolerance: float | None = None, grads: Callable[[Tensor], Tensor] = torch.randn_like,
) -> None:
    """Outputs and all gradients of `run` equal those of `oracle` computed in float64 from the same (rounded) values."""
    given = [leaf(t) if t is not None else None for t in tensors]
    exact = [leaf(t, torch.float64) if t is not None else None for t in tensors]
    outputs, expected = flat(run(*given)), flat(oracle(*exact))
    limit = tolerance or max(TOLERANCE[t.dtype] for t in given if t is not None)
    weights = [grads(out) for out in outputs]
    for i, (out, want) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(out, want, limit, f"output {i}")
    leaves, exact_leaves = ([t for t in side if t is not None] for side in (given, exact))
    got = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    want = torch.autograd.grad(expected, exact_leaves, [w.double() for w in weights], allow_unused=True)
    for i, (g, e, t) in enumerate(zip(got, want, leaves, strict=True)):
        assert (g is None) == (e is None), f"gradient {i}"
        if g is not None:
            assert g.dtype == t.dtype, f"gradient {i}"
            assert_close(g, e, limit, f"gradient {i}")


def subsets(count: int) -> Iterator[tuple[bool, ...]]:
    """Every choice of which of `count` tensors require a gradient, except none of them."""
    return (choice for choice in itertools.product((True, False), repeat=count) if any(choice))


def check_subsets(run: Callable[..., Outputs], tensors: Sequence[Tensor]) -> None:
    """For every subset of inputs that require a gradient the gradients equal those with all of them."""
    everything = [leaf(t) for t in tensors]
    outputs = flat(run(*everything))
    weights = [torch.randn_like(out) for out in outputs]
    full = torch.autograd.grad(outputs, everything, weights, allow_unused=True)
    for choice in subsets(len(tensors)):
        some = [leaf(t).requires_grad_(needs) for t, needs in zip(tensors, choice, strict=True)]
        wanted = [t for t in some if t.requires_grad]
        pairs = [(o, w) for o, w in zip(listed(run(*some)), weights, strict=True) if o.requires_grad]
        got = torch.autograd.grad([o for o, _ in pairs], wanted, [w for _, w in pairs], allow_unused=True)
        expected = [g for g, needs in zip(full, choice, strict=True) if needs]
        for g, e in zip(got, expected, strict=True):
            assert g is not None and e is not None, choice
            torch.testing.assert_close(g, e)
    with torch.no_grad():
        for out, plain in zip(outputs, listed(run(*everything)), strict=True):
            assert not plain.requires_grad
            torch.testing.assert_close(plain, out.detach(), rtol=1e-6, atol=1e-6)


def check_compiled(run: Callable[..., Outputs], batches: Sequence[Sequence[Tensor | None]]) -> None:
    """One graph serves inputs of several sizes, and gives eager's outputs and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for tensors in batches:
        sides = []
        for function in (compiled, run):
            given = [leaf(t) if t is not None else None for t in tensors]
            outputs = flat(function(*given))
            loss = sum((out * torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape)).sum() for out in outputs)
            leaves = [t for t in given if t is not None]
            sides.append((outputs, torch.autograd.grad(loss, leaves, allow_unused=True)))
        (outputs, grads), (expected, expected_grads) = sides
        for a, b in zip([*outputs, *grads], [*expected, *expected_grads], strict=True):
            torch.testing.assert_close(a, b)


def check_once_differentiable(run: Callable[..., Outputs], tensors: Sequence[Tensor | None], name: str) -> None:
    """Using create_graph is fine; differentiating the gradient raises an error that says so."""
    given = [leaf(t) if t is not None else None for t in tensors]
    loss = sum((out**2).sum() for out in flat(run(*given)))
    grads = torch.autograd.grad(loss, [t for t in given if t is not None], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} is differentiable once"):
        grads[0].sum().backward()


def same_bits_for_any_threads(compute: Callable[[], Sequence[Tensor]]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = compute()
        torch.set_num_threads(3)
        many, again = compute(), compute()
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(one, many, again, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)
