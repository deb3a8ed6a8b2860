"""Stock vLLM against this plugin on the GPUs of one host, through `vllm serve`: all of DeepSeek-V3.2, dummy weights.

    python benchmarks/eight_gpus.py [--gpus 8] [--layouts tp,dp_ep] [--drafts 0,1] [--out eight-gpus]
    python benchmarks/eight_gpus.py --gpus 2 --layers 8 --experts 32      a part of it, on fewer GPUs

Layouts: tp, tensor parallel over all GPUs; dp_ep, a data-parallel rank a GPU with expert parallelism. Drafts:
MTP tokens.
The gate runs first, in each layout: the planted checkpoint must answer right under the plugin, else that layout is not
timed. Then stock and plugin each serve in turn. Measured are the time to /health; tokens of the KV cache; prefill, from
request to answer of one token; decode, the time between parts of the answers of all requests of a batch (with drafts, a
part may be several tokens); `vllm bench serve`; and the most memory that a GPU holds. Everything is printed as it comes
and kept in OUT/results.json; a server that fails is named there, and the next one is measured.

Dummy weights would send every token to the same few experts, so vLLM draws the experts at random, for both. NVLink
multicast is off, so stock's fused all-reduce is FlashInfer's "trtllm", which FlashInfer compiles at the first start.
"""

import argparse
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "examples")]

from planted_text import build_prompt, build_tokenizer  # noqa: E402
from tiny_checkpoint import write_planted  # noqa: E402

from vllm_dsa.testing.server import DIRECT, NO_MULTICAST, Server, ServerError, exit_on_sigterm, serve  # noqa: E402

NAME = "served"
LAYOUTS = {
    "tp": ["--tensor-parallel-size", "{gpus}"],
    "dp_ep": ["--data-parallel-size", "{gpus}", "--enable-expert-parallel"],
}
TOP_K, REPEATS, STEPS = 128, 3, 48


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--layouts", default="tp,dp_ep")
    parser.add_argument("--drafts", default="0,1")
    parser.add_argument("--who", default="stock,plugin")
    parser.add_argument("--lens", default="4096,32768,131072", help="of prefills")
    parser.add_argument("--contexts", default="4096,32768", help="of decodes")
    parser.add_argument("--batches", default="1,8,64", help="of decodes, requests a rank")
    parser.add_argument("--loads", default="1024x1024,8192x1024", help="of `vllm bench serve`: prompt x answer")
    parser.add_argument("--load-requests", type=int, default=256)
    parser.add_argument("--config", default="{}", help="JSON: further values of the model's config")
    parser.add_argument("--serve", default="", help="further arguments of vllm serve, separated by spaces")
    parser.add_argument(
        "--routing", default="uniform_random", help="to experts, as vLLM simulates it; empty: it does not"
    )
    parser.add_argument("--start-seconds", type=float, default=1800, help="how long a server may take to start")
    parser.add_argument("--out", type=Path, default=Path("eight-gpus"))
    args = parser.parse_args()
    exit_on_sigterm()
    args.out.mkdir(parents=True, exist_ok=True)
    model = write_model(args)
    results: list[dict[str, Any]] = []
    red = []
    for layout in args.layouts.split(","):
        flags = [flag.format(gpus=args.gpus) for flag in LAYOUTS[layout]] if args.gpus > 1 else []
        flags += args.serve.split()
        if not gate(args, layout, flags):
            red.append(layout)
            continue
        for drafts in ints(args.drafts):
            for who in args.who.split(","):
                row: dict[str, Any] = {"layout": layout, "drafts": drafts, "who": who}
                results.append(row)
                try:
                    measure(args, model, [*flags, *draft_flags(drafts)], row)
                except (ServerError, OSError, RuntimeError) as error:
                    note(row, "failed", getattr(error, "cause", "") or str(error)[-2000:])
                finally:
                    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    table(results)
    if red:
        print(f"The gate was red, and nothing timed, in: {', '.join(red)}. Logs are in {args.out}.")
    return int(bool(red) or any("failed" in row for row in results))


def ints(text: str) -> list[int]:
    return [int(each) for each in text.split(",") if each]


def draft_flags(drafts: int) -> list[str]:
    return ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": drafts})] if drafts else []


def write_model(args: argparse.Namespace) -> Path:
    """A folder of the published config at the asked size, and a tokenizer of the tests."""
    config = json.loads((HERE / "v32" / "config.json").read_text())
    tokenizer = build_tokenizer()
    config |= {
        "num_hidden_layers": args.layers,
        "first_k_dense_replace": min(config["first_k_dense_replace"], args.layers),
        "n_routed_experts": args.experts,
        "vocab_size": 64 * -(-tokenizer.get_vocab_size() // 64),
    }
    model = args.out / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(config | json.loads(args.config)))
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return model


@contextmanager
def served(
    args: argparse.Namespace, name: str, model: Path, who: str, flags: list[str], more: dict[str, str] | None = None
) -> Iterator[Server]:
    environment = NO_MULTICAST | {"VLLM_DSA_DISABLE": "1" if who == "stock" else "0"} | (more or {})
    options = ["--served-model-name", NAME, "--kv-cache-dtype", "fp8_ds_mla", *flags]
    with serve(
        model, *options, env=environment, timeout=args.start_seconds, log_path=args.out / f"{name}.log"
    ) as server:
        yield server


def gate(args: argparse.Namespace, layout: str, flags: list[str]) -> bool:
    """Does the planted checkpoint answer right in this layout?"""
    planted = args.out / "planted"
    if not planted.exists():
        sizes = dict(index_topk=TOP_K, num_attention_heads=16 * args.gpus, index_n_heads=64)
        sizes |= dict(intermediate_size=64 * args.gpus, moe_intermediate_size=64 * args.gpus)
        write_planted(planted, check=False, dtype="bfloat16", **sizes)
    right = []
    try:
        with served(args, f"gate-{layout}", planted, "plugin", [*flags, "--max-model-len", "8192"]) as server:
            for length in (1200, 3000, 6000):
                prompt = build_prompt(length, length, chat=True, copies=TOP_K)
                body = {"messages": [{"role": "user", "content": prompt.text}], "max_tokens": 4, "temperature": 0}
                reply = json.load(post(server, "/v1/chat/completions", body))
                right.append(reply["choices"][0]["message"]["content"].split() == prompt.answer.split())
    except (ServerError, OSError) as error:
        print(f"gate, {layout}: {error}", flush=True)
        return False
    print(f"gate, {layout}: {'right' if all(right) else f'WRONG: {right}'}", flush=True)
    return all(right)


def post(server: Server, path: str, body: dict[str, Any]) -> Any:
    data = json.dumps({"model": NAME} | body).encode()
    request = urllib.request.Request(server.base_url + path, data, {"Content-Type": "application/json"})
    return DIRECT.open(request, timeout=1800)


def measure(args: argparse.Namespace, model: Path, flags: list[str], row: dict[str, Any]) -> None:
    """One server: everything that is measured, into ``row``."""
    name = f"{row['layout']}-mtp{row['drafts']}-{row['who']}"
    flags = ["--load-format", "dummy", *flags]
    begin = time.monotonic()
    routing = {"VLLM_MOE_ROUTING_SIMULATION_STRATEGY": args.routing}
    with Memory() as memory, served(args, name, model, row["who"], flags, routing) as server:
        note(row, "load_s", round(time.monotonic() - begin, 1))
        sizes = re.findall(r"KV cache size: ([\d,]+) tokens", server.log())
        note(row, "kv_tokens", sum(int(size.replace(",", "")) for size in sizes))
        post(server, "/v1/completions", asked(300, 8)).read()
        for length in ints(args.lens):
            times = []
            for _ in range(REPEATS + 1):
                start = time.perf_counter()
                post(server, "/v1/completions", asked(length, 1)).read()
                times.append(time.perf_counter() - start)
            note(row, f"prefill_{length}_ms", [round(1e3 * each, 1) for each in sorted(times[1:])])
        ranks = args.gpus if row["layout"] == "dp_ep" else 1
        for context in ints(args.contexts):
            for batch in ints(args.batches):
                note(row, f"decode_{context}_b{batch}_ms", decode(server, context, batch * ranks))
        for load in filter(None, args.loads.split(",")):
            note(row, f"bench_{load}", bench(args, server, model, load, f"{name}-{load}"))
    note(row, "peak_gib", memory.peak_gib)


def note(row: dict[str, Any], key: str, value: Any) -> None:
    row[key] = value
    print(f"{row['layout']}, MTP {row['drafts']}, {row['who']}: {key} {value}", flush=True)


def asked(length: int, tokens: int) -> dict[str, Any]:
    """A prompt that no cache knows."""
    ids = [random.randrange(300, 600) for _ in range(length)]
    return {"prompt": ids, "max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True, "temperature": 0}


def decode(server: Server, context: int, requests: int) -> float:
    """Median ms between two answers of a stream, while all requests decode."""
    with ThreadPoolExecutor(requests) as pool:
        streams = list(pool.map(lambda _: stream(server, context), range(requests)))
    begin, end = max(times[0] for times in streams), min(times[-1] for times in streams)
    gaps = [
        after - before
        for times in streams
        for before, after in zip(times, times[1:], strict=False)
        if begin <= before and after <= end
    ]
    # Where prefills took longer than the answers, no moment had all requests decoding.
    return round(1e3 * statistics.median(gaps), 3) if gaps else math.nan


def stream(server: Server, context: int) -> list[float]:
    """When each part of an answer came. Long enough to be still decoding when the last of many requests has begun."""
    times = []
    with post(server, "/v1/completions", asked(context, STEPS + context // 64) | {"stream": True}) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
    return times


def bench(args: argparse.Namespace, server: Server, model: Path, load: str, name: str) -> dict[str, float]:
    """`vllm bench serve` with random prompts."""
    before, after = load.split("x")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai"]
    command += ["--base-url", server.base_url, "--model", NAME, "--tokenizer", str(model), "--dataset-name", "random"]
    command += ["--random-input-len", before, "--random-output-len", after, "--ignore-eos"]
    command += ["--num-prompts", str(args.load_requests), "--save-result", "--result-dir", str(args.out)]
    done = subprocess.run([*command, "--result-filename", f"{name}.json"], capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"vllm bench serve ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found = json.loads((args.out / f"{name}.json").read_text())
    keys = ("output_throughput", "total_token_throughput", "median_ttft_ms", "median_tpot_ms", "median_itl_ms")
    return {key: round(found[key], 2) for key in keys}


class Memory:
    """The most memory that any GPU holds while the block runs, as nvidia-smi says; 0 without it."""

    def __enter__(self) -> "Memory":
        self.peak_gib, self.ended = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while shutil.which("nvidia-smi"):
            used = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
            self.peak_gib = max([self.peak_gib, *(round(int(mib) / 1024, 1) for mib in used)])
            if self.ended.wait(1):
                return

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def table(results: list[dict[str, Any]]) -> None:
    """Of each layout and draft: stock, plugin, and how many times as fast the plugin is."""
    print(f"\n{'':<44}{'stock':>12}{'plugin':>12}")
    pairs: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in results:
        pairs.setdefault((row["layout"], row["drafts"]), {})[row["who"]] = row
    for (layout, drafts), rows in pairs.items():
        for key in {key: None for row in rows.values() for key in row}:  # in their order
            if key in ("layout", "drafts", "who", "failed"):
                continue
            a, b = (middle(rows.get(who, {}).get(key, math.nan)) for who in ("stock", "plugin"))
            ratio = f"{a / b:>8.2f}x" if key.endswith("_ms") and a / b > 0 else ""
            print(f"{f'{layout}, MTP {drafts}: {key}':<44}{a:>12,.1f}{b:>12,.1f}{ratio}")


def middle(value: Any) -> float:
    if isinstance(value, dict):
        return float(value["output_throughput"])
    return float(statistics.median(value) if isinstance(value, list) else value)


if __name__ == "__main__":
    sys.exit(main())
