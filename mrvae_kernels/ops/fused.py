"""Shape inference of torch.ops.mrvae.fused_linear and fused_convolution: what strategy "fused" of gated_linear and
gated_convolution runs, with schema and autograd of their own, so that a tracer sees one operator."""

from __future__ import annotations

from ._load import fake
from .fused_shapes import fake_convolution, fake_convolution_backward, fake_linear, fake_linear_backward

fake("fused_linear")(fake_linear)
fake("fused_linear_backward")(fake_linear_backward)
fake("fused_convolution")(fake_convolution)
fake("fused_convolution_backward")(fake_convolution_backward)
