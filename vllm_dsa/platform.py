"""What we adjust in vLLM's config before the engine starts, and what we refuse there. Chained to what stood before."""

import hashlib
import os
from pathlib import Path
from typing import Any

from vllm_dsa import cache, checkpoint, compat, envs
from vllm_dsa.checkpoint_files import FORMATS, PICKLED_FORMATS
from vllm_dsa.config import INDEX_ROPE_INTERLEAVED, ConfigError, DSAConfig

ARCHITECTURES = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM", "AXK2ForCausalLM")
# vLLM's names of the draft that the MTP layer of the first two is.
DRAFT_ARCHITECTURE, DRAFT_MODEL_TYPE = "DeepseekV32MTPModel", "deepseek_mtp"
# Their weights have no indexer, and vLLM drops tensors of one without a word.
DENSE_ARCHITECTURES = ("DeepseekV3ForCausalLM",)
# --load-format values that read the published files.
PUBLISHED_FORMATS = ("auto", *FORMATS, *PICKLED_FORMATS)
BLOCK_SIZE_MULTIPLE = 16
GPU_BLOCK_SIZE = 64  # what FlashMLA and DeepGEMM read
FP8_DS_MLA_NAMES = ("fp8", "fp8_e4m3", cache.FP8_DS_MLA)
DRAFT_METHODS = ("mtp", "ngram")
CACHE_DTYPES = ("auto", "bfloat16", *FP8_DS_MLA_NAMES)
# KV connectors that move both caches, bit for bit: seen in tests/test_transfer.py and tests/test_gpu_transfer.py.
CONNECTORS: dict[str, tuple[str, ...]] = {"cpu": ("ExampleConnector",), "cuda": ("OffloadingConnector",)}
CPU_WORKER = "vllm_dsa.cpu_worker.DSACPUWorker"
INDEX_CACHE_DTYPES = ("auto", "fp8")  # vLLM's names for the bytes that cache.py defines


def install() -> None:
    """Put our config hooks before those that vLLM has for each architecture. Idempotent."""
    hooks = {**dict.fromkeys(ARCHITECTURES, _served), **dict.fromkeys(DENSE_ARCHITECTURES, _dense)}
    for architecture, chained in hooks.items():
        previous = compat.MODELS_CONFIG_MAP.get(architecture, compat.VerifyAndUpdateConfig)
        if not getattr(previous, "vllm_dsa_hook", False):
            compat.MODELS_CONFIG_MAP[architecture] = chained(previous)
    convertors = compat.MODEL_ARCH_CONFIG_CONVERTORS
    for model_type in (*INDEX_ROPE_INTERLEAVED, DRAFT_MODEL_TYPE):
        previous = convertors.get(model_type, compat.ModelArchConfigConvertorBase)
        if not getattr(previous, "vllm_dsa_hook", False):
            convertors[model_type] = _read_first(previous)


def _read_first(previous: type) -> type:
    """A convertor is the first to read a config. What is wrong in it is refused here by its key: later, vLLM's own
    readers would die of it."""

    class DSAConvertor(previous):  # type: ignore[misc,valid-type]
        vllm_dsa_hook = True

        def __init__(self, hf_config: Any, *args: Any, **kwargs: Any) -> None:
            architectures = set(getattr(hf_config, "architectures", None) or ())
            if architectures & set(ARCHITECTURES):
                DSAConfig.from_hf(hf_config)
                if isinstance(rope := getattr(hf_config, "rope_parameters", None), dict):
                    # What replaces them by --hf-overrides may have the old name, or none, for vLLM to stumble over.
                    rope.setdefault("rope_type", rope.get("type", "default"))
            elif DRAFT_ARCHITECTURE in architectures:
                _require_mtp_key(hf_config)
            super().__init__(hf_config, *args, **kwargs)

    return DSAConvertor


def _served(previous: type) -> type:
    class DSAModelConfig(previous):  # type: ignore[misc,valid-type]
        vllm_dsa_hook = True

        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            check(vllm_config)
            previous.verify_and_update_config(vllm_config)
            if vllm_config.model_config.hf_config.model_type == "axk2":
                treat_as_v32(vllm_config)
            if compat.current_platform.is_cpu():
                enable_paged_features_on_cpu(vllm_config)
                settle_cpu_worker(vllm_config)
            from vllm_dsa import metrics  # it loads what register() must not

            metrics.publish(vllm_config, DSAConfig.from_hf(vllm_config.model_config.hf_config))

    return DSAModelConfig


def _dense(previous: type) -> type:
    class DenseModelConfig(previous):  # type: ignore[misc,valid-type]
        vllm_dsa_hook = True

        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            # With index_topk in the config vLLM does build an indexer.
            if (folder := _published_folder(vllm_config)) and not hasattr(
                vllm_config.model_config.hf_config, "index_topk"
            ):
                checkpoint.refuse_indexer(folder, vllm_config.load_config.load_format)
            previous.verify_and_update_config(vllm_config)

    return DenseModelConfig


def check(vllm_config: Any) -> None:
    """Refuse, by key and value, what this package would not serve right; settle the cache dtype."""
    model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
    _refuse_unproven(vllm_config)
    _refuse_dense(vllm_config)
    _fill_routing(model_config.hf_config)
    config = DSAConfig.from_hf(model_config.hf_config)
    drafts = _check_speculation(vllm_config, config)
    _refuse_parallel(vllm_config, config)
    _refuse_quantisation(model_config)
    dtype = str(model_config.dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype {dtype} is refused: DSA layers run in bfloat16 or float32. Pass one of them.")
    asked = cache_config.cache_dtype
    if asked not in CACHE_DTYPES:
        raise ConfigError(
            f"--kv-cache-dtype {asked} is refused: DSA's latent cache is one of {', '.join(CACHE_DTYPES)}. Pass one "
            f"of them."
        )
    if asked == "bfloat16" and dtype != "bfloat16":
        raise ConfigError(
            f"--kv-cache-dtype bfloat16 is refused with --dtype {dtype}: the cache holds the model's dtype. Pass "
            f"--kv-cache-dtype auto or --dtype bfloat16."
        )
    if asked in FP8_DS_MLA_NAMES:
        if (config.kv_lora_rank, config.qk_rope_head_dim) != (512, 64):
            raise ConfigError(
                f"--kv-cache-dtype {asked} is refused: its 656-byte rows hold kv_lora_rank 512 and qk_rope_head_dim "
                f"64, this model has {config.kv_lora_rank} and {config.qk_rope_head_dim}. Pass --kv-cache-dtype auto."
            )
        cache_config.cache_dtype = cache.FP8_DS_MLA
    index_dtype = vllm_config.attention_config.indexer_kv_dtype
    if index_dtype not in INDEX_CACHE_DTYPES:
        raise ConfigError(
            f"--attention-config indexer_kv_dtype {index_dtype!r} is refused: DSA's index-key cache is FP8 (e4m3 with "
            f"a scale a token), one of {', '.join(INDEX_CACHE_DTYPES)}. Remove the key."
        )
    connector = _connector(vllm_config)
    if not cache_config.user_specified_block_size and (connector or not compat.current_platform.is_cpu()):
        # As if asked for: vLLM would otherwise settle on the smallest size that both caches' backends take, and only
        # once a connector's store has got its name.
        cache_config.block_size, cache_config.user_specified_block_size = GPU_BLOCK_SIZE, True
    block_size = cache_config.block_size
    if cache_config.user_specified_block_size and block_size % BLOCK_SIZE_MULTIPLE:
        raise ConfigError(
            f"--block-size {block_size} is refused: pages hold a multiple of {BLOCK_SIZE_MULTIPLE} tokens. Pass "
            f"e.g. --block-size 64."
        )
    if connector:
        _check_transfer(vllm_config, config, connector)
    _settle_load_format(vllm_config)
    if folder := _published_folder(vllm_config):
        checkpoint.check(folder, model_config.hf_config, drafts, vllm_config.load_config.load_format)


def _settle_load_format(vllm_config: Any) -> None:
    """Have ``auto`` read the files that transformers reads. vLLM would take any file consolidated*.safetensors, in a
    subfolder even, for the whole model, whatever else is there; no DSA model is published in Mistral's format."""
    drafts = getattr(vllm_config.speculative_config, "draft_load_config", None)
    for load_config in (vllm_config.load_config, drafts):
        if load_config is not None and load_config.load_format == "auto" and not vllm_config.model_config.model_weights:
            load_config.load_format = "hf"


def _published_folder(vllm_config: Any) -> Path | None:
    """The local folder that the weights will be loaded from in their published format, if they will be."""
    folder = Path(vllm_config.model_config.model)
    local = folder.is_dir() and not vllm_config.model_config.model_weights
    return folder if local and vllm_config.load_config.load_format in PUBLISHED_FORMATS else None


def _refuse_unproven(vllm_config: Any) -> None:
    """Refuse what vLLM would do to our layers behind their back: other weights, or another reader of the caches."""
    if vllm_config.lora_config is not None:
        raise ConfigError(
            "--enable-lora is refused: DSA layers fold kv_b_proj into W_UK and W_UV while they load, and no adapter is "
            "proven on their other weights. Merge the adapter into the checkpoint and serve that."
        )
    if vllm_config.attention_config.hisparse_config is not None:
        raise ConfigError(
            "--attention-config hisparse_config is refused: HiSparse reads the caches of vLLM's own DSA layers. Remove "
            "it, or set VLLM_DSA_DISABLE=1 to serve with stock vLLM."
        )
    parallel = vllm_config.parallel_config
    if parallel.enable_eplb:
        raise ConfigError(
            "--enable-eplb is refused: the copies of experts that it adds would not be loaded, and vLLM would balance "
            "nothing. Remove it, and num_redundant_experts; --enable-expert-parallel works without."
        )
    if parallel.use_ubatching:
        flag = "--enable-dbo" if parallel.enable_dbo else f"--ubatch-size {parallel.ubatch_size}"
        raise ConfigError(
            f"{flag} is refused: DSA layers are proven on one micro-batch at a time; two would write each other's "
            f"selection. Remove it."
        )


def _refuse_dense(vllm_config: Any) -> None:
    """Refuse VLLM_DSA_DENSE=1 where kernels/dense.py would not be right."""
    if not envs.VLLM_DSA_DENSE:
        return
    if not compat.current_platform.is_cpu() and not vllm_config.model_config.enforce_eager:
        raise ConfigError(
            "VLLM_DSA_DENSE=1 is refused on a GPU with CUDA graphs: a graph would go on reading as many keys as there "
            "were when it was captured. Pass --enforce-eager."
        )
    if connector := _connector(vllm_config):
        raise ConfigError(
            f"VLLM_DSA_DENSE=1 is refused with KV connector {connector!r}: pages without index keys could reach a "
            f"server that reads them. Remove --kv-transfer-config and --kv-offloading-size, or unset the variable."
        )


def _connector(vllm_config: Any) -> str | None:
    """Name of the KV connector that vLLM will take, if any."""
    if vllm_config.cache_config.kv_offloading_size is None:
        transfer = vllm_config.kv_transfer_config
        return None if transfer is None else str(transfer.kv_connector)
    if vllm_config.cache_config.kv_offloading_backend != "native":
        return "LMCacheMPConnector"
    return "SimpleCPUOffloadConnector" if os.environ.get("VLLM_USE_SIMPLE_KV_OFFLOAD") == "1" else "OffloadingConnector"


def _check_transfer(vllm_config: Any, config: DSAConfig, connector: str) -> None:
    """Refuse every KV connector, and every way to use one, that is not proven to move both caches; name its store."""
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    extra = {} if transfer is None else transfer.kv_connector_extra_config
    proven = CONNECTORS.get(compat.current_platform.device_type, ())
    size = vllm_config.cache_config.kv_offloading_size
    flag = "--kv-transfer-config" if size is None else f"--kv-offloading-size {size:g}"
    refused = f"{flag} with kv_connector {connector!r} is refused"
    module = None if transfer is None else transfer.kv_connector_module_path
    if connector not in proven or module is not None:
        known = f"only {' and '.join(proven)} of vLLM's own is" if proven else "no connector is"
        raise ConfigError(
            f"{refused}: on this platform {known} proven to move the latent pages and the planar index-key pages "
            f"together. Remove {flag.split()[0]}."
        )
    stored = connector == "ExampleConnector"
    spec = extra.get("spec_name", "CPUOffloadingSpec")
    for wrong, why, step in (
        (parallel.world_size > 1, f"with {parallel.world_size} ranks: it is proven on one", "Serve on one rank"),
        (vllm_config.speculative_config is not None, "with a draft: not proven", "Remove --speculative-config"),
        (not stored and spec != "CPUOffloadingSpec", f"with spec_name {spec!r}: not proven", "Remove spec_name"),
        # It stores a prompt when its first part is computed, and finds one by its token ids.
        (
            stored and vllm_config.scheduler_config.enable_chunked_prefill,
            "with chunked prefill: it stores the first chunk as if it were the prompt",
            "Pass --no-enable-chunked-prefill",
        ),
        (
            stored and vllm_config.scheduler_config.long_prefill_token_threshold > 0,
            "with --long-prefill-token-threshold: it stores the first chunk as if it were the prompt",
            "Remove --long-prefill-token-threshold",
        ),
        (
            stored and vllm_config.model_config.enable_prompt_embeds,
            "with --enable-prompt-embeds: it would take every such prompt for the same",
            "Remove --enable-prompt-embeds",
        ),
    ):
        if wrong:
            raise ConfigError(f"{refused} {why}. {step}, or remove {flag.split()[0]}.")
    if stored:
        store = Path(extra.get("shared_storage_path", "/tmp"))
        name = _store_name(vllm_config, config)
        extra["shared_storage_path"] = str(store if store.name == name else store / name)


def _store_name(vllm_config: Any, config: DSAConfig) -> str:
    """Folder of a store for these pages of this model: its connector asks for a prompt's tokens and nothing else."""
    model, cache_config = vllm_config.model_config, vllm_config.cache_config
    row = cache.FP8_DS_MLA if cache_config.cache_dtype == cache.FP8_DS_MLA else str(model.dtype).removeprefix("torch.")
    layout = cache.layout_name(row, config.latent_dim, config.index_head_dim, cache_config.block_size)
    facts = hashlib.sha256(repr((model.model, model.revision, config)).encode()).hexdigest()
    return f"{layout}-{facts[:16]}"


def _refuse_parallel(vllm_config: Any, config: DSAConfig) -> None:
    """Refuse splits of the model that its layers, or vLLM on a CPU, would compute wrongly or die of."""
    parallel, on_cpu = vllm_config.parallel_config, compat.current_platform.is_cpu()
    for name in ("decode", "prefill"):
        size = getattr(parallel, f"{name}_context_parallel_size")
        if size > 1:
            raise ConfigError(
                f"--{name}-context-parallel-size {size} is refused: DSA layers select from whole sequences, and this "
                f"one would be spread over ranks. Remove it; --tensor-parallel-size splits heads and weights."
            )
    stages = parallel.pipeline_parallel_size
    for stage in range(1, stages):
        start, _ = compat.get_pp_indices(config.num_hidden_layers, stage, stages)
        if start < config.num_hidden_layers and config.index_shared[start]:
            raise ConfigError(
                f"--pipeline-parallel-size {stages} is refused: stage {stage} would start at layer {start}, which "
                f"shares the selection of a layer on the stage before. Set VLLM_PP_LAYER_PARTITION (layers of each "
                f"stage, separated by commas) so that every stage starts at a layer with an indexer."
            )
    graphs = os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH", "1") != "0"
    if stages > 1 and on_cpu and (graphs or vllm_config.model_config.enforce_eager):
        raise ConfigError(
            f"--pipeline-parallel-size {stages} is refused on a CPU as it is: vLLM's runner there would have no buffer "
            f"for what a stage hands on. Set VLLM_USE_BREAKABLE_CUDAGRAPH=0 and leave --enforce-eager out, or use "
            f"--tensor-parallel-size."
        )
    if not on_cpu or all(config.dense_mlp):
        return
    if parallel.enable_expert_parallel:
        raise ConfigError(
            "--enable-expert-parallel is refused on a CPU: vLLM's expert kernel there reads past the experts of a "
            "rank. Remove it; --tensor-parallel-size splits experts too."
        )
    if parallel.data_parallel_size > 1:
        raise ConfigError(
            f"--data-parallel-size {parallel.data_parallel_size} is refused on a CPU: vLLM has no exchange of experts' "
            f"tokens there. Start several servers instead, or use --tensor-parallel-size."
        )


def _refuse_quantisation(model_config: Any) -> None:
    """Refuse NVFP4 where vLLM has no kernel for it, before it says so in words of its own."""
    platform = compat.current_platform
    if not model_config.is_nvfp4_quantized() or (platform.is_cuda() and platform.has_device_capability(75)):
        return
    raise ConfigError(
        "quantization_config: NVFP4 is refused here: vLLM has kernels for it on NVIDIA GPUs of compute capability 7.5 "
        "and newer only (below 10.0 they read 4-bit weights and compute in 16 bits). Serve it there, or serve the "
        "model in bfloat16, FP8, AWQ, GPTQ or compressed-tensors W4A16."
    )


def _require_mtp_key(hf_config: Any) -> None:
    """Of a draft's config, as vLLM has made it of the model's: vLLM would divide by a 0 there, and add a null."""
    if not (layers := getattr(hf_config, "num_nextn_predict_layers", None)):
        raise ConfigError(
            f"--speculative-config is refused: num_nextn_predict_layers in config.json is {layers!r}, so the model has "
            f"no MTP layer to draft with. If its files hold one (`vllm-dsa doctor` says so), set the key to 1 there; "
            f"else remove --speculative-config."
        )


def _check_speculation(vllm_config: Any, config: DSAConfig) -> bool:
    """Refuse drafts that are not proven to leave the answers as they are; returns whether the MTP layer drafts."""
    speculation, model_config = vllm_config.speculative_config, vllm_config.model_config
    if speculation is None:
        return False
    if speculation.method not in DRAFT_METHODS:
        raise ConfigError(
            f"--speculative-config with method {speculation.method!r} is refused: only {' and '.join(DRAFT_METHODS)} "
            f'are proven. Pass \'{{"method": "mtp", "num_speculative_tokens": 1}}\'.'
        )
    if speculation.enable_adaptive_verification:
        raise ConfigError(
            "--speculative-config with enable_adaptive_verification is refused: it cuts drafts off on the device, and "
            "DSA layers plan a step by what the host knows. Remove the key."
        )
    if speculation.method != "mtp":
        return False
    if config.mtp_layers != 1:
        raise ConfigError(
            f"--speculative-config with method mtp is refused: num_nextn_predict_layers is {config.mtp_layers}, and "
            f"only one MTP layer can draft. Remove --speculative-config, or restore the published config.json."
        )
    if speculation.model not in (model_config.model, model_config.model_weights):
        raise ConfigError(
            f"--speculative-config with model {speculation.model!r} is refused: the draft is the MTP layer of the "
            f"model that is served. Remove the key model."
        )
    if speculation.kv_cache_dtype is not None:
        raise ConfigError(
            f"--speculative-config with kv_cache_dtype {speculation.kv_cache_dtype!r} is refused: the draft's caches "
            f"are in the pages of the model's. Remove the key; --kv-cache-dtype holds for both."
        )
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise ConfigError(
            f"--speculative-config is refused with --pipeline-parallel-size {stages}: the draft, on the last stage, "
            f"needs the embedding, which is on the first. Remove one of them."
        )
    return True


def _fill_routing(hf_config: Any) -> None:
    """Every DSA model routes by sigmoid with a correction bias; a config saved by transformers leaves that out, and
    vLLM would then take softmax without one."""
    for key, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if getattr(hf_config, key, None) is None:
            setattr(hf_config, key, value)
        elif getattr(hf_config, key) != value:
            raise ConfigError(
                f"{key}: {getattr(hf_config, key)!r} is refused: DSA models route with {value!r}. Restore the "
                f"published config.json."
            )
    if hf_config.model_type == "axk2":
        # No groups are one group. The reference computes the router in float32.
        for key, default in (("n_group", 1), ("topk_group", 1), ("moe_router_dtype", "float32")):
            if getattr(hf_config, key, None) is None:
                setattr(hf_config, key, default)


def treat_as_v32(vllm_config: Any) -> None:
    """Give an architecture that vLLM does not know what vLLM gives DeepSeek-V3.2 by its name: MLA's cache dimensions,
    "auto" for a bfloat16 cache, and, unless the user has set otherwise, CUDA graphs that leave attention of mixed
    batches out."""
    arch, config = vllm_config.model_config.model_arch_config, DSAConfig.from_hf(vllm_config.model_config.hf_config)
    arch.is_deepseek_mla, arch.head_size = True, config.latent_dim
    if vllm_config.cache_config.cache_dtype == "bfloat16":
        vllm_config.cache_config.cache_dtype = "auto"
    if "DeepseekV32ForCausalLM" in compat.default_breakable_cudagraph_architectures():
        os.environ.setdefault("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")


def enable_paged_features_on_cpu(vllm_config: Any) -> None:
    """Keep chunked prefill, prefix caching and the asked block size on a CPU.

    vLLM's own CPU MLA kernels need block size 16 and whole prompts, so its CPU platform imposes both on every model
    that it takes for MLA. Our layers need neither.
    """
    vllm_config.model_config.model_arch_config.is_deepseek_mla = False


def settle_cpu_worker(vllm_config: Any) -> None:
    """Take the worker without vLLM's faults on a CPU."""
    parallel = vllm_config.parallel_config
    if parallel.worker_cls not in ("auto", "vllm.v1.worker.cpu_worker.CPUWorker", CPU_WORKER):
        raise ConfigError(
            f"--worker-cls {parallel.worker_cls} is refused on a CPU: vLLM's own worker there ends on a request with a "
            f"seed, and draws drafts from unset memory; ours does not. Remove it."
        )
    parallel.worker_cls = CPU_WORKER
