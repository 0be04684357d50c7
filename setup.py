"""Builds mrvae_kernels._C, the C++ core, with torch's own tools and ninja.

The extension is optional: where it cannot be compiled the package installs without it, one sentence says so, and
mrvae_kernels.ops.EXTENSION_ERROR keeps the reason. MRVAE_CPU=1 makes that failure fatal; MRVAE_CPU=0 does not try.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent.resolve()
GENERATED = ROOT / "build" / "generated"  # build_facts.h
RECORD = "_build.json"  # beside the package's modules: what was built, or why nothing was


def flags() -> list[str]:
    if sys.platform == "win32":
        return ["/O2"]
    # Apple's clang has no OpenMP runtime: vector pragmas only, at::parallel_for then runs serially
    openmp = "-fopenmp-simd" if sys.platform == "darwin" else "-fopenmp"
    # whole registers in the AVX-512 versions of the kernels; nothing else uses vectors that wide
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    return ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", openmp, *wide]


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def compiler() -> str:
    """First line of the C++ compiler's --version, or "" without one."""
    program = os.environ.get("CXX", "cl" if sys.platform == "win32" else "c++")
    return (output_of(program, "--version") or output_of("g++", "--version")).partition("\n")[0]


def build_facts() -> dict[str, str]:
    import torch

    return {
        "torch": torch.__version__,
        "compiler": compiler(),
        "flags": " ".join(flags()),
        "commit": output_of("git", "rev-parse", "--short=12", "HEAD") or "unknown",
    }


def write_if_changed(path: Path, text: str) -> None:
    # an unchanged header keeps its time stamp, so that a rebuild compiles nothing
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def extension():
    from torch.utils.cpp_extension import CppExtension

    def files(*patterns: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))

    return CppExtension(
        "mrvae_kernels._C",
        files("csrc/*.cpp", "csrc/cpu/*.cpp"),
        depends=files("csrc/*.h", "csrc/cpu/*.h"),
        include_dirs=[str(GENERATED)],
        extra_compile_args={"cxx": flags()},
        extra_link_args=["-fopenmp"] if "-fopenmp" in flags() else [],
    )


def optional_build():
    """torch's BuildExtension, which gives up on the extension instead of on the install."""
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuild(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # pip builds in a new temporary directory each time; with objects kept here a second build takes seconds
            tag = f"{sys.implementation.cache_tag}-torch{build_facts()['torch']}"
            self.build_temp = str(ROOT / "build" / "objects" / tag)

        def run(self) -> None:
            self.reason = ""
            super().run()
            # also into the source tree of an editable install, whose modules are not copied
            folders = {Path(self.build_lib) / "mrvae_kernels"} | ({ROOT / "mrvae_kernels"} if self.inplace else set())
            for folder in folders:
                if folder.exists():
                    record = {**build_facts(), "error": self.reason} if self.reason else build_facts()
                    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")

        def build_extensions(self) -> None:
            try:
                if not compiler():
                    raise RuntimeError("there is no C++ compiler: install g++ or clang++, or name one in CXX")
                facts = build_facts()
                lines = [f"#define MRVAE_BUILD_{key.upper()} {json.dumps(value)}\n" for key, value in facts.items()]
                write_if_changed(GENERATED / "build_facts.h", "".join(lines))
                super().build_extensions()
            except Exception as error:
                if os.environ.get("MRVAE_CPU") == "1":
                    raise
                self.reason = str(error).strip().partition("\n")[0]
                for built in (Path(self.get_ext_fullpath(e.name)) for e in self.extensions):
                    built.unlink(missing_ok=True)  # of an earlier build, no longer what the sources say
                self.extensions = []
                sentence = "mrvae_kernels installs without its C++ core, and runs slower, as building it failed"
                print(f"{sentence}: {self.reason}", file=sys.stderr)

    return OptionalBuild


packages = find_packages(include=["mrvae_kernels*"]) + find_packages("models", include=["mrvae_models*"])
with_extension = os.environ.get("MRVAE_CPU") != "0"
setup(
    packages=packages,
    package_dir={"mrvae_models": "models/mrvae_models"},
    ext_modules=[extension()] if with_extension else [],
    cmdclass={"build_ext": optional_build()} if with_extension else {},
)
