"""What a long prompt costs in memory: run as a program by tests/test_cost.py, so that the process is fresh.

Serves the planted checkpoint in this process and prints one JSON line a prompt: its length, the most memory (MB) that
the process held while it was served, and whether its answer was right.
"""

import json
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from engine import Engine, engine
from faults import Patched, planted
from planted_text import build_prompt, build_tokenizer
from tiny_checkpoint import write_planted

from vllm_dsa import cache
from vllm_dsa.kernels import reference

STEP_TOKENS = 2048  # what `vllm serve` takes on a CPU by itself
LENGTHS = (1_000, 12_000)


def whole_score_matrix(layer: Any) -> dict[str, Any]:
    """A select without a budget: every row against every key, all heads, in one product."""

    def select(codes, weights, index_cache, rows, out):
        pages = rows.block_table[0, : -(-rows.ends[0] // rows.block_size)]
        keys, scales = cache.load_index_keys(index_cache, pages, codes.shape[-1])
        dots = (codes.float() @ keys.T).relu_()  # [T, H, length]
        scores = (weights.unsqueeze(1) @ dots).squeeze(1) * scales
        out.fill_(-1)
        for row, length in enumerate(rows.lengths.tolist()):
            chosen = reference.top_k(scores[row, :length], out.shape[1])
            out[row, : len(chosen)] = chosen

    return {"kernels": Patched(layer.kernels, select=select)}


def resident(field: str) -> float:
    """A field of this process's memory, in MB: VmHWM is the most since it was reset."""
    kilobytes = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kilobytes[1]) * 1024 / 1e6


def serve(running: Engine, tokens: int) -> dict[str, Any]:
    prompt, tokenizer = build_prompt(tokens, seed=tokens), build_tokenizer()
    Path("/proc/self/clear_refs").write_text("5")
    answer = running.generate([tokenizer.encode(prompt.text).ids], max_tokens=2)[0]
    right = tokenizer.decode(answer).strip() == prompt.answer
    return {"tokens": tokens, "peak_mb": resident("VmHWM"), "right": right}


def main() -> None:
    with TemporaryDirectory() as folder:
        write_planted(folder, check=False)
        options = dict(max_model_len=16_384, max_num_batched_tokens=STEP_TOKENS, enable_prefix_caching=False)
        with engine(folder, **options) as running:
            for tokens in LENGTHS:
                print(json.dumps(serve(running, tokens)), flush=True)
            if "--fault" in sys.argv:
                with planted(whole_score_matrix, running.layers):
                    print(json.dumps(serve(running, LENGTHS[-1])), flush=True)


if __name__ == "__main__":
    main()
