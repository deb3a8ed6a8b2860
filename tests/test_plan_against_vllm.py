"""`vllm-dsa plan` says what vLLM itself comes to: pages, tokens, weights, stages, and the lines to paste."""

import json
import re
import shlex

import pytest
import torch
from engine import engine, unloaded
from safetensors.torch import load_file
from test_plan import GIB, SHARED, V32, facts, folders, plan
from tiny_checkpoint import write_random

from vllm_dsa import cache
from vllm_dsa.config import DSAConfig
from vllm_dsa.tools import memory
from vllm_dsa.tools import model as models

__all__ = ["folders"]  # a fixture: config.json of every published model


def tiny(**changes):
    """A config with published cache dims and tiny weights."""
    sizes = dict(vocab_size=512, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, q_lora_rank=64)
    sizes |= dict(num_attention_heads=4, qk_nope_head_dim=32, v_head_dim=32, n_routed_experts=8, index_n_heads=4)
    config = V32 | sizes | dict(n_group=2, topk_group=1, num_experts_per_tok=2, hidden_act="silu", norm_topk_prob=True)
    config |= dict(scoring_func="sigmoid", topk_method="noaux_tc", routed_scaling_factor=1.0, rope_theta=10000)
    config |= dict(num_key_value_heads=4, num_nextn_predict_layers=0, quantization_config=None)
    return config | changes


CASES = {  # config, cache dtype, tokens a request, bytes of a token
    "v32, fp8_ds_mla": (tiny(), "fp8_ds_mla", 65_536, 48_068),
    "glm with sharing, bfloat16, odd length": (
        tiny(model_type="glm_moe_dsa", architectures=["GlmMoeDsaForCausalLM"], num_hidden_layers=9, **SHARED),
        "auto",
        10_001,
        9 * 1152 + 4 * 132,
    ),
}


def tensors_of(module) -> dict[str, torch.Tensor]:
    """Every tensor that a module and its parts hold as a plain attribute: what they have derived, the caches."""
    return {
        f"{name}.{key}": value
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, torch.Tensor)
    }


def planned_by_vllm(vllm_config, backends, specs, available):
    """(blocks, tokens) that vLLM makes of so many bytes; ValueError where it would not start."""
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
    from vllm.v1.core import kv_cache_utils

    layouts = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
    vllm_config.cache_config.kv_cache_layout = None
    vllm_config.cache_config.kv_cache_layout = resolve_kv_cache_layout(vllm_config, [layouts], specs.values()).name
    (planned,) = kv_cache_utils.get_kv_cache_configs(vllm_config, [dict(specs)], [available])
    return planned.num_blocks, kv_cache_utils.get_kv_cache_capacity(vllm_config, planned)[0]


@pytest.mark.parametrize("case", CASES)
def test_blocks_tokens_and_weights_are_vllms(tmp_path, case):
    """What vLLM 0.32 plans over the specs of our own layers, at several sizes of memory; and the model's parameters."""
    config, kind, length, token = CASES[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    dsa = DSAConfig.from_hf(config)
    layers = range(dsa.num_hidden_layers)
    base = [tmp_path, "--gpu", "H200", "--num-gpus", 1, "--kv-cache-dtype", kind, "--max-model-len", length]
    options = dict(kv_cache_dtype=kind, max_model_len=length, dtype="bfloat16", block_size=memory.BLOCK)
    with unloaded(tmp_path, load_format="dummy", skip_tokenizer_init=True, **options) as (model, vllm_config):
        bound = vllm_config.compilation_config.static_forward_context
        specs = {name: layer.get_kv_cache_spec(vllm_config) for name, layer in bound.items() if "self_attn" in name}
        backends = {bound[name].get_attn_backend() for name in specs}
        assert sum(memory.cache_bytes(dsa, kind, "bfloat16", layers)) == token
        assert sum(spec.page_size_bytes for spec in specs.values()) == memory.BLOCK * token
        least = (memory.blocks_of(length) + 1) * memory.BLOCK * token  # one request and the null block
        for available in (least, 41 * GIB + 12_345_678, 100 * GIB):
            ours = facts(*base, "--kv-cache-memory", f"{available}B")["cache"]
            theirs = planned_by_vllm(vllm_config, backends, specs, available)
            assert (ours["blocks"], ours["tokens"]) == theirs
        with pytest.raises(ValueError, match="To serve at least one request"):
            planned_by_vllm(vllm_config, backends, specs, least - 1)
        assert not facts(*base, "--kv-cache-memory", f"{least - 1}B", status=1)["fits"]

        weights, alone = memory.weights(tmp_path, config, dsa), memory.Layout()
        ours = {part: weights.on_gpu(part, alone, layers, layers[-1]) for part in memory.PARTS if part != "MTP"}
        assert sum(ours.values()) - ours["derived"] == sum(parameter.nbytes for parameter in model.parameters())
        derived = 0
        for layer in model.model.layers:
            before = tensors_of(layer.self_attn)
            layer.self_attn.process_weights_after_loading(torch.bfloat16)
            derived += sum(t.nbytes for name, t in tensors_of(layer.self_attn).items() if name not in before)
        assert ours["derived"] == derived
        experts = [p.nbytes for name, p in model.named_parameters() if ".experts." in name]
        assert ours["experts"] == sum(experts)


# An H200, vLLM 0.33.0 and this plugin, 2026-11-22, the turns of benchmarks/hopper.py: heads, and what vLLM logged as
# GiB of "Model loading took", GiB of "Available KV cache memory" and tokens of "GPU KV cache size".
LOGGED = [(128, 3.22, 115.43, 26_196_297), (16, 1.38, 121.51, 27_575_514)]


@pytest.mark.parametrize(("heads", "loaded", "available", "tokens"), LOGGED)
def test_an_h200_has_what_the_plan_says(tmp_path, heads, loaded, available, tokens):
    """Weights to the printed digit, cache memory within 1 %, and the very tokens when given the printed memory."""
    sizes = dict(num_hidden_layers=6, first_k_dense_replace=6, num_nextn_predict_layers=0, vocab_size=4096)
    config = V32 | sizes | dict(num_attention_heads=heads, intermediate_size=2048, quantization_config=None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = [tmp_path, "--gpu", "H200", "--num-gpus", 1, "--max-model-len", 32_872]
    report = facts(*base, "--gpu-memory-utilization", 0.9, "--max-num-batched-tokens", 16_384)
    beside = 16_384 * 2048 * 4 + 163_840 * 64 * 4  # the selection and the RoPE table are made with the model
    assert (sum(report["weights"]["bytes_per_gpu"].values()) + beside) / GIB == pytest.approx(loaded, abs=0.01)
    assert report["cache"]["available_bytes"] / GIB == pytest.approx(available, rel=0.01)
    assert report["cache"]["tokens"] == pytest.approx(tokens, rel=0.01)
    assert "--max-num-batched-tokens 16384" in report["serve"][0]
    text = plan(*base, "--kv-cache-memory", available, status=0)
    low, high = (int(n.replace(",", "")) for n in re.search(r"; ([\d,]+) to ([\d,]+) if the GiB", text).groups())
    assert low <= tokens <= high and high - low < 3000


def test_an_engine_that_drafts_has_the_planned_blocks_and_weights(tmp_path, monkeypatch):
    """A running engine of vLLM with the MTP layer: its pages and tokens. Embedding and head are the model's own."""
    config = write_random(tmp_path, num_hidden_layers=2)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    options = dict(block_size=memory.BLOCK, max_model_len=5000, kv_cache_dtype="fp8_ds_mla")
    base = [tmp_path, "--gpu", "H200", "--num-gpus", 1, "--max-model-len", 5000, "--kv-cache-memory", f"{GIB}B"]
    report, without = facts(*base, "--mtp"), facts(*base)
    with engine(tmp_path, speculative_config={"method": "mtp", "num_speculative_tokens": 1}, **options) as running:
        cache_config = running.llm.llm_engine.vllm_config.cache_config
        draft = running.llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter.model
        assert draft.model.embed_tokens is running.model.model.embed_tokens and draft.lm_head is running.model.lm_head
        assert report["cache"]["bytes_per_token"]["total"] == 3 * (656 + 132)
        assert report["cache"]["blocks"] == cache_config.num_gpu_blocks
        assert report["cache"]["tokens"] == cache_config.kv_cache_size_tokens
    files = [load_file(file) for file in tmp_path.glob("*.safetensors")]
    layer = {name: tensor for file in files for name, tensor in file.items() if name.startswith("model.layers.2.")}
    copies = [layer.pop(f"model.layers.2.{name}.weight").nbytes for name in ("embed_tokens", "shared_head.head")]
    own = sum(tensor.nbytes for tensor in layer.values())
    assert report["weights"]["bytes_per_gpu"]["MTP"] == own and report["weights"]["bytes"]["MTP"] == own + sum(copies)
    assert without["weights"]["bytes_per_gpu"]["MTP"] == 0
    assert without["cache"]["bytes_per_token"]["total"] == 2 * (656 + 132)
    more = report["weights"]["bytes_per_gpu"]["derived"] - without["weights"]["bytes_per_gpu"]["derived"]
    assert more == 4 * 256 * 512 * 4 + (config["index_n_heads"] + 128) * config["hidden_size"] * 4


def test_the_printed_gib_bound_the_tokens(folders):
    """vLLM prints two decimals: whatever lies behind them gives tokens within the range that the report states."""
    base = [folders / "v32", "--gpu", "H200", "--num-gpus", 8, "--max-model-len", 65536]
    for exact in (41 * GIB + 394_000_000, 41 * GIB + 400_000_000, 41 * GIB + 401_000_000):
        tokens = facts(*base, "--kv-cache-memory", f"{exact}B")["cache"]["tokens"]
        text = plan(*base, "--kv-cache-memory", round(exact / GIB, 2), status=0)
        low, high = (int(n.replace(",", "")) for n in re.search(r"; ([\d,]+) to ([\d,]+) if the GiB", text).groups())
        assert low <= tokens <= high and high - low <= 4 * 64


@pytest.mark.parametrize("layers", [61, 78])
def test_stages_are_vllms(layers):
    from vllm.distributed.utils import get_pp_indices

    for pp in range(1, 9):
        bounds = [get_pp_indices(layers, rank, pp) for rank in range(pp)]
        assert memory.vllm_stages(layers, pp) == [end - start for start, end in bounds]
        stages = memory.stages(DSAConfig.from_hf(V32 | {"num_hidden_layers": layers}), pp)
        assert [(stage.start, stage.stop) for stage in stages] == bounds


def test_the_facts_that_need_torch_elsewhere_are_the_same():
    config = DSAConfig.from_hf(V32)
    assert models.latent_bytes(config, "fp8_ds_mla", "bfloat16") == cache.FP8_DS_MLA_BYTES
    assert models.index_bytes(config) * 64 == cache.index_page_bytes(64, 128)


@pytest.mark.parametrize(
    "arguments",
    [
        ["v32", "--gpu", "H200", "--num-gpus", "8"],
        ["v32", "--gpu", "H200", "--num-gpus", "8", "--dp", "8", "--ep", "--gpu-memory-utilization", "0.9"],
        ["v32", "--gpu", "H100", "--num-gpus", "8", "--nodes", "2"],
        ["v32", "--gpu", "H200", "--num-gpus", "8", "--nodes", "2", "--dp", "16", "--ep"],
        ["glm-shared", "--gpu", "H100", "--num-gpus", "8", "--nodes", "2", "--mtp"],
        ["v32-w4a16", "--gpu", "H100", "--num-gpus", "8", "--concurrency", "1500", "--max-model-len", "256"],
    ],
)
def test_vllm_takes_the_lines_to_paste(folders, arguments):
    """Parsed by vLLM's own parser, which knows every option and its values."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    lines = facts(folders / arguments[0], *arguments[1:])["serve"]
    assert len(lines) == (2 if "--nodes" in arguments else 1)
    for line in lines:
        words = shlex.split(line)
        options = words[words.index("serve") + 1 :]
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
        assert args.model_tag == str(folders / arguments[0])
        sizes = args.tensor_parallel_size * args.data_parallel_size * args.pipeline_parallel_size
        assert sizes == 8 * len(lines)
        assert args.kv_cache_dtype == "fp8_ds_mla" and args.headless == (line is not lines[0] and line != lines[0])
        assert (args.speculative_config or {}).get("method") == ("mtp" if "--mtp" in arguments else None)
    assert ("--max-num-seqs 1500" in lines[0]) == ("1500" in arguments)
