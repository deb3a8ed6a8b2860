"""GLM-5.x: interleaved indexer RoPE, plain RoPE, its head sizes, and layers that share a selection."""

import json

import pytest
import torch
from engine import engine
from faults import SELECTION_FAULTS, dense, planted, rope_swapped
from oracle import Oracle
from test_model import LIMITS, config_of, differences, prompts, within
from tiny_checkpoint import write_random

from vllm_dsa.config import ConfigError, DSAConfig

PATTERN = "FSFFSSF"
SIZES = dict(num_hidden_layers=7, num_attention_heads=4, qk_nope_head_dim=96, v_head_dim=160, index_n_heads=8)
SHARING = {
    "indexer_types": {"indexer_types": ["shared" if c == "S" else "full" for c in PATTERN]},
    "index_topk_pattern": {"index_topk_pattern": PATTERN},
    "index_topk_freq": {"index_topk_freq": 3, "index_skip_topk_offset": 3},
}
FREQ_SHARED = (False, False, False, True, True, False, True)


def write_glm(path, **extra) -> None:
    """A random checkpoint with GLM's config: every layer ships indexer tensors, as the published ones do."""
    config = write_random(path, rope_scaling=None, rms_norm_eps=1e-5, index_topk=32, seed=4, **SIZES)
    config |= {"model_type": "glm_moe_dsa", "architectures": ["GlmMoeDsaForCausalLM"], **extra}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    del config["rope_scaling"]
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("indexer_types", marks=pytest.mark.slow),
        "index_topk_pattern",
        pytest.param("index_topk_freq", marks=pytest.mark.slow),
    ],
)
def test_logprobs_equal_transformers(tmp_path, key):
    write_glm(tmp_path, **SHARING[key])
    asked = prompts(config_of(tmp_path))
    with engine(tmp_path) as running:
        shared = FREQ_SHARED if key == "index_topk_freq" else tuple(c == "S" for c in PATTERN)
        assert tuple(layer.indexer is None for layer in running.layers) == shared
        bound = running.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        assert sum("indexer" in name for name in bound) == 7 - sum(shared)
        assert not any("indexer" in name for name, _ in running.layers[shared.index(True)].named_parameters())
        difference = differences(running, Oracle(tmp_path), asked)
        print(f"GLM {key}: p50 {difference.median():.1e} p90 {difference.quantile(0.9):.1e}")
        assert within(difference, LIMITS["auto"]), (difference.median(), difference.quantile(0.9))
        if key == "indexer_types":
            full = [layer for layer in running.layers if layer.indexer is not None]
            for fault in SELECTION_FAULTS:
                with planted(fault, running.layers if fault is dense else full):
                    broken = differences(running, Oracle(tmp_path), asked)
                assert not within(broken, LIMITS["auto"]), f"{fault.__name__} was not noticed"


def test_fp8_ds_mla(tmp_path):
    write_glm(tmp_path, **SHARING["index_topk_pattern"])
    with engine(tmp_path, kv_cache_dtype="fp8_ds_mla") as running:
        difference = differences(running, Oracle(tmp_path, "fp8_ds_mla"), prompts(config_of(tmp_path)))
        assert within(difference, LIMITS["fp8_ds_mla"]), (difference.median(), difference.quantile(0.9))


def test_a_layer_that_shares_the_wrong_selection_is_noticed(tmp_path):
    """Each sharing layer given a selection of its own instead of the last full layer's."""
    write_glm(tmp_path, **SHARING["index_topk_pattern"])
    asked = prompts(config_of(tmp_path))
    with engine(tmp_path) as running:

        def first_keys(layer):
            window = torch.arange(layer.selection.shape[1], dtype=torch.int32)
            return {"selection": window.expand_as(layer.selection).clone()}

        short = [p for p in asked if len(p) > 64]
        with planted(first_keys, [layer for layer in running.layers if layer.indexer is None]):
            assert not within(differences(running, Oracle(tmp_path), short), LIMITS["auto"])


GLM = dict(
    model_type="glm_moe_dsa",
    hidden_size=6144,
    num_hidden_layers=7,
    num_attention_heads=64,
    q_lora_rank=2048,
    kv_lora_rank=512,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    v_head_dim=256,
    index_n_heads=32,
    index_head_dim=128,
    index_topk=2048,
    rms_norm_eps=1e-5,
    max_position_embeddings=202752,
    rope_parameters={"rope_type": "default", "rope_theta": 1000000},
)


def test_layout_is_interleaved_whether_the_key_is_there_or_not():
    assert DSAConfig.from_hf(GLM).index_rope_interleaved
    assert DSAConfig.from_hf(GLM | {"indexer_rope_interleave": True}).index_rope_interleaved
    with pytest.raises(ConfigError, match="indexer_rope_interleave: False is refused.*interleaved.*Remove"):
        DSAConfig.from_hf(GLM | {"indexer_rope_interleave": False})
    assert DSAConfig.from_hf(GLM).softmax_scale == 256**-0.5


@pytest.mark.parametrize(
    "keys, shared",
    [
        ({}, (False,) * 7),
        (SHARING["indexer_types"], tuple(c == "S" for c in PATTERN)),
        (SHARING["index_topk_pattern"], tuple(c == "S" for c in PATTERN)),
        ({"index_topk_pattern": PATTERN + "SSS"}, tuple(c == "S" for c in PATTERN)),
        (SHARING["index_topk_freq"], FREQ_SHARED),
        ({"index_topk_freq": 1}, (False,) * 7),
        (SHARING["indexer_types"] | SHARING["index_topk_pattern"], tuple(c == "S" for c in PATTERN)),
    ],
)
def test_layer_sharing(keys, shared):
    assert DSAConfig.from_hf(GLM | keys).index_shared == shared


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"indexer_types": ["full"] * 6}, "each of the 7 layers"),
        ({"index_topk_pattern": "SFFFFFF"}, "the first being 'F'"),
        ({"index_topk_pattern": "FXFFFFF"}, "FXFFFFF"),
        ({"index_topk_freq": 0}, "index_topk_freq: 0"),
        (SHARING["indexer_types"] | SHARING["index_topk_freq"], "contradict"),
    ],
)
def test_layer_sharing_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        DSAConfig.from_hf(GLM | keys)


def test_swapped_layout_is_the_deepseek_one(tmp_path):
    """GLM weights under DeepSeek's layout: what stock vLLM computes where indexer_rope_interleave is absent."""
    write_glm(tmp_path)
    asked = prompts(config_of(tmp_path), multiples=(6,))
    with engine(tmp_path) as running, planted(rope_swapped, running.layers):
        assert not within(differences(running, Oracle(tmp_path), asked), LIMITS["auto"])
