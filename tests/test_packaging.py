"""What is built and shipped, and that what is missing on a machine costs a line, not the install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from fastdpo import native_build
from fastdpo.cli import main
from fastdpo.kernels import native
from tests import ROOT

SHIPPED = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "csrc",
    "fastdpo",
)

EMPTY_MODULE = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")


def setup(project: Path, *command: str, env: Mapping[str, str] | None = None) -> str:
    """Run setup.py of ``project``; what it printed."""
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *command],
        cwd=project,
        env={**os.environ, "FASTDPO_CUDA": "1", "CUDA_HOME": "", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def path_with(folder: Path, *programs: str) -> str:
    """A PATH on which there is nothing but ``programs``."""
    folder.mkdir()
    for program in programs:
        found = shutil.which(program)
        assert found, program
        (folder / program).symlink_to(found)
    return str(folder)


def shared_libraries(module: Path) -> list[str]:
    dynamic = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    return [line.partition("[")[2].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The sdist's names, and the wheel built from that sdist, without CUDA, unpacked."""
    folder = tmp_path_factory.mktemp("build")
    project = folder / "project"
    project.mkdir()
    for name in SHIPPED:
        source, ignored = ROOT / name, shutil.ignore_patterns("*.so", "__pycache__")
        if source.is_dir():
            shutil.copytree(source, project / name, ignore=ignored)
        else:
            shutil.copy(source, project / name)
    quick = folder / "quick-g++"  # what the compiler makes of the kernels is tested elsewhere
    quick.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    quick.chmod(0o755)
    env = os.environ | {"FASTDPO_CUDA": "0", "CXX": str(quick)}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, project]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    return names, folder / "wheel"


@pytest.mark.slow
@needs_compiler
def test_sdist_carries_all_that_a_build_needs(distributions: tuple[list[str], Path]):
    names, _ = distributions
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(sources) > 3
    assert {str(path.relative_to(ROOT)) for path in sources} <= set(names)
    assert {"setup.py", "LICENSE", "fastdpo/py.typed", "fastdpo/_C.pyi"} <= set(names)
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.slow
@needs_compiler
def test_wheel_carries_the_extension_and_the_types(distributions: tuple[list[str], Path]):
    _, wheel = distributions
    assert (wheel / "fastdpo" / "py.typed").is_file()
    assert (wheel / "fastdpo" / "_C.pyi").is_file()
    assert {path.name.partition("-")[0] for path in wheel.iterdir()} == {"fastdpo"}
    assert (wheel / "fastdpo" / "csrc" / "bindings.cpp").is_file()  # for `fastdpo build`
    (module,) = (wheel / "fastdpo").glob("_C*.so")
    assert not [name for name in shared_libraries(module) if "cuda" in name or "torch" in name]
    code = "from fastdpo import _C; print(_C.__file__, _C.built_with_cuda, hasattr(_C, 'cuda_row_kernel'))"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=wheel,
        env=os.environ | {"PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.split() == [str(module), "False", "False"]


@pytest.mark.skipif(native.extension_problem() is not None, reason=str(native.extension_problem()))
def test_the_installed_extension_needs_no_cuda_library_and_has_the_kernels_nvcc_can_build():
    module = native._C.__file__
    assert not [name for name in shared_libraries(Path(module)) if "cuda" in name or "torch" in name]
    if os.environ.get("FASTDPO_CUDA") != "0" and (shutil.which("nvcc") or os.environ.get("CUDA_HOME")):
        assert native._C.built_with_cuda, (
            "nvcc is here, but the CUDA kernels were not built: run `make setup`"
        )


@pytest.fixture
def small_project(tmp_path: Path) -> Path:
    """This package's build with sources that compile at once; torch cannot be imported beside it."""
    project = tmp_path / "a project"  # the space must not matter
    (project / "csrc" / "cuda").mkdir(parents=True)
    (project / "fastdpo").mkdir()
    (project / "fastdpo" / "__init__.py").touch()
    (project / "torch.py").write_text("raise ImportError('the build imported torch')\n")
    (project / "csrc" / "bindings.cpp").write_text(EMPTY_MODULE)
    (project / "csrc" / "other.cpp").touch()
    (project / "csrc" / "cuda" / "kernels.cu").touch()
    toolkits = tmp_path / "toolkits"  # in the place of /usr/local, which has one here and none elsewhere
    toolkits.mkdir()
    shutil.copy(ROOT / "setup.py", project)
    script = (ROOT / "fastdpo" / "native_build.py").read_text()
    assert 'Path("/usr/local")' in script
    script = script.replace('Path("/usr/local")', f"Path({str(toolkits)!r})")
    (project / "fastdpo" / "native_build.py").write_text(script)
    return project


def built_modules(project: Path) -> list[Path]:
    return list((project / "fastdpo").glob("_C*.so"))


@needs_compiler
def test_without_nvcc_the_build_says_so_and_goes_on(small_project: Path, tmp_path: Path):
    env = {"PATH": path_with(tmp_path / "bin", "g++", "as", "ld")}
    printed = setup(small_project, "build_ext", "--inplace", env=env)
    assert "fastdpo: no nvcc in CUDA_HOME, on PATH or in " in printed
    assert "building without the CUDA kernels\n" in printed
    (module,) = built_modules(small_project)
    subprocess.run([sys.executable, "-c", "import fastdpo._C"], cwd=small_project, check=True)
    assert not [name for name in shared_libraries(module) if "cuda" in name]


@needs_compiler
@pytest.mark.parametrize("place", ["PATH", "CUDA_HOME"])
def test_a_failing_nvcc_costs_the_cuda_kernels_only(small_project: Path, tmp_path: Path, place: str):
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho this nvcc is broken >&2\nexit 1\n")
    nvcc.chmod(0o755)
    in_home = {"CUDA_HOME": str(nvcc.parents[1])}
    on_path = {"PATH": f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"}
    printed = setup(small_project, "build_ext", "--inplace", env=on_path if place == "PATH" else in_home)
    assert "this nvcc is broken" in printed
    assert f"fastdpo: {nvcc} failed, see above: building without the CUDA kernels\n" in printed
    assert len(built_modules(small_project)) == 1


def make_nvcc(folder: Path) -> Path:
    """One that fails."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    return nvcc


@needs_compiler
def test_nvcc_is_looked_for_in_the_usual_places(small_project: Path, tmp_path: Path):
    env = {"PATH": path_with(tmp_path / "bin", "g++", "as", "ld", "sh")}
    toolkits = tmp_path / "toolkits"

    def tried() -> str:
        (small_project / "csrc" / "cuda" / "kernels.cu").touch()
        printed = setup(small_project, "build_ext", "--inplace", env=env)
        (line,) = [
            line for line in printed.splitlines() if line.endswith("building without the CUDA kernels")
        ]
        return line

    make_nvcc(toolkits / "cuda-9.2")
    newest = make_nvcc(toolkits / "cuda-13.0")
    assert tried().startswith(f"fastdpo: {newest} failed")
    default = make_nvcc(toolkits / "cuda")
    assert tried().startswith(f"fastdpo: {default} failed")
    env["CUDA_HOME"] = str(tmp_path / "nothing")
    assert tried().startswith(f"fastdpo: {default} failed")
    env["CUDA_HOME"] = str(make_nvcc(tmp_path / "home").parents[1])
    assert tried().startswith(f"fastdpo: {env['CUDA_HOME']}/bin/nvcc failed")


@pytest.mark.parametrize("found", ["an old one", "none"])
def test_without_a_new_setuptools_it_builds_in_place_or_says_what_it_needs(
    small_project: Path, tmp_path: Path, found: str
):
    fake = "__version__ = '65.5.1'\n" if found == "an old one" else "raise ImportError\n"
    (small_project / "setuptools.py").write_text(fake)
    env = {"FASTDPO_CUDA": "0", "PATH": path_with(tmp_path / "bin")}
    got = "setuptools 65.5.1" if found == "an old one" else "no setuptools"
    printed = setup(small_project, "build_ext", "--inplace", env=env)
    assert f"fastdpo: got {got}, wanted setuptools >= 77: building in place without it\n" in printed
    assert "no C++ compiler found" in printed
    refused = subprocess.run(
        [sys.executable, "setup.py", "bdist_wheel"], cwd=small_project, capture_output=True, text=True
    )
    assert refused.returncode != 0 and "pip install 'setuptools>=77'" in refused.stderr


@pytest.mark.parametrize("missing", ["compiler", "a compiler that works"])
def test_without_a_compiler_the_wheel_is_python_only(small_project: Path, tmp_path: Path, missing: str):
    env = {"PATH": path_with(tmp_path / "bin"), "FASTDPO_CUDA": "0"}
    if missing == "compiler":
        line = "fastdpo: no C++ compiler found: installing without the compiled kernels\n"
    else:
        broken = tmp_path / "bin" / "g++"
        broken.write_text("#!/bin/sh\nexit 1\n")
        broken.chmod(0o755)
        line = f"fastdpo: {broken} failed, see above: installing without the compiled kernels\n"
    shutil.copy(ROOT / "pyproject.toml", small_project)
    for name in ("README.md", "LICENSE"):
        (small_project / name).touch()
    printed = setup(small_project, "bdist_wheel", env=env)
    assert line in printed
    (wheel,) = (small_project / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "fastdpo/__init__.py" in archive.namelist()
        assert not [name for name in archive.namelist() if name.endswith(".so")]


def test_a_pure_wheel_is_one_for_all_platforms(small_project: Path):
    shutil.copy(ROOT / "pyproject.toml", small_project)
    for name in ("README.md", "LICENSE"):
        (small_project / name).touch()
    printed = setup(small_project, "bdist_wheel", env={"FASTDPO_PURE": "1"})
    assert "c++ " not in printed and "fastdpo: " not in printed
    (wheel,) = (small_project / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "fastdpo/csrc/bindings.cpp" in archive.namelist()
        assert not [name for name in archive.namelist() if name.endswith(".so")]


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_on_other_platforms_no_compiler_is_tried(
    platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(native_build, "find_cxx", lambda: pytest.fail("a compiler was looked for"))
    assert not native_build.build_to(tmp_path / "_C.so", ROOT / "csrc", tmp_path / "work")
    assert f"fastdpo: {platform}: the compiled kernels are for Linux" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_fastdpo_build_builds_into_the_package(
    small_project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As in a wheel, which has the sources within."""
    package = small_project / "fastdpo"
    (small_project / "csrc").rename(package / "csrc")
    monkeypatch.setattr(native_build, "PACKAGE", package)
    monkeypatch.setenv("FASTDPO_CUDA", "0")
    assert main(["build"]) == 0
    (module,) = built_modules(small_project)
    assert f"built {module}" in capsys.readouterr().out
    kept = module.read_bytes()

    (package / "csrc" / "other.cpp").write_text("this is no C++")
    assert main(["build"]) == 1
    assert "not built: see above" in capsys.readouterr().out and module.read_bytes() == kept

    assert main(["build", "cuda"]) == 2
    assert "build: got cuda, wanted no words" in capsys.readouterr().err
    shutil.rmtree(package / "csrc")
    assert main(["build"]) == 2
    assert f"build: no csrc in {package}" in capsys.readouterr().err


@needs_compiler
def test_a_second_build_compiles_only_what_changed(small_project: Path):
    def build() -> list[str]:
        printed = setup(small_project, "build_ext", "--inplace", env={"FASTDPO_CUDA": "0"})
        return [line.rpartition("/")[2].rstrip("'") for line in printed.splitlines() if "c++ " in line]

    assert sorted(build()) == ["bindings.cpp", "other.cpp"]
    assert build() == []
    (small_project / "csrc" / "other.h").touch()
    (small_project / "csrc" / "other.cpp").write_text('#include "other.h"\n')
    assert build() == ["other.cpp"]
    (small_project / "csrc" / "other.h").write_text("// changed\n")
    assert build() == ["other.cpp"]
