"""Compiles every Triton kernel without a GPU and lists what it needs: `python -m bench.ahead_of_time`.

Every variant that the kernels' modules name, for an A100, an H100 or H200, a B200 and an MI300: registers and spills to
memory a thread, shared memory a program, from the compiler's own reports. The exit code is 1 where a variant does not
compile, spills, or wants more shared memory than there is; the last lines name it. A result file says which sources it
is of: the tests compile a part of the variants again, and refuse a file of other sources.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mrvae_kernels import triton_kernels
from mrvae_kernels.triton_kernels.device import INTERPRETED
from mrvae_kernels.triton_kernels.launch import Variant

MODULES = tuple(module.name for module in pkgutil.iter_modules(triton_kernels.__path__))
"""All modules of mrvae_kernels.triton_kernels; those with kernels have a function `variants`."""

SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Shared memory a program, by target; sm_80's is that of sm_86 and sm_89, which take the same block sizes."""


def digests() -> dict[str, str]:
    """SHA-256 of the text of each file of mrvae_kernels.triton_kernels: kernels, their variants, their block sizes."""
    files = sorted(file for folder in triton_kernels.__path__ for file in Path(folder).glob("*.py"))
    texts = {file.name: file.read_text(encoding="utf-8") for file in files}  # whose lines end alike everywhere
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


class Job(NamedTuple):
    """The index-th variant that a module names, for a target: kernels cannot be sent to another process, this can."""

    target: str
    module: str
    index: int

    def about(self) -> dict[str, Any]:
        """The result's first columns."""
        variant = variants_of(self.module, self.target)[self.index]
        return {
            "target": self.target, "module": module_of(variant).rpartition(".")[2], "variant": variant.label,
            "warps": variant.warps, "stages": variant.stages,
        }


def gpu_target(name: str) -> GPUTarget:
    """Triton's target for "sm_90" or "gfx942"."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[len("sm_") :]), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def variants_of(module: str, target: str) -> list[Variant]:
    """The module's variants with the block sizes of the target's architecture; none where it has no kernel."""
    variants = getattr(importlib.import_module(f"{triton_kernels.__name__}.{module}"), "variants", list)
    return variants(target) if "architecture" in inspect.signature(variants).parameters else variants()


def module_of(variant: Variant) -> str:
    """The kernel's module; an interpreted kernel's own is the interpreter's."""
    return variant.kernel.fn.__module__


def source(variant: Variant) -> ASTSource:
    """What triton.compile takes. ValueError where a variant's names are not the kernel's."""
    names = list(variant.kernel.arg_names)
    if sorted(names) != sorted([*variant.types, *variant.constants]):
        wrong = set(names) ^ {*variant.types, *variant.constants} or {*variant.types} & {*variant.constants}
        raise ValueError(f"{variant.label}: arguments that the kernel or the variant lacks: {', '.join(sorted(wrong))}")
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    anywhere = {parameter.name for parameter in variant.kernel.params if parameter.do_not_specialize_on_alignment}
    aligned = [
        i for i, name in enumerate(names)
        if (signature[name].startswith("*") and name not in anywhere) or name in variant.divisible
    ]
    return ASTSource(variant.kernel, signature, variant.constants, {(i,): [["tt.divisibility", 16]] for i in aligned})


def spilled(target: GPUTarget, assembly: str) -> int:
    """Bytes that a thread stores to and loads from memory for lack of registers, as ptxas -v reports them."""
    tool = knobs.nvidia.ptxas_blackwell if target.arch >= 100 else knobs.nvidia.ptxas
    name = f"sm_{target.arch}" + ("a" if target.arch >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(assembly)
        command = [tool.path, "-v", "--regAllocOptLevel=2", f"--gpu-name={name}", str(file), "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", log)))


def nvidia_resources(target: GPUTarget, compiled: Any) -> dict[str, int]:
    """Registers, spilled bytes a thread, and how many of these are forced.

    The machine code's header gives registers and the stack frame, not spills: a frame may also hold an array, and LOCAL
    is 0 even where registers spill. ptxas -v tells; it runs again where there is a frame. It also spills some bytes
    with registers left, where another program then fits on a processor; told that one program is enough, and of no
    limit, it spills only where it must: that is `forced`.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as code:
        code.write(compiled.asm["cubin"])
        code.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", code.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", dump))
    spill = forced = 0
    if int(found["STACK"]) > 0 and (spill := spilled(target, compiled.asm["ptx"])) > 0:
        unlimited = re.sub(r"\.maxnreg \d+", "", compiled.asm["ptx"])
        forced = spilled(target, re.sub(r"(\.reqntid \d+)", r"\1\n.minnctapersm 1", unlimited, count=1))
    return {"registers": int(found["REG"]), "spill": spill, "forced": forced}


def amd_resources(compiled: Any) -> dict[str, int]:
    """Vector registers, and how often one is spilled, to memory or to an accumulation register.

    Scalar registers are spilled to lanes of vector registers, which costs no memory access: not counted.
    """
    found = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", compiled.asm["amdgcn"])}
    return {"registers": found["vgpr_count"], "spill": found["vgpr_spill_count"], "forced": found["vgpr_spill_count"]}


def resources(target: GPUTarget, compiled: Any) -> dict[str, int]:
    """Registers, spill and forced spill of a thread."""
    return amd_resources(compiled) if target.backend == "hip" else nvidia_resources(target, compiled)


def compile_variant(job: Job) -> dict[str, Any]:
    """What one variant needs, or the error."""
    variant = variants_of(job.module, job.target)[job.index]
    result = job.about()
    started, target = time.perf_counter(), gpu_target(job.target)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints the whole assembly where ptxas fails
            compiled = triton.compile(
                source(variant), target=target,
                options={"num_warps": variant.warps, "num_stages": variant.stages, **variant.limit},
            )
        result |= {**resources(target, compiled), "shared": int(compiled.metadata.shared)}
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    return result | {"seconds": round(time.perf_counter() - started, 2)}


def jobs_of(modules: Sequence[str], targets: Sequence[str], contains: str = "") -> list[Job]:
    """One job for each different variant: modules share kernels."""
    jobs, seen = [], set()
    for target in targets:
        for module in modules:
            for index, variant in enumerate(variants_of(module, target)):
                kernel = (module_of(variant), variant.kernel.__name__)
                content = (sorted(variant.types.items()), sorted(variant.constants.items()), sorted(variant.divisible))
                key = (target, kernel, repr(content), variant.warps, variant.stages, repr(variant.limit))
                if key not in seen and contains in variant.label:
                    seen.add(key)
                    jobs.append(Job(target, module, index))
    return jobs


def compile_all(jobs: Sequence[Job], processes: int) -> Iterator[dict[str, Any]]:
    """Results in the order of jobs. A crash of the compiler, which ends its process, becomes that variant's error."""
    left = list(jobs)
    while left:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(compile_variant, job) for job in left]
            try:
                for future in futures:
                    result = future.result()
                    left.pop(0)
                    yield result
            except BrokenProcessPool:
                if processes == 1:  # then it was the first of those left
                    yield left.pop(0).about() | {"error": "the compiler crashed"}
                processes = 1


def problem(result: dict[str, Any]) -> str | None:
    """What is wrong with a variant, or None."""
    if "error" in result:
        return f"does not compile: {result['error']}"
    if result["spill"]:
        unit = "registers" if result["target"].startswith("gfx") else "bytes a thread"
        return f"spills {result['spill']} {unit}, {result['forced']} of them where registers are exhausted"
    limit = SHARED_BYTES.get(result["target"])
    if limit is not None and result["shared"] > limit:
        return f"needs {result['shared']} bytes of shared memory; {limit} are there"
    return None


def line(result: dict[str, Any]) -> str:
    numbers = (str(result.get(name, "-")) for name in ("registers", "spill", "forced", "shared", "warps", "stages"))
    registers, spill, forced, shared, warps, stages = numbers
    return (
        f"{result['target']:7} {registers:>9} {spill:>6} {forced:>6} {shared:>7} {warps:>5} {stages:>6} "
        f"{result.get('seconds', 0):>7}  "
        f"{result['module']}: {result['variant']}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.ahead_of_time", description=__doc__)
    parser.add_argument("--out", type=Path, help="write a JSON result file there")
    parser.add_argument("--only", nargs="+", choices=MODULES, default=list(MODULES), metavar="MODULE")
    parser.add_argument("--contains", default="", help="only variants whose label contains this")
    parser.add_argument(
        "--targets", nargs="+", default=list(SHARED_BYTES), help=f"default: {' '.join(SHARED_BYTES)}", metavar="TARGET"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th variant alone (default 1: all)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    for name in options.targets:
        if not re.fullmatch(r"sm_\d{2,3}|gfx\w+", name):
            parser.error(f"target is {name!r}; expected {', '.join(SHARED_BYTES)} or another sm_... or gfx...")
    for name in ("jobs", "every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; expected a positive number")
    started, sources = time.perf_counter(), digests()
    with contextlib.ExitStack() as stack:
        if "TRITON_CACHE_DIR" not in os.environ:  # its own, so that it measures the compiler and leaves nothing behind
            os.environ["TRITON_CACHE_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
            stack.callback(os.environ.pop, "TRITON_CACHE_DIR", None)
        jobs = jobs_of(options.only, options.targets, options.contains)[:: options.every]
        if not jobs:
            parser.error(f"no variant of {', '.join(options.only)} has {options.contains!r} in its label")
        print(f"{len(jobs)} variants; spill: bytes a thread stores and loads (gfx: registers); forced: those it must")
        print("target  registers  spill forced  shared warps stages seconds  variant", flush=True)
        results = []
        for result in compile_all(jobs, options.jobs):
            results.append(result)
            print(line(result), flush=True)
    seconds = time.perf_counter() - started
    problems = [(result, found) for result in results if (found := problem(result))]
    print(f"\n{len(results)} variants in {seconds:.0f} s, {len(problems)} with a problem")
    for result, found in problems:
        print(f"{result['target']} {result['module']}: {result['variant']}: {found}")
    if digests() != sources:
        print("the kernels' files were changed meanwhile, so that nothing can be said of them: run it again")
        return 2
    if options.out:
        from .records import machine

        for result in results:
            result.pop("seconds", None)
        versions = {**machine(), "triton": triton.__version__}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": versions, "sources": sources, "results": results}
        options.out.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written: {options.out}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
