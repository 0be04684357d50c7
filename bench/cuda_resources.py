"""What each CUDA kernel needs, from the objects of the last build: `python -m bench.cuda_resources`.

Registers, stack and static shared memory of every kernel and architecture as the machine code's headers have them
(cuobjdump), so that nothing is compiled twice. A kernel without a stack frame spills nothing; a source that has kernels
with one is compiled again for that architecture, for ptxas to say what it spills. The exit code is 1 where a kernel
spills, or where an architecture lacks a kernel that another has; the last lines name it. `make cuda` runs it, with
TORCH_CUDA_ARCH_LIST as the build had it. No GPU is needed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import build_support as support

SOURCES = support.ROOT / "csrc" / "cuda"
SHIM = "cuda_shim.h"
"""Included where MRVAE_SHIM is defined, which nvcc's builds do not do."""
HEADING = "target  registers spill stack shared  kernel"


def files_of(*sources: Path) -> list[Path]:
    """The sources, and every header of ours that one of them includes. ValueError for one that is not there."""
    found: dict[Path, None] = {}
    left = list(sources)
    while left:
        path = left.pop().resolve()
        if path in found:
            continue
        found[path] = None
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            if name == SHIM:
                continue
            folders = (path.parent, SOURCES.parent)
            there = [folder / name for folder in folders if (folder / name).exists()]
            if not there:
                raise ValueError(f'{path.name} includes "{name}", which is in neither {folders[0]} nor {folders[1]}')
            left.append(there[0])
    return sorted(found)


def compiled_from() -> dict[str, Any]:
    """What decides about the kernels: nvcc's flags, and the SHA-256 of the text of each file by its path in csrc/."""
    csrc, digests = SOURCES.parent.resolve(), {}
    for path in files_of(*SOURCES.glob("*.cu")):
        text = path.read_text(encoding="utf-8")  # whose lines end alike everywhere
        digests[path.relative_to(csrc).as_posix()] = hashlib.sha256(text.encode()).hexdigest()
    return {"nvcc_flags": list(support.NVCC_FLAGS), "sources": digests}


def find_cuobjdump(toolkit: support.Toolkit) -> str:
    """The toolkit's, or the one that Triton brings along. CannotBuild without either."""
    folders = [toolkit.home / "bin", *map(Path, os.environ.get("PATH", "").split(os.pathsep))]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))
    if found is None:
        raise support.CannotBuild(f"there is no cuobjdump; run: {sys.executable} -m pip install triton")
    return found


def unnumbered(name: str) -> str:
    """The mangled name without what nvcc puts into an unnamed namespace's: the number of its process, among others."""
    match = re.search(r"(\d+)_GLOBAL__N_", name)
    if match is None:
        return name
    return f"{name[: match.start()]}12_GLOBAL__N_1{name[match.end(1) + int(match[1]) :]}"


def parse_usage(text: str) -> list[dict[str, Any]]:
    """Target, mangled name, registers, stack and static shared memory, from cuobjdump --dump-resource-usage."""
    results, target = [], ""
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            target = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            results.append({"target": target, "name": unnumbered(match[1])})
        elif results and (found := dict(re.findall(r"(REG|STACK|SHARED):(\d+)", line))):
            keys = {"registers": "REG", "stack": "STACK", "shared": "SHARED"}
            results[-1] |= {key: int(found[name]) for key, name in keys.items()}
    return results


def parse_spills(text: str) -> dict[str, int]:
    """Bytes that a thread of each kernel stores to and loads from memory for lack of registers, from ptxas -v."""
    spills: dict[str, int] = {}
    name = ""
    for line in text.splitlines():
        if match := re.search(r"Function properties for (\S+)", line):
            name = unnumbered(match[1])
        elif found := re.findall(r"(\d+) bytes spill", line):
            spills[name] = sum(map(int, found))
    return spills


def compile_verbosely(toolkit: support.Toolkit, source: Path, target: str) -> dict[str, int]:
    """parse_spills of a source compiled for one target."""
    number = target.removeprefix("sm_")
    command = [
        toolkit.nvcc, *support.NVCC_FLAGS, f"-I{SOURCES.parent}", "-DMRVAE_CUDA", "-Xptxas=-v", "-cubin",
        f"-gencode=arch=compute_{number},code=sm_{number}", source, "-o", os.devnull,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for {target}:\n{done.stdout}{done.stderr}")
    return parse_spills(done.stdout + done.stderr)


def demangled(names: Sequence[str]) -> list[str]:
    """Names as in the source, without namespaces, parameters and void; as they are where there is no c++filt."""
    tool = shutil.which("c++filt")
    if tool is None:
        return list(names)
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [readable(name) for name in text.splitlines()]


def readable(name: str) -> str:
    """gates<float> of void mrvae::cuda::(anonymous namespace)::gates<float>(float const*, int)."""
    name = re.sub(r"\(anonymous namespace\)::|\bmrvae::(cuda::)?|^void ", "", name)
    depth = 0
    for index in range(len(name) - 1, -1, -1):  # from the end: what opens the last bracket opens the parameters
        depth += (name[index] == ")") - (name[index] == "(")
        if depth == 0:
            return name[:index] if name[index] == "(" else name
    return name


def collect(objects: Path, toolkit: support.Toolkit, jobs: int) -> list[dict[str, Any]]:
    """One result for each kernel and target. CannotBuild where a source has no object."""
    tool, results = find_cuobjdump(toolkit), []
    for source in sorted(SOURCES.glob("*.cu")):
        built = objects / "csrc" / "cuda" / f"{source.stem}.o"
        if not built.exists():
            raise support.CannotBuild(f"{source.name} has not been compiled into {objects}; run: make cuda")
        changed = [path.name for path in files_of(source) if path.stat().st_mtime > built.stat().st_mtime]
        if changed:
            raise support.CannotBuild(f"{built} is older than {', '.join(changed)}; run: make cuda")
        dump = subprocess.run([tool, "--dump-resource-usage", str(built)], capture_output=True, text=True, check=True)
        results += [{"source": source.name, **found} for found in parse_usage(dump.stdout)]
    framed = sorted({(found["source"], found["target"]) for found in results if found["stack"]})
    with ThreadPoolExecutor(jobs) as pool:
        said = pool.map(lambda key: compile_verbosely(toolkit, SOURCES / key[0], key[1]), framed)
        spills = dict(zip(framed, said, strict=True))
    for found, name in zip(results, demangled([found["name"] for found in results]), strict=True):
        spilled = spills.get((found["source"], found["target"]), {})
        # a kernel that ptxas did not speak of is one that this listing cannot vouch for
        found["spill"] = spilled.get(found.pop("name"), None if found["stack"] else 0)
        found["kernel"] = name
    return results


def problems(results: Sequence[dict[str, Any]], targets: Sequence[str]) -> list[str]:
    """What is wrong, a line for each kernel and target."""
    wrong = []
    for found in results:
        about = f"{found['target']} {found['source']}: {found['kernel']}"
        if found["spill"] is None:
            wrong.append(f"{about}: ptxas does not say what it spills")
        elif found["spill"]:
            wrong.append(f"{about}: spills {found['spill']} bytes a thread")
    kernels = {(found["source"], found["kernel"]) for found in results}
    for target in targets:
        there = {(found["source"], found["kernel"]) for found in results if found["target"] == target}
        wrong += [f"{target} {source}: {kernel}: was not compiled" for source, kernel in sorted(kernels - there)]
    return wrong if results else ["there is no kernel in the objects"]


def line(found: dict[str, Any]) -> str:
    spill = "?" if found["spill"] is None else found["spill"]
    return (
        f"{found['target']:7} {found['registers']:>9} {spill:>5} {found['stack']:>5} {found['shared']:>6}  "
        f"{found['source']}: {found['kernel']}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_resources", description=__doc__)
    parser.add_argument("--out", type=Path, help="write a JSON result file there, where nothing is wrong")
    parser.add_argument("--objects", type=Path, help="folder of the build; default: this interpreter's and torch's")
    options = parser.parse_args(arguments)
    import torch

    started = time.perf_counter()
    try:
        toolkit = support.check(torch.__version__, torch.version.cuda, support.toolkit())
        wanted = support.architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), support.known(toolkit.nvcc))
        jobs = support.max_jobs(os.environ.get("MAX_JOBS"), support.cores(), support.free_memory())
        objects = options.objects or support.object_folder(torch.__version__, cuda=True)
        results = collect(objects, toolkit, jobs)
    except support.CannotBuild as error:
        print(error, file=sys.stderr)
        return 1
    print("spill, stack: bytes a thread; shared: static bytes a block, from sm_90 on with the system's own 1024")
    print("\n".join([HEADING, *map(line, results)]))
    wrong = problems(results, [name.partition("+")[0] for name in support.names(wanted).split()])
    seconds = time.perf_counter() - started
    print(f"\n{len(results)} kernels over {support.names(wanted)} in {seconds:.0f} s, {len(wrong)} problems")
    for problem in wrong:
        print(problem)
    if options.out and not wrong:
        commit = support.output_of("git", "describe", "--always", "--dirty") or "unknown"
        machine = {"commit": commit, "date": datetime.date.today().isoformat(), "cuda": toolkit.version}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": machine, **compiled_from(), "results": results}
        options.out.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written: {options.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
