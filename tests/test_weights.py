"""Weights that change after the start, by reload, adapter or sleep: what derives from them follows, or vLLM refuses."""

import json

import pytest
import torch
from engine import engine
from safetensors.torch import load_file, save_file
from test_platform import engine_config
from tiny_checkpoint import write_random
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

SIZES = dict(num_hidden_layers=2, num_attention_heads=2, index_n_heads=8, index_topk=16)
PROMPTS = [torch.randint(8, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (12, 90, 200)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two random checkpoints of one shape; in a third, only kv_b_proj and the norms of keys differ from the first."""
    first, second, third = (tmp_path_factory.mktemp(name) for name in ("first", "second", "third"))
    for path, seed in ((first, 1), (second, 2), (third, 1)):
        write_random(path, seed=seed, **SIZES)
    other = {}
    for shard in sorted(second.glob("*.safetensors")):
        other |= load_file(shard)
    for shard in sorted(third.glob("*.safetensors")):
        tensors = load_file(shard)
        for name in tensors:
            if "kv_b_proj" in name or "k_norm" in name or "kv_a_layernorm" in name:
                tensors[name] = other[name]
        save_file(tensors, shard, metadata={"format": "pt"})
    return first, second, third


def logprobs(running) -> torch.Tensor:
    return torch.cat(running.prompt_logprobs(PROMPTS))


def reload(running, **options) -> None:
    running.llm.collective_rpc("reload_weights", kwargs=options)
    assert running.llm.reset_prefix_cache()


def test_reloaded_weights_answer_like_a_fresh_engine(folders):
    fresh = []
    for path in folders[1:]:
        with engine(path) as running:
            fresh.append(logprobs(running))
    with engine(folders[0]) as running:
        first = logprobs(running)
        for path, expected in zip(folders[1:], fresh, strict=True):
            assert (first - expected).abs().median() > 1e-3, "the checkpoints do not differ"
            reload(running, weights_path=str(path))
            assert torch.equal(logprobs(running), expected)
        reload(running, weights_path=str(folders[0]))
        assert torch.equal(logprobs(running), first)


def test_an_adapter_is_refused_not_ignored(folders, tmp_path):
    """Without --enable-lora (refused at start, see test_platform.py) a request that names an adapter is an error."""
    tensors, rank = {}, 2
    for module, inputs, outputs in (("kv_b_proj", 512, 512), ("indexer.wk", 128, 128)):
        prefix = f"base_model.model.model.layers.0.self_attn.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.ones(rank, inputs)
        tensors[f"{prefix}.lora_B.weight"] = torch.ones(outputs, rank)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["kv_b_proj", "wk"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    with engine(folders[0]) as running, pytest.raises(VLLMValidationError, match="LoRA is not enabled"):
        running.llm.generate(
            {"prompt_token_ids": PROMPTS[0]},
            SamplingParams(max_tokens=1, detokenize=False),
            lora_request=LoRARequest("adapter", 1, str(tmp_path)),
            use_tqdm=False,
        )


def test_sleep_mode_is_refused_on_cpu(folders):
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        engine_config(folders[0], enable_sleep_mode=True)
