"""Whether a training step computes what its gates say, in float64: a variant that does not is refused a time.

    y_layer = act(w eta(beta) + c) * layer(x)        hooks on a float64 copy of the plain network; where there are
                                                     more, + shift, and x times the gate on inputs
    z = mean + exp(log_variance / 2) * noise         noise recovered from the step's own output; a hierarchy gives it
    loss = mean of D + beta R, and its gradients by the network's parameters and by every gate

Held against it are the network's outputs, the loss, all gradients and the running statistics that one step gives, and
that its optimiser moves what has a gradient; and the same of a third step, from the same weights, on another batch with
other betas: the first call of a model prepares what later ones go through, which are those that are timed. A value a is
off from the exact b by |a - b| (Euclidean norms); allowed is

    TOLERANCES[numbers] |b| + 3 |p - b| + 1e-5 max |b'|

with p what the plain network with hooks gives in the step's own numbers (float32, TF32, bfloat16), the furthest of a
run on the batch and two on batches that differ from it by a rounding of those numbers, up or down by chance: what a few
ReLUs do whose inputs lie at 0 shows in some runs only (1.3 % of a gradient of the paper's CNN at batch 128), and a
single run may be near the exact value by luck. Before a step is refused, twelve more such runs are asked, float32's on
batches that differ by four roundings: Listing 1 and ours of the paper's CNN, compiled at batch 128, were both off by
1.22 of 146 in one gradient, which three runs did not show and fifteen do. b' are the values of b's kind (outputs,
gradients, ...): a bias before a batch norm has no gradient but rounding.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from mrvae_models.networks.hierarchy import Hierarchy
from mrvae_models.objectives import beta_vae
from mrvae_models.vae import VAEOutput, reparameterise
from torch import Tensor, nn

from mrvae_kernels.reference import along, gate_activation, gate_argument

from .gpu_timing import failure
from .overhead_networks import Gates, channel_axis, eta_of, kind_of, kinds_of
from .variants import Draw, Network, NetworkOutput, TrainingStep


class Tolerance(NamedTuple):
    """Relative, of outputs and statistics, and of gradients: a rounding error that turns the sign of a ReLU's input
    moves those of a small batch, by 1e-3 in float32 and 1e-1 in bfloat16."""

    outputs: float
    gradients: float


TOLERANCES = {"float32": Tolerance(5e-4, 2e-3), "tf32": Tolerance(5e-3, 2e-2), "bfloat16": Tolerance(2e-2, 1e-1)}

ROUNDING = {"float32": 2.0**-23, "tf32": 2.0**-10, "bfloat16": 2.0**-8}
"""Relative distance of neighbouring numbers: less may round to the same."""

RUNS = 3
LATER_RUNS = 1
RUNS_IN_DOUBT = 12
ROUNDINGS_IN_DOUBT = {"float32": 4, "tf32": 1, "bfloat16": 1}
PLAIN_TIMES = 3
OF_LARGEST = 1e-5
SEED = 7

Values = dict[str, Tensor]
"""What a step gave or should have given, as "kind: name"."""


class Before(NamedTuple):
    """What a step starts from."""

    parameters: Values
    buffers: Values
    gates: Gates
    kinds: dict[str, str]


def before(step: TrainingStep) -> Before:
    """Copies, so that the step can go on."""
    return Before(
        {name: value.detach().clone() for name, value in step.parameters.items()},
        {name: value.detach().clone() for name, value in step.buffers.items()},
        step.gates(lambda parameter: parameter.detach().clone()),
        kinds_of(step.model),
    )


def given(step: TrainingStep, draw: Draw) -> tuple[Values, NetworkOutput]:
    """What one step on this batch gives, and its output."""
    loss, output = step.run(draw)
    values = {"output: loss": loss.detach(), **_outputs(output)}
    values |= {f"gradient: {name}": _gradient(value) for name, value in step.parameters.items()}
    return values | _by_name(step.gates(_gradient)) | _statistics(step.buffers), output


def expected(
    plain: Network, start: Before, draw: Draw, shared: bool, noise: Tensor, dtype: torch.dtype = torch.float64,
    autocast: bool = False,
) -> Values:
    """The same from the formula, in plain PyTorch; z is made of this noise."""
    beta = draw.scalar if shared else draw.each
    network, gates = _gated(plain, start, beta, dtype)
    with torch.autocast(draw.x.device.type, torch.bfloat16, enabled=autocast):
        output = _with_noise(network, draw.x.to(dtype), noise.to(dtype))
        loss = beta_vae(output, draw.x.to(dtype), beta.to(dtype), plain.likelihood).loss
    loss.backward()
    values = {"output: loss": loss.detach(), **_outputs(output)}
    values |= {f"gradient: {name}": _gradient(value) for name, value in network.named_parameters()}
    values |= _by_name({name: (_gradient(weight), _gradient(bias)) for name, (weight, bias) in gates.items()})
    return values | _statistics(dict(network.named_buffers()))


def _gated(plain: Network, start: Before, beta: Tensor, dtype: torch.dtype) -> tuple[Network, Gates]:
    """A copy of the plain network with hooks that gate it at these betas, and the leaves that its gates are made of."""
    network = copy.deepcopy(plain).to(dtype)
    network.load_state_dict({**start.parameters, **start.buffers})
    gates = {
        name: (weight.to(dtype, copy=True).requires_grad_(), bias.to(dtype, copy=True).requires_grad_())
        for name, (weight, bias) in start.gates.items()
    }
    for name, (weight, bias) in gates.items():
        kind = start.kinds.get(name) or kind_of(name)
        value = gate_activation(gate_argument(weight, bias, eta_of(beta.to(dtype))), kind)
        layer, _, role = name.rpartition(".")
        if role == "shift":
            network.get_submodule(layer).register_forward_hook(_adding(value))
        elif role == "inputs":
            network.get_submodule(layer).register_forward_pre_hook(_scaling_inputs(value))
        else:
            network.get_submodule(name).register_forward_hook(_scaling(value))
    return network, gates


class Reference(NamedTuple):
    """The exact values for one start, kind of beta and noise, and how far from them plain PyTorch is in the step's
    numbers, at most, in so many runs."""

    start: Before
    shared: bool
    noise: Tensor
    exact: Values
    rounding: dict[str, float]
    runs: int = 0

    def after(self, step: TrainingStep, draw: Draw, runs: int, roundings: int) -> Reference:
        """The same after runs on batches that differ from this one by as many roundings, the first of all by none."""
        rounding, generator = dict(self.rounding), torch.Generator().manual_seed(self.runs)
        for run in range(self.runs, self.runs + runs):
            up = torch.randint(2, draw.x.shape, generator=generator).to(draw.x) * 2 - 1
            x = draw.x * (1 + roundings * ROUNDING[step.numbers] * up) if run else draw.x
            plain = expected(
                step.plain, self.start, draw._replace(x=x), self.shared, self.noise, torch.float32,
                step.numbers == "bfloat16",
            )
            for name, exact in self.exact.items():
                if (off := _distance(plain[name], exact)) < math.inf:  # a run that overflows allows nothing
                    rounding[name] = max(rounding[name], off)
        return self._replace(rounding=rounding, runs=self.runs + runs)


class References:
    """References of one case, kept: variants that start and draw alike share one."""

    def __init__(self) -> None:
        self.known: list[Reference] = []

    def get(self, step: TrainingStep, start: Before, draw: Draw, noise: Tensor, runs: int = RUNS) -> Reference:
        near = 0.05 if step.numbers == "bfloat16" else 1e-3
        for found in self.known:
            if (
                found.shared == step.shared and torch.allclose(found.noise, noise, rtol=0, atol=near)
                and _same(found.start, start)
            ):
                return found
        exact = expected(step.plain, start, draw, step.shared, noise)
        reference = Reference(start, step.shared, noise, exact, dict.fromkeys(exact, 0.0))
        self.known.append(reference.after(step, draw, runs, 1))
        return self.known[-1]

    def in_doubt(self, reference: Reference, step: TrainingStep, draw: Draw) -> Reference:
        """The reference after more runs, unless it has had them."""
        if reference.runs > RUNS_IN_DOUBT:
            return reference
        self.known = [known for known in self.known if known is not reference]
        self.known.append(reference.after(step, draw, RUNS_IN_DOUBT, ROUNDINGS_IN_DOUBT[step.numbers]))
        return self.known[-1]


def refusal(step: TrainingStep, references: References | None = None) -> str | None:
    """Why this step gets no time, or None: it fails, or what it gives is not what its gates say.

    Takes three steps, and puts weights, gates and statistics back before the last; a fourth, on another batch, where
    the third is off. Where it is compiled, those after the first, with other betas, must not compile again.
    """
    references = references or References()
    start = before(step)
    compiled = step.call is not step.model
    try:
        if wrong := _wrong_step(step, start, step.inputs[0], SEED, references, RUNS):
            return wrong
        with torch.compiler.set_stance("fail_on_recompile") if compiled else contextlib.nullcontext():
            step.run(step.inputs[1])
            for i, draw in enumerate(step.inputs[2:4], 1):  # rounding turns a ReLU's sign on one of them at most
                put_back(step, start)
                wrong = _wrong_step(step, start, draw, SEED + i, references, LATER_RUNS)
                if wrong is None:
                    break
    except Exception as error:
        return failure(error, step.device).strip().partition("\n")[0]
    return wrong and f"in a later step {wrong}"


def _wrong_step(
    step: TrainingStep, start: Before, draw: Draw, seed: int, references: References, runs: int
) -> str | None:
    """What is wrong with a step on this batch, or None."""
    torch.manual_seed(seed)
    values, output = given(step, draw)
    if wrong := _wrong_noise(output):
        return wrong
    reference, tolerance = references.get(step, start, draw, _noise(output), runs), TOLERANCES[step.numbers]
    if _wrong_values(values, reference, tolerance):
        reference = references.in_doubt(reference, step, draw)
        if wrong := _wrong_values(values, reference, tolerance):
            return wrong
    return _not_moved(step, start, values)


def baked_refusal(step: TrainingStep, baked: Network, x: Tensor, beta: float) -> str | None:
    """Why a network that was baked from the step's at this beta gets no time, or None: its outputs in eval mode, with
    its own statistics, are not those of the plain network with hooks."""
    start = before(step)._replace(buffers=dict(baked.named_buffers()))
    values: list[Values] = []
    noise = torch.Tensor()
    with torch.no_grad():
        for dtype in (x.dtype, torch.float32, torch.float64):
            if not values:
                torch.manual_seed(SEED)
                output = copy.deepcopy(baked).eval()(x)
                noise = _noise(output)
            else:
                network, _ = _gated(step.plain, start, torch.tensor(beta, device=x.device), dtype)
                output = _with_noise(network.eval(), x.to(dtype), noise.to(dtype))
            values.append(_outputs(output))
    found, plain, exact = values
    rounding = {name: _distance(plain[name], value) for name, value in exact.items()}
    return _wrong_values(found, Reference(start, True, noise, exact, rounding), TOLERANCES["float32"])


def put_back(step: TrainingStep, start: Before) -> None:
    """Have the weights, statistics and gates of the start again; the optimiser's moments stay."""
    gates = step.gates(lambda parameter: parameter.detach())
    with torch.no_grad():
        for here, there in ((step.parameters, start.parameters), (step.buffers, start.buffers)):
            for name, value in there.items():
                here[name].copy_(value)
        for name, pair in start.gates.items():
            for tensor, value in zip(gates[name], pair, strict=True):
                tensor.copy_(value)


def _with_noise(network: Network, x: Tensor, noise: Tensor) -> NetworkOutput:
    if isinstance(network, Hierarchy):
        return network(x, noise)
    mean, log_variance = network.encode(x)
    z = mean + torch.exp(0.5 * log_variance) * noise
    return VAEOutput(network.decode(z), mean, log_variance, z)


def _outputs(output: NetworkOutput) -> Values:
    names = ("parameters", "mean", "log_variance" if isinstance(output, VAEOutput) else "rates")
    return {f"output: {name}": getattr(output, name).detach() for name in names}


def _statistics(buffers: Values) -> Values:
    return {f"statistics: {n}": value.detach().clone() for n, value in buffers.items() if value.is_floating_point()}


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


def _scaling(gate: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def scale(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return y * along(gate, channel_axis(layer, y.dim()), y.dim()).to(y.dtype)

    return scale


def _adding(shift: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return y + along(shift, channel_axis(layer, y.dim()), y.dim()).to(y.dtype)

    return add


def _scaling_inputs(gate: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    def scale(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = inputs
        return (x * along(gate, channel_axis(layer, x.dim()), x.dim()).to(x.dtype),)

    return scale


def _noise(output: NetworkOutput) -> Tensor:
    if not isinstance(output, VAEOutput):
        return output.noise.detach().double()
    mean, log_variance, z = (value.detach().double() for value in (output.mean, output.log_variance, output.z))
    return (z - mean) * torch.exp(-0.5 * log_variance)


def _same(a: Before, b: Before) -> bool:
    pairs = [(a.parameters, b.parameters), (a.buffers, b.buffers), (_by_name(a.gates), _by_name(b.gates))]
    return all(x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in pairs)


def _by_name(gates: Gates) -> Values:
    """Each gate's w and c by "gradient of the gate: <layer> w" and "... c", the names under which they are compared."""
    return {
        f"gradient of the gate: {name} {what}": value
        for name, pair in gates.items() for what, value in zip("wc", pair, strict=True)
    }


def _wrong_noise(output: NetworkOutput) -> str | None:
    """N(0, 1) has mean 0 and variance 1: within six standard errors, and what bfloat16 rounds. The mean square of few
    draws is skew: downwards the factor of ten errors counts."""
    noise = _noise(output)
    mean, variance, n = noise.mean().item(), noise.square().mean().item(), noise.numel()
    error = math.sqrt(2 / n)
    if abs(mean) < 6 / math.sqrt(n) + 0.05 and 1 / (1.05 + 10 * error) < variance < 1.05 + 6 * error:
        return None
    return (
        f"the noise of z has mean {mean:.3g} and mean square {variance:.3g}; expected draws of N(0, 1): "
        f"{reparameterise.__name__} was left out or is wrong"
    )


def _wrong_values(values: Values, reference: Reference, tolerance: Tolerance) -> str | None:
    """The value that is furthest beyond what is allowed, in words."""
    largest: dict[str, float] = {}
    for name, exact in reference.exact.items():
        kind = name.partition(":")[0]
        largest[kind] = max(largest.get(kind, 0.0), exact.norm().item())
    worst, wrong = 1.0, None
    for name, exact in reference.exact.items():
        size, off = exact.norm().item(), _distance(values[name], exact)
        relative = tolerance.gradients if name.startswith("gradient") else tolerance.outputs
        allowed = relative * size + PLAIN_TIMES * reference.rounding[name]
        allowed += OF_LARGEST * largest[name.partition(":")[0]]
        if off == math.inf or not off <= worst * allowed:
            worst = off / allowed if off < math.inf else math.inf
            wrong = (
                f"{name} is off by {off:.3g}, its size is {size:.3g} and {allowed:.3g} are allowed, from the same "
                "network and gates in float64"
            )
    return wrong


def _distance(a: Tensor, b: Tensor) -> float:
    """|a - b|; infinite where a has another shape or is not finite."""
    if a.shape != b.shape or not a.isfinite().all():
        return math.inf
    return (a.double() - b.double()).norm().item()


def _not_moved(step: TrainingStep, start: Before, values: Values) -> str | None:
    """The first parameter or gate that has a gradient and that the optimiser left where it was."""
    moved: dict[str, tuple[Tensor, Tensor]] = {
        f"gradient: {name}": (start.parameters[name], now) for name, now in step.parameters.items()
    }
    for name, now in _by_name(step.gates(lambda parameter: parameter.detach())).items():
        moved[name] = _by_name(start.gates)[name], now
    for name, (was, now) in moved.items():
        if values[name].any() and torch.equal(was, now):
            return f"{name.partition(': ')[2]} has a gradient, but the step left it as it was"
    return None
