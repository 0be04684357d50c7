"""Running statistics of instance norms for one beta; those of batch norms are in test_multirate_state."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize
from torch import Tensor, nn

import mrvae_kernels as mk


class InstanceNorms(nn.Module):
    """Instance norms that keep running statistics: one that is called twice, and one without an affine."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3)
        self.twice = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
        self.once = nn.InstanceNorm2d(2, momentum=0.5, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(self.first(x)) + self.twice(self.first(2 * x))
        return self.once(self.last(h))


def by_hand(network: InstanceNorms, gate: Tensor, batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean over calls and samples of each instance's mean and unbiased variance, within `at(beta)`."""
    gate, weight, bias = (v[:, None, None] for v in (gate, network.twice.weight, network.twice.bias))
    called = [[network.first(scale * x) for scale in (1, 2)] for x in batches]
    sums = [sum(gate * (weight * F.instance_norm(u) + bias) for u in pair) for pair in called]
    calls = {"twice": [u for pair in called for u in pair], "once": [network.last(h) for h in sums]}
    return {
        name: (
            torch.stack([u.mean((0, 2, 3)) for u in each]).mean(0),
            torch.stack([u.var((2, 3)).mean(0) for u in each]).mean(0),
        )
        for name, each in calls.items()
    }


@pytest.mark.parametrize("momentum", [0.1, None])
def test_instance_norms_get_the_means_over_all_calls_at_this_beta(backend, momentum):
    model = randomize(mk.multirate(InstanceNorms().double(), "softplus")).eval()
    assert list(model.gated) == ["first", "last", "twice"]
    batches = [torch.randn(5, 1, 8, 8, dtype=torch.float64) + k for k in range(3)]
    norms = {name: model.network.get_submodule(name) for name in ("twice", "once")}
    norms["twice"].momentum = momentum
    for beta in (0.3, 5.0):
        assert model.recalibrate(batches, beta) == 3
        with torch.no_grad(), model.at(beta):
            expected = by_hand(model.network, model.gate_values(beta)["twice"], batches)
        for name, norm in norms.items():
            torch.testing.assert_close(norm.running_mean, expected[name][0])
            torch.testing.assert_close(norm.running_var, expected[name][1])
            assert not norm.training and not norm._forward_pre_hooks
        assert norms["twice"].momentum == momentum and norms["once"].momentum == 0.5
        torch.testing.assert_close(mk.bake(model, beta, batches)(batches[0]), model(batches[0], beta=beta))


def test_without_batches_bake_says_that_the_statistics_of_instance_norms_mix_betas():
    model = mk.multirate(InstanceNorms(), "softplus")
    with pytest.warns(UserWarning, match="the running statistics of 2 norms mix the betas of training"):
        mk.bake(model, 0.3)


def test_a_failing_batch_leaves_instance_norms_as_they_were():
    model = mk.multirate(InstanceNorms(), "softplus")
    model.recalibrate([torch.randn(5, 1, 8, 8)], 0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="x has shape"):
        model.recalibrate([torch.randn(5, 1, 8, 8), torch.randn(5, 7, 8, 8)], 5.0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    norm = model.network.twice
    assert norm.momentum == 0.1 and norm.training and not norm._forward_pre_hooks
