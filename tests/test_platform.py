"""The config hook: refusals at engine-config time, by key and value, and the CPU's paged features kept."""

import os

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from tiny_checkpoint import write_random
from vllm.engine.arg_utils import EngineArgs

from vllm_dsa import platform
from vllm_dsa.attention import DSAAttention
from vllm_dsa.backend import DSABackend, IndexCacheBackend
from vllm_dsa.compat import MODELS_CONFIG_MAP
from vllm_dsa.config import ConfigError
from vllm_dsa.indexer import IndexCache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("v32")
    write_random(path, num_hidden_layers=1)
    return path


@pytest.fixture(scope="module")
def small_latent(tmp_path_factory):
    path = tmp_path_factory.mktemp("small")
    write_random(path, num_hidden_layers=1, kv_lora_rank=128, qk_rope_head_dim=32)
    return path


def engine_config(path, **options):
    defaults = dict(skip_tokenizer_init=True, dtype="float32", max_model_len=2048)
    return EngineArgs(model=str(path), **(defaults | options)).create_engine_config()


@pytest.mark.parametrize(
    "key, value",
    [
        ("rope_interleaved", False),
        ("rope_interleave", False),
        ("dsa_pattern", "FFS"),
        ("indexer_rope_interleave", True),
        ("index_topk", 0),
        ("index_topk", -1),
        ("index_topk", "2048"),
    ],
)
def test_config_keys_are_refused(folder, key, value):
    with pytest.raises(ValueError, match=rf"{key}: {value!r} is "):
        engine_config(folder, hf_overrides={key: value})


def test_dynamic_rope_is_refused(folder):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="rope type: 'dynamic' is refused.*Restore"):
        engine_config(folder, hf_overrides={"rope_parameters": rope})


@pytest.mark.parametrize(
    "dtype",
    ["float16", "fp8_e5m2", "fp8_inc", "nvfp4", "nvfp4_ds_mla", "fp8_per_token_head", "int8_per_token_head"]
    + ["turboquant_k8v4", "turboquant_4bit_nc"],
)
def test_cache_dtypes_are_refused(folder, dtype):
    with pytest.raises(ValueError, match=rf"--kv-cache-dtype {dtype} is refused.*auto, bfloat16, fp8"):
        engine_config(folder, kv_cache_dtype=dtype)


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3", "fp8_ds_mla"])
def test_fp8_means_fp8_ds_mla(folder, dtype):
    assert engine_config(folder, kv_cache_dtype=dtype).cache_config.cache_dtype == "fp8_ds_mla"


@pytest.mark.parametrize("dtype", ["fp8", "fp8_ds_mla"])
def test_fp8_of_another_latent_size_is_refused(small_latent, dtype):
    with pytest.raises(ValueError, match=rf"{dtype} is refused: .*512 .*this model has 128 and 32.*auto"):
        engine_config(small_latent, kv_cache_dtype=dtype)


def test_bfloat16_cache_needs_a_bfloat16_model(folder):
    assert engine_config(folder, dtype="bfloat16", kv_cache_dtype="bfloat16").cache_config.cache_dtype == "auto"
    with pytest.raises(ValueError, match="bfloat16 is refused with --dtype float32"):
        engine_config(folder, kv_cache_dtype="bfloat16")


def test_float16_model_is_refused(folder):
    with pytest.raises(ValueError, match="--dtype float16 is refused"):
        engine_config(folder, dtype="float16")


def test_lora_is_refused(folder):
    """At start; without --enable-lora vLLM refuses every adapter, see test_weights.py."""
    with pytest.raises(ValueError, match="--enable-lora is refused: .*kv_b_proj.*Merge the adapter"):
        engine_config(folder, enable_lora=True)


def test_hisparse_is_refused(folder):
    with pytest.raises(ValueError, match="hisparse_config is refused.*Remove"):
        engine_config(folder, attention_config={"hisparse_config": {}})


@pytest.mark.parametrize(
    "options, flag", [({"ubatch_size": 2}, "--ubatch-size 2"), ({"enable_dbo": True}, "--enable-dbo")]
)
def test_micro_batches_are_refused(folder, options, flag):
    config = engine_config(folder)
    for option, value in options.items():  # on a CPU vLLM turns --enable-dbo off by itself
        setattr(config.parallel_config, option, value)
    with pytest.raises(ConfigError, match=f"^{flag} is refused: .*one micro-batch.*Remove"):
        platform.check(config)


def test_balanced_experts_are_refused(folder):
    config = engine_config(folder)
    config.parallel_config.enable_eplb = True  # vLLM's own check asks for GPUs
    with pytest.raises(ConfigError, match="^--enable-eplb is refused: .*Remove it"):
        platform.check(config)


@pytest.mark.parametrize("method", ["mtp", "ngram"])
def test_adaptive_verification_is_refused(folder, method):
    draft = {"method": method, "num_speculative_tokens": 1, "enable_adaptive_verification": True}
    with pytest.raises(ValueError, match="enable_adaptive_verification is refused: .*Remove the key"):
        engine_config(folder, speculative_config=draft | ({"prompt_lookup_max": 2} if method == "ngram" else {}))


def test_vllm_is_promised_nothing_unproven():
    """What vLLM's base classes promise for a backend and its layers, of which nothing is proven here."""
    for backend in (DSABackend, IndexCacheBackend):
        assert not backend.supports_device_cpu_query_lens_mismatch()
        assert not backend.supports_dcp() and not backend.supports_pcp() and not backend.supports_batch_invariance()
        assert backend.get_builder_cls().supports_update_block_table is False
    assert not DSAAttention.supports_dcp and not IndexCache.supports_dcp


@pytest.mark.parametrize("dtype", ["bf16", "mxfp4", "nvfp4"])
def test_index_cache_dtypes_are_refused(folder, dtype):
    with pytest.raises(ValueError, match=f"indexer_kv_dtype '{dtype}' is refused.*one of auto, fp8.*Remove"):
        engine_config(folder, attention_config={"indexer_kv_dtype": dtype})


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_index_cache_dtypes_that_mean_what_it_is(folder, dtype):
    engine_config(folder, attention_config={"indexer_kv_dtype": dtype})


@pytest.mark.parametrize("block_size", [24, 8, 100])
def test_odd_block_sizes_are_refused(folder, block_size):
    with pytest.raises(ValueError, match=f"--block-size {block_size} is refused.*multiple of 16"):
        engine_config(folder, block_size=block_size)


@pytest.mark.parametrize("block_size", [16, 48, 64, 128])
def test_cpu_keeps_block_size_chunks_and_prefix_cache(folder, block_size):
    config = engine_config(folder, block_size=block_size, max_num_batched_tokens=64)
    assert config.cache_config.block_size == block_size
    assert config.scheduler_config.enable_chunked_prefill
    assert config.scheduler_config.max_num_batched_tokens == 64
    assert config.cache_config.enable_prefix_caching


def test_hook_is_chained_once():
    """Installing again changes nothing, and what vLLM did in its own hook still happens."""
    before = dict(MODELS_CONFIG_MAP)
    platform.install()
    assert before == MODELS_CONFIG_MAP
    for architecture in platform.ARCHITECTURES:
        hook = MODELS_CONFIG_MAP[architecture]
        assert hook.vllm_dsa_hook and not getattr(hook.__mro__[1], "vllm_dsa_hook", False)
