"""One rank of DeepSeek-V3.2 on one GPU, stock vLLM or this plugin, through `vllm serve`: what users gain.

    python benchmarks/rank.py gate                              first: the planted checkpoint, both caches, the plugin
    python benchmarks/rank.py start --who stock                 how long a start takes; cold, then warm
    python benchmarks/rank.py times --who stock                 a run of at most ten minutes: one side, one cache
    python benchmarks/rank.py times --who plugin                without compiled kernels in two: --decodes '', --lens ''
    python benchmarks/rank.py load --who stock                  `vllm bench serve`, 2,048 + 256 tokens, saturating
    python benchmarks/rank.py drafts --who stock                with one MTP token
    python benchmarks/rank.py table                             stock / plugin of what one machine measured in one day

A rank is what one GPU of ``--tp`` holds, all layers of it: its heads, its share of every MLP and expert and of the
vocabulary. There is no second rank and so NO COLLECTIVE: a real rank also waits for the others, twice a layer.
``--ep N`` is instead one of N ranks that share the experts and hold everything else (--tp 1).

Weights and routing are drawn, for both sides alike (drawn_weights.py); the experts that a step hits are printed. Gates:
`gate` must be right before anything is timed, and the log-probabilities of one prompt, which every run measures before
it times anything, must agree between the sides up to index_topk tokens (`table` prints no ratio else). Past index_topk
they are printed: there each side selects by its own rounding.

Results are appended to ``--results``, a row a run; a row says the day, the machine, the versions and the commit. The
caches of compiled kernels are in ``--caches``, a folder a side: a start is cold where it is fresh, warm where a `start`
has filled it, and else between the two. `start` starts a server as users do. In the other runs DeepGEMM is not warmed
up before the first request: on an H200 that compiles hundreds of kernels for all sizes of a step, for more than ten
minutes where none is there yet, on either side. The sizes that are measured are compiled by the first request of each,
which is not counted.
"""

import argparse
import gzip
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from drawn_weights import NAME as DRAWN
from drawn_weights import experts_hit, install
from serving import (
    HERE,
    STEPS,
    WORDS,
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
    stream,
    words,
    write_model,
)

import vllm_dsa
from vllm_dsa.testing.server import DIRECT, Server, exit_on_sigterm

BATCHED_TOKENS = 16384
TURNS = 2  # of decode; a third where they differ by more than SPREAD
SPREAD = 0.02
# Half of the differences between the sides' log-probabilities must be below this share of what two unrelated tokens'
# log-probabilities differ by. Set before both sides have run alike. With outputs of the experts 2.5 times as large on
# one side it was 0.53.
AGREEMENT = 0.1
PROFILED_STEPS = 8
# Kernels by the part of a step that they belong to; the first that matches.
PARTS = {
    "scores": r"mqa_logits|_score_kernel",
    "top-k": r"top_?k_kernel|persistent_topk|TopK|topk_per_row|_rank",
    "attend": r"flash|_attend|splitkv|sparse_attn|_merge|combine|_widen|_shift|slots|upconvert",
    "write": r"_write_|fused_q_kernel|fused_norm_rope|indexer_k_quant|concat_and_cache|_rotate",
    "experts": r"fp8_gemm.*(grouped|contiguous|masked)|grouped|moe|expert|silu|act_and_mul|scatter|gather|permute",
    "linear layers": r"gemm|cutlass|nvjet|cublas|splitK|matmul|gemv|bmm",
    "quantising activations": r"quant|fp8",
    "norms": r"norm",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gate", "start", "times", "load", "drafts", "table"))
    parser.add_argument("--who", choices=("stock", "plugin"), default="plugin")
    parser.add_argument("--kv-cache-dtype", default="fp8_ds_mla", choices=("fp8_ds_mla", "auto"))
    parser.add_argument("--published", type=Path, default=HERE / "v32" / "config.json")
    parser.add_argument("--tp", type=int, default=8, help="ranks that share heads, MLPs, experts and vocabulary")
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts, each whole")
    parser.add_argument("--config", default="{}", help="JSON: further values of the model's config, e.g. fewer layers")
    parser.add_argument("--serve", default="", help="further arguments of vllm serve, separated by spaces")
    parser.add_argument("--lens", default="4096,32768,131072", help="of prefills")
    parser.add_argument("--decodes", default="4096:64,16,1;32768:24,16,1", help="context:batches, the largest first")
    parser.add_argument("--profile", default="16", help="requests of the decode step to profile; empty: none")
    parser.add_argument("--requests", type=int, default=256, help="of the load")
    parser.add_argument("--start-seconds", type=float, default=600, help="how long a server may take to start")
    parser.add_argument("--caches", type=Path, help="of compiled kernels; by default OUT/caches-WHO")
    parser.add_argument("--commit", default="", help="that is measured, where git is not at hand")
    parser.add_argument("--gpu", default="", help="which GPU, as CUDA_VISIBLE_DEVICES names it")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "rank.json")
    parser.add_argument("--out", type=Path, default=Path("rank"))
    args = parser.parse_args()
    if args.what == "table":
        print("\n".join(table(json.loads(args.results.read_text()))))
        return 0
    exit_on_sigterm()
    args.out.mkdir(parents=True, exist_ok=True)
    green = args.out / "gate-is-green"
    flags = args.serve.split()
    if args.what == "gate":
        green.unlink(missing_ok=True)  # of an earlier gate
        if gates(args, flags):
            green.touch()
        return int(not green.exists())
    if not green.exists():
        print("Nothing is timed before the gate is green: run `rank.py gate` with the same --out.")
        return 1
    config = rank_config(args)
    model = write_model(args.out / f"model-tp{args.tp}-ep{args.ep}", config)
    row = facts(args, config)
    try:
        run(args, model, config, flags, row)
    except Exception as error:  # whatever ends a run, what it measured is kept
        row["failed"] = getattr(error, "cause", "") or str(error)[-2000:]
        raise
    finally:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        rows = json.loads(args.results.read_text()) if args.results.exists() else []
        args.results.write_text(json.dumps([*rows, row], indent=1) + "\n")
    return 0


def gates(args: argparse.Namespace, flags: list[str]) -> bool:
    """The planted checkpoint at this rank's heads under the plugin, both caches at the same time."""
    planted = planted_model(args.out, rank_config(args)["num_attention_heads"])
    flags += ["--max-num-seqs", "8", "--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(2 << 30)]

    def right(cache: str) -> bool:
        log = args.out / f"gate-{cache}.log"
        return gate(planted, cache, log, flags, cache=cache, env=gpu(args), seconds=args.start_seconds)

    with ThreadPoolExecutor(2) as pool:
        return all(pool.map(right, ("fp8_ds_mla", "auto")))


def gpu(args: argparse.Namespace) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": args.gpu} if args.gpu else {}


def rank_config(args: argparse.Namespace) -> dict[str, Any]:
    """The published config at one rank's sizes."""
    config = published_config(args.published)
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"):
        config[key] = exact(config[key], args.tp, key)
    config["vocab_size"] = -(-config["vocab_size"] // args.tp)
    config["n_routed_experts"] = exact(config["n_routed_experts"], args.ep, "n_routed_experts")
    return config | json.loads(args.config)


def exact(size: int, ranks: int, key: str) -> int:
    if size % ranks:
        raise SystemExit(f"{key} {size} is not shared by {ranks} ranks alike: choose another --tp or --ep.")
    return size // ranks


def facts(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """Of one run: when, where, what."""
    root = HERE.parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    versions = {name: installed(name) for name in ("vllm", "torch", "triton")}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "machine": machine(args.gpu),
        "versions": {"vllm-dsa": vllm_dsa.__version__} | versions,
        "commit": args.commit or found.stdout.strip(),
        "what": args.what,
        "who": args.who,
        "cache": args.kv_cache_dtype,
        "rank": {"tp": args.tp, "ep": args.ep, "heads": config["num_attention_heads"]},
        "layers": config["num_hidden_layers"],
    }


def machine(gpu: str) -> str:
    """GPU and driver, or the lack of them."""
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,uuid",
        "--format=csv,noheader",
        *(["-i", gpu] if gpu else []),
    ]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "no GPU"


def installed(name: str) -> str:
    for distribution in (name, f"{name}-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return ""


def run(args: argparse.Namespace, model: Path, config: dict[str, Any], flags: list[str], row: dict[str, Any]) -> None:
    caches = (args.caches or args.out / f"caches-{args.who}").resolve()
    filled = caches / "filled-by-a-start"
    kind = "warm" if filled.exists() else "between" if caches.exists() else "cold"
    caches.mkdir(parents=True, exist_ok=True)
    traces = (args.out / f"traces-{args.who}").resolve()
    contexts = parse_decodes(args.decodes) if args.what in ("times", "drafts") else {}
    longest = max([*ints(args.lens), *contexts]) if args.what in ("start", "times") else 40_000
    batches = sorted({1, *(batch for found in contexts.values() for batch in found)})
    flags = ["--load-format", DRAWN, "--max-num-batched-tokens", str(BATCHED_TOKENS), *flags]
    flags += ["--max-model-len", str(longest + 1024)]
    if args.what == "times":
        flags += ["--max-num-seqs", str(max(batches))]
        flags += ["--compilation-config", json.dumps({"cudagraph_capture_sizes": batches})]
        flags += ["--profiler-config", json.dumps(profiler(traces))] if args.profile else []
    if args.what == "drafts":
        flags += ["--max-num-seqs", str(max(batches)), *draft_flags(1)]
    # Everything that compiles keeps its kernels below the home folder.
    env = {"HOME": str(caches), "XDG_CACHE_HOME": str(caches / ".cache"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "i")}
    scale = config["routed_scaling_factor"] if args.who == "stock" else 1.0
    env |= install(args.out / f"drawn-{args.who}", scale) | gpu(args)
    if args.what != "start":
        env["VLLM_DEEP_GEMM_WARMUP"] = "skip"
    log = args.out / f"{args.what}-{args.who}-{args.kv_cache_dtype}.log"
    options = dict(cache=args.kv_cache_dtype, env=env, seconds=args.start_seconds)
    begin = time.monotonic()
    with Memory(args.gpu) as memory, served(model, args.who, log, *flags, **options) as server:
        note(row, f"start_{kind}_s", round(time.monotonic() - begin, 1))
        note(row, "log", from_log(server))
        note(row, "cache_tokens", cache_tokens(server))
        post(server, "/v1/completions", asked(words(300), 8)).read()
        if args.what == "start":
            filled.touch()
        elif args.what == "load":
            for name, value in bench(server, model, log.with_suffix(".json"), 2048, 256, args.requests).items():
                note(row, name, [value] if name.endswith("_ms") else value)
        else:
            measure(server, args, config, contexts, traces, row)
    note(row, "peak_gib", memory.peak_gib)
    note(row, "compiled", compiled(caches))


def measure(
    server: Server,
    args: argparse.Namespace,
    config: dict[str, Any],
    contexts: dict[int, list[int]],
    traces: Path,
    row: dict[str, Any],
) -> None:
    """Log-probabilities, then times, then profiles."""
    drafts = int(args.what == "drafts")
    note(row, "agreement", agreement(args, logprobs(server, config["index_topk"])))
    for length in () if drafts else ints(args.lens):
        note(row, f"prefill_{length}_ms", prefill(server, length, 4 if length < 65536 else 2))
    prompts = {context: decodes(server, config, context, sizes, 1 + drafts, row) for context, sizes in contexts.items()}
    if drafts:
        note(row, "drafts_taken", drafts_taken(server))
    elif args.profile:
        profiles(server, traces, prompts, int(args.profile), config["num_hidden_layers"], row)


def parse_decodes(text: str) -> dict[int, list[int]]:
    """ "4096:64,16,1;32768:24" to the batches of each context, the largest first: it brings the prompts."""
    pairs = (part.split(":") for part in text.split(";") if part)
    return {int(context): sorted(ints(batches), reverse=True) for context, batches in pairs}


def decodes(
    server: Server, config: dict[str, Any], context: int, batches: list[int], rows: int, row: dict[str, Any]
) -> list[list[int]]:
    """Times of decode steps of so many rows a request, by how many requests decode; returns their prompts."""
    prompts = [words(context) for _ in range(batches[0])]
    fill(server, prompts)
    experts = config["n_routed_experts"], config["num_experts_per_tok"]
    for batch in batches:
        turns = [decode(server, prompts[:batch], 2 * STEPS) for _ in range(TURNS)]
        if max(turns) > (1 + SPREAD) * min(turns):
            turns.append(decode(server, prompts[:batch], 2 * STEPS))
        note(row, f"decode_{context}_b{batch}_ms", sorted(turns))
        note(row, f"experts_hit_b{batch}", experts_hit(*experts, batch * rows))
    return prompts


def drafts_taken(server: Server) -> float:
    """Of all draft tokens so far, the share that was accepted."""
    with DIRECT.open(f"{server.base_url}/metrics") as reply:
        text = reply.read().decode()
    counted = []
    for name in ("draft_tokens", "accepted_tokens"):
        values = re.findall(rf"^vllm:spec_decode_num_{name}_total{{.*}} (\S+)$", text, re.MULTILINE)
        counted.append(sum(map(float, values)))
    drafted, taken = counted
    return round(taken / drafted, 4) if drafted else 0.0


def profiles(
    server: Server, traces: Path, prompts: dict[int, list[list[int]]], batch: int, layers: int, row: dict[str, Any]
) -> None:
    """Kernels of a decode step at every context and of one prefill. After all that is timed: a profiler slows every
    later launch."""
    for context, known in prompts.items():
        fill(server, known[:batch])  # those of an earlier context have left the cache
        with ThreadPoolExecutor(batch) as pool:
            streams = [pool.submit(stream, server, prompt, 12 * STEPS) for prompt in known[:batch]]
            time.sleep(2)  # until all of them decode
            post(server, "/start_profile", {"max_iterations": PROFILED_STEPS}).read()
            time.sleep(2)
            post(server, "/stop_profile").read()
            decoding = not any(each.done() for each in streams)
        found = kernels(newest(traces), layers) | {"all_decoding": decoding}
        note(row, f"profile_decode_{context}_b{batch}", found)
    post(server, "/start_profile").read()
    prefill(server, 4096, 0)
    post(server, "/stop_profile").read()
    note(row, "profile_prefill_4096", kernels(newest(traces), layers))


def profiler(folder: Path) -> dict[str, Any]:
    """vLLM's profiler: GPU kernels only, so that it costs the host little."""
    return {
        "profiler": "torch",
        "torch_profiler_dir": str(folder),
        "torch_profiler_activities": ["CUDA"],
        "torch_profiler_with_stack": False,
        "torch_profiler_dump_cuda_time_total": False,
    }


def newest(folder: Path, seconds: float = 60) -> list[dict[str, Any]]:
    """GPU events of the trace that was written last, once it is whole; it is removed then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for path in folder.glob("*.json.gz"):
            try:
                with gzip.open(path, "rt") as file:
                    events = json.load(file)["traceEvents"]
            except (EOFError, ValueError, OSError):
                continue
            path.unlink()
            return [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        time.sleep(0.5)
    raise RuntimeError(f"no trace has come to {folder} within {seconds:g} s: see the server's log.")


def kernels(events: list[dict[str, Any]], layers: int) -> dict[str, Any]:
    """ms a step: the time between first and last kernel, that in which any kernel runs, and the sums of kernels by
    part and of the largest ones. How many steps there are, the kernels tell that run once a layer."""
    counts = Counter(event["name"] for event in events)
    steps = Counter(n // layers for n in counts.values() if n % layers == 0).most_common(1)[0][0]
    busy, until = 0.0, 0.0
    spans = sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events)
    for start, end in spans:
        busy, until = busy + max(0.0, end - max(start, until)), max(end, until)
    sums: Counter[str] = Counter()
    for event in events:
        sums[event["name"]] += float(event["dur"])
    parts: Counter[str] = Counter()
    for name, us in sums.items():
        parts[part_of(name)] += us
    ms = 1e3 * steps
    return {
        "steps": steps,
        "wall_ms": round((until - spans[0][0]) / ms, 3),
        "busy_ms": round(busy / ms, 3),
        "parts_ms": {name: round(us / ms, 3) for name, us in parts.most_common()},
        "kernels": [
            [name[:120], round(counts[name] / steps, 1), round(us / ms, 4)] for name, us in sums.most_common(40)
        ],
    }


def part_of(kernel: str) -> str:
    return next((part for part, pattern in PARTS.items() if re.search(pattern, kernel, re.IGNORECASE)), "the rest")


def logprobs(server: Server, top_k: int) -> dict[str, list[float]]:
    """Of each token of one prompt but its first, up to ``top_k`` tokens and past them; of the same prompt in every
    run."""
    prompt = random.Random(0).choices(WORDS, k=3 * top_k)
    reply = json.load(post(server, "/v1/completions", asked(prompt, 1) | {"prompt_logprobs": 0}))
    found = [
        round(entry[str(token)]["logprob"], 5)
        for token, entry in zip(prompt[1:], reply["choices"][0]["prompt_logprobs"][1:], strict=True)
    ]
    return {"within": found[: top_k - 1], "past": found[top_k - 1 :]}


def agreement(args: argparse.Namespace, found: dict[str, list[float]]) -> dict[str, dict[str, float]] | None:
    """How far these log-probabilities are from the other side's, if that has left its own in OUT."""
    name = "{}-logprobs-{}-{}.json".format(f"tp{args.tp}-ep{args.ep}", args.kv_cache_dtype, "{}")
    (args.out / name.format(args.who)).write_text(json.dumps(found))
    other = args.out / name.format("stock" if args.who == "plugin" else "plugin")
    if not other.exists():
        return None
    theirs = json.loads(other.read_text())
    return {part: differences(found[part], theirs[part]) for part in found}


def differences(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Between two sides' log-probabilities; and the median of it between unrelated tokens of one side."""
    apart = sorted(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    unrelated = statistics.median(abs(a - b) for a, b in zip(ours, ours[len(ours) // 2 :], strict=False))
    middle, most = apart[len(apart) // 2], apart[9 * len(apart) // 10]
    return {"p50": middle, "p90": most, "max": apart[-1], "unrelated": unrelated}


def agree(rows: list[dict[str, Any]]) -> bool:
    """Have the sides of these rows been compared up to index_topk, and agreed?"""
    found = [row["agreement"]["within"] for row in rows if row.get("agreement")]
    return bool(found) and all(each["p50"] <= AGREEMENT * each["unrelated"] for each in found)


def from_log(server: Server) -> dict[str, Any]:
    """What vLLM says of its memory, and this package of its kernels."""
    log, found = server.log(), {}
    for name, pattern in (
        ("weights_gib", r"Model loading took ([\d.]+) GiB"),
        ("loading_s", r"Model loading took [\d.]+ GiB memory and ([\d.]+) seconds"),
        ("available_gib", r"Available KV cache memory: ([\d.]+) GiB"),
        ("graphs_gib", r"Graph capturing finished in \d+ secs, took ([\d.]+) GiB"),
        ("graphs_s", r"Graph capturing finished in (\d+) secs"),
        ("engine_s", r"init engine .* took ([\d.]+) s"),
    ):
        if match := re.search(pattern, log):
            found[name] = float(match[1])
    for name, pattern in (("kernels", r"write: [^(]*"), ("experts", r"Using (\w+) Fp8 MoE backend")):
        if match := re.search(pattern, log):
            found[name] = match[0]
    return found


def compiled(caches: Path) -> dict[str, Any]:
    """How many kernels lie in the caches: Triton's by name, the others by library."""
    names = Counter(
        json.loads(path.read_text()).get("name", "?")
        for path in caches.rglob("*.json")
        if "triton" in str(path) and not path.name.startswith("__")
    )
    cubins = Counter("deep_gemm" if "deep_gemm" in str(path) else "other" for path in caches.rglob("*.cubin"))
    libraries = sum("flashinfer" in str(path) for path in caches.rglob("*.so"))
    return {"triton": dict(sorted(names.items())), "cubins": dict(cubins), "flashinfer": libraries}


def note(row: dict[str, Any], key: str, value: Any) -> None:
    row[key] = value
    print(f"{row['what']}, {row['who']}, {row['cache']}: {key} {value}", flush=True)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Stock, plugin and stock / plugin of what one kind of machine measured in one day, by rank, cache and run; the
    medians of all turns, with the spread of the wider side."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        sizes = f"tp {row['rank']['tp']} ep {row['rank']['ep']}, {row['layers']} layers"
        group = (row["date"].split()[0], row["machine"].rpartition(",")[0] or row["machine"], row["cache"], sizes)
        groups.setdefault(group, []).append(row)
    lines = []
    for group, found in groups.items():
        lines.append(", ".join(group))
        for row in found:
            for part, numbers in (row.get("agreement") or {}).items():
                told = ", ".join(f"{name} {value:.1e}" for name, value in numbers.items())
                lines.append(f"  log-probabilities {part} index_topk: {told}")
        if not agree(found):
            lines.append("  no ratio: the sides do not agree up to index_topk, or were not compared")
            continue
        for what in dict.fromkeys(row["what"] for row in found):
            stock, plugin = ([r for r in found if r["what"] == what and r["who"] == who] for who in ("stock", "plugin"))
            for key in dict.fromkeys(key for row in stock for key in row):
                if line := compare(key, figures(stock, key), figures(plugin, key)):
                    lines.append(f"  {what:<8}{line}")
    return lines


def compare(key: str, stock: list[float], plugin: list[float]) -> str:
    """Medians and their ratio: how many times as fast the plugin is, or as large where no time was measured."""
    if not stock or not plugin:
        return ""
    a, b = statistics.median(stock), statistics.median(plugin)
    spread = max((max(each) - min(each)) / statistics.median(each) for each in (stock, plugin))
    ratio = a / b if key.endswith(("_ms", "_s")) else b / a
    return f"{key:<28}{a:>12,.2f}{b:>12,.2f}{ratio:>7.2f}x  spread {spread:.1%}"


def figures(side: list[dict[str, Any]], key: str) -> list[float]:
    """All that the rows of a side measured under this key."""
    found: list[float] = []
    for row in side:
        value = row.get(key)
        if key.endswith("_ms"):
            found += value or []
        elif key in ("cache_tokens", "peak_gib", "output_throughput", "total_token_throughput") or key.startswith(
            "start_"
        ):
            found += [] if value is None else [value]
    return found


if __name__ == "__main__":
    sys.exit(main())
