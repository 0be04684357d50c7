"""Builds mrvae_kernels._C, the C++ core, with torch's own tools and ninja; build_support.py decides what goes into it.

Each part is optional: where it cannot be compiled the package installs without it, one sentence says so, and
_build.json keeps the reason for `python -m mrvae_kernels.doctor`.

    MRVAE_CPU, MRVAE_CUDA   the core, and its CUDA kernels: 1 a failure is fatal, 0 do not try, auto (default) try
    CUDA_HOME               the CUDA toolkit; default: that of the nvcc in PATH, or /usr/local/cuda
    TORCH_CUDA_ARCH_LIST    compute capabilities to compile for; default: 8.0;9.0;10.0+PTX as nvcc allows
    MAX_JOBS                compiler processes at once; default: from cores and free memory
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))  # pip does not put it there

import build_support as support  # noqa: E402

RECORD = "_build.json"  # beside the package's modules: what was built, or why nothing was


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def build_facts(cuda: Cuda | None = None) -> dict[str, str]:
    import torch

    return {
        "torch": torch.__version__,
        "compiler": support.compiler(),
        "flags": " ".join(support.flags()),
        "commit": support.output_of("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        "cuda": cuda.toolkit.version if cuda else "",
        "architectures": support.names(cuda.architectures) if cuda else "",
        "nvcc_flags": " ".join(support.NVCC_FLAGS) if cuda else "",
    }


class Cuda:
    """How the CUDA kernels are compiled here. CannotBuild where they cannot be."""

    def __init__(self) -> None:
        import torch
        from torch.utils import cpp_extension

        if not support.compiler():
            raise support.CannotBuild(f"{support.NO_COMPILER}; then run: MRVAE_CUDA=1 {support.INSTALL}")
        self.version = torch.version.cuda or ""
        self.toolkit = support.check(torch.__version__, self.version, support.toolkit())
        self.architectures = support.architectures(
            os.environ.get("TORCH_CUDA_ARCH_LIST"), support.known(self.toolkit.nvcc)
        )
        # torch takes the folder above nvcc's for the toolkit, which it is not where nvcc is a script or a link
        cpp_extension.CUDA_HOME = str(self.toolkit.home)
        home, torch_folder = self.toolkit.home, Path(torch.__file__).parent
        self.include = [] if home == Path("/usr") else [str(home / "include")]
        # after the toolkit's own headers, for those that it lacks
        self.system = [a for path in support.torch_headers(torch_folder, self.version) for a in ("-isystem", str(path))]
        self.link = [*support.runtime_library(home, torch_folder, self.version), "-lc10_cuda", "-ltorch_cuda"]
        folders = [f"-I{path}" for path in [*self.include, *cpp_extension.include_paths(), ROOT / "csrc"]]
        command = [os.environ.get("CXX", "c++"), "-std=c++20", "-E", "-DMRVAE_CUDA", *folders, *self.system]
        support.check_headers([*command, "csrc/device.cpp", "-o", os.devnull], self.version)


def configure(extension: Extension, folder: Path, cuda: Cuda | None) -> None:
    """What to compile and how, objects and build_facts.h going into the folder."""
    from torch.utils.cpp_extension import CppExtension

    macro = ["-DMRVAE_CUDA"] if cuda else []
    cxx = [*support.flags(), *macro, *(cuda.system if cuda else [])]
    nvcc = [*support.NVCC_FLAGS, f"-I{ROOT / 'csrc'}", *macro]
    nvcc += support.generate_code(cuda.architectures) if cuda else []
    made = CppExtension(
        extension.name,
        files("csrc/*.cpp", "csrc/cpu/*.cpp", *(["csrc/cuda/*.cu"] if cuda else [])),
        depends=files("csrc/*.h", "csrc/cpu/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cuh"),
        include_dirs=[str(folder / "generated"), *(cuda.include if cuda else [])],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=[*(["-fopenmp"] if "-fopenmp" in support.flags() else []), *(cuda.link if cuda else [])],
    )
    for name, value in vars(made).items():
        if not name.startswith("_"):  # setuptools' own notes stay
            setattr(extension, name, value)
    # an unchanged header keeps its time stamp, so that a rebuild compiles nothing
    lines = [f"#define MRVAE_BUILD_{key.upper()} {json.dumps(value)}\n" for key, value in build_facts(cuda).items()]
    header = folder / "generated" / "build_facts.h"
    if not header.exists() or header.read_text() != "".join(lines):
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text("".join(lines))


def optional_build():
    """torch's BuildExtension, which gives up on a part of the core instead of on the install."""
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuild(BuildExtension):
        def run(self) -> None:
            self.facts: dict[str, str] = {}
            super().run()
            # also into the source tree of an editable install, whose modules are not copied
            folders = {Path(self.build_lib) / "mrvae_kernels"} | ({ROOT / "mrvae_kernels"} if self.inplace else set())
            for folder in folders:
                if folder.exists():
                    (folder / RECORD).write_text(json.dumps(self.facts, indent=2) + "\n")

        def build_extensions(self) -> None:
            cuda_error = self.try_cuda()
            if cuda_error is None:
                return
            try:
                self.compile(None)
                self.facts["cuda_error"] = cuda_error
            except Exception as error:
                reason = self.give_up("MRVAE_CPU", "its C++ core", error)
                self.facts = {**build_facts(), "error": reason}
                for built in (Path(self.get_ext_fullpath(e.name)) for e in self.extensions):
                    built.unlink(missing_ok=True)  # of an earlier build, no longer what the sources say
                self.extensions = []

        def try_cuda(self) -> str | None:
            """Build the core with CUDA. None, or why it has to be built without."""
            if support.setting("MRVAE_CUDA") == "0":
                return f"MRVAE_CUDA was 0 when it was built; run: MRVAE_CUDA=1 {support.INSTALL}"
            if not support.compiler() and support.setting("MRVAE_CUDA") == "auto":
                return support.NO_COMPILER  # the CPU's core will say it
            try:
                self.compile(Cuda())
            except Exception as error:
                return self.give_up("MRVAE_CUDA", "its CUDA kernels", error)
            return None

        def compile(self, cuda: Cuda | None) -> None:
            if not support.compiler():
                raise support.CannotBuild(support.NO_COMPILER)
            # pip builds in a new temporary directory each time; with objects kept here a second build takes seconds
            folder = support.object_folder(torch.__version__, cuda is not None)
            self.build_temp = str(folder)
            for extension in self.extensions:
                configure(extension, folder, cuda)
            super().build_extensions()
            self.facts = build_facts(cuda)

        def give_up(self, variable: str, part: str, error: Exception) -> str:
            """The reason, printed; fatal where the variable is 1."""
            reason = str(error).strip().partition("\n")[0]
            if not isinstance(error, support.CannotBuild):
                reason += f"; for the compiler's messages run: {variable}=1 {support.INSTALL} --verbose"
            if os.environ.get(variable) == "1":
                raise BaseError(f"{variable} is 1, and {reason}") from error
            print(f"mrvae_kernels installs without {part}: {reason}", file=sys.stderr)
            return reason

    return OptionalBuild


class FreshBuild(build_py):
    """Leaves out what an earlier build copied and the sources no longer have."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def main() -> None:
    try:
        with_core = support.setting("MRVAE_CPU") != "0"
        if support.setting("MRVAE_CUDA") == "1" and not with_core:
            raise support.CannotBuild(f"MRVAE_CUDA is 1 and MRVAE_CPU 0, run: MRVAE_CUDA=1 {support.INSTALL}")
        # torch's own default is two processes more than there are cores, whatever the memory
        jobs = support.max_jobs(os.environ.get("MAX_JOBS"), support.cores(), support.free_memory())
    except support.CannotBuild as error:
        sys.exit(f"error: {error}")
    os.environ["MAX_JOBS"] = str(jobs)
    setup(
        packages=find_packages(include=["mrvae_kernels*"]) + find_packages("models", include=["mrvae_models*"]),
        package_dir={"mrvae_models": "models/mrvae_models"},
        ext_modules=[Extension("mrvae_kernels._C", files("csrc/*.cpp", "csrc/cpu/*.cpp"))] if with_core else [],
        cmdclass={"build_py": FreshBuild, **({"build_ext": optional_build()} if with_core else {})},
    )


if __name__ == "__main__":
    main()
