"""The regression watch: what it reads, what it concludes, and one real count."""

import importlib
import itertools
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xaifast import _native

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "bench" / "compare.py").exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def bench():
    """Modules of bench/ by name."""
    sys.path[:0] = [str(ROOT / "bench")]
    yield importlib.import_module
    sys.path.remove(str(ROOT / "bench"))


def test_the_total_is_read(bench):
    tool = bench("instructions")
    assert tool.total("events: Ir\nsummary: 12\nfn=(1) totals: 3\n4 5\n\ntotals: 1234567\n") == 1234567
    with pytest.raises(ValueError, match="must end with a line of totals"):
        tool.total("events: Ir\nsummary: 12\n")


def test_a_change_beyond_the_threshold_is_worse(bench):
    tool = bench("instructions")
    base = tool.Counts({"a": 1000.0, "b": 1000.0, "c": 1000.0}, {})
    head = tool.Counts({"a": 1020.0, "b": 1021.0, "c": 500.0}, {})
    changes = tool.compare("v3", base, head)
    assert [change.percent for change in changes] == pytest.approx([2.0, 2.1, -50.0])
    assert [change.worse(2.05) for change in changes] == [False, True, False]
    lines = tool.table(changes, 2.05).splitlines()
    assert lines[2].split() == ["b", "v3", "1,000", "1,021", "+2.10", "%", "<-", "more"]
    assert not [line for line in (lines[1], lines[3]) if "<-" in line]


def test_a_kernel_of_one_side_is_named_and_not_judged(bench):
    tool = bench("instructions")
    old = tool.Counts({"gone": 10.0}, {"new": "new_kernel is missing"})
    new = tool.Counts({"new": 10.0}, {"gone": "takes other arguments"})
    changes = {change.case: change for change in tool.compare("v3", old, new)}
    assert changes["new"].note == "base: new_kernel is missing"
    assert changes["gone"].note == "head: takes other arguments"
    assert not any(change.worse(0) for change in changes.values())
    assert "(base: new_kernel is missing)" in tool.table(list(changes.values()), 2)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 12, 15])
def test_sign_interval_by_enumeration(bench, n):
    # The values above the median of their law are any subset with equal probability.
    low, high, coverage = bench("ratios").sign_interval(range(n, 0, -1))
    cut = int(low) - 1
    assert high == n - cut

    def covered(k):
        """Probability that the k + 1st smallest lies below the median, and the k + 1st largest above."""
        below = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]
        return sum(k < count < n - k for count in below) / 2**n

    assert coverage == pytest.approx(covered(cut))
    if n >= 6:
        assert coverage >= 0.95 > covered(cut + 1)
    else:
        assert cut == 0


def test_ratios_are_taken_within_a_round(bench):
    ratio = bench("ratios").summarise([1.0, 10.0, 2.0, 1.0, 4.0, 1.0], [1.1, 11.0, 2.2, 1.1, 4.4, 1.1])
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    assert ratio.rounds == 6
    assert math.isclose(ratio.base_seconds, 1.5)


def test_a_job_that_does_not_run_says_why(bench, tmp_path):
    (tmp_path / "xaifast").mkdir()
    (tmp_path / "xaifast" / "__init__.py").write_text("raise ImportError('made of straw')")
    with pytest.raises(RuntimeError, match="base does not run lenet, wls: ImportError: made of straw"):
        bench("ratios").interleave(tmp_path, tmp_path, "lenet", "wls", 6)


def test_the_working_tree_is_exported_without_what_git_ignores(bench, tmp_path):
    compare = bench("compare")
    if subprocess.run(["git", "rev-parse", "--git-dir"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("needs a git checkout")
    tree = compare.export(compare.WORKING_TREE, tmp_path / "tree")
    assert (tree / "CMakeLists.txt").read_bytes() == (ROOT / "CMakeLists.txt").read_bytes()
    assert (tree / "bench" / "compare.py").exists()
    assert not list(tree.rglob("*.so"))
    assert (compare.export("HEAD", tmp_path / "commit") / "CMakeLists.txt").exists()
    with pytest.raises(RuntimeError, match="git archive nonsense"):
        compare.export("nonsense", tmp_path / "nothing")


def test_every_case_and_every_edge_is_a_call_the_kernels_take(bench):
    native = _native.cpu()
    if native is None:
        pytest.skip(f"no native module: {_native.why_missing()}")
    calls = bench("kernel_calls")
    report = calls.count(native, calls.CASES)
    assert report["measured"] == list(calls.CASES)
    assert report["missing"] == {}
    kernels = {case.split()[0] for case in calls.CASES}
    for call in itertools.islice(calls.edge_calls(), 0, None, 7):
        call.bind(native)()
        assert call.kernel in kernels


def test_a_kernel_that_is_missing_or_takes_other_arguments_is_no_failure(bench):
    calls = bench("kernel_calls")

    class Old:
        @staticmethod
        def compact_rows(a, b):
            raise AssertionError

        @staticmethod
        def sample_coalitions(*_):
            raise ValueError("sample_coalitions: design must be 0, 1 or 2")

    report = calls.count(Old, ["compact_rows", "cubic_regression", "sample_coalitions grouped"])
    assert report["measured"] == []
    assert report["missing"] == {
        "compact_rows": "takes other arguments",
        "cubic_regression": "cubic_regression is missing",
        "sample_coalitions grouped": "sample_coalitions: design must be 0, 1 or 2",
    }


def test_counts_are_real_and_repeat(bench):
    native = _native.cpu()
    if native is None or shutil.which("valgrind") is None:
        pytest.skip("needs the native module and valgrind")
    tool = bench("instructions")
    cases = ["select_rows columns", "compact_rows"]
    first, second = (tool.count(Path(native.__file__), "baseline", cases).per_call for _ in range(2))
    assert list(first) == cases
    # A row of 5003 * 8 bytes, twice, in registers of 16 bytes: three reads of a vector and a write at least.
    assert first["select_rows columns"] > 4 * 2 * 5003 * 8 / 16
    assert second == pytest.approx(first, rel=1e-3)


def test_an_unknown_instruction_set_is_said(bench):
    native = _native.cpu()
    if native is None or shutil.which("valgrind") is None:
        pytest.skip("needs the native module and valgrind")
    with pytest.raises(RuntimeError, match="XAIFAST_CPU_ISA must be one of baseline"):
        bench("instructions").count(Path(native.__file__), "avx9")
