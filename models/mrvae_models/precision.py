"""Parameters and buffers that a network in half precision keeps in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


class AtLeastFloat32(nn.Module):
    """A module whose own parameters and buffers `.half()`, `.bfloat16()` and the like leave as precise as they are.

    Not what they were rounded to and back: the numbers that there were.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def own() -> list[Tensor]:
            return [*self.parameters(recurse=False), *self.buffers(recurse=False)]

        before = [tensor.detach() for tensor in own()]
        super()._apply(fn, recurse)
        for tensor, was in zip(own(), before, strict=True):
            if tensor.dtype in HALF and was.dtype not in HALF:
                tensor.data = was.to(tensor.device)
        return self
