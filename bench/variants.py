"""One optimiser step of a VAE, plain or gated in one of the ways of bench/overhead_networks.py.

A step is eager, compiled (torch.compile of the model), or recorded once and replayed from a CUDA graph. `TrainingStep`
says which network it trains and what its gates are, so that bench/overhead_check.py can hold it against the formula.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from mrvae_models.networks import build
from mrvae_models.networks.hierarchy import HierarchicalOutput, Hierarchy
from mrvae_models.objectives import beta_vae
from mrvae_models.recipes import default_recipe
from mrvae_models.vae import VAE, VAEOutput
from torch import Tensor, nn

import mrvae_kernels as mk

from .gpu_timing import float32_precision
from .overhead_networks import BETA_RANGE, ONE_A_SAMPLE, Gates, Of, gated_network
from .timing import peak_memory

Network = VAE | Hierarchy
NetworkOutput = VAEOutput | HierarchicalOutput

NUMBERS = ("float32", "tf32", "bfloat16")
DRAWS = 8


class Draw(NamedTuple):
    """A random batch (N, *shape), and its beta: a number, the same 0-d on the device, and one an example, (N,)."""

    x: Tensor
    beta: float
    scalar: Tensor
    each: Tensor


def draws(shape: tuple[int, ...], batch: int, device: torch.device, count: int = DRAWS) -> list[Draw]:
    """The same batches and betas, log-uniform on the range, for every variant."""
    generator = torch.Generator().manual_seed(0)
    low, high = math.log(BETA_RANGE.low), math.log(BETA_RANGE.high)
    found = []
    for _ in range(count):
        x = torch.rand(batch, *shape, generator=generator)
        betas = (low + (high - low) * torch.rand(1 + batch, generator=generator)).exp()
        found.append(Draw(x.to(device), betas[0].item(), betas[0].to(device), betas[1:].to(device)))
    return found


@contextlib.contextmanager
def precision(numbers: str, device: torch.device) -> Iterator[None]:
    """Within the block float32 products on a GPU are exact, or TF32's. ValueError for TF32 on a CPU."""
    if numbers not in NUMBERS:
        raise ValueError(f"numbers is {numbers!r}; expected one of {', '.join(NUMBERS)}")
    if device.type != "cuda":
        if numbers == "tf32":
            raise ValueError(f"TF32 products need an NVIDIA GPU; the device is {device}")
        yield
        return
    with float32_precision("tf32" if numbers == "tf32" else "ieee"):
        yield


class TrainingStep:
    """Forward, loss, zero_grad, backward and fused Adam on the next of a few random batches; a call gives the loss.

    model       what is trained; `call` is the same, compiled where asked for
    plain       the network as it was before gating, for references; not trained
    parameters  the network's own parameters, by their names in `plain`; `buffers` likewise
    gates(of)   layer name -> (w, c), the value or gradient of each gate as `of` gives it
    shared      whether one beta holds for the batch; else one an example
    """

    def __init__(
        self, variant: str, vae: Network, inputs: list[Draw], compiled: bool = False, graph: bool = False,
        numbers: str = "float32", recipe: str = "ranked",
    ) -> None:
        self.device = inputs[0].x.device
        if graph and self.device.type != "cuda":
            raise ValueError(f"CUDA graphs need an NVIDIA GPU; the device is {self.device}")
        self.variant, self.inputs, self.numbers, self.graph = variant, inputs, numbers, graph
        self.plain = vae.to(self.device)
        network = copy.deepcopy(self.plain)
        self.parameters = dict(network.named_parameters())
        self.buffers = dict(network.named_buffers())
        self.likelihood = vae.likelihood
        self.model, self._gates = gated_network(network, variant, recipe)
        self.call: Any = torch.compile(self.model, fullgraph=True, dynamic=False) if compiled else self.model
        self.as_tensor = compiled or graph
        self.shared = variant not in ONE_A_SAMPLE
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, fused=True, capturable=graph)
        self.recorded: RecordedStep | None = None
        self.count = 0

    def gates(self, of: Of) -> Gates:
        return self._gates(of)

    def __call__(self) -> Tensor:
        self.count += 1
        return self.run(self.inputs[self.count % len(self.inputs)])[0]

    def run(self, draw: Draw) -> tuple[Tensor, NetworkOutput]:
        """One step on this batch: the loss, and what the network gave. Gradients stay until the next step."""
        if not self.graph:
            return self._step(draw)
        if self.recorded is None:
            self.recorded = RecordedStep(self, draw)
        return self.recorded.replay(draw)

    def forward(self, draw: Draw) -> NetworkOutput:
        """The network's output, with beta as this variant takes it."""
        if self.variant == "ungated":
            return self.call(draw.x)
        if isinstance(self.model, mk.MultiRate):
            shared = draw.scalar if self.as_tensor else draw.beta
            return self.call(draw.x, beta=shared if self.shared else draw.each)
        return self.call(draw.x, draw.scalar if self.shared else draw.each)

    def _step(self, draw: Draw) -> tuple[Tensor, NetworkOutput]:
        autocast = torch.autocast(self.device.type, torch.bfloat16)
        with autocast if self.numbers == "bfloat16" else contextlib.nullcontext():
            output = self.forward(draw)
            beta = (draw.scalar if self.graph else draw.beta) if self.shared else draw.each
            loss = beta_vae(output, draw.x, beta, self.likelihood).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss, output


class RecordedStep:
    """A step's kernels in one CUDA graph, with a batch and betas of its own that a replay fills.

    Recording does not train: weights, buffers and Adam's state are what they were before it.
    peak: bytes allocated at most while it was recorded, over what was there before.
    """

    def __init__(self, step: TrainingStep, draw: Draw) -> None:
        self.draw = Draw(draw.x.clone(), draw.beta, draw.scalar.clone(), draw.each.clone())
        before = [tensor.detach().clone() for tensor in _trained(step)]
        device = step.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # compiles, plans and makes Adam's state, which a recording cannot
            for _ in range(3):
                step._step(self.draw)
        torch.cuda.current_stream(device).wait_stream(side)
        step.optimizer.zero_grad()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            loss, output = step._step(self.draw)
            self.loss, self.output = loss.detach(), type(output)(*(value.detach() for value in output))
        self.peak = torch.cuda.max_memory_allocated(device) - held
        with torch.no_grad():
            for tensor, value in zip(_trained(step), before, strict=True):
                tensor.copy_(value)
            for state in step.optimizer.state.values():
                for value in state.values():
                    value.zero_()

    def replay(self, draw: Draw) -> tuple[Tensor, NetworkOutput]:
        self.draw.x.copy_(draw.x)
        self.draw.scalar.copy_(draw.scalar)
        self.draw.each.copy_(draw.each)
        self.graph.replay()
        return self.loss, self.output


def _trained(step: TrainingStep) -> list[Tensor]:
    return [*step.model.parameters(), *step.model.buffers()]


def training_step(
    variant: str, network: str, shape: tuple[int, ...], batch: int, compiled: bool = False, *, graph: bool = False,
    numbers: str = "float32", device: torch.device | str = "cpu", **options: Any,
) -> TrainingStep:
    """The step of one variant of a bundled network; every variant starts from the same weights, gates and batches.

    options: the network's own. ValueError for a variant that is not known, and for a CUDA graph without a GPU. The
    caller puts `precision` around steps on a GPU.
    """
    torch.manual_seed(0)
    vae = build(network, shape, **options)
    inputs = draws(shape, batch, torch.device(device))
    return TrainingStep(variant, vae, inputs, compiled, graph, numbers, default_recipe(network))


def step_bytes(step: TrainingStep) -> int:
    """Bytes at a step's peak: weights, buffers and Adam's moments, and gradients, activations and temporaries."""
    if not step.optimizer.state:
        step()
    tensors = _trained(step)
    tensors += [value for state in step.optimizer.state.values() for value in state.values()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if step.recorded is not None:
        return held + step.recorded.peak
    step.optimizer.zero_grad()
    return held + peak_memory(step, step.device)


def parameter_count(module: nn.Module) -> int:
    """Trained numbers."""
    return sum(parameter.numel() for parameter in module.parameters())
