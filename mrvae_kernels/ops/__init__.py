"""The C++ operators of torch.ops.mrvae, or the reason why they are not there.

    EXTENSION        True when mrvae_kernels._C was built and could be loaded
    EXTENSION_ERROR  otherwise one sentence: what is wrong and the command that repairs it

The functions gates, fold, epilogue, gated_linear and gated_convolution call the operators. They take what
mrvae_kernels.reference's functions of the same name take, with kinds, activations and strategies as the schema has
them; each file documents one. Without the extension they raise RuntimeError with EXTENSION_ERROR.
"""

from __future__ import annotations

from ._load import build_facts, load

EXTENSION_ERROR: str | None = load()
EXTENSION: bool = EXTENSION_ERROR is None

from .epilogue import epilogue  # noqa: E402  (fakes are registered for operators that load() has defined)
from .fold import fold  # noqa: E402
from .gated_convolution import gated_convolution  # noqa: E402
from .gated_linear import gated_linear  # noqa: E402
from .gates import gates  # noqa: E402

__all__ = [
    "EXTENSION",
    "EXTENSION_ERROR",
    "build_facts",
    "epilogue",
    "fold",
    "gated_convolution",
    "gated_linear",
    "gates",
]
