"""What setup.py decides before it compiles: with CUDA or without and why, for which GPUs, in how many processes.

    python build_support.py     says which nvcc, GPUs and processes `make cuda` uses, or in one sentence why it cannot

It imports neither torch nor setuptools, needs no GPU and downloads nothing.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.resolve()
INSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."
WANTED = ("8.0", "9.0", "10.0")
"""Compute capabilities to compile for; the newest also as PTX, which later GPUs compile when the kernels are loaded."""
OLDEST = (8, 0)
NVCC_FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xfatbin=-compress-all")
NO_COMPILER = "there is no C++ compiler: install g++ or clang++, or name one in CXX"
HEADERS = {"cusparse": "cusparse", "cublas": "cublas", "cusolver": "cusolver", "cuda-runtime": "cuda_runtime"}
"""NVIDIA's packages, and how the names of their headers begin."""
JOB_BYTES = 2 << 30
"""Memory set aside for one compiler process."""


class CannotBuild(RuntimeError):
    """One sentence that says what is missing, and the command to run."""


class Toolkit(NamedTuple):
    """nvcc, the folder that has bin and include, and its version, such as "13.0"."""

    nvcc: Path
    home: Path
    version: str


def output_of(*command: str | Path) -> str:
    """What the command prints; "" where it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def flags() -> list[str]:
    if sys.platform == "win32":
        return ["/O2"]
    # Apple's clang has no OpenMP runtime: vector pragmas only, at::parallel_for then runs serially
    openmp = "-fopenmp-simd" if sys.platform == "darwin" else "-fopenmp"
    # whole registers in the AVX-512 versions of the kernels; nothing else uses vectors that wide
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    return ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", openmp, *wide]


def compiler() -> str:
    """First line of the C++ compiler's --version, or "" without one."""
    program = os.environ.get("CXX", "cl" if sys.platform == "win32" else "c++")
    return (output_of(program, "--version") or output_of("g++", "--version")).partition("\n")[0]


def setting(name: str, environment: Mapping[str, str] = os.environ) -> str:
    """MRVAE_CUDA or MRVAE_CPU: "1" build it or fail, "0" do not try, "auto" try. CannotBuild for anything else."""
    value = environment.get(name) or "auto"
    if value not in ("auto", "1", "0"):
        raise CannotBuild(f"{name} is {value!r}, expected auto, 1 or 0; run: {name}=auto {INSTALL}")
    return value


def object_folder(torch_version: str, cuda: bool) -> Path:
    """Where this interpreter's objects for this torch lie: build/objects/cpython-311-torch2.13.0-cuda."""
    tag = f"{sys.implementation.cache_tag}-torch{torch_version}" + ("-cuda" if cuda else "")
    return ROOT / "build" / "objects" / tag


# ---- the CUDA toolkit ------------------------------------------------------------------------------------------------


def toolkit(environment: Mapping[str, str] = os.environ, usual: Path = Path("/usr/local/cuda")) -> Toolkit | None:
    """The toolkit in CUDA_HOME or CUDA_PATH; otherwise nvcc's of PATH, or the one in the usual place."""
    named = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if named:
        nvcc = shutil.which("nvcc", path=str(Path(named, "bin")))
    else:
        nvcc = shutil.which("nvcc", path=environment.get("PATH", "")) or shutil.which("nvcc", path=str(usual / "bin"))
    version = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version")) if nvcc else None
    if nvcc is None or version is None:
        return None
    return Toolkit(Path(nvcc), Path(named) if named else _home(Path(nvcc)), version[1])


def _home(nvcc: Path) -> Path:
    """Where nvcc says that its files are: the nvcc of PATH may be a script or a link from elsewhere."""
    try:
        plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, timeout=60)
        top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    except (OSError, subprocess.SubprocessError):
        top = None
    return Path(top[1].strip()).resolve() if top else nvcc.resolve().parent.parent


def check(
    torch_version: str, torch_cuda: str | None, found: Toolkit | None, retry: str = f"MRVAE_CUDA=1 {INSTALL}"
) -> Toolkit:
    """The toolkit, which fits this torch. CannotBuild says why there is no CUDA core otherwise, and to retry."""
    if not torch_cuda:
        plain = torch_version.partition("+")[0]
        raise CannotBuild(
            f"torch {torch_version} is a build without CUDA; run: pip install 'torch==={plain}' && {retry}"
        )
    if found is None:
        named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        where = f"{named} has no bin/nvcc that runs" if named else "there is no nvcc"
        raise CannotBuild(
            f"{where}: install the CUDA {torch_cuda} toolkit; then run: CUDA_HOME=/usr/local/cuda-{torch_cuda} {retry}"
        )
    major = torch_cuda.partition(".")[0]
    if found.version.partition(".")[0] != major:
        raise CannotBuild(
            f"{found.nvcc} is of CUDA {found.version} and torch {torch_version} of CUDA {torch_cuda}, whose major "
            f"versions have to agree: install the CUDA {torch_cuda} toolkit; "
            f"then run: CUDA_HOME=/usr/local/cuda-{torch_cuda} {retry}"
        )
    return found


def torch_headers(torch_folder: Path, torch_cuda: str) -> list[Path]:
    """Folders of the CUDA headers that a torch from PyPI brings along: site-packages/nvidia/cu13/include and others."""
    packages = torch_folder.parent / "nvidia"
    first = packages / f"cu{torch_cuda.partition('.')[0]}" / "include"
    return [path for path in dict.fromkeys([first, *sorted(packages.glob("*/include"))]) if path.is_dir()]


def runtime_library(home: Path, torch_folder: Path, torch_cuda: str) -> list[str]:
    """The linker's arguments for CUDA's runtime: the toolkit's, or torch's own, whose file has only a numbered name."""
    for folder in (home / "lib64", home / "lib"):
        if (folder / "libcudart.so").exists():
            return [f"-L{folder}", "-lcudart"]
    major = torch_cuda.partition(".")[0]
    for folder in sorted((torch_folder.parent / "nvidia").glob("*/lib")):
        if (folder / f"libcudart.so.{major}").exists():
            return [f"-L{folder}", f"-l:libcudart.so.{major}"]
    return ["-lcudart"]


def check_headers(command: Sequence[str], torch_cuda: str) -> None:
    """Preprocess a source; CannotBuild names a header that is not there, such as cusparse.h, and its package."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    missing = re.search(r"fatal error: '?([\w./]+)'?(?: file not found|: No such file)", done.stderr)
    if done.returncode == 0 or not missing:
        return
    library = next((name for name in HEADERS if Path(missing[1]).stem.startswith(HEADERS[name])), "cuda-runtime")
    major = torch_cuda.partition(".")[0]
    package = f"nvidia-{library}" + ("" if int(major) >= 13 else f"-cu{major}")
    raise CannotBuild(
        f"{missing[1]} of CUDA {torch_cuda} is missing, which torch's headers include; "
        f"run: pip install {package} && MRVAE_CUDA=1 {INSTALL}"
    )


# ---- for which GPUs --------------------------------------------------------------------------------------------------


def known(nvcc: Path) -> list[str]:
    """The capabilities that nvcc compiles for, such as "8.0"; empty where it does not say."""
    listed = output_of(nvcc, "--list-gpu-arch")
    return [f"{major}.{minor}" for major, minor in re.findall(r"compute_(\d+)(\d)\b", listed)]


def architectures(listed: str | None, supported: Sequence[str]) -> list[str]:
    """What to compile for, such as ["8.0", "9.0", "10.0+PTX"]: TORCH_CUDA_ARCH_LIST, or what nvcc can do of WANTED.

    Capabilities older than 8.0 are left out: images of torch list them, and the kernels need 8.0's instructions.
    """
    if not listed:
        wanted = [arch for arch in WANTED if arch in supported or not supported]
        return [*wanted[:-1], f"{wanted[-1]}+PTX"] if wanted else [f"{max(supported, key=_version)}+PTX"]
    chosen = []
    for arch in listed.replace(",", ";").replace(" ", ";").split(";"):
        match = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", arch)
        if arch and not match:
            raise CannotBuild(_bad_list(listed, f"{arch!r} is none of its kind", supported))
        if match and _version(match[1]) >= OLDEST:
            if supported and match[1] not in supported:
                raise CannotBuild(_bad_list(listed, f"this nvcc does not know {match[1]}", supported))
            chosen.append(arch)
    if not chosen:
        raise CannotBuild(_bad_list(listed, "the kernels need 8.0 or newer", supported))
    return list(dict.fromkeys(chosen))


def _version(arch: str) -> tuple[int, ...]:
    return tuple(int(part) for part in arch.split("."))


def _bad_list(listed: str, problem: str, supported: Sequence[str]) -> str:
    usable = [arch for arch in supported or WANTED if _version(arch) >= OLDEST]
    return (
        f"TORCH_CUDA_ARCH_LIST is {listed!r}, and {problem}; expected capabilities of {' '.join(usable)}, "
        f"run: TORCH_CUDA_ARCH_LIST='{';'.join(usable[:1])}+PTX' MRVAE_CUDA=1 {INSTALL}"
    )


def generate_code(chosen: Sequence[str]) -> list[str]:
    """nvcc's arguments for these capabilities."""
    flags = []
    for arch in chosen:
        number = arch.partition("+")[0].replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def names(chosen: Sequence[str]) -> str:
    """ "sm_80 sm_90 sm_100+PTX" """
    return " ".join("sm_" + arch.replace(".", "") for arch in chosen)


# ---- in how many processes -------------------------------------------------------------------------------------------


def free_memory() -> int | None:
    """Bytes that this process may still take, by the machine and by its control group; None where nothing tells."""
    limits = []
    try:
        kilobytes = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        limits += [int(kilobytes[1]) << 10] if kilobytes else []
    except OSError:
        pass
    group = Path("/sys/fs/cgroup")
    version_1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    for limit, used in (("memory.max", "memory.current"), version_1):
        try:
            limits.append(max(0, int((group / limit).read_text()) - int((group / used).read_text())))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits, default=None)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def max_jobs(given: str | None, count: int, memory: int | None) -> int:
    """MAX_JOBS where it is given; otherwise one process a core, as far as the free memory goes."""
    if given:
        if not given.isdecimal() or int(given) < 1:
            raise CannotBuild(f"MAX_JOBS is {given!r}, expected a positive number; run: MAX_JOBS={count} {INSTALL}")
        return int(given)
    return max(1, count if memory is None else min(count, memory // JOB_BYTES))


def main() -> int:
    try:
        found = check("2.13.0", "13.0", toolkit(), retry="make cuda")
        chosen = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), known(found.nvcc))
        jobs = max_jobs(os.environ.get("MAX_JOBS"), cores(), free_memory())
    except CannotBuild as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{found.nvcc} of CUDA {found.version} in {found.home}, for {names(chosen)}, {jobs} processes at once")
    return 0


if __name__ == "__main__":
    sys.exit(main())
