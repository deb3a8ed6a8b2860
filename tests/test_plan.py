"""`vllm-dsa plan`: bytes of published models, what fits where, and the same numbers as vLLM's own.

The command runs as a subprocess that can import neither torch nor vLLM, unless vLLM is what it is compared with.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine import engine, unloaded
from safetensors.torch import load_file
from tiny_checkpoint import write_random

from vllm_dsa import cache
from vllm_dsa.config import ConfigError, DSAConfig
from vllm_dsa.tools import fit, memory
from vllm_dsa.tools import model as models

ROOT = Path(__file__).parents[1]
GIB = 2**30
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
# As published, but for keys that no tool reads.
V32 = dict(
    architectures=["DeepseekV32ForCausalLM"],
    model_type="deepseek_v32",
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_nextn_predict_layers=1,
    num_attention_heads=128,
    n_shared_experts=1,
    n_routed_experts=256,
    num_experts_per_tok=8,
    first_k_dense_replace=3,
    moe_layer_freq=1,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    index_head_dim=128,
    index_n_heads=64,
    index_topk=2048,
    max_position_embeddings=163840,
    rms_norm_eps=1e-6,
    torch_dtype="bfloat16",
    quantization_config=FP8,
)
GLM5 = V32 | dict(
    architectures=["GlmMoeDsaForCausalLM"],
    model_type="glm_moe_dsa",
    vocab_size=154880,
    hidden_size=6144,
    intermediate_size=12288,
    num_hidden_layers=78,
    num_attention_heads=64,
    q_lora_rank=2048,
    qk_nope_head_dim=192,
    v_head_dim=256,
    index_n_heads=32,
    max_position_embeddings=202752,
    rms_norm_eps=1e-5,
)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "modules_to_not_convert": ["self_attn"]}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.*.self_attn*"]}
W4A16 = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128}}},
    "ignore": ["re:.*self_attn.*", "re:.*shared_experts.*"],
}
SHARED = {"index_topk_freq": 4, "index_skip_topk_offset": 3}
MODELS = {
    "v32": V32,
    "v32-bf16": V32 | {"quantization_config": None},
    "v32-awq": V32 | {"quantization_config": AWQ},
    "v32-nvfp4": V32 | {"quantization_config": NVFP4},
    "v32-w4a16": V32 | {"quantization_config": W4A16},
    "glm-fp8": GLM5,
    "glm-bf16": GLM5 | {"quantization_config": None},
    "glm-shared": GLM5 | SHARED,
    "no-mtp": V32 | {"num_nextn_predict_layers": 0},
}
# Runs the command where nothing but the standard library and this package can be imported, and says what was loaded.
BARE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from vllm_dsa.tools.main import main
status = main(sys.argv[1:])
loaded = {{name.split(".")[0] for name in sys.modules}}
assert not loaded & {{"torch", "vllm", "numpy", "rich"}}, loaded
sys.exit(status)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with a config.json and nothing else."""
    root = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    return root


def command(*arguments, **environment):
    """The finished command, without site-packages."""
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", BARE, "plan", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=60,
    )


def plan(*arguments, status):
    """The report as text."""
    done = command(*arguments)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def facts(*arguments, status=0):
    """The report as JSON."""
    return json.loads(plan(*arguments, "--json", status=status))


def counted(name, folder=Path("/nonexistent")) -> memory.Weights:
    return memory.weights(folder, MODELS[name], DSAConfig.from_hf(MODELS[name]))


# What the published models weigh


def test_v32_weighs_what_is_published():
    """DeepSeek-V3's index states 688,586,727,753 bytes, headers of 163 files included; V3.2 adds an indexer a layer."""
    weights = counted("v32")
    indexers = weights.total("indexer") // 61 * 62  # the MTP layer has one too
    stored = sum(weights.total(part) for part in memory.PARTS if part != "derived")
    headers = 688_586_727_753 - (stored - indexers)
    tensors = 91_991  # of DeepSeek-V3, each an entry of some 130 bytes
    assert 100 * tensors < headers < 160 * tensors
    assert weights.exact and weights.format == "fp8"


def test_glm5_has_the_published_744_billion_parameters():
    weights = counted("glm-bf16")
    assert sum(weights.total(part) for part in memory.PARTS if part not in ("derived", "MTP")) / 2e9 == pytest.approx(
        744, abs=0.5
    )


@pytest.mark.parametrize("name", ["v32-awq", "v32-nvfp4", "v32-w4a16"])
def test_four_bit_checkpoints_quantise_what_they_do_not_leave_out(name):
    """Experts at 4.16 bits (AWQ with zero points), 4.5 (NVFP4) and 4.125 with all attention in bfloat16."""
    weights = counted(name)
    assert not weights.exact
    bits = {"v32-awq": 4 + 20 / 128, "v32-nvfp4": 4.5, "v32-w4a16": 4 + 16 / 128}[name]
    experts = 58 * 256 * 3 * 7168 * 2048
    assert weights.total("experts") == pytest.approx(experts * bits / 8, rel=1e-6)
    assert weights.total("attention") == counted("v32-bf16").total("attention")
    whole_shared = counted("v32-bf16").total("shared experts")
    assert (weights.total("shared experts") == whole_shared) == (name == "v32-w4a16")
    assert weights.total("indexer") <= counted("v32-bf16").total("indexer")


def test_an_unknown_quantisation_is_refused_by_name():
    config = V32 | {"quantization_config": {"quant_method": "mystery"}}
    with pytest.raises(ConfigError, match="'mystery' does not say how many bits.*Download the safetensors files"):
        memory.weights(Path("/nonexistent"), config, DSAConfig.from_hf(config))


def test_headers_give_the_same_as_the_config(tmp_path):
    """A folder with files is counted from their headers; a plain or FP8 one must then weigh what its config says."""
    for fp8 in (False, True):
        folder = tmp_path / str(fp8)
        config = json.loads(json.dumps(write_random(folder, fp8=fp8, dtype="bfloat16", num_hidden_layers=4)))
        if fp8:
            config = json.loads((folder / "config.json").read_text())
        dsa = DSAConfig.from_hf(config)
        by_files, by_config = memory.weights(folder, config, dsa), memory.weights(tmp_path / "none", config, dsa)
        assert "headers of 2 files" in by_files.source and by_config.source == "config.json"
        for part in memory.PARTS:
            # config.json counts e_score_correction_bias and k_norm as the float32 that they become.
            slack = 8 * 4 * 2 + 5 * 2 * 128 * 2 if part in ("router, norms", "indexer", "MTP") else 0
            assert abs(by_files.total(part) - by_config.total(part)) <= slack, part


# What fits where


def test_v32_fp8_does_not_fit_8_h100(folders):
    report = facts(folders / "v32", "--gpu", "H100", "--num-gpus", 8, status=1)
    assert not report["fits"] and report["requests"] == 0 and report["serve"] == []
    assert sum(report["weights"]["bytes_per_gpu"].values()) / GIB == pytest.approx(80.3, abs=0.3)
    text = plan(folders / "v32", "--gpu", "H100", "--num-gpus", 8, status=1)
    assert re.search(r"fault +requests +not one of 4,096 tokens: 1\d\.\d\d GiB a GPU are lacking", text)
    for instead in ("4-bit experts", "16 x H100: --nodes 2 --tp 8 --pp 2", "or H200 or B200"):
        assert instead in text


def test_v32_fp8_fits_8_h200(folders):
    report = facts(folders / "v32", "--gpu", "h200", "--num-gpus", 8, "--concurrency", 5)
    assert report["fits"] and report["requests"] >= 5
    assert report["cache"]["bytes_per_token"] == {"latent": 40_016, "index": 8_052, "total": 48_068}
    assert report["cache"]["tokens"] == report["cache"]["blocks"] * 64
    assert report["max_model_len"] == 163_840
    assert report["tokens_per_expert"] == 5 * 8 / 256
    budget = (143771 * 2**20 - fit.DRIVER_GIB * GIB) * 0.92
    spent = sum(report["weights"]["bytes_per_gpu"].values()) + report["assumed_runtime_bytes"]
    assert report["cache"]["available_bytes"] == pytest.approx(budget - spent, abs=1)
    assert report["cache"]["blocks"] == report["cache"]["available_bytes"] // (64 * 48_068)


@pytest.mark.parametrize("what", ["v32-awq", "v32-nvfp4", "v32-w4a16"])
def test_v32_of_4_bits_fits_8_h100(folders, what):
    text = plan(folders / what, "--gpu", "H100", "--num-gpus", 8, status=0)
    assert "estimated from config.json" in text and "vllm serve" in text


@pytest.mark.parametrize(
    ("name", "gpu", "gpus", "nodes", "fits"),
    [
        ("v32", "H100", 8, 2, True),
        ("v32", "H20", 8, 1, True),  # 95.6 GiB each: barely
        ("v32", "A100-80", 8, 1, False),
        ("v32", "A100-80", 8, 2, True),
        ("v32", "RTX 4090", 8, 4, False),
        ("v32", "B200", 8, 1, True),
        ("v32", "B200", 4, 1, False),
        ("v32-bf16", "H200", 8, 1, False),
        ("v32-bf16", "H200", 8, 2, True),
        ("v32-nvfp4", "B200", 4, 1, True),
        ("glm-fp8", "H200", 8, 1, True),
        ("glm-fp8", "H100", 8, 1, False),
        ("glm-fp8", "H100", 8, 2, True),
        ("glm-bf16", "H200", 8, 1, False),
        ("glm-bf16", "B200", 8, 2, True),
    ],
)
def test_what_fits(folders, name, gpu, gpus, nodes, fits):
    status = 0 if fits else 1
    report = facts(folders / name, "--gpu", gpu, "--num-gpus", gpus, "--nodes", nodes, status=status)
    assert report["fits"] is fits
    assert report["layout"] == {"tp": gpus, "dp": 1, "pp": nodes, "ep": False}


def test_every_alternative_that_is_offered_fits(folders):
    """Each line of "would fit" is asked for in turn."""
    base = [folders / "v32", "--gpu", "A100-80", "--num-gpus", 8]
    offered = facts(*base, status=1)["would_fit"]
    assert any(line.startswith("16 x A100-80") for line in offered)
    for line in offered:
        if "4-bit experts" in line:
            assert facts(folders / "v32-w4a16", *base[1:])["fits"]
        elif found := re.fullmatch(r"16 x A100-80: (.*)", line):
            assert facts(*base, *found[1].split())["fits"]
        else:
            for gpu in re.fullmatch(r"8 x (.*)", line)[1].split(" or "):
                assert facts(base[0], "--gpu", gpu, "--num-gpus", 8)["fits"]


def test_a_shortfall_of_requests_offers_both_ways_out(folders):
    base = [folders / "v32", "--gpu", "H200", "--num-gpus", 8]
    offered = facts(*base, "--concurrency", 64, status=1)["would_fit"]
    for line in offered[:2]:
        assert facts(*base, *line.replace(" at", "").split())["fits"]
    fewer, shorter = int(re.search(r"--concurrency (\d+)", offered[0])[1]), int(re.search(r"len (\d+)", offered[1])[1])
    assert not facts(*base, "--concurrency", fewer + 1, status=1)["fits"]
    assert not facts(*base, "--concurrency", 64, "--max-model-len", shorter + 64, status=1)["fits"]


def test_the_length_that_is_proposed_fits(folders):
    """The null block counts: 163,840 tokens in 2,560 blocks leave no room for one request of that length."""
    base = [folders / "v32", "--gpu", "H200", "--num-gpus", 8, "--kv-cache-memory"]
    for blocks, length in ((2561, 163_840), (2560, 162_816), (100, 6144)):
        report = facts(*base, f"{blocks * 64 * 48_068}B")
        assert (report["max_model_len"], report["requests"]) == (length, 1)


def test_layers_that_share_have_no_index_cache_and_start_no_stage(folders):
    shared = facts(folders / "glm-shared", "--gpu", "H200", "--num-gpus", 8)
    plain = facts(folders / "glm-fp8", "--gpu", "H200", "--num-gpus", 8)
    full = DSAConfig.from_hf(MODELS["glm-shared"]).index_shared.count(False)
    assert full == 21 and plain["cache"]["bytes_per_token"]["index"] == 78 * 132
    assert shared["cache"]["bytes_per_token"] == {"latent": 78 * 656, "index": 21 * 132, "total": 78 * 656 + 21 * 132}
    assert shared["weights"]["bytes_per_gpu"]["indexer"] * 78 == plain["weights"]["bytes_per_gpu"]["indexer"] * 21
    report = facts(folders / "glm-shared", "--gpu", "H100", "--num-gpus", 8, "--nodes", 2)
    partition = re.match(r"VLLM_PP_LAYER_PARTITION=(\d+),(\d+) vllm serve ", report["serve"][0])
    first = int(partition[1])
    assert first + int(partition[2]) == 78 and abs(first - 39) <= 2
    assert not DSAConfig.from_hf(MODELS["glm-shared"]).index_shared[first]


def test_bfloat16_cache(folders):
    report = facts(folders / "v32", "--gpu", "H200", "--num-gpus", 8, "--kv-cache-dtype", "bfloat16")
    assert report["cache"]["bytes_per_token"]["latent"] == 61 * 576 * 2
    assert "--kv-cache-dtype auto" in report["serve"][0]


def test_data_parallel_ranks_have_caches_of_their_own(folders):
    dp = facts(folders / "v32", "--gpu", "H200", "--num-gpus", 8, "--dp", 8, "--ep")
    tp = facts(folders / "v32", "--gpu", "H200", "--num-gpus", 8)
    assert dp["layout"] == {"tp": 1, "dp": 8, "pp": 1, "ep": True}
    per_gpu = dp["weights"]["bytes_per_gpu"]
    assert per_gpu["experts"] == tp["weights"]["bytes_per_gpu"]["experts"]
    for part in ("attention", "head", "shared experts"):
        assert per_gpu[part] == dp["weights"]["bytes"][part] > tp["weights"]["bytes_per_gpu"][part]
    assert dp["requests"] == (dp["cache"]["blocks"] - 1) // 2560 * 8 > tp["requests"]


def test_a_shared_expert_is_whole_where_vllm_splits_an_moes_tokens(folders):
    """With experts whole on ranks, and more than one rank of both kinds; else it is split over tensor ranks."""
    base = [folders / "v32", "--gpu", "B200", "--num-gpus", 8]
    for options, ranks in ((["--tp", 2, "--ep"], 1), (["--tp", 2], 2), (["--tp", 8, "--ep"], 8)):
        weights = facts(*base, *options)["weights"]
        assert weights["bytes_per_gpu"]["shared experts"] * ranks == weights["bytes"]["shared experts"]


def test_utilization_moves_the_cache_by_its_share(folders):
    base = [folders / "v32", "--gpu", "H200", "--num-gpus", 8]
    less, more = (facts(*base, "--gpu-memory-utilization", x) for x in (0.85, 0.95))
    usable = 143771 * 2**20 - fit.DRIVER_GIB * GIB
    moved = more["cache"]["available_bytes"] - less["cache"]["available_bytes"]
    assert moved == pytest.approx(0.1 * usable, rel=1e-6)
    assert less["serve"][0].endswith("--gpu-memory-utilization 0.85")


# The same numbers as vLLM's own


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
LOGGED = [(128, 3.22, 115.68, 26_252_576), (16, 1.38, 121.51, 27_575_514)]


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


# The command


BAD = {
    "gpu": (["--gpu", "K80", "--num-gpus", "8"], "--gpu K80: not one of RTX4090, .* or the GiB that a GPU has"),
    "no gpus": (["--gpu", "H100", "--num-gpus", "0"], "--num-gpus 0: it must be at least 1"),
    "tp": (["--gpu", "H100", "--num-gpus", "6"], "--tp 6 does not divide the model's 128 heads. Choose"),
    "too many": (["--gpu", "H100", "--num-gpus", "8", "--tp", "16"], "multiples of 16 GPUs, there are 8. Change"),
    "some left": (
        ["--gpu", "H100", "--num-gpus", "8", "--tp", "2", "--dp", "2", "--pp", "1"],
        "is 4 GPUs, there are 8",
    ),
    "stages": (["--gpu", "H100", "--num-gpus", "64", "--pp", "64"], "--pp 64: the model has 61 layers"),
    "length": (["--gpu", "H100", "--num-gpus", "8", "--max-model-len", "200000"], "has 163840 positions"),
    "share": (["--gpu", "H100", "--num-gpus", "8", "--gpu-memory-utilization", "92"], "must be above 0 and at most 1"),
    "cache": (["--gpu", "H100", "--num-gpus", "8", "--kv-cache-dtype", "int4"], "int4: not one of auto, bfloat16"),
    "no mtp": (["--gpu", "H100", "--num-gpus", "8", "--mtp"], "--mtp: drafts need one MTP layer, this config has 0"),
    "memory": (["--gpu", "H100", "--num-gpus", "8", "--kv-cache-memory", "lots"], "--kv-cache-memory lots: pass GiB"),
    "blocks": (["--gpu", "H100", "--num-gpus", "32"], "2048, over 32 ranks is no multiple of the 128 .*--ep"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_usage_names_the_option_and_the_next_step(folders, case):
    arguments, message = BAD[case]
    done = command(folders / ("no-mtp" if case == "no mtp" else "v32"), *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert re.match(f"vllm-dsa plan: .*{message}", done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_models_that_cannot_be_read(tmp_path, folders):
    gpus = ["--gpu", "96", "--num-gpus", "8"]
    (tmp_path / "config.json").write_text("{")
    for model, message in (
        (tmp_path / "none", "is no folder here and no Hugging Face id in the cache .*hf download"),
        (tmp_path, "config.json cannot be read as JSON"),
        (tmp_path / "config.json", "is a file. Pass the folder"),
    ):
        done = command(model, *gpus)
        assert done.returncode == 2 and re.search(message, done.stderr), done.stderr
    (tmp_path / "config.json").write_text(json.dumps(V32 | {"model_type": "llama"}))
    assert re.search("'llama' is not a DSA model", command(tmp_path, *gpus).stderr)


def test_help_has_an_example_that_runs(folders):
    text = plan("--help", status=0)
    assert "vllm-dsa plan deepseek-ai/DeepSeek-V3.2 --gpu H200 --num-gpus 8" in text and "exit status: 0" in text


def test_a_hugging_face_id_is_found_in_the_cache(tmp_path):
    """In the cache's layout: refs/main names the snapshot, which links to blobs."""
    repository = tmp_path / "hub" / "models--deepseek-ai--DeepSeek-V3.2"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (repository / "blobs" / "1").write_text(json.dumps(V32))
    for name in ("abc", "old"):
        (repository / "snapshots" / name).mkdir(parents=True)
    (repository / "snapshots" / "abc" / "config.json").symlink_to("../../blobs/1")
    done = command("deepseek-ai/DeepSeek-V3.2", "--gpu", "H200", "--num-gpus", "8", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "vllm serve deepseek-ai/DeepSeek-V3.2 " in done.stdout
