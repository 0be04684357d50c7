"""One beta a sample: a Linear that makes its gates itself, against the formula in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mrvae_kernels as mk
from mrvae_kernels import ops
from mrvae_kernels.reference import gates

pytestmark = pytest.mark.skipif(not ops.EXTENSION, reason=f"the compiled core is missing: {ops.EXTENSION_ERROR}")

KINDS = ("sigmoid", "sqrt", "softplus")
RANGE = mk.BetaRange(0.01, 10.0)
TOLERANCE = {
    torch.float32: {"rtol": 2e-4, "atol": 2e-5}, torch.float64: {"rtol": 1e-9, "atol": 1e-11},
    torch.bfloat16: {"rtol": 0.1, "atol": 0.1},
}


def perceptron(dtype: torch.dtype = torch.float32, last: nn.Module | None = None) -> nn.Sequential:
    layers = [nn.Linear(7, 40), nn.ReLU(), nn.Linear(40, 21, bias=False), nn.Tanh(), nn.Linear(21, 530)]
    return nn.Sequential(*layers, *([last] if last is not None else [])).to(dtype)


def gated(kind: str = "sigmoid", network: nn.Module | None = None, **options: int) -> mk.MultiRate:
    """A gated network with gates anywhere between open and closed."""
    torch.manual_seed(0)
    model = mk.multirate(perceptron() if network is None else network, mk.GateSpec(kind, **options), RANGE)
    with torch.no_grad():
        model.gate_weight.normal_()
        model.gate_bias.normal_()
    return model


def batch(n: int = 70, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 7, dtype=dtype)
    return x, torch.empty(n).uniform_(-4, 2).exp()


def formula(model: mk.MultiRate, kind: str, x: Tensor, beta: Tensor) -> Tensor:
    """What a Sequential of Linear layers computes, without shifts."""
    eta, offset = (beta.to(x.dtype).log() - RANGE.mean) / RANGE.std, 0
    for module in model.network:
        if isinstance(module, nn.Linear):
            where = slice(offset, offset + module.out_features)
            gate = gates(model.gate_weight[..., where], model.gate_bias[where], eta, kind)
            offset = where.stop
            x = gate * nn.functional.linear(x, module.weight, module.bias)
        else:
            x = module(x)
    return x


def leaves(model: mk.MultiRate, x: Tensor) -> list[Tensor]:
    return [t for t in (x, *model.parameters()) if t.requires_grad]


def gradients(y: Tensor, of: list[Tensor], **options: bool) -> list[Tensor]:
    pattern = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).cos().to(y.dtype)
    return [y.detach().clone(), *torch.autograd.grad(y, of, pattern, **options)]


def expected(
    model: mk.MultiRate, kind: str, x: Tensor, beta: Tensor, after: Callable[[Tensor], Tensor] = lambda y: y
) -> list[Tensor]:
    wide = copy.deepcopy(model).double()
    x = x.detach().double().requires_grad_(x.requires_grad)
    return gradients(after(formula(wide, kind, x, beta.detach().double())), leaves(wide, x))


def makes_gates(y: Tensor, slices: int = 3) -> bool:
    """Whether the layer that gave y sends sums to the gates' node, behind the gradients of the slices."""
    layer = y.grad_fn
    while layer.name() != "gated_linear_backward":  # an activation of its own
        layer = layer.next_functions[0][0]
    node, place = layer.next_functions[3]
    assert node.name() == "gated_fold_backward"
    return place >= slices


def check(
    model: mk.MultiRate, kind: str, x: Tensor, beta: Tensor, after: Callable[[Tensor], Tensor] = lambda y: y,
    made: bool = True,
) -> None:
    """The second call: a network's first one makes its plan."""
    model(x, beta=beta)
    y = model(x, beta=beta)
    assert makes_gates(y) == made
    found = gradients(after(y), leaves(model, x))
    for value, other in zip(found, expected(model, kind, x, beta, after), strict=True):
        torch.testing.assert_close(value.double(), other, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("frozen", ["", "gate_weight", "network", "x"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, dtype, frozen):
    model = gated(kind, perceptron(dtype))
    x, beta = batch(dtype=dtype)
    x.requires_grad_(frozen != "x")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or not name.startswith(frozen))
    check(model, kind, x, beta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("degree", [2, 3])
def test_gates_of_more_degrees(degree, kind, dtype):
    check(gated(kind, perceptron(dtype), degree=degree), kind, *batch(dtype=dtype))


@pytest.mark.parametrize("samples", [2, 16, 17, 300])
def test_any_number_of_samples(samples):
    check(gated(), "sigmoid", *batch(samples))


def test_one_sample_has_one_beta():
    check(gated(), "sigmoid", *batch(1), made=False)


def test_layers_in_half_precision_have_gates_in_full():
    model = gated()
    model.network.to(torch.bfloat16)
    x, beta = batch(dtype=torch.bfloat16)
    check(model, "sigmoid", x, beta)


@pytest.mark.parametrize(("kind", "weight", "bias"), [
    *((kind, *gate) for kind in KINDS for gate in ((0.0, -200.0), (0.0, 200.0), (0.0, 0.0), (60.0, 0.0))),
    ("sigmoid", -1e38, 1.0), ("sqrt", -1e38, 1.0),  # softplus has no bound
])
def test_gates_that_do_not_divide(kind, weight, bias):
    model = gated(kind, nn.Sequential(nn.Linear(7, 20), nn.ReLU(), nn.Linear(20, 30)))
    x, beta = batch()
    with torch.no_grad():
        model.gate_weight[::3] = weight
        model.gate_bias[::3] = bias
    model(x, beta=beta)
    y = model(x, beta=beta)
    assert makes_gates(y, slices=2)
    found = gradients(y, list(model.parameters()))
    for value, other in zip(found, expected(model, kind, x, beta), strict=True):
        scale = float(other.abs().max()) + 1
        torch.testing.assert_close(value.double() / scale, other / scale, **TOLERANCE[torch.float32])


@pytest.mark.parametrize(("kind", "biases"), [
    ("sqrt", (-1e-12, -1e-6, -3e-3, -5e-3)), ("sigmoid", (-40.0, -20.0)), ("softplus", (-40.0, -20.0)),
])
def test_small_gates_that_divide(kind, biases):
    model = gated(kind, nn.Sequential(nn.Linear(7, 20), nn.ReLU(), nn.Linear(20, 30))).double()
    with torch.no_grad():
        model.gate_weight[: 8 * len(biases)] = 0
        for i, bias in enumerate(biases):  # of the first layer and of the second
            model.gate_bias[8 * i : 8 * i + 8] = bias
            model.gate_bias[20 + 7 * i : 27 + 7 * i] = bias
    check(model, kind, *batch(dtype=torch.float64))


@pytest.mark.parametrize("kind", ["sigmoid", "sqrt"])
@pytest.mark.parametrize("last", [None, nn.ReLU()], ids=["none", "relu"])
@pytest.mark.parametrize("change", [lambda y: y.mul_(2), lambda y: y.relu_(), lambda y: y.view(-1)[3:].neg_()])
def test_a_result_changed_in_place(kind, last, change):
    def after(y: Tensor) -> Tensor:
        y = y.clone() if y.dtype == torch.float64 else y
        change(y)
        return y

    check(gated(kind, perceptron(last=last)), kind, *batch(), after)


def test_retained_and_freed_graphs():
    model = gated("sqrt")
    x, beta = batch()
    model(x, beta=beta)
    y = model(x, beta=beta)
    first = gradients(y, leaves(model, x), retain_graph=True)
    again = gradients(y, leaves(model, x))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="a second time"):
        gradients(y, leaves(model, x))


def test_gates_changed_before_the_backward_pass_are_refused():
    model = gated()
    x, beta = batch()
    x.requires_grad_()
    model(x, beta=beta)
    for name in ("gate_weight", "gate_bias"):
        y = model(x, beta=beta)
        assert makes_gates(y)
        with torch.no_grad():
            model.get_parameter(name).mul_(2)
        for of in (x, model.gate_weight):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(y.sum(), of, retain_graph=True)


def test_betas_that_get_a_gradient():
    model = gated("sqrt")
    x, beta = batch()
    wide, wide_beta = copy.deepcopy(model).double(), beta.double().requires_grad_()
    beta.requires_grad_()
    for _ in range(2):
        found = gradients(model(x, beta=beta), [beta, *model.parameters()])
        other = gradients(formula(wide, "sqrt", x.double(), wide_beta), [wide_beta, *wide.parameters()])
        for value, target in zip(found, other, strict=True):
            torch.testing.assert_close(value.double(), target, rtol=1e-3, atol=1e-3)


def test_betas_changed_after_the_forward_pass_do_not_matter():
    model = gated()
    x, beta = batch()
    model(x, beta=beta)
    target = expected(model, "sigmoid", x, beta)
    y = model(x, beta=beta)
    beta.fill_(1.0)
    for value, other in zip(gradients(y, leaves(model, x)), target, strict=True):
        torch.testing.assert_close(value.double(), other, **TOLERANCE[torch.float32])


LASTS = {"none": None, "relu": nn.ReLU(), "silu": nn.SiLU(), "tanh": nn.Tanh()}


def check_reference(model: mk.MultiRate, x: Tensor, beta: Tensor, slices: int, made: bool = True) -> None:
    """Two calls, without a plan and with one, against the reference in float64."""
    wide = copy.deepcopy(model).double()
    exact = x.detach().double().requires_grad_(x.requires_grad)
    for _ in range(2):
        y = model(x, beta=beta)
        with mk.override(backend="reference"):
            other = gradients(wide(exact, beta=beta.double()), leaves(wide, exact))
        for value, target in zip(gradients(y, leaves(model, x)), other, strict=True):
            if x.dtype == torch.bfloat16:  # a sign that rounding turns is a gradient lost: as a whole
                assert (value.double() - target).norm() < 0.1 * target.norm()
            else:
                torch.testing.assert_close(value.double(), target, **TOLERANCE[x.dtype])
    assert makes_gates(y, slices) == made


@pytest.mark.parametrize("last", LASTS)
@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_shifts_are_made_with_the_gates(kind, degree, last):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        network = nn.Sequential(nn.Linear(7, 20), nn.ReLU(), nn.Linear(20, 530, bias=degree != 2))
        if LASTS[last] is not None:
            network.append(LASTS[last])
        model = gated(kind, network, shift=True, degree=degree)
        if dtype == torch.float64:
            model.double()
        if dtype == torch.bfloat16:
            model.network.to(dtype)
        x, beta = batch(dtype=dtype)
        check_reference(model, x.requires_grad_(), beta, slices=4)


@pytest.mark.parametrize("frozen", ["gate_weight", "network", "x"])
def test_shifts_of_what_is_frozen(frozen):
    model = gated("softplus", nn.Sequential(nn.Linear(7, 20), nn.ReLU(), nn.Linear(20, 30)), shift=True, degree=3)
    x, beta = batch()
    x.requires_grad_(frozen != "x")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    check_reference(model, x, beta, slices=4)


def test_shifts_in_the_same_bits_for_any_number_of_threads():
    model = gated("softplus", nn.Sequential(nn.Linear(7, 1200)), shift=True, degree=3)
    x, beta = batch(90)
    model(x, beta=beta)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.no_grad():
                model.network[0].weight.zero_()  # the product's own bits may depend on the threads
            found.append(gradients(model(x, beta=beta), [model.gate_weight, model.gate_bias]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("beta", ["each", "one"])
@pytest.mark.parametrize("kind", ["linear", "convolution", "transposed"])
def test_gates_on_inputs_in_a_plan(kind, beta):
    """The core scales the input; without a plan Python does."""
    products = {
        "linear": lambda: nn.Linear(7, 20), "convolution": lambda: nn.Conv2d(7, 5, 3),
        "transposed": lambda: nn.ConvTranspose2d(7, 5, 3),
    }
    for dtype in (torch.float32, torch.float64):
        network = nn.Sequential(products[kind](), nn.ReLU()).to(dtype)
        model = gated("softplus", network, shift=True, degree=3, inputs=mk.GateSpec("sigmoid", degree=3))
        x, betas = batch(12, dtype)
        x = (x if kind == "linear" else x[:, :, None, None] * torch.rand(12, 7, 4, 5, dtype=dtype)).requires_grad_()
        given = betas if beta == "each" else 0.3
        wide = copy.deepcopy(model).double()
        exact = x.detach().double().requires_grad_()
        with mk.override(backend="reference"):
            other = gradients(wide(exact, beta=betas.double() if beta == "each" else 0.3), leaves(wide, exact))
        for _ in range(2):
            found = gradients(model(x, beta=given), leaves(model, x))
            for value, target in zip(found, other, strict=True):
                torch.testing.assert_close(value.double(), target, **TOLERANCE[dtype])
        assert not model._plans.installed.indirect
    with pytest.raises(ValueError, match="expected"):
        model(x[:5], beta=betas)


class Twice(nn.Module):
    """A layer that is called twice, and one whose x has three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.deep = nn.Linear(7, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.layer(x).relu())
        return self.deep(x[:, None, :].expand(-1, 3, -1)) + self.deep(x)[:, None, :]


def test_layers_called_twice_and_with_more_axes():
    model = gated(network=Twice())
    wide = copy.deepcopy(model).double()
    x, beta = batch()
    for _ in range(2):
        with mk.override(backend="reference"):
            other = gradients(wide(x.double(), beta=beta.double()), leaves(wide, x))
        for value, target in zip(gradients(model(x, beta=beta), leaves(model, x)), other, strict=True):
            torch.testing.assert_close(value.double(), target, **TOLERANCE[torch.float32])


class Packed(nn.Module):
    """Layers under hooks that pack what is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 20), nn.ReLU(), nn.Linear(20, 30))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return self.layers(x)


def test_what_hooks_pack():
    model = gated("sqrt", Packed())
    plain = copy.deepcopy(model)
    plain.network = plain.network.layers
    x, beta = batch()
    model(x, beta=beta)
    y = model(x, beta=beta)
    assert makes_gates(y, slices=2)
    found = gradients(y, list(model.parameters()))
    for value, other in zip(found, expected(plain, "sqrt", x, beta), strict=True):
        torch.testing.assert_close(value.double(), other, **TOLERANCE[torch.float32])


def test_as_without_a_plan():
    model = gated()
    x, beta = batch()
    model(x, beta=beta)
    found = gradients(model(x, beta=beta), leaves(model, x))
    model._plans.prepared.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # a call that takes no plan
        y = model(x, beta=beta)
    for value, other in zip(found, gradients(y, leaves(model, x)), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)


def test_same_bits_for_any_number_of_threads():
    model = gated("sqrt", nn.Sequential(nn.Linear(7, 530), nn.ReLU(), nn.Linear(530, 1200)))
    x, beta = batch(90)
    model(x, beta=beta)
    y = model.network[0].weight  # the product's own bits may depend on the threads: gates and epilogue alone
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.no_grad():
                y.zero_()
                model.network[2].weight.zero_()
            found.append(gradients(model(x, beta=beta), leaves(model, x)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][:3], other[:3], strict=True))


def test_without_gradients():
    model = gated("softplus")
    x, beta = batch()
    with torch.no_grad():
        for _ in range(2):
            y = model(x, beta=beta)
        other = formula(copy.deepcopy(model).double(), "softplus", x.double(), beta)
    torch.testing.assert_close(y.double(), other, rtol=1e-4, atol=1e-5)


def test_a_bias_of_another_shape_is_refused():
    model = gated(network=nn.Sequential(nn.Linear(7, 4096)))
    x, beta = batch()
    for _ in range(3):
        model(x, beta=beta).sum().backward()
    model.network[0].bias = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="bias has shape"):
        model(x, beta=beta)


def test_transforms():
    model = gated()
    x, beta = batch()
    _, *wanted = gradients(model(x, beta=beta), list(model.parameters()))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        y = torch.func.functional_call(model, given, (x,), {"beta": beta})
        return (y * torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).cos().to(y.dtype)).sum()

    for _ in range(2):
        found = torch.func.grad(loss)(parameters)
        for value, other in zip(found.values(), wanted, strict=True):
            torch.testing.assert_close(value, other, **TOLERANCE[torch.float32])


def test_a_number_that_is_none_is_passed_on_by_relu_as_torch_does():
    model = gated("softplus", nn.Sequential(nn.Linear(7, 20), nn.ReLU()), shift=True)
    x, beta = batch(5)
    x[2] = float("nan")
    wide = copy.deepcopy(model).double()
    with mk.override(backend="reference"):
        target, = torch.autograd.grad(wide(x.double(), beta=beta.double()).sum(), [wide.network[0].bias])
    found, = torch.autograd.grad(model(x, beta=beta).sum(), [model.network[0].bias])
    torch.testing.assert_close(found.double(), target, rtol=1e-5, atol=1e-6)
