"""What is installed, what would run where, and why: `python -m mrvae_kernels.doctor`."""

from __future__ import annotations

import argparse
import ast
import os
import platform
import sys
from collections.abc import Sequence

import torch
from torch import nn

from . import __version__, measurements, ops, strategy
from .adapters import ADAPTERS, RecurrentAdapter
from .backends import code_refusal
from .strategy import NO_TRITON, TRITON_INSTALLED, explain

EXAMPLES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("Linear(784, 300)", (128, 784)),
    ("Linear(784, 300)", (16, 784)),
    ("Linear(32, 16384)", (128, 32)),
    ("Conv2d(128, 256, 4, 2, 1)", (128, 128, 14, 14)),
    ("Conv2d(512, 1024, 4, 2, 1)", (16, 512, 3, 3)),
    ("ConvTranspose2d(512, 256, 3, 2, 1, 1)", (16, 512, 7, 7)),
    ("BatchNorm2d(256)", (128, 256, 7, 7)),
)
"""Layers of the bundled networks, with the batches of the paper."""

VARIABLES = ("MRVAE_STRATEGY", "MRVAE_BACKEND")


def parse_layer(text: str) -> nn.Module:
    """A torch.nn layer without storage from its constructor call, such as "Conv2d(64, 128, 3, padding=1)".

    Only the gateable kinds, and only literal arguments: nothing in the text is executed. ValueError otherwise.
    """
    kinds = {kind.__name__: kind for kind in ADAPTERS}
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError
        args = [ast.literal_eval(arg) for arg in call.args]
        kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f"layer is {text!r}; expected a call such as Linear(784, 300) or Conv2d(64, 128, 3, padding=1)"
        ) from None
    if call.func.id not in kinds:
        raise ValueError(f"layer is a {call.func.id}; expected one of {', '.join(kinds)}")
    try:
        return kinds[call.func.id](*args, **{**kwargs, "device": "meta"})
    except (TypeError, ValueError) as error:
        raise ValueError(f"layer {text!r}: {error}") from None


def parse_shape(text: str) -> tuple[int, ...]:
    """(128, 784) from "128x784" or "128,784"."""
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(",") if part.strip())
    except ValueError:
        raise ValueError(f"input is {text!r}; expected sizes such as 128x784") from None


def describe(layer: nn.Module, text: str, shape: Sequence[int], per_sample: bool, device: str) -> list[str]:
    """Lines that say what runs for this layer and input, and why not the rest."""
    try:
        output = layer(torch.empty(tuple(shape), device="meta"))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"{text} does not take an input of shape {tuple(shape)}: {error}") from None
    output = output[0] if isinstance(output, tuple) else output
    adapter = ADAPTERS[type(layer)]
    if reason := adapter.refusal(layer):
        raise ValueError(f"{text} cannot be gated: {reason}")
    weights = sum(layer.get_parameter(entry.weight).numel() for entry in adapter.entries(layer))
    head = f"{text}, input {'x'.join(map(str, shape))}, {'one beta a sample' if per_sample else 'one beta'}, {device}"
    if per_sample and isinstance(adapter, RecurrentAdapter):
        reason = "a Python step for each time step: torch's kernels take one weight a batch"
        return [head, f"  the recurrence written out, {reason}"]
    x = torch.empty(tuple(shape), device="meta")
    try:
        if not adapter.product:  # whatever strategy is asked for: it is asked of products
            how, reason = "fold", "norms and recurrent layers always fold one beta into their parameters"
            if per_sample:
                how, reason = "epilogue", "one beta a sample, by norms always after the plain norm"
            backend = strategy.choose_backend(torch.device(device), torch.float32, how)
            return [head, f"  {how} on {backend}: {reason}"]
        product = adapter.measured_product(layer, x, torch.device(device))
        refusal = adapter.fused_refusal(layer, x)
        kind = "linear" if isinstance(layer, nn.Linear) else "convolution"
        choice = explain(weights, output.numel(), per_sample, device, product=product, fused_refusal=refusal, kind=kind)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{text}: {error}{_advice()}") from None
    return [head, f"  {choice.strategy} on {choice.backend}: {choice.reason}", *(f"  not {r}" for r in choice.rejected)]


def _advice() -> str:
    """What to do about an error that MRVAE_STRATEGY or MRVAE_BACKEND causes; empty where neither is set."""
    names = [name for name in VARIABLES if os.environ.get(name)]
    if not names:
        return ""
    return f"; unset {' and '.join(names)}"


def environment() -> list[str]:
    """Lines on versions, the extension and the devices."""
    capability = torch.backends.cpu.get_cpu_capability()
    lines = [
        f"mrvae_kernels  {__version__}",
        f"python         {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch          {torch.__version__}, {torch.get_num_threads()} threads, CPU capability {capability}",
    ]
    if ops.EXTENSION:
        facts = ops.build_facts()
        core = ", ".join(f"{key} {facts[key]}" for key in ("torch", "compiler", "flags", "commit"))
        lines.append(f"C++ core       built ({core})")
    else:
        lines.append(f"C++ core       missing: {ops.EXTENSION_ERROR}; plain PyTorch runs instead, slower")
    lines.append(f"CUDA core      {_cuda_core()}")
    if torch.cuda.is_available():
        lines += [f"GPU            {line}" for line in map(_gpu, range(torch.cuda.device_count()))]
    else:
        lines.append("GPU            none that torch can use")
    lines.append(f"Triton         {_triton()}")
    for name in VARIABLES:
        lines.append(f"{name} {os.environ.get(name, 'not set')}")
    return lines


def _cuda_core() -> str:
    if error := ops.cuda_error():
        return f"missing: {error}"
    facts = ops.build_facts()
    return f"built (CUDA {facts['cuda']}, {facts['architectures']}, nvcc flags {facts['nvcc_flags']})"


def _triton() -> str:
    if not TRITON_INSTALLED:
        return NO_TRITON
    return measurements.triton_version() or "installed, in an unknown version: no distribution tells"


def _gpu(index: int) -> str:
    device = torch.device("cuda", index)
    known = measurements.records(device)
    wins = [
        f"{operator} by {best}" for operator in ("gates", "fold", "epilogue", "fused")
        if (best := measurements.best_backend(device, operator)) not in (None, "reference")
    ]
    name = measurements.device_name(device)
    if not ops.CUDA_ERROR and (lacking := code_refusal(device)):
        name += f" ({lacking})"
    if not any(known.values()):
        return f"{name}: nothing measured, plain PyTorch runs; {strategy.HOW_TO_MEASURE}"
    return f"{name}: {', '.join(wins) or 'plain PyTorch'}; {len(known['strategies'])} shape classes measured"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0, or 2 for arguments or environment variables that make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m mrvae_kernels.doctor",
        description="Print versions, what was built, and what would run for a layer and why.",
        epilog='example: python -m mrvae_kernels.doctor --layer "Conv2d(64, 128, 3, padding=1)" --input 16x64x14x14',
    )
    parser.add_argument(
        "--layer", help="a layer as its torch.nn constructor call; default: layers of the bundled networks"
    )
    parser.add_argument("--input", help="its input's shape, such as 128x784 (with --layer)")
    parser.add_argument("--per-sample", action="store_true", help="one beta a sample instead of one a batch")
    parser.add_argument("--device", default="cpu", help="where the layer would run (default: cpu)")
    options = parser.parse_args(argv)
    if (options.layer is None) != (options.input is None):
        parser.error("--layer and --input go together")
    examples = EXAMPLES
    print("\n".join(environment()))
    try:
        strategy.current()
    except (ValueError, RuntimeError) as error:
        print(f"doctor: {error}{_advice()}", file=sys.stderr)
        return 2
    try:
        _check_device(options.device)
        if options.layer is not None:
            examples = ((options.layer, parse_shape(options.input)),)
        for text, shape in examples:
            lines = describe(parse_layer(text), text, shape, options.per_sample, options.device)
            print("\n".join(["", *lines]))
    except (ValueError, RuntimeError, AssertionError) as error:
        print(f"doctor: {error}", file=sys.stderr)
        return 2
    return 0


def _check_device(name: str) -> None:
    """RuntimeError or AssertionError for a device that torch does not know, or of a kind that is there without it."""
    measurements.device_name(torch.device(name))


if __name__ == "__main__":
    sys.exit(main())
