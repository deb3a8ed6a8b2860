"""Keys of config.json and --hf-overrides: each takes the effect that it has in transformers, or is refused by name."""

import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
from test_config import V32

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from engine import engine
from oracle import Oracle
from test_model import LIMITS, differences, within
from test_platform import engine_config
from tiny_checkpoint import write_random
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as theirs

from vllm_dsa.attention import _cos_sin
from vllm_dsa.config import ConfigError, DSAConfig
from vllm_dsa.tools.main import main

YARN = V32["rope_scaling"]
SIZES = dict(num_attention_heads=2, index_n_heads=8, index_topk=16, num_hidden_layers=2, seed=6)


def with_yarn(*without, **keys):
    return {"rope_scaling": {key: value for key, value in YARN.items() if key not in without} | keys}


# What is changed in the published config, and what the answer to the change must be: transformers' own.
SERVED = {
    "as published": {},
    "attention_factor": with_yarn(attention_factor=2.0),
    "attention_factor without mscale": with_yarn("mscale", "mscale_all_dim", attention_factor=1.0),
    "attention_factor null": with_yarn(attention_factor=None),
    "mscale absent": with_yarn("mscale"),
    "mscale null": with_yarn(mscale=None),
    "mscale 0": with_yarn(mscale=0),
    "mscale_all_dim absent": with_yarn("mscale_all_dim"),
    "mscales that differ": with_yarn(mscale=0.707, mscale_all_dim=0.5),
    "neither mscale": with_yarn("mscale", "mscale_all_dim"),
    "betas": with_yarn(beta_fast=20, beta_slow=3),
    "betas null and 0": with_yarn(beta_fast=None, beta_slow=0),
    "beta_slow above beta_fast": with_yarn(beta_fast=2, beta_slow=5.5),
    "truncate": with_yarn(truncate=False),
    "factor null": with_yarn("mscale_all_dim", factor=None),
    "factor below 1": with_yarn(factor=0.5),
    "original absent": with_yarn("original_max_position_embeddings"),
    "original at the top": {"original_max_position_embeddings": 2048},
    "rope_type beside type": with_yarn(rope_type="yarn"),
    "whole rotation": with_yarn(partial_rotary_factor=1.0) | {"partial_rotary_factor": 1},
    "plain": {"rope_scaling": None},
    "another theta": {"rope_scaling": None, "rope_theta": 1000000},
    "rope_parameters": {"rope_scaling": None, "rope_parameters": YARN | {"rope_theta": 500000.0}},
    "both spellings": {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    "theta within rope_scaling": with_yarn(rope_theta=80000),
}


@pytest.mark.parametrize("change", SERVED.values(), ids=SERVED)
def test_rope_is_transformers(change):
    """The rotary table, far out too, and the scale of the softmax."""
    changed = V32 | {"head_dim": 64} | change
    theirs_config = theirs.DeepseekV32Config(**json.loads(json.dumps(changed)))
    config, positions = DSAConfig.from_hf(changed), torch.tensor([0, 1, 2, 77, 4095, 4096, 20000])
    cos, sin = theirs.DeepseekV32RotaryEmbedding(theirs_config)(torch.empty(1), positions[None])
    half = config.qk_rope_head_dim // 2
    table = _cos_sin(frozenset(config.rope.items()), 2 * half, 20001, torch.device("cpu"))[positions]
    assert torch.allclose(table, torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1), atol=1e-6, rtol=0)
    scale = theirs.yarn_apply_mscale(theirs_config.rope_parameters | {"factor": config.rope.get("factor")}, 192**-0.5)
    assert config.softmax_scale == pytest.approx(scale, rel=1e-12)


def test_deepseek_yarn_is_vllms():
    """A type that transformers has not: as vLLM's class of that name, whose mscale is 1 where it is absent."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.deepseek_scaling_rope import DeepseekScalingRotaryEmbedding

    for without in ((), ("mscale",), ("mscale_all_dim",), ("mscale", "mscale_all_dim")):
        rope = {key: value for key, value in YARN.items() if key not in (*without, "type")}
        config = DSAConfig.from_hf(V32 | {"rope_scaling": rope | {"rope_type": "deepseek_yarn"}})
        scales = {key: rope[key] for key in ("mscale", "mscale_all_dim") if key in rope}
        with set_current_vllm_config(VllmConfig()):
            reference = DeepseekScalingRotaryEmbedding(64, 64, 4096, 10000, False, 40, torch.float32, **scales)
        table = _cos_sin(frozenset(config.rope.items()), 64, 163840, torch.device("cpu"))
        assert torch.allclose(table, reference.cos_sin_cache, atol=1e-6, rtol=0), without


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys")
    write_random(path, **SIZES)
    return path


def changed(folder, tmp_path, **keys):
    """The folder with other keys in its config.json; ... removes one."""
    for file in folder.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | keys
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return tmp_path


@pytest.mark.parametrize(
    "key",
    [
        "attention_factor",
        pytest.param("mscale absent", marks=pytest.mark.slow),
        pytest.param("truncate", marks=pytest.mark.slow),
        pytest.param("factor null", marks=pytest.mark.slow),
        pytest.param("original at the top", marks=pytest.mark.slow),
    ],
)
def test_logprobs_under_other_rope_keys_are_transformers(tmp_path, key):
    config = write_random(tmp_path, **SIZES) | SERVED[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(2)
    asked = [torch.randint(8, 100, (length,), generator=generator).tolist() for length in (15, 100)]
    with engine(tmp_path, max_model_len=256) as running:
        difference = differences(running, Oracle(tmp_path), asked)
        assert within(difference, LIMITS["auto"]), (difference.median(), difference.quantile(0.9))


NESTED = {"rope_scaling": None, "rope_parameters": {"indexed_attention": {"rope_type": "default", "rope_theta": 1e4}}}
# What is changed in the published config, and what the refusal says of it.
REFUSED = {
    "attention_factor of another type": (with_yarn(attention_factor="2"), "attention_factor: '2' "),
    "attention_factor 0": (with_yarn(attention_factor=0), "attention_factor: 0 .*above 0"),
    "attention_factor beside default": (with_yarn(type="default"), "factor: 40 .*'default'.*Set rope_type to 'yarn'"),
    "no type": (with_yarn("type"), "factor: 40 .*'default'.*Set rope_type to 'yarn'"),
    "attention_factor beside deepseek_yarn": (with_yarn(type="deepseek_yarn", attention_factor=2.0), "attention_fac"),
    "types that differ": (with_yarn(rope_type="default"), "rope_scaling: rope_type 'default' beside type 'yarn'"),
    "a type of another kind": (with_yarn(type=5), "rope type: 5 "),
    "type null": (with_yarn(type=None), "rope type: None "),
    "llama3": (with_yarn(type="llama3"), "rope type: 'llama3' "),
    "factor negative": (with_yarn(factor=-40), "factor: -40 "),
    "factor true": (with_yarn(factor=True), "factor: True "),
    "factor NaN": (with_yarn(factor=float("nan")), "factor: nan "),
    "factor huge": (with_yarn(factor=10**400), "factor: 1000"),
    "factor absent": (with_yarn("factor"), "factor: it is missing"),
    "factor null beside mscale_all_dim": (with_yarn(factor=None), "factor: None "),
    "original null": ({"original_max_position_embeddings": None}, "original_max_position_embeddings: None "),
    "original of text": (
        with_yarn(original_max_position_embeddings="4096"),
        "original_max_position_embeddings: '4096'",
    ),
    "beta_fast negative": (with_yarn(beta_fast=-1), "beta_fast: -1 "),
    "beta_slow a list": (with_yarn(beta_slow=[1]), r"beta_slow: \[1\] "),
    "mscale negative": (with_yarn(mscale=-1.0), "mscale: -1.0 "),
    "mscale_all_dim a string": (with_yarn(mscale_all_dim="1.0"), "mscale_all_dim: '1.0' "),
    "truncate a string": (with_yarn(truncate="false"), "truncate: 'false' "),
    "extrapolation_factor": (with_yarn(extrapolation_factor=1.0), "extrapolation_factor: 1.0 "),
    "a llama3 key": (with_yarn(high_freq_factor=4.0), "high_freq_factor: 4.0 "),
    "M-RoPE": ({"rope_scaling": {"type": "default", "mrope_section": [8, 12, 12]}}, "mrope_section: "),
    "part of the dims": (with_yarn(partial_rotary_factor=0.5), "partial_rotary_factor: 0.5 "),
    "part of the dims, at the top": ({"partial_rotary_factor": 0.25}, "partial_rotary_factor: 0.25 "),
    "rope_dim": (with_yarn(rope_dim=32), "rope_dim: 32 "),
    "rotary_emb_base": ({"rotary_emb_base": 500000}, "rotary_emb_base: 500000 "),
    "attention_factor at the top": ({"attention_factor": 2.0}, "attention_factor: 2.0 .*top level"),
    "rope_type at the top": ({"rope_type": "yarn"}, "rope_type: 'yarn' .*top level"),
    "nested": (NESTED, "indexed_attention: .*same in every layer"),
    "rope_scaling a list": ({"rope_scaling": [1, 2]}, r"rope_scaling: \[1, 2\] .*mapping"),
    "rope_parameters text": ({"rope_scaling": None, "rope_parameters": "yarn"}, "rope_parameters: 'yarn' .*mapping"),
    "rope_theta null": ({"rope_theta": None}, "rope_theta: None "),
    "rope_theta negative": ({"rope_theta": -10000}, "rope_theta: -10000 "),
    "rope_theta text": ({"rope_theta": "1e4"}, "rope_theta: '1e4' "),
    "rope_theta null within": (with_yarn(rope_theta=None), "rope_theta: None "),
    "rms_norm_eps null": ({"rms_norm_eps": None}, "rms_norm_eps: None "),
    "rms_norm_eps text": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: '1e-6' "),
    "rms_norm_eps 0": ({"rms_norm_eps": 0.0}, "rms_norm_eps: 0.0 "),
    "routed_scaling_factor NaN": ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor: nan "),
    "max_position_embeddings a float": ({"max_position_embeddings": 4096.0}, "max_position_embeddings: 4096.0 "),
    "MTP layers true": ({"num_nextn_predict_layers": True}, "num_nextn_predict_layers: True "),
    "MTP layers negative": ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers: -1 "),
    "vocab_size null": ({"vocab_size": None}, "vocab_size: None "),
    "vocab_size huge": ({"vocab_size": 2**40}, "vocab_size: 1099511627776 "),
    "n_routed_experts 0": ({"n_routed_experts": 0}, "n_routed_experts: 0 "),
    "n_shared_experts text": ({"n_shared_experts": "1"}, "n_shared_experts: '1' "),
    "too many experts": ({"n_routed_experts": 4, "num_experts_per_tok": 8}, "num_experts_per_tok: 8 "),
    "groups of experts": ({"n_group": 3, "topk_group": 1, "n_routed_experts": 8}, "n_group: 3 "),
    "moe_intermediate_size negative": ({"moe_intermediate_size": -1}, "moe_intermediate_size: -1 "),
    "intermediate_size a float": ({"intermediate_size": 128.0}, "intermediate_size: 128.0 "),
    "first_k_dense_replace text": ({"first_k_dense_replace": "3"}, "first_k_dense_replace: '3' "),
    "mlp_layer_types a number": ({"first_k_dense_replace": None, "mlp_layer_types": 3}, "mlp_layer_types: 3 "),
    "indexer_types a number": ({"indexer_types": 61}, "indexer_types: 61 "),
    "index_skip_topk_offset text": (
        {"index_topk_freq": 2, "index_skip_topk_offset": "1"},
        "index_skip_topk_offset: '1'",
    ),
    "attention_bias": ({"attention_bias": True}, "attention_bias: True "),
    "tie_word_embeddings": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: 'yes' is refused"),
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act: 'gelu' "),
    "norm_topk_prob": ({"norm_topk_prob": "yes"}, "norm_topk_prob: 'yes' "),
    "quantization_config text": ({"quantization_config": "fp8"}, "quantization_config: 'fp8' "),
    "quant_method a number": ({"quantization_config": {"quant_method": 5}}, "quantization_config.quant_method: 5 "),
    "one block size": (
        {"quantization_config": {"weight_block_size": 128}},
        "quantization_config.weight_block_size: 128 ",
    ),
    "groups of text": (
        {"quantization_config": {"config_groups": {"g": "int4"}}},
        "quantization_config.config_groups.g: ",
    ),
    "architectures": ({"architectures": "DeepseekV32ForCausalLM"}, "architectures: 'DeepseekV32ForCausalLM' "),
    "model_type a list": ({"model_type": ["deepseek_v32"]}, r"model_type: \['deepseek_v32'\] "),
}
STEPS = ("Remove", "remove", "Restore", "Set ", "Write", "Move")


@pytest.mark.parametrize("change, said", REFUSED.values(), ids=REFUSED)
def test_refused_by_its_name(change, said):
    with pytest.raises(ConfigError, match=f"(?s)^{said}") as refused:
        DSAConfig.from_hf(V32 | change)
    assert any(step in str(refused.value) for step in STEPS), refused.value


TOOLS = (
    *("rope_theta null", "factor NaN", "nested", "part of the dims", "rms_norm_eps null", "vocab_size null"),
    *("quant_method a number", "one block size", "groups of text", "MTP layers negative", "n_shared_experts text"),
    *("mlp_layer_types a number", "quantization_config text"),
)


@pytest.mark.parametrize("name", TOOLS)
def test_the_tools_refuse_by_the_same_name(folder, tmp_path, capsys, name):
    change, said = REFUSED[name]
    path = changed(folder, tmp_path, **change)
    assert main(["plan", str(path), "--gpu", "H200", "--num-gpus", "1"]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert main(["doctor", str(path)]) == 1
    assert re.search(said, " ".join(capsys.readouterr().out.split()))


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "moe_intermediate_size", "n_routed_experts"])
def test_the_tools_name_what_is_missing(folder, tmp_path, capsys, key):
    path = changed(folder, tmp_path, **{key: ...})
    assert main(["plan", str(path), "--gpu", "H200", "--num-gpus", "1"]) == 2 and main(["doctor", str(path)]) == 1
    printed = capsys.readouterr()
    assert f"{key}: it is missing" in printed.err and f"{key}: it is missing" in printed.out


@pytest.mark.parametrize(
    "name", ["rope_theta null", "nested", "part of the dims", "MTP layers negative", "rms_norm_eps 0"]
)
def test_the_engine_refuses_before_it_builds(folder, tmp_path, name):
    change, said = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s){said}"):
        engine_config(changed(folder, tmp_path, **change))


@pytest.mark.parametrize("key", ["vocab_size", "rms_norm_eps", "num_attention_heads"])
def test_a_wrong_type_that_transformers_looks_at_first_is_named_by_it(folder, key):
    with pytest.raises(Exception, match=f"(?s){key}.*None"):
        engine_config(folder, hf_overrides={key: None})


THETA = {"rope_theta": 10000}
OVERRIDES = {
    "theta beside rope_parameters": ({"rope_theta": 5e5}, r"rope_theta: 500000.0 .*rope_parameters.*10000"),
    "theta null": ({"rope_theta": None}, "rope_theta: None .*rope_parameters"),
    "scaling that drops theta": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_theta: it is missing"),
    "parameters that drop all but one": ({"rope_parameters": {"factor": 2.0}}, "rope_theta: it is missing"),
    "no scaling": ({"rope_scaling": None}, "rope_theta: it is missing"),
    "a factor without its type": ({"rope_parameters": THETA | {"factor": 2.0}}, "factor: 2.0 .*'default'"),
    "attention_factor at the top": ({"attention_factor": 2.0}, "attention_factor: 2.0 "),
    "text for a number": ({"num_nextn_predict_layers": "1"}, "num_nextn_predict_layers: '1' "),
    "null for a size": ({"index_head_dim": None}, "index_head_dim: None "),
    "a size below 0": ({"moe_intermediate_size": -64}, "moe_intermediate_size: -64 "),
}


@pytest.mark.parametrize("override, said", OVERRIDES.values(), ids=OVERRIDES)
def test_an_override_that_nobody_would_read_is_refused(folder, override, said):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        engine_config(folder, hf_overrides=override)


SHORT_YARN = {"rope_scaling": {"type": "yarn", "factor": 4}, "rope_theta": 5e5}
EFFECTS = [
    ({"rope_parameters": {"rope_theta": 5e5}}, {"rope_scaling": None, "rope_theta": 5e5}),
    (SHORT_YARN, SHORT_YARN),
    ({"rope_parameters": YARN | THETA | {"attention_factor": 2.0}}, with_yarn(attention_factor=2.0)),
    ({"original_max_position_embeddings": 1024}, {"original_max_position_embeddings": 1024}),
]


@pytest.mark.parametrize("override, same", EFFECTS)
def test_an_override_takes_effect(folder, override, same):
    config = DSAConfig.from_hf(engine_config(folder, hf_overrides=override).model_config.hf_config)
    assert config == DSAConfig.from_hf(json.loads((folder / "config.json").read_text()) | same)
    assert config != DSAConfig.from_hf(json.loads((folder / "config.json").read_text()))


def test_what_publishers_leave_at_null_is_served():
    nulls = dict.fromkeys(("first_k_dense_replace", "moe_layer_freq", "n_group", "topk_group", "n_shared_experts"))
    nulls |= dict.fromkeys(("num_nextn_predict_layers", "quantization_config", "index_topk_freq"))
    assert DSAConfig.from_hf(SimpleNamespace(**V32, **nulls)).mtp_layers == 0
