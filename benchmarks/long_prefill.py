"""Prefill of long prompts on tensor-parallel ranks: with every rank selecting for all rows, and with the rows shared.

    python benchmarks/long_prefill.py [--heads 32] [--lens 65536,131072] [--turns 2] [--repeats 3]

A truncated DeepSeek-V3.2 with dummy weights, bf16 linear layers, no MoE; 32 heads on two ranks are 16 a rank, as in
TP8. One engine serves both, in turns: A-B-A-B. Printed are medians of every turn's prefills, B / A, and the larger
spread: from request to first token, and the GPU time of select with all that belongs to it, waiting for other ranks
too, of the slowest rank. Then the kernels of one prefill each. The gate runs first: both must select the same tokens
in every layer, bit for bit, wherever one of them does so twice, else nothing is timed.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from vllm_dsa.testing.server import NO_MULTICAST, exit_on_sigterm

os.environ |= NO_MULTICAST | {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork could not use CUDA once this process has loaded its libraries
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # ranks run functions of ours
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
import torch

HERE = Path(__file__).parent
KERNELS = ("mqa_logits", "_top_k_kernel", "AllGather", "att", "")  # parts of names, "att" of both providers'; "": all
NAMES = ("scored", "ranked", "gathered", "attended", "all kernels")
SELECT_RATIO = 0.60  # what sharing is to bring select down to, on two ranks


class Watch:
    """In the place of a rank's attention._select: times it, or adds up what it selects."""

    def __init__(self, sums: bool) -> None:
        from vllm_dsa import attention

        self.attention, self.select, self.sums = attention, attention._select, sums
        self.calls: list[Any] = []
        attention._select = self.timed

    def timed(self, kernels: Any, codes: Any, weights: Any, pages: Any, rows: Any, selected: torch.Tensor) -> None:
        start = self.mark(selected)
        self.select(kernels, codes, weights, pages, rows, selected)
        if self.sums:
            places = torch.arange(selected.numel(), device=selected.device).view(selected.shape)
            self.calls.append(((places % 65521 + 1) * (selected + 2)).sum())
        else:
            self.calls.append((start, self.mark(selected)))

    def mark(self, tensor: torch.Tensor) -> Any:
        if not tensor.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> list[int] | float:
        """The sum of every call's selection, or the milliseconds of all calls."""
        self.attention._select = self.select
        if self.sums:
            return [int(call) for call in self.calls]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return sum(start.elapsed_time(end) for start, end in self.calls)
        return sum(end - start for start, end in self.calls) * 1e3


def share_from(worker: Any, scores: int) -> None:
    os.environ["VLLM_DSA_SHARD_SCORES"] = str(scores)


def watch(worker: Any, sums: bool) -> None:
    worker.watch = Watch(sums)


def seen(worker: Any) -> list[int] | float:
    return worker.watch.stop()


def profile(worker: Any) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = torch.cuda.is_available()
    worker.profiler = profiler(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])
    worker.profiler.start()


def profiled(worker: Any) -> list[tuple[str, float]]:
    """(kernel, milliseconds)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    worker.profiler.stop()
    time_of = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return [(row.key, getattr(row, time_of) / 1e3) for row in worker.profiler.key_averages()]


class Bench:
    """One engine, and a prompt of random tokens."""

    def __init__(self, args: argparse.Namespace) -> None:
        from vllm import LLM, SamplingParams

        lens, self.layers = [int(length) for length in args.lens.split(",")], args.layers
        config = dict(num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.heads)
        config |= dict(num_nextn_predict_layers=0, first_k_dense_replace=args.layers, intermediate_size=2048)
        config |= dict(vocab_size=4096, quantization_config=None)
        options = dict(kv_cache_dtype="fp8_ds_mla", max_num_batched_tokens=16384, max_num_seqs=8)
        options |= dict(compilation_config={"cudagraph_capture_sizes": [1, 8]}, gpu_memory_utilization=0.8)
        options |= dict(kernel_config={"enable_flashinfer_autotune": False})
        self.llm = LLM(
            model=str(HERE / "v32"),
            load_format="dummy",
            skip_tokenizer_init=True,
            hf_overrides=config | json.loads(args.config),
            max_model_len=max(lens) + 16,
            enable_prefix_caching=False,
            tensor_parallel_size=args.ranks,
            distributed_executor_backend="mp",
            **options | json.loads(args.options),
        )
        self.params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
        self.ids = torch.randint(10, 400, (max(lens),), generator=torch.Generator().manual_seed(0)).tolist()

    def end(self) -> None:
        """End the ranks, so that the GPUs are free when this program has ended."""
        self.llm.llm_engine.engine_core.shutdown()

    def prefill(self, length: int) -> float:
        """Milliseconds."""
        start = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": self.ids[:length]}], self.params, use_tqdm=False)
        return (time.perf_counter() - start) * 1e3

    def on_ranks(self, function: Any, *args: Any) -> list[Any]:
        return self.llm.collective_rpc(function, args=args)

    def selected(self, length: int, share: int) -> list[list[int]]:
        """Of each rank, the sums of what every layer selects in every step."""
        self.on_ranks(share_from, share)
        self.on_ranks(watch, True)
        self.prefill(length)
        return self.on_ranks(seen)

    def gate(self, length: int, share: int) -> bool:
        """Do ranks that share select what each of them selects alone, as far as one does so twice?"""
        alone, shared = self.selected(length, 0), self.selected(length, share)
        calls = range(len(alone[0]))
        differing = [i for i in calls if any(rank[i] != alone[0][i] for rank in alone + shared)]
        print(f"gate: of {len(calls)} selections of a prompt of {length} tokens {len(differing)} differ", flush=True)
        if not differing:
            return True
        again = self.selected(length, 0)
        unsteady = [i for i in calls if any(rank[i] != alone[0][i] for rank in alone + again)]
        step, layer = divmod(differing[0], self.layers)
        print(f"gate: the first is of step {step}, layer {layer}; not the same without sharing either: {unsteady}")
        return bool(unsteady) and differing[0] >= unsteady[0]

    def turn(self, length: int, share: int, repeats: int) -> tuple[list[float], list[float]]:
        """Milliseconds of prefills and of their selects."""
        self.on_ranks(share_from, share)
        whole, selects = [], []
        for _ in range(repeats):
            self.on_ranks(watch, False)
            whole.append(self.prefill(length))
            selects.append(max(self.on_ranks(seen)))
        return whole, selects

    def kernels(self, length: int, share: int) -> list[float]:
        """Milliseconds of KERNELS on the first rank."""
        self.on_ranks(share_from, share)
        self.on_ranks(profile)
        self.prefill(length)
        rows = self.on_ranks(profiled)[0]
        return [sum(ms for name, ms in rows if part in name) for part in KERNELS]


def ratio(alone: list[float], shared: list[float]) -> tuple[float, float]:
    """Of the medians, and the larger spread."""
    spread = max((max(x) - min(x)) / statistics.median(x) for x in (alone, shared))
    return statistics.median(shared) / statistics.median(alone), spread


def line(what: str, alone: list[float], shared: list[float]) -> str:
    """Medians, their ratio, and the larger spread."""
    found, spread = ratio(alone, shared)
    verdict = "equal" if abs(found - 1) <= spread else f"{found:.3f}x"
    a, b = statistics.median(alone), statistics.median(shared)
    return f"{what:<24} {a:10.2f} {b:10.2f}  {verdict:>7}  (spread {spread:.1%})"


def measure(bench: Bench, args: argparse.Namespace, length: int) -> bool:
    """Print a length's table; returns whether sharing brings there what it should."""
    for share in (0, args.share):
        bench.turn(length, share, 1)
    turns = [[bench.turn(length, share, args.repeats) for share in (0, args.share)] for _ in range(args.turns)]
    alone, shared = ([turn[mode] for turn in turns] for mode in (0, 1))
    found = []
    for i, what in enumerate(("prefill", "select")):
        a, b = ([ms for turn in side for ms in turn[i]] for side in (alone, shared))
        print(line(f"L={length:>7} {what}", a, b), flush=True)
        found.append(ratio(a, b))
    (whole, spread), (select, _) = found
    reached = select <= SELECT_RATIO and whole < 1 - spread
    print(
        f"L={length:>7} {'REACHED' if reached else 'MISSED'}: select {select:.3f}x, at most {SELECT_RATIO:.2f}x asked; "
        f"prefill {whole:.3f}x, below {1 - spread:.3f}x asked",
        flush=True,
    )
    for name, a, b in zip(NAMES, bench.kernels(length, 0), bench.kernels(length, args.share), strict=True):
        print(f"L={length:>7}   {name:<12} {a:10.2f} {b:10.2f}", flush=True)
    return reached


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--lens", default="65536,131072")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--share", type=int, default=1 << 24, help="VLLM_DSA_SHARD_SCORES of B")
    parser.add_argument("--config", default="{}", help="JSON: other values of the model's config")
    parser.add_argument("--options", default="{}", help="JSON: other arguments of vllm.LLM")
    args = parser.parse_args()
    exit_on_sigterm()
    started = time.monotonic()
    bench = Bench(args)
    print(f"started in {time.monotonic() - started:.0f} s", flush=True)
    lens = [int(length) for length in args.lens.split(",")]
    try:
        if not bench.gate(lens[0], args.share):
            print("The gate is red; nothing is timed.", flush=True)
            return 1
        per_rank = args.heads // args.ranks
        print(f"{args.ranks} ranks of {per_rank} heads, {args.layers} layers; ms: alone, shared, ratio", flush=True)
        reached = [measure(bench, args, length) for length in lens]
    finally:
        bench.end()
    print(f"ended after {time.monotonic() - started:.0f} s", flush=True)
    return int(not all(reached))


if __name__ == "__main__":
    status = main()
    os._exit(status)  # an orderly end takes seconds
