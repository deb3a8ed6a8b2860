"""`vllm-dsa plan`: bytes of published models, and what fits where. On vLLM's own numbers: test_plan_against_vllm.py.

The command runs as a subprocess that can import neither torch nor vLLM.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import write_random

from vllm_dsa.config import ConfigError, DSAConfig
from vllm_dsa.tools import fit, memory

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
