"""The buffer of selections: as wide as a row can need, and what is published as it is."""

from dataclasses import replace

import pytest
import torch
from engine import engine, unloaded
from test_config import V32
from test_mtp import drafter, speculative
from tiny_checkpoint import write_random

from vllm_dsa.backend import kernel_request
from vllm_dsa.config import DSAConfig
from vllm_dsa.kernels import limits

SIZES = dict(num_attention_heads=2, index_n_heads=8, num_hidden_layers=1, kv_lora_rank=64, index_topk=32768, seed=8)


def test_the_buffer_is_no_wider_than_the_context(tmp_path):
    write_random(tmp_path, **SIZES)
    with unloaded(tmp_path, load_format="dummy", max_model_len=2048) as (model, _):
        assert tuple(model.model.layers[0].self_attn.selection.shape) == (64, 2048)


@pytest.mark.slow
def test_a_wide_index_topk_takes_no_more_than_the_context(tmp_path):
    """The model's and the draft's; answers as with an index_topk that is no wider than the context."""
    write_random(tmp_path, **SIZES)
    generator, answers = torch.Generator().manual_seed(3), []
    prompts = [torch.randint(8, 100, (length,), generator=generator).tolist() for length in (70, 9)]
    for options in ({}, {"hf_overrides": {"index_topk": 2048}}):
        with engine(tmp_path, max_model_len=128, **speculative(2), **options) as running:
            for layer in (*running.layers, drafter(running).model.layer.self_attn):
                assert tuple(layer.selection.shape) == (64, 2048)
            answers.append((running.prompt_logprobs(prompts), running.generate(prompts, 3)))
            request = kernel_request(running.llm.llm_engine.vllm_config, running.layers[0].config)
    assert all(map(torch.equal, answers[0][0], answers[1][0])) and answers[0][1] == answers[1][1]
    gpu = replace(request, device_type="cuda", capability=(9, 0), dtype="bfloat16")
    assert not [reason for reason in limits.triton(gpu) if "index_topk" in reason]


@pytest.mark.parametrize(
    "index_topk, max_model_len, width",
    [
        (2048, 163840, 2048),
        (2048, 1000, 2048),  # as published: its provider and its bits
        (512, 100, 512),
        (32768, 2048, 2048),
        (32768, 500, 2048),
        (32768, 2049, 2176),  # what FlashMLA reads: a multiple of 128
        (32768, 65536, 32768),
        (4000, 3000, 3072),
        (4000, 163840, 4000),
    ],
)
def test_width(index_topk, max_model_len, width):
    assert DSAConfig.from_hf(V32 | {"index_topk": index_topk}).top_k(max_model_len) == width
