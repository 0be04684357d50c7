"""mrvae_kernels: Multi-Rate VAE layers whose gates cost next to nothing.

    layer = GatedLinear(784, 400, gate="sigmoid");  y = layer(x, beta)
    model = multirate(vae);  out = model(x, beta=0.5);  plain = bake(model, beta=0.5)

See `multirate` for a whole network, `layers` for drop-in modules, `functional` for the operators, `strategy` for how
they run, and `python -m mrvae_kernels.doctor` for what is installed.
"""

from .baking import bake
from .checkpointing import checkpoint_context
from .conditional import ConditionalBatchNorm1d, ConditionalBatchNorm2d, ConditionalBatchNorm3d
from .functional import (
    gate_values,
    gated_conv1d,
    gated_conv2d,
    gated_conv3d,
    gated_conv_transpose1d,
    gated_conv_transpose2d,
    gated_conv_transpose3d,
    gated_linear,
)
from .gates import BetaRange, GateSpec, standardize
from .layers import (
    GatedBatchNorm1d,
    GatedBatchNorm2d,
    GatedBatchNorm3d,
    GatedConv1d,
    GatedConv2d,
    GatedConv3d,
    GatedConvTranspose1d,
    GatedConvTranspose2d,
    GatedConvTranspose3d,
    GatedGroupNorm,
    GatedGRU,
    GatedLayerNorm,
    GatedLinear,
    GatedLSTM,
)
from .measuring import tune, warm_up
from .multirate import MultiRate, multirate
from .strategy import override
from .weight_norm import WeightNormConv2d

__version__ = "0.1.0"

__all__ = [
    "BetaRange", "ConditionalBatchNorm1d", "ConditionalBatchNorm2d", "ConditionalBatchNorm3d", "GateSpec",
    "GatedBatchNorm1d", "GatedBatchNorm2d", "GatedBatchNorm3d", "GatedConv1d", "GatedConv2d", "GatedConv3d",
    "GatedConvTranspose1d", "GatedConvTranspose2d", "GatedConvTranspose3d", "GatedGRU", "GatedGroupNorm",
    "GatedLSTM", "GatedLayerNorm", "GatedLinear", "MultiRate", "WeightNormConv2d", "bake", "checkpoint_context",
    "gate_values", "gated_conv1d", "gated_conv2d", "gated_conv3d", "gated_conv_transpose1d", "gated_conv_transpose2d",
    "gated_conv_transpose3d", "gated_linear", "multirate", "override", "standardize", "tune", "warm_up",
]
