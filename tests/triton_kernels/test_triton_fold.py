from __future__ import annotations

import importlib

import pytest
import torch
from kernel_checks import (
    DEVICE,
    TOLERANCE,
    Mutant,
    assert_close,
    choices,
    layouts,
    must_fail,
    poisoned,
    requires_triton,
)

from mrvae_kernels import reference

pytestmark = requires_triton
kernels = pytest.importorskip("mrvae_kernels.triton_kernels.fold")
layers_of = pytest.importorskip("mrvae_kernels.triton_kernels.fold_layers")
plans = pytest.importorskip("mrvae_kernels.triton_kernels.fold_plan")

LAST = torch.channels_last
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def random(*shape, memory_format=torch.contiguous_format):
    return torch.randn(shape, device=DEVICE).to(memory_format=memory_format)


# weight, groups (0: channels in axis 0; otherwise a transposed convolution's groups)
LAYERS = {
    "linear": (lambda: random(7, 13), 0),
    "linear, multiples of 8": (lambda: random(11, 40), 0),
    "linear, long rows": (lambda: random(3, 1500), 0),
    "linear, long rows, multiples of 8": (lambda: random(2, 2056), 0),
    "one channel": (lambda: random(1, 70), 0),
    "norm": (lambda: random(37), 0),
    "no channels": (lambda: random(0, 4), 0),
    "no inputs": (lambda: random(4, 0), 0),
    "conv1d": (lambda: random(5, 3, 3), 0),
    "conv2d": (lambda: random(35, 5, 3, 3), 0),
    "conv2d, channels_last": (lambda: random(6, 5, 3, 3, memory_format=LAST), 0),
    "conv3d": (lambda: random(4, 2, 3, 1, 5), 0),
    "transposed weight": (lambda: random(300, 9).t(), 0),
    "slice": (lambda: random(8, 20)[::2, 3:11], 0),
    "expanded": (lambda: random(5, 1).expand(5, 6), 0),
    "transposed1d": (lambda: random(5, 4, 3), 1),
    "transposed2d": (lambda: random(70, 5, 2, 3), 1),
    "transposed2d, multiples of 8": (lambda: random(33, 5, 4, 4), 1),
    "transposed2d, big kernel": (lambda: random(4, 3, 5, 5), 1),
    "transposed2d, channels_last": (lambda: random(7, 24, 4, 4, memory_format=LAST), 1),
    "transposed2d, groups": (lambda: random(6, 5, 3, 3), 3),
    "transposed2d, groups, channels_last": (lambda: random(6, 5, 3, 3, memory_format=LAST), 2),
    "transposed2d, groups, permuted": (lambda: random(5, 6, 3, 3).transpose(0, 1), 2),
    "transposed2d, groups, kernel outermost": (lambda: random(2, 4, 3).permute(1, 2, 0), 2),
    "transposed2d, depthwise": (lambda: random(6, 1, 4, 4), 6),
    "transposed2d, one channel a group": (lambda: random(6, 1, 4, 4), 2),
    "transposed2d, many channels": (lambda: random(2, 40, 7), 2),
    "transposed2d, many tiles": (lambda: random(22, 14, 3, 4), 2),
    "transposed2d, one channel": (lambda: random(6, 1, 4, 4), 1),
}


def channels(weight, groups):
    return weight.shape[0] if groups == 0 else weight.shape[1] * groups


def tensors_for(name, dtype=torch.float32, has_bias=True, has_shift=True):
    """weight, bias, gate, shift and groups of a layer."""
    make, groups = LAYERS[name]
    weight = make()
    weight = weight if dtype == weight.dtype else weight.to(dtype)
    count, sums = channels(weight, groups), reference.gate_dtype(dtype)
    return (
        weight, random(count).to(dtype) if has_bias else None, random(count).to(sums),
        random(count).to(sums) if has_shift else None, groups,
    )


def exact(layer):
    """The oracle's W' and b' in float64, and its leaves."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in layer[:4]]
    return reference.fold(*leaves, layer[4]), leaves


def exact_gradients(layer, grads):
    """The oracle's dW, db, dg and dt, zeros where nothing depends on them."""
    results, leaves = exact(layer)
    pairs = [(y, grad.double()) for y, grad in zip(results, grads, strict=True) if y is not None and grad is not None]
    present = [leaf for leaf in leaves if leaf is not None]
    outputs = [y for y, _ in pairs] + [sum((0 * leaf).sum() for leaf in present)]
    found = iter(torch.autograd.grad(outputs, present, [grad for _, grad in pairs] + [torch.ones_like(outputs[-1])]))
    return [None if leaf is None else next(found) for leaf in leaves]


def transposed(layers):
    return [list(values) for values in zip(*layers, strict=True)]


def check_values(kernels, layers):
    with poisoned():
        folded, biases = kernels.fold(*transposed(layers))
    for i, (layer, weight, bias) in enumerate(zip(layers, folded, biases, strict=True)):
        (expected, expected_bias), _ = exact(layer)
        like = torch.empty_like(layer[0])
        assert weight.dtype == bias.dtype == like.dtype and weight.stride() == like.stride()
        assert_close(weight, expected, f"weight {i}")
        if expected_bias is None:
            assert bias.shape == (0,)
        else:
            assert_close(bias, expected_bias, f"bias {i}")


def check_gradients(kernels, layers, mask=None, grads=None):
    """grads: (dW', db') a layer; mask: four flags a layer."""
    if grads is None:
        grads = []
        for weight, bias, gate, shift, _ in layers:
            folded_bias = None if bias is None and shift is None else torch.randn_like(gate).to(weight.dtype)
            grads.append((torch.randn_like(weight), folded_bias))
    mask = [True] * 4 * len(layers) if mask is None else mask
    with poisoned():
        results = kernels.fold_backward(*transposed(grads), *transposed(layers), mask)
    for i, (layer, grad) in enumerate(zip(layers, grads, strict=True)):
        expected = exact_gradients(layer, grad)
        defaults = (layer[0], layer[0], layer[2], layer[2])
        flags = mask[4 * i : 4 * i + 4]
        for name, result, value, like, default, wanted in zip(
            "Wbgt", [part[i] for part in results], expected, layer[:4], defaults,
            flags, strict=True,
        ):
            if value is None or not wanted:
                assert result.shape == (0,) and result.dtype == default.dtype
                continue
            assert result.dtype == like.dtype
            assert_close(result, value, f"d{name} of layer {i}", tolerance_of(layer[0], result))
        if flags[0]:
            assert results[0][i].stride() == torch.empty_like(layer[0]).stride()


def tolerance_of(weight, result):
    return max(TOLERANCE[result.dtype], TOLERANCE[reference.gate_dtype(weight.dtype)])


def check_finish(kernels, layer, splits=3, mask=(True, True, True, True), has_sums=True):
    weight, bias, gate, _, groups = layer
    sums = reference.gate_dtype(weight.dtype)
    partial = torch.randn(splits, *weight.shape, dtype=sums, device=DEVICE)
    grad_bias = torch.randn(channels(weight, groups), dtype=sums, device=DEVICE) if has_sums else None
    with poisoned():
        results = kernels.finish_weight_gradient(partial, grad_bias, weight, bias, gate, groups, mask)
    ones = torch.ones(channels(weight, groups), dtype=sums, device=DEVICE)
    shift = torch.zeros_like(ones)
    total = partial.double().sum(0)
    expected = exact_gradients((weight, bias, ones if gate is None else gate, shift, groups), (total, grad_bias))
    likes = (weight, bias, ones if gate is None else gate, ones if gate is None else gate)
    for name, result, value, like, wanted in zip("Wbgt", results, expected, likes, mask, strict=True):
        if value is None or not wanted:
            assert result.shape == (0,)
        else:
            assert result.dtype == like.dtype
            assert_close(result, value, f"d{name}", tolerance_of(weight, result))
    assert not mask[0] or results[0].is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_layers_at_once(dtype):
    layers = [tensors_for(name, dtype, i % 3 != 1, i % 4 not in (1, 2)) for i, name in enumerate(LAYERS)]
    check_values(kernels, layers)
    check_gradients(kernels, layers)


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer(name):
    layer = tensors_for(name)
    check_values(kernels, [layer])
    check_gradients(kernels, [layer])
    check_finish(kernels, layer)


def test_every_tile_class_is_covered():
    shapes = [plans.geometry(w.shape, w.stride(), groups) for w, groups in ((make(), g) for make, g in LAYERS.values())]
    classes = {plans.tile_class(shape) for shape in shapes if shape is not None}
    assert classes == set(range(2 * len(plans.TILES))) - {5}  # short rows have no wide accesses


def test_geometry_describes_every_element():
    for name, (make, groups) in LAYERS.items():
        weight, shape = layers_of.dense(make(), groups)
        gate = torch.arange(channels(weight, groups), dtype=torch.float64)
        ones = torch.ones_like(weight, dtype=torch.float64, device="cpu")  # keeps the strides
        expected = reference.fold(ones, None, gate, None, groups)[0]
        flat = torch.empty_like(ones).copy_(expected).as_strided((expected.numel(),), (1,))
        found = gate.reshape(shape.groups, 1, shape.width, 1).expand(-1, shape.outer, -1, shape.inner).reshape(-1)
        assert torch.equal(flat, found), name


def test_mixed_dtypes():
    layers = [
        tensors_for("linear", torch.bfloat16), tensors_for("conv2d", torch.float64), tensors_for("transposed2d"),
        tensors_for("norm", torch.float16, has_bias=False), tensors_for("norm", torch.bfloat16, has_bias=False),
    ]
    weight, bias, gate, shift, groups = tensors_for("linear", torch.bfloat16)
    layers.append((weight, bias.float(), gate.double(), shift.half(), groups))
    weight, bias, gate, shift, groups = tensors_for("conv2d")
    layers.append((weight, bias.double(), gate.bfloat16(), shift.double(), groups))
    check_values(kernels, layers)
    check_gradients(kernels, layers)
    for layer in layers:
        check_finish(kernels, layer, splits=1)


def test_operands_of_any_layout():
    layers, grads = [], []
    for i, (_, weight) in enumerate(layouts(6, 4, 3, 3)):
        groups = (0, 1, 2)[i % 3]
        bank = random(3 * channels(weight, groups))
        bias, gate = bank[::3], bank[1 : 1 + channels(weight, groups)]
        layers.append((weight, bias, gate, bank[:1].expand(channels(weight, groups)), groups))
        grads.append((list(layouts(6, 4, 3, 3))[-1 - i][1], bank[2::3]))
    check_values(kernels, layers)
    check_gradients(kernels, layers, grads=grads)


def test_weights_at_any_address():
    weight, bias, gate, shift, groups = tensors_for("linear, multiples of 8")
    for offset in (1, 4):
        storage = random(weight.numel() + offset)
        layer = (storage[offset:].view(weight.shape), bias, gate, shift, groups)
        check_values(kernels, [layer])
        check_gradients(kernels, [layer])


def test_what_nobody_wants():
    for name in ("linear", "transposed2d, groups"):
        for mask in choices(4):
            check_gradients(kernels, [tensors_for(name)], mask)
            check_finish(kernels, tensors_for(name), mask=mask)
    layers = [tensors_for("linear"), tensors_for("conv2d"), tensors_for("norm")]
    for i in range(3):
        check_gradients(kernels, layers, [i != layer for layer in range(3) for _ in range(4)])


def test_missing_gradients_are_zeros():
    layers = [tensors_for("linear"), tensors_for("transposed2d"), tensors_for("norm")]
    check_gradients(kernels, layers, grads=[(None, random(7)), (random(70, 5, 2, 3), None), (None, None)])


def test_finishing():
    for name in ("linear, long rows, multiples of 8", "transposed2d, groups, channels_last", "no inputs"):
        weight, bias, gate, shift, groups = tensors_for(name)
        for splits in (0, 1, 2, 5):
            check_finish(kernels, (weight, bias, gate, shift, groups), splits)
        check_finish(kernels, (weight, None, gate, shift, groups))
        check_finish(kernels, (weight, bias, None, shift, groups), mask=(True, True, False, True))
        check_finish(kernels, (weight, bias, gate, shift, groups), has_sums=False)
    for dtype in DTYPES:
        check_finish(kernels, tensors_for("transposed2d, multiples of 8", dtype))


def test_wide_offsets(monkeypatch):
    monkeypatch.setattr(kernels.launch, "wide", lambda *tensors, slack=0: True)
    layers = [tensors_for(name) for name in ("linear", "transposed2d, groups", "transposed2d, channels_last")]
    check_values(kernels, layers)
    check_gradients(kernels, layers)
    check_finish(kernels, layers[2])


def test_same_bits():
    layer = tensors_for("transposed2d, multiples of 8")
    grads = [(random(*layer[0].shape), random(5))]
    runs = [kernels.fold_backward(*transposed(grads), *transposed([layer]), [True] * 4) for _ in range(2)]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*runs, strict=True))


def test_no_layers():
    assert kernels.fold([], [], [], [], []) == ([], [])
    assert kernels.fold_backward([], [], [], [], [], [], [], []) == ([], [], [], [])


def test_errors():
    weight, bias, gate, shift, _ = tensors_for("linear")
    for layer, error, message in (
        ((weight, bias, gate, shift, -1), ValueError, "groups = -1"),
        ((gate, bias, gate, shift, 1), ValueError, r"layer 0 has a weight of shape \(7,\) and groups = 1"),
        ((weight, bias, gate, shift, 2), ValueError, "multiple of groups = 2"),
        ((weight, bias[1:], gate, shift, 0), ValueError, r"a bias of shape \(6,\); expected \(7,\)"),
        ((weight, bias, gate.expand(2, 7), shift, 0), ValueError, "One beta a sample cannot be folded"),
        ((weight, bias, gate.int(), shift, 0), TypeError, "a gate of dtype"),
        ((weight, bias, gate, shift.to("meta"), 0), RuntimeError, "expected one device"),
    ):
        with pytest.raises(error, match=message):
            kernels.fold(*transposed([layer]))
    with pytest.raises(ValueError, match="1 weights, 0 biases"):
        kernels.fold([weight], [], [gate], [shift], [0])
    layer = [[value] for value in (weight, bias, gate, shift, 0)]
    with pytest.raises(ValueError, match="expected one, one and four a layer"):
        kernels.fold_backward([weight], [bias], *layer, [True])
    with pytest.raises(ValueError, match=r"expected \(7, 13\), that of its weight"):
        kernels.fold_backward([weight.t()], [bias], *layer, [True] * 4)
    with pytest.raises(ValueError, match=r"gradient of b' of shape \(6,\)"):
        kernels.fold_backward([weight], [bias[1:]], *layer, [True] * 4)
    for arguments, message in (
        ((weight, bias, weight, bias, gate, 0), "partial is"),
        ((weight[None].half(), bias, weight, bias, gate, 0), "expected contiguous torch.float32"),
        ((weight[None], bias[1:], weight, bias, gate, 0), "sums is"),
        ((weight[None], bias, weight, bias, None, 0), "expected a gate"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.finish_weight_gradient(*arguments, [True] * 4)


# ---- seeded faults ---------------------------------------------------------------------------------------------------


def quickly(*names, function=check_gradients):
    """A check of one module of the package, whichever it is, on a few layers."""

    def check(module):
        kernels = importlib.import_module(f"{module.__name__.rpartition('.')[0]}.fold")
        function(kernels, [tensors_for(name) for name in names])

    return check


def finishing(module):
    kernels = importlib.import_module(f"{module.__name__.rpartition('.')[0]}.fold")
    check_finish(kernels, tensors_for("linear"), splits=3)


GROUPED = quickly("transposed2d, groups", "transposed2d, many channels")
MUTANTS = [
    Mutant("fold_kernels", "divide(tl.load(program + 6) + tl.arange(0, TILE), ", "divide(tl.arange(0, TILE), ",
           quickly("linear, long rows", function=check_values)),
    Mutant("fold_kernels", "channel -= row * width", "channel -= 0",
           quickly("transposed2d", function=check_values)),
    Mutant("fold_kernels", "(tl.load(program + 3) + group) * width", "tl.load(program + 3) * width",
           quickly("transposed2d, groups", function=check_values)),
    Mutant("fold_kernels", "y *= tl.load(gate + channel, mask=mask, other=0)", "y *= 1",
           quickly("linear", function=check_values)),
    Mutant("fold_kernels", "dot += d * w", "dot += d", quickly("linear")),
    Mutant("fold_kernels", "channel = group * width + of_group", "channel = of_group", GROUPED),
    Mutant("fold_kernels", "((first + rows) * width)", "(rows * width)", GROUPED),
    Mutant("fold_kernels", "range(0, outer, ROWS)", "range(0, ROWS, ROWS)", quickly("transposed2d")),
    Mutant("fold_kernels", "1 if RUN == 1 else inner, RUN)", "RUN, RUN)", quickly("linear, long rows")),
    Mutant("fold_kernels", "d * g[None, :, None]", "d", quickly("linear")),
    Mutant("fold_kernels", "+ grad_bias * b", "+ grad_bias", quickly("linear")),
    Mutant("fold_kernels", "range(1, splits)", "range(2, splits)", finishing),
    Mutant("fold_plan", "outer == groups:", "outer >= groups:", quickly("transposed2d, groups", function=check_values)),
    Mutant("fold_plan", "row // width // outer, row // width % outer", "row // width // outer, row // width",
           quickly("transposed2d, many tiles", function=check_values)),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.new for mutant in MUTANTS])
def test_mutants(mutant, tmp_path):
    must_fail(mutant, tmp_path)
