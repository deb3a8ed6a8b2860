"""write, select and attend of the Triton provider on one GPU, kernel by kernel; beside the vendor's with --vendor.

    python benchmarks/portable.py [--heads 16,128] [--contexts 4096,32768,131072] [--cache auto] [--ops select,attend]
    python benchmarks/portable.py --vendor         also FlashMLA and DeepGEMM, in turns; needs vLLM
    python benchmarks/portable.py --sweep          also other block sizes than those of triton_configs.py
    python benchmarks/portable.py --software       e4m3 in integer arithmetic, as on sm80

DeepSeek-V3.2's sizes in bfloat16. Prefill is the last --chunk rows of one prompt, decode --batches requests of one row;
--chunk 0 and --batches 0 leave them out. Each line stands behind a gate: results of a few rows against reference.py.
Times are medians with the second-level cache flushed; decodes are graph replays. Bytes and operations are what the task
needs, whatever the kernels do.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
import triton

from vllm_dsa import cache
from vllm_dsa.kernels import Norms, Rope, reference, triton_attend, triton_configs, triton_select, triton_write
from vllm_dsa.metadata import Rows, build_rows
from vllm_dsa.testing import compare

RANK, ROPE, INDEX_HEADS, DIM, TOP_K, PAGE = 512, 64, 64, 128, 2048, 64
BANDWIDTH, BF16, FP8 = 4.3e12, 800e12, 1600e12  # measured copy on an H200; its dense peaks
REPEATS = 15
TOLERANCE = 2.0**-6
DEADLINE = float("inf")  # time.monotonic(), of --seconds


@dataclass
class Step:
    """Caches of ``requests`` contexts, and the query rows of one step."""

    name: str
    rows: Rows
    latent_cache: torch.Tensor
    index_cache: torch.Tensor
    codes: torch.Tensor
    weights: torch.Tensor
    lengths: list[int]

    @property
    def decode(self) -> bool:
        return self.rows.decodes > 0


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def make_step(context: int, requests: int, chunk: int, kind: str) -> Step:
    """Shuffled pages, written by write_keys; chunk 0: decode."""
    blocks = -(-context // PAGE)
    table = torch.randperm(requests * blocks, device="cuda").int().view(requests, blocks)
    latent_cache = empty_latents(requests * blocks, kind)
    index_cache = torch.zeros(requests * blocks, cache.index_page_bytes(PAGE, DIM), dtype=torch.uint8, device="cuda")
    norms, rope = facts(context)
    positions = torch.arange(context, device="cuda")
    for request in range(requests):
        slots = table[request].long()[positions // PAGE] * PAGE + positions % PAGE
        keys = normal(context, RANK), normal(context, ROPE), normal(context, DIM)
        triton_write.write_keys(*keys, norms, rope, positions, slots, latent_cache, index_cache)
    new = min(chunk, context) or 1
    starts = torch.arange(requests + 1, dtype=torch.int32) * new
    ends = torch.full((requests,), context, dtype=torch.int32)
    rows = build_rows(starts, ends, table, PAGE, requests * new)
    rows = rows if chunk else replace(rows, decodes=requests)
    count = requests * new
    codes, weights = triton_write.write_queries(
        normal(count, 1, ROPE),
        normal(count, INDEX_HEADS, DIM),
        normal(count, INDEX_HEADS),
        rope,
        rows.lengths.long() - 1,
        normal(count, 1, RANK + ROPE),
    )
    name = f"prefill {new} of {context}" if chunk else f"decode {requests} x {context}"
    return Step(name, rows, latent_cache, index_cache, codes, weights, rows.lengths.tolist())


def empty_latents(pages: int, kind: str) -> torch.Tensor:
    if kind == cache.FP8_DS_MLA:
        return torch.zeros(pages, PAGE, cache.FP8_DS_MLA_BYTES, dtype=torch.uint8, device="cuda")
    return torch.zeros(pages, PAGE, RANK + ROPE, dtype=torch.bfloat16, device="cuda")


def facts(positions: int) -> tuple[Norms, Rope]:
    ones = torch.ones(DIM, device="cuda")
    angles = torch.outer(torch.arange(positions), 1e4 ** -torch.linspace(0, 1, ROPE // 2))
    rope = Rope(torch.cat([angles.cos(), angles.sin()], dim=1).cuda(), False)
    return Norms(torch.ones(RANK, dtype=torch.bfloat16, device="cuda"), 1e-6, ones, 0 * ones), rope


def measure(run: Callable[[], Any], captured: bool) -> float:
    """Median seconds."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    events = []
    for _ in range(REPEATS):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def report(name: str, seconds: float, moved: float, operations: float, peak: float, against: float | None) -> None:
    share = f"{moved / 1e6:9.1f} MB {moved / seconds / 1e12:5.2f} TB/s {moved / seconds / BANDWIDTH:4.0%}"
    if operations:
        rate = operations / seconds
        share += f"  {operations / 1e9:9.1f} GFLOP {rate / 1e12:6.1f} TFLOP/s {rate / peak:4.0%}"
    share += f"  {against / seconds:5.0%} of vendor's speed" if against else ""
    print(f"{name:66} {1e6 * seconds:10.1f} us  {share}", flush=True)


def some_rows(step: Step) -> list[int]:
    return sorted({0, len(step.lengths) // 2, len(step.lengths) - 1})


def gate_select(step: Step, selected: torch.Tensor, own: bool) -> None:
    arguments = (step.codes, step.weights, step.index_cache, step.rows)
    rows = some_rows(step)
    ref = [reference.scores(*arguments, row) for row in rows]
    mine = [triton_select.scores(*arguments, row) for row in rows] if own else None
    eps = [compare.score_error(*arguments, row, compare.SCORE_ERROR[torch.float8_e4m3fn]) for row in rows]
    compare.check_selection(selected[rows], mine, ref, TOP_K, eps)


def gate_attend(step: Step, query: torch.Tensor, selected: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    for row in some_rows(step):
        at = slice(row, row + 1)
        rows = replace(step.rows, requests=step.rows.requests[at], lengths=step.rows.lengths[at])
        want = torch.empty_like(out[at])
        reference.attend(query[at, : out.shape[1]], step.latent_cache, rows, selected[at], scale, want)
        compare.assert_close(f"attention of row {row}", out[at], want, TOLERANCE)


def bench_write(tokens: int, heads: int, kind: str) -> None:
    norms, rope = facts(tokens)
    projected = normal(tokens, 1536 + RANK + ROPE)
    latent, rope_key = projected[:, 1536:].split([RANK, ROPE], dim=1)
    index_key, index_query = normal(tokens, DIM), normal(tokens, INDEX_HEADS, DIM)
    head_weights = normal(tokens, INDEX_HEADS)
    rope_query, query = normal(tokens, heads, 192)[..., 128:], normal(tokens, heads, RANK + ROPE)
    pages = -(-tokens // PAGE)
    positions, slots = torch.arange(tokens, device="cuda"), torch.randperm(pages * PAGE, device="cuda")[:tokens]
    latent_cache = empty_latents(pages, kind)
    row = latent_cache.shape[2] * latent_cache.itemsize
    index_cache = torch.zeros(pages, cache.index_page_bytes(PAGE, DIM), dtype=torch.uint8, device="cuda")
    want = latent_cache.clone(), index_cache.clone()

    def keys(write: Any, latents: torch.Tensor, index: torch.Tensor) -> None:
        write(latent, rope_key, index_key, norms, rope, positions, slots, latents, index)

    keys(triton_write.write_keys, latent_cache, index_cache)
    keys(reference.write_keys, *want)
    compare.check_caches(latent_cache, index_cache, *want, slots, DIM)
    moved = tokens * (2 * (RANK + ROPE + DIM) + row + DIM + 4)
    seconds = measure(lambda: keys(triton_write.write_keys, latent_cache, index_cache), True)
    report(f"write_keys     {tokens} tokens", seconds, moved, 0, BF16, None)
    for both in (True, False):
        arguments = (index_query, head_weights) if both else (None, None)
        run = lambda given=arguments: triton_write.write_queries(rope_query, *given, rope, positions, query)  # noqa: E731
        moved = tokens * (4 * heads * ROPE + both * (3 * INDEX_HEADS * DIM + 6 * INDEX_HEADS))
        name = "index queries" if both else "no index queries"
        report(f"write_queries  {tokens} tokens, {heads} heads, {name}", measure(run, True), moved, 0, BF16, None)


def bench_select(step: Step, vendor: Any, sweep: bool) -> torch.Tensor:
    """The selection, for attend."""
    count = len(step.lengths)
    selected = torch.empty(count, TOP_K, dtype=torch.int32, device="cuda")
    operations = 2.0 * INDEX_HEADS * DIM * sum(step.lengths)
    contexts = sum(step.rows.ends)
    moved = contexts * (DIM + 4) + count * (INDEX_HEADS * (DIM + 4) + 4 * TOP_K)

    def run(provider: Any) -> None:
        provider.select(step.codes, step.weights, step.index_cache, step.rows, selected)

    against = None
    if vendor:
        run(vendor)
        gate_select(step, selected, own=False)
        against = measure(lambda: run(vendor), step.decode)
        report(f"select vendor  {step.name}", against, moved, operations, FP8, None)
    run(triton_select)
    gate_select(step, selected, own=True)
    report(
        f"select triton  {step.name}", measure(lambda: run(triton_select), step.decode), moved, operations, FP8, against
    )

    longest, tile = max(step.lengths), min(count, (256 << 20) // (4 * max(step.lengths)))
    scored = torch.empty(tile, longest, device="cuda")
    part = sum(step.lengths[:tile])

    def score() -> None:
        triton_select._score(step.codes, step.weights, step.index_cache, step.rows, scored, 0, tile, 0, longest)

    fp8_dot = triton_configs.score(scored.device).fp8_dot
    name = f"  of {tile} rows"
    operations = 2.0 * INDEX_HEADS * DIM * part
    report(f"{name}: scores", measure(score, step.decode), 4 * part, operations, FP8 if fp8_dot else BF16, None)
    run_top_k = lambda: triton_select.top_k_rows(scored, step.rows.lengths[:tile], selected[:tile])  # noqa: E731
    report(f"{name}: top-k", measure(run_top_k, step.decode), 8 * part, 0, BF16, None)
    if sweep:
        before = triton_configs.score
        shapes = itertools.product((64, 128, 256), (4, 8), (2, 3), (16, 32, 64), (True, False))
        for keys, warps, stages, group, fp8 in shapes:
            if (keys, warps) in ((64, 8), (256, 4)) or (fp8 and not before(scored.device).hardware_e4m3):
                continue
            if (step.decode and group != 32) or (group != 32 and stages != 3):
                continue
            changes = dict(block_keys=keys, warps=warps, stages=stages, group_rows=group, fp8_dot=fp8)
            triton_configs.score = lambda device, changes=changes: replace(before(device), **changes)
            name = f"    {keys} keys {warps} warps {stages} stages group {group} fp8 {fp8}"
            report(name, measure(score, step.decode), 4 * part, operations, FP8, None)
        triton_configs.score = before
    run(triton_select)
    return selected


def random_selection(step: Step) -> torch.Tensor:
    """As select returns it, of random positions."""
    selected = torch.full((len(step.lengths), TOP_K), -1, dtype=torch.int32, device="cuda")
    for row, length in enumerate(step.lengths):
        chosen = torch.randperm(length, device="cuda")[:TOP_K].sort().values
        selected[row, : len(chosen)] = chosen
    return selected


def bench_attend(step: Step, heads: int, selected: torch.Tensor, vendor: Any, sweep: bool) -> None:
    count = len(step.lengths)
    padded = max(64, heads) if vendor and step.decode else heads  # what the vendor's layer allocates
    query = normal(count, padded, RANK + ROPE)
    out = torch.empty(count, heads, RANK, dtype=torch.bfloat16, device="cuda")
    scale = (128 + ROPE) ** -0.5
    keys = sum(min(length, TOP_K) for length in step.lengths)
    operations = 2.0 * keys * heads * (RANK + ROPE + RANK)
    row = step.latent_cache.shape[2] * step.latent_cache.itemsize
    moved = keys * row + 2 * count * heads * (RANK + ROPE + RANK)

    def run(provider: Any) -> None:
        provider.attend(query, step.latent_cache, rows, selected, scale, out)

    rows = replace(step.rows, made={})
    against = None
    for name, provider in (("vendor", vendor), ("triton", triton_attend)):
        if provider and time.monotonic() < DEADLINE:
            run(provider)
            gate_attend(step, query, selected, scale, out)
            seconds = measure(lambda provider=provider: run(provider), step.decode)
            report(f"attend {name}  {step.name}, {heads} heads", seconds, moved, operations, BF16, against)
            against = seconds if provider is vendor else against
    if sweep:
        candidates = attend_candidates(step, heads)
        compile_candidates(step, heads, candidates)
        for candidate in candidates:
            if time.monotonic() > DEADLINE:
                print("    out of time", flush=True)
                return
            name = f"    {describe(candidate)}"
            with configured(candidate):
                try:
                    run(triton_attend)
                    gate_attend(step, query, selected, scale, out)
                    seconds = measure(lambda: run(triton_attend), step.decode)
                except (triton.OutOfResources, compare.Mismatch, RuntimeError) as error:
                    print(f"{name}: {type(error).__name__} {str(error)[:200]}", flush=True)
                else:
                    report(name, seconds, moved, operations, BF16, against)


# (block_heads, block_keys, warps, stages)
PREFILLS_FEW = ((16, 64, 4, 3), (16, 32, 4, 3))
PREFILLS_MANY = ((64, 64, 8, 3), (64, 32, 8, 5))
PAGES_FEW = ((16, 32, 4, 3), (16, 64, 4, 2))
PAGES_MANY = ((64, 64, 8, 3),)


def attend_candidates(step: Step, heads: int) -> list[triton_configs.Attend]:
    """Configurations to try."""
    many = heads > 32
    pages = PAGES_MANY if many else PAGES_FEW
    if step.decode:
        return [
            triton_configs.Attend(*sizes, splits=splits, resident=1 if many or sizes[1] > 32 else 2)
            for splits in (2, 4, 8, 16)
            for sizes in pages
        ]
    return [triton_configs.Attend(*sizes) for sizes in (PREFILLS_MANY if many else PREFILLS_FEW)]


def describe(config: triton_configs.Attend) -> str:
    sizes = f"{config.block_heads}h {config.block_keys}k {config.warps}w {config.stages}s"
    return f"{sizes} {config.splits} splits"


@contextmanager
def configured(config: triton_configs.Attend) -> Iterator[None]:
    """attend as ``config`` has it."""
    before = triton_configs.attend_prefills, triton_configs.attend_decodes
    triton_configs.attend_prefills = triton_configs.attend_decodes = lambda *_: config
    try:
        yield
    finally:
        triton_configs.attend_prefills, triton_configs.attend_decodes = before


def compile_candidates(step: Step, heads: int, candidates: list[triton_configs.Attend]) -> None:
    """Fill Triton's cache on all cores."""
    begin = time.monotonic()
    columns, kind = step.rows.block_table.shape[1], step.latent_cache.dtype
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(compile_candidate, c, heads, columns, kind, step.decode) for c in candidates]
        failed = sum(task.exception() is not None for task in tasks)
    print(f"    {len(tasks)} configurations compiled in {time.monotonic() - begin:.0f} s, {failed} failed", flush=True)


def compile_candidate(
    candidate: triton_configs.Attend, heads: int, columns: int, kind: torch.dtype, decode: bool
) -> None:
    """One launch on two rows of one key."""
    table = torch.zeros(2, columns, dtype=torch.int32, device="cuda")
    rows = build_rows(torch.tensor([0, 1, 2]), torch.tensor([1, 1]), table, PAGE, 2)
    rows = replace(rows, decodes=2 * decode)
    latents = empty_latents(1, cache.FP8_DS_MLA if kind == torch.uint8 else "auto")
    selected = torch.zeros(2, TOP_K, dtype=torch.int32, device="cuda")
    out = torch.empty(2, heads, RANK, dtype=torch.bfloat16, device="cuda")
    with configured(candidate):
        triton_attend.attend(normal(2, heads, RANK + ROPE), latents, rows, selected, 0.1, out)
    torch.cuda.synchronize()


def ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    global DEADLINE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=ints, default=[16, 128])
    parser.add_argument("--contexts", type=ints, default=[4096, 32768, 131072])
    parser.add_argument("--batches", type=ints, default=[1, 32])
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--cache", default=cache.FP8_DS_MLA, choices=["auto", cache.FP8_DS_MLA])
    parser.add_argument("--ops", default="write,select,attend")
    parser.add_argument("--vendor", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--software", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no measurement after so long")
    arguments = parser.parse_args()
    DEADLINE = time.monotonic() + arguments.seconds
    os.environ["VLLM_DSA_SOFTWARE_E4M3"] = str(int(arguments.software))
    ops = arguments.ops.split(",")
    torch.manual_seed(0)
    vendor = import_module("vllm_dsa.kernels.vendor") if arguments.vendor else None
    if vendor:  # FlashMLA itself, also where the provider takes Triton's kernels
        vendor.TRITON_HEADS = vendor.TRITON_DECODE_HEADS = 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, {arguments.cache}")
    if "write" in ops:
        for tokens, heads in itertools.product((32, 16384), arguments.heads):
            bench_write(tokens, heads, arguments.cache)
    for context in arguments.contexts:
        steps = ((1, arguments.chunk), *((batch, 0) for batch in arguments.batches if batch))
        for requests, chunk in steps if arguments.chunk else steps[1:]:
            requests = min(requests, max(1, (1 << 20) // context))
            step = make_step(context, requests, chunk, arguments.cache)
            selected = bench_select(step, vendor, arguments.sweep) if "select" in ops else random_selection(step)
            if "attend" in ops:
                for heads in arguments.heads:
                    bench_attend(step, heads, selected, vendor, arguments.sweep)


if __name__ == "__main__":
    main()
