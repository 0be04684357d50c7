"""What each backend takes, and why not the rest: the compiled core, Triton's kernels, plain PyTorch.

    cpp         the compiled operators: CPU tensors and, in a build with CUDA, those of NVIDIA's GPUs
    triton      GPUs, and CPU tensors in Triton's interpreter
    reference   plain PyTorch: everything, except strategy "fused"

An operator is "gates", "fold", "epilogue" or "fused".
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from . import ops
from .triton_kernels.device import DEVICE_TYPES as TRITON_DEVICE_TYPES

BACKENDS = ("cpp", "triton", "reference")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
NO_TRITON = "triton is not installed; run: pip install 'triton>=3.6,<3.8'"
HOW_TO_INTERPRET = (
    "Move the tensors to a GPU, or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's "
    "interpreter, slowly"
)


def refusals(backend: str, device: torch.device, dtype: torch.dtype, operator: str = "epilogue") -> list[str]:
    """Why the backend does not run this operator on these tensors; empty if it does."""
    if backend == "cpp":
        return cpp_refusals(device, dtype, operator)
    if backend == "triton":
        return triton_refusals(device, dtype, operator)
    return ["plain PyTorch has no fused kernel"] if operator == "fused" else []


def inside_transform() -> bool:
    """Whether a transform of torch.func runs; not for Dynamo, which traces them itself and would take this for yes."""
    if torch.compiler.is_compiling():
        return False
    # not peek_interpreter_stack(), which makes a stack where there is none: one that autograd then copies at every node
    # of every backward pass of the thread, 136 times in a step of five layers
    return torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode)


def has_code_for(capability: tuple[int, int], architectures: str) -> bool:
    """Whether a GPU runs code for "sm_80 sm_90+PTX": machine code of its generation, not newer, or any older PTX."""
    for name in architectures.split():
        number, _, ptx = name.removeprefix("sm_").partition("+")
        exact = number.endswith(("a", "f"))  # for this one, not for the later ones
        built = divmod(int(number.rstrip("af")), 10)
        if built == capability or (not exact and built <= capability and (ptx or built[0] == capability[0])):
            return True
    return False


@functools.cache
def code_refusal(device: torch.device) -> str | None:
    """Why this CUDA GPU cannot run the compiled core's kernels, or None."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if has_code_for(capability, ops.build_facts()["architectures"]):
        return None
    wanted = "{}.{}".format(*capability)
    name = wanted.replace(".", "")
    return f"the CUDA core has no code for sm_{name}; run: TORCH_CUDA_ARCH_LIST={wanted} MRVAE_CUDA=1 {ops.REBUILD}"


def triton_refusals(device: torch.device, dtype: torch.dtype, operator: str = "epilogue") -> list[str]:
    """Why Triton's kernels do not take these tensors; empty if they do."""
    reasons = []
    if not TRITON_INSTALLED:
        reasons.append(NO_TRITON)
    if inside_transform():
        reasons.append("Triton's kernels do not run inside torch.func's transforms")
    if device.type not in TRITON_DEVICE_TYPES:
        taken = " and ".join(TRITON_DEVICE_TYPES)
        reasons.append(f"Triton takes {taken} tensors, this one is on {device}")
    return [*reasons, *_dtype_refusals(dtype, operator)]


def cpp_refusals(device: torch.device, dtype: torch.dtype, operator: str = "epilogue") -> list[str]:
    """Why the compiled core does not take these tensors; empty if it does."""
    if not ops.EXTENSION:
        return [str(ops.EXTENSION_ERROR)]
    reasons = ["the compiled core's operators do not run inside torch.func's transforms"] if inside_transform() else []
    if device.type == ops.GPU_TYPE:
        lacking = code_refusal(device)
        return [*reasons, *([lacking] if lacking else []), *_dtype_refusals(dtype, operator)]
    if device.type == "cuda":
        reasons.append(f"the compiled core has no CUDA kernels: {ops.CUDA_ERROR}")
    elif device.type != "cpu":
        reasons.append(f"the compiled core takes CPU and CUDA tensors, this one is on {device}")
    elif operator == "fused":
        reasons.append(f"the compiled core's fused kernels take CUDA tensors, this one is on {device}")
    elif dtype not in CPU_DTYPES:
        reasons.append(f"it takes float32, bfloat16 and float64, this one is {dtype}")
    return reasons


def _dtype_refusals(dtype: torch.dtype, operator: str) -> list[str]:
    """What the kernels of both GPU backends do not compute in."""
    if dtype in GPU_DTYPES and not (operator == "fused" and dtype == torch.float64):
        return []
    wide = "" if operator == "fused" else ", float64"
    return [f"its kernels take float32{wide}, bfloat16 and float16, this one is {dtype}"]
