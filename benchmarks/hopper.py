"""Stock vLLM against this plugin on one GPU, in one run: A-B-A-B, each turn a process of its own.

    python benchmarks/hopper.py --heads 16 --lens 4096,32768,131072 --decode-lens 32768 --batches 32 --mix --profile

Every turn runs benchmarks/v32_layers.py: a truncated DeepSeek-V3.2 with dummy weights, bf16 linear layers, no MoE. The
gate runs first: the planted checkpoint at this head count must answer right under the plugin, else nothing is timed.
A ratio is stock / plugin of the medians; one within the larger of the two spreads is printed as equal.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
GATE = """
import sys
sys.path[:0] = {paths!r}
from planted_text import build_prompt, build_tokenizer, chat_text
from tiny_checkpoint import write_planted
write_planted({model!r}, check=False, dtype="bfloat16", index_topk=128, num_attention_heads={heads}, index_n_heads=64)
from vllm import LLM, SamplingParams
llm = LLM({model!r}, dtype="bfloat16", max_model_len=8192, kv_cache_dtype={cache!r}, gpu_memory_utilization=0.3,
          compilation_config={{"cudagraph_capture_sizes": [1, 8, 32]}})
prompts = [build_prompt(n, n, chat=True, copies=128) for n in (1200, 3000, 6000)]
ids = [build_tokenizer().encode(chat_text(p.text), add_special_tokens=False).ids for p in prompts]
outputs = llm.generate([{{"prompt_token_ids": i}} for i in ids], SamplingParams(max_tokens=4, temperature=0))
given = [o.outputs[0].text.strip() for o in outputs]
right = [p.answer for p in prompts]
print("gate:", given, right)
sys.exit(given != right)
"""


def turn(name: str, env: dict[str, str], log: Path) -> list[dict]:
    """One process of the measure; its rows, with GPU times where it was profiled."""
    done = subprocess.run(
        [sys.executable, str(HERE / "v32_layers.py")], env=env, capture_output=True, text=True, timeout=540
    )
    log.write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}; the end of its output:\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for kind, length, batch, ms in re.findall(
        r"--- (prefill|decode step) L=(\d+)(?: b=(\d+))?: GPU ms ([\d.]+)", done.stdout
    ):
        row = next(r for r in rows if r["L"] == int(length))
        row[f"{'prefill' if kind == 'prefill' else f'decode_b{batch}'}_gpu_ms"] = float(ms)
    return rows


def compare(stock: list[float], plugin: list[float]) -> str:
    """Medians and their ratio, or equal where it lies within the spread."""
    a, b = statistics.median(stock), statistics.median(plugin)
    spread = max((max(x) - min(x)) / statistics.median(x) for x in (stock, plugin))
    ratio = a / b
    verdict = "equal" if abs(ratio - 1) <= spread else f"{ratio:.2f}x"
    return f"{a:10.2f} {b:10.2f}  {verdict:>7}  (spread {spread:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--lens", default="4096,32768")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--decode-lens", help="lengths at which to decode; all by default")
    parser.add_argument(
        "--mix", action="store_true", help="also seven prompts of 1,500 tokens and one of 32,768 at once"
    )
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--kv-cache-dtype", default="fp8_ds_mla")
    parser.add_argument("--profile", action="store_true", help="also print the largest kernels of each")
    parser.add_argument("--out", type=Path, default=Path("hopper-logs"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    engine = {
        "kv_cache_dtype": args.kv_cache_dtype,
        "compilation_config": {"cudagraph_capture_sizes": [1, 8, 32]},
        "max_num_batched_tokens": 16384,
        "kernel_config": {"enable_flashinfer_autotune": False},  # ten seconds of a start; nothing here is FlashInfer's
    }
    env = os.environ | {
        "LAYERS": str(args.layers),
        "HEADS": str(args.heads),
        "LENS": args.lens,
        "BATCHES": args.batches,
        "DECODE_LENS": args.decode_lens or args.lens,
        "MIX": str(int(args.mix)),
        "STEPS": "40",
        "LLM_KW": json.dumps(engine),
    }
    env.pop("OUT", None)
    if args.profile:
        env["PROFILE"] = "14"
    model = args.out / "planted"
    paths = [str(HERE.parent / "examples"), str(HERE.parent)]
    gate = GATE.format(paths=paths, model=str(model), heads=args.heads, cache=args.kv_cache_dtype)
    done = subprocess.run([sys.executable, "-c", gate], capture_output=True, text=True, timeout=400)
    (args.out / "gate.log").write_text(done.stdout + done.stderr)
    print(next((line for line in done.stdout.splitlines() if line.startswith("gate:")), "gate: no answer"), flush=True)
    if done.returncode:
        sys.exit(f"The gate is red; nothing is timed. The end of its output:\n{done.stderr[-3000:]}")
    results: dict[str, list[list[dict]]] = {"stock": [], "plugin": []}
    for i in range(args.turns):
        for name in results:
            disable = {"VLLM_DSA_DISABLE": "1" if name == "stock" else "0"}
            rows = turn(name, env | disable, args.out / f"{name}{i}.log")
            results[name].append(rows)
            print(name, i, json.dumps(rows), flush=True)
    print(f"{args.heads} heads, {args.layers} layers, {args.kv_cache_dtype}; ms: stock, plugin, stock / plugin")
    for at, row in enumerate(results["stock"][0]):
        for key in (k for k in row if k == "prefill_ms" or k.startswith("decode_ms") or k.endswith("gpu_ms")):
            values = {name: [turn_rows[at][key] for turn_rows in turns] for name, turns in results.items()}
            print(f"L={row['L']:>7} {key:<22} {compare(values['stock'], values['plugin'])}")


if __name__ == "__main__":
    main()
