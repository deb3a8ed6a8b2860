"""The whole model against transformers: every prompt token's log-probability, over random checkpoints of odd sizes.

Correct code stays far below the limits: flipped e4m3 codes come from 1e-6 of relative noise between two float32
implementations, a flipped selection from a score tie within that noise. A wrong layout, norm or selection moves the
median by 1e-2.
"""

import json

import pytest
import torch
from engine import Engine, engine
from oracle import Oracle
from tiny_checkpoint import write_random

from vllm_dsa.testing.compare import BFLOAT16_LOGPROBS

# (median, 90th percentile) of |difference| of log-probabilities, by cache dtype.
LIMITS = {"auto": (5e-4, 1.5e-2), "fp8_ds_mla": (6e-3, 4e-2)}
SMALL = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=6, kv_lora_rank=64, qk_nope_head_dim=32)
CHECKPOINTS = {
    "six_heads_yarn": SMALL
    | dict(qk_rope_head_dim=16, v_head_dim=24, index_head_dim=32, index_n_heads=8, index_topk=16, seed=1),
    "topk48_plain_rope": dict(num_attention_heads=6, index_n_heads=8, index_topk=48, rope_scaling=None, seed=2),
    "topk64_yarn": dict(num_attention_heads=2, index_n_heads=16, index_topk=64, num_hidden_layers=4, seed=3),
}
CHUNK = 64


def prompts(config: dict, multiples=(1 / 16, 1, 2, 5, 12), seed: int = 0) -> list[list[int]]:
    """Random token ids; lengths from a few tokens to 12 times index_topk, and index_topk - 1, + 0, + 1."""
    top_k = config["index_topk"]
    lengths = {max(2, int(m * top_k)) for m in multiples} | {top_k - 1, top_k + 1}
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(8, config["vocab_size"], (n,), generator=generator).tolist() for n in sorted(lengths)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> folder of every random checkpoint."""
    folders = {}
    for name, options in CHECKPOINTS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        write_random(folders[name], **options)
    return folders


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def differences(running: Engine, oracle: Oracle, asked: list[list[int]]) -> torch.Tensor:
    """|log-probability here - there| of every prompt token of all prompts."""
    ours = torch.cat(running.prompt_logprobs(asked))
    theirs = torch.cat([oracle.prompt_logprobs(p) for p in asked])
    return (ours - theirs).abs()


def within(difference: torch.Tensor, limits: tuple[float, float]) -> bool:
    return bool(difference.median() <= limits[0] and difference.quantile(0.9) <= limits[1])


@pytest.mark.parametrize(
    "name, kv_cache_dtype",
    [
        ("six_heads_yarn", "auto"),  # kv_lora_rank 64: fp8_ds_mla is refused there, see test_platform.py
        pytest.param("topk48_plain_rope", "auto", marks=pytest.mark.slow),
        ("topk48_plain_rope", "fp8_ds_mla"),
        ("topk64_yarn", "auto"),
        pytest.param("topk64_yarn", "fp8_ds_mla", marks=pytest.mark.slow),
    ],
)
def test_logprobs_equal_transformers(checkpoints, name, kv_cache_dtype):
    folder = checkpoints[name]
    config = config_of(folder)
    asked = prompts(config)
    with engine(folder, kv_cache_dtype=kv_cache_dtype) as running:
        difference = differences(running, Oracle(folder, kv_cache_dtype), asked)
        longest = max(asked, key=len)
        chunks = [n for step in running.steps for n in step.values()]
        assert max(chunks) <= CHUNK and len(longest) > CHUNK, "the prompts were not chunked"
        print(f"{name} {kv_cache_dtype}: p50 {difference.median():.1e} p90 {difference.quantile(0.9):.1e}")
        assert within(difference, LIMITS[kv_cache_dtype]), (difference.median(), difference.quantile(0.9))


def test_bfloat16(checkpoints):
    """bfloat16 against float32: limits of 3 times what was measured (p50 5.7e-3, p90 2.9e-2).

    Every activation is rounded to 8 bits, 2^-9 relative, and there is no oracle for the order of those roundings.
    """
    folder = checkpoints["topk64_yarn"]
    asked = prompts(config_of(folder))
    with engine(folder, dtype="bfloat16") as running:
        difference = differences(running, Oracle(folder), asked)
        print(f"bfloat16: p50 {difference.median():.1e} p90 {difference.quantile(0.9):.1e}")
        assert within(difference, BFLOAT16_LOGPROBS), (difference.median(), difference.quantile(0.9))


def test_topk_of_the_whole_prompt_is_dense(checkpoints):
    """index_topk at least the length is dense attention: equal to transformers' DeepseekV3 with the same weights."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    folder = checkpoints["six_heads_yarn"]
    dense = DeepseekV3ForCausalLM.from_pretrained(
        folder, config=DeepseekV3Config.from_pretrained(folder), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    asked = prompts(config_of(folder), multiples=(12,))[-1]
    with torch.inference_mode():
        logits = dense(torch.tensor([asked])).logits[0, :-1].float().log_softmax(-1)
    expected = logits.gather(-1, torch.tensor(asked[1:]).unsqueeze(-1)).squeeze(-1)
    with engine(folder, hf_overrides={"index_topk": 256}) as running:
        assert (running.prompt_logprobs([asked])[0] - expected).abs().max() < 1e-4
    with engine(folder) as running:
        assert (running.prompt_logprobs([asked])[0] - expected).abs().median() > 1e-2
