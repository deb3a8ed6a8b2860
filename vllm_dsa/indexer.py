"""The lightning indexer: its projections, and the layer that owns its paged key cache."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vllm_dsa import cache
from vllm_dsa.backend import IndexCacheBackend
from vllm_dsa.compat import AttentionLayerBase, MLAAttentionSpec, ReplicatedLinear, dequantised_weight, register_layer
from vllm_dsa.config import DSAConfig
from vllm_dsa.packed_weights import none_if_packed


class IndexCache(nn.Module, AttentionLayerBase):
    """Owns one layer's index-key pages; vLLM allocates and binds them by this layer's name."""

    supports_dcp = False  # vLLM's base class promises it

    def __init__(self, head_dim: int, prefix: str) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.kv_cache = torch.empty(0)
        self.layer_name = prefix
        register_layer(prefix, self)

    def get_attn_backend(self) -> type:
        return IndexCacheBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.head_dim + cache.SCALE_BYTES,
            dtype=torch.uint8,
        )

    @property
    def pages(self) -> torch.Tensor:
        """The cache as planar pages [pages, block_size * (D + 4)] uint8, whatever the stride between pages.

        vLLM binds it as [pages, 1, block_size, D + 4].
        """
        bound = self.kv_cache
        if bound.shape[1] != 1 or bound[0].is_contiguous() is False:
            raise RuntimeError(
                f"index-key cache of shape {tuple(bound.shape)}, strides {bound.stride()}: pages must be dense. "
                f"Unset VLLM_KV_CACHE_LAYOUT."
            )
        return bound.flatten(1)


class Indexer(nn.Module):
    """Projections of one layer's indexer; replicated on every rank, so that every rank selects the same tokens."""

    def __init__(self, config: DSAConfig, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.heads, self.head_dim = config.index_n_heads, config.index_head_dim
        self.wq_b = ReplicatedLinear(
            config.q_lora_rank,
            self.heads * self.head_dim,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.wq_b",
        )
        self.wk = ReplicatedLinear(
            config.hidden_size,
            self.head_dim,
            bias=False,
            quant_config=none_if_packed(quant_config),
            prefix=f"{prefix}.wk",
        )
        # Unquantised in every checkpoint that its publisher has made.
        self.weights_proj = ReplicatedLinear(
            config.hidden_size, self.heads, bias=False, quant_config=None, prefix=f"{prefix}.weights_proj"
        )
        # Of these two the weights are read after loading and never multiplied as they are.
        for linear in (self.wk, self.weights_proj):
            linear._cpu_skip_gemm_dispatch = True
        # Holds the parameters only: write_keys norms. eps is not rms_norm_eps.
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6, dtype=torch.float32)
        self.cache = IndexCache(self.head_dim, prefix=f"{prefix}.k_cache")

    def derived(self, dtype: torch.dtype) -> torch.Tensor:
        """weights_proj and wk as one weight [H + D, hidden], called ``fused`` once it is stored: on a GPU one product
        of a few rows costs as much as two."""
        return torch.cat([dequantised_weight(linear, dtype) for linear in (self.weights_proj, self.wk)])

    def queries(self, query_latent: torch.Tensor) -> torch.Tensor:
        """query_latent [T, q_lora_rank] (normed) to index queries [T, H, D], not rotated."""
        return self.wq_b(query_latent)[0].view(-1, self.heads, self.head_dim)

    def weights_and_key(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [T, hidden] to head weights [T, H] and index keys [T, D], not normed, rotated or scaled."""
        head_weights, index_key = F.linear(hidden_states, self.fused).split([self.heads, self.head_dim], dim=-1)
        return head_weights, index_key
