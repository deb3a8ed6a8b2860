"""Weights that change after the start, by reload, adapter or sleep: what derives from them follows, or vLLM refuses."""

import dataclasses
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
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)

SIZES = dict(num_hidden_layers=2, num_attention_heads=2, index_n_heads=8, index_topk=16)
PROMPTS = [torch.randint(8, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (12, 90, 200)]
# What differs between the first checkpoint and the third: what DSA layers derive from and hold.
CHANGED = ("kv_b_proj", "indexer.wk", "weights_proj", "k_norm", "kv_a_layernorm")


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(shard).items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two random checkpoints of one shape; in a third, only what is named in CHANGED differs from the first."""
    first, second, third = (tmp_path_factory.mktemp(name) for name in ("first", "second", "third"))
    for path, seed in ((first, 1), (second, 2), (third, 1)):
        write_random(path, seed=seed, **SIZES)
    other = tensors_of(second)
    for shard in sorted(third.glob("*.safetensors")):
        tensors = load_file(shard)
        tensors |= {name: other[name] for name in tensors if any(part in name for part in CHANGED)}
        save_file(tensors, shard, metadata={"format": "pt"})
    return first, second, third


@pytest.fixture(scope="module")
def fresh(folders):
    """Log-probabilities of an engine started on the second checkpoint, and of one on the third."""
    answers = []
    for path in folders[1:]:
        with engine(path) as running:
            answers.append(logprobs(running))
    return answers


@pytest.fixture(scope="module")
def running(folders):
    """An engine on the first checkpoint; every test leaves it as it was."""
    with engine(folders[0]) as started:
        yield started


@pytest.fixture(scope="module")
def first(running):
    """What that engine answered before anything was changed."""
    return logprobs(running)


def logprobs(running) -> torch.Tensor:
    assert running.llm.reset_prefix_cache()
    return torch.cat(running.prompt_logprobs(PROMPTS))


def reload(running, **options) -> None:
    running.llm.collective_rpc("reload_weights", kwargs=options)


def test_reloaded_weights_answer_like_a_fresh_engine(folders, fresh, running, first):
    for path, expected in zip(folders[1:], fresh, strict=True):
        assert (first - expected).abs().median() > 1e-3, "the checkpoints do not differ"
        reload(running, weights_path=str(path))
        assert torch.equal(logprobs(running), expected)
    reload(running, weights_path=str(folders[0]))
    assert torch.equal(logprobs(running), first)


def in_kernel_format(running, weights) -> None:
    with torch.no_grad():  # vLLM 0.32 leaves that to the caller
        reload(running, weights_iterator=list(weights.items()), is_checkpoint_format=False)


def as_sparse_patches(running, weights) -> None:
    """What vLLM's sparse weight transfer does with what it receives."""
    load_checkpoint_weight_patches(
        running.model,
        [
            CheckpointWeightPatch(name, tuple(t.shape), t.dtype, t.flatten(), torch.arange(t.numel()))
            for name, t in weights.items()
        ],
    )


@pytest.mark.parametrize("update", [in_kernel_format, as_sparse_patches])
def test_weights_written_in_place_are_followed(folders, fresh, running, first, update):
    """Ways to update on which vLLM calls no process_weights_after_loading. On a CPU, only these weights are plain."""
    for path, expected in ((folders[2], fresh[1]), (folders[0], first)):
        live = dict(running.model.named_parameters())
        changed = {n: t for n, t in tensors_of(path).items() if n in live and any(part in n for part in CHANGED)}
        update(running, changed)
        assert torch.equal(logprobs(running), expected)


def discard(model) -> None:
    """Fill every tensor that the model's modules hold, in whatever way, with bytes of ones: NaN, or -1."""

    def fill(value) -> None:
        if isinstance(value, torch.Tensor):
            value.detach().unsqueeze(0).view(torch.uint8).fill_(255)
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                fill(item)
        elif dataclasses.is_dataclass(value):
            fill([getattr(value, field.name) for field in dataclasses.fields(value)])

    for module in model.modules():
        fill({name: value for name, value in vars(module).items() if name != "_modules"})


def test_sleep_that_discards_the_weights(running, first):
    """vLLM's sleep level 2, which only GPUs have, as its worker goes about it: buffers are kept, all else is lost."""
    saved = {name: buffer.cpu().clone() for name, buffer in running.model.named_buffers()}
    layer, rotary = running.layers[0], running.layers[0].rope.cos_sin
    aliases = [t.data_ptr() for t in (layer.w_uk, layer.w_uv, rotary)]
    discard(running.model)
    assert layer.w_uk.isnan().all() and layer.norms.latent_weight.isnan().all() and rotary.isnan().all()
    for name, buffer in running.model.named_buffers():
        buffer.data.copy_(saved[name])
    reload(running)
    assert torch.equal(logprobs(running), first)
    assert [t.data_ptr() for t in (layer.w_uk, layer.w_uv, layer.rope.cos_sin)] == aliases, "a CUDA graph has these"
    assert layer.norms.latent_weight.data_ptr() == layer.kv_a_layernorm.weight.data_ptr()
    assert layer.norms.index_bias.data_ptr() == layer.indexer.k_norm.bias.data_ptr()


def test_an_adapter_is_refused_not_ignored(running, tmp_path):
    """Without --enable-lora (refused at start, see test_platform.py) a request that names an adapter is an error."""
    tensors, rank = {}, 2
    for module, inputs, outputs in (("kv_b_proj", 512, 512), ("indexer.wk", 128, 128)):
        prefix = f"base_model.model.model.layers.0.self_attn.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.ones(rank, inputs)
        tensors[f"{prefix}.lora_B.weight"] = torch.ones(outputs, rank)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["kv_b_proj", "wk"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(VLLMValidationError, match="LoRA is not enabled"):
        running.llm.generate(
            {"prompt_token_ids": PROMPTS[0]},
            SamplingParams(max_tokens=1, detokenize=False),
            lora_request=LoRARequest("adapter", 1, str(tmp_path)),
            use_tqdm=False,
        )


def test_sleep_mode_is_refused_on_cpu(folders):
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        engine_config(folders[0], enable_sleep_mode=True)
