"""`vllm-dsa bench --compare stock`: whole layers in vLLM's engine, without this package and with it, in turns.

Each turn is a process of its own, as VLLM_DSA_DISABLE is read at start: this module run with the settings as JSON. The
model has DeepSeek-V3.2's sizes and dummy weights, LAYERS layers, bfloat16 linear layers and no experts. Times are wall
time of one prompt's prefill and of one decode step, a layer's share of it.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_dsa import compat
from vllm_dsa.config import DSAConfig
from vllm_dsa.tools import memory
from vllm_dsa.tools.layouts import stdout_to_stderr
from vllm_dsa.tools.model import dtype_of
from vllm_dsa.tools.output import UserError
from vllm_dsa.tools.progress import progress

LAYERS, TURNS, STEPS, REPEATS, STEP_TOKENS = 6, 2, 40, 5, 16384
TURN_S = 1800
SIZES = {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "torch_dtype": "bfloat16",
    "hidden_size": 7168, "num_hidden_layers": LAYERS, "first_k_dense_replace": LAYERS, "intermediate_size": 2048,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048, "vocab_size": 4096, "hidden_act": "silu",
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "rope_theta": 10000, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "num_nextn_predict_layers": 0, "n_routed_experts": 8, "n_group": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 512, "n_shared_experts": 1, "topk_group": 1, "moe_layer_freq": 1,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "attention_bias": False,
}  # fmt: skip


def results(heads: list[int], lengths: list[int], requests: int, kv_cache_dtype: str) -> list[dict[str, Any]]:
    """Bench results of series "stock" and "plugin": medians of TURNS turns each."""
    found: list[dict[str, Any]] = []
    turns = [(count, name) for count in heads for _ in range(TURNS) for name in ("stock", "plugin")]
    times: dict[tuple[int, str], list[list[dict[str, Any]]]] = {}
    with progress("vLLM's engine", len(turns)) as advance, tempfile.TemporaryDirectory() as folder:
        for count, name in turns:
            advance(f"{name}, {count} heads")
            config = SIZES | {"num_attention_heads": count, "num_key_value_heads": count}
            settings = {"lengths": lengths, "requests": requests, "kv_cache_dtype": kv_cache_dtype}
            rows = turn(Path(folder), config, settings, {"VLLM_DSA_DISABLE": str(int(name == "stock"))})
            times.setdefault((count, name), []).append(rows)
    for (count, name), runs in times.items():
        for same in zip(*runs, strict=True):
            every = [ms for row in same for ms in row["ms"]]
            middle = statistics.median(every)
            facts = {
                "heads": count,
                "context": same[0]["context"],
                "rows": same[0]["rows"],
                "requests": same[0]["requests"],
            }
            spread = (max(every) - min(every)) / middle
            found.append({"op": "engine", "series": name, **facts, "ms": middle, "spread": spread, "runs": len(every)})
    return found


def turn(folder: Path, config: dict[str, Any], settings: dict[str, Any], env: dict[str, str]) -> list[dict[str, Any]]:
    """One process of the measure; its rows. Raises UserError with the end of what it printed if it fails."""
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "vllm_dsa.tools.stock", json.dumps(settings | {"model": str(folder)})]
    try:
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=TURN_S)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"vLLM did not end within {TURN_S} s under {env}. Give shorter --lengths.") from error
    if done.returncode:
        raise UserError(f"vLLM failed under {env}; the end of what it printed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def main() -> None:
    settings = json.loads(sys.argv[1])
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    with stdout_to_stderr():
        rows = measure(**settings)
    print(json.dumps(rows))


def measure(
    model: str, lengths: list[int], requests: int, kv_cache_dtype: str, steps: int = STEPS, repeats: int = REPEATS
) -> list[dict[str, Any]]:
    """For each length the ms a layer of one prefill, ``repeats`` times, and of ``steps`` decode steps."""
    config = json.loads((Path(model) / "config.json").read_text())
    layers, words = config["num_hidden_layers"], range(2, config["vocab_size"])
    # Requests that were read first decode while the others are read.
    waiting = requests * (max(lengths) // STEP_TOKENS + 2)
    tokens = steps + waiting + 8
    longest = max(lengths) + tokens
    token = memory.cache_bytes(DSAConfig.from_hf(config), kv_cache_dtype, dtype_of(config), range(layers))
    llm = compat.LLM(
        model=model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=max(8, requests),
        enable_prefix_caching=False,
        kv_cache_dtype=kv_cache_dtype,
        max_num_batched_tokens=STEP_TOKENS,
        compilation_config={"cudagraph_capture_sizes": sorted({1, requests})},
        # No more than these requests need, so that others may use the GPU as well.
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=(requests + 1) * (longest + memory.BLOCK) * sum(token),
        disable_log_stats=True,
    )
    engine, serial = llm.llm_engine, 0

    def add(length: int, tokens: int) -> None:
        nonlocal serial
        sampling = compat.SamplingParams(
            max_tokens=tokens, min_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False
        )
        ids = random.Random(serial).choices(words, k=length)
        engine.add_request(str(serial), {"prompt_token_ids": ids}, sampling)
        serial += 1

    def drain() -> None:
        while engine.has_unfinished_requests():
            engine.step()

    def prefill(length: int) -> float:
        add(length, 1)
        start = time.perf_counter()
        drain()
        return (time.perf_counter() - start) * 1e3

    def decode(length: int) -> list[float]:
        for _ in range(requests):
            add(length, tokens)
        given: dict[str, int] = {}
        while len(given) < requests or min(given.values()) < 4:  # warm
            given |= {out.request_id: len(out.outputs[0].token_ids) for out in engine.step()}
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            engine.step()
            times.append((time.perf_counter() - start) * 1e3)
        drain()
        return times

    rows = []
    for length in lengths:
        prefill(length)
        for new, count, times in (
            (length, 1, [prefill(length) for _ in range(repeats)]),
            (1, requests, decode(length)),
        ):
            rows.append({"context": length, "rows": new, "requests": count, "ms": [ms / layers for ms in times]})
    llm.llm_engine.engine_core.shutdown()
    return rows


if __name__ == "__main__":
    main()
