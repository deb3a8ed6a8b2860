"""Compile the Triton kernels for chips that are not here, through the wrappers that launch them.

    python tests/compile_kernels.py [--all] [--arch 80 ...] [--kernel attend]     status 1 if a limit is exceeded

Each line: chip, kernel, shape, shared memory, registers a thread, bytes of stack (spilled registers), milliseconds.
A driver that has no device stands in for CUDA's; kernels are compiled as they would be launched, never run.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vllm_dsa import cache
from vllm_dsa.kernels import Norms, Rope, triton_attend, triton_configs, triton_select, triton_write
from vllm_dsa.metadata import Rows

MAX_SPILLED = 64  # bytes a thread
# With Triton 3.6, which all supported vLLMs have on GPUs, no kernel takes more; with 3.9 attend with more than 16 heads
# and top-k do.
MAX_SPILLED_LATER = 1088
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Shape:
    """Sizes as named in ``vllm_dsa.kernels``."""

    heads: int = 16
    fp8: bool = True
    dtype: torch.dtype = torch.bfloat16
    rank: int = 512
    rope_dim: int = 64
    index_heads: int = 64
    index_dim: int = 128
    top_k: int = 2048
    block_size: int = 64
    interleaved: bool = False

    def __str__(self) -> str:
        cached = "fp8_ds_mla" if self.fp8 else str(self.dtype).removeprefix("torch.")
        return (
            f"{cached} heads {self.heads}, latent {self.rank}+{self.rope_dim}, "
            f"index {self.index_heads}x{self.index_dim}{' interleaved' if self.interleaved else ''}, "
            f"top_k {self.top_k}, block {self.block_size}"
        )


V32, GLM = Shape(), Shape(index_heads=32, interleaved=True)
CAPPED = (V32, replace(V32, fp8=False, heads=128))
ALL = (
    *(replace(V32, heads=heads, fp8=fp8) for heads, fp8 in itertools.product((1, 8, 16, 32, 64, 128), (True, False))),
    GLM,
    replace(GLM, fp8=False, heads=8),
    *(replace(V32, fp8=False, rank=rank, rope_dim=rope) for rank, rope in itertools.product((128, 256), (32, 64))),
    *(replace(V32, index_heads=heads, index_dim=dim) for heads, dim in itertools.product((8, 16, 64), (64, 128))),
    *(replace(V32, top_k=top_k) for top_k in (16, 64, 512, 1024, 4096)),
    *(replace(V32, block_size=size) for size in (16, 32, 48, 128)),
    *(replace(V32, dtype=torch.float32, fp8=fp8) for fp8 in (True, False)),
    replace(V32, dtype=torch.float32, fp8=False, rank=128, rope_dim=32, heads=4, top_k=16, index_heads=4, index_dim=64),
)


@dataclass(frozen=True)
class Compiled:
    """What one launch would run."""

    arch: int
    kernel: str
    shape: str
    shared: int
    registers: int
    stack: int
    may_spill: int
    seconds: float

    def faults(self) -> list[str]:
        limit = triton_configs.SHARED_KB[self.arch] * 1024
        found = [f"{self.shared} bytes of shared memory, the chip has {limit}"] if self.shared > limit else []
        return found + ([f"{self.stack} bytes of spilled registers"] if self.stack > self.may_spill else [])

    def __str__(self) -> str:
        return (
            f"sm{self.arch:<4}{self.kernel:22}{self.shape}: {self.shared / 1024:.1f} KB shared, "
            f"{self.registers} registers, {self.stack} stack, {1000 * self.seconds:.0f} ms"
        )


class NoDevice:
    """Stands in for Triton's CUDA driver."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of the one function of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def compile_shape(arch: int, shape: Shape, ops: tuple[str, ...]) -> list[Compiled]:
    """Every kernel that the operations ``ops`` launch for a shape."""
    found = []
    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        begin = time.perf_counter()
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        seconds = time.perf_counter() - begin
        usage = resources(compiled.asm["cubin"])
        name = compiled.metadata.name.strip("_").removesuffix("_kernel")
        later = name == "top_k" or (name == "attend" and shape.heads > 16)
        may_spill = MAX_SPILLED_LATER if later and not triton.__version__.startswith("3.6.") else MAX_SPILLED
        found.append(Compiled(arch, name, str(shape), compiled.metadata.shared, *usage, may_spill, seconds))

    triton.runtime.driver.set_active(NoDevice(arch))
    triton_configs.arch = lambda device: arch
    JITFunction.run = compile_only
    try:
        for op in ops:
            LAUNCH[op](shape)
    finally:
        JITFunction.run = run
    return found


def _rows(shape: Shape) -> Rows:
    table = torch.zeros(2, 163840 // shape.block_size, dtype=torch.int32)
    ints = torch.zeros(4, dtype=torch.int32)
    return Rows(ints, ints.clone(), table, shape.block_size, (0, 2, 4), (163840, 163840))


def _latent_cache(shape: Shape) -> torch.Tensor:
    if shape.fp8:
        return torch.zeros(2, shape.block_size, cache.FP8_DS_MLA_BYTES, dtype=torch.uint8)
    return torch.zeros(2, shape.block_size, shape.rank + shape.rope_dim, dtype=shape.dtype)


def _index_cache(shape: Shape) -> torch.Tensor:
    return torch.zeros(2, cache.index_page_bytes(shape.block_size, shape.index_dim), dtype=torch.uint8)


def _write(shape: Shape) -> None:
    # As attention.py has them: the latent and its key are slices of one projection, the queries' parts of another.
    latent, rope_key = torch.zeros(4, 1536 + shape.rank + shape.rope_dim, dtype=shape.dtype)[:, 1536:].split(
        [shape.rank, shape.rope_dim], dim=1
    )
    rope_query = torch.zeros(4, shape.heads, 128 + shape.rope_dim, dtype=shape.dtype)[..., 128:]
    index_key = torch.zeros(4, shape.index_dim, dtype=shape.dtype)
    index_query = torch.zeros(4, shape.index_heads, shape.index_dim, dtype=shape.dtype)
    head_weights = torch.zeros(4, shape.index_heads, dtype=shape.dtype)
    ones = torch.ones(shape.index_dim)
    norms = Norms(torch.ones(shape.rank, dtype=shape.dtype), 1e-6, ones, ones)
    rope = Rope(torch.zeros(4096, shape.rope_dim), shape.interleaved)
    positions = torch.zeros(4, dtype=torch.int64)
    caches = _latent_cache(shape), _index_cache(shape)
    triton_write.write_keys(latent, rope_key, index_key, norms, rope, positions, positions.clone(), *caches)
    query = torch.zeros(4, shape.heads, shape.rank + shape.rope_dim, dtype=shape.dtype)
    triton_write.write_queries(rope_query, index_query, head_weights, rope, positions, query)
    # Decodes on two streams, and layers that share a selection.
    triton_write.write_queries(rope_query[:, :0], index_query, head_weights, rope, positions, query[:, :0])
    triton_write.write_queries(rope_query, None, None, rope, positions, query)


def _select(shape: Shape) -> None:
    codes = torch.zeros(4, shape.index_heads, shape.index_dim, dtype=torch.uint8).view(cache.E4M3)
    weights = torch.zeros(4, shape.index_heads)
    out = torch.zeros(4, shape.top_k, dtype=torch.int32)
    triton_select.select(codes, weights, _index_cache(shape), _rows(shape), out)
    many = 1024  # top-k of prefills has a configuration of its own
    out = torch.zeros(many, shape.top_k, dtype=torch.int32)
    triton_select.top_k_rows(torch.zeros(1, 64), torch.zeros(many, dtype=torch.int32), out)


def _attend(shape: Shape) -> None:
    query = torch.zeros(4, shape.heads, shape.rank + shape.rope_dim, dtype=shape.dtype)
    selected = torch.zeros(4, shape.top_k, dtype=torch.int32)
    out = torch.zeros(4, shape.heads, shape.rank, dtype=shape.dtype)
    for decodes in (0, 4):
        triton_attend.attend(query, _latent_cache(shape), replace(_rows(shape), decodes=decodes), selected, 0.1, out)


LAUNCH = {"write": _write, "select": _select, "attend": _attend}


def compile_many(archs: list[int], shapes: tuple[Shape, ...], ops: tuple[str, ...]) -> Iterator[Compiled]:
    """Every kernel of every shape for every chip; a kernel that shapes share is compiled once."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(compile_shapes, archs, itertools.repeat(shapes), itertools.repeat(ops)):
            yield from found


def compile_shapes(arch: int, shapes: tuple[Shape, ...], ops: tuple[str, ...]) -> list[Compiled]:
    """As ``compile_shape``, for several."""
    return [compiled for shape in shapes for compiled in compile_shape(arch, shape, ops)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every shape, not the few that `make test` compiles")
    parser.add_argument("--arch", type=int, nargs="+", default=list(triton_configs.ARCHS))
    parser.add_argument("--op", nargs="+", default=list(LAUNCH), choices=list(LAUNCH))
    arguments = parser.parse_args()
    print(f"Triton {triton.__version__}", flush=True)
    faults = 0
    for compiled in compile_many(arguments.arch, ALL if arguments.all else CAPPED, tuple(arguments.op)):
        wrong = "; ".join(compiled.faults())
        faults += bool(wrong)
        print(f"{compiled}{'  TOO MUCH: ' + wrong if wrong else ''}", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
