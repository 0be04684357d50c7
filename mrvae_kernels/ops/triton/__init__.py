"""The Triton operators of torch.ops.mrvae_triton, with autograd. Imported when first used, since triton loads slowly.

Each function takes what mrvae_kernels.ops's of the same name takes. In an eager step kernels are launched from a
torch.autograd.Function, past torch's dispatcher; where something traces, the operators themselves are called, which
have schema, fake and autograd of their own. Differentiable once.
"""

from __future__ import annotations

from .epilogue import epilogue
from .fold import fold
from .gates import gates
from .products import gated_convolution, gated_linear

__all__ = ["epilogue", "fold", "gated_convolution", "gated_linear", "gates"]
