"""One network, several threads: each gets its own beta's output."""

import copy
import threading

import pytest
import torch
from torch import nn

import mrvae_kernels as mk


def network():
    torch.manual_seed(0)
    return mk.multirate(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), "sigmoid").eval()


@pytest.mark.parametrize("rows", [4, 64])
def test_threads_do_not_get_each_others_gates(rows):
    model, x = network(), torch.randn(rows, 32)
    model(x, beta=0.5)
    assert set(next(iter(model._plans.made.values()))) == {"epilogue" if rows == 4 else "fold"}
    wanted = {beta: model(x, beta=beta).detach() for beta in (0.02, 0.3, 5.0)}
    wrong = []

    def run(beta):
        for _ in range(200):
            if not torch.equal(model(x, beta=beta), wanted[beta]):
                wrong.append(beta)

    threads = [threading.Thread(target=run, args=(beta,)) for beta in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_block_keeps_other_threads_waiting():
    model, x = network(), torch.randn(4, 32)
    wanted = model(x, beta=5.0).detach()
    found = []
    thread = threading.Thread(target=lambda: found.append(model(x, beta=5.0)))
    with model.at(0.02):
        thread.start()
        thread.join(timeout=0.2)
        assert found == []
        inside = model.network(x)
    thread.join()
    torch.testing.assert_close(inside, model(x, beta=0.02))
    assert torch.equal(found[0], wanted)


def test_a_copy_made_in_a_block_has_a_lock_of_its_own():
    model, x = network(), torch.randn(4, 32)
    with model.at(0.02):
        twin = copy.deepcopy(model)
        found = []
        thread = threading.Thread(target=lambda: found.append(twin(x, beta=5.0)))
        thread.start()
        thread.join(timeout=10)
    torch.testing.assert_close(found[0], model(x, beta=5.0))


@pytest.mark.parametrize("change", ["replaced", "parametrized"])
def test_a_layer_changed_after_the_first_call_is_named(change):
    model, x = network(), torch.randn(4, 32)
    model(x, beta=0.5)
    if change == "replaced":
        model.network[2] = nn.Linear(32, 32)
    else:
        nn.utils.parametrizations.spectral_norm(model.network[2])
    with pytest.raises(RuntimeError, match="'2' is a .*Linear: it was replaced or parametrized after multirate"):
        model(x, beta=0.5)


@pytest.mark.parametrize("layer", [mk.GatedLinear(4, 4), mk.ConditionalBatchNorm1d(4)])
def test_layers_that_take_beta_themselves_are_refused(layer):
    with pytest.raises(ValueError, match=f"'1' is a {type(layer).__name__}, which takes beta itself"):
        mk.multirate(nn.Sequential(nn.Linear(4, 4), layer), "sigmoid")


def test_plans_do_not_outlive_a_change_of_dtype():
    model, x = network(), torch.randn(4, 32)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        first, second = (model(x.to(dtype), beta=0.5) for _ in range(2))
        assert first.dtype == dtype and torch.equal(first, second)
