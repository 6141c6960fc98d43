"""Compile every Triton kernel for its GPU targets, without a GPU, and report what each variant uses.

Prints registers, local memory (spills), shared memory and the widest global store; exits with 1 where a variant uses
local memory or lacks its vectorised store.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ARCHS = (80, 90, 100, 120)


@dataclass(frozen=True)
class Usage:
    """What one variant needs on one target."""

    variant: str
    arch: int
    registers: int
    local: int
    stack: int
    shared: int
    store_bits: int
    store_bits_wanted: int

    @property
    def ok(self) -> bool:
        """Nothing spilled and stores as wide as they must be."""
        return self.local == 0 and self.stack == 0 and self.store_bits >= self.store_bits_wanted


def widest_store(ptx: str) -> int:
    """Return the width in bits of the widest global store in PTX."""
    widths = [int(n or "v1"[1:]) * int(bits) for n, bits in re.findall(r"st\.global(?:\.v(\d))?\.b(\d+)", ptx)]
    return max(widths, default=0)


def measure(variant, arch: int) -> Usage:
    """Compile one variant for one target and read its resources from the binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    source = ASTSource(
        variant.kernel,
        signature=variant.signature,
        constexprs={(names.index(key),): value for key, value in variant.constexprs.items()},
        attrs={(names.index(key),): [["tt.divisibility", 16]] for key in variant.divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": variant.num_warps})
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [str(cuobjdump), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|LOCAL|STACK|SHARED):(\d+)", report)}
    return Usage(
        variant.name,
        arch,
        used["REG"],
        used["LOCAL"],
        used["STACK"],
        compiled.metadata.shared,
        widest_store(compiled.asm["ptx"]),
        variant.store_bits,
    )


def measure_all() -> list[Usage]:
    """Measure every variant of every kernel for every target."""
    from xaifast.kernels import variants

    return [measure(variant, arch) for variant in variants() for arch in ARCHS]


def main() -> int:
    """Print the table; return the exit status."""
    usages = measure_all()
    print(f"{'variant':40} {'sm':>4} {'registers':>9} {'local':>6} {'stack':>6} {'shared':>7} {'store bits':>10}")
    for u in usages:
        verdict = "" if u.ok else "  <- local memory or narrow stores"
        print(
            f"{u.variant:40} {u.arch:4} {u.registers:9} {u.local:6} {u.stack:6} {u.shared:7} {u.store_bits:10}{verdict}"
        )
    return 0 if all(u.ok for u in usages) else 1


if __name__ == "__main__":
    sys.exit(main())
