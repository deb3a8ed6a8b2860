"""The shape of cost: a long prompt takes little more memory than a short one, and decode after one little more time."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine import Engine, engine
from faults import planted
from tiny_checkpoint import write_random
from vllm import SamplingParams

from vllm_dsa import cache

MORE_MEMORY = 300  # MB, for 12,000 tokens over 1,000
BUDGET = 8  # MiB of select's temporaries
LENGTHS = (4096, 16_384)
MORE_TIME = 1.5  # decode after the longer of LENGTHS over the shorter
STEPS, ROUNDS = 4, 5
# benchmarks/cpu.py's model, in dummy weights.
SHAPE = dict(
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=16,
    index_n_heads=64,
    index_topk=256,
    hidden_size=2048,
    q_lora_rank=768,
    intermediate_size=2048,
    first_k_dense_replace=4,
    num_nextn_predict_layers=0,
)


def test_long_prompts_take_little_more_memory():
    """What 12,000 tokens add to the peak of 1,000, the pages of the KV cache that are written first (58 MB) included;
    and that a select which does not mind its budget is noticed."""
    environment = os.environ | {"VLLM_DSA_SCORE_BUDGET_MB": str(BUDGET), "PYTHONPATH": os.pathsep.join(sys.path)}
    program = Path(__file__).with_name("prompt_costs.py")
    done = subprocess.run(
        [sys.executable, program, "--fault"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    short, long, broken = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert short["right"] and long["right"] and broken["right"]
    assert long["peak_mb"] - short["peak_mb"] <= MORE_MEMORY
    assert broken["peak_mb"] - short["peak_mb"] > MORE_MEMORY


def every_position(layer) -> dict:
    """Dense attention: one wide selection for all layers."""
    return {
        "config": replace(layer.config, index_topk=LENGTHS[1] + 64),
        "selection": torch.empty(4096, LENGTHS[1] + 64, dtype=torch.int32),
    }


@contextmanager
def without_layers(running: Engine) -> Iterator[None]:
    """A model that computes nothing: prompts are taken in at once, and the caches stay as they are."""
    model = running.model.model
    model.forward = lambda ids, positions, *rest, **others: torch.zeros(
        len(ids), SHAPE["hidden_size"], dtype=model.norm.weight.dtype
    )
    try:
        yield
    finally:
        del model.forward


def fill_caches(running: Engine) -> None:
    """Every slot of both caches, as if tokens were there."""
    for layer in running.layers:
        layer.kv_cache.normal_()
        pages = layer.indexer.cache.pages
        slots = torch.arange(len(pages) * layer.kv_cache.shape[2])
        cache.store_index_keys(torch.randn(len(slots), layer.indexer.head_dim), slots, pages)


def decode_seconds(running: Engine, length: int) -> list[float]:
    """CPU time of each step after a prompt of so many tokens."""
    params = SamplingParams(max_tokens=STEPS + 1, ignore_eos=True, temperature=0, detokenize=False)
    stepped = running.llm.llm_engine

    def step() -> float:
        start = time.process_time()
        while not stepped.step():
            pass
        return time.process_time() - start

    stepped.add_request(f"{length} {time.monotonic()}", {"prompt_token_ids": [8] * length}, params)
    with without_layers(running):
        step()
    times = [step() for _ in range(STEPS)]
    assert not stepped.has_unfinished_requests()
    return times


def growth(running: Engine, rounds: int) -> float:
    """Decode after the longer prompt over decode after the shorter, least CPU times of steps taken in turns."""
    times: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for _ in range(rounds):
        for length in LENGTHS:
            times[length] += decode_seconds(running, length)
    short, long = (min(times[length]) for length in LENGTHS)
    print(f"decode: {1e3 * short:.1f} ms of CPU time after {LENGTHS[0]} tokens, {1e3 * long:.1f} after {LENGTHS[1]}")
    return long / short


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_decode_costs_little_more_after_long_prompts(tmp_path, dtype):
    write_random(tmp_path)
    options = dict(
        load_format="dummy",
        hf_overrides=SHAPE,
        dtype=dtype,
        max_model_len=LENGTHS[1] + 64,
        max_num_batched_tokens=4096,
        num_gpu_blocks_override=LENGTHS[1] // 16 + 16,
        enable_prefix_caching=False,
    )
    with engine(tmp_path, **options) as running:
        fill_caches(running)
        assert growth(running, ROUNDS) <= MORE_TIME
        with planted(every_position, running.layers):
            assert growth(running, 2) > MORE_TIME
