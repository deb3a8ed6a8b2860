"""Block sizes of the Triton kernels for each chip and shape, and where each was measured.

A chip counts as the newest of ARCHS that is not newer than it. Tensors of Triton's interpreter are on the CPU: they
count as sm80.
"""

import functools
from dataclasses import dataclass

import torch

from vllm_dsa import envs

ARCHS = (80, 86, 89, 90, 100, 120)
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # that one program may use


@dataclass(frozen=True)
class Write:
    """write_keys and write_queries: warps, and heads a program."""

    key_warps: int
    query_warps: int
    index_heads: int
    heads: int
    hardware_e4m3: bool


@dataclass(frozen=True)
class Score:
    """select's scores. fp8_dot: multiply codes as they are, which sums less exactly than float16 (measured: sm90).

    Up to spread_rows rows each are a group of their own. programs: about how many share the work.
    """

    block_keys: int
    group_rows: int
    spread_rows: int
    programs: int
    warps: int
    stages: int
    fp8_dot: bool
    hardware_e4m3: bool


@dataclass(frozen=True)
class Rank:
    """select's top-k. registers: most of a thread, which is worth more programs at a time."""

    warps: int
    registers: int | None


@dataclass(frozen=True)
class Attend:
    """attend. The splits follow from the layer's shape, never from the batch: the results' bits depend on them.

    resident: programs that a multiprocessor runs at a time.
    """

    block_heads: int
    block_keys: int
    warps: int
    stages: int
    splits: int = 1
    resident: int = 1


def arch(device: torch.device) -> int:
    """The entry of ARCHS that a tensor's device counts as."""
    if device.type == "cpu":
        return 80
    return arch_of(_capability(device.index))


def arch_of(capability: tuple[int, int]) -> int:
    """The entry of ARCHS that a compute capability counts as."""
    version = capability[0] * 10 + capability[1]
    return max(known for known in ARCHS if known <= version)


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def hardware_e4m3(device: torch.device) -> bool:
    """Whether a device's kernels let the chip convert e4m3."""
    return _hardware(arch(device))


def _hardware(chip: int) -> bool:
    return chip >= 89 and not envs.VLLM_DSA_SOFTWARE_E4M3


def write(device: torch.device) -> Write:
    """Measured: query_warps and heads, H200, 2026-11-22, 64 index heads, 128 heads, 16,384 rows."""
    return Write(key_warps=4, query_warps=1, index_heads=16, heads=16, hardware_e4m3=_hardware(arch(device)))


def rank(rows: int, candidates: int) -> Rank:
    """Measured: H200, 2026-11-22, top_k 2048 (4,096 candidates), 1 to 8,192 rows of 4,096 to 131,072 keys."""
    if candidates > 4096:
        return Rank(16, None)
    few = rows <= 256  # most of a chip is idle
    return Rank(8, None if few else 64)


def score(device: torch.device) -> Score:
    """Measured: nowhere yet."""
    chip = arch(device)
    hardware = _hardware(chip)
    if chip in (90, 100):
        return Score(128, 32, 64, 8192, warps=4, stages=3, fp8_dot=hardware, hardware_e4m3=hardware)
    return Score(64, 32, 64, 8192, warps=4, stages=2, fp8_dot=False, hardware_e4m3=hardware)


def splits_each(device: torch.device, config: Attend, blocks: int) -> int:
    """How many splits one program does: as many as leave the chip busy. No result depends on it."""
    busy = 0.9 * config.resident * (1 if device.type == "cpu" else _processors(device.index))
    each = 1
    while config.splits % (2 * each) == 0 and blocks * config.splits // (2 * each) >= busy:
        each *= 2
    return each


@functools.cache
def _processors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def attend_prefills(device: torch.device, model: torch.dtype, heads: int) -> Attend:
    """Measured: H200, 2026-11-22, 16, 32, 64 and 128 heads; other chips: only compiled, without spilled registers."""
    if model == torch.float32:
        return Attend(16, 16, warps=4, stages=1)
    if arch(device) == 90:
        if heads > 32:
            return Attend(64, 64, warps=8, stages=3)
        return Attend(16, 64, warps=4, stages=3)
    if heads > 16:
        return Attend(32, 32, warps=8, stages=3)
    return Attend(16, 32, warps=4, stages=3)


def attend_decodes(device: torch.device, cache: torch.dtype, model: torch.dtype, heads: int, top_k: int) -> Attend:
    """Measured: H200, 2026-11-22, 16, 64 and 128 heads; other chips: only compiled, without spilled registers."""
    splits = 8 if top_k >= 1024 else 4 if top_k >= 512 else 2 if top_k >= 256 else 1
    if model == torch.float32:
        return Attend(16, 16, warps=4, stages=1, splits=splits)
    if arch(device) == 90:
        if heads > 16:  # 17 to 63: not measured
            return Attend(64, 64 if cache == torch.uint8 else 32, warps=8, stages=3, splits=splits)
        return Attend(16, 32, warps=4, stages=3, splits=splits, resident=2)
    if heads > 16:
        return Attend(32, 32 if cache == torch.uint8 else 16, warps=8, stages=2, splits=splits)
    return Attend(16, 32, warps=4, stages=2, splits=splits)
