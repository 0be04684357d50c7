"""Correctness, timings and a profile of the GPU kernels in one run: `python -m bench.gpu --out FOLDER`.

Correctness: every strategy of every layer in bench/shapes.py, y and all gradients, against float64 on the same GPU.
Timings: each layer by each variant of bench/layer_variants.py at batch 16, 128 and 1024, forward and forward +
backward; GPU time from CUDA graphs, host time by the clock, medians of interleaved rounds, as ratios to the library's
layer followed by its activation. The fraction of the roofline takes the bytes and operations that the gated layer needs
at least over ceilings measured in the same run. A time budget stops the run between layers;
what was left out is listed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mrvae_models.networks import build
from torch import Tensor, nn

import mrvae_kernels as mk
from mrvae_kernels import measurements
from mrvae_kernels.adapters import ADAPTERS
from mrvae_kernels.functional import convolution_output_numel
from mrvae_kernels.measuring import inputs_of_layers, time_backends
from mrvae_kernels.strategy import triton_refusals

from .gpu_timing import ceilings, device_times, float32_precision, host_times, synchronize
from .layer_variants import OURS, VARIANTS, GatedCase
from .overhead import machine
from .shapes import BATCHES, CASES, Case

LIMITS = {"ieee": 1e-5, "tf32": 1e-3, "bfloat16": 1e-2}
"""Largest relative error, in norm, by precision."""
NUMBERS = {"ieee": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


# ---- correctness -----------------------------------------------------------------------------------------------------


def errors(case: Case, batch: int, precision: str, device: torch.device) -> dict[str, Any]:
    """Each strategy's relative errors in y and the gradients, or why it does not take the layer."""
    gated = GatedCase(case, batch, NUMBERS[precision], device)
    x = gated.inputs[0]
    found: dict[str, Any] = {}
    with float32_precision(precision if precision == "tf32" else "ieee"):
        for name in OURS:
            try:
                with mk.override(backend="triton"):
                    y = gated.forward(name, x)
                    got = (y, *gated.both(name, x))
            except ValueError as refusal:
                found[name] = {"refused": str(refusal)}
                continue
            exact = _exact(gated, x)
            labels = ("y", "dx", "dweight", "dbias", "dgate")
            pairs = zip(labels, got, exact, strict=True)
            found[name] = {label: _error(a, b) for label, a, b in pairs}
    return {"case": case.name, "network": case.network, "batch": batch, "precision": precision, "errors": found}


def _exact(gated: GatedCase, x: Tensor) -> tuple[Tensor, ...]:
    double = GatedCase.__new__(GatedCase)
    double.case, double.layer = gated.case, gated.case.layer(x.device, torch.float64)
    double.layer.load_state_dict(gated.layer.state_dict())
    double.gate = gated.gate.detach().double().requires_grad_()
    wide = x.detach().double().requires_grad_()
    y = double._separate(wide)
    assert gated.grad is not None
    return (y, *torch.autograd.grad(y, [wide, *double.layer.parameters(), double.gate], gated.grad.double()))


def _error(got: Tensor, exact: Tensor) -> float:
    error, scale = (got.double() - exact).norm().item(), exact.norm().item()
    return error / scale if scale > 0 else error


# ---- timings ---------------------------------------------------------------------------------------------------------


def least_bytes(case: Case, batch: int, item: int, backward: bool) -> int:
    """Bytes that the gated layer moves at least: forward reads x and W, writes y; backward reads dy, x and W, and y for
    the activation's slope, and writes dx and dW."""
    x, weight, y = batch * math.prod(case.shape), case.layer().weight.numel(), _outputs(case, batch)
    forward = x + weight + y
    return item * (forward + (y + y + x + weight + x + weight if backward else 0))


def _outputs(case: Case, batch: int) -> int:
    layer: Any = case.layer()
    if case.kind is nn.Linear:
        return batch * layer.out_features
    geometry = (layer.stride, layer.padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups)
    return convolution_output_numel(torch.empty((batch, *case.shape), device="meta"), layer.weight, *geometry)


def time_case(
    case: Case, batch: int, precision: str, device: torch.device, tops: dict[str, float], rounds: int, compiled: bool
) -> dict[str, Any]:
    """GPU and host milliseconds of every variant, forward and forward + backward."""
    dtype = NUMBERS[precision]
    item = torch.empty((), dtype=dtype).element_size()
    # inputs beyond twice the last-level cache, so that it does not hold them from one call to the next
    a_call = item * (batch * math.prod(case.shape) + _outputs(case, batch))
    copies = max(1, min(8, math.ceil((120 << 20) / max(1, a_call))))
    gated = GatedCase(case, batch, dtype, device, copies)
    result: dict[str, Any] = {"case": case.name, "network": case.network, "batch": batch, "precision": precision}
    with float32_precision(precision if precision == "tf32" else "ieee"), mk.override(backend="triton"):
        names = [name for name in VARIANTS if (compiled or not name.endswith("compiled")) and _runs(gated, name)]
        for kind in ("forward", "both"):
            steps = {name: gated.steps(name, kind == "both") for name in names}
            gpu = device_times(steps, device, copies, rounds)
            host = host_times(steps, device, max(1, rounds // 3), 10 if device.type == "cuda" else 1)
            floor = max(
                least_bytes(case, batch, item, kind == "both") / tops["bytes"],
                case.operations(batch) * (3 if kind == "both" else 1) / tops[precision],
            )
            medians = {name: statistics.median(times) for name, times in gpu.items()}
            result[kind] = {
                "gpu_ms": gpu, "host_ms": host, "floor_ms": floor * 1e3,
                "ratio": {name: _ratio(gpu[name], gpu["library"]) for name in names},
                "host_ratio": {name: _ratio(host[name], host["library"]) for name in names},
                "roofline": {name: floor * 1e3 / median for name, median in medians.items()},
            }
    return result


def _runs(gated: GatedCase, name: str) -> bool:
    try:
        gated.both(name, gated.inputs[0])
    except ValueError:
        return False  # a strategy that refuses this layer
    return True


def _ratio(times: list[float], baseline: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, baseline, strict=True))


# ---- reports ---------------------------------------------------------------------------------------------------------


def table(results: list[dict[str, Any]], kind: str = "both") -> str:
    """Markdown: GPU time over the library's, one row a layer, losing shapes included; then the geometric means."""
    columns = [name for name in VARIANTS if name != "library"]
    lines = ["| network | layer | batch | precision | " + " | ".join(columns) + " | best of ours, host | roofline |"]
    lines.append("|---" * (len(columns) + 6) + "|")
    for result in results:
        part = result[kind]
        best = min((name for name in OURS if name in part["ratio"]), key=part["ratio"].__getitem__)
        cells = [f"{part['ratio'][name]:.3f}" if name in part["ratio"] else "" for name in columns]
        row = (result["network"], result["case"], result["batch"], result["precision"], *cells)
        lines.append(f"| {' | '.join(map(str, row))} | {part['host_ratio'][best]:.2f} | {part['roofline'][best]:.2f} |")
    means = []
    for name in columns:
        ratios = [result[kind]["ratio"][name] for result in results if name in result[kind]["ratio"]]
        means.append(f"{statistics.geometric_mean(ratios):.3f}" if ratios else "")
    lines.append(f"| all | geometric mean | | | {' | '.join(means)} | | |")
    return "\n".join(lines)


def record(results: list[dict[str, Any]], backends: dict[str, measurements.Times]) -> measurements.Record:
    """What `measurements` keeps: times over the library's by shape class, forward + backward, and the backends."""
    strategies: dict[str, measurements.Times] = {}
    classes: dict[str, list[measurements.Times]] = {}
    for result in results:
        case = next(case for case in CASES if case.name == result["case"] and case.network == result["network"])
        key = shape_class(case, result["batch"], result["precision"])
        ratios = result["both"]["ratio"]
        classes.setdefault(key, []).append({name: ratios[name] for name in OURS if name in ratios})
    for key, found in classes.items():
        common = set.intersection(*(set(times) for times in found))
        strategies[key] = {name: statistics.geometric_mean(times[name] for times in found) for name in sorted(common)}
    return {"backends": backends, "strategies": strategies}


def shape_class(case: Case, batch: int, precision: str) -> str:
    """The case's class in `measurements`, for one beta a batch."""
    x = torch.empty((batch, *case.shape), device="meta")
    product = ADAPTERS[case.kind].measured_product(case.layer(), x, torch.device("cpu"))
    assert product is not None
    numbers = "float32" if precision == "ieee" else precision
    return measurements.shape_class(
        product.operation, numbers, False, product.rows, product.columns, product.terms
    )


def backends_of_a_network(device: torch.device, rounds: int) -> dict[str, measurements.Times]:
    """Milliseconds of a whole network's gates, folds and epilogues on each backend: the MNIST CNN, batch 128."""
    model = mk.multirate(build("cnn", (1, 28, 28))).to(device)
    inputs = inputs_of_layers(model, (torch.rand(128, 1, 28, 28, device=device),), {"beta": 0.5})
    return time_backends(model, inputs, 0.5, rounds)


def profile(device: torch.device) -> str:
    """torch.profiler's table of the kernels of one layer's forward and backward by each of our strategies."""
    gated = GatedCase(CASES[1], 128, torch.float32, device)
    with mk.override(backend="triton"):
        steps = [gated.steps(name, True) for name in OURS if _runs(gated, name)]
        for step in steps:
            step()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as events:
            for step in steps:
                step()
            synchronize(device)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return events.key_averages().table(sort_by=order, row_limit=40)


def main(argv: list[str] | None = None) -> int:
    """The command; 0, 1 for a kernel that is wrong, 2 where nothing can be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the result files")
    parser.add_argument("--networks", nargs="+", choices=sorted({case.network for case in CASES}))
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--precision", nargs="+", choices=list(NUMBERS), default=list(NUMBERS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--no-correctness", action="store_true", help="timings only")
    parser.add_argument("--no-timing", action="store_true", help="correctness only")
    parser.add_argument("--seconds", type=float, default=540, help="start nothing new after this long (default 540)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu: torch finds no GPU; this benchmark measures one", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    if refusals := triton_refusals(device, torch.float32):
        print(f"bench.gpu: {'; '.join(refusals)}", file=sys.stderr)
        return 2
    cases = [case for case in CASES if not options.networks or case.network in options.networks]
    return run(cases, device, options)


def run(cases: list[Case], device: torch.device, options: argparse.Namespace, size: int = 8192) -> int:
    """Everything, with the results written after each part; the worst error decides the exit code."""
    deadline = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    name = measurements.device_name(device)
    report: dict[str, Any] = {"machine": {**machine(), "device": name, **versions}, "command": sys.argv[1:]}
    path = options.out / f"{measurements.file_name(name).removesuffix('.json')}-{report['machine']['date']}.json"
    wrong: list[str] = []
    report["ceilings"] = ceilings(device, max(1, size // 4), size)
    print(", ".join(f"{key} {value:.4g}/s" for key, value in report["ceilings"].items()), flush=True)
    if not options.no_correctness:
        report["correctness"] = []
        for case in cases:
            for precision in LIMITS:
                if time.monotonic() > deadline:
                    break
                found = errors(case, min(options.batch), precision, device)
                report["correctness"].append(found)
                for strategy, values in found["errors"].items():
                    bad = [f"{k} {v:.2g}" for k, v in values.items() if k != "refused" and not v <= LIMITS[precision]]
                    if bad:
                        wrong.append(f"{case.name} {precision} {strategy}: {', '.join(bad)}")
        path.write_text(json.dumps(report))
        count = len(report["correctness"])
        print(f"correctness: {count} layers and precisions, {len(wrong)} wrong", *wrong, sep="\n  ")
    results: list[dict[str, Any]] = []
    left_out: list[str] = []
    for batch in () if options.no_timing else options.batch:
        for case in cases:
            for precision in options.precision:
                label = f"{case.name} batch {batch} {precision}"
                if time.monotonic() > deadline:
                    left_out.append(label)
                    continue
                tops, compiled = report["ceilings"], not options.no_compile
                results.append(time_case(case, batch, precision, device, tops, options.rounds, compiled))
                torch._dynamo.reset()
                torch.get_device_module(device).empty_cache() if device.type != "cpu" else None
        report |= {"results": results, "left_out": left_out}
        path.write_text(json.dumps(report))
    if results:
        report["backends"] = backends_of_a_network(device, options.rounds)
        path.write_text(json.dumps(report))
        measured = record(results, report["backends"])
        measurements.write(options.out / measurements.file_name(name), name, versions, measured)
        (options.out / "profile.txt").write_text(profile(device))
        for kind in ("forward", "both"):
            print(f"\n{kind}: GPU time over the library's\n{table(results, kind)}")
    print(f"\nwritten: {path}" + (f"; left out for lack of time: {len(left_out)}" if left_out else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
