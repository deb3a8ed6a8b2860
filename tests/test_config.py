"""DSAConfig: what it reads from a published config, and what it refuses by key, value and next step."""

import json
from types import SimpleNamespace

import pytest

from vllm_dsa.config import ConfigError, DSAConfig

V32 = {
    "model_type": "deepseek_v32",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 4096,
    },
}


def test_published_v32():
    config = DSAConfig.from_hf(V32)
    assert (config.latent_dim, config.qk_head_dim, config.index_topk) == (576, 192, 2048)
    assert config.index_rope_interleaved is False
    # 0.1 * ln(40) + 1 = 1.36888; 192^-0.5 * 1.36888^2
    assert config.softmax_scale == pytest.approx(0.1352337788608801, rel=1e-12)
    assert config.rope["rope_type"] == "yarn" and config.rope["rope_theta"] == 10000


def test_object_and_mapping_give_the_same():
    assert DSAConfig.from_hf(SimpleNamespace(**V32)) == DSAConfig.from_hf(json.loads(json.dumps(V32)))


def test_rope_parameters_of_transformers_5():
    rope = dict(V32["rope_scaling"], rope_type="yarn", rope_theta=10000)
    modern = {k: v for k, v in V32.items() if k not in ("rope_scaling", "rope_theta")} | {"rope_parameters": rope}
    assert DSAConfig.from_hf(modern).softmax_scale == DSAConfig.from_hf(V32).softmax_scale


def test_plain_rope_has_no_mscale():
    plain = {k: v for k, v in V32.items() if k != "rope_scaling"}
    assert DSAConfig.from_hf(plain).softmax_scale == 192**-0.5


@pytest.mark.parametrize(
    "key, value",
    [
        ("rope_interleaved", True),
        ("rope_interleaved", False),
        ("rope_interleave", False),
        ("dsa_pattern", "FFS"),
        ("indexer_rope_interleave", True),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("index_topk", 0),
        ("index_topk", -1),
        ("index_topk", "2048"),
        ("index_topk", True),
        ("index_topk", None),
        ("index_n_heads", 0),
        ("kv_lora_rank", 512.0),
        ("qk_rope_head_dim", 63),
        ("qk_rope_head_dim", 256),
        ("model_type", "deepseek_v3"),
    ],
)
def test_refused_by_key_and_value(key, value):
    with pytest.raises(ConfigError) as refused:
        DSAConfig.from_hf(V32 | {key: value})
    message = str(refused.value)
    named = value["rope_type"] if isinstance(value, dict) else repr(value)
    assert named in message
    assert key.removesuffix("_scaling").replace("rope", "rope") in message
    assert any(step in message for step in ("Remove", "Restore", "Set ")), message


def test_allowed_spellings():
    DSAConfig.from_hf(V32 | {"rope_interleave": True, "indexer_rope_interleave": False})
