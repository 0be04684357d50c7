"""The C++ operators of torch.ops.mrvae, or the reason why they are not there.

    EXTENSION        True when mrvae_kernels._C was built and could be loaded
    EXTENSION_ERROR  otherwise one sentence: what is wrong and the command that repairs it
    GPU_TYPE         "cuda" when it was built with CUDA, otherwise None
    CUDA_ERROR       then one sentence as above

The functions gates, fold, epilogue, gated_linear and gated_convolution call the operators. They take what
mrvae_kernels.reference's functions of the same name take, with kinds, activations and strategies as the schema has
them; each file documents one. Without the extension they raise RuntimeError with EXTENSION_ERROR.
"""

from __future__ import annotations

from ._load import REBUILD, build_facts, cuda_error, gpu_type, load

EXTENSION_ERROR: str | None = load()
EXTENSION: bool = EXTENSION_ERROR is None
CUDA_ERROR: str | None = cuda_error()
GPU_TYPE: str | None = gpu_type()

from . import fused as _fused  # noqa: E402, F401
from . import sampled_epilogue as _sampled  # noqa: E402, F401
from .epilogue import epilogue  # noqa: E402  (fakes are registered for operators that load() has defined)
from .fold import fold  # noqa: E402
from .gated_convolution import gated_convolution  # noqa: E402
from .gated_linear import gated_linear  # noqa: E402
from .gates import gates  # noqa: E402

__all__ = [
    "CUDA_ERROR",
    "EXTENSION",
    "EXTENSION_ERROR",
    "GPU_TYPE",
    "REBUILD",
    "build_facts",
    "cuda_error",
    "epilogue",
    "fold",
    "gated_convolution",
    "gated_linear",
    "gates",
]
