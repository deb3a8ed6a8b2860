"""The seam to vLLM's attention interface: what a step's metadata is, and how vLLM asks for it. Thin on purpose.

Two backends, because vLLM builds metadata once for each kind of cache: ``DSABackend`` for the latent caches builds the
rows that every operation of a layer uses; ``IndexCacheBackend`` lets vLLM allocate the index-key caches and builds
nothing, since both caches are in one KV group and share their block table.
"""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_dsa.compat import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder, MultipleOf
from vllm_dsa.metadata import Rows, build_rows

BLOCK_SIZE_MULTIPLE = 16


@dataclass(frozen=True)
class DSAMetadata:
    """One step: its query rows, and the slot [num_tokens] int64 that each new token's keys go to."""

    rows: Rows
    slots: torch.Tensor
    num_tokens: int


class DSABuilder(AttentionMetadataBuilder[DSAMetadata]):
    """Builds a step's rows from vLLM's lengths and block table."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(None)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> DSAMetadata:
        common = common_attn_metadata
        rows = build_rows(
            query_starts=common.query_start_loc_cpu[: common.num_reqs + 1],
            seq_lens=common.seq_lens[: common.num_reqs].cpu(),
            block_table=common.block_table_tensor,
            block_size=self.kv_cache_spec.block_size,
            num_tokens=common.num_actual_tokens,
        )
        return DSAMetadata(rows=rows, slots=common.slot_mapping, num_tokens=common.num_actual_tokens)


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
    def supports_kv_connector(cls) -> bool:
        return False


class IndexCacheBuilder(AttentionMetadataBuilder[None]):
    """Builds nothing: the layer's latent-cache metadata serves the indexer too."""

    _cudagraph_support = DSABuilder._cudagraph_support

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(None)

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
