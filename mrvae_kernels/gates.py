"""Gates: from beta to one factor a feature (papers/MR-VAE, Eqn. 6 and 7).

    eta = (log beta - mean) / std        mean, std of log beta under U[log a, log b]
    p   = w * eta + c                    or a polynomial of eta (ours), or a small MLP (the paper's ablation, Figure 9)
    g   = act(p)                         sigmoid, sqrt or softplus

Bae, Zhang, Ruan, Wang, Hasegawa, Ba, Grosse: "Multi-Rate VAE: Train Once, Get the Full Rate-Distortion Curve", 2022.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _TorchDispatchModeKey as ModeKey
from torch._subclasses import FakeTensor

from .ops import EXTENSION
from .ops.shortcuts import core

KINDS = ("sigmoid", "sqrt", "softplus", "identity")
"""Activation of a gate by its code in the operators; "identity" serves FiLM's shift only."""

GATE_KINDS = KINDS[:3]

MAX_DEGREE = 3

INITS = ("open", "paper", "ranked")

DEFAULT_BETA_RANGE = (0.01, 10.0)

Beta = float | Tensor | Sequence[float]


class BetaRange(NamedTuple):
    """The range [low, high] that beta is sampled from, log-uniformly, in training (a and b of Algorithm 1)."""

    low: float
    high: float

    @property
    def mean(self) -> float:
        """Mean of log beta under U[log low, log high], in nats."""
        return (math.log(self.low) + math.log(self.high)) / 2

    @property
    def std(self) -> float:
        """Standard deviation of log beta under U[log low, log high], in nats."""
        return (math.log(self.high) - math.log(self.low)) / math.sqrt(12)

    @classmethod
    def of(cls, value: Sequence[float]) -> BetaRange:
        """Check a pair (low, high); ValueError unless 0 < low < high, both finite."""
        try:
            low, high = value if isinstance(value, cls) else (float(bound) for bound in value)
        except (TypeError, ValueError):
            raise ValueError(
                f"beta_range is {value!r}; expected two numbers (low, high), such as (0.01, 10.0)"
            ) from None
        if not (0 < low < high < math.inf):
            raise ValueError(f"beta_range is ({low}, {high}); expected 0 < low < high, both finite")
        return value if isinstance(value, cls) else cls(low, high)


@dataclass(frozen=True)
class GateSpec:
    """What gates a layer gets.

    kind    "sigmoid" (paper's encoder gate), "sqrt" (paper's decoder gate, sqrt(relu(1 - exp p))) or "softplus"
            (unbounded)
    degree  of p as a polynomial of eta: 1 is the paper's affine map; 2 adds w_2 (eta^2 - 1), 3 also w_3 (eta^3 - 9/5
            eta), so that a gate may open and close again, or close late. Orthogonal polynomials: each starts at w_k = 0
            and bends the gate without turning or moving it. Layers of a network have one degree (multirate)
    shift   FiLM: also add t = w_t eta + c_t after the gate (Perez et al., 2018; the paper's ablation)
    hidden  sizes of hidden ReLU layers between eta and p; () is the paper's affine map, (64,) its 2-layer ablation
    shared  with hidden: the layers of a network share the hidden part (multirate only)
    init    "open": gates start near 1 at every beta; "paper": U(-1, 1) for w and c, which is nn.Linear(1, C)'s default
            in Listing 1 and leaves 14.5 % of sqrt gates dead for every beta; "ranked": features close one after another
            as beta grows, see init_gates_
    inputs  a gate (a kind or a GateSpec) on the layer's input features too: y = g (W (g_in x) + b) + t. On the
            decoder's first layer it switches latents off, noise and all, which a gate on the outputs cannot. Its degree
            is that of the gate
    """

    kind: str = "sigmoid"
    shift: bool = False
    hidden: tuple[int, ...] = ()
    shared: bool = False
    init: str = "open"
    inputs: str | GateSpec | None = None
    degree: int = 1

    def __post_init__(self) -> None:
        if self.kind not in GATE_KINDS:
            raise ValueError(f"gate kind is {self.kind!r}; expected one of {', '.join(GATE_KINDS)}")
        if self.init not in INITS or (self.init == "ranked" and self.kind != "sigmoid"):
            raise ValueError(
                f"gate init is {self.init!r}; expected one of {', '.join(INITS)} ('ranked' for sigmoid gates only)"
            )
        try:
            object.__setattr__(self, "hidden", tuple(self.hidden))
        except TypeError:
            raise ValueError(f"gate hidden is {self.hidden!r}; expected a tuple of sizes, such as (64,)") from None
        if any(not isinstance(size, int) or size < 1 for size in self.hidden):
            raise ValueError(f"gate hidden sizes are {self.hidden}; expected positive integers")
        if self.hidden and self.init == "ranked":
            raise ValueError("init='ranked' orders affine gates; with hidden layers choose 'open' or 'paper'")
        if self.shared and not self.hidden:
            raise ValueError("shared=True without hidden layers: there is nothing to share; give hidden=(64,), say")
        if type(self.degree) is not int or not 1 <= self.degree <= MAX_DEGREE:
            raise ValueError(f"gate degree is {self.degree!r}; expected 1 (affine in eta) to {MAX_DEGREE}")
        if self.hidden and self.degree > 1:
            raise ValueError(
                f"gate degree is {self.degree} with hidden layers, which bend a gate by themselves: choose one"
            )
        if self.inputs is not None:
            inner = GateSpec.of(self.inputs)
            if inner.shift or inner.inputs is not None or inner.hidden or self.hidden:
                raise ValueError(
                    f"inputs={self.inputs!r}: a gate on inputs has no shift, hidden layers or inputs of its own"
                )
            if inner.degree not in (1, self.degree):
                raise ValueError(f"inputs={self.inputs!r} is of another degree than its gate, {self.degree}")
            object.__setattr__(self, "inputs", replace(inner, degree=self.degree))

    @classmethod
    def of(cls, value: str | GateSpec) -> GateSpec:
        """A GateSpec from itself or from the name of its kind."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(kind=value)
        raise TypeError(f"gate is {value!r}; expected a name ({', '.join(GATE_KINDS)}) or a GateSpec")


def standardize(
    beta: Beta, beta_range: Sequence[float] = DEFAULT_BETA_RANGE, *, device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """eta = (log beta - mean) / std, with mean and std of log beta over `beta_range`.

    beta: a positive number or 0-d tensor (eta is 0-d), or one a sample, shape (N,) (eta is (N,)). Differentiable in a
    tensor beta. `dtype` is float64 for float64 networks, else float32. ValueError for beta <= 0, NaN or infinite and
    for more than one dimension; a warning outside the range, where the response was never trained.
    Inside torch.compile, torch.export, make_fx and FakeTensorMode the values of a tensor cannot be looked at and are
    not checked; nor are those of a tensor that torch.func has wrapped (vmap over beta, say), and of one on a GPU, which
    would make every step wait for the device, and could not be recorded in a CUDA graph.
    """
    bounds = BetaRange.of(beta_range)
    if isinstance(beta, Tensor):
        return _standardize_tensor(beta, bounds, device, dtype)
    if isinstance(beta, (int, float)) and not isinstance(beta, bool):
        if not torch.compiler.is_compiling():
            return torch.full((), standardize_number(beta, bounds), dtype=dtype, device=device)
        return _standardize_tensor(torch.scalar_tensor(beta, dtype=dtype, device=device), bounds, device, dtype)
    try:
        if isinstance(beta, bool):
            raise TypeError
        values = torch.as_tensor(beta, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"beta is {beta!r}; expected a positive number, or one a sample") from None
    return _standardize_tensor(values, bounds, device, dtype)


def standardize_number(beta: float, bounds: BetaRange) -> float:
    """eta of one number; ValueError and warning as in `standardize`."""
    if not bounds.low <= beta <= bounds.high:
        _check_values(float(beta), float(beta), bounds)
    return (math.log(beta) - bounds.mean) / bounds.std


def _standardize_tensor(
    beta: Tensor, bounds: BetaRange, device: torch.device | str | None, dtype: torch.dtype
) -> Tensor:
    if beta.dim() > 1:
        raise ValueError(f"beta has shape {tuple(beta.shape)}; expected a number, or one a sample: shape (N,)")
    if beta.is_complex() or beta.dtype == torch.bool:
        raise ValueError(f"beta has dtype {beta.dtype}; expected a real number")
    if _readable(beta) and beta.numel() > 0:
        low, high = torch.aminmax(beta.detach())
        _check_values(low.item(), high.item(), bounds)
    if beta.dtype != dtype and beta.dtype != torch.float64:  # a float64 beta may be too small or large for float32
        beta = beta.to(dtype)
    eta = (beta.log() - bounds.mean) / bounds.std
    if eta.dtype != dtype or (device is not None and eta.device != torch.device(device)):
        eta = eta.to(device=device, dtype=dtype)
    return eta


def _readable(beta: Tensor) -> bool:
    """Whether the values can be looked at, and for little: see `standardize`."""
    if torch.compiler.is_compiling() or beta.device.type != "cpu":
        return False
    if isinstance(beta, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(beta):
        return False
    if not torch._C._len_torch_dispatch_stack():  # asked before the two modes, which take longer
        return True
    return all(torch._C._get_dispatch_mode(key) is None for key in (ModeKey.FAKE, ModeKey.PROXY))


def _check_values(low: float, high: float, bounds: BetaRange) -> None:
    for value in (low, high):  # aminmax hands on a NaN as both
        if not 0 < value < math.inf:
            raise ValueError(f"beta is {value}; expected a positive, finite KL weight")
    slack = 1e-4  # float32 rounds 0.01 to 0.00999999978
    if low < bounds.low * (1 - slack) or high > bounds.high * (1 + slack):
        outside = low if low < bounds.low * (1 - slack) else high
        warnings.warn(
            f"beta = {outside:g} lies outside the range [{bounds.low:g}, {bounds.high:g}] that the gates are made for; "
            "the response there is extrapolated",
            stacklevel=4,
        )


def all_positive(beta: Tensor) -> bool:
    """Whether every number of a tensor on the CPU is positive and finite. Not for torch.compile, which cannot see it.

    For the objectives of a step, which are asked it between two kernels: 0.2 us of the compiled core's, where Python's
    minimum and sum of 128 numbers are 5, and some 30 in a step, whose kernels leave the caches full of other things.
    """
    found: bool | None = core().all_positive(beta) if EXTENSION else None
    if found is None:
        low, high = torch.aminmax(beta.detach()) if beta.numel() else (1, 1)  # a NaN is both
        found = bool(low > 0 and high < math.inf)
    return found


def init_gates_(weight: Tensor, bias: Tensor, kind: str, init: str = "open") -> None:
    """Fill w and c in place, so that gates start open ("open") or as in the paper's Listing 1 ("paper").

    weight: (C,), or (degree, C), whose further rows start at 0: what follows is of the first.

    open:   sigmoid  w ~ 0.5 N(0, 1),  c ~ 2 + N(0, 1)           g about 0.85 at the middle of the range
            sqrt     w ~ 0.25 N(0, 1), c ~ -1 - 3 U(0, 1)        g about 0.9, never dead
            softplus w ~ 0.25 N(0, 1), c ~ 0.541 + 0.1 N(0, 1)   g about 1, softplus(0.541) = 1
            identity w = c = 0                                   no shift
    paper:  w, c ~ U(-1, 1), as nn.Linear(1, C); identity as well.
    ranked: sigmoid  w = -4, c = 4 tau, tau from 3 to 0 in equal steps, of gates that bend from 2 to -1/2: feature k
            closes around eta = tau_k. Without an order between the latents none of them switches off at large beta; the
            same order in the posterior's heads and in the decoder's input gate lets them agree.
    """
    with torch.no_grad():
        first, last = 3.0, 0.0
        if weight.dim() == 2:
            first, last = 2.0, -0.5
            weight[1:].zero_()
            weight = weight[0]
        if init == "paper":
            weight.uniform_(-1, 1)
            bias.uniform_(-1, 1)
        elif init == "ranked" and kind == "sigmoid":
            weight.fill_(-4)
            bias.copy_(4 * torch.linspace(first, last, bias.numel()))
        elif kind == "sigmoid":
            weight.normal_(0, 0.5)
            bias.normal_(2, 1)
        elif kind == "sqrt":
            weight.normal_(0, 0.25)
            bias.uniform_(-4, -1)
        elif kind == "softplus":
            weight.normal_(0, 0.25)
            bias.normal_(math.log(math.expm1(1.0)), 0.1)
        else:
            weight.zero_()
            bias.zero_()


class GateNetwork(nn.Module):
    """p = MLP(eta): hidden ReLU layers between the standardised log beta and the pre-activations of the gates.

    The paper's ablation (Appendix D, Figure 9). eta 0-d gives (features,), eta (N,) gives (N, features).
    The last layer starts at zero weight, its bias open for each kind, so that every gate starts open.
    """

    def __init__(self, hidden: Sequence[int], sizes: Sequence[int], kinds: Sequence[str], init: str = "open") -> None:
        super().__init__()
        widths = (1, *hidden)
        self.hidden = nn.Sequential()
        for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
            self.hidden.extend([nn.Linear(fan_in, fan_out), nn.ReLU()])
        self.output = nn.Linear(widths[-1], sum(sizes))
        if init == "open":
            nn.init.zeros_(self.output.weight)
            start = 0
            for size, kind in zip(sizes, kinds, strict=True):
                rows = slice(start, start + size)
                init_gates_(torch.empty(size), self.output.bias.detach()[rows], kind)
                start += size

    def forward(self, eta: Tensor) -> Tensor:
        return self.output(self.hidden(eta.unsqueeze(-1)))
