"""Installs the package into environments that lack more or less, and checks that each works and tells the truth.

    python tests/environments.py [--python PATH] [--cuda-python PATH] [--only NAME ...]

    none        no compiler at all                       plain PyTorch runs
    g++         no nvcc                                  the core for the CPU
    cpu-torch   g++ and nvcc, a torch without CUDA       the core for the CPU
    cuda-torch  g++ and nvcc, a CUDA torch               the core with its CUDA kernels
    no-nvcc     g++ and no nvcc, a CUDA torch            the core for the CPU
    sdist       as g++, from a source distribution       the core for the CPU
    wheel       that of g++, where there is no compiler  the core for the CPU

In each, doctor has to say what is there and what is not, a gated layer has to compute the formula, and MRVAE_CUDA=1 has
to fail in one sentence where it cannot work. Environments and a copy of the sources lie in a temporary folder. Tools
and torch are borrowed, by links, from --python (default: this one) and --cuda-python; where one of these is missing or
has the wrong kind of torch, pip makes it, and this alone downloads. No GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPILERS = re.compile(r"(.*-)?(cc|gcc|g\+\+|c\+\+|c89|c99|clang|clang\+\+|icpx?|icx)(-[\d.]+)?")
NOT_BORROWED = re.compile(r"(mrvae|__editable__|__pycache__).*")
LEFT_OUT = shutil.ignore_patterns(
    ".*", "build", "dist", "runs", "results", "__pycache__", "*.so", "*.egg-info", "_build.json", "lightning_logs"
)
LAYER = """
import math, torch, mrvae_kernels as mk
x = torch.randn(7, 50, dtype=torch.float64, requires_grad=True)
low, high = math.log(0.01), math.log(10)
eta = (math.log(0.3) - (low + high) / 2) / ((high - low) / math.sqrt(12))
for strategy in ("fold", "epilogue"):
    layer = mk.GatedLinear(50, 30, gate="sigmoid", beta_range=(0.01, 10)).double()
    with mk.override(strategy=strategy):
        y = layer(x, 0.3)
    g = 1 / (1 + torch.exp(-(layer.gate_weight * eta + layer.gate_bias)))
    want = g * (x @ layer.weight.T + layer.bias)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    operands = [x, *layer.parameters()]
    weights = torch.randn_like(y)
    for found, wanted in zip(torch.autograd.grad((y * weights).sum(), operands),
                             torch.autograd.grad((want * weights).sum(), operands), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
"""
KEYS = """
import torch, mrvae_kernels
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*(has(name, "CUDA") for name in ("mrvae::gates", "mrvae::fold", "mrvae::epilogue")))
"""
TORCH = "torch===2.13.0"
CPU_TORCH = ["torch===2.13.0+cpu", "--index-url", "https://download.pytorch.org/whl/cpu"]
TOOLS = ["setuptools>=77", "wheel", "ninja", "pybind11", "numpy"]


class Failed(Exception):
    """What an environment got wrong."""


def run(command: list[str | Path], environment: Mapping[str, str], folder: Path, fails: bool = False) -> str:
    """The command's output; Failed where it fails, or succeeds where it should not."""
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=dict(environment), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if (done.returncode != 0) != fails:
        raise Failed(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


def programs(folder: Path, left_out: Callable[[str], bool]) -> str:
    """A PATH of links to the programs of this one, but for those left out."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            if not left_out(program.name) and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    return str(folder)


def venv(folder: Path, donor: Path | str) -> Path:
    """An environment with all that the donor's interpreter can import, but for this package's files."""
    run([donor, "-m", "venv", "--without-pip", folder], os.environ, folder.parent)
    paths = "import sysconfig; print(sysconfig.get_path('purelib')); print(sysconfig.get_path('platlib'))"
    own = Path(run([folder / "bin" / "python", "-c", paths], os.environ, folder).splitlines()[0])
    for place in dict.fromkeys(run([donor, "-c", paths], os.environ, folder).splitlines()):
        for entry in Path(place).iterdir():
            if not NOT_BORROWED.fullmatch(entry.name) and not (own / entry.name).exists():
                (own / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def has_cuda(python: Path | str) -> bool | None:
    """Whether this interpreter's torch has CUDA; None without torch or the tools to build with."""
    code = "import setuptools, torch, wheel, ninja, pybind11, numpy, pip; print(bool(torch.version.cuda))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() == "True" if done.returncode == 0 else None


def interpreter(given: Path | None, cuda: bool, folder: Path) -> Path:
    """The given one where its torch is of the wanted kind, or a new one from pip."""
    if given is not None and has_cuda(given) is cuda:
        return given.absolute()
    torch = [TORCH] if cuda else CPU_TORCH
    made = folder / ("donor-cuda" if cuda else "donor")
    print(f"installing {torch[0]}: no interpreter was given that has it and {', '.join(TOOLS)}", flush=True)
    run([sys.executable, "-m", "venv", made], os.environ, folder)
    run([made / "bin" / "python", "-m", "pip", "install", *torch], os.environ, folder)
    run([made / "bin" / "python", "-m", "pip", "install", *TOOLS], os.environ, folder)
    return made / "bin" / "python"


def expect(pattern: str, text: str) -> None:
    if not re.search(pattern, text, re.MULTILINE):
        raise Failed(f"expected {pattern!r} in:\n{text}")


class Trial:
    """One temporary folder: a copy of the sources, PATHs without compilers, and the environments."""

    def __init__(self, folder: Path, python: Path | None, cuda_python: Path | None) -> None:
        self.folder, self.given = folder, {False: python, True: cuda_python}
        self.source = Path(shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT))
        self.no_compiler = programs(folder / "none", lambda name: bool(COMPILERS.fullmatch(name)) or name == "nvcc")
        self.no_nvcc = programs(folder / "gxx", lambda name: name == "nvcc")

    def environment(self, path: str | None) -> dict[str, str]:
        """Variables with this PATH; without one, all programs that there are, nvcc among them."""
        ours = ("MRVAE_CPU", "MRVAE_CUDA", "MRVAE_CORE", "MRVAE_STRATEGY", "MRVAE_BACKEND", "PYTHONPATH", "CC", "CXX",
                "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")
        values = {key: value for key, value in os.environ.items() if key not in ours}
        # an nvcc in the usual place is found without PATH; a folder that is named and has none is not looked past
        return values if path is None else {**values, "PATH": path, "CUDA_HOME": str(self.folder / "no-cuda")}

    def check(
        self, name: str, path: str | None, doctor: tuple[str, str], refusal: str = "", source: Path | None = None,
        cuda: bool = False, keys: str = "False False False",
    ) -> None:  # fmt: skip
        """Install the source there, and check what the doctor says, the layer's numbers, and MRVAE_CUDA=1's refusal."""
        donor = self.given[cuda] = interpreter(self.given[cuda], cuda, self.folder)
        environment, place = self.environment(path), self.folder / name
        python = venv(place, donor)
        # --no-index: nothing is downloaded
        install: list[str | Path] = [python, "-m", "pip", "install", "--no-index", "--no-build-isolation"]
        run([*install, source or self.source], environment, place)
        for pattern in doctor:
            expect(pattern, run([python, "-m", "mrvae_kernels.doctor"], environment, place))
        run([python, "-c", LAYER], environment, place)
        if "built" in doctor[0]:
            expect(keys, run([python, "-c", KEYS], environment, place))
        if refusal:
            said = run([*install, self.source], {**environment, "MRVAE_CUDA": "1"}, place, fails=True)
            sentences = [line.strip() for line in said.splitlines() if "MRVAE_CUDA is 1, and" in line]
            if len(sentences) != 1 or "Traceback" in said:
                raise Failed(f"expected one sentence that names MRVAE_CUDA:\n{said}")
            expect(refusal, sentences[0])

    def archive(self, hook: str) -> Path:
        """What this hook of the build backend makes: the only file in a new folder."""
        python = venv(self.folder / f"{hook}-builder", interpreter(self.given[False], False, self.folder))
        out = self.folder / hook
        out.mkdir()
        code = f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"
        run([python, "-c", code], self.environment(self.no_nvcc), self.source)
        (made,) = out.iterdir()
        return made

    def cases(self) -> dict[str, Callable[[], None]]:
        built, none = r"^C\+\+ core +built \(torch 2", r"^CUDA core +missing: "
        no_nvcc, no_cuda = r"no-cuda has no bin/nvcc", r"torch \S+ is a build without CUDA; run: pip install 'torch==="
        no_gxx = r"there is no C\+\+ compiler: install g\+\+"
        cuda_built = r"^CUDA core +built \(CUDA \d+\.\d, sm_80 sm_90 sm_100\+PTX, nvcc flags -O3"
        missing = (rf"^C\+\+ core +missing: .*{no_gxx}", rf"{none}they are part of the C\+\+ core")
        without = (built, none + no_cuda)
        return {
            "none": lambda: self.check("env-none", self.no_compiler, missing, no_gxx),
            "g++": lambda: self.check("env-gxx", self.no_nvcc, without, no_cuda),
            "cpu-torch": lambda: self.check("env-cpu", None, without, no_cuda),
            "cuda-torch": lambda: self.check("env-cuda", None, (built, cuda_built), cuda=True, keys="True True True"),
            "no-nvcc": lambda: self.check(
                "env-no-nvcc", self.no_nvcc, (built, none + ".*" + no_nvcc), no_nvcc, cuda=True
            ),
            "sdist": lambda: self.check("env-sdist", self.no_nvcc, without, source=self.archive("build_sdist")),
            "wheel": lambda: self.check("env-wheel", self.no_compiler, without, source=self.archive("build_wheel")),
        }


def main() -> int:
    names = ["none", "g++", "cpu-torch", "cuda-torch", "no-nvcc", "sdist", "wheel"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="an interpreter with a CPU torch")
    parser.add_argument("--cuda-python", type=Path, help="an interpreter with a CUDA torch; default: --python, or made")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=" ".join(names))
    options = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder).resolve(), options.python, options.cuda_python or options.python)
        for name, case in trial.cases().items():
            if name in options.only:
                started, problem = time.perf_counter(), ""
                try:
                    case()
                except Failed as error:
                    problem = f": {error}"
                    failures += 1
                seconds = time.perf_counter() - started
                print(f"{name:18} {'FAILED' if problem else 'works'} after {seconds:.0f} s{problem}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
