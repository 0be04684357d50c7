"""The convolutions' kernels as they would be compiled, for checks without a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from . import implicit_gemm, weight_gradient
from .activations import ACTIVATIONS, NEEDS_ARGUMENT, activation_code
from .configurations import Tiles, every
from .launch import TRITON_NAMES, Variant


def variants(architecture: str = "sm_90") -> list[Variant]:
    """Of both operators, since each calls all of the kernels."""
    return product_variants(architecture) + weight_gradient_variants(architecture)


def compiled_dot(dtype: torch.dtype) -> tl.dtype:
    """tl.dot's operands on a GPU: launch.dot_dtype outside of the interpreter."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def product_variants(architecture: str) -> list[Variant]:
    """Every tile of the table, plain and as conv2d's input gradient, with channels innermost; then each option once."""
    found: list[Variant] = []

    def add(
        label: str, dtype: torch.dtype, precision: str, tiles: Tiles, activation: str = "none",
        **other: Any,
    ) -> None:
        name = TRITON_NAMES[dtype]
        prologue = other.get("BACKWARD", False)
        channels, rows_inner = 1 if other.get("FLAT") else 2**10, other.get("X_ROWS_INNER", False)
        block_m, block_n, block_k = implicit_gemm.blocks(tiles, 2**20, 2**10, channels, 2**14, rows_inner, prologue)
        constants: dict[str, Any] = {
            "TRANSPOSED": False, "BACKWARD": False, "PER_SAMPLE": False, "ACTIVATION": activation_code(activation),
            "FLAT": False, "X_ROWS_INNER": False, "Y_ROWS_INNER": False, "WIDE": False, "PRECISION": precision,
            "DOT": compiled_dot(dtype), "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, **other,
        }
        constants["x_w" if constants["X_ROWS_INNER"] else "x_c"] = 1
        constants["y_w" if constants["Y_ROWS_INNER"] else "y_c"] = 1
        constants["weight_column" if constants["TRANSPOSED"] else "weight_channel"] = 1
        types = {
            **{pointer: f"*{name}" for pointer in ("x", "saved", "weight", "bias", "y", "kept")}, "gate": "*fp32",
            "shift": "*fp32", **{size: "i32" for size in implicit_gemm.GEOMETRY + implicit_gemm.SPECIALISED},
        }
        backward = constants["BACKWARD"]
        if backward and activation != "none":
            constants["saved_c"] = 1
        absent = ["bias", "shift", "kept"] if backward else ["saved"]
        if backward and activation == "none":
            absent.append("saved")
        if not backward and not constants["PER_SAMPLE"] and activation not in NEEDS_ARGUMENT:
            absent.append("kept")
        constants.update(dict.fromkeys(absent))
        found.append(Variant(
            f"convolve {label} {name} {precision} {block_m}x{block_n}x{block_k}", implicit_gemm.convolve,
            {key: value for key, value in types.items() if key not in constants}, constants, tiles.warps, tiles.stages,
            tuple(
                size for size in implicit_gemm.SPECIALISED
                if size not in constants and not (constants["FLAT"] and size.startswith(("x_", "saved_", "channels")))
            ),
        ))

    table = {
        precision: [tiles for operation, kind, tiles in every(architecture)
                    if operation == "convolution" and kind == precision]
        for precision in ("ieee", "tf32", "half")
    }
    for precision, dtype in (("ieee", torch.float32), ("tf32", torch.float32), ("half", torch.bfloat16)):
        multiply = "ieee" if precision == "ieee" else "tf32"
        for tiles in table[precision]:
            add("plain", dtype, multiply, tiles)
            add("input gradient", dtype, multiply, tiles, "relu", BACKWARD=True, TRANSPOSED=True)
    tiles = table["half"][-1]
    for activation in ACTIVATIONS[1:]:
        add(activation, torch.bfloat16, "tf32", tiles, activation)
        add(f"input gradient {activation}", torch.bfloat16, "tf32", tiles, activation, BACKWARD=True)
    add("input gradient", torch.bfloat16, "tf32", tiles, BACKWARD=True)
    add("transposed", torch.bfloat16, "tf32", tiles, "relu", TRANSPOSED=True)
    add("relu", torch.float16, "tf32", tiles, "relu")
    add("one gate a sample", torch.bfloat16, "tf32", tiles, "relu", PER_SAMPLE=True)
    add("few", torch.bfloat16, "tf32", tiles, "relu", FLAT=True, X_ROWS_INNER=True, Y_ROWS_INNER=True)
    add("few transposed", torch.bfloat16, "tf32", tiles, FLAT=True, TRANSPOSED=True)
    add("contiguous", torch.bfloat16, "tf32", tiles, X_ROWS_INNER=True, Y_ROWS_INNER=True)
    add("wide", torch.bfloat16, "tf32", tiles, "relu", WIDE=True)
    add("wide few", torch.bfloat16, "tf32", tiles, "relu", WIDE=True, FLAT=True, BACKWARD=True, TRANSPOSED=True)
    return found


def weight_gradient_variants(architecture: str) -> list[Variant]:
    """Every tile of the table with channels innermost; then other layouts, few channels, wide offsets, activations."""
    found: list[Variant] = []

    def add(
        label: str, dtype: torch.dtype, precision: str, tiles: Tiles, activation: str = "none", **other: Any,
    ) -> None:
        name = TRITON_NAMES[dtype]
        flat, inner = other.get("FLAT", False), other.get("B_ROWS_INNER", False)
        block_m, block_n, block_k = weight_gradient.blocks(tiles, 2**10, 2**10, flat, inner, activation)
        constants = {
            "ACTIVATION": activation_code(activation), "SLOPE_OF_A": True, "FLAT": False,
            "B_ROWS_INNER": False, "WIDE": False, "PRECISION": precision, "DOT": compiled_dot(dtype),
            "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, **other,
        }
        innermost = {"a_w": 1, "b_w": 1} if constants["B_ROWS_INNER"] else {"a_c": 1, "b_c": 1}
        constants |= innermost if activation == "none" else {**innermost, "saved_c": 1}
        pointers = {"a": f"*{name}", "b": f"*{name}", "saved": f"*{name}", "partial": "*fp32"}
        if activation == "none":
            constants["saved"] = None
        types = {**pointers, **{size: "i32" for size in weight_gradient.GEOMETRY + weight_gradient.SPECIALISED}}
        found.append(Variant(
            f"convolve_weight {label} {name} {precision} {block_m}x{block_n}x{block_k}",
            weight_gradient.convolve_weight,
            {key: value for key, value in types.items() if key not in constants}, constants, tiles.warps, tiles.stages,
            tuple(
                size for size in weight_gradient.SPECIALISED
                if size not in constants and not (constants["FLAT"] and size.startswith(("b_", "saved_")))
            ),
        ))

    table = {
        precision: [tiles for operation, kind, tiles in every(architecture)
                    if operation == "convolution_weight_gradient" and kind == precision]
        for precision in ("ieee", "tf32", "half")
    }
    for precision, dtype in (("ieee", torch.float32), ("tf32", torch.float32), ("half", torch.bfloat16)):
        for tiles in table[precision]:
            add("plain", dtype, "ieee" if precision == "ieee" else "tf32", tiles)
    tiles = table["half"][-1]
    for activation in ACTIVATIONS[1:]:
        add(activation, torch.bfloat16, "tf32", tiles, activation, SLOPE_OF_A=activation not in NEEDS_ARGUMENT)
    add("relu", torch.float16, "tf32", tiles, "relu")
    add("relu", torch.float32, "ieee", table["ieee"][-1], "relu")
    add("few", torch.bfloat16, "tf32", tiles, FLAT=True, B_ROWS_INNER=True)
    add("contiguous", torch.bfloat16, "tf32", tiles, B_ROWS_INNER=True)
    add("wide", torch.bfloat16, "tf32", tiles, WIDE=True)
    return found
