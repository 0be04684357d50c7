"""Host time of how a call begins, its gates and folds, prepared over operator by operator: `python -m bench.host_time`.

Ten group norms of 4 channels, which are folded before the network runs (a Linear or a convolution on a CPU folds when
it is called): the kernels take next to nothing, so that what is left is Python, autograd and the dispatcher. Both ways
run interleaved in one process, forward and with backward; medians and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import mrvae_kernels as mk
from mrvae_kernels.hosting import Share

Beginning = Callable[[], Sequence[Share]]


def beginnings(model: mk.MultiRate, x: Tensor, beta: float = 0.5) -> tuple[Beginning, Beginning]:
    """The two ways in which a call on x may begin, each giving the layers' shares: prepared, and one by one.

    RuntimeError where the call's plan is not one that is prepared."""
    model(x, beta=beta)
    key, plan = next(iter(model._plans.prepared.items()), (None, None))
    if plan is None:
        raise RuntimeError("calls of this network are not prepared: a layer folds parts of its parameters")

    def prepared() -> Sequence[Share]:
        if not model._plans.begin(plan, (x,), beta):
            raise RuntimeError("the prepared plan refused the call that it was made for")
        layers = model._hosts()
        plan.hand_out(layers)
        shares = [layer._share for layer in layers]
        plan.take_back(layers)
        model._plans.stage.gates = None
        return shares

    return prepared, lambda: model._plans.shares(model._gates(beta), key)


def gradients(shares: Sequence[Share]) -> None:
    """Backward through all that the shares hold folded."""
    folded = [value for share in shares for value in (share.folded or {}).values() if value is not None]
    torch.autograd.backward(folded, [torch.ones_like(value) for value in folded])


def measure(layers: int, rounds: int) -> dict[str, float]:
    """Medians in microseconds by name. RuntimeError where the compiled core is missing."""
    if not mk.ops.EXTENSION:
        raise RuntimeError(f"there is nothing to compare: {mk.ops.EXTENSION_ERROR}")
    torch.manual_seed(0)
    model = mk.multirate(nn.Sequential(*(nn.GroupNorm(1, 4) for _ in range(layers))), gates="sigmoid")
    x = torch.randn(4, 4, 8, 8)
    prepared, separate = beginnings(model, x)
    steps: dict[str, Callable[[], object]] = {
        "prepared, forward": prepared, "separate, forward": separate,
        "prepared, both": lambda: gradients(prepared()), "separate, both": lambda: gradients(separate()),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            model.zero_grad(set_to_none=True)
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[rounds // 10 :]) * 1e6 for name, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=__doc__)
    parser.add_argument("--layers", type=int, default=10, help="group norms (default 10)")
    parser.add_argument("--rounds", type=int, default=2000, help="interleaved runs of each (default 2000)")
    options = parser.parse_args(arguments)
    if options.layers < 1 or options.rounds < 1:
        parser.error(f"--layers is {options.layers} and --rounds {options.rounds}; expected positive numbers")
    torch.set_num_threads(1)
    medians = measure(options.layers, options.rounds)
    for what in ("forward", "both"):
        ours, theirs = medians[f"prepared, {what}"], medians[f"separate, {what}"]
        print(f"{what:8} prepared {ours:7.1f} us, separate {theirs:7.1f} us, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
