"""The checks of tools/check_wheel.py notice what is wrong with a wheel, and what CI and release ask for exists."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xaifast import _native

ROOT = Path(__file__).resolve().parent.parent
NAME = "xaifast-0.1.0+cu130-cp311-cp311-manylinux_2_28_x86_64.whl"

pytestmark = pytest.mark.skipif(not (ROOT / "tools").exists(), reason="needs the source tree")


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import build_wheels
    import check_wheel
    import interpreters

    return type("Tools", (), {"build": build_wheels, "check": check_wheel, "interpreters": interpreters})


@pytest.fixture
def program(tmp_path):
    """Makes a program that prints a text and exits with a status."""

    def make(name, text, status=0):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
        path.chmod(0o755)
        return path

    return make


def test_names(tools):
    name = tools.check.parse_name(Path(NAME))
    assert (name.version, name.python, name.modules) == ("0.1.0+cu130", "3.11", ["_cpu", "_cuda"])
    both = "xaifast-1.0-cp310-cp310-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl"
    assert tools.check.parse_name(Path(both)).platforms == ("manylinux_2_27_x86_64", "manylinux_2_28_x86_64")
    assert tools.check.parse_name(Path(both)).modules == ["_cpu"]
    for wrong in ("other-1.0-cp310-cp310-linux_x86_64.whl", "xaifast-1.0-cp310-abi3-linux_x86_64.whl", "xaifast.whl"):
        with pytest.raises(ValueError, match="a wheel must be named"):
            tools.check.parse_name(Path(wrong))


@pytest.mark.parametrize(
    ("tag", "needs", "newest", "ok"),
    [
        ("manylinux_2_28_x86_64", "manylinux_2_28_x86_64", None, True),
        ("manylinux_2_34_x86_64", "manylinux_2_28_x86_64", None, True),
        ("manylinux_2_9_x86_64", "manylinux_2_28_x86_64", None, False),
        ("manylinux_2_27_x86_64.manylinux_2_28_x86_64", "manylinux_2_28_x86_64", None, False),
        ("manylinux_2_34_x86_64", "manylinux_2_28_x86_64", (2, 28), False),
        ("manylinux_2_28_x86_64", "manylinux_2_28_x86_64", (2, 28), True),
        ("manylinux_2_28_x86_64", "linux_x86_64", None, False),
        ("linux_x86_64", "manylinux_2_28_x86_64", None, False),
    ],
)
def test_tags(tools, program, tag, needs, newest, ok):
    auditwheel = [str(program("auditwheel", f'{{"sym_tag": "{needs}"}}'))]
    wheel = Path(f"xaifast-0.1.0-cp311-cp311-{tag}.whl")
    assert tools.check.check_tag(wheel, auditwheel, newest).ok is ok
    assert tools.check.check_tag(wheel, None, newest).ok is None


ELF = "ELF file    {}: compact.sm_{}.cubin"
LISTED = [
    ELF.format(1, 80),
    ELF.format(2, 90),
    ELF.format(3, 100),
    "PTX file    1: compact.sm_120.ptx",
    ELF.format(4, 120),
]


@pytest.mark.parametrize("dropped", [None, 0, 3, 4])
def test_architectures(tools, program, dropped):
    lines = [line for i, line in enumerate(LISTED) if i != dropped]
    found = tools.check.check_archs({"_cuda": Path("x.so")}, program("cuobjdump", "\n".join(lines)))
    assert found.ok is (dropped is None)
    assert dropped is not None or found.text == "80 90 100 120 120+PTX"


def test_architectures_that_cannot_be_checked(tools):
    assert tools.check.check_archs({"_cuda": Path("x.so")}, None).ok is None
    assert tools.check.check_archs({"_cpu": Path("x.so")}, None) == tools.check.Finding("-")


@pytest.mark.parametrize(
    ("library", "ok"),
    [
        ("libm.so.6", True),
        ("libtorch_cpu.so", False),
        ("libc10.so", False),
        ("libcudart.so.13", False),
        ("libcuda.so.1", False),
        ("libpython3.11.so.1.0", False),
    ],
)
def test_needed_libraries(tools, program, monkeypatch, library, ok):
    lines = [f" 0x0000000000000001 (NEEDED)             Shared library: [{name}]" for name in ("libc.so.6", library)]
    readelf = program("readelf", "\n".join([*lines, " 0x000000000000000e (SONAME)  Library soname: [libtorch.so]"]))
    monkeypatch.setenv("PATH", str(readelf.parent), prepend=":")
    assert tools.check.check_needed({"_cpu": Path("x.so")}).ok is ok


def test_a_module_that_needs_nothing_was_not_read(tools, program, monkeypatch):
    monkeypatch.setenv("PATH", str(program("readelf", "").parent), prepend=":")
    assert tools.check.check_needed({"_cpu": Path("x.so")}).ok is False


@pytest.mark.skipif(shutil.which("readelf") is None or _native.cpu() is None, reason="needs readelf and the module")
def test_libraries_of_the_module_in_use(tools):
    found = tools.check.check_needed({"_cpu": Path(_native.cpu().__file__)})
    assert found.ok and "stdc++" in found.text.split()


def test_size(tools, tmp_path):
    wheel = tmp_path / NAME
    wheel.write_bytes(bytes(3_000_000))
    assert tools.check.check_size(wheel) == tools.check.Finding("3.00 MB", True)
    wheel.write_bytes(bytes(3_000_001))
    assert tools.check.check_size(wheel).ok is False


def said(tools, **changes):
    cpu = {"version": "0.1.0", "openmp": True, "isas": ["baseline", "v3", "v4"]}
    cuda = {"cuda": "13.0.88", "archs": list(tools.check.RELEASE_ARCHS)}
    told = {"version": "0.1.0+cu130", "modules": {"_cpu": cpu, "_cuda": cuda}}
    for path, value in changes.items():
        *groups, last = path.split("__")
        target = told
        for group in groups:
            target = target[group]
        target[last] = value
    return told


def test_what_modules_say_of_themselves(tools):
    name = tools.check.parse_name(Path(NAME))
    assert tools.check.wrong_build(name, said(tools)) == []
    plain = tools.check.parse_name(Path(NAME.replace("+cu130", "")))
    assert tools.check.wrong_build(plain, said(tools)) == ["has the modules ['_cpu', '_cuda']"]
    wrong = {
        "version": "0.1.0",
        "modules___cpu__version": "0.0.9",
        "modules___cpu__openmp": False,
        "modules___cpu__isas": ["baseline"],
        "modules___cuda__cuda": "12.8.0",
        "modules___cuda__archs": ["90"],
    }
    expected = ["metadata say", "is of 0.0.9", "lacks OpenMP", "for baseline only", "CUDA 12.8.0", "is for 90"]
    for (path, value), words in zip(wrong.items(), expected, strict=True):
        (claim,) = tools.check.wrong_build(name, said(tools, **{path: value}))
        assert words in claim


def test_what_info_says(tools, tmp_path):
    name = tools.check.parse_name(Path(NAME))
    native = {"_cpu": {"state": "loaded"}, "_cuda": {"state": "loaded"}}
    info = {
        "location": str(tmp_path / "lib" / "xaifast"),
        "native": native,
        "self_test": [{"name": "mask_inputs", "ok": True}],
        "problems": {},
        "ok": True,
    }
    wrong = tools.check.wrong_info
    assert wrong(name, tmp_path, info) == []
    assert wrong(name, tmp_path / "other", info) == [f"ran the xaifast of {info['location']}"]
    assert wrong(name, tmp_path, {**info, "native": {**native, "_cuda": {"state": "broken"}}}) == ["_cuda not loaded"]
    failed = {**info, "self_test": [{"name": "mask_inputs", "ok": False}], "ok": False}
    assert wrong(name, tmp_path, failed) == ["mask_inputs failed"]
    assert wrong(name, tmp_path, {**info, "problems": {"X": "is odd"}, "ok": False}) == ["X is odd"]


def test_the_table_names_failures(tools):
    Finding = tools.check.Finding
    row = [Finding(NAME), *[Finding("fine")] * 4, Finding("no torch", None), Finding("-")]
    assert tools.check.passed([row]) and not tools.check.passed([row], strict=True)
    row[2] = Finding("a tag that is wrong", False)
    assert not tools.check.passed([row])
    assert f"FAILED {NAME}, tag: a tag that is wrong" in tools.check.as_table([row]).splitlines()


def test_interpreters_that_do_not_run_are_left_out(tools, program, tmp_path, monkeypatch):
    shim = program("python3.10", "pyenv: python3.10: command not found", 127)
    assert tools.interpreters.probe(shim) is None
    assert tools.interpreters.probe(tmp_path / "nothing") is None
    assert tools.interpreters.probe(program("talker", "hello")) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setattr(tools.interpreters, "ROOT", tmp_path)
    found = tools.interpreters.find_interpreters()
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert list(found) == [here]
    assert found[here].path == Path(sys.executable) and found[here].torch


def test_commands_that_fail_say_why(tools, program):
    with pytest.raises(RuntimeError, match=r"no failed \(3\): one \| two"):
        tools.interpreters.output(program("no", "one\ntwo", 3))
    assert tools.interpreters.output(program("maybe", "text", 3), tolerate=[3]) == "text\n"


@pytest.mark.parametrize(
    ("release", "kinds"), [("13.0", ["cpu", "cu130"]), ("13.2", ["cpu", "cu130"]), ("12.8", ["cpu"]), (None, ["cpu"])]
)
def test_cuda_wheels_need_cuda_13(tools, program, monkeypatch, capsys, release, kinds):
    nvcc = program("nvcc", f"Cuda compilation tools, release {release}, V{release}.88", 0 if release else 1)
    monkeypatch.setenv("CUDACXX", str(nvcc) if release else str(nvcc.parent / "nothing"))
    assert list(tools.build.possible_kinds()) == kinds
    assert ("no +cu130 wheels" in capsys.readouterr().err) == (len(kinds) == 1)


def test_what_an_architecture_list_is_recorded_as(tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    script = tmp_path / "names.cmake"
    for archs, expected in {
        "80-real;120-real;120-virtual": "80,120,120+PTX",
        "100": "100,100+PTX",
        "90a": "90a,90a+PTX",
        "90-real;100;100-virtual": "90,100,100+PTX",
        "all-major": "all-major",
    }.items():
        script.write_text(
            f'include("{ROOT}/cmake/CudaArchs.cmake")\nxaifast_cuda_arch_names(names {archs})\nmessage("=${{names}}")\n'
        )
        done = subprocess.run([cmake, "-P", script], capture_output=True, text=True)
        assert f"={expected}\n" in done.stderr, done.stderr


def test_cu130_is_for_the_architectures_that_are_checked(tools):
    settings = (ROOT / "pyproject.toml").read_text()
    (archs,) = re.findall(r'^cmake\.define\.XAIFAST_CUDA_ARCHS = "(.*)"', settings, flags=re.M)
    names = [arch.replace("-real", "").replace("-virtual", "+PTX") for arch in archs.split(";")]
    assert names == tools.check.RELEASE_ARCHS
    (build,) = re.findall(r'^build = "cp31{(.*)}-manylinux_x86_64"', settings, flags=re.M)
    assert tuple(f"3.1{minor}" for minor in build.split(",")) == tools.interpreters.VERSIONS


def workflow_steps(name):
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    assert workflow[True]  # YAML reads the key "on" as a boolean
    return workflow["jobs"], [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", ["ci", "release"])
def test_workflows_name_what_exists(name):
    jobs, steps = workflow_steps(name)
    assert all(("run" in step) != ("uses" in step) for step in steps)
    assert all(set(job.get("needs", [])) <= set(jobs) for job in jobs.values())
    commands = "\n".join(step.get("run", "") for step in steps)
    targets = set(re.findall(r"^make (\w+)", commands, flags=re.M))
    assert targets <= set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), flags=re.M))
    scripts = set(re.findall(r"\btools/\w+\.py", commands))
    assert scripts and all((ROOT / script).exists() for script in scripts)


def test_only_cpu_wheels_go_to_pypi_and_only_for_a_tag():
    jobs, _ = workflow_steps("release")
    assert jobs["pypi"]["permissions"] == {"id-token": "write"}
    assert jobs["pypi"]["steps"][0]["with"]["pattern"] == "{sdist,wheels-cpu}"
    assert all(jobs[name]["if"] == "github.event_name == 'push'" for name in ("pypi", "github"))
    kinds = {entry["kind"]: entry["environment"] for entry in jobs["wheels"]["strategy"]["matrix"]["include"]}
    assert set(kinds) == {"cpu", "cu130"} and "XAIFAST_CU130=1" in kinds["cu130"]


@pytest.mark.slow
def test_a_real_wheel(tools, tmp_path):
    interpreter = tools.interpreters.probe(Path(sys.executable))
    if interpreter is None or not tools.build.has_backend(interpreter):
        pytest.skip("needs pip, scikit-build-core and pybind11")
    wheel = tools.build.build_wheel(ROOT, interpreter, tools.build.KINDS["cpu"], True, tmp_path)
    settings = tools.check.Settings(offline=True)
    row = tools.check.check(wheel, {interpreter.version: interpreter}, settings)
    assert tools.check.passed([row]), tools.check.as_table([row])
    assert (row[2].ok, row[5].text) == (None, "ok")
    assert re.fullmatch(r"torch \S+ ok", row[6].text)

    pretender = wheel.rename(wheel.with_name(wheel.name.replace("-cp", "+cu130-cp", 1)))
    verdicts = tools.check.check(pretender, {interpreter.version: interpreter}, settings)
    assert [verdict.ok for verdict in verdicts[5:]] == [False, False]
