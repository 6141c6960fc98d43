"""What the GPU kernels use, read from binaries compiled without a GPU."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA_REGISTERS = 64  # two thirds of the threads a multiprocessor can hold; a memory-bound kernel needs no more


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_cuda_kernels():
    tool = load("cuda_resources")
    nvcc = tool.find_nvcc()
    if nvcc is None or shutil.which(nvcc) is None:
        pytest.skip("nvcc was not found")
    usages = tool.measure_all(nvcc)
    assert {u.arch for u in usages} == set(tool.ARCHS)
    assert any("compact_rows" in u.kernel for u in usages)
    for usage in usages:
        assert usage.ok, usage
        assert usage.registers <= CUDA_REGISTERS, usage


def test_spilling_cuda_kernel_is_noticed(tmp_path):
    tool = load("cuda_resources")
    nvcc = tool.find_nvcc()
    if nvcc is None or shutil.which(nvcc) is None:
        pytest.skip("nvcc was not found")
    values = "".join(f"float a{i} = x[{i} * n];" for i in range(200))
    mixed = "".join(f"a{i} = a{i} * a{(i + 7) % 200} + s;" for i in range(200))
    stores = "".join(f"x[{i} * n + 1] = a{i};" for i in range(200))
    source = tmp_path / "spill.cu"
    source.write_text(
        f"__global__ void __launch_bounds__(1024, 2) spill(float* x, int n, float s) {{ {values} "
        f"for (int k = 0; k < n; ++k) {{ {mixed} }} {stores} }}"
    )
    (usage,) = tool.measure(source, 90, nvcc)
    assert usage.spill_stores > 0
    assert not usage.ok


def test_cuda_report_is_read():
    tool = load("cuda_resources")
    report = (
        "ptxas info    : Compiling entry function '_Z1kv' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1kv\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 26 registers, used 1 barriers, 8 bytes cumulative stack size, 2048 bytes smem\n"
    )
    assert tool.parse(report) == [tool.Usage("_Z1kv", 90, 26, 12, 16, 2048, 8)]


def test_triton_kernels():
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels cannot be compiled under TRITON_INTERPRET=1")
    from xaifast import kernels

    tool = load("triton_resources")
    usages = tool.measure_all()
    limits = {variant.name: variant.registers for variant in kernels.variants()}
    assert {u.arch for u in usages} == set(tool.ARCHS)
    assert any("select_rows" in u.variant for u in usages)
    for usage in usages:
        assert usage.ok, usage
        assert usage.registers <= limits[usage.variant], usage


def test_widest_store():
    tool = load("triton_resources")
    assert tool.widest_store("st.global.v4.b32 [%rd1], {};\nst.global.b16 [%rd2], {};") == 128
    assert tool.widest_store("@%p1 st.global.b32 [ %rd1 + 0 ], { %r1 };") == 32
    assert tool.widest_store("ld.global.v4.b32 {}, [%rd1];") == 0


def test_kernels_import_without_triton():
    code = "import sys; sys.modules['triton'] = None; from xaifast.kernels import select; print(select.why_missing)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "install the package triton" in result.stdout
