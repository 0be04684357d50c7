"""What a kernel's caller asks about the device: everything that differs between vendors, and nothing else."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch
from torch import Tensor

INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""True when Triton runs kernels in its interpreter, on CPU tensors; triton reads the variable as it decorates them."""

DEVICE_TYPES = ("cpu",) if INTERPRETED else ("cuda", "xpu")
"""torch's device types that kernels take; "cuda" includes ROCm."""


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device the current one for the launches inside, which go to its current stream."""
    device = tensor.device
    if device.type == "cpu":
        return contextlib.nullcontext()
    module = torch.get_device_module(device)
    return contextlib.nullcontext() if device.index == module.current_device() else module.device(device)


def stream_of(tensor: Tensor) -> int:
    """A number that stands for the current stream of the tensor's device."""
    if tensor.device.type == "cpu":
        return 0
    stream = torch.get_device_module(tensor.device).current_stream(tensor.device)
    return int(stream.cuda_stream if tensor.device.type == "cuda" else stream.sycl_queue)


def capturing(where: Tensor | torch.device) -> bool:
    """True while the current stream records a CUDA graph."""
    device = where if isinstance(where, torch.device) else where.device
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def architecture(device: torch.device) -> str:
    """"sm_90", "gfx942", "xpu", or "interpreter"; the device's type where it is not there."""
    if device.type == "cpu":
        return "interpreter"
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors, among which a grid is spread; 4 in the interpreter, so that its tests split reductions too."""
    if device.type == "cpu":
        return 4
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(properties.gpu_subslice_count if device.type == "xpu" else properties.multi_processor_count)


def register_limit(architecture: str, warps: int) -> dict[str, int]:
    """The launch option that gives a thread the registers with which two programs fit on a processor.

    Only NVIDIA's GPUs, each with 65,536 registers a processor, know the option: elsewhere there is none. ptxas, left to
    itself, spills some bytes where one more program then fits. It knows neither the shared memory of a program nor the
    size of the grid, which mostly leave room for two.
    """
    if not architecture.startswith("sm_"):
        return {}
    return {"maxnreg": min(255, 65536 // (2 * 32 * warps))}  # 255: no instruction names more


def float32_precision(device: torch.device, convolution: bool) -> str:
    """"tf32" where torch's settings allow it for products of this kind on this device, else "ieee"."""
    if not architecture(device).startswith("sm_") or torch.version.hip:
        return "ieee"
    setting: Any = torch.backends.cudnn.conv if convolution else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return "tf32" if setting.fp32_precision == "tf32" else "ieee"
