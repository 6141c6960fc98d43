"""Did a change make anything slower? Two commits, side by side.

    python bench/compare.py [BASE [HEAD]] [--threshold 2] [--jobs lenet] [--rounds 12] [--no-kernels]

BASE is origin/main if there is one, else HEAD~1; HEAD is the working tree unless a commit is named. The CPU kernels of
both are built and their instructions counted (status 1 if a count grew by more than the threshold, in percent); jobs
are timed by turns and reported, never failed. docs/regressions.md shows how to read it.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import instructions
import ratios

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from build_cpu import build  # noqa: E402

CONTENDERS = {"lenet": "wls", "tabular": "wls", "vit": "pixels, wls"}
WORKING_TREE = "the working tree"


def git(*arguments: str) -> bytes:
    """Output of git in this repository.

    Raises:
        RuntimeError: With what git said.
    """
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    if result.returncode:
        raise RuntimeError(f"git {' '.join(arguments)}: {result.stderr.decode().strip()}")
    return result.stdout


def default_base() -> str:
    """origin/main where it exists, else the commit before."""
    try:
        git("rev-parse", "--verify", "--quiet", "origin/main^{commit}")
    except RuntimeError:
        return "HEAD~1"
    return "origin/main"


def export(commit: str, folder: Path) -> Path:
    """Write a commit, or the working tree without what git ignores, into a folder; the repository is left alone."""
    folder.mkdir()
    if commit == WORKING_TREE:
        for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").decode().split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
    else:
        with tarfile.open(fileobj=io.BytesIO(git("archive", f"{commit}^{{commit}}"))) as archive:
            archive.extractall(folder, filter="data")
    return folder


def prepare(commit: str, folder: Path) -> tuple[Path, Path]:
    """Export and build; return the checkout, from which xaifast can be imported, and its `_cpu`."""
    checkout = export(commit, folder)
    module = build(checkout, folder.with_name(folder.name + "-build"))
    shutil.copy(module, checkout / "xaifast")
    if (checkout / "kernels").is_dir():
        (checkout / "xaifast" / "kernels").symlink_to(checkout / "kernels")
    return checkout, module


def compare_kernels(base: Path, head: Path, threshold: float) -> bool:
    """Print the table of instructions; return whether none grew."""
    changes = []
    for isa in instructions.ISAS:
        try:
            changes += instructions.compare(isa, instructions.count(base, isa), instructions.count(head, isa))
        except RuntimeError as error:
            print(error)
    print(instructions.table(changes, threshold))
    print("v4 is not counted: valgrind does not run AVX-512")
    return bool(changes) and not any(change.worse(threshold) for change in changes)


def compare_job(base: Path, head: Path, job: str, rounds: int) -> None:
    """Print the ratio of one job, or why there is none."""
    try:
        r = ratios.interleave(base, head, job, CONTENDERS[job], rounds)
    except RuntimeError as error:
        print(f"{job:10} not compared: {error}")
        return
    verdict = "no difference seen" if r.low <= 1 <= r.high else "slower" if r.median > 1 else "faster"
    print(
        f"{job:10} head / base {r.median:.3f} [{r.low:.3f}, {r.high:.3f}], {verdict} ({r.coverage:.0%} interval, "
        f"{r.rounds} rounds; base {r.base_seconds:.3f} s, head {r.head_seconds:.3f} s)",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", metavar="BASE", help="a commit; default: origin/main, else HEAD~1")
    parser.add_argument("head", nargs="?", metavar="HEAD", default=WORKING_TREE, help=f"default: {WORKING_TREE}")
    parser.add_argument("--threshold", type=float, default=2.0, help="percent of instructions (default 2)")
    parser.add_argument("--jobs", nargs="*", choices=sorted(CONTENDERS), default=["lenet"], help="none: --jobs alone")
    parser.add_argument("--rounds", type=int, default=12, help="of each job (default 12, at least 6)")
    parser.add_argument("--no-kernels", action="store_true", help="jobs only")
    arguments = parser.parse_args()
    if arguments.rounds < 6:
        parser.error("--rounds must be at least 6: fewer give no interval of 95 %")
    if not arguments.no_kernels and shutil.which("valgrind") is None:
        print("compare: valgrind must be installed to count instructions; --no-kernels does without", file=sys.stderr)
        return 2
    commits = (arguments.base or default_base(), arguments.head)
    sound = True
    with tempfile.TemporaryDirectory(prefix="xaifast-compare-") as folder:
        try:
            sides = [prepare(commit, Path(folder).resolve() / name) for commit, name in zip(commits, "ab", strict=True)]
        except RuntimeError as error:
            print(f"compare: {error}", file=sys.stderr)
            return 2
        print(f"base {commits[0]}, head {commits[1]}\n", flush=True)
        (base, base_module), (head, head_module) = sides
        if not arguments.no_kernels:
            sound = compare_kernels(base_module, head_module, arguments.threshold)
            print(flush=True)
        for job in arguments.jobs:
            compare_job(base, head, job, arguments.rounds)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
