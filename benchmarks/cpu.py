"""This plugin in vLLM against transformers' own DeepSeek-V3.2 (sdpa, its own KV cache) on a CPU, in one process.

    python benchmarks/cpu.py [--tokens 4096] [--dtypes float32,bfloat16] [--repeats 5] [--steps 16] [--profile]

One random checkpoint: 4 layers, 16 heads, 64 index heads of 128, index_topk 256, hidden 2,048, q_lora_rank 768,
kv_lora_rank 512, MLPs of 2,048, no experts. Batch 1; two threads, or OMP_NUM_THREADS. Prefill is one prompt up to its
first token, decode the median step after it, both as vLLM's engine and transformers' model take them from Python.

The gate runs first: log-probabilities of a prompt and of greedy tokens after it must agree with transformers in
float32, with our caches' rounding inserted (tests/oracle.py), else nothing is timed. Then plugin and transformers take
turns, on the same prompts; the first turn of each is not counted. --profile adds where the plugin's time goes.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
import torch.nn.functional as F
from engine import Engine, engine
from faults import Patched
from oracle import Oracle
from tiny_checkpoint import write_random
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, DynamicCache
from vllm import SamplingParams
from vllm.model_executor.layers.linear import LinearBase

CHECKPOINT = dict(
    num_hidden_layers=4,
    num_attention_heads=16,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=256,
    hidden_size=2048,
    q_lora_rank=768,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=2048,
    first_k_dense_replace=4,
    num_nextn_predict_layers=0,
    initializer_range=0.01,
)
# Median and 90th percentile of |difference| of log-probabilities: the limits of tests/test_model.py.
LIMITS = {"float32": (5e-4, 1.5e-2), "bfloat16": (1.7e-2, 8.7e-2)}
GATE_TOKENS, GATE_STEPS = 700, 8
TARGET = {"prefill": 2.0, "decode": 5.0}


class Turn(NamedTuple):
    """Seconds of one prompt up to its first token, and of the median step after it."""

    prefill: float
    decode: float


def random_prompt(tokens: int, seed: int, vocabulary: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, vocabulary, (tokens,), generator=generator).tolist()


class Plugin:
    """vLLM's engine in this process, stepped by hand."""

    def __init__(self, running: Engine) -> None:
        self.engine, self.asked = running.llm.llm_engine, 0

    def start(self, prompt: list[int], steps: int) -> None:
        params = SamplingParams(max_tokens=steps + 1, ignore_eos=True, temperature=0, detokenize=False)
        self.asked += 1
        self.engine.add_request(str(self.asked), {"prompt_token_ids": prompt}, params)

    def step(self) -> None:
        """Until the next token is there."""
        while not self.engine.step():
            pass

    def turn(self, prompt: list[int], steps: int) -> Turn:
        start = time.perf_counter()
        self.start(prompt, steps)
        self.step()
        prefill = time.perf_counter() - start
        times = [timed(self.step) for _ in range(steps)]
        assert not self.engine.has_unfinished_requests()
        return Turn(prefill, statistics.median(times))


class Transformers:
    """Its model as `generate` runs it: a DynamicCache, logits of the last token only."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.model = DeepseekV32ForCausalLM.from_pretrained(
            path,
            config=DeepseekV32Config.from_pretrained(path),
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
        ).eval()

    @torch.inference_mode()
    def turn(self, prompt: list[int], steps: int) -> Turn:
        cache, tokens = DynamicCache(config=self.model.config), torch.tensor([prompt])

        def step() -> None:
            nonlocal tokens
            logits = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1:].argmax(-1)

        prefill = timed(step)
        return Turn(prefill, statistics.median(timed(step) for _ in range(steps)))


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def gate(running: Engine, oracle: Oracle, prompt: list[int]) -> torch.Tensor:
    """|difference| of log-probabilities of the prompt's tokens and of greedy tokens after it."""
    params = SamplingParams(max_tokens=GATE_STEPS, ignore_eos=True, temperature=0, prompt_logprobs=0, logprobs=0)
    (output,) = running.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    answer = output.outputs[0]
    tokens = [*prompt, *answer.token_ids]
    found = [*output.prompt_logprobs[1:], *answer.logprobs]
    ours = torch.tensor([step[token].logprob for step, token in zip(found, tokens[1:], strict=True)])
    return (ours - oracle.prompt_logprobs(tokens)).abs()


# What --profile measures, and what it holds that against.


class Spent:
    """Seconds, floating-point operations and bytes of one kind of work."""

    def __init__(self) -> None:
        self.seconds = self.operations = self.bytes = 0.0


class Profile:
    """Where the time of an engine's steps goes, by kind of work; parts of a kind's own are taken off it.

    Operations and bytes are what the work needs, whatever the code does: every weight and every cached row once.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype, self.itemsize = dtype, getattr(torch, dtype).itemsize
        self.spent: dict[str, Spent] = defaultdict(Spent)
        self.inner = [0.0]

    @contextmanager
    def part(self, name: str, operations: float = 0, moved: float = 0) -> Iterator[None]:
        self.inner.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            spent = self.spent[name]
            spent.seconds += seconds - self.inner.pop()
            self.inner[-1] += seconds
            spent.operations += operations
            spent.bytes += moved

    def watch(self, running: Engine) -> None:
        """Put the clock around the model, its linear layers and its kernels. The engine keeps it."""
        self._around(running.model, "norms, activations, residuals", 0)
        for module in running.model.modules():
            if isinstance(module, LinearBase):
                self._around(module, "linear layers", module.input_size * module.output_size)
        for layer in running.layers:
            self._around(layer, "absorb W_UK, W_UV; copies", layer.w_uk.numel() + layer.w_uv.numel())
            layer.kernels = Patched(layer.kernels, **self._kernels(layer))

    def _around(self, module: Any, name: str, weights: int) -> None:
        """Put the clock around a module's forward, which multiplies every row by so many weights."""
        forward = module.forward

        def clocked(*args: Any, **kwargs: Any) -> Any:
            rows = len(next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)))
            with self.part(name, 2.0 * rows * weights, self.itemsize * weights):
                return forward(*args, **kwargs)

        module.forward = clocked

    def _kernels(self, layer: Any) -> dict[str, Callable]:
        kernels = layer.kernels

        def write_keys(*args: Any) -> None:
            with self.part("write"):
                kernels.write_keys(*args)

        def write_queries(*args: Any) -> Any:
            with self.part("write"):
                return kernels.write_queries(*args)

        def select(codes: torch.Tensor, weights: torch.Tensor, pages: torch.Tensor, rows: Any, out: Any) -> None:
            (_, heads, dim), keys = codes.shape, sum(n for n in rows.lengths.tolist() if n > out.shape[1])
            with self.part("select", 2.0 * heads * (dim + 1) * keys, sum(rows.ends) * (dim + 4)):
                kernels.select(codes, weights, pages, rows, out)

        def attend(query: torch.Tensor, pages: torch.Tensor, rows: Any, selected: Any, scale: float, out: Any) -> None:
            picks, width, rank = int((selected >= 0).sum()), query.shape[-1], out.shape[-1]
            moved = picks * width * pages.itemsize
            with self.part("attend", 2.0 * query.shape[1] * picks * (width + rank), moved):
                kernels.attend(query, pages, rows, selected, scale, out)

        return dict(write_keys=write_keys, write_queries=write_queries, select=select, attend=attend)

    def print(self, title: str, steps: int, gemm: dict[str, float], bandwidth: float) -> None:
        total = sum(spent.seconds for spent in self.spent.values())
        print(f"{title}: {1e3 * total / steps:.1f} ms; select and attend compute in float32 whatever the dtype")
        for name, spent in sorted(self.spent.items(), key=lambda item: -item[1].seconds):
            peak = gemm["float32" if name in ("select", "attend") else self.dtype]
            line = f"  {name:32} {1e3 * spent.seconds / steps:9.2f} ms {spent.seconds / total:5.0%}"
            if spent.operations:
                rate, speed = spent.operations / spent.seconds, spent.bytes / spent.seconds
                line += f"  {rate / 1e9:7.1f} GFLOP/s {rate / peak:5.0%} of peak"
                line += f"  {speed / 1e9:6.2f} GB/s {speed / bandwidth:5.0%} of peak"
            print(line)


def measured_gemm(dtype: str) -> float:
    """Operations a second of torch's own square product."""
    size = 3072
    a = torch.randn(size, size).to(getattr(torch, dtype))
    return 2.0 * size**3 / min(timed(lambda: a @ a) for _ in range(5))


def measured_bandwidth() -> float:
    """Bytes a second of a matrix-vector product whose matrix (1 GiB) is read from memory."""
    weight, x = torch.ones(8192, 32768), torch.ones(1, 32768)
    return weight.nbytes / min(timed(lambda: F.linear(x, weight)) for _ in range(5))


def print_profile(running: Engine, plugin: Plugin, prompt: list[int], steps: int, dtype: str) -> None:
    gemm, bandwidth = {name: measured_gemm(name) for name in LIMITS}, measured_bandwidth()
    peaks = ", ".join(f"{name} GEMM {rate / 1e9:.0f} GFLOP/s" for name, rate in gemm.items())
    print(f"measured peaks: {peaks}, memory {bandwidth / 1e9:.1f} GB/s")
    profile = Profile(dtype)
    profile.watch(running)
    plugin.start(prompt, steps)
    for title, count in (("prefill", 1), ("decode, a step", steps)):
        profile.spent.clear()
        for _ in range(count):
            with profile.part("vLLM around the model"):
                plugin.step()
        profile.print(f"{dtype} {title}", count, gemm, bandwidth)


def compare(dtype: str, path: Path, config: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The gate, then turns; one row a phase."""
    vocabulary = config["vocab_size"]
    options = dict(
        dtype=dtype,
        max_model_len=args.tokens + 128,
        max_num_batched_tokens=4096,  # what vLLM takes on a CPU by itself, in a process
        block_size=128,
        enable_prefix_caching=False,
    )
    with engine(path, **options) as running:
        difference = gate(running, Oracle(path), random_prompt(GATE_TOKENS, 0, vocabulary))
        found = (difference.median().item(), difference.quantile(0.9).item())
        right = found[0] <= LIMITS[dtype][0] and found[1] <= LIMITS[dtype][1]
        print(f"gate {dtype}: log-probabilities differ by {found[0]:.1e}, 90th percentile {found[1]:.1e};", end=" ")
        print(f"allowed {LIMITS[dtype][0]:.1e}, {LIMITS[dtype][1]:.1e}", flush=True)
        if not right:
            sys.exit("The gate is red; nothing is timed.")
        threads = torch.get_num_threads()
        assert threads == int(os.environ["OMP_NUM_THREADS"]), f"torch runs {threads} threads"
        sides = {"plugin": Plugin(running), "transformers": Transformers(path, dtype)}
        turns: dict[str, list[Turn]] = {name: [] for name in sides}
        for i in range(args.repeats + 1):
            for name, side in sides.items():
                turn = side.turn(random_prompt(args.tokens, 1 + i, vocabulary), args.steps)
                print(f"{dtype} turn {i} {name}: prefill {turn.prefill:.2f} s, decode {1e3 * turn.decode:.1f} ms")
                sys.stdout.flush()
                if i:
                    turns[name].append(turn)
        if args.profile:
            print_profile(running, sides["plugin"], random_prompt(args.tokens, 0, vocabulary), args.steps, dtype)
    return [row(dtype, phase, turns) for phase in Turn._fields]


def row(dtype: str, phase: str, turns: dict[str, list[Turn]]) -> dict[str, Any]:
    times = {name: [getattr(turn, phase) for turn in mine] for name, mine in turns.items()}
    medians = {name: statistics.median(mine) for name, mine in times.items()}
    spreads = {name: (max(mine) - min(mine)) / medians[name] for name, mine in times.items()}
    return {
        "dtype": dtype,
        "phase": phase,
        "plugin_ms": 1e3 * medians["plugin"],
        "plugin_spread": spreads["plugin"],
        "transformers_ms": 1e3 * medians["transformers"],
        "transformers_spread": spreads["transformers"],
        "ratio": medians["transformers"] / medians["plugin"],
        "target": TARGET[phase],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="decode steps a turn")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the table there")
    args = parser.parse_args()
    rows = []
    with TemporaryDirectory() as folder:
        config = write_random(folder, **CHECKPOINT)
        for dtype in args.dtypes.split(","):
            rows += compare(dtype, Path(folder), config, args)
    load = os.getloadavg()[0]
    print(
        f"\n{args.tokens} tokens, batch 1, {torch.get_num_threads()} threads, median of {args.repeats}; load {load:.1f}"
    )
    print(f"{'':18} {'plugin ms':>10} {'spread':>7} {'transformers ms':>16} {'spread':>7} {'ratio':>7} {'target':>7}")
    for r in rows:
        print(
            f"{r['dtype']:9} {r['phase']:8} {r['plugin_ms']:10.1f} {r['plugin_spread']:7.1%} "
            f"{r['transformers_ms']:16.1f} {r['transformers_spread']:7.1%} {r['ratio']:6.1f}x {r['target']:6.0f}x"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return int(any(r["ratio"] < r["target"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
