"""`xaifast info`: what it reports, what it notices, and when it fails."""

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import xaifast
from xaifast import _native, cli, diagnostics
from xaifast.cli import info as info_command
from xaifast.diagnostics import installation
from xaifast.diagnostics.installation import EXTRAS, KERNELS, VARIABLES, covering
from xaifast.reference import coalitions, masking, tokens

ROOT = Path(__file__).resolve().parent.parent
needs_native = pytest.mark.skipif(_native.cpu() is None, reason=f"no native module: {_native.why_missing()}")


@pytest.fixture
def report(capsys):
    """Runs the command; returns its exit status and what it printed, parsed where it is JSON."""

    def run(*arguments):
        status = cli.main(["info", *arguments])
        printed = capsys.readouterr().out
        return status, json.loads(printed) if "--json" in arguments else printed

    return run


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


def failed(checks):
    return [check["name"] for check in checks if not check["ok"]]


def test_the_report_as_text(report):
    status, text = report()
    assert status == 0
    assert text.startswith(f"xaifast {xaifast.__version__}\n")
    for expected in (rf"\n  torch +{re.escape(torch.__version__)}, ", r"\nSelf-test: passed \(\d+ checks"):
        assert re.search(expected, text), expected
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert "FAILED" not in text


def test_the_report_as_json(report):
    status, info = report("--json")
    assert (status, info["ok"], info["problems"]) == (0, True, {})
    assert info["xaifast"] == xaifast.__version__
    assert info["torch"]["threads"] == torch.get_num_threads()
    assert info["packages"]["safetensors"]
    assert failed(info["self_test"]) == []
    assert {"sample_coalitions", "mask_inputs on cpu", "kernel_shap on cpu", "safetensors"} <= {
        check["name"] for check in info["self_test"]
    }
    assert all(check["seconds"] >= 0 and check["detail"] for check in info["self_test"])


def test_without_the_self_test(report, monkeypatch):
    monkeypatch.setattr(diagnostics, "self_test", lambda: pytest.fail("must not run"))
    status, info = report("--json", "--no-self-test")
    assert (status, info["self_test"], info["ok"]) == (0, None, True)
    assert "Self-test" not in report("--no-self-test")[1]


def one_byte_off(function):
    def lie(*args, **kwargs):
        result = function(*args, **kwargs)
        result.view(-1)[-1:].view(torch.uint8)[0] ^= 1
        return result

    return lie


@pytest.mark.parametrize(
    ("module", "function", "checks"),
    [
        (masking, "mask_inputs", ["mask_inputs on cpu", "select_tokens on cpu"]),
        (tokens, "compact_tokens", ["compact_tokens on cpu"]),
    ],
)
def test_a_wrong_byte_fails_the_check_by_name(report, monkeypatch, module, function, checks):
    monkeypatch.setattr(module, function, one_byte_off(getattr(module, function)))
    status, info = report("--json")
    on_cpu = [name for name in failed(info["self_test"]) if "cuda" not in name]
    assert (status, info["ok"], on_cpu) == (1, False, checks)
    text = info_command.as_text(info, [diagnostics.Check(**check) for check in info["self_test"]])
    assert re.search(rf"\n  {checks[0]} +FAILED .*: 1 of \d+ bytes differ from the reference", text)
    assert re.search(r"\nSelf-test: [12] FAILED ", text)


def test_a_wrong_design_fails(monkeypatch):
    honest = coalitions.floyd
    monkeypatch.setattr(coalitions, "floyd", lambda stream, n, k: honest(stream, n, k)[::-1])
    if _native.cpu() is None:
        pytest.skip("operator and reference would lie alike")
    assert [check.name for check in diagnostics.self_test() if not check.ok] == ["sample_coalitions"]


def test_nan_behind_a_mask_is_noticed_even_where_the_reference_lets_it_through(monkeypatch):
    from xaifast.diagnostics import checks

    def leaking(inputs, *args, **kwargs):
        rows = honest(inputs, *args, **kwargs)
        rows[..., -1] = float("nan") if rows.is_floating_point() else 0
        return rows

    honest = checks.ops.mask_inputs
    monkeypatch.setattr(checks.ops, "mask_inputs", leaking)
    monkeypatch.setattr(checks, "_same_bytes", lambda *args: None)
    failure = checks._run("mask_inputs", checks._masking, "cpu")
    assert not failure.ok
    assert "NaN behind a removed player shows" in failure.detail


@pytest.mark.parametrize("scale", [1 + 1e-6, float("nan")])
def test_wrong_shapley_values_fail(monkeypatch, scale):
    from xaifast.diagnostics import checks

    def scaled(*args, **kwargs):
        result = xaifast.kernel_shap(*args, **kwargs)
        return SimpleNamespace(values=result.values * scale)

    monkeypatch.setattr(checks, "kernel_shap", scaled)
    names = [check.name for check in diagnostics.self_test() if not check.ok]
    assert {"kernel_shap on cpu", "TokenDrop on cpu"} <= set(names)


def test_what_raises_is_a_failed_check(monkeypatch):
    from xaifast.diagnostics import checks

    def broken(*args):
        raise OSError("disk on fire")

    monkeypatch.setattr(checks.coalitions_reference, "sample_coalitions", broken)
    (failure,) = (check for check in diagnostics.self_test() if not check.ok)
    assert (failure.name, failure.detail) == ("sample_coalitions", "OSError: disk on fire")


def test_the_self_test_leaves_random_state_and_defaults_alone():
    before = torch.get_rng_state()
    with torch.device("meta"):
        assert not failed([vars(check) for check in diagnostics.self_test()])
    assert torch.equal(torch.get_rng_state(), before)


WITHOUT_NATIVE = """
import sys
sys.modules["xaifast._cpu"] = sys.modules["xaifast._cuda"] = None
from xaifast.cli import main
assert main(["info", "--no-self-test"]) == 0
print("---")
assert main(["info", "--json"]) == 0
"""


def test_without_native_modules_the_report_says_why_and_is_fine(run_python):
    text, _, printed = run_python(WITHOUT_NATIVE).partition("---\n")
    info = json.loads(printed)
    assert {name: module["state"] for name, module in info["native"].items()} == {"_cpu": "absent", "_cuda": "absent"}
    why = "xaifast._cpu was not built; run: pip install -e ."
    assert info["notes"]["xaifast._cpu"] == f"{why}; the reference serves meanwhile"
    assert info["operators"]["select_rows"]["cpu"] == ["reference", why]
    details = {check["name"]: check["detail"] for check in info["self_test"]}
    skipped = {check["name"] for check in info["self_test"] if check["skipped"]}
    assert "cubic_regression" in skipped and "mask_inputs on cpu" not in skipped
    assert details["cubic_regression"] == f"no native kernel is used: {why}"
    assert details["mask_inputs on cpu"].startswith("reference, 7 cases")
    assert re.search(r"\n  xaifast._cpu +absent\n", text)
    assert re.search(rf"\n  select_rows +reference on cpu, for mask_inputs.*; {re.escape(why)}\n", text)


@needs_native
def test_a_native_module_that_does_not_load_fails(run_python):
    code = "from xaifast.cli import main; print(main(['info', '--no-self-test']))"
    text = run_python(code, XAIFAST_CPU_ISA="avx9")
    assert text.endswith("\n1\n")
    assert "is there but does not load: XAIFAST_CPU_ISA must be one of baseline" in text


@needs_native
def test_a_module_of_another_version_fails(report, monkeypatch):
    monkeypatch.setattr(xaifast, "__version__", "9.9.9")
    status, info = report("--json", "--no-self-test")
    assert status == 1
    assert "xaifast 9.9.9" not in info["problems"]["xaifast._cpu"]
    assert "this is 9.9.9; build again" in info["problems"]["xaifast._cpu"]


@needs_native
def test_instruction_sets(report, monkeypatch):
    module = _native.cpu()
    honest = module.build_info()
    assert honest["isa"] in honest["supported"]
    assert honest["supported"] == honest["isas"][: len(honest["supported"])]
    monkeypatch.setattr(module, "build_info", lambda: {**honest, "isas": ["baseline", "v9"], "supported": ["baseline"]})
    assert "chosen of baseline, v9 (not on this processor)" in report("--no-self-test")[1]


def test_an_unknown_backend_is_a_problem(report, monkeypatch):
    monkeypatch.setenv("XAIFAST_BACKEND", "fast")
    status, info = report("--json", "--no-self-test")
    assert status == 1
    assert info["environment"]["XAIFAST_BACKEND"] == "fast"
    assert "got 'fast'" in info["problems"]["XAIFAST_BACKEND"]
    assert "XAIFAST_BACKEND" in report("--no-self-test")[1]


def test_a_mistyped_variable_is_noted(report, monkeypatch):
    monkeypatch.setenv("XAIFAST_BACKENDS", "native")
    status, info = report("--json", "--no-self-test")
    assert status == 0
    assert "no such variable" in info["notes"]["XAIFAST_BACKENDS"]


def test_a_missing_extra_is_named_with_what_brings_it(report, monkeypatch):
    honest = installation._version
    monkeypatch.setattr(installation, "_version", lambda name: None if name in ("pandas", "pillow") else honest(name))
    status, info = report("--json", "--no-self-test")
    assert (status, info["extras"]["data"]["pandas"]) == (0, None)
    assert info["notes"]["pillow, pandas"] == "for folders of images and tables: pip install 'xaifast[data]'"
    assert "pandas missing" in report("--no-self-test")[1]


SERVED = """
import sys, torch, xaifast
from xaifast import ops
from xaifast.attribution import _adjusted
from xaifast.diagnostics import operator_backends
from xaifast.ops import occlude as occlude_op, perturb_rows as perturb_op, ranking as ranking_op
from xaifast.reference import coalitions, masking, perturb, ranking, tokens
called = set()
def spy(module, name, kernel):
    honest = getattr(module, name)
    def seen(*args, **kwargs):
        called.add(kernel)
        return honest(*args, **kwargs)
    setattr(module, name, seen)
spy(masking, "select_rows", "select_rows")
spy(tokens, "compact_rows", "compact_rows")
spy(coalitions, "sample_coalitions", "sample_coalitions")
spy(_adjusted.TorchRegressions, "__call__", "cubic_regression")
spy(perturb, "perturb_rows", "perturb_rows")
spy(ranking, "rank_features", "rank_features")
spy(occlude_op._TorchSteps, "__call__", "occlude_linear")
present = torch.ones(1, 2, dtype=torch.bool)
ops.mask_inputs(torch.ones(1, 2), present)
ops.compact_tokens(torch.ones(1, 2, 1), present, torch.arange(2), 2)
ops.sample_coalitions(5, 8)
xaifast.kernel_shap(lambda x: x.prod(1), torch.rand(1, 6), n_samples=30, estimator="adjusted")
ops.perturb_by_rank(torch.ones(1, 2), torch.arange(2)[None], insertion_counts=[1])
ops.rank_features(torch.ones(1, 2))
ops.occlude_linear(torch.ones(1, 2), torch.ones(3, 2), [torch.ones(1, 3)], [torch.ones(2, 3)])
said = {name for name, served in operator_backends().items() if served["cpu"][0] == "reference"}
assert said == called, (said, called)
print(len(said))
"""


@needs_native
@pytest.mark.parametrize(("backend", "referring"), [("auto", 0), ("native", 0), ("triton", 7), ("reference", 7)])
def test_what_serves_is_what_is_said(run_python, backend, referring):
    assert run_python(SERVED, XAIFAST_BACKEND=backend).strip() == str(referring)


@pytest.mark.parametrize(
    ("capability", "archs", "expected"),
    [
        ((9, 0), ["80", "90", "120+PTX"], "sm_90"),
        ((8, 9), ["80", "90"], "sm_80"),
        ((8, 0), ["86", "90+PTX"], None),
        ((7, 5), ["80", "80+PTX"], None),
        ((12, 1), ["80", "90", "120", "120+PTX"], "sm_120"),
        ((13, 0), ["120", "90+PTX", "120+PTX"], "PTX of compute_120"),
        ((9, 0), ["90a"], "sm_90a"),
        ((9, 1), ["90a", "90a+PTX"], None),
        ((10, 3), ["100f"], "sm_100f"),
        ((11, 0), ["100f", "100f+PTX"], None),
        ((9, 0), ["native"], None),
        ((9, 0), [], None),
    ],
)
def test_which_code_a_gpu_runs(capability, archs, expected):
    assert covering(capability, archs) == expected


@pytest.fixture
def a_gpu(monkeypatch):
    """Makes torch report a GPU of compute capability 8.6, and `xaifast._cuda` the architectures given."""

    def install(*archs):
        properties = SimpleNamespace(name="Some GPU", major=8, minor=6, total_memory=24 * 2**30)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
        module = SimpleNamespace(build_info=lambda: {"archs": list(archs), "cuda": "13.0"})
        monkeypatch.setattr(_native, "cuda", lambda: module)
        monkeypatch.setattr(_native, "why_missing", lambda: {})

    return install


def test_a_gpu_that_is_covered(report, a_gpu):
    a_gpu("80", "90+PTX")
    status, text = report("--no-self-test")
    assert status == 0
    assert re.search(r"\n  cuda:0 +Some GPU, 24.0 GiB, compute capability 8.6, runs sm_80 of xaifast._cuda\n", text)
    assert re.search(r"\n  compact_rows +native on cpu, native on cuda, for compact_tokens\n", text)
    assert re.search(r"\n  sample_coalitions +native on cpu, for designs\n", text)


def test_a_gpu_that_is_not_covered(report, a_gpu):
    a_gpu("90", "90+PTX")
    _, info = report("--json", "--no-self-test")
    assert info["gpus"][0]["code"] is None
    assert "no code for compute capability 8.6; build with XAIFAST_CUDA_ARCHS=86-real" in info["notes"]["GPU 0"]


def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(warnings.warn("driver too old", stacklevel=1)))
    assert "no CUDA device: driver too old; look at nvidia-smi" in diagnostics.collect()["notes"]["GPU"]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in diagnostics.collect()["notes"]["GPU"]


def test_optional_packages_are_not_imported(run_python):
    modules = "transformers datasets PIL pandas pyarrow skimage sklearn matplotlib jinja2 shap captum triton"
    code = f"import sys; from xaifast import diagnostics; diagnostics.collect()\n\
print(sorted(set(sys.modules) & set({modules.split()!r})))"
    assert run_python(code).strip() == "[]"


def test_every_variable_in_the_docs_is_reported():
    path = ROOT / "docs" / "environment.md"
    if not path.exists():
        pytest.skip("needs the source tree")
    assert sorted(VARIABLES) == sorted(re.findall(r"^\| `(\w+)`", path.read_text(), re.MULTILINE))


def test_extras_bring_what_is_said():
    tomllib = pytest.importorskip("tomllib")
    path = ROOT / "pyproject.toml"
    if not path.exists():
        pytest.skip("needs the source tree")
    declared = tomllib.loads(path.read_text())["project"]["optional-dependencies"]
    for extra, (_, names) in EXTRAS.items():
        brought = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in declared.get(extra, [])}
        assert set(names) <= brought, extra


def test_every_native_kernel_is_reported():
    if _native.cpu() is None:
        pytest.skip("no native module")
    helpers = {"nth_set_bit", "philox_words", "pack_bits", "unpack_bits", "build_info"}
    functions = {name for name in vars(_native.cpu()) if not name.startswith("_")} - helpers
    functions = functions - {"occlude_step", "occlude_certify"} | {"occlude_linear"}  # one operator's two kernels
    assert functions == {name for name, (_, cpu, _) in KERNELS.items() if cpu == "native"}
