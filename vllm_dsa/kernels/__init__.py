"""The three operations of DSA, and what every provider of them must honour.

A provider is a module of this package (``reference``, ``cpu``, ...) that defines the functions below with
these signatures. Tensors in, tensors out: nothing here knows vLLM.

Names: ``T`` query tokens of this step, ``N`` attention heads of this rank, ``R`` kv_lora_rank, ``P``
qk_rope_head_dim, ``H`` index heads, ``D`` index_head_dim, ``K`` index_topk. The caches' bytes are defined in
``vllm_dsa.cache``, ``Rows`` in ``vllm_dsa.metadata``.

write: normalise, rotate, quantise the new tokens
    write_keys(latent, rope_key, index_key, norms, rope, positions, slots, latent_cache, index_cache) -> None
        latent [T, R], rope_key [T, P], index_key [T, D] or None: projections of the new tokens, model dtype.
        norms: ``Norms``. rope: ``Rope``. positions [T] int64. slots [T] int64: page * block_size + offset;
        a token whose slot is negative is written nowhere. index_key and index_cache are None together.
    write_queries(rope_query, index_query, head_weights, rope, positions, query) -> (codes, weights) or None
        rope_query [T, N, P] is rotated into ``query[..., R:]``, query [T, N, R + P] being the model dtype.
        index_query [T, H, D] (model dtype) comes back as e4m3 codes [T, H, D] (torch.float8_e4m3fn); its
        power-of-two scale times H**-0.5 * D**-0.5 is folded into head_weights [T, H], float32. index_query and
        head_weights are None together; then None is returned. N may be 0: then nothing is rotated.

select: score the index-key cache, return the top-k positions of every row
    select(codes, weights, index_cache, rows, out, scored=None) -> None
        out [T, K] int32 receives token positions of the row's own request, ascending, then -1.
        I[t, s] = sum_h weights[t, h] * relu(codes[t, h] . key[s]) for s < rows.lengths[t].
        A row with fewer than K keys selects them all; a row of length 0 selects nothing. Equal scores go to the
        smaller position. The set is the exact top-k of the provider's own scores.
        scored() is called once, where the first top-k is launched next: what else is launched then may run beside it.

attend: gather the selected latent rows and attend to them
    attend(query, latent_cache, rows, selected, scale, out) -> lse
        query [T, N, R + P], selected [T, K] int32 as select returns it, out [T, N, R] model dtype. Where a provider
        defines query_heads(request), query has that many heads: the N of out, then some that hold anything.
        softmax(scale * query . [latent ‖ rope key]) over the selected positions, times the latents. Returns the
        natural log-sum-exp [T, N] float32. A row that selects nothing gives 0 and -inf.

    attend_dense(query, latent_cache, rows, request, w_uk, w_uv, scale, out) -> None, where a provider has it
        The same without absorption, for rows that see at most K keys: query [m, N, nope + P], rotated, of rows of one
        request, the first ones of the step; w_uk [N, nope, R], w_uv [N, R, v]; out [m, N, v] model dtype.

Both select and attend give bit-equal results for bit-equal rows, whatever else is in the batch; in ``triton``'s attend,
among decodes and among prefills (``Rows.decodes``). The vendor's decodes by FlashMLA and FlashAttention are not, since
these split the keys by what else is in the batch.
``-1`` is the only padding index. Bytes of a page that no token was written to may be anything, NaN included, and must
not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing the contracts loads no torch
    import torch

OPS = ("write", "select", "attend")


@dataclass(frozen=True)
class Norms:
    """Norm parameters of one layer: the latent's RMSNorm [R], the index key's LayerNorm [D] (None together)."""

    latent_weight: torch.Tensor
    latent_eps: float
    index_weight: torch.Tensor | None
    index_bias: torch.Tensor | None
    index_eps: float = 1e-6


@dataclass(frozen=True)
class Rope:
    """Rotary tables: cos_sin [max_position, P] float32, cosines in the first half, sines in the second.

    MLA's own rotation is interleaved, always; ``index_interleaved`` is the layout of the indexer's, which turns the
    first P of the D index dims.
    """

    cos_sin: torch.Tensor
    index_interleaved: bool
