"""The core built for tests: its CUDA kernels' own source runs on the CPU, through csrc/tests/shim.

In this build the operators of torch.ops.mrvae take CPU tensors for a GPU's. `python tests/cuda_core/shim.py` builds it
and prints where; MRVAE_CORE=<that file> makes mrvae_kernels load it, and any test then runs on the CUDA kernels.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "shim" / f"{sys.implementation.cache_tag}-torch{torch.__version__}"
FACTS = {
    "torch": torch.__version__, "compiler": "g++", "flags": "test shim", "commit": "unknown", "cuda": "shim",
    "architectures": "", "nvcc_flags": "",
}


def flags() -> list[str]:
    """As setup.py's, less optimisation: most of the time goes into compiling."""
    includes = [ROOT / "csrc" / "tests" / "shim", BUILD, sysconfig.get_path("include"), *cpp_extension.include_paths()]
    return [
        "-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fopenmp",
        "-Wno-unknown-pragmas", "-DMRVAE_CUDA", "-DMRVAE_SHIM", "-DTORCH_API_INCLUDE_EXTENSION_H",
        "-DTORCH_EXTENSION_NAME=_C", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in includes if Path(path).is_dir()),
    ]


def sources() -> list[Path]:
    csrc = ROOT / "csrc"
    found = [path for pattern in ("*.cpp", "cpu/*.cpp", "cuda/*.cu") for path in csrc.glob(pattern)]
    return sorted([*found, csrc / "tests" / "shim" / "cuda_shim.cpp"])


def ninja_file(library: Path) -> str:
    """Rules that compile every source, a .cu as C++, and link them into a Python module."""
    compiler, torch_folder = os.environ.get("CXX", "c++"), Path(cpp_extension.library_paths()[0])
    lines = [
        "ninja_required_version = 1.5",
        f"flags = {' '.join(flags())}",
        "rule compile",
        f"  command = {compiler} $flags -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared -fopenmp $in -o $out -L{torch_folder} -lc10 -ltorch_cpu -ltorch "
        f"-ltorch_python -Wl,-rpath,{torch_folder}",
    ]
    objects = []
    for source in sources():
        objects.append(BUILD / f"{source.relative_to(ROOT / 'csrc').as_posix().replace('/', '-')}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build {library}: link {' '.join(map(str, objects))}")
    return "\n".join(lines) + "\n"


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def build() -> Path:
    """Builds what changed and returns the module's file. RuntimeError with the compiler's words where it fails."""
    BUILD.mkdir(parents=True, exist_ok=True)
    library = BUILD / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    defines = (f'#define MRVAE_BUILD_{name.upper()} "{value}"\n' for name, value in FACTS.items())
    write_if_changed(BUILD / "build_facts.h", "".join(defines))
    write_if_changed(BUILD / "build.ninja", ninja_file(library))
    command = ["ninja", "-C", str(BUILD), "-j", str(min(2, os.cpu_count() or 1))]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two ninjas in one folder would spoil each other's log
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the core cannot be built against the shim:\n{done.stdout[-8000:]}{done.stderr[-2000:]}")
    return library


if __name__ == "__main__":
    print(build())
