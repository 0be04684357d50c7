"""What bench.overhead refuses a time: steps that do not compute what their gates say."""

from __future__ import annotations

import contextlib

import pytest
import torch
from mrvae_models import vae as vae_module
from overhead_cases import CASES, drop_a_gradient, step_of
from torch import nn

import mrvae_kernels as mk
from bench import overhead_check, overhead_networks
from bench.overhead_check import RUNS, RUNS_IN_DOUBT, References, baked_refusal, before, refusal
from bench.overhead_measure import BAKED_BETA, baked
from bench.overhead_networks import CUBIC, RECIPE, VARIANTS
from bench.variants import RecordedStep, draws, step_bytes, training_step
from mrvae_kernels.ops import EXTENSION
from mrvae_kernels.prepared import Prepared

CPU = torch.device("cpu")


@pytest.mark.parametrize("numbers", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_every_variant_computes_what_its_gates_say(case, numbers):
    references = References()
    for variant in VARIANTS:
        assert refusal(step_of(variant, case, numbers=numbers), references) is None, variant
    assert numbers == "bfloat16" or len(references.known) == 8, "ungated, one beta a step, one an example, the recipe's"
    for variant in CUBIC:
        assert refusal(step_of(variant, case, numbers=numbers), references) is None, variant
    assert numbers == "bfloat16" or len(references.known) == 12, "of other gates"


@pytest.mark.parametrize("variant", CUBIC)
def test_gates_that_do_not_bend_as_they_should_are_refused(variant, monkeypatch):
    step = step_of(variant)
    model, weight = step.model, step.model.gate_weight
    assert len(weight) == 3 and weight[1:].any(1).all()
    mask = torch.tensor([[1.0], [1.0], [0.0]])

    def straight(x: torch.Tensor, beta: float | torch.Tensor):
        return torch.func.functional_call(model, {"gate_weight": weight * mask}, (x,), {"beta": beta})

    monkeypatch.setattr(step, "call", straight)
    assert "off by" in refusal(step)


def test_the_linear_network_without_biases_is_gated_alike():
    for variant in VARIANTS:
        assert refusal(training_step(variant, "linear", (1, 6, 6), 16, latent=4)) is None, variant


def test_a_hierarchy_with_weight_norm_is_gated_alike():
    options = {"latent": 2, "channels": 4, "groups": 2, "cells": 1, "process_cells": 1}
    for variant in VARIANTS:
        assert refusal(training_step(variant, "nvae", (1, 6, 6), 16, **options)) is None, variant


def test_all_variants_start_from_the_same_gates_and_weights():
    steps = {variant: step_of(variant, "tiny-cnn") for variant in VARIANTS}
    for step in steps.values():
        for name, value in step.parameters.items():
            assert torch.equal(value, steps["ungated"].parameters[name])
    expected = steps["gated"].gates(lambda p: p.detach())
    assert "encoder.body.1" in expected, "a batch norm"
    for variant in ("per-sample", "listing1", "plain-fold"):
        gates = steps[variant].gates(lambda p: p.detach())
        assert gates.keys() == expected.keys()
        assert all(torch.equal(a, b) for name in gates for a, b in zip(gates[name], expected[name], strict=True))


def forget_a_gate(step, monkeypatch, layer="encoder.mean"):
    gate = step.model.places[layer]
    monkeypatch.setattr(gate, "forward", gate.layer.forward)


def fold_no_bias(step, monkeypatch):
    right = overhead_networks.fold
    monkeypatch.setattr(overhead_networks, "fold", lambda weight, bias, *rest: (right(weight, bias, *rest)[0], bias))


def take_another_beta(step, monkeypatch):
    right = step.call
    monkeypatch.setattr(step, "call", lambda x, beta: right(x, beta=beta * 1.3))


def take_one_beta_for_all(step, monkeypatch):
    right = step.call
    monkeypatch.setattr(step, "call", lambda x, beta: right(x, beta=beta[:1].expand_as(beta).contiguous()))


def drop_a_bias_gradient(step, monkeypatch):
    step.parameters["encoder.log_variance.bias"].register_hook(torch.zeros_like)


def scale_a_gradient(step, monkeypatch):
    step.parameters["encoder.body.1.weight"].register_hook(lambda gradient: gradient * 1.01)


def drop_a_gate_s_gradient(step, monkeypatch):
    def hook(gradient):
        gradient = gradient.clone()
        gradient[step.model.gated["decoder.2"]] = 0
        return gradient

    step.model.gate_bias.register_hook(hook)


def leave_a_parameter(step, monkeypatch):
    group = step.optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not step.parameters["encoder.mean.weight"]]


def leave_out_the_noise(step, monkeypatch):
    monkeypatch.setattr(vae_module, "reparameterise", lambda mean, log_variance: mean)


def draw_too_much_noise(step, monkeypatch):
    right = vae_module.reparameterise
    monkeypatch.setattr(vae_module, "reparameterise", lambda mean, log_variance: right(mean, log_variance + 2))


def forget_an_example(step, monkeypatch):
    def call(x, **beta):
        return right(torch.cat([x[:-1], x[:1]]), **beta)

    right = step.call
    monkeypatch.setattr(step, "call", call)


def lose_an_output(step, monkeypatch):
    step.model.network.decoder.register_forward_hook(lambda module, inputs, y: y[:-1])


def give_nan(step, monkeypatch):
    step.model.network.decoder.register_forward_hook(lambda module, inputs, y: y * float("nan"))


def prepare_another_beta(step, monkeypatch):
    """A prepared plan is wrong: with one beta a step the first call, which has none, is right."""
    right = Prepared.__init__

    def prepared(self, *args):
        right(self, *args)
        begin = self.begin
        self.begin = lambda call, beta, *rest: begin(call, 0 * beta + 10.0, *rest)

    monkeypatch.setattr(Prepared, "__init__", prepared)


def run_out_of_registers(step, monkeypatch):
    def call(*args, **kwargs):
        raise RuntimeError("out of registers\nand more")

    monkeypatch.setattr(step, "call", call)


FAULTS = [
    ("listing1", forget_a_gate, "encoder.mean"),
    ("plain-fold", fold_no_bias, "is off by"),
    ("gated", take_another_beta, "is off by"),
    ("per-sample", take_another_beta, "is off by"),
    ("per-sample", take_one_beta_for_all, "is off by"),
    ("gated", drop_a_gradient, "decoder.0.weight"),
    ("ungated", drop_a_gradient, "decoder.0.weight"),
    ("per-sample", drop_a_bias_gradient, "encoder.log_variance.bias"),
    ("gated", scale_a_gradient, "encoder.body.1.weight"),
    ("gated", drop_a_gate_s_gradient, "the gate: decoder.2 c"),
    ("gated", leave_a_parameter, "encoder.mean.weight has a gradient, but the step left it as it was"),
    ("gated", leave_out_the_noise, "the noise of z has mean 0 and mean square 0"),
    ("gated", draw_too_much_noise, "the noise of z has mean"),
    ("gated", forget_an_example, "is off by"),
    ("gated", lose_an_output, "ValueError: the decoder's output has shape (15, 1, 6, 6)"),
    ("gated", give_nan, "off by inf"),
    ("gated", run_out_of_registers, "RuntimeError: out of registers"),
    *(
        (variant, prepare_another_beta, said) for variant, said in
        (("gated", "in a later step"), ("per-sample", "is off by"), (RECIPE, "is off by")) if EXTENSION
    ),
]


@pytest.mark.filterwarnings("ignore:beta = ")
@pytest.mark.parametrize(("variant", "fault", "said"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_wrong_variant_is_refused_with_the_reason(variant, fault, said, monkeypatch):
    step = step_of(variant)
    fault(step, monkeypatch)
    reason = refusal(step)
    assert reason is not None and said in reason and "\n" not in reason


def first_step(step, references):
    return overhead_check._wrong_step(step, before(step), step.inputs[0], overhead_check.SEED, references, RUNS)


@pytest.mark.parametrize("seen", [True, False])
def test_before_a_refusal_more_runs_say_what_rounding_does(seen, monkeypatch):
    right, runs, name = overhead_check.expected, [], "gradient: encoder.body.1.weight"

    def expected(plain, start, draw, shared, noise, dtype=torch.float64, autocast=False):
        values = right(plain, start, draw, shared, noise, dtype, autocast)
        if dtype == torch.float32:
            runs.append(draw.x)
            if seen and len(runs) == RUNS + RUNS_IN_DOUBT:
                values[name] = 1.01 * values[name]
        return values

    monkeypatch.setattr(overhead_check, "expected", expected)
    step, references = step_of("gated"), References()
    step.parameters["encoder.body.1.weight"].register_hook(lambda grad: 1.02 * grad)
    reason = first_step(step, references)
    assert reason is None if seen else name in reason
    assert len(runs) == RUNS + RUNS_IN_DOUBT and len({tuple(x.flatten().tolist()) for x in runs}) == len(runs)
    assert torch.equal(runs[0], step.inputs[0].x) and len(references.known) == 1
    step = step_of("gated")
    step.parameters["encoder.body.1.weight"].register_hook(lambda grad: 1.1 * grad)
    assert name in first_step(step, references) and len(runs) == RUNS + RUNS_IN_DOUBT, "asked once"


@pytest.mark.parametrize("layer", ["encoder.body.1", "encoder.mean", "decoder.0", "decoder.2"])
def test_a_forgotten_gate_is_seen_through_bfloat16_s_rounding(layer, monkeypatch):
    step = step_of("listing1", numbers="bfloat16")
    forget_a_gate(step, monkeypatch, layer)
    assert "is off by" in refusal(step)


def test_statistics_that_are_not_kept_are_seen():
    step = step_of("gated", "tiny-cnn")
    for module in step.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    assert refusal(step).startswith("statistics: ")


def test_a_step_that_compiles_again_for_every_beta_is_refused():
    for as_tensor, said in ((True, None), (False, "recompil")):
        torch._dynamo.reset()
        step = step_of("gated")
        step.call = torch.compile(step.model, fullgraph=True, dynamic=False, backend="eager")
        step.as_tensor = as_tensor
        reason = refusal(step)
        assert reason is None if said is None else said in reason.lower()
    torch._dynamo.reset()


@pytest.fixture
def recorder(monkeypatch):
    """torch.cuda's part of recording a step, for a CPU: a replay runs the step again on the recording's own inputs."""

    class Graph:
        def replay(self):
            recorded = self.step.recorded
            loss, output = self.step._step(recorded.draw)
            for kept, value in zip((recorded.loss, *recorded.output), (loss, *output), strict=True):
                kept.copy_(value.detach())

    class Stream:
        def __init__(self, *_):
            pass

        def wait_stream(self, other):
            pass

    peaks = iter([100, 175])
    for name, fake in {
        "CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream, "stream": contextlib.nullcontext,
        "graph": contextlib.nullcontext, "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None, "memory_allocated": lambda device: next(peaks),
        "max_memory_allocated": lambda device: next(peaks),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return Graph


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_recorded_step_trains_on_what_it_is_given_and_not_while_it_is_recorded(variant, recorder, monkeypatch):
    step = step_of(variant, "tiny-cnn")
    step.graph = step.as_tensor = True
    monkeypatch.setattr(recorder, "step", step, raising=False)
    at_first = {name: value.detach().clone() for name, value in [*step.parameters.items(), *step.buffers.items()]}
    step.recorded = RecordedStep(step, step.inputs[1])
    assert all(torch.equal(value, at_first[n]) for n, value in [*step.parameters.items(), *step.buffers.items()])
    assert not any(value.any() for state in step.optimizer.state.values() for value in state.values())
    assert step.recorded.peak == 75 and step_bytes(step) > 75
    assert refusal(step) is None, "on another batch and beta than the recorded ones"
    moments = step.optimizer.state[step.parameters["encoder.mean.weight"]]
    assert moments["step"] == 3 and moments["exp_avg"].any()


@pytest.mark.parametrize("case", CASES)
def test_a_baked_network_that_is_wrong_is_refused(case):
    step = step_of("gated", case)
    network, x = baked(step), step.inputs[-1].x
    assert baked_refusal(step, network, x, BAKED_BETA) is None
    assert "is off by" in baked_refusal(step, network, x, 2 * BAKED_BETA)
    with torch.no_grad():
        next(iter(network.parameters())).mul_(1.01)
    assert "is off by" in baked_refusal(step, network, x, BAKED_BETA)


def test_the_recipe_is_that_of_training_unless_told_otherwise():
    model = step_of(RECIPE).model
    assert len(model.gate_weight) == 3 and set(model.shifts) == set(model.gated) and set(model.inputs) == {"decoder.0"}
    kinds = overhead_networks.kinds_of(model)
    assert (kinds["encoder.mean"], kinds["decoder.2"], kinds["decoder.2.shift"]) == ("sigmoid", "softplus", "identity")
    plain = training_step(RECIPE, "linear", (1, 6, 6), 16, latent=4).model
    assert plain.gate_weight.dim() == 1 and not plain.shifts


def test_betas_cover_the_range_and_differ_within_a_batch():
    found = draws((1, 2, 2), 64, CPU)
    assert len({draw.beta for draw in found}) == len(found)
    for draw in found:
        assert 0.01 <= draw.beta <= 10 and draw.scalar.item() == pytest.approx(draw.beta)
        assert draw.each.shape == (64,) and draw.each.min() >= 0.0099 and draw.each.max() > 10 * draw.each.min()


def test_a_layer_that_has_no_formula_here_is_named():
    with pytest.raises(ValueError, match="a LSTM has no gate in plain PyTorch here"):
        overhead_networks.channel_axis(nn.LSTM(2, 3), 3)


def test_the_gated_step_is_the_package_s_own():
    assert isinstance(step_of("gated").model, mk.MultiRate) and isinstance(step_of("per-sample").model, mk.MultiRate)
