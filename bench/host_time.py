"""Host time of a step's gates and folds, prepared over operator by operator: `python -m bench.host_time`.

Ten convolutions of 4 x 4 channels: the kernels take next to nothing, so that what is left is Python, autograd and the
dispatcher. Both ways run interleaved in one process, forward and with backward; medians and their ratio.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

import mrvae_kernels as mk
from mrvae_kernels.hosting import Share


def gradients(shares: Sequence[Share]) -> None:
    """Backward through all that the shares hold folded."""
    folded = [value for share in shares for value in (share.folded or {}).values() if value is not None]
    torch.autograd.backward(folded, [torch.ones_like(value) for value in folded])


def measure(layers: int, rounds: int) -> dict[str, float]:
    """Medians in microseconds by name. RuntimeError where the compiled core is missing."""
    if not mk.ops.EXTENSION:
        raise RuntimeError(f"there is nothing to compare: {mk.ops.EXTENSION_ERROR}")
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(layers)))
    model = mk.multirate(copy.deepcopy(plain), gates="sigmoid")
    x = torch.randn(4, 4, 8, 8)
    with mk.override(strategy="fold"):
        for _ in range(2):
            model(x, beta=0.5)
        key = next(iter(model._plans))
        hosts, eta = model._hosts(), 0.1

        def prepared() -> Sequence[Share]:
            return model._prepared[key].shares(hosts, model.gate_weight, model.gate_bias, eta)

        def separate() -> Sequence[Share]:
            return model._shares(0.5, key)

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
    parser.add_argument("--layers", type=int, default=10, help="convolutions (default 10)")
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
