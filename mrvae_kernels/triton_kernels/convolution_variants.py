"""The convolutions' kernels as they would be compiled, for checks without a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from . import implicit_gemm, weight_gradient
from .activations import ACTIVATIONS, NEEDS_ARGUMENT, activation_code
from .configurations import Tiles, every
from .device import register_limit
from .implicit_gemm import SHORTEST_COPY
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
        unit: int | None = None, **other: Any,
    ) -> None:
        name = TRITON_NAMES[dtype]
        prologue = other.get("BACKWARD", False)
        channels, rows_inner = 1 if other.get("FLAT") else 2**10, other.get("X_ROWS_INNER", False)
        most = 16 // dtype.itemsize if unit is None else unit
        scalar = other.get("Y_ROWS_INNER") or (rows_inner and not other.get("FLAT"))
        access = (1 if scalar else most) * dtype.itemsize
        block_m, block_n, block_k = implicit_gemm.blocks(
            tiles, 2**20, 2**10, channels, 2**14, rows_inner, prologue, access, activation
        )
        constants: dict[str, Any] = {
            "TRANSPOSED": False, "BACKWARD": False, "PER_SAMPLE": False, "ACTIVATION": activation_code(activation),
            "FLAT": False, "X_ROWS_INNER": False, "Y_ROWS_INNER": False, "WIDE": False, "PRECISION": precision,
            "DOT": compiled_dot(dtype), "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, **other,
        }
        scattered = constants["FLAT"] or rows_inner
        taps_inner = rows_inner and not other.get("FLAT")  # as for a contiguous weight
        constants |= {
            "CHANNEL_UNIT": 1 if constants["FLAT"] else most, "COLUMN_UNIT": most, "X_UNIT": 1 if scattered else most,
            "SAVED_UNIT": 1 if scattered or activation == "none" or not prologue else most,
            "Y_UNIT": 1 if constants["Y_ROWS_INNER"] else most,
            "WEIGHT_CHANNEL_UNIT": most if constants["TRANSPOSED"] and not taps_inner else 1,
            "WEIGHT_COLUMN_UNIT": 1 if constants["TRANSPOSED"] or taps_inner or constants["FLAT"] else most,
        }
        constants["x_w" if constants["X_ROWS_INNER"] else "x_c"] = 1
        constants["y_w" if constants["Y_ROWS_INNER"] else "y_c"] = 1
        if not taps_inner:
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
        ))

    table = {
        precision: [tiles for operation, kind, tiles in every(architecture)
                    if operation == "convolution" and kind == precision]
        for precision in ("ieee", "tf32", "half")
    }
    for precision, dtype in (("ieee", torch.float32), ("tf32", torch.float32), ("half", torch.bfloat16)):
        multiply = "tf32" if precision == "tf32" else "ieee"
        for tiles in table[precision]:
            add("plain", dtype, multiply, tiles)
            add("input gradient", dtype, multiply, tiles, "relu", BACKWARD=True, TRANSPOSED=True)
    tiles = table["half"][-1]
    for activation in ACTIVATIONS[1:]:
        add(activation, torch.bfloat16, "ieee", tiles, activation)
        add(f"input gradient {activation}", torch.bfloat16, "ieee", tiles, activation, BACKWARD=True)
    add("input gradient", torch.bfloat16, "ieee", tiles, BACKWARD=True)
    add("transposed", torch.bfloat16, "ieee", tiles, "relu", TRANSPOSED=True)
    add("relu", torch.float16, "ieee", tiles, "relu")
    add("one gate a sample", torch.bfloat16, "ieee", tiles, "relu", PER_SAMPLE=True)
    add("few", torch.bfloat16, "ieee", tiles, "relu", FLAT=True, X_ROWS_INNER=True, Y_ROWS_INNER=True)
    add("few transposed", torch.bfloat16, "ieee", tiles, FLAT=True, TRANSPOSED=True)
    add("contiguous", torch.bfloat16, "ieee", tiles, X_ROWS_INNER=True, Y_ROWS_INNER=True)
    add("wide", torch.bfloat16, "ieee", tiles, "relu", WIDE=True)
    # above, channels are a multiple of 8; the dearest epilogue, with the large tiles of four and of eight warps
    for tiles in table["half"][-2:]:
        add("gelu", torch.bfloat16, "ieee", tiles, "gelu")
        for unit, channels in ((4, "36 channels"), (1, "odd channels")):
            add(f"{channels} gelu", torch.bfloat16, "ieee", tiles, "gelu", unit)
            add(f"{channels} input gradient", torch.bfloat16, "ieee", tiles, "gelu", unit, BACKWARD=True,
                TRANSPOSED=True)
        add("contiguous gelu", torch.bfloat16, "ieee", tiles, "gelu", X_ROWS_INNER=True, Y_ROWS_INNER=True)
        add("contiguous input gradient", torch.bfloat16, "ieee", tiles, "gelu", X_ROWS_INNER=True, Y_ROWS_INNER=True,
            BACKWARD=True, TRANSPOSED=True)
    add("wide few", torch.bfloat16, "ieee", tiles, "relu", WIDE=True, FLAT=True, BACKWARD=True, TRANSPOSED=True)
    return found


def weight_gradient_variants(architecture: str) -> list[Variant]:
    """Every tile of the table with channels innermost; then other layouts, few channels, wide offsets, activations."""
    found: list[Variant] = []

    def add(
        label: str, dtype: torch.dtype, precision: str, tiles: Tiles, activation: str = "none",
        unit: int | None = None, **other: Any,
    ) -> None:
        name = TRITON_NAMES[dtype]
        flat, inner = other.get("FLAT", False), other.get("B_ROWS_INNER", False)
        most = 16 // dtype.itemsize if unit is None else unit
        narrow = (1 if inner else most) * dtype.itemsize < SHORTEST_COPY
        block_m, block_n, block_k = weight_gradient.blocks(tiles, 2**10, 2**10, flat, inner, activation, narrow)
        constants: dict[str, Any] = {
            "ACTIVATION": activation_code(activation), "SLOPE_OF_A": True, "FLAT": False,
            "B_ROWS_INNER": False, "TAPS_INNER": inner, "WIDE": False, "PRECISION": precision,
            "DOT": compiled_dot(dtype), "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, **other,
        }
        slope_of_a = constants["SLOPE_OF_A"]
        constants |= {
            "A_CHANNEL_UNIT": most, "B_CHANNEL_UNIT": 1 if flat else most, "A_UNIT": 1 if inner else most,
            "B_UNIT": 1 if inner or flat else most,
            "SAVED_UNIT": 1 if activation == "none" or inner or (flat and not slope_of_a) else most,
        }
        if not slope_of_a:
            constants["partial_sums"] = None
        innermost = {"a_w": 1, "b_w": 1} if constants["B_ROWS_INNER"] else {"a_c": 1, "b_c": 1}
        constants |= innermost if activation == "none" else {**innermost, "saved_w" if inner else "saved_c": 1}
        pointers = {"a": f"*{name}", "b": f"*{name}", "saved": f"*{name}", "partial": "*fp32", "partial_sums": "*fp32"}
        if activation == "none":
            constants["saved"] = None
        types = {**pointers, **{size: "i32" for size in weight_gradient.GEOMETRY + weight_gradient.SPECIALISED}}
        found.append(Variant(
            f"convolve_weight {label} {name} {precision} {block_m}x{block_n}x{block_k}",
            weight_gradient.convolve_weight,
            {key: value for key, value in types.items() if key not in constants}, constants, tiles.warps, tiles.stages,
            limit=register_limit(architecture, tiles.warps),
        ))

    table = {
        precision: [tiles for operation, kind, tiles in every(architecture)
                    if operation == "convolution_weight_gradient" and kind == precision]
        for precision in ("ieee", "tf32", "half")
    }
    for precision, dtype in (("ieee", torch.float32), ("tf32", torch.float32), ("half", torch.bfloat16)):
        for tiles in table[precision]:
            add("plain", dtype, "tf32" if precision == "tf32" else "ieee", tiles)
    tiles = table["half"][-1]
    for activation in ACTIVATIONS[1:]:
        add(activation, torch.bfloat16, "ieee", tiles, activation, SLOPE_OF_A=activation not in NEEDS_ARGUMENT)
    for other in table["half"][-2:]:
        add("gelu", torch.bfloat16, "ieee", other, "gelu")
        add("36 channels", torch.bfloat16, "ieee", other, "gelu", 4)
        add("odd channels", torch.bfloat16, "ieee", other, "gelu", 1)
        add("contiguous gelu", torch.bfloat16, "ieee", other, "gelu", B_ROWS_INNER=True)
    add("relu", torch.float16, "ieee", tiles, "relu")
    add("relu", torch.float32, "ieee", table["ieee"][-1], "relu")
    add("few", torch.bfloat16, "ieee", tiles, FLAT=True, B_ROWS_INNER=True)
    add("contiguous", torch.bfloat16, "ieee", tiles, B_ROWS_INNER=True)
    add("wide", torch.bfloat16, "ieee", tiles, WIDE=True)
    return found
