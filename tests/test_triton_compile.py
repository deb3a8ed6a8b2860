"""Every Triton kernel compiles for every chip it is for, within the chip's limits; compile_kernels.py does it.

A capped set of shapes here; `make compile-all` compiles them all, with Triton 3.6 too.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = {"write_keys", "write_queries", "score", "top_k", "attend", "merge", "widen", "scale_queries"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The lines that compile_kernels.py prints."""
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.startswith("Triton "), result.stderr[-3000:]
    return result.stdout.splitlines()[1:]


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_kernels_compile_within_the_limits_of_the_chip(arch, compiled):
    mine = [line for line in compiled if line.startswith(f"sm{arch} ")]
    assert {line.split()[1] for line in mine} == KERNELS
    assert [line for line in mine if "TOO MUCH" in line] == []
