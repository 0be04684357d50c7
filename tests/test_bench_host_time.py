"""bench.host_time: both beginnings of a call give the same gates, folds and gradients, and both are timed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mrvae_kernels as mk
from bench import host_time
from mrvae_kernels import ops

pytestmark = pytest.mark.skipif(not ops.EXTENSION, reason=f"the compiled core is missing: {ops.EXTENSION_ERROR}")


def test_both_beginnings_give_the_same_and_leave_the_network_as_it_was():
    model = mk.multirate(nn.Sequential(nn.GroupNorm(1, 4), nn.GroupNorm(2, 4)), gates="sigmoid")
    x = torch.randn(3, 4, 5, 5)
    y = model(x, beta=0.5)
    found = []
    for begin in host_time.beginnings(model, x):
        model.zero_grad(set_to_none=True)
        shares = begin()
        folded = [value for share in shares for value in share.folded.values()]
        assert len(folded) == 4, "weight and bias of either norm"
        host_time.gradients(shares)
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient.any() for gradient in gradients)
        found.append([*(share.gate for share in shares), *folded, *gradients])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert torch.equal(model(x, beta=0.5), y)


def test_a_network_whose_calls_are_not_prepared_is_refused():
    model = mk.multirate(nn.Sequential(nn.LayerNorm((2, 3))), gates="sigmoid")
    with pytest.raises(RuntimeError, match="not prepared"):
        host_time.beginnings(model, torch.randn(4, 2, 3))


def test_the_command_prints_both_directions(capsys):
    threads = torch.get_num_threads()
    try:
        host_time.main(["--layers", "2", "--rounds", "10"])
    finally:
        torch.set_num_threads(threads)
    forward, both = capsys.readouterr().out.splitlines()
    assert forward.startswith("forward  prepared ") and both.startswith("both     prepared ") and "ratio " in both
    with pytest.raises(SystemExit):
        host_time.main(["--layers", "0"])
    assert "--layers is 0" in capsys.readouterr().err
