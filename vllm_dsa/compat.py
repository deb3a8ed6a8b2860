"""Every name of vLLM that this package touches, and where it stands.

``from vllm_dsa.compat import X`` imports X from vLLM on first use, so that importing this module loads nothing. A name
whose home or signature differs between the supported versions gets a function below the table.
"""

import ast
import functools
import os
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SUPPORTED = ("0.32", "0.33")

# name here -> "module:attribute" in vLLM
NAMES = {
    "AttentionBackend": "vllm.v1.attention.backend:AttentionBackend",
    "AttentionBackendEnum": "vllm.v1.attention.backends.registry:AttentionBackendEnum",
    "AttentionCGSupport": "vllm.v1.attention.backend:AttentionCGSupport",
    "AttentionLayerBase": "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase",
    "AttentionMetadataBuilder": "vllm.v1.attention.backend:AttentionMetadataBuilder",
    "BreakableCUDAGraphCapture": "vllm.compilation.breakable_cudagraph:BreakableCUDAGraphCapture",
    "CPUWorker": "vllm.v1.worker.cpu_worker:CPUWorker",
    "ColumnParallelLinear": "vllm.model_executor.layers.linear:ColumnParallelLinear",
    "DeepseekV2MLP": "vllm.model_executor.models.deepseek_v2:DeepseekV2MLP",
    "DeepseekV2MoE": "vllm.model_executor.models.deepseek_v2:DeepseekV2MoE",
    "FusedMoEFactory": "vllm.model_executor.layers.fused_moe:FusedMoEFactory",
    "GateLinear": "vllm.model_executor.layers.fused_moe:GateLinear",
    "IntermediateTensors": "vllm.sequence:IntermediateTensors",
    "LLM": "vllm:LLM",
    "LinearBase": "vllm.model_executor.layers.linear:LinearBase",
    "LogitsProcessor": "vllm.model_executor.layers.logits_processor:LogitsProcessor",
    "MLAAttentionSpec": "vllm.v1.kv_cache_interface:MLAAttentionSpec",
    "MODELS_CONFIG_MAP": "vllm.model_executor.models.config:MODELS_CONFIG_MAP",
    "MergedColumnParallelLinear": "vllm.model_executor.layers.linear:MergedColumnParallelLinear",
    "MODEL_ARCH_CONFIG_CONVERTORS": "vllm.transformers_utils.model_arch_config_convertor:MODEL_ARCH_CONFIG_CONVERTORS",
    "ModelArchConfigConvertorBase": "vllm.transformers_utils.model_arch_config_convertor:ModelArchConfigConvertorBase",
    "ModelRegistry": "vllm:ModelRegistry",
    "MultipleOf": "vllm.v1.attention.backend:MultipleOf",
    "PPMissingLayer": "vllm.model_executor.models.utils:PPMissingLayer",
    "ParallelLMHead": "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead",
    "QUANTIZATION_METHODS": "vllm.model_executor.layers.quantization:QUANTIZATION_METHODS",
    "QuantizationConfig": "vllm.model_executor.layers.quantization.base_config:QuantizationConfig",
    "RMSNorm": "vllm.model_executor.layers.layernorm:RMSNorm",
    "RejectionSampler": "vllm.v1.sample.rejection_sampler:RejectionSampler",
    "ReplicatedLinear": "vllm.model_executor.layers.linear:ReplicatedLinear",
    "RoutedExperts": "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts",
    "RowParallelLinear": "vllm.model_executor.layers.linear:RowParallelLinear",
    "SamplingParams": "vllm:SamplingParams",
    "SupportsPP": "vllm.model_executor.models.interfaces:SupportsPP",
    "UnquantizedFusedMoEMethod": "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod",
    "UnquantizedLinearMethod": "vllm.model_executor.layers.linear:UnquantizedLinearMethod",
    "VerifyAndUpdateConfig": "vllm.model_executor.models.config:VerifyAndUpdateConfig",
    "VocabParallelEmbedding": "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding",
    "aux_stream": "vllm.utils.torch_utils:aux_stream",
    "cleanup_dist_env_and_memory": "vllm.distributed:cleanup_dist_env_and_memory",
    "current_platform": "vllm.platforms:current_platform",
    "default_breakable_cudagraph_architectures": "vllm.config.vllm:default_breakable_cudagraph_architectures",
    "default_weight_loader": "vllm.model_executor.model_loader.weight_utils:default_weight_loader",
    "eager_break_during_capture": "vllm.compilation.breakable_cudagraph:eager_break_during_capture",
    "environment_variables": "vllm.envs:environment_variables",
    "get_current_vllm_config": "vllm.config:get_current_vllm_config",
    "get_forward_context": "vllm.forward_context:get_forward_context",
    "get_pp_indices": "vllm.distributed.utils:get_pp_indices",
    "get_pp_group": "vllm.distributed:get_pp_group",
    "get_tp_group": "vllm.distributed:get_tp_group",
    "get_world_group": "vllm.distributed:get_world_group",
    "get_tensor_model_parallel_world_size": "vllm.distributed:get_tensor_model_parallel_world_size",
    "init_logger": "vllm.logger:init_logger",
    "is_pp_missing_parameter": "vllm.model_executor.models.utils:is_pp_missing_parameter",
    "make_empty_intermediate_tensors_factory": "vllm.model_executor.models.utils:make_empty_intermediate_tensors_factory",
    "make_layers": "vllm.model_executor.models.utils:make_layers",
    "maybe_prefix": "vllm.model_executor.models.utils:maybe_prefix",
    "mtp_layer_of_weight": "vllm.model_executor.models.utils:get_spec_layer_idx_from_weight_name",
    "register_backend": "vllm.v1.attention.backends.registry:register_backend",
    "register_quantization_config": "vllm.model_executor.layers.quantization:register_quantization_config",
}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = NAMES[name].split(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def vllm_version() -> str:
    """Version of the installed vLLM, e.g. "0.32.0+cpu"."""
    return import_module("vllm").__version__


def is_supported(version: str) -> bool:
    """Is this vLLM version within the range this package was written for?"""
    return ".".join(version.split(".")[:2]) in SUPPORTED


def register_layer(prefix: str, layer: Any) -> None:
    """Make a layer known to vLLM's cache allocation and forward context under its unique name."""
    from vllm.config import get_current_vllm_config

    layers = get_current_vllm_config().compilation_config.static_forward_context
    if prefix in layers:
        raise ValueError(f"attention layer {prefix!r} is registered twice; give each layer its own prefix.")
    layers[prefix] = layer


def kv_connector() -> Any:
    """The KV connector that this step's pages are handed to, if there is one."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if not has_kv_transfer_group():
        return None
    connector = get_kv_transfer_group()
    return connector if connector.has_connector_metadata() else None


def dequantised_weight(linear: Any, dtype: Any) -> Any:
    """Weight [out, in] of a vLLM linear layer in ``dtype``, whatever its quantisation."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights

    return get_and_maybe_dequant_weights(linear, out_dtype=dtype)


def ask_for_amx() -> None:
    """Ask the system for leave to use AMX. vLLM's CPU kernel of 4-bit weights and 16-bit activations takes it unasked,
    and the process would be killed."""
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def has_triton() -> bool:
    """Does vLLM run its Triton kernels here, rather than stand-ins for them?"""
    from vllm.triton_utils import HAS_TRITON

    return HAS_TRITON


def register_draft_kernels(expand: Any, reject: Any) -> None:
    """Have these stand in for two kernels of sampling with drafts: the one that gives each draft token its request's
    temperature, top_p and top_k, and the one that accepts or rejects at a temperature."""
    from vllm.triton_utils.dispatcher import register_kernels

    sampler = "vllm.v1.sample.rejection_sampler"
    register_kernels({f"{sampler}.expand_kernel": expand, f"{sampler}.rejection_random_sample_kernel": reject})


def reject_drafts_on_cpu(*args: Any) -> None:
    """vLLM's own stand-in for the second of them."""
    from vllm.utils.cpu_triton_utils import _rejection_random_sample_kernel_impl

    _rejection_random_sample_kernel_impl(*args)


def repack_experts(experts: Any) -> None:
    """Have fused experts packed again once they are loaded again.

    On a CPU vLLM 0.32 packs them the first time only; after `reload_weights` it would read plain weights as packed ones.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        experts.quant_method.moe_kernel = None


def reload_in_place(model: Any, weights: Any, model_config: Any) -> None:
    """What vLLM's `reload_weights` does with the model that it is for, to another one."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    model.load_weights(weights)
    finalize_layerwise_reload(model, model_config)


def expert_params_mapping(model: Any, num_experts: int) -> list[tuple[str, str, int, str]]:
    """(fused parameter, checkpoint tensor, expert, shard) of every routed expert, under the published names."""
    from vllm.model_executor.layers.fused_moe import fused_moe_make_expert_params_mapping

    return fused_moe_make_expert_params_mapping(
        model,
        ckpt_gate_proj_name="gate_proj",
        ckpt_down_proj_name="down_proj",
        ckpt_up_proj_name="up_proj",
        num_experts=num_experts,
    )


# The vendor libraries: those that are installed beside vLLM, if new enough, or else its copies.
FLASH_MLA_FILES = ("_flashmla_C*.so", "_flashmla_extension_C*.so", "third_party/flashmla/flash_mla_interface.py")
FLASH_MLA_ARGUMENTS = {
    "get_mla_metadata": set[str](),
    "flash_mla_with_kvcache": {"tile_scheduler_metadata", "is_fp8_kvcache", "indices", "out"},
    "flash_mla_sparse_fwd": {"topk_length", "out"},
}
DEEP_GEMM_FILE = "third_party/deep_gemm/__init__.py"
DEEP_GEMM_FUNCTIONS = ("fp8_fp4_mqa_logits", "fp8_fp4_paged_mqa_logits", "get_paged_mqa_logits_metadata")
_OLD_SCORES = "DeepGEMM: vLLM 0.32 returns scores in another layout than 0.33, which is what was tested"


def vendor_refusals() -> list[str]:
    """Why FlashMLA or DeepGEMM cannot be used here; empty if both can."""
    if find_spec("vllm") is None:
        return ["FlashMLA comes with vLLM, which is not installed here"]
    from vllm.utils.deep_gemm import is_deep_gemm_supported
    from vllm.v1.attention.ops.flashmla import is_flashmla_sparse_supported

    reasons = []
    if vllm_version().startswith("0.32."):
        reasons.append(_OLD_SCORES)
    supported, reason = is_flashmla_sparse_supported()
    if not supported:
        reasons += _without_vllms_flash_mla(reason)
    if not is_deep_gemm_supported():
        reasons.append("DeepGEMM: the installed vLLM has no copy of it for this GPU")
    return reasons + old_deep_gemm_refusals()


def _folder(package: str) -> Path | None:
    spec = find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def own_flash_mla() -> Path | None:
    """Folder of a FlashMLA that is installed beside vLLM and new enough: it serves then. Loads nothing."""
    return None if old_flash_mla() else _folder("flash_mla")


def old_flash_mla() -> list[str]:
    """Why a FlashMLA beside vLLM is not used; empty if there is none, or it is. Loads nothing."""
    folder = _folder("flash_mla")
    if folder is None:
        return []
    found: dict[str, set[str]] = {}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(errors="replace"))):
            if isinstance(node, ast.FunctionDef):
                found[node.name] = {each.arg for each in (*node.args.args, *node.args.kwonlyargs)}
    lacking = [name for name in FLASH_MLA_ARGUMENTS if name not in found]
    for name, wanted in FLASH_MLA_ARGUMENTS.items():
        lacking += [f"{argument} of {name}" for argument in sorted(wanted - found.get(name, wanted))]
    return [f"the FlashMLA in {folder} is too old, it lacks {', '.join(lacking)}"] if lacking else []


def _without_vllms_flash_mla(reason: str | None) -> list[str]:
    """Why no FlashMLA serves, where vLLM's copy does not for ``reason``; empty if the one beside it does."""
    return [] if own_flash_mla() else ["; ".join([f"FlashMLA: {reason}", *old_flash_mla()])]


@functools.cache
def _flash_mla() -> Any:
    """The FlashMLA that serves: the three functions of FLASH_MLA_ARGUMENTS."""
    if own_flash_mla():
        return import_module("flash_mla")
    from vllm.v1.attention.ops.flashmla import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata

    return SimpleNamespace(
        flash_mla_sparse_fwd=flash_mla_sparse_fwd,
        flash_mla_with_kvcache=flash_mla_with_kvcache,
        get_mla_metadata=get_mla_metadata,
    )


def own_deep_gemm() -> Path | None:
    """Folder of a DeepGEMM that is installed beside vLLM, which vLLM takes before its own copy. Loads nothing."""
    return _folder("deep_gemm")


def old_deep_gemm_refusals() -> list[str]:
    """Why a DeepGEMM beside vLLM cannot be used; empty if there is none, or it can. Loads nothing."""
    folder = own_deep_gemm()
    if folder is None:
        return []
    text = "\n".join(path.read_text(errors="replace") for path in folder.glob("*.py"))
    lacking = [name for name in DEEP_GEMM_FUNCTIONS if not re.search(rf"\b{name}\b", text)]
    if not lacking:
        return []
    reason = f"the one in {folder} is too old, it lacks {', '.join(lacking)}, and vLLM takes it before its own copy"
    return [f"DeepGEMM: {reason}: pip uninstall deep_gemm"]


def vendor_refusals_by_files(vllm: Path, version: str) -> list[str]:
    """vendor_refusals() as far as the files in vLLM's folder show, without loading any of them."""
    reasons = [_OLD_SCORES] if version.startswith("0.32.") else []
    absent = [name for name in FLASH_MLA_FILES if not any(vllm.glob(name))]
    if absent:
        reasons += _without_vllms_flash_mla(f"{vllm} has no {', '.join(absent)}")
    if os.environ.get("VLLM_USE_DEEP_GEMM", "1").strip() == "0":
        reasons.append("DeepGEMM: VLLM_USE_DEEP_GEMM=0 is set")
    if own_deep_gemm() is None and not any(vllm.glob(DEEP_GEMM_FILE)):
        reasons.append(f"DeepGEMM: neither a package deep_gemm nor {vllm / DEEP_GEMM_FILE} is there")
    return reasons + old_deep_gemm_refusals()


def mqa_logits(codes: Any, keys: Any, scales: Any, weights: Any, starts: Any, ends: Any, longest: int) -> Any:
    """DeepGEMM scores [rows, longest] of gathered keys [starts, ends) of each row, which begin at column 0."""
    from vllm.utils.deep_gemm import fp8_fp4_mqa_logits

    return fp8_fp4_mqa_logits((codes, None), (keys, scales), weights, starts, ends, longest)


def paged_mqa_schedule(lengths: Any, block_size: int) -> Any:
    """DeepGEMM's work schedule of rows of lengths [rows, 1] int32."""
    from vllm.utils.deep_gemm import get_paged_mqa_logits_metadata
    from vllm.utils.platform_utils import num_compute_units

    return get_paged_mqa_logits_metadata(lengths, block_size, num_compute_units(lengths.device.index))


def paged_mqa_logits(codes: Any, pages: Any, weights: Any, lengths: Any, table: Any, schedule: Any, width: int) -> Any:
    """DeepGEMM scores [rows, width] of codes [rows, 1, H, D] against pages [n, block, 1, D + 4] of each row's table."""
    from vllm.utils.deep_gemm import fp8_fp4_paged_mqa_logits

    return fp8_fp4_paged_mqa_logits((codes, None), pages, weights, lengths, table, schedule, width)


def gather_index_keys(pages: Any, keys: Any, scales: Any, table: Any, starts: Any) -> None:
    """Index keys of requests [table] into keys [n, D] e4m3 and scales [n, 1] float32, request i at starts[i]."""
    import torch
    from vllm import _custom_ops

    _custom_ops.cp_gather_indexer_k_quant_cache(pages, keys, scales.view(torch.uint8), table, starts)


def gather_latents(pages: Any, latents: Any, table: Any, starts: Any, requests: int) -> None:
    """fp8_ds_mla latents of requests [table] widened into latents [n, 576] bfloat16, request i at starts[i]."""
    from vllm import _custom_ops

    _custom_ops.cp_gather_and_upconvert_fp8_kv_cache(pages, latents, table, starts, requests)


def flash_mla_schedule() -> Any:
    """An empty work schedule of FlashMLA's decode kernel; the first call that is given it fills it."""
    return _flash_mla().get_mla_metadata()[0]


def flash_mla_decode(query: Any, pages: Any, slots: Any, scale: float, schedule: Any, out: Any) -> tuple[Any, Any]:
    """Values [rows, 1, N, 512], in out where given, and log-sum-exp [rows, N, 1] of query [rows, 1, N, 576] over
    fp8_ds_mla slots."""
    return _flash_mla().flash_mla_with_kvcache(
        q=query,
        k_cache=pages,
        block_table=None,
        cache_seqlens=None,
        head_dim_v=512,
        tile_scheduler_metadata=schedule,
        num_splits=None,
        softmax_scale=scale,
        causal=False,
        is_fp8_kvcache=True,
        indices=slots,
        out=out,
    )


def flash_mla_prefill(query: Any, latents: Any, at: Any, scale: float, valid: Any, out: Any) -> Any:
    """Natural log-sum-exp [rows, N] of query [rows, N, 576] over latents [n, 1, 576]; values go to out [rows, N, 512]."""
    return _flash_mla().flash_mla_sparse_fwd(query, latents, at, scale, topk_length=valid, out=out)[2]


def flash_attention_gathered(query: Any, latents: Any, at: Any, valid: Any, starts: Any, scale: float, out: Any) -> Any:
    """FlashAttention 3 of query [rows, N, 576] over the first ``valid`` of the rows ``at`` [rows, K] of latents [n, 576],
    into out [rows, N, 512]; natural log-sum-exp [rows, N]. starts: 0 to rows, int32 on the device."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    pages = latents[:, None, None]  # of one row
    return flash_attn_varlen_func(
        query[..., 512:],
        pages[..., 512:],
        pages[..., :512],
        q_v=query[..., :512],
        max_seqlen_q=1,
        cu_seqlens_q=starts,
        max_seqlen_k=at.shape[1],
        seqused_k=valid,
        block_table=at,
        softmax_scale=scale,
        causal=True,
        out=out,
        return_softmax_lse=True,
        fa_version=3,
    )[1].T


def flash_attention(
    query: Any, keys: Any, values: Any, query_starts: Any, key_starts: Any, scale: float, out: Any
) -> None:
    """FlashAttention 3 of query [m, N, d] over keys [n, N, d] and values [n, N, v] of one sequence, into out [m, N, v].

    Causal: the last query sees all keys. The starts are [0, m] and [0, n] int32 on the device.
    """
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    flash_attn_varlen_func(
        query,
        keys,
        values,
        max_seqlen_q=len(query),
        cu_seqlens_q=query_starts,
        max_seqlen_k=len(keys),
        cu_seqlens_k=key_starts,
        softmax_scale=scale,
        causal=True,
        out=out,
        num_splits=1,  # a row's bits do not depend on how many there are
        fa_version=3,
    )
