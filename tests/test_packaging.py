"""What a wheel holds and links to, and how the build decides about CUDA."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import xaifast

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="needs the source tree")


def test_the_version_comes_from_one_place():
    assert importlib.metadata.version("xaifast").partition("+")[0] == xaifast.__version__


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A CPU-only wheel and the folder it was built in."""
    pytest.importorskip("scikit_build_core")
    pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run(
        [*command, "-w", str(folder), f"-Cbuild-dir={folder / 'build'}"],
        env={**os.environ, "XAIFAST_CUDA": "OFF", "XAIFAST_WERROR": "ON"},
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel, folder / "build"


def test_wheel_contents(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name.split("/")[0] for name in names} == {"xaifast", f"xaifast-{xaifast.__version__}.dist-info"}
    assert [name for name in names if name.startswith("xaifast/_cpu.") and name.endswith(".so")]
    assert not [name for name in names if "_cuda" in name]
    for expected in ("xaifast/py.typed", "xaifast/ops/coalitions.py", "xaifast/kernels/__init__.py"):
        assert expected in names
    assert not [name for name in names if "csrc" in name or "__pycache__" in name or name.endswith((".cpp", ".o"))]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_wheel_links_to_neither_torch_nor_python(built, tmp_path):
    wheel = zipfile.ZipFile(built[0])
    (module,) = (name for name in wheel.namelist() if name.endswith(".so"))
    dynamic = subprocess.run(["readelf", "-d", wheel.extract(module, tmp_path)], capture_output=True, text=True).stdout
    needed = [line for line in dynamic.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if any(name in line for name in ("torch", "c10", "python", "cuda"))]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_objects_for_newer_processors_share_no_functions(built):
    # The linker keeps one copy of a weak function for everybody: it must not be one with AVX-512 in it.
    objects = [path for path in built[1].rglob("*.o") if path.parts[-4].startswith("xaifast_v")]
    if not objects:
        pytest.skip("compiled for one instruction set only")
    for path in objects:
        symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        assert "XAIFAST_ISA" not in symbols and "xaifast" in symbols
        assert not [line for line in symbols.splitlines() if line.split()[-2:-1] in (["V"], ["W"], ["u"])]


def test_set_up_runs_once_for_every_change(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    installed = []

    def set_up(*extras, environment="env", fingerprint="a"):
        (tmp_path / environment).mkdir(exist_ok=True)
        monkeypatch.setattr(tool, "environment", lambda: tmp_path / environment / "bin" / "python")
        monkeypatch.setattr(tool, "fingerprint", lambda: fingerprint)
        monkeypatch.setattr(tool, "has_torch", lambda python: True)
        monkeypatch.setattr(tool, "build_tools", lambda python: [])
        monkeypatch.setattr(tool, "run", lambda *command: installed.append(command[-1]))
        monkeypatch.setattr(sys, "argv", ["setup_env.py", *extras])
        installed.clear()
        tool.main()
        assert capsys.readouterr().out.strip() == str(tmp_path / environment / "bin" / "python")
        return installed[-1:]

    assert set_up("test") == [".[test]"]
    assert set_up("test") == set_up() == []
    assert set_up("demo") == [".[demo,test]"]
    assert set_up("demo", fingerprint="b") == [".[demo,test]"]
    assert set_up("test", fingerprint="b") == []
    assert set_up("test", environment="a new one", fingerprint="b") == [".[test]"]


def configure(folder, *options, **environment):
    cmake, ninja = shutil.which("cmake", path=_path()), shutil.which("ninja", path=_path())
    if cmake is None or ninja is None:
        pytest.skip("needs cmake and ninja")
    pybind11 = pytest.importorskip("pybind11")
    command = [cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}", *options]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def _path():
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def test_without_a_working_nvcc_auto_builds_for_the_cpu_and_on_fails(tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    auto = configure(tmp_path / "auto", "-DXAIFAST_CUDA=AUTO", CUDACXX=str(broken))
    assert auto.returncode == 0, auto.stderr
    assert "building without CUDA kernels: no working nvcc" in auto.stdout
    required = configure(tmp_path / "on", "-DXAIFAST_CUDA=ON", CUDACXX=str(broken))
    assert required.returncode != 0
    assert "XAIFAST_CUDA=ON, but no working nvcc" in " ".join(required.stderr.split())
    wrong = configure(tmp_path / "wrong", "-DXAIFAST_CUDA=MAYBE")
    assert "XAIFAST_CUDA must be AUTO, ON or OFF, got 'MAYBE'" in wrong.stderr


@pytest.mark.parametrize(
    ("release", "options", "torch_list", "expected"),
    [
        ("13.0", [], "", "80-real;90-real;100-real;120-real;120-virtual"),
        ("12.4", [], "", "80-real;90-real;90-virtual"),
        ("11.2", [], "", ""),
        ("13.0", [], "8.0;9.0a+PTX", "80-real;90a-real;90a-virtual"),
        ("13.0", [], "7.5 12.0", "75-real;120-real"),
        ("13.0", ["-DXAIFAST_CUDA_ARCHS=90-real,100"], "8.0", "90-real;100"),
        ("13.0", ["-DCMAKE_CUDA_ARCHITECTURES=86", "-DXAIFAST_CUDA_ARCHS=90"], "8.0", "86"),
        ("13.0", [], "Hopper", None),
    ],
)
def test_cuda_architectures(tmp_path, release, options, torch_list, expected):
    cmake = shutil.which("cmake", path=_path())
    if cmake is None:
        pytest.skip("needs cmake")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    script = tmp_path / "archs.cmake"
    script.write_text(
        f'include("{ROOT}/cmake/CudaArchs.cmake")\nxaifast_cuda_archs(archs)\nmessage("archs=${{archs}}")\n'
    )
    finished = subprocess.run(
        [cmake, f"-DCMAKE_CUDA_COMPILER={nvcc}", *options, "-P", script],
        env={**os.environ, "TORCH_CUDA_ARCH_LIST": torch_list},
        capture_output=True,
        text=True,
    )
    if expected is None:
        assert "TORCH_CUDA_ARCH_LIST must look like" in finished.stderr
    else:
        assert f"archs={expected}\n" in finished.stderr
