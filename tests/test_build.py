"""What setup.py decides and says: with CUDA or without and why not, for which GPUs, in how many processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from environments import LEFT_OUT, ROOT

sys.path.insert(0, str(ROOT))
import build_support as support  # noqa: E402

FITTING = support.Toolkit(Path("/cuda/bin/nvcc"), Path("/cuda"), "13.0")


def sentence(error) -> str:
    """The message, which has to be one line that ends in a command."""
    text = str(error.value)
    assert "\n" not in text and ". " not in text and text.endswith(support.INSTALL) and "run: " in text
    return text


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def nvcc(folder: Path, version: str = "13.0", top: str = "") -> Path:
    said = f'echo "Cuda compilation tools, release {version}, V{version}.88"'
    return program(folder / "bin" / "nvcc", f'[ "$1" = --dryrun ] && echo "#$ TOP={top}" >&2 && exit\n{said}')


# ---- what is there ---------------------------------------------------------------------------------------------------


def test_variables():
    assert support.setting("MRVAE_CUDA", {}) == support.setting("MRVAE_CUDA", {"MRVAE_CUDA": ""}) == "auto"
    assert support.setting("MRVAE_CPU", {"MRVAE_CPU": "0"}) == "0"
    with pytest.raises(support.CannotBuild) as error:
        support.setting("MRVAE_CUDA", {"MRVAE_CUDA": "yes"})
    assert "MRVAE_CUDA is 'yes', expected auto, 1 or 0" in sentence(error)


def test_the_toolkit_is_searched_where_it_was_named_then_in_path_then_in_the_usual_place(tmp_path):
    named, path, usual = (tmp_path / name for name in ("named", "path", "usual"))
    for folder, version in ((named, "12.8"), (path, "13.1"), (usual, "13.0")):
        nvcc(folder, version)
    variables = {"PATH": f"{path}/bin"}
    assert support.toolkit({**variables, "CUDA_HOME": str(named)}, usual).version == "12.8"
    assert support.toolkit({**variables, "CUDA_PATH": str(named)}, usual).home == named
    assert support.toolkit({**variables, "CUDA_HOME": str(tmp_path)}, usual) is None, "a named one is not looked past"
    assert support.toolkit(variables, usual).version == "13.1"
    assert support.toolkit({"PATH": ""}, usual) == (usual / "bin" / "nvcc", usual, "13.0")
    assert support.toolkit({"PATH": ""}, tmp_path) is None
    program(usual / "bin" / "nvcc", "exit 1")
    assert support.toolkit({"PATH": ""}, usual) is None, "one that does not run"


def test_the_toolkit_of_an_nvcc_that_is_a_script_elsewhere(tmp_path):
    home = tmp_path / "cuda"
    home.mkdir()
    nvcc(tmp_path / "local", top=f"{home}/bin/..")
    (home / "bin").mkdir()
    assert support.toolkit({"PATH": f"{tmp_path}/local/bin"}).home == home


@pytest.mark.parametrize(
    ("version", "cuda", "found", "said"),
    [
        ("2.13.0+cpu", None, FITTING, "torch 2.13.0+cpu is a build without CUDA; run: pip install 'torch===2.13.0' &&"),
        ("2.13.0+cu130", "13.0", None, "there is no nvcc: install the CUDA 13.0 toolkit; then run: CUDA_HOME="),
        ("2.13.0+cu130", "13.0", FITTING._replace(version="12.8"), "of CUDA 12.8 and torch 2.13.0+cu130 of CUDA 13.0"),
        ("2.11.0+cu128", "12.8", FITTING, "of CUDA 13.0 and torch 2.11.0+cu128 of CUDA 12.8, whose major versions"),
    ],
)
def test_why_there_is_no_cuda(monkeypatch, version, cuda, found, said):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    with pytest.raises(support.CannotBuild) as error:
        support.check(version, cuda, found)
    assert said in sentence(error)


def test_a_named_folder_without_nvcc_is_named_back(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/opt/nothing")
    with pytest.raises(support.CannotBuild) as error:
        support.check("2.13.0+cu130", "13.0", None)
    assert sentence(error).startswith("/opt/nothing has no bin/nvcc that runs: ")


def test_minor_versions_may_differ():
    assert support.check("2.13.0+cu130", "13.0", FITTING._replace(version="13.2")).version == "13.2"


def test_headers_and_runtime_that_torch_brings_along(tmp_path):
    torch_folder, packages = tmp_path / "torch", tmp_path / "nvidia"
    for folder in ("cu13/include", "cudnn/include", "cu13/lib", "nccl/lib"):
        (packages / folder).mkdir(parents=True)
    assert support.torch_headers(torch_folder, "13.0") == [packages / "cu13/include", packages / "cudnn/include"]
    home = tmp_path / "cuda"
    assert support.runtime_library(home, torch_folder, "13.0") == ["-lcudart"]
    (packages / "cu13" / "lib" / "libcudart.so.13").touch()
    assert support.runtime_library(home, torch_folder, "13.0") == [f"-L{packages}/cu13/lib", "-l:libcudart.so.13"]
    (home / "lib64").mkdir(parents=True)
    (home / "lib64" / "libcudart.so").touch()
    assert support.runtime_library(home, torch_folder, "13.0") == [f"-L{home}/lib64", "-lcudart"]


@pytest.mark.skipif(not support.compiler(), reason="there is no C++ compiler")
@pytest.mark.parametrize(
    ("header", "cuda", "package"),
    [
        ("cusparse.h", "13.0", "nvidia-cusparse"),
        ("cublas_v2.h", "12.8", "nvidia-cublas-cu12"),
        ("cusolverDn.h", "13.0", "nvidia-cusolver"),
        ("cuda_runtime_api.h", "13.0", "nvidia-cuda-runtime"),
    ],
)
def test_a_missing_header_is_named_with_its_package(tmp_path, header, cuda, package):
    source = tmp_path / "device.cpp"
    source.write_text(f"#include <{header}>\n")
    folders = ["-nostdinc", f"-I{tmp_path / 'none'}", f"-I{tmp_path / 'include'}"]
    (tmp_path / "none").mkdir()
    command = [os.environ.get("CXX", "c++"), "-E", *folders, str(source), "-o", os.devnull]
    with pytest.raises(support.CannotBuild) as error:
        support.check_headers(command, cuda)
    text = sentence(error)
    assert text.startswith(f"{header} of CUDA {cuda} is missing") and f"run: pip install {package} && " in text
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / header).touch()
    support.check_headers(command, cuda)


# ---- for which GPUs, in how many processes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "supported", "chosen"),
    [
        (None, ["7.5", "8.0", "9.0", "10.0", "12.0"], ["8.0", "9.0", "10.0+PTX"]),
        (None, ["7.5", "8.0", "9.0"], ["8.0", "9.0+PTX"]),
        (None, ["8.9", "11.0", "12.0"], ["12.0+PTX"]),
        ("", [], ["8.0", "9.0", "10.0+PTX"]),
        ("8.6", [], ["8.6"]),
        ("8.0;9.0+PTX", ["8.0", "9.0"], ["8.0", "9.0+PTX"]),
        ("6.0 7.5 8.0 8.0 9.0a", ["7.5", "8.0", "9.0"], ["8.0", "9.0a"]),
    ],
)
def test_architectures(listed, supported, chosen):
    assert support.architectures(listed, supported) == chosen


@pytest.mark.parametrize(
    ("listed", "problem"),
    [
        ("native", "'native' is none of its kind"),
        ("8.0;sm_90", "'sm_90' is none of its kind"),
        ("8.0;13.0", "this nvcc does not know 13.0"),
        ("7.0;7.5", "the kernels need 8.0 or newer"),
    ],
)
def test_architectures_that_make_no_sense(listed, problem):
    with pytest.raises(support.CannotBuild) as error:
        support.architectures(listed, ["7.5", "8.0", "9.0"])
    assert f"TORCH_CUDA_ARCH_LIST is '{listed}', and {problem}; expected capabilities of 8.0 9.0" in sentence(error)


def test_how_nvcc_is_told_and_how_it_is_said(tmp_path):
    assert support.generate_code(["8.0", "10.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    assert support.names(["8.0", "9.0a", "10.0+PTX"]) == "sm_80 sm_90a sm_100+PTX"
    listing = program(tmp_path / "nvcc", "printf 'compute_75\\ncompute_80\\ncompute_100\\ncompute_121\\n'")
    assert support.known(listing) == ["7.5", "8.0", "10.0", "12.1"]
    assert support.known(tmp_path / "none") == []


def test_processes_from_cores_and_free_memory():
    size = support.JOB_BYTES
    assert support.max_jobs(None, 8, None) == support.max_jobs("", 8, 100 * size) == 8
    assert support.max_jobs(None, 8, 3 * size + 1) == 3
    assert support.max_jobs(None, 8, size // 2) == 1
    assert support.max_jobs("5", 2, size) == 5
    for bad in ("0", "-1", "many"):
        with pytest.raises(support.CannotBuild) as error:
            support.max_jobs(bad, 2, None)
        assert f"MAX_JOBS is '{bad}', expected a positive number; run: MAX_JOBS=2" in sentence(error)
    assert support.cores() >= 1 and (support.free_memory() or 1) > 0


def test_builds_for_different_torches_share_no_objects():
    folders = {support.object_folder(version, cuda) for version in ("2.12.0", "2.13.0") for cuda in (True, False)}
    assert len(folders) == 4 and all(ROOT / "build" in folder.parents for folder in folders)


# ---- setup.py --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", ignore=LEFT_OUT))


def run(tree: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    names = ("MRVAE_CPU", "MRVAE_CUDA", "MRVAE_CORE", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CUDA_PATH")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=tree, env={**environment, **variables}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MRVAE_CUDA": "maybe"}, "error: MRVAE_CUDA is 'maybe', expected auto, 1 or 0; run: "),
        ({"MRVAE_CPU": "2"}, "error: MRVAE_CPU is '2', expected auto, 1 or 0; run: "),
        ({"MAX_JOBS": "all"}, "error: MAX_JOBS is 'all', expected a positive number; run: MAX_JOBS="),
        ({"MRVAE_CPU": "0", "MRVAE_CUDA": "1"}, "error: MRVAE_CUDA is 1 and MRVAE_CPU 0, run: MRVAE_CUDA=1 pip"),
        ({"MRVAE_CUDA": "1", "CUDA_HOME": "/nothing"}, "error: MRVAE_CUDA is 1, and "),
        ({"MRVAE_CUDA": "1", "CXX": "/nothing", "PATH": ""}, "error: MRVAE_CUDA is 1, and there is no C++ compiler: "),
    ],
)
def test_what_cannot_be_built_ends_in_one_sentence(tree, variables, said):
    done = run(tree, "setup.py", "build_ext", **variables)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith(said) and last.endswith(support.INSTALL), done.stderr
    assert "Traceback" not in done.stderr
    if variables.get("CUDA_HOME"):
        reason = "/nothing has no bin/nvcc" if torch.version.cuda else f"torch {torch.__version__} is a build without"
        assert reason in last


def test_without_a_compiler_the_package_is_built_without_the_core_and_says_why(tree):
    done = run(tree, "setup.py", "build", CXX="/nothing", PATH="")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("mrvae_kernels installs without its C++ core: there is no C++ compiler: install g++") == 1
    assert "CUDA kernels" not in done.stderr, "one sentence for one reason"
    (record,) = (tree / "build").glob("lib*/mrvae_kernels/_build.json")
    facts = json.loads(record.read_text())
    assert facts["error"].startswith("there is no C++ compiler") and facts["cuda"] == facts["architectures"] == ""
    assert not list((tree / "build").glob("lib*/mrvae_kernels/*.so"))


def archive(tree: Path, hook: str, folder: Path) -> list[str]:
    """Names of the files in what the build backend makes, the archive's own folder cut off."""
    folder.mkdir()
    done = run(tree, "-c", f"from setuptools import build_meta; build_meta.{hook}({str(folder)!r})", MRVAE_CPU="0")
    assert done.returncode == 0, done.stderr
    (made,) = folder.iterdir()
    if made.suffix == ".whl":
        return zipfile.ZipFile(made).namelist()
    return [name.partition("/")[2] for name in tarfile.open(made).getnames()]


def test_the_wheel_has_the_packages_and_nothing_else(tree, tmp_path):
    stale = tree / "build" / "lib" / "mrvae_kernels" / "removed_long_ago.py"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.touch()
    names = archive(tree, "build_wheel", tmp_path / "out")
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"mrvae_kernels", "mrvae_models"}
    assert {Path(name).suffix for name in names if ".dist-info" not in name} <= {".py", ".json", ".npz", ".md"}
    assert not [name for name in names if "test" in name or "removed" in name or "build" in name]
    assert {"mrvae_kernels/doctor.py", "mrvae_models/data_files/mnist6k.npz"} <= set(names)


def test_the_source_distribution_has_all_that_a_build_needs_and_no_output(tree, tmp_path):
    names = set(archive(tree, "build_sdist", tmp_path / "out"))
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    needed = {"setup.py", "build_support.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"}
    assert sources | needed | {"mrvae_kernels/doctor.py", "models/mrvae_models/data_files/mnist6k.npz"} <= names
    assert {"csrc/cuda/runtime.h", "csrc/tests/shim/cuda_shim.h", "tests/environments.py"} <= names
    built = (".so", ".o", ".a", ".pyc", ".whl", "_build.json")
    assert not [name for name in names if name.endswith(built) or name.startswith(("build/", "dist/"))]
