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
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from serving import (
    STEPS,
    Memory,
    asked,
    bench,
    cache_tokens,
    decode,
    draft_flags,
    fill,
    gate,
    ints,
    planted_model,
    post,
    prefill,
    published_config,
    served,
    words,
    write_model,
)

from vllm_dsa.testing.server import ServerError, exit_on_sigterm

LAYOUTS = {
    "tp": ["--tensor-parallel-size", "{gpus}"],
    "dp_ep": ["--data-parallel-size", "{gpus}", "--enable-expert-parallel"],
}
REPEATS = 3


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
    model = write_model(args.out / "model", model_config(args))
    planted = planted_model(args.out, 16 * args.gpus, args.gpus)
    results: list[dict[str, Any]] = []
    red = []
    for layout in args.layouts.split(","):
        flags = [flag.format(gpus=args.gpus) for flag in LAYOUTS[layout]] if args.gpus > 1 else []
        flags += args.serve.split()
        if not gate(planted, layout, args.out / f"gate-{layout}.log", flags, seconds=args.start_seconds):
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


def model_config(args: argparse.Namespace) -> dict[str, Any]:
    """The published config at the asked size; a vocabulary of the tests' tokenizer."""
    config = published_config()
    config |= {
        "num_hidden_layers": args.layers,
        "first_k_dense_replace": min(config["first_k_dense_replace"], args.layers),
        "n_routed_experts": args.experts,
        "vocab_size": 0,
    }
    return config | json.loads(args.config)


def measure(args: argparse.Namespace, model: Path, flags: list[str], row: dict[str, Any]) -> None:
    """One server: everything that is measured, into ``row``."""
    name = f"{row['layout']}-mtp{row['drafts']}-{row['who']}"
    flags = ["--load-format", "dummy", *flags]
    begin = time.monotonic()
    env = {"VLLM_MOE_ROUTING_SIMULATION_STRATEGY": args.routing}
    options = dict(env=env, seconds=args.start_seconds)
    with Memory() as memory, served(model, row["who"], args.out / f"{name}.log", *flags, **options) as server:
        note(row, "load_s", round(time.monotonic() - begin, 1))
        note(row, "kv_tokens", cache_tokens(server))
        post(server, "/v1/completions", asked(words(300), 8)).read()
        for length in ints(args.lens):
            note(row, f"prefill_{length}_ms", prefill(server, length, REPEATS))
        ranks = args.gpus if row["layout"] == "dp_ep" else 1
        for context in ints(args.contexts):
            for batch in ints(args.batches):
                prompts = [words(context) for _ in range(batch * ranks)]
                fill(server, prompts)
                # Another data-parallel rank may get a prompt than the one that knows it: long enough for that.
                note(row, f"decode_{context}_b{batch}_ms", decode(server, prompts, STEPS + context // 64))
        for load in filter(None, args.loads.split(",")):
            before, after = map(int, load.split("x"))
            found = bench(server, model, args.out / f"{name}-{load}.json", before, after, args.load_requests)
            note(row, f"bench_{load}", found)
    note(row, "peak_gib", memory.peak_gib)


def note(row: dict[str, Any], key: str, value: Any) -> None:
    row[key] = value
    print(f"{row['layout']}, MTP {row['drafts']}, {row['who']}: {key} {value}", flush=True)


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
