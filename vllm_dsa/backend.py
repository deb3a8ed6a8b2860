"""The seam to vLLM's attention interface: what a step's metadata is, and how vLLM asks for it. Thin on purpose.

Two backends, because vLLM builds metadata once for each kind of cache: ``DSABackend`` for the latent caches builds the
rows that every operation of a layer uses; ``IndexCacheBackend`` lets vLLM allocate the index-key caches and builds
nothing, since both caches are in one KV group and share their block table.
"""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_dsa import cache
from vllm_dsa.compat import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    MultipleOf,
    current_platform,
)
from vllm_dsa.config import DSAConfig
from vllm_dsa.kernels.limits import Request
from vllm_dsa.metadata import DeviceRows, Rows, build_rows
from vllm_dsa.platform import BLOCK_SIZE_MULTIPLE


@dataclass(frozen=True)
class DSAMetadata:
    """One step: its query rows, and the slot [num_tokens] int64 that each new token's keys go to."""

    rows: Rows
    slots: torch.Tensor
    num_tokens: int


class DSABuilder(AttentionMetadataBuilder[DSAMetadata]):
    """Builds a step's rows from vLLM's lengths and block table."""

    # A batch of 1 + num_speculative_tokens rows a request is one full graph; one builder without support would turn
    # every graph off.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.layers = [vllm_config.compilation_config.static_forward_context[name] for name in layer_names]
        if device.type == "cpu":
            self._init_reorder_batch_threshold(None)
            self.device_rows = None
        else:
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
            self.device_rows = DeviceRows(vllm_config.scheduler_config.max_num_batched_tokens, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> DSAMetadata:
        for layer in self.layers:
            layer.follow_weights()
        common, requests = common_attn_metadata, common_attn_metadata.num_reqs
        facts = dict(
            block_table=common.block_table_tensor[:requests],
            block_size=self.kv_cache_spec.block_size,
            num_tokens=common.num_actual_tokens,
        )
        host_starts = common.query_start_loc_cpu[: requests + 1]
        if self.device_rows is None:
            rows = build_rows(query_starts=host_starts, seq_lens=common.seq_lens[:requests], **facts)
        else:
            rows = self.device_rows.build(
                query_starts=common.query_start_loc[: requests + 1],
                seq_lens=common.seq_lens[:requests],
                host_starts=host_starts.tolist(),
                host_ends=_host_ends(common, requests),
                decode_rows=self.reorder_batch_threshold,
                **facts,
            )
        return DSAMetadata(rows=rows, slots=common.slot_mapping, num_tokens=common.num_actual_tokens)


def _host_ends(common: Any, requests: int) -> list[int]:
    """Upper bounds of the requests' lengths as host ints; graph capture may bring none for each."""
    bounds = common.seq_lens_cpu_upper_bound
    return [common.max_seq_len] * requests if bounds is None else bounds[:requests].tolist()


def kernel_request(vllm_config: Any, config: DSAConfig) -> Request:
    """What a layer on one rank needs of its kernels."""
    capability = current_platform.get_device_capability()
    cache_config, ranks = vllm_config.cache_config, vllm_config.parallel_config.tensor_parallel_size
    return Request(
        device_type=current_platform.device_type,
        capability=None if capability is None else tuple(capability),
        dtype=vllm_config.model_config.dtype,
        latent_kind=cache.FP8_DS_MLA if cache_config.cache_dtype == cache.FP8_DS_MLA else "auto",
        kv_lora_rank=config.kv_lora_rank,
        rope_dim=config.qk_rope_head_dim,
        num_heads=config.num_attention_heads // ranks,
        index_heads=config.index_n_heads,
        index_dim=config.index_head_dim,
        top_k=config.top_k(vllm_config.model_config.max_model_len),
        block_size=cache_config.block_size,
    )


class DSABackend(AttentionBackend):
    """The latent cache's backend, known to vLLM under the name DSA."""

    supported_dtypes = [torch.float32, torch.bfloat16]
    supported_kv_cache_dtypes = ["auto", "bfloat16", "fp8_ds_mla"]

    @staticmethod
    def get_name() -> str:
        return "DSA"

    @staticmethod
    def get_impl_cls() -> type:
        raise NotImplementedError("DSA layers call their kernels themselves and have no AttentionImpl.")

    @staticmethod
    def get_builder_cls() -> type:
        return DSABuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @classmethod
    def is_sparse(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # Rows.starts are the host's, and say which rows are decodes


class IndexCacheBuilder(AttentionMetadataBuilder[None]):
    """Builds nothing: the layer's latent-cache metadata serves the indexer too."""

    _cudagraph_support = DSABuilder._cudagraph_support

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(None)  # no vote on the order of the batch

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> None:
        return None


class IndexCacheBackend(DSABackend):
    """The index-key cache's backend."""

    @staticmethod
    def get_name() -> str:
        return "DSA_INDEX"

    @staticmethod
    def get_builder_cls() -> type:
        return IndexCacheBuilder
