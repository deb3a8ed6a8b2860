"""How long a function takes on a device, and how fast that device can be at all."""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 1 << 28  # more than any GPU's second-level cache


@dataclass(frozen=True)
class Timing:
    """Median and least seconds of ``runs`` runs, and the range of the middle 80 % as a share of the median."""

    seconds: float
    least: float
    spread: float
    runs: int


@dataclass(frozen=True)
class Limits:
    """What a device can do: bytes/s from memory, floating-point operations/s with 16-bit (CPU: 32-bit) and FP8 inputs.

    source: where the figures are from.
    """

    bandwidth: float
    flops: float
    fp8_flops: float
    source: str

    def seconds(self, moved: float, flops: float, fp8: bool) -> float:
        """The least time for so much work."""
        return max(moved / self.bandwidth, flops / (self.fp8_flops if fp8 else self.flops))


# Vendors' data sheets: TB/s, dense bf16 TFLOP/s, dense FP8 TFLOP/s (None: it has no FP8). The first that matches holds.
CHIPS = (
    (r"\bB200\b", 8.0, 2250, 4500),
    (r"\bH200\b", 4.8, 989, 1979),
    (r"\bH100 NVL\b", 3.9, 835, 1671),
    (r"\bH100 PCIe\b", 2.0, 756, 1513),
    (r"\bH[18]00\b", 3.35, 989, 1979),
    (r"\bH20\b", 4.0, 148, 296),
    (r"\bA100\b.*80GB", 2.04, 312, None),
    (r"\bA100\b", 1.56, 312, None),
    (r"\bL40S\b", 0.864, 362, 733),
    (r"\bRTX 4090\b", 1.01, 165, 330),
    (r"\bRTX 3090\b", 0.936, 71, None),
)


def limits(device: str) -> Limits:
    """Of the GPU by its data sheet; of a CPU or an unknown GPU measured, in about a second: the best of many runs."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        for pattern, bandwidth, flops, fp8_flops in CHIPS:
            if re.search(pattern, name):
                fp8 = flops if fp8_flops is None else fp8_flops
                return Limits(bandwidth * 1e12, flops * 1e12, fp8 * 1e12, f"data sheet of {name}")
    dtype, size = (torch.bfloat16, 8192) if device == "cuda" else (torch.float32, 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = measure(lambda: torch.mm(a, b), device, 0.5).least
    source = torch.zeros(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device, 0.5).least
    flops = 2.0 * size**3 / product
    return Limits(2.0 * len(source) / copy, flops, flops, f"a copy and a {str(dtype)[6:]} product, measured")


def measure(run: Callable[[], Any], device: str, seconds: float, captured: bool = False) -> Timing:
    """Time ``run`` for about so many seconds, at least five times, after a warm-up.

    On a GPU by its own clock, with the second-level cache flushed before each run; captured: replayed as a CUDA graph.
    """
    run()
    once = measure_cpu if device == "cpu" else _measure_cuda
    if captured and device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    times, end = [], time.monotonic() + seconds
    while len(times) < 5 or time.monotonic() < end and len(times) < 1000:
        times.append(once(run))
    times.sort()
    median, tenth = statistics.median(times), len(times) // 10
    return Timing(median, times[0], (times[-1 - tenth] - times[tenth]) / median, len(times))


def measure_cpu(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _measure_cuda(run: Callable[[], Any]) -> float:
    torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
